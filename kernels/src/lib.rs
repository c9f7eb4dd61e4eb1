//! Device code of the `delta-rule` crate.
