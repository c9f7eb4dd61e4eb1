//! One cube per sequence, value head and tile of value channels: the state walks through the chunks.

use cubecl::prelude::*;

use super::blueprint::Blueprint;
use super::tile::mma;
use crate::record::{F4, Sequence, StateStrides, Strides, load4, sequence, store4};

/// What a cube of `scan` or `sweep` works on, and which part of it a unit does.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Tile {
    /// The sequence.
    pub(crate) n: usize,
    /// The head among those of the pass, and among all.
    pub(crate) head: usize,
    pub(crate) hv: usize,
    /// The unit's row and its four columns in a tile.
    pub(crate) ty: usize,
    pub(crate) tx: usize,
    /// The first of the unit's value channels.
    pub(crate) channel: usize,
}

/// Cube `p` takes value tile `p % tiles`, head `first_head + p / tiles % heads` and sequence
/// `p / (tiles * heads)`.
#[cube]
pub(crate) fn tile_of(p: usize, first_head: u32, heads: u32, #[comptime] bp: Blueprint) -> Tile {
    let tiles = comptime!(bp.value_tiles());
    let cols = comptime!(bp.tile_cols());
    let head = p / tiles % heads as usize;
    let tx = UNIT_POS as usize % cols;
    Tile {
        n: p / (tiles * heads as usize),
        head,
        hv: first_head as usize + head,
        ty: UNIT_POS as usize / cols,
        tx,
        channel: p % tiles * bp.value_tile + 4 * tx,
    }
}

/// Reads the records of [`prepare`](mod@super::prepare) and writes o and the final state.
/// `scratch_scalars` is `scratch` again.
#[cube(launch_unchecked)]
pub fn scan<F: Float, N: Size>(
    v: &Array<Vector<F, N>>,
    scratch: &Array<F4>,
    scratch_scalars: &Array<f32>,
    initial_state: &Array<f32>,
    table: &Array<u32>,
    o: &mut Array<Vector<F, N>>,
    final_state: &mut Array<f32>,
    v_at: Strides,
    o_at: Strides,
    initial_at: StateStrides,
    final_at: StateStrides,
    sequences: u32,
    first_head: u32,
    heads: u32,
    #[comptime] bp: Blueprint,
    #[define(F)] _type: StorageType,
) {
    if CUBE_POS >= (sequences * heads) as usize * comptime!(bp.value_tiles()) {
        terminate!();
    }
    let chunk = comptime!(bp.chunk);
    let n_h = comptime!(bp.spec.micro_steps);
    let rows = comptime!(bp.tile_rows());
    let cols = comptime!(bp.tile_cols());
    let held = comptime!(bp.unit_rows);
    let read_rows = comptime!(bp.read_rows());

    let mut state = SharedMemory::<F4>::new(comptime!(bp.padded_key_dim() * cols));
    let mut writes = SharedMemory::<F4>::new(chunk * cols);

    let at = tile_of(CUBE_POS, first_head, heads, bp);
    let seq = sequence(table, at.n);
    let steps = seq.tokens * n_h;
    load_state(initial_state, initial_at, at, &mut state, bp.spec.has_initial_state, bp);

    sync_cube();
    let mut step0 = 0usize;
    let mut id = seq.first_chunk;
    while step0 < steps {
        let here = usize::min(steps - step0, chunk);
        let first_read = step0 / n_h;
        let reads_here = (step0 + here) / n_h - first_read;
        let record = (id * heads as usize + at.head) * comptime!(bp.record_vectors());

        let mut acc = Array::<F4>::new(comptime!(held + read_rows));
        solve(&mut acc, v, v_at, seq, step0, scratch, record, &state, &mut writes, at, here, read_rows, bp);
        sync_cube();
        #[unroll]
        for r in 0..held {
            writes[(at.ty + r * rows) * cols + at.tx] = acc[r];
        }
        sync_cube();

        // O = Qg S + P N
        mma(
            &mut acc,
            scratch,
            record + comptime!(bp.p_at()),
            at.ty,
            &writes,
            at.tx,
            held,
            read_rows,
            rows,
            comptime!(bp.reads()),
            chunk,
            cols,
            comptime!(bp.ahead()),
        );
        #[unroll]
        for r in 0..read_rows {
            let row = at.ty + r * rows;
            if row < reads_here {
                let o_row = o_at.at(seq.row, seq.start + first_read + row, at.hv);
                store4(o, o_row, at.channel, acc[held + r], bp.spec.value_dim);
            }
        }
        write_state(scratch, scratch_scalars, record, &mut state, &writes, at, bp);
        sync_cube();
        step0 += chunk;
        id += 1;
    }
    store_state(final_state, final_at, at, &state, bp);
}

/// Leaves N = T (V - Kg S) (of the backward, R = M (V - Kg S)) in `acc[..unit_rows]` and Qg S in `acc[unit_rows..]`, `read_rows` of them.
#[cube]
pub(crate) fn solve<F: Float, N: Size>(
    acc: &mut Array<F4>,
    v: &Array<Vector<F, N>>,
    v_at: Strides,
    seq: Sequence,
    step0: usize,
    scratch: &Array<F4>,
    record: usize,
    state: &SharedMemory<F4>,
    writes: &mut SharedMemory<F4>,
    at: Tile,
    here: usize,
    #[comptime] read_rows: usize,
    #[comptime] bp: Blueprint,
) {
    let chunk = comptime!(bp.chunk);
    let rows = comptime!(bp.tile_rows());
    let cols = comptime!(bp.tile_cols());
    let held = comptime!(bp.unit_rows);
    #[unroll]
    for r in 0..comptime!(held + read_rows) {
        acc[r] = F4::new(0.0f32);
    }
    // [Kg; Qg] S, rows of Kg first.
    mma(
        acc,
        scratch,
        record,
        at.ty,
        state,
        at.tx,
        0usize,
        comptime!(held + read_rows),
        rows,
        comptime!(bp.stacked()),
        comptime!(bp.padded_key_dim()),
        cols,
        comptime!(bp.ahead()),
    );
    #[unroll]
    for r in 0..held {
        let row = at.ty + r * rows;
        let from = v_at.at(seq.row, seq.start * bp.spec.micro_steps + step0 + row, at.hv);
        let value = load4(v, from, at.channel, row < here, bp.spec.value_dim);
        writes[row * cols + at.tx] = value - acc[r];
        acc[r] = F4::new(0.0f32);
    }
    sync_cube();
    mma(
        acc,
        scratch,
        record + comptime!(bp.t_at()),
        at.ty,
        writes,
        at.tx,
        0usize,
        held,
        rows,
        chunk,
        chunk,
        cols,
        comptime!(bp.ahead()),
    );
}

/// S <- gamma S + Kd^T N, a few keys at a time; each unit updates the keys that it alone owns.
#[cube]
pub(crate) fn write_state(
    scratch: &Array<F4>,
    scratch_scalars: &Array<f32>,
    record: usize,
    state: &mut SharedMemory<F4>,
    writes: &SharedMemory<F4>,
    at: Tile,
    #[comptime] bp: Blueprint,
) {
    let rows = comptime!(bp.tile_rows());
    let cols = comptime!(bp.tile_cols());
    let padded = comptime!(bp.padded_key_dim());
    let state_rows = comptime!(bp.state_rows());
    let mut key = at.ty;
    while key < padded {
        let mut tile = Array::<F4>::new(state_rows);
        #[unroll]
        for r in 0..state_rows {
            let gamma = scratch_scalars[(record + comptime!(bp.gamma_at())) * 4 + key + r * rows];
            tile[r] = state[(key + r * rows) * cols + at.tx] * F4::new(gamma);
        }
        mma(
            &mut tile,
            scratch,
            record + comptime!(bp.kd_at()),
            key,
            writes,
            at.tx,
            0usize,
            state_rows,
            rows,
            padded,
            bp.chunk,
            cols,
            comptime!(bp.ahead()),
        );
        #[unroll]
        for r in 0..state_rows {
            state[(key + r * rows) * cols + at.tx] = tile[r];
        }
        key += comptime!(state_rows * rows);
    }
}

/// A state's tile, zero where there is none and beyond K and V.
#[cube]
pub(crate) fn load_state(
    from: &Array<f32>,
    from_at: StateStrides,
    at: Tile,
    state: &mut SharedMemory<F4>,
    #[comptime] given: bool,
    #[comptime] bp: Blueprint,
) {
    let mut key = at.ty;
    while key < comptime!(bp.padded_key_dim()) {
        let mut s = F4::new(0.0f32);
        if comptime!(given) && key < bp.spec.key_dim {
            let row = from_at.row(at.n, at.hv, key);
            #[unroll]
            for e in 0..4usize {
                if at.channel + e < bp.spec.value_dim {
                    s[e] = from[row + (at.channel + e) * from_at.v as usize];
                }
            }
        }
        state[key * comptime!(bp.tile_cols()) + at.tx] = s;
        key += comptime!(bp.tile_rows());
    }
}

/// The reverse of [`load_state`].
#[cube]
pub(crate) fn store_state(
    to: &mut Array<f32>,
    to_at: StateStrides,
    at: Tile,
    state: &SharedMemory<F4>,
    #[comptime] bp: Blueprint,
) {
    let mut key = at.ty;
    while key < bp.spec.key_dim {
        let s = state[key * comptime!(bp.tile_cols()) + at.tx];
        let row = to_at.row(at.n, at.hv, key);
        #[unroll]
        for e in 0..4usize {
            if at.channel + e < bp.spec.value_dim {
                to[row + (at.channel + e) * to_at.v as usize] = s[e];
            }
        }
        key += comptime!(bp.tile_rows());
    }
}
