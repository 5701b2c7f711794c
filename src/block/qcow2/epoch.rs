//! Epochs: when every request that may have looked a cluster up before it was unlinked has ended.
//!
//! A request takes a *ticket* before it looks anything up and gives it back after its last I/O to what it found. A
//! cluster that was unlinked may be used again once all tickets that are older than the unlinking are back: a late
//! write of such a request then still lands in a cluster that belongs to nobody.
//!
//! ```text
//!   ticket                              advance (e → e + 1)
//!   e = epoch                    (a)    no ticket of e - 1 left?        (d)
//!   slot[mine].of[e & 1] += 1    (b)    epoch = e + 1                   (e)
//!   epoch == e ? else back, again (c)
//! ```
//! All are sequentially consistent. If (c) saw `e`, then (b) precedes (e) in their total order, so the next (d), which
//! looks for tickets of `e`, sees it. A ticket taken after (e) sees every unlinking from before (e). So what was
//! unlinked when the epoch was `t` is free of readers and writers at epoch `t + 2`.
//!
//! Tickets are counted per thread: requests on different threads write no common cache line. Nobody waits here.

use crate::block::shard::{self, Sharded};
use crossbeam_utils::CachePadded;
use std::sync::atomic::{AtomicU64, Ordering};

/// See the module's text. Any thread.
pub(super) struct Epochs {
    epoch: CachePadded<AtomicU64>,
    slots: Sharded<[AtomicU64; 2]>,
}

/// A request that may hold on to what it looked up, until this is dropped. Any thread may drop it.
pub(super) struct Ticket<'a> {
    count: &'a AtomicU64,
}

impl Epochs {
    pub(super) fn new() -> Epochs {
        Epochs { epoch: CachePadded::new(AtomicU64::new(2)), slots: Sharded::new() }
    }

    /// Takes a ticket. Never yields.
    pub(super) fn ticket(&self) -> Ticket<'_> {
        let slot = self.slots.get(shard::index());
        loop {
            let e = self.epoch.load(Ordering::SeqCst);
            let count = &slot[(e & 1) as usize];
            count.fetch_add(1, Ordering::SeqCst);
            let ticket = Ticket { count };
            if self.epoch.load(Ordering::SeqCst) == e {
                return ticket;
            }
        }
    }

    /// The epoch now: what is unlinked already is free at [`Epochs::is_over`] of this.
    pub(super) fn now(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Whether all tickets are back that were taken when the epoch was `then`, or before.
    pub(super) fn is_over(&self, then: u64) -> bool {
        self.now() >= then + 2
    }

    /// Goes as far as the tickets allow, at most two epochs. One caller at a time.
    pub(super) fn advance(&self) {
        for _ in 0..2 {
            let e = self.epoch.load(Ordering::SeqCst);
            let old = ((e + 1) & 1) as usize;
            if self.slots.iter().any(|s| s[old].load(Ordering::SeqCst) != 0) {
                return;
            }
            self.epoch.store(e + 1, Ordering::SeqCst);
        }
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let before = self.count.fetch_sub(1, Ordering::SeqCst);
        debug_assert!(before > 0, "a ticket is given back once");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_holds_the_epoch_it_was_taken_in() {
        let e = Epochs::new();
        let t = e.ticket();
        let then = e.now();
        for _ in 0..10 {
            e.advance();
        }
        assert!(!e.is_over(then));
        assert!(e.now() <= then + 1);
        drop(t);
        e.advance();
        assert!(e.is_over(then));
    }

    #[test]
    fn later_tickets_do_not_hold_earlier_epochs() {
        let e = Epochs::new();
        let then = e.now();
        e.advance();
        let t = e.ticket();
        assert!(e.is_over(then) || e.now() > then);
        let later = e.now();
        e.advance();
        e.advance();
        assert!(e.is_over(then));
        assert!(!e.is_over(later));
        drop(t);
        e.advance();
        assert!(e.is_over(later));
    }

    #[test]
    fn threads_take_and_give_back_while_it_advances() {
        let e = Epochs::new();
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..20_000 {
                        drop(e.ticket());
                    }
                });
            }
            for _ in 0..20_000 {
                e.advance();
            }
        });
        let then = e.now();
        e.advance();
        assert!(e.is_over(then));
    }
}
