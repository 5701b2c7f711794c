//! Asynchronous file I/O behind one small trait (owner: engine helper).

use std::io;
use std::os::fd::RawFd;

/// What the user asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EngineChoice {
    /// io_uring where it works, else the thread pool.
    #[default]
    Auto,
    /// io_uring, or an error.
    IoUring,
    /// The thread pool.
    Threads,
}

/// What a context uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineKind {
    /// io_uring through its ring fd.
    IoUring,
    /// The context's thread pool.
    Threads,
}

/// One asynchronous file operation. Offsets and lengths are bytes.
#[derive(Debug, Clone, Copy)]
pub enum Op {
    /// `preadv`.
    Readv {
        /// File.
        fd: RawFd,
        /// Vector array; it and the memory it names must live until completion.
        iov: *const libc::iovec,
        /// Entries of the array, at most `IOV_MAX`.
        iov_len: u32,
        /// File offset.
        offset: u64,
    },
    /// `pwritev`, with `RWF_DSYNC` if `dsync`.
    Writev {
        /// File.
        fd: RawFd,
        /// Vector array; it and the memory it names must live until completion.
        iov: *const libc::iovec,
        /// Entries of the array, at most `IOV_MAX`.
        iov_len: u32,
        /// File offset.
        offset: u64,
        /// Durable on completion.
        dsync: bool,
    },
    /// `fsync`, or `fdatasync` if `datasync`.
    Fsync {
        /// File.
        fd: RawFd,
        /// Data only, and what is needed to find it.
        datasync: bool,
    },
    /// `fallocate`.
    Fallocate {
        /// File.
        fd: RawFd,
        /// `FALLOC_FL_*`.
        mode: i32,
        /// File offset.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

#[expect(unsafe_code, reason = "the vectors are only read by whoever the submitter vouched for")]
// SAFETY: `Op` is a description; `Engine::submit`'s contract covers the memory it points to.
unsafe impl Send for Op {}

/// Called once on the submitting context's home thread; the number is the system call's result.
pub type Completion = Box<dyn FnOnce(io::Result<usize>) + Send>;

/// An asynchronous file I/O engine; owned by one context and used by its home thread only.
pub trait Engine: Send {
    /// Which one this is.
    fn kind(&self) -> EngineKind;

    /// Takes an operation; it reaches the kernel at the next [`Engine::flush`] at the latest. Never calls `done` itself.
    ///
    /// # Safety
    /// The fd and memory of `op` stay valid until `done` was called.
    #[expect(unsafe_code, reason = "buffers are borrowed by the kernel")]
    unsafe fn submit(&mut self, op: Op, done: Completion);

    /// Hands queued operations to the kernel. The context calls it once per turn, before it blocks or polls.
    fn flush(&mut self);

    /// Moves finished operations to `out`; the context runs them afterwards (they may submit again).
    fn reap(&mut self, out: &mut Vec<(Completion, io::Result<usize>)>);

    /// Operations submitted and not yet reaped.
    fn in_flight(&self) -> usize;

    /// Fd that becomes readable when [`Engine::reap`] has work; registered by the context.
    fn wake_fd(&self) -> Option<RawFd>;
}
