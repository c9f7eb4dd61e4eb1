//! The products that `scan` and `sweep` are made of.
//!
//! The left matrix lies in a record, blocked by depth: the vector `d * height + row` holds columns
//! `4 * d..4 * d + 4` of that row, so that the units of a plane, which take neighbouring rows, read
//! neighbouring vectors. The right matrix lies in shared memory, row-major. A unit owns four columns of
//! several rows and reads each right vector once for all of them.
//!
//! Where a product has fewer tiles than there are units, [`PARTS`] units share a tile, each with its part of the
//! depth, and [`gather`] adds up.

use std::ops::Range;

use cubecl::prelude::*;

use super::blueprint::{Blueprint, PARTS};
use crate::record::F4;

/// Left vectors of the transposed product that are asked for before the first is used: they come from afar.
const AHEAD: usize = 8;

/// Which tile of a matrix a unit works on.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Place {
    /// The tile, by rows and by four-vectors.
    pub(crate) ty: usize,
    pub(crate) tx: usize,
    /// Which part of the depth.
    pub(crate) part: usize,
}

/// The place of unit `u` among `PARTS` for each of `rows * cols` tiles.
#[cube]
pub(crate) fn place(u: usize, #[comptime] rows: usize, #[comptime] cols: usize) -> Place {
    let tile = u % comptime!(rows * cols);
    Place { ty: tile / cols, tx: tile % cols, part: u / comptime!(rows * cols) }
}

/// How many of `fours` rounds ask together for their left vectors: at least one, and no more than make `ahead`.
fn together(rows: usize, fours: usize, ahead: usize) -> usize {
    (1..=(ahead / rows).max(1)).rev().find(|&n| fours.is_multiple_of(n)).unwrap_or(1)
}

/// `acc[first + r] += A[row0 + r * step, 4 * from..] B[4 * from.., 4 * col..4 * col + 4]` for `r < rows`, over
/// `4 * fours` columns of A. Rows past the last one repeat it; their results are not to be used.
#[cube]
pub(crate) fn mma(
    acc: &mut Array<F4>,
    a: &Array<F4>,
    a_at: usize,
    row0: usize,
    b: &SharedMemory<F4>,
    col: usize,
    from: usize,
    #[comptime] first: usize,
    #[comptime] rows: usize,
    #[comptime] step: usize,
    #[comptime] height: usize,
    #[comptime] fours: usize,
    #[comptime] ldb: usize,
    #[comptime] ahead: usize,
) {
    let together = comptime!(together(rows, fours, ahead));
    let mut left = Array::<F4>::new(comptime!(together * rows));
    for round in 0..rolled(comptime!(fours / together)) {
        #[unroll]
        for next in 0..together {
            let d = from + round * together + next;
            #[unroll]
            for r in 0..rows {
                let row = clamp_row(row0 + r * step, step * rows, height);
                left[next * rows + r] = a[a_at + d * height + row];
            }
        }
        #[unroll]
        for next in 0..together {
            let at = 4 * (from + round * together + next) * ldb + col;
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

/// The same with the left matrix transposed: `acc[e] += A[.., 4 * block + e]^T B[b_row0.., 4 * col..4 * col + 4]`,
/// a sum over the rows `from..to` of A. A vector of the record now holds four rows at one depth, so a unit owns
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
    from: usize,
    to: usize,
    #[comptime] height: usize,
    #[comptime] ldb: usize,
) {
    let a_row = a_at + block * height;
    let mut d = from;
    while d + AHEAD <= to {
        let mut left = Array::<F4>::new(AHEAD);
        #[unroll]
        for next in 0..AHEAD {
            left[next] = a[a_row + d + next];
        }
        #[unroll]
        for next in 0..AHEAD {
            rank_one(acc, left[next], b[(b_row0 + d + next) * ldb + col]);
        }
        d += AHEAD;
    }
    while d < to {
        rank_one(acc, a[a_row + d], b[(b_row0 + d) * ldb + col]);
        d += 1;
    }
}

#[cube]
fn rank_one(acc: &mut Array<F4>, left: F4, right: F4) {
    #[unroll]
    for e in 0..4usize {
        acc[e] = fma(F4::new(left[e]), right, acc[e]);
    }
}

/// Adds up the parts of every tile: the unit of part p gets row `first + p`, if that is one of `rows`. Others' parts of
/// a row pass through `exchange`, `PARTS - 1` vectors for each, which must not be in use before or, until the next
/// barrier, afterwards. In the middle is a barrier. The order of the sum is always the same.
#[cube]
pub(crate) fn gather(
    acc: &Array<F4>,
    exchange: &mut SharedMemory<F4>,
    place: Place,
    #[comptime] first: usize,
    #[comptime] rows: usize,
    #[comptime] bp: Blueprint,
) -> F4 {
    let tiles = comptime!(bp.tile_rows() * bp.tile_cols());
    let tile = UNIT_POS as usize % tiles;
    let mut sum = acc[first];
    #[unroll]
    for r in 0..rows {
        // The senders to one row, numbered from the one behind its owner.
        let turn = (place.part + comptime!(PARTS - 1 - r)) % PARTS;
        if turn < PARTS - 1 {
            exchange[(r * comptime!(PARTS - 1) + turn) * tiles + tile] = acc[first + r];
        }
        if comptime!(r > 0) {
            sum = select(place.part == r, acc[first + r], sum);
        }
    }
    sync_cube();
    if place.part < rows {
        #[unroll]
        for turn in 0..PARTS - 1 {
            sum += exchange[(place.part * comptime!(PARTS - 1) + turn) * tiles + tile];
        }
    }
    sum
}

/// Four-vectors in what a cache fetches at a time, 32 bytes.
const SECTOR: usize = 2;

/// Asks for some vectors of a record, so that they are near when they are wanted. What comes back must be given to
/// [`arrived`].
#[cube]
pub(crate) fn touch(
    scalars: &Array<f32>,
    record: usize,
    #[comptime] vectors: Range<usize>,
    #[comptime] bp: Blueprint,
) -> f32 {
    let at = record + comptime!(vectors.start);
    let sectors = comptime!(vectors.len() / SECTOR);
    let units = comptime!(bp.scan_units());
    let mut any = 0.0f32;
    #[unroll]
    for n in 0..comptime!(sectors.div_ceil(units)) {
        let sector = UNIT_POS as usize + n * units;
        if comptime!((n + 1) * units <= sectors) || sector < sectors {
            any += scalars[4 * (at + sector * SECTOR)];
        }
    }
    any
}

/// Waits for what was touched. Without a use the loads would not be made at all; the one that there is writes where
/// nobody reads, for one value out of all.
#[cube]
pub(crate) fn arrived(any: f32, nowhere: &mut SharedMemory<F4>, at: usize) {
    if any == -1.25e37f32 {
        nowhere[at] = F4::new(any);
    }
}

/// Rows of zeros.
#[cube]
pub(crate) fn zeros(#[comptime] rows: usize) -> Array<F4> {
    let mut tile = Array::<F4>::new(rows);
    #[unroll]
    for r in 0..rows {
        tile[r] = F4::new(0.0f32);
    }
    tile
}

/// Keeps a row inside a matrix whose height the units do not divide.
#[cube]
fn clamp_row(row: usize, #[comptime] covered: usize, #[comptime] height: usize) -> usize {
    if comptime!(covered > height) { usize::min(row, height - 1) } else { row }
}

/// `n`, which the compiler does not know: a loop of that length is not unrolled, and loads of later rounds do not take
/// registers in this one.
#[cube]
fn rolled(#[comptime] n: usize) -> usize {
    if comptime!(n > 1) { usize::min(CUBE_COUNT, 1usize) * n } else { n.runtime() }
}
