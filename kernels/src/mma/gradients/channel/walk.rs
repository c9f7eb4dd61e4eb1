//! What flows inside tiles, row by row in f32, and what comes of all sums: a unit takes a channel of a tile.

use cubecl::prelude::*;

use super::super::super::arguments::InputGradients;
use super::super::super::blueprint::TILE;
use super::super::super::tile::Tile;
use super::super::blueprint::{
    BETAS_AT, BLOCK, DIAGONAL, GradientsBlueprint, KEY_NORMS_AT, READ_NORMS_AT, READS_AT, TILES, WRITES_AT,
};
use super::super::here::Here;
use super::V4;
use super::operands::{Channel, V1, decays, given, is_channel, place_of, read_channel};
use crate::math::{gate_constants, gate_slopes};
use crate::tensors::Gating;

/// What is summed over channels: k . H, and where there is a norm k . dK and q . dQ.
const KEY: usize = 0;
const ALONG_KEY: usize = 1;
const ALONG_QUERY: usize = 2;

/// Which sums in f32: what is found takes the place of what it was made of.
const D_Q: usize = 0;
const ERASES: usize = 1;
const PAIRS: usize = 2;
const ENDS: usize = 3;

/// Adds what flows inside tiles, stores dQ, dK and dg, and leaves the sums over channels. Returns the unit's share of the
/// gradients of `a_log` and `dt_bias`.
#[cube]
pub(crate) fn walk_channel<F: Float, B: Float, G: Float>(
    gating: &Gating<B, G>,
    to: &mut InputGradients<F, B, G>,
    words: &SharedMemory<u32>,
    tile: &mut Tile<F>,
    diagonals: &SharedMemory<Vector<f32, V4>>,
    floats: &mut SharedMemory<f32>,
    unit: usize,
    #[comptime] bp: GradientsBlueprint,
) -> (f32, f32) {
    let (t, d) = place_of(unit, bp);
    let owns = is_channel(d, bp);
    let rows = (t * comptime!(TILE as u32)) as usize;
    let here = Here::left(words);
    let raw = read_channel::<G>(&gating.g, &here, unit, bp);
    let decays = decays(&raw, &gating.formula, &here, unit, bp);

    let own = Channel::new(t, d, bp);
    let (queries, keys) = comptime!((bp.raw_queries_at(), bp.raw_keys_at()));

    // beta K; and what H takes from outside the tile: `ends` gets all of it, `pairs` what of it flows past the rows behind.
    let mut written = Array::<f32>::new(TILE);
    let mut h = Array::<f32>::new(TILE);
    let mut to_end = 1.0f32;
    let mut into_ends = 0.0f32;
    let mut into_tiles = 0.0f32;
    #[unroll]
    for down in 0..TILE {
        let r = comptime!(TILE - 1 - down);
        written[r] = own.element::<F>(tile, keys, r, bp) * floats[WRITES_AT + rows + r];
        h[r] = 0.0f32;
        let from_tiles = own.get::<F>(tile, PAIRS, r, bp);
        let from_end = to_end * own.get::<F>(tile, ENDS, r, bp);
        let to_tiles = as_operand::<F>(written[r] * to_end) * from_tiles;
        into_tiles += to_tiles;
        into_ends = fma(written[r], from_end, into_ends);
        own.put::<F>(tile, PAIRS, r, fma(written[r], from_end, to_tiles), bp);
        own.put::<F>(tile, ENDS, r, fma(to_end, from_tiles, from_end), bp);
        to_end *= decays[r];
    }

    // Of the sums of dg, what row r adds to gates at or before it, and what rows before it have added to those behind.
    let mut later = Array::<f32>::new(TILE);
    let mut earlier = 0.0f32;
    let mut from_start = 1.0f32;
    #[unroll]
    for i in 0..TILE {
        // Nothing of the next rows is to be read ahead: it would take registers.
        sync_plane();
        from_start *= decays[i];
        let q_i = own.element::<F>(tile, queries, i, bp) * floats[READS_AT + rows + i];
        let less_k_i = -own.element::<F>(tile, keys, i, bp) * floats[KEY_NORMS_AT + rows + i];
        let outer_d_q = own.get::<F>(tile, D_Q, i, bp);
        let outer_less_e = own.get::<F>(tile, ERASES, i, bp);
        let block = t as usize * DIAGONAL + comptime!(i * TILE / 2);
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
        own.put::<F>(tile, ERASES, i, fma(from_start, outer_less_e, less_e_i), bp);
        let here = own.get::<F>(tile, PAIRS, i, bp);
        own.put::<F>(tile, PAIRS, i, earlier, bp);
        earlier += here;
        let end = own.get::<F>(tile, ENDS, i, bp);
        own.put::<F>(tile, ENDS, i, fma(diagonal, q_i, end), bp);
    }

    let mut all_later = -into_tiles;
    let mut products = Array::<f32>::new(TILE);
    #[unroll]
    for r in 0..TILE {
        sync_plane();
        later[r] = later[r] - written[r] * h[r];
        all_later += later[r];
        let whole = h[r] + own.get::<F>(tile, ENDS, r, bp);
        products[r] = own.element::<F>(tile, keys, r, bp) * whole;
        let d_k = floats[BETAS_AT + rows + r] * whole - own.get::<F>(tile, ERASES, r, bp);
        own.put::<F>(tile, ERASES, r, d_k, bp);
    }
    leave_row_sums(&mut products, floats, unit, owns, KEY, bp);
    if comptime!(bp.spec.qk_l2norm) {
        #[unroll]
        for r in 0..TILE {
            products[r] = own.element::<F>(tile, keys, r, bp) * own.get::<F>(tile, ERASES, r, bp);
        }
        leave_row_sums(&mut products, floats, unit, owns, ALONG_KEY, bp);
        sync_plane();
        #[unroll]
        for r in 0..TILE {
            products[r] = own.element::<F>(tile, queries, r, bp) * own.get::<F>(tile, D_Q, r, bp);
        }
        leave_row_sums(&mut products, floats, unit, owns, ALONG_QUERY, bp);
    }
    let channels = comptime!(bp.channels());
    let channel = d as usize;
    floats[comptime!(bp.later_at()) + t as usize * channels + channel] = all_later;
    floats[comptime!(bp.earlier_at()) + t as usize * channels + channel] = into_ends;
    sync_cube();

    // What the state and the other tiles add to all gates of this one.
    let mut rest = floats[comptime!(bp.products_at()) + channel]
        + floats[comptime!(bp.products_at() + channels) + channel];
    #[unroll]
    for other in 0..TILES {
        rest *= floats[comptime!(bp.tile_decays_at() + other * channels) + channel];
    }
    rest -= into_tiles;
    #[unroll]
    for other in 0..TILES {
        let behind = floats[comptime!(bp.later_at() + other * channels) + channel];
        let before = floats[comptime!(bp.earlier_at() + other * channels) + channel];
        let of_other = select(t < comptime!(other as u32), behind, before);
        rest += select(t == comptime!(other as u32), 0.0f32, of_other);
    }
    #[unroll]
    for down in 0..TILE {
        let r = comptime!(TILE - 1 - down);
        rest += later[r];
        later[r] = rest;
    }

    let here = Here::left(words);
    let raw = read_channel::<G>(&gating.g, &here, unit, bp);
    let (a, bias) = gate_constants(&gating.formula, here.hv as usize, given(d, bp), bp.spec);
    let mut by_a_log = 0.0f32;
    let mut by_bias = 0.0f32;
    let row = here.row as usize;
    let step = here.step(0u32, 1usize) + rows;
    let dq0 = to.q.at.at(row, step, here.hv as usize) + channel;
    let dk0 = to.k.at.at(row, step, here.hv as usize) + channel;
    let mut dq_out = to.q.data.to_slice_mut().with_vector_size::<V1>();
    let mut dk_out = to.k.data.to_slice_mut().with_vector_size::<V1>();
    let dg0 = to.g.at.at(row, step, here.hv as usize) + channel;
    #[unroll]
    for r in 0..TILE {
        if owns && rows as u32 + comptime!(r as u32) < here.steps {
            let mut d_q_r = own.get::<F>(tile, D_Q, r, bp);
            let mut d_k_r = own.get::<F>(tile, ERASES, r, bp);
            if comptime!(bp.spec.qk_l2norm) {
                // That of a row x itself is rho (d - rho^2 x (x . d)).
                let norm = floats[READ_NORMS_AT + rows + r];
                let along = norm * norm * row_sum(floats, rows + r, ALONG_QUERY, bp);
                d_q_r -= own.element::<F>(tile, queries, r, bp) * along;
                let norm = floats[KEY_NORMS_AT + rows + r];
                let along = norm * norm * row_sum(floats, rows + r, ALONG_KEY, bp);
                d_k_r = norm * (d_k_r - own.element::<F>(tile, keys, r, bp) * along);
            }
            d_q_r *= floats[READS_AT + rows + r];
            let by_g = later[r] + own.get::<F>(tile, PAIRS, r, bp);
            let (by_x, by_a) = gate_slopes(raw[r], a, bias, gating.formula.lower_bound, bp.spec.gate);
            by_bias = fma(by_g, by_x, by_bias);
            by_a_log = fma(by_g, by_a, by_a_log);
            dq_out[dq0 + (comptime!(r as u32) * to.q.at.t) as usize] = Vector::cast_from(d_q_r);
            dk_out[dk0 + (comptime!(r as u32) * to.k.at.t) as usize] = Vector::cast_from(d_k_r);
            to.g.data[dg0 + (comptime!(r as u32) * to.g.at.t) as usize] = G::cast_from(by_g * by_x);
        }
    }
    (by_a_log, by_bias)
}

/// What an operand of the products between tiles has been rounded to. Sums for the gates take the same: what flows from
/// tile to tile past none of a gate's rows is to vanish from its gradient, which strong gates leave little of.
#[cube]
fn as_operand<F: Float>(x: f32) -> f32 {
    f32::cast_from(F::cast_from(x))
}

/// Leaves the sums over the units of a plane: each step halves the rows that a unit adds up, and at last units `2 r` and
/// `2 r + 1` have row r. Consumes them.
#[cube]
fn leave_row_sums(
    sums: &mut Array<f32>,
    floats: &mut SharedMemory<f32>,
    unit: usize,
    owns: bool,
    #[comptime] which: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    let lane = unit % 32;
    #[unroll]
    for r in 0..TILE {
        sums[r] = select(owns, sums[r], 0.0f32);
    }
    #[unroll]
    for level in 0..comptime!(TILE.ilog2() as usize) {
        let left = comptime!(TILE >> (level + 1));
        let mask = comptime!(TILE >> level);
        let upper = lane / mask % 2 == 1;
        #[unroll]
        for r in 0..left {
            let mine = select(upper, sums[comptime!(r + left)], sums[r]);
            let other = select(upper, sums[r], sums[comptime!(r + left)]);
            sums[r] = mine + plane_shuffle_xor(other, comptime!(mask as u32));
        }
    }
    let sum = sums[0] + plane_shuffle_xor(sums[0], 1u32);
    if lane % 2 == 0 {
        let planes = comptime!(bp.channel_planes());
        let plane = unit / 32;
        let row = plane / planes * TILE + lane / 2;
        floats[comptime!(bp.row_sums_at(which)) + plane % planes * BLOCK + row] = sum;
    }
}

/// The sum of a row over all channels.
#[cube]
fn row_sum(
    floats: &SharedMemory<f32>,
    row: usize,
    #[comptime] which: usize,
    #[comptime] bp: GradientsBlueprint,
) -> f32 {
    let mut sum = 0.0f32;
    #[unroll]
    for plane in 0..comptime!(bp.channel_planes()) {
        sum += floats[comptime!(bp.row_sums_at(which) + plane * BLOCK) + row];
    }
    sum
}

/// The sum of k . H of a row.
#[cube]
pub(crate) fn by_keys(floats: &SharedMemory<f32>, row: usize, #[comptime] bp: GradientsBlueprint) -> f32 {
    row_sum(floats, row, KEY, bp)
}
