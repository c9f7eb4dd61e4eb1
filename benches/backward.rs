//! Throughput of the backward, and of forward and backward together, of every engine on every rule, in tokens, and a
//! table of each at the end.
//!
//! `cargo bench --bench backward` times the host engines; `--features wgpu` and `--features cuda` add the devices that
//! are there. `DELTA_RULE_BENCH=full` takes B = 1, T = 4096, 8 heads, K = V = 128 instead of the quick shape, and
//! `DELTA_RULE_BENCH=h200` B = 8, T = 2048, 32 heads on devices only. `DELTA_RULE_GATE=0` opens every gate.

mod engines;

use criterion::{Criterion, criterion_group, criterion_main};
use engines::Pass;

fn bench(c: &mut Criterion) {
    engines::bench(c, Pass::Backward);
    engines::bench(c, Pass::Both);
}

criterion_group!(benches, bench);
criterion_main!(benches);
