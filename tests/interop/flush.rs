//! What a flush promises, seen from below by strace: system calls of the daemon, and errors put into them.

use crate::harness::{Builder, Setup, TCP_1_THREADS, UNIX_3_THREADS};
use crate::tools::python;
use std::path::Path;

/// A client that writes on one connection and flushes on another. argv: URI, "flush" or "fua"
const TWO_CONNECTIONS: &str = "
import nbd, sys
a, b = nbd.NBD(), nbd.NBD()
a.connect_uri(sys.argv[1])
b.connect_uri(sys.argv[1])
for round in range(8):
    a.pwrite(bytes([65 + round]) * 65536, round * 65536, nbd.CMD_FLAG_FUA if sys.argv[2] == 'fua' else 0)
    if sys.argv[2] == 'flush':
        b.flush()
a.shutdown()
b.shutdown()
print('ok')
";

/// System calls that wrote or synced the image, in order of their completion: 'w' or 's'.
///
/// Synchronous writes (`RWF_DSYNC`) are 'd'.
fn calls_on_image(trace: &Path) -> String {
    let text = std::fs::read_to_string(trace).unwrap();
    let mut begun = std::collections::HashMap::new();
    let mut calls = String::new();
    for line in text.lines() {
        // "PID call(FD</path>, …) = result", or split into "call(… <unfinished ...>" and "<... call resumed>… = result".
        let (pid, rest) = line.split_once(' ').unwrap();
        let rest = rest.trim_start();
        let whole = if rest.starts_with("<... ") {
            let Some(begin) = begun.remove(pid) else { continue };
            format!("{begin} {rest}")
        } else if let Some(begin) = rest.strip_suffix("<unfinished ...>") {
            begun.insert(pid.to_owned(), begin.to_owned());
            continue;
        } else {
            rest.to_owned()
        };
        if !whole.contains("disk.raw>") {
            continue;
        }
        assert!(!whole.contains("= -1"), "{whole}");
        let name = whole.split('(').next().unwrap();
        calls.push(match name {
            "fdatasync" | "fsync" => 's',
            _ if whole.contains("RWF_DSYNC") => 'd',
            _ => 'w',
        });
    }
    calls
}

fn traced(setup: Setup, trace: &str) -> Builder {
    let builder = Builder::new(setup).image_len(1 << 20);
    let trace = builder.path(trace);
    let wrapper = [
        "strace",
        // The daemon stays our child; strace is the daemon's grandchild.
        "-D",
        "-f",
        "-y",
        "-qq",
        "-e",
        "trace=fdatasync,fsync,pwrite64,pwritev,pwritev2",
        "-e",
        "signal=none",
        "-o",
        trace.to_str().unwrap(),
    ];
    let wrapper: Vec<&str> = wrapper.to_vec();
    builder.wrapped_by(&wrapper)
}

#[test]
fn a_flush_on_one_connection_covers_the_writes_of_another() {
    let server = traced(UNIX_3_THREADS, "trace").start();
    assert_eq!(python(TWO_CONNECTIONS, &[&server.uri, "flush"]).ok(), "ok\n");
    let stopped = server.stop();
    let calls = calls_on_image(&stopped.dir.path().join("trace"));
    // Each write (one call or several) is followed by a sync; shutting down may sync once more.
    let rounds: Vec<&str> = calls.split('s').filter(|w| !w.is_empty()).collect();
    assert_eq!(rounds.len(), 8, "{calls}");
    assert!(rounds.iter().all(|w| w.chars().all(|c| c == 'w')), "{calls}");
    assert!(calls.ends_with('s'), "{calls}");
}

#[test]
fn fua_is_durable_before_the_reply() {
    let server = traced(TCP_1_THREADS, "trace").start();
    assert_eq!(python(TWO_CONNECTIONS, &[&server.uri, "fua"]).ok(), "ok\n");
    let stopped = server.stop();
    let calls = calls_on_image(&stopped.dir.path().join("trace"));
    // Synchronous writes, or a sync after each.
    let syncs = calls.matches(['d', 's']).count();
    assert!(syncs >= 8, "{calls}");
    assert!(!calls.contains("ww"), "{calls}");
}

#[test]
fn unsafe_caching_never_syncs_and_writethrough_always_does() {
    for (cache, argument, at_least, at_most) in [("unsafe", "flush", 0, 0), ("writethrough", "none", 8, 100)]
    {
        let server = traced(UNIX_3_THREADS, "trace").args(&["--cache", cache]).start();
        assert_eq!(python(TWO_CONNECTIONS, &[&server.uri, argument]).ok(), "ok\n");
        let stopped = server.stop();
        let calls = calls_on_image(&stopped.dir.path().join("trace"));
        let syncs = calls.matches(['d', 's']).count();
        assert!((at_least..=at_most).contains(&syncs), "{cache}: {calls}");
    }
}

/// The kernel reports a failed write-back once, to whoever syncs first. Nobody may take that for durability later.
#[test]
fn a_failed_sync_is_reported_and_not_forgotten() {
    const CLIENTS: &str = "
import errno, nbd, sys
a, b = nbd.NBD(), nbd.NBD()
a.connect_uri(sys.argv[1])
b.connect_uri(sys.argv[1])
a.pwrite(b'1' * 4096, 0)
for h in (b, a, b):
    try:
        h.flush()
        raise AssertionError('a flush succeeded after the data were lost')
    except nbd.Error as e:
        assert e.errnum == errno.EIO, e
assert a.pread(4096, 0) == b'1' * 4096
a.shutdown()
b.shutdown()
print('ok')
";
    let builder = Builder::new(UNIX_3_THREADS).image_len(1 << 20);
    let wrapper = ["strace", "-D", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fdatasync,fsync"];
    let inject = ["-e", "inject=fdatasync,fsync:error=EIO:when=1"];
    let server = builder.wrapped_by(&[&wrapper[..], &inject[..]].concat()).start();
    assert_eq!(python(CLIENTS, &[&server.uri]).ok(), "ok\n");
    server.signal(rustix::process::Signal::TERM);
    let (status, stopped) = server.wait();
    // Data were lost: the operator hears of it, in the log and by the exit code.
    assert_ne!(status.code(), None, "it ended by itself");
    assert!(stopped.log.iter().any(|l| l["level"] == "ERROR"), "{}", stopped.raw_log.join("\n"));
}
