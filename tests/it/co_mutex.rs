//! CoMutex: the invariants I1 to I10 of its protocol, misuse, poisoning, and stress over several contexts.

use crate::co_coroutine::{Count, context, iothread, panic_of, run_on};
use conbd::aio::{AioContext, IoThread};
use conbd::co::{CoMutex, CoMutexStats, Coroutine, Outcome, co_yield};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

/// Only ends a test that would hang; nothing is measured.
const HANG: Duration = Duration::from_secs(60);

fn log() -> Arc<Mutex<Vec<String>>> {
    Arc::default()
}

fn finished(co: &Coroutine) {
    assert_eq!(co.outcome(), Some(Outcome::Finished));
}

/// Runs the same body in `per_context` coroutines on each context; returns when all have ended.
fn run_everywhere(contexts: &[IoThread], per_context: usize, body: impl Fn(usize) + Send + Sync + 'static) {
    let body = Arc::new(body);
    let (tx, rx) = mpsc::channel();
    for (n, io) in contexts.iter().enumerate() {
        for _ in 0..per_context {
            let (body, tx) = (Arc::clone(&body), tx.clone());
            Coroutine::builder()
                .on_exit(move |outcome| {
                    let _ = tx.send(outcome.clone());
                })
                .build(move || body(n))
                .enter_on(io.context());
        }
    }
    for _ in 0..contexts.len() * per_context {
        let outcome = rx.recv_timeout(HANG).expect("a coroutine was never woken");
        assert_eq!(outcome, Outcome::Finished);
    }
}

fn contexts(n: usize) -> Vec<IoThread> {
    (0..n).map(|i| iothread(&format!("io{i}"))).collect()
}

fn stop(contexts: Vec<IoThread>) {
    contexts.into_iter().for_each(|io| io.stop().unwrap());
}

#[test]
fn unlock_does_not_run_the_waiter_before_the_unlocker_yields() {
    let _ctx = context();
    let m = Arc::new(CoMutex::new(0));
    let log = log();
    let (m1, log1) = (Arc::clone(&m), Arc::clone(&log));
    let c1 = Coroutine::new(move || {
        let guard = m1.co_lock();
        log1.lock().unwrap().push("c1 has it".into());
        co_yield();
        drop(guard);
        log1.lock().unwrap().push("c1 unlocked".into());
    });
    let (m2, log2) = (Arc::clone(&m), Arc::clone(&log));
    let c2 = Coroutine::new(move || {
        let mut guard = m2.co_lock();
        *guard += 1;
        log2.lock().unwrap().push("c2 has it".into());
    });
    c1.enter();
    c2.enter();
    assert!(c1.outcome().is_none() && c2.outcome().is_none());
    assert_eq!(*log.lock().unwrap(), ["c1 has it"]);
    c1.enter();
    assert_eq!(*log.lock().unwrap(), ["c1 has it", "c1 unlocked", "c2 has it"]);
    finished(&c1);
    finished(&c2);
    assert!(m.is_pristine());
}

#[test]
fn i1_i2_i3_mutual_exclusion_and_no_lost_wakeup_on_5_contexts() {
    const ROUNDS: u64 = 2_000;
    const EACH: usize = 3;
    let all = contexts(5);
    let m = Arc::new(CoMutex::new(0_u64));
    let atomic = Arc::new(AtomicU64::new(0));
    let inside = Arc::new(AtomicUsize::new(0));
    let (m2, a2) = (Arc::clone(&m), Arc::clone(&atomic));
    run_everywhere(&all, EACH, move |_| {
        for _ in 0..ROUNDS {
            let mut guard = m2.co_lock();
            assert_eq!(inside.fetch_add(1, Ordering::Relaxed), 0);
            // Not atomic: two owners at once would lose counts.
            let old = *guard;
            std::hint::spin_loop();
            *guard = old + 1;
            assert_eq!(inside.fetch_sub(1, Ordering::Relaxed), 1);
            drop(guard);
            a2.fetch_add(1, Ordering::Relaxed);
        }
    });
    stop(all);
    assert!(m.is_pristine(), "free, both queues empty, no offer left");
    let total = Arc::into_inner(m).unwrap().into_inner();
    assert_eq!(total, ROUNDS * 5 * EACH as u64);
    assert_eq!(total, atomic.load(Ordering::Relaxed));
}

#[test]
fn i1_i2_i3_hand_over_between_two_contexts() {
    const ROUNDS: u64 = 20_000;
    let all = contexts(2);
    let m = Arc::new(CoMutex::new(0_u64));
    let m2 = Arc::clone(&m);
    run_everywhere(&all, 1, move |_| {
        for _ in 0..ROUNDS {
            *m2.co_lock() += 1;
        }
    });
    stop(all);
    assert!(m.is_pristine());
    assert_eq!(Arc::into_inner(m).unwrap().into_inner(), ROUNDS * 2);
}

#[test]
fn i2_it_is_pristine_also_after_the_owner_yielded_with_others_waiting() {
    let all = contexts(3);
    let m = Arc::new(CoMutex::new(0_u64));
    let m2 = Arc::clone(&m);
    run_everywhere(&all, 4, move |_| {
        for _ in 0..50 {
            let mut guard = m2.co_lock();
            *guard += 1;
            // The owner suspends inside the section: the lock is held by nobody who runs.
            let me = Coroutine::current().unwrap();
            me.context().unwrap().bh_schedule_oneshot(move || me.wake());
            co_yield();
            *guard += 1;
        }
    });
    stop(all);
    assert!(m.is_pristine());
    assert_eq!(Arc::into_inner(m).unwrap().into_inner(), 3 * 4 * 50 * 2);
}

#[test]
fn i3_a_wake_that_comes_before_the_yield_is_used_up_by_that_wait() {
    let (a, b) = (iothread("a"), iothread("b"));
    let m = Arc::new(CoMutex::new(()));
    let (locked_tx, locked_rx) = mpsc::channel();
    let (queued_tx, queued_rx) = mpsc::channel::<()>();
    let (unlocked_tx, unlocked_rx) = mpsc::channel::<()>();
    let m1 = Arc::clone(&m);
    Coroutine::new(move || {
        let guard = m1.co_lock();
        locked_tx.send(()).unwrap();
        queued_rx.recv_timeout(HANG).unwrap();
        drop(guard);
        unlocked_tx.send(()).unwrap();
    })
    .enter_on(a.context());
    locked_rx.recv_timeout(HANG).unwrap();
    let resumed = Count::default();
    let (count, m2) = (resumed.clone(), Arc::clone(&m));
    let waiter = run_on(&b, move || {
        let co = Coroutine::new(move || {
            // Owner, and woken, before it yields.
            let queued = || {
                queued_tx.send(()).unwrap();
                unlocked_rx.recv_timeout(HANG).unwrap();
            };
            drop(m2.co_lock_with_gaps(|| (), queued));
            count.bump();
            co_yield();
            count.bump();
        });
        co.enter();
        co
    });
    // Later turns: nothing is left over that would resume it from its own yield.
    (0..5).for_each(|_| run_on(&b, || ()));
    assert_eq!(resumed.get(), 1);
    waiter.wake();
    run_on(&b, || ());
    assert_eq!(resumed.get(), 2);
    assert!(m.is_pristine());
    a.stop().unwrap();
    b.stop().unwrap();
}

#[test]
fn i4_a_woken_waiter_resumes_on_its_own_context() {
    let all = contexts(3);
    let m = Arc::new(CoMutex::new(()));
    let ids: Vec<usize> = all.iter().map(|io| io.context().id()).collect();
    run_everywhere(&all, 2, move |n| {
        for _ in 0..500 {
            let guard = m.co_lock();
            assert_eq!(AioContext::current().unwrap().id(), ids[n]);
            drop(guard);
            assert_eq!(AioContext::current().unwrap().id(), ids[n]);
        }
    });
    stop(all);
}

#[test]
#[expect(unsafe_code, reason = "unlocking without a guard is what is tested")]
fn i5_unlocking_what_another_holds_or_outside_of_coroutines_panics() {
    let m = Arc::new(CoMutex::new(()));
    let m1 = Arc::clone(&m);
    let holder = Coroutine::builder().name("holder").build(move || {
        let guard = m1.co_lock();
        co_yield();
        std::mem::forget(guard);
        // SAFETY: the guard was just forgotten.
        unsafe { m1.force_unlock() };
    });
    holder.enter();
    let m2 = Arc::clone(&m);
    let thief = Coroutine::builder().name("thief").build(move || {
        // SAFETY: there is no guard in this coroutine.
        let text = panic_of(|| unsafe { m2.force_unlock() });
        assert!(text.contains("\"thief\"") && text.contains("does not hold"), "{text}");
    });
    thief.enter();
    finished(&thief);
    // SAFETY: there is no guard here.
    assert!(panic_of(|| unsafe { m.force_unlock() }).contains("outside of a coroutine"));
    assert!(panic_of(|| drop(m.co_lock())).contains("outside of a coroutine"));
    assert!(panic_of(|| drop(m.try_lock())).contains("outside of a coroutine"));
    holder.enter();
    finished(&holder);
    assert!(m.is_pristine());
}

#[test]
fn i6_ending_with_a_lock_held_panics_in_the_enterer() {
    let m: &'static CoMutex<()> = Box::leak(Box::new(CoMutex::new(())));
    let co = Coroutine::builder().name("careless").build(|| std::mem::forget(m.co_lock()));
    let text = panic_of(|| co.enter());
    assert!(text.contains("\"careless\"") && text.contains("ended holding 1 lock"), "{text}");
}

#[test]
fn i7_coroutines_of_one_context_never_spin() {
    let ctx = context();
    let m = Arc::new(CoMutex::new(0));
    let done = Count::default();
    for _ in 0..10 {
        let (m, done) = (Arc::clone(&m), done.clone());
        Coroutine::new(move || {
            for _ in 0..20 {
                let mut guard = m.co_lock();
                *guard += 1;
                let me = Coroutine::current().unwrap();
                me.context().unwrap().bh_schedule_oneshot(move || me.wake());
                co_yield();
            }
            done.bump();
        })
        .enter();
    }
    while done.get() < 10 {
        ctx.poll(true);
    }
    let CoMutexStats { spins, queued, .. } = m.stats();
    assert_eq!(spins, 0);
    assert!(queued > 0);
    assert!(m.is_pristine());
}

#[test]
fn i7_spinning_is_bounded_and_counted_when_the_owner_is_elsewhere() {
    let (a, b) = (iothread("a"), iothread("b"));
    let m = Arc::new(CoMutex::new(()));
    let m1 = Arc::clone(&m);
    let owner = run_on(&a, move || {
        let m = m1;
        let co = Coroutine::new(move || {
            let _guard = m.co_lock();
            co_yield();
        });
        co.enter();
        co
    });
    // The owner sleeps on `a`; a locker on `b` cannot know that, spins, gives up and queues.
    let m2 = Arc::clone(&m);
    let (tx, rx) = mpsc::channel();
    Coroutine::new(move || {
        drop(m2.co_lock());
        tx.send(()).unwrap();
    })
    .enter_on(b.context());
    while m.stats().queued == 0 {
        std::thread::yield_now();
    }
    owner.wake();
    rx.recv_timeout(HANG).unwrap();
    assert_eq!(m.stats(), CoMutexStats { spins: 1000, queued: 1, handoffs: 0 });
    a.stop().unwrap();
    b.stop().unwrap();
}

#[test]
fn i8_unlock_returns_without_spinning_while_a_locker_is_between_counting_and_queueing() {
    let (a, b) = (iothread("a"), iothread("b"));
    let m = Arc::new(CoMutex::new(0));
    let (locked_tx, locked_rx) = mpsc::channel();
    let (in_gap_tx, in_gap_rx) = mpsc::channel::<()>();
    let (unlocked_tx, unlocked_rx) = mpsc::channel::<()>();

    let m1 = Arc::clone(&m);
    Coroutine::new(move || {
        let guard = m1.co_lock();
        locked_tx.send(()).unwrap();
        // Blocks the thread: the locker on `b` is stuck in the gap all the while.
        in_gap_rx.recv_timeout(HANG).unwrap();
        drop(guard);
        unlocked_tx.send(()).unwrap();
    })
    .enter_on(a.context());
    locked_rx.recv_timeout(HANG).unwrap();

    let m2 = Arc::clone(&m);
    let got_it = run_on(&b, move || {
        let mut unlocked_first = false;
        let mut guard = m2.co_lock_with_gaps(
            || {
                in_gap_tx.send(()).unwrap();
                // An unlocker that waits for our push would never come here.
                unlocked_first = unlocked_rx.recv_timeout(HANG).is_ok();
            },
            || (),
        );
        *guard += 1;
        unlocked_first
    });
    assert!(got_it);
    let stats = m.stats();
    assert_eq!((stats.queued, stats.handoffs), (1, 1));
    assert!(m.is_pristine());
    a.stop().unwrap();
    b.stop().unwrap();
}

#[test]
fn i8_whoever_queues_first_after_an_offer_takes_the_duty_over() {
    let (a, b, c) = (iothread("a"), iothread("b"), iothread("c"));
    let m = Arc::new(CoMutex::new(Vec::new()));
    let (locked_tx, locked_rx) = mpsc::channel();
    let (go_tx, go_rx) = mpsc::channel::<()>();
    let (unlocked_tx, unlocked_rx) = mpsc::channel::<()>();
    let (done_tx, done_rx) = mpsc::channel::<()>();

    let (m1, done) = (Arc::clone(&m), done_tx.clone());
    Coroutine::new(move || {
        let guard = m1.co_lock();
        locked_tx.send(()).unwrap();
        go_rx.recv_timeout(HANG).unwrap();
        drop(guard);
        unlocked_tx.send(()).unwrap();
        done.send(()).unwrap();
    })
    .enter_on(a.context());
    locked_rx.recv_timeout(HANG).unwrap();

    // Both are counted before the unlock. `b` stays in the gap until the unlock has left an offer; `c` pushes in between.
    let (in_gap_tx, in_gap_rx) = mpsc::channel::<()>();
    let (m2, m3, done2, done3) = (Arc::clone(&m), Arc::clone(&m), done_tx.clone(), done_tx);
    let (c_done_tx, c_done_rx) = mpsc::channel::<()>();
    let ctx_c = Arc::clone(c.context());
    Coroutine::new(move || {
        let counted = || {
            in_gap_tx.send(()).unwrap();
            unlocked_rx.recv_timeout(HANG).unwrap();
            Coroutine::new(move || {
                m3.co_lock().push('c');
                c_done_tx.send(()).unwrap();
                done3.send(()).unwrap();
            })
            .enter_on(&ctx_c);
            // It pushes, finds the offer, and it is its own turn: it needs nobody.
            c_done_rx.recv_timeout(HANG).unwrap();
        };
        let mut guard = m2.co_lock_with_gaps(counted, || ());
        guard.push('b');
        drop(guard);
        done2.send(()).unwrap();
    })
    .enter_on(b.context());
    in_gap_rx.recv_timeout(HANG).unwrap();
    go_tx.send(()).unwrap();
    for _ in 0..3 {
        done_rx.recv_timeout(HANG).unwrap();
    }
    for io in [a, b, c] {
        io.stop().unwrap();
    }
    assert!(m.is_pristine());
    assert_eq!(Arc::into_inner(m).unwrap().into_inner(), ['c', 'b']);
}

#[test]
fn i9_waiters_get_the_lock_in_the_order_of_queueing() {
    let all = contexts(3);
    let m = Arc::new(CoMutex::new(Vec::new()));
    let m1 = Arc::clone(&m);
    let owner = run_on(&all[0], move || {
        let co = Coroutine::new(move || {
            let _guard = m1.co_lock();
            co_yield();
        });
        co.enter();
        co
    });
    let (tx, rx) = mpsc::channel();
    for n in 0..12_usize {
        let (m2, tx) = (Arc::clone(&m), tx.clone());
        Coroutine::new(move || {
            m2.co_lock().push(n);
            tx.send(()).unwrap();
        })
        .enter_on(all[n % 3].context());
        while m.stats().queued <= n as u64 {
            std::thread::yield_now();
        }
        // Counted as queued just before the push: let the locker's thread finish its turn.
        run_on(&all[n % 3], || ());
    }
    owner.wake();
    for _ in 0..12 {
        rx.recv_timeout(HANG).unwrap();
    }
    stop(all);
    assert_eq!(Arc::into_inner(m).unwrap().into_inner(), (0..12).collect::<Vec<_>>());
}

#[test]
fn i9_newcomers_do_not_barge_in_while_somebody_waits() {
    let _ctx = context();
    let m = Arc::new(CoMutex::new(()));
    let m1 = Arc::clone(&m);
    let waiter_done = Count::default();
    let owner = Coroutine::new(move || {
        let guard = m1.co_lock();
        co_yield();
        drop(guard);
        // Handed over already, although the waiter has not run yet.
        assert!(m1.try_lock().is_none());
    });
    owner.enter();
    let (m2, done) = (Arc::clone(&m), waiter_done.clone());
    Coroutine::new(move || {
        drop(m2.co_lock());
        done.bump();
    })
    .enter();
    owner.enter();
    finished(&owner);
    assert_eq!(waiter_done.get(), 1);
}

#[test]
fn i10_assert_locked_holds_for_the_holder_only() {
    let m = Arc::new(CoMutex::new(()));
    let m1 = Arc::clone(&m);
    let holder = Coroutine::new(move || {
        assert!(!m1.is_locked_by_me());
        let guard = m1.co_lock();
        m1.assert_locked();
        co_yield();
        m1.assert_locked();
        drop(guard);
        assert!(!m1.is_locked_by_me());
    });
    holder.enter();
    assert!(!m.is_locked_by_me());
    assert!(panic_of(|| m.assert_locked()).contains("not held by the current coroutine"));
    let m2 = Arc::clone(&m);
    std::thread::spawn(move || assert!(!m2.is_locked_by_me())).join().unwrap();
    let m3 = Arc::clone(&m);
    let other = Coroutine::new(move || {
        assert!(!m3.is_locked_by_me());
        assert!(panic_of(|| m3.assert_locked()).contains("not held"));
    });
    other.enter();
    finished(&other);
    holder.enter();
    finished(&holder);
}

#[test]
fn locking_twice_panics_instead_of_waiting_for_oneself() {
    let m = Arc::new(CoMutex::new(()));
    let m1 = Arc::clone(&m);
    let co = Coroutine::builder().name("again").build(move || {
        let guard = m1.co_lock();
        let text = panic_of(|| drop(m1.co_lock()));
        assert!(text.contains("\"again\"") && text.contains("locks a CoMutex that it holds"), "{text}");
        drop(guard);
    });
    co.enter();
    finished(&co);
    assert!(m.is_pristine());
}

#[test]
fn try_lock_never_waits() {
    let m = Arc::new(CoMutex::new(1));
    let m1 = Arc::clone(&m);
    let co = Coroutine::new(move || {
        let guard = m1.try_lock().unwrap();
        let m2 = Arc::clone(&m1);
        let other = Coroutine::new(move || assert!(m2.try_lock().is_none()));
        other.enter();
        finished(&other);
        drop(guard);
        assert_eq!(*m1.try_lock().unwrap(), 1);
    });
    co.enter();
    finished(&co);
}

#[test]
fn a_stray_wake_does_not_let_a_waiter_in() {
    let _ctx = context();
    let m = Arc::new(CoMutex::new(()));
    let m1 = Arc::clone(&m);
    let holder = Coroutine::new(move || {
        let _guard = m1.co_lock();
        co_yield();
    });
    holder.enter();
    let got_it = Arc::new(AtomicBool::new(false));
    let (m2, got) = (Arc::clone(&m), Arc::clone(&got_it));
    let waiter = Coroutine::new(move || {
        let _guard = m2.co_lock();
        got.store(true, Ordering::SeqCst);
    });
    waiter.enter();
    for _ in 0..3 {
        waiter.wake();
        assert!(!got_it.load(Ordering::SeqCst));
    }
    holder.enter();
    assert!(got_it.load(Ordering::SeqCst));
    assert!(m.is_pristine());
}

#[test]
fn a_panic_through_a_guard_poisons_and_unlocks() {
    let _ctx = context();
    let m = Arc::new(CoMutex::new(0));
    let (m1, m2) = (Arc::clone(&m), Arc::clone(&m));
    let bad = Coroutine::new(move || {
        let mut guard = m1.co_lock();
        *guard = 1;
        co_yield();
        panic!("half way");
    });
    bad.enter();
    let next = Coroutine::new(move || {
        let guard = m2.co_lock();
        assert!(m2.is_poisoned());
        assert_eq!(*guard, 1);
        m2.clear_poison();
    });
    next.enter();
    assert!(!m.is_poisoned());
    bad.enter();
    assert!(matches!(bad.outcome(), Some(Outcome::Panicked(_))));
    finished(&next);
    assert!(!m.is_poisoned());
    assert!(m.is_pristine());
}

#[test]
fn a_panic_elsewhere_does_not_poison() {
    let m = Arc::new(CoMutex::new(0));
    let m1 = Arc::clone(&m);
    let co = Coroutine::new(move || {
        let _ = std::panic::catch_unwind(|| panic!("elsewhere"));
        *m1.co_lock() = 1;
        struct LocksInDrop(Arc<CoMutex<i32>>);
        impl Drop for LocksInDrop {
            fn drop(&mut self) {
                *self.0.co_lock() += 1;
            }
        }
        let _late = LocksInDrop(Arc::clone(&m1));
        panic!("outside of any section");
    });
    co.enter();
    assert!(!m.is_poisoned());
    assert_eq!(Arc::into_inner(m).map(CoMutex::into_inner), Some(2));
}

// ---- scheduling stress ---------------------------------------------------------------------------------------

#[test]
fn coroutines_schedule_each_other_at_random_across_5_contexts() {
    const N: usize = 5;
    const ROUNDS: usize = 4_000;
    let all = contexts(N);
    let parked: Arc<Vec<Mutex<Option<Coroutine>>>> = Arc::new((0..N).map(|_| Mutex::new(None)).collect());
    let alive = Arc::new(AtomicUsize::new(N));
    let (here, other, retry) = (Count::default(), Count::default(), Count::default());
    let wakes = Count::default();
    {
        let (parked, alive) = (Arc::clone(&parked), Arc::clone(&alive));
        let (here, other, retry, wakes) = (here.clone(), other.clone(), retry.clone(), wakes.clone());
        run_everywhere(&all, 1, move |id| {
            let mut seed = 0x9e37_79b9_u32.wrapping_mul(id as u32 + 1);
            let mut wake_one = |start_here: bool| {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let first = if start_here { id } else { (seed >> 16) as usize % N };
                for k in 0..N {
                    let n = (first + k) % N;
                    let found = parked[n].lock().unwrap().take();
                    let Some(co) = found else {
                        retry.bump();
                        continue;
                    };
                    if n == id {
                        here.bump()
                    } else {
                        other.bump()
                    }
                    let home = co.context().unwrap();
                    co.schedule(&home);
                    return true;
                }
                false
            };
            for _ in 0..ROUNDS {
                // Nobody else is parked: whoever parked now might be the last one awake.
                if !wake_one(false) {
                    continue;
                }
                *parked[id].lock().unwrap() = Coroutine::current();
                // The one that we woke may have ended before we parked: if all others have, nobody would wake us.
                if alive.load(Ordering::SeqCst) == 1 && parked[id].lock().unwrap().take().is_some() {
                    continue;
                }
                co_yield();
                wakes.bump();
                assert!(parked[id].lock().unwrap().is_none());
            }
            alive.fetch_sub(1, Ordering::SeqCst);
            // Whoever is parked must not be left behind; whoever parks later sees that we are gone.
            while wake_one(true) {}
        });
    }
    stop(all);
    assert!(parked.iter().all(|p| p.lock().unwrap().is_none()));
    assert_eq!(wakes.get(), here.get() + other.get());
}
