//! The state between device memory and the registers of the scanning planes.

use cubecl::prelude::*;

use super::blueprint::{BLOCK_UNITS, Blueprint, Pass, TILE};
use super::stage::Place;
use super::tile::{Acc, Frag, V2, V8, pack, zeros};
use crate::known::{known_and, known_or};
use crate::tensors::{StateStrides, States};

/// A plane's place in its cube.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Lane {
    pub(crate) plane: usize,
    pub(crate) lane: usize,
}

/// Where this unit's part of a state begins in device memory, and how far apart its parts lie: 8 key channels,
/// 8 value channels. Computed apart for reading and writing: what both share would be kept all along.
#[derive(CubeType, Clone, Copy)]
struct Part {
    origin: usize,
    key: usize,
    keys: usize,
    values: usize,
    /// First value channel, or row of the transfer behind them.
    value: usize,
}

/// The first of the rows of $S^T$ that this unit holds.
#[cube]
fn first_row(place: &Place, unit: Lane, #[comptime] bp: Blueprint) -> usize {
    place.v0 + unit.plane * comptime!(bp.held * TILE) + unit.lane / 4
}

#[cube]
fn part(at: &StateStrides, place: &Place, unit: Lane, #[comptime] bp: Blueprint) -> Part {
    let value = first_row(place, unit, bp);
    let head = place.n * at.n as usize + place.hv * at.h as usize;
    Part {
        origin: head + unit.lane % 4 * 2 * at.k as usize + value * at.v as usize,
        key: at.k as usize,
        keys: 8 * at.k as usize,
        values: 8 * at.v as usize,
        value,
    }
}

/// The state of this plane: the initial state, or zero; row V + i of a transfer begins as unit vector i.
#[cube]
pub(crate) fn load_state(
    from: &States<f32>,
    place: &Place,
    unit: Lane,
    #[comptime] bp: Blueprint,
) -> Sequence<Acc> {
    let mut state = zeros(comptime!(2 * bp.held * bp.key_steps()));
    if known_and(bp.pass == Pass::Segments, place.transfer) {
        start_transfer(&mut state, place, unit, bp);
    } else if comptime!(bp.spec.has_initial_state) {
        let part = part(&from.at, place, unit, bp);
        #[unroll]
        for m in 0..comptime!(bp.held) {
            #[unroll]
            for e in 0..2usize {
                let mut first = part.origin + comptime!(2 * m + e) * part.values;
                if known_or(bp.tiles_are_whole(), part.value + comptime!(16 * m + 8 * e) < bp.spec.value_dim)
                {
                    #[unroll]
                    for n in 0..comptime!(2 * bp.key_steps()) {
                        let mut x = Vector::<f32, V2>::cast_from(from.data[first]);
                        x[1] = from.data[first + part.key];
                        let acc = state.index_mut(comptime!(2 * m * bp.key_steps() + n));
                        acc[e] = x;
                        first += part.keys;
                    }
                }
            }
        }
    }
    state
}

/// Makes row V + i unit vector i.
#[cube]
fn start_transfer(state: &mut Sequence<Acc>, place: &Place, unit: Lane, #[comptime] bp: Blueprint) {
    let first = (first_row(place, unit, bp) - unit.lane % 4 * 2) as u32 - comptime!(bp.spec.value_dim as u32);
    #[unroll]
    for m in 0..comptime!(bp.held) {
        #[unroll]
        for e in 0..2usize {
            // The column that is 1, counted from this unit's first; of another unit's it is beyond all columns.
            let one = first + comptime!((16 * m + 8 * e) as u32);
            #[unroll]
            for n in 0..comptime!(2 * bp.key_steps()) {
                let mut x =
                    Vector::<f32, V2>::cast_from(select(one == comptime!(8 * n as u32), 1.0f32, 0.0f32));
                x[1] = select(one == comptime!(8 * n as u32 + 1), 1.0f32, 0.0f32);
                let acc = state.index_mut(comptime!(2 * m * bp.key_steps() + n));
                acc[e] = x;
            }
        }
    }
}

/// Keeps the state of this plane, rounded to left operands: tile by tile of $S^T$, row by row of tiles.
#[cube]
pub(crate) fn keep_state<F: Float>(
    state: &Sequence<Frag<F>>,
    to: &mut Array<Vector<F, V8>>,
    slot: usize,
    place: &Place,
    unit: Lane,
    #[comptime] bp: Blueprint,
) {
    let steps = comptime!(bp.key_steps());
    let first = place.v0 / TILE + unit.plane * comptime!(bp.held);
    #[unroll]
    for m in 0..comptime!(bp.held) {
        if known_or(bp.tiles_are_whole(), first + m < comptime!(bp.spec.value_dim / TILE)) {
            let row = slot + (first + m) * comptime!(bp.key_steps() * BLOCK_UNITS) + unit.lane;
            #[unroll]
            for step in 0..steps {
                to[row + comptime!(step * BLOCK_UNITS)] =
                    pack::<F>(state.index(comptime!(step * bp.held + m)));
            }
        }
    }
}

/// Writes the state of this plane.
#[cube]
pub(crate) fn store_state(
    state: &Sequence<Acc>,
    to: &mut States<f32>,
    place: &Place,
    unit: Lane,
    #[comptime] bp: Blueprint,
) {
    let part = part(&to.at, place, unit, bp);
    let rows = if known_and(bp.pass == Pass::Segments, place.transfer) {
        comptime!(bp.transfer_rows()).runtime()
    } else {
        comptime!(bp.spec.value_dim).runtime()
    };
    #[unroll]
    for m in 0..comptime!(bp.held) {
        #[unroll]
        for e in 0..2usize {
            let mut first = part.origin + comptime!(2 * m + e) * part.values;
            if known_or(bp.tiles_are_whole(), part.value + comptime!(16 * m + 8 * e) < rows) {
                #[unroll]
                for n in 0..comptime!(2 * bp.key_steps()) {
                    let acc = state.index(comptime!(2 * m * bp.key_steps() + n));
                    let x = acc[e];
                    to.data[first] = x[0];
                    to.data[first + part.key] = x[1];
                    first += part.keys;
                }
            }
        }
    }
}
