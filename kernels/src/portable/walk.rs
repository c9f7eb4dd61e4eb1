//! Gated Gram matrices and scaled keys by walking through a chunk.
//!
//! $e^{G_i - G_j}$ is the product of the decays that lie between the two rows. Instead of taking differences
//! of sums, which cancel, or anchors, which overflow when they are chosen badly, row i walks down through
//! the chunk and picks up one factor in `[0, 1]` per step: exact to rounding for any gate.

use cubecl::prelude::*;

use super::blueprint::SLICE_LD;
use crate::record::F4;
use crate::spec::Decay;

/// A key and a query at the end of their walk.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Walked {
    pub(crate) k: F4,
    pub(crate) q: F4,
}

#[cube]
pub(crate) fn dot(a: F4, b: F4, acc: f32) -> f32 {
    fma(a[3], b[3], fma(a[2], b[2], fma(a[1], b[1], fma(a[0], b[0], acc))))
}

/// Row `i` from itself down to row 0, on the four channels `c` of a slice:
/// `gk[j] += (k_i . Gamma_ij) k_j` and `gq[j] += (q_i . Gamma_ij) k_j` for `j <= i`. Entries above the
/// diagonal are finite and meaningless. Returns the rows as they arrive, scaled by $\Gamma_{i0}$, the
/// decay of row 0 included.
#[cube]
pub(crate) fn walk_down(
    gk: &mut Array<f32>,
    gq: &mut Array<f32>,
    queries: &SharedMemory<F4>,
    keys: &SharedMemory<F4>,
    decays: &SharedMemory<F4>,
    i: usize,
    c: usize,
    #[comptime] chunk: usize,
    #[comptime] decay: Decay,
) -> Walked {
    let mut k = keys[i * SLICE_LD + c];
    let mut q = queries[i * SLICE_LD + c];
    #[unroll]
    for down in 0..chunk {
        let j = comptime!(chunk - 1 - down);
        let key = keys[j * SLICE_LD + c];
        gk[j] = dot(k, key, gk[j]);
        gq[j] = dot(q, key, gq[j]);
        if comptime!(decay == Decay::Channel) {
            let d = select(j <= i, decays[j * SLICE_LD + c], F4::new(1.0f32));
            k *= d;
            q *= d;
        }
    }
    Walked { k, q }
}

/// The product of the decays after row `i`, on four channels.
#[cube]
pub(crate) fn decay_after(decays: &SharedMemory<F4>, i: usize, c: usize, #[comptime] chunk: usize) -> F4 {
    let mut w = F4::new(1.0f32);
    #[unroll]
    for l in 1..chunk {
        w *= select(l > i, decays[l * SLICE_LD + c], F4::new(1.0f32));
    }
    w
}

/// The same walk for one gate per head, on a finished row `at..` of a Gram matrix: `row[j] *= Gamma_ij`.
/// Returns $\Gamma_{i0}$, the decay of row 0 included.
#[cube]
pub(crate) fn walk_row(gram: &mut SharedMemory<f32>, at: usize, decays: &SharedMemory<f32>, i: usize) -> f32 {
    let mut w = 1.0f32;
    for up in 0..i + 1 {
        let j = i - up;
        gram[at + j] *= w;
        w *= decays[j];
    }
    w
}
