//! What a kernel computes, whatever the device.

/// How the state decays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Decay {
    /// Not at all.
    None,
    /// One gate per value head.
    Head,
    /// One gate per key channel.
    Channel,
}

/// What beta holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BetaMap {
    /// Beta.
    Identity,
    /// A logit of $\sigma$.
    Sigmoid,
    /// A logit of $2\sigma$.
    TwoSigmoid,
}

/// What g holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GateMap {
    /// The log decay.
    Identity,
    /// The argument of $-e^{A}\,\mathrm{softplus}(\cdot + b)$.
    Softplus,
    /// The argument of $l\,\sigma(e^{A}(\cdot + b))$.
    Bounded,
}

/// The rule, the head dimensions and the fused transforms: one recurrence, specialised when a kernel is
/// compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Spec {
    /// How the state decays.
    pub decay: Decay,
    /// Writes per token, $n_h$.
    pub micro_steps: usize,
    /// K.
    pub key_dim: usize,
    /// V.
    pub value_dim: usize,
    /// Whether q and k are L2-normalised first.
    pub qk_l2norm: bool,
    /// What beta holds.
    pub beta: BetaMap,
    /// What g holds.
    pub gate: GateMap,
    /// Whether there is a `dt_bias`.
    pub has_bias: bool,
    /// Whether there is an initial state.
    pub has_initial_state: bool,
    /// [`SOURCES`].
    pub sources: Sources,
}

/// A hash of the sources of all kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Sources(pub &'static str);

/// A constant of every kernel. CubeCL can keep on disk what it has compiled, and finds it again by a kernel's name, types
/// and constants: with this one, never what older sources were compiled to.
pub const SOURCES: Sources = Sources(env!("KERNEL_SOURCES"));
