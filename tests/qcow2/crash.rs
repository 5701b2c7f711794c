//! The crash suite: guests work with the driver over simulated files, and every state that a power failure could have
//! left is judged: metadata, what was flushed, snapshots; some are opened again, and some shown to qemu-img.

use crate::corpus::{content_by_qemu, noise, qemu_img, qemu_io, text};
use crate::driver::{self, Below};
use crate::image;
use crate::power::{BITMAP_IN_USE, Crash, Effort, Recording, Rng, Verdict, enumerate, seed};
use crate::world::{Guest, HABITS, Habits, World, guests};
use conbd::block::qcow2::Sabotage;
use conbd::block::qcow2::check::{Repair, co_check};
use conbd::block::{BlockNode, Format, OpenOptions, WriteFlags, open};
use std::collections::BTreeMap;
use std::fs;
use std::io::IoSlice;
use std::sync::{Arc, Mutex};

/// How the image of a scenario begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begin {
    /// Empty.
    Fresh,
    /// Some writes by QEMU.
    Written,
    /// Over a raw image that is shorter.
    Overlay,
    /// Compressed.
    Compressed,
    /// Written, with a snapshot, and written again.
    Snapshot,
    /// Data in another file.
    DataFile,
    /// Written, with persistent bitmaps of two granularities and a disabled one, and written again.
    Bitmaps,
}

/// What is crashed.
#[derive(Debug, Clone, Copy)]
struct Scenario {
    name: &'static str,
    options: &'static str,
    size: u64,
    begin: Begin,
    guests: usize,
    steps: usize,
    habits: Habits,
    /// How often it is opened, worked with, and closed.
    sessions: usize,
    /// Marks of bitmaps are not flushed: for the test of the test.
    careless: bool,
}

const fn sc(name: &'static str, options: &'static str, size: u64, begin: Begin, cluster: usize) -> Scenario {
    let habits = Habits { cluster, ..HABITS };
    Scenario { name, options, size, begin, guests: 4, steps: 12, habits, sessions: 1, careless: false }
}

const SCENARIOS: &[Scenario] = &[
    sc("fresh-c4k", "cluster_size=4k", 1 << 20, Begin::Fresh, 8),
    sc("fresh-c64k", "", 1 << 20, Begin::Fresh, 128),
    Scenario { steps: 20, ..sc("fresh-c512", "cluster_size=512", 512 << 10, Begin::Fresh, 4) },
    Scenario {
        steps: 20,
        ..sc("grows-c512-r64", "cluster_size=512,refcount_bits=64", 2 << 20, Begin::Fresh, 48)
    },
    sc("v2", "compat=0.10,cluster_size=4k", 1 << 20, Begin::Written, 8),
    sc("r1", "refcount_bits=1,cluster_size=4k", 1 << 20, Begin::Written, 8),
    sc("written-c4k", "cluster_size=4k", 1 << 20, Begin::Written, 8),
    sc("overlay-c4k", "cluster_size=4k", 1 << 20, Begin::Overlay, 8),
    sc("overlay-ext", "cluster_size=16k,extended_l2=on", 1 << 20, Begin::Overlay, 16),
    sc("ext", "cluster_size=16k,extended_l2=on", 1 << 20, Begin::Fresh, 16),
    sc("compressed-c4k", "cluster_size=4k", 512 << 10, Begin::Compressed, 8),
    sc("snapshot-c4k", "cluster_size=4k", 1 << 20, Begin::Snapshot, 8),
    sc("snapshot-c512", "cluster_size=512", 256 << 10, Begin::Snapshot, 4),
    sc("data-file", "cluster_size=4k", 1 << 20, Begin::DataFile, 8),
    sc("lazy", "lazy_refcounts=on,cluster_size=4k", 1 << 20, Begin::Written, 8),
    sc("preallocated", "preallocation=metadata,cluster_size=4k", 1 << 20, Begin::Fresh, 8),
];

const BITMAPS: &[Scenario] = &[
    Scenario { sessions: 2, steps: 6, ..sc("bitmaps-c4k", "cluster_size=4k", 1 << 20, Begin::Bitmaps, 8) },
    // Bitmaps of several clusters.
    Scenario { sessions: 2, steps: 6, ..sc("bitmaps-c512", "cluster_size=512", 4 << 20, Begin::Bitmaps, 4) },
];

/// An image as bytes, with what a guest sees in it.
struct Start {
    image: Vec<u8>,
    data: Option<Vec<u8>>,
    backing: Vec<u8>,
    content: Vec<u8>,
    snapshots: BTreeMap<String, Vec<u8>>,
    bitmaps: BTreeMap<String, Vec<bool>>,
}

fn start(s: &Scenario) -> Start {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    let size = s.size.to_string();
    let mut options = s.options.to_owned();
    let mut backing = Vec::new();
    match s.begin {
        Begin::Overlay => {
            backing = noise(s.size * 3 / 4 + 512, 4);
            fs::write(dir.path().join("base.img"), &backing).unwrap();
            options = format!("backing_file=base.img,backing_fmt=raw,{options}");
        }
        Begin::DataFile => options = format!("data_file={},{options}", text(&dir.path().join("data.bin"))),
        _ => {}
    }
    let mut snapshots = BTreeMap::new();
    if s.begin == Begin::Compressed {
        let raw = dir.path().join("raw");
        fs::write(&raw, noise(s.size, 5)).unwrap();
        qemu_img(&[
            "convert",
            "-q",
            "-c",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-o",
            &options,
            text(&raw),
            text(&path),
        ]);
    } else {
        // An empty -o is an error.
        let options = if options.is_empty() { "compat=1.1" } else { &options };
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, text(&path), &size]);
    }
    if matches!(s.begin, Begin::Written | Begin::Snapshot | Begin::DataFile | Begin::Bitmaps) {
        qemu_io(
            &path,
            &[
                "write -P 11 0 70k".to_owned(),
                "write -z 40k 20k".to_owned(),
                "write -P 12 200k 33k".to_owned(),
            ],
        );
    }
    if s.begin == Begin::Snapshot {
        qemu_img(&["snapshot", "-c", "s0", text(&path)]);
        snapshots.insert("s0".to_owned(), content_by_qemu(&path, Some("s0")));
        qemu_io(&path, &["write -P 13 8k 9k".to_owned()]);
    }
    if s.begin == Begin::Bitmaps {
        for (name, how, granularity) in
            [("fine", "--enable", "512"), ("coarse", "--enable", "64k"), ("off", "--disable", "4k")]
        {
            qemu_img(&["bitmap", "--add", how, "-g", granularity, text(&path), name]);
        }
        qemu_io(&path, &["write -P 14 300k 5k".to_owned()]);
    }
    let content = content_by_qemu(&path, None);
    let data = fs::read(dir.path().join("data.bin")).ok();
    let image = fs::read(&path).unwrap();
    let l = image::Layout::parse(&image).unwrap();
    let there = l.bitmaps.iter().flat_map(|b| &b.2);
    let bitmaps = there.map(|b| (b.name.clone(), l.bits(&image, b).unwrap())).collect();
    Start { image, data, backing, content, snapshots, bitmaps }
}

/// What a run leaves to be judged.
struct Ran {
    files: Vec<Recording>,
    guest: Arc<Mutex<Guest>>,
    /// The image after an orderly close.
    closed: Vec<Vec<u8>>,
}

/// Runs guests against the driver over simulated files, and closes it, as often as the scenario says.
fn run_driver(s: &Scenario, start: &Start, seed: u64, sabotage: Sabotage) -> Ran {
    let mut w = World::new(seed);
    let file = w.file("image", start.image.clone());
    let data = start.data.clone().map(|d| w.file("data", d));
    let mut below = Below::new(&file, data.as_ref(), &start.backing);
    if s.careless {
        below.bitmaps_file = Some(Arc::new(driver::NoFlush(Arc::clone(&file))));
    }
    let guest = Guest::new(start.content.len());
    for _ in 0..s.sessions {
        w.hold(false);
        let opened = below.clone();
        let node = w.co(move || driver::co_open(&opened).unwrap_or_else(|e| panic!("{e}")));
        node.sabotage(sabotage);
        w.hold(true);
        let served = Arc::clone(&node) as Arc<dyn BlockNode>;
        let tasks = guests(&mut w, &served, &guest, s.guests, s.steps, s.habits);
        w.run(tasks);
        // An orderly close makes everything durable, as a flush does; power fails during it too.
        let issued = w.clock.tick();
        w.co(move || node.co_close()).unwrap();
        guest.lock().unwrap().history.flushes.push((issued, w.clock.tick()));
    }
    let files = w.files.iter().map(|f| Recording::of(f)).collect();
    let closed = w.files.iter().map(|f| f.content()).collect();
    Ran { files, guest, closed }
}

/// Opens a state with the driver: reads, writes, flushes, closes, and checks. Every so often.
struct Reopen {
    world: World,
    backing: Vec<u8>,
    every: usize,
}

impl Reopen {
    fn look(&mut self, views: &[&[u8]], n: usize) -> Result<(), String> {
        if n.is_multiple_of(self.every / 10) {
            self.check(views[0])?;
        }
        if n % (2 * self.every) == self.every / 2 {
            self.by_name(views)?;
        }
        if !n.is_multiple_of(self.every) {
            return Ok(());
        }
        let l = image::Layout::parse(views[0])?;
        let mut want = vec![0; l.size as usize];
        let mut reader = image::Reader::new(self.backing.clone());
        reader.read_active(views[0], views.get(1).copied(), &mut want)?;
        self.world.files.clear();
        let file = self.world.file("image", views[0].to_vec());
        let data = views.get(1).map(|d| self.world.file("data", d.to_vec()));
        let below = Below::new(&file, data.as_ref(), &self.backing);
        let salt = n as u64;
        self.world.co(move || -> Result<(), String> {
            let node = driver::co_open(&below).map_err(|e| format!("it cannot be opened again: {e}"))?;
            let got = driver::co_read_all(&*node)?;
            if let Some(d) = driver::difference(&got, &want) {
                return Err(format!("the driver reads {d}"));
            }
            let mut rng = Rng(salt);
            for i in 0..6 {
                let at = rng.below(want.len() as u64 - 4096) as usize;
                let bytes = [i as u8 + 1; 4000];
                let wrote = node.co_pwritev(at as u64, &[IoSlice::new(&bytes)], WriteFlags::empty());
                wrote.map_err(|e| format!("a write after the crash: {e}: {}", e.source))?;
                want[at..at + 4000].copy_from_slice(&bytes);
            }
            node.co_flush().map_err(|e| format!("a flush after the crash: {e}: {}", e.source))?;
            let got = driver::co_read_all(&*node)?;
            if let Some(d) = driver::difference(&got, &want) {
                return Err(format!("after writes, the driver reads {d}"));
            }
            node.co_close().map_err(|e| format!("closing after the crash: {e}: {}", e.source))?;
            Ok(())
        })?;
        let after = file.content();
        let found = image::check(&after);
        if !found.corruptions.is_empty() {
            return Err(format!("corrupt after it was opened again: {}", found.corruptions.join("; ")));
        }
        Ok(())
    }
}

impl Reopen {
    /// `conbd check` must be of the judge's opinion.
    fn check(&mut self, image: &[u8]) -> Result<(), String> {
        self.world.files.clear();
        let file = self.world.file("image", image.to_vec());
        let ours = self.world.co(move || co_check(&*file, Repair::Nothing)).map_err(|e| e.to_string())?;
        let judges = image::check(image);
        if ours.corruptions != judges.corruptions.len() as u64 || ours.check_errors != 0 {
            return Err(format!("conbd check says: {}", ours.problems.join("; ")));
        }
        if ours.leaks != judges.leaks {
            return Err(format!("conbd check counts {} leaks, the judge {}", ours.leaks, judges.leaks));
        }
        Ok(())
    }

    /// Opens the state as the daemon opens images, by name and over real files: reads, writes, closes, checks.
    fn by_name(&mut self, views: &[&[u8]]) -> Result<(), String> {
        if views.len() > 1 {
            // The image has the data file's name from when it was made.
            return Ok(());
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.qcow2");
        fs::write(&path, views[0]).unwrap();
        if !self.backing.is_empty() {
            fs::write(dir.path().join("base.img"), &self.backing).unwrap();
        }
        let mut want = vec![0; image::Layout::parse(views[0])?.size as usize];
        image::Reader::new(self.backing.clone()).read_active(views[0], None, &mut want)?;
        let node = open(&OpenOptions { format: Format::Qcow2, ..OpenOptions::new(&path) })
            .map_err(|e| format!("it cannot be opened by name: {e}"))?;
        self.world.co(move || -> Result<(), String> {
            let got = driver::co_read_all(&*node)?;
            if let Some(d) = driver::difference(&got, &want) {
                return Err(format!("opened by name, the driver reads {d}"));
            }
            let told = |e: conbd::block::Error| format!("opened by name: {e}: {}", e.source);
            let bytes = [0x5a; 9000];
            want[3000..12_000].copy_from_slice(&bytes);
            node.co_pwritev(3000, &[IoSlice::new(&bytes)], WriteFlags::FUA).map_err(told)?;
            let got = driver::co_read_all(&*node)?;
            if let Some(d) = driver::difference(&got, &want) {
                return Err(format!("opened by name, after a write, the driver reads {d}"));
            }
            node.co_close().map_err(told)
        })?;
        let found = image::check(&fs::read(&path).unwrap());
        match found.corruptions.is_empty() {
            true => Ok(()),
            false => Err(format!("corrupt after it was opened by name: {}", found.corruptions.join("; "))),
        }
    }
}

/// Asks qemu-img, which must count as many leaks as the judge.
pub(crate) fn qemu_check(bytes: &[u8]) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.qcow2");
    fs::write(&path, bytes).unwrap();
    let dirty = image::be64(bytes, 72) & image::DIRTY != 0 && image::be32(bytes, 4) >= 3;
    let mut args = vec!["check", "-f", "qcow2", "--output=json"];
    if dirty {
        args.extend(["-r", "all"]);
    }
    args.push(text(&path));
    let out = std::process::Command::new("qemu-img").args(&args).output().unwrap();
    let leaks = || {
        let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        report["leaks"].as_u64().unwrap_or(0)
    };
    match out.status.code() {
        Some(0 | 3) if dirty => Ok(()),
        Some(0 | 3) if leaks() == image::check(bytes).leaks => Ok(()),
        Some(0 | 3) => {
            Err(format!("qemu-img counts {} leaks, the judge {}", leaks(), image::check(bytes).leaks))
        }
        code => Err(format!("qemu-img check: {code:?}: {}", String::from_utf8_lossy(&out.stderr))),
    }
}

/// Crashes one scenario in all ways: what was judged, and what is wrong.
fn crash(s: &Scenario, seed: u64, sabotage: Sabotage, effort: Effort) -> Verdict {
    let begin = start(s);
    let ran = run_driver(s, &begin, seed, sabotage);
    let guest = ran.guest.lock().unwrap();
    let mut failures: Vec<String> = guest.errors.clone();
    failures.extend(guest.judge_reads(&begin.content, false).err());
    let crash = Crash {
        files: &ran.files,
        history: &guest.history,
        initial: &begin.content,
        backing: &begin.backing,
        snapshots: &begin.snapshots,
        bitmaps: &begin.bitmaps,
        damaged: false,
    };
    let mut reopen = Reopen { world: World::new(seed), backing: begin.backing.clone(), every: 120 };
    let mut verdict = enumerate(&crash, effort, seed, &mut |views, n| {
        if n.is_multiple_of(700) && begin.data.is_none() && begin.backing.is_empty() {
            qemu_check(views[0])?;
        }
        reopen.look(views, n)
    });
    if let Some(evidence) = &verdict.evidence {
        let by_qemu = qemu_check(&evidence[0]);
        failures.push(format!("qemu-img says of the first state: {by_qemu:?}"));
        if let Ok(dir) = std::env::var("CONBD_EVIDENCE") {
            for (i, bytes) in evidence.iter().enumerate() {
                fs::write(format!("{dir}/{}-{seed}-{i}.qcow2", s.name), bytes).unwrap();
            }
        }
    }
    failures.append(&mut verdict.failures);
    let closed = image::check(&ran.closed[0]);
    failures.extend(closed.corruptions.into_iter().map(|c| format!("after an orderly close: {c}")));
    if closed.leaks != 0 && sabotage == Sabotage::None {
        failures.push(format!("{} clusters are leaked by an orderly close", closed.leaks));
    }
    Verdict { failures, ..verdict }
}

const FULL: Effort = Effort { random: 8, singles: 6, stride: 1 };

fn crash_all(scenarios: impl Iterator<Item = &'static Scenario>, first_seed: u64) -> usize {
    let mut states = 0;
    for s in scenarios {
        let begin = std::time::Instant::now();
        // The one that grows has many requests.
        let stride = if s.name.starts_with("grows") { 4 } else { 1 };
        let Verdict { states: n, failures, .. } =
            crash(s, first_seed, Sabotage::None, Effort { stride, ..FULL });
        assert!(failures.is_empty(), "{} with CONBD_SEED={first_seed}:\n{}", s.name, failures.join("\n"));
        if std::env::var_os("CONBD_VERBOSE").is_some() {
            println!("{}: {n} states in {:?}", s.name, begin.elapsed());
        }
        states += n;
    }
    states
}

#[test]
fn no_power_failure_corrupts_or_loses_what_was_flushed_1() {
    let states = crash_all(SCENARIOS.iter().step_by(2), seed(11));
    assert!(states >= 12_000, "{states} states are few");
}

#[test]
fn no_power_failure_corrupts_or_loses_what_was_flushed_2() {
    let states = crash_all(SCENARIOS.iter().skip(1).step_by(2), seed(12));
    assert!(states >= 12_000, "{states} states are few");
}

/// Oracle: a bitmap that is not marked in use has a bit for every sector that is not as it was, or certainly was written.
#[test]
fn a_bitmap_that_is_believed_after_a_power_failure_misses_no_write() {
    let first_seed = seed(13);
    for (s, seed) in BITMAPS.iter().flat_map(|s| [(s, first_seed), (s, first_seed + 1)]) {
        let v = crash(s, seed, Sabotage::None, FULL);
        assert!(v.failures.is_empty(), "{} with CONBD_SEED={seed}:\n{}", s.name, v.failures.join("\n"));
        // Both kinds of states were there.
        assert!(v.bitmaps_in_use > 500, "{}: {} bitmaps in use are few", s.name, v.bitmaps_in_use);
        assert!(v.bitmaps_believed > 10, "{}: {} believed bitmaps are few", s.name, v.bitmaps_believed);
        if std::env::var_os("CONBD_VERBOSE").is_some() {
            println!(
                "{}: {} states, {} in use, {} believed",
                s.name, v.states, v.bitmaps_in_use, v.bitmaps_believed
            );
        }
    }
}

#[test]
fn a_bitmap_that_is_marked_without_a_barrier_is_noticed() {
    let s = Scenario { careless: true, ..BITMAPS[0] };
    let sign = "is believed and misses";
    let found = (1..6).any(|n| crash(&s, n, Sabotage::None, FULL).failures.iter().any(|f| f.contains(sign)));
    assert!(found, "nobody notices that the mark is not durable");
}

/// Bitmaps that we cannot keep up (a table of another size, extra data of another program) must not be believed by others
/// once the disk has changed.
#[test]
fn a_bitmap_that_we_cannot_keep_up_is_marked_in_use_before_the_first_change() {
    let s = &BITMAPS[0];
    let begin = start(s);
    let l = image::Layout::parse(&begin.image).unwrap();
    let (directory, _, bitmaps) = l.bitmaps.clone().unwrap();
    let at = |name: &str| {
        let mut at = directory as usize;
        for b in &bitmaps {
            if b.name == name {
                return at;
            }
            at += (24 + b.name.len()).next_multiple_of(8);
        }
        panic!("there is no bitmap {name}");
    };
    let mut image = begin.image.clone();
    // Of a larger disk, perhaps: two entries instead of one.
    image[at("coarse") + 11] = 2;
    let mut w = World::new(1);
    let file = w.file("image", image);
    let below = Below::new(&file, None, &[]);
    let node = w.co(move || driver::co_open(&below).unwrap());
    let flags = |file: &conbd::block::SimFile| {
        let d = file.content();
        let l = image::Layout::parse(&d).unwrap();
        l.bitmaps.unwrap().2.into_iter().map(|b| (b.name, b.flags)).collect::<BTreeMap<_, _>>()
    };
    assert_eq!(flags(&file)["coarse"] & BITMAP_IN_USE, 0);
    let writer = Arc::clone(&node);
    w.co(move || writer.co_pwritev(0, &[IoSlice::new(&[1; 512])], WriteFlags::empty())).unwrap();
    let during = flags(&file);
    assert_eq!(during["coarse"] & BITMAP_IN_USE, BITMAP_IN_USE, "others would believe it: {during:?}");
    assert_eq!(during["fine"] & BITMAP_IN_USE, BITMAP_IN_USE);
    w.co(move || node.co_close()).unwrap();
    let after = flags(&file);
    assert_eq!(after["coarse"] & BITMAP_IN_USE, BITMAP_IN_USE, "it was not kept up: {after:?}");
    assert_eq!((after["fine"] & BITMAP_IN_USE, after["off"]), (0, 0));
}

#[test]
fn a_barrier_that_is_taken_out_is_missed() {
    for (sabotage, sign) in [
        (Sabotage::NoBarrierBeforePointers, ""),
        (Sabotage::NoBarrierAfterPointers, "guest sector"),
        (Sabotage::PointersFirst, "metadata"),
        (Sabotage::NoQuarantine, ""),
    ] {
        let quick = Effort { random: 6, singles: 4, stride: 2 };
        let found = (1..6)
            .flat_map(|n| SCENARIOS[..1].iter().chain(&SCENARIOS[6..7]).map(move |s| (s, n)))
            .flat_map(|(s, n)| crash(s, n, sabotage, quick).failures)
            .find(|f| f.contains("state") && f.contains(sign));
        assert!(found.is_some(), "{sabotage:?} is not noticed");
    }
}
