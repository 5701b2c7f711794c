//! IoThread: an OS thread that runs one AioContext.

use super::{AioConfig, AioContext};
use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use tracing::{debug, error};

/// What happens when a callback of the loop panics. Coroutines contain their own panics; one that gets here
/// broke an invariant of the loop itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnPanic {
    /// Logs, and aborts the process: its connections could never be answered again, and must be seen to end.
    Abort,
    /// Logs, ends the thread, and reports it from [`IoThread::stop`]. For tests.
    Report,
}

/// An OS thread that polls one AioContext until it is stopped.
#[derive(Debug)]
pub struct IoThread {
    context: Arc<AioContext>,
    stop: Arc<AtomicBool>,
    /// None after the join.
    thread: Option<JoinHandle<Result<(), String>>>,
}

impl IoThread {
    /// Starts the thread; returns when its context is ready. Blocks until then: not for callbacks or coroutines.
    /// The thread inherits the caller's signal mask.
    ///
    /// # Errors
    /// What thread creation or [`AioContext::new`] reports.
    pub fn spawn(config: AioConfig) -> io::Result<IoThread> {
        IoThread::spawn_with(config, OnPanic::Abort)
    }

    /// [`IoThread::spawn`] with a choice of what a panic of the loop does.
    ///
    /// # Errors
    /// As [`IoThread::spawn`].
    pub fn spawn_with(config: AioConfig, on_panic: OnPanic) -> io::Result<IoThread> {
        let stop = Arc::new(AtomicBool::new(false));
        let (made, ready) = mpsc::channel();
        let thread = std::thread::Builder::new().name(config.name.clone()).spawn({
            let stop = Arc::clone(&stop);
            move || {
                let context = match AioContext::new(config) {
                    Ok(context) => context,
                    Err(e) => {
                        // The receiver waits for exactly one message.
                        let _ = made.send(Err(e));
                        return Ok(());
                    }
                };
                let _ = made.send(Ok(Arc::clone(&context)));
                drop(made);
                run(&context, &stop, on_panic)
            }
        })?;
        match ready.recv() {
            Ok(Ok(context)) => Ok(IoThread { context, stop, thread: Some(thread) }),
            Ok(Err(e)) => {
                // It has nothing left to do but to return.
                let _ = thread.join();
                Err(e)
            }
            Err(_) => Err(io::Error::other("the IOThread died while making its context")),
        }
    }

    /// Returns the context that the thread polls.
    #[must_use]
    pub fn context(&self) -> &Arc<AioContext> {
        &self.context
    }

    /// Asks the loop to end and joins the thread. Bottom halves scheduled before still run, and file operations
    /// finish. Blocks until then: not for callbacks or coroutines.
    ///
    /// # Errors
    /// The panic's text, when the thread died by a panic.
    pub fn stop(mut self) -> io::Result<()> {
        self.join()
    }

    fn join(&mut self) -> io::Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        self.stop.store(true, Ordering::Release);
        self.context.notify();
        match thread.join() {
            Ok(Ok(())) => Ok(()),
            Ok(Err(text)) => Err(io::Error::other(text)),
            Err(payload) => Err(io::Error::other(panic_text(&*payload))),
        }
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        if let Err(e) = self.join() {
            error!(context = self.context.name(), error = %e, "IOThread ended by a panic");
        }
    }
}

fn run(context: &Arc<AioContext>, stop: &AtomicBool, on_panic: OnPanic) -> Result<(), String> {
    debug!(context = context.name(), "IOThread started");
    let turns = AssertUnwindSafe(|| {
        // Pairs with the Release store in `join`, which a notification follows.
        while !stop.load(Ordering::Acquire) {
            context.poll(true);
        }
        context.shut_down();
    });
    let result = catch_unwind(turns).map_err(|payload| panic_text(&*payload));
    if let Err(text) = &result {
        error!(context = context.name(), panic = text.as_str(), "event loop panicked");
        if on_panic == OnPanic::Abort {
            std::process::abort();
        }
    }
    debug!(context = context.name(), "IOThread stopped");
    result
}

fn panic_text(payload: &(dyn Any + Send)) -> String {
    if let Some(text) = payload.downcast_ref::<&str>() {
        String::from(*text)
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text.clone()
    } else {
        String::from("a panic without a text")
    }
}
