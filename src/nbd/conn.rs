//! What the coroutines of one connection share: the way out for replies, and the requests that run in coroutines.
//!
//! Home thread only, like all of a session (`session.rs` has the picture and the invariants). The [`Outbox`] lock is a
//! leaf, uncontended, and never held across a yield.
//!
//! Who sends: whoever finishes a reply and finds nobody sending, unless it pays to wait for more. While the reader is at
//! work it sends before it waits; else a bottom half sends what has gathered, one turn after the first of it; a reply
//! that is alone, or a full batch, leaves at once.

use super::budget::{ConnBudget, Reservation};
use super::channel::Channel;
use super::export::Export;
use super::handshake::Negotiated;
use super::meta::{self, MetaContext};
use super::proto::*;
use super::reply::{Batch, FLUSH_AT, Next, Runs};
use super::server::{Shared, ThreadCounters};
use super::wire::{ChunkHeader, ReplyTo, RequestHeader, SimpleReply, StatusExtent};
use crate::aio::{AioContext, BottomHalf};
use crate::block::{self, BlockBackend, StatusFlags, WriteFlags};
use crate::co::{self, Coroutine, co_yield};
use crate::util::buf::IoBuf;
use crate::util::fast;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use tracing::{Span, debug, debug_span, warn};

/// Reads from this many bytes on ask for the block status first when the data is not at hand (ours).
const STATUS_FROM: u32 = 64 << 10;
/// Extents that a read asks about before it just reads the rest (ours).
const STATUS_MAX: usize = 64;
/// Bytes of one step of a long zeroing, trim or prefetch (ours).
const STEP: u64 = 1 << 30;
/// Bytes per `sendmsg` at most (ours).
const SEND_STEP: usize = 1 << 20;
/// Bytes that are read at once where they were to be lent and cannot be any more (ours: rare, and beside the budget, as the
/// connection's receive buffer is).
const READ_STEP: u64 = 32 << 10;
/// What a client must move within the stall timeout, if it moves a whole batch or payload no sooner (ours): a byte now
/// and then is no progress.
const STALL_STEP: usize = 1 << 20;

pub(super) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How far a step of sending came.
enum Sent {
    /// So many bytes more.
    Some(usize),
    /// The whole batch has left.
    All,
    /// Nowhere: a range of the export comes next that cannot be lent. It is to be read.
    Read(Range<u64>),
}

/// Replies on their way out, and who has to do with them.
#[derive(Default)]
pub(super) struct Outbox {
    pub(super) queue: Batch,
    /// Somebody sends; others leave their replies in the queue.
    pub(super) sending: bool,
    /// Requests in coroutines, and the one whose payload is being received.
    pub(super) in_flight: u32,
    /// The reader, waiting for the sender or for the end of all requests.
    pub(super) reader: Option<Coroutine>,
    /// The reader is at work and will send the queue before it waits: replies need not send themselves.
    pub(super) reader_busy: bool,
    /// Sending has failed, or the connection was cut: replies go nowhere.
    pub(super) dead: bool,
    /// The reader has seen that the server shuts down.
    pub(super) draining: bool,
    /// The server was told that nothing is in flight any more.
    pub(super) drained: bool,
}

/// Since when a client keeps memory of ours and moves nothing of it, in nanoseconds of the contexts' clock; 0: it does.
/// Written by the connection's thread, read by whoever looks for stalled clients.
#[derive(Debug, Default)]
pub(super) struct StallClock {
    /// It takes no replies.
    sending: AtomicU64,
    /// It does not send the payload that it has announced.
    receiving: AtomicU64,
}

impl StallClock {
    /// Tells whether one of the two has lasted for `limit_ns`.
    pub(super) fn expired(&self, now_ns: u64, limit_ns: u64) -> bool {
        [&self.sending, &self.receiving].iter().any(|side| {
            let since = side.load(Ordering::Relaxed);
            since != 0 && now_ns.saturating_sub(since) >= limit_ns
        })
    }
}

/// One transfer (a batch of replies, or a payload) as the stall clock sees it. Ends with it.
pub(super) struct Transfer<'a> {
    since: &'a AtomicU64,
    moved: usize,
}

impl Transfer<'_> {
    /// Bytes have been moved.
    pub(super) fn moved(&mut self, n: usize) {
        self.moved += n;
        if self.moved >= STALL_STEP {
            self.moved = 0;
            self.since.store(0, Ordering::Relaxed);
        }
    }

    /// The client does not have to be waited for any more.
    fn goes_on(&self) {
        self.since.store(0, Ordering::Relaxed);
    }

    /// The client has to be waited for.
    pub(super) fn waits(&self, now_ns: u64) {
        if self.since.load(Ordering::Relaxed) == 0 {
            self.since.store(now_ns.max(1), Ordering::Relaxed);
        }
    }
}

impl Drop for Transfer<'_> {
    fn drop(&mut self) {
        self.since.store(0, Ordering::Relaxed);
    }
}

/// What the coroutines of one connection share.
pub(super) struct Conn {
    pub(super) shared: Arc<Shared>,
    pub(super) stream: Channel,
    pub(super) ctx: Arc<AioContext>,
    pub(super) counters: Arc<ThreadCounters>,
    pub(super) id: u64,
    pub(super) peer: String,
    pub(super) export: Arc<Export>,
    pub(super) flags: TransmissionFlags,
    pub(super) style: HeaderStyle,
    pub(super) contexts: Vec<MetaContext>,
    /// Reads of at least this many bytes may be sent from the page cache; `usize::MAX`: none.
    pub(super) lend_from: usize,
    pub(super) budget: Arc<ConnBudget>,
    pub(super) outbox: Mutex<Outbox>,
    /// Sends what has gathered in the queue, a turn after the first of it.
    pub(super) flush_bh: OnceLock<BottomHalf>,
    /// Requests answered with an error.
    pub(super) errors: AtomicU64,
    stall: Arc<StallClock>,
    pub(super) began_ns: u64,
    /// The connection's; disabled unless at debug level.
    span: Span,
}

impl Conn {
    pub(super) fn new(
        shared: &Arc<Shared>,
        stream: &Channel,
        ctx: &Arc<AioContext>,
        counters: Arc<ThreadCounters>,
        id: u64,
        peer: String,
        negotiated: Negotiated,
    ) -> Arc<Conn> {
        let config = &shared.config;
        let budget = ConnBudget::new(config.conn_bytes, config.conn_requests, shared.daemon.clone());
        let conn = Arc::new(Conn {
            shared: shared.clone(),
            stream: stream.clone(),
            ctx: ctx.clone(),
            counters,
            id,
            peer,
            export: negotiated.export,
            flags: negotiated.flags,
            style: negotiated.style,
            contexts: negotiated.contexts,
            lend_from: if stream.takes_files() { fast::paths().lend_from } else { usize::MAX },
            budget,
            outbox: Mutex::default(),
            flush_bh: OnceLock::new(),
            errors: AtomicU64::new(0),
            stall: shared.stall_clock(id),
            began_ns: ctx.now_ns(),
            span: Span::current(),
        });
        let weak = Arc::downgrade(&conn);
        let bh = ctx.bh_new(move || {
            if let Some(conn) = weak.upgrade() {
                conn.flush_from_loop();
            }
        });
        assert!(conn.flush_bh.set(bh).is_ok(), "set once");
        conn
    }

    pub(super) fn backend(&self) -> &BlockBackend {
        self.export.backend()
    }

    /// Ends the connection: nothing more is sent, the reader wakes with an error.
    pub(super) fn fail(&self) {
        let mut outbox = lock(&self.outbox);
        outbox.dead = true;
        let lost = std::mem::take(&mut outbox.queue);
        drop(outbox);
        drop(lost);
        self.stream.interrupt();
    }

    /// Sends a batch from byte `sent` on. False: the connection is dead. Yields.
    fn co_send(&self, batch: &Batch, mut sent: usize) -> bool {
        let mut transfer = Transfer { since: &self.stall.sending, moved: 0 };
        loop {
            let step = match self.try_send(batch, sent) {
                Ok(Sent::All) => return true,
                Ok(Sent::Some(n)) => Ok(n),
                Ok(Sent::Read(range)) => {
                    // Not before the client takes something again; from then on it waits for us.
                    if !self.co_wait_space(&transfer) {
                        return false;
                    }
                    transfer.goes_on();
                    match self.co_read_for_sending(range) {
                        Some(buf) => self.co_send_buf(&buf, &mut transfer),
                        None => return false,
                    }
                }
                Err(e) => Err(e),
            };
            match step {
                Ok(n) => {
                    sent += n;
                    transfer.moved(n);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if !self.co_wait_space(&transfer) {
                        return false;
                    }
                }
                Err(error) => {
                    debug!(conn = self.id, %error, "cannot send");
                    return false;
                }
            }
        }
    }

    /// Waits for the client to take something. False: the connection is dead. Yields.
    fn co_wait_space(&self, transfer: &Transfer<'_>) -> bool {
        transfer.waits(self.ctx.now_ns());
        self.stream
            .co_wait_writable()
            .inspect_err(|error| debug!(conn = self.id, %error, "gave up sending"))
            .is_ok()
    }

    /// Reads the front of a range that was to be lent and cannot be any more. May yield.
    fn co_read_for_sending(&self, range: Range<u64>) -> Option<IoBuf> {
        let len = (range.end - range.start).min(READ_STEP) as usize;
        let Some(mut buf) = IoBuf::try_new(len) else {
            self.shared.warn_limited(|suppressed| {
                let (peer, conn) = (&self.peer, self.id);
                warn!(
                    peer,
                    conn, len, suppressed, "no memory to go on with a reply: the connection is closed"
                );
            });
            return None;
        };
        if self.backend().try_pread(range.start, &mut buf) {
            return Some(buf);
        }
        match self.backend().co_preadv(range.start, &mut [IoSliceMut::new(&mut buf)]) {
            Ok(()) => Some(buf),
            Err(e) => {
                // The header has gone out: there is no way left to say so to the client.
                self.shared.warn_limited(|suppressed| {
                    warn!(
                        peer = self.peer,
                        conn = self.id,
                        export = self.export.name(),
                        error = &e as &dyn std::error::Error,
                        suppressed,
                        "a reply that was being sent cannot be read any more: the connection is closed"
                    );
                });
                None
            }
        }
    }

    /// Sends all of a buffer. Returns its length. Yields.
    fn co_send_buf(&self, buf: &IoBuf, transfer: &mut Transfer<'_>) -> io::Result<usize> {
        let mut sent = 0;
        while sent < buf.len() {
            match self.stream.try_writev(&[IoSlice::new(&buf[sent..])]) {
                Ok(n) => {
                    sent += n;
                    transfer.moved(n);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if !self.co_wait_space(transfer) {
                        return Err(io::ErrorKind::ConnectionAborted.into());
                    }
                }
                Err(e) => return Err(e),
            }
        }
        Ok(sent)
    }

    /// The receiving of a payload begins.
    pub(super) fn receiving(&self) -> Transfer<'_> {
        Transfer { since: &self.stall.receiving, moved: 0 }
    }

    /// Sends a step of a batch from byte `sent` on, or what is left of it in the stream's own buffer.
    fn try_send(&self, batch: &Batch, sent: usize) -> io::Result<Sent> {
        if sent == batch.bytes() {
            return self.stream.try_flush().map(|()| Sent::All);
        }
        let mut slices = [IoSlice::new(&[]); 64];
        match batch.next(sent, SEND_STEP, &mut slices) {
            Next::Slices(n) => self.stream.try_writev(&slices[..n]).map(Sent::Some),
            Next::Export(range) => {
                let mut sent = None;
                let len = (range.end - range.start) as usize;
                self.backend().try_lend(range.start, len, &mut |lent| {
                    sent = Some(self.stream.try_send_file(lent.file, lent.offset, lent.len));
                });
                match sent {
                    // It has been freed or moved, or the file has become shorter: whoever reads it will know what to make of that.
                    None | Some(Ok(0)) => Ok(Sent::Read(range)),
                    Some(sent) => sent.map(Sent::Some),
                }
            }
        }
    }

    /// Sends a batch ahead of the queue, which is empty, if nobody else sends. False: it is to be queued. Yields.
    pub(super) fn co_send_now(&self, batch: &mut Batch) -> bool {
        {
            let mut outbox = lock(&self.outbox);
            if outbox.dead || outbox.sending || !outbox.queue.is_empty() {
                return false;
            }
            outbox.sending = true;
        }
        let ok = self.co_send(batch, 0);
        batch.clear();
        self.sent(ok);
        true
    }

    /// Takes the queue to send it, if nobody else does and there is something.
    fn take_queue(&self) -> Option<Batch> {
        let mut outbox = lock(&self.outbox);
        if outbox.dead {
            outbox.queue = Batch::new();
        }
        if outbox.sending || outbox.queue.is_empty() {
            return None;
        }
        outbox.sending = true;
        Some(std::mem::take(&mut outbox.queue))
    }

    /// Ends a turn of sending; `ok` is false when it failed. What was sent is dropped by the caller before: its budget
    /// is given back first.
    fn sent(&self, ok: bool) {
        self.counters.reply_batches.add(1);
        lock(&self.outbox).sending = false;
        if !ok {
            self.fail();
        }
    }

    /// Sends the queue until it is empty, unless somebody does already. Yields.
    pub(super) fn co_drain(&self) {
        while let Some(batch) = self.take_queue() {
            let ok = self.co_send(&batch, 0);
            drop(batch);
            self.sent(ok);
        }
        self.after_drain();
    }

    /// The bottom half: sends without waiting; a coroutine goes on if the socket is full, or something has to be read.
    fn flush_from_loop(self: &Arc<Self>) {
        while let Some(batch) = self.take_queue() {
            let mut sent = 0;
            let ok = loop {
                match self.try_send(&batch, sent) {
                    Ok(Sent::All) => break true,
                    Ok(Sent::Some(n)) => sent += n,
                    Err(e) if e.kind() != io::ErrorKind::WouldBlock => break false,
                    Ok(Sent::Read(_)) | Err(_) => {
                        let conn = self.clone();
                        let rest = move || {
                            let ok = conn.co_send(&batch, sent);
                            drop(batch);
                            conn.sent(ok);
                            conn.co_drain();
                        };
                        return Coroutine::new(rest).enter();
                    }
                }
            };
            drop(batch);
            self.sent(ok);
        }
        self.after_drain();
    }

    /// Whoever waits for the queue or for the end of all requests looks again.
    pub(super) fn after_drain(&self) {
        let (reader, drained) = {
            let mut outbox = lock(&self.outbox);
            let quiet = outbox.in_flight == 0 && !outbox.sending && outbox.queue.is_empty();
            let drained = outbox.draining && quiet && !outbox.drained;
            outbox.drained |= drained;
            (if outbox.sending { None } else { outbox.reader.take() }, drained)
        };
        if drained {
            self.shared.session_drained(self.id);
        }
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    /// Whether headers are extended.
    pub(super) fn extended(&self) -> bool {
        self.style == HeaderStyle::Extended
    }

    /// How the chunks of the reply to a request are headed.
    pub(super) fn reply_to(&self, h: &RequestHeader) -> ReplyTo {
        ReplyTo { cookie: h.cookie, extended: self.extended().then_some(h.offset) }
    }

    /// Appends a reply without content.
    pub(super) fn put_done(&self, batch: &mut Batch, to: ReplyTo) {
        match to.extended {
            None => batch.put(&SimpleReply { error: None, cookie: to.cookie }.encode()),
            Some(_) => batch.put(&to.none()),
        }
    }

    /// Appends an error reply and counts it.
    pub(super) fn put_error(&self, batch: &mut Batch, to: ReplyTo, error: Errno, message: &str) {
        self.counters.errors.add(1);
        self.errors.store(self.errors.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        if self.style >= HeaderStyle::Structured {
            let mut chunk = Vec::with_capacity(ChunkHeader::EXTENDED_LEN + 6 + message.len());
            to.put_error(&mut chunk, ReplyFlags::NBD_REPLY_FLAG_DONE, error, message, None);
            batch.put(&chunk);
        } else {
            batch.put(&SimpleReply { error: Some(error), cookie: to.cookie }.encode());
        }
    }

    /// Appends the reply to a request that the backend refused.
    fn put_block_error(&self, batch: &mut Batch, h: &RequestHeader, e: &block::Error) {
        let os = e.errno();
        let unsupported = os == libc::ENOTSUP || os == libc::EOPNOTSUPP;
        let fast_zero = h.flags.contains(CmdFlags::NBD_CMD_FLAG_FAST_ZERO);
        let error = if fast_zero && unsupported { Errno::NBD_ENOTSUP } else { Errno::from_os(os) };
        if error == Errno::NBD_ENOTSUP {
            debug!(conn = self.id, h.cookie, "zeroing would not be fast");
        } else {
            self.shared.warn_limited(|suppressed| {
                warn!(
                    peer = self.peer,
                    conn = self.id,
                    export = self.export.name(),
                    cmd = cmd_name(h.cmd),
                    errno = %error,
                    error = e as &dyn std::error::Error,
                    suppressed,
                    "request failed"
                );
            });
        }
        let source = io::Error::from_raw_os_error(os);
        self.put_error(batch, self.reply_to(h), error, &source.to_string());
    }

    /// Appends the reply to a request without content.
    pub(super) fn put_result(&self, batch: &mut Batch, h: &RequestHeader, result: &block::Result<()>) {
        match result {
            Ok(()) => self.put_done(batch, self.reply_to(h)),
            Err(e) => self.put_block_error(batch, h, e),
        }
    }

    // -------------------------------------------------------------------------------------- in request coroutines

    /// Runs a request in a coroutine of its own; it has begun when this returns. `f` makes the reply. By the reader only,
    /// which sends what is in the queue before it waits.
    pub(super) fn spawn(
        self: &Arc<Self>,
        h: RequestHeader,
        reservation: Reservation,
        f: impl FnOnce(&Arc<Conn>) -> Batch + Send + 'static,
    ) {
        if !co::has_room() {
            self.shared.warn_no_room(&self.peer);
            let mut batch = Batch::new();
            self.put_error(
                &mut batch,
                self.reply_to(&h),
                Errno::NBD_ENOMEM,
                "too many requests are being worked on",
            );
            return lock(&self.outbox).queue.append(&mut batch);
        }
        lock(&self.outbox).in_flight += 1;
        let guard = RequestGuard { conn: Some(self.clone()) };
        let queued_ns = if tracing::enabled!(tracing::Level::DEBUG) { self.ctx.now_ns() } else { 0 };
        let span = match queued_ns {
            0 => Span::none(),
            _ => debug_span!(
                parent: &self.span,
                "request",
                conn = self.id,
                export = self.export.name(),
                cookie = h.cookie,
                cmd = cmd_name(h.cmd),
                offset = h.offset,
                len = h.len
            ),
        };
        let serve = move || {
            let conn = guard.conn.as_ref().expect("not completed yet");
            let mut batch = f(conn);
            batch.hold(reservation);
            if queued_ns != 0 {
                let service_us = conn.ctx.now_ns().saturating_sub(queued_ns) / 1000;
                debug!(service_us, "request completed");
            }
            guard.complete(batch);
        };
        Coroutine::builder().name("request").span(span).build(serve).enter();
    }

    /// Reads into `buf`, asking for holes first if that may pay, and makes the reply. Yields.
    pub(super) fn co_read(&self, h: &RequestHeader, df: bool, mut buf: IoBuf) -> Batch {
        let mut batch = Batch::new();
        let (offset, len, to) = (h.offset, buf.len() as u32, self.reply_to(h));
        if self.style >= HeaderStyle::Structured && !df && len >= STATUS_FROM {
            match self.co_read_sparse(&mut batch, to, offset, len, &mut buf) {
                Ok(true) => return batch,
                // One extent of data: read it as a whole.
                Ok(false) => {}
                Err(e) => {
                    let mut batch = Batch::new();
                    self.put_block_error(&mut batch, h, &e);
                    return batch;
                }
            }
        }
        match self.backend().co_preadv(offset, &mut [IoSliceMut::new(&mut buf)]) {
            Ok(()) => self.put_read(&mut batch, to, offset, df, buf),
            Err(e) => self.put_block_error(&mut batch, h, &e),
        }
        batch
    }

    /// Reads extent by extent. `Ok(false)`: there is no hole; nothing was read.
    fn co_read_sparse(
        &self,
        batch: &mut Batch,
        to: ReplyTo,
        offset: u64,
        len: u32,
        buf: &mut IoBuf,
    ) -> block::Result<bool> {
        let mut runs = Runs::default();
        let mut pos: u32 = 0;
        let mut asked = 0;
        while pos < len {
            let left = len - pos;
            let at = offset + u64::from(pos);
            asked += 1;
            // Not knowing is no error: then it is data.
            let extent = match self.backend().co_block_status(at, left.into()) {
                Ok(extent) if asked <= STATUS_MAX => extent,
                _ => block::Extent { len: left.into(), flags: StatusFlags::DATA },
            };
            let run = u32::try_from(extent.len).unwrap_or(u32::MAX).min(left);
            let zero = extent.flags.contains(StatusFlags::ZERO);
            if !zero && run == len {
                return Ok(false);
            }
            if zero {
                runs.hole(at, run);
            } else {
                let part = pos as usize..(pos + run) as usize;
                self.backend().co_preadv(at, &mut [IoSliceMut::new(&mut buf[part.clone()])])?;
                runs.scan(buf, part, at);
            }
            pos += run;
        }
        self.counters.bytes_read.add(len.into());
        let buf = std::mem::replace(buf, IoBuf::new(0));
        batch.put_runs(ReplyFlags::NBD_REPLY_FLAG_DONE, to, &runs, buf);
        Ok(true)
    }

    /// Appends the reply to a read that has its own buffer.
    pub(super) fn put_read(&self, batch: &mut Batch, to: ReplyTo, offset: u64, df: bool, buf: IoBuf) {
        self.counters.bytes_read.add(buf.len() as u64);
        let done = ReplyFlags::NBD_REPLY_FLAG_DONE;
        if buf.is_empty() {
            if self.style >= HeaderStyle::Structured {
                batch.put(&to.none());
            } else {
                self.put_done(batch, to);
            }
        } else if self.style == HeaderStyle::Simple {
            self.put_done(batch, to);
            let len = buf.len();
            let id = batch.add_buf(buf);
            batch.data(id, 0..len);
        } else if df {
            batch.put_dense(done, to, offset, buf);
        } else {
            batch.put_sparse(done, to, offset, buf);
        }
    }

    /// Answers a block status request about `len` bytes: a chunk per selected context, or for those in `ids` only. Yields.
    pub(super) fn co_block_status(
        &self,
        h: &RequestHeader,
        len: u64,
        req_one: bool,
        ids: Option<&[u32]>,
    ) -> Batch {
        let mut batch = Batch::new();
        let wanted = |id: &u32| ids.is_none_or(|ids| ids.contains(id));
        let mut contexts = self.contexts.iter().filter(|c| wanted(&c.id)).peekable();
        let mut chunks = Vec::new();
        while let Some(context) = contexts.next() {
            let extents: Vec<StatusExtent> =
                match meta::co_extents(&context.kind, &self.export, h.offset, len, req_one) {
                    Ok(extents) => extents,
                    Err(e) => {
                        self.put_block_error(&mut batch, h, &e);
                        return batch;
                    }
                };
            let mut flags = ReplyFlags::empty();
            flags.set(ReplyFlags::NBD_REPLY_FLAG_DONE, contexts.peek().is_none());
            self.reply_to(h).put_block_status(&mut chunks, flags, context.id, &extents);
        }
        batch.put(&chunks);
        batch
    }

    /// Most bytes that the reply to a block status request takes.
    pub(super) fn status_reply_max(&self, req_one: bool) -> u64 {
        if req_one { 0 } else { self.contexts.len() as u64 * MAX_EXTENTS as u64 * 16 }
    }

    pub(super) fn co_trim(&self, offset: u64, len: u64, fua: bool) -> block::Result<()> {
        self.co_in_steps(offset, len, |at, n| self.backend().co_pdiscard(at, n))?;
        if fua { self.backend().co_flush() } else { Ok(()) }
    }

    pub(super) fn co_write_zeroes(&self, offset: u64, len: u64, flags: WriteFlags) -> block::Result<()> {
        if offset % STEP + len <= STEP {
            return self.backend().co_pwrite_zeroes(offset, len, flags);
        }
        // One flush at the end serves all steps.
        let each = flags - WriteFlags::FUA;
        self.co_in_steps(offset, len, |at, n| self.backend().co_pwrite_zeroes(at, n, each))?;
        if flags.contains(WriteFlags::FUA) { self.backend().co_flush() } else { Ok(()) }
    }

    pub(super) fn co_cache(&self, offset: u64, len: u64) -> block::Result<()> {
        self.co_in_steps(offset, len, |at, n| self.backend().co_cache(at, n))
    }

    /// Carries out a request of any length in steps that end at multiples of [`STEP`]. Others have their turn between
    /// two steps, and a drain needs to wait for one only. Ends early when nobody is left to answer. Yields.
    fn co_in_steps(
        &self,
        offset: u64,
        len: u64,
        f: impl Fn(u64, u64) -> block::Result<()>,
    ) -> block::Result<()> {
        let (mut at, end) = (offset, offset + len);
        loop {
            let n = (STEP - at % STEP).min(end - at);
            f(at, n)?;
            at += n;
            if at == end || lock(&self.outbox).dead {
                return Ok(());
            }
            Coroutine::current().expect("requests run in coroutines").schedule(&self.ctx);
            co_yield();
        }
    }
}

/// A request in its coroutine. Dropped without [`RequestGuard::complete`] (a panic), it ends the connection: the client
/// would wait for that reply for ever.
struct RequestGuard {
    conn: Option<Arc<Conn>>,
}

impl RequestGuard {
    /// Queues the reply and sees to it that it is sent: now, if there is nothing to gather it with. May yield.
    fn complete(mut self, mut batch: Batch) {
        let conn = self.conn.take().expect("completed once");
        /// Who sends the reply.
        enum Who {
            Me,
            Sender,
            Reader,
            BottomHalf,
        }
        let who = {
            let mut outbox = lock(&conn.outbox);
            outbox.in_flight -= 1;
            outbox.queue.append(&mut batch);
            let alone = outbox.in_flight == 0 && !outbox.reader_busy;
            match outbox.queue.bytes() >= FLUSH_AT || outbox.dead || alone {
                _ if outbox.sending => Who::Sender,
                true => Who::Me,
                false if outbox.reader_busy => Who::Reader,
                false => Who::BottomHalf,
            }
        };
        match who {
            Who::Me => conn.co_drain(),
            Who::Sender | Who::Reader => {}
            Who::BottomHalf => conn.flush_bh.get().expect("set when the connection was made").schedule(),
        }
    }
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        if let Some(conn) = self.conn.take() {
            lock(&conn.outbox).in_flight -= 1;
            tracing::error!(
                peer = conn.peer,
                conn = conn.id,
                export = conn.export.name(),
                "a request ended without a reply; the connection is closed"
            );
            conn.fail();
            conn.after_drain();
        }
    }
}
