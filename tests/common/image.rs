//! A firstread image made by hand: a disk file, cut into fixed chunks, in an OCI layout.
#![allow(dead_code)] // No test uses all of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use firstread::chunk::{ChunkRef, Codec, Digest};
use firstread::index::{BLOCK, Blob, Extent, Index, IndexWriter, Role};
use serde_json::{Value, json};

const CHUNK: usize = 256 << 10;
const PREFIX: &str = "containerd.io/snapshot/firstread";

/// An image in a layout, and what it was made from.
pub struct Image {
    /// The layout.
    pub layout: PathBuf,
    /// The disk.
    pub disk: PathBuf,
    /// The tree in the disk.
    pub tree: PathBuf,
    /// The blob with the chunks.
    pub pack: PathBuf,
    /// Its description.
    pub index: Arc<Index>,
}

impl Image {
    /// How verbs name it.
    pub fn reference(&self) -> String {
        format!("oci:{}", self.layout.display())
    }

    /// Changes a stored byte of the chunk with this number.
    pub fn damage(&self, chunk: u32) -> ChunkRef {
        let chunk = self.index.chunk(chunk).unwrap();
        let mut bytes = fs::read(&self.pack).unwrap();
        let at = chunk.offset as usize + chunk.stored_len as usize / 2;
        bytes[at] ^= 0x55;
        fs::write(&self.pack, bytes).unwrap();
        chunk
    }
}

/// Makes an image called `name` in `dir`: an ext4 file system with some directories and `files` files of random bytes.
pub fn make(dir: &Path, name: &str, files: usize) -> Image {
    let tree = dir.join(format!("{name}-tree"));
    let mut random = 0x9e37_79b9_7f4a_7c15u64 ^ files as u64;
    for number in 0..files {
        let parent = tree.join(format!("d{}", number % 4));
        fs::create_dir_all(&parent).unwrap();
        let len = 1 + (number * 377_777) % 900_000;
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            bytes.extend_from_slice(&random.to_le_bytes());
        }
        bytes.truncate(len);
        fs::write(parent.join(format!("f{number}")), bytes).unwrap();
    }
    let disk = dir.join(format!("{name}.img"));
    let made = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-b", "4096", "-O", "^has_journal", "-E", "lazy_itable_init=0", "-d"])
        .arg(&tree)
        .arg(&disk)
        .arg(format!("{}k", 8192 + files * 900))
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    pack(dir, name, disk, tree)
}

fn pack(dir: &Path, name: &str, disk: PathBuf, tree: PathBuf) -> Image {
    let bytes = fs::read(&disk).unwrap();
    let mut writer = IndexWriter::new();
    let mut blob = tar_header(".firstread/pack/one", 0);
    let mut chunks = Vec::new();
    for (number, plain) in bytes.chunks(CHUNK).enumerate() {
        if plain.iter().all(|&byte| byte == 0) {
            continue;
        }
        let stored = zstd::bulk::compress(plain, 1).unwrap();
        chunks.push((number, Digest::of(plain), blob.len(), stored.len(), plain.len()));
        blob.extend_from_slice(&stored);
    }
    let layout = dir.join(name);
    fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    let put = |bytes: &[u8]| {
        let digest = Digest::of(bytes);
        fs::write(layout.join("blobs/sha256").join(digest.hex()), bytes).unwrap();
        digest
    };
    let pack_digest = put(&blob);
    let place = Blob { digest: pack_digest, bytes: blob.len() as u64, role: Role::Pack };
    let place = writer.blob(&place);
    for (number, digest, offset, stored, plain) in chunks {
        let chunk = writer.chunk(&ChunkRef {
            digest,
            blob: place,
            offset: offset as u64,
            stored_len: stored as u32,
            plain_len: plain as u32,
            codec: Codec::Zstd,
        });
        let blocks = (plain / BLOCK as usize) as u32;
        writer.extent(Extent { block: (number * CHUNK / BLOCK as usize) as u32, blocks, chunk, offset: 0 });
    }
    let index = writer.finish(bytes.len() as u64, "ext4").unwrap();
    let mut tar = tar_header(".firstread/index", index.len());
    tar.extend_from_slice(&zstd::bulk::compress(&index, 1).unwrap());
    let trailer = vec![0; index.len().next_multiple_of(512) - index.len() + 1024];
    tar.extend_from_slice(&zstd::bulk::compress(&trailer, 1).unwrap());
    let index_layer = put(&tar);

    let config = serde_json::to_vec(&json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [pack_digest.to_string(), index_layer.to_string()]},
    }))
    .unwrap();
    let config_digest = put(&config);
    let layer = |digest: Digest, bytes: usize, role: &str| {
        let mut annotations = serde_json::Map::new();
        for (key, value) in [("role", role.to_owned()), ("version", "1".to_owned()), ("digest", digest.to_string())] {
            annotations.insert(format!("{PREFIX}/{key}"), Value::String(value));
        }
        json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar+zstd",
            "digest": digest.to_string(), "size": bytes, "annotations": annotations,
        })
    };
    let mut last = layer(index_layer, tar.len(), "index");
    last["annotations"][format!("{PREFIX}/index-digest")] = json!(Digest::of(&index).to_string());
    last["annotations"][format!("{PREFIX}/index-bytes")] = json!(index.len().to_string());
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config_digest.to_string(), "size": config.len()},
        "layers": [layer(pack_digest, blob.len(), "pack"), last],
    }))
    .unwrap();
    let manifest_digest = put(&manifest);
    let top = json!({"schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": manifest_digest.to_string(), "size": manifest.len(),
    }]});
    fs::write(layout.join("index.json"), top.to_string()).unwrap();
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let index = Arc::new(Index::from_bytes(index).unwrap());
    Image { pack: layout.join("blobs/sha256").join(pack_digest.hex()), layout, disk, tree, index }
}

/// One zstd frame with the ustar headers of two directories and a file (POSIX.1-2017, pax, "ustar Interchange Format").
fn tar_header(path: &str, bytes: usize) -> Vec<u8> {
    let mut plain = Vec::new();
    let mut header = |path: &str, kind: u8, bytes: usize| {
        let mut block = [0u8; 512];
        let mut put = |at: usize, text: &str| block[at..at + text.len()].copy_from_slice(text.as_bytes());
        put(0, path);
        put(100, "0000644\0");
        put(108, "0000000\0");
        put(116, "0000000\0");
        put(124, &format!("{bytes:011o}\0"));
        put(136, "00000000000\0");
        put(148, "        ");
        put(257, "ustar\0");
        put(263, "00");
        block[156] = kind;
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        plain.extend_from_slice(&block);
    };
    header(".firstread/", b'5', 0);
    if path.contains("/pack/") {
        header(".firstread/pack/", b'5', 0);
    }
    header(path, b'0', bytes);
    zstd::bulk::compress(&plain, 1).unwrap()
}
