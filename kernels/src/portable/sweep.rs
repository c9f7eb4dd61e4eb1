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

use super::blueprint::Blueprint;
use super::scan::{Tile, load_state, solve, store_state, tile_of, write_state};
use super::tile::mma_transposed;
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
    let mut rows = SharedMemory::<F4>::new(comptime!(bp.stacked() * bp.tile_cols()));
    let backwards = CUBE_POS >= each;
    let at = tile_of(CUBE_POS % each, first_head, heads, bp);
    let seq = sequence(table, at.n);
    if backwards {
        load_state(d_final_state, d_final_at, at, &mut state, has_d_final_state, bp);
        unwind(d_o, scratch, &mut state, &mut rows, dv, d_o_at, dv_at, at, seq, heads, bp);
        store_state(d_initial_state, d_initial_at, at, &state, bp);
    } else {
        load_state(initial_state, initial_at, at, &mut state, bp.spec.has_initial_state, bp);
        replay(v, scratch, scratch_scalars, &mut state, &mut rows, v_at, at, seq, heads, bp);
    }
}

/// The forward once more, for the states and R.
#[cube]
fn replay<F: Float, N: Size>(
    v: &Array<Vector<F, N>>,
    scratch: &mut Array<F4>,
    scratch_scalars: &Array<f32>,
    state: &mut SharedMemory<F4>,
    writes: &mut SharedMemory<F4>,
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
        keep_state(scratch, record + comptime!(bp.state_at()), state, at, bp);
        let mut r = Array::<F4>::new(bp.unit_rows);
        solve(&mut r, v, v_at, seq, step0, scratch, record, state, writes, at, here, 0usize, bp);
        let kept = record + comptime!(bp.r_at()) + at.ty * row4 + at.channel / 4;
        #[unroll]
        for x in 0..bp.unit_rows {
            scratch[kept + x * comptime!(bp.tile_rows() * row4)] = r[x];
        }
        sync_cube();
        // N = diag(beta) R
        let betas = 4 * (record + comptime!(bp.factors_at())) + at.ty;
        #[unroll]
        for x in 0..bp.unit_rows {
            let beta = scratch_scalars[betas + x * comptime!(bp.tile_rows())];
            let row = at.ty + x * comptime!(bp.tile_rows());
            writes[row * comptime!(bp.tile_cols()) + at.tx] = r[x] * F4::new(beta);
        }
        sync_cube();
        write_state(scratch, scratch_scalars, record, state, writes, at, bp);
        step0 += bp.chunk;
        id += 1;
    }
}

/// The gradient of the state, from the last chunk to the first. `rows` holds `[beta dN or -dV; dO]`.
#[cube]
fn unwind<F: Float, N: Size>(
    d_o: &Array<Vector<F, N>>,
    scratch: &mut Array<F4>,
    d_state: &mut SharedMemory<F4>,
    rows: &mut SharedMemory<F4>,
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
    let row4 = comptime!(bp.row4());
    let steps = seq.tokens * n_h;
    let chunks = (steps + chunk - 1) / chunk;
    for done in 0..chunks {
        let c = chunks - 1 - done;
        let step0 = c * chunk;
        let here = usize::min(steps - step0, chunk);
        let first_read = step0 / n_h;
        let reads_here = (step0 + here) / n_h - first_read;
        let record = ((seq.first_chunk + c) * heads as usize + at.head) * comptime!(bp.record_vectors());

        sync_cube();
        keep_state(scratch, record + comptime!(bp.d_state_at()), d_state, at, bp);
        #[unroll]
        for r in 0..comptime!(bp.read_rows()) {
            let row = at.ty + r * comptime!(bp.tile_rows());
            if row < reads_here {
                let from = d_o_at.at(seq.row, seq.start + first_read + row, at.hv);
                rows[(chunk + row) * cols + at.tx] = load4(d_o, from, at.channel, true, width);
            }
        }
        sync_cube();

        // diag(beta) dN
        let mut tile = zeros();
        let p = record + comptime!(bp.p_at());
        mma_transposed(&mut tile, scratch, p, at.ty, rows, chunk, at.tx, reads_here, reads, cols);
        let kd = record + comptime!(bp.kd_at());
        mma_transposed(&mut tile, scratch, kd, at.ty, d_state, 0usize, at.tx, padded, padded, cols);
        let betas = scratch[record + comptime!(bp.factors_at()) + at.ty];
        #[unroll]
        for e in 0..4usize {
            rows[(4 * at.ty + e) * cols + at.tx] = tile[e] * F4::new(betas[e]);
        }
        sync_cube();

        let mut tile = zeros();
        let m = record + comptime!(bp.t_at());
        mma_transposed(&mut tile, scratch, m, at.ty, rows, 0usize, at.tx, chunk, chunk, cols);
        sync_cube();
        let first = 4 * at.ty;
        let kept = record + comptime!(bp.dv_at()) + first * row4 + at.channel / 4;
        let to = dv_at.at(seq.row, seq.start * n_h + step0 + first, at.hv);
        #[unroll]
        for e in 0..4usize {
            rows[(first + e) * cols + at.tx] = F4::new(-1.0f32) * tile[e];
            scratch[kept + e * row4] = tile[e];
            if first + e < here {
                store4(dv, to + e * dv_at.t as usize, at.channel, tile[e], width);
            }
        }
        sync_cube();

        // dS <- gamma dS + [-Kg; Qg]^T [dV; dO], four keys at a time; each unit those that it alone owns.
        let mut block = at.ty;
        while block < comptime!(padded / 4) {
            let gamma = scratch[record + comptime!(bp.gamma_at()) + block];
            let mut tile = Array::<F4>::new(4usize);
            #[unroll]
            for e in 0..4usize {
                tile[e] = d_state[(4 * block + e) * cols + at.tx] * F4::new(gamma[e]);
            }
            mma_transposed(
                &mut tile,
                scratch,
                record,
                block,
                rows,
                0usize,
                at.tx,
                chunk + reads_here,
                comptime!(bp.stacked()),
                cols,
            );
            #[unroll]
            for e in 0..4usize {
                d_state[(4 * block + e) * cols + at.tx] = tile[e];
            }
            block += comptime!(bp.tile_rows());
        }
    }
    // A state's tile is stored by other units than have updated it.
    sync_cube();
}

#[cube]
fn zeros() -> Array<F4> {
    let mut tile = Array::<F4>::new(4usize);
    #[unroll]
    for e in 0..4usize {
        tile[e] = F4::new(0.0f32);
    }
    tile
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
    let mut key = at.ty;
    while key < comptime!(bp.padded_key_dim()) {
        scratch[to + key * comptime!(bp.row4()) + at.channel / 4] =
            state[key * comptime!(bp.tile_cols()) + at.tx];
        key += comptime!(bp.tile_rows());
    }
}
