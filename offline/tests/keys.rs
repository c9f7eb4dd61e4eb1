//! What a kernel is found by: CubeCL goes by its key, compilers and their caches by its source.

mod common;

use std::collections::BTreeSet;

use common::{RULES, Way, bf16_type, f32_type, generate, generate_for};
use cubecl::ir::StorageType;
use delta_rule::{GateTransform, Options, Rule};
use delta_rule_kernels::SOURCES;
use delta_rule_offline::{Generated, take_generated};

/// Every kernel for data of this type.
fn kernels(dtype: StorageType) -> Vec<Generated> {
    let plain = Options::new();
    let fused = Options::new().with_qk_l2norm(true).with_gate(GateTransform::Softplus);
    for way in [Way::Forward, Way::Backward] {
        for rule in RULES {
            generate(way, rule, 2, [64, 64], dtype, &plain);
        }
        for heads in [2, 256] {
            generate(way, Rule::gated_deltanet(), heads, [128, 64], dtype, &fused);
            generate(way, Rule::kda(), heads, [64, 128], dtype, &fused);
        }
    }
    generate_for(Way::Forward, Rule::deltanet(), 8192, 1, [64, 64], dtype, &plain);
    take_generated()
}

/// A source without the definitions of its types, which CubeCL lists in another order each time; no code comes of them.
fn without_types(source: &str) -> String {
    let mut inside = false;
    let keep = |line: &&str| {
        inside |= line.starts_with("struct __align__");
        let keep = !inside;
        inside &= *line != "};";
        keep
    };
    source.lines().filter(keep).collect::<Vec<_>>().join("\n")
}

/// The portable kernels have several arrays in shared memory, whose places in CUDA C++ are CubeCL's chance. Shaders only
/// name them.
fn without_places(source: &str) -> String {
    let keep = |line: &&str| !line.contains("&dynamic_shared_mem[") && !line.starts_with("// Shared array");
    source.lines().filter(keep).collect::<Vec<_>>().join("\n")
}

/// One test, since what is generated is kept for all threads together.
#[test]
fn every_kernel_is_told_from_those_of_other_sources_and_has_one_itself() {
    let mut seen = BTreeSet::new();
    for dtype in [bf16_type(), f32_type()] {
        let first = kernels(dtype);
        let again = kernels(dtype);
        assert_eq!(first.len(), again.len());
        for (kernel, again) in first.iter().zip(&again) {
            assert!(
                kernel.key.contains(SOURCES.0),
                "{} could be one of older sources: {}",
                kernel.name,
                kernel.key
            );
            assert_eq!(kernel.key, again.key);
            let portable = kernel.key.contains("portable::");
            let code = |source| {
                let code = without_types(source);
                if portable { without_places(&code) } else { code }
            };
            let same = code(&kernel.source) == code(&again.source);
            assert!(same, "{} has another source the second time", kernel.name);
            seen.insert(kernel.key.split('<').next().expect("a type").to_owned());
        }
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
