//! AioContext: one turn of the loop.
//!
//! ```text
//! poll:  hand queued file I/O to the kernel ─► anything to do? ─no─► busy-poll ─► announce ─► block in epoll
//!        ─► file I/O completions ─► bottom halves and runnables ─► fd handlers ─► timers
//! ```
//!
//! One home thread makes the context, polls it, runs its callbacks and owns its handlers, timers and engine;
//! [`HomeCell`] checks that on every access, and no borrow is held while a callback runs. Other threads reach
//! the context only through the lock-free work list and the notifier.
//!
//! Work that a callback schedules runs in the *next* turn. What a turn has collected waits in queues of the
//! context, not on the stack, so that a poll nested in a plain callback carries on with the rest of it.

use super::bh::{self, Work};
use super::bh_list::{BhList, Node};
use super::engine::thread_pool::{JobId, ThreadPool};
use super::engine::{self, Completion, Engine, EngineChoice, EngineKind, Op};
use super::handler::{HandlerFn, HandlerTable};
use super::home::HomeCell;
use super::notifier::Notifier;
use super::poll_trial::PollTrial;
use super::polling::{Gate, PollWindow, Spin};
use super::timer::{self, TimerInner, TimerList};
use super::{BottomHalf, Clock, HandlerId, Interest, PollConfig, Readiness, Runnable, Timer};
use crate::util::counters::Counter;
use mio::unix::SourceFd;
use mio::{Events, Poll, Token, Waker};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

/// The waker's token; handler tokens never reach it (see `HandlerTable`).
const WAKER: Token = Token(usize::MAX);
/// The engine's wake fd.
const ENGINE: Token = Token(usize::MAX - 1);
/// Events taken from the kernel per turn (ours); more wait for the next turn.
const EVENTS_PER_TURN: usize = 256;
/// Looks at the in-memory flags between two looks at the kernel while busy polling (ours): a look at the kernel
/// costs a system call, and another thread's work shows up in memory first.
const SPINS_PER_SYSCALL: u32 = 16;

/// How a context is made.
#[derive(Debug, Clone)]
pub struct AioConfig {
    /// Name, as seen in logs and thread names.
    pub name: String,
    /// Busy polling.
    pub poll: PollConfig,
    /// Whether that pays, tried together with other contexts; none: it does.
    pub poll_trial: Option<Arc<PollTrial>>,
    /// Which engine does read, write, fsync, fallocate.
    pub engine: EngineChoice,
    /// Most worker threads of this context's pool.
    pub pool_threads: usize,
    /// The clock behind timers.
    pub clock: Clock,
}

impl Default for AioConfig {
    fn default() -> Self {
        AioConfig {
            name: String::from("aio"),
            poll: PollConfig { max_ns: 0, grow: 0, shrink: 0 },
            poll_trial: None,
            engine: EngineChoice::Auto,
            pool_threads: 16,
            clock: Clock::Monotonic,
        }
    }
}

/// Counters of one context, written by its home thread (except `notify_writes`).
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct ContextCounters {
    /// Turns of the loop.
    pub turns: Counter,
    /// Times the loop blocked in the kernel.
    pub blocks: Counter,
    /// Times that busy polling found work.
    pub poll_hits: Counter,
    /// Times that busy polling gave up.
    pub poll_misses: Counter,
    /// Bottom halves, one-shot closures and runnables that were run.
    pub bh_runs: Counter,
    /// Submissions to the engine.
    pub engine_submits: Counter,
    /// Writes to the wake-up eventfd by other threads.
    pub notify_writes: AtomicU64,
}

/// What other threads need to wake the loop.
struct Wake {
    notifier: Notifier,
    waker: Waker,
    counters: ContextCounters,
}

impl Wake {
    fn notify(&self) {
        if self.notifier.notify() {
            self.counters.notify_writes.fetch_add(1, Ordering::Relaxed);
            // An eventfd write fails only if the descriptor is broken, and then nobody could ever wake the loop.
            self.waker.wake().expect("the wake-up eventfd takes a write");
        }
    }
}

/// What the home thread schedules for itself: no atomics, no list.
enum Local {
    Run(Arc<dyn Runnable>),
    Once(Box<dyn FnOnce() + Send>),
}

struct Home {
    poll: Poll,
    events: Events,
    handlers: HandlerTable,
    /// Events taken from the kernel and not delivered yet.
    ready: VecDeque<(HandlerId, Readiness)>,
    timers: TimerList,
    due: Vec<Arc<TimerInner>>,
    engine: Option<Box<dyn Engine>>,
    pool: Option<ThreadPool>,
    reaped: Vec<(Completion, io::Result<usize>)>,
    completions: VecDeque<(Completion, io::Result<usize>)>,
    /// Nodes taken from the shared list and not run yet.
    taken: VecDeque<Arc<Node<Work>>>,
    /// Scheduled by the home thread for the next turn, and collected for this one.
    local_next: VecDeque<Local>,
    local_now: VecDeque<Local>,
    window: PollWindow,
    gate: Gate,
}

impl Home {
    /// Moves finished file operations to the queues; true if there is any in them.
    fn reap(&mut self) -> bool {
        if let Some(engine) = &mut self.engine
            && engine.in_flight() > 0
        {
            engine.reap(&mut self.reaped);
        }
        if let Some(pool) = &mut self.pool
            && pool.in_flight() > 0
        {
            pool.reap(&mut self.reaped);
        }
        self.completions.extend(self.reaped.drain(..));
        !self.completions.is_empty()
    }

    /// Whether something can run without asking the kernel.
    fn has_work(&self) -> bool {
        !self.completions.is_empty()
            || !self.taken.is_empty()
            || !self.local_now.is_empty()
            || !self.local_next.is_empty()
            || !self.ready.is_empty()
    }

    /// Looks at the kernel; blocks at most for `timeout` (None: without limit). True if a handler's fd is ready.
    fn poll_fds(&mut self, timeout: Option<Duration>) -> bool {
        match self.poll.poll(&mut self.events, timeout) {
            Ok(()) => {}
            // A signal, or io_uring completion work that the kernel ran for us: an ordinary wake.
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return false,
            Err(e) => panic!("epoll_wait on a descriptor that this context owns failed: {e}"),
        }
        let before = self.ready.len();
        let ready = &mut self.ready;
        ready.extend(
            self.events
                .iter()
                .filter(|e| e.token() != WAKER && e.token() != ENGINE)
                .map(|e| (HandlerId::from_token(e.token()), Readiness::of(e))),
        );
        ready.len() > before
    }
}

thread_local! {
    static CURRENT: RefCell<Weak<AioContext>> = const { RefCell::new(Weak::new()) };
}

/// Tells whether the caller must not poll; see [`AioContext::forbid_poll_when`].
static POLL_GUARD: OnceLock<fn() -> bool> = OnceLock::new();

/// An event loop owned by one home thread. Always behind an `Arc`.
pub struct AioContext {
    name: String,
    id: usize,
    clock: Clock,
    engine_kind: EngineKind,
    wake: Arc<Wake>,
    poll_trial: Option<(Arc<PollTrial>, Arc<Counter>)>,
    list: BhList<Work>,
    home: HomeCell<Home>,
}

impl fmt::Debug for AioContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AioContext").field("name", &self.name).field("id", &self.id).finish_non_exhaustive()
    }
}

impl AioContext {
    /// Makes a context whose home is the calling thread, and makes it that thread's current context.
    ///
    /// # Errors
    /// What epoll, eventfd or (when forced) io_uring set-up reports.
    ///
    /// # Panics
    /// When the thread already has a live context.
    pub fn new(config: AioConfig) -> io::Result<Arc<AioContext>> {
        static NEXT_ID: AtomicUsize = AtomicUsize::new(0);
        assert!(AioContext::current().is_none(), "this thread already has an AioContext");
        let poll = Poll::new()?;
        let wake = Arc::new(Wake {
            notifier: Notifier::new(),
            waker: Waker::new(poll.registry(), WAKER)?,
            counters: ContextCounters::default(),
        });
        let on_done: Arc<dyn Fn() + Send + Sync> = {
            let wake = Arc::clone(&wake);
            Arc::new(move || wake.notify())
        };
        let engine = engine::select(config.engine, config.pool_threads, &config.name, Arc::clone(&on_done))?;
        let engine_kind = engine.kind();
        if let Some(fd) = engine.wake_fd() {
            poll.registry().register(&mut SourceFd(&fd), ENGINE, mio::Interest::READABLE)?;
        }
        let pool = ThreadPool::new(&config.name, config.pool_threads, on_done);
        let ctx = Arc::new(AioContext {
            name: config.name,
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            clock: config.clock,
            engine_kind,
            wake,
            poll_trial: config.poll_trial.map(|trial| {
                let work = trial.join();
                (trial, work)
            }),
            list: BhList::new(),
            home: HomeCell::new(Home {
                poll,
                events: Events::with_capacity(EVENTS_PER_TURN),
                handlers: HandlerTable::default(),
                ready: VecDeque::new(),
                timers: TimerList::default(),
                due: Vec::new(),
                engine: Some(engine),
                pool: Some(pool),
                reaped: Vec::new(),
                completions: VecDeque::new(),
                taken: VecDeque::new(),
                local_next: VecDeque::new(),
                local_now: VecDeque::new(),
                window: PollWindow::new(config.poll),
                gate: Gate::new(),
            }),
        });
        CURRENT.with(|c| *c.borrow_mut() = Arc::downgrade(&ctx));
        Ok(ctx)
    }

    /// Returns the calling thread's context. Re-read after every yield; never yields itself.
    #[inline(never)]
    #[must_use]
    pub fn current() -> Option<Arc<AioContext>> {
        CURRENT.with(|c| c.borrow().upgrade())
    }

    /// Makes every later poll of the process panic if `guard` says so of its caller. Coroutines install this:
    /// a coroutine that polled would block its thread, and run others on its own small stack. Set once;
    /// later calls change nothing.
    pub fn forbid_poll_when(guard: fn() -> bool) {
        POLL_GUARD.get_or_init(|| guard);
    }

    /// Tells whether the calling thread is this context's home. Never yields.
    #[must_use]
    pub fn is_home(&self) -> bool {
        self.home.is_home()
    }

    /// Returns the name given at creation.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns a process-wide unique, small number.
    #[must_use]
    pub fn id(&self) -> usize {
        self.id
    }

    /// Runs one turn; blocks for work if `blocking`. Returns whether anything but the notifier made progress;
    /// a blocking poll that was only notified, or interrupted by a signal, returns false.
    ///
    /// A plain callback (not a coroutine) may poll: that turn carries on with what the outer one has collected,
    /// and does not enter a callback that is running.
    ///
    /// # Panics
    /// Off the home thread, and in a coroutine.
    pub fn poll(self: &Arc<Self>, blocking: bool) -> bool {
        if let Some(guard) = POLL_GUARD.get() {
            assert!(
                !guard(),
                "AioContext::poll called from a coroutine: it would block the thread; yield instead"
            );
        }
        let counters = &self.wake.counters;
        counters.turns.add(1);
        let mut waited_ns = None;
        self.home.with(|h| {
            if let Some(engine) = &mut h.engine {
                engine.flush();
            }
            h.reap();
            let mut timeout = Some(Duration::ZERO);
            if blocking && !h.has_work() && self.list.is_empty() {
                timeout = h.timers.timeout(&self.clock);
            }
            if timeout == Some(Duration::ZERO) {
                h.poll_fds(timeout);
            } else {
                waited_ns = self.wait(h, timeout);
            }
            self.wake.notifier.accept();
            h.reap();
            self.list.take(&mut h.taken);
            h.local_now.append(&mut h.local_next);
            if let Some(waited_ns) = waited_ns {
                h.window.learn(waited_ns);
            }
        });
        self.run_completions() | self.run_work() | self.run_handlers() | self.run_timers()
    }

    /// Polls, then blocks, until there is work or `timeout` has passed. Returns how long that was, in
    /// nanoseconds, if the window wants to know.
    fn wait(&self, h: &mut Home, timeout: Option<Duration>) -> Option<u64> {
        let counters = &self.wake.counters;
        let notifier = &self.wake.notifier;
        // Real time even under a mock clock: this is about the machine.
        let start = h.window.enabled().then(|| Clock::Monotonic.now_ns());
        let pays = |now: &u64| self.poll_trial.as_ref().is_none_or(|(trial, _)| trial.allows(*now));
        // A wait that nobody was to shorten teaches nothing about how long to poll.
        let start = start.filter(pays);
        if let Some(start) = start
            && h.window.ns() > 0
            && h.gate.is_open(start)
        {
            let limit = h.window.ns().min(timeout.map_or(u64::MAX, |t| t.as_nanos() as u64));
            let mut spin = Spin::new(start);
            loop {
                let flagged = (0..SPINS_PER_SYSCALL).any(|_| {
                    std::hint::spin_loop();
                    notifier.is_notified() || !self.list.is_empty()
                });
                let hit = flagged || h.reap() || h.poll_fds(Some(Duration::ZERO)) || h.reap();
                spin.at(Clock::Monotonic.now_ns());
                if hit {
                    counters.poll_hits.add(1);
                    h.gate.spun(&spin, true);
                    return Some(spin.ns());
                }
                if spin.ns() >= limit {
                    counters.poll_misses.add(1);
                    h.gate.spun(&spin, false);
                    break;
                }
            }
        }
        // Work of ours was looked at before; work of others is announced by the flag.
        if notifier.begin_block() && self.list.is_empty() {
            counters.blocks.add(1);
            h.poll_fds(timeout);
        } else {
            h.poll_fds(Some(Duration::ZERO));
        }
        notifier.end_block();
        start.map(|s| Clock::Monotonic.now_ns() - s)
    }

    fn run_completions(self: &Arc<Self>) -> bool {
        let mut progress = false;
        while let Some((done, result)) = self.home.with(|h| h.completions.pop_front()) {
            progress = true;
            done(result);
        }
        progress
    }

    fn run_work(self: &Arc<Self>) -> bool {
        let mut runs = 0;
        while let Some(node) = self.home.with(|h| h.taken.pop_front()) {
            runs += u64::from(bh::run_node(&node, self));
        }
        while let Some(local) = self.home.with(|h| h.local_now.pop_front()) {
            runs += 1;
            match local {
                Local::Run(r) => r.run(self),
                Local::Once(f) => f(),
            }
        }
        self.wake.counters.bh_runs.add(runs);
        runs > 0
    }

    fn run_handlers(self: &Arc<Self>) -> bool {
        let mut progress = false;
        loop {
            let next = self.home.with(|h| {
                // The callback of a removed handler is not there any more: skip it.
                while let Some((id, ready)) = h.ready.pop_front() {
                    if let Some(callback) = h.handlers.begin(id, ready) {
                        return Some((id, ready, callback));
                    }
                }
                None
            });
            let Some((id, ready, mut callback)) = next else { return progress };
            progress = true;
            callback(ready);
            let orphan: Option<HandlerFn> = self.home.with(|h| {
                let (orphan, missed) = h.handlers.end(id, callback);
                if let Some(missed) = missed {
                    h.ready.push_back((id, missed));
                }
                orphan
            });
            // Dropped outside of the cell: what it captured may call back.
            drop(orphan);
        }
    }

    fn run_timers(self: &Arc<Self>) -> bool {
        let now_ns = self.home.with(|h| {
            if h.timers.len() == 0 {
                return None;
            }
            let now_ns = self.clock.now_ns();
            h.timers.due(now_ns, &mut h.due);
            (!h.due.is_empty()).then_some(now_ns)
        });
        let Some(now_ns) = now_ns else { return false };
        let due = self.home.with(|h| std::mem::take(&mut h.due));
        let mut progress = false;
        for t in due {
            if let Some(mut callback) = self.home.with(|h| h.timers.claim(&t, now_ns)) {
                progress = true;
                callback();
                timer::put_back(&t, callback);
            }
        }
        progress
    }

    /// Polls, blocking, until `done` says true; what a plain thread (the main thread, a test) uses to wait for
    /// its own context. Whoever makes `done` true from another thread calls [`AioContext::notify`] afterwards.
    ///
    /// # Panics
    /// As [`AioContext::poll`].
    pub fn poll_until(self: &Arc<Self>, mut done: impl FnMut() -> bool) {
        while !done() {
            self.poll(true);
        }
    }

    /// Wakes the loop from any thread; coalesced: a system call is made only if the loop has announced that it
    /// will block and nobody else has woken it. Never yields.
    pub fn notify(&self) {
        self.wake.notify();
    }

    /// Makes a bottom half; it runs once per turn after any number of schedules. Any thread; never yields.
    pub fn bh_new(self: &Arc<Self>, f: impl FnMut() + Send + 'static) -> BottomHalf {
        BottomHalf::new(self, Box::new(f))
    }

    /// Schedules a closure to run once on the home thread's next turn. Any thread; never yields.
    pub fn bh_schedule_oneshot(self: &Arc<Self>, f: impl FnOnce() + Send + 'static) {
        let f = Box::new(f);
        if self.is_home() {
            self.home.with(|h| h.local_next.push_back(Local::Once(f)));
        } else {
            self.list.schedule_new(Work::Once(Mutex::new(Some(f))));
            self.wake.notify();
        }
    }

    /// Schedules a runnable for the next turn; those of one thread run in the order of the calls. Any thread;
    /// never yields.
    pub fn schedule(self: &Arc<Self>, r: Arc<dyn Runnable>) {
        if self.is_home() {
            self.home.with(|h| h.local_next.push_back(Local::Run(r)));
        } else {
            self.list.schedule_new(Work::Run(r));
            self.wake.notify();
        }
    }

    /// Schedules a bottom half's node. Any thread.
    pub(super) fn schedule_node(&self, node: &Arc<Node<Work>>) {
        self.list.schedule(node);
        // The loop is not blocked while its own thread is here; it looks at the list before it blocks.
        if !self.is_home() {
            self.wake.notify();
        }
    }

    /// Registers an edge-triggered fd handler. Home thread only; never yields. The fd stays the caller's and
    /// must outlive the registration: remove the handler before closing it.
    ///
    /// # Errors
    /// What epoll reports (e.g. `EPERM` for a regular file, `EEXIST`).
    ///
    /// # Panics
    /// Off the home thread.
    pub fn add_handler(
        self: &Arc<Self>,
        fd: RawFd,
        interest: Interest,
        f: impl FnMut(Readiness) + Send + 'static,
    ) -> io::Result<HandlerId> {
        self.home.with(|h| {
            let id = h.handlers.insert(fd, Box::new(f));
            let registered = h.poll.registry().register(&mut SourceFd(&fd), id.token(), interest.to_mio());
            if registered.is_err() {
                h.handlers.remove(id);
            }
            registered.map(|()| id)
        })
    }

    /// Changes what a handler wants to hear about. What is ready then is reported again. Home thread only; never yields.
    ///
    /// # Errors
    /// What epoll reports; `NotFound` for an unknown id.
    ///
    /// # Panics
    /// Off the home thread.
    pub fn change_handler(&self, id: HandlerId, interest: Interest) -> io::Result<()> {
        self.home.with(|h| {
            let fd = h.handlers.fd(id).ok_or(io::ErrorKind::NotFound)?;
            h.poll.registry().reregister(&mut SourceFd(&fd), id.token(), interest.to_mio())
        })
    }

    /// Removes a handler, also from inside its own callback; it is not called again, even if its fd was found
    /// ready already. Home thread only; unknown ids are ignored; never yields.
    ///
    /// # Panics
    /// Off the home thread.
    pub fn remove_handler(&self, id: HandlerId) {
        let callback = self.home.with(|h| {
            let (fd, callback) = h.handlers.remove(id)?;
            if let Err(error) = h.poll.registry().deregister(&mut SourceFd(&fd)) {
                tracing::error!(context = %self.name, fd, %error, "fd was closed before its handler was removed");
            }
            callback
        });
        // Dropped outside of the cell: what it captured may call back.
        drop(callback);
    }

    /// Makes a disarmed one-shot timer. Home thread only; never yields.
    ///
    /// # Panics
    /// Off the home thread.
    pub fn timer_new(self: &Arc<Self>, f: impl FnMut() + Send + 'static) -> Timer {
        let inner = self.home.with(|h| h.timers.make(Box::new(f)));
        Timer::new(self, inner)
    }

    pub(super) fn with_timers<R>(&self, f: impl FnOnce(&mut TimerList) -> R) -> R {
        self.home.with(|h| f(&mut h.timers))
    }

    /// Returns the clock's time in nanoseconds. Any thread; never yields.
    #[must_use]
    pub fn now_ns(&self) -> u64 {
        self.clock.now_ns()
    }

    /// Queues a file operation; `done` runs on the home thread in a later step of the loop, never inside this call.
    /// Submissions of one turn go to the kernel together. Home thread only; never yields.
    ///
    /// # Panics
    /// Off the home thread, and after the context was shut down.
    ///
    /// # Safety
    /// The fd and the memory behind `op`'s vectors must stay valid (and unaliased for reads) until `done` runs.
    #[expect(unsafe_code, reason = "buffers are borrowed by the kernel")]
    pub unsafe fn submit(&self, op: Op, done: Completion) {
        self.wake.counters.engine_submits.add(1);
        self.home.with(|h| {
            let engine = h.engine.as_mut().expect("the context was shut down");
            // SAFETY: the caller vouches for the fd and the memory until `done` runs.
            unsafe { engine.submit(op, done) };
        });
    }

    /// Runs `work` on this context's bounded thread pool, then `done` on the home thread, with the result, or an
    /// error if `work` panicked. Home thread only; never yields. The id is for [`AioContext::cancel_blocking`].
    ///
    /// # Panics
    /// Off the home thread, and after the context was shut down.
    pub fn submit_blocking(
        &self,
        work: Box<dyn FnOnce() -> io::Result<usize> + Send>,
        done: Completion,
    ) -> JobId {
        self.home.with(|h| h.pool.as_ref().expect("the context was shut down").submit(work, done))
    }

    /// Takes blocking work back if no thread has begun it: it never runs, and its completion gets `ECANCELED`.
    /// False if it has begun or finished. Home thread only; never yields.
    ///
    /// # Panics
    /// Off the home thread.
    pub fn cancel_blocking(&self, id: JobId) -> bool {
        self.home.with(|h| h.pool.as_ref().is_some_and(|p| p.cancel(id)))
    }

    /// Which engine was chosen.
    #[must_use]
    pub fn engine_kind(&self) -> EngineKind {
        self.engine_kind
    }

    /// Returns this context's counters. Any thread.
    #[must_use]
    pub fn counters(&self) -> &ContextCounters {
        &self.wake.counters
    }

    /// Registered handlers, armed timers and unfinished file operations: what keeps a context busy. Home thread
    /// only; never yields.
    ///
    /// # Panics
    /// Off the home thread.
    #[must_use]
    pub fn load(&self) -> (usize, usize, usize) {
        self.home.with(|h| {
            let io =
                h.engine.as_ref().map_or(0, |e| e.in_flight()) + h.pool.as_ref().map_or(0, |p| p.in_flight());
            (h.handlers.len(), h.timers.len(), io)
        })
    }

    /// Counts what has been done for somebody, in a unit of the caller's: by how much more of it comes about, polling is judged
    /// ([`PollTrial`]). Home thread only; never yields.
    pub fn note_work(&self, units: u64) {
        if let Some((_, work)) = &self.poll_trial {
            debug_assert!(self.is_home(), "counted by the home thread");
            work.add(units);
        }
    }

    /// Changes busy polling. Home thread only; never yields.
    ///
    /// # Panics
    /// Off the home thread.
    pub fn set_poll(&self, poll: PollConfig) {
        self.home.with(|h| h.window.set(poll));
    }

    /// Ends the context: waits for file operations, runs what is scheduled (at most a bounded number of turns),
    /// then drops handlers, timers and the engine. What is scheduled later never runs. Home thread, not in a
    /// callback.
    pub(super) fn shut_down(self: &Arc<Self>) {
        /// Work that keeps scheduling more work must not keep the thread for ever (ours).
        const LAST_TURNS: usize = 10_000;
        for _ in 0..LAST_TURNS {
            let busy_io = self.load().2 > 0;
            let progress = self.poll(busy_io);
            if !progress && !busy_io && self.list.is_empty() && self.home.with(|h| !h.has_work()) {
                break;
            }
        }
        let handlers: Vec<_> = self.home.with(|h| h.handlers.drain());
        for (fd, callback) in handlers {
            self.home.with(|h| {
                // The owner may have closed it already: it is going away either way.
                let _ = h.poll.registry().deregister(&mut SourceFd(&fd));
            });
            drop(callback);
        }
        let (timers, engine, pool) =
            self.home.with(|h| (std::mem::take(&mut h.timers), h.engine.take(), h.pool.take()));
        drop((timers, engine, pool));
        CURRENT.with(|c| *c.borrow_mut() = Weak::new());
    }
}
