//! Reading names: every block of every file is found under its path, also in file systems that others wrote; and whatever
//! the bytes are, reading them ends.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/image.rs"]
mod image;

use std::fs;
use std::path::Path;
use std::process::Command;

use firstread::Result;
use firstread::ext4::{Names, Type, read_names};
use proptest::prelude::*;

const BLOCK: usize = 4096;

fn names_of(disk: &[u8]) -> Result<Option<Names>> {
    read_names(disk.len() as u64, &mut |block, buf| {
        let at = block as usize * BLOCK;
        buf.copy_from_slice(&disk[at..at + buf.len()]);
        Ok(())
    })
}

/// Every file of `tree` has its bytes where the names say; how many blocks that are.
fn check_files(disk: &[u8], names: &Names, tree: &Path, dir: &str) -> usize {
    let by_path = names.by_path();
    let mut checked = 0;
    for entry in fs::read_dir(tree).unwrap() {
        let entry = entry.unwrap();
        let path = format!("{dir}/{}", entry.file_name().to_str().unwrap());
        let name = *by_path.get(path.as_bytes()).unwrap_or_else(|| panic!("{path} is missing"));
        assert_eq!(names.path(name), path.as_bytes());
        if entry.path().is_dir() {
            assert_eq!(names.kind(name), Some(Type::Directory));
            checked += check_files(disk, names, &entry.path(), &path);
            continue;
        }
        assert_eq!(names.kind(name), Some(Type::File));
        let content = fs::read(entry.path()).unwrap();
        let mut blocks = 0;
        for run in names.runs().iter().filter(|run| run.name == name) {
            for step in 0..run.blocks {
                let at = (run.block + step) as usize * BLOCK;
                let from = (run.file_block + step) as usize * BLOCK;
                let end = content.len().min(from + BLOCK);
                assert!(disk[at..at + end - from] == content[from..end], "{path} block {}", run.file_block + step);
                assert_eq!(names.run_at(run.block + step).unwrap().name, name);
                blocks += 1;
            }
        }
        assert_eq!(blocks, content.len().div_ceil(BLOCK), "{path}");
        checked += blocks;
    }
    checked
}

#[test]
fn files_that_mke2fs_wrote_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let image = image::make(dir.path(), "app", 30);
    let disk = fs::read(&image.disk).unwrap();
    let names = names_of(&disk).unwrap().unwrap();
    assert!(check_files(&disk, &names, &image.tree, "") > 1000);
    assert!(names.run_at(0).is_none(), "the superblock belongs to no file");
    let root = names.runs().iter().find(|run| run.name == firstread::ext4::ROOT).unwrap();
    assert_eq!(names.path(root.name), b"/");
}

#[test]
fn directories_with_a_hash_tree_and_files_in_many_pieces_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("many")).unwrap();
    for number in 0..3000 {
        fs::write(tree.join(format!("many/a-rather-long-name-of-a-file-{number}")), [number as u8; 9]).unwrap();
    }
    // Data in every other block: more extents than an inode holds.
    let pieces = fs::File::create(tree.join("pieces")).unwrap();
    for piece in 0..700u64 {
        std::os::unix::fs::FileExt::write_all_at(&pieces, &[piece as u8 | 1; BLOCK], piece * 2 * BLOCK as u64).unwrap();
    }
    let disk = dir.path().join("disk");
    let reference = format!("oci:{}", dir.path().join("layout").display());
    let request =
        firstread::build::Request::new(format!("dir:{}", tree.display()).parse().unwrap(), reference.parse().unwrap());
    let silent: std::sync::Arc<dyn firstread::build::Progress> = std::sync::Arc::new(firstread::build::Silent);
    firstread::build::build(&request, &silent).unwrap();
    let layout = built::Layout(dir.path().join("layout"));
    let top: serde_json::Value =
        serde_json::from_slice(&fs::read(dir.path().join("layout/index.json")).unwrap()).unwrap();
    layout.device(top["manifests"][0]["digest"].as_str().unwrap(), &disk);
    let disk = fs::read(disk).unwrap();
    let names = names_of(&disk).unwrap().unwrap();
    let by_path = names.by_path();
    assert_eq!(by_path.len(), 3003);
    let pieces = by_path[&b"/pieces"[..]];
    let runs: Vec<_> = names.runs().iter().filter(|run| run.name == pieces).collect();
    assert_eq!(runs.len(), 700);
    for run in runs {
        assert_eq!(disk[run.block as usize * BLOCK], (run.file_block / 2) as u8 | 1);
    }
    assert!(!names.own_blocks(pieces).is_empty(), "its extents are in blocks of their own");
    assert!(names.runs().iter().filter(|run| names.path(run.name) == b"/many").map(|run| run.blocks).sum::<u32>() > 10);
}

#[path = "common/built.rs"]
mod built;
#[path = "common/ext4.rs"]
mod ext4;
#[path = "common/nodes.rs"]
mod nodes;

#[test]
fn what_is_no_such_file_system_has_no_names() {
    assert!(names_of(&vec![0; 64 * BLOCK]).unwrap().is_none());
    assert!(names_of(&vec![0; BLOCK]).unwrap().is_none());
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("small-blocks");
    let made =
        Command::new("mke2fs").args(["-q", "-t", "ext4", "-b", "1024"]).arg(&disk).arg("4096k").output().unwrap();
    assert!(made.status.success(), "{made:?}");
    assert!(names_of(&fs::read(disk).unwrap()).unwrap().is_none());
}

fn small_disk() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    fs::read(image::make(dir.path(), "app", 3).disk).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn damaged_file_systems_are_an_error_or_read(changes in prop::collection::vec((0usize..700 * BLOCK, any::<u8>()), 1..40), word in any::<u32>()) {
        use std::sync::OnceLock;
        static DISK: OnceLock<Vec<u8>> = OnceLock::new();
        let disk = DISK.get_or_init(small_disk);
        let used: Vec<usize> = (0..disk.len()).filter(|at| disk[*at] != 0 && *at < 700 * BLOCK).collect();
        let mut disk = disk.clone();
        for (at, value) in changes {
            // Where something is; two in three are whole words.
            let at = used[at % used.len()] & !3;
            match value % 3 {
                0 => disk[at] = value,
                1 => disk[at..at + 4].copy_from_slice(&word.to_le_bytes()),
                _ => disk[at..at + 4].copy_from_slice(&(word >> 24).to_le_bytes()),
            }
        }
        if let Ok(Some(names)) = names_of(&disk) {
            for run in names.runs() {
                prop_assert!((run.block as usize + run.blocks as usize) * BLOCK <= disk.len());
                prop_assert!(names.path(run.name).len() < 1 << 20);
            }
        }
    }
}
