//! What a turn of the event loop costs: bottom halves, wake-ups between threads, fd handlers, timers, file I/O.
//!
//! `cargo bench --bench event_loop`

use conbd::aio::engine::{EngineChoice, Op};
use conbd::aio::{AioConfig, AioContext, Interest, IoThread, PollConfig};
use criterion::{Criterion, criterion_group, criterion_main};
use rustix::event::{EventfdFlags, eventfd};
use std::cell::Cell;
use std::hint::black_box;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

fn context(engine: EngineChoice) -> Arc<AioContext> {
    AioContext::new(AioConfig { engine, ..AioConfig::default() }).expect("a context")
}

fn home(c: &mut Criterion) {
    let ctx = context(EngineChoice::Auto);
    c.bench_function("turn/empty", |b| b.iter(|| black_box(ctx.poll(false))));
    let bh = ctx.bh_new(|| ());
    c.bench_function("turn/one_bh", |b| {
        b.iter(|| {
            bh.schedule();
            ctx.poll(false)
        });
    });
    c.bench_function("turn/64_oneshots", |b| {
        b.iter(|| {
            for _ in 0..64 {
                ctx.bh_schedule_oneshot(|| ());
            }
            ctx.poll(false)
        });
    });
    let timer = ctx.timer_new(|| ());
    c.bench_function("timer/arm_and_fire", |b| {
        b.iter(|| {
            timer.mod_ns(0);
            ctx.poll(false)
        });
    });
    c.bench_function("timer/arm_and_delete", |b| {
        b.iter(|| {
            timer.mod_ns(u64::MAX / 2);
            timer.del();
        });
    });
    let e = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
    let id = ctx.add_handler(e.as_raw_fd(), Interest::Read, |_| ()).expect("a handler");
    c.bench_function("turn/one_ready_fd", |b| {
        b.iter(|| {
            rustix::io::write(&e, &1u64.to_ne_bytes()).expect("a write");
            ctx.poll(false)
        });
    });
    ctx.remove_handler(id);
}

/// A wake-up there and back between two threads, with and without busy polling.
fn ping_pong(c: &mut Criterion) {
    let ctx = context(EngineChoice::Auto);
    for (name, max_ns) in [("block", 0), ("busy_poll_100us", 100_000)] {
        let poll = PollConfig { max_ns, grow: 0, shrink: 0 };
        ctx.set_poll(poll);
        let thread = IoThread::spawn(AioConfig { poll, ..AioConfig::default() }).expect("an IOThread");
        let back = Arc::new(AtomicUsize::new(0));
        c.bench_function(&format!("ping_pong/{name}"), |b| {
            b.iter(|| {
                let (here, back2) = (Arc::clone(&ctx), Arc::clone(&back));
                let before = back.load(Ordering::Relaxed);
                thread.context().bh_schedule_oneshot(move || {
                    here.bh_schedule_oneshot(move || {
                        back2.fetch_add(1, Ordering::Relaxed);
                    });
                });
                ctx.poll_until(|| back.load(Ordering::Relaxed) != before);
            });
        });
        thread.stop().expect("the IOThread stops");
    }
    ctx.set_poll(PollConfig { max_ns: 0, grow: 0, shrink: 0 });
}

/// 4 KiB reads of a cached file through each engine, alone and 32 at a time.
fn file_io(c: &mut Criterion) {
    const BLOCK: usize = 4096;
    const DEPTH: usize = 32;
    let file = tempfile::tempfile().expect("a file");
    file.set_len((BLOCK * DEPTH) as u64).expect("a size");
    for (name, choice) in [("io_uring", EngineChoice::IoUring), ("threads", EngineChoice::Threads)] {
        let Ok(ctx) = AioContext::new(AioConfig { engine: choice, ..AioConfig::default() }) else {
            println!("file_read_4k/{name}: not measured, the engine is not available here");
            continue;
        };
        for depth in [1, DEPTH] {
            let mut buffer = vec![0u8; BLOCK * depth];
            let iovs: Vec<libc::iovec> = buffer
                .chunks_mut(BLOCK)
                .map(|c| libc::iovec { iov_base: c.as_mut_ptr().cast(), iov_len: BLOCK })
                .collect();
            let done = Arc::new(AtomicUsize::new(0));
            let expected = Cell::new(0);
            c.bench_function(&format!("file_read_4k/{name}/depth_{depth}"), |b| {
                b.iter(|| {
                    for (i, iov) in iovs.iter().enumerate() {
                        let op =
                            Op::Readv { fd: file.as_raw_fd(), iov, iov_len: 1, offset: (i * BLOCK) as u64 };
                        let done = Arc::clone(&done);
                        let completion = Box::new(move |n: std::io::Result<usize>| {
                            assert_eq!(n.expect("a read"), BLOCK);
                            done.fetch_add(1, Ordering::Relaxed);
                        });
                        #[expect(unsafe_code, reason = "the engine borrows the buffer")]
                        // SAFETY: file, vectors and buffer outlive the completions that are waited for below.
                        unsafe {
                            ctx.submit(op, completion);
                        }
                    }
                    expected.set(expected.get() + depth);
                    ctx.poll_until(|| done.load(Ordering::Relaxed) == expected.get());
                });
            });
        }
    }
}

criterion_group!(benches, home, ping_pong, file_io);
criterion_main!(benches);
