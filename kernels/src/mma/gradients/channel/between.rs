//! What flows between strips of 8 rows, on tensor cores: sums walk from strip to strip, and decay on their way.
//!
//! A plane has two tiles of sums. The rows of an accumulator's vector 0 are the first strip of its tile, those of vector 1 the
//! second. Loops over tiles stay loops: the first call compiles what they hold once.

use cubecl::prelude::*;

use super::super::super::blueprint::{BLOCK_UNITS, TILE};
use super::super::super::held::factor_pair;
use super::super::super::memory::Region;
use super::super::super::tile::{Acc, Mma, Right, Tile, V2, V4, in_block, load, multiply, store, to_frag};
use super::super::Own;
use super::super::blueprint::{DIAGONAL, GradientsBlueprint, PAIR, STEP_PAIRS, STRIP, TILES};
use super::super::pairs::product;
use crate::known::known_or;

/// Tiles of a plane.
const HALF: usize = TILES / 2;

/// Leaves Y = dO R^T and X = dV R^T of all pairs of tiles; planes take them in turn. Pairs inside a strip stay in f32.
#[cube]
pub(crate) fn leave_pairs<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    diagonals: &mut Region<Vector<f32, V4>>,
    plane: usize,
    lane: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    let planes = comptime!(bp.units() / 32);
    #[unroll]
    for round in 0..comptime!(STEP_PAIRS.div_ceil(bp.units() / 32)) {
        let pair = plane + comptime!(round * planes);
        if pair < STEP_PAIRS {
            leave_pair::<F>(mma, tile, diagonals, pair, lane, bp);
        }
    }
}

#[cube]
fn leave_pair<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    diagonals: &mut Region<Vector<f32, V4>>,
    pair: usize,
    lane: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    let mut i = 0usize;
    let mut first = 0usize;
    #[unroll]
    for row in 1..TILES {
        let begins = comptime!(row * (row + 1) / 2);
        i = select(pair >= begins, row, i);
        first = select(pair >= begins, begins, first);
    }
    let j = pair - first;
    let rows = comptime!(TILE * bp.value_row());
    let right = comptime!(bp.r_at()) + j * rows;
    let mut y = product::<F>(mma, tile, comptime!(bp.d_o_at()) + i * rows, right, lane, bp);
    let mut x = product::<F>(mma, tile, comptime!(bp.dv_at()) + i * rows, right, lane, bp);
    if i == j {
        #[unroll]
        for strip in 0..2usize {
            let (y, x) = (y.index(strip)[strip], x.index(strip)[strip]);
            let mut both = Vector::<f32, V4>::cast_from(y[0]);
            both[1] = x[0];
            both[2] = y[1];
            both[3] = x[1];
            diagonals[(2 * i + strip) * DIAGONAL + lane] = both;
        }
        keep_between_strips(&mut y);
        keep_between_strips(&mut x);
    }
    let to = comptime!(bp.across_at(0)) + pair * PAIR + in_block(lane % 16, lane / 16);
    store::<F>(mma, tile, to, &to_frag::<F>(y.index(0usize), y.index(1usize)), false);
    store::<F>(mma, tile, to + BLOCK_UNITS, &to_frag::<F>(x.index(0usize), x.index(1usize)), false);
}

/// Of a block on the diagonal, keeps what rows of the second strip have of the first.
#[cube]
fn keep_between_strips(block: &mut Sequence<Acc>) {
    let first = block.index_mut(0usize);
    first[0] = Vector::cast_from(0.0f32);
    let second = block.index_mut(1usize);
    second[0] = Vector::cast_from(0.0f32);
    second[1] = Vector::cast_from(0.0f32);
}

/// The decays over both strips of tile `t`, in the columns of both accumulators of a tile.
#[cube]
fn decays_of(
    floats: &Region<f32>,
    t: u32,
    own: Own,
    #[comptime] bp: GradientsBlueprint,
) -> Array<Vector<f32, V2>> {
    let mut decays = Array::<Vector<f32, V2>>::new(4usize);
    let first = (t * comptime!(2 * bp.channels() as u32)) as usize + own.plane * TILE;
    #[unroll]
    for i in 0..4usize {
        let at = first + comptime!(bp.strip_decays_at() + i / 2 * bp.channels());
        decays[i] = factor_pair(floats, at, comptime!(i % 2), own.lane);
    }
    decays
}

// Vectors of an accumulator, from and to: the rows of a tile's first strip, of its second, and all.
const FIRST: (usize, usize) = (0, 1);
const SECOND: (usize, usize) = (1, 2);
const BOTH: (usize, usize) = (0, 2);

/// Takes two sums of a plane's tile `n` through a strip.
#[cube]
fn carry(
    one: &mut Sequence<Acc>,
    other: &mut Sequence<Acc>,
    decays: &Array<Vector<f32, V2>>,
    #[comptime] strip: usize,
    #[comptime] n: usize,
    #[comptime] vectors: (usize, usize),
) {
    #[unroll]
    for which in 0..2usize {
        #[unroll]
        for side in 0..2usize {
            let i = comptime!(2 * n + side);
            let acc = if comptime!(which == 0) { one.index_mut(i) } else { other.index_mut(i) };
            #[unroll]
            for e in comptime!(vectors.0)..comptime!(vectors.1) {
                acc[e] = acc[e] * decays[comptime!(2 * strip + side)];
            }
        }
    }
}

/// The same through the strip of a tile that sums come to first, which those of its own rows pass only if their tile lies
/// `elsewhere`.
#[cube]
fn carry_in(
    one: &mut Sequence<Acc>,
    other: &mut Sequence<Acc>,
    decays: &Array<Vector<f32, V2>>,
    #[comptime] strip: usize,
    #[comptime] n: usize,
    elsewhere: bool,
) {
    let (others, its) = comptime!(if strip == 0 { (SECOND, FIRST) } else { (FIRST, SECOND) });
    carry(one, other, decays, strip, n, others);
    if elsewhere {
        carry(one, other, decays, strip, n, its);
    }
}

/// The rows of both strips of a tile, each as a right operand of a tile's depth in which the other's rows are zeros.
#[cube]
fn load_strips<F: Float>(mma: &Mma<F>, tile: &Tile<F>, rows: usize) -> Sequence<Right<F>> {
    let f = load::<F>(mma, tile, rows, true);
    let none = Vector::<F, V2>::cast_from(0.0f32);
    let mut strips = Sequence::<Right<F>>::new();
    strips.push(Right::<F>::new(f[0], none, f[2], none));
    strips.push(Right::<F>::new(none, f[1], none, f[3]));
    strips
}

/// Where the rows of pairs (i, ..) begin.
#[cube]
fn row_of_pairs(i: u32, #[comptime] bp: GradientsBlueprint) -> usize {
    comptime!(bp.across_at(0)) + (i * (i + 1) / 2 * comptime!(PAIR as u32)) as usize
}

/// From the start of the block to the strips of a plane's tiles, of which the first is tile `first`; and on the way adds to
/// dQ and -E what they take from the keys.
#[cube]
pub(crate) fn add_from_keys<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    floats: &Region<f32>,
    dq: &mut Sequence<Acc>,
    e: &mut Sequence<Acc>,
    own: Own,
    first: u32,
    #[comptime] bp: GradientsBlueprint,
) {
    let place = in_block(own.lane % 16, own.lane / 16);
    for j in 0..first + comptime!(HALF as u32) {
        let keys = own.key_rows + comptime!(bp.keys_to_end_at());
        let keys = load_strips::<F>(mma, tile, keys + (j * comptime!((TILE * bp.key_row()) as u32)) as usize);
        let decays = decays_of(floats, j, own, bp);
        #[unroll]
        for n in 0..HALF {
            let i = first + comptime!(n as u32);
            if known_or(n + 1 == HALF, j <= i) {
                let at = row_of_pairs(i, bp) + (j * comptime!(PAIR as u32)) as usize + place;
                let y = load::<F>(mma, tile, at, false);
                let x = load::<F>(mma, tile, at + BLOCK_UNITS, false);
                carry_in(dq, e, &decays, 0usize, n, j < i);
                multiply::<F>(mma, &y, keys.index(0usize), dq, comptime!(2 * n));
                multiply::<F>(mma, &x, keys.index(0usize), e, comptime!(2 * n));
                if j < i {
                    carry(dq, e, &decays, 1usize, n, BOTH);
                    multiply::<F>(mma, &y, keys.index(1usize), dq, comptime!(2 * n));
                    multiply::<F>(mma, &x, keys.index(1usize), e, comptime!(2 * n));
                }
            }
        }
    }
}

/// From the end of the block to the ends of the strips: H of a plane's tiles takes what the queries and keys behind have for
/// it, and `through` is only decayed.
#[cube]
pub(crate) fn add_from_behind<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    floats: &Region<f32>,
    h: &mut Sequence<Acc>,
    through: &mut Sequence<Acc>,
    own: Own,
    first: u32,
    #[comptime] bp: GradientsBlueprint,
) {
    let place = in_block(own.lane / 16 * 8 + own.lane % 8, own.lane / 8 % 2);
    for down in 0..comptime!(TILES as u32) - first {
        let i = comptime!(TILES as u32 - 1) - down;
        let rows = own.key_rows + (i * comptime!((TILE * bp.key_row()) as u32)) as usize;
        let queries = load_strips::<F>(mma, tile, rows);
        let keys = load_strips::<F>(mma, tile, rows + comptime!(bp.k_at()));
        let decays = decays_of(floats, i, own, bp);
        let pairs = row_of_pairs(i, bp) + place;
        #[unroll]
        for n in 0..HALF {
            let j = first + comptime!(n as u32);
            if known_or(n == 0, j <= i) {
                let at = pairs + (j * comptime!(PAIR as u32)) as usize;
                let y = load::<F>(mma, tile, at, true);
                let x = load::<F>(mma, tile, at + BLOCK_UNITS, true);
                carry_in(h, through, &decays, 1usize, n, j < i);
                multiply::<F>(mma, &y, queries.index(1usize), h, comptime!(2 * n));
                multiply::<F>(mma, &x, keys.index(1usize), h, comptime!(2 * n));
                if j < i {
                    carry(h, through, &decays, 0usize, n, BOTH);
                    multiply::<F>(mma, &y, queries.index(0usize), h, comptime!(2 * n));
                    multiply::<F>(mma, &x, keys.index(0usize), h, comptime!(2 * n));
                }
            }
        }
    }
}

/// Leaves sums of a plane's channels and rows from `rows` on in f32.
#[cube]
pub(crate) fn leave_sums<F: Float>(
    sums: &Sequence<Acc>,
    tile: &mut Tile<F>,
    #[comptime] at: usize,
    rows: usize,
    own: Own,
    #[comptime] bp: GradientsBlueprint,
) {
    // From the unit's first row on, in pairs of floats.
    let start = (rows + own.lane / 4) * comptime!(2 * bp.key_row());
    let mut to = tile.slice_mut(start, comptime!(bp.units_of_memory())).with_vector_size::<V4>();
    let first = own.plane * comptime!(TILE / 2) + own.lane % 4;
    #[unroll]
    for n in 0..HALF {
        #[unroll]
        for side in 0..2usize {
            let acc = sums.index(comptime!(2 * n + side));
            #[unroll]
            for e in 0..2usize {
                let at = comptime!(2 * at + (n * TILE + STRIP * e) * 4 * bp.key_row() + 4 * side);
                to[first + at] = Vector::<F, V4>::reinterpret(acc[e]);
            }
        }
    }
}
