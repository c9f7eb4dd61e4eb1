//! Conditions of which a part is known when a kernel is generated. Joined by `||` and `&&` they would leave both branches
//! in its source, which the first call has to compile.

use cubecl::prelude::*;

/// `known || condition`: if the first holds nothing is left of the test, nor of another branch.
#[cube]
pub(crate) fn known_or(#[comptime] known: bool, condition: bool) -> bool {
    if comptime!(known) { true.runtime() } else { condition }
}

/// `known && condition`: if the first does not hold nothing is left of the branch.
#[cube]
pub(crate) fn known_and(#[comptime] known: bool, condition: bool) -> bool {
    if comptime!(known) { condition } else { false.runtime() }
}
