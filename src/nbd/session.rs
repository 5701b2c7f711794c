//! One connection, from accept to close.
//!
//! ```text
//!                    ┌────────────── reader coroutine (one per connection) ──────────────┐
//!   socket ─ recv ──►│ decode many ─ validate ─┬─ needs no waiting: answered here ──────┐ │
//!                    └─────────────────────────│───────────────────────────────────────│─┘
//!                                              └─ else: a coroutine per request ─┐     │ batch
//!                                                                                ▼     ▼
//!   socket ◄─ sendmsg ── whoever finds nobody sending ◄──────────────────────── queue of replies
//! ```
//!
//! Threads: everything of a connection runs on one IOThread (its home); the handshake may begin on another one and
//! moves over before transmission begins. The locks in here are taken by that thread only, never across a yield; they
//! are there because coroutines must be `Send`.
//!
//! Here: the session's life and the negotiation. What its coroutines share is in `conn.rs`, the reader in `reader.rs`.
//!
//! Invariants:
//! - Exactly one reply per cookie: a request is answered by the reader, or by its coroutine through
//!   `RequestGuard::complete`; a coroutine that dies without it ends the connection.
//! - One sender at a time (`Outbox::sending`), so replies are never torn.
//! - A payload is reserved before it is read, and consumed whatever the verdict.
//! - The reader never waits (for input, budget or a turn) with replies in its own hands: it sends them first.
//!   And it does not read on while the client leaves its replies unread.
//! - An idle session is plain data: what was negotiated, the export, and bytes received but not parsed.

use super::access::{ClientIdentity, TlsPeer};
use super::channel::{Channel, HandshakeError};
use super::conn::{self, Conn};
use super::export::Export;
use super::handshake::{self, CloseReason, Handshake, Negotiated, Step};
use super::reader::Reader;
use super::server::Shared;
use crate::aio::AioContext;
use crate::co::{self, CoStream, Coroutine, co_yield};
use bytes::{Buf, BytesMut};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tracing::{Span, debug, debug_span, field, info, warn};

/// What the acceptor knows of a connection.
pub(super) struct Accepted {
    pub(super) id: u64,
    pub(super) fd: OwnedFd,
    pub(super) peer: String,
    pub(super) thread: usize,
}

/// Begins a session: on the home thread of `shared.threads[accepted.thread]`, in plain code.
pub(super) fn start(shared: Arc<Shared>, accepted: Accepted) {
    if !co::has_room() {
        shared.warn_no_room(&accepted.peer);
        return shared.session_ended(accepted.id, accepted.thread, false);
    }
    // At debug level only: entering a span costs something at every switch. What an operator reads has fields of its own.
    let span = debug_span!("connection", conn = accepted.id, peer = accepted.peer, export = field::Empty);
    let of_session = span.clone();
    let session = move || co_session(&shared, accepted, of_session);
    Coroutine::builder().name("session").span(span).build(session).enter();
}

/// Takes the connection off the books, however the session ends.
struct Live<'s> {
    shared: &'s Shared,
    id: u64,
    thread: usize,
    /// The client has chosen an export.
    served: bool,
}

impl Drop for Live<'_> {
    fn drop(&mut self) {
        self.shared.session_ended(self.id, self.thread, self.served);
    }
}

fn co_session(shared: &Arc<Shared>, accepted: Accepted, span: Span) {
    let Accepted { id, fd, peer, thread } = accepted;
    let mut live = Live { shared, id, thread, served: false };
    let client = identify(&fd);
    let stream = match CoStream::new(fd) {
        Ok(stream) => stream,
        Err(error) => {
            warn!(peer, %error, "cannot attach a connection to its event loop");
            return;
        }
    };
    if !shared.session_began(id, &peer, &stream) {
        return;
    }
    debug!(peer, conn = id, "client connected");
    let mut channel = Channel::Plain(stream.clone());
    let negotiation = Negotiation { shared, id, peer: &peer, thread };
    let (negotiated, replies, rest, tls) = match negotiation.co_run(&mut channel, client) {
        Ok(done) => done,
        Err(reason) => {
            match reason {
                HandshakeEnd::Closed(CloseReason::Abort) | HandshakeEnd::Left => {
                    debug!(peer, conn = id, "client left during negotiation");
                }
                HandshakeEnd::Closed(reason) => {
                    shared.warn_limited(|suppressed| {
                        warn!(peer, conn = id, %reason, suppressed, "option negotiation failed");
                    });
                }
                HandshakeEnd::Tls(reason) => {
                    shared.warn_limited(|suppressed| {
                        warn!(peer, conn = id, %reason, suppressed, "TLS is not up");
                    });
                }
                // Who cuts it, a stop or a policy, has said so.
                HandshakeEnd::Io(error) if stream.is_interrupted() => {
                    debug!(peer, conn = id, %error, "connection cut during negotiation");
                }
                HandshakeEnd::Io(error) => {
                    shared.warn_limited(|suppressed| {
                        warn!(peer, conn = id, %error, suppressed, "connection lost during negotiation");
                    });
                }
            }
            channel.co_close();
            return;
        }
    };

    let thread = shared.place(&negotiated.export, thread);
    let _admission = negotiated.admission.clone();
    let _placed = Placed { shared, export: negotiated.export.clone(), thread };
    live.thread = thread;
    live.served = true;
    let slot = &shared.threads[thread];
    if let Err(error) = stream.co_move_to(&slot.ctx) {
        warn!(peer, conn = id, %error, "cannot move a connection to its event loop");
        return;
    }
    stream.set_read_deadline(None);
    stream.set_write_deadline(None);
    let counters = slot.counters.clone();
    counters.connections.add(1);
    shared.session_transmits(id, &negotiated.export);

    span.record("export", negotiated.export.name());
    let conn = Conn::new(shared, &channel, &slot.ctx, counters.clone(), id, peer, *negotiated);
    info!(
        peer = conn.peer,
        conn = id,
        export = conn.export.name(),
        ctx = slot.ctx.name(),
        headers = ?conn.style,
        contexts = conn.contexts.len(),
        tls = tls.as_ref().map_or("no", |tls| tls.version.as_str()),
        "client entered transmission"
    );
    // Into the queue, not the reader's batch: the answers to requests that came in the same packet go behind them.
    conn::lock(&conn.outbox).queue.put(&replies);
    drop(replies);
    let mut reader = Reader::new(conn.clone(), &rest);
    drop(rest);
    let end = reader.co_run();
    reader.co_finish(&end);
    counters.disconnects.add(1);
    let totals = reader.totals;
    let seconds = slot.ctx.now_ns().saturating_sub(conn.began_ns) as f64 / 1e9;
    info!(
        peer = conn.peer,
        conn = id,
        export = conn.export.name(),
        end = %end,
        requests = totals.requests,
        inline = totals.inline,
        errors = conn.errors.load(Ordering::Relaxed),
        bytes_read = totals.bytes_read,
        bytes_written = totals.bytes_written,
        seconds,
        "client disconnected"
    );
}

/// Counts a connection in for the placement of later ones.
struct Placed<'s> {
    shared: &'s Shared,
    export: Arc<Export>,
    thread: usize,
}

impl Drop for Placed<'_> {
    fn drop(&mut self) {
        self.shared.unplace(&self.export, self.thread);
    }
}

// ------------------------------------------------------------------------------------------------- negotiation

enum HandshakeEnd {
    /// By the state machine's verdict.
    Closed(CloseReason),
    /// The client closed between two messages.
    Left,
    /// The TLS handshake, or the client's identity.
    Tls(String),
    Io(io::Error),
}

/// Steps of a negotiation in one turn of the loop (ours); then other connections have theirs.
const NEGOTIATION_TURN: u32 = 64;

/// Whether an error says that the client is not there any more.
fn gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

/// Replies of one step are sent when this many bytes are ready, or when input is missing (ours).
const NEGOTIATION_FLUSH: usize = 64 << 10;

/// What is known of a client before it says anything.
fn identify(fd: &OwnedFd) -> ClientIdentity {
    let address = rustix::net::getpeername(fd).ok().flatten();
    let address = address.and_then(|addr| std::net::SocketAddr::try_from(addr).ok());
    // The kernel makes something up for other sockets than unix ones.
    let uid = match rustix::net::getsockname(fd).map(|addr| addr.address_family()) {
        Ok(rustix::net::AddressFamily::UNIX) => {
            rustix::net::sockopt::socket_peercred(fd).ok().map(|cred| cred.uid.as_raw())
        }
        _ => None,
    };
    ClientIdentity { address: address.map(|a| a.ip().to_canonical()), uid, tls: None }
}

/// The last replies, unsent; what the client has sent beyond; what TLS has proved.
type Agreed = (Box<Negotiated>, Vec<u8>, BytesMut, Option<Arc<TlsPeer>>);

/// One handshake being spoken.
struct Negotiation<'s> {
    shared: &'s Shared,
    id: u64,
    peer: &'s str,
    thread: usize,
}

impl Negotiation<'_> {
    /// Speaks the handshake. `channel` becomes TLS on the way if the client asks for it.
    fn co_run(&self, channel: &mut Channel, client: ClientIdentity) -> Result<Agreed, HandshakeEnd> {
        let shared = self.shared;
        let ctx = AioContext::current().expect("sessions run on IOThreads");
        let timeout = shared.config.handshake_timeout;
        let deadline = (!timeout.is_zero()).then(|| ctx.now_ns().saturating_add(timeout.as_nanos() as u64));
        drop(ctx);
        channel.set_read_deadline(deadline);
        channel.set_write_deadline(deadline);
        channel.co_write_all(&handshake::greeting()).map_err(|e| match gone(&e) {
            // A port probe: somebody wanted to know whether we listen.
            true => HandshakeEnd::Left,
            false => HandshakeEnd::Io(e),
        })?;
        let mut hs = Handshake::with(shared.tls_mode(), client);
        let mut input = BytesMut::new();
        let mut out = Vec::new();
        let mut steps = 0u32;
        loop {
            steps += 1;
            if steps.is_multiple_of(NEGOTIATION_TURN) {
                co_pace(channel, deadline.unwrap_or(u64::MAX)).map_err(HandshakeEnd::Io)?;
            }
            let mut consumed = 0;
            let table = shared.exports.snapshot();
            let step = hs.advance(&input, &mut consumed, &table, shared.is_stopping(), &mut out);
            input.advance(consumed);
            if let Some(refusal) = hs.take_refusal() {
                shared.warn_limited(|suppressed| {
                    warn!(
                        peer = self.peer,
                        conn = self.id,
                        export = refusal.export,
                        client = %hs.client(),
                        reason = refusal.why,
                        suppressed,
                        "export refused"
                    );
                });
            }
            match step {
                Step::Enter(negotiated) => return Ok((negotiated, out, input, hs.client().tls.clone())),
                Step::Again if out.len() < NEGOTIATION_FLUSH => {}
                Step::Again => {
                    channel.co_write_all(&out).map_err(HandshakeEnd::Io)?;
                    out.clear();
                }
                Step::StartTls => {
                    assert!(input.is_empty(), "TLS was granted with clear bytes in hand");
                    channel.co_write_all(&out).map_err(HandshakeEnd::Io)?;
                    out.clear();
                    hs.secured(self.co_start_tls(channel, hs.client(), deadline.unwrap_or(u64::MAX))?);
                }
                Step::Close(reason) => {
                    // The reason is already known: whether the client still takes the reply changes nothing.
                    let _ = channel.co_write_all(&out);
                    return Err(HandshakeEnd::Closed(reason));
                }
                Step::NeedInput => {
                    channel.co_write_all(&out).map_err(HandshakeEnd::Io)?;
                    out.clear();
                    match co_receive(channel, &mut input) {
                        Ok(0) if input.is_empty() => return Err(HandshakeEnd::Left),
                        Ok(0) => return Err(HandshakeEnd::Io(io::ErrorKind::UnexpectedEof.into())),
                        Ok(_) => {}
                        // The server shuts down: later options are refused, the connection is closed by and by.
                        Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                        Err(e) if gone(&e) && input.is_empty() => return Err(HandshakeEnd::Left),
                        Err(e) => return Err(HandshakeEnd::Io(e)),
                    }
                }
            }
        }
    }

    /// Makes TLS of the channel. The credentials are those of this moment.
    fn co_start_tls(
        &self,
        channel: &mut Channel,
        client: &ClientIdentity,
        deadline: u64,
    ) -> Result<TlsPeer, HandshakeEnd> {
        let shared = self.shared;
        let config = shared.tls_config().expect("TLS is granted only where there is some");
        let gate = &shared.threads[self.thread].tls_gate;
        let stream = channel.stream().clone();
        let (secure, proved) =
            Channel::co_accept(&stream, &config, gate, deadline).map_err(|error| match error {
                HandshakeError::Io(e) => HandshakeEnd::Io(e),
                other => HandshakeEnd::Tls(other.to_string()),
            })?;
        *channel = secure;
        let client = ClientIdentity { tls: Some(Arc::new(proved.clone())), ..client.clone() };
        debug!(
            peer = self.peer,
            conn = self.id,
            %client,
            version = proved.version,
            cipher = proved.cipher,
            "TLS is up"
        );
        match shared.config.tls.as_ref().and_then(|tls| tls.authz.as_ref()) {
            Some(authz) if !authz.admits(&client) => {
                Err(HandshakeEnd::Tls(format!("client is not authorized: {client}")))
            }
            _ => Ok(proved),
        }
    }
}

/// Lets other connections have their turn, and looks at what only waits look at otherwise: a client that never lets us wait
/// must keep neither the thread nor its place. Yields.
fn co_pace(channel: &Channel, deadline: u64) -> io::Result<()> {
    let ctx = AioContext::current().expect("sessions run on IOThreads");
    Coroutine::current().expect("sessions are coroutines").schedule(&ctx);
    co_yield();
    if channel.stream().is_interrupted() {
        return Err(io::ErrorKind::ConnectionAborted.into());
    }
    if ctx.now_ns() >= deadline {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(())
}

/// Appends what the client has sent. Grows by what arrives, not by what the client announces.
fn co_receive(channel: &Channel, input: &mut BytesMut) -> io::Result<usize> {
    const STEP: usize = 2048;
    let old = input.len();
    input.resize(old + STEP, 0);
    let got = channel.co_read(&mut input[old..]);
    input.truncate(old + *got.as_ref().unwrap_or(&0));
    got
}
