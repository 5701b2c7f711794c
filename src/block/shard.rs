//! Per-thread slots for what is counted on every request, so that threads share no written cache line.
//!
//! A thread gets a slot number at its first request and keeps it. There are [`SHARDS`] slots; more threads than that
//! share some, so slots are updated by atomic read-modify-write (on an unshared line: a few nanoseconds).

use crossbeam_utils::CachePadded;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Slots (ours; above the number of IOThreads of any sensible configuration).
pub(crate) const SHARDS: usize = 32;

/// One `T` for each slot, each on cache lines of its own.
pub(crate) struct Sharded<T>(Box<[CachePadded<T>]>);

impl<T: Default> Sharded<T> {
    /// Default values everywhere.
    pub(crate) fn new() -> Sharded<T> {
        Sharded((0..SHARDS).map(|_| CachePadded::new(T::default())).collect())
    }
}

impl<T> Sharded<T> {
    /// The slot with the number.
    pub(crate) fn get(&self, index: usize) -> &T {
        &self.0[index]
    }

    /// All slots.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|c| &**c)
    }
}

impl Sharded<AtomicU64> {
    /// The sum of all slots. Sequentially consistent loads, each by itself: not a snapshot.
    pub(crate) fn sum(&self) -> u64 {
        self.iter().fold(0u64, |a, c| a.wrapping_add(c.load(Ordering::SeqCst)))
    }
}

/// The calling thread's slot number. Not inlined: a coroutine may change threads at a yield, and a cached
/// thread-local address would not.
#[inline(never)]
pub(crate) fn index() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static INDEX: usize = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS;
    }
    // The thread is ending: any slot will do.
    INDEX.try_with(|i| *i).unwrap_or(0)
}
