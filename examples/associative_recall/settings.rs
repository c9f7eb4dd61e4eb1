//! What the command line asked for, and the device it leads to.

use std::ffi::OsString;

use crate::args::{self, Result};
use crate::device::Device;

pub(crate) const USAGE: &str = "\
usage: associative_recall [flags]
Writes key-value pairs into the state of every rule and reads them back; nothing is trained.

  --device auto|cpu|wgpu|cuda  where to run (auto: CUDA, else WGPU, else the CPU)
  --key-dim N                  channels of a key, 16 to 256 (64)
  --seed N                     of the random keys and values (0)

Exit status: 0 every claim held, 1 one did not, 2 nothing could be run.
";

pub(crate) struct Settings {
    pub(crate) device: Device,
    /// Why that device.
    pub(crate) why: String,
    pub(crate) key_dim: usize,
    pub(crate) seed: u64,
}

impl Settings {
    /// `None`: help was asked for.
    pub(crate) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Option<Self>> {
        let Some((positional, flags)) = args::split(args, &["device", "key-dim", "seed"])? else {
            return Ok(None);
        };
        if let Some(stray) = positional.first() {
            return Err(format!("unexpected argument {stray:?}").into());
        }
        let asked = flags.get("device", |text| match text {
            "auto" => Ok(None),
            _ => match Device::parse(text) {
                Ok(device) => Ok(Some(device)),
                Err(_) => Err("unknown device; there are auto, cpu, wgpu and cuda".into()),
            },
        })?;
        let key_dim = flags.get("key-dim", |text| args::number(text, 16, 256))?.unwrap_or(64) as usize;
        let seed = flags.get("seed", |text| args::number(text, 0, u64::MAX))?.unwrap_or(0);
        let (device, why) = match asked.flatten() {
            Some(device) => {
                device.available()?;
                (device, "asked for".to_string())
            }
            None => choose(),
        };
        Ok(Some(Self { device, why, key_dim, seed }))
    }
}

fn choose() -> (Device, String) {
    let mut reasons = Vec::new();
    for device in [Device::Cuda, Device::Wgpu] {
        match device.available() {
            Ok(()) => {
                reasons.push(format!("{} is available", device.name()));
                return (device, reasons.join("; "));
            }
            Err(reason) => reasons.push(reason.to_string()),
        }
    }
    (Device::Cpu, reasons.join("; "))
}
