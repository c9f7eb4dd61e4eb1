//! One source for one kernel.

use cubecl::prelude::*;

/// Declares all variables in the order in which they came to be. The last thing that a kernel says.
///
/// CubeCL keeps them in a table whose order differs from process to process, and what compilers have kept is only found for
/// the very same code.
#[cube]
pub(crate) fn declare_in_order() {
    intrinsic!(|scope| {
        let mut variables = scope.allocator.take_variables();
        variables.sort_by_key(|variable| variable.index());
        scope.locals.extend(variables);
    })
}
