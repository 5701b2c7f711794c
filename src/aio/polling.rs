//! The adaptive busy-poll window (QEMU's poll-max-ns, poll-grow, poll-shrink), and the gate in front of it.
//!
//! Spinning shortens the answer to a lone request by the time that a sleeping CPU needs to come back. On a busy machine it
//! does harm: the time is taken from whoever would send the next request. So [`Gate`] looks now and then at how long
//! this thread has stood in the run queue, ready and without a CPU; if that is much, nobody spins for a while.

/// Adaptive busy polling (QEMU's poll-max-ns, poll-grow, poll-shrink).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PollConfig {
    /// Longest busy-poll window in nanoseconds; 0 switches polling off.
    pub max_ns: u64,
    /// Growth factor of the window; 0 means the default, 2.
    pub grow: u64,
    /// Divisor by which the window shrinks; 0 resets it to zero.
    pub shrink: u64,
}

/// What a thread has waited for a CPU since it began, as [`crate::util::sys::RunQueue`] tells.
pub(super) use crate::util::sys::RunQueueWait;

/// The first window after none, in nanoseconds (QEMU's).
const FIRST_NS: u64 = 4_000;

/// The window of one context.
#[derive(Debug)]
pub(super) struct PollWindow {
    config: PollConfig,
    ns: u64,
}

impl PollWindow {
    pub(super) fn new(config: PollConfig) -> PollWindow {
        PollWindow { config, ns: 0 }
    }

    /// How long to poll before the next block, in nanoseconds.
    pub(super) fn ns(&self) -> u64 {
        self.ns
    }

    pub(super) fn set(&mut self, config: PollConfig) {
        *self = PollWindow::new(config);
    }

    pub(super) fn enabled(&self) -> bool {
        self.config.max_ns > 0
    }

    /// Learns from a wait: the loop had nothing to do for `waited_ns` (polling and blocking together).
    ///
    /// A wait that polling covered keeps the window. One that polling could not have covered even at its
    /// longest shrinks it; one that a longer window would have covered grows it.
    pub(super) fn learn(&mut self, waited_ns: u64) {
        let PollConfig { max_ns, grow, shrink } = self.config;
        if max_ns == 0 || waited_ns <= self.ns {
            return;
        }
        self.ns = if waited_ns > max_ns {
            self.ns.checked_div(shrink).unwrap_or(0)
        } else {
            let factor = if grow == 0 { 2 } else { grow };
            self.ns.saturating_mul(factor).max(FIRST_NS).min(max_ns)
        };
    }
}

/// Time between two looks at the run queue (ours: a look costs about 2 us).
const LOOK_EVERY_NS: u64 = 10_000_000;

/// The machine is busy when a thread that may spin has waited for a CPU for more than one part in so many of the time
/// (ours). One that sleeps and wakes waits a little each time on any machine, so only open times are judged.
const BUSY_PART: u64 = 10;

/// How long nobody spins once the machine was busy, in nanoseconds; doubles if it still is afterwards (ours).
const CLOSED_MIN_NS: u64 = 40_000_000;
const CLOSED_MAX_NS: u64 = 1_280_000_000;

/// Looks in a row that found the machine at leisure, after which its past is forgotten (ours).
const FORGET_AFTER: u32 = 32;

/// Whether there is CPU time to spin with.
#[derive(Debug)]
pub(super) struct Gate {
    /// When the last look was; 0: never.
    looked_ns: u64,
    last: RunQueueWait,
    /// 0: it is open.
    closed_until_ns: u64,
    closed_ns: u64,
    quiet: u32,
}

impl Gate {
    pub(super) fn new() -> Gate {
        let last = RunQueueWait::default();
        Gate { looked_ns: 0, last, closed_until_ns: 0, closed_ns: CLOSED_MIN_NS, quiet: 0 }
    }

    /// Tells whether to spin now. `look` reads what this thread has waited since it began; without an answer nobody spins.
    pub(super) fn is_open(&mut self, now_ns: u64, look: impl FnOnce() -> Option<RunQueueWait>) -> bool {
        if self.closed_until_ns > now_ns {
            return false;
        }
        let reopens = std::mem::take(&mut self.closed_until_ns) > 0;
        let since = now_ns.saturating_sub(self.looked_ns);
        if since < LOOK_EVERY_NS && !reopens {
            return true;
        }
        let Some(now) = look() else { return false };
        let waited = now.ns.saturating_sub(self.last.ns);
        let first = self.looked_ns == 0;
        (self.looked_ns, self.last) = (now_ns, now);
        if first || reopens {
            return true;
        }
        if waited > since / BUSY_PART {
            self.closed_until_ns = now_ns + self.closed_ns;
            self.closed_ns = (self.closed_ns * 2).min(CLOSED_MAX_NS);
            self.quiet = 0;
            return false;
        }
        self.quiet = self.quiet.saturating_add(1);
        if self.quiet >= FORGET_AFTER {
            self.closed_ns = CLOSED_MIN_NS;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn a_thread_that_stands_in_the_run_queue_does_not_spin_for_longer_and_longer() {
        let mut gate = Gate::new();
        let mut now = 1_000 * MS;
        let mut wait = RunQueueWait { ns: 5 };
        assert!(gate.is_open(now, || Some(wait)));
        assert!(gate.is_open(now + MS, || panic!("too early to look again")));
        let mut last = 0;
        for _ in 0..9 {
            now += 20 * MS;
            wait.ns += 3 * MS;
            assert!(!gate.is_open(now, || Some(wait)));
            assert!(!gate.is_open(now + MS, || panic!("it is closed")));
            let closed = gate.closed_until_ns - now;
            assert!(closed > last || closed == CLOSED_MAX_NS);
            last = closed;
            // What was waited while it was closed says nothing.
            now = gate.closed_until_ns;
            wait.ns += closed;
            assert!(gate.is_open(now, || Some(wait)));
        }
        assert_eq!(last, CLOSED_MAX_NS);
        for _ in 0..FORGET_AFTER {
            now += 10 * MS;
            assert!(gate.is_open(now, || Some(wait)));
        }
        assert_eq!(gate.closed_ns, CLOSED_MIN_NS);
    }

    #[test]
    fn who_cannot_look_does_not_spin() {
        assert!(!Gate::new().is_open(1_000 * MS, || None));
    }

    fn window(max_ns: u64, grow: u64, shrink: u64) -> PollWindow {
        PollWindow::new(PollConfig { max_ns, grow, shrink })
    }

    #[test]
    fn short_waits_grow_the_window_up_to_its_maximum() {
        let mut w = window(32_768, 0, 0);
        let mut seen = Vec::new();
        for _ in 0..6 {
            // A wait over the maximum would shrink the window.
            w.learn((w.ns() + 1).min(32_768));
            seen.push(w.ns());
        }
        assert_eq!(seen, [4_000, 8_000, 16_000, 32_000, 32_768, 32_768]);
    }

    #[test]
    fn a_covered_wait_keeps_the_window() {
        let mut w = window(50_000, 4, 0);
        w.learn(10_000);
        w.learn(10_000);
        assert_eq!(w.ns(), 16_000);
        w.learn(16_000);
        assert_eq!(w.ns(), 16_000);
    }

    #[test]
    fn a_long_wait_shrinks_by_the_divisor_or_resets() {
        let mut w = window(50_000, 0, 2);
        w.learn(5_000);
        w.learn(5_000);
        w.learn(50_001);
        assert_eq!(w.ns(), 4_000);
        w.set(PollConfig { max_ns: 50_000, grow: 0, shrink: 0 });
        w.learn(5_000);
        w.learn(50_001);
        assert_eq!(w.ns(), 0);
    }

    #[test]
    fn off_stays_off() {
        let mut w = window(0, 0, 0);
        w.learn(1);
        assert_eq!(w.ns(), 0);
        assert!(!w.enabled());
    }
}
