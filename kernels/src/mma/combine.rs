//! The states between the segments of split sequences.
//!
//! A segment is an affine map of the state: row by row, $S^T \leftarrow S^T A + N^T$. The transfer pass of
//! [`forward`](mod@super::forward) has left $N^T$ [V, K] and $A$ [K, K] in the slot of each inner segment. A cube takes a
//! few rows of $S^T$ along the segments of its sequence, in f32, and leaves in each slot, in place of $N^T$, the state with
//! which the segment begins.

use cubecl::prelude::*;

use crate::record::{F4, StateStrides};
use crate::spec::Spec;

/// Rows of $S^T$ that a cube takes, and parts into which a unit's column of A is dealt.
const ROWS: usize = 8;

/// Units of a cube: one for four columns and a part of the rows of A.
pub fn units(spec: &Spec) -> usize {
    ROWS * spec.key_dim / 4
}

/// Cubes that share the rows of one head.
pub fn tiles(spec: &Spec) -> usize {
    spec.value_dim / ROWS
}

/// Unit `u` sums over rows `u % 8`, `u % 8 + 8`, ... of A for columns `4 (u / 8)` and the next, and keeps these
/// columns of row `u % 8`.
///
/// Cube `p` takes rows `8 (p % tiles)` and the next, head `p / tiles % heads` and sequence `p / (tiles * heads)`.
/// The inner segments of sequence n are those from `table[inner_at + n]` to `table[inner_at + n + 1]`.
#[cube(launch_unchecked, address_type = "u64")]
pub fn combine(
    initial_state: &Array<f32>,
    table: &Array<u32>,
    slots: &mut Array<F4>,
    initial_at: StateStrides,
    inner_at: u32,
    sequences: u32,
    heads: u32,
    #[comptime] spec: Spec,
) {
    let tiles = comptime!(tiles(&spec));
    let cube = CUBE_POS;
    if cube >= (sequences * heads) as usize * tiles {
        terminate!();
    }
    let n = cube / (tiles * heads as usize);
    let hv = cube / tiles % heads as usize;
    let part = UNIT_POS as usize % ROWS;
    let column = UNIT_POS as usize / ROWS;
    let row = cube % tiles * ROWS + part;

    let mut own = F4::new(0.0f32);
    if comptime!(spec.has_initial_state) {
        let from = n * initial_at.n as usize + hv * initial_at.h as usize + row * initial_at.v as usize;
        #[unroll]
        for e in 0..4usize {
            own[e] = initial_state[from + (4 * column + e) * initial_at.k as usize];
        }
    }
    // Rows of odd length, for the banks.
    let ld = comptime!(spec.key_dim + 1);
    let mut state = SharedMemory::<f32>::new(comptime!(ROWS * ld));
    let slot = comptime!((spec.value_dim + spec.key_dim) * spec.key_dim / 4);
    let own_at = row * comptime!(spec.key_dim / 4) + column;
    let transfer_at = comptime!(spec.value_dim * spec.key_dim / 4) + column;
    for segment in table[inner_at as usize + n]..table[inner_at as usize + n + 1] {
        let at = (segment as usize * heads as usize + hv) * slot;
        #[unroll]
        for e in 0..4usize {
            state[part * ld + 4 * column + e] = own[e];
        }
        sync_cube();
        let written = slots[at + own_at];
        slots[at + own_at] = own;
        own = written + times_transfer(&state, slots, at + transfer_at, part, spec);
        sync_cube();
    }
    slots[(n * heads as usize + hv) * slot + own_at] = own;
}

/// $S^T A$ at the row and columns of this unit.
#[cube]
fn times_transfer(
    state: &SharedMemory<f32>,
    slots: &Array<F4>,
    at: usize,
    part: usize,
    #[comptime] spec: Spec,
) -> F4 {
    let ld = comptime!(spec.key_dim + 1);
    let mut sums = Array::<F4>::new(ROWS);
    #[unroll]
    for r in 0..ROWS {
        sums[r] = F4::new(0.0f32);
    }
    #[unroll]
    for i in 0..comptime!(spec.key_dim / ROWS) {
        let depth = part + comptime!(i * ROWS);
        let a = slots[at + depth * comptime!(spec.key_dim / 4)];
        #[unroll]
        for r in 0..ROWS {
            sums[r] = fma(F4::new(state[r * ld + depth]), a, sums[r]);
        }
    }
    // Eight units hold parts of eight rows: in three exchanges each gets the sum of the row of its own number.
    #[unroll]
    for level in 0..3usize {
        let half = comptime!(ROWS >> (level + 1));
        let upper = part / half % 2 == 1;
        #[unroll]
        for r in 0..half {
            let low = sums[r];
            let high = sums[comptime!(r + half)];
            let mut sum = F4::new(0.0f32);
            #[unroll]
            for e in 0..4usize {
                let given = select(upper, low[e], high[e]);
                sum[e] = select(upper, high[e], low[e]) + plane_shuffle_xor(given, comptime!(half as u32));
            }
            sums[r] = sum;
        }
    }
    sums[0]
}
