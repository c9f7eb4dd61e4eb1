//! One cube per sequence, value head and tile of value channels: the state walks through the chunks.

use cubecl::prelude::*;

use super::blueprint::Blueprint;
use super::tile::mma;
use crate::record::{F4, StateStrides, Strides, load4, sequence, store4};

/// Reads the records of [`prepare`](mod@super::prepare) and writes o and the final state.
/// `scratch_scalars` is `scratch` again.
///
/// Cube `p` takes value tile `p % tiles`, head `first_head + p / tiles % heads` and sequence
/// `p / (tiles * heads)`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
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
    let tiles = comptime!(bp.value_tiles());
    if CUBE_POS >= (sequences * heads) as usize * tiles {
        terminate!();
    }
    let chunk = comptime!(bp.chunk);
    let reads = comptime!(bp.reads());
    let n_h = comptime!(bp.spec.micro_steps);
    let rows = comptime!(bp.tile_rows());
    let cols = comptime!(bp.tile_cols());
    let held = comptime!(bp.unit_rows);
    let read_rows = comptime!(bp.read_rows());
    let state_rows = comptime!(bp.state_rows());
    let padded = comptime!(bp.padded_key_dim());

    let mut state = SharedMemory::<F4>::new(padded * cols);
    let mut writes = SharedMemory::<F4>::new(chunk * cols);

    let head = CUBE_POS / tiles % heads as usize;
    let hv = first_head as usize + head;
    let n = CUBE_POS / (tiles * heads as usize);
    let seq = sequence(table, n);
    let steps = seq.tokens * n_h;

    let unit = UNIT_POS as usize;
    let ty = unit / cols;
    let tx = unit % cols;
    let channel = CUBE_POS % tiles * bp.value_tile + 4 * tx;

    let mut key = ty;
    while key < padded {
        let mut s = F4::new(0.0f32);
        if comptime!(bp.spec.has_initial_state) && key < bp.spec.key_dim {
            let at = n * initial_at.n as usize + hv * initial_at.h as usize + key * initial_at.k as usize;
            #[unroll]
            for e in 0..4usize {
                if channel + e < bp.spec.value_dim {
                    s[e] = initial_state[at + (channel + e) * initial_at.v as usize];
                }
            }
        }
        state[key * cols + tx] = s;
        key += rows;
    }

    sync_cube();
    let mut step0 = 0usize;
    let mut id = seq.first_chunk;
    while step0 < steps {
        let here = usize::min(steps - step0, chunk);
        let first_read = step0 / n_h;
        let reads_here = (step0 + here) / n_h - first_read;
        let record = (id * heads as usize + head) * comptime!(bp.record_vectors());

        // [Kg; Qg] S, rows of Kg first.
        let mut acc = Array::<F4>::new(comptime!(held + read_rows));
        #[unroll]
        for r in 0..comptime!(held + read_rows) {
            acc[r] = F4::new(0.0f32);
        }
        mma(
            &mut acc,
            scratch,
            record,
            ty,
            &state,
            tx,
            0usize,
            comptime!(held + read_rows),
            rows,
            comptime!(bp.stacked()),
            padded,
            cols,
        );

        // R = V - Kg S
        #[unroll]
        for r in 0..held {
            let row = ty + r * rows;
            let at = v_at.at(seq.row, seq.start * n_h + step0 + row, hv);
            writes[row * cols + tx] = load4(v, at, channel, row < here, bp.spec.value_dim) - acc[r];
            acc[r] = F4::new(0.0f32);
        }
        sync_cube();

        // N = T R
        mma(
            &mut acc,
            scratch,
            record + comptime!(bp.t_at()),
            ty,
            &writes,
            tx,
            0usize,
            held,
            rows,
            chunk,
            chunk,
            cols,
        );
        sync_cube();
        #[unroll]
        for r in 0..held {
            writes[(ty + r * rows) * cols + tx] = acc[r];
        }
        sync_cube();

        // O = Qg S + P N
        mma(
            &mut acc,
            scratch,
            record + comptime!(bp.p_at()),
            ty,
            &writes,
            tx,
            held,
            read_rows,
            rows,
            reads,
            chunk,
            cols,
        );
        #[unroll]
        for r in 0..read_rows {
            let row = ty + r * rows;
            if row < reads_here {
                let at = o_at.at(seq.row, seq.start + first_read + row, hv);
                store4(o, at, channel, acc[held + r], bp.spec.value_dim);
            }
        }

        // S <- gamma S + Kd^T N, a few keys at a time; each unit updates the keys that it alone owns.
        let mut key = ty;
        while key < padded {
            let mut tile = Array::<F4>::new(state_rows);
            #[unroll]
            for r in 0..state_rows {
                let gamma = scratch_scalars[(record + comptime!(bp.gamma_at())) * 4 + key + r * rows];
                tile[r] = state[(key + r * rows) * cols + tx] * F4::new(gamma);
            }
            mma(
                &mut tile,
                scratch,
                record + comptime!(bp.kd_at()),
                key,
                &writes,
                tx,
                0usize,
                state_rows,
                rows,
                padded,
                chunk,
                cols,
            );
            #[unroll]
            for r in 0..state_rows {
                state[(key + r * rows) * cols + tx] = tile[r];
            }
            key += comptime!(state_rows * rows);
        }
        sync_cube();
        step0 += chunk;
        id += 1;
    }

    let mut key = ty;
    while key < bp.spec.key_dim {
        let s = state[key * cols + tx];
        let at = n * final_at.n as usize + hv * final_at.h as usize + key * final_at.k as usize;
        #[unroll]
        for e in 0..4usize {
            if channel + e < bp.spec.value_dim {
                final_state[at + (channel + e) * final_at.v as usize] = s[e];
            }
        }
        key += rows;
    }
}
