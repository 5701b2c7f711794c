//! The adaptive busy-poll window (QEMU's poll-max-ns, poll-grow, poll-shrink).

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
        self.ns = if waited_ns > max_ns {
            self.ns.checked_div(shrink).unwrap_or(0)
        } else {
            let factor = if grow == 0 { 2 } else { grow };
            self.ns.saturating_mul(factor).max(FIRST_NS).min(max_ns)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
