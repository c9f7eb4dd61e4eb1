//! Chunk engine on the CPU.
