//! From a problem and a device's properties to a blueprint, a table of sequences and passes.

use cubecl::prelude::*;
use delta_rule_kernels as kernels;
use delta_rule_kernels::Blueprint;

use super::f32_type;
use super::tensors::binding_limit;
use crate::{BetaTransform, Decay, Error, GateTransform, Options, Problem, Result};

/// Scratch beyond this is worked off in several passes over the heads.
const MAX_SCRATCH: u64 = 1 << 30;

/// Units of a `prepare` cube, whatever the chunk: inside every device's limit, and few enough that none spills.
const PREPARE_UNITS: usize = 128;

/// All that is decided on the host before the kernels are launched.
pub(super) struct Plan {
    pub(super) blueprint: Blueprint,
    /// `[row, first token, tokens, first chunk]` of every sequence, then the sequence of every chunk.
    pub(super) table: Vec<u32>,
    pub(super) chunks: usize,
    pub(super) scratch_bytes: usize,
    value_heads: usize,
    heads_per_pass: usize,
    max_cubes: u32,
}

impl Plan {
    pub(super) fn new<R: Runtime>(
        client: &ComputeClient<R>,
        problem: &Problem,
        options: &Options,
        has_bias: bool,
        has_initial_state: bool,
    ) -> Result<Self> {
        let blueprint = blueprint(client, problem, options, has_bias, has_initial_state)?;
        let chunks_of = |n| (problem.sequence(n).len * problem.rule().micro_steps).div_ceil(blueprint.chunk);
        let chunks: usize = (0..problem.sequences()).map(chunks_of).sum();
        let too_large = |bytes, limit| Error::BufferTooLarge { tensor: "scratch", bytes, limit };
        let entries = 4 * problem.sequences() as u64 + chunks as u64;
        if entries > u32::MAX as u64 {
            return Err(too_large(4 * entries, 4 * u32::MAX as u64));
        }

        let mut table = Vec::with_capacity(entries as usize);
        let mut first = 0;
        for n in 0..problem.sequences() {
            let s = problem.sequence(n);
            table.extend([s.row as u32, s.start as u32, s.len as u32, first]);
            first += chunks_of(n) as u32;
        }
        for n in 0..problem.sequences() {
            table.extend(std::iter::repeat_n(n as u32, chunks_of(n)));
        }

        let value_heads = problem.shape().value_heads;
        let per_head = (chunks * blueprint.record_bytes()) as u64;
        let device_limit = binding_limit(client, f32_type());
        let limit = device_limit.min(MAX_SCRATCH.max(per_head));
        let heads_per_pass = limit.checked_div(per_head).map_or(value_heads, |heads| heads as usize);
        if heads_per_pass == 0 {
            return Err(too_large(per_head, device_limit));
        }
        // Passes of equal size: a small last one would leave the device idle.
        let passes = value_heads.div_ceil(heads_per_pass.min(value_heads));
        let heads_per_pass = value_heads.div_ceil(passes);
        // Few sizes, since the client keeps each: see `forward_into`.
        let exact = per_head * heads_per_pass as u64;
        let scratch_bytes = exact.next_power_of_two().min(device_limit) as usize;
        let max_cubes = client.properties().hardware.max_cube_count.0;
        Ok(Self { blueprint, table, chunks, scratch_bytes, value_heads, heads_per_pass, max_cubes })
    }

    pub(super) fn table_bytes(&self) -> Vec<u8> {
        self.table.iter().flat_map(|x| x.to_ne_bytes()).collect()
    }

    /// `(first head, heads)` of every pass.
    pub(super) fn passes(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let step = self.heads_per_pass;
        (0..self.value_heads).step_by(step).map(move |h| (h, step.min(self.value_heads - h)))
    }

    /// A grid of at least `n` cubes, numbered along x, then y.
    pub(super) fn cubes(&self, n: usize) -> CubeCount {
        let x = n.clamp(1, self.max_cubes as usize);
        CubeCount::Static(x as u32, n.div_ceil(x).max(1) as u32, 1)
    }
}

fn blueprint<R: Runtime>(
    client: &ComputeClient<R>,
    problem: &Problem,
    options: &Options,
    has_bias: bool,
    has_initial_state: bool,
) -> Result<Blueprint> {
    let chunks: &[usize] = match options.chunk_size {
        None => &[32, 16],
        Some(16) => &[16],
        Some(32) => &[32],
        Some(got) => return Err(Error::ChunkSize { got, supported: "the GPU kernels take 16 or 32" }),
    };
    let shape = problem.shape();
    let base = Blueprint {
        decay: match problem.rule().decay {
            Decay::None => kernels::Decay::None,
            Decay::Head => kernels::Decay::Head,
            Decay::Channel => kernels::Decay::Channel,
        },
        micro_steps: problem.rule().micro_steps,
        key_dim: shape.key_dim,
        value_dim: shape.value_dim,
        chunk: 0,
        value_tile: 0,
        unit_rows: 4,
        parts: 0,
        qk_l2norm: options.qk_l2norm,
        beta: match options.beta {
            BetaTransform::Identity => kernels::BetaMap::Identity,
            BetaTransform::Sigmoid => kernels::BetaMap::Sigmoid,
            BetaTransform::TwoSigmoid => kernels::BetaMap::TwoSigmoid,
        },
        gate: match options.gate {
            GateTransform::Identity => kernels::GateMap::Identity,
            GateTransform::Softplus => kernels::GateMap::Softplus,
            GateTransform::Bounded { .. } => kernels::GateMap::Bounded,
        },
        has_bias,
        has_initial_state,
    };
    let hardware = &client.properties().hardware;
    let fits = |bp: &Blueprint| {
        bp.shared_memory() <= hardware.max_shared_memory_size
            && bp.prepare_units().max(bp.scan_units()) <= hardware.max_units_per_cube as usize
    };
    let tiles = [32, 16].into_iter().filter(|&tile| tile == 16 || shape.value_dim > 16);
    let sized =
        |chunk: usize, value_tile| Blueprint { chunk, value_tile, parts: PREPARE_UNITS / chunk, ..base };
    let smallest = sized(16, 16);
    let bp = tiles
        .flat_map(|value_tile| chunks.iter().map(move |&chunk| sized(chunk, value_tile)))
        .find(fits)
        .ok_or_else(|| Error::Device {
            what: format!(
                "K = {} needs at least {} bytes of shared memory, one cube has {}",
                shape.key_dim,
                smallest.shared_memory(),
                hardware.max_shared_memory_size
            ),
        })?;
    let filled = |bp: &Blueprint| match hardware.num_streaming_multiprocessors {
        Some(n) => {
            problem.sequences() * shape.value_heads * bp.value_tiles() * bp.scan_units()
                >= n as usize * BUSY_UNITS
        }
        None => false,
    };
    let rows = [4, 2].map(|unit_rows| Blueprint { unit_rows, ..bp });
    Ok(rows.into_iter().find(filled).unwrap_or(Blueprint { unit_rows: 1, ..bp }))
}

/// Units per multiprocessor that keep it busy. Below, units take fewer rows each, so that there are more of
/// them; devices that do not tell how many multiprocessors they have (WGPU) run few cubes on each, and want
/// those as wide as they can be.
const BUSY_UNITS: usize = 256;
