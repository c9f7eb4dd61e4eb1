//! The example `gradient_descent_on_memory`: its own chain from parameters to loss and back, and its exit status.

#[path = "../examples/gradient_descent_on_memory/loss.rs"]
#[expect(dead_code, reason = "nothing is judged here")]
mod loss;
#[path = "../examples/gradient_descent_on_memory/model.rs"]
mod model;
#[path = "../examples/gradient_descent_on_memory/parameters.rs"]
mod parameters;
#[path = "../examples/common/rng.rs"]
#[expect(dead_code, reason = "only episodes and directions are drawn")]
mod rng;
#[path = "../examples/gradient_descent_on_memory/task.rs"]
mod task;
#[path = "../examples/common/tensors.rs"]
#[expect(dead_code, reason = "everything here is f32")]
mod tensors;

use std::process::{Command, Output};

use delta_rule::{BetaTransform, OutputGradients, Rule, reference};
use model::Model;
use parameters::Parameters;
use rng::Rng;
use task::{Batch, PARITY, RECALL};

fn loss_of(model: &Model, batch: &Batch, parameters: &Parameters) -> f64 {
    let tensors = parameters.gather(batch);
    let inputs = parameters.inputs(&tensors);
    let output = reference::forward(&model.problem(batch).unwrap(), &model.options(), &inputs).unwrap();
    loss::loss(batch, &output.o).0
}

fn gradient_of(model: &Model, batch: &Batch, parameters: &Parameters) -> Parameters {
    let problem = model.problem(batch).unwrap();
    let tensors = parameters.gather(batch);
    let inputs = parameters.inputs(&tensors);
    let output = reference::forward(&problem, &model.options(), &inputs).unwrap();
    let (_, d_o) = loss::loss(batch, &output.o);
    let output_gradients = OutputGradients { o: &d_o, final_state: None };
    let gradients = reference::backward(&problem, &model.options(), &inputs, &output_gradients).unwrap();
    parameters.scatter(batch, gradients)
}

/// Along a random direction in each parameter tensor, the gradient predicts how the loss changes.
fn check(model: &Model, decaying: bool) {
    const STEP: f32 = 0.02;
    let (name, mut rng) = (model.name, Rng::new(1));
    let batch = model.task.batch(&mut rng, 4, 24);
    let mut parameters = Parameters::random(&mut rng, model.task, model.rule);
    let mut gradient = gradient_of(model, &batch, &parameters);
    let mut checked = 0;
    for (index, gradient) in gradient.tensors_mut().into_iter().enumerate() {
        if gradient.is_empty() {
            continue;
        }
        let direction = rng.unit(gradient.len());
        let mut moved = |by: f32| {
            let tensor = parameters.tensors_mut().into_iter().nth(index).unwrap();
            tensor.iter_mut().zip(&direction).for_each(|(x, d)| *x += by * d);
            loss_of(model, &batch, &parameters)
        };
        let (right, left) = (moved(STEP), moved(-2.0 * STEP));
        moved(STEP);
        let slope = (right - left) / f64::from(2.0 * STEP);
        let expected: f32 = gradient.iter().zip(&direction).map(|(g, d)| g * d).sum();
        let size = gradient.iter().map(|g| g * g).sum::<f32>().sqrt();
        assert!(size > 0.0, "{name}: tensor {index} has no gradient");
        let error = (slope - f64::from(expected)).abs();
        assert!(error < 0.01 * f64::from(size), "{name}: tensor {index}: slope {slope}, gradient {expected}");
        checked += 1;
    }
    assert_eq!(checked, if decaying { 8 } else { 5 });
}

#[test]
fn gradients_of_recall() {
    let (name, task, rule, beta) = ("recall", &RECALL, Rule::gated_deltanet(), BetaTransform::Sigmoid);
    check(&Model { name, task, rule, beta }, true);
}

#[test]
fn gradients_of_parity() {
    let (name, task, rule, beta) = ("parity", &PARITY, Rule::deltanet(), BetaTransform::TwoSigmoid);
    check(&Model { name, task, rule, beta }, false);
}

/// `cargo test` builds the examples next to the tests; with `--test` it leaves them as they are.
fn example(args: &[&str]) -> Output {
    let deps = std::env::current_exe().unwrap().parent().unwrap().to_path_buf();
    let path = deps.with_file_name("examples").join("gradient_descent_on_memory");
    let path = path.with_extension(std::env::consts::EXE_EXTENSION);
    Command::new(&path)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}; build the example first", path.display()))
}

#[test]
fn reaches_its_bounds() {
    for engine in ["reference", "chunk"] {
        let output = example(&["--engine", engine, "--steps", "600"]);
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(0), "{text}");
    }
}

#[test]
fn one_step_is_not_enough() {
    let output = example(&["--steps", "1"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    // Not one bound holds of a model that has learnt nothing.
    assert_eq!((text.matches('✓').count(), text.matches('✗').count()), (0, 6), "{text}");
}

#[test]
fn refuses_what_it_does_not_know() {
    for (args, reason) in [
        (&["--rate", "1"][..], "unknown flag --rate"),
        (&["--engine", "gpu"], "unknown engine"),
        (&["--steps", "0"], "from 1 to 100000"),
        (&["more"], "unexpected argument"),
    ] {
        let output = example(args);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains(reason), "{text}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn helps() {
    let output = example(&["--help"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8(output.stdout).unwrap().starts_with("usage: gradient_descent_on_memory"));
}
