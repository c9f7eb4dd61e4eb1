//! The levels inside a tile of 16 rows.

use cubecl::prelude::*;

use super::super::blueprint::{BLOCKS, Blueprint};
use super::super::tile::{Acc, Frag, Mma, Right, Tile, V2, multiply, pack, zeros};
use super::{PAIRS, Partial, ROWS, STEPS, Share, Slice, of_step, scaled, seen_keys, whole_at};

/// All levels but the last: leaves the tile's products of keys, and of queries, with keys, and its decay; and of the first
/// tile the keys that the second sees. The share's groups are the tile then.
#[cube]
pub(crate) fn leave_levels<F: Float>(
    mma: &Mma<F>,
    share: &mut Share<F>,
    tile: &mut Tile<F>,
    partial: &mut Partial,
    at: Slice,
    #[comptime] bp: Blueprint,
) {
    let row = at.lane / 4;
    let column = at.lane % 4 * 2;
    let mut keys = zeros(2usize);
    let mut queries = zeros(2usize);

    // Of level 1 and the diagonal only second rows are decayed, and only those see other rows, first ones.
    #[unroll]
    for step in 0..STEPS {
        let (k, q) = (of_step(&share.k, step), of_step(&share.q, step));
        let by = of_step(&share.from, step);
        let right = Right::<F>::of_left(&k);
        mma.execute_inplace(&scaled::<F>(&k, &by, 1usize, true), &right.first, keys.index_mut(0usize));
        mma.execute_inplace(&scaled::<F>(&q, &by, 1usize, false), &right.first, queries.index_mut(0usize));
        mma.execute_inplace(&q, &right.second, queries.index_mut(1usize));
    }
    #[unroll]
    for p in 0..PAIRS {
        let (first, second) = (share.from[p], share.from[comptime!(PAIRS + p)]);
        share.to[p] = second;
        share.from[comptime!(PAIRS + p)] = first * second;
    }

    // Half of a group, in units. Not unrolled: fewer registers, and less to compile.
    let mut h = 1u32;
    while h < 8 {
        let second = row & h != 0;
        let mut scaled_keys = Sequence::<Frag<F>>::new();
        let mut new_queries = zeros(2usize);
        #[unroll]
        for step in 0..STEPS {
            let (from, to) = (of_step(&share.from, step), of_step(&share.to, step));
            let mut by = Array::new(4usize);
            #[unroll]
            for i in 0..4usize {
                by[i] = select_many(Vector::cast_from(second), from[i], to[i]);
            }
            let k = scaled::<F>(&of_step(&share.k, step), &by, 0usize, true);
            let q = scaled::<F>(&of_step(&share.q, step), &by, 0usize, false);
            multiply::<F>(mma, &q, &Right::<F>::of_left(&k), &mut new_queries, 0usize);
            scaled_keys.push(k);
        }
        keep_level(&mut queries, &new_queries, row, column, h);
        // Behind the queries: both sums at a time are more registers than there are.
        let mut new_keys = zeros(2usize);
        #[unroll]
        for step in 0..STEPS {
            let k = scaled_keys.index(step);
            multiply::<F>(mma, k, &Right::<F>::of_left(k), &mut new_keys, 0usize);
        }
        keep_level(&mut keys, &new_keys, row, column, h);
        join::<F>(share, second, at.lane, h);
        h *= 2;
    }
    partial.leave(&keys, at, at.block, at.block);
    partial.leave(&queries, at, comptime!(BLOCKS as u32) + at.block, at.block);

    // From the start to the last row is the whole tile.
    if at.lane / 4 == 7 {
        #[unroll]
        for p in 0..PAIRS {
            partial.whole[whole_at(at, at.block, p, bp)] = share.from[comptime!(PAIRS + p)];
        }
    }
    if at.block == 0 {
        #[unroll]
        for step in 0..STEPS {
            let k = scaled::<F>(&of_step(&share.k, step), &of_step(&share.to, step), 0usize, false);
            tile[seen_keys(at, step, bp)] = pack::<F>(&k);
        }
    }
}

/// Keeps of `level` the pairs of rows that part there or later: those that part earlier are there already, and what
/// remains is of a later level, or above the diagonal.
#[cube]
fn keep_level(sums: &mut Sequence<Acc>, level: &Sequence<Acc>, row: u32, column: u32, h: u32) {
    #[unroll]
    for n in 0..2usize {
        let x = level.index(n);
        let sum = sums.index_mut(n);
        #[unroll]
        for r in 0..ROWS {
            let (new, mut kept) = (x[r], sum[r]);
            #[unroll]
            for e in 0..2usize {
                kept[e] = select(row ^ (column + comptime!(e as u32)) >= h, new[e], kept[e]);
            }
            sum[r] = kept;
        }
    }
}

/// From groups of `h` units to groups of `2 h`.
#[cube]
fn join<F: Float>(share: &mut Share<F>, second: bool, lane: u32, h: u32) {
    // The last unit of the other half.
    let from = (((lane / 4) | (h - 1)) ^ h) * 4 + lane % 4;
    #[unroll]
    for p in 0..PAIRS {
        let last = share.from[comptime!(PAIRS + p)];
        let mut before = Vector::<f32, V2>::cast_from(1.0f32);
        let mut behind = Vector::<f32, V2>::cast_from(1.0f32);
        #[unroll]
        for e in 0..2usize {
            let other = plane_shuffle(last[e], from);
            before[e] = select(second, other, 1.0f32);
            behind[e] = select(second, 1.0f32, other);
        }
        #[unroll]
        for r in 0..ROWS {
            let i = comptime!(PAIRS * r + p);
            share.from[i] = share.from[i] * before;
            share.to[i] = share.to[i] * behind;
        }
    }
}
