//! Races by hand: one request is held in the middle, others overtake it. Each is a way in which a qcow2 driver has
//! corrupted images before.

use crate::corpus::{noise, qemu_img, qemu_io, text};
use crate::driver::{self, Below, co_read_all};
use crate::image;
use crate::power::{Crash, Effort, Recording, enumerate};
use crate::world::{Guest, Step, World, co_step};
use conbd::block::qcow2::{Qcow2Node, Sabotage};
use conbd::block::{SimFile, SimParked};
use conbd::co::Coroutine;
use std::collections::BTreeMap;
use std::fs;
use std::sync::{Arc, Mutex};

/// Sectors of a cluster.
const C: usize = 8;
const SIZE: usize = 512 << 10;

/// A world with one image of 4 KiB clusters, and a guest.
struct Rig {
    w: World,
    file: Arc<SimFile>,
    node: Arc<Qcow2Node>,
    guest: Arc<Mutex<Guest>>,
    initial: Vec<u8>,
}

enum How {
    Fresh,
    Compressed,
    Snapshot,
}

impl Rig {
    fn new(how: &How, seed: u64) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image.qcow2");
        let size = SIZE.to_string();
        match how {
            How::Fresh => {
                qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", text(&path), &size]);
            }
            How::Compressed => {
                let raw = dir.path().join("raw");
                fs::write(&raw, noise(SIZE as u64, 5)).unwrap();
                let o = ["-o", "cluster_size=4k", text(&raw), text(&path)];
                qemu_img(&[&["convert", "-q", "-c", "-f", "raw", "-O", "qcow2"][..], &o].concat());
            }
            How::Snapshot => {
                qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", text(&path), &size]);
                qemu_io(&path, &["write -P 5 0 128k".to_owned()]);
                qemu_img(&["snapshot", "-c", "s0", text(&path)]);
            }
        }
        let image = fs::read(&path).unwrap();
        let mut initial = vec![0; SIZE];
        image::Reader::new(Vec::new()).read_active(&image, None, &mut initial).unwrap();
        let mut w = World::new(seed);
        let file = w.file("image", image);
        let below = Below::new(&file, None, &[]);
        let node = w.co(move || driver::co_open(&below).unwrap_or_else(|e| panic!("{e}")));
        Rig { w, file, node, guest: Guest::new(SIZE), initial }
    }

    fn spawn(&mut self, step: Step) -> Coroutine {
        let (node, guest, clock) = (Arc::clone(&self.node), Arc::clone(&self.guest), self.w.clock.clone());
        let co = Coroutine::new(move || co_step(&*node, &guest, &clock, step));
        co.schedule(&self.w.ctx);
        co
    }

    /// Does requests to their end, one after the other.
    #[track_caller]
    fn all(&mut self, steps: &[Step]) {
        for &s in steps {
            let co = self.spawn(s);
            self.until(&co, |_| true);
        }
    }

    /// Runs until the coroutine has ended; of what is held only what `which` says goes on.
    #[track_caller]
    fn until(&mut self, co: &Coroutine, which: impl Fn(&SimParked) -> bool) {
        let file = Arc::clone(&self.file);
        self.w.run_until(
            || {
                if co.outcome().is_none() {
                    let next = file.parked().into_iter().find(|p| which(p));
                    if let Some(p) = next {
                        file.release(p.id);
                    }
                }
                co.outcome().is_some()
            },
            false,
        );
    }

    /// Runs until a request that `which` says is held, and returns it.
    #[track_caller]
    fn until_held(&mut self, which: impl Fn(&SimParked) -> bool) -> SimParked {
        let file = Arc::clone(&self.file);
        let mut found = None;
        self.w.run_until(
            || {
                let parked = file.parked();
                found = parked.iter().copied().find(|p| which(p));
                if found.is_none()
                    && let Some(p) = parked.first()
                {
                    file.release(p.id);
                }
                found.is_some()
            },
            false,
        );
        found.unwrap()
    }

    /// Lets everything go, closes, and judges: reads, the final content, the metadata, all crash states.
    #[track_caller]
    fn end(mut self, open: &[&Coroutine], effort: Effort) {
        self.w.hold(false);
        let open: Vec<Coroutine> = open.iter().map(|c| (*c).clone()).collect();
        self.w.run_until(|| open.iter().all(|c| c.outcome().is_some()), true);
        let issued = self.w.clock.tick();
        let node = Arc::clone(&self.node);
        let data = self.w.co(move || co_read_all(&*node)).unwrap();
        let files = [Recording::of(&self.file)];
        let node = Arc::clone(&self.node);
        self.w.co(move || node.co_close()).unwrap();
        let guest = self.guest.lock().unwrap();
        assert_eq!(guest.errors, Vec::<String>::new());
        guest.judge_reads(&self.initial, false).unwrap();
        guest.history.judge_read(0, &data, issued, self.w.clock.tick(), &self.initial, false).unwrap();
        let found = image::check(&self.file.content());
        assert_eq!(found.corruptions, Vec::<String>::new());
        let snapshots: BTreeMap<String, Vec<u8>> = image::Layout::parse(&self.file.base())
            .unwrap()
            .snapshots
            .iter()
            .map(|s| (s.name.clone(), self.initial.clone()))
            .collect();
        let crash = Crash {
            files: &files,
            history: &guest.history,
            initial: &self.initial,
            backing: &[],
            snapshots: &snapshots,
            bitmaps: &BTreeMap::new(),
            damaged: false,
        };
        let v = enumerate(&crash, effort, 1, &mut |_, _| Ok(()));
        assert_eq!(v.failures, Vec::<String>::new());
        assert!(v.states > 20, "{} states are few", v.states);
    }
}

const EVERYTHING: Effort = Effort { random: 8, singles: 10, stride: 1 };

fn write(cluster: usize, count: usize) -> Step {
    Step::Write { first: cluster * C, count: count * C, fua: false }
}

fn is_write_of(len: u64) -> impl Fn(&SimParked) -> bool {
    move |p| p.kind == b'w' && p.len == len && !p.applied
}

/// Writes to many other clusters, with flushes: whatever may be reused is reused.
fn churn(rig: &mut Rig, held: u64) {
    for i in 0..3 {
        for step in [write(40 + 20 * i, 10), Step::Flush, write(50 + 20 * i, 1), Step::Flush] {
            let co = rig.spawn(step);
            rig.until(&co, move |p| p.id != held);
        }
    }
}

/// An overwrite is suspended; its cluster is given up, and everything is flushed and reused; then it goes on.
fn late_overwrite(how: &How, give_up: Step, sabotage: Sabotage) {
    let mut rig = Rig::new(how, 7);
    rig.node.sabotage(sabotage);
    rig.all(&[write(3, 4), Step::Flush]);
    rig.w.hold(true);
    let late = rig.spawn(Step::Write { first: 4 * C + 1, count: 3, fua: false });
    let held = rig.until_held(is_write_of(3 * 512));
    let co = rig.spawn(give_up);
    rig.until(&co, |p| p.id != held.id);
    churn(&mut rig, held.id);
    rig.file.release(held.id);
    rig.end(&[&late], EVERYTHING);
}

#[test]
fn a_late_overwrite_of_a_discarded_cluster_hits_nobody_else() {
    late_overwrite(&How::Fresh, Step::Discard { first: 3 * C, count: 4 * C }, Sabotage::None);
}

#[test]
fn a_late_overwrite_of_a_zeroed_cluster_hits_nobody_else() {
    late_overwrite(
        &How::Fresh,
        Step::Zero { first: 3 * C, count: 4 * C, unmap: true, fua: false },
        Sabotage::None,
    );
}

#[test]
fn a_late_overwrite_of_a_zeroed_cluster_that_stays_allocated_hits_nobody_else() {
    late_overwrite(
        &How::Fresh,
        Step::Zero { first: 3 * C, count: 4 * C, unmap: false, fua: false },
        Sabotage::None,
    );
}

#[test]
fn without_the_grace_period_a_late_overwrite_is_noticed() {
    let give_up = Step::Discard { first: 3 * C, count: 4 * C };
    let r = std::panic::catch_unwind(|| late_overwrite(&How::Fresh, give_up, Sabotage::NoGrace));
    let text = r.expect_err("the late write hits somebody else's cluster");
    let text = text.downcast_ref::<String>().cloned().unwrap_or_default();
    assert!(text.contains("guest sector"), "{text}");
}

#[test]
fn a_late_read_of_a_discarded_cluster_sees_nobody_elses_data() {
    for applied in [false, true] {
        let mut rig = Rig::new(&How::Fresh, 8);
        rig.all(&[write(3, 4), Step::Flush]);
        rig.w.hold(true);
        let late = rig.spawn(Step::Read { first: 4 * C + 1, count: 3 });
        let held = rig.until_held(|p| p.kind == b'r' && p.len == 3 * 512 && p.applied == applied);
        let co = rig.spawn(Step::Discard { first: 3 * C, count: 4 * C });
        rig.until(&co, |p| p.id != held.id);
        churn(&mut rig, held.id);
        rig.file.release(held.id);
        rig.end(&[&late], EVERYTHING);
    }
}

#[test]
fn a_freed_cluster_is_not_reused_before_its_unlinking_is_durable() {
    for unmap in [true, false] {
        let mut rig = Rig::new(&How::Fresh, 9);
        rig.all(&[write(3, 2), Step::Flush]);
        rig.w.hold(true);
        rig.all(&[Step::Zero { first: 3 * C, count: 2 * C, unmap, fua: false }, write(20, 2), write(30, 4)]);
        rig.all(&[Step::Flush, write(60, 2)]);
        rig.end(&[], EVERYTHING);
    }
}

#[test]
fn a_compressed_cluster_that_is_overwritten_stays_readable_until_that_is_durable() {
    let mut rig = Rig::new(&How::Compressed, 10);
    rig.w.hold(true);
    // Clusters that share host clusters, one after the other, and others that could take their place.
    for i in 0..6 {
        rig.all(&[Step::Write { first: (4 + i) * C + 2, count: 2, fua: false }, write(70 + 4 * i, 3)]);
    }
    rig.all(&[Step::Flush, write(100, 8)]);
    rig.end(&[], EVERYTHING);
}

#[test]
fn a_late_read_of_a_compressed_cluster_sees_nobody_elses_data() {
    let mut rig = Rig::new(&How::Compressed, 11);
    rig.w.hold(true);
    let late = rig.spawn(Step::Read { first: 4 * C, count: C });
    let held = rig.until_held(|p| p.kind == b'r' && p.len != 4096 && !p.applied);
    for i in 2..8 {
        let co = rig.spawn(write(i, 1));
        rig.until(&co, |p| p.id != held.id);
    }
    churn(&mut rig, held.id);
    rig.file.release(held.id);
    rig.end(&[&late], EVERYTHING);
}

#[test]
fn two_writes_into_one_new_cluster_are_both_there() {
    for seed in 0..12 {
        let mut rig = Rig::new(&How::Fresh, seed);
        rig.w.hold(true);
        let parts = [(0, 2), (2, 1), (3, 2), (7, 1)];
        let all: Vec<Coroutine> = parts
            .iter()
            .map(|&(first, count)| rig.spawn(Step::Write { first: 5 * C + first, count, fua: false }))
            .collect();
        let ends = all.clone();
        rig.w.run_until(|| ends.iter().all(|c| c.outcome().is_some()), true);
        rig.all(&[Step::Read { first: 5 * C, count: C }, Step::Flush]);
        rig.end(&all.iter().collect::<Vec<_>>(), EVERYTHING);
    }
}

#[test]
fn a_snapshot_stays_while_its_tables_are_copied_and_overwrites_are_late() {
    for seed in 0..6 {
        let mut rig = Rig::new(&How::Snapshot, seed);
        rig.w.hold(true);
        let first = rig.spawn(Step::Write { first: 4 * C + 1, count: 3, fua: false });
        let second = rig.spawn(Step::Discard { first: 4 * C, count: 2 * C });
        let third = rig.spawn(Step::Write { first: 5 * C, count: 2, fua: true });
        let ends = [first.clone(), second.clone(), third.clone()];
        rig.w.run_until(|| ends.iter().all(|c| c.outcome().is_some()), true);
        rig.all(&[Step::Flush, write(60, 6), Step::Flush, write(4, 1)]);
        rig.end(&[&first, &second, &third], EVERYTHING);
    }
}

#[test]
fn a_flush_does_not_cover_what_was_not_done_and_covers_what_was() {
    let mut rig = Rig::new(&How::Fresh, 12);
    // The tables are there already: only data is held.
    rig.all(&[write(100, 1), Step::Flush]);
    rig.w.hold(true);
    // A write is suspended in its data; another one is done; a flush begins and ends; then power fails.
    let late = rig.spawn(write(3, 1));
    let held = rig.until_held(is_write_of(4096));
    let co = rig.spawn(write(9, 1));
    rig.until(&co, |p| p.id != held.id);
    let co = rig.spawn(Step::Flush);
    rig.until(&co, |p| p.id != held.id);
    rig.file.release(held.id);
    rig.end(&[&late], EVERYTHING);
}
