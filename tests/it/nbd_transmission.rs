//! The transmission phase, spoken by hand: commands, flags, bounds, errors, replies. Numbers as in `nbd_handshake`.

use super::nbd_common::*;
use conbd::block::{
    BlockBackend, FaultAction, FaultOps, FaultRule, FileNode, FileOptions, MemoryNode, NullNode,
};
use conbd::nbd::export::{Export, ExportOptions};
use conbd::nbd::proto::*;
use conbd::nbd::wire::*;
use std::sync::Arc;

const SIZE: u64 = 1 << 20;
const FUA: u16 = 1;
const NO_HOLE: u16 = 2;
const DF: u16 = 4;
const REQ_ONE: u16 = 8;
const FAST_ZERO: u16 = 16;
const PAYLOAD_LEN: u16 = 32;

const EPERM: u32 = 1;
const EIO: u32 = 5;
const ENOMEM: u32 = 12;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const ENOTSUP: u32 = 95;

/// Runs `f` on a fresh connection without, and on one with structured replies.
fn both(t: &TestServer, f: impl Fn(&mut Raw)) {
    for structured in [false, true] {
        let mut c = t.go("", structured);
        f(&mut c);
        // Whatever was said, the connection is in step.
        assert_eq!(c.call(NBD_CMD_FLUSH, 0, 0, 0), 0);
        c.disc();
    }
}

#[test]
fn verdicts_on_bounds_flags_and_permissions_114_117_118_120_127_133_134_136_141_143_150_161() {
    let t = TestServer::unix(vec![memory("", SIZE)]);
    let end = SIZE;
    // (checklist number, command, flags, offset, length, error)
    let cases: &[(u32, u16, u16, u64, u32, u32)] = &[
        (114, NBD_CMD_READ, 0, 0, 1, 0),
        (114, NBD_CMD_READ, 0, end - 1, 1, 0),
        (114, NBD_CMD_READ, 0, end, 1, EINVAL),
        (114, NBD_CMD_READ, 0, end - 1, 2, EINVAL),
        (114, NBD_CMD_READ, 0, u64::MAX, 1, EINVAL),
        (114, NBD_CMD_READ, 0, u64::MAX - 511, 512, EINVAL),
        (114, NBD_CMD_READ, 0, 1 << 63, 512, EINVAL),
        (117, NBD_CMD_READ, NO_HOLE, 0, 512, EINVAL),
        (117, NBD_CMD_READ, REQ_ONE, 0, 512, EINVAL),
        (117, NBD_CMD_READ, FAST_ZERO, 0, 512, EINVAL),
        (117, NBD_CMD_READ, 0x8000, 0, 512, EINVAL),
        (117, NBD_CMD_READ, 0xffff, 0, 512, EINVAL),
        (159, NBD_CMD_READ, PAYLOAD_LEN, 0, 512, EINVAL),
        (118, NBD_CMD_READ, 0, 0, 0, 0),
        (118, NBD_CMD_READ, 0, end, 0, 0),
        (120, NBD_CMD_READ, 0, 0, MAX_PAYLOAD + 1, EINVAL),
        (120, NBD_CMD_READ, 0, 0, u32::MAX, EINVAL),
        (110, NBD_CMD_READ, FUA, 0, 512, 0),
        (110, NBD_CMD_FLUSH, FUA, 0, 0, 0),
        (133, NBD_CMD_FLUSH, 0, 512, 512, 0),
        (117, NBD_CMD_FLUSH, DF, 0, 0, EINVAL),
        (134, NBD_CMD_TRIM, 0, 0, 512, 0),
        (134, NBD_CMD_TRIM, FUA, 0, 512, 0),
        (134, NBD_CMD_TRIM, 0, 0, 0, 0),
        (134, NBD_CMD_TRIM, 0, end, 1, EINVAL),
        (134, NBD_CMD_TRIM, 0, u64::MAX, u32::MAX, EINVAL),
        (117, NBD_CMD_TRIM, NO_HOLE, 0, 512, EINVAL),
        (136, NBD_CMD_CACHE, 0, 0, 512, 0),
        (136, NBD_CMD_CACHE, 0, 0, end as u32, 0),
        (136, NBD_CMD_CACHE, 0, end, 1, EINVAL),
        (136, NBD_CMD_CACHE, DF, 0, 512, EINVAL),
        (136, NBD_CMD_CACHE, 0x4000, 0, 512, EINVAL),
        (138, NBD_CMD_WRITE_ZEROES, 0, 0, 512, 0),
        (138, NBD_CMD_WRITE_ZEROES, 0, 13, 7, 0),
        (142, NBD_CMD_WRITE_ZEROES, 0, 0, end as u32, 0),
        (139, NBD_CMD_WRITE_ZEROES, NO_HOLE, 0, 512, 0),
        (144, NBD_CMD_WRITE_ZEROES, FUA | NO_HOLE, 0, 512, 0),
        (118, NBD_CMD_WRITE_ZEROES, 0, 0, 0, 0),
        (143, NBD_CMD_WRITE_ZEROES, 0, end - 1, 2, ENOSPC),
        (143, NBD_CMD_WRITE_ZEROES, 0, u64::MAX, 1, ENOSPC),
        (143, NBD_CMD_WRITE_ZEROES, 0, 0, u32::MAX, ENOSPC),
        (117, NBD_CMD_WRITE_ZEROES, DF, 0, 512, EINVAL),
        (145, NBD_CMD_BLOCK_STATUS, DF, 0, 512, EINVAL),
        (150, NBD_CMD_BLOCK_STATUS, 0, end, 1, EINVAL),
        (150, NBD_CMD_BLOCK_STATUS, 0, u64::MAX, u32::MAX, EINVAL),
        (150, NBD_CMD_BLOCK_STATUS, 0, 0, 0, EINVAL),
        (137, NBD_CMD_RESIZE, 0, 2 * end, 0, EINVAL),
        (161, 9, 0, 0, 0, EINVAL),
        (161, 77, 0, 0, 512, EINVAL),
        (161, 0xffff, 0xffff, u64::MAX, u32::MAX, EINVAL),
    ];
    both(&t, |c| {
        for (number, cmd, flags, offset, len, want) in cases {
            let got = c.call(*cmd, *flags, *offset, *len);
            assert_eq!(got, *want, "{number}: {} {flags:#x} {offset}+{len}", cmd_name(*cmd));
        }
    });
}

#[test]
fn df_and_block_status_need_what_was_negotiated_117_145() {
    let t = TestServer::unix(vec![memory("", SIZE)]);
    let mut c = t.go("", false);
    assert_eq!(c.call(NBD_CMD_READ, DF, 0, 512), EINVAL);
    assert_eq!(c.call(NBD_CMD_BLOCK_STATUS, 0, 0, 512), EINVAL);
    c.disc();
    let mut c = t.go("", true);
    assert_eq!(c.call(NBD_CMD_READ, DF, 0, 512), 0);
    assert_eq!(c.call(NBD_CMD_BLOCK_STATUS, 0, 0, 512), 0);
    c.disc();
}

#[test]
fn a_refused_write_is_swallowed_and_changes_nothing_121_122() {
    let t = TestServer::unix(vec![memory("", SIZE)]);
    both(&t, |c| {
        assert_eq!(c.write(0, 0, &[1; 4096]), 0);
        for len in [1, 28, 512, 65_536, 70_000, 300_000] {
            let data = vec![2; len];
            assert_eq!(c.write(0, SIZE - len as u64 + 1, &data), ENOSPC);
            assert_eq!(c.write(0, u64::MAX, &data), ENOSPC);
            assert_eq!(c.write(DF, 0, &data), EINVAL, "117");
            assert_eq!(c.write(PAYLOAD_LEN, 0, &data), EINVAL, "159");
            assert_eq!(c.write(0x4000, 0, &data), EINVAL);
        }
        assert_eq!(c.read(0, 4096).unwrap(), vec![1; 4096]);
        assert_eq!(c.read(SIZE - 512, 512).unwrap(), vec![0; 512]);
        assert_eq!(c.write(0, 0, b""), 0, "127");
        assert_eq!(c.write(0, SIZE, b""), 0, "127");
        assert_eq!(c.write(0, SIZE + 1, b""), ENOSPC);
        assert_eq!(c.call(NBD_CMD_WRITE_ZEROES, 0, 0, 4096), 0);
    });
}

#[test]
fn a_read_only_export_refuses_every_write_with_eperm_93_123() {
    let node = MemoryNode::new("ro", SIZE).unwrap();
    let options = ExportOptions { read_only: true, ..ExportOptions::default() };
    let t = TestServer::unix(vec![Export::new(options, BlockBackend::new(Arc::new(node))).unwrap()]);
    both(&t, |c| {
        assert_eq!(c.write(0, 0, &[1; 4096]), EPERM);
        assert_eq!(c.write(0, SIZE, &[1; 100_000]), EPERM);
        assert_eq!(c.write(FUA, 0, &[1; 1]), EPERM);
        assert_eq!(c.call(NBD_CMD_WRITE_ZEROES, 0, 0, 512), EPERM);
        assert_eq!(c.call(NBD_CMD_TRIM, 0, 0, 512), EPERM);
        assert_eq!(c.call(NBD_CMD_FLUSH, 0, 0, 0), 0);
        assert_eq!(c.call(NBD_CMD_CACHE, 0, 0, 512), 0);
        assert_eq!(c.read(0, 4096).unwrap(), vec![0; 4096]);
    });
}

#[test]
fn backend_errors_become_the_defined_values_123_160() {
    let (export, fault) = faulty("", SIZE);
    let t = TestServer::unix(vec![export]);
    let cases = [
        (libc::EIO, EIO),
        (libc::ENOSPC, ENOSPC),
        (libc::EDQUOT, ENOSPC),
        (libc::EFBIG, ENOSPC),
        (libc::EROFS, EPERM),
        (libc::EPERM, EPERM),
        (libc::EACCES, EPERM),
        (libc::ENOMEM, ENOMEM),
        (libc::EINVAL, EINVAL),
        (libc::EBADF, EIO),
        (libc::ENODEV, EIO),
        (libc::ENOTSUP, EIO),
        (libc::EOVERFLOW, EIO),
        (libc::ETIMEDOUT, EIO),
        (100_000, EIO),
    ];
    both(&t, |c| {
        for (os, wire) in cases {
            fault.clear_rules();
            fault.add_rule(FaultRule::new(FaultOps::all(), FaultAction::Errno(os)));
            assert_eq!(c.write(0, 0, &[1; 512]), wire, "errno {os}");
            assert_eq!(c.write(FUA, 0, &[1; 100_000]), wire, "errno {os}");
            assert_eq!(c.read(0, 512), Err(wire), "101: no payload behind an error");
            assert_eq!(c.read(0, 200_000), Err(wire));
            assert_eq!(c.call(NBD_CMD_FLUSH, 0, 0, 0), wire, "112");
            assert_eq!(c.call(NBD_CMD_TRIM, 0, 0, 512), wire);
            assert_eq!(c.call(NBD_CMD_CACHE, 0, 0, 512), wire);
            assert_eq!(c.call(NBD_CMD_WRITE_ZEROES, 0, 0, 512), wire, "140");
            if c.flags.contains(TransmissionFlags::NBD_FLAG_SEND_DF) {
                assert_eq!(c.block_status(0, 0, 512), Err(wire));
            }
        }
        fault.clear_rules();
    });
}

#[test]
fn enotsup_is_for_fast_zero_alone_140() {
    let (export, fault) = faulty("", SIZE);
    let t = TestServer::unix(vec![export]);
    both(&t, |c| {
        assert!(c.flags.contains(TransmissionFlags::NBD_FLAG_SEND_FAST_ZERO));
        assert_eq!(c.write(0, 0, &[7; 512]), 0);
        let rule = FaultRule::new(FaultOps::WRITE_ZEROES, FaultAction::Errno(libc::ENOTSUP));
        let rule = fault.add_rule(rule);
        assert_eq!(c.call(NBD_CMD_WRITE_ZEROES, FAST_ZERO, 0, 512), ENOTSUP);
        assert_eq!(c.call(NBD_CMD_WRITE_ZEROES, FAST_ZERO | NO_HOLE | FUA, 0, 512), ENOTSUP);
        assert_eq!(c.call(NBD_CMD_WRITE_ZEROES, 0, 0, 512), EIO);
        fault.remove_rule(rule);
        assert_eq!(c.read(0, 512).unwrap(), [7; 512], "nothing changed");
        assert_eq!(c.call(NBD_CMD_WRITE_ZEROES, FAST_ZERO, SIZE, 512), ENOSPC);
        assert_eq!(c.call(NBD_CMD_WRITE_ZEROES, FAST_ZERO, 0, 512), 0);
        assert_eq!(c.read(0, 512).unwrap(), [0; 512]);
    });
}

#[test]
fn a_failed_read_midway_is_one_error_and_no_content_107_108() {
    let (export, fault) = faulty("", SIZE);
    let t = TestServer::unix(vec![export]);
    let mut c = t.go("", true);
    // Data, hole, data: large enough to be read extent by extent.
    assert_eq!(c.write(0, 0, &[1; 65_536]), 0);
    assert_eq!(c.write(0, 131_072, &[2; 65_536]), 0);
    let fails = FaultRule::new(FaultOps::READ, FaultAction::Errno(libc::EIO)).range(150_000..150_001);
    let rule = fault.add_rule(fails);
    assert_eq!(c.read(0, 200_000), Err(EIO));
    fault.remove_rule(rule);
    let (data, (holes, _)) = c.read_flags(0, 0, 204_800).unwrap();
    assert_eq!((data[0], data[65_536], data[131_072], data[196_608]), (1, 0, 2, 0));
    assert!(holes >= 2);
    c.disc();
}

#[test]
fn holes_arrive_as_holes_and_df_in_one_piece_115_116_119() {
    // The fault node with a rule serves nothing inline: the way through the coroutine must say the same.
    for slow in [false, true] {
        let (export, fault) = faulty("", SIZE);
        if slow {
            fault.add_rule(FaultRule::new(FaultOps::READ, FaultAction::DelayNs(0)));
        }
        let t = TestServer::unix(vec![export]);
        let mut c = t.go("", true);
        assert_eq!(c.write(0, 8192, &[1; 4096]), 0);
        assert_eq!(c.write(0, 300_000, &[2; 1]), 0);
        // (offset, length, holes, data chunks)
        for (offset, len, holes, datas) in [
            (0, 4096, 1, 0),
            (0, 1, 1, 0),
            (8192, 4096, 0, 1),
            (8192, 512, 0, 1),
            (4096, 8192, 1, 1),
            (0, 32_768, 2, 1),
            (4096, 16_384, 2, 1),
            (0, 262_144, 2, 1),
            (0, 524_288, 3, 2),
            (512, 4096, 1, 0),
        ] {
            let (_, got) = c.read_flags(0, offset, len).unwrap();
            let want = (holes, datas);
            // An unaligned edge may travel as data: more data chunks, never more than a few.
            assert!(
                got.0 == want.0 || offset % 4096 != 0,
                "{offset}+{len}: {got:?}, not {want:?}, slow {slow}"
            );
            assert!(got.1 <= want.1 + 2, "{offset}+{len}: {got:?}, slow {slow}");
            let (_, (h, d)) = c.read_flags(DF, offset, len).unwrap();
            assert_eq!(h + d, 1, "116: DF is one piece");
        }
        c.disc();
    }
}

#[test]
fn large_requests_up_to_64_mib_work_and_larger_ones_end_124_125_129() {
    let t = TestServer::unix(vec![export_of("", Arc::new(NullNode::new("n", 1 << 40)))]);
    let mut c = t.go("", false);
    for len in [32 << 20, 50_000_000, MAX_PAYLOAD] {
        assert_eq!(c.write(0, 0, &vec![1; len as usize]), 0);
        assert_eq!(c.read(0, len).unwrap().len(), len as usize);
    }
    for len in [MAX_PAYLOAD + 1, u32::MAX] {
        let mut c = t.go("", true);
        c.send_req(NBD_CMD_WRITE, 0, 1, 0, len);
        c.expect_close();
    }
    // 142: no payload, no limit.
    assert_eq!(c.call(NBD_CMD_WRITE_ZEROES, 0, 0, u32::MAX), 0);
    assert_eq!(c.call(NBD_CMD_TRIM, 0, 1 << 39, u32::MAX), 0);
    c.disc();
}

#[test]
fn bad_request_magic_is_a_hard_disconnect_98() {
    let t = TestServer::unix(vec![memory("", SIZE)]);
    let bads: &[&[u8]] = &[
        b"\0",
        b"GET / HTTP/1.1\r\n\r\n",
        &0x21e4_1c71u32.to_be_bytes(),
        &NBD_SIMPLE_REPLY_MAGIC.to_be_bytes(),
        &[0xff; 28],
    ];
    for bad in bads {
        let mut c = t.go("", true);
        assert_eq!(c.read(0, 1).unwrap(), [0]);
        c.send_lossy(bad);
        c.expect_close();
    }
    t.wait_for("all sessions end", |s| s.connections() == 0);
}

#[test]
fn cookies_are_opaque_and_may_repeat_99() {
    let t = TestServer::unix(vec![memory("", SIZE)]);
    let mut c = t.go("", false);
    for cookie in [0, 1, u64::MAX, 0x6744_6698_6744_6698] {
        for _ in 0..2 {
            c.send_req(NBD_CMD_FLUSH, 0, cookie, 0, 0);
        }
        for _ in 0..2 {
            assert_eq!(c.recv_reply(), Reply::Simple { error: 0, cookie });
        }
    }
    c.disc();
}

#[test]
fn disc_with_odd_fields_is_still_a_disc_130_131() {
    let t = TestServer::unix(vec![memory("", SIZE)]);
    for (flags, offset, len) in [(0, 0, 0), (0, 5, 7), (0xffff, u64::MAX, u32::MAX)] {
        let mut c = t.go("", true);
        c.send_req(NBD_CMD_DISC, flags, 1, offset, len);
        c.expect_close();
    }
}

#[test]
fn thousands_of_pipelined_requests_are_all_answered() {
    let t = TestServer::unix(vec![memory("", SIZE)]);
    for structured in [false, true] {
        let mut c = t.go("", structured);
        let mut batch = Vec::new();
        let n = 3000u64;
        for cookie in 0..n {
            let (cmd, len) = match cookie % 5 {
                0 => (NBD_CMD_WRITE, 512),
                1 => (NBD_CMD_FLUSH, 0),
                2 => (NBD_CMD_READ, 0xffff_0000),
                3 => (0x1234, 9),
                _ => (NBD_CMD_WRITE_ZEROES, 4096),
            };
            let h = RequestHeader { flags: CmdFlags::empty(), cmd, cookie, offset: 4096, len };
            batch.extend_from_slice(&h.encode());
            if cmd == NBD_CMD_WRITE {
                batch.extend_from_slice(&[3; 512]);
            }
        }
        c.send(&batch);
        let mut seen = vec![0; n as usize];
        for _ in 0..n {
            let (cookie, error) = match c.recv_reply() {
                Reply::Simple { error, cookie } => (cookie, error),
                reply @ Reply::Chunk { cookie, .. } => (cookie, Raw::error_of(&[reply])),
            };
            seen[cookie as usize] += 1;
            assert_eq!(error, if matches!(cookie % 5, 2 | 3) { EINVAL } else { 0 });
        }
        assert!(seen.iter().all(|s| *s == 1), "one reply each");
        c.disc();
    }
}

#[test]
fn block_status_tells_holes_from_data_146_147_148_149_151() {
    let t = TestServer::unix(vec![memory("", SIZE)]);
    let mut c = t.go("", true);
    let hole = u64::from((StateFlags::NBD_STATE_HOLE | StateFlags::NBD_STATE_ZERO).bits());
    assert_eq!(c.block_status(0, 0, SIZE as u32).unwrap(), [StatusExtent { len: SIZE, flags: hole }]);
    assert_eq!(c.write(0, 131_072, &[1; 65_536]), 0);
    let extents = c.block_status(0, 0, SIZE as u32).unwrap();
    assert_eq!(extents.iter().map(|e| e.len).sum::<u64>(), SIZE);
    let mut at = 0;
    for e in &extents {
        let data = at < 196_608 && at + e.len > 131_072;
        assert!(!data || e.flags & 2 == 0, "151: what holds data does not read as zero");
        at += e.len;
    }
    assert_eq!(extents[0].flags, hole);
    assert!(extents.len() >= 3);
    let one = c.block_status(REQ_ONE, 0, SIZE as u32).unwrap();
    assert_eq!(one, extents[..1]);
    let inside = c.block_status(REQ_ONE, 131_072, 100).unwrap();
    assert_eq!((inside.len(), inside[0].len), (1, 100), "148: not longer than asked");
    c.disc();
}

#[test]
fn fragmented_status_is_cut_not_refused_149_155() {
    // 64 MiB of alternating pages: more extents than one chunk may have.
    let size: u64 = 16_384 * 8192;
    let t = TestServer::unix(vec![memory("", size)]);
    let mut c = t.go("", true);
    let probe = c.block_status(0, 0, size as u32).unwrap();
    assert_eq!(probe.len(), 1);
    // The memory node allocates in larger clusters than pages: spread the writes far enough.
    let stride = 1 << 20;
    for i in 0..(size / stride) {
        assert_eq!(c.write(0, i * stride, &[1]), 0);
    }
    let extents = c.block_status(0, 0, size as u32).unwrap();
    assert!(extents.len() > 100 && extents.len() <= MAX_EXTENTS);
    c.disc();
}

#[test]
fn an_advertised_minimum_block_bounds_extents_149() {
    let (export, _fault) = {
        let node = Arc::new(MemoryNode::new("m", SIZE).unwrap());
        let options =
            ExportOptions { min_block: Some(65_536), preferred_block: Some(65_536), ..Default::default() };
        (Export::new(options, BlockBackend::new(node)).unwrap(), ())
    };
    let t = TestServer::unix(vec![export]);
    let mut c = t.go("", true);
    assert_eq!(c.write(0, 200_000, &[1; 100]), 0);
    let extents = c.block_status(0, 0, SIZE as u32).unwrap();
    assert!(extents.iter().all(|e| e.len % 65_536 == 0), "{extents:?}");
    assert!(extents.iter().any(|e| e.flags & 2 == 0));
    c.disc();
}

#[test]
fn a_file_serves_reads_writes_holes_and_zeroes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::File::create(&path).unwrap().set_len(16 << 20).unwrap();
    let node = FileNode::open(&FileOptions::new(&path)).unwrap();
    let t = TestServer::unix(vec![export_of("", Arc::new(node))]);
    both(&t, |c| {
        let data: Vec<u8> = (0..1_000_000u32).map(|i| (i % 251) as u8 + 1).collect();
        for flags in [0, FUA] {
            assert_eq!(c.write(flags, 12_345, &data), 0);
            assert_eq!(c.read(12_345, data.len() as u32).unwrap(), data);
            assert_eq!(c.write(flags, 0, &data[..512]), 0);
            assert_eq!(c.read(0, 512).unwrap(), &data[..512]);
        }
        assert_eq!(c.call(NBD_CMD_WRITE_ZEROES, 0, 100_001, 99_999), 0);
        assert_eq!(c.read(100_001, 99_999).unwrap(), vec![0; 99_999], "138");
        assert_eq!(c.read(100_000, 1).unwrap(), [data[100_000 - 12_345]], "138: neighbours intact");
        assert_eq!(c.read(200_000, 1).unwrap(), [data[200_000 - 12_345]]);
        assert_eq!(c.call(NBD_CMD_WRITE_ZEROES, NO_HOLE | FUA, 0, 1 << 20), 0);
        assert_eq!(c.read(0, 1 << 20).unwrap(), vec![0; 1 << 20]);
        assert_eq!(c.call(NBD_CMD_TRIM, FUA, 0, 2 << 20), 0);
        assert_eq!(c.call(NBD_CMD_FLUSH, 0, 0, 0), 0);
        assert_eq!(c.read(8 << 20, 4 << 20).unwrap(), vec![0; 4 << 20]);
        if c.flags.contains(TransmissionFlags::NBD_FLAG_SEND_DF) {
            let (_, (holes, _)) = c.read_flags(0, 8 << 20, 4 << 20).unwrap();
            assert!(holes >= 1, "119: a hole is not sent as zeroes");
            assert!(!c.block_status(0, 0, 16 << 20).unwrap().is_empty());
        }
    });
}
