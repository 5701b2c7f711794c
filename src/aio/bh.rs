//! Bottom halves: callbacks that run once on the next turn of a context.
//!
//! Any thread may schedule; only the context's own thread runs. Scheduling twice before the run is one run.
//! Everything that other threads hand to a context (bottom halves, one-shot closures, runnables) goes through
//! one lock-free list, in the order of the pushes.

use super::bh_list::Node;
use super::{AioContext, Runnable};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a node of a context's list is.
pub(super) enum Work {
    /// A bottom half; the callback is taken out while it runs, so that it may delete or schedule itself.
    Bh(Mutex<BhSlot>),
    /// A closure that runs once.
    Once(Mutex<Option<Box<dyn FnOnce() + Send>>>),
    /// A runnable, run once.
    Run(Arc<dyn Runnable>),
}

/// The callback of a bottom half.
pub(super) struct BhSlot {
    /// None while it runs, and after the bottom half was deleted.
    callback: Option<Box<dyn FnMut() + Send>>,
    /// Its turn came in a nested poll while it ran: it runs again in a later turn.
    missed: bool,
}

fn lock<T>(slot: &Mutex<T>) -> MutexGuard<'_, T> {
    // Held for a move of a pointer; a panic cannot leave it half done.
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs one taken node; tells whether that made progress.
pub(super) fn run_node(node: &Arc<Node<Work>>, ctx: &Arc<AioContext>) -> bool {
    if !node.begin() {
        return false;
    }
    match &node.payload {
        Work::Bh(slot) => {
            let mut state = lock(slot);
            let Some(mut callback) = state.callback.take() else {
                state.missed = true;
                return false;
            };
            drop(state);
            callback();
            if node.is_deleted() {
                return true;
            }
            let mut state = lock(slot);
            state.callback = Some(callback);
            if std::mem::take(&mut state.missed) {
                drop(state);
                ctx.schedule_node(node);
            }
        }
        Work::Once(slot) => {
            let callback = lock(slot).take();
            if let Some(callback) = callback {
                callback();
            }
        }
        Work::Run(r) => Arc::clone(r).run(ctx),
    }
    true
}

/// A bottom half: a callback that runs once on the next turn of its context after being scheduled.
/// Dropping it deletes it, also from inside its own callback; a run that has begun is not interrupted.
pub struct BottomHalf {
    ctx: Arc<AioContext>,
    node: Arc<Node<Work>>,
}

impl BottomHalf {
    pub(super) fn new(ctx: &Arc<AioContext>, f: Box<dyn FnMut() + Send>) -> BottomHalf {
        BottomHalf {
            ctx: Arc::clone(ctx),
            node: Node::new(Work::Bh(Mutex::new(BhSlot { callback: Some(f), missed: false }))),
        }
    }

    /// Schedules a run. Any thread; scheduling twice before the run is one run. Never yields.
    pub fn schedule(&self) {
        self.ctx.schedule_node(&self.node);
    }

    /// Takes a scheduled run back, if it has not begun. Any thread. Never yields.
    pub fn cancel(&self) {
        self.node.cancel();
    }
}

impl Drop for BottomHalf {
    fn drop(&mut self) {
        self.node.delete();
        if let Work::Bh(slot) = &self.node.payload {
            // A node that is pending lives on until its turn; what its callback captured need not.
            let callback = lock(slot).callback.take();
            drop(callback);
        }
    }
}
