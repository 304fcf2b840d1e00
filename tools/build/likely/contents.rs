//! Reading what files hold while their contents are in the intake's spools already.

use std::cell::Cell;
use std::collections::HashMap;

use futures_util::StreamExt as _;
use tokio::runtime::Handle;

use crate::build::intake::{SmallFiles, pieces};
use crate::build::pipeline::{Pipeline, Place};
use crate::build::reuse::Earlier;
use crate::build::rootfs::{Content, Kind, NodeId, Rootfs};
use crate::chunk::{CHUNK_SIZE, ChunkRef, Digest};
use crate::error::{Error, Result};
use crate::ext4::BLOCK_SIZE;
use crate::source::Source as _;

const BLOCK: u64 = BLOCK_SIZE as u64;

/// Most plain bytes that are inflated: files may be made to need many.
const INFLATED: u64 = 1 << 30;

/// Where contents are read. All jobs of the pipeline are done.
pub(in crate::build) struct Contents<'a> {
    pub(super) rootfs: &'a Rootfs,
    pub(super) pipeline: &'a Pipeline,
    small: &'a SmallFiles,
    earlier: &'a [Earlier],
    runtime: &'a Handle,
    /// Plain bytes that may still be inflated; afterwards every piece is zeros.
    left: Cell<u64>,
}

/// Plain bytes of the chunks of one file that were read, by job: each is inflated once.
#[derive(Default)]
pub(super) struct Opened(HashMap<u32, Vec<u8>>);

/// Chunks of a file that are kept at a time.
const KEPT: usize = 8;

impl<'a> Contents<'a> {
    pub(in crate::build) const fn new(
        rootfs: &'a Rootfs,
        pipeline: &'a Pipeline,
        small: &'a SmallFiles,
        earlier: &'a [Earlier],
        runtime: &'a Handle,
    ) -> Self {
        Self { rootfs, pipeline, small, earlier, runtime, left: Cell::new(INFLATED) }
    }

    /// Length of a file in bytes; 0 for anything else.
    pub(super) fn len(&self, node: NodeId) -> u64 {
        match self.rootfs.node(node).map(|node| &node.kind) {
            Ok(Kind::File(Content::Small { bytes, .. })) => u64::from(*bytes),
            Ok(Kind::File(Content::Large { bytes, .. })) => *bytes,
            _ => 0,
        }
    }

    /// At most `len` bytes of a file from `offset` on: fewer at its end, none of what is no file.
    pub(super) fn read(&self, node: NodeId, offset: u64, len: u64, opened: &mut Opened) -> Result<Vec<u8>> {
        let end = offset.saturating_add(len).min(self.len(node));
        let Some(len) = end.checked_sub(offset).filter(|len| *len > 0) else { return Ok(Vec::new()) };
        let mut bytes = vec![0; len as usize];
        match &self.rootfs.node(node)?.kind {
            Kind::File(Content::Small { offset: start, .. }) => self.small.read(start + offset, &mut bytes)?,
            Kind::File(Content::Large { runs, .. }) => {
                for run in runs {
                    for (number, (block, blocks)) in pieces(run.segment).enumerate() {
                        let start = u64::from(block) * BLOCK;
                        let (from, to) = (start.max(offset), (start + u64::from(blocks) * BLOCK).min(end));
                        if from < to {
                            let plain = self.piece(run.job + number as u32, opened)?;
                            let found = plain.get((from - start) as usize..(to - start) as usize);
                            let place = bytes.get_mut((from - offset) as usize..(to - offset) as usize);
                            // A piece of zeros has no bytes.
                            if let (Some(found), Some(place)) = (found, place) {
                                place.copy_from_slice(found);
                            }
                        }
                    }
                }
            }
            _ => {}
        }
        Ok(bytes)
    }

    fn piece<'o>(&self, job: u32, opened: &'o mut Opened) -> Result<&'o [u8]> {
        if !opened.0.contains_key(&job) {
            if opened.0.len() >= KEPT {
                opened.0.clear();
            }
            let plain = match self.pipeline.stored(job)? {
                None => Vec::new(),
                Some((_, plain_len, _)) if u64::from(plain_len) > self.left.get() => Vec::new(),
                Some((digest, plain_len, place)) => {
                    self.left.set(self.left.get() - u64::from(plain_len));
                    let stored = match place {
                        Place::Spool { offset, len } => self.pipeline.read(offset, len)?,
                        Place::Reused { image, chunk } => self.fetch(image, &chunk)?,
                    };
                    let plain = zstd::bulk::decompress(&stored, plain_len.min(CHUNK_SIZE) as usize)
                        .map_err(|error| Error::io(format!("inflating chunk {digest}"), error))?;
                    if Digest::of(&plain) != digest {
                        return Err(Error::invalid("chunk", format!("it does not hash to {digest}")));
                    }
                    plain
                }
            };
            opened.0.insert(job, plain);
        }
        Ok(opened.0.get(&job).map(Vec::as_slice).unwrap_or_default())
    }

    /// The stored bytes of a chunk of an earlier image.
    fn fetch(&self, image: usize, chunk: &ChunkRef) -> Result<Vec<u8>> {
        let missing = || Error::invalid("build", "a reused pack is missing");
        let earlier = self.earlier.get(image).ok_or_else(missing)?;
        let (blob, _) = earlier.packs.get(chunk.blob as usize).ok_or_else(missing)?;
        self.runtime.block_on(async {
            let mut body = earlier.repository.read_at(blob, chunk.offset, chunk.stored_len.into()).await?;
            let mut stored = Vec::new();
            while let Some(piece) = body.next().await {
                stored.extend_from_slice(&piece?);
            }
            Ok(stored)
        })
    }
}
