//! Which planes of a cube scan, and which prepare or fetch.
//!
//! The first ones scan, all others prepare or fetch. Beside few planes that scan it matters where the others are. Plane p
//! belongs to scheduler p % 4, and a scheduler issues one instruction at a time: groups that only fetch take the last two
//! schedulers, and the scan has the first two for itself.

use cubecl::prelude::*;

use super::blueprint::{Blueprint, SCHEDULERS};

/// A unit that prepares or fetches.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Fetcher {
    /// Its group, which takes every chunk or every second one.
    pub(crate) group: usize,
    /// Its place in the group.
    pub(crate) unit: usize,
    /// Whether its plane has anything to do.
    pub(crate) works: bool,
}

#[cube]
impl Fetcher {
    pub(crate) fn new(unit: usize, #[comptime] bp: Blueprint) -> Self {
        if comptime!(bp.keeps_apart()) {
            let row = comptime!(32 * SCHEDULERS);
            let scans = comptime!(row - bp.group_units());
            let group = unit / row;
            let works = unit % row >= scans && group < bp.groups;
            Fetcher { group, unit: select(works, unit % row - scans, 0usize), works }
        } else {
            let unit = unit - comptime!(32 * bp.scanners());
            let group = comptime!(bp.group_units());
            Fetcher { group: unit / group, unit: unit % group, works: true.runtime() }
        }
    }
}
