//! One cube per chunk and value head: the gradients of q, k, beta and g, once the states are known.
//!
//! With $H$ the gradient that reaches a write, in units of beta (so that nothing is divided by it):
//!
//! ```text
//! Y = tril(dO R^T)    X = stril(dV R^T)
//! dQ_i = scale (Gamma_i0 . dO_i S0^T + sum_j<=i beta_j Y_ij Gamma_ij . K_j)
//! dE_i =       -Gamma_i0 . dV_i S0^T - sum_j<i  beta_j X_ij Gamma_ij . K_j      k as it erases
//! H_j  =  Gamma_Cj . R_j dS^T + sum_i>=j Gamma_ij . (Y_ij scale Q_i - X_ij K_i)  k as it writes, over beta
//! dK = dE + beta H      dbeta_j = K_j . H_j
//! ```
//!
//! The decay of row t lies in every path from a row before it to one at or after it, so that
//! $dg_t = \sum_{i \ge t} (Q_i dQ_i + K_i dE_i - \beta_i K_i H_i) + \sum_{j<t} \beta_j K_j \Gamma_{Cj} (R_j dS^T)
//! + \gamma \langle dS, S_0 \rangle$, in which paths that end where they begin, in one token, are left out: they
//! would cancel, and bury what strong gates leave.

use cubecl::prelude::*;

use super::blueprint::{Blueprint, SLICE, SLICE_LD, SLICE4};
use super::prepare::{Chunk, chunk_of, load_decays, load_qk};
use super::walk::{dot, walk_row};
use crate::math::{beta_slope, decay_of, gate_constants, gate_slopes};
use crate::record::{F4, Strides, load4};
use crate::spec::{Decay, GateMap};

/// Reads the records that [`sweep`](mod@super::sweep) has filled; leaves in them the gradients of q and k, for one
/// value head and before any norm, and the chunk's share of those of `a_log` and `dt_bias`; writes those of beta
/// and g. Cube `p` takes chunk `p / heads` and head `first_head + p % heads`.
#[cube(launch_unchecked)]
pub fn gradients<F: Float, B: Float, G: Float, N: Size>(
    q: &Array<Vector<F, N>>,
    k: &Array<Vector<F, N>>,
    beta: &Array<B>,
    g: &Array<G>,
    a_log: &Array<f32>,
    dt_bias: &Array<f32>,
    d_o: &Array<Vector<F, N>>,
    table: &Array<u32>,
    scratch: &mut Array<F4>,
    scratch_scalars: &mut Array<f32>,
    d_beta: &mut Array<B>,
    dg: &mut Array<G>,
    q_at: Strides,
    k_at: Strides,
    beta_at: Strides,
    g_at: Strides,
    d_o_at: Strides,
    d_beta_at: Strides,
    dg_at: Strides,
    sequences: u32,
    chunks: u32,
    first_head: u32,
    heads: u32,
    group: u32,
    scale: f32,
    lower_bound: f32,
    #[comptime] bp: Blueprint,
    #[define(F, B, G)] _types: [StorageType; 3],
) {
    if CUBE_POS >= (chunks * heads) as usize {
        terminate!();
    }
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
        betas[i] = scratch_scalars[at];
        k_factor[i] = 1.0f32;
        q_factor[i] = scale;
        if comptime!(bp.spec.qk_l2norm) {
            k_factor[i] = scratch_scalars[at + chunk];
            q_factor[i] = scratch_scalars[at + 2 * chunk] * scale;
        }
        let mut d = 1.0f32;
        if comptime!(decay == Decay::Head) {
            if starts {
                let (a, bias) = gate_constants(a_log, dt_bias, hv, 0usize, bp.spec);
                let z = f32::cast_from(g[g_at.at(here.row, here.start + (step0 + i) / n_h, hv)]);
                d = decay_of(z, a, bias, lower_bound, bp.spec.gate);
            }
        }
        head_decays[i] = d;
    }
    sync_cube();

    grams(d_o, scratch, &mut rows, &mut y, &mut x, d_o_at, here, hv, record, i, part, bp);
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
            d_o, scratch, &mut rows, &mut s, &mut ds, &mut whole, &mut u, &mut e, &mut w, d_o_at, here, hv,
            record, slice, i, part, bp,
        );
        load_qk(q, k, &mut rows.b, &mut rows.a, q_at, k_at, here, h, slice, &q_factor, &k_factor, bp);
        if comptime!(per_channel) {
            load_decays(g, a_log, dt_bias, &mut rows.c, g_at, here, hv, slice, lower_bound, bp);
        }
        sync_cube();
        #[unroll]
        for m in 0..owned {
            let c = part + parts * m;
            let at = i * SLICE_LD + c;
            let (key, query) = (rows.a[at], rows.b[at]);
            let beta_i = F4::new(betas[i]);

            // Towards earlier rows: q as it reads, k as it erases.
            let mut reads = u[m] * F4::new(from_start);
            let mut erases = e[m] * F4::new(-from_start);
            for j in 0..chunk {
                if comptime!(per_channel) {
                    let d = select(j <= i, rows.c[j * SLICE_LD + c], F4::new(1.0f32));
                    reads *= d;
                    erases *= d;
                }
                let b = select(j < first, betas[j], 0.0f32);
                reads = fma(F4::new(b * y[i * ld + j]), rows.a[j * SLICE_LD + c], reads);
                erases = fma(F4::new(-b * x[i * ld + j]), rows.a[j * SLICE_LD + c], erases);
            }
            // Towards later rows: k as it writes.
            let mut ends = w[m] * F4::new(to_end);
            let mut writes = F4::new(0.0f32);
            for up in 0..chunk {
                let l = chunk - 1 - up;
                let far = l >= next;
                let to_read = select(far, y[l * ld + i], 0.0f32);
                let to_key = select(far, -x[l * ld + i], 0.0f32);
                writes = fma(F4::new(to_read), rows.b[l * SLICE_LD + c], writes);
                writes = fma(F4::new(to_key), rows.a[l * SLICE_LD + c], writes);
                if comptime!(per_channel) {
                    let d = select(l > i, rows.c[l * SLICE_LD + c], F4::new(1.0f32));
                    writes *= d;
                    ends *= d;
                }
            }
            let a_i = query * reads + key * erases - beta_i * key * writes;
            let b_i = beta_i * key * ends;

            // Inside the token, where nothing decays.
            let mut written = writes + ends;
            #[unroll]
            for off in 0..n_h {
                if i >= first + off {
                    let j = i - off;
                    let b = betas[j];
                    reads = fma(F4::new(b * y[i * ld + j]), rows.a[j * SLICE_LD + c], reads);
                    erases = fma(F4::new(-b * x[i * ld + j]), rows.a[j * SLICE_LD + c], erases);
                }
                let l = i + off;
                if l < next && l < chunk {
                    written = fma(F4::new(y[l * ld + i]), rows.b[l * SLICE_LD + c], written);
                    written = fma(F4::new(-x[l * ld + i]), rows.a[l * SLICE_LD + c], written);
                }
            }

            let channel = slice * SLICE4 + c;
            let row4 = comptime!(bp.padded_key_dim() / 4);
            scratch[record + comptime!(bp.dk_at()) + i * row4 + channel] = erases + beta_i * written;
            if is_read {
                let read = (step0 + i) / n_h - step0 / n_h;
                scratch[record + comptime!(bp.dq_at()) + read * row4 + channel] = reads * F4::new(scale);
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
                let gamma = scratch[record + comptime!(bp.gamma_at()) + slice * SLICE4 + c];
                let mut sum = F4::new(0.0f32);
                #[unroll]
                for lane in 0..4usize {
                    sum[lane] = gamma[lane] * whole[4 * c + lane];
                }
                for l in 0..chunk {
                    sum += select(l >= i, s[l * SLICE_LD + c], ds[l * SLICE_LD + c]);
                }
                let mut by_bias = F4::new(0.0f32);
                let mut by_a_log = F4::new(0.0f32);
                if starts {
                    let token = here.start + (step0 + i) / n_h;
                    #[unroll]
                    for lane in 0..4usize {
                        let channel = slice * SLICE + 4 * c + lane;
                        if channel < bp.spec.key_dim {
                            let (a, bias) = gate_constants(a_log, dt_bias, hv, channel, bp.spec);
                            let z = f32::cast_from(g[g_at.at(here.row, token, hv) + channel]);
                            let (by_x, by_a) = gate_slopes(z, a, bias, lower_bound, bp.spec.gate);
                            by_bias[lane] = sum[lane] * by_x;
                            by_a_log[lane] = sum[lane] * by_a;
                            dg[dg_at.at(here.row, token, hv) + channel] = G::cast_from(sum[lane] * by_x);
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
        let z = f32::cast_from(beta[beta_at.at(here.row, step, hv)]);
        d_beta[d_beta_at.at(here.row, step, hv)] = B::cast_from(d_beta_row * beta_slope(z, bp.spec.beta));
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
            let mut sum = always * scratch[record + comptime!(bp.gamma_at())][0];
            for l in 0..chunk {
                sum += select(l >= i, y[l], y[chunk + l]);
            }
            let token = here.start + (step0 + i) / n_h;
            let (a, bias) = gate_constants(a_log, dt_bias, hv, 0usize, bp.spec);
            let z = f32::cast_from(g[g_at.at(here.row, token, hv)]);
            let (by_x, by_a) = gate_slopes(z, a, bias, lower_bound, bp.spec.gate);
            by_bias = sum * by_x;
            by_a_log = sum * by_a;
            dg[dg_at.at(here.row, token, hv)] = G::cast_from(by_bias);
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
}

/// Three tiles of the chunk's rows, 32 channels wide: of R, dV and dO while value channels are summed over, then of
/// keys, queries and decays.
#[derive(CubeType)]
struct Rows {
    a: SharedMemory<F4>,
    b: SharedMemory<F4>,
    c: SharedMemory<F4>,
}

/// Fills the rows with slice `v` of R, dV and, where a token ends, dO.
#[cube]
fn load_rows<F: Float, N: Size>(
    d_o: &Array<Vector<F, N>>,
    scratch: &Array<F4>,
    rows: &mut Rows,
    d_o_at: Strides,
    here: Chunk,
    hv: usize,
    record: usize,
    v: usize,
    #[comptime] bp: Blueprint,
) {
    let n_h = comptime!(bp.spec.micro_steps);
    let row4 = comptime!(bp.row4());
    let mut z = UNIT_POS as usize;
    while z < comptime!(bp.chunk * SLICE4) {
        let row = z / SLICE4;
        let c = z % SLICE4;
        let at = row * row4 + v * SLICE4 + c;
        let to = row * SLICE_LD + c;
        let mut r = F4::new(0.0f32);
        let mut dv = F4::new(0.0f32);
        if v * SLICE4 + c < row4 {
            r = scratch[record + comptime!(bp.r_at()) + at];
            dv = scratch[record + comptime!(bp.dv_at()) + at];
        }
        rows.a[to] = r;
        rows.b[to] = dv;
        let step = here.step0 + row;
        let is_read = row < here.rows && (step + 1) % n_h == 0;
        let from = d_o_at.at(here.row, here.start + step / n_h, hv);
        rows.c[to] = load4(d_o, from, v * SLICE + 4 * c, is_read, bp.spec.value_dim);
        z += bp.prepare_units();
    }
}

/// Y and X, zero above the diagonal (X on it, too).
#[cube]
fn grams<F: Float, N: Size>(
    d_o: &Array<Vector<F, N>>,
    scratch: &Array<F4>,
    rows: &mut Rows,
    y: &mut SharedMemory<f32>,
    x: &mut SharedMemory<f32>,
    d_o_at: Strides,
    here: Chunk,
    hv: usize,
    record: usize,
    i: usize,
    part: usize,
    #[comptime] bp: Blueprint,
) {
    let parts = comptime!(bp.parts);
    let count = comptime!(bp.chunk / bp.parts);
    let ld = comptime!(bp.chunk + 1);
    let mut ys = Array::<f32>::new(count);
    let mut xs = Array::<f32>::new(count);
    #[unroll]
    for n in 0..count {
        ys[n] = 0.0f32;
        xs[n] = 0.0f32;
    }
    for v in 0..comptime!(bp.value_slices()) {
        load_rows(d_o, scratch, rows, d_o_at, here, hv, record, v, bp);
        sync_cube();
        for c in 0..SLICE4 {
            let dv = rows.b[i * SLICE_LD + c];
            let d = rows.c[i * SLICE_LD + c];
            #[unroll]
            for n in 0..count {
                let r = rows.a[(part + parts * n) * SLICE_LD + c];
                ys[n] = dot(d, r, ys[n]);
                xs[n] = dot(dv, r, xs[n]);
            }
        }
        sync_cube();
    }
    #[unroll]
    for n in 0..count {
        let j = part + parts * n;
        y[i * ld + j] = select(j <= i, ys[n], 0.0f32);
        x[i * ld + j] = select(j < i, xs[n], 0.0f32);
    }
}

/// What passes through the states on 32 key channels: `u = dO S0^T`, `e = dV S0^T`, `w = R dS^T`, and in `whole`
/// the rows of `dS . S0`, summed.
#[cube]
fn through_states<F: Float, N: Size>(
    d_o: &Array<Vector<F, N>>,
    scratch: &Array<F4>,
    rows: &mut Rows,
    s: &mut SharedMemory<F4>,
    ds: &mut SharedMemory<F4>,
    whole: &mut SharedMemory<f32>,
    u: &mut Array<F4>,
    e: &mut Array<F4>,
    w: &mut Array<F4>,
    d_o_at: Strides,
    here: Chunk,
    hv: usize,
    record: usize,
    slice: usize,
    i: usize,
    part: usize,
    #[comptime] bp: Blueprint,
) {
    let units = comptime!(bp.prepare_units());
    let parts = comptime!(bp.parts);
    let owned = comptime!(SLICE4 / bp.parts);
    let row4 = comptime!(bp.row4());
    let fetched = comptime!(SLICE * SLICE4 / bp.prepare_units());
    let unit = UNIT_POS as usize;
    #[unroll]
    for m in 0..owned {
        u[m] = F4::new(0.0f32);
        e[m] = F4::new(0.0f32);
        w[m] = F4::new(0.0f32);
    }
    let mut products = Array::<f32>::new(fetched);
    #[unroll]
    for n in 0..fetched {
        products[n] = 0.0f32;
    }
    for v in 0..comptime!(bp.value_slices()) {
        load_rows(d_o, scratch, rows, d_o_at, here, hv, record, v, bp);
        #[unroll]
        for n in 0..fetched {
            let z = unit + n * units;
            let key = z / SLICE4;
            let c = z % SLICE4;
            let at = (slice * SLICE + key) * row4 + v * SLICE4 + c;
            let mut before = F4::new(0.0f32);
            let mut after = F4::new(0.0f32);
            if v * SLICE4 + c < row4 {
                before = scratch[record + comptime!(bp.state_at()) + at];
                after = scratch[record + comptime!(bp.d_state_at()) + at];
            }
            s[key * SLICE_LD + c] = before;
            ds[key * SLICE_LD + c] = after;
            products[n] = dot(before, after, products[n]);
        }
        sync_cube();
        for c in 0..SLICE4 {
            let r = rows.a[i * SLICE_LD + c];
            let dv = rows.b[i * SLICE_LD + c];
            let d = rows.c[i * SLICE_LD + c];
            #[unroll]
            for m in 0..owned {
                let mut um = u[m];
                let mut em = e[m];
                let mut wm = w[m];
                #[unroll]
                for lane in 0..4usize {
                    let at = (4 * (part + parts * m) + lane) * SLICE_LD + c;
                    um[lane] = dot(d, s[at], um[lane]);
                    em[lane] = dot(dv, s[at], em[lane]);
                    wm[lane] = dot(r, ds[at], wm[lane]);
                }
                u[m] = um;
                e[m] = em;
                w[m] = wm;
            }
        }
        sync_cube();
    }
    #[unroll]
    for n in 0..fetched {
        let z = unit + n * units;
        s[z / SLICE4 * SLICE_LD + z % SLICE4] = F4::new(products[n]);
    }
    sync_cube();
    if unit < SLICE {
        let mut sum = 0.0f32;
        for c in 0..SLICE4 {
            sum += s[unit * SLICE_LD + c][0];
        }
        whole[unit] = sum;
    }
    // Before `s` and the rows are filled again.
    sync_cube();
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
