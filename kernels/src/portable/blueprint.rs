//! Every choice that is made before the portable kernels are compiled.

use crate::spec::{Decay, Spec};

/// Channels that one pass over a tile covers.
pub(crate) const SLICE: usize = 32;
/// Four-vectors in a slice.
pub(crate) const SLICE4: usize = SLICE / 4;
/// Row length, in four-vectors, of a slice in shared memory: odd, so that rows fall into different banks.
pub(crate) const SLICE_LD: usize = SLICE4 + 1;

/// Rows of a tile that one unit of `scan` and `sweep` works on, each four columns wide.
pub(crate) const TILE_ROWS: usize = 4;
/// Units that share a tile, each taking its share of the depth. There are as many as rows, so that each ends up with
/// the sum of one row.
pub(crate) const PARTS: usize = TILE_ROWS;

/// A specialisation of the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Blueprint {
    /// What is computed.
    pub spec: Spec,
    /// C, micro-steps per chunk: 16 or 32.
    pub chunk: usize,
    /// Value channels of one cube of `scan`, a multiple of 4.
    pub value_tile: usize,
    /// Units per row in `prepare` and `gradients`, each taking its share of the channels.
    pub parts: usize,
    /// Left vectors that a product of `scan` and `sweep` asks for together, as its registers allow: 4 to 16.
    pub ahead: usize,
    /// Whether the records also hold what the backward leaves in them.
    pub backward: bool,
}

impl Blueprint {
    /// K rounded up to whole slices; the padding is zero.
    pub fn padded_key_dim(&self) -> usize {
        self.spec.key_dim.div_ceil(SLICE) * SLICE
    }

    /// Rows of Q in a chunk: at most this many tokens end in C micro-steps.
    pub fn reads(&self) -> usize {
        self.chunk.div_ceil(self.spec.micro_steps)
    }

    /// Units of a cube of `prepare`, `gradients` and `collect`.
    pub fn prepare_units(&self) -> usize {
        self.chunk * self.parts
    }

    /// Units of a `scan` or `sweep` cube: one for every four columns of each row of N.
    pub fn scan_units(&self) -> usize {
        self.chunk * self.tile_cols()
    }

    /// Cubes that share the value channels of one head in `scan`.
    pub fn value_tiles(&self) -> usize {
        self.spec.value_dim.div_ceil(self.value_tile)
    }

    /// Shared memory of the largest kernel, in bytes.
    pub fn shared_memory(&self) -> usize {
        let f = 4;
        let slices = if self.spec.decay == Decay::Channel { 3 } else { 2 };
        let prepare = slices * self.chunk * SLICE_LD * 4 * f
            + 3 * self.chunk * (self.chunk + 1) * f
            + (4 + 2 * self.parts) * self.chunk * f;
        // The state, the rows of a chunk, and of each row what all parts but one send.
        let scan = (self.padded_key_dim() + PARTS * self.chunk) * self.value_tile * f;
        let gradients = (3 * self.chunk + 2 * SLICE) * SLICE_LD * 4 * f
            + 2 * self.chunk * (self.chunk + 1) * f
            + (4 * self.chunk + SLICE) * f;
        prepare.max(scan).max(if self.backward { gradients } else { 0 })
    }

    /// Bytes of scratch per chunk and value head.
    pub fn record_bytes(&self) -> usize {
        self.record_vectors() * 16
    }

    pub(crate) fn slices(&self) -> usize {
        self.padded_key_dim() / SLICE
    }

    /// Four-vectors of a slice of the chunk's rows, and of a slice of 32 rows of a state, for each unit of `prepare` and
    /// `gradients`.
    pub(crate) fn row_vectors(&self) -> usize {
        self.chunk * SLICE4 / self.prepare_units()
    }

    pub(crate) fn state_vectors(&self) -> usize {
        SLICE * SLICE4 / self.prepare_units()
    }

    pub(crate) fn value_slices(&self) -> usize {
        self.spec.value_dim.div_ceil(SLICE)
    }

    /// Tiles in a column of N.
    pub(crate) fn tile_rows(&self) -> usize {
        self.chunk / TILE_ROWS
    }

    pub(crate) fn tile_cols(&self) -> usize {
        self.value_tile / 4
    }

    /// Rows of Q that one unit of `scan` holds.
    pub(crate) fn read_rows(&self) -> usize {
        self.reads().div_ceil(self.tile_rows())
    }

    /// Rows of the state that one unit updates at a time: at most four, so that all units have as many.
    pub(crate) fn state_rows(&self) -> usize {
        let each = self.padded_key_dim() / self.chunk;
        (1..=TILE_ROWS).rev().find(|&n| each.is_multiple_of(n)).unwrap_or(1)
    }

    /// Four-vectors per row of value channels, all tiles together.
    pub(crate) fn row4(&self) -> usize {
        self.value_tiles() * self.value_tile / 4
    }

    // The record of one chunk and head, in four-vectors. `prepare` writes matrices blocked by depth, as
    // `tile::mma` reads them: [Kg; Qg], Kd^T, gamma, T and P. With M = (I + stril(K K^T . Gamma) diag(beta))^-1, T is
    // diag(beta) M; the backward takes M itself in its place, so that nothing needs to be divided by beta.

    /// Rows of [Kg; Qg].
    pub(crate) fn stacked(&self) -> usize {
        self.chunk + self.reads()
    }

    pub(crate) fn kd_at(&self) -> usize {
        self.stacked() * self.padded_key_dim() / 4
    }

    pub(crate) fn gamma_at(&self) -> usize {
        self.kd_at() + self.chunk * self.padded_key_dim() / 4
    }

    pub(crate) fn t_at(&self) -> usize {
        self.gamma_at() + self.padded_key_dim() / 4
    }

    pub(crate) fn p_at(&self) -> usize {
        self.t_at() + self.chunk * self.chunk / 4
    }

    // What the backward adds, row-major: beta and the factors of k and q, the state before the chunk, the gradient
    // of the state after it, R, the gradients of v, q and k, and the chunk's share of the gate's constants.

    pub(crate) fn factors_at(&self) -> usize {
        self.p_at() + self.reads() * self.chunk / 4
    }

    pub(crate) fn state_at(&self) -> usize {
        self.factors_at() + 3 * self.chunk / 4
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
        if self.backward { self.constants_at() + self.padded_key_dim() / 2 } else { self.factors_at() }
    }
}
