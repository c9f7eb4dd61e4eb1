//! Device code of the `delta-rule` crate: the delta rule, twice.
//!
//! [`mma`] runs on tensor cores and takes a chunk at a time: what does not need the state is *prepared*, for all chunks
//! alike; then the state *scans* the chunks of its sequence. With $\Gamma_{ij} = \prod_{l=j+1}^{i} D_l$:
//!
//! ```text
//! prepare   L = diag(beta) stril(K K^T . Gamma)     T = (I + L)^-1 diag(beta)    P = scale tril(Q K^T . Gamma)
//!           Kg = K . Gamma_{i0}   Qg = scale Q . Gamma_{i0}   Kd = K . Gamma_{Ci}   gamma = Gamma_{C0}
//! scan      N = T (V - Kg S)      O = Qg S + P N      S <- gamma S + Kd^T N
//! ```
//!
//! It keeps the state in registers and prepares on planes beside those that scan; gates per channel, and few heads, get
//! a launch of their own. Long sequences of few heads are split into segments.
//!
//! [`portable`] runs everywhere and takes a micro-step at a time, as the recurrence is written. Chunks turn rank-one
//! updates into products of matrices, for more arithmetic in all; without tensor cores that buys nothing, since the
//! state lies in registers here, too:
//!
//! ```text
//! scan      S <- D S      n = beta (v - S^T k)      S <- S + k n^T      o = scale S^T q
//! ```
//!
//! The backward, in both: `sweep` for the states forwards and their gradient backwards (in `mma` behind another
//! `prepare`), `gradients` for what each chunk's rows get, `collect` for what several heads or chunks have a share in.
//! Decays are products of factors in `[0, 1]`: no exponent is ever positive and nothing cancels.
//!
//! The kernels take buffers, strides and a blueprint; they check nothing. The crate `delta-rule` does.

// `#[cube]` expands to public items without documentation.
#![allow(missing_docs)]
// Device code has `%` and `/`, and not `is_multiple_of` and `div_ceil`; its functions take their tensors one by one.
#![allow(clippy::manual_is_multiple_of, clippy::manual_div_ceil, clippy::too_many_arguments)]

mod known;
mod math;
pub mod mma;
mod order;
pub mod portable;
mod record;
mod spec;
mod tensors;

pub use spec::{BetaMap, Decay, GateMap, SOURCES, Sources, Spec};
pub use tensors::{
    GateFormula, GateFormulaLaunch, Gating, GatingLaunch, StateStrides, StateStridesLaunch, States,
    StatesLaunch, Strided, StridedLaunch, Strides, StridesLaunch,
};
