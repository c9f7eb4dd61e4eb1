//! The two scans of the backward, side by side: one cube per direction, sequence, value head and tile of value
//! channels.
//!
//! Forwards the states are computed again, and kept in the records with R; backwards runs the gradient of the
//! state. With dS the gradient of the state after a chunk, and the products of `prepare`:
//!
//! ```text
//! dN = P^T dO + Kd dS      dV = M^T diag(beta) dN      dS <- gamma dS + Qg^T dO - Kg^T dV
//! ```

use cubecl::prelude::*;

use super::blueprint::{Blueprint, PARTS, TILE_ROWS};
use super::scan::{Tile, load_state, solve, store_state, tile_of, write_state};
use super::tile::{arrived, gather, mma_transposed, touch, zeros};
use crate::record::{F4, Sequence, StateStrides, Strides, load4, sequence, store4};

/// Reads the records of [`prepare`](mod@super::prepare); leaves in them the state before and the gradient of the
/// state after every chunk, R and dV, and writes the gradients of v and of the initial state.
/// `scratch_scalars` is `scratch` again. The first half of the cubes goes forwards, the second backwards.
#[cube(launch_unchecked)]
pub fn sweep<F: Float, N: Size>(
    v: &Array<Vector<F, N>>,
    d_o: &Array<Vector<F, N>>,
    scratch: &mut Array<F4>,
    scratch_scalars: &Array<f32>,
    initial_state: &Array<f32>,
    d_final_state: &Array<f32>,
    table: &Array<u32>,
    dv: &mut Array<Vector<F, N>>,
    d_initial_state: &mut Array<f32>,
    v_at: Strides,
    d_o_at: Strides,
    dv_at: Strides,
    initial_at: StateStrides,
    d_final_at: StateStrides,
    d_initial_at: StateStrides,
    sequences: u32,
    first_head: u32,
    heads: u32,
    #[comptime] has_d_final_state: bool,
    #[comptime] bp: Blueprint,
    #[define(F)] _type: StorageType,
) {
    let each = (sequences * heads) as usize * comptime!(bp.value_tiles());
    if CUBE_POS >= 2 * each {
        terminate!();
    }
    let mut state = SharedMemory::<F4>::new(comptime!(bp.padded_key_dim() * bp.tile_cols()));
    let mut rows = SharedMemory::<F4>::new(comptime!(bp.chunk * bp.tile_cols()));
    let mut exchange = SharedMemory::<F4>::new(comptime!((PARTS - 1) * bp.chunk * bp.tile_cols()));
    let at = tile_of(CUBE_POS % each, first_head, heads, bp);
    let seq = sequence(table, at.n);
    if CUBE_POS >= each {
        load_state(d_final_state, d_final_at, at, &mut state, has_d_final_state, bp);
        unwind(
            d_o,
            scratch,
            scratch_scalars,
            &mut state,
            &mut rows,
            &mut exchange,
            dv,
            d_o_at,
            dv_at,
            at,
            seq,
            heads,
            bp,
        );
        store_state(d_initial_state, d_initial_at, at, &state, bp);
    } else {
        load_state(initial_state, initial_at, at, &mut state, bp.spec.has_initial_state, bp);
        replay(v, scratch, scratch_scalars, &mut state, &mut rows, &mut exchange, v_at, at, seq, heads, bp);
    }
}

/// The forward once more, for the states and R.
#[cube]
fn replay<F: Float, N: Size>(
    v: &Array<Vector<F, N>>,
    scratch: &mut Array<F4>,
    scratch_scalars: &Array<f32>,
    state: &mut SharedMemory<F4>,
    rows: &mut SharedMemory<F4>,
    exchange: &mut SharedMemory<F4>,
    v_at: Strides,
    at: Tile,
    seq: Sequence,
    heads: u32,
    #[comptime] bp: Blueprint,
) {
    let n_h = comptime!(bp.spec.micro_steps);
    let row4 = comptime!(bp.row4());
    let steps = seq.tokens * n_h;
    let mut step0 = 0usize;
    let mut id = seq.first_chunk;
    while step0 < steps {
        let here = usize::min(steps - step0, bp.chunk);
        let record = (id * heads as usize + at.head) * comptime!(bp.record_vectors());
        sync_cube();
        let near = touch(scratch_scalars, record, comptime!(bp.kd_at()..bp.p_at()), bp);
        keep_state(scratch, record + comptime!(bp.state_at()), state, at, bp);
        let mut acc = zeros(TILE_ROWS);
        let r = solve(
            &mut acc, v, v_at, seq, step0, scratch, record, state, rows, exchange, at, here, 0usize, bp,
        );
        arrived(near, rows, UNIT_POS as usize);
        let row = at.row(bp);
        scratch[record + comptime!(bp.r_at()) + row * row4 + at.channel / 4] = r;
        // N = diag(beta) R
        let beta = scratch_scalars[4 * (record + comptime!(bp.factors_at())) + row];
        rows[row * comptime!(bp.tile_cols()) + at.place.tx] = r * F4::new(beta);
        let mut near = 0.0f32;
        if step0 + bp.chunk < steps {
            let next = record + heads as usize * comptime!(bp.record_vectors());
            near = touch(scratch_scalars, next, comptime!(0..bp.kd_at()), bp);
        }
        sync_cube();
        write_state(scratch, scratch_scalars, record, state, rows, at, bp);
        arrived(near, exchange, UNIT_POS as usize);
        step0 += bp.chunk;
        id += 1;
    }
}

/// The gradient of the state, from the last chunk to the first. `rows` holds beta dN, then -dV. Tiles have rows that
/// lie next to each other.
#[cube]
fn unwind<F: Float, N: Size>(
    d_o: &Array<Vector<F, N>>,
    scratch: &mut Array<F4>,
    scratch_scalars: &Array<f32>,
    d_state: &mut SharedMemory<F4>,
    rows: &mut SharedMemory<F4>,
    exchange: &mut SharedMemory<F4>,
    dv: &mut Array<Vector<F, N>>,
    d_o_at: Strides,
    dv_at: Strides,
    at: Tile,
    seq: Sequence,
    heads: u32,
    #[comptime] bp: Blueprint,
) {
    let n_h = comptime!(bp.spec.micro_steps);
    let chunk = comptime!(bp.chunk);
    let cols = comptime!(bp.tile_cols());
    let reads = comptime!(bp.reads());
    let padded = comptime!(bp.padded_key_dim());
    let width = comptime!(bp.spec.value_dim);
    let steps = seq.tokens * n_h;
    let chunks = (steps + chunk - 1) / chunk;
    let (ty, tx, part) = (at.place.ty, at.place.tx, at.place.part);
    let row = TILE_ROWS * ty + part;
    for done in 0..chunks {
        let c = chunks - 1 - done;
        let step0 = c * chunk;
        let here = usize::min(steps - step0, chunk);
        let first_read = step0 / n_h;
        let reads_here = (step0 + here) / n_h - first_read;
        let record = ((seq.first_chunk + c) * heads as usize + at.head) * comptime!(bp.record_vectors());

        sync_cube();
        let near = touch(scratch_scalars, record, comptime!(0..bp.kd_at()), bp);
        keep_state(scratch, record + comptime!(bp.d_state_at()), d_state, at, bp);
        // dO lies where sums are exchanged, and is put there once more when it is needed again.
        let from = d_o_at.at(seq.row, seq.start + first_read + row, at.hv);
        let read = load4(d_o, from, at.channel, row < reads_here, width);
        exchange[row * cols + tx] = read;
        sync_cube();

        // diag(beta) dN
        let mut tile = zeros(TILE_ROWS);
        let p = record + comptime!(bp.p_at());
        let each = comptime!(reads.div_ceil(PARTS));
        let last = usize::min((part + 1) * each, reads_here);
        mma_transposed(&mut tile, scratch, p, ty, exchange, 0usize, tx, part * each, last, reads, cols);
        let kd = record + comptime!(bp.kd_at());
        let each = comptime!(padded / PARTS);
        mma_transposed(
            &mut tile,
            scratch,
            kd,
            ty,
            d_state,
            0usize,
            tx,
            part * each,
            (part + 1) * each,
            padded,
            cols,
        );
        sync_cube();
        let d_n = gather(&tile, exchange, at.place, 0usize, TILE_ROWS, bp);
        arrived(near, rows, UNIT_POS as usize);
        let beta = scratch_scalars[4 * (record + comptime!(bp.factors_at())) + row];
        rows[row * cols + tx] = d_n * F4::new(beta);
        let mut near = 0.0f32;
        if c > 0 {
            let next = record - heads as usize * comptime!(bp.record_vectors());
            near = touch(scratch_scalars, next, comptime!(bp.kd_at()..bp.factors_at()), bp);
        }
        sync_cube();

        let mut tile = zeros(TILE_ROWS);
        let m = record + comptime!(bp.t_at());
        let each = comptime!(chunk / PARTS);
        mma_transposed(
            &mut tile,
            scratch,
            m,
            ty,
            rows,
            0usize,
            tx,
            part * each,
            (part + 1) * each,
            chunk,
            cols,
        );
        let d_v = gather(&tile, exchange, at.place, 0usize, TILE_ROWS, bp);
        rows[row * cols + tx] = F4::new(-1.0f32) * d_v;
        scratch[record + comptime!(bp.dv_at()) + row * comptime!(bp.row4()) + at.channel / 4] = d_v;
        if row < here {
            store4(dv, dv_at.at(seq.row, seq.start * n_h + step0 + row, at.hv), at.channel, d_v, width);
        }
        sync_cube();
        exchange[row * cols + tx] = read;
        arrived(near, exchange, chunk * cols + UNIT_POS as usize);
        sync_cube();

        // dS <- gamma dS + Qg^T dO - Kg^T dV, four keys at a time; each unit those that it alone owns.
        let mut block = at.row(bp);
        while block < comptime!(padded / 4) {
            let gamma = scratch[record + comptime!(bp.gamma_at()) + block];
            let mut tile = Array::<F4>::new(TILE_ROWS);
            #[unroll]
            for e in 0..TILE_ROWS {
                tile[e] = d_state[(4 * block + e) * cols + tx] * F4::new(gamma[e]);
            }
            let stacked = comptime!(bp.stacked());
            mma_transposed(&mut tile, scratch, record, block, rows, 0usize, tx, 0usize, chunk, stacked, cols);
            let queries = record + chunk;
            mma_transposed(
                &mut tile, scratch, queries, block, exchange, 0usize, tx, 0usize, reads_here, stacked, cols,
            );
            #[unroll]
            for e in 0..TILE_ROWS {
                d_state[(4 * block + e) * cols + tx] = tile[e];
            }
            block += chunk;
        }
    }
    // A state's tile is stored by other units than have updated it.
    sync_cube();
}

/// Copies the tile of a state into the record.
#[cube]
fn keep_state(
    scratch: &mut Array<F4>,
    to: usize,
    state: &SharedMemory<F4>,
    at: Tile,
    #[comptime] bp: Blueprint,
) {
    let mut key = at.row(bp);
    while key < comptime!(bp.padded_key_dim()) {
        scratch[to + key * comptime!(bp.row4()) + at.channel / 4] =
            state[key * comptime!(bp.tile_cols()) + at.place.tx];
        key += comptime!(bp.chunk);
    }
}
