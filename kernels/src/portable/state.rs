//! A cube's tile of the state, in the registers of its units, and what happens to it.
//!
//! A unit holds some keys of a few value channels, C of them in a vector. To decay and to write are its own affair; what
//! it reads are partial sums, which pass through shared memory ([`Sums`]).

use cubecl::prelude::*;

use super::blueprint::Blueprint;
use super::stage::Stage;
use crate::known::{known_and, known_or};
use crate::record::F4;
use crate::spec::Decay;
use crate::tensors::States;

/// What a cube of `scan` or `sweep` works on, and which part of it a unit does.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Place {
    /// The sequence.
    pub(crate) n: usize,
    /// The head among those of the pass, and among all.
    pub(crate) head: usize,
    pub(crate) hv: usize,
    /// Which of the units that share a column.
    pub(crate) part: usize,
    /// The unit's column in the tile, in vectors, and its first value channel.
    pub(crate) col: usize,
    pub(crate) channel: usize,
}

/// Cube `p` takes value tile `p % tiles`, head `first_head + p / tiles % heads` and sequence
/// `p / (tiles * heads)`.
#[cube]
pub(crate) fn place_of(p: usize, first_head: u32, heads: u32, #[comptime] bp: Blueprint) -> Place {
    let tiles = comptime!(bp.value_tiles());
    let head = p / tiles % heads as usize;
    let col = UNIT_POS as usize % comptime!(bp.tile_cols());
    Place {
        n: p / (tiles * heads as usize),
        head,
        hv: first_head as usize + head,
        part: UNIT_POS as usize / comptime!(bp.tile_cols()),
        col,
        channel: p % tiles * bp.value_tile + bp.unit_values * col,
    }
}

/// A unit's part of the state S, or of its gradient: a vector of value channels for each of its keys.
#[derive(CubeType)]
pub(crate) struct State<C: Size> {
    keys: Array<Vector<f32, C>>,
}

#[cube]
impl<C: Size> State<C> {
    /// Zero where none is `given`, and beyond K and V. It is read by vectors of as many value channels, if these lie side by
    /// side, or one by one.
    pub(crate) fn load<S: Size>(
        from: &States<Vector<f32, S>>,
        at: Place,
        #[comptime] given: bool,
        #[comptime] bp: Blueprint,
    ) -> State<C> {
        let lanes = from.data.vector_size();
        let mut keys = Array::<Vector<f32, C>>::new(bp.unit_keys);
        #[unroll]
        for r in 0..bp.unit_keys {
            let mut s = Vector::<f32, C>::new(0.0f32);
            let key = at.part * bp.unit_keys + r;
            if known_and(given, is_key(key, bp)) {
                let row = from.at.row(at.n, at.hv, key);
                if comptime!(lanes == bp.unit_values) {
                    if is_value(at.channel, bp) {
                        s = Vector::cast_from(from.data[(row + at.channel) / lanes]);
                    }
                } else {
                    #[unroll]
                    for e in 0..bp.unit_values {
                        if is_value(at.channel + e, bp) {
                            s[e] = from.data[row + (at.channel + e) * from.at.v as usize][0];
                        }
                    }
                }
            }
            keys[r] = s;
        }
        State::<C> { keys }
    }

    /// The reverse of [`load`](Self::load).
    pub(crate) fn store<S: Size>(
        &self,
        to: &mut States<Vector<f32, S>>,
        at: Place,
        #[comptime] bp: Blueprint,
    ) {
        let lanes = to.data.vector_size();
        #[unroll]
        for r in 0..bp.unit_keys {
            let key = at.part * bp.unit_keys + r;
            if is_key(key, bp) {
                let row = to.at.row(at.n, at.hv, key);
                if comptime!(lanes == bp.unit_values) {
                    if is_value(at.channel, bp) {
                        to.data[(row + at.channel) / lanes] = Vector::cast_from(self.keys[r]);
                    }
                } else {
                    #[unroll]
                    for e in 0..bp.unit_values {
                        if is_value(at.channel + e, bp) {
                            to.data[row + (at.channel + e) * to.at.v as usize] =
                                Vector::cast_from(self.keys[r][e]);
                        }
                    }
                }
            }
        }
    }

    /// Copies it into a record.
    pub(crate) fn keep(
        &self,
        scratch: &mut Array<Vector<f32, C>>,
        to: usize,
        at: Place,
        #[comptime] bp: Blueprint,
    ) {
        #[unroll]
        for r in 0..bp.unit_keys {
            scratch[to + row_of(at.part * bp.unit_keys + r, at, bp)] = self.keys[r];
        }
    }

    /// S <- D S, of staged micro-step `i`.
    pub(crate) fn decay(&mut self, stage: &Stage<C>, i: usize, at: Place, #[comptime] bp: Blueprint) {
        if comptime!(bp.spec.decay == Decay::Head) {
            let d = Vector::new(stage.head_decays[i]);
            #[unroll]
            for r in 0..bp.unit_keys {
                self.keys[r] *= d;
            }
        } else if comptime!(bp.spec.decay == Decay::Channel) {
            let d = row(&stage.decays, i, at, bp);
            #[unroll]
            for r in 0..bp.unit_keys {
                self.keys[r] *= Vector::new(d[r / 4][r % 4]);
            }
        }
    }

    /// This unit's part of $S^\top x$.
    pub(crate) fn read(&self, x: &Array<F4>, #[comptime] bp: Blueprint) -> Vector<f32, C> {
        // Two sums, which need not wait for each other.
        let mut even = Vector::new(0.0f32);
        let mut odd = Vector::new(0.0f32);
        #[unroll]
        for r in 0..comptime!(bp.unit_keys / 2) {
            even = fma(Vector::new(x[r / 2][2 * r % 4]), self.keys[2 * r], even);
            odd = fma(Vector::new(x[r / 2][2 * r % 4 + 1]), self.keys[2 * r + 1], odd);
        }
        even + odd
    }

    /// S <- S + x n^T.
    pub(crate) fn write(&mut self, x: &Array<F4>, n: Vector<f32, C>, #[comptime] bp: Blueprint) {
        #[unroll]
        for r in 0..bp.unit_keys {
            self.keys[r] = fma(Vector::new(x[r / 4][r % 4]), n, self.keys[r]);
        }
    }
}

/// This unit's keys of staged row `i`: all are asked for before the first is used.
#[cube]
pub(crate) fn row(rows: &SharedMemory<F4>, i: usize, at: Place, #[comptime] bp: Blueprint) -> Array<F4> {
    let first = i * comptime!(bp.staged_row()) + at.part * comptime!(bp.staged_part());
    let mut x = Array::<F4>::new(comptime!(bp.unit_keys / 4));
    #[unroll]
    for j in 0..comptime!(bp.unit_keys / 4) {
        x[j] = rows[first + j];
    }
    x
}

#[cube]
fn is_key(key: usize, #[comptime] bp: Blueprint) -> bool {
    known_or(bp.padded_key_dim() == bp.spec.key_dim, key < bp.spec.key_dim)
}

#[cube]
fn is_value(channel: usize, #[comptime] bp: Blueprint) -> bool {
    known_or(bp.value_tiles() * bp.value_tile == bp.spec.value_dim, channel < bp.spec.value_dim)
}

/// Where this unit's value channels of row `i` of a matrix in a record lie.
#[cube]
pub(crate) fn row_of(i: usize, at: Place, #[comptime] bp: Blueprint) -> usize {
    i * comptime!(bp.in_unit_vectors(bp.row4())) + at.channel / bp.unit_values
}

/// Partial sums on their way from the units of a column to each other.
#[derive(CubeType)]
pub(crate) struct Sums<C: Size> {
    parts: SharedMemory<Vector<f32, C>>,
}

#[cube]
impl<C: Size> Sums<C> {
    pub(crate) fn new(#[comptime] slots: usize, #[comptime] bp: Blueprint) -> Sums<C> {
        Sums::<C> { parts: SharedMemory::<Vector<f32, C>>::new(comptime!(slots * bp.scan_units())) }
    }

    /// Puts down this unit's part of a sum.
    pub(crate) fn put(&mut self, slot: usize, part: Vector<f32, C>, #[comptime] bp: Blueprint) {
        self.parts[slot * comptime!(bp.scan_units()) + UNIT_POS as usize] = part;
    }

    /// All parts of a column's sum, behind a barrier; always in the same order, by pairs.
    pub(crate) fn total(&self, slot: usize, col: usize, #[comptime] bp: Blueprint) -> Vector<f32, C> {
        let first = slot * comptime!(bp.scan_units()) + col;
        let parts = comptime!(bp.key_parts());
        let mut terms = Array::<Vector<f32, C>>::new(parts);
        #[unroll]
        for p in 0..parts {
            terms[p] = self.parts[first + p * comptime!(bp.tile_cols())];
        }
        #[unroll]
        for level in 0..comptime!(parts.next_power_of_two().ilog2() as usize) {
            let here = comptime!(parts.div_ceil(1 << level));
            let half = comptime!(here.div_ceil(2));
            #[unroll]
            for t in 0..comptime!(here - half) {
                let other = terms[t + half];
                terms[t] += other;
            }
        }
        terms[0]
    }
}
