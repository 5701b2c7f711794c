//! Epochs: what was unlinked is used again only after every request that may have looked it up has ended.

use crate::kernel::epoch::Epochs;
use crate::sync::{AtomicU64, check, fails_in_child, is_child, lines_with, sabotage};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use std::sync::atomic::Ordering;

/// Epochs that must pass before what was unlinked is free.
const ENOUGH: u64 = 2;

/// A cluster, and the pointer to it.
struct Image {
    epochs: Epochs,
    linked: AtomicU64,
    /// What requests touch and who reuses the cluster writes: loom panics where nothing orders the two.
    cluster: UnsafeCell<u32>,
}

#[expect(unsafe_code, reason = "what the protocol protects")]
// SAFETY: that the cell is not reached by two at once is what loom checks.
unsafe impl Sync for Image {}

impl Image {
    fn new() -> Image {
        Image { epochs: Epochs::new(), linked: AtomicU64::new(1), cluster: UnsafeCell::new(1) }
    }

    #[expect(unsafe_code, reason = "a read of the cell")]
    fn request(&self) {
        let ticket = self.epochs.ticket();
        // As lookups load entries: the ticket must order it.
        if self.linked.load(Ordering::Acquire) == 1 {
            self.cluster.with(|p| {
                // SAFETY: loom checks that nobody writes at the same time.
                let content = unsafe { *p };
                assert_eq!(content, 1, "somebody else's cluster");
            });
        }
        drop(ticket);
    }

    /// Unlinks, and reuses the cluster as soon as that is allowed, as commits do; tells whether it was.
    #[expect(unsafe_code, reason = "a write to the cell")]
    fn unlink_and_reuse(&self, tries: usize, epochs: u64) -> bool {
        self.linked.store(0, Ordering::Release);
        let then = self.epochs.now();
        for _ in 0..tries {
            self.epochs.advance();
            let over =
                if epochs == ENOUGH { self.epochs.is_over(then) } else { self.epochs.now() >= then + epochs };
            if over {
                self.cluster.with_mut(|p| {
                    // SAFETY: loom checks that nobody else is here.
                    unsafe { *p = 2 };
                });
                return true;
            }
        }
        false
    }
}

fn model(requesters: usize, each: usize, epochs: u64) {
    let image = Arc::new(Image::new());
    let threads: Vec<_> = (0..requesters)
        .map(|_| {
            let image = Arc::clone(&image);
            loom::thread::spawn(move || (0..each).for_each(|_| image.request()))
        })
        .collect();
    let reused = image.unlink_and_reuse(2, epochs);
    threads.into_iter().for_each(|t| t.join().unwrap());
    // With nobody there it goes on at once.
    assert!(reused || image.unlink_and_reuse(2, epochs), "a ticket was lost");
}

#[test]
fn a_cluster_is_not_reused_under_one_request() {
    check(|| model(1, 2, ENOUGH));
}

#[test]
fn a_cluster_is_not_reused_under_two_requests_on_different_threads() {
    check(|| model(2, 1, ENOUGH));
}

#[test]
fn a_ticket_holds_the_epoch_it_was_taken_in() {
    check(|| {
        let e = Epochs::new();
        let t = e.ticket();
        let then = e.now();
        for _ in 0..5 {
            e.advance();
        }
        assert!(!e.is_over(then));
        assert!(e.now() <= then + 1);
        drop(t);
        e.advance();
        assert!(e.is_over(then));
    });
}

#[test]
fn later_tickets_do_not_hold_earlier_epochs() {
    check(|| {
        let e = Epochs::new();
        let then = e.now();
        e.advance();
        let t = e.ticket();
        let later = e.now();
        e.advance();
        e.advance();
        assert!(e.is_over(then));
        assert!(!e.is_over(later));
        drop(t);
        e.advance();
        assert!(e.is_over(later));
    });
}

#[test]
fn waiting_for_one_epoch_instead_of_two_is_found() {
    const NAME: &str = "epoch::waiting_for_one_epoch_instead_of_two_is_found";
    if is_child(NAME) {
        check(|| model(1, 1, ENOUGH - 1));
    } else {
        assert!(
            fails_in_child(NAME),
            "the model does not notice that requests of this epoch are not waited for"
        );
    }
}

#[test]
fn leaving_out_any_order_is_found() {
    let source = include_str!("../../src/block/qcow2/epoch.rs");
    for what in ["if self.epoch.load(Ordering::SeqCst) == e {", "self.count.fetch_sub(1, Ordering::SeqCst)"] {
        let lines = lines_with(source, what);
        assert_eq!(lines.len(), 1, "{what}");
        let models = ["one_request", "two_requests_on_different_threads"];
        let found = models.iter().any(|m| {
            sabotage(&format!("epoch::a_cluster_is_not_reused_under_{m}"), "block/qcow2/epoch.rs", lines[0])
        });
        assert!(found, "no model notices that {what} is weaker");
    }
}
