//! Writes the results for other programs to read.

use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize_to_file};

use crate::args::Result;
use crate::case::{Case, RESULTS};
use crate::compute::Computed;
use crate::device::DType;
use crate::settings::Settings;

/// Writes f64 when that is what was computed, else f32.
pub(crate) fn save(path: &Path, settings: &Settings, case: &Case, results: &[Computed]) -> Result<()> {
    let wide = settings.dtype == DType::F64;
    let bytes: Vec<Vec<u8>> = results.iter().map(|result| to_bytes(&result.values, wide)).collect();
    let dtype = if wide { Dtype::F64 } else { Dtype::F32 };
    let views = RESULTS.iter().filter_map(|(name, ident)| {
        let index = results.iter().position(|result| result.name == *name)?;
        Some(TensorView::new(dtype, case.problem.shape_of(*ident), &bytes[index]).map(|view| (*name, view)))
    });
    let views = views.collect::<std::result::Result<Vec<_>, _>>()?;
    let scale = case.options.scale_for(case.problem.shape().key_dim);
    let metadata = HashMap::from(
        [
            ("rule", case.rule.clone()),
            ("n_h", case.problem.rule().micro_steps.to_string()),
            ("scale", scale.to_string()),
            ("device", settings.device.name().into()),
            ("engine", settings.engine.name().into()),
            ("dtype", settings.dtype.name().into()),
        ]
        .map(|(key, value)| (key.to_string(), value)),
    );
    serialize_to_file(views, Some(metadata), path)
        .map_err(|error| format!("cannot write {}: {error}", path.display()).into())
}

fn to_bytes(values: &[f64], wide: bool) -> Vec<u8> {
    if wide {
        values.iter().flat_map(|x| x.to_le_bytes()).collect()
    } else {
        values.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect()
    }
}
