//! The event loop: AioContext, bottom halves, fd handlers, timers, asynchronous file I/O.
//!
//! Knows no coroutine, no NBD, no image. One [`AioContext`] has one *home thread*; only that thread
//! polls it, runs its callbacks and touches its handlers and timers. Any thread may schedule a bottom
//! half or a [`Runnable`] on it.

mod context;
pub mod engine;
mod iothread;

pub use context::{
    AioConfig, AioContext, BottomHalf, Clock, ContextCounters, HandlerId, Interest, PollConfig, Readiness,
    Timer,
};
pub use iothread::IoThread;

use std::sync::Arc;

/// Something that a context can be asked to run on its home thread (coroutines implement this).
pub trait Runnable: Send + Sync {
    /// Runs on `ctx`'s home thread, in a later turn than the call that scheduled it.
    fn run(self: Arc<Self>, ctx: &Arc<AioContext>);
}
