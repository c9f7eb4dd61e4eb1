//! What the planes of a preparing cube exchange where each has some channels of the chunk: sums over its channels.

use cubecl::prelude::*;

use super::super::blueprint::{BLOCKS, Blueprint, SLICE, TILE};
use super::super::gram::Gram;
use super::super::memory::{Region, Regions, region};
use super::super::tile::{Acc, Tile, V2, V4, zeros};
use super::Slice;

/// Units of 16 bytes in 16 x 16 sums.
const SUMS: usize = TILE * TILE / 4;
/// Row blocks of [K; Q].
const ROW_BLOCKS: usize = 2 * BLOCKS;
/// Pairs of row blocks and the key tiles that they see.
const SEEN: usize = 3 * BLOCKS;

/// Shared memory for them.
#[derive(CubeType)]
pub(crate) struct Partial {
    /// Slice by slice, row block by row block of [K; Q], tile by tile of keys: products.
    sums: Region<Vector<f32, V4>>,
    /// Slice by slice, row block by row block: squares of norms, if asked for.
    squares: Region<f32>,
    /// The decay of each tile of rows, in pairs of channels.
    pub(crate) whole: Region<Vector<f32, V2>>,
}

/// Bytes of each.
pub(crate) fn partial_bytes(bp: &Blueprint) -> [usize; 3] {
    let slices = bp.slices();
    let squares = if bp.spec.qk_l2norm { slices * ROW_BLOCKS * TILE } else { 0 };
    [16 * slices * SEEN * SUMS, 4 * squares, 4 * BLOCKS * slices * SLICE]
}

#[cube]
impl Partial {
    pub(crate) fn new<F: Float>(tile: &Tile<F>, #[comptime] regions: Regions<6>) -> Self {
        Partial {
            sums: region::<F, Vector<f32, V4>>(tile, comptime!(regions.at[3])),
            squares: region::<F, f32>(tile, comptime!(regions.at[4])),
            whole: region::<F, Vector<f32, V2>>(tile, comptime!(regions.at[5])),
        }
    }

    /// Leaves the products of row block `rows` of [K; Q] with key tile `keys`, rows and columns in the order of the share:
    /// a unit has four neighbouring columns. Halves of every second row change place, so that rows that are read together
    /// fall into different banks.
    pub(crate) fn leave(&mut self, products: &Sequence<Acc>, at: Slice, rows: u32, keys: u32) {
        let to = place_of(at.slice, rows, keys) + at.lane / 4 * 4;
        let column = at.lane % 4;
        #[unroll]
        for r in 0..2usize {
            let (even, odd) = (products.index(0usize)[r], products.index(1usize)[r]);
            let mut x = Vector::<f32, V4>::cast_from(even[0]);
            x[1] = odd[0];
            x[2] = even[1];
            x[3] = odd[1];
            let half = comptime!((r * SUMS / 2) as u32);
            self.sums[(to + half + (column ^ comptime!(2 * r as u32))) as usize] = x;
        }
    }

    /// Leaves the squares of the norms of a unit's rows, of row block `rows`.
    pub(crate) fn leave_squares(&mut self, squares: Vector<f32, V2>, at: Slice, rows: u32) {
        let to = square_at(at.slice, rows, at.lane / 4 * 2);
        if at.lane % 4 == 0 {
            self.squares[to] = squares[0];
            self.squares[to + 1] = squares[1];
        }
    }

    /// The sums over all channels for row block `rows`, in the order of `multiply_keys`.
    pub(crate) fn gather(&self, rows: u32, lane: u32, #[comptime] bp: Blueprint) -> Gram {
        let slices = comptime!(bp.slices());
        let sums = self.sums.reinterpret::<Vector<f32, V2>>();
        let row = lane / 4;
        // Odd rows are behind even ones, with halves that have changed place.
        let odd = row % 2;
        let first = odd * comptime!(SUMS as u32) + row / 2 * comptime!((TILE / 2) as u32) + lane % 4;
        let mut products = zeros(comptime!(2 * BLOCKS));
        #[unroll]
        for keys in 0..BLOCKS {
            if comptime!(keys as u32) <= rows % comptime!(BLOCKS as u32) {
                #[unroll]
                for slice in 0..slices {
                    let from = 2 * place_of(comptime!(slice as u32), rows, comptime!(keys as u32)) + first;
                    #[unroll]
                    for n in 0..2usize {
                        let at = (from + (comptime!(n as u32) ^ odd) * comptime!((TILE / 4) as u32)) as usize;
                        let sum = products.index_mut(comptime!(2 * keys + n));
                        sum[0] = sum[0] + sums[at];
                        sum[1] = sum[1] + sums[at + comptime!(SUMS / 2)];
                    }
                }
            }
        }
        let mut squares = Vector::<f32, V2>::cast_from(1.0f32);
        if comptime!(bp.spec.qk_l2norm) {
            squares = Vector::cast_from(0.0f32);
            #[unroll]
            for slice in 0..slices {
                let from = square_at(comptime!(slice as u32), rows, row);
                squares[0] = squares[0] + self.squares[from];
                squares[1] = squares[1] + self.squares[from + comptime!(TILE / 2)];
            }
        }
        Gram { products, squares }
    }
}

/// Place of the sums of row block `rows` and key tile `keys`.
#[cube]
fn place_of(slice: u32, rows: u32, keys: u32) -> u32 {
    let blocks = comptime!(BLOCKS as u32);
    (slice * comptime!(SEEN as u32) + rows / blocks * 3 + rows % blocks + keys) * comptime!(SUMS as u32)
}

/// Place of the square of the norm of row `row` of row block `rows`.
#[cube]
fn square_at(slice: u32, rows: u32, row: u32) -> usize {
    ((slice * comptime!(ROW_BLOCKS as u32) + rows) * comptime!(TILE as u32) + row) as usize
}
