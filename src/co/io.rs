//! File I/O for coroutines over the current context's engine: straight-line calls that yield.

use std::io;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::RawFd;

/// Reads at `offset` through the engine; may be short. Yields. Coroutine only.
///
/// # Errors
/// What `preadv` reports.
pub fn co_preadv(_fd: RawFd, _bufs: &mut [IoSliceMut<'_>], _offset: u64) -> io::Result<usize> {
    todo!()
}

/// Writes at `offset` through the engine; may be short; durable on return if `dsync`. Yields. Coroutine only.
///
/// # Errors
/// What `pwritev2` reports.
pub fn co_pwritev(_fd: RawFd, _bufs: &[IoSlice<'_>], _offset: u64, _dsync: bool) -> io::Result<usize> {
    todo!()
}

/// fsync or fdatasync. Yields. Coroutine only.
///
/// # Errors
/// What the call reports.
pub fn co_fsync(_fd: RawFd, _datasync: bool) -> io::Result<()> {
    todo!()
}

/// fallocate. Yields. Coroutine only.
///
/// # Errors
/// What the call reports.
pub fn co_fallocate(_fd: RawFd, _mode: i32, _offset: u64, _len: u64) -> io::Result<()> {
    todo!()
}

/// Runs blocking work on the context's thread pool and yields until it is done. Coroutine only.
/// A panic in `f` is re-raised in the caller.
pub fn co_run_blocking<T: Send>(_f: impl FnOnce() -> T + Send) -> T {
    todo!()
}
