//! One cube per chunk and value head: everything that does not need the state.

use cubecl::prelude::*;

use super::blueprint::{Blueprint, SLICE, SLICE_LD, SLICE4};
use super::inverse::invert;
use super::walk::{decay_after, walk_down, walk_row};
use crate::math::{beta_of, decay_of, gate_constants};
use crate::record::{F4, Strides, load4, sequence};
use crate::spec::Decay;

/// The chunk that a cube works on.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Chunk {
    /// Row of the batch.
    pub(crate) row: usize,
    /// First token of the sequence.
    pub(crate) start: usize,
    /// First micro-step of the chunk, in its sequence.
    pub(crate) step0: usize,
    /// Micro-steps in the chunk.
    pub(crate) rows: usize,
}

/// Chunk `id` of the table.
#[cube]
pub(crate) fn chunk_of(table: &Array<u32>, id: usize, sequences: u32, #[comptime] bp: Blueprint) -> Chunk {
    let seq = sequence(table, table[4 * sequences as usize + id] as usize);
    let step0 = (id - seq.first_chunk) * bp.chunk;
    let rows = usize::min(seq.tokens * bp.spec.micro_steps - step0, bp.chunk);
    Chunk { row: seq.row, start: seq.start, step0, rows }
}

/// Fills the record of every chunk of heads `first_head..first_head + heads`.
///
/// Cube `p` takes chunk `p / heads` and head `first_head + p % heads`. `scratch_scalars` is `scratch` again.
/// `table` lists the sequences (see `record.rs`), then the sequence of every chunk. `q` is multiplied by `scale`. Tensors that the blueprint
/// does not mention may be any buffer.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub fn prepare<F: Float, B: Float, G: Float, N: Size>(
    q: &Array<Vector<F, N>>,
    k: &Array<Vector<F, N>>,
    beta: &Array<B>,
    g: &Array<G>,
    a_log: &Array<f32>,
    dt_bias: &Array<f32>,
    table: &Array<u32>,
    scratch: &mut Array<F4>,
    scratch_scalars: &mut Array<f32>,
    q_at: Strides,
    k_at: Strides,
    beta_at: Strides,
    g_at: Strides,
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
    let units = comptime!(bp.prepare_units());
    let n_h = comptime!(bp.spec.micro_steps);
    let reads = comptime!(bp.reads());
    let ld = comptime!(chunk + 1);
    let padded = comptime!(bp.padded_key_dim());
    let per_channel = comptime!(bp.spec.decay == Decay::Channel);
    let decays_len = comptime!(if per_channel { chunk * SLICE_LD } else { 1 });

    let mut keys = SharedMemory::<F4>::new(chunk * SLICE_LD);
    let mut queries = SharedMemory::<F4>::new(chunk * SLICE_LD);
    let mut decays = SharedMemory::<F4>::new(decays_len);
    let mut akk = SharedMemory::<f32>::new(chunk * ld);
    let mut aqk = SharedMemory::<f32>::new(chunk * ld);
    let mut t = SharedMemory::<f32>::new(chunk * ld);
    let mut betas = SharedMemory::<f32>::new(chunk);
    let mut head_decays = SharedMemory::<f32>::new(chunk);
    let mut k_rstd = SharedMemory::<f32>::new(chunk);
    let mut q_rstd = SharedMemory::<f32>::new(chunk);

    let id = CUBE_POS / heads as usize;
    let hv = first_head as usize + CUBE_POS % heads as usize;
    let h = hv / group as usize;
    let here = chunk_of(table, id, sequences, bp);
    let step0 = here.step0;
    let record = CUBE_POS * comptime!(bp.record_vectors());

    let unit = UNIT_POS as usize;
    let i = unit % chunk;
    let part = unit / chunk;
    let token = (step0 + i) / n_h;
    let first_read = step0 / n_h;
    let valid = i < here.rows;
    let is_read = valid && (step0 + i + 1) % n_h == 0;

    if part == 0 {
        let mut b = 0.0f32;
        let mut d = 1.0f32;
        if valid {
            b = beta_of(
                f32::cast_from(beta[beta_at.at(here.row, here.start * n_h + step0 + i, hv)]),
                bp.spec.beta,
            );
            if comptime!(bp.spec.decay == Decay::Head) && (step0 + i) % n_h == 0 {
                let (a, bias) = gate_constants(a_log, dt_bias, hv, 0usize, bp.spec);
                let x = f32::cast_from(g[g_at.at(here.row, here.start + token, hv)]);
                d = decay_of(x, a, bias, lower_bound, bp.spec.gate);
            }
        }
        betas[i] = b;
        head_decays[i] = d;
        k_rstd[i] = 1.0f32;
        q_rstd[i] = scale;
        if comptime!(bp.spec.qk_l2norm) {
            q_rstd[i] = 1.0f32;
        }
    }
    sync_cube();

    if comptime!(bp.spec.qk_l2norm) {
        let mut kk = 0.0f32;
        let mut qq = 0.0f32;
        for s in 0..comptime!(bp.slices()) {
            load_qk(q, k, &mut queries, &mut keys, q_at, k_at, here, h, s, &q_rstd, &k_rstd, bp);
            sync_cube();
            let mut c = part;
            while c < SLICE4 {
                let x = keys[i * SLICE_LD + c];
                let y = queries[i * SLICE_LD + c];
                #[unroll]
                for e in 0..4usize {
                    kk = fma(x[e], x[e], kk);
                    qq = fma(y[e], y[e], qq);
                }
                c += bp.parts;
            }
            sync_cube();
        }
        // The Gram matrices are not in use yet and hold the partial sums.
        akk[part * chunk + i] = kk;
        aqk[part * chunk + i] = qq;
        sync_cube();
        if part == 0 {
            kk = 0.0f32;
            qq = 0.0f32;
            #[unroll]
            for p in 0..bp.parts {
                kk += akk[p * chunk + i];
                qq += aqk[p * chunk + i];
            }
            k_rstd[i] = f32::inverse_sqrt(kk + 1e-6f32);
            q_rstd[i] = scale * f32::inverse_sqrt(qq + 1e-6f32);
            if comptime!(bp.backward) {
                let at = 4 * (record + comptime!(bp.factors_at())) + i;
                scratch_scalars[at + chunk] = k_rstd[i];
                scratch_scalars[at + 2 * chunk] = f32::inverse_sqrt(qq + 1e-6f32);
            }
        }
        sync_cube();
    }

    let mut gk = Array::<f32>::new(chunk);
    let mut gq = Array::<f32>::new(chunk);
    #[unroll]
    for j in 0..chunk {
        gk[j] = 0.0f32;
        gq[j] = 0.0f32;
    }
    let mut from_start = 1.0f32;
    let mut to_end = 1.0f32;
    if comptime!(bp.spec.decay == Decay::Head) {
        for l in 0..chunk {
            from_start *= select(l <= i, head_decays[l], 1.0f32);
            to_end *= select(l > i, head_decays[l], 1.0f32);
        }
    }

    for s in 0..comptime!(bp.slices()) {
        load_qk(q, k, &mut queries, &mut keys, q_at, k_at, here, h, s, &q_rstd, &k_rstd, bp);
        if comptime!(per_channel) {
            load_decays(g, a_log, dt_bias, &mut decays, g_at, here, hv, s, lower_bound, bp);
        }
        sync_cube();
        let mut c = part;
        while c < SLICE4 {
            let channel = s * SLICE4 + c;
            let key = keys[i * SLICE_LD + c];
            let end = walk_down(&mut gk, &mut gq, &queries, &keys, &decays, i, c, chunk, bp.spec.decay);
            let mut after = F4::new(to_end);
            let mut whole = F4::new(from_start * to_end);
            if comptime!(per_channel) {
                after = decay_after(&decays, i, c, chunk);
                whole = after * decays[c];
            }
            let rows_at = record + channel * comptime!(bp.stacked());
            scratch[rows_at + i] = end.k * F4::new(from_start);
            let kd = key * after;
            #[unroll]
            for e in 0..4usize {
                let at = record + comptime!(bp.kd_at()) + i / 4 * padded + 4 * channel + e;
                scratch_scalars[4 * at + i % 4] = kd[e];
            }
            if is_read {
                scratch[rows_at + chunk + token - first_read] = end.q * F4::new(from_start);
            }
            if i == 0 {
                scratch[record + comptime!(bp.gamma_at()) + channel] = whole;
            }
            c += bp.parts;
        }
        sync_cube();
    }

    // Parts are added in a fixed order: the result has the same bits every time.
    #[unroll]
    for p in 0..bp.parts {
        if part == p {
            #[unroll]
            for j in 0..chunk {
                if comptime!(p == 0) {
                    akk[i * ld + j] = gk[j];
                    aqk[i * ld + j] = gq[j];
                } else {
                    akk[i * ld + j] += gk[j];
                    aqk[i * ld + j] += gq[j];
                }
            }
        }
        sync_cube();
    }
    if part == 0 {
        if comptime!(bp.spec.decay == Decay::Head) {
            walk_row(&mut akk, i * ld, &head_decays, i);
            walk_row(&mut aqk, i * ld, &head_decays, i);
        }
        for j in 0..chunk {
            akk[i * ld + j] = select(j < i, akk[i * ld + j] * betas[j], 0.0f32);
            aqk[i * ld + j] = select(j <= i, aqk[i * ld + j], 0.0f32);
        }
    }
    invert(&mut akk, &mut t, chunk, ld, units);

    let mut x = unit;
    while x < comptime!(chunk * chunk / 4) {
        let row = x % chunk;
        let block = x / chunk;
        let mut row_factor = betas[row];
        if comptime!(bp.backward) {
            row_factor = 1.0f32;
        }
        let mut a = F4::new(0.0f32);
        let mut b = F4::new(0.0f32);
        #[unroll]
        for e in 0..4usize {
            a[e] = t[row * ld + 4 * block + e] * row_factor;
            b[e] = aqk[row * ld + 4 * block + e];
        }
        scratch[record + comptime!(bp.t_at()) + x] = a;
        if row < here.rows && (step0 + row + 1) % n_h == 0 {
            let read = (step0 + row) / n_h - first_read;
            scratch[record + comptime!(bp.p_at()) + block * reads + read] = b;
        }
        x += units;
    }
    if comptime!(bp.backward) && part == 0 {
        scratch_scalars[4 * (record + comptime!(bp.factors_at())) + i] = betas[i];
    }
}

/// Slice `s` of the chunk's keys and, in the rows where a token ends, of its queries.
#[cube]
pub(crate) fn load_qk<F: Float, N: Size>(
    q: &Array<Vector<F, N>>,
    k: &Array<Vector<F, N>>,
    queries: &mut SharedMemory<F4>,
    keys: &mut SharedMemory<F4>,
    q_at: Strides,
    k_at: Strides,
    here: Chunk,
    h: usize,
    s: usize,
    q_rstd: &SharedMemory<f32>,
    k_rstd: &SharedMemory<f32>,
    #[comptime] bp: Blueprint,
) {
    let n_h = comptime!(bp.spec.micro_steps);
    let mut x = UNIT_POS as usize;
    while x < comptime!(bp.chunk * SLICE4) {
        let row = x / SLICE4;
        let c = x % SLICE4;
        let channel = s * SLICE + 4 * c;
        let step = here.step0 + row;
        let valid = row < here.rows;
        let k_row = k_at.at(here.row, here.start * n_h + step, h);
        let key = load4(k, k_row, channel, valid, bp.spec.key_dim);
        keys[row * SLICE_LD + c] = key * F4::new(k_rstd[row]);
        let is_read = valid && (step + 1) % n_h == 0;
        let q_row = q_at.at(here.row, here.start + step / n_h, h);
        let query = load4(q, q_row, channel, is_read, bp.spec.key_dim);
        queries[row * SLICE_LD + c] = query * F4::new(q_rstd[row]);
        x += bp.prepare_units();
    }
}

/// Slice `s` of the chunk's decays: $e^g$ where a token begins, 1 elsewhere.
#[cube]
pub(crate) fn load_decays<G: Float>(
    g: &Array<G>,
    a_log: &Array<f32>,
    dt_bias: &Array<f32>,
    decays: &mut SharedMemory<F4>,
    g_at: Strides,
    here: Chunk,
    hv: usize,
    s: usize,
    lower_bound: f32,
    #[comptime] bp: Blueprint,
) {
    let n_h = comptime!(bp.spec.micro_steps);
    let mut x = UNIT_POS as usize;
    while x < comptime!(bp.chunk * SLICE4) {
        let row = x / SLICE4;
        let c = x % SLICE4;
        let step = here.step0 + row;
        let mut d = F4::new(1.0f32);
        if row < here.rows && step % n_h == 0 {
            let at = g_at.at(here.row, here.start + step / n_h, hv);
            #[unroll]
            for e in 0..4usize {
                let channel = s * SLICE + 4 * c + e;
                if channel < bp.spec.key_dim {
                    let (a, bias) = gate_constants(a_log, dt_bias, hv, channel, bp.spec);
                    d[e] = decay_of(f32::cast_from(g[at + channel]), a, bias, lower_bound, bp.spec.gate);
                }
            }
        }
        decays[row * SLICE_LD + c] = d;
        x += bp.prepare_units();
    }
}
