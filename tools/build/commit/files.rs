//! The files of a file system, as far as chunks follow them.

use std::collections::HashMap;

use super::ranges::Ranges;
use crate::build::intake::{CHUNK_BLOCKS, LARGE};
use crate::ext4::{Names, Run, Type};

/// A regular file with blocks of its own.
pub(super) struct OneFile {
    /// Its number in [`Names`].
    pub name: u32,
    /// Where its blocks are, in the order of the file.
    runs: Vec<Run>,
    /// Whether it has chunks of its own.
    pub is_large: bool,
}

/// Blocks that follow each other in a file: first device block and number of blocks of each part.
pub(super) type Parts = Vec<(u32, u32)>;

/// The files.
pub(super) struct Files<'a> {
    names: &'a Names,
    all: Vec<OneFile>,
    /// By the number of the name.
    by_name: HashMap<u32, usize>,
    /// Small files by their directory.
    by_directory: HashMap<u32, Vec<usize>>,
    /// All blocks that files have.
    blocks: Ranges,
}

impl<'a> Files<'a> {
    /// The files of a file system.
    pub(super) fn new(names: &'a Names) -> Self {
        let is_file = |run: &&Run| names.kind(run.name) == Some(Type::File);
        let blocks =
            Ranges::new(names.runs().iter().filter(is_file).map(|run| run.block..run.block + run.blocks).collect());
        let mut by_name: HashMap<u32, usize> = HashMap::new();
        let mut all: Vec<OneFile> = Vec::new();
        for run in names.runs().iter().filter(is_file) {
            let number = *by_name.entry(run.name).or_insert_with(|| {
                all.push(OneFile { name: run.name, runs: Vec::new(), is_large: names.size(run.name) >= LARGE });
                all.len() - 1
            });
            if let Some(file) = all.get_mut(number) {
                file.runs.push(*run);
            }
        }
        let mut by_directory: HashMap<u32, Vec<usize>> = HashMap::new();
        for (number, file) in all.iter_mut().enumerate() {
            file.runs.sort_unstable_by_key(|run| run.file_block);
            // What lies behind a file's end may be more than a chunk of small files holds.
            file.is_large |= file.runs.iter().map(|run| u64::from(run.blocks)).sum::<u64>() * 4096 > LARGE;
            if !file.is_large {
                by_directory.entry(names.parent(file.name)).or_default().push(number);
            }
        }
        Self { names, all, by_name, by_directory, blocks }
    }

    /// All blocks of files.
    pub(super) fn blocks(&self) -> &Ranges {
        &self.blocks
    }

    /// The names.
    pub(super) fn names(&self) -> &Names {
        self.names
    }

    pub(super) fn get(&self, number: usize) -> Option<&OneFile> {
        self.all.get(number)
    }

    /// The small files in the directory of the file `number`.
    pub(super) fn beside(&self, number: usize) -> &[usize] {
        let directory = self.all.get(number).map(|file| self.names.parent(file.name));
        directory.and_then(|directory| self.by_directory.get(&directory)).map_or(&[], Vec::as_slice)
    }

    /// The files that have one of these blocks, each once.
    pub(super) fn touched(&self, blocks: &Ranges) -> Vec<usize> {
        let mut found = Vec::new();
        let runs = self.names.runs();
        for range in blocks.iter() {
            let from = runs.partition_point(|run| run.block + run.blocks <= range.start);
            let rest = runs.get(from..).unwrap_or_default().iter();
            let met = rest.take_while(|run| run.block < range.end);
            found.extend(met.filter_map(|run| self.by_name.get(&run.name).copied()));
        }
        found.sort_unstable();
        found.dedup();
        found
    }
}

impl OneFile {
    /// All its blocks.
    pub(super) fn parts(&self) -> Parts {
        self.runs.iter().map(|run| (run.block, run.blocks)).collect()
    }

    /// Its blocks as the builder cuts them: at every multiple of a chunk's size in the file, and at holes.
    pub(super) fn pieces(&self) -> Vec<Parts> {
        let mut pieces: Vec<Parts> = Vec::new();
        let mut next = None;
        for run in &self.runs {
            let (mut file_block, mut block, mut left) = (run.file_block, run.block, run.blocks);
            while left > 0 {
                let room = CHUNK_BLOCKS - file_block % CHUNK_BLOCKS;
                let blocks = left.min(room);
                let continues = next == Some(file_block) && !file_block.is_multiple_of(CHUNK_BLOCKS);
                match pieces.last_mut().filter(|_| continues) {
                    Some(piece) => piece.push((block, blocks)),
                    None => pieces.push(vec![(block, blocks)]),
                }
                (file_block, block, left) = (file_block.saturating_add(blocks), block + blocks, left - blocks);
                next = Some(file_block);
            }
        }
        pieces
    }
}
