//! Tensors on the device, and what is checked before a kernel sees them.

use cubecl::ir::StorageType;
use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;

use super::{device_shape, f32_type};
use crate::{Error, Ident, Options, Problem, Result};

/// The inputs of a call, in the shapes of [`Problem::shape_of`], with any strides that keep the last
/// dimension of q, k, v and of a gate per channel contiguous.
#[derive(Clone, Debug)]
pub struct DeviceInputs<R: Runtime> {
    /// `[B, T, H, K]` in [`DTypes::data`].
    pub q: TensorBinding<R>,
    /// `[B, T * n_h, H, K]` in [`DTypes::data`].
    pub k: TensorBinding<R>,
    /// `[B, T * n_h, HV, V]` in [`DTypes::data`].
    pub v: TensorBinding<R>,
    /// `[B, T * n_h, HV]` in [`DTypes::beta`].
    pub beta: TensorBinding<R>,
    /// `[B, T, HV]` or `[B, T, HV, K]` in [`DTypes::gate`], natural logarithm; needed exactly when the rule
    /// decays.
    pub g: Option<TensorBinding<R>>,
    /// `[HV]` in f32, needed exactly when [`Options::gate`] is a formula.
    pub a_log: Option<TensorBinding<R>>,
    /// `[HV]` or `[HV, K]` in f32; with a gate formula, absent means 0.
    pub dt_bias: Option<TensorBinding<R>>,
    /// `[N, HV, K, V]` in f32 (or `[N, HV, V, K]` by [`Options::state_layout`]); absent means 0.
    pub initial_state: Option<TensorBinding<R>>,
}

impl<R: Runtime> DeviceInputs<R> {
    /// The four tensors that every rule reads; the others are set with `..`.
    pub fn new(
        q: TensorBinding<R>,
        k: TensorBinding<R>,
        v: TensorBinding<R>,
        beta: TensorBinding<R>,
    ) -> Self {
        Self { q, k, v, beta, g: None, a_log: None, dt_bias: None, initial_state: None }
    }
}

/// The element types of a call: each f32, f16 or bf16, as far as the device has them. WGPU has no bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DTypes {
    /// Of q, k, v and o.
    pub data: StorageType,
    /// Of beta.
    pub beta: StorageType,
    /// Of g.
    pub gate: StorageType,
}

impl DTypes {
    /// One type for all three.
    pub fn all(dtype: StorageType) -> Self {
        Self { data: dtype, beta: dtype, gate: dtype }
    }

    /// q, k, v and o in `data`; beta and g in f32, as they want more precision.
    pub fn mixed(data: StorageType) -> Self {
        Self { data, beta: f32_type(), gate: f32_type() }
    }

    pub(super) fn validate<R: Runtime>(&self, client: &ComputeClient<R>) -> Result<()> {
        let known = [
            f32_type(),
            half::f16::as_type_native_unchecked().storage_type(),
            half::bf16::as_type_native_unchecked().storage_type(),
        ];
        let supported: Vec<_> = known.into_iter().filter(|&t| client.properties().supports_type(t)).collect();
        for (tensor, dtype) in [("q, k, v, o", self.data), ("beta", self.beta), ("g", self.gate)] {
            if !supported.contains(&dtype) {
                let names: Vec<_> = supported.iter().map(|t| t.to_string()).collect();
                return Err(Error::DType {
                    tensor,
                    dtype: dtype.to_string(),
                    supported: format!("this device takes {}", names.join(", ")),
                });
            }
        }
        Ok(())
    }
}

/// What a forward call returns.
#[derive(Clone, Debug)]
pub struct DeviceOutput<R: Runtime> {
    /// `[B, T, HV, V]` in [`DTypes::data`].
    pub o: TensorHandle<R>,
    /// `[N, HV, K, V]` in f32 (or `[N, HV, V, K]`).
    pub final_state: TensorHandle<R>,
}

/// A tensor that fits the problem and its own buffer.
pub(super) struct Checked<R: Runtime> {
    binding: TensorBinding<R>,
    pub(super) strides: Vec<u32>,
    pub(super) elements: usize,
}

impl<R: Runtime> Checked<R> {
    pub(super) fn arg(&self) -> ArrayArg<R> {
        // Safety: the kernels index by strides that `checked` has held against the buffer.
        unsafe { ArrayArg::from_raw_parts_binding(self.binding.handle.clone(), self.elements) }
    }

    /// Whether rows can be read `channels` at a time.
    pub(super) fn vectorizes(&self, dtype: StorageType, channels: usize) -> bool {
        let outer = self.strides.len() - 1;
        self.binding.shape[outer].is_multiple_of(channels)
            && self.strides[..outer].iter().all(|s| s.is_multiple_of(channels as u32))
            && self.binding.handle.offset_start.unwrap_or(0).is_multiple_of((channels * dtype.size()) as u64)
    }
}

/// Which tensor it is, what its errors call it, and whether it is written.
#[derive(Clone, Copy)]
pub(super) struct Role {
    ident: Ident,
    name: &'static str,
    written: bool,
}

impl Role {
    pub(super) fn read(ident: Ident) -> Self {
        Self { ident, name: ident.name(), written: false }
    }

    pub(super) fn written(ident: Ident) -> Self {
        Self { written: true, ..Self::read(ident) }
    }

    /// The gradient of a tensor has its shape.
    pub(super) fn gradient(ident: Ident, name: &'static str) -> Self {
        Self { ident, name, written: false }
    }
}

/// Checks shape, strides and size of a tensor.
pub(super) fn checked<R: Runtime>(
    client: &ComputeClient<R>,
    problem: &Problem,
    options: &Options,
    role: Role,
    binding: TensorBinding<R>,
    dtype: StorageType,
) -> Result<Checked<R>> {
    let Role { ident, name: tensor, written } = role;
    let expected = device_shape(problem, options, ident);
    let shape = binding.shape.to_vec();
    let strides = binding.strides.to_vec();
    if shape != expected {
        return Err(Error::Shape { tensor, expected, got: shape });
    }
    let elements = shape.iter().product::<usize>();
    let refuse = |why| Err(Error::Strides { tensor, shape: shape.clone(), strides: strides.clone(), why });
    if strides.len() != shape.len() {
        return refuse("there must be one stride per dimension");
    }
    if elements > 0 {
        let channels = match ident {
            Ident::Q | Ident::K | Ident::V | Ident::O | Ident::ALog | Ident::DtBias => true,
            Ident::G => shape.len() == 4,
            _ => false,
        };
        let last = shape.len() - 1;
        if channels && shape[last] > 1 && strides[last] != 1 {
            return refuse("the last dimension must be contiguous");
        }
        if ident == Ident::DtBias && last == 1 && shape[0] > 1 && strides[0] != shape[1] {
            return refuse("the tensor must be contiguous");
        }
        if written && overlaps(&shape, &strides) {
            return refuse("an output must not overlap itself");
        }
        let span = shape.iter().zip(&strides).map(|(&d, &s)| (d as u64 - 1).saturating_mul(s as u64));
        let needed = span.fold(1u64, u64::saturating_add).saturating_mul(dtype.size() as u64);
        let limit = binding_limit(client, dtype);
        if needed > limit {
            return Err(Error::BufferTooLarge { tensor, bytes: needed, limit });
        }
        let got = binding.handle.size_in_used();
        if needed > got {
            return Err(Error::BufferTooSmall { tensor, needed, got });
        }
    }
    // With no elements strides may be anything and are never used; otherwise `needed` bounds those that count.
    let strides = shape.iter().zip(&strides).map(|(&d, &s)| if d > 1 { s as u32 } else { 0 }).collect();
    Ok(Checked { binding, strides, elements })
}

/// Refuses an output that would be too large before it is allocated.
pub(super) fn check_extent<R: Runtime>(
    client: &ComputeClient<R>,
    problem: &Problem,
    options: &Options,
    ident: Ident,
    dtype: StorageType,
) -> Result<()> {
    let elements = device_shape(problem, options, ident).iter().product::<usize>() as u64;
    let bytes = elements.saturating_mul(dtype.size() as u64);
    let limit = binding_limit(client, dtype);
    if bytes > limit {
        return Err(Error::BufferTooLarge { tensor: ident.name(), bytes, limit });
    }
    Ok(())
}

/// Bytes that the device binds in one piece and that 32-bit indices reach.
pub(super) fn binding_limit<R: Runtime>(client: &ComputeClient<R>, dtype: StorageType) -> u64 {
    client.properties().memory.max_page_size.min(u32::MAX as u64 * dtype.size() as u64)
}

/// Whether two indices of a tensor share an element: sorted by stride, each dimension must step over the
/// extent of those before it.
fn overlaps(shape: &[usize], strides: &[usize]) -> bool {
    let mut dims: Vec<_> = shape.iter().zip(strides).filter(|&(&d, _)| d > 1).collect();
    dims.sort_by_key(|&(_, &s)| s);
    let mut extent = 1usize;
    dims.into_iter().any(|(&d, &s)| {
        let bad = s < extent;
        extent = extent.saturating_add((d - 1).saturating_mul(s));
        bad
    })
}
