//! Reading: what is in the file, what is compressed, what the backing image has, and zeroes.

use super::compressed::Decompressed;
use super::l2::{Kind, Look, Mapping};
use super::node::Qcow2Node;
use crate::block::{BlockNode, DepthExtent, Error, Extent, Lent, Result, StatusFlags, iov};
use crate::co;
use std::io::IoSliceMut;

/// Mappings that one status query looks at: a bound on its time, not on what clients learn (ours).
const STATUS_STEPS: usize = 64;

/// Pause before another look for a slice when all of a small cache are being loaded, in nanoseconds (ours).
const CROWDED_NS: u64 = 1_000_000;

/// Which part of the chain of images a guest range comes from.
pub(super) enum Source<'a> {
    /// A qcow2 image has it, and not as unallocated.
    Image(&'a Qcow2Node, Mapping),
    /// Something else at the end of the chain, for so many bytes.
    Other(&'a dyn BlockNode, u64),
    /// Nobody: zeroes, for so many bytes.
    Nobody(u64),
}

impl Source<'_> {
    pub(super) fn len(&self) -> u64 {
        match self {
            Source::Image(_, m) => m.len,
            Source::Other(_, len) | Source::Nobody(len) => *len,
        }
    }
}

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
                Look::Bad(e) => return Err(self.co_bad_entry(&e, offset)),
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
        let host = loading.host().map_err(|e| self.co_bad_entry(&e, guest))?;
        let Some(host) = host else { return Ok(()) };
        if host >= self.file.len() {
            return Err(self.co_mark_corrupt("an L2 table is past the end of the file", host));
        }
        let mut bytes = vec![0; self.map.slice_bytes()];
        super::io::co_read_quick(&*self.file, host, &mut bytes)?;
        self.co_check_slice(&bytes, guest);
        self.co_check_counts(&mut bytes);
        loading.finish(&bytes);
        Ok(())
    }

    /// Where a guest range comes from, from `offset` on for at most `len` bytes, and which layer of the chain that is
    /// (this one is 1). Goes down the chain in a loop: chains may be longer than a coroutine's stack allows. The caller
    /// has a ticket; the images below do not change, and need none. Yields.
    pub(super) fn co_find(&self, offset: u64, len: u64) -> Result<(Source<'_>, u32)> {
        let (mut node, mut len, mut depth) = (self, len, 1);
        loop {
            let m = node.co_map(offset, len)?;
            if m.kind != Kind::Unallocated {
                return Ok((Source::Image(node, m), depth));
            }
            depth += 1;
            match node.below(offset, m.len) {
                Some((b, inside)) => match b.as_qcow2() {
                    Some(next) => (node, len) = (next, inside),
                    None => return Ok((Source::Other(b, inside), depth)),
                },
                None => return Ok((Source::Nobody(m.len), depth)),
            }
        }
    }

    /// [`Qcow2Node::co_find`] as far as that needs no waiting.
    fn try_find(&self, offset: u64, len: u64) -> Option<Source<'_>> {
        let (mut node, mut len) = (self, len);
        loop {
            let Look::Found(m) = node.map.map(offset, len) else { return None };
            if m.kind != Kind::Unallocated {
                return Some(Source::Image(node, m));
            }
            match node.below(offset, m.len) {
                Some((b, inside)) => match b.as_qcow2() {
                    Some(next) => (node, len) = (next, inside),
                    None => return Some(Source::Other(b, inside)),
                },
                None => return Some(Source::Nobody(m.len)),
            }
        }
    }

    /// The backing image and how many of the bytes it has, if it has the first.
    fn below(&self, offset: u64, len: u64) -> Option<(&dyn BlockNode, u64)> {
        let b = self.backing.as_deref()?;
        let inside = b.len().saturating_sub(offset).min(len);
        (inside > 0).then_some((b, inside))
    }

    pub(super) fn co_read(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        let _ticket = self.epochs.ticket();
        let len = iov::total_mut(bufs);
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let (source, _) = self.co_find(at, (len - done) as u64)?;
            if done == 0 && source.len() == len as u64 {
                return co_read_from(&source, at, bufs);
            }
            let mut part = iov::window_mut(bufs, done, source.len() as usize);
            done += iov::total_mut(&part);
            co_read_from(&source, at, &mut part)?;
        }
        Ok(())
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
            let Some(source) = self.try_find(at, (buf.len() - done) as u64) else { break };
            let part = &mut buf[done..done + source.len() as usize];
            let n = match &source {
                Source::Nobody(_)
                | Source::Image(_, Mapping { kind: Kind::Zero | Kind::Unallocated, .. }) => {
                    part.fill(0);
                    part.len()
                }
                Source::Other(b, _) => b.try_pread_some(at, part),
                Source::Image(node, Mapping { kind: Kind::Data { host, .. }, .. }) => {
                    super::io::try_read(node.data(), *host, part)
                }
                Source::Image(node, Mapping { kind: Kind::Compressed { raw, .. }, .. }) => {
                    match node.compressed.get(*raw) {
                        Some(data) => {
                            let from = node.g.in_cluster(at) as usize;
                            part.copy_from_slice(&data[from..from + part.len()]);
                            part.len()
                        }
                        None => 0,
                    }
                }
            };
            done += n;
            if (n as u64) < source.len() {
                break;
            }
        }
        done
    }

    /// [`Qcow2Node::try_read`] into several buffers: one system call if it is all side by side in one file.
    pub(super) fn try_readv(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> usize {
        let len = iov::total_mut(bufs) as u64;
        if len > 0 {
            let _ticket = self.epochs.ticket();
            match self.try_find(offset, len) {
                Some(Source::Image(node, Mapping { kind: Kind::Data { host, .. }, len: found }))
                    if found == len && super::io::is_inside(node.data(), host, len) =>
                {
                    return node.data().try_preadv_some(host, bufs);
                }
                Some(Source::Other(b, found)) if found == len => return b.try_preadv_some(offset, bufs),
                _ => {}
            }
        }
        let mut done = 0;
        for buf in bufs {
            let n = self.try_read(offset + done as u64, buf);
            done += n;
            if n < buf.len() {
                break;
            }
        }
        done
    }

    /// Whether all of a range is data in the page cache that can be lent. Never yields.
    pub(super) fn lends_all(&self, offset: u64, len: u64, no_holes: bool) -> bool {
        let _ticket = self.epochs.ticket();
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let Some(source) = self.try_find(at, end - at) else { return false };
            let Some(holder) = Holder::of(&source, at) else { return false };
            let lends = holder.image.is_none_or(Qcow2Node::may_lend)
                && holder.node.lends(holder.offset, source.len() as usize, no_holes);
            if !lends {
                return false;
            }
            at += source.len();
        }
        true
    }

    /// Lends the front of a range; see `lent.rs`. The ticket keeps its clusters from being freed before they are marked. Never
    /// yields.
    pub(super) fn try_lend_front(&self, offset: u64, len: u64, f: &mut dyn FnMut(&Lent<'_>)) -> bool {
        let _ticket = self.epochs.ticket();
        let Some(source) = self.try_find(offset, len) else { return false };
        let Some(holder) = Holder::of(&source, offset) else { return false };
        let marked = holder.image.is_none_or(|image| {
            let end = holder.offset + source.len() - 1;
            let bits = image.g.cluster_bits;
            image.may_lend() && image.lent.mark(holder.offset >> bits..(end >> bits) + 1)
        });
        marked && holder.node.try_lend(holder.offset, source.len() as usize, f)
    }

    /// Whether clusters may be lent that are out of use for good once they are freed.
    fn may_lend(&self) -> bool {
        let room = self.lent.marked() < 2 * self.g.clusters_for(self.len());
        room && self.discard && self.file.grows() && self.file.gives_back(self.g.cluster_size())
    }

    pub(super) fn co_status(&self, offset: u64, len: u64) -> Result<Extent> {
        let _ticket = self.epochs.ticket();
        let mut extent: Option<Extent> = None;
        for _ in 0..STATUS_STEPS {
            let done = extent.map_or(0, |e| e.len);
            if done >= len {
                break;
            }
            let at = offset + done;
            let (source, _) = self.co_find(at, len - done)?;
            let next = match source {
                Source::Nobody(len) => Extent { len, flags: StatusFlags::ZERO },
                Source::Other(b, len) => {
                    let e = b.co_block_status(at, len)?;
                    Extent { len: e.len.min(len), ..e }
                }
                Source::Image(_, m) => {
                    let zero = matches!(m.kind, Kind::Zero);
                    Extent { len: m.len, flags: if zero { StatusFlags::ZERO } else { StatusFlags::DATA } }
                }
            };
            match &mut extent {
                None => extent = Some(next),
                Some(e) if e.flags == next.flags => e.len += next.len,
                Some(_) => break,
            }
        }
        Ok(extent.expect("something was asked"))
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
            let (source, layer) = self.co_find(at, len - done)?;
            let next = match source {
                Source::Nobody(len) => DepthExtent { len, depth: 0 },
                Source::Other(b, len) => {
                    let e = b.co_allocation_depth(at, len)?;
                    let depth = if e.depth == 0 { 0 } else { e.depth + layer - 1 };
                    DepthExtent { len: e.len.min(len), depth }
                }
                Source::Image(_, m) => DepthExtent { len: m.len, depth: layer },
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
            let (source, _) = self.co_find(at, end - at)?;
            match source {
                Source::Nobody(_) | Source::Image(_, Mapping { kind: Kind::Zero, .. }) => at += source.len(),
                Source::Other(..) | Source::Image(..) => return Ok(false),
            }
        }
        Ok(true)
    }
}

/// Where the data at a guest offset is.
struct Holder<'a> {
    node: &'a dyn BlockNode,
    offset: u64,
    /// The image that may free it and use its place for other data; none if nobody will.
    image: Option<&'a Qcow2Node>,
}

impl<'a> Holder<'a> {
    fn of(source: &'a Source<'_>, at: u64) -> Option<Holder<'a>> {
        match source {
            Source::Image(image, Mapping { kind: Kind::Data { host, .. }, len })
                if super::io::is_inside(image.data(), *host, *len) =>
            {
                // In a data file each guest offset has its own place.
                let stays = image.read_only() || image.data_file.is_some();
                Some(Holder { node: image.data(), offset: *host, image: (!stays).then_some(*image) })
            }
            Source::Other(b, _) if b.read_only() => Some(Holder { node: *b, offset: at, image: None }),
            _ => None,
        }
    }
}

/// Fills `bufs` with what is at a guest offset, given where it comes from. Yields.
fn co_read_from(source: &Source<'_>, at: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
    let (node, m) = match source {
        Source::Nobody(_) => {
            iov::zero_from(bufs, 0);
            return Ok(());
        }
        Source::Other(b, _) => return b.co_preadv(at, bufs),
        Source::Image(node, m) => (node, m),
    };
    match m.kind {
        Kind::Data { host, .. } => super::io::co_read(node.data(), host, bufs),
        Kind::Zero | Kind::Unallocated => {
            iov::zero_from(bufs, 0);
            Ok(())
        }
        Kind::Compressed { raw, offset, len } => {
            let data = node.co_decompress(at, raw, offset, len)?;
            let from = node.g.in_cluster(at) as usize;
            let n = iov::total_mut(bufs);
            iov::scatter(bufs, 0, &data[from..from + n]);
            Ok(())
        }
    }
}
