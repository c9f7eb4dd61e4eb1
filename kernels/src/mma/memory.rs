//! The memory that the units of a cube share: one array, with tiles of operands first, and behind them regions that hold
//! something else. CubeCL would put several arrays in another order in every process, and what compilers have kept of a
//! kernel would not be found again.

use std::marker::PhantomData;

use cubecl::ir::{
    IndexAssignOperator, IndexOperator, Instruction, Operation, Operator, Scope, UnaryOperator, Variable,
};
use cubecl::prelude::*;

use super::tile::{Tile, V8};

/// Bytes of a unit of shared memory.
pub(crate) const UNIT_BYTES: usize = 16;

/// Where the regions of a cube's shared memory lie, in units of 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Regions<const N: usize> {
    pub(crate) at: [usize; N],
    pub(crate) units: usize,
}

impl<const N: usize> Regions<N> {
    /// Regions of so many bytes, one behind the other.
    pub(crate) fn new(bytes: [usize; N]) -> Self {
        let mut units = 0;
        let at = bytes.map(|bytes| {
            let at = units;
            units += bytes.div_ceil(UNIT_BYTES);
            at
        });
        Self { at, units }
    }

    pub(crate) fn bytes(&self) -> usize {
        UNIT_BYTES * self.units
    }
}

/// Shared memory, all of it.
#[cube]
pub(crate) fn new_tile<F: Float>(#[comptime] units: usize) -> Tile<F> {
    SharedMemory::<Vector<F, V8>>::new_aligned(units, 128usize)
}

/// A region of shared memory that holds elements of another type, of 4, 8 or 16 bytes.
#[derive(Clone, Copy)]
pub(crate) struct Region<T: CubePrimitive>(PhantomData<T>);

/// All of shared memory, and the first element of the region.
#[derive(Clone)]
pub(crate) struct RegionExpand<T: CubePrimitive> {
    memory: Variable,
    first: usize,
    element: PhantomData<T>,
}

/// The region that begins with unit `at`.
#[cube]
#[allow(unused_variables)]
pub(crate) fn region<F: Float, T: CubePrimitive>(of: &Tile<F>, #[comptime] at: usize) -> Region<T> {
    intrinsic!(|scope| {
        let first = at * UNIT_BYTES / T::as_type(scope).size();
        RegionExpand { memory: *of.expand, first, element: PhantomData }
    })
}

#[cube]
impl<T: CubePrimitive> Region<T> {
    /// The same memory as elements of another type.
    pub(crate) fn reinterpret<U: CubePrimitive>(&self) -> Region<U> {
        intrinsic!(|scope| {
            let bytes = self.first * T::as_type(scope).size();
            let first = bytes / U::as_type(scope).size();
            RegionExpand { memory: self.memory, first, element: PhantomData }
        })
    }
}

impl<T: CubePrimitive> RegionExpand<T> {
    /// Where element `index` of the region lies in all of the memory, and its size in elements of the tiles.
    fn locate(&self, scope: &mut Scope, index: NativeExpand<usize>) -> (Variable, usize) {
        let index = match index.expand.as_const() {
            Some(index) => (index.as_usize() + self.first).into(),
            None => cubecl::frontend::add::expand(scope, index, self.first.into()),
        };
        let size = T::as_type(scope).size() / self.memory.ty.storage_type().size();
        (*index.expand, size)
    }
}

impl<T: CubePrimitive> CubeType for Region<T> {
    type ExpandType = RegionExpand<T>;
}

impl<T: CubePrimitive> IntoMut for RegionExpand<T> {
    fn into_mut(self, _scope: &mut Scope) -> Self {
        self
    }
}

impl<T: CubePrimitive> CubeDebug for RegionExpand<T> {}

impl<T: CubePrimitive> CubeIndex for Region<T> {
    type Output = T;
    type Idx = usize;
}

impl<T: CubePrimitive> CubeIndexMut for Region<T> {}

impl<T: CubePrimitive> CubeIndexExpand for RegionExpand<T> {
    type Output = NativeExpand<T>;
    type Idx = NativeExpand<usize>;

    fn expand_index(self, scope: &mut Scope, index: Self::Idx) -> Self::Output {
        let (index, size) = self.locate(scope, index);
        let load = IndexOperator { list: self.memory, index, vector_size: size, unroll_factor: 1 };
        let bits = scope.create_local(self.memory.ty.with_vector_size(size));
        scope.register(Instruction::new(Operator::UncheckedIndex(load), *bits));
        let out = scope.create_local(T::as_type(scope));
        scope.register(Instruction::new(Operator::Reinterpret(UnaryOperator { input: *bits }), *out));
        out.into()
    }

    fn expand_index_unchecked(self, scope: &mut Scope, index: Self::Idx) -> Self::Output {
        self.expand_index(scope, index)
    }
}

impl<T: CubePrimitive> CubeIndexMutExpand for RegionExpand<T> {
    fn expand_index_mut(self, scope: &mut Scope, index: Self::Idx, value: Self::Output) {
        let (index, size) = self.locate(scope, index);
        // A copy, since constants have no bits that could be taken for others.
        let element = scope.create_local(T::as_type(scope));
        scope.register(Instruction::new(Operation::Copy(*value.expand), *element));
        let bits = scope.create_local(self.memory.ty.with_vector_size(size));
        let input = UnaryOperator { input: *element };
        scope.register(Instruction::new(Operator::Reinterpret(input), *bits));
        let store = IndexAssignOperator { index, value: *bits, vector_size: size, unroll_factor: 1 };
        scope.register(Instruction::new(Operator::UncheckedIndexAssign(store), self.memory));
    }
}
