//! Runs one stored problem and compares every result with the truth in the file.

#[path = "../common/args.rs"]
mod args;
#[path = "../common/case.rs"]
mod case;
#[path = "../common/compare.rs"]
mod compare;
mod compute;
#[path = "../common/device.rs"]
mod device;
#[path = "../common/file.rs"]
mod file;
mod report;
mod save;
mod settings;
#[path = "../common/tensors.rs"]
mod tensors;
#[path = "../common/terminal.rs"]
mod terminal;

use std::process::ExitCode;

use args::Result;
use case::Case;
use settings::{Settings, USAGE};

fn main() -> ExitCode {
    terminal::exit("run_case", run())
}

fn run() -> Result<bool> {
    let Some(settings) = Settings::parse(std::env::args_os().skip(1)).map_err(args::with_hint)? else {
        terminal::print(USAGE)?;
        return Ok(true);
    };
    settings.device.available()?;
    let path = settings.file.display();
    let bytes = std::fs::read(&settings.file).map_err(|error| format!("cannot read {path}: {error}"))?;
    let case = Case::parse(&bytes).map_err(|error| format!("{path}: {error}"))?;
    let results = compute::compute(&settings, &case)?;
    if let Some(out) = &settings.out {
        save::save(out, &settings, &case, &results)?;
    }
    let (text, held) = report::report(&settings, &case, &results);
    terminal::print(&text)?;
    Ok(held)
}
