//! `firstread build` and `optimize`: run the builder found beside this program.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use clap::Args;

use super::Outcome;
use super::options::Global;
use crate::daemon::control::{Kind, Problem};

/// The builder's name.
const BUILDER: &str = "firstread-build";

/// Arguments of the verb.
#[derive(Debug, Args)]
pub struct Build {
    /// Everything is passed on: see `--help` behind the verb
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
    pub arguments: Vec<OsString>,
}

impl Build {
    /// The builder's arguments: what was said before the verb holds for it as well.
    pub fn after(self, global: &Global) -> Vec<OsString> {
        let is = |argument: &OsString, flag: &str| {
            argument
                .to_str()
                .and_then(|text| text.strip_prefix(flag))
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
        };
        let said = |flags: &[&str]| self.arguments.iter().any(|argument| flags.iter().any(|flag| is(argument, flag)));
        let mut before: Vec<OsString> = Vec::new();
        if global.json && !said(&["--json"]) {
            before.push("--json".into());
        }
        if global.quiet && !said(&["--quiet", "-q"]) {
            before.push("--quiet".into());
        }
        for (flag, value) in [("--root", &global.root), ("--config", &global.config)] {
            if let Some(value) = value.as_ref().filter(|_| !said(&[flag])) {
                before.extend([flag.into(), value.as_os_str().to_owned()]);
            }
        }
        before.into_iter().chain(self.arguments).collect()
    }
}

/// Becomes the builder; returns only when that fails.
///
/// # Errors
/// A builder that is not there.
pub fn exec(verb: &str, arguments: &[OsString]) -> Outcome {
    let builder = builder()?;
    let error = Command::new(&builder).arg(verb).args(arguments).exec();
    Err(not_run(&builder, &error))
}

/// Runs the builder, and waits for it. It ends with this process: nobody would tell what it did.
///
/// # Errors
/// A builder that is not there.
pub fn run(verb: &str, arguments: &[OsString]) -> Outcome<ExitStatus> {
    let builder = builder()?;
    let own = std::process::id().to_string();
    let mut command = Command::new(&builder);
    command.arg(verb).args(arguments).args(["--run-by", &own]);
    command.status().map_err(|error| not_run(&builder, &error))
}

fn builder() -> Outcome<PathBuf> {
    let program = std::env::current_exe()
        .map_err(|error| Problem::new(Kind::Failed, format!("finding this program's directory: {error}")))?;
    Ok(program.with_file_name(BUILDER))
}

fn not_run(builder: &Path, error: &std::io::Error) -> Problem {
    let dir = builder.parent().unwrap_or(builder);
    Problem::new(Kind::Failed, format!("running the builder {}: {error}", builder.display()))
        .hint(format!("{BUILDER} belongs beside this program in {}; install both", dir.display()))
}
