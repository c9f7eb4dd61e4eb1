//! Runs calls on the chosen device, and keeps their speed and their distance from the f64 token loop.

use std::time::Instant;

use delta_rule::{Options, Output, Problem, reference};

use crate::args::Result;
use crate::compare::relative_error;
use crate::device::{self, DType, Device};
use crate::tensors::Tensors;

pub(crate) struct Engine {
    device: Device,
    /// The largest error of all calls so far.
    pub(crate) worst_error: f64,
}

/// How fast the largest calls were.
pub(crate) struct Speed {
    pub(crate) tokens_per_second: f64,
    pub(crate) ns_per_token_head: f64,
}

impl Engine {
    pub(crate) fn new(device: Device) -> Self {
        Self { device, worst_error: 0.0 }
    }

    /// Runs the chunk engine and compares it with the reference.
    pub(crate) fn run(&mut self, problem: &Problem, tensors: &Tensors<f32>) -> Result<Output<f32>> {
        let options = Options::new();
        let output = device::forward(self.device, DType::F32, problem, &options, &tensors.inputs())?;
        let truth = reference::forward(problem, &options, &tensors.cast::<f64>().inputs())?;
        let states = relative_error(&output.final_state, &truth.final_state);
        for error in [relative_error(&output.o, &truth.o), states] {
            // `max` would lose a NaN.
            if error.is_nan() || error > self.worst_error {
                self.worst_error = error;
            }
        }
        Ok(output)
    }

    /// The best of a few runs, with the transfers to and from the device.
    pub(crate) fn speed(&self, problem: &Problem, tensors: &Tensors<f32>) -> Result<Speed> {
        let mut best = f64::INFINITY;
        for _ in 0..5 {
            let start = Instant::now();
            device::forward(self.device, DType::F32, problem, &Options::new(), &tensors.inputs())?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        let tokens = problem.shape().tokens as f64;
        let ns_per_token_head = best * 1e9 / (tokens * problem.shape().value_heads as f64);
        Ok(Speed { tokens_per_second: tokens / best, ns_per_token_head })
    }
}
