//! A stack of layers whose entries meet: few names, all kinds, marks, links, paths that climb. An error or a result, soon.
#![no_main]

mod input;

use firstread::build::{Limits, flatten};
use input::Input;
use libfuzzer_sys::fuzz_target;

impl Input<'_> {
    fn path(&mut self) -> String {
        let parts = ["a", "b", "c", "d", "..", ".", "", "e"];
        let shape = self.byte();
        let names: Vec<&str> = (0..=shape % 4).map(|_| parts[usize::from(self.byte()) % parts.len()]).collect();
        let start = if shape & 0x80 != 0 { "/" } else { "" };
        format!("{start}{}", names.join("/"))
    }
}

fuzz_target!(|input: &[u8]| {
    let mut input = Input(input);
    let mut layers = vec![Vec::new()];
    while !input.0.is_empty() && layers.len() <= 5 {
        let (decision, path) = (input.byte(), input.path());
        let (kind, path, link, data) = match decision % 11 {
            0 => (b'5', path, String::new(), 0),
            1 => (b'0', path, String::new(), usize::from(input.byte()) * 3),
            2 => (b'0', path, String::new(), 65_536 + usize::from(input.byte()) * 1024),
            3 => (b'2', path, input.path(), 0),
            4 => (b'1', path, input.path(), 0),
            5 => (b'6', path, String::new(), 0),
            6 => (b'3', path, String::new(), 0),
            7 => (b'0', format!("{path}/.wh..wh..opq"), String::new(), 0),
            8 => (b'0', format!(".wh.{path}"), String::new(), 0),
            9 => {
                let (parent, name) = path.rsplit_once('/').unwrap_or(("", &path));
                (b'0', format!("{parent}/.wh.{name}"), String::new(), 0)
            }
            _ => {
                layers.push(Vec::new());
                continue;
            }
        };
        let layer = layers.last_mut().unwrap();
        let mut header = [0; 512];
        header[..path.len()].copy_from_slice(path.as_bytes());
        header[100..108].copy_from_slice(b"0000644\0");
        header[108..116].copy_from_slice(b"0000000\0");
        header[116..124].copy_from_slice(b"0000000\0");
        header[124..136].copy_from_slice(format!("{data:011o}\0").as_bytes());
        header[136..148].copy_from_slice(b"00000000000\0");
        header[156] = kind;
        header[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header[257..265].copy_from_slice(b"ustar\x0000");
        header[329..337].copy_from_slice(b"0000001\0");
        header[337..345].copy_from_slice(b"0000003\0");
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        layer.extend_from_slice(&header);
        layer.resize((layer.len() + data).next_multiple_of(512), decision);
    }
    let limits =
        Limits { plain_bytes: 16 << 20, entries: 1000, name_bytes: 1 << 20, depth: 50, layers: 6, ..Limits::default() };
    let _ = flatten(layers, &limits);
});
