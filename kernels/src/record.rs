//! The table of sequences, and rows of tensors read and written a few channels at a time.

use cubecl::prelude::*;

/// Four floats: the unit of scratch and of shared memory.
pub(crate) type F4 = Vector<f32, Const<4>>;

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
