//! Broken images: every field, every kind of table entry, every table, changed to what it must not be. Opening, reading
//! and writing them through us may fail, with an error that says where; it may not panic, hang, eat the memory, or
//! change what it was not asked to change.

use crate::cli_harness::{Serving, conbd};
use crate::corpus::{noise, qemu_img, qemu_io, text};
use crate::driver::Threads;
use crate::image::{self, Layout, be32, be64};
use crate::power::{Rng, seed};
use crate::support::run;
use conbd::block::qcow2::Qcow2Node;
use conbd::block::{BlockNode, WriteFlags};
use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::path::Path;
use std::sync::Arc;

/// A change of a good image.
pub(crate) struct Mutation {
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
}

const CLUSTER: u64 = 4096;
pub(crate) const SIZE: u64 = 3 << 20;

/// A good image with something of everything: data, zeroes, compressed clusters, a snapshot, a bitmap.
pub(crate) fn good(dir: &Path, options: &str, extras: bool) -> Vec<u8> {
    let path = dir.join("good.qcow2");
    let size = SIZE.to_string();
    let o = format!("cluster_size=4k{options}");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &o, text(&path), &size]);
    if extras {
        qemu_img(&["bitmap", "--add", text(&path), "b0"]);
    }
    let pattern = dir.join("pattern");
    fs::write(&pattern, noise(64 << 10, 9)).unwrap();
    qemu_io(
        &path,
        &[
            format!("write -s {} 0 64k", text(&pattern)),
            "write -P 7 1M 40k".to_owned(),
            "write -z 1088k 64k".to_owned(),
            format!("write -c -s {} 2M 64k", text(&pattern)),
        ],
    );
    if extras {
        qemu_img(&["snapshot", "-c", "s0", text(&path)]);
        qemu_io(&path, &["write -P 8 8k 16k".to_owned(), "write -P 9 2560k 8k".to_owned()]);
    }
    fs::read(&path).unwrap()
}

/// Where things are in a good image.
struct Places {
    l: Layout,
    l2: u64,
    refblock: u64,
    extension_area: u64,
}

fn places(d: &[u8]) -> Places {
    let l = Layout::parse(d).unwrap();
    let l2 = be64(d, l.l1_offset as usize) & 0x00ff_ffff_ffff_fe00;
    let refblock = be64(d, l.reftable_offset as usize);
    Places { l2, refblock, extension_area: u64::from(be32(d, 100)), l }
}

fn put(d: &[u8], at: u64, bytes: &[u8]) -> Vec<u8> {
    let mut d = d.to_vec();
    let end = at as usize + bytes.len();
    if d.len() < end {
        d.resize(end, 0);
    }
    d[at as usize..end].copy_from_slice(bytes);
    d
}

/// Header fields: name, offset, width.
const FIELDS: &[(&str, u64, usize)] = &[
    ("magic", 0, 4),
    ("version", 4, 4),
    ("backing_file_offset", 8, 8),
    ("backing_file_size", 16, 4),
    ("cluster_bits", 20, 4),
    ("size", 24, 8),
    ("crypt_method", 32, 4),
    ("l1_size", 36, 4),
    ("l1_table_offset", 40, 8),
    ("refcount_table_offset", 48, 8),
    ("refcount_table_clusters", 56, 4),
    ("nb_snapshots", 60, 4),
    ("snapshots_offset", 64, 8),
    ("incompatible_features", 72, 8),
    ("compatible_features", 80, 8),
    ("autoclear_features", 88, 8),
    ("refcount_order", 96, 4),
    ("header_length", 100, 4),
    ("compression_type", 104, 1),
];

/// All mutations of a good image.
pub(crate) fn mutations(d: &[u8], extras: bool) -> Vec<Mutation> {
    let mut out: Vec<Mutation> = Vec::new();
    let mut add = |name: String, bytes: Vec<u8>| {
        if bytes != d {
            out.push(Mutation { name, bytes });
        }
    };
    let p = places(d);
    let end = (d.len() as u64).next_multiple_of(CLUSTER);
    for &(name, at, width) in FIELDS {
        let old = d[at as usize..at as usize + width].iter().fold(0u64, |v, &b| v << 8 | u64::from(b));
        let max = if width == 8 { u64::MAX } else { (1 << (8 * width)) - 1 };
        let mut values = vec![
            0,
            1,
            old + 1,
            old.wrapping_sub(1) & max,
            max,
            max - 7,
            max / 2 + 1,
            max / 2,
            1 << (4 * width),
        ];
        if width == 8 {
            values.extend([
                end,
                end + CLUSTER,
                1 << 40,
                p.l.l1_offset,
                p.l.reftable_offset,
                p.l2,
                p.refblock,
                512,
                104,
            ]);
        }
        values.sort_unstable();
        values.dedup();
        for v in values {
            let bytes = &v.to_be_bytes()[8 - width..];
            add(format!("header {name} = {v:#x}"), put(d, at, bytes));
        }
    }
    for bit in 0..64 {
        add(format!("incompatible bit {bit}"), put(d, 72, &(be64(d, 72) ^ 1 << bit).to_be_bytes()));
    }
    // Table entries that point where they must not.
    let copied = 1u64 << 63;
    let targets: Vec<(String, u64)> = [
        ("nothing, COPIED", copied),
        ("unaligned", p.l2 + 512),
        ("unaligned, COPIED", copied | (p.l2 + 512)),
        ("past the end", end),
        ("past the end, COPIED", copied | end),
        ("far past the end", copied | 1 << 50),
        ("largest", copied | 0x00ff_ffff_ffff_f000),
        ("the header's tail", copied | 512),
        ("the L1 table", copied | p.l.l1_offset),
        ("an L2 table", copied | p.l2),
        ("the refcount table", copied | p.l.reftable_offset),
        ("a refcount block", copied | p.refblock),
        ("reserved low bits", copied | p.l2 | 0x1e),
        ("reserved high bits", copied | p.l2 | 0x3f << 56),
        ("all ones", u64::MAX),
        ("compressed past the end", 1 << 62 | end),
        ("compressed, longest", u64::MAX >> 2 | 1 << 62),
        ("compressed in the header", 1 << 62 | 4),
        ("compressed in the tables", 1 << 62 | p.l.l1_offset),
    ]
    .map(|(n, v)| (n.to_owned(), v))
    .to_vec();
    let l2_of = |guest: u64| p.l2 + guest / CLUSTER % 512 * 8;
    let mut slots = vec![
        ("L1[0]", p.l.l1_offset),
        ("L1[1]", p.l.l1_offset + 8),
        ("L2[0]", l2_of(0)),
        ("L2[3]", l2_of(3 * CLUSTER)),
        ("L2[unallocated]", l2_of(800 << 10)),
        ("refcount table[0]", p.l.reftable_offset),
        ("refcount table[1]", p.l.reftable_offset + 8),
    ];
    if extras {
        let (directory, _, bitmaps) = p.l.bitmaps.as_ref().unwrap();
        slots.extend([
            ("snapshot L1 offset", p.l.snapshots_offset),
            ("snapshot L1[0]", p.l.snapshots[0].l1_offset),
            ("bitmap table offset", *directory),
            ("bitmap table[0]", bitmaps[0].table_offset),
        ]);
    }
    for (slot, at) in &slots {
        for (name, value) in &targets {
            add(format!("{slot} points to {name}"), put(d, *at, &value.to_be_bytes()));
        }
    }
    // Tables as a whole.
    let cluster = CLUSTER as usize;
    add("all refcounts zero".into(), put(d, p.refblock, &vec![0; cluster]));
    add("all refcounts at most".into(), put(d, p.refblock, &vec![0xff; cluster]));
    add("all refcounts two".into(), put(d, p.refblock, &[0, 2].repeat(cluster / 2)));
    add("no refcount block".into(), put(d, p.l.reftable_offset, &vec![0; cluster]));
    add("L2 full of itself".into(), put(d, p.l2, &(copied | p.l2).to_be_bytes().repeat(512)));
    add("L2 full of one cluster".into(), {
        let e = be64(d, p.l2 as usize);
        put(d, p.l2, &e.to_be_bytes().repeat(512))
    });
    add("L1 full of one L2".into(), {
        let e = be64(d, p.l.l1_offset as usize);
        put(d, p.l.l1_offset, &e.to_be_bytes().repeat(p.l.l1_size as usize))
    });
    add("L1 is the L2 table".into(), put(d, 40, &p.l2.to_be_bytes()));
    add("refcount table is the L1 table".into(), put(d, 48, &p.l.l1_offset.to_be_bytes()));
    for (name, salt) in [
        ("L1", p.l.l1_offset),
        ("L2", p.l2),
        ("refcount block", p.refblock),
        ("refcount table", p.l.reftable_offset),
    ] {
        for n in 0..3 {
            add(format!("{name} is noise {n}"), put(d, salt, &noise(16 << 10, salt + n)[12 << 10..]));
        }
    }
    // Compressed streams.
    for guest in [2u64 << 20] {
        let table = be64(d, (p.l.l1_offset + guest / CLUSTER / 512 * 8) as usize) & 0x00ff_ffff_ffff_fe00;
        let at = table + guest / CLUSTER % 512 * 8;
        // The third one holds data that compress.
        for i in 0..16 {
            let e = be64(d, (at + i * 8) as usize);
            if e >> 62 & 1 == 0 {
                continue;
            }
            let offset = e & ((1 << 58) - 1);
            add(
                format!("compressed cluster {i} is noise"),
                put(d, offset, &noise(16 << 10, i)[12 << 10..][..256]),
            );
            add(format!("compressed cluster {i} is zeroes"), put(d, offset, &[0; 128]));
            add(
                format!("compressed cluster {i} is cut"),
                put(d, at + i * 8, &(1u64 << 62 | (offset + 9)).to_be_bytes()),
            );
            break;
        }
    }
    // Files cut short or grown.
    for len in [0, 1, 4, 8, 71, 72, 103, 104, 112, 4095, 4096, 8192, d.len() / 2, d.len() - 4096, d.len() - 1]
    {
        add(format!("cut to {len}"), d[..len.min(d.len())].to_vec());
    }
    // Extensions.
    let area = p.extension_area;
    for (name, kind, len) in [
        ("backing format", 0xe279_2acau32, 4096u32),
        ("backing format", 0xe279_2aca, u32::MAX),
        ("feature names", 0x6803_f857, 47),
        ("feature names", 0x6803_f857, u32::MAX - 7),
        ("bitmaps", 0x2385_2875, 0),
        ("bitmaps", 0x2385_2875, 23),
        ("bitmaps", 0x2385_2875, 25),
        ("encryption", 0x0537_be77, 16),
        ("encryption", 0x0537_be77, 1),
        ("data file", 0x4441_5441, 5000),
        ("unknown", 0x1234_5678, 0x7fff_ffff),
        ("unknown", 0x1234_5678, 3980),
    ] {
        let mut e = kind.to_be_bytes().to_vec();
        e.extend(len.to_be_bytes());
        add(format!("extension {name} of {len} bytes"), put(d, area, &e));
    }
    let twice = [&0x2385_2875u32.to_be_bytes()[..], &24u32.to_be_bytes(), &[0; 24]].concat();
    add("two bitmap extensions".into(), put(d, area, &[twice.clone(), twice].concat()));
    let filler = [&0x1111_1111u32.to_be_bytes()[..], &0u32.to_be_bytes()].concat();
    add("extensions without end".into(), put(d, area, &filler.repeat((CLUSTER - area) as usize / 8)));
    add("bitmap bit without extension".into(), {
        let d = put(d, 95, &[1]);
        put(&d, area, &[0; 8])
    });
    add("raw data file bit alone".into(), put(d, 95, &[2]));
    add("data file bit without a name".into(), put(d, 79, &[4]));
    add("extended L2 with small clusters".into(), put(d, 79, &[16]));
    // Backing files.
    let backing = |name: &str, at: u64| {
        let d = put(d, at, name.as_bytes());
        let d = put(&d, 8, &at.to_be_bytes());
        put(&d, 16, &(name.len() as u32).to_be_bytes())
    };
    add("backed by itself".into(), backing("bad.qcow2", 3000));
    add("backed by nothing".into(), backing("not-there.img", 3000));
    add("backed by a directory".into(), backing("/", 3000));
    add("backed by a device".into(), backing("/dev/zero", 3000));
    add("backed by a bad json".into(), backing("json:{\"driver\":", 3000));
    add("backed by a deep json".into(), backing(&("json:".to_owned() + &"[".repeat(900)), 3000));
    add("backed by a bad protocol".into(), backing("gopher://example.invalid/x", 3000));
    add("backed by no text".into(), put(&backing("aaaaaaaaaaaaaaa", 3000), 3000, &[0xff, 0xfe, 0, 1, 2]));
    add("backing name over the cluster's end".into(), backing("abcdefghijklmnop", 4090));
    if extras {
        let s = p.l.snapshots_offset;
        for (name, at, bytes) in [
            ("L1 size", 8, &u32::MAX.to_be_bytes()[..]),
            ("L1 size", 8, &0u32.to_be_bytes()),
            ("id length", 12, &u16::MAX.to_be_bytes()),
            ("name length", 14, &u16::MAX.to_be_bytes()),
            ("extra size", 36, &u32::MAX.to_be_bytes()),
            ("extra size", 36, &8u32.to_be_bytes()),
            ("disk size", 48, &u64::MAX.to_be_bytes()),
        ] {
            add(format!("snapshot {name} = {bytes:?}"), put(d, s + at, bytes));
        }
        let (b, _, _) = p.l.bitmaps.as_ref().unwrap();
        for (name, at, bytes) in [
            ("table size", 8, &u32::MAX.to_be_bytes()[..]),
            ("table size", 8, &0u32.to_be_bytes()),
            ("flags", 12, &u32::MAX.to_be_bytes()),
            ("flags", 12, &1u32.to_be_bytes()),
            ("type", 16, &[0]),
            ("granularity", 17, &[63]),
            ("granularity", 17, &[64]),
            ("granularity", 17, &[0]),
            ("name size", 18, &u16::MAX.to_be_bytes()),
            ("name size", 18, &0u16.to_be_bytes()),
            ("extra size", 20, &u32::MAX.to_be_bytes()),
        ] {
            add(format!("bitmap {name} = {bytes:?}"), put(d, b + at, bytes));
        }
        let mut at = p.extension_area as usize;
        while be32(d, at) != 0x2385_2875 {
            at += 8 + (be32(d, at + 4) as usize).next_multiple_of(8);
        }
        for (name, off, bytes) in [
            ("nb_bitmaps", 8, &0u32.to_be_bytes()[..]),
            ("nb_bitmaps", 8, &2u32.to_be_bytes()),
            ("nb_bitmaps", 8, &u32::MAX.to_be_bytes()),
            ("reserved", 12, &1u32.to_be_bytes()),
            ("directory size", 16, &0u64.to_be_bytes()),
            ("directory size", 16, &8u64.to_be_bytes()),
            ("directory size", 16, &u64::MAX.to_be_bytes()),
            ("directory offset", 24, &0u64.to_be_bytes()),
            ("directory offset", 24, &77u64.to_be_bytes()),
            ("directory offset", 24, &end.to_be_bytes()),
            ("directory offset", 24, &(u64::MAX - 4095).to_be_bytes()),
        ] {
            add(format!("bitmaps extension {name} = {bytes:?}"), put(d, (at + off) as u64, bytes));
        }
    }
    out
}

/// Data clusters with several entries and a refcount of 1: only a full check can see that, so a write to one is seen
/// through all.
const UNSEEN: &[&str] = &["L2 full of one cluster"];

/// What one broken image did to us.
fn probe_one(threads: &Threads, dir: &Path, m: &Mutation) -> Result<(), String> {
    let path = dir.join("bad.qcow2");
    fs::write(&path, &m.bytes).unwrap();
    let was_clean = is_clean(&m.bytes);
    // Reading.
    let mut before: Vec<Option<Vec<u8>>> = Vec::new();
    match threads.open(&path, true, None) {
        Err(e) => {
            if !e.contains("bad.qcow2") && !e.contains("not-there") {
                return Err(format!("the error names no image: {e}"));
            }
        }
        Ok(node) => {
            before = read_clusters(threads, &node);
            threads.close(node).ok();
            if fs::read(&path).unwrap() != m.bytes {
                return Err("reading has changed the image".to_owned());
            }
        }
    }
    // Writing: what succeeds must be there when the image is opened again, and all else must be as it was.
    let Ok(node) = threads.open(&path, false, None) else { return Ok(()) };
    let len = node.len();
    let writes: Vec<(u64, u8)> = [
        0,
        5000,
        8192,
        100 << 10,
        800 << 10,
        1 << 20,
        (1 << 20) + 70_000,
        2 << 20,
        (2 << 20) + 9000,
        2900 << 10,
    ]
    .into_iter()
    .enumerate()
    .map(|(i, at)| (at, 0xa0 + i as u8))
    .filter(|w| w.0 + 3000 <= len)
    .collect();
    let (writer, todo) = (Arc::clone(&node), writes.clone());
    let (acked, flushed) = threads.run(move || {
        let ok = |w: &(u64, u8)| {
            writer.co_pwritev(w.0, &[IoSlice::new(&[w.1; 3000])], WriteFlags::empty()).is_ok()
        };
        let mut acked: Vec<(u64, u8)> = todo.into_iter().filter(ok).collect();
        if len >= 3 << 20 && writer.co_pwrite_zeroes(1 << 20, 8192, WriteFlags::MAY_UNMAP).is_ok() {
            acked.push((1 << 20, 0));
        }
        let flushed = writer.co_flush().is_ok();
        // Once more, so that what was freed may be taken.
        let again = len >= 3 << 20
            && writer.co_pwritev(2800 << 10, &[IoSlice::new(&[0x77; 3000])], WriteFlags::empty()).is_ok();
        if again {
            acked.push((2800 << 10, 0x77));
        }
        (acked, flushed && writer.co_flush().is_ok())
    });
    let closed = threads.close(node);
    if !flushed || closed.is_err() {
        return Ok(());
    }
    let node = match threads.open(&path, true, None) {
        Ok(n) => n,
        Err(e) => return Err(format!("it took writes, and cannot be opened any more: {e}")),
    };
    let after = read_clusters(threads, &node);
    threads.close(node).ok();
    if UNSEEN.contains(&m.name.as_str()) {
        return Ok(());
    }
    for (i, (old, new)) in before.iter().zip(&after).enumerate() {
        let Some(mut want) = old.clone() else { continue };
        let start = i as u64 * CLUSTER;
        for &(at, value) in &acked {
            let n = if value == 0 { 8192 } else { 3000 };
            let (from, to) = (at.max(start), (at + n).min(start + want.len() as u64));
            if from < to {
                want[(from - start) as usize..(to - start) as usize].fill(value);
            }
        }
        match new {
            Some(new) if *new == want => {}
            Some(_) => return Err(format!("guest cluster {i} holds something else after writes elsewhere")),
            None => return Err(format!("guest cluster {i} cannot be read any more")),
        }
    }
    if was_clean {
        let found = image::check(&fs::read(&path).unwrap());
        if !found.corruptions.is_empty() {
            return Err(format!("a consistent image has become corrupt: {:?}", found.corruptions));
        }
    }
    Ok(())
}

/// Whether the tests' own checker finds nothing; it is not made for such images, and gives up on some.
fn is_clean(bytes: &[u8]) -> bool {
    std::panic::catch_unwind(|| image::check(bytes)).is_ok_and(|c| c.corruptions.is_empty())
}

/// Guest clusters, those that can be read; at most the first 4 MiB.
fn read_clusters(threads: &Threads, node: &Arc<Qcow2Node>) -> Vec<Option<Vec<u8>>> {
    let node = Arc::clone(node);
    threads.run(move || {
        let end = node.len().min(4 << 20);
        (0..end.div_ceil(CLUSTER))
            .map(|i| {
                let at = i * CLUSTER;
                let mut buf = vec![0; CLUSTER.min(end - at) as usize];
                node.co_preadv(at, &mut [IoSliceMut::new(&mut buf)]).ok().map(|()| buf)
            })
            .collect()
    })
}

/// Most memory that this process ever had, in KiB.
fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn survive(options: &str, extras: bool, at_least: usize) {
    let threads = Threads::new(2);
    let dir = tempfile::tempdir().unwrap();
    let image = good(dir.path(), options, extras);
    let all = mutations(&image, extras);
    assert!(all.len() >= at_least, "{} mutations are few", all.len());
    // A healthy image is served all the while, on the same thread.
    let healthy_path = dir.path().join("healthy.qcow2");
    fs::write(&healthy_path, &image).unwrap();
    let healthy = threads.open(&healthy_path, false, None).unwrap();
    let peak = peak_kib();
    let mut failures = Vec::new();
    let verbose = std::env::var_os("CONBD_VERBOSE").is_some();
    for (i, m) in all.iter().enumerate() {
        if verbose {
            println!("{} ({} KiB at most)", m.name, peak_kib());
        }
        // Through the daemon's opener too, which reads more of the image before it uses any.
        for real in [false, true] {
            threads.open_really(real);
            if let Err(e) = probe_one(&threads, dir.path(), m) {
                failures.push(format!("{} (real opener: {real}): {e}", m.name));
            }
        }
        let (node, value) = (Arc::clone(&healthy), i as u8);
        threads.run(move || {
            let at = (i as u64 * 7 % 700) * 4096;
            node.co_pwritev(at, &[IoSlice::new(&[value; 4096])], WriteFlags::empty()).unwrap();
            let mut buf = [0; 4096];
            node.co_preadv(at, &mut [IoSliceMut::new(&mut buf)]).unwrap();
            assert!(buf == [value; 4096], "the healthy image suffers");
        });
    }
    threads.close(healthy).unwrap();
    assert_eq!(image::check(&fs::read(healthy_path).unwrap()).corruptions, Vec::<String>::new());
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), all.len(), failures.join("\n"));
    assert!(peak_kib() < peak + (512 << 10), "memory went from {peak} KiB to {} KiB", peak_kib());
}

#[test]
fn no_broken_image_harms_us() {
    survive("", true, 350);
}

#[test]
fn no_broken_image_with_other_features_harms_us() {
    survive(",refcount_bits=1,compression_type=zstd", false, 250);
}

/// Bytes of metadata flipped at random: nothing is known of what that means, but it may not harm us.
/// `CONBD_FUZZ=N` tries N images instead of a few.
#[test]
fn no_random_damage_harms_us() {
    let threads = Threads::new(2);
    let dir = tempfile::tempdir().unwrap();
    let image = good(dir.path(), "", true);
    let tries = std::env::var("CONBD_FUZZ").map_or(150, |n| n.parse().expect("CONBD_FUZZ is a number"));
    let first = seed(1);
    let p = places(&image);
    let areas = [
        0..200,
        0..CLUSTER,
        p.l.l1_offset..p.l.l1_offset + 64,
        p.l2..p.l2 + CLUSTER,
        p.l.reftable_offset..p.l.reftable_offset + 32,
        p.refblock..p.refblock + 200,
        p.l.snapshots_offset..p.l.snapshots_offset + 80,
        p.l.snapshots[0].l1_offset..p.l.snapshots[0].l1_offset + 64,
        p.l.bitmaps.as_ref().unwrap().0..p.l.bitmaps.as_ref().unwrap().0 + 40,
    ];
    let path = dir.path().join("bad.qcow2");
    for s in first..first + tries {
        let mut rng = Rng(s);
        let mut bytes = image.clone();
        for _ in 0..1 + rng.below(6) {
            let area = &areas[rng.below(areas.len() as u64) as usize];
            let at = (area.start + rng.below(area.end - area.start)) as usize % bytes.len();
            bytes[at] = match rng.below(3) {
                0 => bytes[at] ^ (1 << rng.below(8)),
                1 => rng.next() as u8,
                _ => [0, 0xff, 0x80, 1][rng.below(4) as usize],
            };
        }
        fs::write(&path, &bytes).unwrap();
        threads.open_really(s % 2 == 1);
        if let Ok(node) = threads.open(&path, true, None) {
            read_clusters(&threads, &node);
            threads.close(node).ok();
            assert!(fs::read(&path).unwrap() == bytes, "CONBD_SEED={s}: reading has changed the image");
        }
        let Ok(node) = threads.open(&path, false, None) else { continue };
        let writer = Arc::clone(&node);
        threads.run(move || {
            for _ in 0..20 {
                let len = writer.len().min(4 << 20);
                if len < 8192 {
                    return;
                }
                let at = rng.below(len - 4096);
                // Any of these may fail; that is an error to somebody, not a harm.
                let _may_fail = match rng.below(4) {
                    0 => writer.co_pwrite_zeroes(at, 4096, WriteFlags::MAY_UNMAP),
                    1 => writer.co_pdiscard(at, 4096),
                    2 => writer.co_flush(),
                    _ => writer.co_pwritev(at, &[IoSlice::new(&[1; 4096])], WriteFlags::empty()),
                };
            }
        });
        read_clusters(&threads, &node);
        threads.close(node).ok();
    }
}

/// What a broken entry does to a request is told in the log, and by `conbd check`: image, table, and place in the file.
#[test]
fn a_broken_entry_is_told_with_its_image_its_table_and_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.qcow2");
    let small = good(dir.path(), "", false);
    let p = places(&small);
    let wrong = |d: &[u8], at: u64, bits: u64| put(d, at, &(be64(d, at as usize) ^ bits).to_be_bytes());
    let subclusters = {
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "extended_l2=on,cluster_size=16k",
            text(&path),
            "1M",
        ]);
        qemu_io(&path, &["write -P 7 0 16k".to_owned()]);
        fs::read(&path).unwrap()
    };
    let ext = places(&subclusters);
    let read = "read 0 4k";
    for (image, at, request, what) in [
        (wrong(&small, p.l.l1_offset, 1), p.l.l1_offset, read, "L1 entry"),
        (wrong(&small, p.l2, 1 << 9), p.l2, read, "L2 entry"),
        (wrong(&subclusters, ext.l2 + 8, 1 << 32), ext.l2, read, "extended L2 bitmap entry"),
        (wrong(&small, p.l.reftable_offset, 1), p.l.reftable_offset, "write 0 4k", "refcount table entry"),
    ] {
        fs::write(&path, &image).unwrap();
        let checked = conbd(&["check", text(&path)]);
        assert_eq!(checked.code, Some(2), "{what}: {checked:?}");
        let said = checked.stdout + &checked.stderr;
        assert!(said.contains(what), "{what}: {said}");
        let serving = Serving::start(&[text(&path), "--listen", "127.0.0.1:0"], 1);
        let uri = serving.uri().to_owned();
        let refused = run("qemu-io", &["-f", "raw", &uri, "-c", request]);
        assert!(refused.is_err_and(|e| e.contains("Input/output error")), "{what}");
        serving.wait_for_log(what);
        let log = serving.log();
        let line = log.lines().find(|l| l.contains(what)).expect("it is there");
        for part in ["bad.qcow2".to_owned(), format!("at byte {at:#x} of the file")] {
            assert!(line.contains(&part), "{what}: {part:?} is not in {line}");
        }
        // Closing a damaged image may fail: that is told too.
        serving.stop();
    }
    // And what keeps an image from being opened.
    for (at, bytes, want) in [
        (36u64, [0, 0, 0, 1], "header: l1_size (bytes 36-39) is 0x1"),
        (48, [0x7f, 0, 0, 0], "header: refcount_table_offset (bytes 48-55) is 0x7f"),
        (40, [0, 0, 0, 1], "header: l1_table_offset (bytes 40-47) is 0x1"),
    ] {
        fs::write(&path, put(&small, at, &bytes)).unwrap();
        let ended = conbd(&["serve", text(&path), "--listen", "127.0.0.1:0", "--log-level", "off"]);
        let line = ended.error_line();
        assert!(line.contains("bad.qcow2") && line.contains(want), "{want:?} is not in {line}");
    }
}
