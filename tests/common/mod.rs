//! What the integration tests share: random problems, cases from files and one error measure.

// Every test binary compiles this module and uses a part of it.
#![allow(dead_code, unused_imports)]

pub(crate) mod case;
mod select;
mod skip;
mod tensors;

pub(crate) use select::{Axis, select};
pub(crate) use skip::{missing, skipped};
pub(crate) use tensors::{Generator, Tensors};

use delta_rule::{Decay, Gradients, Problem, Real, Rule, Shape};

/// Every kind of rule that the crate has a name for.
pub(crate) const RULES: [Rule; 6] = [
    Rule::deltanet(),
    Rule::gated_deltanet(),
    Rule::kda(),
    Rule::delta_product(2),
    Rule::gated_delta_product(3),
    Rule { decay: Decay::Channel, micro_steps: 2 },
];

/// A problem from `[B, T, H, HV, K, V]`.
pub(crate) fn problem(rule: Rule, sizes: [usize; 6]) -> Problem {
    let [batch, tokens, heads, value_heads, key_dim, value_dim] = sizes;
    let shape = Shape { batch, tokens, heads, value_heads, key_dim, value_dim };
    Problem::new(rule, shape).expect("a valid shape")
}

/// `rms(got - want) / rms(want)` in f64; the plain rms error where `want` is all zeros.
///
/// # Panics
/// When the lengths differ or either side holds a NaN or an infinity.
pub(crate) fn relative_error<A: Real, B: Real>(got: &[A], want: &[B]) -> f64 {
    assert_eq!(got.len(), want.len(), "lengths differ");
    let (mut error, mut reference) = (0.0, 0.0);
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let (got, want) = (got.to_f64().unwrap(), want.to_f64().unwrap());
        assert!(got.is_finite() && want.is_finite(), "element {i}: got {got}, want {want}");
        error += (got - want).powi(2);
        reference += want.powi(2);
    }
    match reference {
        0.0 => (error / got.len().max(1) as f64).sqrt(),
        _ => (error / reference).sqrt(),
    }
}

/// Asserts [`relative_error`] for one tensor.
#[track_caller]
pub(crate) fn assert_close<A: Real, B: Real>(name: &str, got: &[A], want: &[B], tolerance: f64) {
    let error = relative_error(got, want);
    assert!(error <= tolerance, "{name}: relative error {error:.3e} exceeds {tolerance:.0e}");
}

/// The gradients under the names of their inputs, as [`Tensors::inputs_mut`] names them.
pub(crate) fn gradients_by_name<T>(gradients: &Gradients<T>) -> Vec<(&'static str, &[T])> {
    let Gradients { q, k, v, beta, g, a_log, dt_bias, initial_state } = gradients;
    let all = [
        ("q", Some(q)),
        ("k", Some(k)),
        ("v", Some(v)),
        ("beta", Some(beta)),
        ("g", g.as_ref()),
        ("a_log", a_log.as_ref()),
        ("dt_bias", dt_bias.as_ref()),
        ("initial_state", Some(initial_state)),
    ];
    all.into_iter().filter_map(|(name, x)| Some((name, x?.as_slice()))).collect()
}
