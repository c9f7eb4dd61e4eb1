//! Every choice that is made before a tensor-core kernel is compiled, and where things lie in shared memory.

use super::channel::{SEEN_UNITS, partial_bytes};
use super::memory::{Regions, UNIT_BYTES};
use super::tile::AHEAD;
use crate::spec::{Decay, Spec};

/// C, micro-steps per chunk: one per unit of a plane.
pub const CHUNK: usize = 32;
/// Rows of a tensor-core tile.
pub const TILE: usize = 16;
/// Tiles of micro-steps in a chunk.
pub(crate) const BLOCKS: usize = CHUNK / TILE;
/// Planes that prepare a chunk: one for 16 rows of keys or queries.
const GROUP: usize = 4;
/// Units of a preparing group.
pub(crate) const GROUP_UNITS: usize = 32 * GROUP;
/// Planes of a preparing cube. Without gates per channel each has a chunk of its own: they share the sectors in which betas
/// and gates of neighbouring heads lie.
pub(crate) const PREPARE_PLANES: usize = 4;
/// Schedulers of a multiprocessor, which deals planes out to them in turn.
pub(crate) const SCHEDULERS: usize = 4;
/// Key channels of a preparing plane for gates per channel, 16 bytes for each of four units.
pub(crate) const SLICE: usize = 2 * TILE;
/// Units of 16 bytes in a 16 x 16 block.
pub(crate) const BLOCK_UNITS: usize = 32;
/// Words of its place that a cube sets aside (`stage.rs`).
pub(crate) const ASIDE: usize = 3;

/// Which part of its sequences a launch of `forward` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pass {
    /// All of each, from the initial to the final state.
    Whole,
    /// Segments of split sequences. First what the inner ones do to any state, their transfer: V rows of $S^T$ from zero, K
    /// rows from the identity with values of zero, and no outputs. Then all of them, each from the state that `combine` has
    /// found for it. One kernel takes both, since it takes longer to compile than most calls take.
    Segments,
    /// The states and residuals once more, for the backward.
    Replay,
    /// The gradient of the state, backwards.
    Unwind,
}

impl Pass {
    /// Whether it belongs to the backward, whose records hold M in place of T (`chunk.rs`).
    pub(crate) fn is_backward(self) -> bool {
        matches!(self, Pass::Replay | Pass::Unwind)
    }
}

/// A specialisation of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Blueprint {
    /// What is computed. K and V are multiples of 16.
    pub spec: Spec,
    /// Value channels of one cube.
    pub value_tile: usize,
    /// 16-channel tiles of values that one plane holds.
    pub held: usize,
    /// Groups of planes that prepare or fetch chunks in turn, 1 or 2.
    pub groups: usize,
    /// Whether sequences are listed in a table, or rows of the batch.
    pub packed: bool,
    /// Whether a launch of its own has prepared the chunks; always so for gates per channel.
    pub prepared: bool,
    /// What is taken of the sequences.
    pub pass: Pass,
}

impl Blueprint {
    /// Planes that hold the state.
    pub fn scanners(&self) -> usize {
        self.value_tile / (TILE * self.held)
    }

    /// Units of a cube.
    pub fn units(&self) -> usize {
        // Planes more than have work: of cubes of fewer units `ptxas` would make one more fit, with spills.
        32 * if self.keeps_apart() {
            SCHEDULERS * (self.groups + 1)
        } else {
            self.scanners() + GROUP * self.groups
        }
    }

    /// Whether the planes that fetch leave the schedulers of those that scan alone: see `planes.rs`.
    pub(crate) fn keeps_apart(&self) -> bool {
        self.prepared && self.groups > 1 && self.scanners() <= SCHEDULERS / 2
    }

    /// Units of a group that prepares or fetches a chunk.
    pub(crate) fn group_units(&self) -> usize {
        if self.keeps_apart() { 32 * SCHEDULERS / 2 } else { GROUP_UNITS }
    }

    /// Those that store outputs. Planes that multiply queries have less to do than those that invert the leaves of keys.
    pub(crate) fn storing_units(&self) -> usize {
        if self.prepared { self.group_units() } else { self.group_units() - 32 * BLOCKS }
    }

    /// Chunks whose inputs lie in shared memory at a time: one is scanned, one for each group is prepared,
    /// and one arrives.
    pub(crate) fn stages(&self) -> usize {
        self.groups + 2
    }

    /// Rows of $S^T$ in the transfer of a segment: value channels, then those from the identity.
    pub(crate) fn transfer_rows(&self) -> usize {
        self.spec.value_dim + self.spec.key_dim
    }

    /// Cubes that share the value channels of one head.
    pub fn value_tiles(&self) -> usize {
        self.spec.value_dim.div_ceil(self.value_tile)
    }

    /// Cubes that share the transfer of a segment of one head.
    pub fn transfer_tiles(&self) -> usize {
        self.transfer_rows().div_ceil(self.value_tile)
    }

    /// Whether every plane that holds rows has all of its own.
    pub(crate) fn tiles_are_whole(&self) -> bool {
        self.spec.value_dim.is_multiple_of(self.value_tile)
            && (self.pass != Pass::Segments || self.transfer_rows().is_multiple_of(self.value_tile))
    }

    /// The same for one direction of `sweep`.
    pub(crate) fn directed(&self, pass: Pass, has_initial_state: bool) -> Self {
        Self { pass, spec: Spec { has_initial_state, ..self.spec }, ..*self }
    }

    /// Shared memory of `sweep` in units of 16 bytes.
    pub(crate) fn sweep_memory(&self) -> usize {
        let of = |pass| self.directed(pass, false).units_of_memory();
        of(Pass::Replay).max(of(Pass::Unwind))
    }

    /// Shared memory of `sweep`: chunks, their factors, and words that are set aside.
    pub(crate) fn sweep_regions(&self) -> Regions<3> {
        let factors = self.stages() * self.directed(Pass::Unwind, false).factors();
        Regions::new([UNIT_BYTES * self.sweep_memory(), 4 * factors, 4 * ASIDE])
    }

    /// Shared memory of `forward`: the same, and leaves if chunks are prepared beside the scan.
    pub(crate) fn forward_regions(&self) -> Regions<4> {
        let leaves = if self.prepared { 0 } else { BLOCKS * self.leaf_pairs() };
        let factors = self.stages() * self.factors();
        Regions::new([UNIT_BYTES * self.units_of_memory(), 4 * factors, 4 * ASIDE, 8 * leaves])
    }

    /// Shared memory of `prepare`: blocks, factors and leaves.
    pub(crate) fn prepare_regions(&self) -> Regions<3> {
        Regions::new(self.prepare_bytes())
    }

    /// Shared memory of `prepare_by_channel`: the same, with the keys that the first tile leaves for the second behind the
    /// blocks, and what its planes find of a chunk (`Partial`).
    pub(crate) fn prepare_by_channel_regions(&self) -> Regions<6> {
        let [blocks, factors, leaves] = self.prepare_bytes();
        let seen = UNIT_BYTES * SEEN_UNITS * self.slices();
        let [sums, squares, whole] = partial_bytes(self);
        Regions::new([blocks + seen, factors, leaves, sums, squares, whole])
    }

    fn prepare_bytes(&self) -> [usize; 3] {
        let chunks = self.prepared_chunks();
        let leaves = chunks * BLOCKS * self.leaf_pairs();
        [UNIT_BYTES * self.prepared_blocks(), 4 * chunks * self.factors(), 8 * leaves]
    }

    /// Shared memory of `sweep` in bytes.
    pub fn sweep_bytes(&self) -> usize {
        self.sweep_regions().bytes()
    }

    /// Shared memory of `forward` in bytes.
    pub fn shared_memory(&self) -> usize {
        self.forward_regions().bytes()
    }

    /// What the preparing launch leaves of one chunk and head: 16-byte units, and floats.
    pub fn record(&self) -> (usize, usize) {
        let rows = if self.by_channel() { 3 * CHUNK * self.spec.key_dim / 8 } else { 0 };
        (rows + self.recorded().chunk_blocks() * BLOCK_UNITS, self.factors())
    }

    /// The pass that the records are made for.
    pub fn recorded(&self) -> Self {
        Self { pass: if self.pass.is_backward() { Pass::Unwind } else { Pass::Whole }, ..*self }
    }

    pub(crate) fn by_channel(&self) -> bool {
        self.spec.decay == Decay::Channel
    }

    /// 16-row tiles of queries in a chunk.
    pub(crate) fn read_blocks(&self) -> usize {
        match (self.pass, self.spec.micro_steps) {
            (Pass::Replay, _) => 0,
            (_, 1) => BLOCKS,
            _ => 1,
        }
    }

    /// Right operands that are asked for before they are needed: fewer in the backward, which holds more beside.
    pub(crate) fn ahead(&self) -> usize {
        if self.pass.is_backward() { AHEAD / 2 } else { AHEAD }
    }

    /// The same for a pass over the state. In the backward the state is stored behind them, and what is asked for later waits
    /// for that.
    pub(crate) fn reads_ahead(&self) -> usize {
        if self.pass.is_backward() { 2 * AHEAD } else { AHEAD }
    }

    /// All of a pass over the state.
    pub(crate) fn reads(&self) -> usize {
        self.key_steps() * (BLOCKS + self.state_reads())
    }

    /// Those of queries that are multiplied by the state along with the keys.
    pub(crate) fn state_reads(&self) -> usize {
        if self.pass == Pass::Whole { self.read_blocks() } else { 0 }
    }

    /// Steps of a product over the key channels.
    pub(crate) fn key_steps(&self) -> usize {
        self.spec.key_dim / TILE
    }

    // Offsets and sizes in shared memory, in units of 16 bytes. Rows of keys, queries and values have an odd
    // length, so that eight of them fall into different banks.

    pub(crate) fn key_row(&self) -> usize {
        self.spec.key_dim / 8 + 1
    }

    pub(crate) fn value_row(&self) -> usize {
        self.value_tile / 8 + 1
    }

    pub(crate) fn q_at(&self) -> usize {
        CHUNK * self.key_row()
    }

    pub(crate) fn v_at(&self) -> usize {
        self.q_at() + TILE * self.read_blocks() * self.key_row()
    }

    /// Keys decayed to the end of the chunk, for gates per channel.
    pub(crate) fn kd_at(&self) -> usize {
        self.v_at() + CHUNK * self.value_row()
    }

    pub(crate) fn blocks_at(&self) -> usize {
        self.kd_at() + if self.by_channel() { CHUNK * self.key_row() } else { 0 }
    }

    pub(crate) fn stage(&self) -> usize {
        self.blocks_at() + self.chunk_blocks() * BLOCK_UNITS
    }

    pub(crate) fn outputs_at(&self) -> usize {
        self.stages() * self.stage()
    }

    /// Rows of outputs in one chunk: reads, or micro-steps.
    pub(crate) fn output_rows(&self) -> usize {
        if self.pass.is_backward() { CHUNK } else { TILE * self.read_blocks() }
    }

    /// The outputs of one chunk.
    pub(crate) fn outputs(&self) -> usize {
        self.output_rows() * self.value_row()
    }

    /// Where right operand `i` of the products with `blocks` tiles of [K; Q] lies: key step by key step, all rows in each.
    pub(crate) fn row_fragment(&self, i: usize, blocks: usize) -> usize {
        2 * (i / blocks) + i % blocks * TILE * self.key_row()
    }

    /// Where right operand `i` of the state's update lies: block by block, all key steps in each.
    pub(crate) fn depth_fragment(&self, i: usize) -> usize {
        2 * (i % self.key_steps()) + i / self.key_steps() * TILE * self.key_row()
    }

    /// The blocks of one chunk: the leaves of T, the erasing block below the diagonal, P.
    pub(crate) fn chunk_blocks(&self) -> usize {
        (0..self.read_blocks()).map(|r| self.p_blocks(r)).sum::<usize>() + P_BLOCKS
    }

    /// Which block holds reads `r` and micro-steps `j`.
    pub(crate) fn p_block(&self, r: usize, j: usize) -> usize {
        let below = if self.spec.micro_steps == 1 { r * (r + 1) / 2 } else { r * BLOCKS };
        P_BLOCKS + below + j
    }

    /// Blocks of P in row `r`: a query sees the micro-steps up to its own.
    pub(crate) fn p_blocks(&self, r: usize) -> usize {
        if self.spec.micro_steps == 1 { r + 1 } else { BLOCKS }
    }

    /// Key tiles that tile `b` of rows of [K; Q] is multiplied by.
    pub(crate) fn seen_blocks(&self, b: usize) -> usize {
        if b < BLOCKS { b + 1 } else { self.p_blocks(b - BLOCKS) }
    }

    pub(crate) fn units_of_memory(&self) -> usize {
        self.outputs_at() + 2 * self.outputs()
    }

    /// Floats that go with a chunk: factors per micro-step, and the decay per channel where there is one.
    pub(crate) fn factors(&self) -> usize {
        let channels = if self.by_channel() { self.spec.key_dim } else { 0 };
        let betas = if self.pass.is_backward() { CHUNK } else { 0 };
        let gates = if self.prepared { 0 } else { GATE_FLOATS * CHUNK };
        CHANNELS_AT + channels + betas + gates
    }

    /// Where the gates of a chunk lie that is prepared beside a scan.
    pub(crate) fn gates_at(&self) -> usize {
        self.factors() - GATE_FLOATS * CHUNK
    }

    /// Factors that turn R into what is written: beta and the key's reciprocal norm.
    pub(crate) fn betas_at(&self) -> usize {
        self.factors() - CHUNK
    }

    /// Whether leaves are inverted with beta on their right (`chunk.rs`): the backward asks for it, and beside a scan it saves
    /// a shuffle for each column.
    pub(crate) fn beta_on_the_right(&self) -> bool {
        self.pass.is_backward() || !self.prepared
    }

    /// Floats of a leaf that are read at a time. Beside a scan every read counts; in a launch of its own `ptxas` gives too few
    /// registers for longer ones, and spills.
    pub(crate) fn leaf_width(&self) -> usize {
        if self.prepared { 2 } else { 4 }
    }

    /// Pairs of floats in a row of a leaf, as many of them padding as are read at a time.
    pub(crate) fn leaf_row(&self) -> usize {
        (TILE + self.leaf_width()) / 2
    }

    /// Pairs of floats in a leaf.
    pub(crate) fn leaf_pairs(&self) -> usize {
        TILE * self.leaf_row()
    }

    /// Units of a preparing cube.
    pub fn prepare_units(&self) -> usize {
        32 * PREPARE_PLANES
    }

    /// Chunks that a preparing cube takes.
    pub fn prepared_chunks(&self) -> usize {
        if self.by_channel() { 1 } else { PREPARE_PLANES }
    }

    /// Slices of key channels, where gates are per channel.
    pub(crate) fn slices(&self) -> usize {
        self.spec.key_dim.div_ceil(SLICE)
    }

    /// Turns in which a preparing cube takes them: half of its planes have the first tile of rows, the others the second.
    pub(crate) fn turns(&self) -> usize {
        self.slices().div_ceil(PREPARE_PLANES / BLOCKS)
    }

    /// The blocks of the chunks that a preparing cube takes, in units.
    pub(crate) fn prepared_blocks(&self) -> usize {
        self.prepared_chunks() * self.chunk_blocks() * BLOCK_UNITS
    }
}

/// The block that takes what the first half of a chunk wrote from the second half.
pub(crate) const ERASE_BLOCK: usize = BLOCKS;
/// The first block of P.
pub(crate) const P_BLOCKS: usize = ERASE_BLOCK + 1;

// Factors of a chunk, in floats.
pub(crate) const ERASE_AT: usize = 0;
pub(crate) const WRITE_AT: usize = CHUNK;
pub(crate) const READ_AT: usize = 2 * CHUNK;
pub(crate) const DECAY_AT: usize = 3 * CHUNK;
pub(crate) const CHANNELS_AT: usize = 3 * CHUNK + 4;
/// Of each micro-step: beta, the sum of the log decays, and the decay since, or until, the middle.
const GATE_FLOATS: usize = 3;
