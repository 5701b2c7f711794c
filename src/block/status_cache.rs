//! The last extents that were found, so that a map of a file does not ask the kernel for each of them.
//!
//! A scan is valid as long as nobody wrote, zeroed or discarded since it began. Each of those adds to its thread's
//! generation *after* its system call and before its completion is seen, so: whoever asks after a write completed
//! sees another sum than the one taken when the scan began, and asks the kernel again. Writers share no cache line;
//! only status queries sum the generations up and take the lock.

use super::shard::{self, Sharded};
use super::wait::lock;
use super::{Extent, StatusFlags};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Scans that are kept: one for each of a few clients that map at the same time (ours).
const SCANS: usize = 8;

/// Extents that one scan collects at most (ours; 16 bytes and two lseek each).
pub(crate) const SCAN_EXTENTS: usize = 256;

/// Neighbouring extents from `start` on: each ends where the next begins.
pub(crate) struct Scan {
    /// Offset of the first extent.
    pub(crate) start: u64,
    /// End offset and status of each, ascending; not empty.
    pub(crate) extents: Vec<(u64, StatusFlags)>,
}

impl Scan {
    fn lookup(&self, range: &Range<u64>) -> Option<Extent> {
        if range.start < self.start {
            return None;
        }
        let at = self.extents.partition_point(|e| e.0 <= range.start);
        let (end, flags) = *self.extents.get(at)?;
        Some(Extent { len: end.min(range.end) - range.start, flags })
    }
}

/// Cache of scans with their generations. Any thread.
pub(crate) struct StatusCache {
    generation: Sharded<AtomicU64>,
    scans: Mutex<VecDeque<(u64, Scan)>>,
}

impl StatusCache {
    pub(crate) fn new() -> StatusCache {
        StatusCache { generation: Sharded::new(), scans: Mutex::new(VecDeque::new()) }
    }

    /// Something was changed: all scans that began before are void. Call it after the change, before its completion.
    pub(crate) fn invalidate(&self) {
        self.generation.get(shard::index()).fetch_add(1, Ordering::SeqCst);
    }

    /// The generation to remember when a scan begins.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.sum()
    }

    /// The extent at the start of `range`, clipped to it, if a valid scan knows it.
    pub(crate) fn lookup(&self, range: Range<u64>) -> Option<Extent> {
        let now = self.generation();
        let mut scans = lock(&self.scans);
        scans.retain(|s| s.0 == now);
        scans.iter().find_map(|s| s.1.lookup(&range))
    }

    /// Keeps a scan that began at `generation`.
    pub(crate) fn insert(&self, generation: u64, scan: Scan) {
        if generation != self.generation() {
            return;
        }
        let mut scans = lock(&self.scans);
        while scans.len() >= SCANS {
            scans.pop_front();
        }
        scans.push_back((generation, scan));
    }
}

/// Invalidates when it is dropped: also when the change failed half way or unwound.
pub(crate) struct Invalidate<'a>(pub(crate) &'a StatusCache);

impl Drop for Invalidate<'_> {
    fn drop(&mut self) {
        self.0.invalidate();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> StatusCache {
        let c = StatusCache::new();
        let g = c.generation();
        c.insert(g, Scan { start: 100, extents: vec![(200, StatusFlags::DATA), (300, StatusFlags::ZERO)] });
        c
    }

    #[test]
    fn lookup_finds_and_clips() {
        let c = cache();
        assert_eq!(c.lookup(100..1000), Some(Extent { len: 100, flags: StatusFlags::DATA }));
        assert_eq!(c.lookup(199..1000), Some(Extent { len: 1, flags: StatusFlags::DATA }));
        assert_eq!(c.lookup(200..210), Some(Extent { len: 10, flags: StatusFlags::ZERO }));
        assert_eq!(c.lookup(99..1000), None);
        assert_eq!(c.lookup(300..1000), None);
    }

    #[test]
    fn change_voids_scans_that_began_before_it() {
        let c = cache();
        let during = c.generation();
        c.invalidate();
        assert_eq!(c.lookup(100..1000), None);
        c.insert(during, Scan { start: 0, extents: vec![(10, StatusFlags::ZERO)] });
        assert_eq!(c.lookup(0..10), None, "a scan that raced with a change is not kept");
    }

    #[test]
    fn number_of_scans_is_bounded() {
        let c = StatusCache::new();
        for i in 0..100 {
            c.insert(c.generation(), Scan { start: i * 10, extents: vec![(i * 10 + 10, StatusFlags::DATA)] });
        }
        assert_eq!(lock(&c.scans).len(), SCANS);
        assert!(c.lookup(990..995).is_some());
    }
}
