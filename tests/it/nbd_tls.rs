//! TLS, spoken by hand over OpenSSL's own client. Numbers at the end of names are those of the conformance checklist that the
//! project keeps for the NBD protocol document.

use super::nbd_common::*;
use super::pki::{self, Kind, Pki, TlsClient, Wish, issue};
use conbd::block::{BlockBackend, BlockNode, MemoryNode};
use conbd::nbd::access::{AllowList, TlsMode};
use conbd::nbd::export::{Export, ExportOptions};
use conbd::nbd::proto::*;
use conbd::nbd::server::{ListenAddr, ServerConfig, ServerTls};
use conbd::nbd::tls::{TlsFiles, TlsServerConfig};
use conbd::nbd::wire::*;
use openssl::ssl::{SslStream, SslVersion};
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Duration;

const SIZE: u64 = 1 << 20;
const ALICE: &[u8] =
    &[0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff];
const BOB: &[u8] =
    &[0xff, 0xee, 0xdd, 0xcc, 0xbb, 0xaa, 0x99, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0x00];

fn export(name: &str, tls_required: bool, allow: &[&str]) -> Arc<Export> {
    let options = ExportOptions {
        name: name.to_owned(),
        tls_required,
        allow: if allow.is_empty() { None } else { Some(AllowList::parse(allow).unwrap()) },
        ..ExportOptions::default()
    };
    let node: Arc<dyn BlockNode> = Arc::new(MemoryNode::new(name, SIZE).unwrap());
    Export::new(options, BlockBackend::new(node)).unwrap()
}

fn credentials(files: &TlsFiles) -> Arc<TlsServerConfig> {
    TlsServerConfig::load(files).unwrap_or_else(|e| panic!("{e}"))
}

fn with_tls(mode: TlsMode, files: &TlsFiles) -> impl FnOnce(&mut ServerConfig) {
    let tls = ServerTls { mode, config: credentials(files), authz: None };
    move |config| config.tls = Some(tls)
}

/// A certificate for the server, nothing asked of clients.
fn x509(pki: &Pki) -> TlsFiles {
    TlsFiles::qemu_x509_dir(pki.dir.path(), false)
}

fn required(pki: &Pki) -> TestServer {
    TestServer::with(vec![export("disk", false, &[])], 2, with_tls(TlsMode::Required, &x509(pki)))
}

/// "open" for everybody, "secret" for TLS only.
fn selective(pki: &Pki) -> TestServer {
    let exports = vec![export("open", false, &[]), export("secret", true, &[])];
    TestServer::with(exports, 2, with_tls(TlsMode::Selective, &x509(pki)))
}

/// Makes TLS of a connection in haggling.
fn secure(mut c: Raw, client: TlsClient) -> Result<Raw, String> {
    assert_eq!(c.opt(NBD_OPT_STARTTLS, b""), [(NBD_REP_ACK, vec![])]);
    c.into_tls(client.ssl())
}

/// In TLS 1.3 the client is done before the server has looked at what it sent: only an answer shows that it was accepted.
fn admitted(c: Result<Raw, String>) -> bool {
    let Ok(mut c) = c else { return false };
    let mut ask = Vec::new();
    put_option(&mut ask, NBD_OPT_ABORT, b"");
    c.send_lossy(&ask);
    let (answer, _) = c.read_rest();
    let mut ack = Vec::new();
    put_option_reply(&mut ack, NBD_OPT_ABORT, NBD_REP_ACK, b"");
    assert!(answer.is_empty() || answer == ack, "{answer:?}");
    !answer.is_empty()
}

fn all_options() -> Vec<(u32, Vec<u8>)> {
    let mut info = Vec::new();
    InfoRequest::put(&mut info, "disk", &[]);
    let mut meta = Vec::new();
    MetaContextRequest::put(&mut meta, "disk", &["base:allocation"]);
    vec![
        (NBD_OPT_LIST, vec![]),
        (NBD_OPT_LIST, vec![1]),
        (NBD_OPT_PEEK_EXPORT, vec![]),
        (NBD_OPT_INFO, info.clone()),
        (NBD_OPT_INFO, vec![]),
        (NBD_OPT_STRUCTURED_REPLY, vec![]),
        (NBD_OPT_LIST_META_CONTEXT, meta.clone()),
        (NBD_OPT_SET_META_CONTEXT, meta),
        (NBD_OPT_EXTENDED_HEADERS, vec![]),
        (0, vec![]),
        (0x7fff_1234, vec![7; 100]),
        (0x7fff_1234, vec![7; MAX_OPTION_LEN as usize + 1]),
        (NBD_OPT_GO, info),
    ]
}

#[test]
fn without_tls_starttls_is_refused_and_nothing_requires_it_40() {
    let t = TestServer::unix(vec![memory("disk", SIZE)]);
    let mut c = t.haggle();
    assert!([NBD_REP_ERR_UNSUP, NBD_REP_ERR_POLICY].contains(&c.verdict(NBD_OPT_STARTTLS, b"")));
    for (option, data) in all_options() {
        assert_ne!(c.verdict(option, &data), NBD_REP_ERR_TLS_REQD, "option {option}");
    }
}

#[test]
fn starttls_with_data_is_invalid_41() {
    let pki = Pki::new(Kind::P256);
    for t in [TestServer::unix(vec![memory("disk", SIZE)]), required(&pki), selective(&pki)] {
        let mut c = t.haggle();
        assert_eq!(c.verdict(NBD_OPT_STARTTLS, b"x"), NBD_REP_ERR_INVALID);
        assert_eq!(c.verdict(NBD_OPT_ABORT, b""), NBD_REP_ACK, "the session goes on");
    }
    let t = required(&pki);
    let mut c = t.haggle();
    assert_eq!(c.verdict(NBD_OPT_STARTTLS, b"x"), NBD_REP_ERR_INVALID);
    assert!(admitted(secure(c, TlsClient::new())), "a right one may follow");
}

#[test]
fn after_starttls_everything_is_encrypted_42() {
    let pki = Pki::new(Kind::P256);
    let t = required(&pki);
    let mut c = secure(t.haggle(), TlsClient::new()).unwrap();
    c.go("disk");
    assert_eq!(c.size, SIZE);
    let data: Vec<u8> = (0..SIZE as usize / 2).map(|i| (i * 7 + i / 256) as u8).collect();
    assert_eq!(c.write(0, 1000, &data), 0);
    assert_eq!(c.read(1000, data.len() as u32), Ok(data));
    assert_eq!(t.server.uris("disk")[0].split(':').next(), Some("nbds+unix"));
    c.disc();

    // There is no way back: clear text is no TLS record, and ends the connection.
    let mut c = t.haggle();
    assert_eq!(c.opt(NBD_OPT_STARTTLS, b""), [(NBD_REP_ACK, vec![])]);
    let mut list = Vec::new();
    put_option(&mut list, NBD_OPT_LIST, b"");
    c.send(&list);
    let (alert, _) = c.read_rest();
    assert!(!alert.windows(8).any(|w| w == NBD_REP_MAGIC.to_be_bytes()), "{alert:?}");
}

#[test]
fn before_tls_every_option_is_answered_by_tls_reqd_43() {
    let pki = Pki::new(Kind::P256);
    let t = required(&pki);
    let mut c = t.haggle();
    for (option, data) in all_options() {
        let replies = c.opt(option, &data);
        assert_eq!(replies.len(), 1, "option {option}");
        assert_eq!(replies[0].0, NBD_REP_ERR_TLS_REQD, "option {option}");
    }
    assert!(admitted(secure(c, TlsClient::new())));
}

#[test]
fn abort_before_tls_is_acknowledged_44() {
    let pki = Pki::new(Kind::P256);
    for t in [required(&pki), selective(&pki)] {
        let mut c = t.haggle();
        assert_eq!(c.verdict(NBD_OPT_ABORT, b""), NBD_REP_ACK);
        c.expect_close();
    }
}

#[test]
fn before_tls_export_name_ends_and_go_does_not_45() {
    let pki = Pki::new(Kind::P256);
    let t = required(&pki);
    let mut c = t.haggle();
    assert_eq!(c.info(NBD_OPT_GO, "disk", &[])[0].0, NBD_REP_ERR_TLS_REQD);
    c.send_opt(NBD_OPT_EXPORT_NAME, b"disk");
    c.expect_close();
    // A client that does not know options cannot be served at all.
    let mut c = t.connect();
    c.greet(0);
    c.send_opt(NBD_OPT_EXPORT_NAME, b"disk");
    c.expect_close();
}

#[test]
fn a_second_starttls_is_invalid_and_the_session_continues_46() {
    let pki = Pki::new(Kind::P256);
    for (t, name) in [(required(&pki), "disk"), (selective(&pki), "secret")] {
        let mut c = secure(t.haggle(), TlsClient::new()).unwrap();
        assert_eq!(c.verdict(NBD_OPT_STARTTLS, b""), NBD_REP_ERR_INVALID);
        assert_eq!(c.verdict(NBD_OPT_STARTTLS, b"x"), NBD_REP_ERR_INVALID);
        c.go(name);
        assert_eq!(c.read(0, 512), Ok(vec![0; 512]));
    }
}

#[test]
fn in_tls_nothing_is_answered_by_tls_reqd_47() {
    let pki = Pki::new(Kind::P256);
    for t in [required(&pki), selective(&pki)] {
        let mut c = secure(t.haggle(), TlsClient::new()).unwrap();
        for (option, data) in all_options() {
            let replies = c.opt(option, &data);
            assert!(replies.iter().all(|r| r.0 != NBD_REP_ERR_TLS_REQD), "option {option}: {replies:?}");
            if option == NBD_OPT_GO {
                break;
            }
        }
    }
}

#[test]
fn a_failed_handshake_ends_the_connection_48() {
    let pki = Pki::new(Kind::P256);
    let files = TlsFiles { psk: Some(pki.path("keys.psk")), ..TlsFiles::qemu_x509_dir(pki.dir.path(), true) };
    let t = TestServer::with(vec![export("disk", false, &[])], 2, with_tls(TlsMode::Required, &files));
    let abort = {
        let mut b = Vec::new();
        put_option(&mut b, NBD_OPT_ABORT, b"");
        b
    };
    // Garbage of several kinds, then options in the clear, which nobody must answer.
    let record = [&[22, 3, 1, 0, 100][..], &[1; 100]].concat();
    let huge = [&[22, 3, 1, 0xff, 0xff][..], &[0; 2000]].concat();
    let http = b"GET / HTTP/1.0\r\n\r\n".to_vec();
    let hello_of_ssl2 = [&[0x80, 0x2e, 1, 0, 2][..], &[0; 43]].concat();
    let alert = vec![21, 3, 3, 0, 2, 2, 40];
    for garbage in [vec![0; 64], record, huge, http, hello_of_ssl2, alert, abort.clone()] {
        let mut c = t.haggle();
        assert_eq!(c.opt(NBD_OPT_STARTTLS, b""), [(NBD_REP_ACK, vec![])]);
        c.send_lossy(&garbage);
        c.send_lossy(&abort);
        let (rest, _) = c.read_rest();
        assert!(!rest.windows(8).any(|w| w == NBD_REP_MAGIC.to_be_bytes()), "{garbage:?}: {rest:?}");
    }
    // Somebody else's certificate, no certificate, a wrong key, an unknown user.
    let other_ca = pki::ca("Another CA");
    let stranger = issue(Some(&other_ca), &Wish::default());
    assert!(!admitted(secure(t.haggle(), TlsClient::new().identity(&stranger))));
    assert!(!admitted(secure(t.haggle(), TlsClient::new())));
    for version in [SslVersion::TLS1_2, SslVersion::TLS1_3] {
        let psk = |user, key| TlsClient::new().psk(user, key).version(version);
        assert!(!admitted(secure(t.haggle(), psk("alice", BOB))), "{version:?}");
        assert!(!admitted(secure(t.haggle(), psk("mallory", ALICE))), "{version:?}");
    }
    // And those who are right still get in.
    assert!(admitted(secure(t.haggle(), TlsClient::new().identity(&pki.client))));
    assert!(admitted(secure(t.haggle(), TlsClient::new().psk("alice", ALICE).version(SslVersion::TLS1_3))));
    t.wait_for("all connections gone", |server| server.connections() == 0);
}

#[test]
fn where_tls_is_a_choice_everything_else_works_in_the_clear_49() {
    let pki = Pki::new(Kind::P256);
    let t = selective(&pki);
    let mut c = t.haggle();
    for (option, data) in all_options() {
        if ![NBD_OPT_INFO, NBD_OPT_GO].contains(&option) {
            assert_ne!(c.verdict(option, &data), NBD_REP_ERR_TLS_REQD, "option {option}");
        }
    }
    let listed: Vec<String> = c
        .opt(NBD_OPT_LIST, b"")
        .iter()
        .filter(|r| r.0 == NBD_REP_SERVER)
        .map(|(_, data)| RepServer::decode(data).unwrap().name.to_owned())
        .collect();
    assert_eq!(listed, ["open"], "what a client in the clear cannot have is not listed for it");
    assert_eq!(c.info(NBD_OPT_INFO, "open", &[]).last().unwrap().0, NBD_REP_ACK);
    c.go("open");
    // One of all the options was NBD_OPT_EXTENDED_HEADERS.
    c.extended = true;
    assert_eq!(c.write(0, 0, b"clear"), 0);
    c.disc();
    let mut c = t.haggle();
    c.send_opt(NBD_OPT_EXPORT_NAME, b"open");
    assert_eq!(c.recv(10)[..8], SIZE.to_be_bytes());
}

#[test]
fn an_export_for_tls_only_is_refused_in_the_clear_50() {
    let pki = Pki::new(Kind::P256);
    let t = selective(&pki);
    let mut c = t.haggle();
    for option in [NBD_OPT_INFO, NBD_OPT_GO] {
        let replies = c.info(option, "secret", &[NBD_INFO_BLOCK_SIZE]);
        assert_eq!(replies.len(), 1, "no REP_INFO: {replies:?}");
        assert_eq!(replies[0].0, NBD_REP_ERR_TLS_REQD);
        let unknown = c.info(option, "nothing", &[]);
        assert_eq!(unknown.len(), 1);
        assert!([NBD_REP_ERR_UNKNOWN, NBD_REP_ERR_TLS_REQD].contains(&unknown[0].0));
    }
    assert_eq!(c.opt(NBD_OPT_STRUCTURED_REPLY, b"")[0].0, NBD_REP_ACK);
    for option in [NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT] {
        let mut data = Vec::new();
        MetaContextRequest::put(&mut data, "secret", &["base:allocation"]);
        assert_eq!(c.verdict(option, &data), NBD_REP_ERR_TLS_REQD);
    }
    let mut e = t.haggle();
    e.send_opt(NBD_OPT_EXPORT_NAME, b"secret");
    e.expect_close();

    // The same connection may go on to TLS, and then has it.
    let mut c = secure(c, TlsClient::new()).unwrap();
    let listed = c.opt(NBD_OPT_LIST, b"").iter().filter(|r| r.0 == NBD_REP_SERVER).count();
    assert_eq!(listed, 2);
    c.go("secret");
    assert_eq!(c.read(0, 16), Ok(vec![0; 16]));
}

#[test]
fn the_mode_does_not_change_during_a_connection_51() {
    let pki = Pki::new(Kind::P256);
    let t = required(&pki);
    let mut c = t.haggle();
    for _ in 0..3 {
        assert_eq!(c.verdict(NBD_OPT_LIST, b""), NBD_REP_ERR_TLS_REQD);
        assert_eq!(c.verdict(NBD_OPT_STARTTLS, b"x"), NBD_REP_ERR_INVALID);
        assert_eq!(c.info(NBD_OPT_GO, "disk", &[])[0].0, NBD_REP_ERR_TLS_REQD);
    }
    let mut c = secure(c, TlsClient::new()).unwrap();
    for _ in 0..3 {
        assert_eq!(c.opt(NBD_OPT_LIST, b"").last().unwrap().0, NBD_REP_ACK);
    }
    // New credentials change nothing for a connection that is up.
    assert!(t.server.replace_tls(credentials(&TlsFiles::qemu_psk_dir(pki.dir.path()))));
    assert_eq!(c.verdict(NBD_OPT_STARTTLS, b""), NBD_REP_ERR_INVALID);
    c.go("disk");
    assert_eq!(c.read(0, 16), Ok(vec![0; 16]));
    assert!(!admitted(secure(t.haggle(), TlsClient::new())), "later handshakes use the new ones");
    assert!(admitted(secure(t.haggle(), TlsClient::new().psk("bob", BOB))));
    let plain = TestServer::unix(vec![memory("disk", SIZE)]);
    assert!(!plain.server.replace_tls(credentials(&x509(&pki))), "a server without TLS stays without");
}

#[test]
fn tls_forgets_what_was_negotiated_in_the_clear_52() {
    let pki = Pki::new(Kind::P256);
    let t = selective(&pki);
    let mut meta = Vec::new();
    MetaContextRequest::put(&mut meta, "open", &["base:allocation"]);
    let mut c = t.haggle();
    assert_eq!(c.opt(NBD_OPT_STRUCTURED_REPLY, b"")[0].0, NBD_REP_ACK);
    // If the server has them; what it says is not the point here.
    c.opt(NBD_OPT_EXTENDED_HEADERS, b"");
    assert_eq!(c.opt(NBD_OPT_SET_META_CONTEXT, &meta).len(), 2);
    let mut c = secure(c, TlsClient::new()).unwrap();
    assert_eq!(
        c.verdict(NBD_OPT_SET_META_CONTEXT, &meta),
        NBD_REP_ERR_INVALID,
        "structured replies are forgotten"
    );
    c.go("open");
    assert!(!c.flags.contains(TransmissionFlags::NBD_FLAG_SEND_DF));
    // A simple reply to a compact request.
    c.send_req(NBD_CMD_READ, 0, 9, 0, 4);
    assert_eq!(c.recv_reply(), Reply::Simple { error: 0, cookie: 9 });
    assert_eq!(c.recv(4), [0; 4]);
    // No context is left either.
    assert_eq!(c.call(NBD_CMD_BLOCK_STATUS, 0, 0, 4096), Errno::NBD_EINVAL.to_wire());

    // Negotiated anew, all of it works.
    let mut c = secure(t.haggle(), TlsClient::new()).unwrap();
    assert_eq!(c.opt(NBD_OPT_STRUCTURED_REPLY, b"")[0].0, NBD_REP_ACK);
    assert_eq!(c.opt(NBD_OPT_SET_META_CONTEXT, &meta).len(), 2);
    c.go("open");
    assert!(c.flags.contains(TransmissionFlags::NBD_FLAG_SEND_DF));
    assert_eq!(c.read(0, 4), Ok(vec![0; 4]));
}

#[test]
fn clear_bytes_behind_starttls_close_the_connection_53() {
    let pki = Pki::new(Kind::P256);
    for t in [required(&pki), selective(&pki)] {
        for behind in [&b"x"[..], &[0; 5000]] {
            let mut c = t.haggle();
            let mut both = Vec::new();
            put_option(&mut both, NBD_OPT_STARTTLS, b"");
            both.extend_from_slice(behind);
            c.send_lossy(&both);
            c.expect_close();
        }
        let mut c = t.haggle();
        let mut both = Vec::new();
        put_option(&mut both, NBD_OPT_STARTTLS, b"");
        put_option(&mut both, NBD_OPT_STRUCTURED_REPLY, b"");
        c.send(&both);
        c.expect_close();
    }
}

#[test]
fn versions_1_2_and_1_3_are_spoken_and_no_older_54() {
    let pki = Pki::new(Kind::P256);
    let files = TlsFiles { psk: Some(pki.path("keys.psk")), ..x509(&pki) };
    let t = TestServer::with(vec![export("disk", false, &[])], 1, with_tls(TlsMode::Required, &files));
    for version in [SslVersion::TLS1_2, SslVersion::TLS1_3] {
        for client in [TlsClient::new(), TlsClient::new().psk("alice", ALICE)] {
            let mut c =
                secure(t.haggle(), client.version(version)).unwrap_or_else(|e| panic!("{version:?}: {e}"));
            c.go("disk");
            assert_eq!(c.write(0, 5, b"in TLS"), 0);
            assert_eq!(c.read(5, 6), Ok(b"in TLS".to_vec()));
            c.disc();
        }
    }
    for version in [SslVersion::TLS1, SslVersion::TLS1_1] {
        assert!(!admitted(secure(t.haggle(), TlsClient::new().version(version))), "{version:?}");
    }
}

#[test]
fn the_server_says_goodbye_before_it_closes_55() {
    let pki = Pki::new(Kind::P256);
    let t = required(&pki);
    for version in [SslVersion::TLS1_2, SslVersion::TLS1_3] {
        let client = || TlsClient::new().version(version);
        let mut c = secure(t.haggle(), client()).unwrap();
        assert_eq!(c.verdict(NBD_OPT_ABORT, b""), NBD_REP_ACK);
        assert_eq!(c.read_rest(), (vec![], true), "after ABORT");

        let mut c = secure(t.haggle(), client()).unwrap();
        c.go("disk");
        c.send_req(NBD_CMD_DISC, 0, 0, 0, 0);
        assert_eq!(c.read_rest(), (vec![], true), "after DISC");

        let mut c = secure(t.haggle(), client()).unwrap();
        c.send_opt(NBD_OPT_EXPORT_NAME, b"nothing");
        assert_eq!(c.read_rest(), (vec![], true), "after a refusal");

        let mut c = secure(t.haggle(), client()).unwrap();
        c.go("disk");
        c.send(&[0; 28]);
        assert_eq!(c.read_rest(), (vec![], true), "after a broken request");
    }
    let mut idle = secure(t.haggle(), TlsClient::new()).unwrap();
    idle.go("disk");
    let mut haggling = secure(t.haggle(), TlsClient::new()).unwrap();
    assert_eq!(haggling.opt(NBD_OPT_LIST, b"").len(), 2, "its handshake is over");
    t.wait_for("both are in the books", |server| server.connections() == 2);
    let report = t.shutdown(Duration::from_secs(5));
    assert_eq!((report.aborted, report.flush_failures), (0, 0));
    assert_eq!(idle.read_rest(), (vec![], true), "at the server's end");
    assert_eq!(haggling.read_rest(), (vec![], true), "at the server's end, in haggling");
}

#[test]
fn clients_are_known_by_certificate_or_key_56() {
    let pki = Pki::new(Kind::P256);
    let make = |cn: &str, expired| {
        let subject = [("O", "Example"), ("CN", cn)];
        let wish = Wish {
            subject: &subject,
            dns: &["client.example"],
            email: &["me@example"],
            uri: &["urn:me"],
            ip: &["10.9.8.7"],
            expired,
            ..Wish::default()
        };
        issue(Some(&pki.ca), &wish)
    };
    let (good, revoked, expired) = (make("good", false), make("revoked", false), make("expired", true));
    pki.revoke(&[&revoked]);
    let files = TlsFiles { psk: Some(pki.path("keys.psk")), ..TlsFiles::qemu_x509_dir(pki.dir.path(), true) };
    assert!(files.crl.is_some());
    let uid = rustix::process::getuid().as_raw();
    let digest = good.cert.digest(openssl::hash::MessageDigest::sha256()).unwrap();
    let hex: String = digest.iter().map(|b| format!("{b:02x}")).collect();
    let exports = vec![
        export("all", false, &[]),
        export("dn", false, &["dn:CN=good,O=Example"]),
        export("reversed", false, &["dn:O=Example,CN=good"]),
        export("dns", false, &["dns:client.example"]),
        export("ip", false, &["ip:10.9.8.7"]),
        export("email", false, &["email:me@example"]),
        export("uri", false, &["uri:urn:me"]),
        export("fingerprint", false, &[&format!("fingerprint:{hex}")]),
        export("alice", false, &["psk:alice"]),
        export("somebody else", false, &["dn:CN=client", "psk:carol"]),
        export("uid", false, &[&format!("uid:{uid}")]),
        export("address", false, &["address:127.0.0.0/8"]),
    ];
    let names: Vec<String> = exports.iter().map(|e| e.name().to_owned()).collect();
    let t = TestServer::with(exports, 2, |config| {
        with_tls(TlsMode::Required, &files)(config);
        config.listen.push(ListenAddr::Tcp("127.0.0.1:0".parse().unwrap()));
    });

    for version in [SslVersion::TLS1_2, SslVersion::TLS1_3] {
        let with = |identity| secure(t.haggle(), TlsClient::new().identity(identity).version(version));
        assert!(admitted(with(&good)), "{version:?}");
        assert!(!admitted(with(&revoked)), "{version:?}");
        assert!(!admitted(with(&expired)), "{version:?}");
        assert!(
            !admitted(secure(t.haggle(), TlsClient::new().version(version))),
            "{version:?}: no certificate"
        );
    }

    // Who may use which: asked by INFO, by LIST, by GO.
    let check = |connect: &dyn Fn() -> Raw, client: &dyn Fn() -> TlsClient, may: &[&str]| {
        let mut c = secure(connect(), client()).unwrap();
        for name in &names {
            let verdict = c.info(NBD_OPT_INFO, name, &[]);
            let want = if may.contains(&name.as_str()) { NBD_REP_ACK } else { NBD_REP_ERR_POLICY };
            assert_eq!(verdict.last().unwrap().0, want, "INFO {name}");
        }
        let listed: Vec<String> = c
            .opt(NBD_OPT_LIST, b"")
            .iter()
            .filter(|r| r.0 == NBD_REP_SERVER)
            .map(|(_, data)| RepServer::decode(data).unwrap().name.to_owned())
            .collect();
        assert_eq!(listed, may);
        assert_eq!(c.info(NBD_OPT_GO, "somebody else", &[])[0].0, NBD_REP_ERR_POLICY);
        c.go(may[may.len() - 1]);
        assert_eq!(c.read(0, 8), Ok(vec![0; 8]));
        let mut c = secure(connect(), client()).unwrap();
        c.send_opt(NBD_OPT_EXPORT_NAME, b"somebody else");
        assert_eq!(c.read_rest(), (vec![], true));
    };
    let unix = || t.haggle();
    let tcp = || {
        let ListenAddr::Tcp(addr) = &t.server.bound_addrs()[1] else { panic!("the second is TCP") };
        let mut c = Raw::tcp(std::net::TcpStream::connect(addr).unwrap());
        c.greet(3);
        c
    };
    let certificate = || TlsClient::new().identity(&good);
    let named = ["all", "dn", "reversed", "dns", "ip", "email", "uri", "fingerprint"];
    check(&unix, &certificate, &[&named[..], &["uid"]].concat());
    check(&tcp, &certificate, &[&named[..], &["address"]].concat());
    for version in [SslVersion::TLS1_2, SslVersion::TLS1_3] {
        check(&unix, &|| TlsClient::new().psk("alice", ALICE).version(version), &["all", "alice", "uid"]);
        check(&tcp, &|| TlsClient::new().psk("bob", BOB).version(version), &["all", "address"]);
    }
    // A key that was offered and not used proves nothing: this client's ciphers go with another digest than the key's.
    t.wait_for("all connections gone", |server| server.connections() == 0);
}

#[test]
fn who_passes_the_handshake_may_still_be_turned_away_56() {
    let pki = Pki::new(Kind::P256);
    let authz = |dn: &str| Some(AllowList::of_dn(dn).unwrap());
    for (dn, want) in
        [("CN=client,O=Example,C=DE", true), ("C=DE,O=Example,CN=client", true), ("CN=client", false)]
    {
        let t = TestServer::with(vec![export("disk", false, &[])], 1, |config| {
            let files = TlsFiles::qemu_x509_dir(pki.dir.path(), true);
            config.tls =
                Some(ServerTls { mode: TlsMode::Required, config: credentials(&files), authz: authz(dn) });
        });
        assert_eq!(admitted(secure(t.haggle(), TlsClient::new().identity(&pki.client))), want, "{dn}");
    }
}

#[test]
fn servers_may_have_keys_of_any_kind_57() {
    for kind in [Kind::P256, Kind::P384, Kind::Ed25519, Kind::Rsa(2048), Kind::Rsa(3072)] {
        let pki = Pki::new(kind);
        let files = x509(&pki);
        let slow = matches!(kind, Kind::P384 | Kind::Rsa(3072));
        assert_eq!(credentials(&files).is_slow(), slow, "{kind:?}");
        let t = TestServer::with(vec![export("disk", false, &[])], 1, with_tls(TlsMode::Required, &files));
        for version in [SslVersion::TLS1_2, SslVersion::TLS1_3] {
            let mut c = secure(t.haggle(), TlsClient::new().version(version))
                .unwrap_or_else(|e| panic!("{kind:?} {version:?}: {e}"));
            c.go("disk");
            assert_eq!(c.read(0, 100), Ok(vec![0; 100]), "{kind:?} {version:?}");
            c.disc();
        }
    }
}

// ------------------------------------------------------------------------------------------ clients that misbehave

/// A ClientHello, as a client would send it.
fn client_hello() -> Vec<u8> {
    struct Catch(Vec<u8>);
    impl Read for Catch {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::WouldBlock.into())
        }
    }
    impl Write for Catch {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut stream = SslStream::new(TlsClient::new().ssl(), Catch(Vec::new())).unwrap();
    assert!(stream.connect().is_err(), "nobody answers");
    let hello = stream.get_ref().0.clone();
    assert!(hello.len() > 100 && hello[0] == 22, "a handshake record");
    hello
}

fn starttls(t: &TestServer) -> Raw {
    let mut c = t.haggle();
    assert_eq!(c.opt(NBD_OPT_STARTTLS, b""), [(NBD_REP_ACK, vec![])]);
    c
}

fn still_serves(t: &TestServer) {
    let mut c = secure(t.haggle(), TlsClient::new()).unwrap();
    c.go("disk");
    assert_eq!(c.read(0, 4096), Ok(vec![0; 4096]));
    c.disc();
    t.wait_for("all connections gone", |server| server.connections() == 0);
}

#[test]
fn a_client_may_vanish_at_any_byte_of_the_handshake() {
    let pki = Pki::new(Kind::P256);
    let t = required(&pki);
    let hello = client_hello();
    for cut in (0..=hello.len()).step_by(13).chain([1, 4, 5, 6, hello.len() - 1, hello.len()]) {
        let mut gone = starttls(&t);
        gone.send(&hello[..cut]);
        drop(gone);
        // One that only stops sending gets the flight, perhaps, and then the end.
        let mut half = starttls(&t);
        half.send(&hello[..cut]);
        half.half_close();
        let (flight, _) = half.read_rest();
        assert!(cut == hello.len() || flight.len() < 100, "{cut}: {} bytes", flight.len());
    }
    still_serves(&t);
}

#[test]
fn a_thousand_half_handshakes_do_not_keep_others_out() {
    let pki = Pki::new(Kind::P256);
    let t = required(&pki);
    let hello = client_hello();
    let mut held = Vec::new();
    for i in 0..1000 {
        let mut c = t.connect();
        c.greet(3);
        c.send_opt(NBD_OPT_STARTTLS, b"");
        // The oldest are dropped when there are too many: what they get is not looked at.
        c.send_lossy(&hello[..i % hello.len()]);
        held.push(c);
    }
    let mut c = secure(t.haggle(), TlsClient::new()).unwrap();
    c.go("disk");
    assert_eq!(c.read(0, 16), Ok(vec![0; 16]));
    t.wait_for("the excess is dropped", |server| server.connections() <= 257);
    // Half a handshake makes no work while it waits.
    wait_for("the loops sleep", || {
        let before = t.turns();
        std::thread::sleep(Duration::from_millis(50));
        t.turns() == before
    });
    assert_eq!(c.read(0, 16), Ok(vec![0; 16]));
    c.disc();
    drop(held);
    still_serves(&t);
}

#[test]
fn a_handshake_that_takes_too_long_is_cut() {
    let pki = Pki::new(Kind::P256);
    let t = TestServer::with(vec![export("disk", false, &[])], 1, |config| {
        with_tls(TlsMode::Required, &x509(&pki))(config);
        config.handshake_timeout = Duration::from_millis(300);
    });
    let hello = client_hello();
    for part in [0, 3, 100] {
        let mut c = starttls(&t);
        c.send(&hello[..part]);
        c.expect_close();
    }
    // Dribbling does not help: the deadline is for the whole.
    let mut c = starttls(&t);
    for byte in hello.iter().cycle().take(20_000) {
        c.send_lossy(&[*byte]);
        std::thread::sleep(Duration::from_millis(1));
        if t.server.connections() == 0 {
            break;
        }
    }
    t.wait_for("it is cut", |server| server.connections() == 0);
}

/// Sends and receives a byte at a time.
struct Dribble(Box<dyn Socket>);

impl Read for Dribble {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = buf.len().min(1);
        self.0.read(&mut buf[..n])
    }
}

impl Write for Dribble {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(&bytes[..bytes.len().min(1)])
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Socket for Dribble {
    fn shutdown(&self, how: std::net::Shutdown) -> io::Result<()> {
        self.0.shutdown(how)
    }
}

#[test]
fn tls_works_a_byte_at_a_time() {
    let pki = Pki::new(Kind::P256);
    let t = required(&pki);
    for version in [SslVersion::TLS1_2, SslVersion::TLS1_3] {
        let slow = starttls(&t).map(|s| Box::new(Dribble(s)));
        let mut c = slow.into_tls(TlsClient::new().version(version).ssl()).unwrap();
        c.go("disk");
        let data: Vec<u8> = (0..20_000u32).map(|i| (i % 251) as u8).collect();
        assert_eq!(c.write(0, 77, &data), 0);
        assert_eq!(c.read(77, 20_000), Ok(data));
        c.disc();
    }
    t.wait_for("all connections gone", |server| server.connections() == 0);
}

#[test]
fn bytes_arrive_in_order_whatever_their_sizes_and_however_slow_the_reader() {
    let pki = Pki::new(Kind::P256);
    let t = required(&pki);
    let disk: Vec<u8> = (0..SIZE).map(|i| (i * 31 + i / 251 + i / 65_521) as u8).collect();
    for version in [SslVersion::TLS1_2, SslVersion::TLS1_3] {
        let mut c = secure(t.haggle(), TlsClient::new().version(version)).unwrap();
        c.go("disk");
        // Writes of many sizes, all at once; their payloads end anywhere in a record.
        let mut sizes = [1u64, 511, 16_383, 16_384, 16_385, 70_000, 3, 131_072, 40_000].iter().cycle();
        let (mut at, mut requests) = (0u64, Vec::new());
        let mut cookies = 0;
        while at < SIZE {
            let n = (*sizes.next().unwrap()).min(SIZE - at);
            let header = RequestHeader {
                flags: CmdFlags::empty(),
                cmd: NBD_CMD_WRITE,
                cookie: at,
                offset: at,
                len: n,
            };
            requests.extend_from_slice(&header.encode());
            requests.extend_from_slice(&disk[at as usize..(at + n) as usize]);
            at += n;
            cookies += 1;
        }
        c.send(&requests);
        for _ in 0..cookies {
            assert!(matches!(c.recv_reply(), Reply::Simple { error: 0, .. }));
        }
        // Reads that nobody takes for a while: far more than all buffers hold.
        let spans: Vec<(u64, u32)> = (0..200u64)
            .map(|i| {
                let offset = i * 7919 % SIZE;
                (offset, (1 + i * 104_729 % 300_000).min(SIZE - offset) as u32)
            })
            .collect();
        for (i, (offset, len)) in spans.iter().enumerate() {
            c.send_req(NBD_CMD_READ, 0, i as u64, *offset, *len);
        }
        let mut seen = vec![false; spans.len()];
        for _ in &spans {
            let Reply::Simple { error: 0, cookie } = c.recv_reply() else { panic!("a read failed") };
            let (offset, len) = spans[cookie as usize];
            let data = c.recv(len as usize);
            assert!(
                data == disk[offset as usize..][..len as usize],
                "{version:?}: read {cookie} got other bytes"
            );
            assert!(!std::mem::replace(&mut seen[cookie as usize], true), "one reply per request");
        }
        c.disc();
    }
    t.wait_for("all connections gone", |server| server.connections() == 0);
    assert_eq!(t.server.budget_in_use(), (0, 0));
}

#[test]
fn a_stream_that_breaks_off_or_is_forged_changes_nothing() {
    let pki = Pki::new(Kind::P256);
    let t = required(&pki);
    for version in [SslVersion::TLS1_2, SslVersion::TLS1_3] {
        let client = || {
            let mut c = secure(t.haggle(), TlsClient::new().version(version)).unwrap();
            c.go("disk");
            c
        };
        let header =
            RequestHeader { flags: CmdFlags::empty(), cmd: NBD_CMD_WRITE, cookie: 1, offset: 0, len: 50_000 };
        // A payload that stops half way, without a goodbye.
        let mut c = client();
        c.send(&header.encode());
        c.send(&[1; 30_000]);
        drop(c);
        // One into which somebody puts a record of his own.
        let mut c = client();
        c.send(&header.encode());
        c.send(&[1; 30_000]);
        c.inject(&[&[23, 3, 3, 0x40, 0][..], &[0x55; 0x4000]].concat());
        c.send_lossy(&[1; 20_000]);
        let (rest, _) = c.read_rest();
        assert_eq!(rest, b"", "no reply to it");
        // One whose client shuts the socket down between two requests.
        let mut c = client();
        assert_eq!(c.read(0, 8), Ok(vec![0; 8]));
        c.half_close();
        assert_eq!(c.read_rest(), (vec![], true));
        t.wait_for("all connections gone", |server| server.connections() == 0);
        let mut c = client();
        assert_eq!(c.read(0, 50_000), Ok(vec![0; 50_000]), "nothing of it was written");
        c.disc();
    }
    still_serves(&t);
}

#[test]
fn many_clients_shake_hands_at_once_on_slow_keys_too() {
    for kind in [Kind::P256, Kind::Rsa(3072)] {
        let pki = Pki::new(kind);
        let t = required(&pki);
        std::thread::scope(|scope| {
            for i in 0..24u64 {
                let t = &t;
                scope.spawn(move || {
                    let mut c = secure(t.haggle(), TlsClient::new()).unwrap();
                    c.go("disk");
                    assert_eq!(c.write(0, i * 512, &[i as u8; 512]), 0);
                    assert_eq!(c.read(i * 512, 512), Ok(vec![i as u8; 512]));
                    c.disc();
                });
            }
        });
        t.wait_for("all connections gone", |server| server.connections() == 0);
    }
}
