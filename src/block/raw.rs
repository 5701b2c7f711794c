//! RawNode: a window of another node, byte for byte; and the guard of a probed raw image's first sector.
//!
//! Stateless but for the guard and the size, which follows the child's end if no end was given: requests are shifted and forwarded. Errors name the child and the child's offset.
//!
//! The guard (only when the format was probed, see [`mod@super::probe`]) looks at writes that touch the first sector:
//! what the sector would be after the write must still probe as raw. Such writes hold a CoMutex from the look to the
//! end of the write, or two small writes could each bring half a signature.

use super::probe::{PROBE_LEN, probe};
use super::{
    BlockNode, DepthExtent, DirtyBitmap, DirtyExtent, Error, Extent, Lent, Limits, Result, StatusFlags,
    WriteFlags, iov,
};
use crate::co::CoMutex;
use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A window of another node. Any thread.
pub struct RawNode {
    name: String,
    child: Arc<dyn BlockNode>,
    offset: u64,
    /// Changes by `co_resize` only.
    len: AtomicU64,
    /// The window reaches to the child's end, also when that moves.
    open_ended: bool,
    /// Serialises writes to the first sector; `None` when the user chose the format.
    guard: Option<CoMutex<()>>,
    /// The window may end past the child's end, in zeroes.
    padded: bool,
}

impl RawNode {
    /// Shows bytes `offset..offset + len` of `child` (`len` `None`: to its end).
    ///
    /// # Errors
    /// `EINVAL` when the window is not inside of the child.
    pub fn new(name: &str, child: Arc<dyn BlockNode>, offset: u64, len: Option<u64>) -> Result<RawNode> {
        let inside = child.len().checked_sub(offset).filter(|&room| len.is_none_or(|l| l <= room));
        let Some(room) = inside else {
            return Err(Error::from_errno("open window", child.name(), offset, libc::EINVAL));
        };
        Ok(RawNode {
            name: name.to_owned(),
            child,
            offset,
            len: AtomicU64::new(len.unwrap_or(room)),
            open_ended: len.is_none(),
            guard: None,
            padded: false,
        })
    }

    /// As [`RawNode::new`], of a child whose size is first rounded up to a multiple of `unit` bytes: the rest reads as
    /// zeroes, and a write to it makes the child longer. That is how QEMU shows files, in sectors of 512 bytes.
    ///
    /// # Errors
    /// `EINVAL` when the window is not inside of that.
    ///
    /// # Panics
    /// When the child does not grow.
    pub fn rounded_up(
        name: &str,
        child: Arc<dyn BlockNode>,
        unit: u64,
        offset: u64,
        len: Option<u64>,
    ) -> Result<RawNode> {
        assert!(child.grows(), "what is written past the end must have a place");
        let shown = child.len().next_multiple_of(unit);
        let inside = shown.checked_sub(offset).filter(|&room| len.is_none_or(|l| l <= room));
        let Some(room) = inside else {
            return Err(Error::from_errno("open window", child.name(), offset, libc::EINVAL));
        };
        let len = AtomicU64::new(len.unwrap_or(room));
        Ok(RawNode {
            name: name.to_owned(),
            child,
            offset,
            len,
            open_ended: false,
            guard: None,
            padded: true,
        })
    }

    /// How much of a range of the window the child has.
    fn in_child(&self, offset: u64, len: u64) -> u64 {
        if self.padded { len.min(self.child.len().saturating_sub(self.offset + offset)) } else { len }
    }

    /// Refuses writes that would make the first sector look like another format.
    #[must_use]
    pub fn with_probe_guard(self) -> RawNode {
        RawNode { guard: Some(CoMutex::new(())), ..self }
    }

    fn assert_bounds(&self, offset: u64, len: u64) {
        assert!(offset.checked_add(len).is_some_and(|e| e <= self.len()), "the range was validated above");
    }

    fn guarded(&self, offset: u64) -> Option<&CoMutex<()>> {
        if offset < PROBE_LEN as u64 { self.guard.as_ref() } else { None }
    }

    /// Whether the first sector would still be raw with these bytes at `offset`.
    fn co_stays_raw(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Result<bool> {
        let mut head = [0u8; PROBE_LEN];
        let head = &mut head[..PROBE_LEN.min(self.len() as usize)];
        let from = offset as usize;
        let n = iov::total(bufs).min(head.len() - from);
        if n < head.len() {
            self.child.co_preadv(self.offset, &mut [IoSliceMut::new(head)])?;
        }
        iov::gather(bufs, 0, &mut head[from..from + n]);
        Ok(probe(head).is_none())
    }
}

impl BlockNode for RawNode {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> u64 {
        self.len.load(Ordering::SeqCst)
    }

    fn read_only(&self) -> bool {
        self.child.read_only()
    }

    fn limits(&self) -> Limits {
        self.child.limits()
    }

    fn try_pread_some(&self, offset: u64, buf: &mut [u8]) -> usize {
        self.assert_bounds(offset, buf.len() as u64);
        self.child.try_pread_some(self.offset + offset, buf)
    }

    fn try_preadv_some(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> usize {
        self.assert_bounds(offset, iov::total_mut(bufs) as u64);
        self.child.try_preadv_some(self.offset + offset, bufs)
    }

    fn lends(&self, offset: u64, len: usize, no_holes: bool) -> bool {
        self.assert_bounds(offset, len as u64);
        self.child.lends(self.offset + offset, len, no_holes)
    }

    fn try_lend(&self, offset: u64, len: usize, f: &mut dyn FnMut(&Lent<'_>)) -> bool {
        self.assert_bounds(offset, len as u64);
        self.child.try_lend(self.offset + offset, len, f)
    }

    fn try_pwrite(&self, offset: u64, buf: &[u8]) -> Option<Result<()>> {
        self.try_pwritev(offset, &[IoSlice::new(buf)])
    }

    fn try_pwritev(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Option<Result<()>> {
        self.assert_bounds(offset, iov::total(bufs) as u64);
        if self.guarded(offset).is_some() {
            return None;
        }
        self.child.try_pwritev(self.offset + offset, bufs)
    }

    fn co_preadv(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.assert_bounds(offset, iov::total_mut(bufs) as u64);
        self.child.co_preadv(self.offset + offset, bufs)
    }

    fn co_pwritev(&self, offset: u64, bufs: &[IoSlice<'_>], flags: WriteFlags) -> Result<()> {
        self.assert_bounds(offset, iov::total(bufs) as u64);
        let Some(guard) = self.guarded(offset) else {
            return self.child.co_pwritev(self.offset + offset, bufs, flags);
        };
        let held = guard.co_lock();
        if !self.co_stays_raw(offset, bufs)? {
            tracing::warn!(
                node = %self.name,
                offset,
                "write refused: it would put another format's signature into the first sector of an image whose \
                 format was probed; open it with the format raw to allow it"
            );
            return Err(Error::from_errno("pwritev", &self.name, offset, libc::EPERM));
        }
        let r = self.child.co_pwritev(self.offset + offset, bufs, flags);
        drop(held);
        r
    }

    fn co_pwrite_zeroes(&self, offset: u64, len: u64, flags: WriteFlags) -> Result<()> {
        self.assert_bounds(offset, len);
        // Under the guard too: a zeroing between another write's look and its end would make that look stale.
        let held = self.guarded(offset).map(CoMutex::co_lock);
        if held.is_some() {
            let zeroes = [0u8; PROBE_LEN];
            let n = len.min(PROBE_LEN as u64 - offset) as usize;
            if !self.co_stays_raw(offset, &[IoSlice::new(&zeroes[..n])])? {
                tracing::warn!(node = %self.name, offset, "zeroing refused: it would complete another format's signature");
                return Err(Error::from_errno("write_zeroes", &self.name, offset, libc::EPERM));
            }
        }
        let r = self.child.co_pwrite_zeroes(self.offset + offset, len, flags);
        drop(held);
        r
    }

    fn co_pdiscard(&self, offset: u64, len: u64) -> Result<()> {
        self.assert_bounds(offset, len);
        if self.guarded(offset).is_some() {
            // The discarded sector may read as anything it held or zeroes: leave it out, discard is advisory.
            let skip = PROBE_LEN as u64 - offset;
            if len <= skip {
                return Ok(());
            }
            let (offset, len) = (offset + skip, self.in_child(offset + skip, len - skip));
            return if len == 0 { Ok(()) } else { self.child.co_pdiscard(self.offset + offset, len) };
        }
        match self.in_child(offset, len) {
            0 => Ok(()),
            len => self.child.co_pdiscard(self.offset + offset, len),
        }
    }

    fn co_flush(&self) -> Result<()> {
        self.child.co_flush()
    }

    fn co_close(&self) -> Result<()> {
        self.child.co_close()
    }

    fn co_resize(&self, at_least: u64) -> Result<u64> {
        let below = self.child.co_resize(at_least)?;
        if self.open_ended {
            self.len.fetch_max(below.saturating_sub(self.offset), Ordering::SeqCst);
        }
        Ok(self.len())
    }

    fn is_format(&self) -> bool {
        self.child.is_format()
    }

    fn co_block_status(&self, offset: u64, len: u64) -> Result<Extent> {
        self.assert_bounds(offset, len);
        match self.in_child(offset, len) {
            0 => Ok(Extent { len, flags: StatusFlags::ZERO }),
            inside => self.child.co_block_status(self.offset + offset, inside),
        }
    }

    fn co_cache(&self, offset: u64, len: u64) -> Result<()> {
        self.assert_bounds(offset, len);
        match self.in_child(offset, len) {
            0 => Ok(()),
            len => self.child.co_cache(self.offset + offset, len),
        }
    }

    fn co_allocation_depth(&self, offset: u64, len: u64) -> Result<DepthExtent> {
        self.assert_bounds(offset, len);
        self.child.co_allocation_depth(self.offset + offset, len)
    }

    fn dirty_bitmaps(&self) -> Vec<Arc<dyn DirtyBitmap>> {
        let shifted = |inner| Arc::new(WindowBitmap { inner, offset: self.offset }) as Arc<dyn DirtyBitmap>;
        self.child.dirty_bitmaps().into_iter().map(shifted).collect()
    }
}

/// A bitmap of the child, asked at the window's offsets.
struct WindowBitmap {
    inner: Arc<dyn DirtyBitmap>,
    offset: u64,
}

impl DirtyBitmap for WindowBitmap {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn granularity(&self) -> u64 {
        self.inner.granularity()
    }

    fn co_status(&self, offset: u64, len: u64) -> Result<DirtyExtent> {
        // The child's extent may go on behind the window.
        self.inner.co_status(self.offset + offset, len).map(|e| DirtyExtent { len: e.len.min(len), ..e })
    }
}
