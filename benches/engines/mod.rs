//! What is timed: the engines of this build on the devices of this machine.

#[cfg(feature = "gpu")]
mod device;
#[cfg(feature = "cuda")]
pub(crate) mod h200;

use std::time::{Duration, Instant};

use delta_rule::{Decay, Ident, Inputs, Options, Problem, Shape, chunk, reference};

/// The tensors of a problem: unit keys, beta in (0, 1), weak gates.
pub(crate) struct Data {
    pub(crate) problem: Problem,
    pub(crate) q: Vec<f32>,
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
    pub(crate) beta: Vec<f32>,
    pub(crate) g: Option<Vec<f32>>,
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
        Self { problem, q, k, v, beta, g }
    }

    pub(crate) fn inputs(&self) -> Inputs<'_, f32> {
        Inputs { g: self.g.as_deref(), ..Inputs::new(&self.q, &self.k, &self.v, &self.beta) }
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
    pub(crate) fn all(data: &'a Data) -> Vec<Self> {
        let mut engines = Vec::new();
        if !std::env::var("DELTA_RULE_BENCH").is_ok_and(|b| b == "h200") {
            engines.push(Self::on_host("reference_f32", || {
                let out = reference::forward(&data.problem, &Options::new(), &data.inputs());
                std::hint::black_box(out.expect("a valid call"));
            }));
            engines.push(Self::on_host("chunk_cpu_f32", || {
                let out = chunk::forward(&data.problem, &Options::new(), &data.inputs());
                std::hint::black_box(out.expect("a valid call"));
            }));
        }
        #[cfg(feature = "wgpu")]
        engines.extend(device::engine::<delta_rule::cubecl::wgpu::WgpuRuntime>("chunk_wgpu_f32", data));
        #[cfg(feature = "cuda")]
        engines.extend(device::engine::<delta_rule::cubecl::cuda::CudaRuntime>("chunk_cuda_f32", data));
        engines
    }
}

/// One line of the table.
pub(crate) struct Row {
    pub(crate) rule: &'static str,
    pub(crate) shape: Shape,
    pub(crate) engine: &'static str,
    pub(crate) seconds: f64,
}

/// The table: ns per token-head is time / (B * T * HV).
pub(crate) fn print(rows: &[Row]) {
    println!(
        "\n{:16} {:>18} {:16} {:>12} {:>14} {:>14}",
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
