//! The product that `scan` is made of, and its transpose for the way back.
//!
//! The left matrix lies in a record, blocked by depth: the vector `d * height + row` holds columns
//! `4 * d..4 * d + 4` of that row, so that the units of a plane, which take neighbouring rows, read
//! neighbouring vectors. The right matrix lies in shared memory, row-major. A unit owns four columns of
//! several rows `row0 + r * step` and reads each right vector once for all of them.

use cubecl::prelude::*;

use crate::record::F4;

/// `acc[first + r] += A[row0 + r * step, ..] B[b0.., 4 * col..4 * col + 4]` for `r < rows`. Rows past the
/// last one repeat it; their results are not to be used. `ahead` rounds of four columns are loaded together; it
/// divides every depth, a multiple of 16, by four.
#[cube]
pub(crate) fn mma(
    acc: &mut Array<F4>,
    a: &Array<F4>,
    a_at: usize,
    row0: usize,
    b: &SharedMemory<F4>,
    col: usize,
    #[comptime] first: usize,
    #[comptime] rows: usize,
    #[comptime] step: usize,
    #[comptime] height: usize,
    #[comptime] depth: usize,
    #[comptime] ldb: usize,
    #[comptime] ahead: usize,
) {
    // All left vectors of a round are asked for before the first is used: they come from afar.
    let mut left = Array::<F4>::new(comptime!(ahead * rows));
    for round in 0..depth / (4 * ahead) {
        #[unroll]
        for next in 0..ahead {
            let d = round * ahead + next;
            #[unroll]
            for r in 0..rows {
                let row = clamp_row(row0 + r * step, step * rows, height);
                left[next * rows + r] = a[a_at + d * height + row];
            }
        }
        #[unroll]
        for next in 0..ahead {
            let at = 4 * (round * ahead + next) * ldb + col;
            let x0 = b[at];
            let x1 = b[at + ldb];
            let x2 = b[at + 2 * ldb];
            let x3 = b[at + 3 * ldb];
            #[unroll]
            for r in 0..rows {
                let y = left[next * rows + r];
                let mut s = acc[first + r];
                s = fma(F4::new(y[0]), x0, s);
                s = fma(F4::new(y[1]), x1, s);
                s = fma(F4::new(y[2]), x2, s);
                s = fma(F4::new(y[3]), x3, s);
                acc[first + r] = s;
            }
        }
    }
}

/// Left vectors of [`mma_transposed`] that are asked for before the first is used: they come from afar.
const AHEAD: usize = 2;

/// The same with the left matrix transposed: `acc[e] += A[.., 4 * block + e]^T B[b_row0.., 4 * col..4 * col + 4]`,
/// a sum over the first `depth` rows of both. A vector of the record now holds four rows at one depth, so a unit owns
/// four rows that lie next to each other.
#[cube]
pub(crate) fn mma_transposed(
    acc: &mut Array<F4>,
    a: &Array<F4>,
    a_at: usize,
    block: usize,
    b: &SharedMemory<F4>,
    b_row0: usize,
    col: usize,
    depth: usize,
    #[comptime] height: usize,
    #[comptime] ldb: usize,
) {
    let from = a_at + block * height;
    let whole = depth / AHEAD;
    for round in 0..whole {
        let d = round * AHEAD;
        let mut left = Array::<F4>::new(AHEAD);
        #[unroll]
        for next in 0..AHEAD {
            left[next] = a[from + d + next];
        }
        #[unroll]
        for next in 0..AHEAD {
            rank_one(acc, left[next], b[(b_row0 + d + next) * ldb + col]);
        }
    }
    for d in whole * AHEAD..depth {
        rank_one(acc, a[from + d], b[(b_row0 + d) * ldb + col]);
    }
}

#[cube]
fn rank_one(acc: &mut Array<F4>, left: F4, right: F4) {
    #[unroll]
    for e in 0..4usize {
        acc[e] = fma(F4::new(left[e]), right, acc[e]);
    }
}

/// Keeps a row inside a matrix whose height the units do not divide.
#[cube]
fn clamp_row(row: usize, #[comptime] covered: usize, #[comptime] height: usize) -> usize {
    if comptime!(covered > height) { usize::min(row, height - 1) } else { row }
}
