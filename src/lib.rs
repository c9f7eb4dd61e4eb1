//! Delta-rule linear attention: DeltaNet, Gated DeltaNet, Kimi Delta Attention and DeltaProduct.
//!
//! One recurrence on a state $S \in \mathbb{R}^{K \times V}$ per sequence and value head, with three knobs
//! ([`Rule`]: decay and micro-steps; the range of `beta` is the caller's):
//!
//! ```text
//! S <- D_t S                                   once per token
//! S <- S + k_j (beta_j (v_j - S^T k_j))^T      n_h times
//! o_t = scale * S^T q_t
//! ```
//!
//! | engine | what | where |
//! |---|---|---|
//! | [`mod@reference`] | token loops, forward and backward: the truth | CPU, f32 and f64 |
//! | [`chunk`] | chunkwise form, forward and backward | CPU, all threads, f32 and f64 |
//! | `gpu` (features `wgpu`, `cuda`) | kernels, forward and backward | f32, f16, and bf16 on CUDA |
//!
//! All take a [`Problem`] (rule and shapes, checked when made), [`Options`] and the tensors, and return a
//! [`Result`] whose [`Error`] names what is wrong before anything is computed.
//!
//! ```
//! use delta_rule::{Inputs, Options, Problem, Rule, Shape, chunk};
//! let shape = Shape { batch: 1, tokens: 2, heads: 1, value_heads: 1, key_dim: 2, value_dim: 1 };
//! let problem = Problem::new(Rule::deltanet(), shape)?;
//! let k = [1.0f32, 0.0, 1.0, 0.0];
//! let inputs = Inputs::new(&k, &k, &[3.0, 7.0], &[1.0, 1.0]);
//! let out = chunk::forward(&problem, &Options::new().with_scale(1.0), &inputs)?;
//! assert_eq!(out.o, [3.0, 7.0]); // the second write replaced the first
//! # Ok::<(), delta_rule::Error>(())
//! ```

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
