use delta_rule::reference::{backward, forward};
use delta_rule::{
    BetaTransform, Error, GateTransform, Inputs, MAX_HEAD_DIM, Options, OutputGradients, Problem, Rule, Shape,
};

use crate::common::{Generator, Tensors, problem};

const SIZES: [usize; 6] = [1, 4, 1, 2, 3, 2];

fn gated() -> (Problem, Tensors<f64>) {
    let p = problem(Rule::kda(), SIZES);
    let tensors = Generator::new(1).tensors(&p, &Options::new());
    (p, tensors)
}

/// Both directions refuse alike.
fn refused(p: &Problem, options: &Options, inputs: &Inputs<'_, f64>) -> Error {
    let error = forward(p, options, inputs).unwrap_err();
    let d_o = vec![0.0; inputs.v.len()];
    let from_backward = backward(p, options, inputs, &OutputGradients { o: &d_o, final_state: None });
    assert_eq!(from_backward.unwrap_err(), error);
    error
}

#[test]
fn length() {
    let (p, _) = gated();
    let options = Options::new().with_gate(GateTransform::Softplus).with_beta(BetaTransform::Sigmoid);
    let tensors = Generator::new(1).tensors(&p, &options);
    for which in 0..8 {
        for change in [-1isize, 1] {
            let mut wrong = tensors.clone();
            let (name, x) = wrong.inputs_mut().swap_remove(which);
            let expected = x.len();
            let got = expected.strict_add_signed(change);
            x.resize(got, 0.0);
            let error = refused(&p, &options, &wrong.inputs());
            let Error::Length { tensor, shape, expected: e, got: g } = error else { panic!("{error}") };
            assert_eq!((tensor, e, g), (name, expected, got));
            assert_eq!(shape.iter().product::<usize>(), expected);
        }
    }
}

#[test]
fn length_of_output_gradients() {
    let (p, tensors) = gated();
    let good = tensors.output_gradients();
    let state = good.final_state.unwrap();
    let short = OutputGradients { o: &good.o[1..], ..good };
    let short_state = OutputGradients { final_state: Some(&state[1..]), ..good };
    for (gradients, name) in [(short, "gradient of o"), (short_state, "gradient of final_state")] {
        let error = backward(&p, &Options::new(), &tensors.inputs(), &gradients).unwrap_err();
        assert!(matches!(error, Error::Length { tensor, .. } if tensor == name), "{error}");
    }
}

#[test]
fn missing() {
    let (p, tensors) = gated();
    let without_g = Inputs { g: None, ..tensors.inputs() };
    let error = refused(&p, &Options::new(), &without_g);
    assert!(matches!(error, Error::Missing { tensor: "g", .. }), "{error}");
    let formula = Options::new().with_gate(GateTransform::Softplus);
    let error = refused(&p, &formula, &tensors.inputs());
    assert!(matches!(error, Error::Missing { tensor: "a_log", .. }), "{error}");
}

#[test]
fn unused() {
    let (p, tensors) = gated();
    let plain = problem(Rule::deltanet(), SIZES);
    let error = refused(&plain, &Options::new(), &tensors.inputs());
    assert!(matches!(error, Error::Unused { tensor: "g", .. }), "{error}");
    let a_log = Inputs { a_log: Some(&[0.0; 2]), ..tensors.inputs() };
    let error = refused(&p, &Options::new(), &a_log);
    assert!(matches!(error, Error::Unused { tensor: "a_log", .. }), "{error}");
    let dt_bias = Inputs { dt_bias: Some(&[0.0; 6]), ..tensors.inputs() };
    let error = refused(&p, &Options::new(), &dt_bias);
    assert!(matches!(error, Error::Unused { tensor: "dt_bias", .. }), "{error}");
}

#[test]
fn chunk_size() {
    let (p, tensors) = gated();
    let error = refused(&p, &Options::new().with_chunk_size(0), &tensors.inputs());
    assert!(matches!(error, Error::ChunkSize { got: 0, .. }), "{error}");
    let any = forward(&p, &Options::new().with_chunk_size(7), &tensors.inputs()).unwrap();
    assert_eq!(any, forward(&p, &Options::new(), &tensors.inputs()).unwrap());
}

#[test]
fn invalid_option() {
    let (p, tensors) = gated();
    for scale in [f64::NAN, f64::INFINITY] {
        let error = refused(&p, &Options::new().with_scale(scale), &tensors.inputs());
        assert!(matches!(error, Error::InvalidOption { option: "scale", .. }), "{error}");
    }
    for lower_bound in [0.0, 1.0, f64::NAN, f64::NEG_INFINITY] {
        let options = Options::new().with_gate(GateTransform::Bounded { lower_bound });
        let error = refused(&p, &options, &tensors.inputs());
        assert!(matches!(error, Error::InvalidOption { option: "gate", .. }), "{error}");
    }
    let plain = problem(Rule::deltanet(), SIZES);
    let inputs = Inputs { g: None, ..tensors.inputs() };
    let error = refused(&plain, &Options::new().with_gate(GateTransform::Softplus), &inputs);
    assert!(matches!(error, Error::InvalidOption { option: "gate", .. }), "{error}");
}

const SHAPE: Shape = Shape { batch: 1, tokens: 10, heads: 2, value_heads: 4, key_dim: 3, value_dim: 3 };

#[test]
fn value_heads() {
    for value_heads in [0, 1, 3] {
        let error = Problem::new(Rule::deltanet(), Shape { value_heads, ..SHAPE }).unwrap_err();
        assert_eq!(error, Error::ValueHeads { heads: 2, value_heads });
    }
}

#[test]
fn size() {
    let over = MAX_HEAD_DIM + 1;
    let wrong = [
        ("micro_steps (n_h)", Rule::delta_product(0), SHAPE),
        ("batch (B)", Rule::kda(), Shape { batch: 0, ..SHAPE }),
        ("heads (H)", Rule::kda(), Shape { heads: 0, ..SHAPE }),
        ("key_dim (K)", Rule::kda(), Shape { key_dim: 0, ..SHAPE }),
        ("key_dim (K)", Rule::kda(), Shape { key_dim: over, ..SHAPE }),
        ("value_dim (V)", Rule::kda(), Shape { value_dim: 0, ..SHAPE }),
        ("value_dim (V)", Rule::kda(), Shape { value_dim: over, ..SHAPE }),
        ("the number of elements", Rule::kda(), Shape { tokens: usize::MAX / 2, ..SHAPE }),
    ];
    for (what, rule, shape) in wrong {
        let error = Problem::new(rule, shape).unwrap_err();
        assert!(matches!(error, Error::Size { name, .. } if name == what), "{what}: {error}");
    }
}

#[track_caller]
fn refused_packing(shape: Shape, cu_seqlens: &[usize], why: &str) {
    let error = Problem::new(Rule::kda(), shape).unwrap().with_cu_seqlens(cu_seqlens).unwrap_err();
    assert!(matches!(&error, Error::CuSeqlens { tokens: 10, problem } if problem == why), "{error}");
}

#[test]
fn cu_seqlens_with_a_batch() {
    refused_packing(Shape { batch: 2, ..SHAPE }, &[0, 10], "the batch is 2");
}

#[test]
fn cu_seqlens_too_short() {
    refused_packing(SHAPE, &[0], "it has 1 entries, at least 2 are needed");
}

#[test]
fn cu_seqlens_start() {
    refused_packing(SHAPE, &[1, 10], "it starts at 1");
}

#[test]
fn cu_seqlens_decreasing() {
    refused_packing(SHAPE, &[0, 6, 5, 10], "entry 2 is 5 after 6");
}

#[test]
fn cu_seqlens_end() {
    refused_packing(SHAPE, &[0, 6, 9], "it ends at 9");
}
