//! Extended headers: 32-byte requests and replies, 64-bit lengths, payload rules, filtered block status. By a raw client,
//! and by our own.

use super::nbd_common::*;
use super::nbd_contexts::{layered, statuses};
use conbd::block::{BlockBackend, FaultAction, FaultOps, FaultRule, FileNode, FileOptions};
use conbd::co::Coroutine;
use conbd::nbd::client::{Client, ClientError, Negotiation, Uri};
use conbd::nbd::export::{Export, ExportOptions};
use conbd::nbd::proto::*;
use conbd::nbd::wire::*;
use conbd::util::buf::IoBuf;
use std::sync::{Arc, mpsc};
use std::time::Duration;

const SIZE: u64 = 1 << 20;
const TIB: u64 = 1 << 40;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const ALLOCATION: &[&str] = &["base:allocation"];

#[test]
fn extended_headers_are_granted_once_and_stay_20_73_74() {
    let t = TestServer::unix(vec![memory("", SIZE)]);
    let mut c = t.haggle();
    assert_eq!(c.verdict(NBD_OPT_EXTENDED_HEADERS, b"x"), NBD_REP_ERR_INVALID, "73: with data");
    assert_eq!(c.verdict(NBD_OPT_LIST_META_CONTEXT, &[0; 8]), NBD_REP_ERR_INVALID, "not extended by that");
    assert_eq!(c.verdict(NBD_OPT_STRUCTURED_REPLY, b""), NBD_REP_ACK);
    assert_eq!(c.verdict(NBD_OPT_EXTENDED_HEADERS, b""), NBD_REP_ACK, "74: an upgrade");
    assert_eq!(c.verdict(NBD_OPT_STRUCTURED_REPLY, b""), NBD_REP_ERR_EXT_HEADER_REQD, "74: no way back");
    assert_eq!(c.verdict(NBD_OPT_EXTENDED_HEADERS, b""), NBD_REP_ERR_INVALID, "25: we chose to refuse");
    assert_eq!(c.verdict(NBD_OPT_LIST_META_CONTEXT, &[0; 8]), NBD_REP_ACK, "73: they imply structured");
    c.go("");
    c.extended = true;
    assert!(c.flags.contains(TransmissionFlags::NBD_FLAG_SEND_DF), "72");
    assert_eq!(c.read(0, 512).unwrap(), [0; 512]);
    c.disc();
}

#[test]
fn export_name_after_extended_headers_ends_the_session_32() {
    let t = TestServer::unix(vec![memory("", SIZE)]);
    let mut c = t.haggle();
    assert_eq!(c.verdict(NBD_OPT_EXTENDED_HEADERS, b""), NBD_REP_ACK);
    c.send_opt(NBD_OPT_EXPORT_NAME, b"");
    c.expect_close();
}

#[test]
fn clients_without_extended_headers_are_served_all_the_same_76() {
    let t = TestServer::unix(vec![memory("", SIZE)]);
    for structured in [false, true] {
        let mut c = t.go("", structured);
        assert_eq!(c.read(0, 512).unwrap(), [0; 512]);
        c.disc();
    }
}

#[test]
fn every_reply_is_extended_and_echoes_the_offset_98_102_103_104() {
    let (export, fault) = faulty("", SIZE);
    let t = TestServer::unix(vec![export]);
    let mut c = t.go_extended("", ALLOCATION);
    // Reads of all shapes: in place, in a coroutine, sparse, dense, failing. `recv_reply` checks each header.
    let pattern: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8 + 1).collect();
    assert_eq!(c.write(0, 4096, &pattern), 0);
    for (offset, len) in
        [(0, 4096), (4096, 4096), (0, 8192), (0, 300_000), (1000, 70_000), (SIZE - 5, 5), (7, 0)]
    {
        let got = c.read(offset, len).unwrap();
        let want: Vec<u8> = (offset..offset + u64::from(len))
            .map(|i| i.checked_sub(4096).and_then(|i| pattern.get(i as usize)).copied().unwrap_or(0))
            .collect();
        assert!(got == want, "read {offset}+{len}");
        let (dense, (holes, datas)) = c.read_flags(1 << 2, offset, len).unwrap();
        assert!(dense == want && holes == 0 && datas <= 1, "116: DF");
    }
    assert_eq!(c.read(SIZE, 1), Err(EINVAL));
    assert_eq!(c.read(0, MAX_PAYLOAD + 1), Err(EINVAL));
    let id = fault.add_rule(FaultRule::new(FaultOps::all(), FaultAction::Errno(libc::EIO)));
    for cmd in
        [NBD_CMD_READ, NBD_CMD_FLUSH, NBD_CMD_TRIM, NBD_CMD_CACHE, NBD_CMD_WRITE_ZEROES, NBD_CMD_BLOCK_STATUS]
    {
        assert_eq!(c.call(cmd, 0, 4096, 4096), 5, "{}", cmd_name(cmd));
    }
    assert_eq!(c.write(0, 4096, &[1; 512]), 5);
    fault.remove_rule(id);
    for cmd in [NBD_CMD_FLUSH, NBD_CMD_TRIM, NBD_CMD_CACHE, NBD_CMD_WRITE_ZEROES] {
        assert_eq!(c.call(cmd, 0, 0, 0), 0, "{}", cmd_name(cmd));
    }
    for cmd in [NBD_CMD_RESIZE, 9, 0xffff] {
        assert_eq!(c.call(cmd, 0, 0, 512), EINVAL, "161");
    }
    assert_eq!(c.call(NBD_CMD_BLOCK_STATUS, 0, 0, 0), EINVAL);
    c.disc();
}

#[test]
fn a_compact_request_where_extended_ones_were_negotiated_ends_it_98() {
    let t = TestServer::unix(vec![memory("", SIZE)]);
    let mut c = t.go_extended("", &[]);
    c.extended = false;
    c.send_req(NBD_CMD_READ, 0, 1, 0, 512);
    c.expect_close();
    let mut c = t.go("", true);
    c.extended = true;
    c.send_req(NBD_CMD_READ, 0, 1, 0, 512);
    c.expect_close();
}

#[test]
fn a_write_has_a_payload_with_the_flag_and_without_128() {
    let t = TestServer::unix(vec![memory("", SIZE)]);
    let mut c = t.go_extended("", &[]);
    // QEMU's client does not set the flag.
    c.send_req(NBD_CMD_WRITE, 0, 4, 0, 512);
    c.send(&[6; 512]);
    assert_eq!(Raw::error_of(&c.recv_chunks(4)), 0, "128: taken without the flag");
    assert_eq!(c.read(0, 512).unwrap(), [6; 512]);
    c.send_req(NBD_CMD_WRITE, 0, 4, SIZE, 512);
    c.send(&[6; 512]);
    assert_eq!(Raw::error_of(&c.recv_chunks(4)), ENOSPC, "121: and consumed if refused");
    assert_eq!(c.write(0, 0, &[7; 512]), 0);
    assert_eq!(c.write(0, SIZE - 100, &[7; 512]), ENOSPC, "122");
    assert_eq!(c.write(0, 5, &[]), 0, "127");
    assert_eq!(c.read(0, 512).unwrap(), [7; 512]);
    assert_eq!(c.read(SIZE - 100, 100).unwrap(), [0; 100], "122: nothing was written");
    c.disc();
}

#[test]
fn a_payload_where_none_belongs_is_consumed_and_refused_156() {
    let t = TestServer::unix(vec![memory("", SIZE)]);
    let mut c = t.go_extended("", &[]);
    for cmd in [
        NBD_CMD_READ,
        NBD_CMD_FLUSH,
        NBD_CMD_TRIM,
        NBD_CMD_CACHE,
        NBD_CMD_WRITE_ZEROES,
        NBD_CMD_BLOCK_STATUS,
        NBD_CMD_RESIZE,
        0x1234,
    ] {
        for len in [0usize, 1, 27, 4096, 200_000] {
            c.send_req(cmd, PAYLOAD_LEN, 9, 512, len as u32);
            c.send(&vec![0x25; len]);
            assert_eq!(Raw::error_of(&c.recv_chunks(9)), EINVAL, "{} {len}", cmd_name(cmd));
        }
    }
    assert_eq!(c.read(0, 4096).unwrap(), [0; 4096]);
    c.disc();
}

#[test]
fn a_payload_over_the_maximum_disconnects_125_157() {
    let t = TestServer::unix(vec![memory("", SIZE)]);
    for cmd in [NBD_CMD_WRITE, NBD_CMD_READ, NBD_CMD_BLOCK_STATUS, 77] {
        for len in [u64::from(MAX_PAYLOAD) + 1, u32::MAX.into(), 1 << 32, u64::MAX] {
            let mut c = t.go_extended("", ALLOCATION);
            c.send_wide(cmd, PAYLOAD_LEN, 1, 0, len);
            c.expect_close();
        }
    }
    // The longest that is allowed is read, refused, and forgotten.
    let mut c = t.go_extended("", &[]);
    c.send_wide(NBD_CMD_READ, PAYLOAD_LEN, 1, 0, MAX_PAYLOAD.into());
    c.send(&vec![0; MAX_PAYLOAD as usize]);
    assert_eq!(Raw::error_of(&c.recv_chunks(1)), EINVAL);
    c.disc();
    t.wait_for("sessions end", |s| s.connections() == 0);
    assert_eq!(t.server.budget_in_use(), (0, 0));
}

#[test]
fn disc_with_a_payload_flag_is_still_the_end_131() {
    let t = TestServer::unix(vec![memory("", SIZE)]);
    let mut c = t.go_extended("", &[]);
    c.send_wide(NBD_CMD_DISC, PAYLOAD_LEN, 1, 5, u64::MAX);
    c.expect_close();
}

#[test]
fn payload_len_is_an_unknown_flag_in_compact_requests_159() {
    let t = TestServer::unix(vec![memory("", SIZE)]);
    let mut c = t.go("", true);
    assert_eq!(c.write(PAYLOAD_LEN, 0, &[1; 512]), EINVAL);
    assert_eq!(c.call(NBD_CMD_READ, PAYLOAD_LEN, 0, 512), EINVAL);
    assert_eq!(c.read(0, 512).unwrap(), [0; 512], "121: in sync, and nothing written");
    c.disc();
}

fn sparse_file(len: u64) -> (tempfile::TempDir, Arc<Export>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::File::create(&path).unwrap().set_len(len).unwrap();
    (dir, export_of("", Arc::new(FileNode::open(&FileOptions::new(&path)).unwrap())))
}

/// 64-bit lengths on an export of `size` bytes.
fn wide_lengths(c: &mut Raw, size: u64) {
    for at in [0, size / 2, size - 4096] {
        assert_eq!(c.write(0, at, &[0xcc; 4096]), 0);
    }
    let status = |c: &mut Raw, offset: u64, len: u64| {
        c.send_wide(NBD_CMD_BLOCK_STATUS, 0, 3, offset, len);
        let all = statuses(&c.recv_chunks(3));
        assert_eq!(all.len(), 1);
        all.into_iter().next().unwrap().1
    };
    let extents = status(c, 0, size);
    assert_eq!(extents.iter().map(|e| e.len).sum::<u64>(), size);
    assert!(extents.iter().any(|e| e.len > u64::from(u32::MAX)), "153: one extent of more than 32 bits");
    assert!(extents.iter().all(|e| e.flags <= 3), "153: the upper status bits are 0");
    assert_eq!(c.call_wide(NBD_CMD_CACHE, 0, size - 4096, 4096), 0);
    // All but the first and the last 4 KiB.
    assert_eq!(c.call_wide(NBD_CMD_WRITE_ZEROES, 1, 4096, size - 8192), 0);
    assert_eq!(c.read(size / 2, 4096).unwrap(), [0; 4096]);
    assert_eq!(c.read(0, 8192).unwrap(), [[0xcc; 4096], [0; 4096]].concat(), "138: neighbours are intact");
    assert_eq!(c.read(size - 8192, 8192).unwrap(), [[0; 4096], [0xcc; 4096]].concat(), "138");
    assert_eq!(c.write(0, size / 2, &[0xcc; 4096]), 0);
    assert_eq!(c.call_wide(NBD_CMD_TRIM, 1, 0, size), 0);
    assert_eq!(c.call_wide(NBD_CMD_FLUSH, 0, 0, 0), 0);
    let refused = [
        (NBD_CMD_TRIM, EINVAL),
        (NBD_CMD_WRITE_ZEROES, ENOSPC),
        (NBD_CMD_BLOCK_STATUS, EINVAL),
        (NBD_CMD_CACHE, EINVAL),
        (NBD_CMD_READ, EINVAL),
    ];
    for (cmd, error) in refused {
        for (offset, len) in [(0, size + 1), (1, size), (0, u64::MAX), (u64::MAX, u64::MAX), (size, 1 << 63)]
        {
            assert_eq!(c.call_wide(cmd, 0, offset, len), error, "{} {offset}+{len}", cmd_name(cmd));
        }
    }
    assert_eq!(c.call_wide(NBD_CMD_READ, 0, 0, 1 << 32), EINVAL, "not the lower half of it");
}

#[test]
fn sixty_four_bit_lengths_on_a_file_142_153_155_158() {
    let (_dir, export) = sparse_file(TIB);
    let t = TestServer::unix(vec![export]);
    let mut c = t.go_extended("", ALLOCATION);
    wide_lengths(&mut c, TIB);
    c.disc();
}

#[test]
fn sixty_four_bit_lengths_on_memory_142_153_158() {
    let t = TestServer::unix(vec![memory("", 64 * TIB)]);
    let mut c = t.go_extended("", ALLOCATION);
    wide_lengths(&mut c, 64 * TIB);
    c.disc();
}

#[test]
fn a_long_zeroing_lets_others_in_between_its_steps_158() {
    let (export, fault) = faulty("", TIB);
    let t = TestServer::with(vec![export], 1, |_| {});
    let mut long = t.go_extended("", &[]);
    let mut other = t.go_extended("", &[]);
    // Held at the step that begins at 3 GiB: earlier ones are done, and the drain of a shutdown has one step to wait for.
    let rule = FaultRule::new(FaultOps::WRITE_ZEROES, FaultAction::Hold).range(3 << 30..(3 << 30) + 1);
    let id = fault.add_rule(rule);
    long.send_wide(NBD_CMD_WRITE_ZEROES, 0, 1, 0, TIB);
    assert!(fault.wait_held(1, PATIENCE));
    let held = fault.held();
    assert_eq!((held[0].offset, held[0].len), (3 << 30, 1 << 30), "steps end at multiples of a GiB");
    assert_eq!(other.write(0, 0, &[1; 4096]), 0);
    assert_eq!(long.write(0, 4096, &[2; 4096]), 0, "and on its own connection");
    fault.remove_rule(id);
    fault.release_all();
    assert_eq!(Raw::error_of(&long.recv_chunks(1)), 0);
    assert_eq!(other.read(0, 8192).unwrap(), [[1; 4096], [2; 4096]].concat());
    // A client that is cut in the middle (a stop without patience): the rest is not done for nobody.
    let counted = fault.add_rule(FaultRule::new(FaultOps::WRITE_ZEROES, FaultAction::DelayNs(0)));
    let id = fault.add_rule(FaultRule::new(FaultOps::WRITE_ZEROES, FaultAction::Hold));
    long.send_wide(NBD_CMD_WRITE_ZEROES, 0, 2, 0, TIB);
    assert!(fault.wait_held(1, PATIENCE));
    other.disc();
    t.wait_for("the other has left", |server| server.connections() == 1);
    assert_eq!(t.shutdown(Duration::ZERO).aborted, 1);
    fault.remove_rule(id);
    fault.release_all();
    t.wait_for("its session ends", |server| server.connections() == 0);
    assert_eq!(fault.hits(counted), 1, "of 1024");
}

#[test]
fn info_offers_the_filter_before_a_context_is_selected_97() {
    let t = TestServer::unix(vec![memory("", SIZE)]);
    let payload_flag = TransmissionFlags::NBD_FLAG_BLOCK_STATUS_PAYLOAD;
    let offered = |c: &mut Raw, option| {
        let replies = c.info(option, "", &[]);
        c.note_export(&replies);
        c.flags.contains(payload_flag)
    };
    let mut c = t.haggle();
    assert!(!offered(&mut c, NBD_OPT_INFO), "compact headers");
    assert_eq!(c.verdict(NBD_OPT_EXTENDED_HEADERS, b""), NBD_REP_ACK);
    // How else would a client know before it selects contexts?
    assert!(offered(&mut c, NBD_OPT_INFO));
    assert!(!offered(&mut c, NBD_OPT_GO), "without contexts there is nothing to filter");
    c.disc();
}

#[test]
fn filtered_block_status_answers_for_the_named_contexts_97_154() {
    let options = ExportOptions { allocation_depth: true, bitmaps: vec!["one".into()], ..Default::default() };
    let export = Export::new(options, BlockBackend::new(Arc::new(layered(SIZE)))).unwrap();
    let t = TestServer::unix(vec![export]);
    // 97: the flag needs extended headers and a selected context.
    let payload_flag = TransmissionFlags::NBD_FLAG_BLOCK_STATUS_PAYLOAD;
    assert!(!t.go_extended("", &[]).flags.contains(payload_flag));
    assert!(!t.go("", true).flags.contains(payload_flag));
    let names = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:one"];
    let mut c = t.go_extended("", &names);
    assert!(c.flags.contains(payload_flag));
    c.send_req(NBD_CMD_BLOCK_STATUS, 0, 1, 0, SIZE as u32);
    let all = statuses(&c.recv_chunks(1));
    assert_eq!(all.len(), 3);
    let ask = |c: &mut Raw, flags: u16, offset: u64, payload: &[u8]| {
        c.send_req(NBD_CMD_BLOCK_STATUS, PAYLOAD_LEN | flags, 2, offset, payload.len() as u32);
        c.send(payload);
        c.recv_chunks(2)
    };
    let filter = |effect_len: u64, ids: &[u32]| StatusFilter { effect_len, ids: ids.to_vec() }.encode();
    let ids: Vec<u32> = all.iter().map(|(id, _)| *id).collect();
    for some in [&ids[..1], &ids[1..2], &ids[1..], &ids[..]] {
        let got = statuses(&ask(&mut c, 0, 0, &filter(SIZE, some)));
        let want: Vec<_> = all.iter().filter(|(id, _)| some.contains(id)).cloned().collect();
        assert_eq!(got, want);
    }
    let one = statuses(&ask(&mut c, 1 << 3, 65_536, &filter(3 * 65_536, &ids[1..2])));
    assert_eq!(one, [(ids[1], vec![StatusExtent { len: 2 * 65_536, flags: 1 }])]);
    let mut bad = vec![
        vec![],
        vec![0; 7],
        filter(SIZE, &[]),
        filter(SIZE, &[99]),
        filter(SIZE, &[ids[0], 99]),
        filter(SIZE, &[ids[0], ids[0]]),
        filter(SIZE, &[ids[0], ids[1], ids[2], ids[0]]),
        filter(0, &ids),
        filter(SIZE + 1, &ids),
        filter(u64::MAX, &ids),
        vec![0xff; 300_000],
    ];
    let mut junk = filter(SIZE, &ids);
    junk.push(0);
    bad.push(junk);
    for payload in bad {
        let replies = ask(&mut c, 0, 0, &payload);
        assert_eq!(Raw::error_of(&replies), EINVAL, "154: {} bytes", payload.len());
        assert_eq!(c.read(0, 512).unwrap(), [0; 512], "154: the payload was consumed");
    }
    c.disc();
}

#[test]
fn extended_requests_may_come_byte_by_byte_and_many_at_once_16_99() {
    let t = TestServer::unix(vec![memory("", SIZE)]);
    let mut c = t.go_extended("", &[]);
    let h = RequestHeader {
        flags: CmdFlags::NBD_CMD_FLAG_PAYLOAD_LEN,
        cmd: NBD_CMD_WRITE,
        cookie: 0x77,
        offset: 3,
        len: 5,
    };
    // `write` notes the offset to be echoed for cookie 0x77.
    assert_eq!(c.write(0, 3, b"12345"), 0);
    for b in h.encode_extended().iter().chain(b"hello") {
        c.send(&[*b]);
    }
    assert_eq!(Raw::error_of(&c.recv_chunks(0x77)), 0);
    assert_eq!(c.read(0, 10).unwrap(), b"\0\0\0hello\0\0");
    for i in 0..500u64 {
        c.send_req(NBD_CMD_READ, 0, i, i * 512, 512);
    }
    let mut seen = vec![false; 500];
    for _ in 0..500 {
        let Reply::Chunk { cookie, done, .. } = c.recv_reply() else { panic!("104") };
        assert!(done && !std::mem::replace(&mut seen[cookie as usize], true));
    }
    c.disc();
}

// ---------------------------------------------------------------------------------------------- our own client

/// Runs `f` in a coroutine on a context of its own, beside the server's.
fn client<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = conbd::aio::IoThread::spawn(conbd::aio::AioConfig::default()).unwrap();
    let (tx, rx) = mpsc::channel();
    on(thread.context(), move || {
        Coroutine::new(move || tx.send(f()).expect("the test waits")).enter();
    });
    let got = rx.recv_timeout(PATIENCE).expect("the client comes to an end");
    thread.stop().unwrap();
    got
}

#[test]
fn our_client_negotiates_the_best_there_is() {
    let t = TestServer::unix(vec![memory("", 8 * TIB)]);
    let uri = Uri::unix(&t.socket(), "");
    let address = uri.address.clone();
    client(move || {
        let c = Client::co_connect(&uri).unwrap();
        assert_eq!(c.header_style(), HeaderStyle::Extended);
        let data: Vec<u8> = (0..100_000u32).map(|i| (i % 253) as u8).collect();
        c.co_write(6 * TIB, IoBuf::from(&data[..]), CmdFlags::NBD_CMD_FLAG_FUA).unwrap();
        assert!(c.co_read(6 * TIB, IoBuf::zeroed(data.len())).unwrap()[..] == data[..]);
        let status = c.co_block_status(0, 8 * TIB, CmdFlags::empty()).unwrap();
        assert_eq!(status.len(), 1);
        let extents = &status[0].1;
        assert_eq!(extents.iter().map(|e| e.len).sum::<u64>(), 8 * TIB);
        assert_eq!(extents[0].len, 6 * TIB);
        let some = c.co_block_status_of(0, 8 * TIB, CmdFlags::empty(), &[status[0].0]).unwrap();
        assert_eq!(some, status);
        let none = c.co_block_status_of(0, 8 * TIB, CmdFlags::empty(), &[12345]);
        assert!(matches!(none, Err(ClientError::Request { errno: Errno::NBD_EINVAL, .. })));
        c.co_write_zeroes(0, 8 * TIB, CmdFlags::empty()).unwrap();
        c.co_cache(0, 8 * TIB).unwrap();
        c.co_trim(0, 8 * TIB, CmdFlags::empty()).unwrap();
        assert!(c.co_read(6 * TIB, IoBuf::zeroed(512)).unwrap().iter().all(|b| *b == 0));
        let bad = c.co_trim(1, 8 * TIB, CmdFlags::empty()).unwrap_err();
        assert!(matches!(bad, ClientError::Request { errno: Errno::NBD_EINVAL, .. }), "{bad}");
        c.co_raw(NBD_CMD_WRITE, CmdFlags::empty(), 0, 4096).unwrap();
        c.co_flush().unwrap();
        c.co_close();

        let mut n = Negotiation::co_open(&address).unwrap();
        assert!(n.co_structured_reply().unwrap());
        let c = n.co_go("").unwrap();
        assert_eq!(c.header_style(), HeaderStyle::Structured);
        assert!(matches!(c.co_trim(0, TIB, CmdFlags::empty()), Err(ClientError::Unsupported(_))));
        c.co_trim(0, u32::MAX.into(), CmdFlags::empty()).unwrap();
        c.co_close();
    });
}
