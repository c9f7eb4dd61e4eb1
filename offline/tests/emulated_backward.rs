//! The backward on tensor cores, run on the CPU from the very CUDA C++ that a GPU gets: gradients against those of the
//! reference on the same rounded inputs. Slow; shapes are small.

#[path = "../../tests/sample/mod.rs"]
mod sample;

use cubecl::prelude::*;
use delta_rule::gpu::{HostDType, backward_host};
use delta_rule::{BetaTransform, Decay, GateTransform, Gradients, Options, Problem, Rule};
use delta_rule_offline::{OfflineCuda, can_emulate, emulate, take_generated};
use sample::{MILD, NEGATIVE, Sample, Style, Upstream, assert_rounded_gradients_close, round, shape};

/// What bf16 operands cost, for eigenvalues in [0, 1] and down to -1.
const MILD_ERROR: f64 = 7e-3;
const NEGATIVE_ERROR: f64 = 2e-2;

fn run(what: &str, sample: &mut Sample, options: &Options, tolerance: f64) -> Gradients<f32> {
    let client = OfflineCuda::client(&Default::default());
    sample.round(HostDType::Bf16);
    let mut upstream = Upstream::new(&sample.problem, 77);
    round(&mut upstream.o, HostDType::Bf16);
    let want = sample.gradients(options, &upstream);
    let upstream = upstream.to_f32();
    let start = std::time::Instant::now();
    let got = sample
        .with_f32(|x| backward_host(&client, HostDType::Bf16, &sample.problem, options, x, &upstream.view()));
    let got = got.expect("the call is accepted");
    println!("{what}: {:.1?}", start.elapsed());
    assert_rounded_gradients_close(what, &got, &want, tolerance);
    got
}

/// The same with the planes of a cube taking turns in either order: no bit may depend on it.
fn run_in_both_orders(what: &str, sample: &mut Sample, options: &Options, tolerance: f64) {
    let forwards = run(what, sample, options, tolerance);
    emulate(true);
    let backwards = run(&format!("{what}, planes backwards"), sample, options, tolerance);
    assert!(forwards == backwards, "{what}: the result depends on the order of planes");
    emulate(false);
}

#[test]
fn kernels_are_right_without_a_gpu() {
    if !can_emulate() {
        return sample::missing("there is no g++");
    }
    emulate(false);
    let rules = [
        Rule::deltanet(),
        Rule::gated_deltanet(),
        Rule::delta_product(2),
        Rule::gated_delta_product(3),
        Rule::kda(),
    ];
    for (i, rule) in rules.into_iter().enumerate() {
        for tokens in [0, 1, 31, 32, 33, 64, 65, 135] {
            let problem = Problem::new(rule, shape(1, tokens, [2, 2], [32, 32])).unwrap();
            let mut sample = Sample::new(problem, MILD, (10 * i + tokens) as u64);
            // One token has a handful of betas, whose errors do not average.
            let tolerance = if tokens == 1 { NEGATIVE_ERROR } else { MILD_ERROR };
            run(&format!("{rule:?}, T = {tokens}"), &mut sample, &Options::new(), tolerance);
        }
        for (what, style) in [
            ("g = -50", Style { gate: 50.0, ..NEGATIVE }),
            ("beta = 2", Style { beta: [2.0, 2.0], ..NEGATIVE }),
            ("identical keys", Style { identical_keys: true, ..MILD }),
        ] {
            let problem = Problem::new(rule, shape(1, 70, [2, 2], [32, 32])).unwrap();
            let mut sample = Sample::new(problem, style, 7);
            run(&format!("{rule:?}, {what}"), &mut sample, &Options::new(), 2.0 * NEGATIVE_ERROR);
        }
    }
    for rule in [Rule::deltanet(), Rule::gated_deltanet(), Rule::kda()] {
        // Many heads: the widest tile of values; K and V of several widths, and a last tile that is not full.
        let problem = Problem::new(rule, shape(2, 40, [70, 70], [48, 80])).unwrap();
        let mut sample = Sample::new(problem, NEGATIVE, 3);
        let what = format!("{rule:?}, many heads");
        run_in_both_orders(&what, &mut sample, &Options::new(), NEGATIVE_ERROR);

        // Above 64 key channels tiles of states come two ahead; V is an odd number of them.
        let problem = Problem::new(rule, shape(1, 70, [1, 1], [80, 48])).unwrap();
        let mut sample = Sample::new(problem, MILD, 5);
        run(&format!("{rule:?}, K = 80, V = 48"), &mut sample, &Options::new(), MILD_ERROR);

        // Few heads: narrow tiles, fetched by two groups of planes in turn.
        let problem = Problem::new(rule, shape(1, 150, [1, 2], [32, 32])).unwrap();
        let problem = problem.with_cu_seqlens(&[0, 0, 1, 33, 33, 65, 150, 150]).unwrap();
        let mut sample = Sample::new(problem, MILD, 6);
        let what = format!("{rule:?}, packed, grouped");
        run_in_both_orders(&what, &mut sample, &Options::new(), MILD_ERROR);

        let problem = Problem::new(rule, shape(1, 70, [2, 4], [64, 32])).unwrap();
        let mut sample = Sample::new(problem, MILD, 8);
        sample.q.iter_mut().chain(&mut sample.k).for_each(|x| *x *= 3.0);
        let mut options =
            Options::new().with_qk_l2norm(true).with_beta(BetaTransform::TwoSigmoid).with_scale(0.5);
        if rule.decay != Decay::None {
            sample = sample.with_gate_formula(9);
            options = options.with_gate(GateTransform::Bounded { lower_bound: -5.0 });
        }
        run(&format!("{rule:?}, fused"), &mut sample, &options, NEGATIVE_ERROR);
    }
    // More than 128 key channels: cubes of `gradients` with 10 and 16 planes, one group of planes that fetches.
    for (rule, dims) in [(Rule::gated_deltanet(), [160, 32]), (Rule::delta_product(2), [256, 48])] {
        let problem = Problem::new(rule, shape(1, 70, [1, 2], dims)).unwrap();
        let mut sample = Sample::new(problem, MILD, 11);
        run(&format!("{rule:?}, {dims:?}"), &mut sample, &Options::new(), MILD_ERROR);
    }
    let kernels = take_generated();
    assert!(kernels.iter().any(|k| k.name.starts_with("gradients")));
    assert!(kernels.iter().all(|k| !k.name.starts_with("scan")), "a portable kernel ran");
}
