//! File I/O through io_uring, woken through the ring's own fd.
//!
//! ```text
//! submit ─► backlog ─► (flush) SQ ─► io_uring_enter ─► kernel ─► CQ ─► (reap) completion
//!               ▲ EINTR: again                                    └ EAGAIN, no such opcode: thread engine
//! ```
//!
//! Choices, and what they rest on:
//! - **Wake-ups by the ring fd**, which is readable while the CQ holds entries; no eventfd. `EVENTFD_ASYNC` loses
//!   completions, and `DEFER_TASKRUN` never makes the ring fd readable, so neither is used.
//! - **`COOP_TASKRUN`** where the kernel has it (5.19): completions are posted when this thread enters the kernel next,
//!   without an interrupt of its user code. A poll that waits is interrupted for that and returns `EINTR`, so the
//!   context reaps after every return. A busy loop that makes no system call would not see them.
//! - **At most CQ-size operations are in the kernel** at a time, the rest wait in the backlog, so the CQ cannot
//!   overflow. Should the kernel flag an overflow all the same, `reap` enters it to have the rest posted.
//! - Opcodes are probed at the start, and one no-op goes through the whole ring: a container's seccomp filter may
//!   allow `io_uring_setup` and refuse `io_uring_enter`.
//!
//! Ownership: one context's home thread makes it, uses it and drops it. An operation lives in a slot of `slots`
//! from `submit` to `reap`; the slot's index is the entry's `user_data`.
//!
//! Drop waits for what the kernel has: file I/O cannot be taken back reliably, and the kernel writes to the
//! submitter's memory until then. Completions of a ring that was not drained are dropped uncalled.

use super::thread_pool::ThreadEngine;
use super::{Completion, Engine, EngineKind, Op, Wake};
use io_uring::{IoUring, Probe, cqueue, opcode, squeue, types};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use tracing::{debug, error};

/// Entries of the submission queue (ours). The completion queue has twice as many (the kernel's default); together they
/// take 24 KiB, which fits even where rings count against a 64 KiB `RLIMIT_MEMLOCK` (kernels before 5.12).
pub const ENTRIES: u32 = 256;

/// The engine over one ring.
pub struct UringEngine {
    ring: IoUring,
    slots: Vec<Slot>,
    /// Indices of unused slots.
    free: Vec<u32>,
    /// Slots that wait for a place in the submission queue, in order of submission.
    backlog: VecDeque<u32>,
    /// Entries in the submission queue or in the kernel: bounded by `in_kernel_max`.
    in_kernel: usize,
    in_kernel_max: usize,
    /// Operations that ended before they reached the kernel.
    refused: Vec<(Completion, io::Result<usize>)>,
    has_fallocate: bool,
    wake: Wake,
    /// Takes what the ring cannot do.
    threads: ThreadEngine,
}

/// An operation between submit and reap.
struct Slot {
    op: Op,
    /// None: the slot is free.
    done: Option<Completion>,
}

/// Why there is no ring.
#[derive(Debug, thiserror::Error)]
#[error("io_uring is not available: {reason}")]
pub struct UringRefused {
    reason: &'static str,
    source: io::Error,
}

impl UringRefused {
    fn new(what: &'static str, source: io::Error) -> UringRefused {
        let reason = match source.raw_os_error() {
            Some(libc::ENOSYS) => "this kernel has no io_uring, or a sandbox hides it",
            Some(libc::EPERM | libc::EACCES) => {
                "refused by a seccomp filter (container default) or by sysctl kernel.io_uring_disabled"
            }
            Some(libc::ENOMEM) => "no memory for the ring: RLIMIT_MEMLOCK is too small, or memory is short",
            Some(libc::EMFILE | libc::ENFILE) => "no file descriptor left for the ring",
            _ => what,
        };
        UringRefused { reason, source }
    }

    /// Returns the cause in words.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        self.reason
    }

    /// Returns the system's error.
    #[must_use]
    pub fn source(&self) -> &io::Error {
        &self.source
    }
}

impl From<UringRefused> for io::Error {
    fn from(refused: UringRefused) -> io::Error {
        io::Error::new(refused.source.kind(), refused)
    }
}

impl UringEngine {
    /// Makes a ring of [`ENTRIES`] entries for the calling thread; `name`, `pool_threads` and `wake` are for the
    /// thread engine behind it.
    ///
    /// # Errors
    /// Why the kernel refuses it; see [`UringRefused::reason`].
    pub fn new(name: &str, pool_threads: usize, wake: Wake) -> Result<UringEngine, UringRefused> {
        Self::with_limits(ENTRIES, None, name, pool_threads, wake)
    }

    /// Like [`UringEngine::new`] with a ring of `entries` (a power of two), and at most `in_kernel_max` operations in the
    /// kernel instead of as many as the completion queue holds.
    ///
    /// # Errors
    /// Why the kernel refuses it; see [`UringRefused::reason`].
    pub fn with_limits(
        entries: u32,
        in_kernel_max: Option<usize>,
        name: &str,
        pool_threads: usize,
        wake: Wake,
    ) -> Result<UringEngine, UringRefused> {
        let mut ring = match IoUring::builder().setup_coop_taskrun().build(entries) {
            // Before Linux 5.19 the flag is unknown.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => IoUring::new(entries),
            other => other,
        }
        .map_err(|e| UringRefused::new("io_uring_setup failed", e))?;

        let mut probe = Probe::new();
        ring.submitter()
            .register_probe(&mut probe)
            .map_err(|e| UringRefused::new("the kernel cannot tell its io_uring opcodes (before 5.6)", e))?;
        let needed = [opcode::Nop::CODE, opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE];
        if !needed.iter().all(|&code| probe.is_supported(code)) {
            let source = io::Error::from_raw_os_error(libc::EOPNOTSUPP);
            return Err(UringRefused::new("the kernel's io_uring lacks read, write or fsync", source));
        }
        try_nop(&mut ring).map_err(|e| UringRefused::new("io_uring_enter failed", e))?;

        let in_kernel_max = in_kernel_max.unwrap_or(ring.params().cq_entries() as usize).max(1);
        Ok(UringEngine {
            has_fallocate: probe.is_supported(opcode::Fallocate::CODE),
            ring,
            slots: Vec::new(),
            free: Vec::new(),
            backlog: VecDeque::new(),
            in_kernel: 0,
            in_kernel_max,
            refused: Vec::new(),
            threads: ThreadEngine::new(name, pool_threads, Arc::clone(&wake)),
            wake,
        })
    }

    /// Returns the size of the submission queue.
    #[must_use]
    pub fn entries(&self) -> u32 {
        self.ring.params().sq_entries()
    }

    /// Returns the size of the completion queue.
    #[must_use]
    pub fn cq_entries(&self) -> u32 {
        self.ring.params().cq_entries()
    }

    fn slot_for(&mut self, op: Op, done: Completion) -> u32 {
        let slot = Slot { op, done: Some(done) };
        if let Some(index) = self.free.pop() {
            self.slots[index as usize] = slot;
            index
        } else {
            let index = u32::try_from(self.slots.len()).expect("fewer than 2^32 operations fit in memory");
            self.slots.push(slot);
            index
        }
    }

    /// Empties a slot.
    fn take(&mut self, index: u32) -> (Op, Completion) {
        let slot = &mut self.slots[index as usize];
        let done = slot.done.take().expect("the kernel completes each entry once");
        self.free.push(index);
        (slot.op, done)
    }

    /// Moves the backlog to the submission queue as far as there is room.
    fn fill_sq(&mut self) {
        let mut sq = self.ring.submission();
        while self.in_kernel < self.in_kernel_max && !sq.is_full() {
            let Some(index) = self.backlog.pop_front() else { break };
            let entry = entry_for(&self.slots[index as usize].op).user_data(u64::from(index));
            #[expect(unsafe_code, reason = "the kernel will use the submitter's memory")]
            // SAFETY: by `submit`'s contract fd and memory stay valid until the completion was called, and
            // that happens after this entry's completion was taken from the CQ (or drop has waited for it).
            let pushed = unsafe { sq.push(&entry) };
            pushed.expect("there is room, as just checked");
            self.in_kernel += 1;
        }
    }

    fn next_cqe(&mut self) -> Option<cqueue::Entry> {
        self.ring.completion().next()
    }

    /// Takes every entry from the CQ.
    fn drain_cq(&mut self, out: &mut Vec<(Completion, io::Result<usize>)>) {
        while let Some(cqe) = self.next_cqe() {
            let index = u32::try_from(cqe.user_data()).expect("user data are slot indices");
            self.complete(index, cqe.result(), out);
        }
    }

    /// Deals with one answer of the kernel: a count, or a negative errno.
    fn complete(&mut self, index: u32, result: i32, out: &mut Vec<(Completion, io::Result<usize>)>) {
        assert!(self.in_kernel > 0, "the kernel completes only what it was given");
        self.in_kernel -= 1;
        match usize::try_from(result) {
            Ok(n) => out.push((self.take(index).1, Ok(n))),
            Err(_) => match result.wrapping_neg() {
                // A signal interrupted the kernel's worker; nothing was done.
                libc::EINTR => {
                    self.backlog.push_back(index);
                    (self.wake)();
                }
                // Where it cannot wait for the file asynchronously.
                libc::EAGAIN => {
                    let (op, done) = self.take(index);
                    self.hand_to_threads(op, done);
                }
                errno => out.push((self.take(index).1, Err(io::Error::from_raw_os_error(errno)))),
            },
        }
    }

    fn hand_to_threads(&mut self, op: Op, done: Completion) {
        #[expect(unsafe_code, reason = "the same contract as the own submit's")]
        // SAFETY: fd and memory stay valid until `done` was called, by the contract of the own `submit`.
        unsafe {
            self.threads.submit(op, done);
        }
    }

    /// Waits for one completion at least, having submitted what is queued. For `drain` and drop.
    fn wait(&mut self) {
        if let Err(e) = self.ring.submit_and_wait(1) {
            match e.raw_os_error() {
                Some(libc::EINTR) => {}
                // The CQ must be emptied first, which the caller does next.
                Some(libc::EBUSY | libc::EAGAIN) => std::thread::yield_now(),
                _ => {
                    error!(error = %e, in_kernel = self.in_kernel, "io_uring_enter failed while waiting");
                    // The operations still run and still borrow memory: there is nothing but to look again.
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
            }
        }
    }
}

impl Engine for UringEngine {
    fn kind(&self) -> EngineKind {
        EngineKind::IoUring
    }

    #[expect(unsafe_code, reason = "the trait's contract: the submitter vouches for the memory")]
    unsafe fn submit(&mut self, op: Op, done: Completion) {
        if let Err(e) = op.check() {
            // Nothing in the kernel will wake the context for it.
            self.refused.push((done, Err(e)));
            (self.wake)();
        } else if matches!(op, Op::Fallocate { .. }) && !self.has_fallocate {
            self.hand_to_threads(op, done);
        } else {
            let index = self.slot_for(op, done);
            self.backlog.push_back(index);
        }
    }

    fn flush(&mut self) {
        loop {
            self.fill_sq();
            let queued = self.ring.submission().len();
            if queued == 0 {
                return;
            }
            match self.ring.submit() {
                // Again only if more was queued than the SQ holds, or if the kernel stopped at a bad entry.
                Ok(n) if n > 0 => {}
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                result => {
                    // The CQ must be emptied first, or the kernel is short of memory. The entries stay queued for the
                    // next turn, which a completion brings; if nothing is in flight, we ask for it ourselves.
                    match result {
                        Err(e) if !matches!(e.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN)) => {
                            error!(error = %e, queued, "io_uring_enter failed");
                        }
                        result => debug!(?result, queued, "io_uring_enter postponed"),
                    }
                    if self.in_kernel == queued {
                        (self.wake)();
                    }
                    return;
                }
            }
        }
    }

    fn reap(&mut self, out: &mut Vec<(Completion, io::Result<usize>)>) {
        out.append(&mut self.refused);
        self.threads.reap(out);
        loop {
            self.drain_cq(out);
            if !self.ring.submission().cq_overflow() {
                return;
            }
            // The kernel keeps the completions that had no room, and posts them when it is entered.
            if let Err(e) = self.ring.submit()
                && e.raw_os_error() != Some(libc::EBUSY)
            {
                debug!(error = %e, "io_uring_enter for an overflow failed");
                return;
            }
        }
    }

    fn drain(&mut self, out: &mut Vec<(Completion, io::Result<usize>)>) {
        loop {
            self.flush();
            self.reap(out);
            if self.in_kernel > 0 {
                self.wait();
            } else if self.backlog.is_empty() {
                break;
            }
        }
        self.threads.drain(out);
        out.append(&mut self.refused);
    }

    fn in_flight(&self) -> usize {
        let in_slots = self.slots.len() - self.free.len();
        in_slots + self.refused.len() + self.threads.in_flight()
    }

    fn wake_fd(&self) -> Option<RawFd> {
        Some(self.ring.as_raw_fd())
    }
}

impl Drop for UringEngine {
    fn drop(&mut self) {
        // What waits in the backlog never starts; the completions go when `slots` goes, after the kernel is done.
        self.backlog.clear();
        let mut finished = Vec::new();
        self.drain_cq(&mut finished);
        while self.in_kernel > 0 {
            self.wait();
            self.drain_cq(&mut finished);
            // Interrupted operations are not repeated.
            self.backlog.clear();
        }
        if !finished.is_empty() {
            debug!(completions = finished.len(), "io_uring dropped with operations in flight");
        }
    }
}

/// Sends one no-op through the ring.
fn try_nop(ring: &mut IoUring) -> io::Result<()> {
    let entry = opcode::Nop::new().build().user_data(u64::MAX);
    #[expect(unsafe_code, reason = "pushes an entry")]
    // SAFETY: a no-op names no memory.
    let pushed = unsafe { ring.submission().push(&entry) };
    pushed.expect("a new ring is empty");
    loop {
        match ring.submit_and_wait(1) {
            Ok(_) => break,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    let cqe = ring.completion().next().ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
    if cqe.result() < 0 {
        return Err(io::Error::from_raw_os_error(-cqe.result()));
    }
    Ok(())
}

/// Describes an operation to the kernel.
fn entry_for(op: &Op) -> squeue::Entry {
    match *op {
        Op::Readv { fd, iov, iov_len, offset } => {
            opcode::Readv::new(types::Fd(fd), iov, iov_len).offset(offset).build()
        }
        Op::Writev { fd, iov, iov_len, offset, dsync } => {
            let flags = if dsync { libc::RWF_DSYNC } else { 0 };
            opcode::Writev::new(types::Fd(fd), iov, iov_len).offset(offset).rw_flags(flags).build()
        }
        Op::Fsync { fd, datasync } => {
            let flags = if datasync { types::FsyncFlags::DATASYNC } else { types::FsyncFlags::empty() };
            opcode::Fsync::new(types::Fd(fd)).flags(flags).build()
        }
        Op::Fallocate { fd, mode, offset, len } => {
            opcode::Fallocate::new(types::Fd(fd), len).offset(offset).mode(mode).build()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Submits an `fsync`, pretends that the kernel answered `answer` to it, and returns what became of it.
    fn after_answer(answer: i32) -> (io::Result<usize>, usize, usize) {
        let wakes = Arc::new(AtomicUsize::new(0));
        let of_wake = Arc::clone(&wakes);
        let wake = move || {
            of_wake.fetch_add(1, Ordering::SeqCst);
        };
        let mut engine = UringEngine::new("answer", 1, Arc::new(wake)).expect("io_uring");
        let file = File::open("/proc/self/exe").expect("our own binary");
        let op = Op::Fsync { fd: file.as_raw_fd(), datasync: true };
        #[expect(unsafe_code, reason = "the trait's contract")]
        // SAFETY: the file lives until the engine was drained.
        unsafe {
            engine.submit(op, Box::new(|_| ()));
        }
        let index = engine.backlog.pop_front().expect("not flushed yet");
        engine.in_kernel += 1;
        let mut out = Vec::new();
        engine.complete(index, answer, &mut out);
        assert_eq!(engine.in_flight() + out.len(), 1);
        let by_threads = engine.threads.in_flight();
        engine.drain(&mut out);
        assert_eq!(engine.in_flight(), 0);
        assert_eq!(out.len(), 1);
        let (_, result) = out.remove(0);
        (result, by_threads, wakes.load(Ordering::SeqCst))
    }

    fn skipped() -> bool {
        std::env::var("CONBD_TEST_ENGINES").is_ok_and(|v| v == "threads")
    }

    #[test]
    fn an_interrupted_operation_is_submitted_again() {
        if !skipped() {
            let (result, by_threads, wakes) = after_answer(-libc::EINTR);
            assert_eq!(result.expect("the second time it works"), 0);
            assert_eq!((by_threads, wakes), (0, 1));
        }
    }

    #[test]
    fn what_the_ring_cannot_wait_for_goes_to_a_thread() {
        if !skipped() {
            let (result, by_threads, _) = after_answer(-libc::EAGAIN);
            assert_eq!(result.expect("a thread can"), 0);
            assert_eq!(by_threads, 1);
        }
    }

    #[test]
    fn other_answers_are_results() {
        if !skipped() {
            assert_eq!(after_answer(7).0.expect("a count"), 7);
            assert_eq!(after_answer(-libc::EIO).0.expect_err("an errno").raw_os_error(), Some(libc::EIO));
        }
    }
}
