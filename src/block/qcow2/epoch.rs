//! Epochs: when every request that may have looked a cluster up before it was unlinked has ended. A kernel: modelled in
//! `tests/loom`.
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
use crate::util::sync::{AtomicU64, Ordering};
use crossbeam_utils::CachePadded;

/// See the module's text. Any thread.
pub(crate) struct Epochs {
    epoch: CachePadded<AtomicU64>,
    slots: Sharded<[AtomicU64; 2]>,
}

/// A request that may hold on to what it looked up, until this is dropped. Any thread may drop it.
pub(crate) struct Ticket<'a> {
    count: &'a AtomicU64,
}

impl Epochs {
    pub(crate) fn new() -> Epochs {
        Epochs { epoch: CachePadded::new(AtomicU64::new(2)), slots: Sharded::new() }
    }

    /// Takes a ticket. Never yields.
    pub(crate) fn ticket(&self) -> Ticket<'_> {
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
    pub(crate) fn now(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Whether all tickets are back that were taken when the epoch was `then`, or before.
    pub(crate) fn is_over(&self, then: u64) -> bool {
        self.now() >= then + 2
    }

    /// Goes as far as the tickets allow, at most two epochs. One caller at a time.
    pub(crate) fn advance(&self) {
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
