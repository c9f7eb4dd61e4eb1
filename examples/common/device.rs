//! The one place that knows which devices this build can reach.

use delta_rule::{Gradients, Inputs, Options, Output, OutputGradients, Problem, chunk};

use crate::args::Result;

/// Where the chunk engine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Device {
    Cpu,
    Wgpu,
    Cuda,
}

/// What q, k and v are stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DType {
    F64,
    F32,
    F16,
    Bf16,
}

impl DType {
    pub(crate) fn parse(text: &str) -> Result<Self> {
        match text {
            "f64" => Ok(Self::F64),
            "f32" => Ok(Self::F32),
            "f16" => Ok(Self::F16),
            "bf16" => Ok(Self::Bf16),
            _ => Err("unknown type; there are f64, f32, f16 and bf16".into()),
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::F64 => "f64",
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
}

impl Device {
    pub(crate) fn parse(text: &str) -> Result<Self> {
        match text {
            "cpu" => Ok(Self::Cpu),
            "wgpu" => Ok(Self::Wgpu),
            "cuda" => Ok(Self::Cuda),
            _ => Err("unknown device; there are cpu, wgpu and cuda".into()),
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Wgpu => "wgpu",
            Self::Cuda => "cuda",
        }
    }

    /// Whether [`forward`] can run here, and if not, why.
    pub(crate) fn available(self) -> Result<()> {
        match self {
            Self::Cpu => Ok(()),
            #[cfg(feature = "wgpu")]
            Self::Wgpu => quietly(|| Ok(backend::wgpu().map(drop)?)),
            #[cfg(feature = "cuda")]
            Self::Cuda => quietly(|| Ok(backend::cuda().map(drop)?)),
            #[allow(unreachable_patterns, reason = "a build with both backends has no arm left")]
            Self::Wgpu | Self::Cuda => Err(self.not_built()),
        }
    }

    #[cfg_attr(all(feature = "wgpu", feature = "cuda"), allow(dead_code, reason = "both are built"))]
    fn not_built(self) -> Box<dyn std::error::Error> {
        let name = self.name();
        format!("this build has no {name}: build the example with --features {name}").into()
    }
}

/// The chunk engine on `device`, with q, k and v stored as `dtype`; f64 is for the host engines alone.
pub(crate) fn forward(
    device: Device,
    dtype: DType,
    problem: &Problem,
    options: &Options,
    inputs: &Inputs<f32>,
) -> Result<Output<f32>> {
    match (device, dtype) {
        (Device::Cpu, DType::F32) => Ok(chunk::forward(problem, options, inputs)?),
        (Device::Cpu, _) => Err(format!("device cpu does not take {} here", dtype.name()).into()),
        #[cfg(feature = "wgpu")]
        (Device::Wgpu, _) => backend::forward(&quietly(backend::wgpu)?, dtype, problem, options, inputs),
        #[cfg(feature = "cuda")]
        (Device::Cuda, _) => backend::forward(&quietly(backend::cuda)?, dtype, problem, options, inputs),
        #[allow(unreachable_patterns, reason = "a build with both backends has no arm left")]
        (Device::Wgpu | Device::Cuda, _) => Err(device.not_built()),
    }
}

/// The gradients of the same call; that of `o` is stored as `dtype`, too.
#[allow(dead_code, reason = "not every example goes back")]
pub(crate) fn backward(
    device: Device,
    dtype: DType,
    problem: &Problem,
    options: &Options,
    inputs: &Inputs<f32>,
    upstream: &OutputGradients<f32>,
) -> Result<Gradients<f32>> {
    match (device, dtype) {
        (Device::Cpu, DType::F32) => Ok(chunk::backward(problem, options, inputs, upstream)?),
        (Device::Cpu, _) => Err(format!("device cpu does not take {} here", dtype.name()).into()),
        #[cfg(feature = "wgpu")]
        (Device::Wgpu, _) => {
            backend::backward(&quietly(backend::wgpu)?, dtype, problem, options, inputs, upstream)
        }
        #[cfg(feature = "cuda")]
        (Device::Cuda, _) => {
            backend::backward(&quietly(backend::cuda)?, dtype, problem, options, inputs, upstream)
        }
        #[allow(unreachable_patterns, reason = "a build with both backends has no arm left")]
        (Device::Wgpu | Device::Cuda, _) => Err(device.not_built()),
    }
}

/// Keeps the panic of a driver that is not there off the screen: the caller says it in one line.
#[cfg(feature = "gpu")]
fn quietly<T>(open: impl FnOnce() -> T) -> T {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let result = open();
    std::panic::set_hook(hook);
    result
}

#[cfg(feature = "gpu")]
mod backend {
    use delta_rule::cubecl::prelude::*;
    use delta_rule::gpu::{HostDType, backward_host, forward_host};
    use delta_rule::{Gradients, Inputs, Options, Output, OutputGradients, Problem};

    use super::DType;
    use crate::args::Result;

    #[cfg(feature = "wgpu")]
    pub(super) fn wgpu() -> delta_rule::Result<ComputeClient<delta_rule::cubecl::wgpu::WgpuRuntime>> {
        delta_rule::gpu::client(&Default::default())
    }

    #[cfg(feature = "cuda")]
    pub(super) fn cuda() -> delta_rule::Result<ComputeClient<delta_rule::cubecl::cuda::CudaRuntime>> {
        delta_rule::gpu::client(&Default::default())
    }

    pub(super) fn forward<R: Runtime>(
        client: &ComputeClient<R>,
        dtype: DType,
        problem: &Problem,
        options: &Options,
        inputs: &Inputs<f32>,
    ) -> Result<Output<f32>> {
        Ok(forward_host(client, on_device(dtype)?, problem, options, inputs)?)
    }

    #[allow(dead_code, reason = "not every example goes back")]
    pub(super) fn backward<R: Runtime>(
        client: &ComputeClient<R>,
        dtype: DType,
        problem: &Problem,
        options: &Options,
        inputs: &Inputs<f32>,
        upstream: &OutputGradients<f32>,
    ) -> Result<Gradients<f32>> {
        Ok(backward_host(client, on_device(dtype)?, problem, options, inputs, upstream)?)
    }

    fn on_device(dtype: DType) -> Result<HostDType> {
        match dtype {
            DType::F32 => Ok(HostDType::F32),
            DType::F16 => Ok(HostDType::F16),
            DType::Bf16 => Ok(HostDType::Bf16),
            DType::F64 => Err("the GPU engines do not take f64".into()),
        }
    }
}
