//! The NBD protocol: server and client.
//!
//! `proto`, `wire`, `handshake`, `option` and `request` are pure: bytes in, values and actions out; no I/O, no
//! clock, no yield. `session` and `server` put them on sockets and coroutines.

pub mod access;
pub mod backing;
pub mod budget;
pub mod channel;
pub mod client;
mod conn;
pub mod export;
pub mod handshake;
mod listen;
pub mod meta;
mod option;
pub mod proto;
mod reader;
pub mod reply;
pub mod request;
pub mod server;
mod session;
pub mod tls;
pub mod wire;
