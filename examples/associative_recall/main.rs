//! Writes key-value pairs into the state of every rule, reads them back, and checks what the family claims.
//! Nothing is trained.

#[path = "../common/args.rs"]
mod args;
#[path = "../common/claims.rs"]
mod claims;
#[path = "../common/compare.rs"]
mod compare;
#[path = "../common/device.rs"]
#[expect(dead_code, reason = "every call here is f32")]
mod device;
mod engine;
mod recall;
mod report;
#[path = "../common/rng.rs"]
mod rng;
mod settings;
mod show;
mod swaps;
#[path = "../common/tensors.rs"]
mod tensors;
#[path = "../common/terminal.rs"]
mod terminal;

use std::process::ExitCode;

use args::Result;
use settings::{Settings, USAGE};

fn main() -> ExitCode {
    terminal::exit("associative_recall", run())
}

fn run() -> Result<bool> {
    let Some(settings) = Settings::parse(std::env::args_os().skip(1)).map_err(args::with_hint)? else {
        terminal::print(USAGE)?;
        return Ok(true);
    };
    let claims = show::show(&settings)?;
    terminal::print(&format!("\nChecked in this run:\n{}", claims::verdict(&claims)))?;
    Ok(claims.iter().all(|claim| claim.held))
}
