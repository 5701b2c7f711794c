//! Refcounts in memory: the refcount table, a cache of refcount blocks, and how both grow.
//!
//! All of it is behind the image's CoMutex (`alloc`), which is held over the I/O here: allocation and commit wait, and
//! who loads a slice of an L2 table into a writable image.
//!
//! What is in memory may be written to the file at any time: a count goes up before anybody is told the cluster, and
//! comes down only after no durable pointer to the cluster is left. So a block needs no order among its own bytes,
//! and a crash between any two writes leaks clusters at worst. The order that matters is the commit's: counts that went
//! up are durable before pointers to their clusters are written.
//!
//! Growth never points to what is not durable:
//! - *block*: written, holding its own count, flushed; then its table entry. A block lies in the range that it counts.
//! - *table*: the larger table and the blocks that count it are written behind everything, flushed; then offset and
//!   size in the header, which share a sector, and flushed again; then the old table is free.

use super::FormatError;
use super::entry::Geometry;
use super::header::MAX_REFTABLE_BYTES;
use crate::block::{BlockNode, Error, Result, WriteFlags};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::Arc;

/// Bytes of refcount blocks that are kept, dirty ones aside (ours: counts of 256 GiB at the default geometry).
const CACHE_BYTES: usize = 8 << 20;

/// Blocks that are made at once, and the bytes of clusters they count together at least (ours: one barrier for them).
const BATCH: u64 = 64;
const BATCH_BYTES: u64 = 4 << 20;

/// Unit in which a changed block is written, in bytes.
const SECTOR: usize = 512;

struct Block {
    offset: u64,
    data: Vec<u8>,
    /// Changed bytes since the last commit took them.
    dirty: Option<Range<usize>>,
    /// A commit's copy is being written.
    writing: bool,
}

/// Changed bytes of a block, as a commit writes them.
pub(super) struct BlockCopy {
    index: u64,
    from: usize,
    /// Where they go in the file.
    pub(super) host: u64,
    /// The bytes.
    pub(super) bytes: Vec<u8>,
}

/// What growing asks of the image around it.
pub(super) trait Surroundings {
    /// Whether a cluster holds metadata: such a cluster is not free whatever its count says.
    fn is_metadata(&self, cluster: u64) -> bool;
    /// Clusters hold metadata from now on, or do no more.
    fn set_metadata(&self, clusters: Range<u64>, metadata: bool);
    /// Writes the refcount table's place to the header, durably.
    fn co_move_reftable(&self, offset: u64, clusters: u32) -> Result<()>;
    /// The image is damaged: makes it read-only, and returns the error for the request.
    fn co_corrupt(&self, what: &str, offset: u64) -> Error;
    /// Makes everything written durable.
    fn co_barrier(&self) -> Result<()>;
}

/// See the module's text.
pub(super) struct Refcounts {
    g: Geometry,
    file: Arc<dyn BlockNode>,
    /// The refcount table, in native order.
    table: Vec<u64>,
    table_offset: u64,
    blocks: HashMap<u64, Block>,
    /// Blocks in the order they were loaded.
    order: VecDeque<u64>,
    dirty: BTreeSet<u64>,
    /// Clusters that growing has freed since somebody looked.
    freed: Vec<Range<u64>>,
}

impl Refcounts {
    pub(super) fn new(
        g: Geometry,
        file: Arc<dyn BlockNode>,
        table_offset: u64,
        table: Vec<u64>,
    ) -> Refcounts {
        Refcounts {
            g,
            file,
            table,
            table_offset,
            blocks: HashMap::new(),
            order: VecDeque::new(),
            dirty: BTreeSet::new(),
            freed: Vec::new(),
        }
    }

    /// Clusters that growing has freed since the last call. They are free, and were used before.
    pub(super) fn take_freed(&mut self) -> Vec<Range<u64>> {
        std::mem::take(&mut self.freed)
    }

    /// Offsets of all refcount blocks; wrong entries are left out.
    pub(super) fn block_offsets(&self) -> impl Iterator<Item = u64> + '_ {
        self.table.iter().filter_map(|raw| self.g.reftable_entry(*raw).ok().flatten()).map(|h| h.0)
    }

    /// Clusters of the refcount table.
    pub(super) fn table_clusters(&self) -> Range<u64> {
        let first = self.table_offset >> self.g.cluster_bits;
        first..first + self.g.clusters_for(self.table.len() as u64 * 8)
    }

    /// Counts per block.
    pub(super) fn per_block(&self) -> u64 {
        self.g.refcount_block_entries()
    }

    fn bad(&self, e: &FormatError, around: &dyn Surroundings, offset: u64) -> Error {
        around.co_corrupt(&format!("{e} (at byte {offset:#x} of the file)"), offset)
    }

    /// Loads the block with the number; `None` when there is none.
    fn co_block(&mut self, index: u64, around: &dyn Surroundings) -> Result<Option<&mut Block>> {
        if !self.blocks.contains_key(&index) {
            let Some(raw) = self.table.get(index as usize).copied() else { return Ok(None) };
            let at = self.table_offset + index * 8;
            let Some(offset) = self.g.reftable_entry(raw).map_err(|e| self.bad(&e, around, at))? else {
                return Ok(None);
            };
            if offset.0 >= self.file.len() {
                let what = format!("refcount table entry {index} points past the end of the file");
                return Err(around.co_corrupt(&what, offset.0));
            }
            let mut data = vec![0; self.g.cluster_size() as usize];
            super::io::co_read(&*self.file, offset.0, &mut [IoSliceMut::new(&mut data)])?;
            self.make_room();
            self.insert(index, offset.0, data);
        }
        Ok(self.blocks.get_mut(&index))
    }

    fn insert(&mut self, index: u64, offset: u64, data: Vec<u8>) {
        let old = self.blocks.insert(index, Block { offset, data, dirty: None, writing: false });
        assert!(old.is_none(), "a block is loaded once");
        self.order.push_back(index);
    }

    /// Forgets clean blocks, the oldest first.
    fn make_room(&mut self) {
        let most = (CACHE_BYTES >> self.g.cluster_bits).max(4);
        for _ in 0..self.order.len() {
            if self.blocks.len() < most {
                return;
            }
            let Some(index) = self.order.pop_front() else { return };
            let clean = self.blocks.get(&index).is_some_and(|b| b.dirty.is_none() && !b.writing);
            if clean {
                self.blocks.remove(&index);
            } else {
                self.order.push_back(index);
            }
        }
    }

    /// The refcount of a cluster. Yields.
    pub(super) fn co_get(&mut self, cluster: u64, around: &dyn Surroundings) -> Result<u64> {
        let (g, per) = (self.g, self.per_block());
        let block = self.co_block(cluster / per, around)?;
        Ok(block.map_or(0, |b| g.refcount(&b.data, (cluster % per) as usize)))
    }

    /// Whether the refcount of a cluster can be told without reading the file.
    pub(super) fn knows(&self, cluster: u64) -> bool {
        self.blocks.contains_key(&(cluster / self.per_block()))
    }

    /// Sets the refcount of a cluster that has a block. Yields.
    pub(super) fn co_set(&mut self, cluster: u64, value: u64, around: &dyn Surroundings) -> Result<()> {
        let (g, per) = (self.g, self.per_block());
        let index = cluster / per;
        let Some(block) = self.co_block(index, around)? else {
            return Err(
                around.co_corrupt("a cluster in use has no refcount block", cluster << g.cluster_bits)
            );
        };
        let at = (cluster % per) as usize;
        g.set_refcount(&mut block.data, at, value);
        let byte = (at << g.refcount_order) / 8;
        let sector = byte / SECTOR * SECTOR..(byte / SECTOR + 1) * SECTOR;
        block.dirty = Some(match block.dirty.take() {
            None => sector,
            Some(d) => d.start.min(sector.start)..d.end.max(sector.end),
        });
        self.dirty.insert(index);
        Ok(())
    }

    /// The first run of at most `want` clusters with refcount 0, from `from` on and within its block: its first cluster
    /// and its length. `None`: none in this block. The block exists. Yields.
    pub(super) fn co_find_free(
        &mut self,
        from: u64,
        want: u64,
        around: &dyn Surroundings,
    ) -> Result<Option<(u64, u64)>> {
        let (g, per) = (self.g, self.per_block());
        let base = from / per * per;
        let block = self.co_block(from / per, around)?.expect("the caller has made the block");
        let free = |i: &u64| g.refcount(&block.data, *i as usize) == 0;
        let Some(first) = (from % per..per).find(free) else { return Ok(None) };
        let end = (first + 1..per.min(first + want)).find(|i| !free(i)).unwrap_or(per.min(first + want));
        Ok(Some((base + first, end - first)))
    }

    // ---------------------------------------------------------------------------------------------- growing

    /// Makes sure that the cluster has a refcount block. Yields.
    pub(super) fn co_ensure_block(&mut self, cluster: u64, around: &dyn Surroundings) -> Result<()> {
        let index = cluster / self.per_block();
        if index >= self.table.len() as u64 {
            self.co_grow_table(index, around)?;
        }
        if self.table[index as usize] == 0 { self.co_make_blocks(index, around) } else { Ok(()) }
    }

    fn co_write(&self, host: u64, bytes: &[u8]) -> Result<()> {
        super::io::co_write(&*self.file, host, &[IoSlice::new(bytes)], WriteFlags::empty())
    }

    /// Makes the block with the number, and some behind it if they are small.
    fn co_make_blocks(&mut self, index: u64, around: &dyn Surroundings) -> Result<()> {
        let per = self.per_block();
        let file_end = self.g.clusters_for(self.file.len());
        let most = (BATCH_BYTES >> self.g.cluster_bits).div_ceil(per).clamp(1, BATCH);
        let mut made = Vec::new();
        for i in index..(index + most).min(self.table.len() as u64) {
            // A range without a block has no cluster in use, so the block takes the first.
            let cluster = i * per;
            if self.table[i as usize] != 0 || (i > index && cluster < file_end) {
                break;
            }
            let end = (cluster + 1) << self.g.cluster_bits;
            if !self.file.grows() && end > self.file.len() {
                if i == index {
                    return Err(Error::from_errno("allocate", self.file.name(), end, libc::ENOSPC));
                }
                break;
            }
            if around.is_metadata(cluster) {
                let what = "a metadata cluster has no refcount block";
                return Err(around.co_corrupt(what, cluster << self.g.cluster_bits));
            }
            let mut data = vec![0; self.g.cluster_size() as usize];
            self.g.set_refcount(&mut data, 0, 1);
            let host = cluster << self.g.cluster_bits;
            self.co_write(host, &data)?;
            made.push((i, host, data));
        }
        around.co_barrier()?;
        // Entries side by side in the table; each is right by itself, so a torn write does no harm.
        let bytes: Vec<u8> = made.iter().flat_map(|m| m.1.to_be_bytes()).collect();
        self.co_write(self.table_offset + index * 8, &bytes)?;
        for (i, host, data) in made {
            self.table[i as usize] = host;
            self.make_room();
            self.insert(i, host, data);
            let cluster = host >> self.g.cluster_bits;
            around.set_metadata(cluster..cluster + 1, true);
        }
        Ok(())
    }

    /// Makes blocks behind everything that is known, for `count` clusters side by side: more than there are between two blocks
    /// that lie in their own ranges. Returns the first of the clusters; they are free. Yields.
    pub(super) fn co_make_area(&mut self, count: u64, around: &dyn Surroundings) -> Result<u64> {
        let (g, per) = (self.g, self.per_block());
        // The blocks come first, and count themselves.
        let blocks = count.div_ceil(per - 1);
        let start = loop {
            let known = self.table.iter().rposition(|e| *e != 0).map_or(0, |i| i as u64 + 1);
            let start = known.max(self.g.clusters_for(self.file.len()).div_ceil(per));
            if start + blocks <= self.table.len() as u64 {
                break start;
            }
            self.co_grow_table(start + blocks, around)?;
        };
        let first = start * per;
        let end = (first + blocks + count) << g.cluster_bits;
        if end >= super::entry::MAX_HOST_OFFSET {
            return Err(Error::from_errno("allocate", self.file.name(), end, libc::EFBIG));
        }
        if !self.file.grows() && end > self.file.len() {
            return Err(Error::from_errno("allocate", self.file.name(), end, libc::ENOSPC));
        }
        if let Some(c) = (first..first + blocks + count).find(|c| around.is_metadata(*c)) {
            let what = "a metadata cluster has no refcount block";
            return Err(around.co_corrupt(what, c << g.cluster_bits));
        }
        let mut made = Vec::new();
        for i in 0..blocks {
            let mut data = vec![0; g.cluster_size() as usize];
            for c in (i * per..(i + 1) * per).take_while(|c| *c < blocks) {
                g.set_refcount(&mut data, (c % per) as usize, 1);
            }
            let host = (first + i) << g.cluster_bits;
            self.co_write(host, &data)?;
            made.push((start + i, host, data));
        }
        around.co_barrier()?;
        // Those that count the blocks themselves first, each durable before the next: a crash may tear a write between two
        // sectors, and would leave a pointer to a block whose own cluster counts 0. Without the others nothing in use is
        // uncounted.
        let counting = blocks.div_ceil(per) as usize;
        for (i, m) in made[..counting].iter().enumerate() {
            self.co_write(self.table_offset + (start + i as u64) * 8, &m.1.to_be_bytes())?;
            around.co_barrier()?;
        }
        let bytes: Vec<u8> = made[counting..].iter().flat_map(|m| m.1.to_be_bytes()).collect();
        self.co_write(self.table_offset + (start + counting as u64) * 8, &bytes)?;
        for (i, host, data) in made {
            self.table[i as usize] = host;
            self.make_room();
            self.insert(i, host, data);
        }
        around.set_metadata(first..first + blocks, true);
        Ok(first + blocks)
    }

    /// Makes the table large enough for block `index`.
    fn co_grow_table(&mut self, index: u64, around: &dyn Surroundings) -> Result<()> {
        let g = self.g;
        let per = self.per_block();
        let per_cluster = g.cluster_size() / 8;
        let too_large = || Error::from_errno("allocate", self.file.name(), self.table_offset, libc::EFBIG);
        // The new table lies in the first range that the old one does not know.
        let first = self.table.len() as u64 * per;
        let wanted = (index + 1).max(self.table.len() as u64 + self.table.len() as u64 / 2);
        let mut blocks = 1;
        let (table_clusters, blocks) = loop {
            // Blocks first, then the table: their number must cover them both.
            let last_range = |t: u64| (first + blocks + t - 1) / per;
            let t = wanted.div_ceil(per_cluster);
            let t = t.max((last_range(t) + 1).div_ceil(per_cluster));
            let need = last_range(t) - first / per + 1;
            if need <= blocks {
                break (t, blocks);
            }
            blocks = need;
        };
        if table_clusters << g.cluster_bits > MAX_REFTABLE_BYTES {
            return Err(too_large());
        }
        let end = first + blocks + table_clusters;
        if end << g.cluster_bits >= super::entry::MAX_HOST_OFFSET {
            return Err(too_large());
        }
        if !self.file.grows() && end << g.cluster_bits > self.file.len() {
            return Err(Error::from_errno("allocate", self.file.name(), end << g.cluster_bits, libc::ENOSPC));
        }
        if let Some(c) = (first..end).find(|c| around.is_metadata(*c)) {
            let what = "a metadata cluster is past the end of the refcount table";
            return Err(around.co_corrupt(what, c << g.cluster_bits));
        }
        let mut table = self.table.clone();
        table.resize((table_clusters * per_cluster) as usize, 0);
        let mut new_blocks = Vec::new();
        for i in 0..blocks {
            let range = first / per + i;
            let host = (first + i) << g.cluster_bits;
            let mut data = vec![0; g.cluster_size() as usize];
            for c in (range * per).max(first)..((range + 1) * per).min(end) {
                g.set_refcount(&mut data, (c % per) as usize, 1);
            }
            self.co_write(host, &data)?;
            table[range as usize] = host;
            new_blocks.push((range, host, data));
        }
        let offset = (first + blocks) << g.cluster_bits;
        let bytes: Vec<u8> = table.iter().flat_map(|e| e.to_be_bytes()).collect();
        self.co_write(offset, &bytes)?;
        around.co_barrier()?;
        let clusters = u32::try_from(table_clusters).map_err(|_| too_large())?;
        around.co_move_reftable(offset, clusters)?;

        let old = self.table_clusters();
        around.set_metadata(first..end, true);
        around.set_metadata(old.clone(), false);
        self.table = table;
        self.table_offset = offset;
        for (range, host, data) in new_blocks {
            self.make_room();
            self.insert(range, host, data);
        }
        // Nothing durable points to the old table, and only we read it.
        for cluster in old.clone() {
            let count = self.co_get(cluster, around)?;
            if count == 0 {
                return Err(around.co_corrupt("the refcount table had refcount 0", cluster << g.cluster_bits));
            }
            self.co_set(cluster, count - 1, around)?;
        }
        self.freed.push(old);
        Ok(())
    }

    // --------------------------------------------------------------------------------------------- commits

    /// Copies what has changed; the blocks are clean from then on, and kept until [`Refcounts::written`].
    pub(super) fn take_dirty(&mut self) -> Vec<BlockCopy> {
        std::mem::take(&mut self.dirty)
            .into_iter()
            .map(|index| {
                let b = self.blocks.get_mut(&index).expect("a dirty block is kept");
                let range = b.dirty.take().expect("a dirty block has changed bytes");
                assert!(!b.writing, "one commit at a time");
                b.writing = true;
                BlockCopy {
                    index,
                    from: range.start,
                    host: b.offset + range.start as u64,
                    bytes: b.data[range].to_vec(),
                }
            })
            .collect()
    }

    /// The copies were written, durably if `ok`; otherwise the blocks are dirty again.
    pub(super) fn written(&mut self, copies: &[BlockCopy], ok: bool) {
        for c in copies {
            let b = self.blocks.get_mut(&c.index).expect("a block that is written is kept");
            b.writing = false;
            if !ok {
                let range = c.from..c.from + c.bytes.len();
                b.dirty = Some(match b.dirty.take() {
                    None => range,
                    Some(d) => d.start.min(range.start)..d.end.max(range.end),
                });
                self.dirty.insert(c.index);
            }
        }
    }

    /// Whether anything has changed since the last commit.
    pub(super) fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }
}
