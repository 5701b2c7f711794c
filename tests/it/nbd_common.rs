//! What the NBD tests share: an in-process server on IOThreads of its own, and a raw client that speaks the protocol
//! by hand, so that it can also speak it wrong.
//!
//! The client blocks, with read timeouts: a server that owes an answer fails a test instead of hanging it.

use conbd::aio::{AioConfig, AioContext, IoThread};
use conbd::block::{BlockBackend, BlockNode, FaultNode, MemoryNode};
use conbd::nbd::export::{Export, ExportOptions, ExportTable};
use conbd::nbd::proto::*;
use conbd::nbd::server::{ListenAddr, Server, ServerConfig, ServerError, ShutdownReport};
use conbd::nbd::wire::*;
use openssl::ssl::{HandshakeError, ShutdownState, Ssl, SslStream};
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

/// How long a reply may take before a test fails. Far beyond what a loaded machine needs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A server in this process, with its own main context and IOThreads.
pub(crate) struct TestServer {
    pub(crate) server: Arc<Server>,
    main: Option<IoThread>,
    threads: Vec<IoThread>,
    pub(crate) dir: tempfile::TempDir,
}

/// Runs `f` on a context's thread and returns its result.
pub(crate) fn on<T: Send + 'static>(ctx: &Arc<AioContext>, f: impl FnOnce() -> T + Send + 'static) -> T {
    let (tx, rx) = mpsc::channel();
    ctx.bh_schedule_oneshot(move || tx.send(f()).expect("the caller waits"));
    rx.recv().expect("the context runs")
}

impl TestServer {
    /// Starts a server for `exports` on a unix socket in a directory of its own.
    pub(crate) fn unix(exports: Vec<Arc<Export>>) -> TestServer {
        TestServer::with(exports, 2, |_| {})
    }

    /// Starts a server with `threads` IOThreads; `change` may edit the configuration.
    pub(crate) fn with(
        exports: Vec<Arc<Export>>,
        threads: usize,
        change: impl FnOnce(&mut ServerConfig),
    ) -> TestServer {
        let table = ExportTable::new(exports, None).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut config = ServerConfig {
            listen: vec![ListenAddr::Unix(dir.path().join("nbd.sock"))],
            ..ServerConfig::default()
        };
        change(&mut config);
        TestServer::start(config, table, threads, dir).map_err(|e| e.to_string()).expect("it starts")
    }

    pub(crate) fn start(
        config: ServerConfig,
        table: Arc<ExportTable>,
        threads: usize,
        dir: tempfile::TempDir,
    ) -> Result<TestServer, ServerError> {
        let spawn = |name: String| IoThread::spawn(AioConfig { name, ..AioConfig::default() }).unwrap();
        let main = spawn(String::from("main"));
        let threads: Vec<IoThread> = (0..threads).map(|i| spawn(format!("io{i}"))).collect();
        let contexts = threads.iter().map(|t| t.context().clone()).collect();
        let ctx = main.context().clone();
        let started = on(main.context(), move || Server::start(config, table, contexts, &ctx));
        match started {
            Ok(server) => Ok(TestServer { server, main: Some(main), threads, dir }),
            Err(e) => {
                main.stop().unwrap();
                threads.into_iter().for_each(|t| t.stop().unwrap());
                Err(e)
            }
        }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("nbd.sock")
    }

    /// A fresh connection, nothing said yet.
    pub(crate) fn connect(&self) -> Raw {
        match &self.server.bound_addrs()[0] {
            ListenAddr::Unix(path) => Raw::unix(UnixStream::connect(path).unwrap()),
            ListenAddr::Tcp(addr) => Raw::tcp(TcpStream::connect(addr).unwrap()),
            other => panic!("no client for {other}"),
        }
    }

    /// A connection in fixed newstyle haggling.
    pub(crate) fn haggle(&self) -> Raw {
        let mut c = self.connect();
        c.greet(3);
        c
    }

    /// A connection in transmission: structured replies and `base:allocation` if asked for.
    pub(crate) fn go(&self, name: &str, structured: bool) -> Raw {
        let mut c = self.haggle();
        if structured {
            assert_eq!(c.opt(NBD_OPT_STRUCTURED_REPLY, b""), vec![(NBD_REP_ACK, vec![])]);
            let mut data = Vec::new();
            MetaContextRequest::put(&mut data, name, &["base:allocation"]);
            let replies = c.opt(NBD_OPT_SET_META_CONTEXT, &data);
            assert_eq!(replies.last().unwrap().0, NBD_REP_ACK);
        }
        c.go(name);
        c
    }

    /// A connection in transmission with extended headers and these contexts.
    pub(crate) fn go_extended(&self, name: &str, contexts: &[&str]) -> Raw {
        let mut c = self.haggle();
        assert_eq!(c.opt(NBD_OPT_EXTENDED_HEADERS, b""), vec![(NBD_REP_ACK, vec![])]);
        let mut data = Vec::new();
        MetaContextRequest::put(&mut data, name, contexts);
        let replies = c.opt(NBD_OPT_SET_META_CONTEXT, &data);
        assert_eq!(replies.last().unwrap().0, NBD_REP_ACK);
        c.go(name);
        c.extended = true;
        c
    }

    /// Waits until `done`, asking again and again; panics when it takes too long.
    pub(crate) fn wait_for(&self, what: &str, mut done: impl FnMut(&Server) -> bool) {
        wait_for(what, || done(&self.server));
    }

    /// Turns that the IOThreads' loops have made.
    pub(crate) fn turns(&self) -> u64 {
        self.threads.iter().map(|t| t.context().counters().turns.get()).sum()
    }

    pub(crate) fn shutdown(&self, grace: Duration) -> ShutdownReport {
        self.server.shutdown(grace)
    }
}

/// Waits until `done`, asking again and again; panics when it takes too long.
pub(crate) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "waited too long: {what}");
        std::thread::yield_now();
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.server.shutdown(PATIENCE);
        }
        for thread in self.threads.drain(..).chain(self.main.take()) {
            if std::thread::panicking() {
                std::mem::forget(thread);
            } else {
                thread.stop().unwrap();
            }
        }
    }
}

/// An export of zeroed memory.
pub(crate) fn memory(name: &str, size: u64) -> Arc<Export> {
    export_of(name, Arc::new(MemoryNode::new(name, size).unwrap()))
}

pub(crate) fn export_of(name: &str, node: Arc<dyn BlockNode>) -> Arc<Export> {
    let options = ExportOptions { name: name.to_owned(), ..ExportOptions::default() };
    Export::new(options, BlockBackend::new(node)).unwrap()
}

/// An export of memory below a fault node.
pub(crate) fn faulty(name: &str, size: u64) -> (Arc<Export>, Arc<FaultNode>) {
    let fault = FaultNode::new("fault", Arc::new(MemoryNode::new(name, size).unwrap()));
    (export_of(name, fault.clone()), fault)
}

pub(crate) trait Socket: Read + Write + Send {
    fn shutdown(&self, how: std::net::Shutdown) -> io::Result<()>;
    /// Whether the server has ended the stream by TLS's close_notify.
    fn goodbye(&mut self) -> bool {
        false
    }
    /// Sends bytes past TLS.
    fn inject(&mut self, bytes: &[u8]) {
        self.write_all(bytes).unwrap();
    }
}
impl Socket for Box<dyn Socket> {
    fn shutdown(&self, how: std::net::Shutdown) -> io::Result<()> {
        (**self).shutdown(how)
    }
    fn goodbye(&mut self) -> bool {
        (**self).goodbye()
    }
    fn inject(&mut self, bytes: &[u8]) {
        (**self).inject(bytes);
    }
}
impl Socket for SslStream<Box<dyn Socket>> {
    fn shutdown(&self, how: std::net::Shutdown) -> io::Result<()> {
        self.get_ref().shutdown(how)
    }
    fn goodbye(&mut self) -> bool {
        self.get_shutdown().contains(ShutdownState::RECEIVED)
    }
    fn inject(&mut self, bytes: &[u8]) {
        self.get_mut().write_all(bytes).unwrap();
    }
}
impl Socket for UnixStream {
    fn shutdown(&self, how: std::net::Shutdown) -> io::Result<()> {
        UnixStream::shutdown(self, how)
    }
}
impl Socket for TcpStream {
    fn shutdown(&self, how: std::net::Shutdown) -> io::Result<()> {
        TcpStream::shutdown(self, how)
    }
}

/// A reply as the raw client sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Reply {
    /// Simple; the data of a successful read is still to be read.
    Simple { error: u32, cookie: u64 },
    /// One chunk.
    Chunk { done: bool, kind: u16, cookie: u64, payload: Vec<u8> },
}

/// A client that says what it is told to, right or wrong.
pub(crate) struct Raw {
    s: Box<dyn Socket>,
    /// Of the last successful GO.
    pub(crate) size: u64,
    pub(crate) flags: TransmissionFlags,
    /// Headers are extended.
    pub(crate) extended: bool,
    /// Offsets of requests by their cookie, to be echoed.
    offsets: HashMap<u64, u64>,
}

/// `NBD_CMD_FLAG_PAYLOAD_LEN`.
pub(crate) const PAYLOAD_LEN: u16 = 1 << 5;

impl Raw {
    fn new(s: Box<dyn Socket>) -> Raw {
        Raw { s, size: 0, flags: TransmissionFlags::empty(), extended: false, offsets: HashMap::new() }
    }

    pub(crate) fn unix(s: UnixStream) -> Raw {
        s.set_read_timeout(Some(PATIENCE)).unwrap();
        s.set_write_timeout(Some(PATIENCE)).unwrap();
        Raw::new(Box::new(s))
    }

    pub(crate) fn tcp(s: TcpStream) -> Raw {
        s.set_read_timeout(Some(PATIENCE)).unwrap();
        s.set_write_timeout(Some(PATIENCE)).unwrap();
        s.set_nodelay(true).unwrap();
        Raw::new(Box::new(s))
    }

    /// The same client behind TLS; the server has granted it.
    pub(crate) fn into_tls(self, ssl: Ssl) -> Result<Raw, String> {
        match ssl.connect(self.s) {
            Ok(stream) => Ok(Raw { s: Box::new(stream), ..Raw::bare() }),
            Err(HandshakeError::SetupFailure(e)) => Err(e.to_string()),
            Err(HandshakeError::Failure(e) | HandshakeError::WouldBlock(e)) => Err(e.error().to_string()),
        }
    }

    /// Placeholder fields; the stream is replaced.
    fn bare() -> Raw {
        let (a, _) = UnixStream::pair().unwrap();
        Raw::new(Box::new(a))
    }

    /// The same client with another stream in the place of its own, made of that.
    pub(crate) fn map(self, f: impl FnOnce(Box<dyn Socket>) -> Box<dyn Socket>) -> Raw {
        Raw {
            s: f(self.s),
            size: self.size,
            flags: self.flags,
            extended: self.extended,
            offsets: self.offsets,
        }
    }

    /// Sends bytes past TLS.
    pub(crate) fn inject(&mut self, bytes: &[u8]) {
        self.s.inject(bytes);
    }

    /// Reads to the end; tells what came, and whether the server said goodbye in TLS.
    pub(crate) fn read_rest(&mut self) -> (Vec<u8>, bool) {
        let mut rest = Vec::new();
        // Behind a broken handshake the end may be a reset.
        let _ = self.s.read_to_end(&mut rest);
        (rest, self.s.goodbye())
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.s.write_all(bytes).expect("the server takes what it is sent");
    }

    /// Sends, and does not mind if the server has closed already.
    pub(crate) fn send_lossy(&mut self, bytes: &[u8]) {
        let _ = self.s.write_all(bytes); // the server may have hung up
    }

    /// Sends unless the server has hung up; tells whether it went out. Bounded by the patience of the socket.
    pub(crate) fn try_send(&mut self, bytes: &[u8]) -> bool {
        match self.s.write_all(bytes) {
            Ok(()) => true,
            Err(e) if matches!(e.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe) => false,
            Err(e) => panic!("the server takes what it is sent, or hangs up: {e}"),
        }
    }

    pub(crate) fn recv(&mut self, n: usize) -> Vec<u8> {
        let mut b = vec![0; n];
        self.s.read_exact(&mut b).expect("the server answers");
        b
    }

    /// Takes at most `max` bytes of what there is; 0 when the server has closed.
    pub(crate) fn recv_some(&mut self, max: usize) -> usize {
        match self.s.read(&mut vec![0; max]) {
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => 0,
            Err(e) => panic!("the server sends or closes: {e}"),
        }
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        self.recv(N).try_into().unwrap()
    }

    /// Asserts that the server closes, having sent nothing more.
    #[track_caller]
    pub(crate) fn expect_close(&mut self) {
        let mut rest = Vec::new();
        match self.s.read_to_end(&mut rest) {
            Ok(_) => assert_eq!(rest, b"", "the server closes and says nothing"),
            Err(e) => assert!(
                matches!(e.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe),
                "the server closes: {e}"
            ),
        }
    }

    /// Reads whatever comes until the server closes; panics when it does not.
    #[track_caller]
    pub(crate) fn drain(&mut self) {
        let mut rest = Vec::new();
        if let Err(e) = self.s.read_to_end(&mut rest) {
            let gone = matches!(e.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe);
            assert!(gone, "the server closes: {e}");
        }
    }

    /// Closes our side for writing only, if the server has not closed already.
    pub(crate) fn half_close_lossy(&mut self) {
        let _ = self.s.shutdown(std::net::Shutdown::Write); // the server may have hung up
    }

    /// Reads one option reply, whatever the option.
    pub(crate) fn recv_any_rep(&mut self) -> (u32, u32) {
        let h = OptionReplyHeader::decode(&self.array()).unwrap();
        self.recv(h.len as usize);
        (h.option, h.reply_type)
    }

    /// Notes the offset that chunks of a cookie have to echo, for a request that was sent as bytes.
    pub(crate) fn expect_offset(&mut self, cookie: u64, offset: u64) {
        self.offsets.insert(cookie, offset);
    }

    /// Closes our side for writing only.
    pub(crate) fn half_close(&mut self) {
        self.s.shutdown(std::net::Shutdown::Write).unwrap();
    }

    // ------------------------------------------------------------------------------------------ handshake

    /// Reads the greeting and sends client flags.
    pub(crate) fn greet(&mut self, flags: u32) {
        let greeting = Greeting::decode(&self.array()).unwrap();
        assert_eq!(greeting.flags, HandshakeFlags::all(), "8: both known flags and no other");
        self.send(&flags.to_be_bytes());
    }

    pub(crate) fn send_opt(&mut self, option: u32, data: &[u8]) {
        let mut b = Vec::new();
        put_option(&mut b, option, data);
        self.send(&b);
    }

    /// Reads one option reply.
    pub(crate) fn recv_rep(&mut self, option: u32) -> (u32, Vec<u8>) {
        let h = OptionReplyHeader::decode(&self.array()).unwrap();
        assert_eq!(h.option, option, "17: the option is echoed");
        let data = self.recv(h.len as usize);
        if h.reply_type & NBD_REP_FLAG_ERROR != 0 {
            check_string("error message", &data).expect("27: messages are strings");
        }
        if h.reply_type == NBD_REP_ACK {
            assert_eq!(h.len, 0, "28: an ACK carries no data");
        }
        (h.reply_type, data)
    }

    /// Reads replies up to the ACK or error.
    pub(crate) fn recv_reps(&mut self, option: u32) -> Vec<(u32, Vec<u8>)> {
        let mut all = Vec::new();
        loop {
            all.push(self.recv_rep(option));
            let last = all.last().unwrap().0;
            if last == NBD_REP_ACK || last & NBD_REP_FLAG_ERROR != 0 {
                return all;
            }
        }
    }

    /// Sends an option and returns all its replies.
    pub(crate) fn opt(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.send_opt(option, data);
        self.recv_reps(option)
    }

    /// Type of the last reply to an option.
    pub(crate) fn verdict(&mut self, option: u32, data: &[u8]) -> u32 {
        self.opt(option, data).last().unwrap().0
    }

    /// `NBD_OPT_INFO` or `NBD_OPT_GO`.
    pub(crate) fn info(&mut self, option: u32, name: &str, infos: &[u16]) -> Vec<(u32, Vec<u8>)> {
        let mut data = Vec::new();
        InfoRequest::put(&mut data, name, infos);
        self.opt(option, &data)
    }

    /// `NBD_OPT_GO` that must succeed.
    pub(crate) fn go(&mut self, name: &str) {
        let replies = self.info(NBD_OPT_GO, name, &[]);
        assert_eq!(replies.last().unwrap().0, NBD_REP_ACK, "GO succeeds");
        self.note_export(&replies);
    }

    pub(crate) fn note_export(&mut self, replies: &[(u32, Vec<u8>)]) {
        for (_, data) in replies.iter().filter(|r| r.0 == NBD_REP_INFO) {
            if let RepInfo::Export { size, flags } = RepInfo::decode(data).unwrap() {
                (self.size, self.flags) = (size, flags);
            }
        }
    }

    // --------------------------------------------------------------------------------------- transmission

    pub(crate) fn send_req(&mut self, cmd: u16, flags: u16, cookie: u64, offset: u64, len: u32) {
        self.send_wide(cmd, flags, cookie, offset, len.into());
    }

    /// A request with a length of 64 bits, which takes extended headers.
    pub(crate) fn send_wide(&mut self, cmd: u16, flags: u16, cookie: u64, offset: u64, len: u64) {
        let h = RequestHeader { flags: CmdFlags::from_bits_retain(flags), cmd, cookie, offset, len };
        if self.extended {
            self.offsets.insert(cookie, offset);
            self.send(&h.encode_extended());
        } else {
            self.send(&h.encode());
        }
    }

    /// Sends a request without payload and returns the error of its reply.
    #[track_caller]
    pub(crate) fn call_wide(&mut self, cmd: u16, flags: u16, offset: u64, len: u64) -> u32 {
        let cookie = offset.wrapping_mul(37).wrapping_add(len) ^ 0xabcd_0000_0000_0002;
        self.send_wide(cmd, flags, cookie, offset, len);
        Raw::error_of(&self.recv_chunks(cookie))
    }

    pub(crate) fn recv_reply(&mut self) -> Reply {
        let header = ReplyHeader::decode(&self.array()).unwrap();
        let wide = matches!(header, ReplyHeader::Extended(_));
        assert_eq!(wide, self.extended, "104: extended replies, and only those, with extended headers");
        match header {
            ReplyHeader::Simple(s) => {
                Reply::Simple { error: s.error.map_or(0, Errno::to_wire), cookie: s.cookie }
            }
            ReplyHeader::Chunk(c) | ReplyHeader::Extended(c) => {
                let c = if self.extended {
                    let c = c.with_extended_tail(self.array());
                    assert_eq!(self.offsets.get(&c.cookie), Some(&c.offset), "104: the offset is echoed");
                    c
                } else {
                    c.with_tail(self.array())
                };
                let len = c.len;
                let payload = self.recv(len as usize);
                assert!(c.flags.bits() <= 1, "105: no other reply flag");
                let done = c.flags.contains(ReplyFlags::NBD_REPLY_FLAG_DONE);
                if c.chunk_type == NBD_REPLY_TYPE_NONE {
                    assert!(done && len == 0, "105: NONE is last and empty");
                }
                Reply::Chunk { done, kind: c.chunk_type, cookie: c.cookie, payload }
            }
        }
    }

    /// Reads chunks up to the last of one reply (or a simple reply), all of one cookie.
    pub(crate) fn recv_chunks(&mut self, cookie: u64) -> Vec<Reply> {
        let mut all = Vec::new();
        loop {
            let reply = self.recv_reply();
            let (last, got) = match &reply {
                Reply::Simple { cookie, .. } => (true, *cookie),
                Reply::Chunk { done, cookie, .. } => (*done, *cookie),
            };
            assert_eq!(got, cookie, "99: the cookie is echoed");
            all.push(reply);
            if last {
                return all;
            }
        }
    }

    /// The error of a reply, 0 for none; checks error chunks.
    #[track_caller]
    pub(crate) fn error_of(replies: &[Reply]) -> u32 {
        let mut found = 0;
        for reply in replies {
            match reply {
                Reply::Simple { error, .. } => found = *error,
                Reply::Chunk { kind, payload, .. } => {
                    if let Chunk::Error { error, message, .. } = Chunk::decode(*kind, payload).unwrap() {
                        assert!(!message.is_empty(), "103: errors say something");
                        assert_eq!(found, 0, "106: one error");
                        found = error.to_wire();
                    }
                }
            }
        }
        assert!([0, 1, 5, 12, 22, 28, 75, 95, 108].contains(&found), "160: defined values only");
        found
    }

    /// Sends a request without payload and returns the error of its reply.
    #[track_caller]
    pub(crate) fn call(&mut self, cmd: u16, flags: u16, offset: u64, len: u32) -> u32 {
        let cookie = offset.wrapping_mul(31).wrapping_add(u64::from(len)) ^ 0xabcd_0000_0000_0001;
        self.send_req(cmd, flags, cookie, offset, len);
        let replies = self.recv_chunks(cookie);
        let error = Raw::error_of(&replies);
        if error == 0 && cmd == NBD_CMD_READ && matches!(replies[0], Reply::Simple { .. }) {
            self.recv(len as usize);
        }
        error
    }

    #[track_caller]
    pub(crate) fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u32 {
        let flags = if self.extended { flags | PAYLOAD_LEN } else { flags };
        self.send_req(NBD_CMD_WRITE, flags, 0x77, offset, data.len() as u32);
        self.send(data);
        Raw::error_of(&self.recv_chunks(0x77))
    }

    /// Reads, and puts the chunks together; checks that they cover the request exactly.
    #[track_caller]
    pub(crate) fn read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>, u32> {
        self.read_flags(0, offset, len).map(|(data, _)| data)
    }

    /// The data, and how many holes and data chunks it came in.
    #[track_caller]
    pub(crate) fn read_flags(
        &mut self,
        flags: u16,
        offset: u64,
        len: u32,
    ) -> Result<(Vec<u8>, (usize, usize)), u32> {
        self.send_req(NBD_CMD_READ, flags, offset ^ 0x55, offset, len);
        let replies = self.recv_chunks(offset ^ 0x55);
        if let Reply::Simple { error, .. } = replies[0] {
            assert!(!self.flags.contains(TransmissionFlags::NBD_FLAG_SEND_DF), "102: reads are structured");
            return if error == 0 { Ok((self.recv(len as usize), (0, 1))) } else { Err(error) };
        }
        match Raw::error_of(&replies) {
            0 => Ok(assemble(&replies, offset, len)),
            error => Err(error),
        }
    }

    /// Extents of a block status reply with one context.
    #[track_caller]
    pub(crate) fn block_status(
        &mut self,
        flags: u16,
        offset: u64,
        len: u32,
    ) -> Result<Vec<StatusExtent>, u32> {
        self.send_req(NBD_CMD_BLOCK_STATUS, flags, 0x99, offset, len);
        let replies = self.recv_chunks(0x99);
        match Raw::error_of(&replies) {
            0 => {}
            error => return Err(error),
        }
        assert_eq!(replies.len(), 1, "146: one chunk per context");
        let Reply::Chunk { kind, payload, .. } = &replies[0] else { panic!("146: a chunk") };
        let Chunk::BlockStatus { extents, .. } = Chunk::decode(*kind, payload).unwrap() else {
            panic!("146: a status chunk")
        };
        let total: u64 = extents.iter().map(|e| e.len).sum();
        assert!(total <= u64::from(len), "147: not longer than asked");
        assert!(extents.windows(2).all(|w| w[0].flags != w[1].flags), "149: neighbours differ");
        Ok(extents)
    }

    /// `NBD_CMD_DISC`, and the server closes.
    #[track_caller]
    pub(crate) fn disc(mut self) {
        self.send_req(NBD_CMD_DISC, 0, 0, 0, 0);
        self.expect_close();
    }
}

/// Puts the content chunks of a read together; counts holes and data chunks.
#[track_caller]
pub(crate) fn assemble(replies: &[Reply], offset: u64, len: u32) -> (Vec<u8>, (usize, usize)) {
    let mut data = vec![0xaa; len as usize];
    let mut seen = vec![false; len as usize];
    let (mut holes, mut datas) = (0, 0);
    for reply in replies {
        let Reply::Chunk { kind, payload, .. } = reply else { panic!("102: reads are structured") };
        let (at, bytes) = match Chunk::decode(*kind, payload).unwrap() {
            Chunk::None => continue,
            Chunk::Data { offset, data } => {
                datas += 1;
                (offset, data.to_vec())
            }
            Chunk::Hole { offset, len } => {
                holes += 1;
                (offset, vec![0; len as usize])
            }
            other => panic!("unexpected {other:?}"),
        };
        let at = usize::try_from(at - offset).unwrap();
        assert!(seen[at..at + bytes.len()].iter().all(|s| !s), "115: no overlap");
        seen[at..at + bytes.len()].fill(true);
        data[at..at + bytes.len()].copy_from_slice(&bytes);
    }
    assert!(seen.iter().all(|s| *s), "115: all is covered");
    (data, (holes, datas))
}
