//! Tensors in device memory: a buffer, and how the tensor lies in it.

use cubecl::prelude::*;

/// Element strides of a `[B, T, H, D]` tensor whose last dimension is contiguous, or of a `[B, T, H]` tensor.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub struct Strides {
    /// From row to row of the batch.
    pub b: u32,
    /// From token (or micro-step) to token.
    pub t: u32,
    /// From head to head.
    pub h: u32,
}

#[cube]
impl Strides {
    /// The offset of channel 0 at `(row, t, head)`.
    pub(crate) fn at(&self, row: usize, t: usize, head: usize) -> usize {
        row * self.b as usize + t * self.t as usize + head * self.h as usize
    }

    /// The same in 32 bits, which reach every element of a tensor and take half of the instructions.
    pub(crate) fn at32(&self, row: usize, t: usize, head: usize) -> u32 {
        row as u32 * self.b + t as u32 * self.t + head as u32 * self.h
    }
}

/// Element strides of a state `[N, HV, K, V]` in any layout.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub struct StateStrides {
    /// From sequence to sequence.
    pub n: u32,
    /// From head to head.
    pub h: u32,
    /// From key channel to key channel.
    pub k: u32,
    /// From value channel to value channel.
    pub v: u32,
}

#[cube]
impl StateStrides {
    /// The offset of value channel 0 at `(n, head, key)`.
    pub(crate) fn row(&self, n: usize, head: usize, key: usize) -> usize {
        n * self.n as usize + head * self.h as usize + key * self.k as usize
    }
}

/// A `[B, T, H, D]` or `[B, T, H]` tensor.
#[derive(CubeType, CubeLaunch)]
pub struct Strided<T: CubePrimitive> {
    pub data: Array<T>,
    pub at: Strides,
}

/// States `[N, HV, K, V]`.
#[derive(CubeType, CubeLaunch)]
pub struct States<T: CubePrimitive> {
    pub data: Array<T>,
    pub at: StateStrides,
}

/// What the formulas of the gates take beside g: `a_log` `[HV]`, `dt_bias` `[HV]` or `[HV, K]`, and the bound.
#[derive(CubeType, CubeLaunch)]
pub struct GateFormula {
    pub a_log: Array<f32>,
    pub dt_bias: Array<f32>,
    pub lower_bound: f32,
}

/// Beta and g as the caller holds them.
#[derive(CubeType, CubeLaunch)]
pub struct Gating<B: CubePrimitive, G: CubePrimitive> {
    pub beta: Strided<B>,
    pub g: Strided<G>,
    pub formula: GateFormula,
}
