//! libnbd: nbdinfo, nbdsh and the Python bindings.

use crate::harness::{
    Builder, Server, Setup, TCP_1_THREADS, TCP_3_IO_URING, UNIX_1_IO_URING, UNIX_3_THREADS, matrix,
    write_sparse,
};
use crate::tools::{python, run};
use serde_json::Value;

const MIB: u64 = 1 << 20;

matrix!(nbdinfo_shows_what_is_offered, every_command_and_flag, requests_of_64_mib);

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

fn nbdinfo_shows_what_is_offered(setup: Setup) {
    let builder = Builder::new(setup).args(&["--export", "disk", "--description", "the blue one"]);
    write_sparse(&builder.image(), 16 * MIB, 5);
    let server = builder.start();
    for uri in [server.uri.clone(), server.uri_of("disk"), server.uri_of("")] {
        let info = json(&run("nbdinfo", &["--json", &uri]).ok());
        assert_eq!(info["protocol"], "newstyle-fixed");
        assert_eq!(info["TLS"], false);
        assert_eq!(info["structured"], true);
        let export = &info["exports"][0];
        assert_eq!(export["export-size"], 16 * MIB, "{export}");
        assert_eq!(export["description"], "the blue one", "{export}");
        assert_eq!(export["contexts"], serde_json::json!(["base:allocation"]), "{export}");
        let yes = [
            "can_cache",
            "can_df",
            "can_fast_zero",
            "can_flush",
            "can_fua",
            "can_multi_conn",
            "can_trim",
            "can_zero",
        ];
        yes.iter().for_each(|key| assert_eq!(export[key], true, "{key} in {export}"));
        assert_eq!(export["is_read_only"], false, "{export}");
        assert_eq!(export["block_size_minimum"], 1, "{export}");
    }
    let list = json(&run("nbdinfo", &["--list", "--json", &server.uri]).ok());
    assert_eq!(list["exports"].as_array().unwrap().len(), 1, "{list}");
    assert_eq!(list["exports"][0]["export-name"], "disk", "{list}");

    let map = json(&run("nbdinfo", &["--map", "--json", &server.uri]).ok());
    let extents: Vec<(u64, u64, u64)> = map
        .as_array()
        .unwrap()
        .iter()
        .map(|e| (e["offset"].as_u64().unwrap(), e["length"].as_u64().unwrap(), e["type"].as_u64().unwrap()))
        .collect();
    // `write_sparse`: parts 0, 3, 6, 9, 12 and 15 of 1 MiB hold data.
    let expected: Vec<(u64, u64, u64)> =
        (0..16).step_by(3).flat_map(|i| [(i * MIB, MIB, 0), ((i + 1) * MIB, 2 * MIB, 3)]).take(11).collect();
    assert_eq!(extents, expected);
    assert!(run("nbdinfo", &["--can", "multi-conn", &server.uri]).code == Some(0));
    let missing = run("nbdinfo", &[server.uri_of("nothing")]);
    assert_ne!(missing.code, Some(0));
    server.stop();
}

fn every_command_and_flag(setup: Setup) {
    let server = Builder::new(setup).image_len(8 * MIB).start();
    assert_eq!(python(include_str!("every_command.py"), &[&server.uri]).ok(), "ok\n");
    server.stop();
}

fn requests_of_64_mib(setup: Setup) {
    let server = Builder::new(setup).image_len(160 * MIB).start();
    assert_eq!(python(include_str!("large_requests.py"), &[&server.uri]).ok(), "ok\n");
    server.stop();
}

#[test]
fn nbdsh_connects_reads_and_writes() {
    let server = Server::plain(UNIX_1_IO_URING);
    let program =
        "h.pwrite(b'hello', 100); h.flush(); assert h.pread(7, 99) == b'\\0hello\\0'; print(h.get_size())";
    let out = run("nbdsh", &["-u", &server.uri, "-c", program]).ok();
    assert_eq!(out.trim(), "67108864");
    server.stop();
}

#[test]
fn options_of_the_handshake() {
    for setup in [UNIX_3_THREADS, TCP_1_THREADS] {
        let builder = Builder::new(setup);
        let mut config = String::new();
        for (name, description) in [("disk", "the first"), ("data/2", ""), ("\u{f6}l", "oil")] {
            let image = format!("{}.raw", config.len());
            std::fs::File::create(builder.path(&image)).unwrap().set_len(MIB).unwrap();
            config += &format!(
                "[[export]]\nimage = \"{image}\"\nname = \"{name}\"\ndescription = \"{description}\"\n"
            );
        }
        let server = builder.config(&config).start();
        let root = server.uri_of("");
        assert_eq!(
            python(include_str!("options.py"), &[&root, "disk,data/2,\u{f6}l", "the first"]).ok(),
            "ok\n"
        );
        let list = json(&run("nbdinfo", &["--list", "--json", &root]).ok());
        assert_eq!(list["exports"].as_array().unwrap().len(), 3, "{list}");
        server.stop();
    }
}

#[test]
fn a_read_only_export_refuses_every_change() {
    let server = Builder::new(TCP_3_IO_URING).image_data(&[7; 65536]).args(&["--read-only"]).start();
    let program = "
import errno, nbd, sys
h = nbd.NBD()
h.set_strict_mode(0)
h.connect_uri(sys.argv[1])
assert h.is_read_only()
for call in (lambda: h.pwrite(b'x' * 4096, 0), lambda: h.zero(4096, 0), lambda: h.trim(4096, 0), lambda: h.pwrite(b'x', 65536)):
    try:
        call()
        raise AssertionError('not refused')
    except nbd.Error as e:
        assert e.errnum == errno.EPERM, e
h.flush()
assert h.pread(65536, 0) == bytes([7]) * 65536
h.shutdown()
print('ok')
";
    assert_eq!(python(program, &[&server.uri]).ok(), "ok\n");
    let stopped = server.stop();
    assert!(std::fs::read(stopped.image()).unwrap() == [7; 65536]);
}
