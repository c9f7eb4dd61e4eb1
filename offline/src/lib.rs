//! Compiles the CUDA kernels of `delta-rule` on a machine without a GPU.
//!
//! [`OfflineCuda`] is a CubeCL runtime with the properties of an H200. Launching a kernel on it runs CubeCL's
//! own CUDA code generator and keeps the CUDA C++; after [`emulate`] it also runs on this CPU. [`compile`] then does what CubeCL does on a
//! real device, NVRTC with the same options, and `ptxas`, which tells registers, spills and shared memory.

mod emulate;
mod nvrtc;
mod runtime;

pub use emulate::can_emulate;
pub use nvrtc::{Compiled, compile, toolchain};
pub use runtime::{Generated, OfflineCuda, emulate, take_generated};
