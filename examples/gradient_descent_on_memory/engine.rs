//! The one place that knows which engine computes.

use delta_rule::{Gradients, Inputs, Options, Output, OutputGradients, Problem, chunk, reference};

use crate::args::Result;

#[derive(Clone, Copy)]
pub(crate) enum Engine {
    Reference,
    Chunk,
}

impl Engine {
    pub(crate) fn parse(text: &str) -> Result<Self> {
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

    pub(crate) fn forward(
        self,
        problem: &Problem,
        options: &Options,
        inputs: &Inputs<f32>,
    ) -> Result<Output<f32>> {
        match self {
            Self::Reference => Ok(reference::forward(problem, options, inputs)?),
            Self::Chunk => Ok(chunk::forward(problem, options, inputs)?),
        }
    }

    pub(crate) fn backward(
        self,
        problem: &Problem,
        options: &Options,
        inputs: &Inputs<f32>,
        output_gradients: &OutputGradients<f32>,
    ) -> Result<Gradients<f32>> {
        match self {
            Self::Reference => Ok(reference::backward(problem, options, inputs, output_gradients)?),
            Self::Chunk => Ok(chunk::backward(problem, options, inputs, output_gradients)?),
        }
    }
}
