//! `conbd bench URI`: drives any NBD server and tells how fast it was, and whether it keeps what it is given.
//!
//! ```text
//! main thread: waits, draws the progress line, watches for a stall
//! IoThread 0..T: connections i with i mod T = thread; each has `depth` worker coroutines over one Client
//! ```
//!
//! Without `--verify` a connection has no workers: one coroutine drives it by itself (`drive.rs`), for little cost per request.
//! A worker makes one request after the other and records its latency in its connection's histogram (same
//! thread, so the lock is never contended). With `--verify`, every block that is written tells its
//! offset, generation and seed and is filled with bytes that follow from them; a table holds the newest
//! generation of each block and keeps two requests off the same block. See [`verify`].

use super::drive::co_drive;
use super::{EXIT_FAILURE, EXIT_OK, EXIT_VERIFY, Failure, client_failure, with_sources, write_out};
use crate::aio::{AioConfig, AioContext, IoThread};
use crate::co::{Coroutine, co_sleep_ns};
use crate::config::{Size, Span};
use crate::nbd::client::{Bare, Client, ClientError, ExportInfo, Uri};
use crate::nbd::proto::{CmdFlags, HeaderStyle, TransmissionFlags};
use crate::util::buf::IoBuf;
use clap::Args;
use hdrhistogram::Histogram;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Requests in flight over all connections that may be asked for (ours; each is a coroutine).
const WORKERS_MAX: usize = 16_384;
/// Longest latency that the histograms can hold, in nanoseconds (ours: ten minutes).
pub(super) const LATENCY_MAX_NS: u64 = 600_000_000_000;
/// A server that answers nothing for this long ends the run (ours).
const STALL: Duration = Duration::from_secs(30);
/// Errors that are kept for the report (ours).
const KEPT: usize = 10;
/// Failed requests that end the run (ours: the figures mean nothing by then).
const ERRORS_MAX: u64 = 1000;
/// Part of the export that a writing `--verify` uses unless `--region` says otherwise (ours; the table takes 4 bytes per block).
const VERIFY_REGION: u64 = 4 << 30;

/// Drive an NBD server: throughput, latency percentiles, verification of data
///
/// Works with any server. Reading is harmless; whatever writes (--rw write or a mix) destroys what is in the
/// export and needs --destroy-data.
///
/// With --verify each written block carries its offset, a generation and the seed, and is filled accordingly;
/// at the end every written block is read back and compared. A mix of reads and writes also compares what it reads on the way. With
/// --rw read, blocks that an earlier run with the same --seed and --bs has written are compared.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  conbd bench nbd://localhost/ --bs 4k --depth 16 --connections 4\n  \
                  conbd bench nbd://localhost/ --bs 1M --pattern sequential --depth 4 --time 30s --json\n  \
                  conbd bench nbd://localhost/scratch --rw 70 --verify --region 1G --destroy-data")]
pub(crate) struct BenchArgs {
    /// The server: `nbd://HOST[:PORT]/EXPORT` or `nbd+unix:///EXPORT?socket=PATH`
    uri: String,

    /// Bytes per request
    #[arg(long, value_name = "SIZE", default_value = "4k")]
    bs: Size,

    /// Requests in flight on each connection
    #[arg(long, value_name = "N", default_value_t = 1)]
    depth: usize,

    /// Connections
    #[arg(long, value_name = "N", default_value_t = 1)]
    connections: usize,

    /// Threads of the client [default: one per connection, at most one per CPU]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,

    /// read, write, or the percentage of reads in a mix, such as 70
    #[arg(long, value_name = "KIND", default_value = "read")]
    rw: Rw,

    /// Which blocks
    #[arg(long, value_enum, default_value = "random")]
    pattern: Pattern,

    /// Most that is negotiated: simple replies, structured ones as libnbd does, extended headers as QEMU does. A server that
    /// has less is asked for less; with --verify it is always the best there is
    #[arg(long, value_enum, default_value = "simple")]
    headers: Headers,

    /// Check the data, too
    #[arg(long)]
    verify: bool,

    /// Seed of offsets and data
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// Stop after this time [default: 10s, unless --count is given]
    #[arg(long, value_name = "TIME")]
    time: Option<Span>,

    /// Stop after this many requests
    #[arg(long, value_name = "N")]
    count: Option<u64>,

    /// Use only the first SIZE bytes of the export [default: all; with --verify and writes at most 4G]
    #[arg(long, value_name = "SIZE")]
    region: Option<Size>,

    /// Yes, what is in the export may be overwritten
    #[arg(long)]
    destroy_data: bool,

    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

/// Percentage of reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rw(u8);

impl std::str::FromStr for Rw {
    type Err = String;
    fn from_str(text: &str) -> Result<Rw, String> {
        match text {
            "read" => Ok(Rw(100)),
            "write" => Ok(Rw(0)),
            _ => text
                .trim_end_matches('%')
                .parse()
                .ok()
                .filter(|percent| *percent <= 100)
                .map(Rw)
                .ok_or_else(|| "write read, write, or the percentage of reads (0 to 100)".to_owned()),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Pattern {
    /// any block, evenly distributed
    Random,
    /// one after the other; each connection in its own part
    Sequential,
}

/// [`HeaderStyle`] as an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Headers {
    Simple,
    Structured,
    Extended,
}

impl From<Headers> for HeaderStyle {
    fn from(headers: Headers) -> HeaderStyle {
        match headers {
            Headers::Simple => HeaderStyle::Simple,
            Headers::Structured => HeaderStyle::Structured,
            Headers::Extended => HeaderStyle::Extended,
        }
    }
}

fn style_name(style: HeaderStyle) -> &'static str {
    match style {
        HeaderStyle::Simple => "simple",
        HeaderStyle::Structured => "structured",
        HeaderStyle::Extended => "extended",
    }
}

/// What is being done; shared by all workers.
pub(super) struct Job {
    pub(super) bs: usize,
    rw: Rw,
    pattern: Pattern,
    verify: bool,
    seed: u64,
    /// Blocks of the region.
    blocks: u64,
    deadline: Option<Instant>,
    /// Requests that may still begin.
    remaining: Option<AtomicU64>,
    /// Set when the run is to end early.
    stop: AtomicBool,
    /// Newest generation of each block; empty unless data is written and verified.
    table: Vec<AtomicU32>,
}

/// A connection's two ways to make requests.
enum Link {
    /// By workers that wait for each.
    Full(Client),
    /// By the driver.
    Bare(Arc<Bare>),
}

impl Link {
    fn info(&self) -> &ExportInfo {
        match self {
            Link::Full(client) => client.info(),
            Link::Bare(bare) => &bare.info,
        }
    }

    /// How headers look.
    fn style(&self) -> HeaderStyle {
        match self {
            Link::Full(client) => client.header_style(),
            Link::Bare(bare) => bare.style,
        }
    }

    /// The client of a verifying run.
    fn full(&self) -> &Client {
        match self {
            Link::Full(client) => client,
            Link::Bare(_) => unreachable!("only a verifying run has workers"),
        }
    }

    /// Makes every request fail soon. Any thread.
    fn interrupt(&self) {
        match self {
            Link::Full(client) => client.interrupter().interrupt(),
            Link::Bare(bare) => bare.stream.interrupt(),
        }
    }

    fn co_close(self) {
        match self {
            Link::Full(client) => client.co_close(),
            Link::Bare(bare) => bare.co_close(),
        }
    }
}

/// One connection and what it has done.
pub(super) struct Connection {
    client: Link,
    context: Arc<AioContext>,
    /// Blocks that it uses.
    range: std::ops::Range<u64>,
    /// Next block of a sequential run, relative to the range.
    cursor: AtomicU64,
    ops: AtomicU64,
    stats: Mutex<Stats>,
}

struct Stats {
    read: Histogram<u64>,
    write: Histogram<u64>,
    errors: u64,
    error_texts: Vec<String>,
    checked: u64,
    mismatches: u64,
    mismatch_texts: Vec<(u64, String)>,
}

impl Stats {
    fn new() -> Stats {
        let histogram =
            || Histogram::new_with_bounds(1, LATENCY_MAX_NS, 3).expect("constant bounds are in order");
        Stats {
            read: histogram(),
            write: histogram(),
            errors: 0,
            error_texts: Vec::new(),
            checked: 0,
            mismatches: 0,
            mismatch_texts: Vec::new(),
        }
    }

    fn add(&mut self, other: &Stats) {
        self.read += &other.read;
        self.write += &other.write;
        self.errors += other.errors;
        self.checked += other.checked;
        self.mismatches += other.mismatches;
        self.error_texts
            .extend(other.error_texts.iter().take(KEPT - self.error_texts.len().min(KEPT)).cloned());
        self.mismatch_texts
            .extend(other.mismatch_texts.iter().take(KEPT - self.mismatch_texts.len().min(KEPT)).cloned());
    }
}

impl Connection {
    fn stats<R>(&self, f: impl FnOnce(&mut Stats) -> R) -> R {
        f(&mut self.stats.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A request was answered.
    pub(super) fn record(&self, reads: bool, latency_ns: u64) {
        self.ops.fetch_add(1, Ordering::Relaxed);
        self.stats(|s| {
            let histogram = if reads { &mut s.read } else { &mut s.write };
            histogram.saturating_record(latency_ns);
        });
    }

    pub(super) fn record_error(&self, job: &Job, error: &ClientError) {
        let errors = self.stats(|s| {
            s.errors += 1;
            if s.error_texts.len() < KEPT {
                s.error_texts.push(with_sources(error));
            }
            s.errors
        });
        if !matches!(error, ClientError::Request { .. }) || errors >= ERRORS_MAX {
            job.stop.store(true, Ordering::Relaxed);
        }
    }

    fn record_check(&self, offset: u64, outcome: Result<(), String>) {
        self.stats(|s| {
            s.checked += 1;
            if let Err(what) = outcome {
                s.mismatches += 1;
                if s.mismatch_texts.len() < KEPT {
                    s.mismatch_texts.push((offset, what));
                }
            }
        });
    }
}

/// A small, fast generator (splitmix64): good enough to choose blocks and to fill them.
pub(super) struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }
    /// A number below `n`, evenly distributed as far as anyone can see for n far below 2^64.
    fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(n)) >> 64) as u64
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Blocks that can be recognised: 40 bytes of header (magic, offset, generation, seed, checksum of those), then
/// bytes that follow from the checksum. All integers little-endian.
pub(crate) mod verify {
    use super::{Random, mix};

    const MAGIC: u64 = u64::from_le_bytes(*b"conbdblk");
    /// Bytes of the header; no block is smaller.
    pub(crate) const HEADER: usize = 40;

    fn checksum(offset: u64, generation: u64, seed: u64) -> u64 {
        [offset, generation, seed].iter().fold(MAGIC, |sum, field| mix(sum ^ mix(*field)))
    }

    /// Fills `block`, which belongs at byte `offset`.
    pub(crate) fn fill(block: &mut [u8], offset: u64, generation: u32, seed: u64) {
        let generation = u64::from(generation);
        let sum = checksum(offset, generation, seed);
        let (header, body) = block.split_at_mut(HEADER);
        for (place, field) in header.chunks_exact_mut(8).zip([MAGIC, offset, generation, seed, sum]) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        let mut random = Random(sum);
        for piece in body.chunks_mut(8) {
            piece.copy_from_slice(&random.next().to_le_bytes()[..piece.len()]);
        }
    }

    /// Compares `block` with what [`fill`] writes; `generation` None takes any.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub(crate) fn check(block: &[u8], offset: u64, generation: Option<u32>, seed: u64) -> Result<(), String> {
        let (header, body) = block.split_at(HEADER);
        let field = |i: usize| {
            u64::from_le_bytes(header[i * 8..i * 8 + 8].try_into().expect("eight bytes are eight bytes"))
        };
        if field(0) != MAGIC {
            return Err(if block.iter().all(|b| *b == 0) {
                "reads as zeroes: lost, or never written".to_owned()
            } else {
                "is no block of a verifying run".to_owned()
            });
        }
        let (its_offset, its_generation, its_seed) = (field(1), field(2), field(3));
        if field(4) != checksum(its_offset, its_generation, its_seed) {
            return Err("has a damaged header".to_owned());
        }
        if its_seed != seed {
            return Err(format!("was written by a run with another seed ({its_seed})"));
        }
        if its_offset != offset {
            return Err(format!("holds the data of offset {its_offset}"));
        }
        if let Some(expected) = generation
            && its_generation != u64::from(expected)
        {
            return Err(format!(
                "holds generation {its_generation} instead of {expected}: a write was lost or undone"
            ));
        }
        let mut random = Random(field(4));
        for (i, piece) in body.chunks(8).enumerate() {
            let expected = random.next().to_le_bytes();
            if piece != &expected[..piece.len()] {
                let at = piece.iter().zip(expected).position(|(a, b)| *a != b).unwrap_or(0);
                return Err(format!("is damaged from byte {} on (of {})", HEADER + i * 8 + at, block.len()));
            }
        }
        Ok(())
    }
}

/// Marks a block in the table as being worked on.
const BUSY: u32 = 1 << 31;

/// A block that this worker alone works on, and its generation when taken.
struct Claim<'a> {
    cell: Option<&'a AtomicU32>,
    generation: u32,
    block: u64,
}

impl Claim<'_> {
    /// Gives the block back with its new generation; 0 is "content unknown".
    fn release(self, generation: u32) {
        if let Some(cell) = self.cell {
            // Pairs with the Acquire in `Job::claim`.
            cell.store(generation, Ordering::Release);
        }
    }
}

/// What writes carry that are not verified.
pub(super) fn verify_fill(block: &mut [u8], job: &Job) {
    if block.len() >= verify::HEADER {
        verify::fill(block, 0, 0, job.seed);
    } else {
        block.fill(0x5a);
    }
}

impl Job {
    fn done(&self) -> bool {
        self.done_at(Instant::now())
    }

    /// Whether no request may begin any more, at this time.
    pub(super) fn done_at(&self, now: Instant) -> bool {
        self.stop.load(Ordering::Relaxed) || self.deadline.is_some_and(|end| now >= end)
    }

    /// Whether the next request reads.
    pub(super) fn reads(&self, random: &mut Random) -> bool {
        u64::from(self.rw.0) > random.below(100)
    }

    /// Chooses the next block, whoever else works on it.
    pub(super) fn next_block(&self, connection: &Connection, random: &mut Random) -> u64 {
        let range = &connection.range;
        let count = range.end - range.start;
        range.start
            + match self.pattern {
                Pattern::Random => random.below(count),
                Pattern::Sequential => connection.cursor.fetch_add(1, Ordering::Relaxed) % count,
            }
    }

    /// Takes one from the number of requests that may begin.
    pub(super) fn may_begin(&self) -> bool {
        match &self.remaining {
            None => true,
            Some(left) => {
                left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok()
            }
        }
    }

    /// Takes the block, unless another worker has it.
    fn claim(&self, block: u64) -> Option<Claim<'_>> {
        let Some(cell) = self.table.get(block as usize) else {
            return Some(Claim { cell: None, generation: 0, block });
        };
        let before = cell.fetch_or(BUSY, Ordering::Acquire);
        (before & BUSY == 0).then_some(Claim { cell: Some(cell), generation: before, block })
    }

    /// Chooses the next block for a worker and takes it. Yields only when every block is taken.
    fn co_next<'a>(&'a self, connection: &Connection, random: &mut Random) -> Claim<'a> {
        let range = &connection.range;
        let count = range.end - range.start;
        loop {
            let mut at = match self.pattern {
                Pattern::Random => random.below(count),
                Pattern::Sequential => connection.cursor.fetch_add(1, Ordering::Relaxed) % count,
            };
            for _ in 0..count.min(1024) {
                if let Some(claim) = self.claim(range.start + at) {
                    return claim;
                }
                at = (at + 1) % count;
            }
            co_sleep_ns(10_000);
        }
    }
}

/// One worker: requests, one after the other, until the run ends.
fn co_work(job: &Job, connection: &Connection, mut random: Random) {
    let mut buf = IoBuf::new(job.bs);
    verify::fill(&mut buf, 0, 0, job.seed);
    while !job.done() && job.may_begin() {
        let reads = job.reads(&mut random);
        let claim = job.co_next(connection, &mut random);
        let offset = claim.block * job.bs as u64;
        let begin;
        let outcome;
        let mut generation = claim.generation;
        if reads {
            begin = Instant::now();
            outcome = connection.client.full().co_read(offset, buf);
        } else {
            generation = (generation % (BUSY - 1)) + 1;
            if job.verify {
                verify::fill(&mut buf, offset, generation, job.seed);
            }
            begin = Instant::now();
            outcome = connection.client.full().co_write(offset, buf, CmdFlags::empty());
        }
        let latency = u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX).clamp(1, LATENCY_MAX_NS);
        match outcome {
            Ok(back) => {
                buf = back;
                connection.record(reads, latency);
                if job.verify && reads {
                    // In a mix, a block that this run has not written may hold anything.
                    let any = job.table.is_empty();
                    if any || generation != 0 {
                        let expected = (!any).then_some(generation);
                        connection.record_check(offset, verify::check(&buf, offset, expected, job.seed));
                    }
                }
                claim.release(generation);
            }
            Err(error) => {
                connection.record_error(job, &error);
                // A failed write may have changed the block, or not.
                let known = if reads { generation } else { 0 };
                claim.release(known);
                if !matches!(error, ClientError::Request { .. }) {
                    return;
                }
                buf = IoBuf::new(job.bs);
            }
        }
    }
}

/// Reads back every block of the connection's range that was written, sharing the range with its other workers.
fn co_read_back(job: &Job, connection: &Connection, next: &AtomicU64, end: u64) {
    let mut buf = IoBuf::new(job.bs);
    loop {
        let block = next.fetch_add(1, Ordering::Relaxed);
        if block >= end {
            return;
        }
        let generation = job.table[block as usize].load(Ordering::Acquire);
        if generation == 0 {
            continue;
        }
        let offset = block * job.bs as u64;
        match connection.client.full().co_read(offset, buf) {
            Ok(back) => {
                buf = back;
                connection.ops.fetch_add(1, Ordering::Relaxed);
                connection.record_check(offset, verify::check(&buf, offset, Some(generation), job.seed));
            }
            Err(error) => {
                connection.record_error(job, &error);
                if !matches!(error, ClientError::Request { .. }) {
                    return;
                }
                buf = IoBuf::new(job.bs);
            }
        }
    }
}

pub(crate) fn run(args: &BenchArgs) -> Result<u8, Failure> {
    let uri: Uri = args.uri.parse().map_err(Failure::usage)?;
    check_args(args)?;
    // Many connections need many descriptors; if it cannot be raised, connecting says so.
    let _ = crate::util::sys::raise_nofile_limit();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let thread_count = args.threads.unwrap_or(args.connections.min(cpus));
    let mut threads = Vec::new();
    for i in 0..thread_count {
        let config = AioConfig { name: format!("bench-{i}"), ..AioConfig::default() };
        threads.push(
            IoThread::spawn(config).map_err(|e| Failure::failed(format!("cannot start a thread: {e}")))?,
        );
    }
    let contexts: Vec<_> = threads.iter().map(|t| Arc::clone(t.context())).collect();
    let outcome = run_on(args, &uri, &contexts);
    for thread in threads {
        thread.stop().map_err(|e| Failure::failed(format!("a thread of the benchmark failed: {e}")))?;
    }
    outcome
}

fn check_args(args: &BenchArgs) -> Result<(), Failure> {
    let max = u64::from(crate::nbd::proto::MAX_PAYLOAD);
    if args.bs.0 == 0 || args.bs.0 > max {
        return Err(Failure::usage(format!("--bs {}: it must be 1 to {}", args.bs, Size(max))));
    }
    if args.verify && args.bs.0 < verify::HEADER as u64 {
        return Err(Failure::usage(format!(
            "--bs {}: --verify needs at least {} bytes",
            args.bs,
            verify::HEADER
        )));
    }
    let workers = args.depth.saturating_mul(args.connections);
    if workers == 0 || workers > WORKERS_MAX {
        return Err(Failure::usage(format!(
            "--depth {} times --connections {}: the product must be 1 to {WORKERS_MAX}",
            args.depth, args.connections
        )));
    }
    if args.threads == Some(0) || args.threads.is_some_and(|n| n > args.connections) {
        return Err(Failure::usage(format!(
            "--threads: it must be 1 to the number of connections, {}",
            args.connections
        )));
    }
    if args.rw.0 < 100 && !args.destroy_data {
        return Err(Failure::usage(
            "this would overwrite the export with test data; say --destroy-data if that is all right, or use --rw read",
        ));
    }
    if args.count == Some(0) || args.time.is_some_and(|t| t.0.is_zero()) {
        return Err(Failure::usage("--count and --time must be more than zero"));
    }
    Ok(())
}

fn run_on(args: &BenchArgs, uri: &Uri, contexts: &[Arc<AioContext>]) -> Result<u8, Failure> {
    let (clients, failure) = connect_all(args, uri, contexts);
    let outcome = match failure {
        Some(failure) => Err(failure),
        None => measure(args, uri, clients),
    };
    match outcome {
        Ok((code, text)) => {
            write_out(&text)?;
            Ok(code)
        }
        Err(failure) => Err(failure),
    }
}

/// Opens all connections; a failure comes with none.
fn connect_all(
    args: &BenchArgs,
    uri: &Uri,
    contexts: &[Arc<AioContext>],
) -> (Vec<(Link, Arc<AioContext>)>, Option<Failure>) {
    let (tell, heard) = channel();
    for i in 0..args.connections {
        let context = Arc::clone(&contexts[i % contexts.len()]);
        let (tell, uri, home) = (tell.clone(), uri.clone(), Arc::clone(&context));
        let (verify, headers) = (args.verify, args.headers.into());
        Coroutine::new(move || {
            let outcome = if verify {
                Client::co_connect(&uri).map(Link::Full)
            } else {
                Bare::co_connect(&uri, headers).map(|bare| Link::Bare(Arc::new(bare)))
            };
            // The receiver lives until all have reported.
            let _ = tell.send((i, outcome, home));
        })
        .schedule(&context);
    }
    drop(tell);
    let mut clients = Vec::new();
    let mut failure = None;
    for (i, outcome, context) in heard {
        match outcome {
            Ok(client) => clients.push((i, client, context)),
            Err(e) if failure.is_none() => {
                failure = Some(client_failure(uri, &e));
            }
            Err(_) => {}
        }
    }
    clients.sort_by_key(|(i, ..)| *i);
    let clients: Vec<_> = clients.into_iter().map(|(_, client, context)| (client, context)).collect();
    if failure.is_some() {
        close_all(clients);
        return (Vec::new(), failure);
    }
    (clients, None)
}

/// Closes connections and waits for it.
fn close_all(clients: Vec<(Link, Arc<AioContext>)>) {
    let (tell, heard) = channel::<()>();
    for (client, context) in clients {
        let tell = tell.clone();
        Coroutine::new(move || {
            client.co_close();
            drop(tell);
        })
        .schedule(&context);
    }
    drop(tell);
    // Ends when the last sender is gone.
    let _ = heard.recv();
}

fn make_job(args: &BenchArgs, info: &ExportInfo) -> Result<Job, Failure> {
    let sizes = info.effective_block_sizes();
    let bs = args.bs.0;
    let writes = args.rw.0 < 100;
    if !bs.is_multiple_of(u64::from(sizes.min)) {
        return Err(Failure::usage(format!(
            "--bs {bs}: the server wants multiples of its minimum block size, {}",
            sizes.min
        )));
    }
    if bs > u64::from(sizes.max) {
        return Err(Failure::usage(format!(
            "--bs {bs}: the server takes at most {} bytes a request",
            sizes.max
        )));
    }
    if writes && info.flags.contains(TransmissionFlags::NBD_FLAG_READ_ONLY) {
        return Err(Failure::failed(format!("export \"{}\" is read-only; use --rw read", info.name)));
    }
    let mut region = args.region.map_or(info.size, |r| r.0);
    if region > info.size {
        return Err(Failure::usage(format!("--region {region}: the export has only {} bytes", info.size)));
    }
    if args.region.is_none() && args.verify && writes {
        region = region.min(VERIFY_REGION);
    }
    let blocks = region / bs;
    let workers = (args.depth * args.connections) as u64;
    if blocks < workers {
        return Err(Failure::usage(format!(
            "{blocks} blocks of {bs} bytes fit into {region} bytes, and {workers} requests in flight need one each; lower --bs, --depth or --connections"
        )));
    }
    if args.verify && writes && blocks > 1 << 32 {
        return Err(Failure::usage("--verify keeps 4 bytes per block: lower --region or raise --bs"));
    }
    let table =
        if args.verify && writes { (0..blocks).map(|_| AtomicU32::new(0)).collect() } else { Vec::new() };
    Ok(Job {
        bs: bs as usize,
        rw: args.rw,
        pattern: args.pattern,
        verify: args.verify,
        seed: args.seed,
        blocks,
        deadline: None,
        remaining: args.count.map(AtomicU64::new),
        stop: AtomicBool::new(false),
        table,
    })
}

/// Runs the workers over open connections, closes them, and returns exit code and report.
fn measure(
    args: &BenchArgs,
    uri: &Uri,
    clients: Vec<(Link, Arc<AioContext>)>,
) -> Result<(u8, String), Failure> {
    let mut job = match make_job(args, clients[0].0.info()) {
        Ok(job) => job,
        Err(failure) => {
            close_all(clients);
            return Err(failure);
        }
    };
    let (info, style) = (clients[0].0.info().clone(), clients[0].0.style());
    // Without multi-conn, what one connection writes another may not see: each gets its own part then.
    let coherent = info.flags.contains(TransmissionFlags::NBD_FLAG_CAN_MULTI_CONN);
    let apart = args.pattern == Pattern::Sequential || (!job.table.is_empty() && !coherent);
    let count = clients.len() as u64;
    let connections: Vec<Arc<Connection>> = clients
        .into_iter()
        .zip(0u64..)
        .map(|((client, context), i)| {
            let range =
                if apart { job.blocks * i / count..job.blocks * (i + 1) / count } else { 0..job.blocks };
            let stats = Mutex::new(Stats::new());
            Arc::new(Connection {
                client,
                context,
                range,
                cursor: AtomicU64::new(0),
                ops: AtomicU64::new(0),
                stats,
            })
        })
        .collect();

    let time = args.time.map(|t| t.0).or(args.count.is_none().then_some(Duration::from_secs(10)));
    let begin = Instant::now();
    job.deadline = time.map(|t| begin + t);
    let job = Arc::new(job);
    let progress = Progress { on: std::io::stderr().is_terminal() && !args.json, bs: job.bs as u64 };
    let finished = {
        let (tell, heard) = channel::<()>();
        for (c, connection) in connections.iter().enumerate() {
            if let Link::Bare(bare) = &connection.client {
                let (bare, depth) = (Arc::clone(bare), args.depth);
                let random = Random(mix(args.seed ^ mix((c as u64) << 32)));
                spawn_worker(&job, connection, &tell, move |job, connection| {
                    co_drive(job, connection, bare, depth, random)
                });
                continue;
            }
            for w in 0..args.depth {
                let random = Random(mix(args.seed ^ mix(((c as u64) << 32) | w as u64)));
                spawn_worker(&job, connection, &tell, move |job, connection| {
                    co_work(job, connection, random)
                });
            }
        }
        drop(tell);
        wait(&job, &connections, &heard, begin, &progress, "")
    };
    let elapsed = begin.elapsed();
    let ok = finished && !job.stop.load(Ordering::Relaxed);
    if ok && !job.table.is_empty() {
        read_back(&job, &connections, args.depth, apart, &progress);
    }
    progress.clear();

    let mut total = Stats::new();
    for connection in &connections {
        connection.stats(|s| total.add(s));
    }
    close_all(
        connections
            .into_iter()
            .filter_map(Arc::into_inner)
            .map(|connection| (connection.client, connection.context))
            .collect(),
    );
    let code = if total.mismatches > 0 {
        EXIT_VERIFY
    } else if total.errors > 0 || !finished {
        EXIT_FAILURE
    } else {
        EXIT_OK
    };
    let report = Report { args, uri, size: info.size, style, elapsed, total: &total, stalled: !finished };
    let text = if args.json { format!("{:#}\n", report.as_json()) } else { report.as_text() };
    Ok((code, text))
}

fn spawn_worker(
    job: &Arc<Job>,
    connection: &Arc<Connection>,
    tell: &Sender<()>,
    work: impl FnOnce(&Job, &Connection) + Send + 'static,
) {
    let (job, worker, tell) = (Arc::clone(job), Arc::clone(connection), tell.clone());
    Coroutine::new(move || {
        work(&job, &worker);
        // First the connection, then the word that it is free: the main thread takes it apart.
        drop(worker);
        drop(tell);
    })
    .schedule(&connection.context);
}

/// Waits until all workers are gone; false when the server had stalled and was cut off.
fn wait(
    job: &Job,
    connections: &[Arc<Connection>],
    heard: &Receiver<()>,
    begin: Instant,
    progress: &Progress,
    what: &str,
) -> bool {
    let mut last = (0, Instant::now());
    let mut shown = (0, Instant::now());
    let mut alive = true;
    loop {
        match heard.recv_timeout(Duration::from_millis(100)) {
            Err(RecvTimeoutError::Disconnected) => return alive,
            Ok(()) | Err(RecvTimeoutError::Timeout) => {}
        }
        let ops: u64 = connections.iter().map(|c| c.ops.load(Ordering::Relaxed)).sum();
        if ops != last.0 {
            last = (ops, Instant::now());
        } else if last.1.elapsed() > STALL && alive {
            alive = false;
            job.stop.store(true, Ordering::Relaxed);
            for connection in connections {
                connection.client.interrupt();
            }
        }
        if shown.1.elapsed() >= Duration::from_millis(500) {
            progress.show(begin.elapsed(), ops - shown.0, shown.1.elapsed(), what);
            shown = (ops, Instant::now());
        }
    }
}

/// Flushes, then reads every written block back.
fn read_back(
    job: &Arc<Job>,
    connections: &[Arc<Connection>],
    depth: usize,
    apart: bool,
    progress: &Progress,
) {
    let begin = Instant::now();
    let (tell, heard) = channel::<()>();
    for connection in connections {
        if !connection.client.info().flags.contains(TransmissionFlags::NBD_FLAG_SEND_FLUSH) {
            continue;
        }
        spawn_worker(job, connection, &tell, |job, connection| {
            if let Err(error) = connection.client.full().co_flush() {
                connection.record_error(job, &error);
            }
        });
    }
    drop(tell);
    if !wait(job, connections, &heard, begin, progress, "flushing") {
        return;
    }
    let (tell, heard) = channel::<()>();
    let shared = Arc::new(AtomicU64::new(0));
    for connection in connections {
        let (next, end) = if apart {
            (Arc::new(AtomicU64::new(connection.range.start)), connection.range.end)
        } else {
            (Arc::clone(&shared), job.blocks)
        };
        for _ in 0..depth {
            let next = Arc::clone(&next);
            spawn_worker(job, connection, &tell, move |job, connection| {
                co_read_back(job, connection, &next, end)
            });
        }
    }
    drop(tell);
    wait(job, connections, &heard, begin, progress, "reading back");
}

/// A line on a terminal, redrawn in place.
struct Progress {
    on: bool,
    bs: u64,
}

impl Progress {
    fn show(&self, elapsed: Duration, ops: u64, over: Duration, what: &str) {
        if !self.on {
            return;
        }
        let rate = ops as f64 / over.as_secs_f64().max(1e-9);
        let speed = rate * self.bs as f64 / f64::from(1 << 20);
        let line = format!(
            "\r\x1b[K{:6.1} s  {rate:9.0} requests/s  {speed:8.1} MiB/s  {what}",
            elapsed.as_secs_f64()
        );
        // The progress line is a nicety: whether it can be written does not matter.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }

    fn clear(&self) {
        if self.on {
            let _ = std::io::stderr().write_all(b"\r\x1b[K");
        }
    }
}

struct Report<'a> {
    args: &'a BenchArgs,
    uri: &'a Uri,
    size: u64,
    /// What was negotiated.
    style: HeaderStyle,
    elapsed: Duration,
    total: &'a Stats,
    stalled: bool,
}

const PERCENTILES: [(&str, f64); 5] =
    [("p50", 50.0), ("p90", 90.0), ("p99", 99.0), ("p99.9", 99.9), ("p99.99", 99.99)];

impl Report<'_> {
    fn seconds(&self) -> f64 {
        self.elapsed.as_secs_f64().max(1e-9)
    }

    fn kind_json(&self, histogram: &Histogram<u64>) -> Value {
        let us = |ns: f64| (ns / 10.0).round() / 100.0;
        let ops = histogram.len();
        let mut latency = json!({
            "min": us(histogram.min() as f64), "mean": us(histogram.mean()), "max": us(histogram.max() as f64),
        });
        for (name, q) in PERCENTILES {
            latency[name] = json!(us(histogram.value_at_percentile(q) as f64));
        }
        if ops == 0 {
            latency = Value::Null;
        }
        json!({
            "requests": ops,
            "bytes": ops * self.args.bs.0,
            "requests_per_s": ops as f64 / self.seconds(),
            "mib_per_s": (ops * self.args.bs.0) as f64 / self.seconds() / f64::from(1 << 20),
            "latency_us": latency,
        })
    }

    fn as_json(&self) -> Value {
        let args = self.args;
        let mismatches: Vec<Value> =
            self.total.mismatch_texts.iter().map(|(at, what)| json!({"offset": at, "what": what})).collect();
        json!({
            "uri": self.uri.to_string(),
            "export_size": self.size,
            "bs": args.bs.0,
            "depth": args.depth,
            "connections": args.connections,
            "read_percent": args.rw.0,
            "pattern": match args.pattern { Pattern::Random => "random", Pattern::Sequential => "sequential" },
            "headers": style_name(self.style),
            "seed": args.seed,
            "seconds": self.seconds(),
            "read": self.kind_json(&self.total.read),
            "write": self.kind_json(&self.total.write),
            "errors": self.total.errors,
            "error_messages": self.total.error_texts,
            "stalled": self.stalled,
            "verify": args.verify.then(|| json!({
                "blocks_checked": self.total.checked,
                "mismatches": self.total.mismatches,
                "first": mismatches,
            })),
        })
    }

    fn as_text(&self) -> String {
        let args = self.args;
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "{}: {} blocks of {} bytes, depth {}, {} connections, {} headers, {:.2} s",
            self.uri,
            match args.pattern {
                Pattern::Random => "random",
                Pattern::Sequential => "sequential",
            },
            args.bs.0,
            args.depth,
            args.connections,
            style_name(self.style),
            self.seconds()
        );
        for (name, h) in [("read", &self.total.read), ("write", &self.total.write)] {
            if h.is_empty() {
                continue;
            }
            let rate = h.len() as f64 / self.seconds();
            let speed = rate * args.bs.0 as f64 / f64::from(1 << 20);
            let us = |ns: u64| ns as f64 / 1000.0;
            let _ = writeln!(out, "{name:>6}: {} requests, {rate:.0}/s, {speed:.1} MiB/s", h.len());
            let _ =
                write!(out, "        latency in us: min {:.1}, mean {:.1}", us(h.min()), h.mean() / 1000.0);
            for (label, q) in PERCENTILES {
                let _ = write!(out, ", {label} {:.1}", us(h.value_at_percentile(q)));
            }
            let _ = writeln!(out, ", max {:.1}", us(h.max()));
        }
        if args.verify {
            let _ = writeln!(
                out,
                "verify: {} blocks compared, {} wrong",
                self.total.checked, self.total.mismatches
            );
            for (offset, what) in &self.total.mismatch_texts {
                let _ = writeln!(out, "  offset {offset}: {what}");
            }
        }
        if self.stalled {
            let _ = writeln!(
                out,
                "stalled: the server answered nothing for {} s and was cut off",
                STALL.as_secs()
            );
        }
        if self.total.errors > 0 {
            let _ = writeln!(out, "errors: {}", self.total.errors);
            for text in &self.total.error_texts {
                let _ = writeln!(out, "  {text}");
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verify_tells_what_is_wrong_with_a_block() {
        let mut block = vec![0; 512];
        let check = |block: &[u8], expected: &str| {
            let what = verify::check(block, 4096, Some(3), 7).expect_err(expected);
            assert!(what.contains(expected), "{what} should say {expected}");
        };
        check(&block, "zeroes");
        verify::fill(&mut block, 4096, 3, 7);
        verify::check(&block, 4096, Some(3), 7).expect("as written");
        verify::check(&block, 4096, None, 7).expect("any generation");
        let good = block.clone();
        block[300] ^= 1;
        check(&block, "damaged from byte 300");
        block.clone_from(&good);
        block[8] ^= 1;
        check(&block, "damaged header");
        block[0] ^= 1;
        check(&block, "no block of a verifying run");
        verify::fill(&mut block, 8192, 3, 7);
        check(&block, "holds the data of offset 8192");
        verify::fill(&mut block, 4096, 2, 7);
        check(&block, "generation 2 instead of 3");
        verify::fill(&mut block, 4096, 3, 8);
        check(&block, "another seed (8)");
    }

    #[test]
    fn rw_is_a_word_or_a_percentage() {
        for (text, percent) in [("read", 100), ("write", 0), ("70", 70), ("70%", 70), ("100", 100)] {
            assert_eq!(text.parse(), Ok(Rw(percent)), "{text}");
        }
        for text in ["", "readwrite", "101", "-1"] {
            assert!(text.parse::<Rw>().is_err(), "{text}");
        }
    }
}
