//! One cube per chunk and value head: the gradients of q, k, beta and g, once the states are known.
//!
//! With E the key as it erases, and H as it writes, in units of beta (so that nothing is divided by it):
//!
//! ```text
//! Y = tril(dO R^T)    X = stril(dV R^T)
//! dQ_i = scale (Gamma_i0 . dO_i S0^T + sum_j<=i beta_j Y_ij Gamma_ij . K_j)
//! E_i  =       -Gamma_i0 . dV_i S0^T - sum_j<i  beta_j X_ij Gamma_ij . K_j      k as it erases
//! H_j  =  Gamma_Cj . R_j dS^T + sum_i>=j Gamma_ij . (Y_ij scale Q_i - X_ij K_i)  k as it writes, over beta
//! dK = E + beta H       dbeta_j = K_j . H_j
//! ```
//!
//! The decay of row t lies in every path from a row before it to one at or after it. So dg_t is the sum of
//! `Q_i dQ_i + K_i E_i - beta_i K_i H_i` (H without its first term) over i >= t, of
//! `beta_j K_j Gamma_Cj (R_j dS^T)` over j < t, and of `gamma dS . S0`. Paths inside one token are left out: nothing
//! decays on them, they would cancel, and bury what strong gates leave.

use cubecl::prelude::*;

use super::blueprint::{Blueprint, SLICE, SLICE_LD, SLICE4};
use super::chunk::{chunk_of, load_decays, load_qk};
use super::rows::{Paths, Rows, between_tokens, grams, inside_token, through_states, walk_row};
use crate::known::known_and;
use crate::math::{beta_slope, decay_of, dot, gate_constants, gate_slopes};
use crate::order::declare_in_order;
use crate::record::F4;
use crate::spec::{Decay, GateMap};
use crate::tensors::{Gating, Strided};

/// Reads the records that [`sweep`](mod@super::sweep) has filled; leaves in them the gradients of q and k, for one
/// value head and before any norm, and the chunk's share of those of `a_log` and `dt_bias`; writes those of beta
/// and g. Cube `p` takes chunk `p / heads` and head `first_head + p % heads`.
#[cube(launch_unchecked)]
pub fn gradients<F: Float, B: Float, G: Float, N: Size>(
    q: &Strided<Vector<F, N>>,
    k: &Strided<Vector<F, N>>,
    gating: &Gating<B, G>,
    d_o: &Strided<Vector<F, N>>,
    table: &Array<u32>,
    scratch: &mut Array<F4>,
    scratch_scalars: &mut Array<f32>,
    d_beta: &mut Strided<B>,
    dg: &mut Strided<G>,
    sequences: u32,
    chunks: u32,
    first_head: u32,
    heads: u32,
    group: u32,
    scale: f32,
    #[comptime] bp: Blueprint,
    #[define(F, B, G)] _types: [StorageType; 3],
) {
    if CUBE_POS >= (chunks * heads) as usize {
        terminate!();
    }
    let (beta, g) = (&gating.beta, &gating.g);
    let chunk = comptime!(bp.chunk);
    let n_h = comptime!(bp.spec.micro_steps);
    let parts = comptime!(bp.parts);
    let owned = comptime!(SLICE4 / bp.parts);
    let ld = comptime!(chunk + 1);
    let decay = comptime!(bp.spec.decay);
    let per_channel = comptime!(bp.spec.decay == Decay::Channel);
    let formula = comptime!(bp.spec.gate != GateMap::Identity);

    let mut rows = Rows {
        a: SharedMemory::<F4>::new(chunk * SLICE_LD),
        b: SharedMemory::<F4>::new(chunk * SLICE_LD),
        c: SharedMemory::<F4>::new(chunk * SLICE_LD),
    };
    let mut s = SharedMemory::<F4>::new(SLICE * SLICE_LD);
    let mut ds = SharedMemory::<F4>::new(SLICE * SLICE_LD);
    let mut y = SharedMemory::<f32>::new(chunk * ld);
    let mut x = SharedMemory::<f32>::new(chunk * ld);
    let mut betas = SharedMemory::<f32>::new(chunk);
    let mut head_decays = SharedMemory::<f32>::new(chunk);
    let mut k_factor = SharedMemory::<f32>::new(chunk);
    let mut q_factor = SharedMemory::<f32>::new(chunk);
    let mut whole = SharedMemory::<f32>::new(SLICE);

    let hv = first_head as usize + CUBE_POS % heads as usize;
    let h = hv / group as usize;
    let here = chunk_of(table, CUBE_POS / heads as usize, sequences, bp);
    let step0 = here.step0;
    let record = CUBE_POS * comptime!(bp.record_vectors());

    let unit = UNIT_POS as usize;
    let i = unit % chunk;
    let part = unit / chunk;
    let valid = i < here.rows;
    let is_read = valid && (step0 + i + 1) % n_h == 0;
    let starts = valid && (step0 + i) % n_h == 0;
    // Rows before `first` belong to earlier tokens, rows from `next` on to later ones.
    let since = usize::min((step0 + i) % n_h, i);
    let first = i - since;
    let next = i + n_h - (step0 + i) % n_h;

    if part == 0 {
        let at = 4 * (record + comptime!(bp.factors_at())) + i;
        betas[i] = 0.0f32;
        k_factor[i] = 1.0f32;
        q_factor[i] = scale;
        if valid {
            betas[i] = scratch_scalars[at];
            if comptime!(bp.spec.qk_l2norm) {
                k_factor[i] = scratch_scalars[at + chunk];
                q_factor[i] = scratch_scalars[at + 2 * chunk] * scale;
            }
        }
        let mut d = 1.0f32;
        if known_and(decay == Decay::Head, starts) {
            let (a, bias) = gate_constants(&gating.formula, hv, 0usize, bp.spec);
            let z = f32::cast_from(g.data[g.at.at(here.row, here.start + (step0 + i) / n_h, hv)]);
            d = decay_of(z, a, bias, gating.formula.lower_bound, bp.spec.gate);
        }
        head_decays[i] = d;
    }
    sync_cube();

    grams(d_o, scratch, &mut rows, &mut y, &mut x, here, hv, record, i, part, bp);
    sync_cube();
    let mut from_start = 1.0f32;
    let mut to_end = 1.0f32;
    if comptime!(decay == Decay::Head) {
        for l in 0..chunk {
            from_start *= select(l <= i, head_decays[l], 1.0f32);
            to_end *= select(l > i, head_decays[l], 1.0f32);
        }
        if part == 0 {
            walk_row(&mut y, i * ld, &head_decays, i);
            walk_row(&mut x, i * ld, &head_decays, i);
        }
        sync_cube();
    }

    let mut d_beta_part = 0.0f32;
    // Of the sums of dg, per row: over i >= t, over j < t; and what every row gets.
    let mut later = 0.0f32;
    let mut earlier = 0.0f32;
    let mut always = 0.0f32;

    for slice in 0..comptime!(bp.slices()) {
        let mut u = Array::<F4>::new(owned);
        let mut e = Array::<F4>::new(owned);
        let mut w = Array::<F4>::new(owned);
        through_states(
            d_o, scratch, &mut rows, &mut s, &mut ds, &mut whole, &mut u, &mut e, &mut w, here, hv, record,
            slice, i, part, bp,
        );
        load_qk(q, k, &mut rows.b, &mut rows.a, here, h, slice, &q_factor, &k_factor, bp);
        if comptime!(per_channel) {
            load_decays(g, &gating.formula, &mut rows.c, here, hv, slice, bp);
        }
        sync_cube();
        #[unroll]
        for m in 0..owned {
            let c = part + parts * m;
            let at = i * SLICE_LD + c;
            let (key, query) = (rows.a[at], rows.b[at]);
            let beta_i = F4::new(betas[i]);

            let base = Paths {
                reads: u[m] * F4::new(from_start),
                erases: e[m] * F4::new(-from_start),
                writes: F4::new(0.0f32),
                ends: w[m] * F4::new(to_end),
            };
            let far = between_tokens(base, &rows, &y, &x, &betas, i, c, first, next, bp);
            let a_i = query * far.reads + key * far.erases - beta_i * key * far.writes;
            let b_i = beta_i * key * far.ends;
            let all = inside_token(far, &rows, &y, &x, &betas, i, c, first, next, bp);
            let written = all.writes + all.ends;

            let channel = slice * SLICE4 + c;
            let row4 = comptime!(bp.padded_key_dim() / 4);
            scratch[record + comptime!(bp.dk_at()) + i * row4 + channel] = all.erases + beta_i * written;
            if is_read {
                let read = (step0 + i) / n_h - step0 / n_h;
                scratch[record + comptime!(bp.dq_at()) + read * row4 + channel] = all.reads * F4::new(scale);
            }
            d_beta_part = dot(key, written, d_beta_part);
            if comptime!(per_channel) {
                s[at] = a_i;
                ds[at] = b_i;
            } else {
                later = dot(a_i, F4::new(1.0f32), later);
                earlier = dot(b_i, F4::new(1.0f32), earlier);
            }
        }
        if comptime!(decay == Decay::Head) {
            for c in 0..SLICE {
                always += whole[c];
            }
        }
        if comptime!(per_channel) {
            sync_cube();
            #[unroll]
            for m in 0..owned {
                let c = part + parts * m;
                let mut sum = F4::new(0.0f32);
                let mut gamma = F4::new(1.0f32);
                for l in 0..chunk {
                    sum += select(l >= i, s[l * SLICE_LD + c], ds[l * SLICE_LD + c]);
                    gamma *= rows.c[l * SLICE_LD + c];
                }
                #[unroll]
                for lane in 0..4usize {
                    sum[lane] = fma(gamma[lane], whole[4 * c + lane], sum[lane]);
                }
                let mut by_bias = F4::new(0.0f32);
                let mut by_a_log = F4::new(0.0f32);
                if starts {
                    let token = here.start + (step0 + i) / n_h;
                    #[unroll]
                    for lane in 0..4usize {
                        let channel = slice * SLICE + 4 * c + lane;
                        if channel < bp.spec.key_dim {
                            let (a, bias) = gate_constants(&gating.formula, hv, channel, bp.spec);
                            let z = f32::cast_from(g.data[g.at.at(here.row, token, hv) + channel]);
                            let (by_x, by_a) =
                                gate_slopes(z, a, bias, gating.formula.lower_bound, bp.spec.gate);
                            by_bias[lane] = sum[lane] * by_x;
                            by_a_log[lane] = sum[lane] * by_a;
                            dg.data[dg.at.at(here.row, token, hv) + channel] = G::cast_from(sum[lane] * by_x);
                        }
                    }
                }
                if comptime!(formula) {
                    u[m] = by_bias;
                    w[m] = by_a_log;
                }
            }
            if comptime!(formula) {
                sync_cube();
                #[unroll]
                for m in 0..owned {
                    s[i * SLICE_LD + part + parts * m] = u[m];
                    ds[i * SLICE_LD + part + parts * m] = w[m];
                }
                sync_cube();
                if unit < SLICE4 {
                    let mut by_bias = F4::new(0.0f32);
                    let mut by_a_log = F4::new(0.0f32);
                    for l in 0..chunk {
                        by_bias += s[l * SLICE_LD + unit];
                        by_a_log += ds[l * SLICE_LD + unit];
                    }
                    let at = record + comptime!(bp.constants_at()) + slice * SLICE4 + unit;
                    scratch[at] = by_a_log;
                    scratch[at + comptime!(bp.padded_key_dim() / 4)] = by_bias;
                }
            }
        }
        sync_cube();
    }

    // The Gram matrices have done their work and hold the sums over the parts.
    let d_beta_row = over_parts(&mut x, d_beta_part, i, part, bp);
    if part == 0 && valid {
        let step = here.start * n_h + step0 + i;
        let z = f32::cast_from(beta.data[beta.at.at(here.row, step, hv)]);
        d_beta.data[d_beta.at.at(here.row, step, hv)] =
            B::cast_from(d_beta_row * beta_slope(z, bp.spec.beta));
    }
    if comptime!(decay == Decay::Head) {
        let later = over_parts(&mut x, later, i, part, bp);
        let earlier = over_parts(&mut x, earlier, i, part, bp);
        if part == 0 {
            y[i] = later;
            y[chunk + i] = earlier;
        }
        sync_cube();
        let mut by_bias = 0.0f32;
        let mut by_a_log = 0.0f32;
        if part == 0 && starts {
            let mut sum = always * from_start * to_end;
            for l in 0..chunk {
                sum += select(l >= i, y[l], y[chunk + l]);
            }
            let token = here.start + (step0 + i) / n_h;
            let (a, bias) = gate_constants(&gating.formula, hv, 0usize, bp.spec);
            let z = f32::cast_from(g.data[g.at.at(here.row, token, hv)]);
            let (by_x, by_a) = gate_slopes(z, a, bias, gating.formula.lower_bound, bp.spec.gate);
            by_bias = sum * by_x;
            by_a_log = sum * by_a;
            dg.data[dg.at.at(here.row, token, hv)] = G::cast_from(by_bias);
        }
        if comptime!(formula) {
            if part == 0 {
                x[i] = by_a_log;
                x[chunk + i] = by_bias;
            }
            sync_cube();
            if unit < 2 {
                let mut sum = 0.0f32;
                for l in 0..chunk {
                    sum += x[unit * chunk + l];
                }
                let at = record + comptime!(bp.constants_at()) + unit * comptime!(bp.padded_key_dim() / 4);
                scratch_scalars[4 * at] = sum;
            }
        }
    }
    declare_in_order();
}

/// The sum of a row's parts, in their order, for the units of part 0. Ends with a barrier.
#[cube]
fn over_parts(
    space: &mut SharedMemory<f32>,
    value: f32,
    i: usize,
    part: usize,
    #[comptime] bp: Blueprint,
) -> f32 {
    space[part * bp.chunk + i] = value;
    sync_cube();
    let mut sum = 0.0f32;
    #[unroll]
    for p in 0..bp.parts {
        sum += space[p * bp.chunk + i];
    }
    sync_cube();
    sum
}
