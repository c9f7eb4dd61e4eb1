//! Products of 16 rows with the keys of a chunk.

use cubecl::prelude::*;

use super::blueprint::{BLOCKS, Blueprint, TILE};
use super::tile::{AHEAD, Acc, Frag, Mma, Tile, V2, by_columns, by_depth, load, mma2, zeros};

/// 16 rows of [K; Q] times all keys of the chunk, and the squares of the rows' norms (rows `lane / 4` and 8
/// more).
#[derive(CubeType)]
pub(crate) struct Gram {
    pub(crate) products: Sequence<Acc>,
    pub(crate) squares: Vector<f32, V2>,
}

/// The products of row block `block` of [K; Q] in the stage at `base` with all keys. Planes beyond the last block repeat
/// it: what lies behind it may be the end of shared memory.
#[cube]
pub(crate) fn multiply_keys<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    base: usize,
    block: usize,
    lane: usize,
    #[comptime] bp: Blueprint,
) -> Gram {
    let last = comptime!(BLOCKS + bp.read_blocks() - 1);
    let block = select(block < last, block, last);
    let left = base + block * comptime!(TILE * bp.key_row());
    products::<F>(mma, tile, left, base, lane, BLOCKS, bp.spec.qk_l2norm, bp)
}

/// 16 rows from `left` times `blocks` tiles of rows from `right`, and the squares of the rows' norms if asked for.
#[cube]
pub(crate) fn products<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    left: usize,
    right: usize,
    lane: usize,
    #[comptime] blocks: usize,
    #[comptime] squared: bool,
    #[comptime] bp: Blueprint,
) -> Gram {
    let ld = comptime!(bp.key_row());
    let left = left + by_depth(lane, ld);
    let right = right + by_columns(lane, ld);
    let mut products = zeros(comptime!(2 * blocks));
    let mut lo = Vector::<f32, V2>::cast_from(0.0f32);
    let mut hi = Vector::<f32, V2>::cast_from(0.0f32);
    let total = comptime!(bp.key_steps());
    // Beside gates per channel there are few registers left.
    let ahead = comptime!(if bp.by_channel() { 1 } else { (AHEAD / 2).min(bp.key_steps()) });
    let mut a = Sequence::<Frag<F>>::new();
    let mut b = Sequence::<Frag<F>>::new();
    #[unroll]
    for step in 0..comptime!(total + ahead) {
        if comptime!(step < total) {
            a.push(load::<F>(mma, tile, left + 2 * step, false));
            #[unroll]
            for j in 0..blocks {
                b.push(load::<F>(mma, tile, right + j * comptime!(TILE * bp.key_row()) + 2 * step, false));
            }
        }
        if comptime!(step >= ahead) {
            let now = comptime!(step - ahead);
            if comptime!(squared) {
                let f = a.index(now);
                #[unroll]
                for half in 0..2usize {
                    let x = Vector::<f32, V2>::cast_from(f[comptime!(2 * half)]);
                    let y = Vector::<f32, V2>::cast_from(f[comptime!(2 * half + 1)]);
                    lo += x * x;
                    hi += y * y;
                }
            }
            #[unroll]
            for j in 0..blocks {
                let right = b.index(comptime!(now * blocks + j));
                mma2::<F>(mma, &a, now, 0usize, right, &mut products, comptime!(2 * j), 0usize, 1usize);
            }
        }
    }
    let mut squares = Vector::<f32, V2>::cast_from(1.0f32);
    if comptime!(squared) {
        squares[0] = over_row(lo[0] + lo[1]);
        squares[1] = over_row(hi[0] + hi[1]);
    }
    Gram { products, squares }
}

/// The sum over the four units that share a row.
#[cube]
pub(crate) fn over_row(x: f32) -> f32 {
    let y = x + plane_shuffle_xor(x, 1u32);
    y + plane_shuffle_xor(y, 2u32)
}
