//! The protocol of CoMutex, without coroutines: who owns, who queues, who must wake whom.
//!
//! Imports `crate::util::sync` only, so that `tests/loom` can compile this very file against loom's atomics and
//! explore it. Waiters are opaque pointers here: [`MutexCore::queue`] and [`MutexCore::unlock`] say which one is
//! the next owner, the caller wakes it.
//!
//! ```text
//!  locked     0 free; n: one owner and n-1 lockers that are queued or about to queue
//!  from_push  LIFO that any locker pushes its record on
//!  to_pop     records in wake order; touched only by whoever has the duty to wake the next owner
//!  handoff    0, or an offer (a sequence number): "I found nobody to wake; whoever queues, take the duty"
//! ```
//!
//! Why no wakeup is lost. While `locked >= 1` after an unlock nobody can take the lock by itself; exactly one
//! *duty* exists: take one record out and make it the owner. It begins with the unlocker. If it finds no record,
//! some locker has counted itself and not yet pushed. Then the unlocker does *offer; fence; look at the queue*, and the
//! locker *push; fence; look at the offer*: at least one of them sees the other, and if both do, the
//! compare-exchange on `handoff` elects one. If the queue is still empty when the unlocker looks, the locker must see the
//! offer, and the unlocker leaves **without spinning**: QEMU 10.0.2 computes that look wrongly (an `||` of two
//! emptiness tests), so its unlocker spins for as long as the locker is preempted.
//!
//! Invariants: one owner; one agent with the duty, so `to_pop` has one user at a time (ownership of the duty goes
//! from one to the next through `locked`, `handoff` or the wake itself, each a Release/Acquire pair).

use crate::util::sync::{AtomicPtr, AtomicU32, Ordering, fence};
use std::marker::PhantomData;
use std::ptr;

/// Which steps of the protocol are done: all of them. The loom model switches single ones off, to prove that each is
/// needed (and leaves out the fences, which needs no help from here).
pub(crate) trait Steps {
    /// The unlocker looks at the queue again after it made an offer.
    const RECHECK_AFTER_OFFER: bool = true;
    /// The unlocker that sees a record withdraws its offer by compare-exchange, not by a plain store.
    const ELECT_BY_EXCHANGE: bool = true;
}

/// The real protocol.
#[derive(Debug)]
pub(crate) struct AllSteps;

impl Steps for AllSteps {}

/// One waiting locker; on its own stack until it has been granted the lock.
#[derive(Debug)]
pub(crate) struct Record<W> {
    next: AtomicPtr<Record<W>>,
    /// The waiter; null once it was made the owner.
    waiter: AtomicPtr<W>,
}

impl<W> Record<W> {
    /// Makes a record for `waiter`, which is not null.
    pub(crate) fn new(waiter: *mut W) -> Record<W> {
        Record { next: AtomicPtr::new(ptr::null_mut()), waiter: AtomicPtr::new(waiter) }
    }

    /// Tells whether the waiter has been made the owner. Acquire: pairs with the grant in `pop`.
    pub(crate) fn granted(&self) -> bool {
        self.waiter.load(Ordering::Acquire).is_null()
    }
}

/// What [`MutexCore::queue`] found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Queued<W> {
    /// Sleep until `Record::granted`.
    Sleep,
    /// Taken over an unlocker's duty, and it is our own turn: we own the lock. Carries our own waiter.
    Mine(*mut W),
    /// Taken over an unlocker's duty: wake this one (it owns the lock now), then sleep.
    Wake(*mut W),
}

/// What [`MutexCore::unlock`] did.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Unlocked<W> {
    /// Nobody was there.
    Free,
    /// This waiter owns the lock now: wake it.
    Wake(*mut W),
    /// A locker that was about to queue has, or will take, the duty.
    HandedOff,
}

/// The atomics of one mutex. `W` is what waiters point to.
#[derive(Debug)]
pub(crate) struct MutexCore<W, S: Steps = AllSteps> {
    locked: AtomicU32,
    handoff: AtomicU32,
    /// Number of the last offer; only the unlocker with the duty touches it.
    sequence: AtomicU32,
    from_push: AtomicPtr<Record<W>>,
    to_pop: AtomicPtr<Record<W>>,
    steps: PhantomData<fn() -> S>,
}

impl<W, S: Steps> Default for MutexCore<W, S> {
    fn default() -> Self {
        MutexCore {
            locked: AtomicU32::new(0),
            handoff: AtomicU32::new(0),
            sequence: AtomicU32::new(0),
            from_push: AtomicPtr::new(ptr::null_mut()),
            to_pop: AtomicPtr::new(ptr::null_mut()),
            steps: PhantomData,
        }
    }
}

impl<W, S: Steps> MutexCore<W, S> {
    /// Takes the lock if it is free; returns the count before: 0 means taken, 1 means held with nobody queued.
    #[inline]
    pub(crate) fn try_lock(&self) -> u32 {
        // Acquire pairs with the Release in `unlock`: we see what the last owner did.
        match self.locked.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed) {
            Ok(old) | Err(old) => old,
        }
    }

    /// Tells whether the lock looks free.
    #[inline]
    pub(crate) fn looks_free(&self) -> bool {
        self.locked.load(Ordering::Relaxed) == 0
    }

    /// Counts the caller as a locker; true if that found the lock free and took it. Otherwise the caller must
    /// call [`MutexCore::queue`]: an unlocker may rely on it from now on.
    #[inline]
    pub(crate) fn count(&self) -> bool {
        self.locked.fetch_add(1, Ordering::Acquire) == 0
    }

    /// Queues a counted locker.
    ///
    /// The record must stay where it is until it was granted (or came back as `Mine`). A returned waiter has been
    /// made the owner; the caller must wake it.
    pub(crate) fn queue(&self, record: &Record<W>) -> Queued<W> {
        let me = record.waiter.load(Ordering::Relaxed);
        let raw = ptr::from_ref(record).cast_mut();
        let mut head = self.from_push.load(Ordering::Relaxed);
        loop {
            record.next.store(head, Ordering::Relaxed);
            // Release pairs with the Acquire swap in `pop`.
            match self.from_push.compare_exchange(head, raw, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => break,
                Err(now) => head = now,
            }
        }
        // (A) Push before looking at the offer; pairs with (B) in `unlock`.
        fence(Ordering::SeqCst);
        let offer = self.handoff.load(Ordering::Relaxed);
        let took = offer != 0
            // Acquire pairs with the Release store of the offer: we continue where the unlocker stopped.
            && self.handoff.compare_exchange(offer, 0, Ordering::Acquire, Ordering::Relaxed).is_ok();
        if !took {
            return Queued::Sleep;
        }
        match self.pop() {
            Some(waiter) if waiter == me => Queued::Mine(waiter),
            Some(waiter) => Queued::Wake(waiter),
            None => unreachable!("our own record is queued and nobody else may pop"),
        }
    }

    /// Gives the lock back. A returned waiter has been made the owner; the caller must wake it. Never spins:
    /// at most one more round per locker that arrives meanwhile.
    pub(crate) fn unlock(&self) -> Unlocked<W> {
        // Release pairs with the Acquire in `try_lock` and `count`.
        let before = self.locked.fetch_sub(1, Ordering::Release);
        debug_assert!(before > 0, "unlock of a free CoMutex");
        if before == 1 {
            return Unlocked::Free;
        }
        loop {
            if let Some(waiter) = self.pop() {
                return Unlocked::Wake(waiter);
            }
            // A locker is between `count` and its push: leave an offer.
            let mut token = self.sequence.load(Ordering::Relaxed).wrapping_add(1);
            if token == 0 {
                token = 1;
            }
            self.sequence.store(token, Ordering::Relaxed);
            // Release pairs with the Acquire exchange in `queue`.
            self.handoff.store(token, Ordering::Release);
            // (B) Offer before looking at the queue; pairs with (A) in `queue`.
            fence(Ordering::SeqCst);
            if !S::RECHECK_AFTER_OFFER || self.from_push.load(Ordering::Relaxed).is_null() {
                // It has not pushed: it will see the offer.
                return Unlocked::HandedOff;
            }
            if S::ELECT_BY_EXCHANGE {
                // It has pushed: whoever gets the offer has the duty. Acquire: on success we go on to pop.
                let back = self.handoff.compare_exchange(token, 0, Ordering::Acquire, Ordering::Relaxed);
                if back.is_err() {
                    return Unlocked::HandedOff;
                }
            } else {
                self.handoff.store(0, Ordering::Relaxed);
            }
        }
    }

    /// Takes the next waiter out, in the order of arrival, and grants it the lock. Only by who has the duty.
    #[expect(unsafe_code, reason = "intrusive list of records on other stacks")]
    fn pop(&self) -> Option<*mut W> {
        let mut head = self.to_pop.load(Ordering::Relaxed);
        if head.is_null() {
            // Acquire pairs with the Release pushes; the LIFO is turned around.
            let mut pushed = self.from_push.swap(ptr::null_mut(), Ordering::Acquire);
            // SAFETY: a queued record stays where it is until it is granted, which only we can do.
            while let Some(record) = unsafe { pushed.as_ref() } {
                let next = record.next.load(Ordering::Relaxed);
                record.next.store(head, Ordering::Relaxed);
                head = pushed;
                pushed = next;
            }
        }
        // SAFETY: as above.
        let record = unsafe { head.as_ref() }?;
        self.to_pop.store(record.next.load(Ordering::Relaxed), Ordering::Relaxed);
        // The grant: from here on the record may be gone. Release pairs with the Acquire in `granted`.
        Some(record.waiter.swap(ptr::null_mut(), Ordering::AcqRel))
    }

    /// Tells whether the core looks as new: free, nobody queued, no offer. For tests, when nobody uses it.
    pub(crate) fn is_pristine(&self) -> bool {
        self.looks_free()
            && self.from_push.load(Ordering::Relaxed).is_null()
            && self.to_pop.load(Ordering::Relaxed).is_null()
            && self.handoff.load(Ordering::Relaxed) == 0
    }
}
