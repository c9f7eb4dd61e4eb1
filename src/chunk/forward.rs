//! The chunks of one sequence and head, one after the other; sequences and heads side by side.

use rayon::prelude::*;

use super::lane::{Chunk, Lane, Span, store_state};
use super::matrix::{View, product};
use crate::transform::Effective;
use crate::{Ident, Inputs, Options, Output, Problem, Real, Result};

/// Computes `o` and the final state chunk by chunk, on all threads of the current rayon pool.
///
/// The result has the same bits whatever the number of threads. Any `chunk_size` from 1 works.
///
/// # Errors
/// When a tensor is missing, unused or of the wrong length, or an option has no meaning.
pub fn forward<T: Real>(problem: &Problem, options: &Options, inputs: &Inputs<'_, T>) -> Result<Output<T>> {
    inputs.validate(problem, options)?;
    let tensors = Effective::new(problem, options, inputs);
    let shape = problem.shape();
    let (heads, width) = (shape.value_heads, shape.value_dim);
    let lanes: Vec<_> = (0..problem.sequences() * heads)
        .into_par_iter()
        .map(|i| {
            let (n, hv) = (i / heads, i % heads);
            run(&Lane { problem, options, tensors: &tensors, v: inputs.v, n, hv }, inputs)
        })
        .collect();

    let mut output = Output {
        o: vec![T::zero(); problem.len_of(Ident::O)],
        final_state: vec![T::zero(); problem.len_of(Ident::FinalState)],
    };
    for n in 0..problem.sequences() {
        let sequence = problem.sequence(n);
        let first = (sequence.row * shape.tokens + sequence.start) * heads * width;
        let tokens = &mut output.o[first..][..sequence.len * heads * width];
        tokens.par_chunks_exact_mut(heads * width).enumerate().for_each(|(t, token)| {
            for (hv, o) in token.chunks_exact_mut(width).enumerate() {
                o.copy_from_slice(&lanes[n * heads + hv].0[t * width..][..width]);
            }
        });
    }
    let states = output.final_state.par_chunks_exact_mut(shape.key_dim * width);
    states.zip(&lanes).for_each(|(to, (_, state))| store_state(problem, options, state, to));
    Ok(output)
}

/// `o` as `[len, V]` and the final state as `[K, V]`.
fn run<T: Real>(lane: &Lane<'_, T>, inputs: &Inputs<'_, T>) -> (Vec<T>, Vec<T>) {
    let (dim, width) = (lane.problem.shape().key_dim, lane.problem.shape().value_dim);
    let n_h = lane.problem.rule().micro_steps;
    let mut chunk = lane.buffers();
    let mut writes = Writes::new(lane);
    let mut state = lane.state(inputs.initial_state);
    let mut o = vec![T::zero(); lane.steps() / n_h * width];
    for span in lane.spans() {
        let Span { rows, reads, first, token, .. } = span;
        lane.prepare(&mut chunk, span);
        writes.solve(lane, &chunk, span, &state);

        // O = Qg S + P N, in the rows where a token ends.
        if reads > 0 {
            let o = &mut o[token * width..][..reads * width];
            let qg = View::new(&chunk.q[first * dim..], reads, dim, n_h * dim);
            let p = View::new(&chunk.p[first * rows..], reads, rows, n_h * rows);
            product(o, width, T::zero(), T::one(), qg, View::new(&state, dim, width, width));
            product(o, width, T::one(), T::one(), p, View::new(&writes.n, rows, width, width));
        }
        writes.advance(&chunk, span, &mut state);
    }
    (o, state)
}

/// What a chunk writes.
pub(super) struct Writes<T> {
    /// V - Kg S, then scratch.
    r0: Vec<T>,
    /// R = M (V - Kg S)
    pub(super) r: Vec<T>,
    /// N = diag(beta) R
    pub(super) n: Vec<T>,
}

impl<T: Real> Writes<T> {
    pub(super) fn new(lane: &Lane<'_, T>) -> Self {
        let new = || vec![T::zero(); lane.chunk_size() * lane.problem.shape().value_dim];
        Self { r0: new(), r: new(), n: new() }
    }

    /// Fills R and N from the state before the chunk.
    pub(super) fn solve(&mut self, lane: &Lane<'_, T>, chunk: &Chunk<T>, span: Span, state: &[T]) {
        let (dim, width) = (lane.problem.shape().key_dim, lane.problem.shape().value_dim);
        let rows = span.rows;
        let (zero, one) = (T::zero(), T::one());
        let r0 = &mut self.r0[..rows * width];
        let keys = View::new(&chunk.k, rows, dim, dim);
        product(r0, width, zero, -one, keys, View::new(state, dim, width, width));
        for (i, r0) in r0.chunks_exact_mut(width).enumerate() {
            r0.iter_mut().zip(lane.v(span.step0 + i)).for_each(|(r, &v)| *r += v);
        }
        let m = View::new(&chunk.m, rows, rows, rows);
        product(&mut self.r, width, zero, one, m, View::new(r0, rows, width, width));
        for (i, (n, r)) in
            self.n.chunks_exact_mut(width).zip(self.r.chunks_exact(width)).enumerate().take(rows)
        {
            n.iter_mut().zip(r).for_each(|(n, &r)| *n = r * chunk.beta[i]);
        }
    }

    /// S <- gamma S + Kd^T N
    pub(super) fn advance(&self, chunk: &Chunk<T>, span: Span, state: &mut [T]) {
        let (dim, width) = (chunk.gamma.len(), state.len() / chunk.gamma.len());
        for (row, &gamma) in state.chunks_exact_mut(width).zip(&chunk.gamma) {
            row.iter_mut().for_each(|s| *s *= gamma);
        }
        let kd = View::new(&chunk.kd, span.rows, dim, dim).t();
        product(state, width, T::one(), T::one(), kd, View::new(&self.n, span.rows, width, width));
    }
}
