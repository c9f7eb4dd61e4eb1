//! The chunk engine on the CPU against the reference.

mod sample;

use delta_rule::{BetaTransform, GateTransform, Options, Problem, Rule, StateLayout, chunk};
use proptest::prelude::*;
use sample::{MILD, NEGATIVE, RULES, Sample, Style, assert_close, shape, small_problem};

fn check(what: &str, sample: &Sample, options: &Options, tolerance: f32) {
    let want = sample.truth(options);
    let got = chunk::forward(&sample.problem, options, &sample.inputs()).unwrap();
    assert_close(&format!("{what}, f64"), &got, &want, 1e-12);
    let got = sample.with_f32(|x| chunk::forward(&sample.problem, options, x)).unwrap();
    assert_close(&format!("{what}, f32"), &got, &want, tolerance as f64);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_problem_in_any_chunks(
        rule in 0usize..6, tokens in 0usize..90, group in 1usize..3, chunk_size in 1usize..80,
        dims in prop::sample::select(vec![[8, 8], [16, 24], [60, 33], [32, 64], [100, 5], [1, 1]]),
        gate in prop::sample::select(vec![0.0, 0.1, 5.0, 50.0]), beta in prop::sample::select(vec![1.0, 2.0]),
        state: bool, seed in 0u64..1000,
    ) {
        let problem = small_problem(RULES[rule], tokens, group, dims);
        let style = Style { beta: [0.0, beta], gate, identical_keys: false, state };
        check("any problem", &Sample::new(problem, style, seed), &Options::new().with_chunk_size(chunk_size), 1e-4);
    }
}

#[test]
fn lengths_around_a_chunk_and_large_dimensions() {
    for rule in RULES {
        for tokens in [0, 1, 63, 64, 65, 199] {
            let problem = Problem::new(rule, shape(1, tokens, [1, 2], [32, 16])).unwrap();
            check(&format!("{rule:?} T = {tokens}"), &Sample::new(problem, MILD, 1), &Options::new(), 1e-5);
        }
        let problem = Problem::new(rule, shape(1, 70, [1, 1], [256, 200])).unwrap();
        check(&format!("{rule:?} K = 256"), &Sample::new(problem, MILD, 2), &Options::new(), 1e-5);
    }
}

#[test]
fn packed_sequences_layouts_and_fused_options() {
    for rule in RULES {
        let problem = Problem::new(rule, shape(1, 75, [2, 4], [16, 24])).unwrap();
        let problem = problem.with_cu_seqlens(&[0, 0, 1, 34, 34, 66, 75, 75]).unwrap();
        let options = Options::new().with_state_layout(StateLayout::ValueFirst).with_chunk_size(16);
        check(&format!("{rule:?} packed"), &Sample::new(problem, NEGATIVE, 8), &options, 1e-5);
    }
    for gate in [GateTransform::Softplus, GateTransform::Bounded { lower_bound: -5.0 }] {
        let problem = Problem::new(Rule::kda(), shape(1, 75, [1, 2], [16, 24])).unwrap();
        let options =
            Options::new().with_gate(gate).with_qk_l2norm(true).with_beta(BetaTransform::TwoSigmoid);
        check(&format!("{gate:?}"), &Sample::new(problem, MILD, 8).with_gate_formula(3), &options, 1e-5);
    }
}

#[test]
fn extreme_gates_betas_and_keys() {
    let style = |beta, gate, identical_keys| Style { beta, gate, identical_keys, state: true };
    for (what, rule, style, tolerance) in [
        ("gates to -10000", Rule::kda(), style([0.0, 1.0], 1e4, false), 1e-5),
        ("gates to -10000", Rule::gated_deltanet(), style([0.0, 1.0], 1e4, false), 1e-5),
        ("beta 0", Rule::deltanet(), style([0.0, 0.0], 0.0, false), 1e-5),
        ("beta 2", Rule::deltanet(), style([2.0, 2.0], 0.0, false), 1e-4),
        ("identical keys, beta 2", Rule::kda(), style([2.0, 2.0], 0.0, true), 1e-4),
    ] {
        let problem = Problem::new(rule, shape(1, 199, [1, 1], [64, 32])).unwrap();
        check(what, &Sample::new(problem, style, 4), &Options::new(), tolerance);
    }
}

#[test]
fn twenty_runs_give_the_same_bits() {
    let sample =
        Sample::new(Problem::new(Rule::kda(), shape(2, 100, [1, 3], [32, 16])).unwrap(), NEGATIVE, 9);
    let run = || sample.with_f32(|x| chunk::forward(&sample.problem, &Options::new(), x)).unwrap();
    let first = run();
    assert!((1..20).all(|_| run() == first));
}
