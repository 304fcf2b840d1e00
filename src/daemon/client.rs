//! The other end of the control socket: a blocking client for the verbs.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use super::control::{Call, Envelope, Hello, Kind, LINE_MAX, Outcome, Problem, Request, Response, SOCKET, VERSION};

/// A connection to the daemon.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
    socket: PathBuf,
    next: u64,
    hello: Hello,
}

impl Client {
    /// Connects to the daemon of the run directory `run`; `None` when no daemon listens there.
    ///
    /// # Errors
    /// A daemon that does not speak this protocol, or a socket that can't be used.
    pub fn connect(run: &Path) -> Result<Option<Self>, Problem> {
        let socket = run.join(SOCKET);
        let stream = match UnixStream::connect(&socket) {
            Ok(stream) => stream,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                return Ok(None);
            }
            Err(error) => {
                let message = format!("connecting to the daemon at {}: {error}", socket.display());
                return Err(
                    Problem::new(Kind::Failed, message).hint("run this as root, or choose another --run directory")
                );
            }
        };
        let hello = Hello { program: String::new(), pid: 0, root: PathBuf::new() };
        let mut client = Self { stream: BufReader::new(stream), socket, next: 0, hello };
        client.hello = match client.call::<Hello>(Call::Hello) {
            Ok(hello) => hello,
            // It was stopping: accepted, and gone before it answered.
            Err(problem) if problem.kind == Kind::NotFound => return Ok(None),
            Err(problem) => return Err(problem),
        };
        Ok(Some(client))
    }

    /// Who the daemon said it is.
    #[must_use]
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Asks the daemon and waits for its answer.
    ///
    /// # Errors
    /// The daemon's problem, or one of kind [`Kind::NotFound`] when it went away before it answered.
    pub fn call<T: DeserializeOwned>(&mut self, call: Call) -> Result<T, Problem> {
        self.next += 1;
        let id = self.next;
        let request = Request { envelope: Envelope { version: VERSION, id }, call };
        let mut line = serde_json::to_vec(&request).map_err(|error| self.garbled(&error))?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).map_err(|error| self.gone(&error))?;
        loop {
            let response: Response = serde_json::from_slice(&self.line()?).map_err(|error| self.garbled(&error))?;
            if response.id != id {
                continue;
            }
            return match response.outcome {
                Outcome::Result(value) => serde_json::from_value(value).map_err(|error| self.garbled(&error)),
                Outcome::Error(problem) => Err(problem),
            };
        }
    }

    /// Waits until the daemon closes the connection.
    pub fn wait_for_end(&mut self) {
        while let Ok(_line) = self.line() {}
    }

    /// A handle that ends [`wait_for_end`](Self::wait_for_end) from another thread.
    ///
    /// # Errors
    /// What the system says.
    pub fn closer(&self) -> io::Result<Closer> {
        self.stream.get_ref().try_clone().map(Closer)
    }

    fn line(&mut self) -> Result<Vec<u8>, Problem> {
        let mut line = Vec::new();
        let limit = LINE_MAX as u64 + 1;
        let read = self.stream.by_ref().take(limit).read_until(b'\n', &mut line);
        match read {
            Ok(_) if line.last() == Some(&b'\n') => Ok(line),
            Ok(_) if line.len() as u64 == limit => Err(self.garbled(&"its answer is too long")),
            Ok(_) => Err(self.gone(&"it closed the connection")),
            Err(error) => Err(self.gone(&error)),
        }
    }

    fn gone(&self, reason: &dyn std::fmt::Display) -> Problem {
        Problem::new(Kind::NotFound, format!("the daemon at {} went away: {reason}", self.socket.display()))
            .hint("its log says why: daemon.log in the run directory, or wherever its standard error goes")
    }

    fn garbled(&self, reason: &dyn std::fmt::Display) -> Problem {
        let message = format!("the daemon at {} speaks another language: {reason}", self.socket.display());
        Problem::new(Kind::Request, message)
            .hint("use the same version of firstread, or stop the daemon and start it anew")
    }
}

/// Ends a connection from another thread.
#[derive(Debug)]
pub struct Closer(UnixStream);

impl Closer {
    /// Tells the daemon that no more requests come: it ends what lives as long as the connection, and closes it.
    pub fn finish(&self) {
        // A connection that the daemon closed first can't be shut down again, and need not be.
        let _ = self.0.shutdown(Shutdown::Write);
    }
}
