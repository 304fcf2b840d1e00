//! Progress of long work: a bar on a terminal, a line now and then elsewhere, nothing with `--quiet`.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::output::{Output, size};

/// How often a line is printed when there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// The progress of one piece of work, in bytes.
#[derive(Debug)]
pub struct Progress {
    what: &'static str,
    total: u64,
    done: u64,
    shown: Shown,
}

#[derive(Debug)]
enum Shown {
    Bar(ProgressBar),
    Lines(Instant),
    Nothing,
}

impl Progress {
    /// Starts to show the progress of `what`, which has `total` bytes.
    #[must_use]
    pub fn new(output: &Output, what: &'static str, total: u64) -> Self {
        let shown = if !output.talks() {
            Shown::Nothing
        } else if std::io::stderr().is_terminal() {
            let bar = ProgressBar::new(total);
            let template = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
            bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_message(what);
            Shown::Bar(bar)
        } else {
            Shown::Lines(Instant::now())
        };
        Self { what, total, done: 0, shown }
    }

    /// `bytes` more are done.
    pub fn add(&mut self, bytes: u64) {
        self.done += bytes;
        match &mut self.shown {
            Shown::Bar(bar) => bar.inc(bytes),
            Shown::Lines(last) if last.elapsed() >= LINE_EVERY => {
                *last = Instant::now();
                let line = format!("firstread: {}: {} of {}\n", self.what, size(self.done), size(self.total));
                // Progress is not worth failing for.
                let _ = std::io::stderr().write_all(line.as_bytes());
            }
            Shown::Lines(_) | Shown::Nothing => {}
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Shown::Bar(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }
}
