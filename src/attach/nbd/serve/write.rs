//! Writes, and what makes them durable.
//!
//! A payload is written piece by piece as it arrives. What needs a source, or the disk's time, becomes a task, so that no other
//! request of the connection waits for it.

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};

use super::super::proto::{self, Command, Request, command_flag};
use super::{Connection, Finished, PIECE};
use crate::device::{Device, Local, Zeroing, check_range};
use crate::error::{Error, Result};

/// Pieces of a write that could not be written at once, with their places.
type Late = Vec<(u64, Vec<u8>)>;

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Writes the payload that follows.
    pub(super) async fn write(&mut self, request: &Request) -> io::Result<()> {
        // Whatever happens, what is left of the payload is skipped.
        if let Err(error) = self.check(request) {
            return self.fail(request.cookie, &error).await;
        }
        let mut late = Late::new();
        let mut offset = request.offset;
        while self.skip > 0 {
            let len = self.skip.min(PIECE as u64) as usize;
            let here = self.tail - self.head >= len;
            if !here {
                self.receive_piece(len).await?;
            }
            let piece = if here { &self.input[self.head..self.head + len] } else { &self.payload[..len] };
            let written = self.device.write_local(offset, piece);
            let missing = matches!(written, Ok(Local::Missing)).then(|| piece.to_vec());
            if here {
                self.head += len;
                self.skip -= len as u64;
            }
            if let Err(error) = written {
                self.miss_bytes -= if late.is_empty() { 0 } else { request.len };
                return self.fail(request.cookie, &error).await;
            }
            if let Some(piece) = missing {
                if late.is_empty() {
                    self.admit(request.len).await?;
                }
                late.push((offset, piece));
            }
            offset += len as u64;
        }
        let durable = request.flags & command_flag::FUA != 0;
        if late.is_empty() && !durable {
            return self.done(request.cookie).await;
        }
        let cost = if late.is_empty() { 0 } else { request.len };
        if late.is_empty() {
            self.admit(0).await?;
        }
        self.start(request, cost, move |device| async move {
            for (offset, piece) in late {
                device.write_at(offset, &piece).await?;
            }
            if durable { device.flush().await } else { Ok(()) }
        });
        Ok(())
    }

    /// Trims, or writes zeros.
    pub(super) async fn zero(&mut self, request: &Request) -> io::Result<()> {
        if let Err(error) = check_range(self.device.size(), request.offset, u64::from(request.len)) {
            return self.fail(request.cookie, &error).await;
        }
        let how = match request.command {
            Command::Trim => Zeroing::Discard,
            _ if request.flags & command_flag::NO_HOLE != 0 => Zeroing::Allocated,
            _ => Zeroing::Hole,
        };
        self.admit(0).await?;
        let Request { offset, len, flags, .. } = *request;
        self.start(request, 0, move |device| async move {
            device.zero(offset, u64::from(len), how).await?;
            if flags & command_flag::FUA != 0 { device.flush().await } else { Ok(()) }
        });
        Ok(())
    }

    /// Makes durable what was answered before.
    pub(super) async fn flush_device(&mut self, request: &Request) -> io::Result<()> {
        self.admit(0).await?;
        self.start(request, 0, |device| async move { device.flush().await });
        Ok(())
    }

    fn check(&self, request: &Request) -> Result<()> {
        check_range(self.device.size(), request.offset, u64::from(request.len))?;
        if request.len > proto::READ_MAX {
            return Err(Error::invalid("request", "write of more than 32 MiB"));
        }
        Ok(())
    }

    /// Receives the next `len` bytes of a payload that are not all in the input buffer; the input is empty then.
    async fn receive_piece(&mut self, len: usize) -> io::Result<()> {
        if self.payload.len() < len {
            self.payload.resize(len, 0);
        }
        let have = (self.tail - self.head).min(len);
        let (here, rest) = self.payload.split_at_mut(have);
        here.copy_from_slice(&self.input[self.head..self.head + have]);
        self.head += have;
        self.skip -= have as u64;
        let rest = rest.get_mut(..len - have).unwrap_or_default();
        self.stream.read_exact(rest).await?;
        self.skip -= (len - have) as u64;
        Ok(())
    }

    /// Starts a task that [`admit`](Self::admit) has let in for `cost` bytes.
    fn start<F>(&mut self, request: &Request, cost: u32, work: impl FnOnce(Arc<dyn Device>) -> F)
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let (request, work) = (*request, work(Arc::clone(&self.device)));
        let task = async move { Finished { request, cost, data: work.await.map(|()| Vec::new()) } };
        self.misses.spawn_on(task, &self.runtime);
    }
}
