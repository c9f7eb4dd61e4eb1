//! Token loops, forward and backward: the truth that every other engine is held against.
//!
//! Per sequence and value head, with the state $S \in \mathbb{R}^{K \times V}$:
//!
//! ```text
//! S <- D_t S                                   once per token
//! S <- S + k_j (beta_j (v_j - S^T k_j))^T      n_h times
//! o_t = scale * S^T q_t
//! ```
//!
//! Written for reading, not for speed: one thread, plain loops, f32 or f64.

mod backward;
mod forward;
mod step;

pub use backward::backward;
pub use forward::forward;
