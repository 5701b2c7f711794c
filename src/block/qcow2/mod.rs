//! The qcow2 image format: reading and writing images on many threads.
//!
//! ```text
//!   node.rs      open, close, first change, faults      read.rs, write.rs, zero.rs, grow.rs   requests
//!   l2.rs, seq.rs the mapping in memory, lock-free      epoch.rs   who may still use what was unlinked
//!   lent.rs      what sockets may hold on to
//!   claims.rs    who may change which guest clusters    alloc.rs, refcounts.rs   host clusters, quarantine
//!   commit.rs    what becomes durable in which order    compressed.rs, inflate.rs   compressed clusters
//!   entry.rs, error.rs, header.rs, snapshot.rs, bitmap.rs   what the bytes mean (pure)
//!   bitmaps.rs   persistent dirty bitmaps       create.rs   new images
//!   check.rs     what is wrong with an image that nobody uses, and repair
//! ```
//! What holds at every moment, on the disk as after a power loss:
//! - I1: a durable pointer has a durable refcount of at least 1 and durable content behind it;
//! - I2: a cluster whose refcount is 0, or that is used again, has no durable pointer;
//! - I3: after an acknowledged flush all earlier completed writes are reachable from the header;
//! - I4: the header names complete tables.
//!
//! Leaks are allowed, nothing else. Source of the format: QEMU docs/interop/qcow2 ("the document").

mod alloc;
pub mod bitmap;
mod bitmaps;
pub mod check;
mod claims;
mod commit;
mod compressed;
pub mod create;
pub mod entry;
mod epoch;
mod error;
mod grow;
pub mod header;
mod inflate;
mod io;
mod l2;
mod lent;
mod node;
mod options;
mod read;
mod refcounts;
mod seq;
pub mod snapshot;
mod write;
mod zero;

pub use bitmaps::Bitmaps;
#[doc(hidden)]
pub use commit::Sabotage;
pub use error::FormatError;
pub use node::Qcow2Node;
pub use options::{Qcow2Error, Qcow2OpenOptions, WriteHook};
pub use snapshot::SnapshotSel;

/// Byte offset in the virtual disk, as the client sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct GuestOffset(pub u64);

/// Byte offset in the image file, or in the external data file where that is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct HostOffset(pub u64);

impl std::fmt::Display for GuestOffset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl std::fmt::Display for HostOffset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}
