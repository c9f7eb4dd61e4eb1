//! One stored problem with its truth.

use delta_rule::{Ident, Options, Problem, Rule, Shape};

use crate::args::Result;
use crate::file::File;
use crate::tensors::Tensors;

/// A tensor that an engine should reproduce.
#[derive(Debug)]
pub(crate) struct Expected {
    /// `o`, `final_state`, `dq`, ...
    pub(crate) name: &'static str,
    pub(crate) truth: Vec<f64>,
    /// What flash-linear-attention's error was, if the file says.
    pub(crate) fla: Option<f64>,
}

/// A problem, its inputs and what should come out.
#[derive(Debug)]
pub(crate) struct Case {
    pub(crate) rule: String,
    pub(crate) problem: Problem,
    pub(crate) options: Options,
    pub(crate) tensors: Tensors<f64>,
    /// Gradient of `o`, there when a gradient is expected.
    pub(crate) d_output: Option<Vec<f64>>,
    pub(crate) d_state: Option<Vec<f64>>,
    pub(crate) expected: Vec<Expected>,
}

/// Results by their name in a file, each shaped like a tensor of the problem.
pub(crate) const RESULTS: [(&str, Ident); 8] = [
    ("o", Ident::O),
    ("final_state", Ident::FinalState),
    ("dq", Ident::Q),
    ("dk", Ident::K),
    ("dv", Ident::V),
    ("dbeta", Ident::Beta),
    ("dg", Ident::G),
    ("dh0", Ident::InitialState),
];

impl Case {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        let mut file = File::new(bytes)?;
        let rule = file.text("rule").ok_or("metadata rule is missing")?.to_string();
        let problem = problem(&mut file, &rule)?;
        let scale = file.real("scale")?;
        let tensors = Tensors {
            q: required(&mut file, "q", &problem, Ident::Q)?,
            k: required(&mut file, "k", &problem, Ident::K)?,
            v: required(&mut file, "v", &problem, Ident::V)?,
            beta: required(&mut file, "beta", &problem, Ident::Beta)?,
            g: file.floats("g", &problem.shape_of(Ident::G))?,
            initial_state: file.floats("initial_state", &problem.shape_of(Ident::InitialState))?,
        };
        let d_output = file.floats("do", &problem.shape_of(Ident::O))?;
        let d_state = file.floats("dht", &problem.shape_of(Ident::FinalState))?;
        let expected = expected(&mut file, &problem)?;
        if d_output.is_none()
            && let Some(gradient) = expected.iter().find(|e| !matches!(e.name, "o" | "final_state"))
        {
            return Err(format!("tensor do is missing, expect.{} needs it", gradient.name).into());
        }
        file.finish()?;
        let options = scale.map_or(Options::new(), |scale| Options::new().with_scale(scale));
        Ok(Self { rule, problem, options, tensors, d_output, d_state, expected })
    }
}

fn required(file: &mut File, name: &str, problem: &Problem, ident: Ident) -> Result<Vec<f64>> {
    let values = file.floats(name, &problem.shape_of(ident))?;
    values.ok_or_else(|| format!("tensor {name} is missing").into())
}

fn expected(file: &mut File, problem: &Problem) -> Result<Vec<Expected>> {
    let mut expected = Vec::new();
    for (name, ident) in RESULTS {
        let fla = file.real(&format!("fla_error.{name}"))?;
        match file.floats(&format!("expect.{name}"), &problem.shape_of(ident))? {
            Some(truth) => expected.push(Expected { name, truth, fla }),
            None if name == "o" || name == "final_state" => {
                return Err(format!("tensor expect.{name} is missing").into());
            }
            None => {}
        }
    }
    if expected.iter().any(|e| e.name == "dg") && file.shape("g").is_none() {
        return Err("expect.dg is there, but g is not".into());
    }
    Ok(expected)
}

fn problem(file: &mut File, name: &str) -> Result<Problem> {
    let dims = |file: &File, name: &str| -> Result<[usize; 4]> {
        let shape = file.shape(name).ok_or_else(|| format!("tensor {name} is missing"))?;
        let wrong = |shape| format!("{name}: expected 4 dimensions, got shape {shape:?}").into();
        shape.try_into().map_err(wrong)
    };
    let [batch, tokens, heads, key_dim] = dims(file, "q")?;
    let [_, steps, _, _] = dims(file, "k")?;
    let [_, _, value_heads, value_dim] = dims(file, "v")?;
    let rule = rule(file, name)?;
    if tokens.checked_mul(rule.micro_steps) != Some(steps) {
        let n_h = rule.micro_steps;
        return Err(format!("k has {steps} rows, not T * n_h = {tokens} * {n_h}").into());
    }
    let problem = Problem::new(rule, Shape { batch, tokens, heads, value_heads, key_dim, value_dim })?;
    match file.offsets("cu_seqlens")? {
        Some(offsets) => Ok(problem.with_cu_seqlens(&offsets)?),
        None => Ok(problem),
    }
}

fn rule(file: &File, name: &str) -> Result<Rule> {
    let n_h = match file.text("n_h") {
        Some(text) => match text.parse() {
            Ok(n) if n >= 1 => n,
            _ => return Err(format!("metadata n_h: expected a whole number from 1, got {text:?}").into()),
        },
        None if name == "deltaproduct" => return Err("metadata n_h is missing".into()),
        None => 1,
    };
    let gate = file.shape("g").map(|shape| shape.len());
    let rule = match name {
        "deltanet" => Rule::deltanet(),
        "gated_deltanet" => Rule::gated_deltanet(),
        "kda" => Rule::kda(),
        "deltaproduct" if gate.is_none() => Rule::delta_product(n_h),
        "deltaproduct" => Rule::gated_delta_product(n_h),
        _ => {
            let known = "deltanet, gated_deltanet, kda and deltaproduct";
            return Err(format!("metadata rule: unknown rule {name:?}; there are {known}").into());
        }
    };
    if rule.micro_steps != n_h {
        return Err(format!("metadata n_h is {n_h}, but {name} takes one step per token").into());
    }
    match (rule.decay, gate) {
        (delta_rule::Decay::None, Some(_)) => Err(format!("g is there, but {name} has no decay").into()),
        (delta_rule::Decay::None, None) | (_, Some(_)) => Ok(rule),
        (_, None) => Err(format!("tensor g is missing, {name} decays").into()),
    }
}
