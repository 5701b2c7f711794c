//! New images.
//!
//! ```text
//!   header │ refcount table │ refcount blocks │ L1 table │ (L2 tables │ data, when preallocated)
//! ```
//! The header is written last: until then the file is no image.

use super::FormatError;
use super::entry::{COPIED, Geometry};
use super::header::{
    self, Autoclear, Compatible, Compression, Encryption, Header, Incompatible, MAX_BACKING_NAME,
    MAX_L1_BYTES, MAX_REFTABLE_BYTES,
};
use crate::block::{BlockNode, Error, WriteFlags};
use std::io::IoSlice;

/// What is allocated from the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// The tables; the file is sparse.
    Metadata,
    /// Tables, and space for the data, which is not written.
    Falloc,
    /// Tables, and zeroes in all of the data.
    Full,
}

/// What is to be made.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// Virtual size in bytes; rounded up to 512 as by QEMU.
    pub size: u64,
    /// Cluster size in bytes.
    pub cluster_size: u64,
    /// Refcount width in bits.
    pub refcount_bits: u32,
    /// Version 2 (compat 0.10) instead of 3.
    pub v2: bool,
    /// Extended L2 entries.
    pub extended_l2: bool,
    /// Allow refcounts to be updated late.
    pub lazy_refcounts: bool,
    /// How compressed clusters are to be compressed.
    pub compression: Compression,
    /// Backing file name and format, as they are to stand in the image.
    pub backing: Option<(Vec<u8>, Vec<u8>)>,
    /// Name of the external data file, as it is to stand in the image.
    pub data_file: Option<Vec<u8>>,
    /// The data file is to be a raw image of its own.
    pub data_file_raw: bool,
    /// What is allocated.
    pub preallocation: Preallocation,
}

impl CreateOptions {
    /// QEMU's defaults: version 3, 64 KiB clusters, 16-bit refcounts, zlib.
    #[must_use]
    pub fn new(size: u64) -> CreateOptions {
        CreateOptions {
            size,
            cluster_size: 65536,
            refcount_bits: 16,
            v2: false,
            extended_l2: false,
            lazy_refcounts: false,
            compression: Compression::Zlib,
            backing: None,
            data_file: None,
            data_file_raw: false,
            preallocation: Preallocation::Off,
        }
    }
}

/// Why an image cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The options do not go together.
    #[error("{0}")]
    Options(String),
    /// It would not be a valid image.
    #[error("{0}")]
    Format(#[from] FormatError),
    /// The file could not be written.
    #[error("{0}: {source}", source = .0.source)]
    Io(#[from] Error),
}

fn options_error<T>(text: impl Into<String>) -> Result<T, CreateError> {
    Err(CreateError::Options(text.into()))
}

/// Numbers of clusters.
struct Plan {
    g: Geometry,
    size: u64,
    table: u64,
    blocks: u64,
    l1_entries: u64,
    l1: u64,
    l2: u64,
    data: u64,
}

impl Plan {
    fn new(o: &CreateOptions) -> Result<Plan, CreateError> {
        let cluster_bits = o.cluster_size.trailing_zeros();
        if !o.cluster_size.is_power_of_two()
            || !(header::MIN_CLUSTER_BITS..=header::MAX_CLUSTER_BITS).contains(&cluster_bits)
        {
            return options_error(format!(
                "cluster size {}: it must be a power of two from 512 to 2M",
                o.cluster_size
            ));
        }
        if !o.refcount_bits.is_power_of_two() || o.refcount_bits > 64 {
            return options_error(format!(
                "refcount bits {}: it must be a power of two up to 64",
                o.refcount_bits
            ));
        }
        if o.extended_l2 && cluster_bits < header::MIN_EXTENDED_CLUSTER_BITS {
            return options_error("extended L2 entries need a cluster size of at least 16k");
        }
        let v3_only = [
            (o.refcount_bits != 16, "a refcount width other than 16"),
            (o.extended_l2, "extended L2 entries"),
            (o.lazy_refcounts, "lazy refcounts"),
            (o.compression != Compression::Zlib, "a compression type other than zlib"),
            (o.data_file.is_some(), "an external data file"),
        ];
        if let Some((_, what)) = v3_only.iter().find(|(used, _)| o.v2 && *used) {
            return options_error(format!("{what} needs compat 1.1 (version 3)"));
        }
        if o.data_file_raw && o.data_file.is_none() {
            return options_error("data_file_raw needs an external data file");
        }
        if o.data_file_raw && o.backing.is_some() {
            return options_error("a raw external data file cannot have a backing file");
        }
        if o.backing.is_some() && o.preallocation != Preallocation::Off {
            return options_error("preallocation would hide the backing file: leave one of them out");
        }
        if let Some((name, format)) = &o.backing {
            if name.is_empty() || name.len() > MAX_BACKING_NAME as usize {
                return options_error("the backing file's name must have 1 to 1023 bytes");
            }
            if format.is_empty() || format.len() > header::MAX_BACKING_FORMAT {
                return options_error("the backing file's format must be given: raw or qcow2");
            }
        }
        let g = Geometry {
            cluster_bits,
            refcount_order: o.refcount_bits.trailing_zeros(),
            extended_l2: o.extended_l2,
            data_file: o.data_file.is_some(),
            v2: o.v2,
        };
        let Some(size) = o.size.checked_next_multiple_of(512).filter(|&s| s <= i64::MAX as u64) else {
            return options_error(format!("size {}: no disk is that large", o.size));
        };
        let l1_entries = g.l1_entries_for(size);
        if l1_entries * 8 > MAX_L1_BYTES {
            return options_error(format!(
                "size {size} is too large for clusters of {} bytes; use a larger cluster size",
                o.cluster_size
            ));
        }
        let tables = o.data_file_raw || o.preallocation != Preallocation::Off;
        let l1 = g.clusters_for(l1_entries * 8);
        let l2 = if tables { l1_entries } else { 0 };
        let data = if tables && !g.data_file { g.clusters_for(size) } else { 0 };
        let (mut table, mut blocks) = (1, 1);
        loop {
            let total = 1 + table + blocks + l1 + l2 + data;
            let need = total.div_ceil(g.refcount_block_entries());
            let need_table = g.clusters_for(need * 8).max(1);
            if (need, need_table) == (blocks, table) {
                break;
            }
            (blocks, table) = (need, need_table);
        }
        if table << cluster_bits > MAX_REFTABLE_BYTES {
            return options_error("preallocating that much needs a larger cluster size");
        }
        Ok(Plan { g, size, table, blocks, l1_entries, l1, l2, data })
    }

    fn l1_at(&self) -> u64 {
        1 + self.table + self.blocks
    }

    fn l2_at(&self) -> u64 {
        self.l1_at() + self.l1
    }

    fn data_at(&self) -> u64 {
        self.l2_at() + self.l2
    }

    fn end(&self) -> u64 {
        self.data_at() + self.data
    }
}

/// Checks the options without making anything.
///
/// # Errors
/// `Options`, `Format`.
pub fn check_options(options: &CreateOptions) -> Result<(), CreateError> {
    let plan = Plan::new(options)?;
    header_of(options, &plan)?;
    Ok(())
}

/// Makes an image in an empty file that grows; the data file, if there is to be one, is given too. Durable on return.
/// Coroutine only; yields.
///
/// # Errors
/// See [`CreateError`].
pub fn co_create(
    file: &dyn BlockNode,
    data_file: Option<&dyn BlockNode>,
    options: &CreateOptions,
) -> Result<(), CreateError> {
    let plan = Plan::new(options)?;
    let head = header_of(options, &plan)?;
    let g = plan.g;
    let bits = g.cluster_bits;
    file.co_truncate(plan.end() << bits)?;
    let co_put = |cluster: u64, bytes: &[u8]| {
        file.co_pwritev(cluster << bits, &[IoSlice::new(bytes)], WriteFlags::empty())
    };
    let mut cluster = vec![0u8; g.cluster_size() as usize];
    for block in 0..plan.blocks {
        cluster.fill(0);
        let first = block * g.refcount_block_entries();
        for i in 0..g.refcount_block_entries().min(plan.end() - first) {
            g.set_refcount(&mut cluster, i as usize, 1);
        }
        co_put(1 + plan.table + block, &cluster)?;
    }
    let words =
        |n: u64, of: &dyn Fn(u64) -> u64| (0..n).flat_map(|i| of(i).to_be_bytes()).collect::<Vec<u8>>();
    co_put(1, &words(plan.blocks, &|i| (1 + plan.table + i) << bits))?;
    if plan.l2 > 0 {
        co_put(plan.l1_at(), &words(plan.l1_entries, &|i| ((plan.l2_at() + i) << bits) | COPIED))?;
    }
    let guest_clusters = g.clusters_for(plan.size);
    for table in 0..plan.l2 {
        cluster.fill(0);
        for (i, entry) in cluster.chunks_exact_mut(g.l2_entry_size() as usize).enumerate() {
            let guest = table * g.l2_entries() + i as u64;
            if guest >= guest_clusters {
                break;
            }
            let host = if g.data_file { guest } else { plan.data_at() + guest };
            entry[..8].copy_from_slice(&((host << bits) | COPIED).to_be_bytes());
            if g.extended_l2 {
                entry[8..].copy_from_slice(&u64::from(u32::MAX).to_be_bytes());
            }
        }
        co_put(plan.l2_at() + table, &cluster)?;
    }
    if let Some(data) = data_file {
        data.co_truncate(plan.size)?;
        co_fill(data, 0, plan.size, options.preallocation)?;
        data.co_flush()?;
    } else {
        co_fill(file, plan.data_at() << bits, plan.data << bits, options.preallocation)?;
    }
    file.co_flush()?;
    co_put(0, &head)?;
    file.co_flush()?;
    Ok(())
}

/// Allocates the range, which reads as zeroes already.
fn co_fill(node: &dyn BlockNode, offset: u64, len: u64, how: Preallocation) -> Result<(), CreateError> {
    match how {
        _ if len == 0 => {}
        Preallocation::Off | Preallocation::Metadata => {}
        // Without leave to unmap, zeroing allocates.
        Preallocation::Falloc => node.co_pwrite_zeroes(offset, len, WriteFlags::empty())?,
        Preallocation::Full => {
            const PIECE: u64 = 1 << 20;
            let zeroes = vec![0u8; PIECE.min(len) as usize];
            let mut at = 0;
            while at < len {
                let n = PIECE.min(len - at);
                node.co_pwritev(offset + at, &[IoSlice::new(&zeroes[..n as usize])], WriteFlags::empty())?;
                at += n;
            }
        }
    }
    Ok(())
}

/// The first cluster's bytes, checked by reading them back.
fn header_of(o: &CreateOptions, plan: &Plan) -> Result<Vec<u8>, CreateError> {
    let g = plan.g;
    let mut incompatible = Incompatible::empty();
    incompatible.set(Incompatible::DATA_FILE, g.data_file);
    incompatible.set(Incompatible::COMPRESSION_TYPE, o.compression != Compression::Zlib);
    incompatible.set(Incompatible::EXTENDED_L2, g.extended_l2);
    let mut header = Header {
        version: if o.v2 { 2 } else { 3 },
        backing_file: o.backing.as_ref().map(|b| b.0.clone()),
        cluster_bits: g.cluster_bits,
        size: plan.size,
        encryption: Encryption::None,
        l1_size: plan.l1_entries as u32,
        l1_table_offset: if plan.l1 > 0 { plan.l1_at() << g.cluster_bits } else { 0 },
        refcount_table_offset: g.cluster_size(),
        refcount_table_clusters: plan.table as u32,
        nb_snapshots: 0,
        snapshots_offset: 0,
        incompatible,
        compatible: if o.lazy_refcounts { Compatible::LAZY_REFCOUNTS } else { Compatible::empty() },
        autoclear: if o.data_file_raw { Autoclear::RAW_DATA } else { Autoclear::empty() },
        refcount_order: g.refcount_order,
        compression: o.compression,
        further: if o.v2 { Vec::new() } else { vec![0; 7] },
        backing_format: o.backing.as_ref().map(|b| b.1.clone()),
        data_file: o.data_file.clone(),
        crypto: None,
        feature_names: if o.v2 { Vec::new() } else { header::our_feature_names() },
        bitmaps: None,
        unknown: Vec::new(),
    };
    let bytes = match header.to_bytes() {
        // The table of names only serves messages: small clusters go without.
        Err(FormatError::NoRoom { .. }) if !header.feature_names.is_empty() => {
            header.feature_names.clear();
            header.to_bytes()?
        }
        other => other?,
    };
    let mut cluster = bytes.clone();
    cluster.resize(g.cluster_size() as usize, 0);
    let back = Header::parse(&cluster, header::Purpose::Use)?;
    assert_eq!(back, header, "a header reads back as it was written");
    Ok(bytes)
}
