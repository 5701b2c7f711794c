//! CoStream: a non-blocking stream socket whose reads and writes park the coroutine on readiness.
//!
//! Correct on an edge-triggered poller: every call tries first and parks only on `WouldBlock`.
//! One coroutine may wait to read while another waits to write; two waiters of one kind are misuse (panic).

use crate::aio::AioContext;
use std::io;
use std::io::IoSlice;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;

/// A connected stream socket (TCP or unix), attached to one context at a time. Shared by `Arc`.
pub struct CoStream {
    _fd: OwnedFd,
}

impl CoStream {
    /// Takes a connected socket, makes it non-blocking, and attaches it to the calling thread's context.
    ///
    /// # Errors
    /// What fcntl or epoll reports.
    pub fn new(_fd: OwnedFd) -> io::Result<Arc<CoStream>> {
        todo!()
    }

    /// Reads what is there; yields while there is nothing. 0 is EOF. Coroutine only.
    ///
    /// # Errors
    /// What `recv` reports; `ConnectionAborted` after [`CoStream::interrupt`]; `TimedOut` past the deadline.
    pub fn co_read(&self, _buf: &mut [u8]) -> io::Result<usize> {
        todo!()
    }

    /// Fills `buf` or fails with `UnexpectedEof`. Coroutine only.
    ///
    /// # Errors
    /// As [`CoStream::co_read`].
    pub fn co_read_exact(&self, _buf: &mut [u8]) -> io::Result<()> {
        todo!()
    }

    /// Reads without waiting (`WouldBlock` when there is nothing).
    ///
    /// # Errors
    /// What `recv` reports.
    pub fn try_read(&self, _buf: &mut [u8]) -> io::Result<usize> {
        todo!()
    }

    /// Yields until the socket may be readable (data, EOF or error). Needs no buffer. Coroutine only.
    ///
    /// # Errors
    /// `ConnectionAborted` after [`CoStream::interrupt`]; `TimedOut` past the deadline.
    pub fn co_wait_readable(&self) -> io::Result<()> {
        todo!()
    }

    /// Sends all of `bufs` (sendmsg, `MSG_NOSIGNAL`); yields while the peer does not read. Coroutine only.
    ///
    /// # Errors
    /// What `sendmsg` reports; `ConnectionAborted` after [`CoStream::interrupt`].
    pub fn co_writev_all(&self, _bufs: &mut [IoSlice<'_>]) -> io::Result<()> {
        todo!()
    }

    /// Sends without waiting; returns the bytes taken (`WouldBlock` when none).
    ///
    /// # Errors
    /// What `sendmsg` reports.
    pub fn try_writev(&self, _bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        todo!()
    }

    /// Bounds the following waits for reading: absolute time of the context's clock, None for no bound.
    pub fn set_read_deadline(&self, _deadline_ns: Option<u64>) {
        todo!()
    }

    /// Bounds the following waits for writing.
    pub fn set_write_deadline(&self, _deadline_ns: Option<u64>) {
        todo!()
    }

    /// Makes present and future waits fail with `ConnectionAborted`. Any thread.
    pub fn interrupt(&self) {
        todo!()
    }

    /// Makes the present or next wait for *reading* return `Err(Interrupted)` once, without losing data. Any thread.
    pub fn kick_reader(&self) {
        todo!()
    }

    /// Moves the stream and the calling coroutine to another context. Nobody else may be waiting on it.
    ///
    /// # Errors
    /// What epoll reports.
    pub fn co_move_to(&self, _ctx: &Arc<AioContext>) -> io::Result<()> {
        todo!()
    }

    /// `shutdown(SHUT_WR)` / both.
    ///
    /// # Errors
    /// What `shutdown` reports.
    pub fn shutdown(&self, _how: std::net::Shutdown) -> io::Result<()> {
        todo!()
    }

    /// The raw descriptor.
    #[must_use]
    pub fn raw_fd(&self) -> RawFd {
        todo!()
    }
}

/// Yields until `fd` is readable; tries nothing itself. Coroutine only.
///
/// # Errors
/// What epoll reports.
pub fn co_yield_until_fd_readable(_fd: RawFd) -> io::Result<()> {
    todo!()
}

/// Yields until `fd` is writable. Coroutine only.
///
/// # Errors
/// What epoll reports.
pub fn co_yield_until_fd_writable(_fd: RawFd) -> io::Result<()> {
    todo!()
}
