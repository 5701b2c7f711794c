//! Images that become larger while they are served: by a reload, and underneath.

use crate::cli_harness::{Serving, conbd, image, in_coroutine, must as run, peer, text};
use conbd::nbd::client::{Client, Uri};
use conbd::nbd::proto::CmdFlags;
use conbd::util::buf::IoBuf;
use rustix::process::Signal;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const MIB: u64 = 1 << 20;

fn io(uri: &str, commands: &[&str]) {
    let mut args = vec!["-f", "raw"];
    commands.iter().for_each(|c| args.extend(["-c", c]));
    args.push(uri);
    run("qemu-io", &args);
}

fn size(uri: &str) -> u64 {
    run("nbdinfo", &["--size", uri]).trim().parse().unwrap()
}

/// A configuration file with one export, `disk`, and a unix socket.
fn configure(dir: &Path, image: &str, keys: &str) {
    let text = format!("[server]\nsocket = ['s']\n[[export]]\nname = 'disk'\nimage = '{image}'\n{keys}\n");
    std::fs::write(dir.join("conbd.toml"), text).unwrap();
}

fn serve(dir: &Path) -> Serving {
    Serving::start(&["--config", text(&dir.join("conbd.toml"))], 1)
}

/// SIGHUP, and until the log has said the n-th time that it is done.
fn reload(serving: &Serving, n: usize) {
    serving.signal(Signal::HUP);
    let begin = std::time::Instant::now();
    while serving.log().matches("SIGHUP: reloaded").count() < n {
        assert!(begin.elapsed() < crate::cli_harness::PATIENCE, "no reload: {}", serving.log());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

fn filled(byte: u8, len: usize) -> IoBuf {
    let mut buf = IoBuf::zeroed(len);
    buf.fill(byte);
    buf
}

#[test]
fn a_file_that_has_grown_is_taken_up_and_connected_clients_go_on() {
    let (dir, disk) = image(MIB);
    for keys in ["format = 'raw'", "format = 'auto'", "offset = 4096", "cache = 'none'\nformat = 'raw'"] {
        // Ends in the middle of a block, before and after.
        let (before, after) = (MIB + 100, 3 * MIB + 1000);
        std::fs::File::options().write(true).open(&disk).unwrap().set_len(before).unwrap();
        configure(dir.path(), "disk.raw", keys);
        let serving = serve(dir.path());
        let offset = if keys.contains("offset") { 4096 } else { 0 };
        assert_eq!(size(serving.uri()), before - offset, "{keys}");
        let uri: Uri = serving.uri().parse().unwrap();
        let grow = {
            let disk = disk.clone();
            move || std::fs::File::options().write(true).open(&disk).unwrap().set_len(after).unwrap()
        };
        let serving = in_coroutine(move || {
            let client = Client::co_connect(&uri).unwrap();
            assert_eq!(client.size(), before - offset);
            client.co_write(before - offset - 300, filled(7, 300), CmdFlags::empty()).unwrap();
            grow();
            let past = client.co_write(before - offset, filled(8, 4), CmdFlags::empty());
            assert!(past.is_err(), "nobody has looked yet");
            reload(&serving, 1);
            // It was told the old size; who knows better is served.
            client.co_write(before - offset - 200, filled(9, 400), CmdFlags::empty()).unwrap();
            client.co_write(after - offset - 700, filled(6, 700), CmdFlags::empty()).unwrap();
            let past = client.co_write(after - offset - 1, filled(8, 2), CmdFlags::empty());
            assert!(past.is_err(), "the new end is an end, too");
            client.co_flush().unwrap();
            client.co_close();
            serving
        });
        assert_eq!(size(serving.uri()), after - offset, "{keys}");
        let (code, log) = serving.stop();
        assert_eq!(code, Some(0), "{log}");
        assert!(log.contains("the export has become larger"), "{log}");
        let bytes = std::fs::read(&disk).unwrap();
        assert_eq!(bytes.len() as u64, after);
        let at = before as usize;
        assert!(bytes[at - 300..at - 200].iter().all(|&b| b == 7));
        assert!(bytes[at - 200..at + 200].iter().all(|&b| b == 9));
        assert!(bytes[at + 200..after as usize - 700].iter().all(|&b| b == 0));
        assert!(bytes[after as usize - 700..].iter().all(|&b| b == 6));
        std::fs::remove_file(&disk).unwrap();
        std::fs::File::create(&disk).unwrap();
    }
}

#[test]
fn a_qcow2_image_grows_while_clients_write_and_read() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.qcow2");
    // Small clusters: the L1 table must move.
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", text(&disk), "1M"]);
    configure(dir.path(), "disk.qcow2", "");
    let serving = serve(dir.path());
    let stop = Arc::new(AtomicBool::new(false));
    let rounds = Arc::new(AtomicU64::new(0));
    let busy: Vec<_> = (0..3u64)
        .map(|k| {
            let uri: Uri = serving.uri().parse().unwrap();
            let (stop, rounds) = (Arc::clone(&stop), Arc::clone(&rounds));
            std::thread::spawn(move || {
                in_coroutine(move || {
                    let client = Client::co_connect(&uri).unwrap();
                    let mut n = 0u64;
                    while !stop.load(Ordering::SeqCst) {
                        n += 1;
                        let at = k * 300_000 + n * 7919 % 290_000;
                        let byte = (n % 250) as u8 + 1;
                        client.co_write(at, filled(byte, 3000), CmdFlags::empty()).unwrap();
                        let back = client.co_read(at, IoBuf::new(3000)).unwrap();
                        assert!(back.iter().all(|&b| b == byte), "client {k}, round {n}");
                        if n.is_multiple_of(5) {
                            client.co_flush().unwrap();
                        }
                        rounds.fetch_add(1, Ordering::SeqCst);
                    }
                    client.co_close();
                });
            })
        })
        .collect();
    for (n, mib) in [2, 3, 8, 40].into_iter().enumerate() {
        let before = rounds.load(Ordering::SeqCst);
        let begin = std::time::Instant::now();
        while rounds.load(Ordering::SeqCst) < before + 20 {
            assert!(begin.elapsed() < crate::cli_harness::PATIENCE, "clients stand still");
            std::thread::yield_now();
        }
        configure(dir.path(), "disk.qcow2", &format!("grow_to = '{mib}M'"));
        reload(&serving, n + 1);
        assert_eq!(size(serving.uri()), mib * MIB);
        io(
            serving.uri(),
            &[
                &format!("write -P {} {} 64k", n + 1, mib * MIB - 65536),
                &format!("read -P {} {} 64k", n + 1, mib * MIB - 65536),
                "read -P 0 1M 128k",
            ],
        );
    }
    stop.store(true, Ordering::SeqCst);
    for b in busy {
        b.join().expect("a client failed");
    }
    // Smaller than it is: nothing happens.
    configure(dir.path(), "disk.qcow2", "grow_to = '1M'");
    reload(&serving, 5);
    assert_eq!(size(serving.uri()), 40 * MIB);
    let ours = dir.path().join("ours.raw");
    run("nbdcopy", &[serving.uri(), text(&ours)]);
    let (code, log) = serving.stop();
    assert_eq!(code, Some(0), "{log}");
    run("qemu-img", &["check", text(&disk)]);
    run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", text(&disk), text(&ours)]);
}

#[test]
fn what_a_longer_backing_image_holds_stays_hidden() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("base.raw"), vec![0x5a; 8 << 20]).unwrap();
    for options in ["", "compat=0.10", "extended_l2=on"] {
        let disk = dir.path().join("top.qcow2");
        let options = format!("backing_file=base.raw,backing_fmt=raw,{options}");
        run(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-o", options.trim_end_matches(','), text(&disk), "4000k"],
        );
        configure(dir.path(), "top.qcow2", "grow_to = '6M'");
        // The start grows, and so does a reload.
        let serving = serve(dir.path());
        io(serving.uri(), &["read -P 0x5a 0 4000k", "read -P 0 4000k 2144k", "write -P 1 4100k 1k"]);
        configure(dir.path(), "top.qcow2", "grow_to = '64M'");
        reload(&serving, 1);
        let reads =
            ["read -P 0x5a 0 4000k", "read -P 0 4000k 100k", "read -P 1 4100k 1k", "read -P 0 4101k 61435k"];
        io(serving.uri(), &reads);
        assert_eq!(serving.stop().0, Some(0));
        let mut args = vec!["-f", "qcow2"];
        reads.iter().for_each(|c| args.extend(["-c", c]));
        args.push(text(&disk));
        run("qemu-io", &args);
        run("qemu-img", &["check", text(&disk)]);
    }
}

#[test]
fn a_reload_that_cannot_be_done_changes_nothing_and_says_why() {
    let (dir, disk) = image(4 * MIB);
    configure(dir.path(), "disk.raw", "format = 'raw'");
    let serving = serve(dir.path());
    std::fs::write(dir.path().join("conbd.toml"), "[[export]]\nimage = 3\n").unwrap();
    serving.signal(Signal::HUP);
    serving.wait_for_log("conbd.toml:2:9");
    serving.wait_for_log("nothing is reloaded");
    // Smaller underneath: the size is a promise.
    std::fs::File::options().write(true).open(&disk).unwrap().set_len(MIB).unwrap();
    configure(dir.path(), "disk.raw", "format = 'raw'\ncache = 'none'");
    reload(&serving, 1);
    assert!(serving.log().contains("the image has become smaller"), "{}", serving.log());
    assert!(serving.log().contains("keys that say how the image is opened"), "{}", serving.log());
    assert_eq!(size(serving.uri()), 4 * MIB);
    io(serving.uri(), &["read -P 0 0 4M", "write -P 3 3M 1M", "read -P 3 3M 1M"]);
    configure(dir.path(), "disk.raw", "format = 'raw'\ngrow_to = '5M'");
    reload(&serving, 2);
    assert_eq!(size(serving.uri()), 5 * MIB);
    assert_eq!(std::fs::metadata(&disk).unwrap().len(), 5 * MIB);
    assert_eq!(serving.stop().0, Some(0));

    let qcow2 = dir.path().join("q.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&qcow2), "1M"]);
    configure(dir.path(), "q.qcow2", "");
    let serving = serve(dir.path());
    configure(dir.path(), "q.qcow2", "grow_to = 1048577");
    reload(&serving, 1);
    assert!(serving.log().contains("multiple of 512 bytes"), "{}", serving.log());
    assert_eq!(size(serving.uri()), MIB);
    assert_eq!(serving.stop().0, Some(0));

    configure(dir.path(), "q.qcow2", "grow_to = '2M'\nread_only = true");
    let ended = conbd(&["serve", "--config", text(&dir.path().join("conbd.toml"))]);
    assert_eq!(ended.code, Some(2), "{ended:?}");
    assert!(ended.error_line().contains("served read-only"), "{ended:?}");
    let ended = conbd(&["serve", text(&qcow2), "--grow-to", "8P", "--log-level", "off"]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.error_line().contains("cluster size does not allow"), "{ended:?}");
}

#[test]
fn bitmaps_grow_along() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", text(&disk), "1M"]);
    run("qemu-img", &["bitmap", "--add", "--enable", "-g", "512", text(&disk), "on"]);
    run("qemu-img", &["bitmap", "--add", "--enable", "-g", "512", text(&disk), "off"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 64k 64k", text(&disk)]);
    run("qemu-img", &["bitmap", "--disable", text(&disk), "off"]);
    configure(dir.path(), "disk.qcow2", "bitmaps = ['on', 'off']");
    let serving = serve(dir.path());
    // Says the dirty ranges, in sectors.
    let dirty = |uri: &str, name: &str| -> Vec<(u64, u64)> {
        let map = run("nbdinfo", &[&format!("--map=qemu:dirty-bitmap:{name}"), uri]);
        let line = |l: &str| -> Vec<u64> { l.split_whitespace().map_while(|w| w.parse().ok()).collect() };
        map.lines().map(line).filter(|e| e[2] == 1).map(|e| (e[0] / 512, e[1] / 512)).collect()
    };
    assert_eq!(dirty(serving.uri(), "on"), [(128, 128)]);
    for (n, mib) in [64u64, 300].into_iter().enumerate() {
        configure(dir.path(), "disk.qcow2", &format!("bitmaps = ['on', 'off']\ngrow_to = '{mib}M'"));
        reload(&serving, n + 1);
        assert_eq!(size(serving.uri()), mib * MIB);
        io(serving.uri(), &[&format!("write -P 7 {} 1k", mib * MIB - 1024), "write -P 7 0 512", "flush"]);
    }
    let on = [(0, 1), (128, 128), (64 * 2048 - 2, 2), (300 * 2048 - 2, 2)];
    assert_eq!(dirty(serving.uri(), "on"), on);
    assert_eq!(dirty(serving.uri(), "off"), [(128, 128)]);
    // And once more by the tool.
    assert_eq!(serving.stop().0, Some(0));
    let grown = conbd(&["resize", text(&disk), "600M"]);
    assert_eq!(grown.code, Some(0), "{grown:?}");
    run("qemu-img", &["check", text(&disk)]);
    assert_eq!(conbd(&["check", text(&disk)]).code, Some(0));
    for name in ["on", "off"] {
        let socket = dir.path().join(name);
        let args = ["-r", "-t", "-f", "qcow2", "-B", name, "-k", text(&socket), text(&disk)];
        let theirs = peer("qemu-nbd", &args, &socket);
        let shown = dirty(&format!("nbd+unix:///?socket={}", text(&socket)), name);
        drop(theirs);
        assert_eq!(shown, if name == "on" { &on[..] } else { &[(128, 128)] }, "{name}");
    }
}
