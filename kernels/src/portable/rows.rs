//! The rows of a chunk, and what passes between them.

use cubecl::prelude::*;

use super::blueprint::{Blueprint, SLICE, SLICE_LD, SLICE4};
use super::chunk::Chunk;
use crate::known::known_or;
use crate::math::dot;
use crate::record::{F4, load};
use crate::spec::Decay;
use crate::tensors::Strided;

/// Three tiles of the chunk's rows, 32 channels wide: of R, dV and dO while value channels are summed over, then of
/// keys, queries and decays.
#[derive(CubeType)]
pub(crate) struct Rows {
    pub(crate) a: SharedMemory<F4>,
    pub(crate) b: SharedMemory<F4>,
    pub(crate) c: SharedMemory<F4>,
}

/// This unit's vectors of a slice of R, dV and dO, and of states, on their way from device to shared memory: all are
/// asked for before the first is waited for.
#[derive(CubeType)]
struct Fetched {
    r: Array<F4>,
    dv: Array<F4>,
    d_o: Array<F4>,
    before: Array<F4>,
    after: Array<F4>,
}

#[cube]
impl Fetched {
    fn new(#[comptime] bp: Blueprint) -> Fetched {
        let rows = comptime!(bp.row_vectors());
        let states = comptime!(bp.state_vectors());
        Fetched {
            r: Array::<F4>::new(rows),
            dv: Array::<F4>::new(rows),
            d_o: Array::<F4>::new(rows),
            before: Array::<F4>::new(states),
            after: Array::<F4>::new(states),
        }
    }
}

/// Where vector `z` of a slice lies in shared memory.
#[cube]
fn slot(z: usize) -> usize {
    z / SLICE4 * SLICE_LD + z % SLICE4
}

/// A vector of a row of value channels, zero behind the last and in rows that nobody wrote.
#[cube]
fn load_channels(
    scratch: &Array<F4>,
    row_at: usize,
    channel: usize,
    valid: bool,
    #[comptime] bp: Blueprint,
) -> F4 {
    let row4 = comptime!(bp.row4());
    let mut value = F4::new(0.0f32);
    if valid && known_or(row4.is_multiple_of(SLICE4), channel < row4) {
        value = scratch[row_at + channel];
    }
    value
}

/// Asks for slice `v` of R, dV and, where a token ends, dO.
#[cube]
fn fetch_rows<F: Float, N: Size>(
    to: &mut Fetched,
    d_o: &Strided<Vector<F, N>>,
    scratch: &Array<F4>,
    here: Chunk,
    hv: usize,
    record: usize,
    v: usize,
    #[comptime] bp: Blueprint,
) {
    let n_h = comptime!(bp.spec.micro_steps);
    #[unroll]
    for n in 0..comptime!(bp.row_vectors()) {
        let z = UNIT_POS as usize + n * bp.chunk_units();
        let row = z / SLICE4;
        let channel = v * SLICE4 + z % SLICE4;
        let at = record + row * comptime!(bp.row4());
        let valid = row < here.rows;
        to.r[n] = load_channels(scratch, at + comptime!(bp.r_at()), channel, valid, bp);
        to.dv[n] = load_channels(scratch, at + comptime!(bp.dv_at()), channel, valid, bp);
        let step = here.step0 + row;
        let is_read = valid && (step + 1) % n_h == 0;
        let from = d_o.at.at(here.row, here.start + step / n_h, hv);
        to.d_o[n] = load(&d_o.data, from, 4 * channel, is_read, bp.spec.value_dim);
    }
}

#[cube]
fn put_rows(from: &Fetched, rows: &mut Rows, #[comptime] bp: Blueprint) {
    #[unroll]
    for n in 0..comptime!(bp.row_vectors()) {
        let z = UNIT_POS as usize + n * bp.chunk_units();
        let to = slot(z);
        rows.a[to] = from.r[n];
        rows.b[to] = from.dv[n];
        rows.c[to] = from.d_o[n];
    }
}

/// Asks for slice `v` of the states' rows of 32 key channels.
#[cube]
fn fetch_states(
    to: &mut Fetched,
    scratch: &Array<F4>,
    record: usize,
    slice: usize,
    v: usize,
    #[comptime] bp: Blueprint,
) {
    #[unroll]
    for n in 0..comptime!(bp.state_vectors()) {
        let z = UNIT_POS as usize + n * bp.chunk_units();
        let at = record + (slice * SLICE + z / SLICE4) * comptime!(bp.row4());
        let channel = v * SLICE4 + z % SLICE4;
        to.before[n] = load_channels(scratch, at + comptime!(bp.state_at()), channel, true, bp);
        to.after[n] = load_channels(scratch, at + comptime!(bp.d_state_at()), channel, true, bp);
    }
}

/// Y and X, zero above the diagonal (X on it, too).
#[cube]
pub(crate) fn grams<F: Float, N: Size>(
    d_o: &Strided<Vector<F, N>>,
    scratch: &Array<F4>,
    rows: &mut Rows,
    y: &mut SharedMemory<f32>,
    x: &mut SharedMemory<f32>,
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
        let mut fetched = Fetched::new(bp);
        fetch_rows(&mut fetched, d_o, scratch, here, hv, record, v, bp);
        put_rows(&fetched, rows, bp);
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

/// Decays row `i` of a Gram matrix, `at..`: `row[j] *= Gamma_ij`. $e^{G_i - G_j}$ is the product of the decays that lie
/// between two rows. Differences of sums would cancel, and anchors overflow when they are chosen badly; a walk from row i
/// downwards picks up one factor in `[0, 1]` per step and is exact to rounding for any gate.
#[cube]
pub(crate) fn walk_row(gram: &mut SharedMemory<f32>, at: usize, decays: &SharedMemory<f32>, i: usize) {
    let mut w = 1.0f32;
    for up in 0..i + 1 {
        let j = i - up;
        gram[at + j] *= w;
        w *= decays[j];
    }
}

/// What passes through the states on 32 key channels: `u = dO S0^T`, `e = dV S0^T`, `w = R dS^T`, and in `whole`
/// the rows of `dS . S0`, summed.
#[cube]
pub(crate) fn through_states<F: Float, N: Size>(
    d_o: &Strided<Vector<F, N>>,
    scratch: &Array<F4>,
    rows: &mut Rows,
    s: &mut SharedMemory<F4>,
    ds: &mut SharedMemory<F4>,
    whole: &mut SharedMemory<f32>,
    u: &mut Array<F4>,
    e: &mut Array<F4>,
    w: &mut Array<F4>,
    here: Chunk,
    hv: usize,
    record: usize,
    slice: usize,
    i: usize,
    part: usize,
    #[comptime] bp: Blueprint,
) {
    let parts = comptime!(bp.parts);
    let owned = comptime!(SLICE4 / bp.parts);
    let vectors = comptime!(bp.state_vectors());
    let unit = UNIT_POS as usize;
    #[unroll]
    for m in 0..owned {
        u[m] = F4::new(0.0f32);
        e[m] = F4::new(0.0f32);
        w[m] = F4::new(0.0f32);
    }
    let mut products = Array::<f32>::new(vectors);
    #[unroll]
    for n in 0..vectors {
        products[n] = 0.0f32;
    }
    for v in 0..comptime!(bp.value_slices()) {
        let mut fetched = Fetched::new(bp);
        fetch_rows(&mut fetched, d_o, scratch, here, hv, record, v, bp);
        fetch_states(&mut fetched, scratch, record, slice, v, bp);
        put_rows(&fetched, rows, bp);
        #[unroll]
        for n in 0..vectors {
            let z = unit + n * bp.chunk_units();
            let to = slot(z);
            s[to] = fetched.before[n];
            ds[to] = fetched.after[n];
            products[n] = dot(fetched.before[n], fetched.after[n], products[n]);
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
    for n in 0..vectors {
        let z = unit + n * bp.chunk_units();
        s[slot(z)] = F4::new(products[n]);
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

/// What arrives at one row and four channels: at q as it reads (over scale), at k as it erases, and at k as it writes
/// (over beta) for later rows and for the next chunk.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Paths {
    pub(crate) reads: F4,
    pub(crate) erases: F4,
    pub(crate) writes: F4,
    pub(crate) ends: F4,
}

/// Takes what came through the states along the chunk, and adds the pairs of row `i` with rows before `first` and from
/// `next` on, those of other tokens.
#[cube]
pub(crate) fn between_tokens(
    base: Paths,
    rows: &Rows,
    y: &SharedMemory<f32>,
    x: &SharedMemory<f32>,
    betas: &SharedMemory<f32>,
    i: usize,
    c: usize,
    first: usize,
    next: usize,
    #[comptime] bp: Blueprint,
) -> Paths {
    let chunk = comptime!(bp.chunk);
    let ld = comptime!(chunk + 1);
    let per_channel = comptime!(bp.spec.decay == Decay::Channel);
    let mut to = base;
    // From the beginning of the chunk to row i, and the keys on the way.
    for j in 0..chunk {
        if comptime!(per_channel) {
            let d = select(j <= i, rows.c[j * SLICE_LD + c], F4::new(1.0f32));
            to.reads *= d;
            to.erases *= d;
        }
        let b = select(j < first, betas[j], 0.0f32);
        let key = rows.a[j * SLICE_LD + c];
        to.reads = fma(F4::new(b * y[i * ld + j]), key, to.reads);
        to.erases = fma(F4::new(-b * x[i * ld + j]), key, to.erases);
    }
    // From the end of the chunk to row i, and the rows on the way.
    for up in 0..chunk {
        let l = chunk - 1 - up;
        let far = l >= next;
        let by_query = select(far, y[l * ld + i], 0.0f32);
        let by_key = select(far, -x[l * ld + i], 0.0f32);
        to.writes = fma(F4::new(by_query), rows.b[l * SLICE_LD + c], to.writes);
        to.writes = fma(F4::new(by_key), rows.a[l * SLICE_LD + c], to.writes);
        if comptime!(per_channel) {
            let d = select(l > i, rows.c[l * SLICE_LD + c], F4::new(1.0f32));
            to.writes *= d;
            to.ends *= d;
        }
    }
    to
}

/// Adds the pairs with rows of the same token, between which nothing decays.
#[cube]
pub(crate) fn inside_token(
    base: Paths,
    rows: &Rows,
    y: &SharedMemory<f32>,
    x: &SharedMemory<f32>,
    betas: &SharedMemory<f32>,
    i: usize,
    c: usize,
    first: usize,
    next: usize,
    #[comptime] bp: Blueprint,
) -> Paths {
    let chunk = comptime!(bp.chunk);
    let ld = comptime!(chunk + 1);
    let mut to = base;
    #[unroll]
    for off in 0..bp.spec.micro_steps {
        if i >= first + off {
            let j = i - off;
            let b = betas[j];
            let key = rows.a[j * SLICE_LD + c];
            to.reads = fma(F4::new(b * y[i * ld + j]), key, to.reads);
            to.erases = fma(F4::new(-b * x[i * ld + j]), key, to.erases);
        }
        let l = i + off;
        if l < next && l < chunk {
            to.writes = fma(F4::new(y[l * ld + i]), rows.b[l * SLICE_LD + c], to.writes);
            to.writes = fma(F4::new(-x[l * ld + i]), rows.a[l * SLICE_LD + c], to.writes);
        }
    }
    to
}
