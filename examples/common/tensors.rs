//! The input tensors of a call, owned.

use delta_rule::{Inputs, Real};

/// What [`Inputs`] borrows from.
#[derive(Debug)]
pub(crate) struct Tensors<T> {
    pub(crate) q: Vec<T>,
    pub(crate) k: Vec<T>,
    pub(crate) v: Vec<T>,
    pub(crate) beta: Vec<T>,
    pub(crate) g: Option<Vec<T>>,
    pub(crate) initial_state: Option<Vec<T>>,
}

impl<T: Real> Tensors<T> {
    /// The tensors as an engine takes them.
    pub(crate) fn inputs(&self) -> Inputs<'_, T> {
        Inputs {
            g: self.g.as_deref(),
            initial_state: self.initial_state.as_deref(),
            ..Inputs::new(&self.q, &self.k, &self.v, &self.beta)
        }
    }

    /// The same numbers in another type.
    pub(crate) fn cast<U: Real>(&self) -> Tensors<U>
    where
        T: Into<f64>,
    {
        let cast = |values: &Vec<T>| values.iter().map(|&x| U::of(x.into())).collect();
        Tensors {
            q: cast(&self.q),
            k: cast(&self.k),
            v: cast(&self.v),
            beta: cast(&self.beta),
            g: self.g.as_ref().map(cast),
            initial_state: self.initial_state.as_ref().map(cast),
        }
    }
}
