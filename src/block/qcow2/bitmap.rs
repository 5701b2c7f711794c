//! The bitmap directory and bitmap tables. Pure.

#![deny(clippy::arithmetic_side_effects)]

use super::entry::{Geometry, OFFSET_MASK};
use super::error::Bytes;
use super::{FormatError, HostOffset};
use bitflags::bitflags;

/// Bytes of a directory entry's fixed part.
pub const FIXED_LEN: usize = 24;
/// Granularities that are supported, in bits (QEMU's).
pub const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// Longest name in bytes (QEMU's).
pub const MAX_NAME: u16 = 1023;
/// Most entries of a bitmap table (QEMU's: BME_MAX_TABLE_SIZE).
pub const MAX_TABLE_ENTRIES: u32 = 0x800_0000;
/// Largest bitmap in bytes (QEMU's: BME_MAX_PHYS_SIZE).
pub const MAX_BITMAP_BYTES: u64 = 0x2000_0000;
/// `type` of dirty tracking bitmaps.
pub const DIRTY_TRACKING: u8 = 1;

bitflags! {
    /// Flags of a directory entry, bytes 12-15.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct BitmapFlags: u32 {
        /// Not saved correctly: inconsistent.
        const IN_USE = 1;
        /// Records all writes.
        const AUTO = 1 << 1;
        /// May be used although its extra data is not understood.
        const EXTRA_DATA_COMPATIBLE = 1 << 2;
    }
}

/// One bitmap. Source: the document, "Bitmap directory".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapEntry {
    /// Bytes 0-7.
    pub table_offset: u64,
    /// Bytes 8-11: entries of the table.
    pub table_size: u32,
    /// Bytes 12-15.
    pub flags: BitmapFlags,
    /// Byte 16.
    pub kind: u8,
    /// Byte 17: a bit stands for `1 << granularity_bits` bytes.
    pub granularity_bits: u8,
    /// Extra data, kept as it is.
    pub extra: Vec<u8>,
    /// Name.
    pub name: Vec<u8>,
}

impl BitmapEntry {
    /// Reads one entry from the front of `bytes`; returns it with its length, padding included.
    ///
    /// # Errors
    /// `Truncated`, `Field`.
    pub fn parse(bytes: &[u8], index: u32, g: &Geometry) -> Result<(BitmapEntry, usize), FormatError> {
        let structure = format!("bitmap directory entry {index}");
        let b = Bytes { bytes, structure: &structure };
        let extra_len = b.u32(20)? as usize;
        let name_size = b.u16(18)?;
        let name_at = FIXED_LEN.saturating_add(extra_len);
        let len = name_at.saturating_add(name_size as usize).next_multiple_of(8);
        b.slice(0, len)?;
        if !(1..=MAX_NAME).contains(&name_size) {
            return Err(b.field("name_size", "18-19", name_size.into(), "must be 1 to 1023"));
        }
        let flags = b.u32(12)?;
        let Some(flags) = BitmapFlags::from_bits(flags) else {
            return Err(b.field("flags", "12-15", flags.into(), "reserved bits are set"));
        };
        let entry = BitmapEntry {
            table_offset: b.u64(0)?,
            table_size: b.u32(8)?,
            flags,
            kind: b.u8(16)?,
            granularity_bits: b.u8(17)?,
            extra: b.slice(FIXED_LEN, extra_len)?.to_vec(),
            name: b.slice(name_at, name_size as usize)?.to_vec(),
        };
        let size = entry.table_size;
        if !(1..=MAX_TABLE_ENTRIES).contains(&size)
            || u64::from(size).saturating_mul(g.cluster_size()) > MAX_BITMAP_BYTES
        {
            let rule = "must be at least 1, and the bitmap at most 512 MiB";
            return Err(b.field("bitmap_table_size", "8-11", size.into(), rule));
        }
        let offset = entry.table_offset;
        let end = offset.checked_add(u64::from(size).saturating_mul(8));
        if !g.aligned(offset) || offset < g.cluster_size() || end.is_none_or(|e| e > i64::MAX as u64) {
            let rule = "must be a cluster boundary behind the header";
            return Err(b.field("bitmap_table_offset", "0-7", offset, rule));
        }
        if entry.kind != DIRTY_TRACKING {
            return Err(b.field("type", "16", entry.kind.into(), "only 1 (dirty tracking) is defined"));
        }
        if !GRANULARITY_BITS.contains(&entry.granularity_bits) {
            let bits = entry.granularity_bits.into();
            return Err(b.field("granularity_bits", "17", bits, "must be 9 to 31"));
        }
        Ok((entry, len))
    }

    /// Appends the entry, padded.
    ///
    /// # Panics
    /// If name or extra data are longer than their length fields can say: they were parsed, or checked before.
    pub fn put(&self, out: &mut Vec<u8>) {
        out.extend(self.table_offset.to_be_bytes());
        out.extend(self.table_size.to_be_bytes());
        out.extend(self.flags.bits().to_be_bytes());
        out.extend([self.kind, self.granularity_bits]);
        out.extend(u16::try_from(self.name.len()).expect("the name was checked").to_be_bytes());
        out.extend(u32::try_from(self.extra.len()).expect("extra data was checked").to_be_bytes());
        out.extend(&self.extra);
        out.extend(&self.name);
        out.resize(out.len().next_multiple_of(8), 0);
    }

    /// Bits that a disk of `size` bytes needs.
    #[must_use]
    pub fn bits_for(&self, size: u64) -> u64 {
        size.div_ceil(1u64 << self.granularity_bits.min(63))
    }

    /// Entries that the table of a disk of `size` bytes must have.
    #[must_use]
    pub fn table_entries_for(&self, size: u64, g: &Geometry) -> u64 {
        g.clusters_for(self.bits_for(size).div_ceil(8))
    }
}

/// Reads a whole directory of `count` entries, which must end where `bytes` does.
///
/// # Errors
/// `Truncated`, `Field`; also when bytes are left over, or a name appears twice.
pub fn parse_directory(bytes: &[u8], count: u32, g: &Geometry) -> Result<Vec<BitmapEntry>, FormatError> {
    let mut out: Vec<BitmapEntry> = Vec::new();
    let mut names = std::collections::HashSet::new();
    let mut rest = bytes;
    for index in 0..count {
        let (entry, len) = BitmapEntry::parse(rest, index, g)?;
        if !names.insert(entry.name.clone()) {
            return Err(FormatError::Field {
                structure: format!("bitmap directory entry {index}"),
                field: "name_size",
                bytes: "18-19",
                value: entry.name.len() as u64,
                rule: "another bitmap has the same name",
            });
        }
        out.push(entry);
        rest = rest.get(len..).unwrap_or_default();
    }
    if !rest.is_empty() {
        return Err(FormatError::Field {
            structure: "bitmaps extension".into(),
            field: "bitmap_directory_size",
            bytes: "8-15",
            value: bytes.len() as u64,
            rule: "the directory's entries end before it does",
        });
    }
    Ok(out)
}

/// What an entry of a bitmap table says about one cluster of the bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TableEntry {
    /// All zeroes; no cluster.
    Zeroes,
    /// All ones; no cluster.
    Ones,
    /// In a cluster.
    Cluster(HostOffset),
}

impl TableEntry {
    /// Decodes an entry. Source: the document, "Bitmap table".
    ///
    /// # Errors
    /// `Entry` for reserved bits and unaligned offsets.
    pub fn parse(raw: u64, g: &Geometry) -> Result<TableEntry, FormatError> {
        let bad = |rule| FormatError::Entry { table: "bitmap table", raw, rule };
        let offset = raw & OFFSET_MASK;
        match (offset, raw & !OFFSET_MASK) {
            (0, 0) => Ok(TableEntry::Zeroes),
            (0, 1) => Ok(TableEntry::Ones),
            (_, 0) if g.aligned(offset) => Ok(TableEntry::Cluster(HostOffset(offset))),
            (_, 0) => Err(bad("the cluster's offset is not aligned")),
            _ => Err(bad("reserved bits are set")),
        }
    }

    /// The entry's 64 bits.
    #[must_use]
    pub fn raw(self) -> u64 {
        match self {
            TableEntry::Zeroes => 0,
            TableEntry::Ones => 1,
            TableEntry::Cluster(host) => host.0,
        }
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, reason = "tests may overflow: they fail then")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const G: Geometry =
        Geometry { cluster_bits: 16, refcount_order: 4, extended_l2: false, data_file: false, v2: false };

    fn sample(name: &str) -> BitmapEntry {
        BitmapEntry {
            table_offset: 0x70000,
            table_size: 2,
            flags: BitmapFlags::AUTO,
            kind: 1,
            granularity_bits: 16,
            extra: vec![],
            name: name.into(),
        }
    }

    #[test]
    fn a_directory_is_where_the_document_says() {
        let mut bytes = Vec::new();
        sample("b0").put(&mut bytes);
        assert_eq!(bytes.len(), 32);
        assert_eq!(bytes[8..24], [0, 0, 0, 2, 0, 0, 0, 2, 1, 16, 0, 2, 0, 0, 0, 0]);
        assert_eq!(&bytes[24..28], b"b0\0\0");
        let second = BitmapEntry { extra: vec![1, 2, 3], ..sample("a longer name") };
        second.put(&mut bytes);
        assert_eq!(parse_directory(&bytes, 2, &G), Ok(vec![sample("b0"), second]));
        assert!(parse_directory(&bytes, 1, &G).unwrap_err().to_string().contains("end before it does"));
        assert!(parse_directory(&bytes, 3, &G).unwrap_err().to_string().contains("cut off"));
    }

    #[test]
    fn bad_entries_are_named() {
        let check = |at: usize, bytes: &[u8], want: &str| {
            let mut b = Vec::new();
            sample("b0").put(&mut b);
            b[at..at + bytes.len()].copy_from_slice(bytes);
            let e = parse_directory(&b, 1, &G).unwrap_err().to_string();
            assert!(e.contains("bitmap directory entry 0") && e.contains(want), "{e}");
        };
        check(0, &0x70001u64.to_be_bytes(), "bitmap_table_offset (bytes 0-7) is 0x70001");
        check(0, &0u64.to_be_bytes(), "bitmap_table_offset (bytes 0-7) is 0x0");
        check(8, &0u32.to_be_bytes(), "bitmap_table_size (bytes 8-11) is 0x0");
        check(8, &0x2001u32.to_be_bytes(), "bitmap_table_size (bytes 8-11) is 0x2001");
        check(12, &8u32.to_be_bytes(), "flags (bytes 12-15) is 0x8");
        check(16, &[2], "type (bytes 16) is 0x2");
        check(17, &[8], "granularity_bits (bytes 17) is 0x8");
        check(17, &[32], "granularity_bits (bytes 17) is 0x20");
        check(18, &[0, 0], "name_size (bytes 18-19) is 0x0");
        check(20, &u32::MAX.to_be_bytes(), "cut off");
        let mut twice = Vec::new();
        sample("x").put(&mut twice);
        sample("x").put(&mut twice);
        assert!(parse_directory(&twice, 2, &G).unwrap_err().to_string().contains("same name"));
    }

    #[test]
    fn sizes_of_a_bitmap() {
        let b = sample("x");
        assert_eq!(b.bits_for(65536 * 3 + 1), 4);
        assert_eq!(b.table_entries_for(65536 * 8 * 65536, &G), 1);
        assert_eq!(b.table_entries_for(65536 * 8 * 65536 + 1, &G), 2);
    }

    #[test]
    fn table_entries() {
        for (raw, want) in [
            (0, TableEntry::Zeroes),
            (1, TableEntry::Ones),
            (0x50000, TableEntry::Cluster(HostOffset(0x50000))),
        ] {
            assert_eq!(TableEntry::parse(raw, &G), Ok(want));
            assert_eq!(want.raw(), raw);
        }
        for raw in [2, 0x50001, 0x50200, 1 << 56] {
            assert!(TableEntry::parse(raw, &G).is_err(), "{raw:#x}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_parse_or_fail(bytes in proptest::collection::vec(any::<u8>(), 0..200), count in 0u32..5) {
            let _ = parse_directory(&bytes, count, &G);
        }
    }
}
