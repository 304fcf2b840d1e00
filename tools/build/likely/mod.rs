//! What a start of an image will probably read, when nobody recorded one: the program that its config names, what that
//! needs to run (the interpreter of a script, the dynamic linker, libraries and theirs), and the files that its command
//! names.
//!
//! It is a guess: what can't be found, is malformed or too much is left out. It depends on the image alone.

mod contents;
mod elf;
mod libraries;

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::ops::Range;

use serde_json::Value;

use self::contents::Opened;
use self::elf::{Fits, Object};
use super::intake::pieces;
use super::rootfs::{Content, Kind, NodeId, clean};
use crate::error::Result;
use crate::ext4::BLOCK_SIZE;

pub(super) use self::contents::Contents;

/// Most files that are looked into.
const FILES: usize = 512;
/// Most plain bytes of what is guessed.
const MOST: u64 = 64 << 20;
/// A file of at most so many bytes is read whole, probably; of a larger one only what links it is sure.
const WHOLE: u64 = 6 << 20;
/// Longest first line of a script in bytes.
const LINE: u64 = 256;
/// Scripts that run one another.
const SCRIPTS: usize = 4;
/// Where programs are without a PATH (as container runtimes set it).
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What an image's config runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Command {
    entrypoint: Vec<String>,
    arguments: Vec<String>,
    path: Vec<String>,
    library_path: String,
    directory: String,
}

impl Command {
    /// What `config` says; nothing where it says nothing that could be run.
    pub(super) fn of(config: &Value) -> Self {
        let list = |key: &str| -> Vec<String> {
            let words = config.pointer(key).and_then(Value::as_array).into_iter().flatten();
            words.filter_map(Value::as_str).map(str::to_owned).collect()
        };
        let env = list("/config/Env");
        let variable = |name: &str| {
            let found = env.iter().rev().filter_map(|entry| entry.split_once('=')).find(|(key, _)| *key == name);
            found.map(|(_, value)| value)
        };
        Self {
            entrypoint: list("/config/Entrypoint"),
            arguments: list("/config/Cmd"),
            path: variable("PATH").unwrap_or(PATH).split(':').map(str::to_owned).collect(),
            library_path: variable("LD_LIBRARY_PATH").unwrap_or_default().to_owned(),
            directory: config.pointer("/config/WorkingDir").and_then(Value::as_str).unwrap_or("/").to_owned(),
        }
    }

    /// The program that it begins with, as it is called.
    pub(super) fn program(&self) -> Option<&str> {
        self.entrypoint.first().or(self.arguments.first()).map(String::as_str)
    }

    fn absolute(&self, path: &str) -> String {
        if path.starts_with('/') { path.to_owned() } else { format!("{}/{path}", self.directory) }
    }
}

/// What will probably be read.
#[derive(Debug, Default)]
pub(super) struct Likely {
    /// Directories, links and files in the order in which they are looked up.
    pub nodes: Vec<NodeId>,
    /// Data, in the order in which it is read.
    pub data: Vec<Data>,
}

/// Some of a file's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Data {
    /// A piece of a large file: its job.
    Piece(u32),
    /// A small file.
    Small(NodeId),
}

/// Guesses what a start of `command` reads.
///
/// # Errors
/// What the spools or an earlier image's place say.
pub(super) fn guess(command: &Command, contents: &Contents<'_>) -> Result<Likely> {
    if command.entrypoint.is_empty() && command.arguments.is_empty() {
        return Ok(Likely::default());
    }
    contents.pipeline.wait()?;
    let mut guess = Guess { contents, dirs: Vec::new(), found: Vec::new(), known: HashSet::new() };
    guess.dirs = libraries::directories(&guess)?;
    guess.command(command)?;
    Ok(guess.finish())
}

/// A file that will be read.
struct Found {
    path: Vec<u8>,
    node: NodeId,
    /// What of it is read first.
    linked: Vec<Range<u64>>,
}

struct Guess<'a> {
    contents: &'a Contents<'a>,
    /// Where libraries are.
    dirs: Vec<Vec<u8>>,
    found: Vec<Found>,
    known: HashSet<NodeId>,
}

impl Guess<'_> {
    /// What is at a path, links followed.
    fn find(&self, path: &[u8]) -> Option<NodeId> {
        self.contents.rootfs.resolve(&clean(path), &mut Vec::new())
    }

    /// The first `len` bytes of a file.
    fn read(&self, node: NodeId, len: u64) -> Result<Vec<u8>> {
        self.contents.read(node, 0, len, &mut Opened::default())
    }

    fn command(&mut self, command: &Command) -> Result<()> {
        let all = || command.entrypoint.iter().chain(&command.arguments);
        // A script that is the entry point runs the arguments, as a rule.
        let programs = [command.entrypoint.first(), command.arguments.first()];
        for word in programs.into_iter().flatten() {
            if let Some(path) = self.program(word, command) {
                self.run(path, command)?;
            }
        }
        for word in all().filter(|word| word.contains('/')) {
            let path = command.absolute(word);
            if let Some(node) = self.find(path.as_bytes()) {
                self.add(path.as_bytes(), node, Vec::new());
            }
        }
        Ok(())
    }

    /// The path of a program.
    fn program(&self, word: &str, command: &Command) -> Option<String> {
        let is_program = |path: &String| {
            let node = self.find(path.as_bytes()).and_then(|node| self.contents.rootfs.node(node).ok());
            node.is_some_and(|node| matches!(node.kind, Kind::File(_)) && node.meta.mode & 0o111 != 0)
        };
        if word.contains('/') {
            return Some(command.absolute(word)).filter(is_program);
        }
        command.path.iter().map(|dir| command.absolute(&format!("{dir}/{word}"))).find(is_program)
    }

    /// A program runs, and what its first line names if it is a script.
    fn run(&mut self, path: String, command: &Command) -> Result<()> {
        let mut path = path;
        for _ in 0..SCRIPTS {
            let Some(node) = self.find(path.as_bytes()) else { return Ok(()) };
            let line = self.read(node, LINE)?;
            let Some(line) = line.strip_prefix(b"#!") else { return self.object(path.into_bytes(), node, command) };
            self.add(path.as_bytes(), node, Vec::new());
            let line = line.split(|byte| *byte == b'\n').next().unwrap_or_default();
            let Ok(line) = std::str::from_utf8(line) else { return Ok(()) };
            let mut words = line.split_ascii_whitespace();
            let Some(interpreter) = words.next() else { return Ok(()) };
            // `env` looks its first word up that is neither an option nor a variable.
            let named = words.find(|word| !word.starts_with('-') && !word.contains('='));
            let env = interpreter.ends_with("/env").then_some(named).flatten();
            if let Some(next) = env.and_then(|word| self.program(word, command)) {
                self.object_at(interpreter.as_bytes(), command)?;
                path = next;
            } else {
                interpreter.clone_into(&mut path);
            }
        }
        Ok(())
    }

    fn object_at(&mut self, path: &[u8], command: &Command) -> Result<()> {
        self.find(path).map_or(Ok(()), |node| self.object(path.to_vec(), node, command))
    }

    fn look(&self, node: NodeId) -> Result<Option<Object>> {
        let mut opened = Opened::default();
        elf::look(&mut |offset, len| self.contents.read(node, offset, len, &mut opened))
    }

    /// A program, its dynamic linker and its libraries, breadth first as the linker loads them.
    fn object(&mut self, path: Vec<u8>, node: NodeId, command: &Command) -> Result<()> {
        let Some(program) = self.look(node)? else { return Ok(()) };
        self.add(&path, node, program.linked.clone());
        if let Some(linker) = program.interpreter.clone()
            && let Some(node) = self.find(&linker)
        {
            let linked = self.look(node)?.map(|linker| linker.linked).unwrap_or_default();
            self.add(&linker, node, linked);
            for cache in [b"/etc/ld.so.cache".as_slice(), b"/etc/ld.so.preload"] {
                if let Some(node) = self.find(cache) {
                    self.add(cache, node, Vec::new());
                }
            }
        }
        let fits = program.fits;
        let usual = [libraries::split(command.library_path.as_bytes(), b""), self.dirs.clone()];
        let mut inherited: Vec<Vec<u8>> = Vec::new();
        let mut names = HashSet::new();
        let mut queue = VecDeque::from([(path, program)]);
        while let Some((path, object)) = queue.pop_front() {
            let origin =
                path.iter().rposition(|byte| *byte == b'/').and_then(|end| path.get(..end)).unwrap_or_default();
            let own =
                |list: &Option<Vec<u8>>| list.as_deref().map(|list| libraries::split(list, origin)).unwrap_or_default();
            if object.runpath.is_none() {
                inherited.extend(own(&object.rpath));
            }
            let [library_path, dirs] = &usual;
            let all = [&inherited, library_path, &own(&object.runpath), dirs].map(Clone::clone).concat();
            for name in object.needed {
                if !names.insert(name.clone()) || self.found.len() >= FILES {
                    continue;
                }
                let mut library = None;
                let fit = |node| self.fit(node, fits, &mut library);
                let Some(path) = libraries::search(self, &name, &all, fit)? else { continue };
                let (Some(node), Some(library)) = (self.find(&path), library) else { continue };
                if self.add(&path, node, library.linked.clone()) {
                    queue.push_back((path, library));
                }
            }
        }
        Ok(())
    }

    /// Whether a file is a library that fits; says what it is.
    fn fit(&self, node: NodeId, fits: Fits, library: &mut Option<Object>) -> Result<bool> {
        *library = self.look(node)?.filter(|object| object.fits == fits);
        Ok(library.is_some())
    }

    /// Adds a file; whether it was not there.
    fn add(&mut self, path: &[u8], node: NodeId, linked: Vec<Range<u64>>) -> bool {
        let new = self.found.len() < FILES && self.contents.len(node) > 0 && self.known.insert(node);
        if new {
            self.found.push(Found { path: path.to_vec(), node, linked });
        }
        new
    }

    /// What links all files first, since nothing runs before that; then the rest of what is read whole.
    fn finish(self) -> Likely {
        let rootfs = self.contents.rootfs;
        let mut likely = Likely::default();
        let mut seen = HashSet::new();
        for found in &self.found {
            let mut trail = Vec::new();
            rootfs.resolve(&clean(&found.path), &mut trail);
            likely.nodes.extend(trail.into_iter().filter(|node| seen.insert(*node)));
        }
        let all = 0..u64::MAX;
        let mut left = MOST;
        let mut taken = HashSet::new();
        for whole in [false, true] {
            for found in &self.found {
                let parts = match (whole, found.linked.as_slice()) {
                    (false, linked) => linked,
                    (true, []) => std::slice::from_ref(&all),
                    (true, _) if self.contents.len(found.node) <= WHOLE => std::slice::from_ref(&all),
                    (true, _) => &[],
                };
                for (data, bytes) in self.data(found.node, parts) {
                    let Some(rest) = left.checked_sub(bytes) else { return likely };
                    if taken.insert(data) {
                        left = rest;
                        likely.data.push(data);
                    }
                }
            }
        }
        likely
    }

    /// The data of a file that meets `parts`, ascending, with its length.
    fn data(&self, node: NodeId, parts: &[Range<u64>]) -> Vec<(Data, u64)> {
        let meets = |start: u64, end: u64| parts.iter().any(|part| part.start < end && start < part.end);
        match self.contents.rootfs.node(node).map(|node| &node.kind) {
            Ok(Kind::File(Content::Small { bytes, .. })) if meets(0, u64::from(*bytes)) => {
                vec![(Data::Small(node), u64::from(*bytes))]
            }
            Ok(Kind::File(Content::Large { runs, .. })) => {
                let mut found = BTreeMap::new();
                for run in runs {
                    for (number, (block, blocks)) in pieces(run.segment).enumerate() {
                        let (start, len) =
                            (u64::from(block) * BLOCK_SIZE as u64, u64::from(blocks) * BLOCK_SIZE as u64);
                        if meets(start, start + len) {
                            found.insert(block, (Data::Piece(run.job + number as u32), len));
                        }
                    }
                }
                found.into_values().collect()
            }
            _ => Vec::new(),
        }
    }
}
