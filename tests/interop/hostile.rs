//! Clients that die, stall, talk nonsense or come in crowds: nobody else notices, and nothing leaks.

use crate::harness::{
    Builder, Server, TCP_1_THREADS, TCP_3_IO_URING, Transport, UNIX_1_IO_URING, UNIX_3_THREADS, noise,
    wait_until,
};
use crate::tools::{python_command, run, spawn, tool};
use crate::wire::{Conn, DISC, READ, WRITE, go, option, request};
use std::io::{BufRead, BufReader, Read, Write};
use std::process::Stdio;

const MIB: usize = 1 << 20;

/// Asserts that the server serves.
#[track_caller]
fn assert_serves(server: &Server) {
    let out =
        run("qemu-io", &["-f", "raw", "-c", "write -P 9 40M 64k", "-c", "read -P 9 40M 64k", &server.uri])
            .ok();
    assert!(!out.contains("failed"), "{out}");
}

#[test]
fn killed_clients_leave_nothing_behind() {
    for setup in [UNIX_3_THREADS, TCP_3_IO_URING] {
        let server = Server::plain(setup);
        assert_serves(&server);
        let baseline = server.fd_count();
        for round in 0..3 {
            let mut clients: Vec<_> = ["write", "read", "write", "read"]
                .iter()
                .map(|how| {
                    let mut command = python_command(include_str!("holding_clients.py"));
                    let mut child = spawn(command.args([server.uri.as_str(), how]).stdout(Stdio::piped()));
                    let mut line = String::new();
                    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
                    assert_eq!(line, "ready\n", "round {round}");
                    child
                })
                .collect();
            // A fio and a copy are killed as well, wherever they are.
            let fio = [
                "--name=x",
                "--ioengine=nbd",
                "--rw=randrw",
                "--bs=128k",
                "--size=16M",
                "--time_based",
                "--runtime=60",
            ];
            clients.push(spawn(
                tool("fio")
                    .current_dir(server.dir.path())
                    .args(fio)
                    .arg(format!("--uri={}", server.uri))
                    .stdout(Stdio::null()),
            ));
            assert_serves(&server);
            for client in &mut clients {
                client.kill().unwrap();
                client.wait().unwrap();
            }
            assert_serves(&server);
            server.wait_for_fds(baseline);
        }
        server.stop();
    }
}

#[test]
fn half_requests_change_nothing() {
    for setup in [UNIX_1_IO_URING, TCP_1_THREADS] {
        let data = noise(MIB, 13);
        let server = Builder::new(setup).image_data(&data).start();
        drop(Conn::ready(&server.uri));
        let mut witness = Conn::ready(&server.uri);
        let baseline = server.fd_count();
        for len in [1, 4, 10, 27] {
            let mut conn = Conn::ready(&server.uri);
            conn.send(&request(WRITE, 1, 0, 4096)[..len]);
            drop(conn);
        }
        for sent in [0, 1, 100, 4095] {
            let mut conn = Conn::ready(&server.uri);
            conn.send(&request(WRITE, 1, 0, 4096));
            conn.send(&vec![0xee; sent]);
            drop(conn);
        }
        // A whole request before a half one is still carried out.
        let mut conn = Conn::ready(&server.uri);
        conn.send(&request(WRITE, 1, 8192, 512));
        conn.send(&[0xdd; 512]);
        conn.send(&request(WRITE, 2, 0, 4096));
        conn.send(&[0xee; 4000]);
        assert_eq!(conn.receive_simple(), (0, 1));
        drop(conn);
        server.wait_for_fds(baseline);

        witness.send(&request(READ, 7, 0, 8704));
        assert_eq!(witness.receive_simple(), (0, 7));
        let back = witness.receive(8704);
        assert!(back[..8192] == data[..8192]);
        assert!(back[8192..].iter().all(|&b| b == 0xdd));
        server.stop();
    }
}

#[test]
fn garbage_ends_only_the_connection_that_sent_it() {
    for setup in [UNIX_3_THREADS, TCP_3_IO_URING] {
        let server = Server::plain(setup);
        let mut witness = Conn::ready(&server.uri);
        let baseline = server.fd_count();
        let junk = noise(100_000, 17);
        let greetings: [&[u8]; 4] =
            [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", &junk, &[0xff; 64]];
        for bytes in greetings {
            let mut conn = Conn::new(&server.uri);
            conn.receive(18);
            // It may close while we still send.
            let _closed_early = conn.write_all(bytes);
            conn.receive_to_end();
        }
        // Nonsense instead of an option's magic, and an option that claims to be 4 GiB long.
        let mut huge = option(7, &[]);
        huge[12..].copy_from_slice(&u32::MAX.to_be_bytes());
        for bytes in [&junk[..64], &huge] {
            let mut conn = Conn::new(&server.uri);
            conn.greet();
            let _closed_early = conn.write_all(bytes);
            let _closed_early = conn.write_all(&junk);
            if bytes.len() == 64 {
                conn.receive_to_end();
            }
        }
        // Nonsense in the transmission phase.
        for bytes in [junk.as_slice(), &[0; 28], b"IHAVEOPT"] {
            let mut conn = Conn::ready(&server.uri);
            let _closed_early = conn.write_all(bytes);
            if bytes.len() >= 28 {
                conn.receive_to_end();
            }
        }
        // A write that claims to be 4 GiB long.
        let mut conn = Conn::ready(&server.uri);
        let _closed_early = conn.write_all(&request(WRITE, 1, 0, u32::MAX));
        drop(conn);
        server.wait_for_fds(baseline);
        witness.send(&request(READ, 3, 0, 512));
        assert_eq!(witness.receive_simple(), (0, 3));
        assert_serves(&server);
        assert!(server.status_kib("VmHWM") < 200 << 10);
        drop(witness);
        server.stop();
    }
}

#[test]
fn a_handshake_one_byte_at_a_time() {
    for setup in [UNIX_1_IO_URING, TCP_3_IO_URING] {
        let server = Builder::new(setup).image_data(&noise(MIB, 19)).start();
        let mut conn = Conn::new(&server.uri);
        let mut slowly = |bytes: &[u8]| bytes.iter().for_each(|b| conn.send(&[*b]));
        slowly(&3u32.to_be_bytes());
        slowly(&option(99, b"unknown"));
        slowly(&option(7, &go("")));
        slowly(&request(READ, 42, 10, 20));
        slowly(&request(DISC, 43, 0, 0));
        let all = conn.receive_to_end();
        let mut expected = noise(MIB, 19)[10..30].to_vec();
        // The last reply is the read's; before it are the greeting and the options' replies.
        let mut reply = [0x6744_6698_u32.to_be_bytes().as_slice(), &[0; 4], &42u64.to_be_bytes()].concat();
        reply.append(&mut expected);
        assert!(all.starts_with(b"NBDMAGICIHAVEOPT"));
        assert!(all.ends_with(&reply), "{all:?}");
        server.stop();
    }
}

#[test]
fn a_silent_handshake_times_out_and_an_idle_client_does_not() {
    for setup in [UNIX_3_THREADS, TCP_1_THREADS] {
        let config = "[limits]\nhandshake_timeout = \"300ms\"\n[[export]]\nimage = \"disk.raw\"\n";
        let server = Builder::new(setup).image_len(MIB as u64).config(config).start();
        let mut idle = Conn::ready(&server.uri);
        let mut silent = Conn::new(&server.uri);
        let mut slow = Conn::new(&server.uri);
        slow.greet();
        slow.send(&option(7, &go(""))[..9]);
        assert_eq!(silent.receive_to_end().len(), 18);
        slow.receive_to_end();
        idle.send(&request(READ, 5, 0, 1));
        assert_eq!(idle.receive_simple(), (0, 5));
        server.stop();
    }
}

/// Lets this process, and the daemons that it starts, have many descriptors.
fn raise_fd_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    assert!(
        limit.maximum.is_none_or(|max| max >= 4096),
        "the hard limit of descriptors is below 4096: raise it"
    );
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).unwrap();
}

#[test]
fn a_thousand_connections() {
    const CLIENTS: usize = 1000;
    raise_fd_limit();
    for setup in [UNIX_3_THREADS, TCP_3_IO_URING] {
        let data = noise(MIB, 23);
        let server = Builder::new(setup).image_data(&data).start();
        drop(Conn::ready(&server.uri));
        let baseline = server.fd_count();
        let before = server.status_kib("VmRSS");
        let mut clients: Vec<Conn> = (0..CLIENTS).map(|_| Conn::ready(&server.uri)).collect();
        let idle = server.status_kib("VmRSS") - before.min(server.status_kib("VmRSS"));
        // An idle client costs kilobytes: 64 KiB each is far above what it should be.
        assert!(idle < 64 * CLIENTS as u64, "{idle} KiB for {CLIENTS} idle clients");
        assert!(server.fd_count() >= CLIENTS);
        // All ask, then all listen.
        for (i, client) in clients.iter_mut().enumerate() {
            client.send(&request(READ, i as u64, (i * 1024) as u64, 1024));
        }
        for (i, client) in clients.iter_mut().enumerate() {
            assert_eq!(client.receive_simple(), (0, i as u64));
            assert!(client.receive(1024) == data[i * 1024..][..1024]);
        }
        // Half of them say goodbye.
        for client in clients.iter_mut().step_by(2) {
            client.send(&request(DISC, 0, 0, 0));
        }
        clients.clear();
        server.wait_for_fds(baseline);
        assert_eq!(run("nbdinfo", &["--size", &server.uri]).ok().trim(), "1048576");
        let stopped = server.stop();
        if setup.transport == Transport::Tcp {
            assert!(!stopped.messages("iothread totals").is_empty());
        }
    }
}

#[test]
fn replies_that_nobody_takes_hold_up_nobody_else() {
    const REQUESTS: usize = 256;
    for setup in [UNIX_1_IO_URING, TCP_3_IO_URING] {
        let config = "[limits]\nbytes_per_connection = \"64M\"\n[[export]]\nimage = \"disk.raw\"\n";
        let data = noise(4 * MIB, 29);
        let server = Builder::new(setup).image_data(&data).config(config).start();
        // What is made once, at the first connection, is no leak.
        drop(Conn::ready(&server.uri));
        let baseline = server.fd_count();
        let mut greedy = Conn::ready(&server.uri);
        for i in 0..REQUESTS {
            greedy.send(&request(READ, i as u64, (i % 4 * MIB) as u64, MIB as u32));
        }
        // Somebody else has all the server for himself.
        let out = run(
            "qemu-io",
            &["-f", "raw", "-c", "write -P 5 0 64k", "-c", "read -P 5 0 64k", "-c", "flush", &server.uri],
        );
        assert!(!out.ok().contains("failed"));
        let peak = server.status_kib("VmHWM");
        assert!(peak < 160 << 10, "{peak} KiB for {REQUESTS} MiB of replies with 64 MiB allowed");

        // When the client listens at last, it gets every reply.
        let mut seen = vec![false; REQUESTS];
        for _ in 0..REQUESTS {
            let (errno, cookie) = greedy.receive_simple();
            assert_eq!(errno, 0);
            let i = usize::try_from(cookie).unwrap();
            assert!(!std::mem::replace(&mut seen[i], true), "twice: {i}");
            let reply = greedy.receive(MIB);
            let skip = if i % 4 == 0 { 65536 } else { 0 };
            assert!(reply[skip..] == data[i % 4 * MIB..][skip..MIB], "reply {i}");
        }
        // And one who never listens can go.
        let mut gone = Conn::ready(&server.uri);
        for i in 0..REQUESTS {
            gone.send(&request(READ, i as u64, 0, MIB as u32));
        }
        drop(gone);
        drop(greedy);
        server.wait_for_fds(baseline);
        server.stop();
    }
}

#[test]
fn no_memory_for_a_request_is_an_answer_and_not_the_end() {
    use rustix::process::{Resource, Rlimit, prlimit};
    const LEN: u32 = 64 << 20;
    for setup in [UNIX_1_IO_URING, TCP_1_THREADS] {
        let server = Builder::new(setup).image_len(u64::from(LEN)).start();
        let mut conn = Conn::ready(&server.uri);
        // Threads and pools that come with the first requests are there.
        conn.send(&request(READ, 1, 0, 1 << 20));
        assert_eq!(conn.receive_simple(), (0, 1));
        conn.receive(1 << 20);
        // A thread that is still starting has more address space for a moment: the least of some looks.
        let size = (0..20).map(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            server.status_kib("VmSize")
        });
        let bytes = (size.min().unwrap() << 10) + (32 << 20);
        let limit = |current| Rlimit { current, maximum: None };
        prlimit(Some(server.pid()), Resource::As, limit(Some(bytes))).unwrap();
        let enomem = 12;
        conn.send(&request(READ, 2, 0, LEN));
        assert_eq!(conn.receive_simple(), (enomem, 2));
        conn.send(&request(WRITE, 3, 0, LEN));
        conn.send(&vec![7; LEN as usize]);
        assert_eq!(conn.receive_simple(), (enomem, 3));
        // What fits is served on the same connection, and nothing of the refused write was done.
        conn.send(&request(READ, 4, 0, 4096));
        assert_eq!(conn.receive_simple(), (0, 4));
        assert!(conn.receive(4096).iter().all(|b| *b == 0));
        prlimit(Some(server.pid()), Resource::As, limit(None)).unwrap();
        conn.send(&request(READ, 5, 0, LEN));
        assert_eq!(conn.receive_simple(), (0, 5));
        conn.receive(LEN as usize);
        server.stop();
    }
}

#[test]
fn a_client_that_closes_its_sending_half_gets_its_replies() {
    let server = Builder::new(TCP_1_THREADS).image_data(&noise(MIB, 31)).start();
    let mut conn = Conn::ready(&server.uri);
    for i in 0..16 {
        conn.send(&request(READ, i, i * 65536, 65536));
    }
    let Conn::Tcp(socket) = &conn else { unreachable!("the set-up says TCP") };
    socket.shutdown(std::net::Shutdown::Write).unwrap();
    let mut all = Vec::new();
    conn.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), 16 * (16 + 65536));
    server.stop();
}

#[test]
fn connections_beyond_the_limit_are_closed_and_later_ones_served() {
    let config = "[limits]\nmax_connections = 3\n[[export]]\nimage = \"disk.raw\"\n";
    let server = Builder::new(UNIX_3_THREADS).image_len(MIB as u64).config(config).start();
    let mut kept: Vec<Conn> = (0..3).map(|_| Conn::ready(&server.uri)).collect();
    assert_eq!(Conn::new(&server.uri).receive_to_end().len(), 0);
    kept.pop();
    wait_until("a place is free again", || {
        let mut conn = Conn::new(&server.uri);
        conn.read_exact(&mut [0; 18]).is_ok()
    });
    server.stop();
}
