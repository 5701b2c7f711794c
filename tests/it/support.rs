//! Shared by the modules: running code in coroutines of IOThreads, engines to test with, scratch file systems, and
//! skipping aloud.

#![allow(dead_code, reason = "a tool box: each module takes what it needs")]

use conbd::aio::engine::EngineChoice;
use conbd::aio::{AioConfig, AioContext, IoThread};
use conbd::co::Coroutine;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, mpsc};
use std::time::Duration;

/// How long a test waits for what must happen, before it calls it a hang. Nothing waits that long when all is well.
pub(crate) const HANG: Duration = Duration::from_secs(120);

/// The engines that this run covers; `CONBD_TEST_ENGINES=threads` leaves io_uring out where it is refused.
pub(crate) fn engines() -> Vec<EngineChoice> {
    match std::env::var("CONBD_TEST_ENGINES").as_deref() {
        Ok("threads") => {
            skip("everything with io_uring", "CONBD_TEST_ENGINES=threads");
            vec![EngineChoice::Threads]
        }
        _ => vec![EngineChoice::Threads, EngineChoice::IoUring],
    }
}

/// Starts an IOThread.
pub(crate) fn iothread(name: &str, engine: EngineChoice) -> IoThread {
    let config = AioConfig { name: name.to_owned(), engine, pool_threads: 4, ..AioConfig::default() };
    IoThread::spawn(config).unwrap_or_else(|e| {
        panic!("{engine:?}: {e}; where io_uring is refused, set CONBD_TEST_ENGINES=threads")
    })
}

/// Something that runs in a coroutine.
pub(crate) struct Task<T>(mpsc::Receiver<T>);

impl<T> Task<T> {
    /// Waits for its end; panics if it panicked or hangs.
    #[track_caller]
    pub(crate) fn join(self) -> T {
        match self.0.recv_timeout(HANG) {
            Ok(v) => v,
            Err(mpsc::RecvTimeoutError::Disconnected) => panic!("the coroutine panicked"),
            Err(mpsc::RecvTimeoutError::Timeout) => panic!("the coroutine hangs"),
        }
    }

    /// Whether it has ended (its value is lost then).
    pub(crate) fn ended(&self) -> bool {
        !matches!(self.0.try_recv(), Err(mpsc::TryRecvError::Empty))
    }
}

/// Starts `f` in a coroutine of the context.
pub(crate) fn spawn_in<T: Send + 'static>(
    ctx: &Arc<AioContext>,
    f: impl FnOnce() -> T + Send + 'static,
) -> Task<T> {
    let (send, receive) = mpsc::channel();
    let co = Coroutine::new(move || {
        // Nobody may be waiting any more.
        let _ = send.send(f());
    });
    co.schedule(ctx);
    Task(receive)
}

/// Runs `f` in a coroutine of the context and waits for its value.
#[track_caller]
pub(crate) fn run_in_coroutine<T: Send + 'static>(
    ctx: &Arc<AioContext>,
    f: impl FnOnce() -> T + Send + 'static,
) -> T {
    spawn_in(ctx, f).join()
}

/// Says aloud (past the capturing of output) that something is not tested here; fails instead if
/// `CONBD_TEST_REQUIRE_ALL` is set.
pub(crate) fn skip(what: &str, why: &str) {
    assert!(
        std::env::var_os("CONBD_TEST_REQUIRE_ALL").is_none(),
        "NOT TESTED: {what}: {why} (CONBD_TEST_REQUIRE_ALL is set)"
    );
    // The handle itself is not captured by the test harness. If stderr is gone nobody can be told.
    let _ = writeln!(std::io::stderr(), "NOT TESTED HERE: {what}: {why}");
}

/// Runs a command; its output on success, else what went wrong.
pub(crate) fn run(program: &str, args: &[&str]) -> Result<String, String> {
    let out = Command::new(program).args(args).output().map_err(|e| format!("{program}: {e}"))?;
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    if out.status.success() {
        Ok(text(&out.stdout) + &text(&out.stderr))
    } else {
        Err(format!(
            "{program} {}: {}: {}{}",
            args.join(" "),
            out.status,
            text(&out.stdout),
            text(&out.stderr)
        ))
    }
}

/// A mounted scratch file system; unmounted on drop.
pub(crate) struct Mount {
    dir: tempfile::TempDir,
}

impl Mount {
    /// Mounts `kind` (`tmpfs`, `ramfs`) with options; `None`, said aloud, where that is refused.
    pub(crate) fn new(kind: &str, options: &str, what: &str) -> Option<Mount> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        match run("mount", &["-t", kind, "-o", options, "none", path]) {
            Ok(_) => Some(Mount { dir }),
            Err(e) => {
                skip(what, &e);
                None
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(e) = run("umount", &[self.dir.path().to_str().unwrap()]) {
            // A busy mount is left behind rather than hidden.
            let _ = writeln!(std::io::stderr(), "{e}");
        }
    }
}

/// A loop device over a file; detached on drop.
pub(crate) struct Loop {
    pub(crate) device: PathBuf,
}

impl Loop {
    /// Attaches `file`; `None`, said aloud, where that is refused.
    pub(crate) fn new(file: &Path, what: &str) -> Option<Loop> {
        match run("losetup", &["-f", "--show", file.to_str().unwrap()]) {
            Ok(out) => Some(Loop { device: PathBuf::from(out.trim()) }),
            Err(e) => {
                skip(what, &e);
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if let Err(e) = run("losetup", &["-d", self.device.to_str().unwrap()]) {
            let _ = writeln!(std::io::stderr(), "{e}");
        }
    }
}

/// A directory on tmpfs, where there is one.
pub(crate) fn tmpfs_dir() -> Option<tempfile::TempDir> {
    match tempfile::tempdir_in("/dev/shm") {
        Ok(d) => Some(d),
        Err(e) => {
            skip("images on tmpfs", &format!("/dev/shm: {e}"));
            None
        }
    }
}
