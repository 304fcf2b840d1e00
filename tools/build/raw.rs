//! A disk image as it is: fixed chunks, holes and zeros left out, nothing looked into.

use std::fs::File;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::limits::Limits;
use super::metadata::DeviceExtent;
use super::pipeline::Pipeline;
use super::progress::{Event, Progress};
use crate::chunk::CHUNK_SIZE;
use crate::error::{Error, Result};
use crate::ext4::BLOCK_SIZE;

const BLOCK: u64 = BLOCK_SIZE as u64;
const CHUNK: u64 = CHUNK_SIZE as u64;

/// A disk image, or a disk.
pub(super) struct Disk {
    name: String,
    file: File,
    bytes: u64,
    device_bytes: u64,
}

impl Disk {
    /// Opens the disk at `path`. Its device has `size` bytes, and without one as many as the file, in whole blocks.
    pub(super) fn open(path: &Path, size: Option<u64>, limits: &Limits) -> Result<Self> {
        let name = path.display().to_string();
        let action = |error| Error::io(format!("reading {name}"), error);
        let file = File::open(path).map_err(action)?;
        let kind = file.metadata().map_err(action)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::invalid("source", format!("{name} is neither a file nor a disk")));
        }
        // A block device's metadata has no length.
        let bytes = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|error| action(error.into()))?;
        if bytes == 0 {
            return Err(Error::invalid("source", format!("{name} is empty")));
        }
        if bytes > limits.file_bytes {
            let reason = format!("{name} has {bytes} bytes, more than {} (limit)", limits.file_bytes);
            return Err(Error::invalid("source", reason));
        }
        let device_bytes = match size {
            Some(size) if size < bytes => {
                return Err(Error::invalid("size", format!("{size} bytes are less than the {bytes} of {name}")));
            }
            size => size.unwrap_or(bytes).next_multiple_of(BLOCK),
        };
        Ok(Self { name, file, bytes, device_bytes })
    }

    /// Bytes of the disk image.
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of the device.
    pub(super) const fn device_bytes(&self) -> u64 {
        self.device_bytes
    }

    /// Cuts the disk into chunks.
    pub(super) fn read(&self, pipeline: &mut Pipeline, progress: &dyn Progress) -> Result<Vec<DeviceExtent>> {
        let mut extents = Vec::new();
        let mut at = 0;
        while let Some(data) = self.next_data(at)? {
            // Chunks begin at multiples of their size, wherever the data does.
            at = (data / CHUNK * CHUNK).max(at);
            let len = (self.bytes - at).min(CHUNK);
            let padded = len.next_multiple_of(BLOCK);
            let mut buffer = pipeline.buffer()?;
            let (content, rest) = buffer.split_at_mut(len as usize);
            rest.fill(0);
            if let Err(error) = self.file.read_exact_at(content, at) {
                pipeline.return_buffer(buffer);
                return Err(Error::io(format!("reading {} at byte {at}", self.name), error));
            }
            let block = u32::try_from(at / BLOCK).map_err(|_| Error::invalid("source", "it is larger than 16 TiB"))?;
            let job = pipeline.submit(buffer, padded as usize)?;
            extents.push(DeviceExtent { block, blocks: (padded / BLOCK) as u32, job, offset: 0 });
            progress.event(Event::Read(len));
            at += len;
        }
        Ok(extents)
    }

    /// Where the next data is, from `at` on.
    fn next_data(&self, at: u64) -> Result<Option<u64>> {
        if at >= self.bytes {
            return Ok(None);
        }
        match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
            // What is written to the end of the file meanwhile is not read.
            Ok(data) => Ok(Some(data).filter(|data| *data < self.bytes)),
            Err(Errno::NXIO) => Ok(None),
            // Who knows of no holes has none.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some(at)),
            Err(error) => Err(Error::io(format!("reading {}", self.name), error.into())),
        }
    }
}
