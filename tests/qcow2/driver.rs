//! The driver under test, as the tests use it: over nodes, and by path.

use crate::image;
use crate::support::{Task, iothread, spawn_in};
use conbd::aio::IoThread;
use conbd::aio::engine::EngineChoice;
use conbd::block::qcow2::{Qcow2Node, Qcow2OpenOptions, SnapshotSel};
use conbd::block::{BlockNode, FileNode, FileOptions, SimClock, SimFile, StatusFlags};
use std::io::IoSliceMut;
use std::path::Path;
use std::sync::Arc;

/// Reads all of a node. Coroutine only.
pub(crate) fn co_read_all(node: &dyn BlockNode) -> Result<Vec<u8>, String> {
    let mut data = vec![0xee; node.len() as usize];
    // Not aligned to anything.
    for (i, piece) in data.chunks_mut(177_777).enumerate() {
        let at = i as u64 * 177_777;
        node.co_preadv(at, &mut [IoSliceMut::new(piece)]).map_err(|e| format!("{e}: {}", e.source))?;
    }
    Ok(data)
}

/// Where two byte strings differ first.
pub(crate) fn difference(got: &[u8], want: &[u8]) -> Option<String> {
    if got.len() != want.len() {
        return Some(format!("{} bytes instead of {}", got.len(), want.len()));
    }
    let at = got.iter().zip(want).position(|(g, w)| g != w)?;
    Some(format!("byte {at:#x} is {:#x}, not {:#x}", got[at], want[at]))
}

/// Asks for the status of all of a node; ranges that are said to be zero are. Coroutine only.
pub(crate) fn co_check_status(node: &dyn BlockNode, content: &[u8]) -> Result<(), String> {
    let (mut at, end) = (0, node.len());
    while at < end {
        let e = node.co_block_status(at, end - at).map_err(|e| format!("{e}: {}", e.source))?;
        if e.len == 0 || e.len > end - at {
            return Err(format!("the extent at {at} has {} bytes", e.len));
        }
        let bytes = &content[at as usize..(at + e.len) as usize];
        if e.flags.contains(StatusFlags::ZERO) && bytes.iter().any(|&b| b != 0) {
            return Err(format!("{e:?} at {at} is not zero"));
        }
        at += e.len;
    }
    Ok(())
}

/// Several IOThreads.
pub(crate) struct Threads(pub(crate) Vec<IoThread>);

impl Threads {
    pub(crate) fn new(n: usize) -> Threads {
        Threads((0..n).map(|i| iothread(&format!("io{i}"), EngineChoice::Threads)).collect())
    }

    /// Starts something on one of them.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        i: usize,
        f: impl FnOnce() -> T + Send + 'static,
    ) -> Task<T> {
        spawn_in(self.0[i % self.0.len()].context(), f)
    }

    /// Opens an image by path.
    pub(crate) fn open(
        &self,
        path: &Path,
        read_only: bool,
        snapshot: Option<&str>,
    ) -> Result<Arc<Qcow2Node>, String> {
        let (path, snapshot) = (path.to_owned(), snapshot.map(str::to_owned));
        self.run(move || co_open_path(&path, read_only, snapshot.as_deref()))
    }

    /// Closes an image.
    #[track_caller]
    pub(crate) fn close(&self, node: Arc<Qcow2Node>) -> Result<(), String> {
        self.run(move || node.co_close().map_err(|e| format!("{e}: {}", e.source)))
    }

    #[track_caller]
    pub(crate) fn run<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> T {
        self.spawn(0, f).join()
    }
}

/// What the driver lies on.
#[derive(Clone)]
pub(crate) struct Below {
    file: Arc<dyn BlockNode>,
    data: Option<Arc<dyn BlockNode>>,
    backing: Option<Arc<dyn BlockNode>>,
    pub(crate) arena_bytes: u64,
}

impl Below {
    pub(crate) fn new(file: &Arc<SimFile>, data: Option<&Arc<SimFile>>, backing: &[u8]) -> Below {
        Below {
            file: Arc::clone(file) as Arc<dyn BlockNode>,
            data: data.map(|d| Arc::clone(d) as Arc<dyn BlockNode>),
            backing: (!backing.is_empty()).then(|| {
                SimFile::new("backing", backing.to_vec(), &SimClock::default()) as Arc<dyn BlockNode>
            }),
            arena_bytes: 4096,
        }
    }

    fn options(&self) -> Qcow2OpenOptions {
        Qcow2OpenOptions {
            data_file: self.data.clone(),
            backing: self.backing.clone(),
            // Few clusters in advance: what was freed is soon taken again.
            arena_bytes: Some(self.arena_bytes),
            ..Qcow2OpenOptions::default()
        }
    }
}

/// Opens the driver for writing. Coroutine only.
pub(crate) fn co_open(below: &Below) -> Result<Arc<Qcow2Node>, String> {
    Qcow2Node::co_open(Arc::clone(&below.file), below.options()).map_err(|e| e.to_string())
}

fn header_string(d: &[u8], at: usize, len: usize) -> Option<String> {
    String::from_utf8(d.get(at..at.checked_add(len)?)?.to_vec()).ok()
}

/// A header extension that is a text.
fn extension(d: &[u8], kind: u32) -> Option<String> {
    let mut at = if image::be32(d, 4) == 2 { 72 } else { image::be32(d, 100) as usize };
    loop {
        let (k, len) = (image::be32(d, at), image::be32(d, at + 4) as usize);
        if k == 0 || at > d.len() {
            return None;
        }
        if k == kind {
            return header_string(d, at + 8, len);
        }
        at += 8 + len.next_multiple_of(8);
    }
}

/// Opens an image by path with all that it refers to. Coroutine only.
pub(crate) fn co_open_path(
    path: &Path,
    read_only: bool,
    snapshot: Option<&str>,
) -> Result<Arc<Qcow2Node>, String> {
    let named = |e: String| if e.contains("image") { e } else { format!("image {}: {e}", path.display()) };
    co_open_chain(path, read_only, snapshot, 0).map_err(named)
}

fn co_open_chain(
    path: &Path,
    read_only: bool,
    snapshot: Option<&str>,
    depth: u32,
) -> Result<Arc<Qcow2Node>, String> {
    if depth > 3 {
        return Err(format!("{}: a loop", path.display()));
    }
    let Some(dir) = path.parent() else { return Err(format!("below: {} is no file", path.display())) };
    let file = |p: &Path, read_only: bool, growable: bool| -> Result<Arc<dyn BlockNode>, String> {
        let f = FileNode::open(&FileOptions { read_only, growable, ..FileOptions::new(p) });
        Ok(Arc::new(f.map_err(|e| e.to_string())?))
    };
    if !path.is_file() {
        return Err(format!("below: {} is no file", path.display()));
    }
    let d = std::fs::read(path).map_err(|e| e.to_string())?;
    let mut options = Qcow2OpenOptions {
        read_only,
        snapshot: snapshot.map(|s| SnapshotSel::Name(s.to_owned())),
        ..Qcow2OpenOptions::default()
    };
    let (at, len) = (image::be64(&d, 8) as usize, image::be32(&d, 16) as usize);
    if at != 0 {
        let name = header_string(&d, at, len).ok_or("the backing file's name is no text")?;
        let format = extension(&d, 0xe279_2aca);
        let below = dir.join(name);
        options.backing = Some(if format.as_deref() == Some("raw") {
            file(&below, true, false)?
        } else {
            co_open_chain(&below, true, None, depth + 1)?
        });
    }
    if image::be32(&d, 4) >= 3 && image::be64(&d, 72) & image::DATA_FILE != 0 {
        let name = extension(&d, 0x4441_5441).ok_or("the data file's name is missing")?;
        options.data_file = Some(file(&dir.join(name), read_only, true)?);
    }
    let read_only = read_only || snapshot.is_some();
    Qcow2Node::co_open(file(path, read_only, true)?, options).map_err(|e| e.to_string())
}
