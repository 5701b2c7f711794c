//! The load generator of `conbd bench` without `--verify`: as little work per request as possible, so that what is measured is
//! the server.
//!
//! ```text
//!   driver (one coroutine per connection)   recv many replies ─► note latencies, make the next requests ─► one sendmsg
//!   sender (only while the socket is full)  waits until it is writable, sends the rest
//! ```
//!
//! Replies are simple ones. What a read brings is received and forgotten. A connection of depth N has N slots; the cookie of a
//! request is its slot.

use super::bench::{Connection, Job, LATENCY_MAX_NS, Random};
use crate::co::Coroutine;
use crate::nbd::client::{Bare, ClientError};
use crate::nbd::proto::{CmdFlags, NBD_CMD_READ, NBD_CMD_WRITE};
use crate::nbd::wire::{ReplyHeader, RequestHeader, SimpleReply};
use crate::util::buf::IoBuf;
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Bytes of one `recv` (ours: a batch of replies, or a good part of a large one).
const RECV: usize = 256 << 10;
/// Vectors of one `sendmsg` (ours).
const SLICES: usize = 256;

struct Slot {
    header: [u8; RequestHeader::LEN],
    begin: Instant,
    reads: bool,
    offset: u64,
    /// All of the request has left, and its reply has not come.
    in_flight: bool,
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
                let parts = [&slot.header[..], if slot.reads { &[] } else { &self.payload[..] }];
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
                let len = RequestHeader::LEN + if out.slots[first].reads { 0 } else { self.bs };
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
            header: [0; RequestHeader::LEN],
            begin: Instant::now(),
            reads: true,
            offset: 0,
            in_flight: false,
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
    let header =
        RequestHeader { flags: CmdFlags::empty(), cmd, cookie: slot as u64, offset, len: job.bs as u64 };
    let mut out = drive.out();
    out.slots[slot] = Slot { header: header.encode(), begin: now, reads, offset, in_flight: false };
    out.queue.push_back(slot);
    true
}

/// Takes replies and makes new requests until none is in flight.
fn co_replies(
    job: &Job,
    connection: &Connection,
    drive: &Arc<Drive>,
    in_flight: &mut usize,
    random: &mut Random,
) -> Result<(), ClientError> {
    let mut buf = IoBuf::new(RECV.max(SimpleReply::LEN));
    let (mut start, mut end) = (0, 0);
    // Of the read whose reply has begun: its slot, and how much of its content is still to come.
    let mut current = None;
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
            let slot = match &mut current {
                Some((slot, left)) => {
                    let n = (end - start).min(*left);
                    start += n;
                    *left -= n;
                    if *left > 0 {
                        break;
                    }
                    let slot = *slot;
                    current = None;
                    slot
                }
                None => {
                    let Some(header) = buf[start..end].first_chunk::<{ SimpleReply::LEN }>() else { break };
                    let ReplyHeader::Simple(reply) = ReplyHeader::decode(header)? else {
                        return Err(ClientError::Lie(
                            "a structured reply that was not negotiated".to_owned(),
                        ));
                    };
                    start += SimpleReply::LEN;
                    let slot = usize::try_from(reply.cookie).unwrap_or(usize::MAX);
                    let mut out = drive.out();
                    let Some(request) = out.slots.get_mut(slot).filter(|s| s.in_flight) else {
                        return Err(ClientError::Lie(format!("a reply to cookie {}", reply.cookie)));
                    };
                    request.in_flight = false;
                    let (reads, offset) = (request.reads, request.offset);
                    drop(out);
                    if let Some(errno) = reply.error {
                        let cmd = if reads { NBD_CMD_READ } else { NBD_CMD_WRITE };
                        let len = job.bs as u64;
                        let message = String::new();
                        let error = ClientError::Request { cmd, offset, len, errno, message };
                        connection.record_error(job, &error);
                        *in_flight -= 1;
                        *in_flight +=
                            usize::from(begin(job, connection, drive, slot, Instant::now(), random));
                        continue;
                    }
                    if reads {
                        current = Some((slot, job.bs));
                        continue;
                    }
                    slot
                }
            };
            let now = Instant::now();
            let (begun, reads) = {
                let out = drive.out();
                (out.slots[slot].begin, out.slots[slot].reads)
            };
            let latency = u64::try_from((now - begun).as_nanos()).unwrap_or(u64::MAX);
            connection.record(reads, latency.clamp(1, LATENCY_MAX_NS));
            *in_flight -= 1;
            *in_flight += usize::from(begin(job, connection, drive, slot, now, random));
        }
        drive.send().map_err(lost("sending requests"))?;
    }
    Ok(())
}
