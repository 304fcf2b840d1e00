//! The NBD wire format: constants, parsing and encoding. No I/O.
//!
//! Everything is big-endian. Names and numbers are those of the protocol's specification, `doc/proto.md` of the
//! NetworkBlockDevice project; the section is named where it matters.

use rustix::io::Errno;

/// First eight bytes from the server: `NBDMAGIC`.
pub const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`: second magic of the server, and first of every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First of every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First of every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First of every simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First of every chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Handshake flag: the server speaks fixed newstyle.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1;
/// Handshake flag: 124 zero bytes may be left out of the reply to `NBD_OPT_EXPORT_NAME`.
pub const FLAG_NO_ZEROES: u16 = 2;

/// Longest export name in bytes ("Values", *Strings*).
pub const NAME_MAX: usize = 4096;
/// Longest option payload that is looked at; a longer one is refused.
pub const OPTION_MAX: usize = 64 << 10;
/// Longest option payload that is skipped; with a longer one the connection ends.
pub const OPTION_SKIP_MAX: u32 = 1 << 20;
/// Longest read or write that is answered: what a client may assume when it does not ask for block sizes.
pub const READ_MAX: u32 = 32 << 20;

/// Bytes of a request without payload.
pub const REQUEST_LEN: usize = 28;
/// Bytes of a simple reply's header.
pub const SIMPLE_LEN: usize = 16;
/// Bytes of a structured reply chunk's header.
pub const CHUNK_LEN: usize = 20;
/// Bytes before the data of a chunk of type `OFFSET_DATA`.
pub const DATA_CHUNK_LEN: usize = CHUNK_LEN + 8;

/// Options, "Option types".
pub mod option {
    #![allow(missing_docs)]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Replies to options, "Option reply types".
pub mod reply {
    #![allow(missing_docs)]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = 1 << 31 | 1;
    pub const ERR_INVALID: u32 = 1 << 31 | 3;
    pub const ERR_TLS_REQD: u32 = 1 << 31 | 5;
    pub const ERR_UNKNOWN: u32 = 1 << 31 | 6;
    pub const ERR_TOO_BIG: u32 = 1 << 31 | 9;
}

/// Information about an export, `NBD_INFO_*`.
pub mod info {
    #![allow(missing_docs)]
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Flags of an export, "Transmission flags".
pub mod export_flag {
    #![allow(missing_docs)]
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
}

/// Flags of a command.
pub mod command_flag {
    #![allow(missing_docs)]
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
}

/// Types of a structured reply's chunk.
pub mod chunk_type {
    #![allow(missing_docs)]
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const ERROR: u16 = 1 << 15 | 1;
}

/// Flag of a chunk: the last one of its reply.
pub const CHUNK_DONE: u16 = 1;

/// What a client wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Read `len` bytes.
    Read,
    /// Write; a payload of `len` bytes follows the request.
    Write,
    /// End of the connection.
    Disconnect,
    /// Make what was written durable.
    Flush,
    /// Discard.
    Trim,
    /// Fetch ahead.
    Cache,
    /// Write zeros.
    WriteZeroes,
    /// Tell where data is.
    BlockStatus,
    /// Anything else.
    Unknown(u16),
}

/// A request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// [`command_flag`]s.
    pub flags: u16,
    /// What to do.
    pub command: Command,
    /// Chosen by the client, repeated in the reply.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
}

impl Request {
    /// Parses a header; `None` when the magic is wrong: the stream is out of step and can't be followed further.
    #[must_use]
    pub fn parse(bytes: &[u8; REQUEST_LEN]) -> Option<Self> {
        let mut fields = Fields(bytes);
        if fields.u32()? != REQUEST_MAGIC {
            return None;
        }
        let flags = fields.u16()?;
        let command = match fields.u16()? {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disconnect,
            3 => Command::Flush,
            4 => Command::Trim,
            5 => Command::Cache,
            6 => Command::WriteZeroes,
            7 => Command::BlockStatus,
            other => Command::Unknown(other),
        };
        Some(Self { flags, command, cookie: fields.u64()?, offset: fields.u64()?, len: fields.u32()? })
    }
}

/// Takes big-endian fields off the front of a payload; `None` when it ends too early.
#[derive(Clone, Copy, Debug)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*first)
    }

    /// Two bytes.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// Four bytes.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A length of four bytes, then so many bytes of UTF-8, at most [`NAME_MAX`].
    pub fn string(&mut self) -> Option<&'a str> {
        let len = usize::try_from(self.u32()?).ok().filter(|len| *len <= NAME_MAX)?;
        let (text, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        std::str::from_utf8(text).ok()
    }

    /// Whether nothing is left.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The payload of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoRequest<'a> {
    /// The export.
    pub name: &'a str,
    /// The [`info`] numbers that the client asks for.
    pub wanted: Vec<u16>,
}

impl<'a> InfoRequest<'a> {
    /// Parses a payload, which must end with the last field; `None` when it is malformed.
    #[must_use]
    pub fn parse(payload: &'a [u8]) -> Option<Self> {
        let mut fields = Fields(payload);
        let name = fields.string()?;
        let count = fields.u16()?;
        if fields.0.len() != usize::from(count) * 2 {
            return None;
        }
        let wanted = std::iter::from_fn(|| fields.u16()).collect();
        Some(Self { name, wanted })
    }
}

/// The payload of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextRequest<'a> {
    /// The export.
    pub name: &'a str,
    /// The contexts that the client asks for.
    pub queries: Vec<&'a str>,
}

impl<'a> ContextRequest<'a> {
    /// Parses a payload, which must end with the last field; `None` when it is malformed.
    #[must_use]
    pub fn parse(payload: &'a [u8]) -> Option<Self> {
        let mut fields = Fields(payload);
        let name = fields.string()?;
        let count = fields.u32()?;
        let mut queries = Vec::new();
        // Each query takes four bytes or more of a bounded payload, so that a false count ends the loop early.
        for _ in 0..count {
            queries.push(fields.string()?);
        }
        fields.is_empty().then_some(Self { name, queries })
    }
}

/// A reply to option `option`: header and payload.
#[must_use]
pub fn option_reply(option: u32, kind: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(20 + payload.len());
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(payload);
    out
}

/// The header of a simple reply; `error` is 0 or one of [`wire_error`].
#[must_use]
pub fn simple_header(error: u32, cookie: u64) -> [u8; SIMPLE_LEN] {
    let mut out = [0; SIMPLE_LEN];
    out[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    out[4..8].copy_from_slice(&error.to_be_bytes());
    out[8..].copy_from_slice(&cookie.to_be_bytes());
    out
}

/// The header of a reply that carries all of a read.
pub enum Header {
    /// Of a simple reply.
    Simple([u8; SIMPLE_LEN]),
    /// Of a structured reply's only chunk.
    Chunk([u8; DATA_CHUNK_LEN]),
}

impl AsRef<[u8]> for Header {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Simple(bytes) => bytes,
            Self::Chunk(bytes) => bytes,
        }
    }
}

/// The header of a structured reply's chunk with `payload` bytes after it.
#[must_use]
pub fn chunk_header(flags: u16, kind: u16, cookie: u64, payload: u32) -> [u8; CHUNK_LEN] {
    let mut out = [0; CHUNK_LEN];
    out[..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
    out[4..6].copy_from_slice(&flags.to_be_bytes());
    out[6..8].copy_from_slice(&kind.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out[16..].copy_from_slice(&payload.to_be_bytes());
    out
}

/// What stands before `len` bytes of data in a chunk of type `OFFSET_DATA`. `len` is at most [`READ_MAX`].
#[must_use]
pub fn data_chunk_header(flags: u16, cookie: u64, offset: u64, len: u32) -> [u8; DATA_CHUNK_LEN] {
    let mut out = [0; DATA_CHUNK_LEN];
    out[..CHUNK_LEN].copy_from_slice(&chunk_header(flags, chunk_type::OFFSET_DATA, cookie, len.saturating_add(8)));
    out[CHUNK_LEN..].copy_from_slice(&offset.to_be_bytes());
    out
}

/// A whole chunk of type `OFFSET_HOLE`: `len` bytes of zeros at `offset`.
#[must_use]
pub fn hole_chunk(flags: u16, cookie: u64, offset: u64, len: u32) -> [u8; CHUNK_LEN + 12] {
    let mut out = [0; CHUNK_LEN + 12];
    out[..CHUNK_LEN].copy_from_slice(&chunk_header(flags, chunk_type::OFFSET_HOLE, cookie, 12));
    out[CHUNK_LEN..CHUNK_LEN + 8].copy_from_slice(&offset.to_be_bytes());
    out[CHUNK_LEN + 8..].copy_from_slice(&len.to_be_bytes());
    out
}

/// Longest message in an error chunk; the rest is cut off.
pub const MESSAGE_MAX: usize = 1024;

/// A whole chunk of type `ERROR`, the last of its reply, with a message for people.
#[must_use]
pub fn error_chunk(cookie: u64, error: u32, message: &str) -> Vec<u8> {
    let end = (0..=message.len().min(MESSAGE_MAX)).rev().find(|end| message.is_char_boundary(*end)).unwrap_or(0);
    let message = &message[..end];
    let len = u16::try_from(message.len()).unwrap_or(0);
    let mut out = Vec::with_capacity(CHUNK_LEN + 6 + message.len());
    out.extend_from_slice(&chunk_header(CHUNK_DONE, chunk_type::ERROR, cookie, 6 + u32::from(len)));
    out.extend_from_slice(&error.to_be_bytes());
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(&message.as_bytes()[..usize::from(len)]);
    out
}

/// One run of a block status reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes.
    pub len: u32,
    /// Flags of the context.
    pub flags: u32,
}

/// A whole chunk of type `BLOCK_STATUS` for one context.
#[must_use]
pub fn status_chunk(flags: u16, cookie: u64, context: u32, extents: &[Extent]) -> Vec<u8> {
    let payload = 4 + extents.len() * 8;
    let mut out = Vec::with_capacity(CHUNK_LEN + payload);
    let payload = u32::try_from(payload).unwrap_or(u32::MAX);
    out.extend_from_slice(&chunk_header(flags, chunk_type::BLOCK_STATUS, cookie, payload));
    out.extend_from_slice(&context.to_be_bytes());
    for extent in extents {
        out.extend_from_slice(&extent.len.to_be_bytes());
        out.extend_from_slice(&extent.flags.to_be_bytes());
    }
    out
}

/// The protocol's number for an errno ("Error values"): those it knows, EIO for the others.
#[must_use]
pub const fn wire_error(errno: i32) -> u32 {
    const KNOWN: [(Errno, u32); 8] = [
        (Errno::PERM, 1),
        (Errno::IO, 5),
        (Errno::NOMEM, 12),
        (Errno::INVAL, 22),
        (Errno::NOSPC, 28),
        (Errno::OVERFLOW, 75),
        (Errno::OPNOTSUPP, 95),
        (Errno::SHUTDOWN, 108),
    ];
    let mut at = 0;
    while at < KNOWN.len() {
        if KNOWN[at].0.raw_os_error() == errno {
            return KNOWN[at].1;
        }
        at += 1;
    }
    5
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_payload_makes_a_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = InfoRequest::parse(&bytes);
            let _ = ContextRequest::parse(&bytes);
            if let Some(header) = bytes.first_chunk() {
                let _ = Request::parse(header);
            }
        }

        #[test]
        fn well_formed_payloads_are_read_back(name in "[a-z/]{0,40}", queries in proptest::collection::vec("[a-z:]{0,20}", 0..5)) {
            let mut payload = (u32::try_from(name.len()).unwrap()).to_be_bytes().to_vec();
            payload.extend_from_slice(name.as_bytes());
            let mut info = payload.clone();
            info.extend_from_slice(&[0, 2, 0, 3, 0, 1]);
            prop_assert_eq!(InfoRequest::parse(&info), Some(InfoRequest { name: &name, wanted: vec![3, 1] }));
            payload.extend_from_slice(&u32::try_from(queries.len()).unwrap().to_be_bytes());
            for query in &queries {
                payload.extend_from_slice(&u32::try_from(query.len()).unwrap().to_be_bytes());
                payload.extend_from_slice(query.as_bytes());
            }
            let expected = ContextRequest { name: &name, queries: queries.iter().map(String::as_str).collect() };
            prop_assert_eq!(ContextRequest::parse(&payload), Some(expected));
            payload.push(0);
            prop_assert_eq!(ContextRequest::parse(&payload), None);
        }
    }

    #[test]
    fn false_lengths_are_refused() {
        assert_eq!(InfoRequest::parse(&[0xff, 0xff, 0xff, 0xff, 0, 0]), None);
        assert_eq!(InfoRequest::parse(&[0, 0, 0, 0, 0, 9]), None);
        let mut endless = vec![0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];
        endless.extend_from_slice(&[0; 40]);
        assert_eq!(ContextRequest::parse(&endless), None);
        let mut long = 4097u32.to_be_bytes().to_vec();
        long.resize(4 + 4097 + 2, 0);
        assert_eq!(InfoRequest::parse(&long), None);
    }

    #[test]
    fn messages_are_cut_between_characters() {
        let chunk = error_chunk(7, 5, &"é".repeat(MESSAGE_MAX));
        assert_eq!(chunk.len(), CHUNK_LEN + 6 + MESSAGE_MAX);
        assert!(std::str::from_utf8(&chunk[CHUNK_LEN + 6..]).is_ok());
    }

    #[test]
    fn errors_outside_the_protocol_become_eio() {
        assert_eq!(wire_error(Errno::NOENT.raw_os_error()), 5);
        assert_eq!(wire_error(Errno::INVAL.raw_os_error()), 22);
        assert_eq!(wire_error(Errno::SHUTDOWN.raw_os_error()), 108);
    }
}
