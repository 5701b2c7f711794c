//! Backing images on an NBD server: what an image's name for one means, and a read-only node over a connection to it.
//!
//! ```text
//!   any context                            the thread "nbd-backing" (one per process)
//!   qcow2 ── NbdNode::co_preadv ──┐        ┌── Client (one per node, any number of requests in flight)
//!                 waits           ├─ Call ─┤
//!                 copies ◀────────┘        └── connects again when the connection is lost; time limits
//! ```
//! A connection stays on the event loop where it was made. All of them are made on one thread of their own, because an image is
//! also opened, resized and closed on loops that do not last. So no IOThread ever waits for the server, also if that is
//! this very process.
//!
//! A read that is answered with an error is EIO. One whose connection is lost is tried once more over a new one; one that is not
//! answered in time cuts the connection. When nobody can be connected to, reads fail at once for a moment instead of waiting each.
//! A server that comes back with a smaller export is not believed.

use super::client::{Address, Client, ClientError, Uri};
use super::proto::{CmdFlags, NBD_DEFAULT_PORT, NBD_MAX_STRING, StateFlags};
use crate::aio::{AioConfig, AioContext, IoThread};
use crate::block::{self, BlockNode, Error, Extent, Limits, OpenRemote, RemoteName, StatusFlags, WriteFlags};
use crate::co::{CoMutex, CoQueue, Coroutine, co_timeout};
use crate::util::buf::IoBuf;
use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Bytes of one read from the server (ours: the server's own limit may be lower).
const PIECE: u64 = 4 << 20;

/// Bytes of one question for extents: servers without extended headers count them in 32 bits.
const STATUS_PIECE: u64 = 1 << 30;

/// Pause between attempts to connect, in which reads fail at once (ours).
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// How long a server may take.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// From the first packet to the end of the negotiation.
    pub connect: Duration,
    /// For each answer.
    pub request: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience { connect: Duration::from_secs(15), request: Duration::from_secs(30) }
    }
}

/// Opens backing images on NBD servers, for images that may name them.
#[derive(Debug, Clone, Copy, Default)]
pub struct NbdBacking {
    /// How long servers may take.
    pub patience: Patience,
}

impl OpenRemote for NbdBacking {
    fn co_open(&self, name: &RemoteName, from_afar: bool) -> Result<Arc<dyn BlockNode>, String> {
        let uri = uri_of(name)?;
        if from_afar && !matches!(uri.address, Address::Tcp { .. }) {
            return Err(
                "an image that comes from a server must not have us connect to a socket of this host"
                    .to_owned(),
            );
        }
        Ok(NbdNode::co_open(uri, self.patience)?)
    }
}

// ------------------------------------------------------------------------------------------------------ names

/// The URI that a name stands for.
///
/// # Errors
/// What is wrong with it, or not supported.
pub fn uri_of(name: &RemoteName) -> Result<Uri, String> {
    let uri = match name {
        RemoteName::Name(name) => uri_of_text(name)?,
        RemoteName::Keys(keys) => uri_of_keys(keys)?,
    };
    if uri.tls.is_some() {
        return Err(
            "TLS is not supported for backing images: an image must not choose credentials".to_owned()
        );
    }
    if let Address::Unix(path) = &uri.address
        && !path.is_absolute()
        && !path.as_os_str().as_encoded_bytes().starts_with(b"\0")
    {
        return Err(format!("the socket's path {path:?} is not absolute"));
    }
    Ok(uri)
}

/// `nbd://…` and its like, `nbd:HOST:PORT[:exportname=NAME]`, `nbd:unix:PATH[:exportname=NAME]`.
fn uri_of_text(text: &str) -> Result<Uri, String> {
    if let Some(rest) = text.strip_prefix("nbd+tcp://") {
        return format!("nbd://{rest}").parse().map_err(|e: super::client::UriError| e.to_string());
    }
    let old = text.strip_prefix("nbd:").filter(|rest| !rest.starts_with("//"));
    let Some(rest) = old else {
        return text.parse().map_err(|e: super::client::UriError| e.to_string());
    };
    let (server, export) = rest.split_once(":exportname=").unwrap_or((rest, ""));
    let address = match server.strip_prefix("unix:") {
        Some(path) => unix(path)?,
        None => {
            let (host, port) = server
                .rsplit_once(':')
                .ok_or_else(|| format!("\"{text}\": the port is missing; write nbd:HOST:PORT"))?;
            let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
            tcp(host, port)?
        }
    };
    whole(address, export)
}

/// The keys of QEMU's `json:` names.
fn uri_of_keys(keys: &BTreeMap<String, String>) -> Result<Uri, String> {
    let mut keys = keys.clone();
    let export = keys.remove("export").unwrap_or_default();
    // `server.data.` is how older versions wrote it.
    let mut take = |key: &str| {
        let spellings = [format!("server.{key}"), format!("server.data.{key}"), key.to_owned()];
        spellings.iter().find_map(|k| keys.remove(k))
    };
    let kind = take("type");
    let (host, port, path) = (take("host"), take("port"), take("path"));
    let address = match (kind.as_deref(), host, path) {
        (None | Some("inet"), Some(host), None) => tcp(&host, &port.unwrap_or_default())?,
        (None | Some("unix"), None, Some(path)) if port.is_none() => unix(&path)?,
        (None | Some("inet" | "unix"), ..) => {
            return Err("it needs either host (and port) or path".to_owned());
        }
        (Some(other), ..) => return Err(format!("the server type {other:?} is not supported")),
    };
    // How to reconnect is ours to say.
    for key in ["reconnect-delay", "open-timeout", "server.to"] {
        keys.remove(key);
    }
    match keys.keys().next() {
        Some(key) => Err(format!("the key {key:?} is not supported")),
        None => whole(address, &export),
    }
}

fn tcp(host: &str, port: &str) -> Result<Address, String> {
    if host.is_empty() {
        return Err("the host is empty".to_owned());
    }
    let port = match port {
        "" => NBD_DEFAULT_PORT,
        port => port.parse().map_err(|_| format!("{port:?} is no port"))?,
    };
    Ok(Address::Tcp { host: host.to_owned(), port })
}

fn unix(path: &str) -> Result<Address, String> {
    if path.is_empty() || path.contains('\0') {
        return Err("the socket's path is empty, or contains NUL".to_owned());
    }
    Ok(Address::Unix(PathBuf::from(path)))
}

fn whole(address: Address, export: &str) -> Result<Uri, String> {
    if export.len() > NBD_MAX_STRING || export.contains('\0') {
        return Err(format!("the export's name is longer than {NBD_MAX_STRING} bytes, or contains NUL"));
    }
    Ok(Uri { address, export: export.to_owned(), tls: None })
}

// ------------------------------------------------------------------------------------------------------- node

/// The loop that all connections live on. It ends with the process.
static LOOP: Mutex<Option<IoThread>> = Mutex::new(None);

fn backing_loop() -> io::Result<Arc<AioContext>> {
    let mut there = LOOP.lock().unwrap_or_else(PoisonError::into_inner);
    if there.is_none() {
        let config = AioConfig { name: "nbd-backing".to_owned(), ..AioConfig::default() };
        *there = Some(IoThread::spawn(config)?);
    }
    Ok(Arc::clone(there.as_ref().expect("it was made above").context()))
}

/// An export of an NBD server, for reading. Any thread.
pub struct NbdNode {
    /// The URI.
    name: String,
    len: u64,
    /// Smallest and longest request, in bytes.
    min: u64,
    max: u64,
    preferred: u32,
    home: Arc<AioContext>,
    link: Arc<Link>,
}

/// The connection of a node. Used by coroutines of the loop above only, but for what is in front of `state`.
struct Link {
    uri: Uri,
    patience: Patience,
    state: CoMutex<Connection>,
}

#[derive(Default)]
struct Connection {
    client: Option<Arc<Client>>,
    /// Bytes that the export had at first; 0: not known yet.
    len: u64,
    /// When the last attempt to connect failed, by the loop's clock, and why.
    failed: Option<(u64, String)>,
}

impl NbdNode {
    /// Connects, and finds out what there is. Coroutine only; yields.
    ///
    /// # Errors
    /// Why there is nothing to read, in one line.
    pub fn co_open(uri: Uri, patience: Patience) -> Result<Arc<NbdNode>, String> {
        let name = uri.to_string();
        let home = backing_loop().map_err(|e| format!("{name}: no event loop: {e}"))?;
        let link = Arc::new(Link { uri, patience, state: CoMutex::new(Connection::default()) });
        let first = Arc::clone(&link);
        let info = co_call(&home, move || first.co_client().map(|c| c.info().clone()))
            .map_err(|why| format!("{name}: {why}"))?;
        let sizes = info.effective_block_sizes();
        let min = u64::from(sizes.min.max(1));
        Ok(Arc::new(NbdNode {
            name,
            len: info.size,
            min,
            max: (PIECE.min(sizes.max.into()) / min * min).max(min),
            preferred: sizes.preferred.clamp(4096, 1 << 20),
            home,
            link,
        }))
    }

    /// Does `f` with the connection, on its thread; once more when the connection is lost meanwhile.
    fn co_ask<T: Send + 'static>(
        &self,
        op: &'static str,
        offset: u64,
        f: impl Fn(&Client) -> Result<T, ClientError> + Send + Sync + 'static,
    ) -> block::Result<T> {
        let link = Arc::clone(&self.link);
        let f = Arc::new(f);
        co_call(&self.home, move || link.co_try(&f))
            .map_err(|why| Error::new(op, &self.name, offset, io::Error::other(why)))
    }

    /// Reads whole blocks, at most `max` bytes.
    fn co_read_piece(&self, offset: u64, len: u64) -> block::Result<IoBuf> {
        let no_memory = || Error::new("read", &self.name, offset, io::ErrorKind::OutOfMemory.into());
        let len = usize::try_from(len).map_err(|_| no_memory())?;
        self.co_ask("read", offset, move |client| {
            let buf =
                IoBuf::try_new(len).ok_or(ClientError::Unsupported("there is no memory for the reply"))?;
            client.co_read(offset, buf)
        })
    }
}

impl Drop for NbdNode {
    fn drop(&mut self) {
        // The goodbye is said where the connection lives; at the end of the process there may be no time for it.
        let link = Arc::clone(&self.link);
        Coroutine::new(move || {
            let client = link.state.co_lock().client.take();
            if let Some(client) = client.and_then(Arc::into_inner) {
                client.co_close();
            }
        })
        .schedule(&self.home);
    }
}

/// What a caller waits for.
struct Call<T> {
    result: Mutex<Option<Result<T, String>>>,
    done: CoQueue,
}

impl<T> Call<T> {
    fn lock(&self) -> MutexGuard<'_, Option<Result<T, String>>> {
        self.result.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs `f` in a coroutine of `home`, and waits for it. `f` has time limits of its own. Coroutine only; yields.
fn co_call<T: Send + 'static>(
    home: &Arc<AioContext>,
    f: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    let call = Arc::new(Call { result: Mutex::new(None), done: CoQueue::new() });
    let (tell, at_exit) = (Arc::clone(&call), Arc::clone(&call));
    Coroutine::builder()
        .name("nbd-backing")
        .on_exit(move |_| {
            // Without a result there was a panic, which has been logged.
            at_exit.lock().get_or_insert_with(|| Err("an internal error".to_owned()));
            at_exit.done.restart_all();
        })
        .build(move || {
            let result = f();
            *tell.lock() = Some(result);
        })
        .schedule(home);
    let mut result = call.lock();
    loop {
        if let Some(result) = result.take() {
            return result;
        }
        result = call.done.co_wait_with((&call.result, result)).1;
    }
}

impl Link {
    /// Does `f`, over a new connection if the one that there was is lost.
    fn co_try<T: Send + 'static>(
        &self,
        f: &Arc<impl Fn(&Client) -> Result<T, ClientError> + Send + Sync + 'static>,
    ) -> Result<T, String> {
        let mut again = true;
        loop {
            let client = self.co_client()?;
            let (asked, f) = (Arc::clone(&client), Arc::clone(f));
            let ns = nanos(self.patience.request);
            let why = match co_timeout(ns, move || f(&asked), drop) {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(e @ (ClientError::Request { .. } | ClientError::Unsupported(_)))) => {
                    return Err(explain(&e));
                }
                Ok(Err(e)) => explain(&e),
                Err(e) => {
                    client.interrupter().interrupt();
                    again = false;
                    match e.kind() {
                        io::ErrorKind::TimedOut => "the server did not answer in time".to_owned(),
                        _ => e.to_string(),
                    }
                }
            };
            self.forget(&client);
            if !std::mem::take(&mut again) {
                return Err(why);
            }
            tracing::warn!(node = %self.uri, error = why, "connection to the server of a backing image lost");
        }
    }

    /// Drops the connection, unless somebody has made another meanwhile.
    fn forget(&self, client: &Arc<Client>) {
        let mut state = self.state.co_lock();
        if state.client.as_ref().is_some_and(|now| Arc::ptr_eq(now, client)) {
            state.client = None;
        }
    }

    /// The connection; made if there is none.
    fn co_client(&self) -> Result<Arc<Client>, String> {
        let now = || AioContext::current().expect("calls run on the loop of the connections").now_ns();
        let mut state = self.state.co_lock();
        if let Some(client) = &state.client {
            return Ok(Arc::clone(client));
        }
        if let Some((at, why)) = &state.failed
            && now().saturating_sub(*at) < nanos(RETRY_PAUSE)
        {
            return Err(why.clone());
        }
        let uri = self.uri.clone();
        // One that comes too late is cut.
        let connected = match co_timeout(nanos(self.patience.connect), move || Client::co_connect(&uri), drop)
        {
            Ok(Ok(client)) if client.size() < state.len => {
                Err(format!("the export had {} bytes, and has {} now", state.len, client.size()))
            }
            Ok(Ok(client)) => Ok(client),
            Ok(Err(e)) => Err(explain(&e)),
            Err(e) if e.kind() == io::ErrorKind::TimedOut => {
                Err("the server did not answer in time".to_owned())
            }
            Err(e) => Err(e.to_string()),
        };
        match connected {
            Ok(client) => {
                let client = Arc::new(client);
                if state.len > 0 {
                    tracing::info!(node = %self.uri, "connected to the server of a backing image again");
                }
                // It may be larger for a while: what must not change is what was there at first.
                let len = if state.len > 0 { state.len } else { client.size() };
                *state = Connection { len, client: Some(Arc::clone(&client)), failed: None };
                Ok(client)
            }
            Err(why) => {
                tracing::warn!(node = %self.uri, error = why, "cannot connect to the server of a backing image");
                state.failed = Some((now(), why.clone()));
                Err(why)
            }
        }
    }
}

fn nanos(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}

/// An error with its sources, in one line.
fn explain(e: &ClientError) -> String {
    let mut text = e.to_string();
    let mut source = std::error::Error::source(e);
    while let Some(e) = source {
        text.push_str(&format!(": {e}"));
        source = e.source();
    }
    text
}

impl BlockNode for NbdNode {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn read_only(&self) -> bool {
        true
    }

    fn limits(&self) -> Limits {
        Limits { request_alignment: 1, preferred: self.preferred, fast_zero: false, rotational: false }
    }

    fn co_preadv(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> block::Result<()> {
        let len: u64 = bufs.iter().map(|b| b.len() as u64).sum();
        let end = offset + len;
        assert!(end <= self.len, "the range was validated above");
        // Whole blocks of the server, as far as its export has them.
        let (mut at, high) = (offset - offset % self.min, end.next_multiple_of(self.min).min(self.len));
        let mut rest = bufs.iter_mut().flat_map(|b| b.chunks_mut(1 << 16)).peekable();
        let mut filled = 0;
        while at < high {
            let n = (high - at).min(self.max);
            let piece = self.co_read_piece(at, n)?;
            let mut from = &piece[(offset.max(at) - at) as usize..(end.min(at + n) - at) as usize];
            while !from.is_empty() {
                let to = rest.peek_mut().expect("there is room for what was asked");
                let k = from.len().min(to.len() - filled);
                to[filled..filled + k].copy_from_slice(&from[..k]);
                from = &from[k..];
                filled += k;
                if filled == to.len() {
                    rest.next();
                    filled = 0;
                }
            }
            at += n;
        }
        Ok(())
    }

    fn co_pwritev(&self, offset: u64, _: &[IoSlice<'_>], _: WriteFlags) -> block::Result<()> {
        Err(Error::from_errno("pwritev", &self.name, offset, libc::EPERM))
    }

    fn co_pwrite_zeroes(&self, offset: u64, _: u64, _: WriteFlags) -> block::Result<()> {
        Err(Error::from_errno("write_zeroes", &self.name, offset, libc::EPERM))
    }

    fn co_pdiscard(&self, offset: u64, _: u64) -> block::Result<()> {
        Err(Error::from_errno("discard", &self.name, offset, libc::EPERM))
    }

    fn co_flush(&self) -> block::Result<()> {
        Ok(())
    }

    fn co_block_status(&self, offset: u64, len: u64) -> block::Result<Extent> {
        assert!(len > 0 && offset + len <= self.len, "the range was validated above");
        let (low, high) =
            (offset - offset % self.min, (offset + len).next_multiple_of(self.min).min(self.len));
        let asked = (high - low).min(STATUS_PIECE);
        let data = Extent { len, flags: StatusFlags::DATA };
        let extents = self.co_ask("block status", offset, move |client| {
            match client.co_block_status(low, asked, CmdFlags::empty()) {
                // "Data" is always a true answer.
                Err(ClientError::Unsupported(_) | ClientError::Request { .. }) => Ok(Vec::new()),
                other => other,
            }
        })?;
        let Some((_, extents)) = extents.into_iter().next() else { return Ok(data) };
        let mut found: Option<(u64, u64)> = None;
        for e in extents {
            match &mut found {
                None => found = Some((e.len, e.flags)),
                Some((run, flags)) if *flags == e.flags => *run = run.saturating_add(e.len),
                Some(_) => break,
            }
        }
        let Some((run, bits)) = found else { return Ok(data) };
        let state = StateFlags::from_bits_truncate(bits as u32);
        let mut flags = StatusFlags::empty();
        flags.set(StatusFlags::DATA, !state.contains(StateFlags::NBD_STATE_HOLE));
        flags.set(StatusFlags::ZERO, state.contains(StateFlags::NBD_STATE_ZERO));
        // The question began at a block's start.
        match low.saturating_add(run).min(offset + len).checked_sub(offset) {
            Some(len) if len > 0 => Ok(Extent { len, flags }),
            _ => Ok(data),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(text: &str) -> Result<String, String> {
        uri_of(&RemoteName::Name(text.to_owned())).map(|u| u.to_string())
    }

    fn keyed(pairs: &[(&str, &str)]) -> Result<String, String> {
        let keys = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        uri_of(&RemoteName::Keys(keys)).map(|u| u.to_string())
    }

    #[test]
    fn every_spelling_of_qemu_is_the_same_uri() {
        let tcp = Ok("nbd://h:7/e".to_owned());
        assert_eq!(named("nbd://h:7/e"), tcp);
        assert_eq!(named("nbd+tcp://h:7/e"), tcp);
        assert_eq!(named("nbd:h:7:exportname=e"), tcp);
        assert_eq!(
            keyed(&[("server.type", "inet"), ("server.host", "h"), ("server.port", "7"), ("export", "e")]),
            tcp
        );
        assert_eq!(keyed(&[("host", "h"), ("port", "7"), ("export", "e"), ("reconnect-delay", "3")]), tcp);
        assert_eq!(keyed(&[("server.data.host", "h"), ("server.data.port", "7"), ("export", "e")]), tcp);
        let unix = named("nbd+unix:///e?socket=/s");
        assert!(unix.is_ok(), "{unix:?}");
        assert_eq!(named("nbd:unix:/s:exportname=e"), unix);
        assert_eq!(keyed(&[("server.type", "unix"), ("server.path", "/s"), ("export", "e")]), unix);
        assert_eq!(keyed(&[("path", "/s"), ("export", "e")]), unix);
        assert_eq!(named("nbd:[::1]:7"), Ok("nbd://[::1]:7/".to_owned()));
    }

    #[test]
    fn what_cannot_be_connected_to_is_named() {
        for (text, want) in [
            ("nbds://h/e", "TLS is not supported"),
            ("nbd:h", "port is missing"),
            ("nbd:h:x", "\"x\" is no port"),
            ("nbd::1", "host is empty"),
            ("nbd:unix:", "path is empty"),
            ("nbd:unix:relative", "not absolute"),
            ("nbd+ssh://h", "unknown scheme"),
        ] {
            let e = named(text).unwrap_err();
            assert!(e.contains(want), "{text}: {e}");
        }
        for (keys, want) in [
            (&[][..], "host (and port) or path"),
            (&[("host", "h"), ("path", "/p")], "host (and port) or path"),
            (&[("host", "h"), ("tls-creds", "t")], "\"tls-creds\" is not supported"),
            (&[("server.type", "vsock"), ("server.cid", "3")], "\"vsock\" is not supported"),
            (&[("server.type", "unix"), ("server.path", "p")], "not absolute"),
            (&[("host", "h"), ("port", "70000")], "\"70000\" is no port"),
        ] {
            let e = keyed(keys).unwrap_err();
            assert!(e.contains(want), "{keys:?}: {e}");
        }
    }
}
