//! WaiterSlot: a place where at most one coroutine waits, to be taken out by whoever wakes it.
//!
//! Any thread may put and take; each put is taken exactly once. The one who takes has the duty to wake.

use super::coroutine::{Coroutine, Inner};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, Ordering};

/// At most one waiting coroutine.
#[derive(Default)]
pub(super) struct WaiterSlot(AtomicPtr<Inner>);

impl WaiterSlot {
    pub(super) const fn new() -> WaiterSlot {
        WaiterSlot(AtomicPtr::new(ptr::null_mut()))
    }

    /// Puts a waiter in; gives it back when the slot is taken.
    pub(super) fn put(&self, co: Coroutine) -> Result<(), Coroutine> {
        let raw = Arc::into_raw(co.into_inner()).cast_mut();
        // AcqRel: pairs with `take`, so that a waker that came before is seen by the re-check after this.
        match self.0.compare_exchange(ptr::null_mut(), raw, Ordering::AcqRel, Ordering::Relaxed) {
            Ok(_) => Ok(()),
            Err(_) => Err(from_raw(raw)),
        }
    }

    /// Takes the waiter out, if there is one.
    pub(super) fn take(&self) -> Option<Coroutine> {
        let raw = self.0.swap(ptr::null_mut(), Ordering::AcqRel);
        (!raw.is_null()).then(|| from_raw(raw))
    }

    /// Tells whether somebody waits.
    pub(super) fn is_taken(&self) -> bool {
        !self.0.load(Ordering::Acquire).is_null()
    }
}

#[expect(unsafe_code, reason = "reverses Arc::into_raw")]
fn from_raw(raw: *mut Inner) -> Coroutine {
    // SAFETY: `raw` came from `Arc::into_raw` in `put`, and whoever got it out of the slot owns that count.
    Coroutine::from_inner(unsafe { Arc::from_raw(raw) })
}

impl Drop for WaiterSlot {
    fn drop(&mut self) {
        drop(self.take());
    }
}
