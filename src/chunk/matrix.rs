//! Matrix views and the one call of the matrix library.

use gemm::Parallelism;

use crate::Real;

/// A view of `rows` x `cols` elements.
#[derive(Clone, Copy)]
pub(super) struct View<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T> View<'a, T> {
    /// Row-major, rows `row_stride` apart.
    pub(super) fn new(data: &'a [T], rows: usize, cols: usize, row_stride: usize) -> Self {
        check(data.len(), rows, cols, row_stride);
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// Row `i` of a view that is not transposed.
    pub(super) fn row(self, i: usize) -> &'a [T] {
        &self.data[i * self.row_stride..][..self.cols]
    }

    /// The transpose.
    pub(super) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

fn check(len: usize, rows: usize, cols: usize, row_stride: usize) {
    let fits = rows == 0 || cols == 0 || (rows - 1) * row_stride + cols <= len;
    assert!(fits && (cols <= row_stride || rows <= 1), "a {rows} x {cols} view leaves its {len} elements");
}

/// `c = keep * c + factor * a b`, with `c` row-major and rows `row_stride` apart.
pub(super) fn product<T: Real>(
    c: &mut [T],
    row_stride: usize,
    keep: T,
    factor: T,
    a: View<'_, T>,
    b: View<'_, T>,
) {
    assert_eq!(a.cols, b.rows, "inner dimensions");
    check(c.len(), a.rows, b.cols, row_stride);
    if a.rows == 0 || b.cols == 0 {
        return;
    }
    // Safety: `check` has held every view against its slice, and `c` is borrowed mutably, so it overlaps none.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            c.as_mut_ptr(),
            1,
            row_stride as isize,
            keep != T::zero(),
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            keep,
            factor,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}
