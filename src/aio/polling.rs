//! The adaptive busy-poll window (QEMU's poll-max-ns, poll-grow, poll-shrink), and the gate in front of it.
//!
//! Spinning shortens the answer to a lone request by the time that a sleeping CPU needs to come back. On a busy machine it
//! does harm: the time is taken from whoever would send the next request. So a spin watches its own clock: it looks at it about once
//! a microsecond, and a gap in between means that somebody else had the CPU. If that, and spins that found nothing, are
//! much of the time, [`Gate`] lets nobody spin for a while.
//!
//! (What the kernel says of the time that a thread waited for a CPU is no sign: it counts the waking of a sleeping CPU, too, which
//! on a virtual machine is half of the time of a client that waits for each answer. That is what spinning is to save.)

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
        if waited_ns > max_ns {
            let shrunk = self.ns.checked_div(shrink).unwrap_or(0);
            self.ns = if shrunk < FIRST_NS { 0 } else { shrunk };
            return;
        }
        let factor = if grow == 0 { 2 } else { grow };
        // At once as far as this wait would have needed: each step on the way there would be a spin for nothing.
        while self.ns < waited_ns {
            let grown = self.ns.saturating_mul(factor).max(self.ns + 1).max(FIRST_NS);
            self.ns = grown.min(max_ns);
        }
    }
}

/// A spin looks at the clock about every microsecond; a longer gap than this is time that somebody else had the CPU (ours;
/// interrupts are shorter).
const GAP_NS: u64 = 50_000;

/// The gate judges periods of this length (ours).
const PERIOD_NS: u64 = 10_000_000;

/// It closes when more than one part in so many of a period was wasted (ours).
const WASTED_PART: u64 = 5;

/// How long nobody spins then, in nanoseconds; doubles if it is no better afterwards (ours).
const CLOSED_MIN_NS: u64 = 40_000_000;
const CLOSED_MAX_NS: u64 = 1_280_000_000;

/// Good periods in a row after which half of that is forgotten (ours).
const FORGET_AFTER: u32 = 8;

/// Whether there is CPU time to spin with.
#[derive(Debug)]
pub(super) struct Gate {
    /// When the period began.
    since_ns: u64,
    /// Of the period.
    wasted_ns: u64,
    /// 0: it is open.
    closed_until_ns: u64,
    closed_ns: u64,
    good: u32,
}

impl Gate {
    pub(super) fn new() -> Gate {
        Gate { since_ns: 0, wasted_ns: 0, closed_until_ns: 0, closed_ns: CLOSED_MIN_NS, good: 0 }
    }

    /// Tells whether to spin now.
    pub(super) fn is_open(&mut self, now_ns: u64) -> bool {
        if self.closed_until_ns > now_ns {
            return false;
        }
        let was_closed = std::mem::take(&mut self.closed_until_ns) > 0;
        if !was_closed && now_ns.saturating_sub(self.since_ns) < PERIOD_NS {
            return true;
        }
        (self.since_ns, self.wasted_ns) = (now_ns, 0);
        self.good = if was_closed { 0 } else { self.good + 1 };
        if self.good == FORGET_AFTER {
            self.good = 0;
            self.closed_ns = (self.closed_ns / 2).max(CLOSED_MIN_NS);
        }
        true
    }

    /// Learns from a spin.
    pub(super) fn spun(&mut self, spin: &Spin, hit: bool) {
        self.wasted_ns += if hit { spin.lost_ns } else { spin.ns() };
        if self.wasted_ns > PERIOD_NS / WASTED_PART {
            self.closed_until_ns = spin.last_ns + self.closed_ns;
            self.closed_ns = (self.closed_ns * 2).min(CLOSED_MAX_NS);
        }
    }
}

/// One spin, as its own clock sees it.
#[derive(Debug)]
pub(super) struct Spin {
    began_ns: u64,
    last_ns: u64,
    /// In gaps.
    lost_ns: u64,
}

impl Spin {
    pub(super) fn new(now_ns: u64) -> Spin {
        Spin { began_ns: now_ns, last_ns: now_ns, lost_ns: 0 }
    }

    /// It looked at the clock.
    pub(super) fn at(&mut self, now_ns: u64) {
        let gap = now_ns.saturating_sub(self.last_ns);
        if gap > GAP_NS {
            self.lost_ns += gap;
        }
        self.last_ns = now_ns;
    }

    /// How long it has lasted.
    pub(super) fn ns(&self) -> u64 {
        self.last_ns - self.began_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// A spin that looked at the clock every microsecond but for one gap; ends at the time that it returns.
    fn spin(gate: &mut Gate, from: u64, ns: u64, gap: u64, hit: bool) -> u64 {
        let mut spin = Spin::new(from);
        let mut now = from;
        for _ in 0..ns / 1000 {
            now += 1000;
            spin.at(now);
        }
        if gap > 0 {
            now += gap;
            spin.at(now);
        }
        assert_eq!(spin.ns(), now - from);
        gate.spun(&spin, hit);
        now
    }

    #[test]
    fn who_loses_the_cpu_while_it_spins_stops_for_longer_and_longer() {
        let mut gate = Gate::new();
        let mut now = 1_000 * MS;
        let mut last = 0;
        for _ in 0..9 {
            assert!(gate.is_open(now));
            now = spin(&mut gate, now, 20_000, 3 * MS, true);
            assert!(!gate.is_open(now));
            assert!(!gate.is_open(now + CLOSED_MIN_NS - 1));
            let closed = gate.closed_until_ns - now;
            assert!(closed > last || closed == CLOSED_MAX_NS);
            last = closed;
            now = gate.closed_until_ns;
        }
        assert_eq!(last, CLOSED_MAX_NS);
        // Spins that find something forgive it by and by; so do the gaps of a hiccup now and then.
        for i in 0..2_000_000 / 40 {
            assert!(gate.is_open(now), "{i}");
            now = spin(&mut gate, now, 40_000, if i % 1000 == 0 { MS } else { 0 }, true);
        }
        assert_eq!(gate.closed_ns, CLOSED_MIN_NS);
    }

    #[test]
    fn spins_that_find_nothing_are_no_use_when_they_are_much_of_the_time() {
        let mut gate = Gate::new();
        let begin = 1_000 * MS;
        let mut now = begin;
        while gate.is_open(now) {
            now = spin(&mut gate, now, 100_000, 0, false) + 20_000;
            assert!(now < begin + 5 * MS, "it spins for nothing");
        }
        // Seldom ones do not matter.
        let mut gate = Gate::new();
        for _ in 0..10_000 {
            assert!(gate.is_open(now));
            now = spin(&mut gate, now, 100_000, 0, false) + 2 * MS;
        }
    }

    #[test]
    fn short_gaps_are_interrupts() {
        let mut gate = Gate::new();
        let mut now = 1_000 * MS;
        for _ in 0..10_000 {
            assert!(gate.is_open(now));
            now = spin(&mut gate, now, 1_000, GAP_NS, true);
        }
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
    fn one_wait_grows_the_window_as_far_as_it_would_have_needed() {
        let mut w = window(100_000, 0, 0);
        w.learn(40_000);
        assert_eq!(w.ns(), 64_000);
        w.learn(90_000);
        assert_eq!(w.ns(), 100_000);
        let mut w = window(100_000, 1, 0);
        w.learn(4_001);
        assert_eq!(w.ns(), 4_001, "a factor of 1 ends, too");
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
        w.learn(50_001);
        assert_eq!(w.ns(), 0, "less than the first window is none");
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
