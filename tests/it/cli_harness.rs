//! What the tests of the command line share: running the program, a daemon that is always ended, and small NBD
//! servers, honest or lying, that live in the test.

use conbd::aio::{AioConfig, AioContext};
use conbd::co::Coroutine;
use conbd::nbd::proto::*;
use conbd::nbd::wire::{
    BlockSizes, Greeting, InfoRequest, OptionHeader, RepInfo, ReplyTo, RequestHeader, SimpleReply,
    put_option_reply,
};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Longest wait for something that must happen: a bound for broken code, not a measure.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How a program ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    /// The single error line of a program that failed as it should.
    pub(crate) fn error_line(&self) -> &str {
        let text = self.stderr.trim_end();
        assert!(!text.contains('\n'), "an error is one line: {text}");
        text
    }
}

fn collect(mut from: impl Read + Send + 'static) -> Receiver<String> {
    let (tell, heard) = channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        let _ = tell.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    heard
}

/// Waits for a child; one that does not end is killed, and the test fails.
fn wait(child: &mut Child) -> Option<i32> {
    let begin = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        if begin.elapsed() > PATIENCE {
            let _ = child.kill();
            let _ = child.wait();
            panic!("the program did not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) fn conbd_command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_conbd"));
    command.args(args).env_remove("CONBD_LOG").stdin(Stdio::null());
    command
}

/// Runs a program to its end.
pub(crate) fn run(mut command: Command) -> Ended {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let stdout = collect(child.stdout.take().unwrap());
    let stderr = collect(child.stderr.take().unwrap());
    let code = wait(&mut child);
    Ended { code, stdout: stdout.recv().unwrap(), stderr: stderr.recv().unwrap() }
}

/// Runs `conbd` to its end.
pub(crate) fn conbd(args: &[&str]) -> Ended {
    run(conbd_command(args))
}

/// Runs a tool that must succeed; what it says on stdout.
#[track_caller]
pub(crate) fn must(program: &str, args: &[&str]) -> String {
    must_command(Command::new(program).args(args))
}

/// [`must`] for a prepared command.
#[track_caller]
pub(crate) fn must_command(command: &mut Command) -> String {
    let out = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}; run: make test-deps"));
    let told = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{command:?}: {told}{}", String::from_utf8_lossy(&out.stderr));
    // qemu-io exits with 0 all the same.
    assert!(!told.contains("verification failed"), "{command:?}: {told}");
    told
}

/// Another server, ended with the test.
pub(crate) struct Peer(Child);

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a server that listens on `socket`.
pub(crate) fn peer(program: &str, args: &[&str], socket: &Path) -> Peer {
    let child = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap_or_else(|e| panic!("{program}: {e}; run: make test-deps"));
    let peer = Peer(child);
    let begin = Instant::now();
    while UnixStream::connect(socket).is_err() {
        assert!(begin.elapsed() < PATIENCE, "{program} does not listen");
        std::thread::sleep(Duration::from_millis(10));
    }
    peer
}

/// A daemon that was started for a test and ends with it.
pub(crate) struct Serving {
    child: Child,
    stdout: Receiver<String>,
    stderr: Arc<Mutex<String>>,
    /// The lines that it printed when it was ready.
    pub(crate) uris: Vec<String>,
}

impl Serving {
    /// Starts `conbd serve ARGS` and waits for `lines` URIs.
    pub(crate) fn start(args: &[&str], lines: usize) -> Serving {
        let mut all = vec!["serve"];
        all.extend(args);
        Serving::start_command(conbd_command(&all), lines)
    }

    pub(crate) fn start_command(mut command: Command, lines: usize) -> Serving {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (tell, stdout) = channel();
        let out = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                let _ = tell.send(line);
            }
        });
        let stderr = Arc::new(Mutex::new(String::new()));
        let log = Arc::clone(&stderr);
        let err = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || {
            for line in err.lines().map_while(Result::ok) {
                let mut log = log.lock().unwrap();
                log.push_str(&line);
                log.push('\n');
            }
        });
        let mut serving = Serving { child, stdout, stderr, uris: Vec::new() };
        for _ in 0..lines {
            match serving.stdout.recv_timeout(PATIENCE) {
                Ok(line) => serving.uris.push(line),
                Err(_) => panic!("no URI; the log: {}", serving.log()),
            }
        }
        serving
    }

    pub(crate) fn uri(&self) -> &str {
        &self.uris[0]
    }

    pub(crate) fn log(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id() as i32).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// Waits until the log contains `text`.
    pub(crate) fn wait_for_log(&self, text: &str) {
        let begin = Instant::now();
        while !self.log().contains(text) {
            assert!(begin.elapsed() < PATIENCE, "the log never said {text:?}: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for its end: exit code, and the log.
    pub(crate) fn wait(mut self) -> (Option<i32>, String) {
        let code = wait(&mut self.child);
        // The log's thread sees the end of the pipe soon after the process is gone.
        let begin = Instant::now();
        while Arc::strong_count(&self.stderr) > 1 && begin.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(1));
        }
        (code, self.log())
    }

    /// SIGTERM, and the end.
    pub(crate) fn stop(self) -> (Option<i32>, String) {
        self.signal(Signal::TERM);
        self.wait()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A folder with an image of `len` bytes.
pub(crate) fn image(len: u64) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::File::create(&path).unwrap().set_len(len).unwrap();
    (dir, path)
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs `f` in a coroutine on a context of this thread.
pub(crate) fn in_coroutine<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    let context = AioContext::new(AioConfig::default()).unwrap();
    let result = Arc::new(Mutex::new(None));
    let slot = Arc::clone(&result);
    let coroutine = Coroutine::new(move || {
        let value = f();
        *slot.lock().unwrap() = Some(value);
    });
    coroutine.schedule(&context);
    context.poll_until(|| coroutine.outcome().is_some());
    // What the coroutine has left behind (a client's helpers) ends within a few turns.
    for _ in 0..10 {
        context.poll(false);
    }
    let value = result.lock().unwrap().take();
    value.expect("the coroutine panicked")
}

/// A server in the test: runs `serve` for every connection, in a thread each.
pub(crate) struct FakeServer {
    _dir: tempfile::TempDir,
    pub(crate) path: PathBuf,
}

impl FakeServer {
    pub(crate) fn start(
        serve: impl Fn(&mut UnixStream) -> io::Result<()> + Send + Sync + 'static,
    ) -> FakeServer {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fake.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let serve = Arc::new(serve);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let serve = Arc::clone(&serve);
                std::thread::spawn(move || {
                    // How a liar's connection ends is the client's affair.
                    let _ = serve(&mut stream);
                });
            }
        });
        FakeServer { _dir: dir, path }
    }

    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.path.display())
    }
}

/// What a fake server claims to be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Claims {
    pub(crate) size: u64,
    pub(crate) structured: bool,
    pub(crate) go: bool,
    pub(crate) flags: TransmissionFlags,
}

impl Claims {
    pub(crate) fn new(size: u64) -> Claims {
        let flags = TransmissionFlags::NBD_FLAG_HAS_FLAGS
            | TransmissionFlags::NBD_FLAG_SEND_FLUSH
            | TransmissionFlags::NBD_FLAG_CAN_MULTI_CONN;
        Claims { size, structured: true, go: true, flags }
    }
}

/// Reads one option: its number and data.
pub(crate) fn read_option(stream: &mut UnixStream) -> io::Result<(u32, Vec<u8>)> {
    let mut header = [0; OptionHeader::LEN];
    stream.read_exact(&mut header)?;
    let header = OptionHeader::decode(&header).map_err(io::Error::other)?;
    let mut data = vec![0; header.len as usize];
    stream.read_exact(&mut data)?;
    Ok((header.option, data))
}

pub(crate) fn greet(stream: &mut UnixStream, flags: HandshakeFlags) -> io::Result<()> {
    stream.write_all(&Greeting { flags }.encode())?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer)
}

/// An honest handshake; true when structured replies were negotiated.
pub(crate) fn handshake(stream: &mut UnixStream, claims: Claims) -> io::Result<bool> {
    greet(stream, HandshakeFlags::NBD_FLAG_FIXED_NEWSTYLE | HandshakeFlags::NBD_FLAG_NO_ZEROES)?;
    let mut structured = false;
    loop {
        let (option, data) = read_option(stream)?;
        let mut out = Vec::new();
        match option {
            NBD_OPT_STRUCTURED_REPLY if claims.structured => {
                structured = true;
                put_option_reply(&mut out, option, NBD_REP_ACK, &[]);
            }
            NBD_OPT_GO if claims.go => {
                InfoRequest::decode(&data).map_err(io::Error::other)?;
                let sizes = RepInfo::BlockSize(BlockSizes { min: 1, preferred: 4096, max: 32 << 20 });
                for info in [RepInfo::Export { size: claims.size, flags: claims.flags }, sizes] {
                    let mut data = Vec::new();
                    info.put(&mut data);
                    put_option_reply(&mut out, option, NBD_REP_INFO, &data);
                }
                put_option_reply(&mut out, option, NBD_REP_ACK, &[]);
                stream.write_all(&out)?;
                return Ok(structured);
            }
            NBD_OPT_EXPORT_NAME => {
                conbd::nbd::wire::ExportNameReply { size: claims.size, flags: claims.flags }
                    .put(&mut out, true);
                stream.write_all(&out)?;
                return Ok(structured);
            }
            NBD_OPT_ABORT => {
                put_option_reply(&mut out, option, NBD_REP_ACK, &[]);
                return stream.write_all(&out).and(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            _ => put_option_reply(&mut out, option, NBD_REP_ERR_UNSUP, &[]),
        }
        stream.write_all(&out)?;
    }
}

pub(crate) fn read_request(stream: &mut UnixStream) -> io::Result<RequestHeader> {
    let mut header = [0; RequestHeader::LEN];
    stream.read_exact(&mut header)?;
    RequestHeader::decode(&header).map_err(io::Error::other)
}

/// Serves memory shared by all connections. `tamper` sees each write before it is stored, with its offset, and
/// may change it; what it leaves empty is not stored.
pub(crate) fn serve_memory(
    stream: &mut UnixStream,
    claims: Claims,
    memory: &Mutex<Vec<u8>>,
    tamper: &(dyn Fn(u64, &mut Vec<u8>) + Sync),
) -> io::Result<()> {
    let structured = handshake(stream, claims)?;
    loop {
        let request = read_request(stream)?;
        let (at, len) = (request.offset as usize, request.len as usize);
        let done = SimpleReply { error: None, cookie: request.cookie }.encode();
        match request.cmd {
            NBD_CMD_READ => {
                let data = memory.lock().unwrap()[at..at + len].to_vec();
                if structured {
                    let done = ReplyFlags::NBD_REPLY_FLAG_DONE;
                    let to = ReplyTo::compact(request.cookie);
                    stream.write_all(&to.offset_data(done, request.offset, request.len as u32))?;
                } else {
                    stream.write_all(&done)?;
                }
                stream.write_all(&data)?;
            }
            NBD_CMD_WRITE => {
                let mut data = vec![0; len];
                stream.read_exact(&mut data)?;
                tamper(request.offset, &mut data);
                if !data.is_empty() {
                    memory.lock().unwrap()[at..at + len].copy_from_slice(&data);
                }
                stream.write_all(&done)?;
            }
            NBD_CMD_FLUSH => stream.write_all(&done)?,
            NBD_CMD_DISC => return Ok(()),
            _ => {
                let error = Some(Errno::NBD_EINVAL);
                stream.write_all(&SimpleReply { error, cookie: request.cookie }.encode())?;
            }
        }
    }
}
