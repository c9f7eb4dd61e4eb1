//! The loop forward.

use super::step::Lane;
use crate::transform::Effective;
use crate::{Ident, Inputs, Options, Output, Problem, Real, Result};

/// Computes `o` and the final state token by token.
///
/// ```
/// use delta_rule::{Inputs, Options, Problem, Rule, Shape, reference};
/// // One key, written twice: the second value replaces the first.
/// let shape = Shape { batch: 1, tokens: 2, heads: 1, value_heads: 1, key_dim: 2, value_dim: 1 };
/// let problem = Problem::new(Rule::deltanet(), shape)?;
/// let k = [1.0, 0.0, 1.0, 0.0];
/// let inputs = Inputs::new(&k, &k, &[3.0, 7.0], &[1.0, 1.0]);
/// let out = reference::forward(&problem, &Options::new().with_scale(1.0), &inputs)?;
/// assert_eq!(out.o, [3.0, 7.0]);
/// assert_eq!(out.final_state, [7.0, 0.0]);
/// # Ok::<(), delta_rule::Error>(())
/// ```
///
/// # Errors
/// When a tensor is missing, unused or of the wrong length, or an option has no meaning.
pub fn forward<T: Real>(problem: &Problem, options: &Options, inputs: &Inputs<'_, T>) -> Result<Output<T>> {
    inputs.validate(problem, options)?;
    let tensors = Effective::new(problem, options, inputs);
    let width = problem.shape().value_dim;
    let mut output = Output {
        o: vec![T::zero(); problem.len_of(Ident::O)],
        final_state: vec![T::zero(); problem.len_of(Ident::FinalState)],
    };
    let mut r = vec![T::zero(); width];
    for lane in Lane::all(problem, options, &tensors, inputs) {
        let mut state = lane.load_state(inputs.initial_state, options.state_layout);
        for t in 0..lane.sequence.len {
            lane.advance(&mut state, t, &mut r);
            let token = lane.token(t);
            lane.read(&state, token, &mut output.o[lane.v_at(token)..][..width]);
        }
        lane.store_state(&state, &mut output.final_state, options.state_layout);
    }
    Ok(output)
}
