//! Coroutine: create, enter, yield, wake.
//!
//! ```text
//!            enter                     yield
//!   new ───────────────► entered ◄──────────────► yielded
//!                           │          enter
//!                           └── entry returns or panics ──► ended (its stack is pooled)
//! ```
//!
//! "Entered" is not "on CPU": if A enters B, both are entered while B runs. Control passes at once, nested to any
//! depth, and comes back to the enterer when the coroutine yields or ends.
//!
//! [`Coroutine::wake`] is the way to resume: from any thread, the coroutine runs on its *home* (the context that
//! it was last entered in), after it has yielded, exactly once. A wake by a coroutine of the same context is put
//! on the waker's wake queue, which its enterer runs depth first once the waker yields: wakes never nest, so two
//! coroutines that wake each other for ever use no stack.
//!
//! Rules, checked in every build (a violation panics and says which coroutine, and where):
//! - entered by one at a time, and not while it is scheduled, queued or asleep;
//! - scheduled, queued or put to sleep by one at a time;
//! - `co_yield` needs somebody to yield to; a coroutine does not wake itself, nor yield while it unwinds;
//! - it ends holding no lock.
//!
//! A panic in a coroutine ends that coroutine only: it is caught at its entry, logged, and told to
//! [`CoroutineBuilder::on_exit`], [`Coroutine::outcome`] and [`Coroutine::co_join`].
//!
//! Dropping: whoever is going to wake a suspended coroutine holds a handle to it. When the last handle of a
//! suspended coroutine goes, nobody can ever resume it: that is a bug of the program, it is logged, and the stack
//! is leaked, never unwound (the kernel may still write to buffers on it). A coroutine that was never entered is
//! just dropped.
//!
//! Memory: see `backend`; about 8 KiB resident per suspended coroutine, plus some 300 bytes here.
//!
//! Threads: a handle may be used on any thread. The body runs on its home's thread; it changes threads only in
//! [`co_reschedule_self`], or when somebody enters or schedules it elsewhere. A body that is going to move keeps
//! nothing thread-bound (`Rc`, thread-local borrows) on its stack across the move.

use super::backend::{Job, Stack};
use super::waiter::WaiterSlot;
use crate::aio::{AioContext, Runnable};
use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU32, Ordering};
use tracing::Span;

// Values of `Inner::state`.
const NEW: u8 = 0;
const YIELDED: u8 = 1;
const ENTERED: u8 = 2;
const ENDED: u8 = 3;

// Values of `Inner::scheduled`.
const NOT_SCHEDULED: u8 = 0;
const SCHEDULED: u8 = 1;
const QUEUED: u8 = 2;
const SLEEPING: u8 = 3;

fn scheduled_name(tag: u8) -> &'static str {
    match tag {
        SCHEDULED => "scheduled on a context",
        QUEUED => "queued to be woken",
        SLEEPING => "asleep in co_sleep",
        _ => "not scheduled",
    }
}

// Values of `Inner::outcome`.
const RUNNING: u8 = 0;
const FINISHED: u8 = 1;
const PANICKED: u8 = 2;

/// How a coroutine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Its entry returned.
    Finished,
    /// It panicked; the text of the panic.
    Panicked(String),
}

type Entry = Box<dyn FnOnce() + Send>;
type ExitHook = Box<dyn FnOnce(&Outcome) + Send>;

/// The contexts that a coroutine has been entered in; kept alive with it, so that [`Inner::home`] may be
/// followed by any thread that holds the coroutine.
#[derive(Default)]
struct Homes {
    first: Option<Arc<AioContext>>,
    others: Vec<Arc<AioContext>>,
}

/// The coroutine behind its handles.
///
/// Who touches what: `state`, `scheduled`, `outcome`, `home`, `joiner` are atomics for any thread. The `UnsafeCell`s
/// (and `next`, `wakeup`, `locks_held`, which are atomics only to be cheaply shared) belong to whoever moved
/// `state` to `ENTERED`: the enterer and, while it waits, the body; `next` belongs to the list that the coroutine
/// is on, which `scheduled == QUEUED` makes exclusive.
pub(super) struct Inner {
    state: AtomicU8,
    scheduled: AtomicU8,
    outcome: AtomicU8,
    /// Locks that the body holds; only the body writes.
    locks_held: AtomicU32,
    /// Set by the body before it queues itself somewhere, cleared by whoever takes it out: see `co_wait_granted`.
    waiting: AtomicBool,
    /// Context of the last enter; one of `homes`, or null.
    home: AtomicPtr<AioContext>,
    /// Link of the wake queue that it is on.
    next: AtomicPtr<Inner>,
    /// Coroutines to enter when this one yields or ends.
    wakeup: WakeList,
    /// Waits in `co_join`.
    joiner: WaiterSlot,
    homes: UnsafeCell<Homes>,
    stack: UnsafeCell<Option<Stack>>,
    entry: UnsafeCell<Option<Entry>>,
    on_exit: UnsafeCell<Option<ExitHook>>,
    /// Text of the panic; written before `outcome` becomes `PANICKED`, read-only after.
    panic_text: UnsafeCell<String>,
    span: Span,
    name: &'static str,
}

#[expect(unsafe_code, reason = "the cells follow the protocol that the type's comment states")]
// SAFETY: everything inside is `Send` (the entry and hook by their bounds, `Stack` by its own reasoning).
unsafe impl Send for Inner {}
#[expect(unsafe_code, reason = "the cells follow the protocol that the type's comment states")]
// SAFETY: the cells are reached only by the holder of the ENTERED state (taken by compare-exchange, given back
// with Release), or read after a Release store that freezes them.
unsafe impl Sync for Inner {}

/// A handle to a coroutine; clones name the same one.
#[derive(Clone)]
pub struct Coroutine {
    inner: Arc<Inner>,
}

/// Makes a coroutine with more than an entry.
#[must_use]
pub struct CoroutineBuilder {
    span: Span,
    name: &'static str,
    on_exit: Option<ExitHook>,
}

impl CoroutineBuilder {
    /// The span that the coroutine owns: every enter wraps it, so events of the body carry it across yields.
    pub fn span(mut self, span: Span) -> Self {
        self.span = span;
        self
    }

    /// Name for messages.
    pub fn name(mut self, name: &'static str) -> Self {
        self.name = name;
        self
    }

    /// Called at the end, still inside the coroutine, whether it returned or panicked.
    pub fn on_exit(mut self, f: impl FnOnce(&Outcome) + Send + 'static) -> Self {
        self.on_exit = Some(Box::new(f));
        self
    }

    /// Makes the coroutine; nothing runs yet.
    pub fn build(self, entry: impl FnOnce() + Send + 'static) -> Coroutine {
        Coroutine {
            inner: Arc::new(Inner {
                state: AtomicU8::new(NEW),
                scheduled: AtomicU8::new(NOT_SCHEDULED),
                outcome: AtomicU8::new(RUNNING),
                locks_held: AtomicU32::new(0),
                waiting: AtomicBool::new(false),
                home: AtomicPtr::new(ptr::null_mut()),
                next: AtomicPtr::new(ptr::null_mut()),
                wakeup: WakeList::new(),
                joiner: WaiterSlot::new(),
                homes: UnsafeCell::new(Homes::default()),
                stack: UnsafeCell::new(None),
                entry: UnsafeCell::new(Some(Box::new(entry))),
                on_exit: UnsafeCell::new(self.on_exit),
                panic_text: UnsafeCell::new(String::new()),
                span: self.span,
                name: self.name,
            }),
        }
    }
}

impl Coroutine {
    /// Makes a coroutine that will run `entry`; nothing runs yet (`qemu_coroutine_create`).
    pub fn new(entry: impl FnOnce() + Send + 'static) -> Coroutine {
        Coroutine::builder().build(entry)
    }

    /// Makes a coroutine with a span, a name or an exit hook.
    pub fn builder() -> CoroutineBuilder {
        CoroutineBuilder { span: Span::none(), name: "unnamed", on_exit: None }
    }

    /// Enters the coroutine on the calling thread, at once; returns when it yields or ends
    /// (`qemu_coroutine_enter`). The calling thread's context, if any, becomes its home.
    ///
    /// # Panics
    /// When it is entered already, scheduled, queued or asleep, or has ended; when it ends holding a lock; when
    /// there is no memory for its stack (it is as new then, and can be entered later).
    #[track_caller]
    pub fn enter(&self) {
        // A thread has one live context: if our home lives here, it is that one.
        if let Some(home) = self.inner.home()
            && home.is_home()
        {
            return enter_loop(&self.inner, home);
        }
        let ctx = AioContext::current();
        enter_loop(&self.inner, ctx.as_ref().map_or(ptr::null(), Arc::as_ptr));
    }

    /// [`Coroutine::enter`] with an explicit context, which must be at home on the calling thread
    /// (`qemu_aio_coroutine_enter`).
    ///
    /// # Panics
    /// As [`Coroutine::enter`], and when `ctx` lives on another thread.
    #[track_caller]
    pub fn enter_in(&self, ctx: &Arc<AioContext>) {
        assert!(ctx.is_home(), "{self:?}: enter_in with a context of another thread");
        enter_loop(&self.inner, Arc::as_ptr(ctx));
    }

    /// Enters unless it is entered already (`qemu_coroutine_enter_if_inactive`). Its home thread only.
    ///
    /// # Panics
    /// As [`Coroutine::enter`].
    #[track_caller]
    pub fn enter_if_inactive(&self) {
        if !self.entered() {
            self.enter();
        }
    }

    /// The running coroutine, None in plain code (`qemu_coroutine_self`).
    #[inline(never)]
    #[must_use]
    pub fn current() -> Option<Coroutine> {
        running().map(Running::handle)
    }

    /// Tells whether the caller runs in a coroutine (`qemu_in_coroutine`).
    #[must_use]
    pub fn in_coroutine() -> bool {
        !current_ptr().is_null()
    }

    /// Tells whether it is entered: running, or waiting for a coroutine that it entered (`qemu_coroutine_entered`).
    #[must_use]
    pub fn entered(&self) -> bool {
        self.inner.state.load(Ordering::Acquire) == ENTERED
    }

    /// The context that it was last entered in (`qemu_coroutine_get_aio_context`); None before, or when that
    /// thread had none.
    #[must_use]
    pub fn context(&self) -> Option<Arc<AioContext>> {
        self.inner.home_arc()
    }

    /// How it ended; None while it has not.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        self.inner.outcome()
    }

    /// Waits until it has ended. Yields. Coroutine only, and one joiner at a time.
    ///
    /// # Panics
    /// Outside of coroutines, when called by itself, or when another coroutine waits for it already.
    #[track_caller]
    pub fn co_join(&self) -> Outcome {
        let me = Coroutine::current().expect("co_join needs a coroutine");
        assert!(me != *self, "{self:?}: a coroutine cannot join itself");
        loop {
            if let Some(outcome) = self.outcome() {
                return outcome;
            }
            if self.inner.joiner.put(me.clone()).is_err() {
                panic!("{self:?}: another coroutine waits in co_join already");
            }
            // The end may have come before our put; then nobody takes us out, unless it is doing so right now.
            if self.outcome().is_some() && self.inner.joiner.take().is_some() {
                continue;
            }
            co_yield();
            // Still there after a stray wake; gone otherwise.
            drop(self.inner.joiner.take());
        }
    }

    /// Schedules it to be entered on `ctx` in a later turn (`aio_co_schedule`). Any thread. It must not run
    /// before it has yielded: if it still runs, `ctx` must be its own home.
    ///
    /// # Panics
    /// When it is scheduled, queued or asleep already.
    #[track_caller]
    pub fn schedule(&self, ctx: &Arc<AioContext>) {
        self.inner.claim(SCHEDULED);
        ctx.schedule(Arc::clone(&self.inner) as Arc<dyn Runnable>);
    }

    /// Enters it on `ctx` (`aio_co_enter`): by scheduling if `ctx` lives on another thread, when the running
    /// coroutine yields if there is one, at once otherwise. Any thread.
    ///
    /// # Panics
    /// When it is scheduled, queued or asleep already, or by itself.
    #[track_caller]
    pub fn enter_on(&self, ctx: &Arc<AioContext>) {
        if ctx.is_home() { self.enter_here(Arc::as_ptr(ctx)) } else { self.schedule(ctx) }
    }

    /// Resumes it on its home context (`aio_co_wake`): [`Coroutine::enter_on`] with [`Coroutine::context`]. Any
    /// thread. *The* way to resume: it runs after it has yielded, exactly once.
    ///
    /// # Panics
    /// As [`Coroutine::enter_on`]; and when it has no home, because it was never entered in a thread that has a
    /// context.
    #[track_caller]
    pub fn wake(&self) {
        let Some(home) = self.inner.home() else {
            panic!("{self:?}: woken, but it was never entered in an AioContext");
        };
        if home.is_home() {
            self.enter_here(ptr::from_ref(home));
        } else {
            let home = self.inner.home_arc().expect("a home was there a moment ago, and homes are kept");
            self.schedule(&home);
        }
    }

    /// Resumes it on its home context in a later turn, never inside this call: for wakers that hold locks. Any thread.
    ///
    /// # Panics
    /// As [`Coroutine::wake`].
    #[track_caller]
    pub fn wake_later(&self) {
        let Some(home) = self.inner.home_arc() else {
            panic!("{self:?}: woken, but it was never entered in an AioContext");
        };
        self.schedule(&home);
    }

    /// Second half of `enter_on`, for a context of this thread.
    #[track_caller]
    fn enter_here(&self, ctx: *const AioContext) {
        match running() {
            Some(me) => {
                assert!(
                    !ptr::eq(me.ptr(), Arc::as_ptr(&self.inner)),
                    "{self:?}: a coroutine cannot wake itself"
                );
                self.inner.claim(QUEUED);
                me.wakeup.push(Arc::clone(&self.inner));
            }
            None => enter_loop(&self.inner, ctx),
        }
    }

    pub(super) fn into_inner(self) -> Arc<Inner> {
        self.inner
    }

    pub(super) fn from_inner(inner: Arc<Inner>) -> Coroutine {
        Coroutine { inner }
    }

    /// The home's address, as a number to compare; 0 for none.
    pub(super) fn home_id(&self) -> usize {
        self.inner.home.load(Ordering::Relaxed) as usize
    }

    /// Ends the wait that the coroutine began with `Running::begin_wait`; the caller wakes it next.
    pub(super) fn grant(&self) {
        // Pairs with the Acquire in `co_wait_granted`.
        self.inner.waiting.store(false, Ordering::Release);
    }

    /// Marks it asleep, so that only `end_sleep` can lead to a run.
    #[track_caller]
    pub(super) fn begin_sleep(&self) {
        self.inner.claim(SLEEPING);
    }

    /// Ends what `begin_sleep` began; the caller wakes it next.
    pub(super) fn end_sleep(&self) {
        let r = self.inner.scheduled.compare_exchange(
            SLEEPING,
            NOT_SCHEDULED,
            Ordering::AcqRel,
            Ordering::Relaxed,
        );
        assert!(r.is_ok(), "{self:?}: woken from a sleep that it was not in");
    }
}

impl PartialEq for Coroutine {
    fn eq(&self, other: &Coroutine) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }
}

impl Eq for Coroutine {}

impl fmt::Debug for Coroutine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.inner, f)
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match self.state.load(Ordering::Relaxed) {
            NEW => "new",
            YIELDED => "yielded",
            ENTERED => "entered",
            _ => "ended",
        };
        let scheduled = scheduled_name(self.scheduled.load(Ordering::Relaxed));
        write!(f, "coroutine {:p} \"{}\" ({state}, {scheduled})", ptr::from_ref(self), self.name)
    }
}

// ---- the running coroutine -----------------------------------------------------------------------------------

thread_local! {
    /// The coroutine that this thread runs, null in plain code. Valid because its enterer holds a reference.
    static CURRENT: Cell<*const Inner> = const { Cell::new(ptr::null()) };
}

/// Never inlined: the address of a thread-local must not be kept across a yield, after which the body may run on
/// another thread.
#[inline(never)]
fn current_ptr() -> *const Inner {
    CURRENT.get()
}

#[inline(never)]
fn swap_current(new: *const Inner) -> *const Inner {
    CURRENT.replace(new)
}

/// An address near the top of the running coroutine's stack, 0 in plain code. Async-signal-safe.
#[expect(unsafe_code, reason = "follows the thread's current pointer")]
pub(super) fn running_stack_top() -> usize {
    let p = current_ptr();
    if p.is_null() {
        return 0;
    }
    // SAFETY: non-null means that an enterer below us on this thread holds a reference.
    let inner = unsafe { &*p };
    // SAFETY: the stack is set before CURRENT and taken only after it was reset.
    unsafe { (*inner.stack.get()).as_ref() }.map_or(0, Stack::top)
}

/// The coroutine that the caller runs in; not to be kept after the body ends.
#[derive(Clone, Copy)]
pub(super) struct Running(ptr::NonNull<Inner>);

/// The running coroutine without touching its reference count, None in plain code.
pub(super) fn running() -> Option<Running> {
    ptr::NonNull::new(current_ptr().cast_mut()).map(Running)
}

impl std::ops::Deref for Running {
    type Target = Inner;
    #[expect(unsafe_code, reason = "follows the thread's current pointer")]
    fn deref(&self) -> &Inner {
        // SAFETY: it was current when `running` looked, so the caller is its body (or code called by it), whose
        // enterer holds a reference until the body yields; resuming it takes a reference again. `Running` is
        // neither Send nor stored beyond the body.
        unsafe { self.0.as_ref() }
    }
}

impl Running {
    fn ptr(self) -> *const Inner {
        self.0.as_ptr()
    }

    /// A number that names the coroutine while it lives; never 0.
    pub(super) fn id(self) -> usize {
        self.0.as_ptr() as usize
    }

    /// The home's address, as a number to compare; 0 for none.
    pub(super) fn home_id(self) -> usize {
        self.home.load(Ordering::Relaxed) as usize
    }

    /// A counted handle.
    #[expect(unsafe_code, reason = "makes an Arc from the current pointer")]
    pub(super) fn handle(self) -> Coroutine {
        let p = self.0.as_ptr().cast_const();
        // SAFETY: from `Arc::as_ptr`, and its enterer's reference keeps the count above zero.
        unsafe { Arc::increment_strong_count(p) };
        // SAFETY: the count that we have just added is now ours.
        Coroutine { inner: unsafe { Arc::from_raw(p) } }
    }

    /// Checks that whoever wakes the body will know where.
    #[track_caller]
    pub(super) fn check_wakeable(self) {
        assert!(self.home_id() != 0, "{:?}: has to wait, but runs in a thread without an AioContext", *self);
    }

    /// Announces that the body is about to queue itself; returns the handle to put into the queue.
    #[track_caller]
    pub(super) fn begin_wait(self) -> Coroutine {
        self.check_wakeable();
        self.waiting.store(true, Ordering::Relaxed);
        self.handle()
    }

    /// Yields until somebody has taken the body out of its queue with [`Coroutine::grant`]. A stray wake does not
    /// end the wait.
    ///
    /// Yields at least once: a grant brings exactly one wake, which may be under way already, and which no later yield
    /// must get instead.
    #[track_caller]
    pub(super) fn co_wait_granted(self) {
        loop {
            co_yield();
            if !self.waiting.load(Ordering::Acquire) {
                return;
            }
        }
    }

    /// Counts a lock that the body took.
    pub(super) fn lock_taken(self) {
        self.locks_held.store(self.locks_held.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// Counts a lock that the body gave back.
    pub(super) fn lock_released(self) {
        let n = self.locks_held.load(Ordering::Relaxed);
        assert!(n > 0, "{:?}: released more locks than it took", *self);
        self.locks_held.store(n - 1, Ordering::Relaxed);
    }
}

// ---- enter and yield -----------------------------------------------------------------------------------------

/// Enters `first`, and then everything that gets queued on the way, depth first, until nothing is left.
///
/// Inlined, with all below it: each call frame around a switch is a return that the CPU predicts wrongly.
#[inline]
#[track_caller]
fn enter_loop(first: &Arc<Inner>, ctx: *const AioContext) {
    let pending = WakeList::new();
    first.step(ctx, &pending);
    while let Some(to) = pending.pop() {
        to.scheduled.store(NOT_SCHEDULED, Ordering::Release);
        to.step(ctx, &pending);
    }
}

impl Inner {
    /// Runs the coroutine until it yields or ends; puts what it queued in front of `pending`.
    ///
    /// `ctx` is null, or a context that the caller keeps alive.
    #[inline]
    #[track_caller]
    #[expect(unsafe_code, reason = "the ENTERED state gives access to the cells")]
    fn step(&self, ctx: *const AioContext, pending: &WakeList) {
        let tag = self.scheduled.load(Ordering::Acquire);
        if tag != NOT_SCHEDULED {
            panic!("{self:?}: entered although it is {}", scheduled_name(tag));
        }
        let state = self.state.load(Ordering::Relaxed);
        // Acquire pairs with the Release stores below: the last run's effects are seen, also if it ran elsewhere.
        let got = state < ENTERED
            && self.state.compare_exchange(state, ENTERED, Ordering::Acquire, Ordering::Relaxed).is_ok();
        assert!(got, "{self:?}: cannot be entered: {}", self.why_not());

        if self.home.load(Ordering::Relaxed).cast_const() != ctx {
            self.set_home(ctx);
        }
        if state == NEW {
            // SAFETY: we hold ENTERED; the body has not begun.
            unsafe { *self.stack.get() = Some(Stack::take()) };
        }
        // SAFETY: we hold ENTERED; the stack is set from the first enter to the end.
        let stack = unsafe { (*self.stack.get()).as_ref() }.expect("an entered coroutine has a stack");

        let enterer = swap_current(self);
        {
            let _span = (!self.span.is_disabled()).then(|| self.span.enter());
            if state == NEW {
                let job: *const (dyn Job + 'static) = ptr::from_ref::<Inner>(self);
                let started = catch_unwind(AssertUnwindSafe(|| {
                    // SAFETY: the caller's reference keeps `self` alive while the body runs; each later enter
                    // brings its own; a coroutine whose last reference goes while suspended is never resumed.
                    unsafe { stack.start(job) }
                }));
                if let Err(payload) = started {
                    // No memory for a stack. The body's own panics do not come here: it has not begun.
                    swap_current(enterer);
                    // SAFETY: we hold ENTERED.
                    unsafe { *self.stack.get() = None };
                    self.state.store(NEW, Ordering::Release);
                    resume_unwind(payload);
                }
            } else {
                stack.resume();
            }
        }
        // Still the same thread: an enterer that waits here cannot move.
        swap_current(enterer);

        pending.prepend(&self.wakeup);
        if self.outcome.load(Ordering::Relaxed) == RUNNING {
            self.state.store(YIELDED, Ordering::Release);
        } else {
            // SAFETY: we hold ENTERED; the body has ended.
            let stack = unsafe { (*self.stack.get()).take() };
            stack.expect("an ended coroutine has a stack").recycle();
            let locks = self.locks_held.load(Ordering::Relaxed);
            self.state.store(ENDED, Ordering::Release);
            assert!(locks == 0, "{self:?}: ended holding {locks} lock(s)");
        }
    }

    #[cold]
    fn why_not(&self) -> &'static str {
        match self.state.load(Ordering::Relaxed) {
            ENTERED => "it is entered already",
            ENDED => "it has ended",
            _ => "another thread has just entered it",
        }
    }

    #[cold]
    #[expect(unsafe_code, reason = "the ENTERED state gives access to the cells")]
    fn set_home(&self, ctx: *const AioContext) {
        if ctx.is_null() {
            self.home.store(ptr::null_mut(), Ordering::Release);
            return;
        }
        // SAFETY: we hold ENTERED, which alone gives access to `homes`.
        let homes = unsafe { &mut *self.homes.get() };
        if !homes.first.iter().chain(&homes.others).any(|h| ptr::eq(Arc::as_ptr(h), ctx)) {
            // SAFETY: a context is always behind an Arc, and the caller keeps this one alive.
            unsafe { Arc::increment_strong_count(ctx) };
            // SAFETY: the count that we have just added is now ours.
            let arc = unsafe { Arc::from_raw(ctx) };
            if homes.first.is_none() {
                homes.first = Some(arc);
            } else {
                homes.others.push(arc);
            }
        }
        // Pairs with the Acquire load in `home`.
        self.home.store(ctx.cast_mut(), Ordering::Release);
    }

    #[expect(unsafe_code, reason = "homes are kept alive")]
    fn home(&self) -> Option<&AioContext> {
        let p = self.home.load(Ordering::Acquire);
        // SAFETY: non-null means one of `homes`, which are dropped only with `self`.
        unsafe { p.as_ref() }
    }

    #[expect(unsafe_code, reason = "makes an Arc from a kept context")]
    fn home_arc(&self) -> Option<Arc<AioContext>> {
        let p: *const AioContext = self.home()?;
        // SAFETY: contexts are behind Arcs, and `homes` holds a count of this one.
        unsafe { Arc::increment_strong_count(p) };
        // SAFETY: the count that we have just added is now ours.
        Some(unsafe { Arc::from_raw(p) })
    }

    /// Marks it scheduled, queued or asleep.
    #[track_caller]
    fn claim(&self, tag: u8) {
        let r = self.scheduled.compare_exchange(NOT_SCHEDULED, tag, Ordering::AcqRel, Ordering::Relaxed);
        if let Err(old) = r {
            panic!("{self:?}: to be {}, but already {}", scheduled_name(tag), scheduled_name(old));
        }
    }

    #[expect(unsafe_code, reason = "the text is frozen by the outcome")]
    fn outcome(&self) -> Option<Outcome> {
        match self.outcome.load(Ordering::Acquire) {
            RUNNING => None,
            FINISHED => Some(Outcome::Finished),
            // SAFETY: written before the Release store of PANICKED, never after.
            _ => Some(Outcome::Panicked(unsafe { &*self.panic_text.get() }.clone())),
        }
    }
}

impl Job for Inner {
    #[expect(unsafe_code, reason = "the body owns the cells while it runs")]
    fn run(&self) {
        // SAFETY: the body runs, so the ENTERED state is held for it; nobody else looks at these cells.
        let entry = unsafe { (*self.entry.get()).take() }.expect("a coroutine begins once");
        let outcome = match catch_unwind(AssertUnwindSafe(entry)) {
            Ok(()) => Outcome::Finished,
            Err(payload) => {
                let text = panic_text(&*payload);
                tracing::error!(coroutine = self.name, panic = text, "coroutine panicked");
                let outcome = Outcome::Panicked(String::from(text));
                // A payload whose drop panics must not take the stack along.
                if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
                    std::mem::forget(again);
                }
                outcome
            }
        };
        // SAFETY: as above.
        if let Some(hook) = unsafe { (*self.on_exit.get()).take() }
            && let Err(payload) = catch_unwind(AssertUnwindSafe(|| hook(&outcome)))
        {
            tracing::error!(coroutine = self.name, panic = panic_text(&*payload), "exit hook panicked");
        }
        let value = match outcome {
            Outcome::Finished => FINISHED,
            Outcome::Panicked(text) => {
                // SAFETY: nobody reads the text before the outcome says PANICKED.
                unsafe { *self.panic_text.get() = text };
                PANICKED
            }
        };
        // Pairs with the Acquire in `outcome`. No yield from here on: the enterer takes this for the end.
        self.outcome.store(value, Ordering::Release);
        if let Some(joiner) = self.joiner.take() {
            joiner.wake();
        }
    }
}

fn panic_text(payload: &(dyn Any + Send)) -> &str {
    if let Some(s) = payload.downcast_ref::<&'static str>() {
        s
    } else if let Some(s) = payload.downcast_ref::<String>() {
        s
    } else {
        "(not a text)"
    }
}

impl Runnable for Inner {
    fn run(self: Arc<Self>, ctx: &Arc<AioContext>) {
        self.scheduled.store(NOT_SCHEDULED, Ordering::Release);
        enter_loop(&self, Arc::as_ptr(ctx));
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if *self.state.get_mut() == YIELDED {
            tracing::error!(
                coroutine = self.name,
                "suspended coroutine lost: nobody is left to wake it; its stack is leaked"
            );
        }
        if let Some(stack) = self.stack.get_mut().take() {
            stack.leak();
        }
    }
}

/// Gives control back to whoever entered the current coroutine (`qemu_coroutine_yield`); returns when it is
/// entered again, maybe on another thread. Whoever waits for a condition re-checks it: a yield may return early.
///
/// # Panics
/// Outside of coroutines, and while unwinding from a panic (a `Drop` must not yield).
#[inline]
#[track_caller]
#[expect(unsafe_code, reason = "the body owns the cells while it runs")]
pub fn co_yield() {
    let Some(me) = running() else {
        panic!("co_yield outside of a coroutine: there is nobody to yield to");
    };
    assert!(!std::thread::panicking(), "{:?}: must not yield while it unwinds", *me);
    // SAFETY: the body runs, so the stack is set, and stays until the body has ended.
    let stack = unsafe { (*me.stack.get()).as_ref() }.expect("an entered coroutine has a stack");
    stack.park();
}

/// Moves the current coroutine to `ctx` (`aio_co_reschedule_self`): returns on that context's thread. Yields,
/// unless it is there already.
///
/// # Panics
/// Outside of coroutines, and without a context to leave.
#[track_caller]
pub fn co_reschedule_self(ctx: &Arc<AioContext>) {
    let me = Coroutine::current().expect("co_reschedule_self needs a coroutine");
    let old = me.context().expect("co_reschedule_self needs a context to leave");
    if Arc::ptr_eq(&old, ctx) {
        return;
    }
    // Scheduling directly would let the other thread enter us before we have yielded: a bottom half of the
    // context that we leave runs after our yield.
    let (co, target) = (me.clone(), Arc::clone(ctx));
    old.bh_schedule_oneshot(move || co.schedule(&target));
    drop(old);
    while me.home_id() != Arc::as_ptr(ctx) as usize {
        co_yield();
    }
}

// ---- wake queue ----------------------------------------------------------------------------------------------

/// Intrusive FIFO of coroutines to enter, linked through `Inner::next`; each element is a counted reference.
///
/// One thread at a time: it belongs to the running body, then to its enterer (atomics only make it shareable).
struct WakeList {
    head: AtomicPtr<Inner>,
    tail: AtomicPtr<Inner>,
}

impl WakeList {
    const fn new() -> WakeList {
        WakeList { head: AtomicPtr::new(ptr::null_mut()), tail: AtomicPtr::new(ptr::null_mut()) }
    }

    /// Appends; the caller has claimed the coroutine as QUEUED, so it is on no other list.
    #[expect(unsafe_code, reason = "intrusive list")]
    fn push(&self, inner: Arc<Inner>) {
        inner.next.store(ptr::null_mut(), Ordering::Relaxed);
        let raw = Arc::into_raw(inner).cast_mut();
        let tail = self.tail.load(Ordering::Relaxed);
        // SAFETY: a non-null tail is an element, whose count the list holds.
        match unsafe { tail.as_ref() } {
            Some(tail) => tail.next.store(raw, Ordering::Relaxed),
            None => self.head.store(raw, Ordering::Relaxed),
        }
        self.tail.store(raw, Ordering::Relaxed);
    }

    #[expect(unsafe_code, reason = "intrusive list")]
    fn pop(&self) -> Option<Arc<Inner>> {
        let head = self.head.load(Ordering::Relaxed);
        if head.is_null() {
            return None;
        }
        // SAFETY: an element's count came from `Arc::into_raw` in `push`; it leaves the list here.
        let inner = unsafe { Arc::from_raw(head) };
        let next = inner.next.load(Ordering::Relaxed);
        self.head.store(next, Ordering::Relaxed);
        if next.is_null() {
            self.tail.store(ptr::null_mut(), Ordering::Relaxed);
        }
        Some(inner)
    }

    /// Moves all of `other` in front.
    #[expect(unsafe_code, reason = "intrusive list")]
    fn prepend(&self, other: &WakeList) {
        let head = other.head.load(Ordering::Relaxed);
        if head.is_null() {
            return;
        }
        other.head.store(ptr::null_mut(), Ordering::Relaxed);
        let tail = other.tail.swap(ptr::null_mut(), Ordering::Relaxed);
        // SAFETY: the tail of a list that is not empty is an element, whose count the list holds.
        let tail_ref = unsafe { &*tail };
        tail_ref.next.store(self.head.load(Ordering::Relaxed), Ordering::Relaxed);
        self.head.store(head, Ordering::Relaxed);
        if self.tail.load(Ordering::Relaxed).is_null() {
            self.tail.store(tail, Ordering::Relaxed);
        }
    }
}

impl Drop for WakeList {
    /// Not empty only when a misuse panic unwinds through an enterer: what it owed to others is scheduled.
    fn drop(&mut self) {
        while let Some(inner) = self.pop() {
            inner.scheduled.store(SCHEDULED, Ordering::Release);
            if let Some(home) = inner.home_arc() {
                home.schedule(inner);
            }
        }
    }
}
