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
//!
//! When the disk becomes larger, new bits are clear (as with QEMU). Tables that are too short for it are written anew, with a
//! directory that names them; the header's pointer to the directory, 8 bytes, is what switches. From then until the size is
//! durable, and for bitmaps that record changes until the close, those bitmaps are marked in_use.

use super::bitmap::{BitmapEntry, BitmapFlags, MAX_BITMAP_BYTES, MAX_TABLE_ENTRIES, TableEntry};
use super::check::{CheckError, co_read_bitmaps};
use super::entry::Geometry;
use super::header::Header;
use super::node::Qcow2Node;
use super::{FormatError, WriteHook};
use crate::block::wait::lock;
use crate::block::{BlockNode, DirtyBitmap, DirtyExtent, Error, Result, WriteFlags};
use std::io::{IoSlice, IoSliceMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

/// Bytes of all bitmaps of an image that are held in memory (ours).
const MAX_BYTES: u64 = 1 << 30;

/// The bitmaps of one image.
pub struct Bitmaps {
    file: Arc<dyn BlockNode>,
    g: Geometry,
    /// Changes when the disk becomes larger.
    directory_offset: AtomicU64,
    directory_size: u64,
    all: Vec<Arc<Bitmap>>,
}

/// One bitmap.
struct Bitmap {
    /// As it was when it was loaded.
    entry: BitmapEntry,
    name: String,
    place: Mutex<Place>,
    /// Bytes of the disk.
    disk: AtomicU64,
    /// The table says of its last part that all bits are set: also of those that would be past the end.
    ends_in_ones: bool,
    /// `None`: not to be believed, or not understood.
    bits: Option<Words>,
}

/// Where a bitmap is in the file.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// Where its entry's flags stand.
    flags_at: u64,
    table_offset: u64,
    /// Entries of the table.
    table_size: u32,
    /// Marked in_use for a change of the disk's size, and for nothing else.
    resizing: bool,
}

/// Bits in their order, the first in the lowest. More can be put behind them; what is there stays where it is, so nobody who
/// looks or sets takes a lock.
struct Words {
    these: Box<[AtomicU64]>,
    more: OnceLock<Box<Words>>,
}

impl Words {
    fn get(&self, mut index: usize) -> Option<&AtomicU64> {
        let mut part = self;
        loop {
            if let Some(word) = part.these.get(index) {
                return Some(word);
            }
            index -= part.these.len();
            part = part.more.get()?;
        }
    }

    fn word(&self, index: u64) -> &AtomicU64 {
        self.get(index as usize).expect("a bit of the disk has its word")
    }

    /// Makes it `count` words long, if that is more than it has. By one at a time.
    fn extend_to(&self, count: usize) {
        let (mut part, mut have) = (self, self.these.len());
        while let Some(next) = part.more.get() {
            have += next.these.len();
            part = next;
        }
        if count > have {
            let these = (have..count).map(|_| AtomicU64::new(0)).collect();
            part.more.get_or_init(|| Box::new(Words { these, more: OnceLock::new() }));
        }
    }
}

impl Bitmap {
    fn place(&self) -> Place {
        *lock(&self.place)
    }

    /// Words of the bits of a disk of `len` bytes.
    fn words_for(&self, len: u64) -> u64 {
        self.entry.bits_for(len).div_ceil(64)
    }

    /// Whether the table is as long as the size of the disk says; else nobody would take it.
    fn fits(&self, g: &Geometry) -> bool {
        let want = self.entry.table_entries_for(self.disk.load(Ordering::SeqCst), g);
        u64::from(self.place().table_size) == want
    }

    fn enabled(&self) -> bool {
        self.bits.is_some() && self.entry.flags.contains(BitmapFlags::AUTO)
    }

    fn bit(&self, words: &Words, bit: u64) -> bool {
        words.word(bit / 64).load(Ordering::Relaxed) >> (bit % 64) & 1 != 0
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
            let word = words.word(bit / 64);
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
        let words = self.bits.as_ref().expect("only bitmaps that are believed are shown");
        let shift = self.entry.granularity_bits;
        let end = offset + len;
        let mut bit = offset >> shift;
        let dirty = self.bit(words, bit);
        let uniform = if dirty { u64::MAX } else { 0 };
        let stop = (end - 1) >> shift;
        while bit <= stop {
            if bit.is_multiple_of(64) && words.word(bit / 64).load(Ordering::Relaxed) == uniform {
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
            let mut ends_in_ones = false;
            let bits = if usable {
                bytes = bytes.saturating_add(entry.bits_for(header.size).div_ceil(8));
                if bytes > MAX_BYTES {
                    return Err(CheckError::TooBig);
                }
                let loaded = co_load_bits(&**file, &entry, header.size, &g)?;
                ends_in_ones = loaded.1;
                Some(loaded.0)
            } else {
                None
            };
            let name = String::from_utf8_lossy(&entry.name).into_owned();
            let place = Place {
                flags_at,
                table_offset: entry.table_offset,
                table_size: entry.table_size,
                resizing: false,
            };
            let (place, disk) = (Mutex::new(place), AtomicU64::new(header.size));
            all.push(Arc::new(Bitmap { entry, name, place, disk, ends_in_ones, bits }));
        }
        let directory_size = ext.directory_size;
        let directory_offset = AtomicU64::new(ext.directory_offset);
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
        node.note_metadata(self.directory_offset.load(Ordering::SeqCst), self.directory_size);
        for b in &self.all {
            node.note_metadata(b.entry.table_offset, u64::from(b.entry.table_size) * 8);
        }
    }

    /// Writes the in_use flag of every bitmap that records changes, durably; it is cleared only where they were recorded.
    fn co_mark(&self, in_use: bool) -> Result<()> {
        let mut written = false;
        let records = |b: &Bitmap| b.entry.flags.contains(BitmapFlags::AUTO);
        let right = |b: &Bitmap| b.enabled() && b.fits(&self.g);
        for b in self.all.iter().filter(|b| if in_use { records(b) } else { right(b) }) {
            let flags = if in_use { b.entry.flags | BitmapFlags::IN_USE } else { b.entry.flags };
            let bytes = flags.bits().to_be_bytes();
            self.file.co_pwritev(b.place().flags_at, &[IoSlice::new(&bytes)], WriteFlags::empty())?;
            written = true;
        }
        if written { self.file.co_flush() } else { Ok(()) }
    }

    /// Writes a bitmap's bits into its clusters, and then its table.
    fn co_store(&self, node: &Qcow2Node, b: &Bitmap) -> Result<()> {
        let Some(words) = &b.bits else { return Ok(()) };
        let cluster = self.g.cluster_size();
        let place = b.place();
        let mut table = vec![0u8; place.table_size as usize * 8];
        node.co_read_metadata(place.table_offset, &mut table)?;
        let per_entry = (cluster / 8) as usize;
        let mut bytes = vec![0u8; cluster as usize];
        for (i, raw) in table.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            bytes.fill(0);
            let first = i * per_entry;
            for (at, word) in (first..first + per_entry).map_while(|i| words.get(i)).enumerate() {
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
        node.co_write_metadata(place.table_offset, &table)?;
        node.co_sync_metadata()
    }

    /// Why the disk cannot have `len` bytes; `None`: it can.
    fn stands_against(&self, len: u64) -> Option<i32> {
        let marked = BitmapFlags::IN_USE | BitmapFlags::AUTO;
        if self.all.iter().any(|b| b.bits.is_none() && !b.entry.flags.intersects(marked)) {
            // It is believed, by those who understand it, its size would be wrong, and it is not ours to change.
            return Some(libc::ENOTSUP);
        }
        let mut bytes = 0u64;
        for b in self.all.iter().filter(|b| b.bits.is_some()) {
            let entries = b.entry.table_entries_for(len, &self.g);
            let too_long = entries > u64::from(MAX_TABLE_ENTRIES)
                || entries.saturating_mul(self.g.cluster_size()) > MAX_BITMAP_BYTES;
            bytes = bytes.saturating_add(b.words_for(len).saturating_mul(8));
            if too_long || bytes > MAX_BYTES {
                return Some(libc::EFBIG);
            }
        }
        None
    }

    /// Whether the bitmap would be wrong in a disk of `len` bytes as it is in the file. With a table of the same length it is
    /// right for both sizes: bits past the end are clear, unless nobody wrote them out.
    fn must_move(&self, b: &Bitmap, len: u64) -> bool {
        let short = b.entry.table_entries_for(len, &self.g) > u64::from(b.place().table_size);
        b.bits.is_some() && (short || b.ends_in_ones && !b.enabled())
    }

    /// Writes tables that are long enough for a disk of `len` bytes, and a directory that names them; what goes by them is
    /// marked in_use there. Switches to it, durably.
    fn co_move_tables(&self, node: &Qcow2Node, len: u64) -> Result<()> {
        let mut directory = Vec::new();
        let mut places = Vec::new();
        let mut old = Vec::new();
        for b in &self.all {
            let mut place = b.place();
            let entries = b.entry.table_entries_for(len, &self.g);
            let moves = self.must_move(b, len);
            let mut flags = b.entry.flags;
            if moves || flags.contains(BitmapFlags::AUTO) {
                flags |= BitmapFlags::IN_USE;
            }
            if moves {
                let mut table = vec![0u8; entries as usize * 8];
                node.co_read_metadata(place.table_offset, &mut table[..place.table_size as usize * 8])?;
                old.push((place.table_offset, u64::from(place.table_size) * 8));
                place.table_offset = node.co_alloc_metadata(table.len() as u64)?;
                place.table_size = entries as u32;
                place.resizing = !b.enabled();
                node.co_write_metadata(place.table_offset, &table)?;
            }
            place.flags_at = directory.len() as u64 + 12;
            places.push(place);
            let Place { table_offset, table_size, .. } = place;
            let entry = BitmapEntry { table_offset, table_size, flags, ..b.entry.clone() };
            entry.put(&mut directory);
        }
        assert_eq!(directory.len() as u64, self.directory_size, "entries keep their length");
        let at = node.co_alloc_metadata(self.directory_size)?;
        node.co_write_metadata(at, &directory)?;
        // Content and counts before the pointer to them.
        node.co_sync_metadata()?;
        let pointer = self.co_find_pointer(node)?;
        node.co_write_header_extensions(pointer, &at.to_be_bytes())?;
        node.co_sync_metadata()?;
        old.push((self.directory_offset.swap(at, Ordering::SeqCst), self.directory_size));
        for (b, place) in self.all.iter().zip(places) {
            *lock(&b.place) = Place { flags_at: at + place.flags_at, ..place };
        }
        for (offset, bytes) in old {
            node.free_metadata(offset, bytes);
        }
        Ok(())
    }

    /// Where the header's extension says where the directory is.
    fn co_find_pointer(&self, node: &Qcow2Node) -> Result<u64> {
        let mut cluster = vec![0; self.g.cluster_size() as usize];
        node.co_read_metadata(0, &mut cluster)?;
        let now = self.directory_offset.load(Ordering::SeqCst);
        let found = super::header::bitmap_directory_pointer(&cluster);
        let there = found.and_then(|at| cluster.get(at..at + 8));
        match found {
            Some(at) if there == Some(&now.to_be_bytes()) => Ok(at as u64),
            _ => Err(Error::from_errno("resize bitmaps", node.name(), now, libc::EIO)),
        }
    }
}

/// Reads a bitmap's bits; and whether its table ends with "all ones".
fn co_load_bits(
    file: &dyn BlockNode,
    entry: &BitmapEntry,
    size: u64,
    g: &Geometry,
) -> std::result::Result<(Words, bool), CheckError> {
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
    let words = Words { these: bits.into_iter().map(AtomicU64::new).collect(), more: OnceLock::new() };
    let last = table.as_chunks::<8>().0.last();
    let ends_in_ones = last
        .is_some_and(|raw| matches!(TableEntry::parse(u64::from_be_bytes(*raw), g), Ok(TableEntry::Ones)));
    Ok((words, ends_in_ones))
}

impl WriteHook for Bitmaps {
    fn co_before_first_change(&self, _node: &Qcow2Node) -> Result<()> {
        self.co_mark(true)
    }

    fn changed(&self, offset: u64, len: u64) {
        for b in self.all.iter().filter(|b| b.enabled()) {
            // What is zeroed while the disk becomes larger is past its end as yet.
            let len = len.min(b.disk.load(Ordering::SeqCst).saturating_sub(offset));
            b.set(offset, len);
        }
    }

    fn co_before_resize(&self, node: &Qcow2Node, len: u64) -> Result<()> {
        if let Some(errno) = self.stands_against(len) {
            return Err(Error::from_errno("resize bitmaps", node.name(), len, errno));
        }
        if self.all.iter().any(|b| self.must_move(b, len)) {
            self.co_move_tables(node, len)?;
        }
        Ok(())
    }

    fn co_after_resize(&self, node: &Qcow2Node, len: u64) -> Result<()> {
        for b in &self.all {
            let Some(words) = &b.bits else { continue };
            words.extend_to(b.words_for(len) as usize);
            b.disk.store(len, Ordering::SeqCst);
        }
        // What records changes stays in use.
        for b in self.all.iter().filter(|b| b.place().resizing) {
            self.co_store(node, b)?;
            node.co_write_metadata(b.place().flags_at, &b.entry.flags.bits().to_be_bytes())?;
            node.co_sync_metadata()?;
            lock(&b.place).resizing = false;
        }
        Ok(())
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
