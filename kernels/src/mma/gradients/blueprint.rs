//! The cube of `gradients`: its planes, the pairs of tiles, and where things lie in its shared memory.

use std::ops::Range;

use super::super::blueprint::{BLOCK_UNITS, CHUNK, TILE};
use super::super::memory::{Regions, UNIT_BYTES};
use super::super::sweep::KEPT;
use super::here::HERE_WORDS;
use crate::spec::{Decay, Spec};

/// Micro-steps of a cube: those between two kept states.
pub const BLOCK: usize = KEPT * CHUNK;
/// Tiles of micro-steps in a block.
pub(crate) const TILES: usize = BLOCK / TILE;
/// Pairs of two tiles of micro-steps, of which the first does not lie before the second.
pub(crate) const STEP_PAIRS: usize = TILES * (TILES + 1) / 2;
/// Rows that a unit walks with gates per channel: half a tile.
pub(crate) const STRIP: usize = TILE / 2;
/// Strips in a block.
pub(crate) const STRIPS: usize = BLOCK / STRIP;

/// A specialisation of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GradientsBlueprint {
    /// What is computed. K and V are multiples of 16.
    pub spec: Spec,
    /// Whether sequences are listed in a table, or rows of the batch.
    pub packed: bool,
}

/// Passes of a plane over its rows: the sums of all rows at a time would take more registers than two cubes share.
pub(crate) const PASSES: usize = 2;

/// Tiles of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Span {
    pub(crate) first: usize,
    pub(crate) tiles: usize,
}

impl Span {
    fn of(pass: usize, tiles: usize) -> Self {
        let each = tiles.div_ceil(PASSES);
        let first = tiles.min(pass * each);
        Self { first, tiles: each.min(tiles - first) }
    }

    fn range(self) -> Range<usize> {
        self.first..self.first + self.tiles
    }

    pub(crate) const NONE: Self = Self { first: 0, tiles: 0 };
}

/// Pairs of tiles in the rows before row `i`, if row `r` sees the first `(r + 1) * n` tiles.
fn pairs_before(i: usize, n: usize) -> usize {
    (0..i).map(|r| seen(r, n)).sum()
}

fn seen(i: usize, n: usize) -> usize {
    TILES.min((i + 1) * n)
}

impl GradientsBlueprint {
    /// The blueprint for a spec, if there is one: `sweep` holds 16 rows of a state's gradient in the registers of a plane,
    /// and with gates per channel a cube has a unit for each channel of a tile, and micro-steps are tokens.
    pub fn new(spec: Spec, packed: bool) -> Option<Self> {
        let fits = match spec.decay {
            Decay::None | Decay::Head => spec.key_dim <= 256,
            Decay::Channel => spec.key_dim <= 128 && spec.micro_steps == 1,
        };
        fits.then_some(Self { spec, packed })
    }

    pub(crate) fn by_channel(&self) -> bool {
        self.spec.decay == Decay::Channel
    }

    /// Planes of a cube: each has 16 key channels of all rows.
    pub(crate) fn planes(&self) -> usize {
        self.spec.key_dim / TILE
    }

    /// Units of a cube: with gates per channel one for each tile and channel.
    pub fn units(&self) -> usize {
        if self.by_channel() { TILES * self.channels() } else { 32 * self.planes() }
    }

    /// Key channels that rows in shared memory have room for. With gates per channel they are rounded up so that planes lie
    /// inside tiles, and a unit behind the last one works on padding: if it had none, every store would need a branch, for
    /// which there are no registers.
    pub(crate) fn channels(&self) -> usize {
        if self.by_channel() { self.spec.key_dim.next_multiple_of(32) } else { self.spec.key_dim }
    }

    /// 16-row tiles of reads.
    pub(crate) fn read_tiles(&self) -> usize {
        if self.spec.micro_steps == 1 { TILES } else { BLOCK.div_ceil(self.spec.micro_steps).div_ceil(TILE) }
    }

    /// Steps of a product over the value channels.
    pub(crate) fn value_steps(&self) -> usize {
        self.spec.value_dim / TILE
    }

    // Pairs of a tile of reads and one of micro-steps come first, then those of two tiles of micro-steps.

    /// Tiles of micro-steps that tile `i` of reads sees.
    pub(crate) fn seen(&self, i: usize) -> usize {
        seen(i, self.spec.micro_steps)
    }

    pub(crate) fn read_pair(&self, i: usize, j: usize) -> usize {
        pairs_before(i, self.spec.micro_steps) + j
    }

    pub(crate) fn step_pair(&self, i: usize, j: usize) -> usize {
        self.read_pairs() + pairs_before(i, 1) + j
    }

    /// The first pair of row `i`, of reads or of micro-steps.
    pub(crate) fn first_pair(&self, i: usize, reads: bool) -> usize {
        if reads { self.read_pair(i, 0) } else { self.step_pair(i, 0) }
    }

    pub(crate) fn read_pairs(&self) -> usize {
        pairs_before(self.read_tiles(), self.spec.micro_steps)
    }

    pub(crate) fn pairs(&self) -> usize {
        self.read_pairs() + STEP_PAIRS
    }

    /// Whether the pairs inside one token are kept apart: there is no decay between them.
    pub(crate) fn splits_pairs(&self) -> bool {
        self.spec.decay == Decay::Head
    }

    /// Whether a pass reads the state and its gradient at a time: more is done while tiles are on their way, and with
    /// gates their product costs no loads. With a norm there are sums to keep beside, more than two cubes have registers for.
    pub(crate) fn reads_states_together(&self) -> bool {
        !self.spec.qk_l2norm
    }

    /// Whether pair (i, j) of a read and a micro-step is there; inside tokens, whether one may have both.
    pub(crate) fn has_read(&self, i: usize, j: usize, within: bool) -> bool {
        let n = self.spec.micro_steps;
        let near = self.splits_pairs() && TILE * (j + 1) + n > TILE * i * n + 1;
        i < self.read_tiles() && j < self.seen(i) && (near || !within)
    }

    /// The same for two micro-steps.
    pub(crate) fn has_step(&self, i: usize, j: usize, within: bool) -> bool {
        let n = self.spec.micro_steps;
        let near = self.splits_pairs() && n > 1 && i <= j + (n - 1).div_ceil(TILE);
        j <= i && (near || !within)
    }

    pub(crate) fn any_read(&self, reads: Span, j: usize, within: bool) -> bool {
        reads.range().any(|i| self.has_read(i, j, within))
    }

    pub(crate) fn any_step(&self, steps: Span, j: usize, within: bool) -> bool {
        steps.range().any(|i| self.has_step(i, j, within))
    }

    pub(crate) fn any_seen(&self, i: usize, steps: Span, within: bool) -> bool {
        steps.range().any(|j| self.has_read(i, j, within))
    }

    pub(crate) fn any_behind(&self, i: usize, steps: Span, within: bool) -> bool {
        steps.range().any(|j| self.has_step(i, j, within))
    }

    /// Pairs that have blocks for what lies inside a token; of single steps those of reads on the diagonal.
    fn pairs_within(&self) -> usize {
        match (self.splits_pairs(), self.spec.micro_steps) {
            (false, _) => 0,
            (true, 1) => TILES,
            (true, _) => self.pairs(),
        }
    }

    // Offsets and sizes in shared memory, in units of 16 bytes; rows have an odd length.

    pub(crate) fn key_row(&self) -> usize {
        self.channels() / 8 + 1
    }

    /// As long as a row of keys at least: gradients of queries and keys take the place of what has been read.
    pub(crate) fn value_row(&self) -> usize {
        (self.spec.value_dim / 8 + 1).max(self.key_row())
    }

    pub(crate) fn k_at(&self) -> usize {
        TILE * self.read_tiles() * self.key_row()
    }

    /// Output gradients, and tile by tile in their place dQ.
    pub(crate) fn d_o_at(&self) -> usize {
        self.k_at() + BLOCK * self.key_row()
    }

    /// Residuals; in place of those of the first pass at last the second sums.
    pub(crate) fn r_at(&self) -> usize {
        self.d_o_at() + TILE * self.read_tiles() * self.value_row()
    }

    /// Value gradients; in place of those of the first pass its dK, of the second the first sums.
    pub(crate) fn dv_at(&self) -> usize {
        self.r_at() + BLOCK * self.value_row()
    }

    /// Where a pass leaves dK: in place of value gradients, and at last of the keys.
    pub(crate) fn dk_at(&self, pass: usize) -> (usize, usize) {
        if pass == 0 { (self.dv_at(), self.value_row()) } else { (self.k_at(), self.key_row()) }
    }

    /// Where the sums over channels lie, a unit for every row and plane. There are 4 K of them, and no less room.
    pub(crate) fn sums_at(&self, group: usize) -> usize {
        if group == 0 { self.dv_at() + BLOCK / PASSES * self.value_row() } else { self.r_at() }
    }

    /// With gates per channel, keys decayed to the ends of their strips. Queries and keys, at 0 and `k_at`, are decayed
    /// from the starts of theirs.
    pub(crate) fn keys_to_end_at(&self) -> usize {
        self.dv_at() + BLOCK * self.value_row()
    }

    pub(crate) fn pairs_at(&self) -> usize {
        self.keys_to_end_at() + if self.by_channel() { BLOCK * self.key_row() } else { 0 }
    }

    // With gates per channel planes leave sums in f32, rows of twice as many units as a row of keys, in place of all
    // operands and pairs.

    /// dQ, -E, what H takes from the pairs, and what it takes from the state.
    pub(crate) fn channel_sums_at(&self, which: usize) -> usize {
        which * 2 * BLOCK * self.key_row()
    }

    /// Queries as they came, and keys behind them.
    pub(crate) fn raw_queries_at(&self) -> usize {
        let behind_pairs = self.across_at(STEP_PAIRS);
        if self.by_channel() { behind_pairs.max(self.channel_sums_at(4)) } else { 0 }
    }

    pub(crate) fn raw_keys_at(&self) -> usize {
        self.raw_queries_at() + self.k_at()
    }

    pub(crate) fn reads_of(&self, pass: usize) -> Span {
        Span::of(pass, self.read_tiles())
    }

    pub(crate) fn steps_of(&self, pass: usize) -> Span {
        Span::of(pass, TILES)
    }

    /// The two blocks of a pair.
    pub(crate) fn across_at(&self, pair: usize) -> usize {
        self.pairs_at() + pair * PAIR
    }

    /// Those of pair (i, j) of a read and a micro-step.
    pub(crate) fn read_block(&self, i: usize, j: usize, within: bool) -> usize {
        let pair = self.read_pair(i, j);
        if within { self.within_at(i, pair) } else { self.across_at(pair) }
    }

    /// Those of two micro-steps.
    pub(crate) fn step_block(&self, i: usize, j: usize, within: bool) -> usize {
        let pair = self.step_pair(i, j);
        if within { self.within_at(i, pair) } else { self.across_at(pair) }
    }

    /// The two blocks for what lies inside a token.
    pub(crate) fn within_at(&self, i: usize, pair: usize) -> usize {
        let slot = if self.spec.micro_steps == 1 { i } else { pair };
        self.across_at(self.pairs() + slot)
    }

    pub(crate) fn units_of_memory(&self) -> usize {
        if self.by_channel() {
            self.raw_keys_at() + BLOCK * self.key_row()
        } else {
            self.across_at(self.pairs() + self.pairs_within())
        }
    }

    /// Floats: beta, log decays, reciprocal norms of keys and queries, what their gradients have along them,
    /// factors of what goes through the states, and one product of states from each plane.
    pub(crate) fn floats(&self) -> usize {
        PRODUCTS_AT + self.planes()
    }

    /// Shared memory: rows and pairs, floats, words of [`Here`](super::here::Here), and pairs on the diagonal where gates
    /// are per channel.
    pub(crate) fn regions(&self) -> Regions<4> {
        let (floats, diagonals) =
            if self.by_channel() { (self.channel_floats(), STRIPS * DIAGONAL) } else { (self.floats(), 0) };
        Regions::new([UNIT_BYTES * self.units_of_memory(), 4 * floats, 4 * HERE_WORDS, 16 * diagonals])
    }

    /// Shared memory in bytes.
    pub fn shared_memory(&self) -> usize {
        self.regions().bytes()
    }

    // Floats with gates per channel: factors of rows, then what is kept of strips and channels.

    /// The decay of each channel over a strip.
    pub(crate) fn strip_decays_at(&self) -> usize {
        ROW_FACTORS
    }

    /// Sums for the gates at or before a strip, and behind it.
    pub(crate) fn later_at(&self) -> usize {
        self.strip_decays_at() + STRIPS * self.channels()
    }

    pub(crate) fn earlier_at(&self) -> usize {
        self.later_at() + STRIPS * self.channels()
    }

    /// The products of the states, channel by channel, from both halves of the planes.
    pub(crate) fn products_at(&self) -> usize {
        self.earlier_at() + STRIPS * self.channels()
    }

    /// Sums over the channels of a plane: sum by sum, strip by strip, plane of a tile by plane, row by row.
    pub(crate) fn row_sums_at(&self, which: usize) -> usize {
        self.products_at() + 2 * self.channels() + which * self.channel_planes() * BLOCK
    }

    /// Planes that share a tile.
    pub(crate) fn channel_planes(&self) -> usize {
        self.channels() / 32
    }

    pub(crate) fn channel_floats(&self) -> usize {
        self.row_sums_at(3)
    }
}

/// Fours of floats in a pair of 8 x 8 blocks on the diagonal.
pub(crate) const DIAGONAL: usize = STRIP * STRIP / 2;

/// Units of two blocks.
pub(crate) const PAIR: usize = 2 * BLOCK_UNITS;

// Floats.
pub(crate) const BETAS_AT: usize = 0;
pub(crate) const DECAYS_AT: usize = BLOCK;
pub(crate) const KEY_NORMS_AT: usize = 2 * BLOCK;
pub(crate) const QUERY_NORMS_AT: usize = 3 * BLOCK;
pub(crate) const ALONG_KEYS_AT: usize = 4 * BLOCK;
pub(crate) const ALONG_QUERIES_AT: usize = 5 * BLOCK;
/// What a read takes from the state, E and H from theirs.
pub(crate) const READ_FACTORS_AT: usize = 6 * BLOCK;
pub(crate) const E_FACTORS_AT: usize = 7 * BLOCK;
pub(crate) const H_FACTORS_AT: usize = 8 * BLOCK;
pub(crate) const PRODUCTS_AT: usize = 9 * BLOCK;

// Floats with gates per channel.
/// The reciprocal norms of queries, the factors of what is read with them, and the factors of what keys write.
pub(crate) const READ_NORMS_AT: usize = QUERY_NORMS_AT;
pub(crate) const READS_AT: usize = BLOCK;
pub(crate) const WRITES_AT: usize = 4 * BLOCK;
/// Floats that are kept of rows.
const ROW_FACTORS: usize = 5 * BLOCK;
