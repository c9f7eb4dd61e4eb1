//! What flows between the micro-steps of a block, without the state.
//!
//! With Y = dO R^T and X = -dV R^T, each gated and cut below the diagonal, a pair of 16-row tiles (i, j) leaves its
//! blocks twice: scaled for the rows of j (beta, the key's norm), which dQ and E take from the keys, and for the rows
//! of i (the scale, the norm of the query or key), which H takes from the queries and keys.

use cubecl::prelude::*;

use super::super::blueprint::{BLOCK_UNITS, TILE};
use super::super::memory::Region;
use super::super::tile::{
    Acc, Frag, Mma, Tile, V2, by_columns, by_depth, in_block, load, mma2, store, to_frag, zeros,
};
use super::Own;
use super::blueprint::{
    BETAS_AT, BLOCK, DECAYS_AT, GradientsBlueprint, KEY_NORMS_AT, PAIR, QUERY_NORMS_AT, Span, TILES,
};
use crate::known::{known_and, known_or};
use crate::spec::Decay;

/// Where the reads of the block lie between its micro-steps.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Reads {
    /// First micro-step of the block, in its sequence.
    pub(crate) step0: u32,
    /// Its first read.
    pub(crate) first: u32,
}

#[cube]
impl Reads {
    /// The micro-step of the block behind which read `r` comes, the last one for reads behind the block.
    pub(crate) fn position(&self, r: u32, #[comptime] n_h: usize) -> u32 {
        let at = (self.first + r + 1) * comptime!(n_h as u32) - 1 - self.step0;
        u32::min(at, comptime!(BLOCK as u32 - 1))
    }
}

/// 16 rows times 16 rows, over all value channels.
#[cube]
pub(crate) fn product<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    left: usize,
    right: usize,
    lane: usize,
    #[comptime] bp: GradientsBlueprint,
) -> Sequence<Acc> {
    let left = left + by_depth(lane, comptime!(bp.value_row()));
    let right = right + by_columns(lane, comptime!(bp.value_row()));
    let steps = comptime!(bp.value_steps());
    let mut sums = zeros(2usize);
    let mut a = Sequence::<Frag<F>>::new();
    let mut b = Sequence::<Frag<F>>::new();
    #[unroll]
    for step in 0..comptime!(steps + 1) {
        if comptime!(step < steps) {
            a.push(load::<F>(mma, tile, left + 2 * step, false));
            b.push(load::<F>(mma, tile, right + 2 * step, false));
        }
        if comptime!(step > 0) {
            let now = comptime!(step - 1);
            mma2::<F>(mma, &a, now, 0usize, b.index(now), &mut sums, 0usize, 0usize, 1usize);
        }
    }
    sums
}

/// Leaves the blocks of all pairs; planes take them in turn.
#[cube]
pub(crate) fn leave_pairs<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    floats: &Region<f32>,
    reads: Reads,
    scale: f32,
    plane: usize,
    lane: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    let planes = comptime!(bp.units() / 32);
    if comptime!(bp.spec.key_dim > 64) {
        // A loop that stays one takes 8 registers too many for two cubes.
        #[unroll]
        for round in 0..comptime!(bp.pairs().div_ceil(bp.units() / 32)) {
            let pair = plane + comptime!(round * planes);
            if pair < comptime!(bp.pairs()) {
                leave_pair::<F>(mma, tile, floats, reads, scale, pair, lane, bp);
            }
        }
    } else {
        // Small cubes have more rounds, and the first call compiles them all; unrolled, DeltaNet spills at times.
        let mut pair = plane;
        while pair < comptime!(bp.pairs()) {
            leave_pair::<F>(mma, tile, floats, reads, scale, pair, lane, bp);
            pair += planes;
        }
    }
}

#[cube]
fn leave_pair<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    floats: &Region<f32>,
    reads: Reads,
    scale: f32,
    pair: usize,
    lane: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    let n_h = comptime!(bp.spec.micro_steps as u32);
    let is_read = pair < comptime!(bp.read_pairs());
    let (i, j) = tiles_of(pair, is_read, bp);
    let tile_rows = comptime!(TILE * bp.value_row());
    let left = select(is_read, comptime!(bp.d_o_at()).runtime(), comptime!(bp.dv_at()).runtime());
    let right = comptime!(bp.r_at()) + j * tile_rows;
    let sums = product::<F>(mma, tile, left + i * tile_rows, right, lane, bp);

    let row = i * TILE + lane / 4;
    let column = j * TILE + lane % 4 * 2;
    let place = in_block(lane % 16, lane / 16);
    let sign = select(is_read, scale, -1.0f32);
    let norms = select(is_read, QUERY_NORMS_AT, KEY_NORMS_AT);
    let mut across = zeros(2usize);
    let mut inside = zeros(2usize);
    #[unroll]
    for e in 0..2usize {
        let own = (row + 8 * e) as u32;
        let at_row = select(is_read, reads.position(own, bp.spec.micro_steps), own);
        let token = (reads.step0 + at_row) / n_h;
        let decay = floats[DECAYS_AT + at_row as usize];
        #[unroll]
        for n in 0..2usize {
            let mut x = sums.index(n)[e] * Vector::cast_from(sign);
            let mut y = x;
            #[unroll]
            for c in 0..2usize {
                let at_column = (column + comptime!(8 * n + c)) as u32;
                let mut z = x[c];
                if comptime!(bp.spec.decay == Decay::Head) {
                    z *= f32::exp(f32::min(decay - floats[DECAYS_AT + at_column as usize], 0.0f32));
                }
                let pairs = at_column < at_row || (is_read && at_column == at_row);
                if comptime!(bp.splits_pairs()) {
                    let within = (reads.step0 + at_column) / n_h == token;
                    x[c] = select(pairs && !within, z, 0.0f32);
                    y[c] = select(pairs && within, z, 0.0f32);
                } else {
                    x[c] = select(pairs, z, 0.0f32);
                }
            }
            let acc = across.index_mut(n);
            acc[e] = x;
            let acc = inside.index_mut(n);
            acc[e] = y;
        }
    }
    let into = comptime!(bp.across_at(0)) + pair * PAIR + place;
    leave_scaled::<F>(mma, tile, floats, &across, into, norms + row, column, bp);
    let some_within = known_or(bp.spec.micro_steps > 1, is_read && i == j);
    if known_and(bp.splits_pairs(), some_within) {
        let slot = if comptime!(bp.spec.micro_steps == 1) { i } else { pair };
        let into = comptime!(bp.within_at(0, 0)) + slot * PAIR + place;
        leave_scaled::<F>(mma, tile, floats, &inside, into, norms + row, column, bp);
    }
}

/// Leaves a block scaled for the rows of its columns, and behind it one scaled for its own.
#[cube]
fn leave_scaled<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    floats: &Region<f32>,
    x: &Sequence<Acc>,
    into: usize,
    norm: usize,
    column: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    let mut by_column = zeros(2usize);
    let mut by_row = zeros(2usize);
    #[unroll]
    for n in 0..2usize {
        let mut factor = Vector::<f32, V2>::cast_from(0.0f32);
        #[unroll]
        for c in 0..2usize {
            let at = column + comptime!(8 * n + c);
            factor[c] = floats[BETAS_AT + at];
            if comptime!(bp.spec.qk_l2norm) {
                factor[c] *= floats[KEY_NORMS_AT + at];
            }
        }
        let acc = x.index(n);
        let columns = by_column.index_mut(n);
        let rows = by_row.index_mut(n);
        #[unroll]
        for e in 0..2usize {
            columns[e] = acc[e] * factor;
            rows[e] = acc[e];
            if comptime!(bp.spec.qk_l2norm) {
                rows[e] = acc[e] * Vector::cast_from(floats[norm + 8 * e]);
            }
        }
    }
    let f = to_frag::<F>(by_column.index(0usize), by_column.index(1usize));
    store::<F>(mma, tile, into, &f, false);
    let f = to_frag::<F>(by_row.index(0usize), by_row.index(1usize));
    store::<F>(mma, tile, into + BLOCK_UNITS, &f, false);
}

/// The tiles of a pair.
#[cube]
fn tiles_of(pair: usize, is_read: bool, #[comptime] bp: GradientsBlueprint) -> (usize, usize) {
    let mut row = 0usize;
    let mut first = comptime!(bp.first_pair(0, false)).runtime();
    #[unroll]
    for i in 1..TILES {
        let begins = comptime!(bp.first_pair(i, false));
        row = select(pair >= begins, i, row);
        first = select(pair >= begins, begins, first);
    }
    if known_and(bp.read_pairs() > 0, is_read) {
        row = 0usize;
        first = 0usize;
        #[unroll]
        for i in 1..comptime!(bp.read_tiles()) {
            let begins = comptime!(bp.first_pair(i, true));
            row = select(pair >= begins, i, row);
            first = select(pair >= begins, begins, first);
        }
    }
    (row, pair - first)
}

/// Adds to dQ of `reads` and to E of `steps` what they take from the keys, through the pairs inside tokens or through
/// the others.
#[cube]
pub(crate) fn add_from_keys<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    dq: &mut Sequence<Acc>,
    e: &mut Sequence<Acc>,
    own: Own,
    #[comptime] reads: Span,
    #[comptime] steps: Span,
    #[comptime] within: bool,
    #[comptime] bp: GradientsBlueprint,
) {
    let block = in_block(own.lane % 16, own.lane / 16);
    #[unroll]
    for j in 0..TILES {
        let any = comptime!(bp.any_read(reads, j, within) || bp.any_step(steps, j, within));
        if comptime!(any) {
            sync_plane();
            let keys = own.key_rows + comptime!(bp.k_at() + j * TILE * bp.key_row());
            let keys = load::<F>(mma, tile, keys, true);
            #[unroll]
            for n in 0..comptime!(reads.tiles) {
                let i = comptime!(reads.first + n);
                if comptime!(bp.has_read(i, j, within)) {
                    let at = block + comptime!(bp.read_block(i, j, within));
                    add_block::<F>(mma, tile, dq, at, false, &keys, n);
                }
            }
            #[unroll]
            for n in 0..comptime!(steps.tiles) {
                let i = comptime!(steps.first + n);
                if comptime!(bp.has_step(i, j, within)) {
                    let at = block + comptime!(bp.step_block(i, j, within));
                    add_block::<F>(mma, tile, e, at, false, &keys, n);
                }
            }
        }
    }
}

/// Adds to H of `steps` what it takes from the queries and keys behind.
#[cube]
pub(crate) fn add_from_behind<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    h: &mut Sequence<Acc>,
    own: Own,
    #[comptime] steps: Span,
    #[comptime] within: bool,
    #[comptime] bp: GradientsBlueprint,
) {
    let block = in_block(own.lane / 16 * 8 + own.lane % 8, own.lane / 8 % 2) + BLOCK_UNITS;
    #[unroll]
    for i in 0..TILES {
        if comptime!(bp.any_seen(i, steps, within)) {
            sync_plane();
            let queries = load::<F>(mma, tile, own.key_rows + comptime!(i * TILE * bp.key_row()), true);
            #[unroll]
            for n in 0..comptime!(steps.tiles) {
                let j = comptime!(steps.first + n);
                if comptime!(bp.has_read(i, j, within)) {
                    let at = block + comptime!(bp.read_block(i, j, within));
                    add_block::<F>(mma, tile, h, at, true, &queries, n);
                }
            }
        }
        if comptime!(bp.any_behind(i, steps, within)) {
            sync_plane();
            let keys = own.key_rows + comptime!(bp.k_at() + i * TILE * bp.key_row());
            let keys = load::<F>(mma, tile, keys, true);
            #[unroll]
            for n in 0..comptime!(steps.tiles) {
                let j = comptime!(steps.first + n);
                if comptime!(bp.has_step(i, j, within)) {
                    let at = block + comptime!(bp.step_block(i, j, within));
                    add_block::<F>(mma, tile, h, at, true, &keys, n);
                }
            }
        }
    }
}

/// Adds a block times 16 rows to tile `to_tile`.
#[cube]
pub(crate) fn add_block<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    to: &mut Sequence<Acc>,
    block: usize,
    #[comptime] transposed: bool,
    rows: &Frag<F>,
    #[comptime] to_tile: usize,
) {
    let mut left = Sequence::<Frag<F>>::new();
    left.push(load::<F>(mma, tile, block, transposed));
    mma2::<F>(mma, &left, 0usize, 0usize, rows, to, comptime!(2 * to_tile), 0usize, 1usize);
}
