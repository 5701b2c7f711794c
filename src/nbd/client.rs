//! Our own NBD client, on the codec that the server uses: for `bench`, `inspect` and tests.
//!
//! ```text
//!  callers (coroutines) ── slot per request ──┐            ┌── sender coroutine ── socket
//!       ▲ wake when replied                   ├── Shared ──┤
//!       └─────────────────────────────────────┘            └── receiver coroutine ── socket
//! ```
//!
//! A [`Negotiation`] speaks the handshake, one option at a time; [`Negotiation::co_go`] turns it into a
//! [`Client`], which takes any number of requests at once. Everything runs in coroutines on one AioContext, the
//! one where the connection was made (its *home*); only [`Interrupter`] may be used from other threads. Requests made in one
//! turn of the loop leave in one system call.
//!
//! The server is not trusted: every length is checked against what was asked for before memory is taken or
//! data is stored, replies must belong to a request in flight, chunks of a read must cover it exactly. A server
//! that lies ends the connection with an error that says how.
//!
//! No std lock is held across a yield. End a client with [`Client::co_close`]; one that is dropped is cut,
//! and its two coroutines end by themselves as long as the home loop runs.

use super::access::TlsPeer;
use super::channel::Channel;
use super::proto::*;
use super::tls::{TlsClientConfig, TlsClientFiles, TlsError};
use super::wire::{
    BlockSizes, Chunk, ChunkHeader, ExportNameReply, Greeting, InfoRequest, MetaContextRequest,
    OptionReplyHeader, ProtocolError, RepInfo, RepMetaContext, RepServer, ReplyHeader, RequestHeader,
    SimpleReply, StatusExtent, StatusFilter, put_option,
};
use crate::aio::AioContext;
use crate::co::{CoStream, Coroutine, co_run_blocking, co_yield};
use crate::util::buf::IoBuf;
use std::collections::VecDeque;
use std::fmt;
use std::io::{self, IoSlice};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Longest option reply that is read (ours: two strings of 4096 bytes and their lengths fit four times over).
const OPTION_REPLY_MAX: u32 = 32 << 10;
/// Most exports that are taken from one list (ours).
const LIST_MAX: usize = 65_536;
/// Most information replies to one option, and most metadata contexts (ours).
const INFO_REPLIES_MAX: usize = 1024;
/// Longest block status chunk that is read (the document allows 2^20 extents, of 16 bytes with extended headers).
const STATUS_CHUNK_MAX: u32 = 8 + (16 << 20);
/// Longest error chunk that is read: error, length, message, offset.
const ERROR_CHUNK_MAX: u32 = 6 + NBD_MAX_STRING as u32 + 8;
/// Most separate ranges that a read may be answered in before they join up (ours).
const FRAGMENTS_MAX: usize = 4096;
/// Bytes that are read from the socket at once when replies are small (ours).
const RECEIVE_BUFFER: usize = 128 << 10;
/// Requests that go into one `sendmsg` (ours; two vectors each, well under IOV_MAX).
const SEND_BATCH: usize = 64;
/// Time to connect and for each answer in the negotiation (ours).
const NEGOTIATION_TIMEOUT: Duration = Duration::from_secs(15);
/// Time that a server has to close after NBD_CMD_DISC (ours).
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

// ------------------------------------------------------------------------------------------------- addresses

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// TCP; an IPv6 address has no brackets here.
    Tcp {
        /// Name or address.
        host: String,
        /// Port.
        port: u16,
    },
    /// A unix socket's path; one that begins with NUL is in the abstract namespace.
    Unix(PathBuf),
    /// Between a virtual machine and its host.
    Vsock {
        /// Context id: 1 this machine, 2 the host.
        cid: u32,
        /// Port.
        port: u32,
    },
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "{host}:{port}"),
            Address::Unix(path) => write!(f, "{}", path.display()),
            Address::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
        }
    }
}

/// An NBD URI: a server and the name of an export.
///
/// Source: uri.md of NetworkBlockDevice/nbd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uri {
    /// The server.
    pub address: Address,
    /// The export; "" is the default one.
    pub export: String,
    /// How to make TLS; `None`: in the clear.
    pub tls: Option<UriTls>,
}

/// The TLS part of an NBD URI (`nbds:`, `nbds+unix:`), in libnbd's terms.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UriTls {
    /// `tls-certificates`, `tls-psk-file`, `tls-verify-peer`, and the user before the host (or `tls-username`).
    pub files: TlsClientFiles,
    /// `tls-hostname`: the name that the server's certificate must have, if not the host's.
    pub hostname: Option<String>,
}

/// Why a text is no NBD URI that we can use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{uri}: {why}")]
pub struct UriError {
    uri: String,
    why: String,
}

impl Uri {
    /// The URI of a TCP listener's export. A wildcard address is shown as the loopback address of its family.
    #[must_use]
    pub fn tcp(address: SocketAddr, export: &str) -> Uri {
        let ip = match address.ip() {
            std::net::IpAddr::V4(ip) if ip.is_unspecified() => "127.0.0.1".to_owned(),
            std::net::IpAddr::V6(ip) if ip.is_unspecified() => "::1".to_owned(),
            ip => ip.to_string(),
        };
        let address = Address::Tcp { host: ip, port: address.port() };
        Uri { address, export: export.to_owned(), tls: None }
    }

    /// The URI of a vsock listener's export. The address that stands for all is shown as the host's, as guests see it.
    #[must_use]
    pub fn vsock(cid: u32, port: u32, export: &str) -> Uri {
        let cid = if cid == u32::MAX { 2 } else { cid };
        Uri { address: Address::Vsock { cid, port }, export: export.to_owned(), tls: None }
    }

    /// The URI of a unix listener's export.
    #[must_use]
    pub fn unix(path: &Path, export: &str) -> Uri {
        Uri { address: Address::Unix(path.to_owned()), export: export.to_owned(), tls: None }
    }

    /// The same with TLS.
    #[must_use]
    pub fn with_tls(self, tls: UriTls) -> Uri {
        Uri { tls: Some(tls), ..self }
    }

    /// The name that the server's certificate must have. A unix socket has none of its own.
    fn tls_hostname(&self) -> String {
        let named = self.tls.as_ref().and_then(|tls| tls.hostname.clone());
        named.unwrap_or_else(|| match &self.address {
            Address::Tcp { host, .. } => host.clone(),
            _ => "localhost".to_owned(),
        })
    }
}

/// Percent-encodes all but RFC 3986's unreserved characters, the slash and those in `also`.
fn percent_encode(bytes: &[u8], also: &[u8], out: &mut String) {
    for &b in bytes {
        if b.is_ascii_alphanumeric() || b"-._~/".contains(&b) || also.contains(&b) {
            out.push(char::from(b));
        } else {
            out.push('%');
            out.push(char::from(b"0123456789ABCDEF"[usize::from(b >> 4)]));
            out.push(char::from(b"0123456789ABCDEF"[usize::from(b & 15)]));
        }
    }
}

fn percent_decode(text: &str) -> Result<Vec<u8>, String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(b) = bytes.next() {
        if b != b'%' {
            out.push(b);
            continue;
        }
        let mut digit = || bytes.next().and_then(|d| char::from(d).to_digit(16));
        match (digit(), digit()) {
            (Some(high), Some(low)) => out.push((high * 16 + low) as u8),
            _ => return Err("\"%\" must be followed by two hexadecimal digits (a plain % is %25)".to_owned()),
        }
    }
    Ok(out)
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut export = String::new();
        percent_encode(self.export.as_bytes(), b":@!$&'()*+,;=", &mut export);
        let (s, user, parameters) = match &self.tls {
            None => ("", String::new(), Vec::new()),
            Some(tls) => ("s", tls.user(), tls.parameters()),
        };
        match &self.address {
            Address::Tcp { host, port } => {
                let mut encoded = String::new();
                percent_encode(host.as_bytes(), b":", &mut encoded);
                if host.contains(':') {
                    encoded = format!("[{encoded}]");
                }
                write!(f, "nbd{s}://{user}{encoded}:{port}/{export}")?;
                if parameters.is_empty() { Ok(()) } else { write!(f, "?{}", parameters.join("&")) }
            }
            Address::Unix(path) => {
                let mut socket = String::new();
                percent_encode(path.as_os_str().as_bytes(), b"", &mut socket);
                write!(f, "nbd{s}+unix://{user}/{export}?socket={socket}")?;
                parameters.iter().try_for_each(|parameter| write!(f, "&{parameter}"))
            }
            Address::Vsock { cid, port } => {
                write!(f, "nbd{s}+vsock://{user}{cid}:{port}/{export}")?;
                if parameters.is_empty() { Ok(()) } else { write!(f, "?{}", parameters.join("&")) }
            }
        }
    }
}

impl UriTls {
    fn user(&self) -> String {
        let mut user = String::new();
        if let Some(name) = &self.files.user {
            percent_encode(name.replace('/', "%2F").as_bytes(), b"%", &mut user);
            user.push('@');
        }
        user
    }

    fn parameters(&self) -> Vec<String> {
        let mut all = Vec::new();
        let mut add = |key: &str, value: &[u8]| {
            let mut text = format!("{key}=");
            percent_encode(value, b"", &mut text);
            all.push(text);
        };
        if let Some(dir) = &self.files.dir {
            add("tls-certificates", dir.as_os_str().as_bytes());
        }
        if let Some(file) = &self.files.psk {
            add("tls-psk-file", file.as_os_str().as_bytes());
        }
        if let Some(name) = &self.hostname {
            add("tls-hostname", name.as_bytes());
        }
        if !self.files.verify {
            add("tls-verify-peer", b"false");
        }
        all
    }

    /// Takes a `tls-` parameter of a URI.
    fn set(&mut self, key: &str, value: Vec<u8>) -> Result<(), String> {
        let text = |value| String::from_utf8(value).map_err(|_| format!("{key} is not UTF-8"));
        let path = |value| Some(PathBuf::from(std::ffi::OsString::from_vec(value)));
        match key {
            "tls-certificates" => self.files.dir = path(value),
            "tls-psk-file" => self.files.psk = path(value),
            "tls-username" => self.files.user = Some(text(value)?),
            "tls-hostname" => self.hostname = Some(text(value)?),
            "tls-verify-peer" => {
                self.files.verify = match text(value)?.as_str() {
                    "true" | "1" | "yes" | "on" => true,
                    "false" | "0" | "no" | "off" => false,
                    other => return Err(format!("tls-verify-peer={other}: write true or false")),
                }
            }
            _ => {
                return Err(format!(
                    "unknown parameter \"{key}\"; for TLS there are tls-certificates, tls-psk-file, tls-username, tls-hostname and tls-verify-peer"
                ));
            }
        }
        Ok(())
    }
}

impl std::str::FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Uri, UriError> {
        parse_uri(text).map_err(|why| UriError { uri: text.to_owned(), why })
    }
}

fn parse_uri(text: &str) -> Result<Uri, String> {
    const FORMS: &str =
        "write nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH or nbd+vsock://CID[:PORT]/EXPORT";
    let (scheme, rest) = text.split_once(':').ok_or_else(|| format!("no URI; {FORMS}"))?;
    let scheme = scheme.to_ascii_lowercase();
    let (unix, mut tls) = match scheme.as_str() {
        "nbd" | "nbd+vsock" => (false, None),
        "nbd+unix" => (true, None),
        "nbds" | "nbds+vsock" => (false, Some(UriTls::default())),
        "nbds+unix" => (true, Some(UriTls::default())),
        other => return Err(format!("unknown scheme \"{other}\"; {FORMS}")),
    };
    let rest =
        rest.strip_prefix("//").ok_or_else(|| format!("\"//\" is missing after the scheme; {FORMS}"))?;
    let (rest, fragment) = rest.split_once('#').map_or((rest, None), |(r, f)| (r, Some(f)));
    if fragment.is_some() {
        return Err("\"#\" has no meaning in an NBD URI (in a name or path it is written %23)".to_owned());
    }
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let export =
        String::from_utf8(percent_decode(path)?).map_err(|_| "the export name is not UTF-8".to_owned())?;
    if export.contains('\0') {
        return Err("an export name cannot contain a NUL byte".to_owned());
    }
    if export.len() > NBD_MAX_STRING {
        return Err(format!("the export name has {} bytes, and NBD allows {NBD_MAX_STRING}", export.len()));
    }
    let mut socket = None;
    for parameter in query.split('&').filter(|p| !p.is_empty()) {
        let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        match key {
            "socket" => socket = Some(percent_decode(value)?),
            _ if key.starts_with("tls-") => match &mut tls {
                Some(tls) => tls.set(key, percent_decode(value)?)?,
                None => return Err(format!("{key} needs the scheme nbds: or nbds+unix:")),
            },
            _ => return Err(format!("unknown parameter \"{key}\"; only socket= is known")),
        }
    }
    let (user, authority) = authority.rsplit_once('@').map_or((None, authority), |(u, host)| (Some(u), host));
    if let (Some(user), Some(tls)) = (user.filter(|u| !u.is_empty()), &mut tls) {
        let user =
            String::from_utf8(percent_decode(user)?).map_err(|_| "the user is not UTF-8".to_owned())?;
        tls.files.user.get_or_insert(user);
    }
    if unix {
        let socket = socket
            .filter(|s| !s.is_empty())
            .ok_or("the socket is missing; write nbd+unix:///EXPORT?socket=PATH")?;
        if !authority.is_empty() {
            return Err(format!(
                "a host (\"{authority}\") makes no sense with a unix socket; write nbd+unix:///EXPORT?socket=PATH with three slashes"
            ));
        }
        return Ok(Uri {
            address: Address::Unix(PathBuf::from(std::ffi::OsString::from_vec(socket))),
            export,
            tls,
        });
    }
    if socket.is_some() {
        return Err("socket= needs the scheme nbd+unix:".to_owned());
    }
    if scheme.ends_with("+vsock") {
        let (cid, port) = authority.split_once(':').unwrap_or((authority, ""));
        let port = if port.is_empty() { Ok(NBD_DEFAULT_PORT.into()) } else { port.parse() };
        let port = port.map_err(|_| format!("the vsock port is no number; {FORMS}"))?;
        let cid = cid
            .parse()
            .map_err(|_| format!("\"{cid}\" is no vsock context id; it is a number, 2 is the host"))?;
        return Ok(Uri { address: Address::Vsock { cid, port }, export, tls });
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(v6) => {
            let (host, after) = v6.split_once(']').ok_or("the IPv6 address has no closing bracket")?;
            (
                host,
                after
                    .strip_prefix(':')
                    .or(if after.is_empty() { Some("") } else { None })
                    .ok_or("junk after the IPv6 address")?,
            )
        }
        None => authority.split_once(':').unwrap_or((authority, "")),
    };
    if port.contains(':') {
        return Err("an IPv6 address goes in brackets: nbd://[::1]:10809/".to_owned());
    }
    let port = match port {
        "" => NBD_DEFAULT_PORT,
        port => port.parse().map_err(|_| format!("\"{port}\" is no port"))?,
    };
    let host = String::from_utf8(percent_decode(host)?).map_err(|_| "the host is not UTF-8".to_owned())?;
    let host = if host.is_empty() { "localhost".to_owned() } else { host };
    Ok(Uri { address: Address::Tcp { host, port }, export, tls })
}

// ---------------------------------------------------------------------------------------------------- errors

/// What can go wrong at the client's end.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody there, or no way.
    #[error("cannot connect to {address}")]
    Connect {
        /// Where to.
        address: Address,
        /// Why.
        source: io::Error,
    },
    /// Our credentials cannot be used.
    #[error(transparent)]
    Credentials(#[from] TlsError),
    /// TLS could not be made.
    #[error("no TLS with {address}: {why}")]
    Tls {
        /// With whom.
        address: Address,
        /// Why.
        why: String,
    },
    /// The connection broke.
    #[error("connection lost while {doing}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The server's bytes are not NBD.
    #[error("the server broke the protocol")]
    Protocol(#[from] ProtocolError),
    /// The server's bytes are NBD and wrong.
    #[error("the server broke the protocol: {0}")]
    Lie(String),
    /// The server refused an option.
    #[error("the server refused {}: {}{}", opt_name(*option), rep_name(*reply), quoted(message))]
    Refused {
        /// `NBD_OPT_*`.
        option: u32,
        /// `NBD_REP_ERR_*`.
        reply: u32,
        /// The server's text, perhaps empty.
        message: String,
    },
    /// The server cannot do what was asked for.
    #[error("{0}")]
    Unsupported(&'static str),
    /// A request failed; the connection lives on.
    #[error("{} at offset {offset}, {len} bytes: {errno}{}", cmd_name(*cmd), quoted(message))]
    Request {
        /// `NBD_CMD_*`.
        cmd: u16,
        /// Of the request.
        offset: u64,
        /// Of the request.
        len: u64,
        /// What the server says.
        errno: Errno,
        /// The server's text, perhaps empty.
        message: String,
    },
    /// The connection has ended before this request was answered.
    #[error(transparent)]
    Ended(Arc<ClientError>),
    /// The caller closed the client.
    #[error("the connection is closed")]
    Closed,
}

fn quoted(message: &str) -> String {
    // A server's text goes to terminals and logs: no control characters.
    let text: String = message.chars().filter(|c| !c.is_control()).collect();
    if text.is_empty() { text } else { format!(" (\"{text}\")") }
}

/// Result of client operations.
pub type Result<T, E = ClientError> = std::result::Result<T, E>;

fn lost(doing: &'static str) -> impl Fn(io::Error) -> ClientError {
    move |source| {
        let source = match source.kind() {
            io::ErrorKind::UnexpectedEof => {
                io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection")
            }
            io::ErrorKind::TimedOut => {
                io::Error::new(io::ErrorKind::TimedOut, "the server did not answer in time")
            }
            _ => source,
        };
        ClientError::Io { doing, source }
    }
}

// ----------------------------------------------------------------------------------------------- negotiation

/// What a server says about an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// The name that was asked for.
    pub name: String,
    /// The server's own name for it, if it said one.
    pub canonical_name: Option<String>,
    /// Text for people, if any.
    pub description: Option<String>,
    /// Size in bytes.
    pub size: u64,
    /// Transmission flags.
    pub flags: TransmissionFlags,
    /// Block sizes, if the server said them.
    pub block_sizes: Option<BlockSizes>,
}

impl ExportInfo {
    /// The block sizes to work with: the server's, or the document's defaults.
    #[must_use]
    pub fn effective_block_sizes(&self) -> BlockSizes {
        self.block_sizes.unwrap_or(BlockSizes::DEFAULT)
    }
}

/// One line of a server's list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListEntry {
    /// Name.
    pub name: String,
    /// Text for people, perhaps empty.
    pub description: String,
}

/// A connection in its handshake. Coroutine only; stays on the context where it was made.
pub struct Negotiation {
    stream: Channel,
    address: Address,
    tls: Option<TlsPeer>,
    fixed: bool,
    no_zeroes: bool,
    style: HeaderStyle,
    contexts: Vec<(u32, String)>,
    context_export: Option<String>,
}

impl Negotiation {
    /// Connects and exchanges the greetings. Yields.
    ///
    /// # Errors
    /// `Connect`; `Protocol` when it is no NBD server.
    pub fn co_open(address: &Address) -> Result<Negotiation> {
        let to = address.clone();
        let fd = co_run_blocking(move || connect(&to))
            .map_err(|source| ClientError::Connect { address: address.clone(), source })?;
        let failed = |source| ClientError::Connect { address: address.clone(), source };
        let stream = Channel::Plain(CoStream::new(fd).map_err(failed)?);
        let mut negotiation = Negotiation {
            stream,
            address: address.clone(),
            tls: None,
            fixed: false,
            no_zeroes: false,
            style: HeaderStyle::Simple,
            contexts: Vec::new(),
            context_export: None,
        };
        let mut greeting = [0; Greeting::LEN];
        negotiation.co_read(&mut greeting)?;
        let flags = Greeting::decode(&greeting)?.flags;
        negotiation.fixed = flags.contains(HandshakeFlags::NBD_FLAG_FIXED_NEWSTYLE);
        negotiation.no_zeroes = flags.contains(HandshakeFlags::NBD_FLAG_NO_ZEROES);
        let mut answer = ClientFlags::empty();
        answer.set(ClientFlags::NBD_FLAG_C_FIXED_NEWSTYLE, negotiation.fixed);
        answer.set(ClientFlags::NBD_FLAG_C_NO_ZEROES, negotiation.no_zeroes);
        negotiation.co_write(&answer.bits().to_be_bytes())?;
        Ok(negotiation)
    }

    /// Connects to the URI's server, exchanges the greetings, and makes TLS if the URI says so. Yields.
    ///
    /// # Errors
    /// As [`Negotiation::co_open`]; `Credentials`, `Tls`, `Refused` (by a server without TLS).
    pub fn co_open_uri(uri: &Uri) -> Result<Negotiation> {
        // What is wrong with our files is known before anybody is bothered.
        let config = match &uri.tls {
            None => None,
            Some(tls) => {
                let files = tls.files.clone();
                Some(co_run_blocking(move || TlsClientConfig::load(&files))?)
            }
        };
        let mut negotiation = Negotiation::co_open(&uri.address)?;
        if let Some(config) = config {
            negotiation.co_start_tls(&config, &uri.tls_hostname())?;
        }
        Ok(negotiation)
    }

    fn co_start_tls(&mut self, config: &TlsClientConfig, host: &str) -> Result<()> {
        self.co_option(NBD_OPT_STARTTLS, &[])?;
        match self.co_reply(NBD_OPT_STARTTLS)? {
            (NBD_REP_ACK, _) => {}
            (other, _) => return Err(Self::unexpected(NBD_OPT_STARTTLS, other)),
        }
        self.deadline();
        let now = AioContext::current().map_or(0, |ctx| ctx.now_ns());
        let deadline = now.saturating_add(NEGOTIATION_TIMEOUT.as_nanos() as u64);
        let (channel, peer) = Channel::co_connect(self.stream.stream(), config, host, deadline)
            .map_err(|e| ClientError::Tls { address: self.address.clone(), why: e.to_string() })?;
        self.stream = channel;
        self.tls = Some(peer);
        Ok(())
    }

    /// What TLS has proved about the server; `None` in the clear.
    #[must_use]
    pub fn tls(&self) -> Option<&TlsPeer> {
        self.tls.as_ref()
    }

    /// Whether the server speaks fixed newstyle: only then there are other options than EXPORT_NAME.
    #[must_use]
    pub fn is_fixed(&self) -> bool {
        self.fixed
    }

    /// Whether structured replies are on; extended headers include them.
    #[must_use]
    pub fn is_structured(&self) -> bool {
        self.style >= HeaderStyle::Structured
    }

    /// How requests and replies will look.
    #[must_use]
    pub fn header_style(&self) -> HeaderStyle {
        self.style
    }

    /// The metadata contexts selected by [`Negotiation::co_set_meta_context`]: id and name.
    #[must_use]
    pub fn contexts(&self) -> &[(u32, String)] {
        &self.contexts
    }

    fn deadline(&self) {
        let now = AioContext::current().map_or(0, |ctx| ctx.now_ns());
        let deadline = now.saturating_add(NEGOTIATION_TIMEOUT.as_nanos() as u64);
        self.stream.set_read_deadline(Some(deadline));
        self.stream.set_write_deadline(Some(deadline));
    }

    fn co_read(&self, bytes: &mut [u8]) -> Result<()> {
        self.deadline();
        self.stream.co_read_exact(bytes).map_err(lost("negotiating"))
    }

    fn co_write(&self, bytes: &[u8]) -> Result<()> {
        self.deadline();
        self.stream.co_writev_all(&mut [IoSlice::new(bytes)]).map_err(lost("negotiating"))
    }

    fn co_option(&self, option: u32, data: &[u8]) -> Result<()> {
        if !self.fixed {
            return Err(ClientError::Unsupported(
                "the server speaks plain newstyle negotiation, which has no options but the export's name",
            ));
        }
        let mut out = Vec::with_capacity(16 + data.len());
        put_option(&mut out, option, data);
        self.co_write(&out)
    }

    /// Reads one reply to `option`: its type and data. An error reply is an error.
    fn co_reply(&self, option: u32) -> Result<(u32, Vec<u8>)> {
        let mut header = [0; OptionReplyHeader::LEN];
        self.co_read(&mut header)?;
        let header = OptionReplyHeader::decode(&header)?;
        if header.option != option {
            return Err(ClientError::Lie(format!(
                "it answered option {} instead of {option}",
                header.option
            )));
        }
        if header.len > OPTION_REPLY_MAX {
            return Err(ClientError::Lie(format!("an option reply of {} bytes", header.len)));
        }
        let mut data = vec![0; header.len as usize];
        self.co_read(&mut data)?;
        if header.reply_type & NBD_REP_FLAG_ERROR != 0 {
            let message = String::from_utf8_lossy(&data[..data.len().min(NBD_MAX_STRING)]).into_owned();
            return Err(ClientError::Refused { option, reply: header.reply_type, message });
        }
        Ok((header.reply_type, data))
    }

    fn unexpected(option: u32, reply_type: u32) -> ClientError {
        ClientError::Lie(format!("reply {reply_type} ({}) to {}", rep_name(reply_type), opt_name(option)))
    }

    /// Asks for structured replies; false when the server has none. Yields.
    ///
    /// # Errors
    /// As for every option: `Io`, `Protocol`, `Lie`.
    pub fn co_structured_reply(&mut self) -> Result<bool> {
        self.co_style(NBD_OPT_STRUCTURED_REPLY, HeaderStyle::Structured)
    }

    /// Asks for extended headers, which include structured replies; false when the server has none. Yields.
    ///
    /// # Errors
    /// As for every option: `Io`, `Protocol`, `Lie`.
    pub fn co_extended_headers(&mut self) -> Result<bool> {
        self.co_style(NBD_OPT_EXTENDED_HEADERS, HeaderStyle::Extended)
    }

    /// Asks for the best that the server has: extended headers, else structured replies, else neither. Yields.
    ///
    /// # Errors
    /// As for every option: `Io`, `Protocol`, `Lie`.
    pub fn co_best_style(&mut self) -> Result<HeaderStyle> {
        if !self.co_extended_headers()? {
            self.co_structured_reply()?;
        }
        Ok(self.style)
    }

    fn co_style(&mut self, option: u32, style: HeaderStyle) -> Result<bool> {
        if !self.fixed {
            return Ok(false);
        }
        self.co_option(option, &[])?;
        match self.co_reply(option) {
            Ok((NBD_REP_ACK, _)) => {
                self.style = style;
                Ok(true)
            }
            Ok((other, _)) => Err(Self::unexpected(option, other)),
            Err(ClientError::Refused { .. }) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Lists the exports. Yields.
    ///
    /// # Errors
    /// `Refused` when the server does not tell.
    pub fn co_list(&self) -> Result<Vec<ListEntry>> {
        self.co_option(NBD_OPT_LIST, &[])?;
        let mut entries = Vec::new();
        loop {
            match self.co_reply(NBD_OPT_LIST)? {
                (NBD_REP_ACK, _) => return Ok(entries),
                (NBD_REP_SERVER, data) => {
                    if entries.len() == LIST_MAX {
                        return Err(ClientError::Lie(format!("more than {LIST_MAX} exports in its list")));
                    }
                    let entry = RepServer::decode(&data)?;
                    entries.push(ListEntry {
                        name: entry.name.to_owned(),
                        description: entry.description.to_owned(),
                    });
                }
                (other, _) => return Err(Self::unexpected(NBD_OPT_LIST, other)),
            }
        }
    }

    /// Asks about an export. Yields.
    ///
    /// # Errors
    /// `Refused`: no such export, or the server does not know the option.
    pub fn co_info(&self, name: &str) -> Result<ExportInfo> {
        self.co_info_or_go(NBD_OPT_INFO, name)
    }

    fn co_info_or_go(&self, option: u32, name: &str) -> Result<ExportInfo> {
        let mut data = Vec::new();
        InfoRequest::put(&mut data, name, &[NBD_INFO_NAME, NBD_INFO_DESCRIPTION, NBD_INFO_BLOCK_SIZE]);
        self.co_option(option, &data)?;
        let mut info = ExportInfo {
            name: name.to_owned(),
            canonical_name: None,
            description: None,
            size: 0,
            flags: TransmissionFlags::empty(),
            block_sizes: None,
        };
        let mut told = false;
        for _ in 0..INFO_REPLIES_MAX {
            let (reply_type, data) = self.co_reply(option)?;
            match reply_type {
                NBD_REP_ACK if told => return Ok(info),
                NBD_REP_ACK => return Err(ClientError::Lie("it did not tell size and flags".to_owned())),
                NBD_REP_INFO => match RepInfo::decode(&data)? {
                    RepInfo::Export { size, flags } => {
                        told = true;
                        info.size = size;
                        info.flags = flags;
                    }
                    RepInfo::Name(text) => info.canonical_name = Some(text.to_owned()),
                    RepInfo::Description(text) => info.description = Some(text.to_owned()),
                    RepInfo::BlockSize(sizes) => {
                        let ordered = sizes.min <= sizes.preferred && sizes.preferred <= sizes.max;
                        if !sizes.min.is_power_of_two() || sizes.min > 65_536 || !ordered {
                            return Err(ClientError::Lie(format!("impossible block sizes: {sizes:?}")));
                        }
                        info.block_sizes = Some(sizes);
                    }
                    RepInfo::Unknown(_) => {}
                },
                other => return Err(Self::unexpected(option, other)),
            }
        }
        Err(ClientError::Lie(format!("more than {INFO_REPLIES_MAX} replies to {}", opt_name(option))))
    }

    /// Lists the metadata contexts that match `queries` (none: all). Needs structured replies. Yields.
    ///
    /// # Errors
    /// `Refused`.
    pub fn co_list_meta_context(&self, name: &str, queries: &[&str]) -> Result<Vec<String>> {
        let contexts = self.co_meta_context(NBD_OPT_LIST_META_CONTEXT, name, queries)?;
        Ok(contexts.into_iter().map(|(_, name)| name).collect())
    }

    /// Selects metadata contexts for the export; replaces an earlier selection. Needs structured replies. Yields.
    ///
    /// # Errors
    /// `Refused`.
    pub fn co_set_meta_context(&mut self, name: &str, queries: &[&str]) -> Result<&[(u32, String)]> {
        self.contexts = self.co_meta_context(NBD_OPT_SET_META_CONTEXT, name, queries)?;
        self.context_export = Some(name.to_owned());
        Ok(&self.contexts)
    }

    fn co_meta_context(&self, option: u32, name: &str, queries: &[&str]) -> Result<Vec<(u32, String)>> {
        let mut data = Vec::new();
        MetaContextRequest::put(&mut data, name, queries);
        self.co_option(option, &data)?;
        let mut contexts = Vec::new();
        for _ in 0..INFO_REPLIES_MAX {
            match self.co_reply(option)? {
                (NBD_REP_ACK, _) => return Ok(contexts),
                (NBD_REP_META_CONTEXT, data) => {
                    let context = RepMetaContext::decode(&data)?;
                    contexts.push((context.id, context.name.to_owned()));
                }
                (other, _) => return Err(Self::unexpected(option, other)),
            }
        }
        Err(ClientError::Lie(format!("more than {INFO_REPLIES_MAX} metadata contexts")))
    }

    /// Ends the session politely. Yields.
    pub fn co_abort(self) {
        // The session is over either way; nobody is interested in how the goodbye went.
        if self.fixed && self.co_option(NBD_OPT_ABORT, &[]).is_ok() {
            let _ = self.co_reply(NBD_OPT_ABORT);
        }
        self.stream.co_say_goodbye();
    }

    /// Chooses the export and begins the transmission phase. Falls back to `NBD_OPT_EXPORT_NAME` for a server
    /// that does not know `NBD_OPT_GO`. Yields.
    ///
    /// # Errors
    /// `Refused` (e.g. no such export); what the connection reports. The connection is gone then.
    pub fn co_go(self, name: &str) -> Result<Client> {
        let (negotiation, info) = self.co_choose(name)?;
        Client::start(negotiation, info)
    }

    /// Chooses the export; what follows is transmission.
    fn co_choose(mut self, name: &str) -> Result<(Negotiation, ExportInfo)> {
        if self.context_export.as_deref().is_some_and(|other| other != name) {
            self.contexts.clear();
        }
        if self.fixed {
            match self.co_info_or_go(NBD_OPT_GO, name) {
                Ok(info) => return Ok((self, info)),
                Err(ClientError::Refused { reply: NBD_REP_ERR_UNSUP, .. }) => {}
                Err(e) => return Err(e),
            }
        }
        if self.style == HeaderStyle::Extended {
            return Err(ClientError::Lie("it has extended headers and no NBD_OPT_GO".to_owned()));
        }
        let mut out = Vec::new();
        put_option(&mut out, NBD_OPT_EXPORT_NAME, name.as_bytes());
        self.co_write(&out)?;
        let mut reply = [0; ExportNameReply::LEN];
        self.co_read(&mut reply).map_err(|e| match e {
            // The option has no error reply: the server can only hang up.
            ClientError::Io { source, .. } if source.kind() == io::ErrorKind::UnexpectedEof => {
                ClientError::Refused {
                    option: NBD_OPT_EXPORT_NAME,
                    reply: NBD_REP_ERR_UNKNOWN,
                    message: "it closed the connection, as old servers do when they have no such export"
                        .to_owned(),
                }
            }
            e => e,
        })?;
        if !self.no_zeroes {
            let mut padding = [0; EXPORT_NAME_PADDING];
            self.co_read(&mut padding)?;
        }
        let reply = ExportNameReply::decode(&reply);
        let info = ExportInfo {
            name: name.to_owned(),
            canonical_name: None,
            description: None,
            size: reply.size,
            flags: reply.flags,
            block_sizes: None,
        };
        Ok((self, info))
    }
}

/// Blocking connect; runs on the thread pool.
fn connect(address: &Address) -> io::Result<OwnedFd> {
    match address {
        Address::Tcp { host, port } => {
            let mut last = None;
            for address in (host.as_str(), *port).to_socket_addrs()? {
                match TcpStream::connect_timeout(&address, NEGOTIATION_TIMEOUT) {
                    Ok(stream) => {
                        stream.set_nodelay(true)?;
                        return Ok(stream.into());
                    }
                    Err(e) => last = Some(e),
                }
            }
            Err(last.unwrap_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the name has no address")))
        }
        Address::Unix(path) => {
            let bytes = path.as_os_str().as_bytes();
            if let Some(name) = bytes.strip_prefix(b"\0") {
                use std::os::linux::net::SocketAddrExt;
                let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
                return Ok(UnixStream::connect_addr(&address)?.into());
            }
            Ok(UnixStream::connect(path)?.into())
        }
        Address::Vsock { cid, port } => {
            let socket = socket2::Socket::new(socket2::Domain::VSOCK, socket2::Type::STREAM.cloexec(), None)?;
            socket.connect_timeout(&socket2::SockAddr::vsock(*cid, *port), NEGOTIATION_TIMEOUT)?;
            Ok(socket.into())
        }
    }
}

// ---------------------------------------------------------------------------------------------- transmission

/// What a request brings back.
enum Answer {
    /// Success.
    Done,
    /// The server's errno and text.
    Error(Errno, String),
}

/// One request in flight.
struct Slot {
    /// Distinguishes this use of the slot from earlier ones; part of the cookie.
    generation: u32,
    cmd: u16,
    offset: u64,
    len: u64,
    /// Read target or write payload; away while the sender or the receiver works on it.
    buf: Option<IoBuf>,
    /// The sender has the payload.
    sending: bool,
    /// The reply is complete.
    answer: Option<Answer>,
    /// First error chunk of a structured reply.
    error: Option<(Errno, String)>,
    /// Ranges of a structured read that have arrived, relative to `offset`, sorted and joined.
    covered: Vec<(u32, u32)>,
    /// Extents per context.
    extents: Vec<(u32, Vec<StatusExtent>)>,
    /// Who waits.
    waiter: Option<Coroutine>,
}

impl Slot {
    fn is_complete(&self) -> bool {
        self.answer.is_some() && !self.sending
    }

    /// Notes that `start..end` has arrived; false when some of it had arrived before, or on too many pieces.
    fn cover(&mut self, start: u32, end: u32) -> bool {
        let at = self.covered.partition_point(|r| r.1 < start);
        match self.covered.get(at).copied() {
            // Touching or overlapping the next range.
            Some((s, e)) if s <= end => {
                if s < end && start < e {
                    return false;
                }
                let joined = (s.min(start), e.max(end));
                // It may also close the gap to the one after.
                if let Some(&(s2, e2)) = self.covered.get(at + 1)
                    && s2 <= joined.1
                {
                    if s2 < joined.1 {
                        return false;
                    }
                    self.covered[at] = (joined.0, e2);
                    self.covered.remove(at + 1);
                } else {
                    self.covered[at] = joined;
                }
                true
            }
            _ => {
                self.covered.insert(at, (start, end));
                self.covered.len() <= FRAGMENTS_MAX
            }
        }
    }
}

struct Outgoing {
    header: [u8; RequestHeader::EXTENDED_LEN],
    header_len: usize,
    /// Slot with a payload to send.
    payload: Option<usize>,
}

#[derive(Default)]
struct State {
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    next_generation: u32,
    outgoing: VecDeque<Outgoing>,
    in_flight: usize,
    /// The sender, while it has nothing to do.
    idle_sender: Option<Coroutine>,
    /// Why there will be no more answers.
    ended: Option<Arc<ClientError>>,
    /// DISC was queued; the end of the connection is no error any more.
    closing: bool,
    /// Coroutines of ours that still run.
    helpers: usize,
    /// Waits for them to end.
    closer: Option<Coroutine>,
}

struct Shared {
    stream: Channel,
    style: HeaderStyle,
    home: Arc<AioContext>,
    /// Never held across a yield; only the home thread locks it, so it never waits.
    state: Mutex<State>,
}

impl Shared {
    /// Encodes a request's header as it was negotiated.
    fn outgoing(&self, header: RequestHeader, payload: Option<usize>) -> Outgoing {
        let mut bytes = [0; RequestHeader::EXTENDED_LEN];
        let header_len = match self.style {
            HeaderStyle::Extended => {
                bytes = header.encode_extended();
                RequestHeader::EXTENDED_LEN
            }
            _ => {
                bytes[..RequestHeader::LEN].copy_from_slice(&header.encode());
                RequestHeader::LEN
            }
        };
        Outgoing { header: bytes, header_len, payload }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while it was held leaves counters at worst one off: the connection is being torn down.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the connection: every waiter is woken with `error`. The first reason stays.
    fn end(&self, error: ClientError) {
        self.stream.interrupt();
        let mut waiters = Vec::new();
        {
            let mut state = self.lock();
            if state.ended.is_none() {
                state.ended = Some(Arc::new(if state.closing { ClientError::Closed } else { error }));
            }
            state.outgoing.clear();
            waiters.extend(state.idle_sender.take());
            for slot in state.slots.iter_mut().flatten() {
                waiters.extend(slot.waiter.take());
            }
        }
        for waiter in waiters {
            waiter.wake();
        }
    }

    fn helper_ended(&self) {
        let closer = {
            let mut state = self.lock();
            state.helpers -= 1;
            if state.helpers == 0 { state.closer.take() } else { None }
        };
        if let Some(closer) = closer {
            closer.wake();
        }
    }
}

/// A connection in the transmission phase. Methods are for coroutines of its home context.
pub struct Client {
    shared: Arc<Shared>,
    info: ExportInfo,
    contexts: Vec<(u32, String)>,
    address: Address,
}

/// A connection in the transmission phase whose owner writes the requests and reads the replies itself.
pub struct Bare {
    /// The connection.
    pub(crate) stream: Channel,
    /// How headers look.
    pub style: HeaderStyle,
    /// What the server said about the export.
    pub info: ExportInfo,
}

impl Bare {
    /// Connects to the URI's export, with headers of that style, or the best below it that the server has. Yields. Coroutine
    /// only.
    ///
    /// # Errors
    /// As [`Client::co_connect`].
    pub fn co_connect(uri: &Uri, most: HeaderStyle) -> Result<Bare> {
        let mut negotiation = Negotiation::co_open_uri(uri)?;
        match most {
            HeaderStyle::Simple => {}
            HeaderStyle::Structured => {
                negotiation.co_structured_reply()?;
            }
            HeaderStyle::Extended => {
                negotiation.co_best_style()?;
            }
        }
        let (negotiation, info) = negotiation.co_choose(&uri.export)?;
        negotiation.stream.set_read_deadline(None);
        negotiation.stream.set_write_deadline(None);
        Ok(Bare { stream: negotiation.stream, style: negotiation.style, info })
    }

    /// Says goodbye, if nothing is in the way, and hangs up. Yields.
    pub fn co_close(&self) {
        let header =
            RequestHeader { flags: CmdFlags::empty(), cmd: NBD_CMD_DISC, cookie: 0, offset: 0, len: 0 };
        // The server may be gone, or not reading: then there is nobody to say it to.
        let _ = match self.style {
            HeaderStyle::Extended => self.stream.try_writev(&[IoSlice::new(&header.encode_extended())]),
            _ => self.stream.try_writev(&[IoSlice::new(&header.encode())]),
        };
        self.stream.co_close();
    }
}

/// Cuts a client's connection from any thread.
#[derive(Clone)]
pub struct Interrupter(Arc<CoStream>);

impl Interrupter {
    /// Makes every request of the client fail soon.
    pub fn interrupt(&self) {
        self.0.interrupt();
    }
}

impl Client {
    /// Connects to the URI's export, with extended headers or else structured replies, and with `base:allocation`, where
    /// the server has them. Yields.
    ///
    /// # Errors
    /// Whatever connecting and negotiating report.
    pub fn co_connect(uri: &Uri) -> Result<Client> {
        let mut negotiation = Negotiation::co_open_uri(uri)?;
        if negotiation.co_best_style()? >= HeaderStyle::Structured {
            match negotiation.co_set_meta_context(&uri.export, &["base:allocation"]) {
                // A server without contexts is fine; one without the export says so again at GO.
                Ok(_) | Err(ClientError::Refused { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        negotiation.co_go(&uri.export)
    }

    fn start(negotiation: Negotiation, info: ExportInfo) -> Result<Client> {
        let home = AioContext::current().expect("negotiations run in coroutines, which have a context");
        negotiation.stream.set_read_deadline(None);
        negotiation.stream.set_write_deadline(None);
        let shared = Arc::new(Shared {
            stream: negotiation.stream,
            style: negotiation.style,
            home,
            state: Mutex::new(State { helpers: 2, ..State::default() }),
        });
        let sender = Arc::clone(&shared);
        Coroutine::new(move || co_send_loop(&sender)).schedule(&shared.home);
        let receiver = Arc::clone(&shared);
        Coroutine::new(move || co_receive_loop(&receiver)).schedule(&shared.home);
        Ok(Client { shared, info, contexts: negotiation.contexts, address: negotiation.address })
    }

    /// What the server said about the export.
    #[must_use]
    pub fn info(&self) -> &ExportInfo {
        &self.info
    }

    /// Size of the export in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.info.size
    }

    /// The server's address.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Whether replies are structured; extended headers include that.
    #[must_use]
    pub fn is_structured(&self) -> bool {
        self.shared.style >= HeaderStyle::Structured
    }

    /// How requests and replies look.
    #[must_use]
    pub fn header_style(&self) -> HeaderStyle {
        self.shared.style
    }

    /// The selected metadata contexts: id and name.
    #[must_use]
    pub fn contexts(&self) -> &[(u32, String)] {
        &self.contexts
    }

    /// A handle for other threads that cuts the connection.
    #[must_use]
    pub fn interrupter(&self) -> Interrupter {
        Interrupter(Arc::clone(self.shared.stream.stream()))
    }

    /// Requests that wait for their answer.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.shared.lock().in_flight
    }

    /// Fills `buf` from `offset` and gives it back. Yields.
    ///
    /// # Errors
    /// `Request` with the server's errno; `Ended` when the connection is gone.
    pub fn co_read(&self, offset: u64, buf: IoBuf) -> Result<IoBuf> {
        let len = u32_len(&buf).into();
        let slot = self.co_request(NBD_CMD_READ, CmdFlags::empty(), offset, len, Some(buf))?;
        Ok(slot.buf.expect("a finished read has its buffer"))
    }

    /// Writes `buf` at `offset` and gives it back. Yields.
    ///
    /// # Errors
    /// As [`Client::co_read`].
    pub fn co_write(&self, offset: u64, buf: IoBuf, flags: CmdFlags) -> Result<IoBuf> {
        let len = u32_len(&buf).into();
        let slot = self.co_request(NBD_CMD_WRITE, self.payload_flag(flags), offset, len, Some(buf))?;
        Ok(slot.buf.expect("a finished write has its buffer"))
    }

    /// Makes all finished writes durable. Yields.
    ///
    /// # Errors
    /// As [`Client::co_read`].
    pub fn co_flush(&self) -> Result<()> {
        self.co_request(NBD_CMD_FLUSH, CmdFlags::empty(), 0, 0, None).map(drop)
    }

    /// Gives a range up. Yields.
    ///
    /// # Errors
    /// As [`Client::co_read`].
    pub fn co_trim(&self, offset: u64, len: u64, flags: CmdFlags) -> Result<()> {
        self.co_request(NBD_CMD_TRIM, flags, offset, len, None).map(drop)
    }

    /// Makes a range read as zeroes. Yields.
    ///
    /// # Errors
    /// As [`Client::co_read`].
    pub fn co_write_zeroes(&self, offset: u64, len: u64, flags: CmdFlags) -> Result<()> {
        self.co_request(NBD_CMD_WRITE_ZEROES, flags, offset, len, None).map(drop)
    }

    /// Prefetches a range. Yields.
    ///
    /// # Errors
    /// As [`Client::co_read`].
    pub fn co_cache(&self, offset: u64, len: u64) -> Result<()> {
        self.co_request(NBD_CMD_CACHE, CmdFlags::empty(), offset, len, None).map(drop)
    }

    /// The extents of a range, per selected context id. The last one may reach past the range. Yields.
    ///
    /// # Errors
    /// As [`Client::co_read`]; `Unsupported` without a selected context.
    pub fn co_block_status(
        &self,
        offset: u64,
        len: u64,
        flags: CmdFlags,
    ) -> Result<Vec<(u32, Vec<StatusExtent>)>> {
        if self.contexts.is_empty() {
            return Err(ClientError::Unsupported(
                "the server offers no metadata context: block status is unknown",
            ));
        }
        let slot = self.co_request(NBD_CMD_BLOCK_STATUS, flags, offset, len, None)?;
        Ok(slot.extents)
    }

    /// As [`Client::co_block_status`], for some of the selected contexts only. Yields.
    ///
    /// # Errors
    /// As [`Client::co_read`]; `Unsupported` when the server has no `NBD_FLAG_BLOCK_STATUS_PAYLOAD`.
    pub fn co_block_status_of(
        &self,
        offset: u64,
        len: u64,
        flags: CmdFlags,
        ids: &[u32],
    ) -> Result<Vec<(u32, Vec<StatusExtent>)>> {
        if !self.info.flags.contains(TransmissionFlags::NBD_FLAG_BLOCK_STATUS_PAYLOAD) {
            return Err(ClientError::Unsupported("the server cannot ask some contexts and not others"));
        }
        let payload = StatusFilter { effect_len: len, ids: ids.to_vec() }.encode();
        let flags = flags | CmdFlags::NBD_CMD_FLAG_PAYLOAD_LEN;
        let payload_len = payload.len() as u64;
        let buf = Some(IoBuf::from(&payload[..]));
        let slot = self.co_request(NBD_CMD_BLOCK_STATUS, flags, offset, payload_len, buf)?;
        Ok(slot.extents)
    }

    /// Marks a payload where headers are extended.
    fn payload_flag(&self, flags: CmdFlags) -> CmdFlags {
        match self.shared.style {
            HeaderStyle::Extended => flags | CmdFlags::NBD_CMD_FLAG_PAYLOAD_LEN,
            _ => flags,
        }
    }

    /// Sends any request as it is, also one that breaks the rules; for tests of servers. Yields.
    ///
    /// # Errors
    /// As [`Client::co_read`].
    pub fn co_raw(&self, cmd: u16, flags: CmdFlags, offset: u64, len: u32) -> Result<()> {
        let buf = match cmd {
            NBD_CMD_READ | NBD_CMD_WRITE => Some(IoBuf::zeroed(len as usize)),
            _ => None,
        };
        let flags = if cmd == NBD_CMD_WRITE { self.payload_flag(flags) } else { flags };
        self.co_request(cmd, flags, offset, len.into(), buf).map(drop)
    }

    /// Queues a request and yields until it is answered.
    fn co_request(
        &self,
        cmd: u16,
        flags: CmdFlags,
        offset: u64,
        len: u64,
        buf: Option<IoBuf>,
    ) -> Result<Slot> {
        if self.shared.style != HeaderStyle::Extended && len > u64::from(u32::MAX) {
            return Err(ClientError::Unsupported(
                "requests about 4 GiB and more need extended headers, which the server does not have",
            ));
        }
        let me = Coroutine::current().expect("requests are made in coroutines");
        debug_assert!(self.shared.home.is_home(), "a request off the client's home context");
        let (index, sender) = {
            let mut state = self.shared.lock();
            if let Some(ended) = &state.ended {
                return Err(ClientError::Ended(Arc::clone(ended)));
            }
            if state.closing {
                return Err(ClientError::Closed);
            }
            state.next_generation = state.next_generation.wrapping_add(1);
            let generation = state.next_generation;
            let has_buf = buf.is_some();
            let slot = Slot {
                generation,
                cmd,
                offset,
                len,
                buf,
                sending: false,
                answer: None,
                error: None,
                covered: Vec::new(),
                extents: Vec::new(),
                waiter: Some(me.clone()),
            };
            let index = match state.free.pop() {
                Some(index) => {
                    state.slots[index] = Some(slot);
                    index
                }
                None => {
                    state.slots.push(Some(slot));
                    state.slots.len() - 1
                }
            };
            state.in_flight += 1;
            let cookie = (u64::from(generation) << 32) | index as u64;
            let has_payload =
                cmd == NBD_CMD_WRITE || flags.contains(CmdFlags::NBD_CMD_FLAG_PAYLOAD_LEN) && has_buf;
            let header = RequestHeader { flags, cmd, cookie, offset, len };
            state.outgoing.push_back(self.shared.outgoing(header, has_payload.then_some(index)));
            (index, state.idle_sender.take())
        };
        if let Some(sender) = sender {
            sender.wake_later();
        }
        loop {
            co_yield();
            let mut state = self.shared.lock();
            let slot = state.slots[index].as_mut().expect("only its requester empties a slot");
            if !slot.is_complete() && (state.ended.is_none() || slot_is_sending(&state, index)) {
                // Woken early: wait on.
                if let Some(slot) = state.slots[index].as_mut() {
                    slot.waiter = Some(me.clone());
                }
                continue;
            }
            let slot = state.slots[index].take().expect("checked above");
            state.free.push(index);
            state.in_flight -= 1;
            return match slot.answer {
                Some(Answer::Done) => Ok(slot),
                Some(Answer::Error(errno, message)) => {
                    Err(ClientError::Request { cmd, offset, len, errno, message })
                }
                None => {
                    let ended = state.ended.as_ref().expect("woken without an answer only at the end");
                    Err(ClientError::Ended(Arc::clone(ended)))
                }
            };
        }
    }

    /// Ends the session: sends NBD_CMD_DISC and waits for the server to close, briefly. No request may be in flight. Yields.
    pub fn co_close(self) {
        let sender = {
            let mut state = self.shared.lock();
            state.closing = true;
            if state.ended.is_none() {
                let header = RequestHeader {
                    flags: CmdFlags::empty(),
                    cmd: NBD_CMD_DISC,
                    cookie: 0,
                    offset: 0,
                    len: 0,
                };
                state.outgoing.push_back(self.shared.outgoing(header, None));
            }
            state.idle_sender.take()
        };
        if let Some(sender) = sender {
            sender.wake_later();
        }
        let deadline = self.shared.home.now_ns().saturating_add(CLOSE_TIMEOUT.as_nanos() as u64);
        self.shared.stream.set_read_deadline(Some(deadline));
        self.shared.stream.set_write_deadline(Some(deadline));
        // The receiver is waiting already, without a deadline: let it take notice of the new one.
        self.shared.stream.stream().kick_reader();
        loop {
            {
                let mut state = self.shared.lock();
                if state.helpers == 0 {
                    return;
                }
                state.closer = Coroutine::current();
            }
            co_yield();
        }
    }
}

fn slot_is_sending(state: &State, index: usize) -> bool {
    state.slots[index].as_ref().is_some_and(|slot| slot.sending)
}

impl Drop for Client {
    fn drop(&mut self) {
        let helpers = self.shared.lock().helpers;
        if helpers > 0 {
            self.shared.end(ClientError::Closed);
        }
    }
}

fn u32_len(buf: &IoBuf) -> u32 {
    u32::try_from(buf.len()).expect("a request is shorter than 4 GiB")
}

/// Sends what is queued, many requests per system call.
fn co_send_loop(shared: &Arc<Shared>) {
    let mut batch: Vec<Outgoing> = Vec::with_capacity(SEND_BATCH);
    let mut payloads: Vec<(usize, IoBuf)> = Vec::with_capacity(SEND_BATCH);
    loop {
        let disconnecting = {
            let mut state = shared.lock();
            if state.ended.is_some() {
                break;
            }
            if state.outgoing.is_empty() {
                if state.closing {
                    break;
                }
                state.idle_sender = Coroutine::current();
                drop(state);
                co_yield();
                continue;
            }
            let take = state.outgoing.len().min(SEND_BATCH);
            batch.extend(state.outgoing.drain(..take));
            for item in &batch {
                let Some(index) = item.payload else { continue };
                if let Some(slot) = state.slots[index].as_mut()
                    && let Some(buf) = slot.buf.take()
                {
                    slot.sending = true;
                    payloads.push((index, buf));
                }
            }
            state.closing && state.outgoing.is_empty()
        };
        let outcome = {
            let mut slices = Vec::with_capacity(batch.len() + payloads.len());
            let mut next_payload = payloads.iter();
            for item in &batch {
                slices.push(IoSlice::new(&item.header[..item.header_len]));
                if item.payload.is_some()
                    && let Some((_, buf)) = next_payload.next()
                {
                    slices.push(IoSlice::new(buf));
                }
            }
            shared.stream.co_writev_all(&mut slices)
        };
        batch.clear();
        let mut wake = Vec::new();
        {
            let mut state = shared.lock();
            let ended = state.ended.is_some();
            for (index, buf) in payloads.drain(..) {
                if let Some(slot) = state.slots[index].as_mut() {
                    slot.buf = Some(buf);
                    slot.sending = false;
                    // The answer may have come while the end of the payload was on its way.
                    if slot.answer.is_some() || ended {
                        wake.extend(slot.waiter.take());
                    }
                }
            }
        }
        for waiter in wake {
            waiter.wake();
        }
        if let Err(e) = outcome {
            shared.end(lost("sending requests")(e));
            break;
        }
        if disconnecting {
            shared.stream.co_say_goodbye();
            break;
        }
    }
    shared.helper_ended();
}

/// Bytes read ahead from the socket.
struct ReceiveBuffer<'a> {
    stream: &'a Channel,
    buf: IoBuf,
    start: usize,
    end: usize,
}

impl ReceiveBuffer<'_> {
    fn refill(&mut self) -> io::Result<()> {
        debug_assert!(self.start == self.end);
        self.start = 0;
        self.end = 0;
        loop {
            match self.stream.co_read(&mut self.buf) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    self.end = n;
                    return Ok(());
                }
                // `kick_reader`: a deadline was set meanwhile.
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Fills `out`: from what was read ahead, and what is long from the socket straight away.
    fn co_exact(&mut self, mut out: &mut [u8]) -> io::Result<()> {
        while !out.is_empty() {
            let have = self.end - self.start;
            if have > 0 {
                let n = have.min(out.len());
                out[..n].copy_from_slice(&self.buf[self.start..self.start + n]);
                self.start += n;
                out = &mut out[n..];
            } else if out.len() >= RECEIVE_BUFFER {
                match self.stream.co_read(out) {
                    Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Ok(n) => out = &mut out[n..],
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(e),
                }
            } else {
                self.refill()?;
            }
        }
        Ok(())
    }
}

/// Reads replies and hands them to their requesters, until the connection ends.
fn co_receive_loop(shared: &Arc<Shared>) {
    let mut rx = ReceiveBuffer { stream: &shared.stream, buf: IoBuf::new(RECEIVE_BUFFER), start: 0, end: 0 };
    let error = loop {
        if let Err(e) = co_receive_one(shared, &mut rx) {
            break e;
        }
    };
    shared.end(error);
    shared.helper_ended();
}

fn co_receive_one(shared: &Shared, rx: &mut ReceiveBuffer<'_>) -> Result<()> {
    let waiting = lost("waiting for replies");
    let mut header = [0; ReplyHeader::LEN];
    rx.co_exact(&mut header).map_err(&waiting)?;
    match ReplyHeader::decode(&header)? {
        ReplyHeader::Simple(reply) => co_simple_reply(shared, rx, reply),
        ReplyHeader::Chunk(chunk) if shared.style == HeaderStyle::Structured => {
            let mut tail = [0; ReplyHeader::TAIL_LEN];
            rx.co_exact(&mut tail).map_err(&waiting)?;
            co_chunk(shared, rx, chunk.with_tail(tail))
        }
        ReplyHeader::Extended(chunk) if shared.style == HeaderStyle::Extended => {
            let mut tail = [0; ReplyHeader::EXTENDED_TAIL_LEN];
            rx.co_exact(&mut tail).map_err(&waiting)?;
            let chunk = chunk.with_extended_tail(tail);
            let asked = find(&mut shared.lock(), chunk.cookie)?.1.offset;
            if chunk.offset != asked {
                return Err(ClientError::Lie(format!(
                    "a chunk repeats the offset {} of a request at {asked}",
                    chunk.offset
                )));
            }
            co_chunk(shared, rx, chunk)
        }
        ReplyHeader::Chunk(_) | ReplyHeader::Extended(_) => {
            Err(ClientError::Lie("a structured reply of a kind that was not negotiated".to_owned()))
        }
    }
}

/// Finds the request that a cookie names.
fn find(state: &mut State, cookie: u64) -> Result<(usize, &mut Slot)> {
    let index = (cookie & 0xffff_ffff) as usize;
    let generation = (cookie >> 32) as u32;
    match state.slots.get_mut(index).and_then(Option::as_mut) {
        Some(slot) if slot.generation == generation && slot.answer.is_none() => Ok((index, slot)),
        _ => Err(ClientError::Lie(format!("a reply to no request of ours (cookie {cookie:#x})"))),
    }
}

/// Completes a request and wakes its requester.
fn complete(shared: &Shared, cookie: u64, answer: Answer) -> Result<()> {
    let waiter = {
        let mut state = shared.lock();
        let (_, slot) = find(&mut state, cookie)?;
        slot.answer = Some(answer);
        if slot.is_complete() { slot.waiter.take() } else { None }
    };
    if let Some(waiter) = waiter {
        waiter.wake();
    }
    Ok(())
}

fn co_simple_reply(shared: &Shared, rx: &mut ReceiveBuffer<'_>, reply: SimpleReply) -> Result<()> {
    let cookie = reply.cookie;
    let data = {
        let mut state = shared.lock();
        let (_, slot) = find(&mut state, cookie)?;
        match (slot.cmd, reply.error) {
            _ if shared.style == HeaderStyle::Extended => {
                return Err(ClientError::Lie("a simple reply, though headers are extended".to_owned()));
            }
            (NBD_CMD_READ | NBD_CMD_BLOCK_STATUS, _) if shared.style == HeaderStyle::Structured => {
                return Err(ClientError::Lie(format!("a simple reply to {}", cmd_name(slot.cmd))));
            }
            (NBD_CMD_READ, None) => slot.buf.take(),
            _ => None,
        }
    };
    if let Some(mut buf) = data {
        rx.co_exact(&mut buf).map_err(lost("reading data"))?;
        let mut state = shared.lock();
        find(&mut state, cookie)?.1.buf = Some(buf);
    }
    complete(
        shared,
        cookie,
        match reply.error {
            None => Answer::Done,
            Some(errno) => Answer::Error(errno, String::new()),
        },
    )
}

fn co_chunk(shared: &Shared, rx: &mut ReceiveBuffer<'_>, chunk: ChunkHeader) -> Result<()> {
    let cookie = chunk.cookie;
    match chunk.chunk_type {
        NBD_REPLY_TYPE_OFFSET_DATA => co_data_chunk(shared, rx, chunk)?,
        chunk_type => {
            let limit = match chunk_type {
                NBD_REPLY_TYPE_BLOCK_STATUS if shared.style == HeaderStyle::Structured => STATUS_CHUNK_MAX,
                NBD_REPLY_TYPE_BLOCK_STATUS_EXT if shared.style == HeaderStyle::Extended => STATUS_CHUNK_MAX,
                t if t & NBD_REPLY_TYPE_FLAG_ERROR != 0 => ERROR_CHUNK_MAX,
                _ => 12,
            };
            if chunk.len > u64::from(limit) {
                return Err(ClientError::Lie(format!(
                    "a chunk of type {chunk_type} with {} bytes",
                    chunk.len
                )));
            }
            // Before memory is taken: is there such a request at all?
            find(&mut shared.lock(), cookie)?;
            let mut payload = vec![0; chunk.len as usize];
            rx.co_exact(&mut payload).map_err(lost("reading a reply"))?;
            store_chunk(&mut shared.lock(), cookie, Chunk::decode(chunk_type, &payload)?)?;
        }
    }
    if !chunk.flags.contains(ReplyFlags::NBD_REPLY_FLAG_DONE) {
        return Ok(());
    }
    let answer = {
        let mut state = shared.lock();
        let (_, slot) = find(&mut state, cookie)?;
        match slot.error.take() {
            Some((errno, message)) => Answer::Error(errno, message),
            None if slot.cmd == NBD_CMD_READ && slot.len > 0 && slot.covered != [(0, slot.len as u32)] => {
                return Err(ClientError::Lie(format!(
                    "a read at offset {} of {} bytes was answered with less",
                    slot.offset, slot.len
                )));
            }
            None if slot.cmd == NBD_CMD_BLOCK_STATUS && slot.extents.is_empty() => {
                return Err(ClientError::Lie("block status without an extent".to_owned()));
            }
            None => Answer::Done,
        }
    };
    complete(shared, cookie, answer)
}

/// Checks that a content chunk lies in its read; returns its place in the buffer.
fn claim_range(slot: &mut Slot, offset: u64, len: u32) -> Result<(usize, usize)> {
    let lie = |what: &str| {
        ClientError::Lie(format!(
            "{what}: {len} bytes at offset {offset}, in reply to a {} of other bytes",
            cmd_name(slot.cmd)
        ))
    };
    if slot.cmd != NBD_CMD_READ {
        return Err(lie("data that nobody asked for"));
    }
    let start = offset.checked_sub(slot.offset).ok_or_else(|| lie("data from before the request"))?;
    let end = start.checked_add(u64::from(len)).filter(|end| *end <= slot.len);
    let end = end.ok_or_else(|| lie("data from behind the request"))?;
    if !slot.cover(start as u32, end as u32) {
        return Err(ClientError::Lie(format!(
            "the same data twice, or in too many pieces, at offset {offset}"
        )));
    }
    Ok((start as usize, end as usize))
}

fn co_data_chunk(shared: &Shared, rx: &mut ReceiveBuffer<'_>, chunk: ChunkHeader) -> Result<()> {
    if chunk.len <= 8 {
        return Err(ClientError::Lie("an empty data chunk".to_owned()));
    }
    let mut offset = [0; 8];
    rx.co_exact(&mut offset).map_err(lost("reading a reply"))?;
    let offset = u64::from_be_bytes(offset);
    let (mut buf, range) = {
        let mut state = shared.lock();
        let (_, slot) = find(&mut state, chunk.cookie)?;
        let len = u32::try_from(chunk.len - 8)
            .map_err(|_| ClientError::Lie(format!("a data chunk of {} bytes", chunk.len)))?;
        let range = claim_range(slot, offset, len)?;
        (slot.buf.take().expect("the receiver gives it back after each chunk"), range)
    };
    let outcome = rx.co_exact(&mut buf[range.0..range.1]).map_err(lost("reading data"));
    let mut state = shared.lock();
    find(&mut state, chunk.cookie)?.1.buf = Some(buf);
    outcome
}

/// Takes a chunk other than data into its request.
fn store_chunk(state: &mut State, cookie: u64, chunk: Chunk<'_>) -> Result<()> {
    let (_, slot) = find(state, cookie)?;
    match chunk {
        Chunk::None => {}
        Chunk::Data { .. } => return Err(ClientError::Lie("an empty data chunk".to_owned())),
        Chunk::Hole { offset, len } => {
            let (start, end) = claim_range(slot, offset, len)?;
            slot.buf.as_mut().expect("the receiver gives it back after each chunk")[start..end].fill(0);
        }
        Chunk::BlockStatus { context_id, extents } => {
            if slot.cmd != NBD_CMD_BLOCK_STATUS {
                return Err(ClientError::Lie(format!("block status in reply to {}", cmd_name(slot.cmd))));
            }
            if slot.extents.iter().any(|(id, _)| *id == context_id) {
                return Err(ClientError::Lie(format!("two status chunks of context {context_id}")));
            }
            slot.extents.push((context_id, extents));
        }
        Chunk::Error { error, message, .. } => {
            if slot.error.is_none() {
                slot.error = Some((error, message.to_owned()));
            }
        }
    }
    Ok(())
}
