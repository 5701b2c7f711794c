//! Reading: what is in the file, what is compressed, what the backing image has, and zeroes.

use super::compressed::Decompressed;
use super::l2::{Kind, Look, Mapping};
use super::node::Qcow2Node;
use crate::block::{BlockNode, DepthExtent, Error, Extent, Result, StatusFlags, iov};
use crate::co;
use std::io::IoSliceMut;

/// Mappings that one status query looks at: a bound on its time, not on what clients learn (ours).
const STATUS_STEPS: usize = 64;

/// Pause before another look for a slice when all of a small cache are being loaded, in nanoseconds (ours).
const CROWDED_NS: u64 = 1_000_000;

impl Qcow2Node {
    /// The node that holds guest clusters.
    pub(super) fn data(&self) -> &dyn BlockNode {
        self.data_file.as_deref().unwrap_or(&*self.file)
    }

    /// What the guest range is from `offset` on; loads what is needed. The caller holds a ticket. Yields.
    pub(super) fn co_map(&self, offset: u64, len: u64) -> Result<Mapping> {
        loop {
            match self.map.map(offset, len) {
                Look::Found(m) => return Ok(m),
                Look::Miss => self.co_load(offset >> self.g.cluster_bits)?,
                Look::Bad(e) => return Err(self.co_mark_corrupt(&e.to_string(), offset)),
                Look::NoTable => return Ok(Mapping { kind: Kind::Unallocated, len }),
            }
        }
    }

    /// Loads the slice of a guest cluster, unless another coroutine does: then waits for it, and the caller looks
    /// again. The caller holds a ticket. Yields.
    pub(super) fn co_load(&self, cluster: u64) -> Result<()> {
        let Some(mut loading) = self.map.co_begin_load(cluster) else { return Ok(()) };
        while !loading.find_room() {
            if self.map.flag.is_clean() {
                co::co_sleep_ns(CROWDED_NS);
            } else {
                self.co_commit()?;
            }
        }
        let guest = cluster << self.g.cluster_bits;
        let host = loading.host().map_err(|e| self.co_mark_corrupt(&e.to_string(), guest))?;
        let Some(host) = host else { return Ok(()) };
        if host >= self.file.len() {
            return Err(self.co_mark_corrupt("an L2 table is past the end of the file", host));
        }
        let mut bytes = vec![0; self.map.slice_bytes()];
        super::io::co_read(&*self.file, host, &mut [IoSliceMut::new(&mut bytes)])?;
        self.co_check_slice(&bytes, guest);
        loading.finish(&bytes);
        Ok(())
    }

    pub(super) fn co_read(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        let _ticket = self.epochs.ticket();
        let len = iov::total_mut(bufs);
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let m = self.co_map(at, (len - done) as u64)?;
            if let Kind::Data { host, .. } = m.kind
                && done == 0
                && m.len == len as u64
            {
                return super::io::co_read(self.data(), host, bufs);
            }
            let mut part = iov::window_mut(bufs, done, m.len as usize);
            done += iov::total_mut(&part);
            match m.kind {
                Kind::Data { host, .. } => super::io::co_read(self.data(), host, &mut part)?,
                Kind::Zero => iov::zero_from(&mut part, 0),
                Kind::Unallocated => self.co_read_backing(at, &mut part)?,
                Kind::Compressed { raw, offset: host, len } => {
                    let data = self.co_decompress(at, raw, host, len)?;
                    let from = self.g.in_cluster(at) as usize;
                    let n = iov::total_mut(&part);
                    iov::scatter(&mut part, 0, &data[from..from + n]);
                }
            }
        }
        Ok(())
    }

    /// Bytes of the backing image from `offset` on, of at most `len`.
    fn backing_part(&self, offset: u64, len: u64) -> u64 {
        self.backing.as_ref().map_or(0, |b| b.len().saturating_sub(offset).min(len))
    }

    /// Reads what this image does not have: from the backing image, and zeroes where that ends. Yields.
    fn co_read_backing(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        let len = iov::total_mut(bufs);
        let inside = self.backing_part(offset, len as u64) as usize;
        iov::zero_from(bufs, inside);
        match &self.backing {
            Some(b) if inside == len => b.co_preadv(offset, bufs),
            Some(b) if inside > 0 => b.co_preadv(offset, &mut iov::window_mut(bufs, 0, inside)),
            _ => Ok(()),
        }
    }

    /// The content of a compressed cluster. Yields.
    pub(super) fn co_decompress(&self, guest: u64, raw: u64, host: u64, len: u32) -> Result<Decompressed> {
        if let Some(d) = self.compressed.get(raw) {
            return Ok(d);
        }
        // The file may end before the sector count says.
        let len = self.file.len().saturating_sub(host).min(u64::from(len));
        let mut input = vec![0; len as usize];
        super::io::co_read(&*self.file, host, &mut [IoSliceMut::new(&mut input)])?;
        let (kind, size) = (self.compression, self.g.cluster_size() as usize);
        let out = co::co_run_blocking(|| super::inflate::decompress(kind, &input, size));
        match out {
            Ok(data) => Ok(self.compressed.insert(raw, data)),
            Err(e) => {
                tracing::error!(
                    node = %self.name(),
                    guest_offset = guest,
                    host_offset = host,
                    error = %e,
                    "a compressed cluster cannot be read"
                );
                Err(Error::from_errno("decompress", self.name(), guest, libc::EIO))
            }
        }
    }

    /// Reads the front of `buf` as far as that needs no waiting. Never yields.
    pub(super) fn try_read(&self, offset: u64, buf: &mut [u8]) -> usize {
        let _ticket = self.epochs.ticket();
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let Look::Found(m) = self.map.map(at, (buf.len() - done) as u64) else { break };
            let part = &mut buf[done..done + m.len as usize];
            let n = match m.kind {
                Kind::Data { host, .. } => super::io::try_read(self.data(), host, part),
                Kind::Zero => {
                    part.fill(0);
                    part.len()
                }
                Kind::Unallocated => {
                    let inside = self.backing_part(at, part.len() as u64) as usize;
                    let n = match &self.backing {
                        Some(b) if inside > 0 => b.try_pread_some(at, &mut part[..inside]),
                        _ => 0,
                    };
                    if n == inside {
                        part[inside..].fill(0);
                        part.len()
                    } else {
                        n
                    }
                }
                Kind::Compressed { raw, .. } => match self.compressed.get(raw) {
                    Some(data) => {
                        let from = self.g.in_cluster(at) as usize;
                        part.copy_from_slice(&data[from..from + part.len()]);
                        part.len()
                    }
                    None => 0,
                },
            };
            done += n;
            if n < m.len as usize {
                break;
            }
        }
        done
    }

    /// What one mapping is to those who ask for status. Yields (asks the backing image).
    fn co_status_of(&self, at: u64, m: Mapping) -> Result<Extent> {
        Ok(match m.kind {
            Kind::Data { .. } | Kind::Compressed { .. } => Extent { len: m.len, flags: StatusFlags::DATA },
            Kind::Zero => Extent { len: m.len, flags: StatusFlags::ZERO },
            Kind::Unallocated => match (&self.backing, self.backing_part(at, m.len)) {
                (Some(b), inside) if inside > 0 => {
                    let e = b.co_block_status(at, inside)?;
                    Extent { len: e.len.min(inside), ..e }
                }
                _ => Extent { len: m.len, flags: StatusFlags::ZERO },
            },
        })
    }

    pub(super) fn co_status(&self, offset: u64, len: u64) -> Result<Extent> {
        let _ticket = self.epochs.ticket();
        let first = self.co_map(offset, len)?;
        let mut extent = self.co_status_of(offset, first)?;
        for _ in 0..STATUS_STEPS {
            if extent.len >= len {
                break;
            }
            let at = offset + extent.len;
            let m = self.co_map(at, len - extent.len)?;
            let next = self.co_status_of(at, m)?;
            if next.flags != extent.flags {
                break;
            }
            extent.len += next.len;
        }
        Ok(Extent { len: extent.len.min(len), ..extent })
    }

    /// Which layer of the chain holds the data; see [`BlockNode::co_allocation_depth`].
    pub(super) fn co_depth(&self, offset: u64, len: u64) -> Result<DepthExtent> {
        let _ticket = self.epochs.ticket();
        let mut extent: Option<DepthExtent> = None;
        for _ in 0..STATUS_STEPS {
            let done = extent.map_or(0, |e| e.len);
            if done >= len {
                break;
            }
            let at = offset + done;
            let m = self.co_map(at, len - done)?;
            let next = match (m.kind, &self.backing, self.backing_part(at, m.len)) {
                (Kind::Unallocated, Some(b), inside) if inside > 0 => {
                    let e = b.co_allocation_depth(at, inside)?;
                    DepthExtent { len: e.len.min(inside), depth: if e.depth == 0 { 0 } else { e.depth + 1 } }
                }
                (Kind::Unallocated, ..) => DepthExtent { len: m.len, depth: 0 },
                _ => DepthExtent { len: m.len, depth: 1 },
            };
            match &mut extent {
                None => extent = Some(next),
                Some(e) if e.depth == next.depth => e.len += next.len,
                Some(_) => break,
            }
        }
        Ok(extent.expect("something was asked"))
    }

    /// Whether all of the range is known to read as zeroes. The caller holds a ticket. Yields.
    pub(super) fn co_reads_zero(&self, offset: u64, len: u64) -> Result<bool> {
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let m = self.co_map(at, end - at)?;
            let zero = match m.kind {
                Kind::Zero => true,
                Kind::Unallocated => self.backing_part(at, m.len) == 0,
                Kind::Data { .. } | Kind::Compressed { .. } => false,
            };
            if !zero {
                return Ok(false);
            }
            at += m.len;
        }
        Ok(true)
    }
}
