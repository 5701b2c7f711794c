//! The file I/O engines and the thread pool, without a context around them.
//!
//! The same bodies run against both engines. Where io_uring is refused (containers), the tests say so and fail,
//! unless `CONBD_TEST_ENGINES=threads` asks for the other engine alone.

use conbd::aio::engine::io_uring::UringEngine;
use conbd::aio::engine::thread_pool::{ThreadEngine, ThreadPool};
use conbd::aio::engine::{self, Completion, Engine, EngineChoice, EngineKind, Op, Wake};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::Timespec;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;

/// Longest wait for something that must happen, in seconds: a bound for broken code, not a measure.
const PATIENCE_S: i64 = 60;

type Finished = Vec<(Completion, io::Result<usize>)>;

/// An engine with a place to wait for it.
struct Rig<E: ?Sized> {
    woken: Arc<OwnedFd>,
    engine: Box<E>,
}

fn waker() -> (Arc<OwnedFd>, Wake) {
    let fd = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("eventfd"));
    let woken = Arc::clone(&fd);
    let wake: Wake = Arc::new(move || {
        rustix::io::write(&fd, &1u64.to_ne_bytes()).expect("eventfd takes the wake");
    });
    (woken, wake)
}

impl Rig<dyn Engine> {
    fn new(choice: EngineChoice) -> Self {
        let (woken, wake) = waker();
        let engine = engine::select(choice, 4, "test", wake).unwrap_or_else(|e| {
            panic!("{choice:?}: {e}; where io_uring is refused, set CONBD_TEST_ENGINES=threads")
        });
        Rig { woken, engine }
    }
}

impl<E: Engine + ?Sized> Rig<E> {
    /// Submits, for borrowed memory that outlives the rig's use.
    #[expect(unsafe_code, reason = "the tests keep their buffers until they have reaped")]
    fn submit(&mut self, op: Op, done: Completion) {
        // SAFETY: each test owns its buffers and files until `turn` has delivered the completion, or the rig was dropped.
        unsafe { self.engine.submit(op, done) }
    }

    /// One turn of a loop: flush, reap, wait if there was nothing, run the completions.
    fn turn(&mut self) {
        self.engine.flush();
        let mut out = Finished::new();
        self.engine.reap(&mut out);
        if out.is_empty() {
            self.wait();
            self.engine.reap(&mut out);
        }
        for (done, result) in out {
            done(result);
        }
    }

    fn wait(&self) {
        let timeout = Timespec { tv_sec: PATIENCE_S, tv_nsec: 0 };
        let mut fds = vec![PollFd::new(&*self.woken, PollFlags::IN)];
        if let Some(fd) = self.engine.wake_fd() {
            fds.push(PollFd::from_borrowed_fd(borrow(fd), PollFlags::IN));
        }
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => panic!("no completion within {PATIENCE_S} s"),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => panic!("poll: {e}"),
        }
        let mut count = [0; 8];
        let _nothing_there_is_fine = rustix::io::read(&*self.woken, &mut count);
    }

    fn run_until_idle(&mut self) {
        while self.engine.in_flight() > 0 {
            self.turn();
        }
    }

    /// Submits one operation and waits for its result.
    fn run(&mut self, op: Op) -> io::Result<usize> {
        let (tx, rx) = mpsc::channel();
        self.submit(op, Box::new(move |r| tx.send(r).expect("the receiver lives")));
        assert!(rx.try_recv().is_err(), "submit calls no completion");
        self.run_until_idle();
        let result = rx.try_recv().expect("one completion");
        assert!(rx.try_recv().is_err(), "one completion only");
        result
    }
}

#[expect(unsafe_code, reason = "the engine hands out its fd as a number")]
fn borrow<'a>(fd: RawFd) -> BorrowedFd<'a> {
    // SAFETY: the engine that owns the fd outlives the poll.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

fn choices() -> Vec<EngineChoice> {
    if std::env::var("CONBD_TEST_ENGINES").is_ok_and(|v| v == "threads") {
        vec![EngineChoice::Threads]
    } else {
        vec![EngineChoice::IoUring, EngineChoice::Threads]
    }
}

fn with_each_engine(body: impl Fn(&mut Rig<dyn Engine>)) {
    for choice in choices() {
        let mut rig = Rig::new(choice);
        let kind = if choice == EngineChoice::Threads { EngineKind::Threads } else { EngineKind::IoUring };
        assert_eq!(rig.engine.kind(), kind);
        body(&mut rig);
        assert_eq!(rig.engine.in_flight(), 0, "{kind:?}");
    }
}

fn with_uring(entries: u32, in_kernel_max: Option<usize>, body: impl FnOnce(&mut Rig<UringEngine>)) {
    if !choices().contains(&EngineChoice::IoUring) {
        return;
    }
    let (woken, wake) = waker();
    let engine = UringEngine::with_limits(entries, in_kernel_max, "test", 2, wake).expect("io_uring");
    body(&mut Rig { woken, engine: Box::new(engine) });
}

fn iov(buf: &mut [u8]) -> libc::iovec {
    libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() }
}

fn readv(file: &impl AsRawFd, iov: &[libc::iovec], offset: u64) -> Op {
    Op::Readv { fd: file.as_raw_fd(), iov: iov.as_ptr(), iov_len: iov.len().try_into().unwrap(), offset }
}

fn writev(file: &impl AsRawFd, iov: &[libc::iovec], offset: u64, dsync: bool) -> Op {
    Op::Writev {
        fd: file.as_raw_fd(),
        iov: iov.as_ptr(),
        iov_len: iov.len().try_into().unwrap(),
        offset,
        dsync,
    }
}

fn errno(result: io::Result<usize>) -> i32 {
    result.expect_err("it fails").raw_os_error().expect("with an errno")
}

#[test]
fn vectors_are_written_and_read_back_in_order() {
    with_each_engine(|rig| {
        let file = tempfile::tempfile().unwrap();
        let (mut a, mut b, mut c) = (vec![1u8; 4096], vec![2u8; 512], vec![3u8; 70_000]);
        let total = a.len() + b.len() + c.len();
        for dsync in [false, true] {
            let parts = [iov(&mut a), iov(&mut b), iov(&mut c)];
            assert_eq!(rig.run(writev(&file, &parts, 1000, dsync)).unwrap(), total);
        }
        let mut back = vec![0u8; total];
        let (x, y) = back.split_at_mut(5000);
        let parts = [iov(x), iov(y)];
        assert_eq!(rig.run(readv(&file, &parts, 1000)).unwrap(), total);
        assert!(back == [a, b, c].concat());
        assert_eq!(file.metadata().unwrap().len(), 1000 + total as u64);
    });
}

#[test]
fn reads_at_the_end_of_the_file_are_short() {
    with_each_engine(|rig| {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 1000]).unwrap();
        let mut buf = vec![0u8; 4096];
        let part = [iov(&mut buf)];
        assert_eq!(rig.run(readv(&file, &part, 0)).unwrap(), 1000);
        assert_eq!(rig.run(readv(&file, &part, 900)).unwrap(), 100);
        assert_eq!(rig.run(readv(&file, &part, 1000)).unwrap(), 0);
        assert_eq!(rig.run(readv(&file, &part, 1 << 40)).unwrap(), 0);
    });
}

#[test]
fn sync_and_allocation_do_what_they_say() {
    with_each_engine(|rig| {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[9; 65536]).unwrap();
        let fd = file.as_raw_fd();
        assert_eq!(rig.run(Op::Fsync { fd, datasync: false }).unwrap(), 0);
        assert_eq!(rig.run(Op::Fsync { fd, datasync: true }).unwrap(), 0);
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        assert_eq!(rig.run(Op::Fallocate { fd, mode: punch, offset: 4096, len: 8192 }).unwrap(), 0);
        assert_eq!(rig.run(Op::Fallocate { fd, mode: 0, offset: 65536, len: 4096 }).unwrap(), 0);
        let mut all = Vec::new();
        std::io::Seek::rewind(&mut file).unwrap();
        file.read_to_end(&mut all).unwrap();
        let expected = [vec![9; 4096], vec![0; 8192], vec![9; 65536 - 12288], vec![0; 4096]].concat();
        assert!(all == expected);
    });
}

#[test]
fn errors_are_those_of_the_system_calls() {
    with_each_engine(|rig| {
        let file = tempfile::tempfile().unwrap();
        let read_only = File::open("/proc/self/exe").unwrap();
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut buf = vec![0u8; 4096];
        let part = [iov(&mut buf)];
        let too_many = vec![iov(&mut []); 1025];
        let bad = i32::MAX;
        let on_bad = |op| match op {
            Op::Readv { iov, iov_len, offset, .. } => Op::Readv { fd: bad, iov, iov_len, offset },
            Op::Writev { iov, iov_len, offset, dsync, .. } => {
                Op::Writev { fd: bad, iov, iov_len, offset, dsync }
            }
            other => other,
        };
        let fd = file.as_raw_fd();
        let table = [
            (on_bad(readv(&file, &part, 0)), libc::EBADF),
            (on_bad(writev(&file, &part, 0, false)), libc::EBADF),
            (Op::Fsync { fd: bad, datasync: true }, libc::EBADF),
            (Op::Fallocate { fd: bad, mode: 0, offset: 0, len: 1 }, libc::EBADF),
            (writev(&read_only, &part, 0, false), libc::EBADF),
            (writev(&full, &part, 0, false), libc::ENOSPC),
            // Beyond what the file system can address; no rlimit, so no signal.
            (writev(&file, &part, i64::MAX as u64 - 8192, false), libc::EFBIG),
            // The kernel's -1 means "the file position" to io_uring.
            (readv(&file, &part, u64::MAX), libc::EINVAL),
            (writev(&file, &part, u64::MAX, false), libc::EINVAL),
            (writev(&file, &part, 1 << 63, false), libc::EINVAL),
            (readv(&file, &too_many, 0), libc::EINVAL),
            (Op::Fallocate { fd, mode: 0, offset: 0, len: 0 }, libc::EINVAL),
            (Op::Fallocate { fd, mode: 0, offset: 0, len: u64::MAX }, libc::EINVAL),
        ];
        for (op, expected) in table {
            assert_eq!(errno(rig.run(op)), expected, "{op:?} by {:?}", rig.engine.kind());
        }
        assert_eq!(file.metadata().unwrap().len(), 0);
    });
}

#[test]
fn ten_thousand_operations_complete_once_each() {
    const OPS: usize = 10_000;
    const LEN: usize = 64;
    with_each_engine(|rig| {
        let file = tempfile::tempfile().unwrap();
        let mut image: Vec<u8> = (0..OPS * LEN).map(|i| (i / LEN % 251) as u8).collect();
        let runs = Arc::new(Mutex::new(HashMap::<usize, u32>::new()));
        let parts: Vec<libc::iovec> = image.chunks_mut(LEN).map(iov).collect();
        for i in 0..OPS {
            let runs = Arc::clone(&runs);
            let done = Box::new(move |r: io::Result<usize>| {
                assert_eq!(r.unwrap(), LEN);
                *runs.lock().unwrap().entry(i).or_default() += 1;
            });
            rig.submit(writev(&file, &parts[i..=i], (i * LEN) as u64, false), done);
        }
        assert_eq!(rig.engine.in_flight(), OPS);
        assert_eq!(runs.lock().unwrap().len(), 0);
        rig.run_until_idle();
        let runs = std::mem::take(&mut *runs.lock().unwrap());
        assert_eq!(runs.len(), OPS);
        assert!(runs.values().all(|&n| n == 1));
        let mut back = vec![0; image.len()];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut back, 0).unwrap();
        assert!(back == image);
    });
}

#[test]
fn a_completion_may_submit_again() {
    with_each_engine(|rig| {
        let file = tempfile::tempfile().unwrap();
        let fd = file.as_raw_fd();
        let (tx, rx) = mpsc::channel();
        for _ in 0..500 {
            let tx = tx.clone();
            rig.submit(Op::Fsync { fd, datasync: true }, Box::new(move |r| tx.send(r).unwrap()));
            rig.turn();
        }
        rig.run_until_idle();
        assert_eq!(rx.try_iter().map(Result::unwrap).count(), 500);
    });
}

#[test]
fn drain_delivers_everything() {
    with_each_engine(|rig| {
        let file = tempfile::tempfile().unwrap();
        let mut buf = vec![5u8; 4096];
        let part = [iov(&mut buf)];
        let ran = Arc::new(AtomicUsize::new(0));
        for i in 0..1000 {
            let ran = Arc::clone(&ran);
            rig.submit(
                writev(&file, &part, i * 4096, false),
                Box::new(move |r| {
                    assert_eq!(r.unwrap(), 4096);
                    ran.fetch_add(1, Ordering::Relaxed);
                }),
            );
        }
        let mut out = Finished::new();
        rig.engine.drain(&mut out);
        assert_eq!(rig.engine.in_flight(), 0);
        assert_eq!(ran.load(Ordering::Relaxed), 0);
        out.into_iter().for_each(|(done, r)| done(r));
        assert_eq!(ran.load(Ordering::Relaxed), 1000);
    });
}

#[test]
fn dropping_an_engine_drops_each_completion_once_and_calls_none() {
    with_each_engine(|rig| {
        let file = tempfile::tempfile().unwrap();
        let mut buf = vec![5u8; 4096];
        let part = [iov(&mut buf)];
        let token = Arc::new(());
        let mut second = Rig::new(match rig.engine.kind() {
            EngineKind::IoUring => EngineChoice::IoUring,
            EngineKind::Threads => EngineChoice::Threads,
        });
        for i in 0..1000 {
            let token = Arc::clone(&token);
            let done = Box::new(move |_| panic!("called with {} tokens", Arc::strong_count(&token)));
            second.submit(writev(&file, &part, i * 4096, false), done);
            if i == 600 {
                second.engine.flush();
            }
        }
        drop(second);
        assert_eq!(Arc::strong_count(&token), 1);
    });
}

#[test]
fn a_dropped_ring_waits_for_the_kernel_to_let_go_of_memory() {
    with_uring(8, None, |rig| {
        // To io_uring, a read of an empty pipe is an operation that takes until somebody writes.
        let (reader, writer) = io::pipe().unwrap();
        let mut buf = vec![0u8; 16];
        let part = [iov(&mut buf)];
        rig.submit(readv(&reader, &part, 0), Box::new(|_| panic!("it was not reaped")));
        rig.engine.flush();
        let (woken, wake) = waker();
        let other = UringEngine::with_limits(8, None, "other", 1, wake).unwrap();
        let held = std::mem::replace(rig, Rig { woken, engine: Box::new(other) });
        let helper = thread::spawn(move || {
            let mut writer = writer;
            writer.write_all(b"0123456789abcdef").unwrap();
        });
        drop(held);
        assert_eq!(buf, b"0123456789abcdef");
        helper.join().unwrap();
    });
}

/// Tells whether this process has a thread of that name.
fn has_thread(name: &str) -> bool {
    std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(Result::ok)
        .any(|task| std::fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == name))
}

#[test]
fn more_operations_than_the_queues_hold_wait_in_the_backlog() {
    with_uring(4, None, |rig| check_many_syncs(rig, 3000));
    with_uring(4, Some(1), |rig| check_many_syncs(rig, 300));
}

#[test]
fn completions_beyond_the_completion_queue_are_not_lost() {
    // Without our bound the kernel has to keep what the queue of 8 cannot take.
    with_uring(4, Some(usize::MAX), |rig| {
        assert_eq!(rig.engine.cq_entries(), 8);
        check_many_syncs(rig, 3000);
    });
}

/// Submits and flushes `count` operations before it reaps any.
fn check_many_syncs(rig: &mut Rig<UringEngine>, count: usize) {
    let file = tempfile::tempfile().unwrap();
    let mut buf = vec![0u8; 1];
    let part = [iov(&mut buf)];
    let (tx, rx) = mpsc::channel();
    for i in 0..count {
        let tx = tx.clone();
        rig.submit(readv(&file, &part, 0), Box::new(move |r| tx.send((i, r.unwrap())).unwrap()));
        if i % 100 == 99 {
            rig.engine.flush();
        }
    }
    rig.run_until_idle();
    let mut seen: Vec<_> = rx.try_iter().collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..count).map(|i| (i, 0)).collect::<Vec<_>>());
}

// The choice at the start.

/// Makes the calling thread's next calls of `syscalls` fail with `errno`; other threads are not affected.
#[expect(unsafe_code, reason = "seccomp by prctl")]
fn refuse_syscalls(syscalls: &[libc::c_long], errno: i32) {
    let stmt = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    // The number is the first field of `seccomp_data`.
    let mut program = vec![stmt(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0)];
    for &number in syscalls {
        let mut jump = stmt(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, number.try_into().unwrap());
        jump.jf = 1;
        program.push(jump);
        program.push(stmt(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | errno.cast_unsigned()));
    }
    program.push(stmt(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW));
    let filter = libc::sock_fprog { len: program.len().try_into().unwrap(), filter: program.as_mut_ptr() };
    // SAFETY: takes numbers only.
    let ret = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(ret, 0, "{}", io::Error::last_os_error());
    // SAFETY: `filter` names `program`, and both live until the call has returned.
    let ret = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) };
    assert_eq!(ret, 0, "{}", io::Error::last_os_error());
}

#[derive(Clone, Default)]
struct LogBuffer(Arc<Mutex<Vec<u8>>>);

impl Write for LogBuffer {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(buf);
        Ok(buf.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs `f` on a thread of its own and returns its value and what it logged, as JSON lines.
fn logged_on_a_thread<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> (T, String) {
    let log = LogBuffer::default();
    let writer = log.clone();
    let value = thread::spawn(move || {
        let subscriber = tracing_subscriber::fmt().json().with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(subscriber, f)
    })
    .join()
    .expect("the thread did not panic");
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    (value, text)
}

#[test]
fn auto_falls_back_to_threads_where_io_uring_is_refused() {
    let refusals = [
        (libc::SYS_io_uring_setup, libc::EPERM, "seccomp"),
        (libc::SYS_io_uring_enter, libc::EPERM, "seccomp"),
        (libc::SYS_io_uring_register, libc::EACCES, "seccomp"),
        (libc::SYS_io_uring_setup, libc::ENOSYS, "kernel has no io_uring"),
        (libc::SYS_io_uring_setup, libc::ENOMEM, "RLIMIT_MEMLOCK"),
        (libc::SYS_io_uring_setup, libc::EMFILE, "file descriptor"),
    ];
    for (syscall, errno, words) in refusals {
        let ((), log) = logged_on_a_thread(move || {
            refuse_syscalls(&[syscall], errno);
            let mut rig = Rig::new(EngineChoice::Auto);
            assert_eq!(rig.engine.kind(), EngineKind::Threads);
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(b"abc").unwrap();
            let mut buf = vec![0u8; 8];
            let part = [iov(&mut buf)];
            assert_eq!(rig.run(readv(&file, &part, 0)).unwrap(), 3);
        });
        assert!(log.contains("io_uring was refused"), "{log}");
        assert!(log.contains(words), "{log}");
        assert!(log.contains("\"engine\":\"threads\""), "{log}");
    }
}

#[test]
fn io_uring_on_demand_is_an_error_where_it_is_refused() {
    let (result, _) = logged_on_a_thread(|| {
        refuse_syscalls(&[libc::SYS_io_uring_setup], libc::EPERM);
        let (_woken, wake) = waker();
        engine::select(EngineChoice::IoUring, 1, "test", wake).map(|_| ())
    });
    let e = result.expect_err("refused");
    assert_eq!(e.kind(), io::ErrorKind::PermissionDenied);
    assert!(e.to_string().contains("io_uring is not available: refused by a seccomp filter"), "{e}");
    let source = std::error::Error::source(e.get_ref().expect("wrapped")).expect("the system's error below");
    assert!(source.to_string().contains("os error 1"), "{source}");
}

#[test]
fn the_choice_is_logged() {
    for (choice, name) in [(EngineChoice::IoUring, "io_uring"), (EngineChoice::Threads, "threads")] {
        if !choices().contains(&choice) {
            continue;
        }
        let ((), log) = logged_on_a_thread(move || drop(Rig::new(choice)));
        assert_eq!(log.lines().count(), 1, "{log}");
        assert!(log.contains("aio engine chosen"), "{log}");
        assert!(log.contains(&format!("\"engine\":\"{name}\"")), "{log}");
        assert!(log.contains("\"context\":\"test\""), "{log}");
    }
}

#[test]
fn engines_leave_no_fd_and_no_thread_behind() {
    // A thread with a descriptor table of its own, so that other tests' files don't count.
    thread::spawn(|| {
        own_fd_table();
        let fds = || std::fs::read_dir("/proc/thread-self/fd").unwrap().count();
        let before = fds();
        for choice in choices() {
            for _ in 0..20 {
                let mut rig = Rig::new(choice);
                let file = tempfile::tempfile().unwrap();
                rig.run(Op::Fsync { fd: file.as_raw_fd(), datasync: true }).unwrap();
                assert!(fds() > before);
            }
            assert_eq!(fds(), before, "{choice:?}");
        }
    })
    .join()
    .unwrap();
}

#[expect(unsafe_code, reason = "close_range by number")]
fn own_fd_table() {
    // SAFETY: takes numbers; with UNSHARE it closes in a new table that only this thread uses, and this thread
    // owns none of the descriptors.
    let ret = unsafe { libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_UNSHARE.cast_signed()) };
    assert_eq!(ret, 0, "{}", io::Error::last_os_error());
}

// The thread pool by itself.

/// A pool, and how often it called for its home thread.
struct PoolRig {
    pool: ThreadPool,
    woken: Arc<OwnedFd>,
}

impl PoolRig {
    fn new(max: usize) -> PoolRig {
        let (woken, wake) = waker();
        PoolRig { pool: ThreadPool::new("pool", max, wake), woken }
    }

    /// Waits for a wake, then runs the completions.
    fn turn(&self) {
        let timeout = Timespec { tv_sec: PATIENCE_S, tv_nsec: 0 };
        let n = poll(&mut [PollFd::new(&*self.woken, PollFlags::IN)], Some(&timeout)).expect("poll");
        assert_eq!(n, 1, "no wake within {PATIENCE_S} s");
        rustix::io::read(&*self.woken, &mut [0u8; 8]).unwrap();
        let mut out = Finished::new();
        self.pool.reap(&mut out);
        for (done, result) in out {
            done(result);
        }
    }

    fn run_until_idle(&self) {
        while self.pool.in_flight() > 0 {
            self.turn();
        }
    }
}

/// Results by job number.
#[derive(Clone, Default)]
struct Results(Arc<Mutex<HashMap<usize, Vec<io::Result<usize>>>>>);

impl Results {
    fn slot(&self, i: usize) -> Completion {
        let results = self.clone();
        Box::new(move |r| results.0.lock().unwrap().entry(i).or_default().push(r))
    }

    /// Takes the results, having checked that each of `0..n` has one.
    fn take(&self, n: usize) -> Vec<io::Result<usize>> {
        let mut map = std::mem::take(&mut *self.0.lock().unwrap());
        assert_eq!(map.len(), n);
        (0..n)
            .map(|i| {
                let mut of_one = map.remove(&i).expect("numbered below n");
                assert_eq!(of_one.len(), 1, "job {i} completes once");
                of_one.remove(0)
            })
            .collect()
    }
}

#[test]
fn a_pool_starts_threads_only_for_work() {
    let rig = PoolRig::new(3);
    assert_eq!(rig.pool.workers(), 0);
    assert_eq!(rig.pool.max_workers(), 3);
    let results = Results::default();
    let name = || thread::current().name().map(str::to_owned);
    let names = Arc::new(Mutex::new(Vec::new()));
    let (started_tx, started_rx) = mpsc::channel();
    let (hold, held) = mpsc::channel::<()>();
    let held = Arc::new(Mutex::new(held));
    for i in 0..10 {
        let (names, held, started) = (Arc::clone(&names), Arc::clone(&held), started_tx.clone());
        let job = move || {
            names.lock().unwrap().push(name().unwrap());
            started.send(()).unwrap();
            held.lock().unwrap().recv().ok();
            Ok(i)
        };
        rig.pool.submit(Box::new(job), results.slot(i));
        assert_eq!(rig.pool.workers(), (i + 1).min(3));
    }
    assert_eq!(rig.pool.in_flight(), 10);
    (0..3).for_each(|_| started_rx.recv().unwrap());
    drop(hold);
    rig.run_until_idle();
    assert_eq!(
        results.take(10).into_iter().map(Result::unwrap).collect::<Vec<_>>(),
        (0..10).collect::<Vec<_>>()
    );
    let mut names = names.lock().unwrap().clone();
    names.sort();
    names.dedup();
    assert_eq!(names, ["pool-w0", "pool-w1", "pool-w2"]);
}

#[test]
fn a_completion_waits_for_reap() {
    let rig = PoolRig::new(1);
    let results = Results::default();
    let (ran, has_run) = mpsc::channel();
    rig.pool.submit(
        Box::new(move || {
            ran.send(()).unwrap();
            Ok(42)
        }),
        results.slot(0),
    );
    has_run.recv().unwrap();
    assert_eq!(rig.pool.in_flight(), 1);
    assert_eq!(results.0.lock().unwrap().len(), 0);
    rig.run_until_idle();
    assert_eq!(results.take(1).remove(0).unwrap(), 42);
}

#[test]
fn an_idle_worker_is_used_again() {
    let rig = PoolRig::new(8);
    let results = Results::default();
    for i in 0..100 {
        rig.pool.submit(Box::new(move || Ok(i)), results.slot(i));
        rig.run_until_idle();
    }
    results.take(100).into_iter().enumerate().for_each(|(i, r)| assert_eq!(r.unwrap(), i));
    // The first may not have got back to waiting when the next job came, so it is not always exactly one.
    assert!(rig.pool.workers() <= 8);
    assert!(rig.pool.workers() >= 1);
}

#[test]
fn queued_jobs_are_cancelled_and_started_ones_finish() {
    const WORKERS: usize = 4;
    let rig = PoolRig::new(WORKERS);
    let results = Results::default();
    let (started_tx, started_rx) = mpsc::channel();
    let (hold, held) = mpsc::channel::<()>();
    let held = Arc::new(Mutex::new(held));
    let mut ids = Vec::new();
    for i in 0..100 {
        let (started, held) = (started_tx.clone(), Arc::clone(&held));
        let job = move || {
            started.send(i).unwrap();
            held.lock().unwrap().recv().ok();
            Ok(i)
        };
        ids.push(rig.pool.submit(Box::new(job), results.slot(i)));
    }
    let started: Vec<usize> = (0..WORKERS).map(|_| started_rx.recv().unwrap()).collect();
    for (i, id) in ids.iter().enumerate() {
        assert_eq!(rig.pool.cancel(*id), !started.contains(&i), "job {i}");
    }
    for id in ids {
        assert!(!rig.pool.cancel(id), "a second time there is nothing to cancel");
    }
    assert_eq!(results.0.lock().unwrap().len(), 0, "cancel calls no completion");
    drop(hold);
    rig.run_until_idle();
    for (i, result) in results.take(100).into_iter().enumerate() {
        if started.contains(&i) {
            assert_eq!(result.unwrap(), i);
        } else {
            assert_eq!(errno(result), libc::ECANCELED);
        }
    }
    drop(started_tx);
    assert_eq!(started_rx.try_iter().count(), 0, "a cancelled job never runs");
}

#[test]
fn a_panicking_job_reports_it_and_its_worker_lives_on() {
    let rig = PoolRig::new(1);
    let results = Results::default();
    rig.pool.submit(Box::new(|| panic!("at the {}", "disco")), results.slot(0));
    rig.pool.submit(Box::new(|| panic!("plain")), results.slot(1));
    rig.pool.submit(Box::new(|| Ok(3)), results.slot(2));
    rig.run_until_idle();
    let mut results = results.take(3);
    assert_eq!(results.pop().unwrap().unwrap(), 3);
    assert!(results.pop().unwrap().unwrap_err().to_string().ends_with("panicked: plain"));
    assert!(results.pop().unwrap().unwrap_err().to_string().ends_with("panicked: at the disco"));
    assert_eq!(rig.pool.workers(), 1);
}

#[test]
fn idle_workers_end_and_come_back_for_new_work() {
    let (woken, wake) = waker();
    let pool = ThreadPool::with_idle_exit("brief", 2, std::time::Duration::from_millis(1), wake);
    let rig = PoolRig { pool, woken };
    let results = Results::default();
    for i in 0..20 {
        rig.pool.submit(Box::new(move || Ok(i)), results.slot(i));
        rig.run_until_idle();
        let gone = (0..PATIENCE_S * 1000).any(|_| {
            thread::sleep(std::time::Duration::from_millis(1));
            rig.pool.workers() == 0
        });
        assert!(gone, "the workers had nothing to do");
    }
    results.take(20).into_iter().enumerate().for_each(|(i, r)| assert_eq!(r.unwrap(), i));
}

#[test]
fn dropping_a_pool_finishes_what_runs_and_forgets_what_waits() {
    let rig = PoolRig::new(1);
    let finished = Arc::new(AtomicUsize::new(0));
    let (started_tx, started_rx) = mpsc::channel();
    let (hold, held) = mpsc::channel::<()>();
    let of_job = Arc::clone(&finished);
    let job = move || {
        started_tx.send(()).unwrap();
        held.recv().ok();
        of_job.fetch_add(1, Ordering::SeqCst);
        Ok(0)
    };
    rig.pool.submit(Box::new(job), Box::new(|_| panic!("not reaped")));
    rig.pool.submit(Box::new(|| panic!("must not run")), Box::new(|_| panic!("not reaped")));
    started_rx.recv().unwrap();
    let helper = thread::spawn(move || drop(hold));
    drop(rig);
    assert_eq!(finished.load(Ordering::SeqCst), 1);
    helper.join().unwrap();
}

#[test]
fn without_any_worker_the_job_fails_and_is_not_lost() {
    thread::spawn(|| {
        let rig = PoolRig::new(4);
        refuse_syscalls(&[libc::SYS_clone, libc::SYS_clone3], libc::EAGAIN);
        let results = Results::default();
        rig.pool.submit(Box::new(|| Ok(1)), results.slot(0));
        rig.run_until_idle();
        assert_eq!(results.take(1).remove(0).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(rig.pool.workers(), 0);
    })
    .join()
    .unwrap();
}

#[test]
fn one_wake_stands_for_many_results() {
    let wakes = Arc::new(AtomicUsize::new(0));
    let of_wake = Arc::clone(&wakes);
    let wake = move || {
        of_wake.fetch_add(1, Ordering::SeqCst);
    };
    let pool = ThreadPool::new("count", 1, Arc::new(wake));
    let results = Results::default();
    let mut out = Finished::new();
    for round in 1..=3 {
        for i in 0..50 {
            pool.submit(Box::new(move || Ok(i)), results.slot(i));
        }
        // The only worker begins this one after it has published the fifty before.
        let (begun, begins) = mpsc::channel();
        let (go_on, may_end) = mpsc::channel::<()>();
        let last = move || {
            begun.send(()).unwrap();
            may_end.recv().unwrap();
            Ok(50)
        };
        pool.submit(Box::new(last), results.slot(50));
        begins.recv().unwrap();
        assert_eq!(wakes.load(Ordering::SeqCst), 2 * round - 1, "of fifty results");
        pool.reap(&mut out);
        assert_eq!(out.len(), 50);
        // The next result after a reap wakes again, once it is there.
        go_on.send(()).unwrap();
        super::nbd_common::wait_for("the last wakes", || wakes.load(Ordering::SeqCst) == 2 * round);
        pool.reap(&mut out);
        assert_eq!(out.len(), 51);
        out.drain(..).for_each(|(done, r)| done(r));
        results.take(51);
    }
}

#[test]
fn a_thread_engine_names_its_workers_after_the_context() {
    let (woken, wake) = waker();
    let mut rig = Rig { woken, engine: Box::new(ThreadEngine::new("ctx0-io", 2, wake)) };
    let file = tempfile::tempfile().unwrap();
    rig.run(Op::Fsync { fd: file.as_raw_fd(), datasync: true }).unwrap();
    assert!(has_thread("ctx0-io-w0"));
}
