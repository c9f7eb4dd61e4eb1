//! From sums over channels to the gradients of beta and of the gates.

use cubecl::prelude::*;

use super::super::gates::{LOWEST, running_sum};
use super::super::gram::over_row;
use super::super::memory::Region;
use super::super::tile::{Tile, V2, V8};
use super::blueprint::{
    ALONG_KEYS_AT, ALONG_QUERIES_AT, BETAS_AT, BLOCK, DECAYS_AT, E_FACTORS_AT, GradientsBlueprint,
    H_FACTORS_AT, KEY_NORMS_AT, PRODUCTS_AT, QUERY_NORMS_AT, READ_FACTORS_AT,
};
use super::here::Here;
use super::pairs::Reads;
use super::sums::{over_planes, which};
use crate::known::known_and;
use crate::math::{beta_of, beta_slope, gate_constants, gate_slopes, log_decay_of};
use crate::spec::{Decay, GateMap};
use crate::tensors::{GateFormula, Gating, Strided};

/// Beta and g of two micro-steps of a lane, as the caller holds them.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct RawPair {
    beta: Vector<f32, V2>,
    g: Vector<f32, V2>,
}

/// Reads beta and g: lane `l` of the first two planes for micro-steps `2 l` and the next, the last one for those behind the
/// block.
#[cube]
pub(crate) fn read_block_gates<B: Float, G: Float>(
    gating: &Gating<B, G>,
    here: &Here,
    plane: usize,
    lane: usize,
    #[comptime] bp: GradientsBlueprint,
) -> RawPair {
    let n_h = comptime!(bp.spec.micro_steps);
    let (beta, g) = (&gating.beta, &gating.g);
    let mut raw = RawPair { beta: Vector::cast_from(0.0f32), g: Vector::cast_from(0.0f32) };
    if plane < 2 {
        let last = here.steps - 1;
        let (row, hv) = (here.row as usize, here.hv as usize);
        #[unroll]
        for e in 0..2usize {
            let own = u32::min((2 * lane + e) as u32, last);
            raw.beta[e] = f32::cast_from(beta.data[beta.at.at(row, here.step(own, n_h), hv)]);
            if comptime!(bp.spec.decay == Decay::Head) {
                raw.g[e] = f32::cast_from(g.data[g.at.at(row, here.token(own, n_h), hv)]);
            }
        }
    }
    raw
}

/// Leaves beta, the log decay from the start of the block to each micro-step, and the factors that come of it.
#[cube]
pub(crate) fn leave_gates(
    raw: &RawPair,
    formula: &GateFormula,
    scale: f32,
    here: &Here,
    reads: Reads,
    floats: &mut Region<f32>,
    plane: usize,
    lane: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    let n_h = comptime!(bp.spec.micro_steps);
    if plane == 0 {
        let (a, bias) = gate_constants(formula, here.hv as usize, 0usize, bp.spec);
        let mut logs = Vector::<f32, V2>::cast_from(0.0f32);
        #[unroll]
        for e in 0..2usize {
            let own = 2 * lane + e;
            let valid = own < here.steps as usize;
            floats[BETAS_AT + own] = select(valid, beta_of(raw.beta[e], bp.spec.beta), 0.0f32);
            if comptime!(bp.spec.decay == Decay::Head) {
                let log =
                    f32::max(log_decay_of(raw.g[e], a, bias, formula.lower_bound, bp.spec.gate), LOWEST);
                logs[e] =
                    select(valid && (here.step0 + own as u32) % comptime!(n_h as u32) == 0, log, 0.0f32);
            }
        }
        let sum = running_sum(logs[0] + logs[1], lane);
        let before = plane_shuffle_up(sum, 1u32);
        logs[0] = select(lane > 0, before, 0.0f32) + logs[0];
        logs[1] = sum;
        let total = plane_shuffle(sum, 31u32);
        #[unroll]
        for e in 0..2usize {
            let own = 2 * lane + e;
            floats[DECAYS_AT + own] = logs[e];
            floats[E_FACTORS_AT + own] = -f32::exp(logs[e]);
            floats[H_FACTORS_AT + own] = f32::exp(total - logs[e]);
        }
        sync_plane();
        #[unroll]
        for e in 0..2usize {
            let own = 2 * lane + e;
            let at = reads.position(own as u32, bp.spec.micro_steps) as usize;
            floats[READ_FACTORS_AT + own] = scale * f32::exp(floats[DECAYS_AT + at]);
        }
    }
}

/// Leaves ones for the reciprocal norms where there is no norm.
#[cube]
pub(crate) fn leave_ones(floats: &mut Region<f32>, unit: usize, #[comptime] bp: GradientsBlueprint) {
    if comptime!(!bp.spec.qk_l2norm) {
        #[unroll]
        for round in 0..comptime!((2 * BLOCK).div_ceil(bp.units())) {
            let i = unit + comptime!(round * bp.units());
            if i < comptime!(2 * BLOCK) {
                floats[KEY_NORMS_AT + i] = 1.0f32;
            }
        }
    }
}

/// Leaves the reciprocal norms of keys and queries, and ends with a barrier, if there is a norm.
#[cube]
pub(crate) fn leave_norms<F: Float>(
    tile: &Tile<F>,
    floats: &mut Region<f32>,
    unit: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    if comptime!(bp.spec.qk_l2norm) {
        norms_of::<F>(tile, floats, comptime!(bp.k_at()), KEY_NORMS_AT, BLOCK, unit, bp);
        norms_of::<F>(tile, floats, 0usize, QUERY_NORMS_AT, 16 * bp.read_tiles(), unit, bp);
        sync_cube();
    }
}

/// Four units take a row.
#[cube]
fn norms_of<F: Float>(
    tile: &Tile<F>,
    floats: &mut Region<f32>,
    #[comptime] at: usize,
    #[comptime] to: usize,
    #[comptime] rows: usize,
    unit: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    let cols = comptime!(bp.spec.key_dim / 8);
    #[unroll]
    for round in 0..comptime!((4 * rows).div_ceil(bp.units())) {
        let i = unit + comptime!(round * bp.units());
        let row = select(i / 4 < rows, i / 4, rows - 1);
        let mut sum = 0.0f32;
        #[unroll]
        for part in 0..comptime!((bp.spec.key_dim / 8).div_ceil(4)) {
            let c = unit % 4 + comptime!(4 * part);
            if c < cols {
                sum += dot8::<F>(
                    tile[at + row * comptime!(bp.key_row()) + c],
                    tile[at + row * comptime!(bp.key_row()) + c],
                );
            }
        }
        let sum = over_row(sum);
        if unit % 4 == 0 {
            floats[to + row] = f32::inverse_sqrt(sum + 1e-6f32);
        }
    }
}

#[cube]
pub(crate) fn dot8<F: Float>(x: Vector<F, V8>, y: Vector<F, V8>) -> f32 {
    let x = Vector::<f32, V8>::cast_from(x);
    let y = Vector::<f32, V8>::cast_from(y);
    let mut sum = 0.0f32;
    #[unroll]
    for e in 0..8usize {
        sum = fma(x[e], y[e], sum);
    }
    sum
}

/// Leaves what the gradients of normalised keys and queries have along them, and ends with a barrier, if there is a
/// norm.
#[cube]
pub(crate) fn leave_along<F: Float>(
    tile: &Tile<F>,
    floats: &mut Region<f32>,
    unit: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    if comptime!(bp.spec.qk_l2norm) {
        #[unroll]
        for round in 0..comptime!(BLOCK.div_ceil(bp.units())) {
            let row = unit + comptime!(round * bp.units());
            if row < BLOCK {
                let sums = over_planes::<F>(tile, row, 1usize, bp);
                floats[ALONG_KEYS_AT + row] = sums[which::ALONG_KEY];
                floats[ALONG_QUERIES_AT + row] = sums[which::ALONG_QUERY];
            }
        }
        sync_cube();
    }
}

/// The gradient of beta, by the second plane.
#[cube]
pub(crate) fn gradient_of_beta<F: Float, B: Float>(
    raw: &RawPair,
    tile: &Tile<F>,
    floats: &Region<f32>,
    d_beta: &mut Strided<B>,
    here: &Here,
    plane: usize,
    lane: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    if plane == comptime!(bp.planes().min(2) - 1) {
        #[unroll]
        for e in 0..2usize {
            let own = 2 * lane + e;
            if own < here.steps as usize {
                let step = here.step(own as u32, bp.spec.micro_steps);
                let at = d_beta.at.at(here.row as usize, step, here.hv as usize);
                let d = floats[KEY_NORMS_AT + own] * over_planes::<F>(tile, own, 0usize, bp)[which::KEY];
                d_beta.data[at] = B::cast_from(d * beta_slope(raw.beta[e], bp.spec.beta));
            }
        }
    }
}

/// The gradient of g, by the first plane.
#[cube]
pub(crate) fn gradient_of_gates<F: Float, G: Float>(
    raw: &RawPair,
    tile: &Tile<F>,
    floats: &Region<f32>,
    dg: &mut Strided<G>,
    constants: &mut Array<f32>,
    here: &Here,
    cube: usize,
    formula: &GateFormula,
    plane: usize,
    lane: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    let n_h = comptime!(bp.spec.micro_steps as u32);
    if known_and(bp.splits_pairs(), plane == 0) {
        // What each micro-step adds to the gradients of gates at or before it, and of gates behind it.
        let mut later = Vector::<f32, V2>::cast_from(0.0f32);
        let mut earlier = Vector::<f32, V2>::cast_from(0.0f32);
        #[unroll]
        for e in 0..2usize {
            let own = 2 * lane + e;
            let step = here.step0 + own as u32;
            let norm = floats[KEY_NORMS_AT + own];
            let sums = over_planes::<F>(tile, own, 0usize, bp);
            let to_end = norm * floats[BETAS_AT + own] * sums[which::TO_END];
            earlier[e] = to_end;
            let mut x = norm * sums[which::LATER] + to_end;
            if (step + 1) % n_h == 0 && own < here.steps as usize {
                let r = (step / n_h - here.read0) as usize;
                // With single micro-steps reads lie in the same rows.
                let reads = if comptime!(bp.spec.micro_steps == 1) {
                    sums
                } else {
                    over_planes::<F>(tile, r, 0usize, bp)
                };
                x += floats[QUERY_NORMS_AT + r] * reads[which::READ];
            }
            later[e] = x;
        }
        let mut states = 0.0f32;
        #[unroll]
        for p in 0..comptime!(bp.planes()) {
            states += floats[PRODUCTS_AT + p];
        }
        states *= f32::exp(floats[comptime!(DECAYS_AT + BLOCK - 1)]);
        // Each a sum of its own, so that a small one is not the difference of large ones.
        let from_here = sum_from(later[0] + later[1], lane);
        let behind = plane_shuffle_down(from_here, 1u32);
        let behind = select(lane < 31, behind, 0.0f32);
        let until = running_sum(earlier[0] + earlier[1], lane);
        let before = plane_shuffle_up(until, 1u32);
        let before = select(lane > 0, before, 0.0f32);
        let (a, bias) = gate_constants(formula, here.hv as usize, 0usize, bp.spec);
        let mut by_a_log = 0.0f32;
        let mut by_bias = 0.0f32;
        #[unroll]
        for e in 0..2usize {
            let own = 2 * lane + e;
            let step = here.step0 + own as u32;
            if step % n_h == 0 && own < here.steps as usize {
                let mut d = states + before + behind + later[1];
                if comptime!(e == 0) {
                    d += later[0];
                } else {
                    d += earlier[0];
                }
                let (by_x, by_a) = gate_slopes(raw.g[e], a, bias, formula.lower_bound, bp.spec.gate);
                let token = here.token(own as u32, bp.spec.micro_steps);
                let at = dg.at.at(here.row as usize, token, here.hv as usize);
                dg.data[at] = G::cast_from(d * by_x);
                by_bias += d * by_x;
                by_a_log += d * by_a;
            }
        }
        if comptime!(bp.spec.gate != GateMap::Identity) {
            let by_a_log = plane_sum(by_a_log);
            let by_bias = plane_sum(by_bias);
            if lane == 0 {
                constants[2 * cube] = by_a_log;
                constants[2 * cube + 1] = by_bias;
            }
        }
    }
}

/// The sum over this lane and those above it.
#[cube]
fn sum_from(x: f32, lane: usize) -> f32 {
    let mut sum = x;
    #[unroll]
    for level in 0..5usize {
        let above = plane_shuffle_down(sum, comptime!(1u32 << level));
        sum += select(lane + comptime!(1usize << level) < 32, above, 0.0f32);
    }
    sum
}
