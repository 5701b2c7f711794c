//! SIGHUP: what is taken up while clients are connected.
//!
//! Images that have become larger underneath are shown so, and those whose `grow_to` asks for more are made larger. What
//! else has changed in the configuration is named in the log, and waits for a restart.
//!
//! A reload runs in a thread of its own, one at a time: the main thread goes on accepting. An image is drained while its
//! size changes: its requests wait, none fails. Nothing is changed when the configuration cannot be read.

use crate::block::BlockBackend;
use crate::co;
use crate::config::{Config, ConfigError, ExportConfig};
use crate::nbd::server::Server;
use crate::util::systemd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use tracing::{error, info, warn};

/// How long a reload waits for the requests of an image that were begun before it (ours: new ones wait that long, too).
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Reads the configuration again, with the flags of the command line over it.
pub type Load = Box<dyn Fn() -> Result<Config, ConfigError> + Send + Sync>;

/// What a reload needs. Any thread; shared by `Arc`.
pub struct Reloader {
    load: Load,
    state: Mutex<State>,
    stopping: AtomicBool,
}

struct State {
    /// What holds: as it was at the start, with the `grow_to` of later reloads.
    config: Config,
    running: bool,
    /// A reload was asked for while one ran.
    again: bool,
    worker: Option<JoinHandle<()>>,
}

impl Reloader {
    /// Makes one for a server that was started with `config`.
    #[must_use]
    pub fn new(config: Config, load: Load) -> Arc<Reloader> {
        let state = State { config, running: false, again: false, worker: None };
        Arc::new(Reloader { load, state: Mutex::new(state), stopping: AtomicBool::new(false) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a reload, or lets the one that runs be followed by another. Never waits.
    pub fn request(self: &Arc<Self>, server: &Arc<Server>) {
        let mut state = self.lock();
        if state.running {
            state.again = true;
            return;
        }
        let (reloader, server) = (Arc::clone(self), Arc::clone(server));
        match std::thread::Builder::new().name("reload".to_owned()).spawn(move || reloader.run(&server)) {
            Ok(worker) => {
                state.running = true;
                // The one before has ended, or is about to without looking at anything.
                state.worker = Some(worker);
            }
            Err(e) => error!(error = %e, "SIGHUP: nothing is reloaded, there is no thread to do it"),
        }
    }

    /// Lets a running reload end early, and waits for it. Blocks.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        let worker = self.lock().worker.take();
        if worker.is_some_and(|w| w.join().is_err()) {
            error!("a reload had panicked");
        }
    }

    fn run(&self, server: &Server) {
        loop {
            self.once(server);
            let mut state = self.lock();
            if !std::mem::take(&mut state.again) || self.stopping.load(Ordering::SeqCst) {
                state.running = false;
                return;
            }
        }
    }

    fn once(&self, server: &Server) {
        tell(&format!("RELOADING=1\nMONOTONIC_USEC={}", monotonic_us()));
        match (self.load)() {
            Err(e) => error!(error = %e, "SIGHUP: nothing is reloaded, the configuration cannot be used"),
            Ok(config) => self.apply(server, config),
        }
        tell("READY=1");
    }

    fn apply(&self, server: &Server, new: Config) {
        let old = self.lock().config.clone();
        for what in waits_for_restart(&old, &new) {
            warn!(what, "SIGHUP: changed, and waits for a restart");
        }
        let table = server.exports().snapshot();
        let asked: Vec<(usize, u64)> = old
            .exports
            .iter()
            .enumerate()
            .map(|(i, e)| (i, same_export(e, &new.exports).and_then(|e| e.grow_to).map_or(0, |size| size.0)))
            .collect();
        let (mut grown, mut failed) = (0, 0);
        // Those that are made larger first: another export may show the same file.
        let (first, then): (Vec<_>, Vec<_>) = asked.into_iter().partition(|(_, at_least)| *at_least > 0);
        for (i, at_least) in first.into_iter().chain(then) {
            let Some(export) = table.find(&old.exports[i].name) else { continue };
            match self.resize(export.backend(), at_least) {
                Ok((before, now)) if now > before => {
                    grown += 1;
                    info!(
                        export = export.name(),
                        was = before,
                        now,
                        connected = export.connections(),
                        "the export has become larger; clients see it when they connect"
                    );
                }
                Ok(_) => {}
                Err(why) => {
                    failed += 1;
                    error!(
                        export = export.name(),
                        at_least,
                        error = why,
                        "the export's size cannot be taken up"
                    );
                }
            }
        }
        let mut state = self.lock();
        for export in &mut state.config.exports {
            let grow_to = same_export(export, &new.exports).map(|e| e.grow_to);
            export.grow_to = grow_to.unwrap_or(export.grow_to);
        }
        drop(state);
        info!(exports = old.exports.len(), grown, failed, "SIGHUP: reloaded");
    }

    /// Size before and now.
    fn resize(&self, backend: &Arc<BlockBackend>, at_least: u64) -> Result<(u64, u64), String> {
        let before = backend.len();
        let give_up = || self.stopping.load(Ordering::SeqCst);
        let Some(section) = backend.drained_blocking(DRAIN_TIMEOUT, &give_up) else {
            return Err(match give_up() {
                true => "the server stops".to_owned(),
                false => {
                    "requests that were begun before do not end; send SIGHUP again when the image answers"
                        .to_owned()
                }
            });
        };
        let now = resize(backend, at_least)?;
        drop(section);
        Ok((before, now))
    }
}

/// Takes up the image's size, and makes it at least `at_least` bytes long; the size that is exported then. Blocks.
///
/// # Errors
/// Why not, and what to do, in one line.
pub fn resize(backend: &Arc<BlockBackend>, at_least: u64) -> Result<u64, String> {
    let resized = Arc::clone(backend);
    let done = co::run_to_end(move || resized.co_resize(at_least)).map_err(|e| e.to_string())?;
    done.map_err(|e| {
        let advice = match e.errno() {
            libc::ENOSPC => "; there is no room (make a block device larger first)",
            libc::EPERM => "; it is read-only",
            libc::EINVAL => "; the size of a qcow2 image must be a multiple of 512 bytes",
            libc::ENOTSUP => {
                "; conbd check shows what it is: a version 2 image with snapshots has one size for ever (qemu-img amend -o compat=1.1)"
            }
            libc::EFBIG => "; its cluster size does not allow that",
            _ => "",
        };
        format!("{e}: {}{advice}", e.source)
    })
}

/// The export of that name and image.
fn same_export<'a>(export: &ExportConfig, all: &'a [ExportConfig]) -> Option<&'a ExportConfig> {
    all.iter().find(|e| e.name == export.name && e.image == export.image)
}

/// What differs and is not taken up, in words.
fn waits_for_restart(old: &Config, new: &Config) -> Vec<String> {
    let mut all = Vec::new();
    for (changed, section) in [
        (old.server != new.server, "[server]"),
        (old.limits != new.limits, "[limits]"),
        (old.tls != new.tls, "[tls]"),
        (old.log != new.log, "[log]"),
    ] {
        if changed {
            all.push(section.to_owned());
        }
    }
    for export in &old.exports {
        match same_export(export, &new.exports) {
            None => all.push(format!("export \"{}\": gone, or has another image", export.name)),
            Some(now) if *export != (ExportConfig { grow_to: export.grow_to, ..now.clone() }) => {
                all.push(format!("export \"{}\": other keys than grow_to", export.name));
            }
            Some(_) => {}
        }
    }
    for export in new.exports.iter().filter(|e| same_export(e, &old.exports).is_none()) {
        all.push(format!("export \"{}\": new", export.name));
    }
    all
}

/// The clock that systemd orders reloads by.
fn monotonic_us() -> i64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    t.tv_sec * 1_000_000 + t.tv_nsec / 1000
}

fn tell(state: &str) {
    if let Err(error) = systemd::notify(state) {
        warn!(%error, "the supervisor cannot be told about the reload (NOTIFY_SOCKET)");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn config(text: &str) -> Config {
        Config::parse("conbd.toml", Path::new("/"), text).expect("it is right")
    }

    #[test]
    fn what_waits_for_a_restart_is_named() {
        let check = |old: &str, new: &str, want: &[&str]| {
            assert_eq!(waits_for_restart(&config(old), &config(new)), want, "{old:?} {new:?}");
        };
        let one = "[[export]]\nname = 'a'\nimage = 'a'\n";
        check(one, one, &[]);
        check(one, &format!("{one}grow_to = '1G'\n"), &[]);
        check(one, &format!("{one}cache = 'none'\n"), &["export \"a\": other keys than grow_to"]);
        check(
            one,
            &format!("[log]\nlevel = 'debug'\n[limits]\nidle_timeout = '1s'\n{one}"),
            &["[limits]", "[log]"],
        );
        let moved = "[[export]]\nname = 'a'\nimage = 'b'\n";
        check(one, moved, &["export \"a\": gone, or has another image", "export \"a\": new"]);
    }
}
