//! BlockBackend: what an export holds on a graph: in-flight count, drain, limits, bounds asserts.

use super::BlockNode;
use std::sync::Arc;

/// The user's end of a block graph.
pub struct BlockBackend {
    root: Arc<dyn BlockNode>,
}

impl BlockBackend {
    /// Wraps the root node.
    pub fn new(root: Arc<dyn BlockNode>) -> Arc<BlockBackend> {
        Arc::new(BlockBackend { root })
    }

    /// The root node. (The helper adds: co_* forwarding with in-flight counting, drain_begin/drain_end, in_flight().)
    #[must_use]
    pub fn root(&self) -> &Arc<dyn BlockNode> {
        &self.root
    }
}
