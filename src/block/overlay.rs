//! A temporary overlay: an image is shown as it is, and what is written goes to a file that nobody keeps (QEMU's `snapshot=on`).
//!
//! ```text
//!   Qcow2Node over a file in TMPDIR that has no name any more ── backing ──▶ the image, opened read-only
//! ```
//! The file is gone with its last descriptor, also after a crash. Since nothing of it outlives the process, it is never
//! synced: a flush ends in the page cache.

use super::file::{CacheMode, FileNode, FileOptions};
use super::graph::{OpenError, OpenOptions};
use super::lock_bytes::LockMode;
use super::qcow2::create::{CreateOptions, co_create};
use super::qcow2::{Qcow2Node, Qcow2OpenOptions};
use super::{BlockNode, DiscardMode};
use crate::co;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// Unit in which qcow2 counts a disk's size, in bytes.
const SECTOR: u64 = 512;

/// Where overlays are made: TMPDIR, else where large files may be (QEMU's choice, too).
fn folder() -> PathBuf {
    std::env::var_os("TMPDIR")
        .filter(|d| !d.is_empty())
        .map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from)
}

/// Puts an empty overlay over `image`. Coroutine only; yields.
///
/// # Errors
/// `Overlay`: the temporary file cannot be made, or the image's size is not a multiple of 512 bytes.
pub(super) fn co_overlay(
    options: &OpenOptions,
    image: Arc<dyn BlockNode>,
) -> Result<Arc<Qcow2Node>, OpenError> {
    let folder = folder();
    let fail = |source: io::Error| OpenError::Overlay { folder: folder.clone(), source };
    let len = image.len();
    if !len.is_multiple_of(SECTOR) {
        let source = io::Error::other("the image's size is not a multiple of 512 bytes");
        return Err(fail(source));
    }
    let opened = co::co_run_blocking(|| {
        let named = tempfile::Builder::new().prefix("conbd-overlay-").tempfile_in(&folder).map_err(&fail)?;
        // The name goes with `named`, at once; the node's own descriptor keeps the file.
        FileNode::open(&FileOptions {
            cache: CacheMode::Unsafe,
            discard: DiscardMode::Unmap,
            lock: LockMode::Off,
            growable: true,
            ..FileOptions::new(named.path())
        })
    });
    let file: Arc<dyn BlockNode> = Arc::new(opened?);
    co_create(&*file, None, &CreateOptions::new(len)).map_err(|e| fail(io::Error::other(e)))?;
    let how = Qcow2OpenOptions {
        backing: Some(image),
        discard: options.discard,
        l2_cache_bytes: options.l2_cache,
        ..Qcow2OpenOptions::default()
    };
    Qcow2Node::co_open(file, how)
        .map_err(|e| OpenError::Qcow2 { path: options.filename.clone(), source: Box::new(e) })
}
