//! The kernels that every device runs: f32 arithmetic, 32 KB of shared memory, no plane operations.

mod blueprint;
pub mod collect;
pub mod gradients;
mod inverse;
pub mod prepare;
mod rows;
pub mod scan;
pub mod sweep;
mod tile;
mod walk;

pub use blueprint::Blueprint;
