//! The mapping in memory: the L1 table, and a cache of slices of L2 tables.
//!
//! ```text
//!   guest cluster ─► L1 slot { entry, slices ─► [slot; slices of a table] } ─► slab[n] = Slice { seq, entries }
//! ```
//! A lookup is these loads, no lock, no shared cache line written: see [`Mapper::read`]. A slice is a part of an L2
//! table, 4 KiB or the whole table if that is smaller. Slices are never freed but given another content (*retagged*), so
//! a reader may look at one that is being retagged; it checks version and tag (`seq`) around its
//! loads and looks again. All fields are atomics, so nothing worse than looking again happens.
//!
//! Who changes entries holds the slice's lock, and a claim on the guest clusters (`claims`). A dirty slice (changed
//! since the last commit copied it), and one whose copy is being written, is not evicted. Clean ones go by a clock hand.
//! A slice is loaded by one coroutine; others that want the same one wait, others do not.

use super::FormatError;
use super::commit::DirtyFlag;
use super::entry::{Geometry, L2Entry, Subcluster};
use super::header::MAX_L1_BYTES;
use super::seq::Seq;
use crate::block::wait::{co_wait_until, lock};
use crate::co::CoQueue;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};

/// Bytes of a slice, unless the table is smaller (ours).
const SLICE_BYTES: u64 = 4096;

/// L1 entries per chunk (ours).
const L1_CHUNK: u64 = 1024;

/// Fewest slices of a cache (ours: so that requests on many threads always find a clean one).
const MIN_SLICES: u64 = 64;

/// Dirty slices that make a commit worthwhile though nothing has to be evicted (ours: 4 MiB of them).
const MANY_DIRTY: usize = 1024;

/// Most slices of a cache: 1 GiB of them.
const MAX_SLICES: u64 = 256 << 10;

/// Slices per chunk of the slab (ours).
const SLAB_CHUNK: u64 = 512;

/// Looks at a slice that is being changed before the reader takes its lock instead (ours).
const SPINS: u32 = 100;

/// No guest slice has this number.
const NO_SLICE: u64 = u64::MAX;

/// What a guest range is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Read from the backing image.
    Unallocated,
    /// Reads as zeroes.
    Zero,
    /// In the file (or the data file) from `host` on. `in_place`: its refcount is one, so it may be overwritten there.
    Data { host: u64, in_place: bool },
    /// Part of a compressed cluster, which is in the file at `offset`; `raw` is its entry.
    Compressed { raw: u64, offset: u64, len: u32 },
}

/// What a guest range is, from the asked offset on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) kind: Kind,
    /// Bytes; at least 1, at most what was asked.
    pub(super) len: u64,
}

/// Answer of a lookup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Look<T> {
    /// There it is.
    Found(T),
    /// There is no L2 table: unallocated, up to the end of what that table would map.
    NoTable,
    /// The slice must be loaded first.
    Miss,
    /// The L1 or L2 entry breaks the format's rules.
    Bad(FormatError),
}

struct L1Slot {
    /// As in the file, in native order.
    entry: AtomicU64,
    /// For each slice of the table: its index in the slab plus 1; 0: not there.
    slices: OnceLock<Box<[AtomicU32]>>,
}

/// A part of an L2 table.
pub(super) struct Slice {
    /// Its tag is the number of the guest slice that this holds. Open while words or tag change in a way that a reader must
    /// not see half of.
    seq: Seq,
    /// Clock bit: used since the hand passed. Stored only when clear.
    referenced: AtomicBool,
    state: Mutex<SliceState>,
    /// One word per entry, two with extended L2 entries; as in the file, in native order.
    words: Box<[AtomicU64]>,
}

#[derive(Default)]
struct SliceState {
    /// Differs from the file; in the list of dirty ones.
    dirty: bool,
    /// A commit's copy of it is being written.
    writing: bool,
    /// Is being loaded.
    busy: bool,
}

/// [`SLAB_CHUNK`] slices, made one by one.
type SlabChunk = Box<[OnceLock<Slice>]>;

struct Clock {
    /// Slices of the slab that exist.
    made: usize,
    /// Existing ones that hold nothing.
    free: Vec<u32>,
    hand: usize,
}

/// The bytes of a slice as a commit writes them.
pub(super) struct SliceCopy {
    index: u32,
    /// Where they go in the file.
    pub(super) host: u64,
    /// The entries.
    pub(super) bytes: Vec<u8>,
}

/// The L1 table and the slices. Any thread.
pub(super) struct Mapper {
    g: Geometry,
    /// log2 of the entries of a slice.
    slice_bits: u32,
    words_per_entry: usize,
    l1: Box<[OnceLock<Box<[L1Slot]>>]>,
    l1_len: AtomicU64,
    /// In chunks, so that there can be room for more later.
    slab: Box<[OnceLock<SlabChunk>]>,
    /// Slices that there may be.
    room: AtomicUsize,
    clock: Mutex<Clock>,
    /// Guest slices that are being loaded.
    loads: Mutex<HashSet<u64>>,
    /// Guarded by `loads`.
    load_waiters: CoQueue,
    /// Whether there is anything to commit, L1 entries included.
    pub(super) flag: DirtyFlag,
    dirty: Mutex<Vec<u32>>,
    dirty_count: AtomicUsize,
    loaded: AtomicU64,
}

/// A slice that is being loaded by the current coroutine; wakes those who wait for it.
pub(super) struct Loading<'a> {
    mapper: &'a Mapper,
    number: u64,
    /// Slab index, once one was found.
    index: Option<u32>,
}

/// Exclusive access to the entries of one slice; never held across a yield.
pub(super) struct SliceEdit<'a> {
    mapper: &'a Mapper,
    index: u32,
    slice: &'a Slice,
    state: MutexGuard<'a, SliceState>,
    first: u64,
    opened: bool,
}

/// How many slices of `slice_bytes` a cache of `cache_bytes` has.
fn slices_in(cache_bytes: u64, slice_bytes: u64) -> u64 {
    (cache_bytes / slice_bytes).clamp(MIN_SLICES, MAX_SLICES)
}

impl Mapper {
    /// Makes one with an empty L1 table of `l1_len` entries and room for `cache_bytes` of slices.
    pub(super) fn new(g: Geometry, l1_len: u64, cache_bytes: u64) -> Mapper {
        let slice_bits = g.l2_bits().min((SLICE_BYTES / g.l2_entry_size()).trailing_zeros());
        let slice_bytes = g.l2_entry_size() << slice_bits;
        let slices = slices_in(cache_bytes, slice_bytes);
        Mapper {
            g,
            slice_bits,
            words_per_entry: if g.extended_l2 { 2 } else { 1 },
            l1: (0..(MAX_L1_BYTES / 8).div_ceil(L1_CHUNK)).map(|_| OnceLock::new()).collect(),
            l1_len: AtomicU64::new(l1_len),
            slab: (0..MAX_SLICES / SLAB_CHUNK).map(|_| OnceLock::new()).collect(),
            room: AtomicUsize::new(slices as usize),
            clock: Mutex::new(Clock { made: 0, free: Vec::new(), hand: 0 }),
            loads: Mutex::new(HashSet::new()),
            load_waiters: CoQueue::new(),
            flag: DirtyFlag::new(),
            dirty: Mutex::new(Vec::new()),
            dirty_count: AtomicUsize::new(0),
            loaded: AtomicU64::new(0),
        }
    }

    /// Lets there be as many slices as `cache_bytes` have room for, if that is more than now. Never yields.
    pub(super) fn make_room(&self, cache_bytes: u64) {
        let slices = slices_in(cache_bytes, self.slice_bytes() as u64);
        // Under the clock's lock, as whoever makes slices looks there.
        let _clock = lock(&self.clock);
        self.room.fetch_max(slices as usize, Ordering::Relaxed);
    }

    // ------------------------------------------------------------------------------------------------- L1

    pub(super) fn l1_len(&self) -> u64 {
        self.l1_len.load(Ordering::SeqCst)
    }

    /// Makes the table longer in memory; new entries are 0.
    pub(super) fn set_l1_len(&self, len: u64) {
        assert!(len >= self.l1_len(), "an L1 table never becomes shorter");
        assert!(len <= MAX_L1_BYTES / 8, "the L1 table's size was checked");
        self.l1_len.store(len, Ordering::SeqCst);
    }

    fn l1_slot(&self, index: u64) -> Option<&L1Slot> {
        let chunk = self.l1.get((index / L1_CHUNK) as usize)?.get()?;
        Some(&chunk[(index % L1_CHUNK) as usize])
    }

    /// The L1 entry as it is in the file; 0 past the end of the table.
    pub(super) fn l1_raw(&self, index: u64) -> u64 {
        self.l1_slot(index).map_or(0, |s| s.entry.load(Ordering::Acquire))
    }

    pub(super) fn set_l1_raw(&self, index: u64, raw: u64) {
        assert!(index < self.l1_len(), "the index is inside of the L1 table");
        if raw == 0 && self.l1_slot(index).is_none() {
            return;
        }
        let chunk = self.l1[(index / L1_CHUNK) as usize].get_or_init(|| {
            (0..L1_CHUNK).map(|_| L1Slot { entry: AtomicU64::new(0), slices: OnceLock::new() }).collect()
        });
        // Pairs with the Acquire load in `l1_raw`.
        chunk[(index % L1_CHUNK) as usize].entry.store(raw, Ordering::Release);
    }

    // ---------------------------------------------------------------------------------------------- lookup

    fn entries_per_slice(&self) -> u64 {
        1 << self.slice_bits
    }

    /// Guest clusters from `cluster` on that are in the same slice.
    pub(super) fn left_in_slice(&self, cluster: u64) -> u64 {
        self.entries_per_slice() - (cluster & (self.entries_per_slice() - 1))
    }

    fn l1_index_of(&self, cluster: u64) -> u64 {
        cluster >> self.g.l2_bits()
    }

    /// Index of the slice within its table.
    fn slice_in_table(&self, cluster: u64) -> usize {
        ((cluster & (self.g.l2_entries() - 1)) >> self.slice_bits) as usize
    }

    /// Where the slice of `cluster` is in the L2 table at `table`.
    fn slice_host(&self, table: u64, number: u64) -> u64 {
        let per_table = self.g.l2_entries() >> self.slice_bits;
        table + (number & (per_table - 1)) * (self.g.l2_entry_size() << self.slice_bits)
    }

    /// Looks at the slice of a guest cluster: `f` gets its words and the cluster's place in them. `f` may run several
    /// times, on words that do not belong together; its last value counts. Never yields.
    #[inline(never)]
    pub(super) fn read<T>(&self, cluster: u64, f: impl Fn(&[AtomicU64], usize) -> T) -> Look<T> {
        let Some(l1) = self.l1_slot(self.l1_index_of(cluster)) else { return Look::NoTable };
        match self.g.l1_entry(l1.entry.load(Ordering::Acquire)) {
            Ok(None) => return Look::NoTable,
            Ok(Some(_)) => {}
            Err(e) => return Look::Bad(e),
        }
        let Some(slots) = l1.slices.get() else { return Look::Miss };
        let slot = &slots[self.slice_in_table(cluster)];
        let number = cluster >> self.slice_bits;
        let at = (cluster & (self.entries_per_slice() - 1)) as usize * self.words_per_entry;
        let mut spins = 0;
        loop {
            let index = slot.load(Ordering::Acquire);
            if index == 0 {
                return Look::Miss;
            }
            let slice = self.slice(index - 1);
            if let Some(value) = slice.seq.read(number, || f(&slice.words, at)) {
                if !slice.referenced.load(Ordering::Relaxed) {
                    slice.referenced.store(true, Ordering::Relaxed);
                }
                return Look::Found(value);
            }
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
                continue;
            }
            // The changer was preempted, perhaps.
            let held = lock(&slice.state);
            if slice.seq.tag() == number && !held.busy {
                return Look::Found(f(&slice.words, at));
            }
        }
    }

    fn slice(&self, index: u32) -> &Slice {
        let (chunk, at) = (index as usize / SLAB_CHUNK as usize, index as usize % SLAB_CHUNK as usize);
        let slice = self.slab[chunk].get().and_then(|c| c[at].get());
        slice.expect("indices are given out for slices that were made")
    }

    /// What the guest range is from `offset` on, for at most `len` bytes. Never yields.
    pub(super) fn map(&self, offset: u64, len: u64) -> Look<Mapping> {
        debug_assert!(len > 0);
        let cluster = offset >> self.g.cluster_bits;
        let in_cluster = self.g.in_cluster(offset);
        let found = self.read(cluster, |words, at| self.map_words(words, at, in_cluster, len));
        match found {
            Look::Found(Ok(Mapping { kind: Kind::Data { host, .. }, .. }))
                if self.g.data_file && host != offset =>
            {
                Look::Bad(FormatError::Entry {
                    table: "L2",
                    raw: host,
                    rule: "with an external data file, clusters are at their guest offset",
                })
            }
            Look::Found(Ok(m)) => Look::Found(m),
            Look::Found(Err(e)) | Look::Bad(e) => Look::Bad(e),
            Look::Miss => Look::Miss,
            Look::NoTable => {
                let shift = self.g.l1_shift();
                let mut index = offset >> shift;
                let end = offset + len;
                // Several tables that are not there are one range.
                while (index + 1) << shift < end
                    && self.l1_raw(index + 1) == 0
                    && index - (offset >> shift) < L1_CHUNK
                {
                    index += 1;
                }
                let to = ((index + 1) << shift).min(end);
                Look::Found(Mapping { kind: Kind::Unallocated, len: to - offset })
            }
        }
    }

    fn map_words(
        &self,
        words: &[AtomicU64],
        mut at: usize,
        in_cluster: u64,
        len: u64,
    ) -> Result<Mapping, FormatError> {
        let mut m = self.map_one(words, at, in_cluster)?;
        let mut whole = in_cluster + m.len == self.g.cluster_size();
        at += self.words_per_entry;
        while whole && m.len < len && at < words.len() {
            // What is wrong with a later one is told to whoever asks for it.
            let Ok(next) = self.map_one(words, at, 0) else { break };
            let joins = match (m.kind, next.kind) {
                (Kind::Unallocated, Kind::Unallocated) | (Kind::Zero, Kind::Zero) => true,
                (Kind::Data { host, in_place }, Kind::Data { host: h, in_place: i }) => {
                    host + m.len == h && in_place == i
                }
                _ => false,
            };
            if !joins {
                break;
            }
            m.len += next.len;
            whole = next.len == self.g.cluster_size();
            at += self.words_per_entry;
        }
        m.len = m.len.min(len);
        Ok(m)
    }

    /// One cluster, from `in_cluster` on.
    #[inline]
    fn map_one(&self, words: &[AtomicU64], at: usize, in_cluster: u64) -> Result<Mapping, FormatError> {
        let raw = words[at].load(Ordering::Acquire);
        let entry = self.g.l2_entry(raw)?;
        let left = self.g.cluster_size() - in_cluster;
        let (kind, len) = match entry {
            L2Entry::Compressed { offset, len } => (Kind::Compressed { raw, offset: offset.0, len }, left),
            _ if self.g.extended_l2 => {
                let bitmap = words[at + 1].load(Ordering::Acquire);
                let subs = self.g.subclusters(entry, bitmap)?;
                let size = self.g.subcluster_size();
                let (what, n) = subs.run((in_cluster / size) as u32);
                let len = u64::from(n) * size - in_cluster % size;
                let kind = match (what, entry) {
                    (Subcluster::Allocated, L2Entry::Data { host, copied }) => {
                        Kind::Data { host: host.0 + in_cluster, in_place: copied || self.g.data_file }
                    }
                    (Subcluster::Zero, _) => Kind::Zero,
                    _ => Kind::Unallocated,
                };
                (kind, len)
            }
            L2Entry::Unallocated => (Kind::Unallocated, left),
            L2Entry::Zero { .. } => (Kind::Zero, left),
            L2Entry::Data { host, copied } => {
                (Kind::Data { host: host.0 + in_cluster, in_place: copied || self.g.data_file }, left)
            }
        };
        Ok(Mapping { kind, len })
    }

    // ---------------------------------------------------------------------------------------------- loading

    /// Whether the slice of `cluster` is here.
    fn is_here(&self, cluster: u64) -> bool {
        self.l1_slot(self.l1_index_of(cluster))
            .and_then(|l1| l1.slices.get())
            .is_some_and(|s| s[self.slice_in_table(cluster)].load(Ordering::Acquire) != 0)
    }

    /// Begins to load the slice of `cluster`; `None` when another coroutine has just done that. Yields.
    pub(super) fn co_begin_load(&self, cluster: u64) -> Option<Loading<'_>> {
        let number = cluster >> self.slice_bits;
        let mut waited = false;
        co_wait_until(&self.loads, &self.load_waiters, |loads| {
            if self.is_here(cluster) {
                return Some(None);
            }
            if loads.contains(&number) {
                waited = true;
                return None;
            }
            if waited {
                // The other one has ended without success: let the caller look at everything again.
                return Some(None);
            }
            loads.insert(number);
            Some(Some(Loading { mapper: self, number, index: None }))
        })
    }

    /// Bytes of a slice.
    pub(super) fn slice_bytes(&self) -> usize {
        (self.g.l2_entry_size() << self.slice_bits) as usize
    }

    /// Finds a slice to be used for something else: `None` when all are in use.
    fn take_slice(&self) -> Option<u32> {
        let mut clock = lock(&self.clock);
        if let Some(index) = clock.free.pop() {
            lock(&self.slice(index).state).busy = true;
            return Some(index);
        }
        let room = self.room.load(Ordering::Relaxed);
        if clock.made < room {
            let index = clock.made;
            let words = self.slice_bytes() / 8;
            let slice = Slice {
                seq: Seq::new(NO_SLICE),
                referenced: AtomicBool::new(false),
                state: Mutex::new(SliceState { busy: true, ..SliceState::default() }),
                words: (0..words).map(|_| AtomicU64::new(0)).collect(),
            };
            let chunk = self.slab[index / SLAB_CHUNK as usize]
                .get_or_init(|| (0..SLAB_CHUNK).map(|_| OnceLock::new()).collect());
            let made = chunk[index % SLAB_CHUNK as usize].set(slice);
            assert!(made.is_ok(), "slices are made under the clock's lock");
            clock.made += 1;
            return Some(index as u32);
        }
        for _ in 0..2 * room {
            let index = clock.hand;
            clock.hand = (clock.hand + 1) % room;
            let slice = self.slice(index as u32);
            if slice.referenced.swap(false, Ordering::Relaxed) {
                continue;
            }
            let Ok(mut state) = slice.state.try_lock() else { continue };
            if state.dirty || state.writing || state.busy {
                continue;
            }
            state.busy = true;
            self.slot_of(slice.seq.tag()).store(0, Ordering::Release);
            slice.seq.open();
            slice.seq.set_tag(NO_SLICE);
            return Some(index as u32);
        }
        None
    }

    /// The slot of a guest slice that is in the slab.
    fn slot_of(&self, number: u64) -> &AtomicU32 {
        let cluster = number << self.slice_bits;
        let l1 = self.l1_slot(self.l1_index_of(cluster)).expect("a cached slice has an L1 slot");
        &l1.slices.get().expect("a cached slice has a slot")[self.slice_in_table(cluster)]
    }

    /// How many slices were read from the file so far.
    pub(super) fn loaded(&self) -> u64 {
        self.loaded.load(Ordering::Relaxed)
    }

    // ---------------------------------------------------------------------------------------------- changes

    /// Exclusive access to the slice of `cluster`; `None` when it must be loaded first. Never yields.
    pub(super) fn edit(&self, cluster: u64) -> Option<SliceEdit<'_>> {
        let number = cluster >> self.slice_bits;
        let slots = self.l1_slot(self.l1_index_of(cluster))?.slices.get()?;
        loop {
            let index = slots[self.slice_in_table(cluster)].load(Ordering::Acquire).checked_sub(1)?;
            let slice = self.slice(index);
            let state = lock(&slice.state);
            // Under the lock nobody retags it.
            if slice.seq.tag() == number && !state.busy {
                let first = number << self.slice_bits;
                return Some(SliceEdit { mapper: self, index, slice, state, first, opened: false });
            }
        }
    }

    /// How many slices are dirty.
    pub(super) fn dirty_count(&self) -> usize {
        self.dirty_count.load(Ordering::Relaxed)
    }

    /// Whether so many slices are dirty that a commit should be made: for clean ones that can be evicted. Where there is
    /// room for all that the disk has, none ever is; then only so that a flush does not find too much to do.
    pub(super) fn too_dirty(&self) -> bool {
        let room = self.room.load(Ordering::Relaxed);
        let all = self.l1_len().saturating_mul(self.g.l2_entries() >> self.slice_bits);
        let most = if all <= room as u64 { (room / 4).max(MANY_DIRTY) } else { room / 4 };
        self.dirty_count() > most
    }

    /// Copies the dirty slices, which are clean from then on; each is kept until [`Mapper::written`] is told its end.
    pub(super) fn take_dirty(&self) -> Vec<SliceCopy> {
        let list = std::mem::take(&mut *lock(&self.dirty));
        self.dirty_count.fetch_sub(list.len(), Ordering::Relaxed);
        list.into_iter()
            .map(|index| {
                let slice = self.slice(index);
                let mut state = lock(&slice.state);
                assert!(state.dirty, "what is in the list is dirty");
                assert!(!state.writing, "one commit at a time");
                state.dirty = false;
                state.writing = true;
                let number = slice.seq.tag();
                let raw = self.l1_raw(self.l1_index_of(number << self.slice_bits));
                let table = self.g.l1_entry(raw).ok().flatten().expect("a changed slice has a table").0.0;
                let bytes =
                    slice.words.iter().flat_map(|w| w.load(Ordering::Acquire).to_be_bytes()).collect();
                SliceCopy { index, host: self.slice_host(table, number), bytes }
            })
            .collect()
    }

    /// The copies were written, durably if `ok`; otherwise the slices are dirty again.
    pub(super) fn written(&self, copies: &[SliceCopy], ok: bool) {
        for c in copies {
            let slice = self.slice(c.index);
            let mut state = lock(&slice.state);
            assert!(state.writing, "a copy is written once");
            state.writing = false;
            if !ok && !state.dirty {
                state.dirty = true;
                self.add_dirty(c.index);
            }
        }
    }

    fn add_dirty(&self, index: u32) {
        lock(&self.dirty).push(index);
        self.dirty_count.fetch_add(1, Ordering::Relaxed);
    }
}

impl Loading<'_> {
    /// Finds room; `false` when all slices are dirty: a commit helps.
    pub(super) fn find_room(&mut self) -> bool {
        if self.index.is_none() {
            self.index = self.mapper.take_slice();
        }
        self.index.is_some()
    }

    /// Where the slice is in the file; `None` when there is no table any more.
    pub(super) fn host(&self) -> Result<Option<u64>, FormatError> {
        let m = self.mapper;
        let raw = m.l1_raw(m.l1_index_of(self.number << m.slice_bits));
        Ok(m.g.l1_entry(raw)?.map(|t| m.slice_host(t.0.0, self.number)))
    }

    /// Gives the slice its content: the bytes of the file.
    pub(super) fn finish(mut self, bytes: &[u8]) {
        let m = self.mapper;
        let index = self.index.expect("room was found");
        let slice = m.slice(index);
        assert_eq!(bytes.len(), m.slice_bytes(), "a slice is loaded as a whole");
        let (words, _) = bytes.as_chunks::<8>();
        for (word, bytes) in slice.words.iter().zip(words) {
            word.store(u64::from_be_bytes(*bytes), Ordering::Relaxed);
        }
        let cluster = self.number << m.slice_bits;
        let l1 = m.l1_slot(m.l1_index_of(cluster)).expect("a table has an L1 slot");
        let slots = l1
            .slices
            .get_or_init(|| (0..m.g.l2_entries() >> m.slice_bits).map(|_| AtomicU32::new(0)).collect());
        {
            let mut state = lock(&slice.state);
            slice.seq.set_tag(self.number);
            slice.seq.close();
            slice.referenced.store(true, Ordering::Relaxed);
            state.busy = false;
            // Under the lock: the clock hand must not take the slice before its slot is set.
            slots[m.slice_in_table(cluster)].store(index + 1, Ordering::Release);
        }
        m.loaded.fetch_add(1, Ordering::Relaxed);
        self.index = None;
    }
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        if let Some(index) = self.index {
            // The load has failed.
            let mut clock = lock(&self.mapper.clock);
            lock(&self.mapper.slice(index).state).busy = false;
            clock.free.push(index);
        }
        lock(&self.mapper.loads).remove(&self.number);
        self.mapper.load_waiters.restart_all();
    }
}

impl SliceEdit<'_> {
    fn at(&self, cluster: u64) -> usize {
        let index = cluster.checked_sub(self.first).expect("the cluster is in the slice");
        assert!(index < self.mapper.entries_per_slice(), "the cluster is in the slice");
        index as usize * self.mapper.words_per_entry
    }

    /// The entry and the bitmap of a guest cluster.
    pub(super) fn get(&self, cluster: u64) -> (u64, u64) {
        let at = self.at(cluster);
        let bitmap =
            if self.mapper.g.extended_l2 { self.slice.words[at + 1].load(Ordering::Acquire) } else { 0 };
        (self.slice.words[at].load(Ordering::Acquire), bitmap)
    }

    /// Changes the entry and the bitmap of a guest cluster. What it points to must have been written.
    pub(super) fn set(&mut self, cluster: u64, raw: u64, bitmap: u64) {
        let at = self.at(cluster);
        if !self.state.dirty {
            self.state.dirty = true;
            self.mapper.add_dirty(self.index);
            // Noted, then marked, then changed: whoever sees the entry sees that it is not durable yet.
            self.mapper.flag.mark();
        }
        if self.mapper.g.extended_l2 {
            // Both words change together.
            if !self.opened {
                self.opened = true;
                self.slice.seq.open();
            }
            self.slice.words[at + 1].store(bitmap, Ordering::Release);
        }
        self.slice.words[at].store(raw, Ordering::Release);
    }
}

impl Drop for SliceEdit<'_> {
    fn drop(&mut self) {
        if self.opened {
            self.slice.seq.close();
        }
    }
}
