//! The event loop: AioContext, bottom halves, fd handlers, timers, asynchronous file I/O.
//!
//! Knows no coroutine, no NBD, no image. One [`AioContext`] has one *home thread*; only that thread
//! polls it, runs its callbacks and touches its handlers and timers. Any thread may schedule a bottom
//! half or a [`Runnable`] on it.
//!
//! - `context.rs`: one turn of the loop   - `bh.rs`, `bh_list.rs`: bottom halves and the list they arrive in
//! - `notifier.rs`: who must write the eventfd   - `handler.rs`: fd handlers   - `timer.rs`: timers
//! - `polling.rs`, `poll_trial.rs`: adaptive busy polling, and whether it pays   - `home.rs`: thread affinity, checked   - `iothread.rs`: threads
//! - [`engine`]: asynchronous file I/O, by io_uring or by threads

mod bh;
mod bh_list;
mod context;
pub mod engine;
mod handler;
mod home;
mod iothread;
mod notifier;
mod poll_trial;
mod polling;
mod runnable;
mod timer;

pub use bh::BottomHalf;
pub use context::{AioConfig, AioContext, ContextCounters};
pub use handler::{HandlerId, Interest, Readiness};
pub use iothread::{IoThread, OnPanic};
pub use poll_trial::PollTrial;
pub use polling::PollConfig;
pub use runnable::Runnable;
pub use timer::{Clock, Timer};
