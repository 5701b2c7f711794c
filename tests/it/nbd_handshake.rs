//! The handshake, spoken by hand, right and wrong. Numbers are those of the conformance checklist that the project
//! keeps for the NBD protocol document: what a server must (M), should (S) and had better (R) do.

use super::nbd_common::*;
use conbd::block::{BlockBackend, MemoryNode};
use conbd::nbd::export::{Export, ExportOptions, ExportTable};
use conbd::nbd::proto::*;
use conbd::nbd::server::ListenAddr;
use conbd::nbd::wire::*;
use std::sync::Arc;
use std::time::Duration;

const SIZE: u64 = 1 << 20;

fn described(name: &str, description: &str) -> Arc<Export> {
    let options = ExportOptions {
        name: name.to_owned(),
        description: description.to_owned(),
        ..ExportOptions::default()
    };
    Export::new(options, BlockBackend::new(Arc::new(MemoryNode::new(name, SIZE).unwrap()))).unwrap()
}

/// Three exports: "", "disk" (described), and one with a name of many bytes.
fn three() -> TestServer {
    let long = "ü".repeat(2048);
    TestServer::unix(vec![memory("", 4096), described("disk", "a disk"), described(&long, "")])
}

fn infos(replies: &[(u32, Vec<u8>)]) -> Vec<RepInfo<'_>> {
    replies
        .iter()
        .filter(|r| r.0 == NBD_REP_INFO)
        .map(|(_, data)| RepInfo::decode(data).expect("well-formed"))
        .collect()
}

fn info_data(name: &[u8], infos: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name);
    data.extend_from_slice(&(infos.len() as u16).to_be_bytes());
    infos.iter().for_each(|i| data.extend_from_slice(&i.to_be_bytes()));
    data
}

fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = Vec::new();
    MetaContextRequest::put(&mut data, name, queries);
    data
}

fn contexts(replies: &[(u32, Vec<u8>)]) -> Vec<(u32, String)> {
    replies
        .iter()
        .filter(|r| r.0 == NBD_REP_META_CONTEXT)
        .map(|(_, data)| RepMetaContext::decode(data).expect("well-formed"))
        .map(|c| (c.id, c.name.to_owned()))
        .collect()
}

#[test]
fn client_flags_not_offered_close_the_connection_9() {
    let t = three();
    for flags in [4, 7, 0x8000_0000, 0xffff_ffff, 0x0001_0003] {
        let mut c = t.connect();
        c.greet(flags);
        c.expect_close();
    }
}

#[test]
fn garbage_instead_of_flags_closes_without_an_answer_13() {
    let t = three();
    let tls_hello = [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &tls_hello, &[0xff; 64], b"NBDMAGICIHAVEOPT"] {
        let mut c = t.connect();
        c.recv(Greeting::LEN);
        c.send_lossy(garbage);
        c.expect_close();
    }
}

#[test]
fn without_fixed_newstyle_only_export_name_works_10() {
    let t = three();
    for option in [NBD_OPT_LIST, NBD_OPT_GO, NBD_OPT_ABORT, NBD_OPT_STRUCTURED_REPLY, 77] {
        let mut c = t.connect();
        c.greet(0);
        c.send_opt(option, b"");
        c.expect_close();
    }
    let mut c = t.connect();
    c.greet(0);
    c.send_opt(NBD_OPT_EXPORT_NAME, b"disk");
    let reply = c.recv(ExportNameReply::LEN + EXPORT_NAME_PADDING);
    let head = ExportNameReply::decode(reply.first_chunk().unwrap());
    assert_eq!(head.size, SIZE);
    assert_eq!(reply[ExportNameReply::LEN..], [0; EXPORT_NAME_PADDING]);
    assert_eq!(c.read(0, 512).unwrap(), vec![0; 512]);
    c.disc();
}

#[test]
fn no_zeroes_leaves_the_padding_out_11_29_31() {
    let t = three();
    for (name, size) in [("disk", SIZE), ("", 4096)] {
        for (flags, padding) in [(1, EXPORT_NAME_PADDING), (3, 0), (2, 0)] {
            let mut c = t.connect();
            c.greet(flags);
            c.send_opt(NBD_OPT_EXPORT_NAME, name.as_bytes());
            let reply = c.recv(ExportNameReply::LEN + padding);
            let head = ExportNameReply::decode(reply.first_chunk().unwrap());
            assert_eq!(head.size, size);
            assert!(head.flags.contains(TransmissionFlags::NBD_FLAG_HAS_FLAGS), "92");
            assert!(!head.flags.contains(TransmissionFlags::NBD_FLAG_SEND_DF), "72");
            assert_eq!(c.read(0, 512).unwrap(), vec![0; 512]);
            c.disc();
        }
    }
}

#[test]
fn unknown_names_end_export_name_without_a_word_30() {
    let t = TestServer::unix(vec![memory("a", 4096), memory("b", 4096)]);
    let long = vec![b'x'; 4097];
    for name in [&b"nope"[..], b"", b"a\0", b"\xff\xfe", b"../a", b"/etc/passwd", &long] {
        let mut c = t.haggle();
        c.send_opt(NBD_OPT_EXPORT_NAME, name);
        c.expect_close();
    }
}

#[test]
fn export_name_keeps_what_was_negotiated_before() {
    let t = three();
    let mut c = t.haggle();
    assert_eq!(c.verdict(NBD_OPT_STRUCTURED_REPLY, b""), NBD_REP_ACK);
    let set = c.opt(NBD_OPT_SET_META_CONTEXT, &meta_data("disk", &["base:allocation"]));
    assert_eq!(contexts(&set).len(), 1);
    c.send_opt(NBD_OPT_EXPORT_NAME, b"disk");
    let reply = c.recv(ExportNameReply::LEN);
    c.flags = ExportNameReply::decode(reply.first_chunk().unwrap()).flags;
    assert!(c.flags.contains(TransmissionFlags::NBD_FLAG_SEND_DF));
    assert_eq!(c.block_status(0, 0, 4096).unwrap().len(), 1);
    c.disc();
}

#[test]
fn a_handshake_byte_by_byte_works_16() {
    let t = three();
    let mut all = 3u32.to_be_bytes().to_vec();
    put_option(&mut all, NBD_OPT_STRUCTURED_REPLY, b"");
    put_option(&mut all, NBD_OPT_LIST, b"");
    put_option(&mut all, 0xdead, b"some data");
    put_option(&mut all, NBD_OPT_GO, &info_data(b"disk", &[]));
    let mut c = t.connect();
    c.recv(Greeting::LEN);
    for b in &all {
        c.send(&[*b]);
    }
    assert_eq!(c.recv_reps(NBD_OPT_STRUCTURED_REPLY)[0].0, NBD_REP_ACK);
    assert_eq!(c.recv_reps(NBD_OPT_LIST).len(), 4);
    assert_eq!(c.recv_reps(0xdead)[0].0, NBD_REP_ERR_UNSUP);
    let go = c.recv_reps(NBD_OPT_GO);
    c.note_export(&go);
    assert_eq!(c.size, SIZE);
    // Requests, too.
    let read = RequestHeader { flags: CmdFlags::empty(), cmd: NBD_CMD_READ, cookie: 5, offset: 0, len: 4 };
    for b in read.encode() {
        c.send(&[b]);
    }
    assert_eq!(assemble(&c.recv_chunks(5), 0, 4).0, [0; 4]);
    c.disc();
}

#[test]
fn a_whole_session_in_one_packet_works_24() {
    let t = three();
    let mut all = 3u32.to_be_bytes().to_vec();
    put_option(&mut all, NBD_OPT_LIST, b"");
    put_option(&mut all, NBD_OPT_INFO, &info_data(b"nope", &[]));
    put_option(&mut all, NBD_OPT_INFO, &info_data(b"", &[]));
    put_option(&mut all, NBD_OPT_GO, &info_data(b"disk", &[]));
    for cookie in 0..100 {
        // Some are answered on the spot, others by coroutines: all of that comes behind the answer to GO.
        let cmd = if cookie % 3 == 1 { NBD_CMD_FLUSH } else { NBD_CMD_READ };
        let len = if cmd == NBD_CMD_READ { 512 } else { 0 };
        let h = RequestHeader { flags: CmdFlags::empty(), cmd, cookie, offset: 0, len };
        all.extend_from_slice(&h.encode());
    }
    let disc = RequestHeader { flags: CmdFlags::empty(), cmd: NBD_CMD_DISC, cookie: 0, offset: 0, len: 0 };
    all.extend_from_slice(&disc.encode());
    let mut c = t.connect();
    c.recv(Greeting::LEN);
    c.send(&all);
    assert_eq!(c.recv_reps(NBD_OPT_LIST).last().unwrap().0, NBD_REP_ACK);
    assert_eq!(c.recv_reps(NBD_OPT_INFO)[0].0, NBD_REP_ERR_UNKNOWN);
    assert_eq!(c.recv_reps(NBD_OPT_INFO).last().unwrap().0, NBD_REP_ACK);
    assert_eq!(c.recv_reps(NBD_OPT_GO).last().unwrap().0, NBD_REP_ACK);
    // In any order, as replies are.
    let mut cookies = std::collections::BTreeSet::new();
    for _ in 0..100 {
        let Reply::Simple { error: 0, cookie } = c.recv_reply() else { panic!("a request failed") };
        if cookie % 3 != 1 {
            assert_eq!(c.recv(512), [0; 512]);
        }
        cookies.insert(cookie);
    }
    assert!(cookies.into_iter().eq(0..100));
    c.expect_close();
}

#[test]
fn options_nobody_knows_are_refused_and_skipped_18() {
    let t = three();
    let mut c = t.haggle();
    for option in [0, 4, 12, 13, 1000, 0x7fff_ffff, 0x8000_0001, u32::MAX] {
        for len in [0, 1, 4096, 100_000] {
            assert_eq!(
                c.verdict(option, &vec![0x5a; len]),
                NBD_REP_ERR_UNSUP,
                "option {option}, {len} bytes"
            );
        }
    }
    c.go("disk");
    c.disc();
}

#[test]
fn starttls_is_refused_40_41_75() {
    let t = three();
    let mut c = t.haggle();
    assert_eq!(c.verdict(NBD_OPT_STARTTLS, b""), NBD_REP_ERR_UNSUP);
    assert_eq!(c.verdict(NBD_OPT_STARTTLS, b"x"), NBD_REP_ERR_INVALID);
    assert_eq!(c.verdict(NBD_OPT_LIST, b""), NBD_REP_ACK);
}

#[test]
fn a_payload_where_none_belongs_is_invalid_20() {
    let t = three();
    let mut c = t.haggle();
    assert_eq!(c.opt(NBD_OPT_LIST, b"x").len(), 1);
    for option in [NBD_OPT_LIST, NBD_OPT_STRUCTURED_REPLY] {
        assert_eq!(c.verdict(option, b"x"), NBD_REP_ERR_INVALID);
        assert_eq!(c.verdict(option, &[0; 5000]), NBD_REP_ERR_INVALID);
    }
    // It did not count: a read is answered the simple way.
    c.go("disk");
    assert!(!c.flags.contains(TransmissionFlags::NBD_FLAG_SEND_DF));
    c.disc();
}

#[test]
fn a_bad_option_magic_closes_at_once_21() {
    let t = three();
    for bytes in [&b"X"[..], b"IHAVEOPX", &[0; 16], b"IHAVEOP\0\0\0\0\x03\0\0\0\0"] {
        let mut c = t.haggle();
        c.send_lossy(bytes);
        c.expect_close();
    }
}

#[test]
fn huge_option_lengths_are_skipped_or_cut_off_22() {
    let t = three();
    // Too long to parse: skipped while it arrives, then refused; the session goes on.
    let mut c = t.haggle();
    for option in [NBD_OPT_GO, NBD_OPT_LIST, NBD_OPT_SET_META_CONTEXT, 4711] {
        assert_eq!(c.verdict(option, &vec![0; 1 << 20]), NBD_REP_ERR_TOO_BIG);
    }
    c.go("disk");
    c.disc();
    // Too long to skip: no waiting for what may never come.
    for option in [NBD_OPT_GO, NBD_OPT_EXPORT_NAME, NBD_OPT_ABORT, 4711] {
        for len in [MAX_OPTION_SKIP + 1, u32::MAX] {
            let mut c = t.haggle();
            c.send(&OptionHeader { option, len }.encode());
            c.expect_close();
        }
    }
}

#[test]
fn options_per_session_are_bounded_23() {
    let t = three();
    let mut c = t.haggle();
    for _ in 0..MAX_OPTIONS {
        assert_eq!(c.verdict(4711, b""), NBD_REP_ERR_UNSUP);
    }
    c.send_opt(4711, b"");
    c.expect_close();
}

#[test]
fn a_repeated_structured_reply_is_fine_25_71() {
    let t = three();
    let mut c = t.haggle();
    for _ in 0..3 {
        assert_eq!(c.opt(NBD_OPT_STRUCTURED_REPLY, b""), vec![(NBD_REP_ACK, vec![])]);
    }
    c.go("disk");
    assert!(c.flags.contains(TransmissionFlags::NBD_FLAG_SEND_DF), "72");
    assert_eq!(c.read_flags(0, 0, 4096).unwrap().1, (1, 0), "119: a hole");
    c.disc();
}

#[test]
fn abort_is_acknowledged_whatever_it_carries_33_34() {
    let t = three();
    for data in [&b""[..], b"goodbye", &[0; 10_000]] {
        let mut c = t.haggle();
        assert_eq!(c.opt(NBD_OPT_ABORT, data), vec![(NBD_REP_ACK, vec![])]);
        c.expect_close();
    }
    // 35: or nobody waits for the acknowledgement.
    for _ in 0..20 {
        t.haggle().send_opt(NBD_OPT_ABORT, b"");
    }
    t.haggle().go("disk");
}

#[test]
fn list_names_every_export_and_its_description_36_37() {
    let t = three();
    let mut c = t.haggle();
    let replies = c.opt(NBD_OPT_LIST, b"");
    assert_eq!(replies.len(), 4);
    assert!(replies[..3].iter().all(|r| r.0 == NBD_REP_SERVER));
    let got: Vec<RepServer<'_>> = replies[..3].iter().map(|(_, d)| RepServer::decode(d).unwrap()).collect();
    assert_eq!((got[0].name, got[0].description), ("", ""));
    assert_eq!((got[1].name, got[1].description), ("disk", "a disk"));
    assert_eq!(got[2].name.len(), 4096);
    // 37: names as listed are names to ask for, also the longest.
    for entry in &got {
        let info = c.info(NBD_OPT_INFO, entry.name, &[NBD_INFO_NAME]);
        assert_eq!(info.last().unwrap().0, NBD_REP_ACK);
        assert!(infos(&info).contains(&RepInfo::Name(entry.name)));
    }
}

#[test]
fn list_of_thousands_arrives_completely_39() {
    let exports = (0..5000).map(|i| described(&format!("export number {i}"), "d")).collect();
    let t = TestServer::unix(exports);
    let mut c = t.haggle();
    // Three lists asked for at once: the answers are as long as the socket is deep, many times over.
    for _ in 0..3 {
        c.send_opt(NBD_OPT_LIST, b"");
    }
    for _ in 0..3 {
        let replies = c.recv_reps(NBD_OPT_LIST);
        assert_eq!(replies.len(), 5001);
        for (i, (_, data)) in replies[..5000].iter().enumerate() {
            assert_eq!(RepServer::decode(data).unwrap().name, format!("export number {i}"));
        }
    }
    c.go("export number 4999");
    c.disc();
}

#[test]
fn an_empty_list_is_only_an_ack() {
    let t = TestServer::unix(vec![]);
    let mut c = t.haggle();
    assert_eq!(c.opt(NBD_OPT_LIST, b""), vec![(NBD_REP_ACK, vec![])]);
    assert_eq!(c.verdict(NBD_OPT_GO, &info_data(b"", &[])), NBD_REP_ERR_UNKNOWN);
}

#[test]
fn malformed_info_is_invalid_and_the_session_stays_in_sync_58() {
    let t = three();
    let mut c = t.haggle();
    let cases: &[&[u8]] = &[
        b"",
        b"\0",
        b"\0\0\0\0",
        b"\0\0\0\0\0",
        b"\0\0\0\0\0\x01",
        b"\0\0\0\0\0\x01\0",
        b"\0\0\0\0\0\0\0",
        b"\0\0\0\0\0\0\0\0",
        b"\0\0\0\x04disk",
        b"\0\0\0\x04disk\0",
        b"\0\0\0\x05disk\0\0",
        b"\0\0\0\x06disk\0\0",
        b"\0\0\0\x07disk\0\0",
        b"\0\0\0\x04disk\0\x02\0\0",
        b"\0\0\0\x04disk\xff\xff\0\0",
        b"\xff\xff\xff\xffdisk\0\0",
        b"\x80\0\0\0disk\0\0",
        b"\0\0\x10\x00disk\0\0",
    ];
    for option in [NBD_OPT_INFO, NBD_OPT_GO] {
        for data in cases {
            let replies = c.opt(option, data);
            assert_eq!(replies.len(), 1, "{data:?}");
            assert_eq!(replies[0].0, NBD_REP_ERR_INVALID, "{data:?}");
        }
    }
    c.go("disk");
    c.disc();
}

#[test]
fn strange_names_are_unknown_and_touch_no_file_2_61_68() {
    let t = three();
    let mut c = t.haggle();
    let max = vec![b'n'; 4096];
    for name in [
        &b"nope"[..],
        b"DISK",
        b"disk ",
        b"disk\0",
        b"\0",
        b"\xff\xfe\xfd",
        b"\xc3",
        b"../disk",
        b"/etc/passwd",
        b"disk/..",
        b"%64isk",
        b"*",
        &max,
    ] {
        for option in [NBD_OPT_INFO, NBD_OPT_GO] {
            let replies = c.opt(option, &info_data(name, &[0, 1, 2, 3]));
            assert_eq!(replies.len(), 1, "61: no INFO before the error");
            assert_eq!(replies[0].0, NBD_REP_ERR_UNKNOWN, "{name:?}");
        }
    }
    // 2: longer than a string may be.
    let replies = c.opt(NBD_OPT_GO, &info_data(&vec![b'n'; 4097], &[]));
    assert_eq!(replies[0].0, NBD_REP_ERR_INVALID);
    // 70: still haggling.
    c.go("disk");
    c.disc();
}

#[test]
fn info_answers_what_was_asked_59_60_62_63_64() {
    let t = three();
    let mut c = t.haggle();
    let all = [NBD_INFO_BLOCK_SIZE, 0x7777, NBD_INFO_NAME, NBD_INFO_DESCRIPTION, NBD_INFO_EXPORT, 0xffff];
    let first = c.info(NBD_OPT_INFO, "disk", &all);
    let got = infos(&first);
    assert_eq!(got.len(), 4, "63: each at most once, 59: unknown ones ignored");
    let RepInfo::Export { size, flags } = &got[0] else { panic!("60") };
    assert_eq!(*size, SIZE);
    for want in [
        TransmissionFlags::NBD_FLAG_HAS_FLAGS,
        TransmissionFlags::NBD_FLAG_SEND_FLUSH,
        TransmissionFlags::NBD_FLAG_SEND_FUA,
        TransmissionFlags::NBD_FLAG_SEND_TRIM,
        TransmissionFlags::NBD_FLAG_SEND_WRITE_ZEROES,
        TransmissionFlags::NBD_FLAG_SEND_FAST_ZERO,
        TransmissionFlags::NBD_FLAG_SEND_CACHE,
        TransmissionFlags::NBD_FLAG_CAN_MULTI_CONN,
    ] {
        assert!(flags.contains(want), "{want:?}");
    }
    for never in [
        TransmissionFlags::NBD_FLAG_SEND_RESIZE,
        TransmissionFlags::NBD_FLAG_BLOCK_STATUS_PAYLOAD,
        TransmissionFlags::NBD_FLAG_READ_ONLY,
        TransmissionFlags::NBD_FLAG_SEND_DF,
    ] {
        assert!(!flags.contains(never), "94: {never:?}");
    }
    assert!(got.contains(&RepInfo::Name("disk")));
    assert!(got.contains(&RepInfo::Description("a disk")));
    let sizes = got.iter().find_map(|i| match i {
        RepInfo::BlockSize(sizes) => Some(*sizes),
        _ => None,
    });
    let sizes = sizes.expect("65");
    assert!(sizes.min.is_power_of_two() && sizes.min <= 65_536);
    assert!(sizes.preferred.is_power_of_two() && sizes.preferred >= sizes.min.max(512));
    assert!(sizes.max >= sizes.preferred.max(1 << 20));
    // 62: GO says the same.
    assert_eq!(c.info(NBD_OPT_GO, "disk", &all), first);
    c.disc();
}

#[test]
fn nothing_but_the_export_is_told_unasked_12_60() {
    let t = three();
    let mut c = t.haggle();
    for option in [NBD_OPT_INFO, NBD_OPT_GO] {
        let replies = c.info(option, "disk", &[]);
        assert_eq!(replies.len(), 2);
        assert_eq!(replies[0].1.len(), 12, "60: exactly 12 bytes");
    }
    // 12: no padding behind GO, or this read would be out of step.
    assert_eq!(c.read(0, 16).unwrap(), [0; 16]);
    c.disc();
    let mut c = t.connect();
    c.greet(1);
    c.go("disk");
    assert_eq!(c.read(0, 16).unwrap(), [0; 16]);
    c.disc();
}

#[test]
fn the_empty_name_finds_the_default_31_63_69() {
    // One named "": that one. One only: that one, by its real name. Two: none, unless one is the default.
    let t = TestServer::unix(vec![memory("only", 8192)]);
    let replies = t.haggle().info(NBD_OPT_INFO, "", &[NBD_INFO_NAME]);
    assert!(infos(&replies).contains(&RepInfo::Name("only")));
    let mut c = t.haggle();
    c.go("");
    assert_eq!(c.size, 8192);

    let t = TestServer::unix(vec![memory("a", 4096), memory("b", 8192)]);
    assert_eq!(t.haggle().verdict(NBD_OPT_INFO, &info_data(b"", &[])), NBD_REP_ERR_UNKNOWN);
    let table = ExportTable::new(vec![memory("a", 4096), memory("b", 8192)], Some("b")).unwrap();
    t.server.exports().replace(table);
    let mut c = t.haggle();
    c.go("");
    assert_eq!(c.size, 8192);
    // A table that was swapped away still serves who is connected.
    t.server.exports().replace(ExportTable::new(vec![], None).unwrap());
    assert_eq!(c.read(0, 512).unwrap(), [0; 512]);
    assert_eq!(t.haggle().verdict(NBD_OPT_INFO, &info_data(b"b", &[])), NBD_REP_ERR_UNKNOWN);
}

#[test]
fn a_read_only_export_says_so_93() {
    let node = MemoryNode::new("ro", SIZE).unwrap().with_read_only(true);
    let t = TestServer::unix(vec![export_of("ro", Arc::new(node))]);
    let mut c = t.haggle();
    c.go("ro");
    let f = c.flags;
    assert!(f.contains(TransmissionFlags::NBD_FLAG_READ_ONLY));
    assert!(f.contains(TransmissionFlags::NBD_FLAG_CAN_MULTI_CONN));
    assert!(!f.intersects(
        TransmissionFlags::NBD_FLAG_SEND_TRIM
            | TransmissionFlags::NBD_FLAG_SEND_WRITE_ZEROES
            | TransmissionFlags::NBD_FLAG_SEND_FAST_ZERO
    ));
    c.disc();
}

#[test]
fn block_sizes_are_advertised_as_configured_65() {
    let options = ExportOptions {
        min_block: Some(512),
        preferred_block: Some(65_536),
        max_block: Some(1 << 20),
        no_multi_conn: true,
        ..ExportOptions::default()
    };
    let node = Arc::new(MemoryNode::new("m", SIZE).unwrap());
    let t = TestServer::unix(vec![Export::new(options, BlockBackend::new(node)).unwrap()]);
    let mut c = t.haggle();
    let replies = c.info(NBD_OPT_GO, "", &[NBD_INFO_BLOCK_SIZE]);
    let want = BlockSizes { min: 512, preferred: 65_536, max: 1 << 20 };
    assert!(infos(&replies).contains(&RepInfo::BlockSize(want)));
    c.note_export(&replies);
    assert!(!c.flags.contains(TransmissionFlags::NBD_FLAG_CAN_MULTI_CONN));
    // 67: unaligned requests work all the same; 124: so do large ones.
    assert_eq!(c.write(0, 3, &[9; 5]), 0);
    assert_eq!(c.read(2, 7).unwrap(), [0, 9, 9, 9, 9, 9, 0]);
    c.disc();
}

#[test]
fn clients_that_ask_for_no_block_sizes_are_told_one_byte_where_that_is_wanted_66() {
    let make = |min| {
        let options = ExportOptions {
            name: format!("min{min}"),
            min_block: Some(min),
            preferred_block: Some(4096),
            max_block: Some(1 << 20),
            sizes_unasked: true,
            ..ExportOptions::default()
        };
        Export::new(options, BlockBackend::new(Arc::new(MemoryNode::new("m", SIZE).unwrap()))).unwrap()
    };
    let t = TestServer::unix(vec![make(1), make(512)]);
    let sizes = |min| RepInfo::BlockSize(BlockSizes { min, preferred: 4096, max: 1 << 20 });
    let mut c = t.haggle();
    let replies = c.info(NBD_OPT_INFO, "min1", &[]);
    assert_eq!(infos(&replies)[1], sizes(1));
    // Whoever only looks is told the truth, and that it should have been asked for.
    let replies = c.info(NBD_OPT_INFO, "min512", &[]);
    assert_eq!(replies.last().unwrap().0, NBD_REP_ERR_BLOCK_SIZE_REQD);
    assert_eq!(RepInfo::decode(&replies[1].1).unwrap(), sizes(512));
    let replies = c.info(NBD_OPT_INFO, "min512", &[NBD_INFO_BLOCK_SIZE]);
    assert_eq!(infos(&replies)[1..], [sizes(512)]);
    // Whoever enters regardless is served as it takes things to be.
    let replies = c.info(NBD_OPT_GO, "min512", &[]);
    assert_eq!(infos(&replies)[1], sizes(1));
    c.note_export(&replies);
    assert_eq!(c.write(0, 3, &[9; 5]), 0);
    assert_eq!(c.read(2, 7).unwrap(), [0, 9, 9, 9, 9, 9, 0]);
    c.disc();
}

#[test]
fn exports_that_break_the_protocol_cannot_be_made_1() {
    let make =
        |o: ExportOptions| Export::new(o, BlockBackend::new(Arc::new(MemoryNode::new("m", 4096).unwrap())));
    let ok = ExportOptions::default();
    assert!(make(ok.clone()).is_ok());
    for bad in [
        ExportOptions { name: "x".repeat(4097), ..ok.clone() },
        ExportOptions { name: "a\0b".into(), ..ok.clone() },
        ExportOptions { description: "x".repeat(4097), ..ok.clone() },
        ExportOptions { min_block: Some(3), ..ok.clone() },
        ExportOptions { min_block: Some(131_072), ..ok.clone() },
        ExportOptions { min_block: Some(0), ..ok.clone() },
        ExportOptions { preferred_block: Some(256), ..ok.clone() },
        ExportOptions { min_block: Some(8192), preferred_block: Some(4096), ..ok.clone() },
        ExportOptions { preferred_block: Some(4096), max_block: Some(1024), ..ok.clone() },
        ExportOptions { max_block: Some(u32::MAX), ..ok.clone() },
    ] {
        assert!(make(bad.clone()).is_err(), "{bad:?}");
    }
    let twice = ExportTable::new(vec![memory("a", 512), memory("a", 512)], None);
    assert!(twice.is_err());
    assert!(ExportTable::new(vec![memory("a", 512)], Some("b")).is_err());
}

#[test]
fn meta_contexts_need_structured_replies_77() {
    let t = three();
    let mut c = t.haggle();
    for option in [NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT] {
        let data = meta_data("disk", &["base:allocation"]);
        assert_eq!(c.opt(option, &data).len(), 1);
        assert_eq!(c.verdict(option, &data), NBD_REP_ERR_INVALID);
    }
    c.go("disk");
    assert_eq!(c.call(NBD_CMD_BLOCK_STATUS, 0, 0, 512), 22, "145");
    c.disc();
}

#[test]
fn malformed_meta_context_options_are_invalid_78_88() {
    let t = three();
    let mut c = t.haggle();
    assert_eq!(c.verdict(NBD_OPT_STRUCTURED_REPLY, b""), NBD_REP_ACK);
    let cases: &[&[u8]] = &[
        b"",
        b"\0\0\0",
        b"\0\0\0\0",
        b"\0\0\0\x04disk",
        b"\0\0\0\x04disk\0\0\0",
        b"\0\0\0\x05disk\0\0\0\0",
        b"\0\0\0\x04disk\0\0\0\x01",
        b"\0\0\0\x04disk\0\0\0\0x",
        b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x10base:allocation",
        b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0ebase:allocation",
        b"\0\0\0\x04disk\0\0\0\x02\0\0\0\x0fbase:allocation",
        b"\0\0\0\x04disk\xff\xff\xff\xff\0\0\0\0",
        b"\0\0\0\x04disk\0\0\0\x01\xff\xff\xff\xff",
        b"\xff\xff\xff\xff",
    ];
    for option in [NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT] {
        for data in cases {
            let replies = c.opt(option, data);
            assert_eq!((replies.len(), replies[0].0), (1, NBD_REP_ERR_INVALID), "{data:?}");
        }
        // 88: many, but well-formed.
        let mut many = b"\0\0\0\x04disk".to_vec();
        many.extend_from_slice(&10_000u32.to_be_bytes());
        many.extend_from_slice(&vec![0; 40_000]);
        assert_eq!(c.verdict(option, &many), NBD_REP_ERR_TOO_BIG);
        // 89
        assert_eq!(c.verdict(option, &meta_data("nope", &[])), NBD_REP_ERR_UNKNOWN);
    }
}

#[test]
fn listing_contexts_knows_wildcards_79_80_81_82() {
    let t = three();
    let mut c = t.haggle();
    assert_eq!(c.verdict(NBD_OPT_STRUCTURED_REPLY, b""), NBD_REP_ACK);
    let mut check = |queries: &[&str], found: bool| {
        let replies = c.opt(NBD_OPT_LIST_META_CONTEXT, &meta_data("disk", queries));
        assert_eq!(replies.last().unwrap().0, NBD_REP_ACK);
        let want = if found { vec![(0, String::from("base:allocation"))] } else { vec![] };
        assert_eq!(contexts(&replies), want, "{queries:?}");
    };
    check(&[], true);
    check(&["base:"], true);
    check(&["base:allocation"], true);
    check(&["x:", "base:", "base:allocation"], true);
    check(&["base:allocation2"], false);
    check(&["base"], false);
    check(&["base:alloc"], false);
    check(&["BASE:allocation"], false);
    check(&["qemu:dirty-bitmap:b"], false);
    check(&["nocolon"], false);
    check(&[""], true);
}

#[test]
fn setting_contexts_selects_exactly_what_is_named_79_83_84_86() {
    let t = three();
    let mut c = t.haggle();
    assert_eq!(c.verdict(NBD_OPT_STRUCTURED_REPLY, b""), NBD_REP_ACK);
    let mut check = |queries: &[&str], found: usize| {
        let replies = c.opt(NBD_OPT_SET_META_CONTEXT, &meta_data("disk", queries));
        assert_eq!(replies.last().unwrap().0, NBD_REP_ACK);
        assert_eq!(contexts(&replies).len(), found, "{queries:?}");
    };
    check(&["base:allocation"], 1);
    check(&["base:allocation", "base:allocation"], 1);
    check(&["base:"], 0);
    check(&[], 0);
    check(&["x:y", "qemu:allocation-depth"], 0);
    check(&["x:y", "base:allocation", "z:"], 1);
}

#[test]
fn a_selection_lives_until_the_next_one_even_if_that_fails_84_85_87_145() {
    let t = TestServer::unix(vec![memory("a", 4096), memory("b", 4096)]);
    // (what to do after a good selection for "a", export of GO, whether block status works)
    type Step = fn(&mut Raw);
    let cases: &[(Step, &str, bool)] = &[
        (|_| {}, "a", true),
        (|_| {}, "b", false),
        (|c| drop(c.opt(NBD_OPT_SET_META_CONTEXT, &meta_data("a", &[]))), "a", false),
        (|c| drop(c.opt(NBD_OPT_SET_META_CONTEXT, b"junk")), "a", false),
        (|c| drop(c.opt(NBD_OPT_SET_META_CONTEXT, &meta_data("nope", &["base:allocation"]))), "a", false),
        (|c| drop(c.opt(NBD_OPT_SET_META_CONTEXT, &meta_data("b", &["base:allocation"]))), "a", false),
        (|c| drop(c.opt(NBD_OPT_SET_META_CONTEXT, &meta_data("b", &["base:allocation"]))), "b", true),
        (|c| drop(c.opt(NBD_OPT_LIST_META_CONTEXT, &meta_data("b", &[]))), "a", true),
        (|c| drop(c.info(NBD_OPT_INFO, "b", &[])), "a", true),
        (|c| drop(c.info(NBD_OPT_GO, "nope", &[])), "a", true),
        (|c| drop(c.opt(NBD_OPT_STRUCTURED_REPLY, b"")), "a", true),
    ];
    for (i, (step, name, works)) in cases.iter().enumerate() {
        let mut c = t.haggle();
        assert_eq!(c.verdict(NBD_OPT_STRUCTURED_REPLY, b""), NBD_REP_ACK);
        let set = c.opt(NBD_OPT_SET_META_CONTEXT, &meta_data("a", &["base:allocation"]));
        assert_eq!(contexts(&set).len(), 1);
        step(&mut c);
        c.go(name);
        assert_eq!(c.block_status(0, 0, 4096).is_ok(), *works, "case {i}");
        c.disc();
    }
}

#[test]
fn clients_that_vanish_in_the_handshake_leave_nothing_behind_14() {
    let t = three();
    let mut all = 3u32.to_be_bytes().to_vec();
    put_option(&mut all, NBD_OPT_LIST, b"");
    put_option(&mut all, NBD_OPT_GO, &info_data(b"disk", &[]));
    for cut in 0..=all.len() {
        let mut c = t.connect();
        if cut % 2 == 0 {
            c.recv(Greeting::LEN);
        }
        c.send_lossy(&all[..cut]);
    }
    t.wait_for("all sessions end", |s| s.connections() == 0);
    t.haggle().go("disk");
}

#[test]
fn a_slow_handshake_is_cut_off_15() {
    let t = TestServer::with(vec![memory("", 4096)], 1, |c| c.handshake_timeout = Duration::from_millis(50));
    let mut silent = t.connect();
    silent.recv(Greeting::LEN);
    silent.expect_close();
    let mut halfway = t.haggle();
    halfway.send(b"IHAVE");
    halfway.expect_close();
    // Once in transmission there is no such limit: nothing but the test's own patience ends this.
    let mut c = t.haggle();
    c.go("");
    std::thread::sleep(Duration::from_millis(120));
    assert_eq!(c.read(0, 1).unwrap(), [0]);
}

#[test]
fn half_open_connections_are_bounded_15() {
    let t = TestServer::with(vec![memory("", 4096)], 2, |c| c.max_half_open = 3);
    let mut established = t.haggle();
    established.go("");
    // The oldest go first, so an honest client gets through any flood.
    let mut flood: Vec<Raw> = Vec::new();
    for _ in 0..20 {
        let mut c = t.connect();
        c.recv(Greeting::LEN);
        flood.push(c);
    }
    let mut honest = t.haggle();
    honest.go("");
    for c in &mut flood[..17] {
        c.expect_close();
    }
    assert_eq!(established.read(0, 1).unwrap(), [0]);
}

#[test]
fn connections_are_bounded_and_refused_cleanly_164() {
    let t = TestServer::with(vec![memory("", 4096)], 2, |c| c.max_connections = 100);
    let mut clients: Vec<Raw> = (0..100).map(|_| t.go("", false)).collect();
    for _ in 0..5 {
        t.connect().expect_close();
    }
    for c in &mut clients {
        assert_eq!(c.read(0, 1).unwrap(), [0]);
    }
    clients.pop().unwrap().disc();
    t.wait_for("one has left", |s| s.connections() < 100);
    let mut next = t.go("", false);
    assert_eq!(next.read(0, 1).unwrap(), [0]);
}

#[test]
fn several_listeners_serve_the_same_exports() {
    let dir = tempfile::tempdir().unwrap();
    let second = dir.path().join("second.sock");
    let t = TestServer::with(vec![memory("", 4096)], 1, |c| {
        c.listen.push(ListenAddr::Unix(second.clone()));
        c.listen.push(ListenAddr::Tcp(([127, 0, 0, 1], 0).into()));
    });
    let ListenAddr::Tcp(tcp) = t.server.bound_addrs()[2] else { panic!("in order") };
    assert_ne!(tcp.port(), 0, "the port really bound");
    let mut a = t.connect();
    a.greet(3);
    a.go("");
    assert_eq!(a.write(0, 0, b"shared"), 0);
    let mut b = Raw::unix(std::os::unix::net::UnixStream::connect(&second).unwrap());
    b.greet(3);
    b.go("");
    assert_eq!(b.read(0, 6).unwrap(), b"shared");
    let mut c = Raw::tcp(std::net::TcpStream::connect(tcp).unwrap());
    c.greet(3);
    c.go("");
    assert_eq!(c.read(0, 6).unwrap(), b"shared");
    t.shutdown(PATIENCE);
    assert!(!second.exists(), "our socket file is removed");
}
