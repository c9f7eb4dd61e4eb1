//! The adjoint of the gated Gram matrices: what pairs of rows of a chunk, and its ends, hand to q and k.

use super::lane::Span;
use super::matrix::{View, product};
use crate::{Decay, Real};

/// Rows that share an anchor, as in the Gram matrices.
const BLOCK: usize = 16;

/// The rows of a chunk of one lane, and the gradients that arrive at them. Rows of q are those of the tokens that
/// end here; only pairs with a decay in between, of two tokens, are meant.
pub(super) struct Pairs<'a, T> {
    /// `[rows, K]`, raw.
    pub(super) k: &'a [T],
    /// `[reads, K]`, raw, times scale.
    pub(super) q: &'a [T],
    /// `[rows, K]`, raw, times beta.
    pub(super) beta_k: &'a [T],
    /// dO R^T, `[reads, rows]`, zero but for pairs of two tokens.
    pub(super) y: &'a mut [T],
    /// -dV R^T, `[rows, rows]`, the same.
    pub(super) x: &'a mut [T],
    /// None, one or K per row.
    pub(super) decays: &'a [T],
    pub(super) span: Span,
    pub(super) n_h: usize,
    pub(super) dim: usize,
}

/// The gradients of the rows in their roles.
pub(super) struct Roles<'a, T> {
    /// In: dO S0^T. Out: the gradient of q, over scale. `[reads, K]`
    pub(super) reads: &'a mut [T],
    /// In: -dV S0^T. Out: that of k as it erases. `[rows, K]`
    pub(super) erases: &'a mut [T],
    /// Out: that of k as it writes what later rows of the chunk read or erase, over beta. `[rows, K]`
    pub(super) writes: &'a mut [T],
    /// In: R dS^T. Out: that of k as it writes what the next chunk gets, over beta. `[rows, K]`
    pub(super) ends: &'a mut [T],
}

impl<T: Real> Pairs<'_, T> {
    pub(super) fn backward(&mut self, to: &mut Roles<'_, T>, decay: Decay) {
        match decay {
            Decay::None => self.plain(to),
            Decay::Head => self.head(to),
            Decay::Channel => self.channel(to),
        }
    }

    /// The row in which read `r` happens.
    fn row_of(&self, r: usize) -> usize {
        self.span.first + r * self.n_h
    }

    /// No decay, or decays that are already in `y`, `x` and the ends.
    fn plain(&mut self, to: &mut Roles<'_, T>) {
        let (rows, reads, dim) = (self.span.rows, self.span.reads, self.dim);
        let (zero, one) = (T::zero(), T::one());
        let y = View::new(self.y, reads, rows, rows);
        let x = View::new(self.x, rows, rows, rows);
        let keys = View::new(self.beta_k, rows, dim, dim);
        product(to.reads, dim, one, one, y, keys);
        product(to.erases, dim, one, one, x, keys);
        product(to.writes, dim, zero, one, x.t(), View::new(self.k, rows, dim, dim));
        product(to.writes, dim, one, one, y.t(), View::new(self.q, reads, dim, dim));
    }

    /// One decay per row: it factors out of the sum over channels.
    fn head(&mut self, to: &mut Roles<'_, T>) {
        let (rows, dim) = (self.span.rows, self.dim);
        for r in 0..self.span.reads {
            let row = self.row_of(r);
            let w = walk(&mut self.y[r * rows..][..=row], self.decays);
            scale(&mut to.reads[r * dim..][..dim], w);
        }
        for i in 0..rows {
            let w = walk(&mut self.x[i * rows..][..=i], self.decays);
            scale(&mut to.erases[i * dim..][..dim], w);
        }
        let mut w = T::one();
        for i in (0..rows).rev() {
            scale(&mut to.ends[i * dim..][..dim], w);
            w *= self.decays[i];
        }
        self.plain(to);
    }

    /// One decay per row and channel. Pairs of two blocks meet where the later one begins; inside a block every row
    /// walks to the others, picking up one decay per step. All factors are in `[0, 1]`.
    fn channel(&mut self, to: &mut Roles<'_, T>) {
        self.towards_earlier(to);
        self.towards_later(to);
        let dim = self.dim;
        let mut w = vec![T::one(); dim];
        for i in (0..self.span.rows).rev() {
            multiply(&mut to.ends[i * dim..][..dim], &w);
            multiply(&mut w, self.decay(i));
        }
    }

    /// From block to block, with the earlier keys as they arrive at its beginning.
    fn towards_earlier(&self, to: &mut Roles<'_, T>) {
        let (rows, dim) = (self.span.rows, self.dim);
        let mut arrived = self.beta_k.to_vec();
        let mut gamma = vec![T::one(); dim];
        for first in (0..rows).step_by(BLOCK) {
            let last = (first + BLOCK).min(rows);
            let keys = View::new(&arrived, first, dim, dim);
            let reads = self.reads_in(first, last);
            let of_q = (&self.y[..], &mut to.reads[..], reads.clone());
            let of_k = (&self.x[..], &mut to.erases[..], first..last);
            for (a, out, here) in [of_q, of_k] {
                let out = &mut out[here.start * dim..here.end * dim];
                out.chunks_exact_mut(dim).for_each(|row| multiply(row, &gamma));
                if first > 0 && !here.is_empty() {
                    let a = View::new(&a[here.start * rows..], here.len(), first, rows);
                    product(out, dim, T::one(), T::one(), a, keys);
                }
            }
            for i in first..last {
                let erases = &mut to.erases[i * dim..][..dim];
                self.walk_up(erases, &self.x[i * rows..][..rows], first, i);
            }
            for r in reads {
                let reads = &mut to.reads[r * dim..][..dim];
                self.walk_up(reads, &self.y[r * rows..][..rows], first, self.row_of(r));
            }
            // Its own keys go on from their rows to the end of this block, earlier ones through all of it.
            let mut across = vec![T::one(); dim];
            for i in (first..last).rev() {
                multiply(&mut arrived[i * dim..][..dim], &across);
                multiply(&mut across, self.decay(i));
            }
            arrived[..first * dim].chunks_exact_mut(dim).for_each(|row| multiply(row, &across));
            multiply(&mut gamma, &across);
        }
    }

    /// $x \leftarrow \Gamma x + \sum_j a_j \Gamma_{ij} \beta_j k_j$ over a block up to row `i`.
    fn walk_up(&self, x: &mut [T], a: &[T], first: usize, i: usize) {
        for (j, &a) in (first..=i).zip(&a[first..]) {
            let key = &self.beta_k[j * self.dim..][..self.dim];
            for ((x, &d), &k) in x.iter_mut().zip(self.decay(j)).zip(key) {
                *x = *x * d + a * k;
            }
        }
    }

    /// From the last block to the first, with its rows as they were at its beginning.
    fn towards_later(&self, to: &mut Roles<'_, T>) {
        let (rows, dim) = (self.span.rows, self.dim);
        let (mut q, mut k) = (self.q.to_vec(), self.k.to_vec());
        let blocks = rows.div_ceil(BLOCK);
        to.writes.fill(T::zero());
        for first in (0..blocks).rev().map(|block| block * BLOCK) {
            let last = (first + BLOCK).min(rows);
            let reads = self.reads_in(first, last);
            // The block's own keys.
            for j in first..last {
                let out = &mut to.writes[j * dim..][..dim];
                for i in (j + 1..last).rev() {
                    axpy(out, self.x[i * rows + j], &self.k[i * dim..][..dim]);
                    if let Some(r) = self.span.read_at(i, self.n_h) {
                        axpy(out, self.y[r * rows + j], &self.q[r * dim..][..dim]);
                    }
                    multiply(out, self.decay(i));
                }
            }
            // The block's rows at its beginning.
            let mut gamma = vec![T::one(); dim];
            for i in first..last {
                multiply(&mut gamma, self.decay(i));
                multiply(&mut k[i * dim..][..dim], &gamma);
                if let Some(r) = self.span.read_at(i, self.n_h) {
                    multiply(&mut q[r * dim..][..dim], &gamma);
                }
            }
            if first == 0 {
                break;
            }
            let earlier = &mut to.writes[..first * dim];
            earlier.chunks_exact_mut(dim).for_each(|row| multiply(row, &gamma));
            let x = View::new(&self.x[first * rows..], last - first, first, rows).t();
            product(
                earlier,
                dim,
                T::one(),
                T::one(),
                x,
                View::new(&k[first * dim..], last - first, dim, dim),
            );
            if !reads.is_empty() {
                let y = View::new(&self.y[reads.start * rows..], reads.len(), first, rows).t();
                let q = View::new(&q[reads.start * dim..], reads.len(), dim, dim);
                product(earlier, dim, T::one(), T::one(), y, q);
            }
        }
    }

    fn decay(&self, i: usize) -> &[T] {
        &self.decays[i * self.dim..][..self.dim]
    }

    /// The tokens that end in rows `first..last`.
    fn reads_in(&self, first: usize, last: usize) -> std::ops::Range<usize> {
        let before = |row: usize| row.saturating_sub(self.span.first).div_ceil(self.n_h).min(self.span.reads);
        before(first)..before(last)
    }
}

/// `row[j] *= Gamma_ij`, from the last row `i` down; returns the decay of all, that of row 0 included.
fn walk<T: Real>(row: &mut [T], decays: &[T]) -> T {
    let mut w = T::one();
    for (x, &d) in row.iter_mut().zip(decays).rev() {
        *x *= w;
        w *= d;
    }
    w
}

fn scale<T: Real>(x: &mut [T], factor: T) {
    x.iter_mut().for_each(|x| *x *= factor);
}

fn multiply<T: Real>(x: &mut [T], y: &[T]) {
    x.iter_mut().zip(y).for_each(|(x, &y)| *x *= y);
}

fn axpy<T: Real>(y: &mut [T], a: T, x: &[T]) {
    y.iter_mut().zip(x).for_each(|(y, &x)| *y += a * x);
}
