//! What systemd (or any supervisor that speaks its protocols) hands over and is told: sockets and readiness.
//!
//! Passed sockets: `LISTEN_PID` names us, `LISTEN_FDS` counts descriptors from 3 on, `LISTEN_FDNAMES` may name them
//! (sd_listen_fds(3)). Readiness: a datagram to `NOTIFY_SOCKET` (sd_notify(3)). Plain functions, no state; call
//! [`take_sockets`] before the process has a second thread, because it changes the environment.

use super::sys;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::PathBuf;

/// First descriptor that is passed (sd_listen_fds(3): SD_LISTEN_FDS_START).
const FIRST: i32 = 3;
/// Most descriptors that are taken (ours).
const PASSED_MAX: i32 = 1024;
const VARIABLES: [&str; 3] = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"];

/// A descriptor that was passed.
#[derive(Debug)]
pub struct Passed {
    /// The descriptor; closed on exec from now on.
    pub fd: OwnedFd,
    /// Its number when it came, for messages.
    pub number: i32,
    /// Its name (`FileDescriptorName=` of the socket unit), if one was given.
    pub name: Option<String>,
}

/// How many descriptors the environment says were passed to this process; 0 if none, or to another process. Changes
/// nothing.
///
/// # Errors
/// What is wrong with the variables.
pub fn passed_count() -> Result<i32, String> {
    let value = |name: &str| std::env::var_os(name);
    count(value("LISTEN_PID"), value("LISTEN_FDS"), std::process::id())
}

fn count(pid: Option<OsString>, fds: Option<OsString>, own: u32) -> Result<i32, String> {
    let (Some(pid), Some(fds)) = (pid, fds) else { return Ok(0) };
    let number = |name: &str, text: &OsString| {
        text.to_str()
            .and_then(|text| text.parse::<i64>().ok())
            .ok_or_else(|| format!("socket activation: {name}={} is no number", text.display()))
    };
    // The variables are meant for another process: our parent has forgotten to unset them.
    if number("LISTEN_PID", &pid)? != i64::from(own) {
        return Ok(0);
    }
    match number("LISTEN_FDS", &fds)? {
        0 => Ok(0),
        n if (1..=i64::from(PASSED_MAX)).contains(&n) => Ok(n as i32),
        n => Err(format!("socket activation: LISTEN_FDS={n}; it must be 0 to {PASSED_MAX}")),
    }
}

/// Takes the sockets that were passed and unsets the variables, so that no child takes them for its own.
///
/// # Errors
/// What is wrong with the variables or a descriptor: one that is not open, or is no stream socket.
pub fn take_sockets() -> Result<Vec<Passed>, String> {
    let n = passed_count()?;
    if n == 0 {
        return Ok(Vec::new());
    }
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':').map(|name| (!name.is_empty()).then(|| name.to_owned()));
    VARIABLES.iter().for_each(|name| sys::remove_env(name));
    let mut passed = Vec::new();
    for number in FIRST..FIRST + n {
        let name = names.next().flatten();
        let shown = match &name {
            Some(name) => format!("{number} ({name})"),
            None => number.to_string(),
        };
        let fd = sys::take_fd(number).map_err(|e| {
            format!("socket activation: LISTEN_FDS={n}, but descriptor {shown} cannot be used: {e}")
        })?;
        match rustix::net::sockopt::socket_type(fd.as_fd()) {
            Ok(rustix::net::SocketType::STREAM) => {}
            Ok(_) => {
                return Err(format!(
                    "socket activation: descriptor {shown} is no stream socket; use ListenStream= in the socket unit"
                ));
            }
            Err(e) => {
                let e = io::Error::from(e);
                return Err(format!("socket activation: descriptor {shown} is no socket: {e}"));
            }
        }
        passed.push(Passed { fd, number, name });
    }
    Ok(passed)
}

/// Tells the supervisor `state`, such as `READY=1`, if it asked to be told. Never blocks for long: a datagram.
///
/// # Errors
/// Why it could not be told; without `NOTIFY_SOCKET` there is nobody to tell, and no error.
pub fn notify(state: &str) -> io::Result<()> {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty()) else {
        return Ok(());
    };
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(PathBuf::from(&path))?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.send_to_addr(state.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_addressed_to_this_process_counts() {
        let check = |pid: &str, fds: &str, want: Result<i32, &str>| {
            let got = count(Some(pid.into()), Some(fds.into()), 77);
            match want {
                Ok(n) => assert_eq!(got, Ok(n), "{pid} {fds}"),
                Err(part) => assert!(got.as_ref().is_err_and(|e| e.contains(part)), "{pid} {fds}: {got:?}"),
            }
        };
        check("77", "2", Ok(2));
        check("77", "0", Ok(0));
        check("78", "2", Ok(0));
        check("x", "2", Err("LISTEN_PID=x is no number"));
        check("77", "", Err("LISTEN_FDS= is no number"));
        check("77", "-1", Err("must be 0 to"));
        check("77", "99999999999", Err("must be 0 to"));
        assert_eq!(count(None, Some("1".into()), 77), Ok(0));
        assert_eq!(count(Some("77".into()), None, 77), Ok(0));
    }
}
