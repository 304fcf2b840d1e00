//! Progress of long work: a bar on a terminal, a line now and then elsewhere, nothing with `--quiet`.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::output::{Output, size};

/// How often a line is printed when there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Bytes.
    Bytes,
    /// Things.
    Pieces,
}

/// The progress of one piece of work.
#[derive(Debug)]
pub struct Progress {
    what: &'static str,
    unit: Unit,
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
        Self::of(output, what, Unit::Bytes, total)
    }

    /// Starts to show the progress of `what`, which is `total` units.
    #[must_use]
    pub fn of(output: &Output, what: &'static str, unit: Unit, total: u64) -> Self {
        let shown = if !output.talks() {
            Shown::Nothing
        } else if std::io::stderr().is_terminal() {
            let bar = ProgressBar::new(total);
            let template = match unit {
                Unit::Bytes => "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
                Unit::Pieces => "{msg} {wide_bar} {pos}/{len}",
            };
            bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_message(what);
            // Also what is over at once was there.
            bar.tick();
            Shown::Bar(bar)
        } else {
            Shown::Lines(Instant::now())
        };
        Self { what, unit, total, done: 0, shown }
    }

    /// So many more are done.
    pub fn add(&mut self, more: u64) {
        self.done += more;
        match &mut self.shown {
            Shown::Bar(bar) => bar.inc(more),
            Shown::Lines(last) if last.elapsed() >= LINE_EVERY => {
                *last = Instant::now();
                let (done, total) = match self.unit {
                    Unit::Bytes => (size(self.done), size(self.total)),
                    Unit::Pieces => (self.done.to_string(), self.total.to_string()),
                };
                let line = format!("firstread: {}: {done} of {total}\n", self.what);
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
