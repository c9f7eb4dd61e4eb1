//! A few micro-steps in shared memory, where all units of a cube read them.

use cubecl::prelude::*;

use super::blueprint::{Blueprint, NORM_PIECES};
use super::state::Place;
use crate::known::known_or;
use crate::math::{beta_of, decay_of, decays_of, dot, gate_constants};
use crate::record::{F4, Sequence, load, load_gates};
use crate::spec::Decay;
use crate::tensors::{GateFormula, Gating, Strided};

/// What a pass over the state takes from each micro-step.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Pass {
    /// q, k and v.
    Forward,
    /// k and v.
    Replay,
    /// q, k and dO.
    Unwind,
}

/// The first micro-step of stage `n`, and how many there are in it: none behind the last stage.
#[cube]
pub(crate) fn steps_of(n: usize, stages: usize, steps: usize, #[comptime] bp: Blueprint) -> (usize, usize) {
    let first = n * bp.stage;
    let mut here = 0usize;
    if n < stages {
        here = usize::min(steps - first, bp.stage);
    }
    (first, here)
}

/// This unit's share of the next micro-steps, on its way from device to shared memory: asked for while those before are
/// worked on, since device memory is a whole stage away.
#[derive(CubeType)]
pub(crate) struct Parcel<C: Size> {
    keys: Array<F4>,
    queries: Array<F4>,
    gates: Array<F4>,
    values: Array<Vector<f32, C>>,
    betas: Array<f32>,
    head_gates: Array<f32>,
}

#[cube]
impl<C: Size> Parcel<C> {
    pub(crate) fn new(#[comptime] bp: Blueprint) -> Parcel<C> {
        let rows = comptime!(bp.staged_vectors());
        let scalars = comptime!(bp.staged_scalars());
        Parcel::<C> {
            keys: Array::<F4>::new(rows),
            queries: Array::<F4>::new(rows),
            gates: Array::<F4>::new(rows),
            values: Array::<Vector<f32, C>>::new(comptime!(bp.staged_values())),
            betas: Array::<f32>::new(scalars),
            head_gates: Array::<f32>::new(scalars),
        }
    }

    /// Asks for micro-steps `step0..step0 + here` of a sequence, `x` being v, or dO on the way back.
    pub(crate) fn fetch<F: Float, B: Float, G: Float, N: Size, M: Size>(
        &mut self,
        q: &Strided<Vector<F, N>>,
        k: &Strided<Vector<F, N>>,
        x: &Strided<Vector<F, M>>,
        gating: &Gating<B, G>,
        at: Place,
        seq: Sequence,
        step0: usize,
        here: usize,
        group: u32,
        #[comptime] pass: Pass,
        #[comptime] bp: Blueprint,
    ) {
        let (beta, g) = (&gating.beta, &gating.g);
        let n_h = comptime!(bp.spec.micro_steps);
        let (key_dim, value_dim) = comptime!((bp.spec.key_dim, bp.spec.value_dim));
        let h = at.hv / group as usize;
        let first = seq.start * n_h + step0;
        #[unroll]
        for n in 0..comptime!(bp.staged_vectors()) {
            let (i, c4) = staged_vector(n, bp);
            let c = 4 * c4;
            let step = step0 + i;
            let token = seq.start + step / n_h;
            self.keys[n] = load(&k.data, k.at.at(seq.row, first + i, h), c, i < here, key_dim);
            if comptime!(pass != Pass::Replay) {
                let ends = i < here && (step + 1) % n_h == 0;
                self.queries[n] = load(&q.data, q.at.at(seq.row, token, h), c, ends, key_dim);
            }
            if comptime!(bp.spec.decay == Decay::Channel) {
                self.gates[n] = load_gates(&g.data, g.at.at(seq.row, token, at.hv), c, i < here, key_dim);
            }
        }
        #[unroll]
        for n in 0..comptime!(bp.staged_values()) {
            let i = at.part + n * bp.key_parts();
            let mut valid = i < here;
            let mut t = first + i;
            if comptime!(pass == Pass::Unwind) {
                valid = valid && (step0 + i + 1) % n_h == 0;
                t = seq.start + (step0 + i) / n_h;
            }
            self.values[n] = load(&x.data, x.at.at(seq.row, t, at.hv), at.channel, valid, value_dim);
        }
        #[unroll]
        for n in 0..comptime!(bp.staged_scalars()) {
            let i = UNIT_POS as usize + n * bp.scan_units();
            self.betas[n] = 0.0f32;
            self.head_gates[n] = 0.0f32;
            if i < here {
                self.betas[n] = f32::cast_from(beta.data[beta.at.at(seq.row, first + i, at.hv)]);
                if comptime!(bp.spec.decay == Decay::Head) {
                    let token = seq.start + (step0 + i) / n_h;
                    self.head_gates[n] = f32::cast_from(g.data[g.at.at(seq.row, token, at.hv)]);
                }
            }
        }
    }
}

/// Rows of micro-steps. k and q lie as they were given; the factors are what they are to be multiplied by.
#[derive(CubeType)]
pub(crate) struct Stage<C: Size> {
    pub(crate) keys: SharedMemory<F4>,
    pub(crate) queries: SharedMemory<F4>,
    pub(crate) decays: SharedMemory<F4>,
    /// v, or dO where a token ends: of the cube's value channels.
    values: SharedMemory<Vector<f32, C>>,
    pub(crate) betas: SharedMemory<f32>,
    pub(crate) head_decays: SharedMemory<f32>,
    k_factors: SharedMemory<f32>,
    q_factors: SharedMemory<f32>,
    squares: SharedMemory<f32>,
}

#[cube]
impl<C: Size> Stage<C> {
    pub(crate) fn new(#[comptime] bp: Blueprint) -> Stage<C> {
        let len = comptime!(bp.stage);
        let rows = comptime!(len * bp.staged_row());
        let decays = comptime!(if bp.spec.decay == Decay::Channel { rows } else { 1 });
        let norms = comptime!(if bp.spec.qk_l2norm { len } else { 1 });
        Stage::<C> {
            keys: SharedMemory::<F4>::new(rows),
            queries: SharedMemory::<F4>::new(rows),
            decays: SharedMemory::<F4>::new(decays),
            values: SharedMemory::<Vector<f32, C>>::new(comptime!(len * bp.tile_cols())),
            betas: SharedMemory::<f32>::new(len),
            head_decays: SharedMemory::<f32>::new(len),
            k_factors: SharedMemory::<f32>::new(norms),
            q_factors: SharedMemory::<f32>::new(norms),
            squares: SharedMemory::<f32>::new(comptime!(2 * NORM_PIECES * norms)),
        }
    }

    /// Puts down micro-steps from `step0` on. There is a barrier before anything is overwritten, and one behind.
    pub(crate) fn put(
        &mut self,
        from: &Parcel<C>,
        formula: &GateFormula,
        at: Place,
        step0: usize,
        #[comptime] pass: Pass,
        #[comptime] bp: Blueprint,
    ) {
        let n_h = comptime!(bp.spec.micro_steps);
        let row4 = comptime!(bp.padded_key_dim() / 4);
        sync_cube();
        #[unroll]
        for n in 0..comptime!(bp.staged_vectors()) {
            let (i, c) = staged_vector(n, bp);
            if known_or((n + 1) * bp.scan_units() <= bp.stage * row4, i < bp.stage) {
                let to = slot(i, c, bp);
                self.keys[to] = from.keys[n];
                if comptime!(pass != Pass::Replay) {
                    self.queries[to] = from.queries[n];
                }
                if comptime!(bp.spec.decay == Decay::Channel) {
                    let starts = (step0 + i) % n_h == 0;
                    self.decays[to] = decays_of(from.gates[n], formula, at.hv, 4 * c, starts, bp.spec);
                }
            }
        }
        #[unroll]
        for n in 0..comptime!(bp.staged_values()) {
            let i = at.part + n * bp.key_parts();
            if known_or((n + 1) * bp.key_parts() <= bp.stage, i < bp.stage) {
                self.values[i * comptime!(bp.tile_cols()) + at.col] = from.values[n];
            }
        }
        #[unroll]
        for n in 0..comptime!(bp.staged_scalars()) {
            let i = UNIT_POS as usize + n * bp.scan_units();
            if i < bp.stage {
                self.betas[i] = beta_of(from.betas[n], bp.spec.beta);
                if comptime!(bp.spec.decay == Decay::Head) {
                    let (a, bias) = gate_constants(formula, at.hv, 0usize, bp.spec);
                    self.head_decays[i] =
                        decay_of(from.head_gates[n], a, bias, formula.lower_bound, bp.spec.gate);
                }
            }
        }
        sync_cube();
        if comptime!(bp.spec.qk_l2norm) {
            self.find_norms(bp);
        }
    }

    pub(crate) fn value(&self, i: usize, at: Place, #[comptime] bp: Blueprint) -> Vector<f32, C> {
        self.values[i * comptime!(bp.tile_cols()) + at.col]
    }

    /// What key `i` is to be multiplied by.
    pub(crate) fn k_factor(&self, i: usize, #[comptime] bp: Blueprint) -> f32 {
        if comptime!(bp.spec.qk_l2norm) { self.k_factors[i] } else { 1.0f32.runtime() }
    }

    pub(crate) fn q_factor(&self, i: usize, #[comptime] bp: Blueprint) -> f32 {
        if comptime!(bp.spec.qk_l2norm) { self.q_factors[i] } else { 1.0f32.runtime() }
    }

    /// Copies beta and the factors into the record whose micro-step `row` is the first here.
    pub(crate) fn keep_factors(
        &self,
        scratch: &mut Array<Vector<f32, C>>,
        record: usize,
        row: usize,
        #[comptime] bp: Blueprint,
    ) {
        let len = comptime!(bp.unit_values);
        let factors = record + comptime!(bp.in_unit_vectors(bp.factors_at()));
        let mut z = UNIT_POS as usize;
        while z < comptime!(bp.stage / len) {
            let mut beta = Vector::<f32, C>::new(0.0f32);
            let mut k = Vector::<f32, C>::new(0.0f32);
            let mut q = Vector::<f32, C>::new(0.0f32);
            #[unroll]
            for e in 0..len {
                beta[e] = self.betas[z * len + e];
                k[e] = self.k_factor(z * len + e, bp);
                q[e] = self.q_factor(z * len + e, bp);
            }
            let to = factors + row / len + z;
            scratch[to] = beta;
            scratch[to + bp.chunk / len] = k;
            scratch[to + 2 * bp.chunk / len] = q;
            z += comptime!(bp.scan_units());
        }
    }

    /// The factors of rows that are to have length 1. Those of rows that nobody loaded are not to be used.
    fn find_norms(&mut self, #[comptime] bp: Blueprint) {
        let rows = comptime!(2 * bp.stage);
        let piece = comptime!(bp.padded_key_dim() / 4 / NORM_PIECES);
        let mut z = UNIT_POS as usize;
        while z < comptime!(rows * NORM_PIECES) {
            let row = z % rows;
            let first = z / rows * piece;
            let mut sum = 0.0f32;
            for c in first..first + piece {
                let from = slot(row / 2, c, bp);
                let x = if row % 2 == 0 { self.keys[from] } else { self.queries[from] };
                sum = dot(x, x, sum);
            }
            self.squares[z] = sum;
            z += comptime!(bp.scan_units());
        }
        sync_cube();
        let mut row = UNIT_POS as usize;
        while row < rows {
            let mut sum = 1e-6f32;
            #[unroll]
            for p in 0..NORM_PIECES {
                sum += self.squares[p * rows + row];
            }
            let factor = f32::inverse_sqrt(sum);
            if row % 2 == 0 {
                self.k_factors[row / 2] = factor;
            } else {
                self.q_factors[row / 2] = factor;
            }
            row += comptime!(bp.scan_units());
        }
        sync_cube();
    }
}

/// The row, and the column in four-vectors, of the `n`-th vector of keys that this unit carries. Where it divides, the
/// compiler is told what is the same for all.
#[cube]
fn staged_vector(#[comptime] n: usize, #[comptime] bp: Blueprint) -> (usize, usize) {
    let unit = UNIT_POS as usize;
    let units = comptime!(bp.scan_units());
    let row4 = comptime!(bp.padded_key_dim() / 4);
    if comptime!(units.is_multiple_of(row4)) {
        (unit / row4 + n * (units / row4), unit % row4)
    } else if comptime!(row4.is_multiple_of(units)) {
        let each = comptime!(row4 / units);
        ((n / each).runtime(), unit + n % each * units)
    } else {
        let z = unit + n * units;
        (z / row4, z % row4)
    }
}

/// Where vector `c` of row `i` lies.
#[cube]
fn slot(i: usize, c: usize, #[comptime] bp: Blueprint) -> usize {
    i * comptime!(bp.staged_row()) + c + c / comptime!(bp.unit_keys / 4)
}
