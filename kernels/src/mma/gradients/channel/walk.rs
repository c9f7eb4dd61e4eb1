//! What flows inside strips, row by row in f32: a unit takes a channel of a strip.

use cubecl::prelude::*;

use super::super::super::memory::Region;
use super::super::super::tile::Tile;
use super::super::blueprint::{
    BETAS_AT, DIAGONAL, GradientsBlueprint, KEY_NORMS_AT, READS_AT, STRIP, WRITES_AT,
};
use super::super::here::Here;
use super::V4;
use super::operands::{Channel, STRIPS_OF_TILE, decays, four_of, index_of, place_of, read_gates};
use super::sums::{ALONG_KEY, ALONG_QUERY, KEY, leave_row_sums};
use crate::tensors::Gating;

/// Which sums in f32: what is found takes the place of what it was made of.
pub(crate) const D_Q: usize = 0;
/// -E, then dK.
pub(crate) const ERASES: usize = 1;
/// What H takes from the pairs, then what a gate gets from rows before it.
pub(crate) const PAIRS: usize = 2;
/// What H takes from the state, then what gates at or before a row get from it.
pub(crate) const ENDS: usize = 3;

/// Walks all strips, of each unit's tile one after the other.
#[cube]
pub(crate) fn walk_strips<F: Float, B: Float, G: Float>(
    gating: &Gating<B, G>,
    words: &Region<u32>,
    tile: &mut Tile<F>,
    diagonals: &Region<Vector<f32, V4>>,
    floats: &mut Region<f32>,
    unit: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    let (t, d) = place_of(unit, bp);
    for s in 0..STRIPS_OF_TILE {
        let here = Here::left(words);
        let strip = t * STRIPS_OF_TILE + s;
        walk_strip::<F, B, G>(gating, &here, tile, diagonals, floats, strip, d, bp);
    }
}

/// Adds what flows inside a strip, and leaves dQ and dK, each row's sums for the gates, and the sums over channels.
#[cube]
fn walk_strip<F: Float, B: Float, G: Float>(
    gating: &Gating<B, G>,
    here: &Here,
    tile: &mut Tile<F>,
    diagonals: &Region<Vector<f32, V4>>,
    floats: &mut Region<f32>,
    strip: u32,
    d: u32,
    #[comptime] bp: GradientsBlueprint,
) {
    let mut raw = Array::<f32>::new(STRIP);
    read_gates::<G>(&mut raw, &gating.g, here, strip, d, bp);
    let decays = decays(&raw, &gating.formula, here, strip, d, bp);

    let own = Channel::new(strip, d, bp);
    let (queries, keys) = comptime!((bp.raw_queries_at(), bp.raw_keys_at()));

    // k, beta k; what H takes from outside the strip, `ends` all of it, `flows` what of it flows past the rows behind.
    let mut k = Array::<f32>::new(STRIP);
    let mut written = Array::<f32>::new(STRIP);
    let mut h = Array::<f32>::new(STRIP);
    let mut ends = Array::<f32>::new(STRIP);
    let mut flows = Array::<f32>::new(STRIP);
    let mut writes = four_of(floats, strip, WRITES_AT, 4usize);
    let mut to_end = 1.0f32;
    let mut into_ends = 0.0f32;
    let mut into_strips = 0.0f32;
    #[unroll]
    for down in 0..STRIP {
        let r = comptime!(STRIP - 1 - down);
        if comptime!(r == 3) {
            writes = four_of(floats, strip, WRITES_AT, r);
        }
        k[r] = own.element::<F>(tile, keys, r, bp);
        written[r] = k[r] * writes[comptime!(r % 4)];
        h[r] = 0.0f32;
        let from_strips = own.get::<F>(tile, PAIRS, r, bp);
        let from_end = to_end * own.get::<F>(tile, ENDS, r, bp);
        let to_strips = as_operand::<F>(written[r] * to_end) * from_strips;
        into_strips += to_strips;
        into_ends = fma(written[r], from_end, into_ends);
        flows[r] = fma(written[r], from_end, to_strips);
        ends[r] = fma(to_end, from_strips, from_end);
        to_end *= decays[r];
    }

    let mut reads = four_of(floats, strip, READS_AT, 0usize);
    let mut norms = four_of(floats, strip, KEY_NORMS_AT, 0usize);
    // Of the sums of dg, what row r adds to gates at or before it, and what rows before it have added to those behind.
    let mut later = Array::<f32>::new(STRIP);
    let mut less_e = Array::<f32>::new(STRIP);
    let mut earlier = 0.0f32;
    let mut from_start = 1.0f32;
    #[unroll]
    for i in 0..STRIP {
        // Nothing of the next rows is to be read ahead: it would take registers.
        sync_plane();
        if comptime!(i == 4) {
            reads = four_of(floats, strip, READS_AT, i);
            norms = four_of(floats, strip, KEY_NORMS_AT, i);
        }
        from_start *= decays[i];
        let q_i = own.element::<F>(tile, queries, i, bp) * reads[comptime!(i % 4)];
        let less_k_i = -k[i] * norms[comptime!(i % 4)];
        let outer_d_q = own.get::<F>(tile, D_Q, i, bp);
        let outer_less_e = own.get::<F>(tile, ERASES, i, bp);
        let block = strip as usize * DIAGONAL + comptime!(i * STRIP / 2);
        let mut both = diagonals[block + comptime!(i / 2)];
        let diagonal = both[comptime!(i % 2 * 2)];
        let mut d_q_i = 0.0f32;
        let mut less_e_i = 0.0f32;
        let mut decay = 1.0f32;
        #[unroll]
        for down in 0..i {
            let j = comptime!(i - 1 - down);
            if comptime!(j % 2 == 1) {
                both = diagonals[block + comptime!(j / 2)];
            }
            let y = both[comptime!(j % 2 * 2)];
            let x = both[comptime!(j % 2 * 2 + 1)];
            decay *= decays[comptime!(j + 1)];
            let k_j = decay * written[j];
            d_q_i = fma(y, k_j, d_q_i);
            less_e_i = fma(x, k_j, less_e_i);
            h[j] = fma(decay, fma(y, q_i, x * less_k_i), h[j]);
        }
        let outer = as_operand::<F>(less_k_i * from_start) * outer_less_e;
        let outer = fma(as_operand::<F>(q_i * from_start), outer_d_q, outer);
        later[i] = fma(q_i, d_q_i, fma(less_k_i, less_e_i, outer));
        // From here on with the row's own token, on which nothing decays.
        d_q_i = fma(diagonal, written[i], fma(from_start, outer_d_q, d_q_i));
        own.put::<F>(tile, D_Q, i, d_q_i, bp);
        less_e[i] = fma(from_start, outer_less_e, less_e_i);
        own.put::<F>(tile, PAIRS, i, earlier, bp);
        earlier += flows[i];
        ends[i] = fma(diagonal, q_i, ends[i]);
    }

    sync_plane();
    let mut betas = four_of(floats, strip, BETAS_AT, 0usize);
    let mut all_later = 0.0f32;
    let mut products = Array::<f32>::new(STRIP);
    #[unroll]
    for r in 0..STRIP {
        if comptime!(r == 4) {
            betas = four_of(floats, strip, BETAS_AT, r);
        }
        let mut later = later[r] - written[r] * h[r];
        if comptime!(r + 1 == STRIP) {
            // What flows past the end of the strip adds to gates behind it alone.
            later -= into_strips;
        }
        all_later += later;
        own.put::<F>(tile, ENDS, r, later, bp);
        let whole = h[r] + ends[r];
        products[r] = k[r] * whole;
        h[r] = betas[comptime!(r % 4)] * whole - less_e[r];
        own.put::<F>(tile, ERASES, r, h[r], bp);
    }
    leave_row_sums(&mut products, floats, strip, d, KEY, bp);
    if comptime!(bp.spec.qk_l2norm) {
        #[unroll]
        for r in 0..STRIP {
            products[r] = k[r] * h[r];
        }
        leave_row_sums(&mut products, floats, strip, d, ALONG_KEY, bp);
        #[unroll]
        for r in 0..STRIP {
            products[r] = own.element::<F>(tile, queries, r, bp) * own.get::<F>(tile, D_Q, r, bp);
        }
        leave_row_sums(&mut products, floats, strip, d, ALONG_QUERY, bp);
    }
    let at = index_of(strip, d, bp);
    floats[comptime!(bp.later_at()) + at] = all_later;
    floats[comptime!(bp.earlier_at()) + at] = into_ends;
}

/// What an operand of the products between strips has been rounded to. Sums for the gates take the same: what flows from
/// strip to strip past none of a gate's rows is to vanish from its gradient, which strong gates leave little of.
#[cube]
fn as_operand<F: Float>(x: f32) -> f32 {
    f32::cast_from(F::cast_from(x))
}
