//! A kernel has one source, by which compilers and their caches find what they have kept of it.

mod common;

use common::{Way, bf16_type, f32_type, generate, generate_for};
use delta_rule::{GateTransform, Options, Rule};
use delta_rule_offline::take_generated;

/// Names and sources of what `calls` generates.
fn sources(calls: impl Fn()) -> Vec<(String, String)> {
    calls();
    take_generated().into_iter().map(|kernel| (kernel.name, without_types(&kernel.source))).collect()
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

fn compare(first: &[(String, String)], again: &[(String, String)], seen: fn(&str) -> String) {
    assert!(!first.is_empty());
    assert_eq!(first.len(), again.len());
    for (kernel, again) in first.iter().zip(again) {
        assert_eq!(kernel.0, again.0);
        assert!(seen(&kernel.1) == seen(&again.1), "{} has another source the second time", kernel.0);
    }
}

#[test]
fn kernels_are_the_same_every_time() {
    let options = Options::new().with_qk_l2norm(true).with_gate(GateTransform::Softplus);
    let all = |dtype| {
        for way in [Way::Forward, Way::Backward] {
            for heads in [2, 256] {
                generate(way, Rule::gated_deltanet(), heads, [128, 64], dtype, &options);
                generate(way, Rule::kda(), heads, [64, 128], dtype, &options);
            }
        }
    };
    let tensor_cores = || {
        all(bf16_type());
        generate_for(Way::Forward, Rule::delta_product(2), 8192, 1, [64, 64], bf16_type(), &Options::new());
    };
    compare(&sources(tensor_cores), &sources(tensor_cores), str::to_owned);
    let portable = || all(f32_type());
    compare(&sources(portable), &sources(portable), without_places);
}
