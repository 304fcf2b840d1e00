//! What the builder tells while it works. The library only tells; printing is the program's.

/// Something that happened.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// The image for this platform begins; it has this many layers, and they have this many stored bytes where known.
    Image {
        /// `OS/ARCHITECTURE`.
        platform: &'a str,
        /// Number of layers.
        layers: usize,
        /// Bytes that will be read, as far as the source says.
        bytes: Option<u64>,
    },
    /// A layer begins.
    Layer {
        /// Its digest or its file's name.
        name: &'a str,
    },
    /// A layer is taken from the build cache, and not read.
    Cached {
        /// Its digest.
        name: &'a str,
        /// Its stored bytes.
        bytes: u64,
    },
    /// So many more bytes of the source were read.
    Read(u64),
    /// A chunk that was not seen before is ready. Called from worker threads.
    Chunk {
        /// Plain bytes.
        plain: u32,
        /// Stored bytes.
        stored: u32,
        /// Whether an earlier image has it already.
        reused: bool,
    },
    /// All contents are read; packs of so many stored bytes are written.
    Packing(u64),
    /// So many more stored bytes are in a pack.
    Packed(u64),
    /// A blob is sent to the destination.
    Publish {
        /// Its digest.
        digest: &'a str,
        /// Its length.
        bytes: u64,
    },
    /// Something the user should know, although the build goes on.
    Note(&'a str),
}

/// Who is told. Called from several threads, often: it must be quick.
pub trait Progress: Send + Sync {
    /// Takes note of an event.
    fn event(&self, event: Event<'_>);
}

/// Tells nobody.
#[derive(Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn event(&self, _event: Event<'_>) {}
}
