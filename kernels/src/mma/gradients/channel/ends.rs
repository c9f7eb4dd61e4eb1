//! The gradient of beta, and shares of those of the gate's constants.

use cubecl::prelude::*;

use super::super::super::memory::Region;
use super::super::blueprint::{BLOCK, GradientsBlueprint, KEY_NORMS_AT, TILES};
use super::super::here::Here;
use super::operands::{is_channel, place_of};
use super::sums::{KEY, row_sum};
use crate::math::beta_slope;
use crate::spec::GateMap;
use crate::tensors::Strided;

/// A unit takes a row.
#[cube]
pub(crate) fn gradient_of_beta<B: Float>(
    beta: &Strided<B>,
    d_beta: &mut Strided<B>,
    here: &Here,
    floats: &Region<f32>,
    unit: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    if unit < BLOCK && (unit as u32) < here.steps {
        let step = here.step(unit as u32, 1usize);
        let (row, hv) = (here.row as usize, here.hv as usize);
        let d = floats[KEY_NORMS_AT + unit] * row_sum(floats, unit, KEY, bp);
        let raw = f32::cast_from(beta.data[beta.at.at(row, step, hv)]);
        let at = d_beta.at.at(row, step, hv);
        d_beta.data[at] = B::cast_from(d * beta_slope(raw, bp.spec.beta));
    }
}

/// Adds the shares of the tiles, channel by channel.
#[cube]
pub(crate) fn leave_constants(
    by_a_log: f32,
    by_bias: f32,
    constants: &mut Array<f32>,
    floats: &mut Region<f32>,
    unit: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    if comptime!(bp.spec.gate != GateMap::Identity) {
        let channels = comptime!(bp.channels());
        let (t, d) = place_of(unit, bp);
        // Sums for the gates have been read by all.
        sync_cube();
        let at = t as usize * channels + d as usize;
        floats[comptime!(bp.later_at()) + at] = by_a_log;
        floats[comptime!(bp.earlier_at()) + at] = by_bias;
        sync_cube();
        if is_channel(d, bp) && t == 0 {
            let mut by_a_log = 0.0f32;
            let mut by_bias = 0.0f32;
            #[unroll]
            for tile in 0..TILES {
                by_a_log += floats[comptime!(bp.later_at() + tile * channels) + d as usize];
                by_bias += floats[comptime!(bp.earlier_at() + tile * channels) + d as usize];
            }
            let to = CUBE_POS * comptime!(2 * bp.spec.key_dim) + d as usize;
            constants[to] = by_a_log;
            constants[to + comptime!(bp.spec.key_dim)] = by_bias;
        }
    }
}
