//! Checking and repairing an image that nobody else uses.
//!
//! ```text
//!   count     every reference to every host cluster: header, L1 and L2 tables of the disk and of snapshots, clusters,
//!             refcount structures, snapshot table, bitmaps
//!   compare   with the refcounts in the file: too low is a corruption, too high is a leak
//!   flags     COPIED of the active tables must say what the refcounts say
//! ```
//! A table that is referenced often is read once and counted as often. Memory grows with what is referenced, not with
//! the file's size, and has a bound.
//!
//! # Repair
//! Safe against a crash at any moment, each step durable before the next: a leak is counted down in place, since nothing
//! points to it. Anything worse gets *new* refcount structures behind the end of the file, which a single write to the
//! header makes valid; then flags are mended; at last the dirty and corrupt bits go. Entries that point nowhere are
//! reported and not touched: what they should say is not known.

use super::bitmap::{self, TableEntry};
use super::entry::{COMPRESSED, COPIED, Geometry, L2Entry, OFFSET_MASK};
use super::header::{Autoclear, Header, Incompatible, MAX_REFTABLE_BYTES, Purpose};
use super::snapshot::{self, Snapshot};
use super::{FormatError, GuestOffset};
use crate::block::{BlockNode, Error, WriteFlags, co_read_header};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{IoSlice, IoSliceMut};

/// Problems that are told one by one (ours); all are counted.
const PROBLEMS_MAX: usize = 1000;
/// Clusters whose references are counted together.
const CHUNK: u64 = 512;
/// Counters that may be held, in chunks of 2 KiB (ours: 1 GiB).
const CHUNKS_MAX: usize = 512 << 10;
/// Distinct tables that may be held in mind (ours).
const TABLES_MAX: usize = 16 << 20;

/// What is to be mended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Repair {
    /// Nothing: the image is not written.
    #[default]
    Nothing,
    /// Leaked clusters.
    Leaks,
    /// Everything that can be.
    All,
}

/// Why an image cannot be checked at all.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// Its header is not one.
    #[error("{0}")]
    Format(#[from] FormatError),
    /// The file could not be read or written.
    #[error("{0}: {source}", source = .0.source)]
    Io(#[from] Error),
    /// It references more than can be held in mind.
    #[error("checking needs more memory than is allowed for it: too many clusters are referenced")]
    TooBig,
    /// It cannot be mended.
    #[error("cannot repair: {0}")]
    Repair(String),
}

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// What is wrong and was not mended.
    pub corruptions: u64,
    /// Clusters that nothing uses and that are not free.
    pub leaks: u64,
    /// What could not be checked.
    pub check_errors: u64,
    /// Corruptions that were mended.
    pub corruptions_fixed: u64,
    /// Leaks that were mended.
    pub leaks_fixed: u64,
    /// End of the last cluster in use.
    pub image_end_offset: u64,
    /// Guest clusters.
    pub total_clusters: u64,
    /// Of these, in host clusters.
    pub allocated_clusters: u64,
    /// Of these, compressed.
    pub compressed_clusters: u64,
    /// A line for each of the first problems (those of the check before a repair).
    pub problems: Vec<String>,
}

impl CheckReport {
    /// The exit code of `qemu-img check`: 0 all right, 1 not checked to the end, 2 corrupt, 3 leaks.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            r if r.check_errors > 0 => 1,
            r if r.corruptions > 0 => 2,
            r if r.leaks > 0 => 3,
            _ => 0,
        }
    }

    fn tell(&mut self, text: impl FnOnce() -> String) {
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(text());
        }
    }

    fn corrupt(&mut self, text: impl FnOnce() -> String) {
        self.corruptions += 1;
        self.tell(text);
    }
}

/// References by host cluster. Counts stop at `u32::MAX`.
#[derive(Default)]
struct Counts(BTreeMap<u64, Box<[u32; CHUNK as usize]>>);

impl Counts {
    fn get(&self, cluster: u64) -> u32 {
        self.0.get(&(cluster / CHUNK)).map_or(0, |c| c[(cluster % CHUNK) as usize])
    }

    fn slot(&mut self, cluster: u64) -> Result<&mut u32, CheckError> {
        let full = self.0.len() >= CHUNKS_MAX;
        let key = cluster / CHUNK;
        if full && !self.0.contains_key(&key) {
            return Err(CheckError::TooBig);
        }
        let chunk = self.0.entry(key).or_insert_with(|| Box::new([0; CHUNK as usize]));
        Ok(&mut chunk[(cluster % CHUNK) as usize])
    }

    fn last(&self) -> Option<u64> {
        let last = |k: u64, c: &[u32]| c.iter().rposition(|&n| n > 0).map(|i| k * CHUNK + i as u64);
        self.0.iter().rev().find_map(|(k, c)| last(*k, &c[..]))
    }
}

/// A mapping table as its references see it.
#[derive(Default, Clone, Copy)]
struct TableUse {
    references: u32,
    /// Of the active tables: the first guest byte that it maps.
    active: Option<u64>,
}

struct Check<'a> {
    file: &'a dyn BlockNode,
    header: Header,
    g: Geometry,
    file_len: u64,
    counts: Counts,
    /// Where the refcount structures were counted: a rebuild forgets them.
    own: Vec<(u64, u64)>,
    l2_tables: BTreeMap<u64, TableUse>,
    /// Usable refcount blocks by their index.
    blocks: BTreeMap<u64, u64>,
    /// The refcount structures cannot be mended in place.
    rebuild: bool,
    /// Something that holds references could not be read: what looks unused may be used.
    incomplete: bool,
    leaks: u64,
    /// Corruptions that are nothing but a wrong COPIED flag.
    wrong_flags: u64,
    report: CheckReport,
}

fn co_read(file: &dyn BlockNode, offset: u64, buf: &mut [u8]) -> Result<(), CheckError> {
    super::io::co_read(file, offset, &mut [IoSliceMut::new(buf)]).map_err(CheckError::Io)
}

fn co_write(file: &dyn BlockNode, offset: u64, buf: &[u8]) -> Result<(), CheckError> {
    super::io::co_write(file, offset, &[IoSlice::new(buf)], WriteFlags::empty()).map_err(CheckError::Io)
}

/// Reads `bytes` as big-endian words, in pieces of at most a MiB, and hands each with its index to `f`.
fn co_words<F>(file: &dyn BlockNode, offset: u64, count: u64, mut f: F) -> Result<(), CheckError>
where
    F: FnMut(u64, u64) -> Result<(), CheckError>,
{
    const PIECE: u64 = 128 << 10;
    let mut buf = vec![0; (count.min(PIECE) * 8) as usize];
    let mut at = 0;
    while at < count {
        let n = (count - at).min(PIECE);
        let buf = &mut buf[..(n * 8) as usize];
        co_read(file, offset + at * 8, buf)?;
        for (i, word) in buf.as_chunks::<8>().0.iter().enumerate() {
            let word = u64::from_be_bytes(*word);
            if word != 0 {
                f(at + i as u64, word)?;
            }
        }
        at += n;
    }
    Ok(())
}

/// Reads the snapshot table. Coroutine only; yields.
///
/// # Errors
/// `Format` for the first entry that is wrong, `Io`.
pub fn co_read_snapshots(file: &dyn BlockNode, header: &Header) -> Result<(Vec<Snapshot>, u64), CheckError> {
    let mut out = Vec::new();
    let mut at = header.snapshots_offset;
    for index in 0..header.nb_snapshots {
        let mut fixed = [0; snapshot::FIXED_LEN];
        co_read(file, at, &mut fixed)?;
        let len = snapshot::entry_len(&fixed, index)?;
        // The last one's padding may be missing.
        if at.saturating_add(len as u64) > file.len().saturating_add(7) {
            let have = file.len().saturating_sub(at);
            let structure = format!("snapshot table entry {index}");
            return Err(CheckError::Format(FormatError::Truncated { structure, need: len as u64, have }));
        }
        let mut entry = vec![0; len];
        co_read(file, at, &mut entry)?;
        out.push(Snapshot::parse(&entry, index, header.cluster_bits)?);
        at += len as u64;
        if at - header.snapshots_offset > snapshot::MAX_TABLE_BYTES {
            return Err(CheckError::Format(FormatError::Field {
                structure: "snapshot table".to_owned(),
                field: "nb_snapshots",
                bytes: "60-63",
                value: header.nb_snapshots.into(),
                rule: "the table must not exceed 64 MiB",
            }));
        }
    }
    Ok((out, at - header.snapshots_offset))
}

/// Reads the bitmap directory. Coroutine only; yields.
///
/// # Errors
/// `Format` for the first entry that is wrong, `Io`.
pub fn co_read_bitmaps(
    file: &dyn BlockNode,
    header: &Header,
) -> Result<Vec<bitmap::BitmapEntry>, CheckError> {
    let Some(ext) = header.bitmaps else { return Ok(Vec::new()) };
    // The size was checked against its bound; the file must have the bytes before memory is taken for them.
    if ext.directory_offset.saturating_add(ext.directory_size) > file.len() {
        return Err(CheckError::Format(FormatError::Truncated {
            structure: "bitmap directory".to_owned(),
            need: ext.directory_offset.saturating_add(ext.directory_size),
            have: file.len(),
        }));
    }
    let mut bytes = vec![0; ext.directory_size as usize];
    co_read(file, ext.directory_offset, &mut bytes)?;
    Ok(bitmap::parse_directory(&bytes, ext.nb_bitmaps, &header.geometry())?)
}

/// Checks the image in `file` and mends what `repair` says. Nobody else may use it. Coroutine only; yields.
///
/// # Errors
/// When there is no qcow2 header, the file cannot be read or written, or what must be mended cannot be.
pub fn co_check(file: &dyn BlockNode, repair: Repair) -> Result<CheckReport, CheckError> {
    let mut check = Check::co_run(file)?;
    let found = std::mem::take(&mut check.report);
    let header = &check.header;
    let marked = header.incompatible.intersects(Incompatible::DIRTY | Incompatible::CORRUPT);
    let nothing = match repair {
        Repair::Nothing => true,
        Repair::Leaks => found.leaks == 0,
        Repair::All => found.leaks == 0 && found.corruptions == 0 && !marked,
    };
    if nothing {
        return Ok(found);
    }
    if check.incomplete || found.check_errors > 0 {
        let why = "something that holds references could not be read, so what looks unused may be used";
        return Err(CheckError::Repair(why.to_owned()));
    }
    // A cluster that is counted down to one user must get its flag, or what was a leak becomes a corruption. With nothing
    // else wrong the counts can be believed, as QEMU does.
    let flags = repair == Repair::All || found.corruptions == check.wrong_flags;
    check.co_repair(repair, flags)?;
    drop(check);
    let mut check = Check::co_run(file)?;
    let mut after = std::mem::take(&mut check.report);
    if repair == Repair::All && after.corruptions == 0 && after.check_errors == 0 {
        check.co_clear_marks()?;
    }
    after.corruptions_fixed = found.corruptions.saturating_sub(after.corruptions);
    after.leaks_fixed = found.leaks.saturating_sub(after.leaks);
    after.problems = found.problems;
    Ok(after)
}

/// Mends an image that was not closed by a program that updates refcounts late: what must be done before it is written.
///
/// # Errors
/// As [`co_check`], and when something is left that cannot be mended.
pub fn co_repair_dirty(file: &dyn BlockNode) -> Result<(), CheckError> {
    tracing::warn!(node = file.name(), "image was not closed cleanly: repairing its refcounts");
    let report = co_check(file, Repair::All)?;
    if report.corruptions > 0 || report.check_errors > 0 {
        let n = report.corruptions + report.check_errors;
        return Err(CheckError::Repair(format!("{n} problems are left; conbd check tells which")));
    }
    tracing::info!(
        node = file.name(),
        corruptions_fixed = report.corruptions_fixed,
        leaks_fixed = report.leaks_fixed,
        "image is repaired"
    );
    Ok(())
}

impl<'a> Check<'a> {
    fn co_run(file: &'a dyn BlockNode) -> Result<Check<'a>, CheckError> {
        let header = co_read_header(file, Purpose::Check)??;
        let g = header.geometry();
        let mut check = Check {
            file,
            g,
            file_len: file.len(),
            counts: Counts::default(),
            own: Vec::new(),
            l2_tables: BTreeMap::new(),
            blocks: BTreeMap::new(),
            rebuild: false,
            incomplete: false,
            leaks: 0,
            wrong_flags: 0,
            report: CheckReport { total_clusters: g.clusters_for(header.size), ..CheckReport::default() },
            header,
        };
        check.co_count()?;
        check.co_compare()?;
        check.co_flags(false)?;
        check.report.leaks = check.leaks;
        Ok(check)
    }

    /// Counts a reference of `times` to each cluster that the bytes touch; tells whether they are in the file.
    fn add(&mut self, offset: u64, len: u64, times: u32, what: &str) -> Result<bool, CheckError> {
        if len == 0 {
            return Ok(true);
        }
        let end = offset.saturating_add(len);
        // As QEMU: the last cluster may be cut off by the file's end.
        if end >= self.file_len.saturating_add(self.g.cluster_size()) {
            self.report
                .corrupt(|| format!("{what} at {offset:#x} ({len:#x} bytes) is beyond the end of the file"));
            return Ok(false);
        }
        for cluster in offset >> self.g.cluster_bits..=(end - 1) >> self.g.cluster_bits {
            let slot = self.counts.slot(cluster)?;
            *slot = slot.saturating_add(times);
        }
        Ok(true)
    }

    fn co_count(&mut self) -> Result<(), CheckError> {
        let h = self.header.clone();
        self.add(0, self.g.cluster_size(), 1, "header")?;
        if let Some(c) = h.crypto {
            self.add(c.offset, c.len, 1, "encryption header")?;
        }
        // L1 tables by place and length: several snapshots may share one.
        let mut l1_tables: BTreeMap<(u64, u32), TableUse> = BTreeMap::new();
        l1_tables.insert((h.l1_table_offset, h.l1_size), TableUse { references: 1, active: Some(0) });
        if h.nb_snapshots > 0 {
            match co_read_snapshots(self.file, &h) {
                Ok((snapshots, len)) => {
                    self.add(h.snapshots_offset, len, 1, "snapshot table")?;
                    for s in &snapshots {
                        l1_tables.entry((s.l1_table_offset, s.l1_size)).or_default().references += 1;
                    }
                }
                Err(CheckError::Format(e)) => {
                    self.incomplete = true;
                    self.report.corrupt(|| e.to_string());
                }
                Err(e) => return Err(e),
            }
        }
        for ((offset, entries), table) in l1_tables {
            self.co_count_l1(offset, entries.into(), table)?;
        }
        for (offset, table) in self.l2_tables.clone() {
            self.co_count_l2(offset, table)?;
        }
        self.co_count_bitmaps(&h)?;
        self.co_count_refcounts(&h)
    }

    fn co_count_l1(&mut self, offset: u64, entries: u64, table: TableUse) -> Result<(), CheckError> {
        if !self.add(offset, entries * 8, table.references, "L1 table")? {
            self.incomplete = true;
            return Ok(());
        }
        let g = self.g;
        let file = self.file;
        co_words(file, offset, entries, |index, raw| {
            if let Err(e) = g.l1_entry(raw) {
                self.report.corrupt(|| format!("{e} (L1 table at {offset:#x}, index {index})"));
            }
            let l2 = raw & OFFSET_MASK;
            if l2 == 0 || !g.aligned(l2) {
                return Ok(());
            }
            if self.l2_tables.len() >= TABLES_MAX {
                return Err(CheckError::TooBig);
            }
            let entry = self.l2_tables.entry(l2).or_default();
            entry.references = entry.references.saturating_add(table.references);
            if table.active.is_some() {
                entry.active.get_or_insert(index << g.l1_shift());
            }
            Ok(())
        })
    }

    fn co_count_l2(&mut self, offset: u64, table: TableUse) -> Result<(), CheckError> {
        let g = self.g;
        if !self.add(offset, g.cluster_size(), table.references, "L2 table")? {
            return Ok(());
        }
        let mut bytes = vec![0; g.cluster_size() as usize];
        co_read(self.file, offset, &mut bytes)?;
        let at = |word: usize| bytes.as_chunks::<8>().0.get(word).map_or(0, |w| u64::from_be_bytes(*w));
        let step = (g.l2_entry_size() / 8) as usize;
        for index in 0..g.l2_entries() as usize {
            let raw = at(index * step);
            let bits = if step == 2 { at(index * step + 1) } else { 0 };
            if raw == 0 && bits == 0 {
                continue;
            }
            let place = || format!("L2 table at {offset:#x}, index {index}");
            let entry = g.l2_entry(raw);
            if let Err(e) = &entry {
                self.report.corrupt(|| format!("{e} ({})", place()));
            } else if let (Ok(entry), 2) = (&entry, step)
                && let Err(e) = g.subclusters(*entry, bits)
            {
                self.report.corrupt(|| format!("{e} ({})", place()));
            }
            if table.active.is_some() && raw & (COMPRESSED | OFFSET_MASK) != 0 {
                self.report.allocated_clusters += 1;
                self.report.compressed_clusters += u64::from(raw & COMPRESSED != 0);
            }
            if g.data_file {
                let guest = table.active.map(|first| first + ((index as u64) << g.cluster_bits));
                if let Ok(L2Entry::Data { host, .. } | L2Entry::Zero { host: Some(host), .. }) = entry
                    && guest.is_some_and(|guest| guest != host.0)
                {
                    let want = GuestOffset(guest.unwrap_or(0));
                    self.report.corrupt(|| format!("data file offset {host} must be {want} ({})", place()));
                }
                continue;
            }
            match entry {
                Ok(L2Entry::Compressed { offset, len }) => {
                    // The last sector may reach past the file's end: not all of it need be used.
                    let len = u64::from(len).min(self.file_len.saturating_sub(offset.0).max(1));
                    self.add(offset.0, len, table.references, "compressed cluster")?;
                }
                // A broken entry's reference counts, so that what it points to is not given away.
                _ if raw & COMPRESSED == 0 && raw & OFFSET_MASK != 0 => {
                    self.add(raw & OFFSET_MASK, g.cluster_size(), table.references, "cluster")?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn co_count_bitmaps(&mut self, h: &Header) -> Result<(), CheckError> {
        let Some(ext) = h.bitmaps else { return Ok(()) };
        let bitmaps = match co_read_bitmaps(self.file, h) {
            Ok(bitmaps) => bitmaps,
            Err(CheckError::Format(e)) => {
                self.incomplete = true;
                self.report.corrupt(|| e.to_string());
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        self.add(ext.directory_offset, ext.directory_size, 1, "bitmap directory")?;
        let g = self.g;
        for b in bitmaps {
            let len = u64::from(b.table_size) * 8;
            if !self.add(b.table_offset, len, 1, "bitmap table")? {
                self.incomplete = true;
                continue;
            }
            let file = self.file;
            let mut clusters = Vec::new();
            co_words(file, b.table_offset, b.table_size.into(), |index, raw| {
                match TableEntry::parse(raw, &g) {
                    Ok(TableEntry::Cluster(host)) => clusters.push(host.0),
                    Ok(_) => {}
                    Err(e) => {
                        let table = b.table_offset;
                        self.report.corrupt(|| format!("{e} (bitmap table at {table:#x}, index {index})"));
                    }
                }
                Ok(())
            })?;
            for host in clusters {
                self.add(host, g.cluster_size(), 1, "bitmap cluster")?;
            }
        }
        Ok(())
    }

    fn co_count_refcounts(&mut self, h: &Header) -> Result<(), CheckError> {
        let g = self.g;
        let bytes = u64::from(h.refcount_table_clusters) << g.cluster_bits;
        if bytes == 0 {
            self.rebuild = true;
            self.report.corrupt(|| "there is no refcount table".to_owned());
            return Ok(());
        }
        let offset = h.refcount_table_offset;
        if !self.add(offset, bytes, 1, "refcount table")? {
            self.rebuild = true;
            return Ok(());
        }
        self.own.push((offset, bytes));
        let mut blocks = Vec::new();
        let file = self.file;
        co_words(file, offset, bytes / 8, |index, raw| {
            match g.reftable_entry(raw) {
                Ok(Some(host)) => blocks.push((index, host.0)),
                Ok(None) => {}
                Err(e) => {
                    self.rebuild = true;
                    self.report.corrupt(|| format!("{e} (index {index})"));
                }
            }
            Ok(())
        })?;
        for (index, host) in blocks {
            if host.saturating_add(g.cluster_size()) > self.file_len.next_multiple_of(g.cluster_size()) {
                self.rebuild = true;
                self.report
                    .corrupt(|| format!("refcount block {index} at {host:#x} is beyond the end of the file"));
                continue;
            }
            self.add(host, g.cluster_size(), 1, "refcount block")?;
            self.own.push((host, g.cluster_size()));
            let n = self.counts.get(host >> g.cluster_bits);
            if n != 1 {
                self.rebuild = true;
                self.report
                    .corrupt(|| format!("refcount block {index} at {host:#x} is referenced {n} times"));
                continue;
            }
            self.blocks.insert(index, host);
        }
        Ok(())
    }

    /// One cluster's refcount in the file against its references.
    fn compare(&mut self, cluster: u64, refcount: u64, references: u64) {
        if refcount == references {
            return;
        }
        if refcount < references {
            self.report
                .corrupt(|| format!("cluster {cluster}: refcount {refcount}, referenced {references} times"));
            self.rebuild = true;
        } else {
            self.leaks += 1;
            self.report.tell(|| {
                format!("cluster {cluster} leaked: refcount {refcount}, referenced {references} times")
            });
        }
    }

    fn co_compare(&mut self) -> Result<(), CheckError> {
        let g = self.g;
        let per_block = g.refcount_block_entries();
        let clusters = g.clusters_for(self.file_len);
        let mut last = self.counts.last();
        let mut bytes = vec![0; g.cluster_size() as usize];
        for (index, host) in self.blocks.clone() {
            co_read(self.file, host, &mut bytes)?;
            if index.checked_mul(per_block).is_none_or(|first| first >= clusters) {
                continue;
            }
            let first = index * per_block;
            for i in 0..per_block.min(clusters - first) {
                let refcount = g.refcount(&bytes, i as usize);
                if refcount > 0 {
                    last = last.max(Some(first + i));
                }
                let references = self.counts.get(first + i).into();
                self.compare(first + i, refcount, references);
            }
        }
        // What no block covers has refcount 0.
        let uncovered: Vec<(u64, u32)> = self
            .counts
            .0
            .iter()
            .flat_map(|(k, c)| c.iter().enumerate().map(move |(i, &n)| (k * CHUNK + i as u64, n)))
            .filter(|&(cluster, n)| n > 0 && !self.blocks.contains_key(&(cluster / per_block)))
            .collect();
        for (cluster, n) in uncovered {
            self.compare(cluster, 0, n.into());
        }
        self.report.image_end_offset = last.map_or(0, |c| (c + 1) << g.cluster_bits);
        Ok(())
    }

    /// Compares the COPIED flags of the active tables with the refcounts; mends them if asked.
    fn co_flags(&mut self, mend: bool) -> Result<(), CheckError> {
        let g = self.g;
        let mut refcounts =
            Lookup { file: self.file, g, blocks: self.blocks.clone(), cached: HashMap::new() };
        let (file, l1_offset, l1_size) = (self.file, self.header.l1_table_offset, self.header.l1_size);
        if self.incomplete && !mend {
            return Ok(());
        }
        let mut l1 = Vec::new();
        co_words(file, l1_offset, l1_size.into(), |index, raw| {
            l1.push((index, raw));
            Ok(())
        })?;
        for (index, raw) in l1 {
            let l2 = raw & OFFSET_MASK;
            if l2 == 0 || !g.aligned(l2) {
                continue;
            }
            let alone = refcounts.co_get(l2)? == 1;
            if alone != (raw & COPIED != 0) {
                self.wrong_flags += 1;
                self.report.corrupt(|| format!("COPIED flag of L1 entry {index} ({raw:#x}) is wrong"));
                if mend {
                    co_write(file, l1_offset + index * 8, &flagged(raw, alone).to_be_bytes())?;
                }
            }
        }
        if g.data_file {
            return Ok(());
        }
        let tables: Vec<u64> =
            self.l2_tables.iter().filter(|(_, t)| t.active.is_some()).map(|(&offset, _)| offset).collect();
        let step = (g.l2_entry_size() / 8) as usize;
        let mut bytes = vec![0; g.cluster_size() as usize];
        for offset in tables {
            if offset >= self.file_len {
                continue;
            }
            co_read(file, offset, &mut bytes)?;
            for index in 0..g.l2_entries() as usize {
                let at = index * step * 8;
                let raw = bytes[at..].first_chunk::<8>().map_or(0, |w| u64::from_be_bytes(*w));
                let host = raw & OFFSET_MASK;
                if raw & COMPRESSED != 0 || host == 0 || !g.aligned(host) {
                    continue;
                }
                let alone = refcounts.co_get(host)? == 1;
                if alone != (raw & COPIED != 0) {
                    self.wrong_flags += 1;
                    self.report.corrupt(|| {
                        format!(
                            "COPIED flag of L2 entry {raw:#x} (table {offset:#x}, index {index}) is wrong"
                        )
                    });
                    if mend {
                        co_write(file, offset + at as u64, &flagged(raw, alone).to_be_bytes())?;
                    }
                }
            }
        }
        Ok(())
    }

    fn co_sync(&self) -> Result<(), CheckError> {
        self.file.co_flush().map_err(CheckError::Io)
    }

    fn co_repair(&mut self, repair: Repair, flags: bool) -> Result<(), CheckError> {
        // Before the first write, as the document asks: features that we do not know are not kept true.
        let autoclear = self.header.autoclear;
        if self.header.version >= 3 && autoclear != autoclear & Autoclear::KNOWN {
            co_write(self.file, 88, &(autoclear & Autoclear::KNOWN).bits().to_be_bytes())?;
            self.co_sync()?;
        }
        if self.rebuild {
            if repair == Repair::Leaks {
                // Counting down beside refcounts that are too low would be built on sand.
                let why = "refcounts are too low or their structures are damaged; use --repair all";
                return Err(CheckError::Repair(why.to_owned()));
            }
            self.co_rebuild()?;
        } else {
            self.co_free_leaks()?;
        }
        self.co_sync()?;
        if flags {
            self.co_flags(true)?;
            self.co_sync()?;
        }
        Ok(())
    }

    fn co_free_leaks(&mut self) -> Result<(), CheckError> {
        let g = self.g;
        let per_block = g.refcount_block_entries();
        let clusters = g.clusters_for(self.file_len);
        let mut bytes = vec![0; g.cluster_size() as usize];
        for (&index, &host) in &self.blocks {
            co_read(self.file, host, &mut bytes)?;
            let first = index.saturating_mul(per_block);
            let mut changed = false;
            for i in 0..per_block.min(clusters.saturating_sub(first)) {
                let references = u64::from(self.counts.get(first + i));
                if g.refcount(&bytes, i as usize) > references {
                    g.set_refcount(&mut bytes, i as usize, references);
                    changed = true;
                }
            }
            if changed {
                co_write(self.file, host, &bytes)?;
            }
        }
        Ok(())
    }

    /// Writes new refcount structures behind the end of the file, and lets the header name them.
    fn co_rebuild(&mut self) -> Result<(), CheckError> {
        let g = self.g;
        if !self.file.grows() {
            let why = "new refcount structures are needed, and a device has no room behind its end";
            return Err(CheckError::Repair(why.to_owned()));
        }
        for (offset, len) in std::mem::take(&mut self.own) {
            for cluster in offset >> g.cluster_bits..=(offset + len - 1) >> g.cluster_bits {
                let slot = self.counts.slot(cluster)?;
                *slot = slot.saturating_sub(1);
            }
        }
        let highest = self.counts.0.values().flat_map(|c| c.iter()).copied().max().unwrap_or(0);
        if u64::from(highest) > g.refcount_max() {
            let why = format!(
                "a cluster is referenced {highest} times, and refcounts have {} bits",
                g.refcount_bits()
            );
            return Err(CheckError::Repair(why));
        }
        let per_block = g.refcount_block_entries();
        let first = g.clusters_for(self.file_len).max(self.counts.last().map_or(0, |c| c + 1));
        let used = self.counts.0.iter().flat_map(|(k, c)| {
            c.iter()
                .enumerate()
                .filter(|(_, n)| **n > 0)
                .map(move |(i, _)| (k * CHUNK + i as u64) / per_block)
        });
        let mut indices: BTreeSet<u64> = used.collect();
        // The structures count themselves: grow until they cover what they need.
        let (mut blocks, mut table) = (0, 0);
        loop {
            let end = first + table + blocks;
            indices.extend(first / per_block..=end / per_block);
            let need_blocks = indices.len() as u64;
            let need_table = g.clusters_for((indices.last().copied().unwrap_or(0) + 1) * 8);
            if (need_blocks, need_table) == (blocks, table) {
                break;
            }
            (blocks, table) = (need_blocks, need_table);
        }
        if table << g.cluster_bits > MAX_REFTABLE_BYTES {
            return Err(CheckError::Repair("the refcount table would exceed 8 MiB".to_owned()));
        }
        let mut words = vec![0u8; (table << g.cluster_bits) as usize];
        let mut bytes = vec![0; g.cluster_size() as usize];
        for (n, &index) in indices.iter().enumerate() {
            let cluster = first + table + n as u64;
            bytes.fill(0);
            for i in 0..per_block {
                let c = index * per_block + i;
                let own = c >= first && c < first + table + blocks;
                let references = if own { 1 } else { self.counts.get(c).into() };
                if references > 0 {
                    g.set_refcount(&mut bytes, i as usize, references);
                }
            }
            co_write(self.file, cluster << g.cluster_bits, &bytes)?;
            words[(index * 8) as usize..][..8].copy_from_slice(&(cluster << g.cluster_bits).to_be_bytes());
        }
        let offset = first << g.cluster_bits;
        co_write(self.file, offset, &words)?;
        self.co_sync()?;
        // refcount_table_offset and refcount_table_clusters, bytes 48-59: one write inside of a sector.
        let named = [&offset.to_be_bytes()[..], &(table as u32).to_be_bytes()[..]].concat();
        co_write(self.file, 48, &named)?;
        self.co_sync()?;
        self.header.refcount_table_offset = offset;
        self.header.refcount_table_clusters = table as u32;
        self.file_len = self.file.len();
        self.blocks = indices
            .iter()
            .enumerate()
            .map(|(n, &i)| (i, (first + table + n as u64) << g.cluster_bits))
            .collect();
        Ok(())
    }

    fn co_clear_marks(&mut self) -> Result<(), CheckError> {
        let marks = Incompatible::DIRTY | Incompatible::CORRUPT;
        if self.header.version < 3 || !self.header.incompatible.intersects(marks) {
            return Ok(());
        }
        co_write(self.file, 72, &self.header.incompatible.difference(marks).bits().to_be_bytes())?;
        self.co_sync()
    }
}

fn flagged(raw: u64, alone: bool) -> u64 {
    if alone { raw | COPIED } else { raw & !COPIED }
}

/// Refcounts as the file has them, with a few blocks at hand.
struct Lookup<'a> {
    file: &'a dyn BlockNode,
    g: Geometry,
    blocks: BTreeMap<u64, u64>,
    cached: HashMap<u64, Vec<u8>>,
}

impl Lookup<'_> {
    fn co_get(&mut self, offset: u64) -> Result<u64, CheckError> {
        /// Bytes of blocks at hand (ours).
        const CACHE: u64 = 8 << 20;
        let cluster = offset >> self.g.cluster_bits;
        let index = cluster / self.g.refcount_block_entries();
        let Some(&host) = self.blocks.get(&index) else { return Ok(0) };
        if !self.cached.contains_key(&index) {
            if self.cached.len() as u64 >= (CACHE >> self.g.cluster_bits).max(1) {
                self.cached.clear();
            }
            let mut bytes = vec![0; self.g.cluster_size() as usize];
            co_read(self.file, host, &mut bytes)?;
            self.cached.insert(index, bytes);
        }
        let block = &self.cached[&index];
        Ok(self.g.refcount(block, (cluster % self.g.refcount_block_entries()) as usize))
    }
}
