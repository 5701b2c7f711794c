//! The fields of the header and of the snapshot table that the driver uses, checked. Pure.
//!
//! Fields are changed where they stand, so that everything else in the header stays as it is.

#![deny(clippy::arithmetic_side_effects)]

use super::FormatError;
use super::entry::Geometry;
use super::error::Bytes;
use super::inflate::Compression;

/// Incompatible features (bytes 72-79): refcounts may be wrong.
const DIRTY: u64 = 1 << 0;
/// Damaged.
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2;
/// Autoclear features (bytes 88-95): the bitmaps are right.
const BITMAPS: u64 = 1 << 0;
/// The data file is right by itself.
const RAW_DATA_FILE: u64 = 1 << 1;

/// Snapshots of an image at most (QEMU's).
const MAX_SNAPSHOTS: u32 = 65536;

/// See the module's text. Offsets are those of the document.
#[derive(Debug, Clone)]
pub(super) struct Fields {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    pub(super) size: u64,
    pub(super) crypt_method: u32,
    pub(super) l1_size: u32,
    pub(super) l1_table_offset: u64,
    pub(super) refcount_table_offset: u64,
    pub(super) refcount_table_clusters: u32,
    pub(super) nb_snapshots: u32,
    pub(super) snapshots_offset: u64,
    pub(super) incompatible_features: u64,
    pub(super) autoclear_features: u64,
    pub(super) refcount_order: u32,
    pub(super) compression: Compression,
}

impl Fields {
    /// Decodes the front of the file.
    pub(super) fn parse(bytes: &[u8]) -> Result<Fields, FormatError> {
        let b = Bytes { bytes, structure: "header" };
        if bytes.get(..4) != Some(b"QFI\xfb".as_slice()) {
            return Err(FormatError::NotQcow2);
        }
        let version = b.u32(4)?;
        if version != 2 && version != 3 {
            return Err(FormatError::Version(version));
        }
        let v3 = version == 3;
        let field = |field, at, value, rule| Err(b.field(field, at, value, rule));
        let cluster_bits = b.u32(20)?;
        if !(9..=21).contains(&cluster_bits) {
            return field("cluster_bits", "20-23", cluster_bits.into(), "must be 9 to 21");
        }
        let size = b.u64(24)?;
        if size > i64::MAX as u64 {
            return field("size", "24-31", size, "is larger than any file");
        }
        let crypt_method = b.u32(32)?;
        if crypt_method > 2 {
            return field("crypt_method", "32-35", crypt_method.into(), "must be 0, 1 or 2");
        }
        let nb_snapshots = b.u32(60)?;
        if nb_snapshots > MAX_SNAPSHOTS {
            return field("nb_snapshots", "60-63", nb_snapshots.into(), "must be 65536 at most");
        }
        let incompatible_features = if v3 { b.u64(72)? } else { 0 };
        let unknown = incompatible_features & !KNOWN;
        if unknown != 0 {
            let names = (0..64).filter(|i| unknown >> i & 1 != 0).map(|i| format!("bit {i}")).collect();
            return Err(FormatError::UnknownFeatures { names });
        }
        let refcount_order = if v3 { b.u32(96)? } else { 4 };
        if refcount_order > 6 {
            return field("refcount_order", "96-99", refcount_order.into(), "must be 6 at most");
        }
        let header_length = if v3 { b.u32(100)? } else { 72 };
        if v3 && (header_length < 104 || header_length % 8 != 0 || header_length > 1 << cluster_bits) {
            let rule = "must be a multiple of 8, at least 104, and not exceed the cluster";
            return field("header_length", "100-103", header_length.into(), rule);
        }
        let compression_type = if header_length > 104 { b.u8(104)? } else { 0 };
        let typed = incompatible_features & COMPRESSION_TYPE != 0;
        let compression = match (compression_type, typed) {
            (0, false) => Compression::Zlib,
            (1, true) => Compression::Zstd,
            (t, true) if t > 1 => {
                return Err(FormatError::Unsupported {
                    what: "this compression type (header field compression_type, byte 104)",
                    hint: "only zlib and zstd are known",
                });
            }
            (t, _) => {
                let rule = "must agree with incompatible feature bit 3";
                return field("compression_type", "104", t.into(), rule);
            }
        };
        if incompatible_features & EXTENDED_L2 != 0 && cluster_bits < 14 {
            let rule = "must be 14 at least with extended L2 entries";
            return field("cluster_bits", "20-23", cluster_bits.into(), rule);
        }
        Ok(Fields {
            version,
            cluster_bits,
            size,
            crypt_method,
            l1_size: b.u32(36)?,
            l1_table_offset: b.u64(40)?,
            refcount_table_offset: b.u64(48)?,
            refcount_table_clusters: b.u32(56)?,
            nb_snapshots,
            snapshots_offset: b.u64(64)?,
            incompatible_features,
            autoclear_features: if v3 { b.u64(88)? } else { 0 },
            refcount_order,
            compression,
        })
    }

    pub(super) fn geometry(&self) -> Geometry {
        Geometry {
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            extended_l2: self.incompatible_features & EXTENDED_L2 != 0,
            data_file: self.incompatible_features & DATA_FILE != 0,
            v2: self.version == 2,
        }
    }

    pub(super) fn is_dirty(&self) -> bool {
        self.incompatible_features & DIRTY != 0
    }

    pub(super) fn is_corrupt(&self) -> bool {
        self.incompatible_features & CORRUPT != 0
    }

    pub(super) fn set_corrupt(&mut self) {
        self.incompatible_features |= CORRUPT;
    }

    pub(super) fn set_bitmaps(&mut self, on: bool) {
        self.autoclear_features = self.autoclear_features & !BITMAPS | if on { BITMAPS } else { 0 };
    }

    pub(super) fn is_data_file_raw(&self) -> bool {
        self.incompatible_features & DATA_FILE != 0 && self.autoclear_features & RAW_DATA_FILE != 0
    }

    /// The autoclear features that stay when we change the image; `None` when those are all of them.
    pub(super) fn autoclear_to_keep(&self, bitmaps: bool) -> Option<u64> {
        let known = RAW_DATA_FILE | if bitmaps { BITMAPS } else { 0 };
        (self.version > 2 && self.autoclear_features & !known != 0).then_some(self.autoclear_features & known)
    }
}

/// Which internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotSel {
    /// By its id.
    Id(String),
    /// By its name.
    Name(String),
    /// By its id, or else by its name.
    IdOrName(String),
}

impl std::fmt::Display for SnapshotSel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SnapshotSel::Id(s) => write!(f, "with id {s:?}"),
            SnapshotSel::Name(s) => write!(f, "with name {s:?}"),
            SnapshotSel::IdOrName(s) => write!(f, "with id or name {s:?}"),
        }
    }
}

/// What the driver uses of a snapshot table entry.
#[derive(Debug, Clone)]
pub(super) struct SnapshotFields {
    pub(super) l1_table_offset: u64,
    pub(super) l1_size: u32,
    /// Bytes 48-55, where they are.
    pub(super) disk_size: Option<u64>,
    id: Vec<u8>,
    name: Vec<u8>,
}

/// The snapshot table.
#[derive(Debug, Clone, Default)]
pub(super) struct Snapshots {
    pub(super) entries: Vec<SnapshotFields>,
    /// Bytes of the table.
    pub(super) byte_len: u64,
}

impl Snapshots {
    /// Decodes a table of `count` entries.
    pub(super) fn parse(bytes: &[u8], count: u32) -> Result<Snapshots, FormatError> {
        let mut table = Snapshots::default();
        let mut at = 0usize;
        for i in 0..count {
            let structure = format!("snapshot table entry {i}");
            let b = Bytes { bytes: bytes.get(at..).unwrap_or(&[]), structure: &structure };
            let (id_len, name_len) = (usize::from(b.u16(12)?), usize::from(b.u16(14)?));
            let extra = b.u32(36)? as usize;
            // QEMU's bound.
            if extra > 1024 {
                return Err(b.field("extra data size", "36-39", extra as u64, "must be 1024 at most"));
            }
            let id_at = 40usize.saturating_add(extra);
            let name_at = id_at.saturating_add(id_len);
            table.entries.push(SnapshotFields {
                l1_table_offset: b.u64(0)?,
                l1_size: b.u32(8)?,
                disk_size: if extra >= 16 { Some(b.u64(48)?) } else { None },
                id: b.slice(id_at, id_len)?.to_vec(),
                name: b.slice(name_at, name_len)?.to_vec(),
            });
            at = at.saturating_add(name_at.saturating_add(name_len).next_multiple_of(8));
        }
        table.byte_len = at as u64;
        Ok(table)
    }

    pub(super) fn find(&self, which: &SnapshotSel) -> Option<&SnapshotFields> {
        let by_id = |s: &str| self.entries.iter().find(|e| e.id == s.as_bytes());
        let by_name = |s: &str| self.entries.iter().find(|e| e.name == s.as_bytes());
        match which {
            SnapshotSel::Id(s) => by_id(s),
            SnapshotSel::Name(s) => by_name(s),
            SnapshotSel::IdOrName(s) => by_id(s).or_else(|| by_name(s)),
        }
    }
}
