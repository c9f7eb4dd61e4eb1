//! The states between the segments of split sequences.
//!
//! A segment is an affine map of the state: row by row, $S^T \leftarrow S^T A + N^T$. The transfer pass of
//! [`forward`](mod@super::forward) has left $N^T$ [V, K] and $A$ [K, K] in the slot of each inner segment. A cube takes a
//! few rows of $S^T$ along the segments of its sequence, in f32, and leaves in each slot, in place of $N^T$, the state with
//! which the segment begins.

use cubecl::prelude::*;

use super::stage::along_y;
use crate::order::declare_in_order;
use crate::record::F4;
use crate::spec::Spec;
use crate::tensors::States;

/// Rows of $S^T$ that a cube takes, and parts into which the rows of A are dealt.
const ROWS: usize = 8;
/// Rows of A that a unit multiplies by at a time.
const STEP: usize = 4;

/// Units of a cube: one for four columns and a part of the rows of A.
pub fn units(spec: &Spec) -> usize {
    ROWS * columns(spec)
}

/// Columns of a state, four at a time.
fn columns(spec: &Spec) -> usize {
    spec.key_dim / 4
}

/// Cubes that share the rows of one head.
pub fn tiles(spec: &Spec) -> usize {
    spec.value_dim / ROWS
}

/// Unit `u` has four columns, those of neighbours lie side by side, and part `p = u / columns`. It multiplies rows `4 p` to
/// `4 p + 3` of A, `4 (p + 8)` and so on, and keeps row `p` of the state.
///
/// Cube (x, n) takes rows `8 (x % tiles)` and the next of head `x / tiles` and sequence n, whose inner segments are those
/// from `table[inner_at + n]` to `table[inner_at + n + 1]`.
#[cube(launch_unchecked, address_type = "u64")]
pub fn combine(
    initial_state: &States<f32>,
    table: &Array<u32>,
    slots: &mut Array<F4>,
    inner_at: u32,
    sequences: u32,
    heads: u32,
    #[comptime] spec: Spec,
) {
    let n = along_y() as usize;
    if n >= sequences as usize {
        terminate!();
    }
    let tiles = comptime!(tiles(&spec));
    let hv = CUBE_POS_X as usize / tiles;
    let columns = comptime!(columns(&spec));
    let unit = UNIT_POS_X as usize;
    let part = unit / columns;
    let column = unit % columns;
    let row = CUBE_POS_X as usize % tiles * ROWS + part;

    let mut own = F4::new(0.0f32);
    if comptime!(spec.has_initial_state) {
        let at = initial_state.at;
        let from = n * at.n as usize + hv * at.h as usize + row * at.v as usize;
        #[unroll]
        for e in 0..4usize {
            own[e] = initial_state.data[from + (4 * column + e) * at.k as usize];
        }
    }
    // The rows of the state, and behind them those of the products.
    let mut shared = SharedMemory::<F4>::new(comptime!((1 + ROWS) * ROWS * columns));
    let mut ahead = Array::<F4>::new(STEP);
    let slot = comptime!((spec.value_dim + spec.key_dim) * columns);
    let own_at = row * columns + column;
    let transfer_at = comptime!(spec.value_dim * columns) + column;
    for segment in table[inner_at as usize + n]..table[inner_at as usize + n + 1] {
        let at = (segment as usize * heads as usize + hv) * slot;
        shared[unit] = own;
        ask_for(&mut ahead, slots, at + transfer_at, part, spec);
        let written = slots[at + own_at];
        sync_cube();
        slots[at + own_at] = own;
        multiply_part(&mut shared, slots, at + transfer_at, part, column, &mut ahead, spec);
        sync_cube();
        own = written;
        #[unroll]
        for p in 0..ROWS {
            own += shared[unit + comptime!((1 + p) * ROWS * columns)];
        }
    }
    slots[(n * heads as usize + hv) * slot + own_at] = own;
    declare_in_order();
}

/// Asks for this unit's columns of the [`STEP`] rows of A from `STEP * step` on, if A has them.
#[cube]
fn ask_for(ahead: &mut Array<F4>, slots: &Array<F4>, at: usize, step: usize, #[comptime] spec: Spec) {
    if step < comptime!(spec.key_dim / STEP) {
        let first = at + step * comptime!(STEP * columns(&spec));
        #[unroll]
        for i in 0..STEP {
            ahead[i] = slots[first + comptime!(i * columns(&spec))];
        }
    }
}

/// $S^T A$ over one part of the rows of A, `ahead` the first of them.
#[cube]
fn multiply_part(
    shared: &mut SharedMemory<F4>,
    slots: &Array<F4>,
    at: usize,
    part: usize,
    column: usize,
    ahead: &mut Array<F4>,
    #[comptime] spec: Spec,
) {
    let columns = comptime!(columns(&spec));
    let mut sums = Array::<F4>::new(ROWS);
    #[unroll]
    for r in 0..ROWS {
        sums[r] = F4::new(0.0f32);
    }
    let mut rows = Array::<F4>::new(STEP);
    let mut step = part;
    while step < comptime!(spec.key_dim / STEP) {
        #[unroll]
        for i in 0..STEP {
            rows[i] = ahead[i];
        }
        ask_for(ahead, slots, at, step + ROWS, spec);
        #[unroll]
        for r in 0..ROWS {
            let s = shared[step + comptime!(r * columns)];
            #[unroll]
            for i in 0..STEP {
                sums[r] = fma(F4::new(s[i]), rows[i], sums[r]);
            }
        }
        step += ROWS;
    }
    #[unroll]
    for r in 0..ROWS {
        shared[(1 + part) * comptime!(ROWS * columns) + comptime!(r * columns) + column] = sums[r];
    }
}
