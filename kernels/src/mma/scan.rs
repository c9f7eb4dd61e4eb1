//! The planes that hold the state: each owns `16 * held` value channels, and no plane needs another's.
//!
//! Accumulators are indexed `m * per + column tile`, m counting the 16-channel tiles held.

use cubecl::prelude::*;

use super::blueprint::{
    BLOCK_UNITS, BLOCKS, Blueprint, CHANNELS_AT, DECAY_AT, ERASE_AT, ERASE_BLOCK, Pass, READ_AT, TILE,
    WRITE_AT,
};
use super::chunk::Target;
use super::state::Lane;
use super::tile::{
    Acc, Frag, Mma, Tile, V2, by_columns, by_depth, in_block, load, mma2, scale_columns, store, to_frag,
    to_parts, zeros,
};
use crate::spec::Decay;

/// Two factors, for the columns that this unit holds of accumulator `n`.
#[cube]
pub(crate) fn factor_pair(factors: &SharedMemory<f32>, at: usize, n: usize, lane: usize) -> Vector<f32, V2> {
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
pub(crate) fn read_state<F: Float>(
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
    let blocks = comptime!(BLOCKS + bp.state_reads());
    let total = comptime!(bp.key_steps() * (BLOCKS + bp.state_reads()));
    let mut right = Sequence::<Frag<F>>::new();
    #[unroll]
    for i in 0..comptime!(bp.ahead().min(total)) {
        right.push(load::<F>(mma, tile, rows + comptime!(bp.row_fragment(i)), false));
    }
    #[unroll]
    for step in 0..comptime!(bp.key_steps()) {
        let left = state_frags::<F>(state, step, bp);
        #[unroll]
        for j in 0..blocks {
            let i = comptime!(step * blocks + j);
            if comptime!(i + bp.ahead() < total) {
                right.push(load::<F>(mma, tile, rows + comptime!(bp.row_fragment(i + bp.ahead())), false));
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

/// N from X: $V^T - e^G X^T$, then block by block as `chunk.rs` says. Consumes X; a replay leaves R in shared memory.
#[cube]
fn writes<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    factors: &SharedMemory<f32>,
    x: &mut Sequence<Acc>,
    base: usize,
    outputs: usize,
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
        // Scaled keys have been rounded once more than plain ones, and gradients are made of residuals: what R loses
        // is taken along.
        let two = comptime!(bp.by_channel() || bp.pass == Pass::Replay);
        multiply_leaf::<F>(mma, tile, x, blocks, &mut n, j, false, two, bp);
        if comptime!(bp.pass == Pass::Replay) {
            store_rows_of::<F>(mma, tile, &n, j, per, outputs, at, bp);
            scale_pair(&mut n, factors, from.factors + comptime!(bp.betas_at()), j, per, lane, held);
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

/// Multiplies the columns of tokens `j` by their factors.
#[cube]
pub(crate) fn scale_pair(
    x: &mut Sequence<Acc>,
    factors: &SharedMemory<f32>,
    at: usize,
    #[comptime] j: usize,
    #[comptime] per: usize,
    lane: usize,
    #[comptime] held: usize,
) {
    #[unroll]
    for half in 0..2usize {
        let by = factor_pair(factors, at, comptime!(2 * j + half), lane);
        #[unroll]
        for m in 0..held {
            scale_columns(x.index_mut(comptime!(m * per + 2 * j + half)), by);
        }
    }
}

/// Leaves the rows of tile `j`, which are columns of `x`, in shared memory as outputs.
#[cube]
pub(crate) fn store_rows_of<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    x: &Sequence<Acc>,
    #[comptime] j: usize,
    #[comptime] per: usize,
    outputs: usize,
    at: Lane,
    #[comptime] bp: Blueprint,
) {
    let held = comptime!(bp.held);
    let place = outputs + by_columns(at.lane, comptime!(bp.value_row())) + at.plane * (2 * held);
    #[unroll]
    for m in 0..held {
        let i = comptime!(m * per + 2 * j);
        let f = to_frag::<F>(x.index(i), x.index(comptime!(i + 1)));
        store::<F>(mma, tile, place + comptime!(j * TILE * bp.value_row() + 2 * m), &f, true);
    }
}

/// Adds tile `j` of tokens of `x` times its leaf, one of `blocks`, to that of `to`, `x` in two parts if asked for.
#[cube]
pub(crate) fn multiply_leaf<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    x: &Sequence<Acc>,
    blocks: usize,
    to: &mut Sequence<Acc>,
    #[comptime] j: usize,
    #[comptime] transposed: bool,
    #[comptime] two: bool,
    #[comptime] bp: Blueprint,
) {
    let per = comptime!(2 * BLOCKS);
    let mut left = Sequence::<Frag<F>>::new();
    let mut rest = Sequence::<Frag<F>>::new();
    #[unroll]
    for m in 0..comptime!(bp.held) {
        let i = comptime!(m * per + 2 * j);
        if comptime!(two) {
            let (a, b) = to_parts::<F>(x.index(i), x.index(comptime!(i + 1)));
            left.push(a);
            rest.push(b);
        } else {
            left.push(to_frag::<F>(x.index(i), x.index(comptime!(i + 1))));
        }
    }
    let leaf = load::<F>(mma, tile, blocks + comptime!(j * BLOCK_UNITS), transposed);
    mma2::<F>(mma, &left, 0usize, 1usize, &leaf, to, comptime!(2 * j), per, bp.held);
    if comptime!(two) {
        mma2::<F>(mma, &rest, 0usize, 1usize, &leaf, to, comptime!(2 * j), per, bp.held);
    }
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
    #[unroll]
    for r in 0..comptime!(bp.read_blocks()) {
        scale_pair(o, factors, from.factors + READ_AT, r, per, lane, held);
        #[unroll]
        for j in 0..comptime!(bp.p_blocks(r)) {
            let p = load::<F>(mma, tile, blocks + comptime!(bp.p_block(r, j) * BLOCK_UNITS), false);
            mma2::<F>(mma, &left, j, BLOCKS, &p, o, comptime!(2 * r), per, held);
        }
    }
    #[unroll]
    for r in 0..comptime!(bp.read_blocks()) {
        store_rows_of::<F>(mma, tile, o, r, per, outputs, at, bp);
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
    let keys = base
        + comptime!(if bp.by_channel() { bp.kd_at() } else { 0 })
        + by_depth(lane, comptime!(bp.key_row()));
    let mut right = send_for_rows::<F>(mma, tile, keys, BLOCKS, bp);
    decay_state(state, factors, from, lane, bp);
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
    add_rows::<F>(mma, tile, state, &left, &left, &mut right, keys, BLOCKS, false, bp);
}

/// The first right operands of [`add_rows`].
#[cube]
pub(crate) fn send_for_rows<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    rows: usize,
    #[comptime] blocks: usize,
    #[comptime] bp: Blueprint,
) -> Sequence<Frag<F>> {
    let mut right = Sequence::<Frag<F>>::new();
    #[unroll]
    for i in 0..comptime!(bp.ahead().min(blocks * bp.key_steps())) {
        right.push(load::<F>(mma, tile, rows + comptime!(bp.depth_fragment(i)), true));
    }
    right
}

/// $S^T \leftarrow S^T + A^T B$ for `blocks` tiles of rows B of keys or queries; of A there are `blocks` tiles
/// for each one held, and as many of its `rest` if there are `two` parts.
#[cube]
pub(crate) fn add_rows<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    state: &mut Sequence<Acc>,
    left: &Sequence<Frag<F>>,
    rest: &Sequence<Frag<F>>,
    right: &mut Sequence<Frag<F>>,
    rows: usize,
    #[comptime] blocks: usize,
    #[comptime] two: bool,
    #[comptime] bp: Blueprint,
) {
    let total = comptime!(blocks * bp.key_steps());
    #[unroll]
    for j in 0..blocks {
        #[unroll]
        for step in 0..comptime!(bp.key_steps()) {
            let i = comptime!(j * bp.key_steps() + step);
            if comptime!(i + bp.ahead() < total) {
                right.push(load::<F>(mma, tile, rows + comptime!(bp.depth_fragment(i + bp.ahead())), true));
            }
            let b = right.index(i);
            let first = comptime!(2 * step);
            mma2::<F>(mma, left, j, blocks, b, state, first, comptime!(2 * bp.key_steps()), bp.held);
            if comptime!(two) {
                mma2::<F>(mma, rest, j, blocks, b, state, first, comptime!(2 * bp.key_steps()), bp.held);
            }
        }
    }
}

/// Takes the state through the decay of the whole chunk.
#[cube]
pub(crate) fn decay_state(
    state: &mut Sequence<Acc>,
    factors: &SharedMemory<f32>,
    from: Target,
    lane: usize,
    #[comptime] bp: Blueprint,
) {
    let held = comptime!(bp.held);
    let steps = comptime!(bp.key_steps());
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
    let mut n = writes::<F>(mma, tile, factors, &mut x, base, outputs, from, at, bp);
    if comptime!(bp.read_blocks() > 0) {
        read_writes::<F>(mma, tile, factors, &n, &mut o, outputs, from, at, bp);
    }
    update::<F>(mma, tile, factors, state, &mut n, base, from, at, bp);
}
