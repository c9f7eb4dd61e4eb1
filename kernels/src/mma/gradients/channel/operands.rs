//! Keys and queries decayed from the starts and to the ends of their strips: a unit takes a channel of a tile, strip by
//! strip.

use cubecl::prelude::*;

use super::super::super::blueprint::{CHUNK, ERASE_AT, READ_AT, TILE};
use super::super::super::memory::Region;
use super::super::super::tile::{Tile, V2, V4};
use super::super::blueprint::{
    BETAS_AT, BLOCK, GradientsBlueprint, KEY_NORMS_AT, READ_NORMS_AT, READS_AT, STRIP, TILES, WRITES_AT,
};
use super::super::here::Here;
use crate::known::known_or;
use crate::math::{beta_of, decay_of, gate_constants};
use crate::tensors::{GateFormula, Gating, Strided};

/// One element.
pub(crate) type V1 = Const<1>;

/// Strips of a unit. A loop over them stays one, so that the first call compiles it once.
pub(crate) const STRIPS_OF_TILE: u32 = (TILE / STRIP) as u32;

/// The tile and the channel of a unit, which may lie behind the last one.
#[cube]
pub(crate) fn place_of(unit: usize, #[comptime] bp: GradientsBlueprint) -> (u32, u32) {
    let unit = unit as u32;
    let channels = comptime!(bp.channels() as u32);
    // The masks change nothing. They tell the compiler that no address runs over, so that constants become part of it.
    (
        (unit / channels) & comptime!(TILES as u32 - 1),
        (unit % channels) & comptime!(bp.channels().next_power_of_two() as u32 - 1),
    )
}

/// Whether channel `d` is one of K, and not padding.
#[cube]
pub(crate) fn is_channel(d: u32, #[comptime] bp: GradientsBlueprint) -> bool {
    known_or(bp.channels() == bp.spec.key_dim, d < comptime!(bp.spec.key_dim as u32))
}

/// Where channel `d` of a strip lies in what is kept of strips and channels.
#[cube]
pub(crate) fn index_of(strip: u32, d: u32, #[comptime] bp: GradientsBlueprint) -> usize {
    (strip * comptime!(bp.channels() as u32) + d) as usize
}

/// What a gate formula needs of channel `d`; for padding, of which the caller has nothing, zeros.
#[cube]
pub(crate) fn constants_of(
    formula: &GateFormula,
    here: &Here,
    d: u32,
    #[comptime] bp: GradientsBlueprint,
) -> (f32, f32) {
    let mut a = 0.0f32;
    let mut bias = 0.0f32;
    if is_channel(d, bp) {
        let (x, y) = gate_constants(formula, here.hv as usize, d as usize, bp.spec);
        a = x;
        bias = y;
    }
    (a, bias)
}

/// A unit's channel in the rows of a strip. The starts are known at run time only, in 64 bits: to a sum of 32 bits the compiler
/// does not add a row's offset in the address, and would keep 32 addresses in registers.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Channel {
    /// Where the strip's rows start, of elements and of sums.
    rows: usize,
    sums: usize,
    d: usize,
}

#[cube]
impl Channel {
    pub(crate) fn new(strip: u32, d: u32, #[comptime] bp: GradientsBlueprint) -> Self {
        let rows = (strip * comptime!((STRIP * bp.key_row()) as u32)) as usize;
        Channel { rows, sums: 2 * rows, d: d as usize }
    }

    /// Row `r` of the rows at `at`.
    pub(crate) fn element<F: Float>(
        &self,
        tile: &Tile<F>,
        #[comptime] at: usize,
        #[comptime] r: usize,
        #[comptime] bp: GradientsBlueprint,
    ) -> f32 {
        let elements = tile.slice(self.rows, comptime!(bp.units_of_memory())).with_vector_size::<V1>();
        f32::cast_from(elements[self.d + comptime!(8 * (at + r * bp.key_row()))][0])
    }

    pub(crate) fn put_element<F: Float>(
        &self,
        tile: &mut Tile<F>,
        #[comptime] at: usize,
        #[comptime] r: usize,
        x: f32,
        #[comptime] bp: GradientsBlueprint,
    ) {
        let mut elements =
            tile.slice_mut(self.rows, comptime!(bp.units_of_memory())).with_vector_size::<V1>();
        elements[self.d + comptime!(8 * (at + r * bp.key_row()))] = Vector::cast_from(x);
    }

    /// Row `r` of sums.
    pub(crate) fn get<F: Float>(
        &self,
        tile: &Tile<F>,
        #[comptime] which: usize,
        #[comptime] r: usize,
        #[comptime] bp: GradientsBlueprint,
    ) -> f32 {
        let sums = tile.slice(self.sums, comptime!(bp.units_of_memory())).with_vector_size::<V2>();
        f32::reinterpret(sums[self.d + comptime!(sum_at(which, r, bp))])
    }

    pub(crate) fn put<F: Float>(
        &self,
        tile: &mut Tile<F>,
        #[comptime] which: usize,
        #[comptime] r: usize,
        x: f32,
        #[comptime] bp: GradientsBlueprint,
    ) {
        let mut sums = tile.slice_mut(self.sums, comptime!(bp.units_of_memory())).with_vector_size::<V2>();
        sums[self.d + comptime!(sum_at(which, r, bp))] = Vector::<F, V2>::reinterpret(x);
    }
}

/// Channel 0 of row `r` of sums, in floats.
fn sum_at(which: usize, r: usize, bp: GradientsBlueprint) -> usize {
    4 * (bp.channel_sums_at(which) + 2 * r * bp.key_row())
}

/// Of the factors of rows at `at`, those of row `r` of a strip and the three beside it.
#[cube]
pub(crate) fn four_of(
    floats: &Region<f32>,
    strip: u32,
    #[comptime] at: usize,
    #[comptime] r: usize,
) -> Vector<f32, V4> {
    let fours = floats.reinterpret::<Vector<f32, V4>>();
    fours[(strip * comptime!(STRIP as u32 / 4)) as usize + comptime!((at + r) / 4)]
}

/// The gates of a strip's rows in channel `d`, as the caller holds them; rows behind the end of the block repeat the last
/// one, and padding has none: with an index that stays inside instead there would be a word more to keep all along.
#[cube]
pub(crate) fn read_gates<G: Float>(
    into: &mut Array<f32>,
    g: &Strided<G>,
    here: &Here,
    strip: u32,
    d: u32,
    #[comptime] bp: GradientsBlueprint,
) {
    if comptime!(bp.channels() > bp.spec.key_dim) {
        #[unroll]
        for r in 0..STRIP {
            into[r] = 0.0f32;
        }
    }
    if is_channel(d, bp) {
        let first = g.at.at(here.row as usize, here.step(0u32, 1usize), here.hv as usize) + d as usize;
        #[unroll]
        for r in 0..STRIP {
            let i = u32::min(strip * comptime!(STRIP as u32) + comptime!(r as u32), here.steps - 1);
            into[r] = f32::cast_from(g.data[first + (i * g.at.t) as usize]);
        }
    }
}

/// The decays of these rows; those behind the end of the block do not decay.
#[cube]
pub(crate) fn decays(
    raw: &Array<f32>,
    formula: &GateFormula,
    here: &Here,
    strip: u32,
    d: u32,
    #[comptime] bp: GradientsBlueprint,
) -> Array<f32> {
    let (a, bias) = constants_of(formula, here, d, bp);
    let mut out = Array::<f32>::new(STRIP);
    #[unroll]
    for r in 0..STRIP {
        let valid = strip * comptime!(STRIP as u32) + comptime!(r as u32) < here.steps;
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
    floats: &mut Region<f32>,
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

/// Leaves the operands of products between strips, with all their factors, and the decays over the strips. `raw` holds the
/// gates of the unit's first strip.
#[cube]
pub(crate) fn leave_operands<F: Float, B: Float, G: Float>(
    raw: &mut Array<f32>,
    gating: &Gating<B, G>,
    here: &Here,
    tile: &mut Tile<F>,
    floats: &mut Region<f32>,
    unit: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    let (t, d) = place_of(unit, bp);
    for s in 0..STRIPS_OF_TILE {
        let strip = t * STRIPS_OF_TILE + s;
        let decays = decays(raw, &gating.formula, here, strip, d, bp);
        // The gates of the next strip are on their way meanwhile.
        if s + 1 < STRIPS_OF_TILE {
            read_gates::<G>(raw, &gating.g, here, strip + 1, d, bp);
        }
        let own = Channel::new(strip, d, bp);
        let mut from_start = 1.0f32;
        let mut to_end = 1.0f32;
        let mut reads = four_of(floats, strip, READS_AT, 0usize);
        let mut norms = four_of(floats, strip, KEY_NORMS_AT, 0usize);
        #[unroll]
        for r in 0..STRIP {
            if comptime!(r == 4) {
                reads = four_of(floats, strip, READS_AT, r);
                norms = four_of(floats, strip, KEY_NORMS_AT, r);
            }
            from_start *= decays[r];
            let q = own.element::<F>(tile, bp.raw_queries_at(), r, bp) * reads[comptime!(r % 4)];
            // X comes without the sign that E and H have it with.
            let less_k = -own.element::<F>(tile, bp.raw_keys_at(), r, bp) * norms[comptime!(r % 4)];
            own.put_element::<F>(tile, 0usize, r, q * from_start, bp);
            own.put_element::<F>(tile, bp.k_at(), r, less_k * from_start, bp);
        }
        let mut writes = four_of(floats, strip, WRITES_AT, 4usize);
        #[unroll]
        for down in 0..STRIP {
            let r = comptime!(STRIP - 1 - down);
            if comptime!(r == 3) {
                writes = four_of(floats, strip, WRITES_AT, r);
            }
            let k = own.element::<F>(tile, bp.raw_keys_at(), r, bp) * writes[comptime!(r % 4)];
            own.put_element::<F>(tile, bp.keys_to_end_at(), r, k * to_end, bp);
            to_end *= decays[r];
        }
        floats[comptime!(bp.strip_decays_at()) + index_of(strip, d, bp)] = to_end;
    }
}
