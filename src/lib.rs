//! conbd: a network block device server with QEMU's block-layer design, made multi-threaded.
//!
//! ```text
//! main → cli → daemon → reload → { config, telemetry, nbd, block, co, aio }
//! nbd → block, co, aio     block → co, aio     co → aio     aio → util
//! ```
//!
//! The modules, in layer order:
//!
//! - [`util`]: thin system calls, buffer pools, counters. Imports nothing of the crate.
//! - [`aio`]: the event loop. An [`aio::AioContext`] is owned by one thread and runs bottom halves,
//!   fd handlers, timers and asynchronous file I/O. Knows no coroutine, no NBD, no image.
//! - [`co`]: stackful coroutines scheduled by AioContexts, and the locks between them.
//! - [`block`]: images, as a graph of nodes.
//! - [`nbd`]: the protocol, server and client.
//! - [`config`], [`telemetry`], [`reload`], [`daemon`], [`cli`]: the program around them.

pub mod aio;
pub mod block;
pub mod cli;
pub mod co;
pub mod config;
pub mod daemon;
pub mod nbd;
pub mod reload;
pub mod telemetry;
pub mod util;
