//! Trains small models by gradient descent through the delta rule: outputs' gradients in, inputs' gradients out.

mod adam;
#[path = "../common/args.rs"]
mod args;
#[path = "../common/claims.rs"]
mod claims;
mod engine;
mod lesson;
mod loss;
mod model;
mod parameters;
mod plot;
#[path = "../common/rng.rs"]
#[expect(dead_code, reason = "nothing here draws directions, signs or permutations")]
mod rng;
mod settings;
mod task;
#[path = "../common/tensors.rs"]
#[expect(dead_code, reason = "everything here is f32")]
mod tensors;
#[path = "../common/terminal.rs"]
mod terminal;

use std::process::ExitCode;
use std::time::Instant;

use delta_rule::OutputGradients;

use adam::Adam;
use args::Result;
use lesson::Trained;
use loss::{loss, right};
use model::Model;
use parameters::Parameters;
use rng::Rng;
use settings::{Settings, USAGE};
use terminal::print;

/// Episodes of a step.
const EPISODES: usize = 32;
const LENGTH: usize = 32;
/// Held out are new episodes, twice as long.
const HELD_OUT: usize = 256;
const HELD_OUT_LENGTH: usize = 2 * LENGTH;
/// Of Adam, at the first step; it falls to 0 in a straight line.
const RATE: f32 = 0.05;

fn main() -> ExitCode {
    terminal::exit("gradient_descent_on_memory", run())
}

fn run() -> Result<bool> {
    let Some(settings) = Settings::parse(std::env::args_os().skip(1)).map_err(args::with_hint)? else {
        print(USAGE)?;
        return Ok(true);
    };
    print(&format!(
        "Engine: {}. Each model takes {} steps of Adam, each on {EPISODES} new episodes of {LENGTH} tokens.\n\
         It is then judged on {HELD_OUT} new ones of {HELD_OUT_LENGTH} tokens. Answering 0 everywhere is a loss of 1;\n\
         an answer is right when every number in it rounds to what it should be.\n",
        settings.engine.name(),
        settings.steps,
    ))?;
    let start = Instant::now();
    let mut claims = Vec::new();
    for lesson in [lesson::FORGETTING, lesson::TRACKING] {
        print(&lesson.introduction())?;
        let solves = train(&lesson.solves, &settings)?;
        let fails = train(&lesson.fails, &settings)?;
        print(&lesson.report(&solves, &fails))?;
        claims.extend(lesson.claims(&solves, &fails));
    }
    let seconds = start.elapsed().as_secs_f64();
    print(&format!("\nChecked in this run ({seconds:.1} s):\n{}", claims::verdict(&claims)))?;
    Ok(claims.iter().all(|claim| claim.held))
}

fn train(model: &Model, settings: &Settings) -> Result<Trained> {
    let (engine, options) = (settings.engine, model.options());
    let mut rng = Rng::new(settings.seed);
    let mut parameters = Parameters::random(&mut rng, model.task, model.rule);
    let mut adam = Adam::new(&parameters);
    let mut losses = Vec::new();
    for step in 0..settings.steps {
        let batch = model.task.batch(&mut rng, EPISODES, LENGTH);
        let problem = model.problem(&batch)?;
        let tensors = parameters.gather(&batch);
        let inputs = parameters.inputs(&tensors);

        let output = engine.forward(&problem, &options, &inputs)?;
        let (loss, d_o) = loss(&batch, &output.o);
        losses.push(loss);

        // The gradients come back through the fused options: those of q and k are of the vectors before the norm,
        // beta's is of its logit, g's of the formula's argument, and a_log and dt_bias have their own.
        let output_gradients = OutputGradients { o: &d_o, final_state: None };
        let gradients = engine.backward(&problem, &options, &inputs, &output_gradients)?;
        let gradient = parameters.scatter(&batch, gradients);
        let rate = RATE * (1.0 - step as f32 / settings.steps as f32);
        adam.descend(&mut parameters, gradient, rate);
    }
    let batch = model.task.batch(&mut rng, HELD_OUT, HELD_OUT_LENGTH);
    let tensors = parameters.gather(&batch);
    let o = engine.forward(&model.problem(&batch)?, &options, &parameters.inputs(&tensors))?.o;
    Ok(Trained { losses, held_out: loss(&batch, &o).0, right: right(&batch, &o), parameters })
}
