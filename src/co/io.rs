//! File I/O for coroutines over the current context's engine: straight-line calls that yield.
//!
//! The vectors, the buffers behind them and the slot for the result stay where they are: on the stack of the coroutine, or
//! borrowed by it. That is sound because a suspended coroutine is never dropped (a lost one is leaked with its
//! stack), and because these calls return only after the completion has run, whoever else wakes the coroutine
//! meanwhile. Per operation there is one small allocation: the completion's box.

use super::coroutine::{Coroutine, co_yield};
use crate::aio::AioContext;
use crate::aio::engine::{Completion, Op};
use std::cell::UnsafeCell;
use std::io;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Most vectors per operation: the kernel's `IOV_MAX`. What is beyond is left to the next call (a short transfer).
const IOV_MAX: usize = 1024;

/// The result of one operation; on the waiting coroutine's stack.
struct Slot {
    done: AtomicBool,
    result: UnsafeCell<Option<io::Result<usize>>>,
    co: Coroutine,
}

struct SlotPtr(*const Slot);

#[expect(unsafe_code, reason = "goes to the completion and back")]
// SAFETY: the slot outlives its completion, and `done` (Release/Acquire) orders the two sides.
unsafe impl Send for SlotPtr {}

impl Slot {
    fn new() -> Slot {
        let co = Coroutine::current().expect("file I/O that yields needs a coroutine");
        Slot { done: AtomicBool::new(false), result: UnsafeCell::new(None), co }
    }

    /// The completion that fills this slot. The caller stays in `co_wait` until it has run.
    fn completion(&self) -> Completion {
        let slot = SlotPtr(self);
        Box::new(move |result| {
            let slot: SlotPtr = slot;
            #[expect(unsafe_code, reason = "the slot is on the waiting coroutine's stack")]
            // SAFETY: its coroutine does not leave `co_wait` before `done`, and is never dropped.
            let slot = unsafe { &*slot.0 };
            let co = slot.co.clone();
            #[expect(unsafe_code, reason = "the slot's cell")]
            // SAFETY: the waiter reads it only after `done`; completions run once.
            unsafe {
                *slot.result.get() = Some(result);
            }
            // From here on the slot may be gone.
            slot.done.store(true, Ordering::Release);
            co.wake();
        })
    }

    /// Yields until the completion has run.
    #[expect(unsafe_code, reason = "the slot's cell")]
    fn co_wait(&self) -> io::Result<usize> {
        while !self.done.load(Ordering::Acquire) {
            co_yield();
        }
        // SAFETY: the completion has written it before `done`, and is over.
        let result = unsafe { (*self.result.get()).take() };
        result.expect("a completion delivers a result")
    }
}

fn context() -> Arc<AioContext> {
    AioContext::current().expect("file I/O that yields needs an AioContext")
}

/// Submits and waits.
///
/// # Safety
/// The fd and the memory behind `op` stay valid, and unaliased for reads, until this returns.
#[expect(unsafe_code, reason = "buffers are borrowed by the kernel")]
unsafe fn co_submit(op: Op) -> io::Result<usize> {
    let slot = Slot::new();
    let slot = &slot;
    let done = slot.completion();
    // SAFETY: the caller's promise, and we return only when `done` has run.
    unsafe { context().submit(op, done) };
    slot.co_wait()
}

/// Reads at `offset` through the engine; may be short. Yields. Coroutine only.
///
/// # Errors
/// What `preadv` reports.
#[expect(unsafe_code, reason = "the kernel writes to the caller's buffers")]
pub fn co_preadv(fd: RawFd, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<usize> {
    let iov_len = bufs.len().min(IOV_MAX) as u32;
    // IoSliceMut is guaranteed to have the layout of iovec on unix.
    let op = Op::Readv { fd, iov: bufs.as_mut_ptr().cast_const().cast(), iov_len, offset };
    // SAFETY: `bufs` is borrowed exclusively until we return, and the coroutine's stack is never dropped while it
    // is suspended; a bad fd is the kernel's to report.
    unsafe { co_submit(op) }
}

/// Writes at `offset` through the engine; may be short; durable on return if `dsync`. Yields. Coroutine only.
///
/// # Errors
/// What `pwritev2` reports.
#[expect(unsafe_code, reason = "the kernel reads the caller's buffers")]
pub fn co_pwritev(fd: RawFd, bufs: &[IoSlice<'_>], offset: u64, dsync: bool) -> io::Result<usize> {
    let iov_len = bufs.len().min(IOV_MAX) as u32;
    // IoSlice is guaranteed to have the layout of iovec on unix.
    let op = Op::Writev { fd, iov: bufs.as_ptr().cast(), iov_len, offset, dsync };
    // SAFETY: as in `co_preadv`; the kernel only reads.
    unsafe { co_submit(op) }
}

/// fsync or fdatasync. Yields. Coroutine only.
///
/// # Errors
/// What the call reports.
#[expect(unsafe_code, reason = "the engine's submit")]
pub fn co_fsync(fd: RawFd, datasync: bool) -> io::Result<()> {
    // SAFETY: no memory is involved.
    unsafe { co_submit(Op::Fsync { fd, datasync }) }.map(drop)
}

/// fallocate. Yields. Coroutine only.
///
/// # Errors
/// What the call reports.
#[expect(unsafe_code, reason = "the engine's submit")]
pub fn co_fallocate(fd: RawFd, mode: i32, offset: u64, len: u64) -> io::Result<()> {
    // SAFETY: no memory is involved.
    unsafe { co_submit(Op::Fallocate { fd, mode, offset, len }) }.map(drop)
}

/// Runs blocking work on the context's thread pool and yields until it is done. Coroutine only
/// (`thread_pool_submit_co`). A panic in `f` is re-raised in the caller.
///
/// # Panics
/// When `f` panics; outside of coroutines; in a thread without a context.
#[expect(unsafe_code, reason = "the work borrows from the waiting coroutine's stack")]
pub fn co_run_blocking<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    let mut result: Option<std::thread::Result<T>> = None;
    let out = &mut result;
    let work: Box<dyn FnOnce() -> io::Result<usize> + Send + '_> = Box::new(move || {
        *out = Some(catch_unwind(AssertUnwindSafe(f)));
        Ok(0)
    });
    let slot = Slot::new();
    let slot = &slot;
    let done = slot.completion();
    // SAFETY: only the lifetime changes. The work is run, or dropped, before its completion runs, and we return only
    // after that; the coroutine's stack is never dropped while it is suspended.
    let work: Box<dyn FnOnce() -> io::Result<usize> + Send + 'static> = unsafe { std::mem::transmute(work) };
    context().submit_blocking(work, done);
    let ran = slot.co_wait();
    match (result, ran) {
        (Some(Ok(value)), _) => value,
        (Some(Err(payload)), _) => resume_unwind(payload),
        (None, Err(e)) => panic!("the thread pool did not run the work: {e}"),
        (None, Ok(_)) => unreachable!("the work stores its result before it returns"),
    }
}
