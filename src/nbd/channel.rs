//! A connection's byte stream, in the clear or in TLS, with the same habits: try first, wait outside, never yield inside.
//!
//! ```text
//!   session, reader, conn ──► Channel ─┬─ Plain: CoStream
//!                                      └─ Tls:   SSL ⇄ Pipe (memory: ciphertext in, ciphertext out) ⇄ CoStream
//! ```
//!
//! OpenSSL sees nothing but the `Pipe`: two buffers in memory. We receive into the one before, and send the other after a call of
//! OpenSSL, so no call waits, and one may run in the thread pool. Reader and writer of a connection share one SSL; each call runs to its
//! end under the lock, which only the home thread takes and which is never held across a yield.
//!
//! Edges: `WouldBlock` from [`Channel::try_read`] means that the socket, the input buffer and OpenSSL are all empty, so the
//! next byte brings an edge. Short reads and full buffers leave data inside, which [`Channel::co_wait_readable`] knows of.
//!
//! Writing: OpenSSL is given several records at a time, and only when what was encrypted before has left; so the output buffer is
//! bounded, and `SSL_write` never has to be repeated. What [`Channel::try_writev`] takes may still be in that buffer:
//! [`Channel::try_flush`] tells, and whoever sends does not stop before.

use super::access::TlsPeer;
use super::tls::{self, TlsClientConfig, TlsServerConfig};
use crate::aio::AioContext;
use crate::co::{CoMutex, CoStream, Coroutine, co_run_blocking, co_yield};
use crate::util::buf::IoBuf;
use openssl::ssl::{ErrorCode, ShutdownResult, Ssl, SslStream};
use openssl::x509::X509VerifyResult;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard};

/// Most plaintext in one record (RFC 8446, 5.1).
const RECORD: usize = 16 << 10;
/// What encryption adds to a record at most: header, nonce, padding, tag (ours, generous: a block cipher with a MAC adds under 100).
const OVERHEAD: usize = 256;
/// Records that are encrypted before they are sent together (ours).
const RECORDS: usize = 15;
/// Room for what OpenSSL says by itself: alerts, key updates, a flight of a handshake with long chains (ours). A peer that
/// makes it say more, and does not read it, is cut.
const CONTROL: usize = 64 << 10;
/// The output buffer.
const OUT: usize = RECORDS * (RECORD + OVERHEAD) + CONTROL;
/// OpenSSL's `X509_V_ERR_UNSPECIFIED`.
const VERIFY_UNSPECIFIED: i32 = 1;
/// The input buffer: what one `recv` takes (ours).
const IN: usize = 128 << 10;

/// OpenSSL's whole world.
#[derive(Default)]
struct Pipe {
    input: Option<IoBuf>,
    in_start: usize,
    in_end: usize,
    /// The peer has closed its side.
    eof: bool,
    output: Option<IoBuf>,
    out_start: usize,
    out_end: usize,
}

impl Pipe {
    fn received(&self) -> usize {
        self.in_end - self.in_start
    }

    fn unsent(&self) -> &[u8] {
        self.output.as_ref().map_or(&[], |b| &b[self.out_start..self.out_end])
    }
}

impl Read for Pipe {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.received().min(buf.len());
        match &self.input {
            Some(input) if n > 0 => {
                buf[..n].copy_from_slice(&input[self.in_start..self.in_start + n]);
                self.in_start += n;
                Ok(n)
            }
            _ if self.eof || buf.is_empty() => Ok(0),
            _ => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let output = self.output.get_or_insert_with(|| IoBuf::new(OUT));
        let Some(room) = output.get_mut(self.out_end..self.out_end + bytes.len()) else {
            return Err(io::Error::other("the peer makes us answer, and does not read the answers"));
        };
        room.copy_from_slice(bytes);
        self.out_end += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct State {
    ssl: SslStream<Pipe>,
    /// OpenSSL has failed for good.
    failed: bool,
    /// The peer has said that it sends no more.
    ended: bool,
    said_goodbye: bool,
}

/// A stream in TLS. Home thread only, as a [`CoStream`].
pub struct TlsStream {
    stream: Arc<CoStream>,
    state: Mutex<State>,
}

/// A connection's byte stream. Cheap to clone: both sides of a connection share it. Methods are as [`CoStream`]'s, where the
/// rules for callers are written.
#[derive(Clone)]
pub enum Channel {
    /// In the clear.
    Plain(Arc<CoStream>),
    /// In TLS.
    Tls(Arc<TlsStream>),
}

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The connection broke, was cut, or took too long.
    #[error("connection lost in the TLS handshake: {0}")]
    Io(io::Error),
    /// The peer closed.
    #[error("the peer closed the connection in the TLS handshake")]
    Closed,
    /// What was received is no TLS, or the peer is not who it should be, or it says that we are not.
    #[error("TLS handshake failed: {0}")]
    Tls(String),
}

/// Lets one handshake at a time take a step on a thread, and others have their turn in between. One per IOThread.
pub struct HandshakeGate(CoMutex<()>);

impl Default for HandshakeGate {
    fn default() -> HandshakeGate {
        HandshakeGate(CoMutex::new(()))
    }
}

impl Channel {
    /// Reads without waiting, decrypting if need be. `WouldBlock` when there is nothing; 0 at the end. Fills `buf` as far as
    /// what has arrived reaches.
    ///
    /// # Errors
    /// What `recv` reports; `InvalidData` when the peer breaks TLS.
    pub fn try_read(&self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Channel::Plain(stream) => stream.try_read(buf),
            Channel::Tls(tls) => tls.try_read(buf),
        }
    }

    /// Takes what can be sent without waiting, encrypted if need be. `WouldBlock` when that is nothing. In TLS what was taken
    /// may wait in a buffer: see [`Channel::try_flush`].
    ///
    /// # Errors
    /// What `sendmsg` reports.
    pub fn try_writev(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Channel::Plain(stream) => stream.try_writev(bufs),
            Channel::Tls(tls) => tls.try_writev(bufs),
        }
    }

    /// Whether [`Channel::try_send_file`] pays: a unix socket, in the clear. Over TCP it was measured to be slower than a copy.
    #[must_use]
    pub fn takes_files(&self) -> bool {
        matches!(self, Channel::Plain(stream) if stream.is_unix())
    }

    /// Sends part of a file without a copy. Only where [`Channel::takes_files`] says so.
    ///
    /// # Errors
    /// As [`CoStream::try_send_file`]; `Unsupported` in TLS.
    pub fn try_send_file(&self, file: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<usize> {
        match self {
            Channel::Plain(stream) => stream.try_send_file(file, offset, len),
            Channel::Tls(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Sends what waits in the buffer. `WouldBlock` when some is left: wait for the stream to be writable, and call again.
    ///
    /// # Errors
    /// What `sendmsg` reports.
    pub fn try_flush(&self) -> io::Result<()> {
        match self {
            Channel::Plain(_) => Ok(()),
            Channel::Tls(tls) => match tls.flush(&mut tls.lock())? {
                true => Ok(()),
                false => Err(io::ErrorKind::WouldBlock.into()),
            },
        }
    }

    /// Yields until there may be something to read.
    ///
    /// # Errors
    /// As [`CoStream::co_wait_readable`].
    pub fn co_wait_readable(&self) -> io::Result<()> {
        match self {
            Channel::Plain(stream) => stream.co_wait_readable(),
            Channel::Tls(tls) => {
                if tls.has_input() {
                    return Ok(());
                }
                tls.stream.co_wait_readable()
            }
        }
    }

    /// Yields until the stream may be writable.
    ///
    /// # Errors
    /// As [`CoStream::co_wait_writable`].
    pub fn co_wait_writable(&self) -> io::Result<()> {
        self.stream().co_wait_writable()
    }

    /// The socket underneath; in TLS its bytes are ciphertext: only for deadlines, kicks and interrupts.
    #[must_use]
    pub fn stream(&self) -> &Arc<CoStream> {
        match self {
            Channel::Plain(stream) => stream,
            Channel::Tls(tls) => &tls.stream,
        }
    }

    /// Whether what is written travels encrypted.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        matches!(self, Channel::Tls(_))
    }

    /// Bounds the following waits for reading.
    pub fn set_read_deadline(&self, deadline_ns: Option<u64>) {
        self.stream().set_read_deadline(deadline_ns);
    }

    /// Bounds the following waits for writing.
    pub fn set_write_deadline(&self, deadline_ns: Option<u64>) {
        self.stream().set_write_deadline(deadline_ns);
    }

    /// Makes waits fail, now and later. Any thread.
    pub fn interrupt(&self) {
        self.stream().interrupt();
    }

    /// Reads what is there; yields while there is nothing.
    ///
    /// # Errors
    /// As [`CoStream::co_read`].
    pub fn co_read(&self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.try_read(buf) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.co_wait_readable()?,
                other => return other,
            }
        }
    }

    /// Fills `buf` or fails with `UnexpectedEof`.
    ///
    /// # Errors
    /// As [`CoStream::co_read_exact`].
    pub fn co_read_exact(&self, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            match self.co_read(buf)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => buf = &mut buf[n..],
            }
        }
        Ok(())
    }

    /// Sends all of `bufs`; yields while the peer does not read. `bufs` is used up.
    ///
    /// # Errors
    /// As [`CoStream::co_writev_all`].
    pub fn co_writev_all(&self, mut bufs: &mut [IoSlice<'_>]) -> io::Result<()> {
        IoSlice::advance_slices(&mut bufs, 0);
        while !bufs.is_empty() {
            match self.try_writev(bufs) {
                Ok(n) => IoSlice::advance_slices(&mut bufs, n),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.co_wait_writable()?,
                Err(e) => return Err(e),
            }
        }
        self.co_flush()
    }

    /// Sends all of `buf`.
    ///
    /// # Errors
    /// As [`Channel::co_writev_all`].
    pub fn co_write_all(&self, buf: &[u8]) -> io::Result<()> {
        self.co_writev_all(&mut [IoSlice::new(buf)])
    }

    /// Sends what waits in the buffer; yields while the peer does not read.
    ///
    /// # Errors
    /// As [`Channel::co_writev_all`].
    pub fn co_flush(&self) -> io::Result<()> {
        loop {
            match self.try_flush() {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.co_wait_writable()?,
                other => return other,
            }
        }
    }

    /// Says that nothing more will be written: in TLS a close_notify behind all that was. Nobody else may be sending. Yields
    /// while the peer takes nothing, up to the deadline; not after an interrupt.
    pub fn co_say_goodbye(&self) {
        if let Channel::Tls(tls) = self {
            tls.say_goodbye();
            // The peer may be gone, or not reading: it is told as far as it listens.
            let _ = self.co_flush();
        }
    }

    /// Ends the stream: [`Channel::co_say_goodbye`], then the socket is shut down.
    pub fn co_close(&self) {
        self.co_say_goodbye();
        let _ = self.stream().shutdown(std::net::Shutdown::Both); // the peer may be gone already
    }

    /// The server's side of a TLS handshake on a stream that is in the clear so far. The stream's deadlines hold for each wait, and
    /// `deadline_ns` for the whole. Yields; takes one step per turn of the loop.
    ///
    /// # Errors
    /// [`HandshakeError`]; the connection is of no use then.
    pub fn co_accept(
        stream: &Arc<CoStream>,
        config: &TlsServerConfig,
        gate: &HandshakeGate,
        deadline_ns: u64,
    ) -> Result<(Channel, TlsPeer), HandshakeError> {
        let ssl = config.accept().map_err(|e| HandshakeError::Tls(e.to_string()))?;
        co_handshake(stream, ssl, Some(gate), config.is_slow(), deadline_ns)
    }

    /// The client's side of a TLS handshake with the server of that name. Yields.
    ///
    /// # Errors
    /// [`HandshakeError`]; the connection is of no use then.
    pub fn co_connect(
        stream: &Arc<CoStream>,
        config: &TlsClientConfig,
        host: &str,
        deadline_ns: u64,
    ) -> Result<(Channel, TlsPeer), HandshakeError> {
        let ssl = config.connect(host).map_err(|e| HandshakeError::Tls(e.to_string()))?;
        co_handshake(stream, ssl, None, false, deadline_ns)
    }
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple(if self.is_tls() { "Tls" } else { "Plain" }).field(self.stream()).finish()
    }
}

/// What a call of OpenSSL came to.
enum Outcome {
    Done(usize),
    /// It needs more input.
    WantRead,
    /// The peer has said goodbye.
    Ended,
    /// The peer has closed without a goodbye.
    Cut,
    Failed(String),
}

fn outcome(result: Result<usize, openssl::ssl::Error>, ssl: &SslStream<Pipe>) -> Outcome {
    let error = match result {
        Ok(n) => return Outcome::Done(n),
        Err(error) => error,
    };
    match error.code() {
        ErrorCode::WANT_READ => Outcome::WantRead,
        ErrorCode::ZERO_RETURN => Outcome::Ended,
        ErrorCode::SYSCALL if error.io_error().is_none() && ssl.get_ref().eof => Outcome::Cut,
        _ => Outcome::Failed(match (error.ssl_error(), error.io_error()) {
            (Some(stack), _) => tls::reasons(stack),
            (None, Some(e)) => e.to_string(),
            (None, None) => "OpenSSL gives no reason".to_owned(),
        }),
    }
}

/// Receives into the pipe, which is empty. False: nothing is there yet.
fn receive(stream: &CoStream, pipe: &mut Pipe) -> io::Result<bool> {
    assert_eq!(pipe.received(), 0, "OpenSSL asked for more before it had taken what there is");
    let buf = pipe.input.get_or_insert_with(|| IoBuf::new(IN));
    (pipe.in_start, pipe.in_end) = (0, 0);
    match stream.try_read(buf) {
        Ok(0) => pipe.eof = true,
        Ok(n) => pipe.in_end = n,
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
            // An idle connection holds no buffer.
            pipe.input = None;
            return Ok(false);
        }
        Err(e) => return Err(e),
    }
    Ok(true)
}

/// Sends what is in the pipe. False: some is left.
fn send(stream: &CoStream, pipe: &mut Pipe) -> io::Result<bool> {
    while !pipe.unsent().is_empty() {
        match stream.try_writev(&[IoSlice::new(pipe.unsent())]) {
            Ok(n) => pipe.out_start += n,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(e) => return Err(e),
        }
    }
    pipe.output = None;
    (pipe.out_start, pipe.out_end) = (0, 0);
    Ok(true)
}

fn co_handshake(
    stream: &Arc<CoStream>,
    ssl: Ssl,
    gate: Option<&HandshakeGate>,
    slow: bool,
    deadline_ns: u64,
) -> Result<(Channel, TlsPeer), HandshakeError> {
    let ctx = AioContext::current().expect("handshakes run in coroutines, which have a context");
    let mut ssl = SslStream::new(ssl, Pipe::default()).map_err(|e| HandshakeError::Tls(tls::reasons(&e)))?;
    // A server waits for the ClientHello before its first step; a client begins.
    let mut wants_input = gate.is_some();
    loop {
        while wants_input {
            match receive(stream, ssl.get_mut()).map_err(HandshakeError::Io)? {
                true => wants_input = false,
                false => match stream.co_wait_readable() {
                    Ok(()) => {}
                    // The server shuts down: a connection that has not chosen an export is closed by and by.
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(HandshakeError::Io(e)),
                },
            }
        }
        let step = {
            let _held = gate.map(|gate| gate.0.co_lock());
            if ctx.now_ns() >= deadline_ns {
                return Err(HandshakeError::Io(io::ErrorKind::TimedOut.into()));
            }
            let mut step = || ssl.do_handshake().map(|()| 0);
            let result = if slow { co_run_blocking(step) } else { step() };
            if gate.is_some() {
                // The gate is held for a turn: whatever else the thread has to do comes before the next step of anybody.
                Coroutine::current().expect("handshakes run in coroutines").schedule(&ctx);
                co_yield();
            }
            outcome(result, &ssl)
        };
        // Whatever came of it, the peer is told: a flight, or an alert.
        let sent = co_send_all(stream, ssl.get_mut());
        match step {
            Outcome::Done(_) => sent.map_err(HandshakeError::Io)?,
            Outcome::WantRead => {
                sent.map_err(HandshakeError::Io)?;
                wants_input = true;
                continue;
            }
            Outcome::Ended | Outcome::Cut => return Err(HandshakeError::Closed),
            Outcome::Failed(why) => {
                let verdict = ssl.ssl().verify_result();
                // "Unspecified" is what it says before anything was verified.
                return Err(HandshakeError::Tls(match verdict {
                    X509VerifyResult::OK => why,
                    verdict if verdict.as_raw() == VERIFY_UNSPECIFIED => why,
                    verdict => format!("{why}: {}", verdict.error_string()),
                }));
            }
        }
        let peer = tls::peer(ssl.ssl());
        let state = State { ssl, failed: false, ended: false, said_goodbye: false };
        let tls = TlsStream { stream: Arc::clone(stream), state: Mutex::new(state) };
        return Ok((Channel::Tls(Arc::new(tls)), peer));
    }
}

fn co_send_all(stream: &CoStream, pipe: &mut Pipe) -> io::Result<()> {
    while !send(stream, pipe)? {
        stream.co_wait_writable()?;
    }
    Ok(())
}

impl TlsStream {
    fn lock(&self) -> MutexGuard<'_, State> {
        match self.state.lock() {
            Ok(state) => state,
            Err(poisoned) => {
                // A panic inside a call of OpenSSL: the stream is of no use any more.
                let mut state = poisoned.into_inner();
                state.failed = true;
                state
            }
        }
    }

    /// Whether reading would get somewhere without the socket.
    fn has_input(&self) -> bool {
        let state = self.lock();
        let pipe = state.ssl.get_ref();
        state.failed || state.ended || pipe.eof || pipe.received() > 0 || state.ssl.ssl().pending() > 0
    }

    fn flush(&self, state: &mut State) -> io::Result<bool> {
        send(&self.stream, state.ssl.get_mut())
    }

    fn try_read(&self, buf: &mut [u8]) -> io::Result<usize> {
        let mut state = self.lock();
        let state = &mut *state;
        let mut got = 0;
        while got < buf.len() {
            if state.failed {
                return Err(io::ErrorKind::NotConnected.into());
            }
            if state.ended {
                break;
            }
            let result = state.ssl.ssl_read(&mut buf[got..]);
            match outcome(result, &state.ssl) {
                Outcome::Done(n) => got += n,
                Outcome::WantRead => match receive(&self.stream, state.ssl.get_mut()) {
                    Ok(true) => {}
                    Ok(false) if got > 0 => break,
                    Ok(false) => {
                        self.flush_answers(state);
                        return Err(io::ErrorKind::WouldBlock.into());
                    }
                    // What was decrypted before is handed out; the error comes again.
                    Err(_) if got > 0 => break,
                    Err(e) => return Err(e),
                },
                // NBD has its own end of a session, and requests have lengths: a missing goodbye hides nothing.
                Outcome::Ended | Outcome::Cut => state.ended = true,
                Outcome::Failed(why) => {
                    state.failed = true;
                    self.flush_answers(state);
                    if got > 0 {
                        break;
                    }
                    return Err(io::Error::new(io::ErrorKind::InvalidData, format!("TLS: {why}")));
                }
            }
        }
        self.flush_answers(state);
        Ok(got)
    }

    /// Sends what OpenSSL had to say while it was reading, as far as that goes without waiting.
    fn flush_answers(&self, state: &mut State) {
        if !state.ssl.get_ref().unsent().is_empty() {
            // An error shows at the next write or read; what is left goes with the next write.
            let _ = self.flush(state);
        }
    }

    fn try_writev(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut state = self.lock();
        let state = &mut *state;
        if state.failed || state.said_goodbye {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if !self.flush(state)? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut from = Gather { bufs, skip: 0, staging: None };
        let mut taken = 0;
        loop {
            let mut records = RECORDS;
            while records > 0 {
                let Some(bytes) = from.next(records * RECORD) else { break };
                records -= bytes.len().div_ceil(RECORD);
                match state.ssl.ssl_write(bytes) {
                    Ok(n) if n == bytes.len() => taken += n,
                    Ok(_) => {
                        state.failed = true;
                        return Err(io::Error::other("TLS: OpenSSL took part of what it was given"));
                    }
                    Err(e) => {
                        state.failed = true;
                        let why = e.ssl_error().map_or_else(|| e.to_string(), tls::reasons);
                        return Err(io::Error::other(format!("TLS: {why}")));
                    }
                }
            }
            // The next records are encrypted while the peer works on these, if the socket takes them all.
            if !self.flush(state)? || from.is_done() {
                return Ok(taken);
            }
        }
    }

    fn say_goodbye(&self) {
        let mut state = self.lock();
        if state.failed || state.said_goodbye {
            return;
        }
        state.said_goodbye = true;
        match state.ssl.shutdown() {
            Ok(ShutdownResult::Sent | ShutdownResult::Received) => {}
            // There is nobody left to tell.
            Err(_) => state.failed = true,
        }
    }
}

/// Hands out what is to be written in pieces that make good records: whole records straight from a large slice, small slices joined.
struct Gather<'a, 'b> {
    bufs: &'a [IoSlice<'b>],
    /// Bytes of the first slice that are gone.
    skip: usize,
    staging: Option<IoBuf>,
}

impl<'a> Gather<'a, '_> {
    fn is_done(&self) -> bool {
        self.bufs.iter().map(|b| b.len()).sum::<usize>() == self.skip
    }

    /// Up to `most` bytes, a multiple of a record.
    fn next(&mut self, most: usize) -> Option<&[u8]> {
        while self.bufs.first()?.len() == self.skip {
            self.bufs = &self.bufs[1..];
            self.skip = 0;
        }
        let bufs: &'a [IoSlice<'_>] = self.bufs;
        let first: &'a [u8] = &bufs[0][self.skip..];
        let next_is_small = bufs.get(1).is_some_and(|b| b.len() < RECORD);
        if first.len() >= RECORD || !next_is_small {
            let n = if first.len() >= RECORD { first.len() / RECORD * RECORD } else { first.len() }.min(most);
            self.skip += n;
            return Some(&first[..n]);
        }
        let staging = self.staging.get_or_insert_with(|| IoBuf::new(RECORD));
        let mut fill = 0;
        while fill < RECORD
            && let Some(buf) = self.bufs.first()
        {
            let rest = &buf[self.skip..];
            // A large slice begins a record of its own.
            if rest.len() >= RECORD {
                break;
            }
            let n = rest.len().min(RECORD - fill);
            staging[fill..fill + n].copy_from_slice(&rest[..n]);
            fill += n;
            self.skip += n;
            if self.skip == buf.len() {
                self.bufs = &self.bufs[1..];
                self.skip = 0;
            }
        }
        Some(&staging[..fill])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn gathering_keeps_every_byte_in_order(lens in proptest::collection::vec(0usize..40_000, 0..12), records in 1usize..16) {
            let data: Vec<Vec<u8>> = lens
                .iter()
                .enumerate()
                .map(|(i, len)| (0..*len).map(|j| (i * 31 + j * 7 + j / 256) as u8).collect())
                .collect();
            let slices: Vec<IoSlice<'_>> = data.iter().map(|d| IoSlice::new(d)).collect();
            let mut gather = Gather { bufs: &slices, skip: 0, staging: None };
            let mut all = Vec::new();
            while let Some(bytes) = gather.next(records * RECORD) {
                prop_assert!(!bytes.is_empty());
                prop_assert!(bytes.len() <= records * RECORD);
                prop_assert!(bytes.len() <= RECORD || bytes.len() % RECORD == 0);
                all.extend_from_slice(bytes);
            }
            prop_assert!(gather.is_done());
            prop_assert_eq!(all, data.concat());
        }
    }

    #[test]
    fn small_replies_share_a_record_and_large_ones_are_not_copied() {
        let (small, large) = (vec![1; 1000], vec![2; 50_000]);
        let slices: Vec<IoSlice<'_>> =
            [&small, &small, &large, &small].map(|v: &Vec<u8>| IoSlice::new(v)).to_vec();
        let mut gather = Gather { bufs: &slices, skip: 0, staging: None };
        assert_eq!(gather.next(15 * RECORD).unwrap().len(), 2000);
        let whole = gather.next(15 * RECORD).unwrap();
        assert_eq!((whole.len(), whole.as_ptr()), (3 * RECORD, large.as_ptr()));
        assert_eq!(gather.next(15 * RECORD).unwrap().len(), 50_000 - 3 * RECORD + 1000);
        assert!(gather.is_done());
        assert!(gather.next(RECORD).is_none());
    }

    #[test]
    fn the_pipe_never_grows() {
        let mut pipe = Pipe::default();
        let chunk = vec![0; RECORD + OVERHEAD];
        let mut taken = 0;
        while let Ok(n) = pipe.write(&chunk) {
            taken += n;
        }
        assert!((RECORDS * (RECORD + OVERHEAD)..=OUT).contains(&taken), "{taken}");
        assert_eq!(pipe.unsent().len(), taken);
    }
}
