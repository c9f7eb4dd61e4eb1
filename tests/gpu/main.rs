//! The kernels on real devices: WGPU (lavapipe in CI), and CUDA where there is one.

#![cfg(feature = "gpu")]

mod backward;
mod devices;
mod forward;
#[path = "../sample/mod.rs"]
mod sample;
