//! Problems with results from outside the project, gradients included, on the chunk engines.

mod common;

use common::case::{self, Case};
use common::{gradients_by_name, relative_error};
use delta_rule::{Gradients, Output, Real, chunk};

/// f32 against the truth: looser where eigenvalues reach -1.
fn f32_tolerance(case: &Case) -> f64 {
    if case.name.contains("negative_eigenvalues") { 1e-4 } else { 1e-5 }
}

fn check<T: Real>(case: &Case, engine: &str, got: &Output<T>, gradients: &Gradients<T>, tolerance: f64) {
    let mut all = gradients_by_name(gradients);
    all.extend([("o", &got.o[..]), ("final_state", &got.final_state)]);
    for (name, want) in &case.expect {
        let (_, got) = all.iter().find(|(n, _)| n == name).expect("a known tensor");
        let error = relative_error(got, want);
        assert!(error <= tolerance, "{} on {engine}: {name} is off by {error:.2e}", case.name);
    }
}

#[test]
fn the_chunk_engine_agrees() {
    let mut seen = 0;
    for case in case::all() {
        let (problem, options, tensors) = (&case.problem, &case.options, &case.tensors);
        let got = chunk::forward(problem, options, &tensors.inputs()).unwrap();
        let back = chunk::backward(problem, options, &tensors.inputs(), &tensors.output_gradients()).unwrap();
        check(&case, "chunk in f64", &got, &back, 1e-6);
        let tensors = tensors.to_f32();
        let got = chunk::forward(problem, options, &tensors.inputs()).unwrap();
        let back = chunk::backward(problem, options, &tensors.inputs(), &tensors.output_gradients()).unwrap();
        check(&case, "chunk in f32", &got, &back, f32_tolerance(&case));
        seen += 1;
    }
    assert!(seen >= 4, "only {seen} cases were found");
}

#[cfg(feature = "wgpu")]
#[test]
fn wgpu_agrees() {
    use delta_rule::gpu::{HostDType, backward_host, client, forward_host};
    let client = match client::<delta_rule::cubecl::wgpu::WgpuRuntime>(&Default::default()) {
        Ok(client) => client,
        Err(e) => return common::missing(format_args!("wgpu: {e}")),
    };
    for case in case::all() {
        let (problem, options, tensors) = (&case.problem, &case.options, case.tensors.to_f32());
        let f32 = HostDType::F32;
        let got = forward_host(&client, f32, problem, options, &tensors.inputs()).unwrap();
        let upstream = tensors.output_gradients();
        let back = backward_host(&client, f32, problem, options, &tensors.inputs(), &upstream).unwrap();
        check(&case, "wgpu in f32", &got, &back, f32_tolerance(&case));
    }
}
