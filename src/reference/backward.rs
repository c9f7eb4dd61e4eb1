//! The loop backward: the adjoint of every line of the recurrence, last line first.

use super::step::{Lane, axpy, dot};
use crate::transform::Effective;
use crate::{Decay, Gradients, Ident, Inputs, Options, OutputGradients, Problem, Real, Result};

/// Tokens between two stored states; those in between are computed again.
const SEGMENT: usize = 64;

/// Computes the gradients of all inputs from those of `o` and of the final state.
///
/// With $dS$ the adjoint of the state after a micro-step $S' = \bar S + k (\beta r)^\top$,
/// $r = v - \bar S^\top k$:
///
/// ```text
/// du = dS^T k     dbeta = du . r     dv = beta du     dk = dS (beta r) - Sbar dv     dSbar = dS - k dv^T
/// ```
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
    let zeros = |ident| vec![T::zero(); problem.len_of(ident)];
    let decays = problem.rule().decay != Decay::None;
    let mut gradients = Gradients {
        q: zeros(Ident::Q),
        k: zeros(Ident::K),
        v: zeros(Ident::V),
        beta: zeros(Ident::Beta),
        g: decays.then(|| zeros(Ident::G)),
        a_log: None,
        dt_bias: None,
        initial_state: zeros(Ident::InitialState),
    };
    for lane in Lane::all(problem, options, &tensors, inputs) {
        let mut d_state = lane.load_state(output_gradients.final_state, options.state_layout);
        let first = lane.load_state(inputs.initial_state, options.state_layout);
        let checkpoints = checkpoints(problem, &lane, first);
        for (segment, start) in checkpoints.iter().enumerate().rev() {
            let tokens = segment * SEGMENT..((segment + 1) * SEGMENT).min(lane.sequence.len);
            let states = states(problem, &lane, start, tokens.clone());
            for t in tokens.clone().rev() {
                let before = &states[t - tokens.start];
                token_backward(problem, &lane, before, t, output_gradients.o, &mut d_state, &mut gradients);
            }
        }
        lane.store_state(&d_state, &mut gradients.initial_state, options.state_layout);
    }
    Ok(Effective::backward(problem, options, inputs, gradients))
}

/// The state before every segment.
fn checkpoints<T: Real>(problem: &Problem, lane: &Lane<'_, T>, first: Vec<T>) -> Vec<Vec<T>> {
    let mut r = vec![T::zero(); problem.shape().value_dim];
    let mut state = first;
    let mut all = Vec::new();
    for t in 0..lane.sequence.len {
        if t % SEGMENT == 0 {
            all.push(state.clone());
        }
        lane.advance(&mut state, t, &mut r);
    }
    all
}

/// The state before every token of a segment.
fn states<T: Real>(
    problem: &Problem,
    lane: &Lane<'_, T>,
    start: &[T],
    tokens: std::ops::Range<usize>,
) -> Vec<Vec<T>> {
    let mut r = vec![T::zero(); problem.shape().value_dim];
    let mut state = start.to_vec();
    let mut all = Vec::with_capacity(tokens.len());
    for t in tokens {
        all.push(state.clone());
        lane.advance(&mut state, t, &mut r);
    }
    all
}

/// Takes `d_state` from after token `t` to before it.
fn token_backward<T: Real>(
    problem: &Problem,
    lane: &Lane<'_, T>,
    before: &[T],
    t: usize,
    d_o: &[T],
    d_state: &mut [T],
    gradients: &mut Gradients<T>,
) {
    let (width, n_h) = (problem.shape().value_dim, problem.rule().micro_steps);
    let token = lane.token(t);
    let mut r = vec![T::zero(); width];

    // Sbar before each micro-step, and the state that the token reads.
    let mut bars = vec![before.to_vec()];
    lane.decay(&mut bars[0], token);
    for step in token * n_h..(token + 1) * n_h {
        let mut next = bars[bars.len() - 1].clone();
        lane.write(&mut next, step, &mut r);
        bars.push(next);
    }

    let d_o = &d_o[lane.v_at(token)..][..width];
    let q_at = lane.q_at(token);
    let read = bars[n_h].chunks_exact(width).zip(d_state.chunks_exact_mut(width));
    for (i, ((s, ds), &q)) in read.zip(lane.q(token)).enumerate() {
        gradients.q[q_at + i] += lane.scale * dot(s, d_o);
        axpy(ds, lane.scale * q, d_o);
    }

    let mut dv = vec![T::zero(); width];
    for (j, bar) in bars[..n_h].iter().enumerate().rev() {
        let step = token * n_h + j;
        let beta = lane.beta(step);
        lane.residual(bar, step, &mut r);
        dv.fill(T::zero());
        for (ds, &k) in d_state.chunks_exact(width).zip(lane.k(step)) {
            axpy(&mut dv, k, ds);
        }
        gradients.beta[lane.beta_at(step)] = dot(&dv, &r);
        dv.iter_mut().for_each(|d| *d *= beta);
        gradients.v[lane.v_at(step)..][..width].copy_from_slice(&dv);
        let k_at = lane.q_at(step);
        let rows = bar.chunks_exact(width).zip(d_state.chunks_exact_mut(width));
        for (i, ((s, ds), &k)) in rows.zip(lane.k(step)).enumerate() {
            gradients.k[k_at + i] += beta * dot(ds, &r) - dot(s, &dv);
            axpy(ds, -k, &dv);
        }
    }

    if let Some(dg) = &mut gradients.g {
        let dg = &mut dg[lane.g_at(token)..][..problem.gate_dim()];
        let per_row = dg.len();
        for (i, (s, ds)) in bars[0].chunks_exact(width).zip(d_state.chunks_exact(width)).enumerate() {
            dg[i % per_row] += dot(s, ds);
        }
        lane.decay(d_state, token);
    }
}
