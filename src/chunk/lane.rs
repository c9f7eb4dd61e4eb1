//! One sequence and value head, and the operands of its chunks.

use super::gram::Gram;
use super::inverse::invert;
use crate::transform::Effective;
use crate::{Decay, Options, Problem, Real, StateLayout};

/// Micro-steps per chunk unless the options say otherwise.
const CHUNK: usize = 64;

/// One sequence and value head.
pub(super) struct Lane<'a, T: Real> {
    pub(super) problem: &'a Problem,
    pub(super) options: &'a Options,
    pub(super) tensors: &'a Effective<'a, T>,
    pub(super) v: &'a [T],
    pub(super) n: usize,
    pub(super) hv: usize,
}

/// Some micro-steps of a lane, and the tokens that end among them.
#[derive(Clone, Copy)]
pub(super) struct Span {
    /// The first micro-step.
    pub(super) step0: usize,
    /// Micro-steps.
    pub(super) rows: usize,
    /// The first token that ends here.
    pub(super) token: usize,
    /// Tokens that end here.
    pub(super) reads: usize,
    /// The row in which the first of them ends; the others follow every n_h rows.
    pub(super) first: usize,
}

impl Span {
    /// The token, among those that end here, that ends in row `i`.
    pub(super) fn read_at(&self, i: usize, n_h: usize) -> Option<usize> {
        let since = i.checked_sub(self.first)?;
        since.is_multiple_of(n_h).then_some(since / n_h)
    }
}

/// The operands of a chunk; see [the module](super).
pub(super) struct Chunk<T> {
    /// Kg. `[rows, K]`
    pub(super) k: Vec<T>,
    /// Qg, in the rows where a token ends. `[rows, K]`
    pub(super) q: Vec<T>,
    pub(super) kd: Vec<T>,
    /// M, `[rows, rows]`
    pub(super) m: Vec<T>,
    /// P, `[rows, rows]`
    pub(super) p: Vec<T>,
    pub(super) gamma: Vec<T>,
    pub(super) beta: Vec<T>,
    /// Of every row: none, one, or one per channel.
    pub(super) decays: Vec<T>,
    akk: Vec<T>,
    scratch: Vec<T>,
}

impl<T: Real> Lane<'_, T> {
    /// Micro-steps of the sequence.
    pub(super) fn steps(&self) -> usize {
        self.problem.sequence(self.n).len * self.problem.rule().micro_steps
    }

    /// Micro-steps of a chunk.
    pub(super) fn chunk_size(&self) -> usize {
        self.options.chunk_size.unwrap_or(CHUNK).min(self.steps().max(1))
    }

    /// The chunks, in their order.
    pub(super) fn spans(&self) -> impl DoubleEndedIterator<Item = Span> + ExactSizeIterator {
        let (steps, chunk, n_h) = (self.steps(), self.chunk_size(), self.problem.rule().micro_steps);
        (0..steps.div_ceil(chunk)).map(move |c| {
            let step0 = c * chunk;
            let rows = chunk.min(steps - step0);
            let token = step0 / n_h;
            let (reads, first) = ((step0 + rows) / n_h - token, (token + 1) * n_h - 1 - step0);
            Span { step0, rows, token, reads, first }
        })
    }

    /// Makes the buffers of a chunk, once.
    pub(super) fn buffers(&self) -> Chunk<T> {
        let (chunk, dim) = (self.chunk_size(), self.problem.shape().key_dim);
        let new = |len: usize| vec![T::zero(); len];
        Chunk {
            k: new(chunk * dim),
            q: new(chunk * dim),
            kd: new(chunk * dim),
            m: new(chunk * chunk),
            p: new(chunk * chunk),
            gamma: new(dim),
            beta: new(chunk),
            decays: new(chunk * self.problem.gate_dim()),
            akk: new(chunk * chunk),
            scratch: new((chunk * chunk).max(2 * dim)),
        }
    }

    /// Fills the operands of a chunk.
    pub(super) fn prepare(&self, chunk: &mut Chunk<T>, span: Span) {
        let dim = self.problem.shape().key_dim;
        let rows = span.rows;
        self.load(chunk, span);
        let mut gram = Gram {
            k: &mut chunk.k[..rows * dim],
            q: &mut chunk.q[..rows * dim],
            kd: &mut chunk.kd[..rows * dim],
            akk: &mut chunk.akk[..rows * rows],
            aqk: &mut chunk.p[..rows * rows],
            gamma: &mut chunk.gamma,
            rows,
            dim,
        };
        match self.problem.rule().decay {
            Decay::None => gram.plain(),
            Decay::Head => gram.head(&chunk.decays),
            Decay::Channel => gram.channel(&chunk.decays, &mut chunk.scratch),
        }
        for i in 0..rows {
            for j in 0..rows {
                let at = i * rows + j;
                chunk.akk[at] = if j < i { chunk.akk[at] * chunk.beta[j] } else { T::zero() };
                chunk.p[at] = if j <= i { chunk.p[at] } else { T::zero() };
            }
        }
        invert(&chunk.akk, &mut chunk.m, rows, rows, &mut chunk.scratch);
    }

    /// Fills k, q (scaled, zero where no token ends), beta and the decays.
    fn load(&self, chunk: &mut Chunk<T>, span: Span) {
        let (dim, n_h) = (self.problem.shape().key_dim, self.problem.rule().micro_steps);
        let scale = T::of(self.options.scale_for(dim));
        let gates = self.problem.gate_dim();
        for i in 0..span.rows {
            let step = span.step0 + i;
            chunk.k[i * dim..][..dim].copy_from_slice(self.k(step));
            let q = &mut chunk.q[i * dim..][..dim];
            q.fill(T::zero());
            if (step + 1).is_multiple_of(n_h) {
                q.iter_mut().zip(self.q(step / n_h)).for_each(|(q, &x)| *q = x * scale);
            }
            if self.problem.rule().decay != Decay::None {
                let decays = &mut chunk.decays[i * gates..][..gates];
                decays.fill(T::one());
                if step.is_multiple_of(n_h) {
                    let at = self.row(step / n_h, 1, self.problem.shape().value_heads, self.hv) * gates;
                    let g = &self.tensors.g[at..][..gates];
                    decays.iter_mut().zip(g).for_each(|(d, g)| *d = g.exp());
                }
            }
            let at = self.row(step, n_h, self.problem.shape().value_heads, self.hv);
            chunk.beta[i] = self.tensors.beta[at];
        }
    }

    /// The row of a tensor `[B, T * per_token, heads, ..]`, `t` counted from the sequence's beginning.
    pub(super) fn row(&self, t: usize, per_token: usize, heads: usize, head: usize) -> usize {
        let sequence = self.problem.sequence(self.n);
        let first = (sequence.row * self.problem.shape().tokens + sequence.start) * per_token;
        (first + t) * heads + head
    }

    pub(super) fn k(&self, step: usize) -> &[T] {
        let shape = self.problem.shape();
        let n_h = self.problem.rule().micro_steps;
        let row = self.row(step, n_h, shape.heads, self.problem.key_head(self.hv));
        &self.tensors.k[row * shape.key_dim..][..shape.key_dim]
    }

    pub(super) fn q(&self, token: usize) -> &[T] {
        let shape = self.problem.shape();
        let row = self.row(token, 1, shape.heads, self.problem.key_head(self.hv));
        &self.tensors.q[row * shape.key_dim..][..shape.key_dim]
    }

    pub(super) fn v(&self, step: usize) -> &[T] {
        let shape = self.problem.shape();
        let row = self.row(step, self.problem.rule().micro_steps, shape.value_heads, self.hv);
        &self.v[row * shape.value_dim..][..shape.value_dim]
    }

    /// The lane's state as `[K, V]`, zero if there is none.
    pub(super) fn state(&self, states: Option<&[T]>) -> Vec<T> {
        let shape = self.problem.shape();
        let size = shape.key_dim * shape.value_dim;
        let mut state = vec![T::zero(); size];
        if let Some(states) = states {
            let from = &states[(self.n * shape.value_heads + self.hv) * size..][..size];
            match self.options.state_layout {
                StateLayout::KeyFirst => state.copy_from_slice(from),
                StateLayout::ValueFirst => transpose(from, &mut state, shape.value_dim, shape.key_dim),
            }
        }
        state
    }
}

/// Copies a state `[K, V]` into the layout of the caller.
pub(super) fn store_state<T: Real>(problem: &Problem, options: &Options, state: &[T], to: &mut [T]) {
    let shape = problem.shape();
    match options.state_layout {
        StateLayout::KeyFirst => to.copy_from_slice(state),
        StateLayout::ValueFirst => transpose(state, to, shape.key_dim, shape.value_dim),
    }
}

/// `to[j, i] = from[i, j]`
fn transpose<T: Real>(from: &[T], to: &mut [T], rows: usize, cols: usize) {
    for (j, column) in to.chunks_exact_mut(rows).enumerate() {
        for (i, x) in column.iter_mut().enumerate() {
            *x = from[i * cols + j];
        }
    }
}
