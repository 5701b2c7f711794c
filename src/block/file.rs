//! FileNode: a regular file or a block device of the host.
//!
//! ```text
//!   try_pread    RWF_NOWAIT read of the page cache, in the caller's turn: one system call, nothing allocated
//!   try_pwrite   buffered write, in the caller's turn, as long as such writes are quick
//!   co_preadv, co_pwritev, flush, fallocate     the context's engine (io_uring or threads)
//!   lseek, ioctl, fadvise                       the context's thread pool
//! ```
//! With `O_DIRECT` nothing is inline, and what is not a multiple of the device's block is bounced or becomes a
//! read-modify-write that [`RangeLock`] keeps apart from overlapping changes.
//!
//! Any thread. On the way of a read or an overwrite nothing is locked and no shared cache line is written (buffered; below 256 KiB, for
//! larger writes see `write_behind.rs`).
//! The size is that of the opening, or of the last `co_resize`, unless the file is *growable* (what an image format lies on); a
//! file that shrinks underneath reads as zeroes where it has ended. Writes that make a growable file longer register in `extend`, and
//! setting its size excludes them: so setting a size never cuts off what was written meanwhile.
//!
//! # Durability
//! A flush is one fdatasync, shared by those who may share it ([`FlushGroup`]). FUA is `RWF_DSYNC`. If the *sync*
//! part of either fails, the node's flushes fail from then on: the kernel has dropped the pages, and nothing can
//! bring them back.

use super::chain::Claim;
use super::lock_bytes::{LockError, LockMode, lock_image, unlock_image};
use super::quick_writes::QuickWrites;
use super::range_lock::RangeLock;
use super::status_cache::{Invalidate, SCAN_EXTENTS, Scan, StatusCache};
use super::write_behind::{self, WriteBehind};
use super::{
    BlockNode, Error, Extent, FlushGroup, Lent, Limits, OpenError, Result, StatusFlags, WriteFlags, iov,
};
use crate::aio::AioContext;
use crate::co;
use crate::util::buf::IoBuf;
use crate::util::sys;
use crossbeam_utils::CachePadded;
use rustix::fs::{FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use std::io;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// What happens between a write's reply and the disk, in QEMU's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheMode {
    /// Host page cache; durable after a flush.
    #[default]
    Writeback,
    /// `O_DIRECT`, past the page cache; durable after a flush.
    None,
    /// Host page cache; every write is durable when it is answered.
    Writethrough,
    /// `O_DIRECT`, and every write is durable when it is answered.
    Directsync,
    /// Host page cache; flushes and FUA are answered and not done. For data that may be lost.
    Unsafe,
}

impl CacheMode {
    /// All of them, with their names.
    pub const ALL: [(&'static str, CacheMode); 5] = [
        ("writeback", CacheMode::Writeback),
        ("none", CacheMode::None),
        ("writethrough", CacheMode::Writethrough),
        ("directsync", CacheMode::Directsync),
        ("unsafe", CacheMode::Unsafe),
    ];

    fn direct(self) -> bool {
        matches!(self, CacheMode::None | CacheMode::Directsync)
    }

    fn every_write_durable(self) -> bool {
        matches!(self, CacheMode::Writethrough | CacheMode::Directsync)
    }
}

/// What a discard does, and whether zeroing may give space up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiscardMode {
    /// The space is given back to the host.
    #[default]
    Unmap,
    /// Nothing.
    Ignore,
}

impl DiscardMode {
    /// All of them, with their names.
    pub const ALL: [(&'static str, DiscardMode); 2] =
        [("unmap", DiscardMode::Unmap), ("ignore", DiscardMode::Ignore)];
}

/// How a file is opened.
#[derive(Debug, Clone)]
pub struct FileOptions {
    /// Regular file or block device.
    pub path: PathBuf,
    /// Refuse writes, and open the file for reading only.
    pub read_only: bool,
    /// Caching.
    pub cache: CacheMode,
    /// Discarding.
    pub discard: DiscardMode,
    /// Image locks.
    pub lock: LockMode,
    /// An image format is to lie on it: the file may be empty, and grows with what is written. Devices do not grow.
    pub growable: bool,
}

impl FileOptions {
    /// The defaults for a path: read-write, writeback, unmap, locked.
    pub fn new(path: impl Into<PathBuf>) -> FileOptions {
        FileOptions {
            path: path.into(),
            read_only: false,
            cache: CacheMode::default(),
            discard: DiscardMode::default(),
            lock: LockMode::default(),
            growable: false,
        }
    }
}

/// Largest read that is tried inline, in bytes (ours: about 100 us of copying).
const INLINE_READ_MAX: usize = 1 << 20;

/// Largest write that is done inline, in bytes (ours: about 100 us of copying; io_uring would hand it to a kernel thread).
const INLINE_WRITE_MAX: usize = 2 << 20;

/// Unit of the page cache in which a partial write may have to read first (ours: the smallest page).
const PAGE: u64 = 4096;

/// Bytes of one bounced piece (ours: the largest pooled buffer).
const BOUNCE: u64 = 1 << 20;

/// Bytes that one BLKZEROOUT or BLKDISCARD covers, so that a pool thread is not gone for minutes (ours).
const DEVICE_PIECE: u64 = 256 << 20;

/// Bytes that one prefetch call covers (ours).
const PREFETCH_PIECE: u64 = 64 << 20;

/// What zeroes are written from where they cannot be had cheaper. In .bss; aligned for `O_DIRECT`.
#[repr(align(4096))]
struct Zeroes([u8; 64 << 10]);
static ZEROES: Zeroes = Zeroes([0; 64 << 10]);

/// How many times ZEROES go into one write: 4 MiB (ours: bounds the vector and the time of one operation).
const ZEROES_PER_WRITE: usize = 64;

/// How reads can be served without waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Inline {
    /// Not at all.
    Never,
    /// `preadv2` with `RWF_NOWAIT`.
    Nowait,
    /// Every read: the file lives in memory (tmpfs, ramfs), where RWF_NOWAIT is not supported.
    Memory,
}

/// What `O_DIRECT` asks for, in bytes, powers of two.
#[derive(Debug, Clone, Copy)]
struct Direct {
    /// Alignment of memory.
    mem: usize,
    /// Alignment of offsets and lengths.
    block: u64,
}

/// A regular file or a block device of the host. See the module's text.
pub struct FileNode {
    name: String,
    file: OwnedFd,
    /// Another description of the file, without `O_DIRECT`, for the last bytes of a file whose size is not a multiple
    /// of the block: writing them as a whole block would make the file longer.
    tail: OnceLock<OwnedFd>,
    device: bool,
    /// Changes when a growable file does, and by `co_resize`.
    len: CachePadded<AtomicU64>,
    growable: bool,
    read_only: bool,
    cache: CacheMode,
    discard: DiscardMode,
    limits: Limits,
    inline: Inline,
    direct: Option<Direct>,
    /// Unit in which space is given back, in bytes.
    discard_block: u64,
    /// Unit of zeroing by command, in bytes: the sector of a device, 1 for files.
    zero_block: u64,
    lock: LockMode,
    can: Can,
    quick: QuickWrites,
    behind: Arc<WriteBehind>,
    // Padded: flushes and status queries write here, and every request reads what is above.
    flush: CachePadded<FlushGroup>,
    ranges: CachePadded<RangeLock>,
    /// Plain: writes past the end of a growable file. Exclusive: setting its size. Outer to `ranges`.
    extend: CachePadded<RangeLock>,
    status: CachePadded<StatusCache>,
    /// Keeps the file from a second user in this process, while it is part of a qcow2 image.
    claim: Option<Claim>,
    /// Errno that the next sync reports instead of being done; 0: none. For tests.
    sync_fault: AtomicI32,
}

/// What the file system turned out to support; only ever changes from true to false. Read-mostly.
struct Can {
    punch: AtomicBool,
    zero_range: AtomicBool,
    allocate: AtomicBool,
    dsync: AtomicBool,
    /// The kernel tells what is in the page cache, and that is of use.
    tell_cached: AtomicBool,
    seek: AtomicBool,
    device_zero: AtomicBool,
}

fn is(flag: &AtomicBool) -> bool {
    flag.load(Ordering::Relaxed)
}

fn clear(flag: &AtomicBool) {
    flag.store(false, Ordering::Relaxed);
}

/// Whether an error says "this file system or device cannot do that at all".
fn unsupported(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY))
}

fn errno_of(e: &io::Error) -> i32 {
    e.raw_os_error().unwrap_or(libc::EIO)
}

impl FileNode {
    /// Opens and locks an image. Blocks: before serving, or in [`co::co_run_blocking`].
    ///
    /// # Errors
    /// [`OpenError`] says what is wrong with the path, the file or its locks, and what can be done.
    pub fn open(options: &FileOptions) -> std::result::Result<FileNode, OpenError> {
        let path = &options.path;
        let fail = |source: Errno| OpenError::io(path, options.read_only, source.into());

        // O_NONBLOCK: a FIFO must not hang us; it is cleared below, because io_uring takes it at its word for files.
        let mut flags = OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        flags |= if options.read_only { OFlags::RDONLY } else { OFlags::RDWR };
        if options.cache.direct() {
            flags |= OFlags::DIRECT;
        }
        let file = match rustix::fs::open(path, flags, Mode::empty()) {
            Err(Errno::INVAL) if options.cache.direct() => {
                return Err(OpenError::NoDirect { path: path.clone() });
            }
            r => r.map_err(fail)?,
        };
        let stat = rustix::fs::fstat(&file).map_err(fail)?;
        let device = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => false,
            FileType::BlockDevice => true,
            FileType::Directory => return Err(OpenError::Directory { path: path.clone() }),
            _ => return Err(OpenError::NotAnImage { path: path.clone() }),
        };
        let status = rustix::fs::fcntl_getfl(&file).map_err(fail)?;
        let status = status - OFlags::NONBLOCK;
        rustix::fs::fcntl_setfl(&file, status).map_err(fail)?;
        // Nobody asks when an image was read last. The owner of the file, or root, may say so; others read as before.
        let _ = rustix::fs::fcntl_setfl(&file, status | OFlags::NOATIME);

        lock_image(file.as_fd(), options.lock, options.read_only).map_err(|e| match e {
            LockError::Held { byte, meaning, holder } => {
                OpenError::Locked { path: path.clone(), byte, meaning, holder }
            }
            LockError::Unsupported(source) => OpenError::CannotLock { path: path.clone(), source },
        })?;

        let len = if device {
            sys::blk_size(&file).map_err(|e| OpenError::io(path, options.read_only, e))?
        } else {
            u64::try_from(stat.st_size).unwrap_or(0)
        };
        let growable = options.growable && !device;
        if len == 0 && !growable {
            return Err(OpenError::Empty { path: path.clone(), device });
        }

        let sector = if device { u64::from(sys::blk_sector_size(&file).unwrap_or(512)) } else { 1 };
        let direct = options.cache.direct().then(|| direct_alignment(&file, device));
        let inline = if direct.is_some() { Inline::Never } else { probe_inline(&file) };
        let fs_block = u64::try_from(stat.st_blksize).unwrap_or(PAGE).clamp(512, 1 << 20);
        let fs_block = if fs_block.is_power_of_two() { fs_block } else { PAGE };
        let rotational =
            if device { sys::blk_rotational(&file).unwrap_or(false) } else { dev_rotational(stat.st_dev) };

        let node = FileNode {
            name: path.display().to_string(),
            tail: OnceLock::new(),
            device,
            len: CachePadded::new(AtomicU64::new(len)),
            growable,
            read_only: options.read_only,
            cache: options.cache,
            discard: options.discard,
            limits: Limits {
                request_alignment: direct.map_or(1, |d| d.block as u32),
                preferred: fs_block.max(PAGE) as u32,
                fast_zero: !options.read_only,
                rotational,
            },
            inline,
            direct,
            discard_block: if device { sector } else { fs_block },
            zero_block: sector,
            lock: options.lock,
            can: Can {
                punch: AtomicBool::new(true),
                zero_range: AtomicBool::new(true),
                allocate: AtomicBool::new(true),
                dsync: AtomicBool::new(true),
                tell_cached: AtomicBool::new(inline != Inline::Never),
                seek: AtomicBool::new(true),
                device_zero: AtomicBool::new(true),
            },
            quick: QuickWrites::default(),
            behind: Arc::default(),
            flush: CachePadded::new(FlushGroup::new()),
            ranges: CachePadded::new(RangeLock::new()),
            extend: CachePadded::new(RangeLock::new()),
            status: CachePadded::new(StatusCache::new()),
            claim: None,
            sync_fault: AtomicI32::new(0),
            file,
        };
        node.open_tail(len).map_err(fail)?;
        Ok(node)
    }

    /// Opens `tail` if a file of `len` bytes needs it. Blocks.
    fn open_tail(&self, len: u64) -> rustix::io::Result<()> {
        // A growable file may end at a whole block.
        let odd = self.direct.is_some_and(|d| !len.is_multiple_of(d.block));
        if odd && !self.read_only && !self.growable && self.tail.get().is_none() {
            let again = rustix::fs::open(
                format!("/proc/self/fd/{}", self.fd()),
                OFlags::RDWR | OFlags::CLOEXEC,
                Mode::empty(),
            )?;
            self.tail.get_or_init(|| again);
        }
        Ok(())
    }

    /// The size of the file, or of the device, as the system tells it. Blocks.
    fn size_now(&self) -> io::Result<u64> {
        if self.device {
            return sys::blk_size(&self.file);
        }
        Ok(u64::try_from(rustix::fs::fstat(&self.file)?.st_size).unwrap_or(0))
    }

    /// What [`BlockNode::co_resize`] does for a file that does not grow with what is written. Blocks.
    fn resize(&self, at_least: u64) -> io::Result<u64> {
        let (old, now) = (self.len(), self.size_now()?);
        if now < old {
            tracing::warn!(node = %self.name, was = old, now, "the image has become smaller; its size is kept, and what is missing reads as zeroes");
        }
        let len = old.max(now).max(at_least);
        if len > now && len > old {
            if self.device {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            if self.read_only {
                return Err(io::Error::from_raw_os_error(libc::EPERM));
            }
            rustix::fs::ftruncate(&self.file, len)?;
            rustix::fs::fsync(&self.file)?;
        }
        self.open_tail(len)?;
        self.len.store(len, Ordering::SeqCst);
        Ok(len)
    }

    /// Makes it what an image format lies on, as [`FileOptions::growable`] does: for whoever had to look first.
    pub(super) fn into_growable(mut self) -> FileNode {
        self.growable = !self.device;
        if self.growable {
            self.tail = OnceLock::new();
        }
        self
    }

    /// Device and inode (of a device: its own number): what says that two paths are one file.
    pub(super) fn id(&self) -> io::Result<(u64, u64)> {
        let stat = rustix::fs::fstat(&self.file)?;
        Ok(if self.device { (u64::MAX, stat.st_rdev) } else { (stat.st_dev, stat.st_ino) })
    }

    /// Keeps `claim` as long as the file is open.
    pub(super) fn keep_claim(&mut self, claim: Claim) {
        self.claim = Some(claim);
    }

    /// The first bytes of the file, for probing its format. Blocks, as [`FileNode::open`].
    ///
    /// # Errors
    /// What `pread` reports.
    pub fn read_head(&self, max: usize) -> io::Result<Vec<u8>> {
        let max = max.min(usize::try_from(self.len()).unwrap_or(usize::MAX));
        // Whole blocks into aligned memory, for O_DIRECT.
        let mut buf = IoBuf::zeroed(max.next_multiple_of(4096));
        let mut n = 0;
        while n < max {
            match rustix::io::pread(&self.file, &mut buf[n..], n as u64) {
                Ok(0) => break,
                Ok(k) => n += k,
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(buf[..n.min(max)].to_vec())
    }

    /// Whether this is a block device.
    #[must_use]
    pub fn is_device(&self) -> bool {
        self.device
    }

    /// How many fdatasync calls flushes have started; for tests and metrics.
    #[must_use]
    pub fn syncs(&self) -> u64 {
        self.flush.syncs()
    }

    /// How many bytes of long streams were handed to the disk before anybody asked for it; for tests and metrics.
    #[must_use]
    pub fn written_behind(&self) -> u64 {
        self.behind.handed_over()
    }

    /// Makes the next fdatasync fail with `errno` instead of being done. For tests of what follows.
    #[doc(hidden)]
    pub fn fail_next_sync(&self, errno: i32) {
        self.sync_fault.store(errno, Ordering::SeqCst);
    }

    /// Whether extents may be remembered: nobody else changes the file.
    fn keep_status(&self) -> bool {
        self.lock == LockMode::On
    }

    fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn assert_bounds(&self, offset: u64, len: u64) {
        let max = if self.growable { i64::MAX as u64 } else { self.len() };
        assert!(offset.checked_add(len).is_some_and(|e| e <= max), "the range was validated above");
    }

    /// Does a change that ends at `end`, as one that makes the file longer if it does.
    fn co_extending<T>(
        &self,
        range: std::ops::Range<u64>,
        change: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        if !self.growable || range.end <= self.len() {
            return change();
        }
        let end = range.end;
        let _extending = self.extend.co_plain(range);
        let r = change()?;
        self.len.fetch_max(end, Ordering::SeqCst);
        Ok(r)
    }

    /// Sets the size of a growable file; only ever to a larger one if `grow`. Returns what it was, by the file system.
    fn co_set_len(&self, len: u64, grow: bool) -> io::Result<u64> {
        let _alone = self.extend.co_exclusive(0..u64::MAX);
        let _invalidate = Invalidate(&self.status);
        let (now, len) = co::co_run_blocking(|| {
            let stat = rustix::fs::fstat(&self.file)?;
            // What a failed write has left past the end counts too: it must not be taken for zeroes.
            let now = u64::try_from(stat.st_size).unwrap_or(0);
            let to = if grow { len.max(now) } else { len };
            if to != now {
                rustix::fs::ftruncate(&self.file, to)?;
            }
            Ok::<(u64, u64), io::Error>((now, to))
        })?;
        self.len.store(len, Ordering::SeqCst);
        Ok(now)
    }

    /// Whether a write must be durable on return.
    fn durable(&self, flags: WriteFlags) -> bool {
        match self.cache {
            CacheMode::Unsafe => false,
            c => c.every_write_durable() || flags.contains(WriteFlags::FUA),
        }
    }

    // ---------------------------------------------------------------------------------------------- reading

    /// Fills `len` bytes of `bufs` from position `skip` on; zeroes where the file has ended.
    fn co_read_all(&self, bufs: &mut [IoSliceMut<'_>], len: usize, offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let r = if done == 0 && bufs.len() <= iov::IOV_MAX {
                co::co_preadv(self.fd(), bufs, offset)
            } else {
                co::co_preadv(self.fd(), &mut iov::window_mut(bufs, done, len - done), offset + done as u64)
            };
            match r {
                Ok(0) => {
                    iov::zero_from(bufs, done);
                    return Ok(());
                }
                Ok(n) => {
                    assert!(n <= len - done, "the kernel read more than was asked");
                    done += n;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn co_read_direct(
        &self,
        d: Direct,
        offset: u64,
        bufs: &mut [IoSliceMut<'_>],
        len: usize,
    ) -> io::Result<()> {
        let end = offset + len as u64;
        let fits = |b: &IoSliceMut<'_>| {
            (b.as_ptr() as usize).is_multiple_of(d.mem) && (b.len() as u64).is_multiple_of(d.block)
        };
        if offset.is_multiple_of(d.block) && bufs.iter().all(fits) {
            return self.co_read_blocks(bufs, len, offset, d);
        }
        let (mut at, high) = (offset - offset % d.block, end.next_multiple_of(d.block));
        while at < high {
            let piece = (high - at).min(BOUNCE);
            let mut bounce = IoBuf::new(piece as usize);
            self.co_read_blocks(&mut [IoSliceMut::new(&mut bounce)], piece as usize, at, d)?;
            let (from, to) = (at.max(offset), (at + piece).min(end));
            iov::scatter(bufs, (from - offset) as usize, &bounce[(from - at) as usize..(to - at) as usize]);
            at += piece;
        }
        Ok(())
    }

    /// [`FileNode::co_read_all`] of whole blocks: a short read that is not a whole number of blocks is the file's end.
    fn co_read_blocks(
        &self,
        bufs: &mut [IoSliceMut<'_>],
        len: usize,
        offset: u64,
        d: Direct,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let r =
                co::co_preadv(self.fd(), &mut iov::window_mut(bufs, done, len - done), offset + done as u64);
            match r {
                Ok(n) => {
                    assert!(n <= len - done, "the kernel read more than was asked");
                    done += n;
                    if n == 0 || !(n as u64).is_multiple_of(d.block) {
                        iov::zero_from(bufs, done);
                        return Ok(());
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    // ---------------------------------------------------------------------------------------------- writing

    /// Writes all of `bufs`; no thought of durability unless `dsync`.
    fn co_write_all(&self, fd: RawFd, offset: u64, bufs: &[IoSlice<'_>], dsync: bool) -> io::Result<()> {
        let len = iov::total(bufs);
        let mut done = 0;
        while done < len {
            let r = if done == 0 && bufs.len() <= iov::IOV_MAX {
                co::co_pwritev(fd, bufs, offset, dsync)
            } else {
                co::co_pwritev(fd, &iov::window(bufs, done, len - done), offset + done as u64, dsync)
            };
            match r {
                // Not an answer that the kernel gives for files; without this a broken one would spin us.
                Ok(0) => return Err(io::Error::from_raw_os_error(libc::EIO)),
                Ok(n) => {
                    assert!(n <= len - done, "the kernel wrote more than was asked");
                    done += n;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Writes all of `bufs`, durably if `durable`.
    fn co_write_fd(&self, fd: RawFd, offset: u64, bufs: &[IoSlice<'_>], durable: bool) -> io::Result<()> {
        if !durable {
            return self.co_write_all(fd, offset, bufs, false);
        }
        if is(&self.can.dsync) {
            match self.co_write_all(fd, offset, bufs, true) {
                Ok(()) => return Ok(()),
                Err(e) if unsupported(&e) => clear(&self.can.dsync),
                Err(e) => {
                    // Was it the write or the sync? A failed sync has used up the kernel's report of the lost pages,
                    // so the next fdatasync would succeed: it must be remembered here. A failed write must not be.
                    self.co_write_all(fd, offset, bufs, false)?;
                    tracing::error!(
                        node = %self.name,
                        offset,
                        errno = errno_of(&e),
                        "a durable write could not be synced: data may be lost, flushes fail from now on"
                    );
                    self.flush.fail(errno_of(&e));
                    return Err(e);
                }
            }
        }
        self.co_write_all(fd, offset, bufs, false)?;
        self.co_sync()
    }

    fn co_write(&self, offset: u64, bufs: &[IoSlice<'_>], durable: bool) -> io::Result<()> {
        match self.direct {
            None => self.co_write_fd(self.fd(), offset, bufs, durable),
            Some(d) => self.co_write_direct(d, offset, bufs, durable),
        }
    }

    fn co_write_direct(&self, d: Direct, offset: u64, bufs: &[IoSlice<'_>], durable: bool) -> io::Result<()> {
        let len = iov::total(bufs);
        let end = offset + len as u64;
        // The file's odd end goes through the page cache; see `tail`.
        let cut = self.len() - self.len() % d.block;
        let body_end = if self.tail.get().is_some() { end.min(cut) } else { end };
        if offset < body_end {
            let body = (body_end - offset) as usize;
            let aligned = offset.is_multiple_of(d.block) && body_end % d.block == 0;
            let fits = |b: &IoSlice<'_>| {
                (b.as_ptr() as usize).is_multiple_of(d.mem) && (b.len() as u64).is_multiple_of(d.block)
            };
            if aligned && body == len && bufs.iter().all(fits) {
                let _range = self.ranges.co_plain(offset..body_end);
                self.co_write_fd(self.fd(), offset, bufs, durable)?;
            } else {
                let (low, high) = (offset - offset % d.block, body_end.next_multiple_of(d.block));
                let _range = if aligned {
                    self.ranges.co_plain(low..high)
                } else {
                    self.ranges.co_exclusive(low..high)
                };
                self.co_bounce(d, offset..body_end, low..high, bufs, durable)?;
            }
        }
        if body_end < end {
            let tail = self.tail.get().expect("the body is shorter only when there is a tail");
            let from = offset.max(cut);
            let _range = self.ranges.co_plain(cut..self.len());
            let bufs = iov::window(bufs, (from - offset) as usize, usize::MAX);
            self.co_write_fd(tail.as_raw_fd(), from, &bufs, durable)?;
        }
        Ok(())
    }

    /// Writes `range` (the front of `bufs`) as the whole blocks `blocks`, through bounce buffers; reads the blocks at
    /// both ends first where the range covers them partly. The caller holds the blocks' range.
    fn co_bounce(
        &self,
        d: Direct,
        range: std::ops::Range<u64>,
        blocks: std::ops::Range<u64>,
        bufs: &[IoSlice<'_>],
        durable: bool,
    ) -> io::Result<()> {
        let mut at = blocks.start;
        while at < blocks.end {
            let piece = (blocks.end - at).min(BOUNCE);
            let mut bounce = IoBuf::new(piece as usize);
            let (from, to) = (at.max(range.start), (at + piece).min(range.end));
            let block = d.block as usize;
            if from > at {
                self.co_read_blocks(&mut [IoSliceMut::new(&mut bounce[..block])], block, at, d)?;
            }
            let last = piece as usize - block;
            if to < at + piece && !(last == 0 && from > at) {
                let last_at = at + last as u64;
                self.co_read_blocks(&mut [IoSliceMut::new(&mut bounce[last..])], block, last_at, d)?;
            }
            let inside = (from - at) as usize..(to - at) as usize;
            iov::gather(bufs, (from - range.start) as usize, &mut bounce[inside]);
            self.co_write_fd(self.fd(), at, &[IoSlice::new(&bounce)], durable)?;
            at += piece;
        }
        Ok(())
    }

    // ----------------------------------------------------------------------------------------------- zeroing

    fn co_fallocate(&self, mode: i32, offset: u64, len: u64) -> io::Result<()> {
        let _range = self.direct.map(|_| self.ranges.co_plain(offset..offset + len));
        loop {
            match co::co_fallocate(self.fd(), mode, offset, len) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                r => return r,
            }
        }
    }

    /// fallocate if it is not known to be unsupported; `None` when it is.
    fn co_try_fallocate(&self, can: &AtomicBool, mode: i32, offset: u64, len: u64) -> Option<io::Result<()>> {
        if !is(can) {
            return None;
        }
        match self.co_fallocate(mode, offset, len) {
            Err(e) if unsupported(&e) => {
                clear(can);
                None
            }
            r => Some(r),
        }
    }

    fn co_punch(&self, offset: u64, len: u64) -> Option<io::Result<()>> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        self.co_try_fallocate(&self.can.punch, mode, offset, len)
    }

    fn co_zero_file(&self, offset: u64, len: u64, unmap: bool, fallback: bool) -> io::Result<()> {
        if unmap && let Some(r) = self.co_punch(offset, len) {
            return r;
        }
        let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        if let Some(r) = self.co_try_fallocate(&self.can.zero_range, mode, offset, len) {
            return r;
        }
        // No zero-range here (tmpfs): give the space up and take it again.
        if is(&self.can.allocate)
            && let Some(r) = self.co_punch(offset, len)
        {
            r?;
            if let Some(r) = self.co_try_fallocate(&self.can.allocate, libc::FALLOC_FL_KEEP_SIZE, offset, len)
            {
                return r;
            }
            // It is zero but not allocated, and something has changed: no way back to "not supported".
            return self.co_write_zeroes(offset, len);
        }
        if !fallback {
            return Err(io::Error::from_raw_os_error(libc::ENOTSUP));
        }
        self.co_write_zeroes(offset, len)
    }

    /// Makes the file longer for zeroes in `offset..end`, which was past its end a moment ago.
    fn co_zero_past_end(&self, offset: u64, end: u64) -> io::Result<()> {
        let before = self.co_set_len(end, true)?;
        if before > offset {
            // Somebody else made it longer meanwhile, or a failed write has left something there.
            return self.co_zero_file(offset, before.min(end) - offset, false, true);
        }
        Ok(())
    }

    fn co_zero_device(&self, offset: u64, len: u64, unmap: bool, fallback: bool) -> io::Result<()> {
        let end = offset + len;
        let (low, high) = (offset.next_multiple_of(self.zero_block), end - end % self.zero_block);
        if low >= high {
            // Less than a sector, or parts of two: a write is as quick as anything.
            return self.co_write_zeroes(offset, len);
        }
        let punched = if unmap { self.co_punch(low, high - low) } else { None };
        match punched {
            Some(r) => r?,
            // BLKZEROOUT writes zeroes by itself if the device has no command for it, and does not say which.
            None if !fallback => return Err(io::Error::from_raw_os_error(libc::ENOTSUP)),
            None => self.co_zero_out(low, high)?,
        }
        if offset < low {
            self.co_write_zeroes(offset, low - offset)?;
        }
        if high < end {
            self.co_write_zeroes(high, end - high)?;
        }
        Ok(())
    }

    fn co_zero_out(&self, low: u64, high: u64) -> io::Result<()> {
        let mut at = low;
        while at < high && is(&self.can.device_zero) {
            let n = (high - at).min(DEVICE_PIECE);
            let _range = self.direct.map(|_| self.ranges.co_plain(at..at + n));
            match co::co_run_blocking(|| sys::blk_zero_out(&self.file, at, n)) {
                Ok(()) => at += n,
                Err(e) if unsupported(&e) => clear(&self.can.device_zero),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if at < high { self.co_write_zeroes(at, high - at) } else { Ok(()) }
    }

    /// Writes zeroes the slow way, in bounded pieces.
    fn co_write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let mut left = (end - at).min((ZEROES.0.len() * ZEROES_PER_WRITE) as u64) as usize;
            let mut bufs = Vec::with_capacity(ZEROES_PER_WRITE);
            let from = at;
            while left > 0 {
                let n = left.min(ZEROES.0.len());
                bufs.push(IoSlice::new(&ZEROES.0[..n]));
                left -= n;
                at += n as u64;
            }
            self.co_write(from, &bufs, false)?;
        }
        Ok(())
    }

    // -------------------------------------------------------------------------------------------- the rest

    fn co_discard_file(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset + len;
        let low = offset.next_multiple_of(self.discard_block);
        // The last block may reach past the end: there is nothing of anybody's there.
        let high = if end == self.len() {
            end.next_multiple_of(self.discard_block)
        } else {
            end - end % self.discard_block
        };
        if low >= high {
            return Ok(());
        }
        self.co_punch(low, high - low).unwrap_or(Ok(()))
    }

    fn co_discard_device(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset + len;
        let (mut at, high) = (offset.next_multiple_of(self.discard_block), end - end % self.discard_block);
        while at < high && is(&self.can.punch) {
            let n = (high - at).min(DEVICE_PIECE);
            let _range = self.direct.map(|_| self.ranges.co_plain(at..at + n));
            match co::co_run_blocking(|| sys::blk_discard(&self.file, at, n)) {
                Ok(()) => at += n,
                Err(e) if unsupported(&e) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn co_sync(&self) -> io::Result<()> {
        if self.cache == CacheMode::Unsafe || self.read_only {
            return Ok(());
        }
        self.flush.co_flush(|| {
            let injected = self.sync_fault.swap(0, Ordering::SeqCst);
            let r = if injected == 0 {
                co::co_fsync(self.fd(), true)
            } else {
                Err(io::Error::from_raw_os_error(injected))
            };
            if let Err(e) = &r {
                tracing::error!(
                    node = %self.name,
                    errno = errno_of(e),
                    "fdatasync failed: data may be lost, flushes fail from now on"
                );
            }
            r
        })
    }

    /// After a write that did not make the file longer: hands to the disk what lies behind a long stream.
    fn write_behind(&self, written: std::ops::Range<u64>) {
        if written.end - written.start < write_behind::WRITE_MIN || self.cache != CacheMode::Writeback {
            return;
        }
        let Some(ctx) = AioContext::current() else { return };
        let Some(piece) = self.behind.wrote(written) else { return };
        let Ok(file) = self.file.try_clone() else { return self.behind.done(0) };
        let behind = Arc::clone(&self.behind);
        let len = piece.end - piece.start;
        let work = move || sys::begin_writeback(&file, piece.start, len).map(|()| len as usize);
        // Errors are kept by the kernel, and found by the flush.
        ctx.submit_blocking(Box::new(work), Box::new(move |r| behind.done(r.unwrap_or(0) as u64)));
    }

    /// Whether a range is in the page cache, as far as the kernel tells.
    fn is_cached(&self, offset: u64, len: u64) -> bool {
        is(&self.can.tell_cached)
            && sys::all_cached(&self.file, offset, len).unwrap_or_else(|error| {
                tracing::debug!(node = %self.name, %error, "the kernel does not tell what is cached: nothing is lent");
                clear(&self.can.tell_cached);
                false
            })
    }

    /// Whether a partial page at either end of a write is in the page cache, so that the write reads nothing.
    fn edges_cached(&self, offset: u64, len: u64) -> bool {
        let cached = |at: u64| matches!(sys::pread_nowait(&self.file, &mut [0u8], at), Ok(1));
        let end = offset + len;
        (offset.is_multiple_of(PAGE) || cached(offset)) && (end.is_multiple_of(PAGE) || cached(end - 1))
    }
}

impl Drop for FileNode {
    fn drop(&mut self) {
        if self.lock != LockMode::Off {
            unlock_image(self.file.as_fd());
        }
    }
}

impl BlockNode for FileNode {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> u64 {
        self.len.load(Ordering::SeqCst)
    }

    fn grows(&self) -> bool {
        self.growable
    }

    fn co_truncate(&self, len: u64) -> Result<()> {
        if !self.growable {
            return Err(Error::from_errno("truncate", &self.name, len, libc::ENOTSUP));
        }
        self.co_set_len(len, len >= self.len())
            .map(drop)
            .map_err(|e| Error::new("truncate", &self.name, len, e))
    }

    fn co_resize(&self, at_least: u64) -> Result<u64> {
        if self.growable {
            // Its size is followed all the time.
            if at_least > self.len() {
                self.co_truncate(at_least)?;
                self.co_flush()?;
            }
            return Ok(self.len());
        }
        let _invalidate = Invalidate(&self.status);
        co::co_run_blocking(|| self.resize(at_least))
            .map_err(|e| Error::new("resize", &self.name, at_least, e))
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn try_pread_some(&self, offset: u64, buf: &mut [u8]) -> usize {
        self.assert_bounds(offset, buf.len() as u64);
        if buf.len() > INLINE_READ_MAX {
            return 0;
        }
        let r = match self.inline {
            Inline::Never => return 0,
            Inline::Nowait => sys::pread_nowait(&self.file, buf, offset),
            Inline::Memory => rustix::io::pread(&self.file, &mut *buf, offset).map_err(io::Error::from),
        };
        // Whatever is wrong, the engine's read will say it.
        r.unwrap_or(0)
    }

    fn try_preadv_some(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> usize {
        let len = iov::total_mut(bufs);
        self.assert_bounds(offset, len as u64);
        if len > INLINE_READ_MAX {
            return 0;
        }
        let r = match self.inline {
            Inline::Never => return 0,
            Inline::Nowait => sys::preadv_nowait(&self.file, bufs, offset),
            Inline::Memory => rustix::io::preadv(&self.file, bufs, offset).map_err(io::Error::from),
        };
        // Whatever is wrong, the engine's read will say it.
        r.unwrap_or(0)
    }

    fn lends(&self, offset: u64, len: usize, no_holes: bool) -> bool {
        self.assert_bounds(offset, len as u64);
        let len = len as u64;
        self.is_cached(offset, len)
            && (!no_holes || self.device || matches!(sys::all_data(&self.file, offset, len), Ok(true)))
    }

    fn try_lend(&self, offset: u64, len: usize, f: &mut dyn FnMut(&Lent<'_>)) -> bool {
        self.assert_bounds(offset, len as u64);
        let lends = is(&self.can.tell_cached);
        if lends {
            f(&Lent { file: self.file.as_fd(), offset, len });
        }
        lends
    }

    fn gives_back(&self, unit: u64) -> bool {
        let whole = unit.is_multiple_of(self.discard_block);
        whole && !self.device && self.discard == DiscardMode::Unmap && is(&self.can.punch)
    }

    fn try_pwrite(&self, offset: u64, buf: &[u8]) -> Option<Result<()>> {
        self.try_pwritev(offset, &[IoSlice::new(buf)])
    }

    fn try_pwritev(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Option<Result<()>> {
        let len = iov::total(bufs);
        self.assert_bounds(offset, len as u64);
        let cached = matches!(self.cache, CacheMode::Writeback | CacheMode::Unsafe);
        if !cached || self.read_only || self.inline == Inline::Never || len > INLINE_WRITE_MAX {
            return None;
        }
        // A large write may have to wait now: the engine's threads can.
        if len as u64 >= write_behind::WRITE_MIN && self.behind.is_busy() {
            return None;
        }
        let begun = self.quick.begin()?;
        let end = offset + len as u64;
        // The file system keeps space and size for later, so making a file longer is no slower than filling a hole.
        let extending = match self.growable && end > self.len() {
            true => Some(self.extend.try_plain(offset..end)?),
            false => None,
        };
        if self.inline == Inline::Nowait && !self.edges_cached(offset, len as u64) {
            return None;
        }
        let invalidate = Invalidate(&self.status);
        let r = match bufs {
            [buf] => rustix::io::pwrite(&self.file, buf, offset),
            _ => rustix::io::pwritev(&self.file, bufs, offset),
        };
        drop(invalidate);
        self.quick.end(&begun);
        match r {
            Ok(n) if n == len => {
                if extending.is_some() {
                    self.len.fetch_max(end, Ordering::SeqCst);
                } else {
                    self.write_behind(offset..end);
                }
                Some(Ok(()))
            }
            // A short write is the front of an error: the whole write again gets the whole story.
            Ok(_) | Err(Errno::INTR | Errno::AGAIN) => None,
            Err(e) => Some(Err(Error::new("pwrite", &self.name, offset, e.into()))),
        }
    }

    fn co_preadv(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        let len = iov::total_mut(bufs);
        self.assert_bounds(offset, len as u64);
        match self.direct {
            None => self.co_read_all(bufs, len, offset),
            Some(d) => self.co_read_direct(d, offset, bufs, len),
        }
        .map_err(|e| Error::new("preadv", &self.name, offset, e))
    }

    fn co_pwritev(&self, offset: u64, bufs: &[IoSlice<'_>], flags: WriteFlags) -> Result<()> {
        let len = iov::total(bufs) as u64;
        self.assert_bounds(offset, len);
        let _invalidate = Invalidate(&self.status);
        let extends = offset + len > self.len();
        self.co_extending(offset..offset + len, || self.co_write(offset, bufs, self.durable(flags)))
            .map_err(|e| Error::new("pwritev", &self.name, offset, e))?;
        if !extends {
            self.write_behind(offset..offset + len);
        }
        Ok(())
    }

    fn co_pwrite_zeroes(&self, offset: u64, len: u64, flags: WriteFlags) -> Result<()> {
        self.assert_bounds(offset, len);
        let unmap = flags.contains(WriteFlags::MAY_UNMAP) && self.discard == DiscardMode::Unmap;
        let fallback = !flags.contains(WriteFlags::NO_FALLBACK);
        let invalidate = Invalidate(&self.status);
        let zeroed = if self.device {
            self.co_zero_device(offset, len, unmap, fallback)
        } else {
            let end = offset + len;
            let now = self.len();
            let inside = len.min(now.saturating_sub(offset));
            let zeroed = if inside > 0 { self.co_zero_file(offset, inside, unmap, fallback) } else { Ok(()) };
            // Past the end everything is zero: only the size is missing.
            zeroed.and_then(|()| if end > now { self.co_zero_past_end(now.max(offset), end) } else { Ok(()) })
        };
        drop(invalidate);
        let synced = || if self.durable(flags) { self.co_sync() } else { Ok(()) };
        zeroed.and_then(|()| synced()).map_err(|e| Error::new("write_zeroes", &self.name, offset, e))
    }

    fn co_pdiscard(&self, offset: u64, len: u64) -> Result<()> {
        self.assert_bounds(offset, len);
        if self.discard == DiscardMode::Ignore {
            return Ok(());
        }
        let _invalidate = Invalidate(&self.status);
        if self.device { self.co_discard_device(offset, len) } else { self.co_discard_file(offset, len) }
            .map_err(|e| Error::new("discard", &self.name, offset, e))
    }

    fn co_flush(&self) -> Result<()> {
        self.behind.flushed();
        self.co_sync().map_err(|e| Error::new("fdatasync", &self.name, 0, e))
    }

    fn co_block_status(&self, offset: u64, len: u64) -> Result<Extent> {
        self.assert_bounds(offset, len);
        let data = Extent { len, flags: StatusFlags::DATA };
        if self.device || !is(&self.can.seek) {
            return Ok(data);
        }
        if offset >= self.len() {
            return Ok(Extent { len, flags: StatusFlags::ZERO });
        }
        let range = offset..(offset + len).min(self.len());
        let len = range.end - range.start;
        if self.keep_status()
            && let Some(e) = self.status.lookup(range.clone())
        {
            return Ok(e);
        }
        let generation = self.status.generation();
        let max = if self.keep_status() { SCAN_EXTENTS } else { 1 };
        let (fd, size) = (self.file.as_fd(), self.len());
        match co::co_run_blocking(|| scan(fd, range.start, range.end, size, max)) {
            Ok(scan) => {
                let (end, flags) = scan.extents[0];
                if self.keep_status() {
                    self.status.insert(generation, scan);
                }
                Ok(Extent { len: end.min(offset + len) - offset, flags })
            }
            Err(e) => {
                // "Data" is always a true answer.
                if matches!(e, Errno::INVAL | Errno::OPNOTSUPP) {
                    clear(&self.can.seek);
                }
                tracing::debug!(node = %self.name, offset, errno = e.raw_os_error(), "no extents from lseek");
                Ok(data)
            }
        }
    }

    fn co_cache(&self, offset: u64, len: u64) -> Result<()> {
        self.assert_bounds(offset, len);
        if self.direct.is_some() {
            return Ok(());
        }
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let n = (end - at).min(PREFETCH_PIECE);
            let size = std::num::NonZeroU64::new(n);
            let fd = self.file.as_fd();
            co::co_run_blocking(|| rustix::fs::fadvise(fd, at, size, rustix::fs::Advice::WillNeed))
                .map_err(|e| Error::new("fadvise", &self.name, at, e.into()))?;
            at += n;
        }
        Ok(())
    }
}

/// Finds at most `max` extents from `start` on that begin before `end`. Blocks: lseek may read extent tables.
fn scan(fd: BorrowedFd<'_>, start: u64, end: u64, size: u64, max: usize) -> std::result::Result<Scan, Errno> {
    let mut extents: Vec<(u64, StatusFlags)> = Vec::new();
    let mut at = start;
    while at < end && extents.len() < max {
        let data = match rustix::fs::seek(fd, SeekFrom::Data(at)) {
            // No data up to the end of the file, which may have come nearer since we opened it.
            Err(Errno::NXIO) => {
                extents.push((size, StatusFlags::ZERO));
                break;
            }
            r => r?.clamp(at, size),
        };
        if data > at {
            extents.push((data, StatusFlags::ZERO));
            at = data;
            if at >= end || extents.len() == max {
                break;
            }
        }
        let hole = match rustix::fs::seek(fd, SeekFrom::Hole(at)) {
            // The file has just become shorter than `at`: the next round sees it.
            Err(Errno::NXIO) => at,
            r => r?.min(size),
        };
        if hole <= at {
            // It changes under us. Call one block data, which is always true, and go on behind it.
            let next = ((at / PAGE + 1) * PAGE).min(size);
            extents.push((next, StatusFlags::DATA));
            at = next;
        } else {
            extents.push((hole, StatusFlags::DATA));
            at = hole;
        }
    }
    assert!(!extents.is_empty(), "a scan of something finds something");
    Ok(Scan { start, extents })
}

/// Whether and how reads can be served from memory.
fn probe_inline(file: &OwnedFd) -> Inline {
    // <linux/magic.h>: TMPFS_MAGIC, RAMFS_MAGIC.
    const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];
    if rustix::fs::fstatfs(file).is_ok_and(|s| IN_MEMORY.contains(&(s.f_type as u64 & 0xffff_ffff))) {
        return Inline::Memory;
    }
    match sys::pread_nowait(file, &mut [0u8], 0) {
        Err(e) if e.raw_os_error() != Some(libc::EAGAIN) => Inline::Never,
        _ => Inline::Nowait,
    }
}

/// What `O_DIRECT` asks for on this file: the kernel says it (Linux 6.1), the device says it, or reads tell.
fn direct_alignment(file: &OwnedFd, device: bool) -> Direct {
    use rustix::fs::{AtFlags, StatxFlags};
    if let Ok(s) = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
        && s.stx_mask & StatxFlags::DIOALIGN.bits() != 0
        && s.stx_dio_offset_align.is_power_of_two()
        && s.stx_dio_mem_align.is_power_of_two()
        && s.stx_dio_mem_align as usize <= crate::util::buf::ALIGN
    {
        return Direct { mem: s.stx_dio_mem_align as usize, block: u64::from(s.stx_dio_offset_align) };
    }
    if device && let Ok(sector) = sys::blk_sector_size(file) {
        return Direct { mem: crate::util::buf::ALIGN, block: u64::from(sector) };
    }
    let mut buf = IoBuf::new(4096);
    for block in [512u64, 1024, 2048] {
        if rustix::io::pread(file, &mut buf[..block as usize], block) != Err(Errno::INVAL) {
            return Direct { mem: crate::util::buf::ALIGN, block };
        }
    }
    Direct { mem: crate::util::buf::ALIGN, block: 4096 }
}

/// Whether the disk behind a file system spins, as far as sysfs tells; false where it does not.
fn dev_rotational(dev: u64) -> bool {
    let (major, minor) = (rustix::fs::major(dev), rustix::fs::minor(dev));
    let base = format!("/sys/dev/block/{major}:{minor}");
    // A partition has no queue of its own.
    [Path::new(&base).join("queue/rotational"), Path::new(&base).join("../queue/rotational")]
        .iter()
        .find_map(|p| std::fs::read_to_string(p).ok())
        .is_some_and(|s| s.trim() == "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scan_sees_data_and_holes() {
        let t = tempfile::tempfile().expect("temp file");
        t.set_len(1 << 20).expect("size");
        std::os::unix::fs::FileExt::write_all_at(&t, &[1; 4096], 65536).expect("write");
        let s = scan(t.as_fd(), 0, 1 << 20, 1 << 20, 100).expect("scan");
        assert_eq!(s.extents.first(), Some(&(65536, StatusFlags::ZERO)));
        assert_eq!(s.extents[1].1, StatusFlags::DATA);
        assert_eq!(s.extents.last(), Some(&(1 << 20, StatusFlags::ZERO)));
        let one = scan(t.as_fd(), 65536, 1 << 20, 1 << 20, 1).expect("scan");
        assert_eq!(one.extents.len(), 1);
        assert_eq!(one.extents[0].1, StatusFlags::DATA);
        // A node that believes in a longer file.
        let past = scan(t.as_fd(), 2 << 20, 3 << 20, 4 << 20, 9).expect("scan");
        assert_eq!(past.extents, [(4 << 20, StatusFlags::ZERO)]);
    }
}
