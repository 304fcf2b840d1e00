//! Opening an upper: what is there is checked, what is not there is made.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::directory::{lock, remove_file};
use super::flusher::Flusher;
use super::gate::Gate;
use super::header::{self, Header, LowerIdentity};
use super::live::{self, Live};
use super::map::BlockMap;
use super::{BLOCK_BYTES, Claims, DATA, MAP, Upper, UpperOptions};
use crate::error::{Error, Result};
use crate::index::DEVICE_MAX;
use crate::media::{Directory, Media, MediaDir};

impl Upper {
    /// Opens the upper in the directory `dir` over `lower`, and makes what is not there.
    ///
    /// # Errors
    /// [`Error::Busy`] when somebody has it open, [`Error::Invalid`] when it belongs to another lower, is of another size
    /// or is damaged, or what the system says.
    pub fn open(dir: &Path, lower: &LowerIdentity, options: &UpperOptions) -> Result<Self> {
        fs::create_dir_all(dir).map_err(|error| Error::io(format!("open the upper {}", dir.display()), error))?;
        let lock = lock(dir)?;
        let upper = Self::open_on(&Directory::new(dir), &dir.display().to_string(), lower, options)?;
        *upper.lock.lock() = Some(lock);
        Ok(upper)
    }

    /// As [`open`](Self::open), but makes none: whoever removed an upper meanwhile does not find a new one in its place.
    ///
    /// # Errors
    /// As of [`open`](Self::open), and there is none.
    pub fn open_existing(dir: &Path, lower: &LowerIdentity, options: &UpperOptions) -> Result<Self> {
        let lock = lock(dir)?;
        let (files, name) = (Directory::new(dir), dir.display().to_string());
        let Some(header) = Header::read(&files, &name)? else {
            return Err(Error::invalid("upper", format!("there is none in {name}")));
        };
        let upper = Self::open_found(Some(header), &files, &name, lower, options)?;
        *upper.lock.lock() = Some(lock);
        Ok(upper)
    }

    /// As [`open`](Self::open), in a directory that nobody else has.
    ///
    /// # Errors
    /// As of [`open`](Self::open), but for [`Error::Busy`].
    pub fn open_on(dir: &dyn MediaDir, name: &str, lower: &LowerIdentity, options: &UpperOptions) -> Result<Self> {
        Self::open_found(Header::read(dir, name)?, dir, name, lower, options)
    }

    fn open_found(
        found: Option<Header>,
        dir: &dyn MediaDir,
        name: &str,
        lower: &LowerIdentity,
        options: &UpperOptions,
    ) -> Result<Self> {
        let failed = |error| Error::io(format!("open the upper {name}"), error);
        let wanted = options.size.map(|size| wanted_size(size, lower)).transpose()?;
        let size = match &found {
            Some(header) => {
                header.check(lower, name)?;
                match wanted {
                    Some(wanted) if wanted < header.device_bytes => {
                        let reason = format!("{name} has {} bytes; it can grow, not shrink", header.device_bytes);
                        return Err(Error::invalid("size of an upper", reason));
                    }
                    wanted => wanted.unwrap_or(header.device_bytes),
                }
            }
            None => wanted.unwrap_or(lower.device_bytes),
        };
        let grows = found.as_ref().is_none_or(|header| header.device_bytes < size);
        let (data, map_file) = match &found {
            None => make_files(dir, name)?,
            Some(_) => (dir.open(DATA).map_err(failed)?, dir.open(MAP).map_err(failed)?),
        };
        let map_bytes = BlockMap::file_bytes(size / BLOCK_BYTES);
        if grows {
            let make = || -> io::Result<()> {
                data.set_len(size)?;
                data.sync()?;
                map_file.set_len(map_bytes)?;
                map_file.sync()?;
                // The files' names are there before the header's.
                dir.sync()?;
                Header::new(lower.clone(), size).write(dir)
            };
            make().map_err(|error| Error::io(format!("make the upper {name} of {size} bytes"), error))?;
        }
        let lengths = (data.len().map_err(failed)?, map_file.len().map_err(failed)?);
        if lengths.0 < size || lengths.1 < map_bytes {
            let reason = format!("{name}: its files have {} and {} bytes, too few for {size}", lengths.0, lengths.1);
            return Err(Error::invalid("upper", reason));
        }
        let map = BlockMap::load(map_file.as_ref(), size / BLOCK_BYTES, name)?;
        let live = Live::open(dir, &options.boot, &map).map_err(failed)?;
        Ok(Self {
            name: name.to_owned(),
            size,
            lower: lower.clone(),
            durability: options.durability,
            data,
            map_file,
            live,
            map,
            claims: Arc::new(Claims::default()),
            gate: Gate::default(),
            flusher: Flusher::default(),
            failed: OnceLock::new(),
            lock: Mutex::default(),
        })
    }
}

/// New files, in place of what an upper that was never finished left.
fn make_files(dir: &dyn MediaDir, name: &str) -> Result<(Box<dyn Media>, Box<dyn Media>)> {
    let failed = |error| Error::io(format!("make the upper {name}"), error);
    if let Ok(map) = dir.open(MAP)
        && BlockMap::holds_bits(map.as_ref()).map_err(failed)?
    {
        let reason = format!("{name} has written blocks, but no header that says what they belong to");
        return Err(Error::invalid("upper", reason));
    }
    for file in [header::NEW, MAP, DATA, live::NAME] {
        remove_file(dir, file).map_err(failed)?;
    }
    Ok((dir.create(DATA).map_err(failed)?, dir.create(MAP).map_err(failed)?))
}

fn wanted_size(size: u64, lower: &LowerIdentity) -> Result<u64> {
    let rounded = size.checked_next_multiple_of(BLOCK_BYTES).filter(|&size| size <= DEVICE_MAX);
    match rounded {
        Some(size) if size >= lower.device_bytes => Ok(size),
        Some(_) => {
            let reason = format!("{size} bytes are less than the image's {}", lower.device_bytes);
            Err(Error::invalid("size of an upper", reason))
        }
        None => Err(Error::invalid("size of an upper", format!("{size} bytes are more than {DEVICE_MAX}"))),
    }
}
