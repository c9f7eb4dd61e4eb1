//! What the command line asked for.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::args::{self, Result};
use crate::device::{DType, Device};

pub(crate) const USAGE: &str = "\
usage: run_case FILE.safetensors [flags]
Runs one stored problem and compares every result with the truth in the file.

  --device cpu|wgpu|cuda     where to run (cpu)
  --engine reference|chunk   token loop, or chunks of tokens at once (chunk)
  --dtype f64|f32|f16|bf16   what q, k and v are stored in (f64 for the reference, else f32)
  --chunk-size N             steps per chunk (the engine chooses)
  --tolerance X              largest rms(err)/rms(truth) allowed (1e-6 in f64, 1e-4 in f32, else 2e-2)
  --out FILE                 write the results as safetensors

Exit status: 0 all within the tolerance, 1 one is not, 2 the case could not be run.
";

const COMBINATIONS: &str = "there are cpu reference (f64, f32), cpu chunk (f64, f32), \
    wgpu chunk (f32, f16) and cuda chunk (f32, f16, bf16)";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Engine {
    Reference,
    Chunk,
}

impl Engine {
    fn parse(text: &str) -> Result<Self> {
        match text {
            "reference" => Ok(Self::Reference),
            "chunk" => Ok(Self::Chunk),
            _ => Err("unknown engine; there are reference and chunk".into()),
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Reference => "reference",
            Self::Chunk => "chunk",
        }
    }
}

pub(crate) struct Settings {
    pub(crate) file: PathBuf,
    pub(crate) device: Device,
    pub(crate) engine: Engine,
    pub(crate) dtype: DType,
    pub(crate) chunk_size: Option<usize>,
    pub(crate) tolerance: f64,
    pub(crate) out: Option<PathBuf>,
}

impl Settings {
    /// `None`: help was asked for.
    pub(crate) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Option<Self>> {
        let known = ["device", "engine", "dtype", "chunk-size", "tolerance", "out"];
        let Some((positional, flags)) = args::split(args, &known)? else { return Ok(None) };
        let [file] = positional.as_slice() else {
            return Err(format!("expected one FILE, got {}", positional.len()).into());
        };
        let device = flags.get("device", Device::parse)?.unwrap_or(Device::Cpu);
        let engine = flags.get("engine", Engine::parse)?.unwrap_or(Engine::Chunk);
        let natural = if engine == Engine::Reference { DType::F64 } else { DType::F32 };
        let dtype = flags.get("dtype", DType::parse)?.unwrap_or(natural);
        if !exists(device, engine, dtype) {
            let asked = format!("{} {} {}", device.name(), engine.name(), dtype.name());
            return Err(format!("{asked} does not exist; {COMBINATIONS}").into());
        }
        let chunk_size = flags.get("chunk-size", |text| args::number(text, 1, 1 << 20))?;
        if engine == Engine::Reference && chunk_size.is_some() {
            return Err("--chunk-size is for --engine chunk; the reference has no chunks".into());
        }
        let out = flags.get("out", |text| Ok(PathBuf::from(text)))?;
        if out.as_ref().is_some_and(|out| **out == *file) {
            return Err("--out would overwrite the case".into());
        }
        Ok(Some(Self {
            file: file.into(),
            device,
            engine,
            dtype,
            chunk_size: chunk_size.map(|n| n as usize),
            tolerance: flags.get("tolerance", tolerance)?.unwrap_or(natural_tolerance(dtype)),
            out,
        }))
    }
}

fn exists(device: Device, engine: Engine, dtype: DType) -> bool {
    match (device, engine) {
        (Device::Cpu, _) => matches!(dtype, DType::F64 | DType::F32),
        (_, Engine::Reference) => false,
        (Device::Wgpu, Engine::Chunk) => matches!(dtype, DType::F32 | DType::F16),
        (Device::Cuda, Engine::Chunk) => dtype != DType::F64,
    }
}

fn natural_tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-6,
        DType::F32 => 1e-4,
        DType::F16 | DType::Bf16 => 2e-2,
    }
}

fn tolerance(text: &str) -> Result<f64> {
    match text.parse() {
        Ok(x) if x >= 0.0 && f64::is_finite(x) => Ok(x),
        _ => Err("expected a number from 0".into()),
    }
}
