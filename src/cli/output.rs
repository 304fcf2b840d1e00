//! Where answers and errors go.

use std::io::{self, IsTerminal, Write};

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use super::Outcome;
use crate::daemon::control::{Kind, Problem};

/// Standard output, in the form the user asked for.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    form: Form,
    remarks: Remarks,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Text,
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Remarks {
    Shown,
    Silent,
}

impl Output {
    /// The output that `--json` and `--quiet` ask for.
    #[must_use]
    pub fn new(json: bool, quiet: bool) -> Self {
        Self {
            form: if json { Form::Json } else { Form::Text },
            remarks: if quiet { Remarks::Silent } else { Remarks::Shown },
        }
    }

    /// Prints an answer: `value` as one JSON document, or what `text` makes of it.
    ///
    /// # Errors
    /// A standard output that can't be written; a reader that left early is none.
    pub fn answer<T: Serialize>(&self, value: &T, text: impl FnOnce(&T) -> String) -> Outcome {
        let mut text = match self.form {
            Form::Text => text(value),
            Form::Json => serde_json::to_string_pretty(value)
                .map_err(|error| Problem::new(Kind::Failed, format!("writing the answer: {error}")))?,
        };
        if text.is_empty() {
            return Ok(());
        }
        if !text.ends_with('\n') {
            text.push('\n');
        }
        let mut stdout = io::stdout().lock();
        match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                Err(Problem::new(Kind::Failed, format!("writing to standard output: {error}")))
            }
            _ => Ok(()),
        }
    }

    /// Tells the user something that is no part of the answer.
    pub fn remark(&self, text: impl std::fmt::Display) {
        if self.remarks == Remarks::Shown {
            // Standard error may be closed; a remark is not worth failing for.
            let _ = writeln!(io::stderr(), "firstread: {text}");
        }
    }

    /// Whether the answer is a JSON document.
    #[must_use]
    pub fn is_json(&self) -> bool {
        self.form == Form::Json
    }

    /// Whether remarks and progress are wanted.
    #[must_use]
    pub fn talks(&self) -> bool {
        self.remarks == Remarks::Shown
    }
}

/// Prints an error: what failed and where, then what to do.
pub fn complain(problem: &Problem) {
    let mut text = format!("firstread: {}\n", problem.message);
    if let Some(hint) = &problem.hint {
        text.push_str(&format!("  {hint}\n"));
    }
    // There is nowhere else to say it.
    let _ = io::stderr().write_all(text.as_bytes());
}

/// A table that fits the terminal. On anything else it is as wide as its content, so that it can be cut into fields.
pub fn table<const N: usize>(head: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(head.map(str::to_uppercase));
    let arrangement =
        if io::stdout().is_terminal() { ContentArrangement::Dynamic } else { ContentArrangement::Disabled };
    table.set_content_arrangement(arrangement);
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}

/// Names and values below each other.
pub fn fields<'a>(rows: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let mut text = String::new();
    for (name, value) in rows {
        text.push_str(&format!("{name:<20} {value}\n"));
    }
    text
}

/// A size for people: `512 B`, `12.3 MiB`.
#[must_use]
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    #[allow(clippy::cast_precision_loss)] // One digit behind the point is shown.
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_readable() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1 << 20, "1.0 MiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (5_637_144_576, "5.2 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn tables_have_no_frames() {
        let text = table(["id", "device"], [["python-1".to_owned(), "/dev/loop0".to_owned()]]);
        assert_eq!(text, "ID        DEVICE\npython-1  /dev/loop0");
    }
}
