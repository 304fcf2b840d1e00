//! The command line of `firstread`: one file per verb.
//!
//! A verb returns a [`Problem`] or prints its answer; only [`run`] turns that into an exit code: 0 done, 1 failed, 2
//! wrong usage. Errors go to standard error; with `--json` standard output gets exactly one document.

mod attach;
mod build;
mod commit;
mod connect;
mod daemon;
mod detach;
mod doctor;
mod export;
mod freeze;
mod inspect;
mod lay;
mod list;
mod mount;
mod options;
mod output;
mod pin;
mod pool;
mod profile;
mod progress;
mod prove;
mod pull;
mod ready;
mod record;
mod reference;
mod report;
mod snapshotter;
mod status;
mod stop;
mod unpin;
mod upper;
mod verify;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

use crate::daemon::control::{Kind, Problem};
use options::{Context, Global};

/// What a verb returns.
type Outcome<T = ()> = Result<T, Problem>;

/// Container images as block devices that can be used before they are downloaded, every block verified.
#[derive(Debug, Parser)]
#[command(name = "firstread", version, disable_help_subcommand = true, max_term_width = 100)]
struct Arguments {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Pack a file system or an image, write its index, publish both (runs firstread-build)
    #[command(disable_help_flag = true)]
    Build(build::Build),
    /// Add a start-up pack to an image: what its start reads, streamed at attach (runs firstread-build)
    #[command(disable_help_flag = true)]
    Optimize(build::Build),
    /// Show what an image consists of: index, packs, chunks, sharing
    Inspect(inspect::Inspect),
    /// Check an image: the index is sound, every chunk can be fetched and has its digest
    Verify(verify::Verify),
    /// Expose an image as a block device and print its path
    Attach(attach::Attach),
    /// Attach an image and mount it, read-only unless it is to be written
    Mount(mount::Mount),
    /// Unmount and detach
    Umount(mount::Umount),
    /// Detach a device, or all
    Detach(detach::Detach),
    /// Publish what was written to a device as an image of its own; the device goes on
    Commit(commit::Commit),
    /// Serve an image to another program, in the foreground until stopped
    Export(export::Export),
    /// List the devices
    List(list::List),
    /// Show what was read, fetched and waited for
    Status(status::Status),
    /// Run an image's program, and write what its start read to a file
    Record(record::Record),
    /// Write what a start read, in order, to a file; or merge such files
    Profile(profile::Profile),
    /// Explain a start on a page: waits, files, what came too early and too late
    Report(report::Report),
    /// Say that the program on a device is ready: its start is over
    Ready(ready::Ready),
    /// Fetch all of an image and keep it: afterwards it starts with the registry gone
    Pin(pin::Pin),
    /// Let the chunks of a pinned image be evicted again
    Unpin(unpin::Unpin),
    /// What was written to devices and is kept
    #[command(subcommand)]
    Upper(upper::Upper),
    /// The node's pool
    #[command(subcommand)]
    Pool(pool::Pool),
    /// Say what this machine lacks for firstread and containerd, and what mends it
    Doctor(doctor::Doctor),
    /// Pull an image into containerd's store, without what its start does not need
    Pull(pull::Pull),
    /// Run containerd's proxy snapshotter in the foreground
    Snapshotter(snapshotter::Snapshotter),
    /// Run the node's daemon in the foreground; other verbs start one when none runs
    Daemon(daemon::Daemon),
    /// Detach all and stop the daemon
    Stop(stop::Stop),
    /// Lays a start into the page cache for the daemon
    #[command(name = crate::daemon::laying::VERB, hide = true)]
    Lay(lay::Lay),
    /// Holds a file system frozen for `commit`
    #[command(name = "hold-frozen", hide = true)]
    Hold(freeze::Hold),
    /// The container that `record` runs a program in
    #[command(name = "record-inside", hide = true)]
    RecordInside(record::Inside),
}

/// Runs the program with the arguments of the process.
#[must_use]
pub fn run() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    // Every argument after the verb is the builder's, also those that look like ours.
    if let Some(verb) = ["build", "optimize"].iter().find(|verb| arguments.get(1).is_some_and(|first| first == **verb))
    {
        return finish(build::exec(verb, &arguments[2..]));
    }
    match Arguments::try_parse_from(&arguments) {
        Ok(arguments) => finish(dispatch(arguments)),
        Err(error) => {
            // Nothing is left to do when even this can't be written.
            let _ = error.print();
            match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
                _ => ExitCode::from(2),
            }
        }
    }
}

fn dispatch(arguments: Arguments) -> Outcome {
    let global = arguments.global;
    // The daemon has flags that are settings, and a log of its own.
    if let Verb::Daemon(verb) = arguments.verb {
        return verb.run(global);
    }
    if let Verb::Snapshotter(verb) = arguments.verb {
        return verb.run(global);
    }
    if let Verb::Build(verb) = arguments.verb {
        return build::exec("build", &verb.after(&global));
    }
    if let Verb::Optimize(verb) = arguments.verb {
        // It keeps nothing in the root directory.
        let global = Global { root: None, config: None, ..global };
        return build::exec("optimize", &verb.after(&global));
    }
    if let Verb::RecordInside(verb) = arguments.verb {
        return verb.run();
    }
    if let Verb::Hold(verb) = arguments.verb {
        return verb.run();
    }
    if let Verb::Lay(verb) = arguments.verb {
        return verb.run();
    }
    let context = Context::new(global)?;
    match arguments.verb {
        Verb::Inspect(verb) => verb.run(&context),
        Verb::Verify(verb) => verb.run(&context),
        Verb::Attach(verb) => verb.run(&context),
        Verb::Mount(verb) => verb.run(&context),
        Verb::Umount(verb) => verb.run(&context),
        Verb::Detach(verb) => verb.run(&context),
        Verb::Commit(verb) => verb.run(&context),
        Verb::Export(verb) => verb.run(&context),
        Verb::List(verb) => verb.run(&context),
        Verb::Status(verb) => verb.run(&context),
        Verb::Record(verb) => verb.run(&context),
        Verb::Profile(verb) => verb.run(&context),
        Verb::Report(verb) => verb.run(&context),
        Verb::Ready(verb) => verb.run(&context),
        Verb::Pin(verb) => verb.run(&context),
        Verb::Unpin(verb) => verb.run(&context),
        Verb::Upper(verb) => verb.run(&context),
        Verb::Pool(verb) => verb.run(&context),
        Verb::Pull(verb) => verb.run(&context),
        Verb::Doctor(verb) => verb.run(&context),
        Verb::Stop(verb) => verb.run(&context),
        Verb::Build(_) | Verb::Optimize(_) | Verb::Daemon(_) | Verb::Hold(_) => Ok(()),
        Verb::Snapshotter(_) | Verb::RecordInside(_) | Verb::Lay(_) => Ok(()),
    }
}

fn finish(outcome: Outcome) -> ExitCode {
    let Err(problem) = outcome else { return ExitCode::SUCCESS };
    output::complain(&problem);
    match problem.kind {
        Kind::Usage => ExitCode::from(2),
        _ => ExitCode::FAILURE,
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Arguments::command().debug_assert();
    }
}
