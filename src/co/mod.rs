//! Stackful coroutines scheduled by AioContexts, and the locks between them. The only user of `may`.
//! (owner: co helper; these names are the contract, split into files as the architecture says)

mod coroutine;
mod io;
mod mutex;
mod queue;
mod rwlock;
mod sleep;
mod stream;

pub use coroutine::{Coroutine, co_reschedule_self, co_yield};
pub use io::{co_fallocate, co_fsync, co_preadv, co_pwritev, co_run_blocking};
pub use mutex::{CoMutex, CoMutexGuard};
pub use queue::CoQueue;
pub use rwlock::{CoRwLock, CoRwLockReadGuard, CoRwLockWriteGuard};
pub use sleep::{CoSleep, co_sleep_ns};
pub use stream::{CoStream, co_yield_until_fd_readable, co_yield_until_fd_writable};
