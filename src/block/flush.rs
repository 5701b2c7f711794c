//! FlushGroup: concurrent flushers share one fdatasync where that is correct, and a failure is never forgotten.
//!
//! A sync covers the writes that were complete *when it started*. So a flusher needs a sync that starts after its
//! own arrival: it may not join one that is running already, but everybody who arrives during that one shares the
//! next. The write path knows nothing of this: no counter, no lock.
//!
//! ```text
//!   A leads sync 1 ─────────┐ B leads sync 2 ─────────┐ D leads sync 3
//!        B, C arrive (need 2)│      D arrives (needs 3)│
//!                            │                 B and C return
//! ```
//!
//! After a failed fsync the kernel marks the pages clean and forgets them: a later fsync would succeed over lost
//! data. So the first failure is kept, and every later flush reports it ("fsyncgate").

use super::wait::{co_wait_until, lock};
use crate::co::CoQueue;
use std::io;
use std::sync::Mutex;

/// Shares syncs between flushers of one file; see the module's text. Any thread.
#[derive(Default)]
pub struct FlushGroup {
    state: Mutex<State>,
    /// Flushers that wait for a sync that another leads; guarded by `state`.
    waiters: CoQueue,
}

#[derive(Default)]
struct State {
    /// Number of the last sync that has started.
    started: u64,
    /// Number of the last sync that has ended; equal to `started` when none is running.
    finished: u64,
    /// Errno of the first failure.
    failed: Option<i32>,
}

enum Step {
    Done(io::Result<()>),
    Lead,
}

impl FlushGroup {
    /// Makes a group that has not failed.
    #[must_use]
    pub fn new() -> FlushGroup {
        FlushGroup::default()
    }

    /// Returns once a sync that started after this call has succeeded; `sync` (which may yield) is called unless
    /// another flusher's sync does it. Coroutine only; may yield.
    ///
    /// # Errors
    /// The errno of the first sync that ever failed in this group.
    pub fn co_flush(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut need = None;
        let step = co_wait_until(&self.state, &self.waiters, |s| {
            let need = *need.get_or_insert(s.started + 1);
            if let Some(errno) = s.failed {
                Some(Step::Done(Err(io::Error::from_raw_os_error(errno))))
            } else if s.finished >= need {
                Some(Step::Done(Ok(())))
            } else if s.started == s.finished {
                s.started += 1;
                Some(Step::Lead)
            } else {
                None
            }
        });
        match step {
            Step::Done(r) => r,
            Step::Lead => {
                let mut lead = Lead { group: self, errno: Some(libc::EIO) };
                let r = sync();
                lead.errno = r.as_ref().err().map(|e| e.raw_os_error().unwrap_or(libc::EIO));
                drop(lead);
                match self.failed() {
                    Some(errno) if r.is_ok() => Err(io::Error::from_raw_os_error(errno)),
                    _ => r,
                }
            }
        }
    }

    /// Records a failure that was seen elsewhere (a durable write whose sync failed). Any thread.
    pub fn fail(&self, errno: i32) {
        lock(&self.state).failed.get_or_insert(errno);
    }

    /// The errno of the first failure, if any.
    #[must_use]
    pub fn failed(&self) -> Option<i32> {
        lock(&self.state).failed
    }

    /// How many flushers wait for a sync that another leads.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiters.len()
    }

    /// How many syncs have started.
    #[must_use]
    pub fn syncs(&self) -> u64 {
        lock(&self.state).started
    }
}

/// Ends the running sync, also when it panicked (then as a failure).
struct Lead<'a> {
    group: &'a FlushGroup,
    errno: Option<i32>,
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        {
            let mut s = lock(&self.group.state);
            s.finished = s.started;
            if let Some(e) = self.errno {
                s.failed.get_or_insert(e);
            }
        }
        self.group.waiters.restart_all();
    }
}
