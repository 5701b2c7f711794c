//! QEMU's image locks: which bytes of an image file say what its user does and will not share.
//!
//! For each permission bit there are two bytes: `100 + bit` is read-locked by whoever *uses* the permission,
//! `200 + bit` by whoever does *not share* it. All are OFD read locks, so any number of users may hold the same
//! byte; the exclusion is in the test that follows: a would-be user asks (`F_OFD_GETLK` as a writer, which takes
//! nothing) for the *other* byte of each of its own.
//!
//! ```text
//!              takes                     tests
//!   read-write 100 101 103 201 203       200 201 203   101 103
//!   read-only  100         201 203       200           101 103
//!   shared: rw 100 101         203       200 201           103
//!   shared: ro 100             203       200               103
//! ```
//! Take first, test then, and let go of everything when the test fails: of two that start together at least one sees
//! the other. So qemu-img, qemu-nbd, libvirt's QEMUs and we exclude each other, and two exports of one daemon do
//! too (each opens the file itself).
//!
//! The first two lines are what QEMU takes for an image that it must have for itself (qcow2). For a raw image
//! qemu-nbd takes no more than the other two (10.0: strace, fdinfo): two of it may write one raw image. That is
//! `shared` here, and not the default.
//!
//! The bytes are only lock addresses: nothing is read or written there, and an image may be shorter than 100 bytes.

use crate::util::sys::{OfdLock, ofd_conflict, ofd_lock, ofd_unlock};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

/// QEMU: RAW_LOCK_PERM_BASE.
const USED_BASE: u64 = 100;
/// QEMU: RAW_LOCK_SHARED_BASE.
const UNSHARED_BASE: u64 = 200;

// QEMU: BLK_PERM_*; bit 2, write-unchanged, is not used by anything here.
const CONSISTENT_READ: u64 = 0;
const WRITE: u64 = 1;
const RESIZE: u64 = 3;

/// How an image is locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LockMode {
    /// Nobody else may write the image, and nobody may use it at all while we write it.
    #[default]
    On,
    /// Others may write it too, but not resize it (a cluster file system inside, or a reader who knows); they must
    /// say so as well, as qemu-nbd does for raw images.
    Shared,
    /// No lock is taken and none is looked at.
    Off,
}

impl LockMode {
    /// All of them, with their names.
    pub const ALL: [(&'static str, LockMode); 3] =
        [("on", LockMode::On), ("shared", LockMode::Shared), ("off", LockMode::Off)];
}

/// Permission bits that a user of the image takes and does not share.
struct Plan {
    used: &'static [u64],
    unshared: &'static [u64],
}

fn plan(mode: LockMode, read_only: bool) -> Option<Plan> {
    Some(match (mode, read_only) {
        (LockMode::On, false) => Plan { used: &[CONSISTENT_READ, WRITE, RESIZE], unshared: &[WRITE, RESIZE] },
        (LockMode::On, true) => Plan { used: &[CONSISTENT_READ], unshared: &[WRITE, RESIZE] },
        (LockMode::Shared, false) => Plan { used: &[CONSISTENT_READ, WRITE], unshared: &[RESIZE] },
        (LockMode::Shared, true) => Plan { used: &[CONSISTENT_READ], unshared: &[RESIZE] },
        (LockMode::Off, _) => return None,
    })
}

/// Why an image could not be locked.
#[derive(Debug)]
pub(crate) enum LockError {
    /// Another open file description holds a byte that stands against us.
    Held {
        /// The byte.
        byte: u64,
        /// What it says about its holder.
        meaning: &'static str,
        /// The holder, if the kernel or /proc names it.
        holder: Option<String>,
    },
    /// Locks do not work on this file.
    Unsupported(io::Error),
}

fn meaning(byte: u64) -> &'static str {
    match byte {
        100 => "another program reads it and needs its contents to be consistent",
        101 => "another program writes it",
        103 => "another program may change its size",
        200 => "another program does not let anybody read it",
        201 => "another program uses it and does not let anybody else write it",
        203 => "another program uses it and does not let anybody change its size",
        _ => "another program uses it",
    }
}

/// Takes the locks of an open image; none is left on failure.
/// Blocks for a moment: open time only.
pub(crate) fn lock_image(fd: BorrowedFd<'_>, mode: LockMode, read_only: bool) -> Result<(), LockError> {
    let Some(plan) = plan(mode, read_only) else { return Ok(()) };
    let takes =
        plan.used.iter().map(|b| USED_BASE + b).chain(plan.unshared.iter().map(|b| UNSHARED_BASE + b));
    let tests =
        plan.used.iter().map(|b| UNSHARED_BASE + b).chain(plan.unshared.iter().map(|b| USED_BASE + b));
    let r = take_and_test(fd, takes, tests);
    if r.is_err() {
        unlock_image(fd);
    }
    r
}

/// Lets go of all locks of an image, at once: closing would do that only when no duplicate of the descriptor is left,
/// and a child between fork and exec has one.
pub(crate) fn unlock_image(fd: BorrowedFd<'_>) {
    // A failure leaves them to the closing of the file.
    let _ = ofd_unlock(fd, USED_BASE, UNSHARED_BASE + 100 - USED_BASE);
}

fn take_and_test(
    fd: BorrowedFd<'_>,
    takes: impl Iterator<Item = u64>,
    tests: impl Iterator<Item = u64>,
) -> Result<(), LockError> {
    let held = |byte, pid: Option<i32>| LockError::Held {
        byte,
        meaning: meaning(byte),
        holder: pid.map(|p| format!("process {p}")).or_else(|| find_holder(fd, byte)),
    };
    for byte in takes {
        match ofd_lock(fd, OfdLock::Read, byte, 1) {
            Ok(()) => {}
            // Somebody holds a *write* lock there: not QEMU's way, but just as exclusive.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                return Err(held(byte, None));
            }
            Err(e) => return Err(LockError::Unsupported(e)),
        }
    }
    for byte in tests {
        if let Some(c) = ofd_conflict(fd, OfdLock::Write, byte, 1).map_err(LockError::Unsupported)? {
            return Err(held(byte, c.pid));
        }
    }
    Ok(())
}

/// Looks for the holder of a byte in `/proc/PID/fdinfo`, for the error message: the kernel names no owner of an OFD
/// lock, but shows each description's locks there. Sees only processes that we may look at; bounded.
fn find_holder(fd: BorrowedFd<'_>, byte: u64) -> Option<String> {
    /// Descriptors that are looked at (ours: a big host has some 100 000).
    const MAX_FDS: usize = 200_000;
    let ino = rustix::fs::fstat(fd.as_fd()).ok()?.st_ino.to_string();
    let me = std::process::id().to_string();
    let mut looked = 0;
    for process in std::fs::read_dir("/proc").ok()?.flatten() {
        let pid = process.file_name().into_string().unwrap_or_default();
        if !pid.bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        let Ok(fds) = std::fs::read_dir(process.path().join("fdinfo")) else { continue };
        for info in fds.flatten() {
            looked += 1;
            if looked > MAX_FDS {
                return None;
            }
            if pid == me
                && info.file_name().to_str()
                    == Some(std::os::fd::AsRawFd::as_raw_fd(&fd).to_string().as_str())
            {
                continue;
            }
            let text = std::fs::read_to_string(info.path()).unwrap_or_default();
            if text.lines().any(|l| lock_line_covers(l, &ino, byte)) {
                return Some(process_name(&process.path(), &pid));
            }
        }
    }
    None
}

/// Whether a line of fdinfo (`lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:1234 100 101`) is about the byte of the inode.
fn lock_line_covers(line: &str, ino: &str, byte: u64) -> bool {
    let Some(rest) = line.strip_prefix("lock:") else { return false };
    let mut words = rest.split_whitespace().rev();
    let (Some(end), Some(start), Some(file)) = (words.next(), words.next(), words.next()) else {
        return false;
    };
    let end = end.parse().unwrap_or(u64::MAX); // "EOF"
    let Ok(start) = start.parse::<u64>() else { return false };
    file.rsplit(':').next() == Some(ino) && (start..=end).contains(&byte)
}

fn process_name(dir: &Path, pid: &str) -> String {
    match std::fs::read_to_string(dir.join("comm")) {
        Ok(name) => format!("process {pid}, {}", name.trim()),
        Err(_) => format!("process {pid}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_those_of_qemu() {
        fn check(mode: LockMode, read_only: bool, takes: &[u64], tests: &[u64]) {
            let p = plan(mode, read_only).expect("a mode that locks");
            let all = |a: &[u64], ab: u64, b: &[u64], bb: u64| -> Vec<u64> {
                a.iter().map(|x| x + ab).chain(b.iter().map(|x| x + bb)).collect()
            };
            assert_eq!(all(p.used, USED_BASE, p.unshared, UNSHARED_BASE), takes);
            assert_eq!(all(p.used, UNSHARED_BASE, p.unshared, USED_BASE), tests);
        }
        check(LockMode::On, false, &[100, 101, 103, 201, 203], &[200, 201, 203, 101, 103]);
        check(LockMode::On, true, &[100, 201, 203], &[200, 101, 103]);
        check(LockMode::Shared, false, &[100, 101, 203], &[200, 201, 103]);
        check(LockMode::Shared, true, &[100, 203], &[200, 103]);
        assert!(plan(LockMode::Off, false).is_none());
    }

    #[test]
    fn fdinfo_lines_are_understood() {
        assert!(lock_line_covers("lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:1234 201 201", "1234", 201));
        assert!(lock_line_covers("lock:\t1: POSIX  ADVISORY  WRITE 77 fe:00:1234 0 EOF", "1234", 201));
        assert!(!lock_line_covers("lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:1234 100 101", "1234", 201));
        assert!(!lock_line_covers("lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:99 201 201", "1234", 201));
        assert!(!lock_line_covers("pos:\t0", "1234", 201));
    }
}
