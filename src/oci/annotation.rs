//! Names of firstread's annotations on layer descriptors.
//!
//! containerd hands every annotation with the prefix `containerd.io/snapshot/` to the snapshotter as a label, which is
//! why the names begin with it.

/// What the layer is: [`ROLE_PACK`], [`ROLE_STARTUP`] or [`ROLE_INDEX`].
pub const ROLE: &str = "containerd.io/snapshot/firstread/role";
/// Version of the image's form: [`VERSION_1`].
pub const VERSION: &str = "containerd.io/snapshot/firstread/version";
/// The layer's own digest, since a snapshotter is not told it otherwise.
pub const DIGEST: &str = "containerd.io/snapshot/firstread/digest";
/// On the index layer: sha256 of the plain index, `sha256:<hex>`.
pub const INDEX_DIGEST: &str = "containerd.io/snapshot/firstread/index-digest";
/// On the index layer: length of the plain index in bytes, decimal.
pub const INDEX_BYTES: &str = "containerd.io/snapshot/firstread/index-bytes";
/// On the index layer of a device with a dm-verity tree: its root hash, 64 hexadecimal digits.
pub const VERITY_ROOT: &str = "containerd.io/snapshot/firstread/verity-root";
/// On the index layer of a device with a dm-verity tree: where the tree's superblock is on the device, in bytes, decimal.
pub const VERITY_OFFSET: &str = "containerd.io/snapshot/firstread/verity-offset";

/// The version that this program writes and reads.
pub const VERSION_1: &str = "1";

/// Role of a layer that holds chunks.
pub const ROLE_PACK: &str = "pack";
/// Role of the start-up pack.
pub const ROLE_STARTUP: &str = "startup";
/// Role of the last layer, the index.
pub const ROLE_INDEX: &str = "index";

/// Path of the index in its layer.
pub const INDEX_PATH: &str = ".firstread/index";
/// Directory of the packs in their layers.
pub const PACK_DIR: &str = ".firstread/pack";
