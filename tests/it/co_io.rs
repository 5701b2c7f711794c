//! File I/O and blocking work from coroutines.

use crate::co_coroutine::{Count, context, iothread, run_on};
use conbd::aio::engine::EngineChoice;
use conbd::aio::{AioConfig, AioContext, IoThread};
use conbd::co::{
    Coroutine, Outcome, co_fallocate, co_fsync, co_preadv, co_pwritev, co_run_blocking, co_yield,
};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

fn on_engines(body: impl Fn() + Send + Sync + Clone + 'static) {
    for engine in [EngineChoice::Auto, EngineChoice::Threads] {
        let config = AioConfig { name: String::from("io"), engine, ..AioConfig::default() };
        let io = IoThread::spawn(config).unwrap();
        run_on(&io, body.clone());
        io.stop().unwrap();
    }
}

#[test]
fn what_was_written_is_read_back_with_the_caller_s_vectors() {
    on_engines(|| {
        let file = tempfile::tempfile().unwrap();
        let fd = file.as_raw_fd();
        let bufs = [IoSlice::new(b"hello "), IoSlice::new(b"world")];
        assert_eq!(co_pwritev(fd, &bufs, 5, false).unwrap(), 11);
        assert_eq!(co_pwritev(fd, &[IoSlice::new(b"!")], 16, true).unwrap(), 1);
        co_fsync(fd, false).unwrap();
        co_fsync(fd, true).unwrap();
        let (mut a, mut b) = ([0_u8; 10], [1_u8; 10]);
        let n = co_preadv(fd, &mut [IoSliceMut::new(&mut a), IoSliceMut::new(&mut b)], 0).unwrap();
        assert_eq!(n, 17);
        assert_eq!(&a, b"\0\0\0\0\0hello");
        assert_eq!(&b, b" world!\x01\x01\x01");
        co_fallocate(fd, 0, 0, 4096).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 4096);
    });
}

#[test]
fn errors_are_the_kernel_s() {
    on_engines(|| {
        let file = tempfile::tempfile().unwrap();
        let read_only = std::fs::File::open("/proc/self/exe").unwrap();
        let e = co_pwritev(read_only.as_raw_fd(), &[IoSlice::new(b"x")], 0, false).unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::EBADF));
        let e = co_fallocate(file.as_raw_fd(), 0, 0, 0).unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::EINVAL));
    });
}

#[test]
fn more_vectors_than_the_kernel_takes_make_a_short_transfer() {
    on_engines(|| {
        let file = tempfile::tempfile().unwrap();
        let all = vec![IoSlice::new(b"ab"); 1500];
        assert_eq!(co_pwritev(file.as_raw_fd(), &all, 0, false).unwrap(), 2048);
    });
}

#[test]
fn stray_wakes_do_not_end_an_operation_early() {
    let ctx = context();
    let done = Count::default();
    let (count, gate) = (done.clone(), Arc::new(Mutex::new(())));
    let held = gate.lock().unwrap();
    let theirs = Arc::clone(&gate);
    let co = Coroutine::new(move || {
        co_run_blocking(|| drop(theirs.lock().unwrap()));
        count.bump();
    });
    co.enter();
    for _ in 0..5 {
        co.wake();
    }
    assert_eq!(done.get(), 0);
    drop(held);
    while done.get() == 0 {
        ctx.poll(true);
    }
    assert_eq!(co.outcome(), Some(Outcome::Finished));
}

#[test]
fn blocking_work_runs_elsewhere_borrows_and_resumes_at_home() {
    let io = iothread("io");
    run_on(&io, || {
        let home = std::thread::current().id();
        let mut list = vec![3, 1, 2];
        let worker = co_run_blocking(|| {
            list.sort_unstable();
            assert!(!Coroutine::in_coroutine());
            assert!(AioContext::current().is_none());
            std::thread::current().id()
        });
        assert_eq!(list, [1, 2, 3]);
        assert_ne!(worker, home);
        assert_eq!(std::thread::current().id(), home);
    });
    io.stop().unwrap();
}

#[test]
fn a_panic_in_blocking_work_is_raised_in_the_caller() {
    let io = iothread("io");
    let (tx, rx) = std::sync::mpsc::channel();
    Coroutine::builder()
        .on_exit(move |o| tx.send(o.clone()).unwrap())
        .build(|| co_run_blocking(|| panic!("in the pool")))
        .enter_on(io.context());
    assert_eq!(rx.recv().unwrap(), Outcome::Panicked(String::from("in the pool")));
    assert_eq!(run_on(&io, || co_run_blocking(|| 5)), 5);
    io.stop().unwrap();
}

#[test]
fn a_hundred_submissions_all_complete_once() {
    let ctx = AioContext::new(AioConfig { pool_threads: 4, ..AioConfig::default() }).unwrap();
    let (started, done) = (Count::default(), Count::default());
    for n in 0..100 {
        let (started, done) = (started.clone(), done.clone());
        Coroutine::new(move || {
            assert_eq!(co_run_blocking(|| started.up().min(1) + n), n + 1);
            done.bump();
        })
        .enter();
    }
    assert_eq!(done.get(), 0);
    while done.get() < 100 {
        ctx.poll(true);
    }
    assert_eq!(started.get(), 100);
}

#[test]
fn many_operations_of_many_coroutines_are_in_flight_at_once() {
    on_engines(|| {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let parent = Coroutine::current().unwrap();
        let left = Arc::new(Mutex::new(64));
        for n in 0..64_u8 {
            let (file, parent, left) = (Arc::clone(&file), parent.clone(), Arc::clone(&left));
            Coroutine::new(move || {
                let (data, at) = ([n; 4096], u64::from(n) * 4096);
                assert_eq!(co_pwritev(file.as_raw_fd(), &[IoSlice::new(&data)], at, false).unwrap(), 4096);
                let mut back = [0; 4096];
                let n = co_preadv(file.as_raw_fd(), &mut [IoSliceMut::new(&mut back)], at).unwrap();
                assert_eq!((n, back), (4096, data));
                let mut left = left.lock().unwrap();
                *left -= 1;
                if *left == 0 {
                    parent.wake();
                }
            })
            .enter();
        }
        while *left.lock().unwrap() > 0 {
            co_yield();
        }
    });
}
