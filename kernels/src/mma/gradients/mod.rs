//! The gradients of q, k, beta and g on tensor cores: one cube per block of micro-steps and value head.
//!
//! With the residuals R, dV, the state S before the block and the gradient dS of the state behind it, nothing depends on
//! other blocks, and blocks may be longer than the chunks of the scan:
//!
//! ```text
//! dQ =  e^G . dO S^T + Y beta K        Y = Gamma . scale dO R^T   (tril)
//! E  = -e^G . dV S^T + X beta K        X = -Gamma . dV R^T        (stril)
//! H  =  e^{G_C - G} . R dS^T + Y^T Q + X^T K
//! dK = E + beta . H      dbeta = K . H
//! ```
//!
//! For the gates see `docs/math.md`: sums of K . E, Q . dQ and K . H over the channels, before the pairs inside a token
//! are added, which no gate lies between.

mod blueprint;
pub mod collect;
mod copy;
mod ends;
mod pairs;
mod states;
mod sums;

pub use blueprint::{BLOCK, GradientsBlueprint};

use cubecl::prelude::*;

use super::blueprint::{CHUNK, TILE};
use super::stage::sequence_of;
use super::sweep::{KEPT, first_kept};
use super::tile::{Acc, Mma, Tile, V2, V8, by_depth, store, to_frag, zeros};
use crate::record::Strides;
use blueprint::{BETAS_AT, E_FACTORS_AT, H_FACTORS_AT, PASSES, READ_FACTORS_AT, Span};
use copy::{HERE_WORDS, Here, load_block, store_gradients};
use ends::{
    gradient_of_beta, gradient_of_gates, leave_along, leave_gates, leave_norms, leave_ones, read_block_gates,
};
use pairs::{Reads, add_from_behind, add_from_keys, leave_pairs};
use states::{Column, multiply_states, read_d_state, read_state};
use sums::{Sums, along, rows_of, which};

/// Reads what [`sweep`](mod@super::sweep) has left, and `dv`; writes the other gradients. `dq` and `dk` have a head
/// for each value head. `constants` takes, for each block and head, the gradients of `a_log` and `dt_bias`.
///
/// `value_steps` is V / 16. Cube `p` takes head `p % heads` of block `p / heads`, or where sequences are packed of the block that begins with
/// chunk `p / heads`, if one does. For other arguments see [`forward`](mod@super::forward).
#[cube(launch_unchecked, fast_math = FastMath::all(), address_type = "u64")]
pub fn gradients<F: Float, B: Float, G: Float>(
    q: &Array<Vector<F, V8>>,
    k: &Array<Vector<F, V8>>,
    d_o: &Array<Vector<F, V8>>,
    dv: &Array<Vector<F, V8>>,
    beta: &Array<B>,
    g: &Array<G>,
    a_log: &Array<f32>,
    dt_bias: &Array<f32>,
    table: &Array<u32>,
    residuals: &Array<Vector<F, V8>>,
    states: &Array<Vector<F, V8>>,
    d_states: &Array<Vector<F, V8>>,
    dq_out: &mut Array<Vector<F, V8>>,
    dk_out: &mut Array<Vector<F, V8>>,
    d_beta: &mut Array<B>,
    dg: &mut Array<G>,
    constants: &mut Array<f32>,
    q_at: Strides,
    k_at: Strides,
    d_o_at: Strides,
    dv_at: Strides,
    beta_at: Strides,
    g_at: Strides,
    dq_at: Strides,
    dk_at: Strides,
    d_beta_at: Strides,
    dg_at: Strides,
    tokens: u32,
    sequences: u32,
    blocks: u32,
    heads: u32,
    group: u32,
    value_steps: u32,
    scale: f32,
    lower_bound: f32,
    #[comptime] bp: GradientsBlueprint,
    #[define(F, B, G)] _types: [StorageType; 3],
) {
    let cube = CUBE_POS as u32;
    if CUBE_POS >= (blocks * heads) as usize {
        terminate!();
    }
    let n_h = comptime!(bp.spec.micro_steps as u32);
    let id = cube / heads;
    let hv = cube % heads;
    let n =
        if comptime!(bp.packed) { table[(4 * sequences + id) as usize] } else { id / (blocks / sequences) };
    let seq = sequence_of(table, n as usize, tokens, bp.packed, bp.spec.micro_steps);
    let first_chunk = seq.first_chunk as u32;
    let mut b = id - n * (blocks / sequences);
    if comptime!(bp.packed) {
        let c = id - first_chunk;
        b = c / comptime!(KEPT as u32);
        if c % comptime!(KEPT as u32) > 0 {
            terminate!();
        }
    }
    let steps = seq.tokens as u32 * n_h;
    let step0 = b * comptime!(BLOCK as u32);
    let end = u32::min(steps - step0, comptime!(BLOCK as u32));
    let read0 = step0 / n_h;
    let first =
        first_kept(seq.first_chunk, n as usize, steps.div_ceil(comptime!(CHUNK as u32)) as usize, bp.packed);
    let here = Here {
        row: seq.row as u32,
        start: seq.start as u32,
        step0,
        steps: end,
        read0,
        reads: (step0 + end) / n_h - read0,
        h: hv / group,
        hv,
        heads,
        chunk: first_chunk + b * comptime!(KEPT as u32),
        kept: first as u32 + b,
    };
    let reads = Reads { step0, first: read0 };

    let mut tile = Tile::<F>::new_aligned(comptime!(bp.units_of_memory()), 128usize);
    let mut floats = SharedMemory::<f32>::new(comptime!(bp.floats()));
    let mut words = SharedMemory::<u32>::new(HERE_WORDS);
    here.leave(&mut words);
    let mma = Mma::<F>::new(16usize, 8usize, 16usize);
    let unit = UNIT_POS as usize;
    let lane = unit % 32;
    let plane = unit / 32;
    let own = Own::new(plane, lane, bp);

    let raw = read_block_gates(beta, g, &beta_at, &g_at, &here, plane, lane, bp);
    load_block::<F>(&mut tile, q, k, d_o, dv, residuals, &q_at, &k_at, &d_o_at, &dv_at, &here, unit, bp);
    leave_gates(&raw, a_log, dt_bias, lower_bound, scale, &here, reads, &mut floats, plane, lane, bp);
    leave_ones(&mut floats, unit, bp);
    sync_cube();
    leave_norms::<F>(&tile, &mut floats, unit, bp);
    leave_pairs::<F>(&mma, &mut tile, &floats, reads, scale, plane, lane, bp);

    let column = Column::new(here.head_of(here.kept), value_steps, own, bp);
    multiply_states::<F>(&mut floats, states, d_states, column, own, bp);
    let mut sums = Sums::new();
    let mut more_sums = Sums::new();
    #[unroll]
    for pass in 0..PASSES {
        let rows = comptime!(bp.steps_of(pass));
        let mut dq = zeros(comptime!(2 * bp.reads_of(pass).tiles));
        let mut e = zeros(comptime!(2 * rows.tiles));
        read_state::<F>(&mma, &tile, states, column, &mut dq, &mut e, own, pass, bp);
        scale_rows(&mut dq, &floats, READ_FACTORS_AT, lane, bp.reads_of(pass));
        scale_rows(&mut e, &floats, E_FACTORS_AT, lane, rows);
        // All pairs have left their blocks, and nothing reads dO and dV of this pass any more, nor R of the one before.
        sync_cube();
        add_from_keys::<F>(&mma, &tile, &mut dq, &mut e, own, bp.reads_of(pass), rows, false, bp);
        finish_queries::<F>(&mma, &mut tile, &mut dq, &mut sums, &mut more_sums, own, pass, bp);
        let mut h = zeros(comptime!(2 * rows.tiles));
        read_d_state::<F>(&mma, &tile, d_states, column, &mut h, own, pass, bp);
        scale_rows(&mut h, &floats, H_FACTORS_AT, lane, rows);
        finish_keys::<F>(&mma, &mut tile, &floats, &mut e, &mut h, &mut sums, &mut more_sums, own, pass, bp);
    }
    let here = Here::left(&words);
    let raw = read_block_gates(beta, g, &beta_at, &g_at, &here, plane, lane, bp);
    sums.leave::<F>(&mut tile, own, 0usize, bp);
    if comptime!(bp.spec.qk_l2norm) {
        more_sums.leave::<F>(&mut tile, own, 1usize, bp);
    }
    sync_cube();
    leave_along::<F>(&tile, &mut floats, unit, bp);
    store_gradients::<F>(&tile, &floats, q, k, dq_out, dk_out, &q_at, &k_at, &dq_at, &dk_at, &here, unit, bp);
    gradient_of_gates::<F, G>(
        &raw,
        &tile,
        &floats,
        dg,
        constants,
        &dg_at,
        &here,
        cube as usize,
        a_log,
        dt_bias,
        lower_bound,
        plane,
        lane,
        bp,
    );
    gradient_of_beta::<F, B>(&raw, &tile, &floats, d_beta, &d_beta_at, &here, plane, lane, bp);
}

/// A plane's place: all rows of its 16 key channels.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Own {
    pub(crate) plane: usize,
    pub(crate) lane: usize,
    /// The rows of keys or queries that this unit passes to `load`, and those of values.
    pub(crate) key_rows: usize,
    pub(crate) value_rows: usize,
}

#[cube]
impl Own {
    fn new(plane: usize, lane: usize, #[comptime] bp: GradientsBlueprint) -> Self {
        Own {
            plane,
            lane,
            key_rows: 2 * plane + by_depth(lane, comptime!(bp.key_row())),
            value_rows: by_depth(lane, comptime!(bp.value_row())),
        }
    }
}

/// Rounds dQ and leaves it in place of the output gradients.
#[cube]
fn finish_queries<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    dq: &mut Sequence<Acc>,
    sums: &mut Sums,
    more_sums: &mut Sums,
    own: Own,
    #[comptime] pass: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    let span = comptime!(bp.reads_of(pass));
    if comptime!(bp.splits_pairs()) {
        #[unroll]
        for n in 0..comptime!(span.tiles) {
            let i = comptime!(span.first + n);
            let rows = rows_of::<F>(mma, tile, own, 0usize, i, bp);
            sums.keep(along::<F>(&rows, dq, n), which::READ, i, own);
        }
        let mut none = zeros(0usize);
        add_from_keys::<F>(mma, tile, dq, &mut none, own, span, Span::NONE, true, bp);
    }
    #[unroll]
    for n in 0..comptime!(span.tiles) {
        let i = comptime!(span.first + n);
        if comptime!(bp.spec.qk_l2norm) {
            let rows = rows_of::<F>(mma, tile, own, 0usize, i, bp);
            more_sums.keep(along::<F>(&rows, dq, n), which::ALONG_QUERY, i, own);
        }
        let to = comptime!(bp.d_o_at() + i * TILE * bp.value_row());
        leave_rows::<F>(mma, tile, dq, n, own, to, bp.value_row());
    }
}

/// Adds to H what comes from behind, and leaves dK, rounded.
#[cube]
fn finish_keys<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    floats: &SharedMemory<f32>,
    e: &mut Sequence<Acc>,
    h: &mut Sequence<Acc>,
    sums: &mut Sums,
    more_sums: &mut Sums,
    own: Own,
    #[comptime] pass: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    let span = comptime!(bp.steps_of(pass));
    if comptime!(bp.splits_pairs()) {
        #[unroll]
        for n in 0..comptime!(span.tiles) {
            let i = comptime!(span.first + n);
            let rows = rows_of::<F>(mma, tile, own, bp.k_at(), i, bp);
            sums.keep(along::<F>(&rows, h, n), which::TO_END, i, own);
        }
    }
    add_from_behind::<F>(mma, tile, h, own, span, false, bp);
    if comptime!(bp.splits_pairs()) {
        #[unroll]
        for n in 0..comptime!(span.tiles) {
            let i = comptime!(span.first + n);
            let rows = rows_of::<F>(mma, tile, own, bp.k_at(), i, bp);
            let beta = at_rows(floats, BETAS_AT, i, own.lane);
            sums.keep(along::<F>(&rows, e, n) - beta * along::<F>(&rows, h, n), which::LATER, i, own);
        }
        let mut none = zeros(0usize);
        add_from_keys::<F>(mma, tile, &mut none, e, own, Span::NONE, span, true, bp);
        add_from_behind::<F>(mma, tile, h, own, span, true, bp);
    }
    let (to, ld) = comptime!(bp.dk_at(pass));
    #[unroll]
    for n in 0..comptime!(span.tiles) {
        let i = comptime!(span.first + n);
        let rows = rows_of::<F>(mma, tile, own, bp.k_at(), i, bp);
        sums.keep(along::<F>(&rows, h, n), which::KEY, i, own);
        let beta = at_rows(floats, BETAS_AT, i, own.lane);
        #[unroll]
        for half in 0..2usize {
            let from = h.index(comptime!(2 * n + half));
            let acc = e.index_mut(comptime!(2 * n + half));
            #[unroll]
            for r in 0..2usize {
                acc[r] = fma(from[r], Vector::cast_from(beta[r]), acc[r]);
            }
        }
        if comptime!(bp.spec.qk_l2norm) {
            more_sums.keep(along::<F>(&rows, e, n), which::ALONG_KEY, i, own);
        }
        leave_rows::<F>(mma, tile, e, n, own, comptime!(to + i * TILE * ld), ld);
    }
}

/// Two floats of tile `i`: those of a unit's first row and of the row 8 behind it.
#[cube]
fn at_rows(
    floats: &SharedMemory<f32>,
    #[comptime] first: usize,
    #[comptime] i: usize,
    lane: usize,
) -> Vector<f32, V2> {
    let at = comptime!(first + TILE * i) + lane / 4;
    let mut out = Vector::<f32, V2>::cast_from(floats[at]);
    out[1] = floats[at + 8];
    out
}

/// Leaves tile `n` of `rows`, rounded, in this plane's channels of the rows from `to` on.
#[cube]
fn leave_rows<F: Float>(
    mma: &Mma<F>,
    tile: &mut Tile<F>,
    rows: &Sequence<Acc>,
    #[comptime] n: usize,
    own: Own,
    #[comptime] to: usize,
    #[comptime] ld: usize,
) {
    let f = to_frag::<F>(rows.index(comptime!(2 * n)), rows.index(comptime!(2 * n + 1)));
    store::<F>(mma, tile, to + 2 * own.plane + by_depth(own.lane, ld), &f, false);
}

/// Multiplies the rows of a span by the factors that lie from `factors` on.
#[cube]
fn scale_rows(
    x: &mut Sequence<Acc>,
    floats: &SharedMemory<f32>,
    #[comptime] factors: usize,
    lane: usize,
    #[comptime] span: Span,
) {
    #[unroll]
    for n in 0..comptime!(span.tiles) {
        let by = at_rows(floats, factors, comptime!(span.first + n), lane);
        #[unroll]
        for half in 0..2usize {
            let acc = x.index_mut(comptime!(2 * n + half));
            #[unroll]
            for r in 0..2usize {
                acc[r] = acc[r] * Vector::cast_from(by[r]);
            }
        }
    }
}
