//! Waiting for a condition that a std mutex guards, from coroutines of any threads.
//!
//! The waiter queues itself *under the mutex that guards the predicate*, unlocks, and only then yields, so no
//! wake-up is lost between looking and waiting. A std mutex and not a `CoMutex`, because the wakers are `Drop`s,
//! which must not yield. The waker changes the state, unlocks, and then restarts the queue (in plain code of a home
//! thread the woken ones run at once, and want the lock).

use crate::co::CoQueue;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks, also after a panic of another holder: the states behind these mutexes are consistent between statements.
pub(crate) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until `ready` gives a value; it runs under the lock, first at once and then after each restart of `queue`.
/// Coroutine only; yields unless the value is there at once.
pub(crate) fn co_wait_until<S, T>(
    state: &Mutex<S>,
    queue: &CoQueue,
    mut ready: impl FnMut(&mut S) -> Option<T>,
) -> T {
    let mut s = lock(state);
    loop {
        if let Some(v) = ready(&mut s) {
            return v;
        }
        s = queue.co_wait_with((state, s)).1;
    }
}
