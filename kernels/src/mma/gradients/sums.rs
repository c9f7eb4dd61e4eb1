//! Sums of products over the channels, row by row.
//!
//! A plane finds those over its own 16 channels; the four units of a row add theirs, and unit t of them keeps the sums
//! of tile t.

use cubecl::prelude::*;

use super::super::blueprint::TILE;
use super::super::gram::over_row;
use super::super::tile::{Acc, Frag, Mma, Tile, V2, V4, V8, load};
use super::Own;
use super::blueprint::{BLOCK, GradientsBlueprint};

/// What is summed: the first four, and where there is a norm two more. "Across" leaves out pairs inside a token.
pub(crate) mod which {
    /// k . (E - beta H), across.
    pub(crate) const LATER: usize = 0;
    /// k . H, from the state alone.
    pub(crate) const TO_END: usize = 1;
    /// k . H.
    pub(crate) const KEY: usize = 2;
    /// q . dQ, across.
    pub(crate) const READ: usize = 3;
    /// k . (E + beta H), of the second four.
    pub(crate) const ALONG_KEY: usize = 0;
    /// q . dQ, of the second four.
    pub(crate) const ALONG_QUERY: usize = 1;
}

/// The sums that a unit keeps: rows `lane / 4` and 8 behind it of its tile.
#[derive(CubeType)]
pub(crate) struct Sums {
    lo: Vector<f32, V4>,
    hi: Vector<f32, V4>,
}

#[cube]
impl Sums {
    pub(crate) fn new() -> Self {
        Sums { lo: Vector::cast_from(0.0f32), hi: Vector::cast_from(0.0f32) }
    }

    /// Adds up a unit's shares of two rows of tile `i`.
    pub(crate) fn keep(
        &mut self,
        x: Vector<f32, V2>,
        #[comptime] which: usize,
        #[comptime] i: usize,
        own: Own,
    ) {
        let lo = over_row(x[0]);
        let hi = over_row(x[1]);
        let mine = own.lane % 4 == i;
        self.lo[which] = select(mine, lo, self.lo[which]);
        self.hi[which] = select(mine, hi, self.hi[which]);
    }

    /// Leaves them.
    pub(crate) fn leave<F: Float>(
        &self,
        tile: &mut Tile<F>,
        own: Own,
        #[comptime] group: usize,
        #[comptime] bp: GradientsBlueprint,
    ) {
        let row = own.lane % 4 * TILE + own.lane / 4;
        let at = comptime!(bp.sums_at(group)) + own.plane * BLOCK + row;
        tile[at] = Vector::<F, V8>::reinterpret(self.lo);
        tile[at + 8] = Vector::<F, V8>::reinterpret(self.hi);
    }
}

/// The sums of a row over all channels.
#[cube]
pub(crate) fn over_planes<F: Float>(
    tile: &Tile<F>,
    row: usize,
    #[comptime] group: usize,
    #[comptime] bp: GradientsBlueprint,
) -> Vector<f32, V4> {
    let mut sum = Vector::<f32, V4>::cast_from(0.0f32);
    #[unroll]
    for plane in 0..comptime!(bp.planes()) {
        let at = comptime!(bp.sums_at(group) + plane * BLOCK) + row;
        sum += Vector::<f32, V4>::reinterpret(tile[at]);
    }
    sum
}

/// Tile `i` of the queries or keys from `at` on, as it lies in accumulators.
#[cube]
pub(crate) fn rows_of<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    own: Own,
    #[comptime] at: usize,
    #[comptime] i: usize,
    #[comptime] bp: GradientsBlueprint,
) -> Frag<F> {
    sync_plane();
    load::<F>(mma, tile, own.key_rows + comptime!(at + i * TILE * bp.key_row()), false)
}

/// This unit's share of the products of two rows of tile `i`.
#[cube]
pub(crate) fn along<F: Float>(rows: &Frag<F>, x: &Sequence<Acc>, #[comptime] i: usize) -> Vector<f32, V2> {
    let mut out = Vector::<f32, V2>::cast_from(0.0f32);
    #[unroll]
    for e in 0..2usize {
        let near = x.index(comptime!(2 * i))[e] * Vector::cast_from(rows[e]);
        let both = fma(x.index(comptime!(2 * i + 1))[e], Vector::cast_from(rows[comptime!(2 + e)]), near);
        out[e] = both[0] + both[1];
    }
    out
}
