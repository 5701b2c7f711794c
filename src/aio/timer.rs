//! Timers: one-shot callbacks at a time of the context's clock. Home thread only.
//!
//! The poller's timeout has millisecond steps and is rounded up: a timer never fires early, and may fire up to
//! about a millisecond late even on an idle machine.

use super::AioContext;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The clock behind timers.
#[derive(Debug, Clone)]
pub enum Clock {
    /// `CLOCK_MONOTONIC`.
    Monotonic,
    /// Test clock: nanoseconds, moved by the test (which then calls [`AioContext::notify`]). Armed timers give
    /// the loop no timeout: it sleeps until it is notified.
    Mock(Arc<AtomicU64>),
}

impl Clock {
    pub(super) fn now_ns(&self) -> u64 {
        match self {
            Clock::Monotonic => {
                let t = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
                // The clock starts near zero at boot: neither field is negative.
                (t.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(t.tv_nsec as u64)
            }
            Clock::Mock(ns) => ns.load(Ordering::Acquire),
        }
    }
}

/// The value of `TimerInner::deadline_ns` that means "disarmed".
const DISARMED: u64 = u64::MAX;

pub(super) struct TimerInner {
    id: u64,
    /// When it fires; written by the home thread.
    deadline_ns: AtomicU64,
    /// Taken out while it runs, so that it may drop or move its own timer.
    callback: Mutex<Option<Box<dyn FnMut() + Send>>>,
}

impl fmt::Debug for TimerInner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timer")
            .field("id", &self.id)
            .field("deadline_ns", &self.deadline_ns)
            .finish_non_exhaustive()
    }
}

/// The armed timers of one context, by deadline and then by age.
#[derive(Default)]
pub(super) struct TimerList {
    armed: BTreeMap<(u64, u64), Arc<TimerInner>>,
    next_id: u64,
}

impl TimerList {
    pub(super) fn make(&mut self, callback: Box<dyn FnMut() + Send>) -> Arc<TimerInner> {
        self.next_id += 1;
        Arc::new(TimerInner {
            id: self.next_id,
            deadline_ns: AtomicU64::new(DISARMED),
            callback: Mutex::new(Some(callback)),
        })
    }

    fn arm(&mut self, timer: &Arc<TimerInner>, deadline_ns: u64) {
        self.disarm(timer);
        let deadline_ns = deadline_ns.min(DISARMED - 1);
        timer.deadline_ns.store(deadline_ns, Ordering::Relaxed);
        self.armed.insert((deadline_ns, timer.id), Arc::clone(timer));
    }

    fn disarm(&mut self, timer: &TimerInner) {
        let old = timer.deadline_ns.swap(DISARMED, Ordering::Relaxed);
        if old != DISARMED {
            self.armed.remove(&(old, timer.id));
        }
    }

    /// Time until the first timer fires, zero if it is due; None without an armed timer.
    pub(super) fn timeout(&self, clock: &Clock) -> Option<Duration> {
        let ((deadline_ns, _), _) = self.armed.first_key_value()?;
        let now = clock.now_ns();
        match clock {
            Clock::Mock(_) if *deadline_ns > now => None,
            _ => Some(Duration::from_nanos(deadline_ns.saturating_sub(now))),
        }
    }

    /// Collects what is due at `now_ns`, in order; each is still to be claimed with [`TimerList::claim`].
    pub(super) fn due(&self, now_ns: u64, out: &mut Vec<Arc<TimerInner>>) {
        out.extend(self.armed.range(..=(now_ns, u64::MAX)).map(|(_, t)| Arc::clone(t)));
    }

    /// Disarms a due timer and takes its callback; None if it was moved or deleted since, or is running.
    pub(super) fn claim(&mut self, timer: &TimerInner, now_ns: u64) -> Option<Box<dyn FnMut() + Send>> {
        if timer.deadline_ns.load(Ordering::Relaxed) > now_ns {
            return None;
        }
        let callback = timer.callback.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        self.disarm(timer);
        Some(callback)
    }

    /// Armed timers.
    pub(super) fn len(&self) -> usize {
        self.armed.len()
    }
}

/// Gives a callback back after its run, unless the timer's owner is gone.
pub(super) fn put_back(timer: &Arc<TimerInner>, callback: Box<dyn FnMut() + Send>) {
    // Ours is the last reference when the owner dropped the timer meanwhile.
    if Arc::strong_count(timer) > 1 {
        *timer.callback.lock().unwrap_or_else(PoisonError::into_inner) = Some(callback);
    }
}

/// A one-shot timer of one context; home thread only. Dropping it disarms it (from any thread).
pub struct Timer {
    ctx: Arc<AioContext>,
    inner: Arc<TimerInner>,
}

impl Timer {
    pub(super) fn new(ctx: &Arc<AioContext>, inner: Arc<TimerInner>) -> Timer {
        Timer { ctx: Arc::clone(ctx), inner }
    }

    /// Arms (or moves) the timer to fire at `deadline_ns` of the context's clock; a time that has passed means
    /// the next turn. Home thread only. Never yields.
    ///
    /// # Panics
    /// Off the home thread.
    pub fn mod_ns(&self, deadline_ns: u64) {
        self.ctx.with_timers(|list| list.arm(&self.inner, deadline_ns));
    }

    /// Disarms the timer. Home thread only. Never yields.
    ///
    /// # Panics
    /// Off the home thread.
    pub fn del(&self) {
        self.ctx.with_timers(|list| list.disarm(&self.inner));
    }

    /// Tells whether the timer is armed. Home thread only. Never yields.
    #[must_use]
    pub fn pending(&self) -> bool {
        self.inner.deadline_ns.load(Ordering::Relaxed) != DISARMED
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        if !self.pending() {
            return;
        }
        if self.ctx.is_home() {
            self.del();
        } else {
            let (ctx, inner) = (Arc::clone(&self.ctx), Arc::clone(&self.inner));
            self.ctx.bh_schedule_oneshot(move || ctx.with_timers(|list| list.disarm(&inner)));
        }
    }
}
