//! Long sequences of few heads: whether they are cut into segments, and into which.
//!
//! The transfer of every inner segment is taken, the states between segments are combined, then all segments run side by
//! side. That is more than twice the work, and pays where whole sequences leave most of the device idle. Shapes decide;
//! the gates do not.

use delta_rule_kernels::mma::{Blueprint, CHUNK, combine};
use delta_rule_kernels::{Decay, Spec};

use crate::Problem;

/// How the sequences of a call are cut.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Split {
    /// Chunks of every segment but the last of a sequence. Such a segment holds whole tokens.
    pub(super) segment: usize,
    /// Segments of all sequences.
    pub(super) count: usize,
    /// The kernel of both passes.
    pub(super) scan: Blueprint,
}

// Microseconds on an H200 at K = 128, from docs/performance.md. What depends on K is taken to be in proportion.

/// A prepared chunk costs a cube this, and its rows of $S^T$ so much each: measured were 0.74 for 16 rows, 0.88 for 32,
/// 1.05 for 64 and 1.56 for 128. A multiprocessor runs one cube at a time.
const CHUNK_TIME: f64 = 0.62;
const ROW_TIME: f64 = 0.0073;
/// The instructions per row that are left without reads: 35 of 54. Not measured.
const WITHOUT_READS: f64 = 0.65;
/// All multiprocessors prepare a chunk of one head: one gate per head or none, and gates per channel.
const PREPARE_TIME: [f64; 2] = [0.0073, 0.029];
/// As guessed at first: a step of `combine`, and two launches and a table more. At K = 128 a step takes 2.7.
const COMBINE_TIME: f64 = 1.2;
const LAUNCH_TIME: f64 = 20.0;

/// The longest sequence is cut into one of these numbers of segments.
const SEGMENTS: [usize; 16] = [2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 28, 32, 40, 48, 64];
/// A split must be predicted to take at most this part of the time.
const WORTH: f64 = 0.8;
/// Bytes of scratch per micro-step and value head that a split may take, records included.
const MAX_SCRATCH: usize = 1024;

/// The fastest split in one of the `blueprints`, or nothing where `whole` sequences are about as fast.
pub(super) fn split(
    problem: &Problem,
    whole: &Blueprint,
    blueprints: &[Blueprint],
    multiprocessors: usize,
) -> Option<Split> {
    let chunks = |n| (problem.sequence(n).len * whole.spec.micro_steps).div_ceil(CHUNK);
    let work = Work {
        spec: whole.spec,
        heads: problem.shape().value_heads,
        multiprocessors,
        sequences: (0..problem.sequences()).map(chunks).collect(),
    };
    let enough = WORTH * work.whole_time(whole);
    let max_scratch = MAX_SCRATCH * problem.shape().batch * problem.steps();
    let timed = SEGMENTS.into_iter().filter_map(|parts| work.split_time(parts, blueprints));
    timed
        .filter(|(time, split)| *time <= enough && work.scratch(split) <= max_scratch)
        .min_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, split)| split)
}

/// The sequences of a call, by their chunks, and who shares them.
///
/// A launch takes as long as its longest chain of chunks, or as the work that each multiprocessor gets. In doubt whole
/// sequences win: their work is dealt out evenly, that of a split in full rounds of cubes.
struct Work {
    spec: Spec,
    heads: usize,
    multiprocessors: usize,
    sequences: Vec<usize>,
}

impl Work {
    fn longest(&self) -> usize {
        self.sequences.iter().copied().max().unwrap_or(0)
    }

    fn total(&self) -> usize {
        self.sequences.iter().sum()
    }

    /// What each multiprocessor gets of `n` things for every head.
    fn share(&self, n: usize) -> f64 {
        (n * self.heads) as f64 / self.multiprocessors as f64
    }

    fn prepare_time(&self) -> f64 {
        let time = PREPARE_TIME[(self.spec.decay == Decay::Channel) as usize];
        (self.total() * self.heads * self.spec.key_dim) as f64 / 128.0 * time
    }

    fn whole_time(&self, bp: &Blueprint) -> f64 {
        let chunks = self.share(self.total() * bp.value_tiles()).max(self.longest() as f64);
        chunks * chunk_time(bp, 1.0) + if bp.prepared { self.prepare_time() } else { 0.0 }
    }

    /// Cuts the longest sequence into at most `parts`, and takes the fastest blueprint.
    fn split_time(&self, parts: usize, blueprints: &[Blueprint]) -> Option<(f64, Split)> {
        let longest = self.longest();
        let segment = longest.div_ceil(parts).max(1).next_multiple_of(alignment(self.spec.micro_steps));
        let inner: usize = self.sequences.iter().map(|&n| inner_segments(n, segment)).sum();
        if inner == 0 {
            return None;
        }
        let last = (self.total() - inner * segment).div_ceil(segment);
        let rounds = |cubes: usize| self.share(cubes).ceil() * segment as f64;
        let scan_time = |bp: &Blueprint| {
            rounds(inner * bp.transfer_tiles()) * chunk_time(bp, WITHOUT_READS)
                + rounds((inner + last) * bp.value_tiles()) * chunk_time(bp, 1.0)
        };
        let timed = blueprints.iter().map(|bp| (scan_time(bp), *bp));
        let (scan_time, scan) = timed.min_by(|a, b| a.0.total_cmp(&b.0))?;
        let steps =
            self.share(inner * combine::tiles(&self.spec)).max(inner_segments(longest, segment) as f64);
        let time = self.prepare_time() + scan_time + steps * COMBINE_TIME + LAUNCH_TIME;
        Some((time, Split { segment, count: inner + self.sequences.len(), scan }))
    }

    /// Bytes of scratch for each head.
    fn scratch(&self, split: &Split) -> usize {
        let (units, floats) = split.scan.record();
        self.total() * (16 * units + 4 * floats) + split.count * slot_bytes(&self.spec)
    }
}

/// Segments of a sequence of `chunks` chunks that have another one behind them.
pub(super) fn inner_segments(chunks: usize, segment: usize) -> usize {
    chunks.div_ceil(segment).saturating_sub(1)
}

/// Chunks after which a token ends, with `micro_steps` per token.
fn alignment(micro_steps: usize) -> usize {
    let twos = micro_steps.trailing_zeros().min(CHUNK.trailing_zeros());
    micro_steps >> twos
}

/// What is kept of one segment and head: V rows of $N^T$ or $S^T$, and K rows of A.
pub(super) fn slot_bytes(spec: &Spec) -> usize {
    4 * (spec.value_dim + spec.key_dim) * spec.key_dim
}

fn chunk_time(bp: &Blueprint, share: f64) -> f64 {
    CHUNK_TIME + ROW_TIME * share * (bp.value_tile * bp.spec.key_dim) as f64 / 128.0
}
