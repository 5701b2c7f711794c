//! The tools around qcow2 images, against QEMU's: `create`, `check`, `resize`, `inspect`, and what `serve` opens.

use crate::cli_harness::{Serving, conbd, image, must_command, peer, text};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A tool in the image's folder: QEMU looks for an external data file from where it runs, we from where the image is.
fn command(program: &str, args: &[&str]) -> Command {
    let image = args.iter().rev().map(Path::new).find(|a| a.is_absolute());
    let mut command = Command::new(program);
    command.args(args).current_dir(image.and_then(Path::parent).unwrap_or(Path::new("/")));
    command
}

fn tool(program: &str, args: &[&str]) -> Output {
    command(program, args).output().unwrap_or_else(|e| panic!("{program}: {e}; run: make test-deps"))
}

/// Runs a tool that must succeed.
#[track_caller]
fn run(program: &str, args: &[&str]) -> String {
    must_command(&mut command(program, args))
}

/// qemu-io with commands, on an image (`format` qcow2) or an export (raw).
fn io(format: &str, image: &str, commands: &[&str]) {
    let mut args = vec!["-f", format];
    for c in commands {
        args.extend(["-c", c]);
    }
    args.push(image);
    run("qemu-io", &args);
}

fn check(image: &Path) -> (Option<i32>, Value) {
    let ended = conbd(&["check", text(image), "--json"]);
    (ended.code, serde_json::from_str(&ended.stdout).unwrap_or_else(|e| panic!("{e}: {ended:?}")))
}

#[test]
fn created_images_are_what_qemu_expects() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    std::fs::write(&base, vec![0x5a; 1 << 20]).unwrap();
    for (flags, clean) in [
        (&["1G"][..], true),
        (&["0"], true),
        (&["1G", "--cluster-size", "512"], true),
        (&["64M", "--cluster-size", "2M", "--refcount-bits", "64"], true),
        (&["64M", "--cluster-size", "4k", "--refcount-bits", "1"], true),
        (&["64M", "--compat", "0.10"], true),
        (&["64M", "--extended-l2", "--cluster-size", "128k", "--compression-type", "zstd"], true),
        (&["64M", "--lazy-refcounts", "--preallocation", "metadata"], true),
        (&["8M", "--preallocation", "falloc", "--extended-l2"], true),
        (&["4M", "--preallocation", "full", "--cluster-size", "512"], true),
        (&["8M", "--data-file", "d1.raw"], true),
        (&["8M", "--data-file", "d2.raw", "--data-file-raw"], true),
        (&["--backing", "base.raw", "--backing-format", "raw"], true),
    ] {
        let image = dir.path().join("x.qcow2");
        let args = [&["create", text(&image)], flags].concat();
        let made = conbd(&args);
        assert_eq!(made.code, Some(0), "{flags:?}: {made:?}");
        assert_eq!(tool("qemu-img", &["check", text(&image)]).status.success(), clean, "{flags:?}");
        assert_eq!(check(&image).0, Some(0), "{flags:?}");
        let info: Value =
            serde_json::from_str(&run("qemu-img", &["info", "--output=json", text(&image)])).unwrap();
        let ours = conbd(&["inspect", text(&image), "--json"]);
        let ours: Value = serde_json::from_str(&ours.stdout).unwrap();
        assert_eq!(ours["virtual_size"], info["virtual-size"], "{flags:?}");
        assert_eq!(ours["cluster_size"], info["cluster-size"], "{flags:?}");
        assert_eq!(ours["compat"], info["format-specific"]["data"]["compat"], "{flags:?}");
        if info["virtual-size"] != 0 {
            io("qcow2", text(&image), &["write -P 7 64k 64k", "read -P 7 64k 64k"]);
            assert_eq!(check(&image).0, Some(0), "{flags:?}");
        }
        std::fs::remove_file(&image).unwrap();
    }
    let there = conbd(&["create", text(&base), "1M"]);
    assert_eq!(there.code, Some(1));
    assert!(there.error_line().contains("exists"), "{there:?}");
    for bad in [
        &["1M", "--cluster-size", "3k"][..],
        &["1M", "--refcount-bits", "3"],
        &["1M", "--extended-l2", "--cluster-size", "4k"],
        &["1M", "--compat", "0.10", "--lazy-refcounts"],
        &[],
    ] {
        let image = dir.path().join("bad.qcow2");
        assert_eq!(conbd(&[&["create", text(&image)], bad].concat()).code, Some(2), "{bad:?}");
        assert!(!image.exists(), "{bad:?}");
    }
}

/// Where the tables of a small image are.
struct Tables {
    bytes: Vec<u8>,
    l1: usize,
    l2: usize,
    reftable: usize,
    block: usize,
}

fn tables(image: &Path) -> Tables {
    let bytes = std::fs::read(image).unwrap();
    let at = |offset: usize| u64::from_be_bytes(bytes[offset..][..8].try_into().unwrap());
    let host = |word: u64| (word & 0x00ff_ffff_ffff_fe00) as usize;
    let (l1, reftable) = (host(at(40)), host(at(48)));
    let (l2, block) = (host(at(l1)), host(at(reftable)));
    Tables { bytes, l1, l2, reftable, block }
}

/// What is written over, and where.
type Edits = Vec<(usize, Vec<u8>)>;

#[test]
fn check_finds_what_qemu_finds_and_repair_mends_it() {
    let (_dir, raw) = image(1 << 20);
    let ended = conbd(&["check", text(&raw)]);
    assert_eq!(ended.code, tool("qemu-img", &["check", text(&raw)]).status.code());
    assert!(ended.error_line().contains("only qcow2 images have something to check"), "{ended:?}");
    let dir = tempfile::tempdir().unwrap();
    let good = dir.path().join("good.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&good), "64M"]);
    io("qcow2", text(&good), &["write -P 1 0 256k", "write -P 2 1M 64k"]);
    let t = tables(&good);
    let entry = |i: usize| u64::from_be_bytes(t.bytes[t.l2 + i * 8..][..8].try_into().unwrap());
    let copied = 1u64 << 63;
    let word = |at: usize, value: u64| (at, value.to_be_bytes().to_vec());
    // What is damaged; whether it can be mended.
    let cases: Vec<(&str, Edits, bool)> = vec![
        ("nothing", vec![], true),
        ("two entries, one cluster", vec![word(t.l2 + 8, entry(0))], true),
        ("cluster beyond the end", vec![word(t.l2 + 8, copied | 0x1000_0000)], false),
        ("unaligned cluster", vec![word(t.l2 + 8, copied | 0x50200)], false),
        ("refcount 0", vec![(t.block + 10, vec![0, 0])], true),
        ("refcount 2", vec![(t.block + 10, vec![0, 2])], true),
        ("leak", vec![word(t.l2 + 8, 0)], true),
        ("COPIED not set", vec![word(t.l2, entry(0) & !copied)], true),
        ("L2 table beyond the end", vec![word(t.l1, copied | 0x1000_0000)], false),
        ("no refcount block", vec![word(t.reftable, 0)], true),
        ("reserved bit", vec![word(t.l2 + 8, entry(1) | 2)], false),
        ("compressed entry into data", vec![word(t.l2 + 8, 1 << 62 | 0x50000)], true),
        ("many refcounts 0", vec![(t.block, vec![0; 20])], true),
    ];
    for (what, edits, mendable) in cases {
        let image = dir.path().join("damaged.qcow2");
        let mut bytes = t.bytes.clone();
        for (at, new) in edits {
            bytes[at..at + new.len()].copy_from_slice(&new);
        }
        std::fs::write(&image, &bytes).unwrap();
        let theirs = tool("qemu-img", &["check", "--output=json", text(&image)]);
        let told: Value = serde_json::from_slice(&theirs.stdout).unwrap();
        let (code, ours) = check(&image);
        assert_eq!(code, theirs.status.code(), "{what}: {ours}");
        for key in ["corruptions", "leaks"] {
            assert_eq!(ours[key], *told.get(key).unwrap_or(&Value::from(0)), "{what}: {key}: {ours}");
        }
        assert_eq!(std::fs::read(&image).unwrap(), bytes, "{what}: a check changes nothing");
        let repaired = conbd(&["check", text(&image), "--repair", "all"]);
        let after = tool("qemu-img", &["check", text(&image)]).status.code();
        assert_eq!(repaired.code, after, "{what}: {repaired:?}");
        assert_eq!(after == Some(0), mendable, "{what}: {repaired:?}");
        if mendable && code != Some(2) {
            io("qcow2", text(&image), &["read -P 2 1M 64k"]);
        }
    }
}

#[test]
fn leaks_are_repaired_alone_and_marks_are_cleared() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("x.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&image), "64M"]);
    io("qcow2", text(&image), &["write -P 1 0 256k"]);
    let t = tables(&image);
    let mut bytes = t.bytes.clone();
    bytes[t.block + 11] = 2; // a leak, which makes a COPIED flag wrong
    bytes[79] |= 2; // corrupt
    std::fs::write(&image, &bytes).unwrap();
    assert_eq!(
        conbd(&["serve", text(&image), "--listen", "127.0.0.1:0", "--log-level", "off"]).code,
        Some(1)
    );
    let ended = conbd(&["check", text(&image), "--repair", "leaks"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(std::fs::read(&image).unwrap()[79] & 2, 2, "only --repair all clears the mark");
    assert_eq!(conbd(&["check", text(&image), "--repair", "all"]).code, Some(0));
    assert_eq!(std::fs::read(&image).unwrap()[79] & 2, 0);
    run("qemu-img", &["check", text(&image)]);
}

#[test]
fn a_dirty_image_is_repaired_when_it_is_opened_for_writing() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("x.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", text(&image), "64M"]);
    io("qcow2", text(&image), &["write -P 1 0 256k"]);
    let t = tables(&image);
    let mut bytes = t.bytes.clone();
    bytes[79] |= 1;
    bytes[t.block + 10..t.block + 14].fill(0);
    std::fs::write(&image, &bytes).unwrap();
    let reader = Serving::start(&[text(&image), "--read-only", "--listen", "127.0.0.1:0"], 1);
    run("qemu-io", &["-r", "-f", "raw", "-c", "read -P 1 0 256k", reader.uri()]);
    assert_eq!(reader.stop().0, Some(0));
    assert_eq!(std::fs::read(&image).unwrap(), bytes, "reading changes nothing");
    let serving = Serving::start(&[text(&image), "--listen", "127.0.0.1:0"], 1);
    io("raw", serving.uri(), &["read -P 1 0 256k", "write -P 9 1M 64k"]);
    assert_eq!(serving.stop().0, Some(0));
    run("qemu-img", &["check", text(&image)]);
    io("qcow2", text(&image), &["read -P 1 0 256k", "read -P 9 1M 64k"]);
}

/// base.raw (0x11 everywhere) ← middle.qcow2 (0x22 at 1M) ← top.qcow2 (0x33 at 2M), named relatively.
fn chain(dir: &Path) -> PathBuf {
    let at = |name: &str| dir.join(name);
    std::fs::write(at("base.raw"), vec![0x11; 4 << 20]).unwrap();
    let (middle, top) = (at("middle.qcow2"), at("top.qcow2"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", text(&middle)]);
    io("qcow2", text(&middle), &["write -P 0x22 1M 64k"]);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", text(&top), "8M"]);
    io("qcow2", text(&top), &["write -P 0x33 2M 64k"]);
    top
}

#[test]
fn a_chain_is_served_and_only_its_top_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let top = chain(dir.path());
    let below = || ["base.raw", "middle.qcow2"].map(|n| std::fs::read(dir.path().join(n)).unwrap());
    let before = below();
    let serving = Serving::start(&[text(&top), "--listen", "127.0.0.1:0", "--allocation-depth"], 1);
    let reads = ["read -P 0x11 0 1M", "read -P 0x22 1M 64k", "read -P 0x33 2M 64k", "read -P 0 4M 4M"];
    io("raw", serving.uri(), &reads);
    io("raw", serving.uri(), &["write -P 0x44 1028k 4k", "flush"]);
    let depth = run("nbdinfo", &["--map=qemu:allocation-depth", serving.uri()]);
    for want in ["1048576       65536    1", "2097152       65536    1"] {
        assert!(depth.contains(want), "{want:?} is not in\n{depth}");
    }
    assert_eq!(serving.stop().0, Some(0));
    assert_eq!(below(), before);
    run("qemu-img", &["check", text(&top)]);
    io("qcow2", text(&top), &["read -P 0x22 1M 4k", "read -P 0x44 1028k 4k", "read -P 0x22 1032k 56k"]);
}

#[test]
fn what_a_chain_must_not_be_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let refused = |image: &str, more: &[&str], want: &str| {
        let image = path(image);
        let args = [&["serve", text(&image), "--listen", "127.0.0.1:0", "--log-level", "off"], more].concat();
        let ended = conbd(&args);
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(ended.error_line().contains(want), "{want:?} is not in {ended:?}");
    };
    let create = |name: &str, backing: &str, format: Option<&str>| {
        let format: Vec<&str> = format.iter().flat_map(|f| ["-F", f]).collect();
        let image = path(name);
        let args =
            [&["create", "-q", "-u", "-f", "qcow2", "-b", backing], &format[..], &[text(&image), "1M"]];
        run("qemu-img", &args.concat());
    };
    // A loop of two.
    create("a.qcow2", "b.qcow2", Some("qcow2"));
    create("b.qcow2", "a.qcow2", Some("qcow2"));
    refused("a.qcow2", &[], "loop");
    create("gone.qcow2", "nothing.raw", Some("raw"));
    refused("gone.qcow2", &[], "nothing.raw\" does not exist");
    create("remote.qcow2", "nbd://127.0.0.1:1/x", Some("raw"));
    refused("remote.qcow2", &[], "--allow-backing-nbd");
    create("ssh.qcow2", "ssh://127.0.0.1:1/x", Some("raw"));
    refused("ssh.qcow2", &["--allow-backing-nbd"], "protocol");
    create("vm.qcow2", "x.vmdk", Some("vmdk"));
    refused("vm.qcow2", &[], "\"vmdk\" is not supported");
    // A format that is not recorded: made by clearing the extension's type.
    std::fs::write(path("base.raw"), vec![0x11; 1 << 20]).unwrap();
    create("untold.qcow2", "base.raw", Some("raw"));
    let mut bytes = std::fs::read(path("untold.qcow2")).unwrap();
    let at = bytes.windows(4).position(|w| w == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
    bytes[at] = 0x12;
    std::fs::write(path("untold.qcow2"), bytes).unwrap();
    refused("untold.qcow2", &[], "does not record the format");
    let untold = path("untold.qcow2");
    let serving = Serving::start(&[text(&untold), "--allow-backing-probe", "--listen", "127.0.0.1:0"], 1);
    io("raw", serving.uri(), &["read -P 0x11 0 1M"]);
    // In use: by another process's lock, and without locks by another export of the same process.
    refused("untold.qcow2", &["--allow-backing-probe"], "in use");
    drop(serving);
    let config = path("two.toml");
    let export = |name: &str| {
        format!("[[export]]\nname = '{name}'\nimage = 'untold.qcow2'\nlock = 'off'\nbacking_probe = true\n")
    };
    std::fs::write(&config, export("one") + &export("two")).unwrap();
    let ended = conbd(&["serve", "--config", text(&config), "--listen", "127.0.0.1:0", "--log-level", "off"]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.error_line().contains("another export"), "{ended:?}");
}

#[test]
fn json_names_snapshots_and_data_files_are_followed() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("base.raw"), vec![0x11; 1 << 20]).unwrap();
    let name = r#"json:{"driver":"raw","file":{"driver":"file","filename":"base.raw"}}"#;
    let top = path("json.qcow2");
    run("qemu-img", &["create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", text(&top), "1M"]);
    let serving = Serving::start(&[text(&top), "--listen", "127.0.0.1:0"], 1);
    io("raw", serving.uri(), &["read -P 0x11 0 1M"]);
    assert_eq!(serving.stop().0, Some(0));

    let snapped = path("snapped.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&snapped), "4M"]);
    io("qcow2", text(&snapped), &["write -P 1 0 128k"]);
    run("qemu-img", &["snapshot", "-c", "before", text(&snapped)]);
    io("qcow2", text(&snapped), &["write -P 2 0 64k"]);
    let serving = Serving::start(&[text(&snapped), "--snapshot", "before", "--listen", "127.0.0.1:0"], 1);
    run("qemu-io", &["-r", "-f", "raw", "-c", "read -P 1 0 128k", serving.uri()]);
    assert_eq!(serving.stop().0, Some(0));
    let serving = Serving::start(&[text(&snapped), "--listen", "127.0.0.1:0"], 1);
    io("raw", serving.uri(), &["read -P 2 0 64k", "write -P 3 64k 64k"]);
    assert_eq!(serving.stop().0, Some(0));
    assert_eq!(check(&snapped).0, Some(0));
    run("qemu-img", &["check", text(&snapped)]);
    let report = conbd(&["inspect", text(&snapped)]);
    assert!(report.stdout.contains("snapshot 1: before"), "{report:?}");

    let split = path("split.qcow2");
    assert_eq!(
        conbd(&["create", text(&split), "4M", "--data-file", "split.raw", "--data-file-raw"]).code,
        Some(0)
    );
    let serving = Serving::start(&[text(&split), "--listen", "127.0.0.1:0"], 1);
    io("raw", serving.uri(), &["write -P 5 1M 64k", "flush"]);
    assert_eq!(serving.stop().0, Some(0));
    io("raw", text(&path("split.raw")), &["read -P 5 1M 64k"]);
    io("qcow2", text(&split), &["read -P 5 1M 64k"]);
    run("qemu-img", &["check", text(&split)]);
}

#[test]
fn resize_makes_larger_and_never_smaller() {
    let dir = tempfile::tempdir().unwrap();
    let top = chain(dir.path());
    assert_eq!(conbd(&["resize", text(&top), "4M"]).code, Some(1));
    let grown = conbd(&["resize", text(&top), "1G"]);
    assert_eq!(grown.code, Some(0), "{grown:?}");
    run("qemu-img", &["check", text(&top)]);
    io("qcow2", text(&top), &["read -P 0x33 2M 64k", "read -P 0 8M 1M", "write -P 1 1023M 1M"]);
    let raw = dir.path().join("base.raw");
    assert_eq!(conbd(&["resize", text(&raw), "5M", "--format", "raw"]).code, Some(0));
    assert_eq!(std::fs::metadata(&raw).unwrap().len(), 5 << 20);
}

#[test]
fn persistent_bitmaps_are_kept_shown_and_stored() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("x.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&image), "64M"]);
    run("qemu-img", &["bitmap", "--add", "--enable", "-g", "64k", text(&image), "on"]);
    run("qemu-img", &["bitmap", "--add", "--disable", "-g", "64k", text(&image), "off"]);
    io("qcow2", text(&image), &["write -P 1 1M 64k"]);
    let map = |uri: &str| run("nbdinfo", &["--map=qemu:dirty-bitmap:on", "--json", uri]);
    let flags = |image: &Path| {
        let report = conbd(&["inspect", text(image), "--json"]);
        let report: Value = serde_json::from_str(&report.stdout).unwrap();
        report["bitmaps"].as_array().unwrap().iter().map(|b| b["flags"].to_string()).collect::<Vec<_>>()
    };
    let args = [text(&image), "--bitmap", "on", "--bitmap", "off", "--listen", "127.0.0.1:0"];
    let serving = Serving::start(&args, 1);
    assert_eq!(flags(&image), [r#"["auto"]"#, "[]"]);
    io("raw", serving.uri(), &["write -P 2 10M 128k", "write -z 20M 64k", "discard 30M 64k", "flush"]);
    assert_eq!(flags(&image), [r#"["in-use","auto"]"#, "[]"], "marked before the first change");
    let ours = map(serving.uri());
    // A crash now would leave a bitmap that nobody believes.
    let crashed = dir.path().join("crashed.qcow2");
    std::fs::copy(&image, &crashed).unwrap();
    assert_eq!(serving.stop().0, Some(0));
    assert_eq!(flags(&image), [r#"["auto"]"#, "[]"]);
    run("qemu-img", &["check", text(&image)]);
    assert_eq!(check(&image).0, Some(0));
    let ended =
        conbd(&["serve", text(&crashed), "--bitmap", "on", "--listen", "127.0.0.1:0", "--log-level", "off"]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.error_line().contains("marked in use"), "{ended:?}");

    // qemu-nbd shows what we stored, and we show it again.
    let socket = dir.path().join("s");
    let args = ["-r", "-t", "-f", "qcow2", "-B", "on", "-k", text(&socket), text(&image)];
    let theirs = peer("qemu-nbd", &args, &socket);
    let shown = map(&format!("nbd+unix:///?socket={}", text(&socket)));
    drop(theirs);
    let extents = |json: &str| -> Vec<(u64, u64, u64)> {
        let value: Value = serde_json::from_str(json).unwrap();
        let number = |e: &Value, key: &str| e[key].as_u64().unwrap();
        value
            .as_array()
            .unwrap()
            .iter()
            .map(|e| (number(e, "offset"), number(e, "length"), number(e, "type")))
            .collect()
    };
    let dirty: Vec<(u64, u64)> =
        extents(&shown).into_iter().filter(|e| e.2 == 1).map(|e| (e.0 >> 16, e.1 >> 16)).collect();
    for want in [(16, 1), (160, 2), (320, 1), (480, 1)] {
        assert!(dirty.contains(&want), "{want:?} is not in {dirty:?}");
    }
    assert_eq!(extents(&ours), extents(&shown));
    let serving =
        Serving::start(&[text(&image), "--read-only", "--bitmap", "on", "--listen", "127.0.0.1:0"], 1);
    assert_eq!(extents(&map(serving.uri())), extents(&shown));
    assert_eq!(serving.stop().0, Some(0));
}
