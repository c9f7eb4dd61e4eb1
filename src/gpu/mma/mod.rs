//! The tensor-core kernels: when they apply, and what the forward and the backward share.

mod backward;
mod forward;

pub(super) use backward::{backward, plan_backward};
pub(super) use forward::{launch, plan};

use cubecl::ir::StorageType;
use cubecl::ir::features::MmaConfig;
use cubecl::prelude::*;
use cubecl::server::Handle;
use delta_rule_kernels::mma::arguments::{RecordsLaunch, SizesLaunch};
use delta_rule_kernels::mma::prepare::{prepare, prepare_by_channel};
use delta_rule_kernels::mma::{Blueprint, CHUNK, Pass};
use delta_rule_kernels::{self as kernels, Spec};

use super::call::{Binds, Call, Table, array, cubes};
use super::tensors::Checked;
use super::{MIN_BUFFER, f32_type};
use crate::{Decay, Error, Result};

/// Whether the instructions, the shapes and the layout of `tensors` suit the tensor-core kernels. Not so: f32 data, a
/// device without the instructions, head dimensions that are no multiples of 16, rows that cannot be read 16 bytes at a
/// time (gates per channel: four at a time), or another chunk size.
fn applies<R: Runtime>(client: &ComputeClient<R>, call: &Call<R>, tensors: &[&Checked<R>]) -> bool {
    let spec = call.spec();
    let own = [&call.q, &call.k, &call.v];
    has_instructions(client, call.dtypes.data)
        && call.options.chunk_size.is_none_or(|c| c == CHUNK)
        && spec.key_dim.is_multiple_of(16)
        && spec.value_dim.is_multiple_of(16)
        && (call.problem.rule().decay != Decay::Channel || spec.micro_steps == 1)
        && own.iter().chain(tensors).all(|t| t.vectorizes(call.dtypes.data, 8))
        && (spec.decay != kernels::Decay::Channel
            || call.g.as_ref().is_none_or(|g| g.vectorizes(call.dtypes.gate, 4)))
}

/// Whether the device multiplies 16 x 8 x 16 tiles of `dtype` into f32, and loads and stores them by matrices.
fn has_instructions<R: Runtime>(client: &ComputeClient<R>, dtype: StorageType) -> bool {
    let features = client.features();
    let instruction = MmaConfig { a_type: dtype, b_type: dtype, cd_type: f32_type(), m: 16, n: 8, k: 16 };
    features.matmul.mma.contains(&instruction)
        && features.matmul.ldmatrix.contains(&dtype)
        && features.matmul.stmatrix.contains(&dtype)
}

/// Blueprints of one pass, from wide tiles to narrow ones.
fn blueprints(spec: Spec, pass: Pass, packed: bool) -> impl Iterator<Item = Blueprint> {
    let has_initial_state = match pass {
        Pass::Segments => true,
        _ => spec.has_initial_state,
    };
    let spec = Spec { has_initial_state, ..spec };
    tiles(spec.key_dim, spec.value_dim).map(move |(value_tile, held)| {
        // With narrow tiles the scan is a chain of short steps: nothing else may be in its way, and two
        // groups of planes have time to fetch. Not those of segments: `ptxas` takes too few registers for such cubes and spills.
        let chain = spec.key_dim <= 128 && value_tile <= 32 && pass != Pass::Segments;
        let groups = if chain { 2 } else { 1 };
        let prepared =
            value_tile < spec.value_dim || spec.decay == kernels::Decay::Channel || pass != Pass::Whole;
        Blueprint { spec, value_tile, held, groups, packed, prepared, pass }
    })
}

/// `(value_tile, held)` from wide to narrow, at most four scanning planes each.
fn tiles(key_dim: usize, value_dim: usize) -> impl Iterator<Item = (usize, usize)> {
    // Few values make a chain (`blueprints`), and with two groups of planes a unit has no registers for two tiles.
    let wide = if key_dim <= 128 && value_dim > 32 { 2 } else { 1 };
    let all = [(128, 2), (64, 2), (64, 1), (32, 1), (16, 1)];
    let mut kept: Vec<(usize, usize)> = all
        .into_iter()
        .filter(|&(_, held)| held <= wide)
        .map(|(tile, held)| (tile.min(value_dim.next_multiple_of(16 * held)), held))
        .collect();
    kept.dedup();
    kept.into_iter()
}

/// The widest of `tiles`; narrower ones when it would leave multiprocessors idle.
fn widest_that_fills(
    mut tiles: impl Iterator<Item = Blueprint>,
    heads: usize,
    multiprocessors: usize,
) -> Option<Blueprint> {
    let mut widest = tiles.next()?;
    for bp in tiles {
        if heads * widest.value_tiles() * 4 >= multiprocessors * 3 {
            break;
        }
        widest = bp;
    }
    Some(widest)
}

/// Chunks of all sequences: each rounds up to whole ones.
fn most_chunks<R: Runtime>(call: &Call<R>) -> usize {
    let problem = call.problem;
    (problem.shape().batch * problem.steps()).div_ceil(CHUNK) + problem.sequences()
}

/// Whether a buffer of that size may be had.
fn fits_page<R: Runtime>(client: &ComputeClient<R>, bytes: usize) -> bool {
    rounded(bytes) as u64 <= client.properties().memory.max_page_size
}

/// Few sizes, since the client keeps each buffer: at most an eighth more than asked for.
fn rounded(bytes: usize) -> usize {
    bytes.next_multiple_of((bytes.next_power_of_two() / 16).max(1))
}

/// Scratch that the client keeps for the next call.
fn scratch<R: Runtime>(client: &ComputeClient<R>, bytes: usize) -> Result<Handle> {
    client
        .memory_persistent_allocation(rounded(bytes).max(MIN_BUFFER), |bytes| client.empty(bytes))
        .map_err(|e| Error::Device { what: e.to_string() })
}

/// What the launches of a call share.
struct Launches<'a, R: Runtime> {
    client: &'a ComputeClient<R>,
    call: &'a Call<'a, R>,
    /// Absent for rows of a batch.
    table: Option<(Handle, usize)>,
    segments: usize,
    chunks: usize,
    /// Bound where nothing is read.
    unused: &'a Checked<R>,
}

impl<R: Runtime> Binds<R> for Launches<'_, R> {
    fn call(&self) -> &Call<'_, R> {
        self.call
    }

    fn unused(&self) -> ArrayArg<R> {
        self.unused.arg()
    }
}

impl<'a, R: Runtime> Launches<'a, R> {
    fn new(
        client: &'a ComputeClient<R>,
        call: &'a Call<'a, R>,
        table: Option<Table>,
        unused: &'a Checked<R>,
    ) -> Self {
        let problem = call.problem;
        let whole_rows = (problem.sequences(), problem.sequences() * problem.steps().div_ceil(CHUNK));
        let (segments, chunks) = table.as_ref().map_or(whole_rows, |table| (table.segments, table.chunks));
        let table = table.map(|table| (table.upload(client), table.entries.len()));
        Self { client, call, table, segments, chunks, unused }
    }

    fn value_heads(&self) -> usize {
        self.call.problem.shape().value_heads
    }

    fn table(&self) -> ArrayArg<R> {
        self.table.as_ref().map_or_else(|| self.unused.arg(), |(handle, len)| array(handle, *len))
    }

    fn sizes(&self, sequences: usize) -> SizesLaunch<R> {
        let tokens = self.call.problem.shape().tokens;
        SizesLaunch::new(tokens as u32, sequences as u32, self.value_heads() as u32, self.call.group())
    }

    /// Fills the records of all chunks. `bp` is that of the scan.
    fn prepare(&self, records: &Records, bp: Blueprint) {
        if records.count == 0 {
            return;
        }
        let call = self.call;
        // It does not depend on how the values are dealt.
        let bp = Blueprint { value_tile: 16, held: 1, groups: 1, ..bp.recorded() };
        // Both kernels take the same, but for the type of g.
        macro_rules! launch {
            ($kernel:ident) => {
                $kernel::launch_unchecked::<R>(
                    self.client,
                    cubes(self.client, records.count.div_ceil(bp.prepared_chunks())),
                    CubeDim::new_1d(bp.prepare_units() as u32),
                    self.read(Some(&call.q)),
                    self.read(Some(&call.k)),
                    self.gating(),
                    self.table(),
                    records.arg(),
                    self.sizes(self.segments),
                    self.chunks as u32,
                    call.scale(),
                    bp,
                    self.dtypes(),
                )
            };
        }
        // Safety: every index lies inside its buffer, as `checked` has found from shapes and strides.
        unsafe {
            match bp.spec.decay {
                kernels::Decay::Channel => launch!(prepare_by_channel),
                _ => launch!(prepare),
            }
        }
    }
}

/// What `prepare` leaves of every chunk and head.
struct Records {
    count: usize,
    units: usize,
    floats: usize,
    blocks: Handle,
    factors: Handle,
}

impl Records {
    /// Room for `count` records, which may be none.
    fn new<R: Runtime>(client: &ComputeClient<R>, bp: &Blueprint, count: usize) -> Result<Self> {
        let (units, floats) = bp.record();
        let (blocks, factors) = (scratch(client, 16 * units * count)?, scratch(client, 4 * floats * count)?);
        Ok(Self { count, units, floats, blocks, factors })
    }

    /// Whether they fit into one buffer each.
    fn fit<R: Runtime>(client: &ComputeClient<R>, bp: &Blueprint, count: usize) -> bool {
        let (units, floats) = bp.record();
        fits_page(client, count * (16 * units).max(4 * floats))
    }

    fn arg<F: Float, R: Runtime>(&self) -> RecordsLaunch<F, R> {
        RecordsLaunch::new(array(&self.blocks, (8 * self.units * self.count).max(8)), self.factors())
    }

    fn factors<R: Runtime>(&self) -> ArrayArg<R> {
        array(&self.factors, (self.floats * self.count).max(4))
    }
}
