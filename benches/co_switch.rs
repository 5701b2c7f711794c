//! What a coroutine costs: entering, yielding, creating, nesting, against the bare backend.
//!
//! Expected on an idle 3 GHz core: enter and yield about 110 ns, of which the backend (`raw may`) is nearly all;
//! create, run and end about as much, because idle stacks wait parked (320 ns for a `may` spawn each).
//!
//! `cargo bench --bench co_switch`

#![expect(unsafe_code, reason = "drives may directly, for comparison")]

use conbd::aio::{AioConfig, AioContext};
use conbd::co::{Coroutine, co_yield};
use criterion::{Criterion, criterion_group, criterion_main};
use may::sync::FastBlocker;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

/// An endless coroutine that only yields, until told to end.
fn yielder() -> (Coroutine, Arc<AtomicBool>) {
    let stop = Arc::new(AtomicBool::new(false));
    let theirs = Arc::clone(&stop);
    let co = Coroutine::new(move || {
        while !theirs.load(Ordering::Relaxed) {
            co_yield();
        }
    });
    co.enter();
    (co, stop)
}

fn end(co: &Coroutine, stop: &AtomicBool) {
    stop.store(true, Ordering::Relaxed);
    co.enter();
}

fn switches(c: &mut Criterion) {
    let ctx = AioContext::new(AioConfig::default()).expect("a context");
    c.bench_function("switch/plain_call", |b| b.iter(|| black_box(ctx.is_home())));

    let (co, stop) = yielder();
    c.bench_function("switch/enter_yield", |b| b.iter(|| co.enter()));
    c.bench_function("switch/enter_in_yield", |b| b.iter(|| co.enter_in(&ctx)));
    end(&co, &stop);

    let (co, stop) = yielder();
    c.bench_function("switch/schedule_turn_yield", |b| {
        b.iter(|| {
            co.schedule(&ctx);
            ctx.poll(false)
        });
    });
    end(&co, &stop);

    // Two coroutines that wake each other: one iteration is 1000 wakes and switches.
    c.bench_function("switch/1000_mutual_wakes", |b| {
        let peers: Arc<Mutex<Vec<Coroutine>>> = Arc::default();
        let stop = Arc::new(AtomicBool::new(false));
        for me in 0..2 {
            let (peers2, stop) = (Arc::clone(&peers), Arc::clone(&stop));
            let co = Coroutine::new(move || {
                co_yield();
                let peer = peers2.lock().expect("not poisoned")[1 - me].clone();
                while !stop.load(Ordering::Relaxed) {
                    for _ in 0..500 {
                        peer.wake();
                        co_yield();
                    }
                    if me == 0 {
                        // Back to the bench: the peer has yielded, and was not woken.
                        co_yield();
                    }
                }
            });
            co.enter();
            peers.lock().expect("not poisoned").push(co);
        }
        let first = peers.lock().expect("not poisoned")[0].clone();
        first.enter();
        b.iter(|| first.enter());
        stop.store(true, Ordering::Relaxed);
        first.enter();
        // The two would keep each other alive.
        peers.lock().expect("not poisoned").clear();
    });

    c.bench_function("create/run_end", |b| {
        b.iter(|| Coroutine::new(|| ()).enter());
    });
    c.bench_function("create/two_enters", |b| {
        b.iter(|| {
            let co = Coroutine::new(co_yield);
            co.enter();
            co.enter();
        });
    });
    c.bench_function("create/128_at_once", |b| {
        b.iter(|| {
            let all: Vec<_> = (0..128).map(|_| Coroutine::new(co_yield)).collect();
            all.iter().for_each(Coroutine::enter);
            all.iter().for_each(Coroutine::enter);
        });
    });
    c.bench_function("create/nested_100_deep", |b| {
        fn level(n: usize) {
            if n > 0 {
                Coroutine::new(move || level(n - 1)).enter();
            }
        }
        b.iter(|| level(100));
    });
}

/// The backend itself, driven in the same way.
fn raw(c: &mut Criterion) {
    conbd::co::init();
    static BLOCKER: OnceLock<FastBlocker> = OnceLock::new();
    static STOP: AtomicBool = AtomicBool::new(false);
    let body = || {
        let blocker = BLOCKER.get_or_init(FastBlocker::new);
        while !STOP.load(Ordering::Relaxed) {
            blocker.park(None).expect("not cancelled");
        }
    };
    // SAFETY: no thread-locals are kept, and the stack is ample.
    let spawned = unsafe { may::coroutine::Builder::new().spawn_local(body) };
    drop(spawned.expect("spawned"));
    let blocker = BLOCKER.get().expect("set by the body");
    c.bench_function("raw_may/enter_yield", |b| b.iter(|| blocker.unpark()));
    STOP.store(true, Ordering::Relaxed);
    blocker.unpark();
    c.bench_function("raw_may/spawn_run_end", |b| {
        b.iter(|| {
            // SAFETY: an empty body.
            drop(unsafe { may::coroutine::Builder::new().spawn_local(|| ()) }.expect("spawned"));
        });
    });
}

criterion_group!(benches, raw, switches);
criterion_main!(benches);
