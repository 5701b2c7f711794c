//! The qcow2 driver: random requests of several IOThreads against a flat model, on images of every flavour that
//! qemu-img makes; every image that was written passes `qemu-img check` and reads the same through qemu.

use crate::support::{engines, iothread, run, run_in_coroutine, spawn_in};
use conbd::aio::IoThread;
use conbd::block::qcow2::{Qcow2Error, Qcow2Node, Qcow2OpenOptions, SnapshotSel};
use conbd::block::{BlockNode, FileNode, FileOptions, LockMode, WriteFlags};
use std::io::{IoSlice, IoSliceMut};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Deterministic pseudo-random numbers (xorshift).
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// The seed of this run: `CONBD_SEED`, or one of the clock; printed when a test fails.
pub(crate) fn seed() -> u64 {
    std::env::var("CONBD_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64
            % 1_000_000
    })
}

pub(crate) fn file(path: &Path, read_only: bool) -> Arc<dyn BlockNode> {
    let options = FileOptions { growable: true, read_only, lock: LockMode::Off, ..FileOptions::new(path) };
    Arc::new(FileNode::open(&options).expect("the image's file opens"))
}

pub(crate) fn co_open(path: &Path, options: Qcow2OpenOptions) -> Arc<Qcow2Node> {
    Qcow2Node::co_open(file(path, options.read_only), options).unwrap_or_else(|e| panic!("{e}"))
}

pub(crate) fn co_read(n: &dyn BlockNode, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xee; len];
    if n.try_pread(offset, &mut buf) {
        return buf;
    }
    buf.fill(0xdd);
    n.co_preadv(offset, &mut [IoSliceMut::new(&mut buf)]).expect("read");
    buf
}

pub(crate) fn qemu_img(args: &[&str]) -> String {
    run("qemu-img", args).unwrap_or_else(|e| panic!("{e}"))
}

pub(crate) fn check(path: &Path) {
    let out = qemu_img(&["check", "-f", "qcow2", path.to_str().unwrap()]);
    assert!(out.contains("No errors were found"), "{out}");
}

/// Reads the whole image through qemu.
pub(crate) fn through_qemu(path: &Path, dir: &Path) -> Vec<u8> {
    let raw = dir.join("through-qemu.raw");
    qemu_img(&["convert", "-U", "-O", "raw", path.to_str().unwrap(), raw.to_str().unwrap()]);
    std::fs::read(raw).unwrap()
}

fn same(what: &str, got: &[u8], want: &[u8]) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    if let Some(at) = got.iter().zip(want).position(|(g, w)| g != w) {
        panic!("{what}: differs at {at:#x}: got {:#x}, want {:#x}", got[at], want[at]);
    }
}

/// One worker's random requests: it owns every `of`-th block of `grain` bytes, so that workers meet in clusters and
/// never in bytes.
struct Worker {
    number: u64,
    of: u64,
    grain: u64,
    rng: Rng,
}

impl Worker {
    /// A range that is its own.
    fn range(&mut self, size: u64) -> (u64, u64) {
        let blocks = size.div_ceil(self.grain);
        let mine = self.rng.below(blocks.div_ceil(self.of)) * self.of + self.number;
        let start = (mine.min(blocks - 1)) * self.grain;
        let (start, end) = if mine < blocks { (start, (start + self.grain).min(size)) } else { (0, 0) };
        if start == end {
            return (0, 0);
        }
        let len = end - start;
        match self.rng.below(3) {
            0 => (start, len),
            1 => {
                let from = self.rng.below(len);
                (start + from, 1 + self.rng.below(len - from))
            }
            _ => {
                let from = self.rng.below(len) / 512 * 512;
                (
                    start + from,
                    (1 + self.rng.below(len - from)).div_ceil(512).saturating_mul(512).min(len - from),
                )
            }
        }
    }

    /// One step; the model is its own part of the disk's bytes.
    fn co_step(&mut self, node: &dyn BlockNode, model: &Mutex<Vec<u8>>, discards: bool) {
        let (offset, len) = self.range(node.len());
        if len == 0 {
            return;
        }
        let span = offset as usize..(offset + len) as usize;
        let what = self.rng.below(100);
        match what {
            0..50 => {
                let value = self.rng.next() as u8;
                let data: Vec<u8> =
                    (offset..offset + len).map(|i| value ^ i as u8 ^ (i >> 8) as u8).collect();
                let flags = if what < 3 { WriteFlags::FUA } else { WriteFlags::empty() };
                match (what >= 25).then(|| node.try_pwrite(offset, &data)).flatten() {
                    Some(r) => r.expect("inline write"),
                    None => {
                        let cut = self.rng.below(len + 1) as usize;
                        let (a, b) = data.split_at(cut);
                        node.co_pwritev(offset, &[IoSlice::new(a), IoSlice::new(b)], flags).expect("write");
                    }
                }
                model.lock().unwrap()[span].copy_from_slice(&data);
            }
            50..65 => {
                let flags = if what.is_multiple_of(2) { WriteFlags::MAY_UNMAP } else { WriteFlags::empty() };
                node.co_pwrite_zeroes(offset, len, flags).expect("zeroes");
                model.lock().unwrap()[span].fill(0);
            }
            65..72 if discards => {
                node.co_pdiscard(offset, len).expect("discard");
                let now = co_read(node, offset, len as usize);
                let mut m = model.lock().unwrap();
                for (i, (n, was)) in now.iter().zip(&m[span.clone()]).enumerate() {
                    assert!(n == was || *n == 0, "discarded {offset:#x}+{i:#x}: {n:#x}, was {was:#x}");
                }
                m[span].copy_from_slice(&now);
            }
            72..75 => node.co_flush().expect("flush"),
            75..80 => {
                let e = node.co_block_status(offset, len).expect("status");
                if e.flags.contains(conbd::block::StatusFlags::ZERO) {
                    let m = model.lock().unwrap();
                    assert!(
                        m[span.start..span.start + e.len as usize].iter().all(|b| *b == 0),
                        "zero at {offset:#x}"
                    );
                }
            }
            _ => {
                let got = co_read(node, offset, len as usize);
                same(&format!("read of {len:#x} at {offset:#x}"), &got, &model.lock().unwrap()[span]);
            }
        }
    }
}

/// Runs `workers` workers on as many IOThreads.
fn co_work(
    threads: &[IoThread],
    node: &Arc<Qcow2Node>,
    model: Vec<u8>,
    seed: u64,
    steps: u64,
    grain: u64,
) -> Vec<u8> {
    let of = threads.len() as u64;
    let model = Arc::new(Mutex::new(model));
    let tasks: Vec<_> = threads
        .iter()
        .enumerate()
        .flat_map(|(i, t)| [(i as u64, t)])
        .map(|(number, t)| {
            let (node, model) = (Arc::clone(node), Arc::clone(&model));
            spawn_in(t.context(), move || {
                let mut w = Worker { number, of, grain, rng: Rng::new(seed + number * 77) };
                for _ in 0..steps {
                    w.co_step(&*node, &model, true);
                }
            })
        })
        .collect();
    for t in tasks {
        t.join();
    }
    Arc::into_inner(model).unwrap().into_inner().unwrap()
}

struct Flavour {
    name: &'static str,
    options: &'static str,
    size: u64,
    backing: Option<u64>,
    snapshot: bool,
    cache: Option<u64>,
}

const PLAIN: Flavour = Flavour {
    name: "plain",
    options: "cluster_size=64k",
    size: 9 << 20,
    backing: None,
    snapshot: false,
    cache: None,
};

fn flavours() -> Vec<Flavour> {
    vec![
        PLAIN,
        Flavour { name: "odd size", size: (5 << 20) + 1536, ..PLAIN },
        Flavour { name: "v2", options: "compat=0.10", ..PLAIN },
        Flavour { name: "v2 backing", options: "compat=0.10", backing: Some(5 << 20), ..PLAIN },
        Flavour { name: "512", options: "cluster_size=512", size: 2 << 20, ..PLAIN },
        Flavour { name: "512 r64", options: "cluster_size=512,refcount_bits=64", size: 2 << 20, ..PLAIN },
        Flavour { name: "512 r1", options: "cluster_size=512,refcount_bits=1", size: 2 << 20, ..PLAIN },
        Flavour { name: "4k r2", options: "cluster_size=4k,refcount_bits=2", ..PLAIN },
        Flavour {
            name: "4k r4 snapshot",
            options: "cluster_size=4k,refcount_bits=4",
            snapshot: true,
            ..PLAIN
        },
        Flavour { name: "r8", options: "refcount_bits=8", ..PLAIN },
        Flavour { name: "r32", options: "refcount_bits=32", ..PLAIN },
        Flavour { name: "2M", options: "cluster_size=2M", size: 40 << 20, ..PLAIN },
        Flavour { name: "ext", options: "extended_l2=on", ..PLAIN },
        Flavour { name: "ext 16k", options: "extended_l2=on,cluster_size=16k", ..PLAIN },
        Flavour { name: "ext backing", options: "extended_l2=on", backing: Some(6 << 20), ..PLAIN },
        Flavour {
            name: "ext backing snapshot",
            options: "extended_l2=on",
            backing: Some(6 << 20),
            snapshot: true,
            ..PLAIN
        },
        Flavour { name: "short backing", backing: Some((3 << 20) + 512), ..PLAIN },
        Flavour { name: "long backing", backing: Some(16 << 20), ..PLAIN },
        Flavour { name: "snapshot", snapshot: true, ..PLAIN },
        Flavour { name: "lazy", options: "lazy_refcounts=on", ..PLAIN },
        Flavour { name: "metadata", options: "preallocation=metadata", ..PLAIN },
        Flavour { name: "falloc", options: "preallocation=falloc", ..PLAIN },
        Flavour { name: "small cache", options: "cluster_size=512", size: 8 << 20, cache: Some(0), ..PLAIN },
    ]
}

/// Makes the image and its backing file; returns their paths and what the disk reads.
fn make(dir: &Path, f: &Flavour, seed: u64) -> (PathBuf, Option<PathBuf>, Vec<u8>) {
    let path = dir.join("image.qcow2");
    let p = path.to_str().unwrap();
    let mut model = vec![0; f.size as usize];
    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", f.options];
    let backing = f.backing.map(|len| {
        let backing = dir.join("backing.raw");
        let mut rng = Rng::new(seed ^ 0x55);
        let bytes: Vec<u8> = (0..len / 512 + 1)
            .flat_map(|_| [if rng.below(3) == 0 { 0 } else { rng.next() as u8 }; 512])
            .take(len as usize)
            .collect();
        let n = bytes.len().min(model.len());
        model[..n].copy_from_slice(&bytes[..n]);
        std::fs::write(&backing, bytes).unwrap();
        backing
    });
    if let Some(b) = &backing {
        args.extend(["-b", b.to_str().unwrap(), "-F", "raw"]);
    }
    let size = f.size.to_string();
    args.extend([p, &size]);
    qemu_img(&args);
    if f.snapshot {
        // Something to be shared.
        let t = iothread("io0", engines()[0]);
        let (path, opened) = (path.clone(), backing.clone());
        model = run_in_coroutine(t.context(), move || {
            let backing = opened.map(|b| file(&b, true));
            let node = co_open(&path, Qcow2OpenOptions { backing, ..Default::default() });
            let model = Mutex::new(model);
            let mut w = Worker { number: 0, of: 1, grain: 64 << 10, rng: Rng::new(seed ^ 0x77) };
            for _ in 0..60 {
                w.co_step(&*node, &model, false);
            }
            node.co_close().expect("close");
            model.into_inner().unwrap()
        });
        t.stop().unwrap();
        check(&dir.join("image.qcow2"));
        qemu_img(&["snapshot", "-c", "before", p]);
    }
    (path, backing, model)
}

fn try_flavour(f: &Flavour, seed: u64, threads: usize, steps: u64, grain: u64) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let engine = engines()[seed as usize % engines().len()];
    let (path, backing, model) = make(dir.path(), f, seed);
    let at_snapshot = f.snapshot.then(|| model.clone());
    let threads: Vec<_> = (0..threads).map(|i| iothread(&format!("io{i}"), engine)).collect();
    let (p, b, cache) = (path.clone(), backing.clone(), f.cache);
    let node = run_in_coroutine(threads[0].context(), move || {
        let backing = b.map(|b| file(&b, true));
        co_open(&p, Qcow2OpenOptions { backing, l2_cache_bytes: cache, ..Default::default() })
    });
    assert_eq!(node.len(), f.size);
    let model = co_work(&threads, &node, model, seed, steps, grain);
    let model = run_in_coroutine(threads[0].context(), move || {
        let now = co_read(&*node, 0, model.len());
        same("all of it", &now, &model);
        node.co_close().expect("close");
        model
    });
    check(&path);
    same("through qemu", &through_qemu(&path, dir.path()), &model);
    if let Some(was) = at_snapshot {
        qemu_img(&["snapshot", "-a", "before", path.to_str().unwrap()]);
        same("the snapshot", &through_qemu(&path, dir.path()), &was);
    }
    // A second opening goes on where the first ended.
    let t = &threads[0];
    let (p, b) = (path.clone(), backing);
    run_in_coroutine(t.context(), move || {
        let backing = b.map(|b| file(&b, true));
        let node = co_open(&p, Qcow2OpenOptions { backing, ..Default::default() });
        node.co_pwritev(node.len() - 100, &[IoSlice::new(&[0x5a; 100])], WriteFlags::FUA).expect("write");
        assert_eq!(co_read(&*node, node.len() - 100, 100), [0x5a; 100]);
        node.co_close().expect("close");
    });
    check(&path);
    for t in threads {
        t.stop().unwrap();
    }
}

fn try_all(threads: usize, steps: u64, grain: u64) {
    let seed = seed();
    for (i, f) in flavours().iter().enumerate() {
        let seed = seed + i as u64 * 1000;
        let r = std::panic::catch_unwind(|| try_flavour(f, seed, threads, steps, grain));
        if let Err(e) = r {
            eprintln!("flavour {:?}, {threads} threads, CONBD_SEED={}", f.name, seed - i as u64 * 1000);
            std::panic::resume_unwind(e);
        }
    }
}

#[test]
fn random_requests_of_one_thread_match_the_model_on_every_flavour() {
    try_all(1, 300, 300 << 10);
}

#[test]
fn random_requests_of_four_threads_in_the_same_clusters_match_the_model() {
    try_all(4, 200, 3000);
}

#[test]
fn random_requests_of_three_threads_on_ranges_of_clusters_match_the_model() {
    try_all(3, 150, 192 << 10);
}

/// Bytes that compress, with some holes.
fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let mut out = Vec::with_capacity(len);
    while out.len() < len {
        let n = 1 + rng.below(40_000) as usize;
        let value = if rng.below(4) == 0 { 0 } else { rng.next() as u8 };
        let noise = rng.below(3) == 0;
        out.extend(
            (0..n.min(len - out.len()))
                .map(|i| if noise { rng.next() as u8 } else { value ^ (i / 100) as u8 }),
        );
    }
    out
}

#[test]
fn compressed_images_read_and_are_written_over() {
    for (name, options) in [
        ("zlib", "compression_type=zlib"),
        ("zlib v2", "compat=0.10"),
        ("zlib 512", "cluster_size=512"),
        ("zlib 2M", "cluster_size=2M"),
        ("zlib ext", "extended_l2=on"),
        ("zstd", "compression_type=zstd"),
        ("zstd 4k", "compression_type=zstd,cluster_size=4k"),
        ("zstd ext", "compression_type=zstd,extended_l2=on"),
    ] {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let (raw, path) = (dir.path().join("raw"), dir.path().join("image.qcow2"));
        let size = if name.contains("2M") { 12 << 20 } else { 3 << 20 };
        let bytes = content(7, size);
        std::fs::write(&raw, &bytes).unwrap();
        qemu_img(&[
            "convert",
            "-c",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-o",
            options,
            raw.to_str().unwrap(),
            path.to_str().unwrap(),
        ]);
        for threads in [1, 3] {
            let threads: Vec<_> = (0..threads).map(|i| iothread(&format!("io{i}"), engines()[0])).collect();
            let p = path.clone();
            let node =
                run_in_coroutine(threads[0].context(), move || co_open(&p, Qcow2OpenOptions::default()));
            let model = through_qemu(&path, dir.path());
            let n = Arc::clone(&node);
            let model = run_in_coroutine(threads[0].context(), move || {
                same(name, &co_read(&*n, 0, size), &model);
                model
            });
            let model = co_work(&threads, &node, model, seed(), 60, 50_000);
            run_in_coroutine(threads[0].context(), move || node.co_close().expect("close"));
            check(&path);
            same(name, &through_qemu(&path, dir.path()), &model);
            for t in threads {
                t.stop().unwrap();
            }
        }
    }
}

#[test]
fn external_data_files_hold_the_data_and_raw_ones_are_right_by_themselves() {
    for (name, options) in [
        ("plain", ""),
        ("raw", ",data_file_raw=on"),
        ("ext", ",extended_l2=on"),
        ("small", ",cluster_size=4k"),
    ] {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let (data, path) = (dir.path().join("data"), dir.path().join("image.qcow2"));
        let size = 6 << 20;
        let options = format!("data_file={}{options}", data.to_str().unwrap());
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, path.to_str().unwrap(), &size.to_string()]);
        let threads: Vec<_> = (0..2).map(|i| iothread(&format!("io{i}"), engines()[0])).collect();
        let (p, d) = (path.clone(), data.clone());
        let node = run_in_coroutine(threads[0].context(), move || {
            let e = Qcow2Node::co_open(file(&p, false), Qcow2OpenOptions::default());
            assert!(matches!(e, Err(Qcow2Error::NoDataFile { .. })));
            co_open(&p, Qcow2OpenOptions { data_file: Some(file(&d, false)), ..Default::default() })
        });
        let model = co_work(&threads, &node, vec![0; size], seed(), 200, 30_000);
        run_in_coroutine(threads[0].context(), move || node.co_close().expect("close"));
        check(&path);
        same(name, &through_qemu(&path, dir.path()), &model);
        if name == "raw" {
            same("the data file", &std::fs::read(&data).unwrap(), &model);
        }
        for t in threads {
            t.stop().unwrap();
        }
    }
}

#[test]
fn internal_snapshots_open_by_id_and_name_read_only() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("image.qcow2");
    let p = path.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", p, "4M"]);
    for (name, value) in [("one", "0x11"), ("two", "0x22")] {
        run("qemu-io", &["-f", "qcow2", "-c", &format!("write -P {value} 64k 100k"), p]).unwrap();
        qemu_img(&["snapshot", "-c", name, p]);
    }
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 0x33 0 1M", p]).unwrap();
    let t = iothread("io0", engines()[0]);
    run_in_coroutine(t.context(), move || {
        let id = |s: &str| SnapshotSel::Id(s.to_owned());
        for (which, value) in [
            (SnapshotSel::Name("one".to_owned()), 0x11),
            (id("1"), 0x11),
            (SnapshotSel::IdOrName("two".to_owned()), 0x22),
            (SnapshotSel::IdOrName("2".to_owned()), 0x22),
        ] {
            let n = co_open(&path, Qcow2OpenOptions { snapshot: Some(which), ..Default::default() });
            assert!(n.read_only());
            assert_eq!(co_read(&*n, 65536, 100 << 10), vec![value; 100 << 10]);
            assert_eq!(co_read(&*n, 0, 100), [0; 100]);
            let e = n.co_pwritev(0, &[IoSlice::new(&[1])], WriteFlags::empty()).expect_err("read-only");
            assert_eq!(e.errno(), libc::EPERM);
        }
        let none = Qcow2OpenOptions { snapshot: Some(id("3")), ..Default::default() };
        assert!(matches!(Qcow2Node::co_open(file(&path, false), none), Err(Qcow2Error::NoSnapshot { .. })));
        let n = co_open(&path, Qcow2OpenOptions { read_only: true, ..Default::default() });
        assert_eq!(co_read(&*n, 0, 1 << 20), vec![0x33; 1 << 20]);
    });
    t.stop().unwrap();
}

#[test]
fn a_chain_as_deep_as_allowed_reads_on_a_coroutines_stack() {
    const DEPTH: u64 = 200;
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let base = dir.path().join("base.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", base.to_str().unwrap(), "16M"]);
    for i in 0..DEPTH {
        std::fs::copy(&base, dir.path().join(format!("{i}.qcow2"))).unwrap();
    }
    let t = iothread("io0", engines()[0]);
    run_in_coroutine(t.context(), move || {
        let mut below: Option<Arc<dyn BlockNode>> = None;
        for i in 0..DEPTH {
            let path = dir.path().join(format!("{i}.qcow2"));
            let node = co_open(&path, Qcow2OpenOptions { backing: below.take(), ..Default::default() });
            // One cluster of its own in each.
            node.co_pwritev(i * 65536, &[IoSlice::new(&[i as u8 + 1; 100])], WriteFlags::empty())
                .expect("write");
            below = Some(node);
        }
        let top = below.expect("a chain");
        for i in [0, 1, 100, DEPTH - 1] {
            assert_eq!(co_read(&*top, i * 65536, 101), [vec![i as u8 + 1; 100], vec![0]].concat());
            let depth = top.co_allocation_depth(i * 65536, 65536).expect("depth");
            assert_eq!((u64::from(depth.depth), depth.len), (DEPTH - i, 65536));
        }
        // Copying from the bottom, too.
        top.co_pwritev(200, &[IoSlice::new(&[0x5a; 10])], WriteFlags::empty()).expect("write");
        assert_eq!(co_read(&*top, 0, 211), [vec![1; 100], vec![0; 100], vec![0x5a; 10], vec![0]].concat());
        let e = top.co_block_status(DEPTH * 65536, (16 << 20) - DEPTH * 65536).expect("status");
        assert_eq!((e.len, e.flags), ((16 << 20) - DEPTH * 65536, conbd::block::StatusFlags::ZERO));
    });
    t.stop().unwrap();
}
