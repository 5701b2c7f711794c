//! qemu-img and qemu-io.

use crate::harness::{Builder, Server, Setup, allocated, assert_same, matrix, noise, write_sparse};
use crate::tools::run;
use serde_json::Value;

const MIB: u64 = 1 << 20;

matrix!(convert_and_compare, map_shows_holes, io_patterns);

/// qemu-img copies a sparse disk in and out again; a compare against the server agrees each time.
fn convert_and_compare(setup: Setup) {
    let server = Builder::new(setup).image_len(48 * MIB).start();
    let (source, back) = (server.path("source.raw"), server.path("back.qcow2"));
    write_sparse(&source, 48 * MIB, 1);
    let (source, back) = (source.to_str().unwrap(), back.to_str().unwrap());
    let uri = server.uri.clone();

    let info: Value = serde_json::from_str(&run("qemu-img", &["info", "--output=json", &uri]).ok()).unwrap();
    assert_eq!(info["virtual-size"], 48 * MIB);

    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "8", source, &uri]).ok();
    let same = run("qemu-img", &["compare", "-f", "raw", "-F", "raw", source, &uri]).ok();
    assert!(same.contains("identical"), "{same}");
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "-m", "8", &uri, back]).ok();
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", source, back]).ok();
    run("qemu-img", &["check", back]).ok();

    // A difference is found: the comparison is not of nothing with nothing.
    run("qemu-io", &["-f", "raw", "-c", "write -P 0x5a 20M 4k", &uri]).ok();
    let differs = run("qemu-img", &["compare", "-f", "raw", "-F", "raw", source, &uri]);
    assert_eq!(differs.code, Some(1), "{differs:?}");
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", source, &uri]).ok();

    let stopped = server.stop();
    assert_same(std::path::Path::new(source), &stopped.image());
}

/// `qemu-img map` sees data and holes where they are.
fn map_shows_holes(setup: Setup) {
    let server = Builder::new(setup).image_len(16 * MIB).start();
    run("qemu-io", &["-f", "raw", "-c", "write -P 1 1M 2M", "-c", "write -P 2 8M 64k", &server.uri]).ok();
    let map = run("qemu-img", &["map", "-f", "raw", "--output=json", &server.uri]).ok();
    let map: Vec<Value> = serde_json::from_str(&map).unwrap();
    let data_at = |offset: u64| {
        let extent = map.iter().find(|e| {
            let start = e["start"].as_u64().unwrap();
            (start..start + e["length"].as_u64().unwrap()).contains(&offset)
        });
        let extent = extent.unwrap_or_else(|| panic!("nothing at {offset} in {map:#?}"));
        assert_eq!(extent["zero"], !extent["data"].as_bool().unwrap(), "{extent}");
        extent["data"].as_bool().unwrap()
    };
    let edges = [(0, false), (MIB - 1, false), (MIB, true), (3 * MIB - 1, true), (3 * MIB, false)];
    let more = [(8 * MIB - 1, false), (8 * MIB, true), (8 * MIB + 65535, true), (8 * MIB + 65536, false)];
    for (offset, expected) in edges.into_iter().chain(more).chain([(16 * MIB - 1, false)]) {
        assert_eq!(data_at(offset), expected, "at {offset}: {map:#?}");
    }
    let end: u64 = map.iter().map(|e| e["length"].as_u64().unwrap()).sum();
    assert_eq!(end, 16 * MIB);
    server.stop();
}

/// Every kind of request that qemu-io can make, checked by patterns, at aligned and odd offsets.
fn io_patterns(setup: Setup) {
    let server = Builder::new(setup).image_len(32 * MIB).start();
    let script = [
        "write -P 0x11 0 1M",
        "read -P 0x11 0 1M",
        "read -P 0 1M 1M",
        "writev -P 0x22 2M 4k 8k 512 60k",
        "readv -P 0x22 2M 64k 4k 4608",
        "aio_write -P 0x33 4M 128k",
        "aio_write -P 0x34 5M 128k",
        "aio_write -P 0x35 6M 128k",
        "aio_flush",
        "aio_read -P 0x33 4M 128k",
        "aio_read -P 0x34 5M 128k",
        "aio_read -P 0x35 6M 128k",
        "aio_flush",
        // Zeroes with and without unmapping, neighbours stay.
        "write -P 0x44 8M 1M",
        "write -z 8256k 64k",
        "read -P 0x44 8M 64k",
        "read -P 0 8256k 64k",
        "read -P 0x44 8320k 704k",
        "write -z -u 8448k 128k",
        "read -P 0 8448k 128k",
        "read -P 0x44 8576k 64k",
        "discard 8704k 64k",
        "read -P 0 8704k 64k",
        "read -P 0x44 8640k 64k",
        // FUA, and unaligned data.
        "write -f -P 0x55 10M 64k",
        "write -f -z 10304k 16k",
        "flush",
        "read -P 0x55 10M 64k",
        "write -P 0x66 12582913 1",
        "write -P 0x67 12582914 513",
        "read -P 0 12582912 1",
        "read -P 0x66 12582913 1",
        "read -P 0x67 12582914 513",
        "read -P 0 12583427 5",
        "write -z 12582920 7",
        "read -P 0x67 12582914 6",
        "read -P 0 12582920 7",
        "read -P 0x67 12582927 500",
        // One large request, and the disk's last bytes.
        "write -P 0x77 16M 16M",
        "read -P 0x77 16M 16M",
        "write -P 0x78 33554431 1",
        "read -P 0x78 33554431 1",
        "flush",
    ];
    let mut args = vec!["-f", "raw", "-d", "unmap"];
    script.iter().for_each(|line| args.extend(["-c", line]));
    args.push(&server.uri);
    let out = run("qemu-io", &args).ok();
    assert!(!out.contains("failed"), "{out}");

    // A second process sees the same; reading over the end is refused by qemu-io's own client.
    let again = run(
        "qemu-io",
        &["-f", "raw", "-c", "read -P 0x33 4M 128k", "-c", "read -P 0x78 33554431 1", &server.uri],
    );
    assert!(!again.ok().contains("failed"));
    let image = std::fs::read(server.image()).unwrap();
    assert!(image[..1 << 20].iter().all(|&b| b == 0x11));
    assert!(image[16 << 20..(32 << 20) - 1].iter().all(|&b| b == 0x77));
    server.stop();
}

#[test]
fn discard_gives_space_back_and_zeroes_keep_it_unless_told() {
    let server = Builder::new(crate::harness::UNIX_3_THREADS).image_data(&noise(8 << 20, 3)).start();
    let before = allocated(&server.image());
    assert!(before >= 8 << 20);
    let io = |line: &str| {
        run("qemu-io", &["-f", "raw", "-d", "unmap", "-c", line, "-c", "flush", &server.uri]).ok()
    };
    io("write -z 0 1M");
    assert!(allocated(&server.image()) >= before, "zeroes without -u stay allocated");
    io("discard 1M 1M");
    let discarded = allocated(&server.image());
    assert!(discarded <= before - (1 << 20), "{before} became {discarded}");
    io("write -z -u 2M 1M");
    assert!(allocated(&server.image()) <= discarded - (1 << 20));
    server.stop();
}

#[test]
fn four_qemu_clients_at_once() {
    let server = Server::plain(crate::harness::TCP_3_IO_URING);
    let threads: Vec<_> = (0..4)
        .map(|i| {
            let uri = server.uri.clone();
            std::thread::spawn(move || {
                let at = i * 16;
                let write = format!("write -P {} {at}M 16M", i + 1);
                let read = format!("read -P {} {at}M 16M", i + 1);
                run("qemu-io", &["-f", "raw", "-c", &write, "-c", "flush", "-c", &read, &uri]).ok()
            })
        })
        .collect();
    threads.into_iter().for_each(|t| assert!(!t.join().unwrap().contains("failed")));
    let stopped = server.stop();
    let image = std::fs::read(stopped.image()).unwrap();
    for (i, part) in image.chunks(16 << 20).enumerate() {
        assert!(part.iter().all(|&b| usize::from(b) == i + 1), "part {i}");
    }
}
