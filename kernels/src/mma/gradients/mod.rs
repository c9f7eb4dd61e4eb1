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

use super::arguments::{InputGradients, Kept, Rows, Sizes};
use super::tile::by_depth;
use crate::order::declare_in_order;
use crate::tensors::Gating;
use channel::gradients_by_channel;
use head::gradients_by_head;
use here::Here;

/// Reads what [`sweep`](mod@super::sweep) has left, and `dv`; writes the other gradients. `constants` takes, for each block and head, the gradients of `a_log` and `dt_bias`.
///
/// `value_steps` is V / 16. Cube `p` takes head `p % heads` of block `p / heads`, or where sequences are packed of the block that begins with
/// chunk `p / heads`, if one does. For other arguments see [`forward`](mod@super::forward).
#[cube(launch_unchecked, fast_math = FastMath::all(), address_type = "u64")]
pub fn gradients<F: Float, B: Float, G: Float>(
    q: &Rows<F>,
    k: &Rows<F>,
    d_o: &Rows<F>,
    dv: &Rows<F>,
    gating: &Gating<B, G>,
    table: &Array<u32>,
    record_factors: &Array<f32>,
    kept: &Kept<F>,
    to: &mut InputGradients<F, B, G>,
    constants: &mut Array<f32>,
    sizes: Sizes,
    blocks: u32,
    record_floats: u32,
    value_steps: u32,
    scale: f32,
    #[comptime] bp: GradientsBlueprint,
    #[define(F, B, G)] _types: [StorageType; 3],
) {
    let here = Here::find(table, sizes, blocks, bp);
    if comptime!(bp.by_channel()) {
        gradients_by_channel::<F, B, G>(
            q,
            k,
            d_o,
            dv,
            gating,
            record_factors,
            kept,
            to,
            constants,
            here,
            record_floats,
            value_steps,
            scale,
            bp,
        );
    } else {
        gradients_by_head::<F, B, G>(
            q,
            k,
            d_o,
            dv,
            gating,
            kept,
            to,
            constants,
            here,
            value_steps,
            scale,
            bp,
        );
    }
    declare_in_order();
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
