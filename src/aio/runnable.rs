//! The trait through which a floor above (coroutines) is run by a context.

use super::AioContext;
use std::sync::Arc;

/// Something that a context can be asked to run on its home thread (coroutines implement this).
pub trait Runnable: Send + Sync {
    /// Runs on `ctx`'s home thread, in a later turn than the call that scheduled it.
    fn run(self: Arc<Self>, ctx: &Arc<AioContext>);
}
