//! Synchronisation primitives of the lock-free kernels (BH list, notifier, CoMutex protocol, epochs and slices of qcow2).
//!
//! Those files import from `crate::util::sync` and from nowhere else, so that `tests/loom` can compile
//! the very same source files against loom's versions: its crate root has a `util::sync` of its own.

pub use std::cell::UnsafeCell;
pub use std::hint::spin_loop;
pub use std::sync::Arc;
pub use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
