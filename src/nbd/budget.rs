//! Budgets: how many payload bytes and requests may be in flight, per connection and for the whole daemon.
//!
//! ```text
//!   connection                                     daemon
//!   used ≤ its limit, else its reader waits        left ≥ what is asked, else waits in FIFO order
//!   used ≤ allowance: the daemon is not asked  ──► used > allowance: the excess is borrowed, in steps
//! ```
//!
//! A request reserves *before* its payload is read, and its bytes stay reserved until the client has taken the reply.
//! Each connection has a small allowance of its own ([`ALLOWANCE_BYTES`], [`ALLOWANCE_REQUESTS`]): what fits in it
//! needs no word with the daemon, so busy connections share no cache line and small requests always get on. What
//! waits for the daemon is served first come, first served, whatever its size: small ones don't overtake a large one.
//! The server sees to it that a client which takes no replies, or does not send its payload, holds no budget for ever
//! (`ServerConfig::stall_timeout`).
//!
//! Threads: [`DaemonBudget`] is for all; a [`ConnBudget`] belongs to the coroutines of one connection, on its home
//! thread, and only its reader reserves. Locks here are leaves and are never held across a yield.

use crate::co::{Coroutine, co_yield};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Payload bytes that a connection may have in flight without asking the daemon (ours).
pub const ALLOWANCE_BYTES: u64 = 128 << 10;
/// Requests that a connection may have in flight without asking the daemon (ours).
pub const ALLOWANCE_REQUESTS: u32 = 8;
/// Bytes are borrowed in steps of this, so that neighbouring requests don't ask each (ours).
const STEP_BYTES: u64 = 512 << 10;
/// Requests are borrowed in steps of this (ours).
const STEP_REQUESTS: u32 = 16;

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An amount of both currencies.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Amount {
    bytes: u64,
    requests: u32,
}

impl Amount {
    fn is_zero(self) -> bool {
        self == Amount::default()
    }

    fn fits(self, into: Amount) -> bool {
        self.bytes <= into.bytes && self.requests <= into.requests
    }

    fn minus(self, other: Amount) -> Amount {
        Amount {
            bytes: self.bytes.saturating_sub(other.bytes),
            requests: self.requests.saturating_sub(other.requests),
        }
    }

    fn plus(self, other: Amount) -> Amount {
        Amount { bytes: self.bytes + other.bytes, requests: self.requests + other.requests }
    }
}

struct Waiter {
    amount: Amount,
    granted: AtomicBool,
    co: Coroutine,
}

struct Daemon {
    left: Amount,
    queue: VecDeque<Arc<Waiter>>,
}

impl Daemon {
    fn try_take(&mut self, min: Amount, want: Amount) -> Option<Amount> {
        if !self.queue.is_empty() {
            return None;
        }
        let got = [want, min].into_iter().find(|a| a.fits(self.left))?;
        self.left = self.left.minus(got);
        Some(got)
    }
}

/// What all connections together may have in flight beyond their allowances.
pub struct DaemonBudget {
    total: Amount,
    state: Mutex<Daemon>,
    /// Length of the queue, to be read without the lock.
    waiting: AtomicUsize,
    /// Called when somebody begins to wait.
    on_pressure: Box<dyn Fn() + Send + Sync>,
}

impl DaemonBudget {
    /// Makes a budget. `bytes` should hold the largest request, else that one waits until nothing else is borrowed.
    pub fn new(
        bytes: u64,
        requests: u32,
        on_pressure: impl Fn() + Send + Sync + 'static,
    ) -> Arc<DaemonBudget> {
        let total = Amount { bytes, requests };
        Arc::new(DaemonBudget {
            total,
            state: Mutex::new(Daemon { left: total, queue: VecDeque::new() }),
            waiting: AtomicUsize::new(0),
            on_pressure: Box::new(on_pressure),
        })
    }

    /// Tells whether a connection waits for its turn. Any thread.
    #[must_use]
    pub fn under_pressure(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// Bytes and requests that are borrowed now. Any thread.
    #[must_use]
    pub fn borrowed(&self) -> (u64, u32) {
        let used = self.total.minus(lock(&self.state).left);
        (used.bytes, used.requests)
    }

    /// Takes `want`, or at least `min`, if that is left and nobody waits.
    fn try_borrow(&self, min: Amount, want: Amount) -> Option<Amount> {
        Daemon::try_take(&mut lock(&self.state), min, want)
    }

    /// Takes `min`, or up to `want` if nobody waits and there is as much; waits in turn otherwise. Returns what was
    /// taken. Yields. Coroutine only.
    fn co_borrow(&self, min: Amount, want: Amount) -> Amount {
        // More than there is in all can never be left: such a request gets all there is when its turn comes.
        let min = Amount {
            bytes: min.bytes.min(self.total.bytes),
            requests: min.requests.min(self.total.requests),
        };
        let waiter = {
            let mut state = lock(&self.state);
            if let Some(got) = state.try_take(min, want) {
                return got;
            }
            let co = Coroutine::current().expect("budgets are for coroutines");
            let waiter = Arc::new(Waiter { amount: min, granted: AtomicBool::new(false), co });
            state.queue.push_back(waiter.clone());
            self.waiting.store(state.queue.len(), Ordering::Relaxed);
            waiter
        };
        (self.on_pressure)();
        // Pairs with the Release store in `give_back`.
        while !waiter.granted.load(Ordering::Acquire) {
            co_yield();
        }
        min
    }

    fn give_back(&self, amount: Amount) {
        let mut woken = Vec::new();
        {
            let mut state = lock(&self.state);
            state.left = state.left.plus(amount);
            assert!(state.left.fits(self.total), "more was given back than was borrowed");
            while let Some(head) = state.queue.front() {
                if !head.amount.fits(state.left) {
                    break;
                }
                let head = state.queue.pop_front().expect("it has a front");
                state.left = state.left.minus(head.amount);
                woken.push(head);
            }
            self.waiting.store(state.queue.len(), Ordering::Relaxed);
        }
        for waiter in woken {
            // Pairs with the Acquire load in `co_borrow`.
            waiter.granted.store(true, Ordering::Release);
            waiter.co.wake();
        }
    }
}

/// Rounds up to the steps in which the daemon is asked.
fn steps(missing: Amount) -> Amount {
    Amount {
        bytes: missing.bytes.next_multiple_of(STEP_BYTES),
        requests: missing.requests.next_multiple_of(STEP_REQUESTS),
    }
}

#[derive(Default)]
struct Ledger {
    used: Amount,
    borrowed: Amount,
    /// The reader, waiting for this much of the connection's own limit.
    waiter: Option<(Amount, Coroutine)>,
}

impl Ledger {
    fn fits(&self, amount: Amount, limit: Amount) -> bool {
        // Alone, a request always fits: limits below the largest request would otherwise stop it for ever.
        self.used.is_zero() || self.used.plus(amount).fits(limit)
    }

    fn needed(&self) -> Amount {
        self.used.minus(Amount { bytes: ALLOWANCE_BYTES, requests: ALLOWANCE_REQUESTS })
    }
}

/// What one connection has in flight.
pub struct ConnBudget {
    limit: Amount,
    daemon: Arc<DaemonBudget>,
    ledger: Mutex<Ledger>,
}

impl ConnBudget {
    /// Makes a connection's budget, part of the daemon's.
    pub fn new(bytes: u64, requests: u32, daemon: Arc<DaemonBudget>) -> Arc<ConnBudget> {
        Arc::new(ConnBudget {
            limit: Amount { bytes, requests: requests.max(1) },
            daemon,
            ledger: Mutex::default(),
        })
    }

    /// Reserves one request of `bytes` if that needs no waiting. Never yields. The reader only.
    #[must_use]
    pub fn try_reserve(self: &Arc<Self>, bytes: u64) -> Option<Reservation> {
        let amount = Amount { bytes, requests: 1 };
        let mut ledger = lock(&self.ledger);
        if !ledger.fits(amount, self.limit) {
            return None;
        }
        let before = ledger.used;
        ledger.used = before.plus(amount);
        let missing = ledger.needed().minus(ledger.borrowed);
        if !missing.is_zero() {
            // Lock order: a connection's ledger, then the daemon's state.
            match self.daemon.try_borrow(missing, steps(missing)) {
                Some(got) => ledger.borrowed = ledger.borrowed.plus(got),
                None => {
                    ledger.used = before;
                    return None;
                }
            }
        }
        drop(ledger);
        Some(Reservation { conn: self.clone(), amount })
    }

    /// Reserves one request of `bytes`; waits until there is room in the connection's limit and in the daemon's budget.
    /// Send what is ready before: what waits unsent is not given back. `None` when `cut` says so: a connection that is
    /// being cut does not queue for what others wait for. Yields. Coroutine only; one at a time.
    pub fn co_reserve(self: &Arc<Self>, bytes: u64, cut: impl Fn() -> bool) -> Option<Reservation> {
        let amount = Amount { bytes, requests: 1 };
        let missing = loop {
            if cut() {
                return None;
            }
            {
                let mut ledger = lock(&self.ledger);
                if ledger.fits(amount, self.limit) {
                    ledger.used = ledger.used.plus(amount);
                    break ledger.needed().minus(ledger.borrowed);
                }
                assert!(ledger.waiter.is_none(), "only the reader of a connection reserves");
                let co = Coroutine::current().expect("budgets are for coroutines");
                ledger.waiter = Some((amount, co));
            }
            co_yield();
        };
        if !missing.is_zero() {
            let got = self.daemon.co_borrow(missing, steps(missing));
            let excess = {
                let mut ledger = lock(&self.ledger);
                ledger.borrowed = ledger.borrowed.plus(got);
                ledger.take_excess()
            };
            self.return_to_daemon(excess);
        }
        Some(Reservation { conn: self.clone(), amount })
    }

    /// Bytes and requests in flight.
    #[must_use]
    pub fn used(&self) -> (u64, u32) {
        let used = lock(&self.ledger).used;
        (used.bytes, used.requests)
    }

    fn release(&self, amount: Amount) {
        let (excess, waiter) = {
            let mut ledger = lock(&self.ledger);
            assert!(amount.fits(ledger.used), "released more than was reserved");
            ledger.used = ledger.used.minus(amount);
            let ready = ledger.waiter.as_ref().is_some_and(|(a, _)| ledger.fits(*a, self.limit));
            let waiter = if ready { ledger.waiter.take() } else { None };
            (ledger.take_excess(), waiter)
        };
        self.return_to_daemon(excess);
        if let Some((_, co)) = waiter {
            co.wake();
        }
    }

    fn return_to_daemon(&self, excess: Amount) {
        if !excess.is_zero() {
            self.daemon.give_back(excess);
        }
    }
}

impl Ledger {
    /// Takes out what is borrowed and not needed: all of it at rest, else what is more than a step.
    fn take_excess(&mut self) -> Amount {
        let spare = self.borrowed.minus(self.needed());
        let idle = self.used.is_zero();
        let excess = Amount {
            bytes: if idle || spare.bytes > STEP_BYTES { spare.bytes } else { 0 },
            requests: if idle || spare.requests > STEP_REQUESTS { spare.requests } else { 0 },
        };
        self.borrowed = self.borrowed.minus(excess);
        excess
    }
}

impl Drop for ConnBudget {
    fn drop(&mut self) {
        let borrowed = lock(&self.ledger).borrowed;
        self.return_to_daemon(borrowed);
    }
}

/// One request's share; given back on drop (which never yields).
pub struct Reservation {
    conn: Arc<ConnBudget>,
    amount: Amount,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.conn.release(self.amount);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aio::{AioConfig, AioContext};
    use std::sync::atomic::AtomicU32;

    const MIB: u64 = 1 << 20;

    fn pump(ctx: &Arc<AioContext>) {
        for _ in 0..20 {
            ctx.poll(false);
        }
    }

    #[test]
    fn an_allowance_asks_nobody() {
        let ctx = AioContext::new(AioConfig::default()).unwrap();
        let daemon = DaemonBudget::new(MIB, 1, || {});
        let conn = ConnBudget::new(64 * MIB, 100, daemon.clone());
        let a = conn.try_reserve(ALLOWANCE_BYTES).unwrap();
        assert_eq!(daemon.borrowed(), (0, 0));
        let b = conn.try_reserve(1).unwrap();
        assert_eq!(daemon.borrowed().0, STEP_BYTES);
        drop(b);
        drop(a);
        assert_eq!(daemon.borrowed(), (0, 0), "at rest all is given back");
        assert_eq!(conn.used(), (0, 0));
        drop(ctx);
    }

    #[test]
    fn one_request_alone_passes_any_limit() {
        let daemon = DaemonBudget::new(100 * MIB, 10, || {});
        let conn = ConnBudget::new(1, 1, daemon);
        let big = conn.try_reserve(64 * MIB).unwrap();
        assert!(conn.try_reserve(0).is_none());
        drop(big);
        assert!(conn.try_reserve(5).is_some());
    }

    #[test]
    fn the_daemon_serves_in_turn_and_small_ones_do_not_overtake() {
        let ctx = AioContext::new(AioConfig::default()).unwrap();
        let pressure = Arc::new(AtomicU32::new(0));
        let seen = pressure.clone();
        let daemon = DaemonBudget::new(10 * MIB, 1000, move || {
            seen.fetch_add(1, Ordering::Relaxed);
        });
        let conns: Vec<Arc<ConnBudget>> =
            (0..3).map(|_| ConnBudget::new(64 * MIB, 100, daemon.clone())).collect();
        let first = conns[0].try_reserve(8 * MIB).unwrap();
        let order = Arc::new(Mutex::new(Vec::new()));
        // The second wants much, the third little (but more than its allowance).
        for (i, bytes) in [(1usize, 9 * MIB), (2, MIB)] {
            let (conn, order) = (conns[i].clone(), order.clone());
            Coroutine::new(move || {
                let got = conn.co_reserve(bytes, || false);
                lock(&order).push(i);
                drop(got);
            })
            .enter();
        }
        assert!(daemon.under_pressure());
        assert_eq!(pressure.load(Ordering::Relaxed), 2);
        assert!(conns[2].try_reserve(2 * MIB).is_none());
        pump(&ctx);
        assert!(lock(&order).is_empty());
        drop(first);
        pump(&ctx);
        assert_eq!(*lock(&order), [1, 2]);
        assert!(!daemon.under_pressure());
        assert_eq!(daemon.borrowed(), (0, 0));
    }

    #[test]
    fn who_is_cut_while_it_waits_for_its_own_limit_takes_nothing_from_the_daemon() {
        let ctx = AioContext::new(AioConfig::default()).unwrap();
        let daemon = DaemonBudget::new(100 * MIB, 1000, || {});
        let conn = ConnBudget::new(2 * MIB, 100, daemon.clone());
        let held = conn.try_reserve(2 * MIB).unwrap();
        let (cut, refused) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (c, is_cut, told) = (conn.clone(), cut.clone(), refused.clone());
        Coroutine::new(move || {
            let got = c.co_reserve(2 * MIB, || is_cut.load(Ordering::Relaxed));
            told.store(got.is_none(), Ordering::Relaxed);
        })
        .enter();
        cut.store(true, Ordering::Relaxed);
        drop(held);
        pump(&ctx);
        assert!(refused.load(Ordering::Relaxed));
        assert_eq!((conn.used(), daemon.borrowed()), ((0, 0), (0, 0)));
    }

    #[test]
    fn a_reader_waits_for_its_own_limit() {
        let ctx = AioContext::new(AioConfig::default()).unwrap();
        let daemon = DaemonBudget::new(100 * MIB, 1000, || {});
        let conn = ConnBudget::new(2 * MIB, 100, daemon.clone());
        let (a, b) = (conn.try_reserve(MIB).unwrap(), conn.try_reserve(MIB).unwrap());
        let got = Arc::new(AtomicBool::new(false));
        let (c, g) = (conn.clone(), got.clone());
        Coroutine::new(move || {
            let r = c.co_reserve(2 * MIB, || false);
            g.store(true, Ordering::Relaxed);
            drop(r);
        })
        .enter();
        drop(a);
        pump(&ctx);
        assert!(!got.load(Ordering::Relaxed));
        drop(b);
        pump(&ctx);
        assert!(got.load(Ordering::Relaxed));
        assert_eq!(daemon.borrowed(), (0, 0));
    }
}
