//! The notifier: work that was published is never left behind by a loop that blocks.

use crate::kernel::notifier::Notifier;
use crate::sync::{check, lines_with, sabotage};
use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};

/// The eventfd of the model: a count that only grows; blocking waits until it has grown.
struct EventFd(loom::sync::Mutex<usize>, loom::sync::Condvar);

impl EventFd {
    fn write(&self) {
        *self.0.lock().unwrap() += 1;
        self.1.notify_one();
    }

    /// Edge-triggered: returns when there was a write that no earlier wait saw.
    fn wait(&self, seen: &mut usize) {
        let mut n = self.0.lock().unwrap();
        while *n == *seen {
            n = self.1.wait(n).unwrap();
        }
        *seen = *n;
    }
}

struct Loop {
    notifier: Notifier,
    eventfd: EventFd,
    /// Published work: one slot per notifying thread, relaxed, as the protocol's own fences must order it.
    work: [AtomicUsize; 2],
    writes: AtomicUsize,
}

impl Loop {
    fn publish(&self, slot: usize) {
        self.work[slot].fetch_add(1, Ordering::Relaxed);
        if self.notifier.notify() {
            self.writes.fetch_add(1, Ordering::Relaxed);
            self.eventfd.write();
        }
    }

    fn take(&self) -> usize {
        self.work
            .iter()
            .map(|w| {
                // A load first: a read-modify-write would see the latest value without the fences' help.
                let n = w.load(Ordering::Relaxed);
                w.fetch_sub(n, Ordering::Relaxed);
                n
            })
            .sum()
    }

    /// Turns of the loop, as `AioContext::poll(true)` does them, until `expected` pieces of work were found.
    /// A lost wake-up is a deadlock, which loom reports.
    fn run(&self, expected: usize) {
        let mut done = 0;
        let mut seen = 0;
        while done < expected {
            if self.notifier.begin_block() {
                self.eventfd.wait(&mut seen);
            }
            self.notifier.end_block();
            self.notifier.accept();
            done += self.take();
        }
        assert_eq!(done, expected);
    }
}

fn model(notifiers: usize, each: usize) {
    let l = Arc::new(Loop {
        notifier: Notifier::new(),
        eventfd: EventFd(loom::sync::Mutex::new(0), loom::sync::Condvar::new()),
        work: [AtomicUsize::new(0), AtomicUsize::new(0)],
        writes: AtomicUsize::new(0),
    });
    let threads: Vec<_> = (0..notifiers)
        .map(|slot| {
            let l = Arc::clone(&l);
            loom::thread::spawn(move || (0..each).for_each(|_| l.publish(slot)))
        })
        .collect();
    l.run(notifiers * each);
    threads.into_iter().for_each(|t| t.join().unwrap());
    assert!(l.writes.load(Ordering::Relaxed) <= notifiers * each);
}

#[test]
fn no_wakeup_is_lost_with_one_notifier() {
    check(|| model(1, 2));
}

#[test]
fn no_wakeup_is_lost_with_two_notifiers() {
    check(|| model(2, 1));
}

#[test]
fn a_running_loop_costs_its_notifiers_no_system_call() {
    check(|| {
        let n = Notifier::new();
        assert!(!n.notify());
        assert!(!n.notify());
        assert!(!n.begin_block());
        n.end_block();
        assert!(n.accept());
        assert!(!n.accept());
    });
}

#[test]
fn leaving_out_any_fence_is_found() {
    let fences = lines_with(include_str!("../../src/aio/notifier.rs"), "fence(Ordering::SeqCst);");
    assert_eq!(fences.len(), 4, "one fence for each side of the two Dekker patterns");
    for line in fences {
        let found = ["one_notifier", "two_notifiers"]
            .iter()
            .any(|m| sabotage(&format!("notifier::no_wakeup_is_lost_with_{m}"), "aio/notifier.rs", line));
        assert!(found, "the model does not notice that the fence at line {line} is gone");
    }
}
