//! What a CoMutex costs: free, contended by several contexts, and handed over, against what threads have.
//!
//! One iteration is one section (lock, add one, unlock), so contended figures are the time per section over all
//! participants. Expected: a few times an atomic operation when free; contended about one wake-up of a thread per hand-over,
//! because the lock is fair: every section goes to another context. `std_mutex` is not fair, and mostly keeps the
//! lock on one core; `fair_threads` hands over in order, as an MCS lock that sleeps does.
//!
//! `cargo bench --bench co_mutex`

use conbd::aio::{AioConfig, AioContext, IoThread};
use conbd::co::{CoMutex, CoRwLock, Coroutine};
use criterion::{Criterion, criterion_group, criterion_main};
use std::collections::VecDeque;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// Times `f(iters)` in a coroutine of the calling thread; `f` must not yield.
fn in_coroutine(iters: u64, f: impl Fn(u64) + Send + 'static) -> Duration {
    let (tx, rx) = mpsc::channel();
    Coroutine::new(move || {
        let begin = Instant::now();
        f(iters);
        tx.send(begin.elapsed()).expect("the bench waits");
    })
    .enter();
    rx.recv().expect("the coroutine has run")
}

fn free(c: &mut Criterion) {
    let _ctx = AioContext::new(AioConfig::default()).expect("a context");
    let m = Arc::new(CoMutex::new(0_u64));
    c.bench_function("free/co_mutex", |b| {
        b.iter_custom(|iters| {
            let m = Arc::clone(&m);
            in_coroutine(iters, move |n| (0..n).for_each(|_| *black_box(&m).co_lock() += 1))
        });
    });
    let rw = Arc::new(CoRwLock::new(0_u64));
    c.bench_function("free/co_rwlock_read", |b| {
        b.iter_custom(|iters| {
            let rw = Arc::clone(&rw);
            in_coroutine(iters, move |n| {
                (0..n).for_each(|_| {
                    black_box(*black_box(&rw).co_read());
                });
            })
        });
    });
    let std = Arc::new(Mutex::new(0_u64));
    c.bench_function("free/std_mutex", |b| {
        b.iter(|| *black_box(&std).lock().expect("not poisoned") += 1);
    });
}

/// Two coroutines of one context: each unlock hands over to the other one.
fn hand_over_at_home(c: &mut Criterion) {
    let _ctx = AioContext::new(AioConfig::default()).expect("a context");
    c.bench_function("hand_over/same_context", |b| {
        b.iter_custom(|iters| {
            let m = Arc::new(CoMutex::new(0_u64));
            let body = |m: Arc<CoMutex<u64>>| {
                move || {
                    let mut guard = m.co_lock();
                    while *guard < iters {
                        *guard += 1;
                        drop(guard);
                        guard = m.co_lock();
                    }
                }
            };
            // Makes the first two queue behind it.
            let starter = Arc::clone(&m);
            let begin = Arc::new(Mutex::new(None));
            let set = Arc::clone(&begin);
            let all = [Coroutine::new(body(Arc::clone(&m))), Coroutine::new(body(Arc::clone(&m)))];
            Coroutine::new(move || {
                let guard = starter.co_lock();
                all.iter().for_each(Coroutine::enter);
                *set.lock().expect("not poisoned") = Some(Instant::now());
                drop(guard);
            })
            .enter();
            let begin = begin.lock().expect("not poisoned").expect("set");
            let elapsed = begin.elapsed();
            assert_eq!(Arc::into_inner(m).expect("all have ended").into_inner(), iters);
            elapsed
        });
    });
}

/// `n` participants share `iters` sections.
fn share(iters: u64, n: usize, run: impl Fn(u64, mpsc::Sender<()>)) -> Duration {
    let (tx, rx) = mpsc::channel();
    let begin = Instant::now();
    for k in 0..n as u64 {
        run(iters / n as u64 + u64::from(k < iters % n as u64), tx.clone());
    }
    drop(tx);
    for _ in 0..n {
        rx.recv().expect("every participant reports");
    }
    begin.elapsed()
}

/// A mutex of threads that hands over in order; the waiter sleeps.
#[derive(Default)]
struct FairLock {
    state: Mutex<Fair>,
}

#[derive(Default)]
struct Fair {
    held: bool,
    waiting: VecDeque<(Thread, Arc<AtomicBool>)>,
}

impl FairLock {
    fn lock(&self) {
        let granted = Arc::new(AtomicBool::new(false));
        {
            let mut state = self.state.lock().expect("not poisoned");
            if !state.held {
                state.held = true;
                return;
            }
            state.waiting.push_back((std::thread::current(), Arc::clone(&granted)));
        }
        while !granted.load(Ordering::Acquire) {
            std::thread::park();
        }
    }

    fn unlock(&self) {
        let mut state = self.state.lock().expect("not poisoned");
        match state.waiting.pop_front() {
            None => state.held = false,
            Some((thread, granted)) => {
                drop(state);
                granted.store(true, Ordering::Release);
                thread.unpark();
            }
        }
    }
}

fn contended(c: &mut Criterion) {
    let mut g = c.benchmark_group("contended");
    g.sample_size(10);
    for n in [2_usize, 5] {
        let all: Vec<_> = (0..n)
            .map(|k| {
                let config = AioConfig { name: format!("io{k}"), ..AioConfig::default() };
                IoThread::spawn(config).expect("an IOThread")
            })
            .collect();
        g.bench_function(format!("co_mutex_{n}_contexts"), |b| {
            b.iter_custom(|iters| {
                let m = Arc::new(CoMutex::new(0_u64));
                let next = std::cell::Cell::new(0);
                let elapsed = share(iters, n, |rounds, tx| {
                    let m = Arc::clone(&m);
                    let io = &all[next.replace(next.get() + 1)];
                    Coroutine::new(move || {
                        for _ in 0..rounds {
                            *m.co_lock() += 1;
                        }
                        drop(m);
                        tx.send(()).expect("the bench waits");
                    })
                    .enter_on(io.context());
                });
                assert!(m.is_pristine());
                elapsed
            });
        });
        g.bench_function(format!("std_mutex_{n}_threads"), |b| {
            b.iter_custom(|iters| {
                let m = Arc::new(Mutex::new(0_u64));
                share(iters, n, |rounds, tx| {
                    let m = Arc::clone(&m);
                    std::thread::spawn(move || {
                        for _ in 0..rounds {
                            *m.lock().expect("not poisoned") += 1;
                        }
                        tx.send(()).expect("the bench waits");
                    });
                })
            });
        });
        g.bench_function(format!("fair_threads_{n}_threads"), |b| {
            b.iter_custom(|iters| {
                let m = Arc::new(FairLock::default());
                share(iters, n, |rounds, tx| {
                    let m = Arc::clone(&m);
                    std::thread::spawn(move || {
                        for _ in 0..rounds {
                            m.lock();
                            m.unlock();
                        }
                        tx.send(()).expect("the bench waits");
                    });
                })
            });
        });
        all.into_iter().for_each(|io| io.stop().expect("the loop ended well"));
    }
    g.finish();
}

criterion_group!(benches, free, hand_over_at_home, contended);
criterion_main!(benches);
