//! The same gradients with a gate per key channel.
//!
//! $\Gamma_{ij}$ lies inside the sums over pairs now, and takes three ways. Between strips of 8 rows it is a factor of row
//! i since the start of its strip, one of row j to the end of its, and the decay of the strips between (`between.rs`, on
//! tensor cores, where sums walk from strip to strip and are decayed on their way). Inside a strip a unit takes a channel
//! from row to row in f32 (`walk.rs`). All factors are in `[0, 1]`, so that no gate is too strong.
//!
//! With Q and K after their norms, and H in its three parts, what it takes from the state, from pairs, and from its own
//! token:
//!
//! ```text
//! dg_t = sum_{i >= t} (Q_i dQ_i + K_i E_i - beta_i K_i H_i^pairs) + sum_{j < t} beta_j K_j H_j^state + gamma dS . S
//! ```

mod between;
mod ends;
mod operands;
mod out;
mod sums;
mod walk;

use cubecl::prelude::*;

use super::super::arguments::{InputGradients, Kept, Rows};
use super::super::blueprint::TILE;
use super::super::memory::{new_tile, region};
use super::super::tile::{Mma, V4, by_depth, zeros};
use super::Own;
use super::blueprint::{GradientsBlueprint, STRIP, TILES};
use super::copy::{load_values, put_rows, put_values, send_for_rows, send_for_values};
use super::here::Here;
use super::states::{Column, Reading, multiply_channels, read_states};
use crate::tensors::Gating;
use between::{add_from_behind, add_from_keys, leave_pairs, leave_sums};
use ends::{gradient_of_beta, leave_constants};
use operands::{STRIPS_OF_TILE, leave_operands, leave_row_factors, place_of, read_gates};
use out::store_gradients;
use walk::walk_strips;

/// As [`gradients`](fn@super::gradients). `record_factors` are those of [`prepare`](mod@crate::mma::prepare),
/// `record_floats` for each chunk and head.
#[cube]
pub(crate) fn gradients_by_channel<F: Float, B: Float, G: Float>(
    q: &Rows<F>,
    k: &Rows<F>,
    d_o: &Rows<F>,
    dv: &Rows<F>,
    gating: &Gating<B, G>,
    record_factors: &Array<f32>,
    kept: &Kept<F>,
    to: &mut InputGradients<F, B, G>,
    constants: &mut Array<f32>,
    here: Here,
    record_floats: u32,
    value_steps: u32,
    scale: f32,
    #[comptime] bp: GradientsBlueprint,
) {
    let regions = comptime!(bp.regions());
    let mut tile = new_tile::<F>(comptime!(regions.units));
    let mut floats = region::<F, f32>(&tile, comptime!(regions.at[1]));
    let mut words = region::<F, u32>(&tile, comptime!(regions.at[2]));
    let mut diagonals = region::<F, Vector<f32, V4>>(&tile, comptime!(regions.at[3]));
    here.leave(&mut words);
    let mma = Mma::<F>::new(16usize, 8usize, 16usize);
    // Of this index the compiler knows a bound, so that what is added to it becomes part of addresses.
    let unit = UNIT_POS_X as usize;
    let lane = unit % 32;
    let plane = unit / 32;

    let (t, d) = place_of(unit, bp);
    let mut raw = Array::<f32>::new(STRIP);
    read_gates::<G>(&mut raw, &gating.g, &here, t * STRIPS_OF_TILE, d, bp);
    let rows = send_for_rows::<F>(q, k, &here, unit, bp);
    let values = send_for_values::<F>(d_o, dv, &kept.residuals, &here, unit, 0usize, bp);
    leave_row_factors(&gating.beta, record_factors, &here, record_floats, scale, &mut floats, unit, bp);
    put_rows::<F>(&rows, &mut tile, &here, unit, bp);
    put_values::<F>(&values, &mut tile, &here, unit, 0usize, bp);
    load_values::<F>(&mut tile, d_o, dv, &kept.residuals, &here, unit, 1usize, bp);
    sync_cube();
    leave_operands::<F, B, G>(&mut raw, gating, &here, &mut tile, &mut floats, unit, bp);
    leave_pairs::<F>(&mma, &mut tile, &mut diagonals, plane, lane, bp);
    sync_cube();

    // A plane has 16 key channels of half the rows.
    let columns = comptime!(bp.planes());
    let half = plane / columns;
    let rows = half * comptime!(TILES / 2 * TILE);
    let own = Own {
        plane: plane % columns,
        lane,
        key_rows: 2 * (plane % columns) + by_depth(lane, comptime!(bp.key_row())),
        value_rows: by_depth(lane, comptime!(bp.value_row())) + rows * comptime!(bp.value_row()),
    };
    let mut dq = zeros(TILES);
    let mut less_e = zeros(TILES);
    let mut h = zeros(TILES);
    let mut through = zeros(TILES);
    if half < 2 {
        let column = Column::new(here.head_of(here.kept), value_steps, own, bp);
        multiply_channels::<F>(&mut floats, kept, column, own, half, bp);
        #[unroll]
        for which in 0..2usize {
            let reading = comptime!(if which == 0 { Reading::D_STATES } else { Reading::STATES });
            read_states::<F>(
                &mma,
                &tile,
                kept,
                column,
                &mut dq,
                &mut less_e,
                &mut through,
                own,
                reading,
                0usize,
                bp,
            );
        }
        let first = half as u32 * comptime!(TILES as u32 / 2);
        add_from_keys::<F>(&mma, &tile, &floats, &mut dq, &mut less_e, own, first, bp);
        add_from_behind::<F>(&mma, &tile, &floats, &mut h, &mut through, own, first, bp);
    }
    sync_cube();
    if half < 2 {
        leave_sums::<F>(&dq, &mut tile, comptime!(bp.channel_sums_at(0)), rows, own, bp);
        leave_sums::<F>(&less_e, &mut tile, comptime!(bp.channel_sums_at(1)), rows, own, bp);
        leave_sums::<F>(&h, &mut tile, comptime!(bp.channel_sums_at(2)), rows, own, bp);
        leave_sums::<F>(&through, &mut tile, comptime!(bp.channel_sums_at(3)), rows, own, bp);
    }
    sync_cube();
    walk_strips::<F, B, G>(gating, &words, &mut tile, &diagonals, &mut floats, unit, bp);
    sync_cube();
    gradient_of_beta(&gating.beta, &mut to.beta, &Here::left(&words), &floats, unit, bp);
    let (by_a_log, by_bias) = store_gradients::<F, B, G>(gating, to, &words, &tile, &floats, unit, bp);
    leave_constants(by_a_log, by_bias, constants, &mut floats, unit, bp);
}
