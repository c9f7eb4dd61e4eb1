//! Throughput of the backward, and of forward and backward together, of every engine on every rule, in tokens, and a
//! table of each at the end.
//!
//! `cargo bench --bench backward` times the host engines; `--features wgpu` and `--features cuda` add the devices that
//! are there. `DELTA_RULE_BENCH=full` takes B = 1, T = 4096, 8 heads, K = V = 128 instead of the quick shape, `large`
//! B = 8, T = 2048, 32 heads on devices only, and `h200` prints the tensor-core table of the backward in
//! `docs/performance.md` (with `--features cuda`; words after `--` choose lines). `DELTA_RULE_GATE=0` opens every gate.

mod engines;

use criterion::{Criterion, criterion_group};
use engines::Pass;

fn bench(c: &mut Criterion) {
    engines::bench(c, Pass::Backward);
    engines::bench(c, Pass::Both);
}

criterion_group!(benches, bench);

fn main() {
    #[cfg(feature = "cuda")]
    if std::env::var("DELTA_RULE_BENCH").is_ok_and(|b| b == "h200") {
        let filters: Vec<_> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
        return engines::h200::run(&filters, Pass::Backward);
    }
    benches();
    Criterion::default().configure_from_args().final_summary();
}
