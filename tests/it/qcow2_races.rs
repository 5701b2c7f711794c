//! The qcow2 driver with held, failing and damaged I/O below it: races made by hand, errors where they hurt.

use crate::qcow2_node::{check, co_read, file, qemu_img, through_qemu};
use crate::support::{HANG, Task, engines, iothread, run_in_coroutine, spawn_in};
use conbd::aio::IoThread;
use conbd::block::qcow2::{Qcow2Error, Qcow2Node, Qcow2OpenOptions};
use conbd::block::{
    BlockNode, FaultAction, FaultNode, FaultOps, FaultRule, RawNode, StatusFlags, WriteFlags,
};
use std::io::IoSlice;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

const C: u64 = 64 << 10;

/// An image over a file whose I/O can be held, and two threads to use it from.
struct Bed {
    dir: tempfile::TempDir,
    path: PathBuf,
    fault: Arc<FaultNode>,
    backing: Option<Arc<FaultNode>>,
    node: Arc<Qcow2Node>,
    threads: [IoThread; 2],
}

impl Bed {
    fn new(options: &str, size: &str, backing: Option<Vec<u8>>) -> Bed {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = dir.path().join("image.qcow2");
        let base = dir.path().join("base.raw");
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", options];
        if let Some(bytes) = &backing {
            std::fs::write(&base, bytes).unwrap();
            args.extend(["-b", base.to_str().unwrap(), "-F", "raw"]);
        }
        args.extend([path.to_str().unwrap(), size]);
        qemu_img(&args);
        let backing = backing.map(|_| FaultNode::new("base", file(&base, true)));
        Bed::open(dir, path, backing)
    }

    fn open(dir: tempfile::TempDir, path: PathBuf, backing: Option<Arc<FaultNode>>) -> Bed {
        let threads = [iothread("io0", engines()[0]), iothread("io1", engines()[0])];
        let fault = FaultNode::new("fault", file(&path, false));
        let (f, b) = (Arc::clone(&fault), backing.clone());
        let node = run_in_coroutine(threads[0].context(), move || {
            let backing = b.map(|b| b as Arc<dyn BlockNode>);
            Qcow2Node::co_open(f, Qcow2OpenOptions { backing, ..Default::default() })
                .unwrap_or_else(|e| panic!("{e}"))
        });
        Bed { dir, path, fault, backing, node, threads }
    }

    /// Runs in a coroutine of thread 1 and waits.
    #[track_caller]
    fn run<T: Send + 'static>(&self, f: impl FnOnce(&Qcow2Node) -> T + Send + 'static) -> T {
        let n = Arc::clone(&self.node);
        run_in_coroutine(self.threads[1].context(), move || f(&n))
    }

    /// Starts in a coroutine of thread 0.
    fn start<T: Send + 'static>(&self, f: impl FnOnce(&Qcow2Node) -> T + Send + 'static) -> Task<T> {
        let n = Arc::clone(&self.node);
        spawn_in(self.threads[0].context(), move || f(&n))
    }

    fn hold(&self, ops: FaultOps, range: std::ops::Range<u64>) {
        self.fault.add_rule(FaultRule::new(ops, FaultAction::Hold).range(range).count(1));
    }

    #[track_caller]
    fn wait_held(&self) {
        assert!(self.fault.wait_held(1, HANG), "nothing is held");
    }

    fn host(&self, offset: u64) -> Option<u64> {
        self.run(move |n| n.co_host_offset(offset).expect("mapping"))
    }

    /// Closes the image; it must be well, and read as `want` through qemu.
    #[track_caller]
    fn end(self, want: &[u8]) {
        self.fault.clear_rules();
        self.run(|n| n.co_close().expect("close"));
        check(&self.path);
        let got = through_qemu(&self.path, self.dir.path());
        let differs = got.iter().zip(want).position(|(g, w)| g != w);
        assert_eq!(differs, None, "got {:?}", differs.map(|at| (got[at], want[at])));
        assert_eq!(got.len(), want.len());
        self.stop();
    }

    fn stop(self) {
        drop(self.node);
        for t in self.threads {
            t.stop().unwrap();
        }
    }
}

fn write(n: &Qcow2Node, offset: u64, len: u64, value: u8) -> conbd::block::Result<()> {
    n.co_pwritev(offset, &[IoSlice::new(&vec![value; len as usize])], WriteFlags::empty())
}

fn expect(n: &Qcow2Node, offset: u64, len: u64, value: u8) {
    let got = co_read(n, offset, len as usize);
    assert_eq!(got.iter().position(|b| *b != value), None, "{value:#x} at {offset:#x}");
}

/// Writes new clusters until whatever may be reused would have been.
fn fill(n: &Qcow2Node, clusters: std::ops::Range<u64>, value: u8) {
    for c in clusters {
        write(n, c * C, C, value).expect("write");
        if c % 3 == 0 {
            n.co_flush().expect("flush");
        }
    }
    n.co_flush().expect("flush");
}

#[test]
fn an_overwrite_in_flight_never_lands_in_a_cluster_that_was_discarded_and_used_again() {
    for unmap in [false, true] {
        let bed = Bed::new("cluster_size=64k", "8M", None);
        bed.run(|n| {
            write(n, 0, C, 0x11).expect("write");
            n.co_flush().expect("flush");
        });
        let host = bed.host(0).expect("allocated");
        bed.hold(FaultOps::WRITE, host..host + C);
        let late = bed.start(|n| write(n, 4096, 4096, 0x22));
        bed.wait_held();
        bed.run(move |n| {
            if unmap {
                n.co_pwrite_zeroes(0, C, WriteFlags::MAY_UNMAP).expect("zeroes");
            } else {
                n.co_pdiscard(0, C).expect("discard");
            }
            fill(n, 1..60, 0x33);
        });
        for c in 1..60 {
            assert_ne!(bed.host(c * C), Some(host), "a cluster that is still written to was used again");
        }
        assert_eq!(bed.fault.release_all(), 1);
        late.join().expect("the late write succeeds");
        bed.run(|n| {
            expect(n, C, 59 * C, 0x33);
            expect(n, 0, C, 0);
            // Now it may be used again, and only now.
            n.co_flush().expect("flush");
            fill(n, 60..100, 0x44);
        });
        let mut want = vec![0; 8 << 20];
        want[C as usize..60 * C as usize].fill(0x33);
        want[60 * C as usize..100 * C as usize].fill(0x44);
        bed.end(&want);
    }
}

#[test]
fn an_overwrite_in_flight_is_harmless_to_a_cluster_that_was_zeroed_in_place_and_written_again() {
    let bed = Bed::new("cluster_size=64k", "8M", None);
    bed.run(|n| write(n, 0, C, 0x11).expect("write"));
    let host = bed.host(0).expect("allocated");
    bed.hold(FaultOps::WRITE, host..host + C);
    let late = bed.start(|n| write(n, 4096, 4096, 0x22));
    bed.wait_held();
    bed.run(|n| {
        n.co_pwrite_zeroes(0, C, WriteFlags::empty()).expect("zeroes");
        fill(n, 1..20, 0x33);
        write(n, 32768, 512, 0x44).expect("write");
        expect(n, 0, 32768, 0);
    });
    assert_eq!(bed.fault.release_all(), 1);
    late.join().expect("late write");
    let mut want = vec![0; 8 << 20];
    want[4096..8192].fill(0x22);
    want[32768..33280].fill(0x44);
    want[C as usize..20 * C as usize].fill(0x33);
    bed.end(&want);
}

#[test]
fn a_read_in_flight_sees_its_own_cluster_however_late() {
    let bed = Bed::new("cluster_size=64k", "8M", None);
    bed.run(|n| {
        write(n, 0, C, 0x11).expect("write");
        n.co_flush().expect("flush");
    });
    let host = bed.host(0).expect("allocated");
    bed.hold(FaultOps::READ, host..host + C);
    let late = bed.start(|n| co_read(n, 0, C as usize));
    bed.wait_held();
    bed.run(|n| {
        n.co_pdiscard(0, C).expect("discard");
        fill(n, 1..60, 0x33);
    });
    assert_eq!(bed.fault.release_all(), 1);
    assert!(late.join().iter().all(|b| *b == 0x11), "the reader saw somebody else's data");
    let mut want = vec![0; 8 << 20];
    want[C as usize..60 * C as usize].fill(0x33);
    bed.end(&want);
}

#[test]
fn a_freed_cluster_is_not_used_again_before_the_commit_that_unlinks_it() {
    let bed = Bed::new("cluster_size=64k", "8M", None);
    bed.run(|n| {
        write(n, 0, C, 0x11).expect("write");
        n.co_flush().expect("flush");
    });
    let host = bed.host(0).expect("allocated");
    let punches = bed.fault.add_rule(FaultRule::new(FaultOps::DISCARD, FaultAction::DelayNs(0)));
    bed.run(|n| {
        n.co_pwrite_zeroes(0, C, WriteFlags::MAY_UNMAP).expect("zeroes");
        for c in 1..40 {
            write(n, c * C, C, 0x33).expect("write");
        }
    });
    for c in 1..40 {
        assert_ne!(bed.host(c * C), Some(host));
    }
    assert_eq!(bed.fault.hits(punches), 0, "punched before the commit");
    bed.run(|n| {
        n.co_flush().expect("flush");
        n.co_flush().expect("flush");
        for c in 40..80 {
            write(n, c * C, C, 0x44).expect("write");
        }
    });
    assert_eq!(bed.fault.hits(punches), 1, "the space is given back");
    assert!((40..80).any(|c| bed.host(c * C) == Some(host)), "a freed cluster is used again in the end");
    let mut want = vec![0; 8 << 20];
    want[C as usize..40 * C as usize].fill(0x33);
    want[40 * C as usize..80 * C as usize].fill(0x44);
    bed.end(&want);
}

#[test]
fn two_writes_into_one_new_cluster_are_one_allocation() {
    let bed = Bed::new("cluster_size=64k", "8M", None);
    // The table and the arena are there.
    bed.run(|n| write(n, 0, C, 0x11).expect("write"));
    let host = bed.host(0).expect("allocated");
    bed.hold(FaultOps::WRITE, host + C..u64::MAX);
    let first = bed.start(|n| write(n, C, 4096, 0x22));
    bed.wait_held();
    let second = {
        let n = Arc::clone(&bed.node);
        spawn_in(bed.threads[1].context(), move || write(&n, C + 8192, 4096, 0x33))
    };
    // It waits for the first; a read sees neither.
    bed.run(|n| expect(n, C, C, 0));
    assert_eq!(bed.fault.release_all(), 1);
    first.join().expect("first");
    second.join().expect("second");
    bed.run(|n| {
        expect(n, C, 4096, 0x22);
        expect(n, C + 4096, 4096, 0);
        expect(n, C + 8192, 4096, 0x33);
    });
    let mut want = vec![0; 8 << 20];
    want[..C as usize].fill(0x11);
    want[C as usize..][..4096].fill(0x22);
    want[C as usize + 8192..][..4096].fill(0x33);
    bed.end(&want);
}

#[test]
fn copy_on_write_excludes_writes_and_discards_of_the_same_cluster() {
    let base: Vec<u8> = (0..4 << 20).map(|i| (i / 512) as u8 | 1).collect();
    let bed = Bed::new("cluster_size=64k", "4M", Some(base.clone()));
    let backing = bed.backing.clone().expect("backing");
    backing.add_rule(FaultRule::new(FaultOps::READ, FaultAction::Hold).range(0..C).count(1));
    let cow = bed.start(|n| write(n, 4096, 4096, 0x22));
    assert!(backing.wait_held(1, HANG));
    let other = {
        let n = Arc::clone(&bed.node);
        spawn_in(bed.threads[1].context(), move || {
            write(&n, 0, 512, 0x44).expect("write");
            n.co_pwrite_zeroes(C - 4096, 4096, WriteFlags::MAY_UNMAP).expect("zeroes");
        })
    };
    // Other clusters do not wait.
    bed.run(|n| write(n, C, 100, 0x55).expect("write"));
    assert_eq!(backing.release_all(), 1);
    cow.join().expect("copy on write");
    other.join();
    let mut want = base;
    want[4096..8192].fill(0x22);
    want[..512].fill(0x44);
    want[C as usize - 4096..C as usize].fill(0);
    want[C as usize..][..100].fill(0x55);
    bed.end(&want);
}

#[test]
fn slices_are_loaded_in_parallel_and_once() {
    // With 512-byte clusters a slice maps 32 KiB.
    let bed = Bed::new("cluster_size=512", "1M", None);
    bed.run(|n| {
        write(n, 0, 1 << 20, 0x11).expect("write");
        n.co_close().expect("close");
    });
    let Bed { dir, path, .. } = bed;
    let bed = Bed::open(dir, path, None);
    let rule = bed.fault.add_rule(FaultRule::new(FaultOps::READ, FaultAction::Hold).count(1));
    let first = bed.start(|n| co_read(n, 0, 512));
    bed.wait_held();
    let same = bed.start(|n| co_read(n, 1024, 512));
    // Another slice is not kept waiting.
    bed.run(|n| expect(n, 512 << 10, 512, 0x11));
    assert!(!first.ended());
    assert_eq!(bed.fault.remove_rule(rule), 1);
    bed.fault.release_all();
    assert_eq!(same.join(), [0x11; 512]);
    assert_eq!(bed.node.slices_loaded(), 2, "a slice is loaded once");
    bed.end(&vec![0x11; 1 << 20]);
}

#[test]
fn a_flush_is_one_barrier_without_and_two_with_new_clusters() {
    let bed = Bed::new("cluster_size=64k", "8M", None);
    bed.run(|n| {
        write(n, 0, C, 0x11).expect("write");
        n.co_flush().expect("flush");
    });
    let barriers = bed.fault.add_rule(FaultRule::new(FaultOps::FLUSH, FaultAction::DelayNs(0)));
    let count = |f: fn(&Qcow2Node)| {
        let before = bed.fault.hits(barriers);
        bed.run(f);
        bed.fault.hits(barriers) - before
    };
    assert_eq!(count(|n| write(n, 0, 4096, 0x22).expect("write")), 0);
    assert_eq!(count(|n| n.co_flush().expect("flush")), 1);
    assert_eq!(count(|n| (1..50).for_each(|c| write(n, c * C, 512, 0x33).expect("write"))), 0);
    assert_eq!(count(|n| n.co_flush().expect("flush")), 2);
    assert_eq!(count(|n| n.co_flush().expect("flush")), 1);
    bed.fault.clear_rules();
    bed.run(|n| n.co_close().expect("close"));
    check(&bed.path);
    bed.stop();
}

#[test]
fn where_nothing_grows_metadata_finds_room_in_what_was_freed() {
    const SMALL: u64 = 4096;
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("image.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path.to_str().unwrap(), "64M"]);
    let thread = iothread("io", engines()[0]);
    // As on a block device: there are 4 MiB, and no more.
    std::fs::File::options().write(true).open(&path).unwrap().set_len(4 << 20).unwrap();
    let device = Arc::new(RawNode::new("device", file(&path, false), 0, Some(4 << 20)).unwrap());
    run_in_coroutine(thread.context(), move || {
        let node = Qcow2Node::co_open(device, Qcow2OpenOptions::default()).unwrap_or_else(|e| panic!("{e}"));
        let full = (0..2048).find(|c| write(&node, c * SMALL, SMALL, 0x11).is_err()).expect("it fills up");
        node.co_flush().expect("flush");
        // What is freed waits for the commits after its own.
        for some in 0..8 {
            node.co_pdiscard(some * 32 * SMALL, 32 * SMALL).expect("discard");
            node.co_flush().expect("flush");
        }
        // Each has an L2 table of its own, which nobody has yet.
        for far in (10..60).step_by(4) {
            write(&node, far << 20, SMALL, 0x22).expect("there is room");
        }
        node.co_flush().expect("flush");
        expect(&node, 255 * SMALL, SMALL, 0);
        expect(&node, 256 * SMALL, SMALL, 0x11);
        expect(&node, (full - 1) * SMALL, SMALL, 0x11);
        expect(&node, 58 << 20, SMALL, 0x22);
        node.co_close().expect("close");
    });
    check(&path);
    thread.stop().unwrap();
}

#[test]
fn a_failed_data_write_changes_nothing_and_leaks_nothing() {
    let bed = Bed::new("cluster_size=64k", "8M", None);
    bed.run(|n| write(n, 0, C, 0x11).expect("write"));
    let host = bed.host(0).expect("allocated");
    let rule = FaultRule::new(FaultOps::WRITE, FaultAction::Errno(libc::ENOSPC)).range(host + C..u64::MAX);
    let rule = bed.fault.add_rule(rule);
    bed.run(|n| {
        assert_eq!(write(n, 5 * C, 100, 0x22).expect_err("no space").errno(), libc::ENOSPC);
        expect(n, 5 * C, C, 0);
    });
    assert!(bed.fault.remove_rule(rule) >= 1);
    bed.run(|n| write(n, 5 * C, 100, 0x33).expect("write"));
    let mut want = vec![0; 8 << 20];
    want[..C as usize].fill(0x11);
    want[5 * C as usize..][..100].fill(0x33);
    bed.end(&want);
}

#[test]
fn metadata_that_cannot_be_written_fails_the_flush_and_is_written_by_the_next() {
    let bed = Bed::new("cluster_size=64k", "8M", None);
    bed.run(|n| write(n, 0, C, 0x11).expect("write"));
    for skip in 0..3 {
        let rule = FaultRule::new(FaultOps::WRITE, FaultAction::Errno(libc::EIO)).skip(skip).count(1);
        bed.run(move |n| write(n, (1 + skip) * C, C, 0x11).expect("write"));
        let rule = bed.fault.add_rule(rule);
        let flushed = bed.run(|n| n.co_flush().map_err(|e| e.errno()));
        let hit = bed.fault.remove_rule(rule);
        assert_eq!(flushed.is_err(), hit == 1, "skip {skip}");
        bed.run(|n| n.co_flush().expect("the next flush"));
    }
    let mut want = vec![0; 8 << 20];
    want[..4 * C as usize].fill(0x11);
    bed.end(&want);
}

#[test]
fn a_failed_barrier_makes_the_image_read_only() {
    let bed = Bed::new("cluster_size=64k", "8M", None);
    bed.run(|n| write(n, 0, C, 0x11).expect("write"));
    bed.fault.add_rule(FaultRule::new(FaultOps::FLUSH, FaultAction::Errno(libc::EIO)).count(1));
    bed.run(|n| {
        assert_eq!(n.co_flush().expect_err("failed").errno(), libc::EIO);
        assert_eq!(n.co_flush().expect_err("for good").errno(), libc::EIO);
        assert_eq!(write(n, 0, 10, 0x22).expect_err("read-only").errno(), libc::EIO);
        assert_eq!(n.try_pwrite(0, &[1]).map(|r| r.is_ok()), None);
        expect(n, 0, C, 0x11);
    });
    bed.stop();
}

/// Changes bytes of the closed image.
fn patch(bed: Bed, change: impl FnOnce(&std::fs::File)) -> Bed {
    bed.run(|n| n.co_close().expect("close"));
    let f = std::fs::OpenOptions::new().read(true).write(true).open(&bed.path).unwrap();
    change(&f);
    let Bed { dir, path, .. } = bed;
    Bed::open(dir, path, None)
}

fn word(f: &std::fs::File, at: u64) -> u64 {
    let mut b = [0; 8];
    f.read_exact_at(&mut b, at).unwrap();
    u64::from_be_bytes(b)
}

fn corrupt_bit(bed: &Bed) -> bool {
    word(&std::fs::File::open(&bed.path).unwrap(), 72) & 2 != 0
}

#[test]
fn damaged_tables_are_an_io_error_of_that_place_and_stop_writes() {
    type Damage = (&'static str, fn(&std::fs::File));
    let cases: [Damage; 5] = [
        ("reserved bits in the L2 entry", |f| {
            let l2 = word(f, word(f, 40)) & 0x00ff_ffff_ffff_fe00;
            f.write_all_at(&(word(f, l2) | 2).to_be_bytes(), l2).unwrap();
        }),
        ("unaligned L2 entry", |f| {
            let l2 = word(f, word(f, 40)) & 0x00ff_ffff_ffff_fe00;
            f.write_all_at(&(word(f, l2) | 512).to_be_bytes(), l2).unwrap();
        }),
        ("L1 entry at offset 0", |f| {
            f.write_all_at(&(1u64 << 63).to_be_bytes(), word(f, 40)).unwrap();
        }),
        ("L1 entry past the end", |f| {
            f.write_all_at(&(1u64 << 63 | 1 << 40).to_be_bytes(), word(f, 40)).unwrap();
        }),
        ("reserved bits in the L1 entry", |f| {
            let at = word(f, 40);
            f.write_all_at(&(word(f, at) | 1 << 60).to_be_bytes(), at).unwrap();
        }),
    ];
    for (what, damage) in cases {
        let bed = Bed::new("cluster_size=64k", "2G", None);
        bed.run(|n| {
            write(n, 0, C, 0x11).expect("write");
            write(n, 1 << 30, C, 0x22).expect("write");
        });
        let bed = patch(bed, damage);
        bed.run(move |n| {
            let mut buf = [0; 512];
            assert!(!n.try_pread(0, &mut buf), "{what}");
            let r = n.co_preadv(0, &mut [std::io::IoSliceMut::new(&mut buf)]);
            assert_eq!(r.expect_err(what).errno(), libc::EIO, "{what}");
            expect(n, 1 << 30, C, 0x22);
            assert_eq!(write(n, 1 << 30, 10, 0x33).expect_err(what).errno(), libc::EIO, "{what}");
            n.co_close().expect("close");
        });
        assert!(corrupt_bit(&bed), "{what}: the corrupt bit is set");
        bed.stop();
    }
}

#[test]
fn an_image_whose_refcounts_are_all_zero_is_not_written() {
    let bed = Bed::new("cluster_size=64k", "8M", None);
    bed.run(|n| write(n, 0, C, 0x11).expect("write"));
    let bed = patch(bed, |f| {
        let block = word(f, word(f, 48));
        f.write_all_at(&vec![0; C as usize], block).unwrap();
    });
    let before = std::fs::read(&bed.path).unwrap();
    bed.run(|n| {
        assert_eq!(write(n, 5 * C, C, 0x22).expect_err("damaged").errno(), libc::EIO);
        assert_eq!(write(n, 0, C, 0x22).expect_err("damaged").errno(), libc::EIO);
        expect(n, 0, C, 0x11);
    });
    assert!(corrupt_bit(&bed));
    let after = std::fs::read(&bed.path).unwrap();
    assert!(before[80..] == after[80..] && before.len() == after.len(), "only the corrupt bit was written");
    bed.stop();
}

#[test]
fn l2_entries_into_metadata_stop_writes_before_they_do_harm() {
    let bed = Bed::new("cluster_size=64k", "8M", None);
    bed.run(|n| write(n, 0, C, 0x11).expect("write"));
    let bed = patch(bed, |f| {
        let l1 = word(f, 40);
        let l2 = word(f, l1) & 0x00ff_ffff_ffff_fe00;
        // The guest's first cluster is the L1 table.
        f.write_all_at(&(l1 | 1 << 63).to_be_bytes(), l2).unwrap();
    });
    bed.run(|n| {
        assert_eq!(write(n, 0, C, 0x22).expect_err("damaged").errno(), libc::EIO);
    });
    assert!(corrupt_bit(&bed));
    bed.stop();
}

#[test]
fn dirty_and_corrupt_images_open_read_only_alone() {
    for (bit, name) in [(1u64, "dirty"), (2, "corrupt")] {
        let bed = Bed::new("cluster_size=64k", "8M", None);
        bed.run(|n| {
            write(n, 0, C, 0x11).expect("write");
            n.co_close().expect("close");
        });
        let f = std::fs::OpenOptions::new().read(true).write(true).open(&bed.path).unwrap();
        f.write_all_at(&bit.to_be_bytes(), 72).unwrap();
        let path = bed.path.clone();
        run_in_coroutine(bed.threads[0].context(), move || {
            let e =
                Qcow2Node::co_open(file(&path, false), Qcow2OpenOptions::default()).err().expect("refused");
            match bit {
                1 => assert!(matches!(e, Qcow2Error::NeedsRepair { .. }), "{e}"),
                _ => assert!(matches!(e, Qcow2Error::Corrupt { .. }), "{e}"),
            }
            let read_only = Qcow2OpenOptions { read_only: true, ..Default::default() };
            let n =
                Qcow2Node::co_open(file(&path, true), read_only).unwrap_or_else(|e| panic!("{name}: {e}"));
            expect(&n, 0, C, 0x11);
        });
        bed.stop();
    }
}

#[test]
fn unknown_autoclear_features_are_cleared_by_the_first_change_and_not_before() {
    let bed = Bed::new("cluster_size=64k", "8M", None);
    bed.run(|n| write(n, 0, C, 0x11).expect("write"));
    let bed = patch(bed, |f| f.write_all_at(&0x60u64.to_be_bytes(), 88).unwrap());
    let bits = |bed: &Bed| word(&std::fs::File::open(&bed.path).unwrap(), 88);
    bed.run(|n| expect(n, 0, C, 0x11));
    assert_eq!(bits(&bed), 0x60);
    bed.run(|n| write(n, 0, 512, 0x22).expect("write"));
    assert_eq!(bits(&bed), 0);
    let mut want = vec![0; 8 << 20];
    want[..C as usize].fill(0x11);
    want[..512].fill(0x22);
    bed.end(&want);
}

#[test]
fn a_disk_grows_and_what_is_exposed_reads_as_zeroes() {
    for (options, backing) in
        [("cluster_size=512", false), ("cluster_size=64k", true), ("extended_l2=on", true)]
    {
        let base = backing.then(|| vec![0x77; 3 << 20]);
        let bed = Bed::new(options, "1000448", base);
        bed.run(|n| write(n, 999_000, 1448, 0x11).expect("write"));
        bed.run(|n| {
            n.co_grow(2_500_096).expect("grow");
            assert_eq!(n.len(), 2_500_096);
            expect(n, 1_000_448, 1_499_648, 0);
            let e = n.co_block_status(1_100_000, 1_000_000).expect("status");
            assert!(e.flags.contains(StatusFlags::ZERO));
            write(n, 2_400_000, 100_096, 0x22).expect("write");
            assert_eq!(n.co_grow(1024).expect_err("smaller").errno(), libc::EINVAL);
        });
        let mut want = vec![if backing { 0x77 } else { 0 }; 1_000_448];
        want[999_000..].fill(0x11);
        want.resize(2_500_096, 0);
        want[2_400_000..].fill(0x22);
        bed.end(&want);
    }
}

#[test]
fn nothing_is_committed_for_room_that_is_there() {
    // A slice of L2 per 2 MiB: all 32 of them fit the smallest cache.
    let bed = Bed::new("cluster_size=4k", "64M", None);
    bed.run(|n| {
        for i in 0..32 {
            write(n, i * (2 << 20), 4096, 0x11).expect("write");
        }
    });
    assert_eq!(bed.node.commits(), 0, "nobody flushed, and nothing has to be evicted");
    let mut want = vec![0; 64 << 20];
    for part in want.chunks_mut(2 << 20) {
        part[..4096].fill(0x11);
    }
    bed.end(&want);
}

#[test]
fn flushers_share_commits() {
    let bed = Bed::new("cluster_size=64k", "64M", None);
    bed.run(|n| write(n, 0, C, 0x11).expect("write"));
    bed.hold(FaultOps::FLUSH, 0..u64::MAX);
    let first = bed.start(|n| n.co_flush());
    bed.wait_held();
    let others: Vec<_> = (1..10u64)
        .map(|i| {
            bed.start(move |n| {
                write(n, i * C, C, 0x11)?;
                n.co_flush()
            })
        })
        .collect();
    // All of them have written and wait for the commit that runs.
    bed.run(|n| {
        for c in 1..10 {
            while co_read(n, c * C, 1) != [0x11] {
                conbd::co::co_sleep_ns(Duration::from_millis(1).as_nanos() as u64);
            }
        }
    });
    let before = bed.node.commits();
    bed.fault.release_all();
    first.join().expect("flush");
    for o in others {
        o.join().expect("flush");
    }
    assert!(bed.node.commits() - before <= 2, "nine flushers shared {} commits", bed.node.commits() - before);
    let mut want = vec![0; 64 << 20];
    want[..10 * C as usize].fill(0x11);
    bed.end(&want);
}
