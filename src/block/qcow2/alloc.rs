//! Allocation of host clusters: arenas per thread, free clusters, and what was freed and waits.
//!
//! ```text
//!   write ── arena of my thread ──(empty)── CoMutex: freed before, else the next with refcount 0 ── growth
//!
//!   unlinked ── pending ──(commit: unlinking durable)── grace ──(tickets back)── punched ── refcount - 1 ── free
//! ```
//! Quarantine: a cluster that was unlinked keeps its count, in memory and on disk, until no durable pointer to it is
//! left *and* every request that had looked it up has ended (`epoch`). Only then it is punched, counted down and may be
//! handed out again. So nobody ever reads or writes another guest cluster's data through an old lookup, and no
//! crash state has a pointer to a cluster with somebody else's data. What was lent is not handed out again at all (`lent.rs`).
//!
//! Known zero: a cluster past the end of the file at open, that this process has not freed since, reads as zeroes.

use super::entry::Geometry;
use super::node::Qcow2Node;
use super::refcounts::Refcounts;
use crate::block::shard;
use crate::block::wait::lock;
use crate::block::{BlockNode, Error, Result};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

/// Clusters that a thread takes at once: this many bytes, within bounds (ours).
const ARENA_BYTES: u64 = 1 << 20;
const ARENA_MAX: u64 = 256;

/// Clusters of an arena of so many bytes.
pub(super) fn arena_clusters(g: Geometry, bytes: Option<u64>) -> u64 {
    (bytes.unwrap_or(ARENA_BYTES) >> g.cluster_bits).clamp(1, ARENA_MAX)
}

/// Free extents that are remembered; more make the allocator search from the start again (ours).
const MAX_EXTENTS: usize = 64 << 10;

/// Clusters in quarantine that make a commit worthwhile (ours).
const MANY_PENDING: u64 = 4096;

/// Consecutive host clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// Number of the first.
    pub(super) first: u64,
    pub(super) count: u64,
    /// They read as zeroes.
    pub(super) zero: bool,
}

/// Clusters that were unlinked: each counts one less when that is safe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Freed {
    pub(super) clusters: Range<u64>,
    /// Give the space back to the host.
    pub(super) punch: bool,
}

/// What is unlinked, and not yet durably so.
#[derive(Default)]
pub(super) struct Pending {
    freed: Vec<Freed>,
    clusters: u64,
}

/// The allocator's state; behind the image's CoMutex.
pub(super) struct Alloc {
    pub(super) refcounts: Refcounts,
    /// Free clusters below `scan`: first → count.
    free: BTreeMap<u64, u64>,
    /// Clusters below are in use, in `free`, or were lent.
    scan: u64,
    /// Clusters with refcount 0 from here on read as zeroes; `u64::MAX` where that is not known.
    fresh: u64,
    /// Unlinked durably; the epoch when that was so.
    grace: VecDeque<(u64, Vec<Freed>)>,
}

impl Alloc {
    pub(super) fn new(refcounts: Refcounts, fresh: u64) -> Alloc {
        Alloc { refcounts, free: BTreeMap::new(), scan: 0, fresh, grace: VecDeque::new() }
    }

    /// Puts free clusters where allocation finds them again.
    fn add_free(&mut self, clusters: Range<u64>) {
        // They were used: nobody knows what they hold.
        if self.fresh != u64::MAX {
            self.fresh = self.fresh.max(clusters.end);
        }
        let (mut first, mut end) = (clusters.start, clusters.end.min(self.scan));
        if first >= end {
            // The search has not come that far yet.
            return;
        }
        if let Some((&f, &n)) = self.free.range(..first).next_back()
            && f + n == first
        {
            self.free.remove(&f);
            first = f;
        }
        if let Some(&n) = self.free.get(&end) {
            self.free.remove(&end);
            end += n;
        }
        self.free.insert(first, end - first);
        if self.free.len() > MAX_EXTENTS {
            self.free.clear();
            self.scan = 0;
        }
    }

    fn add_grown(&mut self) {
        for r in self.refcounts.take_freed() {
            self.add_free(r);
        }
    }

    /// [`Refcounts::co_find_free`], passing over what was lent. Yields.
    fn co_find(&mut self, mut from: u64, want: u64, node: &Qcow2Node) -> Result<Option<(u64, u64)>> {
        let per = self.refcounts.per_block();
        let block = from / per;
        while from / per == block {
            let Some((first, n)) = self.refcounts.co_find_free(from, want, node)? else { return Ok(None) };
            let end = first + n;
            let lent = |c: &u64| node.lent.contains(*c);
            if let Some(start) = (first..end).find(|c| !lent(c)) {
                return Ok(Some((start, (start + 1..end).find(lent).unwrap_or(end) - start)));
            }
            from = end;
        }
        Ok(None)
    }

    /// Finds at most `want` free clusters, at least 1, and counts them as used, in memory. Yields.
    fn co_take(&mut self, node: &Qcow2Node, want: u64) -> Result<Run> {
        debug_assert!(want > 0);
        if let Some((&first, &n)) = self.free.first_key_value() {
            self.free.remove(&first);
            let count = n.min(want);
            if count < n {
                self.free.insert(first + count, n - count);
            }
            self.co_use(node, first..first + count)?;
            return Ok(Run { first, count, zero: false });
        }
        loop {
            node.check_host(self.scan)?;
            self.refcounts.co_ensure_block(self.scan, node)?;
            self.add_grown();
            let per = self.refcounts.per_block();
            let Some((first, found)) = self.co_find(self.scan, want, node)? else {
                self.scan = (self.scan / per + 1) * per;
                continue;
            };
            node.check_host(first)?;
            // One run is known zero or not, as a whole, and inside of what the file can hold.
            let mut end = first + found;
            if first < self.fresh {
                end = end.min(self.fresh);
            }
            while end > first + 1 && node.check_host(end - 1).is_err() {
                end -= 1;
            }
            let zero = first >= self.fresh;
            self.scan = end;
            self.co_use(node, first..end)?;
            return Ok(Run { first, count: end - first, zero });
        }
    }

    /// Finds exactly `count` clusters side by side, and counts them as used, in memory. Yields.
    fn co_take_exact(&mut self, node: &Qcow2Node, count: u64) -> Result<Run> {
        if count >= self.refcounts.per_block() {
            // No range has so many beside its own block.
            let first = self.refcounts.co_make_area(count, node)?;
            self.add_grown();
            self.co_use(node, first..first + count)?;
            return Ok(Run { first, count, zero: first >= self.fresh });
        }
        // What was freed first: a file that does not grow may have nothing else.
        if let Some((&first, &n)) = self.free.iter().find(|(_, n)| **n >= count) {
            self.free.remove(&first);
            if n > count {
                self.free.insert(first + count, n - count);
            }
            self.co_use(node, first..first + count)?;
            return Ok(Run { first, count, zero: false });
        }
        let (mut first, mut have) = (self.scan, 0);
        while have < count {
            let at = first + have;
            node.check_host(at)?;
            self.refcounts.co_ensure_block(at, node)?;
            self.add_grown();
            match self.co_find(at, count - have, node)? {
                Some((f, n)) if f == at => have += n,
                Some((f, n)) => (first, have) = (f, n),
                None => {
                    let per = self.refcounts.per_block();
                    (first, have) = ((at / per + 1) * per, 0);
                }
            }
        }
        node.check_host(first + count - 1)?;
        self.co_use(node, first..first + count)?;
        Ok(Run { first, count, zero: first >= self.fresh })
    }

    /// Counts free clusters as used.
    fn co_use(&mut self, node: &Qcow2Node, clusters: Range<u64>) -> Result<()> {
        if let Some(c) = clusters.clone().find(|c| node.is_metadata_cluster(*c)) {
            return Err(
                node.co_mark_corrupt("a cluster with refcount 0 holds metadata", c << node.g.cluster_bits)
            );
        }
        for c in clusters.clone() {
            if let Err(e) = self.refcounts.co_set(c, 1, node) {
                // What was counted so far is leaked.
                tracing::warn!(node = %node.name(), cluster = c, "clusters may be leaked: a refcount block cannot be read");
                return Err(e);
            }
        }
        Ok(())
    }
}

impl Qcow2Node {
    /// Whether the host cluster can exist.
    pub(super) fn check_host(&self, cluster: u64) -> Result<()> {
        let end = cluster.checked_add(1).and_then(|c| c.checked_shl(self.g.cluster_bits));
        let max = if self.file.grows() { super::entry::MAX_HOST_OFFSET } else { self.file.len() };
        match end {
            Some(end) if end <= max => Ok(()),
            _ => Err(Error::from_errno("allocate", self.name(), max, libc::ENOSPC)),
        }
    }

    /// Takes at most `want` host clusters for data, at least 1. They belong to the caller, who links or frees them.
    /// Yields.
    pub(super) fn co_alloc(&self, want: u64) -> Result<Run> {
        if self.is_sabotaged(super::Sabotage::NoQuarantine) {
            let mut arena = lock(self.arenas.get(shard::index()));
            let run = |c: Range<u64>| Run { first: c.start, count: c.end - c.start, zero: false };
            arena.extend(self.take_pending().into_iter().map(|f| run(f.clusters)));
        }
        if let Some(run) = take_from(&mut lock(self.arenas.get(shard::index())), want) {
            return Ok(run);
        }
        let taken = self.alloc.co_lock().co_take(self, want.max(self.arena_clusters));
        let mut run = match taken {
            Err(e) => return self.take_hoarded(1, want, e),
            Ok(run) => run,
        };
        if run.count > want {
            let rest = Run { first: run.first + want, count: run.count - want, zero: run.zero };
            // The thread may be another than before; any arena will do.
            lock(self.arenas.get(shard::index())).push(rest);
            run.count = want;
        }
        Ok(run)
    }

    /// Where there is no more room, takes at least `least` and at most `want` clusters side by side out of what threads have
    /// put by. Never yields.
    fn take_hoarded(&self, least: u64, want: u64, e: Error) -> Result<Run> {
        if e.errno() != libc::ENOSPC {
            return Err(e);
        }
        let take = |arena: &mut Vec<Run>| {
            let at = arena.iter().position(|run| run.count >= least)?;
            // The last is the one that is taken from.
            arena[at..].rotate_left(1);
            take_from(arena, want)
        };
        self.arenas.iter().find_map(|a| take(&mut lock(a))).ok_or(e)
    }

    /// Takes `count` host clusters side by side, for metadata. Yields.
    pub(super) fn co_alloc_exact(&self, count: u64) -> Result<Run> {
        let taken = self.alloc.co_lock().co_take_exact(self, count);
        let run = taken.or_else(|e| self.take_hoarded(count, count, e))?;
        self.set_metadata_clusters(run.first..run.first + run.count, true);
        Ok(run)
    }

    /// Gives clusters up that are unlinked in memory (or were never linked). Never yields.
    pub(super) fn free_later(&self, freed: Freed) {
        let mut p = lock(&self.pending);
        p.clusters += freed.clusters.end - freed.clusters.start;
        match p.freed.last_mut() {
            Some(last) if last.clusters.end == freed.clusters.start && last.punch == freed.punch => {
                last.clusters.end = freed.clusters.end;
            }
            _ => p.freed.push(freed),
        }
    }

    /// Whether so much waits for a commit that one should be made.
    pub(super) fn too_much_pending(&self) -> bool {
        lock(&self.pending).clusters > MANY_PENDING
    }

    /// What is unlinked now.
    pub(super) fn take_pending(&self) -> Vec<Freed> {
        let mut p = lock(&self.pending);
        p.clusters = 0;
        std::mem::take(&mut p.freed)
    }

    /// Puts clusters whose unlinking has become durable on the way to being free. Commit only; yields.
    pub(super) fn co_begin_grace(&self, freed: Vec<Freed>) {
        if !freed.is_empty() {
            let now = self.epochs.now();
            self.alloc.co_lock().grace.push_back((now, freed));
        }
    }

    /// Frees what no request can hold any more. Commit only (one at a time); yields.
    pub(super) fn co_reclaim(&self) -> Result<()> {
        self.epochs.advance();
        loop {
            let batch = {
                let mut a = self.alloc.co_lock();
                match a.grace.front() {
                    Some((then, _))
                        if self.epochs.is_over(*then) || self.is_sabotaged(super::Sabotage::NoGrace) =>
                    {
                        a.grace.pop_front().map(|b| b.1)
                    }
                    _ => None,
                }
            };
            let Some(batch) = batch else { return Ok(()) };
            for freed in batch {
                self.co_release(&freed)?;
            }
        }
    }

    /// Punches and counts down. The clusters belong to nobody. Yields.
    fn co_release(&self, freed: &Freed) -> Result<()> {
        let bits = self.g.cluster_bits;
        if freed.punch && self.discard {
            // Only what nobody else shares.
            let mut alone: Vec<Range<u64>> = Vec::new();
            {
                let mut a = self.alloc.co_lock();
                for c in freed.clusters.clone() {
                    if a.refcounts.co_get(c, self)? != 1 {
                        continue;
                    }
                    match alone.last_mut() {
                        Some(r) if r.end == c => r.end += 1,
                        _ => alone.push(c..c + 1),
                    }
                }
            }
            for r in alone {
                let end = (r.end << bits).min(self.file.len());
                let start = r.start << bits;
                if start < end
                    && let Err(e) = self.file.co_pdiscard(start, end - start)
                {
                    // Space is not given back; nothing else.
                    tracing::debug!(node = %self.name(), offset = start, errno = e.errno(), "punching failed");
                }
            }
        }
        let mut a = self.alloc.co_lock();
        for c in freed.clusters.clone() {
            let count = a.refcounts.co_get(c, self)?;
            if count == 0 {
                return Err(self.co_mark_corrupt("the refcount of a cluster in use is 0", c << bits));
            }
            a.refcounts.co_set(c, count - 1, self)?;
            if count == 1 {
                self.set_metadata_clusters(c..c + 1, false);
                if !self.lent.contains(c) {
                    a.add_free(c..c + 1);
                }
            }
        }
        Ok(())
    }

    /// Gives back what the arenas hold. Nothing may be allocated at the same time. Yields.
    pub(super) fn co_empty_arenas(&self) -> Result<()> {
        let runs: Vec<Run> = self.arenas.iter().flat_map(|a| std::mem::take(&mut *lock(a))).collect();
        let mut a = self.alloc.co_lock();
        for run in runs {
            for c in run.first..run.first + run.count {
                a.refcounts.co_set(c, 0, self)?;
                a.add_free(c..c + 1);
            }
        }
        Ok(())
    }
}

/// Takes clusters off the last run that has some.
fn take_from(arena: &mut Vec<Run>, want: u64) -> Option<Run> {
    let run = arena.last_mut()?;
    let count = run.count.min(want);
    let taken = Run { count, ..*run };
    run.first += count;
    run.count -= count;
    if run.count == 0 {
        arena.pop();
    }
    Some(taken)
}
