//! The delta rule on tensor cores, in one launch, two or four.
//!
//! A cube of [`forward`](mod@forward) takes a sequence, a value head and a tile of value channels, and walks through the
//! chunks. Some planes hold the state, which never leaves their registers, and take it through chunk c (`scan.rs`); the
//! others meanwhile prepare chunk c + 1 (`chunk.rs`), fetch the inputs of chunk c + 2 and store the outputs of chunk
//! c - 1 (`stage.rs`). One barrier separates the chunks.
//!
//! ```text
//! prepare   T, E, P from K K^T, Q K^T, the gates and beta
//! scan      N = T (V - e^G . K S)     O = e^G . Q S + P N     S <- e^{G_C} S + (e^{G_C - G} N)^T K
//! ```
//!
//! Where several cubes share a head, and for gates per channel (`channel`), launches of [`prepare`] do its part for all
//! chunks beforehand, and the other planes only fetch and store.
//!
//! Where long sequences have few heads they are split into segments ([`Pass`]). Rows of $S^T$ (value channels) do not
//! know of each other, and a chunk takes each through the same affine map: a segment is $S^T \leftarrow S^T A + N^T$.
//!
//! ```text
//! forward   for each segment with another one behind it, V rows from zero: N^T, and K rows from I with values of zero: A
//! combine   S_0 the initial state      S_{i+1}^T = S_i^T A_i + N_i^T, in f32
//! forward   every segment from its S_i
//! ```
//!
//! The three read the same records: segments end between chunks.

pub mod arguments;
mod beside;
mod blueprint;
mod channel;
mod chunk;
pub mod combine;
mod fetch;
mod gates;
pub mod gradients;
mod gram;
mod held;
mod inverse;
mod memory;
mod parcel;
mod planes;
pub mod prepare;
mod scan;
mod stage;
mod state;
pub mod sweep;
mod tile;
mod unwind;

pub use blueprint::{Blueprint, CHUNK, Pass, TILE};

use cubecl::prelude::*;

use crate::known::{known_and, known_or};
use crate::order::declare_in_order;
use crate::tensors::{Gating, States};
use arguments::{Records, Rows, Sizes};
use beside::prepare_chunks;
use fetch::fetch_chunks;
use memory::{new_tile, region};
use planes::Fetcher;
use scan::scan_chunks;
use stage::{place_of_cube, place_of_segment, set_aside, take_back};
use state::{Lane, load_state, store_state};
use tile::{Mma, V2};

/// Computes o and the final state.
///
/// Cube `p` takes value tile `p % tiles`, head `p / tiles % heads` and sequence `p / (tiles * heads)`.
/// Tensors that the blueprint does not mention may be any buffer.
///
/// Where sequences are split, the table lists `segments` in place of sequences: first the last one of each sequence,
/// which leaves its final state, then the inner ones, of which alone the transfer is taken, if `transfer` is 1. They lie
/// along y, tiles and heads along x.
#[cube(launch_unchecked, fast_math = FastMath::all(), address_type = "u64")]
pub fn forward<F: Float, B: Float, G: Float>(
    q: &Rows<F>,
    k: &Rows<F>,
    v: &Rows<F>,
    gating: &Gating<B, G>,
    initial_state: &States<f32>,
    table: &Array<u32>,
    records: &Records<F>,
    o: &mut Rows<F>,
    final_state: &mut States<f32>,
    sizes: Sizes,
    segments: u32,
    transfer: u32,
    scale: f32,
    #[comptime] bp: Blueprint,
    #[define(F, B, G)] _types: [StorageType; 3],
) {
    let transfer = known_and(bp.pass == Pass::Segments, transfer != 0);
    let place = if comptime!(bp.pass == Pass::Segments) {
        place_of_segment(table, sizes, segments, transfer, bp)
    } else {
        if CUBE_POS >= (sizes.sequences * sizes.heads) as usize * comptime!(bp.value_tiles()) {
            terminate!();
        }
        place_of_cube(table, CUBE_POS, sizes, bp)
    };

    let regions = comptime!(bp.forward_regions());
    let mut tile = new_tile::<F>(comptime!(regions.units));
    let mut factors = region::<F, f32>(&tile, comptime!(regions.at[1]));
    let mut aside = region::<F, u32>(&tile, comptime!(regions.at[2]));
    let mut leaves = region::<F, Vector<f32, V2>>(&tile, comptime!(regions.at[3]));
    let mma = Mma::<F>::new(16usize, 8usize, 16usize);
    let lane = (UNIT_POS_X % 32) as usize;
    let plane = (UNIT_POS_X / 32) as usize;
    let scanners = comptime!(bp.scanners());
    let fetcher = Fetcher::new(UNIT_POS_X as usize, bp);
    if plane < scanners {
        let at = Lane { plane, lane };
        let mut state = load_state(initial_state, &place, at, bp);
        set_aside(&mut aside, &place);
        scan_chunks::<F>(&mma, &mut tile, &factors, &mut state, &place, at, bp);
        let place = take_back(&aside, &place);
        if known_or(bp.pass != Pass::Segments, transfer || place.n < sizes.sequences as usize) {
            store_state(&state, final_state, &place, at, bp);
        }
    } else if fetcher.works {
        if comptime!(bp.prepared) {
            fetch_chunks::<F>(
                q,
                k,
                v,
                records,
                &mut o.data,
                &o.at,
                &place,
                &mut tile,
                &mut factors,
                fetcher,
                bp,
            );
        } else {
            prepare_chunks::<F, B, G>(
                &mma,
                q,
                k,
                v,
                gating,
                records,
                o,
                &place,
                &mut tile,
                &mut factors,
                &mut leaves,
                fetcher,
                scale,
                bp,
            );
        }
    }
    declare_in_order();
}
