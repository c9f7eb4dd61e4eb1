//! The chunk engine on the CPU: the residual chunkwise form, its matrix products by `gemm`.
//!
//! A chunk covers C micro-steps of one sequence; tokens that end inside it are read. With
//! $\Gamma_{ij} = \prod_{l=j+1}^{i} D_l$, the decays between two rows:
//!
//! ```text
//! M = (I + stril(K K^T . Gamma) diag(beta))^-1     P = scale tril(Q K^T . Gamma)
//! R = M (V - Kg S)      N = diag(beta) R      O = Qg S + P N      S <- gamma S + Kd^T N
//! Kg = K . Gamma_{i0}   Qg = scale Q . Gamma_{i0}   Kd = K . Gamma_{Ci}   gamma = Gamma_{C0}
//! ```
//!
//! (Yang et al., 2024, "Parallelizing linear transformers with the delta rule over sequence length", with one
//! inverse for every gate.) Backward, from the last chunk to the first, with dS the gradient of the state after it:
//!
//! ```text
//! dN = P^T dO + Kd dS   dV = M^T diag(beta) dN   dS <- gamma dS + Qg^T dO - Kg^T dV
//! Y = tril(dO R^T)      X = -stril(dV R^T)
//! dQ = scale (dO S^T . Gamma_{i0} + sum_j beta_j Y_ij Gamma_ij K_j)
//! E  =       -dV S^T . Gamma_{i0} + sum_j beta_j X_ij Gamma_ij K_j           k as it erases
//! H  =        R dS^T . Gamma_{Ci} + sum_i Gamma_ij (Y_ij scale Q_i + X_ij K_i)   k as it writes
//! dK = E + beta H       dbeta = K . H
//! ```
//!
//! Decays are running products of factors in $[0, 1]$: no exponent is ever positive and no difference of sums
//! cancels, however strong the gates.

mod adjoint;
mod backward;
mod forward;
mod gram;
mod inverse;
mod lane;
mod matrix;
mod pairs;

pub use backward::backward;
pub use forward::forward;
