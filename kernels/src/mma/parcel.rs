//! What one unit carries of a chunk from device memory to shared memory.

use cubecl::prelude::*;

use super::arguments::{Records, Rows};
use super::blueprint::{Blueprint, CHUNK, Pass};
use super::memory::Region;
use super::stage::{
    Part, Place, Source, block_rows, decayed_key_rows, key_rows, keys_of, least, queries_of, query_rows,
    turn, value_rows,
};
use super::tile::{Tile, V4, V8};
use crate::known::{known_and, known_or};

/// More columns, 8 channels each, than any row has.
const ALL_COLUMNS: u32 = 1000;

/// One unit's share of a chunk's inputs, on the way through its registers. Words: elements of 16 bits, kept from turn to
/// turn, the compiler would take apart, and wait for.
#[derive(CubeType)]
pub(crate) struct Parcel {
    units: Array<Vector<u32, V4>>,
    floats: Array<f32>,
    /// Rows of output gradients; those behind them are zeros.
    reads: u32,
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
pub(crate) fn new_parcel(#[comptime] bp: Blueprint) -> Parcel {
    Parcel {
        units: Array::new(comptime!(parcel_units(bp))),
        floats: Array::new(comptime!(parcel_floats(bp).max(1))),
        reads: 0u32,
    }
}

/// What a parcel holds, in the order in which it is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Piece {
    Keys,
    Queries,
    /// What a launch of its own has prepared, but for keys and queries.
    Record,
    /// Values, or output gradients.
    Values,
}

const PIECES: usize = 4;

fn piece(i: usize) -> Piece {
    [Piece::Keys, Piece::Queries, Piece::Record, Piece::Values][i]
}

/// A chunk of the cube's sequence in device memory.
#[derive(CubeType, Clone, Copy)]
struct Chunk {
    /// Which one, from the sequence's first.
    c: usize,
    /// Its record.
    record: usize,
    /// Past the last one there is nothing to send for.
    exists: bool,
}

/// The chunk that the scan takes as its `c`th.
#[cube]
fn chunk_of(place: &Place, c: usize, #[comptime] bp: Blueprint) -> Chunk {
    let exists = c < place.chunks;
    let c = turn(place, c, bp);
    Chunk { c, record: (place.seq.first_chunk + c) * place.heads + place.hv, exists }
}

/// Sends for all that the scan needs of its chunk `c`.
#[cube]
pub(crate) fn send<F: Float>(
    parcel: &mut Parcel,
    q: &Rows<F>,
    k: &Rows<F>,
    v: &Rows<F>,
    records: &Records<F>,
    place: &Place,
    c: usize,
    unit: usize,
    #[comptime] bp: Blueprint,
) {
    let chunk = chunk_of(place, c, bp);
    #[unroll]
    for i in 0..PIECES {
        send_piece::<F>(parcel, q, k, v, records, place, chunk, unit, comptime!(piece(i)), bp);
    }
}

/// Puts a parcel into stage `stage`.
#[cube]
pub(crate) fn put<F: Float>(
    parcel: &Parcel,
    to: &mut Tile<F>,
    factors: &mut Region<f32>,
    stage: usize,
    unit: usize,
    #[comptime] bp: Blueprint,
) {
    #[unroll]
    for i in 0..PIECES {
        put_piece::<F>(parcel, to, factors, stage, unit, comptime!(piece(i)), bp);
    }
}

/// Both, piece by piece: each is asked for as soon as its registers are free.
#[cube]
pub(crate) fn put_and_send<F: Float>(
    parcel: &mut Parcel,
    to: &mut Tile<F>,
    factors: &mut Region<f32>,
    stage: usize,
    q: &Rows<F>,
    k: &Rows<F>,
    v: &Rows<F>,
    records: &Records<F>,
    place: &Place,
    c: usize,
    unit: usize,
    #[comptime] bp: Blueprint,
) {
    let chunk = chunk_of(place, c, bp);
    #[unroll]
    for i in 0..PIECES {
        let piece = comptime!(piece(i));
        put_piece::<F>(parcel, to, factors, stage, unit, piece, bp);
        send_piece::<F>(parcel, q, k, v, records, place, chunk, unit, piece, bp);
    }
}

#[cube]
fn send_piece<F: Float>(
    parcel: &mut Parcel,
    q: &Rows<F>,
    k: &Rows<F>,
    v: &Rows<F>,
    records: &Records<F>,
    place: &Place,
    chunk: Chunk,
    unit: usize,
    #[comptime] piece: Piece,
    #[comptime] bp: Blueprint,
) {
    let (keys, queries, decayed) = comptime!((key_rows(bp), query_rows(bp), decayed_key_rows(bp)));
    // Where they begin in a record.
    let queries_at = comptime!(keys.units());
    let decayed_at = comptime!(queries_at + query_rows(bp.recorded()).units());
    let blocks_at = comptime!(if bp.by_channel() { decayed_at + decayed.units() } else { 0 });
    let first = chunk.record * comptime!(bp.record().0);
    let wanted =
        if comptime!(piece == Piece::Queries) { place.reads(bp) && chunk.exists } else { chunk.exists };
    if wanted {
        if comptime!(piece == Piece::Keys) {
            if comptime!(bp.by_channel()) {
                fetch_all::<F>(&records.blocks, first, parcel, unit, keys);
            } else {
                let rows = keys_of::<F>(k, place, chunk.c, bp);
                fetch_rows::<F>(&k.data, rows, ALL_COLUMNS, parcel, unit, keys, false);
            }
        } else if comptime!(piece == Piece::Queries) {
            if comptime!(bp.by_channel()) {
                fetch_all::<F>(&records.blocks, first + queries_at, parcel, unit, queries);
            } else {
                let rows = queries_of::<F>(q, place, chunk.c, bp);
                fetch_rows::<F>(&q.data, rows, ALL_COLUMNS, parcel, unit, queries, false);
            }
        } else if comptime!(piece == Piece::Record) {
            fetch_all::<F>(&records.blocks, first + decayed_at, parcel, unit, decayed);
            fetch_all::<F>(&records.blocks, first + blocks_at, parcel, unit, comptime!(block_rows(bp)));
            fetch_floats(parcel, &records.factors, chunk.record, unit, bp);
        } else {
            fetch_values::<F>(parcel, v, place, chunk.c, unit, bp);
        }
    }
}

#[cube]
fn put_piece<F: Float>(
    parcel: &Parcel,
    to: &mut Tile<F>,
    factors: &mut Region<f32>,
    stage: usize,
    unit: usize,
    #[comptime] piece: Piece,
    #[comptime] bp: Blueprint,
) {
    let at = stage * comptime!(bp.stage());
    if comptime!(piece == Piece::Keys) {
        put_rows::<F>(parcel, to, at, unit, comptime!(key_rows(bp)));
    } else if comptime!(piece == Piece::Queries) {
        put_rows::<F>(parcel, to, at, unit, comptime!(query_rows(bp)));
    } else if comptime!(piece == Piece::Record) {
        put_rows::<F>(parcel, to, at, unit, comptime!(decayed_key_rows(bp)));
        put_rows::<F>(parcel, to, at, unit, comptime!(block_rows(bp)));
        put_floats(parcel, factors, stage, unit, bp);
    } else {
        put_rows::<F>(parcel, to, at, unit, comptime!(value_rows(bp)));
    }
}

/// The factors of a chunk.
#[cube]
fn fetch_floats(
    parcel: &mut Parcel,
    record_factors: &Array<f32>,
    record: usize,
    unit: usize,
    #[comptime] bp: Blueprint,
) {
    #[unroll]
    for round in 0..comptime!(parcel_floats(bp)) {
        let i = unit + comptime!(round * bp.group_units());
        if i < comptime!(bp.factors()) {
            parcel.floats[round] = record_factors[record * comptime!(bp.factors()) + i];
        }
    }
}

#[cube]
fn put_floats(
    parcel: &Parcel,
    factors: &mut Region<f32>,
    stage: usize,
    unit: usize,
    #[comptime] bp: Blueprint,
) {
    #[unroll]
    for round in 0..comptime!(parcel_floats(bp)) {
        let i = unit + comptime!(round * bp.group_units());
        if i < comptime!(bp.factors()) {
            factors[stage * comptime!(bp.factors()) + i] = parcel.floats[round];
        }
    }
}

/// The values of chunk `c`, or its output gradients.
#[cube]
fn fetch_values<F: Float>(
    parcel: &mut Parcel,
    v: &Rows<F>,
    place: &Place,
    c: usize,
    unit: usize,
    #[comptime] bp: Blueprint,
) {
    let n_h = comptime!(bp.spec.micro_steps);
    let step0 = c * CHUNK;
    let seq = place.seq;
    let mut first = seq.start * n_h + step0;
    let mut last = (place.steps - 1 - step0) as u32;
    if comptime!(bp.pass == Pass::Unwind) {
        let token0 = step0 / n_h;
        first = seq.start + token0;
        parcel.reads = (least((c + 1) * CHUNK / n_h, seq.tokens) - token0) as u32;
        last = (seq.tokens - 1 - token0) as u32;
    }
    let from = (v.at.at32(seq.row, first, place.hv) + place.v0 as u32) / 8;
    // The rows of a transfer, behind the values, write nothing.
    let segments = comptime!(bp.pass == Pass::Segments);
    let channels = comptime!(bp.spec.value_dim).runtime();
    let cols = if comptime!(segments) {
        select(place.v0 < channels, channels - place.v0, 0usize) / 8
    } else {
        (channels - place.v0) / 8
    };
    let source = Source { from, stride: v.at.t / 8, last };
    let values = comptime!(value_rows(bp));
    fetch_rows::<F>(&v.data, source, cols as u32, parcel, unit, values, segments);
}

/// Columns from `cols` on repeat the last one, unless they are to be zeros.
#[cube]
fn fetch_rows<F: Float>(
    src: &Array<Vector<F, V8>>,
    source: Source,
    cols: u32,
    parcel: &mut Parcel,
    unit: usize,
    #[comptime] rows: Part,
    #[comptime] zeros: bool,
) {
    #[unroll]
    for round in 0..comptime!(rows.rounds()) {
        let i = unit as u32 + comptime!((round * rows.group) as u32);
        let row = u32::min(i / comptime!(rows.cols as u32), source.last);
        let col = i % comptime!(rows.cols as u32);
        let at = (source.from + row * source.stride + u32::min(col, cols - 1)) as usize;
        let to = comptime!(rows.first + round);
        if comptime!(zeros) {
            let mut x = Vector::<u32, V4>::cast_from(0u32);
            if col < cols {
                x = Vector::reinterpret(src[at]);
            }
            parcel.units[to] = x;
        } else {
            parcel.units[to] = Vector::reinterpret(src[at]);
        }
    }
}

/// Rows that lie one behind the other.
#[cube]
fn fetch_all<F: Float>(
    src: &Array<Vector<F, V8>>,
    from: usize,
    parcel: &mut Parcel,
    unit: usize,
    #[comptime] rows: Part,
) {
    #[unroll]
    for round in 0..comptime!(rows.rounds()) {
        let i = unit + comptime!(round * rows.group);
        let whole = comptime!((round + 1) * rows.group <= rows.units());
        if known_or(whole, i < comptime!(rows.units())) {
            parcel.units[comptime!(rows.first + round)] = Vector::reinterpret(src[from + i]);
        }
    }
}

#[cube]
fn put_rows<F: Float>(parcel: &Parcel, to: &mut Tile<F>, at: usize, unit: usize, #[comptime] rows: Part) {
    #[unroll]
    for round in 0..comptime!(rows.rounds()) {
        let i = unit as u32 + comptime!((round * rows.group) as u32);
        let row = i / comptime!(rows.cols as u32);
        let col = i % comptime!(rows.cols as u32);
        let whole = comptime!((round + 1) * rows.group <= rows.units());
        if known_or(whole, row < comptime!(rows.rows as u32)) {
            let into = (row * comptime!(rows.ld as u32) + col) as usize;
            to[at + rows.at + into] = Vector::reinterpret(parcel.units[comptime!(rows.first + round)]);
            if known_and(rows.cleared, row >= parcel.reads) {
                to[at + rows.at + into] = Vector::cast_from(0.0f32);
            }
        }
    }
}
