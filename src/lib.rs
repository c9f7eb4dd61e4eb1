//! Delta-rule linear attention: DeltaNet, Gated DeltaNet, KDA and DeltaProduct.

pub mod chunk;
mod error;
#[cfg(feature = "gpu")]
pub mod gpu;
mod host;
mod options;
mod problem;
mod real;
pub mod reference;
mod rule;
pub mod transform;

pub use error::{Error, Result};
pub use host::{Gradients, Inputs, Output, OutputGradients};
pub use options::{BetaTransform, GateTransform, Options, StateLayout};
pub use problem::{Ident, MAX_HEAD_DIM, Problem, Sequence, Shape};
pub use real::Real;
pub use rule::{Decay, Rule};

/// CubeCL, whose types appear in the signatures of `gpu`.
#[cfg(feature = "gpu")]
pub use cubecl;
