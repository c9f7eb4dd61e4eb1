//! The two scans of the backward side by side, on tensor cores.
//!
//! Forwards the states are computed once more; every second one is kept, and the residuals R of all chunks.
//! Backwards runs the gradient of the state (`unwind.rs`); every second one is kept, and all of dV. A cube takes one
//! direction of a sequence, a value head and a tile of value channels; its planes share the work as in
//! [`forward`](mod@super::forward) with prepared chunks.

use cubecl::prelude::*;

use super::arguments::{Kept, Records, Rows, Sizes};
use super::blueprint::{Blueprint, Pass};
use super::fetch::fetch_chunks;
use super::held::begin_reading;
use super::memory::{Region, new_tile, region};
use super::planes::Fetcher;
use super::scan::scan_chunk;
use super::stage::{Place, Turn, place_of_cube, set_aside, take_back};
use super::state::{Lane, keep_state, load_state, store_state};
use super::tile::{Mma, Tile, V8};
use super::unwind::unwind_chunk;
use crate::order::declare_in_order;
use crate::tensors::{States, Strides};

/// Chunks from one state that is kept to the next.
pub const KEPT: usize = 2;

/// The first kept state of sequence `n`. Sequences round up to whole pairs of chunks, each by at most one.
#[cube]
pub(crate) fn first_kept(first_chunk: usize, n: usize, chunks: usize, #[comptime] packed: bool) -> usize {
    if comptime!(packed) { (first_chunk + n) / KEPT } else { n * chunks.div_ceil(KEPT) }
}

/// Reads the records of [`prepare`](mod@super::prepare) for the backward. Writes R, chunk by chunk and head by head,
/// the rounded states before every [`KEPT`] chunks and the gradients of the states behind them, tile by tile, and the
/// gradients of v and of the initial state.
///
/// Cube `p` takes value tile `p % tiles`, head `p / tiles % heads` and sequence `p / (tiles * heads)`, first all of
/// them backwards, which takes longer, then forwards. For arguments see [`forward`](mod@super::forward).
#[cube(launch_unchecked, fast_math = FastMath::all(), address_type = "u64")]
pub fn sweep<F: Float>(
    q: &Rows<F>,
    k: &Rows<F>,
    v: &Rows<F>,
    d_o: &Rows<F>,
    initial_state: &States<f32>,
    d_final_state: &States<f32>,
    table: &Array<u32>,
    records: &Records<F>,
    kept: &mut Kept<F>,
    dv: &mut Rows<F>,
    d_initial_state: &mut States<f32>,
    sizes: Sizes,
    #[comptime] has_d_final_state: bool,
    #[comptime] bp: Blueprint,
    #[define(F)] _type: StorageType,
) {
    let tiles = comptime!(bp.value_tiles());
    let each = (sizes.sequences * sizes.heads) as usize * tiles;
    if CUBE_POS >= 2 * each {
        terminate!();
    }
    let place = place_of_cube(table, CUBE_POS % each, sizes, bp);
    let replay = comptime!(bp.directed(Pass::Replay, bp.spec.has_initial_state));
    let unwind = comptime!(bp.directed(Pass::Unwind, has_d_final_state));
    let regions = comptime!(bp.sweep_regions());
    let mut tile = new_tile::<F>(comptime!(regions.units));
    let mut factors = region::<F, f32>(&tile, comptime!(regions.at[1]));
    let mut aside = region::<F, u32>(&tile, comptime!(regions.at[2]));
    if CUBE_POS < each {
        walk::<F>(
            q,
            k,
            d_o,
            d_final_state,
            records,
            &mut dv.data,
            &dv.at,
            &mut kept.d_states,
            d_initial_state,
            &place,
            &mut tile,
            &mut factors,
            &mut aside,
            unwind,
        );
    } else {
        walk::<F>(
            q,
            k,
            v,
            initial_state,
            records,
            &mut kept.residuals,
            &dv.at,
            &mut kept.states,
            d_initial_state,
            &place,
            &mut tile,
            &mut factors,
            &mut aside,
            replay,
        );
    }
    declare_in_order();
}

/// One direction.
#[cube]
fn walk<F: Float>(
    q: &Rows<F>,
    k: &Rows<F>,
    v: &Rows<F>,
    first_state: &States<f32>,
    records: &Records<F>,
    rows: &mut Array<Vector<F, V8>>,
    rows_at: &Strides,
    kept: &mut Array<Vector<F, V8>>,
    last_state: &mut States<f32>,
    place: &Place,
    tile: &mut Tile<F>,
    factors: &mut Region<f32>,
    aside: &mut Region<u32>,
    #[comptime] bp: Blueprint,
) {
    let mma = Mma::<F>::new(16usize, 8usize, 16usize);
    let lane = (UNIT_POS_X % 32) as usize;
    let plane = (UNIT_POS_X / 32) as usize;
    let scanners = comptime!(bp.scanners());
    let fetcher = Fetcher::new(UNIT_POS_X as usize, bp);
    let groups = comptime!(bp.groups);
    if plane < scanners {
        let at = Lane { plane, lane };
        let mut state = load_state(first_state, place, at, bp);
        if comptime!(bp.pass == Pass::Unwind) {
            set_aside(aside, place);
        }
        // 32 bits, since every register counts in this loop.
        let first = first_kept(place.seq.first_chunk, place.n, place.chunks, bp.packed);
        let first = (first * place.heads + place.hv) as u32;
        let heads = place.heads as u32;
        let chunks = place.chunks as u32;
        #[unroll]
        for _ in 0..groups {
            sync_cube();
        }
        for i in 0..chunks {
            sync_cube();
            let backwards = comptime!(bp.pass == Pass::Unwind);
            let c = if comptime!(backwards) { chunks - 1 - i } else { i };
            let turn = Turn::new(i, bp);
            let within = c % comptime!(KEPT as u32);
            let keeps = if comptime!(backwards) {
                within == comptime!(KEPT as u32 - 1) || i == 0
            } else {
                within == 0
            };
            let reading = begin_reading::<F>(&mma, tile, &state, turn.rows, at, bp);
            if keeps {
                let slot = (first + c / comptime!(KEPT as u32) * heads) as usize;
                let slot = slot * comptime!(bp.spec.value_dim * bp.spec.key_dim / 8);
                keep_state::<F>(&reading.left, kept, slot, place, at, bp);
            }
            if comptime!(bp.pass == Pass::Unwind) {
                unwind_chunk::<F>(&mma, tile, factors, &mut state, reading, turn, c == 0, at, bp);
            } else {
                scan_chunk::<F>(&mma, tile, factors, &mut state, reading, turn, true, at, bp);
            }
        }
        sync_cube();
        if comptime!(bp.pass == Pass::Unwind) {
            store_state(&state, last_state, &take_back(aside, place), at, bp);
        }
    } else if fetcher.works {
        fetch_chunks::<F>(q, k, v, records, rows, rows_at, place, tile, factors, fetcher, bp);
    }
}
