//! What sharing saves: the chunks of several images that the pool has once.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::chunk::{ChunkRef, Digest};
use crate::pool::{Pool, room};

/// What the images in use have in common. Bytes as the pool counts them: each chunk rounded up to 4096.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sharing {
    /// Bytes of local chunks that the images need, each image by itself.
    pub referenced_bytes: u64,
    /// Bytes that the pool holds for them.
    pub held_bytes: u64,
    /// The difference.
    pub saved_bytes: u64,
}

/// What an image in use has in the pool. Bytes as in [`Sharing`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageShare {
    /// Its reference.
    pub image: String,
    /// Digest of its manifest.
    pub digest: String,
    /// Whether it is attached or exported.
    pub open: bool,
    /// Whether it, or its start-up set, is pinned.
    pub pinned: bool,
    /// Chunks that it has.
    pub chunks: u64,
    /// Bytes of these.
    pub bytes: u64,
    /// Bytes of those that are local.
    pub local_bytes: u64,
    /// Of these, what no other image in use needs.
    pub unique_bytes: u64,
    /// Of these, what others need as well.
    pub shared_bytes: u64,
}

/// A local chunk: the first image that needs it, the last one that was counted, and how many do.
struct Seen {
    first: u32,
    last: u32,
    images: u32,
}

/// Adds images up, one after the other.
#[derive(Default)]
pub struct Count {
    /// By the first 8 bytes of the digest: who makes two chunks agree in these makes a wrong statistic of his own image.
    seen: HashMap<u64, Seen>,
    images: Vec<ImageShare>,
    sharing: Sharing,
}

impl Count {
    /// Adds an image: `image` says what it is, its numbers are counted here.
    pub fn add(&mut self, mut image: ImageShare, chunks: impl Iterator<Item = ChunkRef>, pool: &Pool) {
        let number = self.images.len() as u32;
        for chunk in chunks {
            let bytes = room(chunk.plain_len);
            image.chunks += 1;
            image.bytes += bytes;
            if !pool.contains(&chunk.digest) {
                continue;
            }
            let seen = self.seen.entry(key(&chunk.digest)).or_insert(Seen { first: number, last: number, images: 0 });
            if seen.images > 0 && seen.last == number {
                // The image has it twice.
                continue;
            }
            seen.last = number;
            seen.images += 1;
            self.sharing.referenced_bytes += bytes;
            image.local_bytes += bytes;
            match seen.images {
                1 => {
                    self.sharing.held_bytes += bytes;
                    image.unique_bytes += bytes;
                    continue;
                }
                2 => {
                    if let Some(first) = self.images.get_mut(seen.first as usize) {
                        first.unique_bytes -= bytes;
                        first.shared_bytes += bytes;
                    }
                }
                _ => {}
            }
            image.shared_bytes += bytes;
        }
        self.images.push(image);
    }

    /// The sum, and each image.
    #[must_use]
    pub fn finish(mut self) -> (Sharing, Vec<ImageShare>) {
        self.sharing.saved_bytes = self.sharing.referenced_bytes - self.sharing.held_bytes;
        (self.sharing, self.images)
    }
}

fn key(digest: &Digest) -> u64 {
    digest.as_bytes().iter().take(8).fold(0, |key, &byte| key << 8 | u64::from(byte))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::chunk::{Codec, verify};
    use crate::pool::PoolOptions;

    #[test]
    fn what_images_have_in_common_is_counted_once() {
        let dir = tempfile::tempdir().unwrap();
        let pool = Pool::open(dir.path(), &PoolOptions::default()).unwrap();
        let chunk = |number: u8| {
            let bytes = vec![number; 5000];
            let digest = Digest::of(&bytes);
            // Number 9 is not local.
            if number != 9 {
                pool.admit(&verify(&digest, bytes).unwrap());
            }
            ChunkRef { digest, blob: 0, offset: 0, stored_len: 1, plain_len: 5000, codec: Codec::Zstd }
        };
        let mut count = Count::default();
        for chunks in [&[1, 2, 2, 9][..], &[2, 3, 9], &[2, 3, 4]] {
            count.add(ImageShare::default(), chunks.iter().map(|&number| chunk(number)), &pool);
        }
        let (sharing, images) = count.finish();
        let share = |image: &ImageShare| [image.bytes, image.local_bytes, image.unique_bytes, image.shared_bytes];
        let found: Vec<_> = images.iter().map(|image| share(image).map(|bytes| bytes / 8192)).collect();
        assert_eq!(found, [[4, 2, 1, 1], [3, 2, 0, 2], [3, 3, 1, 2]]);
        let all = [sharing.referenced_bytes, sharing.held_bytes, sharing.saved_bytes];
        assert_eq!(all.map(|bytes| bytes / 8192), [7, 4, 3]);
        assert_eq!(sharing.held_bytes, pool.stat().bytes);
    }
}
