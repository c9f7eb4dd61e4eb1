//! L2 norm, sigmoids and gate formulas, each with its gradient.
