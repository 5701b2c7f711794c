//! Repairs in which power fails: every state that one can leave behind reads as before, is no more dangerous than the
//! damaged image was, and can be repaired to the end.

use crate::corpus::{content_by_qemu, qemu_img, qemu_io, text};
use crate::driver::NoFlush;
use crate::image::{self, Layout, be16, be64};
use crate::power::{Crash, Effort, History, Recording, Rng, SECTOR, Verdict, enumerate, seed};
use crate::world::World;
use conbd::block::qcow2::check::{CheckReport, Repair, co_check};
use conbd::block::{BlockNode, WriteFlags};
use std::collections::BTreeMap;
use std::fs;
use std::io::IoSlice;
use std::sync::{Arc, Mutex};

const CLUSTER: u64 = 4096;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;

/// A healthy image with a snapshot, and what is in it.
struct Healthy {
    image: Vec<u8>,
    content: Vec<u8>,
    snapshots: BTreeMap<String, Vec<u8>>,
}

fn healthy() -> Healthy {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", text(&path), "512k"]);
    qemu_io(&path, &["write -P 11 0 70k".to_owned(), "write -P 12 200k 33k".to_owned()]);
    qemu_img(&["snapshot", "-c", "s0", text(&path)]);
    let snapshots = BTreeMap::from([("s0".to_owned(), content_by_qemu(&path, Some("s0")))]);
    qemu_io(&path, &["write -P 13 8k 9k".to_owned(), "write -P 14 300k 20k".to_owned()]);
    let content = content_by_qemu(&path, None);
    Healthy { image: fs::read(&path).unwrap(), content, snapshots }
}

fn put(d: &mut [u8], at: u64, bytes: &[u8]) {
    d[at as usize..][..bytes.len()].copy_from_slice(bytes);
}

/// Where the (16-bit) refcount of a cluster stands.
fn refcount_at(d: &[u8], cluster: u64) -> u64 {
    let l = Layout::parse(d).unwrap();
    let per_block = CLUSTER / 2;
    be64(d, (l.reftable_offset + cluster / per_block * 8) as usize) + cluster % per_block * 2
}

fn set_refcount(d: &mut [u8], cluster: u64, n: u16) {
    let at = refcount_at(d, cluster);
    put(d, at, &n.to_be_bytes());
}

/// Where the active L2 entry of a guest offset stands.
fn entry_at(d: &[u8], guest: u64) -> u64 {
    let l = Layout::parse(d).unwrap();
    let cluster = guest / CLUSTER;
    let table = be64(d, (l.l1_offset + cluster / l.l2_entries() * 8) as usize) & OFFSET;
    assert_ne!(table, 0, "the guest offset is mapped");
    table + cluster % l.l2_entries() * 8
}

/// Host cluster of a guest offset in the active disk.
fn host_of(d: &[u8], guest: u64) -> u64 {
    (be64(d, entry_at(d, guest) as usize) & OFFSET) / CLUSTER
}

/// What can be wrong: a name, whether only clusters are leaked, and how it is done.
type Damage = (&'static str, bool, fn(&mut Vec<u8>));

const DAMAGES: &[Damage] = &[
    ("leaked clusters at the end", true, |d| {
        let first = d.len() as u64 / CLUSTER;
        d.resize(d.len() + 5 * CLUSTER as usize, 0x77);
        (first..first + 5).for_each(|c| set_refcount(d, c, 1 + (c % 3) as u16));
    }),
    ("a snapshot's deletion was cut off", true, |d| {
        // The counts are one too high, and COPIED is clear, as while there was the snapshot.
        for guest in [300 << 10, 304 << 10] {
            let (c, at) = (host_of(d, guest), entry_at(d, guest));
            let raw = be64(d, at as usize) & !COPIED;
            put(d, at, &raw.to_be_bytes());
            set_refcount(d, c, 2);
        }
    }),
    ("refcounts of data are too low", false, |d| {
        for (guest, n) in [(0, 1), (300 << 10, 0), (200 << 10, 0)] {
            let c = host_of(d, guest);
            set_refcount(d, c, n);
        }
    }),
    ("too low here and leaked there", false, |d| {
        let first = d.len() as u64 / CLUSTER;
        d.resize(d.len() + 2 * CLUSTER as usize, 0x77);
        set_refcount(d, first, 7);
        let c = host_of(d, 300 << 10);
        set_refcount(d, c, 0);
    }),
    ("flags are wrong both ways", false, |d| {
        for guest in [0, 300 << 10] {
            let at = entry_at(d, guest);
            let raw = be64(d, at as usize) ^ COPIED;
            put(d, at, &raw.to_be_bytes());
        }
    }),
    ("two guest clusters in one host cluster", false, |d| {
        let (from, to) = (entry_at(d, 300 << 10), entry_at(d, 400 << 10));
        let raw = be64(d, from as usize);
        put(d, to, &raw.to_be_bytes());
    }),
    ("a refcount block is lost", false, |d| {
        let l = Layout::parse(d).unwrap();
        put(d, l.reftable_offset, &[0; 8]);
    }),
    ("the refcount table is gone", false, |d| put(d, 56, &[0; 4])),
    ("dirty, and counts are behind", false, |d| {
        put(d, 79, &[1]);
        let c = host_of(d, 300 << 10);
        set_refcount(d, c, 0);
    }),
    ("marked corrupt, and well", false, |d| put(d, 79, &[2])),
];

/// Some counts and flags become wrong; what the guest reads does not.
fn damage_at_random(d: &mut Vec<u8>, seed: u64) {
    let mut rng = Rng(seed);
    let clusters = d.len() as u64 / CLUSTER;
    let guests = [0, 8 << 10, 40 << 10, 200 << 10, 220 << 10, 300 << 10, 312 << 10];
    for _ in 0..2 + rng.below(6) {
        match rng.below(5) {
            // Not of what the image itself stands on: that is tried by name above.
            0 => set_refcount(d, clusters + rng.below(9), rng.below(4) as u16),
            1 | 2 => {
                let c = host_of(d, guests[rng.below(7) as usize]);
                set_refcount(d, c, rng.below(4) as u16);
            }
            3 => {
                let l = Layout::parse(d).unwrap();
                let table = be64(d, l.l1_offset as usize);
                put(d, l.l1_offset, &(table ^ COPIED).to_be_bytes());
            }
            _ => {
                let at = entry_at(d, guests[rng.below(7) as usize]);
                let raw = be64(d, at as usize) ^ COPIED;
                put(d, at, &raw.to_be_bytes());
            }
        }
    }
    d.resize(((clusters + 9) * CLUSTER) as usize, 0x77);
}

/// Repairs `image` under the recorder: what was said, what was done, what came out.
fn repair(
    image: &[u8],
    how: Repair,
    flushes: bool,
    seed: u64,
) -> (Result<CheckReport, String>, Recording, Vec<u8>) {
    let mut w = World::new(seed);
    let file = w.file("image", image.to_vec());
    w.hold(true);
    let said = Arc::new(Mutex::new(None));
    let (put, under) = (Arc::clone(&said), Arc::clone(&file));
    w.run(vec![Box::new(move || {
        let r = if flushes { co_check(&*under, how) } else { co_check(&NoFlush(under), how) };
        *put.lock().unwrap() = Some(r.map_err(|e| e.to_string()));
    })]);
    let said = said.lock().unwrap().take().expect("the coroutine has ended");
    (said, Recording::of(&file), file.content())
}

/// What is read from an image must be this.
fn same(d: &[u8], h: &Healthy) -> Result<(), String> {
    let l = Layout::parse(d)?;
    let mut reader = image::Reader::new(Vec::new());
    let mut got = vec![0; h.content.len()];
    reader.read_active(d, None, &mut got)?;
    if got != h.content {
        return Err("the disk has changed".to_owned());
    }
    for s in &l.snapshots {
        let mut got = vec![0; h.content.len()];
        reader.read(&l, d, None, (s.l1_offset, s.l1_size), &mut got)?;
        if h.snapshots.get(&s.name) != Some(&got) {
            return Err(format!("snapshot {:?} has changed", s.name));
        }
    }
    if l.snapshots.len() == h.snapshots.len() { Ok(()) } else { Err("a snapshot is lost".to_owned()) }
}

/// Power fails in a repair; the verdict on all states.
fn power_fails(
    leaks_only: bool,
    damage: &dyn Fn(&mut Vec<u8>),
    how: Repair,
    flushes: bool,
    seed: u64,
) -> Verdict {
    let h = healthy();
    let mut damaged = h.image.clone();
    damage(&mut damaged);
    // What the damage itself has done to the content (two guest clusters in one) is not the repair's doing.
    let mut content = vec![0; h.content.len()];
    image::Reader::new(Vec::new()).read_active(&damaged, None, &mut content).unwrap();
    let h = Healthy { content, ..h };
    let before = image::check(&damaged);
    let (said, recording, after) = repair(&damaged, how, flushes, seed);
    let mut wrong = Vec::new();
    let whole = how == Repair::All || leaks_only;
    match &said {
        Ok(report) if whole => {
            let found = image::check(&after);
            if !found.corruptions.is_empty() || found.leaks != 0 || report.exit_code() != 0 {
                let text = found.corruptions.join("; ");
                wrong.push(format!("repaired, and still wrong ({report:?}): {text}, {} leaks", found.leaks));
            }
            let marks = image::be64(&after, 72) & 3;
            if marks != 0 && how == Repair::All {
                wrong.push(format!("the marks {marks} are left"));
            }
        }
        Ok(_) => {}
        Err(e) if whole => wrong.push(format!("it cannot be repaired: {e}")),
        Err(_) => {}
    }
    wrong.extend(same(&after, &h).err());
    let history = History { sectors: h.content.len() / SECTOR, ..History::default() };
    let crash = Crash {
        files: &[recording],
        history: &history,
        initial: &h.content,
        backing: &[],
        snapshots: &h.snapshots,
        bitmaps: &BTreeMap::new(),
        damaged: true,
    };
    let mut again = World::new(seed);
    let effort = Effort { random: 6, singles: 6, stride: 1 };
    let mut verdict = enumerate(&crash, effort, seed, &mut |views, n| {
        let now = image::check(views[0]);
        if now.undercounted > before.undercounted || now.overtrusted > before.overtrusted {
            return Err(format!(
                "more dangerous than before: {} counts too low (were {}), {} flags too trusting (were {})",
                now.undercounted, before.undercounted, now.overtrusted, before.overtrusted
            ));
        }
        // Every other one is repaired to the end: the states differ little.
        if !n.is_multiple_of(2) {
            return Ok(());
        }
        again.files.clear();
        let file = again.file("image", views[0].to_vec());
        let under = Arc::clone(&file);
        let said =
            again.co(move || co_check(&*under, Repair::All)).map_err(|e| format!("not repaired: {e}"))?;
        let d = file.content();
        let found = image::check(&d);
        if said.exit_code() != 0 || !found.corruptions.is_empty() || found.leaks != 0 {
            return Err(format!("repaired again, and wrong ({said:?}): {}", found.corruptions.join("; ")));
        }
        same(&d, &h)
    });
    wrong.append(&mut verdict.failures);
    Verdict { failures: wrong, ..verdict }
}

#[test]
fn a_power_failure_in_a_repair_leaves_an_image_that_is_no_worse() {
    let first = seed(1);
    let mut states = 0;
    for damage in DAMAGES {
        for how in [Repair::Leaks, Repair::All] {
            let v = power_fails(damage.1, &damage.2, how, true, first);
            let text = v.failures.join("\n");
            assert!(v.failures.is_empty(), "{} by {how:?} with CONBD_SEED={first}:\n{text}", damage.0);
            states += v.states;
        }
    }
    for seed in first..first + 60 {
        let how = if seed % 4 == 0 { Repair::Leaks } else { Repair::All };
        let v = power_fails(false, &|d| damage_at_random(d, seed), how, true, seed);
        let text = v.failures.join("\n");
        assert!(v.failures.is_empty(), "random damage by {how:?} with CONBD_SEED={seed}:\n{text}");
        states += v.states;
    }
    assert!(states > 300, "{states} states are few");
}

#[test]
fn a_repair_without_barriers_is_noticed() {
    for name in ["refcounts of data are too low", "a refcount block is lost"] {
        let damage = DAMAGES.iter().find(|d| d.0 == name).unwrap();
        let found =
            (1..6).any(|s| !power_fails(damage.1, &damage.2, Repair::All, false, s).failures.is_empty());
        assert!(found, "{name}: nobody notices that nothing is flushed");
    }
}

/// What a cut-off deletion of a snapshot leaves: leaks only, which `--repair leaks` mends whole, as QEMU does: flags of
/// clusters that have one user again are set, or the image would be called corrupt afterwards.
#[test]
fn repairing_leaks_mends_the_flags_of_what_is_alone_again() {
    let h = healthy();
    let mut d = h.image.clone();
    DAMAGES[1].2(&mut d);
    let dir = tempfile::tempdir().unwrap();
    for (who, d) in [
        ("we", repair(&d, Repair::Leaks, true, 1).2),
        ("qemu-img", {
            let path = dir.path().join("q.qcow2");
            fs::write(&path, &d).unwrap();
            qemu_img(&["check", "-q", "-f", "qcow2", "-r", "leaks", text(&path)]);
            fs::read(&path).unwrap()
        }),
    ] {
        assert_eq!(be16(&d, refcount_at(&d, host_of(&d, 300 << 10)) as usize), 1, "{who}");
        assert_ne!(be64(&d, entry_at(&d, 300 << 10) as usize) & COPIED, 0, "{who}");
        assert_eq!(image::check(&d).corruptions, Vec::<String>::new(), "{who}");
        same(&d, &h).unwrap();
    }
}

/// Writes through the driver into a damaged image, without a repair: whether that went well, and the bytes afterwards.
fn write_into(d: &[u8], at: u64, len: usize) -> (Result<(), String>, Vec<u8>) {
    let mut w = World::new(1);
    let file = w.file("image", d.to_vec());
    let below = crate::driver::Below::new(&file, None, &[]);
    let r = w.co(move || {
        let node = crate::driver::co_open(&below)?;
        let data = vec![0x99; len];
        let told = |e: conbd::block::Error| format!("{e}: {}", e.source);
        let wrote = node.co_pwritev(at, &[IoSlice::new(&data)], WriteFlags::empty()).map_err(told);
        node.co_close().map_err(told)?;
        wrote
    });
    (r, file.content())
}

/// Rule T: a flag that says "mine alone" is not believed against the refcount.
#[test]
fn a_cluster_or_table_that_counts_two_is_copied_although_its_flag_says_it_is_alone() {
    let h = healthy();
    let mut want = h.content.clone();
    want[100..1100].fill(0x99);
    let fresh = |d: &mut [u8]| {
        // The active table is of its own by now: it is made the snapshot's again, as it was in the beginning.
        let l = Layout::parse(d).unwrap();
        let shared = be64(d, l.snapshots[0].l1_offset as usize) & OFFSET;
        let old = be64(d, l.l1_offset as usize) & OFFSET;
        let table = d[shared as usize..][..CLUSTER as usize].to_vec();
        put(d, old, &table);
        (l, shared)
    };
    // Of data: cluster 0 of the disk is the snapshot's too.
    let mut data = h.image.clone();
    let at = entry_at(&data, 0);
    let raw = be64(&data, at as usize);
    assert_eq!(raw & COPIED, 0, "it is shared");
    put(&mut data, at, &(raw | COPIED).to_be_bytes());
    let (r, after) = write_into(&data, 100, 1000);
    r.unwrap();
    same(&after, &Healthy { content: want, image: Vec::new(), snapshots: h.snapshots.clone() }).unwrap();
    // Of a table: the active L1 entry points to the snapshot's table, which counts two.
    let mut table = h.image.clone();
    let (l, shared) = fresh(&mut table);
    put(&mut table, l.l1_offset, &(shared | COPIED).to_be_bytes());
    set_refcount(&mut table, shared / CLUSTER, 2);
    let (r, after) = write_into(&table, 480 << 10, 1000);
    r.unwrap();
    let mut reader = image::Reader::new(Vec::new());
    let s = Layout::parse(&after).unwrap().snapshots.remove(0);
    let mut got = vec![0; h.content.len()];
    reader.read(&Layout::parse(&after).unwrap(), &after, None, (s.l1_offset, s.l1_size), &mut got).unwrap();
    assert!(got == h.snapshots["s0"], "the snapshot has changed");
}

/// A cluster in use that counts 0 looks free: it is not given away.
#[test]
fn a_cluster_in_use_that_counts_zero_is_not_given_away() {
    let h = healthy();
    let mut d = h.image.clone();
    let c = host_of(&d, 300 << 10);
    set_refcount(&mut d, c, 0);
    let (r, after) = write_into(&d, 400 << 10, 64 << 10);
    assert!(r.is_err(), "the write was taken");
    same(&after, &h).unwrap();
    assert_eq!(be64(&after, 72) & 2, 2, "the image is marked");
}
