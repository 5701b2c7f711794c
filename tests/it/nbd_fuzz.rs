//! Fuzzing of the NBD code: dialogues of real clients (`tests/corpus/nbd`, recorded by `scripts/record-dialogue.py`) are
//! replayed, then mutated. Every run plays some rounds from a fixed seed; `make fuzz SECONDS=n` goes on for n seconds from a
//! seed of its own, which it prints: `CONBD_FUZZ_SEED` plays that again.
//!
//! Targets: the handshake machine cut into any pieces, the options' and replies' decoders, compact and extended requests
//! with their validation, and whole sessions through a socket pair's server, where a witness must be served throughout.

use super::nbd_common::*;
use conbd::block::{BlockBackend, MemoryNode};
use conbd::nbd::export::{Export, ExportOptions, ExportTable};
use conbd::nbd::handshake::{Handshake, Step};
use conbd::nbd::proto::*;
use conbd::nbd::request::{self, Command, View};
use conbd::nbd::wire::*;
use std::sync::Arc;
use std::time::{Duration, Instant};

const SIZE: u64 = 1 << 20;
/// Rounds of a target in an ordinary test run.
const ROUNDS: u64 = 300;

/// A small generator of its own (xorshift): rounds must not change with a library.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

fn corpus() -> Vec<(String, Vec<u8>)> {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/nbd");
    let mut all: Vec<(String, Vec<u8>)> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .map(|p| (p.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&p).unwrap()))
        .collect();
    all.sort();
    assert!(all.len() >= 6, "the corpus is there");
    all
}

/// Changes a dialogue in one to eight places.
fn mutate(random: &mut Random, seeds: &[(String, Vec<u8>)]) -> Vec<u8> {
    const WORDS: [u64; 12] = [
        0,
        1,
        u64::MAX,
        0xffff_ffff,
        1 << 63,
        IHAVEOPT,
        NBD_REQUEST_MAGIC as u64,
        NBD_EXTENDED_REQUEST_MAGIC as u64,
        MAX_PAYLOAD as u64,
        SIZE,
        SIZE - 1,
        4097,
    ];
    let mut b = seeds[random.below(seeds.len())].1.clone();
    for _ in 0..=random.below(8) {
        let at = random.below(b.len());
        match random.below(8) {
            0 if !b.is_empty() => b[at] ^= 1 << random.below(8),
            1 if !b.is_empty() => b[at] = random.next() as u8,
            2 => b.truncate(at),
            3 => {
                let n = random.below(64);
                let junk: Vec<u8> = (0..n).map(|_| random.next() as u8).collect();
                b.splice(at..at, junk);
            }
            4 => {
                let end = (at + random.below(40)).min(b.len());
                b.drain(at..end);
            }
            5 => {
                let other = &seeds[random.below(seeds.len())].1;
                let from = random.below(other.len());
                b.truncate(at);
                b.extend_from_slice(&other[from..]);
            }
            _ => {
                let width = [1, 2, 4, 8][random.below(4)];
                let word = WORDS[random.below(WORDS.len())].to_be_bytes();
                if at + width <= b.len() {
                    b[at..at + width].copy_from_slice(&word[8 - width..]);
                }
            }
        }
    }
    b
}

/// Plays rounds of `f`: a fixed number from a fixed seed, or as long as was asked for.
fn fuzz(target: &str, mut f: impl FnMut(&mut Random, &[u8])) {
    let seeds = corpus();
    let seconds: Option<u64> = std::env::var("CONBD_FUZZ_SECONDS").ok().and_then(|s| s.parse().ok());
    let seed = std::env::var("CONBD_FUZZ_SEED").ok().and_then(|s| s.parse().ok());
    let seed = seed.unwrap_or(if seconds.is_some() { u64::from(std::process::id()) + 1 } else { 1 });
    println!("{target}: CONBD_FUZZ_SEED={seed}");
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    for (_, bytes) in &seeds {
        f(&mut random, bytes);
    }
    let until = seconds.map(|s| Instant::now() + Duration::from_secs(s));
    let mut rounds = 0u64;
    while until.map_or(rounds < ROUNDS, |until| Instant::now() < until) {
        let bytes = mutate(&mut random, &seeds);
        f(&mut random, &bytes);
        rounds += 1;
    }
    println!("{target}: {rounds} rounds");
}

fn exports() -> Vec<Arc<Export>> {
    let make = |name: &str| {
        let options = ExportOptions { name: name.into(), allocation_depth: true, ..Default::default() };
        Export::new(options, BlockBackend::new(Arc::new(MemoryNode::new("m", SIZE).unwrap()))).unwrap()
    };
    vec![make(""), make("disk")]
}

/// Plays requests through decoding and validation, as the reader does; returns how many passed.
fn requests(mut b: &[u8], extended: bool) -> usize {
    let flags = TransmissionFlags::all() - TransmissionFlags::NBD_FLAG_READ_ONLY;
    let view = View { size: SIZE, flags, has_contexts: true, extended };
    let mut passed = 0;
    while let Ok(Some(h)) = request::next_header(b, extended) {
        b = &b[request::header_len(extended)..];
        let Some(payload) = request::payload_len(&h, extended) else { return passed };
        let verdict = request::validate(&h, &view);
        let Some((payload, rest)) = b.split_at_checked(payload as usize) else { return passed };
        b = rest;
        match verdict {
            Ok(Command::Disc) => return passed,
            Ok(Command::Read { offset, len, .. } | Command::Write { offset, len, .. }) => {
                assert!(offset + u64::from(len) <= SIZE);
            }
            Ok(
                Command::Trim { offset, len, .. }
                | Command::Cache { offset, len }
                | Command::WriteZeroes { offset, len, .. }
                | Command::BlockStatus { offset, len, .. },
            ) => assert!(offset.checked_add(len).is_some_and(|end| end <= SIZE)),
            Ok(Command::FilteredBlockStatus { offset, .. }) => {
                if let Ok(filter) = request::filtered(offset, payload, SIZE, |id| id < 3) {
                    assert!(!filter.ids.is_empty() && offset + filter.effect_len <= SIZE);
                }
            }
            Ok(Command::Flush) => {}
            Err(e) => assert_ne!(e.errno, Errno::NBD_ENOTSUP),
        }
        passed += 1;
    }
    passed
}

#[test]
fn handshakes_and_what_follows_are_never_out_of_step() {
    let table = ExportTable::new(exports(), None).unwrap();
    let mut entered = 0;
    fuzz("handshake", |random, bytes| {
        let mut hs = Handshake::new();
        let (mut buffered, mut out) = (Vec::new(), Vec::new());
        let mut left = bytes;
        loop {
            let mut consumed = 0;
            let step = hs.advance(&buffered, &mut consumed, &table, false, &mut out);
            assert!(consumed <= buffered.len());
            buffered.drain(..consumed);
            match step {
                Step::Again => {}
                Step::NeedInput if left.is_empty() => break,
                Step::NeedInput => {
                    let n = (1 + random.below(50)).min(left.len());
                    buffered.extend_from_slice(&left[..n]);
                    left = &left[n..];
                }
                Step::Enter(n) => {
                    entered += 1;
                    buffered.extend_from_slice(left);
                    requests(&buffered, n.style == HeaderStyle::Extended);
                    break;
                }
                Step::Close(_) => break,
                Step::StartTls => panic!("TLS is off"),
            }
            assert!(out.len() < 1 << 20, "answers are bounded by what was asked");
        }
    });
    assert!(entered > 0, "the corpus has dialogues that come to requests");
}

#[test]
fn requests_and_decoders_take_anything() {
    let mut passed = 0;
    fuzz("requests", |random, bytes| {
        // From a request on, if there is one; else from anywhere.
        for (magic, extended) in [(NBD_REQUEST_MAGIC, false), (NBD_EXTENDED_REQUEST_MAGIC, true)] {
            let magic = magic.to_be_bytes();
            if let Some(at) = bytes.windows(4).position(|w| w == magic) {
                passed += requests(&bytes[at..], extended);
            }
        }
        let from = random.below(bytes.len());
        let b = &bytes[from..];
        let _ = InfoRequest::decode(b);
        if let Ok(r) = MetaContextRequest::decode(b) {
            assert_eq!(r.queries().count(), r.len());
        }
        let _ = StatusFilter::decode(b);
        let _ = RepServer::decode(b);
        let _ = RepInfo::decode(b);
        let _ = RepMetaContext::decode(b);
        for kind in [0, 1, 2, 5, 6, 0x8001, 0x8002, random.next() as u16] {
            let _ = Chunk::decode(kind, b);
        }
    });
    assert!(passed > 0, "the corpus has requests");
}

#[test]
fn sessions_end_cleanly_whatever_is_said() {
    let t = TestServer::with(exports(), 1, |_| {});
    let mut witness = t.go("disk", true);
    assert_eq!(witness.write(0, 4096, &[7; 512]), 0);
    fuzz("sessions", |random, bytes| {
        let mut c = t.connect();
        for piece in bytes.chunks(1 + random.below(400)) {
            c.send_lossy(piece);
        }
        if random.below(4) > 0 {
            c.half_close_lossy();
            c.drain();
        }
        drop(c);
        assert_eq!(witness.read(0, 512).unwrap().len(), 512, "a witness is served");
    });
    t.wait_for("all but the witness are gone", |s| s.connections() == 1);
    assert_eq!(t.server.budget_in_use(), (0, 0));
    witness.disc();
}
