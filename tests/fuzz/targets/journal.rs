//! Any log in a journal, and hostile structures around it: an error, or what the kernel's replay makes of it.
#![no_main]

mod input;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::OnceLock;

use firstread::Error;
use firstread::ext4::{Addition, BLOCK_SIZE, Inode, Kind, Options, Settled, Time, Tree, add_journal, plan, settle};
use input::Input;
use libfuzzer_sys::fuzz_target;

const MAGIC: u32 = 0xc03b_3998;
const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const REVOKE: u32 = 5;
/// Where things are in block 0, in the first group's descriptor, in the journal's inode, in its superblock.
const SUPERBLOCK: usize = 1024;
const RECOVER: usize = SUPERBLOCK + 0x60;
const INODE: usize = 7 * 256;

type Block = [u8; BLOCK_SIZE];
type Blocks = HashMap<u32, Block>;

/// A file system with an empty journal.
struct Base {
    len: u32,
    /// The end of what the writer's own structures have.
    metadata: u32,
    place: Vec<u32>,
    blocks: Blocks,
}

impl Base {
    fn new(len: u32) -> Self {
        let root = Inode {
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime: Time { secs: 1, nanos: 0 },
            xattrs: Vec::new().into(),
            kind: Kind::Directory(Vec::new()),
        };
        let tree = Tree::new(root);
        let size = Some(u64::from(len) * BLOCK_SIZE as u64);
        let plan = plan(&tree, &Options { size, ..Options::default() }).unwrap();
        let mut blocks = Blocks::new();
        let written = plan.write_metadata(&tree, &mut |first, bytes| {
            blocks.extend((first as u32..).zip(bytes.as_chunks::<BLOCK_SIZE>().0.iter().copied()));
            Ok(())
        });
        written.unwrap();
        let Addition::Adds(journal) = add_journal(&mut |at, buf| read(&blocks, len, at, buf)).unwrap() else {
            panic!()
        };
        blocks.extend(journal.first.iter().chain(&journal.then).copied());
        blocks.insert(0, *journal.superblock);
        let place = journal.place.into_iter().flat_map(Range::into_iter).collect();
        Self { len, metadata: plan.metadata_blocks(), place, blocks }
    }

    /// Whether a block is one of those in front, or has a bitmap.
    fn is_structure(&self, block: u32) -> bool {
        block < self.metadata || (0..3).any(|group| word(&self.blocks[&1], 32 * group) == block)
    }
}

/// Nobody may read behind the end.
fn read(blocks: &Blocks, len: u32, first: u32, buf: &mut [u8]) -> firstread::Result<()> {
    for (number, place) in (first..).zip(buf.as_chunks_mut::<BLOCK_SIZE>().0) {
        assert!(number < len, "block {number} of {len}");
        *place = blocks.get(&number).copied().unwrap_or([0; BLOCK_SIZE]);
    }
    Ok(())
}

impl Input<'_> {
    /// A block that the log is about: mostly one of a few that nothing is in.
    fn block(&mut self, base: &Base) -> u32 {
        match self.byte() {
            few @ 0..230 => base.metadata + u32::from(few) % 16,
            240.. => u32::from_le_bytes(self.bytes()),
            _ => u32::from(u16::from_le_bytes(self.bytes())) % base.len,
        }
    }
}

/// A log that is being written.
struct Log<'a> {
    base: &'a Base,
    blocks: Blocks,
    seed: u32,
    sequence: u32,
    /// In the journal.
    next: u32,
    written: usize,
    /// What a transaction has, as it was written: its blocks, and those that it revokes.
    open: (Vec<(u32, Block)>, Vec<u32>),
    complete: Vec<(Vec<(u32, Block)>, Vec<u32>)>,
}

impl Log<'_> {
    fn push(&mut self, block: Block) {
        self.blocks.insert(self.base.place[self.next as usize], block);
        self.next = if self.next as usize + 1 == self.base.place.len() { 1 } else { self.next + 1 };
        self.written += 1;
    }

    fn control(&self, kind: u32) -> Block {
        let mut block = [0; BLOCK_SIZE];
        let words = [MAGIC, kind, self.sequence];
        words.iter().enumerate().for_each(|(number, word)| put(&mut block, number * 4, &word.to_be_bytes()));
        block
    }

    fn descriptor(&mut self, input: &mut Input<'_>) {
        let mut block = self.control(DESCRIPTOR);
        let (count, mut at, mut data) = (1 + input.byte() % 5, 12, Vec::new());
        for number in 1..=count {
            let (target, decision) = (input.block(self.base), input.byte());
            // Data that begin like the journal's own blocks do so without their first bytes.
            let is_escaped = decision & 0x40 != 0;
            let plain = [decision; BLOCK_SIZE];
            let mut stored = plain;
            let mut meant = plain;
            if is_escaped {
                put(&mut stored, 0, &[0; 4]);
                put(&mut meant, 0, &MAGIC.to_be_bytes());
            }
            let has_uuid = decision & 0x80 != 0;
            let flags = u32::from(is_escaped) | if has_uuid { 0 } else { 2 } | if number == count { 8 } else { 0 };
            let sum = crc(crc(self.seed, &self.sequence.to_be_bytes()), &stored);
            let words = [target, flags, 0, sum];
            words.iter().enumerate().for_each(|(number, word)| put(&mut block, at + number * 4, &word.to_be_bytes()));
            at += 16 + if has_uuid { 16 } else { 0 };
            data.push(stored);
            self.open.0.push((target, meant));
        }
        seal(&mut block, self.seed, BLOCK_SIZE - 4);
        self.push(block);
        data.into_iter().for_each(|block| self.push(block));
    }

    fn revoke(&mut self, input: &mut Input<'_>) {
        let mut block = self.control(REVOKE);
        let count = usize::from(input.byte() % 4);
        put(&mut block, 12, &(16 + 4 * count as u32).to_be_bytes());
        for number in 0..count {
            let target = input.block(self.base);
            put(&mut block, 16 + 4 * number, &target.to_be_bytes());
            self.open.1.push(target);
        }
        seal(&mut block, self.seed, BLOCK_SIZE - 4);
        self.push(block);
    }

    /// Only the first sectors of its block may be the new ones.
    fn commit(&mut self, sectors: usize) {
        let mut block = self.control(COMMIT);
        seal(&mut block, self.seed, 16);
        block[sectors * 512..].fill(0xaa);
        self.push(block);
        self.sequence = self.sequence.wrapping_add(1);
        self.complete.push(std::mem::take(&mut self.open));
    }

    /// What jbd2 makes of it, in its own passes (`fs/jbd2/recovery.c`).
    fn replayed(&self) -> Replay {
        let mut revoked = HashMap::new();
        for (number, (_, blocks)) in self.complete.iter().enumerate() {
            revoked.extend(blocks.iter().map(|block| (*block, number)));
        }
        let all = || self.complete.iter().flat_map(|(blocks, _)| blocks.iter().map(|(block, _)| *block));
        if all().any(|block| block >= self.base.len || self.base.place.contains(&block)) {
            return Replay::Refused;
        }
        if all().any(|block| self.base.is_structure(block)) {
            return Replay::Any;
        }
        let mut replayed = self.base.blocks.clone();
        for (number, (blocks, _)) in self.complete.iter().enumerate() {
            let remain = blocks.iter().filter(|(block, _)| revoked.get(block).is_none_or(|last| *last < number));
            replayed.extend(remain.copied());
        }
        Replay::Brings(replayed)
    }
}

/// What is to become of a log.
enum Replay {
    /// It is an error.
    Refused,
    /// It writes to the structures themselves: who knows.
    Any,
    /// These blocks, the structures not counted.
    Brings(Blocks),
}

fn put(block: &mut Block, at: usize, bytes: &[u8]) {
    block[at..at + bytes.len()].copy_from_slice(bytes);
}

fn word(block: &Block, at: usize) -> u32 {
    u32::from_le_bytes(block[at..at + 4].try_into().unwrap())
}

fn crc(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}

/// The checksum of a block of the journal.
fn seal(block: &mut Block, seed: u32, at: usize) {
    put(block, at, &[0; 4]);
    let sum = crc(seed, block);
    put(block, at, &sum.to_be_bytes());
}

/// The checksums that the structures should have.
fn seal_all(blocks: &mut Blocks, log: u32) {
    let mut first = blocks[&0];
    let seed = crc(!0, &first[SUPERBLOCK + 0x68..SUPERBLOCK + 0x78]);
    let sum = crc(!0, &first[SUPERBLOCK..SUPERBLOCK + 0x3fc]);
    put(&mut first, SUPERBLOCK + 0x3fc, &sum.to_le_bytes());
    blocks.insert(0, first);
    let mut table = blocks[&1];
    let (bitmap, inodes) = (word(&table, 0), word(&table, 8));
    if let Some(bitmap) = blocks.get(&bitmap) {
        put(&mut table, 0x18, &(crc(seed, bitmap) as u16).to_le_bytes());
    }
    for group in 0..3 {
        let at = 32 * group;
        put(&mut table, at + 0x1e, &[0; 2]);
        let sum = crc(crc(seed, &(group as u32).to_le_bytes()), &table[at..at + 32]);
        put(&mut table, at + 0x1e, &(sum as u16).to_le_bytes());
    }
    blocks.insert(1, table);
    if let Some(block) = blocks.get_mut(&inodes) {
        put(block, INODE + 0x7c, &[0; 2]);
        put(block, INODE + 0x82, &[0; 2]);
        let sum = crc(crc(crc(seed, &8u32.to_le_bytes()), &[0; 4]), &block[INODE..INODE + 256]);
        put(block, INODE + 0x7c, &(sum as u16).to_le_bytes());
        put(block, INODE + 0x82, &((sum >> 16) as u16).to_le_bytes());
    }
    if let Some(block) = blocks.get_mut(&log) {
        put(block, 0xfc, &[0; 4]);
        let sum = crc(!0, &block[..1024]);
        put(block, 0xfc, &sum.to_be_bytes());
    }
}

/// What reads otherwise is written down.
fn written_down(settled: &Settled, blocks: &Blocks, len: u32) -> Blocks {
    let mut result = blocks.clone();
    for at in settled.blocks() {
        let mut block = [0; BLOCK_SIZE];
        settled.read(at, &mut block, &mut |at, buf| read(blocks, len, at, buf)).unwrap();
        result.insert(at, block);
    }
    result
}

fuzz_target!(|input: &[u8]| {
    static BASES: OnceLock<[Base; 2]> = OnceLock::new();
    let bases = BASES.get_or_init(|| [5 << 10, 75 << 10].map(Base::new));
    let mut input = Input(input);
    let mode = input.byte();
    let base = &bases[usize::from(mode & 1)];
    let seed = crc(!0, &base.blocks[&0][SUPERBLOCK + 0x68..SUPERBLOCK + 0x78]);
    let (blocks, sequence) = (base.blocks.clone(), u32::from_le_bytes(input.bytes()));
    let start = 1 + u32::from(u16::from_le_bytes(input.bytes())) % (base.place.len() as u32 - 1);
    let mut log =
        Log { base, blocks, seed, sequence, next: start, written: 0, open: Default::default(), complete: Vec::new() };
    let superblock = base.place[0];
    let mut own = log.blocks[&superblock];
    put(&mut own, 0x18, &sequence.to_be_bytes());
    put(&mut own, 0x1c, &start.to_be_bytes());
    put(&mut own, 0x28, &0x11u32.to_be_bytes());
    put(&mut own, 0x50, &[4]);
    log.blocks.insert(superblock, own);
    let mut first = log.blocks[&0];
    let features = word(&first, RECOVER) | 4;
    put(&mut first, RECOVER, &features.to_le_bytes());
    log.blocks.insert(0, first);

    let patches = if mode & 2 != 0 { 1 + input.byte() % 4 } else { 0 };
    let patched: Vec<[u8; 4]> = (0..patches).map(|_| input.bytes()).collect();
    while !input.0.is_empty() && log.written + 8 < base.place.len() {
        match input.byte() % 8 {
            0..=2 => log.descriptor(&mut input),
            3..=4 => log.revoke(&mut input),
            5 => log.commit(1),
            _ => log.commit(8),
        }
    }
    let tables = word(&log.blocks[&1], 8);
    let targets = [0, 1, word(&log.blocks[&1], 0), tables, superblock, base.place[start as usize]];
    for [target, low, high, value] in &patched {
        let (number, width) = (usize::from(*target) % targets.len(), [1, 2, 4][usize::from(target / 64 % 3)]);
        let at = usize::from(u16::from_le_bytes([*low, *high]));
        let at = match number {
            0 => SUPERBLOCK + at % 1024,
            1 => at % 96,
            3 => INODE + at % 256,
            4 => at % 256,
            _ => at % BLOCK_SIZE,
        };
        let block = log.blocks.entry(targets[number]).or_insert([0; BLOCK_SIZE]);
        block[at / width * width..][..width].fill(*value);
    }
    if mode & 4 == 0 {
        seal_all(&mut log.blocks, superblock);
    }

    let size = u64::from(base.len) * BLOCK_SIZE as u64;
    let blocks = &log.blocks;
    let settled = settle(size, &mut |at, buf| read(blocks, base.len, at, buf));
    let expected = if patches > 0 || mode & 4 != 0 { Replay::Any } else { log.replayed() };
    let settled = match settled {
        Ok(settled) => settled,
        Err(Error::Invalid { .. }) => {
            assert!(!matches!(expected, Replay::Brings(_)), "a log that is whole is replayed");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let after = written_down(&settled, blocks, base.len);
    let again = settle(size, &mut |at, buf| read(&after, base.len, at, buf));
    match expected {
        Replay::Refused => panic!("it writes where it must not"),
        Replay::Any => (),
        Replay::Brings(expected) => {
            assert_eq!(again.unwrap().blocks().count(), 0, "it is settled for good");
            let seen = |at: &u32| !base.is_structure(*at) && !base.place.contains(at);
            for at in after.keys().chain(expected.keys()).filter(|at| seen(at)) {
                assert!(after.get(at) == expected.get(at), "block {at}");
            }
        }
    }
});
