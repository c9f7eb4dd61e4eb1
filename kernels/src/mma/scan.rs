//! The chunks of a sequence forwards, by the planes that hold the state (`held.rs`).

use cubecl::prelude::*;

use super::blueprint::{
    BLOCK_UNITS, BLOCKS, Blueprint, ERASE_AT, ERASE_BLOCK, Pass, READ_AT, TILE, WRITE_AT,
};
use super::held::{
    Reading, add_rows, begin_reading, factor_pair, multiply_leaf, read_queries, read_state, scale_pair,
    send_for_rows, store_rows_of,
};
use super::memory::Region;
use super::stage::{Place, Turn};
use super::state::Lane;
use super::tile::{
    Acc, Frag, Mma, Tile, V2, by_columns, by_depth, in_block, load, mma2, scale_columns, to_frag, zeros,
};
use crate::known::known_and;
use crate::spec::Decay;

/// N from X: $V^T - e^G X^T$, then block by block as `chunk.rs` says. Consumes X; a replay leaves R in shared memory.
#[cube]
fn writes<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    factors: &Region<f32>,
    x: &mut Sequence<Acc>,
    turn: Turn,
    at: Lane,
    #[comptime] bp: Blueprint,
) -> Sequence<Acc> {
    let held = comptime!(bp.held);
    let per = comptime!(2 * BLOCKS);
    let lane = at.lane;
    let from = turn.from;
    let values = turn.rows
        + comptime!(bp.v_at())
        + by_columns(lane, comptime!(bp.value_row()))
        + at.plane * (2 * held);
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
            store_rows_of::<F>(mma, tile, &n, j, per, turn.outputs, at, bp);
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
    factors: &Region<f32>,
    n: &Sequence<Acc>,
    o: &mut Sequence<Acc>,
    turn: Turn,
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
    let from = turn.from;
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
        store_rows_of::<F>(mma, tile, o, r, per, turn.outputs, at, bp);
    }
}

/// $S^T \leftarrow S^T + (e^{G_C - G} N)^T K$, S decayed by the whole chunk. Consumes N.
#[cube]
fn update<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    factors: &Region<f32>,
    state: &mut Sequence<Acc>,
    n: &mut Sequence<Acc>,
    turn: Turn,
    at: Lane,
    #[comptime] bp: Blueprint,
) {
    let held = comptime!(bp.held);
    let lane = at.lane;
    let from = turn.from;
    let keys = turn.rows
        + comptime!(if bp.by_channel() { bp.kd_at() } else { 0 })
        + by_depth(lane, comptime!(bp.key_row()));
    let mut right = send_for_rows::<F>(mma, tile, keys, BLOCKS, bp);
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
    add_rows::<F>(mma, tile, state, &left, &mut right, keys, BLOCKS, bp);
}

/// One chunk: writes its outputs, if there are any and the cube `reads`, and takes the state to its end.
#[cube]
pub(crate) fn scan_chunk<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    factors: &Region<f32>,
    state: &mut Sequence<Acc>,
    mut reading: Reading<F>,
    turn: Turn,
    reads: bool,
    at: Lane,
    #[comptime] bp: Blueprint,
) {
    let mut x = zeros(comptime!(2 * bp.held * BLOCKS));
    let mut o = zeros(comptime!(2 * bp.held * bp.read_blocks()));
    if known_and(bp.pass == Pass::Segments, reads) {
        read_queries::<F>(mma, tile, state, turn.rows, &mut o, at, bp);
    }
    read_state::<F>(mma, tile, factors, state, &mut reading, &mut x, &mut o, turn.from, at, bp);
    let mut n = writes::<F>(mma, tile, factors, &mut x, turn, at, bp);
    if known_and(bp.read_blocks() > 0, reads) {
        read_writes::<F>(mma, tile, factors, &n, &mut o, turn, at, bp);
    }
    update::<F>(mma, tile, factors, state, &mut n, turn, at, bp);
}

/// All chunks of the cube's sequence, each as soon as it is prepared.
#[cube]
pub(crate) fn scan_chunks<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    factors: &Region<f32>,
    state: &mut Sequence<Acc>,
    place: &Place,
    at: Lane,
    #[comptime] bp: Blueprint,
) {
    #[unroll]
    for _ in 0..comptime!(bp.groups) {
        sync_cube();
    }
    for c in 0..place.chunks as u32 {
        sync_cube();
        let turn = Turn::new(c, bp);
        let reading = begin_reading::<F>(mma, tile, state, turn.rows, at, bp);
        scan_chunk::<F>(mma, tile, factors, state, reading, turn, place.reads(bp), at, bp);
    }
    sync_cube();
}
