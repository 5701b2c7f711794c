//! How many instructions do the hot parts take? Times differ from run to run and from machine to machine, instructions hardly do:
//! `make bench-count` runs this program in valgrind and compares with `benches/counts.json`, which has the expected figures.
//!
//! `count PART N` does the part N times and nothing else; `count --list` says what there is. What is done before and after the N times is the
//! same for every N, so the difference between two runs is the part alone. Only user space is counted: a system call is one
//! instruction here, and a cache miss costs nothing. Each part asserts that it did its work: a part that fails early would be cheap.
//!
//! The counting tool is cachegrind with its caches switched off: callgrind counts the same, on switched stacks too (3.19: to a tenth of a
//! percent), but follows calls and returns in order to attribute, and coroutines leave by another stack than they came; cachegrind
//! counts per function and never looks at a stack. Parts run on one thread with the thread pool as engine, whose workers have nothing to do:
//! no part depends on what the kernel offers, or on a scheduler. Not here for that reason: hand-overs between threads, sockets and
//! io_uring, which `co_mutex.rs`, `event_loop.rs` and `serve.rs` time.

use conbd::aio::engine::EngineChoice;
use conbd::aio::{AioConfig, AioContext};
use conbd::block::qcow2::create::{CreateOptions, co_create};
use conbd::block::qcow2::{Qcow2Node, Qcow2OpenOptions};
use conbd::block::{BlockBackend, BlockNode, MemoryNode, WriteFlags};
use conbd::co::{CoMutex, Coroutine, co_yield};
use conbd::nbd::proto::*;
use conbd::nbd::reply::{Batch, Next, is_zero};
use conbd::nbd::request::{View, header_len, next_header, validate};
use conbd::nbd::wire::*;
use std::hint::black_box;
use std::io::IoSlice;
use std::num::NonZero;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};

/// Name, what one of N is, and the loop.
type Part = (&'static str, &'static str, fn(u64));

const PARTS: &[Part] = &[
    ("decode_compact", "decode and validate a compact request header", |n| decode(n, false)),
    ("decode_extended", "decode and validate an extended request header", |n| decode(n, true)),
    ("batch_simple", "8 simple replies of 4 KiB, copied into a batch", |n| batch(n, false)),
    ("batch_structured", "8 structured replies of 4 KiB, copied and looked at for holes", |n| batch(n, true)),
    ("zero_scan", "find that 4 KiB are zero", zero_scan),
    ("co_mutex", "lock and unlock a free CoMutex", co_mutex),
    ("co_switch", "enter a coroutine, which yields", co_switch),
    ("co_create", "create a coroutine, run it to its end", co_create_run),
    ("turn_bh", "schedule a bottom half, one turn of the loop", turn_bh),
    ("memory_read", "read 4 KiB of a memory disk through its backend", |n| reads(n, false)),
    ("memory_write", "write 4 KiB of a memory disk through its backend", |n| writes(n, false)),
    ("qcow2_read", "the same read of a qcow2 image in memory", |n| reads(n, true)),
    ("qcow2_write", "the same write, in place, to a qcow2 image in memory", |n| writes(n, true)),
];

const BLOCK: usize = 4096;
const CLUSTER: usize = 65536;
/// Clusters that the reads and writes go round: all of their L2 entries are in one loaded slice.
const CLUSTERS: u64 = 16;

fn decode(n: u64, extended: bool) {
    let header = RequestHeader {
        flags: CmdFlags::empty(),
        cmd: NBD_CMD_READ,
        cookie: 0x9e37_79b9_7f4a_7c15,
        offset: 7919 * 4096,
        len: BLOCK as u64,
    };
    let input = if extended { header.encode_extended().to_vec() } else { header.encode().to_vec() };
    assert_eq!(input.len(), header_len(extended));
    let view = View { size: 1 << 30, flags: TransmissionFlags::all(), has_contexts: true, extended };
    for _ in 0..n {
        let header = next_header(black_box(&input), extended).expect("a request").expect("all of its header");
        assert!(black_box(validate(&header, black_box(&view))).is_ok());
    }
}

/// As the server does it: one batch, used again and again. Its arena is new each time.
fn batch(n: u64, structured: bool) {
    let data = vec![7u8; BLOCK];
    let mut batch = Batch::new();
    for _ in 0..n {
        for cookie in 0..8u64 {
            let to = ReplyTo::compact(cookie);
            let header = if structured { to.offset_data_len() } else { SimpleReply::LEN };
            let room = batch.room(header + BLOCK);
            room[header..].copy_from_slice(black_box(&data));
            if structured {
                batch.commit_sparse(ReplyFlags::NBD_REPLY_FLAG_DONE, to, cookie * BLOCK as u64, BLOCK);
            } else {
                room[..header].copy_from_slice(&SimpleReply { error: None, cookie }.encode());
                batch.commit(header + BLOCK);
            }
        }
        assert!(batch.bytes() > 8 * BLOCK);
        let mut slices = [IoSlice::new(&[]); 64];
        assert!(matches!(black_box(batch.next(0, usize::MAX / 2, &mut slices)), Next::Slices(_)));
        batch.clear();
    }
}

fn zero_scan(n: u64) {
    let zeroes = vec![0u8; BLOCK];
    (0..n).for_each(|_| assert!(is_zero(black_box(&zeroes))));
}

fn context() -> Arc<AioContext> {
    AioContext::new(AioConfig { engine: EngineChoice::Threads, ..AioConfig::default() }).expect("a context")
}

/// Runs `f` in a coroutine of the calling thread to its end.
fn in_coroutine<T: Send + 'static>(ctx: &Arc<AioContext>, f: impl FnOnce() -> T + Send + 'static) -> T {
    let (tx, rx) = mpsc::channel();
    Coroutine::new(move || tx.send(f()).expect("the caller waits")).enter();
    let mut got = None;
    ctx.poll_until(|| {
        got = rx.try_recv().ok();
        got.is_some()
    });
    got.expect("the coroutine has run")
}

fn co_mutex(n: u64) {
    let ctx = context();
    let sum = in_coroutine(&ctx, move || {
        let m = CoMutex::new(0_u64);
        (0..n).for_each(|_| *black_box(&m).co_lock() += 1);
        m.into_inner()
    });
    assert_eq!(sum, n);
}

fn co_switch(n: u64) {
    let _ctx = context();
    let stop = Arc::new(AtomicBool::new(false));
    let theirs = Arc::clone(&stop);
    let (tx, rx) = mpsc::channel();
    let co = Coroutine::new(move || {
        let mut entered = 0;
        while !theirs.load(Ordering::Relaxed) {
            entered += 1;
            co_yield();
        }
        tx.send(entered).expect("the part waits");
    });
    (0..n).for_each(|_| co.enter());
    stop.store(true, Ordering::Relaxed);
    co.enter();
    assert_eq!(rx.try_recv(), Ok(n));
}

fn co_create_run(n: u64) {
    let _ctx = context();
    let stopped = Arc::new(AtomicBool::new(false));
    for _ in 0..n {
        let theirs = Arc::clone(&stopped);
        Coroutine::new(move || theirs.store(true, Ordering::Relaxed)).enter();
        assert!(stopped.swap(false, Ordering::Relaxed));
    }
}

fn turn_bh(n: u64) {
    let ctx = context();
    let run = Arc::new(AtomicU64::new(0));
    let theirs = Arc::clone(&run);
    let bh = ctx.bh_new(move || {
        theirs.fetch_add(1, Ordering::Relaxed);
    });
    for _ in 0..n {
        bh.schedule();
        ctx.poll(false);
    }
    assert_eq!(run.load(Ordering::Relaxed), n);
}

/// A disk in memory, `CLUSTERS` of it written; the qcow2 image is to be closed.
fn disk(ctx: &Arc<AioContext>, qcow2: bool) -> (Arc<BlockBackend>, Option<Arc<Qcow2Node>>) {
    let size = 1 << 30;
    let image = qcow2.then(|| {
        in_coroutine(ctx, move || {
            let file: Arc<dyn BlockNode> = Arc::new(MemoryNode::growable("image"));
            co_create(&*file, None, &CreateOptions::new(size)).expect("an image is created");
            Qcow2Node::co_open(file, Qcow2OpenOptions::default()).expect("the image opens")
        })
    });
    let root: Arc<dyn BlockNode> = match &image {
        Some(image) => Arc::clone(image) as _,
        None => Arc::new(MemoryNode::new("memory", size).expect("a disk")),
    };
    let backend = BlockBackend::new(root);
    let theirs = Arc::clone(&backend);
    in_coroutine(ctx, move || {
        let cluster = vec![7u8; CLUSTER];
        for i in 0..CLUSTERS {
            let done = theirs.co_pwritev(i * CLUSTER as u64, &[IoSlice::new(&cluster)], WriteFlags::empty());
            done.expect("a write");
        }
    });
    (backend, image)
}

fn close(ctx: &Arc<AioContext>, image: Option<Arc<Qcow2Node>>) {
    if let Some(image) = image {
        in_coroutine(ctx, move || image.co_close().expect("the image closes"));
    }
}

fn reads(n: u64, qcow2: bool) {
    let ctx = context();
    let (backend, image) = disk(&ctx, qcow2);
    let mut buf = vec![0u8; BLOCK];
    for i in 0..n {
        assert!(backend.try_pread(i % CLUSTERS * CLUSTER as u64, black_box(&mut buf)));
    }
    assert_eq!(buf[BLOCK - 1], 7);
    close(&ctx, image);
}

fn writes(n: u64, qcow2: bool) {
    let ctx = context();
    let (backend, image) = disk(&ctx, qcow2);
    let buf = vec![9u8; BLOCK];
    for i in 0..n {
        let done = backend.try_pwrite(i % CLUSTERS * CLUSTER as u64, black_box(&buf));
        done.expect("a write in place").expect("a write");
    }
    let mut read = vec![0u8; BLOCK];
    assert!(backend.try_pread(0, &mut read));
    assert_eq!(read, buf);
    close(&ctx, image);
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["--list"] => PARTS.iter().for_each(|(name, what, _)| println!("{name}\t{what}")),
        [name, n] if !name.starts_with('-') => {
            let Some((_, _, part)) = PARTS.iter().find(|(known, ..)| *known == name) else {
                eprintln!("count: there is no part {name:?}; `count --list` says which there are");
                return ExitCode::FAILURE;
            };
            match n.parse::<NonZero<u64>>() {
                Ok(n) => part(n.get()),
                Err(e) => {
                    eprintln!("count: {n:?} is not how often: {e}; a number, please: count {name} 1000");
                    return ExitCode::FAILURE;
                }
            }
        }
        // As `cargo bench` and `cargo test --benches` call it, among the benches that measure time: here is none to measure.
        _ => println!("count PART N, count --list: instructions are counted by `make bench-count`"),
    }
    ExitCode::SUCCESS
}
