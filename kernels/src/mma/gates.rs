//! Beta and one gate per head, a micro-step for each lane.

use cubecl::prelude::*;

use super::blueprint::{Blueprint, CHUNK};
use super::stage::Place;
use crate::known::known_and;
use crate::math::{beta_of, log_decay_of};
use crate::record::Strides;
use crate::spec::{BetaMap, Decay};

/// Below this log decay nothing is left in f32; without the bound one gate of -10000 would cost the sums of
/// its neighbours their digits.
pub(crate) const LOWEST: f32 = -104.0;

/// Beta and g of one micro-step, as the caller holds them. A unit takes the micro-step of its lane.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Raw {
    pub(crate) beta: f32,
    pub(crate) g: f32,
}

/// Reads them; beside a scan, one chunk ahead of their use.
#[cube]
pub(crate) fn read_gates<B: Float, G: Float>(
    beta: &Array<B>,
    g: &Array<G>,
    beta_at: &Strides,
    g_at: &Strides,
    place: &Place,
    c: usize,
    lane: usize,
    #[comptime] bp: Blueprint,
) -> Raw {
    let step = c * CHUNK + lane;
    let seq = place.seq;
    let mut raw = Raw { beta: read_beta(beta, beta_at, place, c, lane, bp), g: 0.0f32 };
    if known_and(bp.spec.decay == Decay::Head, step < place.steps) {
        raw.g =
            f32::cast_from(g[g_at.at(seq.row, seq.start + step / comptime!(bp.spec.micro_steps), place.hv)]);
    }
    raw
}

/// Beta of the lane's micro-step, as the caller holds it.
#[cube]
pub(crate) fn read_beta<B: Float>(
    beta: &Array<B>,
    beta_at: &Strides,
    place: &Place,
    c: usize,
    lane: usize,
    #[comptime] bp: Blueprint,
) -> f32 {
    let step = c * CHUNK + lane;
    let mut x = 0.0f32;
    if step < place.steps {
        let first = place.seq.start * comptime!(bp.spec.micro_steps);
        x = f32::cast_from(beta[beta_at.at(place.seq.row, first + step, place.hv)]);
    }
    x
}

/// Beta of the lane's micro-step, the log decay from the start of the chunk to it, and to the end. In the
/// second half of the chunk `split` is the decay since the end of the first, in the first half the decay until
/// then.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Gates {
    pub(crate) beta: f32,
    pub(crate) sum: f32,
    pub(crate) total: f32,
    pub(crate) split: f32,
}

/// From what the caller holds to what the chunk needs.
#[cube]
pub(crate) fn gates(
    raw: &Raw,
    a_log: f32,
    bias: f32,
    lower_bound: f32,
    place: &Place,
    c: usize,
    lane: usize,
    #[comptime] bp: Blueprint,
) -> Gates {
    // 32 bits hold every micro-step, in half of the registers.
    let n_h = comptime!(bp.spec.micro_steps as u32);
    let step = (c * CHUNK + lane) as u32;
    let valid = step < place.steps as u32;
    let mut beta = beta_of(raw.beta, bp.spec.beta);
    if comptime!(bp.spec.beta != BetaMap::Identity) {
        beta = select(valid, beta, 0.0f32);
    }
    let mut sum = 0.0f32;
    let mut total = 0.0f32;
    let mut split = 1.0f32;
    if comptime!(bp.spec.decay == Decay::Head) {
        let g = f32::max(log_decay_of(raw.g, a_log, bias, lower_bound, bp.spec.gate), LOWEST);
        sum = running_sum(select(valid && step % n_h == 0, g, 0.0f32), lane);
        total = plane_shuffle(sum, 31u32);
        let middle = plane_shuffle(sum, 15u32);
        split = f32::exp(-f32::abs(sum - middle));
    }
    Gates { beta, sum, total, split }
}

/// The sum over this lane and those below it.
#[cube]
pub(crate) fn running_sum(x: f32, lane: usize) -> f32 {
    let mut sum = x;
    #[unroll]
    for level in 0..5usize {
        let below = plane_shuffle_up(sum, comptime!(1u32 << level));
        sum += select(lane >= comptime!(1usize << level), below, 0.0f32);
    }
    sum
}
