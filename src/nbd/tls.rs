//! TLS credentials: certificates, keys and pre-shared keys from files, made into OpenSSL contexts for servers and clients.
//!
//! Loading reads files and computes: not on an IOThread. A [`TlsServerConfig`] is immutable; a server holds it behind an `Arc`
//! that can be exchanged, and every handshake uses the one of its moment. What moves bytes is in `channel.rs`.
//!
//! Choices (ours): TLS 1.2 and 1.3 only; forward secrecy always; AES-128-GCM first, because it is the fastest and because a
//! pre-shared key given to OpenSSL in this way goes with SHA-256 only; no session tickets and no resumption (NBD connections live
//! long, and a ticket would outlive a revoked certificate); no renegotiation; only key exchange groups that are fast.

use super::access::{Dn, PeerCertificate, TlsPeer};
use openssl::asn1::Asn1Time;
use openssl::error::ErrorStack;
use openssl::ex_data::Index;
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{Id, PKey, Private};
use openssl::ssl::{
    Ssl, SslContext, SslContextBuilder, SslFiletype, SslMethod, SslMode, SslOptions, SslRef,
    SslSessionCacheMode, SslVerifyMode, SslVersion,
};
use openssl::stack::Stack;
use openssl::x509::store::{X509Lookup, X509Store, X509StoreBuilder};
use openssl::x509::verify::{X509CheckFlags, X509VerifyFlags};
use openssl::x509::{X509, X509NameRef, X509Ref};
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// For TLS 1.2. Pre-shared keys first, with ECDHE or as they are: clients that have one offer certificates' ciphers, too, and
/// only those who have one offer these. Then certificates: ECDHE with an AEAD.
const CIPHERS: &str = "ECDHE-PSK-CHACHA20-POLY1305:kECDHEPSK+AES:PSK-AES256-GCM-SHA384:PSK-AES128-GCM-SHA256:ECDHE+AESGCM:ECDHE+CHACHA20:!aNULL";
/// For TLS 1.3, in the server's order of preference.
const CIPHER_SUITES: &str = "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256";
/// Groups of a server: those whose key exchange takes a fraction of a millisecond (P-384: 2.4 ms), as the client chooses.
const SERVER_GROUPS: &str = "X25519:P-256";
/// Groups of a client.
const CLIENT_GROUPS: &str = "X25519:P-256:P-384";
/// Longest pre-shared key that OpenSSL takes, in bytes (`PSK_MAX_PSK_LEN`).
const PSK_KEY_MAX: usize = 256;
/// Longest user name that OpenSSL takes, in bytes (`PSK_MAX_IDENTITY_LEN` of 1.1.1, less its NUL).
const PSK_USER_MAX: usize = 127;
/// RSA keys from this size on take milliseconds to sign with (measured on a 2-core virtual machine: 2048 bits 0.8 ms, 3072 bits
/// 2.4 ms, 4096 bits 5 ms, ECDSA P-384 1.1 ms, P-256 and Ed25519 below 0.1 ms).
const SLOW_RSA_BITS: u32 = 3072;
/// Largest credential file that is read (ours).
const FILE_MAX: u64 = 16 << 20;

/// Why credentials cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read the {what} {}: {source}", path.display())]
    Read {
        /// What the file is for.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file's contents are no use.
    #[error("{what} {}: {why}", path.display())]
    Bad {
        /// What the file is for.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// What is wrong, and what to do.
        why: String,
    },
    /// The files do not go together, or OpenSSL refuses.
    #[error("TLS: {0}")]
    Setup(String),
}

fn setup(doing: &str) -> impl Fn(ErrorStack) -> TlsError + '_ {
    move |e| TlsError::Setup(format!("cannot {doing}: {}", reasons(&e)))
}

/// OpenSSL's reasons, without its file names and numbers.
pub(super) fn reasons(stack: &ErrorStack) -> String {
    let mut texts: Vec<&str> = Vec::new();
    for error in stack.errors() {
        if let Some(reason) = error.reason()
            && !texts.contains(&reason)
        {
            texts.push(reason);
        }
    }
    if texts.is_empty() { "OpenSSL gives no reason".to_owned() } else { texts.join(", ") }
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    let failed = |source| TlsError::Read { what, path: path.to_owned(), source };
    let len = std::fs::metadata(path).map_err(failed)?.len();
    if len > FILE_MAX {
        return Err(bad(what, path, format!("it has {len} bytes, which is too much for such a file")));
    }
    std::fs::read(path).map_err(failed)
}

fn bad(what: &'static str, path: &Path, why: impl Into<String>) -> TlsError {
    TlsError::Bad { what, path: path.to_owned(), why: why.into() }
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<X509>, TlsError> {
    let pem = read(what, path)?;
    let list = X509::stack_from_pem(&pem)
        .map_err(|e| bad(what, path, format!("no certificate in PEM form ({})", reasons(&e))))?;
    if list.is_empty() {
        return Err(bad(what, path, "there is no certificate in it; it must be in PEM form"));
    }
    Ok(list)
}

fn private_key(path: &Path) -> Result<PKey<Private>, TlsError> {
    const WHAT: &str = "private key";
    let pem = read(WHAT, path)?;
    let mut asked = false;
    // Without a callback OpenSSL would ask at the terminal.
    let key = PKey::private_key_from_pem_callback(&pem, |_| {
        asked = true;
        Err(ErrorStack::get())
    });
    key.map_err(|e| match asked {
        true => bad(
            WHAT,
            path,
            "it is encrypted; decrypt it (openssl pkey -in KEY -out PLAIN) and protect it by its permissions",
        ),
        false => bad(WHAT, path, format!("no private key in PEM form ({})", reasons(&e))),
    })
}

/// A remark about a file that others on this machine may read.
fn note_if_public(what: &str, path: &Path, notes: &mut Vec<String>) {
    if std::fs::metadata(path).is_ok_and(|m| m.permissions().mode() & 0o004 != 0) {
        notes.push(format!(
            "the {what} {} can be read by everybody on this machine; chmod o-r it",
            path.display()
        ));
    }
}

/// A store of trusted certificates, with revocation lists if there are any.
fn trust(ca: &Path, crl: Option<&Path>) -> Result<(X509Store, Stack<openssl::x509::X509Name>), TlsError> {
    const WHAT: &str = "CA certificate file";
    let refused = |e: ErrorStack| bad(WHAT, ca, reasons(&e));
    let mut store = X509StoreBuilder::new().map_err(refused)?;
    let mut names = Stack::new().map_err(refused)?;
    for certificate in certificates(WHAT, ca)? {
        names.push(certificate.subject_name().to_owned().map_err(refused)?).map_err(refused)?;
        store.add_cert(certificate).map_err(refused)?;
    }
    // What the operator puts into that file is trusted as it is, an intermediate CA too.
    let mut flags = X509VerifyFlags::PARTIAL_CHAIN;
    if let Some(crl) = crl {
        const WHAT: &str = "revocation list";
        let refused =
            |e: ErrorStack| bad(WHAT, crl, format!("no revocation list in PEM form ({})", reasons(&e)));
        read(WHAT, crl)?;
        let path = crl.to_str().ok_or_else(|| bad(WHAT, crl, "its path is not UTF-8; rename it"))?;
        let lookup = store.add_lookup(X509Lookup::file()).map_err(refused)?;
        if lookup.load_crl_file(path, SslFiletype::PEM).map_err(refused)? == 0 {
            return Err(bad(WHAT, crl, "there is no revocation list in it; it must be in PEM form"));
        }
        flags |= X509VerifyFlags::CRL_CHECK | X509VerifyFlags::CRL_CHECK_ALL;
    }
    store.set_flags(flags).map_err(refused)?;
    Ok((store.build(), names))
}

/// What servers and clients have in common.
fn context(method: SslMethod, groups: &str) -> Result<SslContextBuilder, ErrorStack> {
    let mut builder = SslContext::builder(method)?;
    builder.set_min_proto_version(Some(SslVersion::TLS1_2))?;
    builder.set_options(
        SslOptions::NO_RENEGOTIATION
            | SslOptions::NO_COMPRESSION
            | SslOptions::NO_TICKET
            | SslOptions::CIPHER_SERVER_PREFERENCE,
    );
    // Idle connections give their buffers back; SSL_write takes all it is given (the channel bounds that).
    builder.set_mode(SslMode::RELEASE_BUFFERS);
    builder.set_cipher_list(CIPHERS)?;
    builder.set_ciphersuites(CIPHER_SUITES)?;
    builder.set_groups_list(groups)?;
    builder.set_session_cache_mode(SslSessionCacheMode::OFF);
    Ok(builder)
}

// ------------------------------------------------------------------------------------------------- pre-shared keys

/// Users and their keys, from a file as GnuTLS's `psktool` writes it: a line `user:hexkey` for each.
pub struct PskUsers {
    keys: HashMap<String, Vec<u8>>,
}

impl fmt::Debug for PskUsers {
    /// The number only: names and keys do not belong in logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PskUsers").field("users", &self.keys.len()).finish_non_exhaustive()
    }
}

impl PskUsers {
    /// Reads a file.
    ///
    /// # Errors
    /// With the line that is wrong.
    pub fn load(path: &Path) -> Result<PskUsers, TlsError> {
        const WHAT: &str = "PSK file";
        PskUsers::parse(&read(WHAT, path)?).map_err(|why| bad(WHAT, path, why))
    }

    /// Reads the file's contents. A user that begins with `#` is written in hexadecimal, as GnuTLS does for names with special
    /// characters; a line of which that is not true is a comment.
    ///
    /// # Errors
    /// Which line is wrong, and why; no user at all.
    pub fn parse(text: &[u8]) -> Result<PskUsers, String> {
        let mut keys = HashMap::new();
        for (i, line) in text.split(|b| *b == b'\n').enumerate() {
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let wrong = |why: &str| format!("line {}: {why}; write USER:HEXKEY, as psktool does", i + 1);
            let colon = line.iter().rposition(|b| *b == b':');
            let encoded = line.strip_prefix(b"#").and_then(|l| unhex(&l[..colon?.checked_sub(1)?]));
            if line.starts_with(b"#") && encoded.is_none() {
                continue;
            }
            let colon = colon.ok_or_else(|| wrong("there is no colon"))?;
            let user = encoded.unwrap_or_else(|| line[..colon].to_vec());
            let user = String::from_utf8(user).map_err(|_| wrong("the user is not UTF-8"))?;
            if user.is_empty() || user.len() > PSK_USER_MAX || user.contains('\0') {
                return Err(wrong("a user has 1 to 127 bytes without NUL"));
            }
            let key =
                unhex(line[colon + 1..].trim_ascii()).ok_or_else(|| wrong("the key is not hexadecimal"))?;
            if key.is_empty() || key.len() > PSK_KEY_MAX {
                return Err(wrong("a key has 1 to 256 bytes"));
            }
            if keys.insert(user, key).is_some() {
                return Err(wrong("this user was there before"));
            }
        }
        if keys.is_empty() {
            return Err("there is no user in it; make one with psktool -u USER -p FILE".to_owned());
        }
        Ok(PskUsers { keys })
    }

    /// How many users there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Never: a file without a user is an error.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }
}

fn unhex(text: &[u8]) -> Option<Vec<u8>> {
    let digit = |b: u8| char::from(b).to_digit(16);
    let (pairs, rest) = text.as_chunks::<2>();
    if !rest.is_empty() {
        return None;
    }
    pairs.iter().map(|[high, low]| Some((digit(*high)? * 16 + digit(*low)?) as u8)).collect()
}

/// Where the callback leaves the user whose key was handed to OpenSSL.
fn user_index() -> Index<Ssl, String> {
    static INDEX: OnceLock<Index<Ssl, String>> = OnceLock::new();
    *INDEX.get_or_init(|| Ssl::new_ex_index().expect("OpenSSL has memory for one more index"))
}

// ----------------------------------------------------------------------------------------------------------- server

/// The files of a server's credentials.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate, and behind it the intermediate ones up to a CA that clients know (PEM).
    pub cert: Option<PathBuf>,
    /// The private key of the first certificate (PEM, not encrypted).
    pub key: Option<PathBuf>,
    /// Certificates of the CAs that sign client certificates (PEM); used with `verify_client`.
    pub ca: Option<PathBuf>,
    /// Revocation lists (PEM), one for every CA in a client's chain; used with `verify_client`.
    pub crl: Option<PathBuf>,
    /// Users and pre-shared keys, as `psktool` writes them.
    pub psk: Option<PathBuf>,
    /// Whether a client that shows no valid certificate is refused. (One with a pre-shared key needs none.)
    pub verify_client: bool,
}

impl TlsFiles {
    /// The files of QEMU's `tls-creds-x509,endpoint=server,dir=DIR,verify-peer=…`: `server-cert.pem`, `server-key.pem`,
    /// `ca-cert.pem` and, if it is there, `ca-crl.pem`. QEMU's default for `verify-peer` is yes.
    #[must_use]
    pub fn qemu_x509_dir(dir: &Path, verify_peer: bool) -> TlsFiles {
        let crl = dir.join("ca-crl.pem");
        TlsFiles {
            cert: Some(dir.join("server-cert.pem")),
            key: Some(dir.join("server-key.pem")),
            ca: Some(dir.join("ca-cert.pem")),
            crl: crl.exists().then_some(crl),
            psk: None,
            verify_client: verify_peer,
        }
    }

    /// The file of QEMU's `tls-creds-psk,endpoint=server,dir=DIR`: `keys.psk`.
    #[must_use]
    pub fn qemu_psk_dir(dir: &Path) -> TlsFiles {
        TlsFiles { psk: Some(dir.join("keys.psk")), ..TlsFiles::default() }
    }
}

/// A server's credentials, ready for handshakes. Immutable.
pub struct TlsServerConfig {
    context: SslContext,
    slow: bool,
    notes: Vec<String>,
}

impl fmt::Debug for TlsServerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsServerConfig").field("slow", &self.slow).finish_non_exhaustive()
    }
}

impl TlsServerConfig {
    /// Loads the files. Blocks: not on an IOThread.
    ///
    /// # Errors
    /// Which file is wrong or missing, and what to do.
    pub fn load(files: &TlsFiles) -> Result<Arc<TlsServerConfig>, TlsError> {
        let mut builder = context(SslMethod::tls_server(), SERVER_GROUPS).map_err(setup("set OpenSSL up"))?;
        builder.set_num_tickets(0).map_err(setup("switch session tickets off"))?;
        // A pre-shared key is a session to OpenSSL, and where clients are verified a session must belong to somebody.
        builder.set_session_id_context(b"conbd").map_err(setup("set OpenSSL up"))?;
        let (mut slow, mut notes) = (false, Vec::new());
        match (&files.cert, &files.key) {
            (Some(cert), Some(key)) => slow |= server_certificate(&mut builder, cert, key, &mut notes)?,
            (None, None) if files.psk.is_some() => {}
            (None, None) => {
                return Err(TlsError::Setup("neither a certificate nor a PSK file was given".to_owned()));
            }
            (Some(cert), None) => {
                return Err(TlsError::Setup(format!("the private key of {} is missing", cert.display())));
            }
            (None, Some(key)) => {
                return Err(TlsError::Setup(format!(
                    "the certificate of the key {} is missing",
                    key.display()
                )));
            }
        }
        if files.verify_client {
            let ca = files.ca.as_deref().ok_or_else(|| {
                TlsError::Setup(
                    "clients are to be verified, but the CA certificate file is missing".to_owned(),
                )
            })?;
            let (store, names) = trust(ca, files.crl.as_deref())?;
            builder.set_verify_cert_store(store).map_err(setup("trust the CAs"))?;
            builder.set_client_ca_list(names);
            builder.set_verify(SslVerifyMode::PEER | SslVerifyMode::FAIL_IF_NO_PEER_CERT);
            // What a client sends to be verified takes as long as the client chooses.
            slow = true;
        } else {
            builder.set_verify(SslVerifyMode::NONE);
        }
        if let Some(path) = &files.psk {
            note_if_public("PSK file", path, &mut notes);
            let users = PskUsers::load(path)?;
            builder.set_psk_server_callback(move |ssl, identity, key| {
                Ok(identity.map_or(0, |identity| give_key(&users, ssl, identity, key)))
            });
        }
        Ok(Arc::new(TlsServerConfig { context: builder.build(), slow, notes }))
    }

    /// A new server side of a connection.
    pub(super) fn accept(&self) -> Result<Ssl, TlsError> {
        let mut ssl = Ssl::new(&self.context).map_err(setup("begin a handshake"))?;
        ssl.set_accept_state();
        Ok(ssl)
    }

    /// Whether a step of a handshake may take milliseconds, and so belongs to the thread pool.
    #[must_use]
    pub fn is_slow(&self) -> bool {
        self.slow
    }

    /// Remarks for the log: what works, but should be looked at.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }
}

/// Hands a user's key to OpenSSL; 0 means that there is no such user.
fn give_key(users: &PskUsers, ssl: &mut SslRef, identity: &[u8], key: &mut [u8]) -> usize {
    let known = std::str::from_utf8(identity).ok().and_then(|user| users.keys.get_key_value(user));
    let Some((user, secret)) = known else { return 0 };
    let Some(room) = key.get_mut(..secret.len()) else { return 0 };
    room.copy_from_slice(secret);
    ssl.set_ex_data(user_index(), user.clone());
    secret.len()
}

/// Loads certificate and key; tells whether signing with it is slow.
fn server_certificate(
    builder: &mut SslContextBuilder,
    cert: &Path,
    key: &Path,
    notes: &mut Vec<String>,
) -> Result<bool, TlsError> {
    let slow = identity(builder, "certificate", cert, key)?;
    note_if_public("private key", key, notes);
    if let Ok(first) = certificates("certificate", cert)
        && let Some(why) = not_valid_now(&first[0])
    {
        notes.push(format!("the certificate {} {why}: clients will refuse it", cert.display()));
    }
    Ok(slow)
}

/// Loads a certificate chain and its key into a context; tells whether signing with the key is slow.
fn identity(
    builder: &mut SslContextBuilder,
    what: &'static str,
    cert: &Path,
    key: &Path,
) -> Result<bool, TlsError> {
    let mut chain = certificates(what, cert)?.into_iter();
    let refused = |e: ErrorStack| bad(what, cert, format!("OpenSSL refuses it ({})", reasons(&e)));
    let first = chain.next().expect("not empty");
    builder.set_certificate(&first).map_err(refused)?;
    for more in chain {
        builder.add_extra_chain_cert(more).map_err(refused)?;
    }
    let secret = private_key(key)?;
    let same = first.public_key().is_ok_and(|public| public.public_eq(&secret));
    if !same {
        let why = format!(
            "it does not belong to the certificate {}; give the key that this certificate was made for",
            cert.display()
        );
        return Err(bad("private key", key, why));
    }
    builder
        .set_private_key(&secret)
        .map_err(|e| bad("private key", key, format!("OpenSSL refuses it ({})", reasons(&e))))?;
    Ok(is_slow(&secret))
}

fn is_slow(key: &PKey<Private>) -> bool {
    match key.id() {
        Id::RSA => key.bits() >= SLOW_RSA_BITS,
        Id::EC => {
            let curve = key.ec_key().ok().and_then(|key| key.group().curve_name());
            curve != Some(Nid::X9_62_PRIME256V1)
        }
        Id::ED25519 => false,
        _ => true,
    }
}

fn not_valid_now(certificate: &X509Ref) -> Option<&'static str> {
    let now = Asn1Time::days_from_now(0).ok()?;
    if certificate.not_after() < &*now {
        Some("has expired")
    } else if certificate.not_before() > &*now {
        Some("is not valid yet")
    } else {
        None
    }
}

// ----------------------------------------------------------------------------------------------------------- client

/// A client's credentials and expectations, as files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsClientFiles {
    /// Folder with `ca-cert.pem` and perhaps `client-cert.pem`, `client-key.pem` and `ca-crl.pem`. None: the CAs of the system.
    pub dir: Option<PathBuf>,
    /// Pre-shared keys, as `psktool` writes them.
    pub psk: Option<PathBuf>,
    /// The user in it.
    pub user: Option<String>,
    /// Whether the server's certificate must be valid for its name.
    pub verify: bool,
}

impl Default for TlsClientFiles {
    fn default() -> TlsClientFiles {
        TlsClientFiles { dir: None, psk: None, user: None, verify: true }
    }
}

/// A client's credentials, ready for handshakes.
pub struct TlsClientConfig {
    context: SslContext,
    check_name: bool,
}

impl TlsClientConfig {
    /// Loads the files. Blocks: not on an IOThread.
    ///
    /// # Errors
    /// Which file is wrong or missing, and what to do.
    pub fn load(files: &TlsClientFiles) -> Result<TlsClientConfig, TlsError> {
        let mut builder = context(SslMethod::tls_client(), CLIENT_GROUPS).map_err(setup("set OpenSSL up"))?;
        if let Some(psk) = &files.psk {
            let mut users = PskUsers::load(psk)?;
            let user = match &files.user {
                Some(user) => user.clone(),
                None if users.len() == 1 => users.keys.keys().next().cloned().unwrap_or_default(),
                None => std::env::var("LOGNAME").unwrap_or_default(),
            };
            let key = users.keys.remove(&user).ok_or_else(|| {
                bad("PSK file", psk, format!("it has no user \"{user}\"; name one as in nbds://USER@HOST/"))
            })?;
            builder.set_psk_client_callback(move |_, _, identity, room| {
                // One byte of the identity's room is for the NUL behind it.
                match (identity.get_mut(..=user.len()), room.get_mut(..key.len())) {
                    (Some(name), Some(room)) => {
                        name[..user.len()].copy_from_slice(user.as_bytes());
                        name[user.len()] = 0;
                        room.copy_from_slice(&key);
                        Ok(key.len())
                    }
                    _ => Ok(0),
                }
            });
            // A server that answers with a certificate instead has not proved that it knows the key: nothing is trusted.
            builder.set_verify(SslVerifyMode::PEER);
            return Ok(TlsClientConfig { context: builder.build(), check_name: false });
        }
        match &files.dir {
            None => builder.set_default_verify_paths().map_err(setup("find the system's CAs"))?,
            Some(dir) => {
                let crl = dir.join("ca-crl.pem");
                let ca = dir.join("ca-cert.pem");
                if files.verify || ca.exists() {
                    let (store, _) = trust(&ca, crl.exists().then_some(crl.as_path()))?;
                    builder.set_verify_cert_store(store).map_err(setup("trust the CAs"))?;
                }
                let (cert, key) = (dir.join("client-cert.pem"), dir.join("client-key.pem"));
                if cert.exists() {
                    identity(&mut builder, "client certificate", &cert, &key)?;
                }
            }
        }
        builder.set_verify(if files.verify { SslVerifyMode::PEER } else { SslVerifyMode::NONE });
        Ok(TlsClientConfig { context: builder.build(), check_name: files.verify })
    }

    /// A new client side of a connection to the server of that name or address.
    pub(super) fn connect(&self, host: &str) -> Result<Ssl, TlsError> {
        let failed = |e: ErrorStack| setup("begin a handshake")(e);
        let mut ssl = Ssl::new(&self.context).map_err(failed)?;
        ssl.set_connect_state();
        let address: Option<IpAddr> = host.parse().ok();
        if address.is_none() && !host.is_empty() {
            ssl.set_hostname(host).map_err(failed)?;
        }
        if self.check_name {
            let param = ssl.param_mut();
            param.set_hostflags(X509CheckFlags::NO_PARTIAL_WILDCARDS);
            match address {
                Some(ip) => param.set_ip(ip).map_err(failed)?,
                None => param.set_host(host).map_err(failed)?,
            }
        }
        Ok(ssl)
    }
}

impl fmt::Debug for TlsClientConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsClientConfig").field("check_name", &self.check_name).finish_non_exhaustive()
    }
}

// ------------------------------------------------------------------------------------------------------ what was proved

/// What a finished handshake says about the other side.
pub(super) fn peer(ssl: &SslRef) -> TlsPeer {
    let cipher = ssl.current_cipher().map_or("", |c| c.name());
    // The callback may have handed out a key that was not used in the end: in TLS 1.3 the server may have gone on with a
    // certificate. A key that was used shows as a resumed session there, and in the cipher's name in TLS 1.2.
    let used_psk = match ssl.version2() {
        Some(SslVersion::TLS1_3) => ssl.session_reused(),
        _ => cipher.contains("PSK"),
    };
    TlsPeer {
        version: ssl.version_str().to_owned(),
        cipher: cipher.to_owned(),
        certificate: ssl.peer_certificate().map(|c| names(&c)),
        psk_user: if used_psk { ssl.ex_data(user_index()).cloned() } else { None },
    }
}

fn names(certificate: &X509Ref) -> PeerCertificate {
    let mut fingerprint = [0; 32];
    if let Ok(digest) = certificate.digest(MessageDigest::sha256()) {
        fingerprint.copy_from_slice(&digest);
    }
    let mut all = PeerCertificate {
        dn: subject(certificate.subject_name()),
        fingerprint,
        ..PeerCertificate::default()
    };
    for name in certificate.subject_alt_names().iter().flatten() {
        let text = |t: Option<&str>| t.map(str::to_owned);
        all.dns.extend(text(name.dnsname()));
        all.emails.extend(text(name.email()));
        all.uris.extend(text(name.uri()));
        all.ips.extend(name.ipaddress().and_then(|bytes| match bytes.len() {
            4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
            16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
            _ => None,
        }));
    }
    all
}

fn subject(name: &X509NameRef) -> Dn {
    let mut attributes: Vec<(String, String)> = name
        .entries()
        .map(|entry| {
            let kind =
                entry.object().nid().short_name().map_or_else(|_| entry.object().to_string(), str::to_owned);
            let raw = entry.data().as_slice();
            // Decoded as a whole: a text with a NUL in it must not pass for what is before the NUL.
            let value = match entry.data().to_string() {
                Ok(text) => text,
                Err(_) => raw.iter().fold(String::from("#"), |hex, b| format!("{hex}{b:02X}")),
            };
            (kind, value)
        })
        .collect();
    // Certificates begin with the most general attribute, RFC 4514 writes it last.
    attributes.reverse();
    Dn::new(attributes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn psk_files_are_read_as_psktool_writes_them() {
        let users = PskUsers::parse(b"alice:00ff10\r\n\nbob:AB\n# a comment\n#6a6f:01\nx:y:0203\n").unwrap();
        assert_eq!(users.len(), 4);
        assert_eq!(users.keys["alice"], [0, 255, 16]);
        assert_eq!(users.keys["bob"], [0xab]);
        assert_eq!(users.keys["jo"], [1]);
        assert_eq!(users.keys["x:y"], [2, 3]);
        assert!(!format!("{users:?}").contains("alice"));
    }

    #[test]
    fn wrong_psk_files_are_refused_with_the_line() {
        let long = format!("{}:00", "u".repeat(128));
        let key = format!("u:{}", "00".repeat(257));
        for (text, line) in [
            ("alice", 1),
            ("a:00\nb", 2),
            (":00", 1),
            ("a:", 1),
            ("a:0", 1),
            ("a:zz", 1),
            ("a:00\na:01", 2),
            (long.as_str(), 1),
            (key.as_str(), 1),
        ] {
            let why = PskUsers::parse(text.as_bytes()).expect_err(text);
            assert!(why.starts_with(&format!("line {line}: ")), "{text}: {why}");
        }
        assert!(PskUsers::parse(b"\n# only a comment\n").expect_err("none").contains("psktool"));
        assert!(PskUsers::parse(b"a\xff:00").is_err());
    }

    #[test]
    fn missing_parts_are_named() {
        let load = |files: TlsFiles| TlsServerConfig::load(&files).expect_err("incomplete").to_string();
        assert!(load(TlsFiles::default()).contains("neither a certificate nor a PSK file"));
        let cert = Some(PathBuf::from("/nonexistent/c.pem"));
        assert!(
            load(TlsFiles { cert: cert.clone(), ..TlsFiles::default() })
                .contains("private key of /nonexistent/c.pem")
        );
        assert!(
            load(TlsFiles { key: cert.clone(), ..TlsFiles::default() }).contains("certificate of the key")
        );
        let files = TlsFiles { cert: cert.clone(), key: cert, ..TlsFiles::default() };
        assert!(load(files).contains("cannot read the certificate /nonexistent/c.pem"));
    }
}
