//! Safetensors as numbers, with a message for whatever is wrong.

use std::collections::HashMap;

use safetensors::{Dtype, SafeTensors};

use crate::args::Result;

/// An open file. Names that nobody took are found by [`File::finish`].
pub(crate) struct File<'a> {
    tensors: SafeTensors<'a>,
    metadata: HashMap<String, String>,
    taken: Vec<String>,
}

impl<'a> File<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Result<Self> {
        let broken = |error| format!("not a complete safetensors file: {error}");
        let tensors = SafeTensors::deserialize(bytes).map_err(broken)?;
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(broken)?;
        Ok(Self { tensors, metadata: header.metadata().clone().unwrap_or_default(), taken: Vec::new() })
    }

    /// A metadata entry as text.
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// A metadata entry as a finite number.
    pub(crate) fn real(&self, key: &str) -> Result<Option<f64>> {
        let Some(text) = self.text(key) else { return Ok(None) };
        match text.parse::<f64>() {
            Ok(x) if x.is_finite() => Ok(Some(x)),
            _ => Err(format!("metadata {key}: expected a finite number, got {text:?}").into()),
        }
    }

    /// The sizes of a tensor, if it is there.
    pub(crate) fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.tensor(name).ok().map(|view| view.shape().to_vec())
    }

    /// Floating-point values of a tensor of this shape, if it is there.
    pub(crate) fn floats(&mut self, name: &str, shape: &[usize]) -> Result<Option<Vec<f64>>> {
        let Ok(view) = self.tensors.tensor(name) else { return Ok(None) };
        self.taken.push(name.to_string());
        if view.shape() != shape {
            return Err(format!("{name}: expected shape {shape:?}, got {:?}", view.shape()).into());
        }
        let data = view.data();
        let values = match view.dtype() {
            Dtype::F64 => decode(data, f64::from_le_bytes),
            Dtype::F32 => decode(data, |b| f32::from_le_bytes(b).into()),
            Dtype::F16 => decode(data, |b| half::f16::from_le_bytes(b).into()),
            Dtype::BF16 => decode(data, |b| half::bf16::from_le_bytes(b).into()),
            other => return Err(format!("{name}: expected floating point, got {other:?}").into()),
        };
        Ok(Some(values))
    }

    /// A one-dimensional tensor of offsets, if it is there.
    pub(crate) fn offsets(&mut self, name: &str) -> Result<Option<Vec<usize>>> {
        let Ok(view) = self.tensors.tensor(name) else { return Ok(None) };
        self.taken.push(name.to_string());
        let data = view.data();
        let values: Vec<i64> = match view.dtype() {
            _ if view.shape().len() != 1 => {
                return Err(format!("{name}: expected one dimension, got shape {:?}", view.shape()).into());
            }
            Dtype::I64 => decode(data, i64::from_le_bytes),
            Dtype::I32 => decode(data, |b| i32::from_le_bytes(b).into()),
            other => return Err(format!("{name}: expected i64 or i32, got {other:?}").into()),
        };
        let convert =
            |x: i64| usize::try_from(x).map_err(|_| format!("{name}: an offset is negative, {x}").into());
        values.into_iter().map(convert).collect::<Result<_>>().map(Some)
    }

    /// Refuses tensors that nothing read: a misspelt optional one would change the problem in silence.
    pub(crate) fn finish(self) -> Result<()> {
        match self.tensors.names().iter().filter(|name| !self.taken.iter().any(|t| t == *name)).min() {
            Some(name) => Err(format!("{name}: no such tensor in a case").into()),
            None => Ok(()),
        }
    }
}

fn decode<const N: usize, T>(data: &[u8], read: impl Fn([u8; N]) -> T) -> Vec<T> {
    data.as_chunks::<N>().0.iter().map(|&bytes| read(bytes)).collect()
}
