//! Long sequences of few heads, which are split, on the CPU from the CUDA C++ that a GPU gets. The errors must be those of
//! the same call on a device of one multiprocessor, where nothing is split. Slow: a split pays from some hundred chunks
//! on, so heads and channels are few.

#[path = "../../tests/sample/mod.rs"]
mod sample;

use cubecl::cuda::CudaDevice;
use cubecl::prelude::*;
use delta_rule::gpu::{HostDType, forward_host};
use delta_rule::{BetaTransform, Decay, GateTransform, Options, Output, Problem, Rule, StateLayout};
use delta_rule_offline::{OfflineCuda, can_emulate, emulate, take_generated};
use sample::{MILD, NEGATIVE, Sample, Style, relative_error, shape};

/// The errors of two roundings of one problem differ by chance.
const CHANCE: f64 = 1.25;

/// Runs a sample on one of the two devices, and says which kernels it took.
fn launch(device: usize, sample: &Sample, dtype: HostDType, options: &Options) -> (Output<f32>, Vec<String>) {
    let client = OfflineCuda::client(&CudaDevice::new(device));
    let got = sample.with_f32(|x| forward_host(&client, dtype, &sample.problem, options, x));
    let name = |name: &str| name.split('_').next().unwrap_or_default().to_owned();
    (got.expect("the call is accepted"), take_generated().iter().map(|k| name(&k.name)).collect())
}

fn check(what: &str, sample: &mut Sample, dtype: HostDType, options: &Options) -> Output<f32> {
    let start = std::time::Instant::now();
    sample.round(dtype);
    let (split, kernels) = launch(0, sample, dtype, options);
    assert_eq!(kernels, ["prepare", "forward", "combine", "forward"], "{what}");
    let (whole, kernels) = launch(1, sample, dtype, options);
    assert!(!kernels.contains(&"combine".to_owned()), "{what}: {kernels:?}");
    let truth = sample.truth(options);
    for (name, split, whole, truth) in [
        ("o", &split.o, &whole.o, &truth.o),
        ("final state", &split.final_state, &whole.final_state, &truth.final_state),
    ] {
        let (error, whole_error) = (relative_error(split, truth), relative_error(whole, truth));
        println!("{what}: {name} {error:.2e}, whole {whole_error:.2e}");
        assert!(
            error <= CHANCE * whole_error,
            "{what}: {name} is off by {error:.2e}, whole {whole_error:.2e}"
        );
    }
    println!("{what}: {:.1?}", start.elapsed());
    split
}

#[test]
fn a_split_costs_no_precision() {
    if !can_emulate() {
        return sample::missing("there is no g++");
    }
    emulate(false);
    let plain = Options::new();
    let bf16 = HostDType::Bf16;
    let rules = [
        Rule::deltanet(),
        Rule::gated_deltanet(),
        Rule::kda(),
        Rule::delta_product(2),
        Rule::gated_delta_product(3),
    ];
    for (i, rule) in rules.into_iter().enumerate() {
        // No multiple of a chunk; a token of three micro-steps lies across two chunks.
        let tokens = 3977 / rule.micro_steps;
        let problem = Problem::new(rule, shape(1, tokens, [1, 1], [32, 16])).unwrap();
        let decays = rule.decay != Decay::None;
        for (what, style) in [
            ("mild", MILD),
            ("g = 0", Style { gate: 0.0, ..NEGATIVE }),
            ("g = -10000", Style { gate: 1e4, ..NEGATIVE }),
            ("beta = 2", Style { beta: [2.0, 2.0], gate: 0.01, ..NEGATIVE }),
        ] {
            if decays || !what.starts_with('g') {
                let mut sample = Sample::new(problem.clone(), style, i as u64);
                check(&format!("{rule:?}, {what}"), &mut sample, bf16, &plain);
            }
        }

        // Value channels that no tile divides, before the rows of the transfer; the state by value channels, or none.
        let value_first = plain.clone().with_state_layout(StateLayout::ValueFirst);
        let problem = Problem::new(rule, shape(1, tokens, [1, 1], [16, 48])).unwrap();
        let mut sample = Sample::new(problem, Style { state: i % 2 == 0, ..MILD }, 5);
        check(&format!("{rule:?}, V = 48"), &mut sample, bf16, &value_first);
    }
    for rule in [Rule::gated_deltanet(), Rule::kda(), Rule::gated_delta_product(3)] {
        let lengths = [0, 1, 4000, 0, 33, 1500, 0].map(|n| n / rule.micro_steps);
        let offsets: Vec<usize> = (0..=lengths.len()).map(|n| lengths[..n].iter().sum::<usize>()).collect();
        let shape_ = shape(1, offsets[lengths.len()], [1, 1], [32, 16]);
        let problem = Problem::new(rule, shape_).unwrap().with_cu_seqlens(&offsets).unwrap();
        let mut sample = Sample::new(problem, MILD, 6);
        let first = check(&format!("{rule:?}, packed"), &mut sample, bf16, &plain);
        emulate(true);
        let (again, _) = launch(0, &sample, bf16, &plain);
        assert!(first == again, "{rule:?}: the result depends on the order of planes");
        emulate(false);
    }
    let problem = Problem::new(Rule::gated_deltanet(), shape(2, 3300, [1, 2], [16, 16])).unwrap();
    let mut sample = Sample::new(problem, MILD, 8).with_gate_formula(9);
    sample.q.iter_mut().chain(&mut sample.k).for_each(|x| *x *= 3.0);
    let fused = Options::new()
        .with_qk_l2norm(true)
        .with_beta(BetaTransform::TwoSigmoid)
        .with_scale(0.5)
        .with_gate(GateTransform::Bounded { lower_bound: -0.1 });
    check("fused, two rows", &mut sample, HostDType::F16, &fused);
}
