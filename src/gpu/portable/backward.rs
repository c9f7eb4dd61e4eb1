//! Backward: four launches per pass, and one more where the gate is a formula.

use std::ops::Deref;

use cubecl::prelude::*;
use cubecl::server::Handle;
use delta_rule_kernels::portable::collect::{collect, collect_constants};
use delta_rule_kernels::portable::gradients::gradients;
use delta_rule_kernels::portable::sweep::sweep;

use super::Launches;
use crate::gpu::backward::{Adjoint, Destinations};
use crate::gpu::call::{Binds, Call, array, cubes, strided, too_large, written, written_rows};
use crate::gpu::tensors::{Checked, binding_limit};
use crate::gpu::{MIN_BUFFER, f32_type};
use crate::{Error, Result};

/// Scratch beyond this is worked off in several passes over the heads.
const MAX_SCRATCH: u64 = 2 << 30;

/// `sweep`, `gradients`, `collect`.
pub(in crate::gpu) fn backward<R: Runtime>(
    client: &ComputeClient<R>,
    call: &Call<R>,
    from: &Adjoint<R>,
    to: &Destinations<R>,
) -> Result<()> {
    let launches = Launches::new(client, call, &[&from.o, &to.q, &to.k, &to.v], true)?;
    let passes = Passes::new(&launches)?;
    // The ordinary pools give a large buffer back to the driver between two calls, which costs more than the kernels.
    let scratch = client
        .memory_persistent_allocation(passes.scratch_bytes, |bytes| client.empty(bytes))
        .map_err(|e| Error::Device { what: e.to_string() })?;
    let on = WithRecords { launches, scratch, scratch_len: passes.scratch_bytes / 4 };
    for (first_head, heads) in passes.iter() {
        on.sweep(from, to, first_head, heads);
        if on.table.chunks > 0 {
            on.gradients(from, to, first_head, heads);
            on.collect(&call.k, &to.k, false, first_head, heads);
            on.collect(&call.q, &to.q, true, first_head, heads);
        }
        on.collect_constants(to, first_head, heads);
    }
    Ok(())
}

/// How the heads are cut into passes, each with scratch for its records; those of a group stay together.
struct Passes {
    scratch_bytes: usize,
    value_heads: usize,
    heads_per_pass: usize,
}

impl Passes {
    fn new<R: Runtime>(on: &Launches<R>) -> Result<Self> {
        let value_heads = on.call.problem.shape().value_heads;
        let multiple = on.call.group() as usize;
        let each = (multiple * on.table.chunks * on.bp.record_bytes()) as u64;
        let device_limit = binding_limit(on.client, f32_type());
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

/// What every launch of a backward binds.
struct WithRecords<'a, R: Runtime> {
    launches: Launches<'a, R>,
    scratch: Handle,
    scratch_len: usize,
}

impl<'a, R: Runtime> Deref for WithRecords<'a, R> {
    type Target = Launches<'a, R>;

    fn deref(&self) -> &Self::Target {
        &self.launches
    }
}

impl<R: Runtime> WithRecords<'_, R> {
    fn scratch(&self) -> ArrayArg<R> {
        array(&self.scratch, self.scratch_len)
    }

    fn sweep(&self, from: &Adjoint<R>, to: &Destinations<R>, first_head: usize, heads: usize) {
        let (client, call, bp) = (self.client, self.call, self.bp);
        let sequences = call.problem.sequences();
        let states = [call.initial_state.as_ref(), from.final_state.as_ref(), Some(&to.initial_state)];
        // Safety: every index lies inside its buffer, as `checked` has found from shapes and strides.
        unsafe {
            sweep::launch_unchecked::<R>(
                client,
                cubes(client, 2 * sequences * heads * bp.value_tiles()),
                CubeDim::new_1d(bp.scan_units() as u32),
                self.vector,
                self.value_vector(),
                bp.unit_values,
                self.state_vector(&states),
                self.read(Some(&call.q)),
                self.read(Some(&call.k)),
                self.read(Some(&call.v)),
                self.gating(),
                self.read(Some(&from.o)),
                self.scratch(),
                self.states(call.initial_state.as_ref()),
                self.states(from.final_state.as_ref()),
                self.table(),
                written_rows(client, &to.v),
                call.states(to.initial_state.arg(), Some(&to.initial_state)),
                sequences as u32,
                first_head as u32,
                heads as u32,
                call.group(),
                call.scale(),
                from.final_state.is_some(),
                bp,
                self.dtypes(),
            );
        }
    }

    fn gradients(&self, from: &Adjoint<R>, to: &Destinations<R>, first_head: usize, heads: usize) {
        let (client, call, bp) = (self.client, self.call, self.bp);
        let d_g = written(client, to.g.as_ref().unwrap_or(&to.beta));
        // Safety: as above.
        unsafe {
            gradients::launch_unchecked::<R>(
                client,
                cubes(client, self.table.chunks * heads),
                CubeDim::new_1d(bp.chunk_units() as u32),
                self.vector,
                self.read(Some(&call.q)),
                self.read(Some(&call.k)),
                self.gating(),
                self.read(Some(&from.o)),
                self.table(),
                self.scratch(),
                self.scratch(),
                written_rows(client, &to.beta),
                strided(d_g, to.g.as_ref()),
                call.problem.sequences() as u32,
                self.table.chunks as u32,
                first_head as u32,
                heads as u32,
                call.group(),
                call.scale(),
                bp,
                self.dtypes(),
            );
        }
    }

    /// The gradient of k, or of q.
    fn collect(&self, x: &Checked<R>, dx: &Checked<R>, reads: bool, first_head: usize, heads: usize) {
        let (client, call, bp) = (self.client, self.call, self.bp);
        let group = call.group() as usize;
        // Safety: as above.
        unsafe {
            collect::launch_unchecked::<R>(
                client,
                cubes(client, self.table.chunks * heads / group),
                CubeDim::new_1d(bp.chunk_units() as u32),
                self.vector,
                self.read(Some(x)),
                self.table(),
                self.scratch(),
                written_rows(client, dx),
                call.problem.sequences() as u32,
                self.table.chunks as u32,
                (first_head / group) as u32,
                (heads / group) as u32,
                group as u32,
                reads,
                bp,
                call.dtypes.data,
            );
        }
    }

    fn collect_constants(&self, to: &Destinations<R>, first_head: usize, heads: usize) {
        let Some(a_log) = &to.a_log else { return };
        // Safety: as above.
        unsafe {
            collect_constants::launch_unchecked::<R>(
                self.client,
                cubes(self.client, heads),
                CubeDim::new_1d(self.bp.chunk_units() as u32),
                self.scratch(),
                a_log.arg(),
                to.dt_bias.as_ref().unwrap_or(a_log).arg(),
                self.table.chunks as u32,
                first_head as u32,
                heads as u32,
                self.bp,
            );
        }
    }
}
