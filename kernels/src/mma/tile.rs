//! The verbs of the tensor-core kernel, on tiles that a plane holds in registers.
//!
//! Everything is computed transposed: rows are value channels (or tokens, for Gram matrices), columns are
//! tokens or key channels. A plane multiplies 16 rows by 8 columns over a depth of 16 (`mma.sync.m16n8k16`).
//! Unit `l` of an accumulator holds columns `2 (l % 4)` and the next, of rows `l / 4` (vector 0) and
//! `l / 4 + 8` (vector 1); two neighbouring accumulators, rounded, are a left operand.

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::*;

/// Two columns of an accumulator, or two elements of an operand.
pub(crate) type V2 = Const<2>;
/// The 16 bytes that move between memories.
pub(crate) type V8 = Const<8>;
/// The same 16 bytes as floats or words.
pub(crate) type V4 = Const<4>;
/// 16 x 8 sums.
pub(crate) type Acc = Array<Vector<f32, V2>>;
/// A 16 x 16 operand, or two 8 x 16 right operands.
pub(crate) type Frag<F> = Array<Vector<F, V2>>;
/// Shared memory in units of 16 bytes.
pub(crate) type Tile<F> = SharedMemory<Vector<F, V8>>;
/// The instruction.
pub(crate) type Mma<F> = MmaDefinition<F, F, f32>;

/// Fragments that are asked for before they are needed.
pub(crate) const AHEAD: usize = 4;

#[cube]
pub(crate) fn zeros(#[comptime] n: usize) -> Sequence<Acc> {
    let mut s = Sequence::<Acc>::new();
    #[unroll]
    for _ in 0..n {
        let mut a = Acc::new(2usize);
        a[0] = Vector::cast_from(0.0f32);
        a[1] = Vector::cast_from(0.0f32);
        s.push(a);
    }
    s
}

/// Rounds two neighbouring accumulators to a left operand.
#[cube]
pub(crate) fn to_frag<F: Float>(lo: &Acc, hi: &Acc) -> Frag<F> {
    let mut f = Frag::<F>::new(4usize);
    f[0] = Vector::cast_from(lo[0]);
    f[1] = Vector::cast_from(lo[1]);
    f[2] = Vector::cast_from(hi[0]);
    f[3] = Vector::cast_from(hi[1]);
    f
}

/// The leading bits of two sums, which every data type holds.
#[cube]
fn leading(x: Vector<f32, V2>) -> Vector<f32, V2> {
    let mut y = x;
    #[unroll]
    for e in 0..2usize {
        y[e] = f32::reinterpret(u32::reinterpret(x[e]) & 0xffff_0000u32);
    }
    y
}

/// Two neighbouring accumulators as two left operands, of which the second holds what the first leaves. The first is cut
/// off, not rounded: nothing has to be converted back to find the second.
#[cube]
pub(crate) fn to_parts<F: Float>(lo: &Acc, hi: &Acc) -> (Frag<F>, Frag<F>) {
    let mut first = Frag::<F>::new(4usize);
    let mut rest = Frag::<F>::new(4usize);
    #[unroll]
    for i in 0..4usize {
        let x = if comptime!(i < 2) { lo[i] } else { hi[comptime!(i - 2)] };
        let y = leading(x);
        first[i] = Vector::cast_from(y);
        rest[i] = Vector::cast_from(x - y);
    }
    (first, rest)
}

/// A unit's part of an operand as 16 bytes. By words: a pair at a time, which nothing has to take apart.
#[cube]
pub(crate) fn pack<F: Float>(f: &Frag<F>) -> Vector<F, V8> {
    let mut x = Vector::<u32, V4>::cast_from(0u32);
    #[unroll]
    for i in 0..4usize {
        x[i] = u32::reinterpret(f[i]);
    }
    Vector::reinterpret(x)
}

/// The reverse of [`pack`].
#[cube]
pub(crate) fn unpack<F: Float>(x: Vector<F, V8>) -> Frag<F> {
    let words = Vector::<u32, V4>::reinterpret(x);
    let mut f = Frag::<F>::new(4usize);
    #[unroll]
    for i in 0..4usize {
        f[i] = Vector::reinterpret(words[i]);
    }
    f
}

/// Two right operands of 8 columns, side by side, each at the front of an array.
#[derive(CubeType)]
pub(crate) struct Right<F: Float> {
    pub(crate) first: Frag<F>,
    pub(crate) second: Frag<F>,
}

#[cube]
impl<F: Float> Right<F> {
    pub(crate) fn new(a: Vector<F, V2>, b: Vector<F, V2>, c: Vector<F, V2>, d: Vector<F, V2>) -> Right<F> {
        let mut first = Frag::<F>::new(2usize);
        first[0] = a;
        first[1] = b;
        let mut second = Frag::<F>::new(2usize);
        second[0] = c;
        second[1] = d;
        Right::<F> { first, second }
    }

    /// The rows of a left operand as columns.
    pub(crate) fn of_left(left: &Frag<F>) -> Right<F> {
        Right::<F>::new(left[0], left[2], left[1], left[3])
    }

    /// The same of one that [`pack`] has packed.
    pub(crate) fn unpack(x: Vector<F, V8>) -> Right<F> {
        let words = Vector::<u32, V4>::reinterpret(x);
        Right::<F>::new(
            Vector::reinterpret(words[0]),
            Vector::reinterpret(words[2]),
            Vector::reinterpret(words[1]),
            Vector::reinterpret(words[3]),
        )
    }
}

/// `acc[first + {0, 1}] += a * (both halves of b)`.
#[cube]
pub(crate) fn multiply<F: Float>(
    mma: &Mma<F>,
    a: &Frag<F>,
    b: &Right<F>,
    acc: &mut Sequence<Acc>,
    #[comptime] first: usize,
) {
    mma.execute_inplace(a, &b.first, acc.index_mut(first));
    mma.execute_inplace(a, &b.second, acc.index_mut(comptime!(first + 1)));
}

/// Loads four 8 x 8 matrices; each unit passes the address of one row, eight units one matrix.
#[cube]
pub(crate) fn load<F: Float>(
    mma: &Mma<F>,
    from: &Tile<F>,
    at: usize,
    #[comptime] transposed: bool,
) -> Frag<F> {
    let row = from.slice(at, at + 1);
    mma.load_matrix::<Vector<F, V8>, V2>(&row, MatrixIdent::B, 4usize, transposed)
}

/// Stores four 8 x 8 matrices; the reverse of [`load`].
#[cube]
pub(crate) fn store<F: Float>(
    mma: &Mma<F>,
    to: &mut Tile<F>,
    at: usize,
    f: &Frag<F>,
    #[comptime] transposed: bool,
) {
    let mut row = to.slice_mut(at, at + 1);
    mma.store_matrix::<Vector<F, V8>, V2>(&mut row, f, MatrixIdent::Accumulator, 4usize, transposed);
}

/// `acc[m * stride + first + {0, 1}] += a[m * a_stride + a_first] * (both halves of b)` for every `m < held`, b as
/// [`load`] has loaded it: its first half needs no copy, as an instruction takes what it needs from the front.
#[cube]
pub(crate) fn mma2<F: Float>(
    mma: &Mma<F>,
    a: &Sequence<Frag<F>>,
    #[comptime] a_first: usize,
    #[comptime] a_stride: usize,
    b: &Frag<F>,
    acc: &mut Sequence<Acc>,
    #[comptime] first: usize,
    #[comptime] stride: usize,
    #[comptime] held: usize,
) {
    #[unroll]
    for m in 0..held {
        let to = acc.index_mut(comptime!(m * stride + first));
        mma.execute_inplace(a.index(m * a_stride + a_first), b, to);
    }
    let mut second = Frag::<F>::new(2usize);
    second[0] = b[2];
    second[1] = b[3];
    #[unroll]
    for m in 0..held {
        let to = acc.index_mut(comptime!(m * stride + first + 1));
        mma.execute_inplace(a.index(m * a_stride + a_first), &second, to);
    }
}

/// Multiplies both rows of an accumulator by a factor per column.
#[cube]
pub(crate) fn scale_columns(a: &mut Acc, by: Vector<f32, V2>) {
    a[0] = a[0] * by;
    a[1] = a[1] * by;
}

/// Offset of the row that this unit passes to [`load`] for a right operand stored as `[column][depth]`
/// with rows of `ld`: two operands of 8 columns.
#[cube]
pub(crate) fn by_columns(lane: usize, #[comptime] ld: usize) -> usize {
    (lane / 16 * 8 + lane % 8) * ld + lane / 8 % 2
}

/// The same for an operand stored as `[depth][column]`, loaded transposed, and for a left operand stored as
/// `[row][depth]`, loaded as it is.
#[cube]
pub(crate) fn by_depth(lane: usize, #[comptime] ld: usize) -> usize {
    lane % 16 * ld + lane / 16
}

/// The unit of row `row`, half `half` of a 16 x 16 block whose halves change place every four rows, so
/// that eight rows fall into different banks.
#[cube]
pub(crate) fn in_block(row: usize, half: usize) -> usize {
    row * 2 + (half ^ (row / 4 % 2))
}
