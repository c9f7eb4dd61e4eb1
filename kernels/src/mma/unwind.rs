//! The scan backwards: the planes hold $dS^T$, the gradient of the state behind a chunk.
//!
//! With the blocks of `chunk.rs`, all of the forward:
//!
//! ```text
//! dN   = P^T dO + (e^{G_C - G} K) dS
//! dV_1 = M_1^T (rho beta . dN_1)
//! dV_0 = M_0^T (rho beta . (dN_0 - E^T dV_1))
//! dS  <- e^{G_C} dS + (e^G Q)^T dO - (e^G K)^T dV
//! ```

use cubecl::prelude::*;

use super::blueprint::{BLOCK_UNITS, BLOCKS, Blueprint, ERASE_AT, ERASE_BLOCK, READ_AT, TILE, WRITE_AT};
use super::chunk::Target;
use super::held::{
    Reading, add_rows, factor_pair, multiply_leaf, read_state, scale_pair, send_for_rows, store_rows_of,
};
use super::memory::Region;
use super::stage::Turn;
use super::state::Lane;
use super::tile::{
    Acc, Frag, Mma, Tile, V2, by_columns, by_depth, in_block, load, mma2, scale_columns, to_frag, zeros,
};
use crate::spec::Decay;

/// The output gradients of the chunk as left operands: reads `r` of tile `m` at `m * read_blocks + r`.
#[cube]
fn output_gradients<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    base: usize,
    at: Lane,
    #[comptime] bp: Blueprint,
) -> Sequence<Frag<F>> {
    let rows = base
        + comptime!(bp.v_at())
        + by_columns(at.lane, comptime!(bp.value_row()))
        + at.plane * comptime!(2 * bp.held);
    let mut frags = Sequence::<Frag<F>>::new();
    #[unroll]
    for m in 0..comptime!(bp.held) {
        #[unroll]
        for r in 0..comptime!(bp.read_blocks()) {
            frags.push(load::<F>(mma, tile, rows + comptime!(r * TILE * bp.value_row() + 2 * m), true));
        }
    }
    frags
}

/// $dS \leftarrow dS + (e^G Q)^T dO$, with the products of dO and its factors rounded; or, if it is asked for, with what
/// rounding has left of them.
#[cube]
fn add_output_gradients<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    factors: &Region<f32>,
    d_state: &mut Sequence<Acc>,
    d_o: &Sequence<Frag<F>>,
    queries: usize,
    from: Target,
    at: Lane,
    #[comptime] rest: bool,
    #[comptime] bp: Blueprint,
) {
    #[unroll]
    for r in 0..comptime!(bp.read_blocks()) {
        let rows = queries + comptime!(r * TILE * bp.key_row());
        let mut right = send_for_rows::<F>(mma, tile, rows, 1usize, bp);
        let mut left = Sequence::<Frag<F>>::new();
        #[unroll]
        for m in 0..comptime!(bp.held) {
            let f = d_o.index(comptime!(m * bp.read_blocks() + r));
            left.push(scale_depth::<F>(f, factors, from.factors + READ_AT, r, at.lane, rest));
        }
        add_rows::<F>(mma, tile, d_state, &left, &mut right, rows, 1usize, bp);
    }
}

/// Multiplies the depth of a left operand by the factors of tile `j`: the product rounded, or its rest.
#[cube]
fn scale_depth<F: Float>(
    f: &Frag<F>,
    factors: &Region<f32>,
    at: usize,
    #[comptime] j: usize,
    lane: usize,
    #[comptime] rest: bool,
) -> Frag<F> {
    let mut y = Frag::<F>::new(4usize);
    #[unroll]
    for half in 0..2usize {
        let by = factor_pair(factors, at, comptime!(2 * j + half), lane);
        #[unroll]
        for e in 0..2usize {
            let i = comptime!(2 * half + e);
            let x = Vector::<f32, V2>::cast_from(f[i]) * by;
            let rounded = Vector::<F, V2>::cast_from(x);
            y[i] = if comptime!(rest) {
                Vector::cast_from(x - Vector::<f32, V2>::cast_from(rounded))
            } else {
                rounded
            };
        }
    }
    y
}

/// Tile `j` of tokens of `x`, as left operands for each tile held.
#[cube]
fn tokens<F: Float>(x: &Sequence<Acc>, #[comptime] j: usize, #[comptime] bp: Blueprint) -> Sequence<Frag<F>> {
    let mut frags = Sequence::<Frag<F>>::new();
    #[unroll]
    for m in 0..comptime!(bp.held) {
        let i = comptime!(2 * (m * BLOCKS + j));
        frags.push(to_frag::<F>(x.index(i), x.index(comptime!(i + 1))));
    }
    frags
}

/// dV of tile `j`, left in shared memory, from $dN = dS^T (e^{G_C - G} K)^T$ less its factors, and from dV of the
/// tile behind it.
#[cube]
fn value_gradients<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    factors: &Region<f32>,
    dn: &mut Sequence<Acc>,
    dv: &mut Sequence<Acc>,
    d_o: &Sequence<Frag<F>>,
    turn: Turn,
    at: Lane,
    #[comptime] j: usize,
    #[comptime] bp: Blueprint,
) {
    let held = comptime!(bp.held);
    let per = comptime!(2 * BLOCKS);
    let lane = at.lane;
    let from = turn.from;
    // Blocks are right operands by depth: they are read transposed.
    let blocks = from.blocks + in_block(lane % 16, lane / 16);
    if comptime!(bp.spec.decay == Decay::Head) {
        scale_pair(dn, factors, from.factors + WRITE_AT, j, per, lane, held);
    }
    #[unroll]
    for r in 0..comptime!(bp.read_blocks()) {
        if comptime!(j < bp.p_blocks(r)) {
            let p = load::<F>(mma, tile, blocks + comptime!(bp.p_block(r, j) * BLOCK_UNITS), true);
            mma2::<F>(mma, d_o, r, bp.read_blocks(), &p, dn, comptime!(2 * j), per, held);
        }
    }
    if comptime!(j + 1 < BLOCKS) {
        let erased = tokens::<F>(dv, comptime!(j + 1), bp);
        let erase = load::<F>(mma, tile, blocks + comptime!(ERASE_BLOCK * BLOCK_UNITS), true);
        mma2::<F>(mma, &erased, 0usize, 1usize, &erase, dn, comptime!(2 * j), per, held);
    }
    scale_pair(dn, factors, from.factors + comptime!(bp.betas_at()), j, per, lane, held);
    multiply_leaf::<F>(mma, tile, dn, blocks, dv, j, true, true, bp);
    store_rows_of::<F>(mma, tile, dv, j, per, turn.outputs, at, bp);
}

/// One chunk, backwards: writes its dV and takes the gradient of the state to its beginning. `first`: of its sequence.
#[cube]
pub(crate) fn unwind_chunk<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    factors: &Region<f32>,
    d_state: &mut Sequence<Acc>,
    mut reading: Reading<F>,
    turn: Turn,
    first: bool,
    at: Lane,
    #[comptime] bp: Blueprint,
) {
    let from = turn.from;
    let keys = turn.rows + by_depth(at.lane, comptime!(bp.key_row()));
    let queries = keys + comptime!(bp.q_at());
    let mut dn = zeros(comptime!(2 * bp.held * BLOCKS));
    let mut none = zeros(0usize);
    read_state::<F>(mma, tile, factors, d_state, &mut reading, &mut dn, &mut none, from, at, bp);
    let d_o = output_gradients::<F>(mma, tile, turn.rows, at, bp);
    let mut dv = zeros(comptime!(2 * bp.held * BLOCKS));
    let last = comptime!(BLOCKS - 1);
    value_gradients::<F>(mma, tile, factors, &mut dn, &mut dv, &d_o, turn, at, last, bp);

    // Work that does not wait for the rest of dV.
    add_output_gradients::<F>(mma, tile, factors, d_state, &d_o, queries, from, at, false, bp);

    #[unroll]
    for down in 1..BLOCKS {
        let j = comptime!(BLOCKS - 1 - down);
        value_gradients::<F>(mma, tile, factors, &mut dn, &mut dv, &d_o, turn, at, j, bp);
    }
    erase::<F>(mma, tile, factors, d_state, &mut dv, keys, from, at, bp);

    // No decay and no key will ever touch what the first chunk adds: rounded, that would be most of the error of the initial
    // state's gradient.
    if first {
        let d_o = output_gradients::<F>(mma, tile, turn.rows, at, bp);
        add_output_gradients::<F>(mma, tile, factors, d_state, &d_o, queries, from, at, true, bp);
    }
}

/// $dS \leftarrow dS - (e^G K)^T dV$. Consumes dV.
#[cube]
fn erase<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    factors: &Region<f32>,
    d_state: &mut Sequence<Acc>,
    dv: &mut Sequence<Acc>,
    keys: usize,
    from: Target,
    at: Lane,
    #[comptime] bp: Blueprint,
) {
    let mut right = send_for_rows::<F>(mma, tile, keys, BLOCKS, bp);
    let mut left = Sequence::<Frag<F>>::new();
    #[unroll]
    for m in 0..comptime!(bp.held) {
        #[unroll]
        for j in 0..BLOCKS {
            #[unroll]
            for half in 0..2usize {
                let by = factor_pair(factors, from.factors + ERASE_AT, comptime!(2 * j + half), at.lane);
                let n = comptime!(2 * (m * BLOCKS + j) + half);
                scale_columns(dv.index_mut(n), by * Vector::cast_from(-1.0f32));
            }
            let n = comptime!(2 * (m * BLOCKS + j));
            left.push(to_frag::<F>(dv.index(n), dv.index(comptime!(n + 1))));
        }
    }
    add_rows::<F>(mma, tile, d_state, &left, &mut right, keys, BLOCKS, bp);
}
