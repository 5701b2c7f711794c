//! Page-aligned, pooled I/O buffers.
//!
//! Every buffer is aligned to [`ALIGN`] so that it can be used with `O_DIRECT`. Freed buffers return to a
//! small free list of the freeing thread, by power-of-two size class; what does not fit goes back to the
//! allocator, so memory stays bounded.

use std::ops::{Deref, DerefMut};

/// Alignment of every pooled buffer, in bytes (ours: covers any logical block size in use).
pub const ALIGN: usize = 4096;

/// A page-aligned byte buffer; its length is what was asked for, its capacity may be larger.
pub struct IoBuf {
    ptr: std::ptr::NonNull<u8>,
    len: usize,
    cap: usize,
}

impl IoBuf {
    /// Takes a buffer of `len` bytes; the contents are zeroed only when it is fresh from the allocator.
    #[must_use]
    pub fn new(len: usize) -> IoBuf {
        let _ = len;
        todo!("owner: block helper")
    }

    /// Takes a buffer of `len` bytes that reads as zeroes.
    #[must_use]
    pub fn zeroed(len: usize) -> IoBuf {
        let mut b = IoBuf::new(len);
        b.fill(0);
        b
    }

    /// Shortens the buffer to `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Bytes that the allocation holds.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.cap
    }
}

impl Deref for IoBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        let _ = (self.ptr, self.len);
        todo!("owner: block helper")
    }
}

impl DerefMut for IoBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        todo!("owner: block helper")
    }
}
