//! When a program is ready: what it writes, where it listens, or that it has ended.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::str::FromStr;

/// What says that a program is ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadyWhen {
    /// Its output has this text.
    Text(String),
    /// Something in its network namespace listens on this TCP port.
    Port(u16),
    /// It ended, with status 0.
    Exit,
}

impl FromStr for ReadyWhen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let port = |text: &str| match text.parse() {
            Ok(0) | Err(_) => Err(format!("{text:?} is no port: write 1 to 65535, or text:{text}")),
            Ok(port) => Ok(Self::Port(port)),
        };
        if let Some(text) = text.strip_prefix("text:") {
            return Self::text(text);
        }
        if let Some(number) = text.strip_prefix("port:") {
            return port(number);
        }
        match text {
            "EXIT" | "exit" => Ok(Self::Exit),
            number if !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()) => port(number),
            text => Self::text(text),
        }
    }
}

impl ReadyWhen {
    fn text(text: &str) -> Result<Self, String> {
        // Longer ones would make the scan of the output slow.
        if text.is_empty() || text.len() > 4096 {
            return Err("the text has 1 to 4096 bytes".to_owned());
        }
        Ok(Self::Text(text.to_owned()))
    }
}

impl std::fmt::Display for ReadyWhen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Text(text) => write!(f, "{text:?} in its output"),
            Self::Port(port) => write!(f, "port {port}"),
            Self::Exit => f.write_str("its end"),
        }
    }
}

/// Looks for a text in output that comes in pieces.
#[derive(Debug)]
pub struct Scan {
    text: Vec<u8>,
    /// The end of what came before, shorter than the text.
    tail: Vec<u8>,
}

impl Scan {
    /// A scan for `text`, which is not empty.
    #[must_use]
    pub fn new(text: &str) -> Self {
        Self { text: text.as_bytes().to_vec(), tail: Vec::new() }
    }

    /// Whether the text is complete with this piece.
    pub fn found(&mut self, piece: &[u8]) -> bool {
        self.tail.extend_from_slice(piece);
        let found = self.tail.windows(self.text.len()).any(|window| window == self.text);
        let keep = self.text.len().saturating_sub(1).min(self.tail.len());
        self.tail.drain(..self.tail.len() - keep);
        found
    }
}

/// TCP ports in the network namespace of a process.
#[derive(Debug)]
pub struct Ports {
    process: PathBuf,
}

impl Ports {
    /// The ports that processes in the network namespace of `pid` listen on.
    #[must_use]
    pub fn of(pid: u32) -> Self {
        Self { process: PathBuf::from(format!("/proc/{pid}")) }
    }

    /// Whether somebody listens on `port` there. While the process is still in this one's network namespace, nobody does.
    #[must_use]
    pub fn listening(&self, port: u16) -> bool {
        let namespace = |process: PathBuf| std::fs::read_link(process.join("ns/net")).ok();
        let (theirs, ours) = (namespace(self.process.clone()), namespace(PathBuf::from("/proc/self")));
        if theirs.is_none() || theirs == ours {
            return false;
        }
        ["net/tcp", "net/tcp6"]
            .iter()
            .filter_map(|table| File::open(self.process.join(table)).ok())
            .any(|table| lists_listener(table, port))
    }
}

/// Whether a table of proc_net(5) has a listening socket of `port`.
fn lists_listener(table: impl Read, port: u16) -> bool {
    const LISTEN: &str = "0A";
    BufReader::new(table).lines().map_while(Result::ok).any(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (local, state) = (fields.next(), fields.nth(1));
        let number = local.and_then(|local| local.rsplit(':').next()).map(|number| u16::from_str_radix(number, 16));
        state == Some(LISTEN) && number == Some(Ok(port))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn readiness_is_a_text_a_port_or_the_end() {
        for (text, expected) in [
            ("EXIT", ReadyWhen::Exit),
            ("8080", ReadyWhen::Port(8080)),
            ("port:8080", ReadyWhen::Port(8080)),
            ("text:8080", ReadyWhen::Text("8080".to_owned())),
            ("Ready to accept", ReadyWhen::Text("Ready to accept".to_owned())),
            ("text:EXIT", ReadyWhen::Text("EXIT".to_owned())),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
        for text in ["", "text:", "0", "70000", "port:x", "port:0"] {
            assert!(text.parse::<ReadyWhen>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_text_is_found_across_pieces_and_nothing_is_kept_but_its_length() {
        let mut scan = Scan::new("ready now");
        for piece in ["xrea", "dy", " n", "o"] {
            assert!(!scan.found(piece.as_bytes()), "{piece}");
        }
        assert!(scan.found(b"w, later"));
        let mut scan = Scan::new("ab");
        assert!(!scan.found(&vec![b'a'; 1 << 20]));
        assert!(scan.tail.len() < 2);
        assert!(scan.found(b"b"));
        assert!(Scan::new("x").found(b"..x"));
    }

    #[test]
    fn only_listening_sockets_of_the_port_count() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue\n   \
            0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000\n   \
            1: 0100007F:1F91 0100007F:0050 01 00000000:00000000 00:00000000 00000000\n";
        assert!(lists_listener(table.as_bytes(), 8080));
        assert!(!lists_listener(table.as_bytes(), 8081));
        assert!(!lists_listener(table.as_bytes(), 80));
        assert!(!Ports::of(std::process::id()).listening(22), "the own namespace is not the program's");
    }
}
