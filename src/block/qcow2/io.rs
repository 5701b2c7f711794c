//! Access to the file below an image, which may end early: a device does not grow, a file may be cut in mid-cluster.

use crate::block::{BlockNode, Error, Result, WriteFlags, iov};
use crate::util::fast;
use std::io::{IoSlice, IoSliceMut};

/// First offset that a request to a file must not reach (what `off_t` holds).
const MAX: u64 = i64::MAX as u64;

/// Fills `bufs` from `offset`; zeroes past the end of the node. Yields.
pub(super) fn co_read(node: &dyn BlockNode, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
    let len = iov::total_mut(bufs) as u64;
    let end = offset.checked_add(len).filter(|e| *e <= MAX);
    let Some(end) = end else {
        return Err(Error::from_errno("preadv", node.name(), offset, libc::EIO));
    };
    if node.grows() || end <= node.len() {
        return node.co_preadv(offset, bufs);
    }
    let mut inside = node.len().saturating_sub(offset) as usize;
    iov::zero_from(bufs, inside);
    let mut at = offset;
    for b in bufs {
        let n = b.len().min(inside);
        if n == 0 {
            break;
        }
        node.co_preadv(at, &mut [IoSliceMut::new(&mut b[..n])])?;
        at += n as u64;
        inside -= n;
    }
    Ok(())
}

/// Reads the front of `buf` without waiting, and returns how much; zeroes past the end of the node. Never yields.
pub(super) fn try_read(node: &dyn BlockNode, offset: u64, buf: &mut [u8]) -> usize {
    let Some(end) = offset.checked_add(buf.len() as u64).filter(|e| *e <= MAX) else { return 0 };
    if node.grows() || end <= node.len() {
        return node.try_pread_some(offset, buf);
    }
    let inside = node.len().saturating_sub(offset) as usize;
    let n = if inside == 0 { 0 } else { node.try_pread_some(offset, &mut buf[..inside]) };
    if n < inside {
        return n;
    }
    buf[inside..].fill(0);
    buf.len()
}

/// Writes all of `bufs`, to memory if that is quick, without a turn of the engine; `ENOSPC` where the node ends and does
/// not grow. Yields.
pub(super) fn co_write(
    node: &dyn BlockNode,
    offset: u64,
    bufs: &[IoSlice<'_>],
    flags: WriteFlags,
) -> Result<()> {
    check_end(node, offset, iov::total(bufs) as u64)?;
    if flags.is_empty()
        && fast::paths().inline_write
        && let Some(done) = node.try_pwritev(offset, bufs)
    {
        return done;
    }
    node.co_pwritev(offset, bufs, flags)
}

/// Reads metadata: from memory if it is there, without a turn of the engine. Yields.
pub(super) fn co_read_quick(node: &dyn BlockNode, offset: u64, buf: &mut [u8]) -> Result<()> {
    if try_read(node, offset, buf) == buf.len() {
        return Ok(());
    }
    co_read(node, offset, &mut [IoSliceMut::new(buf)])
}

/// Whether all of a range is in the file.
pub(super) fn is_inside(node: &dyn BlockNode, offset: u64, len: u64) -> bool {
    offset.checked_add(len).is_some_and(|end| end <= node.len())
}

/// Whether a change may be made there.
pub(super) fn check_end(node: &dyn BlockNode, offset: u64, len: u64) -> Result<()> {
    let max = if node.grows() { MAX } else { node.len() };
    match offset.checked_add(len) {
        Some(end) if end <= max => Ok(()),
        _ => Err(Error::from_errno("pwritev", node.name(), offset, libc::ENOSPC)),
    }
}
