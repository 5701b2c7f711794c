//! The wake-up protocol of a context: who must write the eventfd, and who need not.
//!
//! ```text
//! any thread:   publish work; notify()                home: begin_block(); look at the work; block; end_block()
//!                 fence                                     notify_me = 1
//!                 notified already set? nothing to do       fence
//!                 notified = true                           notified? then do not block
//!                 fence
//!                 notify_me? write the eventfd         home: accept(): notified = false; fence; look at the work
//! ```
//!
//! Two Dekker patterns: either the notifier sees that the loop has announced that it will block, or the loop
//! sees `notified`; and whoever skips its turn because `notified` is set published before the loop cleared it,
//! so the loop's look at the work, after the clearing, finds it. `tests/loom` compiles this very file and
//! checks both, and that leaving out either fence of either pattern is found.
//!
//! This is a kernel: it imports only [`crate::util::sync`], and does no I/O.

use crate::util::sync::{AtomicBool, AtomicU32, Ordering, fence};

/// The flags of the protocol. Whoever gets `true` from [`Notifier::notify`] writes the eventfd.
#[derive(Debug)]
pub(crate) struct Notifier {
    /// How many (nested) polls of the home thread have announced that they will block.
    notify_me: AtomicU32,
    /// Set by notifiers, cleared by the home thread before it looks for work.
    notified: AtomicBool,
}

impl Notifier {
    /// Makes one whose loop is running and has not been notified.
    pub(crate) fn new() -> Notifier {
        Notifier { notify_me: AtomicU32::new(0), notified: AtomicBool::new(false) }
    }

    /// Notes that there is work, which the caller has published already; tells whether the caller must wake
    /// the loop with a system call. Any thread.
    #[must_use]
    pub(crate) fn notify(&self) -> bool {
        // Pairs with the fence in `accept`: if we find `notified` set, the loop has yet to clear it, and will
        // see the caller's work after that.
        fence(Ordering::SeqCst);
        if self.notified.swap(true, Ordering::Relaxed) {
            return false;
        }
        // Pairs with the fence in `begin_block`: we see `notify_me`, or the loop sees `notified`.
        fence(Ordering::SeqCst);
        self.notify_me.load(Ordering::Relaxed) != 0
    }

    /// Announces that the loop will block; false if it was notified and must not. Home thread.
    ///
    /// Always followed by [`Notifier::end_block`].
    #[must_use]
    pub(crate) fn begin_block(&self) -> bool {
        self.notify_me.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        !self.notified.load(Ordering::Relaxed)
    }

    /// The loop runs again. Home thread.
    pub(crate) fn end_block(&self) {
        self.notify_me.fetch_sub(1, Ordering::Release);
    }

    /// Takes the notification, if there is one; the home thread looks for published work afterwards.
    /// Returns whether there was one.
    pub(crate) fn accept(&self) -> bool {
        if !self.notified.load(Ordering::Relaxed) {
            return false;
        }
        self.notified.store(false, Ordering::Relaxed);
        // Pairs with the first fence in `notify`.
        fence(Ordering::SeqCst);
        true
    }

    /// Tells whether a notification waits; what a busy-polling loop looks at. Home thread.
    pub(crate) fn is_notified(&self) -> bool {
        self.notified.load(Ordering::Relaxed)
    }
}
