//! What is learnt, how it becomes the inputs of a call, and how the inputs' gradients come back to it.

use delta_rule::{Decay, Gradients, Inputs, Rule};

use crate::model::KEY_DIM;
use crate::rng::Rng;
use crate::task::{Batch, Task};
use crate::tensors::Tensors;

/// Everything that is learnt, shared by all tokens and episodes; also its gradient, and Adam's moments.
#[derive(Clone)]
pub(crate) struct Parameters {
    /// `[keys, K]`
    pub(crate) q: Vec<f32>,
    /// `[keys, K]`
    pub(crate) k: Vec<f32>,
    /// `[values, V]`
    pub(crate) v: Vec<f32>,
    /// `[kinds]`, logits
    pub(crate) beta: Vec<f32>,
    /// `[kinds]`, arguments of the gate formula; empty, like the next two, if the rule has no gate
    pub(crate) g: Vec<f32>,
    /// `[HV]`, and there is one head
    pub(crate) a_log: Vec<f32>,
    /// `[HV]`
    pub(crate) dt_bias: Vec<f32>,
    /// `[HV, K, V]`, the same for every episode
    pub(crate) initial_state: Vec<f32>,
}

impl Parameters {
    /// Random embeddings; every kind of token writes with half strength and forgets 5 %.
    pub(crate) fn random(rng: &mut Rng, task: &Task, rule: Rule) -> Self {
        let mut normal = |n: usize, deviation: f64| {
            (0..n).map(|_| (deviation * rng.normal()) as f32).collect::<Vec<f32>>()
        };
        let (kinds, gates) = (task.kinds.len(), usize::from(rule.decay == Decay::Head));
        Self {
            q: normal(task.keys * KEY_DIM, 1.0),
            k: normal(task.keys * KEY_DIM, 1.0),
            v: normal(task.values * task.value_dim, 1.0),
            beta: vec![0.0; kinds],
            g: vec![0.0; gates * kinds],
            a_log: vec![0.0; gates],
            dt_bias: vec![-3.0; gates],
            initial_state: normal(KEY_DIM * task.value_dim, 0.1),
        }
    }

    /// Looks every token up. `a_log` and `dt_bias` need no look-up: they go into the call as they are.
    pub(crate) fn gather(&self, batch: &Batch) -> Tensors<f32> {
        let (mut q, mut k, mut v, mut beta, mut g) = (vec![], vec![], vec![], vec![], vec![]);
        let value_dim = self.initial_state.len() / KEY_DIM;
        for token in &batch.tokens {
            q.extend_from_slice(row(&self.q, token.key, KEY_DIM));
            k.extend_from_slice(row(&self.k, token.key, KEY_DIM));
            v.extend_from_slice(row(&self.v, token.value, value_dim));
            beta.push(self.beta[token.kind]);
            g.extend(self.g.get(token.kind));
        }
        let initial_state = Some(self.initial_state.repeat(batch.episodes));
        Tensors { q, k, v, beta, g: given(&self.g).map(|_| g), initial_state }
    }

    /// The inputs of the call.
    pub(crate) fn inputs<'a>(&'a self, tensors: &'a Tensors<f32>) -> Inputs<'a, f32> {
        Inputs { a_log: given(&self.a_log), dt_bias: given(&self.dt_bias), ..tensors.inputs() }
    }

    /// The adjoint of [`gather`](Self::gather): a parameter's gradient is the sum over all its uses.
    pub(crate) fn scatter(&self, batch: &Batch, gradients: Gradients<f32>) -> Self {
        let mut sum = self.zeros();
        let value_dim = self.initial_state.len() / KEY_DIM;
        for (t, token) in batch.tokens.iter().enumerate() {
            add(&mut sum.q, token.key, row(&gradients.q, t, KEY_DIM));
            add(&mut sum.k, token.key, row(&gradients.k, t, KEY_DIM));
            add(&mut sum.v, token.value, row(&gradients.v, t, value_dim));
            add(&mut sum.beta, token.kind, &gradients.beta[t..=t]);
            if let Some(g) = &gradients.g {
                add(&mut sum.g, token.kind, &g[t..=t]);
            }
        }
        for state in gradients.initial_state.chunks_exact(self.initial_state.len()) {
            add(&mut sum.initial_state, 0, state);
        }
        sum.a_log = gradients.a_log.unwrap_or_default();
        sum.dt_bias = gradients.dt_bias.unwrap_or_default();
        sum
    }

    pub(crate) fn zeros(&self) -> Self {
        let mut zeros = self.clone();
        zeros.tensors_mut().into_iter().for_each(|tensor| tensor.fill(0.0));
        zeros
    }

    pub(crate) fn tensors_mut(&mut self) -> [&mut [f32]; 8] {
        let Self { q, k, v, beta, g, a_log, dt_bias, initial_state } = self;
        [q, k, v, beta, g, a_log, dt_bias, initial_state]
    }
}

pub(crate) fn row(table: &[f32], index: usize, width: usize) -> &[f32] {
    &table[index * width..][..width]
}

fn add(table: &mut [f32], index: usize, x: &[f32]) {
    table[index * x.len()..].iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
}

fn given(tensor: &[f32]) -> Option<&[f32]> {
    (!tensor.is_empty()).then_some(tensor)
}
