//! Finding the daemon, and starting one when none runs.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use super::Outcome;
use super::freeze::thaw_abandoned;
use super::options::Context;
use crate::daemon::client::Client;
use crate::daemon::control::{Kind, Problem};
use crate::daemon::rundir::{self, LOG};
use crate::daemon::startup::{FAILED, READY};
use crate::sys::descriptors;

/// The daemon of this context, if one runs.
///
/// # Errors
/// A daemon that owns another root directory.
pub fn connect(context: &Context) -> Outcome<Option<Client>> {
    thaw_abandoned(&context.config.run);
    let Some(client) = Client::connect(&context.config.run)? else { return Ok(None) };
    let (theirs, ours) = (&client.hello().root, &context.config.root);
    if std::fs::canonicalize(theirs).ok() != std::fs::canonicalize(ours).ok() {
        let message = format!(
            "the daemon of {} (process {}) owns the root directory {}, not {}",
            context.config.run.display(),
            client.hello().pid,
            theirs.display(),
            ours.display()
        );
        return Err(Problem::new(Kind::Failed, message).hint("a daemon of another root needs another --run directory"));
    }
    Ok(Some(client))
}

/// The daemon of this context; starts one when none runs.
///
/// # Errors
/// A daemon that can't be started, with what it said.
pub fn connect_or_start(context: &Context) -> Outcome<Client> {
    if let Some(client) = connect(context)? {
        return Ok(client);
    }
    let run = &context.config.run;
    let _turn = rundir::start_turn(run)?;
    if let Some(client) = connect(context)? {
        return Ok(client);
    }
    context.output.remark(format!("no daemon runs; starting one, its log is {}", run.join(LOG).display()));
    start(context)?;
    connect(context)?.ok_or_else(|| {
        Problem::new(Kind::Failed, "the daemon was started and is gone again")
            .hint(format!("its log says why: {}", run.join(LOG).display()))
    })
}

fn start(context: &Context) -> Outcome {
    let config = &context.config;
    let failed = |reason: &dyn std::fmt::Display| {
        Problem::new(Kind::Failed, format!("starting the daemon: {reason}"))
            .hint(format!("its log may say more: {}", config.run.join(LOG).display()))
    };
    let program = std::env::current_exe().map_err(|error| failed(&error))?;
    let mut command = Command::new(program);
    command.args(["daemon", "--background", "--root"]).arg(&config.root);
    command.arg("--run").arg(&config.run).args(["--log", &config.log]);
    if let Some(file) = &context.config_file {
        command.arg("--config").arg(super::options::absolute(file)?);
    }
    let log = rundir::open_log(&config.run)?;
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    // What this process was started with, such as a shell's lock, is not the daemon's.
    if let Err(error) = descriptors::close_on_exec() {
        tracing::debug!("the daemon gets all descriptors: {error}");
    }
    let mut child = command.spawn().map_err(|error| failed(&error))?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        // The daemon writes one line, or dies.
        BufReader::new(stdout).read_line(&mut line).map_err(|error| failed(&error))?;
    }
    match line.trim_end() {
        READY => Ok(()),
        text => match text.strip_prefix(FAILED) {
            Some(reason) => Err(failed(&reason)),
            None => Err(failed(&"it died without a word")),
        },
    }
}
