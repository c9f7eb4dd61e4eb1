//! What several value heads, or several chunks, have a share in.

use cubecl::prelude::*;

use super::blueprint::Blueprint;
use super::chunk::chunk_of;
use crate::math::dot;
use crate::order::declare_in_order;
use crate::record::{F4, load, store};
use crate::spec::Decay;
use crate::tensors::Strided;

/// The gradient of k (of q, where `reads`), from what [`gradients`](mod@super::gradients) left in the records: a sum
/// over the value heads of each key head, then back through the norm, $dx = r\,dy - r^3 x\,(x \cdot dy)$.
/// Cube `p` takes chunk `p / key_heads` and key head `first_key_head + p % key_heads`.
#[cube(launch_unchecked)]
pub fn collect<F: Float, N: Size>(
    x: &Strided<Vector<F, N>>,
    table: &Array<u32>,
    scratch: &Array<F4>,
    dx: &mut Strided<Vector<F, N>>,
    sequences: u32,
    chunks: u32,
    first_key_head: u32,
    key_heads: u32,
    group: u32,
    #[comptime] reads: bool,
    #[comptime] bp: Blueprint,
    #[define(F)] _type: StorageType,
) {
    if CUBE_POS >= (chunks * key_heads) as usize {
        terminate!();
    }
    let n_h = comptime!(bp.spec.micro_steps);
    let dim = comptime!(bp.spec.key_dim);
    let units = comptime!(bp.chunk_units());
    let row4 = comptime!(bp.padded_key_dim() / 4);
    let id = CUBE_POS / key_heads as usize;
    let head = CUBE_POS % key_heads as usize;
    let here = chunk_of(table, id, sequences, bp);
    let i = UNIT_POS as usize % bp.chunk;
    let part = UNIT_POS as usize / bp.chunk;

    let mut valid = i < here.rows;
    let mut t = here.start * n_h + here.step0 + i;
    let mut from = comptime!(bp.dk_at()) + i * row4;
    if comptime!(reads) {
        valid = valid && (here.step0 + i + 1) % n_h == 0;
        t = here.start + (here.step0 + i) / n_h;
        from = comptime!(bp.dq_at()) + ((here.step0 + i) / n_h - here.step0 / n_h) * row4;
    }
    let record = (id * (key_heads * group) as usize + head * group as usize) * comptime!(bp.record_vectors());
    from += record;
    let factors = record + comptime!(bp.factors_at());
    let h = first_key_head as usize + head;
    let x_row = x.at.at(here.row, t, h);
    let dx_row = dx.at.at(here.row, t, h);

    // x . dy, and what the norm divided by.
    let mut along = 0.0f32;
    let mut rstd = 1.0f32;
    if comptime!(bp.spec.qk_l2norm) {
        let mut space = SharedMemory::<f32>::new(units);
        if valid {
            let mut c = part;
            while c < row4 {
                along = dot(
                    load(&x.data, x_row, 4 * c, true, dim),
                    over_group(scratch, from + c, group, bp),
                    along,
                );
                c += bp.parts;
            }
        }
        space[UNIT_POS as usize] = along;
        sync_cube();
        along = 0.0f32;
        #[unroll]
        for p in 0..bp.parts {
            along += space[p * bp.chunk + i];
        }
        let factor = if comptime!(reads) { comptime!(2 * bp.chunk) } else { comptime!(bp.chunk) };
        rstd = scratch[factors + factor / 4 + i / 4][i % 4];
        along *= -rstd * rstd * rstd;
    }
    if valid {
        let mut c = part;
        while c < row4 {
            let mut dy = over_group(scratch, from + c, group, bp);
            if comptime!(bp.spec.qk_l2norm) {
                let value = load(&x.data, x_row, 4 * c, true, dim);
                dy = fma(value, F4::new(along), dy * F4::new(rstd));
            }
            store(&mut dx.data, dx_row, 4 * c, dy, dim);
            c += bp.parts;
        }
    }
    declare_in_order();
}

/// Four channels of a gradient, over the value heads of a group.
#[cube]
fn over_group(scratch: &Array<F4>, first: usize, group: u32, #[comptime] bp: Blueprint) -> F4 {
    let mut sum = scratch[first];
    for member in 1..group as usize {
        sum += scratch[first + member * comptime!(bp.record_vectors())];
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
    let units = comptime!(bp.chunk_units());
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
    declare_in_order();
}
