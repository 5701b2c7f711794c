//! IOThread: a thread that runs one AioContext (owner: aio helper).

use super::{AioConfig, AioContext};
use std::io;
use std::sync::Arc;

/// An OS thread that polls one AioContext until it is stopped.
pub struct IoThread {
    _private: (),
}

impl IoThread {
    /// Starts the thread; returns when its context is ready.
    ///
    /// # Errors
    /// What thread creation or [`AioContext::new`] reports.
    pub fn spawn(_config: AioConfig) -> io::Result<IoThread> {
        todo!()
    }

    /// Returns the context that the thread polls.
    #[must_use]
    pub fn context(&self) -> &Arc<AioContext> {
        todo!()
    }

    /// Asks the loop to end after its current turn and joins the thread. Bottom halves scheduled before still run.
    ///
    /// # Errors
    /// The panic payload's text, when the thread died by a panic.
    pub fn stop(self) -> io::Result<()> {
        todo!()
    }
}
