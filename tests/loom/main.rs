//! Models of the lock-free kernels, checked by loom over all interleavings (bounded preemptions) of the C11 memory model.
//!
//! The kernels are not copied: the same source files are compiled here by path, against the `util::sync` below.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(dead_code, reason = "a model uses a part of its kernel")]

mod bh_list;
mod co_mutex;
mod notifier;
mod sync;

mod util {
    pub(crate) use crate::sync;
}

#[path = "."]
mod kernel {
    #[path = "../../src/aio/bh_list.rs"]
    pub(crate) mod bh_list;
    #[path = "../../src/co/mutex_core.rs"]
    pub(crate) mod mutex_core;
    #[path = "../../src/aio/notifier.rs"]
    pub(crate) mod notifier;
}
