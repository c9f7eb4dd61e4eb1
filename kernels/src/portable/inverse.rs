//! $(I + L)^{-1}$ for strictly lower triangular L: substitution on 16 x 16 leaves, then block merges
//! $\begin{bmatrix}A&\\B&D\end{bmatrix}^{-1} = \begin{bmatrix}A^{-1}&\\-D^{-1}BA^{-1}&D^{-1}\end{bmatrix}$.
//!
//! Never a Neumann series: for clustered keys its powers overflow long before they cancel.

use cubecl::prelude::*;

/// Leaves are this wide.
const LEAF: usize = 16;

/// Writes the inverse into `t`. Both are `chunk` x `chunk` with rows of `ld`; the upper triangle of `l` is
/// used as scratch. Ends with a barrier.
#[cube]
pub(crate) fn invert(
    l: &mut SharedMemory<f32>,
    t: &mut SharedMemory<f32>,
    #[comptime] chunk: usize,
    #[comptime] ld: usize,
    #[comptime] units: usize,
) {
    let unit = UNIT_POS as usize;
    let mut z = unit;
    while z < chunk * chunk {
        t[(z / chunk) * ld + z % chunk] = 0.0f32;
        z += units;
    }
    sync_cube();
    if unit < chunk {
        invert_leaf_column(l, t, unit / LEAF * LEAF, unit % LEAF, ld);
    }
    sync_cube();
    let levels = comptime!((chunk / LEAF).ilog2() as usize);
    #[unroll]
    for level in 0..levels {
        merge(l, t, comptime!(LEAF << level), chunk, ld, units);
    }
}

/// Column `j` of the leaf at `first`: $x_i = \delta_{ij} - \sum_{m<i} L_{im} x_m$.
#[cube]
fn invert_leaf_column(
    l: &SharedMemory<f32>,
    t: &mut SharedMemory<f32>,
    first: usize,
    j: usize,
    #[comptime] ld: usize,
) {
    let mut x = Array::<f32>::new(LEAF);
    #[unroll]
    for i in 0..LEAF {
        let row = (first + i) * ld + first;
        let mut s = select(i == j, 1.0f32, 0.0f32);
        #[unroll]
        for m in 0..i {
            s = fma(-l[row + m], x[m], s);
        }
        x[i] = s;
        t[row + j] = s;
    }
}

/// Joins neighbouring inverted blocks of `size` into blocks of `2 * size`.
#[cube]
fn merge(
    l: &mut SharedMemory<f32>,
    t: &mut SharedMemory<f32>,
    #[comptime] size: usize,
    #[comptime] chunk: usize,
    #[comptime] ld: usize,
    #[comptime] units: usize,
) {
    let n = comptime!(chunk / 2 * size);
    let area = comptime!(size * size);
    let mut i = UNIT_POS as usize;
    while i < n {
        let c0 = i / area * 2 * size;
        let r0 = c0 + size;
        let row = i % area / size;
        let col = i % size;
        let mut s = 0.0f32;
        for m in 0..size {
            s = fma(l[(r0 + row) * ld + c0 + m], t[(c0 + m) * ld + c0 + col], s);
        }
        l[(c0 + row) * ld + r0 + col] = s;
        i += units;
    }
    sync_cube();
    let mut i = UNIT_POS as usize;
    while i < n {
        let c0 = i / area * 2 * size;
        let r0 = c0 + size;
        let row = i % area / size;
        let col = i % size;
        let mut s = 0.0f32;
        for m in 0..size {
            s = fma(-t[(r0 + row) * ld + r0 + m], l[(c0 + m) * ld + r0 + col], s);
        }
        t[(r0 + row) * ld + c0 + col] = s;
        i += units;
    }
    sync_cube();
}
