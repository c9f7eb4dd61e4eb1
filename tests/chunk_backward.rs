//! The gradients of the chunk engine on the CPU against those of the reference.

mod sample;

use delta_rule::{
    BetaTransform, Decay, Error, GateTransform, Ident, Inputs, Options, OutputGradients, Problem, Rule,
    StateLayout, chunk,
};
use proptest::prelude::*;
use sample::{
    MILD, NEGATIVE, RULES, Rng, Sample, Style, Upstream, assert_gradients_close, shape, small_problem,
};

fn check(what: &str, sample: &Sample, options: &Options, tolerance: f64) {
    let upstream = Upstream::new(&sample.problem, 77);
    check_with(what, sample, options, &upstream, tolerance);
    let without = Upstream { final_state: None, ..upstream };
    check_with(&format!("{what}, no final state"), sample, options, &without, tolerance);
}

fn check_with(what: &str, sample: &Sample, options: &Options, upstream: &Upstream<f64>, tolerance: f64) {
    let problem = &sample.problem;
    let want = sample.gradients(options, upstream);
    let got = chunk::backward(problem, options, &sample.inputs(), &upstream.view()).unwrap();
    assert_gradients_close(&format!("{what}, f64"), &got, &want, 1e-11);
    let upstream = upstream.to_f32();
    let got = sample.with_f32(|x| chunk::backward(problem, options, x, &upstream.view())).unwrap();
    assert_gradients_close(&format!("{what}, f32"), &got, &want, tolerance);
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
        let options = Options::new().with_chunk_size(chunk_size);
        check("any problem", &Sample::new(problem, style, seed), &options, 1e-4);
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
    for (rule, gate) in [
        (Rule::kda(), GateTransform::Softplus),
        (Rule::kda(), GateTransform::Bounded { lower_bound: -5.0 }),
        (Rule::gated_deltanet(), GateTransform::Softplus),
    ] {
        let problem = Problem::new(rule, shape(1, 75, [1, 2], [16, 24])).unwrap();
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
        ("beta 0", Rule::gated_deltanet(), style([0.0, 0.0], 0.1, false), 1e-5),
        ("beta 2", Rule::deltanet(), style([2.0, 2.0], 0.0, false), 1e-4),
        ("identical keys, beta 2", Rule::kda(), style([2.0, 2.0], 0.0, true), 1e-3),
    ] {
        let problem = Problem::new(rule, shape(1, 199, [1, 1], [64, 32])).unwrap();
        let mut sample = Sample::new(problem, style, 4);
        // Otherwise what reaches the initial state lies below the smallest f32.
        sample.g.iter_mut().flatten().take(1).for_each(|g| *g = -0.1);
        check(what, &sample, &Options::new(), tolerance);
    }
}

/// Every gate is strong, so that the true gradient of g is far below the terms it is made of.
#[test]
fn the_gradient_of_strong_gates_is_not_buried() {
    for rule in RULES.into_iter().filter(|rule| rule.decay != Decay::None) {
        let problem = Problem::new(rule, shape(1, 70, [1, 1], [32, 16])).unwrap();
        let mut sample = Sample::new(problem, MILD, 4);
        sample.g.iter_mut().flatten().for_each(|g| *g -= 30.0);
        check(&format!("{rule:?}"), &sample, &Options::new(), 1e-5);
    }
}

/// A step of any input moves the loss by its gradient, through the front door and every fused option.
#[test]
fn finite_differences_of_the_forward() {
    let problem = Problem::new(Rule::kda(), shape(1, 21, [1, 2], [8, 8])).unwrap();
    let sample = Sample::new(problem.clone(), MILD, 2).with_gate_formula(3);
    let options = Options::new()
        .with_gate(GateTransform::Softplus)
        .with_qk_l2norm(true)
        .with_beta(BetaTransform::TwoSigmoid)
        .with_chunk_size(8);
    let upstream = Upstream::new(&problem, 5);
    let gradients = chunk::backward(&problem, &options, &sample.inputs(), &upstream.view()).unwrap();
    let loss = |sample: &Sample| -> f64 {
        let out = chunk::forward(&problem, &options, &sample.inputs()).unwrap();
        let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
        dot(&out.o, &upstream.o) + dot(&out.final_state, upstream.final_state.as_ref().unwrap())
    };
    type Field = fn(&mut Sample) -> &mut Vec<f64>;
    let fields: [(&str, Field, &[f64]); 8] = [
        ("q", |s| &mut s.q, &gradients.q),
        ("k", |s| &mut s.k, &gradients.k),
        ("v", |s| &mut s.v, &gradients.v),
        ("beta", |s| &mut s.beta, &gradients.beta),
        ("g", |s| s.g.as_mut().unwrap(), gradients.g.as_ref().unwrap()),
        ("a_log", |s| s.a_log.as_mut().unwrap(), gradients.a_log.as_ref().unwrap()),
        ("dt_bias", |s| s.dt_bias.as_mut().unwrap(), gradients.dt_bias.as_ref().unwrap()),
        ("initial_state", |s| s.initial_state.as_mut().unwrap(), &gradients.initial_state),
    ];
    for (name, field, gradient) in fields {
        let mut rng = Rng::new(9);
        let direction: Vec<f64> = gradient.iter().map(|_| rng.signed()).collect();
        let moved = |by: f64| {
            let mut sample = sample.clone();
            field(&mut sample).iter_mut().zip(&direction).for_each(|(x, d)| *x += by * d);
            loss(&sample)
        };
        let step = 1e-5;
        let want = (moved(step) - moved(-step)) / (2.0 * step);
        let got: f64 = gradient.iter().zip(&direction).map(|(g, d)| g * d).sum();
        assert!((got - want).abs() < 1e-7 * want.abs().max(1.0), "{name}: {got} against {want}");
    }
}

#[test]
fn twenty_runs_give_the_same_bits() {
    let sample =
        Sample::new(Problem::new(Rule::kda(), shape(2, 100, [1, 3], [32, 16])).unwrap(), NEGATIVE, 9);
    let upstream = Upstream::new(&sample.problem, 3).to_f32();
    let run = || {
        sample.with_f32(|x| chunk::backward(&sample.problem, &Options::new(), x, &upstream.view())).unwrap()
    };
    let first = run();
    assert!((1..20).all(|_| run() == first));
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    assert!(one.install(run) == first, "the number of threads must not matter");
}

#[test]
fn bad_gradients_are_refused_by_name() {
    let problem = Problem::new(Rule::deltanet(), shape(1, 4, [1, 1], [8, 8])).unwrap();
    let x = vec![0.0f32; problem.len_of(Ident::Q)];
    let inputs = Inputs::new(&x, &x, &x, &x[..4]);
    let call = |o: &[f32], final_state: Option<&[f32]>| {
        chunk::backward(&problem, &Options::new(), &inputs, &OutputGradients { o, final_state }).err()
    };
    assert_eq!(call(&x, None), None);
    assert!(matches!(call(&x[1..], None), Some(Error::Length { tensor: "gradient of o", .. })));
    let short = Some(&x[..3]);
    assert!(matches!(call(&x, short), Some(Error::Length { tensor: "gradient of final_state", .. })));
}
