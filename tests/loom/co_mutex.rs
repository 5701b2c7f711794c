//! CoMutex: one owner at a time, one agent with the duty to wake, no lost and no double wakeup.
//!
//! A waiter sleeps on a loom condition variable, as a coroutine sleeps in its yield: the wake may come before the
//! sleep. What the owner does is a plain cell access, which loom checks for races: a lock whose hand-over did not
//! order memory would be found although it excludes.

use crate::kernel::mutex_core::{AllSteps, MutexCore, Queued, Record, Steps, Unlocked};
use crate::sync::{check, lines_with, sabotage};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::{Condvar, Mutex};
use std::ptr;

/// What a waiter sleeps on; lives on its thread, like a coroutine outlives its wait.
struct Sleeper {
    wakes: Mutex<u32>,
    changed: Condvar,
}

impl Sleeper {
    fn wake(&self) {
        *self.wakes.lock().unwrap() += 1;
        self.changed.notify_one();
    }

    /// Sleeps for one wake.
    fn sleep(&self) {
        let mut wakes = self.wakes.lock().unwrap();
        while *wakes == 0 {
            wakes = self.changed.wait(wakes).unwrap();
        }
        *wakes -= 1;
    }
}

struct Model<S: Steps> {
    core: MutexCore<Sleeper, S>,
    /// What the mutex protects; loom panics on unordered access.
    data: UnsafeCell<u32>,
}

#[expect(unsafe_code, reason = "a mutex")]
// SAFETY: the cell is the protected data; that it is reached by one thread at a time is what loom checks.
unsafe impl<S: Steps> Sync for Model<S> {}

impl<S: Steps> Model<S> {
    fn new() -> Model<S> {
        Model { core: MutexCore::default(), data: UnsafeCell::new(0) }
    }

    /// As `CoMutex::co_lock`, without the spinning, which decides nothing.
    fn lock(&self) {
        if self.core.try_lock() == 0 || self.core.count() {
            return;
        }
        // Kept alive beyond the wait by an Arc, as a coroutine is by its waker's handle.
        let me = Arc::new(Sleeper { wakes: Mutex::new(0), changed: Condvar::new() });
        let record = Record::new(leak(&me));
        match self.core.queue(&record) {
            Queued::Mine(waiter) => {
                drop(take(waiter));
                return;
            }
            Queued::Wake(waiter) => take(waiter).wake(),
            Queued::Sleep => {}
        }
        me.sleep();
        assert!(record.granted(), "woken without having been made the owner");
    }

    fn unlock(&self) {
        if let Unlocked::Wake(waiter) = self.core.unlock() {
            take(waiter).wake();
        }
    }

    #[expect(unsafe_code, reason = "the section")]
    fn section(&self) {
        self.lock();
        self.data.with_mut(|p| {
            // SAFETY: we hold the lock; loom checks that nobody else is here.
            unsafe { *p += 1 }
        });
        self.unlock();
    }
}

fn leak(me: &Arc<Sleeper>) -> *mut Sleeper {
    Arc::into_raw(Arc::clone(me)).cast_mut()
}

#[expect(unsafe_code, reason = "reverses Arc::into_raw")]
fn take(waiter: *mut Sleeper) -> Arc<Sleeper> {
    assert!(!ptr::eq(waiter, ptr::null()), "one record was taken out twice");
    // SAFETY: from `leak`; the protocol gives each waiter out once.
    unsafe { Arc::from_raw(waiter) }
}

#[expect(unsafe_code, reason = "reads the result")]
fn model<S: Steps + 'static>(rounds: &[u32]) {
    let m = Arc::new(Model::<S>::new());
    let threads: Vec<_> = rounds[1..]
        .iter()
        .map(|&n| {
            let m = Arc::clone(&m);
            loom::thread::spawn(move || (0..n).for_each(|_| m.section()))
        })
        .collect();
    (0..rounds[0]).for_each(|_| m.section());
    threads.into_iter().for_each(|t| t.join().unwrap());
    m.data.with(|p| {
        // SAFETY: all threads are joined.
        assert_eq!(unsafe { *p }, rounds.iter().sum::<u32>());
    });
    assert!(m.core.is_pristine());
}

#[test]
fn no_wakeup_is_lost_between_two() {
    check(|| model::<AllSteps>(&[2, 2]));
}

#[test]
fn no_wakeup_is_lost_between_three() {
    check(|| model::<AllSteps>(&[1, 1, 1]));
}

#[test]
fn no_wakeup_is_lost_between_three_that_come_back() {
    check(|| model::<AllSteps>(&[2, 2, 1]));
}

/// The unlocker leaves an offer and goes, without looking at the queue once more.
struct NoRecheck;

impl Steps for NoRecheck {
    const RECHECK_AFTER_OFFER: bool = false;
}

/// The unlocker takes its offer back without asking who got it.
struct NoElection;

impl Steps for NoElection {
    const ELECT_BY_EXCHANGE: bool = false;
}

/// Names a sabotaged model that is run in a child process only: it ends in a panic, or in loom's deadlock report.
fn in_child(name: &str, model: impl Fn() + Sync + Send + 'static) {
    if crate::sync::is_child(name) {
        check(model);
    } else {
        assert!(
            crate::sync::fails_in_child(&format!("co_mutex::{name}")),
            "the model does not notice {name}"
        );
    }
}

#[test]
fn an_unlocker_that_does_not_look_again_is_found() {
    in_child("an_unlocker_that_does_not_look_again_is_found", || model::<NoRecheck>(&[1, 1]));
}

#[test]
fn an_unlocker_that_just_withdraws_its_offer_is_found() {
    in_child("an_unlocker_that_just_withdraws_its_offer_is_found", || model::<NoElection>(&[1, 1, 1]));
}

const SOURCE: &str = include_str!("../../src/co/mutex_core.rs");

fn found(line: u32) -> bool {
    ["two", "three"]
        .iter()
        .any(|m| sabotage(&format!("co_mutex::no_wakeup_is_lost_between_{m}"), "co/mutex_core.rs", line))
}

#[test]
fn leaving_out_any_fence_is_found() {
    let fences = lines_with(SOURCE, "fence(Ordering::SeqCst);");
    assert_eq!(fences.len(), 2, "one fence on each side");
    for line in fences {
        assert!(found(line), "the model does not notice that the fence at line {line} is gone");
    }
}

/// Not in the list, because something else orders what they do: the offer's accesses (the fences), the grant's (the
/// wake itself). They are kept: they cost nothing, and say what they are for.
#[test]
fn weakening_an_ordering_that_hands_the_data_over_is_found() {
    for what in [
        "self.locked.fetch_sub(1, Ordering::Release)",
        "self.locked.fetch_add(1, Ordering::Acquire)",
        "self.locked.compare_exchange(0, 1, Ordering::Acquire",
        "self.from_push.compare_exchange(head, raw, Ordering::Release",
        "self.from_push.swap(ptr::null_mut(), Ordering::Acquire)",
    ] {
        let lines = lines_with(SOURCE, what);
        assert_eq!(lines.len(), 1, "{what}");
        assert!(found(lines[0]), "the model does not notice a relaxed {what}");
    }
}
