//! CoQueue: FIFO of waiting coroutines, next to a predicate that the caller's lock guards.
//!
//! The queue synchronises itself (a short std lock, never held across a yield), so it works from several contexts,
//! with a [`CoMutex`], a std mutex or nothing around the predicate. No wakeup is lost between the unlock and the
//! yield: a waker on another thread can only schedule us on our home, which runs us after this yield.
//!
//! A waiter re-checks its predicate in a loop: others may run between the wake and the lock.

use super::coroutine::{Coroutine, running};
use super::mutex::{CoMutex, CoMutexGuard};
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A lock that can be given up for a while (`QemuLockable`): the guard of a [`CoMutex`], of a std
/// mutex (together with the mutex), or `()` for no lock.
pub trait Relock: Sized {
    /// What is left of the guard while it is unlocked.
    type Unlocked;
    /// Gives the lock up.
    fn unlock(self) -> Self::Unlocked;
    /// Takes it again; may yield.
    fn co_relock(unlocked: Self::Unlocked) -> Self;
}

impl<'a, T> Relock for CoMutexGuard<'a, T> {
    type Unlocked = &'a CoMutex<T>;
    fn unlock(self) -> Self::Unlocked {
        CoMutexGuard::mutex(&self)
    }
    fn co_relock(unlocked: Self::Unlocked) -> Self {
        unlocked.co_lock()
    }
}

impl<'a, T> Relock for (&'a Mutex<T>, MutexGuard<'a, T>) {
    type Unlocked = &'a Mutex<T>;
    fn unlock(self) -> Self::Unlocked {
        self.0
    }
    fn co_relock(unlocked: Self::Unlocked) -> Self {
        (unlocked, unlocked.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Relock for () {
    type Unlocked = ();
    fn unlock(self) {}
    fn co_relock((): ()) {}
}

/// FIFO of coroutines. Internally synchronised, so it may be used from several contexts with or without a CoMutex
/// around the predicate.
#[derive(Default)]
pub struct CoQueue {
    waiting: Mutex<VecDeque<Coroutine>>,
}

impl CoQueue {
    /// Makes an empty queue (`qemu_co_queue_init`).
    #[must_use]
    pub fn new() -> CoQueue {
        CoQueue::default()
    }

    /// Queues the current coroutine and yields. The caller re-checks its predicate. Coroutine only.
    ///
    /// # Panics
    /// Outside of coroutines.
    #[track_caller]
    pub fn co_wait(&self) {
        self.co_wait_with(());
    }

    /// Queues, unlocks `guard`, yields, locks again (`qemu_co_queue_wait`). Coroutine only.
    ///
    /// # Panics
    /// Outside of coroutines.
    #[track_caller]
    pub fn co_wait_with<G: Relock>(&self, guard: G) -> G {
        self.wait(guard, false)
    }

    /// [`CoQueue::co_wait_with`] at the front (`CO_QUEUE_WAIT_FRONT`): for whoever was woken, found its
    /// predicate false again, and must not lose its turn. Coroutine only.
    ///
    /// # Panics
    /// Outside of coroutines.
    #[track_caller]
    pub fn co_wait_front_with<G: Relock>(&self, guard: G) -> G {
        self.wait(guard, true)
    }

    #[track_caller]
    fn wait<G: Relock>(&self, guard: G, front: bool) -> G {
        let Some(me) = running() else {
            panic!("CoQueue: only a coroutine can wait");
        };
        {
            let mut waiting = self.lock();
            let co = me.begin_wait();
            if front {
                waiting.push_front(co);
            } else {
                waiting.push_back(co);
            }
        }
        let unlocked = guard.unlock();
        me.co_wait_granted();
        G::co_relock(unlocked)
    }

    /// Wakes the longest waiting one; false when empty (`qemu_co_queue_next`). Any thread. In a coroutine the
    /// woken one runs when the current one yields; in plain code of its home thread it runs at once, so no lock
    /// that it wants may be held: see [`CoQueue::enter_next`].
    pub fn next(&self) -> bool {
        let co = self.lock().pop_front();
        match co {
            Some(co) => {
                release(&co);
                true
            }
            None => false,
        }
    }

    /// Wakes all that wait now, in order (`qemu_co_queue_restart_all`). Any thread; see [`CoQueue::next`].
    pub fn restart_all(&self) {
        let all = std::mem::take(&mut *self.lock());
        for co in all {
            release(&co);
        }
    }

    /// Wakes the longest waiting one with `guard` given up meanwhile (`qemu_co_enter_next`): for plain code,
    /// where the woken one runs at once. In a coroutine it equals [`CoQueue::next`]: nothing is unlocked.
    /// Returns whether there was one.
    pub fn enter_next<G: Relock>(&self, guard: G) -> (G, bool) {
        let co = self.lock().pop_front();
        let Some(co) = co else { return (guard, false) };
        if Coroutine::in_coroutine() {
            release(&co);
            return (guard, true);
        }
        let unlocked = guard.unlock();
        release(&co);
        (G::co_relock(unlocked), true)
    }

    /// [`CoQueue::enter_next`] until the queue is empty (`qemu_co_enter_all`).
    pub fn enter_all<G: Relock>(&self, mut guard: G) -> G {
        loop {
            let (again, more) = self.enter_next(guard);
            guard = again;
            if !more {
                return guard;
            }
        }
    }

    /// Tells whether nobody waits (`qemu_co_queue_empty`).
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Returns how many wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Nothing under the lock runs foreign code, so a poisoned one is as good as new.
    fn lock(&self) -> MutexGuard<'_, VecDeque<Coroutine>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends the wait of one that was taken out.
fn release(co: &Coroutine) {
    co.grant();
    co.wake();
}

impl fmt::Debug for CoQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CoQueue").field("len", &self.len()).finish()
    }
}
