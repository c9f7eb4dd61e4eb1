//! The gradients of q, k, beta and g on tensor cores: one cube per block of micro-steps and value head.
//!
//! With the residuals R, dV, the state S before the block and the gradient dS of the state behind it, nothing depends on
//! other blocks, and blocks may be longer than the chunks of the scan:
//!
//! ```text
//! dQ =  e^G . dO S^T + Y beta K        Y = Gamma . scale dO R^T   (tril)
//! E  = -e^G . dV S^T + X beta K        X = -Gamma . dV R^T        (stril)
//! H  =  e^{G_C - G} . R dS^T + Y^T Q + X^T K
//! dK = E + beta . H      dbeta = K . H
//! ```
//!
//! For the gates see `docs/math.md`: sums of K . E, Q . dQ and K . H over the channels, before the pairs inside a token
//! are added, which no gate lies between.

mod blueprint;
mod channel;
pub mod collect;
mod copy;
mod ends;
mod head;
mod here;
mod pairs;
mod states;
mod sums;

pub use blueprint::{BLOCK, GradientsBlueprint};

use cubecl::prelude::*;

use super::tile::{V8, by_depth};
use crate::record::Strides;
use channel::gradients_by_channel;
use head::gradients_by_head;
use here::Here;

/// Reads what [`sweep`](mod@super::sweep) has left, and `dv`; writes the other gradients. `dq` and `dk` have a head
/// for each value head. `constants` takes, for each block and head, the gradients of `a_log` and `dt_bias`.
///
/// `value_steps` is V / 16. Cube `p` takes head `p % heads` of block `p / heads`, or where sequences are packed of the block that begins with
/// chunk `p / heads`, if one does. For other arguments see [`forward`](mod@super::forward).
#[cube(launch_unchecked, fast_math = FastMath::all(), address_type = "u64")]
pub fn gradients<F: Float, B: Float, G: Float>(
    q: &Array<Vector<F, V8>>,
    k: &Array<Vector<F, V8>>,
    d_o: &Array<Vector<F, V8>>,
    dv: &Array<Vector<F, V8>>,
    beta: &Array<B>,
    g: &Array<G>,
    a_log: &Array<f32>,
    dt_bias: &Array<f32>,
    table: &Array<u32>,
    record_factors: &Array<f32>,
    residuals: &Array<Vector<F, V8>>,
    states: &Array<Vector<F, V8>>,
    d_states: &Array<Vector<F, V8>>,
    dq_out: &mut Array<Vector<F, V8>>,
    dk_out: &mut Array<Vector<F, V8>>,
    d_beta: &mut Array<B>,
    dg: &mut Array<G>,
    constants: &mut Array<f32>,
    q_at: Strides,
    k_at: Strides,
    d_o_at: Strides,
    dv_at: Strides,
    beta_at: Strides,
    g_at: Strides,
    dq_at: Strides,
    dk_at: Strides,
    d_beta_at: Strides,
    dg_at: Strides,
    tokens: u32,
    sequences: u32,
    blocks: u32,
    heads: u32,
    group: u32,
    record_floats: u32,
    value_steps: u32,
    scale: f32,
    lower_bound: f32,
    #[comptime] bp: GradientsBlueprint,
    #[define(F, B, G)] _types: [StorageType; 3],
) {
    let here = Here::find(table, tokens, sequences, blocks, heads, group, bp);
    if comptime!(bp.by_channel()) {
        gradients_by_channel::<F, B, G>(
            q,
            k,
            d_o,
            dv,
            beta,
            g,
            a_log,
            dt_bias,
            record_factors,
            residuals,
            states,
            d_states,
            dq_out,
            dk_out,
            d_beta,
            dg,
            constants,
            &q_at,
            &k_at,
            &d_o_at,
            &dv_at,
            &beta_at,
            &g_at,
            &dq_at,
            &dk_at,
            &d_beta_at,
            &dg_at,
            here,
            record_floats,
            value_steps,
            scale,
            lower_bound,
            bp,
        );
    } else {
        gradients_by_head::<F, B, G>(
            q,
            k,
            d_o,
            dv,
            beta,
            g,
            a_log,
            dt_bias,
            residuals,
            states,
            d_states,
            dq_out,
            dk_out,
            d_beta,
            dg,
            constants,
            &q_at,
            &k_at,
            &d_o_at,
            &dv_at,
            &beta_at,
            &g_at,
            &dq_at,
            &dk_at,
            &d_beta_at,
            &dg_at,
            here,
            value_steps,
            scale,
            lower_bound,
            bp,
        );
    }
}

/// A plane's place: all rows of its 16 key channels.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Own {
    pub(crate) plane: usize,
    pub(crate) lane: usize,
    /// The rows of keys or queries that this unit passes to `load`, and those of values.
    pub(crate) key_rows: usize,
    pub(crate) value_rows: usize,
}

#[cube]
impl Own {
    fn new(plane: usize, lane: usize, #[comptime] bp: GradientsBlueprint) -> Self {
        Own {
            plane,
            lane,
            key_rows: 2 * plane + by_depth(lane, comptime!(bp.key_row())),
            value_rows: by_depth(lane, comptime!(bp.value_row())),
        }
    }
}
