//! Tensors in host memory: what `reference` and `chunk` read and return.

use crate::problem::Ident;
use crate::{Decay, Error, GateTransform, Options, Problem, Result};

/// The inputs of a call, contiguous, in the shapes of [`Problem::shape_of`].
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, T> {
    /// `[B, T, H, K]`
    pub q: &'a [T],
    /// `[B, T * n_h, H, K]`
    pub k: &'a [T],
    /// `[B, T * n_h, HV, V]`
    pub v: &'a [T],
    /// `[B, T * n_h, HV]`
    pub beta: &'a [T],
    /// `[B, T, HV]` or `[B, T, HV, K]`, natural logarithm; needed exactly when the rule decays.
    pub g: Option<&'a [T]>,
    /// `[HV]`, needed exactly when [`Options::gate`] is a formula.
    pub a_log: Option<&'a [T]>,
    /// `[HV]` or `[HV, K]`; with a gate formula, absent means 0.
    pub dt_bias: Option<&'a [T]>,
    /// `[N, HV, K, V]`, or `[N, HV, V, K]` by [`Options::state_layout`]; absent means 0.
    pub initial_state: Option<&'a [T]>,
}

impl<'a, T> Inputs<'a, T> {
    /// The four tensors that every rule reads; the others are set with `..`.
    pub fn new(q: &'a [T], k: &'a [T], v: &'a [T], beta: &'a [T]) -> Self {
        Self { q, k, v, beta, g: None, a_log: None, dt_bias: None, initial_state: None }
    }

    /// Checks every tensor against the problem and the options.
    pub(crate) fn validate(&self, problem: &Problem, options: &Options) -> Result<()> {
        options.validate()?;
        check_presence(problem, options, [self.g.is_some(), self.a_log.is_some(), self.dt_bias.is_some()])?;
        let tensors = [
            (Ident::Q, Some(self.q)),
            (Ident::K, Some(self.k)),
            (Ident::V, Some(self.v)),
            (Ident::Beta, Some(self.beta)),
            (Ident::G, self.g),
            (Ident::ALog, self.a_log),
            (Ident::DtBias, self.dt_bias),
            (Ident::InitialState, self.initial_state),
        ];
        for (ident, tensor) in tensors {
            if let Some(tensor) = tensor {
                check_len(problem, ident, ident.name(), tensor.len())?;
            }
        }
        Ok(())
    }
}

/// Checks which of `g`, `a_log` and `dt_bias` are there.
pub(crate) fn check_presence(problem: &Problem, options: &Options, given: [bool; 3]) -> Result<()> {
    let decays = problem.rule().decay != Decay::None;
    let formula = options.gate != GateTransform::Identity;
    let [g, a_log, dt_bias] = given;
    if decays && !g {
        return Err(Error::Missing { tensor: "g", why: "the rule decays" });
    }
    if !decays && g {
        return Err(Error::Unused { tensor: "g", why: "the rule has no decay" });
    }
    if !decays && formula {
        return Err(Error::InvalidOption { option: "gate", problem: "the rule has no decay".into() });
    }
    if formula && !a_log {
        return Err(Error::Missing { tensor: "a_log", why: "options.gate is a formula" });
    }
    for (tensor, given) in [("a_log", a_log), ("dt_bias", dt_bias)] {
        if !formula && given {
            return Err(Error::Unused { tensor, why: "options.gate is not a formula" });
        }
    }
    Ok(())
}

/// Checks the length of one host tensor.
fn check_len(problem: &Problem, ident: Ident, tensor: &'static str, got: usize) -> Result<()> {
    let expected = problem.len_of(ident);
    if got == expected {
        return Ok(());
    }
    Err(Error::Length { tensor, shape: problem.shape_of(ident), expected, got })
}

/// What a forward call returns.
#[derive(Clone, Debug, PartialEq)]
pub struct Output<T> {
    /// `[B, T, HV, V]`
    pub o: Vec<T>,
    /// `[N, HV, K, V]`, or `[N, HV, V, K]` by [`Options::state_layout`].
    pub final_state: Vec<T>,
}

/// The gradients that flow into a backward call.
#[derive(Clone, Copy, Debug)]
pub struct OutputGradients<'a, T> {
    /// Gradient of `o`, `[B, T, HV, V]`.
    pub o: &'a [T],
    /// Gradient of the final state, in its layout; absent means 0.
    pub final_state: Option<&'a [T]>,
}

impl<T> OutputGradients<'_, T> {
    /// Checks both against the problem.
    pub(crate) fn validate(&self, problem: &Problem) -> Result<()> {
        check_len(problem, Ident::O, "gradient of o", self.o.len())?;
        match self.final_state {
            Some(d) => check_len(problem, Ident::FinalState, "gradient of final_state", d.len()),
            None => Ok(()),
        }
    }
}

/// The gradients of a call's inputs, each in the shape of its input.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradients<T> {
    /// Gradient of q.
    pub q: Vec<T>,
    /// Gradient of k.
    pub k: Vec<T>,
    /// Gradient of v.
    pub v: Vec<T>,
    /// Gradient of beta (of its logit, if [`Options::beta`] says so).
    pub beta: Vec<T>,
    /// Gradient of g (of the formula's input, if [`Options::gate`] is one); present when the rule decays.
    pub g: Option<Vec<T>>,
    /// Gradient of `a_log`, present when it was given.
    pub a_log: Option<Vec<T>>,
    /// Gradient of `dt_bias`, present when it was given.
    pub dt_bias: Option<Vec<T>>,
    /// Gradient of the initial state, whether or not one was given.
    pub initial_state: Vec<T>,
}
