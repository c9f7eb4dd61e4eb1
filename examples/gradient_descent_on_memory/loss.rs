//! How wrong the answers are, and which way is better.

use crate::task::Batch;

/// Squared error over the squared size of the targets, and its gradient with respect to `o`. Answering 0 to
/// everything has loss 1.
pub(crate) fn loss(batch: &Batch, o: &[f32]) -> (f64, Vec<f32>) {
    let (mut error, mut size) = (0.0, 0.0);
    let mut d_o = vec![0.0; o.len()];
    let width = o.len() / batch.tokens.len();
    let rows = o.chunks_exact(width).zip(d_o.chunks_exact_mut(width));
    for (token, (o, d_o)) in batch.tokens.iter().zip(rows) {
        let Some(target) = &token.target else { continue };
        for ((d, o), target) in d_o.iter_mut().zip(o).zip(target) {
            *d = 2.0 * (o - target);
            error += f64::from(o - target).powi(2);
            size += f64::from(*target).powi(2);
        }
    }
    d_o.iter_mut().for_each(|d| *d /= size as f32);
    (error / size, d_o)
}

/// The fraction of answers that are their target when rounded.
pub(crate) fn right(batch: &Batch, o: &[f32]) -> f64 {
    let (mut right, mut asked) = (0, 0);
    for (token, o) in batch.tokens.iter().zip(o.chunks_exact(o.len() / batch.tokens.len())) {
        if let Some(target) = &token.target {
            asked += 1;
            right += usize::from(o.iter().zip(target).all(|(o, target)| o.round() == *target));
        }
    }
    f64::from(right as u32) / f64::from(asked as u32)
}
