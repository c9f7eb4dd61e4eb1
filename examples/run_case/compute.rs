//! Runs the engine that was asked for and names its results.

use delta_rule::{OutputGradients, Real, chunk, reference};

use crate::args::Result;
use crate::case::Case;
use crate::device::{self, DType};
use crate::settings::{Engine, Settings};

/// A result by its name in a file.
pub(crate) struct Computed {
    pub(crate) name: &'static str,
    pub(crate) values: Vec<f64>,
}

pub(crate) fn compute(settings: &Settings, case: &Case) -> Result<Vec<Computed>> {
    let (problem, tensors) = (&case.problem, &case.tensors);
    let mut options = case.options.clone();
    options.chunk_size = settings.chunk_size;
    let output = match (settings.engine, settings.dtype) {
        (Engine::Reference, DType::F64) => return run_reference::<f64>(case),
        (Engine::Reference, _) => return run_reference::<f32>(case),
        (Engine::Chunk, DType::F64) => chunk::forward(problem, &options, &tensors.inputs())?,
        (Engine::Chunk, dtype) => {
            let tensors = tensors.cast::<f32>();
            let output = device::forward(settings.device, dtype, problem, &options, &tensors.inputs())?;
            return Ok(vec![named("o", &output.o), named("final_state", &output.final_state)]);
        }
    };
    Ok(vec![named("o", &output.o), named("final_state", &output.final_state)])
}

fn run_reference<T: Real + Into<f64>>(case: &Case) -> Result<Vec<Computed>> {
    let tensors = case.tensors.cast::<T>();
    let (problem, options, inputs) = (&case.problem, &case.options, tensors.inputs());
    let output = reference::forward(problem, options, &inputs)?;
    let mut results = vec![named("o", &output.o), named("final_state", &output.final_state)];
    let cast = |values: &Vec<f64>| values.iter().map(|&x| T::of(x)).collect::<Vec<T>>();
    let (d_output, d_state) = (case.d_output.as_ref().map(cast), case.d_state.as_ref().map(cast));
    if let Some(d_output) = &d_output {
        let upstream = OutputGradients { o: d_output, final_state: d_state.as_deref() };
        let gradients = reference::backward(problem, options, &inputs, &upstream)?;
        results.extend([
            named("dq", &gradients.q),
            named("dk", &gradients.k),
            named("dv", &gradients.v),
            named("dbeta", &gradients.beta),
        ]);
        results.extend(gradients.g.map(|g| named("dg", &g)));
        results.push(named("dh0", &gradients.initial_state));
    }
    Ok(results)
}

fn named<T: Copy + Into<f64>>(name: &'static str, values: &[T]) -> Computed {
    Computed { name, values: values.iter().map(|&x| x.into()).collect() }
}
