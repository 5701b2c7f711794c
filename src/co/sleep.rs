//! Sleeping on the context's timers.

/// Sleeps `ns` nanoseconds on the current context's clock. Coroutine only.
pub fn co_sleep_ns(_ns: u64) {
    todo!()
}

/// A wakeable sleep; clones name the same one.
#[derive(Clone, Default)]
pub struct CoSleep {
    _private: (),
}

impl CoSleep {
    /// Makes one that nobody sleeps on.
    #[must_use]
    pub fn new() -> CoSleep {
        todo!()
    }

    /// Sleeps until [`CoSleep::wake`] or for `ns` nanoseconds (None: until woken). Coroutine only.
    pub fn co_sleep(&self, _ns: Option<u64>) {
        todo!()
    }

    /// Wakes the sleeper, if any; idempotent. Home context only.
    pub fn wake(&self) {
        todo!()
    }
}
