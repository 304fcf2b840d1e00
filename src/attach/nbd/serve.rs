//! The transmission: requests in, replies out, one thread per connection.
//!
//! A hit is read into the connection's output buffer behind its header, and leaves with its neighbours in one write once
//! no complete request is left in the input buffer: no allocation, no zeroing, no change of task. A large read is cut
//! in pieces of [`PIECE`] bytes, so that the client takes one piece while the next is read. What is not local becomes a
//! task; its reply is written when it finishes, between others. Writes are in [`write`].

use std::io;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::runtime::Handle;
use tokio::task::JoinSet;

use super::negotiate::{Context, Replies, Session};
use super::proto::{self, CHUNK_DONE, Command, Header, Request, command_flag};
use super::status;
use crate::chunk::is_zero;
use crate::device::{Access, Device, Local, Residence, check_range};
use crate::error::{Error, Result};

mod write;

/// Bytes of one piece of a large read; it stays in a core's cache between being read and being sent.
pub const PIECE: usize = 256 << 10;
/// Bytes of a connection's output buffer: one piece, headers, and room to align.
pub const OUTPUT: usize = PIECE + 4096;
/// Output is sent once it reaches this many bytes, even when more requests wait: the client works on it meanwhile.
const BATCH: usize = 64 << 10;
/// Bytes of a connection's input buffer.
const INPUT: usize = 16 << 10;
/// How long a connection looks for the next request before it sleeps.
const SPIN: Duration = Duration::from_micros(40);
/// Misses of one connection at a time. Further requests wait in the socket.
pub const MISSES_MAX: usize = 64;
/// Bytes of all misses of one connection at a time.
pub const MISS_BYTES_MAX: u32 = proto::READ_MAX;
/// Bytes that a prefetch reads at a time.
const PREFETCH: u32 = 1 << 20;
/// A reply to a miss starts with room for the longest header.
const HEADER_ROOM: usize = proto::DATA_CHUNK_LEN;
/// Where data starts in the output buffer: copies to aligned memory are faster.
const ALIGN: usize = 64;

/// Answers `session`'s requests until the client leaves; misses run on `runtime`.
///
/// # Errors
/// The connection broke, or the client does not follow the protocol.
pub(super) async fn transmit<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    session: Session,
    runtime: &Handle,
) -> io::Result<()> {
    let mut connection = Connection::new(stream, session, runtime.clone());
    loop {
        while let Some(request) = connection.next_request()? {
            if request.command == Command::Disconnect {
                return connection.answer_outstanding().await;
            }
            connection.answer(&request).await?;
            if connection.filled - connection.start >= BATCH {
                connection.flush().await?;
            }
        }
        while let Some(finished) = connection.misses.try_join_next() {
            connection.finish(finished?).await?;
        }
        connection.flush().await?;
        if connection.wait().await? == Event::HangUp {
            return Ok(());
        }
    }
}

#[derive(PartialEq, Eq)]
enum Event {
    Progress,
    HangUp,
}

/// A miss, or another task, that ended: its request, what it took from the budget, and the reply's data after [`HEADER_ROOM`] bytes.
struct Finished {
    request: Request,
    cost: u32,
    data: Result<Vec<u8>>,
}

struct Connection<S> {
    stream: S,
    device: Arc<dyn Device>,
    access: Access,
    replies: Replies,
    contexts: Vec<Context>,
    /// Requests: `input[head..tail]` was received and is not parsed yet.
    input: Vec<u8>,
    head: usize,
    tail: usize,
    /// Payload bytes of a refused write that are still to come.
    skip: u64,
    /// A piece of a write's payload.
    payload: Vec<u8>,
    /// Replies: `output[start..filled]` is to be sent.
    output: Vec<u8>,
    start: usize,
    filled: usize,
    /// Where misses run.
    runtime: Handle,
    misses: JoinSet<Finished>,
    miss_bytes: u32,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    fn new(stream: S, session: Session, runtime: Handle) -> Self {
        let output = vec![0; OUTPUT];
        let header = match session.replies {
            Replies::Simple => proto::SIMPLE_LEN,
            Replies::Structured => proto::DATA_CHUNK_LEN,
        };
        let start = (output.as_ptr().align_offset(ALIGN) % ALIGN) + ALIGN - header;
        Self {
            stream,
            access: session.export.device.access(),
            device: Arc::clone(&session.export.device),
            replies: session.replies,
            contexts: session.contexts,
            input: vec![0; INPUT],
            head: 0,
            tail: 0,
            skip: 0,
            payload: Vec::new(),
            output,
            start,
            filled: start,
            runtime,
            misses: JoinSet::new(),
            miss_bytes: 0,
        }
    }

    /// Ends in order: "the server MUST handle all outstanding requests" before it closes the connection.
    async fn answer_outstanding(&mut self) -> io::Result<()> {
        self.flush().await?;
        while let Some(finished) = self.misses.join_next().await {
            self.finish(finished?).await?;
        }
        self.flush().await
    }

    /// Takes a complete request from the input buffer.
    fn next_request(&mut self) -> io::Result<Option<Request>> {
        let skipped = usize::try_from(self.skip).unwrap_or(usize::MAX).min(self.tail - self.head);
        self.skip -= skipped as u64;
        self.head += skipped;
        let Some(header) = self.input[self.head..self.tail].first_chunk() else { return Ok(None) };
        let request =
            Request::parse(header).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "wrong request magic"))?;
        self.head += proto::REQUEST_LEN;
        if request.command == Command::Write {
            // Unless it is written.
            self.skip = u64::from(request.len);
        }
        Ok(Some(request))
    }

    /// Waits until requests arrive or a miss ends.
    async fn wait(&mut self) -> io::Result<Event> {
        self.input.copy_within(self.head..self.tail, 0);
        self.tail -= self.head;
        self.head = 0;
        let received = if self.misses.is_empty() {
            self.receive().await?
        } else {
            tokio::select! {
                biased;
                Some(finished) = self.misses.join_next() => {
                    self.finish(finished?).await?;
                    return Ok(Event::Progress);
                }
                received = self.stream.read(&mut self.input[self.tail..]) => received?,
            }
        };
        self.tail += received;
        Ok(if received == 0 { Event::HangUp } else { Event::Progress })
    }

    /// Reads requests. Looks for them a while before it sleeps: a client with one request in flight sends the next in less
    /// time than it takes to be woken up. Others that want the processor get it meanwhile.
    async fn receive(&mut self) -> io::Result<usize> {
        let room = &mut self.input[self.tail..];
        let until = Instant::now() + SPIN;
        loop {
            let mut reading = std::pin::pin!(self.stream.read(room));
            let polled = std::future::poll_fn(|context| Poll::Ready(reading.as_mut().poll(context))).await;
            match polled {
                Poll::Ready(received) => return received,
                Poll::Pending if Instant::now() >= until => return reading.await,
                Poll::Pending => {}
            }
            std::thread::yield_now();
            tokio::task::yield_now().await;
        }
    }

    async fn answer(&mut self, request: &Request) -> io::Result<()> {
        let allowed = match (request.command, self.replies) {
            (Command::Read, Replies::Structured) => command_flag::DF,
            (Command::BlockStatus, _) => command_flag::REQ_ONE,
            (Command::WriteZeroes, _) => command_flag::NO_HOLE,
            _ => 0,
        };
        let allowed = match self.access {
            Access::ReadOnly => allowed,
            Access::ReadWrite => allowed | command_flag::FUA,
        };
        let refused = |reason: &str| Error::invalid("request", reason);
        match request.command {
            Command::Write | Command::Trim | Command::WriteZeroes if self.access == Access::ReadOnly => {
                self.error(request.cookie, rustix::io::Errno::PERM.raw_os_error(), "the export is read-only").await
            }
            Command::Unknown(_) => self.fail(request.cookie, &refused("unknown command")).await,
            _ if request.flags & !allowed != 0 => self.fail(request.cookie, &refused("unknown flags")).await,
            Command::Flush if self.access == Access::ReadWrite => self.flush_device(request).await,
            Command::Flush | Command::Disconnect => self.done(request.cookie).await,
            Command::Write => self.write(request).await,
            Command::Trim | Command::WriteZeroes => self.zero(request).await,
            Command::Read | Command::Cache | Command::BlockStatus => {
                let inside = check_range(self.device.size(), request.offset, u64::from(request.len));
                match inside {
                    Err(error) => self.fail(request.cookie, &error).await,
                    Ok(()) if request.len == 0 => self.fail(request.cookie, &refused("empty range")).await,
                    Ok(()) => match request.command {
                        Command::Cache => self.prefetch(request).await,
                        Command::BlockStatus => self.block_status(request).await,
                        _ if request.len > proto::READ_MAX => {
                            self.fail(request.cookie, &refused("read of more than 32 MiB")).await
                        }
                        _ if self.replies == Replies::Structured && request.flags & command_flag::DF == 0 => {
                            self.read_in_chunks(request).await
                        }
                        _ => self.read_whole(request).await,
                    },
                }
            }
        }
    }

    /// Reads what is local chunk by chunk; from the first byte that isn't, the rest is one miss.
    async fn read_in_chunks(&mut self, request: &Request) -> io::Result<()> {
        let mut rest = *request;
        loop {
            let len = rest.len.min(PIECE as u32);
            self.reserve(proto::DATA_CHUNK_LEN + len as usize).await?;
            let flags = if len == rest.len { CHUNK_DONE } else { 0 };
            match self.read_piece(proto::DATA_CHUNK_LEN, rest.offset, len) {
                Ok(Local::Done) => self.add_chunk(flags, rest.cookie, rest.offset, len),
                Ok(Local::Missing) => return self.miss(rest).await,
                Err(error) => return self.fail(rest.cookie, &error).await,
            }
            if flags == CHUNK_DONE {
                return Ok(());
            }
            rest.offset += u64::from(len);
            rest.len -= len;
        }
    }

    /// Reads into one reply without borders, for old clients and for those that ask for it (DF).
    async fn read_whole(&mut self, request: &Request) -> io::Result<()> {
        let header = self.header(request);
        let header = header.as_ref();
        if request.len as usize <= PIECE {
            self.reserve(header.len() + request.len as usize).await?;
            return match self.read_piece(header.len(), request.offset, request.len) {
                Ok(Local::Done) => {
                    self.append(header);
                    self.filled += request.len as usize;
                    Ok(())
                }
                Ok(Local::Missing) => self.miss(*request).await,
                Err(error) => self.fail(request.cookie, &error).await,
            };
        }
        match self.device.residence(request.offset, u64::from(request.len)) {
            Ok(runs) if runs.iter().all(|(_, residence)| *residence != Residence::Remote) => {}
            Ok(_) => return self.miss(*request).await,
            Err(error) => return self.fail(request.cookie, &error).await,
        }
        // Everything was local a moment ago. Once the header is out there is no way to report an error but to end the
        // connection.
        self.reserve(header.len()).await?;
        self.append(header);
        let (mut offset, mut rest) = (request.offset, request.len);
        while rest > 0 {
            let len = rest.min(PIECE as u32);
            self.reserve(len as usize).await?;
            if !matches!(self.read_piece(0, offset, len), Ok(Local::Done)) {
                let device = Arc::clone(&self.device);
                let task = async move {
                    let mut data = vec![0; len as usize];
                    device.read_at(offset, &mut data).await.map(|()| data)
                };
                let read = self.runtime.spawn(task).await?;
                let data = read
                    .map_err(|error| io::Error::other(format!("a read failed after its header was sent: {error}")))?;
                self.output[self.filled..self.filled + data.len()].copy_from_slice(&data);
            }
            self.filled += len as usize;
            offset += u64::from(len);
            rest -= len;
        }
        Ok(())
    }

    /// Reads a piece into the output buffer, behind the place of a header.
    fn read_piece(&mut self, header: usize, offset: u64, len: u32) -> Result<Local> {
        let at = self.filled + header;
        self.device.read_local(offset, &mut self.output[at..at + len as usize])
    }

    /// Adds the chunk whose data [`read_piece`](Self::read_piece) has put behind the header's place.
    fn add_chunk(&mut self, flags: u16, cookie: u64, offset: u64, len: u32) {
        let at = self.filled + proto::DATA_CHUNK_LEN;
        if is_zero(&self.output[at..at + len as usize]) {
            self.append(&proto::hole_chunk(flags, cookie, offset, len));
        } else {
            self.append(&proto::data_chunk_header(flags, cookie, offset, len));
            self.filled += len as usize;
        }
    }

    /// The header of a reply that carries all of a read.
    fn header(&self, request: &Request) -> Header {
        match self.replies {
            Replies::Simple => Header::Simple(proto::simple_header(0, request.cookie)),
            Replies::Structured => {
                Header::Chunk(proto::data_chunk_header(CHUNK_DONE, request.cookie, request.offset, request.len))
            }
        }
    }

    /// Starts a task for a read that needs the source, once the budget allows it.
    async fn miss(&mut self, request: Request) -> io::Result<()> {
        self.admit(request.len).await?;
        let device = Arc::clone(&self.device);
        let task = async move {
            let mut data = vec![0; HEADER_ROOM + request.len as usize];
            let read = device.read_at(request.offset, &mut data[HEADER_ROOM..]).await;
            Finished { request, cost: request.len, data: read.map(|()| data) }
        };
        self.misses.spawn_on(task, &self.runtime);
        Ok(())
    }

    /// Starts a task that reads a range into nowhere.
    async fn prefetch(&mut self, request: &Request) -> io::Result<()> {
        let (request, cost) = (*request, request.len.min(PREFETCH));
        self.admit(cost).await?;
        let device = Arc::clone(&self.device);
        let task = async move {
            let mut scratch = vec![0; cost as usize];
            let (mut offset, mut rest) = (request.offset, request.len);
            let mut read = Ok(());
            while rest > 0 && read.is_ok() {
                let len = rest.min(cost);
                read = device.read_at(offset, &mut scratch[..len as usize]).await;
                offset += u64::from(len);
                rest -= len;
            }
            Finished { request, cost, data: read.map(|()| Vec::new()) }
        };
        self.misses.spawn_on(task, &self.runtime);
        Ok(())
    }

    /// Waits until another miss of `cost` bytes fits the connection's budget.
    async fn admit(&mut self, cost: u32) -> io::Result<()> {
        let full = |connection: &Self| {
            connection.misses.len() >= MISSES_MAX || connection.miss_bytes.saturating_add(cost) > MISS_BYTES_MAX
        };
        if full(self) {
            self.flush().await?;
        }
        while full(self) {
            let Some(finished) = self.misses.join_next().await else { break };
            self.finish(finished?).await?;
        }
        self.miss_bytes += cost;
        Ok(())
    }

    /// Sends the reply of a miss.
    async fn finish(&mut self, finished: Finished) -> io::Result<()> {
        self.miss_bytes -= finished.cost;
        let request = &finished.request;
        let mut data = match finished.data {
            Err(error) => return self.fail(request.cookie, &error).await,
            Ok(_) if request.command != Command::Read => return self.done(request.cookie).await,
            Ok(data) => data,
        };
        if self.replies == Replies::Structured && is_zero(&data[HEADER_ROOM..]) {
            let hole = proto::hole_chunk(CHUNK_DONE, request.cookie, request.offset, request.len);
            return self.push(&hole).await;
        }
        let header = self.header(request);
        let header = header.as_ref();
        let start = HEADER_ROOM - header.len();
        data[start..HEADER_ROOM].copy_from_slice(header);
        let reply = &data[start..];
        if reply.len() <= BATCH {
            return self.push(reply).await;
        }
        self.flush().await?;
        self.stream.write_all(reply).await?;
        self.stream.flush().await
    }

    async fn block_status(&mut self, request: &Request) -> io::Result<()> {
        if self.contexts.is_empty() {
            return self.fail(request.cookie, &Error::invalid("request", "no context was negotiated")).await;
        }
        let amount =
            if request.flags & command_flag::REQ_ONE == 0 { status::Amount::Many } else { status::Amount::One };
        let runs = match status::runs(self.device.as_ref(), request.offset, request.len) {
            Ok(runs) => runs,
            Err(error) => return self.fail(request.cookie, &error).await,
        };
        let last = self.contexts.len() - 1;
        for at in 0..=last {
            let context = self.contexts[at];
            let flags = if at == last { CHUNK_DONE } else { 0 };
            let extents = status::extents(context, &runs, amount);
            self.push(&proto::status_chunk(flags, request.cookie, context.id(), &extents)).await?;
        }
        Ok(())
    }

    /// A reply without data.
    async fn done(&mut self, cookie: u64) -> io::Result<()> {
        match self.replies {
            Replies::Simple => self.push(&proto::simple_header(0, cookie)).await,
            Replies::Structured => {
                self.push(&proto::chunk_header(CHUNK_DONE, proto::chunk_type::NONE, cookie, 0)).await
            }
        }
    }

    async fn fail(&mut self, cookie: u64, error: &Error) -> io::Result<()> {
        self.error(cookie, error.errno(), &error.to_string()).await
    }

    async fn error(&mut self, cookie: u64, errno: i32, message: &str) -> io::Result<()> {
        let number = proto::wire_error(errno);
        match self.replies {
            Replies::Simple => self.push(&proto::simple_header(number, cookie)).await,
            Replies::Structured => self.push(&proto::error_chunk(cookie, number, message)).await,
        }
    }

    /// Adds bytes to the output, sending first what is there when they don't fit.
    async fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.reserve(bytes.len()).await?;
        self.append(bytes);
        Ok(())
    }

    /// Makes room for `len` bytes, at most [`OUTPUT`] less the room to align.
    async fn reserve(&mut self, len: usize) -> io::Result<()> {
        if self.filled + len > self.output.len() {
            self.flush().await?;
        }
        Ok(())
    }

    /// Adds bytes that [`reserve`](Self::reserve) has made room for.
    fn append(&mut self, bytes: &[u8]) {
        self.output[self.filled..self.filled + bytes.len()].copy_from_slice(bytes);
        self.filled += bytes.len();
    }

    async fn flush(&mut self) -> io::Result<()> {
        if self.filled > self.start {
            self.stream.write_all(&self.output[self.start..self.filled]).await?;
            // TLS keeps what a full socket did not take.
            self.stream.flush().await?;
            self.filled = self.start;
        }
        Ok(())
    }
}
