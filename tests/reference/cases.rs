use delta_rule::reference::{backward, forward};

use crate::common::{assert_close, case, gradients_by_name};

#[test]
fn agrees_with_every_case() {
    for case in case::all() {
        let (problem, options, tensors) = (&case.problem, &case.options, &case.tensors);
        let output = forward(problem, options, &tensors.inputs()).unwrap();
        let gradients = backward(problem, options, &tensors.inputs(), &tensors.output_gradients()).unwrap();
        let mut got = gradients_by_name(&gradients);
        got.extend([("o", &output.o[..]), ("final_state", &output.final_state)]);
        for (name, want) in &case.expect {
            let (_, got) = got.iter().find(|(n, _)| n == name).expect("a known tensor");
            assert_close(&format!("{}: {name}", case.name), got, want, 1e-6);
        }
    }
}

/// In f32 the token loop must be far closer to the truth than kernels with bf16 operands are.
#[test]
fn f32_is_closer_than_fla() {
    for case in case::all() {
        let (problem, options, tensors) = (&case.problem, &case.options, case.tensors.to_f32());
        let output = forward(problem, options, &tensors.inputs()).unwrap();
        let gradients = backward(problem, options, &tensors.inputs(), &tensors.output_gradients()).unwrap();
        let mut got = gradients_by_name(&gradients);
        got.extend([("o", &output.o[..]), ("final_state", &output.final_state)]);
        for (name, fla) in &case.fla_error {
            let (_, got) = got.iter().find(|(n, _)| n == name).expect("a known tensor");
            assert_close(&format!("{}: {name}", case.name), got, &case.expect[name], fla / 100.0);
        }
    }
}
