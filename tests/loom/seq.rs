//! Slices of L2 tables: a reader without a lock never takes half of a change, or another slice's words, for what it asked.

use crate::kernel::seq::Seq;
use crate::sync::{AtomicU64, check, lines_with, sabotage};
use loom::sync::Arc;
use std::sync::atomic::Ordering;

/// Two words that belong together. Relaxed on both sides: the protocol's own fences must order them.
struct Slice {
    seq: Seq,
    words: [AtomicU64; 2],
}

impl Slice {
    fn new() -> Slice {
        let s = Slice { seq: Seq::new(0), words: [AtomicU64::new(10), AtomicU64::new(10)] };
        s.seq.close();
        s
    }

    fn put(&self, value: u64) {
        self.words.iter().for_each(|w| w.store(value, Ordering::Relaxed));
    }

    fn read(&self, tag: u64) -> Option<(u64, u64)> {
        self.seq.read(tag, || (self.words[0].load(Ordering::Relaxed), self.words[1].load(Ordering::Relaxed)))
    }
}

#[test]
fn an_entry_of_two_words_changes_at_once() {
    check(|| {
        let s = Arc::new(Slice::new());
        let changer = {
            let s = Arc::clone(&s);
            loom::thread::spawn(move || {
                for value in [11, 12] {
                    s.seq.open();
                    s.put(value);
                    s.seq.close();
                }
            })
        };
        let mut last = 0;
        for _ in 0..2 {
            if let Some((a, b)) = s.read(0) {
                assert_eq!(a, b, "half of a change");
                assert!(a >= last, "an older one than before");
                last = a;
            }
        }
        changer.join().unwrap();
        assert_eq!(s.read(0), Some((12, 12)), "nothing changes any more");
    });
}

#[test]
fn a_slice_that_becomes_another_one_is_not_taken_for_it() {
    check(|| {
        let s = Arc::new(Slice::new());
        let changer = {
            let s = Arc::clone(&s);
            loom::thread::spawn(move || {
                // As it is evicted, and loaded with the words of slice 1.
                s.seq.open();
                s.seq.set_tag(u64::MAX);
                s.put(20);
                s.seq.set_tag(1);
                s.seq.close();
            })
        };
        if let Some(words) = s.read(0) {
            assert_eq!(words, (10, 10), "another slice's words");
        }
        if let Some(words) = s.read(1) {
            assert_eq!(words, (20, 20), "the words that were there before");
        }
        changer.join().unwrap();
        assert_eq!((s.read(0), s.read(1)), (None, Some((20, 20))));
    });
}

#[test]
fn leaving_out_any_order_is_found() {
    let source = include_str!("../../src/block/qcow2/seq.rs");
    let orders = [
        "fence(Ordering::Acquire);",
        "fence(Ordering::Release);",
        "store(before + 1, Ordering::Release)",
        "self.version.load(Ordering::Acquire)",
    ];
    for what in orders {
        let lines = lines_with(source, what);
        assert_eq!(lines.len(), 1, "{what}");
        let models =
            ["an_entry_of_two_words_changes_at_once", "a_slice_that_becomes_another_one_is_not_taken_for_it"];
        let found = models.iter().any(|m| sabotage(&format!("seq::{m}"), "block/qcow2/seq.rs", lines[0]));
        assert!(found, "no model notices that {what} is gone");
    }
}
