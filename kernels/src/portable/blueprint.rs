//! Every choice that is made before the portable kernels are compiled.

use crate::spec::{Decay, Spec};

/// Channels that one pass over a tile covers.
pub(crate) const SLICE: usize = 32;
/// Four-vectors in a slice.
pub(crate) const SLICE4: usize = SLICE / 4;
/// Row length, in four-vectors, of a slice in shared memory: odd, so that rows fall into different banks.
pub(crate) const SLICE_LD: usize = SLICE4 + 1;

/// A specialisation of the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Blueprint {
    /// What is computed.
    pub spec: Spec,
    /// C, micro-steps per chunk: 16 or 32.
    pub chunk: usize,
    /// Value channels of one cube of `scan`, a multiple of 4.
    pub value_tile: usize,
    /// Rows of N that one unit of `scan` holds, each four columns wide: 1, 2 or 4.
    pub unit_rows: usize,
    /// Units per row in `prepare` and `gradients`, each taking its share of the channels.
    pub parts: usize,
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

    /// Units of a `scan` or `sweep` cube: one for each `unit_rows` x 4 tile of N.
    pub fn scan_units(&self) -> usize {
        self.tile_rows() * self.tile_cols()
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
        let state = self.padded_key_dim() * self.value_tile * f;
        let rows = if self.backward { self.stacked() } else { self.chunk };
        let scan = state + rows * self.value_tile * f;
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

    pub(crate) fn value_slices(&self) -> usize {
        self.spec.value_dim.div_ceil(SLICE)
    }

    pub(crate) fn tile_rows(&self) -> usize {
        self.chunk / self.unit_rows
    }

    pub(crate) fn tile_cols(&self) -> usize {
        self.value_tile / 4
    }

    /// Rows of Q that one unit of `scan` holds.
    pub(crate) fn read_rows(&self) -> usize {
        self.reads().div_ceil(self.tile_rows())
    }

    /// Rounds that `mma` loads together: fewer where two scans share the registers.
    pub(crate) fn ahead(&self) -> usize {
        if self.backward { 2 } else { 4 }
    }

    /// Rows of the state that one unit updates at a time: as many as fit its registers and divide K.
    pub(crate) fn state_rows(&self) -> usize {
        (SLICE / self.tile_rows()).clamp(1, 4)
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
