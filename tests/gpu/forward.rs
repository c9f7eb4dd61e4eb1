//! `o` and the final state, and what is refused.

use delta_rule::cubecl::prelude::*;
use delta_rule::cubecl::std::tensor::TensorHandle;
use delta_rule::gpu::{DTypes, DeviceInputs, HostDType, forward, forward_host, forward_into};
use delta_rule::{BetaTransform, Decay, Error, GateTransform, Ident, Options, Problem, Rule, StateLayout};

use crate::devices::on_every_device;
use crate::sample::{MILD, NEGATIVE, RULES, Sample, Style, assert_close, relative_error, shape};

fn check<R: Runtime>(
    client: &ComputeClient<R>,
    what: &str,
    sample: &Sample,
    options: &Options,
    tolerance: f64,
) {
    let got = sample.with_f32(|x| forward_host(client, HostDType::F32, &sample.problem, options, x));
    assert_close(what, &got.expect("the call is accepted"), &sample.truth(options), tolerance);
}

#[test]
fn every_rule_over_lengths_around_a_chunk() {
    on_every_device!(client, {
        for (i, rule) in RULES.into_iter().enumerate() {
            // 16-step chunks; the same kernels serve all lengths of a rule.
            for tokens in [0, 1, 15, 16, 17, 55] {
                let problem = Problem::new(rule, shape(2, tokens, [1, 2], [32, 16])).unwrap();
                let sample = Sample::new(problem, MILD, (10 * i + tokens) as u64);
                let options = Options::new().with_chunk_size(16);
                check(&client, &format!("{rule:?}, T = {tokens}"), &sample, &options, 1e-5);
            }
        }
    });
}

#[test]
fn every_rule_with_eigenvalues_down_to_minus_one() {
    on_every_device!(client, {
        for rule in RULES {
            let problem = Problem::new(rule, shape(1, 103, [1, 1], [64, 32])).unwrap();
            let sample = Sample::new(problem, NEGATIVE, 5);
            check(&client, &format!("{rule:?}"), &sample, &Options::new(), 1e-5);
        }
    });
}

#[test]
fn odd_and_large_head_dimensions() {
    on_every_device!(client, {
        for (rule, dims) in [
            (Rule::kda(), [60, 100]),
            (Rule::gated_deltanet(), [100, 60]),
            (Rule::kda(), [61, 33]),
            (Rule::gated_deltanet(), [256, 256]),
            (Rule::deltanet(), [1, 1]),
        ] {
            let problem = Problem::new(rule, shape(1, 70, [1, 2], dims)).unwrap();
            check(
                &client,
                &format!("{rule:?} {dims:?}"),
                &Sample::new(problem, MILD, 3),
                &Options::new(),
                1e-5,
            );
        }
    });
}

#[test]
fn many_heads() {
    on_every_device!(client, {
        // So many that each unit of a portable kernel takes a larger part of the state.
        for rule in [Rule::gated_deltanet(), Rule::kda(), Rule::delta_product(2)] {
            let problem = Problem::new(rule, shape(6, 21, [8, 16], [128, 128])).unwrap();
            let sample = Sample::new(problem, MILD, 11);
            let options = Options::new().with_chunk_size(16).with_qk_l2norm(true);
            check(&client, &format!("{rule:?}"), &sample, &options, 1e-5);
        }
    });
}

#[test]
fn packed_sequences_with_empty_ones() {
    on_every_device!(client, {
        for rule in [Rule::gated_deltanet(), Rule::delta_product(2)] {
            let problem = Problem::new(rule, shape(1, 75, [2, 4], [32, 32])).unwrap();
            let problem = problem.with_cu_seqlens(&[0, 0, 1, 34, 34, 66, 75, 75]).unwrap();
            check(&client, &format!("{rule:?}"), &Sample::new(problem, MILD, 8), &Options::new(), 1e-5);
        }
    });
}

#[test]
fn extreme_gates_betas_and_keys() {
    let style = |beta, gate, identical_keys| Style { beta, gate, identical_keys, state: true };
    on_every_device!(client, {
        for (what, rule, style, tolerance) in [
            ("gates to -50", Rule::kda(), style([0.0, 1.0], 50.0, false), 1e-5),
            ("gates to -10000", Rule::kda(), style([0.0, 1.0], 1e4, false), 1e-5),
            ("gates to -50", Rule::gated_deltanet(), style([0.0, 1.0], 50.0, false), 1e-5),
            ("g = 0", Rule::kda(), style([0.0, 1.0], 0.0, false), 1e-5),
            ("beta 0", Rule::deltanet(), style([0.0, 0.0], 0.0, false), 1e-5),
            ("beta 2", Rule::deltanet(), style([2.0, 2.0], 0.0, false), 1e-4),
            ("identical keys, beta 2", Rule::deltanet(), style([2.0, 2.0], 0.0, true), 1e-4),
        ] {
            let problem = Problem::new(rule, shape(1, 99, [1, 1], [64, 32])).unwrap();
            check(&client, what, &Sample::new(problem, style, 4), &Options::new(), tolerance);
        }
    });
}

#[test]
fn fused_options() {
    let bounded = GateTransform::Bounded { lower_bound: -5.0 };
    on_every_device!(client, {
        for (rule, gate, beta, bias) in [
            (Rule::deltanet(), GateTransform::Identity, BetaTransform::TwoSigmoid, false),
            (Rule::gated_deltanet(), GateTransform::Softplus, BetaTransform::Sigmoid, true),
            (Rule::kda(), GateTransform::Softplus, BetaTransform::TwoSigmoid, false),
            (Rule::kda(), bounded, BetaTransform::Sigmoid, true),
        ] {
            let problem = Problem::new(rule, shape(1, 40, [1, 2], [32, 32])).unwrap();
            let mut sample = Sample::new(problem, MILD, 6);
            sample.q.iter_mut().chain(&mut sample.k).for_each(|x| *x *= 3.0);
            if gate != GateTransform::Identity {
                sample = sample.with_gate_formula(7);
            }
            if !bias {
                sample.dt_bias = None;
            }
            let options = Options::new().with_qk_l2norm(true).with_beta(beta).with_gate(gate).with_scale(0.7);
            check(&client, &format!("{rule:?} {gate:?}"), &sample, &options, 1e-5);
        }
    });
}

#[test]
fn both_state_layouts_and_no_state() {
    on_every_device!(client, {
        let problem = Problem::new(Rule::gated_deltanet(), shape(1, 40, [1, 2], [32, 16])).unwrap();
        let value_first = Options::new().with_state_layout(StateLayout::ValueFirst);
        check(&client, "value first", &Sample::new(problem.clone(), MILD, 2), &value_first, 1e-5);
        let stateless = Style { state: false, ..MILD };
        check(&client, "no state", &Sample::new(problem, stateless, 2), &Options::new(), 1e-5);
    });
}

#[test]
fn decoding() {
    on_every_device!(client, {
        for rule in [Rule::gated_deltanet(), Rule::kda(), Rule::delta_product(2)] {
            // A few heads, and so many that units take more of the state; the value-first state is read element by element.
            for (heads, tokens, state_layout) in [
                (2, 1, StateLayout::KeyFirst),
                (96, 1, StateLayout::KeyFirst),
                (96, 2, StateLayout::ValueFirst),
                (96, 5, StateLayout::KeyFirst),
            ] {
                let problem = Problem::new(rule, shape(1, tokens, [heads, heads], [128, 128])).unwrap();
                let options = Options::new().with_state_layout(state_layout);
                let what = format!("{rule:?}, {heads} heads, T = {tokens}");
                check(&client, &what, &Sample::new(problem, MILD, 13), &options, 1e-5);
            }
        }
    });
}

#[test]
fn half_precision() {
    on_every_device!(client, {
        for dtype in [HostDType::F16, HostDType::Bf16] {
            if !client.properties().supports_type(dtype.storage_type()) {
                crate::sample::skipped(format_args!("this device has no {dtype:?}"));
                continue;
            }
            // The portable kernels, also where there are tensor cores: asked for, and since the call is short.
            for (tokens, options) in [(70, Options::new().with_chunk_size(16)), (2, Options::new())] {
                let problem = Problem::new(Rule::kda(), shape(1, tokens, [4, 4], [64, 64])).unwrap();
                let mut sample = Sample::new(problem, MILD, 12);
                sample.round(dtype);
                let got =
                    sample.with_f32(|x| forward_host(&client, dtype, &sample.problem, &options, x)).unwrap();
                let want = sample.truth(&options);
                // Only o is rounded to the type; the arithmetic is f32.
                let tolerance = if dtype == HostDType::F16 { 3e-4 } else { 2.5e-3 };
                assert!(relative_error(&got.o, &want.o) < tolerance, "{dtype:?}, T = {tokens}");
                assert!(
                    relative_error(&got.final_state, &want.final_state) < 1e-5,
                    "{dtype:?}, T = {tokens}"
                );
            }
        }
    });
}

#[test]
fn twenty_runs_give_the_same_bits() {
    on_every_device!(client, {
        let problem = Problem::new(Rule::kda(), shape(1, 40, [1, 2], [32, 16])).unwrap();
        let sample = Sample::new(problem, NEGATIVE, 9);
        let options = Options::new().with_chunk_size(16);
        let run = || {
            sample.with_f32(|x| forward_host(&client, HostDType::F32, &sample.problem, &options, x).unwrap())
        };
        let first = run();
        for _ in 1..20 {
            assert!(run() == first);
        }
    });
}

/// A device tensor with every token row followed by `gap` elements that must be left alone.
fn spaced<R: Runtime>(
    client: &ComputeClient<R>,
    dims: Vec<usize>,
    values: &[f32],
    gap: usize,
) -> TensorHandle<R> {
    let row: usize = dims[2..].iter().product();
    let mut data = vec![f32::NAN; (values.len() / row) * (row + gap)];
    for (to, from) in data.chunks_exact_mut(row + gap).zip(values.chunks_exact(row)) {
        to[..row].copy_from_slice(from);
    }
    let mut strides = vec![1; dims.len()];
    for d in (2..dims.len() - 1).rev() {
        strides[d] = strides[d + 1] * dims[d + 1];
    }
    strides[1] = row + gap;
    strides[0] = dims[1] * (row + gap);
    let handle = client.create_from_slice(f32::as_bytes(&data));
    TensorHandle::new(handle, dims, strides, f32::as_type_native_unchecked())
}

#[test]
fn strides_are_honoured_and_gaps_left_alone() {
    on_every_device!(client, {
        let rule = Rule::gated_deltanet();
        let problem = Problem::new(rule, shape(2, 20, [1, 2], [32, 16])).unwrap();
        let sample = Sample::new(problem.clone(), Style { state: false, ..MILD }, 13);
        let truth = sample.truth(&Options::new());
        for gap in [4, 3] {
            let o =
                spaced(&client, problem.shape_of(Ident::O), &vec![f32::NAN; problem.len_of(Ident::O)], gap);
            let state = vec![f32::NAN; problem.len_of(Ident::FinalState)];
            let state = TensorHandle::<_>::new_contiguous(
                problem.shape_of(Ident::FinalState),
                client.create_from_slice(f32::as_bytes(&state)),
                f32::as_type_native_unchecked().storage_type(),
            );
            let (o_handle, handle) = (o.handle.clone(), state.handle.clone());
            sample.with_f32(|x| {
                let put =
                    |ident, values: &[f32]| spaced(&client, problem.shape_of(ident), values, gap).binding();
                let inputs = DeviceInputs {
                    g: x.g.map(|g| put(Ident::G, g)),
                    ..DeviceInputs::new(
                        put(Ident::Q, x.q),
                        put(Ident::K, x.k),
                        put(Ident::V, x.v),
                        put(Ident::Beta, x.beta),
                    )
                };
                let dtypes = DTypes::all(f32::as_type_native_unchecked().storage_type());
                forward_into(
                    &client,
                    &problem,
                    &Options::new(),
                    inputs,
                    dtypes,
                    o.binding(),
                    state.binding(),
                )
                .unwrap();
            });
            delta_rule::cubecl::future::block_on(client.sync()).unwrap();
            let bytes = client.read_one(handle).unwrap();
            assert!(relative_error(f32::from_bytes(&bytes), &truth.final_state) < 1e-5);
            let bytes = client.read_one(o_handle).unwrap();
            let row = 32;
            let rows = f32::from_bytes(&bytes).chunks_exact(row + gap);
            let o: Vec<f32> = rows.clone().flat_map(|r| r[..row].to_vec()).collect();
            assert!(relative_error(&o, &truth.o) < 1e-5, "gap {gap}");
            assert!(rows.flat_map(|r| &r[row..]).all(|x| x.is_nan()), "a gap was written to");
        }
    });
}

#[test]
fn bad_tensors_are_refused_by_name() {
    on_every_device!(client, {
        let problem = Problem::new(Rule::gated_deltanet(), shape(1, 8, [1, 2], [16, 16])).unwrap();
        let f32 = f32::as_type_native_unchecked().storage_type();
        let new = |dims: Vec<usize>| {
            let bytes = 4 * dims.iter().product::<usize>();
            TensorHandle::<_>::new_contiguous(dims, client.empty(bytes), f32).binding()
        };
        let good = || DeviceInputs {
            g: Some(new(problem.shape_of(Ident::G))),
            ..DeviceInputs::new(
                new(problem.shape_of(Ident::Q)),
                new(problem.shape_of(Ident::K)),
                new(problem.shape_of(Ident::V)),
                new(problem.shape_of(Ident::Beta)),
            )
        };
        let call =
            |inputs, options: &Options, dtypes| forward(&client, &problem, options, inputs, dtypes).err();
        let (options, all) = (Options::new(), DTypes::all(f32));
        assert_eq!(call(good(), &options, all), None);

        let mut bad = good();
        bad.k = new(vec![1, 8, 1, 15]);
        assert!(matches!(call(bad, &options, all), Some(Error::Shape { tensor: "k", .. })));
        let mut bad = good();
        bad.g = Some(new(vec![1, 8, 2, 16]));
        assert!(matches!(call(bad, &options, all), Some(Error::Shape { tensor: "g", .. })));
        let mut bad = good();
        bad.g = None;
        assert!(matches!(call(bad, &options, all), Some(Error::Missing { tensor: "g", .. })));
        let mut bad = good();
        bad.a_log = Some(new(vec![2]));
        assert!(matches!(call(bad, &options, all), Some(Error::Unused { tensor: "a_log", .. })));
        let mut bad = good();
        bad.v.handle = client.empty(64).binding();
        assert!(matches!(call(bad, &options, all), Some(Error::BufferTooSmall { tensor: "v", .. })));
        let mut bad = good();
        bad.q.strides = [128, 16, 16, 2].into();
        assert!(matches!(call(bad, &options, all), Some(Error::Strides { tensor: "q", .. })));
        let f64 = DTypes::all(f64::as_type_native_unchecked().storage_type());
        assert!(matches!(call(good(), &options, f64), Some(Error::DType { .. })));
        let chunk = |n| Options::new().with_chunk_size(n);
        assert!(matches!(call(good(), &chunk(0), all), Some(Error::ChunkSize { got: 0, .. })));
        assert!(matches!(call(good(), &chunk(48), all), Some(Error::ChunkSize { got: 48, .. })));

        // Larger than any device binds: refused from the sizes alone.
        let huge = Problem::new(Rule::deltanet(), shape(1, 1 << 26, [1, 1], [256, 256])).unwrap();
        let fake = |ident| {
            let mut t = new(vec![1]);
            t.shape = huge.shape_of(ident).into();
            let mut strides = vec![1; t.shape.len()];
            for d in (0..t.shape.len() - 1).rev() {
                strides[d] = strides[d + 1] * huge.shape_of(ident)[d + 1];
            }
            t.strides = strides.into();
            t
        };
        let inputs = DeviceInputs::new(fake(Ident::Q), fake(Ident::K), fake(Ident::V), fake(Ident::Beta));
        let error = forward(&client, &huge, &options, inputs, all).err();
        assert!(matches!(error, Some(Error::BufferTooLarge { .. })), "{error:?}");
    });
}

#[test]
fn a_rule_without_gates_takes_none() {
    assert_eq!(Rule::deltanet().decay, Decay::None);
    on_every_device!(client, {
        let problem = Problem::new(Rule::deltanet(), shape(1, 4, [1, 1], [16, 16])).unwrap();
        let mut sample = Sample::new(problem, MILD, 1);
        sample.g = Some(vec![0.0; 4]);
        let got =
            sample.with_f32(|x| forward_host(&client, HostDType::F32, &sample.problem, &Options::new(), x));
        assert!(got.is_err_and(|e| e.to_string().contains("g was given but is not used")));
    });
}
