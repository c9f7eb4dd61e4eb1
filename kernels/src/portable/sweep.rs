//! The two scans of the backward, side by side: one cube per direction, sequence, value head and tile of value
//! channels.
//!
//! Forwards the states are computed again, and those before each chunk kept in the records, with R; backwards runs the
//! gradient of the state. With dS the gradient of the state after a micro-step:
//!
//! ```text
//! dS <- dS + scale q do^T      dv = beta dS^T k      dS <- D (dS - k dv^T)
//! ```

use cubecl::prelude::*;

use super::blueprint::Blueprint;
use super::scan::advance;
use super::stage::{Parcel, Pass, Stage, steps_of};
use super::state::{Place, State, Sums, place_of, row, row_of};
use crate::known::known_or;
use crate::order::declare_in_order;
use crate::record::{Sequence, sequence, store};
use crate::tensors::{Gating, States, Strided};

/// Leaves in the records beta and the factors of k and q, the state before and the gradient of the state after every chunk,
/// R and dV, and writes the gradients of v and of the initial state. The first half of the cubes goes forwards, the
/// second backwards.
#[cube(launch_unchecked)]
pub fn sweep<F: Float, B: Float, G: Float, N: Size, M: Size, C: Size, S: Size>(
    q: &Strided<Vector<F, N>>,
    k: &Strided<Vector<F, N>>,
    v: &Strided<Vector<F, M>>,
    gating: &Gating<B, G>,
    d_o: &Strided<Vector<F, M>>,
    scratch: &mut Array<Vector<f32, C>>,
    initial_state: &States<Vector<f32, S>>,
    d_final_state: &States<Vector<f32, S>>,
    table: &Array<u32>,
    dv: &mut Strided<Vector<F, M>>,
    d_initial_state: &mut States<Vector<f32, S>>,
    sequences: u32,
    first_head: u32,
    heads: u32,
    group: u32,
    scale: f32,
    #[comptime] has_d_final_state: bool,
    #[comptime] bp: Blueprint,
    #[define(F, B, G)] _types: [StorageType; 3],
) {
    let each = (sequences * heads) as usize * comptime!(bp.value_tiles());
    if CUBE_POS >= 2 * each {
        terminate!();
    }
    let n_h = comptime!(bp.spec.micro_steps);
    let mut stage = Stage::<C>::new(bp);
    let mut sums = Sums::<C>::new(2usize, bp);
    let at = place_of(CUBE_POS % each, first_head, heads, bp);
    let seq = sequence(table, at.n);
    let steps = seq.tokens * n_h;
    let stages = (steps + bp.stage - 1) / bp.stage;
    let mut parcel = Parcel::<C>::new(bp);
    // What the last turn has asked for; nothing at first.
    let mut step0 = 0usize;
    let mut here = 0usize;
    if CUBE_POS >= each {
        let mut d_state = State::<C>::load(d_final_state, at, has_d_final_state, bp);
        for done in 0..stages + 1 {
            let record = record_of(seq, step0, heads, at, bp);
            if here > 0 {
                let end = step0 + here;
                if end % bp.chunk == 0 || end == steps {
                    d_state.keep(scratch, record + comptime!(bp.in_unit_vectors(bp.d_state_at())), at, bp);
                }
                stage.put(&parcel, &gating.formula, at, step0, Pass::Unwind, bp);
                if CUBE_POS % comptime!(bp.value_tiles()) == 0 {
                    stage.keep_factors(scratch, record, step0 % bp.chunk, bp);
                }
            }
            // From the last stage to the first; then one that is none.
            let next = select(done < stages, stages - usize::min(done + 1, stages), stages);
            let (before, rows) = steps_of(next, stages, steps, bp);
            parcel.fetch(q, k, d_o, gating, at, seq, before, rows, group, Pass::Unwind, bp);
            unwind(&mut d_state, &mut sums, &stage, scratch, dv, at, seq, record, step0, here, scale, bp);
            step0 = before;
            here = rows;
        }
        d_state.store(d_initial_state, at, bp);
    } else {
        let mut state = State::<C>::load(initial_state, at, bp.spec.has_initial_state, bp);
        for next in 0..stages + 1 {
            let record = record_of(seq, step0, heads, at, bp);
            if here > 0 {
                if step0 % bp.chunk == 0 {
                    state.keep(scratch, record + comptime!(bp.in_unit_vectors(bp.state_at())), at, bp);
                }
                stage.put(&parcel, &gating.formula, at, step0, Pass::Replay, bp);
            }
            let (after, rows) = steps_of(next, stages, steps, bp);
            parcel.fetch(q, k, v, gating, at, seq, after, rows, group, Pass::Replay, bp);
            replay(&mut state, &mut sums, &stage, scratch, at, record, step0, here, bp);
            step0 = after;
            here = rows;
        }
    }
    declare_in_order();
}

/// The record of the chunk of a micro-step.
#[cube]
fn record_of(seq: Sequence, step: usize, heads: u32, at: Place, #[comptime] bp: Blueprint) -> usize {
    ((seq.first_chunk + step / bp.chunk) * heads as usize + at.head)
        * comptime!(bp.in_unit_vectors(bp.record_vectors()))
}

/// The staged micro-steps forwards, for R.
#[cube]
fn replay<C: Size>(
    state: &mut State<C>,
    sums: &mut Sums<C>,
    stage: &Stage<C>,
    scratch: &mut Array<Vector<f32, C>>,
    at: Place,
    record: usize,
    step0: usize,
    here: usize,
    #[comptime] bp: Blueprint,
) {
    let rows = record + comptime!(bp.in_unit_vectors(bp.r_at()));
    for i in 0..here {
        let step = step0 + i;
        let r = advance(state, sums, stage, i, step, at, bp);
        if step % comptime!(bp.key_parts()) == at.part {
            scratch[rows + row_of(step % bp.chunk, at, bp)] = r;
        }
    }
}

/// The staged micro-steps backwards, for dV.
#[cube]
fn unwind<F: Float, M: Size, C: Size>(
    d_state: &mut State<C>,
    sums: &mut Sums<C>,
    stage: &Stage<C>,
    scratch: &mut Array<Vector<f32, C>>,
    dv: &mut Strided<Vector<F, M>>,
    at: Place,
    seq: Sequence,
    record: usize,
    step0: usize,
    here: usize,
    scale: f32,
    #[comptime] bp: Blueprint,
) {
    let n_h = comptime!(bp.spec.micro_steps);
    for done in 0..here {
        let i = here - 1 - done;
        let step = step0 + i;
        if known_or(n_h == 1, (step + 1) % n_h == 0) {
            let factor = Vector::new(scale * stage.q_factor(i, bp));
            let d_o = stage.value(i, at, bp);
            let query = row(&stage.queries, i, at, bp);
            d_state.write(&query, factor * d_o, bp);
        }
        let key = row(&stage.keys, i, at, bp);
        sums.put(step % 2, d_state.read(&key, bp), bp);
        let factor = Vector::new(stage.k_factor(i, bp));
        let beta = Vector::new(stage.betas[i]);
        sync_cube();
        let d_v = factor * beta * sums.total(step % 2, at.col, bp);
        if step % comptime!(bp.key_parts()) == at.part {
            scratch[record + comptime!(bp.in_unit_vectors(bp.dv_at())) + row_of(step % bp.chunk, at, bp)] =
                d_v;
            let row = dv.at.at(seq.row, seq.start * n_h + step, at.hv);
            store(&mut dv.data, row, at.channel, d_v, bp.spec.value_dim);
        }
        d_state.write(&key, Vector::new(-1.0f32) * factor * d_v, bp);
        if known_or(n_h == 1, step % n_h == 0) {
            d_state.decay(stage, i, at, bp);
        }
    }
}
