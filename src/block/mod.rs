//! Images: a graph of nodes below a [`BlockBackend`].
//!
//! ```text
//!   nbd::export ── BlockBackend ── [raw window] ── [fault] ── file | memory | null
//!                  in-flight count,  offset/size,   tests      host file or device,
//!                  drain, bounds     probe guard               page cache or O_DIRECT
//! ```
//!
//! A node is a [`BlockNode`]; nodes are shared by `Arc` and used by coroutines of all IOThreads at once. Nothing
//! here belongs to one thread. Reads, and overwrites below 256 KiB, of one image on different threads share no lock and no
//! written cache line: what must be counted is counted per thread (`shard`).
//!
//! Rules of the layer:
//! - Requests were validated by the protocol layer: a range outside the node is a bug and panics; everything that a
//!   client, the file system or the device can cause is an [`Error`] with an errno.
//! - `co_` methods may yield, `try_` methods never do, `open` blocks (call it before serving, or by [`co_open`]).
//! - A std lock is never held across a yield; waiters queue themselves under the lock that guards what they wait for
//!   (`wait`), so no wake-up is lost between threads.

mod backend;
mod chain;
mod detect_zeroes;
mod fault;
mod file;
mod flush;
mod graph;
mod iov;
mod lock_bytes;
mod memory;
mod null;
mod overlay;
mod probe;
pub mod qcow2;
mod quick_writes;
mod range_lock;
mod raw;
mod shard;
mod sim;
mod status_cache;
mod wait;
mod write_behind;

pub use backend::{BackendStats, BlockBackend, Drained};
pub use chain::{BackingName, MAX_DEPTH, OpenRemote, RemoteName, backing_of, co_read_header};
pub use detect_zeroes::{DetectZeroes, DetectZeroesNode};
pub use fault::{FaultAction, FaultNode, FaultOps, FaultRule, FaultWhen, HeldOp, RuleId};
pub use file::{CacheMode, DiscardMode, FileNode, FileOptions};
pub use flush::FlushGroup;
pub use graph::{Format, OpenError, OpenOptions, co_open, co_open_qcow2, open};
pub use lock_bytes::LockMode;
pub use memory::MemoryNode;
pub use null::NullNode;
pub use probe::{ForeignFormat, PROBE_LEN, probe};
pub use range_lock::{RangeGuard, RangeLock};
pub use raw::RawNode;
pub use sim::{SimChange, SimClock, SimFile, SimOp, SimParked};

use bitflags::bitflags;
use std::io;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

bitflags! {
    /// How a write-type request is to be done.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct WriteFlags: u32 {
        /// Durable when the call returns (NBD_CMD_FLAG_FUA).
        const FUA = 1;
        /// Zeroing may leave a hole (NBD: NO_HOLE is clear).
        const MAY_UNMAP = 2;
        /// Zeroing must not fall back to writing zeroes: `ENOTSUP` instead (NBD_CMD_FLAG_FAST_ZERO).
        const NO_FALLBACK = 4;
    }
}

bitflags! {
    /// What a range is (as `base:allocation`, inverted to QEMU's sense).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct StatusFlags: u32 {
        /// Allocated: not a hole.
        const DATA = 1;
        /// Reads as zeroes.
        const ZERO = 2;
    }
}

/// One extent of [`BlockNode::co_block_status`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes from the asked offset on, at least 1, not past the end of the node.
    pub len: u64,
    /// What they are.
    pub flags: StatusFlags,
}

/// One extent of [`BlockNode::co_allocation_depth`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DepthExtent {
    /// Bytes from the asked offset on, at least 1, not past the end of the node.
    pub len: u64,
    /// Which layer of the backing chain they come from: 0 none, 1 this one, 2 its backing file, and so on.
    pub depth: u32,
}

/// One extent of [`DirtyBitmap::co_status`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirtyExtent {
    /// Bytes from the asked offset on, at least 1, not past the end of the node.
    pub len: u64,
    /// Whether they have been written to since the bitmap was begun.
    pub dirty: bool,
}

/// A persistent bitmap of a node: which of its bytes were written to. Shared by `Arc`, used by all IOThreads at once.
pub trait DirtyBitmap: Send + Sync {
    /// Name, unique in its node.
    fn name(&self) -> &str;

    /// Bytes per bit, a power of two.
    fn granularity(&self) -> u64;

    /// State at `offset` for at most `len` bytes, `len` at least 1: the first extent. Coroutine only; may yield.
    ///
    /// # Errors
    /// The errno of the failing operation.
    fn co_status(&self, offset: u64, len: u64) -> Result<DirtyExtent>;
}

/// What a node wants and can do. Sizes are bytes, powers of two.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Requests are served at any alignment; below this they cost a read-modify-write. 1 unless `O_DIRECT`.
    pub request_alignment: u32,
    /// Best request size.
    pub preferred: u32,
    /// Whether [`BlockNode::co_pwrite_zeroes`] can be faster than writing.
    pub fast_zero: bool,
    /// Whether the device spins.
    pub rotational: bool,
}

/// An I/O error with its place.
#[derive(Debug, thiserror::Error)]
#[error("{op} on {node} at offset {offset}")]
pub struct Error {
    /// Operation, e.g. "pwritev".
    pub op: &'static str,
    /// Node name.
    pub node: String,
    /// Byte offset of the request.
    pub offset: u64,
    /// What the system reported; carries the errno.
    pub source: io::Error,
}

impl Error {
    /// Puts a place to an I/O error.
    pub fn new(op: &'static str, node: &str, offset: u64, source: io::Error) -> Error {
        Error { op, node: node.to_owned(), offset, source }
    }

    /// An error with an errno of ours.
    pub(crate) fn from_errno(op: &'static str, node: &str, offset: u64, errno: i32) -> Error {
        Error::new(op, node, offset, io::Error::from_raw_os_error(errno))
    }

    /// The errno behind it (`EIO` if there is none).
    #[must_use]
    pub fn errno(&self) -> i32 {
        self.source.raw_os_error().unwrap_or(libc::EIO)
    }
}

/// Result of block operations.
pub type Result<T> = std::result::Result<T, Error>;

/// Bytes of a node that need no copy: a range of a file, to be sent from the page cache.
#[derive(Debug)]
pub struct Lent<'a> {
    /// The file.
    pub file: BorrowedFd<'a>,
    /// Byte offset in the file.
    pub offset: u64,
    /// Bytes; not 0.
    pub len: usize,
}

/// A node of the block graph. Offsets and lengths were checked by [`BlockBackend`]'s caller: violations are asserts.
///
/// `co_` methods run in coroutines on any IOThread and may yield; several run at once.
pub trait BlockNode: Send + Sync {
    /// Name, unique in the graph; as seen in errors and logs.
    fn name(&self) -> &str;

    /// Size in bytes.
    fn len(&self) -> u64;

    /// Whether the size is zero.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether writes are refused.
    fn read_only(&self) -> bool;

    /// What the node wants and can do.
    fn limits(&self) -> Limits;

    /// Reads all of `buf` if that needs no waiting (page cache, memory): `true` when done; on `false` `buf` holds
    /// anything. Plain code may call it; never yields.
    fn try_pread(&self, offset: u64, buf: &mut [u8]) -> bool {
        self.try_pread_some(offset, buf) == buf.len()
    }

    /// Reads as much of the front of `buf` as needs no waiting, and returns how many bytes that is: the caller gets
    /// the rest by [`BlockNode::co_preadv`]. Plain code may call it; never yields.
    fn try_pread_some(&self, _offset: u64, _buf: &mut [u8]) -> usize {
        0
    }

    /// As [`BlockNode::try_pread_some`] into several buffers, one after the other.
    fn try_preadv_some(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> usize {
        let mut done = 0;
        for buf in bufs {
            let n = self.try_pread_some(offset + done as u64, buf);
            done += n;
            if n < buf.len() {
                break;
            }
        }
        done
    }

    /// Whether all of `len` bytes (not 0) are in the page cache and [`BlockNode::try_lend`] would lend them, one piece after the other;
    /// with `no_holes` only if none of them is known to be a hole of the file. Never yields.
    fn lends(&self, _offset: u64, _len: usize, _no_holes: bool) -> bool {
        false
    }

    /// Shows `f` where the front of a range (`len` is not 0) is in a file: as much of it as is side by side there. A socket may hold on to the
    /// pages: that place in the file is this range's for ever, or nobody's. Whoever sends it reads the file at that
    /// time; ask before whether it is [in the page cache](BlockNode::lends). False: `f` was not called; read the
    /// range. Never yields.
    fn try_lend(&self, _offset: u64, _len: usize, _f: &mut dyn FnMut(&Lent<'_>)) -> bool {
        false
    }

    /// Whether [`BlockNode::co_pdiscard`] of aligned pieces of `unit` bytes gives their space back to the host, as far as is known.
    fn gives_back(&self, _unit: u64) -> bool {
        false
    }

    /// Writes all of `buf` if that is expected not to wait: `None` when it was not tried. Never yields.
    fn try_pwrite(&self, _offset: u64, _buf: &[u8]) -> Option<Result<()>> {
        None
    }

    /// As [`BlockNode::try_pwrite`] from several buffers, all or nothing of them tried. Never yields.
    fn try_pwritev(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Option<Result<()>> {
        match bufs {
            [buf] => self.try_pwrite(offset, buf),
            _ => None,
        }
    }

    /// Fills `bufs` from `offset`. Never short. Bytes past a file's end that the node claims to have read as zeroes.
    ///
    /// # Errors
    /// The errno of the failing operation.
    fn co_preadv(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()>;

    /// Writes all of `bufs` at `offset`. `flags`: FUA.
    ///
    /// # Errors
    /// The errno of the failing operation (`ENOSPC`, `EIO`, …).
    fn co_pwritev(&self, offset: u64, bufs: &[IoSlice<'_>], flags: WriteFlags) -> Result<()>;

    /// Makes the range read as zeroes. `flags`: FUA, MAY_UNMAP, NO_FALLBACK.
    ///
    /// # Errors
    /// `ENOTSUP` only with NO_FALLBACK, and then nothing was changed.
    fn co_pwrite_zeroes(&self, offset: u64, len: u64, flags: WriteFlags) -> Result<()>;

    /// Gives the range up; it may read as anything it held or zeroes afterwards. Rounds inward.
    ///
    /// # Errors
    /// The errno of the failing operation; "not supported" is success.
    fn co_pdiscard(&self, offset: u64, len: u64) -> Result<()>;

    /// Whether the node is as long as what was written to it: writes and zeroing past [`BlockNode::len`] extend it,
    /// reads past it give zeroes. For what lies below an image format; nothing above a format grows by itself.
    fn grows(&self) -> bool {
        false
    }

    /// Sets the size: new bytes read as zeroes, bytes past a smaller size are dropped. A growing call is safe
    /// against writes that extend the node meanwhile (the larger size stays); a shrinking one is not.
    ///
    /// # Errors
    /// `ENOTSUP` unless the node [`grows`](BlockNode::grows); else the errno of the failing operation.
    fn co_truncate(&self, len: u64) -> Result<()> {
        Err(Error::from_errno("truncate", self.name(), len, libc::ENOTSUP))
    }

    /// Takes up a size that the node has got from elsewhere (a file or a device that was extended), and makes what it shows
    /// at least `at_least` bytes long (0: only looks). New bytes read as zeroes, as far as they are ours to say. Never makes
    /// it smaller: what has shrunk underneath keeps its size here. Returns the size, which is durable. No request may be
    /// running. Coroutine only; may yield.
    ///
    /// # Errors
    /// `ENOTSUP` for a node that cannot become larger, `EPERM` for one that is read-only, `ENOSPC` for a device that is too
    /// small; else the errno of the failing operation.
    fn co_resize(&self, at_least: u64) -> Result<u64> {
        match self.len() {
            len if at_least <= len => Ok(len),
            _ => Err(Error::from_errno("resize", self.name(), at_least, libc::ENOTSUP)),
        }
    }

    /// Makes all completed writes of all callers durable.
    ///
    /// # Errors
    /// The errno; once one failed, every later flush of the node fails too.
    fn co_flush(&self) -> Result<()>;

    /// Status at `offset` for at most `len` bytes: the first extent.
    ///
    /// # Errors
    /// The errno of the failing operation.
    fn co_block_status(&self, offset: u64, len: u64) -> Result<Extent>;

    /// Whether the node interprets a format, so that its bytes say nothing about the file's.
    fn is_format(&self) -> bool {
        false
    }

    /// Ends the use of the node: what it keeps in memory is stored. No request is running, and none comes later.
    /// Coroutine only; yields.
    ///
    /// # Errors
    /// The errno of what could not be stored.
    fn co_close(&self) -> Result<()> {
        Ok(())
    }

    /// Prefetches the range (NBD_CMD_CACHE).
    ///
    /// # Errors
    /// The errno of the failing operation.
    fn co_cache(&self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    /// Which layer of the backing chain holds the data at `offset`, for at most `len` bytes (at least 1): the first
    /// extent. A node without a backing chain is one layer that holds everything.
    ///
    /// # Errors
    /// The errno of the failing operation.
    fn co_allocation_depth(&self, _offset: u64, len: u64) -> Result<DepthExtent> {
        Ok(DepthExtent { len, depth: 1 })
    }

    /// The node as an open qcow2 image: chains of them are gone down in a loop, not by calls within calls.
    fn as_qcow2(&self) -> Option<&qcow2::Qcow2Node> {
        None
    }

    /// Gives up the backing image, of a node that is being dropped: for dropping chains in a loop, too.
    fn take_backing(&mut self) -> Option<Arc<dyn BlockNode>> {
        None
    }

    /// The dirty bitmaps of the node that may be shown to clients.
    fn dirty_bitmaps(&self) -> Vec<Arc<dyn DirtyBitmap>> {
        Vec::new()
    }
}
