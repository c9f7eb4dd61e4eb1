//! From device memory to shared memory and back, beside the work.

use cubecl::prelude::*;

use super::blueprint::{BLOCK_UNITS, Blueprint, CHUNK, Pass, TILE};
use super::tile::{Tile, V8};
use crate::record::{Sequence, Strides, sequence};

/// The cube's sequence, heads and value channels.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) seq: Sequence,
    /// Index of the sequence, or of the segment.
    pub(crate) n: usize,
    /// Key head.
    pub(crate) h: usize,
    /// Value head, of `heads`.
    pub(crate) hv: usize,
    pub(crate) heads: usize,
    /// First value channel, or row of the transfer behind them.
    pub(crate) v0: usize,
    /// Micro-steps of the sequence.
    pub(crate) steps: usize,
    pub(crate) chunks: usize,
}

/// Sequence `n`: a row of the batch, or an entry of the table.
#[cube]
pub(crate) fn sequence_of(
    table: &Array<u32>,
    n: usize,
    tokens: u32,
    #[comptime] packed: bool,
    #[comptime] micro_steps: usize,
) -> Sequence {
    if comptime!(packed) {
        sequence(table, n)
    } else {
        let tokens = tokens as usize;
        let chunks = (tokens * micro_steps).div_ceil(CHUNK);
        Sequence { row: n, start: 0usize, tokens, first_chunk: n * chunks }
    }
}

/// Strides of the inputs that are staged.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct StagedStrides {
    pub(crate) q: Strides,
    pub(crate) k: Strides,
    pub(crate) v: Strides,
}

/// One unit's share of a chunk's inputs, on the way through its registers.
#[derive(CubeType)]
pub(crate) struct Parcel<F: Float> {
    units: Array<Vector<F, V8>>,
    floats: Array<f32>,
    /// Rows of output gradients; those behind them are zeros.
    reads: u32,
}

/// 16-byte units that a group copies row by row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Rows {
    /// Offset in the stage, and from row to row.
    at: usize,
    ld: usize,
    rows: usize,
    cols: usize,
    /// Place of the first in the parcel.
    first: usize,
    /// Units of the group.
    group: usize,
    /// Whether rows may be missing, and are zeros then.
    cleared: bool,
}

impl Rows {
    fn rounds(self) -> usize {
        (self.rows * self.cols).div_ceil(self.group)
    }

    fn after(self, at: usize, rows: usize, cols: usize, ld: usize) -> Self {
        Self { at, ld, rows, cols, first: self.first + self.rounds(), group: self.group, cleared: false }
    }

    pub(crate) fn units(self) -> usize {
        self.rows * self.cols
    }
}

pub(crate) fn key_rows(bp: Blueprint) -> Rows {
    Rows {
        at: 0,
        ld: bp.key_row(),
        rows: CHUNK,
        cols: bp.spec.key_dim / 8,
        first: 0,
        group: bp.group_units(),
        cleared: false,
    }
}

pub(crate) fn query_rows(bp: Blueprint) -> Rows {
    key_rows(bp).after(bp.q_at(), TILE * bp.read_blocks(), bp.spec.key_dim / 8, bp.key_row())
}

/// Values, or output gradients in their place.
fn value_rows(bp: Blueprint) -> Rows {
    let unwinds = bp.pass == Pass::Unwind;
    let rows = if unwinds { TILE * bp.read_blocks() } else { CHUNK };
    let rows = query_rows(bp).after(bp.v_at(), rows, bp.value_tile / 8, bp.value_row());
    Rows { cleared: unwinds, ..rows }
}

pub(crate) fn decayed_key_rows(bp: Blueprint) -> Rows {
    let rows = if bp.by_channel() { CHUNK } else { 0 };
    value_rows(bp).after(bp.kd_at(), rows, bp.spec.key_dim / 8, bp.key_row())
}

/// Blocks are rows without padding.
pub(crate) fn block_rows(bp: Blueprint) -> Rows {
    let rows = if bp.prepared { bp.chunk_blocks() } else { 0 };
    decayed_key_rows(bp).after(bp.blocks_at(), rows, BLOCK_UNITS, BLOCK_UNITS)
}

fn parcel_units(bp: Blueprint) -> usize {
    let last = block_rows(bp);
    last.first + last.rounds()
}

/// Rounds of floats in a parcel.
fn parcel_floats(bp: Blueprint) -> usize {
    if bp.prepared { bp.factors().div_ceil(bp.group_units()) } else { 0 }
}

/// Room for a parcel.
#[cube]
pub(crate) fn new_parcel<F: Float>(#[comptime] bp: Blueprint) -> Parcel<F> {
    Parcel::<F> {
        units: Array::new(comptime!(parcel_units(bp))),
        floats: Array::new(comptime!(parcel_floats(bp).max(1))),
        reads: 0u32,
    }
}

/// Rows of a tensor in device memory, in units of 16 bytes.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Source {
    /// The first row.
    pub(crate) from: usize,
    /// From row to row.
    pub(crate) stride: u32,
    /// The last row of the sequence. Those behind it repeat it: what they hold is never used.
    pub(crate) last: u32,
}

/// The keys of chunk `c`.
#[cube]
pub(crate) fn keys_of(at: &Strides, place: &Place, c: usize, #[comptime] bp: Blueprint) -> Source {
    let step0 = c * CHUNK;
    let from = at.at(place.seq.row, place.seq.start * comptime!(bp.spec.micro_steps) + step0, place.h) / 8;
    Source { from, stride: at.t / 8, last: (place.steps - 1 - step0) as u32 }
}

/// The queries of chunk `c`.
#[cube]
pub(crate) fn queries_of(at: &Strides, place: &Place, c: usize, #[comptime] bp: Blueprint) -> Source {
    let token0 = c * CHUNK / comptime!(bp.spec.micro_steps);
    let from = at.at(place.seq.row, place.seq.start + token0, place.h) / 8;
    Source { from, stride: at.t / 8, last: (place.seq.tokens - 1 - token0) as u32 }
}

/// Sends for the keys and queries of chunk `c`.
#[cube]
pub(crate) fn send_for_keys<F: Float>(
    parcel: &mut Parcel<F>,
    q: &Array<Vector<F, V8>>,
    k: &Array<Vector<F, V8>>,
    strides: &StagedStrides,
    place: &Place,
    c: usize,
    unit: usize,
    #[comptime] bp: Blueprint,
) {
    let keys = keys_of(&strides.k, place, c, bp);
    fetch_rows::<F>(k, keys, 1000u32, parcel, unit, comptime!(key_rows(bp)), false);
    let queries = queries_of(&strides.q, place, c, bp);
    fetch_rows::<F>(q, queries, 1000u32, parcel, unit, comptime!(query_rows(bp)), false);
}

/// Sends for all that the scan needs of its chunk `c`: the values (or output gradients), and the keys and queries or
/// their record. Past the last chunk there is nothing to send for.
#[cube]
pub(crate) fn send_for<F: Float>(
    parcel: &mut Parcel<F>,
    q: &Array<Vector<F, V8>>,
    k: &Array<Vector<F, V8>>,
    v: &Array<Vector<F, V8>>,
    records: &Array<Vector<F, V8>>,
    record_factors: &Array<f32>,
    strides: &StagedStrides,
    place: &Place,
    c: usize,
    unit: usize,
    #[comptime] bp: Blueprint,
) {
    let n_h = comptime!(bp.spec.micro_steps);
    if c < place.chunks {
        let c = turn(place, c, bp);
        let step0 = c * CHUNK;
        let seq = place.seq;
        let record = (seq.first_chunk + c) * place.heads + place.hv;
        let mut at = record * comptime!(bp.record().0);
        if comptime!(bp.by_channel()) {
            fetch_all::<F>(records, at, parcel, unit, comptime!(key_rows(bp)));
            at += comptime!(key_rows(bp).units());
            fetch_all::<F>(records, at, parcel, unit, comptime!(query_rows(bp)));
            at += comptime!(query_rows(bp.recorded()).units());
            fetch_all::<F>(records, at, parcel, unit, comptime!(decayed_key_rows(bp)));
            at += comptime!(decayed_key_rows(bp).units());
        } else {
            send_for_keys::<F>(parcel, q, k, strides, place, c, unit, bp);
        }
        if comptime!(bp.prepared) {
            fetch_all::<F>(records, at, parcel, unit, comptime!(block_rows(bp)));
            #[unroll]
            for round in 0..comptime!(parcel_floats(bp)) {
                let i = unit + comptime!(round * bp.group_units());
                if i < comptime!(bp.factors()) {
                    parcel.floats[round] = record_factors[record * comptime!(bp.factors()) + i];
                }
            }
        }
        let mut first = seq.start * n_h + step0;
        let mut last_row = (place.steps - 1 - step0) as u32;
        if comptime!(bp.pass == Pass::Unwind) {
            let token0 = step0 / n_h;
            first = seq.start + token0;
            parcel.reads = (least((c + 1) * CHUNK / n_h, seq.tokens) - token0) as u32;
            last_row = (seq.tokens - 1 - token0) as u32;
        }
        let from = (strides.v.at(seq.row, first, place.hv) + place.v0) / 8;
        let source = Source { from, stride: strides.v.t / 8, last: last_row };
        // The rows of the transfer, behind the values, write nothing.
        let transfer = comptime!(bp.pass == Pass::Transfer);
        let channels = comptime!(bp.spec.value_dim).runtime();
        let cols = if comptime!(transfer) {
            select(place.v0 < channels, channels - place.v0, 0usize) / 8
        } else {
            (channels - place.v0) / 8
        };
        let values = comptime!(value_rows(bp));
        fetch_rows::<F>(v, source, cols as u32, parcel, unit, values, transfer);
    }
}

/// Columns from `cols` on repeat the last one, unless they are to be zeros.
#[cube]
fn fetch_rows<F: Float>(
    src: &Array<Vector<F, V8>>,
    source: Source,
    cols: u32,
    parcel: &mut Parcel<F>,
    unit: usize,
    #[comptime] rows: Rows,
    #[comptime] zeros: bool,
) {
    #[unroll]
    for round in 0..comptime!(rows.rounds()) {
        let i = unit as u32 + comptime!((round * rows.group) as u32);
        let row = u32::min(i / comptime!(rows.cols as u32), source.last);
        let col = i % comptime!(rows.cols as u32);
        let at = source.from + (row * source.stride + u32::min(col, cols - 1)) as usize;
        let to = comptime!(rows.first + round);
        if comptime!(zeros) {
            let mut x = Vector::<F, V8>::cast_from(0.0f32);
            if col < cols {
                x = src[at];
            }
            parcel.units[to] = x;
        } else {
            parcel.units[to] = src[at];
        }
    }
}

/// Rows that lie one behind the other.
#[cube]
fn fetch_all<F: Float>(
    src: &Array<Vector<F, V8>>,
    from: usize,
    parcel: &mut Parcel<F>,
    unit: usize,
    #[comptime] rows: Rows,
) {
    #[unroll]
    for round in 0..comptime!(rows.rounds()) {
        let i = unit + comptime!(round * rows.group);
        if comptime!((round + 1) * rows.group <= rows.units()) || i < comptime!(rows.units()) {
            parcel.units[comptime!(rows.first + round)] = src[from + i];
        }
    }
}

/// Puts a parcel into the stage at `at`, and its floats at `factors_at`.
#[cube]
pub(crate) fn put<F: Float>(
    parcel: &Parcel<F>,
    to: &mut Tile<F>,
    factors: &mut SharedMemory<f32>,
    at: usize,
    factors_at: usize,
    unit: usize,
    #[comptime] bp: Blueprint,
) {
    put_rows::<F>(parcel, to, at, unit, comptime!(key_rows(bp)));
    put_rows::<F>(parcel, to, at, unit, comptime!(query_rows(bp)));
    put_rows::<F>(parcel, to, at, unit, comptime!(value_rows(bp)));
    put_rows::<F>(parcel, to, at, unit, comptime!(decayed_key_rows(bp)));
    put_rows::<F>(parcel, to, at, unit, comptime!(block_rows(bp)));
    #[unroll]
    for round in 0..comptime!(parcel_floats(bp)) {
        let i = unit + comptime!(round * bp.group_units());
        if i < comptime!(bp.factors()) {
            factors[factors_at + i] = parcel.floats[round];
        }
    }
}

#[cube]
pub(crate) fn put_rows<F: Float>(
    parcel: &Parcel<F>,
    to: &mut Tile<F>,
    at: usize,
    unit: usize,
    #[comptime] rows: Rows,
) {
    #[unroll]
    for round in 0..comptime!(rows.rounds()) {
        let i = unit as u32 + comptime!((round * rows.group) as u32);
        let row = i / comptime!(rows.cols as u32);
        let col = i % comptime!(rows.cols as u32);
        if comptime!((round + 1) * rows.group <= rows.units()) || row < comptime!(rows.rows as u32) {
            let into = (row * comptime!(rows.ld as u32) + col) as usize;
            to[at + rows.at + into] = parcel.units[comptime!(rows.first + round)];
            if comptime!(rows.cleared) && row >= parcel.reads {
                to[at + rows.at + into] = Vector::cast_from(0.0f32);
            }
        }
    }
}

/// Copies rows of the stage at the start of shared memory to device memory, one behind the other.
#[cube]
pub(crate) fn record_rows<F: Float>(
    from: &Tile<F>,
    to: &mut Array<Vector<F, V8>>,
    at: usize,
    unit: usize,
    #[comptime] rows: Rows,
) {
    #[unroll]
    for round in 0..comptime!(rows.rounds()) {
        let i = unit as u32 + comptime!((round * rows.group) as u32);
        let row = i / comptime!(rows.cols as u32);
        let col = i % comptime!(rows.cols as u32);
        if comptime!((round + 1) * rows.group <= rows.units()) || row < comptime!(rows.rows as u32) {
            let at_src = (row * comptime!(rows.ld as u32) + col) as usize;
            to[at + i as usize] = from[rows.at + at_src];
        }
    }
}

/// The chunk that the scan takes as its `c`th: backwards, the last one first.
#[cube]
pub(crate) fn turn(place: &Place, c: usize, #[comptime] bp: Blueprint) -> usize {
    if comptime!(bp.pass == Pass::Unwind) { place.chunks - 1 - c } else { c }
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
    let token0 = c * CHUNK / n_h;
    let end = (least((c + 1) * CHUNK / n_h, place.seq.tokens) - token0) as u32;
    let to = (out_at.at(place.seq.row, place.seq.start + token0, place.hv) + place.v0) / 8;
    store_rows::<F>(tile, at, out, to, out_at.t / 8, end, place, unit, bp);
}

/// Stores the first `end` rows of those that lie at `at`.
#[cube]
pub(crate) fn store_rows<F: Float>(
    tile: &Tile<F>,
    at: usize,
    out: &mut Array<Vector<F, V8>>,
    to: usize,
    stride: u32,
    end: u32,
    place: &Place,
    unit: usize,
    #[comptime] bp: Blueprint,
) {
    let cols = comptime!((bp.value_tile / 8) as u32);
    let total = comptime!(bp.output_rows() * bp.value_tile / 8);
    #[unroll]
    for round in 0..comptime!(total.div_ceil(bp.group_units())) {
        let i = unit as u32 + comptime!((round * bp.group_units()) as u32);
        let row = i / cols;
        let col = i % cols;
        let inside = comptime!(bp.spec.value_dim % bp.value_tile == 0)
            || place.v0 + 8 * (col as usize) < bp.spec.value_dim;
        // `end` is at most the number of rows, so that no index runs over.
        if row < end && inside {
            out[to + (row * stride + col) as usize] =
                tile[at + (row * comptime!(bp.value_row() as u32) + col) as usize];
        }
    }
}

/// Integers of different widths have no common minimum in CUDA.
#[cube]
pub(crate) fn least(a: usize, b: usize) -> usize {
    select(a < b, a, b)
}
