//! Stackful coroutines scheduled by AioContexts, and the locks between them. The only user of `may`.
//!
//! ```text
//! coroutine.rs  create, enter, yield, wake      backend.rs     stacks; ONLY file naming may
//! mutex.rs      CoMutex                         mutex_core.rs  its protocol, model-checked by tests/loom
//! queue.rs      CoQueue                         rwlock.rs      CoRwLock
//! sleep.rs      co_sleep_ns, CoSleep, co_timeout
//! io.rs         co_preadv and its like          stream.rs      CoStream
//! ```
//!
//! A coroutine has a *home*: the context that it was last entered in. Whatever it waits for, it is resumed by
//! that context's thread ([`Coroutine::wake`], from any thread). Nothing here blocks a thread.
//!
//! Every wait re-checks its own condition: a stray wake may cost a switch, never correctness.

mod backend;
mod coroutine;
mod io;
mod mutex;
mod mutex_core;
mod queue;
mod run;
mod rwlock;
mod sleep;
mod stream;
mod waiter;

pub use coroutine::{Coroutine, CoroutineBuilder, Outcome, co_reschedule_self, co_yield};
pub use io::{co_fallocate, co_fsync, co_preadv, co_pwritev, co_run_blocking};
pub use mutex::{CoMutex, CoMutexGuard, CoMutexStats};
pub use queue::{CoQueue, Relock};
pub use run::run_to_end;
pub use rwlock::{CoRwLock, CoRwLockReadGuard, CoRwLockWriteGuard};
pub use sleep::{CoSleep, co_sleep_ns, co_timeout};
pub use stream::{CoStream, co_yield_until_fd_readable, co_yield_until_fd_writable};

/// Sets the coroutine machinery up; the first coroutine does it otherwise. `may` starts two threads here, which
/// stay idle for ever: whoever forks, or blocks signals for a signalfd, does that before.
pub fn init() {
    backend::init();
}

/// Lets each thread keep `n` more idle stacks (`qemu_coroutine_inc_pool_size`), so that bursts of that many
/// coroutines cost no `mmap`. Some 8 KiB resident each. Any thread.
pub fn inc_pool_size(n: usize) {
    backend::change_pool_size(|old| old.saturating_add(n));
}

/// Takes back what [`inc_pool_size`] gave (`qemu_coroutine_dec_pool_size`); stacks that are idle already are kept.
/// Any thread.
pub fn dec_pool_size(n: usize) {
    backend::change_pool_size(|old| old.saturating_sub(n));
}

/// Tells whether a client may have another coroutine: whether an idle stack is at hand, or the process has fewer stacks
/// than three quarters of what `vm.max_map_count` bears. The rest is for coroutines that end others' work. A soft bound:
/// threads that ask at the same time may each be told yes. Any thread.
#[must_use]
pub fn has_room() -> bool {
    backend::idle_stacks() > 0 || backend::stacks() < backend::stacks_max() / 4 * 3
}

/// Bounds stacks as a smaller `vm.max_map_count` would. For tests, in a process of their own.
#[doc(hidden)]
pub fn limit_stacks(max: usize) {
    backend::limit_stacks(max);
}

/// Returns how many idle stacks the calling thread keeps now.
#[must_use]
pub fn idle_stacks() -> usize {
    backend::idle_stacks()
}
