//! How an image is opened, why it may not be, and who is told about its changes.

use super::FormatError;
use super::node::Qcow2Node;
use super::snapshot::SnapshotSel;
use crate::block::{BlockNode, DirtyBitmap, DiscardMode, Error, Result};
use std::sync::Arc;

/// How an image is opened.
#[derive(Clone, Default)]
pub struct Qcow2OpenOptions {
    /// Refuse writes.
    pub read_only: bool,
    /// Show an internal snapshot instead of the disk; read-only.
    pub snapshot: Option<SnapshotSel>,
    /// The external data file, if the header says that there is one. It grows unless it is a device.
    pub data_file: Option<Arc<dyn BlockNode>>,
    /// The backing image. It is not changed.
    pub backing: Option<Arc<dyn BlockNode>>,
    /// Whether discarding and unmapping give space up.
    pub discard: DiscardMode,
    /// Bytes of L2 tables that are kept in memory; `None`: all of them, up to a bound.
    pub l2_cache_bytes: Option<u64>,
    /// Bytes of clusters that a thread takes at once, so that it allocates without a lock; `None`: 1 MiB.
    pub arena_bytes: Option<u64>,
}

/// Why an image cannot be opened; the text says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Qcow2Error {
    /// The bytes are not those of an image that this version can open.
    #[error("image {image}: {source}")]
    Format {
        /// Image.
        image: String,
        /// What is wrong.
        source: FormatError,
    },
    /// The file could not be read.
    #[error("image {image} cannot be read")]
    Io {
        /// Image.
        image: String,
        /// What failed.
        source: Error,
    },
    /// The file below refuses writes.
    #[error("image {image}: its file is open read-only; open the image read-only")]
    FileReadOnly {
        /// Image.
        image: String,
    },
    /// The corrupt bit is set.
    #[error(
        "image {image} is marked as corrupt; open it read-only, or repair it with conbd check --repair all"
    )]
    Corrupt {
        /// Image.
        image: String,
    },
    /// The dirty bit is set.
    #[error(
        "image {image} was not closed by a program that updates refcounts late; repair it first with conbd check \
         --repair all (or qemu-img check -r all), or open it read-only"
    )]
    NeedsRepair {
        /// Image.
        image: String,
    },
    /// The header says that there is an external data file.
    #[error("image {image} keeps its data in an external data file, which was not given")]
    NoDataFile {
        /// Image.
        image: String,
    },
    /// The header says that there is none.
    #[error("image {image} has no external data file; open it without one")]
    UnwantedDataFile {
        /// Image.
        image: String,
    },
    /// There is no such snapshot.
    #[error("image {image} has no internal snapshot {wanted}; qemu-img snapshot -l lists them")]
    NoSnapshot {
        /// Image.
        image: String,
        /// What was asked for.
        wanted: String,
    },
}

impl Qcow2Error {
    /// The errno behind it.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Qcow2Error::Format { source, .. } => source.errno(),
            Qcow2Error::Io { source, .. } => source.errno(),
            Qcow2Error::FileReadOnly { .. } => libc::EROFS,
            Qcow2Error::Corrupt { .. } => libc::EIO,
            Qcow2Error::NeedsRepair { .. }
            | Qcow2Error::NoDataFile { .. }
            | Qcow2Error::UnwantedDataFile { .. } => libc::EINVAL,
            Qcow2Error::NoSnapshot { .. } => libc::ENOENT,
        }
    }
}

/// Is told about changes of the disk: persistent bitmaps.
pub trait WriteHook: Send + Sync {
    /// Before the first change since the image was opened; what it writes must be durable on return. Yields. Errors fail
    /// the change, and it is called again before the next one.
    ///
    /// # Errors
    /// The errno of what failed.
    fn co_before_first_change(&self, node: &Qcow2Node) -> Result<()>;

    /// Bytes may have changed; called before the change is answered, failed ones included. Any thread; several at once;
    /// never yields.
    fn changed(&self, offset: u64, len: u64);

    /// The disk is about to become `len` bytes long; what must be so in the file before its size is, is durable on return. No
    /// request is running. Yields.
    ///
    /// # Errors
    /// Why it may not become larger.
    fn co_before_resize(&self, node: &Qcow2Node, len: u64) -> Result<()>;

    /// The disk has `len` bytes now, durably. No request is running. Yields.
    ///
    /// # Errors
    /// The errno of what failed; the disk stays larger.
    fn co_after_resize(&self, node: &Qcow2Node, len: u64) -> Result<()>;

    /// The image is being closed, and was changed: what is to be kept is stored. No request is running. Yields.
    ///
    /// # Errors
    /// The errno of what failed; then the image is not closed cleanly.
    fn co_before_close(&self, node: &Qcow2Node) -> Result<()>;

    /// What is to be shown to clients.
    fn dirty_bitmaps(&self) -> Vec<Arc<dyn DirtyBitmap>> {
        Vec::new()
    }
}
