//! CoQueue: FIFO of waiting coroutines, guarded by the caller's lock.

use super::CoMutexGuard;

/// FIFO of coroutines. Internally synchronised (a short std lock never held across a yield), so it may be
/// used from several contexts with or without a CoMutex around the predicate.
#[derive(Default)]
pub struct CoQueue {
    _private: (),
}

impl CoQueue {
    /// Makes an empty queue.
    #[must_use]
    pub fn new() -> CoQueue {
        todo!()
    }

    /// Queues the current coroutine and yields. The caller re-checks its predicate. Coroutine only.
    pub fn co_wait(&self) {
        todo!()
    }

    /// Queues, unlocks `guard`, yields, locks again. Coroutine only.
    pub fn co_wait_with<'a, T>(&self, _guard: CoMutexGuard<'a, T>) -> CoMutexGuard<'a, T> {
        todo!()
    }

    /// Wakes the longest waiting one; false when empty. Any thread.
    pub fn next(&self) -> bool {
        todo!()
    }

    /// Wakes all. Any thread.
    pub fn restart_all(&self) {
        todo!()
    }

    /// Tells whether nobody waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        todo!()
    }
}
