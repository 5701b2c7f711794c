//! Decompressed clusters: the last few, so that a client that reads a cluster in pieces has it decompressed once.
//!
//! Found by the cluster's L2 entry. That names its place in the file, which keeps its content as long as any entry names
//! it, since we never write compressed clusters.

use crate::block::wait::lock;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

/// Bytes of decompressed clusters in all (ours).
const BYTES: usize = 4 << 20;

/// Parts with a lock each, so that threads seldom meet (ours).
const SHARDS: usize = 8;

/// The content of a cluster.
pub(super) type Decompressed = Arc<Vec<u8>>;

/// See the module's text. Any thread.
pub(super) struct CompressedCache {
    shards: [Mutex<VecDeque<(u64, Decompressed)>>; SHARDS],
    per_shard: usize,
}

impl CompressedCache {
    pub(super) fn new(cluster_size: u64) -> CompressedCache {
        CompressedCache {
            shards: Default::default(),
            per_shard: (BYTES / cluster_size as usize / SHARDS).clamp(1, 64),
        }
    }

    fn shard(&self, raw: u64) -> &Mutex<VecDeque<(u64, Decompressed)>> {
        &self.shards[(raw.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 61) as usize % SHARDS]
    }

    pub(super) fn get(&self, raw: u64) -> Option<Decompressed> {
        let shard = lock(self.shard(raw));
        shard.iter().find(|e| e.0 == raw).map(|e| Arc::clone(&e.1))
    }

    pub(super) fn insert(&self, raw: u64, data: Vec<u8>) -> Decompressed {
        let data = Arc::new(data);
        let mut shard = lock(self.shard(raw));
        if !shard.iter().any(|e| e.0 == raw) {
            while shard.len() >= self.per_shard {
                shard.pop_front();
            }
            shard.push_back((raw, Arc::clone(&data)));
        }
        data
    }
}
