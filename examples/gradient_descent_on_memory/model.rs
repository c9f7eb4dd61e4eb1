//! A task and the rule that is to learn it, as the crate wants to hear it.

use delta_rule::{BetaTransform, Decay, GateTransform, Options, Problem, Result, Rule, Shape};

use crate::task::{Batch, Task};

/// K: more than there are keys, so that they can be orthogonal.
pub(crate) const KEY_DIM: usize = 16;

pub(crate) struct Model {
    pub(crate) name: &'static str,
    pub(crate) task: &'static Task,
    pub(crate) rule: Rule,
    pub(crate) beta: BetaTransform,
}

impl Model {
    /// Norms, beta's sigmoid and the gate's formula are left to the crate, forward and backward.
    pub(crate) fn options(&self) -> Options {
        let options = Options::new().with_scale(1.0).with_qk_l2norm(true).with_beta(self.beta);
        match self.rule.decay {
            Decay::None => options,
            _ => options.with_gate(GateTransform::Softplus),
        }
    }

    pub(crate) fn problem(&self, batch: &Batch) -> Result<Problem> {
        let shape = Shape {
            batch: batch.episodes,
            tokens: batch.length,
            heads: 1,
            value_heads: 1,
            key_dim: KEY_DIM,
            value_dim: self.task.value_dim,
        };
        Problem::new(self.rule, shape)
    }
}
