//! PollTrial: whether busy polling pays, found by trying.
//!
//! Spinning saves the waking of a sleeping CPU, and takes CPU time from whoever shares the machine: clients that would send the next
//! request, other threads of the same server. Which of the two is more shows neither in what one thread sees of its own spins nor in what the kernel counts. So
//! it is tried, for all threads of a server together: a few milliseconds with, a few without, several times; then what did better is kept
//! for a while.
//!
//! ```text
//!   hold (as last found) ──► trial: on off, off on, off on, on off ──► mostly better without? ──► hold, longer if that is nothing new
//! ```
//! Better is: more work per time; or less CPU time for it, if that is worth it. A percent of the rate is worth two percent of CPU.

use crate::util::counters::Counter;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};

/// Length of one window of a trial, in nanoseconds (ours: many round trips, few of a person's notice).
const WINDOW_NS: u64 = 2_500_000;

/// Whether a window is one with polling: pairs, in an order in which a load that grows or shrinks favours neither.
const WINDOWS: [bool; 8] = [true, false, false, true, false, true, true, false];

/// How long the finding is kept, in nanoseconds: at first, and at most (ours: a trial is 20 ms, half of it the worse way).
const HOLD_MIN_NS: u64 = 120_000_000;
const HOLD_MAX_NS: u64 = 1_920_000_000;

/// A step that comes later than this, in nanoseconds, means that there was nothing to do: what was found is of another load.
const STALE_NS: u64 = 100_000_000;

/// Pause after that, before a trial: what comes after a lull begins with buffers to fill and windows to grow (ours).
const SETTLE_NS: u64 = 15_000_000;

/// Pairs of windows that must be better without polling for it to be left (ours: most, as any one may have been disturbed).
const MOST: u32 = 3;

/// How much better it must be in a pair (ours: noise).
const MARGIN: f64 = 1.02;

/// What a server had done at some time.
#[derive(Debug, Clone, Copy)]
struct Sample {
    now_ns: u64,
    work: u64,
    cpu_ns: u64,
}

/// What was done in a window.
#[derive(Debug, Clone, Copy, Default)]
struct Done {
    ns: u64,
    work: u64,
    cpu_ns: u64,
}

impl Done {
    fn between(from: &Sample, to: &Sample) -> Done {
        Done {
            ns: to.now_ns - from.now_ns,
            work: to.work.saturating_sub(from.work),
            cpu_ns: to.cpu_ns.saturating_sub(from.cpu_ns),
        }
    }
}

/// Tells whether polling was not worth it.
fn better_without(with: &Done, without: &Done) -> bool {
    if with.work == 0 || without.work == 0 || with.cpu_ns == 0 || without.cpu_ns == 0 {
        return false;
    }
    let per = |a: u64, b: u64| a as f64 / b as f64;
    let rate = per(without.work, without.ns) / per(with.work, with.ns);
    let cpu = per(without.cpu_ns, without.work) / per(with.cpu_ns, with.work);
    rate * rate > cpu * MARGIN
}

#[derive(Debug)]
enum Phase {
    /// As found, until then.
    Hold { until_ns: u64 },
    /// In the window with this index, since the sample; `before` is the window before, `votes` the pairs that were better
    /// without.
    Try { window: usize, since: Sample, before: Done, votes: u32 },
}

/// The state machine: fed with samples, says what to do until when.
#[derive(Debug)]
struct Trial {
    phase: Phase,
    /// What was found last.
    spin: bool,
    hold_ns: u64,
}

impl Trial {
    fn new() -> Trial {
        Trial { phase: Phase::Hold { until_ns: 0 }, spin: true, hold_ns: HOLD_MIN_NS }
    }

    /// Forgets all, for a load that has only begun.
    fn begin_anew(&mut self, now_ns: u64) -> (bool, u64) {
        let until_ns = now_ns + SETTLE_NS;
        *self = Trial { phase: Phase::Hold { until_ns }, ..Trial::new() };
        (true, until_ns)
    }

    /// Takes a step whose time has come. Returns whether to poll, and until when.
    fn step(&mut self, now: Sample) -> (bool, u64) {
        let due_ns = match &self.phase {
            Phase::Hold { until_ns } => *until_ns,
            Phase::Try { since, .. } => since.now_ns + WINDOW_NS,
        };
        if now.now_ns >= due_ns + STALE_NS {
            return self.begin_anew(now.now_ns);
        }
        let (window, before, votes) = match &self.phase {
            Phase::Hold { .. } => (0, Done::default(), 0),
            Phase::Try { window, since, before, votes } => {
                let done = Done::between(since, &now);
                let pair_is_done = window % 2 == 1;
                let (with, without) = if WINDOWS[*window] { (&done, before) } else { (before, &done) };
                (window + 1, done, votes + u32::from(pair_is_done && better_without(with, without)))
            }
        };
        if window < WINDOWS.len() {
            self.phase = Phase::Try { window, since: now, before, votes };
            return (WINDOWS[window], now.now_ns + WINDOW_NS);
        }
        let spin = votes < MOST;
        self.hold_ns = if spin == self.spin { (self.hold_ns * 2).min(HOLD_MAX_NS) } else { HOLD_MIN_NS };
        self.spin = spin;
        let until_ns = now.now_ns + self.hold_ns;
        self.phase = Phase::Hold { until_ns };
        (spin, until_ns)
    }
}

/// What the contexts of one server share. Any thread.
#[derive(Debug)]
pub struct PollTrial {
    spin: AtomicBool,
    /// When the next step is due.
    due_ns: AtomicU64,
    state: Mutex<Trial>,
    /// What the contexts have done, each written by its home thread.
    work: Mutex<Vec<Arc<Counter>>>,
}

impl PollTrial {
    /// Makes one that polls until trying says otherwise.
    #[must_use]
    pub fn new() -> Arc<PollTrial> {
        Arc::new(PollTrial {
            spin: AtomicBool::new(true),
            due_ns: AtomicU64::new(0),
            state: Mutex::new(Trial::new()),
            work: Mutex::default(),
        })
    }

    /// Takes part: returns where the context counts its work.
    pub(super) fn join(&self) -> Arc<Counter> {
        let counter = Arc::new(Counter::default());
        self.work.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&counter));
        counter
    }

    /// Tells whether to poll now. Takes a step of the trial if one is due. Never waits.
    pub(super) fn allows(&self, now_ns: u64) -> bool {
        if now_ns >= self.due_ns.load(Ordering::Relaxed) {
            let mut state = match self.state.try_lock() {
                Ok(state) => state,
                Err(TryLockError::Poisoned(e)) => e.into_inner(),
                // Somebody else takes it.
                Err(TryLockError::WouldBlock) => return self.spin.load(Ordering::Relaxed),
            };
            if now_ns >= self.due_ns.load(Ordering::Relaxed) {
                let work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
                let work = work.iter().fold(0u64, |sum, c| sum.wrapping_add(c.get()));
                let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
                let cpu_ns = cpu.tv_sec as u64 * 1_000_000_000 + cpu.tv_nsec as u64;
                let (spin, due_ns) = state.step(Sample { now_ns, work, cpu_ns });
                self.spin.store(spin, Ordering::Relaxed);
                self.due_ns.store(due_ns, Ordering::Relaxed);
            }
        }
        self.spin.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aio::{AioConfig, AioContext, PollConfig};

    const MS: u64 = 1_000_000;

    /// A server with a closed-loop load: work and CPU time per millisecond, with polling and without.
    struct Load {
        now_ns: u64,
        work: u64,
        cpu_ns: u64,
        with: (u64, u64),
        without: (u64, u64),
    }

    impl Load {
        fn new(with: (u64, u64), without: (u64, u64)) -> Load {
            Load { now_ns: 1_000 * MS, work: 0, cpu_ns: 0, with, without }
        }

        /// Goes on for so long, asking as often as a loop does. Returns for how much of it polling was on, in percent.
        fn run(&mut self, trial: &mut Trial, due: &mut u64, spin: &mut bool, ms: u64) -> u64 {
            let mut on = 0;
            for _ in 0..ms * 10 {
                if self.now_ns >= *due {
                    let sample = Sample { now_ns: self.now_ns, work: self.work, cpu_ns: self.cpu_ns };
                    (*spin, *due) = trial.step(sample);
                }
                let (work, cpu) = if *spin { self.with } else { self.without };
                self.now_ns += MS / 10;
                self.work += work / 10;
                self.cpu_ns += cpu / 10;
                on += u64::from(*spin);
            }
            on * 10 / ms
        }
    }

    fn done((work, cpu_ns): (u64, u64)) -> Done {
        Done { ns: MS, work, cpu_ns }
    }

    #[test]
    fn what_does_better_is_kept() {
        let cases = [
            // A lone request: polling doubles the rate, at the whole of a CPU.
            ((30_000, MS), (11_000, 500_000), true),
            // The client needs the CPU: nothing is gained.
            ((80_000, 2 * MS), (80_000, 1_500_000), false),
            ((80_000, MS), (90_000, MS), false),
            // A tenth of the rate for a third of the CPU.
            ((10_000, MS), (9_000, 500_000), false),
            // A third of the rate for a half of the CPU.
            ((10_000, MS), (6_500, 450_000), true),
            // It makes no difference.
            ((100_000, MS), (100_000, MS), true),
        ];
        for (with, without, spin) in cases {
            let mut load = Load::new(with, without);
            let (mut trial, mut due, mut now) = (Trial::new(), 0, true);
            load.run(&mut trial, &mut due, &mut now, 100);
            let on = load.run(&mut trial, &mut due, &mut now, 3_000);
            assert!(if spin { on > 95 } else { on < 5 }, "{with:?} {without:?}: polling {on} % of the time");
            if with == without {
                continue;
            }
            // The load turns round.
            (load.with, load.without) = (load.without, load.with);
            load.run(&mut trial, &mut due, &mut now, 2_000);
            let on = load.run(&mut trial, &mut due, &mut now, 1_000);
            let turned = !better_without(&done(load.with), &done(load.without));
            assert!(
                if turned { on > 85 } else { on < 15 },
                "{without:?} {with:?}: polling {on} % of the time"
            );
        }
    }

    #[test]
    fn a_lull_makes_it_begin_anew() {
        let mut load = Load::new((100, MS), (200, MS));
        let (mut trial, mut due, mut spin) = (Trial::new(), 0, true);
        load.run(&mut trial, &mut due, &mut spin, 2_000);
        assert!(!trial.spin);
        load.now_ns = due + STALE_NS;
        (load.with, load.without) = ((200, MS), (100, MS));
        assert_eq!(load.run(&mut trial, &mut due, &mut spin, 10), 100, "polling is the rule");
        let on = load.run(&mut trial, &mut due, &mut spin, 2_000);
        assert!(on > 90, "{on} %");
    }

    #[test]
    fn a_context_asks_before_it_polls_and_counts_its_work() {
        for found in [true, false] {
            let trial = PollTrial::new();
            trial.spin.store(found, Ordering::Relaxed);
            // No step is due.
            trial.due_ns.store(u64::MAX, Ordering::Relaxed);
            let shared = Arc::clone(&trial);
            let context = move || {
                let poll = PollConfig { max_ns: 1_000 * MS, grow: 0, shrink: 0 };
                let config = AioConfig { poll, poll_trial: Some(shared), ..AioConfig::default() };
                let ctx = AioContext::new(config).expect("a context");
                let timer = ctx.timer_new(|| {});
                for _ in 0..5 {
                    timer.mod_ns(ctx.now_ns() + MS);
                    while !ctx.poll(true) {}
                    ctx.note_work(7);
                }
                let counters = ctx.counters();
                (counters.poll_hits.get() + counters.poll_misses.get(), counters.blocks.get())
            };
            let (polled, blocked) = std::thread::spawn(context).join().expect("the thread");
            assert_eq!(polled > 0, found, "{polled} times");
            assert!(blocked > 0);
            assert_eq!(trial.work.lock().expect("not poisoned")[0].get(), 35);
        }
    }

    #[test]
    fn nothing_is_learned_from_nothing() {
        let none = Done { ns: MS, work: 0, cpu_ns: 5 };
        let some = Done { ns: MS, work: 9, cpu_ns: 5 };
        assert!(!better_without(&none, &some) && !better_without(&some, &none));
    }
}
