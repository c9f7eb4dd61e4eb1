//! What several value heads, or several chunks, have a share in.

use cubecl::prelude::*;

use super::blueprint::{Blueprint, SLICE4};
use super::prepare::{Chunk, chunk_of};
use super::walk::dot;
use crate::record::{F4, Strides, load4, store4};
use crate::spec::Decay;

/// The gradients of q and k, from what [`gradients`](mod@super::gradients) left in the records: a sum over the value
/// heads of each key head, then back through the norm, $dx = r\,(dy - r^2 x\,(x \cdot dy))$.
/// Cube `p` takes chunk `p / key_heads` and key head `first_key_head + p % key_heads`.
#[cube(launch_unchecked)]
pub fn collect<F: Float, N: Size>(
    q: &Array<Vector<F, N>>,
    k: &Array<Vector<F, N>>,
    table: &Array<u32>,
    scratch: &Array<F4>,
    dq: &mut Array<Vector<F, N>>,
    dk: &mut Array<Vector<F, N>>,
    q_at: Strides,
    k_at: Strides,
    dq_at: Strides,
    dk_at: Strides,
    sequences: u32,
    chunks: u32,
    first_key_head: u32,
    key_heads: u32,
    group: u32,
    #[comptime] bp: Blueprint,
    #[define(F)] _type: StorageType,
) {
    if CUBE_POS >= (chunks * key_heads) as usize {
        terminate!();
    }
    let n_h = comptime!(bp.spec.micro_steps);
    let row4 = comptime!(bp.padded_key_dim() / 4);
    let mut space = SharedMemory::<f32>::new(comptime!(2 * bp.prepare_units()));
    let id = CUBE_POS / key_heads as usize;
    let head = CUBE_POS % key_heads as usize;
    let h = first_key_head as usize + head;
    let here: Chunk = chunk_of(table, id, sequences, bp);
    let first = (id * (key_heads * group) as usize + head * group as usize) * comptime!(bp.record_vectors());

    let i = UNIT_POS as usize % bp.chunk;
    let step = here.start * n_h + here.step0 + i;
    let valid = i < here.rows;
    let is_read = valid && (here.step0 + i + 1) % n_h == 0;
    let token = here.start + (here.step0 + i) / n_h;
    let read = (here.step0 + i) / n_h - here.step0 / n_h;

    let k_from = first + comptime!(bp.dk_at()) + i * row4;
    let (k_row, dk_row) = (k_at.at(here.row, step, h), dk_at.at(here.row, step, h));
    collect_row(k, k_row, scratch, k_from, dk, dk_row, &mut space, valid, group, bp);
    let q_from = first + comptime!(bp.dq_at()) + read * row4;
    let (q_row, dq_row) = (q_at.at(here.row, token, h), dq_at.at(here.row, token, h));
    collect_row(q, q_row, scratch, q_from, dq, dq_row, &mut space, is_read, group, bp);
}

/// One row, dealt out to the units of its parts.
#[cube]
fn collect_row<F: Float, N: Size>(
    x: &Array<Vector<F, N>>,
    x_row: usize,
    scratch: &Array<F4>,
    from: usize,
    dx: &mut Array<Vector<F, N>>,
    dx_row: usize,
    space: &mut SharedMemory<f32>,
    valid: bool,
    group: u32,
    #[comptime] bp: Blueprint,
) {
    let units = comptime!(bp.prepare_units());
    let dim = comptime!(bp.spec.key_dim);
    let channels = comptime!(bp.slices() * SLICE4);
    let i = UNIT_POS as usize % bp.chunk;
    let part = UNIT_POS as usize / bp.chunk;
    let mut rstd = 1.0f32;
    let mut along = 0.0f32;
    if comptime!(bp.spec.qk_l2norm) {
        let mut square = 0.0f32;
        let mut c = part;
        while c < channels {
            let value = load4(x, x_row, 4 * c, valid, dim);
            let dy = over_group(scratch, from + c, valid, group, bp);
            square = dot(value, value, square);
            along = dot(value, dy, along);
            c += bp.parts;
        }
        space[UNIT_POS as usize] = square;
        space[units + UNIT_POS as usize] = along;
        sync_cube();
        square = 0.0f32;
        along = 0.0f32;
        #[unroll]
        for p in 0..bp.parts {
            square += space[p * bp.chunk + i];
            along += space[units + p * bp.chunk + i];
        }
        sync_cube();
        rstd = f32::inverse_sqrt(square + 1e-6f32);
        along *= rstd * rstd;
    }
    let mut c = part;
    while c < channels {
        let mut dy = over_group(scratch, from + c, valid, group, bp);
        if comptime!(bp.spec.qk_l2norm) {
            let value = load4(x, x_row, 4 * c, valid, dim);
            dy = F4::new(rstd) * (dy - value * F4::new(along));
        }
        if valid {
            store4(dx, dx_row, 4 * c, dy, dim);
        }
        c += bp.parts;
    }
}

/// Four channels of a gradient, over the value heads of a group.
#[cube]
fn over_group(scratch: &Array<F4>, at: usize, valid: bool, group: u32, #[comptime] bp: Blueprint) -> F4 {
    let mut sum = F4::new(0.0f32);
    if valid {
        for member in 0..group as usize {
            sum += scratch[at + member * comptime!(bp.record_vectors())];
        }
    }
    sum
}

/// The gradients of `a_log` and `dt_bias`: one cube per value head, all chunks.
#[cube(launch_unchecked)]
pub fn collect_constants(
    scratch_scalars: &Array<f32>,
    d_a_log: &mut Array<f32>,
    d_dt_bias: &mut Array<f32>,
    chunks: u32,
    first_head: u32,
    heads: u32,
    #[comptime] bp: Blueprint,
) {
    if CUBE_POS >= heads as usize {
        terminate!();
    }
    let units = comptime!(bp.prepare_units());
    let width = comptime!(if bp.spec.decay == Decay::Channel { bp.spec.key_dim } else { 1 });
    let hv = first_head as usize + CUBE_POS;
    let unit = UNIT_POS as usize;
    let mut space = SharedMemory::<f32>::new(comptime!(2 * units));
    let mut total = 0.0f32;
    for channel in 0..width {
        let mut a_log = 0.0f32;
        let mut bias = 0.0f32;
        let mut id = unit;
        while id < chunks as usize {
            let record = (id * heads as usize + CUBE_POS) * comptime!(bp.record_vectors());
            let at = 4 * (record + comptime!(bp.constants_at())) + channel;
            a_log += scratch_scalars[at];
            bias += scratch_scalars[at + comptime!(bp.padded_key_dim())];
            id += units;
        }
        space[unit] = a_log;
        space[units + unit] = bias;
        sync_cube();
        if unit == 0 {
            let mut sum = 0.0f32;
            for u in 0..units {
                total += space[u];
                sum += space[units + u];
            }
            if comptime!(bp.spec.has_bias) {
                d_dt_bias[hv * width + channel] = sum;
            }
        }
        sync_cube();
    }
    if unit == 0 {
        d_a_log[hv] = total;
    }
}
