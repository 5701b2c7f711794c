//! NullNode: reads zeroes and forgets writes; for measuring everything above it.
//!
//! Stateless: any thread, no lock. With a latency every `co_` request sleeps that long on its context's timers, and
//! nothing is served inline.

use super::{BlockNode, Extent, Limits, Result, StatusFlags, WriteFlags, iov};
use crate::co;
use std::io::{IoSlice, IoSliceMut};

/// A node of any size with nothing behind it.
pub struct NullNode {
    name: String,
    len: u64,
    latency_ns: u64,
    read_only: bool,
}

impl NullNode {
    /// Makes a node of `len` bytes that answers at once.
    #[must_use]
    pub fn new(name: &str, len: u64) -> NullNode {
        NullNode { name: name.to_owned(), len, latency_ns: 0, read_only: false }
    }

    /// Makes every request take `ns` nanoseconds.
    #[must_use]
    pub fn with_latency(self, ns: u64) -> NullNode {
        NullNode { latency_ns: ns, ..self }
    }

    /// Refuses writes.
    #[must_use]
    pub fn with_read_only(self, read_only: bool) -> NullNode {
        NullNode { read_only, ..self }
    }

    fn co_delay(&self) {
        if self.latency_ns > 0 {
            co::co_sleep_ns(self.latency_ns);
        }
    }
}

impl BlockNode for NullNode {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn limits(&self) -> Limits {
        Limits { request_alignment: 1, preferred: 4096, fast_zero: true, rotational: false }
    }

    fn try_pread_some(&self, _offset: u64, buf: &mut [u8]) -> usize {
        if self.latency_ns > 0 {
            return 0;
        }
        buf.fill(0);
        buf.len()
    }

    fn try_pwrite(&self, _offset: u64, _buf: &[u8]) -> Option<Result<()>> {
        (self.latency_ns == 0).then_some(Ok(()))
    }

    fn co_preadv(&self, _offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.co_delay();
        iov::zero_from(bufs, 0);
        Ok(())
    }

    fn co_pwritev(&self, _offset: u64, _bufs: &[IoSlice<'_>], _flags: WriteFlags) -> Result<()> {
        self.co_delay();
        Ok(())
    }

    fn co_pwrite_zeroes(&self, _offset: u64, _len: u64, _flags: WriteFlags) -> Result<()> {
        self.co_delay();
        Ok(())
    }

    fn co_pdiscard(&self, _offset: u64, _len: u64) -> Result<()> {
        self.co_delay();
        Ok(())
    }

    fn co_flush(&self) -> Result<()> {
        self.co_delay();
        Ok(())
    }

    fn co_block_status(&self, _offset: u64, len: u64) -> Result<Extent> {
        self.co_delay();
        Ok(Extent { len, flags: StatusFlags::ZERO })
    }
}
