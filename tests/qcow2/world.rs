//! A world of its own: one context on the test's thread, a clock that the test moves, simulated files whose requests are
//! released in an order drawn from a seed, and guests in coroutines. The same seed gives the same run.

#![allow(dead_code, reason = "a tool box: each test takes what it needs")]

use crate::power::{GuestKind, GuestOp, History, Rng, SECTOR, fill};
use crate::support::HANG;
use conbd::aio::engine::EngineChoice;
use conbd::aio::{AioConfig, AioContext, Clock};
use conbd::block::{BlockNode, SimClock, SimFile, WriteFlags};
use conbd::co::{Coroutine, Outcome};
use std::io::{IoSlice, IoSliceMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

pub(crate) struct World {
    pub(crate) ctx: Arc<AioContext>,
    clock_ns: Arc<AtomicU64>,
    pub(crate) clock: SimClock,
    pub(crate) files: Vec<Arc<SimFile>>,
    pub(crate) rng: Rng,
}

impl World {
    pub(crate) fn new(seed: u64) -> World {
        let clock_ns = Arc::new(AtomicU64::new(1));
        let config = AioConfig {
            name: "world".to_owned(),
            engine: EngineChoice::Threads,
            pool_threads: 1,
            clock: Clock::Mock(Arc::clone(&clock_ns)),
            ..AioConfig::default()
        };
        World {
            ctx: AioContext::new(config).unwrap(),
            clock_ns,
            clock: SimClock::default(),
            files: Vec::new(),
            rng: Rng(seed),
        }
    }

    /// A simulated file of this world.
    pub(crate) fn file(&mut self, name: &str, content: Vec<u8>) -> Arc<SimFile> {
        let f = SimFile::new(name, content, &self.clock);
        self.files.push(Arc::clone(&f));
        f
    }

    /// Moves the timers' clock.
    pub(crate) fn advance_ms(&self, ms: u64) {
        self.clock_ns.fetch_add(ms * 1_000_000, Ordering::SeqCst);
    }

    /// Runs coroutines until all have ended; held requests go on in random order, once nothing else can run.
    ///
    /// # Panics
    /// When one panics, or nothing can ever go on.
    #[track_caller]
    pub(crate) fn run(&mut self, tasks: Vec<Box<dyn FnOnce() + Send>>) {
        let all: Vec<Coroutine> = tasks.into_iter().map(Coroutine::new).collect();
        for co in &all {
            co.schedule(&self.ctx);
        }
        self.run_until(|| all.iter().all(|co| co.outcome().is_some()), true);
        for co in &all {
            if let Some(Outcome::Panicked(text)) = co.outcome() {
                panic!("a coroutine panicked: {text}");
            }
        }
    }

    /// Polls until `done`; with `release`, held requests go on in random order.
    #[track_caller]
    pub(crate) fn run_until(&mut self, mut done: impl FnMut() -> bool, release: bool) {
        let mut idle_since = None;
        loop {
            while self.ctx.poll(false) {}
            if done() {
                return;
            }
            let parked: Vec<(usize, u64)> = if release {
                (0..self.files.len())
                    .flat_map(|f| self.files[f].parked().into_iter().map(move |p| (f, p.id)))
                    .collect()
            } else {
                Vec::new()
            };
            if parked.is_empty() {
                // Timers, or the thread pool.
                let since = *idle_since.get_or_insert_with(Instant::now);
                assert!(since.elapsed() < HANG, "nothing goes on: a request hangs");
                self.advance_ms(100);
                std::thread::yield_now();
                continue;
            }
            idle_since = None;
            let (f, id) = parked[self.rng.below(parked.len() as u64) as usize];
            self.files[f].release(id);
        }
    }

    /// Runs one coroutine to its end and returns its value.
    #[track_caller]
    pub(crate) fn co<T: Send + 'static>(&mut self, f: impl FnOnce() -> T + Send + 'static) -> T {
        let value = Arc::new(Mutex::new(None));
        let put = Arc::clone(&value);
        self.run(vec![Box::new(move || *put.lock().unwrap() = Some(f()))]);
        value.lock().unwrap().take().expect("the coroutine has ended")
    }

    pub(crate) fn hold(&self, held: bool) {
        for f in &self.files {
            f.set_held(held);
        }
    }
}

/// A request of a guest; sectors.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Step {
    Write { first: usize, count: usize, fua: bool },
    Zero { first: usize, count: usize, unmap: bool, fua: bool },
    Discard { first: usize, count: usize },
    Read { first: usize, count: usize },
    Flush,
}

/// A read and what came of it.
pub(crate) struct Seen {
    first: usize,
    data: Vec<u8>,
    issued: u64,
    answered: u64,
}

/// What guests did and saw.
#[derive(Default)]
pub(crate) struct Guest {
    pub(crate) history: History,
    pub(crate) reads: Vec<Seen>,
    /// Requests that failed.
    pub(crate) errors: Vec<String>,
}

impl Guest {
    pub(crate) fn new(bytes: usize) -> Arc<Mutex<Guest>> {
        let history = History { sectors: bytes.div_ceil(SECTOR), ..History::default() };
        Arc::new(Mutex::new(Guest { history, ..Guest::default() }))
    }

    /// Judges all reads; `torn` as in [`History::judge_read`].
    pub(crate) fn judge_reads(&self, initial: &[u8], torn: bool) -> Result<(), String> {
        for r in &self.reads {
            self.history.judge_read(r.first, &r.data, r.issued, r.answered, initial, torn)?;
        }
        Ok(())
    }
}

/// Bytes of sectors, cut at the end of a disk of odd size.
fn span(node: &dyn BlockNode, first: usize, count: usize) -> (u64, usize) {
    let offset = (first * SECTOR) as u64;
    (offset, ((count * SECTOR) as u64).min(node.len() - offset) as usize)
}

/// Does one request and writes it down. Coroutine only.
pub(crate) fn co_step(node: &dyn BlockNode, guest: &Mutex<Guest>, clock: &SimClock, step: Step) {
    let begin = |kind, first, count, fua| {
        let mut g = guest.lock().unwrap();
        let issued = clock.tick();
        g.history.ops.push(GuestOp { kind, first, count, fua, issued, acked: None });
        g.history.ops.len() - 1
    };
    let end = |op: usize, result: conbd::block::Result<()>| {
        let mut g = guest.lock().unwrap();
        match result {
            Ok(()) => g.history.ops[op].acked = Some(clock.tick()),
            Err(e) => g.errors.push(format!("{step:?}: {e}: {}", e.source)),
        }
    };
    let fua_flag = |fua| if fua { WriteFlags::FUA } else { WriteFlags::empty() };
    match step {
        Step::Write { first, count, fua } => {
            let op = begin(GuestKind::Write, first, count, fua);
            let (offset, len) = span(node, first, count);
            let mut data = vec![0; count * SECTOR];
            for (k, s) in data.chunks_mut(SECTOR).enumerate() {
                fill(op, first + k, s);
            }
            // As the server does: what needs no waiting is done at once.
            let at_once = if fua { None } else { node.try_pwrite(offset, &data[..len]) };
            let co = || node.co_pwritev(offset, &[IoSlice::new(&data[..len])], fua_flag(fua));
            end(op, at_once.unwrap_or_else(co));
        }
        Step::Zero { first, count, unmap, fua } => {
            let op = begin(GuestKind::Zero, first, count, fua);
            let (offset, len) = span(node, first, count);
            let flags = fua_flag(fua) | if unmap { WriteFlags::MAY_UNMAP } else { WriteFlags::empty() };
            end(op, node.co_pwrite_zeroes(offset, len as u64, flags));
        }
        Step::Discard { first, count } => {
            let op = begin(GuestKind::Discard, first, count, false);
            let (offset, len) = span(node, first, count);
            end(op, node.co_pdiscard(offset, len as u64));
        }
        Step::Read { first, count } => {
            let issued = clock.tick();
            let (offset, len) = span(node, first, count);
            let mut data = vec![0xee; len];
            let n = node.try_pread_some(offset, &mut data);
            let result = match n == len {
                true => Ok(()),
                false => node.co_preadv(offset + n as u64, &mut [IoSliceMut::new(&mut data[n..])]),
            };
            let answered = clock.tick();
            let mut g = guest.lock().unwrap();
            match result {
                Ok(()) => g.reads.push(Seen { first, data, issued, answered }),
                Err(e) => g.errors.push(format!("{step:?}: {e}: {}", e.source)),
            }
        }
        Step::Flush => {
            let issued = clock.tick();
            let result = node.co_flush();
            let mut g = guest.lock().unwrap();
            match result {
                Ok(()) => {
                    let acked = clock.tick();
                    g.history.flushes.push((issued, acked));
                }
                Err(e) => g.errors.push(format!("{step:?}: {e}: {}", e.source)),
            }
        }
    }
}

/// How guests behave: weights of the requests, and where they go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Habits {
    pub(crate) write: u64,
    pub(crate) zero: u64,
    pub(crate) discard: u64,
    pub(crate) read: u64,
    pub(crate) flush: u64,
    /// One in so many writes is FUA; 0: none.
    pub(crate) fua: u64,
    /// Sectors of the guest's clusters: ranges like their edges.
    pub(crate) cluster: usize,
    /// Most clusters of one request.
    pub(crate) clusters: usize,
}

pub(crate) const HABITS: Habits =
    Habits { write: 10, zero: 3, discard: 2, read: 4, flush: 3, fua: 8, cluster: 8, clusters: 3 };

/// Draws a script.
pub(crate) fn script(rng: &mut Rng, sectors: usize, steps: usize, h: Habits) -> Vec<Step> {
    // Most of it in a few places, so that requests meet.
    let hot: Vec<usize> =
        (0..3).map(|_| rng.below(sectors as u64) as usize / h.cluster * h.cluster).collect();
    let mut out = Vec::new();
    for _ in 0..steps {
        let whole = rng.one_in(3);
        let start = if rng.one_in(3) {
            rng.below(sectors as u64) as usize
        } else {
            hot[rng.below(3) as usize] + rng.below(2 * h.cluster as u64) as usize
        };
        let (first, count) = if whole {
            (start / h.cluster * h.cluster, h.cluster * (1 + rng.below(h.clusters as u64) as usize))
        } else {
            (start, 1 + rng.below((h.cluster * h.clusters) as u64) as usize)
        };
        let first = first.min(sectors - 1);
        let count = count.min(sectors - first);
        let fua = h.fua != 0 && rng.one_in(h.fua);
        let mut pick = rng.below(h.write + h.zero + h.discard + h.read + h.flush);
        let mut is = |weight: u64| {
            let hit = pick < weight;
            pick = pick.wrapping_sub(weight);
            hit
        };
        out.push(if is(h.write) {
            Step::Write { first, count, fua }
        } else if is(h.zero) {
            Step::Zero { first, count, unmap: rng.one_in(2), fua }
        } else if is(h.discard) {
            Step::Discard { first, count }
        } else if is(h.read) {
            Step::Read { first, count }
        } else {
            Step::Flush
        });
    }
    out
}

/// Guests with scripts of their own.
pub(crate) fn guests(
    w: &mut World,
    node: &Arc<dyn BlockNode>,
    guest: &Arc<Mutex<Guest>>,
    count: usize,
    steps: usize,
    habits: Habits,
) -> Vec<Box<dyn FnOnce() + Send>> {
    let sectors = guest.lock().unwrap().history.sectors;
    (0..count)
        .map(|_| {
            let steps = script(&mut w.rng, sectors, steps, habits);
            let (node, guest, clock) = (Arc::clone(node), Arc::clone(guest), w.clock.clone());
            Box::new(move || {
                for s in steps {
                    co_step(&*node, &guest, &clock, s);
                }
            }) as Box<dyn FnOnce() + Send>
        })
        .collect()
}
