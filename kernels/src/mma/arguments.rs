//! What kernels are given, in the parts that travel together.

use cubecl::prelude::*;

use super::tile::V8;
use crate::tensors::Strided;

/// A tensor whose rows are read and written 16 bytes at a time. Its strides are multiples of 8, and so is the offset of its
/// buffer.
pub type Rows<F> = Strided<Vector<F, V8>>;

/// What `prepare` leaves of every chunk and head: blocks of matrices, and factors of micro-steps.
#[derive(CubeType, CubeLaunch)]
pub struct Records<F: Float> {
    pub blocks: Array<Vector<F, V8>>,
    pub factors: Array<f32>,
}

/// What `sweep` leaves for `gradients`: the residuals R, every second state, and the gradient of every second state.
#[derive(CubeType, CubeLaunch)]
pub struct Kept<F: Float> {
    pub residuals: Array<Vector<F, V8>>,
    pub states: Array<Vector<F, V8>>,
    pub d_states: Array<Vector<F, V8>>,
}

/// Where the gradients of inputs go that `gradients` finds. Those of q and k have a head for each value head.
#[derive(CubeType, CubeLaunch)]
pub struct InputGradients<F: Float, B: CubePrimitive, G: CubePrimitive> {
    pub q: Rows<F>,
    pub k: Rows<F>,
    pub beta: Strided<B>,
    pub g: Strided<G>,
}

/// Sizes that the kernels share.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub struct Sizes {
    /// Tokens of a row of the batch, unless sequences are packed.
    pub tokens: u32,
    /// Of the launch: `prepare` counts segments where sequences are split.
    pub sequences: u32,
    /// Value heads, and how many of them share a key head.
    pub heads: u32,
    pub group: u32,
}
