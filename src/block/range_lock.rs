//! RangeLock: keeps read-modify-write apart from every overlapping write, and from nothing else.
//!
//! With `O_DIRECT` a write that is not a multiple of the device's block becomes read, change, write of whole blocks.
//! A second write to the same block in between would be lost. So:
//! - a *plain* change (aligned write, zeroing, discard) registers its range: plain ones never wait for each other;
//! - an *exclusive* one (a read-modify-write) waits for overlapping plain ones that began before it and for
//!   overlapping exclusive ones before it, and makes overlapping plain ones wait.
//!
//! ```text
//!   plain                                exclusive
//!   register in my thread's slot (a)     register in the list, exclusive += 1 (c)
//!   exclusive == 0 ?             (b)     any overlap in any slot ?           (d)
//! ```
//! (a)-(d) as in `backend`: either the plain one sees the exclusive one and steps back, or the exclusive one sees it
//! and waits for its end. Plain ones on different threads write no common cache line while no exclusive one exists.
//! An exclusive one never steps back and plain ones hold nothing while they wait: no deadlock; exclusive ones are
//! served in order of arrival, so none starves.

use super::shard::{self, Sharded};
use super::wait::{co_wait_until, lock};
use crate::co::CoQueue;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// See the module's text. Any thread.
pub struct RangeLock {
    plain: Sharded<Mutex<Vec<Range<u64>>>>,
    /// Length of `state.exclusive`; a copy for plain ones to look at.
    exclusive: AtomicUsize,
    state: Mutex<State>,
    /// Both kinds; guarded by `state`.
    waiters: CoQueue,
}

#[derive(Default)]
struct State {
    /// In order of arrival; some of them still wait.
    exclusive: Vec<(u64, Range<u64>)>,
    next_id: u64,
}

enum Held {
    Plain { slot: usize },
    Exclusive { id: u64 },
}

/// A registered range; ends when it is dropped.
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    range: Range<u64>,
    held: Held,
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl Default for RangeLock {
    fn default() -> RangeLock {
        RangeLock::new()
    }
}

impl RangeLock {
    /// Makes one without ranges.
    #[must_use]
    pub fn new() -> RangeLock {
        RangeLock {
            plain: Sharded::new(),
            exclusive: AtomicUsize::new(0),
            state: Mutex::new(State::default()),
            waiters: CoQueue::new(),
        }
    }

    /// Registers a change that may overlap other plain ones. Coroutine only; yields while an overlapping exclusive
    /// range exists.
    pub fn co_plain(&self, range: Range<u64>) -> RangeGuard<'_> {
        loop {
            if let Some(guard) = self.try_plain(range.clone()) {
                return guard;
            }
            let free = |s: &mut State| (!s.exclusive.iter().any(|e| overlap(&e.1, &range))).then_some(());
            co_wait_until(&self.state, &self.waiters, free);
        }
    }

    /// [`RangeLock::co_plain`] if that needs no waiting. Never yields.
    pub fn try_plain(&self, range: Range<u64>) -> Option<RangeGuard<'_>> {
        let slot = shard::index();
        lock(self.plain.get(slot)).push(range.clone());
        // From here on the guard takes the registration back, and tells those who wait for it.
        let guard = RangeGuard { lock: self, range: range.clone(), held: Held::Plain { slot } };
        (self.exclusive.load(Ordering::SeqCst) == 0 || !self.excluded(&range)).then_some(guard)
    }

    /// Registers a read-modify-write. Coroutine only; yields while an overlapping range exists.
    pub fn co_exclusive(&self, range: Range<u64>) -> RangeGuard<'_> {
        let id = {
            let mut s = lock(&self.state);
            s.next_id += 1;
            let id = s.next_id;
            s.exclusive.push((id, range.clone()));
            self.exclusive.store(s.exclusive.len(), Ordering::SeqCst);
            id
        };
        let guard = RangeGuard { lock: self, range: range.clone(), held: Held::Exclusive { id } };
        co_wait_until(&self.state, &self.waiters, |s| {
            let before_me = s.exclusive.iter().take_while(|e| e.0 != id).any(|e| overlap(&e.1, &range));
            (!before_me && !self.plain_overlaps(&range)).then_some(())
        });
        guard
    }

    fn excluded(&self, range: &Range<u64>) -> bool {
        lock(&self.state).exclusive.iter().any(|e| overlap(&e.1, range))
    }

    fn plain_overlaps(&self, range: &Range<u64>) -> bool {
        // The slots' locks are taken inside the state's, and never the other way round.
        self.plain.iter().any(|slot| lock(slot).iter().any(|r| overlap(r, range)))
    }

    /// How many coroutines wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiters.len()
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let l = self.lock;
        match self.held {
            Held::Plain { slot } => {
                {
                    let mut v = lock(l.plain.get(slot));
                    let at =
                        v.iter().position(|r| *r == self.range).expect("a registered range stays registered");
                    v.swap_remove(at);
                }
                if l.exclusive.load(Ordering::SeqCst) == 0 {
                    return;
                }
            }
            Held::Exclusive { id } => {
                let mut s = lock(&l.state);
                s.exclusive.retain(|e| e.0 != id);
                l.exclusive.store(s.exclusive.len(), Ordering::SeqCst);
            }
        }
        // An exclusive one that saw our range has queued itself before it unlocked the state: wait for that.
        drop(lock(&l.state));
        l.waiters.restart_all();
    }
}
