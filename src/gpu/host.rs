//! The GPU engines on host tensors: uploads, computes, waits and downloads. For tests, examples and first tries.

use cubecl::ir::StorageType;
use cubecl::prelude::*;

use super::{DTypes, DeviceInputs, MIN_BUFFER, f32_type, forward};
use crate::host;
use crate::{Error, Ident, Options, Output, Problem};

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
    inputs.validate(problem, options)?;
    let upload = |ident: Ident, x: &[f32], dtype: HostDType| {
        let shape = super::device_shape(problem, options, ident);
        let mut bytes = dtype.encode(x);
        bytes.resize(bytes.len().max(MIN_BUFFER), 0);
        let handle = client.create_from_slice(&bytes);
        cubecl::std::tensor::TensorHandle::<R>::new_contiguous(shape, handle, dtype.storage_type()).binding()
    };
    let optional = |ident, x: Option<&[f32]>| x.map(|x| upload(ident, x, HostDType::F32));
    DTypes::mixed(dtype.storage_type()).validate(client)?;
    let inputs = DeviceInputs {
        q: upload(Ident::Q, inputs.q, dtype),
        k: upload(Ident::K, inputs.k, dtype),
        v: upload(Ident::V, inputs.v, dtype),
        beta: upload(Ident::Beta, inputs.beta, HostDType::F32),
        g: optional(Ident::G, inputs.g),
        a_log: optional(Ident::ALog, inputs.a_log),
        dt_bias: optional(Ident::DtBias, inputs.dt_bias),
        initial_state: optional(Ident::InitialState, inputs.initial_state),
    };
    let output = forward(client, problem, options, inputs, DTypes::mixed(dtype.storage_type()))?;
    let fault = |e: &dyn std::fmt::Display| HostError::Device(e.to_string());
    // WGPU reports a failed launch here and nowhere else.
    cubecl::future::block_on(client.sync()).map_err(|e| fault(&e))?;
    let download = |handle, ident, dtype: HostDType| {
        let bytes = client.read_one(handle).map_err(|e| fault(&e))?;
        let mut x = dtype.decode(&bytes);
        x.truncate(problem.len_of(ident));
        Ok::<_, HostError>(x)
    };
    Ok(Output {
        o: download(output.o.handle, Ident::O, dtype)?,
        final_state: download(output.final_state.handle, Ident::FinalState, HostDType::F32)?,
    })
}
