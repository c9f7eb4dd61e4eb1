//! Forward: one launch, two where chunks are prepared beforehand, four where sequences are split.

use cubecl::prelude::*;
use delta_rule_kernels::StateStridesLaunch;
use delta_rule_kernels::mma::{Blueprint, CHUNK, Pass, combine, forward};

use super::{Launches, Records, applies, blueprints, fits_page, most_chunks, scratch, widest_that_fills};
use crate::Result;
use crate::gpu::call::{Call, Outputs, Table, array, cubes, cubes_by_sequence, strides, written};
use crate::gpu::split::{Split, slot_bytes, split};

/// What is launched for a call.
pub(in crate::gpu) struct Plan {
    forward: Blueprint,
    split: Option<Split>,
}

/// The plan, or nothing where the portable kernels have to do, or are faster.
pub(in crate::gpu) fn plan<R: Runtime>(
    client: &ComputeClient<R>,
    call: &Call<R>,
    outputs: &Outputs<R>,
) -> Option<Plan> {
    // A chunk costs the same however little is in it.
    let short = call.is_short() && call.options.chunk_size.is_none();
    if short || !applies(client, call, &[&outputs.o]) {
        return None;
    }
    let spec = call.spec();
    let hardware = &client.properties().hardware;
    let heads = call.problem.sequences() * call.problem.shape().value_heads;
    let multiprocessors = hardware.num_streaming_multiprocessors.unwrap_or(1) as usize;
    let packed = call.problem.cu_seqlens().is_some();
    let fits = |bp: &Blueprint| bp.shared_memory() <= hardware.max_shared_memory_size;
    let whole =
        widest_that_fills(blueprints(spec, Pass::Whole, packed).filter(fits), heads, multiprocessors)?;
    let segments: Vec<_> = blueprints(spec, Pass::Segments, true).filter(fits).collect();
    let slots_fit =
        |split: &Split| fits_page(client, slot_bytes(&spec) * split.count * call.problem.shape().value_heads);
    let split = split(call.problem, &whole, &segments, multiprocessors).filter(slots_fit);
    let forward = split.map_or(whole, |split| split.scan);
    let records = most_chunks(call) * call.problem.shape().value_heads;
    (!forward.prepared || Records::fit(client, &forward, records)).then_some(Plan { forward, split })
}

/// Launches it: `prepare` where chunks are prepared beforehand, for a split the transfer pass and `combine`, and
/// `forward`.
pub(in crate::gpu) fn launch<R: Runtime>(
    client: &ComputeClient<R>,
    call: &Call<R>,
    outputs: &Outputs<R>,
    plan: Plan,
) -> Result<()> {
    let problem = call.problem;
    let heads = problem.shape().value_heads;
    let Plan { forward: bp, split } = plan;
    let table = match &split {
        Some(split) => Some(Table::split(problem, CHUNK, split.segment)?),
        None => bp.packed.then(|| Table::new(problem, CHUNK)).transpose()?,
    };
    let on = Launches::new(client, call, table, &outputs.final_state);
    let (segments, chunks) = (on.segments, on.chunks);
    let records = Records::new(client, &bp, if bp.prepared { chunks * heads } else { 0 })?;
    on.prepare(&records, bp);
    let scan = |sequences: usize, transfer: bool, [from, to]: [State<R>; 2]| {
        let tiles = if transfer { bp.transfer_tiles() } else { bp.value_tiles() };
        let grid = match bp.pass {
            Pass::Segments => cubes_by_sequence(client, sequences, heads * tiles),
            _ => cubes(client, sequences * heads * tiles),
        };
        // Safety: as above; slots of segments hold V + K rows each.
        unsafe {
            forward::launch_unchecked::<R>(
                client,
                grid,
                CubeDim::new_1d(bp.units() as u32),
                on.arg(Some(&call.q)),
                on.arg(Some(&call.k)),
                on.arg(Some(&call.v)),
                on.arg(Some(&call.beta)),
                on.arg(call.g.as_ref()),
                on.arg(call.a_log.as_ref()),
                on.arg(call.dt_bias.as_ref()),
                from.0,
                on.table(),
                records.blocks(),
                records.factors(),
                written(client, &outputs.o),
                to.0,
                strides(Some(&call.q)),
                strides(Some(&call.k)),
                strides(Some(&call.v)),
                strides(Some(&call.beta)),
                strides(call.g.as_ref()),
                strides(Some(&outputs.o)),
                from.1,
                to.1,
                problem.shape().tokens as u32,
                problem.sequences() as u32,
                segments as u32,
                transfer as u32,
                heads as u32,
                call.group(),
                call.scale(),
                call.lower_bound(),
                bp,
                on.dtypes(),
            );
        }
    };
    let initial = || (on.arg(call.initial_state.as_ref()), call.state_strides(call.initial_state.as_ref()));
    let last = || (outputs.final_state.arg(), call.state_strides(Some(&outputs.final_state)));
    if split.is_none() {
        scan(segments, false, [initial(), last()]);
        return Ok(());
    }
    let spec = call.spec();
    let slots = scratch(client, slot_bytes(&spec) * segments * heads)?;
    let slots_arg = || array(&slots, slot_bytes(&spec) / 4 * segments * heads);
    let rows = (spec.value_dim + spec.key_dim) as u32;
    let (key_dim, heads_u32) = (spec.key_dim as u32, heads as u32);
    let slot_strides = || StateStridesLaunch::new(heads_u32 * rows * key_dim, rows * key_dim, 1, key_dim);
    scan(segments - problem.sequences(), true, [initial(), (slots_arg(), slot_strides())]);
    // Safety: as above.
    unsafe {
        let (initial_state, initial_at) = initial();
        combine::combine::launch_unchecked::<R>(
            client,
            cubes_by_sequence(client, problem.sequences(), heads * combine::tiles(&spec)),
            CubeDim::new_1d(combine::units(&spec) as u32),
            initial_state,
            on.table(),
            slots_arg(),
            initial_at,
            (4 * segments + chunks) as u32,
            problem.sequences() as u32,
            heads_u32,
            spec,
        );
    }
    scan(segments, false, [(slots_arg(), slot_strides()), last()]);
    Ok(())
}

/// A buffer of states and where they lie in it.
type State<R> = (ArrayArg<R>, StateStridesLaunch<R>);
