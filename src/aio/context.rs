//! AioContext: one turn of the loop (owner: aio helper; signatures are the contract, split into files as you like).

use super::Runnable;
use super::engine::{Completion, EngineChoice, EngineKind, Op};
use crate::util::counters::Counter;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// Adaptive busy polling (QEMU's poll-max-ns, poll-grow, poll-shrink).
#[derive(Debug, Clone, Copy)]
pub struct PollConfig {
    /// Longest busy-poll window in nanoseconds; 0 switches polling off.
    pub max_ns: u64,
    /// Growth factor of the window; 0 means the default, 2.
    pub grow: u64,
    /// Divisor by which the window shrinks; 0 resets it to zero.
    pub shrink: u64,
}

/// The clock behind timers.
#[derive(Debug, Clone)]
pub enum Clock {
    /// `CLOCK_MONOTONIC`.
    Monotonic,
    /// Test clock: nanoseconds, moved by the test (which then calls [`AioContext::notify`]).
    Mock(Arc<AtomicU64>),
}

/// How a context is made.
#[derive(Debug, Clone)]
pub struct AioConfig {
    /// Name, as seen in logs and thread names.
    pub name: String,
    /// Busy polling.
    pub poll: PollConfig,
    /// Which engine does read, write, fsync, fallocate.
    pub engine: EngineChoice,
    /// Most worker threads of this context's pool.
    pub pool_threads: usize,
    /// The clock behind timers.
    pub clock: Clock,
}

impl Default for AioConfig {
    fn default() -> Self {
        AioConfig {
            name: String::from("aio"),
            poll: PollConfig { max_ns: 0, grow: 0, shrink: 0 },
            engine: EngineChoice::Auto,
            pool_threads: 16,
            clock: Clock::Monotonic,
        }
    }
}

/// What an fd handler wants to hear about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// Readable.
    Read,
    /// Writable.
    Write,
    /// Both.
    ReadWrite,
}

/// What became ready. Edge-triggered: read or write until `WouldBlock` before waiting again.
#[derive(Debug, Clone, Copy, Default)]
pub struct Readiness {
    /// Reading would not block (data, EOF or error).
    pub readable: bool,
    /// Writing would not block (space or error).
    pub writable: bool,
    /// The peer has closed (fully, or its writing half).
    pub closed: bool,
}

/// Names a registered fd handler of one context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HandlerId(pub(crate) usize);

/// Counters of one context, written by its home thread (except `notify_writes`).
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct ContextCounters {
    /// Turns of the loop.
    pub turns: Counter,
    /// Times the loop blocked in the kernel.
    pub blocks: Counter,
    /// Times that busy polling found work.
    pub poll_hits: Counter,
    /// Times that busy polling gave up.
    pub poll_misses: Counter,
    /// Writes to the wake-up eventfd by other threads.
    pub notify_writes: AtomicU64,
    /// Submissions to the engine.
    pub engine_submits: Counter,
}

/// An event loop owned by one home thread. Always behind an `Arc`.
pub struct AioContext {
    _private: (),
}

impl AioContext {
    /// Makes a context whose home is the calling thread, and makes it that thread's current context.
    ///
    /// # Errors
    /// What epoll, eventfd or (when forced) io_uring set-up reports.
    ///
    /// # Panics
    /// When the thread already has a live context.
    pub fn new(_config: AioConfig) -> io::Result<Arc<AioContext>> {
        todo!()
    }

    /// Returns the calling thread's context. Re-read after every yield.
    #[inline(never)]
    #[must_use]
    pub fn current() -> Option<Arc<AioContext>> {
        todo!()
    }

    /// Tells whether the calling thread is this context's home.
    #[must_use]
    pub fn is_home(&self) -> bool {
        todo!()
    }

    /// Returns the name given at creation.
    #[must_use]
    pub fn name(&self) -> &str {
        todo!()
    }

    /// Returns a process-wide unique, small number.
    #[must_use]
    pub fn id(&self) -> usize {
        todo!()
    }

    /// Runs one turn; blocks for work if `blocking`. Returns whether anything but the notifier made progress.
    ///
    /// # Panics
    /// When called off the home thread or from inside one of its callbacks in a coroutine (a nested poll from plain handler code is allowed only as aio-co.md 1.7 says).
    pub fn poll(self: &Arc<Self>, _blocking: bool) -> bool {
        todo!()
    }

    /// Wakes the loop from any thread; coalesced.
    pub fn notify(&self) {
        todo!()
    }

    /// Makes a bottom half; it runs once per turn after any number of schedules.
    pub fn bh_new(self: &Arc<Self>, _f: impl FnMut() + Send + 'static) -> BottomHalf {
        todo!()
    }

    /// Schedules a closure to run once on the home thread's next turn. Any thread.
    pub fn bh_schedule_oneshot(self: &Arc<Self>, _f: impl FnOnce() + Send + 'static) {
        todo!()
    }

    /// Schedules a runnable (FIFO among runnables) for the next turn. Any thread.
    pub fn schedule(self: &Arc<Self>, _r: Arc<dyn Runnable>) {
        todo!()
    }

    /// Registers an edge-triggered fd handler. Home thread only. The fd stays the caller's and must outlive the registration.
    ///
    /// # Errors
    /// What epoll reports (e.g. `EPERM` for a regular file, `EEXIST`).
    pub fn add_handler(
        self: &Arc<Self>,
        _fd: RawFd,
        _interest: Interest,
        _f: impl FnMut(Readiness) + Send + 'static,
    ) -> io::Result<HandlerId> {
        todo!()
    }

    /// Removes a handler, also from inside its own callback. Home thread only; unknown ids are ignored.
    pub fn remove_handler(&self, _id: HandlerId) {
        todo!()
    }

    /// Makes a disarmed one-shot timer. Home thread only.
    pub fn timer_new(self: &Arc<Self>, _f: impl FnMut() + Send + 'static) -> Timer {
        todo!()
    }

    /// Returns the clock's time in nanoseconds.
    #[must_use]
    pub fn now_ns(&self) -> u64 {
        todo!()
    }

    /// Queues a file operation; `done` runs on the home thread in a later step of the loop, never inside this call.
    /// Submissions of one turn go to the kernel together. Home thread only.
    ///
    /// # Safety
    /// The fd and the memory behind `op`'s vectors must stay valid (and unaliased for reads) until `done` runs.
    #[expect(unsafe_code, reason = "buffers are borrowed by the kernel")]
    pub unsafe fn submit(&self, _op: Op, _done: Completion) {
        todo!()
    }

    /// Runs `work` on this context's bounded thread pool, then `done` on the home thread. Home thread only.
    pub fn submit_blocking(&self, _work: Box<dyn FnOnce() -> io::Result<usize> + Send>, _done: Completion) {
        todo!()
    }

    /// Which engine was chosen.
    #[must_use]
    pub fn engine_kind(&self) -> EngineKind {
        todo!()
    }

    /// Returns this context's counters.
    #[must_use]
    pub fn counters(&self) -> &ContextCounters {
        todo!()
    }

    /// Changes busy polling. Home thread only.
    pub fn set_poll(&self, _poll: PollConfig) {
        todo!()
    }
}

/// A bottom half: a callback that runs once on the next turn of its context after being scheduled. Dropping it deletes it.
pub struct BottomHalf {
    _private: (),
}

impl BottomHalf {
    /// Schedules a run. Any thread; scheduling twice before the run is one run.
    pub fn schedule(&self) {
        todo!()
    }

    /// Takes a scheduled run back, if it has not begun. Any thread.
    pub fn cancel(&self) {
        todo!()
    }
}

/// A one-shot timer of one context; home thread only. Dropping it disarms it.
pub struct Timer {
    _private: (),
}

impl Timer {
    /// Arms (or moves) the timer to fire at `deadline_ns` of the context's clock.
    pub fn mod_ns(&self, _deadline_ns: u64) {
        todo!()
    }

    /// Disarms the timer.
    pub fn del(&self) {
        todo!()
    }

    /// Tells whether the timer is armed.
    #[must_use]
    pub fn pending(&self) -> bool {
        todo!()
    }
}
