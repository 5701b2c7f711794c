//! Malformed dialogues: a table of things that clients should not say, and what becomes of each. After every one the
//! server serves a well-behaved client that had been there all along, and has given everything back.

use super::nbd_common::*;
use conbd::nbd::proto::*;
use conbd::nbd::wire::*;

const SIZE: u64 = 1 << 20;

/// What the server does with a dialogue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It hangs up, whatever it said before.
    Closed,
    /// It answers the option with this, and the next option too.
    Option(u32),
    /// It answers the request with this errno, and the next request too.
    Request(u32),
}
use Fate::{Closed, Option as Answered, Request};

/// Where a dialogue begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Before the client flags.
    Connect,
    /// In haggling.
    Haggle,
    /// In transmission.
    Simple,
    Structured,
    Extended,
}
use Stage::{Connect, Extended, Haggle, Simple, Structured};

struct Case {
    name: String,
    from: Stage,
    bytes: Vec<u8>,
    fate: Fate,
}

fn opt(option: u32, len: u32, data: &[u8]) -> Vec<u8> {
    let mut b = OptionHeader { option, len }.encode().to_vec();
    b.extend_from_slice(data);
    b
}

fn compact(magic: u32, flags: u16, cmd: u16, offset: u64, len: u32) -> Vec<u8> {
    let h =
        RequestHeader { flags: CmdFlags::from_bits_retain(flags), cmd, cookie: 9, offset, len: len.into() };
    let mut b = h.encode().to_vec();
    b[..4].copy_from_slice(&magic.to_be_bytes());
    b
}

fn wide(flags: u16, cmd: u16, offset: u64, len: u64) -> Vec<u8> {
    RequestHeader { flags: CmdFlags::from_bits_retain(flags), cmd, cookie: 9, offset, len }
        .encode_extended()
        .to_vec()
}

fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    let mut add =
        |name: String, from: Stage, bytes: Vec<u8>, fate: Fate| all.push(Case { name, from, bytes, fate });
    // Instead of client flags.
    for flags in
        [4u32, 8, 0x10, 0x8000, 0x0001_0000, 0x8000_0000, 0xffff_ffff, 0x0000_0300, 0x4745_5420, 0x1603_0100]
    {
        add(format!("9, 13: client flags {flags:#x}"), Connect, flags.to_be_bytes().to_vec(), Closed);
    }
    for option in [2u32, 3, 5, 6, 7, 8, 9, 10, 11, 99] {
        let bytes = [&[0, 0, 0, 0][..], &opt(option, 0, b"")].concat();
        add(format!("10: option {option} without fixed newstyle"), Connect, bytes, Closed);
    }
    // Options whose framing is wrong.
    for magic in [0u64, u64::MAX, NBDMAGIC, NBD_REP_MAGIC, IHAVEOPT + 1, IHAVEOPT.swap_bytes()] {
        add(
            format!("21: option magic {magic:#x}"),
            Haggle,
            [&magic.to_be_bytes()[..], &[0; 8]].concat(),
            Closed,
        );
    }
    for option in [1u32, 2, 3, 5, 6, 7, 8, 9, 10, 11, 0, 0xffff_ffff] {
        for len in [u32::MAX, 0x8000_0000, MAX_OPTION_SKIP + 1] {
            add(format!("22: option {option} of {len} bytes"), Haggle, opt(option, len, b""), Closed);
        }
    }
    add("2: EXPORT_NAME of 4097 bytes".into(), Haggle, opt(1, 4097, &[b'x'; 4097]), Closed);
    for name in [&b"no"[..], b"a\0b", b"\xff\xfe", b"../disk", b"/etc/passwd", &[b'x'; 4096]] {
        add(
            format!("30, 68: EXPORT_NAME {} bytes", name.len()),
            Haggle,
            opt(1, name.len() as u32, name),
            Closed,
        );
        let info = [&(name.len() as u32).to_be_bytes()[..], name, &[0, 0]].concat();
        for option in [6, 7] {
            let fate = Answered(NBD_REP_ERR_UNKNOWN);
            add(
                format!("61, 68: option {option} for {name:?}"),
                Haggle,
                opt(option, info.len() as u32, &info),
                fate,
            );
        }
    }
    let invalid = Answered(NBD_REP_ERR_INVALID);
    for option in [3u32, 8, 11] {
        for data in [&b"x"[..], &[0; 4], &[0xff; 5000]] {
            let bytes = opt(option, data.len() as u32, data);
            add(format!("20: option {option} with {} bytes", data.len()), Haggle, bytes, invalid);
        }
    }
    for option in [6u32, 7] {
        for data in [
            &b""[..],
            &[0],
            &[0; 4],
            &[0; 5],
            &[0, 0, 0, 1, 0, 0],
            &[0, 0, 0, 0, 0, 1],
            &[0, 0, 0, 0, 0, 2, 0, 3],
            &[0, 0, 0, 0, 0, 0, 0],
            &[0, 0, 0, 0, 0, 1, 0, 3, 0],
            &[0xff; 6],
            &[0x7f, 0xff, 0xff, 0xff, 0, 0],
            &[0, 0, 0, 0, 0xff, 0xff],
        ] {
            add(
                format!("58: option {option} {data:?}"),
                Haggle,
                opt(option, data.len() as u32, data),
                invalid,
            );
        }
    }
    for option in [9u32, 10] {
        let bytes = opt(option, 8, &[0; 8]);
        add(format!("77: option {option} too early"), Haggle, bytes, invalid);
        for data in [&b""[..], &[0; 3], &[0; 7], &[0; 9], &[0, 0, 0, 9, 0, 0, 0, 0], &[0xff; 8]] {
            let first = opt(8, 0, b"");
            let bytes = [first, opt(option, data.len() as u32, data)].concat();
            add(format!("78: option {option} {data:?}"), Haggle, bytes, invalid);
        }
        let many = [&[0; 4][..], &[0xff; 4], &[0; 8]].concat();
        let bytes = [opt(8, 0, b""), opt(option, many.len() as u32, &many)].concat();
        add(format!("88: option {option} with 0xffffffff queries"), Haggle, bytes, invalid);
    }
    for option in [0u32, 4, 12, 13, 100, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff] {
        let fate = Answered(NBD_REP_ERR_UNSUP);
        add(format!("18, 75: option {option}"), Haggle, opt(option, 7, b"unknown"), fate);
    }
    add(
        "22: 200 KiB of option".into(),
        Haggle,
        opt(77, 200_000, &[7; 200_000]),
        Answered(NBD_REP_ERR_TOO_BIG),
    );
    // Requests.
    for from in [Simple, Structured] {
        for magic in [0, u32::MAX, NBD_EXTENDED_REQUEST_MAGIC, NBD_SIMPLE_REPLY_MAGIC, NBD_REQUEST_MAGIC + 1]
        {
            add(format!("98: {from:?} magic {magic:#x}"), from, compact(magic, 0, 0, 0, 512), Closed);
        }
        for len in [MAX_PAYLOAD + 1, 0x8000_0000, u32::MAX] {
            add(
                format!("125: {from:?} write of {len}"),
                from,
                compact(NBD_REQUEST_MAGIC, 0, 1, 0, len),
                Closed,
            );
        }
        for cmd in [8u16, 9, 100, 0x7fff, 0xffff] {
            let bytes = compact(NBD_REQUEST_MAGIC, 0, cmd, 0, 512);
            add(format!("137, 161: {from:?} command {cmd}"), from, bytes, Request(22));
        }
        for flags in [2u16, 8, 0x10, 0x20, 0x40, 0x8000, 0xffff] {
            let bytes = compact(NBD_REQUEST_MAGIC, flags, NBD_CMD_READ, 0, 512);
            add(format!("117, 159: {from:?} read with flags {flags:#x}"), from, bytes, Request(22));
        }
        for (offset, len) in
            [(SIZE, 1), (u64::MAX, 1), (u64::MAX - 511, 512), (1 << 63, 0x8000_0000), (1, SIZE as u32)]
        {
            for (cmd, errno) in [(0u16, 22), (4, 22), (5, 22), (6, 28)] {
                let bytes = compact(NBD_REQUEST_MAGIC, 0, cmd, offset, len);
                let name = format!("114, 134, 143: {from:?} {} {offset}+{len}", cmd_name(cmd));
                add(name, from, bytes, Request(errno));
            }
        }
        let bytes = [compact(NBD_REQUEST_MAGIC, 0, 1, SIZE, 512), vec![0x25; 512]].concat();
        add(format!("121: {from:?} write past the end"), from, bytes, Request(28));
        let bytes = [compact(NBD_REQUEST_MAGIC, 0x8000, 1, 0, 512), vec![0x25; 512]].concat();
        add(format!("121: {from:?} write with an unknown flag"), from, bytes, Request(22));
    }
    add("145: status without contexts".into(), Simple, compact(NBD_REQUEST_MAGIC, 0, 7, 0, 512), Request(22));
    for (offset, len) in [(0, 0), (SIZE, 1), (u64::MAX, u32::MAX)] {
        let bytes = compact(NBD_REQUEST_MAGIC, 0, 7, offset, len);
        add(format!("150: status {offset}+{len}"), Structured, bytes, Request(22));
    }
    for cmd in 0..8u16 {
        let fate = if cmd == NBD_CMD_DISC { Closed } else { Request(22) };
        add(
            format!("157: {} of 2^64-1 payload", cmd_name(cmd)),
            Extended,
            wide(0x20, cmd, 0, u64::MAX),
            Closed,
        );
        let bytes = [wide(0x60, cmd, 0, 16), vec![0x21; if cmd == NBD_CMD_DISC { 0 } else { 16 }]].concat();
        add(format!("156: {} with payload and unknown flag", cmd_name(cmd)), Extended, bytes, fate);
    }
    add("128: write of 2^64-1 without PAYLOAD_LEN".into(), Extended, wide(0, 1, 0, u64::MAX), Closed);
    for cmd in [0u16, 4, 5, 6, 7] {
        let fate = Request(if cmd == 6 { 28 } else { 22 });
        add(format!("158: {} of 2^64-1", cmd_name(cmd)), Extended, wide(0, cmd, 0, u64::MAX), fate);
        add(format!("158: {} at 2^64-1", cmd_name(cmd)), Extended, wide(0, cmd, u64::MAX, 2), fate);
    }
    all
}

fn start(t: &TestServer, from: Stage) -> Raw {
    match from {
        Connect => {
            let mut c = t.connect();
            c.recv(Greeting::LEN);
            c
        }
        Haggle => t.haggle(),
        Simple => t.go("disk", false),
        Structured => t.go("disk", true),
        Extended => t.go_extended("disk", &["base:allocation"]),
    }
}

/// Plays one case on a connection in pieces of `piece` bytes.
fn play(t: &TestServer, case: &Case, piece: usize) {
    let mut c = start(t, case.from);
    if case.from == Extended {
        // The replies echo the offset of cookie 9, which `send` does not note.
        let offset = u64::from_be_bytes(case.bytes[16..24].try_into().unwrap());
        c.expect_offset(9, offset);
    }
    for bytes in case.bytes.chunks(piece) {
        c.send_lossy(bytes);
    }
    match case.fate {
        Closed => {
            c.half_close_lossy();
            c.drain();
        }
        Answered(want) => {
            let (_, option) = last_option(&case.bytes);
            loop {
                let (seen, reply) = c.recv_any_rep();
                if seen == option {
                    assert_eq!(rep_name(reply), rep_name(want), "{}", case.name);
                    break;
                }
            }
            assert_eq!(c.verdict(NBD_OPT_LIST, b""), NBD_REP_ACK, "{}: in step", case.name);
            assert_eq!(c.verdict(NBD_OPT_ABORT, b""), NBD_REP_ACK);
        }
        Request(want) => {
            let error = Raw::error_of(&c.recv_chunks(9));
            assert_eq!(error, want, "{}", case.name);
            assert_eq!(c.read(0, 512).unwrap(), [0; 512], "{}: in step", case.name);
            c.disc();
        }
    }
}

/// Offset and number of the last option in a stream of options.
fn last_option(mut b: &[u8]) -> (usize, u32) {
    let mut found = 0;
    while let Some(header) = b.first_chunk::<{ OptionHeader::LEN }>() {
        let h = OptionHeader::decode(header).unwrap();
        found = h.option;
        b = &b[OptionHeader::LEN + h.len as usize..];
    }
    (b.len(), found)
}

#[test]
fn over_a_hundred_malformed_dialogues_harm_nobody_7_18_20_21_22_58_78_98_137_150_161() {
    let t = TestServer::with(vec![memory("disk", SIZE), memory("other", SIZE)], 1, |_| {});
    let mut witness = t.go("disk", true);
    let cases = cases();
    assert!(cases.len() > 200, "{} cases", cases.len());
    for case in &cases {
        for piece in [usize::MAX, 5] {
            // Byte by byte only where that is a question of a few packets.
            if piece == usize::MAX || case.bytes.len() < 200 {
                play(&t, case, piece);
            }
        }
        assert_eq!(witness.read(0, 512).unwrap(), [0; 512], "{}: a witness is served", case.name);
    }
    t.wait_for("all but the witness are gone", |s| s.connections() == 1);
    assert_eq!(t.server.budget_in_use(), (0, 0));
    witness.disc();
}

#[test]
fn clients_that_leave_at_any_byte_are_forgotten_14_35_126() {
    let t = TestServer::with(vec![memory("disk", SIZE)], 1, |_| {});
    let mut witness = t.go("disk", true);
    let mut dialogue = 3u32.to_be_bytes().to_vec();
    put_option(&mut dialogue, NBD_OPT_STRUCTURED_REPLY, b"");
    let mut go = Vec::new();
    InfoRequest::put(&mut go, "disk", &[NBD_INFO_BLOCK_SIZE]);
    put_option(&mut dialogue, NBD_OPT_GO, &go);
    dialogue.extend(compact(NBD_REQUEST_MAGIC, 0, NBD_CMD_WRITE, 0, 512));
    let whole = dialogue.len() + 512;
    dialogue.extend([7; 511]);
    for n in 0..dialogue.len() {
        let mut c = t.connect();
        c.send(&dialogue[..n]);
        if n % 2 == 0 {
            c.half_close_lossy();
            c.drain();
        }
        drop(c);
    }
    assert!(dialogue.len() < whole);
    // 35: ABORT, and gone before the ACK.
    for _ in 0..50 {
        let mut c = t.haggle();
        c.send_opt(NBD_OPT_ABORT, b"");
        drop(c);
    }
    t.wait_for("all but the witness are gone", |s| s.connections() == 1);
    assert_eq!(witness.read(0, 512).unwrap(), [0; 512], "126: nothing of half a write was written");
    assert_eq!(t.server.budget_in_use(), (0, 0));
    witness.disc();
}
