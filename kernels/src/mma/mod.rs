//! One launch on tensor cores.
//!
//! A cube takes a sequence, a value head and a tile of value channels, and walks through the chunks. Some
//! planes, the writers, own the state: it never leaves their registers but for a rounded copy. The others
//! read that copy for the outputs, and prepare the next chunk meanwhile (`prepare.rs`). A chunk has two
//! halves, with a barrier after each:
//!
//! ```text
//!            writers                                 readers
//! first      N = T (V - e^G . K S)                   O = Q S,      Gram matrices of chunk c + 1
//! second     S <- e^{G_C} S + (e^{G_C - G} N)^T K    O += P N,     gates and inverse of chunk c + 1
//! ```
//!
//! Keys, queries and values are on their way two chunks ahead.

mod blueprint;
mod prepare;
mod read;
mod stage;
mod tile;
mod write;

pub use blueprint::{Blueprint, CHUNK};

use cubecl::prelude::barrier::Barrier;
use cubecl::prelude::*;

use crate::record::{StateStrides, Strides, sequence};
use blueprint::{BLOCK_UNITS, FACTORS, STAGES};
use prepare::{Target, finish, gram, new_factors, new_leaves, read_gates};
use read::{read_state, read_writes};
use stage::{Place, StagedStrides, commit, copy_chunk, wait_for};
use tile::{Mma, Tile, V8, zeros};
use write::{load_state, publish_state, publish_writes, store_state, update, writes};

/// Computes o and the final state. Strides of q, k, v and o are multiples of 8, and so are the offsets of
/// their buffers.
///
/// Cube `p` takes value tile `p % tiles`, head `p / tiles % heads` and sequence `p / (tiles * heads)`.
/// Tensors that the blueprint does not mention may be any buffer.
#[cube(launch_unchecked, fast_math = FastMath::all(), address_type = "u64")]
pub fn forward<F: Float, B: Float, G: Float>(
    q: &Array<Vector<F, V8>>,
    k: &Array<Vector<F, V8>>,
    v: &Array<Vector<F, V8>>,
    beta: &Array<B>,
    g: &Array<G>,
    a_log: &Array<f32>,
    dt_bias: &Array<f32>,
    initial_state: &Array<f32>,
    table: &Array<u32>,
    o: &mut Array<Vector<F, V8>>,
    final_state: &mut Array<f32>,
    q_at: Strides,
    k_at: Strides,
    v_at: Strides,
    beta_at: Strides,
    g_at: Strides,
    o_at: Strides,
    initial_at: StateStrides,
    final_at: StateStrides,
    sequences: u32,
    heads: u32,
    group: u32,
    scale: f32,
    lower_bound: f32,
    #[comptime] bp: Blueprint,
    #[define(F, B, G)] _types: [StorageType; 3],
) {
    let tiles = comptime!(bp.value_tiles());
    let cube = CUBE_POS as usize;
    if cube >= (sequences * heads) as usize * tiles {
        terminate!();
    }
    let n = cube / (tiles * heads as usize);
    let seq = sequence(table, n);
    let hv = cube / tiles % heads as usize;
    let steps = seq.tokens * comptime!(bp.spec.micro_steps);
    let place = Place {
        seq,
        n,
        h: hv / group as usize,
        hv,
        v0: cube % tiles * bp.value_tile,
        steps,
        chunks: steps.div_ceil(CHUNK),
    };
    let strides = StagedStrides { q: q_at, k: k_at, v: v_at };
    let stage = comptime!(bp.stage());

    let mut tile = Tile::<F>::new_aligned(comptime!(bp.units_of_memory()), 128usize);
    let mut factors = new_factors();
    let mut leaves = new_leaves();
    let barrier = Barrier::shared(CUBE_DIM, UNIT_POS == 0);
    let mma = Mma::<F>::new(16usize, 8usize, 16usize);
    let lane = (UNIT_POS % 32) as usize;
    let plane = (UNIT_POS / 32) as usize;
    let writers = comptime!(bp.writers());

    #[unroll]
    for c in 0..comptime!(STAGES - 1) {
        copy_chunk::<F>(q, k, v, &strides, &place, c, &mut tile, c * stage, bp);
        if comptime!(c > 0) {
            wait_for(&barrier, c - 1);
        }
        commit(&barrier);
    }

    let blocks = comptime!(bp.blocks_at());
    let chunk_blocks = comptime!(bp.chunk_blocks() * BLOCK_UNITS);
    if plane < writers {
        let mut state = load_state(initial_state, &initial_at, &place, plane, lane, bp);
        publish_state::<F>(&mma, &mut tile, &state, plane, lane, bp);
        let mut buffer = 0usize;
        for c in 0..place.chunks {
            sync_cube();
            let free = select(buffer == 0, STAGES - 1, buffer - 1);
            copy_chunk::<F>(q, k, v, &strides, &place, c + (STAGES - 1), &mut tile, free * stage, bp);
            let base = buffer * stage;
            let factors_at = c % 2 * FACTORS;
            let mut n = writes::<F>(
                &mma,
                &tile,
                &factors,
                &state,
                base,
                blocks + c % 2 * chunk_blocks,
                factors_at,
                plane,
                lane,
                bp,
            );
            publish_writes::<F>(&mma, &mut tile, &n, plane, lane, bp);
            sync_cube();
            update::<F>(&mma, &tile, &factors, &mut state, &mut n, base, factors_at, lane, bp);
            publish_state::<F>(&mma, &mut tile, &state, plane, lane, bp);
            wait_for(&barrier, c + 2);
            commit(&barrier);
            buffer = select(buffer == STAGES - 1, 0usize, buffer + 1);
        }
        store_state(&state, final_state, &final_at, &place, plane, lane, bp);
    } else {
        let reader = plane - writers;
        let raw = read_gates(beta, g, &beta_at, &g_at, &place, 0usize, lane, bp);
        let mut next = read_gates(beta, g, &beta_at, &g_at, &place, 1usize, lane, bp);
        let first = gram::<F>(&mma, &tile, 0usize, reader, lane, bp);
        let to = Target { blocks: blocks.runtime(), factors: 0usize };
        finish::<F>(
            &mma, &mut tile, &mut factors, &mut leaves, &first, &raw, a_log, dt_bias, lower_bound, scale, &place, 0usize, to,
            reader, lane, bp,
        );
        let mut buffer = 0usize;
        for c in 0..place.chunks {
            sync_cube();
            let free = select(buffer == 0, STAGES - 1, buffer - 1);
            copy_chunk::<F>(q, k, v, &strides, &place, c + (STAGES - 1), &mut tile, free * stage, bp);
            let after = select(buffer == STAGES - 1, 0usize, buffer + 1);
            let later = read_gates(beta, g, &beta_at, &g_at, &place, c + 2, lane, bp);
            let base = buffer * stage;
            let mut out = zeros(comptime!(bp.read_tiles()));
            if reader < writers {
                read_state::<F>(&mma, &tile, &mut out, base, reader, lane, bp);
            }
            let products = gram::<F>(&mma, &tile, after * stage, reader, lane, bp);
            sync_cube();
            if reader < writers {
                read_writes::<F>(
                    &mma,
                    &mut tile,
                    &factors,
                    &mut out,
                    o,
                    &o_at,
                    &place,
                    c,
                    base,
                    blocks + c % 2 * chunk_blocks,
                    c % 2 * FACTORS,
                    reader,
                    lane,
                    bp,
                );
            }
            let other = (c + 1) % 2;
            let to = Target { blocks: blocks + other * chunk_blocks, factors: other * FACTORS };
            finish::<F>(
                &mma, &mut tile, &mut factors, &mut leaves, &products, &next, a_log, dt_bias, lower_bound, scale, &place, c + 1,
                to, reader, lane, bp,
            );
            wait_for(&barrier, c + 2);
            commit(&barrier);
            next.beta = later.beta;
            next.g = later.g;
            buffer = after;
        }
    }
}
