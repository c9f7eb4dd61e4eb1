use delta_rule::{BetaTransform, Decay, GateTransform, Ident, Inputs, Options, OutputGradients, Problem};

/// The tensors of a call, owned.
#[derive(Clone, Debug)]
pub(crate) struct Tensors<T> {
    pub(crate) q: Vec<T>,
    pub(crate) k: Vec<T>,
    pub(crate) v: Vec<T>,
    pub(crate) beta: Vec<T>,
    pub(crate) g: Option<Vec<T>>,
    pub(crate) a_log: Option<Vec<T>>,
    pub(crate) dt_bias: Option<Vec<T>>,
    pub(crate) initial_state: Option<Vec<T>>,
    pub(crate) d_o: Vec<T>,
    pub(crate) d_final_state: Option<Vec<T>>,
}

impl<T> Tensors<T> {
    pub(crate) fn inputs(&self) -> Inputs<'_, T> {
        Inputs {
            q: &self.q,
            k: &self.k,
            v: &self.v,
            beta: &self.beta,
            g: self.g.as_deref(),
            a_log: self.a_log.as_deref(),
            dt_bias: self.dt_bias.as_deref(),
            initial_state: self.initial_state.as_deref(),
        }
    }

    pub(crate) fn output_gradients(&self) -> OutputGradients<'_, T> {
        OutputGradients { o: &self.d_o, final_state: self.d_final_state.as_deref() }
    }

    /// Every input that is there, by name.
    pub(crate) fn inputs_mut(&mut self) -> Vec<(&'static str, &mut Vec<T>)> {
        let all = [
            ("q", Some(&mut self.q)),
            ("k", Some(&mut self.k)),
            ("v", Some(&mut self.v)),
            ("beta", Some(&mut self.beta)),
            ("g", self.g.as_mut()),
            ("a_log", self.a_log.as_mut()),
            ("dt_bias", self.dt_bias.as_mut()),
            ("initial_state", self.initial_state.as_mut()),
        ];
        all.into_iter().filter_map(|(name, x)| Some((name, x?))).collect()
    }

    /// Every element through `f`.
    pub(crate) fn map<U>(&self, f: impl Fn(&T) -> U) -> Tensors<U> {
        self.map_each(|_, x| x.iter().map(&f).collect())
    }

    /// Every tensor through `f`, which is told which one it is.
    pub(crate) fn map_each<U>(&self, f: impl Fn(Ident, &[T]) -> Vec<U>) -> Tensors<U> {
        let optional = |ident, x: &Option<Vec<T>>| x.as_ref().map(|x| f(ident, x));
        Tensors {
            q: f(Ident::Q, &self.q),
            k: f(Ident::K, &self.k),
            v: f(Ident::V, &self.v),
            beta: f(Ident::Beta, &self.beta),
            g: optional(Ident::G, &self.g),
            a_log: optional(Ident::ALog, &self.a_log),
            dt_bias: optional(Ident::DtBias, &self.dt_bias),
            initial_state: optional(Ident::InitialState, &self.initial_state),
            d_o: f(Ident::O, &self.d_o),
            d_final_state: optional(Ident::FinalState, &self.d_final_state),
        }
    }
}

impl Tensors<f64> {
    pub(crate) fn to_f32(&self) -> Tensors<f32> {
        self.map(|&x| x as f32)
    }

    /// As an f32 call would see them, still in f64: what the reference must be given to judge it.
    pub(crate) fn rounded_to_f32(&self) -> Self {
        self.map(|&x| f64::from(x as f32))
    }

    pub(crate) fn rounded_to_bf16(&self) -> Self {
        self.map(|&x| half::bf16::from_f64(x).to_f64())
    }
}

/// Makes random tensors; equal seeds make equal tensors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Generator {
    random: u64,
    beta_max: f64,
    gate_min: f64,
}

impl Generator {
    /// Beta in $[0, 1]$, log decays in $[-1, 0]$.
    pub(crate) fn new(seed: u64) -> Self {
        Self { random: seed.wrapping_mul(0x2545_f491_4f6c_dd1d), beta_max: 1.0, gate_min: -1.0 }
    }

    /// The largest beta; 2 reaches eigenvalues of -1.
    pub(crate) fn beta_max(mut self, beta_max: f64) -> Self {
        self.beta_max = beta_max;
        self
    }

    /// The strongest log decay.
    pub(crate) fn gate_min(mut self, gate_min: f64) -> Self {
        self.gate_min = gate_min;
        self
    }

    /// Inputs and output gradients, all present that the rule and the options can use. Keys and queries have
    /// norm 1 unless the options normalise them; beta and g are logits where the options transform them.
    pub(crate) fn tensors(mut self, problem: &Problem, options: &Options) -> Tensors<f64> {
        let len = |ident| problem.len_of(ident);
        let key_dim = problem.shape().key_dim;
        let (beta_max, gate_min) = (self.beta_max, self.gate_min);
        let decays = problem.rule().decay != Decay::None;
        let formula = options.gate != GateTransform::Identity;

        let mut q = self.normals(len(Ident::Q));
        let mut k = self.normals(len(Ident::K));
        if !options.qk_l2norm {
            normalise(&mut q, key_dim);
            normalise(&mut k, key_dim);
        }
        let v = self.normals(len(Ident::V));
        let beta = match options.beta {
            BetaTransform::Identity => self.fill(len(Ident::Beta), |r| beta_max * r.uniform()),
            _ => self.normals(len(Ident::Beta)),
        };
        let g = decays.then(|| match formula {
            false => self.fill(len(Ident::G), |r| gate_min * r.uniform()),
            true => self.normals(len(Ident::G)),
        });
        Tensors {
            q,
            k,
            v,
            beta,
            g,
            a_log: formula.then(|| self.fill(len(Ident::ALog), |r| r.uniform() - 0.5)),
            dt_bias: formula.then(|| self.normals(len(Ident::DtBias))),
            initial_state: Some(self.normals(len(Ident::InitialState))),
            d_o: self.normals(len(Ident::O)),
            d_final_state: Some(self.normals(len(Ident::FinalState))),
        }
    }

    /// Standard normal numbers.
    pub(crate) fn normals(&mut self, len: usize) -> Vec<f64> {
        self.fill(len, |r| {
            let radius = (-2.0 * (1.0 - r.uniform()).ln()).sqrt();
            radius * (std::f64::consts::TAU * r.uniform()).cos()
        })
    }

    /// A number in `0..n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.uniform() * n as f64) as usize
    }

    fn fill(&mut self, len: usize, mut f: impl FnMut(&mut Self) -> f64) -> Vec<f64> {
        (0..len).map(|_| f(self)).collect()
    }

    /// In `[0, 1)`, by splitmix64.
    fn uniform(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

fn normalise(x: &mut [f64], dim: usize) {
    for row in x.chunks_exact_mut(dim) {
        let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        row.iter_mut().for_each(|x| *x /= norm);
    }
}
