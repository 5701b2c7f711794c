//! The snapshot table. Pure.
//!
//! Entries have variable length; how long the table is, is known only after reading it: [`entry_len`] says from the
//! first [`FIXED_LEN`] bytes how many an entry has.

#![deny(clippy::arithmetic_side_effects)]

use super::FormatError;
use super::error::Bytes;
use super::header::MAX_L1_BYTES;

/// Bytes of an entry's fixed part.
pub const FIXED_LEN: usize = 40;
/// Most extra data in bytes (QEMU's).
pub const MAX_EXTRA: u32 = 1024;
/// Largest table in bytes (QEMU's).
pub const MAX_TABLE_BYTES: u64 = 64 << 20;

/// An internal snapshot. Source: the document, "Snapshot table entry".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Bytes 0-7.
    pub l1_table_offset: u64,
    /// Bytes 8-11: entries.
    pub l1_size: u32,
    /// Unique ID.
    pub id: Vec<u8>,
    /// Name.
    pub name: Vec<u8>,
    /// Bytes 16-19: seconds since the Epoch.
    pub date_sec: u32,
    /// Bytes 20-23: nanoseconds on top of it.
    pub date_nsec: u32,
    /// Bytes 24-31: how long the guest had run, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes 32-35, or 40-47 if they are there: bytes of VM state.
    pub vm_state_size: u64,
    /// Bytes 48-55, if they are there: virtual size in bytes.
    pub disk_size: Option<u64>,
    /// Extra data from byte 56 on (icount, and what is not known), kept as it is.
    pub further: Vec<u8>,
}

/// Bytes of the entry that begins with `fixed`, with its padding.
///
/// # Errors
/// `Truncated`; `Field` when extra data is longer than QEMU allows.
pub fn entry_len(fixed: &[u8], index: u32) -> Result<usize, FormatError> {
    let structure = format!("snapshot table entry {index}");
    let b = Bytes { bytes: fixed, structure: &structure };
    let extra = b.u32(36)?;
    if extra > MAX_EXTRA {
        return Err(b.field("extra data size", "36-39", extra.into(), "must not exceed 1024"));
    }
    let len = (FIXED_LEN as u32)
        .saturating_add(extra)
        .saturating_add(b.u16(12)?.into())
        .saturating_add(b.u16(14)?.into());
    Ok(len.next_multiple_of(8) as usize)
}

impl Snapshot {
    /// Reads the entry with number `index` from its [`entry_len`] bytes (the padding may be missing). `cluster_bits`
    /// is the image's.
    ///
    /// # Errors
    /// `Truncated`, `Field`.
    pub fn parse(bytes: &[u8], index: u32, cluster_bits: u32) -> Result<Snapshot, FormatError> {
        entry_len(bytes, index)?;
        let structure = format!("snapshot table entry {index}");
        let b = Bytes { bytes, structure: &structure };
        let extra_len = b.u32(36)? as usize;
        let extra = b.slice(FIXED_LEN, extra_len)?;
        let x = Bytes { bytes: extra, structure: &structure };
        let id_at = FIXED_LEN.saturating_add(extra_len);
        let id_len = b.u16(12)? as usize;
        let name_at = id_at.saturating_add(id_len);
        let snapshot = Snapshot {
            l1_table_offset: b.u64(0)?,
            l1_size: b.u32(8)?,
            id: b.slice(id_at, id_len)?.to_vec(),
            name: b.slice(name_at, b.u16(14)? as usize)?.to_vec(),
            date_sec: b.u32(16)?,
            date_nsec: b.u32(20)?,
            vm_clock_nsec: b.u64(24)?,
            vm_state_size: if extra_len >= 8 { x.u64(0)? } else { b.u32(32)?.into() },
            disk_size: if extra_len >= 16 { Some(x.u64(8)?) } else { None },
            further: extra.get(16..).unwrap_or_default().to_vec(),
        };
        let l1_bytes = u64::from(snapshot.l1_size).saturating_mul(8);
        if l1_bytes > MAX_L1_BYTES {
            let rule = "the snapshot's L1 table must not exceed 32 MiB";
            return Err(b.field("L1 table size", "8-11", snapshot.l1_size.into(), rule));
        }
        let offset = snapshot.l1_table_offset;
        let cluster = 1u64 << cluster_bits.min(63);
        let end = offset.checked_add(l1_bytes).filter(|&e| e <= i64::MAX as u64);
        if snapshot.l1_size > 0
            && (end.is_none() || offset & cluster.wrapping_sub(1) != 0 || offset < cluster)
        {
            let rule = "must be a cluster boundary behind the header";
            return Err(b.field("L1 table offset", "0-7", offset, rule));
        }
        Ok(snapshot)
    }

    /// The entry as it stands in the table, padded. Always with extra data up to byte 55, as version 3 asks;
    /// `disk_size` is used when the snapshot has none of its own.
    ///
    /// # Panics
    /// If id, name or extra data are longer than their length fields can say: they were parsed, or checked before.
    #[must_use]
    pub fn to_bytes(&self, disk_size: u64) -> Vec<u8> {
        let extra_len = self.further.len().saturating_add(16);
        assert!(extra_len <= MAX_EXTRA as usize, "extra data was checked");
        let mut out = Vec::with_capacity(128);
        out.extend(self.l1_table_offset.to_be_bytes());
        out.extend(self.l1_size.to_be_bytes());
        out.extend(u16::try_from(self.id.len()).expect("the id was checked").to_be_bytes());
        out.extend(u16::try_from(self.name.len()).expect("the name was checked").to_be_bytes());
        out.extend(self.date_sec.to_be_bytes());
        out.extend(self.date_nsec.to_be_bytes());
        out.extend(self.vm_clock_nsec.to_be_bytes());
        // The old field says what it can, as QEMU does.
        out.extend(u32::try_from(self.vm_state_size).unwrap_or(0).to_be_bytes());
        out.extend((extra_len as u32).to_be_bytes());
        out.extend(self.vm_state_size.to_be_bytes());
        out.extend(self.disk_size.unwrap_or(disk_size).to_be_bytes());
        out.extend(&self.further);
        out.extend(&self.id);
        out.extend(&self.name);
        out.resize(out.len().next_multiple_of(8), 0);
        out
    }
}

/// Which internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotSel {
    /// By its id.
    Id(String),
    /// By its name.
    Name(String),
    /// By its id, or else by its name, as `qemu-nbd -l` looks one up.
    IdOrName(String),
}

impl SnapshotSel {
    /// Index of the snapshot that is meant.
    #[must_use]
    pub fn find(&self, snapshots: &[Snapshot]) -> Option<usize> {
        let by_id = |s: &str| snapshots.iter().position(|e| e.id == s.as_bytes());
        let by_name = |s: &str| snapshots.iter().position(|e| e.name == s.as_bytes());
        match self {
            SnapshotSel::Id(s) => by_id(s),
            SnapshotSel::Name(s) => by_name(s),
            SnapshotSel::IdOrName(s) => by_id(s).or_else(|| by_name(s)),
        }
    }
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

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects, reason = "tests may overflow: they fail then")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Snapshot {
        Snapshot {
            l1_table_offset: 0x50000,
            l1_size: 3,
            id: b"1".to_vec(),
            name: b"before".to_vec(),
            date_sec: 7,
            date_nsec: 8,
            vm_clock_nsec: 9,
            vm_state_size: 0x1_0000_0001,
            disk_size: Some(1 << 30),
            further: vec![0xff; 8],
        }
    }

    #[test]
    fn an_entry_is_where_the_document_says() {
        let bytes = sample().to_bytes(0);
        assert_eq!(bytes.len(), 72);
        assert_eq!(bytes[..8], 0x50000u64.to_be_bytes());
        assert_eq!(bytes[8..16], [0, 0, 0, 3, 0, 1, 0, 6]);
        assert_eq!(bytes[32..40], [0, 0, 0, 0, 0, 0, 0, 24]);
        assert_eq!(bytes[40..48], 0x1_0000_0001u64.to_be_bytes());
        assert_eq!(bytes[48..56], (1u64 << 30).to_be_bytes());
        assert_eq!(&bytes[64..72], b"1before\0");
        assert_eq!(entry_len(&bytes, 0), Ok(72));
        assert_eq!(Snapshot::parse(&bytes, 0, 16), Ok(sample()));
        assert_eq!(Snapshot::parse(&bytes[..71], 0, 16), Ok(sample()), "the last padding may be missing");
    }

    #[test]
    fn old_entries_have_no_extra_data() {
        let mut bytes = vec![0u8; 48];
        bytes[5] = 5;
        bytes[11] = 1;
        bytes[13] = 1;
        bytes[15] = 2;
        bytes[35] = 77;
        bytes[40..43].copy_from_slice(b"1ab");
        let s = Snapshot::parse(&bytes, 0, 16).unwrap();
        assert_eq!((s.vm_state_size, s.disk_size), (77, None));
        assert_eq!((&s.id[..], &s.name[..]), (&b"1"[..], &b"ab"[..]));
        let s = Snapshot::parse(&s.to_bytes(4096), 0, 16).unwrap();
        assert_eq!((s.vm_state_size, s.disk_size), (77, Some(4096)));
    }

    #[test]
    fn bad_entries_are_named() {
        let check = |at: usize, bytes: &[u8], want: &str| {
            let mut b = sample().to_bytes(0);
            b[at..at + bytes.len()].copy_from_slice(bytes);
            let e = Snapshot::parse(&b, 4, 16).unwrap_err().to_string();
            assert!(e.contains("snapshot table entry 4") && e.contains(want), "{e}");
        };
        check(36, &1025u32.to_be_bytes(), "extra data size (bytes 36-39) is 0x401");
        check(12, &60000u16.to_be_bytes(), "cut off");
        check(14, &60000u16.to_be_bytes(), "cut off");
        check(8, &0x40_0001u32.to_be_bytes(), "L1 table size (bytes 8-11) is 0x400001");
        check(0, &0x50001u64.to_be_bytes(), "L1 table offset (bytes 0-7) is 0x50001");
        check(0, &0u64.to_be_bytes(), "L1 table offset (bytes 0-7) is 0x0");
        check(0, &0xffff_ffff_ffff_0000u64.to_be_bytes(), "L1 table offset (bytes 0-7)");
    }

    #[test]
    fn snapshots_are_found_by_id_before_name() {
        let a = Snapshot { id: b"1".to_vec(), name: b"2".to_vec(), ..sample() };
        let b = Snapshot { id: b"2".to_vec(), name: b"x".to_vec(), ..sample() };
        let all = [a, b];
        assert_eq!(SnapshotSel::IdOrName("2".into()).find(&all), Some(1));
        assert_eq!(SnapshotSel::IdOrName("x".into()).find(&all), Some(1));
        assert_eq!(SnapshotSel::IdOrName("y".into()).find(&all), None);
        assert_eq!(SnapshotSel::Name("2".into()).find(&all), Some(0));
        assert_eq!(SnapshotSel::Id("x".into()).find(&all), None);
    }

    proptest! {
        #[test]
        fn any_bytes_parse_or_fail(bytes in proptest::collection::vec(any::<u8>(), 0..200), small: bool) {
            let mut bytes = bytes;
            if small && bytes.len() > 40 {
                bytes[36..39].fill(0);
                bytes[12] = 0;
                bytes[14] = 0;
                bytes[8..11].fill(0);
            }
            let _ = Snapshot::parse(&bytes, 0, 9);
        }
    }
}
