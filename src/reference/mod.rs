//! Token loops, forward and backward: the truth.
