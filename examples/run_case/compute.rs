//! Runs the engine that was asked for and names its results.

use delta_rule::{Gradients, Inputs, Options, Output, OutputGradients, Problem, Real, chunk, reference};

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
    match (settings.engine, settings.dtype) {
        (Engine::Reference, DType::F64) => run_reference::<f64>(case),
        (Engine::Reference, _) => run_reference::<f32>(case),
        (Engine::Chunk, DType::F64) => run::<f64>(
            case,
            settings.chunk_size,
            |problem, options, inputs| Ok(chunk::forward(problem, options, inputs)?),
            |problem, options, inputs, upstream| Ok(chunk::backward(problem, options, inputs, upstream)?),
        ),
        (Engine::Chunk, dtype) => run::<f32>(
            case,
            settings.chunk_size,
            |problem, options, inputs| device::forward(settings.device, dtype, problem, options, inputs),
            |problem, options, inputs, upstream| {
                device::backward(settings.device, dtype, problem, options, inputs, upstream)
            },
        ),
    }
}

fn run_reference<T: Real + Into<f64>>(case: &Case) -> Result<Vec<Computed>> {
    run::<T>(
        case,
        None,
        |problem, options, inputs| Ok(reference::forward(problem, options, inputs)?),
        |problem, options, inputs, upstream| Ok(reference::backward(problem, options, inputs, upstream)?),
    )
}

/// Forward, and backward where the case has a gradient of o.
fn run<T: Real + Into<f64>>(
    case: &Case,
    chunk_size: Option<usize>,
    forward: impl Fn(&Problem, &Options, &Inputs<'_, T>) -> Result<Output<T>>,
    backward: impl Fn(&Problem, &Options, &Inputs<'_, T>, &OutputGradients<'_, T>) -> Result<Gradients<T>>,
) -> Result<Vec<Computed>> {
    let tensors = case.tensors.cast::<T>();
    let (problem, inputs) = (&case.problem, tensors.inputs());
    let mut options = case.options.clone();
    options.chunk_size = chunk_size;
    let output = forward(problem, &options, &inputs)?;
    let mut results = vec![named("o", &output.o), named("final_state", &output.final_state)];
    let cast = |values: &Vec<f64>| values.iter().map(|&x| T::of(x)).collect::<Vec<T>>();
    let (d_output, d_state) = (case.d_output.as_ref().map(cast), case.d_state.as_ref().map(cast));
    if let Some(d_output) = &d_output {
        let upstream = OutputGradients { o: d_output, final_state: d_state.as_deref() };
        let gradients = backward(problem, &options, &inputs, &upstream)?;
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
