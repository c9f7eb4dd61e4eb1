//! Backward: five launches per pass, and one more where the gate is a formula.

use cubecl::prelude::*;
use delta_rule_kernels::portable::collect::{collect, collect_constants};
use delta_rule_kernels::portable::gradients::gradients;
use delta_rule_kernels::portable::sweep::sweep;

use super::{Launches, blueprint};
use crate::Result;
use crate::gpu::backward::{Adjoint, Destinations};
use crate::gpu::call::{Call, cubes, strides, written};
use crate::gpu::tensors::Checked;

/// `prepare`, `sweep`, `gradients`, `collect`.
pub(in crate::gpu) fn backward<R: Runtime>(
    client: &ComputeClient<R>,
    call: &Call<R>,
    from: &Adjoint<R>,
    to: &Destinations<R>,
) -> Result<()> {
    let bp = blueprint(client, call, true)?;
    let group = call.group() as usize;
    let on = Launches::new(client, call, &[&from.o, &to.q, &to.k, &to.v], bp, group)?;
    for (first_head, heads) in on.passes.iter() {
        if on.table.chunks > 0 {
            on.prepare(first_head, heads);
        }
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

impl<R: Runtime> Launches<'_, R> {
    fn sweep(&self, from: &Adjoint<R>, to: &Destinations<R>, first_head: usize, heads: usize) {
        let (client, call, bp) = (self.client, self.call, self.bp);
        let sequences = call.problem.sequences();
        // Safety: every index lies inside its buffer, as `checked` has found from shapes and strides.
        unsafe {
            sweep::launch_unchecked::<R>(
                client,
                cubes(client, 2 * sequences * heads * bp.value_tiles()),
                CubeDim::new_1d(bp.scan_units() as u32),
                self.vector,
                self.arg(Some(&call.v)),
                self.arg(Some(&from.o)),
                self.scratch(),
                self.scratch(),
                self.arg(call.initial_state.as_ref()),
                self.arg(from.final_state.as_ref()),
                self.table(),
                written(client, &to.v),
                to.initial_state.arg(),
                strides(Some(&call.v)),
                strides(Some(&from.o)),
                strides(Some(&to.v)),
                call.state_strides(call.initial_state.as_ref()),
                call.state_strides(from.final_state.as_ref()),
                call.state_strides(Some(&to.initial_state)),
                sequences as u32,
                first_head as u32,
                heads as u32,
                from.final_state.is_some(),
                bp,
                call.dtypes.data,
            );
        }
    }

    fn gradients(&self, from: &Adjoint<R>, to: &Destinations<R>, first_head: usize, heads: usize) {
        let (client, call, bp) = (self.client, self.call, self.bp);
        let d_g = to.g.as_ref().map_or_else(|| written(client, &to.beta), |g| written(client, g));
        // Safety: as above.
        unsafe {
            gradients::launch_unchecked::<R>(
                client,
                cubes(client, self.table.chunks * heads),
                CubeDim::new_1d(bp.prepare_units() as u32),
                self.vector,
                self.arg(Some(&call.q)),
                self.arg(Some(&call.k)),
                self.arg(Some(&call.beta)),
                self.arg(call.g.as_ref()),
                self.arg(call.a_log.as_ref()),
                self.arg(call.dt_bias.as_ref()),
                self.arg(Some(&from.o)),
                self.table(),
                self.scratch(),
                self.scratch(),
                written(client, &to.beta),
                d_g,
                strides(Some(&call.q)),
                strides(Some(&call.k)),
                strides(Some(&call.beta)),
                strides(call.g.as_ref()),
                strides(Some(&from.o)),
                strides(Some(&to.beta)),
                strides(to.g.as_ref()),
                call.problem.sequences() as u32,
                self.table.chunks as u32,
                first_head as u32,
                heads as u32,
                call.group(),
                call.scale(),
                call.lower_bound(),
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
                CubeDim::new_1d(bp.prepare_units() as u32),
                self.vector,
                self.arg(Some(x)),
                self.table(),
                self.scratch(),
                written(client, dx),
                strides(Some(x)),
                strides(Some(dx)),
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
                CubeDim::new_1d(self.bp.prepare_units() as u32),
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
