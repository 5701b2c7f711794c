//! Thin system calls that rustix lacks or spells differently. Linux only.
//!
//! Each function is one system call (or one fixed pair) with its arguments made safe: no state, no policy, no
//! retries beyond what its text says. Any thread may call them unless the text says otherwise; none yields.

use rustix::io::ReadWriteFlags;
use std::io;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// Turns libc's `-1` into the errno.
fn cvt(r: libc::c_int) -> io::Result<libc::c_int> {
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(r) }
}

/// The file offset type of the kernel, checked: offsets above `i64::MAX` are `EINVAL`, not a sign change.
fn off(v: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(v).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

// ---------------------------------------------------------------------------------------------- OFD locks

/// Kind of an open-file-description lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OfdLock {
    /// Shared.
    Read,
    /// Exclusive.
    Write,
}

impl OfdLock {
    fn l_type(self) -> libc::c_short {
        match self {
            OfdLock::Read => libc::F_RDLCK as libc::c_short,
            OfdLock::Write => libc::F_WRLCK as libc::c_short,
        }
    }
}

#[expect(unsafe_code, reason = "rustix has only process-wide record locks")]
fn ofd_fcntl(
    fd: impl AsFd,
    cmd: libc::c_int,
    l_type: libc::c_short,
    start: u64,
    len: u64,
) -> io::Result<libc::flock> {
    let mut fl = libc::flock {
        l_type,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: off(start)?,
        l_len: off(len)?,
        // The kernel wants 0 here for OFD locks.
        l_pid: 0,
    };
    // SAFETY: the fd is open for the duration of the borrow, and `cmd` is one of the F_OFD_* commands, which read
    // and write exactly one `struct flock`.
    cvt(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), cmd, &raw mut fl) })?;
    Ok(fl)
}

/// Takes a lock on bytes `start..start + len` for the open file description behind `fd` (`F_OFD_SETLK`); does not wait.
///
/// A read lock needs an fd open for reading. The lock belongs to the open file description: a dup shares it, another
/// `open` of the same file competes with it, and it goes when the last dup is closed.
///
/// # Errors
/// `EAGAIN`/`EACCES` when another description holds a conflicting lock; `ENOLCK`, `EINVAL` where locks do not work.
pub fn ofd_lock(fd: impl AsFd, kind: OfdLock, start: u64, len: u64) -> io::Result<()> {
    ofd_fcntl(fd, libc::F_OFD_SETLK, kind.l_type(), start, len).map(drop)
}

/// Releases this description's locks on the bytes.
///
/// # Errors
/// What `fcntl` reports.
pub fn ofd_unlock(fd: impl AsFd, start: u64, len: u64) -> io::Result<()> {
    ofd_fcntl(fd, libc::F_OFD_SETLK, libc::F_UNLCK as libc::c_short, start, len).map(drop)
}

/// Who stands in the way of a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OfdConflict {
    /// First byte of the conflicting lock.
    pub start: u64,
    /// The process, if it holds a classic (process-wide) lock; an OFD lock has no owner that the kernel would name.
    pub pid: Option<i32>,
}

/// Tells whether taking `kind` on the bytes would fail, and because of what (`F_OFD_GETLK`). Takes nothing.
///
/// # Errors
/// What `fcntl` reports.
pub fn ofd_conflict(fd: impl AsFd, kind: OfdLock, start: u64, len: u64) -> io::Result<Option<OfdConflict>> {
    let fl = ofd_fcntl(fd, libc::F_OFD_GETLK, kind.l_type(), start, len)?;
    if fl.l_type == libc::F_UNLCK as libc::c_short {
        return Ok(None);
    }
    Ok(Some(OfdConflict { start: fl.l_start.max(0) as u64, pid: (fl.l_pid > 0).then_some(fl.l_pid) }))
}

// ------------------------------------------------------------------------------------------ block devices

// <linux/fs.h>; libc has them for some targets only.
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKZEROOUT: libc::c_ulong = 0x127f;
const BLKROTATIONAL: libc::c_ulong = 0x127e;

/// Size of a block device in bytes (`BLKGETSIZE64`).
///
/// # Errors
/// `ENOTTY` when `fd` is not a block device.
#[expect(unsafe_code, reason = "ioctl")]
pub fn blk_size(fd: impl AsFd) -> io::Result<u64> {
    let mut size = 0u64;
    // SAFETY: BLKGETSIZE64 writes one u64 through the pointer, which is valid for that.
    cvt(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), BLKGETSIZE64 as _, &raw mut size) })?;
    Ok(size)
}

/// Logical sector size of a block device in bytes (`BLKSSZGET`): the unit of direct I/O.
///
/// # Errors
/// `ENOTTY` when `fd` is not a block device.
pub fn blk_sector_size(fd: impl AsFd) -> io::Result<u32> {
    Ok(rustix::fs::ioctl_blksszget(fd)?)
}

/// Whether a block device says that it spins (`BLKROTATIONAL`).
///
/// # Errors
/// `ENOTTY` when `fd` is not a block device.
#[expect(unsafe_code, reason = "ioctl")]
pub fn blk_rotational(fd: impl AsFd) -> io::Result<bool> {
    let mut v: libc::c_ushort = 0;
    // SAFETY: BLKROTATIONAL writes one unsigned short through the pointer, which is valid for that.
    cvt(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), BLKROTATIONAL as _, &raw mut v) })?;
    Ok(v != 0)
}

#[expect(unsafe_code, reason = "ioctl")]
fn blk_range(fd: impl AsFd, req: libc::c_ulong, offset: u64, len: u64) -> io::Result<()> {
    let range: [u64; 2] = [offset, len];
    // SAFETY: BLKDISCARD and BLKZEROOUT, the only callers' requests, read two u64 through the pointer.
    cvt(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), req as _, range.as_ptr()) }).map(drop)
}

/// Discards a range of a block device (`BLKDISCARD`). Blocks: thread pool only.
///
/// # Errors
/// `EOPNOTSUPP` where the device cannot; `EINVAL` for ranges that are not multiples of the sector size.
pub fn blk_discard(fd: impl AsFd, offset: u64, len: u64) -> io::Result<()> {
    blk_range(fd, BLKDISCARD, offset, len)
}

/// Writes zeroes to a range of a block device, by the device's own command where it has one, else by the kernel
/// writing them (`BLKZEROOUT`); the space stays allocated. Blocks, long: thread pool only.
///
/// # Errors
/// `EINVAL` for ranges that are not multiples of the sector size.
pub fn blk_zero_out(fd: impl AsFd, offset: u64, len: u64) -> io::Result<()> {
    blk_range(fd, BLKZEROOUT, offset, len)
}

// -------------------------------------------------------------------------------------------- cached reads

/// Reads what is in the page cache and never waits for the device (`preadv2` with `RWF_NOWAIT`); may be short.
///
/// # Errors
/// `EAGAIN` when nothing of it is cached; `EOPNOTSUPP` where the file system does not know the flag (tmpfs, overlayfs).
pub fn pread_nowait(fd: impl AsFd, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    preadv_nowait(fd, &mut [IoSliceMut::new(buf)], offset)
}

/// [`pread_nowait`] into several buffers, one after the other.
///
/// # Errors
/// As [`pread_nowait`].
pub fn preadv_nowait(fd: impl AsFd, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<usize> {
    Ok(rustix::io::preadv2(fd, bufs, offset, ReadWriteFlags::NOWAIT)?)
}

// The number is the same on every architecture but alpha; libc does not have it everywhere yet.
const SYS_CACHESTAT: libc::c_long = 451;

/// Tells whether no byte of a file's range lies in a hole (`SEEK_HOLE`), where the file system knows. Normally answered from
/// the extents that the file system has in memory. Moves the file position, which nobody here uses.
///
/// # Errors
/// What `lseek` reports; `ENXIO` past the end of the file.
pub fn all_data(fd: impl AsFd, offset: u64, len: u64) -> io::Result<bool> {
    Ok(rustix::fs::seek(fd, rustix::fs::SeekFrom::Hole(offset))? >= offset.saturating_add(len))
}

/// Tells whether every page of a range is in the page cache (`cachestat`, Linux 6.5). Never waits for the device. It is
/// a snapshot: pages may leave at any time.
///
/// # Errors
/// `ENOSYS` on older kernels or under a seccomp filter; `EOPNOTSUPP` for hugetlbfs; `EPERM` for files of others.
#[expect(unsafe_code, reason = "cachestat")]
pub fn all_cached(fd: impl AsFd, offset: u64, len: u64) -> io::Result<bool> {
    let range: [u64; 2] = [off(offset)? as u64, len];
    // nr_cache, nr_dirty, nr_writeback, nr_evicted, nr_recently_evicted, in pages.
    let mut stat = [0u64; 5];
    // SAFETY: the range is two u64 that are read, the result five u64 that are written, as <linux/mman.h> has them; there
    // are no flags.
    let r = unsafe {
        libc::syscall(SYS_CACHESTAT, fd.as_fd().as_raw_fd(), range.as_ptr(), stat.as_mut_ptr(), 0u32)
    };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    let page = rustix::param::page_size() as u64;
    let pages = if len == 0 { 0 } else { (offset + len - 1) / page - offset / page + 1 };
    Ok(stat[0] >= pages)
}

/// Begins to write the dirty pages of a range to the disk (`sync_file_range` with `SYNC_FILE_RANGE_WRITE` alone). Does not wait for them, but may
/// for room in the disk's queue. Promises nothing, and leaves errors for who syncs.
///
/// # Errors
/// What the system call reports.
#[expect(unsafe_code, reason = "sync_file_range")]
pub fn begin_writeback(fd: impl AsFd, offset: u64, len: u64) -> io::Result<()> {
    let (offset, len) = (off(offset)?, off(len)?);
    // SAFETY: no memory is passed, and the descriptor is open.
    cvt(unsafe { libc::sync_file_range(fd.as_fd().as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE) })
        .map(drop)
}

// ------------------------------------------------------------------------------------------------- signals

/// A signal taken from [`signal_fd`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SignalInfo {
    /// Signal number.
    pub signo: i32,
    /// Sender's process, 0 when the kernel sent it.
    pub pid: u32,
    /// Sender's user.
    pub uid: u32,
}

#[expect(unsafe_code, reason = "signal sets")]
fn sigset(signals: &[i32]) -> io::Result<libc::sigset_t> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set that the pointer names.
    cvt(unsafe { libc::sigemptyset(set.as_mut_ptr()) })?;
    // SAFETY: sigemptyset has succeeded, so the set is initialised.
    let mut set = unsafe { set.assume_init() };
    for &s in signals {
        // SAFETY: the set is initialised; a signal number that is none makes the call fail with EINVAL.
        cvt(unsafe { libc::sigaddset(&raw mut set, s) })?;
    }
    Ok(set)
}

/// Blocks `signals` in the calling thread, then makes a non-blocking, close-on-exec fd that delivers them.
///
/// Call it in the main thread before any other thread starts: threads inherit the mask, and a thread that does not
/// block a signal would receive it the ordinary way (and be killed by it).
///
/// # Errors
/// `EINVAL` for a number that is no signal; what `signalfd` reports.
#[expect(unsafe_code, reason = "signalfd")]
pub fn signal_fd(signals: &[i32]) -> io::Result<OwnedFd> {
    let set = sigset(signals)?;
    // SAFETY: both set pointers are valid or null; the old mask is not wanted.
    let r = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    if r != 0 {
        return Err(io::Error::from_raw_os_error(r));
    }
    // SAFETY: -1 asks for a new descriptor; the set is valid for the call.
    let fd = cvt(unsafe { libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) })?;
    // SAFETY: signalfd has just returned this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes one pending signal from a [`signal_fd`]; `None` when there is none. The fd is edge-triggered in our loops:
/// call until `None`.
///
/// # Errors
/// What `read` reports.
#[expect(unsafe_code, reason = "signalfd_siginfo is a C struct")]
pub fn read_signal(fd: impl AsFd) -> io::Result<Option<SignalInfo>> {
    let mut buf = [0u8; size_of::<libc::signalfd_siginfo>()];
    let n = loop {
        match rustix::io::read(&fd, &mut buf) {
            Ok(n) => break n,
            Err(rustix::io::Errno::AGAIN) => return Ok(None),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    };
    if n != buf.len() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "short read from a signalfd"));
    }
    // SAFETY: the buffer has the struct's size and was filled by the kernel; the struct is plain integers, valid for
    // any bytes; read_unaligned does not need alignment.
    let si = unsafe { buf.as_ptr().cast::<libc::signalfd_siginfo>().read_unaligned() };
    Ok(Some(SignalInfo { signo: si.ssi_signo as i32, pid: si.ssi_pid, uid: si.ssi_uid }))
}

/// Makes the process ignore a signal: `SIGPIPE` (a closed socket is an `EPIPE`), `SIGXFSZ` (a file limit is an `EFBIG`).
///
/// # Errors
/// `EINVAL` for a number that is no signal, or `SIGKILL`/`SIGSTOP`.
#[expect(unsafe_code, reason = "signal dispositions")]
pub fn ignore_signal(signo: i32) -> io::Result<()> {
    // SAFETY: SIG_IGN runs no code of ours.
    let r = unsafe { libc::signal(signo, libc::SIG_IGN) };
    if r == libc::SIG_ERR { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Returns how many times the calling thread has given up its CPU by itself (it slept), since it began.
/// Not counted: being preempted. Never blocks.
#[must_use]
#[expect(unsafe_code, reason = "getrusage")]
pub fn thread_sleeps() -> u64 {
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: `usage` is valid for writing one rusage.
    let rc = unsafe { libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()) };
    assert!(rc == 0, "RUSAGE_THREAD is known to every Linux since 2.6.26");
    // SAFETY: zeroed bytes are a valid rusage, and the call filled it.
    let usage = unsafe { usage.assume_init() };
    u64::try_from(usage.ru_nvcsw).unwrap_or(0)
}

// -------------------------------------------------------------------------------------- process and peers

/// Raises the soft limit of open files to the hard limit; returns the limit now in force.
///
/// # Errors
/// What `setrlimit` reports.
pub fn raise_nofile_limit() -> io::Result<u64> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let lim = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: lim.maximum, maximum: lim.maximum })?;
    Ok(lim.maximum.unwrap_or(u64::MAX))
}

/// Who is at the other end of a unix socket, as of `connect`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerCred {
    /// Process.
    pub pid: i32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// Asks a unix socket for its peer (`SO_PEERCRED`).
///
/// # Errors
/// What `getsockopt` reports; `ENODATA` when the kernel knows no peer (not a unix socket, peer of another pid namespace).
#[expect(unsafe_code, reason = "rustix's type cannot hold the zero pid of foreign namespaces")]
pub fn peer_cred(fd: impl AsFd) -> io::Result<PeerCred> {
    let mut cred = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the option writes at most `len` bytes, the size of the struct, through a valid pointer.
    cvt(unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut cred).cast(),
            &raw mut len,
        )
    })?;
    if cred.uid == u32::MAX {
        return Err(io::Error::from_raw_os_error(libc::ENODATA));
    }
    Ok(PeerCred { pid: cred.pid, uid: cred.uid, gid: cred.gid })
}

// ------------------------------------------------------------------------------ descriptors and processes

/// Takes over a descriptor that the process was started with, and makes it close on exec.
///
/// # Errors
/// `EBADF` when it is not open, or was opened by this process itself.
#[expect(unsafe_code, reason = "descriptors that come by number")]
pub fn take_fd(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD touches no memory; a number that is not open is EBADF.
    let flags = cvt(unsafe { libc::fcntl(number, libc::F_GETFD) })?;
    // What this process opens is closed on exec, what it was started with cannot be.
    if flags & libc::FD_CLOEXEC != 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: F_SETFD takes an integer and touches no memory.
    cvt(unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: the descriptor is open, and was not opened by this process (see above), nor taken before (it would be closed
    // on exec): nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Duplicates one of the descriptors 0, 1, 2 to a new number, closed on exec.
///
/// # Errors
/// `EBADF` when it is not open; `EMFILE`.
#[expect(unsafe_code, reason = "descriptors that come by number")]
pub fn dup_std(number: i32) -> io::Result<OwnedFd> {
    assert!((0..3).contains(&number), "a standard descriptor");
    // SAFETY: F_DUPFD_CLOEXEC takes an integer and touches no memory.
    let fd = cvt(unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) })?;
    // SAFETY: the kernel has just returned this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Puts `fd` in the place of one of the descriptors 0, 1, 2; what was there is closed.
///
/// # Errors
/// What `dup2` reports.
#[expect(unsafe_code, reason = "descriptors that come by number")]
pub fn replace_std(number: i32, fd: impl AsFd) -> io::Result<()> {
    assert!((0..3).contains(&number), "a standard descriptor");
    // SAFETY: both descriptors are valid for the call; 0, 1 and 2 are never owned by an OwnedFd of this crate.
    cvt(unsafe { libc::dup2(fd.as_fd().as_raw_fd(), number) }).map(drop)
}

/// Removes a variable from the environment. Call it before the process has a second thread.
///
/// # Panics
/// When there is one.
#[expect(unsafe_code, reason = "the environment is shared by all threads")]
pub fn remove_env(name: &str) {
    let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    assert!(threads == 1, "the environment is changed before threads exist");
    // SAFETY: there is one thread, this one: nobody else reads or writes the environment meanwhile.
    unsafe { std::env::remove_var(name) };
}

/// Which side of a [`fork`] this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fork {
    /// The old process; with the new one's id.
    Parent(i32),
    /// The new process.
    Child,
}

/// Forks the process. Call it before the process has a second thread: the child has only the one that called.
///
/// # Errors
/// `EAGAIN`, `ENOMEM`.
///
/// # Panics
/// When there is a second thread.
#[expect(unsafe_code, reason = "fork")]
pub fn fork() -> io::Result<Fork> {
    let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    assert!(threads == 1, "a process forks before it has threads");
    // SAFETY: there is one thread, so no lock can be held by a thread that the child lacks.
    match cvt(unsafe { libc::fork() })? {
        0 => Ok(Fork::Child),
        pid => Ok(Fork::Parent(pid)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{File, OpenOptions};

    fn two_opens() -> (File, File, tempfile::NamedTempFile) {
        let t = tempfile::NamedTempFile::new().expect("temp file");
        let open = || OpenOptions::new().read(true).write(true).open(t.path()).expect("open");
        (open(), open(), t)
    }

    #[test]
    fn read_locks_of_two_descriptions_agree_and_a_writer_is_told() {
        let (a, b, _t) = two_opens();
        ofd_lock(&a, OfdLock::Read, 100, 1).expect("first");
        ofd_lock(&b, OfdLock::Read, 100, 1).expect("second");
        let c = ofd_conflict(&a, OfdLock::Write, 100, 1).expect("getlk").expect("b holds it");
        assert_eq!(c, OfdConflict { start: 100, pid: None });
        assert_eq!(ofd_conflict(&a, OfdLock::Write, 101, 1).expect("getlk"), None);
        let e = ofd_lock(&a, OfdLock::Write, 100, 1).expect_err("b still reads");
        assert!(matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)));
        ofd_unlock(&b, 100, 1).expect("unlock");
        ofd_lock(&a, OfdLock::Write, 100, 1).expect("alone now");
    }

    #[test]
    fn offset_beyond_i64_is_einval_not_a_wrap() {
        let (a, _b, _t) = two_opens();
        let e = ofd_lock(&a, OfdLock::Read, u64::MAX, 1).expect_err("too far");
        assert_eq!(e.raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn block_ioctls_on_a_file_are_enotty() {
        let (a, _b, _t) = two_opens();
        assert_eq!(blk_size(&a).expect_err("a file").raw_os_error(), Some(libc::ENOTTY));
        assert_eq!(blk_rotational(&a).expect_err("a file").raw_os_error(), Some(libc::ENOTTY));
        assert!(blk_sector_size(&a).is_err());
        assert!(blk_discard(&a, 0, 512).is_err());
        assert!(blk_zero_out(&a, 0, 512).is_err());
    }

    #[test]
    fn what_was_just_written_is_cached_and_what_lies_behind_the_end_is_not() {
        let (a, _b, t) = two_opens();
        std::fs::write(t.path(), [1u8; 20_000]).expect("write");
        match all_cached(&a, 100, 19_000) {
            Ok(cached) => assert!(cached),
            // An older kernel, or a sandbox: then nobody asks twice.
            Err(e) => return assert_eq!(e.raw_os_error(), Some(libc::ENOSYS)),
        }
        assert!(!all_cached(&a, 0, 1 << 20).expect("worked before"));
        assert!(all_cached(&a, 0, 0).expect("worked before"));
    }

    #[test]
    fn signal_arrives_through_the_fd_with_its_sender() {
        // In a thread of its own: the mask is the thread's, and tests share the process.
        std::thread::spawn(|| {
            let fd = signal_fd(&[libc::SIGUSR2]).expect("signalfd");
            assert_eq!(read_signal(&fd).expect("read"), None);
            send_to_this_thread(libc::SIGUSR2);
            let s = read_signal(&fd).expect("read").expect("pending");
            assert_eq!(s.signo, libc::SIGUSR2);
            assert_eq!(s.pid, std::process::id());
            assert_eq!(read_signal(&fd).expect("read"), None);
        })
        .join()
        .expect("thread");
    }

    #[expect(unsafe_code, reason = "pthread_kill")]
    fn send_to_this_thread(signo: i32) {
        // SAFETY: pthread_self names a live thread, this one.
        let me = unsafe { libc::pthread_self() };
        // SAFETY: the thread is alive, and the signal is blocked in it.
        assert_eq!(unsafe { libc::pthread_kill(me, signo) }, 0);
    }

    #[test]
    fn no_such_signal_is_einval() {
        assert_eq!(signal_fd(&[4096]).expect_err("no signal").raw_os_error(), Some(libc::EINVAL));
        assert_eq!(ignore_signal(libc::SIGKILL).expect_err("no way").raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn nofile_limit_is_raised_to_the_hard_limit() {
        let n = raise_nofile_limit().expect("own limit");
        let now = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        assert_eq!(now.current.unwrap_or(u64::MAX), n);
    }

    #[test]
    fn peer_of_a_unix_socket_pair_is_this_process() {
        let (a, _b) = std::os::unix::net::UnixStream::pair().expect("pair");
        let c = peer_cred(&a).expect("peercred");
        assert_eq!(c.pid as u32, std::process::id());
    }
}
