//! The daemon: wiring of threads, images, listeners and signals.
//!
//! Start order, each step needing the ones before:
//!
//! 1. signals: SIGTERM, SIGINT, SIGHUP and SIGUSR1 are blocked and become a signalfd, SIGPIPE and SIGXFSZ are ignored (before
//!    any thread exists: threads inherit the mask); the limit of open files is raised;
//! 2. logging (its thread is the first);
//! 3. the main thread's AioContext, and the IOThreads;
//! 4. images are opened, in the order of the configuration;
//! 5. listeners are bound (those that systemd passed are taken), connections accepted; the URIs go to stdout, `READY=1` to
//!    the supervisor, the pid file is written, `--run`'s command started.
//!
//! [`Service`] is the part that does not depend on the configuration file: `conbd qemu-nbd` makes one of its own options.
//!
//! Then the main thread polls its context: it accepts, and hears signals as an ordinary fd handler. It works as
//! PID 1 of a container: every signal that it cares about is handled explicitly, and orphans that become its children are
//! reaped by the kernel.
//!
//! Stop order: no more accepting; requests in flight are finished and answered, images flushed, connections
//! closed (all within `shutdown_timeout`); counters are logged; IOThreads end; images are closed and their
//! locks released; the log is drained. A second signal, or a thread that is still stuck well after the timeout, ends
//! the process at once with [`EXIT_AT_ONCE`].

use crate::aio::engine::EngineChoice;
use crate::aio::{AioConfig, AioContext, Interest, IoThread, PollConfig, PollTrial};
use crate::block::qcow2::SnapshotSel;
use crate::block::{
    self, BlockBackend, CacheMode, DiscardMode, LockMode, OpenError, OpenOptions, OpenRemote,
};
use crate::config::{
    Cache, Config, Discard, ExportConfig, Format, Lock, LogFormat, ServeFlags, check_filter, parse_vsock,
};
use crate::nbd::access::TlsMode;
use crate::nbd::backing::NbdBacking;
use crate::nbd::client::{Uri, UriTls};
use crate::nbd::export::{Export, ExportError, ExportOptions, ExportTable};
use crate::nbd::proto::{NBD_CMD_READ, NBD_CMD_WRITE};
use crate::nbd::server::{EndWhen, ListenAddr, NbdStats, Server, ServerConfig, ServerError, ServerTls};
use crate::nbd::tls::{TlsError, TlsServerConfig};
use crate::reload::{self, Reloader};
use crate::telemetry::{self, LogGuard};
use crate::util::fast::FastPaths;
use crate::util::{sys, systemd};
use std::io::{self, Write as _};
use std::net::ToSocketAddrs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;
use tracing::{debug, error, info, warn};

/// Exit code when a second signal, or a thread stuck beyond the deadline, ends the process at once.
pub const EXIT_AT_ONCE: i32 = 4;
/// How long IOThreads and images may take to close after the shutdown's own deadline (ours).
const CLOSE_GRACE: Duration = Duration::from_secs(5);

/// How a run of the daemon ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Everything in flight was finished, everything was flushed.
    Complete,
    /// The deadline cut connections, or a final flush failed.
    Cut,
    /// As `Complete`, at the end of `--run`'s command, which had this exit code.
    Command(u8),
}

/// Why the daemon cannot start.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Something of the system: signals, threads, event loops.
    #[error("cannot {doing}: {source}")]
    System {
        /// What was tried.
        doing: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// Logging.
    #[error("{0}")]
    Log(String),
    /// The environment asks for a fast path that there is not.
    #[error("{0}")]
    Fast(String),
    /// An image.
    #[error("export \"{export}\": {source}")]
    Image {
        /// Name of the export.
        export: String,
        /// What, and what to do.
        source: OpenError,
    },
    /// What the NBD layer does not take.
    #[error("{0}")]
    Export(#[from] ExportError),
    /// Certificates, keys.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A listener.
    #[error("{0}")]
    Listen(String),
    /// The server.
    #[error("{}", explain(.0))]
    Server(ServerError),
    /// Something else, said in full.
    #[error("{0}")]
    Said(String),
    /// `--check` found several things.
    #[error("{} of {total} exports cannot be served:\n  {}", problems.len(), problems.join("\n  "))]
    Check {
        /// One line each.
        problems: Vec<String>,
        /// Exports that were looked at.
        total: usize,
    },
    /// Stdout.
    #[error("cannot write to stdout: {0}")]
    Stdout(io::Error),
    /// Sockets that were passed, or stdin and stdout as a connection.
    #[error("{0}")]
    Passed(String),
    /// The pid file.
    #[error("cannot write the pid file {}: {source}; choose another with --pid-file", path.display())]
    PidFile {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn system(doing: &'static str) -> impl Fn(io::Error) -> DaemonError {
    move |source| DaemonError::System { doing, source }
}

/// Opens every image read-only and without locks, says what is there, and closes it again.
///
/// # Errors
/// [`DaemonError::Check`] with a line for each image that cannot be opened.
pub fn check(config: &Config) -> Result<Outcome, DaemonError> {
    let mut problems = Vec::new();
    let mut lines = String::new();
    for export in &config.exports {
        match open_image(export, true) {
            Ok(backend) => {
                let size = backend.root().len();
                lines.push_str(&format!(
                    "export \"{}\": {}, {size} bytes\n",
                    export.name,
                    export.image.display()
                ));
            }
            Err(e) => problems.push(e.to_string()),
        }
    }
    for listen in &config.server.listen {
        if let Err(e) = resolve(listen) {
            problems.push(e.to_string());
        }
    }
    match load_tls(config) {
        Ok(tls) => {
            for note in tls.iter().flat_map(|tls| tls.config.notes()) {
                lines.push_str(&format!("note: {note}\n"));
            }
        }
        Err(e) => problems.push(e.to_string()),
    }
    if !problems.is_empty() {
        return Err(DaemonError::Check { problems, total: config.exports.len() });
    }
    lines.push_str("the configuration is fine\n");
    write_stdout(&lines)?;
    Ok(Outcome::Complete)
}

/// Takes the process's signals as a descriptor, and ignores those that are errors of system calls here. Must be called
/// before the process has another thread. `reap`: as PID 1, let the kernel reap orphans; then nobody can wait for a child.
///
/// # Errors
/// What the system reports.
pub fn take_signals(reap: bool) -> Result<OwnedFd, DaemonError> {
    let signals = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGUSR1];
    let signal_fd = sys::signal_fd(&signals).map_err(system("set up signals"))?;
    for signal in [libc::SIGPIPE, libc::SIGXFSZ] {
        sys::ignore_signal(signal).map_err(system("set up signals"))?;
    }
    if reap && std::process::id() == 1 {
        // Orphans of a container become our children; with SIGCHLD ignored the kernel reaps them.
        sys::ignore_signal(libc::SIGCHLD).map_err(system("set up signals"))?;
    }
    Ok(signal_fd)
}

/// Serves until a signal ends it; `flags` are those that `config` was made with, for reading it again. Must be called before
/// the process has another thread.
///
/// # Errors
/// Whatever keeps it from starting; a running daemon does not fail.
pub fn serve(config: &Config, flags: &ServeFlags) -> Result<Outcome, DaemonError> {
    let passed = systemd::take_sockets().map_err(DaemonError::Passed)?;
    let signal_fd = take_signals(config.run.command.is_none())?;
    let stdio = if config.run.stdio { Some(Stdio::take()?) } else { None };
    let files = sys::raise_nofile_limit();
    let level = match telemetry::env_filter() {
        None => config.log.level.clone(),
        Some(env) => {
            let bad =
                |why| DaemonError::Log(format!("environment variable {}: {why}", telemetry::ENV_FILTER));
            check_filter(&env).map_err(bad)?;
            env
        }
    };
    let json = config.log.format == LogFormat::Json;
    let log = telemetry::init(&level, json).map_err(DaemonError::Log)?;
    // Dropped last: what is logged while the rest is torn down is written, too.
    let log = Arc::new(log);
    match files {
        Ok(limit) => info!(
            version = env!("CARGO_PKG_VERSION"),
            pid = std::process::id(),
            open_files = limit,
            "starting"
        ),
        Err(e) => warn!(error = %e, "the limit of open files cannot be raised"),
    }
    for note in &config.notes {
        warn!(note, "configuration");
    }
    let fast = FastPaths::from_env().map_err(DaemonError::Fast)?;
    debug!(?fast, "fast paths");
    let server = server_config(config, passed, stdio.as_ref())?;
    let pid_file = config.run.pid_file.clone();
    let written = Arc::new(Mutex::new(None));
    let (kept, quiet) = (Arc::clone(&written), config.run.stdio);
    let service = Service {
        threads: Threads {
            iothreads: config.server.iothread_count(),
            aio: config.server.aio.into(),
            pool_threads: config.server.pool_threads,
            poll_max: config.server.poll_max,
        },
        exports: Box::new(|| open_exports(config)),
        server,
        grace: config.server.shutdown_timeout,
        on_hup: OnHup::Reload(Reloader::new(
            config.clone(),
            reload::Hooks {
                load: {
                    let flags = flags.clone();
                    Box::new(move || Config::load(&flags))
                },
                open: Box::new(|config, export| open_export(config, export).map_err(|e| e.to_string())),
                options: Box::new(export_options),
            },
        )),
        command: config.run.command.clone(),
        ready: Box::new(move |server| {
            if let Some(path) = &pid_file {
                *kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(PidFile::write(path)?);
            }
            if !quiet {
                print_uris(server)?;
            }
            if let Err(error) = systemd::notify("READY=1") {
                warn!(%error, "the supervisor cannot be told that the server is ready (NOTIFY_SOCKET)");
            }
            Ok(())
        }),
    };
    let outcome = service.run(signal_fd, &log);
    drop(written);
    if let Some(stdio) = stdio {
        stdio.finish();
    }
    outcome
}

/// The threads of a service.
#[derive(Debug, Clone)]
pub struct Threads {
    /// IOThreads; at least one.
    pub iothreads: usize,
    /// File I/O engine.
    pub aio: EngineChoice,
    /// Most worker threads of each IOThread's pool.
    pub pool_threads: usize,
    /// Longest busy-poll window.
    pub poll_max: Duration,
}

/// Opens the images and makes the exports; blocks.
pub type OpenExports<'a> = Box<dyn FnOnce() -> Result<Vec<Arc<Export>>, DaemonError> + 'a>;
/// Called once clients can connect; an error stops the service again.
pub type OnReady<'a> = Box<dyn FnOnce(&Server) -> Result<(), DaemonError> + 'a>;

/// What SIGHUP does.
#[derive(Clone)]
pub enum OnHup {
    /// It stops, as SIGTERM does.
    Stop,
    /// It takes up what has changed.
    Reload(Arc<Reloader>),
}

/// A server with its threads, from the start to the end: what `serve` and `qemu-nbd` have in common.
pub struct Service<'a> {
    /// Threads.
    pub threads: Threads,
    /// What is served.
    pub exports: OpenExports<'a>,
    /// Where, and with which limits.
    pub server: ServerConfig,
    /// How long a stop may take.
    pub grace: Duration,
    /// What SIGHUP does.
    pub on_hup: OnHup,
    /// Shell command that is run once clients can connect; its end stops the service.
    pub command: Option<String>,
    /// What is done once clients can connect.
    pub ready: OnReady<'a>,
}

impl Service<'_> {
    /// Starts, serves, and stops when a signal says so, or when the server has done its work. `signal_fd` comes from
    /// [`take_signals`].
    ///
    /// # Errors
    /// Whatever keeps it from starting.
    pub fn run(self, signal_fd: OwnedFd, log: &Arc<LogGuard>) -> Result<Outcome, DaemonError> {
        let poll_trial = PollTrial::new();
        let aio = |name: String| AioConfig {
            name,
            engine: self.threads.aio,
            pool_threads: self.threads.pool_threads,
            poll: PollConfig {
                max_ns: u64::try_from(self.threads.poll_max.as_nanos()).unwrap_or(u64::MAX),
                grow: 0,
                // One long wait among short ones is not the end of them.
                shrink: 2,
            },
            poll_trial: Some(Arc::clone(&poll_trial)),
            ..AioConfig::default()
        };
        // The main loop accepts and hears signals; it does not spin.
        let main_config =
            AioConfig { poll: AioConfig::default().poll, poll_trial: None, ..aio("main".to_owned()) };
        let main = AioContext::new(main_config).map_err(system("start the main event loop"))?;
        let mut threads = Vec::new();
        for i in 0..self.threads.iothreads {
            let thread =
                IoThread::spawn(aio(format!("iothread-{i}"))).map_err(system("start an IOThread"))?;
            threads.push(thread);
        }
        info!(
            iothreads = threads.len(),
            engine = ?threads.first().map_or(main.engine_kind(), |t| t.context().engine_kind()),
            asked = ?self.threads.aio,
            "threads are ready"
        );
        let table = ExportTable::new((self.exports)()?, None)?;
        let contexts = threads.iter().map(|t| Arc::clone(t.context())).collect();
        let server = Server::start(self.server, table, contexts, &main).map_err(DaemonError::Server)?;
        let daemon = Daemon { server, threads, main, grace: self.grace };
        daemon.run(signal_fd, log, self.on_hup, self.command, self.ready)
    }
}

/// What is alive while the daemon serves. Fields are dropped in this order.
struct Daemon {
    server: Arc<Server>,
    threads: Vec<IoThread>,
    main: Arc<AioContext>,
    grace: Duration,
}

impl Daemon {
    fn run(
        self,
        signal_fd: OwnedFd,
        log: &Arc<LogGuard>,
        on_hup: OnHup,
        command: Option<String>,
        ready: OnReady<'_>,
    ) -> Result<Outcome, DaemonError> {
        let heard = Arc::new(Heard { stops: AtomicU32::new(0), on_hup: on_hup.clone() });
        let signal_fd = Arc::new(signal_fd);
        let contexts: Vec<Arc<AioContext>> = self.threads.iter().map(|t| Arc::clone(t.context())).collect();
        let handler = {
            let (fd, heard, log) = (Arc::clone(&signal_fd), Arc::clone(&heard), Arc::clone(log));
            let (server, contexts) = (Arc::clone(&self.server), contexts.clone());
            self.main
                .add_handler(signal_fd.as_raw_fd(), Interest::Read, move |_| {
                    on_signals(&fd, &heard, &log, &server, &contexts);
                })
                .map_err(system("watch for signals"))?
        };
        let command = match ready(&self.server) {
            Ok(()) => command.map(|command| Command::start(&command, &self.server, &self.main)).transpose(),
            Err(e) => Err(e),
        };
        if let Ok(command) = &command {
            let ended = || command.as_ref().is_some_and(Command::has_ended);
            self.main.poll_until(|| {
                heard.stops.load(Ordering::Relaxed) > 0 || self.server.is_finished() || ended()
            });
        }
        if let Err(error) = systemd::notify("STOPPING=1") {
            warn!(%error, "the supervisor cannot be told that the server stops (NOTIFY_SOCKET)");
        }
        // A reload that waits for requests gives up, and lets those go on that wait for it.
        let leaving = match &on_hup {
            OnHup::Reload(reloader) if reloader.is_running() => {
                // Meanwhile nothing polls the main context: opening an image may take its time.
                let ended = watch_the_end(
                    Arc::clone(&signal_fd),
                    self.grace,
                    "a reload takes too long",
                    Arc::clone(log),
                );
                let leaving = reloader.stop();
                *ended.lock().unwrap_or_else(PoisonError::into_inner) = true;
                leaving
            }
            OnHup::Reload(reloader) => reloader.stop(),
            OnHup::Stop => Vec::new(),
        };
        let report = self.server.shutdown(self.grace);
        let unclosed = close_images(&self.server, &leaving);
        self.main.remove_handler(handler);
        // From here on nothing polls the main context: a thread of its own hears a second signal, and the deadline.
        let finished = watch_the_end(signal_fd, CLOSE_GRACE, "closing takes too long", Arc::clone(log));
        log_counters(&self.server, &contexts, "iothread totals");
        let outcome = if report.aborted == 0 && report.flush_failures == 0 && unclosed == 0 {
            info!("stopped: everything was finished and flushed");
            match command.as_ref().ok().and_then(Option::as_ref).and_then(Command::code) {
                Some(code) => Outcome::Command(code),
                None => Outcome::Complete,
            }
        } else {
            error!(
                connections_cut = report.aborted,
                flush_failures = report.flush_failures,
                images_not_closed = unclosed,
                "stopped, but not everything was finished and flushed"
            );
            Outcome::Cut
        };
        let Daemon { server, threads, main, .. } = self;
        drop(server);
        for thread in threads {
            if let Err(e) = thread.stop() {
                error!(error = %e, "an IOThread had panicked");
            }
        }
        drop(contexts);
        drop(main);
        log.flush();
        *finished.lock().unwrap_or_else(PoisonError::into_inner) = true;
        command.map(|_| outcome)
    }
}

/// The command of `--run`, watched by a thread of its own.
struct Command {
    /// Set when it has ended.
    code: Arc<OnceLock<u8>>,
}

impl Command {
    fn start(command: &str, server: &Server, main: &Arc<AioContext>) -> Result<Command, DaemonError> {
        let uri = uris(server).into_iter().next().map(|uri| uri.to_string()).unwrap_or_default();
        let mut child = std::process::Command::new("/bin/sh")
            .args(["-c", command])
            .env("uri", uri)
            .spawn()
            .map_err(system("start the command given to --run"))?;
        let code = Arc::new(OnceLock::new());
        let (told, main) = (Arc::clone(&code), Arc::clone(main));
        let watch = move || {
            let code = match child.wait() {
                Ok(status) => status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1),
                Err(error) => {
                    error!(%error, "the command given to --run cannot be waited for");
                    1
                }
            };
            info!(code, "the command given to --run has ended");
            // Nobody else sets it.
            let _ = told.set(code);
            main.notify();
        };
        std::thread::Builder::new()
            .name("run-watch".to_owned())
            .spawn(watch)
            .map_err(system("watch the command given to --run"))?;
        Ok(Command { code })
    }

    fn has_ended(&self) -> bool {
        self.code.get().is_some()
    }

    fn code(&self) -> Option<u8> {
        self.code.get().copied()
    }
}

/// The URI of every export at every listener.
fn uris(server: &Server) -> Vec<Uri> {
    let table = server.exports().snapshot();
    let mut all = Vec::new();
    for export in table.list() {
        for address in server.bound_addrs() {
            let uri = match address {
                ListenAddr::Tcp(address) => Uri::tcp(*address, export.name()),
                ListenAddr::Vsock { cid, port } => Uri::vsock(*cid, *port, export.name()),
                // An abstract name has no folder that it could be relative to.
                ListenAddr::Unix(path) if path.as_os_str().as_encoded_bytes().starts_with(b"\0") => {
                    Uri::unix(path, export.name())
                }
                ListenAddr::Unix(path) => {
                    let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
                    Uri::unix(&path, export.name())
                }
            };
            // Credentials are the client's: it adds its own to the URI.
            all.push(if export.tls_required() { uri.with_tls(UriTls::default()) } else { uri });
        }
    }
    all
}

/// One line per listener and export, and flushed: the sign that clients can connect.
fn print_uris(server: &Server) -> Result<(), DaemonError> {
    let mut lines = String::new();
    for uri in uris(server) {
        info!(uri = %uri, "serving");
        lines.push_str(&format!("{uri}\n"));
    }
    write_stdout(&lines)
}

/// A file with our process id, removed on drop if it is still ours.
pub struct PidFile {
    path: PathBuf,
    /// Device and inode.
    file: (u64, u64),
}

impl PidFile {
    /// Writes it, in the place of one that is there.
    ///
    /// # Errors
    /// [`DaemonError::PidFile`].
    pub fn write(path: &Path) -> Result<PidFile, DaemonError> {
        let failed = |source| DaemonError::PidFile { path: path.to_owned(), source };
        // The daemon may change its folder before it removes the file.
        let path = std::path::absolute(path).map_err(failed)?;
        let mut file = std::fs::File::create(&path).map_err(failed)?;
        writeln!(file, "{}", std::process::id()).map_err(failed)?;
        let meta = file.metadata().map_err(failed)?;
        Ok(PidFile { path, file: (meta.dev(), meta.ino()) })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let ours = std::fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.file);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            warn!(path = %self.path.display(), %error, "cannot remove the pid file");
        }
    }
}

/// Stdin and stdout as a connection. Descriptors 0 and 1 are nothing but /dev/null from then on, and so is 2 if it was the
/// same socket (inetd): what is logged must not get into the client's stream.
struct Stdio {
    connection: Arc<OwnedFd>,
    /// Copies between two pipes and the other end of `connection`; one for each way.
    pumps: Vec<std::thread::JoinHandle<()>>,
}

impl Stdio {
    fn take() -> Result<Stdio, DaemonError> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |e: io::Error| {
                DaemonError::Passed(format!(
                    "--stdio: {what}: {e}; stdin and stdout must be a socket, or two pipes"
                ))
            }
        };
        let input = sys::dup_std(0).map_err(failed("stdin"))?;
        let output = sys::dup_std(1).map_err(failed("stdout"))?;
        let kind = |fd: &OwnedFd| rustix::fs::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino, stat.st_mode));
        let of_input = kind(&input).map_err(|e| failed("stdin")(e.into()))?;
        let of_output = kind(&output).map_err(|e| failed("stdout")(e.into()))?;
        let null =
            std::fs::File::options().read(true).write(true).open("/dev/null").map_err(failed("/dev/null"))?;
        for number in 0..2 {
            sys::replace_std(number, &null).map_err(failed("/dev/null"))?;
        }
        let errors = sys::dup_std(2).ok().and_then(|fd| kind(&fd).ok());
        if errors.is_none_or(|stderr| stderr == of_input || stderr == of_output) {
            sys::replace_std(2, &null).map_err(failed("/dev/null"))?;
        }
        let file_type = |mode| rustix::fs::FileType::from_raw_mode(mode);
        match (file_type(of_input.2), file_type(of_output.2)) {
            (rustix::fs::FileType::Socket, _) => {
                Ok(Stdio { connection: Arc::new(input), pumps: Vec::new() })
            }
            (rustix::fs::FileType::Fifo, rustix::fs::FileType::Fifo) => Stdio::over_pipes(input, output)
                .map_err(failed("pipes")),
            _ => Err(DaemonError::Passed(
                "--stdio: stdin is neither a socket nor a pipe; let inetd, a socket unit with Accept=yes or a client such as nbdsh start the server"
                    .to_owned(),
            )),
        }
    }

    /// Two pipes are no connection: two threads make one of them.
    fn over_pipes(input: OwnedFd, output: OwnedFd) -> io::Result<Stdio> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        let copy = |mut from: Box<dyn io::Read + Send>, mut to: Box<dyn io::Write + Send>| {
            // The end of either side ends the other; how it ended makes no difference to anybody.
            move || drop(io::copy(&mut from, &mut to))
        };
        let half = theirs.try_clone()?;
        let mut inward = copy(Box::new(std::fs::File::from(input)), Box::new(theirs.try_clone()?));
        let inward = move || {
            inward();
            // The client has sent its last byte; it may still read.
            let _ = half.shutdown(std::net::Shutdown::Write);
        };
        let outward = copy(Box::new(theirs), Box::new(std::fs::File::from(output)));
        // Not joined: it may wait for a client that never closes its end, and the process ends all the same.
        std::thread::Builder::new().name("stdin".to_owned()).spawn(inward)?;
        let outward = std::thread::Builder::new().name("stdout".to_owned()).spawn(outward)?;
        Ok(Stdio { connection: Arc::new(ours.into()), pumps: vec![outward] })
    }

    /// Waits until the last reply has gone into the pipe. The server has closed its end.
    fn finish(self) {
        drop(self.connection);
        for pump in self.pumps {
            // A panic of it has been printed.
            let _ = pump.join();
        }
    }
}

/// Lets every image store what it keeps in memory, when no request is left; returns how many could not.
fn close_images(server: &Server, leaving: &[Arc<Export>]) -> usize {
    let table = server.exports().snapshot();
    let mut backends: Vec<&Arc<BlockBackend>> = Vec::new();
    for export in table.list().iter().chain(leaving) {
        // One that a reload made again has the image of the one before.
        if !backends.iter().any(|b| Arc::ptr_eq(b, export.backend())) {
            backends.push(export.backend());
        }
    }
    backends.into_iter().filter(|backend| !reload::close(backend)).count()
}

/// Writes to stdout and flushes. Whoever started us may have closed it: that is no reason not to serve.
fn write_stdout(text: &str) -> Result<(), DaemonError> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe || e.raw_os_error() == Some(libc::EBADF) => {
            warn!(error = %e, "nobody reads stdout");
            Ok(())
        }
        other => other.map_err(DaemonError::Stdout),
    }
}

/// What the signal handler tells the main loop.
struct Heard {
    stops: AtomicU32,
    on_hup: OnHup,
}

/// Handles the signals that are pending. Runs on the main thread, from its event loop.
fn on_signals(
    fd: &OwnedFd,
    heard: &Heard,
    log: &LogGuard,
    server: &Arc<Server>,
    contexts: &[Arc<AioContext>],
) {
    loop {
        let signal = match sys::read_signal(fd.as_fd()) {
            Ok(Some(signal)) => signal,
            Ok(None) => return,
            Err(e) => {
                error!(error = %e, "signals cannot be read");
                return;
            }
        };
        match (signal.signo, &heard.on_hup) {
            (libc::SIGUSR1, _) => log_counters(server, contexts, "iothread counters"),
            (libc::SIGHUP, OnHup::Reload(reloader)) => {
                info!(pid = signal.pid, "SIGHUP: reloading");
                reloader.request(server);
            }
            (signo, _) => {
                let name = match signo {
                    libc::SIGINT => "SIGINT",
                    libc::SIGHUP => "SIGHUP",
                    _ => "SIGTERM",
                };
                if heard.stops.fetch_add(1, Ordering::Relaxed) > 0 {
                    end_at_once(name, log);
                }
                info!(signal = name, pid = signal.pid, connections = server.connections(), "stopping");
            }
        }
    }
}

/// Ends the process without finishing anything.
fn end_at_once(why: &'static str, log: &LogGuard) -> ! {
    error!(why, "ended at once: what was in flight is lost");
    log.flush();
    std::process::exit(EXIT_AT_ONCE)
}

/// Starts a thread that ends the process when another signal comes or `grace` passes, which is `late`, until the flag it returns
/// is set.
fn watch_the_end(
    signal_fd: Arc<OwnedFd>,
    grace: Duration,
    late: &'static str,
    log: Arc<LogGuard>,
) -> Arc<Mutex<bool>> {
    let finished = Arc::new(Mutex::new(false));
    let seen = Arc::clone(&finished);
    let watch = move || {
        let end = std::time::Instant::now() + grace;
        loop {
            let left = end.saturating_duration_since(std::time::Instant::now());
            let timeout = rustix::event::Timespec {
                tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut fds = [rustix::event::PollFd::new(&*signal_fd, rustix::event::PollFlags::IN)];
            // An interrupted poll is asked again; what else could fail is told by the next read.
            let ready = rustix::event::poll(&mut fds, Some(&timeout)).unwrap_or(0);
            // Held while ending: the main thread cannot return from `run` in the midst of it.
            let finished = seen.lock().unwrap_or_else(PoisonError::into_inner);
            if *finished {
                return;
            }
            if left.is_zero() {
                end_at_once(late, &log);
            }
            if ready > 0
                && let Ok(Some(signal)) = sys::read_signal(signal_fd.as_fd())
                && [libc::SIGTERM, libc::SIGINT].contains(&signal.signo)
            {
                end_at_once("second signal", &log);
            }
        }
    };
    if let Err(e) = std::thread::Builder::new().name("end-watch".to_owned()).spawn(watch) {
        warn!(error = %e, "nothing watches over the end: a second signal is not heard");
    }
    finished
}

/// Logs what every IOThread has done: one event each, named by `message`.
fn log_counters(server: &Server, contexts: &[Arc<AioContext>], message: &'static str) {
    for (context, stats) in contexts.iter().zip(server.stats()) {
        let NbdStats {
            connections,
            connections_open,
            requests,
            bytes_read,
            bytes_written,
            errors,
            inline,
            reply_batches,
        } = stats;
        let counters = context.counters();
        info!(
            iothread = context.name(),
            connections,
            connections_open,
            requests = requests.iter().sum::<u64>(),
            reads = requests[usize::from(NBD_CMD_READ)],
            writes = requests[usize::from(NBD_CMD_WRITE)],
            bytes_in = bytes_written,
            bytes_out = bytes_read,
            errors,
            inline,
            reply_batches,
            turns = counters.turns.get(),
            sleeps = counters.blocks.get(),
            poll_hits = counters.poll_hits.get(),
            poll_misses = counters.poll_misses.get(),
            bottom_halves = counters.bh_runs.get(),
            engine_submits = counters.engine_submits.get(),
            eventfd_writes = counters.notify_writes.load(Ordering::Relaxed),
            "{message}"
        );
    }
}

/// Resolves `ADDRESS:PORT`, whose name may have several addresses, or `vsock:[CID:]PORT`.
fn resolve(listen: &str) -> Result<Vec<ListenAddr>, DaemonError> {
    let refused = |why: String| DaemonError::Listen(format!("cannot listen on {listen}: {why}"));
    if let Some(vsock) = parse_vsock(listen) {
        let (cid, port) = vsock.map_err(refused)?;
        return Ok(vec![ListenAddr::Vsock { cid, port }]);
    }
    let addresses: Vec<ListenAddr> = listen
        .to_socket_addrs()
        .map_err(|e| refused(format!("{e}; check the address given to listen")))?
        .map(ListenAddr::Tcp)
        .collect();
    if addresses.is_empty() {
        return Err(refused("the name has no address".to_owned()));
    }
    Ok(addresses)
}

/// Says so when anybody on a network can write an export.
fn warn_of_the_clear(config: &Config, listen: &[ListenAddr]) {
    let open_to_all = listen.iter().find(|l| matches!(l, ListenAddr::Tcp(a) if !a.ip().is_loopback()));
    let Some(ListenAddr::Tcp(address)) = open_to_all else { return };
    let mode = config.tls.mode();
    for export in config.exports.iter().filter(|e| !e.read_only && e.allow.is_none() && e.in_the_clear(mode))
    {
        warn!(
            address = %address,
            export = export.name,
            "ANYBODY WHO REACHES THIS ADDRESS CAN WRITE THIS EXPORT, WITHOUT TLS: set --tls-cert and --tls-key or --tls-psk, or use loopback, a unix socket or a network that you trust"
        );
    }
}

/// Loads the TLS credentials, if TLS is on. Blocks: nothing is served yet.
fn load_tls(config: &Config) -> Result<Option<ServerTls>, TlsError> {
    let mode = config.tls.mode();
    if mode == TlsMode::Off {
        return Ok(None);
    }
    let credentials = TlsServerConfig::load(&config.tls.files)?;
    Ok(Some(ServerTls { mode, config: credentials, authz: None }))
}

/// What the server is to do, by the configuration and by what was passed to us.
fn server_config(
    config: &Config,
    passed: Vec<systemd::Passed>,
    stdio: Option<&Stdio>,
) -> Result<ServerConfig, DaemonError> {
    let tls = load_tls(config)?;
    for note in tls.iter().flat_map(|tls| tls.config.notes()) {
        warn!(note, "TLS");
    }
    let limits = &config.limits;
    let mut server = ServerConfig {
        keepalive: config.server.keepalive,
        tcp_user_timeout: config.server.tcp_user_timeout,
        idle_timeout: limits.idle_timeout,
        end_when: if config.run.exit_after_last { EndWhen::LastClientLeaves } else { EndWhen::Told },
        handshake_timeout: limits.handshake_timeout,
        max_half_open: limits.max_handshakes,
        max_connections: limits.max_connections,
        conn_bytes: limits.bytes_per_connection.0,
        conn_requests: u32::try_from(limits.requests_per_connection).unwrap_or(u32::MAX),
        total_bytes: limits.bytes_total.0,
        total_requests: u32::try_from(limits.requests_total).unwrap_or(u32::MAX),
        stall_timeout: limits.stall_timeout,
        tls,
        ..ServerConfig::default()
    };
    if let Some(stdio) = stdio {
        server.connections.push(Arc::clone(&stdio.connection));
        server.end_when = EndWhen::LastConnectionEnds;
        return Ok(server);
    }
    add_passed(&mut server, passed)?;
    let only_passed = !(server.inherited.is_empty() && server.connections.is_empty());
    if only_passed && config.server.listens_by_default() {
        return Ok(server);
    }
    for address in &config.server.listen {
        server.listen.extend(resolve(address)?);
    }
    server.listen.extend(config.server.socket.iter().cloned().map(ListenAddr::Unix));
    warn_of_the_clear(config, &server.listen);
    Ok(server)
}

/// Adds the sockets that systemd passed: those that listen, and connections (a socket unit with `Accept=yes`), at whose
/// end the server is done.
///
/// # Errors
/// What cannot be found out about a socket.
pub fn add_passed(server: &mut ServerConfig, passed: Vec<systemd::Passed>) -> Result<(), DaemonError> {
    for systemd::Passed { fd, number, name } in passed {
        let listens = rustix::net::sockopt::socket_acceptconn(&fd).map_err(|e| {
            DaemonError::Passed(format!("socket activation: descriptor {number}: {}", io::Error::from(e)))
        })?;
        info!(fd = number, name, listens, "a socket was passed");
        match listens {
            true => server.inherited.push(Arc::new(fd)),
            false => {
                server.connections.push(Arc::new(fd));
                server.end_when = EndWhen::LastConnectionEnds;
            }
        }
    }
    Ok(())
}

/// Opens the images of the configuration, in its order.
fn open_exports(config: &Config) -> Result<Vec<Arc<Export>>, DaemonError> {
    config.exports.iter().map(|export| open_export(config, export)).collect()
}

/// Opens the image of one export. Blocks.
fn open_export(config: &Config, export: &ExportConfig) -> Result<Arc<Export>, DaemonError> {
    let made = Export::new(export_options(config, export), open_image(export, false)?)?;
    info!(
        export = export.name,
        image = %export.image.display(),
        size = made.size(),
        read_only = made.read_only(),
        cache = ?export.cache,
        "export is ready"
    );
    Ok(made)
}

/// What clients are told of an export, and who they may be.
fn export_options(config: &Config, export: &ExportConfig) -> ExportOptions {
    ExportOptions {
        name: export.name.clone(),
        description: export.description.clone(),
        read_only: export.read_only,
        max_connections: (export.max_connections > 0).then_some(export.max_connections),
        tls_required: !export.in_the_clear(config.tls.mode()),
        allow: export.allow.clone(),
        allocation_depth: export.allocation_depth,
        bitmaps: export.bitmaps.clone(),
        ..ExportOptions::default()
    }
}

/// A listener's error in one line, with what to do about it.
fn explain(error: &ServerError) -> String {
    let ServerError::Listen { addr, source } = error else {
        let advice = match error {
            ServerError::SocketInUse { .. } => "; stop that server, or choose another path with --socket",
            ServerError::NotASocket { .. } => "; move it away, or choose another path with --socket",
            _ => "",
        };
        return format!("{error}{advice}");
    };
    match source.kind() {
        io::ErrorKind::AddrInUse => format!(
            "address in use: {addr}: another program listens there; stop it, or use --listen with another port (port 0 takes a free one)"
        ),
        io::ErrorKind::AddrNotAvailable => {
            format!(
                "cannot listen on {addr}: this machine does not have that address; use --listen with one of its own"
            )
        }
        io::ErrorKind::PermissionDenied => format!(
            "cannot listen on {addr}: permission denied; choose a port from 1024 on, or a socket in a folder that you may write"
        ),
        io::ErrorKind::NotFound => format!("cannot listen on {addr}: its folder does not exist; create it"),
        _ => format!("cannot listen on {addr}: {source}"),
    }
}

/// Opens an image; for a check, without locks and without writing. Blocks: nothing is served yet.
fn open_image(export: &ExportConfig, only_check: bool) -> Result<Arc<BlockBackend>, DaemonError> {
    let options = OpenOptions {
        format: match export.format {
            Format::Auto => block::Format::Auto,
            Format::Raw => block::Format::Raw,
            Format::Qcow2 => block::Format::Qcow2,
        },
        read_only: export.read_only || only_check,
        cache: match export.cache {
            Cache::Writeback => CacheMode::Writeback,
            Cache::None => CacheMode::None,
            Cache::Writethrough => CacheMode::Writethrough,
            Cache::Directsync => CacheMode::Directsync,
            Cache::Unsafe => CacheMode::Unsafe,
        },
        discard: match export.discard {
            Discard::Unmap => DiscardMode::Unmap,
            Discard::Ignore => DiscardMode::Ignore,
        },
        lock: match export.lock {
            _ if only_check => LockMode::Off,
            Lock::On => LockMode::On,
            Lock::Shared => LockMode::Shared,
            Lock::Off => LockMode::Off,
        },
        offset: export.offset.0,
        size: export.size.map(|size| size.0),
        snapshot: export.snapshot.clone().map(SnapshotSel::IdOrName),
        backing_probe: export.backing_probe,
        remote: export.backing_nbd.then(|| Arc::new(NbdBacking::default()) as Arc<dyn OpenRemote>),
        l2_cache: export.l2_cache.map(|size| size.0),
        bitmaps: export.bitmaps.clone(),
        ..OpenOptions::new(&export.image)
    };
    let root =
        block::open(&options).map_err(|source| DaemonError::Image { export: export.name.clone(), source })?;
    let backend = BlockBackend::new(root);
    if let Some(size) = export.grow_to.filter(|_| !only_check) {
        reload::resize(&backend, size.0).map_err(|why| {
            DaemonError::Said(format!("export \"{}\": grow_to = {}: {why}", export.name, size.0))
        })?;
    }
    Ok(backend)
}
