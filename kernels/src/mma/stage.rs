//! From device memory to shared memory and back, beside the work.

use cubecl::prelude::*;

use super::blueprint::{Blueprint, CHUNK, GROUP_UNITS, TILE};
use super::tile::{Tile, V8};
use crate::record::{Sequence, Strides};

/// The cube's sequence, heads and value channels.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) seq: Sequence,
    /// Index of the sequence.
    pub(crate) n: usize,
    /// Key head.
    pub(crate) h: usize,
    /// Value head.
    pub(crate) hv: usize,
    /// First value channel.
    pub(crate) v0: usize,
    /// Micro-steps of the sequence.
    pub(crate) steps: usize,
    pub(crate) chunks: usize,
}

/// Strides of the inputs that are staged.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct StagedStrides {
    pub(crate) q: Strides,
    pub(crate) k: Strides,
    pub(crate) v: Strides,
}

/// One unit's share of the keys, queries and values of a chunk, on the way through its registers.
#[derive(CubeType)]
pub(crate) struct Parcel<F: Float> {
    units: Array<Vector<F, V8>>,
}

/// Rows of 16-byte units that a preparing group copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Rows {
    /// Offset in the stage.
    at: usize,
    rows: usize,
    cols: usize,
    /// Place of the first in the parcel.
    first: usize,
}

impl Rows {
    fn rounds(self) -> usize {
        (self.rows * self.cols).div_ceil(GROUP_UNITS)
    }

    fn after(self, at: usize, rows: usize, cols: usize) -> Self {
        Self { at, rows, cols, first: self.first + self.rounds() }
    }
}

fn key_rows(bp: Blueprint) -> Rows {
    Rows { at: 0, rows: CHUNK, cols: bp.spec.key_dim / 8, first: 0 }
}

fn query_rows(bp: Blueprint) -> Rows {
    key_rows(bp).after(bp.q_at(), TILE * bp.read_blocks(), bp.spec.key_dim / 8)
}

fn value_rows(bp: Blueprint) -> Rows {
    query_rows(bp).after(bp.v_at(), CHUNK, bp.value_tile / 8)
}

fn parcel_units(bp: Blueprint) -> usize {
    let last = value_rows(bp);
    last.first + last.rounds()
}

/// Sends for chunk `c`. Rows past the end of the sequence, and channels past the last, repeat the last one:
/// what they hold is never used. Past the last chunk there is nothing to send for.
#[cube]
pub(crate) fn send_for<F: Float>(
    q: &Array<Vector<F, V8>>,
    k: &Array<Vector<F, V8>>,
    v: &Array<Vector<F, V8>>,
    strides: &StagedStrides,
    place: &Place,
    c: usize,
    unit: usize,
    #[comptime] bp: Blueprint,
) -> Parcel<F> {
    let n_h = comptime!(bp.spec.micro_steps);
    let mut parcel = Parcel::<F> { units: Array::new(comptime!(parcel_units(bp))) };
    if c < place.chunks {
        let step0 = c * CHUNK;
        let token0 = step0 / n_h;
        let seq = place.seq;
        let last_step = (place.steps - 1 - step0) as u32;
        let last_token = (seq.tokens - 1 - token0) as u32;
        let from = strides.k.at(seq.row, seq.start * n_h + step0, place.h) / 8;
        fetch_rows::<F>(k, from, strides.k.t / 8, last_step, 1000u32, &mut parcel, unit, comptime!(key_rows(bp)));
        let from = strides.q.at(seq.row, seq.start + token0, place.h) / 8;
        fetch_rows::<F>(q, from, strides.q.t / 8, last_token, 1000u32, &mut parcel, unit, comptime!(query_rows(bp)));
        let from = (strides.v.at(seq.row, seq.start * n_h + step0, place.hv) + place.v0) / 8;
        let last_col = ((bp.spec.value_dim - place.v0) / 8 - 1) as u32;
        fetch_rows::<F>(v, from, strides.v.t / 8, last_step, last_col, &mut parcel, unit, comptime!(value_rows(bp)));
    }
    parcel
}

#[cube]
fn fetch_rows<F: Float>(
    src: &Array<Vector<F, V8>>,
    from: usize,
    stride: u32,
    last_row: u32,
    last_col: u32,
    parcel: &mut Parcel<F>,
    unit: usize,
    #[comptime] rows: Rows,
) {
    #[unroll]
    for round in 0..comptime!(rows.rounds()) {
        let i = unit as u32 + comptime!((round * GROUP_UNITS) as u32);
        let row = u32::min(i / comptime!(rows.cols as u32), last_row);
        let col = u32::min(i % comptime!(rows.cols as u32), last_col);
        let at = from + (row * stride + col) as usize;
        parcel.units[comptime!(rows.first + round)] = src[at];
    }
}

/// Puts a parcel into the stage at `at`.
#[cube]
pub(crate) fn put<F: Float>(parcel: &Parcel<F>, to: &mut Tile<F>, at: usize, unit: usize, #[comptime] bp: Blueprint) {
    put_rows::<F>(parcel, to, at, unit, comptime!(key_rows(bp)));
    put_rows::<F>(parcel, to, at, unit, comptime!(query_rows(bp)));
    put_rows::<F>(parcel, to, at, unit, comptime!(value_rows(bp)));
}

#[cube]
fn put_rows<F: Float>(parcel: &Parcel<F>, to: &mut Tile<F>, at: usize, unit: usize, #[comptime] rows: Rows) {
    #[unroll]
    for round in 0..comptime!(rows.rounds()) {
        let i = unit as u32 + comptime!((round * GROUP_UNITS) as u32);
        let row = i / comptime!(rows.cols as u32);
        let col = i % comptime!(rows.cols as u32);
        if comptime!((round + 1) * GROUP_UNITS <= rows.rows * rows.cols) || row < comptime!(rows.rows as u32) {
            let into = (row * comptime!((rows.cols + 1) as u32) + col) as usize;
            to[at + rows.at + into] = parcel.units[comptime!(rows.first + round)];
        }
    }
}

/// Stores the outputs of chunk `c`, which lie at `at`.
#[cube]
pub(crate) fn store_outputs<F: Float>(
    tile: &Tile<F>,
    at: usize,
    out: &mut Array<Vector<F, V8>>,
    out_at: &Strides,
    place: &Place,
    c: usize,
    unit: usize,
    #[comptime] bp: Blueprint,
) {
    let n_h = comptime!(bp.spec.micro_steps);
    let cols = comptime!((bp.value_tile / 8) as u32);
    let rows = comptime!(TILE * bp.read_blocks());
    let total = comptime!(rows * bp.value_tile / 8);
    let token0 = c * CHUNK / n_h;
    let end = (least((c + 1) * CHUNK / n_h, place.seq.tokens) - token0) as u32;
    let to = (out_at.at(place.seq.row, place.seq.start + token0, place.hv) + place.v0) / 8;
    #[unroll]
    for round in 0..comptime!(total.div_ceil(GROUP_UNITS)) {
        let i = unit as u32 + comptime!((round * GROUP_UNITS) as u32);
        let row = i / cols;
        let col = i % cols;
        let inside = comptime!(bp.spec.value_dim % bp.value_tile == 0)
            || place.v0 + 8 * (col as usize) < bp.spec.value_dim;
        // `end` is at most the number of rows, so that no index runs over.
        if row < end && inside {
            out[to + (row * (out_at.t / 8) + col) as usize] =
                tile[at + (row * comptime!(bp.value_row() as u32) + col) as usize];
        }
    }
}

/// Integers of different widths have no common minimum in CUDA.
#[cube]
fn least(a: usize, b: usize) -> usize {
    select(a < b, a, b)
}
