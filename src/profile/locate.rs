//! From blocks that were touched to what they hold.

use super::{Kind, Place, Run};
use crate::ext4::{Names, Type};

/// Blocks of a device that were read for the first time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    /// When, in microseconds from attach.
    pub microseconds: u64,
    /// First block.
    pub block: u32,
    /// Length in blocks.
    pub blocks: u32,
}

/// The runs of `touches`: each cut where what it holds changes. `names` is `None` for a device whose file system is not
/// looked into.
#[must_use]
pub fn locate(touches: &[Touch], names: Option<&Names>) -> Vec<Run> {
    let mut runs = Vec::new();
    for touch in touches {
        let (mut at, end) = (touch.block, touch.block.saturating_add(touch.blocks));
        while at < end {
            let (place, until) = match names {
                None => (Place::Data, end),
                Some(names) => place(names, at, end),
            };
            let seconds = touch.microseconds as f64 / 1e6;
            runs.push(Run { seconds, place, blocks: until - at, block: Some(at) });
            at = until;
        }
    }
    runs
}

/// What `block` holds, and where that ends: at `end` at the latest.
fn place(names: &Names, block: u32, end: u32) -> (Place, u32) {
    let Some(run) = names.run_at(block) else {
        let next = names.runs().partition_point(|run| run.block <= block);
        let next = names.runs().get(next).map_or(end, |run| run.block);
        return (Place::Metadata, end.min(next));
    };
    let kind = match names.kind(run.name) {
        Some(Type::Directory) => Kind::Directory,
        Some(Type::Link) => Kind::Link,
        Some(Type::File) | None => Kind::File,
    };
    let place = Place::Named { kind, path: names.path(run.name), from: run.file_block + (block - run.block) };
    (place, end.min(run.block + run.blocks))
}
