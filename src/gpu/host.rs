//! The GPU engines on host tensors: uploads, computes, waits and downloads. For tests, examples and first tries.

use cubecl::ir::StorageType;
use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;

use super::{DTypes, DeviceInputs, DeviceOutputGradients, MIN_BUFFER, backward, f32_type, forward};
use crate::host;
use crate::{Error, Gradients, Ident, Options, Output, Problem};

/// The type of q, k, v and o on the device; beta and g stay f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HostDType {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16; CUDA only.
    Bf16,
}

impl HostDType {
    /// CubeCL's name for the type.
    pub fn storage_type(self) -> StorageType {
        match self {
            HostDType::F32 => f32_type(),
            HostDType::F16 => half::f16::as_type_native_unchecked().storage_type(),
            HostDType::Bf16 => half::bf16::as_type_native_unchecked().storage_type(),
        }
    }

    fn encode(self, x: &[f32]) -> Vec<u8> {
        match self {
            HostDType::F32 => x.iter().flat_map(|x| x.to_ne_bytes()).collect(),
            HostDType::F16 => x.iter().flat_map(|&x| half::f16::from_f32(x).to_ne_bytes()).collect(),
            HostDType::Bf16 => x.iter().flat_map(|&x| half::bf16::from_f32(x).to_ne_bytes()).collect(),
        }
    }

    fn decode(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            HostDType::F32 => {
                bytes.chunks_exact(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
            HostDType::F16 => {
                bytes.chunks_exact(2).map(|b| half::f16::from_ne_bytes([b[0], b[1]]).to_f32()).collect()
            }
            HostDType::Bf16 => {
                bytes.chunks_exact(2).map(|b| half::bf16::from_ne_bytes([b[0], b[1]]).to_f32()).collect()
            }
        }
    }
}

/// A refused call, or a fault of the device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// The call was refused before anything was launched.
    #[error(transparent)]
    Refused(#[from] Error),
    /// The device reported a fault.
    #[error("the device failed: {0}")]
    Device(String),
}

/// Runs [`forward`] on host tensors and waits for the result.
///
/// # Errors
/// [`HostError::Refused`] as [`forward`] refuses, [`HostError::Device`] when a kernel failed.
pub fn forward_host<R: Runtime>(
    client: &ComputeClient<R>,
    dtype: HostDType,
    problem: &Problem,
    options: &Options,
    inputs: &host::Inputs<'_, f32>,
) -> Result<Output<f32>, HostError> {
    let on = Transfer { client, dtype, problem, options };
    let inputs = on.inputs(inputs)?;
    let output = forward(client, problem, options, inputs, on.dtypes())?;
    on.wait()?;
    Ok(Output {
        o: on.download(output.o, Ident::O)?,
        final_state: on.download(output.final_state, Ident::FinalState)?,
    })
}

/// Runs [`backward`] on host tensors and waits for the result.
///
/// # Errors
/// [`HostError::Refused`] as [`backward`] refuses, [`HostError::Device`] when a kernel failed.
pub fn backward_host<R: Runtime>(
    client: &ComputeClient<R>,
    dtype: HostDType,
    problem: &Problem,
    options: &Options,
    inputs: &host::Inputs<'_, f32>,
    output_gradients: &host::OutputGradients<'_, f32>,
) -> Result<Gradients<f32>, HostError> {
    let on = Transfer { client, dtype, problem, options };
    let device_inputs = on.inputs(inputs)?;
    output_gradients.validate(problem)?;
    let upstream = DeviceOutputGradients {
        o: on.upload(Ident::O, output_gradients.o),
        final_state: output_gradients.final_state.map(|d| on.upload(Ident::FinalState, d)),
    };
    let gradients = backward(client, problem, options, device_inputs, upstream, on.dtypes())?;
    on.wait()?;
    let maybe = |tensor: Option<_>, ident| tensor.map(|t| on.download(t, ident)).transpose();
    Ok(Gradients {
        q: on.download(gradients.q, Ident::Q)?,
        k: on.download(gradients.k, Ident::K)?,
        v: on.download(gradients.v, Ident::V)?,
        beta: on.download(gradients.beta, Ident::Beta)?,
        g: maybe(gradients.g, Ident::G)?,
        a_log: maybe(gradients.a_log, Ident::ALog)?,
        dt_bias: maybe(gradients.dt_bias, Ident::DtBias)?,
        initial_state: on.download(gradients.initial_state, Ident::InitialState)?,
    })
}

/// Tensors between host and device: q, k, v and o in `dtype`, the others in f32.
struct Transfer<'a, R: Runtime> {
    client: &'a ComputeClient<R>,
    dtype: HostDType,
    problem: &'a Problem,
    options: &'a Options,
}

impl<R: Runtime> Transfer<'_, R> {
    fn dtypes(&self) -> DTypes {
        DTypes::mixed(self.dtype.storage_type())
    }

    fn dtype_of(&self, ident: Ident) -> HostDType {
        match ident {
            Ident::Q | Ident::K | Ident::V | Ident::O => self.dtype,
            _ => HostDType::F32,
        }
    }

    /// Checks before anything is copied.
    fn inputs(&self, inputs: &host::Inputs<'_, f32>) -> Result<DeviceInputs<R>, HostError> {
        inputs.validate(self.problem, self.options)?;
        self.dtypes().validate(self.client)?;
        let optional = |ident, x: Option<&[f32]>| x.map(|x| self.upload(ident, x));
        Ok(DeviceInputs {
            q: self.upload(Ident::Q, inputs.q),
            k: self.upload(Ident::K, inputs.k),
            v: self.upload(Ident::V, inputs.v),
            beta: self.upload(Ident::Beta, inputs.beta),
            g: optional(Ident::G, inputs.g),
            a_log: optional(Ident::ALog, inputs.a_log),
            dt_bias: optional(Ident::DtBias, inputs.dt_bias),
            initial_state: optional(Ident::InitialState, inputs.initial_state),
        })
    }

    fn upload(&self, ident: Ident, x: &[f32]) -> TensorBinding<R> {
        let dtype = self.dtype_of(ident);
        let shape = super::device_shape(self.problem, self.options, ident);
        let mut bytes = dtype.encode(x);
        bytes.resize(bytes.len().max(MIN_BUFFER), 0);
        let handle = self.client.create_from_slice(&bytes);
        TensorHandle::<R>::new_contiguous(shape, handle, dtype.storage_type()).binding()
    }

    /// WGPU reports a failed launch here and nowhere else.
    fn wait(&self) -> Result<(), HostError> {
        cubecl::future::block_on(self.client.sync()).map_err(|e| HostError::Device(e.to_string()))
    }

    fn download(&self, tensor: TensorHandle<R>, ident: Ident) -> Result<Vec<f32>, HostError> {
        let bytes = self.client.read_one(tensor.handle).map_err(|e| HostError::Device(e.to_string()))?;
        let mut x = self.dtype_of(ident).decode(&bytes);
        x.truncate(self.problem.len_of(ident));
        Ok(x)
    }
}
