//! Every blueprint of the tensor-core kernel is generated, compiled by NVRTC and `ptxas`, and must not spill.

mod common;

use common::{RULES, Way, bf16_type, compile_all, f16_type, generate, generate_for};
use delta_rule::{BetaTransform, GateTransform, Options, Rule};

#[test]
fn tensor_core_kernels_compile_without_spills() {
    let plain = Options::new();
    let fused = Options::new().with_qk_l2norm(true).with_beta(BetaTransform::TwoSigmoid);
    let mut calls = 0;
    let mut call = |rule, heads, dims, dtype, options: &Options| {
        generate(Way::Forward, rule, heads, dims, dtype, options);
        calls += 1;
    };
    for rule in RULES {
        // Many heads and few: the widest tile of values and the narrowest.
        for heads in [256, 64, 32, 2] {
            call(rule, heads, [128, 128], bf16_type(), &plain);
        }
        call(rule, 256, [64, 64], bf16_type(), &plain);
        call(rule, 256, [256, 256], bf16_type(), &plain);
        call(rule, 256, [128, 128], f16_type(), &fused);
    }
    let gates = fused.clone().with_gate(GateTransform::Softplus);
    call(Rule::kda(), 256, [128, 128], bf16_type(), &gates);
    for dims in [[96, 96], [16, 48], [80, 112], [240, 144]] {
        for heads in [256, 2] {
            call(Rule::gated_deltanet(), heads, dims, bf16_type(), &gates);
        }
        call(Rule::kda(), 256, dims, bf16_type(), &gates);
    }
    // Long sequences of few heads are split: one kernel for the transfers of segments and for the segments.
    let mut splits = 0;
    let mut split = |rule, tokens, heads, dims, dtype| {
        generate_for(Way::Forward, rule, tokens, heads, dims, dtype, &plain);
        splits += 1;
    };
    for rule in RULES {
        // Wide tiles, and narrow ones.
        split(rule, 32768, 8, [128, 128], bf16_type());
        split(rule, 4096, 1, [128, 128], bf16_type());
        split(rule, 32768, 2, [64, 64], f16_type());
    }
    for dims in [[16, 48], [80, 112], [240, 144], [256, 256]] {
        split(Rule::gated_deltanet(), 16384, 2, dims, bf16_type());
    }
    if let Some(kernels) = compile_all() {
        let named = |name: &str| kernels.iter().filter(|(k, _)| k.name.starts_with(name)).count();
        assert_eq!(named("forward"), calls + 2 * splits);
        assert_eq!(named("combine"), splits);
        assert_eq!(named("forward") + named("prepare") + named("combine"), kernels.len());
    }
}
