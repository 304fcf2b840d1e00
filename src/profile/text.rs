//! A profile as text.

use serde::{Deserialize, Serialize};

use super::{Kind, Place, Profile, Recording, Run};
use crate::error::{Error, Result};

/// Longest profile in bytes that is read.
pub const MAX_PROFILE_BYTES: u64 = 1 << 30;
const VERSION: u32 = 1;
const MAX_LINE: usize = 64 << 10;
const MAX_RUNS: usize = 4 << 20;

#[derive(Serialize, Deserialize)]
struct Head {
    firstread_profile: u32,
    #[serde(flatten)]
    recording: Recording,
}

#[derive(Serialize, Deserialize)]
struct Version {
    firstread_profile: u32,
}

#[derive(Serialize, Deserialize)]
struct Line {
    t: f64,
    is: Is,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    from: Option<u32>,
    blocks: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    block: Option<u32>,
}

#[derive(Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Is {
    File,
    Directory,
    Link,
    Metadata,
    Data,
}

impl Profile {
    /// The profile as text.
    ///
    /// # Errors
    /// [`Error::Invalid`] for numbers that JSON can't hold.
    pub fn to_text(&self) -> Result<String> {
        let failed = |error: serde_json::Error| invalid(error.to_string());
        let head = Head { firstread_profile: VERSION, recording: self.recording.clone() };
        let mut text = serde_json::to_string(&head).map_err(failed)?;
        text.push('\n');
        for run in &self.runs {
            let (is, path, from) = match &run.place {
                Place::Named { kind, path, from } => {
                    let is = match kind {
                        Kind::File => Is::File,
                        Kind::Directory => Is::Directory,
                        Kind::Link => Is::Link,
                    };
                    (is, Some(escape(path)), Some(*from))
                }
                Place::Metadata => (Is::Metadata, None, None),
                Place::Data => (Is::Data, None, None),
            };
            // Microseconds are as much as anybody can make use of.
            let t = (run.seconds * 1e6).round() / 1e6;
            let line = Line { t, is, path, from, blocks: run.blocks, block: run.block };
            text.push_str(&serde_json::to_string(&line).map_err(failed)?);
            text.push('\n');
        }
        Ok(text)
    }

    /// Reads a profile.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another version, [`Error::Invalid`] that names the line for everything else.
    pub fn from_text(text: &str) -> Result<Self> {
        let mut lines = text.lines().enumerate();
        let (_, first) = lines.next().ok_or_else(|| invalid("it is empty"))?;
        let version: Version =
            serde_json::from_str(first).map_err(|error| invalid(format!("its first line is no profile's: {error}")))?;
        if version.firstread_profile != VERSION {
            let found = version.firstread_profile;
            return Err(Error::Unsupported(format!(
                "profile of version {found}; this program reads version {VERSION}: use a newer one"
            )));
        }
        let head: Head = serde_json::from_str(first).map_err(|error| invalid(format!("line 1: {error}")))?;
        let mut runs = Vec::new();
        for (number, line) in lines {
            let bad = |reason: String| invalid(format!("line {}: {reason}", number + 1));
            if line.len() > MAX_LINE {
                return Err(bad(format!("it has {} bytes, more than {MAX_LINE}", line.len())));
            }
            if runs.len() == MAX_RUNS {
                return Err(bad(format!("there are more than {MAX_RUNS} runs")));
            }
            let line: Line = serde_json::from_str(line).map_err(|error| bad(error.to_string()))?;
            runs.push(run(line).map_err(bad)?);
        }
        Ok(Self { recording: head.recording, runs })
    }
}

fn run(line: Line) -> Result<Run, String> {
    let end = |first: Option<u32>| first.unwrap_or(0).checked_add(line.blocks).is_some();
    if line.blocks == 0 || !end(line.from) || !end(line.block) || !line.t.is_finite() {
        return Err("a number in it is out of bounds".to_owned());
    }
    let kind = match line.is {
        Is::File => Some(Kind::File),
        Is::Directory => Some(Kind::Directory),
        Is::Link => Some(Kind::Link),
        Is::Metadata | Is::Data => None,
    };
    let place = match (kind, line.path) {
        (Some(kind), Some(path)) => {
            let path = unescape(&path).filter(|path| path.first() == Some(&b'/'));
            let path = path.ok_or_else(|| "its path is malformed".to_owned())?;
            Place::Named { kind, path, from: line.from.unwrap_or(0) }
        }
        (Some(_), None) => return Err("it has no path".to_owned()),
        (None, _) if line.is == Is::Data => Place::Data,
        (None, _) => Place::Metadata,
    };
    Ok(Run { seconds: line.t, place, blocks: line.blocks, block: line.block })
}

/// A path as text: what is no UTF-8 becomes `\xNN`, and so does `\`.
pub(super) fn escape(path: &[u8]) -> String {
    let mut text = String::with_capacity(path.len());
    for part in path.utf8_chunks() {
        for character in part.valid().chars() {
            match character {
                '\\' => text.push_str("\\x5c"),
                other => text.push(other),
            }
        }
        for byte in part.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

/// The bytes of an escaped path.
fn unescape(text: &str) -> Option<Vec<u8>> {
    let mut parts = text.split('\\');
    let mut path = parts.next()?.as_bytes().to_vec();
    for part in parts {
        let hex = part.strip_prefix('x')?;
        let digits = hex.get(..2).filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()))?;
        path.push(u8::from_str_radix(digits, 16).ok()?);
        path.extend_from_slice(hex.get(2..)?.as_bytes());
    }
    Some(path)
}

fn invalid(reason: impl Into<String>) -> Error {
    Error::invalid("profile", reason)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn sample() -> Profile {
        let recording = Recording {
            image: "oci:/x".into(),
            device: Some("sha256:00".into()),
            file_system: "ext4".into(),
            device_bytes: 1 << 20,
            read_ahead_kb: Some(0),
            seconds: 1.5,
            complete: true,
            ..Recording::default()
        };
        let named = |kind, path: &[u8], from| Place::Named { kind, path: path.to_vec(), from };
        let run = |seconds, place, blocks, block| Run { seconds, place, blocks, block };
        let runs = vec![
            run(0.000_001, Place::Metadata, 1, Some(0)),
            run(0.25, named(Kind::Directory, b"/", 0), 1, Some(3)),
            run(0.5, named(Kind::File, b"/a\xff\\b/\xc3\xa9 \"c\n", 7), 3, None),
            run(0.5, named(Kind::Link, b"/l", 0), 1, Some(9)),
            run(0.75, Place::Data, 2, Some(10)),
        ];
        Profile { recording, runs }
    }

    #[test]
    fn a_profile_round_trips_and_is_readable() {
        let text = sample().to_text().unwrap();
        assert_eq!(Profile::from_text(&text).unwrap(), sample());
        let line = text.lines().nth(3).unwrap();
        assert_eq!(line, r#"{"t":0.5,"is":"file","path":"/a\\xff\\x5cb/é \"c\n","from":7,"blocks":3}"#);
        assert!(
            text.starts_with(r#"{"firstread_profile":1,"image":"oci:/x","device":"sha256:00","file_system":"ext4""#)
        );
    }

    #[test]
    fn what_is_not_a_profile_is_refused() {
        let head = sample().to_text().unwrap().lines().next().unwrap().to_owned();
        let with = |line: &str| Profile::from_text(&format!("{head}\n{line}\n"));
        for (line, reason) in [
            (r#"{"t":0,"is":"file","path":"/a","from":0,"blocks":0}"#, "out of bounds"),
            (r#"{"t":0,"is":"file","path":"/a","from":4294967295,"blocks":2}"#, "out of bounds"),
            (r#"{"t":0,"is":"data","block":4294967295,"blocks":2}"#, "out of bounds"),
            (r#"{"t":0,"is":"file","from":0,"blocks":1}"#, "no path"),
            (r#"{"t":0,"is":"file","path":"a","from":0,"blocks":1}"#, "malformed"),
            (r#"{"t":0,"is":"file","path":"/\\y","from":0,"blocks":1}"#, "malformed"),
            (r#"{"t":0,"is":"file","path":"/\\x+1","from":0,"blocks":1}"#, "malformed"),
            (r#"{"t":0,"is":"other","blocks":1}"#, "line 2"),
            (&format!(r#"{{"t":0,"is":"file","path":"/{}","blocks":1}}"#, "a".repeat(70_000)), "more than"),
        ] {
            let error = with(line).unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains("line 2"), "{line}: {error}");
        }
        assert!(with(r#"{"t":0,"is":"data","block":1,"blocks":1,"later":true}"#).is_ok());
        assert!(Profile::from_text("").is_err());
        assert!(Profile::from_text("{}").unwrap_err().to_string().contains("first line"));
        let newer = head.replace(r#""firstread_profile":1"#, r#""firstread_profile":2"#);
        assert!(matches!(Profile::from_text(&newer), Err(Error::Unsupported(_))));
    }
}
