//! Host clusters whose pages were lent to a socket: once they are freed they are not used again while the image is open.
//!
//! A socket holds on to the pages of a file until its reader has taken them, and the reader may pass them on as pages (`splice`): nobody can
//! tell when the last one is gone. A page shows what the file holds when it is looked at. As long as the cluster belongs
//! to the guest offset that was asked for that is an answer like any other; were it freed and handed out again, the reader would be shown another
//! offset's data.
//!
//! So a cluster is marked here before its pages go out, under the ticket of the look-up, and allocation passes over what is marked. A discard
//! gives the space back to the host as ever; what is lost is a place in the file, until the image is opened again. Lending is
//! for files that can lose places: they grow, and can be punched. It ends when twice as many places were lent as the disk has clusters: so
//! with those in use the file becomes three times as long as the disk at most.
//!
//! Opening the image again ends that: the connections are gone by then. A last reply that is taken out of its socket, or out of a proxy, later still
//! may show the place's new use; its range had been freed while it was under way, and the connection is over.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Words of 64 clusters in a chunk (ours: 8 KiB for 4 GiB of the default clusters).
const WORDS: usize = 1024;

/// Chunks at most (ours: 16 TiB of the default clusters); what is behind is not lent.
const CHUNKS: usize = 4096;

const CLUSTERS_PER_CHUNK: u64 = WORDS as u64 * 64;

type Chunk = OnceLock<Box<[AtomicU64]>>;

/// The set of them. Any thread; nothing waits.
#[derive(Default)]
pub(super) struct LentClusters {
    any: AtomicBool,
    chunks: OnceLock<Box<[Chunk]>>,
    /// How many were marked.
    marked: AtomicU64,
}

impl LentClusters {
    /// Adds clusters, before their pages go out. False, and nothing was added, if there is no room for such numbers. The caller has a
    /// ticket: so an allocation that finds one of them free comes later, and sees it here.
    pub(super) fn mark(&self, clusters: Range<u64>) -> bool {
        if clusters.end > CHUNKS as u64 * CLUSTERS_PER_CHUNK {
            return false;
        }
        // Readers share its line.
        if !self.any.load(Ordering::SeqCst) {
            self.any.store(true, Ordering::SeqCst);
        }
        let chunks = self.chunks.get_or_init(|| (0..CHUNKS).map(|_| Chunk::new()).collect());
        for c in clusters {
            let (chunk, word, bit) = place(c);
            let words = chunks[chunk].get_or_init(|| (0..WORDS).map(|_| AtomicU64::new(0)).collect());
            if words[word].load(Ordering::SeqCst) & bit == 0 {
                let before = words[word].fetch_or(bit, Ordering::SeqCst);
                self.marked.fetch_add(u64::from(before & bit == 0), Ordering::Relaxed);
            }
        }
        true
    }

    /// How many clusters were marked.
    pub(super) fn marked(&self) -> u64 {
        self.marked.load(Ordering::Relaxed)
    }

    /// Whether a cluster was marked.
    pub(super) fn contains(&self, cluster: u64) -> bool {
        if !self.any.load(Ordering::SeqCst) || cluster >= CHUNKS as u64 * CLUSTERS_PER_CHUNK {
            return false;
        }
        let (chunk, word, bit) = place(cluster);
        let words = self.chunks.get().and_then(|chunks| chunks[chunk].get());
        words.is_some_and(|words| words[word].load(Ordering::SeqCst) & bit != 0)
    }
}

fn place(cluster: u64) -> (usize, usize, u64) {
    let word = cluster / 64;
    ((word / WORDS as u64) as usize, (word % WORDS as u64) as usize, 1 << (cluster % 64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_marked_is_in_it() {
        let set = LentClusters::default();
        assert!(!set.contains(0) && !set.contains(u64::MAX));
        assert!(set.mark(63..66) && set.mark(CLUSTERS_PER_CHUNK - 1..CLUSTERS_PER_CHUNK + 1));
        for c in [63, 64, 65, CLUSTERS_PER_CHUNK - 1, CLUSTERS_PER_CHUNK] {
            assert!(set.contains(c), "{c}");
        }
        for c in [0, 62, 66, CLUSTERS_PER_CHUNK - 2, CLUSTERS_PER_CHUNK + 1, 9 * CLUSTERS_PER_CHUNK] {
            assert!(!set.contains(c), "{c}");
        }
        let end = CHUNKS as u64 * CLUSTERS_PER_CHUNK;
        assert!(set.mark(end - 1..end) && set.contains(end - 1));
        assert!(!set.mark(end - 1..end + 1) && !set.contains(end));
        assert!(set.mark(63..66));
        assert_eq!(set.marked(), 6, "each counts once");
    }
}
