//! DetectZeroesNode: a filter that turns writes of nothing but zeroes into zeroing (QEMU's `detect-zeroes`).
//!
//! Costs a look at every written byte, which a first byte that is not zero cuts short. Stateless; any thread.

use super::{BlockNode, DepthExtent, DirtyBitmap, Extent, Lent, Limits, Result, WriteFlags, iov};
use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;

/// What is done with a write of zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DetectZeroes {
    /// It is written.
    #[default]
    Off,
    /// The range is zeroed, and keeps its space.
    On,
    /// The range is zeroed, and may give its space back.
    Unmap,
}

impl DetectZeroes {
    /// All of them, with their names.
    pub const ALL: [(&'static str, DetectZeroes); 3] =
        [("off", DetectZeroes::Off), ("on", DetectZeroes::On), ("unmap", DetectZeroes::Unmap)];
}

/// The filter. See the module's text.
pub struct DetectZeroesNode {
    child: Arc<dyn BlockNode>,
    flags: WriteFlags,
}

impl DetectZeroesNode {
    /// Puts the filter before `child`; with `Off` there is none.
    #[must_use]
    pub fn wrap(child: Arc<dyn BlockNode>, mode: DetectZeroes) -> Arc<dyn BlockNode> {
        let flags = match mode {
            DetectZeroes::Off => return child,
            DetectZeroes::On => WriteFlags::empty(),
            DetectZeroes::Unmap => WriteFlags::MAY_UNMAP,
        };
        Arc::new(DetectZeroesNode { child, flags })
    }
}

fn is_zero(buf: &[u8]) -> bool {
    // In pieces: the compiler makes wide compares of them, and data ends the look early.
    buf.chunks(256).all(|piece| piece.iter().fold(0, |or, b| or | b) == 0)
}

impl BlockNode for DetectZeroesNode {
    fn name(&self) -> &str {
        self.child.name()
    }

    fn len(&self) -> u64 {
        self.child.len()
    }

    fn read_only(&self) -> bool {
        self.child.read_only()
    }

    fn limits(&self) -> Limits {
        self.child.limits()
    }

    fn try_pread_some(&self, offset: u64, buf: &mut [u8]) -> usize {
        self.child.try_pread_some(offset, buf)
    }

    fn lends(&self, offset: u64, len: usize, no_holes: bool) -> bool {
        self.child.lends(offset, len, no_holes)
    }

    fn try_lend(&self, offset: u64, len: usize, f: &mut dyn FnMut(&Lent<'_>)) -> bool {
        self.child.try_lend(offset, len, f)
    }

    fn try_pwrite(&self, offset: u64, buf: &[u8]) -> Option<Result<()>> {
        // Zeroing may wait.
        if is_zero(buf) { None } else { self.child.try_pwrite(offset, buf) }
    }

    fn co_preadv(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.child.co_preadv(offset, bufs)
    }

    fn co_pwritev(&self, offset: u64, bufs: &[IoSlice<'_>], flags: WriteFlags) -> Result<()> {
        let len = iov::total(bufs) as u64;
        if len > 0 && bufs.iter().all(|buf| is_zero(buf)) {
            return self.child.co_pwrite_zeroes(offset, len, self.flags | (flags & WriteFlags::FUA));
        }
        self.child.co_pwritev(offset, bufs, flags)
    }

    fn co_pwrite_zeroes(&self, offset: u64, len: u64, flags: WriteFlags) -> Result<()> {
        self.child.co_pwrite_zeroes(offset, len, flags)
    }

    fn co_pdiscard(&self, offset: u64, len: u64) -> Result<()> {
        self.child.co_pdiscard(offset, len)
    }

    fn grows(&self) -> bool {
        self.child.grows()
    }

    fn co_truncate(&self, len: u64) -> Result<()> {
        self.child.co_truncate(len)
    }

    fn co_resize(&self, at_least: u64) -> Result<u64> {
        self.child.co_resize(at_least)
    }

    fn co_flush(&self) -> Result<()> {
        self.child.co_flush()
    }

    fn co_block_status(&self, offset: u64, len: u64) -> Result<Extent> {
        self.child.co_block_status(offset, len)
    }

    fn co_cache(&self, offset: u64, len: u64) -> Result<()> {
        self.child.co_cache(offset, len)
    }

    fn co_allocation_depth(&self, offset: u64, len: u64) -> Result<DepthExtent> {
        self.child.co_allocation_depth(offset, len)
    }

    fn dirty_bitmaps(&self) -> Vec<Arc<dyn DirtyBitmap>> {
        self.child.dirty_bitmaps()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_anywhere_is_seen() {
        for len in [1, 255, 256, 257, 4096, 4097] {
            let mut buf = vec![0; len];
            assert!(is_zero(&buf));
            for at in [0, len / 2, len - 1] {
                buf[at] = 1;
                assert!(!is_zero(&buf), "byte {at} of {len}");
                buf[at] = 0;
            }
        }
    }
}
