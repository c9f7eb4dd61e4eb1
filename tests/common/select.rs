use delta_rule::{Ident, Problem};

use super::Tensors;

/// A dimension that the tensors of a call share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Axis {
    /// Rows of the batch, with their states. Not for packed problems.
    Batch,
    /// Tokens, each with its micro-steps. The states stay as they are.
    Tokens,
    /// Heads; for problems with as many value heads as heads.
    Heads,
}

impl Axis {
    fn dimension(self, ident: Ident) -> Option<usize> {
        let state = matches!(ident, Ident::InitialState | Ident::FinalState);
        let parameter = matches!(ident, Ident::ALog | Ident::DtBias);
        match self {
            Axis::Batch => (!parameter).then_some(0),
            Axis::Tokens => (!parameter && !state).then_some(1),
            Axis::Heads if parameter => Some(0),
            Axis::Heads => Some(if state { 1 } else { 2 }),
        }
    }
}

/// One tensor with only the entries `picked` along an axis, in that order.
pub(crate) fn select<T: Clone>(
    problem: &Problem,
    ident: Ident,
    x: &[T],
    axis: Axis,
    picked: &[usize],
) -> Vec<T> {
    let Some(dimension) = axis.dimension(ident) else { return x.to_vec() };
    let shape = problem.shape_of(ident);
    let stepped = axis == Axis::Tokens && matches!(ident, Ident::K | Ident::V | Ident::Beta);
    // The micro-steps of a token lie together: one entry of the axis is a block of them.
    let steps = if stepped { problem.rule().micro_steps } else { 1 };
    let inner = shape[dimension + 1..].iter().product::<usize>() * steps;
    let entries = shape[dimension] / steps;
    let outer = shape[..dimension].iter().product::<usize>();
    let mut out = Vec::with_capacity(outer * picked.len() * inner);
    for o in 0..outer {
        for &p in picked {
            assert!(p < entries, "entry {p} of {entries}");
            let start = (o * entries + p) * inner;
            out.extend_from_slice(&x[start..start + inner]);
        }
    }
    out
}

impl<T: Clone> Tensors<T> {
    /// All tensors with only the entries `picked` along an axis, in that order.
    pub(crate) fn select(&self, problem: &Problem, axis: Axis, picked: &[usize]) -> Self {
        self.map_each(|ident, x| select(problem, ident, x, axis, picked))
    }
}
