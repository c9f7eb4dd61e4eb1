//! Gram matrices with a gate per key channel, for any gates.
//!
//! $\Gamma_{ij} = \prod_{l=j+1}^{i} D_l$ lies inside the sum over channels and must be split into a factor of row i and
//! one of row j. The split is where the two rows part: with h the highest bit in which i and j differ, row i lies in the
//! second half of a group of 2h rows, and row j in the first. Row i takes the product from the middle of the group to
//! itself, row j the product behind it up to the middle: both in `[0, 1]`, products without differences, so that no
//! gate is too strong. Every pair of rows belongs to one level h = 1, 2, 4, 8, 16; a level is one product of scaled
//! rows, of which the pairs of that level are kept. The diagonal has no decay.

use cubecl::prelude::*;

use super::blueprint::{BLOCKS, Blueprint, CHANNELS_AT, CHUNK, GROUP_UNITS, TILE};
use super::gram::{Gram, products};
use super::stage::Place;
use super::tile::{Acc, Mma, Tile, V2, zeros};
use crate::known::known_and;
use crate::math::{decay_of, gate_constants};
use crate::record::Strides;

/// The decays of two channels and 16 rows: `from` the start of a group to the row, `to` its end behind the row.
#[derive(CubeType)]
struct Column {
    from: Array<Vector<f32, V2>>,
    to: Array<Vector<f32, V2>>,
}

/// The half of the chunk and the pair of channels that a unit takes. 32 bits, known to be few: then constants become
/// part of addresses.
#[cube]
fn place_of(unit: usize, #[comptime] bp: Blueprint) -> (u32, u32) {
    let pairs = comptime!((bp.spec.key_dim / 2) as u32);
    let unit = unit as u32;
    (unit / pairs, unit % pairs)
}

/// The gates of two channels and 16 rows, as the caller holds them; rows past the end of the sequence repeat the
/// last one.
#[cube]
pub(crate) fn read_channel_gates<G: Float>(
    g: &Array<G>,
    g_at: &Strides,
    place: &Place,
    c: usize,
    unit: usize,
    #[comptime] bp: Blueprint,
) -> Array<Vector<f32, V2>> {
    let mut raw = Array::<Vector<f32, V2>>::new(TILE);
    if known_and(bp.by_channel(), unit < comptime!(bp.spec.key_dim)) {
        let (half, pair) = place_of(unit, bp);
        let from = g_at.at(place.seq.row, place.seq.start + c * CHUNK, place.hv) + 2 * pair as usize;
        let first = half * comptime!(TILE as u32);
        let last = (place.seq.tokens - 1 - c * CHUNK) as u32;
        #[unroll]
        for r in 0..TILE {
            let row = u32::min(first + comptime!(r as u32), last);
            let at = from + (row * g_at.t) as usize;
            let mut x = Vector::<f32, V2>::cast_from(f32::cast_from(g[at]));
            x[1] = f32::cast_from(g[at + 1]);
            raw[r] = x;
        }
    }
    raw
}

/// The gated Gram matrices of the chunk whose keys and queries lie at the start of shared memory, in the layout of
/// [`multiply_keys`](super::gram::multiply_keys); then replaces keys and queries by those decayed from the start of the chunk, and adds
/// keys decayed to its end, and the decay of the whole chunk. Begins behind a barrier and ends without one.
#[cube]
pub(crate) fn gram_by_channel<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    factors: &mut SharedMemory<f32>,
    raw: &Array<Vector<f32, V2>>,
    a_log: &Array<f32>,
    dt_bias: &Array<f32>,
    lower_bound: f32,
    place: &Place,
    c: usize,
    unit: usize,
    #[comptime] bp: Blueprint,
) -> Gram {
    let pairs = comptime!((bp.spec.key_dim / 2) as u32);
    let row_pairs = comptime!(4 * bp.key_row());
    let (half, pair) = place_of(unit, bp);
    // Where the unit's first row begins.
    let own_rows = (half * comptime!((TILE * 4 * bp.key_row()) as u32) + pair) as usize;
    let works = unit < comptime!(bp.spec.key_dim);
    let lane = unit % 32;
    let block = unit / 32;
    let row_block = block % BLOCKS;
    let multiplies = unit < GROUP_UNITS;

    // The decay of each half of the chunk.
    let mut whole = SharedMemory::<Vector<f32, V2>>::new(comptime!(BLOCKS * bp.spec.key_dim / 2));
    let mut column = Column { from: Array::new(TILE), to: Array::new(TILE) };
    if works {
        let (a, bias_lo) = gate_constants(a_log, dt_bias, place.hv, 2 * pair as usize, bp.spec);
        let (_, bias_hi) = gate_constants(a_log, dt_bias, place.hv, 2 * pair as usize + 1, bp.spec);
        let first = half * comptime!(TILE as u32);
        let tokens = (place.seq.tokens - c * CHUNK) as u32;
        #[unroll]
        for r in 0..TILE {
            let valid = first + comptime!(r as u32) < tokens;
            let x = raw[r];
            let mut d = Vector::<f32, V2>::cast_from(1.0f32);
            d[0] = select(valid, decay_of(x[0], a, bias_lo, lower_bound, bp.spec.gate), 1.0f32);
            d[1] = select(valid, decay_of(x[1], a, bias_hi, lower_bound, bp.spec.gate), 1.0f32);
            column.from[r] = d;
            column.to[r] = Vector::cast_from(1.0f32);
        }
    }

    let mut sums = zeros(comptime!(2 * BLOCKS));
    let mut squares = Vector::<f32, V2>::cast_from(1.0f32);
    if multiplies {
        let keys = row_block * comptime!(TILE * bp.key_row());
        let own = block * comptime!(TILE * bp.key_row());
        let plain = products::<F>(mma, tile, own, keys, lane, 1usize, bp.spec.qk_l2norm, bp);
        squares = plain.squares;
        keep_level(&mut sums, &plain, row_block, lane, 0usize);
    }
    #[unroll]
    for level in 0..comptime!(TILE.ilog2() as usize + 1) {
        let h = comptime!(1usize << level);
        let at = comptime!(bp.scaled_at(level));
        if works {
            let mut rows = tile.slice_mut(0usize, comptime!(bp.prepare_memory())).with_vector_size::<V2>();
            #[unroll]
            for r in 0..TILE {
                let mut by = column.to[r];
                if comptime!(h == TILE) {
                    by = select_many(Vector::cast_from(half == 1), column.from[r], column.to[r]);
                } else if comptime!(r & h > 0) {
                    by = column.from[r];
                }
                let own = own_rows + comptime!(r * row_pairs);
                let k = Vector::<f32, V2>::cast_from(rows[own]);
                rows[own + comptime!(4 * at)] = Vector::cast_from(k * by);
                if comptime!(h == TILE || r & h > 0) {
                    let q = Vector::<f32, V2>::cast_from(rows[own + comptime!(4 * bp.q_at())]);
                    rows[own + comptime!(4 * (at + CHUNK * bp.key_row()))] = Vector::cast_from(q * by);
                }
            }
            if comptime!(h < TILE) {
                join(&mut column, h);
            } else {
                whole[(half * pairs + pair) as usize] = column.from[comptime!(TILE - 1)];
            }
        }
        sync_cube();
        if multiplies {
            // Queries that this level does not use are left over from another one; they are not kept.
            let own = at + block * comptime!(TILE * bp.key_row());
            if comptime!(h < TILE) {
                let keys = at + row_block * comptime!(TILE * bp.key_row());
                let scaled = products::<F>(mma, tile, own, keys, lane, 1usize, false, bp);
                keep_level(&mut sums, &scaled, row_block, lane, h);
            } else if row_block == 1 {
                let scaled = products::<F>(mma, tile, own, at, lane, 1usize, false, bp);
                #[unroll]
                for n in 0..2usize {
                    let x = scaled.products.index(n);
                    let sum = sums.index_mut(n);
                    sum[0] = x[0];
                    sum[1] = x[1];
                }
            }
        }
    }

    if works {
        let one = Vector::<f32, V2>::cast_from(1.0f32);
        let before = select_many(Vector::cast_from(half == 1), whole[pair as usize], one);
        let behind = select_many(Vector::cast_from(half == 0), whole[(pairs + pair) as usize], one);
        let mut rows = tile.slice_mut(0usize, comptime!(bp.blocks_at())).with_vector_size::<V2>();
        #[unroll]
        for r in 0..TILE {
            let to = own_rows + comptime!(r * row_pairs);
            let k = Vector::<f32, V2>::cast_from(rows[to]);
            let q = Vector::<f32, V2>::cast_from(rows[comptime!(4 * bp.q_at()) + to]);
            let from = column.from[r] * before;
            rows[to] = Vector::cast_from(k * from);
            rows[comptime!(4 * bp.q_at()) + to] = Vector::cast_from(q * from);
            rows[comptime!(4 * bp.kd_at()) + to] = Vector::cast_from(k * column.to[r] * behind);
        }
        if half == 0 {
            let all = whole[pair as usize] * whole[(pairs + pair) as usize];
            factors[CHANNELS_AT + 2 * pair as usize] = all[0];
            factors[CHANNELS_AT + 2 * pair as usize + 1] = all[1];
        }
    }
    Gram { products: sums, squares }
}

/// From groups of `h` rows to groups of `2 h`.
#[cube]
fn join(column: &mut Column, #[comptime] h: usize) {
    #[unroll]
    for group in 0..comptime!(TILE / (2 * h)) {
        let start = comptime!(2 * h * group);
        let first = column.from[comptime!(start + h - 1)];
        let second = column.from[comptime!(start + 2 * h - 1)];
        #[unroll]
        for r in 0..h {
            column.to[comptime!(start + r)] = column.to[comptime!(start + r)] * second;
            column.from[comptime!(start + h + r)] = column.from[comptime!(start + h + r)] * first;
        }
    }
}

/// Adds the pairs of level `h` (0: the diagonal) to the block on the diagonal of row block `row_block`.
#[cube]
fn keep_level(sums: &mut Sequence<Acc>, level: &Gram, row_block: usize, lane: usize, #[comptime] h: usize) {
    #[unroll]
    for n in 0..2usize {
        let x = level.products.index(n);
        #[unroll]
        for e in 0..2usize {
            let row = (lane / 4) as u32 + comptime!(8 * e as u32);
            let column = (lane % 4 * 2) as u32 + comptime!(8 * n as u32);
            let y = x[e];
            let lo = select(in_level(row, column, h), y[0], 0.0f32);
            let hi = select(in_level(row, column + 1, h), y[1], 0.0f32);
            let mut kept = Vector::<f32, V2>::cast_from(lo);
            kept[1] = hi;
            if row_block == 0 {
                let sum = sums.index_mut(n);
                sum[e] = sum[e] + kept;
            } else {
                let sum = sums.index_mut(comptime!(n + 2));
                sum[e] = sum[e] + kept;
            }
        }
    }
}

/// Whether h is the highest bit in which `row` and `column` differ, and the row's.
#[cube]
fn in_level(row: u32, column: u32, #[comptime] h: usize) -> bool {
    let differ = row ^ column;
    if comptime!(h == 0) {
        differ == 0
    } else {
        differ >= comptime!(h as u32) && differ < comptime!(2 * h as u32) && row > column
    }
}
