//! The devices that this build can test.

use delta_rule::cubecl::prelude::*;
use delta_rule::gpu::client;

/// Runs `$body` on each backend of this build; skips in the open where a device is missing, fails in CI
/// unless the backend is CUDA, which CI does not have.
macro_rules! on_every_device {
    ($client:ident, $body:block) => {
        #[cfg(feature = "wgpu")]
        if let Some($client) = $crate::devices::open::<delta_rule::cubecl::wgpu::WgpuRuntime>("wgpu", true) $body
        #[cfg(feature = "cuda")]
        if let Some($client) = $crate::devices::open::<delta_rule::cubecl::cuda::CudaRuntime>("cuda", false) $body
    };
}

pub(crate) fn open<R: Runtime>(name: &str, in_ci: bool) -> Option<ComputeClient<R>> {
    if std::env::var("DELTA_RULE_DEVICE").is_ok_and(|only| only != name) {
        crate::sample::skipped(format_args!("{name}: DELTA_RULE_DEVICE names another"));
        return None;
    }
    match client::<R>(&Default::default()) {
        Ok(client) => Some(client),
        Err(e) => {
            let say = if in_ci { crate::sample::missing } else { crate::sample::skipped };
            say(format_args!("{name}: {e}"));
            None
        }
    }
}

pub(crate) use on_every_device;
