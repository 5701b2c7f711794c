//! CoMutex: fair hand-over between coroutines of any contexts.
//!
//! The protocol is in `mutex_core`; this file adds the coroutine, the data, the holder and the spinning. A locker
//! waits by yielding, never by blocking its thread. Ownership is handed from the unlocker directly to the longest
//! waiting one, which resumes on its own context: newcomers cannot barge in while somebody waits.
//!
//! Spinning: only when the lock looked held with nobody queued, only when the owner runs in *another* context (an
//! owner of our own cannot make progress while we spin), and at most [`SPIN_MAX`] rounds; rounds are counted
//! ([`CoMutex::stats`]). An unlock never spins.
//!
//! Waking before the sleeper has yielded is harmless: [`Coroutine::wake`] runs it on its home, or when the waker
//! yields, both after its own yield. A stray wake is harmless too: the waiter checks its record and yields again.
//!
//! Misuse panics in every build: locking outside of coroutines or twice, unlocking what another coroutine holds.

use super::coroutine::{Coroutine, Inner, Running, co_yield, running};
use super::mutex_core::{MutexCore, Queued, Record, Unlocked};
use std::cell::UnsafeCell;
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Most rounds that one lock attempt spins (QEMU's number).
const SPIN_MAX: u32 = 1000;

/// Counters of one mutex; read them when nobody uses it, or take them as approximate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CoMutexStats {
    /// Rounds that lockers have spun.
    pub spins: u64,
    /// Times that a locker had to queue.
    pub queued: u64,
    /// Times that an unlocker left the duty to wake to a locker that was about to queue.
    pub handoffs: u64,
}

/// A mutex that makes coroutines wait, not threads (`CoMutex`).
///
/// ```compile_fail
/// // A guard belongs to the coroutine that locked: it cannot be sent away.
/// fn send<T: Send>(_: T) {}
/// fn f(m: &conbd::co::CoMutex<u32>) { send(m.co_lock()) }
/// ```
pub struct CoMutex<T> {
    core: MutexCore<Inner>,
    /// Home of the owner, as a hint for spinners; 0 when free or in passing.
    owner_home: AtomicUsize,
    /// The owner's `Running::id`; 0 when free or in passing.
    holder: AtomicUsize,
    poisoned: AtomicBool,
    spins: AtomicU64,
    queued: AtomicU64,
    handoffs: AtomicU64,
    data: UnsafeCell<T>,
}

#[expect(unsafe_code, reason = "a mutex")]
// SAFETY: the data goes with the mutex.
unsafe impl<T: Send> Send for CoMutex<T> {}
#[expect(unsafe_code, reason = "a mutex")]
// SAFETY: the data is reached by one coroutine at a time; the hand-over is a Release/Acquire chain.
unsafe impl<T: Send> Sync for CoMutex<T> {}

impl<T> CoMutex<T> {
    /// Makes a free mutex around `data` (`qemu_co_mutex_init`).
    pub fn new(data: T) -> CoMutex<T> {
        CoMutex {
            core: MutexCore::default(),
            owner_home: AtomicUsize::new(0),
            holder: AtomicUsize::new(0),
            poisoned: AtomicBool::new(false),
            spins: AtomicU64::new(0),
            queued: AtomicU64::new(0),
            handoffs: AtomicU64::new(0),
            data: UnsafeCell::new(data),
        }
    }

    /// Locks; yields while another holds it (`qemu_co_mutex_lock`). Coroutine only.
    ///
    /// # Panics
    /// Outside of coroutines, and when this coroutine holds it already.
    #[track_caller]
    pub fn co_lock(&self) -> CoMutexGuard<'_, T> {
        let Some(me) = running() else { no_coroutine() };
        if self.core.try_lock() != 0 {
            self.co_lock_slow(me, || {}, || {});
        }
        self.taken(me)
    }

    /// [`CoMutex::co_lock`] for tests. If we have to queue, `counted` runs between counting ourselves and queueing,
    /// and `queued` between queueing and the yield.
    #[doc(hidden)]
    #[track_caller]
    pub fn co_lock_with_gaps(&self, counted: impl FnOnce(), queued: impl FnOnce()) -> CoMutexGuard<'_, T> {
        let Some(me) = running() else { no_coroutine() };
        if self.core.try_lock() != 0 {
            self.co_lock_slow(me, counted, queued);
        }
        self.taken(me)
    }

    /// Locks if that needs no waiting. Coroutine only.
    ///
    /// # Panics
    /// Outside of coroutines.
    #[track_caller]
    pub fn try_lock(&self) -> Option<CoMutexGuard<'_, T>> {
        let Some(me) = running() else { no_coroutine() };
        (self.core.try_lock() == 0).then(|| self.taken(me))
    }

    /// Tells whether the current coroutine holds the lock. Any thread; false outside of coroutines.
    #[must_use]
    pub fn is_locked_by_me(&self) -> bool {
        running().is_some_and(|me| self.holder.load(Ordering::Relaxed) == me.id())
    }

    /// Checks that the current coroutine holds the lock (`qemu_co_mutex_assert_locked`).
    ///
    /// # Panics
    /// Unless it does.
    #[track_caller]
    pub fn assert_locked(&self) {
        assert!(self.is_locked_by_me(), "CoMutex is not held by the current coroutine");
    }

    /// Tells whether a panic has unwound through a guard: the data may be half changed.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Relaxed)
    }

    /// Takes the poison mark away, once the data is known to be good.
    pub fn clear_poison(&self) {
        self.poisoned.store(false, Ordering::Relaxed);
    }

    /// Returns the data without locking: `&mut` proves that nobody else is there.
    pub fn get_mut(&mut self) -> &mut T {
        self.data.get_mut()
    }

    /// Returns the data.
    pub fn into_inner(self) -> T {
        self.data.into_inner()
    }

    /// Returns the counters.
    #[must_use]
    pub fn stats(&self) -> CoMutexStats {
        CoMutexStats {
            spins: self.spins.load(Ordering::Relaxed),
            queued: self.queued.load(Ordering::Relaxed),
            handoffs: self.handoffs.load(Ordering::Relaxed),
        }
    }

    /// Tells whether it is free with both queues empty and no offer left (invariant I2). Exact when nobody uses it.
    #[doc(hidden)]
    #[must_use]
    pub fn is_pristine(&self) -> bool {
        self.core.is_pristine()
    }

    /// Unlocks without a guard (`qemu_co_mutex_unlock`), after `mem::forget` of one.
    ///
    /// # Safety
    /// No guard of this mutex may be alive in the current coroutine.
    ///
    /// # Panics
    /// Outside of coroutines, and unless the current coroutine holds the lock.
    #[track_caller]
    #[expect(unsafe_code, reason = "the caller vouches for the guard")]
    pub unsafe fn force_unlock(&self) {
        self.unlock();
    }

    /// Records the new owner.
    #[inline]
    fn taken(&self, me: Running) -> CoMutexGuard<'_, T> {
        self.holder.store(me.id(), Ordering::Relaxed);
        self.owner_home.store(me.home_id(), Ordering::Relaxed);
        me.lock_taken();
        CoMutexGuard { mutex: self, panicking: std::thread::panicking(), not_send: PhantomData }
    }

    /// The first look found it held. Returns as the owner.
    #[cold]
    #[track_caller]
    fn co_lock_slow(&self, me: Running, counted: impl FnOnce(), queued: impl FnOnce()) {
        assert!(self.holder.load(Ordering::Relaxed) != me.id(), "{:?}: locks a CoMutex that it holds", *me);
        me.check_wakeable();
        if self.spin(me) || self.core.count() {
            return;
        }
        counted();
        self.queued.fetch_add(1, Ordering::Relaxed);
        let record = Record::new(Arc::into_raw(me.handle().into_inner()).cast_mut());
        match self.core.queue(&record) {
            Queued::Mine(waiter) => {
                drop(from_raw(waiter));
                return;
            }
            Queued::Wake(waiter) => self.hand_to(waiter),
            Queued::Sleep => {}
        }
        queued();
        // Whoever takes our record out has made us the owner. Nothing may leave this frame before that: the
        // record is queued. `co_yield` panics only when unwinding, and then the process is past saving.
        // At least one yield: the grant brings exactly one wake, which may be under way already, and which no later
        // yield must get instead.
        loop {
            co_yield();
            if record.granted() {
                return;
            }
        }
    }

    /// Spins while it can help; true if that took the lock.
    fn spin(&self, me: Running) -> bool {
        let my_home = me.home_id();
        let mut rounds = 0;
        let taken = 'retry: loop {
            match self.core.try_lock() {
                0 => break true,
                1 => {}
                _ => break false,
            }
            while rounds < SPIN_MAX && self.owner_home.load(Ordering::Relaxed) != my_home {
                rounds += 1;
                if self.core.looks_free() {
                    continue 'retry;
                }
                std::hint::spin_loop();
            }
            break false;
        };
        if rounds > 0 {
            self.spins.fetch_add(u64::from(rounds), Ordering::Relaxed);
        }
        taken
    }

    /// Wakes the one that has been made the owner.
    fn hand_to(&self, waiter: *mut Inner) {
        let co = from_raw(waiter);
        self.owner_home.store(co.home_id(), Ordering::Relaxed);
        co.wake();
    }

    #[track_caller]
    fn unlock(&self) {
        let Some(me) = running() else { no_coroutine() };
        let holder = self.holder.load(Ordering::Relaxed);
        assert!(holder == me.id(), "{:?}: unlocks a CoMutex that it does not hold", *me);
        self.owner_home.store(0, Ordering::Relaxed);
        self.holder.store(0, Ordering::Relaxed);
        me.lock_released();
        match self.core.unlock() {
            Unlocked::Free => {}
            Unlocked::Wake(waiter) => self.hand_to(waiter),
            Unlocked::HandedOff => {
                self.handoffs.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

#[cold]
#[track_caller]
fn no_coroutine() -> ! {
    panic!("CoMutex used outside of a coroutine");
}

#[expect(unsafe_code, reason = "reverses Arc::into_raw")]
fn from_raw(waiter: *mut Inner) -> Coroutine {
    // SAFETY: from `Arc::into_raw` in `co_lock_slow`; the protocol gives each waiter out once.
    Coroutine::from_inner(unsafe { Arc::from_raw(waiter) })
}

impl<T: Default> Default for CoMutex<T> {
    fn default() -> Self {
        CoMutex::new(T::default())
    }
}

impl<T: fmt::Debug> fmt::Debug for CoMutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CoMutex").field("poisoned", &self.is_poisoned()).finish_non_exhaustive()
    }
}

/// Holds a [`CoMutex`]; unlocks on drop, which never yields. Belongs to the coroutine that locked.
#[must_use = "dropping the guard unlocks"]
pub struct CoMutexGuard<'a, T> {
    mutex: &'a CoMutex<T>,
    /// The lock was taken while unwinding already: then dropping the guard says nothing about the data.
    panicking: bool,
    not_send: PhantomData<*const ()>,
}

impl<'a, T> CoMutexGuard<'a, T> {
    /// Returns the mutex that the guard holds.
    #[must_use]
    pub fn mutex(this: &Self) -> &'a CoMutex<T> {
        this.mutex
    }
}

impl<T> Deref for CoMutexGuard<'_, T> {
    type Target = T;
    #[expect(unsafe_code, reason = "a mutex guard")]
    fn deref(&self) -> &T {
        // SAFETY: the guard is the lock; shared with `&self`.
        unsafe { &*self.mutex.data.get() }
    }
}

impl<T> DerefMut for CoMutexGuard<'_, T> {
    #[expect(unsafe_code, reason = "a mutex guard")]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the guard is the lock; exclusive with `&mut self`.
        unsafe { &mut *self.mutex.data.get() }
    }
}

impl<T> Drop for CoMutexGuard<'_, T> {
    fn drop(&mut self) {
        if !self.panicking && std::thread::panicking() {
            self.mutex.poisoned.store(true, Ordering::Relaxed);
        }
        self.mutex.unlock();
    }
}

impl<T: fmt::Debug> fmt::Debug for CoMutexGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}
