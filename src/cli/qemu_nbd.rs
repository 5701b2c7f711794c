//! `conbd qemu-nbd …`, and conbd under the name `qemu-nbd`: QEMU's command line, in front of our server.
//!
//! One table of options is the source for parsing, `--help` and the manual. The habits that scripts rely on are QEMU's:
//! defaults (0.0.0.0:10809, one client at a time, discards ignored), `--fork`, exit after the last client, messages that
//! begin with `qemu-nbd: `, exit codes. What needs qcow2 or the kernel's device says so.
//!
//! [`image_options`] is where options become an image: other formats plug in there.

use super::getopt::{self, Item, Opt};
use super::qemu_opts::{self, Image, Null, Object};
use super::{EXIT_FAILURE, EXIT_OK, qemu_list};
use crate::aio::engine::EngineChoice;
use crate::block::qcow2::SnapshotSel;
use crate::block::{
    self, BlockBackend, BlockNode, CacheMode, DetectZeroes, DetectZeroesNode, DiscardMode, Format, LockMode,
    NullNode, OpenError, OpenOptions, RawNode,
};
use crate::config::{self, check_filter};
use crate::daemon::{self, DaemonError, Service, Threads};
use crate::nbd::access::{AllowList, TlsMode};
use crate::nbd::client::{Address, Uri, UriTls};
use crate::nbd::export::{Export, ExportError, ExportOptions};
use crate::nbd::proto::{NBD_DEFAULT_PORT, NBD_MAX_STRING};
use crate::nbd::server::{EndWhen, ListenAddr, ServerConfig, ServerError, ServerTls, WhenFull};
use crate::nbd::tls::{TlsClientFiles, TlsFiles, TlsServerConfig};
use crate::telemetry;
use crate::util::{sys, systemd};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

/// The version whose behaviour this follows: scripts look at it.
const QEMU_VERSION: &str = "10.0.2";
/// Longest payload that is advertised, in bytes (QEMU's; more is accepted).
const MAX_BLOCK: u32 = 32 << 20;
/// QEMU's SOMAXCONN, for the queue of clients that wait.
const SOMAXCONN: u32 = 4096;
/// How long a stop may take (ours): callers start the next server on the same socket at once.
const GRACE: Duration = Duration::from_secs(2);
/// Sectors of QEMU: a file's size is shown in whole ones, and a probed image is read and written in them.
const SECTOR: u32 = 512;

const fn opt(short: char, long: &'static str, value: Option<&'static str>, help: &'static str) -> Opt {
    Opt { short: if short == ' ' { None } else { Some(short) }, long, value, help }
}

/// Every option, in the order of `--help`.
pub(super) const OPTIONS: &[Opt] = &[
    opt('h', "help", None, "print this text and exit"),
    opt('V', "version", None, "print the version and exit"),
    opt('p', "port", Some("PORT"), "TCP port, by number or name [default: 10809]"),
    opt('b', "bind", Some("IFACE"), "address to listen on [default: 0.0.0.0, every IPv4 address]"),
    opt('k', "socket", Some("PATH"), "listen on a unix socket instead; the path must be absolute"),
    opt('e', "shared", Some("NUM"), "clients at once; more wait; 0 means no limit [default: 1]"),
    opt('t', "persistent", None, "keep running when the last client has left"),
    opt('v', "verbose", None, "with --fork, keep stderr open (CONBD_LOG=info logs more)"),
    opt('x', "export-name", Some("NAME"), "name of the export [default: the empty name]"),
    opt('D', "description", Some("TEXT"), "text that clients see beside the name"),
    opt(
        ' ',
        "handshake-limit",
        Some("N"),
        "seconds that a client has to negotiate; 0 means no limit [default: 10]",
    ),
    opt('o', "offset", Some("OFFSET"), "first byte of the image that is exported"),
    opt('A', "allocation-depth", None, "offer the metadata context qemu:allocation-depth"),
    opt(
        'B',
        "bitmap",
        Some("NAME"),
        "offer a dirty bitmap of the image as qemu:dirty-bitmap:NAME; may repeat",
    ),
    opt('L', "list", None, "list the exports of a server instead of serving"),
    opt(' ', "object", Some("type,id=ID,..."), "define TLS credentials or an access list; may repeat"),
    opt(' ', "tls-creds", Some("ID"), "require TLS, with the credentials of that object"),
    opt(' ', "tls-authz", Some("ID"), "admit only the certificates that this object allows"),
    opt(' ', "tls-hostname", Some("HOSTNAME"), "with --list: name that the server's certificate must have"),
    opt('T', "trace", Some("[enable=]PATTERN,..."), "log in every detail"),
    opt(' ', "fork", None, "return when clients can connect; the server goes on in the background"),
    opt(' ', "pid-file", Some("PATH"), "write the server's process id to this file when clients can connect"),
    opt(' ', "selinux-label", Some("LABEL"), "SELinux label of the unix socket"),
    opt('c', "connect", Some("DEV"), "not offered: use nbd-client(8) to attach an export to /dev/nbdN"),
    opt('d', "disconnect", None, "not offered: use nbd-client -d"),
    opt(
        'f',
        "format",
        Some("FORMAT"),
        "format of the image (raw); without it, the first bytes are looked at",
    ),
    opt('r', "read-only", None, "refuse writes"),
    opt('s', "snapshot", None, "keep writes in a temporary overlay"),
    opt('l', "load-snapshot", Some("SNAPSHOT"), "export an internal snapshot, read-only (qcow2)"),
    opt('n', "nocache", None, "the same as --cache=none"),
    opt(
        ' ',
        "cache",
        Some("MODE"),
        "none, writeback, writethrough, directsync or unsafe [default: writeback]",
    ),
    opt(' ', "aio", Some("MODE"), "native, io_uring or threads [default: the best that works]"),
    opt(' ', "discard", Some("MODE"), "ignore (off) or unmap (on) [default: ignore]"),
    opt(
        ' ',
        "detect-zeroes",
        Some("MODE"),
        "turn written zeroes into holes: off, on or unmap [default: off]",
    ),
    opt(
        ' ',
        "image-opts",
        None,
        "FILE is key=value options, such as driver=raw,file.filename=disk,offset=1M",
    ),
];

/// First options of the sections of `--help`.
const SECTIONS: [(&str, &str); 5] = [
    ("port", "Connection"),
    ("offset", "Parts of the image"),
    ("list", "General"),
    ("connect", "The kernel's client"),
    ("format", "Image"),
];

/// How the program ends before it serves.
#[derive(Debug, PartialEq, Eq)]
enum Stop {
    /// With a text on stdout and code 0.
    Print(String),
    /// With `qemu-nbd: TEXT` on stderr and code 1.
    Error(String),
    /// With exactly this on stderr and code 1.
    Verbatim(String),
}

impl From<String> for Stop {
    fn from(text: String) -> Stop {
        Stop::Error(text)
    }
}

fn error<T>(text: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Error(text.into()))
}

/// The command line, read.
#[derive(Debug, Default)]
struct Options {
    bind: Option<String>,
    port: Option<String>,
    socket: Option<PathBuf>,
    shared: Option<u32>,
    persistent: bool,
    verbose: bool,
    trace: bool,
    export_name: Option<String>,
    description: Option<String>,
    handshake_limit: Option<u32>,
    offset: u64,
    allocation_depth: bool,
    bitmaps: Vec<String>,
    list: bool,
    objects: BTreeMap<String, Object>,
    tls_creds: Option<String>,
    tls_authz: Option<String>,
    tls_hostname: Option<String>,
    fork: bool,
    pid_file: Option<PathBuf>,
    selinux_label: Option<String>,
    connect: bool,
    disconnect: bool,
    format: Option<String>,
    read_only: bool,
    snapshot: bool,
    load_snapshot: Option<String>,
    cache: Option<CacheMode>,
    aio: Option<String>,
    discard: Option<DiscardMode>,
    detect_zeroes: DetectZeroes,
    image_opts: bool,
    files: Vec<OsString>,
    /// How the program was called.
    program: String,
}

/// Runs `qemu-nbd ARGS`; `program` is how it was called.
pub(super) fn main(program: &OsString, args: &[OsString]) -> ExitCode {
    let stop = match read(&program.to_string_lossy(), args).and_then(run) {
        Ok(code) => return ExitCode::from(code),
        Err(stop) => stop,
    };
    // Nobody is left to tell that stdout or stderr cannot be written.
    match stop {
        Stop::Print(text) => {
            let _ = io::stdout().write_all(text.as_bytes());
            return ExitCode::from(EXIT_OK);
        }
        Stop::Error(text) => drop(writeln!(io::stderr(), "qemu-nbd: {text}")),
        Stop::Verbatim(text) => drop(io::stderr().write_all(text.as_bytes())),
    }
    ExitCode::from(EXIT_FAILURE)
}

fn help(program: &str) -> String {
    let mut out = format!(
        "Usage: {program} [OPTIONS] FILE\n  or:  {program} -L [OPTIONS]\nServes a disk image over NBD, as QEMU's \
         program of that name does.\n\n"
    );
    for opt in OPTIONS {
        if let Some((_, title)) = SECTIONS.iter().find(|(first, _)| *first == opt.long) {
            let _ = writeln!(out, "\n{title}:");
        }
        let short = opt.short.map_or("    ".to_owned(), |c| format!("-{c}, "));
        let value = opt.value.map_or(String::new(), |value| format!("={value}"));
        let left = format!("  {short}--{}{value}", opt.long);
        // Long names have their text on a line of its own.
        let _ = match left.len() {
            0..28 => writeln!(out, "{left:28}{}", opt.help),
            _ => writeln!(out, "{left}\n{:28}{}", "", opt.help),
        };
    }
    out.push_str("\nThis is conbd; see conbd(1) for what it does beyond qemu-nbd.\n");
    out
}

fn text(name: &str, value: Option<OsString>) -> Result<String, Stop> {
    value
        .unwrap_or_default()
        .into_string()
        .map_err(|_| Stop::Error(format!("the value of --{name} is not UTF-8")))
}

fn once<T>(slot: &mut Option<T>, value: T, names: &str) -> Result<(), Stop> {
    if slot.replace(value).is_some() {
        return error(format!("{names} can only be specified once"));
    }
    Ok(())
}

fn read(program: &str, args: &[OsString]) -> Result<Options, Stop> {
    let mut o = Options { program: program.to_owned(), ..Options::default() };
    let (items, wrong) = getopt::parse(OPTIONS, args);
    for item in items {
        let (name, value) = match item {
            Item::Operand(file) => {
                o.files.push(file);
                continue;
            }
            Item::Option(name, value) => (name, value),
        };
        option(&mut o, program, name, value)?;
    }
    if let Some(wrong) = wrong {
        return Err(Stop::Verbatim(format!(
            "{program}: {wrong}\nqemu-nbd: Try `{program} --help' for more information.\n"
        )));
    }
    Ok(o)
}

/// Takes one option, in the order of the command line.
fn option(o: &mut Options, program: &str, name: &'static str, value: Option<OsString>) -> Result<(), Stop> {
    let string = |value| text(name, value);
    let small = |value, what: &str| -> Result<u32, Stop> {
        let value = text(name, value)?;
        let number = qemu_opts::number(&value).and_then(|n| i32::try_from(n).ok());
        match number {
            Some(n) => Ok(n.unsigned_abs()),
            None => error(format!("Invalid {what} '{value}'")),
        }
    };
    match name {
        "help" => return Err(Stop::Print(help(program))),
        "version" => {
            return Err(Stop::Print(format!(
                "qemu-nbd {QEMU_VERSION} (conbd {})\n",
                env!("CARGO_PKG_VERSION")
            )));
        }
        "port" => o.port = Some(string(value)?),
        "bind" => o.bind = Some(string(value)?),
        "socket" => {
            let path = PathBuf::from(value.unwrap_or_default());
            if !path.is_absolute() {
                return error("socket path must be absolute");
            }
            o.socket = Some(path);
        }
        "shared" => o.shared = Some(small(value, "shared device number")?),
        "persistent" => o.persistent = true,
        "verbose" => o.verbose = true,
        "export-name" | "description" => {
            let value = string(value)?;
            if value.len() > NBD_MAX_STRING {
                let what = if name == "description" { "description" } else { "name" };
                return error(format!("export {what} '{value}' too long"));
            }
            match name {
                "description" => o.description = Some(value),
                _ => o.export_name = Some(value),
            }
        }
        "handshake-limit" => o.handshake_limit = Some(small(value, "handshake limit")?),
        "offset" => {
            let value = string(value)?;
            match qemu_opts::number(&value) {
                Some(offset) => o.offset = offset,
                None => return error(format!("Invalid offset '{value}'")),
            }
        }
        "allocation-depth" => o.allocation_depth = true,
        "bitmap" => o.bitmaps.push(string(value)?),
        "list" => o.list = true,
        "object" => {
            let (id, object) = qemu_opts::object(&string(value)?)?;
            if o.objects.contains_key(&id) {
                return error(format!(
                    "attempt to add duplicate property '{id}' to object (type 'container')"
                ));
            }
            o.objects.insert(id, object);
        }
        "tls-creds" => o.tls_creds = Some(string(value)?),
        "tls-authz" => o.tls_authz = Some(string(value)?),
        "tls-hostname" => o.tls_hostname = Some(string(value)?),
        "trace" => {
            if matches!(string(value)?.as_str(), "help" | "?") {
                return Err(Stop::Print(
                    "trace events are log records here: CONBD_LOG=conbd::nbd=trace selects them\n".to_owned(),
                ));
            }
            o.trace = true;
        }
        "fork" => o.fork = true,
        "pid-file" => o.pid_file = Some(value.unwrap_or_default().into()),
        "selinux-label" => o.selinux_label = Some(string(value)?),
        "connect" => o.connect = true,
        "disconnect" => o.disconnect = true,
        "format" => o.format = Some(string(value)?),
        "read-only" => o.read_only = true,
        "snapshot" => o.snapshot = true,
        "load-snapshot" => {
            o.load_snapshot = Some(string(value)?);
            o.read_only = true;
        }
        "nocache" => once(&mut o.cache, CacheMode::None, "-n and --cache")?,
        "cache" => {
            let value = string(value)?;
            let mode = value.parse().map_err(|_| Stop::Error(format!("Invalid cache mode `{value}'")))?;
            once(&mut o.cache, mode, "-n and --cache")?;
        }
        "aio" => {
            let value = string(value)?;
            if !["native", "io_uring", "threads"].contains(&value.as_str()) {
                return error(format!("Invalid aio mode '{value}'"));
            }
            once(&mut o.aio, value, "--aio")?;
        }
        "discard" => {
            let value = string(value)?;
            let mode =
                discard(&value).ok_or_else(|| Stop::Error(format!("Invalid discard mode `{value}'")))?;
            once(&mut o.discard, mode, "--discard")?;
        }
        "detect-zeroes" => {
            let value = string(value)?;
            o.detect_zeroes = detect_zeroes(&value).ok_or_else(|| {
                Stop::Error(format!("Failed to parse detect_zeroes mode: invalid parameter value: {value}"))
            })?;
            if o.detect_zeroes == DetectZeroes::Unmap && o.discard != Some(DiscardMode::Unmap) {
                return error(
                    "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
                );
            }
        }
        "image-opts" => o.image_opts = true,
        other => unreachable!("--{other} is in the table and not handled"),
    }
    Ok(())
}

fn discard(word: &str) -> Option<DiscardMode> {
    match word {
        "ignore" | "off" => Some(DiscardMode::Ignore),
        "unmap" | "on" => Some(DiscardMode::Unmap),
        _ => None,
    }
}

fn detect_zeroes(word: &str) -> Option<DetectZeroes> {
    DetectZeroes::ALL.iter().find(|(name, _)| *name == word).map(|(_, mode)| *mode)
}

/// An error of the system without Rust's "(os error N)": scripts look for C's words.
pub(super) fn system_text(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error ") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

// -------------------------------------------------------------------------------------------------------- what to do

fn run(o: Options) -> Result<u8, Stop> {
    let per_device = o.export_name.is_some()
        || o.description.is_some()
        || o.offset != 0
        || o.connect
        || o.disconnect
        || o.format.is_some()
        || o.load_snapshot.is_some()
        || o.snapshot
        || !o.bitmaps.is_empty()
        || o.allocation_depth
        || o.aio.is_some()
        || o.discard.is_some()
        || o.cache.is_some();
    if o.list {
        if !o.files.is_empty() {
            return error("List mode is incompatible with a file name");
        }
        if per_device {
            return error("List mode is incompatible with per-device settings");
        }
        if o.fork {
            return error("List mode is incompatible with forking");
        }
    } else if o.files.len() != 1 {
        return Err(Stop::Verbatim(format!(
            "qemu-nbd: Invalid number of arguments\nTry `{}' for more information.\n",
            o.program.clone() + " --help"
        )));
    }
    let passed = passed_sockets(&o)?;
    check_tls(&o)?;
    if o.selinux_label.is_some() && o.socket.is_none() {
        return error("--selinux-label is not permitted without --socket");
    }
    if o.list {
        return run_list(&o);
    }
    if o.connect {
        return error(
            "-c is not offered: serve with -k PATH or -p PORT, and attach that to the device with nbd-client(8)",
        );
    }
    if o.disconnect {
        return error("-d is not offered: use nbd-client -d DEVICE");
    }
    let image = image(&o)?;
    let (open, detect) = image_options(&o, &image)?;
    let listen = if passed.is_empty() { addresses(&o)? } else { Vec::new() };
    let background = match o.fork {
        true => match Background::fork(o.verbose)? {
            Side::Parent(code) => return Ok(code),
            Side::Child(background) => Some(background),
        },
        false => None,
    };
    serve(&o, open, image.null, detect, listen, passed, background)
}

fn passed_sockets(o: &Options) -> Result<Vec<systemd::Passed>, Stop> {
    let count = systemd::passed_count()?;
    if count == 0 {
        return Ok(Vec::new());
    }
    let wrong = [
        (o.connect, "NBD device"),
        (o.socket.is_some(), "Unix socket"),
        (o.bind.is_some(), "The interface"),
        (o.port.is_some(), "TCP port number"),
        (o.selinux_label.is_some(), "The SELinux label"),
    ];
    if let Some((_, what)) = wrong.iter().find(|(given, _)| *given) {
        return error(format!("{what} can't be set when using socket activation"));
    }
    if o.list {
        return error("List mode is incompatible with socket activation");
    }
    if count > 1 {
        return error("qemu-nbd does not support socket activation with LISTEN_FDS > 1");
    }
    Ok(systemd::take_sockets()?)
}

/// Whether the TLS options go together.
fn check_tls(o: &Options) -> Result<(), Stop> {
    let Some(id) = &o.tls_creds else {
        if o.tls_authz.is_some() {
            return error("--tls-authz is not permitted without --tls-creds");
        }
        if o.tls_hostname.is_some() {
            return error("--tls-hostname is not permitted without --tls-creds");
        }
        return Ok(());
    };
    if o.tls_authz.is_some() && o.list {
        return error("TLS authorization is incompatible with export list");
    }
    if o.tls_hostname.is_some() && !o.list {
        return error("TLS hostname is only supported with export list");
    }
    let server = match o.objects.get(id) {
        Some(Object::X509 { server, .. } | Object::Psk { server, .. }) => *server,
        Some(_) => {
            return error(format!("Failed to get TLS creds: Object with id '{id}' is not TLS credentials"));
        }
        None => return error(format!("Failed to get TLS creds: No TLS credentials with id '{id}'")),
    };
    if server == o.list {
        let (want, have) = if o.list { ("client", "server") } else { ("server", "client") };
        return error(format!(
            "Failed to get TLS creds: Expecting TLS credentials with a {want} endpoint, and not a {have} one"
        ));
    }
    Ok(())
}

fn run_list(o: &Options) -> Result<u8, Stop> {
    let files = match o.tls_creds.as_ref().and_then(|id| o.objects.get(id)) {
        None => None,
        Some(Object::X509 { dir, verify_peer, .. }) => {
            Some(TlsClientFiles { dir: Some(dir.clone()), verify: *verify_peer, ..TlsClientFiles::default() })
        }
        Some(Object::Psk { dir, username, .. }) => Some(TlsClientFiles {
            psk: Some(dir.join("keys.psk")),
            // QEMU's default for a client that names no user.
            user: Some(username.clone().unwrap_or_else(|| "qemu".to_owned())),
            ..TlsClientFiles::default()
        }),
        Some(_) => unreachable!("checked when the options were read"),
    };
    let hostname = o.tls_hostname.clone();
    let tls = files.map(|files| UriTls { files, hostname });
    let address = match &o.socket {
        Some(path) => Address::Unix(path.clone()),
        None => {
            let host = o.bind.clone().unwrap_or_else(|| "0.0.0.0".to_owned());
            Address::Tcp { host, port: port(o.port.as_deref(), "0.0.0.0")? }
        }
    };
    Err(Stop::Print(qemu_list::list(Uri { address, export: String::new(), tls })?))
}

/// The FILE operand, understood.
fn image(o: &Options) -> Result<Image, Stop> {
    let file = &o.files[0];
    let shown = file.display();
    let opened = |why: String| Stop::Error(format!("Failed to blk_new_open '{shown}': {why}"));
    if o.image_opts {
        if o.format.is_some() {
            return error("--image-opts and -f are mutually exclusive");
        }
        let text = file.to_str().ok_or_else(|| opened("it is not UTF-8".to_owned()))?;
        return qemu_opts::image(qemu_opts::key_values(text, "file")?).map_err(opened);
    }
    let mut image = match file.to_str() {
        Some(text) if text.starts_with("json:") => {
            qemu_opts::json(&text["json:".len()..]).and_then(qemu_opts::image).map_err(opened)?
        }
        Some(text) if let Some(null) = qemu_opts::null_by_name(text) => null,
        Some(text) if is_url(text) => {
            return Err(opened(
                "only files and block devices of this host are served; a name with a colon is written ./NAME"
                    .to_owned(),
            ));
        }
        text => {
            let path = text.and_then(|text| text.strip_prefix("file:")).map_or(file.into(), PathBuf::from);
            Image { filename: path, lock: true, ..Image::default() }
        }
    };
    if o.format.is_some() {
        image.format.clone_from(&o.format);
    }
    Ok(image)
}

/// Whether a file name is for another protocol of QEMU's than `file:`: letters and a colon, before any slash.
fn is_url(text: &str) -> bool {
    text.split_once(':').is_some_and(|(scheme, _)| {
        !scheme.is_empty()
            && scheme != "file"
            && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
    })
}

/// From options to an image that can be opened. Other formats plug in here, and `-s` and `-l` with them.
fn image_options(o: &Options, image: &Image) -> Result<(OpenOptions, DetectZeroes), Stop> {
    let shown = o.files[0].display();
    let opened = |why: String| error(format!("Failed to blk_new_open '{shown}': {why}"));
    let format = match image.format.as_deref() {
        None => Format::Auto,
        Some("raw" | "file" | "host_device") => Format::Raw,
        Some("qcow2") => Format::Qcow2,
        Some(format) if qemu_opts::is_foreign(format) => {
            return opened(format!("the driver '{format}' is not offered"));
        }
        Some(format) => return opened(format!("Unknown driver '{format}'")),
    };
    let snapshot = match o.load_snapshot.as_deref() {
        None => None,
        Some(text) if text.starts_with("snapshot.") => {
            let mut settings = qemu_opts::key_values(text, "snapshot.name")?;
            match (settings.remove("snapshot.id"), settings.remove("snapshot.name")) {
                (Some(id), None) => Some(SnapshotSel::Id(id)),
                (None, Some(name)) => Some(SnapshotSel::Name(name)),
                _ => {
                    return error(format!(
                        "Failed in parsing snapshot param `{text}': give its id or its name"
                    ));
                }
            }
        }
        Some(text) => Some(SnapshotSel::IdOrName(text.to_owned())),
    };
    if image.null.is_some() {
        if format == Format::Qcow2 {
            return opened("Image is not in qcow2 format".to_owned());
        }
        if o.snapshot || snapshot.is_some() {
            return opened(
                "a null disk has no snapshots, and forgets what is written to it anyway".to_owned(),
            );
        }
    }
    let mode = o.cache.unwrap_or_default();
    let direct = image.direct.unwrap_or(matches!(mode, CacheMode::None | CacheMode::Directsync));
    let durable = matches!(mode, CacheMode::Writethrough | CacheMode::Directsync);
    let no_flush = image.no_flush.unwrap_or(mode == CacheMode::Unsafe);
    let cache = match (direct, durable, no_flush) {
        (true, true, _) => CacheMode::Directsync,
        (true, false, _) => CacheMode::None,
        (false, true, _) => CacheMode::Writethrough,
        (false, false, true) => CacheMode::Unsafe,
        (false, false, false) => CacheMode::Writeback,
    };
    if o.aio.as_deref() == Some("native") && !direct {
        return opened(
            "aio=native was specified, but it requires cache.direct=on, which was not specified.".to_owned(),
        );
    }
    let discard = match image.discard.as_deref() {
        Some(word) => match discard(word) {
            Some(mode) => mode,
            None => return opened("Invalid discard option".to_owned()),
        },
        None => o.discard.unwrap_or(DiscardMode::Ignore),
    };
    let detect = match image.detect_zeroes.as_deref() {
        Some(word) => match detect_zeroes(word) {
            Some(mode) => mode,
            None => return opened(format!("Parameter 'detect-zeroes' does not accept value '{word}'")),
        },
        None => o.detect_zeroes,
    };
    let mut offset = image.offset;
    let mut size = image.size;
    if o.offset != 0 {
        // A window of the window.
        offset =
            offset.checked_add(o.offset).ok_or_else(|| Stop::Error("the offset is too large".to_owned()))?;
        size = match size {
            Some(size) => match size.checked_sub(o.offset) {
                Some(left) => Some(left),
                None => return error("Specified offset is larger than the image"),
            },
            None => None,
        };
    }
    let open = OpenOptions {
        format,
        read_only: o.read_only || image.read_only,
        cache,
        discard,
        // QEMU shares raw images with other writers.
        lock: match (image.lock, format) {
            (false, _) => LockMode::Off,
            (true, Format::Raw) => LockMode::Shared,
            (true, _) => LockMode::On,
        },
        snapshot,
        bitmaps: o.bitmaps.clone(),
        offset,
        size,
        whole_sectors: true,
        temporary: o.snapshot,
        ..OpenOptions::new(&image.filename)
    };
    Ok((open, detect))
}

/// A port by number, or by its name in /etc/services.
fn port(port: Option<&str>, host: &str) -> Result<u16, Stop> {
    let Some(text) = port else { return Ok(NBD_DEFAULT_PORT) };
    if let Ok(number) = text.parse() {
        return Ok(number);
    }
    let services = std::fs::read_to_string("/etc/services").unwrap_or_default();
    let found = services.lines().find_map(|line| {
        let line = line.split('#').next().unwrap_or_default();
        let mut words = line.split_whitespace();
        let (name, number) = (words.next()?, words.next()?);
        let number = number.strip_suffix("/tcp")?;
        (name == text || words.any(|alias| alias == text)).then(|| number.parse().ok()).flatten()
    });
    match found {
        Some(number) => Ok(number),
        None => error(format!(
            "address resolution failed for {host}:{text}: Servname not supported for ai_socktype"
        )),
    }
}

/// Where to listen.
fn addresses(o: &Options) -> Result<Vec<ListenAddr>, Stop> {
    if let Some(path) = &o.socket {
        if path.as_os_str().len() > config::SOCKET_PATH_MAX {
            return error(format!(
                "UNIX socket path '{}' is too long\nPath must be less than {} bytes",
                path.display(),
                config::SOCKET_PATH_MAX + 1
            ));
        }
        return Ok(vec![ListenAddr::Unix(path.clone())]);
    }
    let host = o.bind.as_deref().unwrap_or("0.0.0.0");
    let port = port(o.port.as_deref(), host)?;
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let found: Vec<SocketAddr> = match bare {
        "" => vec![SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port)],
        bare => (bare, port)
            .to_socket_addrs()
            .map_err(|e| {
                Stop::Error(format!("address resolution failed for {host}:{port}: {}", system_text(&e)))
            })?
            .collect(),
    };
    // Of several addresses of a name, those that this machine does not have are left out: ::1 without IPv6.
    let usable = |address: &SocketAddr| {
        let tried = TcpListener::bind(SocketAddr::new(address.ip(), 0));
        !tried.is_err_and(|e| matches!(e.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT)))
    };
    let mut listen: Vec<SocketAddr> = found.iter().copied().filter(usable).collect();
    if listen.is_empty() {
        listen = found;
    }
    Ok(listen.into_iter().map(ListenAddr::Tcp).collect())
}

// ------------------------------------------------------------------------------------------------------- background

/// The server in the background, while its parent still waits.
struct Background {
    /// What stderr becomes when clients can connect.
    stderr: OwnedFd,
}

enum Side {
    /// With the exit code.
    Parent(u8),
    Child(Background),
}

impl Background {
    /// Forks. The parent prints what the child writes to stderr until the child is ready or gone: no text, code 0; text,
    /// code 1. Before any thread exists.
    fn fork(keep_stderr: bool) -> Result<Side, Stop> {
        let failed =
            |what: &'static str| move |e: io::Error| Stop::Error(format!("{what}: {}", system_text(&e)));
        let pipe = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
        let (read, write) = pipe.map_err(|e| failed("Error setting up communication pipe")(e.into()))?;
        match sys::fork().map_err(failed("Failed to fork"))? {
            sys::Fork::Parent(child) => {
                drop(write);
                Ok(Side::Parent(relay(read, child)))
            }
            sys::Fork::Child => {
                drop(read);
                let null = std::fs::File::options().read(true).write(true).open("/dev/null");
                let null = null.map_err(failed("Failed to daemonize"))?;
                let stderr = match keep_stderr {
                    true => sys::dup_std(2).map_err(failed("Failed to daemonize"))?,
                    false => null.try_clone().map_err(failed("Failed to daemonize"))?.into(),
                };
                sys::replace_std(2, &write).map_err(failed("Failed to daemonize"))?;
                rustix::process::setsid().map_err(|e| failed("Failed to daemonize")(e.into()))?;
                for number in 0..2 {
                    sys::replace_std(number, &null).map_err(failed("Failed to daemonize"))?;
                }
                Ok(Side::Child(Background { stderr }))
            }
        }
    }

    /// Lets the parent go.
    fn ready(self) -> io::Result<()> {
        sys::replace_std(2, &self.stderr)
    }
}

fn relay(read: OwnedFd, child: i32) -> u8 {
    let mut read = std::fs::File::from(read);
    let mut text = [0; 1024];
    let mut code = EXIT_OK;
    loop {
        match read.read(&mut text) {
            Ok(0) => break,
            Ok(n) => {
                code = EXIT_FAILURE;
                // There is nobody else to tell.
                let _ = io::stderr().write_all(&text[..n]);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return EXIT_FAILURE,
        }
    }
    // A child that died without a word (a signal) has not become ready.
    let pid = rustix::process::Pid::from_raw(child);
    let ended = rustix::process::waitpid(pid, rustix::process::WaitOptions::NOHANG).ok().flatten();
    if ended.is_some_and(|(_, status)| status.exit_status() != Some(0)) { EXIT_FAILURE } else { code }
}

// ---------------------------------------------------------------------------------------------------------- serving

fn serve(
    o: &Options,
    open: OpenOptions,
    null: Option<Null>,
    detect: DetectZeroes,
    listen: Vec<ListenAddr>,
    passed: Vec<systemd::Passed>,
    background: Option<Background>,
) -> Result<u8, Stop> {
    let report = |e: DaemonError| Stop::Error(qemu_words(&e, o));
    let tls = server_tls(o)?;
    let signal_fd = daemon::take_signals(true).map_err(report)?;
    // As much as there is; a server with less still serves.
    let _ = sys::raise_nofile_limit();
    let level = match telemetry::env_filter() {
        Some(env) => {
            check_filter(&env)
                .map_err(|why| format!("environment variable {}: {why}", telemetry::ENV_FILTER))?;
            env
        }
        None if o.trace => "trace".to_owned(),
        // Like the real one, also with -v: text at the start would make --fork fail, and suites compare what comes later.
        None => "error,conbd::nbd::session=warn".to_owned(),
    };
    let log = Arc::new(telemetry::init_plain("qemu-nbd", &level)?);
    let shared = o.shared.unwrap_or(1);
    let backlog = if o.persistent || shared == 0 { SOMAXCONN } else { shared.min(SOMAXCONN) };
    let mut server = ServerConfig {
        listen,
        backlog: i32::try_from(backlog).unwrap_or(i32::MAX),
        take_over_sockets: true,
        when_full: WhenFull::Wait,
        end_when: if o.persistent { EndWhen::Told } else { EndWhen::LastClientLeaves },
        max_connections: if shared == 0 { config::CONNECTIONS_MAX } else { shared as usize },
        handshake_timeout: Duration::from_secs(o.handshake_limit.unwrap_or(10).into()),
        tls,
        ..ServerConfig::default()
    };
    daemon::add_passed(&mut server, passed).map_err(report)?;
    if o.persistent {
        server.end_when = EndWhen::Told;
    }
    let defaults = config::ServerConfig::default();
    let aio = match o.aio.as_deref() {
        Some("io_uring") => EngineChoice::IoUring,
        Some("threads") => EngineChoice::Threads,
        _ => EngineChoice::Auto,
    };
    if let Some(label) = &o.selinux_label {
        label_sockets(label).map_err(|e| {
            format!("Cannot set SELinux socket create context to {label}: {}", system_text(&e))
        })?;
    }
    let mut pid_file = None;
    let (kept, flushed) = (&mut pid_file, Arc::clone(&log));
    let service = Service {
        threads: Threads {
            iothreads: defaults.iothread_count(),
            aio,
            pool_threads: defaults.pool_threads,
            poll_max: defaults.poll_max,
        },
        exports: Box::new(move || Ok(vec![make_export(o, &open, null.as_ref(), detect)?])),
        server,
        grace: GRACE,
        on_hup: daemon::OnHup::Stop,
        command: None,
        ready: Box::new(move |_| {
            if o.selinux_label.is_some() {
                // The process makes no more sockets with a label; an error would have come above.
                let _ = label_sockets("");
            }
            if let Some(path) = &o.pid_file {
                *kept = Some(write_pid_file(path)?);
            }
            let in_the_way =
                |what: &'static str| move |source: io::Error| DaemonError::System { doing: what, source };
            std::env::set_current_dir("/").map_err(in_the_way("chdir to the root directory"))?;
            if let Err(error) = systemd::notify("READY=1") {
                tracing::info!(%error, "the supervisor cannot be told that the server is ready");
            }
            if let Some(background) = background {
                flushed.flush();
                background.ready().map_err(in_the_way("let the parent process go"))?;
            }
            Ok(())
        }),
    };
    let outcome = service.run(signal_fd, &log);
    log.flush();
    // The file stays, as QEMU's does: a server that was started meanwhile may have written it anew.
    drop(pid_file);
    outcome.map(|_| EXIT_OK).map_err(report)
}

/// Sets the label that new sockets of this thread get; "" is the system's own.
fn label_sockets(label: &str) -> io::Result<()> {
    std::fs::write("/proc/thread-self/attr/sockcreate", label).map_err(|e| match e.raw_os_error() {
        Some(libc::ENOENT) => io::Error::other("SELinux is not enabled on this system"),
        _ => e,
    })
}

/// Writes the pid file, locked while we live, as QEMU does.
fn write_pid_file(path: &Path) -> Result<std::fs::File, DaemonError> {
    let said = |text: String| DaemonError::Said(text);
    let shown = path.display();
    let mut file = std::fs::File::options()
        .write(true)
        .read(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(|e| said(format!("Could not create '{shown}': {}", system_text(&e))))?;
    sys::ofd_lock(&file, sys::OfdLock::Write, 0, 0)
        .map_err(|e| said(format!("Cannot lock pid file '{shown}': {}", system_text(&e))))?;
    let written = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
    written.map_err(|e| said(format!("Failed to write pid file '{shown}': {}", system_text(&e))))?;
    Ok(file)
}

fn server_tls(o: &Options) -> Result<Option<ServerTls>, Stop> {
    let Some(id) = &o.tls_creds else { return Ok(None) };
    let files = match o.objects.get(id) {
        Some(Object::X509 { dir, verify_peer, .. }) => TlsFiles::qemu_x509_dir(dir, *verify_peer),
        Some(Object::Psk { dir, .. }) => TlsFiles::qemu_psk_dir(dir),
        _ => unreachable!("checked when the options were read"),
    };
    let config = TlsServerConfig::load(&files).map_err(|e| super::with_sources(&e))?;
    let authz = match &o.tls_authz {
        None => None,
        Some(id) => Some(allow_list(o, id).map_err(|why| format!("--tls-authz={id}: {why}"))?),
    };
    Ok(Some(ServerTls { mode: TlsMode::Required, config, authz }))
}

fn allow_list(o: &Options, id: &str) -> Result<AllowList, String> {
    let from_file;
    let identities = match o.objects.get(id) {
        Some(Object::AuthzSimple(identity)) => return AllowList::of_dn(identity),
        Some(Object::AuthzList(identities)) => identities,
        Some(Object::AuthzListFile(path)) => {
            let text = std::fs::read_to_string(path)
                .map_err(|e| format!("cannot read {}: {}", path.display(), system_text(&e)))?;
            from_file = qemu_opts::authz_rules(&mut qemu_opts::json(&text)?)?;
            &from_file
        }
        Some(_) => return Err("that object is no access list".to_owned()),
        // QEMU looks the object up when a client comes, and refuses it: nobody is let in.
        None => return AllowList::parse::<&str>(&[]),
    };
    let entries: Vec<String> = identities.iter().map(|identity| format!("dn:{identity}")).collect();
    AllowList::parse(&entries)
}

/// The node for a null disk, or the window of one that was asked for.
fn null_node(null: &Null, open: &OpenOptions) -> block::Result<Arc<dyn BlockNode>> {
    let node = NullNode::new("null", null.size).with_latency(null.latency_ns).with_read_only(open.read_only);
    if open.offset == 0 && open.size.is_none() {
        return Ok(Arc::new(node));
    }
    Ok(Arc::new(RawNode::new("null", Arc::new(node), open.offset, open.size)?))
}

fn make_export(
    o: &Options,
    open: &OpenOptions,
    null: Option<&Null>,
    detect: DetectZeroes,
) -> Result<Arc<Export>, DaemonError> {
    let name = o.export_name.clone().unwrap_or_default();
    let root = match null {
        None => block::open(open),
        Some(null) => null_node(null, open).map_err(|_| OpenError::Window {
            path: open.filename.clone(),
            offset: open.offset,
            size: open.size,
            len: null.size,
        }),
    };
    let root = root.map_err(|source| DaemonError::Image { export: name.clone(), source })?;
    let probed = open.format == Format::Auto && !root.is_format();
    if probed && !open.read_only {
        // QEMU's words, on stderr whatever the log level: its own tests compare them.
        eprintln!(
            "WARNING: Image format was not specified for '{}' and probing guessed raw.\n         Automatically detecting the \
             format is dangerous for raw images, write operations on block 0 will be restricted.\n         Specify the 'raw' \
             format explicitly to remove the restrictions.",
            o.files[0].display()
        );
    }
    let backend = BlockBackend::new(DetectZeroesNode::wrap(root, detect));
    let min = backend.limits().request_alignment.max(if probed { SECTOR } else { 1 });
    let options = ExportOptions {
        name,
        description: o.description.clone().unwrap_or_default(),
        read_only: open.read_only,
        no_multi_conn: o.shared.unwrap_or(1) == 1,
        min_block: Some(min),
        preferred_block: Some(min.max(4096)),
        max_block: Some(MAX_BLOCK),
        hide_rotational: true,
        sizes_unasked: true,
        allocation_depth: o.allocation_depth,
        bitmaps: o.bitmaps.clone(),
        ..ExportOptions::default()
    };
    Ok(Export::new(options, backend)?)
}

/// An error in QEMU's words where it has some: scripts look for them.
fn qemu_words(error: &DaemonError, o: &Options) -> String {
    match error {
        DaemonError::Server(ServerError::Listen { addr, source }) => {
            let why = system_text(source);
            match addr.strip_prefix("unix:") {
                Some(path) => format!("Failed to bind socket to {path}: {why}"),
                None if source.kind() == io::ErrorKind::AddrInUse => {
                    format!("Failed to find an available port: {why}")
                }
                None => format!("Failed to bind socket: {why}"),
            }
        }
        DaemonError::Image { source, .. } => {
            format!("Failed to blk_new_open '{}': {}", o.files[0].display(), open_words(source))
        }
        DaemonError::Export(ExportError::NoSuchBitmap { bitmap, .. }) => {
            format!("Bitmap '{bitmap}' is not found")
        }
        other => super::with_sources(other),
    }
}

fn open_words(error: &OpenError) -> String {
    let could_not = |path: &Path, why: &str| format!("Could not open '{}': {why}", path.display());
    match error {
        OpenError::NotFound { path } => could_not(path, "No such file or directory"),
        OpenError::Permission { path, .. } => could_not(path, "Permission denied"),
        OpenError::ReadOnlyMedium { path } => could_not(path, "Read-only file system"),
        OpenError::Directory { path } => could_not(path, "Is a directory"),
        OpenError::Locked { path, byte, holder, .. } => {
            // From 200 on are permissions that somebody does not share, from 100 on those that he uses.
            let (shared, bit) = if *byte >= 200 { ("", byte - 200) } else { ("shared ", byte - 100) };
            let permission = match bit {
                0 => "consistent read",
                1 => "write",
                3 => "resize",
                _ => "write unchanged",
            };
            let holder = holder.as_ref().map(|h| format!(" (held by {h})")).unwrap_or_default();
            format!(
                "Failed to get {shared}\"{permission}\" lock{holder}\nIs another process using the image [{}]?",
                path.display()
            )
        }
        other => super::with_sources(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_args(args: &[&str]) -> Result<Options, Stop> {
        let args: Vec<OsString> = args.iter().map(OsString::from).collect();
        read("qemu-nbd", &args)
    }

    #[test]
    fn wrong_values_are_refused_in_qemus_words() {
        let check = |args: &[&str], want: &str| match read_args(args) {
            Err(Stop::Error(text)) => assert_eq!(text, want, "{args:?}"),
            other => panic!("{args:?}: {other:?}"),
        };
        check(&["--cache=foo", "d"], "Invalid cache mode `foo'");
        check(&["-n", "--cache=none", "d"], "-n and --cache can only be specified once");
        check(&["--aio=foo", "d"], "Invalid aio mode 'foo'");
        check(&["--aio=threads", "--aio=threads"], "--aio can only be specified once");
        check(&["--discard=foo", "d"], "Invalid discard mode `foo'");
        check(&["--detect-zeroes=foo"], "Failed to parse detect_zeroes mode: invalid parameter value: foo");
        check(
            &["--detect-zeroes=unmap"],
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
        );
        check(&["-o", "1x"], "Invalid offset '1x'");
        check(&["-e", "-1"], "Invalid shared device number '-1'");
        check(&["-ex"], "Invalid shared device number 'x'");
        check(&["-k", "rel.sock"], "socket path must be absolute");
        check(&["--handshake-limit=x"], "Invalid handshake limit 'x'");
        let long = "x".repeat(4097);
        check(&["-x", &long], &format!("export name '{long}' too long"));
    }

    #[test]
    fn help_and_version_win_over_what_follows() {
        let Err(Stop::Print(text)) = read_args(&["--help", "--bogus"]) else { panic!("no help") };
        for opt in OPTIONS {
            assert!(text.contains(&format!("--{}", opt.long)), "--{}", opt.long);
        }
        let Err(Stop::Print(text)) = read_args(&["-tV"]) else { panic!("no version") };
        assert!(text.starts_with("qemu-nbd 10.0.2 "), "{text}");
        let Err(Stop::Verbatim(text)) = read_args(&["--bogus", "-h"]) else { panic!("no error") };
        assert_eq!(
            text,
            "qemu-nbd: unrecognized option '--bogus'\nqemu-nbd: Try `qemu-nbd --help' for more information.\n"
        );
    }

    #[test]
    fn the_defaults_are_qemus() {
        let o = read_args(&["disk"]).unwrap();
        let image = image(&o).unwrap();
        let (open, detect) = image_options(&o, &image).unwrap();
        assert_eq!(
            (open.format, open.discard, open.cache),
            (Format::Auto, DiscardMode::Ignore, CacheMode::Writeback)
        );
        assert_eq!((open.lock, open.read_only, detect), (LockMode::On, false, DetectZeroes::Off));
        assert_eq!(addresses(&o).unwrap(), [ListenAddr::Tcp("0.0.0.0:10809".parse().unwrap())]);
    }

    #[test]
    fn cache_modes_and_image_options_combine() {
        let check = |args: &[&str], want: CacheMode| {
            let o = read_args(args).unwrap();
            assert_eq!(image_options(&o, &image(&o).unwrap()).unwrap().0.cache, want, "{args:?}");
        };
        check(&["-n", "d"], CacheMode::None);
        check(&["--cache=directsync", "d"], CacheMode::Directsync);
        check(&["--cache=unsafe", "d"], CacheMode::Unsafe);
        check(&["--image-opts", "driver=raw,file.filename=d,cache.direct=on"], CacheMode::None);
        check(
            &["--cache=none", r#"json:{"driver":"raw","file":{"filename":"d","cache":{"direct":false}}}"#],
            CacheMode::Writeback,
        );
        let o = read_args(&["--aio=native", "d"]).unwrap();
        assert!(
            matches!(image_options(&o, &image(&o).unwrap()), Err(Stop::Error(text)) if text.contains("aio=native"))
        );
        let o = read_args(&["--aio=native", "-n", "d"]).unwrap();
        assert!(image_options(&o, &image(&o).unwrap()).is_ok());
    }

    #[test]
    fn windows_add_up() {
        let o = read_args(&["-o", "512", "--image-opts", "driver=raw,file.filename=d,offset=1k,size=2k"])
            .unwrap();
        let (open, _) = image_options(&o, &image(&o).unwrap()).unwrap();
        assert_eq!((open.offset, open.size), (1536, Some(1536)));
    }

    #[test]
    fn other_protocols_are_not_files() {
        for file in ["nbd://host/x", "json:{", "ssh://a", "rbd:pool/x"] {
            assert!(image(&read_args(&[file]).unwrap()).is_err(), "{file}");
        }
        for (file, path) in [("file:a", "a"), ("./a:b", "./a:b"), ("/x:y", "/x:y"), ("disk", "disk")] {
            assert_eq!(image(&read_args(&[file]).unwrap()).unwrap().filename, PathBuf::from(path));
        }
    }
}
