//! BlockBackend: in-flight counting, drain, nesting, requests that come meanwhile.

use crate::support::{HANG, iothread, run_in_coroutine, spawn_in};
use conbd::aio::engine::EngineChoice;
use conbd::block::{
    BlockBackend, BlockNode, Extent, FaultAction, FaultNode, FaultOps, FaultRule, Limits, MemoryNode,
    NullNode, Result as BlockResult, StatusFlags, WriteFlags,
};
use conbd::co;
use conbd::util::fast;
use std::io::{IoSlice, IoSliceMut};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const MIB: u64 = 1 << 20;

fn faulty() -> (Arc<FaultNode>, Arc<BlockBackend>) {
    let memory = Arc::new(MemoryNode::new("mem", MIB).unwrap());
    let fault = FaultNode::new("fault", memory);
    let backend = BlockBackend::new(Arc::clone(&fault) as Arc<dyn BlockNode>);
    (fault, backend)
}

fn co_write(b: &BlockBackend, offset: u64, byte: u8) {
    b.co_pwritev(offset, &[IoSlice::new(&[byte; 512])], WriteFlags::empty()).expect("write");
}

/// Waits (bounded) for what another thread is about to do.
#[track_caller]
fn eventually(what: &str, mut f: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + HANG;
    while !f() {
        assert!(std::time::Instant::now() < deadline, "{what} does not happen");
        std::thread::yield_now();
    }
}

#[test]
fn drain_returns_only_after_the_request_in_flight_completed() {
    let (fault, backend) = faulty();
    let (a, b) = (iothread("a", EngineChoice::Threads), iothread("b", EngineChoice::Threads));
    fault.add_rule(FaultRule::new(FaultOps::WRITE, FaultAction::Hold).count(1));
    let be = Arc::clone(&backend);
    let write = spawn_in(a.context(), move || co_write(&be, 0, 7));
    assert!(fault.wait_held(1, HANG));
    assert_eq!(backend.in_flight(), 1);
    // From the request's own thread, and from another one.
    let drained = Arc::new(AtomicU64::new(0));
    let drains = [a.context(), b.context()].map(|ctx| {
        let (be, drained) = (Arc::clone(&backend), Arc::clone(&drained));
        spawn_in(ctx, move || {
            let section = be.co_drained();
            drained.fetch_add(1, Ordering::SeqCst);
            assert_eq!(be.in_flight(), 0);
            drop(section);
        })
    });
    eventually("draining", || backend.quiesce_count() >= 2);
    assert_eq!(drained.load(Ordering::SeqCst), 0, "the write is still held");
    assert_eq!(fault.release_all(), 1);
    write.join();
    for d in drains {
        d.join();
    }
    assert_eq!(backend.quiesce_count(), 0);
    assert_eq!(backend.in_flight(), 0);
}

#[test]
fn requests_wait_while_quiesced_and_restart_in_order() {
    let (_fault, backend) = faulty();
    let t = iothread("t", EngineChoice::Threads);
    backend.drain_begin();
    let order = Arc::new(Mutex::new(Vec::new()));
    let tasks: Vec<_> = (0..8u8)
        .map(|i| {
            let (be, order) = (Arc::clone(&backend), Arc::clone(&order));
            let task = spawn_in(t.context(), move || {
                co_write(&be, u64::from(i) * 512, i);
                order.lock().unwrap().push(i);
            });
            eventually("queueing", || backend.queued() == usize::from(i) + 1);
            task
        })
        .collect();
    assert_eq!(backend.in_flight(), 0, "who waits is not in flight");
    assert!(order.lock().unwrap().is_empty());
    backend.drain_end();
    for t in tasks {
        t.join();
    }
    assert_eq!(*order.lock().unwrap(), (0..8).collect::<Vec<u8>>());
    assert_eq!(backend.stats().writes, 8);
}

#[test]
fn nested_drains_count_and_only_the_last_end_restarts() {
    let (_fault, backend) = faulty();
    let t = iothread("t", EngineChoice::Threads);
    for depth in 1..=3 {
        backend.drain_begin();
        assert_eq!(backend.quiesce_count(), depth);
    }
    let be = Arc::clone(&backend);
    let write = spawn_in(t.context(), move || co_write(&be, 0, 1));
    eventually("queueing", || backend.queued() == 1);
    backend.drain_end();
    backend.drain_end();
    assert_eq!(backend.quiesce_count(), 1);
    assert_eq!(backend.queued(), 1);
    backend.drain_end();
    write.join();
    assert_eq!(backend.quiesce_count(), 0);
}

#[test]
fn drain_inside_a_drained_section_is_fine() {
    let (_fault, backend) = faulty();
    let t = iothread("t", EngineChoice::Threads);
    run_in_coroutine(t.context(), move || {
        let outer = backend.co_drained();
        let inner = backend.co_drained();
        backend.co_drain();
        assert_eq!(backend.quiesce_count(), 2);
        drop(outer);
        assert_eq!(backend.quiesce_count(), 1);
        drop(inner);
        assert_eq!(backend.quiesce_count(), 0);
        co_write(&backend, 0, 1);
    });
}

#[test]
#[should_panic(expected = "a drain ends that had not begun")]
fn drain_end_without_begin_panics() {
    faulty().1.drain_end();
}

#[test]
fn nothing_is_served_inline_while_quiesced() {
    let (_fault, backend) = faulty();
    let mut buf = [1u8; 512];
    // Both when the tests run with CONBD_FAST=off and when not.
    let fast = fast::paths();
    assert_eq!(backend.try_pread(0, &mut buf), fast.inline_read);
    assert_eq!(backend.try_pwrite(0, &buf).is_some(), fast.inline_write);
    backend.drain_begin();
    assert_eq!(backend.try_pread_some(0, &mut buf), 0);
    assert!(backend.try_pwrite(0, &buf).is_none());
    backend.drain_end();
    assert_eq!(backend.try_pread(0, &mut buf), fast.inline_read);
    let s = backend.stats();
    let (reads, writes) = (u64::from(fast.inline_read) * 2, u64::from(fast.inline_write));
    assert_eq!((s.reads, s.inline_reads, s.writes, s.inline_writes), (reads, reads, writes, writes));
    assert_eq!((s.read_bytes, s.write_bytes), (reads * 512, writes * 512));
}

#[test]
fn plain_thread_can_wait_for_idle_with_a_bound() {
    let (fault, backend) = faulty();
    let t = iothread("t", EngineChoice::Threads);
    assert!(backend.wait_idle_blocking(Duration::ZERO));
    fault.add_rule(FaultRule::new(FaultOps::FLUSH, FaultAction::Hold));
    let be = Arc::clone(&backend);
    let flush = spawn_in(t.context(), move || be.co_flush());
    assert!(fault.wait_held(1, HANG));
    assert!(!backend.wait_idle_blocking(Duration::ZERO));
    let releaser = {
        let fault = Arc::clone(&fault);
        std::thread::spawn(move || fault.release_all())
    };
    assert!(backend.wait_idle_blocking(HANG));
    assert_eq!(releaser.join().unwrap(), 1);
    flush.join().expect("flush");
}

#[test]
fn failed_and_refused_requests_leave_nothing_in_flight() {
    let (fault, backend) = faulty();
    let t = iothread("t", EngineChoice::Threads);
    fault.add_rule(
        FaultRule::new(FaultOps::READ, FaultAction::Errno(libc::EIO)).range(0..4096).skip(1).count(1),
    );
    let be = Arc::clone(&backend);
    run_in_coroutine(t.context(), move || {
        let read = |offset| be.co_preadv(offset, &mut [IoSliceMut::new(&mut [0u8; 512])]);
        read(0).expect("the first passes");
        read(8192).expect("out of range of the rule");
        let e = read(0).expect_err("the second is hit");
        assert_eq!(e.errno(), libc::EIO);
        assert_eq!(e.to_string(), "preadv on fault at offset 0");
        read(0).expect("the rule is used up");
    });
    assert_eq!(backend.in_flight(), 0);
    assert_eq!(backend.stats().errors, 1);

    let ro = BlockBackend::new(Arc::new(NullNode::new("null", MIB).with_read_only(true)));
    let be = Arc::clone(&ro);
    let e = run_in_coroutine(t.context(), move || be.co_pwrite_zeroes(0, 512, WriteFlags::empty()));
    assert_eq!(e.expect_err("read-only").errno(), libc::EPERM);
    let refused = ro.try_pwrite(0, &[0; 512]).map(|r| r.is_err());
    assert_eq!(refused, fast::paths().inline_write.then_some(true));
    assert_eq!(ro.in_flight(), 0);
}

#[test]
fn panic_in_a_request_leaves_nothing_in_flight() {
    let (_fault, backend) = faulty();
    let t = iothread("t", EngineChoice::Threads);
    let be = Arc::clone(&backend);
    let out_of_bounds = spawn_in(t.context(), move || {
        be.co_preadv(MIB - 1, &mut [IoSliceMut::new(&mut [0u8; 512])]).expect("never gets here");
    });
    eventually("ending", || out_of_bounds.ended());
    assert_eq!(backend.in_flight(), 0);
    let be = Arc::clone(&backend);
    run_in_coroutine(t.context(), move || be.co_drain());
}

#[test]
fn fault_node_holds_after_the_effect_and_fails_on_release() {
    let (fault, backend) = faulty();
    let t = iothread("t", EngineChoice::Threads);
    let rule = fault.add_rule(FaultRule::new(FaultOps::WRITE, FaultAction::Hold).after());
    let be = Arc::clone(&backend);
    let write = spawn_in(t.context(), move || {
        be.co_pwritev(0, &[IoSlice::new(&[5; 512])], WriteFlags::empty()).expect_err("fails").errno()
    });
    assert!(fault.wait_held(1, HANG));
    let held = fault.held();
    assert_eq!((held[0].op, held[0].offset, held[0].len), (FaultOps::WRITE, 0, 512));
    assert_eq!(fault.hits(rule), 1);
    let be = Arc::clone(&backend);
    let seen = run_in_coroutine(t.context(), move || {
        let mut b = [0u8; 1];
        be.co_preadv(0, &mut [IoSliceMut::new(&mut b)]).expect("read");
        b[0]
    });
    assert_eq!(seen, 5, "the effect is there before the completion");
    assert!(fault.release_with_errno(held[0].id, libc::ENOSPC));
    assert!(!fault.release(held[0].id), "it is gone");
    assert_eq!(write.join(), libc::ENOSPC);
    assert_eq!(fault.remove_rule(rule), 1);
    let inline = backend.try_pwrite(0, &[1; 512]).is_some();
    assert_eq!(inline, fast::paths().inline_write, "inline again without rules");
}

#[test]
fn fault_node_delays_on_the_contexts_timers() {
    let (fault, backend) = faulty();
    let t = iothread("t", EngineChoice::Threads);
    let rule = fault.add_rule(FaultRule::new(FaultOps::FLUSH, FaultAction::DelayNs(1_000_000)));
    let (begun, ended) = run_in_coroutine(t.context(), move || {
        let now = || conbd::aio::AioContext::current().unwrap().now_ns();
        let begun = now();
        backend.co_flush().expect("flush");
        (begun, now())
    });
    assert!(ended >= begun + 1_000_000, "the context's own clock says so");
    assert_eq!(fault.hits(rule), 1);
}

/// Counts who is inside; every request yields once in the middle.
struct Crowd {
    inside: Arc<AtomicU64>,
}

impl Crowd {
    fn co_visit(&self) {
        self.inside.fetch_add(1, Ordering::SeqCst);
        co::co_sleep_ns(1000);
        self.inside.fetch_sub(1, Ordering::SeqCst);
    }
}

impl BlockNode for Crowd {
    fn name(&self) -> &str {
        "crowd"
    }
    fn len(&self) -> u64 {
        MIB
    }
    fn read_only(&self) -> bool {
        false
    }
    fn limits(&self) -> Limits {
        Limits { request_alignment: 1, preferred: 4096, fast_zero: false, rotational: false }
    }
    fn co_preadv(&self, _offset: u64, _bufs: &mut [IoSliceMut<'_>]) -> BlockResult<()> {
        self.co_visit();
        Ok(())
    }
    fn co_pwritev(&self, _offset: u64, _bufs: &[IoSlice<'_>], _flags: WriteFlags) -> BlockResult<()> {
        self.co_visit();
        Ok(())
    }
    fn co_pwrite_zeroes(&self, _offset: u64, _len: u64, _flags: WriteFlags) -> BlockResult<()> {
        Ok(())
    }
    fn co_pdiscard(&self, _offset: u64, _len: u64) -> BlockResult<()> {
        Ok(())
    }
    fn co_flush(&self) -> BlockResult<()> {
        self.co_visit();
        Ok(())
    }
    fn co_block_status(&self, _offset: u64, len: u64) -> BlockResult<Extent> {
        Ok(Extent { len, flags: StatusFlags::DATA })
    }
}

#[test]
fn no_request_is_ever_inside_a_drained_section() {
    const REQUESTS: u64 = 300;
    let inside = Arc::new(AtomicU64::new(0));
    let backend = BlockBackend::new(Arc::new(Crowd { inside: Arc::clone(&inside) }));
    let threads: Vec<_> = (0..4).map(|i| iothread(&format!("t{i}"), EngineChoice::Threads)).collect();
    let stop = Arc::new(AtomicBool::new(false));
    let mut workers = Vec::new();
    for t in &threads {
        for _ in 0..4 {
            let be = Arc::clone(&backend);
            workers.push(spawn_in(t.context(), move || {
                for i in 0..REQUESTS {
                    if i % 3 == 0 { be.co_flush().expect("flush") } else { co_write(&be, 0, 1) }
                }
            }));
        }
    }
    let drains: Vec<_> = threads[..2]
        .iter()
        .map(|t| {
            let (be, inside, stop) = (Arc::clone(&backend), Arc::clone(&inside), Arc::clone(&stop));
            spawn_in(t.context(), move || {
                let mut n = 0u64;
                while !stop.load(Ordering::SeqCst) {
                    let section = be.co_drained();
                    assert_eq!(inside.load(Ordering::SeqCst), 0);
                    co::co_sleep_ns(1000);
                    assert_eq!(inside.load(Ordering::SeqCst), 0);
                    drop(section);
                    n += 1;
                    co::co_sleep_ns(200_000);
                }
                n
            })
        })
        .collect();
    for w in workers {
        w.join();
    }
    stop.store(true, Ordering::SeqCst);
    for d in drains {
        assert!(d.join() > 0);
    }
    let s = backend.stats();
    assert_eq!(s.writes + s.flushes, 16 * REQUESTS);
    assert_eq!(backend.quiesce_count(), 0);
    assert_eq!(backend.in_flight(), 0);
}
