//! Disks that become larger while guests work with them: every state that a power failure could have left has the old size
//! or a new one, nothing in what is new but zeroes and what was written there, and all that was flushed.

use crate::corpus::{content_by_qemu, noise, qemu_img, qemu_io, text};
use crate::crash::qemu_check;
use crate::driver::{self, Below};
use crate::image::{self, be64};
use crate::power::{BITMAP_IN_USE, Crash, Effort, Recording, SECTOR, enumerate, seed};
use crate::world::{Guest, HABITS, Habits, World, guests};
use conbd::block::{BlockBackend, BlockNode, Error, Extent, Limits, Result, WriteFlags};
use std::collections::BTreeMap;
use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;

/// An image, and the sizes that it is given.
struct Case {
    name: &'static str,
    options: &'static str,
    size: u64,
    /// Bytes of its raw backing image; 0: none.
    backing: u64,
    data_file: bool,
    snapshot: bool,
    /// It has one that records changes, and a disabled one.
    bitmaps: bool,
    grow: &'static [u64],
    cluster: usize,
}

const K: u64 = 1024;
const CASE: Case = Case {
    name: "",
    options: "cluster_size=4k",
    size: 250 * K + 512,
    backing: 0,
    data_file: false,
    snapshot: false,
    bitmaps: false,
    grow: &[251 * K, 300 * K, 1024 * K],
    cluster: 8,
};

/// 512 byte clusters have an L1 table of one cluster up to 2 MiB: it moves.
const CASES: &[Case] = &[
    Case { name: "plain", ..CASE },
    Case {
        name: "l1-moves",
        options: "cluster_size=512",
        grow: &[1024 * K, 3 * 1024 * K, 9 * 1024 * K],
        cluster: 2,
        ..CASE
    },
    // The second size needs a longer table, and a third another one.
    Case {
        name: "bitmaps",
        options: "cluster_size=512",
        bitmaps: true,
        grow: &[1024 * K, 3 * 1024 * K, 9 * 1024 * K],
        cluster: 2,
        ..CASE
    },
    Case { name: "longer-backing", backing: 700 * K + 512, ..CASE },
    Case { name: "longer-backing-ext", backing: 700 * K, options: "cluster_size=16k,extended_l2=on", ..CASE },
    Case { name: "longer-backing-v2", backing: 400 * K, options: "compat=0.10,cluster_size=4k", ..CASE },
    Case { name: "data-file", data_file: true, ..CASE },
    Case {
        name: "snapshot",
        options: "cluster_size=512",
        snapshot: true,
        grow: &[2100 * K, 4 * 1024 * K],
        ..CASE
    },
];

/// A backend as a node: requests of guests are counted, and wait while the size changes.
struct Served(Arc<BlockBackend>);

impl BlockNode for Served {
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
    fn try_pread_some(&self, offset: u64, buf: &mut [u8]) -> usize {
        self.0.try_pread_some(offset, buf)
    }
    fn try_pwrite(&self, offset: u64, buf: &[u8]) -> Option<Result<()>> {
        self.0.try_pwrite(offset, buf)
    }
    fn co_preadv(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.0.co_preadv(offset, bufs)
    }
    fn co_pwritev(&self, offset: u64, bufs: &[IoSlice<'_>], flags: WriteFlags) -> Result<()> {
        self.0.co_pwritev(offset, bufs, flags)
    }
    fn co_pwrite_zeroes(&self, offset: u64, len: u64, flags: WriteFlags) -> Result<()> {
        self.0.co_pwrite_zeroes(offset, len, flags)
    }
    fn co_pdiscard(&self, offset: u64, len: u64) -> Result<()> {
        self.0.co_pdiscard(offset, len)
    }
    fn co_flush(&self) -> Result<()> {
        self.0.co_flush()
    }
    fn co_block_status(&self, offset: u64, len: u64) -> Result<Extent> {
        self.0.co_block_status(offset, len)
    }
}

/// What is written into the new part, and nowhere else.
const NEW: u8 = 0x77;

/// The image and its data file as bytes, the backing image, what a guest sees, and the snapshot's content.
type Start = (Vec<u8>, Option<Vec<u8>>, Vec<u8>, Vec<u8>, BTreeMap<String, Vec<u8>>);

fn start(c: &Case) -> Start {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    let mut options = c.options.to_owned();
    let backing = noise(c.backing, 4);
    if c.backing > 0 {
        fs::write(dir.path().join("base.img"), &backing).unwrap();
        options = format!("backing_file=base.img,backing_fmt=raw,{options}");
    }
    if c.data_file {
        options = format!("data_file={},{options}", text(&dir.path().join("data.bin")));
    }
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, text(&path), &c.size.to_string()]);
    if c.bitmaps {
        qemu_img(&["bitmap", "--add", "--enable", "-g", "512", text(&path), "on"]);
        qemu_img(&["bitmap", "--add", "--enable", "-g", "512", text(&path), "off"]);
    }
    // The last cluster is written, and what was there before the disk's end reaches past it.
    qemu_io(&path, &["write -P 11 0 70k".to_owned(), format!("write -P 12 200k {}", c.size - 200 * K)]);
    if c.bitmaps {
        qemu_img(&["bitmap", "--disable", text(&path), "off"]);
    }
    let mut snapshots = BTreeMap::new();
    if c.snapshot {
        qemu_img(&["snapshot", "-c", "s0", text(&path)]);
        snapshots.insert("s0".to_owned(), content_by_qemu(&path, Some("s0")));
        qemu_io(&path, &["write -P 13 8k 9k".to_owned()]);
    }
    let content = content_by_qemu(&path, None);
    let data = fs::read(dir.path().join("data.bin")).ok();
    (fs::read(&path).unwrap(), data, backing, content, snapshots)
}

/// The image's bitmaps that may be believed: name, and bits.
fn believed(image: &[u8]) -> std::result::Result<BTreeMap<String, Vec<bool>>, String> {
    let l = image::Layout::parse(image)?;
    let Some((_, _, there)) = &l.bitmaps else { return Ok(BTreeMap::new()) };
    let mut all = BTreeMap::new();
    for b in there.iter().filter(|b| b.flags & BITMAP_IN_USE == 0 && l.autoclear & 1 != 0) {
        all.insert(b.name.clone(), l.bits(image, b)?);
    }
    Ok(all)
}

/// Whether what a bitmap says of the old part is still there, and of the new part nothing.
fn judge_bitmap(name: &str, before: &[bool], now: &[bool]) -> std::result::Result<(), String> {
    let kept = before.iter().zip(now).all(|(old, new)| *old == *new || (*new && name == "on"));
    if !kept {
        return Err(format!("bitmap {name:?}: the old bits are not those that it had"));
    }
    if name == "off" && now[before.len()..].iter().any(|&b| b) {
        return Err(format!("bitmap {name:?}, which is disabled, has bits of the new part"));
    }
    Ok(())
}

/// Grows the disk, step by step; after each: a write into the last bytes that are new, and the number of the step, durably, in
/// the last sector of the old disk, which guests leave alone.
fn co_grow(backend: &Arc<BlockBackend>, sizes: &[u64], mark: u64) -> std::result::Result<(), Error> {
    for (i, &size) in sizes.iter().enumerate() {
        assert_eq!(backend.co_resize(size)?, size);
        assert_eq!(backend.len(), size);
        let bytes = [NEW; 512];
        backend.co_pwritev(size - 512, &[IoSlice::new(&bytes)], WriteFlags::empty())?;
        let step = [i as u8 + 1; SECTOR];
        backend.co_pwritev(mark, &[IoSlice::new(&step)], WriteFlags::FUA)?;
    }
    Ok(())
}

fn crash(c: &Case, seed: u64) -> (usize, usize, Vec<String>) {
    let (file, data, backing, content, snapshots) = start(c);
    let bitmaps = believed(&file).unwrap();
    assert_eq!(bitmaps.len(), if c.bitmaps { 2 } else { 0 });
    let mut w = World::new(seed);
    let file = w.file("image", file);
    let data_file = data.is_some();
    let data = data.map(|d| w.file("data", d));
    let below = Below::new(&file, data.as_ref(), &backing);
    let node = w.co(move || driver::co_open(&below).unwrap_or_else(|e| panic!("{e}")));
    let backend = BlockBackend::new(Arc::clone(&node) as Arc<dyn BlockNode>);
    let mark = content.len() as u64 - SECTOR as u64;
    let initial = &content[..mark as usize];
    let guest = Guest::new(initial.len());
    w.hold(true);
    let served = Arc::new(Served(Arc::clone(&backend))) as Arc<dyn BlockNode>;
    let habits = Habits { cluster: c.cluster, ..HABITS };
    let mut tasks = guests(&mut w, &served, &guest, 3, 10, habits);
    let growing = Arc::clone(&backend);
    let sizes = c.grow;
    tasks.push(Box::new(move || {
        co_grow(&growing, sizes, mark).unwrap_or_else(|e| panic!("{e}: {}", e.source))
    }));
    w.run(tasks);
    let files: Vec<Recording> = w.files.iter().map(|f| Recording::of(f)).collect();
    let closing = Arc::clone(&node);
    w.co(move || closing.co_close()).unwrap();

    let guest = guest.lock().unwrap();
    let mut failures: Vec<String> = guest.errors.clone();
    failures.extend(guest.judge_reads(initial, false).err());
    let history = Crash {
        files: &files,
        history: &guest.history,
        initial,
        backing: &backing,
        snapshots: &snapshots,
        bitmaps: &BTreeMap::new(),
        damaged: false,
    };
    let mut reader = image::Reader::new(backing.clone());
    let mut seen_sizes = std::collections::BTreeSet::new();
    let mut old_and_new = (0, 0);
    let mut look = |views: &[&[u8]], n: usize| -> std::result::Result<(), String> {
        let size = be64(views[0], 24);
        seen_sizes.insert(size);
        let step = c.grow.iter().position(|&s| s == size).map_or(0, |i| i + 1);
        if step == 0 && size != c.size {
            return Err(format!("the disk has {size} bytes, which it never had"));
        }
        let mut disk = vec![0xee; size as usize];
        reader.read_active(views[0], views.get(1).copied(), &mut disk)?;
        let marked = disk[mark as usize];
        if (marked as usize) <= c.grow.len() && marked as usize > step {
            return Err(format!("step {marked} was answered, and the size is that of step {step}"));
        }
        for (i, sector) in disk[c.size as usize..].chunks(SECTOR).enumerate() {
            let at = c.size + (i * SECTOR) as u64;
            let written = c.grow.iter().any(|s| s - SECTOR as u64 == at);
            let known =
                sector.iter().all(|&b| b == 0) || (written && sector.iter().all(|&b| b == 0 || b == NEW));
            if !known {
                return Err(format!("byte {at:#x}, which is new, holds {:#x}", sector[0]));
            }
        }
        for (name, bits) in believed(views[0])? {
            judge_bitmap(&name, &bitmaps[&name], &bits)?;
            if step > 0 { old_and_new.1 += 1 } else { old_and_new.0 += 1 }
        }
        // The real checker, now and then; it looks for files beside the image.
        if n.is_multiple_of(400) && !data_file && backing.is_empty() {
            qemu_check(views[0])?;
        }
        Ok(())
    };
    let verdict = enumerate(&history, Effort { random: 6, singles: 4, stride: 2 }, seed, &mut look);
    failures.extend(verdict.failures);
    let closed: Vec<Vec<u8>> = w.files.iter().map(|f| f.content()).collect();
    let found = image::check(&closed[0]);
    failures.extend(found.corruptions.into_iter().map(|x| format!("after an orderly close: {x}")));
    if found.leaks != 0 {
        failures.push(format!("{} clusters are leaked by an orderly close", found.leaks));
    }
    if c.bitmaps {
        assert!(
            old_and_new.0 > 0 && old_and_new.1 > 0,
            "bitmaps are believed before and after: {old_and_new:?}"
        );
        let now = believed(&closed[0]).unwrap();
        assert_eq!(now.len(), 2, "after an orderly close all may be believed");
        for (name, bits) in &now {
            failures.extend(judge_bitmap(name, &bitmaps[name], bits).err());
        }
        let noted = c.grow.iter().all(|size| now["on"][(size / 512 - 1) as usize]);
        if !noted {
            failures.push("what was written into the new part is not in the bitmap".to_owned());
        }
        failures.extend(qemu_check(&closed[0]).err());
    }
    let last = *c.grow.last().unwrap();
    let mut disk = vec![0xee; last as usize];
    reader.read_active(&closed[0], closed.get(1).map(Vec::as_slice), &mut disk).unwrap();
    for &size in c.grow {
        if disk[size as usize - 512..size as usize] != [NEW; 512] {
            failures.push(format!("what was written at the end of {size} bytes is not there"));
        }
    }
    (verdict.states, seen_sizes.len(), failures)
}

#[test]
fn no_power_failure_while_a_disk_grows_shows_anything_but_zeroes() {
    let first = seed(31);
    let mut states = 0;
    for c in CASES {
        for seed in first..first + 2 {
            let (n, sizes, failures) = crash(c, seed);
            assert!(failures.is_empty(), "{} with CONBD_SEED={seed}:\n{}", c.name, failures.join("\n"));
            assert_eq!(sizes, c.grow.len() + 1, "{}: each size is in some state", c.name);
            states += n;
        }
    }
    assert!(states >= 10_000, "{states} states are few");
}

#[test]
fn what_cannot_grow_says_why_and_stays_as_it_is() {
    let (file, _, _, _, _) = start(&Case { snapshot: true, options: "compat=0.10,cluster_size=4k", ..CASE });
    let mut w = World::new(1);
    let sim = w.file("image", file);
    let below = Below::new(&sim, None, &[]);
    let (size, errors) = w.co(move || {
        let node = driver::co_open(&below).unwrap();
        let errno = |len| node.co_resize(len).err().map(|e| e.errno());
        // A version 2 snapshot has no size of its own; the second is not in sectors.
        let errors = [errno(1 << 20), errno((1 << 20) + 1), errno(100), errno(0)];
        node.co_close().unwrap();
        (node.len(), errors)
    });
    assert_eq!(size, CASE.size);
    assert_eq!(errors, [Some(libc::ENOTSUP), Some(libc::EINVAL), None, None]);
    let (file, ..) = start(&CASE);
    let sim = w.file("image", file);
    let below = Below::new(&sim, None, &[]);
    let errno = w.co(move || {
        let node = driver::co_open(&below).unwrap();
        // 4 KiB clusters and an L1 table of 32 MiB: 8 TiB.
        node.co_resize(9 << 40).err().map(|e| e.errno())
    });
    assert_eq!(errno, Some(libc::EFBIG));
}

#[test]
fn clusters_left_past_the_end_do_not_come_back() {
    // A disk that was made smaller by writing another size into its header: its clusters are still there.
    let (mut file, _, _, content, _) = start(&CASE);
    let small = 100 * K;
    file[24..32].copy_from_slice(&small.to_be_bytes());
    let mut w = World::new(1);
    let sim = w.file("image", file);
    let below = Below::new(&sim, None, &[]);
    let got = w.co(move || {
        let node = driver::co_open(&below).unwrap();
        node.co_resize(CASE.size).unwrap();
        let got = driver::co_read_all(&*node).unwrap();
        node.co_close().unwrap();
        got
    });
    assert_eq!(got[..small as usize], content[..small as usize]);
    assert!(got[small as usize..].iter().all(|&b| b == 0), "what was there comes back");
    assert!(content[small as usize..].iter().any(|&b| b != 0), "something was there");
    let found = image::check(&sim.content());
    assert!(found.corruptions.is_empty(), "{:?}", found.corruptions);
}

#[test]
fn a_bitmap_that_ends_in_all_ones_says_nothing_of_what_is_new() {
    let case = Case { options: "cluster_size=512", bitmaps: true, ..CASE };
    let (mut file, ..) = start(&case);
    let l = image::Layout::parse(&file).unwrap();
    let off = l.bitmaps.as_ref().unwrap().2.iter().find(|b| b.name == "off").unwrap().clone();
    assert_eq!(off.table_size, 1);
    // Its one cluster is leaked by that.
    file[off.table_offset as usize..][..8].copy_from_slice(&1u64.to_be_bytes());
    let mut w = World::new(1);
    let sim = w.file("image", file);
    let below = Below::new(&sim, None, &[]);
    w.co(move || {
        let node = driver::co_open(&below).unwrap();
        node.co_resize(300 * K).unwrap();
        node.co_close().unwrap();
    });
    let bits = believed(&sim.content()).unwrap().remove("off").unwrap();
    let old = (CASE.size / 512) as usize;
    assert_eq!(bits.len(), 600);
    assert!(bits[..old].iter().all(|&b| b));
    assert!(bits[old..].iter().all(|&b| !b), "bits of the new part are set");
    let found = image::check(&sim.content());
    assert!(found.corruptions.is_empty(), "{:?}", found.corruptions);
}

#[test]
fn an_l1_table_longer_than_a_refcount_block_counts_finds_its_place() {
    // With 64-bit refcounts a block counts 64 clusters of 512 bytes; 150 MiB need 75 of them.
    let (file, ..) = start(&Case { options: "cluster_size=512,refcount_bits=64", ..CASE });
    let before = file.len();
    let mut w = World::new(1);
    let sim = w.file("image", file);
    let below = Below::new(&sim, None, &[]);
    w.co(move || {
        let node = driver::co_open(&below).unwrap();
        for mib in [3u64, 150, 400] {
            node.co_resize(mib << 20).unwrap();
            let bytes = [NEW; 4096];
            node.co_pwritev((mib << 20) - 4096, &[IoSlice::new(&bytes)], WriteFlags::empty()).unwrap();
        }
        node.co_flush().unwrap();
        let mut got = [0; 4096];
        node.co_preadv((150 << 20) - 4096, &mut [IoSliceMut::new(&mut got)]).unwrap();
        assert_eq!(got, [NEW; 4096]);
        node.co_close().unwrap();
    });
    let after = sim.content();
    assert!(after.len() < before + (4 << 20), "the file has {} bytes", after.len());
    let found = image::check(&after);
    assert!(found.corruptions.is_empty(), "{:?}", found.corruptions);
    assert_eq!(found.leaks, 0);
    qemu_check(&after).unwrap();
}
