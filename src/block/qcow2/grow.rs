//! Making the disk larger, and what bitmaps need of the image: clusters, and bytes in them.

use super::alloc::Freed;
use super::header::{Autoclear, MAX_L1_BYTES};
use super::l2::Kind;
use super::node::Qcow2Node;
use crate::block::{BlockNode, Error, Result, WriteFlags};
use std::io::{IoSlice, IoSliceMut};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

/// Unit of a disk's size, in bytes: QEMU counts it in sectors.
const SECTOR: u64 = 512;

impl Qcow2Node {
    /// Makes the disk `len` bytes long; the new ones read as zeroes. No request may be running (drain the backend).
    /// A smaller size is refused. Durable on return. Coroutine only; yields.
    ///
    /// The size in the header is the last that is written: a crash leaves a disk of the old size, or of the new one with
    /// nothing in what is new.
    ///
    /// # Errors
    /// `EINVAL` for a smaller size and for one that is not in sectors of 512 bytes, `EFBIG` for what the format cannot hold,
    /// `ENOTSUP` for a version 2 image with snapshots (they do not record the size that they are of), `ENOSPC` for a data
    /// file that is a smaller device; else the errno of what failed.
    pub fn co_grow(&self, len: u64) -> Result<()> {
        let g = self.g;
        let old = self.len();
        let fail = |errno| Error::from_errno("grow", self.name(), len, errno);
        if len < old || !len.is_multiple_of(SECTOR) {
            return Err(fail(libc::EINVAL));
        }
        if len == old {
            return Ok(());
        }
        if g.v2 && self.header.lock().unwrap_or_else(PoisonError::into_inner).nb_snapshots > 0 {
            return Err(fail(libc::ENOTSUP));
        }
        let entries = g.l1_entries_for(len);
        if entries * 8 > MAX_L1_BYTES || len > i64::MAX as u64 {
            return Err(fail(libc::EFBIG));
        }
        if self.data_file.as_ref().is_some_and(|data| data.len() < len && !data.grows()) {
            return Err(fail(libc::ENOSPC));
        }
        self.co_begin_change("grow", len)?;
        if entries > self.map.l1_len() {
            self.co_move_l1(entries)?;
        }
        if let Some(data) = &self.data_file
            && data.len() < len
        {
            data.co_truncate(len)?;
        }
        // Late: a growth that fails after this leaves bitmaps marked in use.
        for hook in self.hooks() {
            hook.co_before_resize(self, len)?;
        }
        self.set_len(len);
        let done = self
            .co_clear_exposed(old, len)
            .and_then(|()| self.co_flush_all())
            .and_then(|()| self.co_write_header_field(24, &len.to_be_bytes()));
        if let Err(e) = done {
            self.set_len(old);
            return Err(e);
        }
        self.header.lock().unwrap_or_else(PoisonError::into_inner).size = len;
        self.cover_with_cache(len);
        for hook in self.hooks() {
            if let Err(e) = hook.co_after_resize(self, len) {
                tracing::warn!(node = %self.name(), errno = e.errno(), "disabled bitmaps stay marked in use");
            }
        }
        Ok(())
    }

    /// Makes what a larger size shows read as zeroes: the rest of the last cluster, what a longer backing image has there, and
    /// clusters that somebody has left allocated past the end.
    fn co_clear_exposed(&self, old: u64, len: u64) -> Result<()> {
        let backing = self.backing.as_ref().map_or(0, |b| b.len());
        let mut at = old;
        while at < len {
            let ticket = self.epochs.ticket();
            let m = self.co_map(at, len - at)?;
            drop(ticket);
            let end = at + m.len;
            let shown = match m.kind {
                Kind::Zero => at,
                Kind::Unallocated => end.min(backing).max(at),
                Kind::Data { .. } | Kind::Compressed { .. } => end,
            };
            if shown > at {
                self.co_pwrite_zeroes(at, shown - at, WriteFlags::empty())?;
            }
            at = end;
        }
        Ok(())
    }

    /// Puts the L1 table where it has room for `entries`.
    fn co_move_l1(&self, entries: u64) -> Result<()> {
        let g = self.g;
        // The copy is of what the file says after this.
        self.map.flag.mark();
        self.co_flush_all()?;
        let clusters = g.clusters_for(entries * 8);
        let run = self.co_alloc_exact(clusters)?;
        let host = run.first << g.cluster_bits;
        let mut bytes = vec![0; (clusters << g.cluster_bits) as usize];
        for i in 0..self.map.l1_len() {
            bytes[i as usize * 8..][..8].copy_from_slice(&self.map.l1_raw(i).to_be_bytes());
        }
        let give_back = |e| {
            self.free_later(Freed { clusters: run.first..run.first + run.count, punch: false });
            e
        };
        super::io::co_write(&*self.file, host, &[IoSlice::new(&bytes)], WriteFlags::empty())
            .map_err(give_back)?;
        // Its clusters must count before the header points to them.
        self.map.flag.mark();
        self.co_flush_all()?;
        let mut field = [0; 12];
        field[..4].copy_from_slice(&(entries as u32).to_be_bytes());
        field[4..].copy_from_slice(&host.to_be_bytes());
        // If that fails nobody knows which table the file names: nothing may be written any more.
        self.co_write_header_field(36, &field).inspect_err(|e| self.poison(e))?;
        let old = self.l1_offset.swap(host, Ordering::SeqCst) >> g.cluster_bits;
        let old = old..old + g.clusters_for(self.map.l1_len() * 8);
        self.map.set_l1_len(entries);
        {
            let mut header = self.header.lock().unwrap_or_else(PoisonError::into_inner);
            header.l1_table_offset = host;
            header.l1_size = entries as u32;
        }
        if old.start != 0 {
            self.free_later(Freed { clusters: old, punch: false });
        }
        Ok(())
    }

    /// Takes `bytes` of the file for metadata, rounded up to clusters side by side; returns where. They hold anything.
    /// They count durably after the next flush, and belong to the caller. Coroutine only; yields.
    ///
    /// # Errors
    /// `ENOSPC` and its like.
    pub fn co_alloc_metadata(&self, bytes: u64) -> Result<u64> {
        let run = self.co_alloc_exact(self.g.clusters_for(bytes).max(1))?;
        self.map.flag.mark();
        Ok(run.first << self.g.cluster_bits)
    }

    /// Gives clusters back that hold metadata; the last pointer to them must have been written. They are free after the
    /// next flush. Never yields.
    pub fn free_metadata(&self, offset: u64, bytes: u64) {
        let first = offset >> self.g.cluster_bits;
        let clusters = first..first + self.g.clusters_for(bytes).max(1);
        self.free_later(Freed { clusters, punch: false });
        self.map.flag.mark();
    }

    /// Keeps clusters from being taken for free ones, whatever their count says. Any thread.
    pub fn note_metadata(&self, offset: u64, bytes: u64) {
        let first = offset >> self.g.cluster_bits;
        self.set_metadata_clusters(first..first + self.g.clusters_for(bytes), true);
    }

    /// Reads bytes of the file, past its end zeroes. For metadata that this node does not know. Coroutine only; yields.
    ///
    /// # Errors
    /// The errno of the failing operation.
    pub fn co_read_metadata(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        super::io::co_read(&*self.file, offset, &mut [IoSliceMut::new(buf)])
    }

    /// Writes bytes of the file. For metadata that this node does not know. Coroutine only; yields.
    ///
    /// # Errors
    /// The errno of the failing operation.
    pub fn co_write_metadata(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        super::io::co_write(&*self.file, offset, &[IoSlice::new(bytes)], WriteFlags::empty())
    }

    /// Makes what was written so far durable, counts included. Coroutine only; yields.
    ///
    /// # Errors
    /// The errno; then the image is read-only.
    pub fn co_sync_metadata(&self) -> Result<()> {
        self.map.flag.mark();
        self.co_flush_all()
    }

    /// Writes bytes of the first cluster, behind the fields that the driver keeps (the extensions). Not durable before
    /// [`Qcow2Node::co_sync_metadata`]. Coroutine only; yields.
    ///
    /// # Errors
    /// The errno of the failing operation.
    ///
    /// # Panics
    /// When the bytes are not between those fields and the end of the cluster.
    pub fn co_write_header_extensions(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let end = at + bytes.len() as u64;
        assert!(at >= 72 && end <= self.g.cluster_size(), "extensions are in the first cluster");
        super::io::co_write(&*self.file, at, &[IoSlice::new(bytes)], WriteFlags::empty())
    }

    /// Sets or clears the autoclear feature that says that the bitmaps are right, durably. Coroutine only; yields.
    ///
    /// # Errors
    /// The errno of the failing operation.
    pub fn co_set_bitmaps_feature(&self, on: bool) -> Result<()> {
        let bits = {
            let mut header = self.header.lock().unwrap_or_else(PoisonError::into_inner);
            header.autoclear.set(Autoclear::BITMAPS, on);
            header.autoclear.bits()
        };
        self.co_write_header_field(88, &bits.to_be_bytes())
    }
}
