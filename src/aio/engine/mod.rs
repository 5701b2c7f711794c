//! Asynchronous file I/O behind one small trait, with two implementations.
//!
//! ```text
//!                    ┌► io_uring.rs: submission queue ─► kernel ─► completion queue ─► ring fd readable ┐
//! context: submit ───┤                     └ what the ring cannot do now ┐                              ├► reap
//!                    └► thread_pool.rs: queue ─► worker: system call ◄───┘ ─► finished ─► wake() ───────┘
//! ```
//!
//! An engine is owned by one context and used by its home thread alone. A turn of the loop does, in this order:
//! [`Engine::flush`] (what was submitted since the last turn goes to the kernel together), [`Engine::reap`] (what
//! was in the page cache has completed inside the flush), and only if nothing was reaped it blocks. After *every*
//! return from the poller, also one by `EINTR`, it reaps again: with cooperative task running (see `io_uring.rs`)
//! an interrupted wait is how a completion announces itself.
//!
//! Results are those of the system calls: short reads and writes are reported as they are, no completion order is
//! promised, and every submitted operation comes out of [`Engine::reap`] exactly once.

pub mod io_uring;
pub mod thread_pool;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use tracing::info;

/// Called from any thread when [`Engine::reap`] or [`thread_pool::ThreadPool::reap`] has work; must not block.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

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

impl Op {
    /// Refuses what no system call takes, and what io_uring would understand differently (offset -1 is "the file
    /// position" there).
    fn check(&self) -> io::Result<()> {
        const MAX: u64 = i64::MAX as u64;
        let (offset, len) = match *self {
            Op::Readv { iov_len, offset, .. } | Op::Writev { iov_len, offset, .. } => {
                (offset, u64::from(iov_len))
            }
            Op::Fsync { .. } => (0, 0),
            Op::Fallocate { offset, len, .. } => (offset, len),
        };
        if offset > MAX || len > MAX || matches!(self, Op::Readv { .. } | Op::Writev { .. }) && len > IOV_MAX
        {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        Ok(())
    }
}

/// Most entries of a vector array (Linux's limit).
const IOV_MAX: u64 = libc::UIO_MAXIOV as u64;

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

    /// Moves finished operations to the end of `out`; the context runs them afterwards (they may submit again).
    /// Cheap when there are none: no system call and no lock.
    fn reap(&mut self, out: &mut Vec<(Completion, io::Result<usize>)>);

    /// Waits until every submitted operation has finished, and moves them to `out`. Blocks the thread; for shutdown.
    ///
    /// Dropping an engine that was not drained also waits for what the kernel or a worker has begun, because memory
    /// is borrowed until then, but drops the completions uncalled.
    fn drain(&mut self, out: &mut Vec<(Completion, io::Result<usize>)>);

    /// Operations submitted and not yet reaped.
    fn in_flight(&self) -> usize;

    /// Fd that becomes readable when [`Engine::reap`] has work; registered by the context (readable, edge-triggered
    /// is enough). It stays the engine's: remove it from the poller before the engine is dropped. None: only `wake`.
    ///
    /// An engine with an fd may call `wake` as well, for operations that it handed to threads.
    fn wake_fd(&self) -> Option<RawFd>;
}

/// Makes the engine of one context, whose home is the calling thread, and logs which one it is and why.
///
/// `pool_threads` bounds the workers of the thread engine (io_uring keeps a pool for what the ring cannot do; it has no
/// thread until then). Workers are named `NAME-io-w0`, …; `wake` is called by them.
///
/// # Errors
/// Only with [`EngineChoice::IoUring`]: why the kernel refused the ring.
pub fn select(
    choice: EngineChoice,
    pool_threads: usize,
    name: &str,
    wake: Wake,
) -> io::Result<Box<dyn Engine>> {
    let pool_name = format!("{name}-io");
    let threads = |wake| Box::new(thread_pool::ThreadEngine::new(&pool_name, pool_threads, wake));
    if choice == EngineChoice::Threads {
        info!(context = name, engine = "threads", threads = pool_threads, "aio engine chosen");
        return Ok(threads(wake));
    }
    match io_uring::UringEngine::new(&pool_name, pool_threads, Arc::clone(&wake)) {
        Ok(engine) => {
            info!(context = name, engine = "io_uring", entries = engine.entries(), "aio engine chosen");
            Ok(Box::new(engine))
        }
        Err(refused) if choice == EngineChoice::IoUring => Err(refused.into()),
        Err(refused) => {
            info!(
                context = name,
                engine = "threads",
                threads = pool_threads,
                reason = refused.reason(),
                error = %refused.source(),
                "aio engine chosen, io_uring was refused"
            );
            Ok(threads(wake))
        }
    }
}
