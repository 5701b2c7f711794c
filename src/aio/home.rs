//! Thread affinity, checked: what only a context's home thread may touch.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Returns a number that is unique to the calling thread for the life of the process.
///
/// Never inlined: a coroutine may move between two calls, and the address of a thread-local must not be kept.
#[inline(never)]
pub(crate) fn thread_token() -> usize {
    thread_local! {
        static TOKEN: Cell<usize> = const { Cell::new(0) };
    }
    static NEXT: AtomicUsize = AtomicUsize::new(1);
    TOKEN.with(|t| match t.get() {
        0 => {
            let token = NEXT.fetch_add(1, Ordering::Relaxed);
            t.set(token);
            token
        }
        token => token,
    })
}

/// A value that only one thread may use; every access checks that, and that accesses do not nest.
#[derive(Debug)]
pub(crate) struct HomeCell<T> {
    owner: usize,
    value: RefCell<T>,
}

#[expect(unsafe_code, reason = "sharing is sound because every access checks the thread")]
// SAFETY: the RefCell is reached only through `with`, which asserts that the caller is the one owning thread;
// dropping and `get_mut` need exclusive access. `T: Send` because that exclusive owner may be another thread.
unsafe impl<T: Send> Sync for HomeCell<T> {}

impl<T> HomeCell<T> {
    /// Makes a cell owned by the calling thread.
    pub(crate) fn new(value: T) -> HomeCell<T> {
        HomeCell { owner: thread_token(), value: RefCell::new(value) }
    }

    /// Tells whether the calling thread owns the cell.
    pub(crate) fn is_home(&self) -> bool {
        thread_token() == self.owner
    }

    /// Gives access to the value; `f` must not call back into the cell.
    ///
    /// # Panics
    /// Off the owning thread, and when accesses nest: both are bugs of this crate or of its caller.
    #[track_caller]
    pub(crate) fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> R {
        assert!(self.is_home(), "AioContext state used off its home thread");
        f(&mut self.value.borrow_mut())
    }
}
