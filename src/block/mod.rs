//! Images: a graph of nodes below a [`BlockBackend`]. (owner: block helper; the trait is the contract)

mod backend;

pub use backend::BlockBackend;

use bitflags::bitflags;
use std::io;
use std::io::{IoSlice, IoSliceMut};

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
    /// The errno behind it (`EIO` if there is none).
    #[must_use]
    pub fn errno(&self) -> i32 {
        self.source.raw_os_error().unwrap_or(libc::EIO)
    }
}

/// Result of block operations.
pub type Result<T> = std::result::Result<T, Error>;

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

    /// Reads all of `buf` if that needs no waiting (page cache, memory): `true` when done. Plain code may call it; never yields.
    fn try_pread(&self, _offset: u64, _buf: &mut [u8]) -> bool {
        false
    }

    /// Writes all of `buf` if that is expected not to wait: `None` when it was not tried. Never yields.
    fn try_pwrite(&self, _offset: u64, _buf: &[u8]) -> Option<Result<()>> {
        None
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

    /// Prefetches the range (NBD_CMD_CACHE).
    ///
    /// # Errors
    /// The errno of the failing operation.
    fn co_cache(&self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }
}
