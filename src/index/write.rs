//! Writing: records are collected in memory and written as one file.

use zerocopy::IntoBytes;

use super::layout::{
    self, BlobRecord, ChunkRecord, ExtentRecord, Header, LikelyRecord, Section, SettingsRecord, StartupReadRecord,
};
use super::{BLOCK, Blob, Extent, Place, Role, StartupRead};
use crate::chunk::{ChunkRef, Codec, Digest};
use crate::error::{Error, Result};

/// Collects the records of an index.
#[derive(Default)]
pub struct IndexWriter {
    blobs: Vec<BlobRecord>,
    chunks: Vec<ChunkRecord>,
    extents: Vec<ExtentRecord>,
    startup_extents: Vec<ExtentRecord>,
    startup_order: Vec<u32>,
    startup_reads: Vec<StartupReadRecord>,
    startup_settings: Option<SettingsRecord>,
    likely: Option<LikelyRecord>,
}

impl IndexWriter {
    /// An index without records.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a blob and returns its number.
    pub fn blob(&mut self, blob: &Blob) -> u32 {
        let role = match blob.role {
            Role::Pack => layout::ROLE_PACK,
            Role::Startup => layout::ROLE_STARTUP,
        };
        self.blobs.push(BlobRecord {
            digest: *blob.digest.as_bytes(),
            bytes: blob.bytes.into(),
            role,
            reserved: [0; 7],
        });
        (self.blobs.len() - 1) as u32
    }

    /// Adds a chunk and returns its number.
    pub fn chunk(&mut self, chunk: &ChunkRef) -> u32 {
        let codec = match chunk.codec {
            Codec::Plain => layout::CODEC_PLAIN,
            Codec::Zstd => layout::CODEC_ZSTD,
        };
        self.chunks.push(ChunkRecord {
            digest: *chunk.digest.as_bytes(),
            offset: chunk.offset.into(),
            blob: chunk.blob.into(),
            stored_bytes: chunk.stored_len.into(),
            plain_bytes: chunk.plain_len.into(),
            codec,
            reserved: [0; 11],
        });
        (self.chunks.len() - 1) as u32
    }

    /// Adds an extent; any order will do.
    pub fn extent(&mut self, extent: Extent) {
        self.extents.push(record(extent));
    }

    /// Adds a start-up extent; any order will do.
    pub fn startup_extent(&mut self, extent: Extent) {
        self.startup_extents.push(record(extent));
    }

    /// Notes that a start probably reads the first `chunks` chunks, in the order of their numbers; 0 notes nothing.
    pub fn likely_chunks(&mut self, chunks: u32) {
        self.likely = (chunks > 0).then(|| LikelyRecord { chunks: chunks.into(), reserved: [0; 12] });
    }

    /// Appends a chunk number to the start-up order.
    pub fn startup_order(&mut self, chunk: u32) {
        self.startup_order.push(chunk);
    }

    /// Appends to what a start reads, in the order of the start-up stream.
    pub fn startup_read(&mut self, read: StartupRead) {
        let inode = match read.place {
            Place::File { inode } => inode,
            Place::Device => layout::NO_INODE,
        };
        self.startup_reads.push(StartupReadRecord {
            chunk: read.chunk.into(),
            inode: inode.into(),
            first: read.first.into(),
            blocks: read.blocks.into(),
        });
    }

    /// Says which read-ahead in KiB the start was recorded with.
    pub fn startup_read_ahead_kb(&mut self, kib: u32) {
        let kib = kib.min(layout::READ_AHEAD_MAX);
        self.startup_settings = Some(SettingsRecord { read_ahead_kb: kib.into(), reserved: [0; 12] });
    }

    /// The bytes of the index for a device of `device_bytes` with `file_system` on it (`ext4`, `raw`).
    ///
    /// # Errors
    /// [`Error::Invalid`] when the result would not be a valid index: what is written can be read.
    pub fn finish(mut self, device_bytes: u64, file_system: &str) -> Result<Vec<u8>> {
        self.extents.sort_unstable_by_key(|record| record.block.get());
        self.startup_extents.sort_unstable_by_key(|record| record.block.get());
        let order: Vec<zerocopy::little_endian::U32> = self.startup_order.iter().map(|&chunk| chunk.into()).collect();
        let mut sections: Vec<(u32, usize, &[u8])> = vec![
            (layout::KIND_BLOBS, size_of::<BlobRecord>(), self.blobs.as_bytes()),
            (layout::KIND_CHUNKS, size_of::<ChunkRecord>(), self.chunks.as_bytes()),
            (layout::KIND_EXTENTS, size_of::<ExtentRecord>(), self.extents.as_bytes()),
        ];
        if !order.is_empty() {
            sections.push((layout::KIND_STARTUP_EXTENTS, size_of::<ExtentRecord>(), self.startup_extents.as_bytes()));
            sections.push((layout::KIND_STARTUP_ORDER, size_of::<u32>(), order.as_bytes()));
        }
        if !self.startup_reads.is_empty() {
            let reads = self.startup_reads.as_bytes();
            sections.push((layout::KIND_STARTUP_READS, size_of::<StartupReadRecord>(), reads));
        }
        if let Some(settings) = &self.startup_settings {
            sections.push((layout::KIND_STARTUP_SETTINGS, size_of::<SettingsRecord>(), settings.as_bytes()));
        }
        if let Some(likely) = &self.likely {
            sections.push((layout::KIND_LIKELY, size_of::<LikelyRecord>(), likely.as_bytes()));
        }
        let header_bytes = (size_of::<Header>() + sections.len() * size_of::<Section>()) as u32;
        let mut name = [0; 16];
        name.get_mut(..file_system.len())
            .ok_or_else(|| Error::invalid("file system name", format!("{file_system:?} has more than 16 bytes")))?
            .copy_from_slice(file_system.as_bytes());
        let header = Header {
            magic: layout::MAGIC,
            version: layout::VERSION.into(),
            header_bytes: header_bytes.into(),
            device_bytes: device_bytes.into(),
            block_bytes: BLOCK.into(),
            sections: (sections.len() as u32).into(),
            file_system: name,
            reserved: [0; 16],
        };
        let total = header_bytes as usize + sections.iter().map(|(_, _, content)| content.len()).sum::<usize>();
        let mut bytes = Vec::with_capacity(total);
        bytes.extend_from_slice(header.as_bytes());
        let mut offset = u64::from(header_bytes);
        for (kind, record_bytes, content) in &sections {
            let section = Section {
                kind: (*kind).into(),
                record_bytes: (*record_bytes as u32).into(),
                offset: offset.into(),
                bytes: (content.len() as u64).into(),
                reserved: 0.into(),
                digest: *Digest::of(content).as_bytes(),
            };
            bytes.extend_from_slice(section.as_bytes());
            offset += content.len() as u64;
        }
        for (_, _, content) in &sections {
            bytes.extend_from_slice(content);
        }
        super::Index::from_bytes(bytes.clone())?;
        Ok(bytes)
    }
}

fn record(extent: Extent) -> ExtentRecord {
    ExtentRecord {
        block: extent.block.into(),
        blocks: extent.blocks.into(),
        chunk: extent.chunk.into(),
        offset: extent.offset.into(),
    }
}
