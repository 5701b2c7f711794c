//! The fast paths of the reader: requests that continue one another, and reads that are lent. Each must answer exactly as the
//! slow way does; what the slow way answers is checked in `nbd_transmission`.

use super::nbd_common::*;
use conbd::block::{BlockNode, FaultAction, FaultOps, FaultRule, FileNode, FileOptions, MemoryNode};
use conbd::nbd::proto::*;
use conbd::nbd::wire::*;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

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

fn read_header(cookie: u64, flags: u16, offset: u64, len: u32) -> Vec<u8> {
    let flags = CmdFlags::from_bits_retain(flags);
    RequestHeader { flags, cmd: NBD_CMD_READ, cookie, offset, len: len.into() }.encode().to_vec()
}

fn write_request(cookie: u64, offset: u64, data: &[u8]) -> Vec<u8> {
    let flags = CmdFlags::empty();
    let len = data.len() as u32;
    let header = RequestHeader { flags, cmd: NBD_CMD_WRITE, cookie, offset, len: len.into() };
    [&header.encode()[..], data].concat()
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
    let bytes: Vec<u8> = parts.iter().flat_map(|p| read_header(p.0, flags, p.1, p.2)).collect();
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
        for structured in [false, true] {
            let mut c = t.go(name, structured);
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
    let mut c = t.go("", false);
    let last = SIZE - 4096;
    let reads = [
        read_header(1, 0, last - 4096, 4096),
        read_header(2, 0, last, 4096),
        read_header(3, 0, SIZE, 4096),
        // Same offset as would continue, another flag, which is not allowed without structured replies.
        read_header(4, 0, 0, 4096),
        read_header(5, DF, 4096, 4096),
    ]
    .concat();
    c.send(&reads);
    for (cookie, error) in [(1, 0), (2, 0), (3, 22), (4, 0), (5, 22)] {
        assert_eq!(c.recv_reply(), Reply::Simple { error, cookie });
        if error == 0 {
            c.recv(4096);
        }
    }
    // The same for writes: the second goes past the end.
    c.send(&[write_request(6, last, &[6; 4096]), write_request(7, SIZE, &[7; 4096])].concat());
    assert_eq!(c.recv_reply(), Reply::Simple { error: 0, cookie: 6 });
    assert_eq!(c.recv_reply(), Reply::Simple { error: 28, cookie: 7 });
    assert_eq!(c.read(last, 4096).unwrap(), [6; 4096]);
    c.disc();
}

#[test]
fn writes_that_continue_one_another_land_where_they_belong() {
    let mut disk = pattern(0, SIZE as usize);
    let (dir, node) = file_node(&disk);
    let t = TestServer::unix(vec![export_of("", node)]);
    for structured in [false, true] {
        let mut c = t.go("", structured);
        let seed = u8::from(structured) * 100;
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
                bytes.extend(write_request(i as u64, *offset, &data));
            }
            c.send(&bytes);
            let mut cookies: Vec<u64> = (0..run.len())
                .map(|_| match c.recv_reply() {
                    Reply::Simple { error: 0, cookie } => cookie,
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
    c.send(&(0..3u64).flat_map(|i| write_request(i, i * 4096, &[9; 4096])).collect::<Vec<_>>());
    let mut errors = [99; 3];
    for _ in 0..3 {
        let Reply::Simple { error, cookie } = c.recv_reply() else { panic!("writes get simple replies") };
        errors[cookie as usize] = error;
    }
    assert_eq!(errors, [0, 5, 0]);
    c.send(&(0..3u64).flat_map(|i| read_header(i, 0, i * 4096, 4096)).collect::<Vec<_>>());
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
    c.send(&(0..n).flat_map(|i| read_header(i, 0, i * 1000, 500_000)).collect::<Vec<_>>());
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
