//! The portable kernels: which blueprint, how many passes, and the two launches of each.

use cubecl::prelude::*;
use cubecl::server::Handle;
use delta_rule_kernels::portable::Blueprint;
use delta_rule_kernels::portable::prepare::prepare;
use delta_rule_kernels::portable::scan::scan;

use super::call::{Call, Table, array, cubes, strides, too_large};
use super::tensors::{Checked, binding_limit};
use super::{MIN_BUFFER, f32_type};
use crate::{Error, Result};

/// Scratch beyond this is worked off in several passes over the heads.
const MAX_SCRATCH: u64 = 1 << 30;

/// Units of a `prepare` cube, whatever the chunk: inside every device's limit, and few enough that none spills.
const PREPARE_UNITS: usize = 128;

/// Units per multiprocessor that keep it busy. Below, units take fewer rows each, so that there are more of
/// them; devices that do not tell how many multiprocessors they have (WGPU) run few cubes on each, and want
/// those as wide as they can be.
const BUSY_UNITS: usize = 256;

fn blueprint<R: Runtime>(client: &ComputeClient<R>, call: &Call<R>) -> Result<Blueprint> {
    let chunks: &[usize] = match call.options.chunk_size {
        None => &[32, 16],
        Some(16) => &[16],
        Some(32) => &[32],
        Some(got) => return Err(Error::ChunkSize { got, supported: "the GPU kernels take 16 or 32" }),
    };
    let spec = call.spec();
    let base = Blueprint { spec, chunk: 0, value_tile: 0, unit_rows: 4, parts: 0 };
    let hardware = &client.properties().hardware;
    let fits = |bp: &Blueprint| {
        bp.shared_memory() <= hardware.max_shared_memory_size
            && bp.prepare_units().max(bp.scan_units()) <= hardware.max_units_per_cube as usize
    };
    let tiles = [32, 16].into_iter().filter(|&tile| tile == 16 || spec.value_dim > 16);
    let sized =
        |chunk: usize, value_tile| Blueprint { chunk, value_tile, parts: PREPARE_UNITS / chunk, ..base };
    let smallest = sized(16, 16);
    let bp = tiles
        .flat_map(|value_tile| chunks.iter().map(move |&chunk| sized(chunk, value_tile)))
        .find(fits)
        .ok_or_else(|| Error::Device {
            what: format!(
                "K = {} needs at least {} bytes of shared memory, one cube has {}",
                spec.key_dim,
                smallest.shared_memory(),
                hardware.max_shared_memory_size
            ),
        })?;
    let filled = |bp: &Blueprint| match hardware.num_streaming_multiprocessors {
        Some(n) => {
            call.problem.sequences() * call.problem.shape().value_heads * bp.value_tiles() * bp.scan_units()
                >= n as usize * BUSY_UNITS
        }
        None => false,
    };
    let rows = [4, 2].map(|unit_rows| Blueprint { unit_rows, ..bp });
    Ok(rows.into_iter().find(filled).unwrap_or(Blueprint { unit_rows: 1, ..bp }))
}

/// How the heads are cut into passes, each with scratch for its records.
struct Passes {
    scratch_bytes: usize,
    value_heads: usize,
    heads_per_pass: usize,
}

impl Passes {
    fn new<R: Runtime>(
        client: &ComputeClient<R>,
        value_heads: usize,
        chunks: usize,
        bp: &Blueprint,
    ) -> Result<Self> {
        let per_head = (chunks * bp.record_bytes()) as u64;
        let device_limit = binding_limit(client, f32_type());
        let limit = device_limit.min(MAX_SCRATCH.max(per_head));
        let heads_per_pass = limit.checked_div(per_head).map_or(value_heads, |heads| heads as usize);
        if heads_per_pass == 0 {
            return Err(too_large(per_head, device_limit));
        }
        // Passes of equal size: a small last one would leave the device idle.
        let passes = value_heads.div_ceil(heads_per_pass.min(value_heads));
        let heads_per_pass = value_heads.div_ceil(passes);
        // Few sizes, since the client keeps each: see `launch`.
        let exact = per_head * heads_per_pass as u64;
        let scratch_bytes = (exact.next_power_of_two().min(device_limit) as usize).max(MIN_BUFFER);
        Ok(Self { scratch_bytes, value_heads, heads_per_pass })
    }

    /// `(first head, heads)` of every pass.
    fn iter(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let step = self.heads_per_pass;
        (0..self.value_heads).step_by(step).map(move |h| (h, step.min(self.value_heads - h)))
    }
}

/// Launches both kernels for every pass over the heads.
pub(super) fn launch<R: Runtime>(client: &ComputeClient<R>, call: &Call<R>) -> Result<()> {
    let bp = blueprint(client, call)?;
    let problem = call.problem;
    let table = Table::new(problem, bp.chunk)?;
    let passes = Passes::new(client, problem.shape().value_heads, table.chunks, &bp)?;
    let data = [&call.q, &call.k, &call.v, &call.o];
    let vector = if data.iter().all(|t| t.vectorizes(call.dtypes.data, 4)) { 4 } else { 1 };
    let table_handle = table.upload(client);
    // The ordinary pools give a large buffer back to the driver between two calls, which costs more than the
    // kernels.
    let scratch: Handle = client
        .memory_persistent_allocation(passes.scratch_bytes, |bytes| client.empty(bytes))
        .map_err(|e| Error::Device { what: e.to_string() })?;
    let table_arg = || array(&table_handle, table.entries.len());
    // A tensor of no elements has no buffer that could be bound, and one that is absent is never read.
    let arg = |tensor: Option<&Checked<R>>| match tensor {
        Some(t) if t.elements > 0 => t.arg(),
        _ => table_arg(),
    };

    for (first_head, heads) in passes.iter() {
        let scratch_arg = || array(&scratch, passes.scratch_bytes / 4);
        if table.chunks > 0 {
            // Safety: every index lies inside its buffer, as `checked` has found from shapes and strides.
            unsafe {
                prepare::launch_unchecked::<R>(
                    client,
                    cubes(client, table.chunks * heads),
                    CubeDim::new_1d(bp.prepare_units() as u32),
                    vector,
                    arg(Some(&call.q)),
                    arg(Some(&call.k)),
                    arg(Some(&call.beta)),
                    arg(call.g.as_ref()),
                    arg(call.a_log.as_ref()),
                    arg(call.dt_bias.as_ref()),
                    table_arg(),
                    scratch_arg(),
                    scratch_arg(),
                    strides(Some(&call.q)),
                    strides(Some(&call.k)),
                    strides(Some(&call.beta)),
                    strides(call.g.as_ref()),
                    problem.sequences() as u32,
                    table.chunks as u32,
                    first_head as u32,
                    heads as u32,
                    call.group(),
                    call.scale(),
                    call.lower_bound(),
                    bp,
                    [call.dtypes.data, call.dtypes.beta, call.dtypes.gate],
                );
            }
        }
        // Safety: as above.
        unsafe {
            scan::launch_unchecked::<R>(
                client,
                cubes(client, problem.sequences() * heads * bp.value_tiles()),
                CubeDim::new_1d(bp.scan_units() as u32),
                vector,
                arg(Some(&call.v)),
                scratch_arg(),
                scratch_arg(),
                arg(call.initial_state.as_ref()),
                table_arg(),
                call.o_arg(client),
                call.final_state.arg(),
                strides(Some(&call.v)),
                strides(Some(&call.o)),
                call.state_strides(call.initial_state.as_ref()),
                call.state_strides(Some(&call.final_state)),
                problem.sequences() as u32,
                first_head as u32,
                heads as u32,
                bp,
                call.dtypes.data,
            );
        }
    }
    Ok(())
}
