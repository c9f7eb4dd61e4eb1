//! A cube's block, with one gate per head or none.

use cubecl::prelude::*;

use super::super::arguments::{InputGradients, Kept, Rows};
use super::super::blueprint::TILE;
use super::super::memory::{Region, new_tile, region};
use super::super::tile::{Acc, Mma, Tile, V2, by_depth, store, to_frag, zeros};
use super::Own;
use super::blueprint::{
    BETAS_AT, E_FACTORS_AT, GradientsBlueprint, H_FACTORS_AT, PASSES, READ_FACTORS_AT, Span,
};
use super::copy::{load_values, put_rows, send_for_rows, store_gradients};
use super::ends::{
    gradient_of_beta, gradient_of_gates, leave_along, leave_gates, leave_norms, leave_ones, read_block_gates,
};
use super::here::Here;
use super::pairs::{Reads, add_from_behind, add_from_keys, leave_pairs};
use super::states::{Column, Reading, leave_product, multiply_states, read_states};
use super::sums::{Sums, along, rows_of, which};
use crate::tensors::Gating;

/// The block `here`. For arguments see [`gradients`](fn@super::gradients).
#[cube]
pub(crate) fn gradients_by_head<F: Float, B: Float, G: Float>(
    q: &Rows<F>,
    k: &Rows<F>,
    d_o: &Rows<F>,
    dv: &Rows<F>,
    gating: &Gating<B, G>,
    kept: &Kept<F>,
    to: &mut InputGradients<F, B, G>,
    constants: &mut Array<f32>,
    here: Here,
    value_steps: u32,
    scale: f32,
    #[comptime] bp: GradientsBlueprint,
) {
    let reads = Reads { step0: here.step0, first: here.read0 };

    let regions = comptime!(bp.regions());
    let mut tile = new_tile::<F>(comptime!(regions.units));
    let mut floats = region::<F, f32>(&tile, comptime!(regions.at[1]));
    let mut words = region::<F, u32>(&tile, comptime!(regions.at[2]));
    here.leave(&mut words);
    let mma = Mma::<F>::new(16usize, 8usize, 16usize);
    let unit = UNIT_POS_X as usize;
    let lane = unit % 32;
    let plane = unit / 32;
    let own = Own::new(plane, lane, bp);

    let raw = read_block_gates::<B, G>(gating, &here, plane, lane, bp);
    load_values::<F>(&mut tile, d_o, dv, &kept.residuals, &here, unit, 0usize, bp);
    // Queries and keys are on their way while pairs are multiplied, unless these need norms.
    let early = comptime!(bp.spec.qk_l2norm);
    if comptime!(early) {
        let rows = send_for_rows::<F>(q, k, &here, unit, bp);
        put_rows::<F>(&rows, &mut tile, &here, unit, bp);
    }
    leave_gates(&raw, &gating.formula, scale, &here, reads, &mut floats, plane, lane, bp);
    leave_ones(&mut floats, unit, bp);
    sync_cube();
    leave_norms::<F>(&tile, &mut floats, unit, bp);
    if comptime!(early) {
        leave_pairs::<F>(&mma, &mut tile, &floats, reads, scale, plane, lane, bp);
    } else {
        let rows = send_for_rows::<F>(q, k, &here, unit, bp);
        leave_pairs::<F>(&mma, &mut tile, &floats, reads, scale, plane, lane, bp);
        put_rows::<F>(&rows, &mut tile, &here, unit, bp);
    }

    let column = Column::new(here.head_of(here.kept), value_steps, own, bp);
    let together = comptime!(bp.reads_states_together());
    if comptime!(!together && bp.splits_pairs()) {
        let product = multiply_states::<F>(kept, column, bp);
        leave_product(&mut floats, product, own);
    }
    let mut sums = Sums::new();
    let mut more_sums = Sums::new();
    #[unroll]
    for pass in 0..PASSES {
        let rows = comptime!(bp.steps_of(pass));
        let mut dq = zeros(comptime!(2 * bp.reads_of(pass).tiles));
        let mut e = zeros(comptime!(2 * rows.tiles));
        let mut h = zeros(comptime!(2 * rows.tiles));
        let data = storage_type_of::<F>();
        let reading = comptime!(if together { Reading::both(bp, data) } else { Reading::STATES });
        let product =
            read_states::<F>(&mma, &tile, kept, column, &mut dq, &mut e, &mut h, own, reading, pass, bp);
        if comptime!(reading.multiplies(pass, bp)) {
            leave_product(&mut floats, product, own);
        }
        scale_rows(&mut dq, &floats, READ_FACTORS_AT, lane, bp.reads_of(pass));
        scale_rows(&mut e, &floats, E_FACTORS_AT, lane, rows);
        // All pairs have left their blocks, and nothing reads dO and dV of this pass any more, nor R of the one before.
        sync_cube();
        add_from_keys::<F>(&mma, &tile, &mut dq, &mut e, own, bp.reads_of(pass), rows, false, bp);
        finish_queries::<F>(&mma, &mut tile, &mut dq, &mut sums, &mut more_sums, own, pass, bp);
        if comptime!(!together) {
            let reading = comptime!(Reading::D_STATES);
            read_states::<F>(&mma, &tile, kept, column, &mut dq, &mut e, &mut h, own, reading, pass, bp);
        }
        scale_rows(&mut h, &floats, H_FACTORS_AT, lane, rows);
        finish_keys::<F>(&mma, &mut tile, &floats, &mut e, &mut h, &mut sums, &mut more_sums, own, pass, bp);
    }
    let here = Here::left(&words);
    let raw = read_block_gates::<B, G>(gating, &here, plane, lane, bp);
    sums.leave::<F>(&mut tile, own, 0usize, bp);
    if comptime!(bp.spec.qk_l2norm) {
        more_sums.leave::<F>(&mut tile, own, 1usize, bp);
    }
    sync_cube();
    leave_along::<F>(&tile, &mut floats, unit, bp);
    store_gradients::<F>(&tile, &floats, q, k, &mut to.q, &mut to.k, &here, unit, bp);
    gradient_of_gates::<F, G>(
        &raw,
        &tile,
        &floats,
        &mut to.g,
        constants,
        &here,
        CUBE_POS,
        &gating.formula,
        plane,
        lane,
        bp,
    );
    gradient_of_beta::<F, B>(&raw, &tile, &floats, &mut to.beta, &here, plane, lane, bp);
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
    floats: &Region<f32>,
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
    floats: &Region<f32>,
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
    floats: &Region<f32>,
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
