//! Where things lie in device memory.

use cubecl::prelude::*;

/// Four floats: the unit of scratch and of shared memory.
pub(crate) type F4 = Vector<f32, Const<4>>;

/// Element strides of a `[B, T, H, D]` tensor whose last dimension is contiguous.
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

/// One sequence, as the table lists it: `[row, first token, tokens, first chunk]` each.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Sequence {
    pub(crate) row: usize,
    pub(crate) start: usize,
    pub(crate) tokens: usize,
    pub(crate) first_chunk: usize,
}

/// Reads sequence `n` of the table.
#[cube]
pub(crate) fn sequence(table: &Array<u32>, n: usize) -> Sequence {
    Sequence {
        row: table[4 * n] as usize,
        start: table[4 * n + 1] as usize,
        tokens: table[4 * n + 2] as usize,
        first_chunk: table[4 * n + 3] as usize,
    }
}

/// The channels from `c` on, as many as the result holds, of a row of `width` channels; zeros past the end or when
/// `!valid`. The tensor is read in vectors of that many, or of one.
#[cube]
pub(crate) fn load<F: Float, N: Size, C: Size>(
    x: &Array<Vector<F, N>>,
    row: usize,
    c: usize,
    valid: bool,
    #[comptime] width: usize,
) -> Vector<f32, C> {
    let lanes = x.vector_size();
    let mut out = Vector::<f32, C>::new(0.0f32);
    let len = out.vector_size();
    if valid && c < width {
        if comptime!(lanes == len) {
            out = Vector::cast_from(x[(row + c) / len]);
        } else {
            #[unroll]
            for e in 0..len {
                if c + e < width {
                    out[e] = f32::cast_from(x[row + c + e][0]);
                }
            }
        }
    }
    out
}

/// Writes the channels from `c` on, but none past `width`.
#[cube]
pub(crate) fn store<F: Float, N: Size, C: Size>(
    x: &mut Array<Vector<F, N>>,
    row: usize,
    c: usize,
    value: Vector<f32, C>,
    #[comptime] width: usize,
) {
    let lanes = x.vector_size();
    let len = value.vector_size();
    if c < width {
        if comptime!(lanes == len) {
            x[(row + c) / len] = Vector::cast_from(value);
        } else {
            #[unroll]
            for e in 0..len {
                if c + e < width {
                    x[row + c + e] = Vector::cast_from(value[e]);
                }
            }
        }
    }
}

/// Four of a token's gates per channel, from channel `c` on; zeros past the end or when `!valid`. Rows of gates need not be
/// aligned.
#[cube]
pub(crate) fn load_gates<G: Float>(
    g: &Array<G>,
    row: usize,
    c: usize,
    valid: bool,
    #[comptime] width: usize,
) -> F4 {
    let mut gates = F4::new(0.0f32);
    if valid {
        #[unroll]
        for e in 0..4usize {
            if c + e < width {
                gates[e] = f32::cast_from(g[row + c + e]);
            }
        }
    }
    gates
}
