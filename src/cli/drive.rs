//! The load generator of `conbd bench` without `--verify`: as little work per request as possible, so that what is measured is
//! the server.
//!
//! ```text
//!   driver (one coroutine per connection)   recv many replies ─► note latencies, make the next requests ─► one sendmsg
//!   sender (only while the socket is full)  waits until it is writable, sends the rest
//! ```
//!
//! Replies are as negotiated. What a read brings is received, counted and forgotten. A connection of depth N has N slots; the cookie of a
//! request is its slot.

use super::bench::{Connection, Job, LATENCY_MAX_NS, Random};
use crate::co::Coroutine;
use crate::nbd::client::{Bare, ClientError};
use crate::nbd::proto::*;
use crate::nbd::wire::{ChunkHeader, ReplyHeader, RequestHeader};
use crate::util::buf::IoBuf;
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Bytes of one `recv` (ours: a batch of replies, or a good part of a large one).
const RECV: usize = 256 << 10;
/// Vectors of one `sendmsg` (ours).
const SLICES: usize = 256;

/// Longest payload of an error chunk that is taken: a message of the longest kind, and what belongs to it.
const ERROR_MAX: u64 = NBD_MAX_STRING as u64 + 64;

struct Slot {
    /// Compact or extended; the rest is not sent.
    header: [u8; RequestHeader::EXTENDED_LEN],
    begin: Instant,
    reads: bool,
    offset: u64,
    /// All of the request has left, and its reply has not come.
    in_flight: bool,
    /// Bytes of content that have been announced.
    content: u64,
    error: Option<Errno>,
}

/// What driver and sender share. Home thread only; never locked across a yield.
struct Out {
    slots: Vec<Slot>,
    /// Slots whose requests are to be sent, in order.
    queue: VecDeque<usize>,
    /// Bytes of the first one that are sent already.
    sent: usize,
    /// The sender is at work.
    sender: bool,
}

/// One connection being driven.
struct Drive {
    bare: Arc<Bare>,
    bs: usize,
    /// What every write carries.
    payload: IoBuf,
    out: Mutex<Out>,
}

impl Drive {
    fn header_len(&self) -> usize {
        match self.bare.style {
            HeaderStyle::Extended => RequestHeader::EXTENDED_LEN,
            _ => RequestHeader::LEN,
        }
    }

    fn out(&self) -> MutexGuard<'_, Out> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what is queued, as far as the socket takes it; true when all is gone.
    fn flush(&self, out: &mut Out) -> io::Result<bool> {
        while !out.queue.is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let mut n = 0;
            let mut skip = out.sent;
            for &slot in &out.queue {
                if n + 2 > SLICES {
                    break;
                }
                let slot = &out.slots[slot];
                let parts =
                    [&slot.header[..self.header_len()], if slot.reads { &[] } else { &self.payload[..] }];
                for part in parts {
                    let from = skip.min(part.len());
                    skip -= from;
                    if from < part.len() {
                        slices[n] = IoSlice::new(&part[from..]);
                        n += 1;
                    }
                }
            }
            let mut taken = match self.bare.stream.try_writev(&slices[..n]) {
                Ok(taken) => taken + out.sent,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(e),
            };
            while let Some(&first) = out.queue.front() {
                let len = self.header_len() + if out.slots[first].reads { 0 } else { self.bs };
                if taken < len {
                    break;
                }
                taken -= len;
                out.queue.pop_front();
                out.slots[first].in_flight = true;
            }
            out.sent = taken;
        }
        // In TLS some of it may wait to be sent.
        match self.bare.stream.try_flush() {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            flushed => flushed.map(|()| true),
        }
    }

    /// Sends what is queued; what the socket does not take now, a coroutine sends by and by.
    fn send(self: &Arc<Self>) -> io::Result<()> {
        let mut out = self.out();
        if out.sender || self.flush(&mut out)? {
            return Ok(());
        }
        out.sender = true;
        drop(out);
        let drive = Arc::clone(self);
        Coroutine::new(move || {
            loop {
                // An error shows at the driver's next read, too.
                let Ok(()) = drive.bare.stream.co_wait_writable() else { return };
                let mut out = drive.out();
                match drive.flush(&mut out) {
                    Ok(false) => {}
                    Ok(true) => {
                        out.sender = false;
                        return;
                    }
                    Err(_) => return,
                }
            }
        })
        .enter();
        Ok(())
    }
}

fn lost(doing: &'static str) -> impl Fn(io::Error) -> ClientError {
    move |source| ClientError::Io { doing, source }
}

/// Keeps `depth` requests in flight on a connection until the run ends. Yields.
pub(super) fn co_drive(
    job: &Job,
    connection: &Connection,
    bare: Arc<Bare>,
    depth: usize,
    mut random: Random,
) {
    let mut payload = IoBuf::new(job.bs);
    super::bench::verify_fill(&mut payload, job);
    let slots = (0..depth)
        .map(|_| Slot {
            header: [0; RequestHeader::EXTENDED_LEN],
            begin: Instant::now(),
            reads: true,
            offset: 0,
            in_flight: false,
            content: 0,
            error: None,
        })
        .collect();
    let out = Out { slots, queue: VecDeque::with_capacity(depth), sent: 0, sender: false };
    let drive = Arc::new(Drive { bare, bs: job.bs, payload, out: Mutex::new(out) });
    let mut in_flight = 0;
    for slot in 0..depth {
        in_flight += usize::from(begin(job, connection, &drive, slot, Instant::now(), &mut random));
    }
    let outcome = drive
        .send()
        .map_err(lost("sending requests"))
        .and_then(|()| co_replies(job, connection, &drive, &mut in_flight, &mut random));
    if let Err(error) = outcome {
        connection.record_error(job, &error);
    }
}

/// Makes a slot's next request, unless the run is over; it is sent later.
fn begin(
    job: &Job,
    connection: &Connection,
    drive: &Drive,
    slot: usize,
    now: Instant,
    random: &mut Random,
) -> bool {
    if job.done_at(now) || !job.may_begin() {
        return false;
    }
    let reads = job.reads(random);
    let offset = job.next_block(connection, random) * job.bs as u64;
    let cmd = if reads { NBD_CMD_READ } else { NBD_CMD_WRITE };
    let extended = drive.bare.style == HeaderStyle::Extended;
    let flags = if extended && !reads { CmdFlags::NBD_CMD_FLAG_PAYLOAD_LEN } else { CmdFlags::empty() };
    let request = RequestHeader { flags, cmd, cookie: slot as u64, offset, len: job.bs as u64 };
    let mut header = [0; RequestHeader::EXTENDED_LEN];
    match extended {
        true => header = request.encode_extended(),
        false => header[..RequestHeader::LEN].copy_from_slice(&request.encode()),
    }
    let mut out = drive.out();
    out.slots[slot] = Slot { header, begin: now, reads, offset, in_flight: false, content: 0, error: None };
    out.queue.push_back(slot);
    true
}

/// What was found at the start of a reply, or of a chunk of one.
struct Head {
    /// Bytes that were decoded.
    used: usize,
    cookie: u64,
    /// Bytes of data that follow; `None`: a simple reply, to which its request says that.
    data: Option<u64>,
    /// Bytes of a hole.
    hole: u64,
    error: Option<Errno>,
    /// The reply ends with this.
    done: bool,
}

fn lie(what: impl Into<String>) -> ClientError {
    ClientError::Lie(what.into())
}

/// Decodes what is at the front of `buf`; `None` if some of it has not come yet.
fn next_head(buf: &[u8], style: HeaderStyle) -> Result<Option<Head>, ClientError> {
    let Some((front, rest)) = buf.split_first_chunk::<{ ReplyHeader::LEN }>() else { return Ok(None) };
    let (chunk, rest) = match (ReplyHeader::decode(front)?, style) {
        (ReplyHeader::Simple(reply), HeaderStyle::Simple | HeaderStyle::Structured) => {
            return Ok(Some(Head {
                used: ReplyHeader::LEN,
                cookie: reply.cookie,
                data: None,
                hole: 0,
                error: reply.error,
                done: true,
            }));
        }
        (ReplyHeader::Chunk(chunk), HeaderStyle::Structured) => {
            let Some((tail, rest)) = rest.split_first_chunk() else { return Ok(None) };
            (chunk.with_tail(*tail), rest)
        }
        (ReplyHeader::Extended(chunk), HeaderStyle::Extended) => {
            let Some((tail, rest)) = rest.split_first_chunk() else { return Ok(None) };
            (chunk.with_extended_tail(*tail), rest)
        }
        _ => return Err(lie("a reply of another kind than was negotiated")),
    };
    let mut head = Head {
        used: buf.len() - rest.len(),
        cookie: chunk.cookie,
        data: Some(0),
        hole: 0,
        error: None,
        done: chunk.flags.contains(ReplyFlags::NBD_REPLY_FLAG_DONE),
    };
    let strange = |chunk: &ChunkHeader| {
        lie(format!("a chunk of type {} with {} bytes of payload", chunk.chunk_type, chunk.len))
    };
    match chunk.chunk_type {
        NBD_REPLY_TYPE_NONE if chunk.len == 0 => {}
        NBD_REPLY_TYPE_OFFSET_DATA if chunk.len > 8 => {
            if rest.len() < 8 {
                return Ok(None);
            }
            head.used += 8;
            head.data = Some(chunk.len - 8);
        }
        NBD_REPLY_TYPE_OFFSET_HOLE if chunk.len == 12 => {
            let Some(payload) = rest.first_chunk::<12>() else { return Ok(None) };
            head.used += 12;
            head.hole = u32::from_be_bytes([payload[8], payload[9], payload[10], payload[11]]).into();
        }
        NBD_REPLY_TYPE_ERROR | NBD_REPLY_TYPE_ERROR_OFFSET if (6..=ERROR_MAX).contains(&chunk.len) => {
            if (rest.len() as u64) < chunk.len {
                return Ok(None);
            }
            head.used += chunk.len as usize;
            let errno = rest.first_chunk::<4>().expect("there are 6 bytes");
            head.error = Some(Errno::from_wire(u32::from_be_bytes(*errno)).ok_or_else(|| strange(&chunk))?);
        }
        _ => return Err(strange(&chunk)),
    }
    Ok(Some(head))
}

/// Takes replies and makes new requests until none is in flight.
fn co_replies(
    job: &Job,
    connection: &Connection,
    drive: &Arc<Drive>,
    in_flight: &mut usize,
    random: &mut Random,
) -> Result<(), ClientError> {
    let mut buf = IoBuf::new(RECV);
    let (mut start, mut end) = (0, 0);
    // Of the data that has begun: its slot, how much of it is still to come, and whether that is all of the reply.
    let mut current: Option<(usize, u64, bool)> = None;
    while *in_flight > 0 {
        if start == end {
            (start, end) = (0, 0);
        } else if end == buf.len() {
            buf.copy_within(start..end, 0);
            (start, end) = (0, end - start);
        }
        match drive.bare.stream.try_read(&mut buf[end..]) {
            Ok(0) => return Err(lost("waiting for replies")(io::ErrorKind::UnexpectedEof.into())),
            Ok(n) => end += n,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                drive.bare.stream.co_wait_readable().map_err(lost("waiting for replies"))?;
                continue;
            }
            Err(e) => return Err(lost("waiting for replies")(e)),
        }
        loop {
            let (slot, done) = match &mut current {
                Some((slot, left, done)) => {
                    let n = ((end - start) as u64).min(*left);
                    start += n as usize;
                    *left -= n;
                    if *left > 0 {
                        break;
                    }
                    let ended = (*slot, *done);
                    current = None;
                    ended
                }
                None => {
                    let Some(head) = next_head(&buf[start..end], drive.bare.style)? else { break };
                    start += head.used;
                    let slot = usize::try_from(head.cookie).unwrap_or(usize::MAX);
                    let mut out = drive.out();
                    let Some(request) = out.slots.get_mut(slot).filter(|s| s.in_flight) else {
                        return Err(lie(format!("a reply to cookie {}", head.cookie)));
                    };
                    let content = if request.reads && head.error.is_none() { job.bs as u64 } else { 0 };
                    let data = head.data.unwrap_or(content);
                    request.content += data + head.hole;
                    if request.content > job.bs as u64 {
                        return Err(lie("more content than was asked for"));
                    }
                    request.error = request.error.or(head.error);
                    if data > 0 {
                        current = Some((slot, data, head.done));
                        continue;
                    }
                    (slot, head.done)
                }
            };
            if !done {
                continue;
            }
            let now = Instant::now();
            let (begun, reads, content, offset, error) = {
                let mut out = drive.out();
                let s = &mut out.slots[slot];
                s.in_flight = false;
                (s.begin, s.reads, s.content, s.offset, s.error)
            };
            let len = job.bs as u64;
            match error {
                Some(errno) => {
                    let cmd = if reads { NBD_CMD_READ } else { NBD_CMD_WRITE };
                    let error = ClientError::Request { cmd, offset, len, errno, message: String::new() };
                    connection.record_error(job, &error);
                }
                None if content != if reads { len } else { 0 } => {
                    return Err(lie(format!("{content} bytes in the reply to a request of {len}")));
                }
                None => {
                    let latency = u64::try_from((now - begun).as_nanos()).unwrap_or(u64::MAX);
                    connection.record(reads, latency.clamp(1, LATENCY_MAX_NS));
                }
            }
            *in_flight -= 1;
            *in_flight += usize::from(begin(job, connection, drive, slot, now, random));
        }
        drive.send().map_err(lost("sending requests"))?;
    }
    Ok(())
}
