//! Sleeping and timeouts, on a mock clock.

use crate::co_coroutine::{Count, iothread, panic_of};
use conbd::aio::{AioConfig, AioContext, Clock};
use conbd::co::{CoSleep, Coroutine, Outcome, co_sleep_ns, co_timeout, co_yield};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

const HANG: Duration = Duration::from_secs(60);

/// A context whose time stands still.
struct Still {
    ctx: Arc<AioContext>,
    clock: Arc<AtomicU64>,
}

impl Still {
    fn new() -> Still {
        let clock = Arc::new(AtomicU64::new(1_000));
        let config = AioConfig { clock: Clock::Mock(Arc::clone(&clock)), ..AioConfig::default() };
        Still { ctx: AioContext::new(config).unwrap(), clock }
    }

    /// Moves time and runs what became due.
    fn advance(&self, ns: u64) {
        self.clock.fetch_add(ns, Ordering::SeqCst);
        for _ in 0..3 {
            self.ctx.poll(false);
        }
    }
}

fn finished(co: &Coroutine) {
    assert_eq!(co.outcome(), Some(Outcome::Finished));
}

#[test]
fn a_sleep_ends_when_its_time_has_come_and_not_before() {
    let still = Still::new();
    let co = Coroutine::new(|| co_sleep_ns(500));
    co.enter();
    still.advance(499);
    assert_eq!(co.outcome(), None);
    still.advance(1);
    finished(&co);
}

#[test]
fn sleepers_wake_in_the_order_of_their_deadlines() {
    let still = Still::new();
    let log: Arc<Mutex<Vec<u64>>> = Arc::default();
    for ns in [300, 100, 200] {
        let log = Arc::clone(&log);
        Coroutine::new(move || {
            co_sleep_ns(ns);
            log.lock().unwrap().push(ns);
        })
        .enter();
    }
    still.advance(1_000);
    assert_eq!(*log.lock().unwrap(), [100, 200, 300]);
}

#[test]
fn a_wake_ends_the_sleep_early_and_its_timer_does_nothing_later() {
    let still = Still::new();
    let sleep = CoSleep::new();
    let theirs = sleep.clone();
    let rounds = Count::default();
    let count = rounds.clone();
    let co = Coroutine::new(move || {
        theirs.co_sleep(Some(500));
        count.bump();
        theirs.co_sleep(None);
        count.bump();
    });
    assert!(!sleep.is_sleeping());
    sleep.wake();
    co.enter();
    assert!(sleep.is_sleeping());
    sleep.wake();
    assert_eq!(rounds.get(), 1);
    // The first sleep's timer must not wake the second one.
    still.advance(10_000);
    assert_eq!(rounds.get(), 1);
    assert!(sleep.is_sleeping());
    sleep.wake();
    finished(&co);
    sleep.wake();
    assert!(!sleep.is_sleeping());
}

#[test]
fn a_sleeper_can_only_be_woken_through_its_sleep() {
    let still = Still::new();
    let sleep = CoSleep::new();
    let theirs = sleep.clone();
    let co = Coroutine::new(move || theirs.co_sleep(None));
    co.enter();
    assert!(panic_of(|| co.enter()).contains("asleep in co_sleep"));
    assert!(panic_of(|| co.wake()).contains("asleep in co_sleep"));
    assert!(panic_of(|| co.schedule(&still.ctx)).contains("asleep in co_sleep"));
    sleep.wake();
    finished(&co);
}

#[test]
fn two_sleepers_on_one_sleep_are_misuse() {
    let _still = Still::new();
    let sleep = CoSleep::new();
    let (one, two) = (sleep.clone(), sleep.clone());
    let first = Coroutine::new(move || one.co_sleep(None));
    first.enter();
    let second = Coroutine::new(move || {
        assert!(panic_of(|| two.co_sleep(None)).contains("somebody sleeps on this"));
    });
    second.enter();
    finished(&second);
    sleep.wake();
    finished(&first);
}

#[test]
fn sleeping_outside_of_coroutines_or_without_a_context_panics() {
    assert!(panic_of(|| co_sleep_ns(1)).contains("needs a coroutine"));
    let co = Coroutine::new(|| assert!(panic_of(|| co_sleep_ns(1)).contains("needs an AioContext")));
    co.enter();
    finished(&co);
}

#[test]
fn a_wake_from_another_thread_reaches_a_sleeper_at_any_moment() {
    let io = iothread("io");
    for _ in 0..500 {
        let sleep = CoSleep::new();
        let theirs = sleep.clone();
        let (tx, rx) = mpsc::channel();
        Coroutine::new(move || {
            theirs.co_sleep(None);
            tx.send(()).unwrap();
        })
        .enter_on(io.context());
        while !sleep.is_sleeping() {
            std::hint::spin_loop();
        }
        sleep.wake();
        rx.recv_timeout(HANG).expect("the wake was lost");
    }
    io.stop().unwrap();
}

// ---- co_timeout ----------------------------------------------------------------------------------------------

#[test]
fn a_timeout_returns_the_result_of_what_ends_in_time() {
    let still = Still::new();
    let out: Arc<Mutex<Vec<u32>>> = Arc::default();
    let theirs = Arc::clone(&out);
    let co = Coroutine::new(move || {
        let at_once = co_timeout(1_000, || 1, |_| unreachable!()).unwrap();
        theirs.lock().unwrap().push(at_once);
        let later = co_timeout(
            1_000,
            || {
                co_sleep_ns(999);
                2
            },
            |_| unreachable!(),
        );
        theirs.lock().unwrap().push(later.unwrap());
    });
    co.enter();
    assert_eq!(*out.lock().unwrap(), [1]);
    still.advance(999);
    finished(&co);
    assert_eq!(*out.lock().unwrap(), [1, 2]);
}

#[test]
fn after_a_timeout_the_entry_goes_on_and_is_cleaned_up() {
    let still = Still::new();
    let gate = Arc::new(Mutex::new(None));
    let cleaned: Arc<Mutex<Option<&str>>> = Arc::default();
    let (theirs, out) = (Arc::clone(&gate), Arc::clone(&cleaned));
    let co = Coroutine::new(move || {
        let r = co_timeout(
            100,
            move || {
                *theirs.lock().unwrap() = Coroutine::current();
                co_yield();
                "result"
            },
            move |r| *out.lock().unwrap() = Some(r),
        );
        assert_eq!(r.unwrap_err().kind(), io::ErrorKind::TimedOut);
    });
    co.enter();
    still.advance(99);
    assert_eq!(co.outcome(), None);
    still.advance(1);
    finished(&co);
    assert_eq!(*cleaned.lock().unwrap(), None);
    let held = gate.lock().unwrap().take().unwrap();
    held.wake();
    assert_eq!(*cleaned.lock().unwrap(), Some("result"));
}

#[test]
fn a_panic_under_a_timeout_is_an_error() {
    let still = Still::new();
    let co = Coroutine::new(|| {
        let r = co_timeout(
            1_000,
            || -> u32 {
                co_sleep_ns(10);
                panic!("on purpose")
            },
            |_| unreachable!(),
        );
        let e = r.unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::Other);
        assert!(e.to_string().contains("on purpose"));
    });
    co.enter();
    still.advance(10);
    finished(&co);
}
