//! The daemon under test: started, watched and stopped.

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Longest wait for something that must happen: a bound for broken code, not a measure.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How clients reach the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Unix,
    Tcp,
}

/// One set-up of the matrix.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setup {
    pub(crate) transport: Transport,
    pub(crate) iothreads: usize,
    pub(crate) aio: &'static str,
}

pub(crate) const UNIX_1_IO_URING: Setup = Setup { transport: Transport::Unix, iothreads: 1, aio: "io_uring" };
pub(crate) const UNIX_3_THREADS: Setup = Setup { transport: Transport::Unix, iothreads: 3, aio: "threads" };
pub(crate) const TCP_1_THREADS: Setup = Setup { transport: Transport::Tcp, iothreads: 1, aio: "threads" };
pub(crate) const TCP_3_IO_URING: Setup = Setup { transport: Transport::Tcp, iothreads: 3, aio: "io_uring" };

/// Runs a function of a [`Setup`] as four tests.
macro_rules! matrix {
    ($($body:ident),+ $(,)?) => {
        $(mod $body {
            use crate::harness::{TCP_1_THREADS, TCP_3_IO_URING, UNIX_1_IO_URING, UNIX_3_THREADS};
            #[test]
            fn unix_1_io_uring() { super::$body(UNIX_1_IO_URING) }
            #[test]
            fn unix_3_threads() { super::$body(UNIX_3_THREADS) }
            #[test]
            fn tcp_1_threads() { super::$body(TCP_1_THREADS) }
            #[test]
            fn tcp_3_io_uring() { super::$body(TCP_3_IO_URING) }
        })+
    };
}
pub(crate) use matrix;

/// A folder with an image, and how to serve it.
pub(crate) struct Builder {
    dir: tempfile::TempDir,
    setup: Setup,
    args: Vec<String>,
    wrapper: Vec<String>,
    config: Option<String>,
}

/// A running `conbd serve`. Dropping it kills it; a test ends with [`Server::stop`].
pub(crate) struct Server {
    child: Child,
    pub(crate) dir: tempfile::TempDir,
    /// One per listener and export, as printed.
    pub(crate) uri: String,
    stdout: Receiver<String>,
    log: Arc<Mutex<Vec<String>>>,
    readers: Vec<JoinHandle<()>>,
}

/// What a server left behind.
pub(crate) struct Stopped {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) log: Vec<Value>,
    pub(crate) raw_log: Vec<String>,
}

impl Builder {
    pub(crate) fn new(setup: Setup) -> Builder {
        let dir = tempfile::Builder::new().prefix("conbd-interop-").tempdir().unwrap();
        Builder { dir, setup, args: Vec::new(), wrapper: Vec::new(), config: None }
    }

    /// Makes the image: `len` bytes, all a hole.
    pub(crate) fn image_len(self, len: u64) -> Builder {
        File::create(self.image()).unwrap().set_len(len).unwrap();
        self
    }

    /// Makes the image from bytes.
    pub(crate) fn image_data(self, data: &[u8]) -> Builder {
        std::fs::write(self.image(), data).unwrap();
        self
    }

    pub(crate) fn image(&self) -> PathBuf {
        self.dir.path().join("disk.raw")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Adds arguments of `conbd serve`.
    pub(crate) fn args(mut self, args: &[&str]) -> Builder {
        self.args.extend(args.iter().map(|&a| a.to_owned()));
        self
    }

    /// Serves by a configuration file instead of the one image; relative paths start at the folder.
    pub(crate) fn config(mut self, text: &str) -> Builder {
        self.config = Some(text.to_owned());
        self
    }

    /// Runs the daemon below another program, whose last arguments are the daemon's command line.
    pub(crate) fn wrapped_by(mut self, wrapper: &[&str]) -> Builder {
        self.wrapper = wrapper.iter().map(|&a| a.to_owned()).collect();
        self
    }

    fn command(&self) -> Command {
        let binary = env!("CARGO_BIN_EXE_conbd");
        let mut command = match self.wrapper.split_first() {
            None => Command::new(binary),
            Some((program, args)) => {
                let mut command = Command::new(program);
                command.args(args).arg(binary);
                command
            }
        };
        command.arg("serve");
        if let Some(text) = &self.config {
            std::fs::write(self.path("conbd.toml"), text).unwrap();
            command.arg("--config").arg(self.path("conbd.toml"));
        } else {
            command.arg(self.image());
        }
        match self.setup.transport {
            Transport::Unix => command.arg("--socket").arg(self.path("nbd.sock")),
            Transport::Tcp => command.args(["--listen", "127.0.0.1:0"]),
        };
        let engines = std::env::var("CONBD_TEST_ENGINES");
        let aio = if engines.is_ok_and(|e| e == "threads") { "threads" } else { self.setup.aio };
        command.args(["--iothreads", &self.setup.iothreads.to_string(), "--aio", aio]);
        command.args(["--log-format", "json"]).args(&self.args);
        command.env_remove("CONBD_LOG").current_dir(self.dir.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Starts the daemon and waits for its URI.
    pub(crate) fn start(self) -> Server {
        let mut command = self.command();
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let (tx, stdout) = mpsc::channel();
        let out = BufReader::new(child.stdout.take().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let err = BufReader::new(child.stderr.take().unwrap());
        let of_reader = Arc::clone(&log);
        let readers = vec![
            thread::spawn(move || {
                for line in out.lines().map_while(Result::ok) {
                    // The server may have been dropped.
                    let _nobody_listens_any_more = tx.send(line);
                }
            }),
            thread::spawn(move || {
                for line in err.lines().map_while(Result::ok) {
                    of_reader.lock().unwrap().push(line);
                }
            }),
        ];
        let mut server = Server { child, dir: self.dir, uri: String::new(), stdout, log, readers };
        match server.stdout.recv_timeout(PATIENCE) {
            Ok(uri) => server.uri = uri,
            Err(e) => {
                let status = server.child.try_wait().unwrap();
                panic!("no URI ({e}); status {status:?}; log:\n{}", server.log_text());
            }
        }
        assert!(server.uri.starts_with("nbd"), "first line on stdout is {:?}", server.uri);
        server
    }

    /// Runs the daemon where it must refuse to start. Returns its exit status and what it wrote to stderr.
    pub(crate) fn start_refused(&self) -> (ExitStatus, String) {
        let mut child = self.command().spawn().unwrap();
        let status = wait_for_exit(&mut child);
        let mut text = String::new();
        std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut text).unwrap();
        (status, text)
    }
}

impl Server {
    /// A server of a 64 MiB empty image.
    pub(crate) fn plain(setup: Setup) -> Server {
        Builder::new(setup).image_len(64 << 20).start()
    }

    pub(crate) fn image(&self) -> PathBuf {
        self.path("disk.raw")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// All URIs: the first, and those that have been printed since.
    pub(crate) fn more_uris(&self) -> Vec<String> {
        // They are printed together; the first has been taken.
        let rest = self.stdout.recv_timeout(PATIENCE).into_iter().chain(self.stdout.try_iter());
        std::iter::once(self.uri.clone()).chain(rest).collect()
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// The URI for another export of this server.
    pub(crate) fn uri_of(&self, export: &str) -> String {
        let (address, query) = self.uri.split_once('?').map_or((self.uri.as_str(), ""), |(a, q)| (a, q));
        let (scheme, rest) = address.split_once("://").unwrap();
        let authority = rest.split('/').next().unwrap();
        let query = if query.is_empty() { String::new() } else { format!("?{query}") };
        format!("{scheme}://{authority}/{export}{query}")
    }

    pub(crate) fn log_text(&self) -> String {
        self.log.lock().unwrap().join("\n")
    }

    /// Descriptors that the daemon has open.
    pub(crate) fn fd_count(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// A line of /proc/PID/status, in KiB.
    pub(crate) fn status_kib(&self, key: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|l| l.starts_with(key)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Waits until the daemon has as few descriptors as `baseline`.
    pub(crate) fn wait_for_fds(&self, baseline: usize) {
        wait_until(&format!("{baseline} descriptors again"), || self.fd_count() <= baseline);
    }

    /// Waits for the end of a server that was told to stop; the status is for the caller to judge.
    pub(crate) fn wait(mut self) -> (ExitStatus, Stopped) {
        let status = wait_for_exit(&mut self.child);
        for reader in self.readers.drain(..) {
            reader.join().unwrap();
        }
        let raw_log = std::mem::take(&mut *self.log.lock().unwrap());
        let log = raw_log.iter().filter_map(|line| serde_json::from_str(line).ok()).collect();
        // Drop would kill a child that has ended: harmless, the handle knows.
        let dir = std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap());
        (status, Stopped { dir, log, raw_log })
    }

    /// SIGTERM; asserts that it ends with code 0, and that nothing was logged as an error.
    pub(crate) fn stop(self) -> Stopped {
        let stopped = self.stop_with_errors();
        let errors: Vec<_> = stopped.log.iter().filter(|l| l["level"] == "ERROR").collect();
        assert!(errors.is_empty(), "errors in the log: {errors:#?}");
        stopped
    }

    /// SIGTERM; asserts that it ends with code 0.
    pub(crate) fn stop_with_errors(self) -> Stopped {
        self.signal(Signal::TERM);
        let (status, stopped) = self.wait();
        assert_eq!(status.code(), Some(0), "{status:?}; log:\n{}", stopped.raw_log.join("\n"));
        let panicked = stopped.raw_log.iter().any(|l| l.contains("panicked"));
        assert!(!panicked, "a panic in the log:\n{}", stopped.raw_log.join("\n"));
        stopped
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("log of the server:\n{}", self.log_text());
        }
        // Fails only if it has ended, which is what we want.
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl Stopped {
    pub(crate) fn image(&self) -> PathBuf {
        self.dir.path().join("disk.raw")
    }

    /// Log entries with that message.
    pub(crate) fn messages(&self, message: &str) -> Vec<&Value> {
        self.log.iter().filter(|l| message_of(l) == message).collect()
    }
}

/// The message of a JSON log line.
pub(crate) fn message_of(line: &Value) -> &str {
    line["fields"]["message"].as_str().or(line["message"].as_str()).unwrap_or_default()
}

/// A field of a JSON log line.
pub(crate) fn field<'a>(line: &'a Value, name: &str) -> &'a Value {
    line["fields"].get(name).or(line.get(name)).unwrap_or(&Value::Null)
}

/// Waits for a child's end, bounded.
pub(crate) fn wait_for_exit(child: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > deadline {
            let _ended_meanwhile = child.kill();
            panic!("process {} did not end within {PATIENCE:?}", child.id());
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Waits for a condition, bounded.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Bytes that look random and are the same each time.
pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut data = Vec::with_capacity(len + 8);
    while data.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        data.extend_from_slice(&state.to_le_bytes());
    }
    data.truncate(len);
    data
}

/// Writes a file of `len` bytes with holes: noise in every third of 16 parts.
pub(crate) fn write_sparse(path: &Path, len: u64, seed: u64) {
    let file = File::create(path).unwrap();
    file.set_len(len).unwrap();
    let part = len / 16 / 4096 * 4096;
    for i in (0..16).step_by(3) {
        file.write_all_at(&noise(part.try_into().unwrap(), seed + i), i * part).unwrap();
    }
}

/// Asserts that two files hold the same bytes, without printing them.
pub(crate) fn assert_same(a: &Path, b: &Path) {
    let (x, y) = (std::fs::read(a).unwrap(), std::fs::read(b).unwrap());
    assert_eq!(x.len(), y.len(), "{} and {}", a.display(), b.display());
    let first = x.iter().zip(&y).position(|(p, q)| p != q);
    assert_eq!(first, None, "{} and {} differ there", a.display(), b.display());
}

/// Bytes that a file takes on disk.
pub(crate) fn allocated(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(path).unwrap()) * 512
}
