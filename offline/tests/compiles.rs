//! Every CUDA kernel is generated, compiled by NVRTC and `ptxas`, and must not spill.

use cubecl::ir::StorageType;
use cubecl::prelude::*;
use delta_rule::gpu::{DTypes, DeviceInputs, forward};
use delta_rule::{BetaTransform, Decay, GateTransform, Ident, Options, Problem, Rule, Shape};
use delta_rule_offline::{OfflineCuda, compile, take_generated, toolchain};

fn tensor(
    client: &ComputeClient<OfflineCuda>,
    shape: Vec<usize>,
    dtype: StorageType,
) -> TensorBinding<OfflineCuda> {
    let bytes = shape.iter().product::<usize>() * dtype.size();
    cubecl::std::tensor::TensorHandle::<OfflineCuda>::new_contiguous(shape, client.empty(bytes), dtype)
        .binding()
}

fn generate(
    rule: Rule,
    value_heads: usize,
    [key_dim, value_dim]: [usize; 2],
    dtype: StorageType,
    options: &Options,
) {
    let client = OfflineCuda::client(&Default::default());
    let shape = Shape { batch: 1, tokens: 64, heads: 1, value_heads, key_dim, value_dim };
    let problem = Problem::new(rule, shape).expect("a valid problem");
    let new = |ident, dtype| tensor(&client, problem.shape_of(ident), dtype);
    let f32 = f32::as_type_native_unchecked().storage_type();
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
    forward(&client, &problem, options, inputs, DTypes::mixed(dtype)).expect("the call is accepted");
    client.flush().expect("the offline device has no faults");
}

#[test]
fn every_kernel_compiles_without_spills() {
    let Some(root) = toolchain() else {
        assert!(
            std::env::var_os("CI").is_none(),
            "CI needs NVRTC and ptxas: set CUDA_PATH and LD_LIBRARY_PATH"
        );
        eprintln!("SKIPPED: no NVRTC and ptxas under CUDA_PATH");
        return;
    };
    let rules = [
        Rule::deltanet(),
        Rule::gated_deltanet(),
        Rule::kda(),
        Rule::delta_product(2),
        Rule::gated_delta_product(3),
    ];
    let f32 = f32::as_type_native_unchecked().storage_type();
    let bf16 = half::bf16::as_type_native_unchecked().storage_type();
    let f16 = half::f16::as_type_native_unchecked().storage_type();
    for rule in rules {
        // Few heads and many: the plan deals rows to units accordingly.
        generate(rule, 2, [128, 128], f32, &Options::new());
        generate(rule, 256, [128, 128], f32, &Options::new());
        generate(rule, 256, [128, 128], bf16, &Options::new());
        generate(rule, 2, [64, 64], f16, &Options::new().with_chunk_size(16));
    }
    let fused = Options::new().with_qk_l2norm(true).with_beta(BetaTransform::TwoSigmoid);
    generate(Rule::deltanet(), 2, [60, 100], f32, &fused);
    generate(Rule::kda(), 2, [256, 256], f32, &fused.clone().with_gate(GateTransform::Softplus));
    generate(
        Rule::kda(),
        2,
        [61, 33],
        bf16,
        &fused.clone().with_gate(GateTransform::Bounded { lower_bound: -5.0 }),
    );
    generate(Rule::gated_deltanet(), 2, [96, 32], f32, &fused.with_gate(GateTransform::Softplus));

    let kernels = take_generated();
    if let Ok(d) = std::env::var("DUMP") { for (i, k) in kernels.iter().enumerate() { std::fs::write(format!("{d}/{i}_{}_{}.cu", k.name, k.units), &k.source).unwrap(); } }
    let mut failures = Vec::new();
    for kernel in &kernels {
        match compile(&root, kernel) {
            Ok(c) => {
                println!(
                    "{:40} units {:4} registers {:3} spills {:4} stack {:4} shared {:6}",
                    kernel.name, kernel.units, c.registers, c.spills, c.stack, kernel.shared_memory
                );
                if c.spills > 0 || c.stack > 0 {
                    failures.push(format!("{} spills {} bytes, stack {}", kernel.name, c.spills, c.stack));
                }
            }
            Err(e) => failures.push(e),
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
