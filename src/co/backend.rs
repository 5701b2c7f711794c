//! Stacks: the only file that names `may`.
//!
//! A [`Stack`] is one `may` coroutine that runs one job after another and parks in between, so that a new
//! coroutine of ours costs a switch, not a spawn. `may`'s own scheduler stays idle: `spawn_local` runs the first
//! job at once on the calling thread, `FastBlocker::unpark` continues a parked stack inline on the calling
//! thread, and `FastBlocker::park` goes back to whoever did that. Nested switches work.
//!
//! ```text
//!  enterer ── start/resume ──►  job runs  ── park ──►  enterer          (enter, yield)
//!  enterer ── start ─────────►  job ends  ── park ──►  enterer ── recycle ──► idle list of the thread
//! ```
//!
//! Memory: a stack is 64 KiB of address space and a guard page (two mappings); about 8 KiB of it (two pages) is
//! resident once it has run, more if a job went deeper. A thread keeps at most [`LOCAL_IDLE`] idle stacks (see
//! [`super::inc_pool_size`]); what exceeds that is given to `may`'s pool ([`MAY_POOL`] stacks for the process), then
//! unmapped. The kernel's `vm.max_map_count` (65530 by default) bounds a process to some 32 000 stacks; entering
//! a new coroutine beyond that panics in the enterer. So whoever makes coroutines for clients asks [`super::has_room`].
//!
//! A stack that runs into its guard page ends the process: `may` would abandon the frames without running a
//! single drop, leaving locks held for ever. Our SIGSEGV handler, installed after its, says so and aborts.
//!
//! Invariants: one thread at a time uses a stack (the coroutine's "entered" state is that exclusion); a
//! suspended stack is never dropped: `may` would unwind it with a panic. A lost one is leaked instead.

use may::sync::FastBlocker;
use std::cell::{Cell, RefCell, UnsafeCell};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, Once, OnceLock, PoisonError};

/// Stack size in 8-byte words: 64 KiB (ours: an OpenSSL handshake needs 18 KiB, a panic with backtrace over 16).
/// Even, because an odd number makes `may` track and print stack usage.
const STACK_WORDS: usize = 8192;

/// Usable bytes of one coroutine stack.
pub(super) const STACK_BYTES: usize = STACK_WORDS * 8;

/// Idle stacks that one thread keeps at first (ours; QEMU keeps up to two batches of 128).
const LOCAL_IDLE: usize = 128;

/// Idle stacks that one thread keeps.
static LOCAL_IDLE_MAX: AtomicUsize = AtomicUsize::new(LOCAL_IDLE);

/// Stacks in `may`'s own pool; all of them are mapped at the first coroutine.
const MAY_POOL: usize = 16;

/// What runs on a stack.
pub(super) trait Job {
    /// Runs to the end; must not unwind.
    fn run(&self);
}

/// The part of a stack that both sides see; at a fixed address for as long as the stack exists.
struct Worker {
    /// Made by the coroutine itself, at its start.
    blocker: UnsafeCell<Option<FastBlocker>>,
    /// What to run next; None asks an idle worker to end.
    job: Cell<Option<*const dyn Job>>,
    /// Set while it is parked properly: a switch that comes back without it means an overflow.
    parked: Cell<bool>,
    /// Set when it has ended on request.
    ended: Cell<bool>,
    /// An address near the top of the stack, for the overflow handler; 0 before the start.
    top: Cell<usize>,
}

/// A coroutine stack and the `may` coroutine on it.
pub(super) struct Stack {
    /// Owned (from `Box::into_raw`): the coroutine has a copy of the pointer, so it is no `Box`.
    worker: *mut Worker,
}

#[expect(unsafe_code, reason = "a parked stack may be continued by another thread")]
// SAFETY: the worker is used by one thread at a time, whoever owns the `Stack` or runs on it; `may` coroutines
// are made to be moved between threads while parked.
unsafe impl Send for Stack {}

#[derive(Clone, Copy)]
struct WorkerPtr(*mut Worker);

#[expect(unsafe_code, reason = "handed to the coroutine that starts on this same thread")]
// SAFETY: `spawn_local` runs the closure on the calling thread; afterwards the exclusion of `Stack` holds.
unsafe impl Send for WorkerPtr {}

impl Stack {
    /// Takes an idle stack of this thread, or prepares a new one.
    pub(super) fn take() -> Stack {
        local_pop().unwrap_or_else(|| {
            STACKS.fetch_add(1, Ordering::Relaxed);
            Stack {
                worker: Box::into_raw(Box::new(Worker {
                    blocker: UnsafeCell::new(None),
                    job: Cell::new(None),
                    parked: Cell::new(false),
                    ended: Cell::new(false),
                    top: Cell::new(0),
                })),
            }
        })
    }

    #[expect(unsafe_code, reason = "the one place that follows the pointer")]
    #[inline(always)]
    fn worker(&self) -> &Worker {
        // SAFETY: from `Box::into_raw`, freed only by `drop` of this `Stack`; shared references only, every
        // field is a cell, and one thread at a time uses the stack (module invariant).
        unsafe { &*self.worker }
    }

    /// Runs `job` on this stack until it parks or ends.
    ///
    /// # Safety
    /// `job` must stay valid until it has ended, and nobody else may use the stack meanwhile.
    #[expect(unsafe_code, reason = "the job's lifetime is the caller's promise")]
    pub(super) unsafe fn start(&self, job: *const (dyn Job + 'static)) {
        let w = self.worker();
        debug_assert!(w.job.get().is_none());
        w.job.set(Some(job));
        if w.top.get() != 0 {
            return self.resume();
        }
        init();
        let p = WorkerPtr(self.worker);
        let body = move || {
            let p: WorkerPtr = p;
            // SAFETY: the worker outlives its coroutine (see `Stack::drop`).
            worker_main(unsafe { &*p.0 });
        };
        // SAFETY: `spawn_local` is unsafe because of thread-locals and stack size: we re-read thread-locals after
        // each switch, and an overflow aborts the process.
        let spawned = unsafe { may::coroutine::Builder::new().spawn_local(body) };
        drop(spawned.expect("spawn_local has no failing path: the stack is mapped or it panics"));
        w.check_parked();
    }

    /// Continues a parked stack until it parks again.
    #[inline(always)]
    pub(super) fn resume(&self) {
        let w = self.worker();
        w.blocker().unpark();
        w.check_parked();
    }

    /// Parks the stack that we run on; returns when it is resumed, maybe on another thread.
    #[inline(always)]
    pub(super) fn park(&self) {
        self.worker().park();
    }

    /// An address near the top of the stack; 0 before the start. Async-signal-safe.
    pub(super) fn top(&self) -> usize {
        self.worker().top.get()
    }

    /// Gives an idle stack (its job has ended) back to this thread.
    pub(super) fn recycle(self) {
        if let Some(extra) = local_push(self) {
            extra.end();
        }
    }

    /// Lets the coroutine of an idle stack return, and frees both.
    fn end(self) {
        let w = self.worker();
        debug_assert!(w.job.get().is_none());
        if w.top.get() != 0 {
            w.blocker().unpark();
            assert!(w.ended.get(), "an idle coroutine stack did not end when asked to");
        }
    }

    /// Forgets a suspended stack for ever: dropping it would unwind it.
    pub(super) fn leak(self) {
        std::mem::forget(self);
    }
}

impl Drop for Stack {
    #[expect(unsafe_code, reason = "frees what `take` allocated")]
    fn drop(&mut self) {
        if self.worker().top.get() != 0 && !self.worker().ended.get() {
            // Its coroutine is parked and points to the worker: leak both.
            return;
        }
        STACKS.fetch_sub(1, Ordering::Relaxed);
        // SAFETY: from `Box::into_raw` in `take`, and this is its only owner; the coroutine never began or ended.
        drop(unsafe { Box::from_raw(self.worker) });
    }
}

impl Worker {
    #[expect(unsafe_code, reason = "the blocker is set once, before anybody else can look")]
    #[inline(always)]
    fn blocker(&self) -> &FastBlocker {
        // SAFETY: written once by `worker_main` before its first park, on the thread that waits in `start`;
        // only shared references afterwards.
        let b = unsafe { &*self.blocker.get() };
        b.as_ref().expect("a started stack has its blocker")
    }

    #[inline(always)]
    fn park(&self) {
        self.parked.set(true);
        let r = self.blocker().park(None);
        self.parked.set(false);
        if r.is_err() {
            fatal("a coroutine stack was cancelled behind our back");
        }
    }

    #[inline(always)]
    fn check_parked(&self) {
        if !self.parked.get() {
            // may's handler got the fault (ours is installed after it, unless somebody replaced it), or the
            // coroutine left in another way: its frames are gone and so are the locks they held.
            fatal("a coroutine left its stack without yielding (stack overflow?)");
        }
    }
}

/// Body of the `may` coroutine: job after job.
#[expect(unsafe_code, reason = "the job pointer is the caller's promise")]
fn worker_main(w: &Worker) {
    let here = 0_u8;
    w.top.set(std::ptr::from_ref(&here) as usize);
    // SAFETY: nobody else looks at the blocker before the first park.
    unsafe { *w.blocker.get() = Some(FastBlocker::new()) };
    while let Some(job) = w.job.take() {
        // SAFETY: `start`'s caller keeps the job valid until it has ended.
        let job = unsafe { &*job };
        job.run();
        w.park();
    }
    w.ended.set(true);
}

/// Ends the process over a broken invariant of the stacks themselves.
#[cold]
fn fatal(what: &'static str) -> ! {
    tracing::error!(reason = what, "coroutine backend failure");
    eprintln!("conbd: {what}; aborting");
    std::process::abort();
}

// ---- how many there are --------------------------------------------------------------------------------------

/// Stacks that exist: in use, idle or leaked. A counter on its own: nothing is ordered by it.
static STACKS: AtomicUsize = AtomicUsize::new(0);

/// The limit that [`limit_stacks`] has set; 0: that of the kernel.
static STACKS_LIMIT: AtomicUsize = AtomicUsize::new(0);

/// Mappings that are left for all else: buffers, libraries, the stacks of threads (QEMU's number).
const OTHER_MAPS: usize = 5000;

/// Stacks that exist now.
pub(super) fn stacks() -> usize {
    STACKS.load(Ordering::Relaxed)
}

/// Stacks that the process can have: each is two mappings.
pub(super) fn stacks_max() -> usize {
    static KERNEL: OnceLock<usize> = OnceLock::new();
    match STACKS_LIMIT.load(Ordering::Relaxed) {
        0 => *KERNEL.get_or_init(|| {
            let text = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap_or_default();
            // The kernel's default where it does not say.
            text.trim().parse().unwrap_or(65_530).max(2 * OTHER_MAPS).saturating_sub(OTHER_MAPS) / 2
        }),
        limit => limit,
    }
}

/// Sets the limit instead of the kernel's.
pub(super) fn limit_stacks(max: usize) {
    STACKS_LIMIT.store(max, Ordering::Relaxed);
}

// ---- idle stacks ---------------------------------------------------------------------------------------------

/// Idle stacks of threads that have ended; bounded by what those threads were allowed to keep.
static ORPHANS: Mutex<Vec<Stack>> = Mutex::new(Vec::new());

/// Idle stacks of one thread; they outlive it in [`ORPHANS`].
struct Idle(RefCell<Vec<Stack>>);

impl Drop for Idle {
    fn drop(&mut self) {
        ORPHANS.lock().unwrap_or_else(PoisonError::into_inner).append(self.0.get_mut());
    }
}

thread_local! {
    static IDLE: Idle = const { Idle(RefCell::new(Vec::new())) };
}

/// Never inlined: the caller may have moved between threads since its last look at a thread-local.
#[inline(never)]
fn local_pop() -> Option<Stack> {
    let local = IDLE.try_with(|idle| idle.0.borrow_mut().pop()).ok().flatten();
    local.or_else(|| match ORPHANS.try_lock() {
        Ok(mut orphans) => orphans.pop(),
        Err(_) => None,
    })
}

/// Returns the stack when the thread has enough of them.
#[inline(never)]
fn local_push(stack: Stack) -> Option<Stack> {
    let mut stack = Some(stack);
    // A thread whose thread-locals are gone keeps none: then the stack comes back to be ended.
    let _ = IDLE.try_with(|idle| {
        let mut idle = idle.0.borrow_mut();
        if idle.len() < LOCAL_IDLE_MAX.load(Ordering::Relaxed) {
            idle.extend(stack.take());
        }
    });
    stack
}

/// Changes how many idle stacks a thread keeps.
pub(super) fn change_pool_size(change: impl Fn(usize) -> usize) {
    // A counter on its own: nothing is ordered by it.
    let _old = LOCAL_IDLE_MAX.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| Some(change(n)));
}

/// Idle stacks of the calling thread.
#[inline(never)]
pub(super) fn idle_stacks() -> usize {
    IDLE.try_with(|idle| idle.0.borrow().len()).unwrap_or(0)
}

// ---- process-wide set-up -------------------------------------------------------------------------------------

/// Configures `may` and starts its two idle threads, once; later calls do nothing. See [`super::init`].
pub(super) fn init() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let config = may::config();
        config.set_workers(1);
        config.set_worker_pin(false);
        config.set_stack_size(STACK_WORDS);
        config.set_pool_capacity(MAY_POOL);
        let before = overflow::current_handlers();
        // The first coroutine starts may's threads and installs its SIGSEGV handler.
        #[expect(unsafe_code, reason = "may's spawn_local")]
        // SAFETY: an empty body needs neither stack nor thread-locals.
        let spawned = unsafe { may::coroutine::Builder::new().spawn_local(|| {}) };
        drop(spawned.expect("spawn_local has no failing path: the stack is mapped or it panics"));
        overflow::install(before);
        crate::aio::AioContext::forbid_poll_when(crate::co::Coroutine::in_coroutine);
    });
}

/// Turns the guard page's SIGSEGV into a message and an abort.
mod overflow {
    use super::STACK_BYTES;
    use std::mem::MaybeUninit;
    use std::sync::OnceLock;

    /// Slack around the guard page, in bytes: the recorded top is a little below the real one, and the guard is
    /// one page (ours; generous for 4 KiB pages, whatever faults there is no ordinary access).
    const SLACK: usize = 16 * 1024;

    /// What handled the signals before may, so that other faults find it.
    #[derive(Clone, Copy)]
    pub(super) struct Handlers {
        segv: libc::sigaction,
        bus: libc::sigaction,
    }

    static PREVIOUS: OnceLock<Handlers> = OnceLock::new();

    #[expect(unsafe_code, reason = "sigaction")]
    fn query(signal: libc::c_int) -> libc::sigaction {
        let mut old = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: a null new action only queries; `old` is valid for writing one sigaction.
        let _ok = unsafe { libc::sigaction(signal, std::ptr::null(), old.as_mut_ptr()) };
        // SAFETY: zeroed bytes are a valid sigaction, and the call filled it.
        unsafe { old.assume_init() }
    }

    pub(super) fn current_handlers() -> Handlers {
        Handlers { segv: query(libc::SIGSEGV), bus: query(libc::SIGBUS) }
    }

    #[expect(unsafe_code, reason = "sigaction")]
    pub(super) fn install(before: Handlers) {
        if PREVIOUS.set(before).is_err() {
            return;
        }
        for signal in [libc::SIGSEGV, libc::SIGBUS] {
            let mut action = query(signal);
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            action.sa_sigaction = handler as *const () as libc::sighandler_t;
            // SAFETY: `action` is a valid sigaction whose handler is async-signal-safe.
            let _ok = unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
        }
    }

    /// Async-signal-safe: reads two words of memory, writes, aborts; or restores the previous handler.
    #[expect(unsafe_code, reason = "a signal handler")]
    extern "C" fn handler(signal: libc::c_int, info: *mut libc::siginfo_t, _ctx: *mut libc::c_void) {
        // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler.
        let info = unsafe { &*info };
        // SAFETY: SIGSEGV and SIGBUS fill the address.
        let addr = unsafe { info.si_addr() } as usize;
        let top = crate::co::coroutine::running_stack_top();
        let guard_end = top.wrapping_sub(STACK_BYTES).wrapping_add(SLACK);
        let guard_start = guard_end.wrapping_sub(3 * SLACK);
        if top != 0 && (guard_start..guard_end).contains(&addr) {
            let msg = b"conbd: a coroutine has overflowed its 64 KiB stack; aborting\n";
            // SAFETY: write(2) of a static buffer is async-signal-safe.
            let _written = unsafe { libc::write(libc::STDERR_FILENO, msg.as_ptr().cast(), msg.len()) };
            // SAFETY: abort is async-signal-safe.
            unsafe { libc::abort() };
        }
        // Not ours: put back what was there before any coroutine; returning repeats the fault under it.
        if let Some(previous) = PREVIOUS.get() {
            let action = if signal == libc::SIGBUS { &previous.bus } else { &previous.segv };
            // SAFETY: an action that the kernel itself gave us.
            let _ok = unsafe { libc::sigaction(signal, action, std::ptr::null_mut()) };
        }
    }
}
