//! `qemu-nbd --list`: asks a server what it has, and prints it as qemu-nbd does, byte for byte.
//!
//! Runs one negotiation in a coroutine on the main thread's AioContext.

use super::{run_coroutine, with_sources};
use crate::nbd::client::{ClientError, ExportInfo, Negotiation, Uri};
use crate::nbd::proto::{
    NBD_OPT_STARTTLS, NBD_REP_ERR_POLICY, NBD_REP_ERR_SHUTDOWN, NBD_REP_ERR_TLS_REQD, NBD_REP_ERR_UNSUP,
    TransmissionFlags, opt_name,
};
use std::fmt::Write as _;

/// QEMU's words for the transmission flags, by bit.
const FLAG_WORDS: [&str; 13] = [
    "",
    "readonly",
    "flush",
    "fua",
    "rotational",
    "trim",
    "zeroes",
    "df",
    "multi",
    "resize",
    "cache",
    "fast-zero",
    "block-status-payload",
];

/// One export of the list.
struct Entry {
    name: String,
    description: String,
    /// None when the server cannot be asked about one export.
    info: Option<ExportInfo>,
    contexts: Vec<String>,
}

/// What `--list` prints.
///
/// # Errors
/// The text for stderr.
pub(super) fn list(server: Uri) -> Result<String, String> {
    let shown = server.address.to_string();
    let listed =
        run_coroutine(move || co_list(&server)).map_err(|e| format!("cannot start an event loop: {e}"))?;
    match listed {
        Ok((extended, entries)) => Ok(text(extended, &entries)),
        Err(ClientError::Connect { source, .. }) => {
            Err(format!("Failed to connect to '{shown}': {}", super::qemu_nbd::system_text(&source)))
        }
        Err(ClientError::Refused { option, reply, message }) => {
            let mut text = refusal(option, reply).unwrap_or_else(|| {
                with_sources(&ClientError::Refused { option, reply, message: String::new() })
            });
            if !message.is_empty() && reply != NBD_REP_ERR_UNSUP {
                // Writing to a String cannot fail.
                let _ = write!(text, "\nserver reported: {message}");
            }
            Err(text)
        }
        Err(e) => Err(with_sources(&e)),
    }
}

/// QEMU's words for what a server refuses.
fn refusal(option: u32, reply: u32) -> Option<String> {
    let name = opt_name(option).to_lowercase().replace('_', " ");
    let named = format!("option {option} ({name})");
    match reply {
        NBD_REP_ERR_TLS_REQD => {
            Some(format!("TLS negotiation required before {named}\nDid you forget a valid tls-creds?"))
        }
        NBD_REP_ERR_POLICY => Some(format!("Denied by server for {named}")),
        NBD_REP_ERR_SHUTDOWN => Some(format!("Server shutting down before {named}")),
        NBD_REP_ERR_UNSUP if option == NBD_OPT_STARTTLS => {
            Some("Server don't support STARTTLS option".to_owned())
        }
        _ => None,
    }
}

fn co_list(server: &Uri) -> Result<(bool, Vec<Entry>), ClientError> {
    let mut negotiation = Negotiation::co_open_uri(server)?;
    if !negotiation.is_fixed() {
        return Err(ClientError::Unsupported("Server does not support export lists"));
    }
    let extended = negotiation.co_extended_headers()?;
    let structured = extended || negotiation.co_structured_reply()?;
    let mut entries = Vec::new();
    for listed in negotiation.co_list()? {
        entries.push(Entry {
            name: listed.name,
            description: listed.description,
            info: None,
            contexts: Vec::new(),
        });
    }
    for entry in &mut entries {
        entry.info = match negotiation.co_info(&entry.name) {
            Ok(info) => Some(info),
            Err(ClientError::Refused { reply, .. }) if reply == crate::nbd::proto::NBD_REP_ERR_UNSUP => None,
            Err(e) => return Err(e),
        };
        if structured {
            entry.contexts = co_contexts(&negotiation, &entry.name)?;
        }
    }
    negotiation.co_abort();
    Ok((extended, entries))
}

/// All contexts. Servers of QEMU 3.0 name theirs only to those who ask for them.
fn co_contexts(negotiation: &Negotiation, name: &str) -> Result<Vec<String>, ClientError> {
    let ask = |queries: &[&str]| match negotiation.co_list_meta_context(name, queries) {
        Err(ClientError::Refused { .. }) => Ok(Vec::new()),
        other => other,
    };
    let mut contexts = ask(&[])?;
    if !contexts.is_empty() && !contexts.iter().any(|context| context.starts_with("qemu:")) {
        contexts.extend(ask(&["qemu:"])?);
    }
    Ok(contexts)
}

fn text(extended: bool, entries: &[Entry]) -> String {
    let mut out = format!("exports available: {}\n", entries.len());
    // Writing to a String cannot fail.
    for entry in entries {
        let _ = writeln!(out, " export: '{}'", entry.name);
        if !entry.description.is_empty() {
            let _ = writeln!(out, "  description: {}", entry.description);
        }
        if let Some(info) = &entry.info {
            if info.flags.contains(TransmissionFlags::NBD_FLAG_HAS_FLAGS) {
                let bits = info.flags.bits();
                let words: String = FLAG_WORDS
                    .iter()
                    .enumerate()
                    .filter(|(bit, word)| !word.is_empty() && bits & (1 << bit) != 0)
                    .map(|(_, word)| format!(" {word}"))
                    .collect();
                let _ = writeln!(out, "  size:  {}", info.size);
                let _ = writeln!(out, "  flags: {bits:#x} ({words} )");
            }
            if let Some(sizes) = info.block_sizes {
                let _ = writeln!(out, "  min block: {}", sizes.min);
                let _ = writeln!(out, "  opt block: {}", sizes.preferred);
                let _ = writeln!(out, "  max block: {}", sizes.max);
            }
        }
        let _ = writeln!(out, "  transaction size: {}", if extended { "64-bit" } else { "32-bit" });
        if !entry.contexts.is_empty() {
            let _ = writeln!(out, "  available meta contexts: {}", entry.contexts.len());
            for context in &entry.contexts {
                let _ = writeln!(out, "   {context}");
            }
        }
    }
    out
}
