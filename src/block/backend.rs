//! BlockBackend: what an export holds on a graph: in-flight count, drain, bounds, counters.
//!
//! Every request is counted from entry to completion, in the slot of the thread that began it, so that requests on
//! different threads write no common cache line. Drain is the rare side and pays for that: it raises a counter that
//! every request reads, then sums the slots.
//!
//! ```text
//!   request                         drain
//!   slot.in_flight += 1  (a)        quiesced += 1        (c)
//!   quiesced == 0 ?      (b)        sum of slots == 0 ?  (d)
//! ```
//! All four are sequentially consistent. If (b) saw 0, then (a) precedes (c) in their total order, so (d) sees the
//! request. If (b) saw more, the request takes its count back and waits in FIFO order until `drain_end`. The end of
//! a request is the same dance with "the drainer queues itself, then looks at the sum once more".
//!
//! Nested drains count; a node is quiesced while any lasts. Who drains from inside a request of the same backend
//! waits for itself: don't.

use super::shard::{self, Sharded};
use super::wait::{co_wait_until, lock};
use super::{
    BlockNode, DepthExtent, DirtyBitmap, DirtyExtent, Error, Extent, Lent, Limits, Result, WriteFlags, iov,
};
use crate::co::CoQueue;
use crate::util::fast;
use std::io::{IoSlice, IoSliceMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often a thread that waits for a drain asks whether it shall go on (ours).
const GIVE_UP_STEP: Duration = Duration::from_millis(50);

/// The user's end of a block graph. Any thread; shared by `Arc`.
pub struct BlockBackend {
    root: Arc<dyn BlockNode>,
    /// What requests are held against; grows by `co_resize`, after the root node has.
    len: AtomicU64,
    slots: Sharded<Slot>,
    /// Drains that have begun and not ended. Written by drains only.
    quiesced: AtomicU64,
    /// Guards no data: whoever looks at the counters to decide about waiting holds it until it is queued, and whoever
    /// changes them so that a waiter could go on takes it before it restarts the queue.
    drain: Mutex<()>,
    /// Requests that came while quiesced; guarded by `drain`.
    requests: CoQueue,
    /// Coroutines that wait for the in-flight count to become zero; guarded by `drain`.
    drainers: CoQueue,
    /// For plain threads that wait for the same; pairs with `drain`.
    idle: Condvar,
}

/// What one thread counts. Relaxed sums, except `in_flight` (see the module's text).
#[derive(Default)]
struct Slot {
    in_flight: AtomicU64,
    reads: AtomicU64,
    read_bytes: AtomicU64,
    inline_reads: AtomicU64,
    writes: AtomicU64,
    write_bytes: AtomicU64,
    inline_writes: AtomicU64,
    zeroes: AtomicU64,
    discards: AtomicU64,
    flushes: AtomicU64,
    statuses: AtomicU64,
    errors: AtomicU64,
}

/// What went through a backend since it was made. Requests are counted when they end, failed ones too.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BackendStats {
    /// Reads, inline ones included.
    pub reads: u64,
    /// Bytes asked by them.
    pub read_bytes: u64,
    /// Reads that were served without leaving the calling turn.
    pub inline_reads: u64,
    /// Writes, inline ones included.
    pub writes: u64,
    /// Bytes of them.
    pub write_bytes: u64,
    /// Writes that were served without leaving the calling turn.
    pub inline_writes: u64,
    /// Zeroing requests.
    pub zeroes: u64,
    /// Discards.
    pub discards: u64,
    /// Flushes.
    pub flushes: u64,
    /// Block status queries.
    pub statuses: u64,
    /// Requests that failed.
    pub errors: u64,
}

/// A request that is counted as in flight until it is dropped.
struct InFlight<'a> {
    backend: &'a BlockBackend,
    slot: &'a Slot,
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.slot.in_flight.fetch_sub(1, Ordering::SeqCst);
        if self.backend.quiesced.load(Ordering::SeqCst) != 0 {
            self.backend.kick_drainers();
        }
    }
}

impl BlockBackend {
    /// Wraps the root node.
    pub fn new(root: Arc<dyn BlockNode>) -> Arc<BlockBackend> {
        Arc::new(BlockBackend {
            len: AtomicU64::new(root.len()),
            root,
            slots: Sharded::new(),
            quiesced: AtomicU64::new(0),
            drain: Mutex::new(()),
            requests: CoQueue::new(),
            drainers: CoQueue::new(),
            idle: Condvar::new(),
        })
    }

    /// The root node. Requests made on it directly are neither counted nor drained.
    #[must_use]
    pub fn root(&self) -> &Arc<dyn BlockNode> {
        &self.root
    }

    /// Name of the root node.
    #[must_use]
    pub fn name(&self) -> &str {
        self.root.name()
    }

    /// Size in bytes. It may become larger, never smaller.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len.load(Ordering::SeqCst)
    }

    /// Whether the size is zero.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.root.read_only()
    }

    /// What the root node wants and can do.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.root.limits()
    }

    // ------------------------------------------------------------------------------------------- requests

    /// Counts a request in, or tells that the backend is quiesced.
    fn try_begin(&self) -> Option<InFlight<'_>> {
        let slot = self.slots.get(shard::index());
        slot.in_flight.fetch_add(1, Ordering::SeqCst);
        let counted = InFlight { backend: self, slot };
        // Dropping `counted` takes the count back and tells the drainers.
        (self.quiesced.load(Ordering::SeqCst) == 0).then_some(counted)
    }

    /// Counts a request in; yields while the backend is quiesced.
    fn co_begin(&self) -> InFlight<'_> {
        loop {
            if let Some(r) = self.try_begin() {
                return r;
            }
            co_wait_until(&self.drain, &self.requests, |()| {
                (self.quiesced.load(Ordering::SeqCst) == 0).then_some(())
            });
        }
    }

    #[track_caller]
    fn assert_bounds(&self, offset: u64, len: u64) {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|e| e <= self.len()),
            "request of {len} bytes at {offset} was not validated against {} bytes",
            self.len()
        );
    }

    fn refuse_read_only(&self, op: &'static str, offset: u64) -> Result<()> {
        if self.root.read_only() {
            return Err(Error::from_errno(op, self.root.name(), offset, libc::EPERM));
        }
        Ok(())
    }

    /// Reads all of `buf` if that needs no waiting; `false` also while quiesced. Never yields.
    ///
    /// # Panics
    /// When the range is outside of the node.
    pub fn try_pread(&self, offset: u64, buf: &mut [u8]) -> bool {
        self.try_pread_some(offset, buf) == buf.len()
    }

    /// Reads as much of the front of `buf` as needs no waiting, and returns its length. Never yields.
    ///
    /// # Panics
    /// When the range is outside of the node.
    pub fn try_pread_some(&self, offset: u64, buf: &mut [u8]) -> usize {
        self.assert_bounds(offset, buf.len() as u64);
        if !fast::paths().inline_read {
            return 0;
        }
        let Some(r) = self.try_begin() else { return 0 };
        let n = self.root.try_pread_some(offset, buf);
        assert!(n <= buf.len(), "a node cannot read more than was asked");
        if n == buf.len() {
            add(&r.slot.reads, 1);
            add(&r.slot.inline_reads, 1);
            add(&r.slot.read_bytes, n as u64);
        }
        n
    }

    /// Reads `count` neighbouring requests at once, into `bufs` one after the other, if that needs no waiting; `false`
    /// also while quiesced. Never yields.
    ///
    /// # Panics
    /// When the range is outside of the node.
    pub fn try_preadv(&self, offset: u64, bufs: &mut [IoSliceMut<'_>], count: u64) -> bool {
        let len = iov::total_mut(bufs);
        self.assert_bounds(offset, len as u64);
        if !fast::paths().inline_read {
            return false;
        }
        let Some(r) = self.try_begin() else { return false };
        let done = self.root.try_preadv_some(offset, bufs) == len;
        if done {
            add(&r.slot.reads, count);
            add(&r.slot.inline_reads, count);
            add(&r.slot.read_bytes, len as u64);
        }
        done
    }

    /// Whether `len` bytes, not 0, can be sent from the page cache by [`BlockBackend::try_lend`]; see [`BlockNode::lends`]. False also
    /// while quiesced. If true, the read counts as done; what has to be read after
    /// all counts again. Never yields.
    ///
    /// # Panics
    /// When the range is outside of the node.
    pub fn lends(&self, offset: u64, len: usize, no_holes: bool) -> bool {
        assert!(len > 0, "nothing cannot be lent");
        self.assert_bounds(offset, len as u64);
        let Some(r) = self.try_begin() else { return false };
        let lends = self.root.lends(offset, len, no_holes);
        if lends {
            add(&r.slot.reads, 1);
            add(&r.slot.inline_reads, 1);
            add(&r.slot.read_bytes, len as u64);
        }
        lends
    }

    /// Shows `f` where the front of a range is in a file; see [`BlockNode::try_lend`]. False, and `f` was not called, also while quiesced.
    /// Never yields.
    ///
    /// # Panics
    /// When the range is outside of the node.
    pub fn try_lend(&self, offset: u64, len: usize, f: &mut dyn FnMut(&Lent<'_>)) -> bool {
        assert!(len > 0, "nothing cannot be lent");
        self.assert_bounds(offset, len as u64);
        let Some(_in_flight) = self.try_begin() else { return false };
        self.root.try_lend(offset, len, f)
    }

    /// Writes all of `buf` if that is expected not to wait; `None` when it was not tried. Never yields.
    ///
    /// # Errors
    /// As [`BlockNode::co_pwritev`].
    ///
    /// # Panics
    /// When the range is outside of the node.
    pub fn try_pwrite(&self, offset: u64, buf: &[u8]) -> Option<Result<()>> {
        self.try_pwritev(offset, &[IoSlice::new(buf)])
    }

    /// As [`BlockBackend::try_pwrite`] for neighbouring requests: one buffer each. All of them fail if one does.
    ///
    /// # Errors
    /// As [`BlockNode::co_pwritev`].
    ///
    /// # Panics
    /// When the range is outside of the node.
    pub fn try_pwritev(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Option<Result<()>> {
        let len = iov::total(bufs) as u64;
        self.assert_bounds(offset, len);
        if !fast::paths().inline_write {
            return None;
        }
        if let Err(e) = self.refuse_read_only("pwrite", offset) {
            return Some(Err(e));
        }
        let r = self.try_begin()?;
        let done = self.root.try_pwritev(offset, bufs)?;
        add(&r.slot.writes, bufs.len() as u64);
        add(&r.slot.inline_writes, bufs.len() as u64);
        add(&r.slot.write_bytes, len);
        Some(count_error(r.slot, done))
    }

    /// Fills `bufs` from `offset`. Never short. Coroutine only; yields.
    ///
    /// # Errors
    /// As [`BlockNode::co_preadv`].
    ///
    /// # Panics
    /// When the range is outside of the node.
    pub fn co_preadv(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        let len = iov::total_mut(bufs) as u64;
        self.assert_bounds(offset, len);
        let r = self.co_begin();
        let done = if len == 0 { Ok(()) } else { self.root.co_preadv(offset, bufs) };
        add(&r.slot.reads, 1);
        add(&r.slot.read_bytes, len);
        count_error(r.slot, done)
    }

    /// Writes all of `bufs` at `offset`. Coroutine only; yields.
    ///
    /// # Errors
    /// As [`BlockNode::co_pwritev`]; `EPERM` when the node is read-only.
    ///
    /// # Panics
    /// When the range is outside of the node.
    pub fn co_pwritev(&self, offset: u64, bufs: &[IoSlice<'_>], flags: WriteFlags) -> Result<()> {
        let len = iov::total(bufs) as u64;
        self.assert_bounds(offset, len);
        self.refuse_read_only("pwritev", offset)?;
        let r = self.co_begin();
        let done = if len == 0 { Ok(()) } else { self.root.co_pwritev(offset, bufs, flags) };
        add(&r.slot.writes, 1);
        add(&r.slot.write_bytes, len);
        count_error(r.slot, done)
    }

    /// Makes the range read as zeroes. Coroutine only; yields.
    ///
    /// # Errors
    /// As [`BlockNode::co_pwrite_zeroes`]; `EPERM` when the node is read-only.
    ///
    /// # Panics
    /// When the range is outside of the node.
    pub fn co_pwrite_zeroes(&self, offset: u64, len: u64, flags: WriteFlags) -> Result<()> {
        self.assert_bounds(offset, len);
        self.refuse_read_only("write_zeroes", offset)?;
        let r = self.co_begin();
        let done = if len == 0 { Ok(()) } else { self.root.co_pwrite_zeroes(offset, len, flags) };
        add(&r.slot.zeroes, 1);
        count_error(r.slot, done)
    }

    /// Gives the range up. Coroutine only; yields.
    ///
    /// # Errors
    /// As [`BlockNode::co_pdiscard`]; `EPERM` when the node is read-only.
    ///
    /// # Panics
    /// When the range is outside of the node.
    pub fn co_pdiscard(&self, offset: u64, len: u64) -> Result<()> {
        self.assert_bounds(offset, len);
        self.refuse_read_only("discard", offset)?;
        let r = self.co_begin();
        let done = if len == 0 { Ok(()) } else { self.root.co_pdiscard(offset, len) };
        add(&r.slot.discards, 1);
        count_error(r.slot, done)
    }

    /// Makes all completed writes of all callers durable. Coroutine only; yields.
    ///
    /// # Errors
    /// As [`BlockNode::co_flush`].
    pub fn co_flush(&self) -> Result<()> {
        let r = self.co_begin();
        let done = self.root.co_flush();
        add(&r.slot.flushes, 1);
        count_error(r.slot, done)
    }

    /// Status at `offset` for at most `len` bytes: the first extent, clipped to the question. Coroutine only; yields.
    ///
    /// # Errors
    /// As [`BlockNode::co_block_status`].
    ///
    /// # Panics
    /// When the range is empty or outside of the node.
    pub fn co_block_status(&self, offset: u64, len: u64) -> Result<Extent> {
        assert!(len > 0, "the status of nothing has no answer");
        self.assert_bounds(offset, len);
        let r = self.co_begin();
        let done = self.root.co_block_status(offset, len).map(|e| Extent { len: e.len.min(len), ..e });
        if let Ok(e) = &done {
            assert!(e.len > 0, "extents are not empty");
        }
        add(&r.slot.statuses, 1);
        count_error(r.slot, done)
    }

    /// Which layer holds the data at `offset`: the first extent, clipped to the question. Coroutine only; yields.
    ///
    /// # Errors
    /// As [`BlockNode::co_allocation_depth`].
    ///
    /// # Panics
    /// When the range is empty or outside of the node.
    pub fn co_allocation_depth(&self, offset: u64, len: u64) -> Result<DepthExtent> {
        assert!(len > 0, "the depth of nothing has no answer");
        self.assert_bounds(offset, len);
        let r = self.co_begin();
        let done =
            self.root.co_allocation_depth(offset, len).map(|e| DepthExtent { len: e.len.min(len), ..e });
        if let Ok(e) = &done {
            assert!(e.len > 0, "extents are not empty");
        }
        add(&r.slot.statuses, 1);
        count_error(r.slot, done)
    }

    /// What one of the root node's bitmaps says at `offset`: the first extent, clipped to the question. Coroutine only;
    /// yields.
    ///
    /// # Errors
    /// As [`DirtyBitmap::co_status`].
    ///
    /// # Panics
    /// When the range is empty or outside of the node.
    pub fn co_dirty_status(&self, bitmap: &dyn DirtyBitmap, offset: u64, len: u64) -> Result<DirtyExtent> {
        assert!(len > 0, "the state of nothing has no answer");
        self.assert_bounds(offset, len);
        let r = self.co_begin();
        let done = bitmap.co_status(offset, len).map(|e| DirtyExtent { len: e.len.min(len), ..e });
        if let Ok(e) = &done {
            assert!(e.len > 0, "extents are not empty");
        }
        add(&r.slot.statuses, 1);
        count_error(r.slot, done)
    }

    /// Prefetches the range. Coroutine only; yields.
    ///
    /// # Errors
    /// As [`BlockNode::co_cache`].
    ///
    /// # Panics
    /// When the range is outside of the node.
    pub fn co_cache(&self, offset: u64, len: u64) -> Result<()> {
        self.assert_bounds(offset, len);
        let r = self.co_begin();
        let done = if len == 0 { Ok(()) } else { self.root.co_cache(offset, len) };
        count_error(r.slot, done)
    }

    // ---------------------------------------------------------------------------------------------- drain

    /// Requests begun and not ended. Requests that wait because of a drain do not count.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.slots.iter().map(|s| s.in_flight.load(Ordering::SeqCst)).fold(0, u64::wrapping_add)
    }

    /// Drains that have begun and not ended.
    #[must_use]
    pub fn quiesce_count(&self) -> u64 {
        self.quiesced.load(Ordering::SeqCst)
    }

    /// How many requests wait for the last drain to end.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.requests.len()
    }

    /// Makes new requests wait; does not wait for those in flight ([`BlockBackend::co_wait_idle`] does). Nests.
    /// Any thread; never yields.
    pub fn drain_begin(&self) {
        let before = self.quiesced.fetch_add(1, Ordering::SeqCst);
        assert!(before < u64::from(u32::MAX), "drains end");
    }

    /// Ends one [`BlockBackend::drain_begin`]; after the last one, waiting requests restart in order. Any thread;
    /// never yields, never waits.
    ///
    /// # Panics
    /// Without a drain that has begun.
    pub fn drain_end(&self) {
        let before = self
            .quiesced
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1))
            .expect("a drain ends that had not begun");
        if before == 1 {
            drop(lock(&self.drain));
            self.requests.restart_all();
        }
    }

    /// Waits until no request is in flight; returns at once when there is none. Begin a drain first, or new requests
    /// may keep it waiting. Any IOThread; coroutine only; yields.
    pub fn co_wait_idle(&self) {
        // Without a drain of our own the ends of requests would not look for waiters.
        self.drain_begin();
        co_wait_until(&self.drain, &self.drainers, |()| (self.in_flight() == 0).then_some(()));
        self.drain_end();
    }

    /// Quiesces and waits for what is in flight; the section lasts until the guard is dropped. Any IOThread;
    /// coroutine only; yields.
    #[must_use = "the drained section ends when this is dropped"]
    pub fn co_drained(self: &Arc<Self>) -> Drained {
        self.drain_begin();
        let section = Drained { backend: Arc::clone(self) };
        self.co_wait_idle();
        section
    }

    /// Waits for everything that is in flight now. Any IOThread; coroutine only; yields.
    pub fn co_drain(self: &Arc<Self>) {
        drop(self.co_drained());
    }

    /// Waits in a plain thread until no request is in flight, or `timeout` has passed; `true` when idle. Blocks the
    /// thread: never on an IOThread.
    #[must_use]
    pub fn wait_idle_blocking(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        self.drain_begin();
        let mut state = lock(&self.drain);
        let idle = loop {
            if self.in_flight() == 0 {
                break true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break false;
            }
            state = self.idle.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        };
        drop(state);
        self.drain_end();
        idle
    }

    /// As [`BlockBackend::co_drained`], from a plain thread; `None` when something is still in flight after `timeout`, or
    /// when `give_up` says so, which is asked now and then. Blocks the thread: never on an IOThread.
    pub fn drained_blocking(
        self: &Arc<Self>,
        timeout: Duration,
        give_up: &dyn Fn() -> bool,
    ) -> Option<Drained> {
        let deadline = Instant::now() + timeout;
        self.drain_begin();
        let section = Drained { backend: Arc::clone(self) };
        while !self.wait_idle_blocking(GIVE_UP_STEP) {
            if give_up() || Instant::now() >= deadline {
                return None;
            }
        }
        Some(section)
    }

    /// Takes up a size that the image has got from elsewhere, and makes it at least `at_least` bytes long (0: only looks).
    /// Returns the size; requests are accepted up to it. Drains. Any thread; coroutine only; yields.
    ///
    /// # Errors
    /// As [`BlockNode::co_resize`].
    pub fn co_resize(self: &Arc<Self>, at_least: u64) -> Result<u64> {
        let section = self.co_drained();
        let len = self.root.co_resize(at_least)?;
        // The node first: what is accepted here is in bounds there.
        let before = self.len.fetch_max(len, Ordering::SeqCst);
        assert!(len >= before, "a node never becomes smaller");
        drop(section);
        Ok(len)
    }

    /// A request ended (or took its count back) during a drain.
    #[cold]
    fn kick_drainers(&self) {
        {
            let _looking = lock(&self.drain);
            if self.in_flight() != 0 {
                return;
            }
            self.idle.notify_all();
        }
        self.drainers.restart_all();
    }

    /// What went through since the backend was made; from a running one, slightly old.
    #[must_use]
    pub fn stats(&self) -> BackendStats {
        let sum = |f: fn(&Slot) -> &AtomicU64| self.slots.iter().map(|s| f(s).load(Ordering::Relaxed)).sum();
        BackendStats {
            reads: sum(|s| &s.reads),
            read_bytes: sum(|s| &s.read_bytes),
            inline_reads: sum(|s| &s.inline_reads),
            writes: sum(|s| &s.writes),
            write_bytes: sum(|s| &s.write_bytes),
            inline_writes: sum(|s| &s.inline_writes),
            zeroes: sum(|s| &s.zeroes),
            discards: sum(|s| &s.discards),
            flushes: sum(|s| &s.flushes),
            statuses: sum(|s| &s.statuses),
            errors: sum(|s| &s.errors),
        }
    }
}

/// A drained section of a [`BlockBackend`]: no request is in flight and none begins until it is dropped.
pub struct Drained {
    backend: Arc<BlockBackend>,
}

impl Drop for Drained {
    fn drop(&mut self) {
        self.backend.drain_end();
    }
}

fn add(c: &AtomicU64, n: u64) {
    c.fetch_add(n, Ordering::Relaxed);
}

fn count_error<T>(slot: &Slot, r: Result<T>) -> Result<T> {
    if r.is_err() {
        add(&slot.errors, 1);
    }
    r
}
