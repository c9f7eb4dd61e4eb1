//! The planes that read the state: $O^T = e^G S^T Q^T + N^T P^T$.

use cubecl::prelude::*;

use super::blueprint::{BLOCK_UNITS, BLOCKS, Blueprint, CHUNK, READ_AT, TILE};
use super::stage::Place;
use super::tile::{
    AHEAD, Acc, Frag, Mma, Tile, V8, by_columns, in_block, load, mma2, scale_columns, store, to_frag,
};
use super::write::factor_pair;
use crate::record::Strides;

/// Adds $S^T Q^T$ for the value channels of writer `plane`.
#[cube]
pub(crate) fn read_state<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    o: &mut Sequence<Acc>,
    base: usize,
    plane: usize,
    lane: usize,
    #[comptime] bp: Blueprint,
) {
    let held = comptime!(bp.held);
    let per = comptime!(2 * bp.read_blocks());
    let state = comptime!(bp.state_at()) + plane * comptime!(bp.held * bp.key_steps() * BLOCK_UNITS) + lane;
    let queries = base + comptime!(bp.q_at()) + by_columns(lane, comptime!(bp.key_row()));
    let total = comptime!(bp.key_steps());
    let ahead = comptime!((AHEAD / 2).min(bp.key_steps()));
    let mut left = Sequence::<Sequence<Frag<F>>>::new();
    let mut right = Sequence::<Frag<F>>::new();
    #[unroll]
    for step in 0..comptime!(total + ahead) {
        if comptime!(step < total) {
            let mut a = Sequence::<Frag<F>>::new();
            #[unroll]
            for m in 0..held {
                a.push(load::<F>(mma, tile, state + comptime!((m * bp.key_steps() + step) * BLOCK_UNITS), false));
            }
            left.push(a);
            #[unroll]
            for r in 0..comptime!(bp.read_blocks()) {
                right.push(load::<F>(mma, tile, queries + comptime!(r * TILE * bp.key_row() + 2 * step), false));
            }
        }
        if comptime!(step >= ahead) {
            let now = comptime!(step - ahead);
            #[unroll]
            for r in 0..comptime!(bp.read_blocks()) {
                let b = right.index(comptime!(now * bp.read_blocks() + r));
                mma2::<F>(mma, left.index(now), 0usize, 1usize, b, o, comptime!(2 * r), per, held);
            }
        }
    }
}

/// Adds what the chunk itself wrote, and writes the tokens of chunk `c`.
#[cube]
pub(crate) fn read_writes<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    factors: &SharedMemory<f32>,
    o: &mut Sequence<Acc>,
    out: &mut Array<Vector<F, V8>>,
    out_at: &Strides,
    place: &Place,
    c: usize,
    base: usize,
    blocks: usize,
    factors_at: usize,
    plane: usize,
    lane: usize,
    #[comptime] bp: Blueprint,
) {
    let held = comptime!(bp.held);
    let per = comptime!(2 * bp.read_blocks());
    let writes = comptime!(bp.writes_at()) + plane * comptime!(bp.held * BLOCKS * BLOCK_UNITS) + lane;
    let at = blocks + in_block(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    let mut left = Sequence::<Frag<F>>::new();
    #[unroll]
    for i in 0..comptime!(held * BLOCKS) {
        left.push(load::<F>(mma, tile, writes + comptime!(i * BLOCK_UNITS), false));
    }
    let stage = base + comptime!(bp.v_at()) + by_columns(lane, comptime!(bp.value_row())) + plane * (2 * held);
    #[unroll]
    for r in 0..comptime!(bp.read_blocks()) {
        #[unroll]
        for half in 0..2usize {
            let by = factor_pair(factors, factors_at + READ_AT, comptime!(2 * r + half), lane);
            #[unroll]
            for m in 0..held {
                scale_columns(o.index_mut(comptime!(m * per + 2 * r + half)), by);
            }
        }
        #[unroll]
        for j in 0..comptime!(bp.p_blocks(r)) {
            let p = load::<F>(mma, tile, at + comptime!(bp.p_block(r, j) * BLOCK_UNITS), false);
            mma2::<F>(mma, &left, j, BLOCKS, &p, o, comptime!(2 * r), per, held);
        }
        // The values of this chunk are used up: their place takes the outputs.
        #[unroll]
        for m in 0..held {
            let i = comptime!(m * per + 2 * r);
            let f = to_frag::<F>(o.index(i), o.index(comptime!(i + 1)));
            store::<F>(mma, tile, stage + comptime!(r * TILE * bp.value_row() + 2 * m), &f, true);
        }
    }
    sync_plane();

    let n_h = comptime!(bp.spec.micro_steps);
    let token0 = c * CHUNK / n_h;
    let end = select((c + 1) * CHUNK < place.steps, (c + 1) * CHUNK / n_h, place.seq.tokens);
    let units = comptime!(2 * bp.held);
    let rows = comptime!(32 / (2 * bp.held));
    let col = plane * units + lane % units;
    if place.v0 + 8 * col < bp.spec.value_dim {
        let from = base + comptime!(bp.v_at()) + col;
        let to = (out_at.at(place.seq.row, place.seq.start + token0, place.hv) + place.v0) / 8 + col;
        #[unroll]
        for i in 0..comptime!(TILE * bp.read_blocks() / (32 / (2 * bp.held))) {
            let row = i * rows + lane / units;
            if token0 + row < end {
                out[to + row * (out_at.t as usize / 8)] = tile[from + row * comptime!(bp.value_row())];
            }
        }
    }
}
