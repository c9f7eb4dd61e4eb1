//! The backward on CubeCL bindings.

use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;

use super::call::Call;
use super::tensors::{Checked, DTypes, DeviceInputs, DeviceOutput, Role, checked};
use super::{allocate, f32_type, forward, mma, portable};
use crate::{Ident, Options, Problem, Result};

/// The gradients that flow into a backward call. Strides are honoured, and may be 0 outside the last dimension of
/// `o`, as those of a sum's gradient are.
#[derive(Clone, Debug)]
pub struct DeviceOutputGradients<R: Runtime> {
    /// Gradient of `o`, `[B, T, HV, V]` in [`DTypes::data`].
    pub o: TensorBinding<R>,
    /// Gradient of the final state in f32 and in its layout; absent means 0.
    pub final_state: Option<TensorBinding<R>>,
}

/// The gradients of a call's inputs, each contiguous, in the shape and type of its input.
#[derive(Clone, Debug)]
pub struct DeviceGradients<R: Runtime> {
    /// Gradient of q.
    pub q: TensorHandle<R>,
    /// Gradient of k.
    pub k: TensorHandle<R>,
    /// Gradient of v.
    pub v: TensorHandle<R>,
    /// Gradient of beta (of its logit, if [`Options::beta`] says so).
    pub beta: TensorHandle<R>,
    /// Gradient of g (of the formula's input, if [`Options::gate`] is one); present when the rule decays.
    pub g: Option<TensorHandle<R>>,
    /// Gradient of `a_log`, present when it was given.
    pub a_log: Option<TensorHandle<R>>,
    /// Gradient of `dt_bias`, present when it was given.
    pub dt_bias: Option<TensorHandle<R>>,
    /// Gradient of the initial state in f32, whether or not one was given.
    pub initial_state: TensorHandle<R>,
}

/// What a forward call leaves for its backward: what it was called with, and nothing else.
///
/// States are computed again by the backward, chunk by chunk, so that training keeps no activations but the inputs
/// themselves. The bindings keep their buffers alive; writing to these before the backward changes its result.
#[derive(Clone, Debug)]
pub struct Saved<R: Runtime> {
    /// The rule and the shapes.
    pub problem: Problem,
    /// How it was computed.
    pub options: Options,
    /// The types of the tensors.
    pub dtypes: DTypes,
    /// The inputs.
    pub inputs: DeviceInputs<R>,
}

impl<R: Runtime> Saved<R> {
    /// The gradients of the inputs; see [`backward`].
    ///
    /// # Errors
    /// See [`backward`].
    pub fn backward(
        self,
        client: &ComputeClient<R>,
        output_gradients: DeviceOutputGradients<R>,
    ) -> Result<DeviceGradients<R>> {
        backward(client, &self.problem, &self.options, self.inputs, output_gradients, self.dtypes)
    }
}

/// [`forward`], and what its backward will need.
///
/// # Errors
/// See [`forward_into`](super::forward_into).
pub fn forward_saving<R: Runtime>(
    client: &ComputeClient<R>,
    problem: &Problem,
    options: &Options,
    inputs: DeviceInputs<R>,
    dtypes: DTypes,
) -> Result<(DeviceOutput<R>, Saved<R>)> {
    let output = forward(client, problem, options, inputs.clone(), dtypes)?;
    Ok((output, Saved { problem: problem.clone(), options: options.clone(), dtypes, inputs }))
}

/// Computes the gradients of all inputs from those of `o` and of the final state, into new buffers.
///
/// The fused options are differentiated, too: the gradients are those of what the caller passed (logits of beta,
/// arguments of the gate formula, `a_log`, `dt_bias`, q and k before their norm). The result has the same bits every
/// time. Nothing is read back or waited for.
///
/// Tensor cores take the calls whose forward they take, short ones too, but with gates per channel only up to K = 128; dq, dk
/// and dv must be rows that can be read 16 bytes at a time, as those of new buffers are. Products are rounded to the data's
/// type before they are multiplied again, so that a gradient of g, a sum over a whole state, has an error of some $10^{-3}$
/// of the sums it is the difference of. Scratch is `2 V + K V / 16 + 113` bytes per micro-step and value head (1.4 KB at
/// K = V = 128), with gates per channel `6 K + K / 8` more (2.2 KB; with a gate formula another `K / 8`), and where heads
/// are grouped `4 K`.
///
/// Other calls take the portable kernels. Their scratch is `4 (2 K' V' / C + 2 K' + 2 V' + 3)` bytes per micro-step and
/// value head, nearly, K' being K rounded up to 32, V' V rounded up to the channels of whole cubes, and C the chunk
/// size of 32 (6.2 KB at K = V = 128), in passes over the heads of at most 2 GiB.
///
/// # Errors
/// As [`forward_into`](super::forward_into), and for gradients of the wrong shape, type or size.
pub fn backward<R: Runtime>(
    client: &ComputeClient<R>,
    problem: &Problem,
    options: &Options,
    inputs: DeviceInputs<R>,
    output_gradients: DeviceOutputGradients<R>,
    dtypes: DTypes,
) -> Result<DeviceGradients<R>> {
    let call = Call::new(client, problem, options, inputs, dtypes)?;
    let read = |role, tensor, dtype| checked(client, problem, options, role, tensor, dtype);
    let d_state = Role::gradient(Ident::FinalState, "gradient of final_state");
    let from = Adjoint {
        o: read(Role::gradient(Ident::O, "gradient of o"), output_gradients.o, dtypes.data)?,
        final_state: output_gradients.final_state.map(|t| read(d_state, t, f32_type())).transpose()?,
    };
    let new = |ident, dtype| allocate(client, problem, options, ident, dtype);
    let given =
        |input: &Option<Checked<R>>, ident, dtype| input.as_ref().map(|_| new(ident, dtype)).transpose();
    let f32 = f32_type();
    let gradients = DeviceGradients {
        q: new(Ident::Q, dtypes.data)?,
        k: new(Ident::K, dtypes.data)?,
        v: new(Ident::V, dtypes.data)?,
        beta: new(Ident::Beta, dtypes.beta)?,
        g: given(&call.g, Ident::G, dtypes.gate)?,
        a_log: given(&call.a_log, Ident::ALog, f32)?,
        dt_bias: given(&call.dt_bias, Ident::DtBias, f32)?,
        initial_state: new(Ident::InitialState, f32)?,
    };
    let write = |ident, tensor: &TensorHandle<R>| {
        let role = Role::written(ident);
        checked(client, problem, options, role, tensor.clone().binding(), tensor.dtype)
    };
    let maybe = |ident, tensor: &Option<TensorHandle<R>>| {
        tensor.as_ref().map(|tensor| write(ident, tensor)).transpose()
    };
    let to = Destinations {
        q: write(Ident::Q, &gradients.q)?,
        k: write(Ident::K, &gradients.k)?,
        v: write(Ident::V, &gradients.v)?,
        beta: write(Ident::Beta, &gradients.beta)?,
        g: maybe(Ident::G, &gradients.g)?,
        a_log: maybe(Ident::ALog, &gradients.a_log)?,
        dt_bias: maybe(Ident::DtBias, &gradients.dt_bias)?,
        initial_state: write(Ident::InitialState, &gradients.initial_state)?,
    };
    match mma::plan_backward(client, &call, &from, &to) {
        Some(plan) => mma::backward(client, &call, &from, &to, plan)?,
        None => portable::backward(client, &call, &from, &to)?,
    }
    Ok(gradients)
}

/// Output gradients that fit the problem and their buffers.
pub(super) struct Adjoint<R: Runtime> {
    pub(super) o: Checked<R>,
    pub(super) final_state: Option<Checked<R>>,
}

/// Where the gradients go.
pub(super) struct Destinations<R: Runtime> {
    pub(super) q: Checked<R>,
    pub(super) k: Checked<R>,
    pub(super) v: Checked<R>,
    pub(super) beta: Checked<R>,
    pub(super) g: Option<Checked<R>>,
    pub(super) a_log: Option<Checked<R>>,
    pub(super) dt_bias: Option<Checked<R>>,
    pub(super) initial_state: Checked<R>,
}
