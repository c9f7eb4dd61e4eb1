//! The backward's tensor-core kernels are generated, compiled by NVRTC and `ptxas`, and must not spill.

mod common;

use common::{RULES, Way, bf16_type, compile_all, compile_with_spills, f16_type, generate};
use delta_rule::{BetaTransform, GateTransform, Options, Rule};
use delta_rule_offline::{Compiled, Generated};

fn check(kernels: Option<Vec<(Generated, Compiled)>>, calls: usize) {
    let Some(kernels) = kernels else { return };
    let named = |name: &str| kernels.iter().filter(|(k, _)| k.name.starts_with(name)).count();
    for name in ["prepare", "sweep", "gradients"] {
        assert_eq!(named(name), calls, "{name}");
    }
    for (kernel, compiled) in &kernels {
        // At K = 128 (with gates per channel 64) two cubes are to share a multiprocessor.
        if kernel.name.starts_with("gradients") && kernel.units == 256 {
            assert!(compiled.registers <= 128, "{} has {} registers", kernel.name, compiled.registers);
        }
    }
}

#[test]
fn backward_kernels_compile_without_spills() {
    let plain = Options::new();
    let fused = Options::new().with_qk_l2norm(true).with_beta(BetaTransform::TwoSigmoid);
    let softplus = fused.clone().with_gate(GateTransform::Softplus);
    let mut calls = 0;
    let mut call = |rule, heads, dims, dtype, options: &Options| {
        generate(Way::Backward, rule, heads, dims, dtype, options);
        calls += 1;
    };
    for rule in RULES {
        // Many heads and few: the widest tile of values and the narrowest.
        for heads in [256, 32, 2] {
            call(rule, heads, [128, 128], bf16_type(), &plain);
        }
        call(rule, 256, [64, 64], bf16_type(), &plain);
        call(rule, 256, [128, 128], f16_type(), &fused);
    }
    for heads in [256, 2] {
        call(Rule::gated_deltanet(), heads, [96, 96], bf16_type(), &softplus);
        call(Rule::gated_deltanet(), heads, [128, 128], bf16_type(), &softplus);
        call(Rule::kda(), heads, [128, 128], bf16_type(), &softplus);
    }
    call(Rule::gated_deltanet(), 256, [128, 128], f16_type(), &plain);
    // Gates per channel, with channels that are padding.
    call(Rule::kda(), 256, [112, 112], bf16_type(), &softplus);
    // States of more than 128 key channels.
    call(Rule::deltanet(), 256, [256, 256], bf16_type(), &plain);
    call(Rule::gated_delta_product(2), 256, [256, 256], bf16_type(), &softplus);
    call(Rule::gated_deltanet(), 2, [256, 256], bf16_type(), &plain);
    call(Rule::gated_deltanet(), 256, [192, 192], bf16_type(), &softplus);
    for dims in [[16, 48], [32, 32], [80, 112], [128, 256]] {
        for heads in [256, 2] {
            call(Rule::gated_deltanet(), heads, dims, bf16_type(), &softplus);
        }
        call(Rule::kda(), 2, dims, bf16_type(), &softplus);
    }
    for dims in [[192, 192], [256, 256]] {
        call(Rule::gated_deltanet(), 256, dims, f16_type(), &fused);
    }
    check(compile_all(), calls);

    // Here `ptxas` spills by its own choice: it has registers left.
    for heads in [256, 2] {
        generate(Way::Backward, Rule::delta_product(2), heads, [48, 48], bf16_type(), &plain);
    }
    check(compile_with_spills(24), 2);
}
