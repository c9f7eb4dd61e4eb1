//! Long sequences of few heads: whether they are cut into segments, and into which.
//!
//! The transfer of every inner segment is taken, the states between segments are combined, then all segments run side by
//! side. That is more than twice the work, and pays where whole sequences leave most of the device idle. Shapes decide;
//! the gates do not.

use delta_rule_kernels::mma::{Blueprint, CHUNK, Pass, combine};
use delta_rule_kernels::{Decay, Spec};

use crate::Problem;

/// How the sequences of a call are cut.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Split {
    /// Chunks of every segment but the last of a sequence. Such a segment holds whole tokens.
    pub(super) segment: usize,
    /// Segments of all sequences.
    pub(super) count: usize,
    /// The pass over inner segments.
    pub(super) transfer: Blueprint,
    /// The pass over all segments.
    pub(super) segments: Blueprint,
}

// Microseconds on an H200, from the table and the experiments in docs/performance.md; K = 128, and what depends on it
// in proportion.

/// A cube takes a chunk in this time and that of its rows of $S^T$: 32 rows 0.8, 64 rows 1.05, 128 rows 1.6 together.
const CHUNK_TIME: f64 = 0.55;
const ROW_TIME: f64 = 0.008;
/// Of the products of a chunk, those that are not reads.
const WITHOUT_READS: f64 = 0.65;
/// All multiprocessors prepare a chunk of one head: one gate per head or none, and gates per channel.
const PREPARE_TIME: [f64; 2] = [0.0073, 0.029];
/// Not measured: a step of `combine`, 64 KB of A for a cube, and two launches and a table more.
const COMBINE_TIME: f64 = 1.2;
const LAUNCH_TIME: f64 = 20.0;

/// The longest sequence is cut into one of these numbers of segments.
const SEGMENTS: [usize; 16] = [2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 28, 32, 40, 48, 64];
/// A split must be predicted to take at most this part of the time.
const WORTH: f64 = 0.8;
/// Bytes of scratch per micro-step and value head that a split may take, records included.
const MAX_SCRATCH: usize = 1024;

/// The fastest split in blueprints of `transfers` and `segments`, or nothing where `whole` sequences are about as fast:
/// the longer of the longest chain of chunks and the work of a multiprocessor, once for each launch, and for a split in
/// full rounds of cubes.
pub(super) fn split(
    problem: &Problem,
    whole: &Blueprint,
    transfers: &[Blueprint],
    segments: &[Blueprint],
    multiprocessors: usize,
) -> Option<Split> {
    let spec = whole.spec;
    let heads = problem.shape().value_heads;
    let lengths: Vec<usize> =
        (0..problem.sequences()).map(|n| chunks(problem.sequence(n).len * spec.micro_steps)).collect();
    let (longest, total) = (*lengths.iter().max()?, lengths.iter().sum::<usize>());
    let per_multiprocessor = |work: usize| work as f64 / multiprocessors as f64;
    let by_channel = spec.decay == Decay::Channel;
    let prepare = (total * heads * spec.key_dim) as f64 / 128.0 * PREPARE_TIME[by_channel as usize];
    let whole_time = (longest as f64).max(per_multiprocessor(total * heads * whole.value_tiles()))
        * chunk_time(whole)
        + if whole.prepared { prepare } else { 0.0 };

    let candidate = |parts: usize| -> Option<(f64, Split)> {
        let segment = longest.div_ceil(parts).next_multiple_of(alignment(spec.micro_steps));
        let inner: usize = lengths.iter().map(|&n| inner_segments(n, segment)).sum();
        let all = inner + (total - inner * segment).div_ceil(segment);
        let launch = |bp: &Blueprint, n: usize| {
            per_multiprocessor(n * heads * bp.value_tiles()).ceil() * segment as f64 * chunk_time(bp)
        };
        let fastest = |bps: &[Blueprint], n| {
            let times = bps.iter().map(|bp| (launch(bp, n), *bp));
            times.min_by(|a, b| a.0.total_cmp(&b.0))
        };
        let (transfer_time, transfer) = fastest(transfers, inner)?;
        let (segments_time, segments) = fastest(segments, all)?;
        let steps = inner_segments(longest, segment) as f64;
        let combine_time =
            steps.max(per_multiprocessor(inner * heads * combine::tiles(&spec))) * COMBINE_TIME;
        let time = prepare + transfer_time + combine_time + segments_time + LAUNCH_TIME;
        let (units, floats) = segments.record();
        let records = total * (16 * units + 4 * floats);
        let scratch = records + slot_bytes(&spec) * (inner + lengths.len());
        let fits = scratch <= MAX_SCRATCH * problem.steps() * problem.shape().batch;
        let split = Split { segment, count: inner + lengths.len(), transfer, segments };
        (inner > 0 && fits && time <= WORTH * whole_time).then_some((time, split))
    };
    let best = SEGMENTS.into_iter().filter_map(candidate).min_by(|a, b| a.0.total_cmp(&b.0));
    best.map(|(_, split)| split)
}

fn chunks(steps: usize) -> usize {
    steps.div_ceil(CHUNK)
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

fn chunk_time(bp: &Blueprint) -> f64 {
    let share = if bp.pass == Pass::Transfer { WITHOUT_READS } else { 1.0 };
    CHUNK_TIME + ROW_TIME * share * (bp.value_tile * bp.spec.key_dim) as f64 / 128.0
}
