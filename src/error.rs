//! What can be wrong with a call.

/// Every way in which a call is refused. Nothing has been computed or launched when one is returned.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor has another shape than the problem asks for.
    #[error("{tensor}: expected shape {expected:?}, got {got:?}")]
    Shape {
        /// Name of the tensor.
        tensor: &'static str,
        /// What the problem asks for.
        expected: Vec<usize>,
        /// What was passed.
        got: Vec<usize>,
    },
    /// A host slice has another length than the problem asks for.
    #[error("{tensor}: expected {expected} elements for shape {shape:?}, got {got}")]
    Length {
        /// Name of the tensor.
        tensor: &'static str,
        /// The shape that the problem asks for.
        shape: Vec<usize>,
        /// The number of elements in that shape.
        expected: usize,
        /// What was passed.
        got: usize,
    },
    /// A tensor that the rule or the options need is absent.
    #[error("{tensor} is missing: {why}")]
    Missing {
        /// Name of the tensor.
        tensor: &'static str,
        /// What needs it.
        why: &'static str,
    },
    /// A tensor was passed that nothing reads.
    #[error("{tensor} was given but is not used: {why}")]
    Unused {
        /// Name of the tensor.
        tensor: &'static str,
        /// Why nothing reads it.
        why: &'static str,
    },
    /// `value_heads` is not a positive multiple of `heads`.
    #[error("value heads must be a positive multiple of heads, got HV = {value_heads}, H = {heads}")]
    ValueHeads {
        /// H, the heads of q and k.
        heads: usize,
        /// HV, the heads of v, beta and g.
        value_heads: usize,
    },
    /// A size that must be at least 1 is 0, or a head dimension is over [`MAX_HEAD_DIM`](crate::MAX_HEAD_DIM).
    #[error("{name} must be between 1 and {max}, got {got}")]
    Size {
        /// What the number counts.
        name: &'static str,
        /// The largest value allowed.
        max: usize,
        /// What was passed.
        got: usize,
    },
    /// `cu_seqlens` does not describe a packing of the tokens.
    #[error("cu_seqlens must start at 0, never decrease and end at T = {tokens} with batch 1: {problem}")]
    CuSeqlens {
        /// T, the number of packed tokens.
        tokens: usize,
        /// Which of the conditions failed, and where.
        problem: String,
    },
    /// The engine cannot work with this chunk size.
    #[error("chunk_size {got} is not supported here: {supported}")]
    ChunkSize {
        /// What was asked for.
        got: usize,
        /// What the engine supports.
        supported: &'static str,
    },
    /// An option holds a value that has no meaning.
    #[error("{option}: {problem}")]
    InvalidOption {
        /// Name of the option.
        option: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// A tensor has a type that the device or the kernels cannot read.
    #[error("{tensor}: type {dtype} is not supported here: {supported}")]
    DType {
        /// Name of the tensor.
        tensor: &'static str,
        /// The type that was passed.
        dtype: String,
        /// What would have been accepted.
        supported: String,
    },
    /// A tensor's last dimension is not contiguous, or its strides leave its buffer.
    #[error("{tensor}: strides {strides:?} are not supported for shape {shape:?}: {why}")]
    Strides {
        /// Name of the tensor.
        tensor: &'static str,
        /// Its shape.
        shape: Vec<usize>,
        /// Its strides, in elements.
        strides: Vec<usize>,
        /// What the kernels need.
        why: &'static str,
    },
    /// A buffer is smaller than its shape and strides say.
    #[error("{tensor}: the buffer holds {got} bytes, {needed} are needed")]
    BufferTooSmall {
        /// Name of the tensor.
        tensor: &'static str,
        /// Bytes that will be touched.
        needed: u64,
        /// Bytes in the buffer.
        got: u64,
    },
    /// A buffer is larger than the device can bind to a kernel or the kernels can index.
    #[error("{tensor}: {bytes} bytes exceed the device's limit of {limit} for one buffer")]
    BufferTooLarge {
        /// Name of the tensor.
        tensor: &'static str,
        /// Its size.
        bytes: u64,
        /// The device's limit.
        limit: u64,
    },
    /// The device lacks something that the kernels need.
    #[error("the device cannot run this: {what}")]
    Device {
        /// What is missing.
        what: String,
    },
}

/// A result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
