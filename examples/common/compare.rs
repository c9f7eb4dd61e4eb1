//! How far a tensor is from the truth.

/// rms(got - truth) / rms(truth), or rms(got - truth) where the truth is all zero; NaN for another
/// number of elements.
pub(crate) fn relative_error<T: Copy + Into<f64>, U: Copy + Into<f64>>(got: &[T], truth: &[U]) -> f64 {
    if got.len() != truth.len() {
        return f64::NAN;
    }
    let (mut error, mut norm) = (0.0, 0.0);
    for (&got, &truth) in got.iter().zip(truth) {
        let (got, truth): (f64, f64) = (got.into(), truth.into());
        error += (got - truth).powi(2);
        norm += truth.powi(2);
    }
    let denominator = if norm == 0.0 { got.len().max(1) as f64 } else { norm };
    (error / denominator).sqrt()
}
