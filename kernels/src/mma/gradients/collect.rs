//! Sums over what `gradients` has left apart.

use cubecl::prelude::*;

use super::super::arguments::Rows;
use super::super::sweep::KEPT;
use super::super::tile::V8;
use crate::known::known_and;
use crate::order::declare_in_order;
use crate::spec::Sources;

/// Units of a cube of [`collect`](fn@collect).
pub const COLLECT_UNITS: usize = 256;
/// Units of a cube of [`collect_constants`](fn@collect_constants).
pub const CONSTANTS_UNITS: usize = 128;

/// Adds the gradients of the value heads that share a key head. `rows` counts tokens or micro-steps of the batch,
/// `per_row` those of one of its rows, `channels` the 16-byte units of a head.
#[cube(launch_unchecked, address_type = "u64")]
pub fn collect<F: Float>(
    parts: &Array<Vector<F, V8>>,
    out: &mut Rows<F>,
    rows: u32,
    per_row: u32,
    heads: u32,
    group: u32,
    channels: u32,
    #[comptime] _sources: Sources,
    #[define(F)] _type: StorageType,
) {
    let heads = heads as usize;
    let channels = channels as usize;
    let i = CUBE_POS * COLLECT_UNITS + UNIT_POS as usize;
    if i >= rows as usize * heads * channels {
        terminate!();
    }
    let c = i % channels;
    let h = i / channels % heads;
    let row = i / (channels * heads);
    let first = (row * heads + h) * group as usize * channels + c;
    let mut sum = Vector::<f32, V8>::cast_from(0.0f32);
    for member in 0..group as usize {
        sum += Vector::<f32, V8>::cast_from(parts[first + member * channels]);
    }
    let per_row = per_row as usize;
    let at = out.at.at(row / per_row, row % per_row, h) / 8 + c;
    out.data[at] = Vector::cast_from(sum);
    declare_in_order();
}

/// The gradients of `a_log` and `dt_bias`, over all blocks: one cube per head, of which `channels` (1, or K at most
/// [`CONSTANTS_UNITS`]) have gates. Where sequences are packed, entries of chunks with which no block begins are left out.
#[cube(launch_unchecked, address_type = "u64")]
pub fn collect_constants(
    constants: &Array<f32>,
    table: &Array<u32>,
    d_a_log: &mut Array<f32>,
    d_dt_bias: &mut Array<f32>,
    blocks: u32,
    sequences: u32,
    heads: u32,
    #[comptime] channels: usize,
    #[comptime] has_bias: bool,
    #[comptime] packed: bool,
    #[comptime] _sources: Sources,
) {
    let unit = UNIT_POS as usize;
    let head = CUBE_POS;
    let mut shares = SharedMemory::<f32>::new(comptime!(2 * CONSTANTS_UNITS));
    let mut a_log = 0.0f32;
    let mut bias = 0.0f32;
    // A unit takes a channel, and every so many blocks.
    let strides = comptime!(CONSTANTS_UNITS / channels);
    let mut id = unit / channels;
    if unit < comptime!(CONSTANTS_UNITS / channels * channels) {
        while id < blocks as usize {
            let mut counts = true;
            if comptime!(packed) {
                let n = table[4 * sequences as usize + id] as usize;
                counts = (id - table[4 * n + 3] as usize) % KEPT == 0;
            }
            if counts {
                let at = 2 * (id * heads as usize + head) * channels + unit % channels;
                a_log += constants[at];
                bias += constants[at + channels];
            }
            id += strides;
        }
    }
    shares[unit] = a_log;
    shares[CONSTANTS_UNITS + unit] = bias;
    sync_cube();
    if unit == 0 {
        let mut sum = 0.0f32;
        for u in 0..CONSTANTS_UNITS {
            sum += shares[u];
        }
        d_a_log[head] = sum;
    }
    if known_and(has_bias, unit < channels) {
        let mut sum = 0.0f32;
        for stride in 0..strides {
            sum += shares[CONSTANTS_UNITS + stride * channels + unit];
        }
        d_dt_bias[head * channels + unit] = sum;
    }
    declare_in_order();
}
