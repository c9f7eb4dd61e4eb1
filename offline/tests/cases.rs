//! The stored cases in bf16 on the emulated tensor cores: no error may exceed that of flash-linear-attention, none of
//! a gradient 1.2 times that.

#[path = "../../tests/common/mod.rs"]
mod common;

use std::path::Path;

use common::{case, gradients_by_name, relative_error};
use cubecl::prelude::*;
use delta_rule::gpu::{HostDType, backward_host, forward_host};
use delta_rule_offline::{OfflineCuda, can_emulate, emulate};

#[test]
fn no_error_exceeds_that_of_fla() {
    if !can_emulate() {
        return common::missing("there is no g++");
    }
    emulate(false);
    let client = OfflineCuda::client(&Default::default());
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut seen = 0;
    // Those of the repository and, where they exist, those beside it.
    for folder in [root.join("tests/cases"), root.join("../shared/cases")] {
        for file in std::fs::read_dir(folder).into_iter().flatten() {
            let path = file.expect("a readable folder").path();
            if path.extension().is_none_or(|e| e != "safetensors") {
                continue;
            }
            if std::env::var("CASE").is_ok_and(|c| !path.to_string_lossy().contains(&c)) {
                continue;
            }
            let case = case::load(&path);
            let narrow = case.tensors.to_f32();
            let got = forward_host(&client, HostDType::Bf16, &case.problem, &case.options, &narrow.inputs());
            let got = got.expect("the call is accepted");
            for (name, got) in [("o", &got.o), ("final_state", &got.final_state)] {
                let (error, fla) = (relative_error(got, &case.expect[name]), case.fla_error[name]);
                println!("{:40} {name:12} {error:.2e}, FLA {fla:.2e}", case.name);
                assert!(error <= fla, "{}: {name} is off by {error:.2e}, FLA by {fla:.2e}", case.name);
            }
            let upstream = narrow.output_gradients();
            let (problem, options) = (&case.problem, &case.options);
            let got = backward_host(&client, HostDType::Bf16, problem, options, &narrow.inputs(), &upstream);
            for (name, got) in gradients_by_name(&got.expect("the call is accepted")) {
                let (Some(want), Some(fla)) = (case.expect.get(name), case.fla_error.get(name)) else {
                    continue;
                };
                let error = relative_error(got, want);
                println!("{:40} {name:12} {error:.2e}, FLA {fla:.2e}", case.name);
                assert!(
                    error <= 1.2 * fla,
                    "{}: the gradient of {name} is off by {error:.2e}, FLA's by {fla:.2e}",
                    case.name
                );
            }
            seen += 1;
        }
    }
    if std::env::var("CASE").is_ok() {
        return;
    }
    assert!(seen >= 4, "only {seen} cases were found");
}
