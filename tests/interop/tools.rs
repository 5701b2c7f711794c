//! Other people's programs, run with a bound.

use crate::harness::PATIENCE;
use std::ffi::OsStr;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// What a program did.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    /// Asserts success; returns stdout.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self.stdout
    }

    /// Asserts failure; returns stdout and stderr.
    #[track_caller]
    pub(crate) fn failed(self) -> String {
        assert_ne!(self.code, Some(0), "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self.stdout + &self.stderr
    }
}

/// A command for a program of the system; its interpreter (nbdsh's Python) comes from the system, too.
pub(crate) fn tool(program: &str) -> Command {
    let mut command = Command::new(program);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("/usr/bin:/usr/sbin:/bin:/sbin:{path}"));
    command.env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
    command
}

/// Starts a program; a missing one fails the test.
#[track_caller]
pub(crate) fn spawn(command: &mut Command) -> Child {
    command.spawn().unwrap_or_else(|e| {
        let program = command.get_program().to_string_lossy().into_owned();
        panic!("{program}: {e}; the interop tests need it: run `make test` or scripts/test-deps.sh, which install it")
    })
}

/// Runs a program to its end.
#[track_caller]
pub(crate) fn run<S: AsRef<OsStr>>(program: &str, args: &[S]) -> Ran {
    run_command(tool(program).args(args))
}

/// Runs a prepared command to its end.
#[track_caller]
pub(crate) fn run_command(command: &mut Command) -> Ran {
    let mut child = spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    finish(&mut child, &format!("{command:?}"))
}

/// Collects the output of a child with piped stdout and stderr, and waits for its end.
#[track_caller]
pub(crate) fn finish(child: &mut Child, what: &str) -> Ran {
    let collect = |mut from: Box<dyn Read + Send>| {
        thread::spawn(move || {
            let mut text = Vec::new();
            from.read_to_end(&mut text).unwrap();
            String::from_utf8_lossy(&text).into_owned()
        })
    };
    let out = collect(Box::new(child.stdout.take().unwrap()));
    let err = collect(Box::new(child.stderr.take().unwrap()));
    let deadline = Instant::now() + 2 * PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            let _ended_meanwhile = child.kill();
            panic!("{what} did not end; stdout:\n{}\nstderr:\n{}", out.join().unwrap(), err.join().unwrap());
        }
        thread::sleep(Duration::from_millis(5));
    };
    Ran { code: status.code(), stdout: out.join().unwrap(), stderr: err.join().unwrap() }
}

/// Runs a Python program with libnbd's bindings; `args` are its `sys.argv[1:]`.
///
/// The interpreter is the system's, where Debian installs python3-libnbd.
#[track_caller]
pub(crate) fn python(program: &str, args: &[&str]) -> Ran {
    let ran = run_command(python_command(program).args(args));
    let missing = ran.stderr.contains("No module named 'nbd'");
    assert!(
        !missing,
        "python3-libnbd is not installed: run `make test` or scripts/test-deps.sh, which install it"
    );
    ran
}

/// The command of [`python`], to be extended and spawned.
pub(crate) fn python_command(program: &str) -> Command {
    let mut command = tool("/usr/bin/python3");
    // -I: nothing of the user's environment.
    command.args(["-I", "-u", "-c", program]);
    command
}
