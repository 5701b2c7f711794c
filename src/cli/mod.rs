//! The command line: one file per subcommand. Parses, runs, and turns the outcome into an exit code.
//!
//! Data goes to stdout, everything else to stderr; an error is one line that says what, where and what to do
//! next. Runs on the main thread.

mod bench;
mod check;
mod create;
mod drive;
mod getopt;
mod image;
mod inspect;
mod man;
mod qemu_list;
mod qemu_nbd;
mod qemu_opts;
mod serve;

use crate::nbd::client::{ClientError, Uri};
use clap::{CommandFactory, Parser, Subcommand};
use std::io::Write as _;
use std::process::ExitCode;

/// Done.
pub const EXIT_OK: u8 = 0;
/// It did not work: an image, a socket, a server, the system.
pub const EXIT_FAILURE: u8 = 1;
/// The command line or the configuration file is wrong (clap's number, too).
pub const EXIT_USAGE: u8 = 2;
/// `bench --verify` read something other than what was written.
pub const EXIT_VERIFY: u8 = 3;
/// `serve` was stopped before everything in flight was finished and flushed.
pub const EXIT_CUT: u8 = 4;

/// Network block device server: serves raw and qcow2 images over NBD on several threads.
#[derive(Debug, Parser)]
#[command(
    name = "conbd",
    version,
    propagate_version = true,
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong command line or configuration, 3 bench --verify found wrong data\n(check: 2 corrupt, 3 leaks),\n\
                  4 serve was stopped before everything in flight was finished and flushed."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(Box<serve::ServeArgs>),
    Bench(bench::BenchArgs),
    Inspect(inspect::InspectArgs),
    Check(check::CheckArgs),
    Create(create::CreateArgs),
    Resize(create::ResizeArgs),
    QemuNbd(QemuNbdArgs),
    #[command(hide = true)]
    GenMan(man::GenManArgs),
}

/// Serve one image with qemu-nbd's command line: for scripts that call qemu-nbd
///
/// The same happens when the program is called by the name qemu-nbd, such as through a symbolic link.
///
/// Defaults, messages, exit codes and habits are those of QEMU's qemu-nbd; `conbd qemu-nbd --help` prints its options. Without -t it
/// ends when the last client has left. SIGTERM, SIGINT and SIGHUP end it at once, with code 0.
#[derive(Debug, clap::Args)]
#[command(
    disable_help_flag = true,
    disable_version_flag = true,
    after_help = "Examples:\n  conbd qemu-nbd -t -f raw -k /run/disk.sock disk.raw\n  \
                  ln -s /usr/local/bin/conbd /usr/local/bin/qemu-nbd\n  qemu-nbd --list -b localhost"
)]
struct QemuNbdArgs {
    /// Options and FILE, as qemu-nbd takes them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
    args: Vec<std::ffi::OsString>,
}

/// An error that ends the program: one line for stderr and an exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) code: u8,
    pub(crate) message: String,
}

impl Failure {
    /// It did not work.
    pub(crate) fn failed(message: impl std::fmt::Display) -> Failure {
        Failure { code: EXIT_FAILURE, message: message.to_string() }
    }
    /// It was asked for wrongly.
    pub(crate) fn usage(message: impl std::fmt::Display) -> Failure {
        Failure { code: EXIT_USAGE, message: message.to_string() }
    }
}

/// Joins an error with its sources: `what: why: why`. A source whose text its parent has already is left out.
pub(crate) fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// What went wrong with the server at `uri`, and what to look at when nobody is there.
pub(crate) fn client_failure(uri: &Uri, error: &ClientError) -> Failure {
    use std::io::ErrorKind::{ConnectionRefused, NotFound};
    let advice = match error {
        ClientError::Connect { source, .. } if matches!(source.kind(), ConnectionRefused | NotFound) => {
            "; is the server running, and is this where it listens?"
        }
        _ => "",
    };
    Failure::failed(format!("{uri}: {}{advice}", with_sources(error)))
}

pub(crate) use crate::co::run_to_end as run_coroutine;

/// Writes to stdout. A reader that has gone away (`| head`) is no failure.
pub(crate) fn write_out(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::failed(format!("cannot write to stdout: {e}")))
        }
        _ => Ok(()),
    }
}

/// The whole command line's definition, for the man page and its test.
#[must_use]
pub fn definition() -> clap::Command {
    Cli::command()
}

/// Runs the program and returns its exit code.
pub fn main() -> ExitCode {
    let args: Vec<std::ffi::OsString> = std::env::args_os().collect();
    // Before clap: qemu-nbd's options are read by other rules.
    match args.as_slice() {
        [program, rest @ ..]
            if std::path::Path::new(program).file_name().is_some_and(|n| n == "qemu-nbd") =>
        {
            return qemu_nbd::main(program, rest);
        }
        [_, command, rest @ ..] if command == "qemu-nbd" => return qemu_nbd::main(command, rest),
        _ => {}
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // clap's own output: help and version to stdout with code 0, errors to stderr with code 2.
            let code = u8::try_from(e.exit_code()).unwrap_or(EXIT_USAGE);
            // A closed stdout or stderr is no reason to fail differently.
            let _ = e.print();
            return ExitCode::from(code);
        }
    };
    let outcome = match cli.command {
        Command::Serve(args) => serve::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Create(args) => create::create(&args),
        Command::Resize(args) => create::resize(&args),
        Command::QemuNbd(args) => return qemu_nbd::main(&"qemu-nbd".into(), &args.args),
        Command::GenMan(args) => man::run(&args),
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            eprintln!("conbd: {}", failure.message);
            ExitCode::from(failure.code)
        }
    }
}
