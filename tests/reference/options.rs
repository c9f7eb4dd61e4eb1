//! Options and grouped heads, against plain calls on tensors that were prepared by hand.

use delta_rule::reference::{backward, forward};
use delta_rule::{BetaTransform, Decay, GateTransform, Ident, Options, Rule, StateLayout};

use crate::common::{Axis, Generator, RULES, Tensors, assert_close, problem, select};

fn normalised(x: &[f64], dim: usize) -> Vec<f64> {
    let row = |row: &[f64]| {
        let norm = (row.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt();
        row.iter().map(|x| x / norm).collect::<Vec<_>>()
    };
    x.chunks_exact(dim).flat_map(row).collect()
}

#[test]
fn fused_options_are_their_formulas() {
    let logistic = |x: f64| 1.0 / (1.0 + (-x).exp());
    let gates = [GateTransform::Softplus, GateTransform::Bounded { lower_bound: -5.0 }];
    for decay in [Decay::Head, Decay::Channel] {
        for (gate, factor) in gates.into_iter().zip([1.0, 2.0]) {
            let p = problem(Rule { decay, micro_steps: 2 }, [2, 5, 1, 2, 3, 4]);
            let beta = if factor == 1.0 { BetaTransform::Sigmoid } else { BetaTransform::TwoSigmoid };
            let fused = Options::new().with_qk_l2norm(true).with_beta(beta).with_gate(gate);
            let mut tensors = Generator::new(1).tensors(&p, &fused);
            // Small keys, so that the constant under the root counts.
            tensors.k.iter_mut().for_each(|k| *k *= 1e-3);
            let got = forward(&p, &fused, &tensors.inputs()).unwrap();

            let (a_log, dt_bias) = (tensors.a_log.take().unwrap(), tensors.dt_bias.take().unwrap());
            let cells = dt_bias.len();
            let g = |(i, a): (usize, &f64)| {
                let (a_log, x) = (a_log[i % cells * 2 / cells], a + dt_bias[i % cells]);
                match gate {
                    GateTransform::Bounded { lower_bound } => lower_bound * logistic(a_log.exp() * x),
                    _ => -a_log.exp() * (1.0 + x.exp()).ln(),
                }
            };
            let plain = Tensors {
                q: normalised(&tensors.q, 3),
                k: normalised(&tensors.k, 3),
                beta: tensors.beta.iter().map(|&b| factor * logistic(b)).collect(),
                g: tensors.g.as_ref().map(|a| a.iter().enumerate().map(g).collect()),
                ..tensors
            };
            let want = forward(&p, &Options::new(), &plain.inputs()).unwrap();
            assert_close("o", &got.o, &want.o, 1e-13);
            assert_close("state", &got.final_state, &want.final_state, 1e-13);
        }
    }
}

#[test]
fn value_first_states_are_transposed() {
    let (key_dim, value_dim) = (3, 4);
    let transposed = |x: &[f64], rows: usize, columns: usize| -> Vec<f64> {
        let one = |s: &[f64]| {
            let mut out = vec![0.0; s.len()];
            (0..s.len()).for_each(|i| out[i % columns * rows + i / columns] = s[i]);
            out
        };
        x.chunks_exact(rows * columns).flat_map(one).collect()
    };
    for rule in RULES {
        let p = problem(rule, [2, 3, 1, 2, key_dim, value_dim]);
        let value_first = Options::new().with_state_layout(StateLayout::ValueFirst);
        let tensors = Generator::new(1).tensors(&p, &Options::new());
        let mut turned = tensors.clone();
        for state in [&mut turned.initial_state, &mut turned.d_final_state].into_iter().flatten() {
            *state = transposed(state, key_dim, value_dim);
        }
        let mut got = forward(&p, &value_first, &turned.inputs()).unwrap();
        got.final_state = transposed(&got.final_state, value_dim, key_dim);
        assert_eq!(got, forward(&p, &Options::new(), &tensors.inputs()).unwrap());

        let mut got = backward(&p, &value_first, &turned.inputs(), &turned.output_gradients()).unwrap();
        got.initial_state = transposed(&got.initial_state, value_dim, key_dim);
        assert_eq!(
            got,
            backward(&p, &Options::new(), &tensors.inputs(), &tensors.output_gradients()).unwrap()
        );
    }
}

#[test]
fn grouped_heads_share_neighbouring_key_heads() {
    for rule in RULES {
        let grouped = problem(rule, [2, 5, 2, 4, 3, 2]);
        let spread = problem(rule, [2, 5, 4, 4, 3, 2]);
        let tensors = Generator::new(1).tensors(&grouped, &Options::new());
        let repeat = |ident, x: &[f64]| select(&grouped, ident, x, Axis::Heads, &[0, 0, 1, 1]);
        let wide =
            Tensors { q: repeat(Ident::Q, &tensors.q), k: repeat(Ident::K, &tensors.k), ..tensors.clone() };
        let got = forward(&grouped, &Options::new(), &tensors.inputs()).unwrap();
        assert_eq!(got, forward(&spread, &Options::new(), &wide.inputs()).unwrap());

        let options = Options::new();
        let got = backward(&grouped, &options, &tensors.inputs(), &tensors.output_gradients()).unwrap();
        let want = backward(&spread, &options, &wide.inputs(), &wide.output_gradients()).unwrap();
        for (ident, got, want) in [(Ident::Q, &got.q, &want.q), (Ident::K, &got.k, &want.k)] {
            let [even, odd] = [[0, 2], [1, 3]].map(|heads| select(&spread, ident, want, Axis::Heads, &heads));
            let sum = even.iter().zip(&odd).map(|(a, b)| a + b).collect::<Vec<_>>();
            assert_close(ident.name(), got, &sum, 1e-14);
        }
        assert_eq!((got.v, got.beta, got.g), (want.v, want.beta, want.g));
    }
}

#[test]
fn the_default_scale_is_the_root_of_k() {
    let p = problem(Rule::kda(), [1, 4, 1, 1, 9, 2]);
    let tensors = Generator::new(1).tensors(&p, &Options::new());
    let default = forward(&p, &Options::new(), &tensors.inputs()).unwrap();
    let explicit = forward(&p, &Options::new().with_scale(1.0), &tensors.inputs()).unwrap();
    let third = explicit.o.iter().map(|o| o / 3.0).collect::<Vec<_>>();
    assert_close("o", &default.o, &third, 1e-14);
    assert_eq!(default.final_state, explicit.final_state);
}
