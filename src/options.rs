//! How a call is computed, apart from its shapes.

use crate::{Error, Result};

/// What `beta` holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum BetaTransform {
    /// Beta itself, in $[0, 2]$.
    #[default]
    Identity,
    /// A logit: $\beta = \sigma(b) \in (0, 1)$.
    Sigmoid,
    /// A logit: $\beta = 2\sigma(b) \in (0, 2)$, eigenvalues down to $-1$.
    TwoSigmoid,
}

/// What `g` holds. Every gate is a natural logarithm, at most 0.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum GateTransform {
    /// The log decay itself.
    #[default]
    Identity,
    /// $g = -e^{A_\mathrm{log}}\,\mathrm{softplus}(a + \mathrm{dt\\_bias})$ (Gated DeltaNet, KDA).
    Softplus,
    /// $g = \mathrm{lower\\_bound}\cdot\sigma(e^{A_\mathrm{log}}(a + \mathrm{dt\\_bias}))$, KDA's bounded gate.
    Bounded {
        /// The strongest decay, below 0; -5 in Kimi Linear.
        lower_bound: f64,
    },
}

/// The order of the last two dimensions of a state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum StateLayout {
    /// `[N, HV, K, V]`.
    #[default]
    KeyFirst,
    /// `[N, HV, V, K]`, as vLLM and FlashKDA store it.
    ValueFirst,
}

/// How a call is computed.
///
/// ```
/// use delta_rule::{BetaTransform, Options};
/// let options = Options::new().with_qk_l2norm(true).with_beta(BetaTransform::TwoSigmoid);
/// assert_eq!(options.chunk_size, None); // the engine chooses
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Options {
    /// Factor on the output; `None` is $K^{-1/2}$.
    pub scale: Option<f64>,
    /// Micro-steps per chunk; `None` lets the engine choose. The result depends on it only by rounding.
    pub chunk_size: Option<usize>,
    /// Normalise q and k first: $x / \sqrt{x \cdot x + 10^{-6}}$. Default: false.
    pub qk_l2norm: bool,
    /// What `beta` holds. Default: beta itself.
    pub beta: BetaTransform,
    /// What `g` holds. Default: the log decay itself.
    pub gate: GateTransform,
    /// Order of the state's last two dimensions. Default: `[N, HV, K, V]`.
    pub state_layout: StateLayout,
}

impl Options {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the factor on the output (default $K^{-1/2}$).
    #[must_use]
    pub fn with_scale(mut self, scale: f64) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Sets the micro-steps per chunk (default: the engine chooses).
    #[must_use]
    pub fn with_chunk_size(mut self, chunk_size: usize) -> Self {
        self.chunk_size = Some(chunk_size);
        self
    }

    /// L2-normalises q and k per head (default: false).
    #[must_use]
    pub fn with_qk_l2norm(mut self, on: bool) -> Self {
        self.qk_l2norm = on;
        self
    }

    /// Says what `beta` holds (default: beta itself).
    #[must_use]
    pub fn with_beta(mut self, beta: BetaTransform) -> Self {
        self.beta = beta;
        self
    }

    /// Says what `g` holds (default: the log decay itself).
    #[must_use]
    pub fn with_gate(mut self, gate: GateTransform) -> Self {
        self.gate = gate;
        self
    }

    /// Sets the order of the state's last two dimensions (default `[N, HV, K, V]`).
    #[must_use]
    pub fn with_state_layout(mut self, layout: StateLayout) -> Self {
        self.state_layout = layout;
        self
    }

    /// The factor on the output for keys of `key_dim` channels.
    pub fn scale_for(&self, key_dim: usize) -> f64 {
        self.scale.unwrap_or_else(|| (key_dim as f64).powf(-0.5))
    }

    /// Refuses values that have no meaning.
    pub(crate) fn validate(&self) -> Result<()> {
        let invalid = |option, problem: String| Err(Error::InvalidOption { option, problem });
        if self.chunk_size == Some(0) {
            return Err(Error::ChunkSize { got: 0, supported: "at least 1" });
        }
        if let Some(scale) = self.scale.filter(|s| !s.is_finite()) {
            return invalid("scale", format!("must be finite, got {scale}"));
        }
        if let GateTransform::Bounded { lower_bound } = self.gate
            && !(lower_bound < 0.0 && lower_bound.is_finite())
        {
            return invalid("gate", format!("lower_bound must be below 0 and finite, got {lower_bound}"));
        }
        Ok(())
    }
}
