//! Gram matrices with a gate per key channel, for any gates.
//!
//! $\Gamma_{ij} = \prod_{l=j+1}^{i} D_l$ lies inside the sum over channels and must be split into a factor of row i and
//! one of row j. The split is where the two rows part: with h the highest bit in which i and j differ, row i lies in the
//! second half of a group of 2h rows, and row j in the first. Row i takes the product from the middle of the group to
//! itself, row j the product behind it up to the middle: both in `[0, 1]`, products without differences, so that no
//! gate is too strong. Every pair of rows belongs to one level h = 1, 2, 4, 8, 16; a level is one product of scaled
//! rows, of which the pairs of that level are kept. The diagonal has no decay.
//!
//! A plane takes 16 rows and 32 channels of them at a time. As in `gram.rs` the order of channels does not matter to a
//! product, so that the 16 bytes that a unit reads of a row are its part of the operands. Rows change places too: those
//! that a unit holds are neighbours, 2i and 2i + 1, the operand's rows i and i + 8. Then level 1 needs no other unit, and
//! the others one shuffle for two rows. Planes meet for level 16, between their tiles, and to add up channels.
//!
//! ```text
//! levels    h = 1, 2, 4, 8 in a plane's registers
//! rows      h = 16, and rows decayed to the start and the end of the chunk for the record
//! partial   sums over the slices of channels
//! ```

mod levels;
mod partial;
mod rows;

pub(crate) use levels::leave_levels;
pub(crate) use partial::{Partial, partial_bytes};
pub(crate) use rows::leave_rows;

use cubecl::prelude::*;

use super::arguments::Rows;
use super::blueprint::{BLOCKS, Blueprint, CHUNK, PREPARE_PLANES, SLICE, TILE};
use super::stage::{Place, Source, keys_of, queries_of};
use super::tile::{Frag, V2, V4, V8, unpack};
use crate::known::known_or;
use crate::math::{decay_of, gate_constants};
use crate::spec::GateMap;
use crate::tensors::Gating;

/// Rows that a unit holds.
const ROWS: usize = 2;
/// Pairs of channels that a unit holds of each.
const PAIRS: usize = 4;
/// Steps of a product over the channels of a slice.
const STEPS: usize = SLICE / TILE;
/// Units of 16 bytes in which the first tile leaves a slice of its keys for the second.
pub(crate) const SEEN_UNITS: usize = 32 * STEPS;

/// The part of a chunk that a plane takes, and that of a unit in it. 32 bits, known to be few: then constants become part
/// of addresses.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Slice {
    /// Which 16 rows.
    pub(crate) block: u32,
    /// Which 32 channels.
    pub(crate) slice: u32,
    pub(crate) lane: u32,
    /// The unit's channels, in units of 8, and whether K has them; else the last ones.
    col: u32,
    inside: bool,
}

/// What a unit holds: pair `p` of channels in row `r` at `PAIRS r + p`.
#[derive(CubeType)]
pub(crate) struct Share<F: Float> {
    k: Array<Vector<F, V2>>,
    q: Array<Vector<F, V2>>,
    /// The decay from the start of a group to the row.
    from: Array<Vector<f32, V2>>,
    /// That behind the row to the end of the group.
    to: Array<Vector<f32, V2>>,
}

#[cube]
impl Slice {
    /// That of its `turn`th.
    pub(crate) fn new(unit: u32, turn: u32, #[comptime] bp: Blueprint) -> Self {
        let (lane, plane) = (unit % 32, unit / 32);
        let blocks = comptime!(BLOCKS as u32);
        let slice = comptime!((PREPARE_PLANES / BLOCKS) as u32) * turn + plane / blocks;
        let own = slice * comptime!((SLICE / 8) as u32) + lane % 4;
        let units = comptime!((bp.spec.key_dim / 8) as u32);
        // Every plane has a slice in every turn.
        let all = comptime!(bp.spec.key_dim.is_multiple_of(SLICE * PREPARE_PLANES / BLOCKS));
        let inside = known_or(all, own < units);
        let col = if comptime!(all) { own } else { u32::min(own, units - 1) };
        Slice { block: plane % blocks, slice, lane, col, inside }
    }

    /// The chunk's row that is the unit's row `r`.
    fn row(&self, #[comptime] r: usize) -> u32 {
        self.block * comptime!(TILE as u32) + self.lane / 4 * comptime!(ROWS as u32) + comptime!(r as u32)
    }
}

/// Reads a unit's share of chunk `c`. Rows past the end of the sequence repeat the last one, undecayed.
#[cube]
pub(crate) fn read_share<F: Float, B: Float, G: Float>(
    q: &Rows<F>,
    k: &Rows<F>,
    gating: &Gating<B, Vector<G, V4>>,
    place: &Place,
    c: usize,
    at: Slice,
    #[comptime] bp: Blueprint,
) -> Share<F> {
    let keys = read_rows::<F>(&k.data, keys_of::<F>(k, place, c, bp), at);
    let queries = read_rows::<F>(&q.data, queries_of::<F>(q, place, c, bp), at);
    let mut from = Array::new(comptime!(ROWS * PAIRS));
    let mut to = Array::new(comptime!(ROWS * PAIRS));
    let g = &gating.g;
    let first = g.at.at(place.seq.row, place.seq.start + c * CHUNK, place.hv) / 4;
    let tokens = (place.seq.tokens - c * CHUNK) as u32;
    #[unroll]
    for r in 0..ROWS {
        let row = u32::min(at.row(r), tokens - 1);
        let valid = at.row(r) < tokens;
        #[unroll]
        for half in 0..2usize {
            let mut raw = Vector::<f32, V4>::cast_from(0.0f32);
            if at.inside && known_or(bp.spec.gate != GateMap::Identity, valid) {
                raw = Vector::cast_from(
                    g.data[first + (row * (g.at.t / 4) + 2 * at.col + comptime!(half as u32)) as usize],
                );
            }
            #[unroll]
            for p in 0..2usize {
                let mut d = Vector::<f32, V2>::cast_from(1.0f32);
                #[unroll]
                for e in 0..2usize {
                    let i = comptime!(2 * p + e);
                    let (a, bias) = gate_constants(
                        &gating.formula,
                        place.hv,
                        (8 * at.col + comptime!((4 * half + i) as u32)) as usize,
                        bp.spec,
                    );
                    let x = decay_of(raw[i], a, bias, gating.formula.lower_bound, bp.spec.gate);
                    d[e] = select(known_or(bp.spec.gate == GateMap::Identity, at.inside && valid), x, 1.0f32);
                }
                from[comptime!(PAIRS * r + 2 * half + p)] = d;
                to[comptime!(PAIRS * r + 2 * half + p)] = Vector::<f32, V2>::cast_from(1.0f32);
            }
        }
    }
    Share::<F> { k: unpack_rows::<F>(&keys), q: unpack_rows::<F>(&queries), from, to }
}

/// The unit's part of its rows.
#[cube]
fn read_rows<F: Float>(src: &Array<Vector<F, V8>>, source: Source, at: Slice) -> Array<Vector<u32, V4>> {
    let mut rows = Array::<Vector<u32, V4>>::new(ROWS);
    #[unroll]
    for r in 0..ROWS {
        let row = u32::min(at.row(r), source.last);
        rows[r] = Vector::cast_from(0u32);
        if at.inside {
            rows[r] = Vector::reinterpret(src[(source.from + row * source.stride + at.col) as usize]);
        }
    }
    rows
}

#[cube]
fn unpack_rows<F: Float>(rows: &Array<Vector<u32, V4>>) -> Array<Vector<F, V2>> {
    let mut x = Array::new(comptime!(ROWS * PAIRS));
    #[unroll]
    for r in 0..ROWS {
        let row = unpack::<F>(Vector::reinterpret(rows[r]));
        #[unroll]
        for p in 0..PAIRS {
            x[comptime!(PAIRS * r + p)] = row[p];
        }
    }
    x
}

/// What a unit's rows are in the left operand of step `step`: pair by pair, both rows of each.
#[cube]
fn of_step<T: CubePrimitive>(x: &Array<T>, #[comptime] step: usize) -> Array<T> {
    let mut y = Array::<T>::new(4usize);
    #[unroll]
    for p in 0..2usize {
        #[unroll]
        for r in 0..ROWS {
            y[comptime!(2 * p + r)] = x[comptime!(PAIRS * r + 2 * step + p)];
        }
    }
    y
}

/// An operand times the factors of its rows, from row `first` on. `quick`: two products at a time, but with factors that
/// are rounded first. Inside a tile keys bear that; of queries, o would show it (3.32e-3 in place of 3.23e-3).
#[cube]
fn scaled<F: Float>(
    x: &Frag<F>,
    by: &Array<Vector<f32, V2>>,
    #[comptime] first: usize,
    #[comptime] quick: bool,
) -> Frag<F> {
    let mut y = Frag::<F>::new(4usize);
    #[unroll]
    for i in 0..4usize {
        if comptime!(i % ROWS < first) {
            y[i] = x[i];
        } else if comptime!(quick) {
            y[i] = x[i] * Vector::cast_from(by[i]);
        } else {
            y[i] = Vector::cast_from(Vector::<f32, V2>::cast_from(x[i]) * by[i]);
        }
    }
    y
}

/// Where the first tile leaves the keys that the second sees.
#[cube]
fn seen_keys(at: Slice, #[comptime] step: usize, #[comptime] bp: Blueprint) -> usize {
    let first = comptime!((bp.prepared_blocks() + 32 * step) as u32);
    (first + at.slice * comptime!(SEEN_UNITS as u32) + at.lane) as usize
}

/// Where tile `block` of rows leaves its decay of the unit's pair `p` of channels.
#[cube]
fn whole_at(at: Slice, block: u32, #[comptime] p: usize, #[comptime] bp: Blueprint) -> usize {
    let pairs = comptime!((SLICE / 2) as u32);
    let unit =
        (block * comptime!(bp.slices() as u32) + at.slice) * pairs + at.lane % 4 * comptime!(PAIRS as u32);
    (unit + comptime!(p as u32)) as usize
}
