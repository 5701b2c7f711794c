//! The configuration file and the flags, as a user meets them: what is accepted, which wins, and that every error
//! names file, line and column and says what to do.

use conbd::config::{Aio, Cache, Config, ConfigError, Discard, Lock, LogFormat, ServeFlags, Size};
use std::path::{Path, PathBuf};
use std::time::Duration;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse("conbd.toml", Path::new("/etc/conbd"), text)
}

/// Expects an error at `place` ("line:column") that contains every one of `words`.
fn refused(text: &str, place: &str, words: &[&str]) {
    let message = parse(text).expect_err(text).to_string();
    assert!(message.starts_with(&format!("conbd.toml:{place}: ")), "{message}\nshould be at {place}");
    for word in words {
        assert!(message.contains(word), "{message}\nshould say {word}");
    }
}

#[test]
fn a_full_file_is_taken_as_written() {
    let config = parse(
        r#"
        [server]
        listen = ["[::1]:10809", "localhost:0"]
        socket = ["run/nbd.sock", "/run/x.sock"]
        iothreads = 3
        aio = "threads"
        pool_threads = 2
        poll_max = "50us"
        shutdown_timeout = "1m"
        [limits]
        max_connections = 7
        bytes_total = "2G"
        [log]
        level = "debug"
        format = "json"
        [[export]]
        name = "a"
        image = "a.raw"
        read_only = true
        cache = "none"
        discard = "ignore"
        lock = "shared"
        description = "the first"
        offset = 512
        size = "1M"
        [[export]]
        name = "b"
        image = "/b.raw"
        "#,
    )
    .expect("a right file");
    assert_eq!(config.server.listen, ["[::1]:10809", "localhost:0"]);
    assert_eq!(config.server.socket, [Path::new("/etc/conbd/run/nbd.sock"), Path::new("/run/x.sock")]);
    assert_eq!((config.server.iothreads, config.server.pool_threads), (3, 2));
    assert_eq!(config.server.aio, Aio::Threads);
    assert_eq!(config.server.poll_max, Duration::from_micros(50));
    assert_eq!(config.server.shutdown_timeout, Duration::from_secs(60));
    assert_eq!(config.limits.max_connections, 7);
    assert_eq!(config.limits.bytes_total, Size(2 << 30));
    assert_eq!((config.log.level.as_str(), config.log.format), ("debug", LogFormat::Json));
    let a = &config.exports[0];
    assert_eq!((a.name.as_str(), a.image.as_path()), ("a", Path::new("/etc/conbd/a.raw")));
    assert_eq!((a.read_only, a.cache, a.discard, a.lock), (true, Cache::None, Discard::Ignore, Lock::Shared));
    assert_eq!((a.offset, a.size), (Size(512), Some(Size(1 << 20))));
    assert_eq!(a.description, "the first");
    assert_eq!(config.exports[1].image, Path::new("/b.raw"));
}

#[test]
fn a_socket_alone_switches_tcp_off_and_nothing_at_all_means_loopback() {
    let config = parse("[server]\nsocket = ['/s']").expect("right");
    assert!(config.server.listen.is_empty());
    let config = parse("[server]\nsocket = []\nlisten = []").expect("right");
    assert_eq!(config.server.listen, ["127.0.0.1:10809"]);
    let config = parse("").expect("an empty file has only defaults");
    assert_eq!(config.server.listen, ["127.0.0.1:10809"]);
}

#[test]
fn every_wrong_value_is_refused_with_its_place_and_advice() {
    refused("[server]\n  lissten = []\n", "2:3", &["unknown field `lissten`", "`listen`", "conbd.toml(5)"]);
    refused("[sever]\n", "1:2", &["unknown field `sever`", "`server`"]);
    refused("[server]\nlisten = '127.0.0.1:1'\n", "2:10", &["expected a sequence"]);
    refused("server = 3\n", "1:10", &["expected a table", "conbd.toml(5)"]);
    refused(
        "[server]\nlisten = ['a:1', 'b']\n",
        "2:18",
        &["\"b\"", "the port is missing", "127.0.0.1:10809"],
    );
    refused("[server]\nlisten = ['a:99999']\n", "2:11", &["the port must be a number from 0 to 65535"]);
    refused("[server]\nlisten = ['*:10809']\n", "2:11", &["the address is missing", "0.0.0.0"]);
    refused("[server]\nlisten = [':10809']\n", "2:11", &["the address is missing"]);
    refused("[server]\nlisten = ['::1:10809']\n", "2:11", &["an IPv6 address goes in brackets"]);
    let long = format!("[server]\nsocket = ['/{}']\n", "x".repeat(107));
    refused(&long, "2:11", &["108 bytes", "107"]);
    refused("[server]\niothreads = 257\n", "2:13", &["iothreads is 257", "0 to 256"]);
    refused("[server]\niothreads = -1\n", "2:13", &["-1"]);
    refused("[server]\naio = 'uring'\n", "2:7", &["unknown variant `uring`", "`io_uring`"]);
    refused("[server]\npool_threads = 0\n", "2:16", &["1 to 1024"]);
    refused("[server]\nshutdown_timeout = 10\n", "2:20", &["a length of time in quotes"]);
    refused("[server]\nshutdown_timeout = '0s'\n", "2:20", &["longer than zero"]);
    refused("[server]\npoll_max = '50'\n", "2:12", &["\"50\" is not a length of time", "ms"]);
    refused("[limits]\nmax_connections = 0\n", "2:19", &["1 to 1000000"]);
    refused("[limits]\nrequests_per_connection = 0\n", "2:27", &["1 to 65536"]);
    refused("[limits]\nbytes_per_connection = '1M'\n", "2:24", &["at least the largest request, 64 MiB"]);
    refused(
        "[limits]\nbytes_per_connection = '2G'\nbytes_total = '1G'\n",
        "3:15",
        &["less than bytes_per_connection"],
    );
    refused("[limits]\nbytes_total = '1X'\n", "2:15", &["\"1X\" is not a size", "64M"]);
    refused("[limits]\nbytes_total = -1\n", "2:15", &["cannot be negative"]);
    refused("[log]\nlevel = 'chatty'\n", "2:9", &["\"chatty\" is no log level", "debug"]);
    refused("[log]\nformat = 'xml'\n", "2:10", &["unknown variant `xml`", "`json`"]);
    refused("[[export]]\nname = 'a'\n", "1:1", &["missing field `image`"]);
    refused("[[export]]\nimage = ''\n", "2:9", &["image is empty"]);
    refused("[[export]]\nimage = 'a'\n[[export]]\nimage = 'b'\n", "4:9", &["a second export named \"\""]);
    refused(
        "[[export]]\nimage = 'a'\nname = 'x'\n[[export]]\nimage = 'b'\nname = 'x'\n",
        "6:8",
        &["a second export named \"x\""],
    );
    let long = format!("[[export]]\nimage = 'a'\nname = '{}'\n", "n".repeat(4097));
    refused(&long, "3:8", &["4097 bytes", "4096"]);
    refused("[[export]]\nimage = 'a'\ndescription = \"a\\u0000b\"\n", "3:15", &["NUL"]);
    refused("[[export]]\nimage = 'a'\nsize = 0\n", "3:8", &["size is 0"]);
    refused("[[export]]\nimage = 'a'\nformat = 'vmdk'\n", "3:10", &["unknown variant `vmdk`", "`raw`"]);
    refused("[[export]]\nimage = 'a'\ncache = 'fast'\n", "3:9", &["unknown variant `fast`", "`writeback`"]);
    refused("[server\n", "1:8", &["conbd.toml(5)"]);
    refused("ä = 1\n", "1:1", &[]);
}

#[test]
fn flags_win_over_the_file_and_the_file_over_the_defaults() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("c.toml");
    std::fs::write(
        &file,
        "[server]\nlisten = ['127.0.0.1:1']\nsocket = ['s']\niothreads = 2\n[log]\nlevel = 'warn'\n\
         [[export]]\nimage = 'a'\ncache = 'none'\n[[export]]\nimage = 'b'\nname = 'b'\nread_only = true\n",
    )
    .expect("a file");
    let flags = ServeFlags { config: Some(file.clone()), ..ServeFlags::default() };
    let config = Config::load(&flags).expect("right");
    assert_eq!((config.server.iothreads, config.log.level.as_str()), (2, "warn"));
    assert_eq!(config.server.aio, Aio::Auto);
    assert_eq!(config.exports[0].image, dir.path().join("a"));

    let flags = ServeFlags {
        listen: vec!["[::1]:2".to_owned()],
        iothreads: Some(5),
        cache: Some(Cache::Unsafe),
        lock: Some(Lock::Off),
        log_level: Some("debug".to_owned()),
        read_only: true,
        ..flags
    };
    let config = Config::load(&flags).expect("right");
    assert_eq!(config.server.listen, ["[::1]:2"]);
    assert!(config.server.socket.is_empty(), "listeners on the command line replace the file's, all of them");
    assert_eq!((config.server.iothreads, config.log.level.as_str()), (5, "debug"));
    for export in &config.exports {
        assert_eq!((export.cache, export.lock, export.read_only), (Cache::Unsafe, Lock::Off, true));
    }
    assert!(config.notes.is_empty());

    let flags = ServeFlags {
        image: Some(PathBuf::from("c.raw")),
        export: Some("c".to_owned()),
        size: Some(Size(512)),
        ..flags
    };
    let config = Config::load(&flags).expect("right");
    assert_eq!(config.exports.len(), 1, "an image on the command line replaces the file's exports");
    assert_eq!((config.exports[0].name.as_str(), config.exports[0].size), ("c", Some(Size(512))));
    assert_eq!(config.notes.len(), 1, "and the log says so");
}

#[test]
fn wrong_flags_are_refused_with_advice() {
    let check = |flags: ServeFlags, words: &[&str]| {
        let message = Config::load(&flags).expect_err("wrong flags").to_string();
        for word in words {
            assert!(message.contains(word), "{message}\nshould say {word}");
        }
    };
    let image = || ServeFlags { image: Some(PathBuf::from("a")), ..ServeFlags::default() };
    check(ServeFlags::default(), &["nothing to serve", "conbd serve disk.raw", "--config"]);
    check(ServeFlags { listen: vec!["x".to_owned()], ..image() }, &["--listen x", "the port is missing"]);
    check(ServeFlags { socket: vec![PathBuf::from("s".repeat(200))], ..image() }, &["--socket", "200 bytes"]);
    check(ServeFlags { iothreads: Some(1000), ..image() }, &["--iothreads 1000", "1 to 256"]);
    check(ServeFlags { log_level: Some("loud".to_owned()), ..image() }, &["--log-level loud", "debug"]);
    check(ServeFlags { export: Some("n".repeat(5000)), ..image() }, &["--export", "5000 bytes"]);
    check(ServeFlags { description: Some("a\0b".to_owned()), ..image() }, &["--description", "NUL"]);
    check(ServeFlags { size: Some(Size(0)), ..image() }, &["--size 0"]);
    let config = Some(PathBuf::from("/nonexistent/c.toml"));
    check(
        ServeFlags { config, ..ServeFlags::default() },
        &["/nonexistent/c.toml", "No such file", "--config"],
    );
    let dir = tempfile::tempdir().expect("a folder");
    let empty = dir.path().join("empty.toml");
    std::fs::write(&empty, "").expect("a file");
    check(
        ServeFlags { config: Some(empty), ..ServeFlags::default() },
        &["empty.toml", "nothing to serve", "[[export]]"],
    );
}

#[test]
fn tls_and_allow_lists_are_taken_from_the_file() {
    use conbd::config::ExportTls;
    use conbd::nbd::access::TlsMode;
    let config = parse(
        r#"
        [tls]
        mode = "selective"
        cert = "c.pem"
        key = "/k/key.pem"
        ca = "ca.pem"
        psk = "keys.psk"
        [[export]]
        name = "a"
        image = "a.raw"
        tls = "required"
        allow = ["psk:alice", "dn:CN=x,O=y"]
        [[export]]
        name = "b"
        image = "b.raw"
        "#,
    )
    .unwrap();
    assert_eq!(config.tls.mode(), TlsMode::Selective);
    let files = &config.tls.files;
    assert_eq!(files.cert.as_deref(), Some(Path::new("/etc/conbd/c.pem")), "relative to the file's folder");
    assert_eq!(files.key.as_deref(), Some(Path::new("/k/key.pem")));
    assert!(files.verify_client, "a CA is there to verify clients");
    assert_eq!(config.exports[0].tls, ExportTls::Required);
    assert!(config.exports[0].allow.is_some());
    assert!(!config.exports[0].in_the_clear(config.tls.mode()));
    assert!(config.exports[1].in_the_clear(config.tls.mode()));

    let psk = parse("[tls]\npsk = \"k\"\n[[export]]\nimage = \"a\"\n").unwrap();
    assert_eq!(psk.tls.mode(), TlsMode::Required, "credentials switch it on");
    let off = parse("[tls]\nmode = \"off\"\npsk = \"k\"\n[[export]]\nimage = \"a\"\n").unwrap();
    assert_eq!(off.tls.mode(), TlsMode::Off);

    refused("[tls]\ncert = \"c\"\n", "1:1", &["set key too"]);
    refused("[tls]\nkey = \"c\"\n", "1:1", &["set cert too"]);
    refused("[tls]\nmode = \"maybe\"\n", "2:8", &["conbd.toml(5)"]);
    refused("[[export]]\nimage = \"a\"\nallow = [\"alice\"]\n", "3:9", &["\"alice\"", "psk:"]);
}

#[test]
fn tls_that_cannot_be_is_refused() {
    let load = |text: &str| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("conbd.toml");
        std::fs::write(&path, text).unwrap();
        let flags = ServeFlags { config: Some(path), ..ServeFlags::default() };
        Config::load(&flags).map(drop).map_err(|e| e.to_string())
    };
    let export = |lines: &str| format!("[[export]]\nname = \"e\"\nimage = \"a\"\n{lines}\n");
    let said = |text: String| load(&text).expect_err(&text);
    assert!(said(export("tls = \"required\"")).contains("export \"e\": the export requires TLS"));
    assert!(said(export("allow = [\"psk:a\"]")).contains("without TLS"));
    let selective = "[tls]\nmode = \"selective\"\npsk = \"k\"\n";
    assert!(said(format!("{selective}{}", export("allow = [\"psk:a\"]"))).contains("tls = \"required\""));
    assert_eq!(load(&format!("{selective}{}", export("allow = [\"psk:a\"]\ntls = \"required\""))), Ok(()));
    assert_eq!(load(&format!("{selective}{}", export("allow = [\"psk:a\", \"uid:0\"]"))), Ok(()));
    assert!(said(format!("[tls]\nmode = \"required\"\n{}", export(""))).contains("cert and key, or psk"));
    assert!(
        said(format!("[tls]\npsk = \"k\"\nverify_client = true\n{}", export("")))
            .contains("verifying clients needs ca")
    );
}
