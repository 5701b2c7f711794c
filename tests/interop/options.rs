//! What the options of `conbd serve` do, seen by clients.

use crate::harness::{
    Builder, TCP_1_THREADS, TCP_3_IO_URING, UNIX_1_IO_URING, UNIX_3_THREADS, allocated, message_of, noise,
};
use crate::tools::run;
use crate::wire::Conn;
use rustix::process::Signal;

#[test]
fn a_window_of_the_image_is_all_that_clients_reach() {
    let data = noise(1 << 20, 41);
    let window = ["--offset", "4096", "--size", "64k"];
    let server = Builder::new(UNIX_3_THREADS).image_data(&data).args(&window).start();
    assert_eq!(run("nbdinfo", &["--size", &server.uri]).ok().trim(), "65536");
    let copy = server.path("copy.raw");
    run("nbdcopy", &[&server.uri, copy.to_str().unwrap()]).ok();
    assert!(std::fs::read(copy).unwrap() == data[4096..4096 + 65536]);
    run("qemu-io", &["-f", "raw", "-c", "write -P 1 0 64k", "-c", "flush", &server.uri]).ok();
    let stopped = server.stop();
    let image = std::fs::read(stopped.image()).unwrap();
    assert_eq!(image.len(), data.len());
    assert!(image[..4096] == data[..4096]);
    assert!(image[4096..69632].iter().all(|&b| b == 1));
    assert!(image[69632..] == data[69632..]);
}

#[test]
fn ignored_discards_change_nothing() {
    let data = noise(1 << 20, 43);
    let server = Builder::new(UNIX_3_THREADS).image_data(&data).args(&["--discard", "ignore"]).start();
    let before = allocated(&server.image());
    run("qemu-io", &["-f", "raw", "-d", "unmap", "-c", "discard 0 1M", "-c", "flush", &server.uri]).ok();
    let stopped = server.stop();
    assert_eq!(allocated(&stopped.image()), before);
    assert!(std::fs::read(stopped.image()).unwrap() == data);
}

#[test]
fn each_way_of_caching_keeps_the_data() {
    for cache in ["writeback", "none", "writethrough", "unsafe"] {
        for setup in [UNIX_1_IO_URING, TCP_1_THREADS] {
            let server = Builder::new(setup).image_len(8 << 20).args(&["--cache", cache]).start();
            // Unaligned too: O_DIRECT is our affair, not the client's.
            let script = [
                "write -P 1 0 1M",
                "write -P 2 12345 6789",
                "write -z 2097153 4097",
                "write -P 3 8388607 1",
                "flush",
            ];
            let checks = [
                "read -P 1 0 12345",
                "read -P 2 12345 6789",
                "read -P 1 19134 100000",
                "read -P 0 2097153 4097",
                "read -P 3 8388607 1",
            ];
            let mut args = vec!["-f", "raw"];
            script.iter().chain(&checks).for_each(|line| args.extend(["-c", line]));
            args.push(&server.uri);
            let out = run("qemu-io", &args).ok();
            assert!(!out.contains("failed"), "{cache}: {out}");
            server.stop();
        }
    }
}

#[test]
fn several_listeners_serve_the_same_image() {
    let builder = Builder::new(TCP_3_IO_URING).image_len(1 << 20);
    let sockets: Vec<String> =
        (0..2).map(|i| builder.path(&format!("{i}.sock")).to_str().unwrap().to_owned()).collect();
    let server = builder.args(&["--socket", &sockets[0], "--socket", &sockets[1]]).start();
    run("qemu-io", &["-f", "raw", "-c", "write -P 7 0 4k", &server.uri]).ok();
    for socket in &sockets {
        let uri = format!("nbd+unix:///?socket={socket}");
        assert!(!run("qemu-io", &["-f", "raw", "-c", "read -P 7 0 4k", &uri]).ok().contains("failed"));
    }
    let stopped = server.stop();
    assert!(sockets.iter().all(|s| !std::path::Path::new(s).exists()));
    drop(stopped);
}

#[test]
fn ipv6_where_the_machine_has_it() {
    let has_ipv6 = std::net::TcpListener::bind("[::1]:0").is_ok();
    let builder = Builder::new(UNIX_3_THREADS).image_len(4096).args(&["--listen", "[::1]:0"]);
    if !has_ipv6 {
        let (status, said) = builder.start_refused();
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(said.contains("::1"), "{said}");
        return;
    }
    let server = builder.start();
    let listening = std::fs::read_to_string("/proc/net/tcp6").unwrap();
    assert!(listening.lines().count() > 1);
    let uris: Vec<String> = server.more_uris();
    let uri = uris.iter().find(|u| u.contains("[::1]")).unwrap_or_else(|| panic!("no IPv6 URI in {uris:?}"));
    assert_eq!(run("nbdinfo", &["--size", uri]).ok().trim(), "4096");
    run("qemu-img", &["info", uri]).ok();
    server.stop();
}

#[test]
fn connections_are_logged_with_their_totals() {
    let server = Builder::new(UNIX_3_THREADS).image_len(1 << 20).start();
    run("qemu-io", &["-f", "raw", "-c", "write 0 64k", "-c", "read 0 32k", &server.uri]).ok();
    // Half a conversation is a warning, not an error.
    drop(Conn::new(&server.uri));
    server.signal(Signal::USR1);
    let stopped = server.stop();
    let text = stopped.raw_log.join("\n");
    assert!(stopped.log.len() == stopped.raw_log.len(), "every line is JSON:\n{text}");
    for word in ["connect", "disconnect"] {
        let found = stopped.log.iter().any(|l| message_of(l).contains(word));
        assert!(found, "no {word} in the log:\n{text}");
    }
}

#[test]
fn what_cannot_be_served_is_refused_with_a_reason() {
    let missing = Builder::new(TCP_1_THREADS);
    let (status, said) = missing.start_refused();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("disk.raw"), "{said}");
    assert!(said.contains("does not exist"), "{said}");
    let window = Builder::new(TCP_1_THREADS).image_len(4096).args(&["--offset", "8192"]);
    let (status, said) = window.start_refused();
    assert_eq!(status.code(), Some(1), "{said}");
    let folder = Builder::new(TCP_1_THREADS);
    std::fs::create_dir(folder.image()).unwrap();
    let (status, said) = folder.start_refused();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("disk.raw"), "{said}");
}
