//! What happens to one state, and where its tensors lie.

use crate::transform::Effective;
use crate::{Inputs, Options, Problem, Real, Sequence, StateLayout};

/// One sequence and value head, with everything it reads.
pub(super) struct Lane<'a, T: Real> {
    problem: &'a Problem,
    tensors: &'a Effective<'a, T>,
    v: &'a [T],
    pub(super) sequence: Sequence,
    n: usize,
    pub(super) hv: usize,
    pub(super) scale: T,
}

impl<'a, T: Real> Lane<'a, T> {
    /// Every sequence with every value head.
    pub(super) fn all(
        problem: &'a Problem,
        options: &Options,
        tensors: &'a Effective<'a, T>,
        inputs: &Inputs<'a, T>,
    ) -> impl Iterator<Item = Self> {
        let scale = T::of(options.scale_for(problem.shape().key_dim));
        let v = inputs.v;
        let heads = problem.shape().value_heads;
        (0..problem.sequences() * heads).map(move |i| {
            let (n, hv) = (i / heads, i % heads);
            Lane { problem, tensors, v, sequence: problem.sequence(n), n, hv, scale }
        })
    }

    /// Token `t` of the sequence, among all tokens of the batch.
    pub(super) fn token(&self, t: usize) -> usize {
        self.sequence.row * self.problem.shape().tokens + self.sequence.start + t
    }

    /// Offset of the row of q that token `token` reads.
    pub(super) fn q_at(&self, token: usize) -> usize {
        let s = self.problem.shape();
        (token * s.heads + self.problem.key_head(self.hv)) * s.key_dim
    }

    /// Offset of the row of v (or o) of a micro-step (or token).
    pub(super) fn v_at(&self, row: usize) -> usize {
        let s = self.problem.shape();
        (row * s.value_heads + self.hv) * s.value_dim
    }

    /// Offset of beta of a micro-step.
    pub(super) fn beta_at(&self, step: usize) -> usize {
        step * self.problem.shape().value_heads + self.hv
    }

    /// Offset of the gates of a token.
    pub(super) fn g_at(&self, token: usize) -> usize {
        self.beta_at(token) * self.problem.gate_dim()
    }

    pub(super) fn q(&self, token: usize) -> &[T] {
        &self.tensors.q[self.q_at(token)..][..self.problem.shape().key_dim]
    }

    /// k and q share heads and channels, so the same offsets serve both.
    pub(super) fn k(&self, step: usize) -> &[T] {
        &self.tensors.k[self.q_at(step)..][..self.problem.shape().key_dim]
    }

    pub(super) fn v(&self, step: usize) -> &[T] {
        &self.v[self.v_at(step)..][..self.problem.shape().value_dim]
    }

    pub(super) fn beta(&self, step: usize) -> T {
        self.tensors.beta[self.beta_at(step)]
    }

    /// The gates of a token: none, one, or one per key channel.
    pub(super) fn g(&self, token: usize) -> &[T] {
        match self.tensors.g.is_empty() {
            true => &[],
            false => &self.tensors.g[self.g_at(token)..][..self.problem.gate_dim()],
        }
    }

    /// `S <- D S`
    pub(super) fn decay(&self, state: &mut [T], token: usize) {
        let g = self.g(token);
        if g.is_empty() {
            return;
        }
        for (row, g) in state.chunks_exact_mut(self.problem.shape().value_dim).zip(g.iter().cycle()) {
            let d = g.exp();
            row.iter_mut().for_each(|s| *s *= d);
        }
    }

    /// `v - S^T k`, the error of the state's prediction.
    pub(super) fn residual(&self, state: &[T], step: usize, out: &mut [T]) {
        out.copy_from_slice(self.v(step));
        for (row, &k) in state.chunks_exact(out.len()).zip(self.k(step)) {
            axpy(out, -k, row);
        }
    }

    /// One micro-step, `S <- S + k (beta r)^T`; `r` receives the residual.
    pub(super) fn write(&self, state: &mut [T], step: usize, r: &mut [T]) {
        self.residual(state, step, r);
        let beta = self.beta(step);
        for (row, &k) in state.chunks_exact_mut(r.len()).zip(self.k(step)) {
            axpy(row, k * beta, r);
        }
    }

    /// A token: its decay, then its micro-steps.
    pub(super) fn advance(&self, state: &mut [T], t: usize, r: &mut [T]) {
        let token = self.token(t);
        let n_h = self.problem.rule().micro_steps;
        self.decay(state, token);
        for step in token * n_h..(token + 1) * n_h {
            self.write(state, step, r);
        }
    }

    /// `out = scale * S^T q`
    pub(super) fn read(&self, state: &[T], token: usize, out: &mut [T]) {
        out.fill(T::zero());
        for (row, &q) in state.chunks_exact(out.len()).zip(self.q(token)) {
            axpy(out, q * self.scale, row);
        }
    }

    /// The state `[K, V]` of this lane in a tensor of states, in either layout; zero if there is none.
    pub(super) fn load_state(&self, states: Option<&[T]>, layout: StateLayout) -> Vec<T> {
        let mut state = vec![T::zero(); self.problem.shape().key_dim * self.problem.shape().value_dim];
        if let Some(states) = states {
            self.each_state_index(layout, |here, there| state[here] = states[there]);
        }
        state
    }

    /// The reverse of [`Lane::load_state`].
    pub(super) fn store_state(&self, state: &[T], states: &mut [T], layout: StateLayout) {
        self.each_state_index(layout, |here, there| states[there] = state[here]);
    }

    fn each_state_index(&self, layout: StateLayout, mut visit: impl FnMut(usize, usize)) {
        let s = self.problem.shape();
        let base = (self.n * s.value_heads + self.hv) * s.key_dim * s.value_dim;
        for i in 0..s.key_dim {
            for j in 0..s.value_dim {
                let there = match layout {
                    StateLayout::KeyFirst => i * s.value_dim + j,
                    StateLayout::ValueFirst => j * s.key_dim + i,
                };
                visit(i * s.value_dim + j, base + there);
            }
        }
    }
}

/// `y += a x`
pub(super) fn axpy<T: Real>(y: &mut [T], a: T, x: &[T]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

pub(super) fn dot<T: Real>(x: &[T], y: &[T]) -> T {
    x.iter().zip(y).map(|(&x, &y)| x * y).sum()
}
