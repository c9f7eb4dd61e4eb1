//! Device code of the `delta-rule` crate: the chunkwise delta rule in two launches.
//!
//! [`prepare`] works on every chunk at once and turns the rule (its decay, its micro-steps, its fused
//! transforms) into one record per chunk and value head; [`scan`] walks the chunks of a sequence with the
//! state in shared memory and knows no rule at all. With $\Gamma_{ij} = \prod_{l=j+1}^{i} D_l$:
//!
//! ```text
//! prepare   L = diag(beta) stril(K K^T . Gamma)     T = (I + L)^-1 diag(beta)    P = scale tril(Q K^T . Gamma)
//!           Kg = K . Gamma_{i0}   Qg = scale Q . Gamma_{i0}   Kd = K . Gamma_{Ci}   gamma = Gamma_{C0}
//! scan      N = T (V - Kg S)      O = Qg S + P N      S <- gamma S + Kd^T N
//! ```
//!
//! Every decay is a running product of factors in `[0, 1]`: no exponent is ever positive and nothing
//! cancels, whatever the gates (see `walk.rs`).
//!
//! The kernels take buffers, strides and a [`Blueprint`]; they check nothing. The crate `delta-rule` does.

// `#[cube]` expands to public items without documentation.
#![allow(missing_docs)]
// Device code has `%`, and not `is_multiple_of`; its functions take their tensors one by one.
#![allow(clippy::manual_is_multiple_of, clippy::too_many_arguments)]

mod math;
pub mod mma;
pub mod portable;
mod record;
mod spec;

pub use record::{StateStrides, StateStridesLaunch, Strides, StridesLaunch};
pub use spec::{BetaMap, Decay, GateMap, Spec};
