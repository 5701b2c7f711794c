//! `conbd inspect URI`: what a server offers, as text or JSON; the exit code makes it a health check.
//!
//! Runs one negotiation in a coroutine on the main thread's AioContext.

use super::{EXIT_OK, Failure, client_failure, run_coroutine, with_sources, write_out};
use crate::nbd::access::TlsPeer;
use crate::nbd::client::{Client, ClientError, ExportInfo, ListEntry, Negotiation, Uri};
use crate::nbd::proto::{NBD_OPT_INFO, NBD_REP_ERR_UNSUP, TransmissionFlags};
use clap::Args;
use serde_json::{Value, json};
use std::fmt::Write as _;

/// Most exports that are asked about one by one (ours: two options each, and servers bound their number).
const DETAILS_MAX: usize = 1000;

/// Show what an NBD server offers, or what an image is: sizes, flags, block sizes; format, features, snapshots, chain
///
/// With an export name in the URI, tells about that export. Without one, about every export that the server
/// lists (or about the default export, if it does not list them).
///
/// With the path of an image, tells its format, sizes, features, snapshots, bitmaps and backing chain. No lock is taken.
///
/// Exits with 0 when the server answered and the export is there (of several, when it tells about one), with 1 when not: fit
/// for a health check.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  conbd inspect nbd://localhost/\n  conbd inspect 'nbd+unix:///disk?socket=/run/disk.sock' --json\n  conbd inspect disk.qcow2"
)]
pub(crate) struct InspectArgs {
    /// The server: `nbd://HOST[:PORT]/EXPORT` or `nbd+unix:///EXPORT?socket=PATH`; with TLS `nbds:` and
    /// `nbds+unix:`, and the parameters tls-certificates=DIR, tls-psk-file=FILE, tls-hostname=NAME; or an image file
    uri: String,

    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

/// One export as far as the server tells.
struct Details {
    info: ExportInfo,
    contexts: Vec<String>,
}

/// An export of the server's list that it refuses to tell this client about.
struct Withheld {
    name: String,
    why: String,
}

struct Report {
    fixed: bool,
    tls: Option<TlsPeer>,
    structured: bool,
    extended: bool,
    /// None when the server does not list exports.
    list: Option<Vec<ListEntry>>,
    exports: Vec<Details>,
    withheld: Vec<Withheld>,
}

pub(crate) fn run(args: &InspectArgs) -> Result<u8, Failure> {
    if !args.uri.contains("://") {
        return super::image::run(std::path::Path::new(&args.uri), args.json);
    }
    let uri: Uri = args.uri.parse().map_err(Failure::usage)?;
    let asked = uri.clone();
    let report = run_coroutine(move || co_inspect(&asked))
        .map_err(|e| Failure::failed(format!("cannot start an event loop: {e}")))?
        .map_err(|e| client_failure(&uri, &e))?;
    let text = if args.json { format!("{:#}\n", as_json(&uri, &report)) } else { as_text(&uri, &report) };
    write_out(&text)?;
    Ok(EXIT_OK)
}

fn co_inspect(uri: &Uri) -> Result<Report, ClientError> {
    let mut negotiation = Negotiation::co_open_uri(uri)?;
    let mut report = Report {
        fixed: negotiation.is_fixed(),
        tls: negotiation.tls().cloned(),
        structured: false,
        extended: false,
        list: None,
        exports: Vec::new(),
        withheld: Vec::new(),
    };
    if !report.fixed {
        report.exports.push(co_by_connecting(negotiation, &uri.export)?);
        return Ok(report);
    }
    let outcome = co_ask(&mut negotiation, uri, &mut report);
    if matches!(outcome, Ok(()) | Err(ClientError::Refused { .. })) {
        // The session is in order, also after a refusal: say goodbye, so that the server need not wonder.
        negotiation.co_abort();
    }
    outcome.map(|()| report)
}

/// Asks for everything that there is to know in a negotiation.
fn co_ask(negotiation: &mut Negotiation, uri: &Uri, report: &mut Report) -> Result<(), ClientError> {
    report.structured = negotiation.co_structured_reply()?;
    let mut names = vec![uri.export.clone()];
    if uri.export.is_empty() {
        match negotiation.co_list() {
            Ok(list) => {
                // A server may list its default export under its real name only, or list nothing.
                if !list.is_empty() {
                    names = list.iter().map(|entry| entry.name.clone()).collect();
                }
                report.list = Some(list);
            }
            Err(ClientError::Refused { .. }) => {}
            Err(e) => return Err(e),
        }
    }
    names.truncate(DETAILS_MAX);
    let mut refused = None;
    for name in &names {
        let info = match negotiation.co_info(name) {
            Ok(info) => info,
            Err(ClientError::Refused { option: NBD_OPT_INFO, reply: NBD_REP_ERR_UNSUP, .. }) => {
                // An old server: the only way to learn more is to choose the export, on a connection of its own.
                let details = co_by_connecting(Negotiation::co_open_uri(uri)?, name)?;
                report.exports.push(details);
                continue;
            }
            // What others may have (other TLS, other clients, a full house) does not hide the rest.
            Err(e @ ClientError::Refused { .. }) => {
                report.withheld.push(Withheld { name: name.clone(), why: with_sources(&e) });
                refused.get_or_insert(e);
                continue;
            }
            Err(e) => return Err(e),
        };
        let contexts = match report.structured.then(|| negotiation.co_list_meta_context(name, &[])) {
            Some(Ok(contexts)) => contexts,
            None | Some(Err(ClientError::Refused { .. })) => Vec::new(),
            Some(Err(e)) => return Err(e),
        };
        report.exports.push(Details { info, contexts });
    }
    if let Some(e) = refused.filter(|_| report.exports.is_empty()) {
        return Err(e);
    }
    // Last: they cannot be switched off again. A server that does not know them has told everything else already.
    report.extended = negotiation.co_extended_headers().unwrap_or(false);
    Ok(())
}

fn co_by_connecting(negotiation: Negotiation, name: &str) -> Result<Details, ClientError> {
    let client: Client = negotiation.co_go(name)?;
    let info = client.info().clone();
    client.co_close();
    Ok(Details { info, contexts: Vec::new() })
}

/// The flags' names in lower case without their prefix, in the order of their bits; unknown ones as numbers.
fn flag_names(flags: TransmissionFlags) -> Vec<String> {
    let mut names: Vec<String> = flags
        .iter_names()
        .map(|(name, _)| name.trim_start_matches("NBD_FLAG_").to_ascii_lowercase())
        .collect();
    let unknown = flags.bits() & !TransmissionFlags::all().bits();
    if unknown != 0 {
        names.push(format!("{unknown:#06x}"));
    }
    names
}

fn as_json(uri: &Uri, report: &Report) -> Value {
    let exports: Vec<Value> = report
        .exports
        .iter()
        .map(|Details { info, contexts }| {
            json!({
                "name": info.name,
                "canonical_name": info.canonical_name,
                "description": info.description,
                "size": info.size,
                "read_only": info.flags.contains(TransmissionFlags::NBD_FLAG_READ_ONLY),
                "flags": flag_names(info.flags),
                "block_size": info.block_sizes.map(|b| json!({
                    "minimum": b.min, "preferred": b.preferred, "maximum": b.max,
                })),
                "contexts": contexts,
            })
        })
        .chain(report.withheld.iter().map(|w| json!({ "name": w.name, "error": w.why })))
        .collect();
    json!({
        "uri": uri.to_string(),
        "protocol": if report.fixed { "newstyle-fixed" } else { "newstyle" },
        "structured_replies": report.structured,
        "extended_headers": report.extended,
        "tls": report.tls.is_some(),
        "tls_version": report.tls.as_ref().map(|tls| &tls.version),
        "tls_cipher": report.tls.as_ref().map(|tls| &tls.cipher),
        "tls_server": report.tls.as_ref().and_then(|tls| tls.certificate.as_ref()).map(|c| c.dn.to_string()),
        "listed": report.list.as_ref().map(Vec::len),
        "exports": exports,
    })
}

/// A server's text for a terminal: quoted, without control characters.
fn shown(text: &str) -> String {
    let text: String = text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    format!("\"{text}\"")
}

fn as_text(uri: &Uri, report: &Report) -> String {
    let mut out = String::new();
    let style = if report.fixed { "fixed newstyle" } else { "newstyle" };
    let replies = match (report.structured, report.extended) {
        (_, true) => "structured replies, extended headers",
        (true, false) => "structured replies",
        (false, false) => "simple replies",
    };
    // Writing to a String cannot fail.
    let tls = match &report.tls {
        Some(tls) => format!("{} ({})", tls.version, tls.cipher),
        None => "no TLS".to_owned(),
    };
    let _ = writeln!(out, "{uri}\nprotocol: {style}, {replies}, {tls}");
    if let Some(certificate) = report.tls.as_ref().and_then(|tls| tls.certificate.as_ref()) {
        let _ = writeln!(out, "server certificate: {}", certificate.dn);
    }
    if let Some(list) = &report.list {
        let _ = writeln!(out, "exports listed: {}", list.len());
        let shown = report.exports.len() + report.withheld.len();
        if list.len() > shown {
            let _ = writeln!(out, "only the first {shown} are shown");
        }
    }
    for Details { info, contexts } in &report.exports {
        let _ = writeln!(out, "export {}:", shown(&info.name));
        if let Some(name) = info.canonical_name.as_ref().filter(|name| **name != info.name) {
            let _ = writeln!(out, "  canonical name: {}", shown(name));
        }
        if let Some(text) = info.description.as_ref().filter(|text| !text.is_empty()) {
            let _ = writeln!(out, "  description: {}", shown(text));
        }
        let _ = writeln!(out, "  size: {} bytes ({})", info.size, crate::config::Size(info.size));
        let read_only = info.flags.contains(TransmissionFlags::NBD_FLAG_READ_ONLY);
        let _ = writeln!(out, "  access: {}", if read_only { "read-only" } else { "read and write" });
        let _ = match info.block_sizes {
            Some(b) => writeln!(
                out,
                "  block sizes: minimum {}, preferred {}, maximum {}",
                b.min, b.preferred, b.max
            ),
            None => writeln!(out, "  block sizes: not told"),
        };
        let _ = writeln!(out, "  flags: {}", flag_names(info.flags).join(" "));
        if !contexts.is_empty() {
            let contexts: Vec<_> = contexts.iter().map(|c| c.replace(char::is_control, "\u{fffd}")).collect();
            let _ = writeln!(out, "  contexts: {}", contexts.join(" "));
        }
    }
    for Withheld { name, why } in &report.withheld {
        let _ = writeln!(out, "export {}: {}", shown(name), why.replace(char::is_control, "\u{fffd}"));
    }
    out
}
