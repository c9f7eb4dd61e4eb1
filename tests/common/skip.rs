//! How tests say what they leave out.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::io::Write;
use std::sync::Mutex;

static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Says aloud what is not tested, once for each reason. To the error stream itself: of what `eprintln!` writes the harness
/// shows nothing, unless the test fails.
pub(crate) fn skipped(why: impl Display) {
    let why = why.to_string();
    if SAID.lock().expect("no other thread has failed here").insert(why.clone()) {
        writeln!(std::io::stderr(), "SKIPPED: {why}").expect("an error stream");
    }
}

/// The same of what CI must not leave out: a failure where `CI` is set.
pub(crate) fn missing(what: impl Display) {
    assert!(std::env::var_os("CI").is_none(), "CI needs it: {what}");
    skipped(what);
}
