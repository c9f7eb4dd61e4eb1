//! The delta-rule family as one rule with two knobs.

/// How the state decays before each token is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Decay {
    /// No decay: DeltaNet, DeltaProduct.
    None,
    /// One gate per value head, $g \in \mathbb{R}$: Gated DeltaNet, gated DeltaProduct.
    Head,
    /// One gate per key channel, $g \in \mathbb{R}^K$: Kimi Delta Attention.
    Channel,
}

/// A member of the delta-rule family.
///
/// ```text
/// S <- D_t S                                   once per token
/// S <- S + k_j (beta_j (v_j - S^T k_j))^T      micro_steps times
/// o_t = scale * S^T q_t
/// ```
///
/// with $D_t = I$, $e^{g_t}$ or $\mathrm{diag}(e^{g_t})$. The range of `beta` is the caller's:
/// in $[0, 1]$ the eigenvalues along a unit key lie in $[0, 1]$, in $[0, 2]$ they reach down
/// to $-1$ (Grazzi et al., 2024). `beta |k|^2` must not exceed 2, or the recurrence grows without
/// bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rule {
    /// The gate.
    pub decay: Decay,
    /// Writes per token, $n_h$; 1 for all but DeltaProduct.
    pub micro_steps: usize,
}

impl Rule {
    /// DeltaNet (Schlag et al., 2021; Yang et al., 2024).
    pub const fn deltanet() -> Self {
        Self { decay: Decay::None, micro_steps: 1 }
    }

    /// Gated DeltaNet (Yang, Kautz and Hatamizadeh, 2024).
    pub const fn gated_deltanet() -> Self {
        Self { decay: Decay::Head, micro_steps: 1 }
    }

    /// Kimi Delta Attention (Kimi Team, 2025).
    pub const fn kda() -> Self {
        Self { decay: Decay::Channel, micro_steps: 1 }
    }

    /// DeltaProduct with `micro_steps` Householder factors per token (Siems et al., 2025).
    pub const fn delta_product(micro_steps: usize) -> Self {
        Self { decay: Decay::None, micro_steps }
    }

    /// DeltaProduct with one gate per value head.
    pub const fn gated_delta_product(micro_steps: usize) -> Self {
        Self { decay: Decay::Head, micro_steps }
    }
}
