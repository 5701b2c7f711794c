//! The server: listeners, accepting, placement of connections on IOThreads, shutdown.
//!
//! ```text
//!   main context                                        IOThread k
//!   listener handler ─ accept ─ least loaded thread ──► session (handshake) ─ GO ─┬─ stays
//!   shutdown coroutine ── kick, flush, interrupt ────►  every session             └─ moves once, to the thread
//!                                                                                    with fewest of that export
//! ```
//!
//! The accepting thread only accepts. What sessions and acceptor share is `Shared`; its registry lock is taken per
//! connection event, never per request, and never across a yield.

use super::access::{AllowList, TlsMode};
use super::budget::DaemonBudget;
use super::channel::HandshakeGate;
use super::conn::StallClock;
use super::export::{Export, ExportTable, Exports};
use super::listen::{self, Listener};
use super::session::{self, Accepted};
use super::tls::TlsServerConfig;
use crate::aio::{AioContext, BottomHalf, HandlerId, Interest, Timer};
use crate::co::{CoQueue, CoSleep, CoStream, Coroutine};
use crate::util::counters::Counter;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak, mpsc};
use std::time::Duration;
use tracing::{error, info, warn};

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenAddr {
    /// TCP on an IPv4 or IPv6 address; port 0 takes any free one.
    Tcp(SocketAddr),
    /// A unix socket; a stale file of that name is replaced, a live one is an error.
    Unix(PathBuf),
    /// Between a virtual machine and its host.
    Vsock {
        /// Whose address; `u32::MAX` stands for all.
        cid: u32,
        /// Port.
        port: u32,
    },
}

/// What happens to clients beyond [`ServerConfig::max_connections`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WhenFull {
    /// They are accepted and closed.
    #[default]
    Close,
    /// They wait in the kernel's queue until another one leaves.
    Wait,
}

/// When a server has done its work, see [`Server::is_finished`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EndWhen {
    /// When it is told to stop.
    #[default]
    Told,
    /// When a client that had chosen an export leaves, and no connection is left.
    LastClientLeaves,
    /// When no connection is left.
    LastConnectionEnds,
}

/// TLS as a server offers it.
#[derive(Debug, Clone)]
pub struct ServerTls {
    /// `Required` or `Selective`; constant while the server runs.
    pub mode: TlsMode,
    /// Credentials; [`Server::replace_tls`] exchanges them.
    pub config: Arc<TlsServerConfig>,
    /// Who may go on after a handshake; `None`: whoever passed it.
    pub authz: Option<AllowList>,
}

/// Limits and habits of a server. Every limit is ours.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Addresses to listen on.
    pub listen: Vec<ListenAddr>,
    /// Sockets that listen already, opened by somebody else; they are left as they are at the end.
    pub inherited: Vec<Arc<OwnedFd>>,
    /// Connections that exist already.
    pub connections: Vec<Arc<OwnedFd>>,
    /// Connections that the kernel queues per address; the system's limit is `net.core.somaxconn`.
    pub backlog: i32,
    /// Replace a unix socket's file also if a live server listens on it.
    pub take_over_sockets: bool,
    /// What happens beyond `max_connections`.
    pub when_full: WhenFull,
    /// When the server has done its work.
    pub end_when: EndWhen,
    /// Idle time of a TCP connection before the kernel asks whether its peer is alive; zero: it does not.
    pub keepalive: Duration,
    /// How long the data sent on a TCP connection may stay unacknowledged, or its peer's window closed, before the kernel
    /// drops it; zero: the system's default.
    pub tcp_user_timeout: Duration,
    /// A client that has chosen an export and makes no request for this long, with none in flight, is dropped; zero: never.
    pub idle_timeout: Duration,
    /// A client that has not chosen an export after this long is dropped; zero: never.
    pub handshake_timeout: Duration,
    /// Connections in negotiation at a time; beyond it the oldest is dropped.
    pub max_half_open: usize,
    /// Connections at a time; for what is beyond it see `when_full`.
    pub max_connections: usize,
    /// Payload bytes in flight of one connection (requests being served and replies not yet taken by the client).
    pub conn_bytes: u64,
    /// Requests in flight of one connection.
    pub conn_requests: u32,
    /// Payload bytes in flight of the whole daemon, beyond a small allowance that every connection has.
    pub total_bytes: u64,
    /// Requests in flight of the whole daemon, beyond a small allowance that every connection has.
    pub total_requests: u32,
    /// While others wait for the daemon's budget, a client that holds part of it and for this long neither takes its
    /// replies nor sends the payload that it has announced is dropped.
    pub stall_timeout: Duration,
    /// TLS; `None`: not offered.
    pub tls: Option<ServerTls>,
}

impl Default for ServerConfig {
    fn default() -> Self {
        ServerConfig {
            listen: Vec::new(),
            inherited: Vec::new(),
            connections: Vec::new(),
            backlog: 1024,
            take_over_sockets: false,
            when_full: WhenFull::default(),
            end_when: EndWhen::default(),
            keepalive: Duration::from_secs(60),
            tcp_user_timeout: Duration::from_secs(600),
            idle_timeout: Duration::ZERO,
            handshake_timeout: Duration::from_secs(10),
            max_half_open: 256,
            max_connections: 4096,
            conn_bytes: 64 << 20,
            conn_requests: 256,
            total_bytes: 1 << 30,
            total_requests: 16_384,
            stall_timeout: Duration::from_secs(30),
            tls: None,
        }
    }
}

/// Why a server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// No address, or no IOThread.
    #[error("no address and no connection to serve, or no thread to serve with")]
    Nothing,
    /// The address cannot be bound.
    #[error("cannot listen on {addr}")]
    Listen {
        /// Which.
        addr: String,
        /// Why.
        source: io::Error,
    },
    /// Another live server owns the unix socket.
    #[error("cannot listen on {}: another server is listening on that socket", path.display())]
    SocketInUse {
        /// Which.
        path: PathBuf,
    },
    /// Something that is no socket is in the way.
    #[error("cannot listen on {}: it exists and is not a socket", path.display())]
    NotASocket {
        /// Which.
        path: PathBuf,
    },
}

/// What one IOThread has done for NBD; or the sum of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NbdStats {
    /// Connections that entered transmission on this thread, ever.
    pub connections: u64,
    /// Of those, connections that still live.
    pub connections_open: u64,
    /// Requests by command, indexed by `NBD_CMD_*`; the last counts unknown ones.
    pub requests: [u64; 9],
    /// Payload bytes sent to clients by reads.
    pub bytes_read: u64,
    /// Payload bytes received from clients by writes.
    pub bytes_written: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Requests answered in the turn that decoded them, without a coroutine.
    pub inline: u64,
    /// `sendmsg` batches of replies.
    pub reply_batches: u64,
}

/// How a shutdown went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ShutdownReport {
    /// Connections that were cut because the deadline had passed.
    pub aborted: usize,
    /// Exports whose final flush failed or was not reached.
    pub flush_failures: usize,
}

/// What one IOThread counts. Written by that thread only.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct ThreadCounters {
    pub(super) connections: Counter,
    pub(super) disconnects: Counter,
    pub(super) requests: [Counter; 9],
    pub(super) bytes_read: Counter,
    pub(super) bytes_written: Counter,
    pub(super) errors: Counter,
    pub(super) inline: Counter,
    pub(super) reply_batches: Counter,
}

impl ThreadCounters {
    fn read(&self) -> NbdStats {
        let disconnects = self.disconnects.get();
        let connections = self.connections.get();
        NbdStats {
            connections,
            connections_open: connections.saturating_sub(disconnects),
            requests: std::array::from_fn(|i| self.requests[i].get()),
            bytes_read: self.bytes_read.get(),
            bytes_written: self.bytes_written.get(),
            errors: self.errors.get(),
            inline: self.inline.get(),
            reply_batches: self.reply_batches.get(),
        }
    }
}

/// An IOThread as the server sees it.
pub(super) struct ThreadSlot {
    pub(super) ctx: Arc<AioContext>,
    pub(super) counters: Arc<ThreadCounters>,
    /// Connections on it, half-open ones included. Written at accept, move and end only.
    load: AtomicUsize,
    /// TLS handshakes on it pass through here.
    pub(super) tls_gate: HandshakeGate,
}

/// A connection in the books.
struct Entry {
    peer: String,
    stream: Arc<CoStream>,
    /// None while half-open.
    export: Option<Arc<Export>>,
    /// Nothing in flight since the shutdown began.
    drained: bool,
    stall: Arc<StallClock>,
}

#[derive(Default)]
struct Registry {
    sessions: BTreeMap<u64, Entry>,
    half_open: BTreeSet<u64>,
    /// Connections per thread of each export, by the address of the export (which they keep alive).
    placement: HashMap<usize, Vec<u32>>,
    /// Sessions are cut at once when they begin.
    closed: bool,
}

/// How a shutdown proceeds. Main context only, but for the flag.
#[derive(Default)]
struct Stop {
    deadline_ns: Option<u64>,
    running: bool,
    report: Option<ShutdownReport>,
}

/// What the acceptor and all sessions share.
pub(super) struct Shared {
    pub(super) config: ServerConfig,
    pub(super) exports: Exports,
    pub(super) threads: Vec<ThreadSlot>,
    pub(super) daemon: Arc<DaemonBudget>,
    registry: Mutex<Registry>,
    /// Read by every request, written once.
    stopping: AtomicBool,
    /// Connections accepted and not ended, those still on their way to their thread included.
    live: AtomicUsize,
    next_id: AtomicU64,
    /// The credentials of this moment.
    tls: Option<RwLock<Arc<TlsServerConfig>>>,
    warnings: WarnLimit,
    /// Wakes the shutdown coroutine. Set once, at start.
    stop_bh: OnceLock<BottomHalf>,
    /// Arms the timer that looks for stalled clients. Set once, at start.
    pressure_bh: OnceLock<BottomHalf>,
    /// Looks at the listeners again when a connection has ended, and wakes the main loop. Set once, at start.
    room_bh: OnceLock<BottomHalf>,
    /// The server has done its work.
    finished: AtomicBool,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    pub(super) fn tls_mode(&self) -> TlsMode {
        self.config.tls.as_ref().map_or(TlsMode::Off, |tls| tls.mode)
    }

    /// The TLS credentials of this moment.
    pub(super) fn tls_config(&self) -> Option<Arc<TlsServerConfig>> {
        self.tls.as_ref().map(|tls| tls.read().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// Logs a warning that a client can cause, unless there were many just now; `f` gets how many were left out before.
    pub(super) fn warn_limited(&self, f: impl FnOnce(u32)) {
        let now_ns = AioContext::current().map_or(0, |ctx| ctx.now_ns());
        if let Some(suppressed) = self.warnings.admit(now_ns) {
            f(suppressed);
        }
    }

    fn stop_changed(&self) {
        if let Some(bh) = self.stop_bh.get() {
            bh.schedule();
        }
    }

    /// A session begins on its thread. False: it must end at once.
    pub(super) fn session_began(&self, id: u64, peer: &str, stream: &Arc<CoStream>) -> bool {
        let evicted = {
            let mut registry = lock(&self.registry);
            if registry.closed {
                return false;
            }
            let entry = Entry {
                peer: peer.to_owned(),
                stream: stream.clone(),
                export: None,
                drained: false,
                stall: Arc::default(),
            };
            registry.sessions.insert(id, entry);
            registry.half_open.insert(id);
            if registry.half_open.len() > self.config.max_half_open {
                let oldest = registry.half_open.pop_first().expect("more than none");
                registry.sessions.get(&oldest).map(|e| (e.stream.clone(), e.peer.clone()))
            } else {
                None
            }
        };
        if let Some((stream, peer)) = evicted {
            stream.interrupt();
            self.warn_limited(|suppressed| {
                warn!(peer, suppressed, "too many connections in negotiation: the oldest is dropped");
            });
        }
        true
    }

    /// A session has chosen its export.
    pub(super) fn session_transmits(&self, id: u64, export: &Arc<Export>) {
        let mut registry = lock(&self.registry);
        registry.half_open.remove(&id);
        if let Some(entry) = registry.sessions.get_mut(&id) {
            entry.export = Some(export.clone());
        }
    }

    /// Where a session notes that its client keeps memory and moves nothing.
    pub(super) fn stall_clock(&self, id: u64) -> Arc<StallClock> {
        lock(&self.registry).sessions.get(&id).map(|e| e.stall.clone()).unwrap_or_default()
    }

    /// Says that a client was refused for want of a coroutine.
    pub(super) fn warn_no_room(&self, peer: &str) {
        self.warn_limited(|suppressed| {
            warn!(
                peer,
                suppressed,
                "too many coroutines for vm.max_map_count: refused; raise that sysctl, or lower max_connections and requests_total"
            );
        });
    }

    /// A session has nothing in flight any more, during shutdown.
    pub(super) fn session_drained(&self, id: u64) {
        if let Some(entry) = lock(&self.registry).sessions.get_mut(&id) {
            entry.drained = true;
        }
        self.stop_changed();
    }

    /// A session has ended; `served` tells whether its client had chosen an export.
    pub(super) fn session_ended(&self, id: u64, thread: usize, served: bool) {
        let entry = {
            let mut registry = lock(&self.registry);
            registry.half_open.remove(&id);
            registry.sessions.remove(&id)
        };
        // Closes the socket, outside of the lock.
        drop(entry);
        self.threads[thread].load.fetch_sub(1, Ordering::Relaxed);
        let left = self.live.fetch_sub(1, Ordering::AcqRel) - 1;
        let finished = match self.config.end_when {
            EndWhen::Told => false,
            EndWhen::LastClientLeaves => left == 0 && served,
            EndWhen::LastConnectionEnds => left == 0,
        };
        if finished {
            self.finished.store(true, Ordering::Release);
        }
        if (finished || self.config.when_full == WhenFull::Wait)
            && let Some(bh) = self.room_bh.get()
        {
            bh.schedule();
        }
        if self.is_stopping() {
            self.stop_changed();
        }
    }

    /// Chooses the thread for a connection of `export` that negotiated on `thread`: where fewest connections of that export
    /// are; among equals its own, else the least loaded. The load moves along.
    pub(super) fn place(&self, export: &Arc<Export>, thread: usize) -> usize {
        let chosen = {
            let mut registry = lock(&self.registry);
            let counts = registry
                .placement
                .entry(Arc::as_ptr(export) as usize)
                .or_insert_with(|| vec![0; self.threads.len()]);
            let chosen = (0..self.threads.len())
                .min_by_key(|t| (counts[*t], *t != thread, self.threads[*t].load.load(Ordering::Relaxed)))
                .expect("a server has a thread");
            counts[chosen] += 1;
            chosen
        };
        if chosen != thread {
            self.threads[thread].load.fetch_sub(1, Ordering::Relaxed);
            self.threads[chosen].load.fetch_add(1, Ordering::Relaxed);
        }
        chosen
    }

    /// Takes back what [`Shared::place`] counted.
    pub(super) fn unplace(&self, export: &Arc<Export>, thread: usize) {
        let mut registry = lock(&self.registry);
        let key = Arc::as_ptr(export) as usize;
        if let Some(counts) = registry.placement.get_mut(&key) {
            counts[thread] -= 1;
            if counts.iter().all(|n| *n == 0) {
                registry.placement.remove(&key);
            }
        }
    }

    /// Whether clients have to wait for one that leaves, or the server takes no more.
    fn is_full(&self) -> bool {
        match self.config.when_full {
            WhenFull::Close => false,
            WhenFull::Wait => {
                self.live.load(Ordering::Acquire) >= self.config.max_connections
                    || self.finished.load(Ordering::Acquire)
            }
        }
    }

    /// Hands a new connection to the least loaded thread, or closes it. Main context, plain code.
    fn accepted(self: &Arc<Self>, socket: listen::Socket) {
        let live = self.live.load(Ordering::Relaxed);
        if live >= self.config.max_connections {
            let limit = self.config.max_connections;
            self.warn_limited(|suppressed| {
                warn!(peer = socket.peer, limit, suppressed, "too many connections: a new one is closed");
            });
            return;
        }
        let thread = (0..self.threads.len())
            .min_by_key(|t| self.threads[*t].load.load(Ordering::Relaxed))
            .expect("a server has a thread");
        self.live.fetch_add(1, Ordering::Relaxed);
        self.threads[thread].load.fetch_add(1, Ordering::Relaxed);
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let accepted = Accepted { id, fd: socket.fd, peer: socket.peer, thread };
        let shared = self.clone();
        self.threads[thread].ctx.bh_schedule_oneshot(move || session::start(shared, accepted));
    }

    /// Cuts clients that have held the budget for too long while others wait. Main context.
    fn drop_stalled(&self, now_ns: u64) {
        let limit_ns = self.config.stall_timeout.as_nanos() as u64;
        let stalled: Vec<(String, Arc<CoStream>)> = lock(&self.registry)
            .sessions
            .values()
            .filter(|e| e.stall.expired(now_ns, limit_ns))
            .map(|e| (e.peer.clone(), e.stream.clone()))
            .collect();
        for (peer, stream) in stalled {
            warn!(
                peer,
                "client neither takes nor sends what it has memory for while others wait for that: it is dropped"
            );
            stream.interrupt();
        }
    }
}

/// Bounds warnings that clients can cause: a burst, then so many a second.
#[derive(Default)]
struct WarnLimit {
    window: AtomicU64,
    count: AtomicU32,
    suppressed: AtomicU32,
}

/// Client-caused warnings logged per second (ours).
const WARNINGS_PER_SECOND: u32 = 20;

impl WarnLimit {
    /// `Some(n)`: log it, and say that `n` were left out before. Races between threads only blur the numbers.
    fn admit(&self, now_ns: u64) -> Option<u32> {
        let window = now_ns / 1_000_000_000 + 1;
        if self.window.swap(window, Ordering::Relaxed) != window {
            self.count.store(0, Ordering::Relaxed);
        }
        if self.count.fetch_add(1, Ordering::Relaxed) < WARNINGS_PER_SECOND {
            Some(self.suppressed.swap(0, Ordering::Relaxed))
        } else {
            self.suppressed.fetch_add(1, Ordering::Relaxed);
            None
        }
    }
}

/// One listening socket on the main context.
struct Acceptor {
    listener: Listener,
    shared: Arc<Shared>,
    handler: Mutex<Option<HandlerId>>,
    /// Tries again after the process ran out of descriptors: the edge does not come again.
    retry: OnceLock<Timer>,
}

/// Connections accepted in one turn of the loop (ours).
const ACCEPTS_PER_TURN: u32 = 256;
/// How long to wait for a free descriptor (ours).
const ACCEPT_RETRY_NS: u64 = 100_000_000;

impl Acceptor {
    fn start(listener: Listener, shared: &Arc<Shared>, main: &Arc<AioContext>) -> io::Result<Arc<Acceptor>> {
        let fd = listener.socket.as_raw_fd();
        let acceptor = Arc::new(Acceptor {
            listener,
            shared: shared.clone(),
            handler: Mutex::new(None),
            retry: OnceLock::new(),
        });
        let weak = Arc::downgrade(&acceptor);
        let accept = move |main: &Weak<AioContext>| {
            if let (Some(acceptor), Some(main)) = (weak.upgrade(), main.upgrade()) {
                acceptor.accept_all(&main);
            }
        };
        let (weak_main, again) = (Arc::downgrade(main), accept.clone());
        assert!(acceptor.retry.set(main.timer_new(move || again(&weak_main))).is_ok(), "set once");
        let weak_main = Arc::downgrade(main);
        *lock(&acceptor.handler) = Some(main.add_handler(fd, Interest::Read, move |_| accept(&weak_main))?);
        Ok(acceptor)
    }

    /// Accepts until there is none left: the poller is edge-triggered. After many it goes on in the next turn, so that a
    /// storm of clients does not keep signals waiting.
    fn accept_all(&self, main: &AioContext) {
        if lock(&self.handler).is_none() {
            return;
        }
        let retry = self.retry.get().expect("set at start");
        for _ in 0..ACCEPTS_PER_TURN {
            // The connection that ends will look at the queue again (`room_bh`).
            if self.shared.is_full() {
                return;
            }
            match self.listener.accept() {
                Ok(Some(socket)) => self.shared.accepted(socket),
                Ok(None) => return,
                Err(e) => {
                    self.shared.warn_limited(|suppressed| {
                        let listener = self.listener.to_string();
                        error!(error = %e, listener, suppressed, "cannot accept: trying again in a moment");
                    });
                    return retry.mod_ns(main.now_ns() + ACCEPT_RETRY_NS);
                }
            }
        }
        retry.mod_ns(main.now_ns());
    }

    /// Stops accepting and closes the queue of the kernel. Main context.
    fn stop(&self, main: &AioContext) {
        if let Some(id) = lock(&self.handler).take() {
            main.remove_handler(id);
        }
        if let Some(retry) = self.retry.get() {
            retry.del();
        }
        self.listener.close();
    }
}

/// A running NBD server.
pub struct Server {
    shared: Arc<Shared>,
    main: Arc<AioContext>,
    addrs: Vec<ListenAddr>,
    acceptors: Mutex<Vec<Arc<Acceptor>>>,
    stop: Mutex<Stop>,
    /// The shutdown coroutine sleeps here.
    stop_sleep: CoSleep,
    /// Later callers of a shutdown wait here.
    stop_done: CoQueue,
}

impl Server {
    /// Binds the addresses and begins to accept on `main`; connections are served by `threads`.
    ///
    /// Call it on `main`'s home thread. `main` must be polled for connections to be accepted; it may be one of `threads`.
    ///
    /// # Errors
    /// When an address cannot be bound: nothing is left behind then.
    ///
    /// # Panics
    /// Off `main`'s home thread.
    pub fn start(
        config: ServerConfig,
        table: Arc<ExportTable>,
        threads: Vec<Arc<AioContext>>,
        main: &Arc<AioContext>,
    ) -> Result<Arc<Server>, ServerError> {
        assert!(main.is_home(), "listeners are handlers of the main context");
        let sources = config.listen.len() + config.inherited.len() + config.connections.len();
        if sources == 0 || threads.is_empty() {
            return Err(ServerError::Nothing);
        }
        // Coroutines take threads and descriptors when the first one runs: now, while there are some, not when the first
        // client comes.
        Coroutine::new(|| {}).enter();
        let listeners = listen::bind_all(&config)?;
        let addrs = listeners.iter().map(|l| l.addr.clone()).collect();

        let threads = threads
            .into_iter()
            .map(|ctx| ThreadSlot {
                ctx,
                counters: Arc::default(),
                load: AtomicUsize::new(0),
                tls_gate: HandshakeGate::default(),
            })
            .collect();
        let shared = Arc::new_cyclic(|weak: &Weak<Shared>| {
            let weak = weak.clone();
            let pressure = move || {
                if let Some(bh) = weak.upgrade().as_ref().and_then(|shared| shared.pressure_bh.get()) {
                    bh.schedule();
                }
            };
            let total_bytes = config.total_bytes.max(u64::from(super::proto::MAX_PAYLOAD));
            Shared {
                daemon: DaemonBudget::new(total_bytes, config.total_requests.max(1), pressure),
                tls: config.tls.as_ref().map(|tls| RwLock::new(tls.config.clone())),
                config,
                exports: Exports::new(table),
                threads,
                registry: Mutex::default(),
                stopping: AtomicBool::new(false),
                live: AtomicUsize::new(0),
                next_id: AtomicU64::new(1),
                warnings: WarnLimit::default(),
                stop_bh: OnceLock::new(),
                pressure_bh: OnceLock::new(),
                room_bh: OnceLock::new(),
                finished: AtomicBool::new(false),
            }
        });
        let stop_sleep = CoSleep::new();
        let sleep = stop_sleep.clone();
        assert!(shared.stop_bh.set(main.bh_new(move || sleep.wake())).is_ok(), "set once");
        assert!(shared.pressure_bh.set(pressure_bh(&shared, main)).is_ok(), "set once");

        let server = Arc::new(Server {
            shared,
            main: main.clone(),
            addrs,
            acceptors: Mutex::default(),
            stop: Mutex::default(),
            stop_sleep,
            stop_done: CoQueue::new(),
        });
        for listener in listeners {
            let addr = listener.to_string();
            let acceptor = Acceptor::start(listener, &server.shared, main)
                .map_err(|source| ServerError::Listen { addr, source })?;
            lock(&server.acceptors).push(acceptor);
        }
        let weak = Arc::downgrade(&server);
        let room_bh = main.bh_new(move || {
            if let Some(server) = weak.upgrade() {
                server.room();
            }
        });
        assert!(server.shared.room_bh.set(room_bh).is_ok(), "set once");
        for addr in &server.addrs {
            info!(%addr, "listening");
        }
        for fd in &server.shared.config.connections {
            let failed =
                |source| ServerError::Listen { addr: "a connection that was passed".to_owned(), source };
            let socket = socket2::Socket::from(fd.try_clone().map_err(failed)?);
            let peer = listen::prepare(&socket, listen::SocketOptions::new(&server.shared.config));
            server.shared.accepted(listen::Socket { fd: socket.into(), peer });
        }
        Ok(server)
    }

    /// Looks for clients that wait, after a connection has ended. Main context.
    fn room(&self) {
        let acceptors = lock(&self.acceptors).clone();
        for acceptor in acceptors {
            acceptor.accept_all(&self.main);
        }
    }

    /// Whether the server has done its work, as [`ServerConfig::end_when`] says. Becoming so wakes the main context.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.shared.finished.load(Ordering::Acquire)
    }

    /// Where it listens, with the port really bound.
    #[must_use]
    pub fn bound_addrs(&self) -> &[ListenAddr] {
        &self.addrs
    }

    /// One URI per address for the export of that name ("" names the default), e.g. `nbd://127.0.0.1:10809/disk` or
    /// `nbd+unix:///disk?socket=/run/nbd.sock`. An address that stands for all is given as the loopback one.
    #[must_use]
    pub fn uris(&self, export: &str) -> Vec<String> {
        let tls = match self.shared.tls_mode() {
            TlsMode::Off => false,
            TlsMode::Required => true,
            TlsMode::Selective => {
                self.shared.exports.snapshot().find(export).is_some_and(|e| e.tls_required())
            }
        };
        self.addrs.iter().map(|addr| listen::uri(addr, export, tls)).collect()
    }

    /// The export table; replace it through this.
    #[must_use]
    pub fn exports(&self) -> &Exports {
        &self.shared.exports
    }

    /// Exchanges the TLS credentials: later handshakes use the new ones, connections that are up stay. False when the server
    /// was started without TLS: nothing changes then.
    pub fn replace_tls(&self, config: Arc<TlsServerConfig>) -> bool {
        let Some(tls) = &self.shared.tls else { return false };
        *tls.write().unwrap_or_else(PoisonError::into_inner) = config;
        true
    }

    /// What each IOThread has done, in the order given to [`Server::start`]. Any thread; may be slightly old.
    #[must_use]
    pub fn stats(&self) -> Vec<NbdStats> {
        self.shared.threads.iter().map(|t| t.counters.read()).collect()
    }

    /// Connections that live now, half-open ones included.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.live.load(Ordering::Relaxed)
    }

    /// Payload bytes and requests that connections have borrowed from the daemon's budget now.
    #[must_use]
    pub fn budget_in_use(&self) -> (u64, u32) {
        self.shared.daemon.borrowed()
    }

    /// Stops: no more accepting; requests in flight are finished and answered, later ones get `NBD_ESHUTDOWN`,
    /// options `NBD_REP_ERR_SHUTDOWN`; then every export is flushed and the connections are closed. When `grace` has
    /// passed, what is left is cut. Yields. Coroutine on `main` only. Calling it again (e.g. with a shorter grace,
    /// zero cuts at once) shortens the grace of the call that runs.
    pub fn co_shutdown(self: &Arc<Self>, grace: Duration) -> ShutdownReport {
        assert!(self.main.is_home(), "shutdown runs on the main context");
        let deadline = self.main.now_ns().saturating_add(u64::try_from(grace.as_nanos()).unwrap_or(u64::MAX));
        let first = {
            let mut stop = lock(&self.stop);
            if let Some(report) = stop.report {
                return report;
            }
            let deadline = stop.deadline_ns.map_or(deadline, |old| old.min(deadline));
            stop.deadline_ns = Some(deadline);
            !std::mem::replace(&mut stop.running, true)
        };
        if first {
            let report = self.co_shutdown_once();
            lock(&self.stop).report = Some(report);
            self.stop_done.restart_all();
            return report;
        }
        self.shared.stop_changed();
        loop {
            self.stop_done.co_wait();
            if let Some(report) = lock(&self.stop).report {
                return report;
            }
        }
    }

    fn co_shutdown_once(self: &Arc<Self>) -> ShutdownReport {
        let shared = &self.shared;
        info!(connections = self.connections(), "shutting down");
        shared.stopping.store(true, Ordering::Release);
        let acceptors = std::mem::take(&mut *lock(&self.acceptors));
        for acceptor in &acceptors {
            acceptor.stop(&self.main);
        }
        drop(acceptors);

        // What has been accepted but has not begun is not in the books yet; it is told below, with the rest.
        let streams: Vec<Arc<CoStream>> =
            lock(&shared.registry).sessions.values().map(|e| e.stream.clone()).collect();
        for stream in &streams {
            stream.kick_reader();
        }
        drop(streams);
        self.co_wait_until(|| {
            lock(&shared.registry).sessions.values().all(|e| e.drained || e.export.is_none())
        });

        let mut report = ShutdownReport { aborted: 0, flush_failures: self.co_flush_exports() };

        let streams: Vec<Arc<CoStream>> = {
            let mut registry = lock(&shared.registry);
            registry.closed = true;
            let busy = registry.sessions.values().filter(|e| e.export.is_some() && !e.drained);
            report.aborted = busy.count();
            registry.sessions.values().map(|e| e.stream.clone()).collect()
        };
        for stream in &streams {
            stream.interrupt();
        }
        drop(streams);
        // Cut sessions end as soon as what they have in flight has ended; give that a moment even past the deadline.
        let moment = self.main.now_ns().saturating_add(LAST_MOMENT_NS);
        {
            let mut stop = lock(&self.stop);
            stop.deadline_ns = Some(stop.deadline_ns.unwrap_or(0).max(moment));
        }
        self.co_wait_until(|| self.connections() == 0);
        let left = self.connections();
        if left > 0 {
            warn!(connections = left, "connections are left with requests in flight");
        }
        info!(aborted = report.aborted, flush_failures = report.flush_failures, "shut down");
        report
    }

    /// Waits until `done`, or the deadline. True when done.
    fn co_wait_until(&self, mut done: impl FnMut() -> bool) -> bool {
        loop {
            if done() {
                return true;
            }
            let deadline = lock(&self.stop).deadline_ns.expect("shutting down");
            let now = self.main.now_ns();
            if now >= deadline {
                return false;
            }
            // A wake between the check and the sleep comes from this thread's loop, so it cannot be missed.
            self.stop_sleep.co_sleep(Some(deadline - now));
        }
    }

    /// Flushes all writable exports at once; returns how many failed or were not done by the deadline.
    fn co_flush_exports(self: &Arc<Self>) -> usize {
        let mut exports: Vec<Arc<Export>> = self.shared.exports.snapshot().list().to_vec();
        let in_use = lock(&self.shared.registry)
            .sessions
            .values()
            .filter_map(|e| e.export.clone())
            .collect::<Vec<_>>();
        for export in in_use {
            if !exports.iter().any(|e| Arc::ptr_eq(e, &export)) {
                exports.push(export);
            }
        }
        exports.retain(|e| !e.read_only());
        let results = Arc::new(Mutex::new((0, 0)));
        let count = exports.len();
        for export in exports {
            let (results, server) = (results.clone(), self.clone());
            Coroutine::new(move || {
                let flushed = export.backend().co_flush();
                if let Err(e) = &flushed {
                    error!(export = export.name(), error = e as &dyn std::error::Error, "final flush failed");
                }
                let mut results = lock(&results);
                results.0 += 1;
                results.1 += usize::from(flushed.is_err());
                drop(results);
                server.shared.stop_changed();
            })
            .enter();
        }
        self.co_wait_until(|| lock(&results).0 == count);
        let (done, failed) = *lock(&results);
        if done < count {
            error!(exports = count - done, "final flush was not done in time");
        }
        count - done + failed
    }

    /// [`Server::co_shutdown`] for plain code: on `main`'s home thread it polls `main` until done; on any other thread
    /// it waits while `main` is polled elsewhere. Not on an IOThread other than `main`'s.
    pub fn shutdown(self: &Arc<Self>, grace: Duration) -> ShutdownReport {
        let (tx, rx) = mpsc::channel();
        let server = self.clone();
        self.main.bh_schedule_oneshot(move || {
            Coroutine::new(move || {
                let report = server.co_shutdown(grace);
                tx.send(report).expect("the caller of shutdown() waits for this");
            })
            .enter();
        });
        if !self.main.is_home() {
            return rx.recv().expect("the main context is polled until the shutdown is done");
        }
        loop {
            match rx.try_recv() {
                Ok(report) => return report,
                Err(mpsc::TryRecvError::Empty) => {
                    self.main.poll(true);
                }
                Err(mpsc::TryRecvError::Disconnected) => panic!("the shutdown coroutine died"),
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // After a shutdown there is nothing left; without one at least nothing may listen any more.
        let acceptors = std::mem::take(&mut *lock(&self.acceptors));
        if acceptors.is_empty() {
            return;
        }
        let main = self.main.clone();
        let stop = move || acceptors.iter().for_each(|acceptor| acceptor.stop(&main));
        match self.main.is_home() {
            true => stop(),
            false => self.main.bh_schedule_oneshot(stop),
        }
    }
}

/// How long cut sessions get to end, past any deadline (ours).
const LAST_MOMENT_NS: u64 = 1_000_000_000;

/// Makes the bottom half that watches for stalled clients while somebody waits for the daemon's budget.
fn pressure_bh(shared: &Arc<Shared>, main: &Arc<AioContext>) -> BottomHalf {
    let timer: Arc<OnceLock<Timer>> = Arc::default();
    let interval_ns = (shared.config.stall_timeout.as_nanos() as u64 / 4).max(1_000_000);
    // The timer's own callback must not keep the timer alive.
    let arm = {
        let (timer, main) = (Arc::downgrade(&timer), Arc::downgrade(main));
        move || {
            let timer = timer.upgrade();
            if let (Some(timer), Some(main)) = (timer.as_ref().and_then(|t| t.get()), main.upgrade())
                && !timer.pending()
            {
                timer.mod_ns(main.now_ns() + interval_ns);
            }
        }
    };
    let (weak, weak_main, again) = (Arc::downgrade(shared), Arc::downgrade(main), arm.clone());
    let tick = move || {
        if let (Some(shared), Some(main)) = (weak.upgrade(), weak_main.upgrade())
            && shared.daemon.under_pressure()
        {
            shared.drop_stalled(main.now_ns());
            again();
        }
    };
    assert!(timer.set(main.timer_new(tick)).is_ok(), "set once");
    main.bh_new(move || {
        // The bottom half owns the timer.
        debug_assert!(timer.get().is_some(), "set above");
        arm();
    })
}
