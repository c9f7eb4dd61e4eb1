//! Backward: `prepare`, `sweep` in both directions, `gradients`; and sums over the heads of a group, and of the gate's
//! constants, where there are any.

use cubecl::prelude::*;
use cubecl::server::Handle;
use delta_rule_kernels::mma::arguments::{InputGradientsLaunch, KeptLaunch};
use delta_rule_kernels::mma::gradients::collect::{
    COLLECT_UNITS, CONSTANTS_UNITS, collect, collect_constants,
};
use delta_rule_kernels::mma::gradients::{GradientsBlueprint, gradients};
use delta_rule_kernels::mma::sweep::{KEPT, sweep};
use delta_rule_kernels::mma::{Blueprint, CHUNK, Pass, TILE};
use delta_rule_kernels::{self as kernels, Spec, StridedLaunch, StridesLaunch};

use super::{Launches, Records, applies, fits_page, most_chunks, scratch, widest_that_fills};
use crate::gpu::backward::{Adjoint, Destinations};
use crate::gpu::call::{Binds, Call, Table, array, cubes, strided, written, written_rows};
use crate::gpu::tensors::Checked;
use crate::{Decay, Ident, Result};

/// What is launched for a call.
pub(in crate::gpu) struct BackwardPlan {
    sweep: Blueprint,
    gradients: GradientsBlueprint,
}

/// The plan, or nothing where the portable kernels have to do: where those of the forward do, and where a block does not
/// fit into shared memory.
pub(in crate::gpu) fn plan_backward<R: Runtime>(
    client: &ComputeClient<R>,
    call: &Call<R>,
    from: &Adjoint<R>,
    to: &Destinations<R>,
) -> Option<BackwardPlan> {
    if !applies(client, call, &[&from.o, &to.q, &to.k, &to.v]) {
        return None;
    }
    let spec = call.spec();
    let hardware = &client.properties().hardware;
    let shape = call.problem.shape();
    let packed = call.problem.cu_seqlens().is_some();
    let gradients = GradientsBlueprint::new(spec, packed)
        .filter(|bp| bp.shared_memory() <= hardware.max_shared_memory_size)?;
    let fits = |bp: &Blueprint| bp.sweep_bytes() <= hardware.max_shared_memory_size;
    let tiles = sweep_blueprints(spec, packed).filter(fits);
    // Both directions run side by side.
    let heads = 2 * call.problem.sequences() * shape.value_heads;
    let multiprocessors = hardware.num_streaming_multiprocessors.unwrap_or(1) as usize;
    let sweep = widest_that_fills(tiles, heads, multiprocessors)?;
    let chunks = most_chunks(call);
    let heads = shape.value_heads;
    let sizes = Sizes::new(call, chunks);
    let fits = Records::fit(client, &sweep, chunks * heads)
        && [sizes.residuals, sizes.states, sizes.parts].iter().all(|&n| fits_page(client, n * sizes.element));
    fits.then_some(BackwardPlan { sweep, gradients })
}

/// Blueprints of `sweep`, from wide tiles to narrow ones: a plane holds 16 rows of a state, since what a chunk needs
/// beside it is more than in the forward.
fn sweep_blueprints(spec: Spec, packed: bool) -> impl Iterator<Item = Blueprint> {
    let tiles = [128, 64, 32, 16].into_iter().filter(move |&tile| tile <= 64 || spec.key_dim <= 128);
    let mut tiles: Vec<_> = tiles.map(|tile| tile.min(spec.value_dim)).collect();
    tiles.dedup();
    tiles.into_iter().map(move |value_tile| {
        // Tiles narrower than a head mean few heads: nothing hides how long device memory takes, unless two groups fetch
        // in turn. With gates per channel, where a chunk is half as much again to fetch, this gained nothing; longer rows of a
        // state leave no registers for the planes of a second group.
        let narrow = value_tile <= 64 && value_tile < spec.value_dim;
        let two = narrow && spec.decay != kernels::Decay::Channel && spec.key_dim <= 128;
        let groups = if two { 2 } else { 1 };
        Blueprint { spec, value_tile, held: 1, groups, packed, prepared: true, pass: Pass::Unwind }
    })
}

/// Elements of scratch.
struct Sizes {
    element: usize,
    residuals: usize,
    states: usize,
    /// Gradients of q or k by value head, where heads are grouped.
    parts: usize,
}

impl Sizes {
    fn new<R: Runtime>(call: &Call<R>, chunks: usize) -> Self {
        let shape = call.problem.shape();
        let of_heads = |x: usize| if call.group() > 1 { x * shape.value_heads / shape.heads } else { 0 };
        let kept = kept_states(call, chunks);
        Self {
            element: call.dtypes.data.size(),
            residuals: chunks * shape.value_heads * CHUNK * shape.value_dim,
            states: kept * shape.value_heads * shape.value_dim * shape.key_dim,
            parts: of_heads(call.k.elements),
        }
    }
}

/// At most this many states of a head are kept.
fn kept_states<R: Runtime>(call: &Call<R>, chunks: usize) -> usize {
    (chunks + call.problem.sequences()).div_ceil(KEPT)
}

/// `prepare`, `sweep`, `gradients` and what is to be added up.
pub(in crate::gpu) fn backward<R: Runtime>(
    client: &ComputeClient<R>,
    call: &Call<R>,
    from: &Adjoint<R>,
    to: &Destinations<R>,
    plan: BackwardPlan,
) -> Result<()> {
    let BackwardPlan { sweep: bp, gradients } = plan;
    let table = bp.packed.then(|| Table::new(call.problem, CHUNK)).transpose()?;
    let on = Launches::new(client, call, table, &to.initial_state);
    let records = Records::new(client, &bp, on.chunks * on.value_heads())?;
    let sizes = Sizes::new(call, on.chunks);
    let buffer = |elements: usize| Buffer::new(client, elements, sizes.element);
    let kept = Kept {
        residuals: buffer(sizes.residuals)?,
        states: buffer(sizes.states)?,
        d_states: buffer(sizes.states)?,
    };
    on.prepare(&records, bp);
    on.sweep(from, to, &records, &kept, bp);

    let problem = call.problem;
    // Where sequences are packed a block may begin with every chunk.
    let rows = problem.sequences() * problem.steps().div_ceil(CHUNK).div_ceil(KEPT);
    let blocks = if bp.packed { on.chunks } else { rows };
    let constants = Buffer::new(client, 2 * blocks * on.value_heads() * on.gates(), 4)?;
    let grouped = call.group() > 1;
    let parts = [buffer(sizes.parts)?, buffer(sizes.parts)?];
    if blocks > 0 {
        let parts = grouped.then_some(&parts);
        on.gradients(from, to, &records, &kept, &constants, parts, blocks, gradients);
    }
    if grouped && blocks > 0 {
        on.collect(&parts[0], &to.q, Ident::Q);
        on.collect(&parts[1], &to.k, Ident::K);
    }
    on.collect_constants(to, &constants, blocks);
    Ok(())
}

/// Scratch of a number of elements.
struct Buffer {
    handle: Handle,
    elements: usize,
}

impl Buffer {
    fn new<R: Runtime>(client: &ComputeClient<R>, elements: usize, size: usize) -> Result<Self> {
        Ok(Self { handle: scratch(client, elements * size)?, elements })
    }

    fn arg<R: Runtime>(&self) -> ArrayArg<R> {
        array(&self.handle, self.elements.max(8))
    }
}

/// What `sweep` leaves for `gradients`.
struct Kept {
    residuals: Buffer,
    states: Buffer,
    d_states: Buffer,
}

impl Kept {
    fn arg<F: Float, R: Runtime>(&self) -> KeptLaunch<F, R> {
        KeptLaunch::new(self.residuals.arg(), self.states.arg(), self.d_states.arg())
    }
}

impl<R: Runtime> Launches<'_, R> {
    fn sweep(&self, from: &Adjoint<R>, to: &Destinations<R>, records: &Records, kept: &Kept, bp: Blueprint) {
        let call = self.call;
        let sequences = call.problem.sequences();
        // Safety: every index lies inside its buffer, as `checked` has found from shapes and strides.
        unsafe {
            sweep::launch_unchecked::<R>(
                self.client,
                cubes(self.client, 2 * sequences * self.value_heads() * bp.value_tiles()),
                CubeDim::new_1d(bp.units() as u32),
                self.read(Some(&call.q)),
                self.read(Some(&call.k)),
                self.read(Some(&call.v)),
                self.read(Some(&from.o)),
                self.states(call.initial_state.as_ref()),
                self.states(from.final_state.as_ref()),
                self.table(),
                records.arg(),
                kept.arg(),
                written_rows(self.client, &to.v),
                call.states(to.initial_state.arg(), Some(&to.initial_state)),
                self.sizes(sequences),
                from.final_state.is_some(),
                bp,
                call.dtypes.data,
            );
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn gradients(
        &self,
        from: &Adjoint<R>,
        to: &Destinations<R>,
        records: &Records,
        kept: &Kept,
        constants: &Buffer,
        parts: Option<&[Buffer; 2]>,
        blocks: usize,
        bp: GradientsBlueprint,
    ) {
        let call = self.call;
        let (client, shape) = (self.client, call.problem.shape());
        // Where heads are grouped each value head writes its own share.
        let (q_part, k_part) = parts.map(|[q, k]| (q, k)).unzip();
        let share = |part: Option<&Buffer>, rows: usize, whole: &Checked<R>| match part {
            Some(part) => {
                let row = (shape.value_heads * shape.key_dim) as u32;
                let strides = StridesLaunch::new(rows as u32 * row, row, shape.key_dim as u32);
                StridedLaunch::new(part.arg(), strides)
            }
            None => written_rows(client, whole),
        };
        let d_g = written(client, to.g.as_ref().unwrap_or(&to.beta));
        let gradients_of = InputGradientsLaunch::new(
            share(q_part, shape.tokens, &to.q),
            share(k_part, call.problem.steps(), &to.k),
            written_rows(client, &to.beta),
            strided(d_g, to.g.as_ref()),
        );
        // Safety: as above.
        unsafe {
            gradients::launch_unchecked::<R>(
                client,
                cubes(client, blocks * self.value_heads()),
                CubeDim::new_1d(bp.units() as u32),
                self.read(Some(&call.q)),
                self.read(Some(&call.k)),
                self.read(Some(&from.o)),
                self.read(Some(&to.v)),
                self.gating(),
                self.table(),
                records.factors(),
                kept.arg(),
                gradients_of,
                constants.arg(),
                self.sizes(call.problem.sequences()),
                blocks as u32,
                records.floats as u32,
                (shape.value_dim / TILE) as u32,
                call.scale(),
                bp,
                self.dtypes(),
            );
        }
    }

    /// Gates of a head.
    fn gates(&self) -> usize {
        let by_channel = self.call.problem.rule().decay == Decay::Channel;
        if by_channel { self.call.problem.shape().key_dim } else { 1 }
    }

    /// Adds the shares of a group's value heads.
    fn collect(&self, parts: &Buffer, out: &Checked<R>, ident: Ident) {
        let problem = self.call.problem;
        let shape = problem.shape();
        let per_row = if ident == Ident::Q { shape.tokens } else { problem.steps() };
        let channels = shape.key_dim / 8;
        let rows = shape.batch * per_row;
        // Safety: as above.
        unsafe {
            collect::launch_unchecked::<R>(
                self.client,
                cubes(self.client, (rows * shape.heads * channels).div_ceil(COLLECT_UNITS)),
                CubeDim::new_1d(COLLECT_UNITS as u32),
                parts.arg(),
                written_rows(self.client, out),
                rows as u32,
                per_row as u32,
                shape.heads as u32,
                self.call.group(),
                channels as u32,
                kernels::SOURCES,
                self.call.dtypes.data,
            );
        }
    }

    fn collect_constants(&self, to: &Destinations<R>, constants: &Buffer, blocks: usize) {
        let Some(a_log) = &to.a_log else { return };
        // Safety: as above.
        unsafe {
            collect_constants::launch_unchecked::<R>(
                self.client,
                cubes(self.client, self.value_heads()),
                CubeDim::new_1d(CONSTANTS_UNITS as u32),
                constants.arg(),
                self.table(),
                a_log.arg(),
                to.dt_bias.as_ref().unwrap_or(a_log).arg(),
                blocks as u32,
                self.call.problem.sequences() as u32,
                self.value_heads() as u32,
                self.gates(),
                to.dt_bias.is_some(),
                self.table.is_some(),
                kernels::SOURCES,
            );
        }
    }
}
