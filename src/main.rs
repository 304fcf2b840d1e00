//! The program `firstread`.

use std::process::ExitCode;

fn main() -> ExitCode {
    firstread::cli::run()
}
