//! Claims: who may change the mapping of which guest clusters.
//!
//! Whoever changes L2 entries (allocation, zeroing, discard, write over a compressed cluster) claims the guest
//! clusters first, and looks at their entries again after it has the claim: two writes into one new cluster become one
//! allocation and one overwrite. Reads and overwrites of allocated clusters claim nothing.
//!
//! Overlapping claims are served in order of arrival. A request holds one claim at a time, so they cannot deadlock.

use crate::block::wait::{co_wait_until, lock};
use crate::co::CoQueue;
use std::ops::Range;
use std::sync::Mutex;

/// See the module's text. Any thread.
#[derive(Default)]
pub(super) struct Claims {
    state: Mutex<State>,
    /// Guarded by `state`.
    waiters: CoQueue,
}

#[derive(Default)]
struct State {
    /// In order of arrival; some of them still wait.
    claims: Vec<(u64, Range<u64>)>,
    next_id: u64,
    waiting: usize,
}

/// A claim; ends when it is dropped.
pub(super) struct Claim<'a> {
    claims: &'a Claims,
    id: u64,
}

impl Claims {
    /// Claims guest clusters. Coroutine only; yields while an overlapping claim exists.
    pub(super) fn co_claim(&self, clusters: Range<u64>) -> Claim<'_> {
        let free = |s: &State, id: u64| {
            let mut before = s.claims.iter().take_while(|c| c.0 != id);
            before.all(|c| c.1.end <= clusters.start || clusters.end <= c.1.start)
        };
        let id = {
            let mut s = lock(&self.state);
            s.next_id += 1;
            let id = s.next_id;
            s.claims.push((id, clusters.clone()));
            id
        };
        let claim = Claim { claims: self, id };
        let mut waits = false;
        co_wait_until(&self.state, &self.waiters, |s| {
            let free = free(s, id);
            match (free, waits) {
                (true, true) => s.waiting -= 1,
                (false, false) => s.waiting += 1,
                _ => {}
            }
            waits = !free;
            free.then_some(())
        });
        claim
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let waiting = {
            let mut s = lock(&self.claims.state);
            s.claims.retain(|c| c.0 != self.id);
            s.waiting
        };
        if waiting > 0 {
            self.claims.waiters.restart_all();
        }
    }
}
