//! Generated stacks of layers, and a simple model of what they mean: a map from paths to nodes, in which whiteouts and opaque
//! marks are one rule.

#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;

use ::tar::{Builder, EntryType, Header};
use proptest::collection::vec;
use proptest::prelude::*;

#[derive(Clone, Debug)]
pub enum What {
    Dir,
    /// Bytes of content; what they are follows from the number of the entry.
    File(usize),
    Symlink(String),
    Hard(String),
    Fifo,
    Whiteout,
    Opaque,
}

#[derive(Clone, Debug)]
pub struct Item {
    pub path: String,
    pub what: What,
    pub mode: u32,
    pub uid: u32,
    pub time: u64,
}

pub type Stack = Vec<Vec<Item>>;

/// Few names, so that entries meet.
fn path() -> impl Strategy<Value = String> {
    let name = prop_oneof![8 => "[abc]", 1 => Just("..".to_owned()), 1 => Just(".".to_owned())];
    (prop_oneof![6 => Just(""), 1 => Just("/"), 1 => Just("./"), 1 => Just("../")], vec(name, 0..3), "[abcd]")
        .prop_map(|(prefix, names, last)| format!("{prefix}{}", [names, vec![last]].concat().join("/")))
}

fn item() -> impl Strategy<Value = Item> {
    let what = prop_oneof![
        5 => Just(What::Dir),
        // Small ones, and those with chunks of their own.
        5 => prop_oneof![Just(0), 1..9000usize, Just(65_535), Just(65_536), Just(300_000)].prop_map(What::File),
        2 => path().prop_map(What::Symlink),
        2 => path().prop_map(What::Hard),
        1 => Just(What::Fifo),
        4 => Just(What::Whiteout),
        2 => Just(What::Opaque),
    ];
    (path(), what, 0..0o10000u32, 0..3_000_000_000u32, 0..1u64 << 33).prop_map(|(path, what, mode, uid, time)| Item {
        path,
        what,
        mode,
        uid,
        time,
    })
}

/// An entry, and often a mark on a directory above it: of one layer, the mark must hide around what the layer has itself.
fn met() -> impl Strategy<Value = Vec<Item>> {
    let mark = prop_oneof![Just(What::Whiteout), Just(What::Opaque)];
    (item(), prop::option::weighted(0.2, (mark, 1..3usize))).prop_map(|(item, mark)| {
        let mut items = vec![item];
        if let Some((what, levels)) = mark {
            let names: Vec<&str> = items[0].path.split('/').collect();
            let path = names[..names.len().saturating_sub(levels)].join("/");
            if path.contains(['a', 'b', 'c']) && !path.ends_with('.') {
                items.push(Item { path, what, ..items[0].clone() });
            }
        }
        items
    })
}

pub fn stack() -> impl Strategy<Value = Stack> {
    let any = || vec(vec(met(), 0..8).prop_map(|items| items.concat()), 1..5);
    // Of those left as they are, most have no meaning.
    prop_oneof![3 => any().prop_map(legal), 1 => any()]
}

/// Without the entries that have no meaning after those before them.
fn legal(stack: Stack) -> Stack {
    let mut model = Model::default();
    let layer = |items: Vec<Item>| {
        model.layer += 1;
        let mut left = Vec::new();
        for item in items {
            let mut next = model.clone();
            if next.apply(&item, 0).is_ok() {
                model = next;
                left.push(item);
            }
        }
        left
    };
    stack.into_iter().map(layer).collect()
}

pub fn content(number: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 7 * (number + 3) + at % 7 + 1) as u8 | 1).collect()
}

/// The tar of a layer; `first` is the number of its first entry.
pub fn tar(items: &[Item], first: usize) -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    for (number, item) in (first..).zip(items) {
        let (parent, name) = item.path.rsplit_once('/').map_or(("", &*item.path), |(parent, name)| (parent, name));
        let join = |name: &str| if item.path.contains('/') { format!("{parent}/{name}") } else { name.to_owned() };
        let (path, kind, link, content) = match &item.what {
            What::Dir => (item.path.clone(), EntryType::Directory, "", Vec::new()),
            What::File(len) => (item.path.clone(), EntryType::Regular, "", content(number, *len)),
            What::Symlink(target) => (item.path.clone(), EntryType::Symlink, &**target, Vec::new()),
            What::Hard(target) => (item.path.clone(), EntryType::Link, &**target, Vec::new()),
            What::Fifo => (item.path.clone(), EntryType::Fifo, "", Vec::new()),
            What::Whiteout => (join(&format!(".wh.{name}")), EntryType::Regular, "", Vec::new()),
            What::Opaque => (format!("{}/.wh..wh..opq", item.path), EntryType::Regular, "", Vec::new()),
        };
        let mut header = Header::new_gnu();
        let bytes = header.as_mut_bytes();
        bytes[..path.len()].copy_from_slice(path.as_bytes());
        bytes[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(item.mode);
        header.set_uid(u64::from(item.uid));
        header.set_gid(u64::from(item.uid / 2));
        header.set_mtime(item.time);
        header.set_size(content.len() as u64);
        header.set_cksum();
        tar.append(&header, &content[..]).unwrap();
    }
    tar.into_inner().unwrap()
}

// --- the model -----------------------------------------------------------------------------------------------------

pub type Names = Vec<String>;

#[derive(Clone, Debug)]
pub struct Inode {
    /// `None` for a directory.
    pub leaf: Option<Leaf>,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub time: i64,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Leaf {
    File(usize, usize),
    Symlink(String),
    Fifo,
}

/// A path's inode, and the layer that set it.
pub type Map = BTreeMap<Names, (usize, usize)>;

#[derive(Clone, Default)]
pub struct Model {
    pub map: Map,
    pub inodes: Vec<Inode>,
    layer: usize,
}

/// A stack that has no meaning.
pub struct Illegal;

impl Model {
    pub fn of(stack: &Stack) -> Result<Self, Illegal> {
        let mut model = Self::default();
        let mut number = 0;
        for items in stack {
            model.layer += 1;
            for item in items {
                model.apply(item, number)?;
                number += 1;
            }
        }
        Ok(model)
    }

    fn inode(&self, path: &Names) -> Option<&Inode> {
        self.map.get(path).map(|(inode, _)| &self.inodes[*inode])
    }

    pub fn is_dir(&self, path: &Names) -> bool {
        path.is_empty() || self.inode(path).is_some_and(|inode| inode.leaf.is_none())
    }

    /// Where a path's parent really is; missing directories are made if `make` is there.
    fn parent(&mut self, names: &[String], make: Option<()>) -> Result<Option<Names>, Illegal> {
        let mut at = Names::new();
        let mut left: Vec<String> = names.iter().rev().cloned().collect();
        let mut links = 0;
        while let Some(name) = left.pop() {
            match &*name {
                "" | "." => continue,
                ".." => {
                    at.pop();
                    continue;
                }
                _ => at.push(name),
            }
            match self.inode(&at).map(|inode| inode.leaf.clone()) {
                Some(None) => {}
                Some(Some(Leaf::Symlink(target))) => {
                    links += 1;
                    if links > 255 {
                        return Err(Illegal);
                    }
                    at.pop();
                    if target.starts_with('/') {
                        at.clear();
                    }
                    left.extend(target.split('/').rev().map(str::to_owned));
                }
                Some(Some(_)) if make.is_some() => return Err(Illegal),
                None if make.is_some() => {
                    self.put(at.clone(), Inode { leaf: None, mode: 0o755, uid: 0, gid: 0, time: 0 })
                }
                _ => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    fn put(&mut self, path: Names, inode: Inode) {
        if inode.leaf.is_none() && self.inode(&path).is_some_and(|there| there.leaf.is_none()) {
            let (there, layer) = self.map.get_mut(&path).unwrap();
            *layer = self.layer;
            self.inodes[*there] = inode;
            return;
        }
        self.inodes.push(inode);
        self.name(path, self.inodes.len() - 1);
    }

    fn name(&mut self, path: Names, inode: usize) {
        self.map.retain(|other, _| !other.starts_with(&path));
        self.map.insert(path, (inode, self.layer));
    }

    /// Whiteouts: what lower layers had goes, unless it holds something of this layer.
    fn hide(&mut self, hidden: impl Fn(&Names) -> bool) {
        let own: Vec<Names> =
            self.map.iter().filter(|(_, (_, layer))| *layer == self.layer).map(|(path, _)| path.clone()).collect();
        self.map.retain(|path, _| !hidden(path) || own.iter().any(|own| own.starts_with(path)));
    }

    fn apply(&mut self, item: &Item, number: usize) -> Result<(), Illegal> {
        let clean = |path: &str| {
            let mut names = Names::new();
            for name in path.split('/') {
                match name {
                    "" | "." => {}
                    ".." => drop(names.pop()),
                    name => names.push(name.to_owned()),
                }
            }
            names
        };
        let mut path = clean(&item.path);
        let meta = |leaf: Option<Leaf>| Inode {
            mode: if matches!(leaf, Some(Leaf::Symlink(_))) { 0o777 } else { item.mode },
            leaf,
            uid: item.uid,
            gid: item.uid / 2,
            time: item.time as i64,
        };
        if let What::Opaque = item.what {
            if let Some(dir) = self.parent(&path, None)? {
                self.hide(|path| path.len() > dir.len() && path.starts_with(&dir));
            }
            return Ok(());
        }
        // The last component is a name, whatever is before it.
        let name = path.pop().unwrap();
        if let What::Whiteout = item.what {
            if let Some(mut gone) = self.parent(&path, None)? {
                gone.push(name);
                self.hide(|path| path.starts_with(&gone));
            }
            return Ok(());
        }
        let mut place = self.parent(&path, Some(()))?.unwrap();
        place.push(name);
        match &item.what {
            What::Dir => self.put(place, meta(None)),
            What::File(len) => self.put(place, meta(Some(Leaf::File(number, *len)))),
            What::Symlink(target) => self.put(place, meta(Some(Leaf::Symlink(target.clone())))),
            What::Fifo => self.put(place, meta(Some(Leaf::Fifo))),
            What::Hard(target) => {
                let mut names = clean(target);
                let last = names.pop().ok_or(Illegal)?;
                let mut target = self.parent(&names, None)?.ok_or(Illegal)?;
                target.push(last);
                let (inode, _) = *self.map.get(&target).ok_or(Illegal)?;
                let leaf = self.inodes[inode].leaf.clone();
                self.inodes[inode] = meta(Some(leaf.ok_or(Illegal)?));
                if target != place {
                    self.name(place, inode);
                }
            }
            What::Whiteout | What::Opaque => unreachable!(),
        }
        Ok(())
    }
}
