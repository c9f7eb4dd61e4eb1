//! What flows through the states before and behind the block, for a plane's 16 key channels.
//!
//! Planes share no channel, so that each reads its part of the states from device memory itself. It lies as left
//! operands lie in registers, tile by tile of $S^T$; a product with the identity turns a tile into a right operand.

use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;

use super::super::arguments::Kept;
use super::super::blueprint::{BLOCK_UNITS, TILE};
use super::super::memory::Region;
use super::super::tile::{Acc, Frag, Mma, Right, Tile, V2, V4, V8, load, mma2, multiply, unpack, zeros};
use super::Own;
use super::blueprint::{GradientsBlueprint, PRODUCTS_AT, Span};
use super::ends::dot8;
use crate::known::known_or;

/// A plane's part of a state: value tile by value tile.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Column {
    /// This unit's part of the first tile.
    first: usize,
    /// How many there are, known at run time only: the loops over them, unrolled, would take more registers than two
    /// cubes share.
    steps: u32,
}

#[cube]
impl Column {
    pub(crate) fn new(slot: usize, steps: u32, own: Own, #[comptime] bp: GradientsBlueprint) -> Self {
        let tiles = slot * comptime!(bp.value_steps() * bp.planes()) + own.plane;
        Column { first: tiles * BLOCK_UNITS + own.lane, steps }
    }

    /// The tile of value step `step`, or of the last one.
    fn tile<F: Float>(
        &self,
        state: &Array<Vector<F, V8>>,
        step: u32,
        #[comptime] bp: GradientsBlueprint,
    ) -> Vector<F, V8> {
        let step = u32::min(step, self.steps - 1) * comptime!((bp.planes() * BLOCK_UNITS) as u32);
        state[self.first + step as usize]
    }

    /// The same as words, to keep: halves of them the compiler would take apart and put together at every step.
    fn words<F: Float>(
        &self,
        state: &Array<Vector<F, V8>>,
        step: u32,
        #[comptime] bp: GradientsBlueprint,
    ) -> Vector<u32, V4> {
        Vector::reinterpret(self.tile::<F>(state, step, bp))
    }
}

/// The 16 x 16 identity as a left operand.
#[cube]
fn identity<F: Float>(lane: usize) -> Frag<F> {
    let mut f = Frag::<F>::new(4usize);
    let mut ones = Vector::<F, V2>::cast_from(0.0f32);
    #[unroll]
    for e in 0..2usize {
        ones[e] = F::cast_from(select(lane / 4 == lane % 4 * 2 + e, 1.0f32, 0.0f32));
    }
    f[0] = ones;
    f[1] = Vector::cast_from(0.0f32);
    f[2] = Vector::cast_from(0.0f32);
    f[3] = ones;
    f
}

/// A tile of $S^T$, values by keys, as a right operand with values as depth: the product with the identity leaves
/// keys by values in accumulators, rounded already. Both halves in one array, as [`load`] would load them: in two, `ptxas`
/// takes 130 registers in place of 128.
#[cube]
fn turned<F: Float>(mma: &Mma<F>, identity: &Frag<F>, x: Vector<F, V8>) -> Frag<F> {
    let mut keys = zeros(2usize);
    multiply::<F>(mma, identity, &Right::<F>::unpack(x), &mut keys, 0usize);
    let (lo, hi) = (keys.index(0usize), keys.index(1usize));
    let mut f = Frag::<F>::new(4usize);
    f[0] = Vector::cast_from(lo[0]);
    f[1] = Vector::cast_from(hi[0]);
    f[2] = Vector::cast_from(lo[1]);
    f[3] = Vector::cast_from(hi[1]);
    f
}

/// What [`read_states`] reads, and how many tiles are asked for before they are needed: device memory answers late, but
/// each takes registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Reading {
    /// Of S; none if only dS is read.
    ahead: usize,
    /// Of dS.
    d_ahead: usize,
}

impl Reading {
    pub(crate) const STATES: Self = Self { ahead: 1, d_ahead: 0 };
    pub(crate) const D_STATES: Self = Self { ahead: 0, d_ahead: 1 };

    /// S and dS at a time, as far ahead as there are registers for: of small cubes `ptxas` gives units fewer, and cubes of
    /// more than 12 planes have fewer. With gates f16 needs some more than bf16.
    pub(crate) fn both(bp: GradientsBlueprint, data: StorageType) -> Self {
        let ahead = if matches!(bp.planes(), 5..=12) { 2 } else { 1 };
        let is_f16 = data == StorageType::Scalar(ElemType::Float(FloatKind::F16));
        Self { ahead, d_ahead: if is_f16 && bp.splits_pairs() { 1 } else { ahead } }
    }

    /// Steps of a round: after as many, tiles lie in the same registers again.
    fn round(self) -> usize {
        self.ahead.max(self.d_ahead)
    }

    /// Whether the product of S and dS is found on the way.
    pub(crate) fn multiplies(self, pass: usize, bp: GradientsBlueprint) -> bool {
        self.ahead > 0 && self.d_ahead > 0 && pass == 0 && bp.splits_pairs()
    }
}

/// Adds dO S^T to `dq` and dV S^T to `e`, and R dS^T to `h`. The first pass over both returns this unit's share of the sum
/// of S . dS: the trace of their product, tile by tile.
#[cube]
pub(crate) fn read_states<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    kept: &Kept<F>,
    from: Column,
    dq: &mut Sequence<Acc>,
    e: &mut Sequence<Acc>,
    h: &mut Sequence<Acc>,
    own: Own,
    #[comptime] reading: Reading,
    #[comptime] pass: usize,
    #[comptime] bp: GradientsBlueprint,
) -> f32 {
    let identity = identity::<F>(own.lane);
    let mut products = zeros(2usize);
    let mut next = Array::<Vector<u32, V4>>::new(comptime!(reading.ahead.max(1)));
    let mut d_next = Array::<Vector<u32, V4>>::new(comptime!(reading.d_ahead.max(1)));
    #[unroll]
    for i in 0..comptime!(reading.ahead) {
        next[i] = from.words::<F>(&kept.states, comptime!(i as u32).runtime(), bp);
    }
    #[unroll]
    for i in 0..comptime!(reading.d_ahead) {
        d_next[i] = from.words::<F>(&kept.d_states, comptime!(i as u32).runtime(), bp);
    }
    let round_steps = comptime!(reading.round() as u32);
    for round in 0..from.steps.div_ceil(round_steps) {
        #[unroll]
        for i in 0..comptime!(reading.round()) {
            let step = round * round_steps + comptime!(i as u32);
            if known_or(reading.round() == 1, step < from.steps) {
                let rows = own.value_rows + 2 * step as usize;
                let place = comptime!(i % reading.ahead.max(1));
                let d_place = comptime!(i % reading.d_ahead.max(1));
                if comptime!(reading.multiplies(pass, bp)) {
                    let left = unpack::<F>(Vector::reinterpret(next[place]));
                    let right = Right::<F>::unpack(Vector::reinterpret(d_next[d_place]));
                    multiply::<F>(mma, &left, &right, &mut products, 0usize);
                }
                if comptime!(reading.ahead > 0) {
                    let right = turned::<F>(mma, &identity, Vector::reinterpret(next[place]));
                    next[place] = from.words::<F>(&kept.states, step + comptime!(reading.ahead as u32), bp);
                    sync_plane();
                    let reads = comptime!(bp.reads_of(pass));
                    add_product::<F>(mma, tile, dq, rows + comptime!(bp.d_o_at()), &right, reads, bp);
                    let steps = comptime!(bp.steps_of(pass));
                    add_product::<F>(mma, tile, e, rows + comptime!(bp.dv_at()), &right, steps, bp);
                }
                if comptime!(reading.d_ahead > 0) {
                    let right = turned::<F>(mma, &identity, Vector::reinterpret(d_next[d_place]));
                    d_next[d_place] =
                        from.words::<F>(&kept.d_states, step + comptime!(reading.d_ahead as u32), bp);
                    sync_plane();
                    let steps = comptime!(bp.steps_of(pass));
                    add_product::<F>(mma, tile, h, rows + comptime!(bp.r_at()), &right, steps, bp);
                }
            }
        }
    }
    trace(&products, own.lane)
}

/// This unit's share of the diagonal of 16 rows by two tiles of 8 columns.
#[cube]
fn trace(x: &Sequence<Acc>, lane: usize) -> f32 {
    let mut sum = 0.0f32;
    #[unroll]
    for e in 0..2usize {
        let both = x.index(0usize)[0][e] + x.index(1usize)[1][e];
        sum += select(lane / 4 == lane % 4 * 2 + e, both, 0.0f32);
    }
    sum
}

/// This unit's share of the sum of S . dS.
#[cube]
pub(crate) fn multiply_states<F: Float>(
    kept: &Kept<F>,
    from: Column,
    #[comptime] bp: GradientsBlueprint,
) -> f32 {
    let mut sum = 0.0f32;
    for step in 0..from.steps {
        sum += dot8::<F>(from.tile::<F>(&kept.states, step, bp), from.tile::<F>(&kept.d_states, step, bp));
    }
    sum
}

/// Leaves the plane's share of the sum of S . dS.
#[cube]
pub(crate) fn leave_product(floats: &mut Region<f32>, product: f32, own: Own) {
    let sum = plane_sum(product);
    if own.lane == 0 {
        floats[PRODUCTS_AT + own.plane] = sum;
    }
}

/// Leaves the products of the states channel by channel, of every second value step.
#[cube]
pub(crate) fn multiply_channels<F: Float>(
    floats: &mut Region<f32>,
    kept: &Kept<F>,
    from: Column,
    own: Own,
    half: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    // Two channels and the two 8 behind them, of two rows each.
    let mut sums = Array::<f32>::new(4usize);
    #[unroll]
    for c in 0..4usize {
        sums[c] = 0.0f32;
    }
    let first = half as u32;
    for i in 0..(from.steps - first).div_ceil(2u32) {
        let step = 2 * i + first;
        let x = Vector::<f32, V8>::cast_from(from.tile::<F>(&kept.states, step, bp));
        let y = Vector::<f32, V8>::cast_from(from.tile::<F>(&kept.d_states, step, bp));
        #[unroll]
        for c in 0..4usize {
            let at = comptime!(c / 2 * 4 + c % 2);
            sums[c] = fma(x[at], y[at], fma(x[comptime!(at + 2)], y[comptime!(at + 2)], sums[c]));
        }
    }
    #[unroll]
    for c in 0..4usize {
        let mut sum = sums[c];
        #[unroll]
        for level in 2..5usize {
            sum += plane_shuffle_xor(sum, comptime!(1u32 << level));
        }
        if own.lane < 4 {
            let channel = own.plane * TILE + comptime!(c / 2 * 8 + c % 2) + 2 * own.lane;
            floats[comptime!(bp.products_at()) + half * comptime!(bp.channels()) + channel] = sum;
        }
    }
}

/// Adds one step of a product over the value channels.
#[cube]
fn add_product<F: Float>(
    mma: &Mma<F>,
    tile: &Tile<F>,
    to: &mut Sequence<Acc>,
    rows: usize,
    right: &Frag<F>,
    #[comptime] span: Span,
    #[comptime] bp: GradientsBlueprint,
) {
    #[unroll]
    for i in 0..comptime!(span.tiles) {
        let mut left = Sequence::<Frag<F>>::new();
        left.push(load::<F>(mma, tile, rows + comptime!((span.first + i) * TILE * bp.value_row()), false));
        mma2::<F>(mma, &left, 0usize, 0usize, right, to, comptime!(2 * i), 0usize, 1usize);
    }
}
