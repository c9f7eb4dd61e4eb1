//! A checked call, and what both kinds of kernels need of it.

use cubecl::prelude::*;
use cubecl::server::Handle;
use delta_rule_kernels::{self as kernels, Spec, StateStridesLaunch, StridesLaunch};

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
        }
    }

    /// Value heads per key head.
    pub(super) fn group(&self) -> u32 {
        (self.problem.shape().value_heads / self.problem.shape().heads) as u32
    }

    pub(super) fn scale(&self) -> f32 {
        self.options.scale_for(self.problem.shape().key_dim) as f32
    }

    pub(super) fn lower_bound(&self) -> f32 {
        match self.options.gate {
            GateTransform::Bounded { lower_bound } => lower_bound as f32,
            _ => 0.0,
        }
    }

    pub(super) fn state_strides(&self, state: Option<&Checked<R>>) -> StateStridesLaunch<R> {
        let s = state.map_or(vec![0; 4], |t| t.strides.clone());
        let (k, v) = match self.options.state_layout {
            StateLayout::KeyFirst => (s[2], s[3]),
            StateLayout::ValueFirst => (s[3], s[2]),
        };
        StateStridesLaunch::new(s[0], s[1], k, v)
    }
}

/// A tensor that is written; without elements there is nowhere to write and nothing is.
pub(super) fn written<R: Runtime>(client: &ComputeClient<R>, t: &Checked<R>) -> ArrayArg<R> {
    if t.elements > 0 { t.arg() } else { array(&client.empty(MIN_BUFFER), 1) }
}

/// Strides of `[B, T, H, ..]`.
pub(super) fn strides<R: Runtime>(t: Option<&Checked<R>>) -> StridesLaunch<R> {
    let [b, t, h] = t.map_or([0; 3], |t| [t.strides[0], t.strides[1], t.strides[2]]);
    StridesLaunch::new(b, t, h)
}

pub(super) fn array<R: Runtime>(handle: &Handle, len: usize) -> ArrayArg<R> {
    // Safety: callers pass the length with which they allocated.
    unsafe { ArrayArg::from_raw_parts(handle.clone(), len) }
}

/// The sequences of a call, cut into chunks of micro-steps.
pub(super) struct Table {
    /// `[row, first token, tokens, first chunk]` of every sequence, then the sequence of every chunk.
    pub(super) entries: Vec<u32>,
    pub(super) chunks: usize,
}

impl Table {
    pub(super) fn new(problem: &Problem, chunk: usize) -> Result<Self> {
        let chunks_of = |n| (problem.sequence(n).len * problem.rule().micro_steps).div_ceil(chunk);
        let chunks: usize = (0..problem.sequences()).map(chunks_of).sum();
        let len = 4 * problem.sequences() as u64 + chunks as u64;
        if len > u32::MAX as u64 {
            return Err(too_large(4 * len, 4 * u32::MAX as u64));
        }
        let mut entries = Vec::with_capacity(len as usize);
        let mut first = 0;
        for n in 0..problem.sequences() {
            let s = problem.sequence(n);
            entries.extend([s.row as u32, s.start as u32, s.len as u32, first]);
            first += chunks_of(n) as u32;
        }
        for n in 0..problem.sequences() {
            entries.extend(std::iter::repeat_n(n as u32, chunks_of(n)));
        }
        Ok(Self { entries, chunks })
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
