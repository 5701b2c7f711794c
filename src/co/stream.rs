//! CoStream: a non-blocking stream socket whose reads and writes park the coroutine on readiness.
//!
//! The poller is edge-triggered: it reports once that something came. So each direction has a sticky flag: it is set by the
//! handler, and cleared only by a system call that found the socket drained or full. Every call tries first if the flag is set, and
//! parks only if it is not; a byte that came earlier is never missed. A read that got less than it asked for has
//! drained the socket (epoll(7), "stream-oriented files"), which saves the call that would only say
//! `WouldBlock`; not so once the peer has closed, because the end of file gives no second edge.
//!
//! The handler wants to hear about space only while somebody waits for it, and a little longer: a unix socket tells of space whenever
//! the peer takes something, and each time would wake the loop for nothing.
//!
//! One coroutine may wait to read while another waits to write; two waiters of one kind are misuse (panic).
//!
//! Threads: reads, writes, deadlines and moving belong to the context that the stream is attached to; `interrupt`, `kick_reader`,
//! `shutdown` and dropping are for any thread. Nothing here allocates per operation.
//!
//! Deadlines: a timer is armed only when somebody really waits, and then left armed: while deadlines only move ahead it
//! fires at most once per period, not once per wait.

use super::coroutine::{Coroutine, Running, co_reschedule_self, co_yield, running};
use super::waiter::WaiterSlot;
use crate::aio::{AioContext, HandlerId, Interest, Readiness, Timer};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use std::fmt;
use std::io;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Most vectors per `sendmsg`: the kernel's `IOV_MAX` (`UIO_MAXIOV`).
const IOV_MAX: usize = 1024;

/// "No deadline", and "the timer is not armed".
const NEVER: u64 = u64::MAX;

/// Waits for reading, none for writing between them, after which nobody listens for space any more (ours: a change is a system
/// call, and so is each wake-up for nothing).
const QUIET_WRITES: u32 = 16;

/// One direction of a stream.
struct Side {
    /// Sticky: the next call may succeed. Written by the home thread.
    ready: AtomicBool,
    waiter: WaiterSlot,
    /// Nanoseconds of the context's clock; NEVER for none.
    deadline_ns: AtomicU64,
    /// When the timer fires; NEVER if it is not armed.
    armed_ns: AtomicU64,
    timer: Mutex<Option<Timer>>,
}

impl Side {
    fn new() -> Side {
        Side {
            // Unknown: try.
            ready: AtomicBool::new(true),
            waiter: WaiterSlot::new(),
            deadline_ns: AtomicU64::new(NEVER),
            armed_ns: AtomicU64::new(NEVER),
            timer: Mutex::new(None),
        }
    }

    fn set_ready(&self) {
        self.ready.store(true, Ordering::Relaxed);
        if let Some(co) = self.waiter.take() {
            co.wake();
        }
    }

    fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    fn drained(&self) {
        self.ready.store(false, Ordering::Relaxed);
    }

    /// Wakes whoever waits, never inside this call.
    fn kick(&self) {
        if let Some(co) = self.waiter.take() {
            co.wake_later();
        }
    }

    fn timer(&self) -> MutexGuard<'_, Option<Timer>> {
        self.timer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The timer fired.
    fn expired(&self, ctx: &AioContext) {
        self.armed_ns.store(NEVER, Ordering::Relaxed);
        if !self.waiter.is_taken() {
            return;
        }
        let deadline_ns = self.deadline_ns.load(Ordering::Relaxed);
        if deadline_ns > ctx.now_ns() {
            // It moved ahead since the timer was armed.
            if deadline_ns != NEVER
                && let Some(timer) = &*self.timer()
            {
                timer.mod_ns(deadline_ns);
                self.armed_ns.store(deadline_ns, Ordering::Relaxed);
            }
            return;
        }
        if let Some(co) = self.waiter.take() {
            co.wake();
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

/// Where a stream is registered.
struct Attachment {
    ctx: Arc<AioContext>,
    /// None while moving, and after a failed move.
    handler: Option<HandlerId>,
    /// While the handler hears about space: waits for reading since the last one for writing.
    hears_space: Option<u32>,
}

/// A connected stream socket (TCP or unix), attached to one context at a time. Shared by `Arc`.
pub struct CoStream {
    /// Always there until `drop`.
    fd: Option<OwnedFd>,
    weak: Weak<CoStream>,
    read: Side,
    write: Side,
    /// The peer has closed its side (or all): reading does not block any more.
    closed: AtomicBool,
    interrupted: AtomicBool,
    kicked: AtomicBool,
    /// Address of the attached context, to check callers cheaply.
    home_id: AtomicUsize,
    at: Mutex<Attachment>,
}

impl CoStream {
    /// Takes a connected socket, makes it non-blocking, and attaches it to the calling thread's context.
    /// Never yields.
    ///
    /// # Errors
    /// What fcntl or epoll reports.
    ///
    /// # Panics
    /// In a thread without a context.
    pub fn new(fd: OwnedFd) -> io::Result<Arc<CoStream>> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        let ctx = AioContext::current().expect("a CoStream needs an AioContext to be attached to");
        let stream = Arc::new_cyclic(|weak| CoStream {
            fd: Some(fd),
            weak: weak.clone(),
            read: Side::new(),
            write: Side::new(),
            closed: AtomicBool::new(false),
            interrupted: AtomicBool::new(false),
            kicked: AtomicBool::new(false),
            home_id: AtomicUsize::new(0),
            at: Mutex::new(Attachment { ctx: Arc::clone(&ctx), handler: None, hears_space: None }),
        });
        stream.attach(ctx)?;
        Ok(stream)
    }

    /// Reads what is there; yields while there is nothing. 0 is EOF (or an empty `buf`). Coroutine only.
    ///
    /// # Errors
    /// What `recv` reports; and while waiting: `ConnectionAborted` after [`CoStream::interrupt`], `TimedOut` past
    /// the deadline, `Interrupted` after [`CoStream::kick_reader`].
    pub fn co_read(&self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.try_read(buf) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.co_wait(Direction::Read)?,
                other => return other,
            }
        }
    }

    /// Fills `buf` or fails with `UnexpectedEof`. Coroutine only. After an error the bytes read so far are lost: who
    /// expects a kick or a deadline in the middle uses [`CoStream::co_read`] and keeps count.
    ///
    /// # Errors
    /// As [`CoStream::co_read`].
    pub fn co_read_exact(&self, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            let n = self.co_read(buf)?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            buf = &mut buf[n..];
        }
        Ok(())
    }

    /// Reads without waiting. `WouldBlock` when there is nothing: without a system call if the last read drained
    /// the socket and the loop has not reported more since. Home thread only. Never yields.
    ///
    /// # Errors
    /// What `recv` reports.
    pub fn try_read(&self, buf: &mut [u8]) -> io::Result<usize> {
        if !self.read.is_ready() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let wanted = buf.len();
        let got = rustix::io::retry_on_intr(|| {
            rustix::net::recv(self.fd(), &mut *buf, RecvFlags::empty()).map(|(n, _)| n)
        });
        match got {
            Ok(n) => {
                // Short: drained. Not at the end of file (0), nor if that is what comes next.
                if n > 0 && n < wanted && !self.closed.load(Ordering::Relaxed) {
                    self.read.drained();
                }
                Ok(n)
            }
            Err(Errno::AGAIN) => {
                self.read.drained();
                Err(io::ErrorKind::WouldBlock.into())
            }
            Err(e) => Err(e.into()),
        }
    }

    /// Yields until the socket may be readable (data, EOF or error). Needs no buffer. Coroutine only.
    ///
    /// # Errors
    /// `ConnectionAborted` after [`CoStream::interrupt`]; `TimedOut` past the deadline; `Interrupted` after
    /// [`CoStream::kick_reader`].
    pub fn co_wait_readable(&self) -> io::Result<()> {
        self.co_wait(Direction::Read)
    }

    /// Yields until the socket may be writable (space or error). Coroutine only.
    ///
    /// # Errors
    /// `ConnectionAborted` after [`CoStream::interrupt`]; `TimedOut` past the deadline.
    pub fn co_wait_writable(&self) -> io::Result<()> {
        self.co_wait(Direction::Write)
    }

    /// Sends all of `bufs` (sendmsg, `MSG_NOSIGNAL`); yields while the peer does not read. Coroutine only. `bufs` is
    /// used up.
    ///
    /// # Errors
    /// What `sendmsg` reports; `ConnectionAborted` after [`CoStream::interrupt`]; `TimedOut` past the deadline.
    /// How much was sent is then unknown: the stream cannot be used for writing any more.
    pub fn co_writev_all(&self, mut bufs: &mut [IoSlice<'_>]) -> io::Result<()> {
        // Drops leading empty ones.
        IoSlice::advance_slices(&mut bufs, 0);
        while !bufs.is_empty() {
            match self.try_writev(bufs) {
                Ok(n) => IoSlice::advance_slices(&mut bufs, n),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.co_wait(Direction::Write)?,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Sends all of `buf`: [`CoStream::co_writev_all`] of one vector. Coroutine only.
    ///
    /// # Errors
    /// As [`CoStream::co_writev_all`].
    pub fn co_write_all(&self, buf: &[u8]) -> io::Result<()> {
        self.co_writev_all(&mut [IoSlice::new(buf)])
    }

    /// Sends without waiting; returns the bytes taken, which may be part (`WouldBlock` when none; without a system
    /// call if the socket was full and the loop has not reported space since). At most `IOV_MAX` vectors are looked
    /// at. Home thread only. Never yields.
    ///
    /// # Errors
    /// What `sendmsg` reports.
    pub fn try_writev(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        if !self.write.is_ready() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let bufs = &bufs[..bufs.len().min(IOV_MAX)];
        let sent = rustix::io::retry_on_intr(|| match bufs {
            // The kernel has less to copy in and to check.
            [only] => rustix::net::send(self.fd(), only, SendFlags::NOSIGNAL),
            _ => {
                let mut control = SendAncillaryBuffer::default();
                rustix::net::sendmsg(self.fd(), bufs, &mut control, SendFlags::NOSIGNAL)
            }
        });
        match sent {
            Ok(n) => {
                if n < bufs.iter().map(|b| b.len()).sum() {
                    self.write.drained();
                }
                Ok(n)
            }
            Err(Errno::AGAIN) => {
                self.write.drained();
                Err(io::ErrorKind::WouldBlock.into())
            }
            Err(e) => Err(e.into()),
        }
    }

    /// Sends up to `len` bytes of a file from `offset` on, without a copy (`sendfile`); otherwise as
    /// [`CoStream::try_writev`]. Waits for the disk if the pages are not in the page cache: ask before. 0: the file ends
    /// there. Home thread only. Never yields.
    ///
    /// # Errors
    /// What `sendfile` reports.
    pub fn try_send_file(&self, file: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<usize> {
        if !self.write.is_ready() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let sent = rustix::io::retry_on_intr(|| {
            let mut at = offset;
            rustix::fs::sendfile(self.fd(), file, Some(&mut at), len)
        });
        match sent {
            // Less than asked may mean a full socket or the end of the file: the next call tells.
            Ok(n) => Ok(n),
            Err(Errno::AGAIN) => {
                self.write.drained();
                Err(io::ErrorKind::WouldBlock.into())
            }
            Err(e) => Err(e.into()),
        }
    }

    /// Tells whether the socket is a unix socket. One system call.
    #[must_use]
    pub fn is_unix(&self) -> bool {
        rustix::net::sockopt::socket_domain(self.fd()).is_ok_and(|d| d == rustix::net::AddressFamily::UNIX)
    }

    /// Bounds the following waits for reading: absolute nanoseconds of the context's clock, None for no bound.
    /// Home thread only.
    pub fn set_read_deadline(&self, deadline_ns: Option<u64>) {
        self.read.deadline_ns.store(deadline_ns.unwrap_or(NEVER), Ordering::Relaxed);
    }

    /// Bounds the following waits for writing. Home thread only.
    pub fn set_write_deadline(&self, deadline_ns: Option<u64>) {
        self.write.deadline_ns.store(deadline_ns.unwrap_or(NEVER), Ordering::Relaxed);
    }

    /// Makes present and future waits fail with `ConnectionAborted`. What needs no waiting still works. Any
    /// thread; runs nobody inside this call.
    pub fn interrupt(&self) {
        // Release, and the slot's exchange: pairs with the second look in `co_wait`.
        self.interrupted.store(true, Ordering::Release);
        self.read.kick();
        self.write.kick();
    }

    /// Tells whether [`CoStream::interrupt`] was called. Any thread.
    #[must_use]
    pub fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Acquire)
    }

    /// Makes the present or next wait for *reading* return `Err(Interrupted)` once, without losing data. Any
    /// thread; runs nobody inside this call.
    pub fn kick_reader(&self) {
        self.kicked.store(true, Ordering::Release);
        self.read.kick();
    }

    /// Tells whether the peer is known to have closed its side; data may still be there. Any thread.
    #[must_use]
    pub fn peer_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Moves the stream and the calling coroutine to another context. Nobody else may be waiting on it. Yields,
    /// unless it is there already. Deadlines are kept: contexts share one monotonic clock.
    ///
    /// # Errors
    /// What epoll reports; the stream is then detached, and waiting fails with `NotConnected`.
    ///
    /// # Panics
    /// When somebody waits on it, or the caller is not on its context.
    #[track_caller]
    pub fn co_move_to(&self, ctx: &Arc<AioContext>) -> io::Result<()> {
        self.check_home(running().expect("only a coroutine can move a CoStream"));
        let waited_on = self.read.waiter.is_taken() || self.write.waiter.is_taken();
        assert!(!waited_on, "CoStream moved while somebody waits on it");
        if Arc::as_ptr(ctx) as usize == self.home_id.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.detach();
        co_reschedule_self(ctx);
        self.attach(Arc::clone(ctx))
    }

    /// `shutdown(SHUT_WR)`, `SHUT_RD` or both. Any thread. Never yields.
    ///
    /// # Errors
    /// What `shutdown` reports.
    pub fn shutdown(&self, how: std::net::Shutdown) -> io::Result<()> {
        use rustix::net::Shutdown;
        let how = match how {
            std::net::Shutdown::Read => Shutdown::Read,
            std::net::Shutdown::Write => Shutdown::Write,
            std::net::Shutdown::Both => Shutdown::Both,
        };
        Ok(rustix::net::shutdown(self.fd(), how)?)
    }

    /// The raw descriptor.
    #[must_use]
    pub fn raw_fd(&self) -> RawFd {
        self.fd().as_raw_fd()
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_ref().expect("taken only by drop").as_fd()
    }

    fn side(&self, direction: Direction) -> &Side {
        match direction {
            Direction::Read => &self.read,
            Direction::Write => &self.write,
        }
    }

    /// Waits for the sticky flag of one direction.
    #[track_caller]
    fn co_wait(&self, direction: Direction) -> io::Result<()> {
        let side = self.side(direction);
        let me = running().expect("only a coroutine can wait on a CoStream");
        loop {
            if let Some(e) = self.wait_error(direction) {
                return Err(e);
            }
            if side.is_ready() {
                return Ok(());
            }
            if self.home_id.load(Ordering::Relaxed) == 0 {
                // A move failed half way: nobody would tell us anything.
                return Err(io::ErrorKind::NotConnected.into());
            }
            self.check_home(me);
            self.listen(direction)?;
            let deadline_ns = side.deadline_ns.load(Ordering::Relaxed);
            if deadline_ns != NEVER && !self.arm(direction, deadline_ns) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            assert!(
                side.waiter.put(me.handle()).is_ok(),
                "two coroutines wait for one direction of a CoStream"
            );
            // An interrupt by another thread may have come before we were in the slot; then nobody takes us out,
            // unless it is doing so right now.
            if self.interruption_pending(direction) && side.waiter.take().is_some() {
                continue;
            }
            co_yield();
            // Still there after a stray wake.
            drop(side.waiter.take());
        }
    }

    /// Sees to it that the handler hears about what is waited for, and about space not for much longer than that.
    fn listen(&self, direction: Direction) -> io::Result<()> {
        let at = &mut *self.at();
        let Some(handler) = at.handler else { return Ok(()) };
        match (direction, at.hears_space) {
            (Direction::Read, None) => {}
            (Direction::Write, Some(_)) => at.hears_space = Some(0),
            (Direction::Write, None) => {
                // Space that is there already is reported, too.
                at.ctx.change_handler(handler, Interest::ReadWrite)?;
                at.hears_space = Some(0);
            }
            (Direction::Read, Some(n)) if n < QUIET_WRITES => at.hears_space = Some(n + 1),
            (Direction::Read, Some(_)) => {
                // Not while somebody waits for it: then it is needed.
                if !self.write.waiter.is_taken() {
                    at.ctx.change_handler(handler, Interest::Read)?;
                    at.hears_space = None;
                }
            }
        }
        Ok(())
    }

    fn interruption_pending(&self, direction: Direction) -> bool {
        self.interrupted.load(Ordering::Acquire)
            || (direction == Direction::Read && self.kicked.load(Ordering::Acquire))
    }

    fn wait_error(&self, direction: Direction) -> Option<io::Error> {
        if self.interrupted.load(Ordering::Acquire) {
            return Some(io::ErrorKind::ConnectionAborted.into());
        }
        let kicked = direction == Direction::Read
            && self.kicked.load(Ordering::Relaxed)
            && self.kicked.swap(false, Ordering::AcqRel);
        kicked.then(|| io::ErrorKind::Interrupted.into())
    }

    /// Sees to it that somebody wakes us at the deadline; false if it has passed.
    fn arm(&self, direction: Direction, deadline_ns: u64) -> bool {
        let ctx = AioContext::current().expect("checked to be at home");
        if ctx.now_ns() >= deadline_ns {
            return false;
        }
        let side = self.side(direction);
        if side.armed_ns.load(Ordering::Relaxed) <= deadline_ns {
            return true;
        }
        let mut timer = side.timer();
        let timer = timer.get_or_insert_with(|| {
            let weak = self.weak.clone();
            ctx.timer_new(move || {
                if let (Some(stream), Some(ctx)) = (weak.upgrade(), AioContext::current()) {
                    stream.side(direction).expired(&ctx);
                }
            })
        });
        timer.mod_ns(deadline_ns);
        side.armed_ns.store(deadline_ns, Ordering::Relaxed);
        true
    }

    #[track_caller]
    fn check_home(&self, me: Running) {
        let home = self.home_id.load(Ordering::Relaxed);
        assert!(
            home != 0 && home == me.home_id(),
            "CoStream used by a coroutine of another context than the one it is attached to"
        );
    }

    fn at(&self) -> MutexGuard<'_, Attachment> {
        self.at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers with `ctx`, the calling thread's context.
    fn attach(&self, ctx: Arc<AioContext>) -> io::Result<()> {
        // What the socket has to say now is reported by the first poll; until then: unknown, so try.
        self.read.ready.store(true, Ordering::Relaxed);
        self.write.ready.store(true, Ordering::Relaxed);
        let weak = self.weak.clone();
        let on_ready = move |r: Readiness| {
            if let Some(stream) = weak.upgrade() {
                stream.on_ready(r);
            }
        };
        let handler = ctx.add_handler(self.raw_fd(), Interest::Read, on_ready)?;
        self.home_id.store(Arc::as_ptr(&ctx) as usize, Ordering::Relaxed);
        *self.at() = Attachment { ctx, handler: Some(handler), hears_space: None };
        Ok(())
    }

    /// Unregisters from the calling thread's context.
    fn detach(&self) {
        for side in [&self.read, &self.write] {
            *side.timer() = None;
            side.armed_ns.store(NEVER, Ordering::Relaxed);
        }
        let mut at = self.at();
        let handler = at.handler.take();
        let ctx = Arc::clone(&at.ctx);
        drop(at);
        self.home_id.store(0, Ordering::Relaxed);
        if let Some(id) = handler {
            ctx.remove_handler(id);
        }
    }

    /// The handler: home thread, plain code, so a waiter runs right here.
    fn on_ready(&self, r: Readiness) {
        if r.closed {
            self.closed.store(true, Ordering::Relaxed);
        }
        if r.readable || r.closed {
            self.read.set_ready();
        }
        if r.writable {
            self.write.set_ready();
        }
    }
}

impl Drop for CoStream {
    fn drop(&mut self) {
        let at = self.at.get_mut().unwrap_or_else(PoisonError::into_inner);
        let Some(handler) = at.handler.take() else { return };
        if at.ctx.is_home() {
            at.ctx.remove_handler(handler);
            return;
        }
        // The descriptor stays open until its registration is gone. If that loop never turns again, the
        // closure is dropped with it, and closes the descriptor.
        let fd = self.fd.take();
        let home = Arc::downgrade(&at.ctx);
        at.ctx.bh_schedule_oneshot(move || {
            if let Some(ctx) = home.upgrade() {
                ctx.remove_handler(handler);
            }
            drop(fd);
        });
    }
}

impl fmt::Debug for CoStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CoStream")
            .field("fd", &self.fd.as_ref().map(AsRawFd::as_raw_fd))
            .field("readable", &self.read.is_ready())
            .field("writable", &self.write.is_ready())
            .finish_non_exhaustive()
    }
}

/// Yields until `fd` is readable (`yield_until_fd_readable`); tries nothing itself, and returns at once after a turn of the
/// loop if it is readable already. Coroutine only. Its context must have no other handler for `fd`.
///
/// # Errors
/// What epoll reports: `EPERM` for a regular file, `EEXIST` if the fd has a handler.
#[track_caller]
pub fn co_yield_until_fd_readable(fd: RawFd) -> io::Result<()> {
    co_yield_until_fd(fd, Interest::Read)
}

/// Yields until `fd` is writable. Coroutine only. As [`co_yield_until_fd_readable`].
///
/// # Errors
/// What epoll reports.
#[track_caller]
pub fn co_yield_until_fd_writable(fd: RawFd) -> io::Result<()> {
    co_yield_until_fd(fd, Interest::Write)
}

#[track_caller]
fn co_yield_until_fd(fd: RawFd, interest: Interest) -> io::Result<()> {
    let me = Coroutine::current().expect("only a coroutine can wait for a descriptor");
    let ctx = AioContext::current().expect("waiting for a descriptor needs an AioContext");
    let ready = Arc::new(AtomicBool::new(false));
    // Registering reports what is ready now: nothing that came earlier is missed.
    let id = ctx.add_handler(fd, interest, {
        let (ready, co) = (Arc::clone(&ready), me);
        move |r| {
            let wanted = match interest {
                Interest::Read => r.readable || r.closed,
                _ => r.writable,
            };
            if wanted && !ready.swap(true, Ordering::Relaxed) {
                co.wake();
            }
        }
    })?;
    while !ready.load(Ordering::Relaxed) {
        co_yield();
    }
    ctx.remove_handler(id);
    Ok(())
}
