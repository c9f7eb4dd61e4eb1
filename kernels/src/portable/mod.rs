//! The kernels that every device runs: f32 arithmetic, 32 KB of shared memory, no plane operations.

mod blueprint;
mod chunk;
pub mod collect;
pub mod gradients;
mod rows;
pub mod scan;
mod stage;
mod state;
pub mod sweep;

pub use blueprint::Blueprint;
