//! What distinguishes a kernel from others.

mod common;

use std::collections::BTreeSet;

use common::{RULES, Way, bf16_type, f32_type, generate, generate_for};
use delta_rule::{GateTransform, Options, Rule};
use delta_rule_kernels::SOURCES;
use delta_rule_offline::take_generated;

#[test]
fn every_kernel_is_told_from_those_of_other_sources() {
    let softplus = Options::new().with_gate(GateTransform::Softplus);
    for dtype in [bf16_type(), f32_type()] {
        for rule in RULES {
            for way in [Way::Forward, Way::Backward] {
                generate(way, rule, 2, [64, 64], dtype, &Options::new());
            }
        }
        generate(Way::Backward, Rule::gated_deltanet(), 2, [64, 64], dtype, &softplus);
    }
    generate_for(Way::Forward, Rule::deltanet(), 8192, 1, [64, 64], bf16_type(), &Options::new());
    let mut seen = BTreeSet::new();
    for kernel in take_generated() {
        assert!(
            kernel.key.contains(SOURCES.0),
            "{} could be one of older sources: {}",
            kernel.name,
            kernel.key
        );
        seen.insert(kernel.key.split('<').next().expect("a type").to_owned());
    }
    for name in [
        "mma::prepare::prepare::Prepare",
        "mma::prepare::prepare_by_channel::PrepareByChannel",
        "mma::forward::Forward",
        "mma::combine::combine::Combine",
        "mma::sweep::sweep::Sweep",
        "mma::gradients::gradients::Gradients",
        "mma::gradients::collect::collect::Collect",
        "mma::gradients::collect::collect_constants::CollectConstants",
        "portable::scan::scan::Scan",
        "portable::sweep::sweep::Sweep",
        "portable::gradients::gradients::Gradients",
        "portable::collect::collect::Collect",
        "portable::collect::collect_constants::CollectConstants",
    ] {
        assert!(seen.iter().any(|s| s.ends_with(name)), "{name} is not among {seen:#?}");
    }
}
