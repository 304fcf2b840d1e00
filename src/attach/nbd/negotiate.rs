//! The handshake: from the first byte to an export that was agreed on.
//!
//! A client is believed nothing: payloads are bounded by [`OPTION_MAX`](proto::OPTION_MAX), the number of options by
//! [`OPTIONS_MAX`], and the caller bounds the time.

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::proto::{self, ContextRequest, InfoRequest, export_flag, info, option, reply};
use super::{Export, Exports};
use crate::device::Access;

/// Options that one client may send before it chooses an export.
pub const OPTIONS_MAX: u32 = 128;

/// The form of replies that was agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replies {
    /// One header, then all of the data; for old clients.
    Simple,
    /// Chunks, with holes and messages.
    Structured,
}

/// A metadata context of block status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Context {
    /// `base:allocation`: what reads as zeros.
    Allocation,
    /// `firstread:local`: flag 1 for what is not on this node yet.
    Local,
}

impl Context {
    const ALL: [Self; 2] = [Self::Allocation, Self::Local];

    /// The name that clients ask for.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Allocation => "base:allocation",
            Self::Local => "firstread:local",
        }
    }

    /// The number in replies.
    #[must_use]
    pub const fn id(self) -> u32 {
        match self {
            Self::Allocation => 1,
            Self::Local => 2,
        }
    }

    /// Whether `query` names this context. In a list a query may also be a namespace with its colon.
    fn matches(self, query: &str, option: u32) -> bool {
        query == self.name()
            || option == option::LIST_META_CONTEXT && query.ends_with(':') && self.name().starts_with(query)
    }
}

/// What was agreed on.
#[derive(Clone, Debug)]
pub struct Session {
    /// What is served.
    pub export: Arc<Export>,
    /// How it is answered.
    pub replies: Replies,
    /// The contexts that block status tells about, in the order of the client's queries.
    pub contexts: Vec<Context>,
}

/// How a connection is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Security {
    /// It is not, and the server has no TLS.
    Plain,
    /// Not yet: the client has to start TLS before anything else.
    Demanded,
    /// By TLS.
    Tls,
}

/// How a handshake ended.
#[derive(Debug)]
pub enum Negotiated {
    /// An export was chosen.
    Chosen(Session),
    /// The client starts TLS now, and then goes on with options.
    StartTls,
    /// The client left in an orderly way.
    Left,
}

/// What outlasts the start of TLS.
#[derive(Clone, Copy, Debug)]
pub struct Greeted {
    zeroes: Zeroes,
}

/// Greets a client.
///
/// # Errors
/// The connection broke, or the client does not follow the protocol.
pub async fn greet<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> io::Result<Greeted> {
    let mut greeting = [0; 18];
    greeting[..8].copy_from_slice(&proto::NBD_MAGIC.to_be_bytes());
    greeting[8..16].copy_from_slice(&proto::OPTION_MAGIC.to_be_bytes());
    let offered = proto::FLAG_FIXED_NEWSTYLE | proto::FLAG_NO_ZEROES;
    greeting[16..].copy_from_slice(&offered.to_be_bytes());
    stream.write_all(&greeting).await?;
    let flags = stream.read_u32().await?;
    if flags & !u32::from(offered) != 0 {
        return Err(malformed("unknown client flags"));
    }
    let zeroes = if flags & u32::from(proto::FLAG_NO_ZEROES) == 0 { Zeroes::Sent } else { Zeroes::Omitted };
    Ok(Greeted { zeroes })
}

/// Talks to a client that was greeted until it has chosen an export, starts TLS, or leaves.
///
/// # Errors
/// The connection broke, or the client does not follow the protocol.
pub async fn negotiate<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    exports: &Exports,
    greeted: Greeted,
    security: Security,
) -> io::Result<Negotiated> {
    let Greeted { zeroes } = greeted;
    let mut handshake =
        Handshake { exports, security, zeroes, replies: Replies::Simple, contexts: None, payload: Vec::new() };
    for _ in 0..OPTIONS_MAX {
        match handshake.option(stream).await? {
            Step::More => {}
            Step::Chosen(session) => return Ok(Negotiated::Chosen(session)),
            Step::StartTls => return Ok(Negotiated::StartTls),
            Step::Left => return Ok(Negotiated::Left),
        }
    }
    Err(malformed("too many options"))
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

enum Step {
    More,
    Chosen(Session),
    StartTls,
    Left,
}

/// Whether 124 zero bytes end the reply to `NBD_OPT_EXPORT_NAME`.
#[derive(Clone, Copy, Debug)]
enum Zeroes {
    Sent,
    Omitted,
}

struct Handshake<'a> {
    exports: &'a Exports,
    security: Security,
    zeroes: Zeroes,
    replies: Replies,
    /// The contexts of the last `NBD_OPT_SET_META_CONTEXT`, and the export they were asked for.
    contexts: Option<(Arc<Export>, Vec<Context>)>,
    /// The payload of the current option.
    payload: Vec<u8>,
}

impl Handshake<'_> {
    /// Reads one option and answers it.
    async fn option<S: AsyncRead + AsyncWrite + Unpin>(&mut self, stream: &mut S) -> io::Result<Step> {
        let mut header = [0; 16];
        stream.read_exact(&mut header).await?;
        let mut fields = proto::Fields(&header);
        let (Some(proto::OPTION_MAGIC), Some(number), Some(len)) = (fields.u64(), fields.u32(), fields.u32()) else {
            return Err(malformed("wrong option magic"));
        };
        if len > proto::OPTION_SKIP_MAX {
            return Err(malformed("option is too long"));
        }
        let wanted = usize::try_from(len).unwrap_or(usize::MAX);
        if wanted > proto::OPTION_MAX {
            let skipped = tokio::io::copy(&mut stream.take(u64::from(len)), &mut tokio::io::sink()).await?;
            if skipped != u64::from(len) || number == option::EXPORT_NAME {
                return Err(malformed("option is too long"));
            }
            return refuse(stream, number, reply::ERR_TOO_BIG, "the option is too long").await;
        }
        self.payload.resize(wanted, 0);
        stream.read_exact(&mut self.payload).await?;
        match number {
            option::STARTTLS => self.start_tls(stream).await,
            option::EXPORT_NAME if self.security == Security::Demanded => Err(malformed("no TLS")),
            _ if self.security == Security::Demanded && number != option::ABORT => {
                refuse(stream, number, reply::ERR_TLS_REQD, "this server demands TLS").await
            }
            option::EXPORT_NAME => self.export_name(stream).await,
            option::ABORT => {
                // The client may be gone before it reads the answer.
                let _ = stream.write_all(&proto::option_reply(number, reply::ACK, &[])).await;
                Ok(Step::Left)
            }
            option::LIST if !self.payload.is_empty() => {
                refuse(stream, number, reply::ERR_INVALID, "LIST has no payload").await
            }
            option::LIST => self.list(stream).await,
            option::INFO | option::GO => self.info_or_go(stream, number).await,
            option::STRUCTURED_REPLY if !self.payload.is_empty() => {
                refuse(stream, number, reply::ERR_INVALID, "STRUCTURED_REPLY has no payload").await
            }
            option::STRUCTURED_REPLY => {
                self.replies = Replies::Structured;
                stream.write_all(&proto::option_reply(number, reply::ACK, &[])).await?;
                Ok(Step::More)
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.contexts(stream, number).await,
            _ => refuse(stream, number, reply::ERR_UNSUP, "unknown option").await,
        }
    }

    async fn start_tls<S: AsyncWrite + Unpin>(&self, stream: &mut S) -> io::Result<Step> {
        let number = option::STARTTLS;
        match self.security {
            Security::Plain => refuse(stream, number, reply::ERR_UNSUP, "this server does not offer TLS").await,
            Security::Tls => refuse(stream, number, reply::ERR_INVALID, "TLS has been started").await,
            Security::Demanded if !self.payload.is_empty() => {
                refuse(stream, number, reply::ERR_INVALID, "STARTTLS has no payload").await
            }
            // Nothing that came before is kept, and what the client sends behind it without TLS is no handshake.
            Security::Demanded => {
                stream.write_all(&proto::option_reply(number, reply::ACK, &[])).await?;
                Ok(Step::StartTls)
            }
        }
    }

    /// `NBD_OPT_EXPORT_NAME`: no error can be answered, so that a wrong name ends the connection.
    async fn export_name<S: AsyncWrite + Unpin>(&mut self, stream: &mut S) -> io::Result<Step> {
        let name = std::str::from_utf8(&self.payload).ok().filter(|name| name.len() <= proto::NAME_MAX);
        let Some(export) = name.and_then(|name| self.exports.get(name)) else {
            return Err(malformed("no such export"));
        };
        let mut answer = Vec::with_capacity(134);
        answer.extend_from_slice(&export.device.size().to_be_bytes());
        answer.extend_from_slice(&self.export_flags(export.device.access()).to_be_bytes());
        if matches!(self.zeroes, Zeroes::Sent) {
            answer.resize(134, 0);
        }
        stream.write_all(&answer).await?;
        Ok(Step::Chosen(self.session(export)))
    }

    async fn list<S: AsyncWrite + Unpin>(&self, stream: &mut S) -> io::Result<Step> {
        let mut answer = Vec::new();
        for export in self.exports.iter() {
            let mut entry = u32::try_from(export.name.len()).unwrap_or(0).to_be_bytes().to_vec();
            entry.extend_from_slice(export.name.as_bytes());
            entry.extend_from_slice(export.description.as_bytes());
            answer.extend(proto::option_reply(option::LIST, reply::SERVER, &entry));
        }
        answer.extend(proto::option_reply(option::LIST, reply::ACK, &[]));
        stream.write_all(&answer).await?;
        Ok(Step::More)
    }

    async fn info_or_go<S: AsyncWrite + Unpin>(&mut self, stream: &mut S, number: u32) -> io::Result<Step> {
        let Some(request) = InfoRequest::parse(&self.payload) else {
            return refuse(stream, number, reply::ERR_INVALID, "malformed request").await;
        };
        let Some(export) = self.exports.get(request.name) else {
            return refuse(stream, number, reply::ERR_UNKNOWN, "no such export").await;
        };
        let mut about = vec![info::EXPORT.to_be_bytes().to_vec()];
        about[0].extend_from_slice(&export.device.size().to_be_bytes());
        about[0].extend_from_slice(&self.export_flags(export.device.access()).to_be_bytes());
        if request.wanted.contains(&info::NAME) {
            about.push([&info::NAME.to_be_bytes(), export.name.as_bytes()].concat());
        }
        if request.wanted.contains(&info::DESCRIPTION) {
            about.push([&info::DESCRIPTION.to_be_bytes(), export.description.as_bytes()].concat());
        }
        // Sent unasked as well: a minimum of one byte binds nobody.
        let sizes = [super::BLOCK_MIN, super::BLOCK_PREFERRED, proto::READ_MAX].map(u32::to_be_bytes).concat();
        about.push([&info::BLOCK_SIZE.to_be_bytes(), sizes.as_slice()].concat());
        let mut answer = Vec::new();
        for payload in about {
            answer.extend(proto::option_reply(number, reply::INFO, &payload));
        }
        answer.extend(proto::option_reply(number, reply::ACK, &[]));
        stream.write_all(&answer).await?;
        Ok(if number == option::GO { Step::Chosen(self.session(export)) } else { Step::More })
    }

    async fn contexts<S: AsyncWrite + Unpin>(&mut self, stream: &mut S, number: u32) -> io::Result<Step> {
        if number == option::SET_META_CONTEXT {
            // "The server MUST forget" what an earlier one chose, also when this one fails.
            self.contexts = None;
        }
        if self.replies == Replies::Simple {
            return refuse(stream, number, reply::ERR_INVALID, "needs structured replies").await;
        }
        let Some(request) = ContextRequest::parse(&self.payload) else {
            return refuse(stream, number, reply::ERR_INVALID, "malformed request").await;
        };
        let Some(export) = self.exports.get(request.name) else {
            return refuse(stream, number, reply::ERR_UNKNOWN, "no such export").await;
        };
        let all = number == option::LIST_META_CONTEXT && request.queries.is_empty();
        let asked = |context: &Context| all || request.queries.iter().any(|query| context.matches(query, number));
        let chosen: Vec<_> = Context::ALL.into_iter().filter(asked).collect();
        let mut answer = Vec::new();
        for context in &chosen {
            let id = if number == option::SET_META_CONTEXT { context.id() } else { 0 };
            let payload = [&id.to_be_bytes(), context.name().as_bytes()].concat();
            answer.extend(proto::option_reply(number, reply::META_CONTEXT, &payload));
        }
        answer.extend(proto::option_reply(number, reply::ACK, &[]));
        stream.write_all(&answer).await?;
        if number == option::SET_META_CONTEXT {
            self.contexts = Some((export, chosen));
        }
        Ok(Step::More)
    }

    fn export_flags(&self, access: Access) -> u16 {
        let always = super::device_flags(access) | export_flag::SEND_CACHE;
        match self.replies {
            Replies::Simple => always,
            Replies::Structured => always | export_flag::SEND_DF,
        }
    }

    /// Contexts that were chosen for another export do not count.
    fn session(&mut self, export: Arc<Export>) -> Session {
        let contexts = match self.contexts.take() {
            Some((chosen_for, contexts)) if Arc::ptr_eq(&chosen_for, &export) => contexts,
            _ => Vec::new(),
        };
        Session { export, replies: self.replies, contexts }
    }
}

async fn refuse<S: AsyncWrite + Unpin>(stream: &mut S, number: u32, kind: u32, why: &str) -> io::Result<Step> {
    stream.write_all(&proto::option_reply(number, kind, why.as_bytes())).await?;
    Ok(Step::More)
}
