//! Gated Gram matrices and scaled rows of one chunk.

use super::matrix::{View, product};
use crate::Real;

/// Rows that share an anchor.
const BLOCK: usize = 16;

/// The operands of a chunk of `rows` micro-steps, each buffer with the row lengths given.
pub(super) struct Gram<'a, T> {
    /// K, in and out: becomes Kg. `[rows, dim]`
    pub(super) k: &'a mut [T],
    /// Q of the rows that are read, zero elsewhere, in and out: becomes Qg. `[rows, dim]`
    pub(super) q: &'a mut [T],
    /// Out: Kd. `[rows, dim]`
    pub(super) kd: &'a mut [T],
    /// Out: K K^T . Gamma, right below the diagonal. `[rows, rows]`
    pub(super) akk: &'a mut [T],
    /// Out: Q K^T . Gamma, right up to the diagonal. `[rows, rows]`
    pub(super) aqk: &'a mut [T],
    /// Out: gamma. `[dim]`
    pub(super) gamma: &'a mut [T],
    pub(super) rows: usize,
    pub(super) dim: usize,
}

impl<T: Real> Gram<'_, T> {
    /// No decay.
    pub(super) fn plain(&mut self) {
        let (rows, dim) = (self.rows, self.dim);
        let keys = View::new(self.k, rows, dim, dim);
        product(self.akk, rows, T::zero(), T::one(), keys, keys.t());
        product(self.aqk, rows, T::zero(), T::one(), View::new(self.q, rows, dim, dim), keys.t());
        self.kd.copy_from_slice(self.k);
        self.gamma.fill(T::one());
    }

    /// One decay per row, `decays[rows]`.
    pub(super) fn head(&mut self, decays: &[T]) {
        self.plain();
        let (rows, dim) = (self.rows, self.dim);
        for i in 0..rows {
            let mut w = T::one();
            for j in (0..=i).rev() {
                self.akk[i * rows + j] *= w;
                self.aqk[i * rows + j] *= w;
                w *= decays[j];
            }
            scale(&mut self.k[i * dim..][..dim], w);
            scale(&mut self.q[i * dim..][..dim], w);
        }
        let mut w = T::one();
        for i in (0..rows).rev() {
            scale(&mut self.kd[i * dim..][..dim], w);
            w *= decays[i];
        }
        self.gamma.fill(w);
    }

    /// One decay per row and channel, `decays[rows, dim]`.
    ///
    /// Rows of a block meet earlier keys at the block's beginning: both sides carry their own decays up to
    /// there, so each factor stays in `[0, 1]`. Inside a block every row walks down by itself.
    pub(super) fn channel(&mut self, decays: &[T], walk: &mut [T]) {
        let (rows, dim) = (self.rows, self.dim);
        self.gamma.fill(T::one());
        for first in (0..rows).step_by(BLOCK) {
            let last = (first + BLOCK).min(rows);
            let height = last - first;
            self.walk_block(decays, first, last, walk);
            // `kd[..first]` still ends where this block begins, and `k`, `q` begin there.
            let keys = View::new(self.kd, first, dim, dim);
            let at = first * rows;
            let k = View::new(&self.k[first * dim..], height, dim, dim);
            let q = View::new(&self.q[first * dim..], height, dim, dim);
            product(&mut self.akk[at..], rows, T::zero(), T::one(), k, keys.t());
            product(&mut self.aqk[at..], rows, T::zero(), T::one(), q, keys.t());
            self.extend(decays, first, last, walk);
        }
    }

    /// The diagonal block: Gram entries by running products; leaves k and q scaled from the block's beginning
    /// and kd to its end.
    fn walk_block(&mut self, decays: &[T], first: usize, last: usize, walk: &mut [T]) {
        let (rows, dim) = (self.rows, self.dim);
        self.kd[first * dim..last * dim].copy_from_slice(&self.k[first * dim..last * dim]);
        let (kw, qw) = walk[..2 * dim].split_at_mut(dim);
        // Downwards in i, so that the rows below are still the raw keys.
        for i in (first..last).rev() {
            kw.copy_from_slice(&self.k[i * dim..][..dim]);
            qw.copy_from_slice(&self.q[i * dim..][..dim]);
            for j in (first..=i).rev() {
                let key = &self.k[j * dim..][..dim];
                self.akk[i * rows + j] = dot(kw, key);
                self.aqk[i * rows + j] = dot(qw, key);
                let d = &decays[j * dim..][..dim];
                multiply(kw, d);
                multiply(qw, d);
            }
            self.k[i * dim..][..dim].copy_from_slice(kw);
            self.q[i * dim..][..dim].copy_from_slice(qw);
        }
        let to_end = &mut walk[..dim];
        to_end.fill(T::one());
        for i in (first..last).rev() {
            multiply(&mut self.kd[i * dim..][..dim], to_end);
            multiply(to_end, &decays[i * dim..][..dim]);
        }
    }

    /// Makes earlier keys end where this block ends, and its rows begin where the chunk does.
    fn extend(&mut self, decays: &[T], first: usize, last: usize, walk: &mut [T]) {
        let dim = self.dim;
        let across = &mut walk[..dim];
        across.fill(T::one());
        for i in first..last {
            multiply(across, &decays[i * dim..][..dim]);
        }
        for row in self.kd[..first * dim].chunks_exact_mut(dim) {
            multiply(row, across);
        }
        for i in first..last {
            multiply(&mut self.k[i * dim..][..dim], self.gamma);
            multiply(&mut self.q[i * dim..][..dim], self.gamma);
        }
        multiply(self.gamma, across);
    }
}

fn scale<T: Real>(x: &mut [T], factor: T) {
    x.iter_mut().for_each(|x| *x *= factor);
}

fn multiply<T: Real>(x: &mut [T], y: &[T]) {
    for (x, &y) in x.iter_mut().zip(y) {
        *x *= y;
    }
}

/// In eight running sums, which the compiler keeps in vector registers.
fn dot<T: Real>(x: &[T], y: &[T]) -> T {
    let mut sums = [T::zero(); 8];
    let (xs, ys) = (x.chunks_exact(8), y.chunks_exact(8));
    let tail: T = xs.remainder().iter().zip(ys.remainder()).map(|(&x, &y)| x * y).sum();
    for (x, y) in xs.zip(ys) {
        for e in 0..8 {
            sums[e] += x[e] * y[e];
        }
    }
    sums.into_iter().sum::<T>() + tail
}
