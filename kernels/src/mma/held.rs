//! What the planes that hold the state do with it, forwards and backwards: each owns `16 * held` value channels, and no
//! plane needs another's.
//!
//! Accumulators are indexed `m * per + column tile`, m counting the 16-channel tiles held.

use cubecl::prelude::*;

use super::blueprint::{BLOCK_UNITS, BLOCKS, Blueprint, CHANNELS_AT, DECAY_AT, Pass, TILE};
use super::chunk::Target;
use super::memory::Region;
use super::state::Lane;
use super::tile::{
    Acc, Frag, Mma, Tile, V2, by_columns, load, mma2, scale_columns, store, to_frag, to_parts,
};
use crate::spec::Decay;

/// Two factors, for the columns that this unit holds of accumulator `n`.
#[cube]
pub(crate) fn factor_pair(factors: &Region<f32>, at: usize, n: usize, lane: usize) -> Vector<f32, V2> {
    let first = at + 8 * n + lane % 4 * 2;
    let mut out = Vector::<f32, V2>::cast_from(factors[first]);
    out[1] = factors[first + 1];
    out
}

/// Multiplies the columns of tokens `j` by their factors.
#[cube]
pub(crate) fn scale_pair(
    x: &mut Sequence<Acc>,
    factors: &Region<f32>,
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

/// A pass over the state that has begun.
#[derive(CubeType)]
pub(crate) struct Reading<F: Float> {
    /// Where this unit's row begins of the first keys.
    rows: usize,
    /// Right operands that have been asked for.
    right: Sequence<Frag<F>>,
    /// The state as left operands, step by step: all of it in the backward, where it is kept, and in the forward what has
    /// been read.
    pub(crate) left: Sequence<Frag<F>>,
}

/// Begins to read the state for the chunk at `base`.
#[cube]
pub(crate) fn begin_reading<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    state: &Sequence<Acc>,
    base: usize,
    at: Lane,
    #[comptime] bp: Blueprint,
) -> Reading<F> {
    // Backwards keys are decayed to the end, as the state has taken them.
    let keys = comptime!(if bp.by_channel() && bp.pass == Pass::Unwind { bp.kd_at() } else { 0 });
    let rows = base + keys + by_columns(at.lane, comptime!(bp.key_row()));
    let mut right = Sequence::<Frag<F>>::new();
    #[unroll]
    for i in 0..comptime!(bp.reads_ahead().min(bp.reads())) {
        right.push(load::<F>(
            mma,
            tile,
            rows + comptime!(bp.row_fragment(i, BLOCKS + bp.state_reads())),
            false,
        ));
    }
    let mut left = Sequence::<Frag<F>>::new();
    #[unroll]
    for step in 0..comptime!(if bp.pass.is_backward() { bp.key_steps() } else { 0 }) {
        push_step::<F>(state, &mut left, step, bp);
    }
    Reading::<F> { rows, right, left }
}

/// Adds key step `step` of the state as left operands, one per tile held.
#[cube]
fn push_step<F: Float>(
    state: &Sequence<Acc>,
    left: &mut Sequence<Frag<F>>,
    #[comptime] step: usize,
    #[comptime] bp: Blueprint,
) {
    #[unroll]
    for m in 0..comptime!(bp.held) {
        let at = comptime!(2 * (m * bp.key_steps() + step));
        left.push(to_frag::<F>(state.index(at), state.index(comptime!(at + 1))));
    }
}

/// $X^T = S^T K^T$ and $O^T = S^T Q^T$ in one pass over the state, which it leaves decayed by the whole chunk: here,
/// since from here on the compiler may put that wherever products wait for each other.
#[cube]
pub(crate) fn read_state<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    factors: &Region<f32>,
    state: &mut Sequence<Acc>,
    reading: &mut Reading<F>,
    x: &mut Sequence<Acc>,
    o: &mut Sequence<Acc>,
    from: Target,
    at: Lane,
    #[comptime] bp: Blueprint,
) {
    let held = comptime!(bp.held);
    let blocks = comptime!(BLOCKS + bp.state_reads());
    let decay = whole_decay(factors, from, bp);
    #[unroll]
    for step in 0..comptime!(bp.key_steps()) {
        if comptime!(!bp.pass.is_backward()) {
            push_step::<F>(state, &mut reading.left, step, bp);
        }
        #[unroll]
        for j in 0..blocks {
            let i = comptime!(step * blocks + j);
            if comptime!(i + bp.reads_ahead() < bp.reads()) {
                let next = reading.rows + comptime!(bp.row_fragment(i + bp.reads_ahead(), blocks));
                reading.right.push(load::<F>(mma, tile, next, false));
            }
            let (left, right) = (&reading.left, reading.right.index(i));
            let first = comptime!(step * bp.held);
            if comptime!(j < BLOCKS) {
                mma2::<F>(mma, left, first, 1usize, right, x, comptime!(2 * j), comptime!(2 * BLOCKS), held);
            } else {
                let n = comptime!(2 * (j - BLOCKS));
                mma2::<F>(mma, left, first, 1usize, right, o, n, comptime!(2 * bp.read_blocks()), held);
            }
        }
        decay_step(state, factors, decay, from, at.lane, step, bp);
    }
}

/// $O^T = S^T Q^T$ by itself, before the state decays.
#[cube]
pub(crate) fn read_queries<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    state: &Sequence<Acc>,
    base: usize,
    o: &mut Sequence<Acc>,
    at: Lane,
    #[comptime] bp: Blueprint,
) {
    let blocks = comptime!(bp.read_blocks());
    let rows = base + comptime!(bp.q_at()) + by_columns(at.lane, comptime!(bp.key_row()));
    let total = comptime!(blocks * bp.key_steps());
    let mut right = Sequence::<Frag<F>>::new();
    #[unroll]
    for i in 0..comptime!(bp.ahead().min(total)) {
        right.push(load::<F>(mma, tile, rows + comptime!(bp.row_fragment(i, blocks)), false));
    }
    #[unroll]
    for step in 0..comptime!(bp.key_steps()) {
        let mut left = Sequence::<Frag<F>>::new();
        push_step::<F>(state, &mut left, step, bp);
        #[unroll]
        for j in 0..blocks {
            let i = comptime!(step * blocks + j);
            if comptime!(i + bp.ahead() < total) {
                right.push(load::<F>(
                    mma,
                    tile,
                    rows + comptime!(bp.row_fragment(i + bp.ahead(), blocks)),
                    false,
                ));
            }
            mma2::<F>(
                mma,
                &left,
                0usize,
                1usize,
                right.index(i),
                o,
                comptime!(2 * j),
                comptime!(2 * blocks),
                bp.held,
            );
        }
    }
}

/// The decay of the whole chunk, if it is one for all channels.
#[cube]
fn whole_decay(factors: &Region<f32>, from: Target, #[comptime] bp: Blueprint) -> Vector<f32, V2> {
    if comptime!(bp.spec.decay == Decay::Head) {
        Vector::cast_from(factors[from.factors + DECAY_AT])
    } else {
        Vector::cast_from(1.0f32)
    }
}

/// Takes the key channels of step `step` through the decay of the whole chunk: `whole`, or one for each channel.
#[cube]
fn decay_step(
    state: &mut Sequence<Acc>,
    factors: &Region<f32>,
    whole: Vector<f32, V2>,
    from: Target,
    lane: usize,
    #[comptime] step: usize,
    #[comptime] bp: Blueprint,
) {
    if comptime!(bp.spec.decay != Decay::None) {
        #[unroll]
        for half in 0..2usize {
            let n = comptime!(2 * step + half);
            let decay = if comptime!(bp.by_channel()) {
                factor_pair(factors, from.factors + CHANNELS_AT, n, lane)
            } else {
                whole
            };
            #[unroll]
            for m in 0..comptime!(bp.held) {
                scale_columns(state.index_mut(comptime!(2 * m * bp.key_steps() + n)), decay);
            }
        }
    }
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
/// for each one held.
#[cube]
pub(crate) fn add_rows<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    state: &mut Sequence<Acc>,
    left: &Sequence<Frag<F>>,
    right: &mut Sequence<Frag<F>>,
    rows: usize,
    #[comptime] blocks: usize,
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
        }
    }
}
