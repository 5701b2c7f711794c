//! Commit: what makes changed metadata durable, for all waiting flushers at once.
//!
//! ```text
//!   1  take what was unlinked, changed L1 entries, changed slices, changed refcounts: copies, in this order
//!   2  write the refcounts                                             (clusters in use count)
//!   3  barrier: data file, then image file                             (data and counts are durable)
//!   4  write slices and L1 entries                                     (pointers)
//!   5  barrier                                                         (pointers are durable)
//!   6  what was unlinked in 1 goes into grace; what is through it is freed
//! ```
//! The order of 1: a pointer that is copied had its cluster counted before it was set, and counts are copied last; an
//! unlinked cluster is noted after its pointer was changed, and noted ones are taken first. So every pointer of 4 has its
//! count in 2, and every cluster of 6 lost its pointer in 4, or in an earlier commit.
//!
//! With nothing changed a flush is one barrier and takes no lock. One commit at a time: who arrives during one shares
//! the next. A failed write leaves everything changed, for the next commit; a failed barrier makes the image
//! read-only for good, since the kernel forgets what it could not write.

use super::node::{Fault, Qcow2Node};
use crate::block::wait::lock;
use crate::block::{BlockNode, Error, Result, WriteFlags};
use crate::co::CoMutex;
use crossbeam_utils::CachePadded;
use std::io::IoSlice;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// What a commit leaves out on purpose: the crash suite must notice each.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Sabotage {
    /// Nothing: the only choice outside of tests.
    #[default]
    None = 0,
    /// The barrier between counts and data on one side and pointers on the other.
    NoBarrierBeforePointers = 1,
    /// The barrier after pointers.
    NoBarrierAfterPointers = 2,
    /// The order of counts and pointers.
    PointersFirst = 3,
    /// The wait until an unlinking is durable before the cluster is free.
    NoQuarantine = 4,
    /// The wait until requests that looked a cluster up have ended.
    NoGrace = 5,
}

/// Pointers changed since the last commit began.
const DIRTY: u8 = 1;
/// A commit is running.
const COMMITTING: u8 = 2;

/// Whether there is anything to commit: [`DIRTY`] and [`COMMITTING`] in one word, so that a flusher sees both at one
/// moment. It says "dirty" before a changed pointer can be seen, and until that pointer is durable.
pub(super) struct DirtyFlag(CachePadded<AtomicU8>);

impl DirtyFlag {
    pub(super) fn new() -> DirtyFlag {
        DirtyFlag(CachePadded::new(AtomicU8::new(0)))
    }

    /// A pointer is about to change. Call it with what changes noted for the next commit, and locked against it. Any
    /// thread.
    pub(super) fn mark(&self) {
        if self.0.load(Ordering::SeqCst) & DIRTY == 0 {
            self.0.fetch_or(DIRTY, Ordering::SeqCst);
        }
    }

    /// Whether every pointer that can be seen is durable.
    pub(super) fn is_clean(&self) -> bool {
        self.0.load(Ordering::SeqCst) == 0
    }

    fn change(&self, f: impl Fn(u8) -> u8) {
        let mut s = self.0.load(Ordering::SeqCst);
        while let Err(now) = self.0.compare_exchange(s, f(s), Ordering::SeqCst, Ordering::SeqCst) {
            s = now;
        }
    }
}

/// See the module's text.
pub(super) struct Commits {
    /// Held by the commit that runs; outer to every other lock of the image.
    gate: CoMutex<()>,
    /// Number of the last commit that has begun.
    begun: AtomicU64,
    /// Number of the last commit that has succeeded.
    done: AtomicU64,
    /// A [`Sabotage`].
    sabotage: AtomicU8,
}

impl Commits {
    pub(super) fn new() -> Commits {
        Commits {
            gate: CoMutex::new(()),
            begun: AtomicU64::new(0),
            done: AtomicU64::new(0),
            sabotage: AtomicU8::new(Sabotage::None as u8),
        }
    }

    /// How many commits have begun.
    pub(super) fn count(&self) -> u64 {
        self.begun.load(Ordering::SeqCst)
    }
}

impl Qcow2Node {
    /// Leaves something out from now on. For the tests of the tests.
    #[doc(hidden)]
    pub fn sabotage(&self, what: Sabotage) {
        self.commits.sabotage.store(what as u8, Ordering::SeqCst);
    }

    pub(super) fn is_sabotaged(&self, what: Sabotage) -> bool {
        self.commits.sabotage.load(Ordering::Relaxed) == what as u8
    }

    /// Makes everything durable that completed before the call. Yields.
    pub(super) fn co_commit(&self) -> Result<()> {
        if self.map.flag.is_clean() {
            return self.co_barrier_all();
        }
        let c = &self.commits;
        // A commit that begins from now on covers us.
        let need = c.begun.load(Ordering::SeqCst) + 1;
        let _gate = c.gate.co_lock();
        if c.done.load(Ordering::SeqCst) >= need {
            return Ok(());
        }
        let number = c.begun.fetch_add(1, Ordering::SeqCst) + 1;
        self.map.flag.change(|s| (s & !DIRTY) | COMMITTING);
        let mut ending = Ending { node: self, ok: false };
        self.co_commit_all()?;
        ending.ok = true;
        drop(ending);
        c.done.store(number, Ordering::SeqCst);
        Ok(())
    }

    fn co_commit_all(&self) -> Result<()> {
        let pending = self.take_pending();
        let l1: Vec<(u64, u64)> = {
            // Entries are noted and changed under this lock.
            let mut changed = lock(&self.l1_dirty);
            std::mem::take(&mut *changed).into_iter().map(|i| (i, self.map.l1_raw(i))).collect()
        };
        let slices = self.map.take_dirty();
        let counts = self.alloc.co_lock().refcounts.take_dirty();

        if self.is_sabotaged(Sabotage::PointersFirst) {
            self.co_write_pointers(&l1, &slices)?;
        }
        let r = self.co_write_counts(&counts).and_then(|()| {
            if self.is_sabotaged(Sabotage::NoBarrierBeforePointers) { Ok(()) } else { self.co_barrier_all() }
        });
        self.alloc.co_lock().refcounts.written(&counts, r.is_ok());
        let r = r.and_then(|()| {
            if l1.is_empty() && slices.is_empty() {
                return Ok(());
            }
            self.co_write_pointers(&l1, &slices)?;
            if self.is_sabotaged(Sabotage::NoBarrierAfterPointers) { Ok(()) } else { self.co_barrier() }
        });
        self.map.written(&slices, r.is_ok());
        if let Err(e) = r {
            lock(&self.l1_dirty).extend(l1.iter().map(|e| e.0));
            for f in pending {
                self.free_later(f);
            }
            return Err(e);
        }
        self.co_begin_grace(pending);
        if let Err(e) = self.co_reclaim() {
            // Everything is durable; some clusters are leaked, or the image has become read-only, loudly.
            tracing::warn!(node = %self.name(), errno = e.errno(), "freed clusters could not be counted down");
        }
        Ok(())
    }

    fn co_write_counts(&self, counts: &[super::refcounts::BlockCopy]) -> Result<()> {
        for b in counts {
            self.co_put(b.host, &b.bytes)?;
        }
        Ok(())
    }

    fn co_write_pointers(&self, l1: &[(u64, u64)], slices: &[super::l2::SliceCopy]) -> Result<()> {
        for s in slices {
            self.co_put(s.host, &s.bytes)?;
        }
        // Eight aligned bytes each: never torn.
        let table = self.l1_offset.load(Ordering::SeqCst);
        for (index, raw) in l1 {
            self.co_put(table + index * 8, &raw.to_be_bytes())?;
        }
        Ok(())
    }

    fn co_put(&self, host: u64, bytes: &[u8]) -> Result<()> {
        super::io::co_write(&*self.file, host, &[IoSlice::new(bytes)], WriteFlags::empty())
    }

    /// Barrier of the image file. Yields.
    pub(super) fn co_barrier(&self) -> Result<()> {
        self.file.co_flush().inspect_err(|e| self.poison(e))
    }

    /// Barrier of the data file, if there is one, and of the image file. Yields.
    pub(super) fn co_barrier_all(&self) -> Result<()> {
        if let Some(data) = &self.data_file {
            data.co_flush().inspect_err(|e| self.poison(e))?;
        }
        self.co_barrier()
    }

    /// A barrier has failed, or a write that changes everything: nobody knows what is on the disk.
    pub(super) fn poison(&self, e: &Error) {
        if self.set_fault(Fault::Poisoned) {
            tracing::error!(
                node = %self.name(),
                errno = e.errno(),
                "the image could not be made durable: it is read-only from now on, and flushes fail; check it before it is used again"
            );
        }
    }
}

/// Ends the commit, also when it unwinds.
struct Ending<'a> {
    node: &'a Qcow2Node,
    ok: bool,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        let ok = self.ok;
        self.node.map.flag.change(|s| (s & !COMMITTING) | if ok { 0 } else { DIRTY });
    }
}
