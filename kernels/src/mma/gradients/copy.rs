//! Between device memory and the shared memory of `gradients`.

use cubecl::prelude::*;

use super::super::arguments::Rows;
use super::super::blueprint::{CHUNK, TILE};
use super::super::memory::Region;
use super::super::tile::{Tile, V4, V8};
use super::blueprint::{
    ALONG_KEYS_AT, ALONG_QUERIES_AT, BLOCK, GradientsBlueprint, KEY_NORMS_AT, PASSES, QUERY_NORMS_AT,
};
use super::here::Here;
use crate::known::{known_and, known_or};

/// 16-byte units that the cube copies row by row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Part {
    /// Offset in shared memory, and from row to row.
    at: usize,
    ld: usize,
    rows: usize,
    cols: usize,
    /// Units of the cube.
    units: usize,
    /// How many come before the first in all parcels, and the parcel that is filled.
    first: usize,
    batch: usize,
    /// Whether rows behind the end of the block must be zeros; elsewhere those of the last row do no harm.
    cleared: bool,
}

impl Part {
    fn rounds(self) -> usize {
        (self.rows * self.cols).div_ceil(self.units)
    }

    fn after(self, at: usize, rows: usize, cols: usize, ld: usize) -> Self {
        Self {
            at,
            ld,
            rows,
            cols,
            units: self.units,
            first: self.first + self.rounds(),
            batch: 0,
            cleared: false,
        }
    }

    /// What of this part goes with parcel `batch`.
    fn of(self, batch: usize) -> Self {
        Self { batch, ..self }
    }

    /// Place in the parcel.
    fn place(self, round: usize) -> Option<usize> {
        let i = self.first + round;
        (i / PARCEL == self.batch).then_some(i % PARCEL)
    }
}

fn queries(bp: GradientsBlueprint) -> Part {
    let cols = bp.spec.key_dim / 8;
    Part {
        at: bp.raw_queries_at(),
        ld: bp.key_row(),
        rows: TILE * bp.read_tiles(),
        cols,
        units: bp.units(),
        first: 0,
        batch: 0,
        cleared: false,
    }
}

fn keys(bp: GradientsBlueprint) -> Part {
    queries(bp).after(bp.raw_keys_at(), BLOCK, bp.spec.key_dim / 8, bp.key_row())
}

/// A unit's queries and keys, never more than a parcel holds.
fn rows_parcel(bp: GradientsBlueprint) -> usize {
    let last = keys(bp);
    last.first + last.rounds()
}

fn output_gradients(bp: GradientsBlueprint) -> Part {
    let cols = bp.spec.value_dim / 8;
    let rows = TILE * bp.read_tiles();
    Part { at: bp.d_o_at(), ld: bp.value_row(), rows, cols, cleared: true, ..queries(bp) }
}

/// The residuals of chunk `c` of the block.
fn residual_rows(bp: GradientsBlueprint, c: usize) -> Part {
    let first = output_gradients(bp).after(bp.r_at(), CHUNK, bp.spec.value_dim / 8, bp.value_row());
    let rest = first.after(bp.r_at() + CHUNK * bp.value_row(), CHUNK, bp.spec.value_dim / 8, bp.value_row());
    if c == 0 { first } else { rest }
}

fn value_gradients(bp: GradientsBlueprint) -> Part {
    let rows = residual_rows(bp, 1).after(bp.dv_at(), BLOCK, bp.spec.value_dim / 8, bp.value_row());
    Part { cleared: true, ..rows }
}

/// Units that are asked for before one is put down, at most.
const PARCEL: usize = 12;

/// Parcels of values: more than one only where few units have much to copy.
fn batches(bp: GradientsBlueprint) -> usize {
    let last = value_gradients(bp);
    (last.first + last.rounds()).div_ceil(PARCEL)
}

/// A unit's share of rows, on the way. Words: elements of 16 bits the compiler would take apart.
pub(crate) type Parcel = Array<Vector<u32, V4>>;

/// Sends for queries and keys. Behind the end of the block they repeat the last one.
#[cube]
pub(crate) fn send_for_rows<F: Float>(
    q: &Rows<F>,
    k: &Rows<F>,
    here: &Here,
    unit: usize,
    #[comptime] bp: GradientsBlueprint,
) -> Parcel {
    let row = here.row as usize;
    let q0 = q.at.at(row, here.read(0u32), here.h as usize) / 8;
    let k0 = k.at.at(row, here.step(0u32, bp.spec.micro_steps), here.h as usize) / 8;
    let mut parcel = Parcel::new(comptime!(rows_parcel(bp)));
    send::<F>(&mut parcel, &q.data, q0, q.at.t / 8, here.last_read(), unit, comptime!(queries(bp)));
    send::<F>(&mut parcel, &k.data, k0, k.at.t / 8, here.steps - 1, unit, comptime!(keys(bp)));
    parcel
}

/// Puts queries and keys down.
#[cube]
pub(crate) fn put_rows<F: Float>(
    parcel: &Parcel,
    tile: &mut Tile<F>,
    here: &Here,
    unit: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    put::<F>(parcel, tile, here.reads, unit, comptime!(queries(bp)));
    put::<F>(parcel, tile, here.steps, unit, comptime!(keys(bp)));
}

/// Sends for parcel `batch` of output gradients, residuals and the gradients of values.
#[cube]
pub(crate) fn send_for_values<F: Float>(
    d_o: &Rows<F>,
    dv: &Rows<F>,
    residuals: &Array<Vector<F, V8>>,
    here: &Here,
    unit: usize,
    #[comptime] batch: usize,
    #[comptime] bp: GradientsBlueprint,
) -> Parcel {
    let row = here.row as usize;
    let chunk = comptime!(CHUNK as u32);
    let rest = here.rest();
    let chunk_units = comptime!(CHUNK * bp.spec.value_dim / 8);
    let first = here.head_of(here.chunk) * chunk_units;
    let second = here.head_of(here.chunk + select(rest > 0, 1u32, 0u32)) * chunk_units;
    let last_rest = select(rest > 0, rest, 1u32) - 1;
    let last_first = select(here.steps < chunk, here.steps, chunk) - 1;

    let d_o0 = d_o.at.at(row, here.read(0u32), here.hv as usize) / 8;
    let dv0 = dv.at.at(row, here.step(0u32, bp.spec.micro_steps), here.hv as usize) / 8;
    let stride = comptime!((bp.spec.value_dim / 8) as u32).runtime();
    let mut parcel = Parcel::new(PARCEL);
    let part = comptime!(output_gradients(bp).of(batch));
    send::<F>(&mut parcel, &d_o.data, d_o0, d_o.at.t / 8, here.last_read(), unit, part);
    let part = comptime!(residual_rows(bp, 0).of(batch));
    send::<F>(&mut parcel, residuals, first, stride, last_first, unit, part);
    let part = comptime!(residual_rows(bp, 1).of(batch));
    send::<F>(&mut parcel, residuals, second, stride, last_rest, unit, part);
    let part = comptime!(value_gradients(bp).of(batch));
    send::<F>(&mut parcel, &dv.data, dv0, dv.at.t / 8, here.steps - 1, unit, part);
    parcel
}

/// Puts a parcel of values down. Behind the end of the block the rows of dO and dV are zeros; residuals repeat the last
/// one, and beta is 0.
#[cube]
pub(crate) fn put_values<F: Float>(
    parcel: &Parcel,
    tile: &mut Tile<F>,
    here: &Here,
    unit: usize,
    #[comptime] batch: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    put::<F>(parcel, tile, here.reads, unit, comptime!(output_gradients(bp).of(batch)));
    put::<F>(parcel, tile, here.steps, unit, comptime!(residual_rows(bp, 0).of(batch)));
    put::<F>(parcel, tile, here.rest(), unit, comptime!(residual_rows(bp, 1).of(batch)));
    put::<F>(parcel, tile, here.steps, unit, comptime!(value_gradients(bp).of(batch)));
}

/// Loads the values of parcels from `first` on.
#[cube]
pub(crate) fn load_values<F: Float>(
    tile: &mut Tile<F>,
    d_o: &Rows<F>,
    dv: &Rows<F>,
    residuals: &Array<Vector<F, V8>>,
    here: &Here,
    unit: usize,
    #[comptime] first: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    #[unroll]
    for batch in first..comptime!(batches(bp)) {
        let parcel = send_for_values::<F>(d_o, dv, residuals, here, unit, batch, bp);
        put_values::<F>(&parcel, tile, here, unit, batch, bp);
    }
}

#[cube]
fn send<F: Float>(
    parcel: &mut Parcel,
    src: &Array<Vector<F, V8>>,
    from: usize,
    stride: u32,
    last_row: u32,
    unit: usize,
    #[comptime] part: Part,
) {
    #[unroll]
    for round in 0..comptime!(part.rounds()) {
        if comptime!(part.place(round).is_some()) {
            let i = unit as u32 + comptime!((round * part.units) as u32);
            let row = u32::min(i / comptime!(part.cols as u32), last_row);
            let col = i % comptime!(part.cols as u32);
            let to = comptime!(part.place(round).unwrap());
            parcel[to] = Vector::reinterpret(src[from + (row * stride + col) as usize]);
        }
    }
}

#[cube]
fn put<F: Float>(parcel: &Parcel, tile: &mut Tile<F>, rows: u32, unit: usize, #[comptime] part: Part) {
    #[unroll]
    for round in 0..comptime!(part.rounds()) {
        if comptime!(part.place(round).is_some()) {
            let i = unit as u32 + comptime!((round * part.units) as u32);
            let row = i / comptime!(part.cols as u32);
            let col = i % comptime!(part.cols as u32);
            let full = comptime!((round + 1) * part.units <= part.rows * part.cols);
            if known_or(full, row < comptime!(part.rows as u32)) {
                let to = part.at + (row * comptime!(part.ld as u32) + col) as usize;
                tile[to] = Vector::reinterpret(parcel[comptime!(part.place(round).unwrap())]);
                if known_and(part.cleared, row >= rows) {
                    tile[to] = Vector::cast_from(0.0f32);
                }
            }
        }
    }
}

/// Stores dQ and dK, which lie in place of output gradients and keys.
#[cube]
pub(crate) fn store_gradients<F: Float>(
    tile: &Tile<F>,
    floats: &Region<f32>,
    q: &Rows<F>,
    k: &Rows<F>,
    dq: &mut Rows<F>,
    dk: &mut Rows<F>,
    here: &Here,
    unit: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    let row = here.row as usize;
    let token = here.read(0u32);
    let step = here.step(0u32, bp.spec.micro_steps);
    let from = q.at.at(row, token, here.h as usize) / 8;
    let to = dq.at.at(row, token, here.hv as usize) / 8;
    let part = comptime!(Part { at: bp.d_o_at(), ld: bp.value_row(), ..queries(bp) });
    let norms = QUERY_NORMS_AT.runtime();
    let along = ALONG_QUERIES_AT.runtime();
    let (s, d) = (q.at.t / 8, dq.at.t / 8);
    take::<F>(tile, floats, &q.data, &mut dq.data, from, s, to, d, here.reads, norms, along, unit, part, bp);
    let from = k.at.at(row, step, here.h as usize) / 8;
    let to = dk.at.at(row, step, here.hv as usize) / 8;
    let norms = KEY_NORMS_AT.runtime();
    let along = ALONG_KEYS_AT.runtime();
    let (s, d) = (k.at.t / 8, dk.at.t / 8);
    #[unroll]
    for pass in 0..PASSES {
        let each = comptime!(BLOCK / PASSES);
        let (at, ld) = comptime!(bp.dk_at(pass));
        let first = comptime!((pass * BLOCK / PASSES) as u32);
        let at = comptime!(at + pass * (BLOCK / PASSES) * ld);
        let part = comptime!(Part { at, ld, rows: each, ..keys(bp) });
        let rows = u32::min(select(here.steps > first, here.steps - first, 0u32), each as u32);
        let from = from + (first * s) as usize;
        let to = to + (first * d) as usize;
        let skip = comptime!(pass * (BLOCK / PASSES));
        take::<F>(
            tile,
            floats,
            &k.data,
            &mut dk.data,
            from,
            s,
            to,
            d,
            rows,
            norms + skip,
            along + skip,
            unit,
            part,
            bp,
        );
    }
}

/// Stores the rows of a part. With a norm they are gradients of normalised rows still; those of the rows x themselves
/// are $\rho (d - \rho^2 x\,(x \cdot d))$.
#[cube]
fn take<F: Float>(
    tile: &Tile<F>,
    floats: &Region<f32>,
    x: &Array<Vector<F, V8>>,
    to: &mut Array<Vector<F, V8>>,
    x_first: usize,
    x_stride: u32,
    first: usize,
    stride: u32,
    rows: u32,
    norms: usize,
    along: usize,
    unit: usize,
    #[comptime] part: Part,
    #[comptime] bp: GradientsBlueprint,
) {
    // From the last unit on: the places of `put`, found again here, would be kept in registers all along.
    let unit = comptime!(bp.units() - 1) - unit;
    #[unroll]
    for round in 0..comptime!(part.rounds()) {
        let i = unit as u32 + comptime!((round * part.units) as u32);
        let row = i / comptime!(part.cols as u32);
        let col = i % comptime!(part.cols as u32);
        // `rows` is at most the number of the part.
        if row < rows {
            let mut d = tile[part.at + (row * comptime!(part.ld as u32) + col) as usize];
            if comptime!(bp.spec.qk_l2norm) {
                let norm = floats[norms + row as usize];
                let by = norm * norm * floats[along + row as usize];
                let x = Vector::<f32, V8>::cast_from(x[x_first + (row * x_stride + col) as usize]);
                let y = Vector::<f32, V8>::cast_from(d) - x * Vector::cast_from(by);
                d = Vector::cast_from(y * Vector::cast_from(norm));
            }
            to[first + (row * stride + col) as usize] = d;
        }
    }
}
