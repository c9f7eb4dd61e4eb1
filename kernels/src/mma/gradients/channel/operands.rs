//! Keys and queries decayed from the starts and to the ends of their tiles: a unit takes a channel of a tile.

use cubecl::prelude::*;

use super::super::super::blueprint::{CHUNK, ERASE_AT, READ_AT, TILE};
use super::super::super::tile::Tile;
use super::super::blueprint::{
    BETAS_AT, BLOCK, GradientsBlueprint, KEY_NORMS_AT, READ_NORMS_AT, READS_AT, TILES, WRITES_AT,
};
use super::super::here::Here;
use crate::known::known_or;
use crate::math::{beta_of, decay_of, gate_constants};
use crate::tensors::{GateFormula, Strided};

/// One element.
pub(crate) type V1 = Const<1>;

/// The tile and the channel of a unit. Units behind the last channel repeat it, and leave nothing.
#[cube]
pub(crate) fn place_of(unit: usize, #[comptime] bp: GradientsBlueprint) -> (u32, u32) {
    let unit = unit as u32;
    let padded = comptime!(bp.padded_channels() as u32);
    let d = u32::min(unit % padded, comptime!(bp.spec.key_dim as u32 - 1));
    // The masks change nothing. They tell the compiler that no address runs over, so that constants become part of it.
    (
        (unit / padded) & comptime!(TILES as u32 - 1),
        d & comptime!(bp.padded_channels().next_power_of_two() as u32 - 1),
    )
}

/// Whether the unit has a channel of its own.
#[cube]
pub(crate) fn has_channel(unit: usize, #[comptime] bp: GradientsBlueprint) -> bool {
    let padded = comptime!(bp.padded_channels());
    let channel = unit as u32 % comptime!(padded as u32);
    known_or(padded == bp.spec.key_dim, channel < comptime!(bp.spec.key_dim as u32))
}

/// The gates of a unit's rows, as the caller holds them; rows behind the end of the block repeat the last one.
#[cube]
pub(crate) fn read_channel<G: Float>(
    g: &Strided<G>,
    here: &Here,
    unit: usize,
    #[comptime] bp: GradientsBlueprint,
) -> Array<f32> {
    let (t, d) = place_of(unit, bp);
    let mut out = Array::<f32>::new(TILE);
    let first = g.at.at(here.row as usize, here.step(0u32, 1usize), here.hv as usize) + d as usize;
    #[unroll]
    for r in 0..TILE {
        let i = u32::min(t * comptime!(TILE as u32) + comptime!(r as u32), here.steps - 1);
        out[r] = f32::cast_from(g.data[first + (i * g.at.t) as usize]);
    }
    out
}

/// The decays of a unit's rows; rows behind the end of the block do not decay.
#[cube]
pub(crate) fn decays(
    raw: &Array<f32>,
    formula: &GateFormula,
    here: &Here,
    unit: usize,
    #[comptime] bp: GradientsBlueprint,
) -> Array<f32> {
    let (t, d) = place_of(unit, bp);
    let (a, bias) = gate_constants(formula, here.hv as usize, d as usize, bp.spec);
    let mut out = Array::<f32>::new(TILE);
    #[unroll]
    for r in 0..TILE {
        let valid = t * comptime!(TILE as u32) + comptime!(r as u32) < here.steps;
        out[r] = select(valid, decay_of(raw[r], a, bias, formula.lower_bound, bp.spec.gate), 1.0f32);
    }
    out
}

/// Leaves beta and the norms of rows, which the records hold, and what keys write in units of R.
#[cube]
pub(crate) fn leave_row_factors<B: Float>(
    beta: &Strided<B>,
    record_factors: &Array<f32>,
    here: &Here,
    record_floats: u32,
    scale: f32,
    floats: &mut SharedMemory<f32>,
    unit: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    if unit < BLOCK {
        let i = u32::min(unit as u32, here.steps - 1);
        let chunk = comptime!(CHUNK as u32);
        let at = here.head_of(here.chunk + i / chunk) * record_floats as usize + (i % chunk) as usize;
        let from = beta.at.at(here.row as usize, here.step(i, 1usize), here.hv as usize);
        let raw = f32::cast_from(beta.data[from]);
        let beta = select((unit as u32) < here.steps, beta_of(raw, bp.spec.beta), 0.0f32);
        let norm = record_factors[at + ERASE_AT];
        let read = record_factors[at + READ_AT];
        floats[BETAS_AT + unit] = beta;
        floats[KEY_NORMS_AT + unit] = norm;
        floats[WRITES_AT + unit] = beta * norm;
        floats[READS_AT + unit] = read;
        // Without a scale there are no gradients of queries.
        floats[READ_NORMS_AT + unit] = select(scale == 0.0f32, 0.0f32, read / scale);
    }
}

/// Leaves the operands of products between tiles, with all their factors, and the decay over the tile.
#[cube]
pub(crate) fn leave_operands<F: Float>(
    raw: &Array<f32>,
    formula: &GateFormula,
    here: &Here,
    tile: &mut Tile<F>,
    floats: &mut SharedMemory<f32>,
    unit: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    let decays = decays(raw, formula, here, unit, bp);
    if has_channel(unit, bp) {
        let (t, d) = place_of(unit, bp);
        let row = comptime!(8 * bp.key_row());
        let first = (t * comptime!((TILE * 8 * bp.key_row()) as u32) + d) as usize;
        let rows = (t * comptime!(TILE as u32)) as usize;
        let mut elements = tile.slice_mut(0usize, comptime!(bp.units_of_memory())).with_vector_size::<V1>();
        let mut from_start = 1.0f32;
        let mut to_end = 1.0f32;
        #[unroll]
        for r in 0..TILE {
            from_start *= decays[r];
            let at = first + comptime!(r * row);
            let q = f32::cast_from(elements[comptime!(8 * bp.raw_queries_at()) + at][0]);
            let k = f32::cast_from(elements[comptime!(8 * bp.raw_keys_at()) + at][0]);
            let q = q * floats[READS_AT + rows + r];
            // X comes without the sign that E and H have it with.
            let less_k = -k * floats[KEY_NORMS_AT + rows + r];
            elements[at] = Vector::cast_from(q * from_start);
            elements[comptime!(8 * bp.k_at()) + at] = Vector::cast_from(less_k * from_start);
        }
        #[unroll]
        for down in 0..TILE {
            let r = comptime!(TILE - 1 - down);
            let at = first + comptime!(r * row);
            let k = f32::cast_from(elements[comptime!(8 * bp.raw_keys_at()) + at][0]);
            let k = k * floats[WRITES_AT + rows + r];
            elements[comptime!(8 * bp.keys_to_end_at()) + at] = Vector::cast_from(k * to_end);
            to_end *= decays[r];
        }
        floats[comptime!(bp.tile_decays_at()) + (t * comptime!(bp.spec.key_dim as u32) + d) as usize] =
            to_end;
    }
}
