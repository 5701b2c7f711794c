//! Coroutines: create, enter, yield, wake; misuse; panics; stacks.
//!
//! The behaviours of QEMU's coroutine tests, in our own words, and what is ours: containment, spans, leaks.

use conbd::aio::{AioConfig, AioContext, IoThread, OnPanic};
use conbd::co::{Coroutine, Outcome, co_reschedule_self, co_yield};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};

pub(crate) fn context() -> Arc<AioContext> {
    AioContext::new(AioConfig { name: String::from("test"), ..AioConfig::default() }).unwrap()
}

pub(crate) fn iothread(name: &str) -> IoThread {
    IoThread::spawn(AioConfig { name: String::from(name), ..AioConfig::default() }).unwrap()
}

/// A counter that coroutines share with the test.
#[derive(Clone, Default)]
pub(crate) struct Count(Arc<AtomicUsize>);

impl Count {
    pub(crate) fn up(&self) -> usize {
        self.0.fetch_add(1, Ordering::SeqCst) + 1
    }
    pub(crate) fn bump(&self) {
        self.up();
    }
    pub(crate) fn get(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

/// The text of the panic of `f`.
pub(crate) fn panic_of(f: impl FnOnce()) -> String {
    let payload = catch_unwind(AssertUnwindSafe(f)).expect_err("expected a panic");
    match payload.downcast_ref::<String>() {
        Some(s) => s.clone(),
        None => String::from(*payload.downcast_ref::<&str>().expect("a panic with a text")),
    }
}

/// Runs `f` in a coroutine of `ctx`'s thread to its end, from another thread.
pub(crate) fn run_on<T: Send + 'static>(io: &IoThread, f: impl FnOnce() -> T + Send + 'static) -> T {
    let (tx, rx) = mpsc::channel();
    Coroutine::new(move || {
        let _ = tx.send(f());
    })
    .enter_on(io.context());
    rx.recv().expect("the coroutine sends its result")
}

// ---- basics --------------------------------------------------------------------------------------------------

#[test]
fn a_panic_comes_through_run_to_end() {
    assert_eq!(conbd::co::run_to_end(|| 7).unwrap(), 7);
    let fallen = std::panic::catch_unwind(|| conbd::co::run_to_end(|| panic!("on purpose")));
    assert!(fallen.is_err(), "and does not wait for ever");
}

#[test]
fn in_coroutine_is_true_inside_only() {
    assert!(!Coroutine::in_coroutine());
    let inside = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&inside);
    Coroutine::new(move || seen.store(Coroutine::in_coroutine(), Ordering::SeqCst)).enter();
    assert!(inside.load(Ordering::SeqCst));
    assert!(!Coroutine::in_coroutine());
}

#[test]
fn current_is_the_handle_that_was_created() {
    assert!(Coroutine::current().is_none());
    let seen = Arc::new(Mutex::new(None));
    let out = Arc::clone(&seen);
    let co = Coroutine::new(move || *out.lock().unwrap() = Coroutine::current());
    co.enter();
    assert_eq!(seen.lock().unwrap().take(), Some(co));
}

#[test]
fn entered_covers_the_running_one_and_its_enterers_until_they_yield() {
    let outer_slot: Arc<Mutex<Option<Coroutine>>> = Arc::default();
    let slot = Arc::clone(&outer_slot);
    let outer = Coroutine::new(move || {
        let me = Coroutine::current().unwrap();
        assert!(me.entered());
        let caller = me.clone();
        let inner = Coroutine::new(move || {
            assert!(Coroutine::current().unwrap().entered());
            assert!(caller.entered());
            co_yield();
            assert!(caller.entered());
        });
        assert!(!inner.entered());
        inner.enter();
        assert!(!inner.entered());
        assert!(me.entered());
        inner.enter();
        assert!(!inner.entered());
        assert_eq!(inner.outcome(), Some(Outcome::Finished));
        *slot.lock().unwrap() = Some(me);
        co_yield();
    });
    assert!(!outer.entered());
    outer.enter();
    assert!(!outer.entered());
    assert_eq!(outer_slot.lock().unwrap().take().as_ref(), Some(&outer));
    outer.enter();
    assert_eq!(outer.outcome(), Some(Outcome::Finished));
}

#[test]
fn coroutines_nest_128_deep() {
    fn level(n: usize, entered: Count, returned: Count) {
        entered.bump();
        if n > 1 {
            let (e, r) = (entered.clone(), returned.clone());
            let next = Coroutine::new(move || level(n - 1, e, r));
            next.enter();
            assert_eq!(next.outcome(), Some(Outcome::Finished));
        }
        returned.bump();
    }
    let (entered, returned) = (Count::default(), Count::default());
    let (e, r) = (entered.clone(), returned.clone());
    let co = Coroutine::new(move || level(128, e, r));
    co.enter();
    assert_eq!(co.outcome(), Some(Outcome::Finished));
    assert_eq!((entered.get(), returned.get()), (128, 128));
}

#[test]
fn five_yields_need_six_enters() {
    let co = Coroutine::new(|| (0..5).for_each(|_| co_yield()));
    let mut enters = 0;
    while co.outcome().is_none() {
        co.enter();
        enters += 1;
    }
    assert_eq!(enters, 6);
}

#[test]
fn control_passes_in_order() {
    let log: Arc<Mutex<Vec<&str>>> = Arc::default();
    let inside = Arc::clone(&log);
    let co = Coroutine::new(move || {
        inside.lock().unwrap().push("co1");
        co_yield();
        inside.lock().unwrap().push("co2");
    });
    log.lock().unwrap().push("main1");
    co.enter();
    log.lock().unwrap().push("main2");
    co.enter();
    log.lock().unwrap().push("main3");
    assert_eq!(*log.lock().unwrap(), ["main1", "co1", "main2", "co2", "main3"]);
}

#[test]
fn a_reused_stack_carries_no_state_over() {
    for round in 0..2 {
        let seen = Count::default();
        let count = seen.clone();
        let co = Coroutine::new(move || {
            let local = std::hint::black_box(round);
            co_yield();
            assert_eq!(std::hint::black_box(local), round);
            count.bump();
        });
        co.enter();
        assert_eq!(co.outcome(), None);
        assert_eq!(seen.get(), 0);
        co.enter();
        assert_eq!(co.outcome(), Some(Outcome::Finished));
        assert_eq!(seen.get(), 1);
    }
}

#[test]
fn an_enterer_that_is_gone_is_not_touched() {
    let inner_done = Count::default();
    let done = inner_done.clone();
    let inner = Coroutine::new(move || {
        co_yield();
        done.bump();
    });
    let entered = inner.clone();
    let outer = Coroutine::new(move || entered.enter());
    outer.enter();
    assert_eq!(outer.outcome(), Some(Outcome::Finished));
    drop(outer);
    // The enterer's stack now runs something else, which fills it.
    let other = Coroutine::new(|| {
        std::hint::black_box([0xa5_u8; 8192]);
        co_yield();
    });
    other.enter();
    inner.enter();
    assert_eq!(inner_done.get(), 1);
    other.enter();
}

#[test]
fn enter_if_inactive_enters_only_what_is_not_entered() {
    let runs = Count::default();
    let count = runs.clone();
    let co = Coroutine::new(move || {
        count.bump();
        Coroutine::current().unwrap().enter_if_inactive();
        co_yield();
        count.bump();
    });
    co.enter_if_inactive();
    assert_eq!(runs.get(), 1);
    co.enter_if_inactive();
    assert_eq!(runs.get(), 2);
    assert_eq!(co.outcome(), Some(Outcome::Finished));
}

#[test]
fn the_context_is_the_one_of_the_last_enter() {
    let ctx = context();
    let co = Coroutine::new(co_yield);
    assert!(co.context().is_none());
    co.enter_in(&ctx);
    assert!(Arc::ptr_eq(&co.context().unwrap(), &ctx));
    co.enter();
    assert!(Arc::ptr_eq(&co.context().unwrap(), &ctx));
}

// ---- wakes ---------------------------------------------------------------------------------------------------

#[test]
fn wakes_by_a_coroutine_run_when_it_yields_in_order_and_depth_first() {
    let _ctx = context();
    let log: Arc<Mutex<Vec<&str>>> = Arc::default();
    let sleeper = |name: &'static str, then: Option<Coroutine>| {
        let log = Arc::clone(&log);
        let co = Coroutine::new(move || {
            co_yield();
            log.lock().unwrap().push(name);
            if let Some(next) = then {
                next.wake();
            }
        });
        co.enter();
        co
    };
    let nested = sleeper("nested", None);
    let first = sleeper("first", Some(nested));
    let second = sleeper("second", None);
    let log2 = Arc::clone(&log);
    let waker = Coroutine::new(move || {
        first.wake();
        second.wake();
        log2.lock().unwrap().push("waker goes on");
        co_yield();
        log2.lock().unwrap().push("waker again");
    });
    waker.enter();
    // `nested` was queued last and runs before the older `second`.
    assert_eq!(*log.lock().unwrap(), ["waker goes on", "first", "nested", "second"]);
    waker.enter();
    assert_eq!(log.lock().unwrap().last(), Some(&"waker again"));
}

#[test]
fn two_coroutines_wake_each_other_25000_times_without_stack_growth() {
    const ROUNDS: usize = 25_000;
    let _ctx = context();
    let peers: Arc<Mutex<Vec<Coroutine>>> = Arc::default();
    let counts = [Count::default(), Count::default()];
    let spread: Arc<Mutex<(usize, usize)>> = Arc::new(Mutex::new((usize::MAX, 0)));
    for (me, count) in counts.iter().cloned().enumerate() {
        let (shared, spread) = (Arc::clone(&peers), Arc::clone(&spread));
        let co = Coroutine::new(move || {
            co_yield();
            let peer = shared.lock().unwrap()[1 - me].clone();
            for _ in 0..ROUNDS {
                count.bump();
                if me == 0 {
                    // How deep the thread's own stack is cannot be seen from here; how deep the wakes nest can:
                    // each level of nesting would be another enterer below.
                    let here = 0_u8;
                    let at = std::ptr::from_ref(&here) as usize;
                    let mut s = spread.lock().unwrap();
                    *s = (s.0.min(at), s.1.max(at));
                }
                if peer.outcome().is_none() {
                    peer.wake();
                }
                co_yield();
            }
        });
        co.enter();
        peers.lock().unwrap().push(co);
    }
    let first = peers.lock().unwrap()[0].clone();
    first.enter();
    let last = peers.lock().unwrap().clone();
    // Whoever is left waits for a wake that the other, having ended, will not give.
    for co in &last {
        while co.outcome().is_none() {
            co.enter();
        }
    }
    assert_eq!((counts[0].get(), counts[1].get()), (ROUNDS, ROUNDS));
    let (low, high) = *spread.lock().unwrap();
    assert_eq!(low, high);
    peers.lock().unwrap().clear();
}

#[test]
fn a_wake_from_a_plain_thread_runs_the_coroutine_at_home_in_a_later_turn() {
    let ctx = context();
    let home = std::thread::current().id();
    let runs = Count::default();
    let count = runs.clone();
    let co = Coroutine::new(move || {
        co_yield();
        assert_eq!(std::thread::current().id(), home);
        count.bump();
    });
    co.enter();
    let waker = co.clone();
    std::thread::spawn(move || waker.wake()).join().unwrap();
    assert_eq!(runs.get(), 0);
    while runs.get() == 0 {
        ctx.poll(true);
    }
    assert_eq!(co.outcome(), Some(Outcome::Finished));
}

#[test]
fn enter_on_another_context_moves_a_new_coroutine_there() {
    let io = iothread("io");
    let at = run_on(&io, || std::thread::current().name().map(String::from));
    assert_eq!(at.as_deref(), Some("io"));
    io.stop().unwrap();
}

#[test]
fn enter_on_ones_own_context_in_a_coroutine_waits_for_the_yield() {
    let ctx = context();
    let runs = Count::default();
    let (count, seen) = (runs.clone(), runs.clone());
    Coroutine::new(move || {
        Coroutine::new(move || count.bump()).enter_on(&ctx);
        assert_eq!(seen.get(), 0);
    })
    .enter();
    assert_eq!(runs.get(), 1);
}

#[test]
fn scheduled_coroutines_run_in_order_in_the_next_turn() {
    let ctx = context();
    let log: Arc<Mutex<Vec<usize>>> = Arc::default();
    for n in 0..5 {
        let log = Arc::clone(&log);
        Coroutine::new(move || log.lock().unwrap().push(n)).schedule(&ctx);
    }
    assert!(log.lock().unwrap().is_empty());
    while log.lock().unwrap().len() < 5 {
        ctx.poll(false);
    }
    assert_eq!(*log.lock().unwrap(), [0, 1, 2, 3, 4]);
}

#[test]
fn reschedule_self_moves_there_and_back() {
    let (a, b) = (iothread("a"), iothread("b"));
    let (ca, cb) = (Arc::clone(a.context()), Arc::clone(b.context()));
    let path = run_on(&a, move || {
        let mut path = Vec::new();
        let mut note = || path.push(AioContext::current().unwrap().name().to_owned());
        note();
        co_reschedule_self(&ca);
        note();
        for _ in 0..100 {
            co_reschedule_self(&cb);
            assert!(cb.is_home());
            co_reschedule_self(&ca);
            assert!(ca.is_home());
        }
        co_reschedule_self(&cb);
        note();
        assert!(Arc::ptr_eq(&Coroutine::current().unwrap().context().unwrap(), &cb));
        path
    });
    assert_eq!(path, ["a", "a", "b"]);
    a.stop().unwrap();
    b.stop().unwrap();
}

#[test]
fn join_waits_for_the_end_also_across_contexts() {
    let (a, b) = (iothread("a"), iothread("b"));
    let cb = Arc::clone(b.context());
    for _ in 0..200 {
        let cb = Arc::clone(&cb);
        let outcomes = run_on(&a, move || {
            let good = Coroutine::new(|| ());
            good.enter_on(&cb);
            let bad = Coroutine::new(|| panic!("on purpose"));
            bad.enter_on(&cb);
            (good.co_join(), bad.co_join())
        });
        assert_eq!(outcomes, (Outcome::Finished, Outcome::Panicked(String::from("on purpose"))));
    }
    a.stop().unwrap();
    b.stop().unwrap();
}

// ---- misuse --------------------------------------------------------------------------------------------------

#[test]
fn yielding_to_no_one_panics() {
    assert!(panic_of(co_yield).contains("outside of a coroutine"));
}

#[test]
fn entering_twice_panics() {
    let text = Arc::new(Mutex::new(String::new()));
    let out = Arc::clone(&text);
    let outer = Coroutine::builder().name("outer").build(move || {
        let me = Coroutine::current().unwrap();
        Coroutine::new(move || *out.lock().unwrap() = panic_of(|| me.enter())).enter();
    });
    outer.enter();
    let text = text.lock().unwrap().clone();
    assert!(text.contains("\"outer\"") && text.contains("it is entered already"), "{text}");
}

#[test]
fn entering_one_that_has_ended_panics() {
    let co = Coroutine::new(|| ());
    co.enter();
    assert!(panic_of(|| co.enter()).contains("it has ended"));
}

#[test]
fn entering_a_scheduled_one_panics_and_the_schedule_stands() {
    let ctx = context();
    let runs = Count::default();
    let count = runs.clone();
    let co = Coroutine::new(move || count.bump());
    co.schedule(&ctx);
    assert!(panic_of(|| co.enter()).contains("scheduled on a context"));
    assert!(panic_of(|| co.schedule(&ctx)).contains("already scheduled"));
    while runs.get() == 0 {
        ctx.poll(false);
    }
    assert_eq!(co.outcome(), Some(Outcome::Finished));
}

#[test]
fn waking_twice_before_the_run_panics() {
    let _ctx = context();
    let runs = Count::default();
    let count = runs.clone();
    let sleeper = Coroutine::new(move || {
        co_yield();
        count.bump();
    });
    sleeper.enter();
    let waker = Coroutine::new(move || {
        sleeper.wake();
        assert!(panic_of(|| sleeper.wake()).contains("already queued"));
    });
    waker.enter();
    assert_eq!(waker.outcome(), Some(Outcome::Finished));
    assert_eq!(runs.get(), 1);
}

#[test]
fn waking_oneself_panics() {
    let _ctx = context();
    let co = Coroutine::new(|| {
        let me = Coroutine::current().unwrap();
        assert!(panic_of(|| me.wake()).contains("cannot wake itself"));
    });
    co.enter();
    assert_eq!(co.outcome(), Some(Outcome::Finished));
}

#[test]
fn waking_one_without_a_home_panics() {
    let co = Coroutine::new(|| ());
    assert!(panic_of(|| co.wake()).contains("never entered in an AioContext"));
}

#[test]
fn having_to_wait_without_a_home_panics_before_anything_is_queued() {
    let m = Arc::new(conbd::co::CoMutex::new(()));
    let m1 = Arc::clone(&m);
    let holder = Coroutine::new(move || {
        let _guard = m1.co_lock();
        co_yield();
    });
    holder.enter();
    let m2 = Arc::clone(&m);
    let q = conbd::co::CoQueue::new();
    let waiter = Coroutine::new(move || {
        assert!(panic_of(|| drop(m2.co_lock())).contains("without an AioContext"));
        assert!(panic_of(|| q.co_wait()).contains("without an AioContext"));
        assert!(q.is_empty());
    });
    waiter.enter();
    assert_eq!(waiter.outcome(), Some(Outcome::Finished));
    holder.enter();
    assert!(m.is_pristine());
}

#[test]
fn entering_in_a_context_of_another_thread_panics() {
    let io = iothread("io");
    let co = Coroutine::new(|| ());
    assert!(panic_of(|| co.enter_in(io.context())).contains("another thread"));
    io.stop().unwrap();
}

#[test]
fn polling_in_a_coroutine_panics() {
    let ctx = context();
    let co = Coroutine::new(move || {
        ctx.poll(false);
    });
    co.enter();
    assert!(matches!(co.outcome(), Some(Outcome::Panicked(_))));
}

#[test]
fn what_a_misusing_enterer_owed_to_others_is_still_run() {
    let ctx = context();
    let runs = Count::default();
    let count = runs.clone();
    let sleeper = Coroutine::new(move || {
        co_yield();
        count.bump();
    });
    sleeper.enter();
    // Ends holding a lock, which is the enterer's panic, with a wake still queued.
    let bad = Coroutine::new(move || {
        let m = Box::leak(Box::new(conbd::co::CoMutex::new(())));
        std::mem::forget(m.co_lock());
        sleeper.wake();
    });
    assert!(panic_of(|| bad.enter()).contains("ended holding 1 lock"));
    while runs.get() == 0 {
        ctx.poll(false);
    }
}

// ---- panics, spans, leaks ------------------------------------------------------------------------------------

#[test]
fn a_panic_ends_its_coroutine_only() {
    let heard: Arc<Mutex<Option<Outcome>>> = Arc::default();
    let out = Arc::clone(&heard);
    let co = Coroutine::builder().name("bad").on_exit(move |o| *out.lock().unwrap() = Some(o.clone())).build(
        || {
            co_yield();
            panic!("on purpose {}", 7);
        },
    );
    co.enter();
    assert_eq!(*heard.lock().unwrap(), None);
    co.enter();
    let expected = Some(Outcome::Panicked(String::from("on purpose 7")));
    assert_eq!(co.outcome(), expected);
    assert_eq!(*heard.lock().unwrap(), expected);
    // The stack is good for the next one.
    let next = Coroutine::new(|| ());
    next.enter();
    assert_eq!(next.outcome(), Some(Outcome::Finished));
}

#[test]
fn a_panicking_exit_hook_is_contained() {
    let co = Coroutine::builder().on_exit(|_| panic!("in the hook")).build(|| ());
    co.enter();
    assert_eq!(co.outcome(), Some(Outcome::Finished));
}

#[test]
fn a_panic_on_an_iothread_leaves_the_loop_running() {
    let io = IoThread::spawn_with(AioConfig::default(), OnPanic::Report).unwrap();
    let bad = Coroutine::new(|| panic!("on purpose"));
    bad.enter_on(io.context());
    assert_eq!(run_on(&io, || 42), 42);
    assert!(matches!(bad.outcome(), Some(Outcome::Panicked(_))));
    io.stop().unwrap();
}

#[test]
fn a_span_covers_the_body_across_yields_and_nothing_else() {
    let collector = tracing_subscriber::registry();
    tracing::subscriber::with_default(collector, || {
        let span = tracing::info_span!("owned");
        let id = span.id();
        assert!(id.is_some());
        let inside = id.clone();
        let co = Coroutine::builder().span(span).build(move || {
            assert_eq!(tracing::Span::current().id(), inside);
            co_yield();
            assert_eq!(tracing::Span::current().id(), inside);
        });
        co.enter();
        assert_eq!(tracing::Span::current().id(), None);
        co.enter();
        assert_eq!(tracing::Span::current().id(), None);
        assert_eq!(co.outcome(), Some(Outcome::Finished));
    });
}

/// Tells that it was dropped.
struct Tell(Arc<AtomicBool>);

impl Drop for Tell {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn a_coroutine_that_was_never_entered_is_dropped() {
    let dropped = Arc::new(AtomicBool::new(false));
    let tell = Tell(Arc::clone(&dropped));
    drop(Coroutine::new(move || drop(tell)));
    assert!(dropped.load(Ordering::SeqCst));
}

#[test]
fn a_suspended_coroutine_that_nobody_can_wake_is_leaked_and_not_unwound() {
    let dropped = Arc::new(AtomicBool::new(false));
    let tell = Tell(Arc::clone(&dropped));
    let co = Coroutine::new(move || {
        let _tell = tell;
        co_yield();
    });
    co.enter();
    drop(co);
    assert!(!dropped.load(Ordering::SeqCst));
}

#[test]
fn idle_stacks_outlive_their_thread() {
    for _ in 0..3 {
        std::thread::spawn(|| {
            let all: Vec<_> = (0..200).map(|_| Coroutine::new(co_yield)).collect();
            all.iter().for_each(Coroutine::enter);
            all.iter().for_each(Coroutine::enter);
            assert!(all.iter().all(|co| co.outcome() == Some(Outcome::Finished)));
        })
        .join()
        .unwrap();
    }
}

#[test]
fn many_suspended_coroutines_are_cheap() {
    fn resident_pages() -> usize {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split(' ').nth(1).unwrap().parse().unwrap()
    }
    const N: usize = 2000;
    // In a process of its own: other tests allocate meanwhile.
    if std::env::var_os("CONBD_TEST_CHILD").is_none() {
        return child("many_suspended_coroutines_are_cheap", true);
    }
    let all: Vec<_> = (0..N).map(|_| Coroutine::new(co_yield)).collect();
    let before = resident_pages();
    all.iter().for_each(Coroutine::enter);
    let each = (resident_pages() - before) * 4096 / N;
    assert!(each <= 12 * 1024, "{each} bytes resident for each suspended coroutine");
    all.iter().for_each(Coroutine::enter);
}

#[test]
fn a_thread_keeps_a_bounded_number_of_idle_stacks() {
    if std::env::var_os("CONBD_TEST_CHILD").is_none() {
        // The bound is the process's.
        return child("a_thread_keeps_a_bounded_number_of_idle_stacks", true);
    }
    let burst = || {
        let all: Vec<_> = (0..300).map(|_| Coroutine::new(co_yield)).collect();
        all.iter().for_each(Coroutine::enter);
        all.iter().for_each(Coroutine::enter);
        conbd::co::idle_stacks()
    };
    assert_eq!(conbd::co::idle_stacks(), 0);
    assert_eq!(burst(), 128);
    conbd::co::inc_pool_size(50);
    assert_eq!(burst(), 178);
    conbd::co::dec_pool_size(50);
    assert_eq!(burst(), 128);
}

/// Runs one test of this file in a process of its own.
fn child(test: &str, success: bool) {
    let out = run_child(test);
    assert_eq!(out.status.success(), success, "{out:?}");
}

fn run_child(test: &str) -> std::process::Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("co_coroutine::{test}"), "--nocapture", "--test-threads=1"])
        .env("CONBD_TEST_CHILD", "1")
        .output()
        .unwrap()
}

#[test]
fn a_stack_overflow_aborts_the_process_and_says_so() {
    use std::os::unix::process::ExitStatusExt;

    #[inline(never)]
    fn dig(depth: usize) -> usize {
        let frame = std::hint::black_box([depth as u8; 256]);
        if depth == usize::MAX {
            return 0;
        }
        dig(std::hint::black_box(depth + 1)) + usize::from(frame[depth % 256])
    }
    if std::env::var_os("CONBD_TEST_CHILD").is_some() {
        Coroutine::new(|| {
            std::hint::black_box(dig(0));
        })
        .enter();
        return;
    }
    let out = run_child("a_stack_overflow_aborts_the_process_and_says_so");
    assert_eq!(out.status.signal(), Some(6), "{out:?}");
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(text.contains("coroutine has overflowed its 64 KiB stack"), "{text}");
}

#[test]
fn an_ordinary_fault_is_not_taken_for_an_overflow() {
    use std::os::unix::process::ExitStatusExt;
    if std::env::var_os("CONBD_TEST_CHILD").is_some() {
        Coroutine::new(|| {
            #[expect(unsafe_code, reason = "a fault on purpose")]
            // SAFETY: none; the process is meant to die here.
            unsafe {
                std::hint::black_box(std::ptr::without_provenance::<u8>(8)).read_volatile();
            }
        })
        .enter();
        return;
    }
    let out = run_child("an_ordinary_fault_is_not_taken_for_an_overflow");
    assert_eq!(out.status.signal(), Some(11), "{out:?}");
    assert!(!String::from_utf8_lossy(&out.stderr).contains("overflowed"), "{out:?}");
}
