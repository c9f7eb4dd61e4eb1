//! What all cubes that share a head need of a chunk, by a launch of its own.

use cubecl::prelude::*;

use super::arguments::{Records, Rows, Sizes};
use super::blueprint::{BLOCK_UNITS, Blueprint, PREPARE_PLANES};
use super::channel::{Partial, Slice, leave_levels, leave_rows, read_share};
use super::chunk::{Target, finish, finish_all};
use super::gates::{Raw, gates_of, read_beta, read_gates};
use super::gram::products_of_chunk;
use super::memory::{Region, new_tile, region};
use super::stage::{Place, place_of};
use super::tile::{Mma, V2, V4};
use crate::order::declare_in_order;
use crate::tensors::Gating;

/// Chunk `id / heads` of all sequences and head `id % heads`: its place, and which chunk of its sequence it is.
#[cube]
fn place_of_record(
    table: &Array<u32>,
    id: u32,
    sizes: Sizes,
    chunks: u32,
    #[comptime] bp: Blueprint,
) -> (Place, usize) {
    let chunk = id / sizes.heads;
    let hv = (id % sizes.heads) as usize;
    let n = if comptime!(bp.packed) {
        table[(4 * sizes.sequences + chunk) as usize] as usize
    } else {
        (chunk / (chunks / sizes.sequences)) as usize
    };
    let place = place_of(table, n, hv / sizes.group as usize, hv, 0usize, sizes, false, bp);
    (place, chunk as usize - place.seq.first_chunk)
}

/// Prepares every chunk where there is one gate per head, or none: a record of blocks, and one of factors, for each chunk
/// and value head. Every plane takes one of them by itself. For arguments see [`forward`](mod@super::forward).
#[cube(launch_unchecked, fast_math = FastMath::all(), address_type = "u64")]
pub fn prepare<F: Float, B: Float, G: Float>(
    q: &Rows<F>,
    k: &Rows<F>,
    gating: &Gating<B, G>,
    table: &Array<u32>,
    records: &mut Records<F>,
    sizes: Sizes,
    chunks: u32,
    scale: f32,
    #[comptime] bp: Blueprint,
    #[define(F, B, G)] _types: [StorageType; 3],
) {
    let lane = UNIT_POS_X as usize % 32;
    let plane = UNIT_POS_X as usize / 32;
    // 32 bits, in which division is fast: there is no room for more records.
    let id = CUBE_POS as u32 * comptime!(PREPARE_PLANES as u32) + plane as u32;
    if id >= chunks * sizes.heads {
        terminate!();
    }
    let (place, c) = place_of_record(table, id, sizes, chunks, bp);
    let regions = comptime!(bp.prepare_regions());
    let mut tile = new_tile::<F>(comptime!(regions.units));
    let mut factors = region::<F, f32>(&tile, comptime!(regions.at[1]));
    let mut leaves = region::<F, Vector<f32, V2>>(&tile, comptime!(regions.at[2]));
    let mma = Mma::<F>::new(16usize, 8usize, 16usize);

    let products = products_of_chunk::<F>(&mma, q, k, &place, c, lane, bp);
    // Any earlier, and exponentials of gates would take registers beside the products.
    let raw = read_gates::<B, G>(gating, &place, c, lane, bp);
    let gates = gates_of(&raw, &gating.formula, &place, c, lane, bp);
    let to = Target::of_plane(plane, bp);
    finish_all::<F>(&mma, &mut tile, &mut factors, &mut leaves, &products, &gates, scale, c, to, lane, bp);
    sync_plane();
    let record = id as usize * comptime!(bp.record().0) + lane;
    #[unroll]
    for i in 0..comptime!(bp.chunk_blocks()) {
        records.blocks[record + comptime!(i * BLOCK_UNITS)] =
            tile[to.blocks + comptime!(i * BLOCK_UNITS) + lane];
    }
    leave_factors(&factors, to, &mut records.factors, id, lane, 32usize, bp);
    declare_in_order();
}

/// The same for gates per channel, a cube for each chunk and head: rows decayed to the start and the end of their chunk are
/// part of the record. Strides of g are multiples of 4, and so is the offset of its buffer.
#[cube(launch_unchecked, fast_math = FastMath::all(), address_type = "u64")]
pub fn prepare_by_channel<F: Float, B: Float, G: Float>(
    q: &Rows<F>,
    k: &Rows<F>,
    gating: &Gating<B, Vector<G, V4>>,
    table: &Array<u32>,
    records: &mut Records<F>,
    sizes: Sizes,
    chunks: u32,
    scale: f32,
    #[comptime] bp: Blueprint,
    #[define(F, B, G)] _types: [StorageType; 3],
) {
    let id = CUBE_POS as u32;
    if id >= chunks * sizes.heads {
        terminate!();
    }
    let (place, c) = place_of_record(table, id, sizes, chunks, bp);
    let regions = comptime!(bp.prepare_by_channel_regions());
    let mut tile = new_tile::<F>(comptime!(regions.units));
    let mut factors = region::<F, f32>(&tile, comptime!(regions.at[1]));
    let mut leaves = region::<F, Vector<f32, V2>>(&tile, comptime!(regions.at[2]));
    let mut partial = Partial::new::<F>(&tile, regions);
    let mma = Mma::<F>::new(16usize, 8usize, 16usize);
    let unit = UNIT_POS_X;
    let (lane, plane) = (unit % 32, unit / 32);
    let record = id as usize * comptime!(bp.record().0);

    for turn in 0..comptime!(bp.turns() as u32) {
        let at = Slice::new(unit, turn, bp);
        // Always so for most K; but without the branch `ptxas` takes more than 128 registers.
        let works = at.slice < comptime!(bp.slices() as u32);
        let mut share = read_share::<F, B, G>(q, k, gating, &place, c, at, bp);
        if works {
            leave_levels::<F>(&mma, &mut share, &mut tile, &mut partial, at, bp);
        }
        sync_cube();
        if works {
            leave_rows::<F>(
                &mma,
                &mut share,
                &tile,
                &mut partial,
                &mut factors,
                &mut records.blocks,
                record,
                at,
                bp,
            );
        }
    }
    let raw = Raw { beta: read_beta(&gating.beta, &place, c, lane as usize, bp), g: 0.0f32 };
    sync_cube();
    let to = Target::of_plane(0usize, bp);
    let gates = gates_of(&raw, &gating.formula, &place, c, lane as usize, bp);
    let products = partial.gather(plane, lane, bp);
    finish::<F>(
        &mma,
        &mut tile,
        &mut factors,
        &mut leaves,
        &products,
        &gates,
        scale,
        c,
        to,
        plane as usize,
        lane as usize,
        bp,
    );
    sync_cube();
    let blocks = record + comptime!(bp.record().0 - bp.chunk_blocks() * BLOCK_UNITS);
    #[unroll]
    for round in 0..comptime!((bp.chunk_blocks() * BLOCK_UNITS).div_ceil(bp.prepare_units())) {
        let i = unit as usize + comptime!(round * bp.prepare_units());
        if i < comptime!(bp.chunk_blocks() * BLOCK_UNITS) {
            records.blocks[blocks + i] = tile[i];
        }
    }
    leave_factors(&factors, to, &mut records.factors, id, unit as usize, bp.prepare_units(), bp);
    declare_in_order();
}

/// Copies the factors of a chunk to record `id`, by as many units.
#[cube]
fn leave_factors(
    factors: &Region<f32>,
    from: Target,
    record_factors: &mut Array<f32>,
    id: u32,
    unit: usize,
    #[comptime] units: usize,
    #[comptime] bp: Blueprint,
) {
    let record = id as usize * comptime!(bp.factors());
    #[unroll]
    for round in 0..comptime!(bp.factors().div_ceil(units)) {
        let i = unit + comptime!(round * units);
        if i < comptime!(bp.factors()) {
            record_factors[record + i] = factors[from.factors + i];
        }
    }
}
