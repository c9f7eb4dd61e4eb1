//! Beta and one gate per head, a micro-step for each lane.

use cubecl::prelude::*;

use super::blueprint::{Blueprint, CHUNK};
use super::memory::Region;
use super::stage::Place;
use super::tile::V2;
use crate::known::known_and;
use crate::math::{beta_of, gate_constants, log_decay_of};
use crate::spec::{BetaMap, Decay};
use crate::tensors::{GateFormula, Gating, Strided};

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
    gating: &Gating<B, G>,
    place: &Place,
    c: usize,
    lane: usize,
    #[comptime] bp: Blueprint,
) -> Raw {
    let step = step_of(c, lane);
    let seq = place.seq;
    let mut raw = Raw { beta: read_beta(&gating.beta, place, c, lane, bp), g: 0.0f32 };
    if known_and(bp.spec.decay == Decay::Head, step < place.steps as u32) {
        let token = seq.start + (step / comptime!(bp.spec.micro_steps as u32)) as usize;
        raw.g = f32::cast_from(gating.g.data[gating.g.at.at32(seq.row, token, place.hv) as usize]);
    }
    raw
}

/// The micro-step of a lane. 32 bits hold every one, in half of the registers.
#[cube]
fn step_of(c: usize, lane: usize) -> u32 {
    (c * CHUNK + lane) as u32
}

/// Beta of the lane's micro-step, as the caller holds it.
#[cube]
pub(crate) fn read_beta<B: Float>(
    beta: &Strided<B>,
    place: &Place,
    c: usize,
    lane: usize,
    #[comptime] bp: Blueprint,
) -> f32 {
    let step = step_of(c, lane);
    let mut x = 0.0f32;
    if step < place.steps as u32 {
        let first = place.seq.start * comptime!(bp.spec.micro_steps);
        let at = beta.at.at32(place.seq.row, first + step as usize, place.hv);
        x = f32::cast_from(beta.data[at as usize]);
    }
    x
}

/// A value of each micro-step of a chunk.
// Which variant it is is known when a kernel is generated, and only then are they built.
#[allow(dead_code)]
#[derive(CubeType, Clone, Copy)]
pub(crate) enum PerStep {
    /// The lane's own; the others' are had by shuffles.
    Lane(f32),
    /// In shared memory, from here on.
    Memory(usize),
    /// The same for all.
    Same(f32),
}

#[cube]
impl PerStep {
    /// The value of one micro-step.
    pub(crate) fn of(&self, memory: &Region<f32>, step: usize) -> f32 {
        match self {
            PerStep::Lane(own) => plane_shuffle(*own, step as u32),
            PerStep::Memory(first) => memory[*first + step],
            PerStep::Same(x) => *x,
        }
    }

    /// The value of the lane's own.
    fn own(&self, memory: &Region<f32>, lane: usize) -> f32 {
        match self {
            PerStep::Lane(own) => *own,
            PerStep::Memory(first) => memory[*first + lane],
            PerStep::Same(x) => *x,
        }
    }

    /// Those of two micro-steps.
    pub(crate) fn at_rows(&self, memory: &Region<f32>, lo: usize, hi: usize) -> Vector<f32, V2> {
        let mut out = Vector::<f32, V2>::cast_from(self.of(memory, lo));
        out[1] = self.of(memory, hi);
        out
    }

    /// Those of the columns that this lane holds of accumulator `n`.
    pub(crate) fn at_columns(&self, memory: &Region<f32>, n: usize, lane: usize) -> Vector<f32, V2> {
        let first = 8 * n + 2 * (lane % 4);
        self.at_rows(memory, first, first + 1)
    }
}

/// Of each micro-step beta, the log decay from the start of the chunk to it, and `split`: in the second half of the chunk
/// the decay since the end of the first, in the first half the decay until then. Of the whole chunk the log decay.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Gates {
    pub(crate) beta: PerStep,
    pub(crate) sum: PerStep,
    pub(crate) split: PerStep,
    pub(crate) total: f32,
}

#[cube]
impl Gates {
    /// Where nothing decays.
    fn of_beta(beta: PerStep) -> Self {
        Gates { beta, sum: PerStep::new_Same(0.0f32), split: PerStep::new_Same(1.0f32), total: 0.0f32 }
    }
}

/// From what the caller holds to what chunk `c` needs.
#[cube]
pub(crate) fn gates_of(
    raw: &Raw,
    formula: &GateFormula,
    place: &Place,
    c: usize,
    lane: usize,
    #[comptime] bp: Blueprint,
) -> Gates {
    let (a, bias) = gate_constants(formula, place.hv, 0usize, bp.spec);
    let n_h = comptime!(bp.spec.micro_steps as u32);
    let step = step_of(c, lane);
    let valid = step < place.steps as u32;
    let mut beta = beta_of(raw.beta, bp.spec.beta);
    if comptime!(bp.spec.beta != BetaMap::Identity) {
        beta = select(valid, beta, 0.0f32);
    }
    if comptime!(bp.spec.decay == Decay::Head) {
        let g = f32::max(log_decay_of(raw.g, a, bias, formula.lower_bound, bp.spec.gate), LOWEST);
        let sum = running_sum(select(valid && step % n_h == 0, g, 0.0f32), lane);
        let total = plane_shuffle(sum, 31u32);
        let middle = plane_shuffle(sum, 15u32);
        let split = f32::exp(-f32::abs(sum - middle));
        Gates {
            beta: PerStep::new_Lane(beta),
            sum: PerStep::new_Lane(sum),
            split: PerStep::new_Lane(split),
            total,
        }
    } else {
        Gates::of_beta(PerStep::new_Lane(beta))
    }
}

/// Puts the gates of a chunk into shared memory, from `at` on, for all planes that prepare it.
#[cube]
pub(crate) fn leave_gates(
    memory: &mut Region<f32>,
    at: usize,
    gates: &Gates,
    lane: usize,
    #[comptime] bp: Blueprint,
) {
    memory[at + lane] = gates.beta.own(memory, lane);
    if comptime!(bp.spec.decay == Decay::Head) {
        memory[at + CHUNK + lane] = gates.sum.own(memory, lane);
        memory[at + comptime!(2 * CHUNK) + lane] = gates.split.own(memory, lane);
    }
}

/// The gates that lie there.
#[cube]
pub(crate) fn gates_from(memory: &Region<f32>, at: usize, #[comptime] bp: Blueprint) -> Gates {
    if comptime!(bp.spec.decay == Decay::Head) {
        Gates {
            beta: PerStep::new_Memory(at),
            sum: PerStep::new_Memory(at + CHUNK),
            split: PerStep::new_Memory(at + comptime!(2 * CHUNK)),
            total: memory[at + comptime!(2 * CHUNK - 1)],
        }
    } else {
        Gates::of_beta(PerStep::new_Memory(at))
    }
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
