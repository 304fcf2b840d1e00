//! Reading: an index is validated whole when it is opened; afterwards every record is in bounds.
#![deny(clippy::indexing_slicing)]

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::layout::{
    self, BlobRecord, ChunkRecord, ExtentRecord, Header, LikelyRecord, Section, SettingsRecord, StartupReadRecord,
};
use super::{BLOCK, Blob, DEVICE_MAX, Extent, Place, Role, StartupRead};
use crate::chunk::{CHUNK_MAX, ChunkRef, Codec, Digest, STORED_MAX};
use crate::error::{Error, Result};
use crate::sys::mmap::Mapping;

/// Largest index in bytes that is read, fetched or inflated: about 16 million chunks.
pub const MAX_INDEX_BYTES: u64 = 2 << 30;

enum Bytes {
    Owned(Vec<u8>),
    Mapped(Mapping),
}

impl Bytes {
    fn get(&self) -> &[u8] {
        match self {
            Self::Owned(bytes) => bytes,
            Self::Mapped(mapping) => mapping.bytes(),
        }
    }
}

/// A valid index. Lookups by number never fail for numbers that the index itself contains.
pub struct Index {
    bytes: Bytes,
    digest: Digest,
    device_bytes: u64,
    file_system: String,
    blobs: Range<usize>,
    chunks: Range<usize>,
    extents: Range<usize>,
    startup_extents: Range<usize>,
    startup_order: Range<usize>,
    startup_reads: Range<usize>,
    startup_settings: Range<usize>,
    likely: Range<usize>,
}

impl std::fmt::Debug for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Index")
            .field("digest", &self.digest)
            .field("device_bytes", &self.device_bytes)
            .finish_non_exhaustive()
    }
}

impl Index {
    /// Opens the index file at `path`, which must have the digest `expected`, and maps it into memory.
    ///
    /// The file must not be changed afterwards; firstread writes it once, under its digest's name.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Invalid`] that names the file and what is wrong with it.
    pub fn open(path: &Path, expected: &Digest) -> Result<Self> {
        let action = || format!("opening the index {}", path.display());
        let file = File::open(path).map_err(|error| Error::io(action(), error))?;
        let bytes = file.metadata().map_err(|error| Error::io(action(), error))?.len();
        if bytes > MAX_INDEX_BYTES {
            return Err(Error::invalid(
                "index",
                format!("{} has {bytes} bytes, more than {MAX_INDEX_BYTES}", path.display()),
            ));
        }
        let mapping = Mapping::read_only(&file).map_err(|error| Error::io(action(), error))?;
        let index = Self::validate(Bytes::Mapped(mapping))?;
        if index.digest != *expected {
            let reason = format!("{} hashes to {}, not to {expected}", path.display(), index.digest);
            return Err(Error::invalid("index", reason));
        }
        Ok(index)
    }

    /// Validates an index held in memory.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the first record that is out of bounds.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self> {
        Self::validate(Bytes::Owned(bytes))
    }

    fn validate(bytes: Bytes) -> Result<Self> {
        let data = bytes.get();
        let (header, _) = Header::ref_from_prefix(data).map_err(|_| invalid("it is shorter than its header"))?;
        if header.magic != layout::MAGIC {
            return Err(invalid("it does not start with the magic bytes"));
        }
        if header.version.get() != layout::VERSION {
            let (found, known) = (header.version.get(), layout::VERSION);
            return Err(Error::Unsupported(format!(
                "index of version {found}; this program reads version {known}: use a newer one"
            )));
        }
        let count = header.sections.get();
        if count > layout::MAX_SECTIONS
            || header.header_bytes.get() != 64 + 64 * count
            || header.block_bytes.get() != BLOCK
        {
            return Err(invalid("its header is out of bounds"));
        }
        let device_bytes = header.device_bytes.get();
        if device_bytes == 0 || device_bytes % u64::from(BLOCK) != 0 || device_bytes > DEVICE_MAX {
            return Err(invalid(format!("the device has {device_bytes} bytes")));
        }
        let name = header.file_system.split(|&byte| byte == 0).next().unwrap_or_default();
        let file_system = match std::str::from_utf8(name) {
            Ok(name) if name.bytes().all(|byte| byte.is_ascii_alphanumeric()) => name.to_owned(),
            _ => return Err(invalid("the file system's name is not ASCII")),
        };
        let mut sections = Sections::default();
        for number in 0..count as usize {
            let table = data.get(64 + 64 * number..).ok_or_else(|| invalid("it is shorter than its section table"))?;
            let (section, _) =
                Section::ref_from_prefix(table).map_err(|_| invalid("it is shorter than its section table"))?;
            sections.add(section, u64::from(header.header_bytes.get()), data)?;
        }
        let required =
            |range: Option<Range<usize>>, name| range.ok_or_else(|| invalid(format!("the section {name} is missing")));
        let mut index = Self {
            digest: Digest::of(data),
            device_bytes,
            file_system,
            blobs: required(sections.blobs, "blobs")?,
            chunks: required(sections.chunks, "chunks")?,
            extents: required(sections.extents, "extents")?,
            startup_extents: sections.startup_extents.unwrap_or_default(),
            startup_order: sections.startup_order.unwrap_or_default(),
            startup_reads: sections.startup_reads.unwrap_or_default(),
            startup_settings: sections.startup_settings.unwrap_or_default(),
            likely: sections.likely.unwrap_or_default(),
            bytes: Bytes::Owned(Vec::new()),
        };
        index.bytes = bytes;
        index.check_records()?;
        Ok(index)
    }

    fn check_records(&self) -> Result<()> {
        for (number, blob) in self.blob_records().iter().enumerate() {
            if blob.role > layout::ROLE_STARTUP {
                return Err(invalid(format!("blob {number} has the unknown role {}", blob.role)));
            }
        }
        for (number, chunk) in self.chunk_records().iter().enumerate() {
            let blob = self.blob_records().get(chunk.blob.get() as usize);
            let blob =
                blob.ok_or_else(|| invalid(format!("chunk {number} is in blob {}, which does not exist", chunk.blob)))?;
            let (stored, plain) = (chunk.stored_bytes.get(), chunk.plain_bytes.get());
            let inside = chunk.offset.get().checked_add(u64::from(stored)).is_some_and(|end| end <= blob.bytes.get());
            let codec = match chunk.codec {
                layout::CODEC_PLAIN => stored == plain,
                layout::CODEC_ZSTD => true,
                _ => false,
            };
            if !inside || !codec || plain == 0 || plain > CHUNK_MAX || stored == 0 || stored > STORED_MAX {
                let reason = format!(
                    "chunk {number} is out of bounds: {stored} stored, {plain} plain bytes, codec {}",
                    chunk.codec
                );
                return Err(invalid(reason));
            }
        }
        self.check_extents(self.extent_records(), "extent")?;
        self.check_extents(self.startup_records(), "start-up extent")?;
        let settings = self.settings_records();
        if settings.len() > 1 || settings.iter().any(|record| record.read_ahead_kb.get() > layout::READ_AHEAD_MAX) {
            return Err(invalid("its start-up settings are out of bounds"));
        }
        let chunks = self.chunk_count();
        let likely = self.likely_records();
        if likely.len() > 1 || likely.iter().any(|record| record.chunks.get() > chunks) {
            return Err(invalid("its likely chunks are out of bounds"));
        }
        for (number, read) in self.startup_reads().enumerate() {
            let room = match read.place {
                // ext4's largest file.
                Place::File { .. } => 1 << 32,
                Place::Device => self.device_bytes / u64::from(BLOCK),
            };
            let end = u64::from(read.first) + u64::from(read.blocks);
            if read.chunk >= chunks || read.blocks == 0 || end > room {
                return Err(invalid(format!("start-up read {number} is out of bounds")));
            }
        }
        match self.startup_order().find(|&chunk| chunk >= chunks) {
            Some(chunk) => Err(invalid(format!("the start-up order names chunk {chunk}, which does not exist"))),
            None => Ok(()),
        }
    }

    fn check_extents(&self, records: &[ExtentRecord], name: &str) -> Result<()> {
        let device_blocks = self.device_bytes / u64::from(BLOCK);
        let mut next = 0;
        for (number, record) in records.iter().enumerate() {
            let (first, end) =
                (u64::from(record.block.get()), u64::from(record.block.get()) + u64::from(record.blocks.get()));
            if first < next || end <= first || end > device_blocks {
                return Err(invalid(format!(
                    "{name} {number} is out of order or outside the device: blocks {first} to {end}"
                )));
            }
            next = end;
            let chunk = self.chunk_records().get(record.chunk.get() as usize);
            let plain = chunk.map_or(0, |chunk| u64::from(chunk.plain_bytes.get()));
            let offset = u64::from(record.offset.get());
            if offset >= plain || offset + (end - first) * u64::from(BLOCK) >= plain + u64::from(BLOCK) {
                return Err(invalid(format!("{name} {number} reaches outside its chunk {}", record.chunk)));
            }
        }
        Ok(())
    }

    /// sha256 of the whole index.
    #[must_use]
    pub const fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Length of the index in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.get().len() as u64
    }

    /// Size of the device in bytes.
    #[must_use]
    pub const fn device_bytes(&self) -> u64 {
        self.device_bytes
    }

    /// The file system on the device: `ext4`, or `raw`.
    #[must_use]
    pub fn file_system(&self) -> &str {
        &self.file_system
    }

    /// The blobs, by number.
    pub fn blobs(&self) -> impl ExactSizeIterator<Item = Blob> + '_ {
        self.blob_records().iter().map(|record| Blob {
            digest: Digest::from_bytes(record.digest),
            bytes: record.bytes.get(),
            role: if record.role == layout::ROLE_STARTUP { Role::Startup } else { Role::Pack },
        })
    }

    /// Number of chunks.
    #[must_use]
    pub fn chunk_count(&self) -> u32 {
        u32::try_from(self.chunk_records().len()).unwrap_or(u32::MAX)
    }

    /// The chunk with this number, or `None` from [`chunk_count`](Self::chunk_count) on.
    #[must_use]
    pub fn chunk(&self, number: u32) -> Option<ChunkRef> {
        self.chunk_records().get(number as usize).map(chunk_ref)
    }

    /// All chunks, by number.
    pub fn chunks(&self) -> impl ExactSizeIterator<Item = ChunkRef> + '_ {
        self.chunk_records().iter().map(chunk_ref)
    }

    /// The ordinary extents, ascending.
    #[must_use]
    pub fn extents(&self) -> Extents<'_> {
        Extents(self.extent_records())
    }

    /// The start-up extents, ascending; empty without a start-up pack.
    #[must_use]
    pub fn startup_extents(&self) -> Extents<'_> {
        Extents(self.startup_records())
    }

    /// Numbers of the start-up pack's chunks in streaming order.
    pub fn startup_order(&self) -> impl ExactSizeIterator<Item = u32> + '_ {
        records::<zerocopy::little_endian::U32>(self.bytes.get(), &self.startup_order).iter().map(|number| number.get())
    }

    /// What a start reads, in the order of the start-up stream; empty when the index does not say.
    pub fn startup_reads(&self) -> impl ExactSizeIterator<Item = StartupRead> + '_ {
        records::<StartupReadRecord>(self.bytes.get(), &self.startup_reads).iter().map(|record| StartupRead {
            chunk: record.chunk.get(),
            place: match record.inode.get() {
                layout::NO_INODE => Place::Device,
                inode => Place::File { inode },
            },
            first: record.first.get(),
            blocks: record.blocks.get(),
        })
    }

    /// The read-ahead in KiB that the start was recorded with, if the index says.
    #[must_use]
    pub fn startup_read_ahead_kb(&self) -> Option<u32> {
        self.settings_records().first().map(|record| record.read_ahead_kb.get())
    }

    /// How many chunks, by number from 0 on, a start without a start-up pack probably reads, in that order; 0 when nobody
    /// guessed.
    #[must_use]
    pub fn likely_chunks(&self) -> u32 {
        self.likely_records().first().map_or(0, |record| record.chunks.get())
    }

    fn likely_records(&self) -> &[LikelyRecord] {
        records(self.bytes.get(), &self.likely)
    }

    fn settings_records(&self) -> &[SettingsRecord] {
        records(self.bytes.get(), &self.startup_settings)
    }

    fn blob_records(&self) -> &[BlobRecord] {
        records(self.bytes.get(), &self.blobs)
    }

    fn chunk_records(&self) -> &[ChunkRecord] {
        records(self.bytes.get(), &self.chunks)
    }

    fn extent_records(&self) -> &[ExtentRecord] {
        records(self.bytes.get(), &self.extents)
    }

    fn startup_records(&self) -> &[ExtentRecord] {
        records(self.bytes.get(), &self.startup_extents)
    }
}

/// A sorted table of extents.
#[derive(Clone, Copy)]
pub struct Extents<'a>(&'a [ExtentRecord]);

impl<'a> Extents<'a> {
    /// The extent that covers `block`, or else the first one behind it.
    #[must_use]
    pub fn at_or_after(&self, block: u32) -> Option<Extent> {
        let next = self.0.partition_point(|record| {
            u64::from(record.block.get()) + u64::from(record.blocks.get()) <= u64::from(block)
        });
        self.0.get(next).map(extent)
    }

    /// All extents, ascending.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Extent> + 'a {
        self.0.iter().map(extent)
    }
}

fn extent(record: &ExtentRecord) -> Extent {
    Extent {
        block: record.block.get(),
        blocks: record.blocks.get(),
        chunk: record.chunk.get(),
        offset: record.offset.get(),
    }
}

fn chunk_ref(record: &ChunkRecord) -> ChunkRef {
    ChunkRef {
        digest: Digest::from_bytes(record.digest),
        blob: record.blob.get(),
        offset: record.offset.get(),
        stored_len: record.stored_bytes.get(),
        plain_len: record.plain_bytes.get(),
        codec: if record.codec == layout::CODEC_PLAIN { Codec::Plain } else { Codec::Zstd },
    }
}

/// The records in `range`; ranges were checked to be whole records when the index was opened.
fn records<'a, T: FromBytes + Immutable + KnownLayout + Unaligned>(data: &'a [u8], range: &Range<usize>) -> &'a [T] {
    data.get(range.clone()).and_then(|bytes| <[T]>::ref_from_bytes(bytes).ok()).unwrap_or_default()
}

#[derive(Default)]
struct Sections {
    blobs: Option<Range<usize>>,
    chunks: Option<Range<usize>>,
    extents: Option<Range<usize>>,
    startup_extents: Option<Range<usize>>,
    startup_order: Option<Range<usize>>,
    startup_reads: Option<Range<usize>>,
    startup_settings: Option<Range<usize>>,
    likely: Option<Range<usize>>,
}

impl Sections {
    fn add(&mut self, section: &Section, header_bytes: u64, data: &[u8]) -> Result<()> {
        let kind = section.kind.get();
        let (slot, record_bytes) = match kind {
            layout::KIND_BLOBS => (&mut self.blobs, size_of::<BlobRecord>()),
            layout::KIND_CHUNKS => (&mut self.chunks, size_of::<ChunkRecord>()),
            layout::KIND_EXTENTS => (&mut self.extents, size_of::<ExtentRecord>()),
            layout::KIND_STARTUP_EXTENTS => (&mut self.startup_extents, size_of::<ExtentRecord>()),
            layout::KIND_STARTUP_ORDER => (&mut self.startup_order, size_of::<u32>()),
            layout::KIND_STARTUP_READS => (&mut self.startup_reads, size_of::<StartupReadRecord>()),
            layout::KIND_STARTUP_SETTINGS => (&mut self.startup_settings, size_of::<SettingsRecord>()),
            layout::KIND_LIKELY => (&mut self.likely, size_of::<LikelyRecord>()),
            layout::OPTIONAL_KIND.. => return Ok(()),
            _ => {
                return Err(Error::Unsupported(format!(
                    "index with a section of the unknown kind {kind}: use a newer program"
                )));
            }
        };
        let (start, bytes) = (section.offset.get(), section.bytes.get());
        let end = start.checked_add(bytes).filter(|_| start >= header_bytes).and_then(|end| usize::try_from(end).ok());
        let range = usize::try_from(start).ok().zip(end).map(|(start, end)| start..end);
        let content = range
            .clone()
            .and_then(|range| data.get(range))
            .ok_or_else(|| invalid(format!("section {kind} is outside the file")))?;
        let whole = section.record_bytes.get() as usize == record_bytes && content.len() % record_bytes == 0;
        if !whole || content.len() / record_bytes > u32::MAX as usize {
            return Err(invalid(format!("section {kind} does not consist of whole records")));
        }
        if Digest::of(content) != Digest::from_bytes(section.digest) {
            return Err(invalid(format!("section {kind} does not have its digest")));
        }
        if slot.is_some() {
            return Err(invalid(format!("section {kind} is there twice")));
        }
        *slot = range;
        Ok(())
    }
}

fn invalid(reason: impl Into<String>) -> Error {
    Error::invalid("index", reason)
}
