//! The inverses of a chunk's leaves, and the factors of its micro-steps.

use cubecl::prelude::*;

use super::blueprint::{BLOCK_UNITS, BLOCKS, Blueprint, ERASE_AT, LEAF_PAIRS, LEAF_ROW, TILE, WRITE_AT};
use super::chunk::Target;
use super::gates::Gates;
use super::tile::{Tile, V2, V4, V8, in_block};
use crate::known::known_and;

/// Scratch for the leaves of as many chunks at a time.
#[cube]
pub(crate) fn new_leaves(#[comptime] chunks: usize) -> SharedMemory<Vector<f32, V2>> {
    SharedMemory::<Vector<f32, V2>>::new_aligned(comptime!(chunks * BLOCKS * LEAF_PAIRS), 16usize)
}

/// Leaves row `row` of T, or for the backward of the inverse alone, and the factors of
/// that micro-step, if this unit `works`.
#[cube]
pub(crate) fn leave_inverse<F: Float>(
    tile: &mut Tile<F>,
    factors: &mut SharedMemory<f32>,
    leaves: &SharedMemory<Vector<f32, V2>>,
    gates: &Gates,
    rho: f32,
    to: Target,
    row: usize,
    works: bool,
    #[comptime] bp: Blueprint,
) {
    let backward = comptime!(bp.pass.is_backward());
    let block = row / TILE;
    let own = row % TILE;
    // Beside a scan every read counts; without one longer reads take registers that `ptxas` does not give.
    let leaf = to.leaves + block * LEAF_PAIRS;
    let t = if comptime!(bp.prepared) {
        invert_row::<V2>(leaves, leaf, own)
    } else {
        invert_row::<V4>(leaves, leaf, own)
    };
    let sum = plane_shuffle(gates.sum, row as u32);
    if works {
        let at = to.factors + row;
        factors[at + ERASE_AT] = rho * f32::exp(sum);
        factors[at + WRITE_AT] = f32::exp(gates.total - sum);
    }
    let own_beta = plane_shuffle(gates.beta, row as u32);
    if known_and(backward, works) {
        factors[to.factors + comptime!(bp.betas_at()) + row] = rho * own_beta;
    }
    let at = to.blocks + block * BLOCK_UNITS;
    #[unroll]
    for half in 0..2usize {
        let mut x = Vector::<F, V8>::cast_from(0.0f32);
        #[unroll]
        for e in 0..8usize {
            let j = comptime!(8 * half + e);
            if comptime!(backward) {
                x[e] = F::cast_from(t[j]);
            } else if comptime!(bp.beta_on_the_right()) {
                x[e] = F::cast_from(rho * own_beta * t[j]);
            } else {
                let b = plane_shuffle(gates.beta, (block * TILE + j) as u32);
                x[e] = F::cast_from(rho * t[j] * b);
            }
        }
        if works {
            tile[at + in_block(own, half)] = x;
        }
    }
}

/// Row `i` of $(I + L)^{-1}$ by substitution from the right: $t_j = \delta_{ij} - \sum_{m>j} t_m L_{mj}$. Rows of L are read W
/// floats at a time.
#[cube]
fn invert_row<W: Size>(leaves: &SharedMemory<Vector<f32, V2>>, leaf: usize, i: usize) -> Array<f32> {
    let rows = leaves.slice(0usize, leaves.len()).with_vector_size::<W>();
    let width = rows.vector_size();
    let first = 2 * leaf / width;
    let mut t = Array::<f32>::new(TILE);
    #[unroll]
    for j in 0..TILE {
        t[j] = select(i == j, 1.0f32, 0.0f32);
    }
    #[unroll]
    for down in 0..comptime!(TILE - 1) {
        let m = comptime!(TILE - 1 - down);
        let x = -t[m];
        #[unroll]
        for part in 0..comptime!(m.div_ceil(width)) {
            let l = rows[first + comptime!(2 * m * LEAF_ROW / width) + part];
            #[unroll]
            for e in 0..width {
                let j = comptime!(width * part + e);
                if comptime!(j < m) {
                    t[j] = fma(x, l[e], t[j]);
                }
            }
        }
    }
    t
}
