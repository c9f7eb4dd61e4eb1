//! From device memory to shared memory, without waiting.

use cubecl::prelude::barrier::{Barrier, copy_async};
use cubecl::prelude::*;

use super::blueprint::{BLOCKS, Blueprint, CHUNK, TILE};
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

/// Begins to copy `rows` x `cols` units; row `r` lies at `from + r * stride`. Rows past `last` repeat it, and
/// so do columns past `last_col`: what they hold is never used.
#[cube]
fn copy_rows<F: Float>(
    src: &Array<Vector<F, V8>>,
    from: usize,
    stride: usize,
    last: usize,
    last_col: usize,
    to: &mut Tile<F>,
    at: usize,
    #[comptime] rows: usize,
    #[comptime] cols: usize,
    #[comptime] bp: Blueprint,
) {
    let units = comptime!(bp.units());
    #[unroll]
    for round in 0..comptime!((rows * cols).div_ceil(units)) {
        let i = UNIT_POS as usize + round * units;
        let row = i / cols;
        let col = i % cols;
        let src_row = select(row < last, row, last);
        let src_col = select(col < last_col, col, last_col);
        if comptime!((round + 1) * units <= rows * cols) || i < rows * cols {
            let at_src = from + src_row * stride + src_col;
            let at_dst = at + row * comptime!(cols + 1) + col;
            let row = src.slice(at_src, at_src + 1);
            let mut place = to.slice_mut(at_dst, at_dst + 1);
            copy_async(&row, &mut place, 8u32);
        }
    }
}

/// Begins to copy the keys, queries and values of chunk `c` into the stage at `at`; past the last chunk
/// there is nothing to copy.
#[cube]
pub(crate) fn copy_chunk<F: Float>(
    q: &Array<Vector<F, V8>>,
    k: &Array<Vector<F, V8>>,
    v: &Array<Vector<F, V8>>,
    strides: &StagedStrides,
    place: &Place,
    c: usize,
    to: &mut Tile<F>,
    at: usize,
    #[comptime] bp: Blueprint,
) {
    let n_h = comptime!(bp.spec.micro_steps);
    let key_units = comptime!(bp.spec.key_dim / 8);
    if c < place.chunks {
        let step0 = c * CHUNK;
        let token0 = step0 / n_h;
        let seq = place.seq;
        let last_step = place.steps - 1 - step0;
        let k_from = strides.k.at(seq.row, seq.start * n_h + step0, place.h) / 8;
        copy_rows::<F>(k, k_from, strides.k.t as usize / 8, last_step, key_units, to, at, CHUNK, key_units, bp);
        let q_from = strides.q.at(seq.row, seq.start + token0, place.h) / 8;
        let last_token = seq.tokens - 1 - token0;
        copy_rows::<F>(
            q,
            q_from,
            strides.q.t as usize / 8,
            last_token,
            key_units,
            to,
            at + comptime!(bp.q_at()),
            comptime!(TILE * bp.read_blocks()),
            key_units,
            bp,
        );
        let v_from = (strides.v.at(seq.row, seq.start * n_h + step0, place.hv) + place.v0) / 8;
        copy_rows::<F>(
            v,
            v_from,
            strides.v.t as usize / 8,
            last_step,
            (bp.spec.value_dim - place.v0) / 8 - 1,
            to,
            at + comptime!(bp.v_at()),
            comptime!(TILE * BLOCKS),
            comptime!(bp.value_tile / 8),
            bp,
        );
    }
}

/// Tells the barrier when this unit's copies have landed. Phase `c` of the barrier is chunk `c`.
#[cube]
pub(crate) fn commit(barrier: &Barrier) {
    barrier.commit_copy_async();
    barrier.arrive();
}

/// Waits for the copies of chunk `c`.
#[cube]
pub(crate) fn wait_for(barrier: &Barrier, c: usize) {
    barrier.wait_parity((c % 2) as u32);
}
