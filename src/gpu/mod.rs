//! The front door on CubeCL bindings.
