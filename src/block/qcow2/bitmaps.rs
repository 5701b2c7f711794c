//! Persistent dirty bitmaps of an open image: loaded when it is opened, kept up to date in memory, stored when it is closed.
//!
//! ```text
//!   in the file    consistent ──before the first change──▶ in_use ──at a clean close──▶ consistent, and new
//!   in memory      bits ◀── every change, before it is answered
//! ```
//! While a bitmap is marked in_use its clusters and its table may be written over: whoever finds the mark after a crash
//! does not believe them. Bitmaps that were not saved correctly are left as they are, and not shown to clients.
//! Bitmaps without the flag `auto` are disabled: they do not change. One with it that we cannot keep up (its size or its
//! extra data are not understood) is marked in_use too, and stays so.

use super::bitmap::{BitmapEntry, BitmapFlags, TableEntry};
use super::check::{CheckError, co_read_bitmaps};
use super::entry::Geometry;
use super::header::Header;
use super::node::Qcow2Node;
use super::{FormatError, WriteHook};
use crate::block::{BlockNode, DirtyBitmap, DirtyExtent, Error, Result, WriteFlags};
use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of all bitmaps of an image that are held in memory (ours).
const MAX_BYTES: u64 = 1 << 30;

/// The bitmaps of one image.
pub struct Bitmaps {
    file: Arc<dyn BlockNode>,
    g: Geometry,
    directory_offset: u64,
    directory_size: u64,
    all: Vec<Arc<Bitmap>>,
}

/// One bitmap.
struct Bitmap {
    entry: BitmapEntry,
    name: String,
    /// Where the entry's flags stand in the file.
    flags_at: u64,
    /// Bytes of the disk.
    disk: u64,
    /// Bits in their order, the first in the lowest; `None`: not to be believed, or not understood.
    bits: Option<Box<[AtomicU64]>>,
}

impl Bitmap {
    fn enabled(&self) -> bool {
        self.bits.is_some() && self.entry.flags.contains(BitmapFlags::AUTO)
    }

    fn bit(&self, words: &[AtomicU64], bit: u64) -> bool {
        words[(bit / 64) as usize].load(Ordering::Relaxed) >> (bit % 64) & 1 != 0
    }

    fn set(&self, offset: u64, len: u64) {
        let Some(words) = &self.bits else { return };
        if len == 0 {
            return;
        }
        let shift = self.entry.granularity_bits;
        let (mut bit, last) = (offset >> shift, (offset + len - 1) >> shift);
        while bit <= last {
            let n = (64 - bit % 64).min(last - bit + 1);
            let mask = (u64::MAX >> (64 - n)) << (bit % 64);
            let word = &words[(bit / 64) as usize];
            // Most writes go where others went: a look costs less than a shared cache line.
            if word.load(Ordering::Relaxed) & mask != mask {
                word.fetch_or(mask, Ordering::Relaxed);
            }
            bit += n;
        }
    }
}

impl DirtyBitmap for Bitmap {
    fn name(&self) -> &str {
        &self.name
    }

    fn granularity(&self) -> u64 {
        1 << self.entry.granularity_bits
    }

    fn co_status(&self, offset: u64, len: u64) -> Result<DirtyExtent> {
        let words = self.bits.as_deref().expect("only bitmaps that are believed are shown");
        let shift = self.entry.granularity_bits;
        let end = offset + len;
        let mut bit = offset >> shift;
        let dirty = self.bit(words, bit);
        let uniform = if dirty { u64::MAX } else { 0 };
        let stop = (end - 1) >> shift;
        while bit <= stop {
            if bit.is_multiple_of(64) && words[(bit / 64) as usize].load(Ordering::Relaxed) == uniform {
                bit += 64;
            } else if self.bit(words, bit) == dirty {
                bit += 1;
            } else {
                break;
            }
        }
        Ok(DirtyExtent { len: (bit << shift).min(end) - offset, dirty })
    }
}

impl Bitmaps {
    /// Loads the bitmaps that the header names; `None`: it names none. Coroutine only; yields.
    ///
    /// # Errors
    /// What is wrong with their directory or tables, or could not be read.
    pub fn co_load(
        file: &Arc<dyn BlockNode>,
        header: &Header,
    ) -> std::result::Result<Option<Arc<Bitmaps>>, CheckError> {
        let Some(ext) = header.bitmaps else { return Ok(None) };
        let g = header.geometry();
        let mut at = ext.directory_offset;
        let mut bytes = 0u64;
        let mut all = Vec::new();
        for entry in co_read_bitmaps(&**file, header)? {
            let flags_at = at + 12;
            let mut put = Vec::new();
            entry.put(&mut put);
            at += put.len() as u64;
            let understood =
                entry.extra.is_empty() || entry.flags.contains(BitmapFlags::EXTRA_DATA_COMPATIBLE);
            let usable = understood
                && !entry.flags.contains(BitmapFlags::IN_USE)
                && u64::from(entry.table_size) == entry.table_entries_for(header.size, &g);
            let bits = if usable {
                bytes = bytes.saturating_add(entry.bits_for(header.size).div_ceil(8));
                if bytes > MAX_BYTES {
                    return Err(CheckError::TooBig);
                }
                Some(co_load_bits(&**file, &entry, header.size, &g)?)
            } else {
                None
            };
            let name = String::from_utf8_lossy(&entry.name).into_owned();
            all.push(Arc::new(Bitmap { entry, name, flags_at, disk: header.size, bits }));
        }
        let (directory_offset, directory_size) = (ext.directory_offset, ext.directory_size);
        Ok(Some(Arc::new(Bitmaps { file: Arc::clone(file), g, directory_offset, directory_size, all })))
    }

    /// Why the bitmap cannot be shown to clients; `None`: it can.
    #[must_use]
    pub fn why_not(&self, name: &str) -> Option<&'static str> {
        match self.all.iter().find(|b| b.name == name) {
            None => Some("the image has no such bitmap"),
            Some(b) if b.bits.is_some() => None,
            Some(b) if b.entry.flags.contains(BitmapFlags::IN_USE) => Some(
                "it was not saved correctly (it is marked in use): remove it with qemu-img bitmap --remove, and take a full backup",
            ),
            Some(_) => Some("its size or its extra data are not understood"),
        }
    }

    /// Keeps the bitmaps' clusters from being taken for free ones.
    pub fn note(&self, node: &Qcow2Node) {
        node.note_metadata(self.directory_offset, self.directory_size);
        for b in &self.all {
            node.note_metadata(b.entry.table_offset, u64::from(b.entry.table_size) * 8);
        }
    }

    /// Writes the in_use flag of every bitmap that records changes, durably; it is cleared only where they were recorded.
    fn co_mark(&self, in_use: bool) -> Result<()> {
        let mut written = false;
        let records = |b: &Bitmap| b.entry.flags.contains(BitmapFlags::AUTO);
        for b in self.all.iter().filter(|b| if in_use { records(b) } else { b.enabled() }) {
            let flags = if in_use { b.entry.flags | BitmapFlags::IN_USE } else { b.entry.flags };
            let bytes = flags.bits().to_be_bytes();
            self.file.co_pwritev(b.flags_at, &[IoSlice::new(&bytes)], WriteFlags::empty())?;
            written = true;
        }
        if written { self.file.co_flush() } else { Ok(()) }
    }

    /// Writes a bitmap's bits into its clusters, and then its table.
    fn co_store(&self, node: &Qcow2Node, b: &Bitmap) -> Result<()> {
        let Some(words) = &b.bits else { return Ok(()) };
        let cluster = self.g.cluster_size();
        let entries = b.entry.table_size as usize;
        let mut table = vec![0u8; entries * 8];
        node.co_read_metadata(b.entry.table_offset, &mut table)?;
        let per_entry = (cluster / 8) as usize;
        let mut bytes = vec![0u8; cluster as usize];
        for (i, raw) in table.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            bytes.fill(0);
            let first = i * per_entry;
            for (at, word) in words.iter().skip(first).take(per_entry).enumerate() {
                bytes[at * 8..][..8].copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
            }
            let old = TableEntry::parse(u64::from_be_bytes(*raw), &self.g);
            let new = match old {
                Ok(TableEntry::Cluster(host)) => TableEntry::Cluster(host),
                _ if bytes.iter().all(|&x| x == 0) => TableEntry::Zeroes,
                _ => TableEntry::Cluster(super::HostOffset(node.co_alloc_metadata(cluster)?)),
            };
            if let TableEntry::Cluster(host) = new {
                node.co_write_metadata(host.0, &bytes)?;
            }
            *raw = new.raw().to_be_bytes();
        }
        // Content and counts before the pointers to them.
        node.co_sync_metadata()?;
        node.co_write_metadata(b.entry.table_offset, &table)?;
        node.co_sync_metadata()
    }
}

/// Reads a bitmap's bits.
fn co_load_bits(
    file: &dyn BlockNode,
    entry: &BitmapEntry,
    size: u64,
    g: &Geometry,
) -> std::result::Result<Box<[AtomicU64]>, CheckError> {
    let count = entry.bits_for(size);
    let words = count.div_ceil(64) as usize;
    let mut bits = vec![0u64; words];
    let mut table = vec![0u8; entry.table_size as usize * 8];
    super::io::co_read(file, entry.table_offset, &mut [IoSliceMut::new(&mut table)])?;
    let mut bytes = vec![0u8; g.cluster_size() as usize];
    let per_entry = bytes.len() / 8;
    for (raw, words) in table.as_chunks::<8>().0.iter().zip(bits.chunks_mut(per_entry)) {
        match TableEntry::parse(u64::from_be_bytes(*raw), g)? {
            TableEntry::Zeroes => {}
            TableEntry::Ones => words.fill(u64::MAX),
            TableEntry::Cluster(host) => {
                if host.0 >= file.len() {
                    return Err(CheckError::Format(FormatError::Entry {
                        table: "bitmap table",
                        raw: host.0,
                        rule: "the cluster is beyond the end of the file",
                    }));
                }
                super::io::co_read(file, host.0, &mut [IoSliceMut::new(&mut bytes)])?;
                for (word, from) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
                    // Bit 0 of byte 0 is the first.
                    *word = u64::from_le_bytes(*from);
                }
            }
        }
    }
    // Tail bits must be zero; those of a cluster "all ones" are not bits of the disk either.
    if let (Some(last), false) = (bits.last_mut(), count.is_multiple_of(64)) {
        *last &= u64::MAX >> (64 - count % 64);
    }
    Ok(bits.into_iter().map(AtomicU64::new).collect())
}

impl WriteHook for Bitmaps {
    fn co_before_first_change(&self, _node: &Qcow2Node) -> Result<()> {
        self.co_mark(true)
    }

    fn changed(&self, offset: u64, len: u64) {
        for b in self.all.iter().filter(|b| b.enabled()) {
            // A disk that was made larger has bytes that the bitmap knows nothing of.
            let len = len.min(b.disk.saturating_sub(offset));
            b.set(offset, len);
        }
    }

    fn co_before_resize(&self, node: &Qcow2Node, len: u64) -> Result<()> {
        Err(Error::from_errno("resize bitmaps", node.name(), len, libc::ENOTSUP))
    }

    fn co_before_close(&self, node: &Qcow2Node) -> Result<()> {
        for b in self.all.iter().filter(|b| b.enabled()) {
            self.co_store(node, b)?;
        }
        self.co_mark(false)
    }

    fn dirty_bitmaps(&self) -> Vec<Arc<dyn DirtyBitmap>> {
        let shown = self.all.iter().filter(|b| b.bits.is_some());
        shown.map(|b| Arc::clone(b) as Arc<dyn DirtyBitmap>).collect()
    }
}
