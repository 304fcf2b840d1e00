//! Packs and whole images for tests.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashMap;

use firstread::chunk::{ChunkRef, Codec, Digest};
use firstread::index::{Blob, Extent, IndexWriter, Role};
use firstread::oci::{annotation, canonical_json, media_type};
use firstread::source::{Content, Publish, Repository};
use oci_spec::image::{Descriptor, MediaType};

/// A blob of chunks and what they hold.
pub struct Pack {
    pub stored: Vec<u8>,
    pub chunks: Vec<ChunkRef>,
    pub plain: Vec<Vec<u8>>,
}

impl Pack {
    /// `count` zstd chunks of `len` plain bytes, behind one another, the first one at `start`; what is in them depends
    /// on `seed`.
    pub fn new(seed: u64, count: usize, len: usize, start: usize) -> Self {
        let mut stored = vec![0xee; start];
        let (mut chunks, mut plain) = (Vec::new(), Vec::new());
        for number in 0..count {
            let bytes = content(seed * 1000 + number as u64, len);
            let frame = zstd::bulk::compress(&bytes, 1).unwrap();
            chunks.push(ChunkRef {
                digest: Digest::of(&bytes),
                blob: 0,
                offset: stored.len() as u64,
                stored_len: frame.len() as u32,
                plain_len: len as u32,
                codec: Codec::Zstd,
            });
            stored.extend_from_slice(&frame);
            plain.push(bytes);
        }
        Self { stored, chunks, plain }
    }

    pub fn digest(&self) -> Digest {
        Digest::of(&self.stored)
    }

    pub fn blob(&self) -> Blob {
        Blob { digest: self.digest(), bytes: self.stored.len() as u64, role: Role::Pack }
    }
}

/// Bytes that are half noise, so that they compress a little.
pub fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|at| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            if at % 2 == 0 { (state >> 32) as u8 } else { 0 }
        })
        .collect()
}

/// A layer's tar with one file, header and trailer as frames of their own.
pub fn layer(path: &str, file: &[u8], frames: &[u8]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::Directory);
    header.set_mode(0o755);
    header.set_size(0);
    tar.append_data(&mut header, ".firstread/", &[][..]).unwrap();
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o644);
    header.set_size(file.len() as u64);
    tar.append_data(&mut header, path, file).unwrap();
    let plain = tar.into_inner().unwrap();
    let start = plain.len() - (file.len().next_multiple_of(512)) - 1024;
    let mut stored = zstd::bulk::compress(&plain[..start], 1).unwrap();
    stored.extend_from_slice(frames);
    stored.extend_from_slice(&zstd::bulk::compress(&plain[start + file.len()..], 1).unwrap());
    stored
}

/// A firstread image in memory: a device whose blocks are the chunks of one pack.
pub struct TestImage {
    pub blobs: HashMap<Digest, Vec<u8>>,
    pub manifest: Vec<u8>,
    pub plain: Vec<Vec<u8>>,
    pub chunks: Vec<ChunkRef>,
    pub pack: Digest,
    pub index: Vec<u8>,
    pub index_layer: Digest,
}

/// What to falsify in [`TestImage::build`].
#[derive(Clone, Copy, Default)]
pub struct Lies {
    pub index_bytes: i64,
    pub foreign_blob: bool,
    pub no_annotations: bool,
    pub other_index: bool,
    pub path: Option<&'static str>,
}

impl TestImage {
    pub fn build(seed: u64, count: usize, len: usize, lies: Lies) -> Self {
        let pack = Pack::new(seed, count, len, 0);
        let joined = pack.plain.concat();
        let start = layer(".firstread/pack/0", &joined, &[]).len() - layer_tail(&joined);
        let pack_layer = layer(".firstread/pack/0", &joined, &pack.stored);
        let pack_digest = Digest::of(&pack_layer);
        let chunks: Vec<ChunkRef> =
            pack.chunks.iter().map(|chunk| ChunkRef { offset: chunk.offset + start as u64, ..*chunk }).collect();
        let mut writer = IndexWriter::new();
        let named = if lies.foreign_blob { Digest::of(b"foreign") } else { pack_digest };
        writer.blob(&Blob { digest: named, bytes: pack_layer.len() as u64, role: Role::Pack });
        let blocks = (len / 4096) as u32;
        for (number, chunk) in chunks.iter().enumerate() {
            let chunk = writer.chunk(chunk);
            writer.extent(Extent { block: number as u32 * blocks, blocks, chunk, offset: 0 });
        }
        let index = writer.finish((count * len) as u64, "ext4").unwrap();
        let index_layer =
            layer(lies.path.unwrap_or(".firstread/index"), &index, &zstd::bulk::compress(&index, 1).unwrap());
        let index_layer_digest = Digest::of(&index_layer);
        let config = canonical_json(&serde_json::json!({
            "architecture": "amd64", "os": "linux",
            "config": {"Env": ["A=b"], "Cmd": ["sh"], "WorkingDir": "/srv", "Volumes": null},
            "rootfs": {"type": "layers", "diff_ids": []},
        }))
        .unwrap();
        let config_digest = Digest::of(&config);
        let index_digest = if lies.other_index { Digest::of(b"another") } else { Digest::of(&index) };
        let layers = [
            descriptor(media_type::LAYER_ZSTD, &pack_digest, pack_layer.len(), annotations("pack", &pack_digest), lies),
            descriptor(
                media_type::LAYER_ZSTD,
                &index_layer_digest,
                index_layer.len(),
                [
                    annotations("index", &index_layer_digest),
                    vec![
                        (annotation::INDEX_DIGEST, index_digest.to_string()),
                        (annotation::INDEX_BYTES, (index.len() as i64 + lies.index_bytes).to_string()),
                    ],
                ]
                .concat(),
                lies,
            ),
        ];
        let config_descriptor = descriptor(media_type::CONFIG, &config_digest, config.len(), vec![], lies);
        let manifest = canonical_json(&serde_json::json!({
            "schemaVersion": 2, "mediaType": media_type::MANIFEST, "config": config_descriptor, "layers": layers,
        }))
        .unwrap();
        let blobs = [(pack_digest, pack_layer), (index_layer_digest, index_layer), (config_digest, config)].into();
        Self { blobs, manifest, plain: pack.plain, chunks, pack: pack_digest, index, index_layer: index_layer_digest }
    }

    /// Pushes everything and publishes it by the repository's name.
    pub async fn push(&self, repository: &Repository) -> Digest {
        for (digest, bytes) in &self.blobs {
            let content = Content::Bytes(bytes.clone().into());
            repository.push_blob(digest, bytes.len() as u64, &content).await.unwrap();
        }
        repository.push_manifest(&self.manifest, media_type::MANIFEST, Publish::Named).await.unwrap()
    }
}

fn layer_tail(file: &[u8]) -> usize {
    let padding = file.len().next_multiple_of(512) - file.len() + 1024;
    zstd::bulk::compress(&vec![0; padding], 1).unwrap().len()
}

fn annotations(role: &str, digest: &Digest) -> Vec<(&'static str, String)> {
    vec![
        (annotation::ROLE, role.to_owned()),
        (annotation::VERSION, annotation::VERSION_1.to_owned()),
        (annotation::DIGEST, digest.to_string()),
    ]
}

fn descriptor(kind: &str, digest: &Digest, len: usize, annotations: Vec<(&str, String)>, lies: Lies) -> Descriptor {
    let digest: oci_spec::image::Digest = digest.to_string().parse().unwrap();
    let mut descriptor = Descriptor::new(MediaType::from(kind), len as u64, digest);
    if !lies.no_annotations && !annotations.is_empty() {
        let map = annotations.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        descriptor.set_annotations(Some(map));
    }
    descriptor
}
