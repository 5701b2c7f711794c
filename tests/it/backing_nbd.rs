//! qcow2 images whose backing image is an export of an NBD server: ours and QEMU's, dead, slow, lying and ourselves.

use crate::cli_harness::{
    Claims, FakeServer, PATIENCE, Peer, Serving, conbd, handshake, in_coroutine, must as run, peer,
    read_request, text,
};
use conbd::block::BlockNode;
use conbd::nbd::backing::{NbdNode, Patience};
use conbd::nbd::client::{Client, Uri};
use conbd::nbd::wire::SimpleReply;
use conbd::util::buf::IoBuf;
use std::io::IoSliceMut;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;

/// qemu-io on an export; whether all of it succeeded, and what it said.
fn io(uri: &str, commands: &[&str]) -> (bool, String) {
    let mut args = vec!["-f", "raw"];
    commands.iter().for_each(|c| args.extend(["-c", c]));
    args.push(uri);
    let out = Command::new("qemu-io").args(&args).output().expect("qemu-io; run: make test-deps");
    let told = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    (out.status.success() && !told.contains("failed"), told)
}

#[track_caller]
fn io_ok(uri: &str, commands: &[&str]) {
    let (ok, told) = io(uri, commands);
    assert!(ok, "{commands:?}: {told}");
}

/// Bytes of a base image: data, a hole of 2 MiB, data, and an odd end.
fn base_content() -> Vec<u8> {
    let mut all: Vec<u8> = (0..5 * MIB + 1000).map(|i| (i / 700 % 251) as u8 + 1).collect();
    all[MIB..3 * MIB].fill(0);
    all
}

fn write_base(path: &Path) -> Vec<u8> {
    let all = base_content();
    let mut file = std::fs::File::create(path).unwrap();
    file.write_all(&all[..MIB]).unwrap();
    std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(3 * MIB as u64)).unwrap();
    file.write_all(&all[3 * MIB..]).unwrap();
    all
}

/// An overlay that names something which nobody looks at.
fn overlay(path: &Path, backing: &str, format: &str, size: &str) {
    run("qemu-img", &["create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", format, text(path), size]);
}

fn serve_base(dir: &Path, socket: &str) -> Serving {
    let (base, socket) = (dir.join("base.raw"), dir.join(socket));
    Serving::start(&[text(&base), "-f", "raw", "--read-only", "--socket", text(&socket)], 1)
}

fn serve_top(top: &Path) -> Serving {
    Serving::start(
        &[
            text(top),
            "--allow-backing-nbd",
            "--allocation-depth",
            "--iothreads",
            "2",
            "--listen",
            "127.0.0.1:0",
        ],
        1,
    )
}

/// QEMU's server of the base image.
fn qemu_nbd(dir: &Path, socket: &str) -> Peer {
    let (base, socket) = (dir.join("base.raw"), dir.join(socket));
    let args = ["-r", "-t", "-e", "0", "-f", "raw", "-x", "b", "-k", text(&socket), text(&base)];
    peer("qemu-nbd", &args, &socket)
}

/// What an overlay of 8 MiB must show.
fn expect(dir: &Path, base: &[u8]) -> PathBuf {
    let path = dir.join("want.raw");
    let mut all = base.to_vec();
    all.resize(8 * MIB, 0);
    std::fs::write(&path, all).unwrap();
    path
}

/// Runs `f` in a coroutine of a thread of its own: another thread may still hold the context when it has ended.
fn apart<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    std::thread::spawn(move || in_coroutine(f)).join().expect("the coroutine ends well")
}

#[test]
fn nobody_is_connected_to_unless_that_is_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let server = FakeServer::start(move |stream| {
        count.fetch_add(1, Ordering::SeqCst);
        handshake(stream, Claims::new(1 << 20)).map(drop)
    });
    let top = dir.path().join("top.qcow2");
    let socket = server.path.display();
    for name in [
        format!("nbd+unix:///?socket={socket}"),
        format!("nbd:unix:{socket}"),
        format!("json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"nbd\",\"path\":\"{socket}\"}}}}"),
    ] {
        overlay(&top, &name, "raw", "2M");
        for command in
            [&["serve", "--log-level", "off"][..], &["serve", "--check"], &["qemu-nbd", "-k", "/nowhere/s"]]
        {
            let mut args = command.to_vec();
            args.push(text(&top));
            let ended = conbd(&args);
            assert_eq!(ended.code, Some(1), "{name}: {ended:?}");
            assert!(ended.stderr.contains("--allow-backing-nbd"), "{name}: {ended:?}");
        }
        let ended = conbd(&["resize", text(&top), "3M"]);
        assert!(ended.error_line().contains("--allow-backing-nbd"), "{ended:?}");
        assert_eq!(conbd(&["inspect", text(&top)]).code, Some(0));
    }
    assert_eq!(asked.load(Ordering::SeqCst), 0, "somebody connected");
}

#[test]
fn what_the_server_has_is_read_through_the_overlay() {
    let dir = tempfile::tempdir().unwrap();
    let base = write_base(&dir.path().join("base.raw"));
    let want = expect(dir.path(), &base);
    let ours = serve_base(dir.path(), "ours.sock");
    let _theirs = qemu_nbd(dir.path(), "theirs.sock");
    let at = |s: &str| dir.path().join(s).display().to_string();
    for (name, format) in [
        (format!("nbd+unix:///?socket={}", at("ours.sock")), "raw"),
        (format!("nbd:unix:{}", at("ours.sock")), "nbd"),
        (format!("nbd+unix:///b?socket={}", at("theirs.sock")), "raw"),
        (format!("nbd:unix:{}:exportname=b", at("theirs.sock")), "raw"),
        (
            format!(
                r#"json:{{"driver":"raw","file":{{"driver":"nbd","export":"b","server":{{"type":"unix","path":"{}"}}}}}}"#,
                at("theirs.sock")
            ),
            "raw",
        ),
    ] {
        let top = dir.path().join("top.qcow2");
        overlay(&top, &name, format, "8M");
        let serving = serve_top(&top);
        let uri = serving.uri().to_owned();
        // Several connections, each with several requests.
        let copy = dir.path().join("copy.raw");
        run("nbdcopy", &["--connections=4", "--requests=16", &uri, text(&copy)]);
        assert!(std::fs::read(&copy).unwrap() == std::fs::read(&want).unwrap(), "{name}");
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, text(&want)]);
        // What is a hole there is one here; where the data come from.
        let map = run("nbdinfo", &["--map", &uri]);
        assert!(map.lines().any(|l| l.contains("2097152") && l.contains("zero")), "{name}: {map}");
        let depth = run("nbdinfo", &["--map=qemu:allocation-depth", &uri]);
        assert!(depth.contains('2'), "{name}: {depth}");
        // Copy on write, at the edges of what the server has, too.
        io_ok(
            &uri,
            &["write -P 9 100k 1k", "write -P 8 5242k 3k", "write -z 4M 10k", "read -P 9 100k 1k", "flush"],
        );
        let mut changed = std::fs::read(&want).unwrap();
        changed[100 << 10..101 << 10].fill(9);
        changed[5242 << 10..5245 << 10].fill(8);
        changed[4 << 20..(4 << 20) + (10 << 10)].fill(0);
        run("nbdcopy", &[&uri, text(&copy)]);
        assert!(std::fs::read(&copy).unwrap() == changed, "{name}");
        let (code, log) = serving.stop();
        assert_eq!(code, Some(0), "{log}");
        run("qemu-img", &["check", text(&top)]);
    }
    assert_eq!(ours.stop().0, Some(0));
}

#[test]
fn a_larger_overlay_hides_what_the_server_has_there_and_grows_by_the_tool() {
    let dir = tempfile::tempdir().unwrap();
    write_base(&dir.path().join("base.raw"));
    let peer = serve_base(dir.path(), "s");
    let top = dir.path().join("top.qcow2");
    overlay(&top, &format!("nbd+unix:///?socket={}", text(&dir.path().join("s"))), "raw", "4M");
    let grown = conbd(&["resize", "--allow-backing-nbd", text(&top), "8M"]);
    assert_eq!(grown.code, Some(0), "{grown:?}");
    let serving = serve_top(&top);
    io_ok(serving.uri(), &["read -P 0 4M 4M", "read -P 0 1M 2M"]);
    assert_eq!(serving.stop().0, Some(0));
    assert_eq!(peer.stop().0, Some(0));
}

#[test]
fn a_server_that_dies_costs_its_own_data_until_it_is_back() {
    let dir = tempfile::tempdir().unwrap();
    let base = write_base(&dir.path().join("base.raw"));
    let top = dir.path().join("top.qcow2");
    overlay(&top, &format!("nbd+unix:///?socket={}", text(&dir.path().join("s"))), "raw", "8M");
    std::fs::write(dir.path().join("other.raw"), vec![5; MIB]).unwrap();
    let config = dir.path().join("conbd.toml");
    let exports = "[server]\nsocket = ['d']\n\
                   [[export]]\nname = 'top'\nimage = 'top.qcow2'\nbacking_nbd = true\n\
                   [[export]]\nname = 'other'\nimage = 'other.raw'\nformat = 'raw'\n";
    std::fs::write(&config, exports).unwrap();
    let peer = serve_base(dir.path(), "s");
    let serving = Serving::start(&["--config", text(&config)], 2);
    let (uri, other) = (serving.uris[0].clone(), serving.uris[1].clone());
    io_ok(&uri, &["read 0 1M", "write -P 7 0 64k", "flush"]);
    drop(peer);
    let (ok, told) = io(&uri, &["read 1M 64k", "read 4M 64k"]);
    assert!(!ok && told.matches("Input/output error").count() == 2, "{told}");
    // What the overlay has itself, and everybody else, goes on.
    io_ok(&uri, &["read -P 7 0 64k", "write -P 6 64k 64k", "read -P 6 64k 64k"]);
    io_ok(&other, &["read -P 5 0 1M"]);
    serving.wait_for_log("cannot connect to the server of a backing image");
    // A write that would have to copy from there fails, and changes nothing.
    assert!(!io(&uri, &["write -P 1 4M 1k"]).0);
    // Back with less than it had: not believed.
    std::fs::File::options()
        .write(true)
        .open(dir.path().join("base.raw"))
        .unwrap()
        .set_len(MIB as u64)
        .unwrap();
    let peer = serve_base(dir.path(), "s");
    let begin = Instant::now();
    while !serving.log().contains("the export had 5243880 bytes, and has 1048576 now") {
        assert!(begin.elapsed() < PATIENCE, "it is believed: {}", serving.log());
        assert!(!io(&uri, &["read 4M 64k"]).0);
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(peer);
    write_base(&dir.path().join("base.raw"));
    let peer = serve_base(dir.path(), "s");
    let begin = Instant::now();
    while !io(&uri, &["read 4M 64k"]).0 {
        assert!(begin.elapsed() < PATIENCE, "it does not come back: {}", serving.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    let mut want = base;
    want.resize(8 * MIB, 0);
    want[..64 << 10].fill(7);
    want[64 << 10..128 << 10].fill(6);
    let copy = dir.path().join("copy.raw");
    run("nbdcopy", &[&uri, text(&copy)]);
    assert!(std::fs::read(&copy).unwrap() == want);
    assert_eq!(serving.stop().0, Some(0));
    run("qemu-img", &["check", text(&top)]);
    assert_eq!(peer.stop().0, Some(0));
}

#[test]
fn the_server_may_be_this_one() {
    let dir = tempfile::tempdir().unwrap();
    write_base(&dir.path().join("base.raw"));
    let want = expect(dir.path(), &base_content());
    let top = dir.path().join("top.qcow2");
    let link = dir.path().join("link");
    overlay(&top, &format!("nbd+unix:///base?socket={}", text(&link)), "raw", "8M");
    let config = dir.path().join("conbd.toml");
    let exports = "[server]\nsocket = ['d']\niothreads = 1\n\
                   [[export]]\nname = 'top'\nimage = 'top.qcow2'\nbacking_nbd = true\n\
                   [[export]]\nname = 'base'\nimage = 'base.raw'\nformat = 'raw'\nread_only = true\n";
    std::fs::write(&config, exports).unwrap();
    // Nobody listens yet when it opens its images.
    std::os::unix::fs::symlink(dir.path().join("d"), &link).unwrap();
    let ended = conbd(&["serve", "--config", text(&config), "--log-level", "off"]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.error_line().contains("cannot connect"), "{ended:?}");
    // Another one helps at first, and leaves.
    std::fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink(dir.path().join("s"), &link).unwrap();
    let helper = Serving::start(
        &[
            text(&dir.path().join("base.raw")),
            "-f",
            "raw",
            "--read-only",
            "--export",
            "base",
            "--socket",
            text(&dir.path().join("s")),
        ],
        1,
    );
    let serving = Serving::start(&["--config", text(&config)], 2);
    std::fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink(dir.path().join("d"), &link).unwrap();
    assert_eq!(helper.stop().0, Some(0));
    let copy = dir.path().join("copy.raw");
    run("nbdcopy", &["--connections=4", "--requests=64", &serving.uris[0], text(&copy)]);
    assert!(std::fs::read(&copy).unwrap() == std::fs::read(&want).unwrap());
    io_ok(&serving.uris[0], &["write -P 3 10k 1k", "flush", "read -P 3 10k 1k"]);
    assert_eq!(serving.stop().0, Some(0));
}

#[test]
fn a_server_that_does_not_answer_is_not_waited_for_without_end() {
    let server = FakeServer::start(|stream| {
        handshake(stream, Claims::new(1 << 20))?;
        // Takes requests, and the second one is never answered.
        let first = read_request(stream)?;
        stream.write_all(&SimpleReply { error: None, cookie: first.cookie }.encode())?;
        loop {
            read_request(stream)?;
        }
    });
    let uri: Uri = server.uri().parse().unwrap();
    let short = Patience { connect: PATIENCE, request: Duration::from_millis(100) };
    let errors = apart(move || {
        let node = NbdNode::co_open(uri, short).unwrap();
        let mut buf = vec![0; 4096];
        // A simple reply to a structured read is a lie; silence is not; both are errors of the request alone.
        (0..3)
            .map(|_| {
                let e = node.co_preadv(0, &mut [IoSliceMut::new(&mut buf)]).expect_err("no data came");
                assert_eq!(e.errno(), libc::EIO);
                e.source.to_string()
            })
            .collect::<Vec<_>>()
    });
    assert!(errors.iter().any(|e| e.contains("broke the protocol")), "{errors:?}");
    let silent = FakeServer::start(|stream| {
        handshake(stream, Claims::new(1 << 20))?;
        loop {
            read_request(stream)?;
        }
    });
    let uri: Uri = silent.uri().parse().unwrap();
    let errors = apart(move || {
        let node = NbdNode::co_open(uri, short).unwrap();
        let mut buf = vec![0; 4096];
        (0..2)
            .map(|_| node.co_preadv(0, &mut [IoSliceMut::new(&mut buf)]).unwrap_err().source.to_string())
            .collect::<Vec<_>>()
    });
    assert!(errors.iter().all(|e| e.contains("did not answer in time")), "{errors:?}");
    let mute = FakeServer::start(|stream| read_request(stream).map(drop));
    let uri: Uri = mute.uri().parse().unwrap();
    let patience = Patience { connect: Duration::from_millis(100), request: PATIENCE };
    let error = apart(move || NbdNode::co_open(uri, patience).map(drop)).unwrap_err();
    assert!(error.contains("did not answer in time"), "{error}");
}

#[test]
fn blocks_that_the_server_asks_for_are_kept_to() {
    // Ours would take any; the test's server refuses what is not whole blocks.
    use conbd::nbd::proto::*;
    use conbd::nbd::wire::{BlockSizes, InfoRequest, RepInfo, put_option_reply};
    const SIZE: u64 = 10 * 4096 + 512;
    let server = FakeServer::start(|stream| {
        crate::cli_harness::greet(
            stream,
            HandshakeFlags::NBD_FLAG_FIXED_NEWSTYLE | HandshakeFlags::NBD_FLAG_NO_ZEROES,
        )?;
        loop {
            let (option, data) = crate::cli_harness::read_option(stream)?;
            let mut out = Vec::new();
            if option == NBD_OPT_GO {
                InfoRequest::decode(&data).map_err(std::io::Error::other)?;
                let flags = TransmissionFlags::NBD_FLAG_HAS_FLAGS | TransmissionFlags::NBD_FLAG_READ_ONLY;
                let sizes = RepInfo::BlockSize(BlockSizes { min: 4096, preferred: 4096, max: 8192 });
                for info in [RepInfo::Export { size: SIZE, flags }, sizes] {
                    let mut data = Vec::new();
                    info.put(&mut data);
                    put_option_reply(&mut out, option, NBD_REP_INFO, &data);
                }
                put_option_reply(&mut out, option, NBD_REP_ACK, &[]);
                stream.write_all(&out)?;
                break;
            }
            put_option_reply(&mut out, option, NBD_REP_ERR_UNSUP, &[]);
            stream.write_all(&out)?;
        }
        loop {
            let r = read_request(stream)?;
            let end = r.offset + r.len;
            let whole =
                r.offset.is_multiple_of(4096) && (end.is_multiple_of(4096) || end == SIZE) && r.len <= 8192;
            let error = if whole { None } else { Some(Errno::NBD_EINVAL) };
            stream.write_all(&SimpleReply { error, cookie: r.cookie }.encode())?;
            if whole {
                let data: Vec<u8> = (r.offset..end).map(|i| (i / 100 % 251) as u8).collect();
                stream.write_all(&data)?;
            }
        }
    });
    let uri: Uri = server.uri().parse().unwrap();
    in_coroutine(move || {
        let node = NbdNode::co_open(uri, Patience::default()).unwrap();
        assert_eq!(node.len(), SIZE);
        for (at, len) in
            [(0, 1), (4095, 2), (1, 40_000), (40_000, 1472), (100, 0), (SIZE - 1, 1), (0, SIZE as usize)]
        {
            let mut buf = vec![0xee; len];
            let (a, b) = buf.split_at_mut(len / 3);
            node.co_preadv(at, &mut [IoSliceMut::new(a), IoSliceMut::new(b)]).unwrap();
            let want: Vec<u8> = (at..at + len as u64).map(|i| (i / 100 % 251) as u8).collect();
            assert!(buf == want, "{len} bytes at {at}");
        }
    });
}

#[test]
fn an_image_on_a_server_names_no_files_of_this_host() {
    let dir = tempfile::tempdir().unwrap();
    let secret = dir.path().join("secret.raw");
    std::fs::write(&secret, vec![0x42; MIB]).unwrap();
    let remote = dir.path().join("base.raw");
    let top = dir.path().join("top.qcow2");
    let socket = dir.path().join("s");
    for (evil, word) in
        [(Some("backing_fmt=raw"), "must not open files"), (Some("data"), "must not open files"), (None, "")]
    {
        match evil {
            Some("data") => run(
                "qemu-img",
                &[
                    "create",
                    "-q",
                    "-f",
                    "qcow2",
                    "-o",
                    &format!("data_file={}", text(&dir.path().join("d.bin"))),
                    text(&remote),
                    "1M",
                ],
            ),
            Some(_) => run(
                "qemu-img",
                &["create", "-q", "-f", "qcow2", "-b", text(&secret), "-F", "raw", text(&remote)],
            ),
            None => run("qemu-img", &["create", "-q", "-f", "qcow2", text(&remote), "1M"]),
        };
        if evil.is_none() {
            run("qemu-io", &["-f", "qcow2", "-c", "write -P 3 64k 64k", text(&remote)]);
        }
        let peer = serve_base(dir.path(), "s");
        overlay(&top, &format!("nbd+unix:///?socket={}", text(&socket)), "qcow2", "1M");
        if evil.is_some() {
            let ended = conbd(&["serve", text(&top), "--allow-backing-nbd", "--log-level", "off"]);
            assert_eq!(ended.code, Some(1), "{ended:?}");
            assert!(ended.error_line().contains(word), "{ended:?}");
        } else {
            let serving = serve_top(&top);
            io_ok(
                serving.uri(),
                &["read -P 0 0 64k", "read -P 3 64k 64k", "write -P 4 65k 1k", "read -P 3 66k 10k"],
            );
            assert_eq!(serving.stop().0, Some(0));
        }
        assert_eq!(peer.stop().0, Some(0));
        std::fs::remove_file(&remote).unwrap();
    }
}

#[test]
fn names_that_mean_nothing_are_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let top = dir.path().join("top.qcow2");
    for (name, word) in [
        ("nbd://127.0.0.1:1/x", "cannot connect"),
        ("nbd:127.0.0.1", "port is missing"),
        ("nbds://127.0.0.1/x", "TLS is not supported"),
        ("nbd+unix:///x", "socket is missing"),
        ("nbd://127.0.0.1:1/x?socket=/s", "socket= needs"),
        (r#"json:{"driver":"nbd","host":"127.0.0.1","port":"x"}"#, "is no port"),
        (r#"json:{"driver":"nbd","host":"127.0.0.1","path":"/s"}"#, "host (and port) or path"),
        (r#"json:{"driver":"nbd","host":"127.0.0.1","tls-creds":"t"}"#, "tls-creds"),
        (r#"json:{"driver":"nbd","server":[1,2]}"#, "no text and no number"),
        (r#"json:{"driver":"nbd","host":"127.0.0.1""#, "json: with a mistake"),
        (r#"json:{"driver":"nbd"}"#, "host (and port) or path"),
    ] {
        // QEMU checks names: an image with another one, which is then written over.
        let place: String = "x".repeat(name.len());
        overlay(&top, &place, "raw", "1M");
        let mut bytes = std::fs::read(&top).unwrap();
        let at = bytes.windows(place.len()).position(|w| w == place.as_bytes()).unwrap();
        bytes[at..at + name.len()].copy_from_slice(name.as_bytes());
        std::fs::write(&top, bytes).unwrap();
        let ended = conbd(&["serve", text(&top), "--allow-backing-nbd", "--log-level", "off"]);
        assert_eq!(ended.code, Some(1), "{name}: {ended:?}");
        assert!(ended.error_line().contains(word), "{name}: {ended:?}");
        assert!(ended.error_line().contains("top.qcow2"), "{name}: {ended:?}");
    }
}

#[test]
fn requests_of_several_connections_are_in_flight_at_once() {
    // A server that answers only when eight reads wait.
    let server = FakeServer::start(|stream| {
        handshake(stream, Claims { structured: false, ..Claims::new(1 << 20) })?;
        let mut waiting = Vec::new();
        loop {
            waiting.push(read_request(stream)?);
            if waiting.len() < 8 {
                continue;
            }
            for r in waiting.drain(..).rev() {
                stream.write_all(&SimpleReply { error: None, cookie: r.cookie }.encode())?;
                stream.write_all(&vec![(r.offset / 65536) as u8 + 1; r.len as usize])?;
            }
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let top = dir.path().join("top.qcow2");
    overlay(&top, &server.uri(), "raw", "1M");
    let serving = serve_top(&top);
    let workers: Vec<_> = (0..2u64)
        .map(|k| {
            let uri: Uri = serving.uri().parse().unwrap();
            std::thread::spawn(move || {
                in_coroutine(move || {
                    let client = Arc::new(Client::co_connect(&uri).unwrap());
                    let done = Arc::new(AtomicUsize::new(0));
                    for i in 0..4u64 {
                        let (client, done) = (Arc::clone(&client), Arc::clone(&done));
                        let read = move || {
                            let n = k * 4 + i;
                            let got = client.co_read(n * 65536, IoBuf::new(4096)).unwrap();
                            assert!(got.iter().all(|&b| u64::from(b) == n + 1), "{n}");
                            done.fetch_add(1, Ordering::SeqCst);
                        };
                        conbd::co::Coroutine::new(read).enter();
                    }
                    while done.load(Ordering::SeqCst) < 4 {
                        conbd::co::co_sleep_ns(1_000_000);
                    }
                });
            })
        })
        .collect();
    for w in workers {
        w.join().expect("a read failed");
    }
    assert_eq!(serving.stop().0, Some(0));
}
