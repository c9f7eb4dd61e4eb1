//! The portable kernels: which blueprint, how many passes, and the launches of each.

mod backward;
mod forward;

pub(super) use backward::backward;
pub(super) use forward::forward;

use cubecl::prelude::*;
use cubecl::server::Handle;
use delta_rule_kernels::portable::Blueprint;
use delta_rule_kernels::portable::prepare::prepare;

use super::call::{Call, Table, array, cubes, strides, too_large};
use super::tensors::{Checked, binding_limit};
use super::{MIN_BUFFER, f32_type};
use crate::{Error, Result};

/// Scratch beyond this is worked off in several passes over the heads.
const MAX_SCRATCH: u64 = 1 << 30;

/// Units of a `prepare` cube, whatever the chunk: inside every device's limit, and few enough that none spills.
const PREPARE_UNITS: usize = 128;

/// What a product asks for together: WGPU's compilers take all the registers that they like, CUDA's spills rather
/// than give up a cube on the multiprocessor.
const CUDA_AHEAD: usize = 4;
const WGPU_AHEAD: usize = 16;

fn blueprint<R: Runtime>(client: &ComputeClient<R>, call: &Call<R>, backward: bool) -> Result<Blueprint> {
    let chunks: &[usize] = match call.options.chunk_size {
        None => &[32, 16],
        Some(16) => &[16],
        Some(32) => &[32],
        Some(got) => return Err(Error::ChunkSize { got, supported: "the GPU kernels take 16 or 32" }),
    };
    let spec = call.spec();
    let hardware = &client.properties().hardware;
    let ahead = if hardware.num_streaming_multiprocessors.is_some() { CUDA_AHEAD } else { WGPU_AHEAD };
    let base = Blueprint { spec, chunk: 0, value_tile: 0, parts: 0, ahead, backward };
    let fits = |bp: &Blueprint| {
        bp.shared_memory() <= hardware.max_shared_memory_size
            && bp.prepare_units().max(bp.scan_units()) <= hardware.max_units_per_cube as usize
    };
    let tiles = [32, 16].into_iter().filter(|&tile| tile == 16 || spec.value_dim > 16);
    let sized =
        |chunk: usize, value_tile| Blueprint { chunk, value_tile, parts: PREPARE_UNITS / chunk, ..base };
    let smallest = sized(16, 16);
    tiles
        .flat_map(|value_tile| chunks.iter().map(move |&chunk| sized(chunk, value_tile)))
        .find(fits)
        .ok_or_else(|| Error::Device {
            what: format!(
                "K = {} needs at least {} bytes of shared memory, one cube has {}",
                spec.key_dim,
                smallest.shared_memory(),
                hardware.max_shared_memory_size
            ),
        })
}

/// How the heads are cut into passes, each with scratch for its records; `multiple` of them stay together.
struct Passes {
    scratch_bytes: usize,
    value_heads: usize,
    heads_per_pass: usize,
}

impl Passes {
    fn new<R: Runtime>(
        client: &ComputeClient<R>,
        value_heads: usize,
        multiple: usize,
        chunks: usize,
        bp: &Blueprint,
    ) -> Result<Self> {
        let each = (multiple * chunks * bp.record_bytes()) as u64;
        let device_limit = binding_limit(client, f32_type());
        let limit = device_limit.min(MAX_SCRATCH.max(each));
        let parts = value_heads / multiple;
        let parts_per_pass = limit.checked_div(each).map_or(parts, |n| n as usize);
        if parts_per_pass == 0 {
            return Err(too_large(each, device_limit));
        }
        // Passes of equal size: a small last one would leave the device idle.
        let passes = parts.div_ceil(parts_per_pass.min(parts));
        let parts_per_pass = parts.div_ceil(passes);
        let heads_per_pass = multiple * parts_per_pass;
        // Few sizes, since the client keeps each: see `scratch`.
        let exact = each * parts_per_pass as u64;
        let scratch_bytes = (exact.next_power_of_two().min(device_limit) as usize).max(MIN_BUFFER);
        Ok(Self { scratch_bytes, value_heads, heads_per_pass })
    }

    /// `(first head, heads)` of every pass.
    fn iter(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let step = self.heads_per_pass;
        (0..self.value_heads).step_by(step).map(move |h| (h, step.min(self.value_heads - h)))
    }
}

/// What every launch of a call binds.
struct Launches<'a, R: Runtime> {
    client: &'a ComputeClient<R>,
    call: &'a Call<'a, R>,
    bp: Blueprint,
    table: Table,
    table_handle: Handle,
    passes: Passes,
    scratch: Handle,
    /// Elements of q, k, v, o and their gradients that are read at a time.
    vector: usize,
}

impl<'a, R: Runtime> Launches<'a, R> {
    /// `others` are what is read or written with the vectors of q, k and v; `multiple` heads stay in one pass.
    fn new(
        client: &'a ComputeClient<R>,
        call: &'a Call<'a, R>,
        others: &[&Checked<R>],
        bp: Blueprint,
        multiple: usize,
    ) -> Result<Self> {
        let table = Table::new(call.problem, bp.chunk)?;
        let passes = Passes::new(client, call.problem.shape().value_heads, multiple, table.chunks, &bp)?;
        let data = [&call.q, &call.k, &call.v].into_iter().chain(others.iter().copied());
        let vector = if data.into_iter().all(|t| t.vectorizes(call.dtypes.data, 4)) { 4 } else { 1 };
        let table_handle = table.upload(client);
        // The ordinary pools give a large buffer back to the driver between two calls, which costs more than the
        // kernels.
        let scratch = client
            .memory_persistent_allocation(passes.scratch_bytes, |bytes| client.empty(bytes))
            .map_err(|e| Error::Device { what: e.to_string() })?;
        Ok(Self { client, call, bp, table, table_handle, passes, scratch, vector })
    }

    fn table(&self) -> ArrayArg<R> {
        array(&self.table_handle, self.table.entries.len())
    }

    fn scratch(&self) -> ArrayArg<R> {
        array(&self.scratch, self.passes.scratch_bytes / 4)
    }

    /// A tensor of no elements has no buffer that could be bound, and one that is absent is never read.
    fn arg(&self, tensor: Option<&Checked<R>>) -> ArrayArg<R> {
        match tensor {
            Some(t) if t.elements > 0 => t.arg(),
            _ => self.table(),
        }
    }

    fn dtypes(&self) -> [cubecl::ir::StorageType; 3] {
        [self.call.dtypes.data, self.call.dtypes.beta, self.call.dtypes.gate]
    }

    /// Fills the records of a pass.
    fn prepare(&self, first_head: usize, heads: usize) {
        let call = self.call;
        // Safety: every index lies inside its buffer, as `checked` has found from shapes and strides.
        unsafe {
            prepare::launch_unchecked::<R>(
                self.client,
                cubes(self.client, self.table.chunks * heads),
                CubeDim::new_1d(self.bp.prepare_units() as u32),
                self.vector,
                self.arg(Some(&call.q)),
                self.arg(Some(&call.k)),
                self.arg(Some(&call.beta)),
                self.arg(call.g.as_ref()),
                self.arg(call.a_log.as_ref()),
                self.arg(call.dt_bias.as_ref()),
                self.table(),
                self.scratch(),
                self.scratch(),
                strides(Some(&call.q)),
                strides(Some(&call.k)),
                strides(Some(&call.beta)),
                strides(call.g.as_ref()),
                call.problem.sequences() as u32,
                self.table.chunks as u32,
                first_head as u32,
                heads as u32,
                call.group(),
                call.scale(),
                call.lower_bound(),
                self.bp,
                self.dtypes(),
            );
        }
    }
}
