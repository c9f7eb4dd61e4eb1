//! A kernel for tensor cores has one source, by which compilers and their caches find what they have kept of it.

mod common;

use common::{Way, bf16_type, generate, generate_for};
use delta_rule::{GateTransform, Options, Rule};
use delta_rule_offline::take_generated;

#[test]
fn tensor_core_kernels_are_the_same_every_time() {
    let options = Options::new().with_qk_l2norm(true).with_gate(GateTransform::Softplus);
    let sources = || -> Vec<(String, String)> {
        for way in [Way::Forward, Way::Backward] {
            for heads in [2, 256] {
                generate(way, Rule::gated_deltanet(), heads, [128, 64], bf16_type(), &options);
                generate(way, Rule::kda(), heads, [64, 128], bf16_type(), &options);
            }
        }
        generate_for(Way::Forward, Rule::delta_product(2), 8192, 1, [64, 64], bf16_type(), &Options::new());
        take_generated().into_iter().map(|kernel| (kernel.name, without_types(&kernel.source))).collect()
    };
    let first = sources();
    let again = sources();
    assert_eq!(first.len(), again.len());
    for (kernel, again) in first.iter().zip(again) {
        assert_eq!(kernel.0, again.0);
        assert!(kernel.1 == again.1, "{} has another source the second time", kernel.0);
    }
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
