//! Which block a cube takes.

use cubecl::prelude::*;

use super::super::arguments::Sizes;
use super::super::blueprint::CHUNK;
use super::super::memory::Region;
use super::super::stage::sequence_of;
use super::super::sweep::{KEPT, first_kept};
use super::blueprint::{BLOCK, GradientsBlueprint};

/// The block of a cube, and its heads.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Here {
    /// Row of the batch, and the sequence's first token.
    pub(crate) row: u32,
    pub(crate) start: u32,
    /// First micro-step of the block in its sequence, and how many there are.
    pub(crate) step0: u32,
    pub(crate) steps: u32,
    /// The same for reads.
    pub(crate) read0: u32,
    pub(crate) reads: u32,
    /// Key head and value head, of `heads`.
    pub(crate) h: u32,
    pub(crate) hv: u32,
    pub(crate) heads: u32,
    /// Index of its first chunk, and of its kept state.
    pub(crate) chunk: u32,
    pub(crate) kept: u32,
}

/// Members of [`Here`].
pub(crate) const HERE_WORDS: usize = 11;

#[cube]
impl Here {
    /// The block of cube `CUBE_POS`, which ends here if there is none: behind the last one, or where sequences are packed
    /// and no block begins with its chunk.
    pub(crate) fn find(
        table: &Array<u32>,
        sizes: Sizes,
        blocks: u32,
        #[comptime] bp: GradientsBlueprint,
    ) -> Self {
        let Sizes { tokens, sequences, heads, group } = sizes;
        let cube = CUBE_POS as u32;
        if CUBE_POS >= (blocks * heads) as usize {
            terminate!();
        }
        let n_h = comptime!(bp.spec.micro_steps as u32);
        let id = cube / heads;
        let hv = cube % heads;
        let n = if comptime!(bp.packed) {
            table[(4 * sequences + id) as usize]
        } else {
            id / (blocks / sequences)
        };
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
        let chunks = steps.div_ceil(comptime!(CHUNK as u32)) as usize;
        let first = first_kept(seq.first_chunk, n as usize, chunks, bp.packed);
        Here {
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
        }
    }

    /// Where micro-step `i` of the block lies among those of its row of the batch.
    pub(crate) fn step(&self, i: u32, #[comptime] n_h: usize) -> usize {
        (self.start * comptime!(n_h as u32) + self.step0 + i) as usize
    }

    /// The same for read `i`.
    pub(crate) fn read(&self, i: u32) -> usize {
        (self.start + self.read0 + i) as usize
    }

    /// The last read of the block, of its reads. It holds a micro-step, but perhaps no read: then the next one stands in.
    pub(crate) fn last_read(&self) -> u32 {
        select(self.reads > 0, self.reads, 1u32) - 1
    }

    /// Micro-steps behind the first chunk of the block.
    pub(crate) fn rest(&self) -> u32 {
        let chunk = comptime!(CHUNK as u32);
        select(self.steps > chunk, self.steps - chunk, 0u32)
    }

    /// The token of micro-step `i`.
    pub(crate) fn token(&self, i: u32, #[comptime] n_h: usize) -> usize {
        (self.start + (self.step0 + i) / comptime!(n_h as u32)) as usize
    }

    /// Leaves all of it in shared memory, for the end of the kernel: kept, it would take registers all along.
    pub(crate) fn leave(&self, to: &mut Region<u32>) {
        to[0] = self.row;
        to[1] = self.start;
        to[2] = self.step0;
        to[3] = self.steps;
        to[4] = self.read0;
        to[5] = self.reads;
        to[6] = self.h;
        to[7] = self.hv;
        to[8] = self.heads;
        to[9] = self.chunk;
        to[10] = self.kept;
    }

    /// The reverse of `leave`.
    pub(crate) fn left(from: &Region<u32>) -> Self {
        Here {
            row: from[0],
            start: from[1],
            step0: from[2],
            steps: from[3],
            read0: from[4],
            reads: from[5],
            h: from[6],
            hv: from[7],
            heads: from[8],
            chunk: from[9],
            kept: from[10],
        }
    }

    /// An index into what is laid out with `heads` items for each of `n`.
    pub(crate) fn head_of(&self, n: u32) -> usize {
        n as usize * self.heads as usize + self.hv as usize
    }
}
