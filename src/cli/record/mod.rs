//! `firstread record`: from an image to the profile of its start, in one command.

mod container;
mod loopback;
mod ready;
mod user;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use super::Outcome;
use super::attach::{AttachOptions, request};
use super::inspect::{open, runtime};
use super::options::{Context, absolute};
use super::output::size;
use super::profile::{Written, fetch, write_out};
use crate::daemon::client::Client;
use crate::daemon::control::{Attached, Call, DeviceInfo, InUse, Kind, Lifetime, Problem, Ready, Until};
use crate::fetch::Image;
use crate::profile::Profile;
use container::{Job, Report};
use ready::{Ports, ReadyWhen, Scan};

pub use container::Inside;

/// Read-ahead in KiB that a start is recorded with, and so runs with, unless something else is asked for. Without any, the
/// pack has what is read and nothing beside it; it is read in larger pieces all the same, when it is laid into the page cache.
const READ_AHEAD_KB: u32 = 0;
/// How often ports are looked at.
const PORT_POLL: Duration = Duration::from_millis(5);
/// How long the container may take to end.
const END: Duration = Duration::from_secs(20);
/// How much of the program's output an error shows, in bytes.
const TAIL: usize = 2048;

/// Arguments of the verb.
#[derive(Debug, Args)]
pub struct Record {
    /// The image: HOST[:PORT]/REPO[:TAG][@DIGEST] or oci:DIR[:TAG]
    #[arg(value_name = "REF")]
    reference: String,
    /// Where to write the profile; - for standard output
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// What says that the program is ready: a text in its output (or text:TEXT), the number of a TCP port that it listens
    /// on, or EXIT [default: the one TCP port that the image exposes, else EXIT]
    #[arg(long, value_name = "TEXT|PORT|EXIT")]
    ready_when: Option<ReadyWhen>,
    /// Most seconds until it is
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    /// A variable of its environment, over the image's
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<String>,
    /// Who it runs as, instead of the image's user: a name or number of the image's
    #[arg(long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    #[command(flatten)]
    options: AttachOptions,
    /// What to run instead of the image's command; its entry point is not used then
    #[arg(last = true, value_name = "CMD")]
    command: Vec<String>,
}

fn variable(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some((name, _)) if !name.is_empty() && !text.contains('\0') => Ok(text.to_owned()),
        _ => Err("write NAME=VALUE".to_owned()),
    }
}

/// The answer. Sizes in bytes, times in seconds.
#[derive(Debug, Serialize)]
struct Recorded {
    #[serde(flatten)]
    written: Written,
    ready_when: String,
    /// From attach until the program was ready.
    ready_seconds: f64,
}

/// What happens while the program runs.
enum Event {
    /// Its output had the text.
    Found,
    /// Its output ended; the last of it.
    Closed(Vec<u8>),
    /// What the container says.
    Said(Report),
    /// The container is gone.
    Gone,
    /// The verb was interrupted.
    Interrupted,
}

impl Record {
    /// Runs the verb.
    ///
    /// # Errors
    /// An image that can't be attached, a program that can't be started, fails, or is not ready in time, and a file that
    /// can't be written. Nothing is left then.
    pub fn run(&self, context: &Context) -> Outcome {
        let signals = runtime()?;
        let image = signals.block_on(open(context, &self.reference, &self.options.access))?;
        let ready_when = self.ready_when.clone().unwrap_or_else(|| default_readiness(&image));
        context.output.remark(format!("ready is {ready_when}"));
        let (events, received) = channel();
        watch_signals(&signals, &events)?;
        // The device goes away with this process's connection, however this process ends.
        let read_ahead = self.options.read_ahead.or(Some(READ_AHEAD_KB));
        let mut options = self.options.clone();
        options.read_ahead = read_ahead;
        let (mut client, attached) = request(context, &self.reference, &options, Lifetime::Tentative)?;
        let id = attached.device.id.clone();
        let job = self.job(&image, attached, context)?;
        let mut container = Container::start(&job, &ready_when, events, context)?;
        let deadline = Instant::now() + Duration::from_secs(self.timeout);
        let ready = until_ready(&received, &container, &ready_when, deadline)
            .and_then(|()| client.call::<Ready>(Call::Ready { target: id.clone() }));
        container.end();
        let ready = ready?;
        let text = fetch(&mut client, id.clone(), Until::Ready)?;
        let profile = Profile::from_text(&text)?;
        let written = write_out(context, &self.output, &text, &profile)?;
        detach(&mut client, &id)?;
        if self.output == Path::new("-") {
            return Ok(());
        }
        let answer = Recorded { written, ready_when: ready_when.to_string(), ready_seconds: ready.seconds };
        context.output.answer(&answer, |answer| {
            let Written { file, bytes, runs, files, .. } = &answer.written;
            let seconds = answer.ready_seconds;
            let read = size(*bytes);
            format!(
                "{}: ready after {seconds:.2} s; {read} in {runs} runs of {files} files and directories",
                file.display()
            )
        })
    }

    fn job(&self, image: &Image, device: Attached, context: &Context) -> Outcome<Job> {
        let config = &image.config;
        let command = match self.command.is_empty() {
            true => [config.entrypoint(), config.cmd()].concat(),
            false => self.command.clone(),
        };
        if command.is_empty() {
            let problem = Problem::new(Kind::Usage, format!("{} says nothing of what to run", self.reference));
            return Err(problem.hint("write the command behind --"));
        }
        let env = [config.env(), &self.env].concat();
        let owned = |text: Option<&str>| text.map(str::to_owned);
        let (user, dir) = (self.user.clone().or_else(|| owned(config.user())), owned(config.working_dir()));
        Ok(Job { device, room: absolute(&context.config.run)?, command, env, user, dir })
    }
}

/// The only TCP port that the image exposes, or the program's end.
fn default_readiness(image: &Image) -> ReadyWhen {
    let exposed = image.config.parsed.config().as_ref().and_then(|config| config.exposed_ports().as_ref());
    let ports: Vec<u16> = exposed
        .into_iter()
        .flatten()
        .filter_map(|port| port.strip_suffix("/tcp").unwrap_or(port).parse().ok())
        .collect();
    match ports.as_slice() {
        [port] if *port > 0 => ReadyWhen::Port(*port),
        _ => ReadyWhen::Exit,
    }
}

/// Gives the device back; the last reference to its mount goes a moment after the container.
fn detach(client: &mut Client, id: &str) -> Outcome {
    let deadline = Instant::now() + END;
    loop {
        match client.call::<DeviceInfo>(Call::Detach { target: id.to_owned(), in_use: InUse::Refuse }) {
            Err(problem) if problem.kind == Kind::Busy && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(50));
            }
            other => return other.map(drop),
        }
    }
}

// --- the container's verb side ---------------------------------------------------------------------------------------

/// A running container; it ends with this value.
struct Container {
    outer: Child,
}

impl Container {
    fn start(job: &Job, ready_when: &ReadyWhen, events: Sender<Event>, context: &Context) -> Outcome<Self> {
        let mut outer = container::start(job)?;
        if let Some(output) = outer.stderr.take() {
            let scan = match ready_when {
                ReadyWhen::Text(text) => Some(Scan::new(text)),
                ReadyWhen::Port(_) | ReadyWhen::Exit => None,
            };
            let (events, shown) = (events.clone(), context.output.talks());
            std::thread::spawn(move || follow_output(output, scan, shown, &events));
        }
        if let Some(reports) = outer.stdout.take() {
            std::thread::spawn(move || follow_reports(reports, &events));
        }
        Ok(Self { outer })
    }

    /// Ends the program and all that it started, and waits for that.
    fn end(&mut self) {
        drop(self.outer.stdin.take());
        let deadline = Instant::now() + END;
        while Instant::now() < deadline {
            match self.outer.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(2)),
                // Without a status there is no process any more.
                Ok(Some(_)) | Err(_) => return,
            }
        }
        // The inner process ends with the outer one.
        let _ = self.outer.kill();
        let _ = self.outer.wait();
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.end();
    }
}

/// Passes the program's output on, and looks for the text in it.
fn follow_output(mut output: impl Read, mut scan: Option<Scan>, shown: bool, events: &Sender<Event>) {
    let (mut buffer, mut tail) = (vec![0; 64 << 10], Vec::new());
    loop {
        let piece = match output.read(&mut buffer) {
            Ok(read @ 1..) => &buffer[..read],
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Ok(0) | Err(_) => break,
        };
        // Whoever would hear of it is gone when sending fails, and this thread with them.
        if scan.as_mut().is_some_and(|scan| scan.found(piece)) {
            scan = None;
            let _ = events.send(Event::Found);
        }
        if shown {
            let _ = std::io::stderr().write_all(piece);
        }
        tail.extend_from_slice(piece);
        tail.drain(..tail.len().saturating_sub(TAIL));
    }
    let _ = events.send(Event::Closed(tail));
}

fn follow_reports(reports: impl Read, events: &Sender<Event>) {
    for line in BufReader::new(reports.take(1 << 20)).lines().map_while(Result::ok) {
        if let Ok(report) = serde_json::from_str(&line) {
            let _ = events.send(Event::Said(report));
        }
    }
    let _ = events.send(Event::Gone);
}

/// Returns when the program is ready.
fn until_ready(events: &Receiver<Event>, container: &Container, when: &ReadyWhen, deadline: Instant) -> Outcome {
    let ports = Ports::of(container.outer.id());
    let mut end: Option<Report> = None;
    let mut output: Option<Vec<u8>> = None;
    loop {
        if let ReadyWhen::Port(port) = when
            && ports.listening(*port)
        {
            return Ok(());
        }
        match events.recv_timeout(PORT_POLL) {
            Ok(Event::Found) => return Ok(()),
            Ok(Event::Interrupted) => return Err(Problem::new(Kind::Failed, "interrupted; nothing was written")),
            Ok(Event::Said(Report::Failed(message))) => return Err(Problem::new(Kind::Failed, message)),
            Ok(Event::Said(Report::Ended { code: Some(0), .. })) if *when == ReadyWhen::Exit => return Ok(()),
            Ok(Event::Said(report)) => end = Some(report),
            Ok(Event::Closed(tail)) => output = Some(tail),
            Ok(Event::Gone) => end = end.or(Some(Report::Ended { code: None, signal: None })),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => end = end.or(Some(Report::Ended { code: None, signal: None })),
        }
        // Its last words may come after its end.
        if let (Some(Report::Ended { code, signal }), Some(output)) = (&end, &output) {
            return Err(ended_early(*code, *signal, when, output));
        }
        if Instant::now() >= deadline {
            let message = format!("the program was not ready in time: {when} was waited for");
            return Err(Problem::new(Kind::Failed, message).hint("choose another --ready-when, or a longer --timeout"));
        }
    }
}

fn ended_early(code: Option<i32>, signal: Option<i32>, when: &ReadyWhen, output: &[u8]) -> Problem {
    let how = match (code, signal) {
        (Some(code), _) => format!("with status {code}"),
        (None, Some(signal)) => format!("by signal {signal}"),
        (None, None) => "for a reason that nobody knows".to_owned(),
    };
    let mut message = format!("the program ended {how} before it was ready ({when})");
    let output = String::from_utf8_lossy(output);
    let lines: Vec<&str> = output.lines().collect();
    for line in lines.iter().skip(lines.len().saturating_sub(5)) {
        // No control characters of the program's on the terminal.
        let line: String = line.chars().map(|c| if c.is_control() { ' ' } else { c }).take(200).collect();
        message.push_str(&format!("\n  | {line}"));
    }
    Problem::new(Kind::Failed, message)
        .hint("`--ready-when EXIT` records programs that end; there is no network but loopback")
}

/// Interruptions become events.
fn watch_signals(runtime: &tokio::runtime::Runtime, events: &Sender<Event>) -> Outcome {
    let failed = |error: std::io::Error| Problem::new(Kind::Failed, format!("waiting for signals: {error}"));
    let _guard = runtime.enter();
    for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
        let mut signal = signal(kind).map_err(failed)?;
        let events = events.clone();
        runtime.spawn(async move {
            while signal.recv().await.is_some() {
                let _ = events.send(Event::Interrupted);
            }
        });
    }
    Ok(())
}
