//! `conbd inspect IMAGE`: what an image file says of itself and of the chain below it. Nothing is opened for writing, no
//! lock is taken: it may be in use.

use super::{EXIT_OK, Failure, run_coroutine, with_sources, write_out};
use crate::block::qcow2::bitmap::{BitmapEntry, BitmapFlags};
use crate::block::qcow2::check::{co_read_bitmaps, co_read_snapshots};
use crate::block::qcow2::header::{Autoclear, Compatible, Encryption, Header, Incompatible, Purpose};
use crate::block::qcow2::snapshot::Snapshot;
use crate::block::{
    BackingName, BlockNode as _, FileNode, FileOptions, ForeignFormat, LockMode, MAX_DEPTH, PROBE_LEN,
    backing_of, co_read_header, probe,
};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// One image of the chain.
struct Layer {
    path: PathBuf,
    file_len: u64,
    /// `None`: raw.
    qcow2: Option<Box<Qcow2>>,
}

struct Qcow2 {
    header: Header,
    snapshots: Result<Vec<Snapshot>, String>,
    bitmaps: Result<Vec<BitmapEntry>, String>,
}

pub(crate) fn run(path: &Path, as_json: bool) -> Result<u8, Failure> {
    let mut layers: Vec<Layer> = Vec::new();
    let mut next = Some((path.to_owned(), None));
    while let Some((path, format)) = next.take() {
        if layers.len() >= MAX_DEPTH || layers.iter().any(|l| l.path == path) {
            return Err(Failure::failed(format!("image {path:?}: the backing chain is a loop, or too deep")));
        }
        let layer = read(&path, format)?;
        if let Some(q) = &layer.qcow2 {
            next = match backing_of(&path, &q.header) {
                Ok(None) => None,
                Ok(Some((BackingName::File(below), format))) => Some((below, format)),
                // Nobody is asked for what an image says; the image's own part tells the name.
                Ok(Some((BackingName::Remote(_), _))) => None,
                Err(why) => return Err(Failure::failed(format!("image {path:?}: {why}"))),
            };
        }
        layers.push(layer);
    }
    let text = if as_json {
        let chain: Vec<Value> = layers.iter().map(json_of).collect();
        let mut value = chain[0].clone();
        value["backing_chain"] = chain[1..].into();
        format!("{value:#}\n")
    } else {
        layers.iter().map(text_of).collect::<Vec<_>>().join("\n")
    };
    write_out(&text)?;
    Ok(EXIT_OK)
}

fn read(path: &Path, format: Option<&'static str>) -> Result<Layer, Failure> {
    let options =
        FileOptions { read_only: true, lock: LockMode::Off, growable: true, ..FileOptions::new(path) };
    let file = FileNode::open(&options).map_err(|e| Failure::failed(with_sources(&e)))?;
    let head = file.read_head(PROBE_LEN).map_err(|e| Failure::failed(format!("image {path:?}: {e}")))?;
    let file_len = file.len();
    let path = path.to_owned();
    match (format, probe(&head)) {
        (Some("raw"), _) | (None, None) => return Ok(Layer { path, file_len, qcow2: None }),
        (_, Some(ForeignFormat::Qcow2)) | (Some(_), _) => {}
        (None, Some(other)) => {
            return Err(Failure::failed(format!("image {path:?} is {other}, which is not supported")));
        }
    }
    let shown = path.clone();
    let read = run_coroutine(move || -> Result<Qcow2, String> {
        let header = co_read_header(&file, Purpose::Inspect).map_err(|e| with_sources(&e))?;
        let header = header.map_err(|e| format!("image {shown:?}: {e}"))?;
        let snapshots = co_read_snapshots(&file, &header).map(|s| s.0).map_err(|e| e.to_string());
        let bitmaps = co_read_bitmaps(&file, &header).map_err(|e| e.to_string());
        Ok(Qcow2 { header, snapshots, bitmaps })
    });
    let qcow2 = read.map_err(Failure::failed)?.map_err(Failure::failed)?;
    Ok(Layer { path, file_len, qcow2: Some(Box::new(qcow2)) })
}

/// Bytes of the image as text for people: escaped where they are not plain.
fn shown(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains(char::is_control) => text.to_owned(),
        _ => bytes.escape_ascii().to_string(),
    }
}

fn features(h: &Header) -> Vec<String> {
    let names = [
        (h.incompatible.contains(Incompatible::DIRTY), "dirty"),
        (h.incompatible.contains(Incompatible::CORRUPT), "corrupt"),
        (h.has_data_file(), "external data file"),
        (h.extended_l2(), "extended L2 entries"),
        (h.compatible.contains(Compatible::LAZY_REFCOUNTS), "lazy refcounts"),
        (h.autoclear.contains(Autoclear::BITMAPS), "bitmaps"),
        (h.raw_data(), "raw external data"),
    ];
    names.iter().filter(|(on, _)| *on).map(|(_, name)| (*name).to_owned()).collect()
}

fn encryption(h: &Header) -> Option<&'static str> {
    match h.encryption {
        Encryption::None => None,
        Encryption::Aes => Some("aes"),
        Encryption::Luks => Some("luks"),
    }
}

fn bitmap_flags(b: &BitmapEntry) -> Vec<&'static str> {
    let names = [(BitmapFlags::IN_USE, "in-use"), (BitmapFlags::AUTO, "auto")];
    names.iter().filter(|(flag, _)| b.flags.contains(*flag)).map(|(_, name)| *name).collect()
}

fn json_of(layer: &Layer) -> Value {
    let mut value = json!({
        "filename": layer.path.to_string_lossy(),
        "format": if layer.qcow2.is_some() { "qcow2" } else { "raw" },
        "file_size": layer.file_len,
    });
    let Some(q) = &layer.qcow2 else {
        value["virtual_size"] = layer.file_len.into();
        return value;
    };
    let h = &q.header;
    let snapshot = |s: &Snapshot| {
        json!({
            "id": shown(&s.id), "name": shown(&s.name), "date_sec": s.date_sec, "date_nsec": s.date_nsec,
            "vm_clock_nsec": s.vm_clock_nsec, "vm_state_size": s.vm_state_size, "disk_size": s.disk_size,
        })
    };
    let bitmap = |b: &BitmapEntry| {
        json!({
            "name": shown(&b.name), "granularity": 1u64 << b.granularity_bits, "flags": bitmap_flags(b),
        })
    };
    value["virtual_size"] = h.size.into();
    value["compat"] = if h.version < 3 { "0.10" } else { "1.1" }.into();
    value["cluster_size"] = (1u64 << h.cluster_bits).into();
    value["refcount_bits"] = (1u64 << h.refcount_order).into();
    value["compression_type"] = h.compression.name().into();
    value["features"] = features(h).into();
    value["encryption"] = encryption(h).into();
    value["backing_file"] = h.backing_file.as_deref().map(shown).into();
    value["backing_format"] = h.backing_format.as_deref().map(shown).into();
    value["data_file"] = h.data_file.as_deref().map(shown).into();
    match &q.snapshots {
        Ok(list) => value["snapshots"] = list.iter().map(snapshot).collect::<Vec<_>>().into(),
        Err(why) => value["snapshots_error"] = why.clone().into(),
    }
    match &q.bitmaps {
        Ok(list) => value["bitmaps"] = list.iter().map(bitmap).collect::<Vec<_>>().into(),
        Err(why) => value["bitmaps_error"] = why.clone().into(),
    }
    value
}

fn text_of(layer: &Layer) -> String {
    let mut out = String::new();
    let format = if layer.qcow2.is_some() { "qcow2" } else { "raw" };
    let size = layer.qcow2.as_ref().map_or(layer.file_len, |q| q.header.size);
    // Writing to a String cannot fail.
    let _ = writeln!(out, "image: {}\nformat: {format}", layer.path.display());
    let _ = writeln!(out, "virtual size: {size} bytes ({})", crate::config::Size(size));
    let _ = writeln!(out, "file size: {} bytes", layer.file_len);
    let Some(q) = &layer.qcow2 else { return out };
    let h = &q.header;
    let compat = if h.version < 3 { "0.10" } else { "1.1" };
    let _ = writeln!(
        out,
        "compat: {compat}, cluster size: {}, refcount bits: {}, compression: {}",
        1u64 << h.cluster_bits,
        1u64 << h.refcount_order,
        h.compression.name()
    );
    let features = features(h);
    if !features.is_empty() {
        let _ = writeln!(out, "features: {}", features.join(", "));
    }
    if let Some(method) = encryption(h) {
        let _ = writeln!(out, "encryption: {method} (not supported for serving)");
    }
    if let Some(name) = &h.backing_file {
        let format = h.backing_format.as_deref().map_or("not recorded".to_owned(), shown);
        let _ = writeln!(out, "backing file: {} (format {format})", shown(name));
    }
    if let Some(name) = &h.data_file {
        let _ = writeln!(out, "data file: {}", shown(name));
    }
    match &q.snapshots {
        Ok(list) => {
            for s in list {
                let _ = writeln!(
                    out,
                    "snapshot {}: {}, {} bytes of VM state",
                    shown(&s.id),
                    shown(&s.name),
                    s.vm_state_size
                );
            }
        }
        Err(why) => {
            let _ = writeln!(out, "snapshots: {why}");
        }
    }
    match &q.bitmaps {
        Ok(list) => {
            for b in list {
                let flags = bitmap_flags(b).join(", ");
                let _ = writeln!(
                    out,
                    "bitmap {}: granularity {}, {flags}",
                    shown(&b.name),
                    1u64 << b.granularity_bits
                );
            }
        }
        Err(why) => {
            let _ = writeln!(out, "bitmaps: {why}");
        }
    }
    out
}
