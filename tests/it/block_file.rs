//! Files: opening and its errors, probing, what is served inline, zeroing and space, status, full disks.

use crate::support::{Mount, engines, iothread, run, run_in_coroutine, skip, tmpfs_dir};
use conbd::aio::engine::EngineChoice;
use conbd::block::{
    BlockNode, CacheMode, DiscardMode, Extent, FileNode, FileOptions, Format, OpenError, OpenOptions,
    RawNode, StatusFlags, WriteFlags, co_open, open,
};
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const MIB: u64 = 1 << 20;

fn image_in(dir: &Path, size: u64) -> PathBuf {
    let path = dir.join("image");
    File::create(&path).unwrap().set_len(size).unwrap();
    path
}

fn co_read(node: &dyn BlockNode, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xee; len];
    node.co_preadv(offset, &mut [IoSliceMut::new(&mut buf)]).expect("read");
    buf
}

fn co_write(node: &dyn BlockNode, offset: u64, data: &[u8]) -> Result<(), i32> {
    node.co_pwritev(offset, &[IoSlice::new(data)], WriteFlags::empty()).map_err(|e| e.errno())
}

fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

// ------------------------------------------------------------------------------------------------ opening

#[track_caller]
fn refuses(path: &Path, says: &[&str]) {
    let e = match open(&OpenOptions::new(path)) {
        Ok(_) => panic!("{path:?} was opened"),
        Err(e) => e,
    };
    let text = e.to_string();
    for s in says {
        assert!(text.contains(s), "{text:?} does not say {s:?}");
    }
    assert_ne!(e.errno(), 0);
}

#[test]
fn open_errors_say_what_is_wrong_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    refuses(&dir.path().join("nowhere"), &["nowhere", "does not exist", "create it"]);
    refuses(&dir.path().join("image/below"), &["does not exist"]);
    refuses(dir.path(), &["is a directory"]);
    refuses(Path::new("/dev/null"), &["neither a regular file nor a block device"]);
    let empty = image_in(dir.path(), 0);
    refuses(&empty, &["is empty", "truncate -s"]);
    // A FIFO without a writer would make a plain open wait for ever.
    let fifo = dir.path().join("fifo");
    run("mkfifo", &[fifo.to_str().unwrap()]).unwrap();
    refuses(&fifo, &["neither a regular file nor a block device"]);
    let read_only = OpenOptions { read_only: true, ..OpenOptions::new(dir.path()) };
    assert!(matches!(open(&read_only), Err(OpenError::Directory { .. })), "also where open(2) allows it");
}

#[test]
fn permission_error_names_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = image_in(dir.path(), MIB);
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o444)).unwrap();
    if rustix::process::geteuid().is_root() {
        // Root may write it; an immutable mount says EROFS instead.
        skip("EACCES when opening an image", "running as root, who may open anything");
        return;
    }
    refuses(&path, &["no permission", "read-only"]);
    let read_only = OpenOptions { read_only: true, ..OpenOptions::new(&path) };
    assert!(open(&read_only).is_ok());
}

#[test]
fn read_only_file_system_is_said_so() {
    let Some(m) = Mount::new("tmpfs", "size=2m", "an image on a read-only file system") else { return };
    let path = image_in(m.path(), MIB);
    run("mount", &["-o", "remount,ro", m.path().to_str().unwrap()]).unwrap();
    refuses(&path, &["read-only", "open it read-only"]);
    assert!(open(&OpenOptions { read_only: true, ..OpenOptions::new(&path) }).is_ok());
}

#[test]
fn window_must_be_inside() {
    let dir = tempfile::tempdir().unwrap();
    let path = image_in(dir.path(), 1000);
    let with =
        |offset, size| open(&OpenOptions { offset, size, format: Format::Raw, ..OpenOptions::new(&path) });
    assert_eq!(with(0, None).unwrap().len(), 1000);
    assert_eq!(with(1, None).unwrap().len(), 999);
    assert_eq!(with(999, Some(1)).unwrap().len(), 1);
    for (offset, size) in
        [(1000, None), (1001, None), (999, Some(2)), (u64::MAX, Some(2)), (0, Some(0)), (1, Some(u64::MAX))]
    {
        assert!(matches!(with(offset, size), Err(OpenError::Window { .. })), "{offset} {size:?}");
    }
}

#[test]
fn words_of_options_are_parsed_and_printed() {
    for (word, mode) in CacheMode::ALL {
        assert_eq!(word.parse::<CacheMode>(), Ok(mode));
        assert_eq!(mode.to_string(), word);
    }
    let e = "writebak".parse::<CacheMode>().unwrap_err().to_string();
    assert!(e.contains("writebak") && e.contains("writeback, none"), "{e}");
}

#[test]
fn image_can_be_opened_from_a_coroutine() {
    let dir = tempfile::tempdir().unwrap();
    let path = image_in(dir.path(), 12345);
    let t = iothread("t", EngineChoice::Auto);
    let node = run_in_coroutine(t.context(), move || co_open(&OpenOptions::new(path)));
    assert_eq!(node.unwrap().len(), 12345);
}

// ------------------------------------------------------------------------------------------------ probing

#[test]
fn foreign_formats_are_named_and_format_raw_serves_their_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    for format in ["qcow", "qed", "vmdk", "vdi", "vhdx", "vpc", "parallels"] {
        run("qemu-img", &["create", "-q", "-f", format, path.to_str().unwrap(), "64M"]).unwrap();
        refuses(&path, &[&format!("looks like {format}"), "use the format raw"]);
        let raw = open(&OpenOptions { format: Format::Raw, ..OpenOptions::new(&path) }).unwrap();
        assert_eq!(raw.len(), std::fs::metadata(&path).unwrap().len());
        drop(raw);
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn probed_raw_image_keeps_signatures_out_of_its_first_sector() {
    let dir = tempfile::tempdir().unwrap();
    let path = image_in(dir.path(), MIB);
    let t = iothread("t", EngineChoice::Auto);
    let probed = open(&OpenOptions::new(&path)).unwrap();
    let probed = run_in_coroutine(t.context(), move || {
        let n = &*probed;
        assert!(n.try_pwrite(0, b"QFI\xfb").is_none(), "not past the guard");
        assert_eq!(co_write(n, 0, b"QFI\xfb\0\0\0\x03"), Err(libc::EPERM));
        assert_eq!(co_write(n, 0, &[b"QFI\xfb".as_slice(), &[1; 8192]].concat()), Err(libc::EPERM));
        // In two halves, and from the middle.
        assert_eq!(co_write(n, 2, b"I\xfb"), Ok(()));
        assert_eq!(co_write(n, 0, b"QF"), Err(libc::EPERM));
        assert_eq!(co_write(n, 0, b"XF"), Ok(()));
        assert_eq!(co_read(n, 0, 4), b"XFI\xfb");
        // VDI's sits at 64; elsewhere the same bytes are fine.
        assert_eq!(co_write(n, 64, b"\x7f\x10\xda\xbe"), Err(libc::EPERM));
        assert_eq!(co_write(n, 512, b"QFI\xfb"), Ok(()));
        // Zeroes can complete a signature, too.
        assert_eq!(co_write(n, 0, b"QED\x01"), Ok(()));
        assert_eq!(n.co_pwrite_zeroes(3, 1, WriteFlags::empty()).map_err(|e| e.errno()), Err(libc::EPERM));
        n.co_pwrite_zeroes(0, 4096, WriteFlags::empty()).expect("all zero is raw");
        n.co_pdiscard(0, MIB).expect("discard");
        probed
    });
    drop(probed);
    let raw = open(&OpenOptions { format: Format::Raw, ..OpenOptions::new(&path) }).unwrap();
    run_in_coroutine(t.context(), move || {
        assert_eq!(co_write(&*raw, 0, b"QFI\xfb\0\0\0\x03"), Ok(()));
    });
}

#[test]
fn two_halves_of_a_signature_at_once_do_not_slip_through() {
    let dir = tempfile::tempdir().unwrap();
    let path = image_in(dir.path(), MIB);
    let node = open(&OpenOptions::new(&path)).unwrap();
    let threads = [iothread("a", EngineChoice::Threads), iothread("b", EngineChoice::Threads)];
    for _ in 0..50 {
        let tasks = [(0u64, b"QF"), (2, b"I\xfb")].map(|(offset, half)| {
            let n = Arc::clone(&node);
            crate::support::spawn_in(threads[(offset / 2) as usize].context(), move || {
                co_write(&*n, offset, half)
            })
        });
        let ok = tasks.map(|t| t.join().is_ok());
        assert_ne!(ok, [true, true], "one of them sees the other");
        let n = Arc::clone(&node);
        run_in_coroutine(threads[0].context(), move || {
            n.co_pwrite_zeroes(0, 4, WriteFlags::empty()).expect("reset")
        });
    }
}

// ------------------------------------------------------------------------------------------------- inline

/// Pushes a file's pages out of the cache, as far as the kernel lets go of them.
fn evict(path: &Path) {
    let f = File::open(path).unwrap();
    f.sync_all().unwrap();
    rustix::fs::fadvise(&f, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

/// Tries until it happens. A read that must not wait still starts the readahead, so a quick disk (or a slow test) may
/// have the page there by the time it is looked at: that a page is cold can be brought about, but not for certain.
#[track_caller]
fn some_time(what: &str, mut f: impl FnMut() -> bool) {
    assert!((0..2000).any(|_| f()), "{what}: never in 2000 tries");
}

#[test]
fn cold_read_is_left_to_the_engine_and_warm_read_is_inline() {
    for engine in engines() {
        let dir = tempfile::tempdir().unwrap();
        let path = image_in(dir.path(), MIB);
        let data: Vec<u8> = (0..MIB).map(|i| (i / 4096) as u8).collect();
        std::fs::write(&path, &data).unwrap();
        let node = Arc::new(FileNode::open(&FileOptions::new(&path)).unwrap());
        let t = iothread("t", engine);
        let mut buf = vec![0u8; 65536];
        some_time("a cold read is not all inline", || {
            evict(&path);
            let n = node.try_pread_some(0, &mut buf);
            assert_eq!(buf[..n], data[..n]);
            n < buf.len()
        });
        let cold = Arc::clone(&node);
        assert_eq!(run_in_coroutine(t.context(), move || co_read(&*cold, 0, 65536)), data[..65536]);
        buf.fill(0xee);
        assert!(node.try_pread(0, &mut buf), "cached now");
        assert_eq!(buf, data[..65536]);
        // One page is cached, its neighbours are not: the front comes inline.
        let mut n = 0;
        some_time("the front of a half cached range is inline", || {
            evict(&path);
            let f = File::open(&path).unwrap();
            rustix::fs::fadvise(&f, 0, None, rustix::fs::Advice::Random).unwrap();
            f.read_exact_at(&mut [0u8; 4096], 0).unwrap();
            n = node.try_pread_some(0, &mut buf);
            assert_eq!(buf[..n], data[..n]);
            (4096..65536).contains(&n)
        });
        let rest = Arc::clone(&node);
        let rest = run_in_coroutine(t.context(), move || co_read(&*rest, n as u64, 65536 - n));
        assert_eq!(rest, data[n..65536]);
    }
}

#[test]
fn tmpfs_is_always_inline() {
    let Some(dir) = tmpfs_dir() else { return };
    let path = image_in(dir.path(), MIB);
    let node = FileNode::open(&FileOptions::new(&path)).unwrap();
    let mut buf = [0xee; 4096];
    assert!(node.try_pread(4096, &mut buf));
    assert_eq!(buf, [0; 4096]);
    node.try_pwrite(100, &[7; 50]).expect("tried").expect("written");
    assert!(node.try_pread(0, &mut buf));
    assert_eq!((buf[99], buf[100], buf[149], buf[150]), (0, 7, 7, 0));
}

#[test]
fn inline_writes_are_for_the_page_cache_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = image_in(dir.path(), 4 * MIB);
    let tried = |cache, read_only, offset: u64, len: usize| {
        let node = FileNode::open(&FileOptions { cache, read_only, ..FileOptions::new(&path) }).unwrap();
        node.try_pwrite(offset, &vec![1; len]).is_some()
    };
    assert!(tried(CacheMode::Writeback, false, 0, 4096));
    assert!(tried(CacheMode::Unsafe, false, 4096, 8192));
    assert!(!tried(CacheMode::Writethrough, false, 0, 4096), "must be durable");
    assert!(!tried(CacheMode::None, false, 0, 4096), "O_DIRECT waits");
    assert!(!tried(CacheMode::Writeback, true, 0, 4096));
    assert!(!tried(CacheMode::Writeback, false, 0, 3 << 20), "too long for one turn");
    // Part of a page that is not cached: the kernel would have to read it first.
    File::options().write(true).open(&path).unwrap().write_all_at(&vec![9; 3 << 20], 0).unwrap();
    some_time("a write that would read first is not inline", || {
        evict(&path);
        !tried(CacheMode::Writeback, false, 2 * MIB + 100, 100)
    });
    File::open(&path).unwrap().read_exact_at(&mut [0; 4096], 2 * MIB).unwrap();
    assert!(tried(CacheMode::Writeback, false, 2 * MIB + 100, 100));
}

#[test]
fn file_that_shrank_underneath_reads_as_zeroes_there() {
    for engine in engines() {
        for cache in [CacheMode::Writeback, CacheMode::None] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("image");
            std::fs::write(&path, vec![5u8; MIB as usize]).unwrap();
            let node = Arc::new(FileNode::open(&FileOptions { cache, ..FileOptions::new(&path) }).unwrap());
            File::options().write(true).open(&path).unwrap().set_len(5000).unwrap();
            let t = iothread("t", engine);
            let n = Arc::clone(&node);
            run_in_coroutine(t.context(), move || {
                let all = co_read(&*n, 0, MIB as usize);
                assert!(all[..5000].iter().all(|&b| b == 5));
                assert!(all[5000..].iter().all(|&b| b == 0));
                assert_eq!(co_read(&*n, 4999, 3), [5, 0, 0]);
                assert_eq!(co_read(&*n, MIB / 2 + 1, 100), [0; 100]);
                let tail = n.co_block_status(8192, MIB - 8192).expect("status");
                assert_eq!(tail, Extent { len: MIB - 8192, flags: StatusFlags::ZERO });
            });
            assert!(!node.try_pread(MIB / 2, &mut [0; 512]), "inline does not invent bytes");
        }
    }
}

// ---------------------------------------------------------------------------------------- zeroing and space

fn zero_cases(dir: &Path, engine: EngineChoice) {
    let t = iothread("t", engine);
    let zero = |discard, start: &[u8], flags: WriteFlags| {
        let path = dir.join("image");
        // To nothing first, so that nothing is allocated.
        drop(File::create(&path).unwrap());
        File::options().write(true).open(&path).unwrap().set_len(MIB).unwrap();
        if !start.is_empty() {
            File::options().write(true).open(&path).unwrap().write_all_at(start, 0).unwrap();
            File::open(&path).unwrap().sync_all().unwrap();
        }
        let node = FileNode::open(&FileOptions { discard, ..FileOptions::new(&path) }).unwrap();
        run_in_coroutine(t.context(), move || {
            node.co_pwrite_zeroes(100, MIB - 200, flags).expect("zeroes");
            let all = co_read(&node, 0, MIB as usize);
            assert!(all[100..MIB as usize - 100].iter().all(|&b| b == 0));
            node.co_flush().expect("flush");
        });
        allocated(&path)
    };
    let data = vec![8u8; MIB as usize];
    let most = MIB - 65536;
    assert!(zero(DiscardMode::Unmap, &[], WriteFlags::empty()) >= most, "NO_HOLE takes the space of a hole");
    assert!(zero(DiscardMode::Unmap, &data, WriteFlags::empty()) >= most, "NO_HOLE keeps the space");
    assert!(zero(DiscardMode::Unmap, &data, WriteFlags::MAY_UNMAP) <= 65536, "the space is given back");
    assert!(
        zero(DiscardMode::Ignore, &data, WriteFlags::MAY_UNMAP) >= most,
        "discard=ignore gives nothing back"
    );
    assert!(zero(DiscardMode::Unmap, &data, WriteFlags::MAY_UNMAP | WriteFlags::NO_FALLBACK) <= 65536);
    assert!(zero(DiscardMode::Unmap, &[], WriteFlags::NO_FALLBACK) >= most);
}

#[test]
fn zeroing_allocates_or_gives_back_as_asked() {
    for engine in engines() {
        zero_cases(tempfile::tempdir().unwrap().path(), engine);
        if let Some(dir) = tmpfs_dir() {
            zero_cases(dir.path(), engine);
        }
    }
}

#[test]
fn file_system_that_cannot_zero_says_so_quickly_or_gets_zeroes_written() {
    let Some(m) = Mount::new("ramfs", "mode=0700", "zeroing where fallocate is not supported (ramfs)") else {
        return;
    };
    for engine in engines() {
        let path = m.path().join("image");
        std::fs::write(&path, vec![4u8; 9 << 20]).unwrap();
        let node = FileNode::open(&FileOptions::new(&path)).unwrap();
        let t = iothread("t", engine);
        run_in_coroutine(t.context(), move || {
            for flags in [WriteFlags::NO_FALLBACK, WriteFlags::NO_FALLBACK | WriteFlags::MAY_UNMAP] {
                let e = node.co_pwrite_zeroes(1000, MIB, flags).expect_err("not fast");
                assert_eq!(e.errno(), libc::ENOTSUP);
            }
            assert!(co_read(&node, 0, 2 << 20).iter().all(|&b| b == 4), "nothing was changed");
            node.co_pwrite_zeroes(1000, 8 << 20, WriteFlags::MAY_UNMAP).expect("written");
            let all = co_read(&node, 0, 9 << 20);
            assert!(all[..1000].iter().all(|&b| b == 4));
            assert!(all[1000..1000 + (8 << 20)].iter().all(|&b| b == 0));
            assert!(all[1000 + (8 << 20)..].iter().all(|&b| b == 4));
            node.co_pdiscard(0, MIB).expect("not supported is success");
            let e = node.co_block_status(0, MIB).expect("status");
            assert_eq!(e.flags, StatusFlags::DATA);
        });
    }
}

#[test]
fn discard_rounds_inward_and_can_be_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let t = iothread("t", EngineChoice::Auto);
    for discard in [DiscardMode::Unmap, DiscardMode::Ignore] {
        std::fs::write(&path, vec![6u8; MIB as usize]).unwrap();
        let node = FileNode::open(&FileOptions { discard, ..FileOptions::new(&path) }).unwrap();
        run_in_coroutine(t.context(), move || {
            node.co_pdiscard(1000, 2000).expect("less than a block");
            node.co_pdiscard(4095, 4098).expect("one block and two bytes");
            let all = co_read(&node, 0, 16384);
            assert!(all[..4096].iter().all(|&b| b == 6));
            assert!(all[8192..].iter().all(|&b| b == 6));
            assert!(all[4096..8192].iter().all(|&b| b == if discard == DiscardMode::Unmap { 0 } else { 6 }));
        });
    }
}

// ------------------------------------------------------------------------------------------------- status

fn co_map(node: &dyn BlockNode) -> Vec<(u64, u64, StatusFlags)> {
    let mut out: Vec<(u64, u64, StatusFlags)> = Vec::new();
    let mut at = 0;
    while at < node.len() {
        let e = node.co_block_status(at, node.len() - at).expect("status");
        assert!(e.len > 0);
        match out.last_mut() {
            Some(l) if l.2 == e.flags => l.1 += e.len,
            _ => out.push((at, e.len, e.flags)),
        }
        at += e.len;
    }
    out
}

fn status_cases(dir: &Path) {
    const D: StatusFlags = StatusFlags::DATA;
    const Z: StatusFlags = StatusFlags::ZERO;
    let path = image_in(dir, 4 * MIB);
    let t = iothread("t", EngineChoice::Auto);
    let node = FileNode::open(&FileOptions::new(&path)).unwrap();
    run_in_coroutine(t.context(), move || {
        assert_eq!(co_map(&node), [(0, 4 * MIB, Z)]);
        co_write(&node, MIB, &vec![1; MIB as usize]).expect("write");
        assert_eq!(
            co_map(&node),
            [(0, MIB, Z), (MIB, MIB, D), (2 * MIB, 2 * MIB, Z)],
            "not the remembered one"
        );
        if let Some(r) = node.try_pwrite(3 * MIB, &[1; 65536]) {
            r.expect("inline write");
            assert_eq!(co_map(&node).len(), 5, "inline writes count, too");
            node.co_pdiscard(3 * MIB, 65536).expect("discard");
        }
        node.co_pwrite_zeroes(MIB + 65536, 65536, WriteFlags::MAY_UNMAP).expect("zeroes");
        let want = [
            (0, MIB, Z),
            (MIB, 65536, D),
            (MIB + 65536, 65536, Z),
            (MIB + 131_072, MIB - 131_072, D),
            (2 * MIB, 2 * MIB, Z),
        ];
        assert_eq!(co_map(&node), want);
        assert_eq!(co_map(&node), want, "remembered");
        // From the middle, and clipped.
        let e = node.co_block_status(MIB + 100, 1000).expect("status");
        assert_eq!(e, Extent { len: 1000, flags: D });
        let e = node.co_block_status(10, 2 * MIB).expect("status");
        assert_eq!(e, Extent { len: MIB - 10, flags: Z });
    });
}

#[test]
fn status_follows_every_change() {
    status_cases(tempfile::tempdir().unwrap().path());
    if let Some(dir) = tmpfs_dir() {
        status_cases(dir.path());
    }
}

#[test]
fn status_of_a_file_with_more_extents_than_one_scan() {
    let dir = tempfile::tempdir().unwrap();
    let path = image_in(dir.path(), 8 * MIB);
    let f = File::options().write(true).open(&path).unwrap();
    for i in 0..600 {
        f.write_all_at(&[1; 4096], i * 8192).unwrap();
    }
    let node = FileNode::open(&FileOptions::new(&path)).unwrap();
    let window = RawNode::new("window", Arc::new(node), 4096, None).unwrap();
    let t = iothread("t", EngineChoice::Auto);
    let map = run_in_coroutine(t.context(), move || co_map(&window));
    assert_eq!(map.len(), 1199, "a hole first, then 599 pairs, the last of them to the end");
    assert!(map[..1198].iter().all(|e| e.1 == 4096));
}

// --------------------------------------------------------------------------------------------- full disks

#[test]
fn full_disk_is_enospc_and_gets_well_again() {
    let Some(m) = Mount::new("tmpfs", "size=1m", "ENOSPC from a full file system") else { return };
    for engine in engines() {
        let path = image_in(m.path(), 8 * MIB);
        let node = Arc::new(FileNode::open(&FileOptions::new(&path)).unwrap());
        let t = iothread("t", engine);
        let n = Arc::clone(&node);
        run_in_coroutine(t.context(), move || {
            assert_eq!(co_write(&*n, 0, &vec![1; 2 * MIB as usize]), Err(libc::ENOSPC));
            assert_eq!(
                n.co_pwritev(2 * MIB, &[IoSlice::new(&[1; 65536])], WriteFlags::FUA).map_err(|e| e.errno()),
                Err(libc::ENOSPC)
            );
            assert_eq!(
                n.try_pwrite(4 * MIB, &[1; 65536]).map(|r| r.map_err(|e| e.errno())),
                Some(Err(libc::ENOSPC))
            );
            assert_eq!(
                n.co_pwrite_zeroes(4 * MIB, MIB, WriteFlags::empty()).map_err(|e| e.errno()),
                Err(libc::ENOSPC),
                "NO_HOLE reserves the space or says that it cannot"
            );
            n.co_flush().expect("a failed write is no failed sync");
            n.co_pdiscard(0, 8 * MIB).expect("discard");
            assert_eq!(co_write(&*n, 4 * MIB, &vec![2; 512 << 10]), Ok(()), "there is room again");
            n.co_flush().expect("flush");
            assert_eq!(co_read(&*n, 4 * MIB, 100), [2; 100]);
        });
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn delayed_write_error_reaches_the_flush_and_stays() {
    // An image on a loop device over a file on a tmpfs that is full: the page cache takes the write, the disk does not.
    let Some(m) = Mount::new("tmpfs", "size=1m", "a write error that comes with the flush") else { return };
    let backing = image_in(m.path(), 16 * MIB);
    let Some(l) = crate::support::Loop::new(&backing, "a write error that comes with the flush") else {
        return;
    };
    for engine in engines() {
        let node = FileNode::open(&FileOptions::new(&l.device)).unwrap();
        assert!(node.is_device());
        let t = iothread("t", engine);
        run_in_coroutine(t.context(), move || {
            assert_eq!(co_write(&node, 0, &vec![1; 4 * MIB as usize]), Ok(()), "into the page cache");
            let errno = |r: conbd::block::Result<()>| r.expect_err("the disk is full").errno();
            let first = errno(node.co_flush());
            assert!([libc::EIO, libc::ENOSPC].contains(&first), "{first}");
            assert_eq!(errno(node.co_flush()), first, "the kernel says it once, we go on saying it");
        });
        File::options().write(true).open(&backing).unwrap().set_len(0).unwrap();
        File::options().write(true).open(&backing).unwrap().set_len(16 * MIB).unwrap();
    }
}

#[test]
fn a_long_stream_of_writes_is_handed_to_the_disk_while_it_goes_on_and_a_flush_still_makes_it_durable() {
    const PIECE: usize = 2 << 20;
    for (cache, inline, growing, wanted) in [
        (CacheMode::Writeback, true, false, true),
        (CacheMode::Writeback, false, false, true),
        // Those who make a file longer would wait for what is handed over.
        (CacheMode::Writeback, true, true, false),
        (CacheMode::Writeback, false, true, false),
        (CacheMode::Unsafe, true, false, false),
    ] {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = image_in(dir.path(), if growing { 0 } else { 320 * MIB });
        let options = FileOptions { cache, growable: growing, ..FileOptions::new(&path) };
        let node = Arc::new(FileNode::open(&options).unwrap());
        let thread = iothread("io", engines()[0]);
        let n = Arc::clone(&node);
        run_in_coroutine(thread.context(), move || {
            for at in (0..320 * MIB).step_by(PIECE) {
                let data = vec![(at / PIECE as u64 % 250) as u8 + 1; PIECE];
                let done = if inline { n.try_pwrite(at, &data) } else { None };
                match done {
                    Some(result) => result.expect("write"),
                    None => co_write(&*n, at, &data).expect("write"),
                }
                // Pieces are handed over one at a time, by another thread: let it.
                conbd::co::co_sleep_ns(500_000);
            }
            n.co_flush().expect("flush");
        });
        // What was begun has ended, and was counted.
        thread.stop().unwrap();
        let handed = node.written_behind();
        assert_eq!(handed > 0, wanted, "{cache:?}: {handed} bytes");
        assert!(
            handed <= 288 * MIB,
            "{cache:?}: what is written right now is left alone, not {handed} bytes"
        );
        let got = std::fs::read(&path).unwrap();
        let wrong = got.chunks(PIECE).enumerate().find(|(i, c)| c.iter().any(|b| *b != (*i % 250) as u8 + 1));
        assert_eq!(wrong.map(|w| w.0), None);
    }
}
