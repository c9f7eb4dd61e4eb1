//! What flows between tiles, on tensor cores: sums walk from tile to tile, and decay on their way.

use cubecl::prelude::*;

use super::super::super::blueprint::{BLOCK_UNITS, TILE};
use super::super::super::tile::{Acc, Mma, Tile, V2, V4, in_block, load, scale_columns, store, to_frag};
use super::super::Own;
use super::super::blueprint::{DIAGONAL, GradientsBlueprint, TILES};
use super::super::pairs::{add_block, product};

/// Tiles of a plane.
const HALF: usize = TILES / 2;

/// Where the blocks of tiles `i > j` lie among the pairs.
fn pair(i: usize, j: usize) -> usize {
    i * (i - 1) / 2 + j
}

/// Leaves Y = dO R^T and X = dV R^T of all pairs of tiles; planes take them in turn. Those on the diagonal stay in f32.
#[cube]
pub(crate) fn leave_pairs<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    diagonals: &mut SharedMemory<Vector<f32, V4>>,
    plane: usize,
    lane: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    let planes = comptime!(bp.units() / 32);
    let pairs = comptime!(TILES * (TILES + 1) / 2);
    #[unroll]
    for round in 0..comptime!((TILES * (TILES + 1) / 2).div_ceil(bp.units() / 32)) {
        let pair = plane + comptime!(round * planes);
        if pair < pairs {
            leave_pair::<F>(mma, tile, diagonals, pair, lane, bp);
        }
    }
}

#[cube]
fn leave_pair<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    diagonals: &mut SharedMemory<Vector<f32, V4>>,
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
    let y = product::<F>(mma, tile, comptime!(bp.d_o_at()) + i * rows, right, lane, bp);
    let x = product::<F>(mma, tile, comptime!(bp.dv_at()) + i * rows, right, lane, bp);
    if i == j {
        #[unroll]
        for n in 0..2usize {
            let (y, x) = (y.index(n), x.index(n));
            #[unroll]
            for e in 0..2usize {
                let (y, x) = (y[e], x[e]);
                let mut both = Vector::<f32, V4>::cast_from(y[0]);
                both[1] = x[0];
                both[2] = y[1];
                both[3] = x[1];
                let row = lane / 4 + comptime!(8 * e);
                diagonals[i * DIAGONAL + row * comptime!(TILE / 2) + comptime!(4 * n) + lane % 4] = both;
            }
        }
    } else {
        // i (i - 1) / 2 pairs of other tiles come before those of row i.
        let to = comptime!(bp.across_at(0)) + (pair - i) * comptime!(2 * BLOCK_UNITS);
        let to = to + in_block(lane % 16, lane / 16);
        store::<F>(mma, tile, to, &to_frag::<F>(y.index(0usize), y.index(1usize)), false);
        store::<F>(mma, tile, to + BLOCK_UNITS, &to_frag::<F>(x.index(0usize), x.index(1usize)), false);
    }
}

/// Takes sum `n` through the decay of tile `t`.
#[cube]
fn carry(
    sums: &mut Sequence<Acc>,
    floats: &SharedMemory<f32>,
    own: Own,
    #[comptime] t: usize,
    #[comptime] n: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    #[unroll]
    for side in 0..2usize {
        let first = comptime!(bp.tile_decays_at() + t * bp.channels() + 8 * side);
        let at = first + own.plane * TILE + own.lane % 4 * 2;
        let mut by = Vector::<f32, V2>::cast_from(floats[at]);
        by[1] = floats[at + 1];
        scale_columns(sums.index_mut(comptime!(2 * n + side)), by);
    }
}

/// From the end of the block to the ends of the tiles of a half.
#[cube]
pub(crate) fn carry_to_tiles(
    sums: &mut Sequence<Acc>,
    floats: &SharedMemory<f32>,
    own: Own,
    #[comptime] half: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    #[unroll]
    for n in 0..HALF {
        let j = comptime!(half * HALF + n);
        #[unroll]
        for t in comptime!(j + 1)..TILES {
            carry(sums, floats, own, t, n, bp);
        }
    }
}

/// From the start of the block to the tiles of a half, and on the way adds to dQ and -E what they take from the keys.
#[cube]
pub(crate) fn add_from_keys<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    floats: &SharedMemory<f32>,
    dq: &mut Sequence<Acc>,
    e: &mut Sequence<Acc>,
    own: Own,
    #[comptime] half: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    let block = in_block(own.lane % 16, own.lane / 16);
    #[unroll]
    for j in 0..comptime!(half * HALF + HALF - 1) {
        let keys = own.key_rows + comptime!(bp.keys_to_end_at() + j * TILE * bp.key_row());
        let keys = load::<F>(mma, tile, keys, true);
        #[unroll]
        for n in 0..HALF {
            let i = comptime!(half * HALF + n);
            if comptime!(j < i) {
                carry(dq, floats, own, j, n, bp);
                carry(e, floats, own, j, n, bp);
                let at = block + comptime!(bp.across_at(pair(i, j)));
                add_block::<F>(mma, tile, dq, at, false, &keys, n);
                add_block::<F>(mma, tile, e, at + BLOCK_UNITS, false, &keys, n);
            }
        }
    }
}

/// H of the tiles of a half, from the queries and keys behind.
#[cube]
pub(crate) fn add_from_behind<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    floats: &SharedMemory<f32>,
    h: &mut Sequence<Acc>,
    own: Own,
    #[comptime] half: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    let block = in_block(own.lane / 16 * 8 + own.lane % 8, own.lane / 8 % 2);
    #[unroll]
    for down in 0..comptime!(TILES - 1 - half * HALF) {
        let i = comptime!(TILES - 1 - down);
        let rows = own.key_rows + comptime!(i * TILE * bp.key_row());
        let queries = load::<F>(mma, tile, rows, true);
        let keys = load::<F>(mma, tile, rows + comptime!(bp.k_at()), true);
        #[unroll]
        for n in 0..HALF {
            let j = comptime!(half * HALF + n);
            if comptime!(j < i) {
                if comptime!(down > 0) {
                    carry(h, floats, own, i, n, bp);
                }
                let at = block + comptime!(bp.across_at(pair(i, j)));
                add_block::<F>(mma, tile, h, at, true, &queries, n);
                add_block::<F>(mma, tile, h, at + BLOCK_UNITS, true, &keys, n);
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
                let at = comptime!(2 * at + (n * TILE + 8 * e) * 4 * bp.key_row() + 4 * side);
                to[first + at] = Vector::<F, V4>::reinterpret(acc[e]);
            }
        }
    }
}
