//! Products of rows with the keys of a chunk.

use cubecl::prelude::*;

use super::arguments::Rows;
use super::blueprint::{BLOCKS, Blueprint, TILE};
use super::stage::{Place, Source, keys_of, queries_of};
use super::tile::{
    AHEAD, Acc, Frag, Mma, Right, Tile, V2, V4, V8, by_columns, by_depth, load, mma2, multiply, zeros,
};
use crate::known::known_or;

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
    let ld = comptime!(bp.key_row());
    let left = base + block * comptime!(TILE * bp.key_row()) + by_depth(lane, ld);
    let right = base + by_columns(lane, ld);
    let squared = comptime!(bp.spec.qk_l2norm);
    let mut products = zeros(comptime!(2 * BLOCKS));
    let mut lo = Vector::<f32, V2>::cast_from(0.0f32);
    let mut hi = Vector::<f32, V2>::cast_from(0.0f32);
    let total = comptime!(bp.key_steps());
    let ahead = comptime!((AHEAD / 2).min(bp.key_steps()));
    let mut a = Sequence::<Frag<F>>::new();
    let mut b = Sequence::<Frag<F>>::new();
    #[unroll]
    for step in 0..comptime!(total + ahead) {
        if comptime!(step < total) {
            a.push(load::<F>(mma, tile, left + 2 * step, false));
            #[unroll]
            for j in 0..BLOCKS {
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
            for j in 0..BLOCKS {
                let right = b.index(comptime!(now * BLOCKS + j));
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

/// The products of all row blocks of [K; Q] with the keys they see, by one plane that reads its rows from device memory.
///
/// A product over the key channels does not ask for their order, as long as both sides have the same: a unit takes the 16
/// bytes that it has read of a row for its channels of two steps. So a tile of keys is a left and a right operand in the
/// same registers, and nothing passes through shared memory.
#[cube]
pub(crate) fn products_of_chunk<F: Float>(
    mma: &Mma<F>,
    q: &Rows<F>,
    k: &Rows<F>,
    place: &Place,
    c: usize,
    lane: usize,
    #[comptime] bp: Blueprint,
) -> Sequence<Gram> {
    let blocks = comptime!(BLOCKS + bp.read_blocks());
    let total = comptime!(bp.spec.key_dim.div_ceil(2 * TILE));
    let keys = keys_of::<F>(k, place, c, bp);
    let queries = queries_of::<F>(q, place, c, bp);
    let mut products = zeros(comptime!(2 * BLOCKS * blocks));
    let mut squares = Array::<f32>::new(comptime!(2 * blocks));
    #[unroll]
    for i in 0..comptime!(2 * blocks) {
        squares[i] = 0.0f32;
    }
    let mut rows = Sequence::<Vector<u32, V4>>::new();
    #[unroll]
    for i in 0..comptime!(total + 1) {
        if comptime!(i < total) {
            #[unroll]
            for row in 0..comptime!(2 * BLOCKS) {
                rows.push(read_row::<F>(&k.data, keys, comptime!(8 * row), i, lane, bp));
            }
            #[unroll]
            for row in 0..comptime!(2 * bp.read_blocks()) {
                rows.push(read_row::<F>(&q.data, queries, comptime!(8 * row), i, lane, bp));
            }
        }
        if comptime!(i > 0) {
            let mut left = Sequence::<Frag<F>>::new();
            #[unroll]
            for b in 0..blocks {
                let at = comptime!(2 * ((i - 1) * blocks + b));
                #[unroll]
                for step in 0..2usize {
                    let mut f = Frag::<F>::new(4usize);
                    #[unroll]
                    for e in 0..4usize {
                        let row = rows.index(comptime!(at + e % 2));
                        f[e] = Vector::reinterpret(row[comptime!(2 * step + e / 2)]);
                        if comptime!(bp.spec.qk_l2norm) {
                            squares[comptime!(2 * b + e % 2)] += square::<F>(f[e]);
                        }
                    }
                    left.push(f);
                }
            }
            #[unroll]
            for j in 0..BLOCKS {
                #[unroll]
                for step in 0..2usize {
                    let right = Right::<F>::of_left(left.index(comptime!(2 * j + step)));
                    #[unroll]
                    for b in 0..blocks {
                        if comptime!(j < bp.seen_blocks(b)) {
                            let (a, to) = comptime!((2 * b + step, 2 * (b * BLOCKS + j)));
                            multiply::<F>(mma, left.index(a), &right, &mut products, to);
                        }
                    }
                }
            }
        }
    }
    let mut grams = Sequence::<Gram>::new();
    #[unroll]
    for b in 0..blocks {
        let mut own = Sequence::<Acc>::new();
        #[unroll]
        for n in 0..comptime!(2 * BLOCKS) {
            let from = products.index(comptime!(2 * BLOCKS * b + n));
            let mut acc = Acc::new(2usize);
            acc[0] = from[0];
            acc[1] = from[1];
            own.push(acc);
        }
        let mut both = Vector::<f32, V2>::cast_from(1.0f32);
        if comptime!(bp.spec.qk_l2norm) {
            both[0] = over_row(squares[comptime!(2 * b)]);
            both[1] = over_row(squares[comptime!(2 * b + 1)]);
        }
        grams.push(Gram { products: own, squares: both });
    }
    grams
}

/// The square of the norm of two channels.
#[cube]
pub(crate) fn square<F: Float>(pair: Vector<F, V2>) -> f32 {
    let x = Vector::<f32, V2>::cast_from(pair);
    fma(x[0], x[0], x[1] * x[1])
}

/// This unit's eight channels of row `first + lane / 4` of a chunk, of the 32 from `32 i` on; zeros behind the last one.
#[cube]
fn read_row<F: Float>(
    src: &Array<Vector<F, V8>>,
    source: Source,
    #[comptime] first: usize,
    #[comptime] i: usize,
    lane: usize,
    #[comptime] bp: Blueprint,
) -> Vector<u32, V4> {
    let lane = lane as u32;
    let row = u32::min(lane / 4 + comptime!(first as u32), source.last);
    let col = lane % 4 + comptime!(4 * i as u32);
    let units = comptime!((bp.spec.key_dim / 8) as u32);
    let mut x = Vector::<u32, V4>::cast_from(0u32);
    if known_or(4 * i + 4 <= bp.spec.key_dim / 8, col < units) {
        x = Vector::reinterpret(src[(source.from + row * source.stride + col) as usize]);
    }
    x
}

/// The sum over the four units that share a row.
#[cube]
pub(crate) fn over_row(x: f32) -> f32 {
    let y = x + plane_shuffle_xor(x, 1u32);
    y + plane_shuffle_xor(y, 2u32)
}
