//! What flows inside tiles, row by row in f32, and what comes of all sums: a unit takes a channel of a tile.

use cubecl::prelude::*;

use super::super::super::arguments::InputGradients;
use super::super::super::blueprint::TILE;
use super::super::super::tile::{Tile, V2};
use super::super::blueprint::{
    BETAS_AT, BLOCK, DIAGONAL, GradientsBlueprint, KEY_NORMS_AT, READ_NORMS_AT, READS_AT, TILES, WRITES_AT,
};
use super::super::here::Here;
use super::V4;
use super::operands::{V1, decays, has_channel, place_of, read_channel};
use crate::math::{gate_constants, gate_slopes};
use crate::tensors::Gating;

/// What is summed over channels: k . H, and where there is a norm k . dK and q . dQ.
const KEY: usize = 0;
const ALONG_KEY: usize = 1;
const ALONG_QUERY: usize = 2;

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
    let owns = has_channel(unit, bp);
    let rows = (t * comptime!(TILE as u32)) as usize;
    let here = Here::left(words);
    let raw = read_channel::<G>(&gating.g, &here, unit, bp);
    let decays = decays(&raw, &gating.formula, &here, unit, bp);

    // Sums in f32 of the unit's channel; what is found takes the place of what it was made of.
    let ld = comptime!(8 * bp.key_row());
    let first = (t * comptime!((TILE * 8 * bp.key_row()) as u32) + d) as usize;
    let d_q = first + comptime!(4 * bp.channel_sums_at(0));
    let erases = first + comptime!(4 * bp.channel_sums_at(1));
    let pairs = first + comptime!(4 * bp.channel_sums_at(2));
    let ends = first + comptime!(4 * bp.channel_sums_at(3));
    let queries = first + comptime!(8 * bp.raw_queries_at());
    let keys = first + comptime!(8 * bp.raw_keys_at());

    // beta K; and what H takes from outside the tile: `ends` gets all of it, `pairs` what of it flows past the rows behind.
    let mut written = Array::<f32>::new(TILE);
    let mut h = Array::<f32>::new(TILE);
    let mut to_end = 1.0f32;
    let mut into_ends = 0.0f32;
    let mut into_tiles = 0.0f32;
    #[unroll]
    for down in 0..TILE {
        let r = comptime!(TILE - 1 - down);
        let at = comptime!(r * ld);
        written[r] = element::<F>(tile, keys + comptime!(r * ld), bp) * floats[WRITES_AT + rows + r];
        h[r] = 0.0f32;
        let from_tiles = get::<F>(tile, pairs + at, bp);
        let from_end = to_end * get::<F>(tile, ends + at, bp);
        let to_tiles = as_operand::<F>(written[r] * to_end) * from_tiles;
        into_tiles += to_tiles;
        into_ends = fma(written[r], from_end, into_ends);
        put::<F>(tile, pairs + at, fma(written[r], from_end, to_tiles), owns, bp);
        put::<F>(tile, ends + at, fma(to_end, from_tiles, from_end), owns, bp);
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
        let at = comptime!(i * ld);
        let q_i = element::<F>(tile, queries + comptime!(i * ld), bp) * floats[READS_AT + rows + i];
        let less_k_i = -element::<F>(tile, keys + comptime!(i * ld), bp) * floats[KEY_NORMS_AT + rows + i];
        let outer_d_q = get::<F>(tile, d_q + at, bp);
        let outer_less_e = get::<F>(tile, erases + at, bp);
        let block = t as usize * DIAGONAL + comptime!(i * TILE / 2);
        let mut both = diagonals[block + comptime!(i / 2)];
        let own = both[comptime!(i % 2 * 2)];
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
        d_q_i = fma(own, written[i], fma(from_start, outer_d_q, d_q_i));
        put::<F>(tile, d_q + at, d_q_i, owns, bp);
        put::<F>(tile, erases + at, fma(from_start, outer_less_e, less_e_i), owns, bp);
        let here = get::<F>(tile, pairs + at, bp);
        put::<F>(tile, pairs + at, earlier, owns, bp);
        earlier += here;
        let end = get::<F>(tile, ends + at, bp);
        put::<F>(tile, ends + at, fma(own, q_i, end), owns, bp);
    }

    let mut all_later = -into_tiles;
    let mut products = Array::<f32>::new(TILE);
    #[unroll]
    for r in 0..TILE {
        sync_plane();
        let at = comptime!(r * ld);
        later[r] = later[r] - written[r] * h[r];
        all_later += later[r];
        let whole = h[r] + get::<F>(tile, ends + at, bp);
        products[r] = element::<F>(tile, keys + comptime!(r * ld), bp) * whole;
        let d_k = floats[BETAS_AT + rows + r] * whole - get::<F>(tile, erases + at, bp);
        put::<F>(tile, erases + at, d_k, owns, bp);
    }
    leave_row_sums(&mut products, floats, unit, owns, KEY, bp);
    if comptime!(bp.spec.qk_l2norm) {
        #[unroll]
        for r in 0..TILE {
            products[r] = element::<F>(tile, keys + comptime!(r * ld), bp)
                * get::<F>(tile, erases + comptime!(r * ld), bp);
        }
        leave_row_sums(&mut products, floats, unit, owns, ALONG_KEY, bp);
        sync_plane();
        #[unroll]
        for r in 0..TILE {
            products[r] = element::<F>(tile, queries + comptime!(r * ld), bp)
                * get::<F>(tile, d_q + comptime!(r * ld), bp);
        }
        leave_row_sums(&mut products, floats, unit, owns, ALONG_QUERY, bp);
    }
    let channels = comptime!(bp.spec.key_dim);
    let channel = d as usize;
    if owns {
        floats[comptime!(bp.later_at()) + t as usize * channels + channel] = all_later;
        floats[comptime!(bp.earlier_at()) + t as usize * channels + channel] = into_ends;
    }
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
    let (a, bias) = gate_constants(&gating.formula, here.hv as usize, channel, bp.spec);
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
            let at = comptime!(r * ld);
            let mut d_q_r = get::<F>(tile, d_q + at, bp);
            let mut d_k_r = get::<F>(tile, erases + at, bp);
            if comptime!(bp.spec.qk_l2norm) {
                // That of a row x itself is rho (d - rho^2 x (x . d)).
                let norm = floats[READ_NORMS_AT + rows + r];
                let along = norm * norm * row_sum(floats, rows + r, ALONG_QUERY, bp);
                d_q_r -= element::<F>(tile, queries + comptime!(r * ld), bp) * along;
                let norm = floats[KEY_NORMS_AT + rows + r];
                let along = norm * norm * row_sum(floats, rows + r, ALONG_KEY, bp);
                d_k_r = norm * (d_k_r - element::<F>(tile, keys + comptime!(r * ld), bp) * along);
            }
            d_q_r *= floats[READS_AT + rows + r];
            let by_g = later[r] + get::<F>(tile, pairs + at, bp);
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

/// A query's or key's element, as it came.
#[cube]
fn element<F: Float>(tile: &Tile<F>, at: usize, #[comptime] bp: GradientsBlueprint) -> f32 {
    let elements = tile.slice(0usize, comptime!(bp.units_of_memory())).with_vector_size::<V1>();
    f32::cast_from(elements[at][0])
}

/// What an operand of the products between tiles has been rounded to. Sums for the gates take the same: what flows from
/// tile to tile past none of a gate's rows is to vanish from its gradient, which strong gates leave little of.
#[cube]
fn as_operand<F: Float>(x: f32) -> f32 {
    f32::cast_from(F::cast_from(x))
}

/// A float of the sums.
#[cube]
fn get<F: Float>(tile: &Tile<F>, at: usize, #[comptime] bp: GradientsBlueprint) -> f32 {
    let sums = tile.slice(0usize, comptime!(bp.units_of_memory())).with_vector_size::<V2>();
    f32::reinterpret(sums[at])
}

/// Puts a float there. Units without a channel of their own repeat another one's, and must not.
#[cube]
fn put<F: Float>(tile: &mut Tile<F>, at: usize, x: f32, owns: bool, #[comptime] bp: GradientsBlueprint) {
    if owns {
        let mut sums = tile.slice_mut(0usize, comptime!(bp.units_of_memory())).with_vector_size::<V2>();
        sums[at] = Vector::<F, V2>::reinterpret(x);
    }
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
