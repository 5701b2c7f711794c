//! Qcow2Node: one open qcow2 image. Its parts are in the files beside this one; here it is opened and closed.
//!
//! Any thread. A read, and a write to a cluster that is allocated and not shared, takes a ticket (`epoch`), looks the
//! mapping up (`l2`) and does its I/O: no lock, no cache line that two threads write. Lock order, outer first: claim
//! (`claims`) or first change, commit gate (`commit`), allocator (`alloc`); L2 tables, allocator. These are held over I/O.
//! The std mutexes (slice, dirty lists, pending, arenas) are inside of all of them and never held across a yield.

use super::alloc::{Alloc, Pending, Run};
use super::check::{CheckError, co_read_snapshots};
use super::claims::Claims;
use super::commit::Commits;
use super::compressed::CompressedCache;
use super::entry::{COPIED, Geometry, L2Entry};
use super::epoch::Epochs;
use super::header::{Compression, Header, Incompatible, Purpose};
use super::l2::{Kind, Mapper};
use super::lent::LentClusters;
use super::refcounts::{Refcounts, Surroundings};
use super::snapshot::Snapshot;
use super::{FormatError, GuestOffset, Qcow2Error, Qcow2OpenOptions, WriteHook};
use crate::block::shard::Sharded;
use crate::block::{
    BlockNode, DepthExtent, DirtyBitmap, DiscardMode, Error, Extent, Lent, Limits, Result, WriteFlags,
    co_read_header, iov,
};
use crate::co::CoMutex;
use std::collections::{BTreeSet, HashSet};
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

/// L2 cache when nothing is asked for: all of the disk, up to this many bytes (ours; 2 TiB at the default geometry).
const DEFAULT_L2_CACHE: u64 = 256 << 20;
/// Blocks of refcounts that are read to check one slice (ours: as many cover 16 GiB of 64 KiB clusters).
const COUNT_BLOCKS_PER_SLICE: u32 = 8;

/// Why an image is not written any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fault {
    /// It is well.
    None,
    /// Its metadata is damaged.
    Corrupt,
    /// A barrier has failed.
    Poisoned,
    /// It was closed.
    Closed,
}

/// An open qcow2 image.
///
/// The file below belongs to it alone while it is open.
pub struct Qcow2Node {
    name: String,
    pub(super) file: Arc<dyn BlockNode>,
    pub(super) data_file: Option<Arc<dyn BlockNode>>,
    /// The data file must be right without the mapping.
    pub(super) data_file_raw: bool,
    pub(super) backing: Option<Arc<dyn BlockNode>>,
    pub(super) g: Geometry,
    pub(super) compression: Compression,
    pub(super) discard: bool,
    /// The size of the L2 cache was asked for: it does not follow the disk's.
    l2_cache_asked: bool,
    read_only: bool,
    limits: Limits,
    len: AtomicU64,
    pub(super) l1_offset: AtomicU64,
    pub(super) map: Mapper,
    pub(super) epochs: Epochs,
    pub(super) claims: Claims,
    /// Held while an L2 table is made or copied.
    pub(super) tables: CoMutex<()>,
    pub(super) arenas: Sharded<Mutex<Vec<Run>>>,
    /// Clusters of an arena.
    pub(super) arena_clusters: u64,
    pub(super) alloc: CoMutex<Alloc>,
    pub(super) pending: Mutex<Pending>,
    /// L1 entries that differ from the file.
    pub(super) l1_dirty: Mutex<BTreeSet<u64>>,
    pub(super) commits: Commits,
    pub(super) compressed: CompressedCache,
    pub(super) lent: LentClusters,
    /// Host clusters that hold metadata; kept of writable images only.
    /// A cluster that two tables were found to lie in when the image was opened.
    overlap: OnceLock<u64>,
    metadata: RwLock<HashSet<u64>>,
    pub(super) header: Mutex<Header>,
    hooks: OnceLock<Vec<Arc<dyn WriteHook>>>,
    /// The header says that the image is being changed.
    ready: AtomicBool,
    first_change: CoMutex<()>,
    fault: AtomicU8,
}

impl Qcow2Node {
    /// Opens the image in `file`, which grows unless it is a device. Coroutine only; yields.
    ///
    /// # Errors
    /// [`Qcow2Error`] says what is wrong with which field.
    pub fn co_open(
        file: Arc<dyn BlockNode>,
        options: Qcow2OpenOptions,
    ) -> std::result::Result<Arc<Qcow2Node>, Qcow2Error> {
        let image = file.name().to_owned();
        let name = image.clone();
        let format = |e: FormatError| Qcow2Error::Format { image: image.clone(), source: e };
        let io = |e: Error| Qcow2Error::Io { image: image.clone(), source: e };

        let header = co_read_header(&*file, Purpose::Use).map_err(io)?.map_err(format)?;
        let writable = !options.read_only && options.snapshot.is_none();
        if writable && file.read_only() {
            return Err(Qcow2Error::FileReadOnly { image });
        }
        if writable && header.is_corrupt() {
            return Err(Qcow2Error::Corrupt { image });
        }
        if writable && header.is_dirty() {
            return Err(Qcow2Error::NeedsRepair { image });
        }
        let g = header.geometry();
        match (g.data_file, &options.data_file) {
            (true, None) => return Err(Qcow2Error::NoDataFile { image }),
            (false, Some(_)) => return Err(Qcow2Error::UnwantedDataFile { image }),
            _ => {}
        }

        // The active disk, or a snapshot's.
        let (mut len, mut l1_offset, mut l1_len) =
            (header.size, header.l1_table_offset, u64::from(header.l1_size));
        let mut snapshots = None;
        if header.nb_snapshots > 0 && (writable || options.snapshot.is_some()) {
            snapshots = Some(co_read_snapshots(&*file, &header).map_err(|e| match e {
                CheckError::Io(e) => io(e),
                CheckError::Format(e) => format(e),
                // A check's own: reading the table has no such errors.
                CheckError::TooBig | CheckError::Repair(_) => format(FormatError::NotQcow2),
            })?);
        }
        let mut l1_place = ("header".to_owned(), "l1_table_offset", "40-47");
        if let Some(which) = &options.snapshot {
            let found = snapshots.as_ref().and_then(|(all, _)| which.find(all).map(|i| (i, &all[i])));
            let Some((index, s)) = found else {
                return Err(Qcow2Error::NoSnapshot { image, wanted: which.to_string() });
            };
            l1_offset = s.l1_table_offset;
            l1_len = u64::from(s.l1_size);
            len = s.disk_size.unwrap_or(len);
            let structure = format!("snapshot table entry {index}");
            if l1_len < g.l1_entries_for(len) {
                return Err(format(FormatError::Field {
                    structure,
                    field: "L1 table size",
                    bytes: "8-11",
                    value: l1_len,
                    rule: "the L1 table is too small for the disk's size",
                }));
            }
            l1_place = (structure, "L1 table offset", "0-7");
        }
        if l1_len > 0 && l1_offset.checked_add(l1_len * 8).is_none_or(|e| e > file.len()) {
            let (structure, field, bytes) = l1_place;
            let rule = "the L1 table reaches past the end of the file";
            return Err(format(FormatError::Field { structure, field, bytes, value: l1_offset, rule }));
        }
        let cache = options.l2_cache_bytes.unwrap_or_else(|| default_l2_cache(g, len));
        let map = Mapper::new(g, l1_len, cache);
        co_read_l1(&*file, l1_offset, l1_len, &map).map_err(io)?;

        let (mut reftable, mut reftable_offset) = (Vec::new(), 0);
        if writable {
            reftable_offset = header.refcount_table_offset;
            let bytes = u64::from(header.refcount_table_clusters) << g.cluster_bits;
            if reftable_offset
                .checked_add(bytes)
                .is_none_or(|e| e.saturating_sub(g.cluster_size()) >= file.len())
            {
                return Err(format(FormatError::Field {
                    structure: "header".to_owned(),
                    field: "refcount_table_offset",
                    bytes: "48-55",
                    value: reftable_offset,
                    rule: "the refcount table reaches past the end of the file",
                }));
            }
            reftable = co_read_words(&*file, reftable_offset, bytes / 8).map_err(io)?;
        }
        let fresh = if file.grows() { g.clusters_for(file.len()) } else { u64::MAX };
        let refcounts = Refcounts::new(g, Arc::clone(&file), reftable_offset, reftable);
        let file_limits = file.limits();
        let node = Arc::new(Qcow2Node {
            name,
            data_file: options.data_file,
            data_file_raw: header.raw_data(),
            backing: options.backing,
            g,
            compression: header.compression,
            discard: options.discard == DiscardMode::Unmap,
            l2_cache_asked: options.l2_cache_bytes.is_some(),
            read_only: !writable,
            limits: Limits {
                request_alignment: 1,
                preferred: (g.subcluster_size().clamp(4096, 64 << 10)) as u32,
                fast_zero: writable && !g.v2,
                rotational: file_limits.rotational,
            },
            len: AtomicU64::new(len),
            l1_offset: AtomicU64::new(l1_offset),
            map,
            epochs: Epochs::new(),
            claims: Claims::default(),
            tables: CoMutex::new(()),
            arenas: Sharded::new(),
            arena_clusters: super::alloc::arena_clusters(g, options.arena_bytes),
            alloc: CoMutex::new(Alloc::new(refcounts, fresh)),
            pending: Mutex::new(Pending::default()),
            l1_dirty: Mutex::new(BTreeSet::new()),
            commits: Commits::new(),
            compressed: CompressedCache::new(g.cluster_size()),
            lent: LentClusters::default(),
            metadata: RwLock::new(HashSet::new()),
            overlap: OnceLock::new(),
            header: Mutex::new(header),
            hooks: OnceLock::new(),
            ready: AtomicBool::new(false),
            first_change: CoMutex::new(()),
            fault: AtomicU8::new(Fault::None as u8),
            file,
        });
        if writable {
            node.co_learn_metadata(snapshots.as_ref());
        }
        Ok(node)
    }

    /// Sets who is told about changes. Once, before the first of them.
    ///
    /// # Panics
    /// The second time.
    pub fn set_write_hooks(&self, hooks: Vec<Arc<dyn WriteHook>>) {
        assert!(self.hooks.set(hooks).is_ok(), "write hooks are set once");
        assert!(!self.ready.load(Ordering::SeqCst), "write hooks are set before the first change");
    }

    pub(super) fn hooks(&self) -> &[Arc<dyn WriteHook>] {
        self.hooks.get().map_or(&[], Vec::as_slice)
    }

    /// Makes everything durable and gives back what was taken in advance. No request may be running, none may come
    /// later. An image that was not changed is not written. Coroutine only; yields.
    ///
    /// # Errors
    /// The errno of what could not be written.
    pub fn co_close(&self) -> Result<()> {
        if self.read_only || !self.ready.load(Ordering::SeqCst) || self.fault() == Fault::Closed {
            return Ok(());
        }
        let r = self.co_settle();
        self.set_fault(Fault::Closed);
        r
    }

    fn co_settle(&self) -> Result<()> {
        if self.fault() == Fault::None {
            for hook in self.hooks() {
                hook.co_before_close(self)?;
            }
            self.co_empty_arenas()?;
        }
        // What a commit frees is counted down by the next.
        for _ in 0..4 {
            self.map.flag.mark();
            self.co_flush_all()?;
            if !self.alloc.co_lock().refcounts.is_dirty() {
                break;
            }
        }
        Ok(())
    }

    // ------------------------------------------------------------------------------------------ first change

    /// Whether changes may be made without a look at anything else.
    pub(super) fn may_change_now(&self) -> bool {
        !self.read_only && self.ready.load(Ordering::Acquire) && self.fault() == Fault::None
    }

    /// Checks, after something was looked up for a change, that what was found may be trusted: loading it may have shown
    /// that the image is damaged.
    pub(super) fn check_well(&self, op: &'static str, offset: u64) -> Result<()> {
        match self.fault() {
            Fault::None => Ok(()),
            _ => Err(Error::from_errno(op, &self.name, offset, libc::EIO)),
        }
    }

    /// Checks that changes may be made, and prepares the image for the first of them. Yields.
    pub(super) fn co_begin_change(&self, op: &'static str, offset: u64) -> Result<()> {
        if self.may_change_now() {
            return Ok(());
        }
        if self.read_only {
            return Err(Error::from_errno(op, &self.name, offset, libc::EPERM));
        }
        if self.fault() != Fault::None {
            return Err(Error::from_errno(op, &self.name, offset, libc::EIO));
        }
        self.co_get_ready()
    }

    #[cold]
    fn co_get_ready(&self) -> Result<()> {
        let _first = self.first_change.co_lock();
        if self.ready.load(Ordering::SeqCst) {
            return Ok(());
        }
        if let Some(cluster) = self.overlap.get() {
            return Err(self.co_mark_corrupt("two tables share a cluster", cluster << self.g.cluster_bits));
        }
        self.co_check_own_counts()?;
        self.co_check_l1_flags()?;
        // Unknown autoclear features are not kept up by us; bitmaps are if somebody does it.
        let keep = {
            let header = self.header.lock().unwrap_or_else(PoisonError::into_inner);
            header.autoclear_to_keep(!self.hooks().is_empty())
        };
        if let Some(keep) = keep {
            self.co_write_header_field(88, &keep.bits().to_be_bytes())?;
            self.header.lock().unwrap_or_else(PoisonError::into_inner).autoclear = keep;
        }
        for hook in self.hooks() {
            hook.co_before_first_change(self)?;
        }
        self.ready.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Refuses an image whose own tables are not counted: its free clusters are not free.
    fn co_check_own_counts(&self) -> Result<()> {
        let g = self.g;
        let mut a = self.alloc.co_lock();
        let l1 = self.l1_offset.load(Ordering::SeqCst) >> g.cluster_bits;
        let l1 = l1..l1 + g.clusters_for(self.map.l1_len() * 8);
        let table = a.refcounts.table_clusters();
        for (clusters, what) in [
            (0..1, "the header's cluster has another refcount than 1"),
            (l1, "the L1 table has refcount 0"),
            (table, "the refcount table has refcount 0"),
        ] {
            for c in clusters {
                // A wrong refcount width makes ones of the header's something else.
                let count = a.refcounts.co_get(c, self)?;
                if count == 0 || (c == 0 && count != 1) {
                    return Err(self.co_mark_corrupt(what, c << g.cluster_bits));
                }
            }
        }
        Ok(())
    }

    /// Writes bytes of the header, within its first sector, durably. Yields.
    pub(super) fn co_write_header_field(&self, at: u64, bytes: &[u8]) -> Result<()> {
        assert!(at + bytes.len() as u64 <= 104, "the fields are in one sector");
        super::io::co_write(&*self.file, at, &[IoSlice::new(bytes)], WriteFlags::empty())?;
        self.co_barrier()
    }

    /// Tells the hooks about a change. Never yields.
    pub(super) fn changed(&self, offset: u64, len: u64) {
        for hook in self.hooks() {
            hook.changed(offset, len);
        }
    }

    // ------------------------------------------------------------------------------------------------ faults

    pub(super) fn fault(&self) -> Fault {
        match self.fault.load(Ordering::Acquire) {
            0 => Fault::None,
            1 => Fault::Corrupt,
            2 => Fault::Poisoned,
            _ => Fault::Closed,
        }
    }

    /// Makes the image read-only; `false` when it was so for the same reason, or a worse one.
    pub(super) fn set_fault(&self, fault: Fault) -> bool {
        self.fault.fetch_max(fault as u8, Ordering::SeqCst) < fault as u8
    }

    /// The metadata is damaged: a writable image becomes read-only and is marked. Returns the error for the request.
    /// Yields.
    pub(super) fn co_mark_corrupt(&self, what: &str, offset: u64) -> Error {
        let error = Error::from_errno("qcow2", &self.name, offset, libc::EIO);
        if self.read_only {
            tracing::warn!(node = %self.name, offset, what, "the image is damaged here");
            return error;
        }
        if !self.set_fault(Fault::Corrupt) {
            tracing::debug!(node = %self.name, offset, what, "the image is damaged here too");
            return error;
        }
        tracing::error!(
            node = %self.name,
            offset,
            what,
            "the image is damaged and is read-only from now on; run conbd check or qemu-img check on it"
        );
        if !self.g.v2 {
            let bits = {
                let mut header = self.header.lock().unwrap_or_else(PoisonError::into_inner);
                header.incompatible |= Incompatible::CORRUPT;
                header.incompatible.bits()
            };
            if let Err(e) = self.co_write_header_field(72, &bits.to_be_bytes()) {
                tracing::error!(node = %self.name, errno = e.errno(), "the image could not be marked as damaged");
            }
        }
        error
    }

    /// An entry that maps a guest offset breaks the format's rules: says where it stands in the file. Yields.
    pub(super) fn co_bad_entry(&self, e: &FormatError, guest: u64) -> Error {
        let g = self.g;
        let index = g.l1_index(GuestOffset(guest));
        let at = match (e, g.l1_entry(self.map.l1_raw(index))) {
            (FormatError::Entry { table, .. }, Ok(Some((l2, _)))) if *table != "L1" => {
                l2.0 + g.l2_index(GuestOffset(guest)) * g.l2_entry_size()
            }
            _ => self.l1_offset.load(Ordering::SeqCst) + index * 8,
        };
        self.co_mark_corrupt(&format!("{e} (at byte {at:#x} of the file)"), guest)
    }

    /// Looks at the entries of a slice that was just read: a writable image must not point into its own metadata or past
    /// the end of its file.
    pub(super) fn co_check_slice(&self, bytes: &[u8], guest: u64) {
        if self.read_only || self.g.data_file {
            return;
        }
        let g = self.g;
        let end = self.file.len();
        let words = bytes.as_chunks::<8>().0;
        let bad = {
            let metadata = self.metadata.read().unwrap_or_else(PoisonError::into_inner);
            words.iter().step_by(if g.extended_l2 { 2 } else { 1 }).find_map(|w| {
                let raw = u64::from_be_bytes(*w);
                // What cannot be decoded is told to whoever asks for it.
                let host = match g.l2_entry(raw).ok()? {
                    L2Entry::Unallocated => return None,
                    L2Entry::Compressed { offset, .. } => offset.0,
                    L2Entry::Zero { host, .. } => host?.0,
                    L2Entry::Data { host, .. } => host.0,
                };
                if host >= end {
                    Some((host, "an L2 entry points past the end of the file"))
                } else if metadata.contains(&(host >> g.cluster_bits)) {
                    Some((host, "an L2 entry points to metadata"))
                } else {
                    None
                }
            })
        };
        if let Some((host, what)) = bad {
            tracing::error!(node = %self.name, guest_offset = guest, host_offset = host, what, "damaged L2 table");
            self.co_mark_corrupt(what, host);
        }
    }

    /// Compares the entries of a slice that was just read with the refcounts, which no request can have changed for them. A
    /// cluster in use that counts 0 would be given away: the image is damaged. One that counts more than 1 has other users,
    /// whatever its COPIED flag says: the flag goes, so that it is copied and not overwritten. Yields.
    ///
    /// QEMU believes the flag. Here a lookup costs a few nanoseconds where the block of counts is in memory; few others are
    /// read for a slice, and the allocator is let go between them. The rest is believed.
    pub(super) fn co_check_counts(&self, bytes: &mut [u8]) {
        if self.read_only || self.g.data_file {
            return;
        }
        let g = self.g;
        let mut alloc = None;
        let mut reads = 0;
        for word in bytes.as_chunks_mut::<8>().0.iter_mut().step_by(if g.extended_l2 { 2 } else { 1 }) {
            let raw = u64::from_be_bytes(*word);
            let host = match g.l2_entry(raw) {
                Ok(L2Entry::Data { host, .. } | L2Entry::Zero { host: Some(host), .. }) => host,
                Ok(L2Entry::Compressed { offset, .. }) => offset,
                // What cannot be decoded is told to whoever asks for it.
                _ => continue,
            };
            let cluster = host.0 >> g.cluster_bits;
            let mut a = alloc.take().unwrap_or_else(|| self.alloc.co_lock());
            if !a.refcounts.knows(cluster) {
                if reads == COUNT_BLOCKS_PER_SLICE {
                    alloc = Some(a);
                    continue;
                }
                reads += 1;
                // Who waits for it has its turn.
                drop(a);
                a = self.alloc.co_lock();
            }
            // A count that cannot be read is told to whoever allocates.
            let Ok(count) = a.refcounts.co_get(cluster, self) else { return };
            if count == 0 {
                drop(a);
                self.co_mark_corrupt("a cluster in use has refcount 0", host.0);
                return;
            }
            if count > 1 && raw & COPIED != 0 {
                *word = (raw & !COPIED).to_be_bytes();
            }
            alloc = Some(a);
        }
    }

    /// Compares the COPIED flags of the L1 table with the refcounts, where a snapshot could share an L2 table.
    fn co_check_l1_flags(&self) -> Result<()> {
        if self.header.lock().unwrap_or_else(PoisonError::into_inner).nb_snapshots == 0 {
            return Ok(());
        }
        let mut a = self.alloc.co_lock();
        for i in 0..self.map.l1_len() {
            let raw = self.map.l1_raw(i);
            let Ok(Some((host, true))) = self.g.l1_entry(raw) else { continue };
            let count = a.refcounts.co_get(host.0 >> self.g.cluster_bits, self)?;
            if count == 0 {
                drop(a);
                return Err(self.co_mark_corrupt("an L2 table has refcount 0", host.0));
            }
            if count > 1 {
                // Nobody has changed anything yet: the table is copied before its first change.
                self.map.set_l1_raw(i, raw & !COPIED);
            }
        }
        Ok(())
    }

    // ---------------------------------------------------------------------------------------------- metadata

    /// Notes where metadata is.
    fn co_learn_metadata(&self, snapshots: Option<&(Vec<Snapshot>, u64)>) {
        let g = self.g;
        let mut set = self.metadata.write().unwrap_or_else(PoisonError::into_inner);
        let mut add = |offset: u64, bytes: u64| {
            let first = offset >> g.cluster_bits;
            for c in first..first + g.clusters_for(bytes) {
                if !set.insert(c) {
                    self.overlap.get_or_init(|| c);
                }
            }
        };
        add(0, 1);
        add(self.l1_offset.load(Ordering::SeqCst), self.map.l1_len() * 8);
        for i in 0..self.map.l1_len() {
            if let Ok(Some((host, _))) = g.l1_entry(self.map.l1_raw(i)) {
                add(host.0, 1);
            }
        }
        {
            let header = self.header.lock().unwrap_or_else(PoisonError::into_inner);
            add(header.refcount_table_offset, u64::from(header.refcount_table_clusters) << g.cluster_bits);
            if let Some((all, byte_len)) = snapshots {
                add(header.snapshots_offset, *byte_len);
                for s in all {
                    add(s.l1_table_offset, u64::from(s.l1_size) * 8);
                }
            }
        }
        // Nobody else is here yet.
        let a = self.alloc.try_lock().expect("the image is being opened");
        let blocks: Vec<u64> = a.refcounts.block_offsets().collect();
        drop(a);
        for b in blocks {
            add(b, 1);
        }
    }

    pub(super) fn is_metadata_cluster(&self, cluster: u64) -> bool {
        self.metadata.read().unwrap_or_else(PoisonError::into_inner).contains(&cluster)
    }

    pub(super) fn set_metadata_clusters(&self, clusters: Range<u64>, metadata: bool) {
        let mut set = self.metadata.write().unwrap_or_else(PoisonError::into_inner);
        for c in clusters {
            if metadata {
                set.insert(c);
            } else {
                set.remove(&c);
            }
        }
    }

    // ------------------------------------------------------------------------------- for bitmaps and tools

    /// Layout of the image's tables.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.g
    }

    /// How many commits have been made, for tests and metrics.
    #[must_use]
    pub fn commits(&self) -> u64 {
        self.commits.count()
    }

    /// Where a guest byte is in the file (or the data file), if it is there as it is. For tests. Yields.
    ///
    /// # Errors
    /// As reading it.
    #[doc(hidden)]
    pub fn co_host_offset(&self, offset: u64) -> Result<Option<u64>> {
        let _ticket = self.epochs.ticket();
        Ok(match self.co_map(offset, 1)?.kind {
            Kind::Data { host, .. } => Some(host),
            _ => None,
        })
    }

    /// How many slices of L2 tables were read from the file, for tests and metrics.
    #[must_use]
    pub fn slices_loaded(&self) -> u64 {
        self.map.loaded()
    }

    /// Flushes, unless the image is beyond that. Yields.
    pub(super) fn co_flush_all(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        if self.fault() == Fault::Poisoned {
            return Err(Error::from_errno("flush", &self.name, 0, libc::EIO));
        }
        self.co_commit()
    }
}

impl Surroundings for Qcow2Node {
    fn is_metadata(&self, cluster: u64) -> bool {
        self.is_metadata_cluster(cluster)
    }

    fn set_metadata(&self, clusters: Range<u64>, metadata: bool) {
        self.set_metadata_clusters(clusters, metadata);
    }

    fn co_move_reftable(&self, offset: u64, clusters: u32) -> Result<()> {
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(&offset.to_be_bytes());
        bytes[8..].copy_from_slice(&clusters.to_be_bytes());
        // If that fails nobody knows which table the file names: nothing may be written any more.
        self.co_write_header_field(48, &bytes).inspect_err(|e| self.poison(e))?;
        let mut header = self.header.lock().unwrap_or_else(PoisonError::into_inner);
        header.refcount_table_offset = offset;
        header.refcount_table_clusters = clusters;
        Ok(())
    }

    fn co_corrupt(&self, what: &str, offset: u64) -> Error {
        self.co_mark_corrupt(what, offset)
    }

    fn co_barrier(&self) -> Result<()> {
        Qcow2Node::co_barrier(self)
    }
}

impl BlockNode for Qcow2Node {
    fn name(&self) -> &str {
        &self.name
    }

    fn is_format(&self) -> bool {
        true
    }

    fn co_close(&self) -> Result<()> {
        Qcow2Node::co_close(self)
    }

    fn len(&self) -> u64 {
        self.len.load(Ordering::SeqCst)
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn as_qcow2(&self) -> Option<&Qcow2Node> {
        Some(self)
    }

    fn take_backing(&mut self) -> Option<Arc<dyn BlockNode>> {
        self.backing.take()
    }

    fn try_pread_some(&self, offset: u64, buf: &mut [u8]) -> usize {
        self.assert_bounds(offset, buf.len() as u64);
        self.try_read(offset, buf)
    }

    fn try_preadv_some(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> usize {
        self.assert_bounds(offset, iov::total_mut(bufs) as u64);
        self.try_readv(offset, bufs)
    }

    fn lends(&self, offset: u64, len: usize, no_holes: bool) -> bool {
        self.assert_bounds(offset, len as u64);
        self.lends_all(offset, len as u64, no_holes)
    }

    fn try_lend(&self, offset: u64, len: usize, f: &mut dyn FnMut(&Lent<'_>)) -> bool {
        self.assert_bounds(offset, len as u64);
        self.try_lend_front(offset, len as u64, f)
    }

    fn try_pwrite(&self, offset: u64, buf: &[u8]) -> Option<Result<()>> {
        self.try_pwritev(offset, &[IoSlice::new(buf)])
    }

    fn try_pwritev(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Option<Result<()>> {
        let len = iov::total(bufs) as u64;
        self.assert_bounds(offset, len);
        if len == 0 { None } else { self.try_write(offset, bufs, len) }
    }

    fn co_preadv(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.assert_bounds(offset, iov::total_mut(bufs) as u64);
        self.co_read(offset, bufs)
    }

    fn co_pwritev(&self, offset: u64, bufs: &[IoSlice<'_>], flags: WriteFlags) -> Result<()> {
        self.assert_bounds(offset, iov::total(bufs) as u64);
        self.co_write(offset, bufs, flags)
    }

    fn co_pwrite_zeroes(&self, offset: u64, len: u64, flags: WriteFlags) -> Result<()> {
        self.assert_bounds(offset, len);
        if len == 0 { Ok(()) } else { self.co_zero(offset, len, flags) }
    }

    fn co_pdiscard(&self, offset: u64, len: u64) -> Result<()> {
        self.assert_bounds(offset, len);
        if len == 0 { Ok(()) } else { self.co_discard(offset, len) }
    }

    fn co_resize(&self, at_least: u64) -> Result<u64> {
        // A device below may have become larger: there is more room to allocate in.
        if !self.file.grows() {
            self.file.co_resize(0)?;
        }
        if let Some(data) = self.data_file.as_ref().filter(|d| !d.grows()) {
            data.co_resize(0)?;
        }
        if at_least > self.len() {
            self.co_grow(at_least)?;
        }
        Ok(self.len())
    }

    fn co_flush(&self) -> Result<()> {
        self.co_flush_all()
    }

    fn co_block_status(&self, offset: u64, len: u64) -> Result<Extent> {
        self.assert_bounds(offset, len);
        self.co_status(offset, len)
    }

    fn co_allocation_depth(&self, offset: u64, len: u64) -> Result<DepthExtent> {
        self.assert_bounds(offset, len);
        self.co_depth(offset, len)
    }

    fn dirty_bitmaps(&self) -> Vec<Arc<dyn DirtyBitmap>> {
        self.hooks().iter().flat_map(|h| h.dirty_bitmaps()).collect()
    }
}

impl Qcow2Node {
    fn assert_bounds(&self, offset: u64, len: u64) {
        assert!(offset.checked_add(len).is_some_and(|e| e <= self.len()), "the range was validated above");
    }

    pub(super) fn set_len(&self, len: u64) {
        self.len.store(len, Ordering::SeqCst);
    }

    /// Gives the L2 cache the room that a disk of `len` bytes gets, unless its size was asked for.
    pub(super) fn cover_with_cache(&self, len: u64) {
        if !self.l2_cache_asked {
            self.map.make_room(default_l2_cache(self.g, len));
        }
    }
}

impl Drop for Qcow2Node {
    fn drop(&mut self) {
        // In a loop: a long chain that drops itself by recursion does not fit a coroutine's stack.
        let mut next = self.backing.take();
        while let Some(mut node) = next {
            next = Arc::get_mut(&mut node).and_then(|n| n.take_backing());
        }
    }
}

/// Bytes of L2 cache for a disk of `len` bytes, when nothing is asked for.
fn default_l2_cache(g: Geometry, len: u64) -> u64 {
    DEFAULT_L2_CACHE.min(g.l1_entries_for(len).saturating_mul(g.cluster_size()))
}

/// Reads a table of 64-bit words.
fn co_read_words(file: &dyn BlockNode, offset: u64, count: u64) -> Result<Vec<u64>> {
    let mut bytes = vec![0; count as usize * 8];
    super::io::co_read(file, offset, &mut [IoSliceMut::new(&mut bytes)])?;
    Ok(bytes.as_chunks::<8>().0.iter().map(|w| u64::from_be_bytes(*w)).collect())
}

/// Reads the L1 table.
fn co_read_l1(file: &dyn BlockNode, offset: u64, len: u64, map: &Mapper) -> Result<()> {
    /// Entries read at once.
    const PIECE: u64 = 64 << 10;
    let mut at = 0;
    while at < len {
        let n = (len - at).min(PIECE);
        for (i, raw) in co_read_words(file, offset + at * 8, n)?.into_iter().enumerate() {
            map.set_l1_raw(at + i as u64, raw);
        }
        at += n;
    }
    Ok(())
}
