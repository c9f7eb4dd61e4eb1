//! A checked call, and what both kinds of kernels need of it.

use cubecl::ir::StorageType;
use cubecl::prelude::*;
use cubecl::server::Handle;
use delta_rule_kernels::{
    self as kernels, GateFormulaLaunch, GatingLaunch, Spec, StateStridesLaunch, StatesLaunch, StridedLaunch,
    StridesLaunch,
};

use super::split::inner_segments;
use super::tensors::{Checked, DTypes, DeviceInputs, Role, checked};
use super::{MIN_BUFFER, f32_type};
use crate::host::check_presence;
use crate::{BetaTransform, Decay, Error, GateTransform, Ident, Options, Problem, Result, StateLayout};

/// Arguments that fit each other and their buffers.
pub(super) struct Call<'a, R: Runtime> {
    pub(super) problem: &'a Problem,
    pub(super) options: &'a Options,
    pub(super) dtypes: DTypes,
    pub(super) q: Checked<R>,
    pub(super) k: Checked<R>,
    pub(super) v: Checked<R>,
    pub(super) beta: Checked<R>,
    pub(super) g: Option<Checked<R>>,
    pub(super) a_log: Option<Checked<R>>,
    pub(super) dt_bias: Option<Checked<R>>,
    pub(super) initial_state: Option<Checked<R>>,
}

/// Where a forward writes.
pub(super) struct Outputs<R: Runtime> {
    pub(super) o: Checked<R>,
    pub(super) final_state: Checked<R>,
}

impl<'a, R: Runtime> Call<'a, R> {
    /// Checks the inputs of a call.
    pub(super) fn new(
        client: &ComputeClient<R>,
        problem: &'a Problem,
        options: &'a Options,
        inputs: DeviceInputs<R>,
        dtypes: DTypes,
    ) -> Result<Self> {
        options.validate()?;
        let given = [inputs.g.is_some(), inputs.a_log.is_some(), inputs.dt_bias.is_some()];
        check_presence(problem, options, given)?;
        dtypes.validate(client)?;
        let check =
            |ident: Ident, tensor, dtype| checked(client, problem, options, Role::read(ident), tensor, dtype);
        let optional = |ident, tensor: Option<TensorBinding<R>>, dtype| {
            tensor.map(|tensor| check(ident, tensor, dtype)).transpose()
        };
        let f32 = f32_type();
        Ok(Self {
            problem,
            options,
            dtypes,
            q: check(Ident::Q, inputs.q, dtypes.data)?,
            k: check(Ident::K, inputs.k, dtypes.data)?,
            v: check(Ident::V, inputs.v, dtypes.data)?,
            beta: check(Ident::Beta, inputs.beta, dtypes.beta)?,
            g: optional(Ident::G, inputs.g, dtypes.gate)?,
            a_log: optional(Ident::ALog, inputs.a_log, f32)?,
            dt_bias: optional(Ident::DtBias, inputs.dt_bias, f32)?,
            initial_state: optional(Ident::InitialState, inputs.initial_state, f32)?,
        })
    }

    /// What the kernels compute.
    pub(super) fn spec(&self) -> Spec {
        let shape = self.problem.shape();
        Spec {
            decay: match self.problem.rule().decay {
                Decay::None => kernels::Decay::None,
                Decay::Head => kernels::Decay::Head,
                Decay::Channel => kernels::Decay::Channel,
            },
            micro_steps: self.problem.rule().micro_steps,
            key_dim: shape.key_dim,
            value_dim: shape.value_dim,
            qk_l2norm: self.options.qk_l2norm,
            beta: match self.options.beta {
                BetaTransform::Identity => kernels::BetaMap::Identity,
                BetaTransform::Sigmoid => kernels::BetaMap::Sigmoid,
                BetaTransform::TwoSigmoid => kernels::BetaMap::TwoSigmoid,
            },
            gate: match self.options.gate {
                GateTransform::Identity => kernels::GateMap::Identity,
                GateTransform::Softplus => kernels::GateMap::Softplus,
                GateTransform::Bounded { .. } => kernels::GateMap::Bounded,
            },
            has_bias: self.dt_bias.is_some(),
            has_initial_state: self.initial_state.is_some(),
            sources: kernels::SOURCES,
        }
    }

    /// Value heads per key head.
    pub(super) fn group(&self) -> u32 {
        (self.problem.shape().value_heads / self.problem.shape().heads) as u32
    }

    pub(super) fn scale(&self) -> f32 {
        self.options.scale_for(self.problem.shape().key_dim) as f32
    }

    fn lower_bound(&self) -> f32 {
        match self.options.gate {
            GateTransform::Bounded { lower_bound } => lower_bound as f32,
            _ => 0.0,
        }
    }

    /// Whether no sequence has more than a few micro-steps, as in decoding: moving the states is all that takes time then. The
    /// limit was found on an H200 (`docs/performance.md`).
    pub(super) fn is_short(&self) -> bool {
        const FEW: usize = 4;
        let longest = (0..self.problem.sequences()).map(|n| self.problem.sequence(n).len).max();
        longest.unwrap_or(0) * self.problem.rule().micro_steps <= FEW
    }

    /// States that lie in `data` in the caller's layout.
    pub(super) fn states<T: CubePrimitive>(
        &self,
        data: ArrayArg<R>,
        states: Option<&Checked<R>>,
    ) -> StatesLaunch<T, R> {
        let s = states.map_or(vec![0; 4], |t| t.strides.clone());
        let (k, v) = match self.options.state_layout {
            StateLayout::KeyFirst => (s[2], s[3]),
            StateLayout::ValueFirst => (s[3], s[2]),
        };
        StatesLaunch::new(data, StateStridesLaunch::new(s[0], s[1], k, v))
    }
}

/// How the launches of a call bind what they read.
pub(super) trait Binds<R: Runtime> {
    fn call(&self) -> &Call<'_, R>;

    /// Bound where nothing is read.
    fn unused(&self) -> ArrayArg<R>;

    /// A tensor of no elements has no buffer that could be bound, and one that is absent is never read.
    fn arg(&self, tensor: Option<&Checked<R>>) -> ArrayArg<R> {
        match tensor {
            Some(t) if t.elements > 0 => t.arg(),
            _ => self.unused(),
        }
    }

    /// The same with its strides.
    fn read<T: CubePrimitive>(&self, tensor: Option<&Checked<R>>) -> StridedLaunch<T, R> {
        strided(self.arg(tensor), tensor)
    }

    /// Beta and g, and what their formulas take.
    fn gating<B: CubePrimitive, G: CubePrimitive>(&self) -> GatingLaunch<B, G, R> {
        let call = self.call();
        let (a_log, dt_bias) = (self.arg(call.a_log.as_ref()), self.arg(call.dt_bias.as_ref()));
        let formula = GateFormulaLaunch::new(a_log, dt_bias, call.lower_bound());
        GatingLaunch::new(self.read(Some(&call.beta)), self.read(call.g.as_ref()), formula)
    }

    /// States that are read.
    fn states<T: CubePrimitive>(&self, states: Option<&Checked<R>>) -> StatesLaunch<T, R> {
        self.call().states(self.arg(states), states)
    }

    fn dtypes(&self) -> [StorageType; 3] {
        let DTypes { data, beta, gate, .. } = self.call().dtypes;
        [data, beta, gate]
    }
}

/// A tensor that is written; without elements there is nowhere to write and nothing is.
pub(super) fn written<R: Runtime>(client: &ComputeClient<R>, t: &Checked<R>) -> ArrayArg<R> {
    if t.elements > 0 { t.arg() } else { array(&client.empty(MIN_BUFFER), 1) }
}

/// The same with its strides.
pub(super) fn written_rows<T: CubePrimitive, R: Runtime>(
    client: &ComputeClient<R>,
    t: &Checked<R>,
) -> StridedLaunch<T, R> {
    strided(written(client, t), Some(t))
}

/// A tensor `[B, T, H, ..]` that lies in `data`.
pub(super) fn strided<T: CubePrimitive, R: Runtime>(
    data: ArrayArg<R>,
    t: Option<&Checked<R>>,
) -> StridedLaunch<T, R> {
    let [b, t, h] = t.map_or([0; 3], |t| [t.strides[0], t.strides[1], t.strides[2]]);
    StridedLaunch::new(data, StridesLaunch::new(b, t, h))
}

pub(super) fn array<R: Runtime>(handle: &Handle, len: usize) -> ArrayArg<R> {
    // Safety: callers pass the length with which they allocated.
    unsafe { ArrayArg::from_raw_parts(handle.clone(), len) }
}

/// The sequences of a call, or their segments, cut into chunks of micro-steps.
pub(super) struct Table {
    /// `[row, first token, tokens, first chunk]` of every segment, then the segment of every chunk, then where the
    /// inner segments of every sequence begin and those of the last end. The last segment of sequence n is
    /// segment n; the inner ones, with others behind them, follow sequence by sequence.
    pub(super) entries: Vec<u32>,
    pub(super) segments: usize,
    pub(super) chunks: usize,
}

impl Table {
    /// Whole sequences.
    pub(super) fn new(problem: &Problem, chunk: usize) -> Result<Self> {
        Self::split(problem, chunk, usize::MAX / chunk)
    }

    /// Segments of `segment` chunks, which hold whole tokens, and what remains.
    pub(super) fn split(problem: &Problem, chunk: usize, segment: usize) -> Result<Self> {
        let sequences = problem.sequences();
        let n_h = problem.rule().micro_steps;
        let chunks_of = |n| (problem.sequence(n).len * n_h).div_ceil(chunk);
        let inner_of = |n| inner_segments(chunks_of(n), segment);
        let chunks: usize = (0..sequences).map(chunks_of).sum();
        let segments = sequences + (0..sequences).map(inner_of).sum::<usize>();
        let len = 4 * segments as u64 + chunks as u64 + sequences as u64 + 1;
        if len > u32::MAX as u64 {
            return Err(too_large(4 * len, 4 * u32::MAX as u64));
        }
        let tokens = segment * chunk / n_h;
        let (mut last, mut inner) = (Vec::with_capacity(len as usize), Vec::new());
        let (mut of_chunk, mut ranges) = (Vec::with_capacity(chunks), vec![sequences as u32]);
        for n in 0..sequences {
            let s = problem.sequence(n);
            let entry = |i: usize, len: usize, chunk: usize| {
                [s.row as u32, (s.start + i * tokens) as u32, len as u32, chunk as u32]
            };
            let first = of_chunk.len();
            for i in 0..inner_of(n) {
                inner.extend(entry(i, tokens, first + i * segment));
                of_chunk.extend(std::iter::repeat_n(ranges[n] + i as u32, segment));
            }
            last.extend(entry(inner_of(n), s.len - inner_of(n) * tokens, of_chunk.len()));
            of_chunk.resize(first + chunks_of(n), n as u32);
            ranges.push(ranges[n] + inner_of(n) as u32);
        }
        let mut entries = last;
        entries.extend(inner);
        entries.extend(of_chunk);
        entries.extend(ranges);
        Ok(Self { entries, segments, chunks })
    }

    pub(super) fn upload<R: Runtime>(&self, client: &ComputeClient<R>) -> Handle {
        let bytes: Vec<u8> = self.entries.iter().flat_map(|x| x.to_ne_bytes()).collect();
        client.create_from_slice(&bytes)
    }
}

pub(super) fn too_large(bytes: u64, limit: u64) -> Error {
    Error::BufferTooLarge { tensor: "scratch", bytes, limit }
}

/// A grid of at least `n` cubes, numbered along x, then y.
pub(super) fn cubes<R: Runtime>(client: &ComputeClient<R>, n: usize) -> CubeCount {
    let x = n.clamp(1, client.properties().hardware.max_cube_count.0 as usize);
    CubeCount::Static(x as u32, n.div_ceil(x).max(1) as u32, 1)
}

/// A grid of `each` cubes for every sequence: these along x, sequences along y, then z.
pub(super) fn cubes_by_sequence<R: Runtime>(
    client: &ComputeClient<R>,
    sequences: usize,
    each: usize,
) -> CubeCount {
    let y = sequences.clamp(1, client.properties().hardware.max_cube_count.1 as usize);
    CubeCount::Static(each as u32, y as u32, sequences.div_ceil(y).max(1) as u32)
}
