//! CoQueue and CoRwLock: order, fairness, no lost wakeup.

use crate::co_coroutine::{Count, context, iothread, panic_of, run_on};
use conbd::co::{CoMutex, CoQueue, CoRwLock, Coroutine, Outcome, Relock, co_yield};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

/// Only ends a test that would hang; nothing is measured.
const HANG: Duration = Duration::from_secs(60);

type Log = Arc<Mutex<Vec<String>>>;

fn note(log: &Log, what: impl Into<String>) {
    log.lock().unwrap().push(what.into());
}

fn entries(log: &Log) -> Vec<String> {
    log.lock().unwrap().clone()
}

fn finished(co: &Coroutine) {
    assert_eq!(co.outcome(), Some(Outcome::Finished));
}

// ---- CoQueue -------------------------------------------------------------------------------------------------

#[test]
fn waiters_are_woken_in_order_and_one_at_a_time() {
    let _ctx = context();
    let (q, log) = (Arc::new(CoQueue::new()), Log::default());
    assert!(q.is_empty() && !q.next());
    for n in 0..4 {
        let (q, log) = (Arc::clone(&q), Arc::clone(&log));
        Coroutine::new(move || {
            q.co_wait();
            note(&log, n.to_string());
        })
        .enter();
    }
    assert_eq!(q.len(), 4);
    assert!(q.next());
    assert_eq!(entries(&log), ["0"]);
    assert!(q.next());
    assert_eq!(entries(&log), ["0", "1"]);
    q.restart_all();
    assert_eq!(entries(&log), ["0", "1", "2", "3"]);
    assert!(q.is_empty() && !q.next());
}

#[test]
fn a_waiter_at_the_front_goes_first() {
    let _ctx = context();
    let (q, log) = (Arc::new(CoQueue::new()), Log::default());
    for (name, front) in [("back", false), ("front", true)] {
        let (q, log) = (Arc::clone(&q), Arc::clone(&log));
        Coroutine::new(move || {
            if front {
                q.co_wait_front_with(())
            } else {
                q.co_wait()
            }
            note(&log, name);
        })
        .enter();
    }
    q.restart_all();
    assert_eq!(entries(&log), ["front", "back"]);
}

#[test]
fn next_in_a_coroutine_keeps_running_it() {
    let _ctx = context();
    let (q, log) = (Arc::new(CoQueue::new()), Log::default());
    let (q1, log1) = (Arc::clone(&q), Arc::clone(&log));
    Coroutine::new(move || {
        q1.co_wait();
        note(&log1, "woken");
    })
    .enter();
    let log2 = Arc::clone(&log);
    Coroutine::new(move || {
        assert!(q.next());
        note(&log2, "waker");
        assert!(!q.next());
    })
    .enter();
    assert_eq!(entries(&log), ["waker", "woken"]);
}

#[test]
fn a_stray_wake_does_not_end_a_wait() {
    let _ctx = context();
    let q = Arc::new(CoQueue::new());
    let q1 = Arc::clone(&q);
    let co = Coroutine::new(move || q1.co_wait());
    co.enter();
    co.wake();
    co.wake();
    assert_eq!(co.outcome(), None);
    assert_eq!(q.len(), 1);
    q.next();
    finished(&co);
}

/// No lock at all; giving it up waits until another thread has woken the waiter.
struct WokenMeanwhile<'a>(&'a CoQueue);

impl Relock for WokenMeanwhile<'_> {
    type Unlocked = Self;
    fn unlock(self) -> Self {
        std::thread::scope(|s| {
            s.spawn(|| assert!(self.0.next()));
        });
        self
    }
    fn co_relock(unlocked: Self) -> Self {
        unlocked
    }
}

#[test]
fn a_wake_that_comes_before_the_yield_is_used_up_by_that_wait() {
    let ctx = context();
    let resumed = Count::default();
    let count = resumed.clone();
    let co = Coroutine::new(move || {
        let q = CoQueue::new();
        q.co_wait_with(WokenMeanwhile(&q));
        count.bump();
        co_yield();
        count.bump();
    });
    co.enter();
    for _ in 0..5 {
        ctx.poll(false);
    }
    assert_eq!(resumed.get(), 1);
    co.enter();
    assert_eq!(resumed.get(), 2);
}

#[test]
fn waiting_outside_of_coroutines_panics() {
    assert!(panic_of(|| CoQueue::new().co_wait()).contains("only a coroutine can wait"));
}

#[test]
fn waiting_gives_the_mutex_up_and_takes_it_again() {
    let _ctx = context();
    let shared = Arc::new((CoMutex::new(false), CoQueue::new()));
    let theirs = Arc::clone(&shared);
    let waiter = Coroutine::new(move || {
        let (m, q) = &*theirs;
        let mut guard = m.co_lock();
        while !*guard {
            guard = q.co_wait_with(guard);
            m.assert_locked();
        }
        *guard = false;
    });
    waiter.enter();
    assert_eq!(shared.1.len(), 1);
    let ours = Arc::clone(&shared);
    let setter = Coroutine::new(move || {
        let (m, q) = &*ours;
        let mut guard = m.co_lock();
        *guard = true;
        q.next();
        // The woken one contends for the mutex, which we still hold.
        co_yield();
        m.assert_locked();
        drop(guard);
    });
    setter.enter();
    assert_eq!(waiter.outcome(), None);
    setter.enter();
    finished(&waiter);
    finished(&setter);
    assert!(shared.0.is_pristine());
}

#[test]
fn a_std_mutex_or_no_lock_at_all_will_do() {
    let _ctx = context();
    let shared = Arc::new((Mutex::new(0), CoQueue::new()));
    let theirs = Arc::clone(&shared);
    let waiter = Coroutine::new(move || {
        let (m, q) = &*theirs;
        let mut guard = m.lock().unwrap();
        while *guard < 2 {
            (_, guard) = q.co_wait_with((m, guard));
        }
    });
    waiter.enter();
    for _ in 0..2 {
        assert_eq!(waiter.outcome(), None);
        let (m, q) = &*shared;
        let mut guard = m.lock().unwrap();
        *guard += 1;
        // Plain code: the woken one runs at once, and wants the lock that we hold.
        let ((_, guard), woken) = q.enter_next((m, guard));
        assert!(woken);
        drop(guard);
    }
    finished(&waiter);
    assert!(!shared.1.enter_next(()).1);
}

#[test]
fn enter_all_runs_everybody_with_the_lock_given_up() {
    let _ctx = context();
    let shared = Arc::new((Mutex::new(0), CoQueue::new()));
    let all: Vec<_> = (0..5)
        .map(|_| {
            let theirs = Arc::clone(&shared);
            let co = Coroutine::new(move || {
                let (m, q) = &*theirs;
                let (_, mut guard) = q.co_wait_with((m, m.lock().unwrap()));
                *guard += 1;
            });
            co.enter();
            co
        })
        .collect();
    let (m, q) = &*shared;
    let (_, guard) = q.enter_all((m, m.lock().unwrap()));
    assert_eq!(*guard, 5);
    all.iter().for_each(finished);
}

#[test]
fn producers_and_consumers_on_four_contexts_lose_nothing() {
    const EACH: u64 = 2_000;
    struct Shared {
        items: CoMutex<Vec<u64>>,
        not_empty: CoQueue,
        not_full: CoQueue,
        sum: AtomicU64,
    }
    let all: Vec<_> = (0..4).map(|n| iothread(&format!("io{n}"))).collect();
    let shared = Arc::new(Shared {
        items: CoMutex::new(Vec::new()),
        not_empty: CoQueue::new(),
        not_full: CoQueue::new(),
        sum: AtomicU64::new(0),
    });
    let (tx, rx) = mpsc::channel();
    for (n, io) in all.iter().enumerate() {
        let (shared, tx) = (Arc::clone(&shared), tx.clone());
        Coroutine::new(move || {
            let s = &*shared;
            for k in 1..=EACH {
                let mut items = s.items.co_lock();
                if n % 2 == 0 {
                    while items.len() >= 4 {
                        items = s.not_full.co_wait_with(items);
                    }
                    items.push(k);
                    s.not_empty.next();
                } else {
                    while items.is_empty() {
                        items = s.not_empty.co_wait_with(items);
                    }
                    let k = items.pop().unwrap();
                    s.sum.fetch_add(k, Ordering::Relaxed);
                    s.not_full.next();
                }
            }
            tx.send(()).unwrap();
        })
        .enter_on(io.context());
    }
    for _ in 0..4 {
        rx.recv_timeout(HANG).expect("a wakeup was lost");
    }
    all.into_iter().for_each(|io| io.stop().unwrap());
    assert_eq!(shared.sum.load(Ordering::Relaxed), 2 * EACH * (EACH + 1) / 2);
    assert!(shared.items.is_pristine());
}

// ---- CoRwLock ------------------------------------------------------------------------------------------------

/// A coroutine that notes what it gets, and yields while it holds the lock.
fn holder(lock: &Arc<CoRwLock<u32>>, log: &Log, name: &'static str, write: bool) -> Coroutine {
    let (lock, log) = (Arc::clone(lock), Arc::clone(log));
    let co = Coroutine::new(move || {
        if write {
            let mut guard = lock.co_write();
            *guard += 1;
            note(&log, format!("{name} writes"));
            co_yield();
            drop(guard);
        } else {
            let guard = lock.co_read();
            note(&log, format!("{name} reads"));
            co_yield();
            drop(guard);
        }
        note(&log, format!("{name} done"));
    });
    co.enter();
    co
}

#[test]
fn readers_share_and_a_writer_is_alone() {
    let _ctx = context();
    let (lock, log) = (Arc::new(CoRwLock::new(0)), Log::default());
    let r1 = holder(&lock, &log, "r1", false);
    let r2 = holder(&lock, &log, "r2", false);
    let w = holder(&lock, &log, "w", true);
    assert_eq!(entries(&log), ["r1 reads", "r2 reads"]);
    assert_eq!(lock.holders_and_waiters(), (2, 1));
    r1.enter();
    assert_eq!(lock.holders_and_waiters(), (1, 1));
    r2.enter();
    assert_eq!(lock.holders_and_waiters(), (-1, 0));
    assert_eq!(entries(&log)[2..], ["r1 done", "r2 done", "w writes"]);
    w.enter();
    finished(&w);
    assert_eq!(lock.holders_and_waiters(), (0, 0));
}

#[test]
fn a_new_reader_waits_behind_a_queued_writer_and_readers_enter_together() {
    let _ctx = context();
    let (lock, log) = (Arc::new(CoRwLock::new(0)), Log::default());
    let r1 = holder(&lock, &log, "r1", false);
    let w = holder(&lock, &log, "w", true);
    let late: Vec<_> = ["r2", "r3", "r4"].map(|n| holder(&lock, &log, n, false)).into();
    let w2 = holder(&lock, &log, "w2", true);
    assert_eq!(entries(&log), ["r1 reads"]);
    r1.enter();
    assert_eq!(entries(&log)[1..], ["r1 done", "w writes"]);
    w.enter();
    assert_eq!(entries(&log)[3..], ["w done", "r2 reads", "r3 reads", "r4 reads"]);
    assert_eq!(lock.holders_and_waiters(), (3, 1));
    late.iter().for_each(Coroutine::enter);
    assert_eq!(entries(&log).last().unwrap(), "w2 writes");
    w2.enter();
    assert_eq!(lock.holders_and_waiters(), (0, 0));
}

#[test]
fn an_upgrade_sleeps_behind_a_writer_that_queued_earlier() {
    let _ctx = context();
    let (lock, log) = (Arc::new(CoRwLock::new(0)), Log::default());
    let (lock1, log1) = (Arc::clone(&lock), Arc::clone(&log));
    let c1 = Coroutine::new(move || {
        let guard = lock1.co_read();
        let before = *guard;
        co_yield();
        let guard = guard.co_upgrade();
        // Another writer ran in between: that is what the doc says to expect.
        note(&log1, format!("upgraded, {before} became {}", *guard));
    });
    c1.enter();
    let w = holder(&lock, &log, "w", true);
    c1.enter();
    assert_eq!(entries(&log), ["w writes"]);
    w.enter();
    assert_eq!(entries(&log)[1..], ["w done", "upgraded, 0 became 1"]);
    finished(&c1);
    assert_eq!(lock.holders_and_waiters(), (0, 0));
}

#[test]
fn a_sole_reader_upgrades_at_once() {
    let lock = Arc::new(CoRwLock::new(0));
    let lock1 = Arc::clone(&lock);
    let co = Coroutine::new(move || {
        let mut guard = lock1.co_read().co_upgrade();
        *guard = 5;
        assert_eq!(lock1.holders_and_waiters(), (-1, 0));
        let guard = guard.downgrade();
        assert_eq!((*guard, lock1.holders_and_waiters()), (5, (1, 0)));
    });
    co.enter();
    finished(&co);
    assert_eq!(lock.holders_and_waiters(), (0, 0));
}

#[test]
fn two_upgrading_readers_do_not_wait_for_each_other() {
    let _ctx = context();
    let lock = Arc::new(CoRwLock::new(0));
    let all: Vec<_> = (0..2)
        .map(|_| {
            let lock = Arc::clone(&lock);
            let co = Coroutine::new(move || {
                let guard = lock.co_read();
                co_yield();
                *guard.co_upgrade() += 1;
            });
            co.enter();
            co
        })
        .collect();
    all.iter().for_each(Coroutine::enter);
    all.iter().for_each(finished);
    assert_eq!(Arc::into_inner(lock).unwrap().into_inner(), 2);
}

#[test]
fn a_downgrade_lets_the_readers_next_in_line_in_and_hangs_nobody() {
    let _ctx = context();
    let (lock, log) = (Arc::new(CoRwLock::new(0)), Log::default());
    let c1 = holder(&lock, &log, "c1", false);
    let (lock2, log2) = (Arc::clone(&lock), Arc::clone(&log));
    let c2 = Coroutine::new(move || {
        let guard = lock2.co_write();
        note(&log2, "c2 writes");
        co_yield();
        let guard = guard.downgrade();
        note(&log2, "c2 downgraded");
        co_yield();
        drop(guard);
        note(&log2, "c2 done");
    });
    c2.enter();
    let c3 = holder(&lock, &log, "c3", false);
    let c4 = holder(&lock, &log, "c4", true);
    c1.enter();
    c2.enter();
    assert_eq!(entries(&log), ["c1 reads", "c1 done", "c2 writes", "c2 downgraded", "c3 reads"]);
    assert_eq!(lock.holders_and_waiters(), (2, 1));
    c2.enter();
    c3.enter();
    c4.enter();
    assert_eq!(entries(&log)[5..], ["c2 done", "c3 done", "c4 writes", "c4 done"]);
    assert_eq!(lock.holders_and_waiters(), (0, 0));
}

#[test]
fn an_rwlock_outside_of_coroutines_panics_and_a_held_one_is_noticed_at_the_end() {
    let lock: &'static CoRwLock<()> = Box::leak(Box::new(CoRwLock::new(())));
    assert!(panic_of(|| drop(lock.co_read())).contains("outside of a coroutine"));
    assert!(panic_of(|| drop(lock.co_write())).contains("outside of a coroutine"));
    assert_eq!(lock.holders_and_waiters(), (0, 0));
    let co = Coroutine::new(|| std::mem::forget(lock.co_read()));
    assert!(panic_of(|| co.enter()).contains("ended holding 1 lock"));
}

#[test]
fn a_panic_through_a_write_guard_poisons_and_unlocks() {
    let lock = Arc::new(CoRwLock::new(0));
    let (lock1, lock2) = (Arc::clone(&lock), Arc::clone(&lock));
    Coroutine::new(move || {
        let _guard = lock1.co_read();
        panic!("a reader changes nothing");
    })
    .enter();
    assert!(!lock.is_poisoned());
    Coroutine::new(move || {
        let _guard = lock2.co_write();
        panic!("half way");
    })
    .enter();
    assert!(lock.is_poisoned());
    assert_eq!(lock.holders_and_waiters(), (0, 0));
}

#[test]
fn readers_and_writers_of_four_contexts_exclude_each_other_and_all_end() {
    const ROUNDS: u32 = 1_000;
    let all: Vec<_> = (0..4).map(|n| iothread(&format!("io{n}"))).collect();
    let lock = Arc::new(CoRwLock::new(0_u64));
    // Readers inside, or -1 for a writer.
    let inside = Arc::new(AtomicI32::new(0));
    let (tx, rx) = mpsc::channel();
    let mut writes = 0;
    for (n, io) in all.iter().enumerate() {
        for k in 0..2_u32 {
            let (lock, inside, tx) = (Arc::clone(&lock), Arc::clone(&inside), tx.clone());
            let kind = (n as u32 + 4 * k) % 4;
            writes += if kind == 0 { 0 } else { u64::from(ROUNDS) };
            Coroutine::new(move || {
                let begin_write = || assert_eq!(inside.swap(-1, Ordering::SeqCst), 0);
                let end_write = || assert_eq!(inside.swap(0, Ordering::SeqCst), -1);
                let begin_read = || assert!(inside.fetch_add(1, Ordering::SeqCst) >= 0);
                let end_read = || assert!(inside.fetch_sub(1, Ordering::SeqCst) >= 1);
                for _ in 0..ROUNDS {
                    match kind {
                        0 => {
                            let guard = lock.co_read();
                            begin_read();
                            std::hint::black_box(*guard);
                            end_read();
                        }
                        1 => {
                            let mut guard = lock.co_write();
                            begin_write();
                            *guard += 1;
                            end_write();
                        }
                        2 => {
                            let guard = lock.co_read();
                            begin_read();
                            std::hint::black_box(*guard);
                            end_read();
                            let mut guard = guard.co_upgrade();
                            begin_write();
                            *guard += 1;
                            end_write();
                        }
                        _ => {
                            let mut guard = lock.co_write();
                            begin_write();
                            *guard += 1;
                            end_write();
                            let guard = guard.downgrade();
                            begin_read();
                            std::hint::black_box(*guard);
                            end_read();
                        }
                    }
                }
                tx.send(()).unwrap();
            })
            .enter_on(io.context());
        }
    }
    for _ in 0..8 {
        rx.recv_timeout(HANG).expect("somebody starves");
    }
    run_on(&all[0], || ());
    all.into_iter().for_each(|io| io.stop().unwrap());
    assert_eq!(lock.holders_and_waiters(), (0, 0));
    assert_eq!(Arc::into_inner(lock).unwrap().into_inner(), writes);
}

#[test]
fn a_stream_of_readers_does_not_starve_a_writer() {
    let _ctx = context();
    let lock = Arc::new(CoRwLock::new(0));
    let (written, reads) = (Count::default(), Count::default());
    // There is always a reader inside: the next one enters before the last one leaves.
    let reader = |before: Option<Coroutine>| {
        let (lock, reads) = (Arc::clone(&lock), reads.clone());
        let co = Coroutine::new(move || {
            let _guard = lock.co_read();
            reads.bump();
            co_yield();
        });
        co.enter();
        if let Some(before) = before {
            before.enter();
        }
        co
    };
    let mut last = reader(None);
    last = reader(Some(last));
    let (lock1, done) = (Arc::clone(&lock), written.clone());
    let writer = Coroutine::new(move || {
        *lock1.co_write() += 1;
        done.bump();
    });
    writer.enter();
    let mut readers = 0;
    while written.get() == 0 && readers < 10 {
        last = reader(Some(last));
        readers += 1;
    }
    assert_eq!((written.get(), readers), (1, 1));
    last.enter();
    assert_eq!(lock.holders_and_waiters(), (0, 0));
}
