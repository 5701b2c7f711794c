//! The lock-free list through which any thread hands work to a context.
//!
//! Pushing is a compare-and-swap on the head; taking is one swap of the whole list, which avoids ABA. A node is
//! in at most one list, at most once: its `PENDING` flag is set by whoever pushes it and cleared by the home
//! thread when the node's turn comes. Scheduling a node that is pending only sets `SCHEDULED`.
//!
//! This is a kernel: it imports only [`crate::util::sync`], and `tests/loom` compiles this very file.

use crate::util::sync::{Arc, AtomicPtr, AtomicU32, Ordering};
use std::collections::VecDeque;
use std::ptr;

/// The node is in the list, or taken from it and waiting for its turn.
pub(crate) const PENDING: u32 = 1;
/// The node wants to run when its turn comes.
pub(crate) const SCHEDULED: u32 = 2;
/// The node was deleted: it never runs again.
pub(crate) const DELETED: u32 = 4;

/// One schedulable thing.
pub(crate) struct Node<T> {
    flags: AtomicU32,
    /// Written by the thread that set `PENDING`, before the push; read by the home thread after the take.
    next: AtomicPtr<Node<T>>,
    /// What it is; the list does not look at it.
    pub(crate) payload: T,
}

impl<T> Node<T> {
    /// Makes a node that is in no list.
    pub(crate) fn new(payload: T) -> Arc<Node<T>> {
        Arc::new(Node { flags: AtomicU32::new(0), next: AtomicPtr::new(ptr::null_mut()), payload })
    }

    /// Unschedules: the node stays where it is, but does not run. Any thread.
    pub(crate) fn cancel(&self) {
        self.flags.fetch_and(!SCHEDULED, Ordering::AcqRel);
    }

    /// Unschedules for good. Any thread.
    pub(crate) fn delete(&self) {
        self.flags.fetch_or(DELETED, Ordering::AcqRel);
    }

    /// Tells whether [`Node::delete`] was called.
    pub(crate) fn is_deleted(&self) -> bool {
        self.flags.load(Ordering::Acquire) & DELETED != 0
    }

    /// Begins the node's turn: from here on a schedule pushes it again. Returns whether it is to run.
    ///
    /// Home thread, once for every node that [`BhList::take`] gave. Acquires what schedulers published.
    pub(crate) fn begin(&self) -> bool {
        let old = self.flags.fetch_and(!(PENDING | SCHEDULED), Ordering::AcqRel);
        old & (SCHEDULED | DELETED) == SCHEDULED
    }
}

/// The list head.
pub(crate) struct BhList<T> {
    head: AtomicPtr<Node<T>>,
}

impl<T> BhList<T> {
    /// Makes an empty list.
    pub(crate) fn new() -> BhList<T> {
        BhList { head: AtomicPtr::new(ptr::null_mut()) }
    }

    /// Schedules `node`. Any thread. The caller then notifies the context, whatever this returns: another
    /// thread may have marked the node and not yet pushed it. Returns whether this call pushed.
    pub(crate) fn schedule(&self, node: &Arc<Node<T>>) -> bool {
        // Release: what the caller did before is seen by the callback (Acquire in `begin`).
        let old = node.flags.fetch_or(PENDING | SCHEDULED, Ordering::AcqRel);
        if old & PENDING != 0 {
            return false;
        }
        self.push(Arc::clone(node));
        true
    }

    /// Schedules a fresh node that runs once. Any thread; the caller then notifies the context.
    pub(crate) fn schedule_new(&self, payload: T) {
        let node = Node::new(payload);
        node.flags.store(PENDING | SCHEDULED, Ordering::Relaxed);
        self.push(node);
    }

    fn push(&self, node: Arc<Node<T>>) {
        let raw = Arc::into_raw(node).cast_mut();
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            #[expect(unsafe_code, reason = "the list owns the reference that `raw` came from")]
            // SAFETY: `raw` is a live node: the list's reference count was just turned into it. `next` is an atomic.
            let next = unsafe { &(*raw).next };
            next.store(head, Ordering::Relaxed);
            // Release: the taker sees the node and its `next` (Acquire in `take`).
            match self.head.compare_exchange_weak(head, raw, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }

    /// Tells whether nothing is in the list. Exact only for what the caller itself pushed.
    pub(crate) fn is_empty(&self) -> bool {
        self.head.load(Ordering::Relaxed).is_null()
    }

    /// Moves the whole list to the end of `out`, oldest first. Home thread.
    pub(crate) fn take(&self, out: &mut VecDeque<Arc<Node<T>>>) {
        let mut raw: *const Node<T> = self.head.swap(ptr::null_mut(), Ordering::Acquire);
        let start = out.len();
        while !raw.is_null() {
            #[expect(unsafe_code, reason = "takes back the reference that `push` gave to the list")]
            // SAFETY: every pointer in the list came from `Arc::into_raw` in `push`, and the swap made us its only owner.
            let node = unsafe { Arc::from_raw(raw) };
            raw = node.next.load(Ordering::Relaxed);
            out.push_back(node);
        }
        out.make_contiguous()[start..].reverse();
    }
}

impl<T> Drop for BhList<T> {
    fn drop(&mut self) {
        self.take(&mut VecDeque::new());
    }
}
