//! Where an image goes: a registry, an OCI layout, or a tar of one that is made in the temporary directory first.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use tokio::runtime::Handle;

use super::Request;
use super::pack::{tar_header, tar_tail};
use crate::error::{Error, Result};
use crate::oci::Reference;
use crate::source::{Purpose, Repository};

/// Where an image goes.
pub(super) struct Destination {
    pub repository: Repository,
    archive: Option<Archive>,
}

struct Archive {
    layout: Staging,
    file: PathBuf,
}

/// A directory that goes when this does.
struct Staging(PathBuf);

impl Drop for Staging {
    fn drop(&mut self) {
        // A directory that stays is no reason to fail.
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Staging {
    fn new(temp: &Path) -> Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        for number in 0..1000 {
            let path = temp.join(format!(".firstread-layout-{}-{number}", std::process::id()));
            match fs::DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Self(path)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Error::io(format!("making {}", path.display()), error)),
            }
        }
        Err(Error::invalid("temporary directory", format!("{} is full of old layouts", temp.display())))
    }
}

impl Destination {
    /// Opens what the request names.
    pub(super) fn open(request: &Request, runtime: &Handle) -> Result<Self> {
        let open =
            |reference: &Reference| runtime.block_on(Repository::open(reference, &request.access, Purpose::Push));
        let Reference::OciArchive { file, tag } = &request.destination else {
            return Ok(Self { repository: open(&request.destination)?, archive: None });
        };
        let layout = Staging::new(&request.temp)?;
        let repository = open(&Reference::Layout { dir: layout.0.clone(), tag: tag.clone() })?;
        Ok(Self { repository, archive: Some(Archive { layout, file: file.clone() }) })
    }

    /// Everything is pushed: an archive gets its name now, in place of what had it.
    pub(super) fn finish(self) -> Result<()> {
        let Some(Archive { layout, file }) = self.archive else { return Ok(()) };
        let mut partial = file.clone().into_os_string();
        partial.push(format!(".partial-{}", std::process::id()));
        let partial = PathBuf::from(partial);
        let written = write(&layout.0, &partial).and_then(|()| {
            fs::rename(&partial, &file).map_err(|error| Error::io(format!("naming {}", file.display()), error))
        });
        if written.is_err() {
            // The first error is the one to tell.
            let _ = fs::remove_file(&partial);
        }
        written
    }
}

/// Writes the layout in `dir` as a tar: the same bytes for the same layout.
fn write(dir: &Path, to: &Path) -> Result<()> {
    let action = |error| Error::io(format!("writing {}", to.display()), error);
    let reading = |error| Error::io(format!("reading {}", dir.display()), error);
    let mut out = BufWriter::with_capacity(256 << 10, File::create(to).map_err(action)?);
    let mut blobs: Vec<String> = fs::read_dir(dir.join("blobs/sha256"))
        .map_err(reading)?
        .map(|entry| Ok(format!("blobs/sha256/{}", entry?.file_name().to_string_lossy())))
        .collect::<io::Result<_>>()
        .map_err(reading)?;
    blobs.sort_unstable();
    for directory in ["blobs/", "blobs/sha256/"] {
        out.write_all(&tar_header(directory, b'5', 0o755, 0)?).map_err(action)?;
    }
    for path in blobs.iter().map(String::as_str).chain(["index.json", "oci-layout"]) {
        let mut file = File::open(dir.join(path)).map_err(reading)?;
        let len = file.metadata().map_err(reading)?.len();
        out.write_all(&tar_header(path, b'0', 0o644, len)?).map_err(action)?;
        let copied = io::copy(&mut file, &mut out).map_err(action)?;
        if copied != len {
            return Err(Error::invalid("layout", format!("{path} changed while it was read")));
        }
        let padding = (len.next_multiple_of(512) - len) as usize;
        out.write_all(&vec![0; padding]).map_err(action)?;
    }
    out.write_all(&tar_tail(0)).map_err(action)?;
    let file = out.into_inner().map_err(|error| action(error.into_error()))?;
    file.sync_all().map_err(action)
}
