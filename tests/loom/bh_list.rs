//! The BH list: what is scheduled runs, once per schedule that found it idle, and sees what the scheduler wrote.

use crate::kernel::bh_list::{BhList, Node};
use crate::sync::{check, lines_with, sabotage};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use std::collections::VecDeque;

struct Payload {
    /// Written by the one scheduler, read by the callback: loom reports the race if nothing orders them.
    message: UnsafeCell<usize>,
    runs: AtomicUsize,
}

impl Payload {
    fn new() -> Payload {
        Payload { message: UnsafeCell::new(0), runs: AtomicUsize::new(0) }
    }

    #[expect(unsafe_code, reason = "loom's cell checks the accesses of the model")]
    fn write(&self, value: usize) {
        // SAFETY: only one thread writes, and only before it schedules; loom checks that.
        self.message.with_mut(|m| unsafe { *m = value });
    }

    #[expect(unsafe_code, reason = "loom's cell checks the accesses of the model")]
    fn read(&self) -> usize {
        // SAFETY: the scheduler wrote before it scheduled, and does not write again; loom checks that.
        self.message.with(|m| unsafe { *m })
    }
}

/// One turn: takes the list and runs it; returns how many callbacks ran.
fn turn(list: &BhList<Payload>, queue: &mut VecDeque<Arc<Node<Payload>>>) -> usize {
    list.take(queue);
    let mut runs = 0;
    while let Some(node) = queue.pop_front() {
        if node.begin() {
            runs += 1;
            node.payload.runs.fetch_add(1, Ordering::Relaxed);
            assert_eq!(node.payload.read(), 7);
        }
    }
    runs
}

fn message(list: &BhList<Payload>, node: &Arc<Node<Payload>>) {
    node.payload.write(7);
    list.schedule(node);
}

/// Two threads push a node each while the home thread takes.
fn two_nodes() {
    let list = Arc::new(BhList::new());
    let nodes: Vec<_> = (0..2).map(|_| Node::new(Payload::new())).collect();
    let threads: Vec<_> = nodes
        .iter()
        .map(|node| {
            let (list, node) = (Arc::clone(&list), Arc::clone(node));
            loom::thread::spawn(move || message(&list, &node))
        })
        .collect();
    let mut queue = VecDeque::new();
    let mut runs = turn(&list, &mut queue);
    threads.into_iter().for_each(|t| t.join().unwrap());
    runs += turn(&list, &mut queue);
    assert_eq!(runs, 2);
    assert!(nodes.iter().all(|n| n.payload.runs.load(Ordering::Relaxed) == 1));
}

/// One node is scheduled by a thread while the home thread runs it: a schedule after the begin is a new run.
fn rescheduled_while_running() {
    let list = Arc::new(BhList::new());
    let node = Node::new(Payload::new());
    message(&list, &node);
    let thread = {
        let (list, node) = (Arc::clone(&list), Arc::clone(&node));
        loom::thread::spawn(move || {
            list.schedule(&node);
        })
    };
    let mut queue = VecDeque::new();
    let mut runs = turn(&list, &mut queue);
    thread.join().unwrap();
    runs += turn(&list, &mut queue);
    // Both schedules before the begin are one run; else two.
    assert!((1..=2).contains(&runs));
    assert!(list.is_empty());
    assert_eq!(turn(&list, &mut queue), 0);
}

#[test]
fn pushes_of_two_threads_both_arrive() {
    check(two_nodes);
}

#[test]
fn a_schedule_from_another_thread_is_never_lost() {
    check(rescheduled_while_running);
}

#[test]
fn a_cancelled_or_deleted_node_does_not_run() {
    check(|| {
        let list = BhList::new();
        let (a, b) = (Node::new(Payload::new()), Node::new(Payload::new()));
        message(&list, &a);
        message(&list, &b);
        a.cancel();
        b.delete();
        let mut queue = VecDeque::new();
        assert_eq!(turn(&list, &mut queue), 0);
        list.schedule(&a);
        assert_eq!(turn(&list, &mut queue), 1);
    });
}

#[test]
fn nodes_run_in_the_order_of_their_pushes_and_a_dropped_list_frees_them() {
    check(|| {
        let list = BhList::new();
        for i in 0..3 {
            list.schedule_new(i);
        }
        let mut queue = VecDeque::new();
        list.take(&mut queue);
        assert_eq!(queue.iter().map(|n| n.payload).collect::<Vec<_>>(), [0, 1, 2]);
        // Loom reports a leaked Arc at the end of the model.
        list.schedule_new(3);
    });
}

#[test]
fn weakening_the_push_or_the_take_is_found() {
    let source = include_str!("../../src/aio/bh_list.rs");
    let push = lines_with(source, "compare_exchange_weak(head, raw, Ordering::Release");
    let take = lines_with(source, "self.head.swap(ptr::null_mut(), Ordering::Acquire)");
    assert_eq!((push.len(), take.len()), (1, 1));
    for line in [push[0], take[0]] {
        let found = sabotage("bh_list::pushes_of_two_threads_both_arrive", "aio/bh_list.rs", line);
        assert!(found, "the model does not notice the weakened line {line}");
    }
}
