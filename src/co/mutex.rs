//! CoMutex: fair hand-over between coroutines of any contexts.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// A mutex that makes coroutines wait, not threads.
pub struct CoMutex<T> {
    _data: PhantomData<T>,
}

impl<T> CoMutex<T> {
    /// Makes a free mutex around `data`.
    pub fn new(_data: T) -> CoMutex<T> {
        todo!()
    }

    /// Locks; yields while another holds it. Coroutine only.
    pub fn co_lock(&self) -> CoMutexGuard<'_, T> {
        todo!()
    }

    /// Locks if that needs no waiting. Coroutine only.
    pub fn try_lock(&self) -> Option<CoMutexGuard<'_, T>> {
        todo!()
    }

    /// # Panics
    /// Unless the current coroutine holds the lock.
    pub fn assert_locked(&self) {
        todo!()
    }
}

/// Holds a [`CoMutex`]; unlocks on drop.
pub struct CoMutexGuard<'a, T> {
    _m: &'a CoMutex<T>,
}

impl<T> Deref for CoMutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        todo!()
    }
}

impl<T> DerefMut for CoMutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        todo!()
    }
}
