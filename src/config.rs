//! Configuration: a TOML file and the flags of `serve`, merged into one checked [`Config`].
//!
//! Pure but for reading the file: nothing is opened, bound or resolved here. What the file says is kept
//! with its place until it is checked, so that every error names file, line and column, and says what to
//! do. Flags win over the file; what neither says has the default that `config/conbd.toml` documents
//! (a test compares the two).

use crate::aio::engine::EngineChoice;
use crate::nbd::access::{AllowList, TlsMode};
use crate::nbd::proto::NBD_MAX_STRING;
use crate::nbd::tls::TlsFiles;
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;
use toml::Spanned;

/// Where we listen when nobody says (loopback; the port is IANA's for NBD).
pub const DEFAULT_LISTEN: &str = "127.0.0.1:10809";
/// Most IOThreads that are started by default (ours: beyond it, memory bandwidth is the limit).
pub const DEFAULT_IOTHREADS_MAX: usize = 8;
/// Most IOThreads that may be asked for (ours).
pub const IOTHREADS_MAX: usize = 256;
/// Most connections that may be allowed (ours).
pub const CONNECTIONS_MAX: usize = 1_000_000;
/// Longest unix socket path that the kernel takes, in bytes (unix(7): `sun_path` less its NUL).
pub const SOCKET_PATH_MAX: usize = 107;

/// File I/O engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Aio {
    /// io_uring where it works, else threads
    #[default]
    Auto,
    /// io_uring, or refuse to start
    IoUring,
    /// a bounded thread pool per IOThread
    Threads,
}

impl From<Aio> for EngineChoice {
    fn from(aio: Aio) -> EngineChoice {
        match aio {
            Aio::Auto => EngineChoice::Auto,
            Aio::IoUring => EngineChoice::IoUring,
            Aio::Threads => EngineChoice::Threads,
        }
    }
}

/// Format of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Format {
    /// look at the first bytes: raw, unless they are another format's
    #[default]
    Auto,
    /// the file's bytes are the disk's bytes
    Raw,
    /// QEMU copy-on-write, version 2 or 3, with its backing chain
    Qcow2,
}

/// How writes are cached (QEMU's names).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Cache {
    /// through the page cache; durable when the client flushes
    #[default]
    Writeback,
    /// past the page cache (O_DIRECT); durable when the client flushes
    None,
    /// through the page cache; every write is durable before it is acknowledged
    Writethrough,
    /// past the page cache (O_DIRECT); every write is durable before it is acknowledged
    Directsync,
    /// through the page cache; flushes are ignored, a crash of the host may lose everything
    Unsafe,
}

/// What happens to trim requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Discard {
    /// they give the space back to the file system or device
    #[default]
    Unmap,
    /// they are acknowledged and dropped
    Ignore,
}

/// How the image file is locked against other programs (QEMU-compatible locks).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Lock {
    /// nobody else may write it while we serve it; if we write it, nobody else may open it at all
    #[default]
    On,
    /// others may write it too (a cluster file system, or you know what you do)
    Shared,
    /// take no locks
    Off,
}

/// When TLS must be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Tls {
    /// required as soon as there is a certificate or a PSK file, else off
    #[default]
    Auto,
    /// not offered
    Off,
    /// every client must use it
    Required,
    /// clients may use it; each export says whether it needs it
    Selective,
}

/// Whether an export needs TLS where TLS is a choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum ExportTls {
    /// clients without TLS get it too
    #[default]
    Optional,
    /// only clients with TLS get it
    Required,
}

/// Form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum LogFormat {
    /// a line of text per event
    #[default]
    Text,
    /// a JSON object per line
    Json,
}

/// A number of bytes, written `4096`, `"64k"`, `"10G"` or `"10 GiB"` (powers of 1024).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Size(pub u64);

impl std::str::FromStr for Size {
    type Err = String;
    fn from_str(text: &str) -> Result<Size, String> {
        let bad = || {
            format!(
                "\"{text}\" is not a size; write a number of bytes, or one with k, M, G, T (powers of 1024), such as 64M"
            )
        };
        let text_trimmed = text.trim();
        let digits = text_trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(text_trimmed.len());
        let (number, unit) = text_trimmed.split_at(digits);
        let number: u64 = number.parse().map_err(|_| bad())?;
        let shift = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            "p" | "pb" | "pib" => 50,
            _ => return Err(bad()),
        };
        number.checked_mul(1 << shift).map(Size).ok_or_else(|| format!("size \"{text}\" is over 16 EiB"))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["", " KiB", " MiB", " GiB", " TiB", " PiB"];
        let mut value = self.0;
        let mut unit = 0;
        while value != 0 && value.is_multiple_of(1024) && unit + 1 < UNITS.len() {
            value /= 1024;
            unit += 1;
        }
        write!(f, "{value}{}", UNITS[unit])
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Size, D::Error> {
        struct SizeVisitor;
        impl Visitor<'_> for SizeVisitor {
            type Value = Size;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as 4096, \"64k\" or \"10G\"")
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Size, E> {
                Ok(Size(value))
            }
            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Size, E> {
                u64::try_from(value).map(Size).map_err(|_| E::custom("a size cannot be negative"))
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<Size, E> {
                value.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(SizeVisitor)
    }
}

/// A length of time, written `"10s"`, `"500ms"`, `"50us"` or `"2m"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

impl std::str::FromStr for Span {
    type Err = String;
    fn from_str(text: &str) -> Result<Span, String> {
        let bad = || {
            format!("\"{text}\" is not a length of time; write a number with us, ms, s, m or h, such as 10s")
        };
        let trimmed = text.trim();
        let digits = trimmed.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
        let (number, unit) = trimmed.split_at(digits);
        let number: u64 = number.parse().map_err(|_| bad())?;
        let seconds = |each: u64| number.checked_mul(each).map(Duration::from_secs).ok_or_else(bad);
        let duration = match unit.trim() {
            "us" => Duration::from_micros(number),
            "ms" => Duration::from_millis(number),
            "s" => Duration::from_secs(number),
            "m" => seconds(60)?,
            "h" => seconds(3600)?,
            _ => return Err(bad()),
        };
        if duration > Duration::from_secs(366 * 86400) {
            return Err(format!("\"{text}\" is over a year"));
        }
        Ok(Span(duration))
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Span, D::Error> {
        struct SpanVisitor;
        impl Visitor<'_> for SpanVisitor {
            type Value = Span;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a length of time in quotes, such as \"10s\" or \"500ms\"")
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<Span, E> {
                value.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(SpanVisitor)
    }
}

/// What is served, where and how: checked, complete.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Listeners, threads, shutdown.
    pub server: ServerConfig,
    /// What clients may take.
    pub limits: LimitsConfig,
    /// TLS.
    pub tls: TlsConfig,
    /// Logging.
    pub log: LogConfig,
    /// At least one, names unique.
    pub exports: Vec<ExportConfig>,
    /// What a run does besides serving.
    pub run: RunConfig,
    /// Remarks for the log: what was overridden and may surprise.
    pub notes: Vec<String>,
}

/// What a run does besides serving: flags only.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RunConfig {
    /// Serve the one client at stdin and stdout.
    pub stdio: bool,
    /// End when a client that had chosen an export leaves, and no connection is left.
    pub exit_after_last: bool,
    /// Where the process id is written when clients can connect.
    pub pid_file: Option<PathBuf>,
    /// Shell command that is run when clients can connect; its end is the daemon's.
    pub command: Option<String>,
}

/// `[server]`.
#[derive(Debug, Clone, PartialEq)]
pub struct ServerConfig {
    /// TCP listeners, `ADDRESS:PORT`, whose names are resolved when binding; and `vsock:[CID:]PORT`.
    pub listen: Vec<String>,
    /// Unix socket listeners.
    pub socket: Vec<PathBuf>,
    /// IOThreads; 0 means one per CPU, at most [`DEFAULT_IOTHREADS_MAX`].
    pub iothreads: usize,
    /// File I/O engine.
    pub aio: Aio,
    /// Most worker threads of each IOThread's pool.
    pub pool_threads: usize,
    /// Longest busy-poll window; zero switches polling off.
    pub poll_max: Duration,
    /// How long a stop may take before what is left is cut.
    pub shutdown_timeout: Duration,
    /// Idle time of a TCP connection before its peer is asked whether it is alive; zero: never.
    pub keepalive: Duration,
    /// How long sent data may stay unacknowledged before the connection is dropped; zero: the system's default.
    pub tcp_user_timeout: Duration,
}

impl ServerConfig {
    /// Whether the addresses to listen on are those that are taken when nobody names one.
    #[must_use]
    pub fn listens_by_default(&self) -> bool {
        let default = ServerConfig::default();
        self.listen == default.listen && self.socket == default.socket
    }

    /// The number of IOThreads to start, with the default resolved.
    #[must_use]
    pub fn iothread_count(&self) -> usize {
        match self.iothreads {
            0 => std::thread::available_parallelism().map_or(1, usize::from).min(DEFAULT_IOTHREADS_MAX),
            n => n,
        }
    }
}

impl Default for ServerConfig {
    fn default() -> ServerConfig {
        ServerConfig {
            listen: vec![DEFAULT_LISTEN.to_owned()],
            socket: Vec::new(),
            iothreads: 0,
            aio: Aio::Auto,
            pool_threads: 16,
            poll_max: Duration::from_micros(100),
            shutdown_timeout: Duration::from_secs(10),
            keepalive: Duration::from_secs(60),
            tcp_user_timeout: Duration::from_secs(600),
        }
    }
}

/// `[limits]`.
#[derive(Debug, Clone, PartialEq)]
pub struct LimitsConfig {
    /// Connections at once; further ones are closed at accept.
    pub max_connections: usize,
    /// Time from accept to the end of the negotiation; zero: no limit.
    pub handshake_timeout: Duration,
    /// A client without a request for this long is dropped; zero: never.
    pub idle_timeout: Duration,
    /// Connections in negotiation at once; beyond it the oldest is dropped.
    pub max_handshakes: usize,
    /// Requests of one connection being served at once.
    pub requests_per_connection: usize,
    /// Requests of all connections being served at once, beyond a small allowance that each connection has.
    pub requests_total: usize,
    /// Bytes of payload that one connection may hold in memory.
    pub bytes_per_connection: Size,
    /// Bytes of payload that all connections together may hold in memory, beyond that allowance.
    pub bytes_total: Size,
    /// A client that holds memory and moves nothing of it for this long, while others wait for it, is dropped.
    pub stall_timeout: Duration,
}

impl Default for LimitsConfig {
    fn default() -> LimitsConfig {
        LimitsConfig {
            max_connections: 4096,
            handshake_timeout: Duration::from_secs(10),
            idle_timeout: Duration::ZERO,
            max_handshakes: 256,
            requests_per_connection: 256,
            requests_total: 16_384,
            bytes_per_connection: Size(64 << 20),
            bytes_total: Size(1 << 30),
            stall_timeout: Duration::from_secs(30),
        }
    }
}

/// `[tls]`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TlsConfig {
    /// Never `Auto` with credentials, once checked: see [`TlsConfig::mode`].
    pub mode: Tls,
    /// Credentials.
    pub files: TlsFiles,
}

impl TlsConfig {
    /// Whether there is something to make TLS with.
    fn has_credentials(&self) -> bool {
        self.files.cert.is_some() || self.files.psk.is_some()
    }

    /// What holds in the end.
    #[must_use]
    pub fn mode(&self) -> TlsMode {
        match self.mode {
            Tls::Auto if self.has_credentials() => TlsMode::Required,
            Tls::Auto | Tls::Off => TlsMode::Off,
            Tls::Required => TlsMode::Required,
            Tls::Selective => TlsMode::Selective,
        }
    }

    /// What is missing or does not go together.
    fn check(&self) -> Result<(), String> {
        let files = &self.files;
        match (&files.cert, &files.key) {
            (Some(_), None) => return Err("a certificate needs its private key; set key too".to_owned()),
            (None, Some(_)) => return Err("a private key needs its certificate; set cert too".to_owned()),
            _ => {}
        }
        if matches!(self.mode, Tls::Required | Tls::Selective) && !self.has_credentials() {
            return Err("TLS needs cert and key, or psk, or both".to_owned());
        }
        if files.verify_client && files.ca.is_none() {
            return Err("verifying clients needs ca, the certificates of those who sign theirs".to_owned());
        }
        if files.crl.is_some() && files.ca.is_none() {
            return Err("crl needs ca: it revokes certificates of clients".to_owned());
        }
        Ok(())
    }
}

/// `[log]`.
#[derive(Debug, Clone, PartialEq)]
pub struct LogConfig {
    /// A level (error, warn, info, debug, trace, off) or a filter such as `info,conbd::nbd=debug`.
    pub level: String,
    /// Text or JSON.
    pub format: LogFormat,
}

impl Default for LogConfig {
    fn default() -> LogConfig {
        LogConfig { level: "info".to_owned(), format: LogFormat::Text }
    }
}

/// One `[[export]]`.
#[derive(Debug, Clone, PartialEq)]
pub struct ExportConfig {
    /// Name that clients ask for; "" is the default export.
    pub name: String,
    /// File or block device.
    pub image: PathBuf,
    /// Its format.
    pub format: Format,
    /// Refuse writes.
    pub read_only: bool,
    /// Caching of writes.
    pub cache: Cache,
    /// What trim does.
    pub discard: Discard,
    /// Locks against other programs.
    pub lock: Lock,
    /// Text shown to clients that ask.
    pub description: String,
    /// First byte of the image that is exported.
    pub offset: Size,
    /// Bytes that are exported; None means up to the image's end.
    pub size: Option<Size>,
    /// Whether it needs TLS, where TLS is a choice.
    pub tls: ExportTls,
    /// Who may use it; None means everybody.
    pub allow: Option<AllowList>,
    /// qcow2: id or name of an internal snapshot to serve instead of the disk.
    pub snapshot: Option<String>,
    /// qcow2: tell unrecorded formats of backing files by their first bytes.
    pub backing_probe: bool,
    /// qcow2: backing images may be exports of NBD servers.
    pub backing_nbd: bool,
    /// qcow2: memory for L2 tables; None means what covers the image, up to a bound.
    pub l2_cache: Option<Size>,
    /// Dirty bitmaps that are offered as metadata contexts.
    pub bitmaps: Vec<String>,
    /// Offer the metadata context `qemu:allocation-depth`.
    pub allocation_depth: bool,
    /// Connections at once; 0: no limit but the server's.
    pub max_connections: usize,
    /// The image is made at least this large, when it is opened and at a reload.
    pub grow_to: Option<Size>,
}

impl ExportConfig {
    /// An export of `image` with every default.
    #[must_use]
    pub fn new(name: &str, image: &Path) -> ExportConfig {
        ExportConfig {
            name: name.to_owned(),
            image: image.to_owned(),
            format: Format::default(),
            read_only: false,
            cache: Cache::default(),
            discard: Discard::default(),
            lock: Lock::default(),
            description: String::new(),
            offset: Size(0),
            size: None,
            tls: ExportTls::default(),
            allow: None,
            snapshot: None,
            backing_probe: false,
            backing_nbd: false,
            l2_cache: None,
            bitmaps: Vec::new(),
            allocation_depth: false,
            max_connections: 0,
            grow_to: None,
        }
    }

    /// Whether clients without TLS get it.
    #[must_use]
    pub fn in_the_clear(&self, mode: TlsMode) -> bool {
        match mode {
            TlsMode::Off => true,
            TlsMode::Required => false,
            TlsMode::Selective => self.tls == ExportTls::Optional,
        }
    }

    /// What does not go together with the server's TLS.
    fn check_tls(&self, mode: TlsMode) -> Result<(), String> {
        if self.tls == ExportTls::Required && mode == TlsMode::Off {
            return Err(
                "the export requires TLS, and the server has none; set cert and key, or psk, in [tls]"
                    .to_owned(),
            );
        }
        if self.in_the_clear(mode) && self.allow.as_ref().is_some_and(AllowList::needs_tls) {
            return Err("allow names nothing but TLS identities, and the export is offered without TLS; set tls = \"required\"".to_owned());
        }
        Ok(())
    }
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read configuration {path}: {source}; check the path given to --config")]
    Read {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The file says something that is wrong, at a place.
    #[error("{path}:{line}:{column}: {message}")]
    Invalid {
        /// The file.
        path: String,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// What is wrong, and what to do.
        message: String,
    },
    /// The flags are wrong, or do not go together.
    #[error("{0}")]
    Flags(String),
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table")]
struct FileTable {
    server: ServerTable,
    limits: LimitsTable,
    tls: Option<Spanned<TlsTable>>,
    log: LogTable,
    export: Vec<ExportTable>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table")]
struct ServerTable {
    listen: Option<Vec<Spanned<String>>>,
    socket: Option<Vec<Spanned<PathBuf>>>,
    iothreads: Option<Spanned<usize>>,
    aio: Option<Aio>,
    pool_threads: Option<Spanned<usize>>,
    poll_max: Option<Spanned<Span>>,
    shutdown_timeout: Option<Spanned<Span>>,
    keepalive: Option<Span>,
    tcp_user_timeout: Option<Span>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table")]
struct LimitsTable {
    max_connections: Option<Spanned<usize>>,
    handshake_timeout: Option<Span>,
    idle_timeout: Option<Span>,
    max_handshakes: Option<Spanned<usize>>,
    requests_per_connection: Option<Spanned<usize>>,
    requests_total: Option<Spanned<usize>>,
    bytes_per_connection: Option<Spanned<Size>>,
    bytes_total: Option<Spanned<Size>>,
    stall_timeout: Option<Spanned<Span>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table")]
struct TlsTable {
    mode: Option<Tls>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    ca: Option<PathBuf>,
    crl: Option<PathBuf>,
    verify_client: Option<bool>,
    psk: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table")]
struct LogTable {
    level: Option<Spanned<String>>,
    format: Option<LogFormat>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ExportTable {
    image: Spanned<PathBuf>,
    name: Option<Spanned<String>>,
    format: Option<Format>,
    read_only: Option<bool>,
    cache: Option<Cache>,
    discard: Option<Discard>,
    lock: Option<Lock>,
    description: Option<Spanned<String>>,
    offset: Option<Size>,
    size: Option<Spanned<Size>>,
    tls: Option<Spanned<ExportTls>>,
    allow: Option<Spanned<Vec<String>>>,
    snapshot: Option<String>,
    backing_probe: Option<bool>,
    backing_nbd: Option<bool>,
    l2_cache: Option<Size>,
    bitmaps: Option<Vec<String>>,
    allocation_depth: Option<bool>,
    max_connections: Option<Spanned<usize>>,
    grow_to: Option<Spanned<Size>>,
}

/// Flags of `conbd serve`.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ServeFlags {
    /// Image to serve: a file or a block device (instead of the exports of the configuration file)
    pub image: Option<PathBuf>,

    /// Configuration file (see conbd.toml(5)); flags win over it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Check the configuration, open every image read-only and without locks, and exit; nothing is served
    #[arg(long)]
    pub check: bool,

    /// Name of the export [default: the empty name]
    #[arg(long, value_name = "NAME", requires = "image")]
    pub export: Option<String>,

    /// Format of the image [default: auto]
    #[arg(long, short = 'f', value_enum, requires = "image")]
    pub format: Option<Format>,

    /// Refuse writes
    #[arg(long, short = 'r')]
    pub read_only: bool,

    /// Text shown to clients that ask what the export is
    #[arg(long, value_name = "TEXT", requires = "image")]
    pub description: Option<String>,

    /// First byte of the image that is exported, such as 1M
    #[arg(long, value_name = "SIZE", requires = "image")]
    pub offset: Option<Size>,

    /// How much of the image is exported, such as 10G [default: up to its end]
    #[arg(long, value_name = "SIZE", requires = "image")]
    pub size: Option<Size>,

    /// Make the image at least this large before it is served, such as 20G; it is never made smaller
    #[arg(long, value_name = "SIZE", requires = "image")]
    pub grow_to: Option<Size>,

    /// qcow2: serve this internal snapshot (its id or name), read-only
    #[arg(long, value_name = "SNAPSHOT", requires = "image")]
    pub snapshot: Option<String>,

    /// qcow2: tell the format of a backing file by its first bytes where the image does not record it
    #[arg(long)]
    pub allow_backing_probe: bool,

    /// qcow2: let images have us read their backing images from the NBD servers that they name
    #[arg(long)]
    pub allow_backing_nbd: bool,

    /// qcow2: memory for L2 tables, such as 32M [default: what covers the image, at most 256M]
    #[arg(long, value_name = "SIZE")]
    pub l2_cache: Option<Size>,

    /// qcow2: offer this dirty bitmap as qemu:dirty-bitmap:NAME; may repeat
    #[arg(long, value_name = "NAME", requires = "image")]
    pub bitmap: Vec<String>,

    /// Offer qemu:allocation-depth: which image of a backing chain holds what
    #[arg(long)]
    pub allocation_depth: bool,

    /// Listen on this TCP address, or on vsock:PORT; may repeat; port 0 takes a free one [default: 127.0.0.1:10809, unless --socket is given]
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: Vec<String>,

    /// Listen on this unix socket; may repeat
    #[arg(long, value_name = "PATH")]
    pub socket: Vec<PathBuf>,

    /// Admit to the image only clients that match: psk:USER, dn:CN=..., dns:NAME, address:10.0.0.0/8, uid:1000 (see
    /// conbd.toml(5)); may repeat
    #[arg(long, value_name = "WHO", requires = "image")]
    pub allow: Vec<String>,

    /// When clients must use TLS [default: required with --tls-cert or --tls-psk, else off]
    #[arg(long, value_enum, value_name = "MODE")]
    pub tls: Option<Tls>,

    /// The server's certificate and its chain, PEM
    #[arg(long, value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,

    /// The private key of the certificate, PEM
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,

    /// Require client certificates that these CAs have signed, PEM
    #[arg(long, value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,

    /// Revoked client certificates, PEM
    #[arg(long, value_name = "FILE")]
    pub tls_crl: Option<PathBuf>,

    /// Users and pre-shared keys, as psktool writes them
    #[arg(long, value_name = "FILE")]
    pub tls_psk: Option<PathBuf>,
    /// Serve one client, at stdin and stdout (a socket or two pipes), and end when it leaves: for inetd and socket units
    #[arg(long, conflicts_with_all = ["listen", "socket"])]
    pub stdio: bool,

    /// End when the last client leaves (connections that chose no export do not count)
    #[arg(long)]
    pub exit_after_last: bool,

    /// Write the process id to this file when clients can connect; it is removed at the end
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,

    /// Run this shell command when clients can connect, with the URI as $uri, and stop when it ends, with its exit code
    #[arg(long, value_name = "COMMAND", conflicts_with = "stdio")]
    pub run: Option<String>,

    /// Connections at once, to all exports [default: 4096]
    #[arg(long, value_name = "N")]
    pub max_connections: Option<usize>,

    /// Connections at once to each export; 0 means no limit [default: 0]
    #[arg(long, value_name = "N")]
    pub export_max_connections: Option<usize>,

    /// Time that a client has to negotiate, such as 10s; 0s means no limit [default: 10s]
    #[arg(long, value_name = "TIME")]
    pub handshake_timeout: Option<Span>,

    /// Drop clients that make no request for this long; 0s means never [default: 0s]
    #[arg(long, value_name = "TIME")]
    pub idle_timeout: Option<Span>,

    /// Threads that serve connections [default: one per CPU, at most 8]
    #[arg(long, value_name = "N")]
    pub iothreads: Option<usize>,

    /// How files are read and written [default: auto]
    #[arg(long, value_enum)]
    pub aio: Option<Aio>,

    /// How writes are cached [default: writeback]
    #[arg(long, value_enum)]
    pub cache: Option<Cache>,

    /// What trim requests do [default: unmap]
    #[arg(long, value_enum)]
    pub discard: Option<Discard>,

    /// Locks that keep other programs off the image [default: on]
    #[arg(long, value_enum)]
    pub lock: Option<Lock>,

    /// Form of the log on stderr [default: text]
    #[arg(long, value_enum)]
    pub log_format: Option<LogFormat>,

    /// error, warn, info, debug, trace, off, or a filter; CONBD_LOG wins over it [default: info]
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<String>,
}

/// A configuration file's text, for turning byte ranges into places.
struct Source<'a> {
    path: String,
    text: &'a str,
}

impl Source<'_> {
    fn error(&self, span: &Range<usize>, message: impl Into<String>) -> ConfigError {
        let before = self.text.get(..span.start.min(self.text.len())).unwrap_or(self.text);
        let line_start = before.rfind('\n').map_or(0, |i| i + 1);
        ConfigError::Invalid {
            path: self.path.clone(),
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
            message: message.into(),
        }
    }

    /// Takes an optional number that must lie in `range`.
    fn number(
        &self,
        key: &str,
        value: Option<Spanned<usize>>,
        default: usize,
        range: std::ops::RangeInclusive<usize>,
    ) -> Result<usize, ConfigError> {
        let Some(value) = value else { return Ok(default) };
        let n = *value.get_ref();
        if range.contains(&n) {
            return Ok(n);
        }
        let message = format!("{key} is {n}; it must be {} to {}", range.start(), range.end());
        Err(self.error(&value.span(), message))
    }

    /// Takes an optional length of time that must not be zero.
    fn nonzero_span(
        &self,
        key: &str,
        value: Option<Spanned<Span>>,
        default: Duration,
    ) -> Result<Duration, ConfigError> {
        let Some(value) = value else { return Ok(default) };
        if value.get_ref().0.is_zero() {
            return Err(self.error(&value.span(), format!("{key} must be longer than zero")));
        }
        Ok(value.get_ref().0)
    }
}

impl Config {
    /// Reads the file that the flags name, if any, and lays the flags over it.
    ///
    /// # Errors
    /// Everything that can be known to be wrong without opening an image or a socket.
    pub fn load(flags: &ServeFlags) -> Result<Config, ConfigError> {
        let mut config = match &flags.config {
            None => Config {
                server: ServerConfig::default(),
                limits: LimitsConfig::default(),
                tls: TlsConfig::default(),
                log: LogConfig::default(),
                exports: Vec::new(),
                run: RunConfig::default(),
                notes: Vec::new(),
            },
            Some(path) => {
                let shown = path.display().to_string();
                let text = std::fs::read_to_string(path)
                    .map_err(|source| ConfigError::Read { path: shown.clone(), source })?;
                let base = path.parent().unwrap_or(Path::new(""));
                Config::parse(&shown, base, &text)?
            }
        };
        config.apply(flags)?;
        Ok(config)
    }

    /// Parses and checks a configuration file's text. `path` is for messages; relative images and sockets
    /// are taken from `base`.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with the place.
    pub fn parse(path: &str, base: &Path, text: &str) -> Result<Config, ConfigError> {
        let source = Source { path: path.to_owned(), text };
        let table: FileTable = toml::from_str(text).map_err(|e| {
            let span = e.span().unwrap_or(0..0);
            source.error(&span, format!("{}; conbd.toml(5) lists every key", e.message().trim_end()))
        })?;
        let tls = check_tls(&source, base, table.tls)?;
        Ok(Config {
            server: check_server(&source, base, table.server)?,
            limits: check_limits(&source, table.limits)?,
            log: check_log(&source, table.log)?,
            exports: check_exports(&source, base, table.export)?,
            tls,
            run: RunConfig::default(),
            notes: Vec::new(),
        })
    }

    /// Lays the flags over the file.
    fn apply(&mut self, flags: &ServeFlags) -> Result<(), ConfigError> {
        let flag_error = |message: String| Err(ConfigError::Flags(message));
        if !flags.listen.is_empty() || !flags.socket.is_empty() {
            for listen in &flags.listen {
                if let Err(why) = check_listen(listen) {
                    return flag_error(format!("--listen {listen}: {why}"));
                }
            }
            for socket in &flags.socket {
                if let Err(why) = check_socket(socket) {
                    return flag_error(format!("--socket {}: {why}", socket.display()));
                }
            }
            self.server.listen.clone_from(&flags.listen);
            self.server.socket.clone_from(&flags.socket);
        }
        self.run = RunConfig {
            stdio: flags.stdio,
            exit_after_last: flags.exit_after_last,
            pid_file: flags.pid_file.clone(),
            command: flags.run.clone(),
        };
        if let Some(n) = flags.max_connections {
            if !(1..=CONNECTIONS_MAX).contains(&n) {
                return flag_error(format!("--max-connections {n}: it must be 1 to {CONNECTIONS_MAX}"));
            }
            self.limits.max_connections = n;
        }
        if let Some(timeout) = flags.handshake_timeout {
            self.limits.handshake_timeout = timeout.0;
        }
        if let Some(timeout) = flags.idle_timeout {
            self.limits.idle_timeout = timeout.0;
        }
        if let Some(n) = flags.iothreads {
            if n > IOTHREADS_MAX {
                return flag_error(format!(
                    "--iothreads {n}: it must be 1 to {IOTHREADS_MAX}, or 0 for the default"
                ));
            }
            self.server.iothreads = n;
        }
        if let Some(aio) = flags.aio {
            self.server.aio = aio;
        }
        if let Some(format) = flags.log_format {
            self.log.format = format;
        }
        if let Some(level) = &flags.log_level {
            if let Err(why) = check_filter(level) {
                return flag_error(format!("--log-level {level}: {why}"));
            }
            self.log.level.clone_from(level);
        }
        if let Some(image) = &flags.image {
            if !self.exports.is_empty() {
                self.notes.push(format!(
                    "an image was named on the command line: the {} exports of the configuration file are not served",
                    self.exports.len()
                ));
            }
            let mut export = ExportConfig::new(flags.export.as_deref().unwrap_or(""), image);
            export.format = flags.format.unwrap_or_default();
            export.description = flags.description.clone().unwrap_or_default();
            export.offset = flags.offset.unwrap_or(Size(0));
            export.size = flags.size;
            export.grow_to = flags.grow_to;
            if !flags.allow.is_empty() {
                match AllowList::parse(&flags.allow) {
                    Ok(list) => export.allow = Some(list),
                    Err(why) => return flag_error(format!("--allow {why}")),
                }
            }
            export.snapshot = flags.snapshot.clone();
            export.bitmaps.clone_from(&flags.bitmap);
            if let Err(why) = check_string(&export.name) {
                return flag_error(format!("--export: the name {why}"));
            }
            if let Err(why) = check_string(&export.description) {
                return flag_error(format!("--description: the text {why}"));
            }
            if flags.size == Some(Size(0)) {
                return flag_error(
                    "--size 0: nothing would be exported; leave it out to export all".to_owned(),
                );
            }
            self.exports = vec![export];
        }
        for export in &mut self.exports {
            export.read_only |= flags.read_only;
            export.cache = flags.cache.unwrap_or(export.cache);
            export.discard = flags.discard.unwrap_or(export.discard);
            export.lock = flags.lock.unwrap_or(export.lock);
            export.backing_probe |= flags.allow_backing_probe;
            export.backing_nbd |= flags.allow_backing_nbd;
            export.l2_cache = flags.l2_cache.or(export.l2_cache);
            export.allocation_depth |= flags.allocation_depth;
            export.max_connections = flags.export_max_connections.unwrap_or(export.max_connections);
        }
        for export in self.exports.iter().filter(|e| e.grow_to.is_some()) {
            if export.read_only || export.snapshot.is_some() {
                return flag_error(format!(
                    "export \"{}\": grow_to makes an image larger, and this one is served read-only; leave one of them out",
                    export.name
                ));
            }
        }
        self.apply_tls(flags)?;
        if self.exports.is_empty() {
            return flag_error(match &flags.config {
                None => "nothing to serve; name an image (conbd serve disk.raw) or a configuration (--config FILE)".to_owned(),
                Some(path) => format!(
                    "{}: nothing to serve; add an [[export]] section with name and image, or name an image on the command line",
                    path.display()
                ),
            });
        }
        Ok(())
    }
}

impl Config {
    /// Lays the TLS flags over the file, and checks what came of it.
    fn apply_tls(&mut self, flags: &ServeFlags) -> Result<(), ConfigError> {
        let files = &mut self.tls.files;
        let given = [
            (&flags.tls_cert, &mut files.cert),
            (&flags.tls_key, &mut files.key),
            (&flags.tls_ca, &mut files.ca),
            (&flags.tls_crl, &mut files.crl),
            (&flags.tls_psk, &mut files.psk),
        ];
        for (flag, file) in given {
            if flag.is_some() {
                file.clone_from(flag);
            }
        }
        files.verify_client |= flags.tls_ca.is_some();
        self.tls.mode = flags.tls.unwrap_or(self.tls.mode);
        self.tls.check().map_err(|why| ConfigError::Flags(format!("TLS: {why}")))?;
        let mode = self.tls.mode();
        for export in &self.exports {
            export
                .check_tls(mode)
                .map_err(|why| ConfigError::Flags(format!("export \"{}\": {why}", export.name)))?;
        }
        Ok(())
    }
}

fn check_tls(
    source: &Source<'_>,
    base: &Path,
    table: Option<Spanned<TlsTable>>,
) -> Result<TlsConfig, ConfigError> {
    let Some(table) = table else { return Ok(TlsConfig::default()) };
    let span = table.span();
    let table = table.into_inner();
    let path = |path: Option<PathBuf>| path.map(|p| base.join(p));
    let files = TlsFiles {
        verify_client: table.verify_client.unwrap_or(table.ca.is_some()),
        cert: path(table.cert),
        key: path(table.key),
        ca: path(table.ca),
        crl: path(table.crl),
        psk: path(table.psk),
    };
    let tls = TlsConfig { mode: table.mode.unwrap_or_default(), files };
    // Flags may still add what is missing; what contradicts itself is wrong whatever they say.
    let contradiction = match (&tls.files.cert, &tls.files.key) {
        (Some(_), Some(_)) | (None, None) => None,
        _ => tls.check().err(),
    };
    match contradiction {
        Some(why) => Err(source.error(&span, why)),
        None => Ok(tls),
    }
}

fn check_server(source: &Source<'_>, base: &Path, table: ServerTable) -> Result<ServerConfig, ConfigError> {
    let default = ServerConfig::default();
    let (listen, socket) = match (table.listen, table.socket) {
        (None, None) => (default.listen, default.socket),
        (listen, socket) => {
            let mut addresses = Vec::new();
            for each in listen.unwrap_or_default() {
                check_listen(each.get_ref())
                    .map_err(|why| source.error(&each.span(), format!("\"{}\": {why}", each.get_ref())))?;
                addresses.push(each.into_inner());
            }
            let mut paths = Vec::new();
            for each in socket.unwrap_or_default() {
                let span = each.span();
                let path = base.join(each.into_inner());
                check_socket(&path)
                    .map_err(|why| source.error(&span, format!("\"{}\": {why}", path.display())))?;
                paths.push(path);
            }
            if addresses.is_empty() && paths.is_empty() {
                (default.listen, default.socket)
            } else {
                (addresses, paths)
            }
        }
    };
    Ok(ServerConfig {
        listen,
        socket,
        iothreads: source.number("iothreads", table.iothreads, default.iothreads, 0..=IOTHREADS_MAX)?,
        aio: table.aio.unwrap_or(default.aio),
        pool_threads: source.number("pool_threads", table.pool_threads, default.pool_threads, 1..=1024)?,
        poll_max: table.poll_max.map_or(default.poll_max, |v| v.get_ref().0),
        shutdown_timeout: source.nonzero_span(
            "shutdown_timeout",
            table.shutdown_timeout,
            default.shutdown_timeout,
        )?,
        keepalive: table.keepalive.map_or(default.keepalive, |v| v.0),
        tcp_user_timeout: table.tcp_user_timeout.map_or(default.tcp_user_timeout, |v| v.0),
    })
}

fn check_limits(source: &Source<'_>, table: LimitsTable) -> Result<LimitsConfig, ConfigError> {
    let default = LimitsConfig::default();
    let least = u64::from(crate::nbd::proto::MAX_PAYLOAD);
    let bytes = |key: &str, value: Option<Spanned<Size>>, default: Size| match value {
        None => Ok(default),
        Some(value) if value.get_ref().0 < least => Err(source
            .error(&value.span(), format!("{key} must hold at least the largest request, {}", Size(least)))),
        Some(value) => Ok(*value.get_ref()),
    };
    let total_span = table.bytes_total.as_ref().map(Spanned::span);
    let limits = LimitsConfig {
        max_connections: source.number(
            "max_connections",
            table.max_connections,
            default.max_connections,
            1..=CONNECTIONS_MAX,
        )?,
        handshake_timeout: table.handshake_timeout.map_or(default.handshake_timeout, |v| v.0),
        idle_timeout: table.idle_timeout.map_or(default.idle_timeout, |v| v.0),
        max_handshakes: source.number(
            "max_handshakes",
            table.max_handshakes,
            default.max_handshakes,
            1..=1_000_000,
        )?,
        requests_per_connection: source.number(
            "requests_per_connection",
            table.requests_per_connection,
            default.requests_per_connection,
            1..=65_536,
        )?,
        requests_total: source.number(
            "requests_total",
            table.requests_total,
            default.requests_total,
            1..=1_000_000,
        )?,
        bytes_per_connection: bytes(
            "bytes_per_connection",
            table.bytes_per_connection,
            default.bytes_per_connection,
        )?,
        bytes_total: bytes("bytes_total", table.bytes_total, default.bytes_total)?,
        stall_timeout: source.nonzero_span("stall_timeout", table.stall_timeout, default.stall_timeout)?,
    };
    if limits.bytes_total < limits.bytes_per_connection {
        let message = format!(
            "bytes_total ({}) is less than bytes_per_connection ({}); raise the first or lower the second",
            limits.bytes_total, limits.bytes_per_connection
        );
        return Err(source.error(&total_span.unwrap_or(0..0), message));
    }
    Ok(limits)
}

fn check_log(source: &Source<'_>, table: LogTable) -> Result<LogConfig, ConfigError> {
    let default = LogConfig::default();
    let level = match table.level {
        None => default.level,
        Some(level) => {
            check_filter(level.get_ref()).map_err(|why| {
                source.error(&level.span(), format!("level \"{}\": {why}", level.get_ref()))
            })?;
            level.into_inner()
        }
    };
    Ok(LogConfig { level, format: table.format.unwrap_or(default.format) })
}

fn check_exports(
    source: &Source<'_>,
    base: &Path,
    tables: Vec<ExportTable>,
) -> Result<Vec<ExportConfig>, ConfigError> {
    let mut exports: Vec<ExportConfig> = Vec::new();
    for table in tables {
        let image_span = table.image.span();
        if table.image.get_ref().as_os_str().is_empty() {
            return Err(source.error(&image_span, "image is empty; name a file or a block device"));
        }
        let name_span = table.name.as_ref().map_or(image_span, Spanned::span);
        let mut export = ExportConfig::new(
            &table.name.map(Spanned::into_inner).unwrap_or_default(),
            &base.join(table.image.get_ref()),
        );
        check_string(&export.name).map_err(|why| source.error(&name_span, format!("the name {why}")))?;
        if exports.iter().any(|other| other.name == export.name) {
            let message = format!("a second export named \"{}\"; give each its own name", export.name);
            return Err(source.error(&name_span, message));
        }
        if let Some(description) = table.description {
            check_string(description.get_ref())
                .map_err(|why| source.error(&description.span(), format!("the description {why}")))?;
            export.description = description.into_inner();
        }
        if let Some(size) = table.size {
            if size.get_ref().0 == 0 {
                return Err(
                    source.error(&size.span(), "size is 0; leave it out to export up to the image's end")
                );
            }
            export.size = Some(*size.get_ref());
        }
        export.max_connections =
            source.number("max_connections", table.max_connections, 0, 0..=CONNECTIONS_MAX)?;
        export.format = table.format.unwrap_or_default();
        export.read_only = table.read_only.unwrap_or(false);
        export.cache = table.cache.unwrap_or_default();
        export.discard = table.discard.unwrap_or_default();
        export.lock = table.lock.unwrap_or_default();
        export.offset = table.offset.unwrap_or(Size(0));
        export.tls = table.tls.map(Spanned::into_inner).unwrap_or_default();
        if let Some(allow) = table.allow {
            let list = AllowList::parse(allow.get_ref());
            export.allow = Some(list.map_err(|why| source.error(&allow.span(), format!("allow: {why}")))?);
        }
        export.snapshot = table.snapshot;
        export.backing_probe = table.backing_probe.unwrap_or(false);
        export.backing_nbd = table.backing_nbd.unwrap_or(false);
        export.l2_cache = table.l2_cache;
        export.bitmaps = table.bitmaps.unwrap_or_default();
        export.allocation_depth = table.allocation_depth.unwrap_or(false);
        export.grow_to = table.grow_to.map(Spanned::into_inner);
        exports.push(export);
    }
    Ok(exports)
}

/// Checks a log level or filter: levels, and `target=level` pairs with commas between.
///
/// # Errors
/// What is wrong with it and what may be written.
pub fn check_filter(filter: &str) -> Result<(), String> {
    const HELP: &str =
        "write error, warn, info, debug, trace or off, or a filter such as info,conbd::nbd=debug";
    const LEVELS: [&str; 6] = ["error", "warn", "info", "debug", "trace", "off"];
    if filter.trim().is_empty() {
        return Err(format!("it is empty; {HELP}"));
    }
    for directive in filter.split(',') {
        // A bare word that is no level would be taken as the name of a target, and silence everything else.
        let level = directive.rsplit_once('=').map_or(directive, |(_, level)| level).trim();
        if !LEVELS.contains(&level.to_ascii_lowercase().as_str()) {
            return Err(format!("\"{level}\" is no log level; {HELP}"));
        }
    }
    Ok(())
}

/// Parses `vsock:PORT` and `vsock:CID:PORT`: context id (`u32::MAX`: all) and port. None: it is another kind of address.
///
/// # Errors
/// What is wrong with the numbers.
#[must_use]
pub fn parse_vsock(listen: &str) -> Option<Result<(u32, u32), String>> {
    let rest = listen.strip_prefix("vsock:")?;
    let (cid, port) = rest.rsplit_once(':').unwrap_or(("", rest));
    let number = |text: &str, what: &str| {
        let error =
            |_| format!("the vsock {what} \"{text}\" is no number; write vsock:PORT or vsock:CID:PORT");
        text.parse::<u32>().map_err(error)
    };
    let cid = if cid.is_empty() { Ok(u32::MAX) } else { number(cid, "context id") };
    Some(cid.and_then(|cid| Ok((cid, number(port, "port")?))))
}

/// Checks the form of `ADDRESS:PORT`; names are resolved later.
fn check_listen(listen: &str) -> Result<(), String> {
    const FORM: &str = "write ADDRESS:PORT, such as 127.0.0.1:10809, [::1]:10809 or 0.0.0.0:10809";
    if let Some(vsock) = parse_vsock(listen) {
        return vsock.map(drop);
    }
    if listen.parse::<std::net::SocketAddr>().is_ok() {
        return Ok(());
    }
    let Some((host, port)) = listen.rsplit_once(':') else {
        return Err(format!("the port is missing; {FORM}"));
    };
    if port.parse::<u16>().is_err() {
        return Err(format!("the port must be a number from 0 to 65535; {FORM}"));
    }
    if host.is_empty() || host == "*" {
        return Err(format!("the address is missing; {FORM} (0.0.0.0 and [::] mean every address)"));
    }
    if host.contains(':') {
        return Err(format!("an IPv6 address goes in brackets; {FORM}"));
    }
    Ok(())
}

fn check_socket(path: &Path) -> Result<(), String> {
    let len = path.as_os_str().len();
    if len == 0 {
        return Err("the path is empty".to_owned());
    }
    if len > SOCKET_PATH_MAX {
        return Err(format!(
            "the path has {len} bytes, and the kernel takes {SOCKET_PATH_MAX}; use a shorter one"
        ));
    }
    Ok(())
}

fn check_string(text: &str) -> Result<(), String> {
    if text.len() > NBD_MAX_STRING {
        return Err(format!("has {} bytes, and NBD allows {NBD_MAX_STRING}; shorten it", text.len()));
    }
    if text.contains('\0') {
        return Err("contains a NUL byte, which NBD forbids; remove it".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::de::value::{Error as ValueError, MapDeserializer};

    const EXAMPLE: &str = include_str!("../config/conbd.toml");

    /// Notes which keys a table knows, and finds nothing in it.
    struct Keys(Vec<&'static str>);

    impl<'de> Deserializer<'de> for &mut Keys {
        type Error = ValueError;
        fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
            visitor.visit_map(MapDeserializer::new(std::iter::empty::<(&str, &str)>()))
        }
        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _name: &'static str,
            fields: &'static [&'static str],
            visitor: V,
        ) -> Result<V::Value, ValueError> {
            self.0 = fields.to_vec();
            self.deserialize_any(visitor)
        }
        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
            unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }

    fn keys<'de, T: Deserialize<'de>>() -> Vec<&'static str> {
        let mut keys = Keys(Vec::new());
        // A table with a required key is an error; its keys were noted all the same.
        let _ = T::deserialize(&mut keys);
        assert!(!keys.0.is_empty());
        keys.0
    }

    /// The example with every commented key switched on.
    fn uncommented() -> String {
        let is_key = |line: &str| line.starts_with('#') && !line.starts_with("# ") && line.len() > 1;
        EXAMPLE
            .lines()
            .map(|line| if is_key(line) { &line[1..] } else { line })
            .collect::<Vec<_>>()
            .join("\n")
    }

    #[test]
    fn the_example_lists_exactly_the_keys_that_exist() {
        let table: toml::Table = uncommented().parse().expect("the example is TOML");
        let check = |section: &str, listed: Vec<&String>, mut known: Vec<&str>| {
            let mut listed: Vec<&str> = listed.into_iter().map(String::as_str).collect();
            listed.sort_unstable();
            known.sort_unstable();
            assert_eq!(listed, known, "[{section}]");
        };
        check("", table.keys().collect(), keys::<FileTable>());
        let section = |name: &str| table[name].as_table().expect(name).keys().collect::<Vec<_>>();
        check("server", section("server"), keys::<ServerTable>());
        check("limits", section("limits"), keys::<LimitsTable>());
        check("tls", section("tls"), keys::<TlsTable>());
        check("log", section("log"), keys::<LogTable>());
        let export = table["export"][0].as_table().expect("export");
        check("export", export.keys().collect(), keys::<ExportTable>());
    }

    #[test]
    fn the_examples_commented_values_are_the_defaults() {
        // What has no default is shown by an example.
        let no_default = [
            "size =",
            "cert =",
            "key =",
            "ca =",
            "crl =",
            "verify_client =",
            "psk =",
            "allow =",
            "snapshot =",
            "l2_cache =",
            "grow_to =",
        ];
        let text: String = uncommented()
            .lines()
            .filter(|line| !no_default.iter().any(|key| line.starts_with(key)))
            .map(|line| format!("{line}\n"))
            .collect();
        let all = Config::parse("conbd.toml", Path::new(""), &text).expect("the example is right");
        let bare = Config::parse("conbd.toml", Path::new(""), EXAMPLE).expect("the example is right");
        assert_eq!(all, bare, "a commented value is not the default");
        assert_eq!(bare.server, ServerConfig::default());
        assert_eq!(bare.limits, LimitsConfig::default());
        assert_eq!(bare.tls, TlsConfig::default());
        assert_eq!(bare.log, LogConfig::default());
        assert_eq!(bare.exports, [ExportConfig::new("", Path::new("disk.raw"))]);
    }

    #[test]
    fn our_limits_are_the_servers_defaults() {
        let (ours, theirs) = (LimitsConfig::default(), crate::nbd::server::ServerConfig::default());
        assert_eq!(ours.handshake_timeout, theirs.handshake_timeout);
        assert_eq!(ours.max_handshakes, theirs.max_half_open);
        assert_eq!(ours.max_connections, theirs.max_connections);
        assert_eq!(ours.bytes_per_connection.0, theirs.conn_bytes);
        assert_eq!(ours.requests_per_connection, theirs.conn_requests as usize);
        assert_eq!(ours.bytes_total.0, theirs.total_bytes);
        assert_eq!(ours.requests_total, theirs.total_requests as usize);
        assert_eq!(ours.stall_timeout, theirs.stall_timeout);
        assert_eq!(ours.idle_timeout, theirs.idle_timeout);
        let ours = ServerConfig::default();
        assert_eq!(ours.keepalive, theirs.keepalive);
        assert_eq!(ours.tcp_user_timeout, theirs.tcp_user_timeout);
    }

    #[test]
    fn vsock_addresses_are_told_from_names() {
        assert_eq!(parse_vsock("vsock:10809"), Some(Ok((u32::MAX, 10809))));
        assert_eq!(parse_vsock("vsock:1:7"), Some(Ok((1, 7))));
        assert_eq!(parse_vsock("vsockhost:1"), None);
        for bad in ["vsock:", "vsock:x", "vsock:1:", "vsock::x", "vsock:4294967296"] {
            let why = check_listen(bad).expect_err(bad);
            assert!(why.contains("vsock"), "{why}");
        }
    }

    #[test]
    fn filters_that_would_silence_everything_are_refused() {
        for good in ["info", "DEBUG", "off", "info,conbd::nbd=debug", "conbd=trace"] {
            assert!(check_filter(good).is_ok(), "{good}");
        }
        for bad in ["", "verbose", "info,chatty", "conbd=loud", "info,"] {
            let why = check_filter(bad).expect_err(bad);
            assert!(why.contains("write error, warn"), "{why}");
        }
    }

    #[test]
    fn sizes_and_times_are_read_and_shown() {
        for (text, bytes, shown) in [
            ("0", 0, "0"),
            ("4096", 4096, "4 KiB"),
            ("64k", 65_536, "64 KiB"),
            ("10 GiB", 10 << 30, "10 GiB"),
            ("1025", 1025, "1025"),
            ("2T", 2 << 40, "2 TiB"),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
            assert_eq!(Size(bytes).to_string(), shown);
        }
        for text in ["", "k", "-1", "1.5G", "10X", "99999999999P"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        for (text, ms) in [("10s", 10_000), ("500ms", 500), ("2m", 120_000), ("1h", 3_600_000), ("0us", 0)] {
            assert_eq!(text.parse(), Ok(Span(Duration::from_millis(ms))), "{text}");
        }
        for text in ["", "10", "s", "10 years", "9999h", "99999999999999999999s"] {
            assert!(text.parse::<Span>().is_err(), "{text}");
        }
    }
}
