//! `conbd bench`: what it counts, what it refuses, and that `--verify` notices every way of losing data.

use crate::cli_harness::{Claims, Ended, FakeServer, Serving, conbd, image, serve_memory, text};
use conbd::nbd::proto::TransmissionFlags;
use serde_json::Value;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

const SIZE: usize = 1 << 20;

/// An in-test server whose writes go through `tamper`.
fn server(claims: Claims, tamper: impl Fn(u64, &mut Vec<u8>) + Send + Sync + 'static) -> FakeServer {
    let memory = Arc::new(Mutex::new(vec![0; SIZE]));
    FakeServer::start(move |stream| serve_memory(stream, claims, &memory, &tamper))
}

fn bench(uri: &str, args: &[&str]) -> (Ended, Value) {
    let ended = conbd(&[&["bench", uri, "--json"], args].concat());
    let report = serde_json::from_str(&ended.stdout).unwrap_or(Value::Null);
    (ended, report)
}

const WRITE: [&str; 9] =
    ["--rw", "write", "--verify", "--destroy-data", "--count", "600", "--depth", "4", "--connections=2"];

#[test]
fn an_honest_server_passes_verification() {
    for structured in [true, false] {
        let fake = server(Claims { structured, ..Claims::new(SIZE as u64) }, |_, _| {});
        let (ended, report) = bench(&fake.uri(), &WRITE);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        assert_eq!(report["write"]["requests"], 600);
        assert_eq!(report["write"]["bytes"], 600 * 4096);
        assert_eq!(report["verify"]["mismatches"], 0);
        let checked = report["verify"]["blocks_checked"].as_u64().unwrap();
        assert!((1..=256).contains(&checked), "at most every block once: {checked}");
        // Another run can check what this one has left behind.
        let (ended, report) = bench(&fake.uri(), &["--verify", "--count", "1", "--pattern", "sequential"]);
        assert!(matches!(ended.code, Some(0 | 3)), "{ended:?}");
        assert_eq!(report["verify"]["blocks_checked"], 1);
    }
}

#[test]
fn every_kind_of_headers_is_driven_and_told() {
    let (dir, path) = image(1 << 20);
    let socket = dir.path().join("s");
    let serving = Serving::start(&[text(&path), "--socket", text(&socket)], 1);
    for headers in ["simple", "structured", "extended"] {
        for pattern in ["random", "sequential"] {
            let args = ["--rw", "70", "--destroy-data", "--headers", headers, "--pattern", pattern];
            let (ended, report) =
                bench(serving.uri(), &[&args[..], &["--count", "3000", "--depth", "16"]].concat());
            assert_eq!(ended.code, Some(0), "{headers}: {ended:?}");
            assert_eq!(report["headers"], headers);
            assert_eq!(report["errors"], 0);
            let done = |kind: &str| report[kind]["requests"].as_u64().unwrap();
            assert_eq!(done("read") + done("write"), 3000, "{headers}: {report}");
            assert!(done("read") > 1500 && done("write") > 500, "{report}");
        }
    }
    // A server that has less gives less.
    let fake = server(Claims { structured: false, ..Claims::new(SIZE as u64) }, |_, _| {});
    let (ended, report) = bench(&fake.uri(), &["--count", "10", "--headers", "extended"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(report["headers"], "simple");
}

#[test]
fn a_mix_verifies_what_it_reads_on_the_way() {
    let fake = server(Claims::new(SIZE as u64), |_, _| {});
    let args = [
        "--rw",
        "50",
        "--verify",
        "--destroy-data",
        "--count",
        "2000",
        "--depth",
        "8",
        "--bs",
        "1k",
        "--region",
        "64k",
    ];
    let (ended, report) = bench(&fake.uri(), &args);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(
        report["read"]["requests"].as_u64().unwrap() + report["write"]["requests"].as_u64().unwrap(),
        2000
    );
    assert!(report["verify"]["blocks_checked"].as_u64().unwrap() > 500, "{report}");
}

/// One write in a hundred is treated badly.
fn corrupting(how: fn(u64, &mut Vec<u8>)) -> (Ended, Value) {
    let writes = AtomicU64::new(0);
    let fake = server(Claims::new(SIZE as u64), move |offset, data| {
        if writes.fetch_add(1, Ordering::Relaxed) % 100 == 7 {
            how(offset, data);
        }
    });
    // Sequential: no block is written twice, so no later write heals the damage.
    let (ended, report) = bench(
        &fake.uri(),
        &["--rw", "write", "--verify", "--destroy-data", "--count", "200", "--pattern", "sequential"],
    );
    assert_eq!(ended.code, Some(3), "{ended:?}");
    assert_eq!(report["verify"]["mismatches"], 2, "{report}");
    assert_eq!(report["verify"]["first"][0]["offset"], 7 * 4096);
    (ended, report)
}

#[test]
fn verification_notices_a_flipped_bit_a_lost_write_and_a_misplaced_one() {
    let (_, report) = corrupting(|_, data| data[3000] ^= 4);
    let what = report["verify"]["first"][0]["what"].as_str().unwrap();
    assert!(what.contains("damaged from byte 3000"), "{what}");
    let (_, report) = corrupting(|_, data| data.clear());
    let what = report["verify"]["first"][0]["what"].as_str().unwrap();
    assert!(what.contains("zeroes"), "{what}");
    let (_, report) = corrupting(|offset, data| data[8..16].copy_from_slice(&(offset + 4096).to_le_bytes()));
    let what = report["verify"]["first"][0]["what"].as_str().unwrap();
    assert!(what.contains("damaged header"), "{what}");
}

#[test]
fn verification_notices_that_an_overwrite_was_lost() {
    let seen = Mutex::new(std::collections::HashSet::new());
    let fake = server(Claims::new(SIZE as u64), move |offset, data| {
        // Every block keeps its first content.
        if !seen.lock().unwrap().insert(offset) {
            data.clear();
        }
    });
    let (ended, report) = bench(
        &fake.uri(),
        &[
            "--rw",
            "write",
            "--verify",
            "--destroy-data",
            "--count",
            "64",
            "--region",
            "32k",
            "--pattern",
            "sequential",
        ],
    );
    assert_eq!(ended.code, Some(3), "{ended:?}");
    assert_eq!(report["verify"]["mismatches"], 8);
    let what = report["verify"]["first"][0]["what"].as_str().unwrap();
    assert!(what.contains("generation 1 instead of 8"), "{what}");
}

#[test]
fn without_multi_conn_each_connection_verifies_its_own_part() {
    let mut claims = Claims::new(SIZE as u64);
    claims.flags.remove(TransmissionFlags::NBD_FLAG_CAN_MULTI_CONN);
    let fake = server(claims, |_, _| {});
    let (ended, report) = bench(&fake.uri(), &WRITE);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(report["verify"]["mismatches"], 0);
}

#[test]
fn an_old_server_without_options_can_be_measured() {
    let fake = server(Claims { structured: false, go: false, ..Claims::new(SIZE as u64) }, |_, _| {});
    let (ended, report) = bench(&fake.uri(), &["--count", "50"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(report["read"]["requests"], 50);
    let latency = &report["read"]["latency_us"];
    for name in ["min", "mean", "p50", "p90", "p99", "p99.9", "p99.99", "max"] {
        assert!(latency[name].as_f64().unwrap() > 0.0, "{name}: {latency}");
    }
    assert_eq!(report["write"]["latency_us"], Value::Null);
}

#[test]
fn nothing_is_overwritten_without_consent_and_nonsense_is_refused() {
    let fake = server(Claims::new(SIZE as u64), |_, _| panic!("nobody allowed a write"));
    let refused = |args: &[&str], code: i32, words: &[&str]| {
        let ended = conbd(&[&["bench", &fake.uri()], args].concat());
        assert_eq!(ended.code, Some(code), "{ended:?}");
        for word in words {
            assert!(ended.stderr.contains(word), "{}\nshould say {word}", ended.stderr);
        }
        assert_eq!(ended.stdout, "");
    };
    refused(&["--rw", "write"], 2, &["--destroy-data"]);
    refused(&["--rw", "90"], 2, &["--destroy-data"]);
    refused(&["--rw", "both"], 2, &["both", "percentage"]);
    refused(&["--bs", "0"], 2, &["--bs"]);
    refused(&["--bs", "1G"], 2, &["64 MiB"]);
    refused(&["--bs", "48M"], 2, &["at most 33554432"]);
    refused(&["--bs", "16", "--verify"], 2, &["40 bytes"]);
    refused(&["--depth", "0"], 2, &["--depth 0"]);
    refused(&["--depth", "9999999"], 2, &["16384"]);
    refused(&["--threads", "2"], 2, &["--threads"]);
    refused(&["--count", "0"], 2, &["more than zero"]);
    refused(&["--region", "1G"], 2, &["has only 1048576 bytes"]);
    refused(&["--depth", "300"], 2, &["256 blocks"]);
    let ended = conbd(&["bench", "nbd+unix:///?socket=/nonexistent/s"]);
    assert_eq!(ended.code, Some(1));
    assert!(
        ended.error_line().contains("cannot connect to /nonexistent/s: No such file"),
        "{}",
        ended.stderr
    );
}

#[test]
fn failed_requests_are_counted_and_fail_the_run() {
    // The server says 1 MiB and holds half of it: our own would never; a raw window makes one that does.
    let (_dir, disk) = image(1 << 20);
    let serving = Serving::start(&[text(&disk), "--listen", "127.0.0.1:0", "--read-only"], 1);
    let (ended, _) = bench(serving.uri(), &["--rw", "write", "--destroy-data", "--count", "10"]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.error_line().contains("read-only; use --rw read"), "{}", ended.stderr);

    let fake = FakeServer::start(|stream| {
        use conbd::nbd::wire::SimpleReply;
        use std::io::Write;
        crate::cli_harness::handshake(stream, Claims { structured: false, ..Claims::new(1 << 20) })?;
        loop {
            let cookie = crate::cli_harness::read_request(stream)?.cookie;
            let error = Some(conbd::nbd::proto::Errno::NBD_EIO);
            stream.write_all(&SimpleReply { error, cookie }.encode())?;
        }
    });
    let (ended, report) = bench(&fake.uri(), &["--count", "5"]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert_eq!(report["errors"], 5);
    assert!(report["error_messages"][0].as_str().unwrap().contains("READ at offset"), "{report}");
    assert!(report["error_messages"][0].as_str().unwrap().contains("EIO"), "{report}");
}

#[test]
fn our_own_server_passes_on_several_threads() {
    let (_dir, disk) = image(8 << 20);
    for aio in ["threads", "auto"] {
        let serving =
            Serving::start(&[text(&disk), "--listen", "127.0.0.1:0", "--iothreads", "2", "--aio", aio], 1);
        let (ended, report) = bench(
            serving.uri(),
            &[
                "--rw",
                "50",
                "--verify",
                "--destroy-data",
                "--count",
                "4000",
                "--depth",
                "8",
                "--connections",
                "4",
            ],
        );
        assert_eq!(ended.code, Some(0), "{ended:?}");
        assert_eq!(report["verify"]["mismatches"], 0);
        assert_eq!(serving.stop().0, Some(0));
    }
}
