//! The planes that hold the state: each owns `16 * held` value channels, and no plane needs another's.

use cubecl::prelude::*;

use super::blueprint::{BLOCK_UNITS, BLOCKS, Blueprint, DECAY_AT, ERASE_AT, ERASE_BLOCK, TILE, WRITE_AT};
use super::stage::Place;
use super::tile::{
    AHEAD, Acc, Frag, Mma, Tile, V2, by_columns, by_depth, in_block, load, mma2, scale_columns, store, to_frag, zeros,
};
use crate::record::StateStrides;
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
fn state_frags<F: Float>(state: &Sequence<Acc>, #[comptime] step: usize, #[comptime] bp: Blueprint) -> Sequence<Frag<F>> {
    let mut frags = Sequence::<Frag<F>>::new();
    #[unroll]
    for m in 0..comptime!(bp.held) {
        let at = comptime!(2 * (m * bp.key_steps() + step));
        frags.push(to_frag::<F>(state.index(at), state.index(comptime!(at + 1))));
    }
    frags
}

/// N of a chunk: what is written, as left operands, plain for the readers and decayed to the end of the
/// chunk for the state.
///
/// $X^T = S^T K^T$, $R^T = V^T - e^G X^T$, then block by block as `prepare.rs` says.
#[cube]
pub(crate) fn writes<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    factors: &SharedMemory<f32>,
    state: &Sequence<Acc>,
    base: usize,
    blocks: usize,
    factors_at: usize,
    plane: usize,
    lane: usize,
    #[comptime] bp: Blueprint,
) -> Sequence<Acc> {
    let held = comptime!(bp.held);
    let per = comptime!(2 * BLOCKS);
    let keys = base + by_columns(lane, comptime!(bp.key_row()));

    let mut x = zeros(comptime!(held * per));
    let total = comptime!(bp.key_steps() * BLOCKS);
    let mut right = Sequence::<Frag<F>>::new();
    #[unroll]
    for i in 0..comptime!(AHEAD.min(total)) {
        right.push(load::<F>(mma, tile, keys + comptime!(key_fragment(i, bp)), false));
    }
    #[unroll]
    for step in 0..comptime!(bp.key_steps()) {
        let left = state_frags::<F>(state, step, bp);
        #[unroll]
        for j in 0..BLOCKS {
            let i = comptime!(step * BLOCKS + j);
            if comptime!(i + AHEAD < total) {
                right.push(load::<F>(mma, tile, keys + comptime!(key_fragment(i + AHEAD, bp)), false));
            }
            mma2::<F>(mma, &left, 0usize, 1usize, right.index(i), &mut x, comptime!(2 * j), per, held);
        }
    }

    // R, over X.
    let values = base + comptime!(bp.v_at()) + by_columns(lane, comptime!(bp.value_row())) + plane * (2 * held);
    #[unroll]
    for j in 0..BLOCKS {
        let lo = factor_pair(factors, factors_at + ERASE_AT, 2 * j, lane);
        let hi = factor_pair(factors, factors_at + ERASE_AT, 2 * j + 1, lane);
        #[unroll]
        for m in 0..held {
            let at = values + comptime!(j * TILE * bp.value_row() + 2 * m);
            let v = load::<F>(mma, tile, at, true);
            let n = comptime!(m * per + 2 * j);
            residual::<F>(x.index_mut(n), v[0], v[1], lo);
            residual::<F>(x.index_mut(comptime!(n + 1)), v[2], v[3], hi);
        }
    }

    let at = blocks + in_block(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    let mut n = zeros(comptime!(held * per));
    let mut written = Sequence::<Frag<F>>::new();
    #[unroll]
    for j in 0..BLOCKS {
        if comptime!(j > 0) {
            let erase = load::<F>(mma, tile, at + comptime!(ERASE_BLOCK * BLOCK_UNITS), false);
            mma2::<F>(mma, &written, 0usize, 1usize, &erase, &mut x, comptime!(2 * j), per, held);
        }
        let mut r = Sequence::<Frag<F>>::new();
        #[unroll]
        for m in 0..held {
            let i = comptime!(m * per + 2 * j);
            r.push(to_frag::<F>(x.index(i), x.index(comptime!(i + 1))));
        }
        let leaf = load::<F>(mma, tile, at + comptime!(j * BLOCK_UNITS), false);
        mma2::<F>(mma, &r, 0usize, 1usize, &leaf, &mut n, comptime!(2 * j), per, held);
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

/// Where right operand `i` of the products with the keys lies.
fn key_fragment(i: usize, bp: Blueprint) -> usize {
    2 * (i / BLOCKS) + i % BLOCKS * TILE * bp.key_row()
}

/// `x <- v - by * x`.
#[cube]
fn residual<F: Float>(x: &mut Acc, v_lo: Vector<F, V2>, v_hi: Vector<F, V2>, by: Vector<f32, V2>) {
    x[0] = Vector::<f32, V2>::cast_from(v_lo) - by * x[0];
    x[1] = Vector::<f32, V2>::cast_from(v_hi) - by * x[1];
}

/// Hands N to the readers.
#[cube]
pub(crate) fn publish_writes<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    n: &Sequence<Acc>,
    plane: usize,
    lane: usize,
    #[comptime] bp: Blueprint,
) {
    let at = comptime!(bp.writes_at()) + plane * comptime!(bp.held * BLOCKS * BLOCK_UNITS) + lane;
    #[unroll]
    for i in 0..comptime!(bp.held * BLOCKS) {
        let f = to_frag::<F>(n.index(comptime!(2 * i)), n.index(comptime!(2 * i + 1)));
        store::<F>(mma, tile, at + comptime!(i * BLOCK_UNITS), &f, false);
    }
}

/// Hands the state, rounded, to the readers.
#[cube]
pub(crate) fn publish_state<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    state: &Sequence<Acc>,
    plane: usize,
    lane: usize,
    #[comptime] bp: Blueprint,
) {
    let at = comptime!(bp.state_at()) + plane * comptime!(bp.held * bp.key_steps() * BLOCK_UNITS) + lane;
    #[unroll]
    for i in 0..comptime!(bp.held * bp.key_steps()) {
        let f = to_frag::<F>(state.index(comptime!(2 * i)), state.index(comptime!(2 * i + 1)));
        store::<F>(mma, tile, at + comptime!(i * BLOCK_UNITS), &f, false);
    }
}

/// $S^T \leftarrow e^{G_C} S^T + (e^{G_C - G} N)^T K$. Consumes N.
#[cube]
pub(crate) fn update<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    factors: &SharedMemory<f32>,
    state: &mut Sequence<Acc>,
    n: &mut Sequence<Acc>,
    base: usize,
    factors_at: usize,
    lane: usize,
    #[comptime] bp: Blueprint,
) {
    let held = comptime!(bp.held);
    let steps = comptime!(bp.key_steps());
    let keys = base + by_depth(lane, comptime!(bp.key_row()));
    let total = comptime!(BLOCKS * bp.key_steps());
    let mut right = Sequence::<Frag<F>>::new();
    #[unroll]
    for i in 0..comptime!(AHEAD.min(total)) {
        right.push(load::<F>(mma, tile, keys + comptime!(depth_fragment(i, bp)), true));
    }
    if comptime!(bp.spec.decay == Decay::Head) {
        let decay = Vector::<f32, V2>::cast_from(factors[factors_at + DECAY_AT]);
        #[unroll]
        for i in 0..comptime!(2 * held * steps) {
            scale_columns(state.index_mut(i), decay);
        }
    }
    let mut left = Sequence::<Frag<F>>::new();
    #[unroll]
    for m in 0..held {
        #[unroll]
        for j in 0..BLOCKS {
            let i = comptime!(2 * (m * BLOCKS + j));
            if comptime!(bp.spec.decay == Decay::Head) {
                scale_columns(n.index_mut(i), factor_pair(factors, factors_at + WRITE_AT, 2 * j, lane));
                scale_columns(
                    n.index_mut(comptime!(i + 1)),
                    factor_pair(factors, factors_at + WRITE_AT, 2 * j + 1, lane),
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
                right.push(load::<F>(mma, tile, keys + comptime!(depth_fragment(i + AHEAD, bp)), true));
            }
            mma2::<F>(mma, &left, j, BLOCKS, right.index(i), state, comptime!(2 * step), comptime!(2 * bp.key_steps()), held);
        }
    }
}

/// Where right operand `i` of the state's update lies.
fn depth_fragment(i: usize, bp: Blueprint) -> usize {
    2 * (i % bp.key_steps()) + i / bp.key_steps() * TILE * bp.key_row()
}

/// Reads or writes the state of this plane in device memory: element `(k, v)` of the sequence and head at
/// `at.n`, `at.h`.
#[cube]
pub(crate) fn load_state(
    from: &Array<f32>,
    at: &StateStrides,
    place: &Place,
    plane: usize,
    lane: usize,
    #[comptime] bp: Blueprint,
) -> Sequence<Acc> {
    let mut state = zeros(comptime!(2 * bp.held * bp.key_steps()));
    if comptime!(bp.spec.has_initial_state) {
        let origin = place.n * at.n as usize + place.hv * at.h as usize;
        #[unroll]
        for i in 0..comptime!(2 * bp.held * bp.key_steps()) {
            let acc = state.index_mut(i);
            let m = comptime!(i / (2 * bp.key_steps()));
            let key = comptime!(i % (2 * bp.key_steps()) * 8) + lane % 4 * 2;
            #[unroll]
            for e in 0..2usize {
                let value = place.v0 + (plane * bp.held + m) * TILE + 8 * e + lane / 4;
                if value < bp.spec.value_dim {
                    let first = origin + key * at.k as usize + value * at.v as usize;
                    let mut x = Vector::<f32, V2>::cast_from(from[first]);
                    x[1] = from[first + at.k as usize];
                    acc[e] = x;
                }
            }
        }
    }
    state
}

/// The reverse of [`load_state`].
#[cube]
pub(crate) fn store_state(
    state: &Sequence<Acc>,
    to: &mut Array<f32>,
    at: &StateStrides,
    place: &Place,
    plane: usize,
    lane: usize,
    #[comptime] bp: Blueprint,
) {
    let origin = place.n * at.n as usize + place.hv * at.h as usize;
    #[unroll]
    for i in 0..comptime!(2 * bp.held * bp.key_steps()) {
        let acc = state.index(i);
        let m = comptime!(i / (2 * bp.key_steps()));
        let key = comptime!(i % (2 * bp.key_steps()) * 8) + lane % 4 * 2;
        #[unroll]
        for e in 0..2usize {
            let value = place.v0 + (plane * bp.held + m) * TILE + 8 * e + lane / 4;
            if value < bp.spec.value_dim {
                let first = origin + key * at.k as usize + value * at.v as usize;
                let x = acc[e];
                to[first] = x[0];
                to[first + at.k as usize] = x[1];
            }
        }
    }
}
