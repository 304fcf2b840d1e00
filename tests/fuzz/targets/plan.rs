//! Any tree and options through the file system's planner: an error, or metadata in order and within its bounds, and data
//! that does not overlap.
#![no_main]

mod input;

use firstread::ext4::{BLOCK_SIZE, Inode, InodeId, Kind, Options, Segment, Time, Tree, plan};
use input::Input;
use libfuzzer_sys::fuzz_target;

impl Input<'_> {
    fn word(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }

    /// Mostly small, seldom anything.
    fn number(&mut self) -> u32 {
        if self.byte() < 200 { u32::from(self.byte()) } else { self.word() }
    }

    fn text(&mut self) -> Vec<u8> {
        let len = match self.byte() {
            long @ 250.. => usize::from(long) * 17,
            short => usize::from(short) % 20,
        };
        let byte = self.byte();
        (0..len).map(|at| byte.wrapping_add(at as u8)).collect()
    }

    fn kind(&mut self) -> Kind {
        match self.byte() % 9 {
            0..=2 => Kind::Directory(Vec::new()),
            3 => Kind::file(u64::from(self.number()) * u64::from(self.byte())),
            4 => {
                let mut at = 0u32;
                let segments = (0..self.byte() % 20)
                    .map(|_| {
                        let segment =
                            Segment { file_block: at.wrapping_add(self.number()), blocks: self.number() % 100_000 };
                        at = segment.file_block.wrapping_add(segment.blocks);
                        segment
                    })
                    .collect();
                Kind::File { size: u64::from(self.word()) << (self.byte() % 16), segments }
            }
            5 => Kind::Symlink(self.text().into()),
            6 => Kind::CharDevice { major: self.number(), minor: self.number() },
            7 => Kind::Fifo,
            _ => Kind::Socket,
        }
    }

    fn inode(&mut self, kind: Kind) -> Inode {
        let prefixes: [&[u8]; 6] = [b"user.", b"trusted.", b"security.", b"system.posix_acl_access", b"other.", b""];
        let xattrs = (0..self.byte().saturating_sub(200) % 8)
            .map(|_| ([prefixes[usize::from(self.byte()) % 6], &self.text()].concat().into(), self.text().into()))
            .collect();
        Inode {
            mode: u16::from_le_bytes(self.bytes()),
            uid: self.word(),
            gid: self.word(),
            mtime: Time { secs: i64::from_le_bytes(self.bytes()), nanos: self.word() % 1_100_000_000 },
            xattrs,
            kind,
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let mut input = Input(input);
    let root = input.inode(Kind::Directory(Vec::new()));
    let mut tree = Tree::new(root);
    let mut options = Options { seed: [input.byte(); 32], ..Options::default() };
    // At most 64 GiB: metadata grow with what is asked for.
    if input.byte() % 4 == 0 {
        options.size = Some(u64::from(input.word()) << (input.byte() % 5));
    }
    options.data_align_blocks = input.number().wrapping_add(1);
    while !input.0.is_empty() && tree.len() < 500 {
        let any = |input: &mut Input<'_>, tree: &Tree| InodeId(input.word() % (tree.len() as u32 + 1));
        match input.byte() % 8 {
            0 => {
                let (dir, id, name) = (any(&mut input, &tree), any(&mut input, &tree), input.text());
                let _ = tree.link(dir, &name, id);
            }
            1 => options.hot.push(any(&mut input, &tree)),
            2 => options.data_order.push(any(&mut input, &tree)),
            decision => {
                let kind = input.kind();
                let inode = input.inode(kind);
                let (dir, name) = (any(&mut input, &tree), input.text());
                let Ok(id) = tree.add(inode) else { continue };
                let _ = tree.link(dir, &name, id);
                // Directories of many names.
                for number in 0..if decision == 7 { input.byte() } else { 0 } {
                    let _ = tree.link(dir, format!("{number:0200}").as_bytes(), id);
                }
            }
        }
    }
    let Ok(plan) = plan(&tree, &options) else { return };
    assert!(plan.device_bytes() >= u64::from(plan.data_blocks().end) * BLOCK_SIZE as u64);
    assert!(options.size.is_none_or(|size| plan.device_bytes() <= size));
    let mut end = 0;
    let written = plan.write_metadata(&tree, &mut |block, bytes| {
        assert!(block >= end && !bytes.is_empty() && bytes.len() % BLOCK_SIZE == 0);
        end = block + (bytes.len() / BLOCK_SIZE) as u64;
        assert!(end <= u64::from(plan.metadata_blocks()));
        Ok(())
    });
    assert!(written.is_ok(), "{written:?}");
    // Data follow each other without a gap.
    let mut places = Vec::new();
    for id in (0..tree.len() as u32).map(InodeId) {
        if let (Some(start), Some(Inode { kind: Kind::File { segments, .. }, .. })) =
            (plan.data_start(id), tree.get(id))
        {
            places.push((start, segments.iter().map(|segment| segment.blocks).sum::<u32>()));
        }
    }
    places.sort_unstable();
    let mut at = plan.data_blocks().start;
    for (start, blocks) in places {
        assert_eq!(start, at);
        at += blocks;
    }
    assert_eq!(at, plan.data_blocks().end);
});
