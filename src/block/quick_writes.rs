//! QuickWrites: whether small buffered writes may run in place, on the thread of the event loop.
//!
//! Normally such a write only copies into the page cache. But the kernel may make the writer sleep: dirty pages are
//! throttled, a block of the file's map must be read. So: writes run in place until they are seen to sleep; then they
//! go to the engine for a while, and longer each time that the next try sleeps again.
//!
//! A write that took long need not have slept: on a busy machine its thread may have been preempted, and that says
//! nothing about the file. The clock is looked at for every write, since that is cheap. Only once one was slow, the
//! following ones also look at how often their thread has slept; a slow one among them that slept is the sign.
//!
//! Any thread. While all writes are quick this only reads shared memory.

use crate::util::sys;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// A write that took longer is slow (ours; dirty throttling sleeps 10 ms and more).
const SLOW_NS: u64 = 1_000_000;

/// Writes that look at the sleeps of their thread after a slow one (ours).
const WATCHED: u32 = 256;

/// How long writes go to the engine at first, and at most; doubles while the next try sleeps again (ours).
const PAUSE_MIN_NS: u64 = 1_000_000_000;
const PAUSE_MAX_NS: u64 = 64_000_000_000;

/// See the module's text.
#[derive(Default)]
pub(super) struct QuickWrites {
    /// Monotonic time from which on it is tried again; 0 while all are quick.
    paused_until_ns: AtomicU64,
    /// Pauses in a row.
    streak: AtomicU32,
    /// Writes that are still to look at the sleeps of their thread.
    watched: AtomicU32,
}

/// A write that runs in place.
pub(super) struct Begun {
    ns: u64,
    /// The thread's sleeps before; None: not looked at.
    sleeps: Option<u64>,
}

impl QuickWrites {
    /// Says whether a write may run in place now; its end is told with [`QuickWrites::end`].
    pub(super) fn begin(&self) -> Option<Begun> {
        let ns = now_ns();
        if self.paused_until_ns.load(Ordering::Relaxed) > ns {
            return None;
        }
        let watched = self.watched.load(Ordering::Relaxed) > 0;
        Some(Begun { ns, sleeps: watched.then(sys::thread_sleeps) })
    }

    /// Learns from a write that ran in place on this thread.
    pub(super) fn end(&self, begun: &Begun) {
        let now = now_ns();
        let slow = now.saturating_sub(begun.ns) > SLOW_NS;
        match begun.sleeps {
            None if slow => self.watched.store(WATCHED, Ordering::Relaxed),
            None => {}
            Some(before) if slow && sys::thread_sleeps() > before => self.pause(now),
            Some(_) => self.forgive(),
        }
    }

    #[cold]
    fn pause(&self, now: u64) {
        let streak = self.streak.fetch_add(1, Ordering::Relaxed).min(16);
        let pause = (PAUSE_MIN_NS << streak).min(PAUSE_MAX_NS);
        // The first tries after the pause are watched.
        self.watched.store(WATCHED, Ordering::Relaxed);
        self.paused_until_ns.store(now + pause, Ordering::Relaxed);
    }

    /// A watched write did not sleep.
    #[cold]
    fn forgive(&self) {
        // Concurrent writers may lose a step of the count; it only bounds how long is watched.
        let left = self.watched.load(Ordering::Relaxed).saturating_sub(1);
        self.watched.store(left, Ordering::Relaxed);
        if left == 0 {
            self.streak.store(0, Ordering::Relaxed);
        }
    }
}

fn now_ns() -> u64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    (t.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(t.tv_nsec as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// As `begin` would have made it a while ago.
    fn slow_ago(b: Begun) -> Begun {
        Begun { ns: b.ns - 2 * SLOW_NS, ..b }
    }

    #[test]
    fn a_slow_write_alone_only_makes_the_next_ones_look() {
        let q = QuickWrites::default();
        let b = q.begin().expect("not paused");
        assert!(b.sleeps.is_none());
        q.end(&slow_ago(b));
        let b = q.begin().expect("not paused by the first one");
        assert!(b.sleeps.is_some());
    }

    #[test]
    fn slow_without_a_sleep_is_the_machine_not_the_file() {
        let q = QuickWrites::default();
        q.end(&slow_ago(q.begin().expect("not paused")));
        for _ in 0..WATCHED {
            let b = q.begin().expect("not paused");
            assert!(b.sleeps.is_some());
            // Whether this thread is preempted in between or not: it does not sleep.
            q.end(&slow_ago(b));
        }
        assert!(q.begin().expect("not paused").sleeps.is_none(), "it watches for ever");
    }

    #[test]
    fn a_write_that_sleeps_pauses_them_and_longer_each_time() {
        let q = QuickWrites::default();
        q.end(&slow_ago(q.begin().expect("not paused")));
        let mut last = 0;
        for _ in 0..3 {
            let b = q.begin().expect("not paused");
            std::thread::sleep(Duration::from_millis(1));
            let before = now_ns();
            q.end(&slow_ago(b));
            assert!(q.begin().is_none());
            let pause = q.paused_until_ns.load(Ordering::Relaxed) - before;
            assert!(pause > last + last / 2, "{pause} ns after {last} ns");
            last = pause;
            // The pause is over.
            q.paused_until_ns.store(1, Ordering::Relaxed);
        }
        for _ in 0..100 {
            q.pause(0);
        }
        assert_eq!(q.paused_until_ns.load(Ordering::Relaxed), PAUSE_MAX_NS);
    }

    #[test]
    fn quick_writes_after_a_pause_forgive_it() {
        let q = QuickWrites::default();
        q.pause(0);
        q.paused_until_ns.store(1, Ordering::Relaxed);
        for _ in 0..WATCHED {
            q.end(&q.begin().expect("not paused"));
        }
        assert_eq!(q.streak.load(Ordering::Relaxed), 0);
    }
}
