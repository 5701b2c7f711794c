//! Flushing: sharing where it is correct, and failures that are never forgotten.

use crate::support::{HANG, engines, iothread, run_in_coroutine, spawn_in};
use conbd::aio::engine::EngineChoice;
use conbd::block::{BlockNode, CacheMode, FileNode, FileOptions, FlushGroup, WriteFlags};
use conbd::co::CoQueue;
use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// A sync that can be held: counts how often it ran, waits while it is closed.
#[derive(Default)]
struct Gate {
    open: Mutex<bool>,
    queue: CoQueue,
    syncs: AtomicU64,
    fails: AtomicBool,
}

impl Gate {
    fn co_sync(&self) -> io::Result<()> {
        self.syncs.fetch_add(1, Ordering::SeqCst);
        let mut open = self.open.lock().unwrap();
        while !*open {
            open = self.queue.co_wait_with((&self.open, open)).1;
        }
        if self.fails.load(Ordering::SeqCst) { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
    }

    fn set(&self, open: bool) {
        *self.open.lock().unwrap() = open;
        self.queue.restart_all();
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

fn rig() -> (Arc<FlushGroup>, Arc<Gate>) {
    (Arc::new(FlushGroup::new()), Arc::new(Gate::default()))
}

#[test]
fn flushers_that_come_during_a_sync_share_the_next_one() {
    let (group, gate) = rig();
    let threads = [iothread("a", EngineChoice::Threads), iothread("b", EngineChoice::Threads)];
    let start = |i: usize| {
        let (group, gate) = (Arc::clone(&group), Arc::clone(&gate));
        spawn_in(threads[i % 2].context(), move || group.co_flush(|| gate.co_sync()).is_ok())
    };
    let first = start(0);
    eventually("the first sync", || gate.syncs.load(Ordering::SeqCst) == 1);
    // It has begun already: it may not cover what completed since.
    let later: Vec<_> = (0..6).map(start).collect();
    eventually("waiting", || group.waiting() == 6);
    assert_eq!(gate.syncs.load(Ordering::SeqCst), 1);
    gate.set(true);
    assert!(first.join());
    for l in later {
        assert!(l.join());
    }
    assert_eq!(gate.syncs.load(Ordering::SeqCst), 2, "six flushers shared one sync");
    assert_eq!(group.syncs(), 2);
}

#[test]
fn failed_sync_fails_those_who_shared_it_and_everybody_after() {
    let (group, gate) = rig();
    let t = iothread("t", EngineChoice::Threads);
    let start = || {
        let (group, gate) = (Arc::clone(&group), Arc::clone(&gate));
        spawn_in(t.context(), move || group.co_flush(|| gate.co_sync()).map_err(|e| e.raw_os_error()))
    };
    let first = start();
    eventually("the first sync", || gate.syncs.load(Ordering::SeqCst) == 1);
    let second = start();
    eventually("waiting", || group.waiting() == 1);
    gate.fails.store(true, Ordering::SeqCst);
    gate.set(true);
    assert_eq!(first.join(), Err(Some(libc::EIO)));
    assert_eq!(second.join(), Err(Some(libc::EIO)));
    gate.fails.store(false, Ordering::SeqCst);
    assert_eq!(start().join(), Err(Some(libc::EIO)), "the disk works again, the data is lost all the same");
    assert_eq!(gate.syncs.load(Ordering::SeqCst), 1);
    assert_eq!(group.failed(), Some(libc::EIO));
}

#[test]
fn sync_that_panics_is_a_failure_and_blocks_nobody() {
    let (group, gate) = rig();
    let t = iothread("t", EngineChoice::Threads);
    let g = Arc::clone(&group);
    let panics = spawn_in(t.context(), move || {
        let _ = g.co_flush(|| panic!("a sync that panics, on purpose"));
    });
    eventually("ending", || panics.ended());
    let e = run_in_coroutine(t.context(), move || group.co_flush(|| gate.co_sync()));
    assert_eq!(e.expect_err("failed before").raw_os_error(), Some(libc::EIO));
}

fn image() -> (tempfile::TempDir, FileOptions) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    (dir, FileOptions::new(path))
}

fn co_write(node: &FileNode, flags: WriteFlags) -> Result<(), i32> {
    node.co_pwritev(4096, &[IoSlice::new(&[3; 4096])], flags).map_err(|e| e.errno())
}

#[test]
fn fsync_error_of_a_file_is_never_forgotten() {
    for engine in engines() {
        let (_dir, options) = image();
        let node = FileNode::open(&options).unwrap();
        let t = iothread("t", engine);
        run_in_coroutine(t.context(), move || {
            let co_flush = || node.co_flush().map_err(|e| e.errno());
            assert_eq!(co_write(&node, WriteFlags::empty()), Ok(()));
            assert_eq!(co_flush(), Ok(()));
            node.fail_next_sync(libc::EIO);
            assert_eq!(co_flush(), Err(libc::EIO));
            assert_eq!(co_flush(), Err(libc::EIO), "the kernel would say Ok here");
            assert_eq!(node.syncs(), 2, "nothing more is tried");
            assert_eq!(co_write(&node, WriteFlags::empty()), Ok(()), "writing goes on");
            assert_eq!(
                node.co_pwrite_zeroes(0, 512, WriteFlags::FUA).map_err(|e| e.errno()),
                Err(libc::EIO),
                "durable zeroing needs a flush"
            );
        });
    }
}

#[test]
fn unsafe_cache_never_syncs_and_the_others_do() {
    for (cache, syncs) in [(CacheMode::Unsafe, 0), (CacheMode::Writeback, 2), (CacheMode::Writethrough, 2)] {
        let (_dir, options) = image();
        let node = FileNode::open(&FileOptions { cache, ..options }).unwrap();
        let t = iothread("t", EngineChoice::Auto);
        run_in_coroutine(t.context(), move || {
            assert_eq!(co_write(&node, WriteFlags::FUA), Ok(()));
            node.co_flush().expect("flush");
            node.co_pwrite_zeroes(0, 8192, WriteFlags::FUA).expect("zeroes");
            assert_eq!(node.syncs(), syncs, "{cache}");
        });
    }
}

#[test]
fn flush_of_a_read_only_node_has_nothing_to_do() {
    let (_dir, options) = image();
    let node = FileNode::open(&FileOptions { read_only: true, ..options }).unwrap();
    let t = iothread("t", EngineChoice::Auto);
    run_in_coroutine(t.context(), move || {
        node.fail_next_sync(libc::EIO);
        node.co_flush().expect("nothing was written");
        assert_eq!(node.syncs(), 0);
    });
}
