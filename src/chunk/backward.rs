//! The gradients of one sequence and head, last chunk first; sequences and heads side by side.

use rayon::prelude::*;

use super::adjoint::{Adjoint, LaneGradients};
use super::forward::Writes;
use super::lane::{Lane, store_state};
use crate::transform::Effective;
use crate::{Decay, Gradients, Ident, Inputs, Options, OutputGradients, Problem, Real, Result};

/// Computes the gradients of all inputs from those of `o` and of the final state, chunk by chunk, on all threads of
/// the current rayon pool.
///
/// The state before every chunk is computed first and kept: `K V ceil(T n_h / chunk_size)` numbers for each sequence
/// and head that a thread works on. The result has the same bits whatever the number of threads.
///
/// # Errors
/// As [`forward`](super::forward), and for gradients of the wrong length.
pub fn backward<T: Real>(
    problem: &Problem,
    options: &Options,
    inputs: &Inputs<'_, T>,
    output_gradients: &OutputGradients<'_, T>,
) -> Result<Gradients<T>> {
    inputs.validate(problem, options)?;
    output_gradients.validate(problem)?;
    let tensors = Effective::new(problem, options, inputs);
    let heads = problem.shape().value_heads;
    let lanes: Vec<_> = (0..problem.sequences() * heads)
        .into_par_iter()
        .map(|i| {
            let (n, hv) = (i / heads, i % heads);
            run(&Lane { problem, options, tensors: &tensors, v: inputs.v, n, hv }, inputs, output_gradients)
        })
        .collect();
    let gradients = gather(problem, options, &lanes);
    Ok(Effective::backward(problem, options, inputs, gradients))
}

/// Puts the rows of all lanes into their tensors; value heads that share a key head are added in their order.
fn gather<T: Real>(problem: &Problem, options: &Options, lanes: &[LaneGradients<T>]) -> Gradients<T> {
    let shape = problem.shape();
    let (heads, n_h, gates) = (shape.value_heads, problem.rule().micro_steps, problem.gate_dim());
    let zeros = |ident| vec![T::zero(); problem.len_of(ident)];
    let mut to = Gradients {
        q: zeros(Ident::Q),
        k: zeros(Ident::K),
        v: zeros(Ident::V),
        beta: zeros(Ident::Beta),
        g: (problem.rule().decay != Decay::None).then(|| zeros(Ident::G)),
        a_log: None,
        dt_bias: None,
        initial_state: zeros(Ident::InitialState),
    };
    for (n, lanes) in lanes.chunks_exact(heads).enumerate() {
        let sequence = problem.sequence(n);
        let token = sequence.row * shape.tokens + sequence.start;
        for (hv, lane) in lanes.iter().enumerate() {
            let h = problem.key_head(hv);
            add_rows(&mut to.q, &lane.q, shape.key_dim, token, shape.heads, h);
            add_rows(&mut to.k, &lane.k, shape.key_dim, token * n_h, shape.heads, h);
            add_rows(&mut to.v, &lane.v, shape.value_dim, token * n_h, heads, hv);
            add_rows(&mut to.beta, &lane.beta, 1, token * n_h, heads, hv);
            if let Some(g) = &mut to.g {
                add_rows(g, &lane.g, gates, token, heads, hv);
            }
            let state = &mut to.initial_state[(n * heads + hv) * lane.state.len()..][..lane.state.len()];
            store_state(problem, options, &lane.state, state);
        }
    }
    to
}

/// Adds rows of one head, from row `first` on, to a tensor `[.., heads, width]`.
fn add_rows<T: Real>(to: &mut [T], rows: &[T], width: usize, first: usize, heads: usize, head: usize) {
    let to = to[first * heads * width..].chunks_exact_mut(heads * width);
    for (to, row) in to.zip(rows.chunks_exact(width)) {
        to[head * width..][..width].iter_mut().zip(row).for_each(|(to, &x)| *to += x);
    }
}

fn run<T: Real>(
    lane: &Lane<'_, T>,
    inputs: &Inputs<'_, T>,
    output_gradients: &OutputGradients<'_, T>,
) -> LaneGradients<T> {
    let shape = lane.problem.shape();
    let (dim, width) = (shape.key_dim, shape.value_dim);
    let n_h = lane.problem.rule().micro_steps;
    let (steps, tokens) = (lane.steps(), lane.steps() / n_h);
    let mut chunk = lane.buffers();
    let mut writes = Writes::new(lane);

    let mut state = lane.state(inputs.initial_state);
    let mut states = Vec::with_capacity(lane.spans().len());
    for span in lane.spans() {
        lane.prepare(&mut chunk, span);
        writes.solve(lane, &chunk, span, &state);
        let before = state.clone();
        writes.advance(&chunk, span, &mut state);
        states.push(before);
    }

    let zeros = |len: usize| vec![T::zero(); len];
    let gates = if lane.problem.rule().decay == Decay::None { 0 } else { lane.problem.gate_dim() };
    let mut to = LaneGradients {
        q: zeros(tokens * dim),
        k: zeros(steps * dim),
        v: zeros(steps * width),
        beta: zeros(steps),
        g: zeros(tokens * gates),
        state: lane.state(output_gradients.final_state),
    };
    let mut adjoint = Adjoint::new(lane);
    for (span, state) in lane.spans().zip(&states).rev() {
        lane.prepare(&mut chunk, span);
        writes.solve(lane, &chunk, span, state);
        adjoint.chunk(lane, &chunk, &writes, span, state, output_gradients.o, &mut to);
    }
    to
}
