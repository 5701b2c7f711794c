//! Coroutine: create, enter, yield, wake.

use crate::aio::AioContext;
use std::sync::Arc;

/// A handle to a coroutine; clones name the same one.
#[derive(Clone)]
pub struct Coroutine {
    _private: Arc<()>,
}

impl Coroutine {
    /// Makes a coroutine that will run `entry`; nothing runs yet.
    pub fn new(_entry: impl FnOnce() + Send + 'static) -> Coroutine {
        todo!()
    }

    /// Enters the coroutine on the calling thread, at once; returns when it yields or ends.
    ///
    /// # Panics
    /// When it is entered already, scheduled, or has ended.
    pub fn enter(&self) {
        todo!()
    }

    /// [`Coroutine::enter`] with an explicit context, which must be at home on the calling thread.
    pub fn enter_in(&self, _ctx: &Arc<AioContext>) {
        todo!()
    }

    /// Enters unless it is entered already.
    pub fn enter_if_inactive(&self) {
        todo!()
    }

    /// The running coroutine.
    #[inline(never)]
    #[must_use]
    pub fn current() -> Option<Coroutine> {
        todo!()
    }

    /// Tells whether the caller runs in a coroutine.
    #[must_use]
    pub fn in_coroutine() -> bool {
        todo!()
    }

    /// Tells whether it is entered (running, or waiting for a coroutine that it entered).
    #[must_use]
    pub fn entered(&self) -> bool {
        todo!()
    }

    /// The context that it was last entered in.
    #[must_use]
    pub fn context(&self) -> Option<Arc<AioContext>> {
        todo!()
    }

    /// Schedules it to be entered on `ctx` (`aio_co_schedule`). Any thread.
    ///
    /// # Panics
    /// When it is scheduled already.
    pub fn schedule(&self, _ctx: &Arc<AioContext>) {
        todo!()
    }

    /// Enters it on `ctx`: at once, after the current coroutine yields, or by scheduling (`aio_co_enter`). Any thread.
    pub fn enter_on(&self, _ctx: &Arc<AioContext>) {
        todo!()
    }

    /// Resumes it on its home context (`aio_co_wake`). Any thread. The way to resume.
    pub fn wake(&self) {
        todo!()
    }
}

/// Gives control back to whoever entered the current coroutine.
///
/// # Panics
/// Outside of coroutines.
pub fn co_yield() {
    todo!()
}

/// Moves the current coroutine to `ctx`.
pub fn co_reschedule_self(_ctx: &Arc<AioContext>) {
    todo!()
}
