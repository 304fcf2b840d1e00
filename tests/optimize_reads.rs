//! What an optimized index says a start reads of files and metadata: each is in the chunk that it names, byte for byte, in
//! the order of the stream, and all that was recorded is there. Files are looked up by the kernel.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/built.rs"]
mod built;
#[path = "common/ext4.rs"]
mod ext4;
#[path = "common/nodes.rs"]
mod nodes;
#[path = "common/program.rs"]
mod program;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};

use built::{Layout, shell};
use firstread::chunk::Codec;
use firstread::index::{Index, Place};
use program::Node;
use serde_json::{Value, json};

const BLOCK: usize = 4096;

/// What is recorded: path, first block, blocks. Single blocks, several stretches of one file, a file of several chunks that
/// is hot as a whole, the last block of a file, a file that is hot for the second time, small files of one chunk.
const START: [(&str, u32, u32); 9] = [
    ("/usr/large", 300, 1),
    ("/usr/large", 10, 11),
    ("/usr/whole", 0, 150),
    ("/usr/large", 100, 2),
    ("/etc/two", 0, 2),
    ("/etc/one", 0, 1),
    ("/usr/large", 511, 2),
    ("/usr/large", 12, 3),
    ("/usr/same", 10, 11),
];

/// The plain bytes of a chunk of the index, from the layout.
fn plain(layout: &Layout, index: &Index, number: u32) -> Vec<u8> {
    let chunk = index.chunk(number).unwrap();
    let blob = index.blobs().nth(chunk.blob as usize).unwrap();
    let mut stored = vec![0; chunk.stored_len as usize];
    File::open(layout.blob_path(&blob.digest.to_string())).unwrap().read_exact_at(&mut stored, chunk.offset).unwrap();
    match chunk.codec {
        Codec::Plain => stored,
        Codec::Zstd => zstd::decode_all(&stored[..]).unwrap(),
    }
}

/// A block of a file or device, with zeros behind its end.
fn block(of: &File, number: u32) -> [u8; BLOCK] {
    let (mut bytes, mut len) = ([0; BLOCK], 0);
    while len < BLOCK {
        match of.read_at(&mut bytes[len..], u64::from(number) * BLOCK as u64 + len as u64).unwrap() {
            0 => break,
            read => len += read,
        }
    }
    bytes
}

/// Whether a chunk has the block at one of its own; zeros behind its end are not stored.
fn has(chunk: &[u8], block: &[u8; BLOCK]) -> bool {
    chunk.chunks(BLOCK).any(|own| block.starts_with(own) && block[own.len()..].iter().all(|byte| *byte == 0))
}

/// A node's layout with the image `plain`.
struct Bed {
    node: Node,
    layout: Layout,
    /// Of the device of `plain`.
    device: String,
}

/// Where a start was recorded.
#[derive(Clone, Copy)]
enum Recorded {
    Here,
    Elsewhere,
}

impl Bed {
    fn new() -> Self {
        let node = Node::new();
        shell(
            node.path(),
            "mkdir -p tree/usr tree/etc; cd tree
            head -c 2099000 /dev/urandom > usr/large; head -c 614400 /dev/urandom > usr/whole; cp usr/large usr/same
            seq 4000 | (cd etc; xargs touch); head -c 5000 /dev/urandom > etc/two; head -c 100 /dev/urandom > etc/one; head -c 3000 /dev/urandom > etc/cold",
        );
        let layout = Layout(node.path().join("layout"));
        let mut bed = Self { node, layout, device: String::new() };
        let source = format!("dir:{}", bed.node.path().join("tree").display());
        let built = bed.node.json(&["--quiet", "build", &source, &bed.reference("plain")]);
        let index = Index::from_bytes(bed.layout.index(built["digest"].as_str().unwrap())).unwrap();
        bed.device = index.device_digest().to_string();
        bed
    }

    fn reference(&self, tag: &str) -> String {
        format!("oci:{}:{tag}", self.layout.0.display())
    }

    /// Optimizes `plain` for this start; what is said of it.
    fn optimize(&self, start: &[(&str, u32, u32)], recorded: Recorded, to: &str, more: &[&str]) -> Value {
        let device = match recorded {
            Recorded::Here => &self.device,
            Recorded::Elsewhere => "sha256:0000000000000000000000000000000000000000000000000000000000000000",
        };
        let mut text = json!({
            "firstread_profile": 1, "image": "x", "device": device, "file_system": "ext4", "device_bytes": 4096,
            "seconds": 1, "complete": true,
        })
        .to_string();
        for (path, from, blocks) in start {
            text.push_str(&format!(
                "\n{}",
                json!({"t": 0, "is": "file", "path": path, "from": from, "blocks": blocks})
            ));
        }
        let profile = self.node.path().join("hot");
        fs::write(&profile, text).unwrap();
        let (from, to) = (self.reference("plain"), self.reference(to));
        let all = ["--quiet", "optimize", &from, &to, "--profile", profile.to_str().unwrap()];
        let optimized = self.node.json(&[&all, more].concat());
        assert_eq!(optimized["startup"]["lost_blocks"], 0, "{optimized}");
        optimized
    }

    /// Checks what the image's index says that this start reads.
    fn check(&self, optimized: &Value, start: &[(&str, u32, u32)]) {
        let digest = optimized["digest"].as_str().unwrap();
        let (index, image) = (Index::from_bytes(self.layout.index(digest)).unwrap(), self.node.path().join("device"));
        self.layout.device(digest, &image);
        let mount = ext4::Mount::new(&image, &self.node.path().join("mnt"), "ro");
        let (device, path) = (File::open(&image).unwrap(), |path: &str| mount.dir().join(path.trim_start_matches('/')));
        let inode = |name: &str| u32::try_from(fs::metadata(path(name)).unwrap().ino()).unwrap();
        let files: HashMap<u32, File> = ["/usr/large", "/usr/whole", "/usr/same", "/etc/two", "/etc/one", "/etc/cold"]
            .map(|name| (inode(name), File::open(path(name)).unwrap()))
            .into();

        let turns: HashMap<u32, usize> = index.startup_order().enumerate().map(|(turn, chunk)| (chunk, turn)).collect();
        let (mut found, mut metadata, mut last) = (Vec::new(), BTreeSet::new(), 0);
        for read in index.startup_reads() {
            let turn = turns[&read.chunk];
            assert!(turn >= last, "{read:?} is out of order");
            last = turn;
            let chunk = plain(&self.layout, &index, read.chunk);
            for number in read.first..read.first + read.blocks {
                let bytes = match read.place {
                    Place::File { inode } => {
                        found.push((inode, number));
                        block(&files[&inode], number)
                    }
                    Place::Device => {
                        metadata.insert(read.chunk);
                        block(&device, number)
                    }
                };
                assert!(has(&chunk, &bytes), "block {number} of {read:?} is not in its chunk");
            }
        }
        let expected: BTreeSet<(u32, u32)> = start
            .iter()
            .flat_map(|(name, from, blocks)| (*from..from + blocks).map(|block| (inode(name), block)))
            .collect();
        assert_eq!(found.len(), expected.len(), "none is there twice: {found:?}");
        assert_eq!(found.into_iter().collect::<BTreeSet<_>>(), expected);
        // The inodes of all the files beside are in chunks of their own.
        let all = optimized["startup"]["metadata_chunks"].as_u64().unwrap();
        assert!((2..all).contains(&(metadata.len() as u64)), "{} of {all} chunks of metadata", metadata.len());
        // A stretch of a file in one chunk is one read.
        let whole = Place::File { inode: inode("/usr/whole") };
        let reads: Vec<_> = index.startup_reads().filter(|read| read.place == whole).collect();
        assert!(reads.len() <= 4, "{reads:?}");
    }
}

#[test]
fn start_up_reads_are_in_their_chunks_in_order_and_complete() {
    let bed = Bed::new();
    let optimized = bed.optimize(&START, Recorded::Here, "fast", &[]);
    bed.check(&optimized, &START);
    // With chunks of that image, for a start that reads more.
    let more = [&START[..], &[("/usr/large", 20, 5), ("/usr/same", 200, 3)]].concat();
    let reused = bed.optimize(&more, Recorded::Here, "faster", &["--reuse", &bed.reference("fast")]);
    assert!(reused["startup"]["kept_chunks"].as_u64() > Some(0), "{reused}");
    bed.check(&reused, &more);
}

#[test]
fn of_a_large_file_that_changed_the_blocks_beside_are_hot_as_well() {
    let bed = Bed::new();
    let start = [
        ("/usr/large", 1, 1),
        ("/usr/large", 300, 2),
        ("/usr/large", 511, 1),
        ("/usr/whole", 9, 1),
        ("/etc/two", 0, 1),
    ];
    // An earlier version in which all files are others.
    shell(bed.node.path(), "mkdir other; head -c 9000 /dev/urandom > other/file");
    let other = format!("dir:{}", bed.node.path().join("other").display());
    bed.node.done(&["build", &other, &bed.reference("other"), "--quiet"]);
    let changed = bed.optimize(&start, Recorded::Elsewhere, "changed", &["--reuse", &bed.reference("other")]);
    // The last block of `large` is in a chunk of which nothing else is hot.
    let wider = [
        ("/usr/large", 0, 4),
        ("/usr/large", 298, 6),
        ("/usr/large", 509, 3),
        ("/usr/whole", 7, 5),
        ("/etc/two", 0, 1),
    ];
    bed.check(&changed, &wider);

    // What did not change is read as it was, and where nobody says what did, everything is. What was recorded is in the same
    // chunks each time.
    let unchanged = bed.optimize(&start, Recorded::Elsewhere, "unchanged", &["--reuse", &bed.reference("plain")]);
    let unknown = bed.optimize(&start, Recorded::Elsewhere, "unknown", &[]);
    let chunks = |optimized: &Value| {
        let index = Index::from_bytes(bed.layout.index(optimized["digest"].as_str().unwrap())).unwrap();
        index.startup_order().map(|number| index.chunk(number).unwrap().digest).collect::<HashSet<_>>()
    };
    for optimized in [&unchanged, &unknown] {
        bed.check(optimized, &start);
        assert!(chunks(optimized).is_subset(&chunks(&changed)));
    }
}
