//! Models of the lock-free kernels, checked by loom over all interleavings (bounded preemptions) of the C11 memory model.
//!
//! The kernels are not copied: the same source files are compiled here by path, against the `util::sync` below.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(dead_code, reason = "a model uses a part of its kernel")]

mod bh_list;
mod co_mutex;
mod epoch;
mod notifier;
mod seq;
mod sync;

mod util {
    pub(crate) use crate::sync;
}

mod block {
    /// `block::shard` with two slots; every loom thread has one of its own.
    pub(crate) mod shard {
        use crate::sync::AtomicU64;

        pub(crate) struct Sharded<T>([T; 2]);

        impl Sharded<[AtomicU64; 2]> {
            pub(crate) fn new() -> Self {
                let slot = || [AtomicU64::new(0), AtomicU64::new(0)];
                Sharded([slot(), slot()])
            }
        }

        impl<T> Sharded<T> {
            pub(crate) fn get(&self, index: usize) -> &T {
                &self.0[index]
            }

            pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
                self.0.iter()
            }
        }

        pub(crate) fn index() -> usize {
            use loom::sync::atomic::{AtomicUsize, Ordering};
            loom::lazy_static! {
                static ref NEXT: AtomicUsize = AtomicUsize::new(0);
            }
            loom::thread_local! {
                static INDEX: usize = NEXT.fetch_add(1, Ordering::Relaxed) % 2;
            }
            INDEX.with(|i| *i)
        }
    }
}

#[path = "."]
mod kernel {
    #[path = "../../src/aio/bh_list.rs"]
    pub(crate) mod bh_list;
    #[path = "../../src/block/qcow2/epoch.rs"]
    pub(crate) mod epoch;
    #[path = "../../src/co/mutex_core.rs"]
    pub(crate) mod mutex_core;
    #[path = "../../src/aio/notifier.rs"]
    pub(crate) mod notifier;
    #[path = "../../src/block/qcow2/seq.rs"]
    pub(crate) mod seq;
}
