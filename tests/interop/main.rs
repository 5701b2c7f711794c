//! Interoperability: the built `conbd` binary, driven by real clients of other projects.
//!
//! qemu-img, qemu-io, nbdinfo, nbdcopy, nbdsh, libnbd's Python bindings, fio's nbd engine and the crate `nbd`.
//! A program that is not installed fails the test that needs it, and the message says how to install it.
//! Every test has a server, an image and a socket (or a port that the kernel chose) of its own, so they run in
//! parallel.
//!
//! The main bodies run in four set-ups, which hold every pair of {unix, TCP} × {1, 3 IOThreads} × {io_uring,
//! threads}; see [`matrix!`]. Where io_uring is refused (containers), `CONBD_TEST_ENGINES=threads` runs all of
//! them with threads.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod harness;
#[path = "../it/pki.rs"]
#[expect(dead_code, reason = "the integration tests use the rest")]
mod pki;
mod tools;
mod wire;

mod copies;
mod crate_nbd;
mod fio;
mod flush;
mod hostile;
mod libnbd;
mod locks;
mod options;
mod qcow2_fio;
mod qemu;
mod qemu_nbd;
mod shutdown;
mod tls;
