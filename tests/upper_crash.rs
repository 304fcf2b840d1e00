//! A writable device against a model, with losses of power and killed processes: after every change to the medium, and at
//! random for as long as `FIRSTREAD_UPPER_OPS` says.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/crash.rs"]
mod crash;
#[path = "common/random.rs"]
mod random;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crash::{CrashDisk, Survivors};
use firstread::Result;
use firstread::chunk::Digest;
use firstread::device::upper::{Durability, LowerIdentity, Upper, UpperOptions};
use firstread::device::{Access, Device, DeviceFuture, Local, Overlay, Residence, Zeroing, check_range};
use random::Random;

const BLOCK: usize = 4096;
const SECTOR: usize = 512;
/// Blocks of the lower; the device has as many again behind its end.
const LOWER: usize = 24;
const BLOCKS: usize = 2 * LOWER;

/// A lower of which every third block needs a source, and that counts what is asked of it.
struct Memory {
    bytes: Vec<u8>,
    fetched: AtomicU64,
}

impl Memory {
    fn new() -> Arc<Self> {
        Arc::new(Self { bytes: Random(5).bytes(LOWER * BLOCK), fetched: AtomicU64::new(0) })
    }

    fn part(&self, offset: u64, len: usize) -> &[u8] {
        &self.bytes[offset as usize..offset as usize + len]
    }
}

impl Device for Memory {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_local(&self, offset: u64, buf: &mut [u8]) -> Result<Local> {
        check_range(self.size(), offset, buf.len() as u64)?;
        let blocks = offset / BLOCK as u64..=(offset + buf.len() as u64 - 1) / BLOCK as u64;
        if blocks.into_iter().any(|block| block % 3 == 0) {
            return Ok(Local::Missing);
        }
        buf.copy_from_slice(self.part(offset, buf.len()));
        Ok(Local::Done)
    }

    fn read_at<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> DeviceFuture<'a, ()> {
        Box::pin(async move {
            check_range(self.size(), offset, buf.len() as u64)?;
            let blocks = offset as usize / BLOCK..(offset as usize + buf.len()).div_ceil(BLOCK);
            let fetched = blocks.filter(|block| block % 3 == 0).count() * BLOCK;
            self.fetched.fetch_add(fetched as u64, Ordering::SeqCst);
            tokio::task::yield_now().await;
            buf.copy_from_slice(self.part(offset, buf.len()));
            Ok(())
        })
    }

    fn residence(&self, _: u64, len: u64) -> Result<Vec<(u64, Residence)>> {
        Ok(vec![(len, Residence::Remote)])
    }
}

fn open(disk: &CrashDisk, boot: &str, lower: &Arc<Memory>) -> Result<Arc<Overlay>> {
    let identity = LowerIdentity {
        contents: Digest::of(b"contents"),
        device_bytes: lower.size(),
        image: "an image".to_owned(),
        manifest: Digest::of(b"manifest"),
    };
    let size = Some((BLOCKS * BLOCK) as u64);
    let options = UpperOptions { size, durability: Durability::Kept, boot: boot.to_owned() };
    let upper = Upper::open_on(disk.dir().as_ref(), "under test", &identity, &options)?;
    Overlay::new(Arc::clone(lower) as Arc<dyn Device>, Arc::new(upper))
}

/// One operation.
#[derive(Clone, Debug)]
enum Op {
    Write(usize, Vec<u8>),
    Zero(usize, usize, Zeroing),
    Flush,
    Read(usize, usize),
}

impl Op {
    fn random(random: &mut Random) -> Self {
        let size = BLOCKS * BLOCK;
        let unit = if random.one_in(2) { BLOCK } else { SECTOR };
        let offset = random.below((size / unit) as u64) as usize * unit;
        let most = if random.one_in(8) { 6 * BLOCK } else { BLOCK + SECTOR };
        let len = (1 + random.below((most / unit) as u64) as usize) * unit;
        let len = len.min(size - offset);
        match random.below(16) {
            0..=8 => Self::Write(offset, random.bytes(len)),
            9 => Self::Zero(offset, len, Zeroing::Discard),
            10 => Self::Zero(offset, len, Zeroing::Hole),
            11 => Self::Zero(offset, len, Zeroing::Allocated),
            12 => Self::Flush,
            _ => Self::Read(offset, len),
        }
    }

    async fn run(&self, device: &Overlay) -> Result<Vec<u8>> {
        match self {
            Self::Write(offset, data) => match device.write_local(*offset as u64, data)? {
                Local::Done => Ok(Vec::new()),
                Local::Missing => device.write_at(*offset as u64, data).await.map(|()| Vec::new()),
            },
            Self::Zero(offset, len, how) => device.zero(*offset as u64, *len as u64, *how).await.map(|()| Vec::new()),
            Self::Flush => device.flush().await.map(|()| Vec::new()),
            Self::Read(offset, len) => {
                let mut buf = vec![0xee; *len];
                if device.read_local(*offset as u64, &mut buf)? == Local::Missing {
                    device.read_at(*offset as u64, &mut buf).await?;
                }
                Ok(buf)
            }
        }
    }
}

/// What the device may hold.
struct Model {
    now: Vec<u8>,
    /// Each block's contents since it was last flushed, the flushed ones first.
    versions: Vec<Vec<Vec<u8>>>,
    /// Whether a block was in the upper when it was last flushed, and so may be torn at sectors.
    in_place: Vec<bool>,
    /// Whether it is now.
    changed: Vec<bool>,
}

impl Model {
    fn new(lower: &Memory) -> Self {
        let mut now = lower.bytes.clone();
        now.resize(BLOCKS * BLOCK, 0);
        let versions = now.chunks(BLOCK).map(|block| vec![block.to_vec()]).collect();
        Self { now, versions, in_place: vec![false; BLOCKS], changed: vec![false; BLOCKS] }
    }

    fn apply(&mut self, op: &Op) {
        let (from, to) = match op {
            Op::Write(offset, data) => {
                self.now[*offset..offset + data.len()].copy_from_slice(data);
                (*offset, offset + data.len())
            }
            Op::Zero(offset, len, Zeroing::Discard) => {
                let (from, to) = (offset.next_multiple_of(BLOCK), (offset + len) / BLOCK * BLOCK);
                if from >= to {
                    return;
                }
                self.now[from..to].fill(0);
                (from, to)
            }
            Op::Zero(offset, len, _) => {
                self.now[*offset..offset + len].fill(0);
                (*offset, offset + len)
            }
            Op::Flush | Op::Read(..) => return,
        };
        for block in from / BLOCK..to.div_ceil(BLOCK) {
            self.changed[block] = true;
            self.versions[block].push(self.now[block * BLOCK..(block + 1) * BLOCK].to_vec());
        }
    }

    /// Everything that was applied is durable.
    fn flushed(&mut self) {
        self.in_place.clone_from(&self.changed);
        for versions in &mut self.versions {
            versions.drain(..versions.len() - 1);
        }
    }

    /// Checks what is there after a crash, and goes on from it.
    async fn crashed(&mut self, device: &Overlay, what: &str) {
        let found = contents(device).await;
        for (number, block) in found.chunks(BLOCK).enumerate() {
            let versions = &self.versions[number];
            let right = if self.in_place[number] {
                let sector = |(at, sector): (usize, &[u8])| {
                    versions.iter().any(|version| version[at * SECTOR..(at + 1) * SECTOR] == *sector)
                };
                block.chunks(SECTOR).enumerate().all(sector)
            } else {
                versions.iter().any(|version| version == block)
            };
            assert!(right, "{what}: block {number} is none of {} versions", versions.len());
        }
        self.versions = found.chunks(BLOCK).map(|block| vec![block.to_vec()]).collect();
        self.now = found;
        self.changed.fill(false);
        device.upper().changed().for_each(|run| self.changed[run.start as usize..run.end as usize].fill(true));
        self.in_place.clone_from(&self.changed);
    }
}

async fn contents(device: &Overlay) -> Vec<u8> {
    let mut all = vec![0; BLOCKS * BLOCK];
    device.read_at(0, &mut all).await.unwrap();
    all
}

/// Runs operations until one fails, checking every read. An operation that failed may have happened in part.
async fn live(disk: &CrashDisk, device: &Overlay, model: &mut Model, ops: &[Op]) -> usize {
    for (number, op) in ops.iter().enumerate() {
        match op.run(device).await {
            Ok(read) => {
                model.apply(op);
                match op {
                    // A sync in which the power is cut is no promise.
                    Op::Flush if !disk.is_off() => model.flushed(),
                    Op::Read(offset, len) => {
                        assert!(read == model.now[*offset..offset + len], "operation {number}: {op:?}: wrong bytes");
                    }
                    _ => {}
                }
            }
            Err(_) => {
                half(model, op);
                return number;
            }
        }
    }
    ops.len()
}

/// An operation that may have happened in each of its blocks or not.
fn half(model: &mut Model, op: &Op) {
    let before = model.now.clone();
    model.apply(op);
    // Also as it was: an error is no promise either way.
    if let Op::Write(offset, _) | Op::Zero(offset, ..) = op {
        let len = match op {
            Op::Write(_, data) => data.len(),
            Op::Zero(_, len, _) => *len,
            _ => 0,
        };
        for block in offset / BLOCK..(offset + len).div_ceil(BLOCK) {
            model.versions[block].push(before[block * BLOCK..(block + 1) * BLOCK].to_vec());
        }
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().build().unwrap()
}

/// The loss of power after `last` changes of the medium, in every form; a last life is checked to the end.
async fn cut_power(ops: &[Op], last: u64) {
    let lower = Memory::new();
    let survivors =
        [Survivors::None, Survivors::All].into_iter().chain((0..6).map(|seed| Survivors::Some(last * 100 + seed)));
    for survivors in survivors {
        let disk = CrashDisk::new();
        disk.cut_power_after(last);
        let mut model = Model::new(&lower);
        if let Ok(device) = open(&disk, "first", &lower) {
            live(&disk, &device, &mut model, ops).await;
        }
        let what = format!("power cut after change {last}, {survivors:?}");
        let after = disk.after_crash(survivors);
        let device = open(&after, "second", &lower).unwrap_or_else(|error| panic!("{what}: {error}"));
        model.crashed(&device, &what).await;
        assert_eq!(live(&after, &device, &mut model, &ops[..ops.len() / 4]).await, ops.len() / 4, "{what}");
        assert!(contents(&device).await == model.now, "{what}: after going on");
    }
}

/// The process killed after `last` changes: everything that was answered is there.
async fn kill(ops: &[Op], last: u64) {
    let lower = Memory::new();
    let disk = CrashDisk::new();
    disk.cut_power_after(last);
    let mut model = Model::new(&lower);
    let mut unanswered = None;
    if let Ok(device) = open(&disk, "first", &lower) {
        for op in ops {
            match op.run(&device).await {
                Ok(_) => model.apply(op),
                Err(_) => {
                    unanswered = Some(op.clone());
                    break;
                }
            }
        }
    }
    // What was answered is the only version.
    model.flushed();
    if let Some(op) = unanswered {
        half(&mut model, &op);
    }
    let what = format!("killed after change {last}");
    let device =
        open(&disk.after_crash(Survivors::All), "first", &lower).unwrap_or_else(|error| panic!("{what}: {error}"));
    model.crashed(&device, &what).await;
}

#[test]
fn a_crash_at_any_change_leaves_what_was_flushed_and_a_device_that_opens() {
    let mut random = Random(11);
    let ops: Vec<Op> = (0..60).map(|_| Op::random(&mut random)).collect();
    let lower = Memory::new();
    let disk = CrashDisk::new();
    let runtime = runtime();
    runtime.block_on(async {
        let device = open(&disk, "first", &lower).unwrap();
        assert_eq!(live(&disk, &device, &mut Model::new(&lower), &ops).await, ops.len());
        let changes = disk.changes();
        assert!(changes > 80 && ops.iter().any(|op| matches!(op, Op::Flush)), "{changes}");
        for last in 1..=changes {
            cut_power(&ops, last).await;
            kill(&ops, last).await;
        }
    });
}

/// `FIRSTREAD_UPPER_OPS` operations (60 000 unless set) with a crash or a kill about every three hundred.
#[test]
fn random_operations_with_crashes_and_reopens_are_those_of_the_model() {
    let count: u64 = std::env::var("FIRSTREAD_UPPER_OPS").map_or(60_000, |text| text.parse().expect("a number"));
    let mut random = Random(count);
    let lower = Memory::new();
    let mut disk = CrashDisk::new();
    let mut model = Model::new(&lower);
    let (mut done, mut boot) = (0, 0_u64);
    runtime().block_on(async {
        while done < count {
            let device = open(&disk, &boot.to_string(), &lower).unwrap();
            assert!(contents(&device).await == model.now, "reopened after {done} operations");
            let ops: Vec<Op> = (0..1 + random.below(600)).map(|_| Op::random(&mut random)).collect();
            if random.one_in(3) {
                disk.cut_power_after(1 + random.below(600));
            }
            done += live(&disk, &device, &mut model, &ops).await as u64;
            drop(device);
            if disk.is_off() || random.one_in(2) {
                // The disk forgets what was not synced, and the machine starts again.
                boot += 1;
                disk = disk.after_crash(Survivors::Some(random.next()));
                let device = open(&disk, &boot.to_string(), &lower).unwrap();
                model.crashed(&device, &format!("crash after {done} operations")).await;
            } else {
                // Another process: nothing is lost.
                disk = disk.after_crash_of_process();
            }
        }
    });
    eprintln!("{done} operations, {boot} losses of power");
}

#[test]
fn whole_blocks_fetch_nothing_and_a_part_fetches_its_block() {
    let lower = Memory::new();
    runtime().block_on(async {
        let device = open(&CrashDisk::new(), "first", &lower).unwrap();
        assert_eq!(device.access(), Access::ReadWrite);
        let fetched = || lower.fetched.load(Ordering::SeqCst);
        assert_eq!(device.write_local(0, &vec![1; 6 * BLOCK]).unwrap(), Local::Done);
        device.zero(6 * BLOCK as u64, 6 * BLOCK as u64, Zeroing::Hole).await.unwrap();
        assert_eq!(fetched(), 0);
        let part = vec![2; BLOCK + SECTOR];
        // Blocks 15 (of a source) and 16 (local): only a part of 15 is written, so it alone is fetched.
        let offset = (15 * BLOCK + SECTOR) as u64;
        assert_eq!(device.write_local(offset, &part).unwrap(), Local::Missing);
        device.write_at(offset, &part).await.unwrap();
        assert_eq!(fetched(), BLOCK as u64);
        // Behind the end of the lower there is nothing to fetch, and zeros are read.
        assert_eq!(device.write_local((30 * BLOCK + SECTOR) as u64, &[3; SECTOR]).unwrap(), Local::Done);
        let mut block = vec![9; BLOCK];
        assert_eq!(device.read_local(30 * BLOCK as u64, &mut block).unwrap(), Local::Done);
        assert!(block[..SECTOR].iter().chain(&block[2 * SECTOR..]).all(|&byte| byte == 0) && block[SECTOR] == 3);
    });
}

/// Parts of one cold block that are written at the same time all get there.
#[test]
fn writes_to_parts_of_a_block_do_not_undo_each_other() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).build().unwrap();
    for round in 0..200_u64 {
        let lower = Memory::new();
        let device = open(&CrashDisk::new(), "first", &lower).unwrap();
        let block = round % LOWER as u64;
        runtime.block_on(async {
            let write = |sector: usize| {
                let device = Arc::clone(&device);
                tokio::spawn(async move {
                    let offset = block * BLOCK as u64 + (sector * SECTOR) as u64;
                    device.write_at(offset, &[sector as u8 + 1; SECTOR]).await.unwrap();
                })
            };
            let writes: Vec<_> = (0..8).map(write).collect();
            for write in writes {
                write.await.unwrap();
            }
            let mut found = vec![0; BLOCK];
            device.read_at(block * BLOCK as u64, &mut found).await.unwrap();
            for (sector, bytes) in found.chunks(SECTOR).enumerate() {
                assert!(bytes.iter().all(|&byte| byte == sector as u8 + 1), "round {round}, sector {sector}");
            }
        });
    }
}
