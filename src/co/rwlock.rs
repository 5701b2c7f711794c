//! CoRwLock: ticket-fair readers and writers (QEMU 6.0 and later).
//!
//! Waiters queue as tickets in strict FIFO order: a reader that comes after a queued writer waits behind it, so
//! neither side starves; adjacent readers enter together, each letting in the next one. Ownership is set by the waker before the
//! wake, so nobody sneaks in between.
//!
//! The few fields are guarded by a short std lock that is never held across a yield, where QEMU has a CoMutex: so
//! unlocking never yields, and a guard may be dropped while unwinding.
//!
//! Invariants: never a writer with anybody else; `owners` equals the actual holders; tickets are served in order.

use super::coroutine::{Coroutine, Running, running};
use std::cell::UnsafeCell;
use std::collections::VecDeque;
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Who holds the lock: this many readers, or `WRITER`.
const WRITER: i32 = -1;

struct Ticket {
    read: bool,
    co: Coroutine,
}

#[derive(Default)]
struct State {
    /// Readers if positive, `WRITER`, or 0: free.
    owners: i32,
    tickets: VecDeque<Ticket>,
}

impl State {
    /// Lets the first ticket in if it fits; returns whom to wake, after the lock is released.
    fn serve_one(&mut self) -> Option<Coroutine> {
        let head = self.tickets.front()?;
        if head.read && self.owners >= 0 {
            self.owners += 1;
        } else if !head.read && self.owners == 0 {
            self.owners = WRITER;
        } else {
            return None;
        }
        let ticket = self.tickets.pop_front()?;
        ticket.co.grant();
        Some(ticket.co)
    }
}

/// A readers-writer lock for coroutines (`CoRwlock`).
pub struct CoRwLock<T> {
    state: Mutex<State>,
    poisoned: AtomicBool,
    data: UnsafeCell<T>,
}

#[expect(unsafe_code, reason = "a lock")]
// SAFETY: the data goes with the lock.
unsafe impl<T: Send> Send for CoRwLock<T> {}
#[expect(unsafe_code, reason = "a lock")]
// SAFETY: readers share the data, also across threads (`T: Sync`); a writer has it alone (`T: Send`).
unsafe impl<T: Send + Sync> Sync for CoRwLock<T> {}

impl<T> CoRwLock<T> {
    /// Makes a free lock around `data` (`qemu_co_rwlock_init`).
    pub fn new(data: T) -> CoRwLock<T> {
        CoRwLock {
            state: Mutex::new(State::default()),
            poisoned: AtomicBool::new(false),
            data: UnsafeCell::new(data),
        }
    }

    /// Locks for reading; waits behind queued writers (`qemu_co_rwlock_rdlock`). Coroutine only. Yields while it waits.
    ///
    /// # Panics
    /// Outside of coroutines.
    #[track_caller]
    pub fn co_read(&self) -> CoRwLockReadGuard<'_, T> {
        let me = this_coroutine();
        let mut state = self.lock();
        if state.owners == 0 || (state.owners > 0 && state.tickets.is_empty()) {
            state.owners += 1;
        } else {
            co_wait_for_turn(state, me, true);
            // Adjacent readers enter together: let the next one in line in.
            self.serve();
        }
        me.lock_taken();
        CoRwLockReadGuard { lock: self, not_send: PhantomData }
    }

    /// Locks for writing (`qemu_co_rwlock_wrlock`). Coroutine only. Yields while it waits.
    ///
    /// # Panics
    /// Outside of coroutines.
    #[track_caller]
    pub fn co_write(&self) -> CoRwLockWriteGuard<'_, T> {
        let me = this_coroutine();
        let mut state = self.lock();
        if state.owners == 0 {
            state.owners = WRITER;
        } else {
            co_wait_for_turn(state, me, false);
        }
        me.lock_taken();
        self.write_guard()
    }

    /// Tells whether a panic has unwound through a write guard: the data may be half changed.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Relaxed)
    }

    /// Returns the data without locking: `&mut` proves that nobody else is there.
    pub fn get_mut(&mut self) -> &mut T {
        self.data.get_mut()
    }

    /// Returns the data.
    pub fn into_inner(self) -> T {
        self.data.into_inner()
    }

    /// Holders now: readers if positive, -1 for a writer, 0 when free; and how many wait.
    #[must_use]
    pub fn holders_and_waiters(&self) -> (i32, usize) {
        let state = self.lock();
        (state.owners, state.tickets.len())
    }

    fn write_guard(&self) -> CoRwLockWriteGuard<'_, T> {
        CoRwLockWriteGuard { lock: self, panicking: std::thread::panicking(), not_send: PhantomData }
    }

    /// Lets one waiter in if its turn has come.
    fn serve(&self) {
        let next = self.lock().serve_one();
        if let Some(co) = next {
            co.wake();
        }
    }

    /// Gives one ownership back (`qemu_co_rwlock_unlock`).
    #[track_caller]
    fn unlock(&self) {
        let me = this_coroutine();
        let next = {
            let mut state = self.lock();
            assert!(state.owners != 0, "unlock of a free CoRwLock");
            state.owners = if state.owners == WRITER { 0 } else { state.owners - 1 };
            state.serve_one()
        };
        me.lock_released();
        if let Some(co) = next {
            co.wake();
        }
    }

    /// Nothing under the lock runs foreign code but the asserts, which leave the state as it was.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Queues a ticket, releases `state`, and yields until somebody has given us ownership.
fn co_wait_for_turn(mut state: MutexGuard<'_, State>, me: Running, read: bool) {
    state.tickets.push_back(Ticket { read, co: me.begin_wait() });
    drop(state);
    me.co_wait_granted();
}

#[track_caller]
fn this_coroutine() -> Running {
    match running() {
        Some(me) => me,
        None => panic!("CoRwLock used outside of a coroutine"),
    }
}

impl<T: Default> Default for CoRwLock<T> {
    fn default() -> Self {
        CoRwLock::new(T::default())
    }
}

impl<T> fmt::Debug for CoRwLock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (owners, waiters) = self.holders_and_waiters();
        f.debug_struct("CoRwLock").field("owners", &owners).field("waiters", &waiters).finish_non_exhaustive()
    }
}

/// Holds a [`CoRwLock`] for reading; unlocks on drop, which never yields.
#[must_use = "dropping the guard unlocks"]
pub struct CoRwLockReadGuard<'a, T> {
    lock: &'a CoRwLock<T>,
    not_send: PhantomData<*const ()>,
}

impl<'a, T> CoRwLockReadGuard<'a, T> {
    /// Turns the reader into a writer (`qemu_co_rwlock_upgrade`). At once if it is alone and nobody waits; otherwise it
    /// gives its read ownership up and queues at the tail, so **another writer may run in between**: look at the
    /// data again. Coroutine only. Yields while it waits.
    #[track_caller]
    pub fn co_upgrade(self) -> CoRwLockWriteGuard<'a, T> {
        let lock = self.lock;
        let me = this_coroutine();
        // The count of held locks stays: one guard becomes the other.
        std::mem::forget(self);
        let mut state = lock.lock();
        assert!(state.owners > 0, "upgrade of a CoRwLock without readers");
        if state.owners == 1 && state.tickets.is_empty() {
            state.owners = WRITER;
            drop(state);
            return lock.write_guard();
        }
        state.owners -= 1;
        state.tickets.push_back(Ticket { read: false, co: me.begin_wait() });
        // Our own ticket cannot be the one: others hold it, or are queued before us.
        let next = state.serve_one();
        drop(state);
        if let Some(co) = next {
            co.wake();
        }
        me.co_wait_granted();
        lock.write_guard()
    }
}

impl<T> Deref for CoRwLockReadGuard<'_, T> {
    type Target = T;
    #[expect(unsafe_code, reason = "a lock guard")]
    fn deref(&self) -> &T {
        // SAFETY: a reader holds the lock, so there is no writer.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T> Drop for CoRwLockReadGuard<'_, T> {
    fn drop(&mut self) {
        self.lock.unlock();
    }
}

/// Holds a [`CoRwLock`] for writing; unlocks on drop, which never yields.
#[must_use = "dropping the guard unlocks"]
pub struct CoRwLockWriteGuard<'a, T> {
    lock: &'a CoRwLock<T>,
    panicking: bool,
    not_send: PhantomData<*const ()>,
}

impl<'a, T> CoRwLockWriteGuard<'a, T> {
    /// Turns the writer into a reader (`qemu_co_rwlock_downgrade`), letting in readers that are next in line. Never yields.
    #[track_caller]
    pub fn downgrade(self) -> CoRwLockReadGuard<'a, T> {
        let lock = self.lock;
        // The count of held locks stays: one guard becomes the other.
        std::mem::forget(self);
        let next = {
            let mut state = lock.lock();
            assert!(state.owners == WRITER, "downgrade of a CoRwLock without a writer");
            state.owners = 1;
            state.serve_one()
        };
        if let Some(co) = next {
            co.wake();
        }
        CoRwLockReadGuard { lock, not_send: PhantomData }
    }
}

impl<T> Deref for CoRwLockWriteGuard<'_, T> {
    type Target = T;
    #[expect(unsafe_code, reason = "a lock guard")]
    fn deref(&self) -> &T {
        // SAFETY: the writer is alone.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T> DerefMut for CoRwLockWriteGuard<'_, T> {
    #[expect(unsafe_code, reason = "a lock guard")]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the writer is alone, and `&mut self` makes this its only reference.
        unsafe { &mut *self.lock.data.get() }
    }
}

impl<T> Drop for CoRwLockWriteGuard<'_, T> {
    fn drop(&mut self) {
        if !self.panicking && std::thread::panicking() {
            self.lock.poisoned.store(true, Ordering::Relaxed);
        }
        self.lock.unlock();
    }
}
