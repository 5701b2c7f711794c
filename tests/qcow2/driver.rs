//! The driver under test, as the tests use it: over nodes, and by path.

use crate::image;
use crate::support::{Task, iothread, spawn_in};
use conbd::aio::IoThread;
use conbd::aio::engine::EngineChoice;
use conbd::block::qcow2::header::Purpose;
use conbd::block::qcow2::{Bitmaps, Qcow2Node, Qcow2OpenOptions, SnapshotSel};
use conbd::block::{
    BlockNode, Extent, FileNode, FileOptions, Format, Limits, OpenOptions, Result as BlockResult, SimClock,
    SimFile, StatusFlags, WriteFlags, co_open_qcow2, co_read_header,
};
use std::io::{IoSlice, IoSliceMut};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

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

/// Several IOThreads, and which opener is used: the one below, or (`real`) the daemon's.
pub(crate) struct Threads {
    pub(crate) all: Vec<IoThread>,
    real: AtomicBool,
}

impl Threads {
    pub(crate) fn new(n: usize) -> Threads {
        let all = (0..n).map(|i| iothread(&format!("io{i}"), EngineChoice::Threads)).collect();
        Threads { all, real: AtomicBool::new(false) }
    }

    /// From now on images are opened as the daemon opens them, with chain, locks and bitmaps; or not.
    pub(crate) fn open_really(&self, real: bool) {
        self.real.store(real, Ordering::Relaxed);
    }

    /// Starts something on one of them.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        i: usize,
        f: impl FnOnce() -> T + Send + 'static,
    ) -> Task<T> {
        spawn_in(self.all[i % self.all.len()].context(), f)
    }

    /// Opens an image by path.
    pub(crate) fn open(
        &self,
        path: &Path,
        read_only: bool,
        snapshot: Option<&str>,
    ) -> Result<Arc<Qcow2Node>, String> {
        let (path, snapshot) = (path.to_owned(), snapshot.map(str::to_owned));
        if self.real.load(Ordering::Relaxed) {
            return self.run(move || co_open_really(&path, read_only, snapshot.as_deref()));
        }
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

/// A file whose flushes do nothing: for the tests of the tests.
pub(crate) struct NoFlush(pub(crate) Arc<SimFile>);

impl BlockNode for NoFlush {
    fn name(&self) -> &str {
        self.0.name()
    }
    fn len(&self) -> u64 {
        self.0.len()
    }
    fn read_only(&self) -> bool {
        false
    }
    fn limits(&self) -> Limits {
        self.0.limits()
    }
    fn grows(&self) -> bool {
        true
    }
    fn co_truncate(&self, len: u64) -> BlockResult<()> {
        self.0.co_truncate(len)
    }
    fn co_preadv(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> BlockResult<()> {
        self.0.co_preadv(offset, bufs)
    }
    fn co_pwritev(&self, offset: u64, bufs: &[IoSlice<'_>], flags: WriteFlags) -> BlockResult<()> {
        self.0.co_pwritev(offset, bufs, flags)
    }
    fn co_pwrite_zeroes(&self, offset: u64, len: u64, flags: WriteFlags) -> BlockResult<()> {
        self.0.co_pwrite_zeroes(offset, len, flags)
    }
    fn co_pdiscard(&self, offset: u64, len: u64) -> BlockResult<()> {
        self.0.co_pdiscard(offset, len)
    }
    fn co_flush(&self) -> BlockResult<()> {
        Ok(())
    }
    fn co_block_status(&self, offset: u64, len: u64) -> BlockResult<Extent> {
        self.0.co_block_status(offset, len)
    }
}

/// What the driver lies on.
#[derive(Clone)]
pub(crate) struct Below {
    file: Arc<dyn BlockNode>,
    data: Option<Arc<dyn BlockNode>>,
    backing: Option<Arc<dyn BlockNode>>,
    pub(crate) arena_bytes: u64,
    /// What the bitmaps are written to, if not to the file itself.
    pub(crate) bitmaps_file: Option<Arc<dyn BlockNode>>,
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
            bitmaps_file: None,
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

/// Opens the driver for writing, with the image's bitmaps if it has some. Coroutine only.
pub(crate) fn co_open(below: &Below) -> Result<Arc<Qcow2Node>, String> {
    let node = Qcow2Node::co_open(Arc::clone(&below.file), below.options()).map_err(|e| e.to_string())?;
    let header = co_read_header(&*below.file, Purpose::Use).map_err(|e| e.to_string())?;
    let header = header.map_err(|e| e.to_string())?;
    let file = below.bitmaps_file.as_ref().unwrap_or(&below.file);
    if let Some(bitmaps) = Bitmaps::co_load(file, &header).map_err(|e| e.to_string())? {
        bitmaps.note(&node);
        node.set_write_hooks(vec![bitmaps]);
    }
    Ok(node)
}

/// Opens an image as the daemon does. Coroutine only.
fn co_open_really(path: &Path, read_only: bool, snapshot: Option<&str>) -> Result<Arc<Qcow2Node>, String> {
    let options = OpenOptions {
        format: Format::Qcow2,
        read_only,
        snapshot: snapshot.map(|s| SnapshotSel::Name(s.to_owned())),
        backing_probe: true,
        ..OpenOptions::new(path)
    };
    co_open_qcow2(&options).map_err(|e| e.to_string())
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
