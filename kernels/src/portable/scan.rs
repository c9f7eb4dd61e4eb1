//! One cube per sequence, value head and tile of value channels: the state walks through the chunks.

use cubecl::prelude::*;

use super::blueprint::{Blueprint, PARTS, TILE_ROWS};
use super::tile::{Place, arrived, gather, mma, place, touch, zeros};
use crate::record::{F4, Sequence, StateStrides, Strides, load4, sequence, store4};

/// What a cube of `scan` or `sweep` works on, and which part of it a unit does.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Tile {
    /// The sequence.
    pub(crate) n: usize,
    /// The head among those of the pass, and among all.
    pub(crate) head: usize,
    pub(crate) hv: usize,
    /// The unit's tile in a product.
    pub(crate) place: Place,
    /// The first of the unit's value channels.
    pub(crate) channel: usize,
}

/// Cube `p` takes value tile `p % tiles`, head `first_head + p / tiles % heads` and sequence
/// `p / (tiles * heads)`.
#[cube]
pub(crate) fn tile_of(p: usize, first_head: u32, heads: u32, #[comptime] bp: Blueprint) -> Tile {
    let tiles = comptime!(bp.value_tiles());
    let head = p / tiles % heads as usize;
    let place = place(UNIT_POS as usize, comptime!(bp.tile_rows()), comptime!(bp.tile_cols()));
    Tile {
        n: p / (tiles * heads as usize),
        head,
        hv: first_head as usize + head,
        place,
        channel: p % tiles * bp.value_tile + 4 * place.tx,
    }
}

#[cube]
impl Tile {
    /// The row of a chunk of which this unit gets the sum, where rows of a tile lie `tile_rows` apart; also the first
    /// of the keys that it alone updates.
    pub(crate) fn row(&self, #[comptime] bp: Blueprint) -> usize {
        self.place.ty + self.place.part * comptime!(bp.tile_rows())
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
    let step = comptime!(bp.tile_rows());
    let cols = comptime!(bp.tile_cols());
    let read_rows = comptime!(bp.read_rows());

    let mut state = SharedMemory::<F4>::new(comptime!(bp.padded_key_dim() * cols));
    let mut rows = SharedMemory::<F4>::new(chunk * cols);
    let mut exchange = SharedMemory::<F4>::new(comptime!((PARTS - 1) * chunk * cols));

    let at = tile_of(CUBE_POS, first_head, heads, bp);
    let seq = sequence(table, at.n);
    let steps = seq.tokens * n_h;
    load_state(initial_state, initial_at, at, &mut state, bp.spec.has_initial_state, bp);

    let mut step0 = 0usize;
    let mut id = seq.first_chunk;
    while step0 < steps {
        let here = usize::min(steps - step0, chunk);
        let first_read = step0 / n_h;
        let reads_here = (step0 + here) / n_h - first_read;
        let record = (id * heads as usize + at.head) * comptime!(bp.record_vectors());
        sync_cube();
        let near = touch(scratch_scalars, record, comptime!(bp.kd_at()..bp.factors_at()), bp);

        let mut acc = zeros(comptime!(TILE_ROWS + read_rows));
        let n = solve(
            &mut acc,
            v,
            v_at,
            seq,
            step0,
            scratch,
            record,
            &state,
            &mut rows,
            &mut exchange,
            at,
            here,
            read_rows,
            bp,
        );
        arrived(near, &mut rows, UNIT_POS as usize);
        rows[at.row(bp) * cols + at.place.tx] = n;
        let mut near = 0.0f32;
        if step0 + chunk < steps {
            let next = record + heads as usize * comptime!(bp.record_vectors());
            near = touch(scratch_scalars, next, comptime!(0..bp.kd_at()), bp);
        }
        sync_cube();

        // O = Qg S + P N
        let fours = comptime!(chunk / 4 / PARTS);
        mma(
            &mut acc,
            scratch,
            record + comptime!(bp.p_at()),
            at.place.ty,
            &rows,
            at.place.tx,
            at.place.part * fours,
            TILE_ROWS,
            read_rows,
            step,
            comptime!(bp.reads()),
            fours,
            cols,
            bp.ahead,
        );
        write_state(scratch, scratch_scalars, record, &mut state, &rows, at, bp);
        let read = gather(&acc, &mut exchange, at.place, TILE_ROWS, read_rows, bp);
        let row = at.row(bp);
        if row < reads_here {
            let o_row = o_at.at(seq.row, seq.start + first_read + row, at.hv);
            store4(o, o_row, at.channel, read, bp.spec.value_dim);
        }
        arrived(near, &mut rows, UNIT_POS as usize);
        step0 += chunk;
        id += 1;
    }
    sync_cube();
    store_state(final_state, final_at, at, &state, bp);
}

/// This unit's row of N = T (V - Kg S) (of the backward, R = M (V - Kg S)), and its part of Qg S, `read_rows` rows, in
/// `acc[TILE_ROWS..]`; `acc` must be zero. `rows` is no longer read afterwards.
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
    rows: &mut SharedMemory<F4>,
    exchange: &mut SharedMemory<F4>,
    at: Tile,
    here: usize,
    #[comptime] read_rows: usize,
    #[comptime] bp: Blueprint,
) -> F4 {
    let chunk = comptime!(bp.chunk);
    let step = comptime!(bp.tile_rows());
    let cols = comptime!(bp.tile_cols());
    // [Kg; Qg] S, rows of Kg first.
    let fours = comptime!(bp.padded_key_dim() / 4 / PARTS);
    mma(
        acc,
        scratch,
        record,
        at.place.ty,
        state,
        at.place.tx,
        at.place.part * fours,
        0usize,
        comptime!(TILE_ROWS + read_rows),
        step,
        comptime!(bp.stacked()),
        fours,
        cols,
        bp.ahead,
    );
    let row = at.row(bp);
    let from = v_at.at(seq.row, seq.start * bp.spec.micro_steps + step0 + row, at.hv);
    let value = load4(v, from, at.channel, row < here, bp.spec.value_dim);
    let erased = gather(acc, exchange, at.place, 0usize, TILE_ROWS, bp);
    rows[row * cols + at.place.tx] = value - erased;
    sync_cube();
    let fours = comptime!(chunk / 4 / PARTS);
    let mut tile = zeros(TILE_ROWS);
    mma(
        &mut tile,
        scratch,
        record + comptime!(bp.t_at()),
        at.place.ty,
        rows,
        at.place.tx,
        at.place.part * fours,
        0usize,
        TILE_ROWS,
        step,
        chunk,
        fours,
        cols,
        bp.ahead,
    );
    gather(&tile, exchange, at.place, 0usize, TILE_ROWS, bp)
}

/// S <- gamma S + Kd^T N, a few keys at a time; each unit updates the keys that it alone owns.
#[cube]
pub(crate) fn write_state(
    scratch: &Array<F4>,
    scratch_scalars: &Array<f32>,
    record: usize,
    state: &mut SharedMemory<F4>,
    rows: &SharedMemory<F4>,
    at: Tile,
    #[comptime] bp: Blueprint,
) {
    let step = comptime!(bp.chunk);
    let cols = comptime!(bp.tile_cols());
    let padded = comptime!(bp.padded_key_dim());
    let state_rows = comptime!(bp.state_rows());
    let mut key = at.row(bp);
    while key < padded {
        let mut tile = Array::<F4>::new(state_rows);
        #[unroll]
        for r in 0..state_rows {
            let gamma = scratch_scalars[(record + comptime!(bp.gamma_at())) * 4 + key + r * step];
            tile[r] = state[(key + r * step) * cols + at.place.tx] * F4::new(gamma);
        }
        mma(
            &mut tile,
            scratch,
            record + comptime!(bp.kd_at()),
            key,
            rows,
            at.place.tx,
            0usize,
            0usize,
            state_rows,
            step,
            padded,
            comptime!(bp.chunk / 4),
            cols,
            bp.ahead,
        );
        #[unroll]
        for r in 0..state_rows {
            state[(key + r * step) * cols + at.place.tx] = tile[r];
        }
        key += comptime!(state_rows * step);
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
    let mut key = at.row(bp);
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
        state[key * comptime!(bp.tile_cols()) + at.place.tx] = s;
        key += comptime!(bp.chunk);
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
    let mut key = at.row(bp);
    while key < bp.spec.key_dim {
        let s = state[key * comptime!(bp.tile_cols()) + at.place.tx];
        let row = to_at.row(at.n, at.hv, key);
        #[unroll]
        for e in 0..4usize {
            if at.channel + e < bp.spec.value_dim {
                to[row + (at.channel + e) * to_at.v as usize] = s[e];
            }
        }
        key += comptime!(bp.chunk);
    }
}
