//! The level between the tiles of a chunk, and the rows of its record.

use cubecl::prelude::*;

use super::super::blueprint::{BLOCKS, Blueprint, CHANNELS_AT, CHUNK};
use super::super::gram::{over_row, square};
use super::super::memory::Region;
use super::super::tile::{Mma, Right, Tile, V2, V8, multiply, pack, zeros};
use super::{PAIRS, Partial, ROWS, STEPS, Share, Slice, of_step, scaled, seen_keys, whole_at};

/// The last level: leaves the second tile's products with the first one's keys; the squares of norms, if asked for; the
/// record's rows, decayed from the start of the chunk, and keys to its end; and the decay of the whole chunk.
#[cube]
pub(crate) fn leave_rows<F: Float>(
    mma: &Mma<F>,
    share: &mut Share<F>,
    tile: &Tile<F>,
    partial: &mut Partial,
    factors: &mut Region<f32>,
    records: &mut Array<Vector<F, V8>>,
    record: usize,
    at: Slice,
    #[comptime] bp: Blueprint,
) {
    if at.block == 1 {
        let mut keys = zeros(2usize);
        let mut queries = zeros(2usize);
        #[unroll]
        for step in 0..STEPS {
            let right = Right::<F>::unpack(tile[seen_keys(at, step, bp)]);
            let by = of_step(&share.from, step);
            let k = scaled::<F>(&of_step(&share.k, step), &by, 0usize, false);
            let q = scaled::<F>(&of_step(&share.q, step), &by, 0usize, false);
            multiply::<F>(mma, &k, &right, &mut keys, 0usize);
            multiply::<F>(mma, &q, &right, &mut queries, 0usize);
        }
        partial.leave(&keys, at, 1u32, 0u32);
        partial.leave(&queries, at, comptime!(BLOCKS as u32 + 1), 0u32);
    }
    if comptime!(bp.spec.qk_l2norm) {
        partial.leave_squares(squares::<F>(&share.k), at, at.block);
        partial.leave_squares(squares::<F>(&share.q), at, comptime!(BLOCKS as u32) + at.block);
    }
    if at.inside {
        #[unroll]
        for p in 0..PAIRS {
            let a = partial.whole[whole_at(at, 0u32, p, bp)];
            let b = partial.whole[whole_at(at, 1u32, p, bp)];
            if at.block == 1 {
                share.from[p] = share.from[p] * a;
                share.from[comptime!(PAIRS + p)] = share.from[comptime!(PAIRS + p)] * a;
            } else {
                share.to[p] = share.to[p] * b;
                share.to[comptime!(PAIRS + p)] = share.to[comptime!(PAIRS + p)] * b;
                if at.lane < 4 {
                    let all = a * b;
                    let channel = (8 * at.col + comptime!((CHANNELS_AT + 2 * p) as u32)) as usize;
                    factors[channel] = all[0];
                    factors[channel + 1] = all[1];
                }
            }
        }
        let rows = comptime!(CHUNK * bp.spec.key_dim / 8);
        #[unroll]
        for r in 0..ROWS {
            let to = record + (at.row(r) * comptime!((bp.spec.key_dim / 8) as u32) + at.col) as usize;
            records[to] = decayed_row::<F>(&share.k, &share.from, r);
            records[to + rows] = decayed_row::<F>(&share.q, &share.from, r);
            records[to + comptime!(2 * rows)] = decayed_row::<F>(&share.k, &share.to, r);
        }
    }
}

/// Row `r` of a unit, decayed, as 16 bytes.
#[cube]
fn decayed_row<F: Float>(
    x: &Array<Vector<F, V2>>,
    by: &Array<Vector<f32, V2>>,
    #[comptime] r: usize,
) -> Vector<F, V8> {
    pack::<F>(&scaled::<F>(&of_row(x, r), &of_row(by, r), 0usize, false))
}

/// The pairs of row `r`.
#[cube]
fn of_row<T: CubePrimitive>(x: &Array<T>, #[comptime] r: usize) -> Array<T> {
    let mut y = Array::<T>::new(PAIRS);
    #[unroll]
    for p in 0..PAIRS {
        y[p] = x[comptime!(PAIRS * r + p)];
    }
    y
}

/// The squares of the norms of a unit's rows, all channels of the slice.
#[cube]
fn squares<F: Float>(x: &Array<Vector<F, V2>>) -> Vector<f32, V2> {
    let mut sums = Vector::<f32, V2>::cast_from(0.0f32);
    #[unroll]
    for r in 0..ROWS {
        let mut sum = 0.0f32;
        #[unroll]
        for p in 0..PAIRS {
            sum += square::<F>(x[comptime!(PAIRS * r + p)]);
        }
        sums[r] = over_row(sum);
    }
    sums
}
