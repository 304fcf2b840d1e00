//! `firstread commit`: what was written to a device becomes an image of its own.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitStatus;

use clap::Args;

use super::Outcome;
use super::build;
use super::connect::connect;
use super::freeze::hold;
use super::options::{AccessOptions, Context, absolute};
use crate::daemon::client::Client;
use crate::daemon::control::{Call, DeviceInfo, Kind, Problem, Snapshotted, SourceAccess};
use crate::device::upper;
use crate::snapshot;

/// Arguments of `commit`.
#[derive(Debug, Args)]
pub struct Commit {
    /// A writable device (id, device path or mountpoint), the directory of an upper, or a container with a block device
    /// of its own (its name in containerd, or the key of its snapshot)
    #[arg(value_name = "ID|DIR|CONTAINER")]
    target: String,
    /// HOST/REPO[:TAG], oci:DIR[:TAG] or oci-archive:FILE[:TAG]
    #[arg(value_name = "DEST")]
    destination: String,
    /// Change the image's configuration with an instruction: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, USER, VOLUME or
    /// WORKDIR (repeatable)
    #[arg(long, short, value_name = "INSTRUCTION")]
    change: Vec<String>,
    /// What was done, for the image's history
    #[arg(long, short, value_name = "TEXT")]
    message: Option<String>,
    /// Who did it
    #[arg(long, short, value_name = "NAME")]
    author: Option<String>,
    /// A further image of firstread whose chunks need not be pushed again, an earlier commit of the same device for one
    /// (repeatable)
    #[arg(long, value_name = "REF")]
    reuse: Vec<String>,
    /// zstd level of new chunks: 3 is fast, 19 makes them an eighth smaller
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..=22))]
    level: i32,
    /// Directory for temporary files; they need about the size of what is stored, and again for a registry
    #[arg(long, value_name = "DIR", env = "TMPDIR", default_value = "/tmp")]
    temp: PathBuf,
    #[command(flatten)]
    access: AccessOptions,
}

/// Where what was written is, for as long as this lives.
pub struct Written {
    /// The directory of the upper; nobody has it.
    pub dir: PathBuf,
    /// How the image's source is reached that it lies over, if a device knows.
    pub access: Option<SourceAccess>,
    /// Whether its file system was frozen.
    pub frozen: bool,
    /// A snapshot goes with the connection.
    client: Option<Client>,
}

impl Commit {
    /// Runs the verb.
    ///
    /// # Errors
    /// A device that is not there or can't be written, or what the system says. The builder says itself what it could not
    /// do, and its exit code becomes this program's.
    pub fn run(&self, context: &Context) -> Outcome {
        let written = written(&self.target, context)?;
        let mut arguments: Vec<OsString> = vec!["--upper".into(), written.dir.as_os_str().to_owned()];
        arguments.extend([self.destination.clone().into(), "--level".into(), self.level.to_string().into()]);
        arguments.extend(["--temp".into(), absolute(&self.temp)?.into()]);
        if written.frozen {
            arguments.push("--frozen".into());
        }
        for change in &self.change {
            arguments.extend(["--change".into(), change.into()]);
        }
        for reference in &self.reuse {
            arguments.extend(["--reuse".into(), reference.into()]);
        }
        for (flag, value) in [("--message", &self.message), ("--author", &self.author)] {
            if let Some(value) = value {
                arguments.extend([flag.into(), value.into()]);
            }
        }
        arguments.extend(access_arguments(&self.access, written.access.as_ref(), context)?);
        let status = build::run("commit", &arguments)?;
        finish(written, status)
    }
}

/// The builder's flags: the verb's access, and where it says nothing that of the device.
///
/// # Errors
/// A path that can't be made absolute.
pub fn access_arguments(
    options: &AccessOptions,
    device: Option<&SourceAccess>,
    context: &Context,
) -> Outcome<Vec<OsString>> {
    let mut access = context.access(options)?;
    if let Some(device) = device {
        access.plain_http |= device.plain_http;
        if options.docker_config.is_none() {
            access.docker_config = device.docker_config.clone().or(access.docker_config);
        }
        if options.hosts_dir.is_none() {
            access.hosts_dir = device.hosts_dir.clone().or(access.hosts_dir);
        }
        if options.blobs.is_empty() {
            access.blobs.clone_from(&device.blobs);
        }
    }
    let mut arguments: Vec<OsString> = Vec::new();
    if access.plain_http {
        arguments.push("--plain-http".into());
    }
    for (flag, value) in [("--docker-config", access.docker_config), ("--hosts-dir", access.hosts_dir)] {
        if let Some(value) = value {
            arguments.extend([flag.into(), value.into()]);
        }
    }
    for place in access.blobs {
        arguments.extend(["--blobs".into(), place.to_string().into()]);
    }
    if context.output.is_json() {
        arguments.push("--json".into());
    }
    if !context.output.talks() {
        arguments.push("--quiet".into());
    }
    Ok(arguments)
}

/// Ends as the builder did.
///
/// # Errors
/// Never, but in the type: a builder that failed has said why, and ends this process.
pub fn finish(written: Written, status: ExitStatus) -> Outcome {
    drop(written.client);
    if status.success() {
        return Ok(());
    }
    std::process::exit(status.code().unwrap_or(1))
}

/// Finds what was written to `target`: a snapshot of what a device has, or the directory itself that no device has.
///
/// # Errors
/// There is neither, or what the system says.
pub fn written(target: &str, context: &Context) -> Outcome<Written> {
    let mut client = connect(context)?;
    let dir = match container(target, &context.config.root)? {
        Some(upper) => upper,
        None => absolute(std::path::Path::new(target))?,
    };
    if let Some(open) = &mut client
        && let Some(device) = find(open, target, &dir)?
    {
        let held = hold(&device.device, &context.config.run)?;
        let snapshotted: Snapshotted = open.call(Call::Snapshot { target: device.id })?;
        let frozen = held.is_some();
        drop(held);
        return Ok(of(snapshotted, frozen, client));
    }
    if upper::describe(&dir)?.is_none() {
        let message = format!("there is no device {target}, no container with one, and no upper in {}", dir.display());
        let hint = "`firstread list` shows the devices; a container on an overlay (runc) is committed by its client";
        return Err(Problem::new(Kind::NotFound, message).hint(hint));
    }
    if let Some(open) = &mut client {
        match open.call::<Snapshotted>(Call::Snapshot { target: dir.display().to_string() }) {
            Ok(snapshotted) => return Ok(of(snapshotted, false, client)),
            Err(problem) if problem.kind == Kind::NotFound => {}
            Err(problem) => return Err(problem),
        }
    }
    Ok(Written { dir, access: None, frozen: false, client: None })
}

/// Where the container with this name writes, if it is one with a block device of its own.
fn container(name: &str, root: &std::path::Path) -> Outcome<Option<PathBuf>> {
    let mut found = snapshot::uppers(&absolute(root)?, name);
    match found.len() {
        0 | 1 => Ok(found.pop().map(|(_, upper)| upper)),
        _ => {
            let keys: Vec<String> = found.into_iter().map(|(key, _)| key).collect();
            let message = format!("several containers are called {name}: {}", keys.join(", "));
            Err(Problem::new(Kind::Usage, message).hint("give the key of one"))
        }
    }
}

fn of(snapshotted: Snapshotted, frozen: bool, client: Option<Client>) -> Written {
    Written { dir: snapshotted.dir, access: Some(snapshotted.access), frozen, client }
}

fn find(client: &mut Client, target: &str, dir: &std::path::Path) -> Outcome<Option<DeviceInfo>> {
    match client.call::<DeviceInfo>(Call::Find { target: target.to_owned() }) {
        Ok(device) => return Ok(Some(device)),
        Err(problem) if problem.kind == Kind::NotFound => {}
        Err(problem) => return Err(problem),
    }
    let all: Vec<DeviceInfo> = client.call(Call::List)?;
    let is_it = |device: &DeviceInfo| {
        device.mountpoint.as_deref() == Some(dir) || device.upper.as_ref().is_some_and(|upper| upper.dir == dir)
    };
    Ok(all.into_iter().find(is_it))
}
