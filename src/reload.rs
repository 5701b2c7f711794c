//! SIGHUP: what is taken up while clients are connected.
//!
//! - TLS credentials are read again: later handshakes use them, connections that are up stay.
//! - New exports are opened, and those that are gone are offered no more; their clients keep them until they leave, then
//!   the image is closed. What clients are told of an export, and who may use it, changes for those that connect later.
//! - Images that have become larger underneath are shown so, and those whose `grow_to` asks for more are made larger.
//!
//! What else has changed in the configuration is named in the log, and waits for a restart. What fails (an image that is not
//! there, a certificate that does not fit its key) is logged, leaves what it would have replaced, and does not keep the rest
//! from being taken up. Nothing is changed when the configuration cannot be read.
//!
//! A reload runs in a thread of its own, one at a time: the main thread goes on accepting. The thread lives on while
//! exports are leaving. An image is drained while its size changes: its requests wait, none fails.

use crate::block::BlockBackend;
use crate::co;
use crate::config::{Config, ConfigError, ExportConfig};
use crate::nbd::access::TlsMode;
use crate::nbd::export::{Export, ExportOptions, ExportTable};
use crate::nbd::server::Server;
use crate::nbd::tls::TlsServerConfig;
use crate::util::systemd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tracing::{error, info, warn};

/// How long a reload waits for the requests of an image that were begun before it (ours: new ones wait that long, too).
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How often it is looked whether an export's last client has left (ours).
const LEAVING_STEP: Duration = Duration::from_millis(100);
/// How long a reload waits for exports without clients to be closed before it opens others: an image may have got another
/// name, and is locked (ours; a client that was just being answered may still hold one).
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Reads the configuration again, with the flags of the command line over it.
pub type Load = Box<dyn Fn() -> Result<Config, ConfigError> + Send + Sync>;
/// Opens an export's image; why not, and what to do, in one line. Blocks.
pub type Open = Box<dyn Fn(&Config, &ExportConfig) -> Result<Arc<Export>, String> + Send + Sync>;
/// What clients are told of an export, and who may use it.
pub type Options = Box<dyn Fn(&Config, &ExportConfig) -> ExportOptions + Send + Sync>;

/// What the program above lends to a reload.
pub struct Hooks {
    /// See [`Load`].
    pub load: Load,
    /// See [`Open`].
    pub open: Open,
    /// See [`Options`].
    pub options: Options,
}

/// What a reload needs. Any thread; shared by `Arc`.
pub struct Reloader {
    hooks: Hooks,
    state: Mutex<State>,
    /// Something is to be done, or the server stops.
    called: Condvar,
    stopping: AtomicBool,
}

struct State {
    /// What holds.
    config: Config,
    running: bool,
    /// A reload was asked for while one ran.
    again: bool,
    worker: Option<JoinHandle<()>>,
    /// Exports that are in no table any more, until their last client has left. Nobody else may hold one of these for
    /// longer than such a client lives: then it is known when the last has.
    leaving: Vec<Arc<Export>>,
}

/// Lets reloads go on after one that panicked.
struct Fallen<'r>(&'r Reloader);

impl Drop for Fallen<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().running = false;
            error!("SIGHUP: a reload panicked; what it had not come to stays as it was");
            tell("READY=1");
        }
    }
}

/// How many of what a reload has done.
#[derive(Default)]
struct Tally {
    added: usize,
    removed: usize,
    changed: usize,
    grown: usize,
    failed: usize,
}

impl Reloader {
    /// Makes one for a server that was started with `config`.
    #[must_use]
    pub fn new(config: Config, hooks: Hooks) -> Arc<Reloader> {
        let state = State { config, running: false, again: false, worker: None, leaving: Vec::new() };
        Arc::new(Reloader {
            hooks,
            state: Mutex::new(state),
            called: Condvar::new(),
            stopping: AtomicBool::new(false),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a reload, or lets the one that runs be followed by another. Never waits.
    pub fn request(self: &Arc<Self>, server: &Arc<Server>) {
        let mut state = self.lock();
        if self.is_stopping() {
            info!("SIGHUP: the server stops, nothing is reloaded");
            return;
        }
        if state.running {
            state.again = true;
            self.called.notify_all();
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

    /// Whether a reload is at work, or exports are leaving.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.lock().running
    }

    /// Lets a running reload end early, and waits for it; later ones do not begin. Returns the exports that are still leaving:
    /// their images are to be closed once their clients are gone. Blocks, for as long as an image takes to open or to grow.
    pub fn stop(&self) -> Vec<Arc<Export>> {
        let worker = {
            let mut state = self.lock();
            self.stopping.store(true, Ordering::SeqCst);
            self.called.notify_all();
            state.worker.take()
        };
        if worker.is_some_and(|w| w.join().is_err()) {
            error!("a reload had panicked");
        }
        std::mem::take(&mut self.lock().leaving)
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    fn run(&self, server: &Server) {
        let _fallen = Fallen(self);
        loop {
            if !self.is_stopping() {
                self.once(server);
            }
            loop {
                self.close_idle();
                let mut state = self.lock();
                if self.is_stopping() || (!state.again && state.leaving.is_empty()) {
                    state.running = false;
                    return;
                }
                if std::mem::take(&mut state.again) {
                    break;
                }
                let woken = self.called.wait_timeout(state, LEAVING_STEP);
                drop(woken.unwrap_or_else(PoisonError::into_inner));
            }
        }
    }

    /// Closes the images of those leaving exports that have no client any more.
    fn close_idle(&self) {
        // With one reference, ours, nobody can make another.
        let mut idle = Vec::new();
        self.lock().leaving.retain(|export| {
            let unused = Arc::strong_count(export) == 1;
            if unused {
                idle.push(Arc::clone(export));
            }
            !unused
        });
        for export in idle {
            // One that was made again over the same image has gone, and the image stays in use.
            if Arc::strong_count(export.backend()) > 1 {
                continue;
            }
            if close(export.backend()) {
                info!(
                    export = export.name(),
                    "the export that was removed has no client any more; its image is closed"
                );
            }
        }
    }

    fn once(&self, server: &Server) {
        tell(&format!("RELOADING=1\nMONOTONIC_USEC={}", monotonic_us()));
        match (self.hooks.load)() {
            Err(e) => error!(error = %e, "SIGHUP: nothing is reloaded, the configuration cannot be used"),
            Ok(config) => self.apply(server, config),
        }
        tell("READY=1");
    }

    fn apply(&self, server: &Server, new: Config) {
        let mut config = self.lock().config.clone();
        for what in waits_for_restart(&config, &new) {
            warn!(what, "SIGHUP: changed, and waits for a restart");
        }
        let mut tally = Tally::default();
        self.take_up_tls(server, &mut config, &new, &mut tally);
        self.take_up_exports(server, &mut config, &new, &mut tally);
        self.take_up_sizes(server, &mut config, &new, &mut tally);
        let exports = config.exports.len();
        self.lock().config = config;
        let Tally { added, removed, changed, grown, failed } = tally;
        info!(exports, added, removed, changed, grown, failed, "SIGHUP: reloaded");
    }

    fn take_up_tls(&self, server: &Server, config: &mut Config, new: &Config, tally: &mut Tally) {
        if config.tls.mode() != new.tls.mode() || new.tls.mode() == TlsMode::Off {
            return;
        }
        match TlsServerConfig::load(&new.tls.files) {
            Ok(credentials) => {
                credentials.notes().iter().for_each(|note| warn!(note, "TLS"));
                if server.replace_tls(credentials) {
                    config.tls = new.tls.clone();
                    info!("TLS credentials were read again");
                }
            }
            Err(e) => {
                tally.failed += 1;
                error!(error = %e, "the TLS credentials cannot be used; those from before stay");
            }
        }
    }

    /// Brings the table of exports to what `new` says, as far as that works; `config` gets what holds then.
    fn take_up_exports(&self, server: &Server, config: &mut Config, new: &Config, tally: &mut Tally) {
        let table = server.exports().snapshot();
        let old = std::mem::take(&mut config.exports);
        let mut kept = Vec::new();
        for export in old {
            let Some(at) = table.find(&export.name).cloned() else { continue };
            match same_export(&export, &new.exports) {
                Some(now) => kept.push((export, now, at)),
                None => {
                    tally.removed += 1;
                    info!(
                        export = at.name(),
                        connected = at.connections(),
                        "the export is removed; its clients keep it"
                    );
                    self.lock().leaving.push(at);
                }
            }
        }
        for (export, now, at) in &mut kept {
            let taken = with_told(export, now);
            if taken == *export {
                continue;
            }
            match at.remade((self.hooks.options)(new, &taken)) {
                Ok(made) => {
                    tally.changed += 1;
                    info!(
                        export = made.name(),
                        "the export's keys have changed; they hold for clients that connect from now on"
                    );
                    let before = std::mem::replace(at, made);
                    self.lock().leaving.push(before);
                    *export = taken;
                }
                Err(e) => {
                    tally.failed += 1;
                    error!(export = export.name, error = %e, "the export's keys cannot be taken up");
                }
            }
        }
        drop(table);
        if tally.removed > 0 {
            self.replace(server, kept.iter().map(|(.., at)| Arc::clone(at)).collect());
            // An image may come back under another name below: it must not be locked by us.
            let deadline = Instant::now() + CLOSE_TIMEOUT;
            loop {
                self.close_idle();
                let waits = self.lock().leaving.iter().any(|export| export.connections() == 0);
                if !waits || self.is_stopping() || Instant::now() >= deadline {
                    break;
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        let (mut list, mut holds) = (Vec::new(), Vec::new());
        for now in &new.exports {
            if let Some(i) =
                kept.iter().position(|(export, ..)| same_export(now, std::slice::from_ref(export)).is_some())
            {
                let (export, _, at) = kept.swap_remove(i);
                list.push(at);
                holds.push(export);
                continue;
            }
            match (self.hooks.open)(new, now) {
                Ok(made) => {
                    tally.added += 1;
                    list.push(made);
                    holds.push(now.clone());
                }
                Err(why) => {
                    tally.failed += 1;
                    error!(error = why, "the export cannot be added; send SIGHUP again when it can");
                }
            }
        }
        self.replace(server, list);
        config.exports = holds;
    }

    /// Puts a table in place. Names are unique: the configuration was checked for that.
    fn replace(&self, server: &Server, list: Vec<Arc<Export>>) {
        match ExportTable::new(list, None) {
            Ok(table) => drop(server.exports().replace(table)),
            Err(e) => error!(error = %e, "the exports cannot be taken up; those from before stay"),
        }
    }

    fn take_up_sizes(&self, server: &Server, config: &mut Config, new: &Config, tally: &mut Tally) {
        let table = server.exports().snapshot();
        let mut asked: Vec<(&mut ExportConfig, u64)> = Vec::new();
        for export in &mut config.exports {
            export.grow_to = same_export(export, &new.exports).and_then(|now| now.grow_to);
            let at_least = export.grow_to.map_or(0, |size| size.0);
            asked.push((export, at_least));
        }
        // Those that are made larger first: another export may show the same file.
        asked.sort_by_key(|(_, at_least)| *at_least == 0);
        for (export, at_least) in asked {
            let Some(export) = table.find(&export.name) else { continue };
            match self.resize(export.backend(), at_least) {
                Ok((before, now)) if now > before => {
                    tally.grown += 1;
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
                    tally.failed += 1;
                    error!(
                        export = export.name(),
                        at_least,
                        error = why,
                        "the export's size cannot be taken up"
                    );
                }
            }
        }
    }

    /// Size before and now.
    fn resize(&self, backend: &Arc<BlockBackend>, at_least: u64) -> Result<(u64, u64), String> {
        let before = backend.len();
        let give_up = || self.is_stopping();
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

/// Flushes and closes an image that no request uses any more; whether that worked, which is logged if not. Blocks.
pub fn close(backend: &Arc<BlockBackend>) -> bool {
    let closing = Arc::clone(backend);
    let closed = co::run_to_end(move || {
        let flushed = closing.co_flush();
        closing.root().co_close().and(flushed).map_err(|e| e.to_string())
    });
    match closed.map_err(|e| e.to_string()).and_then(|r| r) {
        Ok(()) => true,
        Err(why) => {
            error!(node = backend.root().name(), error = why, "image could not be closed cleanly");
            false
        }
    }
}

/// The export of that name and image.
fn same_export<'a>(export: &ExportConfig, all: &'a [ExportConfig]) -> Option<&'a ExportConfig> {
    all.iter().find(|e| e.name == export.name && e.image == export.image)
}

/// The keys of `old` with those of `new` that need no other image: what clients are told, and who may be one.
fn with_told(old: &ExportConfig, new: &ExportConfig) -> ExportConfig {
    ExportConfig {
        description: new.description.clone(),
        tls: new.tls,
        allow: new.allow.clone(),
        allocation_depth: new.allocation_depth,
        max_connections: new.max_connections,
        ..old.clone()
    }
}

/// What differs and is not taken up, in words.
fn waits_for_restart(old: &Config, new: &Config) -> Vec<String> {
    let mut all = Vec::new();
    for (changed, what) in [
        (old.server != new.server, "[server]"),
        (old.limits != new.limits, "[limits]"),
        (old.tls.mode() != new.tls.mode(), "[tls] mode"),
        (old.log != new.log, "[log]"),
    ] {
        if changed {
            all.push(what.to_owned());
        }
    }
    for export in &old.exports {
        if let Some(now) = same_export(export, &new.exports)
            && (ExportConfig { grow_to: now.grow_to, ..with_told(export, now) }) != *now
        {
            all.push(format!("export \"{}\": keys that say how the image is opened", export.name));
        }
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
        check(one, &format!("{one}grow_to = '1G'\ndescription = 'd'\nallow = ['address:10.0.0.0/8']\n"), &[]);
        check(
            one,
            &format!("{one}cache = 'none'\n"),
            &["export \"a\": keys that say how the image is opened"],
        );
        check(
            one,
            &format!("[log]\nlevel = 'debug'\n[limits]\nidle_timeout = '1s'\n{one}"),
            &["[limits]", "[log]"],
        );
        check(one, "[[export]]\nname = 'a'\nimage = 'b'\n", &[]);
    }
}
