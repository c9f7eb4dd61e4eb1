//! Generates the kernels of a call and compiles them.

#![allow(dead_code, reason = "each test binary uses a part")]

#[path = "../../../tests/common/skip.rs"]
mod skip;

use cubecl::ir::StorageType;
use cubecl::prelude::*;
use delta_rule::gpu::{DTypes, DeviceInputs, DeviceOutputGradients, backward, forward};
use delta_rule::{Decay, GateTransform, Ident, Options, Problem, Rule, Shape};
use delta_rule_offline::{Compiled, Generated, OfflineCuda, compile, take_generated, toolchain};
use rayon::prelude::*;
use skip::missing;

pub(crate) const RULES: [Rule; 5] = [
    Rule::deltanet(),
    Rule::gated_deltanet(),
    Rule::kda(),
    Rule::delta_product(2),
    Rule::gated_delta_product(3),
];

pub(crate) fn f32_type() -> StorageType {
    f32::as_type_native_unchecked().storage_type()
}

pub(crate) fn bf16_type() -> StorageType {
    half::bf16::as_type_native_unchecked().storage_type()
}

pub(crate) fn f16_type() -> StorageType {
    half::f16::as_type_native_unchecked().storage_type()
}

fn tensor(
    client: &ComputeClient<OfflineCuda>,
    shape: Vec<usize>,
    dtype: StorageType,
) -> TensorBinding<OfflineCuda> {
    let bytes = shape.iter().product::<usize>() * dtype.size();
    cubecl::std::tensor::TensorHandle::<OfflineCuda>::new_contiguous(shape, client.empty(bytes), dtype)
        .binding()
}

/// What is generated: the kernels of a forward or of a backward.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Way {
    Forward,
    Backward,
}

/// Runs the front door on the offline device.
pub(crate) fn generate(
    way: Way,
    rule: Rule,
    value_heads: usize,
    dims: [usize; 2],
    dtype: StorageType,
    options: &Options,
) {
    generate_for(way, rule, 64, value_heads, dims, dtype, options);
}

/// The same for one sequence of any length.
pub(crate) fn generate_for(
    way: Way,
    rule: Rule,
    tokens: usize,
    value_heads: usize,
    [key_dim, value_dim]: [usize; 2],
    dtype: StorageType,
    options: &Options,
) {
    let client = OfflineCuda::client(&Default::default());
    let shape = Shape { batch: 1, tokens, heads: 1, value_heads, key_dim, value_dim };
    let problem = Problem::new(rule, shape).expect("a valid problem");
    let new = |ident, dtype| tensor(&client, problem.shape_of(ident), dtype);
    let f32 = f32_type();
    let formula = options.gate != GateTransform::Identity;
    let inputs = DeviceInputs {
        g: (rule.decay != Decay::None).then(|| new(Ident::G, f32)),
        a_log: formula.then(|| new(Ident::ALog, f32)),
        dt_bias: formula.then(|| new(Ident::DtBias, f32)),
        initial_state: Some(new(Ident::InitialState, f32)),
        ..DeviceInputs::new(
            new(Ident::Q, dtype),
            new(Ident::K, dtype),
            new(Ident::V, dtype),
            new(Ident::Beta, f32),
        )
    };
    let dtypes = DTypes::mixed(dtype);
    if way == Way::Forward {
        forward(&client, &problem, options, inputs, dtypes).expect("the call is accepted");
    } else {
        let upstream =
            DeviceOutputGradients { o: new(Ident::O, dtype), final_state: Some(new(Ident::FinalState, f32)) };
        backward(&client, &problem, options, inputs, upstream, dtypes).expect("the call is accepted");
    }
    client.flush().expect("the offline device has no faults");
}

/// Compiles all that was generated since the last call: nothing may spill. `None`, said aloud, without a
/// toolchain.
pub(crate) fn compile_all() -> Option<Vec<(Generated, Compiled)>> {
    compile_with_spills(0)
}

/// The same where `ptxas` may choose to spill so many bytes, for room for one more cube on a multiprocessor.
pub(crate) fn compile_with_spills(most: u32) -> Option<Vec<(Generated, Compiled)>> {
    let kernels = take_generated();
    let Some(root) = toolchain() else {
        missing("no NVRTC and ptxas: CUDA_PATH and LD_LIBRARY_PATH lead to none");
        return None;
    };
    let mut failures = Vec::new();
    let results: Vec<_> = kernels.par_iter().map(|kernel| compile(&root, kernel)).collect();
    let mut compiled = Vec::new();
    for (kernel, result) in kernels.into_iter().zip(results) {
        match result {
            Ok(c) => {
                println!(
                    "{:40} units {:4} registers {:3} spills {:4} stack {:4} shared {:6}",
                    kernel.name, kernel.units, c.registers, c.spills, c.stack, kernel.shared_memory
                );
                if c.spills > most || c.stack > most {
                    failures.push(format!("{} spills {} bytes, stack {}", kernel.name, c.spills, c.stack));
                }
                compiled.push((kernel, c));
            }
            Err(e) => failures.push(e),
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    Some(compiled)
}
