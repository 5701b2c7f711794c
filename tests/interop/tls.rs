//! TLS with other people's clients, which use GnuTLS: libnbd's programs and bindings, QEMU's, fio, nbd-client; and `openssl s_client`
//! for what none of them does. Certificates are made on the spot.

use crate::harness::{
    Builder, PATIENCE, Server, Setup, Transport, UNIX_1_IO_URING, assert_same, field, matrix, noise,
    wait_for_exit, wait_until, write_sparse,
};
use crate::pki::{Kind, Pki};
use crate::tools::{Ran, python, python_command, run, run_command, spawn, tool};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::{Arc, Mutex};

const MIB: u64 = 1 << 20;

matrix!(
    libnbd_by_certificate,
    libnbd_by_key,
    qemu_by_certificate,
    qemu_by_key,
    fio_verifies_by_certificate,
    the_python_bindings_use_every_command
);

/// `conbd serve` with certificates, and client certificates required, and keys beside them.
fn builder(setup: Setup, pki: &Pki) -> Builder {
    let path = |name: &str| pki.path(name).to_str().unwrap().to_owned();
    Builder::new(setup).args(&[
        "--tls-cert",
        &path("server-cert.pem"),
        "--tls-key",
        &path("server-key.pem"),
        "--tls-ca",
        &path("ca-cert.pem"),
        "--tls-psk",
        &path("keys.psk"),
    ])
}

fn by_certificate(server: &Server, pki: &Pki) -> String {
    assert!(server.uri.starts_with("nbds"), "{}", server.uri);
    let sep = if server.uri.contains('?') { '&' } else { '?' };
    format!("{}{sep}tls-certificates={}", server.uri, pki.dir.path().display())
}

fn by_key(server: &Server, pki: &Pki, user: &str) -> String {
    let uri = server.uri.replacen("://", &format!("://{user}@"), 1);
    let sep = if uri.contains('?') { '&' } else { '?' };
    format!("{uri}{sep}tls-psk-file={}", pki.path("keys.psk").display())
}

fn libnbd_by_certificate(setup: Setup) {
    let pki = Pki::new(Kind::P256);
    libnbd(setup, &pki, |server| by_certificate(server, &pki));
}

fn libnbd_by_key(setup: Setup) {
    let pki = Pki::new(Kind::P256);
    libnbd(setup, &pki, |server| by_key(server, &pki, "alice"));
}

/// nbdinfo looks, nbdcopy copies there and back.
fn libnbd(setup: Setup, pki: &Pki, uri: impl Fn(&Server) -> String) {
    let server = builder(setup, pki).image_len(48 * MIB).start();
    let uri = uri(&server);
    let info: Value = serde_json::from_str(&run("nbdinfo", &["--json", &uri]).ok()).unwrap();
    assert_eq!(info["TLS"], true, "{info}");
    assert_eq!(info["structured"], true, "{info}");
    assert_eq!(info["exports"][0]["export-size"], 48 * MIB, "{info}");
    assert_eq!(info["exports"][0]["contexts"][0], "base:allocation", "{info}");

    let (source, back) = (server.path("source.raw"), server.path("back.raw"));
    write_sparse(&source, 48 * MIB, 11);
    let (source, back) = (source.to_str().unwrap(), back.to_str().unwrap());
    run("nbdcopy", &["--connections=4", "--flush", source, &uri]).ok();
    run("nbdcopy", &["--connections=4", &uri, back]).ok();
    assert_same(Path::new(source), Path::new(back));
    run("nbdcopy", &["--synchronous", &uri, back]).ok();
    assert_same(Path::new(source), Path::new(back));
    // In the clear there is nothing to be had.
    let clear = server.uri.replacen("nbds", "nbd", 1);
    run("nbdinfo", &[&clear]).failed();
    let stopped = server.stop();
    assert_same(Path::new(source), &stopped.image());
}

/// The port of a TCP server.
fn port_of(server: &Server) -> u16 {
    server.uri.rsplit_once(':').unwrap().1.split('/').next().unwrap().parse().unwrap()
}

/// The options of a QEMU program that connects by `creds`.
fn qemu_args(server: &Server, creds: &str) -> (String, String) {
    let address = match server.uri.split_once("socket=") {
        Some((_, path)) => format!("server.type=unix,server.path={path}"),
        None => {
            let port = port_of(server);
            format!("server.type=inet,server.host=127.0.0.1,server.port={port}")
        }
    };
    let image = format!("driver=nbd,{address},tls-creds=t,tls-hostname=localhost");
    (format!("{creds},id=t,endpoint=client"), image)
}

fn qemu_by_certificate(setup: Setup) {
    let pki = Pki::new(Kind::Rsa(2048));
    qemu(setup, &pki, &format!("tls-creds-x509,dir={}", pki.dir.path().display()));
}

fn qemu_by_key(setup: Setup) {
    let pki = Pki::new(Kind::P256);
    qemu(setup, &pki, &format!("tls-creds-psk,dir={},username=bob", pki.dir.path().display()));
}

/// qemu-img sees and copies, qemu-io writes, verifies, discards.
fn qemu(setup: Setup, pki: &Pki, creds: &str) {
    let server = builder(setup, pki).image_data(&noise(8 << 20, 3)).start();
    let (object, image) = qemu_args(&server, creds);
    let qemu_img = |args: &[&str]| run("qemu-img", args);
    let info: Value = serde_json::from_str(
        &qemu_img(&["info", "--output=json", "--object", &object, "--image-opts", &image]).ok(),
    )
    .unwrap();
    assert_eq!(info["virtual-size"], 8 * MIB);
    let copy = server.path("copy.raw");
    qemu_img(&["convert", "--object", &object, "--image-opts", &image, "-O", "raw", copy.to_str().unwrap()])
        .ok();
    assert_same(&copy, &server.image());
    let out = run(
        "qemu-io",
        &[
            "--object",
            &object,
            "--image-opts",
            &image,
            "-c",
            "write -P 0x5a 1000 3000000",
            "-c",
            "flush",
            "-c",
            "read -P 0x5a 1000 3000000",
            "-c",
            "write -z -u 1M 64k",
            "-c",
            "read -P 0 1M 64k",
            "-c",
            "aio_write -P 0x77 5M 1M",
            "-c",
            "aio_write -P 0x78 6M 1M",
            "-c",
            "aio_flush",
            "-c",
            "read -P 0x77 5M 1M",
            "-c",
            "read -P 0x78 6M 1M",
        ],
    )
    .ok();
    assert!(!out.contains("failed"), "{out}");
    // Somebody else's key, or nothing: refused.
    let bad = creds.replace("username=bob", "username=nobody");
    if bad != creds {
        let (object, image) = qemu_args(&server, &bad);
        qemu_img(&["info", "--object", &object, "--image-opts", &image]).failed();
    }
    let stopped = server.stop();
    let disk = std::fs::read(stopped.image()).unwrap();
    assert!(disk[6 << 20..7 << 20].iter().all(|b| *b == 0x78));
}

/// fio has no way to name a folder with certificates: libnbd takes that of the user, who must not be root.
fn fio_verifies_by_certificate(setup: Setup) {
    let pki = Pki::new(Kind::P256);
    let server = builder(setup, &pki).image_len(32 * MIB).start();
    let home = pki.path("home");
    let certificates = home.join(".pki/libnbd");
    std::fs::create_dir_all(&certificates).unwrap();
    for file in ["ca-cert.pem", "client-cert.pem", "client-key.pem"] {
        std::fs::copy(pki.path(file), certificates.join(file)).unwrap();
        std::fs::set_permissions(certificates.join(file), PermissionsExt::from_mode(0o644)).unwrap();
    }
    let root = rustix::process::geteuid().is_root();
    if root {
        for path in [pki.dir.path(), server.dir.path()] {
            std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
        }
        if setup.transport == Transport::Unix {
            std::fs::set_permissions(server.path("nbd.sock"), PermissionsExt::from_mode(0o777)).unwrap();
        }
    }
    let mut fio = if root { tool("setpriv") } else { tool("fio") };
    if root {
        fio.args(["--reuid=65534", "--regid=65534", "--clear-groups", "fio"]);
    }
    let uri = format!("--uri={}", server.uri);
    let args = [
        "--name=verify",
        "--ioengine=nbd",
        &uri,
        "--rw=randrw",
        "--bsrange=512-128k",
        "--bs_unaligned=1",
        "--size=16m",
        "--iodepth=16",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--do_verify=1",
        "--end_fsync=1",
        "--thread=1",
        "--output-format=json",
    ];
    let out = run_command(fio.args(args).env("HOME", &home).current_dir("/")).ok();
    let report: Value = serde_json::from_str(&out[out.find('{').unwrap()..]).unwrap();
    assert_eq!(report["jobs"][0]["error"], 0, "{report}");
    assert!(report["jobs"][0]["write"]["total_ios"].as_u64().unwrap() > 100, "{report}");
    server.stop();
}

fn the_python_bindings_use_every_command(setup: Setup) {
    let pki = Pki::new(Kind::Ed25519);
    let server = builder(setup, &pki).image_len(8 * MIB).start();
    assert_eq!(python(include_str!("every_command.py"), &[&by_certificate(&server, &pki)]).ok(), "ok\n");
    server.stop();
    let server = builder(setup, &pki).image_len(160 * MIB).start();
    assert_eq!(python(include_str!("large_requests.py"), &[&by_key(&server, &pki, "alice")]).ok(), "ok\n");
    server.stop();
}

#[test]
fn gnutls_accepts_certificates_of_every_kind_57() {
    for kind in [Kind::P256, Kind::P384, Kind::Ed25519, Kind::Rsa(2048), Kind::Rsa(4096)] {
        let pki = Pki::new(kind);
        let server = builder(crate::harness::TCP_1_THREADS, &pki).image_len(MIB).start();
        let out = run("nbdinfo", &["--size", &by_certificate(&server, &pki)]);
        assert_eq!(out.ok().trim(), MIB.to_string(), "{kind:?}");
        let (object, image) = qemu_args(&server, &format!("tls-creds-x509,dir={}", pki.dir.path().display()));
        run("qemu-img", &["info", "--object", &object, "--image-opts", &image]).ok();
        server.stop();
    }
}

#[test]
fn revoked_and_strange_clients_are_refused_and_logged_56() {
    let pki = Pki::new(Kind::P256);
    let crl = pki.path("ca-crl.pem");
    pki.revoke(&[]);
    let start =
        || builder(UNIX_1_IO_URING, &pki).args(&["--tls-crl", crl.to_str().unwrap()]).image_len(MIB).start();
    let server = start();
    run("nbdinfo", &[by_certificate(&server, &pki)]).ok();
    server.stop();
    pki.revoke(&[&pki.client]);
    let server = start();
    run("nbdinfo", &[by_certificate(&server, &pki)]).failed();
    run("nbdinfo", &[by_key(&server, &pki, "alice")]).ok();
    let stopped = server.stop();
    let refused = stopped.messages("TLS is not up");
    assert_eq!(refused.len(), 1);
    let reason = field(refused[0], "reason").as_str().unwrap();
    assert!(reason.contains("certificate revoked"), "{reason}");
}

#[test]
fn psktool_and_certtool_make_what_we_read_56() {
    let pki = Pki::new(Kind::P256);
    let keys = pki.path("made.psk");
    for user in ["carol", "dave with spaces"] {
        run("psktool", &["-u", user, "-p", keys.to_str().unwrap()]).ok();
    }
    let (ca_key, ca_cert) = (pki.path("c-key.pem"), pki.path("ca2.pem"));
    let template = pki.path("t");
    std::fs::write(&template, "cn = \"CA\"\nca\ncert_signing_key\n").unwrap();
    let certtool = |args: &[&str]| run("certtool", args).ok();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    certtool(&["--generate-privkey", "--outfile", &text(&ca_key)]);
    let self_signed =
        ["--generate-self-signed", "--load-privkey", &text(&ca_key), "--template", &text(&template)];
    certtool(&[&self_signed[..], &["--outfile", &text(&ca_cert)]].concat());
    let folder = pki.path("made");
    std::fs::create_dir(&folder).unwrap();
    std::fs::copy(&ca_cert, folder.join("ca-cert.pem")).unwrap();
    for (name, usage) in [("server", "tls_www_server"), ("client", "tls_www_client")] {
        let (key, cert) = (folder.join(format!("{name}-key.pem")), folder.join(format!("{name}-cert.pem")));
        let info = format!(
            "cn = \"{name}\"\ndns_name = \"localhost\"\nip_address = \"127.0.0.1\"\n{usage}\nsigning_key\nencryption_key\n"
        );
        std::fs::write(&template, info).unwrap();
        certtool(&["--generate-privkey", "--outfile", &text(&key)]);
        certtool(&[
            "--generate-certificate",
            "--load-ca-certificate",
            &text(&ca_cert),
            "--load-ca-privkey",
            &text(&ca_key),
            "--load-privkey",
            &text(&key),
            "--template",
            &text(&template),
            "--outfile",
            &text(&cert),
        ]);
    }
    let file = |name: &str| text(&folder.join(name));
    let server = Builder::new(UNIX_1_IO_URING)
        .args(&["--tls-cert", &file("server-cert.pem"), "--tls-key", &file("server-key.pem")])
        .args(&["--tls-ca", &file("ca-cert.pem"), "--tls-psk", &text(&keys)])
        .image_len(MIB)
        .start();
    run("nbdinfo", &[format!("{}&tls-certificates={}", server.uri, folder.display())]).ok();
    for user in ["carol", "dave%20with%20spaces"] {
        let uri = server.uri.replacen("://", &format!("://{user}@"), 1);
        run("nbdinfo", &[format!("{uri}&tls-psk-file={}", keys.display())]).ok();
    }
    server.stop();
}

#[test]
fn exports_may_require_tls_one_by_one_50() {
    let pki = Pki::new(Kind::P256);
    let text = format!(
        "[tls]\nmode = \"selective\"\ncert = \"{0}/server-cert.pem\"\nkey = \"{0}/server-key.pem\"\npsk = \"{0}/keys.psk\"\n\
         [[export]]\nname = \"open\"\nimage = \"disk.raw\"\nread_only = true\n\
         [[export]]\nname = \"secret\"\nimage = \"secret.raw\"\ntls = \"required\"\nallow = [\"psk:alice\"]\n",
        pki.dir.path().display()
    );
    let builder = Builder::new(UNIX_1_IO_URING).image_len(MIB).config(&text);
    std::fs::write(builder.path("secret.raw"), vec![7; 2 << 20]).unwrap();
    let server = builder.start();
    let uris = server.more_uris();
    assert!(
        uris[0].starts_with("nbd+unix:///open") && uris[1].starts_with("nbds+unix:///secret"),
        "{uris:?}"
    );
    let list: Value =
        serde_json::from_str(&run("nbdinfo", &["--list", "--json", &server.uri_of("")]).ok()).unwrap();
    let names: Vec<&str> =
        list["exports"].as_array().unwrap().iter().map(|e| e["export-name"].as_str().unwrap()).collect();
    assert_eq!(names, ["open"]);
    run("nbdinfo", &[&uris[0]]).ok();
    let clear = run("nbdinfo", &[uris[1].replacen("nbds", "nbd", 1)]).failed();
    assert!(clear.contains("TLS"), "{clear}");
    let secret = |user: &str| {
        let uri = uris[1].replacen("://", &format!("://{user}@"), 1);
        run(
            "nbdinfo",
            &["--size".to_owned(), format!("{uri}&tls-psk-file={}", pki.path("keys.psk").display())],
        )
    };
    assert_eq!(secret("alice").ok().trim(), "2097152");
    secret("bob").failed();
    let stopped = server.stop();
    let refused = stopped.messages("export refused");
    let who: Vec<&str> = refused.iter().map(|l| field(l, "client").as_str().unwrap()).collect();
    assert!(who.iter().any(|w| w.contains("psk:bob")), "{who:?}");
}

#[test]
fn nbd_client_lists_over_tls() {
    let pki = Pki::new(Kind::Rsa(2048));
    let server =
        builder(crate::harness::TCP_1_THREADS, &pki).args(&["--export", "the disk"]).image_len(MIB).start();
    let port = port_of(&server).to_string();
    let file = |name: &str| pki.path(name).to_str().unwrap().to_owned();
    let out: Ran = run(
        "nbd-client",
        &[
            "-l",
            "127.0.0.1",
            &port,
            "-cacertfile",
            &file("ca-cert.pem"),
            "-certfile",
            &file("client-cert.pem"),
            "-keyfile",
            &file("client-key.pem"),
            "-tlshostname",
            "localhost",
        ],
    );
    let text = out.ok();
    assert!(text.contains("the disk"), "{text}");
    server.stop();
}

/// A client that vanishes in TLS leaves neither a descriptor nor a busy loop behind.
#[test]
fn clients_that_vanish_leave_nothing() {
    let pki = Pki::new(Kind::P256);
    let server = builder(UNIX_1_IO_URING, &pki).image_len(16 * MIB).start();
    run("nbdinfo", &[by_certificate(&server, &pki)]).ok();
    let baseline = server.fd_count();
    for _ in 0..3 {
        let mut copies: Vec<_> = (0..4)
            .map(|_| {
                let uri = by_key(&server, &pki, "alice");
                let program = "import nbd, sys\nh = nbd.NBD()\nh.set_uri_allow_local_file(True)\nh.connect_uri(sys.argv[1])\nprint('up', flush=True)\nwhile True:\n    h.pread(1 << 20, 0)\n";
                let mut child = python_command(program)
                    .arg(uri)
                    .stdout(Stdio::piped())
                    .stderr(Stdio::null())
                    .spawn()
                    .unwrap();
                let mut up = [0; 3];
                child.stdout.as_mut().unwrap().read_exact(&mut up).unwrap();
                child
            })
            .collect();
        for child in &mut copies {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        server.wait_for_fds(baseline);
    }
    server.signal(rustix::process::Signal::USR1);
    run("nbdinfo", &[by_certificate(&server, &pki)]).ok();
    server.stop();
}

/// Between `openssl s_client`, which knows nothing of NBD, and the server: says what comes before TLS.
fn starttls_proxy(port: u16) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let (client, _) = listener.accept().unwrap();
        let mut server = TcpStream::connect(("127.0.0.1", port)).unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut greeting = [0; 18];
        server.read_exact(&mut greeting).unwrap();
        server.write_all(&[0, 0, 0, 3]).unwrap();
        server.write_all(b"IHAVEOPT\0\0\0\x05\0\0\0\0").unwrap();
        let mut ack = [0; 20];
        server.read_exact(&mut ack).unwrap();
        assert_eq!(ack[12..16], [0, 0, 0, 1], "STARTTLS is granted");
        let (mut from_client, mut to_server) = (client.try_clone().unwrap(), server.try_clone().unwrap());
        let up = std::thread::spawn(move || {
            // Either side may close at any time.
            let _ = std::io::copy(&mut from_client, &mut to_server);
            let _ = to_server.shutdown(std::net::Shutdown::Write);
        });
        let (mut from_server, mut to_client) = (server, client);
        let _ = std::io::copy(&mut from_server, &mut to_client);
        let _ = to_client.shutdown(std::net::Shutdown::Write);
        up.join().unwrap();
    });
    address.port()
}

/// A running `openssl s_client` that has made TLS behind NBD's option for it. It takes a command (a letter and a newline) only
/// as all that one read brings, so what was sent before must have come to something first.
struct SClient {
    child: Child,
    stdin: ChildStdin,
    out: Arc<Mutex<Vec<u8>>>,
    err: Arc<Mutex<Vec<u8>>>,
}

fn gather(mut from: impl Read + Send + 'static) -> Arc<Mutex<Vec<u8>>> {
    let all = Arc::new(Mutex::new(Vec::new()));
    let into = Arc::clone(&all);
    std::thread::spawn(move || {
        let mut buf = [0; 4096];
        while let Ok(n @ 1..) = from.read(&mut buf) {
            into.lock().unwrap().extend_from_slice(&buf[..n]);
        }
    });
    all
}

fn count(all: &Mutex<Vec<u8>>, what: &str) -> usize {
    all.lock().unwrap().windows(what.len()).filter(|w| *w == what.as_bytes()).count()
}

impl SClient {
    fn start(server: &Server, pki: &Pki, version: &str) -> SClient {
        let proxy = starttls_proxy(port_of(server));
        let mut command = tool("openssl");
        command
            .args(["s_client", "-connect", &format!("127.0.0.1:{proxy}"), version, "-quiet", "-no_ign_eof"])
            .args(["-cert", pki.path("client-cert.pem").to_str().unwrap()])
            .args(["-key", pki.path("client-key.pem").to_str().unwrap()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = spawn(&mut command);
        let stdin = child.stdin.take().unwrap();
        let (out, err) = (gather(child.stdout.take().unwrap()), gather(child.stderr.take().unwrap()));
        SClient { child, stdin, out, err }
    }

    fn send(&mut self, bytes: &[u8]) {
        self.stdin.write_all(bytes).unwrap();
        self.stdin.flush().unwrap();
    }

    /// Lists the exports; the answer is the `n`th.
    fn list(&mut self, n: usize) {
        self.send(b"IHAVEOPT\0\0\0\x03\0\0\0\0");
        wait_until("a list", || count(&self.out, "the disk") == n);
    }

    fn remark(&mut self, command: &[u8], remark: &str, n: usize) {
        self.send(command);
        wait_until(remark, || count(&self.err, remark) >= n);
    }
}

#[test]
fn key_updates_are_taken_and_renegotiation_is_not() {
    let pki = Pki::new(Kind::P256);
    let server =
        builder(crate::harness::TCP_1_THREADS, &pki).args(&["--export", "the disk"]).image_len(MIB).start();
    let mut client = SClient::start(&server, &pki, "-tls1_3");
    client.list(1);
    // "k" renews the client's key, "K" asks the server to renew its own as well.
    for (i, command) in [b"k\n", b"K\n", b"K\n", b"k\n"].into_iter().enumerate() {
        client.remark(command, "KEYUPDATE", i + 1);
        client.list(i + 2);
    }
    drop(client.stdin);
    wait_for_exit(&mut client.child);

    let mut client = SClient::start(&server, &pki, "-tls1_2");
    client.list(1);
    client.remark(b"R\n", "no renegotiation", 1);
    drop(client.stdin);
    wait_for_exit(&mut client.child);
    // Others are not concerned.
    run("nbdinfo", &[by_certificate(&server, &pki)]).ok();
    server.stop();
}
