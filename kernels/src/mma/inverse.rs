//! The inverses of a chunk's leaves, and the factors of its micro-steps.

use cubecl::prelude::*;

use super::blueprint::{BLOCK_UNITS, BLOCKS, Blueprint, ERASE_AT, LEAF_PAIRS, LEAF_ROW, TILE, WRITE_AT};
use super::chunk::Target;
use super::gates::Gates;
use super::tile::{Tile, V2, V8, in_block};

/// Scratch for the leaves of as many chunks at a time.
#[cube]
pub(crate) fn new_leaves(#[comptime] chunks: usize) -> SharedMemory<Vector<f32, V2>> {
    SharedMemory::<Vector<f32, V2>>::new(comptime!(chunks * BLOCKS * LEAF_PAIRS))
}

/// Leaves row `row` of $\mathrm{diag}(\rho)(I + L)^{-1}\mathrm{diag}(\beta)$, or of the inverse alone, and the factors of
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
    let t = invert_row(leaves, to.leaves + block * LEAF_PAIRS, own);
    let sum = plane_shuffle(gates.sum, row as u32);
    if works {
        let at = to.factors + row;
        factors[at + ERASE_AT] = rho * f32::exp(sum);
        factors[at + WRITE_AT] = f32::exp(gates.total - sum);
    }
    if comptime!(backward) {
        let beta = plane_shuffle(gates.beta, row as u32);
        if works {
            factors[to.factors + comptime!(bp.betas_at()) + row] = rho * beta;
        }
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

/// Row `i` of $(I + L)^{-1}$ by substitution from the right: $t_j = \delta_{ij} - \sum_{m>j} t_m L_{mj}$.
#[cube]
fn invert_row(leaves: &SharedMemory<Vector<f32, V2>>, leaf: usize, i: usize) -> Array<f32> {
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
        for pair in 0..comptime!(m.div_ceil(2)) {
            let l = leaves[leaf + comptime!(m * LEAF_ROW) + pair];
            t[comptime!(2 * pair)] = fma(x, l[0], t[comptime!(2 * pair)]);
            if comptime!(2 * pair + 1 < m) {
                t[comptime!(2 * pair + 1)] = fma(x, l[1], t[comptime!(2 * pair + 1)]);
            }
        }
    }
    t
}
