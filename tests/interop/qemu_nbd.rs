//! conbd under the name `qemu-nbd`: what scripts and test suites rely on, beside the real qemu-nbd where both can be asked.

use crate::harness::{PATIENCE, noise, wait_until};
use crate::tools::{python, run, tool};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Instant;

/// A folder with an image, and our binary under the name `qemu-nbd`.
struct Place {
    dir: tempfile::TempDir,
}

/// A server that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    /// Waits for its end: exit code and stderr.
    fn end(mut self) -> (Option<i32>, String) {
        let begin = Instant::now();
        let status = loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                break status;
            }
            assert!(begin.elapsed() < PATIENCE, "it does not end");
            std::thread::sleep(std::time::Duration::from_millis(5));
        };
        let mut text = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        (status.code(), text)
    }
}

impl Place {
    fn new(len: u64) -> Place {
        let dir = tempfile::Builder::new().prefix("conbd-qemu-nbd-").tempdir().unwrap();
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_conbd"), dir.path().join("qemu-nbd")).unwrap();
        std::fs::File::create(dir.path().join("disk.raw")).unwrap().set_len(len).unwrap();
        Place { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn ours(&self) -> Command {
        let mut command = Command::new(self.path("qemu-nbd"));
        command.env_remove("CONBD_LOG").current_dir(self.dir.path()).stdin(Stdio::null());
        command
    }

    fn real(&self) -> Command {
        let mut command = tool("qemu-nbd");
        command.current_dir(self.dir.path()).stdin(Stdio::null());
        command
    }

    /// Starts a server on `socket` and waits until it listens.
    fn start(&self, mut command: Command, socket: &str, args: &[&str]) -> Running {
        let path = self.text(socket);
        command.args(["-k", &path]).args(args).stdout(Stdio::null()).stderr(Stdio::piped());
        let child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let mut running = Running(child);
        wait_until("the server listens", || {
            if let Some(status) = running.0.try_wait().unwrap() {
                let mut text = String::new();
                running.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
                panic!("{command:?} ended with {status}: {text}");
            }
            UnixStream::connect(&path).is_ok()
        });
        running
    }

    fn uri(&self, socket: &str) -> String {
        format!("nbd+unix:///?socket={}", self.text(socket))
    }
}

fn output(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

/// Code, stdout and stderr, with the program's name made the same.
fn said(command: &mut Command, args: &[&str]) -> (Option<i32>, String, String) {
    let out = output(command.args(args));
    let program = command.get_program().to_str().unwrap().to_owned();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace(&program, "qemu-nbd");
    (out.status.code(), text(&out.stdout), text(&out.stderr))
}

/// The long names in a help text.
fn long_options(help: &str) -> Vec<String> {
    let mut names: Vec<String> = help
        .lines()
        .filter(|line| line.trim_start().starts_with('-'))
        .filter_map(|line| line.split("--").nth(1))
        .map(|rest| rest.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '-').collect())
        .collect();
    names.sort();
    names.dedup();
    names
}

#[test]
fn our_options_are_the_real_ones() {
    let place = Place::new(0);
    let (ours, real) = (said(&mut place.ours(), &["--help"]), said(&mut place.real(), &["--help"]));
    assert_eq!((ours.0, real.0), (Some(0), Some(0)));
    assert_eq!(long_options(&ours.1), long_options(&real.1));
    assert!(long_options(&real.1).len() > 30, "the real help was read");
    let version = said(&mut place.ours(), &["-V"]).1;
    assert!(version.starts_with("qemu-nbd 10."), "{version}");
}

#[test]
fn wrong_command_lines_fail_as_they_do_there() {
    let place = Place::new(1 << 20);
    let socket = place.text("s");
    let cases: &[&[&str]] = &[
        &[],
        &["a", "b"],
        &["--bogus", "disk.raw"],
        &["-Z"],
        &["--port"],
        &["-p"],
        &["--fork=3"],
        &["-k", "relative", "disk.raw"],
        &["-k", &socket, "nosuch.raw"],
        &["--cache=foo", "disk.raw"],
        &["-n", "--cache=none", "disk.raw"],
        &["--aio=foo", "disk.raw"],
        &["-k", &socket, "-f", "raw", "--aio=native", "disk.raw"],
        &["--discard=foo", "disk.raw"],
        &["--detect-zeroes=foo", "disk.raw"],
        &["--detect-zeroes=unmap", "disk.raw"],
        &["-o", "1x", "disk.raw"],
        &["-e", "-1", "disk.raw"],
        &["-L", "disk.raw"],
        &["-L", "-x", "foo"],
        &["-L", "--fork"],
        &["-L", "-k", "/nosuch/socket"],
        &["--tls-creds=x", "disk.raw"],
        &["--tls-authz=x", "disk.raw"],
        &["--tls-hostname=x", "disk.raw"],
        &["--selinux-label=x", "disk.raw"],
        &["--object", "foo", "disk.raw"],
        &["--handshake-limit=x", "disk.raw"],
        &["-f", "foo", "-k", &socket, "disk.raw"],
        &["--image-opts", "-f", "raw", "-k", &socket, "driver=raw,file.filename=disk.raw"],
        &["--image-opts", "-k", &socket, "driver=raw,bogus=1,file.driver=file,file.filename=disk.raw"],
        &["-k", &socket, "-f", "raw", "-B", "foo", "disk.raw"],
        &["-k", "/nosuch/socket", "-f", "raw", "disk.raw"],
        &["-k", &socket, "-f", "raw", "--pid-file=/nosuch/pid", "disk.raw"],
        &["-b", "192.0.2.1", "-f", "raw", "disk.raw"],
    ];
    for args in cases {
        let (ours, real) = (said(&mut place.ours(), args), said(&mut place.real(), args));
        assert_eq!(ours.0, Some(1), "{args:?}: {ours:?}");
        assert_eq!(ours, real, "{args:?}");
    }
}

#[test]
fn what_is_not_offered_says_so() {
    let place = Place::new(1 << 20);
    for (args, words) in [
        (&["-c", "/dev/nbd0", "disk.raw"][..], &["-c is not offered", "nbd-client"][..]),
        (&["-d", "/dev/nbd0"], &["-d is not offered", "nbd-client -d"]),
        (&["--object", "tls-creds-anon,id=a,endpoint=server", "disk.raw"], &["not offered"]),
        (&["nbd://localhost/"], &["only files and block devices"]),
    ] {
        let (code, out, err) = said(&mut place.ours(), args);
        assert_eq!((code, out.as_str()), (Some(1), ""), "{args:?}: {err}");
        for word in words {
            assert!(err.starts_with("qemu-nbd: ") && err.contains(word), "{args:?}: {err}");
        }
    }
}

/// What both programs print about the server on `socket`.
fn compare_lists(place: &Place, socket: &str) -> String {
    let args = ["-L", "-k", &place.text(socket)];
    let (ours, real) = (said(&mut place.ours(), &args), said(&mut place.real(), &args));
    assert_eq!(ours, real);
    assert_eq!(ours.0, Some(0), "{ours:?}");
    ours.1
}

/// A list without what extended headers add to it: whether they are offered is not this test's affair.
fn without_extended(list: &str) -> String {
    let mut out = String::new();
    for line in list.lines().filter(|line| !line.contains("transaction size")) {
        let words = line.strip_prefix("  flags: 0x").and_then(|rest| rest.split_once(' '));
        match words.and_then(|(bits, words)| Some((u32::from_str_radix(bits, 16).ok()?, words))) {
            Some((bits, words)) => {
                out.push_str(&format!(
                    "  flags: {:#x} {}",
                    bits & !0x1000,
                    words.replace(" block-status-payload", "")
                ));
            }
            None => out.push_str(line),
        }
        out.push('\n');
    }
    out
}

#[test]
fn lists_are_the_same_byte_for_byte() {
    let place = Place::new(1 << 20);
    // Every server: the real one, ours under its name, ours as itself, nbdkit.
    let variants: &[&[&str]] = &[
        &["-f", "raw", "disk.raw"],
        &["disk.raw"],
        &["-f", "raw", "-r", "-e", "0", "-x", "name", "-D", "some text", "disk.raw"],
        &["-f", "raw", "-A", "-o", "4096", "disk.raw"],
    ];
    for args in variants {
        let real = place.start(place.real(), "real", &[&["-t"], *args].concat());
        let of_real = compare_lists(&place, "real");
        drop(real);
        let ours = place.start(place.ours(), "ours", &[&["-t"], *args].concat());
        let of_ours = compare_lists(&place, "ours");
        drop(ours);
        // The servers look the same, too.
        assert_eq!(without_extended(&of_ours), without_extended(&of_real), "{args:?}");
    }
    let mut command = tool("nbdkit");
    command.args(["-f", "-U", &place.text("kit"), "memory", "1M"]).stderr(Stdio::null());
    let kit = Running(command.spawn().unwrap());
    wait_until("nbdkit listens", || UnixStream::connect(place.path("kit")).is_ok());
    assert!(compare_lists(&place, "kit").contains("transaction size: 32-bit"));
    drop(kit);
    let mut command = Command::new(env!("CARGO_BIN_EXE_conbd"));
    std::fs::write(place.path("c.toml"), "[[export]]\nname = \"a b\"\nimage = \"disk.raw\"\nread_only = true\n[[export]]\nname = \"z\"\nimage = \"disk.raw\"\ndescription = \"text\"\nread_only = true\n").unwrap();
    command.args(["serve", "--config", &place.text("c.toml"), "--socket", &place.text("own")]);
    let own = Running(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    wait_until("conbd listens", || UnixStream::connect(place.path("own")).is_ok());
    assert!(compare_lists(&place, "own").starts_with("exports available: 2\n export: 'a b'\n"));
    drop(own);
}

#[test]
fn odd_sizes_are_shown_in_sectors_and_keep_what_is_written() {
    for len in [1000u64, 3, 512, 0, 1537] {
        let mut seen = Vec::new();
        for side in ["real", "ours"] {
            let place = Place::new(0);
            let data = noise(len as usize, 7);
            std::fs::write(place.path("disk.raw"), &data).unwrap();
            let command = if side == "real" { place.real() } else { place.ours() };
            let server = place.start(command, "s", &["-t", "-f", "raw", "disk.raw"]);
            let list = without_extended(&compare_lists(&place, "s"));
            let map = match len {
                0 => String::new(),
                _ => run("qemu-img", &["map", "--output=json", "-f", "raw", &place.uri("s")]).ok(),
            };
            if len > 0 {
                let last = format!("write -P 9 {} 3", len.next_multiple_of(512) - 3);
                run("qemu-io", &["-f", "raw", "-c", &last, "-c", "flush", &place.uri("s")]).ok();
            }
            server.signal(Signal::TERM);
            assert_eq!(server.end().0, Some(0));
            seen.push((list, map, std::fs::read(place.path("disk.raw")).unwrap()));
        }
        assert!(seen[0] == seen[1], "{len}: {:?} {:?}", seen[0].0, seen[1].0);
    }
}

#[test]
fn a_server_ends_with_its_last_client_and_probes_are_no_clients() {
    let place = Place::new(1 << 20);
    let server = place.start(place.ours(), "s", &["-f", "raw", "disk.raw"]);
    // `start` has probed the port already; a list is no client either.
    compare_lists(&place, "s");
    assert!(place.path("s").exists());
    run("nbdinfo", &["--size", &place.uri("s")]).ok();
    let (code, err) = server.end();
    assert_eq!((code, err.as_str()), (Some(0), ""));
    assert!(!place.path("s").exists(), "the socket goes with the server");
}

#[test]
fn fork_returns_when_clients_can_connect_and_says_nothing() {
    let place = Place::new(1 << 20);
    let pid_file = place.text("pid");
    // Relative to where it was started, although it goes to /.
    let args = ["--fork", "-f", "raw", "-t", "-k", &place.text("s"), "--pid-file", &pid_file, "disk.raw"];
    assert_eq!(said(&mut place.ours(), &args), (Some(0), String::new(), String::new()));
    let pid: i32 = std::fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap();
    assert_eq!(std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap(), Path::new("/"));
    run("qemu-io", &["-f", "raw", "-c", "write -P 1 0 64k", &place.uri("s")]).ok();
    // The pid file is locked while it lives.
    let (code, _, err) = said(
        &mut place.ours(),
        &["--fork", "-f", "raw", "-t", "-k", &place.text("other"), "--pid-file", &pid_file, "disk.raw"],
    );
    assert_eq!(code, Some(1));
    assert!(err.contains("Cannot lock pid file"), "{err}");
    kill_process(Pid::from_raw(pid).unwrap(), Signal::TERM).unwrap();
    wait_until("the daemon is gone", || !Path::new(&format!("/proc/{pid}")).exists());
    assert!(!place.path("s").exists());
    assert_eq!(std::fs::read(place.path("disk.raw")).unwrap()[..65536], [1; 65536]);
}

#[test]
fn errors_at_the_start_come_through_a_fork() {
    let place = Place::new(1 << 20);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    for fork in [&["--fork"][..], &[]] {
        let args = [fork, &["-f", "raw", "-b", "127.0.0.1", "-p", &port, "disk.raw"]].concat();
        let (ours, real) = (said(&mut place.ours(), &args), said(&mut place.real(), &args));
        assert_eq!(ours.0, Some(1), "{ours:?}");
        assert!(ours.2.contains("Address already in use"), "callers look for it: {ours:?}");
        assert_eq!(ours, real);
    }
}

#[test]
fn every_signal_that_ends_it_ends_it_with_0() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let place = Place::new(1 << 20);
        let server = place.start(place.ours(), "s", &["-t", "-f", "raw", "disk.raw"]);
        // A client that stays does not keep it.
        let _client = UnixStream::connect(place.path("s")).unwrap();
        server.signal(signal);
        assert_eq!(server.end(), (Some(0), String::new()), "{signal:?}");
        assert!(!place.path("s").exists());
    }
}

#[test]
fn a_socket_left_over_is_replaced_and_the_next_servers_is_not_removed() {
    let place = Place::new(1 << 20);
    let first = place.start(place.ours(), "s", &["-t", "-f", "raw", "disk.raw"]);
    first.signal(Signal::KILL);
    first.end();
    assert!(place.path("s").exists(), "a killed server leaves its socket");
    let second = place.start(place.ours(), "s", &["-t", "-f", "raw", "disk.raw"]);
    // The next server takes the path over while the old one still runs; its end must not take the new socket away.
    let before = std::fs::metadata(place.path("s")).map(|m| std::os::unix::fs::MetadataExt::ino(&m)).unwrap();
    let mut command = place.ours();
    command.args(["-k", &place.text("s"), "-t", "-f", "raw", "disk.raw"]).stderr(Stdio::piped());
    let third = Running(command.spawn().unwrap());
    wait_until("the path is taken over", || {
        std::fs::metadata(place.path("s")).is_ok_and(|m| std::os::unix::fs::MetadataExt::ino(&m) != before)
    });
    second.signal(Signal::TERM);
    assert_eq!(second.end().0, Some(0));
    run("nbdinfo", &["--size", &place.uri("s")]).ok();
    third.signal(Signal::TERM);
    assert_eq!(third.end().0, Some(0));
}

#[test]
fn clients_beyond_shared_wait_their_turn() {
    let place = Place::new(1 << 20);
    let server = place.start(place.ours(), "s", &["-t", "-e", "1", "-f", "raw", "disk.raw"]);
    let mut first = UnixStream::connect(place.path("s")).unwrap();
    let mut greeting = [0; 18];
    first.read_exact(&mut greeting).unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    let path = place.path("s");
    let second = std::thread::spawn(move || {
        let mut second = UnixStream::connect(path).unwrap();
        tell.send(()).unwrap();
        let mut greeting = [0; 18];
        second.read_exact(&mut greeting).map(|()| greeting)
    });
    told.recv().unwrap();
    assert!(!second.is_finished());
    first.write_all(&[0, 0, 0, 3]).unwrap();
    drop(first);
    assert_eq!(second.join().unwrap().unwrap(), greeting);
    drop(server);
}

#[test]
fn the_options_that_scripts_use_most_do_what_they_say() {
    let place = Place::new(1 << 20);
    let data = noise(1 << 20, 3);
    std::fs::write(place.path("disk.raw"), &data).unwrap();
    // virtnbdbackup, OpenNebula: read-only, persistent, several clients, a name.
    let args = ["-r", "-t", "-e", "4", "-f", "raw", "-x", "sda", "-D", "backup", "disk.raw"];
    let server = place.start(place.ours(), "s", &args);
    let uri = place.uri("s").replace("///", "///sda");
    let copy = place.text("copy.raw");
    run("nbdcopy", &[&uri, &copy]).ok();
    assert!(std::fs::read(&copy).unwrap() == data);
    let said = run("qemu-io", &["-f", "raw", "-c", "write 0 512", &uri]).failed();
    assert!(said.contains("read-only") || said.contains("Permission denied"), "{said}");
    drop(server);
    // common.nbd of QEMU's tests: options behind the file, values in place.
    let server =
        place.start(place.ours(), "s", &["disk.raw", "-fraw", "-te5", "--offset=0x1000", "--export-name="]);
    run("qemu-io", &["-f", "raw", "-c", "write -P 5 0 512", "-c", "flush", &place.uri("s")]).ok();
    drop(server);
    let now = std::fs::read(place.path("disk.raw")).unwrap();
    assert!(now[..4096] == data[..4096] && now[4608..] == data[4608..]);
    assert_eq!(now[4096..4608], [5; 512]);
    // vdsm, libguestfs: image options, JSON.
    for (option, file) in [
        ("--image-opts", "driver=raw,file.driver=file,file.filename=disk.raw,offset=4096,size=1024"),
        (
            "--persistent",
            r#"json:{"driver":"raw","offset":4096,"size":1024,"file":{"driver":"file","filename":"disk.raw"}}"#,
        ),
    ] {
        let server = place.start(place.ours(), "s", &["-t", option, file]);
        assert_eq!(run("nbdinfo", &["--size", &place.uri("s")]).ok().trim(), "1024");
        run("qemu-io", &["-f", "raw", "-c", "read -P 5 0 512", &place.uri("s")]).ok();
        drop(server);
    }
}

#[test]
fn discards_and_zeroes_do_what_the_options_say() {
    use std::os::unix::fs::MetadataExt;
    let place = Place::new(0);
    let blocks = |place: &Place| std::fs::metadata(place.path("disk.raw")).unwrap().blocks() * 512;
    let fill = || std::fs::write(place.path("disk.raw"), noise(1 << 20, 5)).unwrap();
    let io = |command: &str| {
        run("qemu-io", &["-f", "raw", "-d", "unmap", "-c", command, "-c", "flush", &place.uri("s")]).ok()
    };
    let check = |args: &[&str], command: &str, freed: bool, zero: bool| {
        fill();
        let before = blocks(&place);
        let server = place.start(place.ours(), "s", &[args, &["-t", "-f", "raw", "disk.raw"]].concat());
        io(command);
        drop(server);
        assert_eq!(blocks(&place) < before, freed, "{args:?} {command}");
        let now = std::fs::read(place.path("disk.raw")).unwrap();
        assert_eq!(now.iter().all(|b| *b == 0), zero, "{args:?} {command}");
    };
    check(&[], "discard 0 1M", false, false);
    check(&["--discard=ignore"], "discard 0 1M", false, false);
    check(&["--discard=unmap"], "discard 0 1M", true, true);
    check(&[], "write -P 0 0 1M", false, true);
    check(&["--detect-zeroes=on"], "write -P 0 0 1M", false, true);
    check(&["--discard=unmap", "--detect-zeroes=on"], "write -P 0 0 1M", false, true);
    check(&["--discard=on", "--detect-zeroes=unmap"], "write -P 0 0 1M", true, true);
}

#[test]
fn a_guessed_format_warns_and_guards_the_first_sector() {
    let place = Place::new(1 << 20);
    let server = place.start(place.ours(), "s", &["-t", "disk.raw"]);
    let mut header = vec![0u8; 512];
    header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    std::fs::write(place.path("header"), &header).unwrap();
    let write = format!("write -s {} 0 512", place.text("header"));
    let said = run("qemu-io", &["-f", "raw", "-c", &write, &place.uri("s")]).failed();
    assert!(said.contains("write failed"), "{said}");
    server.signal(Signal::TERM);
    let (code, err) = server.end();
    assert_eq!(code, Some(0));
    assert!(err.contains("WARNING: Image format was not specified for 'disk.raw'"), "{err}");
    // As there, a warning at the start is no quiet start.
    let args = ["--fork", "-t", "-k", &place.text("f"), "--pid-file", &place.text("pid"), "disk.raw"];
    let ours = said_and_killed(&place, place.ours(), &args);
    let real = said_and_killed(&place, place.real(), &args);
    assert_eq!(ours, real);
}

/// Exit code and stderr of a start with --fork, whose server is ended by its pid file.
fn said_and_killed(place: &Place, mut command: Command, args: &[&str]) -> (Option<i32>, String) {
    let (code, _, err) = said(&mut command, args);
    let pid: i32 = std::fs::read_to_string(place.path("pid")).unwrap().trim().parse().unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::TERM).unwrap();
    wait_until("the daemon is gone", || !Path::new(&format!("/proc/{pid}")).exists());
    (code, err)
}

#[test]
fn null_disks_are_served() {
    let place = Place::new(512);
    for (args, size) in [
        (&["-f", "raw", "null-co://"][..], 1 << 30),
        (&["--image-opts", "driver=null-aio,size=10M"], 10 << 20),
        (&[r#"json:{"driver":"raw","offset":1024,"file":{"driver":"null-co","size":4096}}"#], 3072),
    ] {
        let server = place.start(place.ours(), "n", args);
        let got: u64 = run("nbdinfo", &["--size", &place.uri("n")]).ok().trim().parse().unwrap();
        assert_eq!(got, size, "{args:?}");
        server.end();
        let server = place.start(place.ours(), "n", args);
        run("qemu-io", &["-f", "raw", "-c", "write -P 7 0 1k", "-c", "read -P 0 0 1k", &place.uri("n")]).ok();
        server.end();
    }
    let (code, _, err) = said(&mut place.ours(), &["-f", "qcow2", "null-co://"]);
    assert!(code == Some(1) && err.contains("not in qcow2 format"), "{err}");
    let (code, _, err) = said(&mut place.ours(), &["-s", "null-co://"]);
    assert!(code == Some(1) && err.contains("no snapshots"), "{err}");
}

#[test]
fn clients_that_ask_for_no_block_sizes_are_answered_as_there() {
    // A guessed raw image has a smallest block of 512 bytes.
    let place = Place::new(1 << 20);
    let script = "h.set_opt_mode(True)\nh.set_request_block_size(False)\nh.connect_unix(PATH)\n\
                  try:\n    h.opt_info()\n    print('info', h.get_block_size(nbd.SIZE_MINIMUM))\n\
                  except nbd.Error:\n    print('no info')\n\
                  h.opt_go()\nprint('go', h.get_block_size(nbd.SIZE_MINIMUM))\nh.shutdown()\n";
    let ask = |command, args: &[&str]| {
        let server = place.start(command, "s", args);
        let script = script.replace("PATH", &format!("'{}'", place.text("s")));
        let said = run("nbdsh", &["-c", &script]).ok();
        server.end();
        said
    };
    for (args, want) in
        [(&["disk.raw"][..], "no info\ngo 1\n"), (&["-f", "raw", "disk.raw"], "info 1\ngo 1\n")]
    {
        assert_eq!(ask(place.real(), args), want, "{args:?} there");
        assert_eq!(ask(place.ours(), args), want, "{args:?}");
    }
}

#[test]
fn a_passed_socket_is_served() {
    let place = Place::new(1 << 20);
    let launcher = "import os,socket,sys\ns=socket.socket(socket.AF_UNIX)\ns.bind(sys.argv[1])\ns.listen(5)\n\
                    os.dup2(s.fileno(),3)\nos.set_inheritable(3,True)\nos.environ['LISTEN_PID']=str(os.getpid())\n\
                    os.environ['LISTEN_FDS']=sys.argv[2]\nos.execv(sys.argv[3],sys.argv[3:])";
    let start = |count: &str, args: &[&str]| {
        let mut command = tool("python3");
        command.args(["-c", launcher, &place.text("act"), count, &place.text("qemu-nbd")]).args(args);
        command.current_dir(place.dir.path()).stderr(Stdio::piped());
        Running(command.spawn().unwrap())
    };
    for (count, args, word) in [
        ("1", &["-k", "/x", "disk.raw"][..], "Unix socket can't be set when using socket activation"),
        ("1", &["-p", "1", "disk.raw"], "TCP port number can't be set"),
        ("2", &["disk.raw"], "does not support socket activation with LISTEN_FDS > 1"),
    ] {
        let (code, err) = start(count, args).end();
        assert_eq!(code, Some(1), "{err}");
        assert!(err.contains(word), "{err}");
        std::fs::remove_file(place.path("act")).unwrap();
    }
    let server = start("1", &["-f", "raw", "disk.raw"]);
    wait_until("the socket is there", || UnixStream::connect(place.path("act")).is_ok());
    run("nbdinfo", &["--size", &place.uri("act")]).ok();
    assert_eq!(server.end().0, Some(0), "it ends with its last client");
}

#[test]
fn tls_and_its_access_list_are_wired() {
    let place = Place::new(1 << 20);
    std::fs::create_dir(place.path("psk")).unwrap();
    std::fs::write(
        place.path("psk/keys.psk"),
        "eve:00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff\n",
    )
    .unwrap();
    let object = format!("tls-creds-psk,id=tls0,endpoint=server,dir={}", place.text("psk"));
    let server = place.start(
        place.ours(),
        "s",
        &["-t", "-f", "raw", "--object", &object, "--tls-creds", "tls0", "disk.raw"],
    );
    // In the clear nothing is to be had.
    run("nbdinfo", &["--size", &place.uri("s")]).failed();
    let uri =
        format!("nbds+unix://eve@/?socket={}&tls-psk-file={}", place.text("s"), place.text("psk/keys.psk"));
    assert_eq!(run("nbdinfo", &["--size", &uri]).ok().trim(), "1048576");
    let client = format!("tls-creds-psk,id=c,endpoint=client,dir={},username=eve", place.text("psk"));
    let list = ["-L", "-k", &place.text("s"), "--object", &client, "--tls-creds", "c"];
    let (ours, real) = (said(&mut place.ours(), &list), said(&mut place.real(), &list));
    assert_eq!(ours.0, Some(0), "{ours:?}");
    assert_eq!(ours, real);
    let image = format!("driver=nbd,server.type=unix,server.path={},tls-creds=c", place.text("s"));
    run(
        "qemu-io",
        &["--object", &client, "--image-opts", "-c", "write -P 3 0 4k", "-c", "read -P 3 0 4k", &image],
    )
    .ok();
    server.signal(Signal::TERM);
    assert_eq!(server.end().0, Some(0));
}

#[test]
fn a_list_without_the_right_tls_fails_in_the_same_words() {
    let place = Place::new(1 << 20);
    std::fs::write(place.path("keys.psk"), "alice:00112233445566778899aabbccddeeff\n").unwrap();
    let creds = |end: &str| format!("tls-creds-psk,id=t,endpoint={end},dir={}", place.dir.path().display());
    let (server_creds, client_creds) = (creds("server"), creds("client") + ",username=alice");
    let tls_server = ["-t", "-f", "raw", "--object", &server_creds, "--tls-creds", "t", "disk.raw"];
    let plain_server = ["-t", "-f", "raw", "disk.raw"];
    for command in [Place::ours, Place::real] {
        let running = place.start(command(&place), "tls", &tls_server);
        let args = ["-L", "-k", &place.text("tls")];
        let (ours, real) = (said(&mut place.ours(), &args), said(&mut place.real(), &args));
        assert!(real.0 == Some(1) && real.2.contains("TLS negotiation required"), "{real:?}");
        assert_eq!(ours, real);
        drop(running);
        let running = place.start(command(&place), "plain", &plain_server);
        let args = ["-L", "-k", &place.text("plain"), "--object", &client_creds, "--tls-creds", "t"];
        let (ours, real) = (said(&mut place.ours(), &args), said(&mut place.real(), &args));
        assert_eq!(real.0, Some(1), "{real:?}");
        assert_eq!(ours, real);
        drop(running);
    }
}

#[test]
fn large_requests_and_many_clients_work_over_tcp() {
    let place = Place::new(100 << 20);
    let mut command = place.ours();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    command.args(["-t", "-e", "0", "-f", "raw", "-b", "localhost", "-p", &port.to_string(), "disk.raw"]);
    let _server = Running(command.stderr(Stdio::piped()).spawn().unwrap());
    wait_until("it listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
    let uri = format!("nbd://localhost:{port}/");
    // What nbd's own tester sends: more than QEMU takes.
    let script = "import nbd,sys\nh=nbd.NBD()\nh.set_strict_mode(0)\nh.connect_uri(sys.argv[1])\nb=bytes([7])*50000000\n\
                  h.pwrite(b,0)\nassert h.pread(50000000,0)==b\nh.flush()";
    python(script, &[&uri]).ok();
    run("nbdcopy", &["--connections=8", &uri, "null:"]).ok();
}

/// `-s`: what is written is read again, through every client, and gone with the server; the image is as it was.
#[test]
fn a_temporary_overlay_keeps_writes_until_the_end() {
    let place = Place::new(1 << 20);
    let data = noise(1 << 20, 11);
    std::fs::write(place.path("disk.raw"), &data).unwrap();
    run("qemu-img", &["convert", "-O", "qcow2", &place.text("disk.raw"), &place.text("disk.qcow2")]).ok();
    for (format, file) in [("raw", "disk.raw"), ("qcow2", "disk.qcow2")] {
        let before = std::fs::read(place.path(file)).unwrap();
        let mut command = place.ours();
        command.env("TMPDIR", place.dir.path());
        let server = place.start(command, "s", &["-s", "-t", "-e", "4", "-f", format, file]);
        let uri = place.uri("s");
        let args = ["-f", "raw", "-c", "write -P 7 4k 8k", "-c", "write -z 512k 64k", "-c", "flush", &uri];
        run("qemu-io", &args).ok();
        run("qemu-io", &["-f", "raw", "-c", "read -P 7 4k 8k", "-c", "read -P 0 512k 64k", &uri]).ok();
        let copy = place.text("copy.raw");
        run("nbdcopy", &[&uri, &copy]).ok();
        let mut want = data.clone();
        want[4096..12288].fill(7);
        want[512 << 10..576 << 10].fill(0);
        assert!(std::fs::read(&copy).unwrap() == want, "{format}");
        let there = std::fs::read_dir(place.dir.path()).unwrap().map(|e| e.unwrap().file_name());
        let overlays: Vec<_> = there.filter(|name| name.to_string_lossy().contains("overlay")).collect();
        assert!(overlays.is_empty(), "the overlay has no name: {overlays:?}");
        server.signal(Signal::TERM);
        assert_eq!(server.end().0, Some(0));
        assert!(std::fs::read(place.path(file)).unwrap() == before, "{format}: the image was changed");
    }
}

/// qcow2 under the personality: written by our server, judged by QEMU's tools; snapshots, bitmaps and depth are shown.
#[test]
fn qcow2_images_are_served_with_what_they_hold() {
    let place = Place::new(1 << 20);
    let image = place.text("disk.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "8M"]).ok();
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 256k", &image]).ok();
    run("qemu-img", &["snapshot", "-c", "before", &image]).ok();
    run("qemu-img", &["bitmap", "--add", &image, "b0"]).ok();
    let uri = place.uri("s");

    let server = place.start(place.ours(), "s", &["-t", "-f", "qcow2", &image]);
    run(
        "qemu-io",
        &["-f", "raw", "-c", "write -P 2 64k 128k", "-c", "write -P 3 6M 64k", "-c", "flush", &uri],
    )
    .ok();
    server.signal(Signal::TERM);
    assert_eq!(server.end().0, Some(0));
    run("qemu-img", &["check", &image]).ok();
    let reads = ["read -P 1 0 64k", "read -P 2 64k 128k", "read -P 1 192k 64k", "read -P 3 6M 64k"];
    let mut args = vec!["-f", "qcow2"];
    reads.iter().for_each(|r| args.extend(["-c", r]));
    args.push(&image);
    run("qemu-io", &args).ok();

    let server = place.start(place.ours(), "s", &["-r", "-t", "-f", "qcow2", "-l", "before", &image]);
    run("qemu-io", &["-r", "-f", "raw", "-c", "read -P 1 0 256k", "-c", "read -P 0 6M 64k", &uri]).ok();
    server.signal(Signal::TERM);
    assert_eq!(server.end().0, Some(0));

    // Enabled bitmaps need a writable export, as with the real one.
    let server = place.start(place.ours(), "s", &["-t", "-A", "-B", "b0", "-f", "qcow2", &image]);
    let map = run("nbdinfo", &["--map=qemu:dirty-bitmap:b0", &uri]).ok();
    let dirty = |offset: &str| {
        map.lines().any(|l| l.split_whitespace().next() == Some(offset) && l.contains("dirty"))
    };
    assert!(dirty("65536") && dirty("6291456"), "{map}");
    let depth = run("nbdinfo", &["--map=qemu:allocation-depth", &uri]).ok();
    assert!(depth.lines().next().is_some_and(|l| l.contains("local")), "{depth}");
    server.signal(Signal::TERM);
    assert_eq!(server.end().0, Some(0));
    run("qemu-img", &["check", &image]).ok();
}
