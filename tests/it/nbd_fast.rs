//! The fast paths of the reader: requests that continue one another, and reads that are lent. Each must answer exactly as the
//! slow way does; what the slow way answers is checked in `nbd_transmission`.

use super::nbd_common::*;
use conbd::block::{
    self, BlockNode, Extent, FaultAction, FaultOps, FaultRule, FileNode, FileOptions, Limits, MemoryNode,
    WriteFlags,
};
use conbd::nbd::proto::*;
use conbd::nbd::wire::*;
use std::io::{IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const SIZE: u64 = 1 << 20;
const DF: u16 = 4;

/// Bytes that differ from block to block and from byte to byte; never zero.
fn pattern(offset: u64, len: usize) -> Vec<u8> {
    (offset..offset + len as u64).map(|i| (i / 509 % 7 * 31 + i % 251 % 200 + 1) as u8).collect()
}

/// A file node whose pages are in the page cache.
fn file_node(bytes: &[u8]) -> (tempfile::TempDir, Arc<dyn BlockNode>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, bytes).unwrap();
    let node = FileNode::open(&FileOptions::new(&path)).unwrap();
    (dir, Arc::new(node))
}

const STYLES: [HeaderStyle; 3] = [HeaderStyle::Simple, HeaderStyle::Structured, HeaderStyle::Extended];

fn connect(t: &TestServer, name: &str, style: HeaderStyle) -> Raw {
    match style {
        HeaderStyle::Extended => t.go_extended(name, &[]),
        _ => t.go(name, style == HeaderStyle::Structured),
    }
}

/// The bytes of a request's header, in the style of the connection.
fn header(c: &mut Raw, cmd: u16, cookie: u64, flags: u16, offset: u64, len: u64) -> Vec<u8> {
    let header = RequestHeader { flags: CmdFlags::from_bits_retain(flags), cmd, cookie, offset, len };
    if c.extended {
        c.expect_offset(cookie, offset);
        header.encode_extended().to_vec()
    } else {
        header.encode().to_vec()
    }
}

fn read_header(c: &mut Raw, cookie: u64, flags: u16, offset: u64, len: u32) -> Vec<u8> {
    header(c, NBD_CMD_READ, cookie, flags, offset, len.into())
}

fn write_request(c: &mut Raw, cookie: u64, offset: u64, data: &[u8]) -> Vec<u8> {
    let flags = if c.extended { CmdFlags::NBD_CMD_FLAG_PAYLOAD_LEN.bits() } else { 0 };
    let mut bytes = header(c, NBD_CMD_WRITE, cookie, flags, offset, data.len() as u64);
    bytes.extend(data);
    bytes
}

/// The cookie and the error of the next reply, which has no content.
fn take_result(c: &mut Raw) -> (u64, u32) {
    let reply = c.recv_reply();
    let cookie = match &reply {
        Reply::Simple { cookie, .. } => *cookie,
        Reply::Chunk { done, cookie, .. } => {
            assert!(done, "one chunk");
            *cookie
        }
    };
    (cookie, Raw::error_of(&[reply]))
}

/// One read's reply, whatever its order among others.
fn take_read(c: &mut Raw, structured: bool, parts: &[(u64, u64, u32)]) -> (u64, Vec<u8>, (usize, usize)) {
    if structured {
        let first = c.recv_reply();
        let Reply::Chunk { done, cookie, .. } = &first else { panic!("reads are structured") };
        let (mut done, cookie) = (*done, *cookie);
        let mut all = vec![first];
        while !done {
            let next = c.recv_reply();
            let Reply::Chunk { done: d, cookie: k, .. } = &next else { panic!("reads are structured") };
            assert_eq!(*k, cookie);
            done = *d;
            all.push(next);
        }
        let (_, offset, len) = parts.iter().find(|p| p.0 == cookie).expect("a cookie of ours");
        let (data, chunks) = assemble(&all, *offset, *len);
        return (cookie, data, chunks);
    }
    let Reply::Simple { error, cookie } = c.recv_reply() else {
        panic!("no structured replies were asked for")
    };
    assert_eq!(error, 0);
    let (_, _, len) = parts.iter().find(|p| p.0 == cookie).expect("a cookie of ours");
    (cookie, c.recv(*len as usize), (0, 1))
}

/// Sends reads in one piece, and checks what comes for each against the disk.
fn check_reads(c: &mut Raw, structured: bool, flags: u16, disk: &[u8], reads: &[(u64, u32)]) {
    let parts: Vec<(u64, u64, u32)> =
        reads.iter().enumerate().map(|(i, (offset, len))| (1000 + i as u64, *offset, *len)).collect();
    let bytes: Vec<u8> = parts.iter().flat_map(|p| read_header(c, p.0, flags, p.1, p.2)).collect();
    c.send(&bytes);
    let mut seen = std::collections::BTreeSet::new();
    for _ in &parts {
        let (cookie, data, (holes, datas)) = take_read(c, structured, &parts);
        assert!(seen.insert(cookie), "one reply per cookie");
        let (_, offset, len) = *parts.iter().find(|p| p.0 == cookie).unwrap();
        let want = &disk[offset as usize..][..len as usize];
        assert!(data == want, "read of {len} bytes at {offset}: other data");
        if flags == DF {
            assert_eq!((holes, datas), (0, 1), "DF: one chunk");
        }
    }
}

fn disk_with_holes() -> Vec<u8> {
    let mut disk = pattern(0, SIZE as usize);
    disk[40_960..81_920].fill(0);
    disk[100_000..100_700].fill(0);
    disk[300_000..700_000].fill(0);
    disk
}

#[test]
fn reads_that_continue_one_another_are_answered_one_by_one() {
    let disk = disk_with_holes();
    let (_dir, node) = file_node(&disk);
    let memory = Arc::new(MemoryNode::new("m", SIZE).unwrap());
    let t = TestServer::unix(vec![export_of("file", node), export_of("memory", memory)]);
    let mut w = t.go("memory", false);
    for at in (0..SIZE).step_by(65_536) {
        assert_eq!(w.write(0, at, &disk[at as usize..][..65_536]), 0);
    }
    w.disc();
    let runs: &[&[(u64, u32)]] = &[
        &[(0, 4096), (4096, 4096), (8192, 4096), (12_288, 4096)],
        // Into, across and out of zeroes; grains that are part zero.
        &[(36_864, 4096), (40_960, 4096), (45_056, 4096), (77_824, 4096), (81_920, 4096)],
        &[(98_304, 4096), (102_400, 4096)],
        &[(296_960, 8192), (305_152, 8192), (313_344, 8192)],
        // Sizes that differ, are odd, are too small or too large for a run.
        &[(512, 512), (1024, 513), (1537, 4095), (5632, 1), (5633, 700)],
        &[(0, 32_768), (32_768, 4096), (36_864, 65_536), (102_400, 600)],
        // Neighbours in the wrong order, twice the same, a gap, up to the very end.
        &[(4096, 4096), (0, 4096), (0, 4096), (8192, 4096), (12_289, 4096)],
        &[(SIZE - 8192, 4096), (SIZE - 4096, 4096)],
    ];
    for name in ["file", "memory"] {
        for style in STYLES {
            let structured = style >= HeaderStyle::Structured;
            let mut c = connect(&t, name, style);
            for run in runs {
                check_reads(&mut c, structured, 0, &disk, run);
                if structured {
                    check_reads(&mut c, structured, DF, &disk, run);
                }
            }
            let many: Vec<(u64, u32)> = (0..250).map(|i| (i * 4096, 4096)).collect();
            check_reads(&mut c, structured, 0, &disk, &many);
            c.disc();
        }
    }
}

#[test]
fn a_run_ends_at_a_request_that_is_wrong_and_that_one_gets_its_error() {
    let disk = pattern(0, SIZE as usize);
    let (_dir, node) = file_node(&disk);
    let t = TestServer::unix(vec![export_of("", node)]);
    let last = SIZE - 4096;
    for style in STYLES {
        let mut c = connect(&t, "", style);
        let mut reads = [
            (1, 0, last - 4096, 4096),
            (2, 0, last, 4096),
            (3, 0, SIZE, 4096),
            // Same offset as would continue, another flag, which is not allowed without structured replies.
            (4, 0, 0, 4096),
            (5, DF, 4096, 4096),
            (6, 0, 8192, 4096),
        ]
        .map(|(cookie, flags, offset, len)| read_header(&mut c, cookie, flags, offset, len))
        .concat();
        let mut errors = vec![0, 0, 22, 0, if style == HeaderStyle::Simple { 22 } else { 0 }, 0];
        if style == HeaderStyle::Extended {
            // Lengths that no sum can hold.
            reads.extend(header(&mut c, NBD_CMD_READ, 7, 0, 12_288, u64::MAX));
            reads.extend(header(&mut c, NBD_CMD_READ, 8, 0, 0, 4096));
            reads.extend(header(&mut c, NBD_CMD_READ, 9, 0, 4096, u64::MAX - 4096));
            errors.extend([22, 0, 22]);
        }
        c.send(&reads);
        let mut seen = std::collections::BTreeMap::new();
        while seen.len() < errors.len() {
            // In any order: without the fast paths reads take their time, and refusals do not.
            let first = c.recv_reply();
            let (mut done, cookie) = match &first {
                Reply::Simple { cookie, .. } => (true, *cookie),
                Reply::Chunk { done, cookie, .. } => (*done, *cookie),
            };
            let mut all = vec![first];
            while !done {
                let next = c.recv_reply();
                done = matches!(&next, Reply::Chunk { done: true, .. });
                all.push(next);
            }
            let error = Raw::error_of(&all);
            if style == HeaderStyle::Simple && error == 0 {
                c.recv(4096);
            }
            assert!(seen.insert(cookie, error).is_none(), "one reply per cookie");
        }
        assert_eq!(seen.into_values().collect::<Vec<_>>(), errors, "{style:?}");
        // The same for writes: the second goes past the end.
        let mut writes = write_request(&mut c, 16, last, &[6; 4096]);
        writes.extend(write_request(&mut c, 17, SIZE, &[7; 4096]));
        c.send(&writes);
        let mut results = [take_result(&mut c), take_result(&mut c)];
        results.sort_unstable();
        assert_eq!(results, [(16, 0), (17, 28)]);
        assert_eq!(c.read(last, 4096).unwrap(), [6; 4096]);
        c.disc();
    }
}

#[test]
fn writes_that_continue_one_another_land_where_they_belong() {
    let mut disk = pattern(0, SIZE as usize);
    let (dir, node) = file_node(&disk);
    let t = TestServer::unix(vec![export_of("", node)]);
    for style in STYLES {
        let mut c = connect(&t, "", style);
        let seed = style as u8 * 60;
        // (offset, length) in the order of sending; later ones overwrite earlier ones.
        let runs: &[&[(u64, usize)]] = &[
            &[(0, 4096), (4096, 4096), (8192, 4096)],
            &[(20_000, 512), (20_512, 1000), (21_512, 1), (21_513, 5000)],
            &[(65_536, 4096), (69_632, 4096), (65_536, 4096), (69_632, 512)],
            &[(100_000, 30_000), (130_000, 4096), (134_096, 4096), (138_192, 70_000), (208_192, 4096)],
            &[(SIZE - 1024, 512), (SIZE - 512, 512)],
        ];
        for (r, run) in runs.iter().enumerate() {
            let mut bytes = Vec::new();
            for (i, (offset, len)) in run.iter().enumerate() {
                let data: Vec<u8> =
                    (0..*len).map(|k| (k % 241) as u8 ^ (r * 16 + i) as u8 ^ seed | 1).collect();
                disk[*offset as usize..][..*len].copy_from_slice(&data);
                bytes.extend(write_request(&mut c, i as u64, *offset, &data));
            }
            c.send(&bytes);
            let mut cookies: Vec<u64> = (0..run.len())
                .map(|_| match take_result(&mut c) {
                    (cookie, 0) => cookie,
                    other => panic!("{other:?}"),
                })
                .collect();
            cookies.sort_unstable();
            assert_eq!(cookies, (0..run.len() as u64).collect::<Vec<_>>());
        }
        c.disc();
        assert!(std::fs::read(dir.path().join("disk.raw")).unwrap() == disk, "other data on the disk");
    }
}

#[test]
fn of_a_run_with_a_fault_only_the_faulty_ones_fail() {
    let (export, fault) = faulty("", SIZE);
    let t = TestServer::unix(vec![export]);
    let both = FaultOps::READ | FaultOps::WRITE;
    fault.add_rule(FaultRule::new(both, FaultAction::Errno(libc::EIO)).range(4096..8192));
    let mut c = t.go("", false);
    let writes: Vec<u8> = (0..3u64).flat_map(|i| write_request(&mut c, i, i * 4096, &[9; 4096])).collect();
    c.send(&writes);
    let mut errors = [99; 3];
    for _ in 0..3 {
        let Reply::Simple { error, cookie } = c.recv_reply() else { panic!("writes get simple replies") };
        errors[cookie as usize] = error;
    }
    assert_eq!(errors, [0, 5, 0]);
    let reads: Vec<u8> = (0..3u64).flat_map(|i| read_header(&mut c, i, 0, i * 4096, 4096)).collect();
    c.send(&reads);
    let mut errors = [99; 3];
    for _ in 0..3 {
        let Reply::Simple { error, cookie } = c.recv_reply() else { panic!("no structured replies here") };
        if error == 0 {
            assert_eq!(c.recv(4096), [9; 4096]);
        }
        errors[cookie as usize] = error;
    }
    assert_eq!(errors, [0, 5, 0]);
    c.disc();
}

/// Memory that counts how it is asked for it.
struct Counting {
    memory: MemoryNode,
    calls: Arc<AtomicU64>,
}

impl BlockNode for Counting {
    fn name(&self) -> &str {
        "counting"
    }
    fn len(&self) -> u64 {
        self.memory.len()
    }
    fn read_only(&self) -> bool {
        false
    }
    fn limits(&self) -> Limits {
        self.memory.limits()
    }
    fn try_pread_some(&self, offset: u64, buf: &mut [u8]) -> usize {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.memory.try_pread_some(offset, buf)
    }
    fn try_preadv_some(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> usize {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.memory.try_preadv_some(offset, bufs)
    }
    fn try_pwritev(&self, offset: u64, bufs: &[IoSlice<'_>]) -> Option<block::Result<()>> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        // One by one, as memory takes them.
        let mut at = offset;
        for buf in bufs {
            self.memory.try_pwrite(at, buf)?.ok()?;
            at += buf.len() as u64;
        }
        Some(Ok(()))
    }
    fn co_preadv(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> block::Result<()> {
        self.memory.co_preadv(offset, bufs)
    }
    fn co_pwritev(&self, offset: u64, bufs: &[IoSlice<'_>], flags: WriteFlags) -> block::Result<()> {
        self.memory.co_pwritev(offset, bufs, flags)
    }
    fn co_pwrite_zeroes(&self, offset: u64, len: u64, flags: WriteFlags) -> block::Result<()> {
        self.memory.co_pwrite_zeroes(offset, len, flags)
    }
    fn co_pdiscard(&self, offset: u64, len: u64) -> block::Result<()> {
        self.memory.co_pdiscard(offset, len)
    }
    fn co_flush(&self) -> block::Result<()> {
        Ok(())
    }
    fn co_block_status(&self, offset: u64, len: u64) -> block::Result<Extent> {
        self.memory.co_block_status(offset, len)
    }
}

#[test]
fn neighbours_are_one_call_whatever_the_headers() {
    if !conbd::util::fast::paths().coalesce {
        // The whole run of tests has it off; then there is nothing to be seen.
        return;
    }
    let calls = Arc::new(AtomicU64::new(0));
    let node = Counting { memory: MemoryNode::new("m", SIZE).unwrap(), calls: Arc::clone(&calls) };
    let t = TestServer::unix(vec![export_of("", Arc::new(node))]);
    for style in STYLES {
        let mut c = connect(&t, "", style);
        let before = calls.load(Ordering::Relaxed);
        let data = pattern(style as u64, 8 * 4096);
        let mut bytes = Vec::new();
        for i in 0..8 {
            bytes.extend(write_request(&mut c, i, i * 4096, &data[i as usize * 4096..][..4096]));
        }
        c.send(&bytes);
        for _ in 0..8 {
            assert_eq!(take_result(&mut c).1, 0);
        }
        let writes = calls.load(Ordering::Relaxed) - before;
        // The socket may cut what is sent into two or three pieces.
        assert!(writes <= 4, "{style:?}: {writes} calls for 8 neighbouring writes");
        let reads: Vec<(u64, u32)> = (0..8).map(|i| (i * 4096, 4096)).collect();
        check_reads(&mut c, style >= HeaderStyle::Structured, 0, &data, &reads);
        let reads = calls.load(Ordering::Relaxed) - before - writes;
        assert_eq!(reads, 1, "{style:?}: calls for 8 neighbouring reads");
        c.disc();
    }
}

#[test]
fn a_client_that_takes_its_replies_does_not_wake_the_server() {
    let t = TestServer::unix(vec![export_of("", Arc::new(MemoryNode::new("m", SIZE).unwrap()))]);
    let mut c = t.go("", false);
    c.read(0, 4096).unwrap();
    // What the loops do besides, in all of this time: nothing.
    let before = t.turns();
    const N: u64 = 40;
    for i in 0..N {
        assert_eq!(c.read(i * 4096, 4096).unwrap().len(), 4096);
        // Time to turn once more, for whoever is woken.
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let turns = t.turns() - before;
    // One turn brings a request. Where freed space wakes the loop it is two.
    assert!(turns < N + N / 2, "{turns} turns for {N} requests");
    // It hears of space again when it needs some: more than any socket buffer holds, read late.
    let size = 256 << 10;
    for i in 0..16 {
        c.send_req(NBD_CMD_READ, 0, i, 0, size);
    }
    std::thread::yield_now();
    for _ in 0..16 {
        assert!(matches!(c.recv_reply(), Reply::Simple { error: 0, .. }));
        c.recv(size as usize);
    }
    c.disc();
}

#[test]
fn large_reads_are_right_lent_or_not_and_holes_stay_holes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    let mut disk = pattern(0, 8 << 20);
    let file = std::fs::File::create(&path).unwrap();
    file.write_all_at(&disk[..3 << 20], 0).unwrap();
    file.write_all_at(&disk[5 << 20..], 5 << 20).unwrap();
    disk[3 << 20..5 << 20].fill(0);
    let node = FileNode::open(&FileOptions::new(&path)).unwrap();
    let t = TestServer::unix(vec![export_of("", Arc::new(node))]);
    let reads: &[(u64, u32)] = &[
        (0, 32_768),
        (1, 65_535),
        (4095, 1 << 20),
        (65_536, 2 << 20),
        (3 << 20, 1 << 20),
        ((3 << 20) - 5000, 100_000),
        ((5 << 20) - 70_000, 140_001),
        (0, 8 << 20),
        ((8 << 20) - 40_000, 40_000),
    ];
    for structured in [false, true] {
        let mut c = t.go("", structured);
        // Twice: the first time fills the page cache also where there is a hole.
        for _ in 0..2 {
            for read in reads {
                check_reads(&mut c, structured, 0, &disk, &[*read]);
            }
            check_reads(&mut c, structured, 0, &disk, reads);
        }
        if structured {
            let (_, (holes, datas)) = c.read_flags(0, 3 << 20, 2 << 20).unwrap();
            assert!(holes >= 1 && datas == 0, "119: a hole is not sent as zeroes");
            check_reads(&mut c, true, DF, &disk, reads);
        }
        // What was written before the read was sent is what the read sees.
        let new = pattern(17, 100_000);
        assert_eq!(c.write(0, 123_456, &new), 0);
        disk[123_456..223_456].copy_from_slice(&new);
        check_reads(&mut c, structured, 0, &disk, &[(100_000, 200_000)]);
        c.disc();
    }
}

#[test]
fn a_client_that_takes_no_lent_replies_is_not_read_and_gets_all_of_them_later() {
    let disk = pattern(0, SIZE as usize);
    let (_dir, node) = file_node(&disk);
    let t = TestServer::unix(vec![export_of("", node)]);
    let mut c = t.go("", false);
    let n = 64u64;
    let reads: Vec<u8> = (0..n).flat_map(|i| read_header(&mut c, i, 0, i * 1000, 500_000)).collect();
    c.send(&reads);
    // Another one is served meanwhile.
    let mut other = t.go("", false);
    assert!(other.read(0, 500_000).unwrap() == disk[..500_000]);
    other.disc();
    for i in 0..n {
        assert_eq!(c.recv_reply(), Reply::Simple { error: 0, cookie: i });
        assert!(c.recv(500_000) == disk[i as usize * 1000..][..500_000], "read {i}");
    }
    c.disc();
}

#[test]
fn a_file_that_becomes_shorter_under_a_reply_reads_as_zeroes_from_there() {
    const LEN: usize = 4 << 20;
    let disk = pattern(0, LEN);
    let (dir, node) = file_node(&disk);
    let t = TestServer::unix(vec![export_of("", node)]);
    for style in STYLES {
        std::fs::write(dir.path().join("disk.raw"), &disk).unwrap();
        let mut c = connect(&t, "", style);
        let flags = if style == HeaderStyle::Simple { 0 } else { DF };
        let request = read_header(&mut c, 1, flags, 0, LEN as u32);
        c.send(&request);
        // The reply has begun, and the socket takes no 4 MiB.
        let header = match style {
            HeaderStyle::Simple => 16,
            HeaderStyle::Structured => 20 + 8,
            HeaderStyle::Extended => 32 + 8,
        };
        c.recv(header);
        std::fs::OpenOptions::new()
            .write(true)
            .open(dir.path().join("disk.raw"))
            .and_then(|f| f.set_len(4096))
            .unwrap();
        let got = c.recv(LEN);
        assert_eq!(got[..4096], disk[..4096], "{style:?}");
        let wrong = got.iter().zip(&disk).position(|(g, d)| g != d && *g != 0);
        assert_eq!(wrong, None, "{style:?}: what the file held, or zeroes");
        assert_eq!(c.call(NBD_CMD_FLUSH, 0, 0, 0), 0, "{style:?}: the connection goes on");
        c.disc();
    }
}
