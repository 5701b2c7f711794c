//! Writing: overwrites in place, and allocation with copy-on-write as one vectored write.
//!
//! ```text
//!   entry says data, refcount one ──► write there                                       (ticket; no lock)
//!   else: claim the guest clusters ─► look again ─► L2 table of our own ─► host clusters ─► what the write does not cover,
//!         from the old mapping ─► one write ─► entries set ─► old clusters to quarantine
//! ```
//! The entry is set only after the data is written: nobody reads a cluster before that. A write that fails has changed
//! no entry; its clusters go back through quarantine.

use super::alloc::{Freed, Run};
use super::entry::{COPIED, L2Entry, SUBCLUSTERS, Subcluster, Subclusters};
use super::l2::{Kind, Look};
use super::node::Qcow2Node;
use crate::block::wait::lock;
use crate::block::{BlockNode, Result, WriteFlags, iov};
use crate::util::buf::IoBuf;
use std::io::{IoSlice, IoSliceMut};

/// Bytes that one allocating write covers at most, or one cluster (ours: bounds what a claim keeps from others).
const MAX_PIECE: u64 = 4 << 20;

/// Zeroes around a write into a cluster that may hold anything.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// What goes around the guest's bytes.
enum Fill {
    Nothing,
    Zeroes(u64),
    Bytes(IoBuf),
}

impl Fill {
    fn push<'a>(&'a self, to: &mut Vec<IoSlice<'a>>) {
        match self {
            Fill::Nothing => {}
            Fill::Zeroes(n) => {
                let mut left = *n as usize;
                while left > 0 {
                    let n = left.min(ZEROES.len());
                    to.push(IoSlice::new(&ZEROES[..n]));
                    left -= n;
                }
            }
            Fill::Bytes(b) => to.push(IoSlice::new(b)),
        }
    }
}

/// Where a write goes that cannot go in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// It can, by now.
    InPlace,
    /// The cluster that the entry has already, at this host offset.
    Own(u64),
    /// New clusters.
    New,
}

/// One guest cluster's old entry.
#[derive(Clone, Copy)]
struct Old {
    entry: L2Entry,
    subs: Subclusters,
}

impl Qcow2Node {
    /// Writes `bufs` at `offset`. Yields.
    pub(super) fn co_write(&self, offset: u64, bufs: &[IoSlice<'_>], flags: WriteFlags) -> Result<()> {
        self.co_begin_change("pwritev", offset)?;
        let len = iov::total(bufs) as u64;
        let mut durable = false;
        let written = {
            let _ticket = self.epochs.ticket();
            self.co_write_all(offset, bufs, flags, &mut durable)
        };
        self.changed(offset, len);
        written?;
        let fua = flags.contains(WriteFlags::FUA) && !durable;
        self.co_end_change(fua)
    }

    /// After a change: makes it durable if asked, and the dirty metadata less if it is much. Yields.
    pub(super) fn co_end_change(&self, durable: bool) -> Result<()> {
        if durable {
            return self.co_flush_all();
        }
        if (self.map.too_dirty() || self.too_much_pending())
            && let Err(e) = self.co_commit()
        {
            // The next flush reports it to somebody who asked.
            tracing::warn!(node = %self.name(), errno = e.errno(), "metadata could not be written; it is tried again");
        }
        Ok(())
    }

    /// Sets `durable` when FUA was done on the way. The caller holds a ticket.
    pub(super) fn co_write_all(
        &self,
        offset: u64,
        bufs: &[IoSlice<'_>],
        flags: WriteFlags,
        durable: &mut bool,
    ) -> Result<()> {
        let len = iov::total(bufs);
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let m = self.co_map(at, (len - done) as u64)?;
            self.check_well("pwritev", at)?;
            let Kind::Data { host, in_place: true } = m.kind else {
                done += self.co_write_new(at, bufs, done)?;
                continue;
            };
            if done == 0 && m.len == len as u64 {
                // With all pointers durable the data is all that is missing.
                let fua =
                    flags.contains(WriteFlags::FUA) && self.data_file.is_none() && self.map.flag.is_clean();
                let flags = if fua { WriteFlags::FUA } else { WriteFlags::empty() };
                super::io::co_write(self.data(), host, bufs, flags)?;
                *durable = fua;
                return Ok(());
            }
            let part = iov::window(bufs, done, m.len as usize);
            super::io::co_write(self.data(), host, &part, WriteFlags::empty())?;
            done += iov::total(&part);
        }
        Ok(())
    }

    /// Writes all of `bufs`, which are `len` bytes, if that overwrites one run of allocated clusters and needs no waiting.
    /// Never yields.
    pub(super) fn try_write(&self, offset: u64, bufs: &[IoSlice<'_>], len: u64) -> Option<Result<()>> {
        if !self.may_change_now() {
            return None;
        }
        let r = {
            let _ticket = self.epochs.ticket();
            let Look::Found(m) = self.map.map(offset, len) else { return None };
            // What was just loaded may have shown that the image is damaged.
            if !self.may_change_now() {
                return None;
            }
            let Kind::Data { host, in_place: true } = m.kind else { return None };
            if m.len != len || super::io::check_end(self.data(), host, m.len).is_err() {
                return None;
            }
            self.data().try_pwritev(host, bufs)?
        };
        self.changed(offset, len);
        Some(r)
    }

    // ------------------------------------------------------------------------------------------ allocation

    /// Makes sure that the L2 table of a guest cluster exists and is ours alone. The caller has a ticket. Yields.
    pub(super) fn co_ensure_table(&self, cluster: u64) -> Result<()> {
        let g = self.g;
        let index = cluster >> g.l2_bits();
        let look = || g.l1_entry(self.map.l1_raw(index));
        let bad = |e: super::FormatError| self.co_bad_entry(&e, cluster << g.cluster_bits);
        if let Some((_, true)) = look().map_err(bad)? {
            return Ok(());
        }
        let _alone = self.tables.co_lock();
        let old = match look().map_err(bad)? {
            Some((_, true)) => return Ok(()),
            old => old.map(|o| o.0.0),
        };
        let mut table = IoBuf::zeroed(g.cluster_size() as usize);
        if let Some(old) = old {
            if old >= self.file.len() {
                return Err(self.co_mark_corrupt("an L2 table is past the end of the file", old));
            }
            super::io::co_read(&*self.file, old, &mut [IoSliceMut::new(&mut table)])?;
        }
        let run = self.co_alloc_exact(1)?;
        let host = run.first << g.cluster_bits;
        if let Err(e) = super::io::co_write(&*self.file, host, &[IoSlice::new(&table)], WriteFlags::empty()) {
            self.free_later(Freed { clusters: run.first..run.first + 1, punch: false });
            return Err(e);
        }
        // Its content is written, and so durable before the pointer is.
        {
            let mut changed = lock(&self.l1_dirty);
            changed.insert(index);
            self.map.flag.mark();
            self.map.set_l1_raw(index, host | COPIED);
        }
        if let Some(old) = old {
            let c = old >> g.cluster_bits;
            self.free_later(Freed { clusters: c..c + 1, punch: false });
        }
        Ok(())
    }

    /// The old entries of guest clusters in one slice. The table exists. Yields.
    fn co_old(&self, first: u64, count: u64) -> Result<Vec<Old>> {
        let g = self.g;
        let ext = g.extended_l2;
        let step = if ext { 2 } else { 1 };
        loop {
            let look = self.map.read(first, |words, at| {
                (0..count as usize)
                    .map(|i| {
                        let word =
                            |k: usize| words[at + i * step + k].load(std::sync::atomic::Ordering::Acquire);
                        (word(0), if ext { word(1) } else { 0 })
                    })
                    .collect::<Vec<_>>()
            });
            match look {
                Look::Found(raws) => {
                    let mut olds = Vec::with_capacity(raws.len());
                    for (i, (raw, bitmap)) in raws.into_iter().enumerate() {
                        let guest = (first + i as u64) << g.cluster_bits;
                        let corrupt = |e: super::FormatError| self.co_bad_entry(&e, guest);
                        let entry = g.l2_entry(raw).map_err(corrupt)?;
                        let subs = if ext {
                            g.subclusters(entry, bitmap).map_err(corrupt)?
                        } else {
                            Subclusters::default()
                        };
                        olds.push(Old { entry, subs });
                    }
                    return Ok(olds);
                }
                Look::Miss => self.co_load(first)?,
                Look::Bad(e) => return Err(self.co_bad_entry(&e, first << g.cluster_bits)),
                Look::NoTable => unreachable!("the table was made, and tables are never taken away"),
            }
        }
    }

    /// Where a write to `at` goes, by the old entry of its cluster.
    fn target(&self, old: Old, at: u64) -> Target {
        let g = self.g;
        let cluster = at & !(g.cluster_size() - 1);
        let sub = (g.in_cluster(at) / g.subcluster_size()) as u32;
        match old.entry {
            L2Entry::Data { host, copied } if copied || g.data_file => {
                if g.extended_l2 && old.subs.get(sub) != Subcluster::Allocated {
                    Target::Own(host.0)
                } else {
                    Target::InPlace
                }
            }
            _ if g.data_file => Target::Own(cluster),
            L2Entry::Zero { host: Some(host), copied: true } => Target::Own(host.0),
            _ => Target::New,
        }
    }

    /// Whether all of the cluster must be copied when part of it gets another home.
    fn keeps_whole(&self, old: Old) -> bool {
        match old.entry {
            _ if !self.g.extended_l2 => true,
            L2Entry::Compressed { .. } => true,
            // Shared: a new cluster must take over what is allocated in it.
            L2Entry::Data { copied, .. } => !copied && !self.g.data_file,
            L2Entry::Zero { .. } | L2Entry::Unallocated => false,
        }
    }

    /// What reads at `offset..offset + len` now. The caller has a ticket, and a claim. Yields.
    fn co_fill(&self, offset: u64, len: u64) -> Result<Fill> {
        if len == 0 {
            return Ok(Fill::Nothing);
        }
        // Past the end of the disk there is nothing to keep.
        let inside = self.len().saturating_sub(offset).min(len);
        if inside == 0 || self.co_reads_zero(offset, inside)? {
            return Ok(Fill::Zeroes(len));
        }
        let mut buf = IoBuf::zeroed(len as usize);
        self.co_read(offset, &mut [IoSliceMut::new(&mut buf[..inside as usize])])?;
        Ok(Fill::Bytes(buf))
    }

    /// Writes the front of what is left of `bufs` after `skip` bytes, to `at`, where it cannot be written in place.
    /// Returns how many bytes; 0 when it must be looked at again. The caller has a ticket. Yields.
    fn co_write_new(&self, at: u64, bufs: &[IoSlice<'_>], skip: usize) -> Result<usize> {
        let g = self.g;
        let (bits, cs) = (g.cluster_bits, g.cluster_size());
        let first = at >> bits;
        let part = iov::window(bufs, skip, MAX_PIECE.max(cs) as usize);
        let span = self.map.left_in_slice(first).min((MAX_PIECE >> bits).max(1));
        let end = (at + iov::total(&part) as u64).min((first + span) << bits);
        let clusters = ((end - 1) >> bits) + 1 - first;

        let _claim = self.claims.co_claim(first..first + clusters);
        self.co_ensure_table(first)?;
        let olds = self.co_old(first, clusters)?;
        self.check_well("pwritev", at)?;
        let target = self.target(olds[0], at);
        // How many clusters go the same way.
        let mut count = 1;
        while count < clusters {
            let next = self.target(olds[count as usize], (first + count) << bits);
            let same = match (target, next) {
                (Target::New, Target::New) => true,
                (Target::Own(host), Target::Own(h)) => !g.extended_l2 && h == host + (count << bits),
                _ => false,
            };
            if !same {
                break;
            }
            count += 1;
        }
        let (host, run) = match target {
            Target::InPlace => return Ok(0),
            Target::Own(host) => (host, Run { first: host >> bits, count, zero: false }),
            Target::New => {
                let run = self.co_alloc(count)?;
                (run.first << bits, run)
            }
        };
        let end = end.min((first + run.count) << bits);
        let part = iov::window(&part, 0, (end - at) as usize);

        let r = self.co_write_around(at, end, host, run, target, &olds, &part);
        let linked =
            r.and_then(|covered| self.co_link(first, host, target, &olds[..run.count as usize], covered));
        if let Err(e) = linked {
            if target == Target::New {
                self.free_later(Freed { clusters: run.first..run.first + run.count, punch: false });
            }
            return Err(e);
        }
        Ok((end - at) as usize)
    }

    /// Writes guest bytes and what must be around them; returns the guest range that the host clusters hold then.
    #[expect(clippy::too_many_arguments, reason = "one step of co_write_new")]
    fn co_write_around(
        &self,
        at: u64,
        end: u64,
        host: u64,
        run: Run,
        target: Target,
        olds: &[Old],
        part: &[IoSlice<'_>],
    ) -> Result<(u64, u64)> {
        let g = self.g;
        let first = at >> g.cluster_bits << g.cluster_bits;
        // The guest bytes to be covered beside the write's own: up to a subcluster's or a cluster's edge.
        let edge = |old: Old, pos: u64| {
            let sub = (g.in_cluster(pos) / g.subcluster_size()) as u32;
            let own = matches!(target, Target::Own(_));
            if g.extended_l2 && own && old.subs.get(sub) == Subcluster::Allocated {
                1
            } else if self.keeps_whole(old) {
                g.cluster_size()
            } else {
                g.subcluster_size()
            }
        };
        let last = olds[((end - 1 - first) >> g.cluster_bits) as usize];
        let low = at - at % edge(olds[0], at);
        let high = end.next_multiple_of(edge(last, end - 1));
        let mut head = self.co_fill(low, at - low)?;
        let mut tail = self.co_fill(end, high - end)?;
        let mut from = low;
        if run.zero {
            // It reads as zeroes already.
            if let Fill::Zeroes(_) = head {
                (head, from) = (Fill::Nothing, at);
            }
            if let Fill::Zeroes(_) = tail {
                tail = Fill::Nothing;
            }
        }
        let mut all = Vec::with_capacity(part.len() + 2);
        head.push(&mut all);
        all.extend(part.iter().map(|p| IoSlice::new(p)));
        tail.push(&mut all);
        super::io::co_write(self.data(), host + (from - first), &all, WriteFlags::empty())?;
        Ok((low, high))
    }

    /// Sets the entries of guest clusters to host clusters that were written: `covered` is the guest range that they
    /// hold. Yields.
    fn co_link(
        &self,
        first: u64,
        host: u64,
        target: Target,
        olds: &[Old],
        covered: (u64, u64),
    ) -> Result<()> {
        let g = self.g;
        let bits = g.cluster_bits;
        self.co_edit(first, |edit| {
            for (i, old) in olds.iter().enumerate() {
                let cluster = first + i as u64;
                let mut bitmap = 0;
                if g.extended_l2 {
                    let start = cluster << bits;
                    let low = covered.0.max(start) - start;
                    let high = covered.1.min(start + g.cluster_size()) - start;
                    let from = (low / g.subcluster_size()) as u32;
                    let to = (high.div_ceil(g.subcluster_size()) as u32).min(SUBCLUSTERS);
                    let mask = Subclusters::mask(from, to - from);
                    let kept = if matches!(target, Target::Own(_)) { old.subs.allocated } else { 0 };
                    bitmap = Subclusters { allocated: kept | mask, zero: old.subs.zero & !mask }.raw();
                }
                let raw = (host + ((i as u64) << bits)) | COPIED;
                edit.set(cluster, raw, bitmap);
            }
        })?;
        if target == Target::New {
            for old in olds {
                self.free_entry(old.entry, false);
            }
        }
        Ok(())
    }

    /// Changes entries of one slice, whose table exists and is ours. Yields, not in `f`.
    pub(super) fn co_edit<T>(
        &self,
        cluster: u64,
        mut f: impl FnMut(&mut super::l2::SliceEdit<'_>) -> T,
    ) -> Result<T> {
        loop {
            if let Some(mut edit) = self.map.edit(cluster) {
                self.check_well("change", cluster << self.g.cluster_bits)?;
                return Ok(f(&mut edit));
            }
            self.co_load(cluster)?;
        }
    }

    /// Gives up what an entry pointed to, which has just been replaced. Never yields.
    pub(super) fn free_entry(&self, entry: L2Entry, punch: bool) {
        if self.g.data_file {
            return;
        }
        let bits = self.g.cluster_bits;
        let clusters = match entry {
            L2Entry::Unallocated | L2Entry::Zero { host: None, .. } => return,
            L2Entry::Zero { host: Some(host), .. } | L2Entry::Data { host, .. } => {
                host.0 >> bits..(host.0 >> bits) + 1
            }
            L2Entry::Compressed { offset, len } => {
                let last = offset.0 + u64::from(len.max(1)) - 1;
                offset.0 >> bits..(last >> bits) + 1
            }
        };
        // A compressed cluster's host clusters may hold others; punching looks at the count.
        self.free_later(Freed { clusters, punch });
    }
}
