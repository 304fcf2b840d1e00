//! What an ELF file says of its start: who loads it, what it needs, and what of it is read in any case.

use std::ops::Range;

use object::Endianness;
use object::elf::{self, FileHeader32, FileHeader64};
use object::pod::slice_from_all_bytes;
use object::read::elf::{Dyn as _, FileHeader, ProgramHeader as _};

/// Bytes at the front of a file in which its program headers must lie.
const HEAD: usize = 8 << 10;
/// Longest dynamic section in bytes.
const DYNAMIC: u64 = 64 << 10;
/// Longest name or path in it, or of the interpreter.
const NAME: u64 = 4 << 10;
/// Most libraries that one object names.
const NEEDED: usize = 256;
/// What is read of a file, as the caller gives it: empty or short where the file ends.
type ReadAt<'a, E> = &'a mut dyn FnMut(u64, u64) -> Result<Vec<u8>, E>;

/// What makes objects fit one another: class, byte order, machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fits {
    class: u8,
    data: u8,
    machine: u16,
}

/// A program or a library.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Object {
    pub fits: Fits,
    /// The dynamic linker.
    pub interpreter: Option<Vec<u8>>,
    /// Names of libraries, in order.
    pub needed: Vec<Vec<u8>>,
    /// Directories to look for them in, with colons: those that hold for what the libraries need as well,
    pub rpath: Option<Vec<u8>>,
    /// and those that hold for this object.
    pub runpath: Option<Vec<u8>>,
    /// Bytes of the file that the kernel and the dynamic linker read before anything of it runs: headers, symbols,
    /// relocations, and what these are applied to. Ascending, may overlap.
    pub linked: Vec<Range<u64>>,
}

/// Looks into a file; `None` when it is no ELF file that could be run or linked.
///
/// # Errors
/// What `read` says. What is wrong with the file is no error: nobody asked for it yet.
pub(super) fn look<E>(read: ReadAt<'_, E>) -> Result<Option<Object>, E> {
    let head = Aligned::new(&read(0, HEAD as u64)?);
    match head.bytes().get(..5) {
        Some([0x7f, b'E', b'L', b'F', 1]) => parse::<FileHeader32<Endianness>, E>(&head, read),
        Some([0x7f, b'E', b'L', b'F', 2]) => parse::<FileHeader64<Endianness>, E>(&head, read),
        _ => Ok(None),
    }
}

/// Bytes at an address that records of any kind may have.
struct Aligned {
    words: Vec<u64>,
    len: usize,
}

impl Aligned {
    fn new(bytes: &[u8]) -> Self {
        let word = |chunk: &[u8]| {
            let mut word = [0; 8];
            word.iter_mut().zip(chunk).for_each(|(to, from)| *to = *from);
            u64::from_ne_bytes(word)
        };
        Self { words: bytes.chunks(8).map(word).collect(), len: bytes.len() }
    }

    fn bytes(&self) -> &[u8] {
        object::pod::bytes_of_slice(&self.words).get(..self.len).unwrap_or_default()
    }
}

fn parse<Elf: FileHeader<Endian = Endianness>, E>(head: &Aligned, read: ReadAt<'_, E>) -> Result<Option<Object>, E> {
    let Ok(header) = Elf::parse(head.bytes()) else { return Ok(None) };
    let Ok(endian) = header.endian() else { return Ok(None) };
    let Ok(segments) = header.program_headers(endian, head.bytes()) else { return Ok(None) };
    let ident = header.e_ident();
    let fits = Fits { class: ident.class.0, data: ident.data.0, machine: header.e_machine(endian).0 };
    let mut object =
        Object { fits, interpreter: None, needed: Vec::new(), rpath: None, runpath: None, linked: Vec::new() };
    let mut loads: Vec<(u64, Range<u64>)> = Vec::new();
    let mut dynamic = Vec::new();
    for segment in segments {
        let (offset, len) = segment.file_range(endian);
        let range = offset..offset.saturating_add(len);
        match segment.p_type(endian) {
            elf::PT_LOAD => {
                // The writable one is relocated; the rest is in the way of nobody until something of it runs.
                if segment.p_flags(endian).0 & elf::PF_W.0 != 0 {
                    object.linked.push(range.clone());
                }
                loads.push((segment.p_vaddr(endian).into(), range));
            }
            elf::PT_INTERP => {
                let path = read(offset, len.min(NAME))?;
                object.interpreter = path.split(|byte| *byte == 0).next().map(<[u8]>::to_vec);
            }
            elf::PT_DYNAMIC => dynamic = read(offset, len.min(DYNAMIC))?,
            _ => {}
        }
    }
    object.linked.push(0..HEAD as u64);
    let entry = size_of::<<Elf as FileHeader>::Dyn>();
    dynamic.truncate(dynamic.len() / entry * entry);
    let dynamic = Aligned::new(&dynamic);
    let entries: &[Elf::Dyn] = slice_from_all_bytes(dynamic.bytes()).unwrap_or_default();
    let entries = entries.iter().map(|entry| (entry.tag(endian), entry.val(endian)));
    let entries: Vec<_> = entries.take_while(|(tag, _)| *tag != elf::DT_NULL).collect();
    let value = |wanted| entries.iter().find(|(tag, _)| *tag == wanted).map(|(_, value)| *value);
    let place = |address: u64| {
        loads.iter().find_map(|(start, range)| {
            let within = address.checked_sub(*start).filter(|within| *within < range.end - range.start)?;
            range.start.checked_add(within)
        })
    };
    let tables = [
        (elf::DT_STRTAB, elf::DT_STRSZ),
        (elf::DT_RELA, elf::DT_RELASZ),
        (elf::DT_REL, elf::DT_RELSZ),
        (elf::DT_RELR, elf::DT_RELRSZ),
        (elf::DT_JMPREL, elf::DT_PLTRELSZ),
    ];
    let table = |(start, len)| Some((place(value(start)?)?, value(len)?));
    object.linked.extend(tables.into_iter().filter_map(table).map(|(start, len)| start..start.saturating_add(len)));
    // The symbols lie before their names, as all linkers lay them.
    if let (Some(symbols), Some(names)) = (value(elf::DT_SYMTAB).and_then(place), value(elf::DT_STRTAB).and_then(place))
    {
        object.linked.push(symbols..names.max(symbols));
    }
    object.linked.sort_unstable_by_key(|range| (range.start, range.end));
    let Some(names) = value(elf::DT_STRTAB).and_then(place) else { return Ok(Some(object)) };
    let mut name = |at: u64| -> Result<Option<Vec<u8>>, E> {
        let bytes = read(names.saturating_add(at), NAME)?;
        let end = bytes.iter().position(|byte| *byte == 0);
        Ok(end.filter(|end| *end > 0).and_then(|end| bytes.get(..end)).map(<[u8]>::to_vec))
    };
    for (_, at) in entries.iter().filter(|(tag, _)| *tag == elf::DT_NEEDED).take(NEEDED) {
        object.needed.extend(name(*at)?);
    }
    if let Some(at) = value(elf::DT_RPATH) {
        object.rpath = name(at)?;
    }
    if let Some(at) = value(elf::DT_RUNPATH) {
        object.runpath = name(at)?;
    }
    Ok(Some(object))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::convert::Infallible;

    use super::*;

    fn looked(bytes: &[u8]) -> Option<Object> {
        let mut read = |offset: u64, len: u64| {
            assert!(len <= DYNAMIC, "{len}");
            let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
            Ok::<_, Infallible>(bytes[start..bytes.len().min(start + len as usize)].to_vec())
        };
        look(&mut read).unwrap()
    }

    #[test]
    fn a_program_names_its_linker_and_its_libraries() {
        let bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let object = looked(&bytes).unwrap();
        assert!(object.interpreter.unwrap().starts_with(b"/lib"));
        assert!(object.needed.iter().any(|name| name.starts_with(b"libc.so")), "{:?}", object.needed);
        assert!(object.linked.first().unwrap().start == 0);
        assert!(object.linked.iter().any(|range| range.start > 64 << 10), "what is relocated is behind the code");
        assert_eq!(looked(b"#!/bin/sh\n"), None);
        assert_eq!(looked(b""), None);
        assert_eq!(looked(&bytes[..70]), None, "cut off");
    }

    /// Whatever its headers say, looking ends, within bounds.
    #[test]
    fn damaged_headers_are_harmless() {
        let mut bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        bytes.truncate(4 << 20);
        let (mut random, mut found) = (0x9e37_79b9_7f4a_7c15u64, 0);
        for _ in 0..20_000 {
            let mut changed = Vec::new();
            for _ in 0..1 + random % 3 {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let at = 4 + (random >> 8) as usize % 900;
                changed.push((at, bytes[at]));
                bytes[at] = if random & 1 == 0 { 0xff } else { (random >> 40) as u8 };
            }
            found += usize::from(looked(&bytes).is_some());
            for (at, byte) in changed.into_iter().rev() {
                bytes[at] = byte;
            }
        }
        assert!(found > 1000, "{found}");
    }
}
