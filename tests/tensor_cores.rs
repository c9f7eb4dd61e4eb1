//! The tensor-core kernels, where there is a CUDA device: f16 and bf16 against the reference on the same rounded
//! inputs.

#![cfg(feature = "cuda")]

mod sample;

use bytemuck::Pod;
use delta_rule::cubecl::cuda::CudaRuntime;
use delta_rule::cubecl::future::block_on;
use delta_rule::cubecl::ir::StorageType;
use delta_rule::cubecl::prelude::*;
use delta_rule::cubecl::std::tensor::TensorHandle;
use delta_rule::gpu::{DTypes, DeviceInputs, HostDType, client, forward_host, forward_into};
use delta_rule::{BetaTransform, GateTransform, Ident, Options, Problem, Rule, StateLayout};
use half::bf16;
use sample::{MILD, NEGATIVE, RULES, Sample, Style, assert_close, relative_error, shape};

/// What bf16 operands cost, for eigenvalues in [0, 1] and down to -1.
const MILD_ERROR: f64 = 5e-3;
const NEGATIVE_ERROR: f64 = 1.5e-2;

fn open() -> Option<ComputeClient<CudaRuntime>> {
    client::<CudaRuntime>(&Default::default()).inspect_err(|e| sample::skipped(e)).ok()
}

fn check(what: &str, sample: &mut Sample, dtype: HostDType, options: &Options, tolerance: f64) {
    let Some(client) = open() else { return };
    sample.round(dtype);
    let got = sample.with_f32(|x| forward_host(&client, dtype, &sample.problem, options, x));
    assert_close(what, &got.expect("the call is accepted"), &sample.truth(options), tolerance);
}

#[test]
fn every_rule_over_lengths_around_a_chunk() {
    for (i, rule) in RULES.into_iter().enumerate() {
        for tokens in [0, 1, 31, 32, 33, 103] {
            let problem = Problem::new(rule, shape(2, tokens, [1, 2], [64, 64])).unwrap();
            let mut sample = Sample::new(problem, MILD, (10 * i + tokens) as u64);
            let what = format!("{rule:?}, T = {tokens}");
            // Left to itself a call of few tokens takes the portable kernel.
            let options = Options::new().with_chunk_size(32);
            check(&what, &mut sample, HostDType::Bf16, &options, MILD_ERROR);
        }
    }
}

#[test]
fn every_rule_with_many_heads_and_few() {
    for rule in RULES {
        for (batch, heads) in [(2, [36, 72]), (1, [20, 40])] {
            let problem = Problem::new(rule, shape(batch, 71, heads, [128, 128])).unwrap();
            let mut sample = Sample::new(problem, NEGATIVE, 3);
            let what = format!("{rule:?}, B = {batch}, H = {heads:?}");
            check(&what, &mut sample, HostDType::Bf16, &Options::new(), NEGATIVE_ERROR);
        }
    }
}

#[test]
fn head_dimensions_that_are_multiples_of_16() {
    let (gated, kda) = (Rule::gated_deltanet(), Rule::kda());
    for (rule, batch, dims) in [
        (gated, 1, [16, 48]),
        (gated, 70, [80, 112]),
        (gated, 70, [96, 96]),
        (gated, 1, [192, 16]),
        (gated, 70, [256, 256]),
        (kda, 70, [48, 80]),
        (kda, 70, [96, 32]),
        (kda, 1, [32, 16]),
        (kda, 1, [256, 64]),
    ] {
        let problem = Problem::new(rule, shape(batch, 40, [1, 2], dims)).unwrap();
        let mut sample = Sample::new(problem, MILD, 4);
        let what = format!("{rule:?}, B = {batch}, {dims:?}");
        check(&what, &mut sample, HostDType::Bf16, &Options::new(), MILD_ERROR);
    }
}

#[test]
fn f16_is_more_precise() {
    for rule in RULES {
        let problem = Problem::new(rule, shape(1, 103, [1, 1], [128, 64])).unwrap();
        let mut sample = Sample::new(problem, NEGATIVE, 5);
        check(&format!("{rule:?}"), &mut sample, HostDType::F16, &Options::new(), NEGATIVE_ERROR / 8.0);
    }
}

#[test]
fn packed_sequences_with_empty_ones() {
    for rule in RULES {
        let problem = Problem::new(rule, shape(1, 150, [1, 2], [64, 64])).unwrap();
        let problem = problem.with_cu_seqlens(&[0, 0, 1, 33, 33, 65, 150, 150]).unwrap();
        let mut sample = Sample::new(problem, MILD, 6);
        check(&format!("{rule:?}"), &mut sample, HostDType::Bf16, &Options::new(), MILD_ERROR);
    }
}

#[test]
fn long_sequences_of_few_heads() {
    for rule in RULES {
        for state_layout in [StateLayout::KeyFirst, StateLayout::ValueFirst] {
            let options = Options::new().with_state_layout(state_layout);
            let tokens = 8200 / rule.micro_steps;
            let problem = Problem::new(rule, shape(1, tokens, [1, 2], [128, 128])).unwrap();
            let style = Style { state: state_layout == StateLayout::KeyFirst, ..NEGATIVE };
            let mut sample = Sample::new(problem, style, 10);
            check(&format!("{rule:?}, one"), &mut sample, HostDType::Bf16, &options, NEGATIVE_ERROR);
        }
        let offsets = [0, 0, 1, 6001, 6001, 6100, 9999].map(|n| n / rule.micro_steps);
        let problem = Problem::new(rule, shape(1, offsets[6], [1, 1], [64, 128])).unwrap();
        let problem = problem.with_cu_seqlens(&offsets).unwrap();
        let mut sample = Sample::new(problem, NEGATIVE, 11);
        check(&format!("{rule:?}, packed"), &mut sample, HostDType::Bf16, &Options::new(), NEGATIVE_ERROR);
    }
}

#[test]
fn extreme_gates_betas_and_keys() {
    for rule in RULES {
        for (what, style) in [
            ("g = -50", Style { gate: 50.0, ..NEGATIVE }),
            ("g = -10000", Style { gate: 1e4, ..NEGATIVE }),
            ("g = 0, beta = 0", Style { gate: 0.0, beta: [0.0, 0.0], ..MILD }),
            ("beta = 2", Style { beta: [2.0, 2.0], ..NEGATIVE }),
            ("identical keys", Style { identical_keys: true, ..MILD }),
        ] {
            let problem = Problem::new(rule, shape(1, 70, [1, 1], [64, 64])).unwrap();
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
            let problem = Problem::new(rule, shape(2, 70, [1, 2], [64, 32])).unwrap();
            let decays = rule.decay != delta_rule::Decay::None;
            let mut sample = Sample::new(problem, MILD, 8);
            sample.q.iter_mut().chain(&mut sample.k).for_each(|x| *x *= 3.0);
            let mut options = Options::new()
                .with_qk_l2norm(true)
                .with_beta(BetaTransform::TwoSigmoid)
                .with_scale(0.5)
                .with_state_layout(StateLayout::KeyFirst);
            if decays {
                sample = sample.with_gate_formula(9);
                options = options.with_gate(GateTransform::Bounded { lower_bound: -5.0 });
            }
            if state_layout == StateLayout::ValueFirst {
                sample.initial_state = None;
                options = options.with_state_layout(state_layout);
            }
            let what = format!("{rule:?}, {state_layout:?}");
            check(&what, &mut sample, HostDType::Bf16, &options, NEGATIVE_ERROR);
        }
    }
}

#[test]
fn twenty_runs_give_the_same_bits() {
    let Some(client) = open() else { return };
    for (rule, tokens, heads) in [
        (Rule::gated_deltanet(), 140, 1),
        (Rule::gated_deltanet(), 140, 128),
        (Rule::kda(), 140, 2),
        (Rule::gated_deltanet(), 8192, 2),
        (Rule::kda(), 8192, 1),
    ] {
        let problem = Problem::new(rule, shape(1, tokens, [heads, heads], [64, 64])).unwrap();
        let sample = Sample::new(problem, NEGATIVE, 9);
        let run = || {
            sample.with_f32(|x| forward_host(&client, HostDType::Bf16, &sample.problem, &Options::new(), x))
        };
        let first = run().unwrap();
        for _ in 1..20 {
            assert!(run().unwrap() == first);
        }
    }
}

/// A tensor with every token row followed by `gap` elements, each `nan`, that must be left alone.
fn spaced<T: Pod>(
    client: &ComputeClient<CudaRuntime>,
    shape: Vec<usize>,
    dtype: StorageType,
    values: &[T],
    nan: T,
    gap: usize,
) -> TensorHandle<CudaRuntime> {
    let row: usize = shape[2] * shape[3];
    let data: Vec<T> =
        values.chunks_exact(row).flat_map(|x| x.iter().copied().chain(vec![nan; gap])).collect();
    let pitch = row + gap;
    let strides = vec![shape[1] * pitch, pitch, shape[3], 1];
    TensorHandle::new(client.create_from_slice(bytemuck::cast_slice(&data)), shape, strides, dtype)
}

#[test]
fn gaps_between_rows_are_neither_read_nor_written() {
    let Some(client) = open() else { return };
    // Gates per channel are read four at a time where their rows allow it; where not, portable kernels take the call.
    let gated = Rule::gated_deltanet();
    for (rule, heads, gate_gap) in
        [(gated, 2, 0), (gated, 200, 0), (Rule::kda(), 2, 0), (Rule::kda(), 2, 4), (Rule::kda(), 2, 1)]
    {
        let problem = Problem::new(rule, shape(2, 45, [heads, heads], [32, 48])).unwrap();
        let mut sample = Sample::new(problem.clone(), Style { state: false, ..MILD }, 13);
        sample.round(HostDType::Bf16);
        let truth = sample.truth(&Options::new());
        let f32 = f32::as_type_native_unchecked().storage_type();
        let plain = |ident, x: &[f32]| {
            let handle = client.create_from_slice(f32::as_bytes(x));
            TensorHandle::<CudaRuntime>::new_contiguous(problem.shape_of(ident), handle, f32)
        };
        let gap = 8;
        let bf16_type = bf16::as_type_native_unchecked().storage_type();
        let spaced_bf16 = |ident, x: &[f32]| {
            let x: Vec<bf16> = x.iter().map(|&x| bf16::from_f32(x)).collect();
            spaced(&client, problem.shape_of(ident), bf16_type, &x, bf16::NAN, gap)
        };
        let o = spaced_bf16(Ident::O, &vec![f32::NAN; problem.len_of(Ident::O)]);
        let state = plain(Ident::FinalState, &vec![f32::NAN; problem.len_of(Ident::FinalState)]);
        let (o_handle, state_handle) = (o.handle.clone(), state.handle.clone());
        sample.with_f32(|x| {
            let put = |ident, x: &[f32]| spaced_bf16(ident, x).binding();
            let gates = |g: &[f32]| match gate_gap {
                0 => plain(Ident::G, g),
                gap => spaced(&client, problem.shape_of(Ident::G), f32, g, f32::NAN, gap),
            };
            let inputs = DeviceInputs {
                g: x.g.map(|g| gates(g).binding()),
                ..DeviceInputs::new(
                    put(Ident::Q, x.q),
                    put(Ident::K, x.k),
                    put(Ident::V, x.v),
                    plain(Ident::Beta, x.beta).binding(),
                )
            };
            let dtypes = DTypes::mixed(bf16_type);
            let (o, state) = (o.clone().binding(), state.clone().binding());
            forward_into(&client, &problem, &Options::new(), inputs, dtypes, o, state).unwrap();
        });
        block_on(client.sync()).unwrap();
        let bytes = client.read_one(state_handle).unwrap();
        assert!(
            relative_error(f32::from_bytes(&bytes), &truth.final_state) < MILD_ERROR,
            "{rule:?}, {gate_gap}"
        );
        let bytes = client.read_one(o_handle).unwrap();
        let all: Vec<f32> =
            bytes.chunks_exact(2).map(|b| bf16::from_ne_bytes([b[0], b[1]]).to_f32()).collect();
        let row = heads * 48;
        let rows = all.chunks_exact(row + gap);
        let o: Vec<f32> = rows.clone().flat_map(|r| r[..row].to_vec()).collect();
        assert!(relative_error(&o, &truth.o) < MILD_ERROR, "{rule:?}");
        assert!(rows.flat_map(|r| &r[row..]).all(|x| x.is_nan()), "{rule:?}: a gap was written to");
    }
}
