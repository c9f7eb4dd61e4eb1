//! The fused options on the host: L2 norm, sigmoids and gate formulas, each with its gradient.

use std::borrow::Cow;

use crate::{BetaTransform, Decay, GateTransform, Gradients, Inputs, Options, Problem, Real};

/// Inside the root of the L2 norm, as in FLA.
const EPS: f64 = 1e-6;

/// $y = x / \sqrt{x \cdot x + 10^{-6}}$ for every row of `dim` channels.
pub fn l2_norm<T: Real>(x: &[T], dim: usize) -> Vec<T> {
    let mut y = x.to_vec();
    for row in y.chunks_exact_mut(dim) {
        let rstd = rstd(row);
        row.iter_mut().for_each(|x| *x *= rstd);
    }
    y
}

/// Gradient of [`l2_norm`]: $dx = r\,(dy - y\,(y \cdot dy))$ with $r = 1 / \sqrt{x \cdot x + 10^{-6}}$.
pub fn l2_norm_backward<T: Real>(x: &[T], dy: &[T], dim: usize) -> Vec<T> {
    let mut dx = dy.to_vec();
    for (dx, x) in dx.chunks_exact_mut(dim).zip(x.chunks_exact(dim)) {
        let rstd = rstd(x);
        let along: T = x.iter().zip(&*dx).map(|(&x, &dy)| x * rstd * dy).sum();
        for (dx, &x) in dx.iter_mut().zip(x) {
            *dx = rstd * (*dx - x * rstd * along);
        }
    }
    dx
}

fn rstd<T: Real>(x: &[T]) -> T {
    let square: T = x.iter().map(|&x| x * x).sum();
    (square + T::of(EPS)).sqrt().recip()
}

/// $\sigma(x) = 1 / (1 + e^{-x})$, without overflow.
pub fn sigmoid<T: Real>(x: T) -> T {
    let e = (-x.abs()).exp();
    if x >= T::zero() { (T::one() + e).recip() } else { e / (T::one() + e) }
}

/// $\log(1 + e^x)$, without overflow or cancellation.
pub fn softplus<T: Real>(x: T) -> T {
    x.max(T::zero()) + (-x.abs()).exp().ln_1p()
}

/// Beta and its derivative with respect to what the caller holds.
fn beta_of<T: Real>(x: T, map: BetaTransform) -> (T, T) {
    let s = sigmoid(x);
    let slope = s * sigmoid(-x);
    match map {
        BetaTransform::Identity => (x, T::one()),
        BetaTransform::Sigmoid => (s, slope),
        BetaTransform::TwoSigmoid => (T::of(2.0) * s, T::of(2.0) * slope),
    }
}

/// g and its derivatives with respect to `x = a + dt_bias` and `a_log`.
fn gate_of<T: Real>(x: T, a_log: T, map: GateTransform) -> (T, T, T) {
    let a = a_log.exp();
    match map {
        GateTransform::Identity => (x, T::one(), T::zero()),
        GateTransform::Softplus => {
            let g = -a * softplus(x);
            (g, -a * sigmoid(x), g)
        }
        GateTransform::Bounded { lower_bound } => {
            let bound = T::of(lower_bound);
            let slope = bound * sigmoid(a * x) * sigmoid(-a * x);
            (bound * sigmoid(a * x), slope * a, slope * a * x)
        }
    }
}

/// The tensors that the recurrence itself reads, after every fused option.
pub(crate) struct Effective<'a, T: Real> {
    pub(crate) q: Cow<'a, [T]>,
    pub(crate) k: Cow<'a, [T]>,
    pub(crate) beta: Cow<'a, [T]>,
    /// Empty when the rule does not decay.
    pub(crate) g: Cow<'a, [T]>,
}

impl<'a, T: Real> Effective<'a, T> {
    /// Applies the options; borrows what they leave as it is.
    pub(crate) fn new(problem: &Problem, options: &Options, inputs: &Inputs<'a, T>) -> Self {
        let dim = problem.shape().key_dim;
        let norm = |x: &'a [T]| match options.qk_l2norm {
            true => Cow::Owned(l2_norm(x, dim)),
            false => Cow::Borrowed(x),
        };
        let beta = match options.beta {
            BetaTransform::Identity => Cow::Borrowed(inputs.beta),
            map => Cow::Owned(inputs.beta.iter().map(|&x| beta_of(x, map).0).collect()),
        };
        let g = match (inputs.g, options.gate) {
            (None, _) => Cow::Borrowed(&[][..]),
            (Some(g), GateTransform::Identity) => Cow::Borrowed(g),
            (Some(g), map) => {
                let each = gate_arguments(problem, inputs, g);
                Cow::Owned(each.map(|(x, a_log, _, _)| gate_of(x, a_log, map).0).collect())
            }
        };
        Self { q: norm(inputs.q), k: norm(inputs.k), beta, g }
    }

    /// Turns gradients of the effective tensors into gradients of the inputs.
    pub(crate) fn backward(
        problem: &Problem,
        options: &Options,
        inputs: &Inputs<'_, T>,
        mut gradients: Gradients<T>,
    ) -> Gradients<T> {
        let dim = problem.shape().key_dim;
        if options.qk_l2norm {
            gradients.q = l2_norm_backward(inputs.q, &gradients.q, dim);
            gradients.k = l2_norm_backward(inputs.k, &gradients.k, dim);
        }
        for (d, &x) in gradients.beta.iter_mut().zip(inputs.beta) {
            *d *= beta_of(x, options.beta).1;
        }
        if let (Some(g), Some(dg)) = (inputs.g, &mut gradients.g)
            && options.gate != GateTransform::Identity
        {
            let mut d_a_log = inputs.a_log.map(|a| vec![T::zero(); a.len()]);
            let mut d_bias = inputs.dt_bias.map(|b| vec![T::zero(); b.len()]);
            for (d, (x, a_log, head, channel)) in dg.iter_mut().zip(gate_arguments(problem, inputs, g)) {
                let (_, by_x, by_a_log) = gate_of(x, a_log, options.gate);
                if let Some(d_a_log) = &mut d_a_log {
                    d_a_log[head] += *d * by_a_log;
                }
                *d *= by_x;
                if let Some(d_bias) = &mut d_bias {
                    d_bias[channel] += *d;
                }
            }
            gradients.a_log = d_a_log;
            gradients.dt_bias = d_bias;
        }
        gradients
    }
}

/// `(a + dt_bias, a_log, index of a_log, index of dt_bias)` for every element of g.
fn gate_arguments<'a, T: Real>(
    problem: &Problem,
    inputs: &Inputs<'a, T>,
    g: &'a [T],
) -> impl Iterator<Item = (T, T, usize, usize)> + use<'a, T> {
    let width = match problem.rule().decay {
        Decay::Channel => problem.shape().key_dim,
        _ => 1,
    };
    let heads = problem.shape().value_heads;
    let (a_log, dt_bias) = (inputs.a_log, inputs.dt_bias);
    g.iter().enumerate().map(move |(i, &x)| {
        let channel = i % (heads * width);
        let head = channel / width;
        let bias = dt_bias.map_or(T::zero(), |b| b[channel]);
        (x + bias, a_log.map_or(T::zero(), |a| a[head]), head, channel)
    })
}
