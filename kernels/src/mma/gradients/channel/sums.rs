//! Sums of a row over all channels: from units to planes, and from planes to the row.

use cubecl::prelude::*;

use super::super::super::memory::Region;
use super::super::blueprint::{GradientsBlueprint, STRIP};
use super::operands::{index_of, is_channel};

/// What is summed over channels: k . H, and where there is a norm k . dK and q . dQ.
pub(crate) const KEY: usize = 0;
pub(crate) const ALONG_KEY: usize = 1;
pub(crate) const ALONG_QUERY: usize = 2;

/// Units that have one row's sum at last.
const SHARE: usize = 32 / STRIP;

/// Leaves the sums over the units of a plane, of which each holds a channel of all rows of a strip: each step halves the rows
/// that a unit adds up, until `SHARE` units share one. Consumes them.
#[cube]
pub(crate) fn leave_row_sums(
    sums: &mut Array<f32>,
    floats: &mut Region<f32>,
    strip: u32,
    d: u32,
    #[comptime] which: usize,
    #[comptime] bp: GradientsBlueprint,
) {
    let lane = d as usize % 32;
    let owns = is_channel(d, bp);
    #[unroll]
    for r in 0..STRIP {
        sums[r] = select(owns, sums[r], 0.0f32);
    }
    #[unroll]
    for level in 0..comptime!(STRIP.ilog2() as usize) {
        let left = comptime!(STRIP >> (level + 1));
        let mask = comptime!(16usize >> level);
        let upper = lane / mask % 2 == 1;
        #[unroll]
        for r in 0..left {
            let mine = select(upper, sums[comptime!(r + left)], sums[r]);
            let other = select(upper, sums[r], sums[comptime!(r + left)]);
            sums[r] = mine + plane_shuffle_xor(other, comptime!(mask as u32));
        }
    }
    let mut sum = sums[0];
    #[unroll]
    for level in 0..comptime!(SHARE.ilog2()) {
        sum += plane_shuffle_xor(sum, comptime!(1u32 << level));
    }
    if lane % SHARE == 0 {
        floats[comptime!(bp.row_sums_at(which)) + index_of(strip, d, bp) / SHARE] = sum;
    }
}

/// The sum of a row over all channels.
#[cube]
pub(crate) fn row_sum(
    floats: &Region<f32>,
    row: usize,
    #[comptime] which: usize,
    #[comptime] bp: GradientsBlueprint,
) -> f32 {
    let mut sum = 0.0f32;
    let first = row / STRIP * comptime!(bp.channel_planes() * STRIP) + row % STRIP;
    #[unroll]
    for plane in 0..comptime!(bp.channel_planes()) {
        sum += floats[comptime!(bp.row_sums_at(which) + plane * STRIP) + first];
    }
    sum
}
