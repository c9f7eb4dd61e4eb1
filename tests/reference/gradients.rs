use delta_rule::reference::{backward, forward};
use delta_rule::transform::{sigmoid, softplus};
use delta_rule::{BetaTransform, Decay, GateTransform, Options, Problem, Rule, StateLayout};

use crate::common::{Generator, RULES, Tensors, assert_close, gradients_by_name, problem};

/// The scalar whose gradients `backward` returns.
fn loss(problem: &Problem, options: &Options, tensors: &Tensors<f64>) -> f64 {
    let output = forward(problem, options, &tensors.inputs()).unwrap();
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let state = tensors.d_final_state.as_ref().map_or(0.0, |d| dot(&output.final_state, d));
    dot(&output.o, &tensors.d_o) + state
}

/// Central differences of fourth order: truncation and rounding both stay near 1e-12.
fn slope(at: impl Fn(f64) -> f64) -> f64 {
    let h = 1e-3;
    (8.0 * (at(h) - at(-h)) - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * h)
}

fn check(problem: &Problem, options: &Options, tensors: &Tensors<f64>) {
    let gradients = backward(problem, options, &tensors.inputs(), &tensors.output_gradients()).unwrap();
    let mut names = tensors.clone();
    let names: Vec<_> = names.inputs_mut().iter().map(|(name, x)| (*name, x.len())).collect();
    for (name, got) in gradients_by_name(&gradients) {
        // A state that was not given is 0, and has a gradient all the same.
        let Some(which) = names.iter().position(|(n, _)| *n == name) else {
            assert_eq!(name, "initial_state");
            continue;
        };
        let want = |i: usize| {
            slope(|h| {
                let mut moved = tensors.clone();
                moved.inputs_mut()[which].1[i] += h;
                loss(problem, options, &moved)
            })
        };
        let want: Vec<_> = (0..names[which].1).map(want).collect();
        let what = format!("{:?} {options:?}: {name}", problem.rule());
        assert_close(&what, got, &want, 1e-8);
    }
    for (name, len) in names {
        let found = gradients_by_name(&gradients).iter().any(|(n, d)| *n == name && d.len() == len);
        assert!(found, "no gradient for {name}");
    }
}

fn fused(rule: Rule) -> Vec<Options> {
    let plain = Options::new().with_qk_l2norm(true);
    let gates: &[_] = match rule.decay {
        Decay::None => &[GateTransform::Identity],
        _ => &[GateTransform::Softplus, GateTransform::Bounded { lower_bound: -5.0 }],
    };
    let betas = [BetaTransform::Sigmoid, BetaTransform::TwoSigmoid];
    let options = gates.iter().zip(betas.into_iter().cycle());
    options.map(|(&gate, beta)| plain.clone().with_gate(gate).with_beta(beta)).collect()
}

#[test]
fn every_rule_with_grouped_heads() {
    for rule in RULES {
        let problem = problem(rule, [2, 4, 2, 4, 3, 2]);
        check(&problem, &Options::new(), &Generator::new(1).beta_max(2.0).tensors(&problem, &Options::new()));
    }
}

#[test]
fn every_rule_with_fused_options() {
    for rule in RULES {
        for options in fused(rule) {
            let problem = problem(rule, [1, 4, 1, 2, 3, 4]);
            check(&problem, &options, &Generator::new(2).tensors(&problem, &options));
        }
    }
}

#[test]
fn every_rule_packed_with_an_empty_sequence() {
    for rule in RULES {
        let problem = problem(rule, [1, 6, 1, 2, 2, 3]).with_cu_seqlens(&[0, 2, 2, 5, 6]).unwrap();
        let options = Options::new().with_state_layout(StateLayout::ValueFirst).with_scale(0.7);
        check(&problem, &options, &Generator::new(3).tensors(&problem, &options));
    }
}

#[test]
fn without_states_or_bias() {
    for rule in RULES {
        let problem = problem(rule, [1, 3, 1, 1, 2, 2]);
        let options = fused(rule).remove(0);
        let mut tensors = Generator::new(4).tensors(&problem, &options);
        (tensors.initial_state, tensors.d_final_state, tensors.dt_bias) = (None, None, None);
        check(&problem, &options, &tensors);
    }
}

/// More tokens than lie between two checkpoints, where elementwise differences would take too long:
/// the derivative along one random direction must be the gradient's component along it.
#[test]
fn dot_product_test_over_checkpoints() {
    for (rule, tokens) in RULES.into_iter().flat_map(|rule| [1, 63, 64, 65, 128, 150].map(|t| (rule, t))) {
        for options in fused(rule) {
            let problem = problem(rule, [1, tokens, 1, 2, 4, 3]);
            let tensors = Generator::new(5).tensors(&problem, &options);
            let mut direction = Generator::new(6).tensors(&problem, &options);
            let gradients =
                backward(&problem, &options, &tensors.inputs(), &tensors.output_gradients()).unwrap();
            let along = direction.inputs_mut().into_iter().zip(gradients_by_name(&gradients));
            let along = along.map(|((name, x), (other, d))| {
                assert_eq!(name, other);
                x.iter().zip(d).map(|(x, d)| x * d).sum::<f64>()
            });
            let got = along.sum::<f64>();
            let want = slope(|h| {
                let mut moved = tensors.clone();
                for ((_, x), (_, dx)) in moved.inputs_mut().into_iter().zip(direction.clone().inputs_mut()) {
                    x.iter_mut().zip(dx).for_each(|(x, dx)| *x += 0.1 * h * *dx);
                }
                loss(&problem, &options, &moved)
            }) * 10.0;
            let what = format!("{rule:?} T = {tokens}");
            assert_close(&what, &[got], &[want], 1e-7);
        }
    }
}

#[test]
fn transforms_are_exact_far_out() {
    assert_eq!(softplus(-800.0f64), 0.0);
    assert_eq!(softplus(800.0f64), 800.0);
    // ln(1 + x) = x - x^2/2 + ...
    let tiny = (-30.0f64).exp();
    assert_close("softplus(-30)", &[softplus(-30.0f64)], &[tiny - tiny * tiny / 2.0], 1e-15);
    assert_close("softplus(25)", &[softplus(25.0f64)], &[25.0 + (-25.0f64).exp()], 1e-15);
    assert_eq!((sigmoid(-800.0f64), sigmoid(0.0f64), sigmoid(800.0f64)), (0.0, 0.5, 1.0));
    assert_close("sigmoid(-40)", &[sigmoid(-40.0f64)], &[(-40.0f64).exp()], 1e-15);
}
