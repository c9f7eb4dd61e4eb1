//! The planes that prepare the next chunks beside the scan: they fetch, multiply and invert, and store outputs.

use cubecl::prelude::*;

use super::arguments::{Records, Rows};
use super::blueprint::{BLOCKS, Blueprint};
use super::chunk::{Target, finish};
use super::fetch::{store_chunk, store_last};
use super::gates::{Raw, gates_from, gates_of, leave_gates, read_gates};
use super::gram::multiply_keys;
use super::memory::Region;
use super::parcel::{new_parcel, put, send};
use super::planes::Fetcher;
use super::stage::Place;
use super::tile::{Mma, Tile, V2};
use crate::tensors::{GateFormula, Gating};

/// Prepares the chunks of the cube's sequence, one after the other or every second one, each a turn before the scan takes
/// it, and stores what the scan leaves of them. A parcel is on its way for most of a turn.
#[cube]
pub(crate) fn prepare_chunks<F: Float, B: Float, G: Float>(
    mma: &Mma<F>,
    q: &Rows<F>,
    k: &Rows<F>,
    v: &Rows<F>,
    gating: &Gating<B, G>,
    records: &Records<F>,
    o: &mut Rows<F>,
    place: &Place,
    tile: &mut Tile<F>,
    factors: &mut Region<f32>,
    leaves: &mut Region<Vector<f32, V2>>,
    fetcher: Fetcher,
    scale: f32,
    #[comptime] bp: Blueprint,
) {
    let lane = (UNIT_POS % 32) as usize;
    let groups = comptime!(bp.groups);
    let stage = comptime!(bp.stage());
    let Fetcher { group, unit, .. } = fetcher;
    let block = unit / 32;
    let mut parcel = new_parcel(bp);
    send::<F>(&mut parcel, q, k, v, records, place, group, unit, bp);
    put::<F>(&parcel, tile, factors, group, unit, bp);
    // A plane that multiplies queries has time to spare: it finds the gates of the chunk after the one in hand. The
    // sums of gates are a chain of shuffles, each of which would wait behind the operands of a product.
    let finds_gates = block == BLOCKS;
    if finds_gates {
        let raw = read_gates::<B, G>(gating, place, group, lane, bp);
        let to = Target::of_stage(group, bp);
        find_gates(factors, &raw, &gating.formula, place, group, to, lane, bp);
    }
    sync_cube();
    if group > 0 {
        sync_cube();
    }
    // Chunk `next` is ready when the barrier at the end is passed.
    let mut next = group as u32;
    let stages = comptime!(bp.stages() as u32);
    while next <= place.chunks as u32 {
        let after = next + comptime!(groups as u32);
        // For one turn: planes that prepare have no registers to carry it from turn to turn.
        let mut parcel = new_parcel(bp);
        send::<F>(&mut parcel, q, k, v, records, place, after as usize, unit, bp);
        let mut later = Raw { beta: 0.0f32, g: 0.0f32 };
        if finds_gates {
            let raw = read_gates::<B, G>(gating, place, after as usize, lane, bp);
            later.beta = raw.beta;
            later.g = raw.g;
        }
        if next > comptime!(groups as u32) {
            let done = (next - comptime!(groups as u32 + 1)) as usize;
            store_chunk::<F>(tile, &mut o.data, &o.at, place, done, unit, bp);
        }
        let at_stage = (next % stages) as usize;
        let products = multiply_keys::<F>(mma, tile, at_stage * stage, block, lane, bp);
        if comptime!(groups > 1) {
            sync_cube();
        }
        let to = Target::of_stage(at_stage, bp);
        let gates = gates_from(factors, to.gates(bp), bp);
        finish::<F>(mma, tile, factors, leaves, &products, &gates, scale, next as usize, to, block, lane, bp);
        let to = (after % stages) as usize;
        if finds_gates {
            let to = Target::of_stage(to, bp);
            find_gates(factors, &later, &gating.formula, place, after as usize, to, lane, bp);
        }
        put::<F>(&parcel, tile, factors, to, unit, bp);
        next = after;
        sync_cube();
    }
    store_last::<F>(tile, &mut o.data, &o.at, place, next as usize, fetcher, bp);
}

/// Finds the gates of chunk `c`, and leaves them with it.
#[cube]
fn find_gates(
    factors: &mut Region<f32>,
    raw: &Raw,
    formula: &GateFormula,
    place: &Place,
    c: usize,
    to: Target,
    lane: usize,
    #[comptime] bp: Blueprint,
) {
    let gates = gates_of(raw, formula, place, c, lane, bp);
    leave_gates(factors, to.gates(bp), &gates, lane, bp);
}
