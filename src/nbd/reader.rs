//! The reader: the one coroutine of a connection that receives, decodes, and answers what needs no waiting.
//!
//! It never waits with replies in its own hands, and it does not read on while the client leaves its replies unread.
//! `session.rs` has the picture.

use super::budget::Reservation;
use super::conn::{Conn, lock};
use super::proto::*;
use super::reply::{Batch, Content, FLUSH_AT, content};
use super::request::{self, Command, RequestError, View};
use super::wire::{Encoded, ProtocolError, ReplyTo, RequestHeader, SimpleReply};
use crate::block::{self, WriteFlags};
use crate::co::{Coroutine, co_yield};
use crate::util::buf::IoBuf;
use crate::util::fast;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::Arc;
use tracing::{debug, warn};

/// Bytes asked of one `recv` (ours): hundreds of small requests, or half a large payload.
const RECV: usize = 64 << 10;
/// After a payload this large the next `recv` asks for little, so that payloads land in their own buffers (ours).
const LARGE_PAYLOAD: u32 = 32 << 10;
/// What "little" is: some headers and the start of a payload (ours).
const RECV_SMALL: usize = 1 << 10;
/// Reads up to this many bytes are built inside the reply batch (ours).
const INPLACE_READ: u32 = 32 << 10;
/// Bytes of requests answered inline in one turn of the loop; then other connections have theirs (ours).
const TURN_BYTES: u64 = 1 << 20;
/// Requests answered inline in one turn of the loop (ours).
const TURN_REQUESTS: u32 = 1024;
/// How long a stop waits for the next bytes of a payload (ours): a client that means to send it does so at once.
const STOP_PAYLOAD_NS: u64 = 1_000_000_000;
/// Neighbouring requests that one system call serves at most (ours: a batch of 4 KiB reads).
const RUN_MAX: usize = 16;
/// Bytes of them at most (ours).
const RUN_BYTES: usize = FLUSH_AT;
/// Smallest request of a run (ours; a hole's chunk must fit in its place).
const RUN_PART_MIN: u32 = 512;
/// What a read or a write counts as, beside its bytes, when it is judged how much was done in a time (ours: a stream of large reads does not
/// outweigh everything else).
const REQUEST_WORK: u64 = 64 << 10;
/// Unsent replies beyond which the reader waits for the sender (ours).
const QUEUE_MAX: usize = 256 << 10;

/// Why the transmission phase ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    #[error("NBD_CMD_DISC")]
    Disc,
    #[error("client closed")]
    Eof,
    #[error("client closed in the middle of a request")]
    Truncated,
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    #[error("payload of {0} bytes is more than 64 MiB")]
    TooLong(u64),
    #[error("no request for longer than the idle timeout")]
    Idle,
    #[error("cut by the server, or the client stalled")]
    Cut,
    #[error("client did not finish a request while the server was stopping")]
    Unfinished,
    #[error("connection failed: {0}")]
    Io(io::Error),
}

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Totals {
    pub(super) requests: u64,
    pub(super) inline: u64,
    pub(super) bytes_read: u64,
    pub(super) bytes_written: u64,
}

/// Bytes received and not parsed yet.
struct Received {
    buf: Option<IoBuf>,
    start: usize,
    end: usize,
    /// Bytes that the next `recv` asks for.
    limit: usize,
}

impl Received {
    fn bytes(&self) -> &[u8] {
        match &self.buf {
            Some(buf) => &buf[self.start..self.end],
            None => &[],
        }
    }

    fn len(&self) -> usize {
        self.end - self.start
    }

    fn consume(&mut self, n: usize) {
        assert!(n <= self.len(), "consumed more than was received");
        self.start += n;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Free room behind what is there; moves it to the front if need be.
    fn room(&mut self) -> &mut [u8] {
        let buf = self.buf.get_or_insert_with(|| IoBuf::new(RECV));
        if buf.len() - self.end < self.limit.min(buf.len() / 2) {
            buf.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let until = buf.len().min(self.end + self.limit);
        &mut buf[self.end..until]
    }
}

pub(super) struct Reader {
    conn: Arc<Conn>,
    /// Headers are extended.
    extended: bool,
    rx: Received,
    /// Replies made by the reader itself.
    batch: Batch,
    pub(super) totals: Totals,
    /// Of this turn.
    turn_bytes: u64,
    turn_requests: u32,
}

impl Drop for Reader {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Nobody reads on: what is in flight must not wait for a reader that sends its replies.
            self.conn.fail();
        }
    }
}

/// One request of a run of neighbours.
#[derive(Debug, Clone)]
struct Part {
    cookie: u64,
    len: u32,
    /// Where in what was received; empty for reads.
    payload: Range<usize>,
}

impl Part {
    const NONE: Part = Part { cookie: 0, len: 0, payload: 0..0 };
}

/// Bytes that follow a request's header.
fn payload(h: &RequestHeader) -> usize {
    if h.cmd == NBD_CMD_WRITE { h.len as usize } else { 0 }
}

impl Reader {
    pub(super) fn new(conn: Arc<Conn>, rest: &[u8]) -> Reader {
        let mut rx = Received { buf: None, start: 0, end: 0, limit: RECV };
        if !rest.is_empty() {
            // A client may have pipelined requests behind its last option, as many as one option may have data.
            let mut buf = IoBuf::new(rest.len().max(RECV));
            buf[..rest.len()].copy_from_slice(rest);
            rx.end = rest.len();
            rx.buf = Some(buf);
        }
        let extended = conn.extended();
        Reader {
            conn,
            extended,
            rx,
            batch: Batch::new(),
            totals: Totals::default(),
            turn_bytes: 0,
            turn_requests: 0,
        }
    }

    /// Serves requests until the session ends.
    pub(super) fn co_run(&mut self) -> End {
        {
            let mut outbox = lock(&self.conn.outbox);
            outbox.reader_busy = true;
            // Entering transmission while the server begins to shut down: nobody kicks this reader.
            outbox.draining = self.conn.shared.is_stopping();
        }
        let end = self.co_serve();
        lock(&self.conn.outbox).reader_busy = false;
        end
    }

    fn co_serve(&mut self) -> End {
        loop {
            let step = match request::next_header(self.rx.bytes(), self.extended) {
                Ok(Some(header)) => {
                    self.rx.consume(request::header_len(self.extended));
                    self.turn_requests += 1;
                    self.co_pace();
                    self.co_request(header)
                }
                Ok(None) => self.co_fill(),
                Err(e) => Err(e.into()),
            };
            match step {
                Ok(()) => {}
                Err(End::Eof) if self.rx.len() > 0 => return End::Truncated,
                Err(end) => return end,
            }
        }
    }

    /// Lets requests in flight end and their replies out, unless the connection is lost.
    pub(super) fn co_finish(&mut self, end: &End) {
        let conn = self.conn.clone();
        self.rx.buf = None;
        match end {
            End::Disc | End::Eof | End::Idle | End::Unfinished => {}
            End::Truncated | End::Protocol(_) | End::TooLong(_) => {
                conn.shared.warn_limited(|suppressed| {
                    warn!(
                        peer = conn.peer,
                        conn = conn.id,
                        export = conn.export.name(),
                        reason = %end,
                        suppressed,
                        "client broke the protocol"
                    );
                });
            }
            End::Cut | End::Io(_) => {
                self.batch = Batch::new();
                conn.fail();
            }
        }
        // A client that is leaving and takes no replies must not keep its session.
        let stall = conn.shared.config.stall_timeout.as_nanos() as u64;
        conn.stream.set_write_deadline(Some(conn.ctx.now_ns().saturating_add(stall)));
        self.push_batch();
        loop {
            conn.co_drain();
            let mut outbox = lock(&conn.outbox);
            if outbox.in_flight == 0 && !outbox.sending && outbox.queue.is_empty() {
                break;
            }
            outbox.reader = Some(Coroutine::current().expect("the reader is a coroutine"));
            drop(outbox);
            co_yield();
        }
        conn.stream.co_close();
    }

    fn push_batch(&mut self) {
        if !self.batch.is_empty() {
            lock(&self.conn.outbox).queue.append(&mut self.batch);
        }
    }

    /// Sends what is ready. Waits while the client takes nothing, unless little is waiting. Yields.
    fn co_flush(&mut self) {
        if !self.batch.is_empty() && !self.conn.co_send_now(&mut self.batch) {
            self.push_batch();
        }
        self.conn.co_drain();
        loop {
            let mut outbox = lock(&self.conn.outbox);
            if !outbox.sending || outbox.queue.bytes() <= QUEUE_MAX {
                return;
            }
            outbox.reader = Some(Coroutine::current().expect("the reader is a coroutine"));
            drop(outbox);
            co_yield();
        }
    }

    /// A client that was cut, and sends on so fast that nobody ever waits for it, must notice all the same.
    fn check_cut(&self) -> Result<(), End> {
        if self.conn.stream.stream().is_interrupted() { Err(End::Cut) } else { Ok(()) }
    }

    /// Receives more. Sends first if it has to wait. Yields.
    fn co_fill(&mut self) -> Result<(), End> {
        loop {
            self.check_cut()?;
            let room = self.rx.room();
            match self.conn.stream.try_read(room) {
                Ok(0) => return Err(End::Eof),
                Ok(n) => {
                    self.rx.end += n;
                    return Ok(());
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.co_wait_input()?,
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Err(End::Eof),
                Err(e) => return Err(End::Io(e)),
            }
        }
    }

    fn co_wait_input(&mut self) -> Result<(), End> {
        self.co_flush();
        if self.rx.len() == 0 {
            // An idle connection holds no buffer.
            self.rx = Received { buf: None, start: 0, end: 0, limit: self.rx.limit };
        }
        self.set_idle_deadline();
        match self.co_parked(|conn| conn.stream.co_wait_readable()) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {
                if self.conn.shared.is_stopping() {
                    lock(&self.conn.outbox).draining = true;
                    self.conn.after_drain();
                }
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => Err(End::Cut),
            // During a stop only payloads have deadlines.
            Err(e) if e.kind() == io::ErrorKind::TimedOut && self.conn.shared.is_stopping() => {
                Err(End::Unfinished)
            }
            Err(e) if e.kind() == io::ErrorKind::TimedOut => match lock(&self.conn.outbox).in_flight {
                0 => Err(End::Idle),
                // It waits for us; its time begins anew.
                _ => Ok(()),
            },
            Err(e) => Err(End::Io(e)),
        }
    }

    /// Waits for more of a payload. A stop takes half a request for no request if the client leaves it at that. Yields.
    fn co_wait_payload(&mut self) -> Result<(), End> {
        let conn = self.conn.clone();
        if conn.shared.is_stopping() {
            conn.stream.set_read_deadline(Some(conn.ctx.now_ns().saturating_add(STOP_PAYLOAD_NS)));
        }
        let waited = self.co_wait_input();
        conn.stream.set_read_deadline(None);
        waited
    }

    /// Bounds the wait for input that comes next.
    fn set_idle_deadline(&self) {
        let timeout = self.conn.shared.config.idle_timeout;
        if !timeout.is_zero() && !self.conn.shared.is_stopping() {
            let deadline = self.conn.ctx.now_ns().saturating_add(timeout.as_nanos() as u64);
            self.conn.stream.set_read_deadline(Some(deadline));
        }
    }

    /// Waits in `f`, having sent all replies: those that come meanwhile send themselves. Yields.
    fn co_parked<T>(&mut self, f: impl FnOnce(&Conn) -> T) -> T {
        self.turn_bytes = 0;
        self.turn_requests = 0;
        lock(&self.conn.outbox).reader_busy = false;
        let done = f(&self.conn);
        lock(&self.conn.outbox).reader_busy = true;
        done
    }

    /// Takes part of the budget; sends first if that has to wait. Yields.
    fn co_reserve(&mut self, bytes: u64) -> Result<Reservation, End> {
        match self.conn.budget.try_reserve(bytes) {
            Some(reservation) => Ok(reservation),
            None => {
                self.co_flush();
                let cut = |conn: &Conn| conn.stream.stream().is_interrupted();
                self.co_parked(|conn| conn.budget.co_reserve(bytes, || cut(conn))).ok_or(End::Cut)
            }
        }
    }

    /// A request was answered by the reader itself. May yield, to send.
    fn co_answered(&mut self, bytes: u64) {
        self.totals.inline += 1;
        self.conn.counters.inline.add(1);
        if self.batch.bytes() >= FLUSH_AT {
            self.co_flush();
        }
        self.turn_bytes += bytes;
    }

    /// Gives other connections their turn now and then: a client that never lets us wait must not keep the thread. May yield.
    fn co_pace(&mut self) {
        if self.turn_bytes >= TURN_BYTES || self.turn_requests >= TURN_REQUESTS {
            self.co_flush();
            self.co_parked(|conn| {
                Coroutine::current().expect("the reader is a coroutine").schedule(&conn.ctx);
                co_yield();
            });
        }
    }

    /// Serves one request, whose header has been taken off the input. Yields.
    fn co_request(&mut self, h: RequestHeader) -> Result<(), End> {
        let conn = self.conn.clone();
        self.totals.requests += 1;
        conn.counters.requests[usize::from(h.cmd).min(conn.counters.requests.len() - 1)].add(1);
        let Some(payload) = request::payload_len(&h, self.extended) else {
            return Err(End::TooLong(h.len));
        };
        let view = View {
            size: conn.export.size(),
            flags: conn.flags,
            has_contexts: !conn.contexts.is_empty(),
            extended: self.extended,
        };
        let verdict = request::validate(&h, &view);
        let verdict = match verdict {
            Ok(Command::Disc) => return Err(End::Disc),
            _ if conn.shared.is_stopping() => {
                Err(RequestError { errno: Errno::NBD_ESHUTDOWN, message: "server is shutting down" })
            }
            other => other,
        };
        match verdict {
            Err(e) => {
                self.co_discard(payload)?;
                self.co_refuse(&h, e, payload);
            }
            Ok(Command::Disc) => unreachable!("handled above"),
            Ok(Command::Read { offset, len, df }) => {
                conn.ctx.note_work(REQUEST_WORK + u64::from(len));
                self.co_read_request(h, offset, len, df)?;
            }
            Ok(Command::Write { offset, len, flags }) => {
                conn.ctx.note_work(REQUEST_WORK + u64::from(len));
                self.co_write_request(h, offset, len, flags)?;
            }
            Ok(Command::Flush) => {
                self.co_spawn(h, move |conn| conn.backend().co_flush())?;
            }
            Ok(Command::Trim { offset, len, fua }) => {
                self.co_spawn(h, move |conn| conn.co_trim(offset, len, fua))?;
            }
            Ok(Command::Cache { offset, len }) => {
                self.co_spawn(h, move |conn| conn.co_cache(offset, len))?;
            }
            Ok(Command::WriteZeroes { offset, len, flags }) => {
                self.co_spawn(h, move |conn| conn.co_write_zeroes(offset, len, flags))?;
            }
            Ok(Command::BlockStatus { len, req_one, .. }) => {
                let reservation = self.co_reserve(conn.status_reply_max(req_one))?;
                conn.spawn(h, reservation, move |conn| conn.co_block_status(&h, len, req_one, None));
            }
            Ok(Command::FilteredBlockStatus { offset, payload, req_one }) => {
                self.co_filtered_status(h, offset, payload, req_one, view.size)?;
            }
        }
        Ok(())
    }

    /// Answers a request with an error. May yield, to send.
    fn co_refuse(&mut self, h: &RequestHeader, e: RequestError, payload: u32) {
        let conn = self.conn.clone();
        debug!(conn = conn.id, cookie = h.cookie, cmd = cmd_name(h.cmd), offset = h.offset, len = h.len, errno = %e.errno, reason = %e, "request refused");
        conn.put_error(&mut self.batch, conn.reply_to(h), e.errno, e.message);
        self.co_answered(payload.into());
    }

    /// Serves a block status request whose payload names contexts. Yields.
    fn co_filtered_status(
        &mut self,
        h: RequestHeader,
        offset: u64,
        payload: u32,
        req_one: bool,
        size: u64,
    ) -> Result<(), End> {
        let conn = self.conn.clone();
        let filter = if payload as usize > request::filter_max(conn.contexts.len()) {
            self.co_discard(payload)?;
            let message = "the payload names an unknown context, or one twice";
            Err(RequestError { errno: Errno::NBD_EINVAL, message })
        } else {
            lock(&conn.outbox).in_flight += 1;
            let received = self.co_payload(payload as usize);
            lock(&conn.outbox).in_flight -= 1;
            let Some(bytes) = received? else {
                self.co_refuse_memory(&h);
                return Ok(());
            };
            let knows = |id| conn.contexts.iter().any(|c| c.id == id);
            request::filtered(offset, &bytes, size, knows)
        };
        match filter {
            Err(e) => self.co_refuse(&h, e, payload),
            Ok(filter) => {
                let reservation = self.co_reserve(conn.status_reply_max(req_one))?;
                conn.spawn(h, reservation, move |conn| {
                    conn.co_block_status(&h, filter.effect_len, req_one, Some(&filter.ids))
                });
            }
        }
        Ok(())
    }

    /// Runs a request without content in a coroutine.
    fn co_spawn(
        &mut self,
        h: RequestHeader,
        f: impl FnOnce(&Arc<Conn>) -> block::Result<()> + Send + 'static,
    ) -> Result<(), End> {
        let reservation = self.co_reserve(0)?;
        self.conn.spawn(h, reservation, move |conn| {
            let result = f(conn);
            let mut batch = Batch::new();
            conn.put_result(&mut batch, &h, &result);
            batch
        });
        Ok(())
    }

    fn co_read_request(&mut self, h: RequestHeader, offset: u64, len: u32, df: bool) -> Result<(), End> {
        let conn = self.conn.clone();
        self.totals.bytes_read += u64::from(len);
        let to = conn.reply_to(&h);
        if len as usize >= conn.lend_from && len > 0 && self.try_lend(to, offset, len, df) {
            conn.counters.bytes_read.add(len.into());
            self.co_answered(len.into());
            return Ok(());
        }
        if (RUN_PART_MIN..=INPLACE_READ).contains(&len) && self.try_read_run(&h, offset, df) {
            return Ok(());
        }
        if len > 0 && len <= INPLACE_READ && self.try_read_in_place(to, offset, len, df) {
            conn.counters.bytes_read.add(len.into());
            self.co_answered(len.into());
            return Ok(());
        }
        let reservation = self.co_reserve(len.into())?;
        let Some(mut buf) = IoBuf::try_new(len as usize) else {
            self.co_refuse_memory(&h);
            return Ok(());
        };
        if len == 0 || (len > INPLACE_READ && conn.backend().try_pread(offset, &mut buf)) {
            conn.put_read(&mut self.batch, to, offset, df, buf);
            self.batch.hold(reservation);
            self.co_answered(len.into());
            return Ok(());
        }
        conn.spawn(h, reservation, move |conn| conn.co_read(&h, df, buf));
        Ok(())
    }

    /// Finds the requests behind `h`, in what was received, that continue it: the same command with the same flags at the
    /// next offset. `behind` is where the first of their headers is, from the start of what was received. Returns how many
    /// there are, `h` included, and sets what each one is.
    fn find_run(&self, h: &RequestHeader, behind: usize, parts: &mut [Part; RUN_MAX]) -> usize {
        let received = self.rx.bytes();
        let size = self.conn.export.size();
        parts[0] = Part { cookie: h.cookie, len: h.len as u32, payload: behind - payload(h)..behind };
        let mut n = 1;
        let mut at = behind;
        let mut bytes = h.len as usize;
        let mut next = h.offset + h.len;
        while n < RUN_MAX {
            let Ok(Some(other)) = request::next_header(&received[at..], self.extended) else { break };
            let same = (other.cmd, other.flags, other.offset) == (h.cmd, h.flags, next);
            // Its length is anything: compare before counting.
            let fits =
                (u64::from(RUN_PART_MIN)..=RUN_BYTES.saturating_sub(bytes) as u64).contains(&other.len);
            if !same || !fits || other.len > size - next {
                break;
            }
            at += request::header_len(self.extended);
            if received.len() - at < payload(&other) {
                break;
            }
            next += other.len;
            bytes += other.len as usize;
            parts[n] =
                Part { cookie: other.cookie, len: other.len as u32, payload: at..at + payload(&other) };
            at += payload(&other);
            n += 1;
        }
        n
    }

    /// Takes the requests of a run off the input, whose first header is off already, and counts them.
    fn take_run(&mut self, h: &RequestHeader, parts: usize, bytes: usize) {
        let more = (parts - 1) as u64;
        self.rx.consume(bytes);
        self.totals.requests += more;
        self.conn.ctx.note_work(more * (REQUEST_WORK + h.len));
        self.conn.counters.requests[usize::from(h.cmd)].add(more);
        self.turn_requests += parts as u32 - 1;
    }

    /// Answers a read together with those that continue it, by one system call, if there are any and all data is at hand.
    fn try_read_run(&mut self, h: &RequestHeader, offset: u64, df: bool) -> bool {
        if !fast::paths().coalesce || !self.continues(h, 0) {
            return false;
        }
        let mut parts = [Part::NONE; RUN_MAX];
        let n = self.find_run(h, 0, &mut parts);
        if n < 2 {
            return false;
        }
        let parts = &parts[..n];
        let to = |part: &Part, at| ReplyTo { cookie: part.cookie, extended: self.extended.then_some(at) };
        let structured = self.conn.style >= HeaderStyle::Structured;
        let header = if structured { to(&parts[0], 0).offset_data_len() } else { SimpleReply::LEN };
        let total: usize = parts.iter().map(|part| header + part.len as usize).sum();
        let room = self.batch.room(total);
        let mut slices = [const { None }; RUN_MAX];
        let mut rest = &mut room[..];
        for (slice, part) in slices.iter_mut().zip(parts) {
            let (reply, behind) = rest.split_at_mut(header + part.len as usize);
            *slice = Some(IoSliceMut::new(&mut reply[header..]));
            rest = behind;
        }
        let mut slices = slices.map(|s| s.unwrap_or_else(|| IoSliceMut::new(&mut [])));
        if !self.conn.export.backend().try_preadv(offset, &mut slices[..n], n as u64) {
            return false;
        }
        let sparse = structured && !df;
        let mut contents = [Content::Data; RUN_MAX];
        let mut at = offset;
        if sparse {
            for (content_of, slice) in contents.iter_mut().zip(&slices[..n]) {
                *content_of = content(slice, at);
                at += slice.len() as u64;
            }
        }
        if contents.contains(&Content::Mixed) {
            // It takes several chunks: rare, and not worth a way of its own.
            return false;
        }
        let done = ReplyFlags::NBD_REPLY_FLAG_DONE;
        let (mut fill, mut at) = (0, offset);
        for (part, content) in parts.iter().zip(contents) {
            let size = header + part.len as usize;
            let room = &mut self.batch.room(total)[fill..fill + size];
            let mut send = size;
            if !structured {
                room[..header].copy_from_slice(&SimpleReply { error: None, cookie: part.cookie }.encode());
            } else if content == Content::Hole {
                let hole = to(part, at).offset_hole(done, at, part.len);
                room[..hole.len()].copy_from_slice(&hole);
                send = hole.len();
            } else {
                room[..header].copy_from_slice(&to(part, at).offset_data(done, at, part.len));
            }
            self.batch.commit_part(fill..fill + send);
            fill += size;
            at += u64::from(part.len);
        }
        self.batch.close_room(total);
        self.take_run(h, n, (n - 1) * request::header_len(self.extended));
        self.totals.bytes_read += at - offset - u64::from(parts[0].len);
        self.conn.counters.bytes_read.add(at - offset);
        for part in parts {
            self.co_answered(part.len.into());
        }
        true
    }

    /// Whether the request whose header is at `behind` continues `h`: a quick look before a closer one.
    fn continues(&self, h: &RequestHeader, behind: usize) -> bool {
        matches!(request::next_header(&self.rx.bytes()[behind..], self.extended), Ok(Some(other))
            if (other.cmd, other.offset) == (h.cmd, h.offset + h.len))
    }

    /// Does a write, whose payload has been received, together with those that continue it, by one system call, if there are
    /// any. If that fails, each one is to be done alone, to get its own answer.
    fn try_write_run(&mut self, h: &RequestHeader, offset: u64) -> bool {
        let first = payload(h);
        if !fast::paths().coalesce || !self.continues(h, first) {
            return false;
        }
        let mut parts = [Part::NONE; RUN_MAX];
        let n = self.find_run(h, first, &mut parts);
        if n < 2 {
            return false;
        }
        let parts = &parts[..n];
        let mut slices = [IoSlice::new(&[]); RUN_MAX];
        for (slice, part) in slices.iter_mut().zip(parts) {
            *slice = IoSlice::new(&self.rx.bytes()[part.payload.clone()]);
        }
        let Some(Ok(())) = self.conn.backend().try_pwritev(offset, &slices[..n]) else { return false };
        let bytes: u64 = parts.iter().map(|part| u64::from(part.len)).sum();
        self.take_run(h, n, parts[n - 1].payload.end);
        self.totals.bytes_written += bytes;
        self.conn.counters.bytes_written.add(bytes);
        let mut at = offset;
        for part in parts {
            let to = ReplyTo { cookie: part.cookie, extended: self.extended.then_some(at) };
            self.conn.put_done(&mut self.batch, to);
            at += u64::from(part.len);
        }
        for part in parts {
            self.co_answered(part.len.into());
        }
        true
    }

    /// Puts a large read into the batch that is sent from the page cache, if it is all there. It takes no memory to speak of, so none is
    /// reserved. Holes are left to the other ways if they can be told apart; zeroes in data are sent as data: to look for
    /// them would cost more than they do.
    fn try_lend(&mut self, to: ReplyTo, offset: u64, len: u32, df: bool) -> bool {
        let simple = self.conn.style == HeaderStyle::Simple;
        let no_holes = !simple && !df;
        if !self.conn.backend().lends(offset, len as usize, no_holes) {
            return false;
        }
        if simple {
            self.batch.put(&SimpleReply { error: None, cookie: to.cookie }.encode());
        } else {
            let done = ReplyFlags::NBD_REPLY_FLAG_DONE;
            self.batch.put(&to.offset_data(done, offset, len));
        }
        self.batch.export(offset, len as usize);
        true
    }

    /// Builds the reply to a small read in the batch, if the data is at hand.
    fn try_read_in_place(&mut self, to: ReplyTo, offset: u64, len: u32, df: bool) -> bool {
        let n = len as usize;
        let simple = self.conn.style == HeaderStyle::Simple;
        let header = if simple { SimpleReply::LEN } else { to.offset_data_len() };
        let room = self.batch.room((header + n).max(Encoded::MAX));
        if !self.conn.export.backend().try_pread(offset, &mut room[header..header + n]) {
            return false;
        }
        let done = ReplyFlags::NBD_REPLY_FLAG_DONE;
        if simple {
            room[..header].copy_from_slice(&SimpleReply { error: None, cookie: to.cookie }.encode());
            self.batch.commit(header + n);
        } else if df {
            room[..header].copy_from_slice(&to.offset_data(done, offset, len));
            self.batch.commit(header + n);
        } else {
            self.batch.commit_sparse(done, to, offset, n);
        }
        true
    }

    fn co_write_request(
        &mut self,
        h: RequestHeader,
        offset: u64,
        len: u32,
        flags: WriteFlags,
    ) -> Result<(), End> {
        let conn = self.conn.clone();
        let n = len as usize;
        let at_once = flags.is_empty();
        self.rx.limit = if len >= LARGE_PAYLOAD { RECV_SMALL } else { RECV };
        if self.rx.len() > n && at_once && len >= RUN_PART_MIN && self.try_write_run(&h, offset) {
            return Ok(());
        }
        if self.rx.len() >= n
            && at_once
            && n > 0
            && let Some(result) = conn.backend().try_pwrite(offset, &self.rx.bytes()[..n])
        {
            self.rx.consume(n);
            self.wrote(&h, &result);
            self.co_answered(len.into());
            return Ok(());
        }
        let buf;
        let reservation;
        if self.rx.len() >= n {
            reservation = self.co_reserve(len.into())?;
            buf = IoBuf::from(&self.rx.bytes()[..n]);
            self.rx.consume(n);
            // Its coroutine may do it all without waiting (qcow2 allocates so).
            self.turn_bytes += u64::from(len);
        } else {
            // While the payload arrives the request counts as in flight: a shutdown waits for it.
            lock(&conn.outbox).in_flight += 1;
            let received =
                self.co_reserve(len.into()).and_then(|reserved| Ok((reserved, self.co_payload(n)?)));
            lock(&conn.outbox).in_flight -= 1;
            // Nothing of it is written if the client is gone in the middle.
            let received = received?;
            reservation = received.0;
            let Some(payload) = received.1 else {
                self.co_refuse_memory(&h);
                return Ok(());
            };
            buf = payload;
            if at_once && let Some(result) = conn.backend().try_pwrite(offset, &buf) {
                self.wrote(&h, &result);
                self.batch.hold(reservation);
                self.co_answered(len.into());
                return Ok(());
            }
        }
        self.totals.bytes_written += u64::from(len);
        conn.spawn(h, reservation, move |conn| {
            let result = conn.backend().co_pwritev(offset, &[IoSlice::new(&buf)], flags);
            drop(buf);
            conn.counters.bytes_written.add(len.into());
            let mut batch = Batch::new();
            conn.put_result(&mut batch, &h, &result);
            batch
        });
        Ok(())
    }

    /// Answers a write that was done by the reader.
    fn wrote(&mut self, h: &RequestHeader, result: &block::Result<()>) {
        self.totals.bytes_written += h.len;
        self.conn.counters.bytes_written.add(h.len);
        self.conn.put_result(&mut self.batch, h, result);
    }

    /// Answers a request that the budget has room for, and the machine has not. May yield, to send.
    fn co_refuse_memory(&mut self, h: &RequestHeader) {
        let conn = self.conn.clone();
        conn.shared.warn_limited(|suppressed| {
            warn!(
                peer = conn.peer,
                conn = conn.id,
                len = h.len,
                suppressed,
                "no memory for a request: refused; lower bytes_total to what there is"
            );
        });
        conn.put_error(
            &mut self.batch,
            conn.reply_to(h),
            Errno::NBD_ENOMEM,
            "no memory for a request of this length",
        );
        self.co_answered(0);
    }

    /// Receives a payload; what is not there yet goes straight into its buffer. `None` when there is no memory for that:
    /// then it was skipped. Yields.
    fn co_payload(&mut self, n: usize) -> Result<Option<IoBuf>, End> {
        let Some(mut buf) = IoBuf::try_new(n) else {
            self.co_discard(n as u32)?;
            return Ok(None);
        };
        let mut have = self.rx.len().min(n);
        buf[..have].copy_from_slice(&self.rx.bytes()[..have]);
        self.rx.consume(have);
        let conn = self.conn.clone();
        let mut transfer = conn.receiving();
        while have < n {
            self.check_cut()?;
            match self.conn.stream.try_read(&mut buf[have..]) {
                Ok(0) => return Err(End::Truncated),
                Ok(k) => {
                    have += k;
                    transfer.moved(k);
                    self.turn_bytes += k as u64;
                    self.co_pace();
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    transfer.waits(conn.ctx.now_ns());
                    self.co_wait_payload()?;
                }
                Err(e) => return Err(End::Io(e)),
            }
        }
        Ok(Some(buf))
    }

    /// Reads a payload off the stream and forgets it. Yields.
    fn co_discard(&mut self, payload: u32) -> Result<(), End> {
        let mut left = payload as usize;
        loop {
            let n = left.min(self.rx.len());
            self.rx.consume(n);
            left -= n;
            if left == 0 {
                return Ok(());
            }
            self.rx.limit = RECV;
            self.turn_bytes += n as u64;
            self.co_pace();
            self.co_fill().map_err(|end| match end {
                End::Eof => End::Truncated,
                other => other,
            })?;
        }
    }
}
