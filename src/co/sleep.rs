//! Sleeping on the context's timers.
//!
//! A sleeping coroutine is marked asleep, so that any other way of entering it panics: it can only be woken
//! through its [`CoSleep`]. The timer and a waker may both do that; the first one wins.

use super::coroutine::{Coroutine, Outcome, co_yield};
use super::waiter::WaiterSlot;
use crate::aio::AioContext;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Sleeps `ns` nanoseconds on the current context's clock. Coroutine only. Yields.
///
/// # Panics
/// Outside of coroutines, and in a thread without a context.
#[track_caller]
pub fn co_sleep_ns(ns: u64) {
    CoSleep::new().co_sleep(Some(ns));
}

/// A wakeable sleep (`QemuCoSleep`); clones name the same one.
#[derive(Clone, Default)]
pub struct CoSleep {
    sleeper: Arc<WaiterSlot>,
}

impl CoSleep {
    /// Makes one that nobody sleeps on.
    #[must_use]
    pub fn new() -> CoSleep {
        CoSleep::default()
    }

    /// Sleeps until [`CoSleep::wake`] or for `ns` nanoseconds of the context's clock (None: until woken).
    /// Coroutine only. Yields. (`qemu_co_sleep`, `qemu_co_sleep_ns_wakeable`)
    ///
    /// # Panics
    /// Outside of coroutines; when somebody sleeps on it already; with a time in a thread without a context.
    #[track_caller]
    pub fn co_sleep(&self, ns: Option<u64>) {
        self.co_sleep_unless(ns, || false);
    }

    /// [`CoSleep::co_sleep`] that comes back at once if `done` says so after the sleep was announced: a waker
    /// on another thread that sets what `done` reads, and then wakes, is never missed.
    #[track_caller]
    fn co_sleep_unless(&self, ns: Option<u64>, done: impl FnOnce() -> bool) {
        let me = Coroutine::current().expect("co_sleep needs a coroutine");
        // The timer exists before the sleep begins: nothing may panic between here and the yield.
        let timer = ns.map(|ns| {
            let ctx = AioContext::current().expect("co_sleep with a time needs an AioContext");
            let waker = self.clone();
            let timer = ctx.timer_new(move || waker.wake());
            (timer, ctx.now_ns().saturating_add(ns))
        });
        me.begin_sleep();
        if let Err(me) = self.sleeper.put(me) {
            me.end_sleep();
            panic!("{me:?}: somebody sleeps on this CoSleep already");
        }
        if let Some((timer, deadline_ns)) = &timer {
            timer.mod_ns(*deadline_ns);
        }
        if done()
            && let Some(me) = self.sleeper.take()
        {
            me.end_sleep();
            return;
        }
        // Nobody but `wake` can enter us: no loop is needed.
        co_yield();
    }

    /// Wakes the sleeper, if any (`qemu_co_sleep_wake`); idempotent. Any thread.
    pub fn wake(&self) {
        if let Some(co) = self.sleeper.take() {
            co.end_sleep();
            co.wake();
        }
    }

    /// Tells whether somebody sleeps.
    #[must_use]
    pub fn is_sleeping(&self) -> bool {
        self.sleeper.is_taken()
    }
}

impl fmt::Debug for CoSleep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CoSleep").field("sleeping", &self.is_sleeping()).finish()
    }
}

/// What the two sides of [`co_timeout`] share.
struct Timed<T, C> {
    /// How the entry ended: its result, or the text of its panic.
    result: Option<Result<T, String>>,
    /// Set by a caller that gave up: the entry's end hands its result to it.
    clean: Option<C>,
}

impl<T, C> Timed<T, C> {
    fn lock(this: &Mutex<Timed<T, C>>) -> MutexGuard<'_, Timed<T, C>> {
        this.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs `entry` in a new coroutine and waits for it for at most `ns` nanoseconds (`qemu_co_timeout`). After a
/// timeout `entry` goes on, and `clean` gets its result when it ends. Coroutine only. Yields.
///
/// # Errors
/// `TimedOut`; `Other` when `entry` panicked.
///
/// # Panics
/// Outside of coroutines, and in a thread without a context.
#[track_caller]
pub fn co_timeout<T, C>(ns: u64, entry: impl FnOnce() -> T + Send + 'static, clean: C) -> io::Result<T>
where
    T: Send + 'static,
    C: FnOnce(T) + Send + 'static,
{
    let shared = Arc::new(Mutex::new(Timed::<T, C> { result: None, clean: None }));
    let sleep = CoSleep::new();
    let (at_end, at_exit, waker) = (Arc::clone(&shared), Arc::clone(&shared), sleep.clone());
    let entry = move || {
        let result = entry();
        let mut timed = Timed::lock(&at_end);
        match timed.clean.take() {
            Some(clean) => {
                drop(timed);
                clean(result);
            }
            None => timed.result = Some(Ok(result)),
        }
    };
    let on_exit = move |outcome: &Outcome| {
        if let Outcome::Panicked(text) = outcome {
            Timed::lock(&at_exit).result = Some(Err(text.clone()));
        }
        waker.wake();
    };
    Coroutine::builder().name("co_timeout").on_exit(on_exit).build(entry).enter();
    sleep.co_sleep_unless(Some(ns), || Timed::lock(&shared).result.is_some());
    let mut timed = Timed::lock(&shared);
    match timed.result.take() {
        Some(Ok(result)) => Ok(result),
        Some(Err(text)) => Err(io::Error::other(format!("coroutine panicked: {text}"))),
        None => {
            timed.clean = Some(clean);
            Err(io::ErrorKind::TimedOut.into())
        }
    }
}
