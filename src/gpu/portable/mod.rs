//! The portable kernels: which blueprint, and the launches of each pass.

mod backward;
mod forward;

pub(super) use backward::backward;
pub(super) use forward::forward;

use cubecl::prelude::*;
use cubecl::server::Handle;
use delta_rule_kernels::Decay;
use delta_rule_kernels::portable::Blueprint;

use super::call::{Binds, Call, Table, array};
use super::tensors::Checked;
use crate::gpu::f32_type;
use crate::{Error, Result, StateLayout};

/// Units of a cube of `gradients`, whatever the chunk: inside every device's limit, and few enough that none spills.
const CHUNK_UNITS: usize = 128;

/// Units of a cube of `scan` and `sweep`, where there are value channels for as many. Few wait less for each other. But
/// Vulkan was seen to keep one cube on a multiprocessor, whatever it leaves free; and in `sweep` each of few units carries
/// more than it has registers for.
const FEW_UNITS: usize = 64;
const MANY_UNITS: usize = 128;

/// Shared memory of a cube at most: little enough for several on a multiprocessor, and enough for every K.
const SHARED_MEMORY: usize = 32 << 10;

/// With so many blocks of 32 keys and four value channels there is work for a large device when each unit takes one.
const FULL: usize = 10 << 10;

fn blueprint<R: Runtime>(client: &ComputeClient<R>, call: &Call<R>, backward: bool) -> Result<Blueprint> {
    let chunks: &[usize] = match call.options.chunk_size {
        None => &[32, 16],
        Some(16) => &[16],
        Some(32) => &[32],
        Some(got) => return Err(Error::ChunkSize { got, supported: "the GPU kernels take 16 or 32" }),
    };
    let spec = call.spec();
    let hardware = &client.properties().hardware;
    let cuda = hardware.num_streaming_multiprocessors.is_some();
    let forward = cuda && !backward;
    // States of short sequences move faster through more units that hold less each: measured on CUDA.
    let short = forward && call.is_short() && spec.decay != Decay::Channel;
    let units = if forward && !short { FEW_UNITS } else { MANY_UNITS };
    let lanes = call.problem.sequences() * call.problem.shape().value_heads;
    let mut base =
        Blueprint { spec, chunk: 0, unit_keys: 32, unit_values: 0, value_tile: 0, stage: 0, parts: 0 };
    let keys = base.padded_key_dim();
    let full = lanes * spec.value_dim.div_ceil(4) * keys / base.unit_keys >= FULL;
    if !full || short {
        base.unit_keys = 16;
    }
    // Only so far are there registers for four value channels and what is on its way.
    let wide = full && !backward && keys <= 2 * units && units.is_multiple_of(keys / 4);
    let sized = |chunk: usize, unit_values: usize, stage: usize| {
        let cols = units * base.unit_keys / keys;
        let value_tile = (cols * unit_values / 4 * 4).clamp(4, spec.value_dim.next_multiple_of(4));
        Blueprint { chunk, unit_values, value_tile, stage, parts: CHUNK_UNITS / chunk, ..base }
    };
    let values: &[usize] = if wide { &[4, 2] } else { &[2] };
    // Gates per channel are as many registers more on their way.
    let stages: &[usize] = if spec.decay == Decay::Channel { &[4] } else { &[8, 4] };
    let mut candidates = Vec::new();
    for &chunk in chunks {
        for &unit_values in values {
            candidates.extend(stages.iter().map(|&stage| sized(chunk, unit_values, stage)));
        }
    }
    let memory = |bp: &Blueprint| bp.scan_memory().max(if backward { bp.gradients_memory() } else { 0 });
    let most = hardware.max_shared_memory_size;
    let smallest = candidates[candidates.len() - 1];
    let fits = |bp: &Blueprint| {
        memory(bp) <= most.min(SHARED_MEMORY)
            && bp.chunk_units().max(bp.scan_units()) <= hardware.max_units_per_cube as usize
    };
    candidates.into_iter().find(fits).ok_or_else(|| Error::Device {
        what: format!(
            "K = {} needs at least {} bytes of shared memory, one cube has {most}",
            spec.key_dim,
            memory(&smallest),
        ),
    })
}

/// What every launch of a call binds.
struct Launches<'a, R: Runtime> {
    client: &'a ComputeClient<R>,
    call: &'a Call<'a, R>,
    bp: Blueprint,
    table: Table,
    table_handle: Handle,
    /// Elements of q, k, v, o and their gradients that are read at a time.
    vector: usize,
}

impl<R: Runtime> Binds<R> for Launches<'_, R> {
    fn call(&self) -> &Call<'_, R> {
        self.call
    }

    fn unused(&self) -> ArrayArg<R> {
        self.table()
    }
}

impl<'a, R: Runtime> Launches<'a, R> {
    /// `others` are what is read or written with the vectors of q, k and v.
    fn new(
        client: &'a ComputeClient<R>,
        call: &'a Call<'a, R>,
        others: &[&Checked<R>],
        backward: bool,
    ) -> Result<Self> {
        let bp = blueprint(client, call, backward)?;
        let table = Table::new(call.problem, bp.chunk)?;
        let data = [&call.q, &call.k, &call.v].into_iter().chain(others.iter().copied());
        let vector = if data.into_iter().all(|t| t.vectorizes(call.dtypes.data, 4)) { 4 } else { 1 };
        let table_handle = table.upload(client);
        Ok(Self { client, call, bp, table, table_handle, vector })
    }

    /// The same of v, o and their gradients, as units of `scan` and `sweep` hold only as many value channels.
    fn value_vector(&self) -> usize {
        self.vector.min(self.bp.unit_values)
    }

    /// The same of states, if their value channels lie side by side.
    fn state_vector(&self, states: &[Option<&Checked<R>>]) -> usize {
        let n = self.bp.unit_values;
        let side_by_side =
            |t: &&Checked<R>| t.vectorizes(f32_type(), n) && t.strides.last().is_none_or(|&s| s == 1);
        let value_last = self.call.options.state_layout == StateLayout::KeyFirst;
        if value_last && states.iter().flatten().all(side_by_side) { n } else { 1 }
    }

    fn table(&self) -> ArrayArg<R> {
        array(&self.table_handle, self.table.entries.len())
    }
}
