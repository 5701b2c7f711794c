//! TLS as a user of the program meets it: flags and configuration of `serve`, URIs of `inspect` and `bench`, and what is said when
//! it goes wrong.

use super::cli_harness::{Serving, conbd, image, text};
use super::pki::{self, Kind, Pki, Wish, issue};
use serde_json::Value;
use std::path::Path;

/// `conbd serve` with the PKI's certificate, on a unix socket, and more arguments.
fn serve(pki: &Pki, disk: &Path, more: &[&str]) -> Serving {
    let (cert, key) = (pki.path("server-cert.pem"), pki.path("server-key.pem"));
    let socket = disk.with_file_name("s.sock");
    let mut args =
        vec![text(disk), "--socket", text(&socket), "--tls-cert", text(&cert), "--tls-key", text(&key)];
    args.extend(more);
    Serving::start(&args, 1)
}

fn with(uri: &str, parameters: &str) -> String {
    let sep = if uri.contains('?') { '&' } else { '?' };
    format!("{uri}{sep}{parameters}")
}

#[test]
fn inspect_and_bench_reach_a_tls_server_by_certificate() {
    let pki = Pki::new(Kind::P256);
    let (_dir, disk) = image(16 << 20);
    let ca = pki.path("ca-cert.pem");
    let serving = serve(&pki, &disk, &["--tls-ca", text(&ca)]);
    assert!(serving.uri().starts_with("nbds+unix:///?socket="), "{}", serving.uri());
    let uri = with(serving.uri(), &format!("tls-certificates={}", pki.dir.path().display()));
    let ended = conbd(&["inspect", "--json", &uri]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let report: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(report["tls"], true);
    assert_eq!(report["tls_version"], "TLSv1.3");
    assert_eq!(report["tls_server"], "CN=localhost,O=Example,C=DE");
    assert_eq!(report["exports"][0]["size"], 16 << 20);
    let told = conbd(&["inspect", &uri]);
    assert!(told.stdout.contains("TLSv1.3 (TLS_AES_128_GCM_SHA256)"), "{}", told.stdout);

    let bench =
        ["--time", "300ms", "--verify", "--destroy-data", "--rw", "50", "--region", "16M", "--depth", "8"];
    for bs in ["4k", "1000", "1M"] {
        let ended = conbd(&[&["bench", &uri, "--bs", bs], &bench[..]].concat());
        assert_eq!(ended.code, Some(0), "{bs}: {}{}", ended.stdout, ended.stderr);
    }

    // In the clear it says what is missing.
    let ended = conbd(&["inspect", &serving.uri().replacen("nbds", "nbd", 1)]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.error_line().contains("NBD_REP_ERR_TLS_REQD"), "{}", ended.stderr);
    // Another name, another CA, no certificate of our own.
    let ended = conbd(&["inspect", &with(&uri, "tls-hostname=elsewhere")]);
    assert!(ended.error_line().contains("hostname mismatch"), "{}", ended.stderr);
    let stranger = tempfile::tempdir().unwrap();
    std::fs::write(stranger.path().join("ca-cert.pem"), pki::ca("Another CA").cert.to_pem().unwrap())
        .unwrap();
    let other = with(serving.uri(), &format!("tls-certificates={}", stranger.path().display()));
    let ended = conbd(&["inspect", &other]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.error_line().contains("certificate"), "{}", ended.stderr);
    std::fs::copy(pki.path("ca-cert.pem"), stranger.path().join("ca-cert.pem")).unwrap();
    let ended = conbd(&["inspect", &other]);
    assert_eq!(ended.code, Some(1), "a client without certificate is refused: {}", ended.stdout);
    serving.wait_for_log("peer did not return a certificate");
    let (code, _) = serving.stop();
    assert_eq!(code, Some(0));
}

#[test]
fn inspect_reaches_a_tls_server_by_key() {
    let pki = Pki::new(Kind::P256);
    let (dir, disk) = image(1 << 20);
    let keys = pki.path("keys.psk");
    let socket = dir.path().join("p.sock");
    let args = [
        text(&disk),
        "--socket",
        text(&socket),
        "--tls-psk",
        text(&keys),
        "--allow",
        "psk:alice",
        "--export",
        "d",
    ];
    let serving = Serving::start(&args, 1);
    let uri = |user: &str| {
        let uri = serving.uri().replacen("nbds+unix://", &format!("nbds+unix://{user}@"), 1);
        with(&uri, &format!("tls-psk-file={}", keys.display()))
    };
    let ended = conbd(&["inspect", &uri("alice")]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stdout.contains("export \"d\""), "{}", ended.stdout);
    let ended = conbd(&["inspect", &uri("bob")]);
    assert!(ended.error_line().contains("NBD_REP_ERR_POLICY"), "{}", ended.stderr);
    serving.wait_for_log("export refused");
    let log = serving.log();
    assert!(log.contains("psk:bob") && log.contains("allow list"), "the log says who and why: {log}");
    let ended = conbd(&["inspect", &uri("carol")]);
    assert!(ended.error_line().contains("no user \"carol\""), "{}", ended.stderr);
    // A man in the middle with a certificate does not pass for a server that knows the key.
    let (_dir, other) = image(1 << 20);
    let middle = serve(&pki, &other, &[]);
    let uri = middle.uri().replacen("nbds+unix://", "nbds+unix://alice@", 1);
    let ended = conbd(&["inspect", &with(&uri, &format!("tls-psk-file={}", keys.display()))]);
    assert_eq!(ended.code, Some(1), "{}", ended.stdout);
    middle.stop();
    serving.stop();
}

#[test]
fn credentials_that_cannot_work_are_refused_at_start() {
    let pki = Pki::new(Kind::P256);
    let (_dir, disk) = image(1 << 20);
    let expired = issue(Some(&pki.ca), &Wish { expired: true, ..Wish::default() });
    let (old_cert, old_key) = expired.write(pki.dir.path(), "old");
    let (cert, key, psk) = (pki.path("server-cert.pem"), pki.path("server-key.pem"), pki.path("bad.psk"));
    std::fs::write(&psk, "alice\n").unwrap();
    let nothing = pki.path("nothing.pem");
    let check = |args: &[&str], words: &[&str]| {
        let ended = conbd(&[&["serve", "--check", text(&disk)], args].concat());
        assert_ne!(ended.code, Some(0), "{args:?}: {}", ended.stdout);
        for word in words {
            assert!(ended.stderr.contains(word), "{args:?}: {}\nshould say {word}", ended.stderr);
        }
    };
    check(&["--tls-cert", text(&cert)], &["set key too"]);
    check(&["--tls-key", text(&key)], &["set cert too"]);
    check(&["--tls", "required"], &["TLS needs cert and key, or psk"]);
    check(&["--tls-crl", text(&cert), "--tls-psk", text(&psk)], &["crl needs ca"]);
    check(
        &["--tls-cert", text(&nothing), "--tls-key", text(&key)],
        &["cannot read the certificate", "nothing.pem"],
    );
    check(&["--tls-cert", text(&cert), "--tls-key", text(&old_key)], &["does not belong to the certificate"]);
    check(&["--tls-cert", text(&key), "--tls-key", text(&key)], &["server-key.pem", "no certificate"]);
    check(&["--tls-cert", text(&cert), "--tls-key", text(&cert)], &["no private key in PEM form"]);
    check(&["--tls-psk", text(&psk)], &["bad.psk", "line 1", "psktool"]);
    check(&["--allow", "psk:alice"], &["allow names nothing but TLS identities", "tls = \"required\""]);
    check(&["--allow", "whoever"], &["\"whoever\"", "psk:"]);
    let both = ["--tls-cert", text(&cert), "--tls-key", text(&key)];
    check(&[&both[..], &["--tls-ca", text(&disk)]].concat(), &["CA certificate file", "disk.raw"]);
    let ca = pki.path("ca-cert.pem");
    check(&[&both[..], &["--tls-ca", text(&ca), "--tls-crl", text(&ca)]].concat(), &["revocation list"]);
    // An encrypted key is not asked for at the terminal.
    let locked = pki.path("locked.pem");
    let cipher = openssl::symm::Cipher::aes_128_cbc();
    std::fs::write(&locked, expired.key.private_key_to_pem_pkcs8_passphrase(cipher, b"word").unwrap())
        .unwrap();
    check(&["--tls-cert", text(&old_cert), "--tls-key", text(&locked)], &["it is encrypted", "decrypt it"]);

    let ended =
        conbd(&["serve", "--check", text(&disk), "--tls-cert", text(&old_cert), "--tls-key", text(&old_key)]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stdout.contains("has expired"), "{}", ended.stdout);
}

#[test]
fn an_export_open_to_the_world_is_warned_of_loudly() {
    let pki = Pki::new(Kind::P256);
    let (_dir, disk) = image(1 << 20);
    const WARNING: &str = "CAN WRITE THIS EXPORT, WITHOUT TLS";
    let log_of = |args: &[&str]| {
        let serving = Serving::start(&[&[text(&disk), "--listen", "0.0.0.0:0"], args].concat(), 1);
        let (code, log) = serving.stop();
        assert_eq!(code, Some(0), "{log}");
        log
    };
    assert!(log_of(&[]).contains(WARNING));
    let (cert, key) = (pki.path("server-cert.pem"), pki.path("server-key.pem"));
    let tls = ["--tls-cert", text(&cert), "--tls-key", text(&key)];
    assert!(log_of(&[&tls[..], &["--tls", "selective"]].concat()).contains(WARNING));
    assert!(!log_of(&tls).contains(WARNING));
    assert!(!log_of(&["--read-only"]).contains(WARNING));
    assert!(!log_of(&["--allow", "address:127.0.0.1"]).contains(WARNING));
}
