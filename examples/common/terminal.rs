//! Printing that survives a closed pipe, and exit codes.

use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

use crate::args::Result;

/// Prints at once; a reader that has gone away (`| head`) is no error.
pub(crate) fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error),
        _ => Ok(()),
    }
}

/// 0: everything held; 1: something did not; 2: it could not be tried, and why.
pub(crate) fn exit(program: &str, outcome: Result<bool>) -> ExitCode {
    match outcome {
        Ok(held) => ExitCode::from(u8::from(!held)),
        Err(error) => {
            let _ = writeln!(io::stderr(), "{program}: {error}");
            ExitCode::from(2)
        }
    }
}
