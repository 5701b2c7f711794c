//! The bottom floor, importable by all: synchronisation shim, thin system calls, buffers, counters.

pub mod buf;
pub mod counters;
pub mod fast;
pub mod sync;
pub mod sys;
pub mod systemd;
