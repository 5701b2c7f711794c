//! O_DIRECT: read-modify-write that loses nothing, and the range lock behind it.

use crate::support::{HANG, engines, iothread, run_in_coroutine, spawn_in};
use conbd::aio::engine::EngineChoice;
use conbd::block::{BlockNode, CacheMode, FileNode, FileOptions, RangeLock, WriteFlags};
use conbd::co;
use std::io::{IoSlice, IoSliceMut};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

fn direct(path: &Path, size: u64) -> Arc<FileNode> {
    std::fs::File::create(path).unwrap().set_len(size).unwrap();
    Arc::new(FileNode::open(&FileOptions { cache: CacheMode::None, ..FileOptions::new(path) }).unwrap())
}

fn co_write(node: &FileNode, offset: u64, data: &[u8]) {
    node.co_pwritev(offset, &[IoSlice::new(data)], WriteFlags::empty()).expect("write");
}

#[test]
fn neighbours_in_one_block_written_by_four_threads_lose_nothing() {
    // 64-byte cells side by side; cell i belongs to thread i % 4, so every block is shared by all of them.
    const CELL: u64 = 64;
    const CELLS: u64 = 256;
    const ROUNDS: u8 = 6;
    for engine in engines() {
        let dir = tempfile::tempdir().unwrap();
        let node = direct(&dir.path().join("image"), CELL * CELLS);
        let threads: Vec<_> = (0..4).map(|i| iothread(&format!("t{i}"), engine)).collect();
        let mut tasks = Vec::new();
        for k in 0..4u64 {
            // Two coroutines each, one for the even and one for the odd ones of the thread's cells.
            for parity in 0..2 {
                let n = Arc::clone(&node);
                tasks.push(spawn_in(threads[k as usize].context(), move || {
                    for round in 1..=ROUNDS {
                        for i in (0..CELLS).filter(|i| i % 4 == k && i / 4 % 2 == parity) {
                            co_write(&n, i * CELL, &[round ^ i as u8; CELL as usize]);
                        }
                    }
                }));
            }
        }
        for t in tasks {
            t.join();
        }
        let n = Arc::clone(&node);
        let all = run_in_coroutine(threads[0].context(), move || {
            let mut buf = vec![0; (CELL * CELLS) as usize];
            n.co_preadv(0, &mut [IoSliceMut::new(&mut buf)]).expect("read");
            buf
        });
        for (i, cell) in all.chunks(CELL as usize).enumerate() {
            assert!(cell.iter().all(|&b| b == ROUNDS ^ i as u8), "cell {i} is {:?}", &cell[..4]);
        }
    }
}

#[test]
fn whole_block_write_is_not_undone_by_a_read_modify_write_of_the_same_block() {
    const BLOCK: usize = 4096;
    for engine in engines() {
        let dir = tempfile::tempdir().unwrap();
        let node = direct(&dir.path().join("image"), 16 * BLOCK as u64);
        let threads: Vec<_> = (0..2).map(|i| iothread(&format!("t{i}"), engine)).collect();
        // One writes whole blocks (and zeroes them, in between), the other ten bytes in each of them.
        let n = Arc::clone(&node);
        let whole = spawn_in(threads[0].context(), move || {
            let mut aligned = conbd::util::buf::IoBuf::new(BLOCK);
            for round in 1..=40u8 {
                for b in 0..4u64 {
                    if round % 5 == 0 {
                        n.co_pwrite_zeroes(b * BLOCK as u64, BLOCK as u64, WriteFlags::empty())
                            .expect("zeroes");
                    }
                    aligned.fill(round);
                    co_write(&n, b * BLOCK as u64, &aligned);
                }
            }
        });
        let n = Arc::clone(&node);
        let part = spawn_in(threads[1].context(), move || {
            for round in 0..80u8 {
                for b in 0..4u64 {
                    co_write(&n, b * BLOCK as u64 + 1000, &[200 + round % 50; 10]);
                }
            }
        });
        whole.join();
        part.join();
        let n = Arc::clone(&node);
        let all = run_in_coroutine(threads[0].context(), move || {
            let mut buf = vec![0; 4 * BLOCK];
            n.co_preadv(0, &mut [IoSliceMut::new(&mut buf)]).expect("read");
            buf
        });
        for (i, block) in all.chunks(BLOCK).enumerate() {
            // Only the first thread writes outside of the ten bytes, and 40 was its last.
            let outside = block[..1000].iter().chain(&block[1010..]);
            assert!(outside.copied().all(|b| b == 40), "block {i} got old bytes back");
            let inside = &block[1000..1010];
            assert!(inside.iter().all(|b| *b == inside[0]), "block {i}: {inside:?}");
        }
    }
}

#[track_caller]
fn eventually(what: &str, mut f: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + HANG;
    while !f() {
        assert!(std::time::Instant::now() < deadline, "{what} does not happen");
        std::thread::yield_now();
    }
}

/// Runs until told to end; says when it has begun.
#[derive(Default)]
struct Stay {
    inside: AtomicBool,
    leave: AtomicBool,
}

impl Stay {
    fn co_stay(&self) {
        self.inside.store(true, Ordering::SeqCst);
        while !self.leave.load(Ordering::SeqCst) {
            co::co_sleep_ns(10_000);
        }
        self.inside.store(false, Ordering::SeqCst);
    }
    fn is_inside(&self) -> bool {
        self.inside.load(Ordering::SeqCst)
    }
    fn leave(&self) {
        self.leave.store(true, Ordering::SeqCst);
    }
}

#[test]
fn plain_ranges_overlap_freely_and_exclusive_ones_wait_in_order() {
    let lock = Arc::new(RangeLock::new());
    let threads: Vec<_> = (0..2).map(|i| iothread(&format!("t{i}"), EngineChoice::Threads)).collect();
    let start = |thread: usize, exclusive: bool, range: std::ops::Range<u64>| {
        let stay = Arc::new(Stay::default());
        let (l, s) = (Arc::clone(&lock), Arc::clone(&stay));
        let task = spawn_in(threads[thread].context(), move || {
            let guard = if exclusive { l.co_exclusive(range) } else { l.co_plain(range) };
            s.co_stay();
            drop(guard);
        });
        (stay, task)
    };
    let (a, ta) = start(0, false, 0..100);
    let (b, tb) = start(1, false, 50..150);
    eventually("two plain ones at once", || a.is_inside() && b.is_inside());
    let (x, tx) = start(0, true, 140..160);
    eventually("the exclusive one waiting", || lock.waiting() == 1);
    let (far, tfar) = start(1, true, 200..300);
    eventually("an exclusive one elsewhere", || far.is_inside());
    let (y, ty) = start(1, true, 150..170);
    eventually("two waiting", || lock.waiting() == 2);
    let (late, tlate) = start(0, false, 155..156);
    eventually("three waiting", || lock.waiting() == 3);
    let (other, tother) = start(1, false, 0..140);
    eventually("a plain one beside them", || other.is_inside());
    assert!(!x.is_inside() && !y.is_inside() && !late.is_inside());
    assert!(lock.try_plain(159..162).is_none(), "an exclusive one comes first, though it waits itself");
    assert!(lock.try_plain(170..200).is_some(), "beside all exclusive ones");
    b.leave();
    tb.join();
    eventually("the first exclusive one", || x.is_inside());
    assert!(!y.is_inside() && !late.is_inside());
    x.leave();
    tx.join();
    eventually("the second exclusive one", || y.is_inside());
    assert!(!late.is_inside());
    y.leave();
    ty.join();
    eventually("the late plain one", || late.is_inside());
    for s in [a, far, late, other] {
        s.leave();
    }
    for t in [ta, tfar, tlate, tother] {
        t.join();
    }
    assert_eq!(lock.waiting(), 0);
}

#[test]
fn range_lock_excludes_under_random_load_from_four_threads() {
    const SLOTS: u64 = 16;
    // Per slot: plain ones inside in the low half, exclusive ones in the high half.
    let inside: Arc<Vec<AtomicU64>> = Arc::new((0..SLOTS).map(|_| AtomicU64::new(0)).collect());
    let lock = Arc::new(RangeLock::new());
    let threads: Vec<_> = (0..4).map(|i| iothread(&format!("t{i}"), EngineChoice::Threads)).collect();
    let mut tasks = Vec::new();
    for (k, t) in threads.iter().enumerate() {
        for c in 0..3u64 {
            let (lock, inside) = (Arc::clone(&lock), Arc::clone(&inside));
            tasks.push(spawn_in(t.context(), move || {
                let mut x = (k as u64 + 1) * 7919 + c;
                for i in 0..400u64 {
                    x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let from = (x >> 33) % SLOTS;
                    let to = (from + 1 + (x >> 40) % 4).min(SLOTS);
                    let exclusive = (x >> 50).is_multiple_of(3);
                    let guard = if exclusive { lock.co_exclusive(from..to) } else { lock.co_plain(from..to) };
                    let weight = if exclusive { 1 << 32 } else { 1 };
                    for s in from..to {
                        let before = inside[s as usize].fetch_add(weight, Ordering::SeqCst);
                        if exclusive {
                            assert_eq!(before, 0, "exclusive in slot {s}");
                        } else {
                            assert_eq!(before >> 32, 0, "plain beside exclusive in slot {s}");
                        }
                    }
                    if i % 4 == 0 {
                        co::co_sleep_ns(1000);
                    }
                    for s in from..to {
                        inside[s as usize].fetch_sub(weight, Ordering::SeqCst);
                    }
                    drop(guard);
                }
            }));
        }
    }
    for t in tasks {
        t.join();
    }
    assert_eq!(lock.waiting(), 0);
}
