//! Which kernels a call takes: shapes decide.

mod common;

use common::{Way, bf16_type, generate_for};
use delta_rule::{Options, Rule};
use delta_rule_offline::take_generated;

#[test]
fn long_sequences_of_few_heads_are_split_and_short_ones_taken_step_by_step() {
    let steps = ["scan"].as_slice();
    let one = ["forward"].as_slice();
    let prepared = ["prepare", "forward"].as_slice();
    let split = ["prepare", "forward", "combine", "forward"].as_slice();
    for (rule, tokens, heads, dim, expected) in [
        // Heads fill the device.
        (Rule::gated_deltanet(), 2048, 256, 64, one),
        (Rule::gated_deltanet(), 65536, 128, 16, one),
        (Rule::kda(), 4096, 128, 32, prepared),
        // They nearly do by value channels; transfers would cost more than idle multiprocessors.
        (Rule::gated_deltanet(), 8192, 32, 128, prepared),
        (Rule::kda(), 8192, 32, 128, prepared),
        // Short: launches cost more than the chain of chunks.
        (Rule::gated_deltanet(), 1024, 1, 128, prepared),
        (Rule::gated_deltanet(), 1024, 8, 128, prepared),
        (Rule::gated_deltanet(), 32768, 8, 128, split),
        (Rule::deltanet(), 32768, 16, 128, split),
        (Rule::kda(), 32768, 8, 128, split),
        (Rule::gated_delta_product(3), 8192, 4, 128, split),
        (Rule::gated_deltanet(), 8192, 1, 256, split),
        (Rule::gated_deltanet(), 4, 256, 128, steps),
        (Rule::gated_deltanet(), 5, 256, 128, one),
        (Rule::kda(), 1, 2, 128, steps),
        (Rule::gated_delta_product(3), 1, 2, 128, steps),
        (Rule::gated_delta_product(3), 2, 256, 128, one),
    ] {
        generate_for(Way::Forward, rule, tokens, heads, [dim, dim], bf16_type(), &Options::new());
        let kernels = take_generated();
        let names: Vec<_> = kernels.iter().filter_map(|k| k.name.split('_').next()).collect();
        assert_eq!(names, expected, "{rule:?}, T = {tokens}, {heads} heads, K = V = {dim}");
    }
}
