//! Images by qemu-img read equal through us; images written by us pass qemu-img check and are equal through qemu.

use crate::corpus::{FLAVOURS, Flavour, Make, build, content_by_qemu, text};
use crate::driver::{Threads, co_check_status, co_read_all, difference};
use crate::image;
use crate::power::{Rng, seed};
use crate::support::run;
use crate::world::{Guest, HABITS, Habits, co_step, script};
use conbd::block::{BlockNode, SimClock};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// All flavours, a part of them per test, so that the tests run side by side.
fn part(n: usize, of: usize) -> impl Iterator<Item = &'static Flavour> {
    FLAVOURS.iter().skip(n).step_by(of)
}

/// Every file of a directory, but the image.
fn others(dir: &Path, image: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut out = Vec::new();
    for e in fs::read_dir(dir).unwrap() {
        let path = e.unwrap().path();
        if path.is_file() && path != image && path.file_name().is_some_and(|n| n != "data.bin") {
            let bytes = fs::read(&path).unwrap();
            out.push((path, bytes));
        }
    }
    out
}

fn reads_equal(flavours: impl Iterator<Item = &'static Flavour>) {
    let threads = Threads::new(1);
    for (flavour, real) in flavours.flat_map(|f| [(f, false), (f, true)]) {
        threads.open_really(real);
        let dir = tempfile::tempdir().unwrap();
        let built = build(flavour, dir.path());
        let before = fs::read(&built.path).unwrap();
        let node = threads.open(&built.path, true, None).unwrap_or_else(|e| panic!("{}: {e}", flavour.name));
        assert_eq!(node.len(), flavour.size, "{}", flavour.name);
        if let Some(content) = built.content.clone() {
            let name = flavour.name;
            let reader = Arc::clone(&node);
            threads.run(move || {
                let got = co_read_all(&*reader).unwrap_or_else(|e| panic!("{name}: {e}"));
                assert_eq!(difference(&got, &content), None, "{name}");
                co_check_status(&*reader, &content).unwrap_or_else(|e| panic!("{name}: {e}"));
            });
        }
        threads.close(node).unwrap();
        for (snapshot, content) in &built.snapshots {
            let node = threads
                .open(&built.path, true, Some(snapshot))
                .unwrap_or_else(|e| panic!("{} {snapshot}: {e}", flavour.name));
            let reader = Arc::clone(&node);
            let got = threads.run(move || co_read_all(&*reader)).unwrap();
            assert_eq!(difference(&got, content), None, "{} {snapshot}", flavour.name);
            threads.close(node).unwrap();
        }
        assert!(fs::read(&built.path).unwrap() == before, "{}: reading has changed the image", flavour.name);
    }
}

#[test]
fn images_by_qemu_read_equal_1() {
    reads_equal(part(0, 2));
}

#[test]
fn images_by_qemu_read_equal_2() {
    reads_equal(part(1, 2));
}

/// Guests on several IOThreads at once, then everybody's opinion of the image.
fn write_and_check(flavours: impl Iterator<Item = &'static Flavour>, seed: u64) {
    let threads = Threads::new(4);
    for (i, flavour) in flavours.enumerate() {
        let seed = seed + i as u64;
        let name = format!("{} with CONBD_SEED={seed}", flavour.name);
        if flavour.size > 1 << 30 || flavour.size == 0 {
            continue;
        }
        let dir = tempfile::tempdir().unwrap();
        let built = build(flavour, dir.path());
        let below = others(dir.path(), &built.path);
        let initial = built.content.unwrap();
        if let Make::Dirty = flavour.make {
            // Its refcounts are behind: it is not written before they are right.
            threads.open_really(false);
            let refused = threads.open(&built.path, false, None).err().expect("a dirty image is not written");
            assert!(refused.contains("repair"), "{refused}");
            run("qemu-img", &["check", "-q", "-f", "qcow2", "-r", "all", text(&built.path)]).unwrap();
        }
        let real = i % 2 == 1 || matches!(flavour.make, Make::Bitmaps(_));
        threads.open_really(real);
        let node = threads.open(&built.path, false, None).unwrap_or_else(|e| panic!("{name}: {e}"));
        let guest = Guest::new(initial.len());
        let clock = SimClock::default();
        let mut rng = Rng(seed);
        let cluster = image::be32(&fs::read(&built.path).unwrap(), 20);
        let habits = Habits { cluster: (1usize << cluster) / 512, read: 6, ..HABITS };
        let sectors = initial.len().div_ceil(512);
        let tasks: Vec<_> = (0..6)
            .map(|t| {
                let steps = script(&mut rng, sectors, 24, habits);
                let (node, guest, clock) = (Arc::clone(&node), Arc::clone(&guest), clock.clone());
                threads.spawn(t, move || {
                    for s in steps {
                        co_step(&*node, &guest, &clock, s);
                    }
                })
            })
            .collect();
        for t in tasks {
            t.join();
        }
        let reader = Arc::clone(&node);
        let issued = clock.tick();
        let data = threads.run(move || {
            let data = co_read_all(&*reader).unwrap();
            co_check_status(&*reader, &data).unwrap();
            reader.co_flush().unwrap();
            data
        });
        threads.close(node).unwrap();
        let guest = guest.lock().unwrap();
        assert_eq!(guest.errors, Vec::<String>::new(), "{name}");
        guest.judge_reads(&initial, true).unwrap_or_else(|e| panic!("{name}: {e}"));
        let judged = guest.history.judge_read(0, &data, issued, clock.tick(), &initial, false);
        judged.unwrap_or_else(|e| panic!("{name}: {e}"));
        let bytes = fs::read(&built.path).unwrap();
        let found = image::check(&bytes);
        assert_eq!(found.corruptions, Vec::<String>::new(), "{name}");
        assert!(found.leaks == 0, "{name}: an orderly close has leaked {} clusters", found.leaks);
        let by_qemu = run("qemu-img", &["check", "-q", "-f", "qcow2", text(&built.path)]);
        assert!(by_qemu.is_ok(), "{name}: {by_qemu:?}");
        assert_eq!(
            difference(&content_by_qemu(&built.path, None), &data),
            None,
            "{name}: qemu-img reads it otherwise"
        );
        for (s, content) in &built.snapshots {
            let now = content_by_qemu(&built.path, Some(s));
            assert_eq!(difference(&now, content), None, "{name}: snapshot {s} has changed");
        }
        for (path, bytes) in below {
            assert!(fs::read(&path).unwrap() == bytes, "{name}: {} has changed", path.display());
        }
        if flavour.options.contains("data_file_raw") {
            let raw = fs::read(dir.path().join("data.bin")).unwrap();
            assert_eq!(
                difference(&raw[..data.len().min(raw.len())], &data),
                None,
                "{name}: the raw data file differs"
            );
        }
    }
}

#[test]
fn images_written_by_us_are_equal_through_qemu_1() {
    write_and_check(part(0, 3), seed(1000));
}

#[test]
fn images_written_by_us_are_equal_through_qemu_2() {
    write_and_check(part(1, 3), seed(2000));
}

#[test]
fn images_written_by_us_are_equal_through_qemu_3() {
    write_and_check(part(2, 3), seed(3000));
}
