//! Every portable kernel is generated for CUDA, compiled by NVRTC and `ptxas`, and must not spill.

mod common;

use common::{RULES, bf16_type, compile_all, f16_type, f32_type, generate};
use delta_rule::{BetaTransform, GateTransform, Options, Rule};

#[test]
fn portable_kernels_compile_without_spills() {
    let plain = Options::new();
    for rule in RULES {
        // Few heads and many: the plan deals rows to units accordingly.
        generate(rule, 2, [128, 128], f32_type(), &plain);
        generate(rule, 256, [128, 128], f32_type(), &plain);
        generate(rule, 2, [64, 64], f16_type(), &plain.clone().with_chunk_size(16));
    }
    let fused = Options::new().with_qk_l2norm(true).with_beta(BetaTransform::TwoSigmoid);
    generate(Rule::deltanet(), 2, [60, 100], f32_type(), &fused);
    generate(Rule::kda(), 2, [256, 256], f32_type(), &fused.clone().with_gate(GateTransform::Softplus));
    let bounded = fused.clone().with_gate(GateTransform::Bounded { lower_bound: -5.0 });
    generate(Rule::kda(), 2, [61, 33], bf16_type(), &bounded);
    generate(Rule::gated_deltanet(), 2, [96, 32], f32_type(), &fused.with_gate(GateTransform::Softplus));

    if let Some(kernels) = compile_all() {
        assert_eq!(kernels.len(), 2 * (3 * RULES.len() + 4));
    }
}
