//! Counters per IOThread: each thread writes its own cache lines; anyone may read.

use std::sync::atomic::{AtomicU64, Ordering};

/// A counter written by one thread and read by any (relaxed; no read-modify-write on the hot path).
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only the owning thread may call this: concurrent adders would lose counts.
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Returns the current value; from another thread it may be slightly old.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
