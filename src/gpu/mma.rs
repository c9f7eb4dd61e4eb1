//! The tensor-core kernels: when they apply, with which blueprint, and their launches.

use cubecl::ir::StorageType;
use cubecl::ir::features::MmaConfig;
use cubecl::prelude::*;
use delta_rule_kernels::mma::{Blueprint, CHUNK, Pass, combine, forward, prepare};
use delta_rule_kernels::{self as kernels, Spec, StateStridesLaunch};

use super::call::{Call, Outputs, Table, array, cubes, strides, written};
use super::split::{Split, slot_bytes, split};
use super::tensors::Checked;
use super::{MIN_BUFFER, f32_type};
use crate::{Decay, Error, Result};

/// What is launched for a call.
pub(super) struct Plan {
    forward: Blueprint,
    split: Option<Split>,
}

/// The plan, or nothing where the portable kernels have to do: f32 data, a device without the instructions, head
/// dimensions that are no multiples of 16, rows that cannot be read 16 bytes at a time, or another chunk size.
pub(super) fn plan<R: Runtime>(
    client: &ComputeClient<R>,
    call: &Call<R>,
    outputs: &Outputs<R>,
) -> Option<Plan> {
    let spec = call.spec();
    let tensors = [&call.q, &call.k, &call.v, &outputs.o];
    let applies = has_instructions(client, call.dtypes.data)
        && call.options.chunk_size.is_none_or(|c| c == CHUNK)
        && spec.key_dim.is_multiple_of(16)
        && spec.value_dim.is_multiple_of(16)
        && (call.problem.rule().decay != Decay::Channel || spec.micro_steps == 1)
        && tensors.iter().all(|t| t.vectorizes(call.dtypes.data, 8));
    if !applies {
        return None;
    }
    let hardware = &client.properties().hardware;
    let heads = call.problem.sequences() * call.problem.shape().value_heads;
    let multiprocessors = hardware.num_streaming_multiprocessors.unwrap_or(1) as usize;
    let packed = call.problem.cu_seqlens().is_some();
    let fits = |bp: &Blueprint| bp.shared_memory() <= hardware.max_shared_memory_size;
    // The widest tile first; narrower ones when it would leave multiprocessors idle.
    let mut tiles = blueprints(spec, Pass::Whole, packed).filter(fits);
    let mut whole = tiles.next()?;
    for bp in tiles {
        if heads * whole.value_tiles() * 4 >= multiprocessors * 3 {
            break;
        }
        whole = bp;
    }
    let segments: Vec<_> = blueprints(spec, Pass::Segments, true).filter(fits).collect();
    let transfers: Vec<_> = blueprints(spec, Pass::Transfer, true).filter(fits).collect();
    let slots_fit =
        |split: &Split| fits_page(client, slot_bytes(&spec) * split.count * call.problem.shape().value_heads);
    let split = split(call.problem, &whole, &transfers, &segments, multiprocessors).filter(slots_fit);
    let forward = split.map_or(whole, |split| split.segments);
    records_fit(client, call, &forward).then_some(Plan { forward, split })
}

/// Blueprints of one pass, from wide tiles to narrow ones.
fn blueprints(spec: Spec, pass: Pass, packed: bool) -> impl Iterator<Item = Blueprint> {
    let has_initial_state = match pass {
        Pass::Whole => spec.has_initial_state,
        Pass::Transfer => false,
        Pass::Segments => true,
    };
    let spec = Spec { has_initial_state, ..spec };
    let rows = spec.value_dim + if pass == Pass::Transfer { spec.key_dim } else { 0 };
    tiles(spec.key_dim, rows).map(move |(value_tile, held)| {
        // With narrow tiles the scan is a chain of short steps: nothing else may be in its way, and two
        // groups of planes have time to fetch.
        let groups = if held * spec.key_dim <= 128 && value_tile <= 32 { 2 } else { 1 };
        let prepared =
            value_tile < spec.value_dim || spec.decay == kernels::Decay::Channel || pass != Pass::Whole;
        Blueprint { spec, value_tile, held, groups, packed, prepared, pass }
    })
}

/// Whether the records of a prepared launch fit into one buffer; if not, the portable kernels do with less.
fn records_fit<R: Runtime>(client: &ComputeClient<R>, call: &Call<R>, bp: &Blueprint) -> bool {
    let problem = call.problem;
    // Each sequence rounds up to whole chunks.
    let chunks = (problem.shape().batch * problem.steps()).div_ceil(CHUNK) + problem.sequences();
    let (units, floats) = bp.record();
    let bytes = chunks * problem.shape().value_heads * (16 * units).max(4 * floats);
    !bp.prepared || fits_page(client, bytes)
}

fn fits_page<R: Runtime>(client: &ComputeClient<R>, bytes: usize) -> bool {
    rounded(bytes) as u64 <= client.properties().memory.max_page_size
}

/// Few sizes, since the client keeps each buffer: at most an eighth more than asked for.
fn rounded(bytes: usize) -> usize {
    bytes.next_multiple_of((bytes.next_power_of_two() / 16).max(1))
}

/// `(value_tile, held)` from wide to narrow, at most four scanning planes each.
fn tiles(key_dim: usize, value_dim: usize) -> impl Iterator<Item = (usize, usize)> {
    let wide = if key_dim <= 128 { 2 } else { 1 };
    let all = [(128, 2), (64, 2), (64, 1), (32, 1), (16, 1)];
    let mut kept: Vec<(usize, usize)> = all
        .into_iter()
        .filter(|&(_, held)| held <= wide)
        .map(|(tile, held)| (tile.min(value_dim.next_multiple_of(16 * held)), held))
        .collect();
    kept.dedup();
    kept.into_iter()
}

/// Whether the device multiplies 16 x 8 x 16 tiles of `dtype` into f32, and loads and stores them by matrices.
fn has_instructions<R: Runtime>(client: &ComputeClient<R>, dtype: StorageType) -> bool {
    let features = client.features();
    let instruction = MmaConfig { a_type: dtype, b_type: dtype, cd_type: f32_type(), m: 16, n: 8, k: 16 };
    features.matmul.mma.contains(&instruction)
        && features.matmul.ldmatrix.contains(&dtype)
        && features.matmul.stmatrix.contains(&dtype)
}

/// Launches it: `prepare` where chunks are prepared beforehand, for a split the transfer pass and `combine`, and
/// `forward`.
pub(super) fn launch<R: Runtime>(
    client: &ComputeClient<R>,
    call: &Call<R>,
    outputs: &Outputs<R>,
    plan: Plan,
) -> Result<()> {
    let problem = call.problem;
    let heads = problem.shape().value_heads;
    let Plan { forward: bp, split } = plan;
    // Rows of a batch need no table; something must be bound all the same.
    let table = match &split {
        Some(split) => Some(Table::split(problem, CHUNK, split.segment)?),
        None => bp.packed.then(|| Table::new(problem, CHUNK)).transpose()?,
    };
    let whole_rows = (problem.sequences(), problem.sequences() * problem.steps().div_ceil(CHUNK));
    let (segments, chunks) = table.as_ref().map_or(whole_rows, |table| (table.segments, table.chunks));
    let table_handle = table.as_ref().map(|table| (table.upload(client), table.entries.len()));
    let table_arg = || match &table_handle {
        Some((handle, len)) => array(handle, *len),
        None => outputs.final_state.arg(),
    };
    // As in `portable.rs`: what has no elements is never read.
    let arg = |tensor: Option<&Checked<R>>| match tensor {
        Some(t) if t.elements > 0 => t.arg(),
        _ => table_arg(),
    };
    let dtypes = [call.dtypes.data, call.dtypes.beta, call.dtypes.gate];
    let records = if bp.prepared { chunks * heads } else { 0 };
    let (units, floats) = bp.record();
    let scratch = |bytes: usize| {
        client
            .memory_persistent_allocation(rounded(bytes).max(MIN_BUFFER), |bytes| client.empty(bytes))
            .map_err(|e| Error::Device { what: e.to_string() })
    };
    let (blocks, factors) = (scratch(16 * units * records)?, scratch(4 * floats * records)?);
    let blocks_arg = || array(&blocks, (8 * units * records).max(8));
    let factors_arg = || array(&factors, (floats * records).max(4));
    if records > 0 {
        // Safety: every index lies inside its buffer, as `checked` has found from shapes and strides.
        // It does not depend on how the values are dealt.
        let bp = Blueprint { value_tile: 16, held: 1, groups: 1, pass: Pass::Whole, ..bp };
        unsafe {
            prepare::launch_unchecked::<R>(
                client,
                cubes(client, records),
                CubeDim::new_1d(bp.prepare_units() as u32),
                arg(Some(&call.q)),
                arg(Some(&call.k)),
                arg(Some(&call.beta)),
                arg(call.g.as_ref()),
                arg(call.a_log.as_ref()),
                arg(call.dt_bias.as_ref()),
                table_arg(),
                blocks_arg(),
                factors_arg(),
                strides(Some(&call.q)),
                strides(Some(&call.k)),
                strides(Some(&call.beta)),
                strides(call.g.as_ref()),
                problem.shape().tokens as u32,
                segments as u32,
                chunks as u32,
                heads as u32,
                call.group(),
                call.scale(),
                call.lower_bound(),
                bp,
                dtypes,
            );
        }
    }
    let scan = |bp: Blueprint, sequences: usize, [from, to]: [State<R>; 2]| {
        // Safety: as above; slots of segments hold V + K rows each.
        unsafe {
            forward::launch_unchecked::<R>(
                client,
                cubes(client, sequences * heads * bp.value_tiles()),
                CubeDim::new_1d(bp.units() as u32),
                arg(Some(&call.q)),
                arg(Some(&call.k)),
                arg(Some(&call.v)),
                arg(Some(&call.beta)),
                arg(call.g.as_ref()),
                arg(call.a_log.as_ref()),
                arg(call.dt_bias.as_ref()),
                from.0,
                table_arg(),
                blocks_arg(),
                factors_arg(),
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
                heads as u32,
                call.group(),
                call.scale(),
                call.lower_bound(),
                bp,
                dtypes,
            );
        }
    };
    let initial = || (arg(call.initial_state.as_ref()), call.state_strides(call.initial_state.as_ref()));
    let last = || (outputs.final_state.arg(), call.state_strides(Some(&outputs.final_state)));
    let Some(split) = split else {
        scan(bp, segments, [initial(), last()]);
        return Ok(());
    };
    let spec = call.spec();
    let slots = scratch(slot_bytes(&spec) * segments * heads)?;
    let slots_arg = || array(&slots, slot_bytes(&spec) / 4 * segments * heads);
    let rows = (spec.value_dim + spec.key_dim) as u32;
    let (key_dim, heads_u32) = (spec.key_dim as u32, heads as u32);
    let slot_strides = || StateStridesLaunch::new(heads_u32 * rows * key_dim, rows * key_dim, 1, key_dim);
    scan(split.transfer, segments - problem.sequences(), [initial(), (slots_arg(), slot_strides())]);
    // Safety: as above.
    unsafe {
        let (initial_state, initial_at) = initial();
        combine::combine::launch_unchecked::<R>(
            client,
            cubes(client, problem.sequences() * heads * combine::tiles(&spec)),
            CubeDim::new_1d(combine::units(&spec) as u32),
            initial_state,
            table_arg(),
            slots_arg(),
            initial_at,
            (4 * segments + chunks) as u32,
            problem.sequences() as u32,
            heads_u32,
            spec,
        );
    }
    scan(bp, segments, [(slots_arg(), slot_strides()), last()]);
    Ok(())
}

/// A buffer of states and where they lie in it.
type State<R> = (ArrayArg<R>, StateStridesLaunch<R>);
