//! Every choice that is made before the portable kernels are compiled.

use crate::spec::{Decay, Spec};

/// Channels that one pass over a tile covers.
pub(crate) const SLICE: usize = 32;
/// Four-vectors in a slice.
pub(crate) const SLICE4: usize = SLICE / 4;
/// Row length, in four-vectors, of a slice in shared memory: odd, so that rows fall into different banks.
pub(crate) const SLICE_LD: usize = SLICE4 + 1;

/// Pieces of a row of which the norm adds up the squares side by side.
pub(crate) const NORM_PIECES: usize = 4;

/// A specialisation of the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Blueprint {
    /// What is computed.
    pub spec: Spec,
    /// C, micro-steps between the states that the backward keeps: 16 or 32.
    pub chunk: usize,
    /// Key channels of the state that one unit of `scan` and `sweep` holds, a divisor of 32 and multiple of 4.
    pub unit_keys: usize,
    /// Value channels of them: 4 or 2.
    pub unit_values: usize,
    /// Value channels of one cube of `scan` and `sweep`, a multiple of those of a unit.
    pub value_tile: usize,
    /// Micro-steps that a cube of `scan` and `sweep` loads at a time, a divisor of the chunk.
    pub stage: usize,
    /// Units per row in `gradients`, each taking its share of the channels.
    pub parts: usize,
}

impl Blueprint {
    /// K rounded up to whole slices; the padding is zero.
    pub fn padded_key_dim(&self) -> usize {
        self.spec.key_dim.div_ceil(SLICE) * SLICE
    }

    /// Tokens that end in a chunk: at most this many.
    pub fn reads(&self) -> usize {
        self.chunk.div_ceil(self.spec.micro_steps)
    }

    /// The same of a stage.
    pub(crate) fn staged_reads(&self) -> usize {
        self.stage.div_ceil(self.spec.micro_steps)
    }

    /// Units of a cube of `gradients` and `collect`.
    pub fn chunk_units(&self) -> usize {
        self.chunk * self.parts
    }

    /// Units of a `scan` or `sweep` cube.
    pub fn scan_units(&self) -> usize {
        self.key_parts() * self.tile_cols()
    }

    /// Cubes that share the value channels of one head in `scan`.
    pub fn value_tiles(&self) -> usize {
        self.spec.value_dim.div_ceil(self.value_tile)
    }

    /// Shared memory of `scan`, in bytes; `sweep` takes less.
    pub fn scan_memory(&self) -> usize {
        let f = 4;
        let rows = if self.spec.decay == Decay::Channel { 3 } else { 2 };
        rows * self.stage * self.staged_row() * 4 * f
            + self.stage * self.value_tile * f
            + (2 + self.staged_reads()) * self.scan_units() * self.unit_values * f
            + (4 + 2 * NORM_PIECES) * self.stage * f
    }

    /// Shared memory of `gradients`, in bytes.
    pub fn gradients_memory(&self) -> usize {
        let f = 4;
        (3 * self.chunk + 2 * SLICE) * SLICE_LD * 4 * f
            + 2 * self.chunk * (self.chunk + 1) * f
            + (4 * self.chunk + SLICE) * f
    }

    /// Bytes of scratch of the backward per chunk and value head.
    pub fn record_bytes(&self) -> usize {
        self.record_vectors() * 16
    }

    /// Units that share a column of the state.
    pub(crate) fn key_parts(&self) -> usize {
        self.padded_key_dim() / self.unit_keys
    }

    /// Four-vectors from one part of a row to the next in shared memory: one more than there are, so that parts fall
    /// into different banks.
    pub(crate) fn staged_part(&self) -> usize {
        self.unit_keys / 4 + 1
    }

    pub(crate) fn staged_row(&self) -> usize {
        self.key_parts() * self.staged_part()
    }

    /// What of a stage each unit carries: four-vectors of keys and of values, and scalars.
    pub(crate) fn staged_vectors(&self) -> usize {
        (self.stage * self.padded_key_dim() / 4).div_ceil(self.scan_units())
    }

    pub(crate) fn staged_values(&self) -> usize {
        self.stage.div_ceil(self.key_parts())
    }

    pub(crate) fn staged_scalars(&self) -> usize {
        self.stage.div_ceil(self.scan_units())
    }

    /// Columns of a tile of the state, each as wide as a unit.
    pub(crate) fn tile_cols(&self) -> usize {
        self.value_tile / self.unit_values
    }

    pub(crate) fn slices(&self) -> usize {
        self.padded_key_dim() / SLICE
    }

    /// Four-vectors of a slice of the chunk's rows, and of a slice of 32 rows of a state, for each unit of `gradients`.
    pub(crate) fn row_vectors(&self) -> usize {
        self.chunk * SLICE4 / self.chunk_units()
    }

    pub(crate) fn state_vectors(&self) -> usize {
        SLICE * SLICE4 / self.chunk_units()
    }

    pub(crate) fn value_slices(&self) -> usize {
        self.spec.value_dim.div_ceil(SLICE)
    }

    /// Four-vectors per row of value channels, all tiles together.
    pub(crate) fn row4(&self) -> usize {
        self.value_tiles() * self.value_tile / 4
    }

    // The record of one chunk and head, in four-vectors, row-major: beta and the factors of k and q, the state before
    // the chunk, the gradient of the state after it, R, the gradients of v, q and k, and the chunk's share of those of
    // the gate's constants.

    /// The same in vectors of a unit's value channels.
    pub(crate) fn in_unit_vectors(&self, four_vectors: usize) -> usize {
        four_vectors * 4 / self.unit_values
    }

    pub(crate) fn factors_at(&self) -> usize {
        0
    }

    pub(crate) fn state_at(&self) -> usize {
        3 * self.chunk / 4
    }

    pub(crate) fn d_state_at(&self) -> usize {
        self.state_at() + self.padded_key_dim() * self.row4()
    }

    pub(crate) fn r_at(&self) -> usize {
        self.d_state_at() + self.padded_key_dim() * self.row4()
    }

    pub(crate) fn dv_at(&self) -> usize {
        self.r_at() + self.chunk * self.row4()
    }

    pub(crate) fn dq_at(&self) -> usize {
        self.dv_at() + self.chunk * self.row4()
    }

    pub(crate) fn dk_at(&self) -> usize {
        self.dq_at() + self.reads() * self.padded_key_dim() / 4
    }

    /// The gradients of `a_log` and of `dt_bias`, each for one head or for every channel.
    pub(crate) fn constants_at(&self) -> usize {
        self.dk_at() + self.chunk * self.padded_key_dim() / 4
    }

    pub(crate) fn record_vectors(&self) -> usize {
        self.constants_at() + self.padded_key_dim() / 2
    }
}
