//! CoStream on an edge-triggered poller: nothing that came earlier is missed; interrupts, deadlines, moving.

use crate::co_coroutine::{Count, context, iothread, panic_of, run_on};
use conbd::aio::{AioConfig, AioContext, Clock};
use conbd::co::{
    CoStream, Coroutine, Outcome, co_yield, co_yield_until_fd_readable, co_yield_until_fd_writable,
};
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

/// Only ends a test that would hang; nothing is measured.
const HANG: Duration = Duration::from_secs(60);

fn pair() -> (Arc<CoStream>, UnixStream) {
    let (ours, peer) = UnixStream::pair().unwrap();
    peer.set_read_timeout(Some(HANG)).unwrap();
    (CoStream::new(ours.into()).unwrap(), peer)
}

fn tcp_pair() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    peer.set_read_timeout(Some(HANG)).unwrap();
    (listener.accept().unwrap().0.into(), peer)
}

/// Turns the loop a few times without blocking.
fn turn(ctx: &Arc<AioContext>) {
    for _ in 0..3 {
        ctx.poll(false);
    }
}

type Results = Arc<Mutex<Vec<String>>>;

/// A coroutine that runs `f` on the stream and notes what it returns.
fn spawn<T: std::fmt::Debug>(
    stream: &Arc<CoStream>,
    out: &Results,
    f: impl FnOnce(&CoStream) -> io::Result<T> + Send + 'static,
) -> Coroutine {
    let (stream, out) = (Arc::clone(stream), Arc::clone(out));
    let co = Coroutine::new(move || {
        let text = match f(&stream) {
            Ok(v) => format!("{v:?}"),
            Err(e) => format!("{:?}", e.kind()),
        };
        out.lock().unwrap().push(text);
    });
    co.enter();
    co
}

fn read_text(s: &CoStream, len: usize) -> io::Result<String> {
    let mut buf = vec![0; len];
    let n = s.co_read(&mut buf)?;
    Ok(String::from_utf8(buf[..n].to_vec()).unwrap())
}

fn taken(out: &Results) -> Vec<String> {
    std::mem::take(&mut out.lock().unwrap())
}

#[test]
fn a_byte_that_came_before_anybody_waited_is_not_missed() {
    let ctx = context();
    let (stream, mut peer) = pair();
    peer.write_all(b"early").unwrap();
    // The edge is reported while nobody waits.
    turn(&ctx);
    let out = Results::default();
    spawn(&stream, &out, |s| read_text(s, 16));
    assert_eq!(taken(&out), ["\"early\""]);
}

#[test]
fn bytes_left_by_a_full_read_are_read_without_a_new_edge() {
    let ctx = context();
    let (stream, mut peer) = pair();
    peer.write_all(b"abcdef").unwrap();
    let out = Results::default();
    for expected in ["\"ab\"", "\"cd\"", "\"ef\""] {
        spawn(&stream, &out, |s| read_text(s, 2));
        assert_eq!(taken(&out), [expected]);
    }
    // Now it is empty, which only the next try finds out.
    spawn(&stream, &out, |s| read_text(s, 2));
    turn(&ctx);
    assert!(taken(&out).is_empty());
    peer.write_all(b"g").unwrap();
    turn(&ctx);
    assert_eq!(taken(&out), ["\"g\""]);
}

#[test]
fn a_short_read_saves_the_call_that_would_block_and_misses_nothing() {
    let ctx = context();
    let (stream, mut peer) = pair();
    peer.write_all(b"abc").unwrap();
    assert_eq!(stream.try_read(&mut [0; 16]).unwrap(), 3);
    // Known to be drained: there is no system call that could see this byte before the loop has.
    peer.write_all(b"d").unwrap();
    let mut buf = [0; 16];
    assert_eq!(stream.try_read(&mut buf).unwrap_err().kind(), ErrorKind::WouldBlock);
    turn(&ctx);
    assert_eq!(stream.try_read(&mut buf).unwrap(), 1);
    assert_eq!(stream.try_read(&mut buf).unwrap_err().kind(), ErrorKind::WouldBlock);
}

#[test]
fn end_of_file_after_a_short_read_is_seen() {
    for turns_between in [false, true] {
        let ctx = context();
        let (stream, mut peer) = pair();
        turn(&ctx);
        peer.write_all(b"last words").unwrap();
        drop(peer);
        if turns_between {
            // Data and close come as one edge; there is no second one.
            turn(&ctx);
            assert!(stream.peer_closed());
        }
        let out = Results::default();
        spawn(&stream, &out, |s| Ok((read_text(s, 64)?, read_text(s, 64)?)));
        turn(&ctx);
        assert_eq!(taken(&out), ["(\"last words\", \"\")"]);
    }
}

#[test]
fn a_half_closed_peer_still_gets_its_answer() {
    let ctx = context();
    let (stream, mut peer) = pair();
    peer.write_all(b"request").unwrap();
    peer.shutdown(Shutdown::Write).unwrap();
    let out = Results::default();
    spawn(&stream, &out, |s| {
        let request = read_text(s, 64)?;
        let end = read_text(s, 64)?;
        s.co_write_all(b"answer")?;
        s.shutdown(Shutdown::Write)?;
        Ok((request, end))
    });
    turn(&ctx);
    assert_eq!(taken(&out), ["(\"request\", \"\")"]);
    let mut answer = String::new();
    peer.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
}

#[test]
fn read_exact_collects_pieces_and_reports_an_early_end() {
    let ctx = context();
    let (stream, mut peer) = pair();
    let out = Results::default();
    let exact = |s: &CoStream| {
        let mut buf = [0; 6];
        s.co_read_exact(&mut buf).map(|()| String::from_utf8(buf.to_vec()).unwrap())
    };
    spawn(&stream, &out, exact);
    for piece in ["ab", "cd", "ef"] {
        assert!(taken(&out).is_empty());
        peer.write_all(piece.as_bytes()).unwrap();
        turn(&ctx);
    }
    assert_eq!(taken(&out), ["\"abcdef\""]);
    spawn(&stream, &out, exact);
    peer.write_all(b"ab").unwrap();
    turn(&ctx);
    drop(peer);
    turn(&ctx);
    assert_eq!(taken(&out), ["UnexpectedEof"]);
}

#[test]
fn a_reset_connection_is_an_error_for_both_directions() {
    let ctx = context();
    let (fd, peer) = tcp_pair();
    let stream = CoStream::new(fd).unwrap();
    let out = Results::default();
    spawn(&stream, &out, |s| read_text(s, 16));
    turn(&ctx);
    // Unread data makes the close a reset.
    stream.try_writev(&[IoSlice::new(b"never read")]).unwrap();
    drop(peer);
    let mut turns = 0;
    while out.lock().unwrap().is_empty() && turns < 1_000_000 {
        ctx.poll(false);
        turns += 1;
    }
    assert_eq!(taken(&out), ["ConnectionReset"]);
    spawn(&stream, &out, |s| s.co_write_all(b"x"));
    assert_eq!(taken(&out), ["BrokenPipe"]);
}

#[test]
fn a_write_waits_for_a_slow_reader_and_sends_every_byte() {
    let ctx = context();
    let (stream, mut peer) = pair();
    let data: Vec<u8> = (0..3_000_000_u32).map(|n| (n / 7) as u8).collect();
    // Many vectors, empty ones among them; more than one sendmsg takes.
    let out = Results::default();
    let theirs = data.clone();
    let co = spawn(&stream, &out, move |s| {
        let mut bufs: Vec<IoSlice<'_>> = vec![IoSlice::new(&[])];
        for piece in theirs.chunks(1000) {
            bufs.push(IoSlice::new(piece));
            bufs.push(IoSlice::new(&[]));
        }
        s.co_writev_all(&mut bufs)
    });
    assert_eq!(co.outcome(), None);
    assert_eq!(stream.try_writev(&[IoSlice::new(b"x")]).unwrap_err().kind(), ErrorKind::WouldBlock);
    let mut got = Vec::new();
    let mut buf = vec![0; 70_000];
    while got.len() < data.len() {
        let n = peer.read(&mut buf).unwrap();
        got.extend_from_slice(&buf[..n]);
        turn(&ctx);
    }
    assert!(got == data);
    assert_eq!(taken(&out), ["()"]);
}

#[test]
fn writing_nothing_is_done_at_once() {
    let _ctx = context();
    let (stream, _peer) = pair();
    let out = Results::default();
    spawn(&stream, &out, |s| s.co_writev_all(&mut []));
    spawn(&stream, &out, |s| s.co_writev_all(&mut [IoSlice::new(&[]), IoSlice::new(&[])]));
    assert_eq!(taken(&out), ["()", "()"]);
}

#[test]
fn a_writer_and_a_reader_wait_at_once() {
    let ctx = context();
    let (stream, mut peer) = pair();
    let out = Results::default();
    spawn(&stream, &out, |s| read_text(s, 16).map(|t| format!("read {t}")));
    let writer = spawn(&stream, &out, |s| s.co_write_all(&vec![7; 1 << 20]).map(|()| "wrote"));
    turn(&ctx);
    assert!(taken(&out).is_empty());
    peer.write_all(b"hello").unwrap();
    turn(&ctx);
    assert_eq!(taken(&out), ["\"read hello\""]);
    let mut left = 1 << 20;
    let mut buf = vec![0; 65536];
    while left > 0 {
        left -= peer.read(&mut buf).unwrap();
        turn(&ctx);
    }
    assert_eq!(taken(&out), ["\"wrote\""]);
    assert_eq!(writer.outcome(), Some(Outcome::Finished));
}

#[test]
fn two_readers_are_misuse() {
    let _ctx = context();
    let (stream, _peer) = pair();
    let out = Results::default();
    let first = spawn(&stream, &out, |s| read_text(s, 16));
    let second = spawn(&stream, &out, |s| read_text(s, 16));
    assert_eq!(first.outcome(), None);
    assert!(matches!(second.outcome(), Some(Outcome::Panicked(t)) if t.contains("two coroutines wait")));
    stream.interrupt();
}

#[test]
fn a_stray_wake_does_not_end_a_wait() {
    let ctx = context();
    let (stream, mut peer) = pair();
    let out = Results::default();
    let co = spawn(&stream, &out, |s| read_text(s, 16));
    co.wake();
    co.wake();
    assert!(taken(&out).is_empty());
    peer.write_all(b"x").unwrap();
    turn(&ctx);
    assert_eq!(taken(&out), ["\"x\""]);
}

#[test]
fn waiting_for_readiness_needs_no_buffer() {
    let ctx = context();
    let (stream, mut peer) = pair();
    assert_eq!(stream.try_read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::WouldBlock);
    let out = Results::default();
    let co = spawn(&stream, &out, CoStream::co_wait_readable);
    turn(&ctx);
    assert_eq!(co.outcome(), None);
    peer.write_all(b"x").unwrap();
    turn(&ctx);
    spawn(&stream, &out, CoStream::co_wait_writable);
    assert_eq!(taken(&out), ["()", "()"]);
}

// ---- interrupt, kick, deadlines ------------------------------------------------------------------------------

#[test]
fn an_interrupt_ends_present_and_future_waits_but_not_what_needs_no_wait() {
    let ctx = context();
    let (stream, mut peer) = pair();
    let out = Results::default();
    spawn(&stream, &out, |s| read_text(s, 16));
    spawn(&stream, &out, |s| s.co_write_all(&vec![0; 4 << 20]));
    turn(&ctx);
    stream.interrupt();
    // Nobody runs inside the call.
    assert!(taken(&out).is_empty());
    turn(&ctx);
    assert_eq!(taken(&out), ["ConnectionAborted", "ConnectionAborted"]);
    assert!(stream.is_interrupted());
    peer.write_all(b"still there").unwrap();
    turn(&ctx);
    spawn(&stream, &out, |s| read_text(s, 16));
    spawn(&stream, &out, |s| read_text(s, 16));
    assert_eq!(taken(&out), ["\"still there\"", "ConnectionAborted"]);
}

#[test]
fn an_interrupt_from_another_thread_finds_the_waiter_at_any_moment() {
    let io = iothread("io");
    for _ in 0..300 {
        let (tx, rx) = mpsc::channel();
        let (sock, _peer) = UnixStream::pair().unwrap();
        let (stream_tx, stream_rx) = mpsc::channel();
        Coroutine::new(move || {
            let stream = CoStream::new(sock.into()).unwrap();
            stream_tx.send(Arc::clone(&stream)).unwrap();
            tx.send(read_text(&stream, 16).map_err(|e| e.kind())).unwrap();
        })
        .enter_on(io.context());
        let stream = stream_rx.recv_timeout(HANG).unwrap();
        stream.interrupt();
        let r = rx.recv_timeout(HANG).expect("the interrupt was lost");
        assert_eq!(r, Err(ErrorKind::ConnectionAborted));
    }
    io.stop().unwrap();
}

#[test]
fn a_kick_ends_one_wait_for_reading_and_loses_no_data() {
    let ctx = context();
    let (stream, mut peer) = pair();
    let out = Results::default();
    spawn(&stream, &out, |s| read_text(s, 16));
    stream.kick_reader();
    assert!(taken(&out).is_empty());
    turn(&ctx);
    assert_eq!(taken(&out), ["Interrupted"]);
    // Once only.
    let co = spawn(&stream, &out, |s| read_text(s, 16));
    turn(&ctx);
    assert_eq!(co.outcome(), None);
    peer.write_all(b"data").unwrap();
    turn(&ctx);
    assert_eq!(taken(&out), ["\"data\""]);
    // A kick while nobody waits is kept for the next wait; a writer is not meant.
    stream.kick_reader();
    spawn(&stream, &out, |s| s.co_write_all(b"w"));
    spawn(&stream, &out, |s| read_text(s, 16));
    assert_eq!(taken(&out), ["()", "Interrupted"]);
}

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

    fn advance(&self, ns: u64) {
        self.clock.fetch_add(ns, Ordering::SeqCst);
        turn(&self.ctx);
    }
}

#[test]
fn a_read_past_its_deadline_times_out() {
    let still = Still::new();
    let (stream, mut peer) = pair();
    let out = Results::default();
    stream.set_read_deadline(Some(still.ctx.now_ns() + 100));
    spawn(&stream, &out, |s| read_text(s, 16));
    still.advance(99);
    assert!(taken(&out).is_empty());
    still.advance(1);
    assert_eq!(taken(&out), ["TimedOut"]);
    // At once when it has passed, but what is there is still read.
    spawn(&stream, &out, |s| read_text(s, 16));
    assert_eq!(taken(&out), ["TimedOut"]);
    peer.write_all(b"late").unwrap();
    still.advance(0);
    spawn(&stream, &out, |s| read_text(s, 16));
    assert_eq!(taken(&out), ["\"late\""]);
    stream.set_read_deadline(None);
    let co = spawn(&stream, &out, |s| read_text(s, 16));
    still.advance(1_000_000);
    assert_eq!(co.outcome(), None);
    stream.interrupt();
    still.advance(0);
}

#[test]
fn a_deadline_that_moved_ahead_is_kept_and_one_that_moved_closer_too() {
    let still = Still::new();
    let (stream, mut peer) = pair();
    let out = Results::default();
    let now = still.ctx.now_ns();
    // Arms the timer for +100, and ends in time.
    stream.set_read_deadline(Some(now + 100));
    spawn(&stream, &out, |s| read_text(s, 16));
    peer.write_all(b"1").unwrap();
    still.advance(50);
    assert_eq!(taken(&out), ["\"1\""]);
    // The timer fires at +100, but the deadline is +200.
    stream.set_read_deadline(Some(now + 200));
    spawn(&stream, &out, |s| read_text(s, 16));
    still.advance(100);
    assert!(taken(&out).is_empty());
    still.advance(50);
    assert_eq!(taken(&out), ["TimedOut"]);
    // Armed far ahead, then closer.
    stream.set_read_deadline(Some(now + 10_000));
    spawn(&stream, &out, |s| read_text(s, 16));
    peer.write_all(b"2").unwrap();
    still.advance(0);
    assert_eq!(taken(&out), ["\"2\""]);
    stream.set_read_deadline(Some(now + 300));
    spawn(&stream, &out, |s| read_text(s, 16));
    still.advance(100);
    assert_eq!(taken(&out), ["TimedOut"]);
}

#[test]
fn a_write_deadline_bounds_a_peer_that_does_not_read() {
    let still = Still::new();
    let (stream, _peer) = pair();
    let out = Results::default();
    stream.set_write_deadline(Some(still.ctx.now_ns() + 100));
    spawn(&stream, &out, |s| s.co_write_all(&vec![0; 4 << 20]));
    spawn(&stream, &out, |s| read_text(s, 1));
    still.advance(100);
    assert_eq!(taken(&out), ["TimedOut"]);
    stream.interrupt();
    still.advance(0);
}

// ---- threads -------------------------------------------------------------------------------------------------

#[test]
fn a_stream_moves_with_its_coroutine_and_misses_nothing_on_the_way() {
    let (a, b) = (iothread("a"), iothread("b"));
    let (ca, cb) = (Arc::clone(a.context()), Arc::clone(b.context()));
    let (sock, mut peer) = UnixStream::pair().unwrap();
    peer.set_read_timeout(Some(HANG)).unwrap();
    let (tx, rx) = mpsc::channel();
    Coroutine::new(move || {
        let s = CoStream::new(sock.into()).unwrap();
        for n in 0..100 {
            let to = if n % 2 == 0 { &cb } else { &ca };
            let mut byte = [0];
            s.co_read_exact(&mut byte).unwrap();
            s.co_move_to(to).unwrap();
            assert!(to.is_home());
            s.co_move_to(to).unwrap();
            s.co_write_all(&byte).unwrap();
        }
        tx.send(s.co_read(&mut [0]).unwrap()).unwrap();
    })
    .enter_on(a.context());
    for n in 0..100_u8 {
        // The next request is often there before the answer: it waits in the socket while the stream moves.
        peer.write_all(&[n]).unwrap();
        let mut byte = [0];
        peer.read_exact(&mut byte).unwrap();
        assert_eq!(byte[0], n);
    }
    drop(peer);
    assert_eq!(rx.recv_timeout(HANG).unwrap(), 0);
    a.stop().unwrap();
    b.stop().unwrap();
}

#[test]
fn using_a_stream_from_another_context_is_misuse() {
    let _ctx = context();
    let io = iothread("io");
    let (stream, _peer) = pair();
    stream.try_read(&mut [0]).unwrap_err();
    let text = run_on(&io, move || panic_of(|| drop(stream.co_read(&mut [0]))));
    assert!(text.contains("another context"), "{text}");
    io.stop().unwrap();
}

#[test]
fn a_stream_dropped_on_another_thread_is_closed_after_its_registration() {
    let io = iothread("io");
    let (sock, mut peer) = UnixStream::pair().unwrap();
    peer.set_read_timeout(Some(HANG)).unwrap();
    let stream = run_on(&io, move || CoStream::new(sock.into()).unwrap());
    drop(stream);
    assert_eq!(peer.read(&mut [0]).unwrap(), 0);
    io.stop().unwrap();
}

#[test]
fn a_stream_dropped_after_its_loop_has_ended_is_closed() {
    let io = iothread("io");
    let (sock, mut peer) = UnixStream::pair().unwrap();
    peer.set_read_timeout(Some(HANG)).unwrap();
    let stream = run_on(&io, move || CoStream::new(sock.into()).unwrap());
    io.stop().unwrap();
    drop(stream);
    assert_eq!(peer.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_stream_may_be_dropped_by_the_coroutine_that_its_own_event_runs() {
    let ctx = context();
    let (stream, mut peer) = pair();
    let weak = Arc::downgrade(&stream);
    let co = Coroutine::new(move || {
        let mut buf = [0; 8];
        stream.co_read(&mut buf).unwrap();
        drop(stream);
    });
    co.enter();
    peer.write_all(b"x").unwrap();
    turn(&ctx);
    assert_eq!(co.outcome(), Some(Outcome::Finished));
    assert!(weak.upgrade().is_none());
    assert_eq!(peer.read(&mut [0]).unwrap(), 0);
}

#[test]
fn request_and_answer_over_tcp_and_unix_between_two_contexts() {
    const ROUNDS: u32 = 500;
    const SIZE: usize = 40_000;
    for tcp in [false, true] {
        let (a, b) = (iothread("a"), iothread("b"));
        let (x, y): (OwnedFd, OwnedFd) = if tcp {
            let (x, y) = tcp_pair();
            (x, y.into())
        } else {
            let (x, y) = UnixStream::pair().unwrap();
            (x.into(), y.into())
        };
        let (tx, rx) = mpsc::channel();
        let tx2 = tx.clone();
        Coroutine::new(move || {
            let s = CoStream::new(x).unwrap();
            let mut buf = vec![0; SIZE];
            for n in 0..ROUNDS {
                s.co_read_exact(&mut buf[..4]).unwrap();
                let header: [u8; 4] = buf[..4].try_into().unwrap();
                assert_eq!(u32::from_be_bytes(header), n);
                buf.fill(n as u8);
                s.co_writev_all(&mut [IoSlice::new(&header), IoSlice::new(&buf)]).unwrap();
            }
            tx.send(()).unwrap();
        })
        .enter_on(a.context());
        Coroutine::new(move || {
            let s = CoStream::new(y).unwrap();
            let mut buf = vec![0; SIZE + 4];
            for n in 0..ROUNDS {
                s.co_write_all(&n.to_be_bytes()).unwrap();
                s.co_read_exact(&mut buf).unwrap();
                assert_eq!(buf[..4], n.to_be_bytes());
                assert!(buf[4..].iter().all(|&b| b == n as u8));
            }
            tx2.send(()).unwrap();
        })
        .enter_on(b.context());
        for _ in 0..2 {
            rx.recv_timeout(HANG).expect("an edge was missed");
        }
        a.stop().unwrap();
        b.stop().unwrap();
    }
}

// ---- co_yield_until_fd_* -------------------------------------------------------------------------------------

#[test]
fn yielding_until_an_fd_is_readable_sees_what_came_before_and_after() {
    let ctx = context();
    let (sock, mut peer) = UnixStream::pair().unwrap();
    let fd = sock.as_raw_fd();
    let done = Count::default();
    let count = done.clone();
    peer.write_all(b"early").unwrap();
    let co = Coroutine::new(move || {
        co_yield_until_fd_readable(fd).unwrap();
        count.bump();
        let mut sock = sock;
        sock.read_exact(&mut [0; 5]).unwrap();
        co_yield_until_fd_readable(fd).unwrap();
        count.bump();
        co_yield_until_fd_writable(fd).unwrap();
        count.bump();
    });
    co.enter();
    turn(&ctx);
    assert_eq!(done.get(), 1);
    co.wake();
    turn(&ctx);
    assert_eq!(done.get(), 1);
    peer.write_all(b"x").unwrap();
    turn(&ctx);
    turn(&ctx);
    assert_eq!(done.get(), 3);
    assert_eq!(co.outcome(), Some(Outcome::Finished));
}

#[test]
fn a_closed_peer_counts_as_readable_and_a_regular_file_is_an_error() {
    let ctx = context();
    let (sock, peer) = UnixStream::pair().unwrap();
    let fd = sock.as_raw_fd();
    let co = Coroutine::new(move || {
        co_yield_until_fd_readable(fd).unwrap();
        let file = tempfile::tempfile().unwrap();
        let e = co_yield_until_fd_readable(file.as_raw_fd()).unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::EPERM));
        co_yield();
    });
    co.enter();
    turn(&ctx);
    drop(peer);
    turn(&ctx);
    co.enter();
    assert_eq!(co.outcome(), Some(Outcome::Finished));
}
