//! The gradients of every input against those of the reference.

use delta_rule::cubecl::prelude::*;
use delta_rule::cubecl::std::tensor::TensorHandle;
use delta_rule::gpu::{
    DTypes, DeviceInputs, DeviceOutputGradients, HostDType, backward, backward_host, forward_saving,
};
use delta_rule::{BetaTransform, Error, GateTransform, Ident, Options, Problem, Rule, StateLayout};

use crate::devices::on_every_device;
use crate::sample::{
    MILD, NEGATIVE, RULES, Sample, Style, Upstream, assert_gradients_close, relative_error, round, shape,
};

fn check<R: Runtime>(
    client: &ComputeClient<R>,
    what: &str,
    sample: &Sample,
    options: &Options,
    tolerance: f64,
) {
    check_in(client, HostDType::F32, what, sample, options, tolerance);
}

/// The gradient of o is rounded to `dtype`, too.
fn check_in<R: Runtime>(
    client: &ComputeClient<R>,
    dtype: HostDType,
    what: &str,
    sample: &Sample,
    options: &Options,
    tolerance: f64,
) {
    let mut upstream = Upstream::new(&sample.problem, 77);
    round(&mut upstream.o, dtype);
    let want = sample.gradients(options, &upstream);
    let upstream = upstream.to_f32();
    let got = sample
        .with_f32(|x| backward_host(client, dtype, &sample.problem, options, x, &upstream.view()))
        .unwrap();
    assert_gradients_close(what, &got, &want, tolerance);
}

#[test]
fn every_rule_over_lengths_around_a_chunk() {
    on_every_device!(client, {
        for (i, rule) in RULES.into_iter().enumerate() {
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
            check(&client, &format!("{rule:?}"), &Sample::new(problem, NEGATIVE, 5), &Options::new(), 2e-5);
        }
    });
}

#[test]
fn odd_and_large_head_dimensions() {
    on_every_device!(client, {
        for (rule, dims) in [
            (Rule::kda(), [60, 100]),
            (Rule::kda(), [61, 33]),
            (Rule::gated_deltanet(), [256, 256]),
            (Rule::deltanet(), [1, 1]),
        ] {
            let problem = Problem::new(rule, shape(1, 70, [1, 2], dims)).unwrap();
            let sample = Sample::new(problem, MILD, 3);
            check(&client, &format!("{rule:?} {dims:?}"), &sample, &Options::new(), 1e-5);
        }
    });
}

#[test]
fn many_heads() {
    on_every_device!(client, {
        // So many that each unit of a portable kernel takes a larger part of the state.
        for rule in [Rule::gated_deltanet(), Rule::kda(), Rule::delta_product(2)] {
            let problem = Problem::new(rule, shape(6, 21, [8, 16], [128, 128])).unwrap();
            let options = Options::new().with_chunk_size(16).with_qk_l2norm(true);
            check(&client, &format!("{rule:?}"), &Sample::new(problem, MILD, 11), &options, 1e-5);
        }
    });
}

#[test]
fn packed_sequences_with_empty_ones() {
    on_every_device!(client, {
        for rule in [Rule::kda(), Rule::gated_delta_product(3)] {
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
            ("gates to -50", Rule::gated_delta_product(2), style([0.0, 1.0], 50.0, false), 1e-5),
            ("g = 0", Rule::kda(), style([0.0, 1.0], 0.0, false), 1e-5),
            ("beta 0", Rule::gated_deltanet(), style([0.0, 0.0], 0.1, false), 1e-5),
            ("beta 2", Rule::deltanet(), style([2.0, 2.0], 0.0, false), 1e-4),
            ("identical keys, beta 2", Rule::deltanet(), style([2.0, 2.0], 0.0, true), 1e-4),
        ] {
            let problem = Problem::new(rule, shape(1, 99, [1, 1], [64, 32])).unwrap();
            check(&client, what, &Sample::new(problem, style, 4), &Options::new(), tolerance);
        }
    });
}

/// Every gate is strong, so that the true gradient of g is far below the terms it is made of.
#[test]
fn the_gradient_of_strong_gates_is_not_buried() {
    on_every_device!(client, {
        for rule in [Rule::gated_deltanet(), Rule::kda(), Rule::gated_delta_product(2)] {
            let problem = Problem::new(rule, shape(1, 40, [1, 1], [32, 16])).unwrap();
            let mut sample = Sample::new(problem, MILD, 4);
            sample.g.iter_mut().flatten().for_each(|g| *g -= 15.0);
            check(&client, &format!("{rule:?}"), &sample, &Options::new(), 1e-5);
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
            let problem = Problem::new(rule, shape(2, 40, [1, 2], [32, 32])).unwrap();
            let mut sample = Sample::new(problem, MILD, 6);
            sample.q.iter_mut().chain(&mut sample.k).for_each(|x| *x *= 3.0);
            if gate != GateTransform::Identity {
                sample = sample.with_gate_formula(7);
            }
            if !bias {
                sample.dt_bias = None;
            }
            let options = Options::new().with_qk_l2norm(true).with_beta(beta).with_gate(gate).with_scale(0.7);
            check(&client, &format!("{rule:?} {gate:?}"), &sample, &options, 2e-5);
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
fn half_precision() {
    on_every_device!(client, {
        for dtype in [HostDType::F16, HostDType::Bf16] {
            if !client.properties().supports_type(dtype.storage_type()) {
                crate::sample::skipped(format_args!("this device has no {dtype:?}"));
                continue;
            }
            // The portable kernels, also where there are tensor cores, which take neither this chunk size nor these
            // dimensions. Only what comes and goes is rounded to the type; the arithmetic is f32.
            let tolerance = if dtype == HostDType::F16 { 3e-4 } else { 2.5e-3 };
            for (dims, options) in
                [([64, 64], Options::new().with_chunk_size(16)), ([72, 72], Options::new())]
            {
                let problem = Problem::new(Rule::kda(), shape(1, 70, [1, 1], dims)).unwrap();
                let mut sample = Sample::new(problem, MILD, 12);
                sample.round(dtype);
                check_in(&client, dtype, "KDA", &sample, &options, tolerance);
            }
        }
    });
}

#[test]
fn twenty_runs_give_the_same_bits() {
    on_every_device!(client, {
        let problem = Problem::new(Rule::kda(), shape(1, 40, [1, 2], [32, 16])).unwrap();
        let sample = Sample::new(problem, NEGATIVE, 9);
        let upstream = Upstream { final_state: None, ..Upstream::new(&sample.problem, 1).to_f32() };
        let options = Options::new().with_chunk_size(16);
        let run = || {
            sample.with_f32(|x| {
                backward_host(&client, HostDType::F32, &sample.problem, &options, x, &upstream.view())
                    .unwrap()
            })
        };
        let first = run();
        for _ in 1..20 {
            assert!(run() == first);
        }
    });
}

/// The gradient of a sum of all of o is one number, broadcast.
#[test]
fn a_broadcast_gradient_and_a_saved_call() {
    on_every_device!(client, {
        let problem = Problem::new(Rule::deltanet(), shape(1, 40, [1, 2], [32, 16])).unwrap();
        let sample = Sample::new(problem.clone(), Style { state: false, ..MILD }, 13);
        let ones = Upstream { o: vec![1.0; problem.len_of(Ident::O)], final_state: None };
        let want = sample.gradients(&Options::new(), &ones);
        let f32 = f32::as_type_native_unchecked().storage_type();
        let put = |dims: Vec<usize>, x: &[f32]| {
            TensorHandle::<_>::new_contiguous(dims, client.create_from_slice(f32::as_bytes(x)), f32).binding()
        };
        let inputs = sample.with_f32(|x| {
            let put = |ident, x| put(problem.shape_of(ident), x);
            DeviceInputs::new(
                put(Ident::Q, x.q),
                put(Ident::K, x.k),
                put(Ident::V, x.v),
                put(Ident::Beta, x.beta),
            )
        });
        let (_, saved) =
            forward_saving(&client, &problem, &Options::new(), inputs, DTypes::all(f32)).unwrap();
        let mut o = put(vec![16], &[1.0; 16]);
        (o.shape, o.strides) = (problem.shape_of(Ident::O).into(), [0, 0, 0, 1].into());
        let got = saved.backward(&client, DeviceOutputGradients { o, final_state: None }).unwrap();
        delta_rule::cubecl::future::block_on(client.sync()).unwrap();
        for (name, got, want) in [("q", got.q, &want.q), ("k", got.k, &want.k), ("v", got.v, &want.v)] {
            let bytes = client.read_one(got.handle).unwrap();
            assert!(relative_error(f32::from_bytes(&bytes), want) < 1e-5, "{name}");
        }
    });
}

#[test]
fn bad_gradients_are_refused_by_name() {
    on_every_device!(client, {
        let problem = Problem::new(Rule::deltanet(), shape(1, 8, [1, 2], [16, 16])).unwrap();
        let f32 = f32::as_type_native_unchecked().storage_type();
        let new = |dims: Vec<usize>| {
            let bytes = 4 * dims.iter().product::<usize>();
            TensorHandle::<_>::new_contiguous(dims, client.empty(bytes), f32).binding()
        };
        let call = |o, final_state| {
            let inputs = DeviceInputs::new(
                new(problem.shape_of(Ident::Q)),
                new(problem.shape_of(Ident::K)),
                new(problem.shape_of(Ident::V)),
                new(problem.shape_of(Ident::Beta)),
            );
            let gradients = DeviceOutputGradients { o, final_state };
            backward(&client, &problem, &Options::new(), inputs, gradients, DTypes::all(f32)).err()
        };
        let good = || new(problem.shape_of(Ident::O));
        assert_eq!(call(good(), None), None);
        let error = call(new(vec![1, 8, 1, 16]), None);
        assert!(matches!(error, Some(Error::Shape { tensor: "gradient of o", .. })), "{error:?}");
        let error = call(good(), Some(new(vec![1, 2, 16, 15])));
        assert!(matches!(error, Some(Error::Shape { tensor: "gradient of final_state", .. })), "{error:?}");
    });
}
