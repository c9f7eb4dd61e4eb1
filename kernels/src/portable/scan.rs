//! The forward: one cube per sequence, value head and tile of value channels takes the state from micro-step to
//! micro-step.

use cubecl::prelude::*;

use super::blueprint::Blueprint;
use super::stage::{Parcel, Pass, Stage, steps_of};
use super::state::{Place, State, Sums, place_of, row};
use crate::known::known_or;
use crate::order::declare_in_order;
use crate::record::{sequence, store};
use crate::tensors::{Gating, States, Strided};

/// Writes o and the final state. Tensors that the blueprint does not mention may be any buffer; `q` is multiplied by
/// `scale`. `table` lists the sequences (see `record.rs`).
#[cube(launch_unchecked)]
pub fn scan<F: Float, B: Float, G: Float, N: Size, M: Size, C: Size, S: Size>(
    q: &Strided<Vector<F, N>>,
    k: &Strided<Vector<F, N>>,
    v: &Strided<Vector<F, M>>,
    gating: &Gating<B, G>,
    initial_state: &States<Vector<f32, S>>,
    table: &Array<u32>,
    o: &mut Strided<Vector<F, M>>,
    final_state: &mut States<Vector<f32, S>>,
    sequences: u32,
    heads: u32,
    group: u32,
    scale: f32,
    #[comptime] bp: Blueprint,
    #[define(F, B, G)] _types: [StorageType; 3],
) {
    if CUBE_POS >= (sequences * heads) as usize * comptime!(bp.value_tiles()) {
        terminate!();
    }
    let n_h = comptime!(bp.spec.micro_steps);
    let cols = comptime!(bp.tile_cols());
    let mut stage = Stage::<C>::new(bp);
    // Two in turn, so that one barrier will do: who puts down the next does not disturb who still adds up the last.
    let mut erased = Sums::<C>::new(2usize, bp);
    let mut read = Sums::<C>::new(comptime!(bp.staged_reads()), bp);

    let at = place_of(CUBE_POS, 0u32, heads, bp);
    let seq = sequence(table, at.n);
    let steps = seq.tokens * n_h;
    let mut state = State::<C>::load(initial_state, at, bp.spec.has_initial_state, bp);

    let mut parcel = Parcel::<C>::new(bp);
    let stages = (steps + bp.stage - 1) / bp.stage;
    let mut step0 = 0usize;
    let mut here = 0usize;
    for next in 0..stages + 1 {
        // What the last turn has asked for; nothing at first.
        if here > 0 {
            stage.put(&parcel, &gating.formula, at, step0, Pass::Forward, bp);
        }
        let (after, rows) = steps_of(next, stages, steps, bp);
        parcel.fetch(q, k, v, gating, at, seq, after, rows, group, Pass::Forward, bp);
        for i in 0..here {
            let step = step0 + i;
            advance(&mut state, &mut erased, &stage, i, step, at, bp);
            if known_or(n_h == 1, (step + 1) % n_h == 0) {
                let factor = Vector::new(scale * stage.q_factor(i, bp));
                let query = row(&stage.queries, i, at, bp);
                read.put(step / n_h - step0 / n_h, factor * state.read(&query, bp), bp);
            }
        }
        sync_cube();
        let first = step0 / n_h;
        let mut z = UNIT_POS as usize;
        while z < ((step0 + here) / n_h - first) * cols {
            let (token, col) = (z / cols, z % cols);
            let o_row = o.at.at(seq.row, seq.start + first + token, at.hv);
            let channel = at.channel + col * bp.unit_values - at.col * bp.unit_values;
            store(&mut o.data, o_row, channel, read.total(token, col, bp), bp.spec.value_dim);
            z += comptime!(bp.scan_units());
        }
        step0 = after;
        here = rows;
    }
    state.store(final_state, at, bp);
    declare_in_order();
}

/// Micro-step `step`, `i` of those staged: S <- D S, r = v - S^T k, S <- S + beta k r^T. Returns r. There is a barrier
/// inside.
#[cube]
pub(crate) fn advance<C: Size>(
    state: &mut State<C>,
    sums: &mut Sums<C>,
    stage: &Stage<C>,
    i: usize,
    step: usize,
    at: Place,
    #[comptime] bp: Blueprint,
) -> Vector<f32, C> {
    let n_h = comptime!(bp.spec.micro_steps);
    if known_or(n_h == 1, step % n_h == 0) {
        state.decay(stage, i, at, bp);
    }
    let key = row(&stage.keys, i, at, bp);
    sums.put(step % 2, state.read(&key, bp), bp);
    let value = stage.value(i, at, bp);
    let factor = Vector::new(stage.k_factor(i, bp));
    let beta = Vector::new(stage.betas[i]);
    sync_cube();
    let r = value - factor * sums.total(step % 2, at.col, bp);
    state.write(&key, factor * beta * r, bp);
    r
}
