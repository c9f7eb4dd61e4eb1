//! The inverses of a chunk's leaves, and the factors of its micro-steps.

use cubecl::prelude::*;

use super::blueprint::{BLOCK_UNITS, Blueprint, ERASE_AT, TILE, WRITE_AT};
use super::chunk::Target;
use super::gates::Gates;
use super::memory::Region;
use super::tile::{Tile, V2, V4, V8, in_block};
use crate::known::known_and;

/// Leaves row `row` of T, or for the backward of the inverse alone, and the factors of that micro-step, if this unit
/// `works`.
#[cube]
pub(crate) fn leave_inverse<F: Float>(
    tile: &mut Tile<F>,
    factors: &mut Region<f32>,
    leaves: &Region<Vector<f32, V2>>,
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
    let leaf = to.leaves + block * comptime!(bp.leaf_pairs());
    let t = invert_row(leaves, leaf, own, bp);
    let sum = gates.sum.of(factors, row);
    if works {
        let at = to.factors + row;
        factors[at + ERASE_AT] = rho * f32::exp(sum);
        factors[at + WRITE_AT] = f32::exp(gates.total - sum);
    }
    let mut by = rho;
    if comptime!(bp.beta_on_the_right()) {
        by *= gates.beta.of(factors, row);
        if known_and(backward, works) {
            factors[to.factors + comptime!(bp.betas_at()) + row] = by;
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
            } else if comptime!(bp.beta_on_the_right()) {
                x[e] = F::cast_from(by * t[j]);
            } else {
                let b = gates.beta.of(factors, block * TILE + j);
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
fn invert_row(
    leaves: &Region<Vector<f32, V2>>,
    leaf: usize,
    i: usize,
    #[comptime] bp: Blueprint,
) -> Array<f32> {
    let mut t = Array::<f32>::new(TILE);
    #[unroll]
    for j in 0..TILE {
        t[j] = select(i as u32 == comptime!(j as u32), 1.0f32, 0.0f32);
    }
    #[unroll]
    for down in 0..comptime!(TILE - 1) {
        let m = comptime!(TILE - 1 - down);
        let x = -t[m];
        #[unroll]
        for part in 0..comptime!(m.div_ceil(bp.leaf_width())) {
            let at = comptime!(m * bp.leaf_row() + part * bp.leaf_width() / 2);
            let l = read_leaf(leaves, leaf, at, bp);
            #[unroll]
            for e in 0..comptime!(bp.leaf_width()) {
                let j = comptime!(bp.leaf_width() * part + e);
                if comptime!(j < m) {
                    t[j] = fma(x, l.index(comptime!(e / 2))[comptime!(e % 2)], t[j]);
                }
            }
        }
    }
    t
}

/// The pairs at `at` of a leaf, as many as are read at a time.
#[cube]
fn read_leaf(
    leaves: &Region<Vector<f32, V2>>,
    leaf: usize,
    #[comptime] at: usize,
    #[comptime] bp: Blueprint,
) -> Sequence<Vector<f32, V2>> {
    let mut pairs = Sequence::<Vector<f32, V2>>::new();
    if comptime!(bp.leaf_width() == 2) {
        pairs.push(leaves[leaf + at]);
    } else {
        let fours = leaves.reinterpret::<Vector<f32, V4>>();
        let four = fours[leaf / 2 + comptime!(at / 2)];
        #[unroll]
        for i in 0..2usize {
            let mut pair = Vector::<f32, V2>::cast_from(four[comptime!(2 * i)]);
            pair[1] = four[comptime!(2 * i + 1)];
            pairs.push(pair);
        }
    }
    pairs
}
