//! How the daemon ends: signals, what was promised before, and what is left behind.

use crate::harness::{
    Builder, Server, TCP_1_THREADS, TCP_3_IO_URING, UNIX_1_IO_URING, UNIX_3_THREADS, allocated, noise,
    wait_until,
};
use crate::tools::{finish, python_command, run, spawn};
use crate::wire::{Conn, READ, request};
use rustix::process::Signal;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::process::Stdio;

#[test]
fn what_was_flushed_survives_a_stop_under_load() {
    for (setup, signal) in [(UNIX_3_THREADS, Signal::TERM), (TCP_3_IO_URING, Signal::INT)] {
        let server = Builder::new(setup).image_len(16 << 20).start();
        let mut command = python_command(include_str!("writer.py"));
        let mut client = spawn(command.arg(&server.uri).stdout(Stdio::piped()).stderr(Stdio::piped()));
        let mut out = BufReader::new(client.stdout.take().unwrap());
        let mut flushed = String::new();
        for _ in 0..40 {
            assert_ne!(out.read_line(&mut flushed).unwrap(), 0, "the client ended: {flushed}");
        }
        server.signal(signal);
        while out.read_line(&mut flushed).unwrap() != 0 {}
        client.wait().unwrap();
        let (status, stopped) = server.wait();
        assert_eq!(status.code(), Some(0), "{}", stopped.raw_log.join("\n"));

        let numbers: Vec<u64> = flushed.lines().filter_map(|l| l.parse().ok()).collect();
        assert!(numbers.len() >= 40);
        let image = std::fs::File::open(stopped.image()).unwrap();
        for n in numbers {
            let mut block = [0; 4096];
            image.read_exact_at(&mut block, n * 4096).unwrap();
            assert!(block.chunks(8).all(|c| c == n.to_be_bytes()), "block {n} was flushed and is lost");
        }
        run("qemu-io", &["-f", "raw", "-c", "write 0 4k", stopped.image().to_str().unwrap()]).ok();
    }
}

#[test]
fn idle_and_negotiating_clients_hold_up_no_stop() {
    for setup in [UNIX_1_IO_URING, TCP_1_THREADS] {
        let server = Server::plain(setup);
        let mut idle = Conn::ready(&server.uri);
        let mut negotiating = Conn::new(&server.uri);
        negotiating.greet();
        let mut half = Conn::ready(&server.uri);
        half.send(&request(READ, 1, 0, 512)[..10]);
        let stopped = server.stop();
        assert_eq!(idle.receive_to_end(), b"");
        assert_eq!(half.receive_to_end(), b"");
        negotiating.receive_to_end();
        assert!(!stopped.messages("iothread totals").is_empty(), "{}", stopped.raw_log.join("\n"));
    }
}

/// A client whose reply has begun and cannot be finished: one read of 64 MiB, more than the socket buffers of both sides
/// hold (tcp_wmem and tcp_rmem end at 4 MiB and 32 MiB), of which it takes the header only.
fn stalled_client(server: &Server) -> Conn {
    let mut conn = Conn::ready(&server.uri);
    conn.send(&request(READ, 1, 0, 64 << 20));
    assert_eq!(conn.receive_simple(), (0, 1));
    conn
}

/// A client that asks and does not listen keeps a stop waiting for its deadline: a second signal does not.
#[test]
fn a_second_signal_ends_at_once() {
    let config = "[server]\nshutdown_timeout = \"1h\"\n[[export]]\nimage = \"disk.raw\"\n";
    let server = Builder::new(UNIX_3_THREADS).image_len(64 << 20).config(config).start();
    let _greedy = stalled_client(&server);
    let (base, _) = server.uri.split_once("?").unwrap();
    assert!(base.starts_with("nbd+unix://"));
    let socket = server.path("nbd.sock");
    server.signal(Signal::TERM);
    wait_until("it stops listening", || std::os::unix::net::UnixStream::connect(&socket).is_err());
    server.signal(Signal::TERM);
    let (status, stopped) = server.wait();
    assert_eq!(status.code(), Some(4), "{}", stopped.raw_log.join("\n"));
}

#[test]
fn a_deadline_cuts_who_does_not_listen() {
    let config = "[server]\nshutdown_timeout = \"200ms\"\n[[export]]\nimage = \"disk.raw\"\n";
    let server = Builder::new(TCP_3_IO_URING).image_len(64 << 20).config(config).start();
    let _greedy = stalled_client(&server);
    server.signal(Signal::TERM);
    let (status, stopped) = server.wait();
    // Somebody was cut: that is said, in the log and by the code that a second signal also gives.
    assert_eq!(status.code(), Some(4), "{}", stopped.raw_log.join("\n"));
}

#[test]
fn the_socket_file_comes_and_goes() {
    let builder = Builder::new(UNIX_3_THREADS).image_len(4096);
    let socket = builder.path("nbd.sock");
    // Stale: a server died here.
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    assert!(socket.exists());
    let server = builder.start();
    assert_eq!(run("nbdinfo", &["--size", &server.uri]).ok().trim(), "4096");

    // Alive: a second server refuses, and leaves the socket alone.
    let second = Builder::new(TCP_1_THREADS).image_len(4096);
    let (status, said) = second.args(&["--socket", socket.to_str().unwrap()]).start_refused();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("nbd.sock"), "{said}");
    assert_eq!(run("nbdinfo", &["--size", &server.uri]).ok().trim(), "4096");

    let stopped = server.stop();
    assert!(!stopped.dir.path().join("nbd.sock").exists(), "the socket is removed at the end");
}

#[test]
fn a_file_that_is_no_socket_is_not_removed() {
    let builder = Builder::new(UNIX_3_THREADS).image_len(4096);
    std::fs::write(builder.path("nbd.sock"), "precious").unwrap();
    let (status, said) = builder.start_refused();
    assert_eq!(status.code(), Some(1), "{said}");
    assert_eq!(std::fs::read_to_string(builder.path("nbd.sock")).unwrap(), "precious");
}

#[test]
fn a_copy_in_progress_ends_with_an_error_and_not_with_silence() {
    let server = Builder::new(TCP_1_THREADS).image_data(&noise(64 << 20, 47)).start();
    let target = server.path("copy.raw");
    let mut command = crate::tools::tool("qemu-img");
    command.args(["convert", "-f", "raw", "-O", "raw", "-r", "8M", &server.uri, target.to_str().unwrap()]);
    let mut child = spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    wait_until("the copy has begun", || target.exists() && allocated(&target) > 0);
    server.stop();
    let said = finish(&mut child, "qemu-img convert").failed();
    assert!(said.contains("error while reading"), "{said}");
}
