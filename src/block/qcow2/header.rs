//! The first cluster: header fields, header extensions, backing file name. Pure.
//!
//! ```text
//!   0        72 (v2)   104 (v3)  112     header_length                         backing_file_offset
//!   ├ fields ┼ features ┼ type,0 ┼ unknown ┼ ext │ ext │ … │ end ┼ (free) … ┼ name ┤ … cluster end
//! ```
//! What is not understood is kept: unknown fields and unknown extensions are written back byte for byte.
//! Nothing is read from elsewhere: offsets are checked for alignment and limits, not against the file's size.

#![deny(clippy::arithmetic_side_effects)]

use super::FormatError;
use super::entry::Geometry;
use super::error::Bytes;
use bitflags::bitflags;

/// "QFI\xfb".
pub const MAGIC: u32 = 0x5146_49fb;
/// Bytes of a version 2 header.
pub const V2_LEN: u32 = 72;
/// Bytes of the shortest version 3 header.
pub const V3_MIN_LEN: u32 = 104;
/// Bytes of the header that we write: with compression_type and its padding.
pub const V3_LEN: u32 = 112;
/// Bytes that [`prefix_len`] looks at.
pub const PEEK_LEN: usize = 24;
/// Smallest cluster_bits (the document's).
pub const MIN_CLUSTER_BITS: u32 = 9;
/// Largest cluster_bits (QEMU's).
pub const MAX_CLUSTER_BITS: u32 = 21;
/// Smallest cluster_bits with extended L2 entries (the document's).
pub const MIN_EXTENDED_CLUSTER_BITS: u32 = 14;
/// Largest L1 table in bytes (QEMU's).
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table in bytes (QEMU's).
pub const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// Most snapshots (QEMU's).
pub const MAX_SNAPSHOTS: u32 = 65536;
/// Longest backing file name in bytes (the document's).
pub const MAX_BACKING_NAME: u32 = 1023;
/// Longest backing format name in bytes (QEMU's: 16 with a terminator).
pub const MAX_BACKING_FORMAT: usize = 15;
/// Most bitmaps (QEMU's).
pub const MAX_BITMAPS: u32 = 65535;
/// Largest bitmap directory in bytes (QEMU's).
pub const MAX_BITMAP_DIRECTORY: u64 = 1024 * 65535;
/// Largest file offset that tables may reach (system call interface: signed).
const MAX_OFFSET: u64 = i64::MAX as u64;

/// Type of the extension that ends the list.
const EXT_END: u32 = 0;
/// Backing file format name.
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
/// Feature name table.
const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
/// Bitmaps.
const EXT_BITMAPS: u32 = 0x2385_2875;
/// Full disk encryption header pointer.
const EXT_CRYPTO: u32 = 0x0537_be77;
/// External data file name.
const EXT_DATA_FILE: u32 = 0x4441_5441;

bitflags! {
    /// incompatible_features, bytes 72-79.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct Incompatible: u64 {
        /// Refcounts may be wrong: repair before writing.
        const DIRTY = 1;
        /// Any structure may be wrong: never write.
        const CORRUPT = 1 << 1;
        /// Guest clusters are in an external data file.
        const DATA_FILE = 1 << 2;
        /// compression_type is not 0.
        const COMPRESSION_TYPE = 1 << 3;
        /// L2 entries are 16 bytes.
        const EXTENDED_L2 = 1 << 4;
    }
}

bitflags! {
    /// compatible_features, bytes 80-87. Unknown bits are kept.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct Compatible: u64 {
        /// Refcounts may be updated late, with DIRTY set.
        const LAZY_REFCOUNTS = 1;
        const _ = !0;
    }
}

bitflags! {
    /// autoclear_features, bytes 88-95. Unknown bits must be cleared before the first write.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct Autoclear: u64 {
        /// The bitmaps extension is consistent.
        const BITMAPS = 1;
        /// The data file can be read as a raw image.
        const RAW_DATA = 1 << 1;
        const _ = !0;
    }
}

impl Autoclear {
    /// The bits that this version keeps true while it writes.
    pub const KNOWN: Autoclear = Autoclear::BITMAPS.union(Autoclear::RAW_DATA);
}

/// compression_type, byte 104.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Raw deflate, without zlib's header; QEMU says "zlib".
    #[default]
    Zlib,
    /// Zstandard.
    Zstd,
}

impl Compression {
    /// QEMU's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        }
    }
}

/// crypt_method, bytes 32-35.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Encryption {
    /// 0.
    #[default]
    None,
    /// 1: QEMU's old AES.
    Aes,
    /// 2.
    Luks,
}

/// One entry of the feature name table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FeatureName {
    /// 0 incompatible, 1 compatible, 2 autoclear; others are kept.
    pub kind: u8,
    /// Bit number.
    pub bit: u8,
    /// Name, at most 46 bytes.
    pub name: Vec<u8>,
}

/// The bitmaps extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Bitmaps, at least 1.
    pub nb_bitmaps: u32,
    /// Bytes of the directory.
    pub directory_size: u64,
    /// Where it starts, cluster-aligned.
    pub directory_offset: u64,
}

/// The full disk encryption header pointer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CryptoExtension {
    /// Where the encryption header starts, cluster-aligned.
    pub offset: u64,
    /// Its bytes.
    pub len: u64,
}

/// What the header is read for: how much of it must make sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To use the image: everything must hold.
    Use,
    /// To check or repair it: the refcount table may be missing.
    Check,
    /// To print it: encryption is allowed too.
    Inspect,
}

/// The first cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Bytes 4-7: 2 or 3.
    pub version: u32,
    /// Bytes 8-19 and what they point to. Not necessarily UTF-8.
    pub backing_file: Option<Vec<u8>>,
    /// Bytes 20-23.
    pub cluster_bits: u32,
    /// Bytes 24-31: virtual size in bytes.
    pub size: u64,
    /// Bytes 32-35.
    pub encryption: Encryption,
    /// Bytes 36-39: entries of the active L1 table.
    pub l1_size: u32,
    /// Bytes 40-47.
    pub l1_table_offset: u64,
    /// Bytes 48-55.
    pub refcount_table_offset: u64,
    /// Bytes 56-59.
    pub refcount_table_clusters: u32,
    /// Bytes 60-63.
    pub nb_snapshots: u32,
    /// Bytes 64-71.
    pub snapshots_offset: u64,
    /// Bytes 72-79.
    pub incompatible: Incompatible,
    /// Bytes 80-87.
    pub compatible: Compatible,
    /// Bytes 88-95.
    pub autoclear: Autoclear,
    /// Bytes 96-99: 4 for version 2.
    pub refcount_order: u32,
    /// Byte 104.
    pub compression: Compression,
    /// Bytes 105 up to header_length (none when that is 104), kept as they are. Version 3 only.
    pub further: Vec<u8>,
    /// Extension: format of the backing file.
    pub backing_format: Option<Vec<u8>>,
    /// Extension: name of the external data file.
    pub data_file: Option<Vec<u8>>,
    /// Extension: encryption header.
    pub crypto: Option<CryptoExtension>,
    /// Extension: feature name table.
    pub feature_names: Vec<FeatureName>,
    /// Extension: bitmaps. Only when the autoclear bit says that it is consistent; else it is among `unknown`.
    pub bitmaps: Option<BitmapsExtension>,
    /// Extensions that are not understood: type and data.
    pub unknown: Vec<(u32, Vec<u8>)>,
}

/// What QEMU calls the features, for the feature name table of images that we create: kind, bit, name.
const FEATURE_NAMES: &[(u8, u8, &str)] = &[
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// The feature name table of an image that we create.
#[must_use]
pub fn our_feature_names() -> Vec<FeatureName> {
    let entry = |&(kind, bit, name): &(u8, u8, &str)| FeatureName { kind, bit, name: name.into() };
    FEATURE_NAMES.iter().map(entry).collect()
}

/// How many bytes from the file's start [`Header::parse`] needs, told by the first [`PEEK_LEN`]: one cluster. Where
/// the file is shorter, the rest counts as zeroes.
///
/// # Errors
/// `NotQcow2`, `Version`, `Field` (cluster_bits), `Truncated`.
pub fn prefix_len(head: &[u8]) -> Result<usize, FormatError> {
    let b = Bytes { bytes: head, structure: "header" };
    if b.u32(0).ok() != Some(MAGIC) {
        return Err(FormatError::NotQcow2);
    }
    let version = b.u32(4)?;
    if !(2..=3).contains(&version) {
        return Err(FormatError::Version(version));
    }
    Ok(1usize << cluster_bits(&b)?)
}

fn cluster_bits(b: &Bytes<'_>) -> Result<u32, FormatError> {
    let bits = b.u32(20)?;
    if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&bits) {
        return Err(b.field("cluster_bits", "20-23", bits.into(), "must be 9 to 21 (512 bytes to 2 MiB)"));
    }
    Ok(bits)
}

/// Whether `len` bytes at `offset` are below the largest file offset.
fn reachable(offset: u64, len: u64) -> bool {
    offset.checked_add(len).is_some_and(|end| end <= MAX_OFFSET)
}

impl Header {
    /// Reads the first cluster: as many bytes as [`prefix_len`] asked for (missing ones as zeroes).
    ///
    /// # Errors
    /// The first thing that is wrong, see [`FormatError`].
    pub fn parse(head: &[u8], purpose: Purpose) -> Result<Header, FormatError> {
        let cluster = prefix_len(head)?;
        let b = Bytes { bytes: head, structure: "header" };
        b.slice(0, cluster)?;
        let b = Bytes { bytes: &head[..cluster], structure: "header" };
        let version = b.u32(4)?;
        let cluster_bits = cluster_bits(&b)?;
        let v3 = version >= 3;

        let header_length = if v3 { b.u32(100)? } else { V2_LEN };
        if v3 {
            let bad = |rule| b.field("header_length", "100-103", header_length.into(), rule);
            if header_length < V3_MIN_LEN {
                return Err(bad("must be at least 104"));
            }
            if header_length % 8 != 0 {
                return Err(bad("must be a multiple of 8"));
            }
            if header_length as usize > cluster {
                return Err(bad("must not exceed the first cluster"));
            }
        }
        let header_len = header_length as usize;
        let backing_file = Self::backing_name(&b, cluster, header_len)?;
        let extensions_end = match backing_file {
            Some(_) => usize::try_from(b.u64(8)?).unwrap_or(cluster).min(cluster),
            None => cluster,
        };
        let incompatible = if v3 { b.u64(72)? } else { 0 };
        let autoclear = Autoclear::from_bits_retain(if v3 { b.u64(88)? } else { 0 });
        let extensions = read_extensions(&b, header_len, extensions_end);
        let unknown_bits = incompatible & !Incompatible::all().bits();
        if unknown_bits != 0 {
            // The table may itself be unreadable: then the bits have no names.
            let table = extensions.map(|e| feature_table(&e)).unwrap_or_default();
            return Err(FormatError::UnknownFeatures { names: names(unknown_bits, &table) });
        }
        let incompatible = Incompatible::from_bits_retain(incompatible);

        let mut header = Header {
            version,
            backing_file,
            cluster_bits,
            size: b.u64(24)?,
            encryption: match b.u32(32)? {
                0 => Encryption::None,
                1 => Encryption::Aes,
                2 => Encryption::Luks,
                other => {
                    return Err(b.field(
                        "crypt_method",
                        "32-35",
                        other.into(),
                        "must be 0, 1 (AES) or 2 (LUKS)",
                    ));
                }
            },
            l1_size: b.u32(36)?,
            l1_table_offset: b.u64(40)?,
            refcount_table_offset: b.u64(48)?,
            refcount_table_clusters: b.u32(56)?,
            nb_snapshots: b.u32(60)?,
            snapshots_offset: b.u64(64)?,
            incompatible,
            compatible: Compatible::from_bits_retain(if v3 { b.u64(80)? } else { 0 }),
            autoclear,
            refcount_order: if v3 { b.u32(96)? } else { 4 },
            compression: Compression::Zlib,
            further: if header_length > V3_MIN_LEN {
                b.slice(105, header_len.saturating_sub(105))?.to_vec()
            } else {
                Vec::new()
            },
            backing_format: None,
            data_file: None,
            crypto: None,
            feature_names: Vec::new(),
            bitmaps: None,
            unknown: Vec::new(),
        };
        header.read_compression(&b, header_length)?;
        header.take_extensions(extensions?)?;
        header.validate(&b, purpose)?;
        Ok(header)
    }

    fn backing_name(
        b: &Bytes<'_>,
        cluster: usize,
        header_len: usize,
    ) -> Result<Option<Vec<u8>>, FormatError> {
        let offset = b.u64(8)?;
        if offset == 0 {
            return Ok(None);
        }
        let len = b.u32(16)?;
        if len > MAX_BACKING_NAME {
            return Err(b.field("backing_file_size", "16-19", len.into(), "must not exceed 1023"));
        }
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        if at < header_len {
            return Err(b.field("backing_file_offset", "8-15", offset, "must be behind the header"));
        }
        if at.checked_add(len as usize).is_none_or(|end| end > cluster) {
            let rule = "the backing file name must end within the first cluster";
            return Err(b.field("backing_file_offset", "8-15", offset, rule));
        }
        // QEMU treats an empty name as no backing file.
        Ok(if len == 0 { None } else { Some(b.slice(at, len as usize)?.to_vec()) })
    }

    fn read_compression(&mut self, b: &Bytes<'_>, header_length: u32) -> Result<(), FormatError> {
        let value = if header_length > V3_MIN_LEN { b.u8(104)? } else { 0 };
        let bad = |rule| b.field("compression_type", "104", value.into(), rule);
        let flagged = self.incompatible.contains(Incompatible::COMPRESSION_TYPE);
        self.compression = match (value, flagged) {
            (0, false) => Compression::Zlib,
            (1, true) => Compression::Zstd,
            (0, true) => return Err(bad("must not be 0 when the compression type bit is set")),
            (_, false) => return Err(bad("must be 0 when the compression type bit is not set")),
            (_, true) => return Err(bad("only 0 (deflate) and 1 (zstd) are defined")),
        };
        Ok(())
    }

    fn take_extensions(&mut self, extensions: Vec<RawExtension>) -> Result<(), FormatError> {
        let mut seen = Vec::new();
        for e in extensions {
            let fail = |name, problem| {
                Err(FormatError::Extension { magic: e.magic, name, offset: e.offset, problem })
            };
            let known = [EXT_BACKING_FORMAT, EXT_FEATURE_NAMES, EXT_BITMAPS, EXT_CRYPTO, EXT_DATA_FILE];
            if known.contains(&e.magic) {
                if seen.contains(&e.magic) {
                    return fail("duplicate", "each type may appear only once".into());
                }
                seen.push(e.magic);
            }
            match e.magic {
                EXT_BACKING_FORMAT => {
                    if e.data.len() > MAX_BACKING_FORMAT {
                        return fail("backing format", format!("{} bytes, at most 15 allowed", e.data.len()));
                    }
                    self.backing_format = Some(e.data);
                }
                EXT_DATA_FILE => {
                    if e.data.len() > MAX_BACKING_NAME as usize {
                        let problem = format!("{} bytes, at most {MAX_BACKING_NAME} allowed", e.data.len());
                        return fail("data file name", problem);
                    }
                    self.data_file = Some(e.data);
                }
                EXT_FEATURE_NAMES => self.feature_names = parse_feature_names(&e.data),
                EXT_CRYPTO => {
                    let b = Bytes { bytes: &e.data, structure: "encryption header pointer" };
                    self.crypto = Some(CryptoExtension { offset: b.u64(0)?, len: b.u64(8)? });
                }
                EXT_BITMAPS if self.autoclear.contains(Autoclear::BITMAPS) => {
                    let b = Bytes { bytes: &e.data, structure: "bitmaps extension" };
                    if e.data.len() != 24 {
                        return fail("bitmaps", format!("{} bytes, must be 24", e.data.len()));
                    }
                    let ext = BitmapsExtension {
                        nb_bitmaps: b.u32(0)?,
                        directory_size: b.u64(8)?,
                        directory_offset: b.u64(16)?,
                    };
                    let reserved = b.u32(4)?;
                    if reserved != 0 {
                        return Err(b.field("reserved", "4-7", reserved.into(), "must be zero"));
                    }
                    self.check_bitmaps(&b, ext)?;
                    self.bitmaps = Some(ext);
                }
                _ => self.unknown.push((e.magic, e.data)),
            }
        }
        Ok(())
    }

    fn check_bitmaps(&self, b: &Bytes<'_>, ext: BitmapsExtension) -> Result<(), FormatError> {
        if !(1..=MAX_BITMAPS).contains(&ext.nb_bitmaps) {
            return Err(b.field("nb_bitmaps", "0-3", ext.nb_bitmaps.into(), "must be 1 to 65535"));
        }
        // 24 bytes of fields and a name of at least one, padded.
        let least = u64::from(ext.nb_bitmaps).saturating_mul(32);
        if ext.directory_size < least || ext.directory_size > MAX_BITMAP_DIRECTORY {
            let rule = "must be 32 bytes per bitmap or more, and below 64 MiB";
            return Err(b.field("bitmap_directory_size", "8-15", ext.directory_size, rule));
        }
        let offset = ext.directory_offset;
        if !self.is_table(offset, ext.directory_size) {
            let rule = "must be a cluster boundary behind the header";
            return Err(b.field("bitmap_directory_offset", "16-23", offset, rule));
        }
        Ok(())
    }

    /// Whether `len` bytes at `offset` can be a table: aligned, not in the header, below the largest offset.
    fn is_table(&self, offset: u64, len: u64) -> bool {
        let cluster = 1u64 << self.cluster_bits;
        offset.is_multiple_of(cluster) && offset >= cluster && reachable(offset, len)
    }

    fn validate(&self, b: &Bytes<'_>, purpose: Purpose) -> Result<(), FormatError> {
        let table_rule = "must be a cluster boundary behind the header";
        if purpose != Purpose::Inspect {
            self.require_plain()?;
        }
        if self.refcount_order > 6 {
            let order = self.refcount_order.into();
            return Err(b.field("refcount_order", "96-99", order, "must not exceed 6 (64-bit refcounts)"));
        }
        if self.extended_l2() && self.cluster_bits < MIN_EXTENDED_CLUSTER_BITS {
            let rule = "must be at least 14 with extended L2 entries";
            return Err(b.field("cluster_bits", "20-23", self.cluster_bits.into(), rule));
        }
        if self.size > MAX_OFFSET {
            return Err(b.field("size", "24-31", self.size, "must be below 2^63"));
        }
        let l1_bytes = u64::from(self.l1_size).saturating_mul(8);
        if l1_bytes > MAX_L1_BYTES {
            let rule = "the active L1 table must not exceed 32 MiB";
            return Err(b.field("l1_size", "36-39", self.l1_size.into(), rule));
        }
        if u64::from(self.l1_size) < self.geometry().l1_entries_for(self.size) {
            let rule = "the active L1 table is too small for the virtual size";
            return Err(b.field("l1_size", "36-39", self.l1_size.into(), rule));
        }
        if self.l1_size > 0 && !self.is_table(self.l1_table_offset, l1_bytes) {
            return Err(b.field("l1_table_offset", "40-47", self.l1_table_offset, table_rule));
        }
        let reftable = u64::from(self.refcount_table_clusters) << self.cluster_bits;
        if reftable > MAX_REFTABLE_BYTES {
            let rule = "the refcount table must not exceed 8 MiB";
            return Err(b.field(
                "refcount_table_clusters",
                "56-59",
                self.refcount_table_clusters.into(),
                rule,
            ));
        }
        if purpose == Purpose::Use && reftable == 0 {
            let rule = "there must be a refcount table; repair the image";
            return Err(b.field("refcount_table_clusters", "56-59", 0, rule));
        }
        if reftable > 0 && !self.is_table(self.refcount_table_offset, reftable) {
            return Err(b.field("refcount_table_offset", "48-55", self.refcount_table_offset, table_rule));
        }
        if self.nb_snapshots > MAX_SNAPSHOTS {
            return Err(b.field("nb_snapshots", "60-63", self.nb_snapshots.into(), "must not exceed 65536"));
        }
        // An entry has at least 40 bytes.
        let snapshots = u64::from(self.nb_snapshots).saturating_mul(40);
        if self.nb_snapshots > 0 && !self.is_table(self.snapshots_offset, snapshots) {
            return Err(b.field("snapshots_offset", "64-71", self.snapshots_offset, table_rule));
        }
        self.validate_features(b)
    }

    fn validate_features(&self, b: &Bytes<'_>) -> Result<(), FormatError> {
        let data_file = self.incompatible.contains(Incompatible::DATA_FILE);
        let autoclear = self.autoclear.bits();
        if self.raw_data() && !data_file {
            let rule = "the raw external data bit needs the external data file bit";
            return Err(b.field("autoclear_features", "88-95", autoclear, rule));
        }
        if self.raw_data() && self.backing_file.is_some() {
            let rule = "a raw external data file cannot have a backing file";
            return Err(b.field("autoclear_features", "88-95", autoclear, rule));
        }
        if self.autoclear.contains(Autoclear::BITMAPS) && self.bitmaps.is_none() {
            let rule = "the bitmaps bit is set, but there is no bitmaps extension";
            return Err(b.field("autoclear_features", "88-95", autoclear, rule));
        }
        if data_file && self.nb_snapshots > 0 {
            let rule = "internal snapshots cannot be with an external data file";
            return Err(b.field("nb_snapshots", "60-63", self.nb_snapshots.into(), rule));
        }
        Ok(())
    }

    /// Refuses encrypted images.
    ///
    /// # Errors
    /// `Unsupported`, naming the method.
    pub fn require_plain(&self) -> Result<(), FormatError> {
        let what = match self.encryption {
            Encryption::None => return Ok(()),
            Encryption::Aes => "encryption (crypt_method 1, AES)",
            Encryption::Luks => "encryption (crypt_method 2, LUKS)",
        };
        let hint = "convert the image to an unencrypted one (qemu-img convert), or serve it with qemu-nbd";
        Err(FormatError::Unsupported { what, hint })
    }

    /// Whether L2 entries have 16 bytes.
    #[must_use]
    pub fn extended_l2(&self) -> bool {
        self.incompatible.contains(Incompatible::EXTENDED_L2)
    }

    /// Whether guest clusters are in an external data file.
    #[must_use]
    pub fn has_data_file(&self) -> bool {
        self.incompatible.contains(Incompatible::DATA_FILE)
    }

    /// Whether the data file must stay a raw image.
    #[must_use]
    pub fn raw_data(&self) -> bool {
        self.autoclear.contains(Autoclear::RAW_DATA)
    }

    /// Whether refcounts may be wrong.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.incompatible.contains(Incompatible::DIRTY)
    }

    /// Whether any structure may be wrong.
    #[must_use]
    pub fn is_corrupt(&self) -> bool {
        self.incompatible.contains(Incompatible::CORRUPT)
    }

    /// The autoclear features that stay when we change the image, keeping up its bitmaps or not; `None` when all of those
    /// that are set do.
    #[must_use]
    pub fn autoclear_to_keep(&self, bitmaps: bool) -> Option<Autoclear> {
        let kept = if bitmaps { Autoclear::KNOWN } else { Autoclear::RAW_DATA };
        (self.version >= 3 && !kept.contains(self.autoclear)).then(|| self.autoclear & kept)
    }

    /// How the tables are laid out.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        Geometry {
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            extended_l2: self.extended_l2(),
            data_file: self.has_data_file(),
            v2: self.version < 3,
        }
    }

    /// header_length, bytes 100-103.
    #[must_use]
    pub fn header_length(&self) -> u32 {
        if self.version < 3 {
            return V2_LEN;
        }
        if self.further.is_empty() && self.compression == Compression::Zlib {
            return V3_MIN_LEN;
        }
        105usize.saturating_add(self.further.len()).next_multiple_of(8) as u32
    }

    /// The header, its extensions and the backing file name, as they stand at the file's start. At most a cluster; what
    /// follows in the first cluster is to be zeroes.
    ///
    /// # Errors
    /// `NoRoom` when it is longer than a cluster.
    pub fn to_bytes(&self) -> Result<Vec<u8>, FormatError> {
        let mut out = Vec::with_capacity(512);
        out.extend(MAGIC.to_be_bytes());
        out.extend(self.version.to_be_bytes());
        out.extend([0; 12]); // backing_file_offset, backing_file_size: filled in below.
        out.extend(self.cluster_bits.to_be_bytes());
        out.extend(self.size.to_be_bytes());
        out.extend((self.encryption as u32).to_be_bytes());
        out.extend(self.l1_size.to_be_bytes());
        out.extend(self.l1_table_offset.to_be_bytes());
        out.extend(self.refcount_table_offset.to_be_bytes());
        out.extend(self.refcount_table_clusters.to_be_bytes());
        out.extend(self.nb_snapshots.to_be_bytes());
        out.extend(self.snapshots_offset.to_be_bytes());
        debug_assert_eq!(out.len(), V2_LEN as usize);
        if self.version >= 3 {
            let length = self.header_length();
            out.extend(self.incompatible.bits().to_be_bytes());
            out.extend(self.compatible.bits().to_be_bytes());
            out.extend(self.autoclear.bits().to_be_bytes());
            out.extend(self.refcount_order.to_be_bytes());
            out.extend(length.to_be_bytes());
            debug_assert_eq!(out.len(), V3_MIN_LEN as usize);
            if length > V3_MIN_LEN {
                out.push(self.compression as u8);
                out.extend(&self.further);
                out.resize(length as usize, 0);
            }
        }
        self.put_extensions(&mut out);
        if let Some(name) = &self.backing_file {
            let offset = out.len() as u64;
            out[8..16].copy_from_slice(&offset.to_be_bytes());
            out[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
            out.extend(name);
        }
        let room = 1u64 << self.cluster_bits;
        if out.len() as u64 > room {
            let what = "the header with its extensions and the backing file name";
            return Err(FormatError::NoRoom { what, need: out.len() as u64, room });
        }
        Ok(out)
    }

    /// In the order in which QEMU writes them.
    fn put_extensions(&self, out: &mut Vec<u8>) {
        if let Some(format) = &self.backing_format {
            put_extension(out, EXT_BACKING_FORMAT, format);
        }
        if let Some(name) = &self.data_file {
            put_extension(out, EXT_DATA_FILE, name);
        }
        if let Some(c) = self.crypto {
            let data = [c.offset.to_be_bytes(), c.len.to_be_bytes()].concat();
            put_extension(out, EXT_CRYPTO, &data);
        }
        if !self.feature_names.is_empty() {
            let mut data = Vec::new();
            for f in &self.feature_names {
                let mut entry = [0u8; 48];
                entry[0] = f.kind;
                entry[1] = f.bit;
                let n = f.name.len().min(46);
                entry[2..][..n].copy_from_slice(&f.name[..n]);
                data.extend(entry);
            }
            put_extension(out, EXT_FEATURE_NAMES, &data);
        }
        if let Some(b) = self.bitmaps {
            let mut data = Vec::with_capacity(24);
            data.extend(b.nb_bitmaps.to_be_bytes());
            data.extend([0; 4]);
            data.extend(b.directory_size.to_be_bytes());
            data.extend(b.directory_offset.to_be_bytes());
            put_extension(out, EXT_BITMAPS, &data);
        }
        for (magic, data) in &self.unknown {
            // An inconsistent bitmaps extension ends where a new one begins.
            if !(*magic == EXT_BITMAPS && self.bitmaps.is_some()) {
                put_extension(out, *magic, data);
            }
        }
        put_extension(out, EXT_END, &[]);
    }
}

/// Where, in an image's first cluster, the offset of the bitmap directory stands: 8 bytes of the bitmaps extension. `None`:
/// there is no such extension.
#[must_use]
pub fn bitmap_directory_pointer(cluster: &[u8]) -> Option<usize> {
    let word = |at: usize| cluster.get(at..)?.first_chunk::<4>().map(|b| u32::from_be_bytes(*b));
    // Version 2 has a header of 72 bytes.
    let mut at = if word(4)? == 2 { 72 } else { usize::try_from(word(100)?).ok()? };
    loop {
        let (magic, len) = (word(at)?, usize::try_from(word(at.checked_add(4)?)?).ok()?);
        match magic {
            EXT_END => return None,
            EXT_BITMAPS => return at.checked_add(24).filter(|_| len >= 24),
            _ => at = at.checked_add(8)?.checked_add(len.checked_next_multiple_of(8)?)?,
        }
    }
}

fn put_extension(out: &mut Vec<u8>, magic: u32, data: &[u8]) {
    out.extend(magic.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    out.resize(out.len().next_multiple_of(8), 0);
}

struct RawExtension {
    magic: u32,
    offset: usize,
    data: Vec<u8>,
}

/// The extensions between `from` and `end`. Their data together is at most a cluster.
fn read_extensions(b: &Bytes<'_>, from: usize, end: usize) -> Result<Vec<RawExtension>, FormatError> {
    let mut out = Vec::new();
    let mut at = from;
    // As QEMU: the list also ends where the area does.
    while at.saturating_add(8) <= end {
        let magic = b.u32(at)?;
        let len = b.u32(at.saturating_add(4))? as usize;
        if magic == EXT_END {
            break;
        }
        let data_at = at.saturating_add(8);
        if len > end.saturating_sub(data_at) {
            let problem = format!("{len} bytes do not fit before the header area ends at byte {end}");
            return Err(FormatError::Extension { magic, name: "any", offset: at, problem });
        }
        out.push(RawExtension { magic, offset: at, data: b.slice(data_at, len)?.to_vec() });
        at = data_at.saturating_add(len.next_multiple_of(8));
    }
    Ok(out)
}

/// An incomplete last entry is ignored: the table is only for messages.
fn parse_feature_names(data: &[u8]) -> Vec<FeatureName> {
    let entries = data.as_chunks::<48>().0.iter();
    let name = |e: &[u8; 48]| e[2..].split(|&c| c == 0).next().unwrap_or_default().to_vec();
    entries.map(|e| FeatureName { kind: e[0], bit: e[1], name: name(e) }).collect()
}

fn feature_table(extensions: &[RawExtension]) -> Vec<FeatureName> {
    let table = extensions.iter().find(|e| e.magic == EXT_FEATURE_NAMES);
    table.map(|e| parse_feature_names(&e.data)).unwrap_or_default()
}

/// The incompatible bits in `bits`, with the names that the image gives them.
fn names(bits: u64, table: &[FeatureName]) -> Vec<String> {
    let set = (0..64u8).filter(|&bit| bits.checked_shr(bit.into()).unwrap_or(0) & 1 != 0);
    let text = |bit| match table.iter().find(|f| f.kind == 0 && f.bit == bit) {
        // Escaped: the name comes from the file and goes to logs and terminals.
        Some(f) => format!("incompatible bit {bit} ({})", f.name.escape_ascii()),
        None => format!("incompatible bit {bit}"),
    };
    set.map(text).collect()
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, reason = "tests may overflow: they fail then")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A version 3 header as `qemu-img create -f qcow2 x 1G` lays it out, by hand.
    fn v3() -> Vec<u8> {
        let mut h = vec![0u8; 65536];
        h[..4].copy_from_slice(b"QFI\xfb");
        h[7] = 3;
        h[23] = 16;
        h[24..32].copy_from_slice(&(1u64 << 30).to_be_bytes());
        h[39] = 2;
        h[40..48].copy_from_slice(&0x30000u64.to_be_bytes());
        h[48..56].copy_from_slice(&0x10000u64.to_be_bytes());
        h[59] = 1;
        h[99] = 4;
        h[103] = 112;
        h
    }

    fn parse(h: &[u8]) -> Result<Header, FormatError> {
        Header::parse(h, Purpose::Use)
    }

    fn put(h: &mut [u8], at: usize, bytes: &[u8]) {
        h[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Puts extensions (and their end) behind a 112-byte header.
    fn extend(h: &mut [u8], extensions: &[(u32, &[u8])]) -> usize {
        let mut out = Vec::new();
        for (magic, data) in extensions {
            put_extension(&mut out, *magic, data);
        }
        put_extension(&mut out, EXT_END, &[]);
        put(h, 112, &out);
        112 + out.len()
    }

    #[test]
    fn a_plain_header_is_read_and_written_back() {
        let h = parse(&v3()).unwrap();
        assert_eq!((h.version, h.size, h.l1_size, h.l1_table_offset), (3, 1 << 30, 2, 0x30000));
        assert_eq!((h.refcount_table_offset, h.refcount_table_clusters, h.refcount_order), (0x10000, 1, 4));
        assert_eq!(h.header_length(), 112);
        assert_eq!(h.further, [0; 7]);
        let bytes = h.to_bytes().unwrap();
        assert_eq!(bytes.len(), 120);
        assert_eq!(bytes, v3()[..120]);
    }

    #[test]
    fn every_extension_is_read_and_written_back() {
        let mut h = v3();
        h[95] = 1;
        let names = [[&[0u8, 5][..], b"new thing", &[0; 37]].concat(), [&[2u8, 0][..], &[b'x'; 46]].concat()];
        let mut bitmaps = [0u8; 24];
        bitmaps[3] = 2;
        bitmaps[14] = 1;
        bitmaps[21] = 5;
        let end = extend(
            &mut h,
            &[
                (EXT_BACKING_FORMAT, b"qcow2"),
                (EXT_DATA_FILE, b"d.raw"),
                (EXT_FEATURE_NAMES, &names.concat()),
                (EXT_BITMAPS, &bitmaps),
                (0x1234_5678, b"keep me"),
                (0x1234_5678, b"me too"),
            ],
        );
        put(&mut h, 8, &(end as u64).to_be_bytes());
        put(&mut h, 16, &9u32.to_be_bytes());
        put(&mut h, end, b"base.qcow");
        let p = parse(&h).unwrap();
        assert_eq!(p.backing_file.as_deref(), Some(&b"base.qcow"[..]));
        assert_eq!(p.backing_format.as_deref(), Some(&b"qcow2"[..]));
        assert_eq!(p.data_file.as_deref(), Some(&b"d.raw"[..]));
        assert_eq!(p.feature_names[0].name, b"new thing");
        assert_eq!(p.feature_names[1].name.len(), 46);
        let want = BitmapsExtension { nb_bitmaps: 2, directory_size: 256, directory_offset: 0x50000 };
        assert_eq!(p.bitmaps, Some(want));
        assert_eq!(p.unknown.len(), 2);
        let out = p.to_bytes().unwrap();
        assert_eq!(out, h[..out.len()]);
        assert_eq!(out.len(), end + 9);

        // Without the autoclear bit the bitmaps are not believed, but their extension is kept.
        h[95] = 0;
        let p = parse(&h).unwrap();
        assert_eq!(p.bitmaps, None);
        assert!(p.unknown.iter().any(|u| u.0 == EXT_BITMAPS));
    }

    #[test]
    fn a_version_2_header_has_fixed_features() {
        let mut h = v3();
        h[7] = 2;
        put(&mut h, 72, &[0xff; 4]);
        put(&mut h, 76, &3u32.to_be_bytes());
        put(&mut h, 80, b"odd\0\0\0\0\0");
        put(&mut h, 88, &[0; 24]);
        let p = parse(&h).unwrap();
        assert_eq!((p.refcount_order, p.header_length()), (4, 72));
        assert_eq!(p.unknown, [(0xffff_ffff, b"odd".to_vec())]);
        let out = p.to_bytes().unwrap();
        assert_eq!(out, h[..out.len()]);
    }

    #[test]
    fn unknown_fields_are_kept() {
        let mut h = v3();
        h[103] = 128;
        put(&mut h, 112, b"sixteen bytes...");
        let p = parse(&h).unwrap();
        assert_eq!(p.header_length(), 128);
        assert_eq!(p.to_bytes().unwrap(), h[..136]);
        // And a header without room for compression_type stays so.
        h[103] = 104;
        put(&mut h, 104, &[0; 24]);
        let p = parse(&h).unwrap();
        assert_eq!(p.to_bytes().unwrap(), h[..112]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let check = |at: usize, bytes: &[u8], want: &str| {
            let mut h = v3();
            put(&mut h, at, bytes);
            let e = parse(&h).unwrap_err().to_string();
            assert!(e.contains(want), "{e:?} does not contain {want:?}");
        };
        check(0, b"QED\0", "not a qcow2 image");
        check(4, &1u32.to_be_bytes(), "version 1 is not supported");
        check(4, &4u32.to_be_bytes(), "version 4 is not supported");
        let one_name = |offset: u64, len: u32| [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat();
        check(8, &1u64.to_be_bytes(), "backing_file_offset (bytes 8-15) is 0x1");
        check(8, &one_name(65530, 20), "backing_file_offset (bytes 8-15) is 0xfffa");
        check(8, &one_name(200, 1024), "backing_file_size (bytes 16-19) is 0x400");
        check(20, &8u32.to_be_bytes(), "cluster_bits (bytes 20-23) is 0x8");
        check(20, &22u32.to_be_bytes(), "cluster_bits (bytes 20-23) is 0x16");
        check(24, &(1u64 << 31).to_be_bytes(), "l1_size (bytes 36-39) is 0x2");
        check(24, &u64::MAX.to_be_bytes(), "size (bytes 24-31) is 0xffffffffffffffff");
        check(32, &1u32.to_be_bytes(), "crypt_method 1, AES");
        check(32, &2u32.to_be_bytes(), "crypt_method 2, LUKS");
        check(32, &3u32.to_be_bytes(), "crypt_method (bytes 32-35) is 0x3");
        check(36, &1u32.to_be_bytes(), "l1_size (bytes 36-39) is 0x1");
        check(36, &0x40_0001u32.to_be_bytes(), "l1_size (bytes 36-39) is 0x400001");
        check(40, &0x30001u64.to_be_bytes(), "l1_table_offset (bytes 40-47) is 0x30001");
        check(40, &0u64.to_be_bytes(), "l1_table_offset (bytes 40-47) is 0x0");
        check(40, &0xffff_ffff_ffff_0000u64.to_be_bytes(), "l1_table_offset (bytes 40-47)");
        check(48, &0x10200u64.to_be_bytes(), "refcount_table_offset (bytes 48-55) is 0x10200");
        check(48, &0u64.to_be_bytes(), "refcount_table_offset (bytes 48-55) is 0x0");
        check(56, &0u32.to_be_bytes(), "refcount_table_clusters (bytes 56-59) is 0x0");
        check(56, &u32::MAX.to_be_bytes(), "refcount_table_clusters (bytes 56-59) is 0xffffffff");
        check(60, &65537u32.to_be_bytes(), "nb_snapshots (bytes 60-63) is 0x10001");
        check(60, &1u32.to_be_bytes(), "snapshots_offset (bytes 64-71) is 0x0");
        check(72, &(1u64 << 63 | 1 << 5).to_be_bytes(), "incompatible bit 5, incompatible bit 63");
        check(72, &8u64.to_be_bytes(), "compression_type (bytes 104) is 0x0");
        check(88, &1u64.to_be_bytes(), "autoclear_features (bytes 88-95) is 0x1");
        check(88, &2u64.to_be_bytes(), "autoclear_features (bytes 88-95) is 0x2");
        check(96, &7u32.to_be_bytes(), "refcount_order (bytes 96-99) is 0x7");
        check(100, &96u32.to_be_bytes(), "header_length (bytes 100-103) is 0x60");
        check(100, &108u32.to_be_bytes(), "header_length (bytes 100-103) is 0x6c");
        check(100, &0x10008u32.to_be_bytes(), "header_length (bytes 100-103) is 0x10008");
        check(104, &[1], "compression_type (bytes 104) is 0x1");
        // Extended L2 entries with small clusters, snapshots with a data file: two fields say it.
        let mut h = v3();
        put(&mut h, 20, &13u32.to_be_bytes());
        h[79] = 0x10;
        put(&mut h, 36, &1000u32.to_be_bytes());
        assert!(parse(&h).unwrap_err().to_string().contains("cluster_bits (bytes 20-23) is 0xd"));
        let mut h = v3();
        h[79] = 4;
        h[63] = 1;
        put(&mut h, 64, &0x50000u64.to_be_bytes());
        assert!(parse(&h).unwrap_err().to_string().contains("nb_snapshots (bytes 60-63) is 0x1"));
        let cut = prefix_len(&v3()[..22]).unwrap_err().to_string();
        assert!(cut.contains("header is cut off: needs 24 bytes, has 22"), "{cut}");
    }

    #[test]
    fn what_is_wrong_with_an_extension_is_named() {
        let mut bitmaps = [0u8; 24];
        bitmaps[3] = 1;
        bitmaps[15] = 32;
        bitmaps[21] = 5;
        let with = |at: usize, bytes: &[u8]| {
            let mut b = bitmaps;
            b[at..at + bytes.len()].copy_from_slice(bytes);
            b.to_vec()
        };
        let check = |extensions: &[(u32, &[u8])], want: &str| {
            let mut h = v3();
            h[95] = 1;
            extend(&mut h, extensions);
            let e = parse(&h).unwrap_err().to_string();
            assert!(e.contains(want), "{e:?} does not contain {want:?}");
        };
        let bad = |at: usize, bytes: &[u8], want: &str| check(&[(EXT_BITMAPS, &with(at, bytes))], want);
        bad(0, &[0; 4], "bitmaps extension: nb_bitmaps (bytes 0-3) is 0x0");
        bad(0, &[0xff; 4], "bitmaps extension: nb_bitmaps (bytes 0-3) is 0xffffffff");
        bad(4, &[1], "bitmaps extension: reserved (bytes 4-7) is 0x1000000");
        bad(8, &[0; 8], "bitmaps extension: bitmap_directory_size (bytes 8-15) is 0x0");
        bad(8, &[1; 8], "bitmaps extension: bitmap_directory_size (bytes 8-15)");
        bad(16, &[0; 8], "bitmaps extension: bitmap_directory_offset (bytes 16-23) is 0x0");
        bad(23, &[1], "bitmaps extension: bitmap_directory_offset (bytes 16-23) is 0x50001");
        check(&[(EXT_BITMAPS, &bitmaps[..20])], "0x23852875 (bitmaps) at byte 112: 20 bytes, must be 24");
        check(
            &[(EXT_BITMAPS, &[&bitmaps[..], &[0; 8]].concat())],
            "header extension 0x23852875 (bitmaps) at byte 112",
        );
        check(&[(EXT_CRYPTO, &[0; 12])], "encryption header pointer is cut off: needs 16 bytes, has 12");
        check(&[(77, b"x"), (EXT_BACKING_FORMAT, &[b'x'; 16])], "0xe2792aca (backing format) at byte 128");
        check(&[(EXT_DATA_FILE, &[b'x'; 1024])], "0x44415441 (data file name) at byte 112");
        check(&[(EXT_DATA_FILE, b"x"), (EXT_DATA_FILE, b"y")], "0x44415441 (duplicate) at byte 128");
    }

    #[test]
    fn unknown_features_get_the_images_own_names() {
        let mut h = v3();
        h[79] = 0x20;
        let entry = [&[0u8, 5][..], b"future\x1b[2J", &[0; 36]].concat();
        extend(&mut h, &[(EXT_FEATURE_NAMES, &entry)]);
        let e = parse(&h).unwrap_err().to_string();
        assert!(e.contains(r"incompatible bit 5 (future\x1b[2J)"), "{e}");
    }

    #[test]
    fn extensions_that_do_not_fit_or_repeat_are_refused() {
        let mut h = v3();
        put(&mut h, 112, &EXT_BACKING_FORMAT.to_be_bytes());
        put(&mut h, 116, &u32::MAX.to_be_bytes());
        assert!(parse(&h).unwrap_err().to_string().contains("do not fit"));
        let mut h = v3();
        extend(&mut h, &[(EXT_BACKING_FORMAT, b"raw"), (EXT_BACKING_FORMAT, b"raw")]);
        assert!(parse(&h).unwrap_err().to_string().contains("only once"));
        let mut h = v3();
        extend(&mut h, &[(EXT_BACKING_FORMAT, b"a format with a long name")]);
        assert!(parse(&h).unwrap_err().to_string().contains("at most 15"));
        let mut h = v3();
        h[95] = 1;
        extend(&mut h, &[(EXT_BITMAPS, &[0; 24])]);
        assert!(parse(&h).unwrap_err().to_string().contains("nb_bitmaps"));
    }

    #[test]
    fn checking_allows_a_missing_refcount_table_and_inspecting_encryption() {
        let mut h = v3();
        h[59] = 0;
        assert!(Header::parse(&h, Purpose::Check).is_ok());
        h[35] = 2;
        assert!(Header::parse(&h, Purpose::Check).is_err());
        assert_eq!(Header::parse(&h, Purpose::Inspect).unwrap().encryption, Encryption::Luks);
    }

    #[test]
    fn a_header_that_outgrows_its_cluster_is_refused() {
        let mut h = parse(&v3()).unwrap();
        h.cluster_bits = 9;
        h.backing_file = Some(vec![b'x'; 500]);
        assert!(matches!(h.to_bytes(), Err(FormatError::NoRoom { .. })));
    }

    proptest! {
        #[test]
        fn damaged_headers_parse_or_fail_and_what_parses_is_stable(
            edits in proptest::collection::vec((0usize..256, any::<u8>()), 0..12), short in 0usize..70000
        ) {
            let mut h = v3();
            extend(&mut h, &[(EXT_BACKING_FORMAT, b"raw"), (EXT_FEATURE_NAMES, &[7; 96]), (77, b"abc")]);
            for (at, byte) in edits {
                h[at] = byte;
            }
            let cut = &h[..short.min(h.len())];
            let _ = prefix_len(cut);
            let _ = Header::parse(cut, Purpose::Inspect);
            if let Ok(p) = Header::parse(&h, Purpose::Inspect)
                && let Ok(mut out) = p.to_bytes()
            {
                out.resize(1 << p.cluster_bits, 0);
                prop_assert_eq!(Header::parse(&out, Purpose::Inspect), Ok(p));
            }
        }
    }
}
