//! Opening an image: from options to the node that a [`super::BlockBackend`] wraps.
//!
//! ```text
//!   FileNode ── format raw, given:   as it is, or a RawNode for a window
//!            ├─ format qcow2:         Qcow2Node with its chain (`chain`), and a RawNode above for a window
//!            └─ format probed:       qcow2; raw → RawNode that keeps image signatures out of the first sector;
//!                                    anything else → an error that names it
//! ```
//! Opening blocks (paths, locks, sysfs): the daemon does it before it serves; later only by [`co_open`].

use super::chain::{self, OpenRemote};
use super::file::{CacheMode, DiscardMode, FileNode, FileOptions};
use super::lock_bytes::LockMode;
use super::overlay;
use super::probe::{ForeignFormat, PROBE_LEN, probe};
use super::qcow2::{FormatError, Qcow2Error, Qcow2Node, SnapshotSel};
use super::raw::RawNode;
use super::{BlockNode, Error};
use crate::co;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

/// Format of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// Told by the first sector. A raw image found that way refuses writes that would make it look otherwise.
    #[default]
    Auto,
    /// The bytes as they are.
    Raw,
    /// QEMU copy-on-write, version 2 or 3, with everything that it names.
    Qcow2,
}

impl Format {
    /// All of them, with their names.
    pub const ALL: [(&'static str, Format); 3] =
        [("auto", Format::Auto), ("raw", Format::Raw), ("qcow2", Format::Qcow2)];
}

/// A word that is none of an option's values.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown {what} {word:?}, expected one of: {expected}")]
pub struct UnknownWord {
    what: &'static str,
    word: String,
    expected: String,
}

macro_rules! words {
    ($t:ty, $what:literal) => {
        impl FromStr for $t {
            type Err = UnknownWord;
            fn from_str(word: &str) -> Result<Self, UnknownWord> {
                let all = <$t>::ALL;
                all.iter().find(|a| a.0 == word).map(|a| a.1).ok_or_else(|| UnknownWord {
                    what: $what,
                    word: word.to_owned(),
                    expected: all.map(|a| a.0).join(", "),
                })
            }
        }
        impl std::fmt::Display for $t {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(<$t>::ALL.iter().find(|a| a.1 == *self).map_or("", |a| a.0))
            }
        }
    };
}

words!(Format, "format");
words!(CacheMode, "cache mode");
words!(DiscardMode, "discard mode");
words!(LockMode, "lock mode");

/// QEMU's sector, in bytes.
const SECTOR: u64 = 512;

/// What is opened, and how.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Regular file or block device.
    pub filename: PathBuf,
    /// Format.
    pub format: Format,
    /// Refuse writes.
    pub read_only: bool,
    /// Caching.
    pub cache: CacheMode,
    /// Discarding.
    pub discard: DiscardMode,
    /// Image locks.
    pub lock: LockMode,
    /// First byte of the file that is shown.
    pub offset: u64,
    /// How many bytes are shown; `None`: up to the file's end.
    pub size: Option<u64>,
    /// qcow2: show this internal snapshot, read-only.
    pub snapshot: Option<SnapshotSel>,
    /// qcow2: tell the format of backing images by their first sector where it is not recorded. Only when no guest
    /// ever wrote to a raw one.
    pub backing_probe: bool,
    /// qcow2: opens backing images that are not files; `None`: images may not name such. An image that somebody else made can
    /// have this process connect to wherever it says.
    pub remote: Option<Arc<dyn OpenRemote>>,
    /// qcow2: leave the backing image out; what is not in the image itself reads as zeroes. Read-only use.
    pub no_backing: bool,
    /// qcow2: bytes of L2 tables to keep in memory; `None`: all, up to a bound.
    pub l2_cache: Option<u64>,
    /// qcow2: dirty bitmaps that will be shown to clients: that they can be is checked.
    pub bitmaps: Vec<String>,
    /// Show a raw file in whole sectors of 512 bytes, as QEMU does: what its last one lacks reads as zeroes, and a write to it
    /// makes the file longer. Empty files are shown then, too.
    pub whole_sectors: bool,
    /// Open the image read-only, and keep what is written in a temporary overlay that is gone when the node is.
    pub temporary: bool,
}

impl OpenOptions {
    /// The defaults for a path: probed, read-write, writeback, unmap, locked, the whole file.
    pub fn new(filename: impl Into<PathBuf>) -> OpenOptions {
        OpenOptions {
            filename: filename.into(),
            format: Format::default(),
            read_only: false,
            cache: CacheMode::default(),
            discard: DiscardMode::default(),
            lock: LockMode::default(),
            offset: 0,
            size: None,
            snapshot: None,
            backing_probe: false,
            remote: None,
            no_backing: false,
            l2_cache: None,
            bitmaps: Vec::new(),
            whole_sectors: false,
            temporary: false,
        }
    }
}

/// Why an image cannot be opened; the text says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no such file.
    #[error(
        "image {path:?} does not exist; check the path, or create it (for example: truncate -s 10G FILE)"
    )]
    NotFound {
        /// Path as given.
        path: PathBuf,
    },
    /// The file for a temporary overlay cannot be made.
    #[error("cannot make a temporary overlay in {folder:?}: {source}; set TMPDIR to a folder with room")]
    Overlay {
        /// Where.
        folder: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file may not be opened that way.
    #[error("no permission to open image {path:?} for {how}; {hint}", how = how(*read_only), hint = hint(*read_only))]
    Permission {
        /// Path as given.
        path: PathBuf,
        /// Whether only reading was asked for.
        read_only: bool,
        /// What the system reported.
        source: io::Error,
    },
    /// The file system, or the device, is read-only.
    #[error("image {path:?} cannot be written, its file system or device is read-only; open it read-only")]
    ReadOnlyMedium {
        /// Path as given.
        path: PathBuf,
    },
    /// A directory.
    #[error("image {path:?} is a directory; give the path of a file or of a block device")]
    Directory {
        /// Path as given.
        path: PathBuf,
    },
    /// Neither a regular file nor a block device.
    #[error("image {path:?} is neither a regular file nor a block device")]
    NotAnImage {
        /// Path as given.
        path: PathBuf,
    },
    /// No bytes.
    #[error("image {path:?} is empty; {hint}", hint = if *device { "is there a medium in the device?" } else { "give it a size first (for example: truncate -s 10G FILE)" })]
    Empty {
        /// Path as given.
        path: PathBuf,
        /// Whether it is a device.
        device: bool,
    },
    /// `O_DIRECT` is not supported.
    #[error(
        "image {path:?} cannot be opened with O_DIRECT, its file system does not support it; use the cache mode writeback"
    )]
    NoDirect {
        /// Path as given.
        path: PathBuf,
    },
    /// Somebody else's lock stands against us.
    #[error("image {path:?} is in use: {meaning} (lock byte {byte}{holder}); end that program, or open the image read-only if it only reads, or see the lock modes shared and off", holder = holder.as_ref().map(|h| format!(", held by {h}")).unwrap_or_default())]
    Locked {
        /// Path as given.
        path: PathBuf,
        /// The byte of QEMU's image locks that is held.
        byte: u64,
        /// What it means.
        meaning: &'static str,
        /// Who holds it, if that could be found out.
        holder: Option<String>,
    },
    /// Locks do not work there.
    #[error(
        "image {path:?} cannot be locked, its file system does not support it; if no other program uses the image, use the lock mode off"
    )]
    CannotLock {
        /// Path as given.
        path: PathBuf,
        /// What the system reported.
        source: io::Error,
    },
    /// A format that this version does not know.
    #[error(
        "image {path:?} looks like {format}, which this version does not support; use the format raw to serve the bytes as they are"
    )]
    ForeignFormat {
        /// Path as given.
        path: PathBuf,
        /// What it looks like.
        format: ForeignFormat,
    },
    /// The window is not inside of the file.
    #[error("the window of image {path:?} (offset {offset}{size}) is not inside of its {len} bytes", size = size.map(|s| format!(", size {s}")).unwrap_or_default())]
    Window {
        /// Path as given.
        path: PathBuf,
        /// Its first byte.
        offset: u64,
        /// Its size.
        size: Option<u64>,
        /// The file's size.
        len: u64,
    },
    /// The bytes are not those of a qcow2 image that this version can open.
    #[error("image {path:?}: {source}")]
    Qcow2Format {
        /// Path as given.
        path: PathBuf,
        /// What is wrong, and where.
        source: Box<FormatError>,
    },
    /// A qcow2 image cannot be opened.
    #[error("{source}")]
    Qcow2 {
        /// Path as given.
        path: PathBuf,
        /// Why.
        source: Box<Qcow2Error>,
    },
    /// What a qcow2 image names cannot be followed.
    #[error("image {path:?}: {problem}")]
    Chain {
        /// The image that names it.
        path: PathBuf,
        /// What and why.
        problem: String,
    },
    /// A file comes twice in what an image consists of.
    #[error(
        "image {path:?} is used twice in one backing chain: the chain is a loop, or names one file in two roles"
    )]
    ChainLoop {
        /// The file.
        path: PathBuf,
    },
    /// Another export of this process has it.
    #[error(
        "image {path:?} is in use by another export of this server, and a qcow2 image that is written has one user; export it once, or everywhere read-only"
    )]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// A backing image whose format nobody recorded.
    #[error(
        "image {path:?} does not record the format of its backing file {name:?}; record it (qemu-img rebase -u -b FILE -F raw|qcow2 IMAGE), or allow probing if no guest ever wrote to that file as a raw disk"
    )]
    NoBackingFormat {
        /// The image that names it.
        path: PathBuf,
        /// The backing file.
        name: PathBuf,
    },
    /// The backing image cannot be opened.
    #[error("backing file of image {path:?}: {source}")]
    Backing {
        /// The image that names it.
        path: PathBuf,
        /// Why.
        source: Box<OpenError>,
    },
    /// The external data file cannot be opened.
    #[error("external data file of image {path:?}: {source}")]
    DataFile {
        /// The image that names it.
        path: PathBuf,
        /// Why.
        source: Box<OpenError>,
    },
    /// An option that goes with qcow2 only.
    #[error("image {path:?} is raw; {option} needs a qcow2 image")]
    NotQcow2 {
        /// Path as given.
        path: PathBuf,
        /// Which.
        option: &'static str,
    },
    /// Anything else.
    #[error("cannot open image {path:?}")]
    Io {
        /// Path as given.
        path: PathBuf,
        /// What the system reported.
        source: io::Error,
    },
}

fn how(read_only: bool) -> &'static str {
    if read_only { "reading" } else { "reading and writing" }
}

fn hint(read_only: bool) -> &'static str {
    if read_only {
        "change its owner or mode, or run as a user that may"
    } else {
        "change its owner or mode, run as a user that may, or open it read-only"
    }
}

impl OpenError {
    pub(crate) fn io(path: &Path, read_only: bool, source: io::Error) -> OpenError {
        let path = path.to_owned();
        match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => OpenError::NotFound { path },
            Some(libc::EACCES | libc::EPERM) => OpenError::Permission { path, read_only, source },
            Some(libc::EROFS) => OpenError::ReadOnlyMedium { path },
            Some(libc::EISDIR) => OpenError::Directory { path },
            Some(libc::ENXIO) => OpenError::NotAnImage { path },
            _ => OpenError::Io { path, source },
        }
    }

    /// The errno behind it.
    #[must_use]
    pub fn errno(&self) -> i32 {
        let of = |e: &io::Error| e.raw_os_error().unwrap_or(libc::EIO);
        match self {
            OpenError::NotFound { .. } => libc::ENOENT,
            OpenError::Permission { source, .. }
            | OpenError::CannotLock { source, .. }
            | OpenError::Io { source, .. } => of(source),
            OpenError::ReadOnlyMedium { .. } => libc::EROFS,
            OpenError::Directory { .. } => libc::EISDIR,
            OpenError::Locked { .. } => libc::EAGAIN,
            OpenError::ForeignFormat { .. } => libc::ENOTSUP,
            OpenError::Qcow2Format { source, .. } => source.errno(),
            OpenError::Qcow2 { source, .. } => source.errno(),
            OpenError::Backing { source, .. } | OpenError::DataFile { source, .. } => source.errno(),
            OpenError::Overlay { source, .. } => source.raw_os_error().unwrap_or(libc::EINVAL),
            OpenError::InUse { .. } => libc::EBUSY,
            OpenError::ChainLoop { .. } => libc::ELOOP,
            OpenError::Chain { .. } | OpenError::NoBackingFormat { .. } | OpenError::NotQcow2 { .. } => {
                libc::EINVAL
            }
            OpenError::NotAnImage { .. }
            | OpenError::Empty { .. }
            | OpenError::NoDirect { .. }
            | OpenError::Window { .. } => libc::EINVAL,
        }
    }
}

/// Opens and locks an image. Blocks: before serving, or by [`co_open`]. Not in a coroutine.
///
/// # Errors
/// See [`OpenError`].
pub fn open(options: &OpenOptions) -> Result<Arc<dyn BlockNode>, OpenError> {
    if options.temporary {
        let copy = options.clone();
        return co::run_to_end(move || co_open(&copy))
            .map_err(|source| OpenError::Io { path: options.filename.clone(), source })?;
    }
    let (file, qcow2) = open_file(options)?;
    if !qcow2 {
        return raw(options, file);
    }
    // What reads an image's tables yields: it gets an event loop of its own.
    let copy = options.clone();
    let node = co::run_to_end(move || chain::co_open_qcow2(&copy, file))
        .map_err(|source| OpenError::Io { path: options.filename.clone(), source })??;
    window(options, node)
}

/// Opens and locks a qcow2 image with all that it names, without a window. Coroutine only; yields.
///
/// # Errors
/// See [`OpenError`]; `NotQcow2` for a raw image.
pub fn co_open_qcow2(options: &OpenOptions) -> Result<Arc<Qcow2Node>, OpenError> {
    let (file, qcow2) = co::co_run_blocking(|| open_file(options))?;
    if !qcow2 {
        return Err(OpenError::NotQcow2 { path: options.filename.clone(), option: "this" });
    }
    chain::co_open_qcow2(options, file)
}

/// [`open`], from a coroutine: what blocks runs on the context's thread pool. Coroutine only; yields.
///
/// # Errors
/// See [`OpenError`].
pub fn co_open(options: &OpenOptions) -> Result<Arc<dyn BlockNode>, OpenError> {
    if options.temporary {
        let below = OpenOptions { temporary: false, read_only: true, ..options.clone() };
        return Ok(overlay::co_overlay(options, co_open(&below)?)?);
    }
    let (file, qcow2) = co::co_run_blocking(|| open_file(options))?;
    if !qcow2 {
        return raw(options, file);
    }
    window(options, chain::co_open_qcow2(options, file)?)
}

/// Opens the file, and tells whether it is qcow2.
fn open_file(options: &OpenOptions) -> Result<(FileNode, bool), OpenError> {
    let path = &options.filename;
    let given = options.format == Format::Qcow2;
    let odd = |m: std::fs::Metadata| m.is_file() && (m.len() == 0 || !m.len().is_multiple_of(SECTOR));
    let padded = options.whole_sectors && std::fs::metadata(path).is_ok_and(odd);
    let file = FileNode::open(&FileOptions {
        path: path.clone(),
        read_only: options.read_only || options.snapshot.is_some(),
        cache: options.cache,
        discard: options.discard,
        lock: options.lock,
        growable: given || padded,
    })?;
    if options.format != Format::Auto {
        return Ok((file, given));
    }
    let head = file.read_head(PROBE_LEN).map_err(|source| OpenError::Io { path: path.clone(), source })?;
    match probe(&head) {
        None => Ok((file, false)),
        Some(ForeignFormat::Qcow2) => Ok((file.into_growable(), true)),
        Some(format) => Err(OpenError::ForeignFormat { path: path.clone(), format }),
    }
}

fn raw(options: &OpenOptions, file: FileNode) -> Result<Arc<dyn BlockNode>, OpenError> {
    if options.snapshot.is_some() {
        return Err(OpenError::NotQcow2 { path: options.filename.clone(), option: "an internal snapshot" });
    }
    if options.format == Format::Auto && !options.read_only {
        tracing::info!(
            node = %file.name(),
            "format not given, probed as raw: writes that put another format's signature into the first sector \
             will be refused; give the format raw to allow them"
        );
    }
    window(options, Arc::new(file))
}

/// The part of the node that is to be shown, and the guard of a probed raw image.
fn window(options: &OpenOptions, node: Arc<dyn BlockNode>) -> Result<Arc<dyn BlockNode>, OpenError> {
    let path = &options.filename;
    let len = node.len();
    let guard = !node.is_format()
        && options.format == Format::Auto
        && options.offset < PROBE_LEN as u64
        && !options.read_only;
    // Only a file that is to be shown in whole sectors grows here.
    let padded = options.whole_sectors && !node.is_format() && node.grows();
    // A size that was asked for holds when the image becomes larger, too.
    if options.offset == 0 && options.size.is_none() && !guard && !padded {
        return Ok(node);
    }
    let name = node.name().to_owned();
    let outside =
        || OpenError::Window { path: path.clone(), offset: options.offset, size: options.size, len };
    let raw = match padded {
        true => RawNode::rounded_up(&name, node, SECTOR, options.offset, options.size),
        false => RawNode::new(&name, node, options.offset, options.size),
    };
    let raw = raw.map_err(|_: Error| outside())?;
    if raw.is_empty() && !(padded && len == 0) {
        return Err(outside());
    }
    Ok(if guard { Arc::new(raw.with_probe_guard()) } else { Arc::new(raw) })
}
