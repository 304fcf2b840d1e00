//! Which file a block belongs to, as far as it was read.

use std::collections::{BTreeMap, HashMap};

use crate::profile::{Place, Run};

/// Names by the blocks that were read, and numbers for them.
#[derive(Default)]
pub(super) struct Names {
    /// First block to behind the last one, and the name.
    blocks: BTreeMap<u32, (u32, Option<usize>)>,
    numbers: HashMap<Vec<u8>, usize>,
    pub(super) files: Vec<String>,
}

impl Names {
    pub(super) fn add(&mut self, run: &Run) -> Option<usize> {
        let name = match &run.place {
            Place::Named { path, .. } => Some(self.number(path)),
            Place::Metadata | Place::Data => None,
        };
        if let Some(block) = run.block {
            self.blocks.insert(block, (block.saturating_add(run.blocks), name));
        }
        name
    }

    pub(super) fn number(&mut self, path: &[u8]) -> usize {
        if let Some(number) = self.numbers.get(path) {
            return *number;
        }
        let number = self.files.len();
        self.numbers.insert(path.to_owned(), number);
        self.files.push(String::from_utf8_lossy(path).into_owned());
        number
    }

    /// What a block that was read belongs to.
    pub(super) fn at(&self, block: u32) -> Option<usize> {
        let (_, (end, name)) = self.blocks.range(..=block).next_back()?;
        (block < *end).then_some(*name).flatten()
    }

    /// Blocks of a range that were read, by name.
    pub(super) fn within(&self, from: u32, to: u32) -> impl Iterator<Item = (Option<usize>, u32)> {
        let first = self.blocks.range(..=from).next_back().map_or(from, |(block, _)| *block);
        self.blocks.range(first..to).filter_map(move |(block, (end, name))| {
            let (start, stop) = (from.max(*block), to.min(*end));
            (start < stop).then(|| (*name, stop - start))
        })
    }
}
