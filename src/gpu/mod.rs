//! The front door on CubeCL bindings: kernels on CUDA and WGPU.
//!
//! Everything stays on the device and nothing waits for it: a call checks its arguments and puts its kernels into
//! the stream. Kernel faults therefore surface where CubeCL reports them, at the next `sync`, `flush` or read of
//! the client; on WGPU call `sync` before you trust what you read.
//!
//! There are two sets of kernels, and the call decides from the device and the shapes:
//!
//! - **Tensor cores** (CUDA, sm_90): q, k, v and o in f16 or bf16, K and V multiples of 16, rows that can be read 16
//!   bytes at a time, chunks of 32 (or no choice), and if there is a gate per channel one micro-step per token and rows of
//!   gates that can be read four at a time.
//!   Operands are rounded to the data's type, sums and states are f32. One launch, or two for KDA and where few
//!   heads are dealt out by value channels; these two share scratch of 110 bytes per micro-step and value head
//!   (KDA at K = 128: 900). Long sequences of few heads are split into segments that run at once, in four launches,
//!   with `4 K (K + V)` bytes more for each segment and value head; records and segments together take at most 1 KiB
//!   per micro-step and value head, or there is no split.
//! - **Portable** (every device, every shape): f32, f16 or bf16 data, arithmetic in f32. They take a micro-step at a time, with
//!   the state in registers: one launch, no scratch. Calls whose sequences have at most four micro-steps, as in decoding, take
//!   them too, unless `Options::chunk_size` is 32; a `chunk_size` of 16 asks for them. The backward is theirs alone for what
//!   the tensor cores do not take: see [`backward`](fn@backward).
//!
//! The client keeps scratch for the next call until its `memory_cleanup`.

mod backward;
mod call;
mod device;
mod host;
mod mma;
mod portable;
mod split;
mod tensors;

pub use backward::{DeviceGradients, DeviceOutputGradients, Saved, backward, forward_saving};
pub use device::client;
pub use host::{HostDType, HostError, backward_host, forward_host};
pub use tensors::{DTypes, DeviceInputs, DeviceOutput};

use cubecl::ir::StorageType;
use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;

use crate::{Ident, Options, Problem, Result, StateLayout};
use call::{Call, Outputs};
use tensors::{Role, checked};

/// Computes `o` and the final state into new buffers.
///
/// # Errors
/// See [`forward_into`].
pub fn forward<R: Runtime>(
    client: &ComputeClient<R>,
    problem: &Problem,
    options: &Options,
    inputs: DeviceInputs<R>,
    dtypes: DTypes,
) -> Result<DeviceOutput<R>> {
    let new = |ident, dtype| allocate(client, problem, options, ident, dtype);
    let output =
        DeviceOutput { o: new(Ident::O, dtypes.data)?, final_state: new(Ident::FinalState, f32_type())? };
    let (o, final_state) = (output.o.clone().binding(), output.final_state.clone().binding());
    forward_into(client, problem, options, inputs, dtypes, o, final_state)?;
    Ok(output)
}

/// Computes into the caller's buffers: `o` as `[B, T, HV, V]` in `dtypes.data`, `final_state` as f32
/// `[N, HV, K, V]` (or `[N, HV, V, K]`). They must not overlap the inputs.
///
/// Strides are honoured; the last dimension of q, k, v, o and of a gate per channel must be contiguous.
///
/// # Errors
/// Each names the tensor: [`Error::Shape`](crate::Error::Shape), [`Error::Strides`](crate::Error::Strides),
/// [`Error::DType`](crate::Error::DType) for types that the device or the kernels lack,
/// [`Error::BufferTooSmall`](crate::Error::BufferTooSmall),
/// [`Error::BufferTooLarge`](crate::Error::BufferTooLarge) over the device's binding limit,
/// [`Error::Missing`](crate::Error::Missing) and [`Error::Unused`](crate::Error::Unused),
/// [`Error::ChunkSize`](crate::Error::ChunkSize) unless 16 or 32, and
/// [`Error::Device`](crate::Error::Device) when shared memory does not suffice. Nothing is launched then.
pub fn forward_into<R: Runtime>(
    client: &ComputeClient<R>,
    problem: &Problem,
    options: &Options,
    inputs: DeviceInputs<R>,
    dtypes: DTypes,
    o: TensorBinding<R>,
    final_state: TensorBinding<R>,
) -> Result<()> {
    let call = Call::new(client, problem, options, inputs, dtypes)?;
    let check = |ident, tensor, dtype| checked(client, problem, options, Role::written(ident), tensor, dtype);
    let outputs = Outputs {
        o: check(Ident::O, o, dtypes.data)?,
        final_state: check(Ident::FinalState, final_state, f32_type())?,
    };
    match mma::plan(client, &call, &outputs) {
        Some(plan) => mma::launch(client, &call, &outputs, plan),
        None => portable::forward(client, &call, &outputs),
    }
}

/// A new contiguous tensor; its size is checked before anything of it is allocated.
fn allocate<R: Runtime>(
    client: &ComputeClient<R>,
    problem: &Problem,
    options: &Options,
    ident: Ident,
    dtype: StorageType,
) -> Result<TensorHandle<R>> {
    tensors::check_extent(client, problem, options, ident, dtype)?;
    let shape = device_shape(problem, options, ident);
    let handle = client.empty((shape.iter().product::<usize>() * dtype.size()).max(MIN_BUFFER));
    Ok(TensorHandle::new_contiguous(shape, handle, dtype))
}

/// No buffer is smaller: devices do not bind empty ones.
const MIN_BUFFER: usize = 16;

fn f32_type() -> StorageType {
    f32::as_type_native_unchecked().storage_type()
}

/// The shape of a tensor as the caller holds it, the state's layout included.
fn device_shape(problem: &Problem, options: &Options, ident: Ident) -> Vec<usize> {
    let mut shape = problem.shape_of(ident);
    let is_state = matches!(ident, Ident::InitialState | Ident::FinalState);
    if is_state && options.state_layout == StateLayout::ValueFirst {
        shape.swap(2, 3);
    }
    shape
}
