//! Generated stacks of layers against the model that the tests of whole builds use.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::sync::Arc;

use proptest::test_runner::{Config, TestRunner};

use self::layer_model::{Illegal, Leaf, Model, Names, stack, tar};
use super::{Content, Kind, NodeId, ROOT, Rootfs, Whiteouts};
use crate::build::intake::Intake;
use crate::build::limits::Limits;
use crate::build::pipeline::{Pipeline, Reusable, Settings};
use crate::build::progress::Silent;
use crate::build::{Tree, layer};

#[path = "../../../tests/common/layer_model.rs"]
mod layer_model;

const CASES: u32 = 2000;

fn flattened(tars: &[Vec<u8>]) -> crate::Result<Rootfs> {
    let temp = std::env::temp_dir();
    let settings = Settings {
        level: 1,
        workers: 1,
        temp: &temp,
        reusable: Reusable::new(),
        known: Arc::default(),
        progress: Arc::new(Silent),
        leaves: Tree::None,
    };
    let mut intake = Intake::new(Pipeline::start(settings)?, &temp)?;
    let mut rootfs = Rootfs::new(&Limits::default());
    for tar in tars {
        rootfs.next_layer();
        layer::apply(&tar[..], &mut rootfs, &mut intake, Whiteouts::Apply, None)?;
    }
    Ok(rootfs)
}

/// One line for each path, in order. Paths of one inode have the number of the first of them.
fn lines(mut nodes: Vec<(Names, u64, String)>) -> String {
    nodes.sort();
    let mut known = Vec::new();
    let number = |inode: u64, known: &mut Vec<u64>| {
        known.iter().position(|other| *other == inode).unwrap_or_else(|| {
            known.push(inode);
            known.len() - 1
        })
    };
    let line = |(path, inode, text): &(Names, u64, String)| {
        format!("{} {} {text}\n", path.join("/"), number(*inode, &mut known))
    };
    nodes.iter().map(line).collect()
}

fn of_rootfs(rootfs: &Rootfs) -> String {
    let mut nodes = Vec::new();
    let mut stack: Vec<(Names, NodeId)> = vec![(Names::new(), ROOT)];
    while let Some((path, dir)) = stack.pop() {
        for (name, entry) in rootfs.names(dir).unwrap() {
            let path: Names = path.iter().cloned().chain([String::from_utf8(name.to_vec()).unwrap()]).collect();
            let node = rootfs.node(entry.node).unwrap();
            let kind = match &node.kind {
                Kind::Directory(_) => {
                    stack.push((path.clone(), entry.node));
                    "directory".to_owned()
                }
                Kind::File(Content::Small { bytes, .. }) => format!("file {bytes}"),
                Kind::File(Content::Large { bytes, .. }) => format!("file {bytes}"),
                Kind::Symlink(target) => format!("link {}", String::from_utf8_lossy(target)),
                Kind::Fifo => "fifo".to_owned(),
                other => panic!("{other:?}"),
            };
            let meta = &node.meta;
            let text = format!("{kind} {:o} {} {} {}", meta.mode, meta.uid, meta.gid, meta.mtime.secs);
            nodes.push((path, u64::from(entry.node), text));
        }
    }
    lines(nodes)
}

fn of_model(model: &Model) -> String {
    let nodes = model.map.iter().map(|(path, (number, _))| {
        let inode = &model.inodes[*number];
        let kind = match &inode.leaf {
            None => "directory".to_owned(),
            Some(Leaf::File(_, len)) => format!("file {len}"),
            Some(Leaf::Symlink(target)) => format!("link {target}"),
            Some(Leaf::Fifo) => "fifo".to_owned(),
        };
        let text = format!("{kind} {:o} {} {} {}", inode.mode, inode.uid, inode.gid, inode.time);
        (path.clone(), *number as u64, text)
    });
    lines(nodes.collect())
}

#[test]
fn any_stack_of_layers_is_what_the_model_says() {
    let config = Config { cases: CASES, max_shrink_iters: 2000, failure_persistence: None, ..Config::default() };
    let legal = std::cell::Cell::new(0);
    let result = TestRunner::new(config).run(&stack(), |stack| {
        let tars: Vec<Vec<u8>> = stack.iter().map(|items| tar(items, 0)).collect();
        match (Model::of(&stack), flattened(&tars)) {
            (Ok(model), Ok(rootfs)) => {
                legal.set(legal.get() + 1);
                proptest::prop_assert_eq!(of_model(&model), of_rootfs(&rootfs));
            }
            (Err(Illegal), Err(_)) => {}
            (Ok(_), Err(error)) => proptest::prop_assert!(false, "refused: {error}"),
            (Err(Illegal), Ok(_)) => proptest::prop_assert!(false, "flattened, and has no meaning"),
        }
        Ok(())
    });
    assert!(result.is_ok(), "{}", result.unwrap_err());
    assert!(legal.get() > CASES / 2, "{} of {CASES} have a meaning", legal.get());
}
