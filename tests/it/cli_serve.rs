//! `conbd serve` as a user meets it: readiness, URIs, signals, exit codes, and errors that say what to do.

use crate::cli_harness::{Ended, Serving, conbd, conbd_command, image, run, text};
use rustix::process::Signal;
use serde_json::Value;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Runs `conbd serve` which must fail.
fn refused(args: &[&str], code: i32, words: &[&str]) -> Ended {
    let mut all = vec!["serve"];
    all.extend(args);
    let ended = conbd(&all);
    assert_eq!(ended.code, Some(code), "{ended:?}");
    for word in words {
        assert!(ended.stderr.contains(word), "{}\nshould say {word}", ended.stderr);
    }
    assert_eq!(ended.stdout, "");
    ended
}

#[test]
fn the_uri_on_stdout_is_the_sign_that_clients_can_connect() {
    let (dir, disk) = image(1 << 20);
    let socket = dir.path().join("a socket");
    let serving = Serving::start(
        &[
            text(&disk),
            "--export",
            "a/ü b?#%",
            "--listen",
            "127.0.0.1:0",
            "--listen",
            "[::1]:0",
            "--socket",
            text(&socket),
        ],
        3,
    );
    assert!(serving.uris[0].starts_with("nbd://127.0.0.1:"), "{:?}", serving.uris);
    assert!(serving.uris[0].ends_with("/a/%C3%BC%20b%3F%23%25"), "{:?}", serving.uris);
    assert!(serving.uris[1].starts_with("nbd://[::1]:"), "{:?}", serving.uris);
    let unix = format!("nbd+unix:///a/%C3%BC%20b%3F%23%25?socket={}/a%20socket", dir.path().display());
    assert_eq!(serving.uris[2], unix);
    for uri in &serving.uris {
        let ended = conbd(&["inspect", uri]);
        assert_eq!(ended.code, Some(0), "{ended:?}");
    }
    let (code, log) = serving.stop();
    assert_eq!(code, Some(0), "{log}");
    assert!(!socket.exists(), "our own socket is removed");
}

#[test]
fn every_export_of_a_configuration_gets_its_uri_in_order() {
    let (dir, _) = image(1 << 20);
    std::fs::copy(dir.path().join("disk.raw"), dir.path().join("b.raw")).unwrap();
    let file = dir.path().join("c.toml");
    std::fs::write(
        &file,
        "[server]\nsocket = ['s']\n[[export]]\nname = 'one'\nimage = 'disk.raw'\n[[export]]\nname = 'two'\nimage = 'b.raw'\nread_only = true\ndescription = 'second'\n",
    )
    .unwrap();
    let serving = Serving::start(&["--config", text(&file)], 2);
    let socket = dir.path().join("s");
    let uri = |name: &str| format!("nbd+unix:///{name}?socket={}", socket.display());
    assert_eq!(serving.uris, [uri("one"), uri("two")]);
    let ended = conbd(&["inspect", &uri(""), "--json"]);
    let report: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(report["listed"], 2);
    assert_eq!(report["exports"][1]["name"], "two");
    assert_eq!(report["exports"][1]["read_only"], true);
    assert_eq!(report["exports"][1]["description"], "second");
    assert_eq!(serving.stop().0, Some(0));
}

#[test]
fn json_logs_tell_what_each_iothread_did() {
    let (_dir, disk) = image(1 << 20);
    let serving = Serving::start(
        &[text(&disk), "--listen", "127.0.0.1:0", "--iothreads", "3", "--log-format", "json"],
        1,
    );
    let ended = conbd(&[
        "bench",
        serving.uri(),
        "--count",
        "100",
        "--connections",
        "3",
        "--rw",
        "write",
        "--destroy-data",
    ]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    serving.signal(Signal::USR1);
    serving.wait_for_log("iothread counters");
    serving.signal(Signal::HUP);
    serving.wait_for_log("SIGHUP: reloaded");
    let (code, log) = serving.stop();
    assert_eq!(code, Some(0), "{log}");
    let totals: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).expect(line))
        .filter(|event: &Value| event["message"] == "iothread totals")
        .collect();
    assert_eq!(totals.len(), 3, "{log}");
    for field in [
        "connections",
        "requests",
        "reads",
        "writes",
        "bytes_in",
        "bytes_out",
        "errors",
        "eventfd_writes",
        "turns",
    ] {
        assert!(totals.iter().all(|event| event[field].is_u64()), "{field}: {totals:?}");
    }
    let sum = |field: &str| totals.iter().map(|event| event[field].as_u64().unwrap()).sum::<u64>();
    assert_eq!((sum("connections"), sum("writes"), sum("bytes_in")), (3, 100, 409_600));
    assert!(
        totals.iter().all(|event| event["connections"] == 1),
        "one connection on each thread: {totals:?}"
    );
}

#[test]
fn sigint_is_as_good_as_sigterm_and_a_second_signal_ends_at_once() {
    let (_dir, disk) = image(1 << 20);
    let serving = Serving::start(&[text(&disk), "--listen", "127.0.0.1:0"], 1);
    serving.signal(Signal::INT);
    let (code, log) = serving.wait();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("everything was finished and flushed"), "{log}");

    // A client in the middle of a write: the payload never comes. The first stop waits a moment for it.
    let (dir, disk) = image(1 << 20);
    let socket = dir.path().join("s");
    let serving = Serving::start(&[text(&disk), "--socket", text(&socket)], 1);
    let client = half_a_write(&socket);
    serving.signal(Signal::TERM);
    serving.wait_for_log("stopping");
    serving.signal(Signal::TERM);
    let (code, log) = serving.wait();
    // Whether the server still waited for the payload when the second signal came is its choice; that it ended is not.
    assert!(matches!(code, Some(0 | 4)), "{code:?} {log}");
    drop(client);
}

/// A raw client that has sent half a write request.
fn half_a_write(socket: &Path) -> UnixStream {
    use conbd::nbd::proto::*;
    use conbd::nbd::wire::{InfoRequest, RequestHeader, put_option};
    let mut stream = UnixStream::connect(socket).unwrap();
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    let mut out = ClientFlags::all().bits().to_be_bytes().to_vec();
    let mut data = Vec::new();
    InfoRequest::put(&mut data, "", &[]);
    put_option(&mut out, NBD_OPT_GO, &data);
    let write =
        RequestHeader { flags: CmdFlags::empty(), cmd: NBD_CMD_WRITE, cookie: 1, offset: 0, len: 4096 };
    out.extend(write.encode());
    out.extend([1; 1000]);
    stream.write_all(&out).unwrap();
    // The answer to GO: after it the server is in transmission, and reads the request.
    let mut byte = [0];
    stream.read_exact(&mut byte).unwrap();
    stream
}

#[test]
fn check_tells_what_is_wrong_without_serving() {
    let (dir, disk) = image(1 << 20);
    let ended = conbd(&["serve", text(&disk), "--check"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stdout.contains("1048576 bytes") && ended.stdout.contains("fine"), "{}", ended.stdout);

    let file = dir.path().join("c.toml");
    std::fs::write(
        &file,
        "[[export]]\nname = 'a'\nimage = 'missing.raw'\n[[export]]\nname = 'b'\nimage = 'disk.raw'\noffset = '1G'\n[[export]]\nname = 'c'\nimage = 'disk.raw'\n",
    )
    .unwrap();
    let ended = conbd(&["serve", "--config", text(&file), "--check"]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    for word in ["2 of 3 exports", "export \"a\"", "does not exist", "export \"b\"", "is not inside"] {
        assert!(ended.stderr.contains(word), "{}\nshould say {word}", ended.stderr);
    }

    // A running daemon holds its locks; a check asks for none.
    let serving = Serving::start(&[text(&disk), "--listen", "127.0.0.1:0"], 1);
    assert_eq!(conbd(&["serve", text(&disk), "--check"]).code, Some(0));
    assert_eq!(serving.stop().0, Some(0));
}

#[test]
fn errors_name_what_and_where_and_the_next_step() {
    let (dir, disk) = image(1 << 20);
    refused(&[], 2, &["nothing to serve", "conbd serve disk.raw"]);
    refused(&["--no-such-flag"], 2, &["--no-such-flag", "--help"]);
    refused(&[text(&disk), "--aio", "magic"], 2, &["magic", "io_uring"]);
    refused(&[text(&disk), "--size", "big"], 2, &["big", "64M"]);
    refused(&["--export", "x"], 2, &["<IMAGE>"]);
    refused(&[text(&disk), "--listen", "127.0.0.1"], 2, &["the port is missing"]);
    refused(&["--config", "/nonexistent.toml"], 2, &["/nonexistent.toml", "--config"]).error_line();
    let bad = dir.path().join("bad.toml");
    std::fs::write(&bad, "[server]\nfoo = 1\n").unwrap();
    let place = format!("{}:2:1:", bad.display());
    refused(&["--config", text(&bad)], 2, &[&place, "unknown field `foo`"]).error_line();
    let quiet = ["--log-level", "off", "--listen", "127.0.0.1:0"];
    let with = |args: &[&str]| [args, &quiet].concat().into_iter().map(str::to_owned).collect::<Vec<_>>();
    let refused_quietly = |args: &[&str], words: &[&str]| {
        let args = with(args);
        refused(&args.iter().map(String::as_str).collect::<Vec<_>>(), 1, words).error_line().to_owned()
    };
    refused_quietly(&["/nonexistent.raw"], &["/nonexistent.raw", "does not exist", "truncate"]);
    refused_quietly(&[text(dir.path())], &["is a directory"]);
    let empty = dir.path().join("empty");
    std::fs::write(&empty, "").unwrap();
    refused_quietly(&[text(&empty)], &["is empty", "truncate"]);
    let qcow2 = dir.path().join("q.qcow2");
    let mut bytes = b"QFI\xfb\0\0\0\x03".to_vec();
    bytes.resize(65_536, 0);
    std::fs::write(&qcow2, bytes).unwrap();
    refused_quietly(&[text(&qcow2)], &["q.qcow2", "cluster_bits (bytes 20-23)"]);
    refused_quietly(&[text(&disk), "--offset", "2M"], &["is not inside"]);

    let serving = Serving::start(&[text(&disk), "--listen", "127.0.0.1:0"], 1);
    let address = serving.uri().trim_start_matches("nbd://").trim_end_matches('/').to_owned();
    let other = dir.path().join("other.raw");
    std::fs::copy(&disk, &other).unwrap();
    let in_use = refused(
        &[text(&other), "--log-level", "off", "--listen", &address],
        1,
        &["address in use", &address, "--listen"],
    );
    in_use.error_line();
    refused_quietly(&[text(&disk)], &["is in use", "read-only"]);
    refused(
        &[text(&other), "--log-level", "off", "--listen", "192.0.2.1:0"],
        1,
        &["192.0.2.1", "does not have that address"],
    );
    refused(
        &[text(&other), "--log-level", "off", "--listen", "no.such.host.invalid:1"],
        1,
        &["no.such.host.invalid"],
    );
    let folder = dir.path().join("nowhere/s");
    refused(&[text(&other), "--log-level", "off", "--socket", text(&folder)], 1, &["nowhere", "create it"]);
    refused(&[text(&other), "--log-level", "off", "--socket", text(&disk)], 1, &["not a socket", "--socket"]);
    assert_eq!(serving.stop().0, Some(0));
}

#[test]
fn a_bad_log_filter_in_the_environment_is_refused() {
    let (_dir, disk) = image(1 << 20);
    let mut command = conbd_command(&["serve", text(&disk), "--listen", "127.0.0.1:0"]);
    command.env("CONBD_LOG", "chatty");
    let ended = run(command);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.error_line().contains("CONBD_LOG") && ended.stderr.contains("debug"), "{}", ended.stderr);
}

#[test]
fn a_closed_stdout_is_no_reason_not_to_serve() {
    let (dir, disk) = image(1 << 20);
    let socket = dir.path().join("s");
    let mut command = std::process::Command::new("sh");
    command.args([
        "-c",
        "exec \"$0\" \"$@\" >&-",
        env!("CARGO_BIN_EXE_conbd"),
        "serve",
        text(&disk),
        "--socket",
        text(&socket),
    ]);
    let serving = Serving::start_command(command, 0);
    serving.wait_for_log("serving");
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    assert_eq!(conbd(&["inspect", &uri]).code, Some(0));
    assert_eq!(serving.stop().0, Some(0));
}

#[test]
fn help_and_version_go_to_stdout() {
    let ended = conbd(&["--version"]);
    assert_eq!(
        (ended.code, ended.stdout.as_str()),
        (Some(0), concat!("conbd ", env!("CARGO_PKG_VERSION"), "\n"))
    );
    let ended = conbd(&["serve", "--help"]);
    assert_eq!(ended.code, Some(0));
    assert!(ended.stdout.contains("SIGUSR1") && ended.stdout.contains("Examples:"), "{}", ended.stdout);
    assert_eq!(conbd(&[]).code, Some(2));
}

#[test]
fn debug_events_of_a_request_say_whose_it_is() {
    let (_dir, disk) = image(1 << 20);
    let args = [
        text(&disk),
        "--listen",
        "127.0.0.1:0",
        "--export",
        "e1",
        "--log-format",
        "json",
        "--log-level",
        "debug",
    ];
    let serving = Serving::start(&args, 1);
    let uri = serving.uri().to_owned();
    // A flush always runs in a coroutine of its own.
    let ended = conbd(&["bench", &uri, "--count", "1", "--rw", "write", "--verify", "--destroy-data"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let (code, log) = serving.stop();
    assert_eq!(code, Some(0), "{log}");
    let events: Vec<serde_json::Value> = log.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let done: Vec<_> = events.iter().filter(|e| e["message"] == "request completed").collect();
    assert!(!done.is_empty(), "{log}");
    let flush = done.iter().find(|e| e["span"]["cmd"] == "FLUSH").unwrap_or_else(|| panic!("{done:#?}"));
    assert_eq!((&flush["span"]["name"], &flush["span"]["export"]), (&"request".into(), &"e1".into()));
    assert!(flush["span"]["cookie"].is_u64(), "{flush}");
    let left = events.iter().find(|e| e["message"] == "client disconnected").expect("it has");
    assert_eq!((&left["export"], &left["span"]["export"]), (&"e1".into(), &"e1".into()), "{left}");
}

#[test]
fn the_log_tells_of_the_server_and_not_of_its_libraries() {
    let (_dir, disk) = image(1 << 20);
    for (level, wanted) in [("info", true), ("debug", true), ("off", false)] {
        let args = [text(&disk), "--listen", "127.0.0.1:0", "--log-format", "json", "--log-level", level];
        let (code, log) = Serving::start(&args, 1).stop();
        assert_eq!(code, Some(0), "{log}");
        assert_eq!(log.contains("everything was finished and flushed"), wanted, "{level}: {log}");
        for line in log.lines() {
            let event: serde_json::Value =
                serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
            let target = event["target"].as_str().unwrap();
            assert!(target.starts_with("conbd"), "{level}: {line}");
        }
    }
}
