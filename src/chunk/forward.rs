//! The chunks of one sequence and head, one after the other; sequences and heads side by side.

use rayon::prelude::*;

use super::gram::Gram;
use super::inverse::invert;
use super::matrix::{View, product};
use crate::transform::Effective;
use crate::{Decay, Ident, Inputs, Options, Output, Problem, Real, Result, StateLayout};

/// Micro-steps per chunk unless the options say otherwise.
const CHUNK: usize = 64;

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
        .map(|i| Lane { problem, options, tensors: &tensors, inputs, n: i / heads, hv: i % heads }.run())
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
    states.zip(&lanes).for_each(|(to, (_, state))| {
        copy_state(state, to, shape.key_dim, width, options.state_layout);
    });
    Ok(output)
}

/// Between `[K, V]` and the layout of the caller, in the direction `[K, V]` to layout.
fn copy_state<T: Real>(from: &[T], to: &mut [T], key_dim: usize, value_dim: usize, layout: StateLayout) {
    match layout {
        StateLayout::KeyFirst => to.copy_from_slice(from),
        StateLayout::ValueFirst => {
            for (j, column) in to.chunks_exact_mut(key_dim).enumerate() {
                for (i, x) in column.iter_mut().enumerate() {
                    *x = from[i * value_dim + j];
                }
            }
        }
    }
}

/// One sequence and value head.
struct Lane<'a, T: Real> {
    problem: &'a Problem,
    options: &'a Options,
    tensors: &'a Effective<'a, T>,
    inputs: &'a Inputs<'a, T>,
    n: usize,
    hv: usize,
}

/// The buffers of a lane, made once.
struct Buffers<T> {
    k: Vec<T>,
    q: Vec<T>,
    kd: Vec<T>,
    akk: Vec<T>,
    aqk: Vec<T>,
    t: Vec<T>,
    gamma: Vec<T>,
    decays: Vec<T>,
    /// V - Kg S, then scratch.
    r: Vec<T>,
    n: Vec<T>,
    scratch: Vec<T>,
}

impl<T: Real> Lane<'_, T> {
    /// `o` as `[len, V]` and the final state as `[K, V]`.
    fn run(&self) -> (Vec<T>, Vec<T>) {
        let shape = self.problem.shape();
        let (dim, width) = (shape.key_dim, shape.value_dim);
        let n_h = self.problem.rule().micro_steps;
        let sequence = self.problem.sequence(self.n);
        let steps = sequence.len * n_h;
        let chunk = self.options.chunk_size.unwrap_or(CHUNK).min(steps.max(1));
        let new = |len: usize| vec![T::zero(); len];
        let per_channel = self.problem.rule().decay == Decay::Channel;
        let mut b = Buffers {
            k: new(chunk * dim),
            q: new(chunk * dim),
            kd: new(chunk * dim),
            akk: new(chunk * chunk),
            aqk: new(chunk * chunk),
            t: new(chunk * chunk),
            gamma: new(dim),
            decays: new(chunk * if per_channel { dim } else { 1 }),
            r: new(chunk * width),
            n: new(chunk * width),
            scratch: new((chunk * chunk).max(2 * dim)),
        };
        let mut o = new(sequence.len * width);
        let mut state = self.initial_state();
        for step0 in (0..steps).step_by(chunk) {
            let rows = chunk.min(steps - step0);
            let (first, last) = (step0 / n_h, (step0 + rows) / n_h);
            self.chunk(&mut b, step0, rows, &mut state, &mut o[first * width..last * width]);
        }
        (o, state)
    }

    fn initial_state(&self) -> Vec<T> {
        let shape = self.problem.shape();
        let size = shape.key_dim * shape.value_dim;
        let mut state = vec![T::zero(); size];
        if let Some(states) = self.inputs.initial_state {
            let from = &states[(self.n * shape.value_heads + self.hv) * size..][..size];
            // The transpose of `[V, K]` is the copy of a `[K, V]` with the names exchanged.
            copy_state(from, &mut state, shape.key_dim, shape.value_dim, StateLayout::KeyFirst);
            if self.options.state_layout == StateLayout::ValueFirst {
                copy_state(from, &mut state, shape.value_dim, shape.key_dim, StateLayout::ValueFirst);
            }
        }
        state
    }

    /// `rows` micro-steps from `step0` on; `o` takes the reads of the tokens that end among them.
    fn chunk(&self, b: &mut Buffers<T>, step0: usize, rows: usize, state: &mut [T], o: &mut [T]) {
        let shape = self.problem.shape();
        let (dim, width) = (shape.key_dim, shape.value_dim);
        let n_h = self.problem.rule().micro_steps;
        let (zero, one) = (T::zero(), T::one());
        let beta = self.load(b, step0, rows);

        let mut gram = Gram {
            k: &mut b.k[..rows * dim],
            q: &mut b.q[..rows * dim],
            kd: &mut b.kd[..rows * dim],
            akk: &mut b.akk[..rows * rows],
            aqk: &mut b.aqk[..rows * rows],
            gamma: &mut b.gamma,
            rows,
            dim,
        };
        match self.problem.rule().decay {
            Decay::None => gram.plain(),
            Decay::Head => gram.head(&b.decays),
            Decay::Channel => gram.channel(&b.decays, &mut b.scratch),
        }
        for (i, &beta) in beta.iter().enumerate() {
            for j in 0..rows {
                let at = i * rows + j;
                b.akk[at] = if j < i { beta * b.akk[at] } else { zero };
                b.aqk[at] = if j <= i { b.aqk[at] } else { zero };
            }
        }
        invert(&b.akk, &mut b.t, rows, rows, &mut b.scratch);

        // R = beta (V - Kg S), N = T R
        let state_view = View::new(state, dim, width, width);
        let r = &mut b.r[..rows * width];
        product(r, width, zero, -one, View::new(&b.k, rows, dim, dim), state_view);
        for (i, r) in r.chunks_exact_mut(width).enumerate() {
            for (r, &v) in r.iter_mut().zip(self.v(step0 + i)) {
                *r = (*r + v) * beta[i];
            }
        }
        let n = &mut b.n[..rows * width];
        product(n, width, zero, one, View::new(&b.t, rows, rows, rows), View::new(r, rows, width, width));
        let n = View::new(n, rows, width, width);

        // O = Qg S + P N, in the rows where a token ends: every n_h-th, counted from the first of them.
        let reads = o.len() / width;
        if reads > 0 {
            let first = ((step0 / n_h) + 1) * n_h - 1 - step0;
            let qg = View::new(&b.q[first * dim..], reads, dim, n_h * dim);
            let p = View::new(&b.aqk[first * rows..], reads, rows, n_h * rows);
            product(o, width, zero, one, qg, state_view);
            product(o, width, one, one, p, n);
        }

        // S <- gamma S + Kd^T N
        for (row, &gamma) in state.chunks_exact_mut(width).zip(&b.gamma) {
            row.iter_mut().for_each(|s| *s *= gamma);
        }
        product(state, width, one, one, View::new(&b.kd, rows, dim, dim).t(), n);
    }

    /// Fills k, q (scaled, zero where no token ends) and the decays; returns beta.
    fn load(&self, b: &mut Buffers<T>, step0: usize, rows: usize) -> Vec<T> {
        let shape = self.problem.shape();
        let (dim, n_h) = (shape.key_dim, self.problem.rule().micro_steps);
        let h = self.problem.key_head(self.hv);
        let scale = T::of(self.options.scale_for(dim));
        let gates = self.problem.gate_dim();
        let mut beta = Vec::with_capacity(rows);
        for i in 0..rows {
            let step = self.step(step0 + i);
            let token = step / n_h;
            let k = &self.tensors.k[(step * shape.heads + h) * dim..][..dim];
            b.k[i * dim..][..dim].copy_from_slice(k);
            let q = &mut b.q[i * dim..][..dim];
            q.fill(T::zero());
            if (step0 + i + 1).is_multiple_of(n_h) {
                let from = &self.tensors.q[(token * shape.heads + h) * dim..][..dim];
                q.iter_mut().zip(from).for_each(|(q, &x)| *q = x * scale);
            }
            if self.problem.rule().decay != Decay::None {
                let decays = &mut b.decays[i * gates..][..gates];
                decays.fill(T::one());
                if (step0 + i).is_multiple_of(n_h) {
                    let g = &self.tensors.g[(token * shape.value_heads + self.hv) * gates..][..gates];
                    decays.iter_mut().zip(g).for_each(|(d, g)| *d = g.exp());
                }
            }
            beta.push(self.tensors.beta[step * shape.value_heads + self.hv]);
        }
        beta
    }

    /// A micro-step of the sequence, among all micro-steps of the batch.
    fn step(&self, step: usize) -> usize {
        let sequence = self.problem.sequence(self.n);
        (sequence.row * self.problem.shape().tokens + sequence.start) * self.problem.rule().micro_steps + step
    }

    fn v(&self, step: usize) -> &[T] {
        let shape = self.problem.shape();
        &self.inputs.v[(self.step(step) * shape.value_heads + self.hv) * shape.value_dim..][..shape.value_dim]
    }
}
