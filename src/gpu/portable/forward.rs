//! Forward: one launch.

use cubecl::prelude::*;
use delta_rule_kernels::portable::scan::scan;

use super::Launches;
use crate::Result;
use crate::gpu::call::{Binds, Call, Outputs, cubes, written_rows};

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
            on.read(Some(&call.q)),
            on.read(Some(&call.k)),
            on.read(Some(&call.v)),
            on.gating(),
            on.states(call.initial_state.as_ref()),
            on.table(),
            written_rows(client, &outputs.o),
            call.states(outputs.final_state.arg(), Some(&outputs.final_state)),
            sequences as u32,
            heads as u32,
            call.group(),
            call.scale(),
            bp,
            on.dtypes(),
        );
    }
    Ok(())
}
