//! Entries of the tables that map guest clusters and count host clusters, and the image's geometry. Pure.
//!
//! ```text
//!   guest offset ── L1[ .. ] ── L2[ .. ] ── offset in cluster        host cluster ── refcount table[ .. ] ── block[ .. ]
//! ```
//! Entries are decoded strictly: reserved bits, alignment and impossible combinations are errors, because an entry
//! that breaks the rules was not written by a qcow2 driver, and what it points to is anybody's guess.

use super::{FormatError, GuestOffset, HostOffset};

/// Bit 63 of L1 and L2 entries: the refcount is exactly one.
pub const COPIED: u64 = 1 << 63;
/// Bit 62 of L2 entries: compressed cluster.
pub const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of standard cluster descriptors: reads as zeroes (version 3, without extended L2 entries).
pub const ZERO: u64 = 1;
/// Bits 9-55: the offset in L1 entries, standard L2 entries and bitmap table entries.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits 9-63: the offset in refcount table entries.
pub const REFTABLE_OFFSET_MASK: u64 = !0x1ff;
/// First offset that L1 and L2 entries cannot hold (64 PiB).
pub const MAX_HOST_OFFSET: u64 = 1 << 56;
/// Subclusters of a cluster with extended L2 entries.
pub const SUBCLUSTERS: u32 = 32;

/// The numbers of an image that say how its tables are laid out. Small and `Copy`: every request has it at hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Cluster size is `1 << cluster_bits`; 9 to 21.
    pub cluster_bits: u32,
    /// Refcount width in bits is `1 << refcount_order`; 0 to 6.
    pub refcount_order: u32,
    /// Extended L2 entries: 16 bytes, 32 subclusters.
    pub extended_l2: bool,
    /// Guest clusters live in an external data file, at their guest offset.
    pub data_file: bool,
    /// Version 2: no zero clusters.
    pub v2: bool,
}

impl Geometry {
    /// Bytes of a cluster.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of an L2 entry.
    #[must_use]
    pub fn l2_entry_size(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// log2 of the entries of an L2 table.
    #[must_use]
    pub fn l2_bits(&self) -> u32 {
        self.cluster_bits - if self.extended_l2 { 4 } else { 3 }
    }

    /// Entries of an L2 table.
    #[must_use]
    pub fn l2_entries(&self) -> u64 {
        1 << self.l2_bits()
    }

    /// log2 of the guest bytes that one L1 entry maps.
    #[must_use]
    pub fn l1_shift(&self) -> u32 {
        self.cluster_bits + self.l2_bits()
    }

    /// Index into the L1 table.
    #[must_use]
    pub fn l1_index(&self, guest: GuestOffset) -> u64 {
        guest.0 >> self.l1_shift()
    }

    /// Index into the L2 table.
    #[must_use]
    pub fn l2_index(&self, guest: GuestOffset) -> u64 {
        (guest.0 >> self.cluster_bits) & (self.l2_entries() - 1)
    }

    /// Offset within the cluster.
    #[must_use]
    pub fn in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// Whether `offset` is a multiple of the cluster size.
    #[must_use]
    pub fn aligned(&self, offset: u64) -> bool {
        self.in_cluster(offset) == 0
    }

    /// L1 entries that a disk of `size` bytes needs.
    #[must_use]
    pub fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(1 << self.l1_shift())
    }

    /// Clusters that `bytes` occupy.
    #[must_use]
    pub fn clusters_for(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// Bits of a refcount.
    #[must_use]
    pub fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// Largest refcount.
    #[must_use]
    pub fn refcount_max(&self) -> u64 {
        if self.refcount_order >= 6 { u64::MAX } else { (1 << self.refcount_bits()) - 1 }
    }

    /// log2 of the refcounts in a refcount block.
    #[must_use]
    pub fn refcount_block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// Refcounts in a refcount block.
    #[must_use]
    pub fn refcount_block_entries(&self) -> u64 {
        1 << self.refcount_block_bits()
    }

    /// Bytes of a subcluster (of a cluster without extended L2 entries).
    #[must_use]
    pub fn subcluster_size(&self) -> u64 {
        if self.extended_l2 { self.cluster_size() / u64::from(SUBCLUSTERS) } else { self.cluster_size() }
    }

    /// Position of the sector count in compressed descriptors; the offset is below it (the document's `x`).
    #[must_use]
    pub fn compressed_shift(&self) -> u32 {
        62 - (self.cluster_bits - 8)
    }

    /// First byte that a compressed descriptor cannot point to.
    #[must_use]
    pub fn compressed_limit(&self) -> u64 {
        1 << self.compressed_shift().min(56)
    }

    /// Makes a compressed descriptor for `len` bytes at `offset`; `None` when the fields cannot hold them.
    #[must_use]
    pub fn compressed_entry(&self, offset: HostOffset, len: u64) -> Option<u64> {
        let last = offset.0.checked_add(len.checked_sub(1)?)?;
        let more = (last / 512) - (offset.0 / 512);
        if offset.0 >= self.compressed_limit() || more >= 1 << (self.cluster_bits - 8) {
            return None;
        }
        Some(COMPRESSED | (more << self.compressed_shift()) | offset.0)
    }

    /// Decodes an L1 entry: the L2 table's offset and whether its refcount is one; `None`: no table.
    ///
    /// Source: the document, "L1 table entry".
    ///
    /// # Errors
    /// `Entry` for reserved bits, unaligned offsets, and COPIED without an offset.
    #[inline]
    pub fn l1_entry(&self, raw: u64) -> Result<Option<(HostOffset, bool)>, FormatError> {
        let bad = |rule| FormatError::Entry { table: "L1", raw, rule };
        if raw == 0 {
            return Ok(None);
        }
        if raw & !(OFFSET_MASK | COPIED) != 0 {
            return Err(bad("reserved bits are set"));
        }
        let offset = raw & OFFSET_MASK;
        if offset == 0 {
            return Err(bad("the L2 table is at offset 0, where the header is"));
        }
        if !self.aligned(offset) {
            return Err(bad("the L2 table's offset is not aligned to a cluster"));
        }
        Ok(Some((HostOffset(offset), raw & COPIED != 0)))
    }

    /// Decodes a (64-bit) L2 entry, or the first half of an extended one.
    ///
    /// Source: the document, "L2 table entry", "Standard Cluster Descriptor", "Compressed Clusters Descriptor".
    ///
    /// # Errors
    /// `Entry` for reserved bits, unaligned or impossible offsets, features that the image does not have.
    #[inline]
    pub fn l2_entry(&self, raw: u64) -> Result<L2Entry, FormatError> {
        let bad = |rule| FormatError::Entry { table: "L2", raw, rule };
        if raw == 0 {
            return Ok(L2Entry::Unallocated);
        }
        if raw & COMPRESSED != 0 {
            return self.compressed(raw);
        }
        let zero_bit = if self.extended_l2 { 0 } else { ZERO };
        if raw & !(OFFSET_MASK | COPIED | zero_bit) != 0 {
            return Err(bad("reserved bits are set"));
        }
        let offset = raw & OFFSET_MASK;
        let copied = raw & COPIED != 0;
        if !self.aligned(offset) {
            return Err(bad("the cluster's offset is not aligned"));
        }
        // Only in a data file may a cluster be at 0, and then bit 63 tells it from an unallocated one.
        if offset == 0 && copied && !self.data_file {
            return Err(bad("the cluster is at offset 0, where the header is"));
        }
        let host = (offset != 0 || copied).then_some(HostOffset(offset));
        if raw & zero_bit != 0 {
            if self.v2 {
                return Err(bad("zero clusters need version 3"));
            }
            return Ok(L2Entry::Zero { host, copied });
        }
        Ok(match host {
            Some(host) => L2Entry::Data { host, copied },
            None => L2Entry::Unallocated,
        })
    }

    #[cold]
    fn compressed(&self, raw: u64) -> Result<L2Entry, FormatError> {
        let bad = |rule| FormatError::Entry { table: "L2", raw, rule };
        if raw & COPIED != 0 {
            return Err(bad("compressed clusters must not have bit 63 set"));
        }
        if self.data_file {
            return Err(bad("compressed clusters cannot be in an external data file"));
        }
        let descriptor = raw & !COMPRESSED;
        let offset = descriptor & ((1 << self.compressed_shift()) - 1);
        if offset >= MAX_HOST_OFFSET {
            return Err(bad("the compressed cluster's offset is beyond 64 PiB"));
        }
        if offset < self.cluster_size() {
            return Err(bad("the compressed cluster is in the header's cluster"));
        }
        let sectors = (descriptor >> self.compressed_shift()) + 1;
        let len = (sectors * 512 - (offset & 511)) as u32;
        Ok(L2Entry::Compressed { offset: HostOffset(offset), len })
    }

    /// Decodes an extended L2 entry's bitmap, given what its first half says.
    ///
    /// Source: the document, "Subcluster Allocation Bitmap".
    ///
    /// # Errors
    /// `Entry` for subclusters that are allocated and zero, or allocated without a host cluster.
    #[inline]
    pub fn subclusters(&self, entry: L2Entry, bitmap: u64) -> Result<Subclusters, FormatError> {
        let bad = |rule| FormatError::Entry { table: "extended L2 bitmap", raw: bitmap, rule };
        let s = Subclusters { allocated: bitmap as u32, zero: (bitmap >> 32) as u32 };
        match entry {
            // Reserved there, and to be ignored: compressed clusters have no subclusters.
            L2Entry::Compressed { .. } => return Ok(Subclusters { allocated: 0, zero: 0 }),
            L2Entry::Unallocated if s.allocated != 0 => {
                return Err(bad("subclusters are allocated, but the cluster has no offset"));
            }
            _ => {}
        }
        if s.allocated & s.zero != 0 {
            return Err(bad("a subcluster is both allocated and zero"));
        }
        Ok(s)
    }

    /// Decodes a refcount table entry: the block's offset; `None`: all refcounts of the block are 0.
    ///
    /// Source: the document, "Refcount table entry".
    ///
    /// # Errors
    /// `Entry` for reserved bits and unaligned offsets.
    #[inline]
    pub fn reftable_entry(&self, raw: u64) -> Result<Option<HostOffset>, FormatError> {
        let bad = |rule| FormatError::Entry { table: "refcount table", raw, rule };
        if raw == 0 {
            return Ok(None);
        }
        if raw & !REFTABLE_OFFSET_MASK != 0 {
            return Err(bad("reserved bits are set"));
        }
        if !self.aligned(raw) {
            return Err(bad("the refcount block's offset is not aligned to a cluster"));
        }
        Ok(Some(HostOffset(raw)))
    }

    /// The refcount at `index` of a refcount block (or of any run of whole entries).
    ///
    /// Source: the document, "Refcount block entry": big-endian; below a byte, lower indices are in lower bits.
    ///
    /// # Panics
    /// If `index` is not inside of `block`.
    #[inline]
    #[must_use]
    pub fn refcount(&self, block: &[u8], index: usize) -> u64 {
        fn word<const N: usize>(block: &[u8], index: usize) -> [u8; N] {
            block[index * N..].first_chunk::<N>().copied().expect("the index is inside of the block")
        }
        match self.refcount_order {
            order @ 0..=2 => {
                let bits = 1usize << order;
                let per_byte = 8 / bits;
                u64::from(block[index / per_byte] >> (index % per_byte * bits)) & ((1 << bits) - 1)
            }
            3 => u64::from(block[index]),
            4 => u64::from(u16::from_be_bytes(word(block, index))),
            5 => u64::from(u32::from_be_bytes(word(block, index))),
            _ => u64::from_be_bytes(word(block, index)),
        }
    }

    /// Sets the refcount at `index` of a refcount block.
    ///
    /// # Panics
    /// If `index` is not inside of `block`, or `value` is above [`Geometry::refcount_max`].
    #[inline]
    pub fn set_refcount(&self, block: &mut [u8], index: usize, value: u64) {
        assert!(value <= self.refcount_max(), "the refcount was checked against its width");
        match self.refcount_order {
            order @ 0..=2 => {
                let bits = 1usize << order;
                let per_byte = 8 / bits;
                let shift = index % per_byte * bits;
                let mask = ((1u16 << bits) - 1) as u8;
                let byte = &mut block[index / per_byte];
                *byte = *byte & !(mask << shift) | (value as u8) << shift;
            }
            3 => block[index] = value as u8,
            4 => block[index * 2..][..2].copy_from_slice(&(value as u16).to_be_bytes()),
            5 => block[index * 4..][..4].copy_from_slice(&(value as u32).to_be_bytes()),
            _ => block[index * 8..][..8].copy_from_slice(&value.to_be_bytes()),
        }
    }
}

/// What an L2 entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum L2Entry {
    /// Read from the backing image.
    Unallocated,
    /// Reads as zeroes. `host`: a cluster that is preallocated behind it.
    Zero {
        /// The preallocated cluster.
        host: Option<HostOffset>,
        /// Its refcount is one.
        copied: bool,
    },
    /// A cluster, cluster-aligned. With extended L2 entries the bitmap says which parts.
    Data {
        /// Where; in the data file if there is one.
        host: HostOffset,
        /// Its refcount is one.
        copied: bool,
    },
    /// A compressed cluster.
    Compressed {
        /// First byte; not aligned.
        offset: HostOffset,
        /// Bytes up to the end of the last sector it may use, at most two clusters; the file may end before.
        len: u32,
    },
}

/// One run of subclusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subcluster {
    /// Read from the backing image.
    Unallocated,
    /// Reads as zeroes.
    Zero,
    /// In the host cluster.
    Allocated,
}

/// The bitmap of an extended L2 entry. Bit `x` is subcluster `x`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Subclusters {
    /// In the host cluster.
    pub allocated: u32,
    /// Reads as zeroes.
    pub zero: u32,
}

impl Subclusters {
    /// The entry's second half.
    #[must_use]
    pub fn raw(self) -> u64 {
        u64::from(self.zero) << 32 | u64::from(self.allocated)
    }

    /// What subcluster `index` is.
    #[inline]
    #[must_use]
    pub fn get(self, index: u32) -> Subcluster {
        debug_assert!(index < SUBCLUSTERS);
        if self.allocated >> index & 1 != 0 {
            Subcluster::Allocated
        } else if self.zero >> index & 1 != 0 {
            Subcluster::Zero
        } else {
            Subcluster::Unallocated
        }
    }

    /// What subcluster `index` is, and how many from there on are alike.
    #[inline]
    #[must_use]
    pub fn run(self, index: u32) -> (Subcluster, u32) {
        let what = self.get(index);
        let alike = match what {
            Subcluster::Allocated => self.allocated,
            Subcluster::Zero => self.zero,
            Subcluster::Unallocated => !(self.allocated | self.zero),
        };
        (what, (!(alike >> index)).trailing_zeros().min(SUBCLUSTERS - index))
    }

    /// Bits of subclusters `from..from + count`.
    #[must_use]
    pub fn mask(from: u32, count: u32) -> u32 {
        debug_assert!(from < SUBCLUSTERS);
        debug_assert!(count <= SUBCLUSTERS - from);
        if count == 0 { 0 } else { (u32::MAX >> (SUBCLUSTERS - count)) << from }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const G: Geometry =
        Geometry { cluster_bits: 16, refcount_order: 4, extended_l2: false, data_file: false, v2: false };

    #[test]
    fn geometry_of_a_default_image() {
        assert_eq!(G.cluster_size(), 65536);
        assert_eq!(G.l2_entries(), 8192);
        assert_eq!(G.l1_shift(), 29);
        assert_eq!(G.l1_entries_for(0), 0);
        assert_eq!(G.l1_entries_for(1), 1);
        assert_eq!(G.l1_entries_for((1 << 29) + 1), 2);
        assert_eq!(G.refcount_block_entries(), 32768);
        assert_eq!(G.compressed_shift(), 54);
        let x = Geometry { extended_l2: true, ..G };
        assert_eq!((x.l2_entries(), x.l1_shift(), x.subcluster_size()), (4096, 28, 2048));
        let small = Geometry { cluster_bits: 9, ..G };
        assert_eq!((small.compressed_shift(), small.compressed_limit()), (61, 1 << 56));
        let big = Geometry { cluster_bits: 21, ..G };
        assert_eq!((big.compressed_shift(), big.compressed_limit()), (49, 1 << 49));
    }

    #[test]
    fn l1_entries() {
        assert_eq!(G.l1_entry(0), Ok(None));
        assert_eq!(G.l1_entry(0x8000_0000_0004_0000), Ok(Some((HostOffset(0x40000), true))));
        assert_eq!(G.l1_entry(0x40000), Ok(Some((HostOffset(0x40000), false))));
        for bad in [COPIED, 1, 0x4_0001, 0x4_0200, 1 << 56, 1 << 62] {
            assert!(G.l1_entry(bad).is_err(), "{bad:#x}");
        }
    }

    #[test]
    fn l2_entries() {
        let host = Some(HostOffset(0x50000));
        assert_eq!(G.l2_entry(0), Ok(L2Entry::Unallocated));
        assert_eq!(G.l2_entry(1), Ok(L2Entry::Zero { host: None, copied: false }));
        assert_eq!(G.l2_entry(0x50001), Ok(L2Entry::Zero { host, copied: false }));
        assert_eq!(G.l2_entry(COPIED | 0x50001), Ok(L2Entry::Zero { host, copied: true }));
        assert_eq!(
            G.l2_entry(COPIED | 0x50000),
            Ok(L2Entry::Data { host: HostOffset(0x50000), copied: true })
        );
        for bad in
            [COPIED, COPIED | 1, 2, 0x5_0100, 0x5_0200, 1 << 56, 1 << 61, COPIED | COMPRESSED | 0x50000]
        {
            assert!(G.l2_entry(bad).is_err(), "{bad:#x}");
        }
        let v2 = Geometry { v2: true, ..G };
        assert!(v2.l2_entry(1).is_err());
        let ext = Geometry { extended_l2: true, ..G };
        assert!(ext.l2_entry(0x50001).is_err());
        let data = Geometry { data_file: true, ..G };
        assert_eq!(data.l2_entry(COPIED), Ok(L2Entry::Data { host: HostOffset(0), copied: true }));
        assert_eq!(data.l2_entry(COPIED | 1), Ok(L2Entry::Zero { host: Some(HostOffset(0)), copied: true }));
        assert!(data.l2_entry(COMPRESSED | 0x50000).is_err());
    }

    #[test]
    fn compressed_entries() {
        // 3 more sectors behind the one that holds the offset.
        let raw = COMPRESSED | 3 << 54 | 0x5_0123;
        let len = 4 * 512 - 0x123;
        assert_eq!(G.l2_entry(raw), Ok(L2Entry::Compressed { offset: HostOffset(0x50123), len }));
        assert_eq!(G.compressed_entry(HostOffset(0x50123), u64::from(len)), Some(raw));
        assert_eq!(G.compressed_entry(HostOffset(0x50123), u64::from(len) + 1), Some(raw + (1 << 54)));
        assert_eq!(G.compressed_entry(HostOffset(1 << 54), 1), None);
        assert_eq!(G.compressed_entry(HostOffset(0x50000), 0), None);
        assert_eq!(G.compressed_entry(HostOffset(0x50000), 65536 * 2 + 1), None);
        assert!(G.l2_entry(COMPRESSED | 0x100).is_err(), "inside of the header");
        let small = Geometry { cluster_bits: 9, ..G };
        assert!(small.l2_entry(COMPRESSED | 1 << 57).is_err(), "bits beyond 55 must be zero");
    }

    #[test]
    fn subcluster_bitmaps() {
        let g = Geometry { extended_l2: true, ..G };
        let data = L2Entry::Data { host: HostOffset(0x50000), copied: true };
        let s = g.subclusters(data, 0xffff_0000_0000_00ff).unwrap();
        assert_eq!(s.run(0), (Subcluster::Allocated, 8));
        assert_eq!(s.run(7), (Subcluster::Allocated, 1));
        assert_eq!(s.run(8), (Subcluster::Unallocated, 8));
        assert_eq!(s.run(16), (Subcluster::Zero, 16));
        assert_eq!(s.run(31), (Subcluster::Zero, 1));
        assert_eq!(s.raw(), 0xffff_0000_0000_00ff);
        assert!(g.subclusters(data, 0x1_0000_0001).is_err());
        assert!(g.subclusters(L2Entry::Unallocated, 1).is_err());
        assert!(g.subclusters(L2Entry::Unallocated, 1 << 32).is_ok());
        assert_eq!(g.subclusters(data, u64::from(u32::MAX)).unwrap().run(0), (Subcluster::Allocated, 32));
        assert_eq!(Subclusters::mask(0, 32), u32::MAX);
        assert_eq!(Subclusters::mask(31, 1), 1 << 31);
        assert_eq!(Subclusters::mask(4, 3), 0x70);
    }

    #[test]
    fn refcounts_are_where_the_document_says() {
        let block = [0b1110_0100, 0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde];
        for (order, index, want) in [
            (0, 2, 1),
            (0, 3, 0),
            (0, 9, 1),
            (1, 0, 0),
            (1, 1, 1),
            (1, 2, 2),
            (1, 3, 3),
            (2, 0, 4),
            (2, 1, 14),
            (2, 2, 2),
            (3, 2, 0x34),
            (4, 1, 0x3456),
            (5, 1, 0x789a_bcde),
            (6, 0, 0xe412_3456_789a_bcde),
        ] {
            let g = Geometry { refcount_order: order, ..G };
            assert_eq!(g.refcount(&block, index), want, "order {order} index {index}");
        }
    }

    #[test]
    fn refcount_table_entries() {
        assert_eq!(G.reftable_entry(0), Ok(None));
        assert_eq!(G.reftable_entry(0x20000), Ok(Some(HostOffset(0x20000))));
        assert!(G.reftable_entry(0x20001).is_err());
        assert!(G.reftable_entry(0x20200).is_err());
    }

    proptest! {
        #[test]
        fn a_set_refcount_is_read_back_and_alone(
            order in 0u32..=6, index in 0usize..64, value: u64, mut block in proptest::collection::vec(any::<u8>(), 512)
        ) {
            let g = Geometry { refcount_order: order, cluster_bits: 9, ..G };
            let value = value & g.refcount_max();
            let before: Vec<u64> = (0..64).map(|i| g.refcount(&block, i)).collect();
            g.set_refcount(&mut block, index, value);
            for (i, old) in before.into_iter().enumerate() {
                prop_assert_eq!(g.refcount(&block, i), if i == index { value } else { old });
            }
        }

        #[test]
        fn no_entry_panics(raw: u64, bitmap: u64, bits in 9u32..=21, ext: bool, data_file: bool, v2: bool) {
            let g = Geometry { cluster_bits: bits, refcount_order: 4, extended_l2: ext && bits >= 14, data_file, v2 };
            let _ = g.l1_entry(raw);
            let _ = g.reftable_entry(raw);
            match g.l2_entry(raw) {
                Ok(L2Entry::Compressed { offset, len }) => {
                    prop_assert!(u64::from(len) <= 2 * g.cluster_size());
                    prop_assert!(offset.0.checked_add(u64::from(len)).is_some());
                    prop_assert_eq!(g.compressed_entry(offset, u64::from(len)), Some(raw));
                }
                Ok(entry) => {
                    if let Ok(s) = g.subclusters(entry, bitmap) {
                        let mut at = 0;
                        while at < SUBCLUSTERS {
                            let (_, n) = s.run(at);
                            prop_assert!(n >= 1);
                            at += n;
                        }
                        prop_assert_eq!(at, SUBCLUSTERS);
                    }
                }
                Err(_) => {}
            }
        }
    }
}
