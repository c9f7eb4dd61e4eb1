//! $(I + L)^{-1}$ for strictly lower triangular L: substitution in blocks of 16, then block merges
//! $\begin{bmatrix}A&\\B&D\end{bmatrix}^{-1} = \begin{bmatrix}A^{-1}&\\-D^{-1}BA^{-1}&D^{-1}\end{bmatrix}$.
//!
//! Never a Neumann series: for clustered keys its powers overflow long before they cancel.

use super::matrix::{View, product};
use crate::Real;

const LEAF: usize = 16;

/// Writes the inverse into `t`, both `n` x `n` with rows `ld` apart; `scratch` holds at least `n * n / 4 + n`.
pub(super) fn invert<T: Real>(l: &[T], t: &mut [T], n: usize, ld: usize, scratch: &mut [T]) {
    if n <= LEAF {
        substitute(l, t, n, ld);
        return;
    }
    let h = n.div_ceil(2 * LEAF) * LEAF;
    let (low, corner) = (h * ld, h * ld + h);
    invert(l, t, h, ld, scratch);
    invert(&l[corner..], &mut t[corner..], n - h, ld, scratch);
    for row in t[..(h - 1) * ld + n].chunks_mut(ld) {
        row[h..n].fill(T::zero());
    }
    product(scratch, h, T::zero(), T::one(), View::new(&l[low..], n - h, h, ld), View::new(t, h, h, ld));
    let lower = &mut t[low..];
    // The corner block is copied out of the rows that the product writes to.
    let inverse: Vec<T> = lower.chunks(ld).take(n - h).flat_map(|row| &row[h..n]).copied().collect();
    product(
        lower,
        ld,
        T::zero(),
        -T::one(),
        View::new(&inverse, n - h, n - h, n - h),
        View::new(scratch, n - h, h, h),
    );
}

/// Row by row, $T_i = e_i - \sum_{m<i} L_{im} T_m$.
fn substitute<T: Real>(l: &[T], t: &mut [T], n: usize, ld: usize) {
    for i in 0..n {
        let (done, rest) = t.split_at_mut(i * ld);
        let row = &mut rest[..n];
        row.fill(T::zero());
        row[i] = T::one();
        for m in 0..i {
            let factor = l[i * ld + m];
            for (x, &y) in row[..=m].iter_mut().zip(&done[m * ld..]) {
                *x -= factor * y;
            }
        }
    }
}
