//! The planes that only fetch: chunks that a launch of their own has prepared go in, outputs go out.

use cubecl::prelude::*;

use super::arguments::{Records, Rows};
use super::blueprint::{Blueprint, CHUNK, Pass};
use super::memory::Region;
use super::parcel::{new_parcel, put_and_send, send};
use super::planes::Fetcher;
use super::stage::{Place, store_rows, turn};
use super::tile::{Tile, V8};
use crate::known::{known_and, known_or};
use crate::tensors::Strides;

/// Fetches the chunks of the cube's sequence, one after the other or every second one, and stores what the scan leaves of
/// them in `out`. A parcel is on its way for a whole turn of its group.
#[cube]
pub(crate) fn fetch_chunks<F: Float>(
    q: &Rows<F>,
    k: &Rows<F>,
    v: &Rows<F>,
    records: &Records<F>,
    out: &mut Array<Vector<F, V8>>,
    out_at: &Strides,
    place: &Place,
    tile: &mut Tile<F>,
    factors: &mut Region<f32>,
    fetcher: Fetcher,
    #[comptime] bp: Blueprint,
) {
    let Fetcher { group, unit, .. } = fetcher;
    let mut parcel = new_parcel(bp);
    send::<F>(&mut parcel, q, k, v, records, place, group, unit, bp);
    let groups = comptime!(bp.groups as i32);
    // Chunk `next` is there when the barrier at the end is passed. A group's first turn, which has nothing to store yet, is one
    // of the loop with no chunk before its own: what is written twice the first call compiles twice.
    let mut next = group as i32 - groups;
    while next <= place.chunks as i32 {
        if next > groups {
            store_chunk::<F>(tile, out, out_at, place, (next - groups - 1) as usize, unit, bp);
        }
        if known_and(bp.groups > 1, next >= 0) {
            sync_cube();
        }
        next += groups;
        let stage = next as usize % comptime!(bp.stages());
        let later = (next + groups) as usize;
        put_and_send::<F>(&mut parcel, tile, factors, stage, q, k, v, records, place, later, unit, bp);
        sync_cube();
        if known_and(bp.groups > 1, next > 0 && next < groups) {
            sync_cube();
        }
    }
    let next = next as usize;
    store_last::<F>(tile, out, out_at, place, next, fetcher, bp);
}

/// Stores the last outputs, one chunk for each group, when `next` would be the group's next chunk.
#[cube]
pub(crate) fn store_last<F: Float>(
    tile: &Tile<F>,
    out: &mut Array<Vector<F, V8>>,
    out_at: &Strides,
    place: &Place,
    next: usize,
    fetcher: Fetcher,
    #[comptime] bp: Blueprint,
) {
    if next < place.chunks + comptime!(bp.groups) {
        sync_cube();
    }
    if fetcher.group < place.chunks {
        store_chunk::<F>(tile, out, out_at, place, place.chunks - 1 - fetcher.group, fetcher.unit, bp);
    }
}

/// Stores what the scan has left of its `i`th chunk: outputs; residuals, chunk by chunk and head by head; or the gradients
/// of the values.
#[cube]
pub(crate) fn store_chunk<F: Float>(
    tile: &Tile<F>,
    out: &mut Array<Vector<F, V8>>,
    out_at: &Strides,
    place: &Place,
    i: usize,
    unit: usize,
    #[comptime] bp: Blueprint,
) {
    let at = comptime!(bp.outputs_at()) + i % 2 * comptime!(bp.outputs());
    let c = turn(place, i, bp);
    let seq = place.seq;
    // Rows are micro-steps in the backward, tokens in the forward.
    let n_h = comptime!(bp.spec.micro_steps);
    let (to_row, start) = comptime!(if bp.pass.is_backward() { (1, n_h) } else { (n_h, 1) });
    let rows = if comptime!(bp.pass.is_backward()) { place.steps as u32 } else { seq.tokens as u32 };
    let first = c * CHUNK / to_row;
    let end = u32::min(((c + 1) * CHUNK / to_row) as u32, rows) - first as u32;
    let value_dim = comptime!(bp.spec.value_dim);
    let chunk = ((seq.first_chunk + c) * place.heads + place.hv) as u32;
    let mut to = chunk * comptime!((CHUNK * value_dim / 8) as u32);
    let mut stride = comptime!((value_dim / 8) as u32).runtime();
    if comptime!(bp.pass != Pass::Replay) {
        to = out_at.at32(seq.row, seq.start * start + first, place.hv) / 8;
        stride = out_at.t / 8;
    }
    let to = to + place.v0 as u32 / 8;
    let idle = comptime!(bp.group_units() - bp.storing_units());
    if known_or(idle == 0, unit >= idle) && place.reads(bp) {
        store_rows::<F>(tile, at, out, to, stride, end, place, unit - idle, bp);
    }
}
