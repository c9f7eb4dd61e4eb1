//! What a cube takes, and where a stage of shared memory has it.

use cubecl::prelude::*;

use super::arguments::{Rows, Sizes};
use super::blueprint::{BLOCK_UNITS, Blueprint, CHUNK, Pass, TILE};
use super::chunk::Target;
use super::memory::Region;
use super::tile::{Tile, V8};
use crate::known::known_or;
use crate::record::{Sequence, sequence};

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
    /// Whether only the transfer of a segment is taken.
    pub(crate) transfer: bool,
}

#[cube]
impl Place {
    /// Whether queries are read and outputs left. The transfer of a segment has none.
    pub(crate) fn reads(&self, #[comptime] bp: Blueprint) -> bool {
        known_or(bp.pass != Pass::Segments, !self.transfer)
    }
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

/// Sequence `n`, value head `hv` of `heads` with its key head `h`, and the rows of $S^T$ from `v0` on.
#[cube]
pub(crate) fn place_of(
    table: &Array<u32>,
    n: usize,
    h: usize,
    hv: usize,
    v0: usize,
    sizes: Sizes,
    transfer: bool,
    #[comptime] bp: Blueprint,
) -> Place {
    let seq = sequence_of(table, n, sizes.tokens, bp.packed, bp.spec.micro_steps);
    let steps = seq.tokens * comptime!(bp.spec.micro_steps);
    Place { seq, n, h, hv, heads: sizes.heads as usize, v0, steps, chunks: steps.div_ceil(CHUNK), transfer }
}

/// Value tile `cube % tiles`, head `cube / tiles % heads` and sequence `cube / (tiles * heads)`.
#[cube]
pub(crate) fn place_of_cube(
    table: &Array<u32>,
    cube: usize,
    sizes: Sizes,
    #[comptime] bp: Blueprint,
) -> Place {
    let tiles = comptime!(bp.value_tiles());
    let n = cube / (tiles * sizes.heads as usize);
    let hv = cube / tiles % sizes.heads as usize;
    place_of(table, n, hv / sizes.group as usize, hv, cube % tiles * bp.value_tile, sizes, false, bp)
}

/// Which sequence or segment of the launch a cube takes, where these lie along y, then z.
#[cube]
pub(crate) fn along_y() -> u32 {
    CUBE_POS_Z * CUBE_COUNT_Y + CUBE_POS_Y
}

/// A segment along y, with `transfer` an inner one, and along x tile `x % tiles` of head `x / tiles`. How many tiles there
/// are depends on `transfer`: numbers of cubes in 64 bits would be divided by what the compiler doesn't know, in calls whose
/// results are spilled.
#[cube]
pub(crate) fn place_of_segment(
    table: &Array<u32>,
    sizes: Sizes,
    segments: u32,
    transfer: bool,
    #[comptime] bp: Blueprint,
) -> Place {
    let tiles = comptime!(bp.value_tiles() as u32);
    let mut n = along_y();
    let mut tile = CUBE_POS_X % tiles;
    let mut hv = CUBE_POS_X / tiles;
    if transfer {
        let tiles = comptime!(bp.transfer_tiles() as u32);
        n += sizes.sequences;
        tile = CUBE_POS_X % tiles;
        hv = CUBE_POS_X / tiles;
    }
    if n >= segments {
        terminate!();
    }
    let v0 = tile as usize * bp.value_tile;
    place_of(table, n as usize, (hv / sizes.group) as usize, hv as usize, v0, sizes, transfer, bp)
}

/// Sets those words of a place aside that are wanted again when the scan is over, for all planes that pass a barrier before
/// they take them back. Registers that its loop has no use for are what `ptxas` spills to make room for one more cube.
#[cube]
pub(crate) fn set_aside(aside: &mut Region<u32>, place: &Place) {
    if UNIT_POS_X == 0 {
        aside[0] = place.n as u32;
        aside[1] = place.hv as u32;
        aside[2] = place.v0 as u32;
    }
}

/// The place as it was.
#[cube]
pub(crate) fn take_back(aside: &Region<u32>, place: &Place) -> Place {
    let mut place = *place;
    place.n = aside[0] as usize;
    place.hv = aside[1] as usize;
    place.v0 = aside[2] as usize;
    place
}

/// What a scan takes in one turn, and where it lies in shared memory.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Turn {
    /// First unit of the chunk's rows.
    pub(crate) rows: usize,
    /// Its blocks and factors.
    pub(crate) from: Target,
    /// First unit of its outputs, which have two places in turn.
    pub(crate) outputs: usize,
}

#[cube]
impl Turn {
    /// The `i`th turn. 32 bits, since every register counts in the loop of a scan.
    pub(crate) fn new(i: u32, #[comptime] bp: Blueprint) -> Self {
        let stage = (i % comptime!(bp.stages() as u32)) as usize;
        let from = Target::of_stage(stage, bp);
        let outputs = comptime!(bp.outputs_at()) + (i % 2) as usize * comptime!(bp.outputs());
        Turn { rows: stage * comptime!(bp.stage()), from, outputs }
    }
}

/// 16-byte units that a group copies row by row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Part {
    /// Offset in the stage, and from row to row.
    pub(crate) at: usize,
    pub(crate) ld: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// Place of the first in the parcel.
    pub(crate) first: usize,
    /// Units of the group.
    pub(crate) group: usize,
    /// Whether rows may be missing, and are zeros then.
    pub(crate) cleared: bool,
}

impl Part {
    pub(crate) fn rounds(self) -> usize {
        (self.rows * self.cols).div_ceil(self.group)
    }

    fn after(self, at: usize, rows: usize, cols: usize, ld: usize) -> Self {
        Self { at, ld, rows, cols, first: self.first + self.rounds(), group: self.group, cleared: false }
    }

    pub(crate) fn units(self) -> usize {
        self.rows * self.cols
    }
}

pub(crate) fn key_rows(bp: Blueprint) -> Part {
    Part {
        at: 0,
        ld: bp.key_row(),
        rows: CHUNK,
        cols: bp.spec.key_dim / 8,
        first: 0,
        group: bp.group_units(),
        cleared: false,
    }
}

pub(crate) fn query_rows(bp: Blueprint) -> Part {
    key_rows(bp).after(bp.q_at(), TILE * bp.read_blocks(), bp.spec.key_dim / 8, bp.key_row())
}

/// Values, or output gradients in their place.
pub(crate) fn value_rows(bp: Blueprint) -> Part {
    let unwinds = bp.pass == Pass::Unwind;
    let rows = if unwinds { TILE * bp.read_blocks() } else { CHUNK };
    let rows = query_rows(bp).after(bp.v_at(), rows, bp.value_tile / 8, bp.value_row());
    Part { cleared: unwinds, ..rows }
}

pub(crate) fn decayed_key_rows(bp: Blueprint) -> Part {
    let rows = if bp.by_channel() { CHUNK } else { 0 };
    value_rows(bp).after(bp.kd_at(), rows, bp.spec.key_dim / 8, bp.key_row())
}

/// Blocks are rows without padding.
pub(crate) fn block_rows(bp: Blueprint) -> Part {
    let rows = if bp.prepared { bp.chunk_blocks() } else { 0 };
    decayed_key_rows(bp).after(bp.blocks_at(), rows, BLOCK_UNITS, BLOCK_UNITS)
}

/// Rows of a tensor in device memory, in units of 16 bytes.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Source {
    /// The first row.
    pub(crate) from: u32,
    /// From row to row.
    pub(crate) stride: u32,
    /// The last row of the sequence. Those behind it repeat it: what they hold is never used.
    pub(crate) last: u32,
}

/// The keys of chunk `c`.
#[cube]
pub(crate) fn keys_of<F: Float>(k: &Rows<F>, place: &Place, c: usize, #[comptime] bp: Blueprint) -> Source {
    let step0 = c * CHUNK;
    let from =
        k.at.at32(place.seq.row, place.seq.start * comptime!(bp.spec.micro_steps) + step0, place.h) / 8;
    Source { from, stride: k.at.t / 8, last: (place.steps - 1 - step0) as u32 }
}

/// The queries of chunk `c`.
#[cube]
pub(crate) fn queries_of<F: Float>(
    q: &Rows<F>,
    place: &Place,
    c: usize,
    #[comptime] bp: Blueprint,
) -> Source {
    let token0 = c * CHUNK / comptime!(bp.spec.micro_steps);
    let from = q.at.at32(place.seq.row, place.seq.start + token0, place.h) / 8;
    Source { from, stride: q.at.t / 8, last: (place.seq.tokens - 1 - token0) as u32 }
}

/// The chunk that the scan takes as its `c`th: backwards, the last one first.
#[cube]
pub(crate) fn turn(place: &Place, c: usize, #[comptime] bp: Blueprint) -> usize {
    if comptime!(bp.pass == Pass::Unwind) { place.chunks - 1 - c } else { c }
}

/// Stores the first `end` rows of those that lie at `at`. All are read before the first is stored: behind a branch each
/// store would wait for its own.
#[cube]
pub(crate) fn store_rows<F: Float>(
    tile: &Tile<F>,
    at: usize,
    out: &mut Array<Vector<F, V8>>,
    to: u32,
    stride: u32,
    end: u32,
    place: &Place,
    unit: usize,
    #[comptime] bp: Blueprint,
) {
    let cols = comptime!((bp.value_tile / 8) as u32);
    let units = comptime!(bp.storing_units());
    let rounds = comptime!((bp.output_rows() * bp.value_tile / 8).div_ceil(units));
    let last = comptime!(bp.output_rows() as u32 - 1);
    let mut rows = Array::<Vector<F, V8>>::new(rounds);
    #[unroll]
    for round in 0..rounds {
        let i = unit as u32 + comptime!((round * units) as u32);
        let row = u32::min(i / cols, last);
        rows[round] = tile[at + (row * comptime!(bp.value_row() as u32) + i % cols) as usize];
    }
    #[unroll]
    for round in 0..rounds {
        let i = unit as u32 + comptime!((round * units) as u32);
        let row = i / cols;
        let col = i % cols;
        let whole = comptime!(bp.spec.value_dim.is_multiple_of(bp.value_tile));
        let inside = known_or(whole, place.v0 + 8 * (col as usize) < bp.spec.value_dim);
        // `end` is at most the number of rows, so that no index runs over.
        if row < end && inside {
            out[(to + row * stride + col) as usize] = rows[round];
        }
    }
}

/// Integers of different widths have no common minimum in CUDA.
#[cube]
pub(crate) fn least(a: usize, b: usize) -> usize {
    select(a < b, a, b)
}
