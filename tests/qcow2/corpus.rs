//! Images by qemu-img, in every flavour it makes: what they hold is known through qemu-img convert.

use crate::support::run;
use std::fs;
use std::path::{Path, PathBuf};

/// How a flavour is made.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Make {
    /// `qemu-img create -o OPTIONS` and the usual writes.
    Plain,
    /// Nothing is written.
    Empty,
    /// Converted with compression from a raw file.
    Compressed,
    /// An overlay; its backing file is made as said.
    Overlay(Back),
    /// Internal snapshots between writes; how many.
    Snapshots(usize),
    /// Bitmaps: names, all recorded over the usual writes.
    Bitmaps(usize),
    /// The process that wrote it was killed: marked dirty, refcounts behind.
    Dirty,
    /// Compressed, and the file cut at its last byte that matters.
    CutTail,
}

/// What lies below an overlay.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Back {
    Raw,
    ShorterRaw,
    LongerRaw,
    Qcow2,
    Compressed,
    /// Three images.
    Chain,
    /// In another directory, by a relative name.
    Relative,
}

/// A flavour.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Flavour {
    pub(crate) name: &'static str,
    pub(crate) options: &'static str,
    pub(crate) size: u64,
    pub(crate) make: Make,
}

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;
/// Ends inside of a cluster of any size over 512 bytes.
const ODD: u64 = 3 * M + 7 * 512;

const fn f(name: &'static str, options: &'static str, size: u64, make: Make) -> Flavour {
    Flavour { name, options, size, make }
}

/// All flavours.
pub(crate) const FLAVOURS: &[Flavour] = &[
    f("c512", "cluster_size=512", ODD, Make::Plain),
    f("c1k", "cluster_size=1k", ODD, Make::Plain),
    f("c2k", "cluster_size=2k", ODD, Make::Plain),
    f("c4k", "cluster_size=4k", ODD, Make::Plain),
    f("c8k", "cluster_size=8k", ODD, Make::Plain),
    f("c16k", "cluster_size=16k", ODD, Make::Plain),
    f("c32k", "cluster_size=32k", ODD, Make::Plain),
    f("c64k", "cluster_size=64k", ODD, Make::Plain),
    f("c128k", "cluster_size=128k", ODD, Make::Plain),
    f("c256k", "cluster_size=256k", ODD, Make::Plain),
    f("c512k", "cluster_size=512k", ODD, Make::Plain),
    f("c1m", "cluster_size=1M", ODD, Make::Plain),
    f("c2m", "cluster_size=2M", ODD, Make::Plain),
    f("r1", "refcount_bits=1", ODD, Make::Plain),
    f("r2", "refcount_bits=2", ODD, Make::Plain),
    f("r4", "refcount_bits=4", ODD, Make::Plain),
    f("r8", "refcount_bits=8", ODD, Make::Plain),
    f("r32", "refcount_bits=32", ODD, Make::Plain),
    f("r64", "refcount_bits=64", ODD, Make::Plain),
    f("r64-c512", "refcount_bits=64,cluster_size=512", ODD, Make::Plain),
    f("r1-c512", "refcount_bits=1,cluster_size=512", ODD, Make::Plain),
    f("r2-c4k", "refcount_bits=2,cluster_size=4k", ODD, Make::Plain),
    f("v2", "compat=0.10", ODD, Make::Plain),
    f("v2-c512", "compat=0.10,cluster_size=512", ODD, Make::Plain),
    f("v2-c4k", "compat=0.10,cluster_size=4k", ODD, Make::Plain),
    f("v2-c2m", "compat=0.10,cluster_size=2M", ODD, Make::Plain),
    f("zlib-c512", "cluster_size=512", 256 * K, Make::Compressed),
    f("zlib-c4k", "cluster_size=4k", ODD, Make::Compressed),
    f("zlib", "", ODD, Make::Compressed),
    f("zlib-c2m", "cluster_size=2M", ODD, Make::Compressed),
    f("zlib-v2", "compat=0.10", ODD, Make::Compressed),
    f("zlib-r1", "refcount_bits=1", ODD, Make::Compressed),
    f("zlib-cut", "", ODD, Make::CutTail),
    f("zstd-c4k", "compression_type=zstd,cluster_size=4k", ODD, Make::Compressed),
    f("zstd", "compression_type=zstd", ODD, Make::Compressed),
    f("zstd-c2m", "compression_type=zstd,cluster_size=2M", ODD, Make::Compressed),
    f("zstd-ext", "compression_type=zstd,extended_l2=on", ODD, Make::Compressed),
    f("zstd-unused", "compression_type=zstd", ODD, Make::Plain),
    f("prealloc-metadata", "preallocation=metadata", ODD, Make::Plain),
    f("prealloc-metadata-empty", "preallocation=metadata", ODD, Make::Empty),
    f("prealloc-falloc", "preallocation=falloc,cluster_size=4k", ODD, Make::Plain),
    f("prealloc-full", "preallocation=full", ODD, Make::Plain),
    f("prealloc-ext", "preallocation=metadata,extended_l2=on", ODD, Make::Plain),
    f("over-raw", "", ODD, Make::Overlay(Back::Raw)),
    f("over-raw-c4k", "cluster_size=4k", ODD, Make::Overlay(Back::Raw)),
    f("over-shorter", "", ODD, Make::Overlay(Back::ShorterRaw)),
    f("over-shorter-c512", "cluster_size=512", ODD, Make::Overlay(Back::ShorterRaw)),
    f("over-longer", "", ODD, Make::Overlay(Back::LongerRaw)),
    f("over-qcow2", "", ODD, Make::Overlay(Back::Qcow2)),
    f("over-compressed", "cluster_size=32k", ODD, Make::Overlay(Back::Compressed)),
    f("over-chain", "", ODD, Make::Overlay(Back::Chain)),
    f("over-relative", "", ODD, Make::Overlay(Back::Relative)),
    f("over-v2", "compat=0.10", ODD, Make::Overlay(Back::Raw)),
    f("over-ext", "extended_l2=on,cluster_size=128k", ODD, Make::Overlay(Back::Raw)),
    f("over-ext-shorter", "extended_l2=on,cluster_size=16k", ODD, Make::Overlay(Back::ShorterRaw)),
    f("snap1", "", ODD, Make::Snapshots(1)),
    f("snap3", "", ODD, Make::Snapshots(3)),
    f("snap2-c512", "cluster_size=512", M, Make::Snapshots(2)),
    f("snap2-r8", "refcount_bits=8,cluster_size=4k", ODD, Make::Snapshots(2)),
    f("snap2-v2", "compat=0.10", ODD, Make::Snapshots(2)),
    f("snap2-ext", "extended_l2=on", ODD, Make::Snapshots(2)),
    f("data", "data_file=data.bin", ODD, Make::Plain),
    f("data-raw", "data_file=data.bin,data_file_raw=on", ODD, Make::Plain),
    f("data-ext", "data_file=data.bin,extended_l2=on", ODD, Make::Plain),
    f("data-c4k", "data_file=data.bin,cluster_size=4k", ODD, Make::Plain),
    f("ext-c16k", "extended_l2=on,cluster_size=16k", ODD, Make::Plain),
    f("ext", "extended_l2=on", ODD, Make::Plain),
    f("ext-c128k", "extended_l2=on,cluster_size=128k", ODD, Make::Plain),
    f("ext-c2m", "extended_l2=on,cluster_size=2M", ODD, Make::Plain),
    f("ext-zlib", "extended_l2=on", ODD, Make::Compressed),
    f("lazy", "lazy_refcounts=on", ODD, Make::Plain),
    f("lazy-dirty", "lazy_refcounts=on", ODD, Make::Dirty),
    f("bitmap1", "", ODD, Make::Bitmaps(1)),
    f("bitmap3-c4k", "cluster_size=4k", ODD, Make::Bitmaps(3)),
    f("tiny", "", 512, Make::Plain),
    f("under-a-cluster", "", 64 * K - 512, Make::Plain),
    f("over-a-cluster", "", 64 * K + 512, Make::Plain),
    f("empty", "", ODD, Make::Empty),
    f("no-bytes", "", 0, Make::Empty),
    f("sparse-1t", "", 1 << 40, Make::Empty),
];

/// Reads `flavour` in a directory: the image, and what it holds (not for the huge one).
pub(crate) struct Built {
    pub(crate) path: PathBuf,
    pub(crate) content: Option<Vec<u8>>,
    /// Name and content of each snapshot.
    pub(crate) snapshots: Vec<(String, Vec<u8>)>,
}

pub(crate) fn qemu_img(args: &[&str]) -> String {
    run("qemu-img", args).unwrap_or_else(|e| panic!("{e}"))
}

pub(crate) fn qemu_io(path: &Path, commands: &[String]) {
    let mut args = vec!["-f", "qcow2"];
    for c in commands {
        args.extend(["-c", c.as_str()]);
    }
    args.push(text(path));
    let out = run("qemu-io", &args).unwrap_or_else(|e| panic!("{e}"));
    assert!(!out.contains("failed"), "{}: {out}", path.display());
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("the tests' paths are text")
}

/// Bytes that are different everywhere, and compress a little.
pub(crate) fn noise(len: u64, salt: u64) -> Vec<u8> {
    let mut out = vec![0; len as usize];
    for (i, w) in out.chunks_mut(8).enumerate() {
        let i = i as u64;
        // Some clusters are zero, some the same byte, some random.
        let v = match i * 8 / 8192 % 5 {
            0 => 0,
            1 => 0x4141_4141_4141_4141,
            2 => i,
            _ => (i + salt).wrapping_mul(0x9e37_79b9_7f4a_7c15),
        };
        w.copy_from_slice(&v.to_be_bytes()[..w.len()]);
    }
    out
}

/// The usual writes: data at edges, zeroes of both kinds, discards, all inside of `size`.
pub(crate) fn usual(size: u64, salt: u64) -> Vec<String> {
    let mut out = Vec::new();
    let mut add = |what: &str, at: u64, len: u64| {
        let at = at.min(size) / 512 * 512;
        let len = len.min(size - at);
        if len > 0 {
            out.push(format!("{what} {at} {len}"));
        }
    };
    let p = |n: u64| format!("write -P {}", (n + salt) % 250 + 1);
    add(&p(1), 0, 4096);
    add(&p(2), 65536 - 512, 1024);
    add(&p(3), 200 * K, 150 * K + 512);
    add(&p(4), M, 700 * K);
    add("write -z", M + 64 * K, 128 * K);
    add("write -z -u", M + 256 * K, 128 * K + 512);
    add("discard", M + 512 * K, 64 * K);
    add(&p(5), M + 80 * K, 512);
    add("write -z", 2 * M + 512, 5 * K);
    add(&p(6), 2 * M + 640 * K, 3 * K);
    add(&p(7), size.saturating_sub(1024), 1024);
    out
}

fn create(path: &Path, options: &str, size: u64) {
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    // The data file's name is relative to the image.
    let dir = path.parent().expect("a file in a directory");
    let options =
        options.replace("data_file=data.bin", &format!("data_file={}", text(&dir.join("data.bin"))));
    if !options.is_empty() {
        args.extend(["-o", options.as_str()]);
    }
    let size = size.to_string();
    args.extend([text(path), size.as_str()]);
    qemu_img(&args);
}

fn create_over(path: &Path, options: &str, size: u64, backing: &str, format: &str) {
    let mut o = format!("backing_file={backing},backing_fmt={format}");
    if !options.is_empty() {
        o = format!("{o},{options}");
    }
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &o, text(path), &size.to_string()]);
}

fn compressed(path: &Path, options: &str, size: u64) {
    let raw = path.with_extension("src");
    fs::write(&raw, noise(size, 1)).unwrap();
    let mut args = vec!["convert", "-q", "-c", "-f", "raw", "-O", "qcow2"];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([text(&raw), text(path)]);
    qemu_img(&args);
    fs::remove_file(raw).unwrap();
}

/// The disk of an image, through qemu-img.
pub(crate) fn content_by_qemu(path: &Path, snapshot: Option<&str>) -> Vec<u8> {
    let raw = path.with_extension("out");
    let mut args = vec!["convert", "-q", "-f", "qcow2", "-O", "raw"];
    if let Some(s) = snapshot {
        args.extend(["-l", s]);
    }
    args.extend([text(path), text(&raw)]);
    qemu_img(&args);
    let content = fs::read(&raw).unwrap();
    fs::remove_file(raw).unwrap();
    content
}

/// Makes a flavour in `dir`.
pub(crate) fn build(flavour: &Flavour, dir: &Path) -> Built {
    let path = dir.join("image.qcow2");
    let Flavour { options, size, .. } = *flavour;
    let mut names = Vec::new();
    match flavour.make {
        Make::Plain => {
            create(&path, options, size);
            qemu_io(&path, &usual(size, 0));
        }
        Make::Empty => create(&path, options, size),
        Make::Compressed => compressed(&path, options, size),
        Make::CutTail => {
            compressed(&path, options, size);
            let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
            let len = file.metadata().unwrap().len();
            // qemu-img rounds the file up to a sector; what it added is zero.
            let d = fs::read(&path).unwrap();
            let used = d.iter().rposition(|&b| b != 0).map_or(0, |p| p as u64 + 1);
            file.set_len(used.min(len)).unwrap();
        }
        Make::Overlay(back) => {
            let base = dir.join("base.img");
            let (name, format) = match back {
                Back::Raw | Back::ShorterRaw | Back::LongerRaw | Back::Relative => {
                    let len = match back {
                        Back::ShorterRaw => size / 2 + 1234,
                        Back::LongerRaw => size * 2,
                        _ => size,
                    };
                    let at = if matches!(back, Back::Relative) {
                        fs::create_dir(dir.join("below")).unwrap();
                        dir.join("below/base.img")
                    } else {
                        base.clone()
                    };
                    fs::write(at, noise(len, 2)).unwrap();
                    (if matches!(back, Back::Relative) { "below/base.img" } else { "base.img" }, "raw")
                }
                Back::Qcow2 => {
                    create(&base, "cluster_size=4k", size);
                    qemu_io(&base, &usual(size, 11));
                    ("base.img", "qcow2")
                }
                Back::Compressed => {
                    compressed(&base, "", size);
                    ("base.img", "qcow2")
                }
                Back::Chain => {
                    fs::write(&base, noise(size, 3)).unwrap();
                    let middle = dir.join("middle.qcow2");
                    create_over(&middle, "cluster_size=8k", size, "base.img", "raw");
                    qemu_io(&middle, &[format!("write -P 9 {} {}", M, M), format!("write -z {} 64k", 2 * M)]);
                    ("middle.qcow2", "qcow2")
                }
            };
            create_over(&path, options, size, name, format);
            let discards = options.contains("0.10");
            let steps: Vec<String> =
                usual(size, 5).into_iter().filter(|s| !discards || !s.starts_with("discard")).collect();
            qemu_io(&path, &steps);
        }
        Make::Snapshots(n) => {
            create(&path, options, size);
            qemu_io(&path, &usual(size, 0));
            for i in 0..n {
                let name = format!("snap{i}");
                qemu_img(&["snapshot", "-c", &name, text(&path)]);
                names.push(name);
                qemu_io(
                    &path,
                    &[format!("write -P {} {} 100k", 77 + i, 128 * K), format!("write -z {} 40k", 300 * K)],
                );
            }
        }
        Make::Bitmaps(n) => {
            create(&path, options, size);
            for i in 0..n {
                let g = (512u64 << (3 * i)).to_string();
                qemu_img(&["bitmap", "--add", "-g", &g, text(&path), &format!("bitmap{i}")]);
                if i == 1 {
                    qemu_img(&["bitmap", "--disable", text(&path), "bitmap1"]);
                }
            }
            qemu_io(&path, &usual(size, 0));
        }
        Make::Dirty => {
            create(&path, options, size);
            let mut steps = usual(size, 0);
            steps.push("flush".to_owned());
            steps.push("abort".to_owned());
            let mut args = vec!["-f", "qcow2"];
            for c in &steps {
                args.extend(["-c", c.as_str()]);
            }
            args.push(text(&path));
            // It ends by SIGABRT, as told.
            run("qemu-io", &args).expect_err("abort aborts");
            assert_eq!(fs::read(&path).unwrap()[79] & 1, 1, "the dirty bit is set");
        }
    }
    let snapshots = names.into_iter().map(|n| {
        let content = content_by_qemu(&path, Some(&n));
        (n, content)
    });
    let snapshots = snapshots.collect();
    // Reading opens read-only: a dirty image stays dirty.
    let content = (size <= 16 * M).then(|| content_by_qemu(&path, None));
    Built { path, content, snapshots }
}

#[test]
fn the_tests_own_reader_and_checker_agree_with_qemu_img() {
    use crate::image::{Layout, Reader, check};
    for flavour in FLAVOURS {
        let dir = tempfile::tempdir().unwrap();
        let built = build(flavour, dir.path());
        let d = fs::read(&built.path).unwrap();
        let found = check(&d);
        assert_eq!(found.corruptions, Vec::<String>::new(), "{}", flavour.name);
        if !matches!(flavour.make, Make::Dirty) {
            let by_qemu = run("qemu-img", &["check", "-q", "-f", "qcow2", text(&built.path)]);
            // 3 is leaks, and "check failed" is an error by itself.
            assert!(
                by_qemu.is_ok() && found.leaks == 0,
                "{}: {by_qemu:?}, {} leaks by our count",
                flavour.name,
                found.leaks
            );
        }
        let Some(content) = &built.content else { continue };
        let backing = match flavour.make {
            Make::Overlay(_) => {
                let out = run("qemu-img", &["info", "--output=json", text(&built.path)]).unwrap();
                let info: serde_json::Value = serde_json::from_str(&out).unwrap();
                let below = info["full-backing-filename"].as_str().unwrap();
                let raw = dir.path().join("below.raw");
                qemu_img(&["convert", "-q", "-O", "raw", below, text(&raw)]);
                fs::read(raw).unwrap()
            }
            _ => Vec::new(),
        };
        let data = fs::read(dir.path().join("data.bin")).ok();
        let mut reader = Reader::new(backing);
        let mut out = vec![0xee; content.len()];
        reader.read_active(&d, data.as_deref(), &mut out).unwrap();
        assert!(out == *content, "{}: the reader differs from qemu-img", flavour.name);
        let l = Layout::parse(&d).unwrap();
        assert_eq!(l.snapshots.len(), built.snapshots.len());
        for (s, (name, content)) in l.snapshots.iter().zip(&built.snapshots) {
            assert_eq!(s.name, *name);
            assert_eq!(s.disk_size, content.len() as u64);
            reader.read(&l, &d, None, (s.l1_offset, s.l1_size), &mut out).unwrap();
            assert!(out == *content, "{}: snapshot {name} differs", flavour.name);
        }
    }
}
