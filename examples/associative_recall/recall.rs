//! The memory task: key-value pairs to write, and what reading back should give.

use delta_rule::{Decay, Output, Problem, Result, Rule, Shape};

use crate::rng::Rng;
use crate::tensors::Tensors;

/// Signs in a value.
pub(crate) const VALUE_DIM: usize = 32;

/// How the pairs are written.
#[derive(Clone, Copy)]
pub(crate) struct Schedule {
    /// How often each pair is shown, in a new order each time.
    pub(crate) showings: usize,
    /// Values that each key holds in turn; only the last one counts.
    pub(crate) generations: usize,
}

/// One memory to fill; each is a head of the call.
struct Trial {
    keys: Vec<Vec<f32>>,
    /// `[generation][pair]`
    values: Vec<Vec<Vec<f32>>>,
    /// Generation and pair of every write, in order.
    writes: Vec<(usize, usize)>,
}

/// Independent trials of equal size.
pub(crate) struct Task {
    key_dim: usize,
    pairs: usize,
    trials: Vec<Trial>,
}

impl Task {
    pub(crate) fn new(rng: &mut Rng, heads: usize, key_dim: usize, load: f64, schedule: Schedule) -> Self {
        let pairs = ((load * key_dim as f64).round() as usize).max(1);
        let trial = |rng: &mut Rng| Trial {
            keys: (0..pairs).map(|_| rng.unit(key_dim)).collect(),
            values: (0..schedule.generations)
                .map(|_| (0..pairs).map(|_| rng.signs(VALUE_DIM)).collect())
                .collect(),
            writes: (0..schedule.generations * schedule.showings)
                .flat_map(|round| {
                    rng.permutation(pairs).into_iter().map(move |pair| (round / schedule.showings, pair))
                })
                .collect(),
        };
        Self { key_dim, pairs, trials: (0..heads).map(|_| trial(rng)).collect() }
    }

    /// Tokens that write, `rule.micro_steps` pairs each.
    fn writing_tokens(&self, rule: Rule) -> usize {
        self.trials[0].writes.len().div_ceil(rule.micro_steps)
    }

    /// The call that writes every pair and then reads every key once.
    pub(crate) fn call(&self, rule: Rule) -> Result<(Problem, Tensors<f32>)> {
        let heads = self.trials.len();
        let writing = self.writing_tokens(rule);
        let tokens = writing + self.pairs;
        let (key_dim, value_dim) = (self.key_dim, VALUE_DIM);
        let shape = Shape { batch: 1, tokens, heads, value_heads: heads, key_dim, value_dim };
        let steps = tokens * rule.micro_steps;
        let mut tensors = Tensors {
            q: vec![0.0; tokens * heads * key_dim],
            k: vec![0.0; steps * heads * key_dim],
            v: vec![0.0; steps * heads * value_dim],
            beta: vec![0.0; steps * heads],
            g: gates(rule, tokens, writing, heads, key_dim),
            initial_state: None,
        };
        for (head, trial) in self.trials.iter().enumerate() {
            for (step, &(generation, pair)) in trial.writes.iter().enumerate() {
                let row = step * heads + head;
                tensors.k[row * key_dim..][..key_dim].copy_from_slice(&trial.keys[pair]);
                tensors.v[row * value_dim..][..value_dim].copy_from_slice(&trial.values[generation][pair]);
                tensors.beta[row] = 1.0;
            }
            for (pair, key) in trial.keys.iter().enumerate() {
                let row = (writing + pair) * heads + head;
                tensors.q[row * key_dim..][..key_dim].copy_from_slice(key);
            }
        }
        Ok((Problem::new(rule, shape)?, tensors))
    }

    /// The fraction of keys that gave back every sign of their latest value.
    pub(crate) fn recalled(&self, rule: Rule, output: &Output<f32>) -> f64 {
        let heads = self.trials.len();
        let first = self.writing_tokens(rule);
        self.fraction(|head, pair| &output.o[((first + pair) * heads + head) * VALUE_DIM..][..VALUE_DIM])
    }

    /// The same for plain linear attention, `S <- S + k v^T`, which no engine here computes.
    pub(crate) fn recalled_by_linear_attention(&self) -> f64 {
        let outputs: Vec<Vec<f32>> = self.trials.iter().map(Trial::linear_attention).collect();
        self.fraction(|head, pair| &outputs[head][pair * VALUE_DIM..][..VALUE_DIM])
    }

    fn fraction<'a>(&'a self, read: impl Fn(usize, usize) -> &'a [f32]) -> f64 {
        let mut recalled = 0;
        for (head, trial) in self.trials.iter().enumerate() {
            let latest = &trial.values[trial.values.len() - 1];
            for (pair, value) in latest.iter().enumerate() {
                recalled += usize::from(read(head, pair).iter().zip(value).all(|(o, v)| o * v > 0.0));
            }
        }
        recalled as f64 / (self.trials.len() * self.pairs) as f64
    }
}

impl Trial {
    fn linear_attention(&self) -> Vec<f32> {
        let mut state = vec![[0.0; VALUE_DIM]; self.keys[0].len()];
        for &(generation, pair) in &self.writes {
            let value = &self.values[generation][pair];
            for (row, k) in state.iter_mut().zip(&self.keys[pair]) {
                row.iter_mut().zip(value).for_each(|(s, v)| *s += k * v);
            }
        }
        let read = |key: &Vec<f32>| {
            let mut o = [0.0; VALUE_DIM];
            for (row, q) in state.iter().zip(key) {
                o.iter_mut().zip(row).for_each(|(o, s)| *o += q * s);
            }
            o
        };
        self.keys.iter().flat_map(read).collect()
    }
}

/// A mild gate while writing and none while reading: 0.1 % per token, or 0 to 0.2 % over KDA's channels.
fn gates(rule: Rule, tokens: usize, writing: usize, heads: usize, key_dim: usize) -> Option<Vec<f32>> {
    let per_head: Vec<f32> = match rule.decay {
        Decay::None => return None,
        Decay::Head => vec![-1e-3],
        Decay::Channel => (0..key_dim).map(|channel| -2e-3 * channel as f32 / key_dim as f32).collect(),
    };
    let mut g = per_head.repeat(heads * writing);
    g.resize(per_head.len() * heads * tokens, 0.0);
    Some(g)
}
