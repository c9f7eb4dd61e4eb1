//! Tiles of shared memory and what can be done with them.
//!
//! A unit of `scan` owns output tiles of four columns, one [`F4`] per row. Rows are dealt out with a stride,
//! so that the units of a plane read neighbouring rows, which lie in different banks.

use cubecl::prelude::*;

use crate::record::F4;

/// `acc[r] += A[row0 + r * step, 0..depth] B[b0.., col]`: A row-major with `lda` vectors per row, B
/// row-major with `ldb`, both in four-vectors; `depth` is a multiple of 4.
#[cube]
pub(crate) fn mma(
    acc: &mut Array<F4>,
    a: &SharedMemory<F4>,
    row0: usize,
    b: &SharedMemory<F4>,
    b0: usize,
    col: usize,
    #[comptime] first: usize,
    #[comptime] rows: usize,
    #[comptime] step: usize,
    #[comptime] depth: usize,
    #[comptime] lda: usize,
    #[comptime] ldb: usize,
) {
    for d in 0..depth / 4 {
        let at = (b0 + 4 * d) * ldb + col;
        let x0 = b[at];
        let x1 = b[at + ldb];
        let x2 = b[at + 2 * ldb];
        let x3 = b[at + 3 * ldb];
        #[unroll]
        for r in 0..rows {
            let y = a[(row0 + r * step) * lda + d];
            let mut s = acc[first + r];
            s = fma(F4::new(y[0]), x0, s);
            s = fma(F4::new(y[1]), x1, s);
            s = fma(F4::new(y[2]), x2, s);
            s = fma(F4::new(y[3]), x3, s);
            acc[first + r] = s;
        }
    }
}

/// Copies `rows` x `cols` vectors of a channel-major record part (`at + c * height + row`) into a row-major
/// tile; rows from `valid` on become zero.
#[cube]
pub(crate) fn load_columns(
    src: &Array<F4>,
    at: usize,
    dst: &mut SharedMemory<F4>,
    row0: usize,
    valid: usize,
    #[comptime] height: usize,
    #[comptime] rows: usize,
    #[comptime] cols: usize,
    #[comptime] ld: usize,
    #[comptime] units: usize,
) {
    let n = comptime!(rows * cols);
    let mut i = UNIT_POS as usize;
    while i < n {
        let row = i % rows;
        let c = i / rows;
        let mut x = F4::new(0.0f32);
        if row < valid {
            x = src[at + c * height + row];
        }
        dst[(row0 + row) * ld + c] = x;
        i += units;
    }
}

/// Copies a row-major `rows` x `cols` part of a record; rows from `valid` on become zero.
#[cube]
pub(crate) fn load_rows(
    src: &Array<F4>,
    at: usize,
    dst: &mut SharedMemory<F4>,
    valid: usize,
    #[comptime] rows: usize,
    #[comptime] cols: usize,
    #[comptime] ld: usize,
    #[comptime] units: usize,
) {
    let n = comptime!(rows * cols);
    let mut i = UNIT_POS as usize;
    while i < n {
        let row = i / cols;
        let mut x = F4::new(0.0f32);
        if row < valid {
            x = src[at + i];
        }
        dst[row * ld + i % cols] = x;
        i += units;
    }
}
