//! Between device memory and the shared memory of `gradients`. All is asked for before any of it is put down.

use cubecl::prelude::*;

use super::super::blueprint::{CHUNK, TILE};
use super::super::tile::{Tile, V8};
use super::blueprint::{
    ALONG_KEYS_AT, ALONG_QUERIES_AT, BLOCK, GradientsBlueprint, KEY_NORMS_AT, PASSES, QUERY_NORMS_AT,
};
use super::here::Here;
use crate::math::{known_and, known_or};
use crate::record::Strides;

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

fn output_gradients(bp: GradientsBlueprint) -> Part {
    let rows = keys(bp).after(bp.d_o_at(), TILE * bp.read_tiles(), bp.spec.value_dim / 8, bp.value_row());
    Part { cleared: true, ..rows }
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

fn parcel_units(bp: GradientsBlueprint) -> usize {
    let last = value_gradients(bp);
    last.first + last.rounds()
}

/// Units that are asked for before one is put down, at most.
const PARCEL: usize = 12;

/// Loads all that the block needs. Behind its end the rows of dO and dV are zeros; others repeat the last one, and beta
/// is 0.
#[cube]
pub(crate) fn load_block<F: Float>(
    tile: &mut Tile<F>,
    q: &Array<Vector<F, V8>>,
    k: &Array<Vector<F, V8>>,
    d_o: &Array<Vector<F, V8>>,
    dv: &Array<Vector<F, V8>>,
    residuals: &Array<Vector<F, V8>>,
    q_at: &Strides,
    k_at: &Strides,
    d_o_at: &Strides,
    dv_at: &Strides,
    here: &Here,
    unit: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    let n_h = comptime!(bp.spec.micro_steps);
    let row = here.row as usize;
    let step = here.step(0u32, n_h);
    let token = here.read(0u32);
    // A block holds a micro-step, but perhaps no read: then the next one stands in.
    let last_read = select(here.reads > 0, here.reads, 1u32) - 1;
    let last = here.steps - 1;
    let value_cols = comptime!(bp.spec.value_dim / 8);
    let chunk = comptime!(CHUNK as u32);
    let rest = select(here.steps > chunk, here.steps - chunk, 0u32);
    let chunk_units = comptime!(CHUNK * bp.spec.value_dim / 8);
    let first = here.head_of(here.chunk) * chunk_units;
    let second = here.head_of(here.chunk + select(rest > 0, 1u32, 0u32)) * chunk_units;
    let last_rest = select(rest > 0, rest, 1u32) - 1;
    let last_first = select(here.steps < chunk, here.steps, chunk) - 1;

    let q0 = q_at.at(row, token, here.h as usize) / 8;
    let k0 = k_at.at(row, step, here.h as usize) / 8;
    let d_o0 = d_o_at.at(row, token, here.hv as usize) / 8;
    let dv0 = dv_at.at(row, step, here.hv as usize) / 8;
    let stride = (value_cols as u32).runtime();
    // A second batch only where few units have much to copy.
    #[unroll]
    for batch in 0..comptime!(parcel_units(bp).div_ceil(PARCEL)) {
        let mut parcel = Array::<Vector<F, V8>>::new(PARCEL);
        let part = comptime!(queries(bp).of(batch));
        send::<F>(&mut parcel, q, q0, q_at.t / 8, last_read, unit, part);
        let part = comptime!(keys(bp).of(batch));
        send::<F>(&mut parcel, k, k0, k_at.t / 8, last, unit, part);
        let part = comptime!(output_gradients(bp).of(batch));
        send::<F>(&mut parcel, d_o, d_o0, d_o_at.t / 8, last_read, unit, part);
        let part = comptime!(residual_rows(bp, 0).of(batch));
        send::<F>(&mut parcel, residuals, first, stride, last_first, unit, part);
        let part = comptime!(residual_rows(bp, 1).of(batch));
        send::<F>(&mut parcel, residuals, second, stride, last_rest, unit, part);
        let part = comptime!(value_gradients(bp).of(batch));
        send::<F>(&mut parcel, dv, dv0, dv_at.t / 8, last, unit, part);

        put::<F>(&parcel, tile, here.reads, unit, comptime!(queries(bp).of(batch)));
        put::<F>(&parcel, tile, here.steps, unit, comptime!(keys(bp).of(batch)));
        put::<F>(&parcel, tile, here.reads, unit, comptime!(output_gradients(bp).of(batch)));
        put::<F>(&parcel, tile, here.steps, unit, comptime!(residual_rows(bp, 0).of(batch)));
        put::<F>(&parcel, tile, rest, unit, comptime!(residual_rows(bp, 1).of(batch)));
        put::<F>(&parcel, tile, here.steps, unit, comptime!(value_gradients(bp).of(batch)));
    }
}

#[cube]
fn send<F: Float>(
    parcel: &mut Array<Vector<F, V8>>,
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
            parcel[comptime!(part.place(round).unwrap())] = src[from + (row * stride + col) as usize];
        }
    }
}

#[cube]
fn put<F: Float>(
    parcel: &Array<Vector<F, V8>>,
    tile: &mut Tile<F>,
    rows: u32,
    unit: usize,
    #[comptime] part: Part,
) {
    #[unroll]
    for round in 0..comptime!(part.rounds()) {
        if comptime!(part.place(round).is_some()) {
            let i = unit as u32 + comptime!((round * part.units) as u32);
            let row = i / comptime!(part.cols as u32);
            let col = i % comptime!(part.cols as u32);
            let full = comptime!((round + 1) * part.units <= part.rows * part.cols);
            if known_or(full, row < comptime!(part.rows as u32)) {
                let to = part.at + (row * comptime!(part.ld as u32) + col) as usize;
                tile[to] = parcel[comptime!(part.place(round).unwrap())];
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
    floats: &SharedMemory<f32>,
    q: &Array<Vector<F, V8>>,
    k: &Array<Vector<F, V8>>,
    dq: &mut Array<Vector<F, V8>>,
    dk: &mut Array<Vector<F, V8>>,
    q_at: &Strides,
    k_at: &Strides,
    dq_at: &Strides,
    dk_at: &Strides,
    here: &Here,
    unit: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    let row = here.row as usize;
    let token = here.read(0u32);
    let step = here.step(0u32, bp.spec.micro_steps);
    let from = q_at.at(row, token, here.h as usize) / 8;
    let to = dq_at.at(row, token, here.hv as usize) / 8;
    let part = comptime!(Part { at: bp.d_o_at(), ld: bp.value_row(), ..queries(bp) });
    let norms = QUERY_NORMS_AT.runtime();
    let along = ALONG_QUERIES_AT.runtime();
    let (s, d) = (q_at.t / 8, dq_at.t / 8);
    take::<F>(tile, floats, q, dq, from, s, to, d, here.reads, norms, along, unit, part, bp);
    let from = k_at.at(row, step, here.h as usize) / 8;
    let to = dk_at.at(row, step, here.hv as usize) / 8;
    let norms = KEY_NORMS_AT.runtime();
    let along = ALONG_KEYS_AT.runtime();
    let (s, d) = (k_at.t / 8, dk_at.t / 8);
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
        take::<F>(tile, floats, k, dk, from, s, to, d, rows, norms + skip, along + skip, unit, part, bp);
    }
}

/// Stores the rows of a part. With a norm they are gradients of normalised rows still; those of the rows x themselves
/// are $\rho (d - \rho^2 x\,(x \cdot d))$.
#[cube]
fn take<F: Float>(
    tile: &Tile<F>,
    floats: &SharedMemory<f32>,
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
