//! The planes that hold the state: each owns `16 * held` value channels, and no plane needs another's.
//!
//! Accumulators are indexed `m * per + column tile`, m counting the 16-channel tiles held.

use cubecl::prelude::*;

use super::blueprint::{
    BLOCK_UNITS, BLOCKS, Blueprint, CHANNELS_AT, DECAY_AT, ERASE_AT, ERASE_BLOCK, READ_AT, TILE, WRITE_AT,
};
use super::chunk::Target;
use super::state::Lane;
use super::tile::{
    AHEAD, Acc, Frag, Mma, Tile, V2, by_columns, by_depth, in_block, load, mma2, scale_columns, store,
    to_frag, zeros,
};
use crate::spec::Decay;

/// Two factors, for the columns that this unit holds of accumulator `n`.
#[cube]
fn factor_pair(factors: &SharedMemory<f32>, at: usize, n: usize, lane: usize) -> Vector<f32, V2> {
    let first = at + 8 * n + lane % 4 * 2;
    let mut out = Vector::<f32, V2>::cast_from(factors[first]);
    out[1] = factors[first + 1];
    out
}

/// The state as left operands of key step `step`, one per tile held.
#[cube]
fn state_frags<F: Float>(
    state: &Sequence<Acc>,
    #[comptime] step: usize,
    #[comptime] bp: Blueprint,
) -> Sequence<Frag<F>> {
    let mut frags = Sequence::<Frag<F>>::new();
    #[unroll]
    for m in 0..comptime!(bp.held) {
        let at = comptime!(2 * (m * bp.key_steps() + step));
        frags.push(to_frag::<F>(state.index(at), state.index(comptime!(at + 1))));
    }
    frags
}

/// $X^T = S^T K^T$ and $O^T = S^T Q^T$ in one pass over the state.
#[cube]
fn read_state<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    state: &Sequence<Acc>,
    x: &mut Sequence<Acc>,
    o: &mut Sequence<Acc>,
    base: usize,
    at: Lane,
    #[comptime] bp: Blueprint,
) {
    let held = comptime!(bp.held);
    let rows = base + by_columns(at.lane, comptime!(bp.key_row()));
    let blocks = comptime!(BLOCKS + bp.read_blocks());
    let total = comptime!(bp.key_steps() * (BLOCKS + bp.read_blocks()));
    let mut right = Sequence::<Frag<F>>::new();
    #[unroll]
    for i in 0..comptime!(AHEAD.min(total)) {
        right.push(load::<F>(mma, tile, rows + comptime!(bp.row_fragment(i)), false));
    }
    #[unroll]
    for step in 0..comptime!(bp.key_steps()) {
        let left = state_frags::<F>(state, step, bp);
        #[unroll]
        for j in 0..blocks {
            let i = comptime!(step * blocks + j);
            if comptime!(i + AHEAD < total) {
                right.push(load::<F>(mma, tile, rows + comptime!(bp.row_fragment(i + AHEAD)), false));
            }
            if comptime!(j < BLOCKS) {
                mma2::<F>(
                    mma,
                    &left,
                    0usize,
                    1usize,
                    right.index(i),
                    x,
                    comptime!(2 * j),
                    comptime!(2 * BLOCKS),
                    held,
                );
            } else {
                let n = comptime!(2 * (j - BLOCKS));
                mma2::<F>(
                    mma,
                    &left,
                    0usize,
                    1usize,
                    right.index(i),
                    o,
                    n,
                    comptime!(2 * bp.read_blocks()),
                    held,
                );
            }
        }
    }
}

/// N from X: $R^T = V^T - e^G X^T$, then block by block as `chunk.rs` says. Consumes X.
#[cube]
fn writes<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    factors: &SharedMemory<f32>,
    x: &mut Sequence<Acc>,
    base: usize,
    from: Target,
    at: Lane,
    #[comptime] bp: Blueprint,
) -> Sequence<Acc> {
    let held = comptime!(bp.held);
    let per = comptime!(2 * BLOCKS);
    let lane = at.lane;
    let values =
        base + comptime!(bp.v_at()) + by_columns(lane, comptime!(bp.value_row())) + at.plane * (2 * held);
    #[unroll]
    for j in 0..BLOCKS {
        let lo = factor_pair(factors, from.factors + ERASE_AT, 2 * j, lane);
        let hi = factor_pair(factors, from.factors + ERASE_AT, 2 * j + 1, lane);
        #[unroll]
        for m in 0..held {
            let v = load::<F>(mma, tile, values + comptime!(j * TILE * bp.value_row() + 2 * m), true);
            let n = comptime!(m * per + 2 * j);
            residual::<F>(x.index_mut(n), v[0], v[1], lo);
            residual::<F>(x.index_mut(comptime!(n + 1)), v[2], v[3], hi);
        }
    }

    let blocks = from.blocks + block_row(lane);
    let mut n = zeros(comptime!(held * per));
    let mut written = Sequence::<Frag<F>>::new();
    #[unroll]
    for j in 0..BLOCKS {
        if comptime!(j > 0) {
            let erase = load::<F>(mma, tile, blocks + comptime!(ERASE_BLOCK * BLOCK_UNITS), false);
            mma2::<F>(mma, &written, 0usize, 1usize, &erase, x, comptime!(2 * j), per, held);
        }
        let mut r = Sequence::<Frag<F>>::new();
        #[unroll]
        for m in 0..held {
            let i = comptime!(m * per + 2 * j);
            r.push(to_frag::<F>(x.index(i), x.index(comptime!(i + 1))));
        }
        let leaf = load::<F>(mma, tile, blocks + comptime!(j * BLOCK_UNITS), false);
        mma2::<F>(mma, &r, 0usize, 1usize, &leaf, &mut n, comptime!(2 * j), per, held);
        if comptime!(bp.by_channel()) {
            // Scaled keys have been rounded once more than plain ones; what R loses is taken along in turn.
            let mut rest = Sequence::<Frag<F>>::new();
            #[unroll]
            for m in 0..held {
                let i = comptime!(m * per + 2 * j);
                rest.push(rest_of::<F>(x.index(i), x.index(comptime!(i + 1)), r.index(m)));
            }
            mma2::<F>(mma, &rest, 0usize, 1usize, &leaf, &mut n, comptime!(2 * j), per, held);
        }
        if comptime!(j + 1 < BLOCKS) {
            #[unroll]
            for m in 0..held {
                let i = comptime!(m * per + 2 * j);
                written.push(to_frag::<F>(n.index(i), n.index(comptime!(i + 1))));
            }
        }
    }
    n
}

/// What rounding took from two neighbouring accumulators, as a left operand of its own.
#[cube]
fn rest_of<F: Float>(lo: &Acc, hi: &Acc, rounded: &Frag<F>) -> Frag<F> {
    let mut f = Frag::<F>::new(4usize);
    f[0] = Vector::cast_from(lo[0] - Vector::<f32, V2>::cast_from(rounded[0]));
    f[1] = Vector::cast_from(lo[1] - Vector::<f32, V2>::cast_from(rounded[1]));
    f[2] = Vector::cast_from(hi[0] - Vector::<f32, V2>::cast_from(rounded[2]));
    f[3] = Vector::cast_from(hi[1] - Vector::<f32, V2>::cast_from(rounded[3]));
    f
}

/// Offset of the row of a 16 x 16 block that this unit passes to `load` for a right operand.
#[cube]
fn block_row(lane: usize) -> usize {
    in_block(lane / 16 * 8 + lane % 8, lane / 8 % 2)
}

/// `x <- v - by * x`.
#[cube]
fn residual<F: Float>(x: &mut Acc, v_lo: Vector<F, V2>, v_hi: Vector<F, V2>, by: Vector<f32, V2>) {
    x[0] = Vector::<f32, V2>::cast_from(v_lo) - by * x[0];
    x[1] = Vector::<f32, V2>::cast_from(v_hi) - by * x[1];
}

/// $O^T \leftarrow e^G O^T + N^T P^T$, left in shared memory.
#[cube]
fn read_writes<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    factors: &SharedMemory<f32>,
    n: &Sequence<Acc>,
    o: &mut Sequence<Acc>,
    outputs: usize,
    from: Target,
    at: Lane,
    #[comptime] bp: Blueprint,
) {
    let held = comptime!(bp.held);
    let per = comptime!(2 * bp.read_blocks());
    let lane = at.lane;
    let mut left = Sequence::<Frag<F>>::new();
    #[unroll]
    for i in 0..comptime!(held * BLOCKS) {
        left.push(to_frag::<F>(n.index(comptime!(2 * i)), n.index(comptime!(2 * i + 1))));
    }
    let blocks = from.blocks + block_row(lane);
    let place = outputs + by_columns(lane, comptime!(bp.value_row())) + at.plane * (2 * held);
    #[unroll]
    for r in 0..comptime!(bp.read_blocks()) {
        #[unroll]
        for half in 0..2usize {
            let by = factor_pair(factors, from.factors + READ_AT, comptime!(2 * r + half), lane);
            #[unroll]
            for m in 0..held {
                scale_columns(o.index_mut(comptime!(m * per + 2 * r + half)), by);
            }
        }
        #[unroll]
        for j in 0..comptime!(bp.p_blocks(r)) {
            let p = load::<F>(mma, tile, blocks + comptime!(bp.p_block(r, j) * BLOCK_UNITS), false);
            mma2::<F>(mma, &left, j, BLOCKS, &p, o, comptime!(2 * r), per, held);
        }
    }
    #[unroll]
    for r in 0..comptime!(bp.read_blocks()) {
        #[unroll]
        for m in 0..held {
            let i = comptime!(m * per + 2 * r);
            let f = to_frag::<F>(o.index(i), o.index(comptime!(i + 1)));
            store::<F>(mma, tile, place + comptime!(r * TILE * bp.value_row() + 2 * m), &f, true);
        }
    }
}

/// $S^T \leftarrow e^{G_C} S^T + (e^{G_C - G} N)^T K$. Consumes N.
#[cube]
fn update<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    factors: &SharedMemory<f32>,
    state: &mut Sequence<Acc>,
    n: &mut Sequence<Acc>,
    base: usize,
    from: Target,
    at: Lane,
    #[comptime] bp: Blueprint,
) {
    let held = comptime!(bp.held);
    let lane = at.lane;
    let steps = comptime!(bp.key_steps());
    let keys = base
        + comptime!(if bp.by_channel() { bp.kd_at() } else { 0 })
        + by_depth(lane, comptime!(bp.key_row()));
    let total = comptime!(BLOCKS * bp.key_steps());
    let mut right = Sequence::<Frag<F>>::new();
    #[unroll]
    for i in 0..comptime!(AHEAD.min(total)) {
        right.push(load::<F>(mma, tile, keys + comptime!(bp.depth_fragment(i)), true));
    }
    if comptime!(bp.spec.decay == Decay::Head) {
        let decay = Vector::<f32, V2>::cast_from(factors[from.factors + DECAY_AT]);
        #[unroll]
        for i in 0..comptime!(2 * held * steps) {
            scale_columns(state.index_mut(i), decay);
        }
    }
    if comptime!(bp.by_channel()) {
        #[unroll]
        for n in 0..comptime!(2 * steps) {
            let decay = factor_pair(factors, from.factors + CHANNELS_AT, n, lane);
            #[unroll]
            for m in 0..held {
                scale_columns(state.index_mut(comptime!(2 * m * bp.key_steps() + n)), decay);
            }
        }
    }
    let mut left = Sequence::<Frag<F>>::new();
    #[unroll]
    for m in 0..held {
        #[unroll]
        for j in 0..BLOCKS {
            let i = comptime!(2 * (m * BLOCKS + j));
            if comptime!(bp.spec.decay == Decay::Head) {
                scale_columns(n.index_mut(i), factor_pair(factors, from.factors + WRITE_AT, 2 * j, lane));
                scale_columns(
                    n.index_mut(comptime!(i + 1)),
                    factor_pair(factors, from.factors + WRITE_AT, 2 * j + 1, lane),
                );
            }
            left.push(to_frag::<F>(n.index(i), n.index(comptime!(i + 1))));
        }
    }
    #[unroll]
    for j in 0..BLOCKS {
        #[unroll]
        for step in 0..steps {
            let i = comptime!(j * bp.key_steps() + step);
            if comptime!(i + AHEAD < total) {
                right.push(load::<F>(mma, tile, keys + comptime!(bp.depth_fragment(i + AHEAD)), true));
            }
            mma2::<F>(
                mma,
                &left,
                j,
                BLOCKS,
                right.index(i),
                state,
                comptime!(2 * step),
                comptime!(2 * bp.key_steps()),
                held,
            );
        }
    }
}

/// One chunk: writes its outputs, if there are any, and takes the state to its end.
#[cube]
pub(crate) fn scan_chunk<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    factors: &SharedMemory<f32>,
    state: &mut Sequence<Acc>,
    base: usize,
    outputs: usize,
    from: Target,
    at: Lane,
    #[comptime] bp: Blueprint,
) {
    let mut x = zeros(comptime!(2 * bp.held * BLOCKS));
    let mut o = zeros(comptime!(2 * bp.held * bp.read_blocks()));
    read_state::<F>(mma, tile, state, &mut x, &mut o, base, at, bp);
    let mut n = writes::<F>(mma, tile, factors, &mut x, base, from, at, bp);
    if comptime!(bp.read_blocks() > 0) {
        read_writes::<F>(mma, tile, factors, &n, &mut o, outputs, from, at, bp);
    }
    update::<F>(mma, tile, factors, state, &mut n, base, from, at, bp);
}
