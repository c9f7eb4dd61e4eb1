//! Opening a device without a panic.

use std::panic::{AssertUnwindSafe, catch_unwind};

use cubecl::prelude::*;

use crate::{Error, Result};

/// A client of `device`, or [`Error::Device`] when there is no driver or adapter for it. `R::client` panics then;
/// the panic is caught here, its message still goes to the panic hook.
///
/// # Errors
/// [`Error::Device`] when the device cannot be opened.
pub fn client<R: Runtime>(device: &R::Device) -> Result<ComputeClient<R>> {
    catch_unwind(AssertUnwindSafe(|| R::client(device))).map_err(|cause| {
        let what = cause
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| cause.downcast_ref::<&str>().copied())
            .and_then(|message| message.lines().next())
            .unwrap_or("it cannot be opened");
        Error::Device { what: format!("it did not open; is its driver installed? ({what})") }
    })
}
