//! Throughput of every engine on every rule, in tokens, and one table at the end.
//!
//! `cargo bench` times the host engines; `--features wgpu` and `--features cuda` add the devices that are
//! there. `DELTA_RULE_BENCH=full` takes B = 1, T = 4096, 8 heads, K = V = 128 instead of the quick shape, and
//! `DELTA_RULE_BENCH=h200` prints the tensor-core table of `docs/performance.md` (with `--features cuda`; words after `--`
//! choose lines). `DELTA_RULE_GATE=0` opens every
//! gate.

mod engines;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group};
use delta_rule::{Problem, Rule, Shape};
use engines::{Data, Engine, Row};

fn shapes() -> Vec<Shape> {
    let shape = |batch, tokens, heads| Shape {
        batch,
        tokens,
        heads,
        value_heads: heads,
        key_dim: 128,
        value_dim: 128,
    };
    match std::env::var("DELTA_RULE_BENCH").as_deref() {
        Ok("full") => vec![shape(1, 4096, 8)],
        _ => vec![shape(1, 512, 4)],
    }
}

fn bench(c: &mut Criterion) {
    let mut table = Vec::new();
    for (name, rule) in [
        ("deltanet", Rule::deltanet()),
        ("gated_deltanet", Rule::gated_deltanet()),
        ("kda", Rule::kda()),
        ("delta_product_2", Rule::delta_product(2)),
    ] {
        let mut group = c.benchmark_group(name);
        group.sample_size(10);
        for shape in shapes() {
            let problem = Problem::new(rule, shape).expect("a valid problem");
            let data = Data::new(problem);
            let label = format!("b{}_t{}_h{}_d{}", shape.batch, shape.tokens, shape.heads, shape.key_dim);
            group.throughput(Throughput::Elements((shape.batch * shape.tokens) as u64));
            for mut engine in Engine::all(&data) {
                engine.run(1);
                let mut best = f64::INFINITY;
                group.bench_function(BenchmarkId::new(engine.name, &label), |b| {
                    b.iter_custom(|n| {
                        let time = engine.run(n);
                        best = best.min(time.as_secs_f64() / n as f64);
                        time
                    });
                });
                // A filter on the command line leaves some untouched.
                if best.is_finite() {
                    table.push(Row { rule: name, shape, engine: engine.name, seconds: best });
                }
            }
        }
        group.finish();
    }
    engines::print(&table);
}

criterion_group!(benches, bench);

fn main() {
    #[cfg(feature = "cuda")]
    if std::env::var("DELTA_RULE_BENCH").is_ok_and(|b| b == "h200") {
        let filters: Vec<_> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
        return engines::h200::run(&filters);
    }
    benches();
    Criterion::default().configure_from_args().final_summary();
}
