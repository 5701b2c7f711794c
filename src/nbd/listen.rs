//! Listening sockets: TCP and unix, bound all or none.
//!
//! A unix socket file that nobody listens on (its server was killed) is replaced; one that answers is left alone. At the
//! end only the file that we made is removed, known by device and inode.

use super::server::{ListenAddr, ServerError};
use socket2::{Domain, SockRef, TcpKeepalive, Type};
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

/// Connections that the kernel queues (ours; the system's limit is `net.core.somaxconn`).
const BACKLOG: i32 = 1024;
/// Idle time before keepalive probes, their interval and number (ours): a dead peer is noticed within two minutes or so.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(60), Duration::from_secs(10), 6);

/// A bound socket, listening.
pub(super) struct Listener {
    pub(super) socket: socket2::Socket,
    /// With the port really bound.
    pub(super) addr: ListenAddr,
    /// Device and inode of the socket file; taken when it is removed.
    file: Mutex<Option<(u64, u64)>>,
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
        }
    }
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.addr.fmt(f)
    }
}

/// Binds all addresses; after an error nothing is left of those bound before.
pub(super) fn bind_all(addrs: &[ListenAddr]) -> Result<Vec<Listener>, ServerError> {
    let mut listeners = Vec::with_capacity(addrs.len());
    for addr in addrs {
        listeners.push(match addr {
            ListenAddr::Tcp(socket_addr) => bind_tcp(*socket_addr, v6_only(socket_addr, addrs))
                .map_err(|source| ServerError::Listen { addr: addr.to_string(), source })?,
            ListenAddr::Unix(path) => bind_unix(path)?,
        });
    }
    Ok(listeners)
}

/// `[::]` takes IPv4 clients too, unless an IPv4 listener of the same port is asked for as well.
fn v6_only(addr: &SocketAddr, all: &[ListenAddr]) -> bool {
    all.iter().any(|other| {
        matches!(other, ListenAddr::Tcp(SocketAddr::V4(v4)) if v4.port() == addr.port() && addr.port() != 0)
    })
}

fn bind_tcp(addr: SocketAddr, v6_only: bool) -> io::Result<Listener> {
    let socket = socket2::Socket::new(Domain::for_address(addr), Type::STREAM.nonblocking().cloexec(), None)?;
    // A restarted server must not wait for the old connections' TIME_WAIT.
    socket.set_reuse_address(true)?;
    if addr.is_ipv6() {
        socket.set_only_v6(v6_only)?;
    }
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    let bound = socket
        .local_addr()?
        .as_socket()
        .ok_or_else(|| io::Error::other("the bound address is not an internet address"))?;
    Ok(Listener { socket, addr: ListenAddr::Tcp(bound), file: Mutex::new(None) })
}

fn bind_unix(path: &Path) -> Result<Listener, ServerError> {
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
            match new_socket().and_then(|probe| probe.connect(&addr)) {
                Err(e) if e.raw_os_error() == Some(libc::ECONNREFUSED) => {
                    std::fs::remove_file(path).map_err(failed)?;
                    socket.bind(&addr).map_err(failed)?;
                }
                _ => return Err(ServerError::SocketInUse { path: path.to_owned() }),
            }
        }
        Err(e) => return Err(failed(e)),
    }
    let file = std::fs::symlink_metadata(path).map(|m| (m.dev(), m.ino())).map_err(failed)?;
    let listener = Listener { socket, addr: ListenAddr::Unix(path.to_owned()), file: Mutex::new(Some(file)) };
    listener.socket.listen(BACKLOG).map_err(failed)?;
    Ok(listener)
}

impl Listener {
    /// Accepts one connection; `None` when there is none. A connection that died in the queue is skipped.
    ///
    /// # Errors
    /// `EMFILE`, `ENFILE`, `ENOMEM` and the like: try again later.
    pub(super) fn accept(&self) -> io::Result<Option<Socket>> {
        loop {
            match self.socket.accept() {
                Ok((socket, addr)) => {
                    let peer = self.prepare(&socket, &addr);
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

    /// Sets the options of a new connection and names its peer. A peer that is gone already is found out later.
    fn prepare(&self, socket: &socket2::Socket, addr: &socket2::SockAddr) -> String {
        match addr.as_socket() {
            Some(peer) => {
                let s = SockRef::from(socket);
                let (idle, interval, retries) = KEEPALIVE;
                let keepalive =
                    TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(retries);
                let set = s.set_tcp_nodelay(true).and_then(|()| s.set_tcp_keepalive(&keepalive));
                if let Err(error) = set {
                    tracing::debug!(%peer, %error, "cannot set the options of a connection");
                }
                peer.to_string()
            }
            None => match rustix::net::sockopt::socket_peercred(socket) {
                Ok(cred) => {
                    format!("unix:pid={},uid={}", cred.pid.as_raw_nonzero(), cred.uid.as_raw())
                }
                Err(_) => String::from("unix"),
            },
        }
    }

    /// Stops listening: queued clients are refused, and the socket file goes, if it is still ours.
    pub(super) fn close(&self) {
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
    fn uris_are_what_clients_parse() {
        let check = |addr: ListenAddr, export: &str, want: &str| assert_eq!(uri(&addr, export, false), want);
        let tcp = |s: &str| ListenAddr::Tcp(s.parse().unwrap());
        check(tcp("127.0.0.1:10809"), "", "nbd://127.0.0.1:10809");
        check(tcp("0.0.0.0:1"), "a b/ü", "nbd://127.0.0.1:1/a%20b/%C3%BC");
        check(tcp("[::]:1"), "x", "nbd://[::1]:1/x");
        check(ListenAddr::Unix("/run/n b.sock".into()), "", "nbd+unix:///?socket=/run/n%20b.sock");
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
