//! Problems with results from outside the project, on the chunk engines.

mod common;

use common::case::{self, Case};
use common::relative_error;
use delta_rule::{Output, chunk};

/// f32 against the truth: looser where eigenvalues reach -1.
fn f32_tolerance(case: &Case) -> f64 {
    if case.name.contains("negative_eigenvalues") { 1e-4 } else { 1e-5 }
}

fn check<T: delta_rule::Real>(case: &Case, engine: &str, got: &Output<T>, tolerance: f64) {
    for (name, got) in [("o", &got.o), ("final_state", &got.final_state)] {
        let error = relative_error(got, &case.expect[name]);
        assert!(error <= tolerance, "{} on {engine}: {name} is off by {error:.2e}", case.name);
    }
}

#[test]
fn the_chunk_engine_agrees() {
    let mut seen = 0;
    for case in case::all() {
        let got = chunk::forward(&case.problem, &case.options, &case.tensors.inputs()).unwrap();
        check(&case, "chunk in f64", &got, 1e-6);
        let narrow = case.tensors.to_f32();
        let got = chunk::forward(&case.problem, &case.options, &narrow.inputs()).unwrap();
        check(&case, "chunk in f32", &got, f32_tolerance(&case));
        seen += 1;
    }
    assert!(seen >= 4, "only {seen} cases were found");
}

#[cfg(feature = "wgpu")]
#[test]
fn wgpu_agrees() {
    use delta_rule::gpu::{HostDType, client, forward_host};
    let client = match client::<delta_rule::cubecl::wgpu::WgpuRuntime>(&Default::default()) {
        Ok(client) => client,
        Err(e) => {
            assert!(std::env::var_os("CI").is_none(), "CI needs a wgpu device: {e}");
            eprintln!("SKIPPED: {e}");
            return;
        }
    };
    for case in case::all() {
        let narrow = case.tensors.to_f32();
        let got =
            forward_host(&client, HostDType::F32, &case.problem, &case.options, &narrow.inputs()).unwrap();
        check(&case, "wgpu in f32", &got, f32_tolerance(&case));
    }
}
