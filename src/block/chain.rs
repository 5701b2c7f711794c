//! Opening a qcow2 image with all that it names: data files, and its chain of backing images.
//!
//! ```text
//!   overlay.qcow2 ──names──▶ middle.qcow2 ──names──▶ base.raw        walked downwards, in a loop and not recursively
//!       Qcow2Node ──────────▶ Qcow2Node ───────────▶ RawNode          built upwards, when the last is known
//! ```
//! Names in an image are followed only as far as is safe: relative to the image that holds them; files, and NBD servers only where
//! that was allowed ([`OpenRemote`]); never from what a server holds back to files of this host; no file twice; not deeper than [`MAX_DEPTH`]; the format of a backing image must be recorded, because a guest that can
//! write a raw backing image's first sector could otherwise have any file of the host opened (CVE-2008-2004).
//!
//! Backing images are opened read-only. A file that belongs to a qcow2 image which is open for writing is not opened a
//! second time in this process ([`Claim`]), whatever the lock mode: locks are told to be off by people, and two writers
//! of one qcow2 image destroy it.

use super::file::{DiscardMode, FileNode, FileOptions};
use super::graph::{OpenError, OpenOptions};
use super::probe::{ForeignFormat, PROBE_LEN, probe};
use super::qcow2::header::{self, Header, Incompatible, Purpose};
use super::qcow2::{Bitmaps, Qcow2Node, Qcow2OpenOptions};
use super::raw::RawNode;
use super::wait::lock;
use super::{BlockNode, Result};
use crate::co;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::IoSliceMut;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Images in a chain at most (QEMU's).
pub const MAX_DEPTH: usize = 200;

/// Longest `json:` name that is looked at is the longest name there is; this is how deep it may nest (ours).
const JSON_DEPTH: usize = 8;

/// Why a name of a server is not followed.
const NOT_ALLOWED: &str = "on an NBD server, and images may not have us connect to servers unless that is allowed: \
                           conbd serve --allow-backing-nbd, or backing_nbd = true in its configuration file";

/// Why a file's name is not followed.
const FROM_AFAR: &str =
    "it comes from an NBD server, and names a file; what a server holds must not open files of this host";

/// Files of qcow2 images that this process has open: by device and inode, how many users; `usize::MAX`: a writer.
static CLAIMS: Mutex<Option<HashMap<(u64, u64), usize>>> = Mutex::new(None);

/// A file's entry in the process's table of files in use by qcow2 images.
#[derive(Debug)]
pub(super) struct Claim(u64, u64);

impl Claim {
    /// Takes the file, alone or together with others; `None`: somebody's use stands against it.
    fn take((dev, ino): (u64, u64), alone: bool) -> Option<Claim> {
        let mut table = lock(&CLAIMS);
        let users = table.get_or_insert_default().entry((dev, ino)).or_insert(0);
        if *users == usize::MAX || alone && *users > 0 {
            return None;
        }
        *users = if alone { usize::MAX } else { *users + 1 };
        Some(Claim(dev, ino))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut table = lock(&CLAIMS);
        let Some(table) = table.as_mut() else { return };
        if let Some(users) = table.get_mut(&(self.0, self.1)) {
            *users = if *users == usize::MAX { 0 } else { *users - 1 };
            if *users == 0 {
                table.remove(&(self.0, self.1));
            }
        }
    }
}

/// A name in an image of something that is no file of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RemoteName {
    /// `nbd:…`, `nbd://…`, `nbd+unix://…` and their like.
    Name(String),
    /// What a `json:` name with the driver nbd says, flat, without the driver.
    Keys(BTreeMap<String, String>),
}

impl std::fmt::Display for RemoteName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            RemoteName::Name(name) => write!(f, "{name:?}"),
            RemoteName::Keys(keys) => write!(f, "json: {keys:?}"),
        }
    }
}

/// Opens what is no file: this floor knows no protocol.
pub trait OpenRemote: Send + Sync + std::fmt::Debug {
    /// Opens what the name stands for, read-only; `from_afar`: the image that names it is itself held by another machine, and must
    /// not have us use sockets of this host. Names of nodes are alike only if they are the same thing. Coroutine only;
    /// yields.
    ///
    /// # Errors
    /// What is wrong with the name, or why there is nothing, in one line.
    fn co_open(&self, name: &RemoteName, from_afar: bool) -> std::result::Result<Arc<dyn BlockNode>, String>;
}

/// Where a backing image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackingName {
    /// A file, or a device.
    File(PathBuf),
    /// Something else.
    Remote(RemoteName),
}

/// What a backing file's name stands for.
#[derive(Debug, PartialEq, Eq)]
struct Target {
    place: BackingName,
    /// `None`: told by nobody.
    format: Option<LayerFormat>,
}

impl Target {
    /// For messages.
    fn shown(&self) -> PathBuf {
        match &self.place {
            BackingName::File(path) => path.clone(),
            BackingName::Remote(name) => PathBuf::from(name.to_string()),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LayerFormat {
    Raw,
    Qcow2,
}

impl LayerFormat {
    fn parse(name: &str) -> std::result::Result<LayerFormat, String> {
        match name {
            "qcow2" => Ok(LayerFormat::Qcow2),
            // QEMU lets protocol drivers stand for "the bytes as they are".
            "raw" | "file" | "host_device" | "nbd" => Ok(LayerFormat::Raw),
            other => Err(format!("the backing format {other:?} is not supported, only raw and qcow2 are")),
        }
    }
}

/// A qcow2 image of the chain, as read before anything is built.
struct Layer {
    path: PathBuf,
    file: Arc<dyn BlockNode>,
    data_file: Option<Arc<dyn BlockNode>>,
    header: Header,
}

/// Reads the header of the image in `file`. Coroutine only; yields.
///
/// # Errors
/// What could not be read; or what is wrong with it.
pub fn co_read_header(
    file: &dyn BlockNode,
    purpose: Purpose,
) -> Result<std::result::Result<Header, super::qcow2::FormatError>> {
    let mut head = vec![0u8; header::PEEK_LEN.min(usize::try_from(file.len()).unwrap_or(usize::MAX))];
    file.co_preadv(0, &mut [IoSliceMut::new(&mut head)])?;
    let len = match header::prefix_len(&head) {
        Ok(len) => len,
        Err(e) => return Ok(Err(e)),
    };
    let mut cluster = vec![0u8; len];
    let there = len.min(usize::try_from(file.len()).unwrap_or(usize::MAX));
    file.co_preadv(0, &mut [IoSliceMut::new(&mut cluster[..there])])?;
    Ok(Header::parse(&cluster, purpose))
}

/// Opens a file for a layer: growable, claimed. Blocks.
fn open_file(
    path: &Path,
    options: &OpenOptions,
    read_only: bool,
) -> std::result::Result<FileNode, OpenError> {
    FileNode::open(&FileOptions {
        path: path.to_owned(),
        read_only,
        cache: options.cache,
        discard: if read_only { DiscardMode::Ignore } else { options.discard },
        lock: options.lock,
        growable: true,
    })
}

/// Opens the image in `top` and all that it names. Coroutine only; yields.
pub(super) fn co_open_qcow2(
    options: &OpenOptions,
    top: FileNode,
) -> std::result::Result<Arc<Qcow2Node>, OpenError> {
    let writable = !options.read_only && options.snapshot.is_none();
    let mut seen = HashSet::new();
    let mut layers: Vec<Layer> = Vec::new();
    let mut seen_remote = HashSet::new();
    let top: Arc<dyn BlockNode> = Arc::new(claim(top, &options.filename, writable, &mut seen)?);
    // Whether what holds the image is a file of this host.
    let mut next = Some((options.filename.clone(), top, true));
    let mut base: Option<Arc<dyn BlockNode>> = None;
    while let Some((path, file, local)) = next.take() {
        let fail = |problem: String| OpenError::Chain { path: path.clone(), problem };
        let header = co_read_header(&*file, Purpose::Use)
            .map_err(|e| OpenError::Io { path: path.clone(), source: e.source })?
            .map_err(|e| OpenError::Qcow2Format { path: path.clone(), source: Box::new(e) })?;
        let layer_writable = writable && layers.is_empty();
        if layer_writable && header.incompatible.contains(Incompatible::DIRTY) {
            super::qcow2::check::co_repair_dirty(&*file)
                .map_err(|e| fail(format!("it was not closed cleanly, and its repair failed: {e}")))?;
        }
        let data_file = match header.has_data_file() {
            false => None,
            true if !local => return Err(fail(FROM_AFAR.to_owned())),
            true => Some(co_open_data_file(&path, &header, options, layer_writable, &mut seen)?),
        };
        let backing =
            if options.no_backing && layers.is_empty() { None } else { header.backing_file.clone() };
        let format = header.backing_format.clone();
        layers.push(Layer { path: path.clone(), file, data_file, header });
        let Some(name) = backing else { break };
        let target = resolve(&path, &name, format.as_deref()).map_err(fail)?;
        if layers.len() >= MAX_DEPTH {
            return Err(fail(format!("its backing chain is deeper than {MAX_DEPTH} images")));
        }
        let nested = |source: OpenError| OpenError::Backing { path: path.clone(), source: Box::new(source) };
        let below = match &target.place {
            BackingName::Remote(name) => {
                let Some(opener) = &options.remote else {
                    return Err(fail(format!("its backing image {name} is {NOT_ALLOWED}")));
                };
                let node = opener
                    .co_open(name, !local)
                    .map_err(|why| fail(format!("its backing image {name}: {why}")))?;
                if !seen_remote.insert(node.name().to_owned()) {
                    return Err(OpenError::ChainLoop { path: node.name().into() });
                }
                node
            }
            BackingName::File(_) if !local => return Err(fail(FROM_AFAR.to_owned())),
            BackingName::File(below) => {
                let file = co_open_below(below, options, &mut seen).map_err(nested)?;
                Arc::new(file) as Arc<dyn BlockNode>
            }
        };
        let is_file = matches!(target.place, BackingName::File(_));
        match co_layer_format(&target, &*below, options).map_err(|e| e.at(&path))? {
            LayerFormat::Qcow2 => next = Some((target.shown(), below, is_file)),
            LayerFormat::Raw => {
                let name = below.name().to_owned();
                let len = below.len();
                // A window of the size that it has now: below a format, a file would answer past its end.
                let raw = RawNode::new(&name, below, 0, Some(len))
                    .map_err(|e| OpenError::Io { path: target.shown(), source: e.source })?;
                base = Some(Arc::new(raw));
            }
        }
    }
    // From the bottom upwards; the top is what is left over.
    let top = layers.remove(0);
    for layer in layers.into_iter().rev() {
        let node = co_build(layer, base.take(), options, true)?;
        base = Some(node);
    }
    co_build(top, base, options, false)
}

/// Opens the file of a backing image. Yields.
fn co_open_below(
    path: &Path,
    options: &OpenOptions,
    seen: &mut HashSet<(u64, u64)>,
) -> std::result::Result<FileNode, OpenError> {
    // A loop is told before the lock that the image itself holds stands against opening it again.
    let opened = co::co_run_blocking(|| match std::fs::metadata(path) {
        Ok(m) if m.is_file() && seen.contains(&(m.dev(), m.ino())) => {
            Err(OpenError::ChainLoop { path: path.to_owned() })
        }
        _ => open_file(path, options, true),
    });
    claim(opened?, path, false, seen)
}

fn co_build(
    layer: Layer,
    backing: Option<Arc<dyn BlockNode>>,
    options: &OpenOptions,
    below: bool,
) -> std::result::Result<Arc<Qcow2Node>, OpenError> {
    let Layer { path, file, data_file, header } = layer;
    let fail = |problem: String| OpenError::Chain { path: path.clone(), problem };
    let writable = !below && !options.read_only && options.snapshot.is_none();
    let mut bitmaps = None;
    if !below && options.snapshot.is_none() && (writable || !options.bitmaps.is_empty()) {
        bitmaps = Bitmaps::co_load(&file, &header).map_err(|e| fail(format!("its bitmaps: {e}")))?;
    }
    for name in if below { &[][..] } else { &options.bitmaps } {
        let why = bitmaps.as_ref().map_or(Some("the image has no bitmaps"), |b| b.why_not(name));
        if let Some(why) = why {
            return Err(fail(format!("bitmap {name:?} cannot be exported: {why}")));
        }
    }
    let how = Qcow2OpenOptions {
        read_only: options.read_only || below,
        snapshot: if below { None } else { options.snapshot.clone() },
        data_file,
        backing,
        discard: options.discard,
        l2_cache_bytes: options.l2_cache,
        ..Qcow2OpenOptions::default()
    };
    let node = Qcow2Node::co_open(file, how)
        .map_err(|e| OpenError::Qcow2 { path: path.clone(), source: Box::new(e) })?;
    if let Some(bitmaps) = bitmaps {
        if writable {
            bitmaps.note(&node);
        }
        node.set_write_hooks(vec![bitmaps]);
    }
    Ok(node)
}

/// Enters a file into the tables of what is open: in this chain, and in the process.
fn claim(
    mut file: FileNode,
    path: &Path,
    alone: bool,
    seen: &mut HashSet<(u64, u64)>,
) -> std::result::Result<FileNode, OpenError> {
    let id = file.id().map_err(|source| OpenError::Io { path: path.to_owned(), source })?;
    if !seen.insert(id) {
        return Err(OpenError::ChainLoop { path: path.to_owned() });
    }
    match Claim::take(id, alone) {
        Some(claim) => file.keep_claim(claim),
        None => return Err(OpenError::InUse { path: path.to_owned() }),
    }
    Ok(file)
}

fn co_open_data_file(
    path: &Path,
    header: &Header,
    options: &OpenOptions,
    writable: bool,
    seen: &mut HashSet<(u64, u64)>,
) -> std::result::Result<Arc<dyn BlockNode>, OpenError> {
    let fail = |problem: String| OpenError::Chain { path: path.to_owned(), problem };
    let Some(name) = &header.data_file else {
        return Err(fail("it has an external data file, but does not name it".to_owned()));
    };
    let target = plain_path(path, name).map_err(|e| fail(format!("external data file: {e}")))?;
    let opened = co::co_run_blocking(|| open_file(&target, options, !writable));
    let nested = |source: OpenError| OpenError::DataFile { path: path.to_owned(), source: Box::new(source) };
    Ok(Arc::new(claim(opened.map_err(nested)?, &target, writable, seen).map_err(nested)?))
}

enum LayerError {
    Read(std::io::Error),
    Unknown(PathBuf),
    Foreign(PathBuf, ForeignFormat),
}

impl LayerError {
    fn at(self, path: &Path) -> OpenError {
        let path = path.to_owned();
        match self {
            LayerError::Read(source) => OpenError::Io { path, source },
            LayerError::Unknown(name) => OpenError::NoBackingFormat { path, name },
            LayerError::Foreign(name, format) => {
                let source = Box::new(OpenError::ForeignFormat { path: name, format });
                OpenError::Backing { path, source }
            }
        }
    }
}

fn co_layer_format(
    target: &Target,
    node: &dyn BlockNode,
    options: &OpenOptions,
) -> std::result::Result<LayerFormat, LayerError> {
    if let Some(format) = target.format {
        return Ok(format);
    }
    if !options.backing_probe {
        return Err(LayerError::Unknown(target.shown()));
    }
    let mut head = vec![0; PROBE_LEN.min(usize::try_from(node.len()).unwrap_or(PROBE_LEN))];
    node.co_preadv(0, &mut [IoSliceMut::new(&mut head)]).map_err(|e| LayerError::Read(e.source))?;
    match probe(&head) {
        Some(ForeignFormat::Qcow2) => Ok(LayerFormat::Qcow2),
        Some(other) => Err(LayerError::Foreign(target.shown(), other)),
        None => Ok(LayerFormat::Raw),
    }
}

/// Where the image below the one at `image` is, and its format if that is told; `None`: there is none.
///
/// # Errors
/// Why the name cannot be followed.
pub fn backing_of(
    image: &Path,
    header: &Header,
) -> std::result::Result<Option<(BackingName, Option<&'static str>)>, String> {
    let Some(name) = &header.backing_file else { return Ok(None) };
    let target = resolve(image, name, header.backing_format.as_deref())?;
    let format = target.format.map(|f| match f {
        LayerFormat::Raw => "raw",
        LayerFormat::Qcow2 => "qcow2",
    });
    Ok(Some((target.place, format)))
}

/// What a backing file name means, in an image at `image`.
fn resolve(image: &Path, name: &[u8], format: Option<&[u8]>) -> std::result::Result<Target, String> {
    let format = match format {
        None | Some(b"") => None,
        Some(f) => Some(LayerFormat::parse(&String::from_utf8_lossy(f))?),
    };
    let Some(json) = name.strip_prefix(b"json:") else {
        return Ok(Target { place: plain_name(image, name)?, format });
    };
    let value: Value = serde_json::from_slice(json)
        .map_err(|e| format!("its backing file name is json: with a mistake: {e}"))?;
    let Value::Object(object) = value else {
        return Err("its backing file name is json:, but no object".to_owned());
    };
    let mut flat = Map::new();
    flatten("", object, 0, &mut flat)?;
    from_json(image, &flat, format)
}

/// Writes `{"file": {"driver": …}}` as `file.driver`, which QEMU takes to be the same.
fn flatten(
    prefix: &str,
    object: Map<String, Value>,
    depth: usize,
    out: &mut Map<String, Value>,
) -> std::result::Result<(), String> {
    if depth > JSON_DEPTH {
        return Err(format!("its json: backing file name nests deeper than {JSON_DEPTH}"));
    }
    for (key, value) in object {
        let key = format!("{prefix}{key}");
        match value {
            Value::Object(inner) => flatten(&format!("{key}."), inner, depth + 1, out)?,
            other => {
                out.insert(key, other);
            }
        }
    }
    Ok(())
}

fn from_json(
    image: &Path,
    flat: &Map<String, Value>,
    recorded: Option<LayerFormat>,
) -> std::result::Result<Target, String> {
    let word = |key: &str| flat.get(key).and_then(Value::as_str);
    let unsupported = |what: &str| format!("its json: backing file name has {what}, which is not supported");
    if word("file.driver") == Some("nbd") && !flat.contains_key("file.filename") {
        let format = match word("driver") {
            Some(driver @ ("raw" | "qcow2")) => Some(LayerFormat::parse(driver)?),
            Some(other) => return Err(unsupported(&format!("the driver {other:?}"))),
            None => recorded,
        };
        return Ok(Target { place: BackingName::Remote(remote_keys(flat, "file.")?), format });
    }
    if word("driver") == Some("nbd") && !flat.contains_key("filename") {
        let format = recorded.or(Some(LayerFormat::Raw));
        return Ok(Target { place: BackingName::Remote(remote_keys(flat, "")?), format });
    }
    for key in flat.keys() {
        let known = ["driver", "filename", "file.driver", "file.filename"];
        let harmless = HARMLESS.contains(&key.strip_prefix("file.").unwrap_or(key));
        if !known.contains(&key.as_str()) && !harmless {
            return Err(unsupported(&format!("the key {key:?}")));
        }
    }
    let protocol = |driver: Option<&str>| match driver {
        None | Some("file" | "host_device" | "nbd") => Ok(()),
        Some(other) => Err(unsupported(&format!("the driver {other:?}"))),
    };
    let (name, format) = if let Some(name) = word("file.filename") {
        protocol(word("file.driver"))?;
        let format = match word("driver") {
            Some(driver @ ("raw" | "qcow2")) => Some(LayerFormat::parse(driver)?),
            Some(other) => return Err(unsupported(&format!("the driver {other:?}"))),
            None => recorded,
        };
        (name, format)
    } else if let Some(name) = word("filename") {
        protocol(word("driver"))?;
        // A file by its driver is the bytes as they are, unless the image says what they are.
        (name, recorded.or(word("driver").map(|_| LayerFormat::Raw)))
    } else {
        return Err(unsupported("no filename"));
    };
    Ok(Target { place: plain_name(image, name.as_bytes())?, format })
}

/// What QEMU writes along in `json:` names; it says what holds anyway for a backing image.
const HARMLESS: [&str; 3] = ["read-only", "auto-read-only", "node-name"];

/// The keys of a `json:` name with the driver nbd, which stands at `prefix`.
fn remote_keys(flat: &Map<String, Value>, prefix: &str) -> std::result::Result<RemoteName, String> {
    let mut keys = BTreeMap::new();
    for (key, value) in flat {
        let inner = key.strip_prefix(prefix);
        if HARMLESS.contains(&inner.unwrap_or(key)) || inner == Some("driver") {
            continue;
        }
        let value = match value {
            Value::String(text) => text.clone(),
            Value::Number(n) => n.to_string(),
            _ => {
                return Err(format!(
                    "its json: backing file name has {key:?}, which is no text and no number"
                ));
            }
        };
        match inner {
            Some(inner) => drop(keys.insert(inner.to_owned(), value)),
            None if key == "driver" => {}
            None => {
                return Err(format!(
                    "its json: backing file name has the key {key:?}, which is not supported"
                ));
            }
        }
    }
    Ok(RemoteName::Keys(keys))
}

/// A name in an image at `image`: of an NBD server's export, or of a file.
fn plain_name(image: &Path, name: &[u8]) -> std::result::Result<BackingName, String> {
    let scheme = name.split(|&c| c == b':').next().filter(|scheme| scheme.len() < name.len());
    if let Some(b"nbd" | b"nbds") | Some([b'n', b'b', b'd', b'+', ..] | [b'n', b'b', b'd', b's', b'+', ..]) =
        scheme
    {
        let text = std::str::from_utf8(name)
            .map_err(|_| format!("the name \"{}\" is not UTF-8", name.escape_ascii()))?;
        return Ok(BackingName::Remote(RemoteName::Name(text.to_owned())));
    }
    Ok(BackingName::File(plain_path(image, name)?))
}

/// A file's name in an image at `image`: relative ones are relative to it.
fn plain_path(image: &Path, name: &[u8]) -> std::result::Result<PathBuf, String> {
    let name = name.strip_prefix(b"file:").unwrap_or(name);
    if name.is_empty() || name.contains(&0) {
        return Err(format!("the name \"{}\" is not that of a file", name.escape_ascii()));
    }
    // As QEMU tells protocols from files: a colon before the first slash.
    let first = name.split(|&c| c == b'/').next().unwrap_or_default();
    if first.contains(&b':') {
        let shown = name.escape_ascii();
        return Err(format!("the name \"{shown}\" begins with a protocol; files and nbd: are supported"));
    }
    let path = Path::new(std::ffi::OsStr::from_bytes(name));
    Ok(image.parent().unwrap_or(Path::new("")).join(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(name: &str, format: Option<&str>) -> std::result::Result<Target, String> {
        resolve(Path::new("/images/top.qcow2"), name.as_bytes(), format.map(str::as_bytes))
    }

    fn ok(path: &str, format: Option<LayerFormat>) -> std::result::Result<Target, String> {
        Ok(Target { place: BackingName::File(path.into()), format })
    }

    #[test]
    fn names_are_relative_to_the_image_that_holds_them() {
        assert_eq!(target("base.raw", Some("raw")), ok("/images/base.raw", Some(LayerFormat::Raw)));
        assert_eq!(target("/x/b", Some("qcow2")), ok("/x/b", Some(LayerFormat::Qcow2)));
        assert_eq!(target("file:sub/b:c", None), ok("/images/sub/b:c", None));
        let here = resolve(Path::new("top.qcow2"), b"base", None).unwrap();
        assert_eq!(here.place, BackingName::File("base".into()));
    }

    #[test]
    fn json_names_say_the_same_in_both_spellings() {
        let want = ok("/images/b.img", Some(LayerFormat::Qcow2));
        let nested = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"b.img"}}"#;
        let flat = r#"json:{"driver":"qcow2","file.driver":"file","file.filename":"b.img"}"#;
        assert_eq!(target(nested, None), want);
        assert_eq!(target(flat, None), want);
        let file = r#"json:{"driver":"file","filename":"b.img"}"#;
        assert_eq!(target(file, Some("qcow2")), want);
        assert_eq!(target(file, None), ok("/images/b.img", Some(LayerFormat::Raw)));
    }

    #[test]
    fn names_of_servers_are_told_from_files() {
        let remote = |name: &str, format| {
            let place = BackingName::Remote(RemoteName::Name(name.to_owned()));
            Ok(Target { place, format })
        };
        for name in ["nbd://h/x", "nbd:h:1", "nbd+unix:///x?socket=/s", "nbds://h"] {
            assert_eq!(target(name, Some("raw")), remote(name, Some(LayerFormat::Raw)));
        }
        let inner = r#"json:{"driver":"qcow2","file.filename":"nbd://h/x"}"#;
        assert_eq!(target(inner, None), remote("nbd://h/x", Some(LayerFormat::Qcow2)));
        assert_eq!(target("nbd", None), ok("/images/nbd", None));
        let keys = |pairs: &[(&str, &str)], format| {
            let keys = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            Ok(Target { place: BackingName::Remote(RemoteName::Keys(keys)), format })
        };
        let nested = r#"json:{"driver":"qcow2","file":{"driver":"nbd","server":{"type":"inet","host":"h","port":7},"read-only":true}}"#;
        let flat = [("server.host", "h"), ("server.port", "7"), ("server.type", "inet")];
        assert_eq!(target(nested, None), keys(&flat, Some(LayerFormat::Qcow2)));
        let bare = r#"json:{"driver":"nbd","path":"/s","export":"e"}"#;
        assert_eq!(target(bare, None), keys(&[("path", "/s"), ("export", "e")], Some(LayerFormat::Raw)));
    }

    #[test]
    fn what_is_not_followed_is_named() {
        for (name, format, want) in [
            ("ssh://host/x", None, "protocol"),
            (r#"json:{"driver":"nbd","host":["h"]}"#, None, "no text and no number"),
            (r#"json:{"driver":"qcow2","x":"y","file":{"driver":"nbd","host":"h"}}"#, None, "\"x\""),
            (r#"json:{"driver":"luks","file":{"driver":"nbd","host":"h"}}"#, None, "\"luks\""),
            ("", None, "not that of a file"),
            ("x", Some("vmdk"), "\"vmdk\" is not supported"),
            ("json:[1]", None, "no object"),
            ("json:{", None, "mistake"),
            (r#"json:{"driver":"qcow2","file":{"driver":"ssh","filename":"h"}}"#, None, "\"ssh\""),
            (
                r#"json:{"driver":"qcow2","backing":{"driver":"raw"},"file.filename":"h"}"#,
                None,
                "backing.driver",
            ),
            (r#"json:{"driver":"raw"}"#, None, "no filename"),
        ] {
            let e = target(name, format).unwrap_err();
            assert!(e.contains(want), "{name}: {e}");
        }
    }

    #[test]
    fn a_file_has_one_writer_or_many_readers() {
        let id = (u64::MAX, 77);
        let a = Claim::take(id, false).unwrap();
        let b = Claim::take(id, false).unwrap();
        assert!(Claim::take(id, true).is_none());
        drop((a, b));
        let w = Claim::take(id, true).unwrap();
        assert!(Claim::take(id, false).is_none());
        drop(w);
        assert!(Claim::take(id, true).is_some());
    }
}
