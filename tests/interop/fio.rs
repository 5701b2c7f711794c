//! fio's nbd engine, with verification.

use crate::harness::{Builder, Server, Setup, field, matrix};
use crate::tools::{run_command, tool};
use serde_json::Value;

matrix!(verify_on_one_connection, verify_on_four_connections);

/// Bytes of each job's share of the disk.
const SHARE: u64 = 8 << 20;

/// Writes and verifies with `jobs` connections at once, each on its own part of the disk.
pub(crate) fn write_and_verify(server: &Server, jobs: u64) {
    let random = ["--rw=randrw", "--rwmixread=30", "--bsrange=512-64k", "--bs_unaligned=1"];
    verify(server, jobs, &random);
}

fn verify(server: &Server, jobs: u64, pattern: &[&str]) {
    let mut args = vec![
        "--name=verify".to_owned(),
        "--ioengine=nbd".to_owned(),
        format!("--uri={}", server.uri),
        format!("--size={SHARE}"),
        format!("--offset_increment={SHARE}"),
        format!("--numjobs={jobs}"),
        "--iodepth=32".to_owned(),
        "--verify=crc32c".to_owned(),
        "--verify_fatal=1".to_owned(),
        "--verify_backlog=64".to_owned(),
        "--do_verify=1".to_owned(),
        "--end_fsync=1".to_owned(),
        "--thread=1".to_owned(),
        "--randrepeat=1".to_owned(),
        "--output-format=json".to_owned(),
    ];
    args.extend(pattern.iter().map(|&a| a.to_owned()));
    // fio leaves its verify state in the folder where it runs.
    let out = run_command(tool("fio").args(&args).current_dir(server.dir.path())).ok();
    // fio may print notes before the object.
    let report: Value = serde_json::from_str(&out[out.find('{').unwrap()..]).unwrap();
    let done = report["jobs"].as_array().unwrap();
    assert_eq!(done.len() as u64, jobs);
    for job in done {
        assert_eq!(job["error"], 0, "{job}");
        assert!(job["write"]["total_ios"].as_u64().unwrap() > 100, "{job}");
        assert!(job["read"]["total_ios"].as_u64().unwrap() > 100, "{job}");
    }
}

fn verify_on_one_connection(setup: Setup) {
    let server = Server::plain(setup);
    write_and_verify(&server, 1);
    server.stop();
}

fn verify_on_four_connections(setup: Setup) {
    let server = Server::plain(setup);
    write_and_verify(&server, 4);
    server.stop();
}

/// The connections of one export are served by several threads: by the daemon's own count, not by timing.
#[test]
fn four_connections_of_one_image_run_on_several_threads() {
    for aio in ["io_uring", "threads"] {
        let setup = Setup { iothreads: 4, aio, ..crate::harness::UNIX_3_THREADS };
        let server = Builder::new(setup).image_len(64 << 20).start();
        write_and_verify(&server, 4);
        let stopped = server.stop();
        let totals = stopped.messages("iothread totals");
        assert_eq!(totals.len(), 4, "one line per thread: {totals:#?}");
        let requests: Vec<u64> = totals.iter().map(|l| field(l, "requests").as_u64().unwrap()).collect();
        let names: std::collections::BTreeSet<_> =
            totals.iter().map(|l| field(l, "iothread").to_string()).collect();
        assert_eq!(names.len(), 4, "{names:?}");
        // Four connections, placed on the least loaded thread each: every thread has served one.
        assert!(requests.iter().all(|&n| n > 100), "{requests:?}");
    }
}

/// Data is right whichever way it takes: by the fast paths wherever they can be taken, and by none of them.
#[test]
fn verify_with_the_fast_paths_forced_on_and_off() {
    for fast in ["forced", "off"] {
        for setup in [crate::harness::UNIX_1_IO_URING, crate::harness::TCP_3_IO_URING] {
            let variable = format!("CONBD_FAST={fast}");
            let builder = Builder::new(setup).image_len(64 << 20).wrapped_by(&["env", &variable]);
            let server = builder.start();
            write_and_verify(&server, 4);
            // One after the other, which is what is done several at once.
            verify(&server, 2, &["--rw=rw", "--bs=4k", "--rwmixread=30"]);
            verify(&server, 2, &["--rw=write", "--bs=1k"]);
            // Large ones, which are lent.
            verify(&server, 1, &["--rw=randrw", "--rwmixread=30", "--bsrange=32k-64k"]);
            let stopped = server.stop();
            let totals = stopped.messages("iothread totals");
            let inline: u64 = totals.iter().map(|l| field(l, "inline").as_u64().unwrap()).sum();
            assert_eq!(inline > 0, fast == "forced", "requests answered in place: {inline}");
        }
    }
}

/// A word that is none of the fast paths is refused, by name.
#[test]
fn an_unknown_fast_path_is_refused() {
    let builder = Builder::new(crate::harness::UNIX_1_IO_URING).image_len(1 << 20);
    let (status, text) = builder.wrapped_by(&["env", "CONBD_FAST=warp"]).start_refused();
    assert!(!status.success());
    assert!(text.contains("\"warp\"") && text.contains("inline-read"), "{text}");
}
