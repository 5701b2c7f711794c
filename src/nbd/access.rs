//! Who a client is, and which exports it may use.
//!
//! Pure: a [`ClientIdentity`] is put together by the session (address and uid at accept, certificate or PSK user after TLS);
//! an [`AllowList`] belongs to an export, and one matching entry admits. Nothing here knows OpenSSL.

use core::net::IpAddr;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// When TLS must be used (the document's NOTLS, FORCEDTLS and SELECTIVETLS).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TlsMode {
    /// TLS is not offered.
    #[default]
    Off,
    /// Nothing but TLS.
    Required,
    /// Offered; exports say whether they need it.
    Selective,
}

/// What the TLS handshake has proved about a client.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TlsPeer {
    /// Such as `TLSv1.3`.
    pub version: String,
    /// OpenSSL's name of the cipher.
    pub cipher: String,
    /// The verified client certificate, if one was asked for.
    pub certificate: Option<PeerCertificate>,
    /// The user whose pre-shared key was used.
    pub psk_user: Option<String>,
}

/// The names in a verified certificate.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PeerCertificate {
    /// The subject, most specific attribute first, as in RFC 4514.
    pub dn: Dn,
    /// subjectAltName: DNS names.
    pub dns: Vec<String>,
    /// subjectAltName: addresses.
    pub ips: Vec<IpAddr>,
    /// subjectAltName: mail addresses.
    pub emails: Vec<String>,
    /// subjectAltName: URIs.
    pub uris: Vec<String>,
    /// SHA-256 of the certificate's DER form.
    pub fingerprint: [u8; 32],
}

/// A distinguished name: attribute types in upper case and their values, in order.
///
/// Source: RFC 4514.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dn(Vec<(String, String)>);

impl Dn {
    /// Makes a name of attributes in the order of RFC 4514: the most specific first.
    #[must_use]
    pub fn new(attributes: Vec<(String, String)>) -> Dn {
        Dn(attributes.into_iter().map(|(kind, value)| (canonical_type(&kind), value)).collect())
    }

    /// Tells whether two texts name the same subject: tools print the attributes in one order or the other.
    fn names_same_as(&self, other: &Dn) -> bool {
        self.0 == other.0 || self.0.iter().eq(other.0.iter().rev())
    }
}

/// The spellings of one attribute type that tools use, made one.
fn canonical_type(kind: &str) -> String {
    let kind = kind.trim().to_ascii_uppercase();
    match kind.as_str() {
        "EMAILADDRESS" | "E" => "EMAIL".to_owned(),
        "S" | "SP" | "STATEORPROVINCENAME" => "ST".to_owned(),
        "COMMONNAME" => "CN".to_owned(),
        "USERID" => "UID".to_owned(),
        _ => kind,
    }
}

impl FromStr for Dn {
    type Err = String;

    fn from_str(text: &str) -> Result<Dn, String> {
        // Attributes are separated by commas; a backslash takes the meaning off the character behind it, or makes a byte
        // of two hexadecimal digits.
        let mut attributes = Vec::new();
        let mut bytes: Vec<u8> = Vec::new();
        // Length up to the last byte that must not be trimmed.
        let mut keep = 0;
        let mut kind: Option<String> = None;
        let finish = |kind: &mut Option<String>, bytes: &mut Vec<u8>, keep: &mut usize| {
            while bytes.len() > *keep && bytes.last() == Some(&b' ') {
                bytes.pop();
            }
            let value = String::from_utf8(std::mem::take(bytes)).map_err(|_| "a value is not UTF-8")?;
            *keep = 0;
            let kind = kind.take().ok_or("an attribute has no \"=\"; write TYPE=VALUE,TYPE=VALUE")?;
            if kind.trim().is_empty() || value.is_empty() {
                return Err("an attribute is empty; write TYPE=VALUE,TYPE=VALUE");
            }
            Ok((kind, value))
        };
        let mut rest = text.bytes();
        while let Some(b) = rest.next() {
            match b {
                b'\\' => {
                    let digit = |b: u8| char::from(b).to_digit(16);
                    let first = rest.next().ok_or("a backslash at the end")?;
                    match (digit(first), rest.clone().next().and_then(digit)) {
                        (Some(high), Some(low)) => {
                            rest.next();
                            bytes.push((high * 16 + low) as u8);
                        }
                        _ => bytes.push(first),
                    }
                    keep = bytes.len();
                }
                b',' | b'+' if kind.is_some() => {
                    attributes.push(finish(&mut kind, &mut bytes, &mut keep)?);
                }
                b'=' if kind.is_none() => {
                    let name = std::mem::take(&mut bytes);
                    keep = 0;
                    kind = Some(String::from_utf8(name).map_err(|_| "an attribute type is not UTF-8")?);
                }
                // Spaces before a value or a type mean nothing.
                b' ' if bytes.is_empty() => {}
                _ => bytes.push(b),
            }
        }
        attributes.push(finish(&mut kind, &mut bytes, &mut keep)?);
        Ok(Dn::new(attributes))
    }
}

impl fmt::Display for Dn {
    /// The form that GnuTLS, QEMU and `openssl -nameopt RFC2253` print.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (kind, value)) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            write!(f, "{kind}=")?;
            for (at, c) in value.char_indices() {
                let last = at + c.len_utf8() == value.len();
                let edge = (at == 0 && (c == ' ' || c == '#')) || (last && c == ' ');
                if c.is_control() {
                    let mut utf8 = [0; 4];
                    for b in c.encode_utf8(&mut utf8).bytes() {
                        write!(f, "\\{b:02X}")?;
                    }
                } else if edge || ",+\"\\<>;=".contains(c) {
                    write!(f, "\\{c}")?;
                } else {
                    write!(f, "{c}")?;
                }
            }
        }
        Ok(())
    }
}

/// All that is known of a client.
#[derive(Debug, Clone, Default)]
pub struct ClientIdentity {
    /// Where it comes from, over TCP.
    pub address: Option<IpAddr>,
    /// Who it is, over a unix socket.
    pub uid: Option<u32>,
    /// What TLS has proved; `None` in the clear.
    pub tls: Option<Arc<TlsPeer>>,
}

impl fmt::Display for ClientIdentity {
    /// For logs: what can be matched by an allow list.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut sep = "";
        if let Some(peer) = &self.tls {
            if let Some(certificate) = &peer.certificate {
                write!(f, "dn:{}", certificate.dn)?;
                sep = " ";
            }
            if let Some(user) = &peer.psk_user {
                write!(f, "{sep}psk:{}", user.escape_debug())?;
                sep = " ";
            }
        }
        if let Some(address) = self.address {
            write!(f, "{sep}address:{address}")?;
            sep = " ";
        }
        if let Some(uid) = self.uid {
            write!(f, "{sep}uid:{uid}")?;
            sep = " ";
        }
        if sep.is_empty() { f.write_str("nobody known") } else { Ok(()) }
    }
}

/// One entry of an allow list.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Rule {
    Dn(Dn),
    Dns(String),
    Ip(IpAddr),
    Email(String),
    Uri(String),
    Fingerprint([u8; 32]),
    Psk(String),
    Address { net: IpAddr, bits: u8 },
    Uid(u32),
}

impl Rule {
    /// Whether only a client behind TLS can match it.
    fn needs_tls(&self) -> bool {
        !matches!(self, Rule::Address { .. } | Rule::Uid(_))
    }

    fn admits(&self, client: &ClientIdentity) -> bool {
        let certificate = client.tls.as_ref().and_then(|peer| peer.certificate.as_ref());
        let in_certificate = |test: &dyn Fn(&PeerCertificate) -> bool| certificate.is_some_and(test);
        match self {
            Rule::Dn(dn) => in_certificate(&|c| c.dn.names_same_as(dn)),
            Rule::Dns(name) => in_certificate(&|c| c.dns.iter().any(|n| n.eq_ignore_ascii_case(name))),
            Rule::Ip(ip) => in_certificate(&|c| c.ips.contains(ip)),
            Rule::Email(email) => in_certificate(&|c| c.emails.contains(email)),
            Rule::Uri(uri) => in_certificate(&|c| c.uris.contains(uri)),
            Rule::Fingerprint(digest) => in_certificate(&|c| c.fingerprint == *digest),
            Rule::Psk(user) => {
                client.tls.as_ref().is_some_and(|peer| peer.psk_user.as_deref() == Some(user.as_str()))
            }
            Rule::Address { net, bits } => client.address.is_some_and(|a| in_network(a, *net, *bits)),
            Rule::Uid(uid) => client.uid == Some(*uid),
        }
    }
}

/// An IPv4 client of an IPv6 listener counts as the IPv4 client that it is.
fn in_network(address: IpAddr, net: IpAddr, bits: u8) -> bool {
    match (address.to_canonical(), net.to_canonical()) {
        (IpAddr::V4(a), IpAddr::V4(n)) => {
            let shift = 32 - u32::from(bits.min(32));
            u64::from(a.to_bits()) >> shift == u64::from(n.to_bits()) >> shift
        }
        (IpAddr::V6(a), IpAddr::V6(n)) => match 128 - u32::from(bits.min(128)) {
            128 => true,
            shift => a.to_bits() >> shift == n.to_bits() >> shift,
        },
        _ => false,
    }
}

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Rule, String> {
        const FORMS: &str = "write dn:, dns:, ip:, email:, uri:, fingerprint:, psk:, address: or uid: and a value, such as \"psk:alice\" or \"address:10.0.0.0/8\"";
        let (kind, value) = text.split_once(':').ok_or_else(|| format!("no kind of entry; {FORMS}"))?;
        if value.is_empty() {
            return Err(format!("nothing behind \"{kind}:\"; {FORMS}"));
        }
        let address =
            |text: &str| text.parse::<IpAddr>().map_err(|_| format!("\"{text}\" is no IPv4 or IPv6 address"));
        Ok(match kind {
            "dn" => Rule::Dn(value.parse().map_err(|why| format!("no distinguished name: {why}"))?),
            "dns" => Rule::Dns(value.to_owned()),
            "ip" => Rule::Ip(address(value)?),
            "email" => Rule::Email(value.to_owned()),
            "uri" => Rule::Uri(value.to_owned()),
            "psk" => Rule::Psk(value.to_owned()),
            "uid" => Rule::Uid(value.parse().map_err(|_| format!("\"{value}\" is no user number"))?),
            "fingerprint" => {
                let digits: Vec<u32> =
                    value.chars().filter(|c| *c != ':').map_while(|c| c.to_digit(16)).collect();
                let given = value.chars().filter(|c| *c != ':').count();
                if digits.len() != 64 || given != 64 {
                    return Err(
                        "a fingerprint is the SHA-256 of the certificate: 64 hexadecimal digits".to_owned()
                    );
                }
                let mut digest = [0; 32];
                for (byte, pair) in digest.iter_mut().zip(digits.chunks_exact(2)) {
                    *byte = (pair[0] * 16 + pair[1]) as u8;
                }
                Rule::Fingerprint(digest)
            }
            "address" => {
                let (net, bits) = match value.split_once('/') {
                    None => (address(value)?, None),
                    Some((net, bits)) => (address(net)?, Some(bits)),
                };
                let most = if net.is_ipv4() { 32 } else { 128 };
                let bits = match bits {
                    None => most,
                    Some(bits) => bits
                        .parse()
                        .ok()
                        .filter(|b| *b <= most)
                        .ok_or_else(|| format!("\"/{bits}\": the length must be 0 to {most}"))?,
                };
                Rule::Address { net, bits }
            }
            other => return Err(format!("unknown kind \"{other}\"; {FORMS}")),
        })
    }
}

/// Who may use an export: whoever matches one of the entries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowList {
    rules: Vec<Rule>,
}

impl AllowList {
    /// Reads entries such as `dn:CN=client,O=Example`, `dns:host`, `ip:10.0.0.1`, `email:`, `uri:` (names in a client's
    /// certificate), `fingerprint:` (SHA-256), `psk:USER`, `address:10.0.0.0/8` and `uid:1000`.
    ///
    /// # Errors
    /// Which entry is wrong, and why.
    pub fn parse<S: AsRef<str>>(entries: &[S]) -> Result<AllowList, String> {
        let rules = entries
            .iter()
            .map(|entry| {
                let entry = entry.as_ref();
                entry.parse().map_err(|why| format!("\"{entry}\": {why}"))
            })
            .collect::<Result<_, String>>()?;
        Ok(AllowList { rules })
    }

    /// Admits the holder of a certificate with this subject, and nobody else (`--tls-authz` of qemu-nbd).
    ///
    /// # Errors
    /// What is wrong with the name.
    pub fn of_dn(dn: &str) -> Result<AllowList, String> {
        Ok(AllowList { rules: vec![Rule::Dn(dn.parse()?)] })
    }

    /// Tells whether the client matches an entry.
    #[must_use]
    pub fn admits(&self, client: &ClientIdentity) -> bool {
        self.rules.iter().any(|rule| rule.admits(client))
    }

    /// Tells whether nobody can match without TLS.
    #[must_use]
    pub fn needs_tls(&self) -> bool {
        self.rules.iter().all(Rule::needs_tls)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dn(text: &str) -> Dn {
        text.parse().unwrap_or_else(|why| panic!("{text}: {why}"))
    }

    fn with_certificate(certificate: PeerCertificate) -> ClientIdentity {
        let peer = TlsPeer { certificate: Some(certificate), ..TlsPeer::default() };
        ClientIdentity { tls: Some(Arc::new(peer)), ..ClientIdentity::default() }
    }

    fn admits(entry: &str, client: &ClientIdentity) -> bool {
        AllowList::parse(&[entry]).unwrap_or_else(|why| panic!("{why}")).admits(client)
    }

    #[test]
    fn names_are_read_and_written_as_rfc_4514_says() {
        let check = |text: &str, want: &[(&str, &str)], shown: &str| {
            let got = dn(text);
            let want: Vec<_> = want.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            assert_eq!(got.0, want, "{text}");
            assert_eq!(got.to_string(), shown);
            assert_eq!(dn(&got.to_string()), got, "what is written is read back");
        };
        check("CN=a", &[("CN", "a")], "CN=a");
        check("cn = a b , O= c ", &[("CN", "a b"), ("O", "c")], "CN=a b,O=c");
        check(r"CN=a\,b\+c,O=x\20", &[("CN", "a,b+c"), ("O", "x ")], r"CN=a\,b\+c,O=x\ ");
        check(r"CN=L\C3\BCtt,emailAddress=a@b", &[("CN", "Lütt"), ("EMAIL", "a@b")], "CN=Lütt,EMAIL=a@b");
        check("CN=a=b", &[("CN", "a=b")], r"CN=a\=b");
        check("CN=a+OU=b", &[("CN", "a"), ("OU", "b")], "CN=a,OU=b");
        for bad in ["", "a", "CN=", "=a", "CN=a,", "CN=a,b", "CN=a\\", r"CN=\ff"] {
            assert!(bad.parse::<Dn>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_name_matches_in_either_order_and_only_as_a_whole() {
        let client = with_certificate(PeerCertificate { dn: dn("CN=me,O=Us,C=DE"), ..Default::default() });
        assert!(admits("dn:CN=me,O=Us,C=DE", &client));
        assert!(admits("dn:C=DE, O=Us, CN=me", &client));
        for no in
            ["dn:CN=me", "dn:CN=me,O=Us", "dn:CN=Me,O=Us,C=DE", "dn:O=Us,CN=me,C=DE", "psk:me", "dns:me"]
        {
            assert!(!admits(no, &client), "{no}");
        }
        assert!(!admits("dn:CN=me", &ClientIdentity::default()));
    }

    #[test]
    fn alternative_names_match_by_their_kind() {
        let client = with_certificate(PeerCertificate {
            dns: vec!["Host.example".into()],
            ips: vec!["10.1.2.3".parse().unwrap()],
            emails: vec!["a@b".into()],
            uris: vec!["urn:x".into()],
            fingerprint: [0xab; 32],
            ..Default::default()
        });
        let digest = "ab".repeat(32);
        let colons = vec!["AB"; 32].join(":");
        for yes in ["dns:host.EXAMPLE", "ip:10.1.2.3", "email:a@b", "uri:urn:x"] {
            assert!(admits(yes, &client), "{yes}");
        }
        assert!(admits(&format!("fingerprint:{digest}"), &client));
        assert!(admits(&format!("fingerprint:{colons}"), &client));
        for no in ["dns:other", "ip:10.1.2.4", "email:A@b", "uri:urn:y", "email:urn:x", "address:10.1.2.3"] {
            assert!(!admits(no, &client), "{no}");
        }
    }

    #[test]
    fn users_addresses_and_uids_match() {
        let peer = TlsPeer { psk_user: Some("alice".into()), ..TlsPeer::default() };
        let alice = ClientIdentity { tls: Some(Arc::new(peer)), ..ClientIdentity::default() };
        assert!(admits("psk:alice", &alice));
        assert!(!admits("psk:bob", &alice));
        assert!(!admits("psk:alice", &ClientIdentity::default()));

        let from = |a: &str| ClientIdentity { address: Some(a.parse().unwrap()), ..Default::default() };
        for (entry, address, want) in [
            ("address:10.0.0.0/8", "10.255.1.1", true),
            ("address:10.0.0.0/8", "11.0.0.1", false),
            ("address:10.0.0.0/8", "::ffff:10.0.0.1", true),
            ("address:10.0.0.7", "10.0.0.7", true),
            ("address:10.0.0.7", "10.0.0.8", false),
            ("address:0.0.0.0/0", "1.2.3.4", true),
            ("address:0.0.0.0/0", "::1", false),
            ("address:::/0", "::1", true),
            ("address:fd00::/8", "fd12::1", true),
            ("address:fd00::/8", "fe80::1", false),
        ] {
            assert_eq!(admits(entry, &from(address)), want, "{entry} {address}");
        }
        let root = ClientIdentity { uid: Some(0), ..ClientIdentity::default() };
        assert!(admits("uid:0", &root));
        assert!(!admits("uid:1000", &root));
        assert!(!admits("uid:0", &from("10.0.0.1")));
        assert!(!AllowList::parse::<&str>(&[]).unwrap().admits(&root), "an empty list admits nobody");
    }

    #[test]
    fn wrong_entries_are_refused_with_their_text() {
        for bad in [
            "",
            "alice",
            "psk:",
            "who:me",
            "address:10.0.0.0/33",
            "address:ten",
            "address:::1/129",
            "uid:root",
            "ip:10.0.0.0/8",
            "dn:me",
            "fingerprint:abcd",
        ] {
            let why = AllowList::parse(&[bad]).expect_err(bad);
            assert!(why.starts_with(&format!("\"{bad}\"")), "{why}");
        }
        assert!(AllowList::parse(&["psk:a", "dns:b"]).unwrap().needs_tls());
        assert!(!AllowList::parse(&["psk:a", "uid:0"]).unwrap().needs_tls());
    }
}
