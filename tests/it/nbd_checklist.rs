//! The checklist of the protocol: every rule has tests that carry its number at the end of their names. `docs/protocol.md`
//! is the table, generated from here: `make checklist`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

/// What the tests of a rule are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    /// It has tests.
    Tested,
    /// We do not advertise it; the tests are of the refusal.
    NotOffered,
}
use Status::{NotOffered, Tested};

/// The rule in our words; what we chose where there is a choice; tests that do not carry the number.
struct Rule(&'static str, &'static str, &'static [&'static str], Status);

/// Rule 1 is the first.
const RULES: [Rule; 168] = [
    Rule(
        "Strings are UTF-8 without NUL, at most 4096 bytes; we emit no longer one",
        "Exports with other strings cannot be made",
        &[],
        Tested,
    ),
    Rule("Names of up to 4096 bytes are taken, longer ones are an error", "", &[], Tested),
    Rule("TCP_NODELAY on both sides", "", &[], Tested),
    Rule("Port 10809, and no oldstyle there", "", &[], Tested),
    Rule(
        "The baseline: NOTLS, fixed newstyle, INFO/GO, ABORT, LIST, simple replies, READ, WRITE, DISC, UNSUP",
        "",
        &[],
        Tested,
    ),
    Rule(
        "For interoperability: TLS, EXPORT_NAME, FLUSH, FUA, block sizes offered and not required",
        "",
        &[],
        Tested,
    ),
    Rule("A hard disconnect only after a violated MUST, or where no error can be told", "", &[], Tested),
    Rule("Greeting: both magics, FIXED_NEWSTYLE and NO_ZEROES, no other bit", "", &[], Tested),
    Rule("Client flags not offered end the connection", "", &[], Tested),
    Rule("Without C_FIXED_NEWSTYLE only EXPORT_NAME, with its padding", "", &[], Tested),
    Rule("C_NO_ZEROES leaves the 124 zero bytes out", "", &[], Tested),
    Rule("GO has no padding", "", &[], Tested),
    Rule("Garbage instead of client flags: closed without an answer", "", &[], Tested),
    Rule("A client that vanishes at any stage leaves nothing behind", "", &[], Tested),
    Rule("Handshake deadline, and a cap on half-open connections", "", &[], Tested),
    Rule("A handshake may arrive byte by byte", "", &[], Tested),
    Rule("Option replies are framed exactly: magic, option, type, length", "", &[], Tested),
    Rule("Unknown options: UNSUP, their data skipped", "", &[], Tested),
    Rule("EXPORT_NAME never has a generic reply", "", &[], Tested),
    Rule("Data where none belongs: INVALID", "", &[], Tested),
    Rule("A bad option magic closes at once", "", &[], Tested),
    Rule(
        "Huge option lengths allocate nothing",
        "Up to 16 MiB are skipped and answered TOO_BIG, beyond that the session ends",
        &[],
        Tested,
    ),
    Rule("Options per session are bounded", "4096", &[], Tested),
    Rule("Pipelined options are answered in order", "", &[], Tested),
    Rule(
        "MAY: a repeated state-changing option",
        "STRUCTURED_REPLY again: ACK. EXTENDED_HEADERS again: INVALID, as QEMU. The state stays",
        &[],
        Tested,
    ),
    Rule("During shutdown options are answered SHUTDOWN, ABORT is acknowledged", "", &[], Tested),
    Rule("Error replies carry a text of at most 4096 bytes", "", &[], Tested),
    Rule("ACK carries no data", "", &[], Tested),
    Rule("EXPORT_NAME of a known export: size, flags, padding; transmission begins", "", &[], Tested),
    Rule("EXPORT_NAME that cannot be granted ends the session without a word", "", &[], Tested),
    Rule(
        "The empty name is the default export, if there is one",
        "The export named so, else the only one, else the configured one",
        &[],
        Tested,
    ),
    Rule("EXPORT_NAME after EXTENDED_HEADERS ends the session", "", &[], Tested),
    Rule("ABORT is acknowledged, then the connection closes", "", &[], Tested),
    Rule("ABORT with data: data ignored", "", &[], Tested),
    Rule("ABORT and gone at once is no error", "", &[], Tested),
    Rule("LIST: a SERVER reply per export, then ACK", "", &[], Tested),
    Rule("Listed names are as GO takes them", "", &[], Tested),
    Rule(
        "MAY: hide TLS-only exports, or all",
        "TLS-only exports are hidden in clear",
        &["an_export_for_tls_only_is_refused_in_the_clear_50"],
        Tested,
    ),
    Rule("A list of thousands arrives completely, in bounded memory", "", &[], Tested),
    Rule("NOTLS: STARTTLS is refused, TLS_REQD never said", "", &[], Tested),
    Rule("STARTTLS with data: INVALID", "", &[], Tested),
    Rule("FORCEDTLS: STARTTLS is granted, all later bytes are encrypted", "", &[], Tested),
    Rule("FORCEDTLS: all options but ABORT are answered TLS_REQD", "", &[], Tested),
    Rule("FORCEDTLS: ABORT is acknowledged in clear", "", &[], Tested),
    Rule("FORCEDTLS: EXPORT_NAME in clear ends the session", "", &[], Tested),
    Rule("STARTTLS inside of TLS: INVALID", "", &[], Tested),
    Rule("Inside of TLS, TLS_REQD is never said", "", &[], Tested),
    Rule("A failed TLS handshake ends the connection", "", &[], Tested),
    Rule("SELECTIVETLS: only what names a TLS-only export is refused in clear", "", &[], Tested),
    Rule("SELECTIVETLS: INFO/GO of a TLS-only export: TLS_REQD", "", &[], Tested),
    Rule("The mode does not change during a connection", "", &[], Tested),
    Rule("STARTTLS forgets all that was negotiated", "", &[], Tested),
    Rule("Bytes in clear behind STARTTLS are never honoured", "", &[], Tested),
    Rule("TLS 1.2 and 1.3, nothing older", "", &[], Tested),
    Rule("close_notify before the socket closes", "", &[], Tested),
    Rule("Client certificates and PSKs are checked, per export if wanted", "", &[], Tested),
    Rule("ECDSA and Ed25519 certificates", "", &[], Tested),
    Rule("INFO/GO lengths must add up: INVALID", "", &[], Tested),
    Rule("Unknown information requests are ignored", "", &[], Tested),
    Rule("Success has INFO_EXPORT of 12 bytes, then ACK", "", &[], Tested),
    Rule("Unknown export: UNKNOWN, no INFO, the session goes on", "", &[], Tested),
    Rule("INFO and GO tell the same", "", &[], Tested),
    Rule("Each information at most once; NAME is canonical", "", &[], Tested),
    Rule("Block sizes obey their rules", "", &[], Tested),
    Rule("Block sizes are told when asked for", "", &[], Tested),
    Rule(
        "MAY: BLOCK_SIZE_REQD",
        "Never of who enters: unaligned requests are served. The qemu-nbd personality sends it for INFO, as QEMU does",
        &[],
        Tested,
    ),
    Rule("Clients that did not negotiate block sizes are served or refused cleanly", "Served", &[], Tested),
    Rule("Strange names name nothing and touch no file", "", &[], Tested),
    Rule("Empty name: default export or UNKNOWN", "", &[], Tested),
    Rule("A refused GO leaves the session in haggling", "", &[], Tested),
    Rule("STRUCTURED_REPLY: ACK; reads are then structured", "", &[], Tested),
    Rule("SEND_DF only with structured replies or extended headers", "", &[], Tested),
    Rule("EXTENDED_HEADERS: ACK, implies structured; with data INVALID", "", &[], Tested),
    Rule("STRUCTURED_REPLY after EXTENDED_HEADERS: EXT_HEADER_REQD; the upgrade works", "", &[], Tested),
    Rule("What is not offered: UNSUP", "", &[], Tested),
    Rule("Extended headers are not required of clients", "", &[], Tested),
    Rule("Contexts before structured replies: INVALID", "", &[], Tested),
    Rule("Malformed context options: INVALID", "", &[], Tested),
    Rule("Unknown namespaces and leaves are ignored", "", &[], Tested),
    Rule("MAY: a query without colon is INVALID", "Ignored; the empty query lists everything", &[], Tested),
    Rule("LIST without a query: all contexts", "", &[], Tested),
    Rule("LIST knows wildcards; ids are 0", "", &[], Tested),
    Rule("SET with an empty leaf selects nothing", "", &[], Tested),
    Rule("SET without a query deselects", "", &[], Tested),
    Rule("SET replaces the selection, also when it fails", "", &[], Tested),
    Rule("SET: one reply per context, ids unique, then ACK", "", &[], Tested),
    Rule("A selection holds for its export only", "", &[], Tested),
    Rule(
        "MAY: TOO_BIG for too many queries; nothing is allocated by their number",
        "More than 4096: TOO_BIG",
        &[],
        Tested,
    ),
    Rule("Contexts of an unknown export: UNKNOWN", "", &[], Tested),
    Rule(
        "qemu:allocation-depth and qemu:dirty-bitmap:NAME",
        "",
        &["persistent_bitmaps_are_kept_shown_and_stored", "qcow2_images_are_served_with_what_they_hold"],
        Tested,
    ),
    Rule(
        "Contexts with 64-bit values only with extended headers",
        "We have none: all values fit 32 bits",
        &["sixty_four_bit_lengths_on_a_file_142_153_155_158"],
        Tested,
    ),
    Rule("HAS_FLAGS is always set", "", &[], Tested),
    Rule("READ_ONLY: every write-type command is EPERM", "", &[], Tested),
    Rule("Nothing is advertised that is not done", "", &[], Tested),
    Rule(
        "CAN_MULTI_CONN only with one shared state per image",
        "Set, also for writers: there is one node per image",
        &["a_flush_covers_the_writes_of_all_connections_111"],
        Tested,
    ),
    Rule(
        "Two writers never corrupt qcow2 metadata",
        "",
        &[
            "random_requests_of_four_threads_in_the_same_clusters_match_the_model",
            "two_writes_into_one_new_cluster_are_one_allocation",
        ],
        Tested,
    ),
    Rule(
        "MAY: ROTATIONAL, SEND_CACHE, SEND_RESIZE, BLOCK_STATUS_PAYLOAD",
        "ROTATIONAL as the device says, CACHE always, the filter with extended headers, in INFO always, in GO with a selected context; RESIZE never",
        &[],
        Tested,
    ),
    Rule("A wrong request magic is a hard disconnect", "", &[], Tested),
    Rule("Cookies are echoed, also equal ones", "", &[], Tested),
    Rule("Replies may come out of order", "", &[], Tested),
    Rule("Without structured replies only simple ones; a failed read has no payload", "", &[], Tested),
    Rule("With structured replies a read never has a simple reply", "", &[], Tested),
    Rule(
        "Replies with a payload are chunks; errors are chunks with a text",
        "Requests without content have simple replies, unless headers are extended",
        &[],
        Tested,
    ),
    Rule("Extended: no simple reply, the offset echoed in every chunk", "", &[], Tested),
    Rule("DONE on the last chunk only; NONE is empty and last; no other flag", "", &[], Tested),
    Rule("Error chunks are well-formed, at most one", "", &[], Tested),
    Rule(
        "A read that fails after its reply has begun ends the connection",
        "We begin no reply before the data is there",
        &[],
        Tested,
    ),
    Rule(
        "A structured read that fails midway ends in an error chunk",
        "The error chunk is all of it",
        &[],
        Tested,
    ),
    Rule(
        "What was answered before a FLUSH is stable before its reply",
        "",
        &["a_flush_on_one_connection_covers_the_writes_of_another"],
        Tested,
    ),
    Rule(
        "FUA: stable before the reply; taken with every command",
        "",
        &["fua_is_durable_before_the_reply"],
        Tested,
    ),
    Rule("FLUSH covers all connections", "", &[], Tested),
    Rule(
        "Failed flushes are told and not forgotten",
        "",
        &["a_failed_sync_is_reported_and_not_forgotten"],
        Tested,
    ),
    Rule(
        "After a power cut all flushed data is there",
        "",
        &[
            "no_power_failure_corrupts_or_loses_what_was_flushed_1",
            "no_power_failure_corrupts_or_loses_what_was_flushed_2",
        ],
        Tested,
    ),
    Rule("READ in bounds is exact; out of bounds EINVAL, no overflow", "", &[], Tested),
    Rule("Chunks cover a read exactly", "", &[], Tested),
    Rule("DF: one chunk", "At any length up to 64 MiB", &[], Tested),
    Rule("Flags that do not belong: EINVAL", "", &[], Tested),
    Rule("Length 0 is served", "", &[], Tested),
    Rule("Holes are sent as holes, at multiples of 4096", "", &[], Tested),
    Rule("Reads over the maximum: EINVAL", "64 MiB", &[], Tested),
    Rule("A write's payload is always consumed", "", &[], Tested),
    Rule("Writes out of bounds: ENOSPC, nothing written", "", &[], Tested),
    Rule("EPERM, ENOSPC, EIO; only the eight values", "", &[], Tested),
    Rule("Payloads up to 32 MiB are taken whatever is advertised", "", &[], Tested),
    Rule("A payload of 4 GiB: disconnect, bounded memory", "", &[], Tested),
    Rule("A client gone in mid-payload has written nothing", "", &[], Tested),
    Rule("A write of nothing is served", "", &[], Tested),
    Rule(
        "Extended: WRITE needs PAYLOAD_LEN",
        "Taken without it too, as QEMU does: QEMU's own client never sets it",
        &[],
        Tested,
    ),
    Rule("Requests of 50,000,000 bytes are served", "", &[], Tested),
    Rule("DISC: outstanding requests are completed, then it closes", "", &[], Tested),
    Rule("DISC with odd fields is a DISC", "", &[], Tested),
    Rule("At shutdown requests are finished or ESHUTDOWN", "", &[], Tested),
    Rule("FLUSH with offset and length is served", "", &[], Tested),
    Rule("TRIM: EINVAL out of bounds, EPERM read-only, FUA honoured", "", &[], Tested),
    Rule("TRIM touches nothing outside of its range", "", &[], Tested),
    Rule("CACHE changes nothing; unknown flags: EINVAL", "", &[], Tested),
    Rule("RESIZE is not advertised: EINVAL", "", &[], NotOffered),
    Rule("WRITE_ZEROES zeroes its range and nothing else, at any alignment", "", &[], Tested),
    Rule("NO_HOLE allocates", "", &["discard_gives_space_back_and_zeroes_keep_it_unless_told"], Tested),
    Rule("ENOTSUP for FAST_ZERO alone", "", &[], Tested),
    Rule("FAST_ZERO where not advertised: EINVAL", "", &[], Tested),
    Rule("Effect lengths over the maximum payload work", "", &[], Tested),
    Rule("WRITE_ZEROES: ENOSPC out of bounds, EPERM read-only, EINVAL if not advertised", "", &[], Tested),
    Rule("FUA and zeroes", "", &["fua_is_durable_before_the_reply"], Tested),
    Rule("BLOCK_STATUS without a context: EINVAL", "", &[], Tested),
    Rule("One chunk per context, with at least one extent", "", &[], Tested),
    Rule("Extents sum to at most the request", "MAY be longer; ours never are", &[], Tested),
    Rule("REQ_ONE: one extent, not longer than the request", "", &[], Tested),
    Rule("Neighbours differ, boundaries are blocks, chunks are bounded", "8192 extents", &[], Tested),
    Rule("BLOCK_STATUS out of bounds, of nothing, with foreign flags: EINVAL", "", &[], Tested),
    Rule("ZERO only where it reads as zero", "", &[], Tested),
    Rule("What is no hole can be written without ENOSPC", "", &[], Tested),
    Rule("Extended: BLOCK_STATUS_EXT only, counts fit", "", &[], Tested),
    Rule("The payload filter; malformed: consumed, EINVAL", "", &[], Tested),
    Rule("Maps of large and fragmented images are bounded", "", &[], Tested),
    Rule("PAYLOAD_LEN where none belongs: consumed, EINVAL", "", &[], Tested),
    Rule("PAYLOAD_LEN over the maximum: disconnect", "", &[], Tested),
    Rule("64-bit effect lengths; beyond the export: error", "", &[], Tested),
    Rule("PAYLOAD_LEN in compact requests: EINVAL", "", &[], Tested),
    Rule("Only the eight error values", "", &[], Tested),
    Rule("Unknown commands: EINVAL, the connection stays", "", &[], Tested),
    Rule("EOVERFLOW and ENOTSUP only where documented", "EOVERFLOW never", &[], Tested),
    Rule("Replies that nobody reads hold up that client alone", "", &[], Tested),
    Rule("Connections are bounded; refusal is clean", "", &[], Tested),
    Rule("A half-closed client gets its replies", "", &[], Tested),
    Rule("Random headers: answered or closed", "", &[], Tested),
    Rule("Requests and bytes in flight are bounded", "", &[], Tested),
    Rule(
        "An image that another process has locked: a clear error",
        "",
        &["we_refuse_an_image_that_qemu_has_open"],
        Tested,
    ),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Names of all test functions, and those whose names end in rule numbers, by number.
fn tests() -> (BTreeSet<String>, BTreeMap<usize, BTreeSet<String>>) {
    let mut files: Vec<PathBuf> = Vec::new();
    for dir in ["tests/it", "tests/interop", "tests/qcow2", "src/nbd"] {
        files.extend(fs::read_dir(root().join(dir)).unwrap().map(|e| e.unwrap().path()));
    }
    let (mut names, mut by_number) = (BTreeSet::new(), BTreeMap::<usize, BTreeSet<String>>::new());
    for file in files.iter().filter(|f| f.extension().is_some_and(|e| e == "rs")) {
        let text = fs::read_to_string(file).unwrap();
        let numbered = !["tests/it", "tests/qcow2"].iter().any(|dir| file.starts_with(root().join(dir)))
            || file.file_name().is_some_and(|n| n.to_string_lossy().starts_with("nbd_"));
        // A test is a function behind `#[test]`, or one that a macro of the interop tests calls by its name.
        for (i, _) in text.match_indices("fn ") {
            let name: String =
                text[i + 3..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let before = text[..i].trim_end();
            let before = before.strip_suffix("pub(crate)").unwrap_or(before).trim_end();
            if !before.ends_with("#[test]") {
                continue;
            }
            names.insert(name.clone());
            let digits = |part: &&str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
            for part in name.rsplit('_').take_while(digits) {
                let number: usize = part.parse().unwrap();
                if numbered && (1..=RULES.len()).contains(&number) {
                    by_number.entry(number).or_default().insert(name.clone());
                }
            }
        }
    }
    (names, by_number)
}

fn table(by_number: &BTreeMap<usize, BTreeSet<String>>) -> String {
    let mut out = String::from(
        "# The protocol, rule by rule\n\nGenerated by `make checklist` from `tests/it/nbd_checklist.rs`; a test checks that it is current, that \
         every rule is here, and that every test named here exists.\nThe rules are in our words; the document is proto.md of \
         NetworkBlockDevice/nbd and its branch extension-ext-header.\n\n| # | Rule | Our choice | Tests |\n|---|---|---|---|\n",
    );
    for (i, Rule(rule, choice, extra, status)) in RULES.iter().enumerate() {
        let mut tests: BTreeSet<&str> = extra.iter().copied().collect();
        tests.extend(by_number.get(&(i + 1)).into_iter().flatten().map(String::as_str));
        let mut cell: Vec<String> = tests.iter().map(|t| format!("`{t}`")).collect();
        match status {
            Tested => {}
            NotOffered => cell.insert(0, String::from("(not offered)")),
        }
        let _ = writeln!(out, "| {} | {rule} | {choice} | {} |", i + 1, cell.join(", ")); // a String takes it all
    }
    out
}

#[test]
fn every_rule_of_the_protocol_has_a_test_and_the_table_says_so() {
    let (names, by_number) = tests();
    for (i, Rule(rule, _, extra, _)) in RULES.iter().enumerate() {
        let number = i + 1;
        for test in *extra {
            assert!(names.contains(*test), "{number} ({rule}) names the test {test}, which does not exist");
        }
        let tested = !extra.is_empty() || by_number.contains_key(&number);
        assert!(tested, "{number} ({rule}) has no test");
    }
    let path = root().join("docs/protocol.md");
    let new = table(&by_number);
    if std::env::var_os("CONBD_WRITE_CHECKLIST").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, &new).unwrap();
        return;
    }
    let old = fs::read_to_string(&path).unwrap_or_default();
    let (old, new): (Vec<&str>, Vec<&str>) = (old.lines().collect(), new.lines().collect());
    assert_eq!(old.len(), new.len(), "docs/protocol.md is not current: run `make checklist`");
    for (old, new) in old.iter().zip(&new) {
        assert_eq!(old, new, "docs/protocol.md is not current: run `make checklist`");
    }
}
