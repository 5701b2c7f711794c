//! A reader and a checker of qcow2 images in memory, for judging crash states: written from the format's description
//! alone, sharing nothing with the driver, so that one mistake is not made twice. Fast rather than polite: it knows
//! well-formed headers, and calls everything else corrupt.
//!
//! Source: QEMU's qcow2.txt.

#![allow(dead_code, reason = "the format as it is; not every test looks at every field")]

use std::collections::HashMap;

/// Incompatible feature bits.
pub(crate) const DIRTY: u64 = 1;
pub(crate) const CORRUPT: u64 = 2;
pub(crate) const DATA_FILE: u64 = 4;
pub(crate) const COMPRESSION: u64 = 8;
pub(crate) const EXTENDED_L2: u64 = 16;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// No offset is larger.
const FAR: u64 = 1 << 56;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

pub(crate) fn be16(d: &[u8], at: usize) -> u16 {
    d.get(at..at.saturating_add(2)).map_or(0, |b| u16::from_be_bytes([b[0], b[1]]))
}

pub(crate) fn be32(d: &[u8], at: usize) -> u32 {
    d.get(at..at.saturating_add(4)).map_or(0, |b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
}

pub(crate) fn be64(d: &[u8], at: usize) -> u64 {
    d.get(at..at.saturating_add(8))
        .map_or(0, |b| u64::from_be_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
}

/// A snapshot as the table has it.
#[derive(Debug, Clone)]
pub(crate) struct Snapshot {
    pub(crate) l1_offset: u64,
    pub(crate) l1_size: u32,
    pub(crate) name: String,
    pub(crate) disk_size: u64,
}

/// A persistent bitmap as the directory has it.
#[derive(Debug, Clone)]
pub(crate) struct Bitmap {
    pub(crate) name: String,
    pub(crate) table_offset: u64,
    pub(crate) table_size: u32,
    pub(crate) flags: u32,
    pub(crate) granularity_bits: u8,
}

/// The header, and what it leads to at once.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub(crate) version: u32,
    pub(crate) cluster_bits: u32,
    pub(crate) size: u64,
    pub(crate) l1_size: u32,
    pub(crate) l1_offset: u64,
    pub(crate) reftable_offset: u64,
    pub(crate) reftable_clusters: u32,
    pub(crate) incompatible: u64,
    pub(crate) autoclear: u64,
    pub(crate) refcount_order: u32,
    pub(crate) compression: u8,
    pub(crate) snapshots_offset: u64,
    pub(crate) snapshots_bytes: u64,
    pub(crate) snapshots: Vec<Snapshot>,
    /// Directory offset and size, bitmaps.
    pub(crate) bitmaps: Option<(u64, u64, Vec<Bitmap>)>,
}

/// What a guest cluster is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mapping {
    Unallocated,
    Zero,
    Host(u64),
    /// Host offset of the first byte and bytes up to the end of the last sector.
    Compressed(u64, u64),
    /// Host offset (0: none) and the subcluster bitmap.
    Sub(u64, u64),
}

impl Layout {
    pub(crate) fn parse(d: &[u8]) -> Result<Layout, String> {
        if d.get(..4) != Some(b"QFI\xfb") {
            return Err("no magic".to_owned());
        }
        let version = be32(d, 4);
        let cluster_bits = be32(d, 20);
        if !(2..=3).contains(&version) || !(9..=21).contains(&cluster_bits) {
            return Err(format!("version {version}, cluster_bits {cluster_bits}"));
        }
        let v3 = version == 3;
        let incompatible = if v3 { be64(d, 72) } else { 0 };
        let header_length = if v3 { be32(d, 100) } else { 72 };
        let mut l = Layout {
            version,
            cluster_bits,
            size: be64(d, 24),
            l1_size: be32(d, 36),
            l1_offset: be64(d, 40),
            reftable_offset: be64(d, 48),
            reftable_clusters: be32(d, 56),
            incompatible,
            autoclear: if v3 { be64(d, 88) } else { 0 },
            refcount_order: if v3 { be32(d, 96) } else { 4 },
            compression: if incompatible & COMPRESSION != 0 { d.get(104).copied().unwrap_or(0) } else { 0 },
            snapshots_offset: be64(d, 64),
            snapshots_bytes: 0,
            snapshots: Vec::new(),
            bitmaps: None,
        };
        // No sum below overflows.
        if [l.l1_offset, l.reftable_offset, l.snapshots_offset].iter().any(|&o| o > FAR) {
            return Err("header points too far".to_owned());
        }
        if l.refcount_order > 6 || l.l1_size > 1 << 22 || l.reftable_clusters > 1 << 14 {
            return Err("header out of range".to_owned());
        }
        l.parse_snapshots(d, be32(d, 60))?;
        let mut at = header_length as usize;
        loop {
            let (kind, len) = (be32(d, at), be32(d, at + 4) as usize);
            if kind == 0 {
                break;
            }
            if at + 8 + len > 1 << cluster_bits {
                return Err(format!("extension {kind:#x} at {at} is too long"));
            }
            if kind == 0x2385_2875 {
                l.bitmaps = Some(parse_bitmaps(d, be32(d, at + 8), be64(d, at + 16), be64(d, at + 24))?);
            }
            at += 8 + len.next_multiple_of(8);
        }
        Ok(l)
    }

    fn parse_snapshots(&mut self, d: &[u8], count: u32) -> Result<(), String> {
        let mut at = self.snapshots_offset as usize;
        for i in 0..count {
            let (id_len, name_len, extra) = (be16(d, at + 12), be16(d, at + 14), be32(d, at + 36));
            let name_at = at + 40 + extra as usize + usize::from(id_len);
            let name = d
                .get(name_at..name_at + usize::from(name_len))
                .ok_or_else(|| format!("snapshot {i} is cut off"))?;
            if be64(d, at) > FAR {
                return Err(format!("snapshot {i} points too far"));
            }
            self.snapshots.push(Snapshot {
                l1_offset: be64(d, at),
                l1_size: be32(d, at + 8),
                name: String::from_utf8_lossy(name).into_owned(),
                disk_size: if extra >= 16 { be64(d, at + 48) } else { self.size },
            });
            at = (name_at + usize::from(name_len)).next_multiple_of(8);
        }
        self.snapshots_bytes = at as u64 - self.snapshots_offset;
        Ok(())
    }

    pub(crate) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The bits of a bitmap: one for each range of its granularity.
    pub(crate) fn bits(&self, d: &[u8], b: &Bitmap) -> Result<Vec<bool>, String> {
        let count = self.size.div_ceil(1 << b.granularity_bits);
        let entries = count.div_ceil(8).div_ceil(self.cluster());
        if u64::from(b.table_size) != entries {
            return Err(format!("bitmap {}: {} table entries, not {entries}", b.name, b.table_size));
        }
        let bit = |i: u64| {
            let (byte, shift) = (i / 8, i % 8);
            let entry = be64(d, (b.table_offset + byte / self.cluster() * 8) as usize);
            match entry {
                0 => Ok(false),
                1 => Ok(true),
                e if e & !OFFSET != 0 => Err(format!("bitmap {}: table entry {e:#x}", b.name)),
                e => match d.get((e + byte % self.cluster()) as usize) {
                    Some(byte) => Ok(byte >> shift & 1 != 0),
                    None => Err(format!("bitmap {}: {e:#x} is past the end of the file", b.name)),
                },
            }
        };
        (0..count).map(bit).collect()
    }

    pub(crate) fn extended(&self) -> bool {
        self.incompatible & EXTENDED_L2 != 0
    }

    pub(crate) fn l2_entry(&self) -> u64 {
        if self.extended() { 16 } else { 8 }
    }

    pub(crate) fn l2_entries(&self) -> u64 {
        self.cluster() / self.l2_entry()
    }

    pub(crate) fn refcount(&self, d: &[u8], cluster: u64) -> u64 {
        let per_block = (self.cluster() * 8) >> self.refcount_order;
        let index = cluster / per_block;
        if index >= u64::from(self.reftable_clusters) * self.cluster() / 8 {
            return 0;
        }
        let block = be64(d, (self.reftable_offset + index * 8) as usize) & !0x1ff;
        if block == 0 || block > FAR {
            return 0;
        }
        let i = cluster % per_block;
        let byte = |at: u64| u64::from(d.get((block + at) as usize).copied().unwrap_or(0));
        match self.refcount_order {
            0 => byte(i / 8) >> (i % 8) & 1,
            1 => byte(i / 4) >> (i % 4 * 2) & 3,
            2 => byte(i / 2) >> (i % 2 * 4) & 15,
            3 => byte(i),
            4 => u64::from(be16(d, (block + i * 2) as usize)),
            5 => u64::from(be32(d, (block + i * 4) as usize)),
            _ => be64(d, (block + i * 8) as usize),
        }
    }

    fn mapping(&self, entry: u64, bitmap: u64) -> Mapping {
        if entry & COMPRESSED != 0 {
            let x = 62 - (self.cluster_bits - 8);
            let offset = entry & ((1 << x) - 1);
            let sectors = ((entry & !(COPIED | COMPRESSED)) >> x) + 1;
            return Mapping::Compressed(offset, sectors * 512 - offset % 512);
        }
        let offset = entry & OFFSET;
        if self.extended() {
            return Mapping::Sub(offset, bitmap);
        }
        if entry & 1 != 0 && self.version >= 3 {
            Mapping::Zero
        } else if offset != 0 || (self.incompatible & DATA_FILE != 0 && entry & COPIED != 0) {
            Mapping::Host(offset)
        } else {
            Mapping::Unallocated
        }
    }

    /// What a guest cluster is, by an L1 table.
    pub(crate) fn map(&self, d: &[u8], l1_offset: u64, l1_size: u32, guest_cluster: u64) -> Mapping {
        let (l1, l2) = (guest_cluster / self.l2_entries(), guest_cluster % self.l2_entries());
        if l1 >= u64::from(l1_size) {
            return Mapping::Unallocated;
        }
        let table = be64(d, (l1_offset + l1 * 8) as usize) & OFFSET;
        if table == 0 {
            return Mapping::Unallocated;
        }
        let at = (table + l2 * self.l2_entry()) as usize;
        self.mapping(be64(d, at), if self.extended() { be64(d, at + 8) } else { 0 })
    }
}

fn parse_bitmaps(d: &[u8], count: u32, size: u64, offset: u64) -> Result<(u64, u64, Vec<Bitmap>), String> {
    if offset > FAR || count > 1 << 16 {
        return Err("the bitmap directory is too far, or too large".to_owned());
    }
    let mut at = offset as usize;
    let mut all = Vec::new();
    for i in 0..count {
        if be64(d, at) > FAR {
            return Err(format!("bitmap {i} points too far"));
        }
        let (name_size, extra) = (usize::from(be16(d, at + 18)), be32(d, at + 20) as usize);
        let name_at = at + 24 + extra;
        let name = d.get(name_at..name_at + name_size).ok_or_else(|| format!("bitmap {i} is cut off"))?;
        all.push(Bitmap {
            name: String::from_utf8_lossy(name).into_owned(),
            table_offset: be64(d, at),
            table_size: be32(d, at + 8),
            flags: be32(d, at + 12),
            granularity_bits: d[at + 17],
        });
        at = (name_at + name_size).next_multiple_of(8);
    }
    if at as u64 - offset != size {
        return Err(format!("the bitmap directory has {} bytes, not {size}", at as u64 - offset));
    }
    Ok((offset, size, all))
}

/// What the checker found.
#[derive(Debug, Clone, Default)]
pub(crate) struct Check {
    pub(crate) corruptions: Vec<String>,
    pub(crate) leaks: u64,
    /// Clusters whose refcount is too low: they may be given away.
    pub(crate) undercounted: u64,
    /// Entries that say COPIED of a cluster that others refer to as well: an overwrite would hit them.
    pub(crate) overtrusted: u64,
}

/// Most corruptions that are told.
const TOLD: usize = 12;

struct Checker<'a> {
    d: &'a [u8],
    l: &'a Layout,
    refs: Vec<u32>,
    out: Check,
}

impl Checker<'_> {
    fn bad(&mut self, text: impl FnOnce() -> String) {
        if self.out.corruptions.len() < TOLD {
            self.out.corruptions.push(text());
        }
    }

    fn count(&mut self, what: &str, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let cluster = self.l.cluster();
        let (first, last) = (offset / cluster, (offset.saturating_add(len) - 1) / cluster);
        if last - first > 1 << 20 || last * cluster >= self.d.len() as u64 {
            self.bad(|| format!("{what} at {offset:#x}+{len:#x} is past the end of the file"));
            return;
        }
        for c in first..=last {
            self.refs[c as usize] += 1;
        }
    }

    fn aligned(&mut self, what: &str, offset: u64) -> bool {
        if !offset.is_multiple_of(self.l.cluster()) {
            self.bad(|| format!("{what} at {offset:#x} is not aligned"));
            return false;
        }
        true
    }

    /// Counts what an L1 table leads to.
    fn tree(&mut self, what: &str, l1_offset: u64, l1_size: u32) {
        let data_file = self.l.incompatible & DATA_FILE != 0;
        if l1_offset + u64::from(l1_size) * 8 > self.d.len() as u64 {
            self.bad(|| format!("{what} L1 table is past the end of the file"));
            return;
        }
        self.count(&format!("{what} L1 table"), l1_offset, u64::from(l1_size) * 8);
        for i in 0..u64::from(l1_size) {
            let e = be64(self.d, (l1_offset + i * 8) as usize);
            let table = e & OFFSET;
            if e & !(OFFSET | COPIED) != 0 {
                self.bad(|| format!("{what} L1 entry {i} {e:#x} has reserved bits"));
            }
            if table == 0 {
                continue;
            }
            if !self.aligned("L2 table", table) {
                continue;
            }
            self.count("L2 table", table, self.l.cluster());
            for j in 0..self.l.l2_entries() {
                let at = (table + j * self.l.l2_entry()) as usize;
                let entry = be64(self.d, at);
                if entry == 0 {
                    continue;
                }
                if entry & COMPRESSED != 0 {
                    if entry & COPIED != 0 {
                        self.bad(|| format!("{what} L2 {table:#x}[{j}] {entry:#x}: compressed and COPIED"));
                    }
                    if let Mapping::Compressed(offset, len) = self.l.mapping(entry, 0) {
                        // The last sectors may be past the end of the file: only their clusters count.
                        let end = (offset + len).min(self.d.len() as u64);
                        if offset >= end {
                            self.bad(|| format!("compressed cluster {entry:#x} is past the end"));
                        } else {
                            self.count("compressed cluster", offset, end - offset);
                        }
                    }
                    continue;
                }
                let reserved = if self.l.version >= 3 && !self.l.extended() { 0x1fe } else { 0x1ff };
                if entry & (reserved | 0x3f << 56) != 0 {
                    self.bad(|| format!("{what} L2 {table:#x}[{j}] {entry:#x} has reserved bits"));
                }
                if self.l.extended() {
                    let b = be64(self.d, at + 8);
                    if b as u32 & (b >> 32) as u32 != 0
                        || (entry & OFFSET == 0 && b as u32 != 0 && !data_file)
                    {
                        self.bad(|| {
                            format!("{what} L2 {table:#x}[{j}] {entry:#x}: bitmap {b:#x} makes no sense")
                        });
                    }
                }
                let host = entry & OFFSET;
                if host != 0 && self.aligned("data cluster", host) && !data_file {
                    self.count("data cluster", host, self.l.cluster());
                }
            }
        }
    }

    /// COPIED in the active tree says what the refcounts say.
    fn copied(&mut self) {
        for i in 0..u64::from(self.l.l1_size) {
            let e = be64(self.d, (self.l.l1_offset + i * 8) as usize);
            let table = e & OFFSET;
            if table == 0 {
                continue;
            }
            self.copied_is("L1 entry", e, table);
            for j in 0..self.l.l2_entries() {
                let entry = be64(self.d, (table + j * self.l.l2_entry()) as usize);
                if entry & COMPRESSED != 0 || entry & OFFSET == 0 || self.l.incompatible & DATA_FILE != 0 {
                    continue;
                }
                self.copied_is("L2 entry", entry, entry & OFFSET);
            }
        }
    }

    fn copied_is(&mut self, what: &str, entry: u64, host: u64) {
        let n = self.l.refcount(self.d, host >> self.l.cluster_bits);
        let references = self.refs.get((host >> self.l.cluster_bits) as usize).copied().unwrap_or(0);
        self.out.overtrusted += u64::from(entry & COPIED != 0 && references > 1);
        if (entry & COPIED != 0) != (n == 1) {
            self.bad(|| format!("{what} {entry:#x}: COPIED is wrong for refcount {n}"));
        }
    }
}

/// Checks all metadata of an image whose bytes past `d` do not exist. With `dirty_ok` the refcounts of an image that is
/// marked dirty are not judged (they are rebuilt when it is opened).
pub(crate) fn check(d: &[u8]) -> Check {
    let l = match Layout::parse(d) {
        Ok(l) => l,
        Err(e) => return Check { corruptions: vec![e], ..Check::default() },
    };
    let clusters = d.len().div_ceil(l.cluster() as usize);
    let mut c = Checker { d, l: &l, refs: vec![0; clusters], out: Check::default() };
    c.count("header", 0, l.cluster());
    c.aligned("L1 table", l.l1_offset);
    c.aligned("refcount table", l.reftable_offset);
    let guest_clusters = l.size.div_ceil(l.cluster());
    if u64::from(l.l1_size) < guest_clusters.div_ceil(l.l2_entries()) {
        c.bad(|| format!("{} L1 entries are too few for {} bytes", l.l1_size, l.size));
    }
    c.tree("active", l.l1_offset, l.l1_size);
    c.count("snapshot table", l.snapshots_offset, l.snapshots_bytes);
    for s in &l.snapshots {
        c.tree(&format!("snapshot {}", s.name), s.l1_offset, s.l1_size);
    }
    if let Some((offset, size, bitmaps)) = &l.bitmaps {
        c.count("bitmap directory", *offset, *size);
        for b in bitmaps {
            c.count("bitmap table", b.table_offset, u64::from(b.table_size) * 8);
            for i in 0..u64::from(b.table_size).min(d.len() as u64 / 8) {
                let e = be64(d, (b.table_offset + i * 8) as usize) & OFFSET;
                if e != 0 {
                    c.count("bitmap data", e, l.cluster());
                }
            }
        }
    }
    let table_bytes = u64::from(l.reftable_clusters) * l.cluster();
    c.count("refcount table", l.reftable_offset, table_bytes);
    for i in 0..table_bytes / 8 {
        let e = be64(d, (l.reftable_offset + i * 8) as usize);
        if e & 0x1ff != 0 {
            c.bad(|| format!("refcount table entry {i} {e:#x} has reserved bits"));
        }
        let block = e & !0x1ff;
        if block != 0 && c.aligned("refcount block", block) {
            c.count("refcount block", block, l.cluster());
        }
    }
    if l.incompatible & DIRTY == 0 {
        for i in 0..clusters {
            let (have, want) = (l.refcount(d, i as u64), u64::from(c.refs[i]));
            c.out.undercounted += u64::from(have < want);
            if have < want {
                c.bad(|| {
                    format!("cluster {:#x}: refcount {have}, references {want}", (i as u64) << l.cluster_bits)
                });
            }
            c.out.leaks += u64::from(have > want);
        }
        c.copied();
    }
    c.out
}

/// Decompresses a cluster; `None` when the data are no good. Bytes after the end of the stream do not matter.
pub(crate) fn decompress(compression: u8, data: &[u8], cluster: usize) -> Option<Vec<u8>> {
    let mut out = vec![0; cluster];
    if compression == 1 {
        let mut reader = zstd::stream::read::Decoder::with_buffer(data).ok()?;
        std::io::Read::read_exact(&mut reader, &mut out).ok()?;
        return Some(out);
    }
    // Raw deflate, with a window of up to 32 KiB.
    let mut inflate = flate2::Decompress::new(false);
    let status = inflate.decompress(data, &mut out, flate2::FlushDecompress::Finish);
    (status.is_ok() && inflate.total_out() == cluster as u64).then_some(out)
}

/// Reads guest data from images in memory; decompressed clusters are kept.
pub(crate) struct Reader {
    /// What unallocated clusters read as; past its end: zeroes.
    pub(crate) backing: Vec<u8>,
    pub(crate) cache: HashMap<Vec<u8>, Option<Vec<u8>>>,
}

impl Reader {
    pub(crate) fn new(backing: Vec<u8>) -> Reader {
        Reader { backing, cache: HashMap::new() }
    }

    /// Reads the whole disk by an L1 table into `out`. `data` is the external data file, if there is one.
    ///
    /// Errors: a compressed cluster that cannot be read.
    pub(crate) fn read(
        &mut self,
        l: &Layout,
        d: &[u8],
        data: Option<&[u8]>,
        l1: (u64, u32),
        out: &mut [u8],
    ) -> Result<(), String> {
        let cluster = l.cluster() as usize;
        for (i, chunk) in out.chunks_mut(cluster).enumerate() {
            let at = i * cluster;
            match l.map(d, l1.0, l1.1, i as u64) {
                Mapping::Unallocated => copy_or_zero(&self.backing, at as u64, chunk),
                Mapping::Zero => chunk.fill(0),
                Mapping::Host(h) => copy_or_zero(data.unwrap_or(d), h, chunk),
                Mapping::Compressed(offset, len) => {
                    let from = (offset as usize).min(d.len());
                    let bytes = &d[from..(from + len as usize).min(d.len())];
                    let plain = match self.cache.get(bytes) {
                        Some(p) => p,
                        None => {
                            let plain = decompress(l.compression, bytes, cluster);
                            self.cache.entry(bytes.to_vec()).or_insert(plain)
                        }
                    };
                    let plain =
                        plain.as_ref().ok_or_else(|| format!("compressed cluster {i} is unreadable"))?;
                    chunk.copy_from_slice(&plain[..chunk.len()]);
                }
                Mapping::Sub(host, bits) => {
                    let sub = cluster / 32;
                    for (k, piece) in chunk.chunks_mut(sub).enumerate() {
                        if bits >> (32 + k) & 1 != 0 {
                            piece.fill(0);
                        } else if bits >> k & 1 != 0 {
                            copy_or_zero(data.unwrap_or(d), host + (k * sub) as u64, piece);
                        } else {
                            copy_or_zero(&self.backing, (at + k * sub) as u64, piece);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Reads the active disk.
    pub(crate) fn read_active(
        &mut self,
        d: &[u8],
        data: Option<&[u8]>,
        out: &mut [u8],
    ) -> Result<(), String> {
        let l = Layout::parse(d)?;
        self.read(&l, d, data, (l.l1_offset, l.l1_size), out)
    }
}

/// Copies what is there; zeroes past the end.
fn copy_or_zero(from: &[u8], at: u64, to: &mut [u8]) {
    let start = (at as usize).min(from.len());
    let n = (from.len() - start).min(to.len());
    to[..n].copy_from_slice(&from[start..start + n]);
    to[n..].fill(0);
}
