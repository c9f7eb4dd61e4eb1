//! What comes of all sums: dQ, dK and dg.

use cubecl::prelude::*;

use super::super::super::arguments::InputGradients;
use super::super::super::memory::Region;
use super::super::super::tile::Tile;
use super::super::blueprint::{GradientsBlueprint, KEY_NORMS_AT, READ_NORMS_AT, READS_AT, STRIP, STRIPS};
use super::super::here::Here;
use super::operands::{
    Channel, STRIPS_OF_TILE, V1, constants_of, four_of, index_of, is_channel, place_of, read_gates,
};
use super::sums::{ALONG_KEY, ALONG_QUERY, row_sum};
use super::walk::{D_Q, ENDS, ERASES, PAIRS};
use crate::math::gate_slopes;
use crate::tensors::Gating;

/// What the state and other strips add to all gates of a tile's last strip; and as if it were one of these, what that strip
/// adds to gates behind it.
#[cube]
fn from_others(floats: &Region<f32>, last: u32, d: u32, #[comptime] bp: GradientsBlueprint) -> f32 {
    let channels = comptime!(bp.channels());
    let channel = d as usize;
    let mut sum = floats[comptime!(bp.products_at()) + channel]
        + floats[comptime!(bp.products_at() + channels) + channel];
    #[unroll]
    for strip in 0..STRIPS {
        sum *= floats[comptime!(bp.strip_decays_at() + strip * channels) + channel];
    }
    #[unroll]
    for strip in 0..STRIPS {
        let behind = floats[comptime!(bp.later_at() + strip * channels) + channel];
        let before = floats[comptime!(bp.earlier_at() + strip * channels) + channel];
        sum += select(last < comptime!(strip as u32), behind, before);
    }
    sum
}

/// Stores dQ, dK and dg when all strips have been walked. Returns the unit's share of the gradients of `a_log` and `dt_bias`.
#[cube]
pub(crate) fn store_gradients<F: Float, B: Float, G: Float>(
    gating: &Gating<B, G>,
    to: &mut InputGradients<F, B, G>,
    words: &Region<u32>,
    tile: &Tile<F>,
    floats: &Region<f32>,
    unit: usize,
    #[comptime] bp: GradientsBlueprint,
) -> (f32, f32) {
    let (t, d) = place_of(unit, bp);
    let here = Here::left(words);
    let channel = d as usize;
    let (queries, keys) = comptime!((bp.raw_queries_at(), bp.raw_keys_at()));
    let (a, bias) = constants_of(&gating.formula, &here, d, bp);
    let mut raw = Array::<f32>::new(STRIP);
    let mut by_a_log = 0.0f32;
    let mut by_bias = 0.0f32;
    let row = here.row as usize;
    let mut dq_out = to.q.data.to_slice_mut().with_vector_size::<V1>();
    let mut dk_out = to.k.data.to_slice_mut().with_vector_size::<V1>();
    let last = t * STRIPS_OF_TILE + comptime!(STRIPS_OF_TILE - 1);
    let mut rest = from_others(floats, last, d, bp);
    for s in 0..STRIPS_OF_TILE {
        let strip = last - s;
        read_gates::<G>(&mut raw, &gating.g, &here, strip, d, bp);
        rest -= floats[comptime!(bp.earlier_at()) + index_of(strip, d, bp)];
        let mut reads = four_of(floats, strip, READS_AT, 4usize);
        let own = Channel::new(strip, d, bp);
        let rows = (strip * comptime!(STRIP as u32)) as usize;
        let step = here.step(0u32, 1usize) + rows;
        let dq0 = to.q.at.at(row, step, here.hv as usize) + channel;
        let dk0 = to.k.at.at(row, step, here.hv as usize) + channel;
        let dg0 = to.g.at.at(row, step, here.hv as usize) + channel;
        #[unroll]
        for down in 0..STRIP {
            let r = comptime!(STRIP - 1 - down);
            if comptime!(r == 3) {
                reads = four_of(floats, strip, READS_AT, r);
            }
            rest += own.get::<F>(tile, ENDS, r, bp);
            if is_channel(d, bp) && rows as u32 + comptime!(r as u32) < here.steps {
                let mut d_q_r = own.get::<F>(tile, D_Q, r, bp);
                let mut d_k_r = own.get::<F>(tile, ERASES, r, bp);
                if comptime!(bp.spec.qk_l2norm) {
                    // That of a row x itself is rho (d - rho^2 x (x . d)).
                    let norm = floats[READ_NORMS_AT + rows + r];
                    let along = norm * norm * row_sum(floats, rows + r, ALONG_QUERY, bp);
                    d_q_r -= own.element::<F>(tile, queries, r, bp) * along;
                    let norm = floats[KEY_NORMS_AT + rows + r];
                    let along = norm * norm * row_sum(floats, rows + r, ALONG_KEY, bp);
                    d_k_r = norm * (d_k_r - own.element::<F>(tile, keys, r, bp) * along);
                }
                d_q_r *= reads[comptime!(r % 4)];
                let by_g = rest + own.get::<F>(tile, PAIRS, r, bp);
                let (by_x, by_a) = gate_slopes(raw[r], a, bias, gating.formula.lower_bound, bp.spec.gate);
                by_bias = fma(by_g, by_x, by_bias);
                by_a_log = fma(by_g, by_a, by_a_log);
                dq_out[dq0 + (comptime!(r as u32) * to.q.at.t) as usize] = Vector::cast_from(d_q_r);
                dk_out[dk0 + (comptime!(r as u32) * to.k.at.t) as usize] = Vector::cast_from(d_k_r);
                to.g.data[dg0 + (comptime!(r as u32) * to.g.at.t) as usize] = G::cast_from(by_g * by_x);
            }
        }
    }
    (by_a_log, by_bias)
}
