//! How clients reach the server, and how many: passed sockets, stdin and stdout, vsock, limits, timeouts, the end after
//! the last client.

use crate::cli_harness::{Ended, PATIENCE, Serving, conbd, conbd_command, image, run, text};
use crate::nbd_common::{Raw, TestServer, faulty, memory};
use conbd::block::{FaultAction, FaultOps, FaultRule};
use conbd::nbd::export::{Export, ExportOptions, ExportTable};
use conbd::nbd::proto::*;
use conbd::nbd::server::{EndWhen, ListenAddr, WhenFull};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Starts a program with sockets at descriptors 3, 4, ... as systemd does. Its first argument is a Python list of pairs
/// (kind, address).
const LAUNCHER: &str = r#"
import os, socket, sys
made = []
for kind, address in eval(sys.argv[1]):
    if kind == "unix":
        s = socket.socket(socket.AF_UNIX); s.bind(address); s.listen(5)
    elif kind == "tcp":
        s = socket.socket(); s.bind(address); s.listen(5)
    elif kind == "tcp6":
        s = socket.socket(socket.AF_INET6); s.bind(address); s.listen(5)
    elif kind == "datagram":
        s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    elif kind == "connected":
        s = socket.socket(socket.AF_UNIX); s.connect(address)
    elif kind == "file":
        s = open(address)
    made.append(s)
fds = [os.dup(s.fileno()) for s in made]
fds = [__import__("fcntl").fcntl(fd, 0, 40) for fd in fds]
for i, fd in enumerate(fds):
    os.dup2(fd, 3 + i); os.close(fd)
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ.setdefault("LISTEN_FDS", str(len(fds)))
os.execv(sys.argv[2], sys.argv[2:])
"#;

/// `conbd serve ARGS`, started with sockets.
fn launched(sockets: &str, args: &[&str]) -> Command {
    let mut command = Command::new("python3");
    command.args(["-c", LAUNCHER, sockets, env!("CARGO_BIN_EXE_conbd"), "serve"]).args(args);
    command.env_remove("CONBD_LOG").env_remove("LISTEN_FDS").stdin(Stdio::null());
    command
}

fn inspect_works(uri: &str) {
    let ended = conbd(&["inspect", uri]);
    assert_eq!(ended.code, Some(0), "{uri}: {ended:?}");
}

#[test]
fn every_kind_of_passed_socket_is_served_and_left_to_its_owner() {
    let (dir, disk) = image(1 << 20);
    let socket = dir.path().join("passed.sock");
    let sockets =
        format!("[('unix', '{}'), ('tcp', ('127.0.0.1', 0)), ('tcp6', ('::1', 0))]", socket.display());
    let mut command = launched(&sockets, &[text(&disk)]);
    command.env("LISTEN_FDNAMES", "one:two:three");
    let serving = Serving::start_command(command, 3);
    assert!(serving.uris[0].starts_with("nbd+unix:///?socket="), "{:?}", serving.uris);
    assert!(serving.uris[1].starts_with("nbd://127.0.0.1:"), "{:?}", serving.uris);
    assert!(serving.uris[2].starts_with("nbd://[::1]:"), "{:?}", serving.uris);
    serving.uris.iter().for_each(|uri| inspect_works(uri));
    serving.wait_for_log("\"three\"");
    let (code, log) = serving.stop();
    assert_eq!(code, Some(0), "{log}");
    assert!(socket.exists(), "who has bound the socket may want to use it again");
}

#[test]
fn passed_sockets_come_instead_of_the_default_and_beside_what_was_asked_for() {
    let (dir, disk) = image(1 << 20);
    let passed = dir.path().join("passed.sock");
    let own = dir.path().join("own.sock");
    let sockets = format!("[('unix', '{}')]", passed.display());
    let serving = Serving::start_command(launched(&sockets, &[text(&disk), "--socket", text(&own)]), 2);
    serving.uris.iter().for_each(|uri| inspect_works(uri));
    assert!(serving.uris.iter().all(|uri| uri.starts_with("nbd+unix:")), "{:?}", serving.uris);
    serving.stop();
}

#[test]
fn a_passed_connection_is_served_and_its_end_is_the_servers() {
    let (dir, disk) = image(1 << 20);
    let path = dir.path().join("accept.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let sockets = format!("[('connected', '{}')]", path.display());
    let serving = Serving::start_command(launched(&sockets, &[text(&disk)]), 0);
    let mut client = Raw::unix(listener.accept().unwrap().0);
    client.greet(3);
    client.go("");
    assert_eq!(client.read(0, 512), Ok(vec![0; 512]));
    client.disc();
    let (code, log) = serving.wait();
    assert_eq!(code, Some(0), "{log}");
}

#[test]
fn wrong_passed_sockets_are_told_what_is_wrong() {
    let (dir, disk) = image(1 << 20);
    let check = |sockets: &str, fds: Option<&str>, words: &[&str]| {
        let mut command = launched(sockets, &[text(&disk)]);
        if let Some(fds) = fds {
            command.env("LISTEN_FDS", fds);
        }
        let ended = run(command);
        assert_eq!(ended.code, Some(1), "{ended:?}");
        for word in words {
            assert!(ended.error_line().contains(word), "{}\nshould say {word}", ended.stderr);
        }
    };
    check("[('datagram', '')]", None, &["descriptor 3", "no stream socket", "ListenStream="]);
    check(&format!("[('file', '{}')]", disk.display()), None, &["descriptor 3", "no socket"]);
    let one = format!("[('unix', '{}')]", dir.path().join("x").display());
    check(&one, Some("7"), &["LISTEN_FDS=7", "descriptor 4 cannot be used"]);
    std::fs::remove_file(dir.path().join("x")).unwrap();
    check(&one, Some("many"), &["LISTEN_FDS=many is no number"]);
}

#[test]
fn variables_for_another_process_are_ignored_and_ours_are_unset() {
    let (dir, disk) = image(1 << 20);
    let mut command = conbd_command(&["serve", text(&disk), "--socket", text(&dir.path().join("s"))]);
    command.env("LISTEN_PID", "1").env("LISTEN_FDS", "3");
    let serving = Serving::start_command(command, 1);
    inspect_works(serving.uri());
    serving.stop();

    let sockets = format!("[('unix', '{}')]", dir.path().join("p").display());
    let ended = run(launched(&sockets, &[text(&disk), "--run", "env; exit 9"]));
    assert_eq!(ended.code, Some(9), "{ended:?}");
    assert!(ended.stdout.contains("\nuri=nbd+unix:///?socket="), "{}", ended.stdout);
    assert!(!ended.stdout.contains("LISTEN_"), "{}", ended.stdout);
}

#[test]
fn stdio_serves_one_client_over_a_socket_and_ends_with_it() {
    let (_dir, disk) = image(1 << 20);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let fd = || Stdio::from(OwnedFd::from(theirs.try_clone().unwrap()));
    // As inetd does it: the same socket three times; what is logged must not get into the stream.
    let mut command = conbd_command(&["serve", "--stdio", text(&disk), "--log-level", "trace"]);
    let mut child = command.stdin(fd()).stdout(fd()).stderr(fd()).spawn().unwrap();
    drop((theirs, command));
    let mut client = Raw::unix(ours);
    client.greet(3);
    client.go("");
    assert_eq!(client.write(0, 4096, &[7; 512]), 0);
    assert_eq!(client.read(4096, 512), Ok(vec![7; 512]));
    client.disc();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn stdio_serves_one_client_over_two_pipes() {
    let (_dir, disk) = image(1 << 20);
    let mut child = conbd_command(&["serve", "--stdio", text(&disk)])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut to = child.stdin.take().unwrap();
    let mut from = child.stdout.take().unwrap();
    let mut greeting = [0; 18];
    from.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting[..8], b"NBDMAGIC");
    to.write_all(&3u32.to_be_bytes()).unwrap();
    let mut option = Vec::new();
    conbd::nbd::wire::put_option(&mut option, NBD_OPT_EXPORT_NAME, b"");
    to.write_all(&option).unwrap();
    let mut reply = [0; 10];
    from.read_exact(&mut reply).unwrap();
    assert_eq!(u64::from_be_bytes(*reply.first_chunk().unwrap()), 1 << 20);
    // The end of stdin is the end of the client; the end of stdout follows.
    drop(to);
    let mut rest = Vec::new();
    from.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(0), "{}", String::from_utf8_lossy(&ended.stderr));
}

#[test]
fn stdio_that_is_neither_says_what_it_must_be() {
    let (_dir, disk) = image(1 << 20);
    let ended = conbd(&["serve", "--stdio", text(&disk)]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.error_line().contains("neither a socket nor a pipe"), "{ended:?}");
}

#[test]
fn vsock_is_bound_or_the_system_says_why_not() {
    let (_dir, disk) = image(1 << 20);
    let kernel_has_it =
        socket2::Socket::new(socket2::Domain::VSOCK, socket2::Type::STREAM, None).and_then(|s| {
            s.bind(&socket2::SockAddr::vsock(u32::MAX, u32::MAX))?;
            s.listen(1)
        });
    if let Err(why) = kernel_has_it {
        let ended = conbd(&["serve", text(&disk), "--listen", "vsock:4294967295"]);
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(ended.error_line().contains("vsock"), "{why}: {ended:?}");
        return;
    }
    // Port -1 takes a free one.
    let serving = Serving::start(&[text(&disk), "--listen", "vsock:4294967295"], 1);
    assert!(serving.uri().starts_with("nbd+vsock://2:"), "{}", serving.uri());
    assert!(!serving.uri().contains("4294967295"), "the port really bound: {}", serving.uri());
    // Only with vsock_loopback can we be our own client.
    let loopback = socket2::Socket::new(socket2::Domain::VSOCK, socket2::Type::STREAM, None)
        .and_then(|s| s.bind(&socket2::SockAddr::vsock(1, u32::MAX)));
    if loopback.is_ok() {
        inspect_works(&serving.uri().replace("//2:", "//1:"));
    } else {
        println!("no vsock_loopback in this kernel: vsock was bound, but no client connected");
    }
    let (code, log) = serving.stop();
    assert_eq!(code, Some(0), "{log}");
}

fn limited(name: &str, max: usize) -> std::sync::Arc<Export> {
    let backend = memory(name, 4096).backend().clone();
    let options =
        ExportOptions { name: name.to_owned(), max_connections: Some(max), ..ExportOptions::default() };
    Export::new(options, backend).unwrap()
}

#[test]
fn a_full_export_refuses_with_a_reason_and_the_session_goes_on() {
    let server = TestServer::unix(vec![limited("small", 1), memory("other", 4096)]);
    let first = server.go("small", true);
    let mut second = server.haggle();
    // Asking about it is no use of it.
    assert_eq!(second.info(NBD_OPT_INFO, "small", &[]).last().unwrap().0, NBD_REP_ACK);
    let replies = second.info(NBD_OPT_GO, "small", &[]);
    assert_eq!(replies.len(), 1, "nothing is told about an export that is refused");
    assert_eq!(replies[0].0, NBD_REP_ERR_POLICY);
    assert!(String::from_utf8_lossy(&replies[0].1).contains("as many connections as it may have"));
    // The older way has no error reply.
    let mut third = server.haggle();
    third.send_opt(NBD_OPT_EXPORT_NAME, b"small");
    third.expect_close();
    second.go("other");
    assert_eq!(second.read(0, 16), Ok(vec![0; 16]));
    first.disc();
    server
        .wait_for("the place is free", |s| s.exports().snapshot().find("small").unwrap().connections() == 0);
    server.go("small", false).disc();
}

#[test]
fn clients_beyond_the_limit_wait_for_one_that_leaves() {
    let server = TestServer::with(vec![memory("", 4096)], 2, |config| {
        config.max_connections = 1;
        config.when_full = WhenFull::Wait;
    });
    let first = server.go("", false);
    let (tell, told) = std::sync::mpsc::channel();
    let socket = server.socket();
    let waiting = std::thread::spawn(move || {
        // The kernel accepts it; the greeting comes when there is room.
        let mut second = Raw::unix(UnixStream::connect(socket).unwrap());
        tell.send(()).unwrap();
        second.greet(3);
        second.go("");
        second.read(0, 16)
    });
    told.recv().unwrap();
    assert_eq!(server.server.connections(), 1);
    first.disc();
    assert_eq!(waiting.join().unwrap(), Ok(vec![0; 16]));
}

#[test]
fn the_end_comes_with_the_last_client_that_chose_an_export() {
    let server = TestServer::with(vec![memory("", 4096)], 2, |config| {
        config.end_when = EndWhen::LastClientLeaves;
    });
    // Neither a port probe nor a list is a client.
    drop(server.connect());
    let mut lister = server.haggle();
    lister.opt(NBD_OPT_LIST, b"");
    assert_eq!(lister.opt(NBD_OPT_ABORT, b"").last().unwrap().0, NBD_REP_ACK);
    lister.expect_close();
    let (one, two) = (server.go("", false), server.go("", true));
    one.disc();
    server.wait_for("the first has left", |s| s.connections() == 1);
    assert!(!server.server.is_finished());
    two.disc();
    server.wait_for("the last has left", conbd::nbd::server::Server::is_finished);
}

#[test]
fn idle_clients_are_dropped_and_busy_ones_are_not() {
    let (export, fault) = faulty("", 1 << 20);
    let server = TestServer::with(vec![export], 1, |config| {
        config.idle_timeout = Duration::from_millis(50);
    });
    fault.add_rule(FaultRule::new(FaultOps::READ, FaultAction::Hold));
    let mut busy = server.go("", false);
    busy.send_req(NBD_CMD_READ, 0, 1, 0, 512);
    assert!(fault.wait_held(1, PATIENCE));
    let mut idle = server.go("", false);
    idle.expect_close();
    // The idle one came later and is gone: the busy one has waited longer than the timeout by now.
    fault.clear_rules();
    fault.release_all();
    assert_eq!(Raw::error_of(&[busy.recv_reply()]), 0);
    busy.recv(512);
    busy.expect_close();
}

#[test]
fn several_listeners_of_every_family_serve_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let unix = dir.path().join("nbd.sock");
    let table = ExportTable::new(vec![memory("", 4096)], None).unwrap();
    let config = conbd::nbd::server::ServerConfig {
        listen: vec![
            ListenAddr::Unix(unix.clone()),
            ListenAddr::Unix(dir.path().join("two.sock")),
            ListenAddr::Tcp("127.0.0.1:0".parse().unwrap()),
            ListenAddr::Tcp("[::1]:0".parse().unwrap()),
        ],
        ..conbd::nbd::server::ServerConfig::default()
    };
    let server = TestServer::start(config, table, 2, dir).map_err(|e| e.to_string()).unwrap();
    let mut clients: Vec<Raw> = server
        .server
        .bound_addrs()
        .iter()
        .map(|addr| match addr {
            ListenAddr::Unix(path) => Raw::unix(UnixStream::connect(path).unwrap()),
            ListenAddr::Tcp(addr) => Raw::tcp(TcpStream::connect(addr).unwrap()),
            ListenAddr::Vsock { .. } => unreachable!("not asked for"),
        })
        .collect();
    assert_eq!(clients.len(), 4);
    for client in &mut clients {
        client.greet(3);
        client.go("");
        assert_eq!(client.read(0, 16), Ok(vec![0; 16]));
    }
}

/// The datagrams that a supervisor got.
fn notified(socket: &UnixDatagram) -> String {
    let mut buf = [0; 256];
    let n = socket.recv(&mut buf).unwrap();
    String::from_utf8_lossy(&buf[..n]).into_owned()
}

#[test]
fn the_supervisor_is_told_and_the_pid_file_is_there_while_it_serves() {
    let (dir, disk) = image(1 << 20);
    let notify = dir.path().join("notify");
    let supervisor = UnixDatagram::bind(&notify).unwrap();
    supervisor.set_read_timeout(Some(PATIENCE)).unwrap();
    let pid_file = dir.path().join("conbd.pid");
    let mut command = conbd_command(&["serve", text(&disk), "--socket", text(&dir.path().join("s"))]);
    command.args(["--pid-file", text(&pid_file)]).env("NOTIFY_SOCKET", &notify);
    let serving = Serving::start_command(command, 1);
    assert_eq!(notified(&supervisor), "READY=1");
    let pid: i32 = std::fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap();
    assert!(Path::new(&format!("/proc/{pid}/exe")).read_link().unwrap().ends_with("conbd"));
    let (code, log) = serving.stop();
    assert_eq!(code, Some(0), "{log}");
    assert_eq!(notified(&supervisor), "STOPPING=1");
    assert!(!pid_file.exists());
}

#[test]
fn a_pid_file_that_cannot_be_written_stops_the_start() {
    let (dir, disk) = image(1 << 20);
    let socket = dir.path().join("s");
    let ended = conbd(&["serve", text(&disk), "--socket", text(&socket), "--pid-file", "/nosuch/pid"]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("/nosuch/pid") && ended.stderr.contains("--pid-file"), "{ended:?}");
    assert!(!socket.exists());
}

#[test]
fn the_command_of_run_gets_the_uri_and_gives_the_exit_code() {
    let (dir, disk) = image(1 << 20);
    let socket = dir.path().join("s");
    let program = env!("CARGO_BIN_EXE_conbd");
    let command = format!("{program} inspect --json \"$uri\" && exit 42");
    let Ended { code, stdout, .. } =
        conbd(&["serve", text(&disk), "--socket", text(&socket), "--run", &command]);
    assert_eq!(code, Some(42), "{stdout}");
    assert!(stdout.contains("\"size\": 1048576"), "{stdout}");
    assert!(!socket.exists());
}

#[test]
fn exit_after_last_ends_the_daemon_cleanly() {
    let (dir, disk) = image(1 << 20);
    let socket = dir.path().join("s");
    let serving = Serving::start(&[text(&disk), "--socket", text(&socket), "--exit-after-last"], 1);
    // `inspect` asks, and chooses nothing.
    inspect_works(serving.uri());
    let mut client = Raw::unix(UnixStream::connect(&socket).unwrap());
    client.greet(3);
    client.go("");
    client.disc();
    let (code, log) = serving.wait();
    assert_eq!(code, Some(0), "{log}");
    assert!(!socket.exists());
}
