//! Certificates for tests, made on the spot: CAs, servers, clients, expired and revoked ones.

use openssl::asn1::{Asn1Integer, Asn1Time};
use openssl::bn::BigNum;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{Id, PKey, Private};
use openssl::rsa::Rsa;
use openssl::ssl::{Ssl, SslContext, SslContextBuilder, SslMethod, SslVerifyMode, SslVersion};
use openssl::x509::extension::{BasicConstraints, ExtendedKeyUsage, KeyUsage, SubjectAlternativeName};
use openssl::x509::{X509, X509Name, X509NameBuilder};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Kinds of keys.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    P256,
    P384,
    Ed25519,
    Rsa(u32),
}

fn key(kind: Kind) -> PKey<Private> {
    let ec = |nid| {
        let group = EcGroup::from_curve_name(nid).unwrap();
        PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap()
    };
    match kind {
        Kind::P256 => ec(Nid::X9_62_PRIME256V1),
        Kind::P384 => ec(Nid::SECP384R1),
        Kind::Ed25519 => PKey::generate_ed25519().unwrap(),
        Kind::Rsa(bits) => PKey::from_rsa(Rsa::generate(bits).unwrap()).unwrap(),
    }
}

fn digest(key: &PKey<Private>) -> MessageDigest {
    if key.id() == Id::ED25519 { MessageDigest::null() } else { MessageDigest::sha256() }
}

/// A certificate and its key.
pub(crate) struct Identity {
    pub(crate) cert: X509,
    pub(crate) key: PKey<Private>,
}

impl Identity {
    /// Writes both into a folder; returns their paths.
    pub(crate) fn write(&self, dir: &Path, name: &str) -> (PathBuf, PathBuf) {
        let (cert, key) = (dir.join(format!("{name}-cert.pem")), dir.join(format!("{name}-key.pem")));
        std::fs::write(&cert, self.cert.to_pem().unwrap()).unwrap();
        std::fs::write(&key, self.key.private_key_to_pem_pkcs8().unwrap()).unwrap();
        (cert, key)
    }
}

/// What a certificate is to be.
#[derive(Clone)]
pub(crate) struct Wish<'a> {
    pub(crate) kind: Kind,
    /// Subject, from the most general attribute on.
    pub(crate) subject: &'a [(&'a str, &'a str)],
    pub(crate) dns: &'a [&'a str],
    pub(crate) ip: &'a [&'a str],
    pub(crate) email: &'a [&'a str],
    pub(crate) uri: &'a [&'a str],
    pub(crate) expired: bool,
    /// Also for key encipherment, which nobody does any more, and QEMU asks for in its own certificates.
    pub(crate) encipher: bool,
    /// A CA, or an end of a connection.
    pub(crate) ca: bool,
}

impl Default for Wish<'_> {
    fn default() -> Self {
        Wish {
            kind: Kind::P256,
            subject: &[("C", "DE"), ("O", "Example"), ("CN", "somebody")],
            dns: &[],
            ip: &[],
            email: &[],
            uri: &[],
            expired: false,
            encipher: false,
            ca: false,
        }
    }
}

fn name(subject: &[(&str, &str)]) -> X509Name {
    let mut builder = X509NameBuilder::new().unwrap();
    for (kind, value) in subject {
        builder.append_entry_by_text(kind, value).unwrap();
    }
    builder.build()
}

/// Makes a certificate, signed by `by` or by itself.
pub(crate) fn issue(by: Option<&Identity>, wish: &Wish<'_>) -> Identity {
    let key = key(wish.kind);
    let mut b = X509::builder().unwrap();
    b.set_version(2).unwrap();
    let mut serial = BigNum::new().unwrap();
    serial.rand(64, openssl::bn::MsbOption::ONE, false).unwrap();
    b.set_serial_number(&Asn1Integer::from_bn(&serial).unwrap()).unwrap();
    let subject = name(wish.subject);
    b.set_subject_name(&subject).unwrap();
    b.set_issuer_name(by.map_or(&*subject, |by| by.cert.subject_name())).unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64;
    let day = 86_400;
    let (from, to) = if wish.expired { (now - 9 * day, now - day) } else { (now - day, now + 9 * day) };
    b.set_not_before(&Asn1Time::from_unix(from).unwrap()).unwrap();
    b.set_not_after(&Asn1Time::from_unix(to).unwrap()).unwrap();
    b.set_pubkey(&key).unwrap();
    if wish.ca {
        b.append_extension(BasicConstraints::new().critical().ca().build().unwrap()).unwrap();
        b.append_extension(KeyUsage::new().critical().key_cert_sign().crl_sign().build().unwrap()).unwrap();
    } else {
        b.append_extension(BasicConstraints::new().build().unwrap()).unwrap();
        let mut usage = KeyUsage::new();
        usage.critical().digital_signature();
        if wish.encipher {
            usage.key_encipherment();
        }
        b.append_extension(usage.build().unwrap()).unwrap();
        b.append_extension(ExtendedKeyUsage::new().server_auth().client_auth().build().unwrap()).unwrap();
    }
    let mut names = SubjectAlternativeName::new();
    for n in wish.dns {
        names.dns(n);
    }
    for n in wish.ip {
        names.ip(n);
    }
    for n in wish.email {
        names.email(n);
    }
    for n in wish.uri {
        names.uri(n);
    }
    if wish.dns.len() + wish.ip.len() + wish.email.len() + wish.uri.len() > 0 {
        let built = names.build(&b.x509v3_context(by.map(|by| &*by.cert), None)).unwrap();
        b.append_extension(built).unwrap();
    }
    let signer = by.map_or(&key, |by| &by.key);
    b.sign(signer, digest(signer)).unwrap();
    Identity { cert: b.build(), key }
}

pub(crate) fn ca(common_name: &str) -> Identity {
    issue(None, &Wish { subject: &[("CN", common_name)], ca: true, ..Wish::default() })
}

/// A server's folder, named as QEMU names the files: a CA, a server certificate for localhost and a client's.
pub(crate) struct Pki {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) ca: Identity,
    pub(crate) client: Identity,
}

impl Pki {
    pub(crate) fn new(server: Kind) -> Pki {
        let dir = tempfile::Builder::new().prefix("conbd-pki-").tempdir().unwrap();
        let ca = ca("Test CA");
        std::fs::write(dir.path().join("ca-cert.pem"), ca.cert.to_pem().unwrap()).unwrap();
        let wish = Wish {
            kind: server,
            subject: &[("C", "DE"), ("O", "Example"), ("CN", "localhost")],
            dns: &["localhost"],
            ip: &["127.0.0.1"],
            ..Wish::default()
        };
        issue(Some(&ca), &wish).write(dir.path(), "server");
        let wish = Wish {
            subject: &[("C", "DE"), ("O", "Example"), ("CN", "client")],
            encipher: true,
            ..Wish::default()
        };
        let client = issue(Some(&ca), &wish);
        client.write(dir.path(), "client");
        std::fs::write(
            dir.path().join("keys.psk"),
            "alice:00112233445566778899aabbccddeeff\nbob:ffeeddccbbaa99887766554433221100\n",
        )
        .unwrap();
        Pki { dir, ca, client }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes `ca-crl.pem`, which revokes these. Uses the program `openssl`: its `ca` command keeps a small database.
    pub(crate) fn revoke(&self, revoked: &[&Identity]) {
        let mut index = String::new();
        for identity in revoked {
            let serial = identity.cert.serial_number().to_bn().unwrap().to_hex_str().unwrap().to_string();
            index.push_str(&format!("R\t330101000000Z\t250101000000Z\t{serial}\tunknown\t/CN=gone\n"));
        }
        std::fs::write(self.path("index.txt"), index).unwrap();
        let (cert, key) = self.ca.write(self.dir.path(), "crl-ca");
        let config = format!(
            "[ca]\ndefault_ca = own\n[own]\ndatabase = {}\ndefault_md = sha256\n",
            self.path("index.txt").display()
        );
        std::fs::write(self.path("crl.cnf"), config).unwrap();
        let out = Command::new("openssl")
            .args(["ca", "-gencrl", "-crldays", "5", "-config"])
            .arg(self.path("crl.cnf"))
            .arg("-cert")
            .arg(cert)
            .arg("-keyfile")
            .arg(key)
            .arg("-out")
            .arg(self.path("ca-crl.pem"))
            .output()
            .expect("openssl is installed");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
}

/// A TLS client of tests, independent of ours.
pub(crate) struct TlsClient {
    builder: SslContextBuilder,
}

impl TlsClient {
    /// Checks nothing, has no certificate.
    pub(crate) fn new() -> TlsClient {
        let mut builder = SslContext::builder(SslMethod::tls_client()).unwrap();
        builder.set_verify(SslVerifyMode::NONE);
        TlsClient { builder }
    }

    pub(crate) fn identity(mut self, identity: &Identity) -> TlsClient {
        self.builder.set_certificate(&identity.cert).unwrap();
        self.builder.set_private_key(&identity.key).unwrap();
        self
    }

    pub(crate) fn psk(mut self, user: &str, key: &[u8]) -> TlsClient {
        let (user, key) = (user.to_owned(), key.to_owned());
        self.builder.set_psk_client_callback(move |_, _, identity, room| {
            identity[..user.len()].copy_from_slice(user.as_bytes());
            identity[user.len()] = 0;
            room[..key.len()].copy_from_slice(&key);
            Ok(key.len())
        });
        self
    }

    /// Speaks this version only, with whatever ciphers.
    pub(crate) fn version(mut self, version: SslVersion) -> TlsClient {
        self.builder.set_security_level(0);
        self.builder.set_cipher_list("ALL:@SECLEVEL=0").unwrap();
        self.builder.set_min_proto_version(Some(version)).unwrap();
        self.builder.set_max_proto_version(Some(version)).unwrap();
        self
    }

    pub(crate) fn ssl(self) -> Ssl {
        Ssl::new(&self.builder.build()).unwrap()
    }
}
