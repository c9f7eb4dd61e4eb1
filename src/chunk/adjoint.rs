//! The adjoint of a chunk: what its rows and the state before it get from its outputs and the state after it.

use super::forward::Writes;
use super::lane::{Chunk, Lane, Span};
use super::matrix::{View, product};
use super::pairs::{Pairs, Roles};
use crate::Real;

/// The gradients of a lane's rows.
pub(super) struct LaneGradients<T> {
    /// `[len, K]`
    pub(super) q: Vec<T>,
    /// `[steps, K]`
    pub(super) k: Vec<T>,
    /// `[steps, V]`
    pub(super) v: Vec<T>,
    /// `[steps]`
    pub(super) beta: Vec<T>,
    /// `[len]` or `[len, K]`; empty if nothing decays.
    pub(super) g: Vec<T>,
    /// `[K, V]`
    pub(super) state: Vec<T>,
}

/// The buffers of a lane, made once. Rows of q and o are those of the tokens that end in the chunk.
pub(super) struct Adjoint<T> {
    d_o: Vec<T>,
    dn: Vec<T>,
    k: Vec<T>,
    q: Vec<T>,
    beta_k: Vec<T>,
    y: Vec<T>,
    x: Vec<T>,
    /// Of the pairs inside a token: row j, and how far below it the other lies.
    near_y: Vec<T>,
    near_x: Vec<T>,
    reads: Vec<T>,
    erases: Vec<T>,
    writes: Vec<T>,
    ends: Vec<T>,
}

impl<T: Real> Adjoint<T> {
    pub(super) fn new(lane: &Lane<'_, T>) -> Self {
        let shape = lane.problem.shape();
        let (chunk, n_h) = (lane.chunk_size(), lane.problem.rule().micro_steps);
        let new = |width: usize| vec![T::zero(); chunk * width];
        Self {
            d_o: new(shape.value_dim),
            dn: new(shape.value_dim),
            k: new(shape.key_dim),
            q: new(shape.key_dim),
            beta_k: new(shape.key_dim),
            y: new(chunk),
            x: new(chunk),
            near_y: new(n_h),
            near_x: new(n_h),
            reads: new(shape.key_dim),
            erases: new(shape.key_dim),
            writes: new(shape.key_dim),
            ends: new(shape.key_dim),
        }
    }

    /// The gradients of a chunk's rows; `to.state` goes from after the chunk to before it.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn chunk(
        &mut self,
        lane: &Lane<'_, T>,
        chunk: &Chunk<T>,
        written: &Writes<T>,
        span: Span,
        state: &[T],
        d_o: &[T],
        to: &mut LaneGradients<T>,
    ) {
        let shape = lane.problem.shape();
        let (dim, width) = (shape.key_dim, shape.value_dim);
        let n_h = lane.problem.rule().micro_steps;
        let Span { step0, rows, token, reads, first } = span;
        let (zero, one) = (T::zero(), T::one());

        for r in 0..reads {
            let from = lane.row(token + r, 1, shape.value_heads, lane.hv) * width;
            self.d_o[r * width..][..width].copy_from_slice(&d_o[from..][..width]);
        }
        let d_o = View::new(&self.d_o, reads, width, width);
        let state = View::new(state, dim, width, width);
        let r = View::new(&written.r, rows, width, width);

        // dN = P^T dO + Kd dS, dV = M^T diag(beta) dN
        let dn = &mut self.dn[..rows * width];
        let kd = View::new(&chunk.kd, rows, dim, dim);
        product(dn, width, zero, one, kd, View::new(&to.state, dim, width, width));
        if reads > 0 {
            let p = View::new(&chunk.p[first * rows..], reads, rows, n_h * rows);
            product(dn, width, one, one, p.t(), d_o);
        }
        for (row, &beta) in dn.chunks_exact_mut(width).zip(&chunk.beta) {
            row.iter_mut().for_each(|x| *x *= beta);
        }
        let dv = &mut to.v[step0 * width..][..rows * width];
        let m = View::new(&chunk.m, rows, rows, rows);
        product(dv, width, zero, one, m.t(), View::new(dn, rows, width, width));
        let dv = View::new(dv, rows, width, width);

        // Through the states, and between the rows of the chunk.
        let d_state = View::new(&to.state, dim, width, width);
        product(&mut self.reads, dim, zero, one, d_o, state.t());
        product(&mut self.erases, dim, zero, -one, dv, state.t());
        product(&mut self.ends, dim, zero, one, r, d_state.t());
        product(&mut self.y, rows, zero, one, d_o, r.t());
        product(&mut self.x, rows, zero, -one, dv, r.t());
        self.split(span, n_h);
        self.load(lane, chunk, span);
        let mut pairs = Pairs {
            k: &self.k,
            q: &self.q,
            beta_k: &self.beta_k,
            y: &mut self.y,
            x: &mut self.x,
            decays: &chunk.decays,
            span,
            n_h,
            dim,
        };
        let mut roles = Roles {
            reads: &mut self.reads,
            erases: &mut self.erases,
            writes: &mut self.writes,
            ends: &mut self.ends,
        };
        pairs.backward(&mut roles, lane.problem.rule().decay);
        if !to.g.is_empty() {
            let through = |(i, &gamma): (usize, &T)| gamma * dot(state.row(i), d_state.row(i));
            let carried: Vec<T> = chunk.gamma.iter().enumerate().map(through).collect();
            self.gates(span, n_h, lane.problem.gate_dim(), &carried, &mut to.g);
        }
        self.finish(lane, chunk, span, to);

        // dS <- gamma dS + Qg^T dO - Kg^T dV
        for (row, &gamma) in to.state.chunks_exact_mut(width).zip(&chunk.gamma) {
            row.iter_mut().for_each(|s| *s *= gamma);
        }
        let dv = View::new(&to.v[step0 * width..], rows, width, width);
        product(&mut to.state, width, one, -one, View::new(&chunk.k, rows, dim, dim).t(), dv);
        if reads > 0 {
            let qg = View::new(&chunk.q[first * dim..], reads, dim, n_h * dim);
            product(&mut to.state, width, one, one, qg.t(), View::new(&self.d_o, reads, width, width));
        }
    }

    /// Takes pairs inside a token out of `y` and `x`, times beta of the row that writes: no decay lies between
    /// their rows, and in the gradient of the gates they would cancel only after burying it.
    fn split(&mut self, span: Span, n_h: usize) {
        let Span { step0, rows, reads, first, .. } = span;
        let of_token = |row: usize| row - row.min((step0 + row) % n_h);
        self.near_y.fill(T::zero());
        self.near_x.fill(T::zero());
        for r in 0..reads {
            let row = first + r * n_h;
            let y = &mut self.y[r * rows..][..rows];
            let token = of_token(row);
            for (j, &y) in (token..).zip(&y[token..=row]) {
                self.near_y[j * n_h + row - j] = y;
            }
            y[token..].fill(T::zero());
        }
        for i in 0..rows {
            let x = &mut self.x[i * rows..][..rows];
            let token = of_token(i);
            for (j, &x) in (token..).zip(&x[token..i]) {
                self.near_x[j * n_h + i - j] = x;
            }
            x[token..].fill(T::zero());
        }
    }

    /// The raw rows of q and k.
    fn load(&mut self, lane: &Lane<'_, T>, chunk: &Chunk<T>, span: Span) {
        let dim = lane.problem.shape().key_dim;
        let scale = T::of(lane.options.scale_for(dim));
        for i in 0..span.rows {
            let key = lane.k(span.step0 + i);
            self.k[i * dim..][..dim].copy_from_slice(key);
            let beta_k = &mut self.beta_k[i * dim..][..dim];
            beta_k.iter_mut().zip(key).for_each(|(x, &k)| *x = chunk.beta[i] * k);
        }
        for r in 0..span.reads {
            let q = &mut self.q[r * dim..][..dim];
            q.iter_mut().zip(lane.q(span.token + r)).for_each(|(x, &q)| *x = scale * q);
        }
    }

    /// The decay of a row lies in every path from before it to it or beyond: in what later rows get from earlier ones
    /// and from the state, in what the earlier leave to the next chunk, and in what is carried through (`carried`).
    fn gates(&self, span: Span, n_h: usize, gates: usize, carried: &[T], to: &mut [T]) {
        let Span { step0, rows, .. } = span;
        let dim = carried.len();
        let row = |x: &'_ [T], i: usize, d: usize| x[i * dim + d];
        let mut earlier = vec![T::zero(); gates];
        fold(&mut earlier, dim, |d| carried[d]);
        for i in 0..rows {
            if (step0 + i).is_multiple_of(n_h) {
                add(&mut to[(step0 + i) / n_h * gates..][..gates], &earlier);
            }
            fold(&mut earlier, dim, |d| row(&self.beta_k, i, d) * row(&self.ends, i, d));
        }
        let mut later = vec![T::zero(); gates];
        for i in (0..rows).rev() {
            fold(&mut later, dim, |d| {
                row(&self.k, i, d) * row(&self.erases, i, d)
                    - row(&self.beta_k, i, d) * row(&self.writes, i, d)
            });
            if let Some(r) = span.read_at(i, n_h) {
                fold(&mut later, dim, |d| row(&self.q, r, d) * row(&self.reads, r, d));
            }
            if (step0 + i).is_multiple_of(n_h) {
                add(&mut to[(step0 + i) / n_h * gates..][..gates], &later);
            }
        }
    }

    /// Adds the pairs inside a token, and joins the roles.
    fn finish(&mut self, lane: &Lane<'_, T>, chunk: &Chunk<T>, span: Span, to: &mut LaneGradients<T>) {
        let dim = lane.problem.shape().key_dim;
        let n_h = lane.problem.rule().micro_steps;
        let scale = T::of(lane.options.scale_for(dim));
        let Span { step0, rows, reads, token, .. } = span;
        for j in 0..rows {
            for off in 0..n_h.min(rows - j) {
                let i = j + off;
                let x = self.near_x[j * n_h + off];
                let y = self.near_y[j * n_h + off];
                let writes = &mut self.writes[j * dim..][..dim];
                axpy(writes, x, &self.k[i * dim..][..dim]);
                axpy(&mut self.erases[i * dim..][..dim], x, &self.beta_k[j * dim..][..dim]);
                if let Some(r) = span.read_at(i, n_h) {
                    axpy(writes, y, &self.q[r * dim..][..dim]);
                    axpy(&mut self.reads[r * dim..][..dim], y, &self.beta_k[j * dim..][..dim]);
                }
            }
        }
        let dq = &mut to.q[token * dim..][..reads * dim];
        dq.iter_mut().zip(&self.reads).for_each(|(d, &x)| *d = scale * x);
        for i in 0..rows {
            let at = i * dim..(i + 1) * dim;
            let dk = &mut to.k[(step0 + i) * dim..][..dim];
            for ((d, &w), &e) in dk.iter_mut().zip(&self.writes[at.clone()]).zip(&self.ends[at.clone()]) {
                *d = w + e;
            }
            to.beta[step0 + i] = dot(&self.k[at.clone()], dk);
            for (d, &e) in dk.iter_mut().zip(&self.erases[at]) {
                *d = *d * chunk.beta[i] + e;
            }
        }
    }
}

/// Adds `f` of every key channel to the gate's channels: to its own, or to the only one.
fn fold<T: Real>(to: &mut [T], dim: usize, f: impl Fn(usize) -> T) {
    if to.len() == dim {
        to.iter_mut().enumerate().for_each(|(d, to)| *to += f(d));
    } else {
        to[0] += (0..dim).map(f).sum();
    }
}

fn add<T: Real>(to: &mut [T], x: &[T]) {
    to.iter_mut().zip(x).for_each(|(to, &x)| *to += x);
}

fn axpy<T: Real>(y: &mut [T], a: T, x: &[T]) {
    y.iter_mut().zip(x).for_each(|(y, &x)| *y += a * x);
}

fn dot<T: Real>(x: &[T], y: &[T]) -> T {
    x.iter().zip(y).map(|(&x, &y)| x * y).sum()
}
