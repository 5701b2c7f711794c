//! Rules of the protocol that no other test is about: the framing of replies, flags, and effects on neighbours.

use super::nbd_common::*;
use conbd::block::{BlockBackend, FileNode, FileOptions, MemoryNode};
use conbd::nbd::export::{Export, ExportOptions};
use conbd::nbd::proto::*;
use conbd::nbd::server::ListenAddr;
use conbd::nbd::wire::*;
use std::sync::Arc;

const SIZE: u64 = 1 << 20;
const EINVAL: u32 = 22;
const FLAGS: [TransmissionFlags; 4] = [
    TransmissionFlags::NBD_FLAG_SEND_TRIM,
    TransmissionFlags::NBD_FLAG_SEND_WRITE_ZEROES,
    TransmissionFlags::NBD_FLAG_SEND_FAST_ZERO,
    TransmissionFlags::NBD_FLAG_SEND_RESIZE,
];

#[test]
fn the_default_port_is_ianas_4() {
    assert_eq!(NBD_DEFAULT_PORT, 10809);
    let uri: conbd::nbd::client::Uri = "nbd://localhost".parse().unwrap();
    assert_eq!(uri.address.to_string(), "localhost:10809");
}

#[test]
fn tcp_sockets_send_small_replies_at_once_3() {
    let any = ListenAddr::Tcp("127.0.0.1:0".parse().unwrap());
    let t = TestServer::with(vec![memory("", SIZE)], 1, |c| c.listen = vec![any]);
    let mut c = t.go("", true);
    assert_eq!(c.read(0, 512).unwrap(), [0; 512]);
    // The server is in this process: look at its end of the connection.
    let ListenAddr::Tcp(addr) = &t.server.bound_addrs()[0] else { panic!("a TCP listener") };
    let me =
        rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty()).unwrap();
    let mut seen = 0;
    for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
        let Ok(n) = entry.unwrap().file_name().to_string_lossy().parse::<i32>() else { continue };
        let flags = rustix::process::PidfdGetfdFlags::empty();
        let Ok(fd) = rustix::process::pidfd_getfd(&me, n, flags) else { continue };
        let socket = std::net::TcpStream::from(fd);
        let connected = socket.peer_addr().is_ok();
        if connected && socket.local_addr().is_ok_and(|a| a == *addr) {
            assert!(socket.nodelay().unwrap(), "3: TCP_NODELAY");
            seen += 1;
        }
    }
    assert_eq!(seen, 1, "the server's end was found");
    c.disc();
}

#[test]
fn the_baseline_of_the_document_is_there_5_6_8_92() {
    let t = TestServer::unix(vec![memory("", SIZE)]);
    let mut c = t.connect();
    assert_eq!(c.recv(18), b"NBDMAGICIHAVEOPT\x00\x03", "8");
    c.send(&[0, 0, 0, 1]);
    assert_eq!(c.verdict(99, b""), NBD_REP_ERR_UNSUP);
    assert_eq!(c.verdict(NBD_OPT_LIST, b""), NBD_REP_ACK);
    let info = c.info(NBD_OPT_INFO, "", &[NBD_INFO_BLOCK_SIZE]);
    let infos: Vec<_> =
        info.iter().filter(|r| r.0 == NBD_REP_INFO).map(|r| RepInfo::decode(&r.1).unwrap()).collect();
    assert!(matches!(infos[0], RepInfo::Export { size: SIZE, .. }));
    assert!(matches!(infos[1], RepInfo::BlockSize(_)), "6: offered");
    c.go("");
    let need = TransmissionFlags::NBD_FLAG_HAS_FLAGS
        | TransmissionFlags::NBD_FLAG_SEND_FLUSH
        | TransmissionFlags::NBD_FLAG_SEND_FUA;
    assert!(c.flags.contains(need), "6, 92");
    assert_eq!(c.write(1, 512, &[7; 512]), 0);
    assert_eq!(c.call(NBD_CMD_FLUSH, 0, 0, 0), 0);
    assert_eq!(c.read(512, 512).unwrap(), [7; 512]);
    c.disc();
    let mut c = t.haggle();
    c.send_opt(NBD_OPT_EXPORT_NAME, b"");
    assert_eq!(u64::from_be_bytes(c.recv(8).try_into().unwrap()), SIZE, "6: EXPORT_NAME works");
    assert_eq!(c.recv(2)[1] & 1, 1, "92: HAS_FLAGS here too");
    c.disc();
    let mut c = t.haggle();
    assert_eq!(c.verdict(NBD_OPT_ABORT, b""), NBD_REP_ACK);
    c.expect_close();
}

#[test]
fn option_replies_are_framed_exactly_17_19_27_28() {
    let t = TestServer::unix(vec![memory("", SIZE)]);
    let mut c = t.haggle();
    // `opt` checks magic, echo, ACK without data and texts of errors.
    for option in (2..=12).filter(|o| *o != NBD_OPT_ABORT && *o != NBD_OPT_GO) {
        for data in [&b""[..], b"x", &[0; 8]] {
            let replies = c.opt(option, data);
            let last = replies.last().unwrap();
            if last.0 & NBD_REP_FLAG_ERROR != 0 {
                assert!(!last.1.is_empty() && last.1.len() <= NBD_MAX_STRING, "27: a text");
            }
        }
    }
    drop(c);
    let mut c = t.haggle();
    // 19: the answer to EXPORT_NAME is size and flags, no magic.
    c.send_opt(NBD_OPT_EXPORT_NAME, b"");
    assert_ne!(c.recv(8), NBD_REP_MAGIC.to_be_bytes());
}

#[test]
fn a_refused_go_leaves_the_session_in_haggling_70_89() {
    let t = TestServer::unix(vec![memory("disk", SIZE)]);
    let mut c = t.haggle();
    assert_eq!(c.verdict(NBD_OPT_STRUCTURED_REPLY, b""), NBD_REP_ACK);
    for name in ["no", "disk2"] {
        assert_eq!(c.info(NBD_OPT_GO, name, &[]).last().unwrap().0, NBD_REP_ERR_UNKNOWN, "70");
        let mut data = Vec::new();
        MetaContextRequest::put(&mut data, name, &["base:allocation"]);
        for option in [NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT] {
            assert_eq!(c.opt(option, &data).last().unwrap().0, NBD_REP_ERR_UNKNOWN, "89");
        }
    }
    assert_eq!(c.verdict(NBD_OPT_GO, b"junk"), NBD_REP_ERR_INVALID);
    c.go("disk");
    assert_eq!(c.read(0, 512).unwrap(), [0; 512]);
    c.disc();
}

#[test]
fn clients_that_never_asked_for_block_sizes_are_served_66_67() {
    let node = Arc::new(MemoryNode::new("m", SIZE).unwrap());
    let options =
        ExportOptions { min_block: Some(4096), preferred_block: Some(65_536), ..Default::default() };
    let t = TestServer::unix(vec![Export::new(options, BlockBackend::new(node)).unwrap()]);
    for structured in [false, true] {
        let mut c = t.go("", structured);
        assert_eq!(c.write(0, 13, b"unaligned"), 0);
        assert_eq!(c.read(12, 11).unwrap(), b"\0unaligned\0");
        assert_eq!(c.call(NBD_CMD_WRITE_ZEROES, 0, 14, 3), 0);
        assert_eq!(c.read(12, 11).unwrap(), b"\0u\0\0\0igned\0");
        assert_eq!(c.call(NBD_CMD_WRITE_ZEROES, 0, 13, 9), 0);
        c.disc();
    }
}

#[test]
fn flags_say_what_is_done_and_nothing_else_72_94_97_141_143() {
    let make = |read_only| {
        let node = Arc::new(MemoryNode::new("m", SIZE).unwrap());
        let name = if read_only { "ro" } else { "rw" };
        let options = ExportOptions { name: name.into(), read_only, ..Default::default() };
        Export::new(options, BlockBackend::new(node)).unwrap()
    };
    let t = TestServer::unix(vec![make(false), make(true)]);
    for (name, structured) in [("rw", false), ("rw", true), ("ro", false), ("ro", true)] {
        let mut c = t.go(name, structured);
        let has = |f| c.flags.contains(f);
        assert_eq!(has(TransmissionFlags::NBD_FLAG_SEND_DF), structured, "72");
        assert!(!has(TransmissionFlags::NBD_FLAG_BLOCK_STATUS_PAYLOAD), "97: compact headers");
        assert!(has(TransmissionFlags::NBD_FLAG_SEND_CACHE), "97");
        let offered = FLAGS.map(has);
        assert_eq!(offered, if name == "rw" { [true, true, true, false] } else { [false; 4] }, "94");
        let ok = if name == "rw" { 0 } else { 1 };
        assert_eq!(c.call(NBD_CMD_TRIM, 0, 0, 512), ok);
        assert_eq!(c.call(NBD_CMD_WRITE_ZEROES, 0, 0, 512), ok);
        let fast = c.call(NBD_CMD_WRITE_ZEROES, 1 << 4, 0, 512);
        assert_eq!(fast, if name == "rw" { 0 } else { EINVAL }, "141: not advertised");
        assert_eq!(c.call(NBD_CMD_CACHE, 0, 0, 512), 0);
        assert_eq!(c.call(NBD_CMD_READ, 1 << 2, 0, 512), if structured { 0 } else { EINVAL }, "72");
        c.disc();
    }
}

#[test]
fn what_one_connection_wrote_the_others_read_95() {
    let t = TestServer::with(vec![memory("", SIZE)], 2, |_| {});
    let mut all: Vec<Raw> = (0..4).map(|i| t.go("", i % 2 == 0)).collect();
    assert!(all.iter().all(|c| c.flags.contains(TransmissionFlags::NBD_FLAG_CAN_MULTI_CONN)));
    for i in 0..all.len() {
        assert_eq!(all[i].write(0, i as u64 * 4096, &[i as u8 + 1; 4096]), 0);
        assert_eq!(all[(i + 1) % 4].call(NBD_CMD_FLUSH, 0, 0, 0), 0);
        for c in &mut all {
            assert_eq!(c.read(i as u64 * 4096, 4096).unwrap(), [i as u8 + 1; 4096]);
        }
    }
}

#[test]
fn replies_are_simple_or_chunked_as_negotiated_101_103_105_106_162() {
    use conbd::block::{FaultAction, FaultOps, FaultRule};
    let (export, fault) = faulty("", SIZE);
    let t = TestServer::unix(vec![export]);
    fault.add_rule(FaultRule::new(FaultOps::all(), FaultAction::Errno(libc::EOVERFLOW)));
    for structured in [false, true] {
        let mut c = t.go("", structured);
        for (cmd, len) in
            [(NBD_CMD_READ, 512), (NBD_CMD_READ, 300_000), (NBD_CMD_TRIM, 512), (NBD_CMD_FLUSH, 0)]
        {
            c.send_req(cmd, 0, 3, 0, len);
            let replies = c.recv_chunks(3);
            assert_eq!(Raw::error_of(&replies), 5, "162: EOVERFLOW is never said");
            match (&replies[..], structured) {
                // 101: no payload follows; the next reply would be out of step.
                ([Reply::Simple { error: 5, .. }], false) => {}
                ([Reply::Chunk { done: true, kind, payload, .. }], true) => {
                    assert_eq!(*kind & NBD_REPLY_TYPE_FLAG_ERROR, NBD_REPLY_TYPE_FLAG_ERROR, "106");
                    assert!(payload.len() >= 6 && payload[..4] != [0; 4], "106");
                }
                other => panic!("103: {other:?}"),
            }
        }
        c.disc();
    }
}

#[test]
fn trim_and_zeroes_keep_to_their_range_at_any_alignment_135_138_152() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
    let file = export_of("file", Arc::new(FileNode::open(&FileOptions::new(&path)).unwrap()));
    let t = TestServer::unix(vec![file, memory("memory", SIZE)]);
    let n = 200_000usize;
    for name in ["file", "memory"] {
        let mut c = t.go(name, true);
        for (start, len) in
            [(1usize, 1usize), (511, 2), (4095, 4097), (4096, 8192), (5000, 70_000), (65_537, 65_536)]
        {
            let data: Vec<u8> = (0..n).map(|i| (i % 255) as u8 + 1).collect();
            let keeps =
                |got: &[u8], from: usize, to: usize| got[..from] == data[..from] && got[to..] == data[to..];
            assert_eq!(c.write(0, 0, &data), 0);
            assert_eq!(c.call(NBD_CMD_TRIM, 0, start as u64, len as u32), 0);
            let got = c.read(0, n as u32).unwrap();
            assert!(keeps(&got, start, start + len), "135: {name} {start}+{len}");
            for flags in [0, 2] {
                assert_eq!(c.write(0, 0, &data), 0);
                assert_eq!(c.call(NBD_CMD_WRITE_ZEROES, flags, start as u64, len as u32), 0);
                let got = c.read(0, n as u32).unwrap();
                assert!(keeps(&got, start, start + len), "138: {name} {start}+{len}: neighbours");
                assert!(got[start..start + len].iter().all(|b| *b == 0), "138: {name} {start}+{len}: zeroes");
            }
        }
        // 152: what NO_HOLE zeroed has its space. (Whether it is told as a hole is up to the file system, which knows more
        // of pages in memory than of others: "hole" promises nothing.)
        let (start, len) = (512 << 10, 256 << 10);
        let blocks = || std::os::unix::fs::MetadataExt::blocks(&path.metadata().unwrap()) * 512;
        let before = blocks();
        assert_eq!(c.call(NBD_CMD_WRITE_ZEROES, 2, start, len), 0);
        if name == "file" {
            assert!(blocks() >= before + u64::from(len), "152");
        } else {
            assert!(c.block_status(0, start, len).unwrap().iter().all(|e| e.flags & 1 == 0), "152");
        }
        c.disc();
    }
}
