//! Zeroing and discarding: by entries where whole clusters (or subclusters) are meant, by writing zeroes elsewhere.
//!
//! What is given up goes to quarantine like everything that is unlinked: a write that is still on its way to it lands in
//! a cluster that belongs to nobody, as if it had come before the zeroing.

use super::entry::{COPIED, L2Entry, OFFSET_MASK, SUBCLUSTERS, Subclusters, ZERO};
use super::l2::Kind;
use super::node::Qcow2Node;
use crate::block::{BlockNode, Error, Result, WriteFlags};
use std::io::IoSlice;
use std::ops::Range;

/// Zeroes written where no entry can say it.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Slices that one claim covers when nothing has to be done in them (ours).
const SKIP: u64 = 1 << 40;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// Zeroes; the space may stay.
    Keep,
    /// Zeroes; the space is given up.
    Unmap,
    /// What is allocated is given up; what is not stays as it is.
    Discard,
}

/// An entry after a change, and whether it gave its cluster up.
struct Change {
    raw: u64,
    bitmap: u64,
    frees: bool,
}

impl Qcow2Node {
    /// Makes a range read as zeroes. Yields.
    pub(super) fn co_zero(&self, offset: u64, len: u64, flags: WriteFlags) -> Result<()> {
        let g = self.g;
        let fallback = !flags.contains(WriteFlags::NO_FALLBACK);
        let unmap = flags.contains(WriteFlags::MAY_UNMAP) && self.discard;
        if self.data_file_raw {
            return self.co_zero_raw(offset, len, flags);
        }
        // Version 2 has no zero clusters, but without a backing image nothing is as good as zero.
        let by_entry = !g.v2 || (unmap && self.backing.is_none());
        let size = if g.v2 { g.cluster_size() } else { g.subcluster_size() };
        let end = offset + len;
        let low = offset.next_multiple_of(size);
        // The last cluster may reach past the end of the disk: nobody sees that.
        let high = if end == self.len() { end.next_multiple_of(size) } else { end / size * size };
        let by_entry = by_entry && low < high;
        if !by_entry && !fallback {
            return Err(Error::from_errno("write_zeroes", self.name(), offset, libc::ENOTSUP));
        }
        self.co_begin_change("write_zeroes", offset)?;
        let r = {
            let _ticket = self.epochs.ticket();
            if by_entry {
                let how = if unmap { How::Unmap } else { How::Keep };
                self.co_write_zeroes(offset, low.min(end) - offset)
                    .and_then(|()| self.co_change_range(low..high, how))
                    .and_then(|()| self.co_write_zeroes(high.min(end), end.saturating_sub(high)))
            } else {
                self.co_write_zeroes(offset, len)
            }
        };
        self.changed(offset, len);
        r?;
        self.co_end_change(flags.contains(WriteFlags::FUA))
    }

    /// Gives a range up. Yields.
    pub(super) fn co_discard(&self, offset: u64, len: u64) -> Result<()> {
        if !self.discard {
            return Ok(());
        }
        let g = self.g;
        let size = g.cluster_size();
        let end = offset + len;
        let low = offset.next_multiple_of(size);
        let high = if end == self.len() { end.next_multiple_of(size) } else { end / size * size };
        // Version 2 could only fall back to the backing image's bytes, which must not come back.
        if low >= high || (g.v2 && self.backing.is_some()) {
            return Ok(());
        }
        self.co_begin_change("discard", offset)?;
        let r = match &self.data_file {
            // The mapping is fixed: only the space is given up, and it may read as it did or as zeroes.
            Some(data) => {
                let to = high.min(data.len());
                if low < to { data.co_pdiscard(low, to - low) } else { Ok(()) }
            }
            None => {
                let _ticket = self.epochs.ticket();
                self.co_change_range(low..high, How::Discard)
            }
        };
        self.changed(offset, len);
        r?;
        self.co_end_change(false)
    }

    /// Zeroes of a data file that is to be right without the mapping.
    fn co_zero_raw(&self, offset: u64, len: u64, flags: WriteFlags) -> Result<()> {
        let data = self.data();
        if !data.grows() && offset + len > data.len() {
            return Err(Error::from_errno("write_zeroes", data.name(), offset, libc::ENOSPC));
        }
        self.co_begin_change("write_zeroes", offset)?;
        let below = flags & (WriteFlags::MAY_UNMAP | WriteFlags::NO_FALLBACK);
        // Clusters without an entry read as zeroes, those with one from there.
        let r = data.co_pwrite_zeroes(offset, len, below);
        self.changed(offset, len);
        r?;
        self.co_end_change(flags.contains(WriteFlags::FUA))
    }

    /// Writes zeroes, unless the range reads so already. The caller has a ticket. Yields.
    fn co_write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        let (mut at, end) = (offset, offset + len);
        if at < end && self.co_reads_zero(at, end - at)? {
            return Ok(());
        }
        while at < end {
            let mut left = (end - at).min(4 << 20) as usize;
            let from = at;
            at += left as u64;
            let mut bufs = Vec::new();
            while left > 0 {
                let n = left.min(ZEROES.len());
                bufs.push(IoSlice::new(&ZEROES[..n]));
                left -= n;
            }
            self.co_write_all(from, &bufs, WriteFlags::empty(), &mut false)?;
        }
        Ok(())
    }

    /// Changes the entries of a range that begins and ends at subclusters. The caller has a ticket. Yields.
    fn co_change_range(&self, range: Range<u64>, how: How) -> Result<()> {
        let g = self.g;
        let (bits, cs) = (g.cluster_bits, g.cluster_size());
        let mut at = range.start;
        while at < range.end {
            // What is not there need not be changed, unless the backing image would show.
            if g.in_cluster(at) == 0 {
                let ask = (range.end - at).min(SKIP);
                let m = self.co_map(at, ask)?;
                let nothing = how == How::Discard || self.backing.is_none();
                if m.kind == Kind::Unallocated && nothing {
                    let skip = if m.len < ask { m.len / cs * cs } else { m.len };
                    if skip > 0 {
                        at += skip;
                        continue;
                    }
                }
            }
            let first = at >> bits;
            let in_slice = (first + self.map.left_in_slice(first)) << bits;
            let end = in_slice.min(range.end);
            let last = (end - 1) >> bits;
            let claim = self.claims.co_claim(first..last + 1);
            self.co_ensure_table(first)?;
            let (freed, by_writing) = self.co_edit(first, |edit| {
                let mut freed = Vec::new();
                let mut by_writing = None;
                for cluster in first..last + 1 {
                    let start = cluster << bits;
                    let part = at.max(start) - start..end.min(start + cs) - start;
                    let (raw, bitmap) = edit.get(cluster);
                    let Ok(entry) = g.l2_entry(raw) else {
                        // Told to whoever asks for it; zeroing must not make a lost cluster look well.
                        by_writing = by_writing.or(Some(start + part.start..start + part.end));
                        break;
                    };
                    let Some(c) = self.change(entry, raw, bitmap, &part, how) else {
                        by_writing = Some(start + part.start..start + part.end);
                        break;
                    };
                    if (c.raw, c.bitmap) != (raw, bitmap) {
                        edit.set(cluster, c.raw, c.bitmap);
                    }
                    if c.frees {
                        freed.push(entry);
                    }
                }
                (freed, by_writing)
            })?;
            for entry in freed {
                self.free_entry(entry, how != How::Keep);
            }
            drop(claim);
            match by_writing {
                None => at = end,
                Some(part) => {
                    at = part.end;
                    self.co_write_zeroes(part.start, part.end - part.start)?;
                }
            }
        }
        Ok(())
    }

    /// The entry for a cluster of which `part` is to be zero; `None` when zeroes must be written.
    fn change(&self, entry: L2Entry, raw: u64, bitmap: u64, part: &Range<u64>, how: How) -> Option<Change> {
        let g = self.g;
        let same = Change { raw, bitmap, frees: false };
        let whole = part.start == 0 && part.end == g.cluster_size();
        if !whole {
            // Only with subclusters.
            debug_assert!(g.extended_l2);
            if matches!(entry, L2Entry::Compressed { .. }) {
                return None;
            }
            let subs = g.subclusters(entry, bitmap).ok()?;
            let from = (part.start / g.subcluster_size()) as u32;
            let to = (part.end.div_ceil(g.subcluster_size()) as u32).min(SUBCLUSTERS);
            let mask = Subclusters::mask(from, to - from);
            let bitmap = Subclusters { allocated: subs.allocated & !mask, zero: subs.zero | mask }.raw();
            return Some(Change { raw, bitmap, frees: false });
        }
        let host = match entry {
            L2Entry::Data { host, .. } => Some(host),
            L2Entry::Zero { host, .. } => host,
            L2Entry::Unallocated | L2Entry::Compressed { .. } => None,
        };
        let compressed = matches!(entry, L2Entry::Compressed { .. });
        let allocated = host.is_some() || compressed;
        if !allocated {
            let shows_backing = how != How::Discard && self.backing.is_some();
            // Extended entries say "zero" by their bitmap, also without a cluster.
            if !shows_backing || matches!(entry, L2Entry::Zero { .. }) {
                return Some(same);
            }
        }
        let copied = raw & COPIED != 0;
        let keeps = self.g.data_file || (how == How::Keep && host.is_some() && copied);
        let all_zero = Subclusters { allocated: 0, zero: u32::MAX }.raw();
        Some(match (keeps, g.extended_l2) {
            (true, true) if host.is_some() => Change { raw, bitmap: all_zero, frees: false },
            (true, false) if host.is_some() => {
                Change { raw: (raw & (OFFSET_MASK | COPIED)) | ZERO, bitmap: 0, frees: false }
            }
            (_, true) => Change { raw: 0, bitmap: all_zero, frees: allocated },
            (_, false) if g.v2 => Change { raw: 0, bitmap: 0, frees: allocated },
            (_, false) => Change { raw: ZERO, bitmap: 0, frees: allocated },
        })
    }
}
