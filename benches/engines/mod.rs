//! What is timed: the engines of this build on the devices of this machine.

#[cfg(feature = "gpu")]
mod device;
#[cfg(feature = "cuda")]
pub(crate) mod h200;

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use delta_rule::{Decay, Ident, Inputs, Options, OutputGradients, Problem, Rule, Shape, chunk, reference};

/// The tensors of a problem: unit keys, beta in (0, 1), weak gates.
pub(crate) struct Data {
    pub(crate) problem: Problem,
    pub(crate) q: Vec<f32>,
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
    pub(crate) beta: Vec<f32>,
    pub(crate) g: Option<Vec<f32>>,
    /// The gradient of o.
    pub(crate) d_o: Vec<f32>,
}

impl Data {
    pub(crate) fn new(problem: Problem) -> Self {
        let mut seed = 1u32;
        let mut random = |ident, scale: f32, shift: f32| -> Vec<f32> {
            let next = || {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (seed >> 8) as f32 / (1 << 24) as f32
            };
            std::iter::repeat_with(next).take(problem.len_of(ident)).map(|x| scale * x + shift).collect()
        };
        let unit = |mut x: Vec<f32>| {
            for row in x.chunks_exact_mut(problem.shape().key_dim) {
                let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
                row.iter_mut().for_each(|x| *x /= norm);
            }
            x
        };
        let q = unit(random(Ident::Q, 2.0, -1.0));
        let k = unit(random(Ident::K, 2.0, -1.0));
        let v = random(Ident::V, 2.0, -1.0);
        let beta = random(Ident::Beta, 1.0, 0.0);
        let gate = if std::env::var("DELTA_RULE_GATE").is_ok_and(|g| g == "0") { 0.0 } else { -0.1 };
        let g = (problem.rule().decay != Decay::None).then(|| random(Ident::G, gate, 0.0));
        let d_o = random(Ident::O, 2.0, -1.0);
        Self { problem, q, k, v, beta, g, d_o }
    }

    pub(crate) fn inputs(&self) -> Inputs<'_, f32> {
        Inputs { g: self.g.as_deref(), ..Inputs::new(&self.q, &self.k, &self.v, &self.beta) }
    }
}

/// What is timed of an engine.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Pass {
    Forward,
    #[allow(dead_code, reason = "the bench of the forward does not go back")]
    Backward,
    #[allow(dead_code, reason = "the bench of the forward does not go back")]
    Both,
}

impl Pass {
    pub(crate) fn goes_forward(self) -> bool {
        self != Pass::Backward
    }

    pub(crate) fn goes_back(self) -> bool {
        self != Pass::Forward
    }

    fn name(self) -> &'static str {
        match self {
            Pass::Forward => "forward",
            Pass::Backward => "backward",
            Pass::Both => "both",
        }
    }
}

/// Something that can be run `n` times.
pub(crate) struct Engine<'a> {
    pub(crate) name: &'static str,
    run: Box<dyn FnMut(u64) -> Duration + 'a>,
}

impl<'a> Engine<'a> {
    fn on_host(name: &'static str, mut call: impl FnMut() + 'a) -> Self {
        let run = move |n| {
            let start = Instant::now();
            (0..n).for_each(|_| call());
            start.elapsed()
        };
        Self { name, run: Box::new(run) }
    }

    pub(crate) fn run(&mut self, n: u64) -> Duration {
        (self.run)(n)
    }

    /// Every engine of this build.
    pub(crate) fn all(data: &'a Data, pass: Pass) -> Vec<Self> {
        let mut engines = Vec::new();
        if !std::env::var("DELTA_RULE_BENCH").is_ok_and(|b| b == "large") {
            let call = (&data.problem, Options::new(), data.inputs());
            let upstream = OutputGradients { o: &data.d_o, final_state: None };
            engines.push(Self::on_host("reference_f32", move || {
                let (problem, options, inputs) = &call;
                if pass.goes_forward() {
                    std::hint::black_box(reference::forward(problem, options, inputs).expect("a valid call"));
                }
                if pass.goes_back() {
                    let gradients = reference::backward(problem, options, inputs, &upstream);
                    std::hint::black_box(gradients.expect("a valid call"));
                }
            }));
            let call = (&data.problem, Options::new(), data.inputs());
            engines.push(Self::on_host("chunk_cpu_f32", move || {
                let (problem, options, inputs) = &call;
                if pass.goes_forward() {
                    std::hint::black_box(chunk::forward(problem, options, inputs).expect("a valid call"));
                }
                if pass.goes_back() {
                    let gradients = chunk::backward(problem, options, inputs, &upstream);
                    std::hint::black_box(gradients.expect("a valid call"));
                }
            }));
        }
        #[cfg(feature = "wgpu")]
        engines.extend(device::engine::<delta_rule::cubecl::wgpu::WgpuRuntime>("wgpu_f32", data, pass));
        #[cfg(feature = "cuda")]
        engines.extend(device::engine::<delta_rule::cubecl::cuda::CudaRuntime>("cuda_f32", data, pass));
        engines
    }
}

/// Times one pass of every engine on every rule, and prints the table.
pub(crate) fn bench(c: &mut Criterion, pass: Pass) {
    let mut table = Vec::new();
    for (name, rule) in [
        ("deltanet", Rule::deltanet()),
        ("gated_deltanet", Rule::gated_deltanet()),
        ("kda", Rule::kda()),
        ("delta_product_2", Rule::delta_product(2)),
    ] {
        let mut group = c.benchmark_group(format!("{name}/{}", pass.name()));
        group.sample_size(10);
        let shape = shape();
        let data = Data::new(Problem::new(rule, shape).expect("a valid problem"));
        let label = format!("b{}_t{}_h{}_d{}", shape.batch, shape.tokens, shape.heads, shape.key_dim);
        group.throughput(Throughput::Elements((shape.batch * shape.tokens) as u64));
        for mut engine in Engine::all(&data, pass) {
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
        group.finish();
    }
    print(&table, pass);
}

fn shape() -> Shape {
    let (batch, tokens, heads) = match std::env::var("DELTA_RULE_BENCH").as_deref() {
        Ok("full") => (1, 4096, 8),
        Ok("large") => (8, 2048, 32),
        _ => (1, 512, 4),
    };
    Shape { batch, tokens, heads, value_heads: heads, key_dim: 128, value_dim: 128 }
}

/// One line of the table.
struct Row {
    rule: &'static str,
    shape: Shape,
    engine: &'static str,
    seconds: f64,
}

/// The table: ns per token-head is time / (B * T * HV).
fn print(rows: &[Row], pass: Pass) {
    println!("\n{}", pass.name());
    println!(
        "{:16} {:>18} {:16} {:>12} {:>14} {:>14}",
        "rule", "B x T x HV", "engine", "ms", "ns/token-head", "x reference"
    );
    for row in rows {
        let s = row.shape;
        let token_heads = (s.batch * s.tokens * s.value_heads) as f64;
        let base = rows.iter().find(|r| r.rule == row.rule && r.shape == s && r.engine == "reference_f32");
        let ratio = base.map_or("-".into(), |b| format!("{:.1}", b.seconds / row.seconds));
        println!(
            "{:16} {:>18} {:16} {:>12.3} {:>14.2} {:>14}",
            row.rule,
            format!("{} x {} x {}", s.batch, s.tokens, s.value_heads),
            row.engine,
            row.seconds * 1e3,
            row.seconds * 1e9 / token_heads,
            ratio
        );
    }
}
