//! The chunk that a cube of `gradients` works on, and its rows of q, k and decays in shared memory.

use cubecl::prelude::*;

use super::blueprint::{Blueprint, SLICE, SLICE_LD, SLICE4};
use crate::math::decays_of;
use crate::record::{F4, load, load_gates, sequence};
use crate::tensors::{GateFormula, Strided};

/// The chunk that a cube works on.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Chunk {
    /// Row of the batch.
    pub(crate) row: usize,
    /// First token of the sequence.
    pub(crate) start: usize,
    /// First micro-step of the chunk, in its sequence.
    pub(crate) step0: usize,
    /// Micro-steps in the chunk.
    pub(crate) rows: usize,
}

/// Chunk `id` of the table.
#[cube]
pub(crate) fn chunk_of(table: &Array<u32>, id: usize, sequences: u32, #[comptime] bp: Blueprint) -> Chunk {
    let seq = sequence(table, table[4 * sequences as usize + id] as usize);
    let step0 = (id - seq.first_chunk) * bp.chunk;
    let rows = usize::min(seq.tokens * bp.spec.micro_steps - step0, bp.chunk);
    Chunk { row: seq.row, start: seq.start, step0, rows }
}

/// Slice `s` of the chunk's keys and, in the rows where a token ends, of its queries.
#[cube]
pub(crate) fn load_qk<F: Float, N: Size>(
    q: &Strided<Vector<F, N>>,
    k: &Strided<Vector<F, N>>,
    queries: &mut SharedMemory<F4>,
    keys: &mut SharedMemory<F4>,
    here: Chunk,
    h: usize,
    s: usize,
    q_rstd: &SharedMemory<f32>,
    k_rstd: &SharedMemory<f32>,
    #[comptime] bp: Blueprint,
) {
    let n_h = comptime!(bp.spec.micro_steps);
    let mut x = UNIT_POS as usize;
    while x < comptime!(bp.chunk * SLICE4) {
        let row = x / SLICE4;
        let c = x % SLICE4;
        let channel = s * SLICE + 4 * c;
        let step = here.step0 + row;
        let valid = row < here.rows;
        let k_row = k.at.at(here.row, here.start * n_h + step, h);
        let key = load(&k.data, k_row, channel, valid, bp.spec.key_dim);
        keys[row * SLICE_LD + c] = key * F4::new(k_rstd[row]);
        let is_read = valid && (step + 1) % n_h == 0;
        let q_row = q.at.at(here.row, here.start + step / n_h, h);
        let query = load(&q.data, q_row, channel, is_read, bp.spec.key_dim);
        queries[row * SLICE_LD + c] = query * F4::new(q_rstd[row]);
        x += bp.chunk_units();
    }
}

/// Slice `s` of the chunk's decays: $e^g$ where a token begins, 1 elsewhere.
#[cube]
pub(crate) fn load_decays<G: Float>(
    g: &Strided<G>,
    formula: &GateFormula,
    decays: &mut SharedMemory<F4>,
    here: Chunk,
    hv: usize,
    s: usize,
    #[comptime] bp: Blueprint,
) {
    let n_h = comptime!(bp.spec.micro_steps);
    let mut x = UNIT_POS as usize;
    while x < comptime!(bp.chunk * SLICE4) {
        let row = x / SLICE4;
        let c = x % SLICE4;
        let step = here.step0 + row;
        let starts = row < here.rows && step % n_h == 0;
        let from = g.at.at(here.row, here.start + step / n_h, hv);
        let channel = s * SLICE + 4 * c;
        let gates = load_gates(&g.data, from, channel, starts, bp.spec.key_dim);
        decays[row * SLICE_LD + c] = decays_of(gates, formula, hv, channel, starts, bp.spec);
        x += bp.chunk_units();
    }
}
