//! The backward on tensor cores, where there is a CUDA device: gradients in bf16 against those of the reference on the
//! same rounded inputs.

#![cfg(feature = "cuda")]

mod sample;

use delta_rule::cubecl::cuda::CudaRuntime;
use delta_rule::cubecl::prelude::*;
use delta_rule::gpu::{HostDType, backward_host, client};
use delta_rule::{BetaTransform, Decay, GateTransform, Gradients, Options, Problem, Rule, StateLayout};
use sample::{MILD, NEGATIVE, Sample, Style, Upstream, assert_rounded_gradients_close, round, shape};

/// Those whose backward runs on tensor cores.
const RULES: [Rule; 5] = [
    Rule::deltanet(),
    Rule::gated_deltanet(),
    Rule::kda(),
    Rule::delta_product(2),
    Rule::gated_delta_product(3),
];

/// What bf16 operands cost, for eigenvalues in [0, 1] and down to -1.
const MILD_ERROR: f64 = 7e-3;
const NEGATIVE_ERROR: f64 = 2e-2;

fn open() -> Option<ComputeClient<CudaRuntime>> {
    client::<CudaRuntime>(&Default::default()).inspect_err(|e| sample::skipped(e)).ok()
}

fn check(
    what: &str,
    sample: &mut Sample,
    dtype: HostDType,
    options: &Options,
    tolerance: f64,
) -> Option<Gradients<f32>> {
    let client = open()?;
    sample.round(dtype);
    let mut upstream = Upstream::new(&sample.problem, 77);
    round(&mut upstream.o, dtype);
    let want = sample.gradients(options, &upstream);
    let upstream = upstream.to_f32();
    let got =
        sample.with_f32(|x| backward_host(&client, dtype, &sample.problem, options, x, &upstream.view()));
    let got = got.expect("the call is accepted");
    assert_rounded_gradients_close(what, &got, &want, tolerance);
    Some(got)
}

#[test]
fn every_rule_over_lengths_around_a_block() {
    for (i, rule) in RULES.into_iter().enumerate() {
        for tokens in [0, 1, 31, 32, 33, 64, 65, 199] {
            let problem = Problem::new(rule, shape(2, tokens, [1, 2], [64, 64])).unwrap();
            let mut sample = Sample::new(problem, MILD, (10 * i + tokens) as u64);
            let what = format!("{rule:?}, T = {tokens}");
            // One token has a handful of betas, whose errors do not average.
            let tolerance = if tokens == 1 { NEGATIVE_ERROR } else { MILD_ERROR };
            check(&what, &mut sample, HostDType::Bf16, &Options::new(), tolerance);
        }
    }
}

#[test]
fn every_rule_with_many_heads_and_few() {
    for rule in RULES {
        for (batch, heads) in [(2, [36, 72]), (1, [20, 40]), (1, [2, 2])] {
            let problem = Problem::new(rule, shape(batch, 71, heads, [128, 128])).unwrap();
            let mut sample = Sample::new(problem, NEGATIVE, 3);
            let what = format!("{rule:?}, B = {batch}, H = {heads:?}");
            let once = check(&what, &mut sample, HostDType::Bf16, &Options::new(), NEGATIVE_ERROR);
            let again = check(&what, &mut sample, HostDType::Bf16, &Options::new(), NEGATIVE_ERROR);
            assert!(once == again, "{what}: not the same bits");
        }
    }
}

#[test]
fn head_dimensions_and_f16() {
    let rule = Rule::gated_deltanet();
    for (batch, dims) in
        [(1, [16, 48]), (70, [80, 112]), (70, [96, 96]), (1, [144, 16]), (1, [192, 256]), (40, [256, 80])]
    {
        let problem = Problem::new(rule, shape(batch, 70, [1, 2], dims)).unwrap();
        let mut sample = Sample::new(problem, MILD, 4);
        check(&format!("B = {batch}, {dims:?}"), &mut sample, HostDType::Bf16, &Options::new(), MILD_ERROR);
    }
    for rule in [Rule::deltanet(), Rule::delta_product(2), Rule::gated_delta_product(3)] {
        let problem = Problem::new(rule, shape(1, 135, [1, 2], [256, 256])).unwrap();
        let mut sample = Sample::new(problem, NEGATIVE, 10);
        let what = format!("{rule:?}, K = V = 256");
        check(&what, &mut sample, HostDType::Bf16, &Options::new(), NEGATIVE_ERROR);
    }
    for rule in RULES {
        let problem = Problem::new(rule, shape(1, 103, [1, 1], [128, 64])).unwrap();
        let mut sample = Sample::new(problem, NEGATIVE, 5);
        check(&format!("{rule:?}"), &mut sample, HostDType::F16, &Options::new(), NEGATIVE_ERROR / 6.0);
    }
}

#[test]
fn packed_sequences_with_empty_ones() {
    for rule in RULES {
        let problem = Problem::new(rule, shape(1, 250, [4, 8], [64, 64])).unwrap();
        let problem = problem.with_cu_seqlens(&[0, 0, 1, 33, 33, 65, 129, 250, 250]).unwrap();
        let mut sample = Sample::new(problem, MILD, 6);
        let mut options = Options::new();
        if rule.decay != Decay::None {
            sample = sample.with_gate_formula(9);
            options = options.with_gate(GateTransform::Softplus);
        }
        check(&format!("{rule:?}"), &mut sample, HostDType::Bf16, &options, MILD_ERROR);
    }
}

#[test]
fn extreme_gates_betas_and_keys() {
    for rule in RULES {
        for (what, style) in [
            ("g = -50", Style { gate: 50.0, ..NEGATIVE }),
            ("g = 0, beta = 0", Style { gate: 0.0, beta: [0.0, 0.0], ..MILD }),
            ("beta = 2", Style { beta: [2.0, 2.0], ..NEGATIVE }),
            ("identical keys", Style { identical_keys: true, ..MILD }),
        ] {
            // Several heads: a gradient of g is one sum over a state, which may happen to be small.
            let problem = Problem::new(rule, shape(1, 70, [8, 8], [64, 64])).unwrap();
            let mut sample = Sample::new(problem, style, 7);
            let what = format!("{rule:?}, {what}");
            check(&what, &mut sample, HostDType::Bf16, &Options::new(), 2.0 * NEGATIVE_ERROR);
        }
    }
}

#[test]
fn fused_options_and_layouts() {
    for rule in RULES {
        for state_layout in [StateLayout::KeyFirst, StateLayout::ValueFirst] {
            let problem = Problem::new(rule, shape(2, 70, [8, 16], [64, 32])).unwrap();
            let mut sample = Sample::new(problem, MILD, 8);
            sample.q.iter_mut().chain(&mut sample.k).for_each(|x| *x *= 3.0);
            let mut options = Options::new()
                .with_qk_l2norm(true)
                .with_beta(BetaTransform::TwoSigmoid)
                .with_scale(0.5)
                .with_state_layout(state_layout);
            if rule.decay != Decay::None {
                sample = sample.with_gate_formula(9);
                options = options.with_gate(GateTransform::Bounded { lower_bound: -5.0 });
            }
            if state_layout == StateLayout::ValueFirst {
                sample.initial_state = None;
            }
            let what = format!("{rule:?}, {state_layout:?}");
            check(&what, &mut sample, HostDType::Bf16, &options, NEGATIVE_ERROR);
        }
    }
}
