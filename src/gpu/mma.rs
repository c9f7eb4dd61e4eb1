//! The tensor-core kernels: when they apply, with which blueprint, and their launches.

use cubecl::ir::StorageType;
use cubecl::ir::features::MmaConfig;
use cubecl::prelude::*;
use delta_rule_kernels::mma::{Blueprint, CHUNK, forward, prepare};

use super::call::{Call, Outputs, Table, array, cubes, strides, written};
use super::tensors::Checked;
use super::{MIN_BUFFER, f32_type};
use crate::{Decay, Error, Result};

/// The blueprint, or nothing where the portable kernels have to do: f32 data, a device without the
/// instructions, head dimensions that are no multiples of 16, rows that cannot be read 16 bytes at a time,
/// or another chunk size.
pub(super) fn blueprint<R: Runtime>(
    client: &ComputeClient<R>,
    call: &Call<R>,
    outputs: &Outputs<R>,
) -> Option<Blueprint> {
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
    // The widest tile first; narrower ones when it would leave multiprocessors idle.
    let fits = |bp: &Blueprint| bp.shared_memory() <= hardware.max_shared_memory_size;
    let mut tiles = tiles(spec.key_dim, spec.value_dim)
        .map(|(value_tile, held)| {
            // With narrow tiles the scan is a chain of short steps: nothing else may be in its way, and two
            // groups of planes have time to fetch.
            let groups = if held * spec.key_dim <= 128 && value_tile <= 32 { 2 } else { 1 };
            let prepared = value_tile < spec.value_dim || call.problem.rule().decay == Decay::Channel;
            Blueprint { spec, value_tile, held, groups, packed, prepared }
        })
        .filter(fits);
    let mut best = tiles.next()?;
    for bp in tiles {
        if heads * best.value_tiles() * 4 >= multiprocessors * 3 {
            break;
        }
        best = bp;
    }
    scratch_fits(client, call, &best).then_some(best)
}

/// Whether the records of a prepared launch fit into one buffer; if not, the portable kernels do with less.
fn scratch_fits<R: Runtime>(client: &ComputeClient<R>, call: &Call<R>, bp: &Blueprint) -> bool {
    let problem = call.problem;
    let steps = problem.shape().tokens * problem.rule().micro_steps;
    // Each sequence rounds up to whole chunks.
    let chunks = (problem.shape().batch * steps).div_ceil(CHUNK) + problem.sequences();
    let (units, floats) = bp.record();
    let bytes = rounded(chunks * problem.shape().value_heads * (16 * units).max(4 * floats)) as u64;
    !bp.prepared || bytes <= client.properties().memory.max_page_size
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

/// Launches it.
pub(super) fn launch<R: Runtime>(
    client: &ComputeClient<R>,
    call: &Call<R>,
    outputs: &Outputs<R>,
    bp: Blueprint,
) -> Result<()> {
    let problem = call.problem;
    let heads = problem.shape().value_heads;
    // Rows of a batch need no table; something must be bound all the same.
    let table = bp.packed.then(|| Table::new(problem, CHUNK)).transpose()?;
    let steps = problem.shape().tokens * problem.rule().micro_steps;
    let chunks = table.as_ref().map_or(problem.sequences() * steps.div_ceil(CHUNK), |table| table.chunks);
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
    let records = chunks * heads;
    let (units, floats) = bp.record();
    let scratch = |len: usize| {
        let bytes = if bp.prepared { rounded(len * records).max(MIN_BUFFER) } else { MIN_BUFFER };
        client
            .memory_persistent_allocation(bytes, |bytes| client.empty(bytes))
            .map_err(|e| Error::Device { what: e.to_string() })
    };
    let (blocks, factors) = (scratch(16 * units)?, scratch(4 * floats)?);
    let blocks_arg = || array(&blocks, if bp.prepared { 8 * units * records } else { 8 });
    let factors_arg = || array(&factors, if bp.prepared { floats * records } else { 4 });
    if bp.prepared && records > 0 {
        // Safety: every index lies inside its buffer, as `checked` has found from shapes and strides.
        // It does not depend on how the values are dealt.
        let bp = Blueprint { value_tile: 16, held: 1, groups: 1, ..bp };
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
                problem.sequences() as u32,
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
    // Safety: as above.
    unsafe {
        forward::launch_unchecked::<R>(
            client,
            cubes(client, problem.sequences() * heads * bp.value_tiles()),
            CubeDim::new_1d(bp.units() as u32),
            arg(Some(&call.q)),
            arg(Some(&call.k)),
            arg(Some(&call.v)),
            arg(Some(&call.beta)),
            arg(call.g.as_ref()),
            arg(call.a_log.as_ref()),
            arg(call.dt_bias.as_ref()),
            arg(call.initial_state.as_ref()),
            table_arg(),
            blocks_arg(),
            factors_arg(),
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
            problem.shape().tokens as u32,
            problem.sequences() as u32,
            heads as u32,
            call.group(),
            call.scale(),
            call.lower_bound(),
            bp,
            dtypes,
        );
    }
    Ok(())
}
