//! Whatever is written to a device, the committed image has those bytes: all of them, but for blocks that the file system
//! says are free, which are zeros.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/built.rs"]
mod built;
#[path = "common/committed.rs"]
mod committed;
#[path = "common/ext4.rs"]
mod ext4;
#[path = "common/nodes.rs"]
mod nodes;
#[path = "common/random.rs"]
mod random;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use built::{request, run, shell};
use committed::{BLOCK, Generation, difference};
use firstread::build::{OptimizeRequest, Silent, optimize};
use firstread::index::Index;
use firstread::profile::Profile;
use random::Random;
use tempfile::TempDir;

const TREE: &str = r"
    mkdir -p tree/etc tree/lib/deep; head -c 1500000 /dev/urandom > tree/lib/large
    for i in $(seq 50); do head -c $((i * 211)) /dev/urandom > tree/etc/f$i; done
    head -c 300000 /dev/urandom > tree/lib/deep/medium; ln -s large tree/lib/link
";

/// An image of some files on a device of 32 MiB.
fn image(work: &Path) -> Generation {
    shell(work, TREE);
    let layout = work.join("layout");
    let mut request = request(&format!("dir:{}", work.join("tree").display()), &format!("oci:{}:1", layout.display()));
    request.size = Some(32 << 20);
    run(&request).unwrap();
    Generation::open(&layout, "1", work)
}

/// Whether the file system in `disk` says that `block` is free: its bitmap, found through the group descriptors.
fn is_free(disk: &[u8], block: usize) -> bool {
    let u32_at = |at: usize| u32::from_le_bytes(disk[at..at + 4].try_into().unwrap()) as usize;
    let descriptor = BLOCK + block / 32_768 * 32;
    let bitmap = u32_at(descriptor) * BLOCK;
    let within = block % 32_768;
    disk.get(bitmap + within / 8).is_some_and(|byte| byte >> (within % 8) & 1 == 0)
}

/// Compares the device of a child with what it must have.
fn assert_bytes(child: &Generation, expected: &[u8], what: &str) {
    assert_eq!(child.bytes.len(), expected.len());
    for (block, (found, wanted)) in child.bytes.chunks(BLOCK).zip(expected.chunks(BLOCK)).enumerate() {
        let dropped = found.iter().all(|byte| *byte == 0) && is_free(expected, block);
        assert!(found == wanted || dropped, "{what}: block {block} differs");
    }
    assert_startup(child, what);
}

/// What a start-up extent serves is what the ordinary ones do.
fn assert_startup(child: &Generation, what: &str) {
    let index = child.index();
    for extent in index.startup_extents().iter() {
        let plain = chunk(child, &index, extent.chunk);
        for at in 0..extent.blocks as usize {
            let block = (extent.block as usize + at) * BLOCK;
            let offset = extent.offset as usize + at * BLOCK;
            let end = plain.len().min(offset + BLOCK);
            assert!(plain[offset..end] == child.bytes[block..block + end - offset], "{what}: start-up block {block}");
        }
    }
    for chunk in index.startup_order() {
        assert!(chunk < index.chunk_count());
    }
}

fn chunk(image: &Generation, index: &Index, number: u32) -> Vec<u8> {
    let chunk = index.chunk(number).unwrap();
    let blob = index.blobs().nth(chunk.blob as usize).unwrap();
    let stored = fs::read(image.layout.join("blobs/sha256").join(blob.digest.hex())).unwrap();
    zstd::decode_all(&stored[chunk.offset as usize..][..chunk.stored_len as usize]).unwrap()
}

/// Mounts a copy of the device, works on it, and gives out what changed.
fn worked(image: &Generation, work: &Path, script: &str) -> Vec<(u64, Option<Vec<u8>>)> {
    let disk = work.join("worked.img");
    fs::write(&disk, &image.bytes).unwrap();
    let mount = ext4::Mount::new(&disk, &work.join("mounted"), "rw");
    shell(mount.dir(), script);
    drop(mount);
    difference(&image.bytes, &fs::read(&disk).unwrap())
}

#[test]
fn files_are_aligned_again_and_what_nobody_has_is_left_out() {
    let work = TempDir::new().unwrap();
    let parent = image(work.path());
    let script = "head -c 900000 /dev/urandom > lib/added; rm lib/large; echo x > etc/f7; mkdir a; echo 1 > a/b";
    let blocks = worked(&parent, work.path(), script);
    parent.write(&work.path().join("upper"), &blocks);
    let report = parent.commit(&work.path().join("upper"), "2").unwrap();
    let child = Generation::open(&parent.layout, "2", work.path());
    assert_bytes(&child, &parent.with(&blocks), "worked on");
    let disk = work.path().join("disk");
    fs::write(&disk, &child.bytes).unwrap();
    ext4::fsck(&disk);
    // Of 1.5 MB that were deleted nothing is left, and the added file has chunks of its own.
    let (old, new) = (parent.index(), child.index());
    let old_bytes: u64 = old.chunks().map(|chunk| u64::from(chunk.stored_len)).sum();
    assert!(report.stored_bytes < old_bytes - 500_000, "{report:?}, parent {old_bytes}");
    let known: Vec<_> = old.chunks().map(|chunk| chunk.digest).collect();
    let fresh: Vec<u32> =
        new.chunks().filter(|chunk| !known.contains(&chunk.digest)).map(|chunk| chunk.plain_len).collect();
    assert_eq!(fresh.iter().filter(|len| **len == 256 << 10).count(), 3, "900000 bytes: {fresh:?}");
    assert_eq!(report.new_chunks as usize, fresh.len());
    // The same files in an image of their own have the same chunks.
    let added = work.path().join("only");
    fs::create_dir_all(added.join("lib")).unwrap();
    let mount = ext4::Mount::new(&disk, &work.path().join("mounted"), "ro");
    fs::copy(mount.dir().join("lib/added"), added.join("lib/added")).unwrap();
    drop(mount);
    let alone = work.path().join("alone");
    run(&request(&format!("dir:{}", added.display()), &format!("oci:{}:x", alone.display()))).unwrap();
    let alone = Generation::open(&alone, "x", work.path()).index();
    let shared = alone.chunks().filter(|chunk| new.chunks().any(|other| other.digest == chunk.digest)).count();
    assert_eq!(shared, 4, "the chunks of the file");
}

#[test]
fn a_bitmap_that_lies_costs_no_file() {
    let work = TempDir::new().unwrap();
    let parent = image(work.path());
    let disk = work.path().join("lying.img");
    fs::write(&disk, &parent.bytes).unwrap();
    let debugfs = |options: &[&str], request: &str| {
        let output = Command::new("debugfs").args(options).args(["-R", request]).arg(&disk).output().unwrap();
        assert!(output.status.success(), "{request}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    let block: usize = debugfs(&[], "bmap /lib/large 70").parse().unwrap();
    debugfs(&["-w"], &format!("freeb {block} 5"));
    let lying = fs::read(&disk).unwrap();
    assert!(is_free(&lying, block) && !is_free(&parent.bytes, block));
    let blocks = difference(&parent.bytes, &lying);
    parent.write(&work.path().join("upper"), &blocks);
    parent.commit(&work.path().join("upper"), "2").unwrap();
    let child = Generation::open(&parent.layout, "2", work.path());
    let range = block * BLOCK..(block + 5) * BLOCK;
    assert!(child.bytes[range.clone()] == parent.bytes[range]);
}

#[test]
fn random_writes_and_damaged_file_systems_keep_every_byte() {
    let work = TempDir::new().unwrap();
    let parent = image(work.path());
    let all = (parent.bytes.len() / BLOCK) as u64;
    // What is not zeros: the file system's own blocks come first.
    let used: Vec<u64> = (0..all)
        .filter(|block| parent.bytes[*block as usize * BLOCK..][..BLOCK].iter().any(|byte| *byte != 0))
        .collect();
    for seed in 1..25 {
        let mut random = Random(seed);
        let mut blocks: Vec<(u64, Option<Vec<u8>>)> = Vec::new();
        for _ in 0..1 + random.below(60) {
            let block =
                if random.one_in(4) { random.below(all) } else { used[random.below(used.len() as u64) as usize] };
            if blocks.iter().any(|(known, _)| *known == block) {
                continue;
            }
            let mut bytes = parent.bytes[block as usize * BLOCK..][..BLOCK].to_vec();
            let content = match random.below(4) {
                0 => None,
                1 => Some(random.bytes(BLOCK)),
                _ => {
                    for _ in 0..=random.below(8) {
                        bytes[random.below(BLOCK as u64) as usize] = random.below(256) as u8;
                    }
                    Some(bytes)
                }
            };
            // The superblock stays in most runs, so that what it leads to is looked at.
            if block > 0 || random.one_in(10) {
                blocks.push((block, content));
            }
        }
        parent.write(&work.path().join("upper"), &blocks);
        let tag = format!("r{seed}");
        parent.commit(&work.path().join("upper"), &tag).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        let child = Generation::open(&parent.layout, &tag, work.path());
        assert_bytes(&child, &parent.with(&blocks), &format!("seed {seed}"));
    }
}

#[test]
fn a_hostile_directory_or_extent_tree_neither_stops_nor_harms_a_commit() {
    let work = TempDir::new().unwrap();
    let parent = image(work.path());
    // Every block of metadata once: each of its 32-bit words may be a length, a block, an inode.
    let own: Vec<u64> = (0..40).collect();
    for (round, block) in own.into_iter().enumerate() {
        let mut bytes = parent.bytes[block as usize * BLOCK..][..BLOCK].to_vec();
        let mut random = Random(round as u64 + 1);
        for word in bytes.chunks_exact_mut(4).skip(if block == 0 { 300 } else { 0 }) {
            if random.one_in(5) {
                let value = [u32::MAX, 0, 1, 0x7fff_ffff, 16_383, 16_384, 0xffff][random.below(7) as usize];
                word.copy_from_slice(&value.to_le_bytes());
            }
        }
        let blocks = vec![(block, Some(bytes))];
        parent.write(&work.path().join("upper"), &blocks);
        let tag = format!("h{round}");
        parent.commit(&work.path().join("upper"), &tag).unwrap_or_else(|error| panic!("block {block}: {error}"));
        let child = Generation::open(&parent.layout, &tag, work.path());
        assert_bytes(&child, &parent.with(&blocks), &format!("block {block}"));
    }
}

#[test]
fn a_disk_without_a_file_system_is_cut_by_place() {
    let work = TempDir::new().unwrap();
    let disk = work.path().join("disk");
    fs::write(&disk, Random(1).bytes(5 << 20)).unwrap();
    let layout = work.path().join("layout");
    run(&request(&format!("raw:{}", disk.display()), &format!("oci:{}:1", layout.display()))).unwrap();
    let parent = Generation::open(&layout, "1", work.path());
    // A window of zeros, a part of one, one that is written anew, and the last block.
    let mut blocks: Vec<_> = (64..128).map(|block| (block, None)).collect();
    blocks.extend([(130, Some(Random(2).bytes(BLOCK))), (131, None), (1279, Some(vec![7; BLOCK]))]);
    blocks.extend((256..320).map(|block| (block, Some(Random(block).bytes(BLOCK)))));
    parent.write(&work.path().join("upper"), &blocks);
    let report = parent.commit(&work.path().join("upper"), "2").unwrap();
    let child = Generation::open(&layout, "2", work.path());
    let expected = parent.with(&blocks);
    assert!(child.bytes == expected, "every byte");
    assert_eq!(report.new_chunks, 3);
    // A build of the same disk makes the same chunks.
    fs::write(&disk, &expected).unwrap();
    let mut again = request(&format!("raw:{}", disk.display()), &format!("oci:{}:3", layout.display()));
    again.reuse = vec![format!("oci:{}:2", layout.display()).parse().unwrap()];
    assert_eq!(run(&again).unwrap().new_chunks, 0);
}

#[test]
fn a_start_up_pack_stays_as_far_as_it_is_right() {
    let work = TempDir::new().unwrap();
    let parent = image(work.path());
    let index = parent.index();
    let head = format!(
        r#"{{"firstread_profile":1,"image":"x","device":"{}","file_system":"ext4","device_bytes":{},"read_ahead_kb":64,"seconds":1.0,"complete":true}}"#,
        index.device_digest(),
        index.device_bytes(),
    );
    let mut text = head;
    for (path, from, blocks) in
        [("/lib/large", 0, 40), ("/lib/large", 200, 60), ("/etc/f50", 0, 3), ("/lib/deep/medium", 3, 9)]
    {
        text.push_str(&format!(
            "\n{{\"t\":0.1,\"is\":\"file\",\"path\":\"{path}\",\"from\":{from},\"blocks\":{blocks}}}"
        ));
    }
    text.push('\n');
    let profile = Profile::from_text(&text).unwrap();
    let reference = |tag: &str| format!("oci:{}:{tag}", parent.layout.display()).parse().unwrap();
    let made =
        optimize(&OptimizeRequest::new(reference("1"), reference("hot"), profile), &(Arc::new(Silent) as _)).unwrap();
    assert!(made.startup.unwrap().extents > 0);
    let hot = Generation::open(&parent.layout, "hot", work.path());
    let extents = hot.index().startup_extents().iter().map(|extent| extent.blocks).sum::<u32>();

    // Some hot blocks change, a hot file goes.
    let script = "dd if=/dev/urandom of=lib/large bs=4096 seek=10 count=4 conv=notrunc status=none; rm lib/deep/medium";
    let blocks = worked(&hot, work.path(), script);
    hot.write(&work.path().join("upper"), &blocks);
    hot.commit(&work.path().join("upper"), "child").unwrap();
    let child = Generation::open(&parent.layout, "child", work.path());
    assert_bytes(&child, &hot.with(&blocks), "over a start-up pack");
    let index = child.index();
    let left = index.startup_extents().iter().map(|extent| extent.blocks).sum::<u32>();
    assert!(left > 0 && left < extents, "{left} of {extents} hot blocks are left");
    assert_eq!(index.startup_read_ahead_kb(), Some(64));
    assert!(index.startup_order().len() > 0);
    let manifest = built::Layout(parent.layout.clone()).json(&child.digest);
    assert_eq!(manifest["layers"][0]["annotations"]["containerd.io/snapshot/firstread/role"], "startup");

    // Everything that was hot goes.
    let blocks = worked(&child, work.path(), "rm -r lib etc");
    child.write(&work.path().join("upper"), &blocks);
    child.commit(&work.path().join("upper"), "empty").unwrap();
    let empty = Generation::open(&parent.layout, "empty", work.path());
    assert_bytes(&empty, &child.with(&blocks), "nothing hot");
    assert_eq!(empty.index().startup_extents().iter().count(), 0);
}

#[test]
fn the_programs_of_others_read_what_is_committed() {
    let work = TempDir::new().unwrap();
    let parent = image(work.path());
    let blocks = worked(&parent, work.path(), "head -c 200000 /dev/urandom > lib/added");
    parent.write(&work.path().join("upper"), &blocks);
    parent.commit(&work.path().join("upper"), "2").unwrap();
    let (from, to) = (format!("oci:{}:2", parent.layout.display()), format!("oci:{}/copy:2", work.path().display()));
    let copied = Command::new("skopeo").args(["copy", "--quiet", &from, &to]).output().unwrap();
    assert!(copied.status.success(), "{}", String::from_utf8_lossy(&copied.stderr));
}
