//! Adam (Kingma and Ba, 2014, arXiv:1412.6980).

use crate::parameters::Parameters;

const MEAN: f32 = 0.9;
const SQUARE: f32 = 0.99;

/// Running means of the gradient and of its square.
pub(crate) struct Adam {
    mean: Parameters,
    square: Parameters,
    steps: i32,
}

impl Adam {
    pub(crate) fn new(parameters: &Parameters) -> Self {
        Self { mean: parameters.zeros(), square: parameters.zeros(), steps: 0 }
    }

    /// One step downhill, of about `rate` in every coordinate.
    pub(crate) fn descend(&mut self, parameters: &mut Parameters, mut gradient: Parameters, rate: f32) {
        self.steps += 1;
        // The means start at zero; this makes up for it.
        let (unbias_mean, unbias_square) = (1.0 - MEAN.powi(self.steps), 1.0 - SQUARE.powi(self.steps));
        let moments = self.mean.tensors_mut().into_iter().zip(self.square.tensors_mut());
        let tensors = parameters.tensors_mut().into_iter().zip(gradient.tensors_mut());
        for ((x, d), (mean, square)) in tensors.zip(moments) {
            for (((x, d), mean), square) in x.iter_mut().zip(d).zip(mean).zip(square) {
                *mean += (1.0 - MEAN) * (*d - *mean);
                *square += (1.0 - SQUARE) * (*d * *d - *square);
                *x -= rate * (*mean / unbias_mean) / ((*square / unbias_square).sqrt() + 1e-8);
            }
        }
    }
}
