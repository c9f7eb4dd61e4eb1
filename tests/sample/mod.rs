//! Random problems and the one measure of error.

#![allow(dead_code, unused_imports, reason = "each test binary uses a part")]

#[path = "../common/skip.rs"]
mod skip;

pub(crate) use skip::{missing, skipped};

use delta_rule::{
    Decay, Gradients, Ident, Inputs, Options, Output, OutputGradients, Problem, Real, Rule, Shape, reference,
};

/// A small generator: the tests must not depend on a library's stream.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Uniform in `[0, 1)`.
    pub(crate) fn unit(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `[-1, 1)`.
    pub(crate) fn signed(&mut self) -> f64 {
        2.0 * self.unit() - 1.0
    }
}

pub(crate) const RULES: [Rule; 6] = [
    Rule::deltanet(),
    Rule::gated_deltanet(),
    Rule::kda(),
    Rule::delta_product(2),
    Rule::gated_delta_product(3),
    Rule { decay: Decay::Channel, micro_steps: 2 },
];

pub(crate) fn shape(batch: usize, tokens: usize, heads: [usize; 2], dims: [usize; 2]) -> Shape {
    Shape { batch, tokens, heads: heads[0], value_heads: heads[1], key_dim: dims[0], value_dim: dims[1] }
}

/// One key head, and two sequences; many where a state is a single number, since that may all but cancel and errors are
/// relative to all of a tensor.
pub(crate) fn small_problem(rule: Rule, tokens: usize, value_heads: usize, dims: [usize; 2]) -> Problem {
    let batch = if dims == [1, 1] { 64 } else { 2 };
    Problem::new(rule, shape(batch, tokens, [1, value_heads], dims)).expect("a valid shape")
}

/// How hard a problem is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Style {
    pub(crate) beta: [f64; 2],
    /// The strongest gate, as a positive number.
    pub(crate) gate: f64,
    pub(crate) identical_keys: bool,
    pub(crate) state: bool,
}

pub(crate) const MILD: Style = Style { beta: [0.0, 1.0], gate: 0.1, identical_keys: false, state: true };
pub(crate) const NEGATIVE: Style = Style { beta: [0.0, 2.0], gate: 0.3, identical_keys: false, state: true };

/// A problem with its tensors, rounded to f32 so that every engine reads the same numbers.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub(crate) problem: Problem,
    pub(crate) q: Vec<f64>,
    pub(crate) k: Vec<f64>,
    pub(crate) v: Vec<f64>,
    pub(crate) beta: Vec<f64>,
    pub(crate) g: Option<Vec<f64>>,
    pub(crate) a_log: Option<Vec<f64>>,
    pub(crate) dt_bias: Option<Vec<f64>>,
    pub(crate) initial_state: Option<Vec<f64>>,
}

impl Sample {
    pub(crate) fn new(problem: Problem, style: Style, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let dim = problem.shape().key_dim;
        let mut random = |ident: Ident, f: &dyn Fn(f64) -> f64| -> Vec<f64> {
            (0..problem.len_of(ident)).map(|_| f(rng.unit()) as f32 as f64).collect()
        };
        let signed = |x: f64| 2.0 * x - 1.0;
        let q = unit_rows(random(Ident::Q, &signed), dim);
        let mut k = unit_rows(random(Ident::K, &signed), dim);
        if style.identical_keys && !k.is_empty() {
            let first = k[..dim].to_vec();
            k.chunks_exact_mut(dim).for_each(|row| row.copy_from_slice(&first));
        }
        let v = random(Ident::V, &signed);
        let [low, high] = style.beta;
        let beta = random(Ident::Beta, &|x| low + (high - low) * x);
        let decays = problem.rule().decay != Decay::None;
        let g = decays.then(|| random(Ident::G, &|x| -style.gate * x));
        let initial_state = style.state.then(|| random(Ident::InitialState, &signed));
        Self { q, k, v, beta, g, a_log: None, dt_bias: None, initial_state, problem }
    }

    /// Adds what a gate formula reads, and makes `g` its argument.
    pub(crate) fn with_gate_formula(mut self, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let mut random = |ident| -> Vec<f64> {
            (0..self.problem.len_of(ident)).map(|_| rng.signed() as f32 as f64).collect()
        };
        let (g, a_log, dt_bias) = (random(Ident::G), random(Ident::ALog), random(Ident::DtBias));
        (self.g, self.a_log, self.dt_bias) = (Some(g), Some(a_log), Some(dt_bias));
        self
    }

    pub(crate) fn inputs(&self) -> Inputs<'_, f64> {
        Inputs {
            g: self.g.as_deref(),
            a_log: self.a_log.as_deref(),
            dt_bias: self.dt_bias.as_deref(),
            initial_state: self.initial_state.as_deref(),
            ..Inputs::new(&self.q, &self.k, &self.v, &self.beta)
        }
    }

    /// Calls `f` with the tensors as f32, which is exact.
    pub(crate) fn with_f32<O>(&self, f: impl FnOnce(&Inputs<'_, f32>) -> O) -> O {
        let narrow = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<_>>();
        let some = |x: &Option<Vec<f64>>| x.as_ref().map(|x| narrow(x));
        let (q, k, v, beta) = (narrow(&self.q), narrow(&self.k), narrow(&self.v), narrow(&self.beta));
        let (g, a_log, dt_bias) = (some(&self.g), some(&self.a_log), some(&self.dt_bias));
        let initial_state = some(&self.initial_state);
        f(&Inputs {
            g: g.as_deref(),
            a_log: a_log.as_deref(),
            dt_bias: dt_bias.as_deref(),
            initial_state: initial_state.as_deref(),
            ..Inputs::new(&q, &k, &v, &beta)
        })
    }

    /// Rounds q, k and v to the type that the device gets them in.
    #[cfg(feature = "gpu")]
    pub(crate) fn round(&mut self, dtype: delta_rule::gpu::HostDType) {
        [&mut self.q, &mut self.k, &mut self.v].into_iter().for_each(|x| round(x, dtype));
    }

    /// The reference's gradients.
    pub(crate) fn gradients(&self, options: &Options, upstream: &Upstream<f64>) -> Gradients<f64> {
        reference::backward(&self.problem, options, &self.inputs(), &upstream.view()).expect("a valid sample")
    }

    pub(crate) fn truth(&self, options: &Options) -> Output<f64> {
        reference::forward(&self.problem, options, &self.inputs()).expect("a valid sample")
    }
}

/// What flows into a backward.
#[derive(Clone, Debug)]
pub(crate) struct Upstream<T> {
    pub(crate) o: Vec<T>,
    pub(crate) final_state: Option<Vec<T>>,
}

impl Upstream<f64> {
    /// Random, rounded to f32.
    pub(crate) fn new(problem: &Problem, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let mut random =
            |ident| -> Vec<f64> { (0..problem.len_of(ident)).map(|_| rng.signed() as f32 as f64).collect() };
        Self { o: random(Ident::O), final_state: Some(random(Ident::FinalState)) }
    }

    pub(crate) fn to_f32(&self) -> Upstream<f32> {
        let narrow = |x: &Vec<f64>| x.iter().map(|&x| x as f32).collect();
        Upstream { o: narrow(&self.o), final_state: self.final_state.as_ref().map(narrow) }
    }
}

impl<T> Upstream<T> {
    pub(crate) fn view(&self) -> OutputGradients<'_, T> {
        OutputGradients { o: &self.o, final_state: self.final_state.as_deref() }
    }
}

/// Rounds to the type of the device.
#[cfg(feature = "gpu")]
pub(crate) fn round(x: &mut [f64], dtype: delta_rule::gpu::HostDType) {
    use delta_rule::gpu::HostDType;
    for x in x {
        *x = match dtype {
            HostDType::F32 => *x,
            HostDType::F16 => half::f16::from_f64(*x).to_f64(),
            HostDType::Bf16 => half::bf16::from_f64(*x).to_f64(),
        };
    }
}

/// Rows of length 1, rounded to f32.
pub(crate) fn unit_rows(mut x: Vec<f64>, dim: usize) -> Vec<f64> {
    for row in x.chunks_exact_mut(dim) {
        let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt().max(1e-9);
        row.iter_mut().for_each(|x| *x = (*x / norm) as f32 as f64);
    }
    x
}

/// rms(got - want) / rms(want); the size of `got` where `want` is zero. NaN and wrong lengths are infinite.
pub(crate) fn relative_error<T: Real>(got: &[T], want: &[f64]) -> f64 {
    if got.len() != want.len() {
        return f64::INFINITY;
    }
    let square = |x: f64| x * x;
    let error: f64 = got.iter().zip(want).map(|(g, w)| square(g.to_f64().unwrap_or(f64::NAN) - w)).sum();
    let size: f64 = want.iter().map(|&w| square(w)).sum();
    let ratio = (error / if size > 0.0 { size } else { 1.0 }).sqrt();
    if ratio.is_nan() { f64::INFINITY } else { ratio }
}

/// Holds both outputs against the truth.
pub(crate) fn assert_close<T: Real>(what: &str, got: &Output<T>, want: &Output<f64>, tolerance: f64) {
    for (name, got, want) in [("o", &got.o, &want.o), ("final_state", &got.final_state, &want.final_state)] {
        let error = relative_error(got, want);
        assert!(error <= tolerance, "{what}: {name} is off by {error:.2e}, allowed {tolerance:.0e}");
    }
}

/// Holds every gradient against the truth.
pub(crate) fn assert_gradients_close<T: Real>(
    what: &str,
    got: &Gradients<T>,
    want: &Gradients<f64>,
    tolerance: f64,
) {
    assert_inputs_close(what, got, want, tolerance);
    for (name, got, want) in constants(got, want) {
        let error = relative_error(&got, &want);
        let off = format!("the gradient of {name} is off by {error:.2e}");
        assert!(error <= tolerance, "{what}: {off}, allowed {tolerance:.0e}");
    }
}

/// The same for rounded operands. The gradients of a gate's constants are sums of those of g over all tokens of a head,
/// which largely cancel: their errors are held against the sums of the terms' sizes.
pub(crate) fn assert_rounded_gradients_close<T: Real>(
    what: &str,
    got: &Gradients<T>,
    want: &Gradients<f64>,
    tolerance: f64,
) {
    assert_inputs_close(what, got, want, tolerance);
    for (name, got, want_sums) in constants(got, want) {
        assert_eq!(got.len(), want_sums.len(), "{what}: {name}");
        // One for each gate of a token, or for several in a row.
        let sums = want_sums.len();
        let gates = want.dt_bias.as_ref().map_or(sums, Vec::len);
        let mut terms = vec![0.0; sums];
        if sums > 0 {
            let all = want.g.iter().flatten().enumerate();
            all.for_each(|(i, g)| terms[i % gates / (gates / sums)] += g.abs());
        }
        let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
        let errors: Vec<_> = got.iter().zip(&want_sums).map(|(x, y)| x.to_f64().unwrap() - y).collect();
        let (error, terms) = (norm(&errors), norm(&terms));
        let off = format!("the gradient of {name} is off by {error:.2e}, its terms are {terms:.2e}");
        assert!(error <= tolerance * terms, "{what}: {off}, allowed {tolerance:.0e} of them");
    }
}

/// The gradients of a gate's constants, and the truth.
fn constants<T: Real>(got: &Gradients<T>, want: &Gradients<f64>) -> [(&'static str, Vec<T>, Vec<f64>); 2] {
    let some = |x: &Option<Vec<T>>| x.clone().unwrap_or_default();
    let truth = |x: &Option<Vec<f64>>| x.clone().unwrap_or_default();
    [("a_log", some(&got.a_log), truth(&want.a_log)), ("dt_bias", some(&got.dt_bias), truth(&want.dt_bias))]
}

fn assert_inputs_close<T: Real>(what: &str, got: &Gradients<T>, want: &Gradients<f64>, tolerance: f64) {
    let g = (got.g.clone().unwrap_or_default(), want.g.clone().unwrap_or_default());
    for (name, got, want) in [
        ("q", &got.q, &want.q),
        ("k", &got.k, &want.k),
        ("v", &got.v, &want.v),
        ("beta", &got.beta, &want.beta),
        ("g", &g.0, &g.1),
        ("initial_state", &got.initial_state, &want.initial_state),
    ] {
        let error = relative_error(got, want);
        let off = format!("the gradient of {name} is off by {error:.2e}");
        assert!(error <= tolerance, "{what}: {off}, allowed {tolerance:.0e}");
    }
}
