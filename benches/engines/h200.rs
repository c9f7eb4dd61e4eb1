//! The forward or the backward on large shapes, as `docs/performance.md` lists them: bf16 data unless a line says f16, f32
//! states, one line each.

use std::time::Instant;

use delta_rule::cubecl::cuda::CudaRuntime;
use delta_rule::cubecl::future::block_on;
use delta_rule::cubecl::ir::StorageType;
use delta_rule::cubecl::prelude::*;
use delta_rule::cubecl::std::tensor::TensorHandle;
use delta_rule::gpu::{DTypes, DeviceInputs, DeviceOutputGradients, backward, client, forward, forward_into};
use delta_rule::{Decay, Ident, Options, Problem, Rule, Shape};
use half::{bf16, f16};

use super::Pass;

/// What a GPU that does nothing but copy reaches, in bytes per ns: the floor is the time to read the inputs and
/// to write the outputs once.
const COPY: f64 = 4190.0;

struct Case {
    rule: &'static str,
    /// B, T, HV, K, V.
    shape: [usize; 5],
    gates: Gates,
    packed: usize,
    f16: bool,
    /// What flash-linear-attention 0.6.0 (Triton 3.7.1) takes on the same kind of chip, replayed from a CUDA graph,
    /// in ms; at B = 4 from its time per token-head.
    fla: Option<f64>,
}

#[derive(Clone, Copy, PartialEq)]
enum Gates {
    Weak,
    Zero,
}

fn backward_cases() -> Vec<Case> {
    let d = |b, t, h| [b, t, h, 128, 128];
    let case = |rule, shape, fla| Case { rule, shape, gates: Gates::Weak, packed: 0, f16: false, fla };
    let mut out = Vec::new();
    for (rule, wide, long, narrow) in [
        ("deltanet", 1.94, 7.76, None),
        ("gated_deltanet", 2.60, 10.4, Some(1.35)),
        ("kda", 8.23, 32.9, Some(4.18)),
        ("delta_product_2", 5.77, 23.1, None),
    ] {
        out.push(case(rule, d(8, 2048, 32), Some(wide)));
        out.push(case(rule, d(1, 65536, 32), Some(long)));
        out.push(case(rule, d(1, 8192, 32), narrow));
    }
    out.push(case("gated_deltanet", [8, 2048, 32, 64, 64], None));
    out.push(case("gated_deltanet", [8, 2048, 32, 96, 96], None));
    out.push(case("gated_deltanet", [4, 2048, 32, 192, 192], None));
    out.push(case("gated_deltanet", [4, 2048, 32, 256, 256], None));
    out.push(Case { packed: 8, ..case("gated_deltanet", d(1, 16384, 32), None) });
    out.push(Case { gates: Gates::Zero, ..case("gated_deltanet", d(8, 2048, 32), None) });
    out.push(Case { f16: true, ..case("gated_deltanet", d(8, 2048, 32), None) });
    out
}

fn cases() -> Vec<Case> {
    let case = |rule, shape, fla| Case { rule, shape, gates: Gates::Weak, packed: 0, f16: false, fla };
    let d = |b, t, h| [b, t, h, 128, 128];
    let mut out = Vec::new();
    for (rule, short, long) in [
        ("deltanet", 1.037, 2.08),
        ("gated_deltanet", 0.952, 1.91),
        ("kda", 1.898, 3.77),
        ("delta_product_2", 1.94, 3.88),
    ] {
        out.push(case(rule, d(8, 2048, 32), Some(short)));
        out.push(case(rule, d(4, 8192, 32), Some(long)));
    }
    for (rule, shape, fla) in [
        ("gated_deltanet", d(1, 8192, 32), Some(0.492)),
        ("kda", d(1, 8192, 32), Some(0.979)),
        ("gated_deltanet", d(1, 65536, 32), Some(3.862)),
        ("gated_deltanet", d(1, 2048, 32), Some(0.137)),
        ("gated_deltanet", d(1, 32768, 8), None),
        ("gated_deltanet", [8, 2048, 32, 64, 64], None),
        ("gated_deltanet", [8, 2048, 32, 96, 96], None),
        ("gated_deltanet", [8, 2048, 32, 256, 256], None),
        ("gated_deltanet", d(1, 262144, 32), None),
    ] {
        out.push(case(rule, shape, fla));
    }
    for shape in [d(1, 8192, 32), d(1, 65536, 32), d(1, 32768, 8)] {
        out.push(Case { gates: Gates::Zero, ..case("gated_deltanet", shape, None) });
    }
    for n in [8, 32] {
        out.push(Case { packed: n, ..case("gated_deltanet", d(1, 16384, 32), None) });
    }
    for (rule, some, many) in
        [("deltanet", 0.0982, 0.3708), ("gated_deltanet", 0.0986, 0.3705), ("kda", 0.0759, 0.3005)]
    {
        out.push(case(rule, d(64, 1, 32), Some(some)));
        out.push(case(rule, d(256, 1, 32), Some(many)));
    }
    for rule in ["gated_deltanet", "kda"] {
        out.push(Case { f16: true, ..case(rule, d(8, 2048, 32), None) });
    }
    out
}

fn rule_of(name: &str) -> Rule {
    match name {
        "deltanet" => Rule::deltanet(),
        "gated_deltanet" => Rule::gated_deltanet(),
        "kda" => Rule::kda(),
        _ => Rule::delta_product(2),
    }
}

/// A buffer of `len` pseudo-random elements, drawn once per 2^16 and repeated.
fn random(
    client: &ComputeClient<CudaRuntime>,
    shape: Vec<usize>,
    dtype: StorageType,
    f: impl Fn(f64) -> f64,
) -> TensorHandle<CudaRuntime> {
    let mut seed = shape.len() as u64;
    let mut next = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        f((seed >> 33) as f64 / (1u64 << 31) as f64)
    };
    let len: usize = shape.iter().product();
    let block: Vec<f32> = (0..(1 << 16).min(len)).map(|_| next() as f32).collect();
    let bytes: Vec<u8> = if dtype == type_of::<bf16>() {
        block.iter().flat_map(|&x| bf16::from_f32(x).to_ne_bytes()).collect()
    } else if dtype == type_of::<f16>() {
        block.iter().flat_map(|&x| f16::from_f32(x).to_ne_bytes()).collect()
    } else {
        block.iter().flat_map(|x| x.to_ne_bytes()).collect()
    };
    let data: Vec<u8> = bytes.iter().copied().cycle().take(len * dtype.size()).collect();
    TensorHandle::new_contiguous(shape, client.create_from_slice(&data), dtype)
}

fn type_of<F: Float>() -> StorageType {
    F::as_type_native_unchecked().storage_type()
}

/// Times the cases that all filters match: each a part of a rule's name or of the shape as printed.
pub(crate) fn run(filters: &[String], pass: Pass) {
    let Ok(client) = client::<CudaRuntime>(&Default::default()) else {
        println!("SKIPPED: there is no CUDA device");
        return;
    };
    println!(
        "{:16} {:>24} {:5} {:>9} {:>9} {:>9} {:>8} {:>8} {:>9}",
        "rule", "B x T x HV x K x V", "gates", "first s", "ms", "ns/th", "of floor", "FLA ms", "x FLA"
    );
    for case in if pass == Pass::Forward { cases() } else { backward_cases() } {
        let [batch, tokens, heads, key_dim, value_dim] = case.shape;
        let packed = if case.packed > 0 { format!("{}:", case.packed) } else { String::new() };
        let half = if case.f16 { "f16 " } else { "" };
        let label = format!("{half}{packed}{batch} x {tokens} x {heads} x {key_dim} x {value_dim}");
        if !filters.iter().all(|f| case.rule.contains(f) || label.contains(f)) {
            continue;
        }
        let shape = Shape { batch, tokens, heads, value_heads: heads, key_dim, value_dim };
        let mut problem = Problem::new(rule_of(case.rule), shape).expect("a valid problem");
        if case.packed > 0 {
            let cut: Vec<_> = (0..=case.packed).map(|n| n * tokens / case.packed).collect();
            problem = problem.with_cu_seqlens(&cut).expect("valid offsets");
        }
        let width = (3.0 / key_dim as f64).sqrt();
        let data = if case.f16 { type_of::<f16>() } else { type_of::<bf16>() };
        let f32 = type_of::<f32>();
        let new = |ident, dtype, f: &dyn Fn(f64) -> f64| random(&client, problem.shape_of(ident), dtype, f);
        let unit = |x: f64| width * (2.0 * x - 1.0);
        let (q, k) = (new(Ident::Q, data, &unit), new(Ident::K, data, &unit));
        let v = new(Ident::V, data, &|x| 2.0 * x - 1.0);
        let beta = new(Ident::Beta, f32, &|x| x);
        // log sigmoid of a spread-out variable, over 16.
        let weak = |x: f64| -(1.0 + (3.0 - 6.0 * x).exp()).ln() / 16.0;
        let gate = |x: f64| if case.gates == Gates::Weak { weak(x) } else { 0.0 };
        let g = (problem.rule().decay != Decay::None).then(|| new(Ident::G, f32, &gate));
        // Decoding begins with a state; long calls are timed without.
        let initial_state = (tokens == 1).then(|| new(Ident::InitialState, f32, &|x| 2.0 * x - 1.0));
        let inputs = || DeviceInputs {
            initial_state: initial_state.clone().map(|s| s.binding()),
            g: g.clone().map(|g| g.binding()),
            ..DeviceInputs::new(
                q.clone().binding(),
                k.clone().binding(),
                v.clone().binding(),
                beta.clone().binding(),
            )
        };
        let (options, dtypes) = (Options::new(), DTypes::mixed(data));
        block_on(client.sync()).expect("the device works");
        let start = Instant::now();
        let out = forward(&client, &problem, &options, inputs(), dtypes).expect("a valid call");
        block_on(client.sync()).expect("the device works");
        let mut first = start.elapsed().as_secs_f64();
        // The gradients of o are like v.
        let upstream = new(Ident::O, data, &|x| 2.0 * x - 1.0);
        let call = |n: usize| {
            let start = Instant::now();
            for _ in 0..n {
                if pass == Pass::Backward {
                    let upstream = DeviceOutputGradients { o: upstream.clone().binding(), final_state: None };
                    backward(&client, &problem, &options, inputs(), upstream, dtypes).expect("a valid call");
                    continue;
                }
                let (o, state) = (out.o.clone().binding(), out.final_state.clone().binding());
                forward_into(&client, &problem, &options, inputs(), dtypes, o, state).expect("a valid call");
            }
            block_on(client.sync()).expect("the device works");
            start.elapsed().as_secs_f64()
        };
        if pass == Pass::Backward {
            first = call(1);
        }
        // What a wait costs is taken out: the slope between few launches and many.
        let mut slopes: Vec<f64> = (0..7)
            .map(|_| {
                let few = call(2);
                (call(12) - few) / 10.0
            })
            .collect();
        slopes.sort_by(f64::total_cmp);
        let seconds = slopes[3];
        let elements = |idents: &[Ident]| idents.iter().map(|&i| problem.len_of(i)).sum::<usize>();
        let gates = 4 * (problem.len_of(Ident::Beta) + g.as_ref().map_or(0, |_| problem.len_of(Ident::G)));
        let bytes = match pass {
            Pass::Backward => {
                let read_and_written = 2 * elements(&[Ident::Q, Ident::K, Ident::V]);
                2 * (read_and_written + gates)
                    + 2 * problem.len_of(Ident::O)
                    + 4 * problem.len_of(Ident::FinalState)
            }
            _ => {
                let initial = initial_state.as_ref().map_or(0, |_| problem.len_of(Ident::InitialState));
                let states = 4 * (initial + problem.len_of(Ident::FinalState));
                2 * elements(&[Ident::Q, Ident::K, Ident::V, Ident::O]) + gates + states
            }
        };
        let floor = bytes as f64 / COPY * 1e-9;
        println!(
            "{:16} {:>24} {:5} {:>9.2} {:>9.4} {:>9.3} {:>8.2} {:>8} {:>9}",
            case.rule,
            label,
            if case.gates == Gates::Weak { "weak" } else { "0" },
            first,
            seconds * 1e3,
            seconds * 1e9 / (batch * tokens * heads) as f64,
            floor / seconds,
            case.fla.map_or("-".into(), |ms| format!("{ms:.3}")),
            case.fla.map_or("-".into(), |ms| format!("{:.1}", ms * 1e-3 / seconds)),
        );
    }
}
