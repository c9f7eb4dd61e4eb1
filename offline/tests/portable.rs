//! Every portable kernel is generated for CUDA, compiled by NVRTC and `ptxas`, and must not spill.

mod common;

use common::Way::{Backward, Forward};
use common::{RULES, bf16_type, compile_all, f16_type, f32_type, generate};
use delta_rule::{BetaTransform, GateTransform, Options, Rule};

#[test]
fn portable_kernels_compile_without_spills() {
    let plain = Options::new();
    for rule in RULES {
        // Few heads and many: the plan deals the state to units accordingly.
        generate(Forward, rule, 2, [128, 128], f32_type(), &plain);
        generate(Forward, rule, 256, [128, 128], f32_type(), &plain);
        generate(Forward, rule, 2, [64, 64], f16_type(), &plain.clone().with_chunk_size(16));
        generate(Backward, rule, 2, [128, 128], f32_type(), &plain);
        generate(Backward, rule, 256, [128, 128], f32_type(), &plain);
        generate(Backward, rule, 2, [64, 64], f16_type(), &plain.clone().with_chunk_size(16));
    }
    let fused = Options::new().with_qk_l2norm(true).with_beta(BetaTransform::TwoSigmoid);
    let softplus = fused.clone().with_gate(GateTransform::Softplus);
    let bounded = fused.clone().with_gate(GateTransform::Bounded { lower_bound: -5.0 });
    for way in [Forward, Backward] {
        generate(way, Rule::deltanet(), 2, [60, 100], f32_type(), &fused);
        generate(way, Rule::kda(), 2, [256, 256], f32_type(), &softplus);
        generate(way, Rule::kda(), 2, [61, 33], bf16_type(), &bounded);
        generate(way, Rule::gated_deltanet(), 2, [96, 32], f32_type(), &softplus);
    }
    if let Some(kernels) = compile_all() {
        // One of a forward; four of a backward, and one more with a gate formula.
        assert_eq!(kernels.len(), RULES.len() * (3 + 3 * 4) + 4 + 4 * 4 + 3);
    }
}
