//! Tracing set-up: text or JSON lines on stderr, written by a thread of their own.
//!
//! An IOThread must never block, and a write to stderr may (a full pipe, a stopped terminal). So the
//! formatted line goes through a bounded queue to the log thread; when the queue is full the line is dropped
//! and counted, and the count is written as soon as there is room. [`LogGuard`] drains the queue on drop:
//! hold it until the program ends. Only this file names `tracing_subscriber`.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

/// Environment variable whose filter wins over flags and file.
pub const ENV_FILTER: &str = "CONBD_LOG";
/// Lines that may wait for the log thread (ours; at a few hundred bytes each, under 2 MiB).
const QUEUE_LINES: usize = 4096;
/// How long a stop waits for a stuck stderr.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// The filter in [`ENV_FILTER`], if there is one.
#[must_use]
pub fn env_filter() -> Option<String> {
    std::env::var(ENV_FILTER).ok().filter(|filter| !filter.is_empty())
}

/// Starts logging with `filter`, as JSON lines or as text. Call once, before other threads start and after
/// signals were blocked. Returns the guard that drains the queue on drop.
///
/// # Errors
/// A bad filter, or a thread that cannot be started.
pub fn init(filter: &str, json: bool) -> Result<LogGuard, String> {
    let filter = EnvFilter::builder()
        .parse(with_libraries(filter))
        .map_err(|e| format!("log filter \"{filter}\": {e}"))?;
    let (sink, guard) = start_writer().map_err(|e| format!("cannot start the log thread: {e}"))?;
    let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colour).with_writer(sink);
    let outcome = if json {
        builder.json().flatten_event(true).with_span_list(false).try_init()
    } else {
        builder.with_target(false).try_init()
    };
    outcome.map_err(|e| format!("logging is set up already: {e}"))?;
    Ok(guard)
}

/// As [`init`], in the form of an old program: `PROGRAM: message: field=value …`, without time, level and colours.
///
/// # Errors
/// As [`init`].
pub fn init_plain(program: &'static str, filter: &str) -> Result<LogGuard, String> {
    let filter = EnvFilter::builder()
        .parse(with_libraries(filter))
        .map_err(|e| format!("log filter \"{filter}\": {e}"))?;
    let (sink, guard) = start_writer().map_err(|e| format!("cannot start the log thread: {e}"))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(sink)
        .event_format(Plain(program))
        .try_init()
        .map_err(|e| format!("logging is set up already: {e}"))?;
    Ok(guard)
}

/// The form of [`init_plain`].
struct Plain(&'static str);

/// Collects an event's message and fields.
#[derive(Default)]
struct PlainFields {
    message: String,
    fields: String,
}

impl tracing::field::Visit for PlainFields {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        use std::fmt::Write as _;
        // Writing to a String cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            // How many were left out is no news when none was.
            "suppressed" if format!("{value:?}") == "0" => Ok(()),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

impl<S, N> FormatEvent<S, N> for Plain
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &tracing::Event<'_>,
    ) -> std::fmt::Result {
        let mut event_fields = PlainFields::default();
        event.record(&mut event_fields);
        let PlainFields { message, fields } = event_fields;
        // One event, one line, whatever a client has sent.
        let line = format!("{}: {message}:{fields}", self.0);
        let line: String = line.trim_end_matches(':').chars().filter(|c| !c.is_control()).collect();
        writeln!(writer, "{line}")
    }
}

/// The filter, with what the coroutine library says of its own set-up left out unless the filter names the library: it is
/// no news to anybody who runs a server. Its warnings and errors are kept, but for those of its own I/O, which is not used: a stopped and
/// continued process is an error there.
fn with_libraries(filter: &str) -> String {
    let silent = |level: &str| ["off", "error"].contains(&level.trim().to_ascii_lowercase().as_str());
    if filter.split(',').any(silent) { filter.to_owned() } else { format!("may=warn,may::io=off,{filter}") }
}

/// Keeps the log thread; dropping it writes what is queued (for at most two seconds).
#[must_use = "dropping it ends the drain at exit"]
pub struct LogGuard {
    lines: SyncSender<Message>,
    /// One flush at a time; never locked on an IOThread.
    done: Mutex<Receiver<()>>,
}

impl LogGuard {
    /// Waits until every line logged so far was written, or a stuck stderr made it give up.
    pub fn flush(&self) {
        let done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        // An answer to an earlier flush that had given up waiting.
        while done.try_recv().is_ok() {}
        // A full queue means that stderr is stuck: then there is nothing to wait for.
        if self.lines.try_send(Message::Flush).is_ok() {
            // Giving up is the point of the timeout; there is nowhere left to report it.
            let _ = done.recv_timeout(DRAIN_TIMEOUT);
        }
    }
}

impl Drop for LogGuard {
    fn drop(&mut self) {
        self.flush();
    }
}

enum Message {
    Line(Vec<u8>),
    Flush,
}

/// Hands each event's line to the log thread.
#[derive(Clone)]
struct Sink {
    lines: SyncSender<Message>,
    dropped: Arc<AtomicU64>,
}

/// Collects the pieces of one event.
struct LineWriter<'a> {
    sink: &'a Sink,
    line: Vec<u8>,
}

impl Write for LineWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.line.extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for LineWriter<'_> {
    fn drop(&mut self) {
        if self.line.is_empty() {
            return;
        }
        let line = std::mem::take(&mut self.line);
        if let Err(TrySendError::Full(_)) = self.sink.lines.try_send(Message::Line(line)) {
            self.sink.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl<'a> MakeWriter<'a> for Sink {
    type Writer = LineWriter<'a>;
    fn make_writer(&'a self) -> LineWriter<'a> {
        LineWriter { sink: self, line: Vec::with_capacity(256) }
    }
}

fn start_writer() -> io::Result<(Sink, LogGuard)> {
    let (lines, queue) = sync_channel(QUEUE_LINES);
    let (tell_done, done) = sync_channel(1);
    let dropped = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&dropped);
    std::thread::Builder::new().name("log".to_owned()).spawn(move || {
        let mut stderr = io::stderr();
        // Errors on stderr have nowhere to go; the lines are lost, the server runs on.
        while let Ok(message) = queue.recv() {
            match message {
                Message::Line(line) => drop(stderr.write_all(&line)),
                Message::Flush => {
                    // Nobody waits any more after the timeout.
                    let _ = tell_done.try_send(());
                }
            }
            let lost = counted.swap(0, Ordering::Relaxed);
            if lost != 0 {
                drop(writeln!(stderr, "conbd: {lost} log lines were lost: stderr was not read fast enough"));
            }
        }
    })?;
    Ok((Sink { lines: lines.clone(), dropped }, LogGuard { lines, done: Mutex::new(done) }))
}
