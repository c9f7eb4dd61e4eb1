//! Forward: one launch, two where chunks are prepared beforehand, four where sequences are split.

use cubecl::prelude::*;
use delta_rule_kernels::mma::{Blueprint, CHUNK, Pass, combine, forward};
use delta_rule_kernels::{StateStridesLaunch, StatesLaunch};

use super::{Launches, Records, applies, blueprints, fits_page, most_chunks, scratch, widest_that_fills};
use crate::Result;
use crate::gpu::call::{Binds, Call, Outputs, Table, array, cubes, cubes_by_sequence, written_rows};
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
    let scan = |sequences: usize, transfer: bool, [from, to]: [StatesLaunch<f32, R>; 2]| {
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
                on.read(Some(&call.q)),
                on.read(Some(&call.k)),
                on.read(Some(&call.v)),
                on.gating(),
                from,
                on.table(),
                records.arg(),
                written_rows(client, &outputs.o),
                to,
                on.sizes(problem.sequences()),
                segments as u32,
                transfer as u32,
                call.scale(),
                bp,
                on.dtypes(),
            );
        }
    };
    let initial = || on.states(call.initial_state.as_ref());
    let last = || call.states(outputs.final_state.arg(), Some(&outputs.final_state));
    if split.is_none() {
        scan(segments, false, [initial(), last()]);
        return Ok(());
    }
    let spec = call.spec();
    let slots = scratch(client, slot_bytes(&spec) * segments * heads)?;
    let slots_arg = || array(&slots, slot_bytes(&spec) / 4 * segments * heads);
    let rows = (spec.value_dim + spec.key_dim) as u32;
    let (key_dim, heads_u32) = (spec.key_dim as u32, heads as u32);
    let slot_states = || {
        let strides = StateStridesLaunch::new(heads_u32 * rows * key_dim, rows * key_dim, 1, key_dim);
        StatesLaunch::new(slots_arg(), strides)
    };
    scan(segments - problem.sequences(), true, [initial(), slot_states()]);
    // Safety: as above.
    unsafe {
        combine::combine::launch_unchecked::<R>(
            client,
            cubes_by_sequence(client, problem.sequences(), heads * combine::tiles(&spec)),
            CubeDim::new_1d(combine::units(&spec) as u32),
            initial(),
            on.table(),
            slots_arg(),
            (4 * segments + chunks) as u32,
            problem.sequences() as u32,
            heads_u32,
            spec,
        );
    }
    scan(segments, false, [slot_states(), last()]);
    Ok(())
}
