//! How a reader without a lock notices that a slice changes, or has become another one. A kernel: modelled in `tests/loom`.
//!
//! ```text
//!   changer (one at a time, by the slice's lock)          reader
//!   version + 1: odd          (a)                         version: odd? not now         (d)
//!   fence                     (b)                         tag: another one? not now
//!   tag, words                                            words
//!   version + 1: even         (c)                         fence                         (e)
//!                                                         version as before? else not now
//! ```
//! (c) and (d): who sees the even version sees all of that change. (b) and (e): who saw a part of a change sees its odd
//! version, or a later one. The words are atomics; what is read in vain does no harm.

use crate::util::sync::{AtomicU64, Ordering, fence};

/// Version and tag of a slice. Any thread reads.
pub(crate) struct Seq {
    /// Odd while tag or words change.
    version: AtomicU64,
    /// What the words are of.
    tag: AtomicU64,
}

impl Seq {
    /// One that is being changed.
    pub(crate) fn new(tag: u64) -> Seq {
        Seq { version: AtomicU64::new(1), tag: AtomicU64::new(tag) }
    }

    /// What `f` makes of the words; `None`: they changed meanwhile, or are not of `tag`. Never waits.
    #[inline]
    pub(crate) fn read<T>(&self, tag: u64, f: impl FnOnce() -> T) -> Option<T> {
        // Pairs with the Release store in `close`.
        let version = self.version.load(Ordering::Acquire);
        if version & 1 == 1 || self.tag.load(Ordering::Acquire) != tag {
            return None;
        }
        let value = f();
        // The loads above come before the one below: if no change has begun by then, they saw no part of one.
        fence(Ordering::Acquire);
        (self.version.load(Ordering::Relaxed) == version).then_some(value)
    }

    /// What the words are of, for who has the lock.
    pub(crate) fn tag(&self) -> u64 {
        self.tag.load(Ordering::Acquire)
    }

    /// Makes the words those of another tag; between [`Seq::open`] and [`Seq::close`].
    pub(crate) fn set_tag(&self, tag: u64) {
        self.tag.store(tag, Ordering::Release);
    }

    /// Begins a change that readers must not see half of. Under the lock.
    pub(crate) fn open(&self) {
        let before = self.version.load(Ordering::Relaxed);
        debug_assert!(before & 1 == 0, "one change at a time");
        self.version.store(before + 1, Ordering::Relaxed);
        // The stores that follow come after the one above. Pairs with the fence in `read`.
        fence(Ordering::Release);
    }

    /// Ends it.
    pub(crate) fn close(&self) {
        let before = self.version.load(Ordering::Relaxed);
        debug_assert!(before & 1 == 1, "a change was begun");
        self.version.store(before + 1, Ordering::Release);
    }
}
