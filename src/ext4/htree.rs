//! The hash tree of a directory of more than one block: the root in the directory's first block, then the nodes of a
//! second level where the root is too small, then the leaves (`fs/ext4/namei.c`, `dx_root` and `dx_node`).

use zerocopy::IntoBytes;
use zerocopy::byteorder::little_endian::U32;

use super::checksum::Checksum;
use super::dir::{Entries, Identity, ROOM, changed, entry_bytes, name, put_entry};
use super::hash::name_hash;
use super::layout::{BLOCK_SIZE, Block, DxEntry, ZERO_BLOCK, feature};
use crate::error::Result;

/// Where the index starts in the root: behind `.`, `..` and `dx_root_info`.
const ROOT_AT: usize = 12 + 12 + 8;
/// Where the index starts in a node: behind an empty entry.
const NODE_AT: usize = 8;
/// The tail with the checksum.
const TAIL: usize = 8;
/// Entries of the root and of a node (`dx_root_limit`, `dx_node_limit`).
const ROOT_LIMIT: usize = (BLOCK_SIZE - ROOT_AT - TAIL) / size_of::<DxEntry>();
const NODE_LIMIT: usize = (BLOCK_SIZE - NODE_AT - TAIL) / size_of::<DxEntry>();

/// A block of entries, and where its names start.
#[derive(Debug, Clone, Copy)]
struct Leaf {
    /// The first hash, its lowest bit set where the same hash ends the leaf before.
    hash: u32,
    /// The first of its names in `Index::order`.
    first: u32,
}

/// A directory's names in the order of their hashes, cut into leaves.
#[derive(Debug)]
pub struct Index {
    order: Vec<u32>,
    leaves: Vec<Leaf>,
}

impl Index {
    /// Cuts a directory into full leaves.
    pub fn of(entries: &Entries, seed: &[u32; 4]) -> Result<Self, String> {
        let mut hashed: Vec<(u32, u32, u32)> = (0..entries.len() as u32)
            .map(|position| {
                let (hash, minor) = name_hash(name(entries, position), seed);
                (hash, minor, position)
            })
            .collect();
        // Names come last, so that the order of linking does not show.
        hashed.sort_unstable_by(|a, b| {
            (a.0, a.1).cmp(&(b.0, b.1)).then_with(|| name(entries, a.2).cmp(name(entries, b.2)))
        });
        let mut leaves: Vec<Leaf> = Vec::new();
        let mut room = 0;
        let mut previous = None;
        for (first, (hash, _, position)) in hashed.iter().enumerate() {
            let bytes = entry_bytes(name(entries, *position));
            if bytes > room {
                let continued = u32::from(previous == Some(*hash));
                leaves.push(Leaf { hash: hash | continued, first: first as u32 });
                room = ROOM;
            }
            room -= bytes;
            previous = Some(*hash);
        }
        if leaves.len() > ROOT_LIMIT * NODE_LIMIT {
            return Err(format!(
                "its {} entries need {} blocks; a directory of two index levels has at most {}",
                entries.len(),
                leaves.len(),
                ROOT_LIMIT * NODE_LIMIT
            ));
        }
        Ok(Self { order: hashed.into_iter().map(|(_, _, position)| position).collect(), leaves })
    }

    /// How many blocks it has.
    pub fn blocks(&self) -> u32 {
        (1 + self.nodes() + self.leaves.len()) as u32
    }

    /// How many blocks of the second level.
    fn nodes(&self) -> usize {
        if self.leaves.len() > ROOT_LIMIT { self.leaves.len().div_ceil(NODE_LIMIT) } else { 0 }
    }

    /// The positions of each leaf's entries.
    pub fn leaves(&self) -> impl Iterator<Item = impl Iterator<Item = u32> + '_> + '_ {
        let ends = self.leaves.iter().skip(1).map(|leaf| leaf.first as usize).chain([self.order.len()]);
        self.leaves
            .iter()
            .zip(ends)
            .map(|(leaf, end)| self.order.get(leaf.first as usize..end).unwrap_or_default().iter().copied())
    }
}

/// Gives out the root and the nodes; the leaves follow them.
pub fn emit(index: &Index, identity: Identity, out: &mut dyn FnMut(&Block) -> Result<()>) -> Result<()> {
    let nodes = index.nodes();
    let first_leaf = 1 + nodes;
    let levels = u8::from(nodes > 0);

    let mut root = ZERO_BLOCK;
    put_entry(&mut root, 0, 12, b".", identity.number, 2);
    put_entry(&mut root, 12, BLOCK_SIZE - 12, b"..", identity.parent, 2);
    // `dx_root_info`: reserved, hash_version, info_length, indirect_levels, unused_flags.
    root[24..ROOT_AT].copy_from_slice(&[0, 0, 0, 0, feature::HALF_MD4, 8, levels, 0]);
    if nodes == 0 {
        let children = index.leaves.iter().enumerate().map(|(number, leaf)| (leaf.hash, first_leaf + number));
        put_index(&mut root, ROOT_AT, ROOT_LIMIT, children, identity.seed)?;
        return out(&root);
    }
    let firsts = index.leaves.chunks(NODE_LIMIT).filter_map(<[Leaf]>::first);
    let children = firsts.enumerate().map(|(number, leaf)| (leaf.hash, 1 + number));
    put_index(&mut root, ROOT_AT, ROOT_LIMIT, children, identity.seed)?;
    out(&root)?;
    for (number, leaves) in index.leaves.chunks(NODE_LIMIT).enumerate() {
        let mut node = ZERO_BLOCK;
        put_entry(&mut node, 0, BLOCK_SIZE, b"", 0, 0);
        let first = first_leaf + number * NODE_LIMIT;
        let children = leaves.iter().enumerate().map(|(number, leaf)| (leaf.hash, first + number));
        put_index(&mut node, NODE_AT, NODE_LIMIT, children, identity.seed)?;
        out(&node)?;
    }
    Ok(())
}

/// Writes an index, and its checksum behind it (`ext4_dx_csum`: over all up to the last entry, and an empty tail).
fn put_index(
    block: &mut Block,
    at: usize,
    limit: usize,
    children: impl Iterator<Item = (u32, usize)>,
    seed: Checksum,
) -> Result<()> {
    let mut count = 0;
    for (hash, child) in children {
        if count == limit {
            return Err(changed());
        }
        let entry = DxEntry { hash: U32::new(hash), block: U32::new(child as u32) };
        let to = at + count * size_of::<DxEntry>();
        block[to..to + size_of::<DxEntry>()].copy_from_slice(entry.as_bytes());
        count += 1;
    }
    // The first entry has no hash: everything below the second is in it.
    let count_limit = (limit as u32) | (count as u32) << 16;
    block[at..at + 4].copy_from_slice(&count_limit.to_le_bytes());
    let end = at + count * size_of::<DxEntry>();
    let tail = at + limit * size_of::<DxEntry>();
    let checksum = seed.add(&block[..end]).add(&[0; 8]).value();
    block[tail + 4..tail + 8].copy_from_slice(&checksum.to_le_bytes());
    Ok(())
}
