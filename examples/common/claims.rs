//! What a run set out to show, and whether it did.

/// A statement that was measured.
pub(crate) struct Claim {
    pub(crate) text: String,
    pub(crate) held: bool,
}

/// Ticks and crosses.
pub(crate) fn verdict(claims: &[Claim]) -> String {
    let line = |claim: &Claim| format!("  {} {}\n", if claim.held { "✓" } else { "✗" }, claim.text);
    claims.iter().map(line).collect()
}
