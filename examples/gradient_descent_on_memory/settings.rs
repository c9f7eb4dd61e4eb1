//! What the command line asked for.

use std::ffi::OsString;

use crate::args::{self, Result};
use crate::engine::Engine;

pub(crate) const USAGE: &str = "\
usage: gradient_descent_on_memory [flags]
Trains small models by gradient descent through the delta rule, and checks what they learnt.

  --engine reference|chunk  what computes forward and backward (chunk)
  --steps N                 of gradient descent for each model, 1 to 100000 (1000)
  --seed N                  of the parameters and the episodes (0)

Exit status: 0 every bound was reached, 1 one was not, 2 nothing could be run.
";

pub(crate) struct Settings {
    pub(crate) engine: Engine,
    pub(crate) steps: usize,
    pub(crate) seed: u64,
}

impl Settings {
    /// `None`: help was asked for.
    pub(crate) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Option<Self>> {
        let Some((positional, flags)) = args::split(args, &["engine", "steps", "seed"])? else {
            return Ok(None);
        };
        if let Some(stray) = positional.first() {
            return Err(format!("unexpected argument {stray:?}").into());
        }
        let engine = flags.get("engine", Engine::parse)?.unwrap_or(Engine::Chunk);
        let steps = flags.get("steps", |text| args::number(text, 1, 100_000))?.unwrap_or(1000) as usize;
        let seed = flags.get("seed", |text| args::number(text, 0, u64::MAX))?.unwrap_or(0);
        Ok(Some(Self { engine, steps, seed }))
    }
}
