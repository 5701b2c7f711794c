//! Listening sockets: TCP, unix and vsock, bound all or none, and those that were opened by somebody else.
//!
//! A unix socket file that nobody listens on (its server was killed) is replaced; one that answers is left alone, unless
//! the server was told to take it over. At the end only the file that we made is removed, known by device and inode. A
//! socket that was passed to us is its owner's: it is neither shut down nor removed.

use super::server::{ListenAddr, ServerConfig, ServerError};
use socket2::{Domain, SockRef, TcpKeepalive, Type};
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

/// Time between keepalive probes, and how many may stay unanswered (ours).
const KEEPALIVE_PROBES: (Duration, u32) = (Duration::from_secs(10), 6);
/// What a vsock address that stands for all is shown as: the host, seen from its guests (vsock(7): VMADDR_CID_HOST).
const VSOCK_HOST: u32 = 2;
/// vsock(7): VMADDR_CID_ANY.
pub(super) const VSOCK_ANY: u32 = u32::MAX;

/// A bound socket, listening.
pub(super) struct Listener {
    pub(super) socket: socket2::Socket,
    /// With the port really bound.
    pub(super) addr: ListenAddr,
    /// Device and inode of the socket file; taken when it is removed.
    file: Mutex<Option<(u64, u64)>>,
    /// Opened by somebody else, who may go on with it after us.
    inherited: bool,
    options: SocketOptions,
}

/// What is set on each TCP connection. Zero: nothing.
#[derive(Debug, Clone, Copy)]
pub(super) struct SocketOptions {
    /// Idle time before the first keepalive probe.
    keepalive: Duration,
    /// How long sent data may stay unacknowledged.
    user_timeout: Duration,
}

impl SocketOptions {
    pub(super) fn new(config: &ServerConfig) -> SocketOptions {
        SocketOptions { keepalive: config.keepalive, user_timeout: config.tcp_user_timeout }
    }
}

/// A connection fresh from `accept`.
pub(super) struct Socket {
    pub(super) fd: OwnedFd,
    /// For logs.
    pub(super) peer: String,
}

impl fmt::Display for ListenAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ListenAddr::Tcp(addr) => write!(f, "{addr}"),
            ListenAddr::Unix(path) => write!(f, "unix:{}", path.display()),
            ListenAddr::Vsock { cid: VSOCK_ANY, port } => write!(f, "vsock:{port}"),
            ListenAddr::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
        }
    }
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.addr.fmt(f)
    }
}

/// Binds all addresses and takes the sockets that are listening already; after an error nothing is left of those bound
/// before.
pub(super) fn bind_all(config: &ServerConfig) -> Result<Vec<Listener>, ServerError> {
    let addrs = &config.listen;
    let options = SocketOptions::new(config);
    let mut listeners = Vec::with_capacity(addrs.len());
    for addr in addrs {
        let failed = |source| ServerError::Listen { addr: addr.to_string(), source };
        let (socket, addr, file) = match addr {
            ListenAddr::Tcp(to) => {
                let (socket, bound) = bind_tcp(*to, v6_only(to, addrs), config.backlog).map_err(failed)?;
                (socket, bound, None)
            }
            ListenAddr::Vsock { cid, port } => {
                let (socket, bound) = bind_vsock(*cid, *port, config.backlog).map_err(failed)?;
                (socket, bound, None)
            }
            ListenAddr::Unix(path) => {
                let (socket, file) = bind_unix(path, config.backlog, config.take_over_sockets)?;
                (socket, addr.clone(), Some(file))
            }
        };
        listeners.push(Listener { socket, addr, file: Mutex::new(file), inherited: false, options });
    }
    for fd in &config.inherited {
        listeners.push(inherit(fd.as_fd(), options)?);
    }
    Ok(listeners)
}

/// Takes a socket that somebody else has bound, and that listens.
fn inherit(fd: std::os::fd::BorrowedFd<'_>, options: SocketOptions) -> Result<Listener, ServerError> {
    let failed = |source| ServerError::Listen { addr: "a socket that was passed".to_owned(), source };
    if !rustix::net::sockopt::socket_acceptconn(fd).map_err(|e| failed(e.into()))? {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it does not listen")));
    }
    let socket = socket2::Socket::from(fd.try_clone_to_owned().map_err(failed)?);
    socket.set_nonblocking(true).map_err(failed)?;
    let addr = addr_of(&socket).map_err(failed)?;
    Ok(Listener { socket, addr, file: Mutex::new(None), inherited: true, options })
}

/// The address that a socket is bound to.
fn addr_of(socket: &socket2::Socket) -> io::Result<ListenAddr> {
    let addr = socket.local_addr()?;
    if let Some(tcp) = addr.as_socket() {
        return Ok(ListenAddr::Tcp(tcp));
    }
    if let Some((cid, port)) = addr.as_vsock_address() {
        return Ok(ListenAddr::Vsock { cid, port });
    }
    if addr.is_unix() {
        // An abstract name is shown as the kernel has it, with a NUL in front.
        let name = addr.as_abstract_namespace().map(|name| [b"\0", name].concat());
        let path = addr.as_pathname().map(Path::to_owned);
        return Ok(ListenAddr::Unix(match name {
            Some(name) => PathBuf::from(OsString::from_vec(name)),
            None => path.unwrap_or_default(),
        }));
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "it is none of IPv4, IPv6, unix and vsock"))
}

/// `[::]` takes IPv4 clients too, unless an IPv4 listener of the same port is asked for as well.
fn v6_only(addr: &SocketAddr, all: &[ListenAddr]) -> bool {
    all.iter().any(|other| {
        matches!(other, ListenAddr::Tcp(SocketAddr::V4(v4)) if v4.port() == addr.port() && addr.port() != 0)
    })
}

fn bind_tcp(addr: SocketAddr, v6_only: bool, backlog: i32) -> io::Result<(socket2::Socket, ListenAddr)> {
    let socket = socket2::Socket::new(Domain::for_address(addr), Type::STREAM.nonblocking().cloexec(), None)?;
    // A restarted server must not wait for the old connections' TIME_WAIT.
    socket.set_reuse_address(true)?;
    if addr.is_ipv6() {
        socket.set_only_v6(v6_only)?;
    }
    socket.bind(&addr.into())?;
    socket.listen(backlog)?;
    let bound = addr_of(&socket)?;
    Ok((socket, bound))
}

fn bind_vsock(cid: u32, port: u32, backlog: i32) -> io::Result<(socket2::Socket, ListenAddr)> {
    let socket = socket2::Socket::new(Domain::VSOCK, Type::STREAM.nonblocking().cloexec(), None)?;
    socket.bind(&socket2::SockAddr::vsock(cid, port))?;
    socket.listen(backlog)?;
    let bound = addr_of(&socket)?;
    Ok((socket, bound))
}

/// Binds a unix socket; also returns device and inode of its file.
fn bind_unix(
    path: &Path,
    backlog: i32,
    take_over: bool,
) -> Result<(socket2::Socket, (u64, u64)), ServerError> {
    let failed = |source| ServerError::Listen { addr: format!("unix:{}", path.display()), source };
    let new_socket = || socket2::Socket::new(Domain::UNIX, Type::STREAM.nonblocking().cloexec(), None);
    let addr = socket2::SockAddr::unix(path).map_err(failed)?;
    let socket = new_socket().map_err(failed)?;
    match socket.bind(&addr) {
        Ok(()) => {}
        Err(e) if e.raw_os_error() == Some(libc::EADDRINUSE) => {
            let is_socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
            if !is_socket {
                return Err(ServerError::NotASocket { path: path.to_owned() });
            }
            // Non-blocking: a live server whose queue is full answers EAGAIN, and is alive all the same.
            let dead = || {
                let probed = new_socket().and_then(|probe| probe.connect(&addr));
                probed.is_err_and(|e| e.raw_os_error() == Some(libc::ECONNREFUSED))
            };
            if !take_over && !dead() {
                return Err(ServerError::SocketInUse { path: path.to_owned() });
            }
            match std::fs::remove_file(path) {
                // Its owner has removed it meanwhile.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                removed => removed.map_err(failed)?,
            }
            socket.bind(&addr).map_err(failed)?;
        }
        Err(e) => return Err(failed(e)),
    }
    let file = std::fs::symlink_metadata(path).map(|m| (m.dev(), m.ino())).map_err(failed)?;
    if let Err(e) = socket.listen(backlog) {
        // We made it a moment ago, and nobody could have connected.
        drop(std::fs::remove_file(path));
        return Err(failed(e));
    }
    Ok((socket, file))
}

/// Sets the options of a new connection and names its peer. A peer that is gone already is found out later.
pub(super) fn prepare(socket: &socket2::Socket, options: SocketOptions) -> String {
    let addr = socket.peer_addr().ok();
    if let Some(peer) = addr.as_ref().and_then(socket2::SockAddr::as_socket) {
        if let Err(error) = set_tcp_options(socket, options) {
            tracing::debug!(%peer, %error, "cannot set the options of a connection");
        }
        return peer.to_string();
    }
    if let Some((cid, port)) = addr.as_ref().and_then(socket2::SockAddr::as_vsock_address) {
        return format!("vsock:{cid}:{port}");
    }
    match rustix::net::sockopt::socket_peercred(socket) {
        Ok(cred) => format!("unix:pid={},uid={}", cred.pid.as_raw_nonzero(), cred.uid.as_raw()),
        Err(_) => String::from("unix"),
    }
}

fn set_tcp_options(socket: &socket2::Socket, options: SocketOptions) -> io::Result<()> {
    let s = SockRef::from(socket);
    s.set_tcp_nodelay(true)?;
    if !options.keepalive.is_zero() {
        let (interval, retries) = KEEPALIVE_PROBES;
        let idle = options.keepalive.max(Duration::from_secs(1));
        s.set_tcp_keepalive(
            &TcpKeepalive::new().with_time(idle).with_interval(interval.min(idle)).with_retries(retries),
        )?;
    }
    if !options.user_timeout.is_zero() {
        let ms =
            u32::try_from(options.user_timeout.as_millis()).unwrap_or(u32::MAX).clamp(1, i32::MAX as u32);
        rustix::net::sockopt::set_tcp_user_timeout(socket, ms)?;
    }
    Ok(())
}

impl Listener {
    /// Accepts one connection; `None` when there is none. A connection that died in the queue is skipped.
    ///
    /// # Errors
    /// `EMFILE`, `ENFILE`, `ENOMEM` and the like: try again later.
    pub(super) fn accept(&self) -> io::Result<Option<Socket>> {
        loop {
            match self.socket.accept() {
                Ok((socket, _)) => {
                    let peer = prepare(&socket, self.options);
                    return Ok(Some(Socket { fd: socket.into(), peer }));
                }
                Err(e) => match e.raw_os_error() {
                    Some(libc::EAGAIN) => return Ok(None),
                    // accept(2): errors of the network on the new socket; treat them like EAGAIN and go on.
                    Some(
                        libc::EINTR
                        | libc::ECONNABORTED
                        | libc::EPROTO
                        | libc::ENETDOWN
                        | libc::ENOPROTOOPT
                        | libc::EHOSTDOWN
                        | libc::ENONET
                        | libc::EHOSTUNREACH
                        | libc::ENETUNREACH
                        | libc::EPERM,
                    ) => {}
                    _ => return Err(e),
                },
            }
        }
    }

    /// Stops listening: queued clients are refused, and the socket file goes, if it is still ours.
    pub(super) fn close(&self) {
        if self.inherited {
            return;
        }
        // Shutting a listening socket down is what closes its queue while others still hold the descriptor.
        if let Err(error) = self.socket.shutdown(std::net::Shutdown::Both) {
            // Unix sockets and some kernels refuse; dropping the socket does it then.
            tracing::trace!(%error, "cannot shut a listening socket down");
        }
        self.unlink();
    }

    fn unlink(&self) {
        let ours = self.file.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        let (Some(ours), ListenAddr::Unix(path)) = (ours, &self.addr) else { return };
        let there = std::fs::symlink_metadata(path).map(|m| (m.dev(), m.ino()));
        if there.is_ok_and(|there| there == ours)
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::warn!(path = %path.display(), %error, "cannot remove the unix socket");
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.unlink();
    }
}

/// The URI of an export at an address, as libnbd and qemu understand it.
pub(super) fn uri(addr: &ListenAddr, export: &str, tls: bool) -> String {
    let s = if tls { "s" } else { "" };
    match addr {
        ListenAddr::Tcp(addr) => {
            let ip = match addr.ip() {
                IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
                IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
                ip => ip,
            };
            let host = SocketAddr::new(ip, addr.port());
            match export {
                "" => format!("nbd{s}://{host}"),
                name => format!("nbd{s}://{host}/{}", percent_encode(name.as_bytes())),
            }
        }
        ListenAddr::Vsock { cid, port } => {
            let cid = if *cid == VSOCK_ANY { VSOCK_HOST } else { *cid };
            format!("nbd+vsock://{cid}:{port}/{}", percent_encode(export.as_bytes()))
        }
        ListenAddr::Unix(path) => {
            use std::os::unix::ffi::OsStrExt;
            // A relative path would mean something else to a client started elsewhere.
            let absolute: PathBuf = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            let socket = percent_encode(absolute.as_os_str().as_bytes());
            format!("nbd{s}+unix:///{}?socket={socket}", percent_encode(export.as_bytes()))
        }
    }
}

/// Escapes what is not unreserved in a URI; slashes stay.
fn percent_encode(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for b in bytes {
        match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                out.push(*b as char)
            }
            _ => out.push_str(&format!("%{b:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_on_a_connection_is_read_back() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let socket = socket2::Socket::from(listener.accept().unwrap().0);
        let options =
            SocketOptions { keepalive: Duration::from_secs(90), user_timeout: Duration::from_secs(600) };
        assert!(prepare(&socket, options).starts_with("127.0.0.1:"));
        assert!(socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(90));
        assert_eq!(rustix::net::sockopt::tcp_user_timeout(&socket).unwrap(), 600_000);
        assert!(socket.tcp_nodelay().unwrap());
    }

    #[test]
    fn uris_are_what_clients_parse() {
        let check = |addr: ListenAddr, export: &str, want: &str| assert_eq!(uri(&addr, export, false), want);
        let tcp = |s: &str| ListenAddr::Tcp(s.parse().unwrap());
        check(tcp("127.0.0.1:10809"), "", "nbd://127.0.0.1:10809");
        check(tcp("0.0.0.0:1"), "a b/ü", "nbd://127.0.0.1:1/a%20b/%C3%BC");
        check(tcp("[::]:1"), "x", "nbd://[::1]:1/x");
        check(ListenAddr::Unix("/run/n b.sock".into()), "", "nbd+unix:///?socket=/run/n%20b.sock");
        check(ListenAddr::Vsock { cid: VSOCK_ANY, port: 7 }, "d", "nbd+vsock://2:7/d");
        check(ListenAddr::Vsock { cid: 1, port: 7 }, "", "nbd+vsock://1:7/");
        check(ListenAddr::Unix("/s".into()), "d?k", "nbd+unix:///d%3Fk?socket=/s");
        assert_eq!(uri(&ListenAddr::Unix("/s".into()), "d", true), "nbds+unix:///d?socket=/s");
        assert_eq!(uri(&tcp("127.0.0.1:1"), "d", true), "nbds://127.0.0.1:1/d");
    }

    #[test]
    fn v6_is_separate_only_beside_v4() {
        let tcp = |s: &str| ListenAddr::Tcp(s.parse().unwrap());
        let v6: SocketAddr = "[::]:7".parse().unwrap();
        assert!(!v6_only(&v6, &[tcp("[::]:7")]));
        assert!(v6_only(&v6, &[tcp("[::]:7"), tcp("0.0.0.0:7")]));
        assert!(!v6_only(&v6, &[tcp("[::]:7"), tcp("0.0.0.0:8")]));
    }
}
