//! Forward: one launch.

use cubecl::prelude::*;
use delta_rule_kernels::portable::scan::scan;

use super::Launches;
use crate::Result;
use crate::gpu::call::{Call, Outputs, cubes, strides, written};

/// `scan`.
pub(in crate::gpu) fn forward<R: Runtime>(
    client: &ComputeClient<R>,
    call: &Call<R>,
    outputs: &Outputs<R>,
) -> Result<()> {
    let on = Launches::new(client, call, &[&outputs.o], false)?;
    let bp = on.bp;
    let sequences = call.problem.sequences();
    let heads = call.problem.shape().value_heads;
    // Safety: every index lies inside its buffer, as `checked` has found from shapes and strides.
    unsafe {
        scan::launch_unchecked::<R>(
            client,
            cubes(client, sequences * heads * bp.value_tiles()),
            CubeDim::new_1d(bp.scan_units() as u32),
            on.vector,
            on.value_vector(),
            bp.unit_values,
            on.state_vector(&[call.initial_state.as_ref(), Some(&outputs.final_state)]),
            on.arg(Some(&call.q)),
            on.arg(Some(&call.k)),
            on.arg(Some(&call.v)),
            on.arg(Some(&call.beta)),
            on.arg(call.g.as_ref()),
            on.arg(call.a_log.as_ref()),
            on.arg(call.dt_bias.as_ref()),
            on.arg(call.initial_state.as_ref()),
            on.table(),
            written(client, &outputs.o),
            outputs.final_state.arg(),
            strides(Some(&call.q)),
            strides(Some(&call.k)),
            strides(Some(&call.v)),
            strides(Some(&call.beta)),
            strides(call.g.as_ref()),
            strides(Some(&outputs.o)),
            call.state_strides(call.initial_state.as_ref()),
            call.state_strides(Some(&outputs.final_state)),
            sequences as u32,
            heads as u32,
            call.group(),
            call.scale(),
            call.lower_bound(),
            bp,
            on.dtypes(),
        );
    }
    Ok(())
}
