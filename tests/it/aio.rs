//! The event loop: bottom halves, fd handlers, timers, wake-ups, busy polling, the thread pool, IOThreads.
//!
//! The behaviours of QEMU's event loop tests, in our own words, and what is ours: coalescing, affinity, shutdown.

use conbd::aio::{
    AioConfig, AioContext, BottomHalf, Clock, Interest, IoThread, OnPanic, PollConfig, Readiness, Runnable,
    Timer,
};
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex, mpsc};

const POLLING: PollConfig = PollConfig { max_ns: 200_000, grow: 0, shrink: 0 };
const BLOCKING: PollConfig = PollConfig { max_ns: 0, grow: 0, shrink: 0 };

fn context() -> Arc<AioContext> {
    AioContext::new(AioConfig { name: String::from("test"), ..AioConfig::default() }).unwrap()
}

fn iothread(name: &str) -> IoThread {
    IoThread::spawn(AioConfig { name: String::from(name), ..AioConfig::default() }).unwrap()
}

/// A counter that callbacks share with the test.
#[derive(Clone, Default)]
struct Count(Arc<AtomicUsize>);

impl Count {
    fn up(&self) -> usize {
        self.0.fetch_add(1, Ordering::SeqCst) + 1
    }
    fn bump(&self) {
        self.up();
    }
    fn get(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

/// Where a callback finds the object that owns it.
struct Slot<T>(Arc<Mutex<Option<T>>>);

impl<T> Clone for Slot<T> {
    fn clone(&self) -> Self {
        Slot(Arc::clone(&self.0))
    }
}

impl<T> Slot<T> {
    fn new() -> Self {
        Slot(Arc::new(Mutex::new(None)))
    }
    fn put(&self, value: T) {
        *self.0.lock().unwrap() = Some(value);
    }
    fn take(&self) -> Option<T> {
        self.0.lock().unwrap().take()
    }
    fn with<R>(&self, f: impl FnOnce(&T) -> R) -> R {
        f(self.0.lock().unwrap().as_ref().unwrap())
    }
}

fn counting_bh(ctx: &Arc<AioContext>) -> (BottomHalf, Count) {
    let count = Count::default();
    let c = count.clone();
    (ctx.bh_new(move || c.bump()), count)
}

/// QEMU's event notifier: an eventfd with set and test-and-clear.
struct EventNotifier(OwnedFd);

impl EventNotifier {
    fn new() -> Arc<EventNotifier> {
        Arc::new(EventNotifier(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()))
    }
    fn set(&self) {
        rustix::io::write(&self.0, &1u64.to_ne_bytes()).unwrap();
    }
    fn test_and_clear(&self) -> bool {
        rustix::io::read(&self.0, &mut [0u8; 8]).is_ok()
    }
    fn fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

fn panics(f: impl FnOnce()) -> String {
    let payload = catch_unwind(AssertUnwindSafe(f)).expect_err("it panics");
    match payload.downcast_ref::<String>() {
        Some(s) => s.clone(),
        None => String::from(*payload.downcast_ref::<&str>().unwrap()),
    }
}

// Bottom halves

#[test]
fn bh_runs_once_in_the_next_poll_however_often_it_was_scheduled() {
    let ctx = context();
    let (bh, runs) = counting_bh(&ctx);
    assert!(!ctx.poll(false));
    bh.schedule();
    bh.schedule();
    assert_eq!(runs.get(), 0);
    assert!(ctx.poll(true));
    assert_eq!(runs.get(), 1);
    assert!(!ctx.poll(false));
    assert_eq!(runs.get(), 1);
}

#[test]
fn bh_that_rearms_itself_runs_once_per_poll() {
    let ctx = context();
    let runs = Count::default();
    let slot = Slot::new();
    slot.put(ctx.bh_new({
        let (slot, runs) = (slot.clone(), runs.clone());
        move || {
            if runs.up() < 10 {
                slot.with(BottomHalf::schedule);
            }
        }
    }));
    slot.with(BottomHalf::schedule);
    for n in 1..=10 {
        assert!(ctx.poll(true));
        assert_eq!(runs.get(), n);
    }
    assert!(!ctx.poll(false));
    drop(slot.take());
}

#[test]
fn bh_scheduled_by_a_bh_runs_in_the_next_poll() {
    let ctx = context();
    let (second, runs) = counting_bh(&ctx);
    let first = ctx.bh_new(move || second.schedule());
    first.schedule();
    assert!(ctx.poll(false));
    assert_eq!(runs.get(), 0);
    assert!(ctx.poll(false));
    assert_eq!(runs.get(), 1);
}

#[test]
fn cancelled_bh_does_not_run_and_makes_no_progress() {
    let ctx = context();
    let (bh, runs) = counting_bh(&ctx);
    bh.schedule();
    bh.cancel();
    assert!(!ctx.poll(false));
    assert_eq!(runs.get(), 0);
    bh.schedule();
    bh.cancel();
    bh.schedule();
    assert!(ctx.poll(false));
    assert_eq!(runs.get(), 1);
}

#[test]
fn deleted_bh_does_not_run_and_frees_what_it_captured() {
    let ctx = context();
    let (bh, runs) = counting_bh(&ctx);
    bh.schedule();
    assert_eq!(Arc::strong_count(&runs.0), 2);
    drop(bh);
    assert_eq!(Arc::strong_count(&runs.0), 1);
    assert!(!ctx.poll(false));
    assert_eq!(runs.get(), 0);
}

#[test]
fn bhs_may_delete_themselves_after_different_numbers_of_runs() {
    let ctx = context();
    let bhs: Vec<(Slot<BottomHalf>, Count, usize)> = [1, 3, 2, 4]
        .into_iter()
        .map(|limit| {
            let (slot, runs) = (Slot::new(), Count::default());
            slot.put(ctx.bh_new({
                let (slot, runs) = (slot.clone(), runs.clone());
                move || {
                    if runs.up() == limit {
                        drop(slot.take());
                    } else {
                        slot.with(BottomHalf::schedule);
                    }
                }
            }));
            slot.with(BottomHalf::schedule);
            (slot, runs, limit)
        })
        .collect();
    for turn in 1..=4 {
        assert!(ctx.poll(false));
        for (_, runs, limit) in &bhs {
            assert_eq!(runs.get(), turn.min(*limit));
        }
    }
    assert!(!ctx.poll(false));
}

#[test]
fn oneshots_of_one_thread_run_in_order() {
    let ctx = context();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let remote = {
        let (ctx, seen) = (Arc::clone(&ctx), Arc::clone(&seen));
        move || {
            for i in 0..100 {
                let seen = Arc::clone(&seen);
                ctx.bh_schedule_oneshot(move || seen.lock().unwrap().push(i));
            }
        }
    };
    std::thread::spawn(remote).join().unwrap();
    assert!(ctx.poll(true));
    assert_eq!(*seen.lock().unwrap(), (0..100).collect::<Vec<_>>());
}

#[test]
fn runnable_from_another_thread_runs_on_the_home_thread() {
    struct Task(Mutex<Option<std::thread::ThreadId>>);
    impl Runnable for Task {
        fn run(self: Arc<Self>, ctx: &Arc<AioContext>) {
            assert!(ctx.is_home());
            assert!(Arc::ptr_eq(ctx, &AioContext::current().unwrap()));
            *self.0.lock().unwrap() = Some(std::thread::current().id());
        }
    }
    let ctx = context();
    let task = Arc::new(Task(Mutex::new(None)));
    let (c, t) = (Arc::clone(&ctx), Arc::clone(&task));
    std::thread::spawn(move || c.schedule(t)).join().unwrap();
    assert!(task.0.lock().unwrap().is_none());
    ctx.poll_until(|| task.0.lock().unwrap().is_some());
    assert_eq!(*task.0.lock().unwrap(), Some(std::thread::current().id()));
}

// Fd handlers

#[test]
fn a_set_notifier_is_delivered_exactly_once() {
    let ctx = context();
    let (e, runs) = (EventNotifier::new(), Count::default());
    let id = ctx
        .add_handler(e.fd(), Interest::Read, {
            let (e, runs) = (Arc::clone(&e), runs.clone());
            move |ready| {
                assert!(ready.readable);
                assert!(e.test_and_clear());
                runs.up();
            }
        })
        .unwrap();
    assert!(!ctx.poll(false));
    e.set();
    assert!(ctx.poll(false));
    assert_eq!(runs.get(), 1);
    assert!(!ctx.poll(false));
    ctx.remove_handler(id);
    e.set();
    assert!(!ctx.poll(false));
    assert_eq!(runs.get(), 1);
}

#[test]
fn readiness_from_before_the_registration_is_delivered() {
    let ctx = context();
    let (e, runs) = (EventNotifier::new(), Count::default());
    e.set();
    let r = runs.clone();
    let id = ctx.add_handler(e.fd(), Interest::Read, move |_| r.bump()).unwrap();
    assert!(ctx.poll(true));
    assert_eq!(runs.get(), 1);
    ctx.remove_handler(id);
}

#[test]
fn a_notifier_that_sets_itself_again_runs_until_it_stops() {
    let ctx = context();
    let (e, runs) = (EventNotifier::new(), Count::default());
    let id = ctx
        .add_handler(e.fd(), Interest::Read, {
            let (e, runs) = (Arc::clone(&e), runs.clone());
            move |_| {
                e.test_and_clear();
                if runs.up() < 10 {
                    e.set();
                }
            }
        })
        .unwrap();
    e.set();
    for n in 1..=10 {
        assert!(ctx.poll(true));
        assert_eq!(runs.get(), n);
    }
    assert!(!ctx.poll(false));
    ctx.remove_handler(id);
}

#[test]
fn two_notifiers_do_not_suppress_each_other() {
    let ctx = context();
    let notifiers: Vec<_> = (0..2)
        .map(|_| {
            let (e, runs) = (EventNotifier::new(), Count::default());
            let (e2, r2) = (Arc::clone(&e), runs.clone());
            let id = ctx
                .add_handler(e.fd(), Interest::Read, move |_| {
                    if e2.test_and_clear() {
                        r2.up();
                    }
                })
                .unwrap();
            (e, runs, id)
        })
        .collect();
    notifiers[0].0.set();
    assert!(ctx.poll(true));
    assert_eq!((notifiers[0].1.get(), notifiers[1].1.get()), (1, 0));
    notifiers[0].0.set();
    notifiers[1].0.set();
    while notifiers[0].1.get() + notifiers[1].1.get() < 3 {
        assert!(ctx.poll(true));
    }
    assert_eq!((notifiers[0].1.get(), notifiers[1].1.get()), (2, 1));
    for (_, _, id) in notifiers {
        ctx.remove_handler(id);
    }
}

#[test]
fn a_handler_removed_by_an_earlier_callback_is_not_called() {
    let ctx = context();
    let (a, b) = (EventNotifier::new(), EventNotifier::new());
    let (ids, runs) = (Arc::new(Mutex::new(Vec::new())), Count::default());
    for e in [&a, &b] {
        let (ids2, runs, c) = (Arc::clone(&ids), runs.clone(), Arc::clone(&ctx));
        let id = ctx
            .add_handler(e.fd(), Interest::Read, move |_| {
                runs.up();
                for id in ids2.lock().unwrap().drain(..) {
                    c.remove_handler(id);
                }
            })
            .unwrap();
        ids.lock().unwrap().push(id);
    }
    a.set();
    b.set();
    assert!(ctx.poll(true));
    assert_eq!(runs.get(), 1);
    assert!(!ctx.poll(false));
}

#[test]
fn an_event_of_a_removed_handler_does_not_reach_its_successor() {
    let ctx = context();
    let (a, b, c) = (EventNotifier::new(), EventNotifier::new(), EventNotifier::new());
    let wrong = Count::default();
    let ids = Arc::new(Mutex::new(Vec::new()));
    // Whichever of a and b runs first removes both, and c gets the slot of one of them in the same turn.
    for e in [&a, &b] {
        let (ids2, ctx2, wrong, fd) = (Arc::clone(&ids), Arc::clone(&ctx), wrong.clone(), c.fd());
        let id = ctx
            .add_handler(e.fd(), Interest::Read, move |_| {
                let mut ids = ids2.lock().unwrap();
                for id in ids.drain(..) {
                    ctx2.remove_handler(id);
                }
                let wrong = wrong.clone();
                ids.push(ctx2.add_handler(fd, Interest::Read, move |_| wrong.bump()).unwrap());
            })
            .unwrap();
        ids.lock().unwrap().push(id);
    }
    a.set();
    b.set();
    assert!(ctx.poll(true));
    assert!(!ctx.poll(false));
    assert_eq!(wrong.get(), 0);
    c.set();
    assert!(ctx.poll(true));
    assert_eq!(wrong.get(), 1);
}

#[test]
fn removing_its_own_handler_from_inside_frees_it_after_the_call() {
    let ctx = context();
    let (e, runs, id) = (EventNotifier::new(), Count::default(), Slot::new());
    id.put(
        ctx.add_handler(e.fd(), Interest::Read, {
            let (ctx, runs, id) = (Arc::clone(&ctx), runs.clone(), id.clone());
            move |_| {
                ctx.remove_handler(id.take().unwrap());
                // What the callback captured is still there.
                runs.up();
            }
        })
        .unwrap(),
    );
    e.set();
    assert!(ctx.poll(true));
    assert_eq!(runs.get(), 1);
    assert_eq!(Arc::strong_count(&runs.0), 1);
    assert_eq!(ctx.load().0, 0);
}

#[test]
fn a_closed_peer_is_reported() {
    let ctx = context();
    let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
    let seen = Arc::new(Mutex::new(Readiness::default()));
    let s = Arc::clone(&seen);
    let id = ctx.add_handler(a.as_raw_fd(), Interest::ReadWrite, move |r| *s.lock().unwrap() = r).unwrap();
    assert!(ctx.poll(true));
    assert_eq!(*seen.lock().unwrap(), Readiness { readable: false, writable: true, closed: false });
    drop(b);
    assert!(ctx.poll(true));
    assert!(seen.lock().unwrap().readable);
    assert!(seen.lock().unwrap().closed);
    ctx.remove_handler(id);
}

#[test]
fn a_regular_file_cannot_have_a_handler() {
    let ctx = context();
    let file = tempfile::tempfile().unwrap();
    let error = ctx.add_handler(file.as_raw_fd(), Interest::Read, |_| ()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    assert_eq!(ctx.load().0, 0);
}

// Timers

fn mock_context() -> (Arc<AioContext>, Arc<AtomicU64>) {
    let now = Arc::new(AtomicU64::new(0));
    let config = AioConfig { clock: Clock::Mock(Arc::clone(&now)), ..AioConfig::default() };
    (AioContext::new(config).unwrap(), now)
}

#[test]
fn a_timer_fires_once_at_its_time_and_not_before() {
    let (ctx, now) = mock_context();
    let runs = Count::default();
    let r = runs.clone();
    let timer = ctx.timer_new(move || r.bump());
    assert!(!timer.pending());
    timer.mod_ns(750);
    assert!(timer.pending());
    now.store(749, Ordering::Release);
    assert!(!ctx.poll(false));
    assert_eq!(runs.get(), 0);
    now.store(1_000, Ordering::Release);
    assert!(ctx.poll(false));
    assert_eq!(runs.get(), 1);
    assert!(!timer.pending());
    assert!(!ctx.poll(false));
}

#[test]
fn a_timer_may_arm_itself_again_and_runs_once_per_poll() {
    let (ctx, now) = mock_context();
    let (runs, slot) = (Count::default(), Slot::<Timer>::new());
    slot.put(ctx.timer_new({
        let (runs, slot, ctx) = (runs.clone(), slot.clone(), Arc::clone(&ctx));
        move || {
            // Due at once: it must wait for the next turn all the same.
            if runs.up() < 3 {
                slot.with(|t| t.mod_ns(ctx.now_ns()));
            }
        }
    }));
    slot.with(|t| t.mod_ns(10));
    now.store(10, Ordering::Release);
    for n in 1..=3 {
        assert!(ctx.poll(false));
        assert_eq!(runs.get(), n);
    }
    assert!(!ctx.poll(false));
    drop(slot.take());
}

#[test]
fn timers_fire_in_the_order_of_their_deadlines_and_moves_and_deletions_count() {
    let (ctx, now) = mock_context();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let timer = |name: &'static str| {
        let seen = Arc::clone(&seen);
        ctx.timer_new(move || seen.lock().unwrap().push(name))
    };
    let (a, b, c, d) = (timer("a"), timer("b"), timer("c"), timer("d"));
    a.mod_ns(30);
    b.mod_ns(10);
    c.mod_ns(20);
    d.mod_ns(15);
    b.mod_ns(40);
    d.del();
    now.store(100, Ordering::Release);
    assert!(ctx.poll(false));
    assert_eq!(*seen.lock().unwrap(), ["c", "a", "b"]);
    d.mod_ns(1);
    drop(d);
    assert!(!ctx.poll(false));
}

#[test]
fn a_timer_dropped_by_its_own_callback_or_by_an_earlier_one_is_gone() {
    let (ctx, now) = mock_context();
    let (own, other, runs) = (Slot::new(), Slot::new(), Count::default());
    own.put(ctx.timer_new({
        let (own, other, runs) = (own.clone(), other.clone(), runs.clone());
        move || {
            runs.up();
            drop(own.take());
            drop(other.take());
        }
    }));
    let r = runs.clone();
    other.put(ctx.timer_new(move || r.bump()));
    own.with(|t| t.mod_ns(1));
    other.with(|t| t.mod_ns(2));
    now.store(5, Ordering::Release);
    assert!(ctx.poll(false));
    assert_eq!(runs.get(), 1);
    assert_eq!(Arc::strong_count(&runs.0), 1);
    assert_eq!(ctx.load().1, 0);
}

#[test]
fn a_blocking_poll_returns_for_a_real_timer_and_never_early() {
    let ctx = context();
    let fired = Slot::new();
    let timer = ctx.timer_new({
        let (ctx, fired) = (Arc::clone(&ctx), fired.clone());
        move || fired.put(ctx.now_ns())
    });
    let deadline = ctx.now_ns() + 3_000_000;
    timer.mod_ns(deadline);
    ctx.poll_until(|| !timer.pending());
    assert!(fired.take().unwrap() >= deadline);
}

#[test]
fn a_timer_dropped_on_another_thread_is_disarmed() {
    let (ctx, now) = mock_context();
    let runs = Count::default();
    let r = runs.clone();
    let timer = ctx.timer_new(move || r.bump());
    timer.mod_ns(1);
    std::thread::spawn(move || drop(timer)).join().unwrap();
    assert!(ctx.poll(true));
    now.store(5, Ordering::Release);
    assert!(!ctx.poll(false));
    assert_eq!((runs.get(), ctx.load().1), (0, 0));
}

// Wake-ups

#[test]
fn a_notification_ends_a_blocking_poll_without_progress() {
    let ctx = context();
    let c = Arc::clone(&ctx);
    let waker = std::thread::spawn(move || c.notify());
    assert!(!ctx.poll(true));
    waker.join().unwrap();
}

/// The eventfd is written only when the loop is (about to be) blocked: a busy loop costs its wakers no system call.
#[test]
fn notifications_are_coalesced() {
    const EACH: usize = 20_000;
    let ctx = context();
    let start = Arc::new(Barrier::new(3));
    let (runs, scheduled) = (Count::default(), Count::default());
    let threads: Vec<_> = (0..2)
        .map(|_| {
            let (ctx, runs, start, scheduled) =
                (Arc::clone(&ctx), runs.clone(), Arc::clone(&start), scheduled.clone());
            std::thread::spawn(move || {
                start.wait();
                for _ in 0..EACH {
                    let runs = runs.clone();
                    ctx.bh_schedule_oneshot(move || runs.bump());
                    scheduled.up();
                }
                ctx.notify();
            })
        })
        .collect();
    // Everything is scheduled while this loop runs and does not block: no write at all.
    start.wait();
    while scheduled.get() < 2 * EACH {
        ctx.poll(false);
    }
    ctx.poll_until(|| runs.get() == 2 * EACH);
    threads.into_iter().for_each(|t| t.join().unwrap());
    assert_eq!(runs.get(), 2 * EACH);
    let writes = ctx.counters().notify_writes.load(Ordering::Relaxed);
    assert!(writes <= 2, "{writes} eventfd writes for {} schedules of a running loop", 2 * EACH);
}

#[test]
fn the_home_thread_never_writes_its_own_eventfd() {
    let ctx = context();
    let (bh, runs) = counting_bh(&ctx);
    for n in 1..=100 {
        bh.schedule();
        assert!(ctx.poll(true));
        assert_eq!(runs.get(), n);
    }
    assert_eq!(ctx.counters().notify_writes.load(Ordering::Relaxed), 0);
    assert_eq!(ctx.counters().blocks.get(), 0);
}

#[test]
fn two_contexts_wake_each_other_many_times() {
    const ROUNDS: usize = 5_000;
    fn bounce(here: Arc<AioContext>, there: Arc<AioContext>, left: usize, done: mpsc::Sender<()>) {
        if left == 0 {
            return done.send(()).unwrap();
        }
        assert!(here.is_home());
        let next = Arc::clone(&there);
        next.bh_schedule_oneshot(move || bounce(there, here, left - 1, done));
    }
    for poll in [BLOCKING, POLLING] {
        let make = || IoThread::spawn(AioConfig { poll, ..AioConfig::default() }).unwrap();
        let (a, b) = (make(), make());
        let (tx, rx) = mpsc::channel();
        let (ca, cb) = (Arc::clone(a.context()), Arc::clone(b.context()));
        a.context().bh_schedule_oneshot(move || bounce(ca, cb, ROUNDS, tx));
        rx.recv().unwrap();
        a.stop().unwrap();
        b.stop().unwrap();
    }
}

// Busy polling

#[test]
fn busy_polling_finds_fds_timers_and_other_threads_work() {
    let ctx = AioContext::new(AioConfig { poll: POLLING, ..AioConfig::default() }).unwrap();
    let (e, seen) = (EventNotifier::new(), Count::default());
    let id = ctx
        .add_handler(e.fd(), Interest::Read, {
            let (e, seen) = (Arc::clone(&e), seen.clone());
            move |_| {
                e.test_and_clear();
                seen.up();
            }
        })
        .unwrap();
    // Short waits open the window; each kind of wake-up then ends a poll, whether it was spinning or blocked.
    for round in 0..200 {
        let expected = seen.get() + 2;
        let (e, ctx2, seen2) = (Arc::clone(&e), Arc::clone(&ctx), seen.clone());
        let other = std::thread::spawn(move || {
            e.set();
            ctx2.bh_schedule_oneshot(move || seen2.bump());
        });
        ctx.poll_until(|| seen.get() == expected);
        other.join().unwrap();
        let timer = ctx.timer_new(|| ());
        timer.mod_ns(ctx.now_ns() + 1_000);
        ctx.poll_until(|| !timer.pending());
        assert_eq!(seen.get(), 2 * (round + 1));
    }
    let c = ctx.counters();
    assert!(c.poll_hits.get() + c.poll_misses.get() > 0, "the window never opened");
    ctx.set_poll(BLOCKING);
    let before = c.poll_hits.get() + c.poll_misses.get();
    let timer = ctx.timer_new(|| ());
    timer.mod_ns(ctx.now_ns() + 1_000);
    ctx.poll_until(|| !timer.pending());
    assert_eq!(c.poll_hits.get() + c.poll_misses.get(), before);
    ctx.remove_handler(id);
}

// Nested polls and misuse

#[test]
fn a_nested_poll_makes_progress_elsewhere_and_does_not_enter_the_running_handler_again() {
    for poll in [BLOCKING, POLLING] {
        let ctx = AioContext::new(AioConfig { poll, ..AioConfig::default() }).unwrap();
        let (outer, inner) = (EventNotifier::new(), EventNotifier::new());
        let (outer_runs, inner_runs, depth) =
            (Count::default(), Count::default(), Arc::new(AtomicUsize::new(0)));
        let outer_id = ctx
            .add_handler(outer.fd(), Interest::Read, {
                let (ctx, outer, inner) = (Arc::clone(&ctx), Arc::clone(&outer), Arc::clone(&inner));
                let (outer_runs, inner_runs, depth) =
                    (outer_runs.clone(), inner_runs.clone(), Arc::clone(&depth));
                move |_| {
                    assert_eq!(depth.fetch_add(1, Ordering::SeqCst), 0, "the handler was entered twice");
                    outer.test_and_clear();
                    if outer_runs.up() == 1 {
                        // Ready again while it runs: to be delivered afterwards, once.
                        outer.set();
                        inner.set();
                        let before = inner_runs.get();
                        ctx.poll_until(|| inner_runs.get() > before);
                    }
                    depth.fetch_sub(1, Ordering::SeqCst);
                }
            })
            .unwrap();
        let inner_id = ctx
            .add_handler(inner.fd(), Interest::Read, {
                let (inner, inner_runs) = (Arc::clone(&inner), inner_runs.clone());
                move |_| {
                    inner.test_and_clear();
                    inner_runs.up();
                }
            })
            .unwrap();
        outer.set();
        ctx.poll_until(|| outer_runs.get() == 2);
        assert_eq!((outer_runs.get(), inner_runs.get()), (2, 1));
        assert!(!ctx.poll(false));
        ctx.remove_handler(outer_id);
        ctx.remove_handler(inner_id);
    }
}

#[test]
fn a_nested_poll_runs_the_bottom_halves_that_the_outer_turn_has_collected() {
    let ctx = context();
    let (second, runs) = counting_bh(&ctx);
    let slot = Slot::new();
    let outer_runs = Count::default();
    slot.put(ctx.bh_new({
        let (ctx, slot, runs, outer_runs) =
            (Arc::clone(&ctx), slot.clone(), runs.clone(), outer_runs.clone());
        move || {
            if outer_runs.up() == 1 {
                // It is scheduled again while it runs, and must not be entered by the nested poll.
                slot.with(BottomHalf::schedule);
                assert_eq!(runs.get(), 0);
                assert!(ctx.poll(true));
                assert_eq!((runs.get(), outer_runs.get()), (1, 1));
            }
        }
    }));
    slot.with(BottomHalf::schedule);
    second.schedule();
    assert!(ctx.poll(true));
    assert!(ctx.poll(true));
    assert_eq!((runs.get(), outer_runs.get()), (1, 2));
    assert!(!ctx.poll(false));
    drop(slot.take());
}

#[test]
fn use_off_the_home_thread_panics_and_says_so() {
    let thread = iothread("elsewhere");
    let ctx = Arc::clone(thread.context());
    for text in [
        panics(|| assert!(!ctx.poll(false))),
        panics(|| drop(ctx.add_handler(0, Interest::Read, |_| ()))),
        panics(|| drop(ctx.timer_new(|| ()))),
        panics(|| ctx.set_poll(POLLING)),
    ] {
        assert!(text.contains("off its home thread"), "{text}");
    }
    thread.stop().unwrap();
}

#[test]
fn a_thread_has_one_context() {
    assert!(AioContext::current().is_none());
    let ctx = context();
    assert!(Arc::ptr_eq(&ctx, &AioContext::current().unwrap()));
    let text = panics(|| drop(AioContext::new(AioConfig::default())));
    assert!(text.contains("already has an AioContext"), "{text}");
    drop(ctx);
    assert!(AioContext::current().is_none());
    drop(context());
}

// The thread pool, seen through a context

#[test]
fn blocking_work_runs_elsewhere_and_completes_on_the_home_thread() {
    let ctx = context();
    let home = std::thread::current().id();
    let result = Slot::new();
    let r = result.clone();
    ctx.submit_blocking(
        Box::new(move || {
            assert_ne!(std::thread::current().id(), home);
            Ok(42)
        }),
        Box::new(move |n| {
            assert_eq!(std::thread::current().id(), home);
            r.put(n.unwrap());
        }),
    );
    assert!(result.0.lock().unwrap().is_none());
    ctx.poll_until(|| result.0.lock().unwrap().is_some());
    assert_eq!(result.take(), Some(42));
}

#[test]
fn more_work_than_threads_all_completes_once() {
    let ctx = AioContext::new(AioConfig { pool_threads: 3, ..AioConfig::default() }).unwrap();
    let (ran, done) = (Count::default(), Count::default());
    for i in 0..100 {
        let (ran, done) = (ran.clone(), done.clone());
        ctx.submit_blocking(
            Box::new(move || {
                ran.up();
                Ok(i)
            }),
            Box::new(move |n| {
                assert_eq!(n.unwrap(), i);
                done.up();
            }),
        );
    }
    ctx.poll_until(|| done.get() == 100);
    assert_eq!(ran.get(), 100);
    assert!(!ctx.poll(false));
}

#[test]
fn cancelled_work_never_runs_and_started_work_finishes() {
    const JOBS: usize = 100;
    let ctx = AioContext::new(AioConfig { pool_threads: 2, ..AioConfig::default() }).unwrap();
    let (started, finished, cancelled) = (Count::default(), Count::default(), Count::default());
    let gate = Arc::new((Mutex::new(false), std::sync::Condvar::new()));
    let ids: Vec<_> = (0..JOBS)
        .map(|_| {
            let (started, gate) = (started.clone(), Arc::clone(&gate));
            let (finished, cancelled) = (finished.clone(), cancelled.clone());
            ctx.submit_blocking(
                Box::new(move || {
                    started.up();
                    let mut open = gate.0.lock().unwrap();
                    while !*open {
                        open = gate.1.wait(open).unwrap();
                    }
                    Ok(0)
                }),
                Box::new(move |result| match result {
                    Ok(0) => finished.bump(),
                    Err(e) if e.raw_os_error() == Some(libc::ECANCELED) => cancelled.bump(),
                    other => panic!("{other:?}"),
                }),
            )
        })
        .collect();
    while started.get() < 2 {
        std::thread::yield_now();
    }
    let taken_back = ids.into_iter().filter(|id| ctx.cancel_blocking(*id)).count();
    assert_eq!(taken_back, JOBS - 2);
    *gate.0.lock().unwrap() = true;
    gate.1.notify_all();
    ctx.poll_until(|| finished.get() + cancelled.get() == JOBS);
    assert_eq!((started.get(), finished.get(), cancelled.get()), (2, 2, JOBS - 2));
}

// IOThreads

#[test]
fn iothreads_run_what_others_schedule_each_on_its_own_thread() {
    let threads: Vec<_> = (0..5).map(|i| iothread(&format!("io{i}"))).collect();
    let (tx, rx) = mpsc::channel();
    for (i, t) in threads.iter().enumerate() {
        let tx = tx.clone();
        t.context().bh_schedule_oneshot(move || {
            let ctx = AioContext::current().unwrap();
            tx.send((i, ctx.id(), std::thread::current().name().map(String::from))).unwrap();
        });
    }
    drop(tx);
    let mut seen: Vec<_> = rx.iter().collect();
    seen.sort();
    let expected: Vec<_> =
        threads.iter().enumerate().map(|(i, t)| (i, t.context().id(), Some(format!("io{i}")))).collect();
    assert_eq!(seen, expected);
    threads.into_iter().for_each(|t| t.stop().unwrap());
}

#[test]
fn stop_runs_what_was_scheduled_before_and_what_that_schedules() {
    let thread = iothread("stopping");
    let ran = Count::default();
    // The loop is held until everything is scheduled, so that stop finds it all still waiting.
    let (hold, release) = mpsc::channel::<()>();
    thread.context().bh_schedule_oneshot(move || assert!(release.recv().is_err()));
    for _ in 0..10 {
        let (ran, ctx) = (ran.clone(), Arc::clone(thread.context()));
        thread.context().bh_schedule_oneshot(move || {
            let again = ran.clone();
            ran.up();
            ctx.bh_schedule_oneshot(move || again.bump());
        });
    }
    drop(hold);
    thread.stop().unwrap();
    assert_eq!(ran.get(), 20);
}

#[test]
fn stop_waits_for_blocking_work_and_its_completion() {
    let thread = iothread("busy");
    let done = Arc::new(AtomicBool::new(false));
    let (d, ctx) = (Arc::clone(&done), Arc::clone(thread.context()));
    let (hold, release) = mpsc::channel::<()>();
    let release = Mutex::new(release);
    let (submitted, was_submitted) = mpsc::channel();
    thread.context().bh_schedule_oneshot(move || {
        ctx.submit_blocking(
            Box::new(move || {
                assert!(release.lock().unwrap().recv().is_err());
                Ok(0)
            }),
            Box::new(move |_| d.store(true, Ordering::SeqCst)),
        );
        submitted.send(()).unwrap();
    });
    was_submitted.recv().unwrap();
    drop(hold);
    thread.stop().unwrap();
    assert!(done.load(Ordering::SeqCst));
}

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The other tests of this binary open and close descriptors meanwhile, so a child process counts.
#[test]
fn iothreads_leak_neither_fds_nor_threads() {
    const CHILD: &str = "CONBD_TEST_IOTHREAD_LEAK";
    if std::env::var_os(CHILD).is_none() {
        let out = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "aio::iothreads_leak_neither_fds_nor_threads", "--test-threads=1"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
        return;
    }
    let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
    let one_round = || {
        let thread = iothread("round");
        let (tx, rx) = mpsc::channel();
        let ctx = Arc::clone(thread.context());
        thread.context().bh_schedule_oneshot(move || {
            let e = EventNotifier::new();
            let fd = e.fd();
            // Left behind on purpose: the context frees it, and with it the eventfd.
            ctx.add_handler(fd, Interest::Read, move |_| assert!(!e.test_and_clear())).unwrap();
            ctx.submit_blocking(Box::new(|| Ok(0)), Box::new(move |_| tx.send(()).unwrap()));
        });
        rx.recv().unwrap();
        thread.stop().unwrap();
    };
    one_round();
    let (fds, tasks) = (open_fds(), threads());
    for _ in 0..50 {
        one_round();
    }
    assert_eq!(open_fds(), fds);
    assert_eq!(threads(), tasks);
}

#[test]
fn a_panic_of_the_loop_is_reported_by_stop() {
    let config = AioConfig { name: String::from("doomed"), ..AioConfig::default() };
    let thread = IoThread::spawn_with(config, OnPanic::Report).unwrap();
    thread.context().bh_schedule_oneshot(|| panic!("broken invariant"));
    let error = thread.stop().unwrap_err();
    assert!(error.to_string().contains("broken invariant"), "{error}");
}
