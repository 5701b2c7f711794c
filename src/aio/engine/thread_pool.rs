//! A bounded pool of worker threads, and the file I/O engine over it.
//!
//! ```text
//! home thread: submit ─► queue ─► worker NAME-w0..N: job() ─► finished ─► wake() ─► home thread: reap ─► done(result)
//! ```
//!
//! One pool belongs to one context. Only the *home thread* (the one that made the pool) submits, cancels and
//! reaps; workers run jobs and push results. There are no threads until the first job; one is started when
//! more jobs are queued than workers are idle, up to the maximum, and ends after [`IDLE_EXIT`] without work.
//!
//! Invariants:
//! - every submitted job yields exactly one entry of [`ThreadPool::reap`]: its result, `ECANCELED` when it was
//!   cancelled while queued, or an error that tells of its panic;
//! - a job that has begun is never cancelled;
//! - `wake` is called after the list of finished jobs turned non-empty, so one call may stand for many results;
//! - dropping the pool cancels what is queued, waits for what runs, and joins every worker.
//!
//! Workers inherit the signal mask of the thread that starts them (the home thread): a daemon that takes its
//! signals by signalfd blocks them before it makes its first context, and no worker will ever receive one.

use super::{Completion, Engine, EngineKind, Op, Wake};
use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::Duration;
use tracing::{error, warn};

/// How long a worker waits for work before it ends (QEMU's figure).
pub const IDLE_EXIT: Duration = Duration::from_secs(10);

/// Work for a pool: runs on a worker and may block.
pub type Job = Box<dyn FnOnce() -> io::Result<usize> + Send>;

/// Names a submitted job, for [`ThreadPool::cancel`]. Never reused within a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct JobId(u64);

/// A bounded thread pool; see the file's comment.
///
/// All methods but [`ThreadPool::new`] are for the home thread; debug builds assert it.
pub struct ThreadPool {
    shared: Arc<Shared>,
    home: ThreadId,
    /// Submitted and not yet reaped. Written by the home thread only; atomic so that the pool is `Sync`.
    in_flight: AtomicUsize,
}

/// What home thread and workers share.
struct Shared {
    name: String,
    max: usize,
    idle_exit: Duration,
    wake: Wake,
    /// Guards the queue and the workers' states. Never held while a job runs.
    state: Mutex<State>,
    /// Signalled for one new job, or to all at shutdown.
    work: Condvar,
    /// Results, in order of completion. A leaf lock: nothing else is taken under it.
    finished: Mutex<Vec<(Completion, io::Result<usize>)>>,
    /// Signalled when `finished` turned non-empty; only [`ThreadPool::drain`] waits for it.
    more_finished: Condvar,
    /// Whether `finished` may hold something, so that an idle `reap` takes no lock.
    /// The Release store in `finish` pairs with the Acquire swap in `reap`.
    any_finished: AtomicBool,
}

struct State {
    queue: VecDeque<Queued>,
    next_id: u64,
    /// Workers waiting on `work`.
    idle: usize,
    /// Workers alive.
    alive: usize,
    /// One slot per possible worker; the index is the number in its name.
    slots: Vec<Slot>,
    shutdown: bool,
}

struct Queued {
    id: JobId,
    job: Job,
    done: Completion,
}

enum Slot {
    Empty,
    Running(JoinHandle<()>),
    /// The worker has decided to end, and no longer counts as alive.
    Ended(JoinHandle<()>),
}

impl ThreadPool {
    /// Makes a pool of at most `max` workers (at least one) whose home is the calling thread. Starts no thread.
    ///
    /// `name` prefixes the workers' names: `NAME-w0`, `NAME-w1`, … `wake` is called from workers, and from the
    /// home thread by [`ThreadPool::cancel`], when [`ThreadPool::reap`] has work; it must not block.
    #[must_use]
    pub fn new(name: &str, max: usize, wake: Wake) -> ThreadPool {
        Self::with_idle_exit(name, max, IDLE_EXIT, wake)
    }

    /// Like [`ThreadPool::new`], with another idle time before a worker ends.
    #[must_use]
    pub fn with_idle_exit(name: &str, max: usize, idle_exit: Duration, wake: Wake) -> ThreadPool {
        let max = max.max(1);
        let state = State {
            queue: VecDeque::new(),
            next_id: 0,
            idle: 0,
            alive: 0,
            slots: (0..max).map(|_| Slot::Empty).collect(),
            shutdown: false,
        };
        ThreadPool {
            shared: Arc::new(Shared {
                name: name.to_owned(),
                max,
                idle_exit,
                wake,
                state: Mutex::new(state),
                work: Condvar::new(),
                finished: Mutex::new(Vec::new()),
                more_finished: Condvar::new(),
                any_finished: AtomicBool::new(false),
            }),
            home: thread::current().id(),
            in_flight: AtomicUsize::new(0),
        }
    }

    /// Queues `job`; its result and `done` come out of [`ThreadPool::reap`] together. Never runs either itself.
    ///
    /// When no worker exists and none can be started, the error of that is the job's result.
    pub fn submit(&self, job: Job, done: Completion) -> JobId {
        self.assert_home();
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        let mut state = self.shared.lock_state();
        let id = JobId(state.next_id);
        state.next_id += 1;
        state.queue.push_back(Queued { id, job, done });
        if state.queue.len() > state.idle
            && state.alive < self.shared.max
            && let Err(e) = self.shared.start_worker(&mut state)
        {
            warn!(pool = %self.shared.name, workers = state.alive, error = %e, "worker thread not started");
            if state.alive == 0 {
                // Nobody will ever take it from the queue, and only this thread could have put more in.
                let orphan = state.queue.pop_back();
                drop(state);
                if let Some(orphan) = orphan {
                    self.shared.finish(orphan.done, Err(e));
                }
                return id;
            }
        }
        drop(state);
        self.shared.work.notify_one();
        id
    }

    /// Takes a job back if it is still queued: it never runs, and its result is `ECANCELED`.
    ///
    /// Returns false when it has begun or finished (or was cancelled before); then nothing changes.
    pub fn cancel(&self, id: JobId) -> bool {
        self.assert_home();
        let mut state = self.shared.lock_state();
        // Ids grow along the queue.
        let Ok(index) = state.queue.binary_search_by_key(&id.0, |q| q.id.0) else {
            return false;
        };
        let cancelled = state.queue.remove(index);
        drop(state);
        let Some(cancelled) = cancelled else {
            return false;
        };
        self.shared.finish(cancelled.done, Err(io::Error::from_raw_os_error(libc::ECANCELED)));
        true
    }

    /// Moves finished jobs to the end of `out`. The caller runs the completions, which may submit again.
    pub fn reap(&self, out: &mut Vec<(Completion, io::Result<usize>)>) {
        self.assert_home();
        if !self.shared.any_finished.load(Ordering::Relaxed) {
            return;
        }
        // Cleared before the list is taken: a result pushed after that sets it again and wakes again.
        self.shared.any_finished.swap(false, Ordering::Acquire);
        let mut finished = self.shared.lock_finished();
        self.in_flight.fetch_sub(finished.len(), Ordering::Relaxed);
        out.append(&mut finished);
    }

    /// Waits until every submitted job has finished, and moves them to `out`. Blocks; for shutdown.
    pub fn drain(&self, out: &mut Vec<(Completion, io::Result<usize>)>) {
        self.assert_home();
        self.reap(out);
        while self.in_flight() > 0 {
            let finished = self.shared.lock_finished();
            let finished = self.shared.more_finished.wait_while(finished, |f| f.is_empty());
            drop(finished.unwrap_or_else(PoisonError::into_inner));
            self.reap(out);
        }
    }

    /// Returns how many jobs were submitted and not yet reaped.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Returns how many workers exist now. Any thread.
    #[must_use]
    pub fn workers(&self) -> usize {
        self.shared.lock_state().alive
    }

    /// Returns the most workers there can be.
    #[must_use]
    pub fn max_workers(&self) -> usize {
        self.shared.max
    }

    fn assert_home(&self) {
        debug_assert_eq!(thread::current().id(), self.home, "a thread pool is used by its home thread only");
    }
}

impl Drop for ThreadPool {
    /// Cancels what is queued, waits for what runs, joins the workers. Completions that were not reaped are
    /// dropped, not called: whoever needs them calls [`ThreadPool::drain`] first.
    fn drop(&mut self) {
        let mut state = self.shared.lock_state();
        state.shutdown = true;
        let queued = std::mem::take(&mut state.queue);
        let slots = std::mem::take(&mut state.slots);
        drop(state);
        self.shared.work.notify_all();
        for slot in slots {
            if let Slot::Running(handle) | Slot::Ended(handle) = slot {
                join_worker(&self.shared.name, handle);
            }
        }
        drop(queued);
    }
}

impl Shared {
    fn lock_state(&self) -> MutexGuard<'_, State> {
        // Jobs run outside the lock, so a poisoned lock still guards a consistent state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_finished(&self) -> MutexGuard<'_, Vec<(Completion, io::Result<usize>)>> {
        self.finished.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts one worker in a free slot. The caller has checked that there is one.
    fn start_worker(self: &Arc<Self>, state: &mut State) -> io::Result<()> {
        let index = state
            .slots
            .iter()
            .position(|s| !matches!(s, Slot::Running(_)))
            .expect("fewer workers than slots are alive");
        if let Slot::Ended(handle) = std::mem::replace(&mut state.slots[index], Slot::Empty) {
            // It only has to return from its function, and takes no lock on the way.
            join_worker(&self.name, handle);
        }
        let shared = Arc::clone(self);
        let name = format!("{}-w{index}", self.name);
        let handle = thread::Builder::new().name(name).spawn(move || shared.run_worker(index))?;
        state.slots[index] = Slot::Running(handle);
        state.alive += 1;
        Ok(())
    }

    /// A worker's life.
    fn run_worker(&self, index: usize) {
        let mut state = self.lock_state();
        loop {
            if state.shutdown {
                return;
            }
            if let Some(Queued { job, done, .. }) = state.queue.pop_front() {
                drop(state);
                let result = run_job(&self.name, job);
                self.finish(done, result);
                state = self.lock_state();
                continue;
            }
            state.idle += 1;
            let (guard, timeout) =
                self.work.wait_timeout(state, self.idle_exit).unwrap_or_else(PoisonError::into_inner);
            state = guard;
            state.idle -= 1;
            if timeout.timed_out() && state.queue.is_empty() && !state.shutdown {
                state.alive -= 1;
                let slot = &mut state.slots[index];
                *slot = match std::mem::replace(slot, Slot::Empty) {
                    Slot::Running(handle) => Slot::Ended(handle),
                    other => other,
                };
                return;
            }
        }
    }

    /// Publishes a result and wakes the home thread if it has not been woken for an earlier one.
    fn finish(&self, done: Completion, result: io::Result<usize>) {
        let mut finished = self.lock_finished();
        finished.push((done, result));
        let first = finished.len() == 1;
        self.any_finished.store(true, Ordering::Release);
        drop(finished);
        if first {
            self.more_finished.notify_one();
            (self.wake)();
        }
    }
}

/// Runs a job; a panic becomes its error.
fn run_job(pool: &str, job: Job) -> io::Result<usize> {
    catch_unwind(AssertUnwindSafe(job)).unwrap_or_else(|payload| {
        let text = payload
            .downcast_ref::<&str>()
            .map(|s| (*s).to_owned())
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| String::from("no message"));
        error!(pool, panic = %text, "job panicked");
        Err(io::Error::other(format!("worker job panicked: {text}")))
    })
}

fn join_worker(pool: &str, handle: JoinHandle<()>) {
    if handle.join().is_err() {
        // Jobs' panics are caught, so this is a bug of the pool itself.
        error!(pool, "worker thread panicked");
    }
}

/// File I/O by system calls on a pool of its own.
pub struct ThreadEngine {
    pool: ThreadPool,
}

impl ThreadEngine {
    /// Makes an engine with its own pool of at most `max` workers; arguments as for [`ThreadPool::new`].
    #[must_use]
    pub fn new(name: &str, max: usize, wake: Wake) -> ThreadEngine {
        ThreadEngine { pool: ThreadPool::new(name, max, wake) }
    }
}

impl Engine for ThreadEngine {
    fn kind(&self) -> EngineKind {
        EngineKind::Threads
    }

    #[expect(unsafe_code, reason = "the trait's contract: the submitter vouches for the memory")]
    unsafe fn submit(&mut self, op: Op, done: Completion) {
        let job = move || {
            // SAFETY: the submitter keeps fd and memory valid until `done` was called, which is after this job.
            unsafe { run_op(&op) }
        };
        self.pool.submit(Box::new(job), done);
    }

    fn flush(&mut self) {}

    fn reap(&mut self, out: &mut Vec<(Completion, io::Result<usize>)>) {
        self.pool.reap(out);
    }

    fn drain(&mut self, out: &mut Vec<(Completion, io::Result<usize>)>) {
        self.pool.drain(out);
    }

    fn in_flight(&self) -> usize {
        self.pool.in_flight()
    }

    fn wake_fd(&self) -> Option<RawFd> {
        None
    }
}

/// Runs an operation by blocking system calls; `EINTR` is retried.
///
/// # Errors
/// The system call's; `EINVAL` for an offset or length beyond `i64::MAX`.
///
/// # Safety
/// The fd and the memory that `op` names are valid for the whole call.
#[expect(unsafe_code, reason = "system calls on the submitter's memory")]
pub(super) unsafe fn run_op(op: &Op) -> io::Result<usize> {
    op.check()?;
    loop {
        // `check` has seen that offsets and lengths fit; the casts keep their values.
        let ret: isize = match *op {
            Op::Readv { fd, iov, iov_len, offset } => {
                // SAFETY: `iov` names `iov_len` entries of valid memory, by this function's contract.
                unsafe { libc::preadv(fd, iov, iov_len.cast_signed(), offset.cast_signed()) }
            }
            Op::Writev { fd, iov, iov_len, offset, dsync } => {
                let flags = if dsync { libc::RWF_DSYNC } else { 0 };
                // SAFETY: `iov` names `iov_len` entries of valid memory, by this function's contract.
                unsafe { libc::pwritev2(fd, iov, iov_len.cast_signed(), offset.cast_signed(), flags) }
            }
            Op::Fsync { fd, datasync: true } => {
                // SAFETY: takes a number; a bad one is an error.
                unsafe { libc::fdatasync(fd) as isize }
            }
            Op::Fsync { fd, datasync: false } => {
                // SAFETY: takes a number; a bad one is an error.
                unsafe { libc::fsync(fd) as isize }
            }
            Op::Fallocate { fd, mode, offset, len } => {
                // SAFETY: takes numbers; bad ones are errors.
                unsafe { libc::fallocate(fd, mode, offset.cast_signed(), len.cast_signed()) as isize }
            }
        };
        match usize::try_from(ret) {
            Ok(n) => return Ok(n),
            Err(_) => {
                let e = io::Error::last_os_error();
                if e.kind() != io::ErrorKind::Interrupted {
                    return Err(e);
                }
            }
        }
    }
}
