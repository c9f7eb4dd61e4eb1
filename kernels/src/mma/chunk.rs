//! What a chunk needs before its state is known: gates, Gram matrices, and the inverse of their leaves.
//!
//! Plane `b` takes 16 rows of [K; Q] and multiplies them by the keys of the chunk. With $\rho$ the reciprocal
//! norms (or 1) and $\Gamma_{ij} = e^{G_i - G_j}$, the writes of the chunk, N with row j times $\rho_j$,
//! obey, block by block,
//!
//! ```text
//! N_0 = T_0 (V_0 - e^G . K_0 S)         T_b = diag(rho) (I + diag(beta) A_b)^-1 diag(beta)
//! N_1 = T_1 (V_1 - e^G . K_1 S - E N_0)   E = Gamma . K_1 K_0^T
//! ```
//!
//! so that only 16 x 16 leaves are inverted, and T is never multiplied out. With beta on the right it is
//! $T_b = \mathrm{diag}(\rho \beta) M_b$, $M_b = (I + A_b\,\mathrm{diag}(\beta))^{-1}$, the same in exact arithmetic. The backward wants
//! the residuals themselves, R with $N = \mathrm{diag}(\rho \beta) R$: $M_b$ takes the place of $T_b$, and beta becomes a factor.

use cubecl::prelude::*;

use super::blueprint::{BLOCK_UNITS, BLOCKS, Blueprint, CHUNK, DECAY_AT, ERASE_BLOCK, READ_AT, TILE};
use super::gates::Gates;
use super::gram::Gram;
use super::inverse::leave_inverse;
use super::memory::Region;
use super::tile::{Acc, Mma, Tile, V2, in_block, scale_columns, store, to_frag};
use crate::known::{known_and, known_or};
use crate::spec::Decay;

/// A per-row value of this plane's rows, at the columns of its accumulator `n` of 2.
#[cube]
fn rows_at_columns(rows: Vector<f32, V2>, lane: usize, #[comptime] n: usize) -> Vector<f32, V2> {
    let from = (lane % 4 * 8) as u32;
    let mut out = Vector::<f32, V2>::cast_from(plane_shuffle(rows[n], from));
    out[1] = plane_shuffle(rows[n], from + 4);
    out
}

/// The reciprocal norms, or 1.
#[cube]
fn reciprocal_norms(gram: &Gram, #[comptime] bp: Blueprint) -> Vector<f32, V2> {
    let mut r = Vector::<f32, V2>::cast_from(1.0f32);
    if comptime!(bp.spec.qk_l2norm) {
        r[0] = f32::inverse_sqrt(gram.squares[0] + 1e-6f32);
        r[1] = f32::inverse_sqrt(gram.squares[1] + 1e-6f32);
    }
    r
}

/// A row's values in two columns times the decay from these to the row: $\Gamma$.
#[cube]
fn decayed(
    x: Vector<f32, V2>,
    row: f32,
    columns: Vector<f32, V2>,
    #[comptime] bp: Blueprint,
) -> Vector<f32, V2> {
    let mut w = x;
    if comptime!(bp.spec.decay == Decay::Head) {
        w[0] = w[0] * f32::exp(f32::min(row - columns[0], 0.0f32));
        w[1] = w[1] * f32::exp(f32::min(row - columns[1], 0.0f32));
    }
    w
}

/// Two columns of a row, those past `limit` as 0.
#[cube]
fn until(x: Vector<f32, V2>, column: u32, limit: u32) -> Vector<f32, V2> {
    let mut w = x;
    w[0] = select(column <= limit, w[0], 0.0f32);
    w[1] = select(column < limit, w[1], 0.0f32);
    w
}

/// Stores a 16 x 16 block that later is a right operand.
#[cube]
fn store_block<F: Float>(mma: &Mma<F>, tile: &mut Tile<F>, at: usize, lo: &Acc, hi: &Acc, lane: usize) {
    let row = lane / 8 % 2 * 8 + lane % 8;
    store::<F>(mma, tile, at + in_block(row, lane / 16), &to_frag::<F>(lo, hi), false);
}

/// Stores the block below the diagonal: the products of rows of the second half with the keys of the first,
/// times a factor per row and the decay of each column until the second half. With the decay of each row since
/// then, that is $\Gamma$, both factors in `[0, 1]`.
#[cube]
fn store_below<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    at: usize,
    gram: &Gram,
    rows: Vector<f32, V2>,
    factors: &Region<f32>,
    gates: &Gates,
    lane: usize,
    #[comptime] bp: Blueprint,
) {
    let mut below = Sequence::<Acc>::new();
    #[unroll]
    for n in 0..2usize {
        let acc = gram.products.index(n);
        let mut out = Acc::new(2usize);
        out[0] = acc[0] * Vector::cast_from(rows[0]);
        out[1] = acc[1] * Vector::cast_from(rows[1]);
        if comptime!(bp.spec.decay == Decay::Head) {
            scale_columns(&mut out, gates.split.at_columns(factors, n, lane));
        }
        below.push(out);
    }
    store_block::<F>(mma, tile, at, below.index(0usize), below.index(1usize), lane);
}

/// Where one chunk's results go.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Target {
    /// First unit of its blocks.
    pub(crate) blocks: usize,
    /// First of its factors.
    pub(crate) factors: usize,
    /// First of the pairs of its leaves.
    pub(crate) leaves: usize,
}

#[cube]
impl Target {
    /// The place in stage `i` of the cube's stages.
    pub(crate) fn of_stage(i: usize, #[comptime] bp: Blueprint) -> Self {
        let blocks = i * comptime!(bp.stage()) + comptime!(bp.blocks_at());
        Target { blocks, factors: i * comptime!(bp.factors()), leaves: 0usize }
    }

    /// The place of plane `i` where each takes a chunk of its own.
    pub(crate) fn of_plane(i: usize, #[comptime] bp: Blueprint) -> Self {
        Target {
            blocks: i * comptime!(bp.chunk_blocks() * BLOCK_UNITS),
            factors: i * comptime!(bp.factors()),
            leaves: i * comptime!(BLOCKS * bp.leaf_pairs()),
        }
    }

    /// Where the gates lie of a chunk that is prepared beside a scan.
    pub(crate) fn gates(&self, #[comptime] bp: Blueprint) -> usize {
        self.factors + comptime!(bp.gates_at())
    }
}

/// Turns the products of row block `block` into blocks and factors.
#[cube]
pub(crate) fn finish<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    factors: &mut Region<f32>,
    leaves: &mut Region<Vector<f32, V2>>,
    gram: &Gram,
    gates: &Gates,
    scale: f32,
    c: usize,
    to: Target,
    block: usize,
    lane: usize,
    #[comptime] bp: Blueprint,
) {
    if block < BLOCKS {
        leave_products::<F>(mma, tile, factors, leaves, gram, gates, to, block, lane, bp);
        sync_plane();
        // The two halves of the plane do the same.
        let own = lane % TILE;
        let rho = of_row(reciprocal_norms(gram, bp), own);
        let row = block * TILE + own;
        leave_inverse::<F>(tile, factors, leaves, gates, rho, to, row, lane < TILE, bp);
    } else if block < comptime!(BLOCKS + bp.read_blocks()) {
        finish_queries::<F>(mma, tile, factors, gram, gates, scale, c, to, block - BLOCKS, lane, bp);
    }
}

/// The same for the products of all row blocks, by one plane.
#[cube]
pub(crate) fn finish_all<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    factors: &mut Region<f32>,
    leaves: &mut Region<Vector<f32, V2>>,
    grams: &Sequence<Gram>,
    gates: &Gates,
    scale: f32,
    c: usize,
    to: Target,
    lane: usize,
    #[comptime] bp: Blueprint,
) {
    #[unroll]
    for block in 0..BLOCKS {
        leave_products::<F>(mma, tile, factors, leaves, grams.index(block), gates, to, block, lane, bp);
    }
    sync_plane();
    let lo = of_row(reciprocal_norms(grams.index(0usize), bp), lane % TILE);
    let hi = of_row(reciprocal_norms(grams.index(1usize), bp), lane % TILE);
    let rho = select(lane < TILE, lo, hi);
    leave_inverse::<F>(tile, factors, leaves, gates, rho, to, lane, true, bp);
    #[unroll]
    for block in 0..comptime!(bp.read_blocks()) {
        let gram = grams.index(comptime!(BLOCKS + block));
        finish_queries::<F>(mma, tile, factors, gram, gates, scale, c, to, block, lane, bp);
    }
}

/// The value of row `row` of 16.
#[cube]
fn of_row(rows: Vector<f32, V2>, row: usize) -> f32 {
    let from = (row % 8 * 4) as u32;
    let lo = plane_shuffle(rows[0], from);
    let hi = plane_shuffle(rows[1], from);
    select(row < 8, lo, hi)
}

/// Leaves the leaf of row block `block`, and the block below the diagonal.
#[cube]
fn leave_products<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    factors: &mut Region<f32>,
    leaves: &mut Region<Vector<f32, V2>>,
    gram: &Gram,
    gates: &Gates,
    to: Target,
    block: usize,
    lane: usize,
    #[comptime] bp: Blueprint,
) {
    let norms = reciprocal_norms(gram, bp);
    let row = lane / 4;
    let first = block * TILE;
    let sums = gates.sum.at_rows(factors, first + row, first + row + 8);

    // The leaf on the diagonal: L_ij = beta_i rho_i rho_j Gamma_ij k_i . k_j below it, or with beta_j.
    let beta_on_the_right = comptime!(bp.beta_on_the_right());
    let mut by = norms;
    if comptime!(!beta_on_the_right) {
        by *= gates.beta.at_rows(factors, first + row, first + row + 8);
    }
    let leaf = to.leaves + block * comptime!(bp.leaf_pairs());
    // Where 8 x 8 of its values cross the diagonal, row and column count from there. A 1 added to the column leaves the
    // diagonal out.
    let (own, column) = (row as u32, (2 * (lane % 4) + 1) as u32);
    #[unroll]
    for n in 0..2usize {
        let x = gram.products.index(n);
        let y = gram.products.index(comptime!(n + 2));
        let columns = gates.sum.at_columns(factors, 2 * block + n, lane);
        let mut by_column = Vector::<f32, V2>::cast_from(1.0f32);
        if comptime!(bp.spec.qk_l2norm) {
            by_column *= rows_at_columns(norms, lane, n);
        }
        if comptime!(beta_on_the_right) {
            by_column *= gates.beta.at_columns(factors, 2 * block + n, lane);
        }
        let at = leaf + 4 * n + lane % 4;
        let hi = decayed(select(block == 0, x[1], y[1]), sums[1], columns, bp);
        let hi = hi * by_column * Vector::cast_from(by[1]);
        let at_hi = at + (row + 8) * comptime!(bp.leaf_row());
        if comptime!(n == 0) {
            leaves[at_hi] = hi;
            let lo = decayed(select(block == 0, x[0], y[0]), sums[0], columns, bp);
            let lo = lo * by_column * Vector::cast_from(by[0]);
            leaves[at + row * comptime!(bp.leaf_row())] = until(lo, column, own);
        } else {
            // Above it nothing is read.
            leaves[at_hi] = until(hi, column, own);
        }
    }

    if block == 1 {
        let rows =
            gates.split.at_rows(factors, first + row, first + row + 8) * norms * Vector::cast_from(-1.0f32);
        let at = to.blocks + comptime!(ERASE_BLOCK * BLOCK_UNITS);
        store_below::<F>(mma, tile, at, gram, rows, factors, gates, lane, bp);
    }

    if lane == 0 && block == 0 {
        factors[to.factors + DECAY_AT] = f32::exp(gates.total);
    }
}

#[cube]
fn finish_queries<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    factors: &mut Region<f32>,
    gram: &Gram,
    gates: &Gates,
    scale: f32,
    c: usize,
    to: Target,
    block: usize,
    lane: usize,
    #[comptime] bp: Blueprint,
) {
    let n_h = comptime!(bp.spec.micro_steps);
    let norms = reciprocal_norms(gram, bp) * Vector::cast_from(scale);
    // The micro-step after which a row reads; rows past the last token of the chunk read after the last one
    // and are not written.
    let row = block * TILE + lane / 4;
    let step0 = c * CHUNK;
    let first = (step0 / n_h + row + 1) * n_h - 1 - step0;
    let second = first + 8 * n_h;
    let lo = select(first < CHUNK, first, CHUNK - 1);
    let hi = select(second < CHUNK, second, CHUNK - 1);
    let sums = gates.sum.at_rows(factors, lo, hi);
    #[unroll]
    for j in 0..BLOCKS {
        if known_or(bp.spec.micro_steps > 1, j == block) {
            let below = select(known_and(bp.spec.micro_steps == 1, block > 0), 1usize, 0usize);
            let at = to.blocks + (comptime!(bp.p_block(0, j)) + below) * BLOCK_UNITS;
            let mut p = Sequence::<Acc>::new();
            #[unroll]
            for half in 0..2usize {
                let n = comptime!(2 * j + half);
                let x = gram.products.index(n);
                let columns = gates.sum.at_columns(factors, n, lane);
                let column = (2 * (lane % 4)) as u32;
                let p_lo = decayed(x[0], sums[0], columns, bp) * Vector::cast_from(norms[0]);
                let p_hi = decayed(x[1], sums[1], columns, bp) * Vector::cast_from(norms[1]);
                let mut out = Acc::new(2usize);
                if comptime!(bp.spec.micro_steps > 1) {
                    let column = column + comptime!(8 * n as u32);
                    out[0] = until(p_lo, column, lo as u32);
                    out[1] = until(p_hi, column, hi as u32);
                } else if comptime!(half == 0) {
                    out[0] = until(p_lo, column, (lane / 4) as u32);
                    out[1] = p_hi;
                } else {
                    out[0] = Vector::cast_from(0.0f32);
                    out[1] = until(p_hi, column, (lane / 4) as u32);
                }
                p.push(out);
            }
            store_block::<F>(mma, tile, at, p.index(0usize), p.index(1usize), lane);
        }
    }
    if known_and(bp.spec.micro_steps == 1, block > 0) {
        let rows = gates.split.at_rows(factors, lo, hi) * norms;
        let at = to.blocks + comptime!(bp.p_block(1, 0) * BLOCK_UNITS);
        store_below::<F>(mma, tile, at, gram, rows, factors, gates, lane, bp);
    }
    if lane % 4 == 0 {
        factors[to.factors + READ_AT + row] = norms[0] * f32::exp(sums[0]);
        factors[to.factors + READ_AT + row + 8] = norms[1] * f32::exp(sums[1]);
    }
}
