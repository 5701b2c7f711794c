//! The small languages inside qemu-nbd's options: `key=value` lists, `json:` objects, sizes; and what they say about an image
//! or an object. Pure.

use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Settings by their dotted names, such as `file.filename`.
pub(super) type Settings = BTreeMap<String, String>;

/// Splits `a=1,b=x,,y` (a doubled comma is a comma). A first piece without `=` is the value of `implied`; later ones are
/// switches: `x` is `x=on`, `nox` is `x=off`.
///
/// # Errors
/// A piece without a name.
pub(super) fn key_values(text: &str, implied: &str) -> Result<Settings, String> {
    let mut settings = Settings::new();
    let mut pieces = Vec::new();
    let mut piece = String::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            ',' if chars.peek() == Some(&',') => {
                chars.next();
                piece.push(',');
            }
            ',' => pieces.push(std::mem::take(&mut piece)),
            c => piece.push(c),
        }
    }
    if !piece.is_empty() {
        pieces.push(piece);
    }
    for (i, piece) in pieces.into_iter().enumerate() {
        let (key, value) = match piece.split_once('=') {
            Some((key, value)) => (key.to_owned(), value.to_owned()),
            None if i == 0 => (implied.to_owned(), piece),
            None => match piece.strip_prefix("no") {
                Some(key) if !key.is_empty() => (key.to_owned(), "off".to_owned()),
                _ => (piece, "on".to_owned()),
            },
        };
        if key.is_empty() {
            return Err(format!("Invalid parameter '' in '{text}'"));
        }
        settings.insert(key, value);
    }
    Ok(settings)
}

/// Flattens a JSON object into dotted names.
///
/// # Errors
/// What is wrong with the text.
pub(super) fn json(text: &str) -> Result<Settings, String> {
    let value: Value =
        serde_json::from_str(text).map_err(|e| format!("Could not parse the JSON options: {e}"))?;
    let mut settings = Settings::new();
    let Value::Object(_) = &value else {
        return Err("Invalid JSON object given".to_owned());
    };
    flatten("", &value, &mut settings)?;
    Ok(settings)
}

fn flatten(name: &str, value: &Value, out: &mut Settings) -> Result<(), String> {
    let below = |key: &str| if name.is_empty() { key.to_owned() } else { format!("{name}.{key}") };
    let text = match value {
        Value::Object(map) => {
            return map.iter().try_for_each(|(key, value)| flatten(&below(key), value, out));
        }
        Value::Array(list) => {
            let mut numbered = list.iter().enumerate();
            return numbered.try_for_each(|(i, value)| flatten(&below(&i.to_string()), value, out));
        }
        Value::String(text) => text.clone(),
        Value::Bool(on) => if *on { "on" } else { "off" }.to_owned(),
        Value::Number(number) => number.to_string(),
        Value::Null => return Err(format!("'{name}' is null")),
    };
    out.insert(name.to_owned(), text);
    Ok(())
}

/// Takes a switch out of the settings.
///
/// # Errors
/// A value that is neither on nor off.
pub(super) fn take_bool(settings: &mut Settings, key: &str) -> Result<Option<bool>, String> {
    match settings.remove(key).as_deref() {
        None => Ok(None),
        Some("on" | "yes" | "true" | "y") => Ok(Some(true)),
        Some("off" | "no" | "false" | "n") => Ok(Some(false)),
        Some(_) => Err(format!("Parameter '{key}' expects 'on' or 'off'")),
    }
}

/// A number as strtoull(3) with base 0 reads it: decimal, `0x`, or octal with a leading 0; nothing behind it.
pub(super) fn number(text: &str) -> Option<u64> {
    let text = text.trim_start_matches([' ', '\t']);
    let text = text.strip_prefix('+').unwrap_or(text);
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return parse_digits(hex, 16);
    }
    match text.strip_prefix('0') {
        Some(octal) if !octal.is_empty() => parse_digits(octal, 8),
        _ => parse_digits(text, 10),
    }
}

fn parse_digits(text: &str, radix: u32) -> Option<u64> {
    // from_str_radix would take a sign.
    text.chars().all(|c| c.is_digit(radix)).then(|| u64::from_str_radix(text, radix).ok()).flatten()
}

/// A size in an image option: a number, perhaps with b, k, M, G, T, P or E.
fn size(key: &str, text: &str) -> Result<u64, String> {
    let bad = || format!("Parameter '{key}' expects a non-negative number below 2^64");
    if let Some(hex) = text.strip_prefix("0x") {
        return parse_digits(hex, 16).ok_or_else(bad);
    }
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let shift = match &text[digits..] {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return Err(bad()),
    };
    let number: u64 = text[..digits].parse().map_err(|_| bad())?;
    number.checked_mul(1 << shift).ok_or_else(bad)
}

/// An image as the FILE operand describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Image {
    /// The host's file or device.
    pub(super) filename: PathBuf,
    /// `raw`, `qcow2`, …; None: probed.
    pub(super) format: Option<String>,
    pub(super) offset: u64,
    pub(super) size: Option<u64>,
    pub(super) read_only: bool,
    /// What `cache.direct` and `cache.no-flush` say, if they do.
    pub(super) direct: Option<bool>,
    pub(super) no_flush: Option<bool>,
    /// What `discard` says, if it does.
    pub(super) discard: Option<String>,
    pub(super) detect_zeroes: Option<String>,
    /// False with `locking=off`.
    pub(super) lock: bool,
    pub(super) force_share: bool,
    /// QEMU's null drivers: there is no file.
    pub(super) null: Option<Null>,
}

/// A disk with nothing behind it, as QEMU's drivers `null-co` and `null-aio` are: for measuring and for tests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Null {
    /// Bytes.
    pub(super) size: u64,
    /// What each request takes.
    pub(super) latency_ns: u64,
}

impl Default for Null {
    fn default() -> Null {
        // QEMU's default.
        Null { size: 1 << 30, latency_ns: 0 }
    }
}

/// Drivers of QEMU that need no file.
const NULL_DRIVERS: [&str; 2] = ["null-co", "null-aio"];
/// Drivers of QEMU for files of the host.
const FILE_DRIVERS: [&str; 2] = ["file", "host_device"];
/// Drivers of QEMU that a user may ask for and that are not here.
const OTHER_DRIVERS: [&str; 30] = [
    "blkdebug",
    "blklogwrites",
    "blkverify",
    "bochs",
    "cloop",
    "compress",
    "copy-on-read",
    "dmg",
    "ftp",
    "ftps",
    "gluster",
    "host_cdrom",
    "http",
    "https",
    "iscsi",
    "luks",
    "nbd",
    "nfs",
    "nvme",
    "parallels",
    "qcow",
    "qed",
    "quorum",
    "rbd",
    "ssh",
    "throttle",
    "vdi",
    "vhdx",
    "vmdk",
    "vpc",
];

/// Tells whether QEMU knows a format that is not served here; for the error.
pub(super) fn is_foreign(format: &str) -> bool {
    OTHER_DRIVERS.contains(&format)
}

/// The null disk that a file name such as `null-co://` means.
pub(super) fn null_by_name(name: &str) -> Option<Image> {
    let driver = name.strip_suffix("://")?;
    NULL_DRIVERS.contains(&driver).then(|| Image {
        format: Some("raw".to_owned()),
        null: Some(Null::default()),
        lock: true,
        ..Image::default()
    })
}

/// Reads an image's settings (`--image-opts`, `json:`).
///
/// # Errors
/// What is missing, unknown, or not offered.
pub(super) fn image(mut settings: Settings) -> Result<Image, String> {
    let driver = settings.remove("driver");
    let mut image = Image { lock: true, ..Image::default() };
    // A protocol driver at the top has no format driver above it: its bytes are the disk.
    let prefix = match driver.as_deref() {
        Some(driver) if FILE_DRIVERS.contains(&driver) || NULL_DRIVERS.contains(&driver) => {
            image.format = Some("raw".to_owned());
            ""
        }
        Some(driver) => {
            image.format = Some(driver.to_owned());
            "file."
        }
        None if settings.contains_key("filename") => {
            image.format = Some("raw".to_owned());
            ""
        }
        None => "file.",
    };
    let protocol = if prefix.is_empty() { driver.clone() } else { settings.remove("file.driver") };
    if let Some(protocol) = &protocol
        && NULL_DRIVERS.contains(&protocol.as_str())
    {
        let mut null = Null::default();
        if let Some(text) = settings.remove(&format!("{prefix}size")) {
            null.size = size("size", &text)?;
        }
        if let Some(text) = settings.remove(&format!("{prefix}latency-ns")) {
            null.latency_ns = size("latency-ns", &text)?;
        }
        // It always does.
        take_bool(&mut settings, &format!("{prefix}read-zeroes"))?;
        image.null = Some(null);
    } else if let Some(below) = &protocol
        && !FILE_DRIVERS.contains(&below.as_str())
    {
        return Err(format!(
            "the driver '{below}' is not offered: only files and block devices of this host are"
        ));
    }
    if let Some(node) = settings.remove("file") {
        return Err(format!("Cannot find device='' nor node-name='{node}'"));
    }
    let filename = settings.remove(&format!("{prefix}filename"));
    let Some(filename) = filename.or_else(|| image.null.is_some().then(String::new)) else {
        return Err(match (prefix, driver) {
            ("", _) => "The 'file' block driver requires a file name".to_owned(),
            (_, Some(driver)) if is_foreign(&driver) => format!("the driver '{driver}' is not offered"),
            _ => "A block device must be specified for \"file\"".to_owned(),
        });
    };
    image.filename = filename.strip_prefix("file:").unwrap_or(&filename).into();
    if let Some(text) = settings.remove("offset") {
        image.offset = size("offset", &text)?;
    }
    if let Some(text) = settings.remove("size") {
        image.size = Some(size("size", &text)?);
    }
    for level in ["", "file."] {
        let key = |name: &str| format!("{level}{name}");
        image.read_only |= take_bool(&mut settings, &key("read-only"))?.unwrap_or(false);
        image.force_share |= take_bool(&mut settings, &key("force-share"))?.unwrap_or(false);
        image.direct = take_bool(&mut settings, &key("cache.direct"))?.or(image.direct);
        image.no_flush = take_bool(&mut settings, &key("cache.no-flush"))?.or(image.no_flush);
        image.discard = settings.remove(&key("discard")).or(image.discard);
        image.detect_zeroes = settings.remove(&key("detect-zeroes")).or(image.detect_zeroes);
        if let Some(locking) = settings.remove(&key("locking")) {
            image.lock = locking != "off";
        }
        // Names of nodes, and ways of file I/O, make no difference to what is served.
        for harmless in ["node-name", "auto-read-only", "aio", "aio-max-batch", "x-check-cache-dropped"] {
            settings.remove(&key(harmless));
        }
    }
    match settings.keys().next() {
        None => Ok(image),
        Some(key) => Err(match &image.format {
            Some(format) => format!("Block format '{format}' does not support the option '{key}'"),
            None => format!("the option '{key}' is not known; name the driver"),
        }),
    }
}

/// What `--object` defines, as far as it is used here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Object {
    /// Credentials by certificates.
    X509 { dir: PathBuf, server: bool, verify_peer: bool },
    /// Credentials by pre-shared keys.
    Psk { dir: PathBuf, server: bool, username: Option<String> },
    /// One subject's distinguished name.
    AuthzSimple(String),
    /// Several, exact ones.
    AuthzList(Vec<String>),
    /// The same, in a file.
    AuthzListFile(PathBuf),
    /// Something that has no effect here.
    Inert,
}

/// Reads `--object TYPE,id=ID,…` or its JSON form: id and object.
///
/// # Errors
/// What is missing, unknown, or not offered.
pub(super) fn object(text: &str) -> Result<(String, Object), String> {
    let mut settings = if text.starts_with('{') { json(text)? } else { key_values(text, "qom-type")? };
    let Some(kind) = settings.remove("qom-type") else {
        return Err("Parameter 'qom-type' is missing".to_owned());
    };
    let known = [
        "secret",
        "secret_keyring",
        "tls-creds-x509",
        "tls-creds-psk",
        "tls-creds-anon",
        "authz-simple",
        "authz-list",
        "authz-list-file",
        "authz-pam",
        "iothread",
        "main-loop",
        "throttle-group",
    ];
    if !known.contains(&kind.as_str()) {
        return Err(format!("Parameter 'qom-type' does not accept value '{kind}'"));
    }
    let Some(id) = settings.remove("id") else {
        return Err("Parameter 'id' is missing".to_owned());
    };
    let mut need = |key: &str| settings.remove(key).ok_or_else(|| format!("Missing '{key}' property value"));
    let object = match kind.as_str() {
        "tls-creds-x509" | "tls-creds-psk" => {
            let dir = need("dir")?.into();
            let endpoint = settings.remove("endpoint");
            let server = match endpoint.as_deref() {
                Some("server") => true,
                None | Some("client") => false,
                Some(other) => return Err(format!("Parameter 'endpoint' does not accept value '{other}'")),
            };
            let verify_peer = take_bool(&mut settings, "verify-peer")?.unwrap_or(true);
            take_bool(&mut settings, "sanity-check")?;
            if settings.remove("passwordid").is_some() {
                return Err(
                    "encrypted keys are not supported: decrypt the key file, and protect it by its mode"
                        .to_owned(),
                );
            }
            if settings.remove("priority").is_some() {
                return Err("'priority' speaks GnuTLS's language, which is not spoken here: leave it out; TLS 1.2 and 1.3 are \
                            offered"
                    .to_owned());
            }
            match kind.as_str() {
                "tls-creds-x509" => Object::X509 { dir, server, verify_peer },
                _ => Object::Psk { dir, server, username: settings.remove("username") },
            }
        }
        "tls-creds-anon" => {
            return Err("tls-creds-anon is not offered: it protects against nobody who can alter traffic; use tls-creds-psk or \
                        tls-creds-x509"
                .to_owned());
        }
        "authz-simple" => Object::AuthzSimple(need("identity")?),
        "authz-list" => Object::AuthzList(authz_rules(&mut settings)?),
        "authz-list-file" => {
            let file = need("filename")?.into();
            take_bool(&mut settings, "refresh")?;
            Object::AuthzListFile(file)
        }
        "authz-pam" => {
            return Err(
                "authz-pam is not offered; use authz-simple, authz-list or authz-list-file".to_owned()
            );
        }
        "secret" => {
            let data = settings.remove("data");
            if data.is_none() && settings.remove("file").is_none() {
                return Err("Either 'file' or 'data' must be provided".to_owned());
            }
            settings.clear();
            Object::Inert
        }
        _ => {
            settings.clear();
            Object::Inert
        }
    };
    match settings.keys().next() {
        None => Ok((id, object)),
        Some(key) => Err(format!("Invalid parameter '{key}'")),
    }
}

/// The identities that an authz-list allows.
///
/// # Errors
/// Rules that say more than "allow exactly this".
pub(super) fn authz_rules(settings: &mut Settings) -> Result<Vec<String>, String> {
    if settings.remove("policy").is_some_and(|policy| policy != "deny") {
        return Err(
            "authz-list: only the policy 'deny' is offered: whoever no rule allows is refused".to_owned()
        );
    }
    let mut allowed = Vec::new();
    for i in 0.. {
        let mut take = |name: &str| settings.remove(&format!("rules.{i}.{name}"));
        let Some(identity) = take("match") else { break };
        if take("policy").is_some_and(|policy| policy != "allow") {
            return Err(format!("authz-list: rule {i} denies; only rules that allow are offered"));
        }
        if take("format").is_some_and(|format| format != "exact") {
            return Err(format!("authz-list: rule {i} is a pattern; only the format 'exact' is offered"));
        }
        allowed.push(identity);
    }
    Ok(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_values_are_split_as_qemu_splits_them() {
        let read = |text: &str| {
            let settings = key_values(text, "first").expect(text);
            settings.iter().map(|(k, v)| format!("{k}={v};")).collect::<String>()
        };
        assert_eq!(read("a=1,b=x,,y,c="), "a=1;b=x,y;c=;");
        assert_eq!(read("raw,ro,noshare"), "first=raw;ro=on;share=off;");
        assert_eq!(read("id=a,identity=CN=x,,O=y"), "id=a;identity=CN=x,O=y;");
        assert_eq!(read(""), "");
        assert!(key_values("=x", "first").is_err());
    }

    #[test]
    fn numbers_are_strtoulls() {
        for (text, want) in [
            ("0", Some(0)),
            ("512", Some(512)),
            ("0x200", Some(512)),
            ("01000", Some(512)),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709551616", None),
            ("08", None),
            ("1x", None),
            ("2M", None),
            ("-1", None),
            ("", None),
            ("0x", None),
        ] {
            assert_eq!(number(text), want, "{text}");
        }
    }

    #[test]
    fn image_options_and_json_say_the_same() {
        let opts = key_values(
            "driver=raw,file.driver=file,file.filename=/x,,y,offset=1M,size=0x200,file.locking=off",
            "file",
        );
        let one = image(opts.unwrap()).unwrap();
        let two = image(
            json(r#"{"driver":"raw","offset":1048576,"size":512,"file":{"driver":"file","filename":"/x,y","locking":"off"}}"#)
                .unwrap(),
        )
        .unwrap();
        assert_eq!(one, two);
        assert_eq!((one.offset, one.size, one.lock), (1 << 20, Some(512), false));
        assert_eq!(one.filename, PathBuf::from("/x,y"));
        let plain = image(key_values("driver=file,filename=a", "file").unwrap()).unwrap();
        assert_eq!(plain.format.as_deref(), Some("raw"));
        let probed = image(key_values("file.filename=a", "file").unwrap()).unwrap();
        assert_eq!(probed.format, None);
    }

    #[test]
    fn image_options_that_mean_nothing_here_are_refused() {
        let check = |text: &str, word: &str| {
            let why = image(key_values(text, "file").unwrap()).expect_err(text);
            assert!(why.contains(word), "{text}: {why}");
        };
        check("driver=raw", "A block device must be specified");
        check("driver=raw,bogus=1,file.filename=a", "does not support the option 'bogus'");
        check("driver=raw,file.driver=nbd,file.host=h", "'nbd' is not offered");
        check("driver=raw,file.filename=a,offset=x", "Parameter 'offset'");
        check("driver=raw,file.filename=a,read-only=maybe", "'on' or 'off'");
        check("node0", "node-name='node0'");
    }

    #[test]
    fn objects_are_read_or_refused_with_a_reason() {
        assert_eq!(
            object("tls-creds-x509,id=t0,dir=/tls,endpoint=server,verify-peer=off").unwrap(),
            ("t0".to_owned(), Object::X509 { dir: "/tls".into(), server: true, verify_peer: false })
        );
        assert_eq!(
            object("tls-creds-psk,id=t,dir=/p,username=eve").unwrap().1,
            Object::Psk { dir: "/p".into(), server: false, username: Some("eve".to_owned()) }
        );
        assert_eq!(
            object("authz-simple,id=a,identity=CN=laptop,,O=Example").unwrap().1,
            Object::AuthzSimple("CN=laptop,O=Example".to_owned())
        );
        let list = r#"{"qom-type":"authz-list","id":"a","policy":"deny","rules":[{"match":"CN=x","policy":"allow"}]}"#;
        assert_eq!(object(list).unwrap().1, Object::AuthzList(vec!["CN=x".to_owned()]));
        assert_eq!(object("secret,id=s,data=x").unwrap().1, Object::Inert);
        for (text, word) in [
            ("foo", "does not accept value 'foo'"),
            ("tls-creds-x509,dir=/x", "'id' is missing"),
            ("tls-creds-x509,id=x", "Missing 'dir'"),
            ("tls-creds-x509,id=x,dir=/x,endpoint=both", "'endpoint'"),
            ("tls-creds-x509,id=x,dir=/x,bogus=1", "'bogus'"),
            ("tls-creds-anon,id=x", "not offered"),
            ("secret,id=x", "Either 'file' or 'data'"),
            ("authz-list,id=a,rules.0.match=CN=*,rules.0.format=glob", "only the format 'exact'"),
        ] {
            let why = object(text).expect_err(text);
            assert!(why.contains(word), "{text}: {why}");
        }
    }
}
