//! The proof of qcow2: power failures, races, foreign images, broken images. A binary of its own, because it runs for a
//! minute or two.
//!
//! ```text
//! power.rs  crash states and the guest's oracle      world.rs   a seeded schedule over simulated files
//! image.rs  a second reader and checker              corpus.rs  images by qemu-img in every flavour
//! crash.rs  the crash suite; judge.rs proves it   grow.rs    crashes of disks that grow
//! races.rs   requests held in the middle, by hand
//! compat.rs with QEMU, both ways                 malformed.rs  broken images            driver.rs  the driver as used here
//! repair.rs repairs that power fails in          kill.rs    daemons that are killed
//! ```
//! Every random test prints its seed when it fails, and takes it back by `CONBD_SEED`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../it/cli_harness.rs"]
#[allow(dead_code, reason = "a tool box")]
mod cli_harness;
mod compat;
mod corpus;
mod crash;
mod driver;
mod grow;
mod image;
mod judge;
mod kill;
mod malformed;
mod power;
mod races;
mod repair;
#[path = "../it/support.rs"]
mod support;
mod world;
