//! CoRwLock: ticket-fair readers and writers (QEMU 6.0 and later).

use std::marker::PhantomData;

/// A readers-writer lock for coroutines.
pub struct CoRwLock<T> {
    _d: PhantomData<T>,
}
/// Holds a [`CoRwLock`] for reading.
pub struct CoRwLockReadGuard<'a, T> {
    _l: &'a CoRwLock<T>,
}
/// Holds a [`CoRwLock`] for writing.
pub struct CoRwLockWriteGuard<'a, T> {
    _l: &'a CoRwLock<T>,
}
