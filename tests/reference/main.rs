//! The reference engine: against finite differences, against cases from elsewhere, and by its algebra.

#[path = "../common/mod.rs"]
mod common;

mod cases;
mod errors;
mod gradients;
mod memory;
mod options;
mod properties;
