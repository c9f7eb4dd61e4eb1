//! The chunk engine on the CPU: the residual chunkwise form, its matrix products by `gemm`.
//!
//! A chunk covers C micro-steps of one sequence; tokens that end inside it are read. With
//! $\Gamma_{ij} = \prod_{l=j+1}^{i} D_l$, the decays between two rows:
//!
//! ```text
//! L = diag(beta) stril(K K^T . Gamma)     T = (I + L)^-1 diag(beta)     P = scale tril(Q K^T . Gamma)
//! N = T (V - Kg S)      O = Qg S + P N      S <- gamma S + Kd^T N
//! Kg = K . Gamma_{i0}   Qg = scale Q . Gamma_{i0}   Kd = K . Gamma_{Ci}   gamma = Gamma_{C0}
//! ```
//!
//! (Yang et al., 2024, "Parallelizing linear transformers with the delta rule over sequence length", with one
//! inverse for every gate.) Decays are running products of factors in $[0, 1]$: no exponent is ever positive
//! and no difference of sums cancels, however strong the gates.

mod forward;
mod gram;
mod inverse;
mod matrix;

pub use forward::forward;
