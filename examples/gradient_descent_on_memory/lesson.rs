//! Two models that differ in one knob, the task for which it is there, and what theory says about both.

use std::ops::Range;

use delta_rule::transform::{l2_norm, sigmoid, softplus};
use delta_rule::{BetaTransform, Rule};

use crate::claims::Claim;
use crate::model::{KEY_DIM, Model};
use crate::parameters::{Parameters, row};
use crate::plot::plot;
use crate::task::{KEYS, NOISE, ONE, PARITY, QUERY, RECALL, RESET, VALUES, WRITE, ZERO, code};

pub(crate) struct Lesson {
    title: &'static str,
    text: &'static str,
    pub(crate) solves: Model,
    /// Its held-out loss must fall below this.
    below: f64,
    pub(crate) fails: Model,
    /// Its held-out loss must stay in here: worse than solved, but better than untrained.
    stays: Range<f64>,
    /// What the first model should have found.
    quantities: fn(&Parameters) -> Vec<Quantity>,
}

/// What came of a model.
pub(crate) struct Trained {
    pub(crate) parameters: Parameters,
    /// Of every step, before its update, so on episodes that were never seen.
    pub(crate) losses: Vec<f64>,
    pub(crate) held_out: f64,
    /// The fraction of held-out answers that are right.
    pub(crate) right: f64,
}

/// Something learnt that theory knows.
struct Quantity {
    name: &'static str,
    expected: f32,
    learnt: f32,
}

/// The largest distance from theory.
const TOLERANCE: f32 = 0.1;

/// What the gate is for.
pub(crate) const FORGETTING: Lesson = Lesson {
    title: "Recall with resets",
    text: "Writes, noise that looks like writes, resets and queries under 12 keys. A query is answered with what\n\
           was last written under its key, or with zeros if nothing was since the last reset. The gate can empty\n\
           the state with one token; without it one token clears one key.",
    solves: Model {
        name: "Gated DeltaNet",
        task: &RECALL,
        rule: Rule::gated_deltanet(),
        beta: BetaTransform::Sigmoid,
    },
    below: 0.01,
    fails: Model { name: "DeltaNet", task: &RECALL, rule: Rule::deltanet(), beta: BetaTransform::Sigmoid },
    stays: 0.3..0.7,
    quantities: |p| {
        let beta = |kind| sigmoid(p.beta[kind]);
        let decay = |kind: usize| (-p.a_log[0].exp() * softplus(p.g[kind] + p.dt_bias[0])).exp();
        let (own, other) = readings(p);
        vec![
            Quantity { name: "beta of a write", expected: 1.0, learnt: beta(WRITE) },
            Quantity { name: "beta of noise", expected: 0.0, learnt: beta(NOISE) },
            Quantity { name: "beta of a query", expected: 0.0, learnt: beta(QUERY) },
            Quantity { name: "decay at a write", expected: 1.0, learnt: decay(WRITE) },
            Quantity { name: "decay at noise", expected: 1.0, learnt: decay(NOISE) },
            Quantity { name: "decay at a query", expected: 1.0, learnt: decay(QUERY) },
            Quantity { name: "decay at a reset", expected: 0.0, learnt: decay(RESET) },
            Quantity { name: "own key's value, least", expected: 1.0, learnt: own },
            Quantity { name: "another key's, most", expected: 0.0, learnt: other },
        ]
    },
};

/// What beta up to 2 is for.
pub(crate) const TRACKING: Lesson = Lesson {
    title: "Parity",
    text: "At every bit: were the ones so far even or odd? A one has to flip the sign of the state, and so needs\n\
           the eigenvalue 1 - beta = -1. With beta up to 1 it can only erase, and all that the state knows is\n\
           whether there was a one at all.",
    solves: Model {
        name: "beta = 2 sigmoid",
        task: &PARITY,
        rule: Rule::deltanet(),
        beta: BetaTransform::TwoSigmoid,
    },
    below: 0.02,
    fails: Model {
        name: "beta = sigmoid",
        task: &PARITY,
        rule: Rule::deltanet(),
        beta: BetaTransform::Sigmoid,
    },
    // To know that there was no one yet is worth 2 answers of 64: the start, and one bit on average.
    stays: 0.9..1.0,
    quantities: |p| {
        let eigenvalue = |kind: usize| 1.0 - 2.0 * sigmoid(p.beta[kind]);
        vec![
            Quantity { name: "eigenvalue of a zero", expected: 1.0, learnt: eigenvalue(ZERO) },
            Quantity { name: "eigenvalue of a one", expected: -1.0, learnt: eigenvalue(ONE) },
        ]
    },
};

impl Lesson {
    pub(crate) fn introduction(&self) -> String {
        format!("\n{}\n\n{}\n\n", self.title, self.text)
    }

    pub(crate) fn report(&self, solves: &Trained, fails: &Trained) -> String {
        let mut text = plot(&solves.losses, &fails.losses);
        text += &format!("\n  {:<28}{:>14}{:>10}{:>9}\n", "held out", "bound", "loss", "right");
        let bounds = [format!("below {}", self.below), format!("{:?}", self.stays)];
        let models = [("●", &self.solves, solves), ("○", &self.fails, fails)];
        for ((mark, model, trained), bound) in models.into_iter().zip(bounds) {
            let (loss, right) = (trained.held_out, trained.right * 100.0);
            text += &format!("  {mark} {:<26}{bound:>14}{loss:>10.4}{right:>8.1}%\n", model.name);
        }
        text += &format!("\n  {:<28}{:>14}{:>10}\n", format!("● {}", self.solves.name), "expected", "learnt");
        for Quantity { name, expected, learnt } in (self.quantities)(&solves.parameters) {
            text += &format!("    {name:<26}{expected:>14}{learnt:>10.3}\n");
        }
        text
    }

    pub(crate) fn claims(&self, solves: &Trained, fails: &Trained) -> [Claim; 3] {
        let (title, below, Range { start, end }) = (self.title, self.below, &self.stays);
        let distance = |quantity: &Quantity| (quantity.learnt - quantity.expected).abs();
        let distances: Vec<f32> = (self.quantities)(&solves.parameters).iter().map(distance).collect();
        let claim = |what: &str, loss: f64, held| Claim {
            text: format!("{title}: the held-out loss of {what} ({loss:.4})"),
            held,
        };
        let name = self.solves.name;
        [
            claim(&format!("{name} is below {below}"), solves.held_out, solves.held_out < below),
            claim(
                &format!("{} stays between {start} and {end}", self.fails.name),
                fails.held_out,
                self.stays.contains(&fails.held_out),
            ),
            Claim {
                text: format!(
                    "{title}: what {name} learnt is within {TOLERANCE} of what is expected (worst {:.3})",
                    distances.iter().copied().fold(0.0, f32::max)
                ),
                held: distances.iter().all(|&distance| distance < TOLERANCE),
            },
        ]
    }
}

/// How much of a value its own key reads, and how much another key does: the least and the most over all keys and
/// values. Only this product of q, k and v is known: q and v may both change their sign, or v make up for a q that
/// is not quite parallel to k.
fn readings(p: &Parameters) -> (f32, f32) {
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f32>();
    let (q, k) = (l2_norm(&p.q, KEY_DIM), l2_norm(&p.k, KEY_DIM));
    let (mut own, mut other) = (f32::INFINITY, 0.0f32);
    for (reader, writer) in (0..KEYS * KEYS).map(|pair| (pair / KEYS, pair % KEYS)) {
        let overlap = dot(row(&q, reader, KEY_DIM), row(&k, writer, KEY_DIM));
        for value in 0..VALUES {
            let reading = overlap * dot(row(&p.v, value, VALUES), &code(value)) / VALUES as f32;
            match reader == writer {
                true => own = own.min(reading),
                false => other = other.max(reading.abs()),
            }
        }
    }
    (own, other)
}
