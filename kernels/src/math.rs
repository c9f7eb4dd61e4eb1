//! The fused transforms, on scalars.

use cubecl::prelude::*;

use crate::record::F4;
use crate::spec::{BetaMap, Decay, GateMap, Spec};
use crate::tensors::GateFormula;

/// $\sigma(x)$, without overflow for either sign.
#[cube]
pub(crate) fn sigmoid(x: f32) -> f32 {
    let e = f32::exp(-f32::abs(x));
    let r = 1.0f32 / (1.0f32 + e);
    select(x >= 0.0f32, r, e * r)
}

/// $\log(1 + e^x)$, without overflow.
#[cube]
fn softplus(x: f32) -> f32 {
    f32::max(x, 0.0f32) + f32::log1p(f32::exp(-f32::abs(x)))
}

/// Beta from what the caller holds.
#[cube]
pub(crate) fn beta_of(x: f32, #[comptime] map: BetaMap) -> f32 {
    if comptime!(map == BetaMap::Identity) {
        x
    } else if comptime!(map == BetaMap::Sigmoid) {
        sigmoid(x)
    } else {
        2.0f32 * sigmoid(x)
    }
}

/// The log decay, at most 0, from what the caller holds.
#[cube]
pub(crate) fn log_decay_of(x: f32, a_log: f32, bias: f32, lower_bound: f32, #[comptime] map: GateMap) -> f32 {
    if comptime!(map == GateMap::Identity) {
        x
    } else if comptime!(map == GateMap::Softplus) {
        -f32::exp(a_log) * softplus(x + bias)
    } else {
        lower_bound * sigmoid(f32::exp(a_log) * (x + bias))
    }
}

/// The factor $e^g$ in `[0, 1]` from what the caller holds.
#[cube]
pub(crate) fn decay_of(x: f32, a_log: f32, bias: f32, lower_bound: f32, #[comptime] map: GateMap) -> f32 {
    f32::exp(log_decay_of(x, a_log, bias, lower_bound, map))
}

/// The factors of four channels from `c` on: 1 beyond K, and where no token `starts`.
#[cube]
pub(crate) fn decays_of(
    x: F4,
    formula: &GateFormula,
    hv: usize,
    c: usize,
    starts: bool,
    #[comptime] spec: Spec,
) -> F4 {
    let mut d = F4::new(1.0f32);
    if starts {
        #[unroll]
        for e in 0..4usize {
            if c + e < spec.key_dim {
                let (a, bias) = gate_constants(formula, hv, c + e, spec);
                d[e] = decay_of(x[e], a, bias, formula.lower_bound, spec.gate);
            }
        }
    }
    d
}

/// `(A_log, dt_bias)` of a head and channel.
#[cube]
pub(crate) fn gate_constants(
    formula: &GateFormula,
    hv: usize,
    channel: usize,
    #[comptime] spec: Spec,
) -> (f32, f32) {
    let mut a = 0.0f32;
    let mut bias = 0.0f32;
    if comptime!(spec.gate != GateMap::Identity) {
        a = formula.a_log[hv];
        if comptime!(spec.has_bias) {
            if comptime!(spec.decay == Decay::Channel) {
                bias = formula.dt_bias[hv * spec.key_dim + channel];
            } else {
                bias = formula.dt_bias[hv];
            }
        }
    }
    (a, bias)
}

/// The derivative of beta with respect to what the caller holds.
#[cube]
pub(crate) fn beta_slope(x: f32, #[comptime] map: BetaMap) -> f32 {
    let mut slope = 1.0f32;
    if comptime!(map != BetaMap::Identity) {
        slope = sigmoid(x) * sigmoid(-x);
    }
    if comptime!(map == BetaMap::TwoSigmoid) {
        slope *= 2.0f32;
    }
    slope
}

/// The derivatives of the log decay with respect to what the caller holds (`dt_bias` has the same) and to `A_log`.
#[cube]
pub(crate) fn gate_slopes(
    x: f32,
    a_log: f32,
    bias: f32,
    lower_bound: f32,
    #[comptime] map: GateMap,
) -> (f32, f32) {
    let mut by_x = 1.0f32;
    let mut by_a_log = 0.0f32;
    let a = f32::exp(a_log);
    if comptime!(map == GateMap::Softplus) {
        by_x = -a * sigmoid(x + bias);
        by_a_log = -a * softplus(x + bias);
    } else if comptime!(map == GateMap::Bounded) {
        let y = a * (x + bias);
        let slope = lower_bound * sigmoid(y) * sigmoid(-y);
        by_x = slope * a;
        by_a_log = slope * y;
    }
    (by_x, by_a_log)
}

/// `acc + a . b`.
#[cube]
pub(crate) fn dot(a: F4, b: F4, acc: f32) -> f32 {
    fma(a[3], b[3], fma(a[2], b[2], fma(a[1], b[1], fma(a[0], b[0], acc))))
}
