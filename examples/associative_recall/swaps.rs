//! What beta up to 2 is for: swapping, which no beta up to 1 can do.

use delta_rule::{Output, Problem, Result, Rule, Shape};

use crate::rng::Rng;
use crate::tensors::Tensors;

/// Cups on the table; cup `a` stands at key `e_a`.
pub(crate) const CUPS: usize = 16;
/// Tokens of two swaps each.
pub(crate) const TOKENS: usize = 512;
/// Two swaps per token.
pub(crate) const RULE: Rule = Rule::delta_product(2);

/// Random swaps for every head, and where the balls are at the end.
pub(crate) struct Swaps {
    pairs: Vec<Vec<(usize, usize)>>,
    balls: Vec<Vec<usize>>,
}

impl Swaps {
    pub(crate) fn new(rng: &mut Rng, heads: usize) -> Self {
        let (mut pairs, mut balls) = (Vec::new(), Vec::new());
        for _ in 0..heads {
            let mut ball: Vec<usize> = (0..CUPS).collect();
            let swaps = (0..TOKENS * RULE.micro_steps).map(|_| {
                let a = rng.below(CUPS);
                (a, (a + 1 + rng.below(CUPS - 1)) % CUPS)
            });
            let swaps: Vec<_> = swaps.collect();
            swaps.iter().for_each(|&(a, b)| ball.swap(a, b));
            pairs.push(swaps);
            balls.push(ball);
        }
        Self { pairs, balls }
    }

    /// With `k = (e_a - e_b) / sqrt(2)`, `v = 0` and beta 2 a step is `S <- (I - 2 k k^T) S`: rows a and b swap.
    pub(crate) fn call(&self, beta: f32) -> Result<(Problem, Tensors<f32>)> {
        let heads = self.pairs.len();
        let tokens = TOKENS + CUPS;
        let shape = Shape { batch: 1, tokens, heads, value_heads: heads, key_dim: CUPS, value_dim: CUPS };
        let steps = tokens * RULE.micro_steps;
        let mut tensors = Tensors {
            q: vec![0.0; tokens * heads * CUPS],
            k: vec![0.0; steps * heads * CUPS],
            v: vec![0.0; steps * heads * CUPS],
            beta: vec![0.0; steps * heads],
            g: None,
            initial_state: None,
        };
        let mut identity = vec![0.0; CUPS * CUPS];
        (0..CUPS).for_each(|cup| identity[cup * CUPS + cup] = 1.0);
        tensors.initial_state = Some(identity.repeat(heads));
        for (head, swaps) in self.pairs.iter().enumerate() {
            for (step, &(a, b)) in swaps.iter().enumerate() {
                let row = step * heads + head;
                tensors.k[row * CUPS + a] = std::f32::consts::FRAC_1_SQRT_2;
                tensors.k[row * CUPS + b] = -std::f32::consts::FRAC_1_SQRT_2;
                tensors.beta[row] = beta;
            }
            for cup in 0..CUPS {
                tensors.q[((TOKENS + cup) * heads + head) * CUPS + cup] = 1.0;
            }
        }
        Ok((Problem::new(RULE, shape)?, tensors))
    }

    /// The fraction of cups whose strongest reading names the right ball.
    pub(crate) fn tracked(&self, output: &Output<f32>) -> f64 {
        let heads = self.pairs.len();
        let mut right = 0;
        for (head, balls) in self.balls.iter().enumerate() {
            for (cup, &ball) in balls.iter().enumerate() {
                let read = &output.o[((TOKENS + cup) * heads + head) * CUPS..][..CUPS];
                right += usize::from(read.iter().enumerate().all(|(b, x)| b == ball || *x < read[ball]));
            }
        }
        right as f64 / (heads * CUPS) as f64
    }
}
