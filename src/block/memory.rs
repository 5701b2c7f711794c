//! MemoryNode: a sparse disk in memory, for tests and scratch exports.
//!
//! ```text
//!   top: one entry per 32 GiB ── 1024 chunks of 32 MiB ── 512 pages of 64 KiB, each behind its own RwLock
//! ```
//! Tables are made at the first write below them and never freed, so a lookup is three loads without a lock; a page
//! has a lock of its own, held only while bytes are copied. Requests to different pages share nothing. A request over
//! several pages is not atomic, as on a disk.

use super::{BlockNode, Error, Extent, Limits, Result, StatusFlags, WriteFlags, iov};
use crate::aio::AioContext;
use crate::co::{Coroutine, co_yield};
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Bytes of a page (ours).
pub(crate) const PAGE: u64 = 64 << 10;
const PAGES_PER_CHUNK: u64 = 512;
const CHUNKS_PER_TOP: u64 = 1024;
const CHUNK: u64 = PAGE * PAGES_PER_CHUNK;
const TOP: u64 = CHUNK * CHUNKS_PER_TOP;

/// Largest size in bytes (ours: 1 PiB keeps the top table at half a megabyte).
pub(crate) const MAX_LEN: u64 = 1 << 50;

/// Largest size in bytes of a disk that grows (ours: its top table is made at once).
const MAX_GROWN: u64 = 64 << 40;

/// `None` is a hole.
type Page = RwLock<Option<Box<[u8]>>>;
type Chunk = Box<[Page]>;
type Top = Box<[OnceLock<Chunk>]>;

/// A sparse disk in memory. Any thread.
pub struct MemoryNode {
    name: String,
    len: AtomicU64,
    growable: bool,
    read_only: bool,
    tops: Box<[OnceLock<Top>]>,
}

fn read(p: &Page) -> RwLockReadGuard<'_, Option<Box<[u8]>>> {
    p.read().unwrap_or_else(PoisonError::into_inner)
}

fn write(p: &Page) -> RwLockWriteGuard<'_, Option<Box<[u8]>>> {
    p.write().unwrap_or_else(PoisonError::into_inner)
}

fn new_page() -> Box<[u8]> {
    vec![0u8; PAGE as usize].into_boxed_slice()
}

/// The pieces of `offset..offset + len` by page: page number, range within the page.
fn pieces(offset: u64, len: u64) -> impl Iterator<Item = (u64, Range<usize>)> {
    let end = offset + len;
    let mut at = offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let page = at / PAGE;
        let from = at % PAGE;
        let to = (from + (end - at)).min(PAGE);
        at += to - from;
        Some((page, from as usize..to as usize))
    })
}

impl MemoryNode {
    /// Makes a disk of `len` bytes that reads as zeroes.
    ///
    /// # Errors
    /// `EFBIG` above 1 PiB.
    pub fn new(name: &str, len: u64) -> Result<MemoryNode> {
        if len > MAX_LEN {
            return Err(Error::from_errno("create", name, 0, libc::EFBIG));
        }
        let tops = (0..len.div_ceil(TOP)).map(|_| OnceLock::new()).collect();
        Ok(MemoryNode {
            name: name.to_owned(),
            len: AtomicU64::new(len),
            growable: false,
            read_only: false,
            tops,
        })
    }

    /// Makes an empty disk that grows with what is written to it, up to 64 TiB: what lies below an image format.
    #[must_use]
    pub fn growable(name: &str) -> MemoryNode {
        let tops = (0..MAX_GROWN / TOP).map(|_| OnceLock::new()).collect();
        MemoryNode { name: name.to_owned(), len: AtomicU64::new(0), growable: true, read_only: false, tops }
    }

    /// Refuses writes.
    #[must_use]
    pub fn with_read_only(self, read_only: bool) -> MemoryNode {
        MemoryNode { read_only, ..self }
    }

    fn assert_bounds(&self, offset: u64, len: u64) {
        let max = if self.growable { MAX_GROWN } else { self.len() };
        assert!(offset.checked_add(len).is_some_and(|e| e <= max), "the range was validated above");
    }

    /// Checks a change of bytes, and tells that it reaches past what can be held.
    fn check_change(&self, op: &'static str, offset: u64, len: u64) -> Result<()> {
        if self.growable && offset.checked_add(len).is_none_or(|e| e > MAX_GROWN) {
            return Err(Error::from_errno(op, &self.name, offset, libc::EFBIG));
        }
        self.assert_bounds(offset, len);
        Ok(())
    }

    /// A change up to `end` has been made.
    fn extend(&self, end: u64) {
        if self.growable && end > self.len() {
            self.len.fetch_max(end, Ordering::SeqCst);
        }
    }

    /// The page if its tables exist.
    fn page(&self, number: u64) -> Option<&Page> {
        let (top, chunk, page) = split(number);
        let chunk = self.tops[top].get()?[chunk].get()?;
        Some(&chunk[page])
    }

    /// The page, making its tables.
    fn page_or_make(&self, number: u64) -> &Page {
        let (top, chunk, page) = split(number);
        let top = self.tops[top].get_or_init(|| (0..CHUNKS_PER_TOP).map(|_| OnceLock::new()).collect());
        let chunk = top[chunk].get_or_init(|| (0..PAGES_PER_CHUNK).map(|_| RwLock::new(None)).collect());
        &chunk[page]
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) {
        let mut done = 0;
        for (number, r) in pieces(offset, buf.len() as u64) {
            let dst = &mut buf[done..done + r.len()];
            done += r.len();
            match self.page(number).map(read).as_deref() {
                Some(Some(data)) => dst.copy_from_slice(&data[r]),
                _ => dst.fill(0),
            }
        }
    }

    fn write_at(&self, offset: u64, buf: &[u8]) {
        let mut done = 0;
        for (number, r) in pieces(offset, buf.len() as u64) {
            let src = &buf[done..done + r.len()];
            done += r.len();
            write(self.page_or_make(number)).get_or_insert_with(new_page)[r].copy_from_slice(src);
        }
    }

    fn zero_at(&self, offset: u64, len: u64, unmap: bool) {
        for (number, r) in pieces(offset, len) {
            let whole = r.len() as u64 == PAGE;
            if unmap {
                let Some(page) = self.page(number) else { continue };
                let mut page = write(page);
                if whole {
                    *page = None;
                } else if let Some(data) = page.as_mut() {
                    data[r].fill(0);
                }
            } else {
                write(self.page_or_make(number)).get_or_insert_with(new_page)[r].fill(0);
            }
        }
    }

    /// Zeroes a range of any length: passes over what has no tables, and lets the loop turn after each chunk that has.
    fn co_zero(&self, offset: u64, len: u64, unmap: bool) {
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let (top, chunk, _) = split(at / PAGE);
            let next = match self.tops[top].get() {
                None if unmap => (at / TOP + 1) * TOP,
                Some(t) if unmap && t[chunk].get().is_none() => (at / CHUNK + 1) * CHUNK,
                _ => {
                    let next = ((at / CHUNK + 1) * CHUNK).min(end);
                    self.zero_at(at, next - at, unmap);
                    if next < end
                        && let (Some(me), Some(ctx)) = (Coroutine::current(), AioContext::current())
                    {
                        me.schedule(&ctx);
                        co_yield();
                    }
                    next
                }
            };
            at = next;
        }
    }

    /// Whether the page holds data, and up to which offset that is so by the tables alone (a missing table answers
    /// for all pages below it).
    fn probe(&self, offset: u64) -> (bool, u64) {
        let number = offset / PAGE;
        let (top, chunk, page) = split(number);
        let Some(t) = self.tops[top].get() else { return (false, (offset / TOP + 1) * TOP) };
        let Some(c) = t[chunk].get() else { return (false, (offset / CHUNK + 1) * CHUNK) };
        (read(&c[page]).is_some(), (number + 1) * PAGE)
    }
}

fn split(number: u64) -> (usize, usize, usize) {
    let top = number / (PAGES_PER_CHUNK * CHUNKS_PER_TOP);
    let chunk = number / PAGES_PER_CHUNK % CHUNKS_PER_TOP;
    (top as usize, chunk as usize, (number % PAGES_PER_CHUNK) as usize)
}

impl BlockNode for MemoryNode {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> u64 {
        self.len.load(Ordering::SeqCst)
    }

    fn grows(&self) -> bool {
        self.growable
    }

    fn co_truncate(&self, len: u64) -> Result<()> {
        if !self.growable {
            return Err(Error::from_errno("truncate", &self.name, len, libc::ENOTSUP));
        }
        self.check_change("truncate", len, 0)?;
        let old = self.len();
        if len >= old {
            self.extend(len);
        } else {
            self.zero_at(len, old - len, true);
            self.len.store(len, Ordering::SeqCst);
        }
        Ok(())
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn limits(&self) -> Limits {
        Limits { request_alignment: 1, preferred: PAGE as u32, fast_zero: true, rotational: false }
    }

    fn try_pread_some(&self, offset: u64, buf: &mut [u8]) -> usize {
        self.assert_bounds(offset, buf.len() as u64);
        self.read_at(offset, buf);
        buf.len()
    }

    fn try_pwrite(&self, offset: u64, buf: &[u8]) -> Option<Result<()>> {
        if let Err(e) = self.check_change("pwrite", offset, buf.len() as u64) {
            return Some(Err(e));
        }
        self.write_at(offset, buf);
        self.extend(offset + buf.len() as u64);
        Some(Ok(()))
    }

    fn co_preadv(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.assert_bounds(offset, iov::total_mut(bufs) as u64);
        let mut at = offset;
        for b in bufs {
            self.read_at(at, b);
            at += b.len() as u64;
        }
        Ok(())
    }

    fn co_pwritev(&self, offset: u64, bufs: &[IoSlice<'_>], _flags: WriteFlags) -> Result<()> {
        self.check_change("pwritev", offset, iov::total(bufs) as u64)?;
        let mut at = offset;
        for b in bufs {
            self.write_at(at, b);
            at += b.len() as u64;
        }
        self.extend(at);
        Ok(())
    }

    fn co_pwrite_zeroes(&self, offset: u64, len: u64, flags: WriteFlags) -> Result<()> {
        self.check_change("write_zeroes", offset, len)?;
        self.co_zero(offset, len, flags.contains(WriteFlags::MAY_UNMAP));
        self.extend(offset + len);
        Ok(())
    }

    fn co_pdiscard(&self, offset: u64, len: u64) -> Result<()> {
        self.assert_bounds(offset, len);
        let from = offset.next_multiple_of(PAGE);
        let end = offset + len;
        let to = if end == self.len() { end } else { end - end % PAGE };
        if from < to {
            // The last page of an odd size is whole as far as the disk is concerned.
            self.co_zero(from, to.next_multiple_of(PAGE) - from, true);
        }
        Ok(())
    }

    fn co_flush(&self) -> Result<()> {
        Ok(())
    }

    fn co_block_status(&self, offset: u64, len: u64) -> Result<Extent> {
        self.assert_bounds(offset, len);
        let (data, mut at) = self.probe(offset);
        let end = offset + len;
        while at < end {
            let (d, next) = self.probe(at);
            if d != data {
                break;
            }
            at = next;
        }
        let flags = if data { StatusFlags::DATA } else { StatusFlags::ZERO };
        Ok(Extent { len: at.min(end) - offset, flags })
    }
}
