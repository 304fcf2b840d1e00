//! Generated images: an index over chunks in an in-process source, and the device's content made without a map.
// Every test program uses its own part of this.
#![allow(dead_code)]

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use firstread::chunk::{ChunkRef, Codec};
use firstread::index::{BLOCK, Blob, Extent, Index, IndexWriter, Role};
use firstread::map::Map;
use firstread::source::{Body, Source, SourceFuture};
use firstread::{Digest, Error};

use crate::random::Random;

/// An image, its source and what its device must read as.
pub struct Generated {
    pub map: Map,
    pub source: Arc<BytesSource>,
    pub reference: Vec<u8>,
}

/// A source in memory that counts what it is asked for.
#[derive(Default)]
pub struct BytesSource {
    blobs: HashMap<Digest, Bytes>,
    /// How long each request takes to answer.
    pub delay: Duration,
    pub requests: AtomicU64,
    pub bytes: AtomicU64,
}

impl Source for BytesSource {
    fn name(&self) -> &str {
        "memory"
    }

    fn read_at<'a>(&'a self, blob: &'a Blob, offset: u64, len: u64) -> SourceFuture<'a, Body> {
        Box::pin(async move {
            self.requests.fetch_add(1, Relaxed);
            self.bytes.fetch_add(len, Relaxed);
            tokio::time::sleep(self.delay).await;
            let missing = || Error::NotFound { source_name: "memory".to_owned(), what: blob.digest.to_string() };
            let bytes = self.blobs.get(&blob.digest).ok_or_else(missing)?;
            let range = bytes.slice(offset as usize..(offset + len) as usize);
            let pieces: Vec<_> = range.chunks(10_000).map(|piece| Ok(range.slice_ref(piece))).collect();
            Ok(Box::pin(futures_util::stream::iter(pieces)) as Body)
        })
    }
}

struct PackWriter {
    role: Role,
    bytes: Vec<u8>,
    chunks: Vec<ChunkRef>,
}

impl PackWriter {
    fn new(role: Role, random: &mut Random) -> Self {
        Self { role, bytes: random.bytes(1500), chunks: Vec::new() }
    }

    /// Stores a chunk and returns its number in this pack.
    fn store(&mut self, plain: &[u8], blob: u32, codec: Codec) {
        let stored = match codec {
            Codec::Plain => plain.to_vec(),
            Codec::Zstd => zstd::bulk::compress(plain, 3).unwrap(),
        };
        self.chunks.push(ChunkRef {
            digest: Digest::of(plain),
            blob,
            offset: self.bytes.len() as u64,
            stored_len: stored.len() as u32,
            plain_len: plain.len() as u32,
            codec,
        });
        self.bytes.extend_from_slice(&stored);
    }
}

impl Generated {
    /// An image of `blocks` device blocks with holes, chunks of all lengths, chunks that are used twice and in part,
    /// and start-up extents.
    pub fn new(seed: u64, blocks: u32) -> Self {
        let mut random = Random(seed);
        let device_bytes = u64::from(blocks) * u64::from(BLOCK);
        let mut reference = vec![0; device_bytes as usize];
        let (mut pack, mut startup) =
            (PackWriter::new(Role::Pack, &mut random), PackWriter::new(Role::Startup, &mut random));
        let mut plains: Vec<Vec<u8>> = Vec::new();
        let (mut extents, mut startup_extents) = (Vec::new(), Vec::new());
        let mut block = random.below(3) as u32;
        while block < blocks {
            let reuse = !plains.is_empty() && random.one_in(5);
            let chunk = if reuse {
                random.below(plains.len() as u64) as usize
            } else {
                let len = match random.below(4) {
                    0 => 1 + random.below(9000),
                    1 => 262_144,
                    _ => 1 + random.below(300_000),
                };
                // Half of it compresses.
                let mut plain = random.bytes(len as usize);
                let half = plain.len() / 2;
                plain[..half].fill(b'a' + random.below(26) as u8);
                let codec = if random.one_in(4) { Codec::Plain } else { Codec::Zstd };
                pack.store(&plain, 0, codec);
                plains.push(plain);
                plains.len() - 1
            };
            let plain = &plains[chunk];
            let whole = (plain.len() as u32).div_ceil(BLOCK);
            let first = if reuse { random.below(u64::from(whole)) as u32 } else { 0 };
            let taken = (whole - first).min(blocks - block);
            extents.push(Extent { block, blocks: taken, chunk: chunk as u32, offset: first * BLOCK });
            let (at, from) = ((block * BLOCK) as usize, (first * BLOCK) as usize);
            let part = &plain[from..plain.len().min(from + (taken * BLOCK) as usize)];
            reference[at..at + part.len()].copy_from_slice(part);
            if random.one_in(3) {
                let hot = block + random.below(u64::from(taken)) as u32;
                let len = 1 + random.below(u64::from((blocks - hot).min(8))) as u32;
                startup_extents.push((hot, len));
            }
            block += taken + if random.one_in(3) { random.below(40) as u32 } else { 0 };
        }
        let mut writer = IndexWriter::new();
        let mut end = 0;
        let mut hot = Vec::new();
        for (block, len) in startup_extents {
            let (block, last) = (block.max(end), block + len);
            if block < last {
                let (from, to) = (block * BLOCK, last * BLOCK);
                startup.store(&reference[from as usize..to as usize], 1, Codec::Zstd);
                hot.push(Extent { block, blocks: last - block, chunk: 0, offset: 0 });
                end = last;
            }
        }
        let mut blobs = HashMap::new();
        for pack in [&pack, &startup] {
            let digest = Digest::of(&pack.bytes);
            writer.blob(&Blob { digest, bytes: pack.bytes.len() as u64, role: pack.role });
            blobs.insert(digest, Bytes::from(pack.bytes.clone()));
        }
        for chunk in &pack.chunks {
            writer.chunk(chunk);
        }
        for extent in extents {
            writer.extent(extent);
        }
        for (chunk, extent) in startup.chunks.iter().zip(hot) {
            let chunk = writer.chunk(chunk);
            writer.startup_extent(Extent { chunk, ..extent });
            writer.startup_order(chunk);
        }
        let index = Index::from_bytes(writer.finish(device_bytes, "raw").unwrap()).unwrap();
        let source = Arc::new(BytesSource { blobs, ..BytesSource::default() });
        Self { map: Map::new(Arc::new(index)), source, reference }
    }

    /// The image's index without its start-up tables; a start of it probably reads the first `likely` chunks.
    pub fn without_startup(&self, likely: u32) -> Arc<Index> {
        let old = self.map.index();
        let mut writer = IndexWriter::new();
        for blob in old.blobs() {
            writer.blob(&blob);
        }
        for chunk in old.chunks() {
            writer.chunk(&chunk);
        }
        for extent in old.extents().iter() {
            writer.extent(extent);
        }
        writer.likely_chunks(likely);
        Arc::new(Index::from_bytes(writer.finish(old.device_bytes(), "raw").unwrap()).unwrap())
    }

    /// The blobs in the index's order.
    pub fn blobs(&self) -> Vec<Blob> {
        self.map.index().blobs().collect()
    }
}
