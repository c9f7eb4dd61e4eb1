//! Forward: two launches per pass.

use cubecl::prelude::*;
use delta_rule_kernels::portable::scan::scan;

use super::{Launches, blueprint};
use crate::Result;
use crate::gpu::call::{Call, Outputs, cubes, strides, written};

/// `prepare`, then `scan`.
pub(in crate::gpu) fn forward<R: Runtime>(
    client: &ComputeClient<R>,
    call: &Call<R>,
    outputs: &Outputs<R>,
) -> Result<()> {
    let bp = blueprint(client, call, false)?;
    let on = Launches::new(client, call, &[&outputs.o], bp, 1)?;
    let sequences = call.problem.sequences();
    for (first_head, heads) in on.passes.iter() {
        if on.table.chunks > 0 {
            on.prepare(first_head, heads);
        }
        // Safety: every index lies inside its buffer, as `checked` has found from shapes and strides.
        unsafe {
            scan::launch_unchecked::<R>(
                client,
                cubes(client, sequences * heads * bp.value_tiles()),
                CubeDim::new_1d(bp.scan_units() as u32),
                on.vector,
                on.arg(Some(&call.v)),
                on.scratch(),
                on.scratch(),
                on.arg(call.initial_state.as_ref()),
                on.table(),
                written(client, &outputs.o),
                outputs.final_state.arg(),
                strides(Some(&call.v)),
                strides(Some(&outputs.o)),
                call.state_strides(call.initial_state.as_ref()),
                call.state_strides(Some(&outputs.final_state)),
                sequences as u32,
                first_head as u32,
                heads as u32,
                bp,
                call.dtypes.data,
            );
        }
    }
    Ok(())
}
