//! Throughput of the forward of every engine on every rule, in tokens, and one table at the end.
//!
//! `cargo bench` times the host engines; `--features wgpu` and `--features cuda` add the devices that are
//! there. `DELTA_RULE_BENCH=full` takes B = 1, T = 4096, 8 heads, K = V = 128 instead of the quick shape, and
//! `DELTA_RULE_BENCH=h200` prints the tensor-core table of `docs/performance.md` (with `--features cuda`; words after `--`
//! choose lines). `DELTA_RULE_GATE=0` opens every
//! gate.

mod engines;

use criterion::{Criterion, criterion_group};

fn bench(c: &mut Criterion) {
    engines::bench(c, engines::Pass::Forward);
}

criterion_group!(benches, bench);

fn main() {
    #[cfg(feature = "cuda")]
    if std::env::var("DELTA_RULE_BENCH").is_ok_and(|b| b == "h200") {
        let filters: Vec<_> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
        return engines::h200::run(&filters, engines::Pass::Forward);
    }
    benches();
    Criterion::default().configure_from_args().final_summary();
}
