//! `conbd serve`: checks the configuration and hands over to the daemon.

use super::{Failure, with_sources};
use crate::config::{Config, ConfigError, ServeFlags};
use crate::daemon;
use clap::Args;

/// Serve images over NBD until SIGTERM or SIGINT
///
/// Stays in the foreground, prints the URI (one line per listener and export) on stdout as soon as clients can connect, and logs to
/// stderr. Runs as PID 1 of a container as well as anywhere else.
///
/// SIGTERM, SIGINT: stop accepting, finish what is in flight, flush, exit 0; a second one ends the program at
/// once, with code 4. SIGUSR1: log the counters of every IOThread. SIGHUP: take up a changed
/// configuration file: exports that come and go, what is told of them, credentials, images that have become larger.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  conbd serve disk.raw\n  conbd serve disk.raw --read-only --socket /run/disk.sock\n  \
                  conbd serve /dev/vg0/data --export data --cache none --listen '[::1]:10809'\n  \
                  conbd serve --config /etc/conbd/conbd.toml --check"
)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    flags: ServeFlags,
}

pub(crate) fn run(args: &ServeArgs) -> Result<u8, Failure> {
    let config = Config::load(&args.flags).map_err(|e| match e {
        ConfigError::Read { .. } | ConfigError::Invalid { .. } | ConfigError::Flags(_) => Failure::usage(e),
    })?;
    let outcome = if args.flags.check { daemon::check(&config) } else { daemon::serve(&config, &args.flags) };
    match outcome {
        Ok(daemon::Outcome::Complete) => Ok(super::EXIT_OK),
        Ok(daemon::Outcome::Cut) => Ok(super::EXIT_CUT),
        Ok(daemon::Outcome::Command(code)) => Ok(code),
        Err(e) => Err(Failure::failed(with_sources(&e))),
    }
}
