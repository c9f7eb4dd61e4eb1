//! The tensor-core kernels, run on the CPU from the very CUDA C++ that a GPU gets: outputs against the reference on
//! the same rounded inputs. Slow; shapes are small.

#[path = "../../tests/sample/mod.rs"]
mod sample;

use cubecl::prelude::*;
use delta_rule::gpu::{HostDType, forward_host};
use delta_rule::{BetaTransform, GateTransform, Options, Output, Problem, Rule};
use delta_rule_offline::{OfflineCuda, can_emulate, emulate, take_generated};
use sample::{MILD, NEGATIVE, Sample, Style, assert_close, shape};

/// What bf16 operands cost, for eigenvalues in [0, 1] and down to -1.
const MILD_ERROR: f64 = 5e-3;
const NEGATIVE_ERROR: f64 = 1.5e-2;

fn run(what: &str, sample: &mut Sample, options: &Options, tolerance: f64) -> Output<f32> {
    let client = OfflineCuda::client(&Default::default());
    sample.round(HostDType::Bf16);
    let start = std::time::Instant::now();
    let got = sample.with_f32(|x| forward_host(&client, HostDType::Bf16, &sample.problem, options, x));
    let got = got.expect("the call is accepted");
    println!("{what}: {:.1?}", start.elapsed());
    assert_close(what, &got, &sample.truth(options), tolerance);
    got
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
        Rule::kda(),
        Rule::delta_product(2),
        Rule::gated_delta_product(3),
    ];
    for (i, rule) in rules.into_iter().enumerate() {
        // Few heads: narrow tiles.
        for tokens in [0, 1, 31, 32, 33, 103] {
            let problem = Problem::new(rule, shape(1, tokens, [1, 2], [32, 32])).unwrap();
            let mut sample = Sample::new(problem, MILD, (10 * i + tokens) as u64);
            // Left to itself a call of few tokens takes the portable kernel.
            let options = Options::new().with_chunk_size(32);
            run(&format!("{rule:?}, T = {tokens}"), &mut sample, &options, MILD_ERROR);
        }
        for (what, style) in [
            ("g = -50", Style { gate: 50.0, ..NEGATIVE }),
            ("g = -10000", Style { gate: 1e4, ..NEGATIVE }),
            ("beta = 2", Style { beta: [2.0, 2.0], ..NEGATIVE }),
            ("identical keys", Style { identical_keys: true, ..MILD }),
        ] {
            let problem = Problem::new(rule, shape(1, 70, [1, 2], [32, 32])).unwrap();
            let mut sample = Sample::new(problem, style, 7);
            run(&format!("{rule:?}, {what}"), &mut sample, &Options::new(), 2.0 * NEGATIVE_ERROR);
        }
    }
    for rule in [Rule::gated_deltanet(), Rule::kda()] {
        // Many heads: the widest tile, the other instruction mix, an odd number of channels in the last tile.
        let problem = Problem::new(rule, shape(2, 40, [30, 60], [48, 80])).unwrap();
        let mut sample = Sample::new(problem, NEGATIVE, 3);
        let wide = run(&format!("{rule:?}, many heads"), &mut sample, &Options::new(), NEGATIVE_ERROR);
        emulate(true);
        let again = run(&format!("{rule:?}, backwards"), &mut sample, &Options::new(), NEGATIVE_ERROR);
        assert!(wide == again, "{rule:?}: the result depends on the order of planes");

        // One tile of values, few heads: two groups of planes prepare in turn.
        let problem = Problem::new(rule, shape(1, 135, [1, 1], [32, 16])).unwrap();
        let mut sample = Sample::new(problem, NEGATIVE, 4);
        run(&format!("{rule:?}, V = 16"), &mut sample, &Options::new(), NEGATIVE_ERROR);

        let problem = Problem::new(rule, shape(1, 150, [1, 2], [32, 32])).unwrap();
        let problem = problem.with_cu_seqlens(&[0, 0, 1, 33, 33, 65, 150, 150]).unwrap();
        let mut sample = Sample::new(problem, MILD, 6);
        run(&format!("{rule:?}, packed"), &mut sample, &Options::new(), MILD_ERROR);

        let problem = Problem::new(rule, shape(1, 70, [1, 2], [32, 32])).unwrap();
        let mut sample = Sample::new(problem, MILD, 8).with_gate_formula(9);
        sample.q.iter_mut().chain(&mut sample.k).for_each(|x| *x *= 3.0);
        let options = Options::new()
            .with_qk_l2norm(true)
            .with_beta(BetaTransform::TwoSigmoid)
            .with_scale(0.5)
            .with_gate(GateTransform::Bounded { lower_bound: -5.0 });
        run(&format!("{rule:?}, fused"), &mut sample, &options, NEGATIVE_ERROR);
        emulate(false);
    }
    let kernels = take_generated();
    assert!(kernels.iter().any(|k| k.name.starts_with("forward")));
    assert!(kernels.iter().all(|k| !k.name.starts_with("scan")), "a portable kernel ran");
}
