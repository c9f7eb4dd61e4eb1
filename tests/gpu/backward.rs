//! The gradients of every input against those of the reference.

use delta_rule::cubecl::prelude::*;
use delta_rule::gpu::{HostDType, backward_host};
use delta_rule::{
    BetaTransform, GateTransform, Gradients, Ident, Options, OutputGradients, Problem, Rule, StateLayout,
    reference,
};

use crate::devices::on_every_device;
use crate::sample::{MILD, NEGATIVE, RULES, Rng, Sample, Style, relative_error, shape};

/// Random gradients of o and of the final state, rounded to f32.
fn upstream(problem: &Problem, seed: u64) -> (Vec<f64>, Vec<f64>) {
    let mut rng = Rng::new(seed);
    let mut random = |ident| -> Vec<f64> {
        (0..problem.len_of(ident)).map(|_| rng.signed() as f32 as f64).collect()
    };
    (random(Ident::O), random(Ident::FinalState))
}

fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

fn errors(got: &Gradients<f32>, want: &Gradients<f64>) -> Vec<(&'static str, f64)> {
    let mut errors = vec![
        ("q", relative_error(&got.q, &want.q)),
        ("k", relative_error(&got.k, &want.k)),
        ("v", relative_error(&got.v, &want.v)),
        ("beta", relative_error(&got.beta, &want.beta)),
        ("initial_state", relative_error(&got.initial_state, &want.initial_state)),
    ];
    for (name, got, want) in
        [("g", &got.g, &want.g), ("a_log", &got.a_log, &want.a_log), ("dt_bias", &got.dt_bias, &want.dt_bias)]
    {
        assert_eq!(got.is_some(), want.is_some(), "{name} is there or not");
        if let (Some(got), Some(want)) = (got, want) {
            errors.push((name, relative_error(got, want)));
        }
    }
    errors
}

fn check<R: Runtime>(
    client: &ComputeClient<R>,
    what: &str,
    sample: &Sample,
    options: &Options,
    tolerance: f64,
) {
    let problem = &sample.problem;
    let (d_o, d_state) = upstream(problem, 77);
    let gradients = OutputGradients { o: &d_o, final_state: Some(&d_state) };
    let want = reference::backward(problem, options, &sample.inputs(), &gradients).unwrap();
    let (d_o, d_state) = (narrow(&d_o), narrow(&d_state));
    let gradients = OutputGradients { o: &d_o, final_state: Some(&d_state) };
    let got =
        sample.with_f32(|x| backward_host(client, HostDType::F32, problem, options, x, &gradients)).unwrap();
    for (name, error) in errors(&got, &want) {
        assert!(
            error <= tolerance,
            "{what}: the gradient of {name} is off by {error:.2e}, allowed {tolerance:.0e}"
        );
    }
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
