//! SimFile: a file in memory with a volatile cache, a log and a scheduler, for tests of durability and of races.
//!
//! ```text
//!   issued ──(parked)── applied ──(parked)── completed          every arrow is a tick of the shared clock
//!                          │
//!                 reads see it from here on; the disk has it for sure only when a flush that was ISSUED
//!                 after the completion has COMPLETED
//! ```
//! While requests are held ([`SimFile::set_held`]) each one waits, before its effect and again after it, until the test
//! lets it go on ([`SimFile::release`]). A test that runs one context on its own thread and draws the next release from a
//! seed gets the same schedule from the same seed.
//!
//! The log ([`SimFile::log`]) has every change with its three ticks. From it the states that a power failure can leave
//! behind are computed: changes that a flush covers are there, the others may be, each by itself and in pieces.
//! Several files can share a clock, so that the order between them is known; [`SimClock::tick`] marks the test's own
//! events (a guest's write was issued, was answered) on the same scale.
//!
//! Any thread; the state is behind one short lock, because speed is not the point here.

use super::wait::lock;
use super::{BlockNode, Error, Extent, Limits, Result, StatusFlags, WriteFlags, iov};
use crate::co::CoQueue;
use std::io::{IoSlice, IoSliceMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Largest file (ours): a driver that seeks far away by mistake fails instead of eating the memory.
const MAX_LEN: u64 = 1 << 30;

/// The order of events, shared by files and tests.
#[derive(Debug, Clone, Default)]
pub struct SimClock(Arc<AtomicU64>);

impl SimClock {
    /// The time of an event, different from all others; starts at 1.
    pub fn tick(&self) -> u64 {
        self.0.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// The time of the latest event.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

/// What a request does to the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SimChange {
    /// Bytes at an offset.
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Arc<[u8]>,
    },
    /// Zeroes.
    Zero {
        /// Where.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// A range given up; it reads as zeroes afterwards.
    Discard {
        /// Where.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// A new size.
    Truncate {
        /// Bytes.
        len: u64,
        /// Whether it was smaller than the file when asked for; else it never cuts off what was written meanwhile.
        shrinks: bool,
    },
    /// A flush: no change, but what it says about the others.
    Flush,
}

/// One entry of the log; times are ticks of the clock.
#[derive(Debug, Clone)]
pub struct SimOp {
    /// What it does.
    pub change: SimChange,
    /// Whether it is durable by itself once completed.
    pub fua: bool,
    /// When it was asked for.
    pub issued: u64,
    /// When reads began to see it; overlapping changes take effect in this order.
    pub applied: Option<u64>,
    /// When the caller was told.
    pub completed: Option<u64>,
}

/// A request that waits to be released.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimParked {
    /// Names it; in order of arrival.
    pub id: u64,
    /// `b'r'`, `b'w'`, `b'z'`, `b'd'`, `b't'`, `b'f'`: read, write, zero, discard, truncate, flush.
    pub kind: u8,
    /// Its offset (new size for a truncate, 0 for a flush).
    pub offset: u64,
    /// Its length.
    pub len: u64,
    /// Whether its effect is there, and only its completion is missing.
    pub applied: bool,
}

struct Waiting {
    what: SimParked,
    go: bool,
    queue: Arc<CoQueue>,
}

struct State {
    /// As reads see it.
    now: Vec<u8>,
    log: Vec<SimOp>,
    held: bool,
    waiting: Vec<Waiting>,
    next_id: u64,
    reads: u64,
}

/// See the module's text.
pub struct SimFile {
    name: String,
    clock: SimClock,
    base: Arc<[u8]>,
    state: Mutex<State>,
}

impl SimFile {
    /// A file with durable content and an empty log. Requests are not held.
    #[must_use]
    pub fn new(name: &str, content: Vec<u8>, clock: &SimClock) -> Arc<SimFile> {
        let base = Arc::from(content.as_slice());
        let state =
            State { now: content, log: Vec::new(), held: false, waiting: Vec::new(), next_id: 0, reads: 0 };
        Arc::new(SimFile { name: name.to_owned(), clock: clock.clone(), base, state: Mutex::new(state) })
    }

    /// Whether later requests wait for [`SimFile::release`]; `false` also lets go of all that wait.
    pub fn set_held(&self, held: bool) {
        let ids: Vec<u64> = {
            let mut s = lock(&self.state);
            s.held = held;
            if held { Vec::new() } else { s.waiting.iter().map(|w| w.what.id).collect() }
        };
        for id in ids {
            self.release(id);
        }
    }

    /// The requests that wait, in order of arrival.
    #[must_use]
    pub fn parked(&self) -> Vec<SimParked> {
        lock(&self.state).waiting.iter().filter(|w| !w.go).map(|w| w.what).collect()
    }

    /// Lets a request go one step on; `false` when it does not wait. On the home thread of its context, in plain code,
    /// it runs at once.
    pub fn release(&self, id: u64) -> bool {
        let queue = {
            let mut s = lock(&self.state);
            let Some(w) = s.waiting.iter_mut().find(|w| w.what.id == id && !w.go) else { return false };
            w.go = true;
            Arc::clone(&w.queue)
        };
        queue.next();
        true
    }

    /// The content at the beginning, which is durable.
    #[must_use]
    pub fn base(&self) -> Arc<[u8]> {
        Arc::clone(&self.base)
    }

    /// The content as reads see it now.
    #[must_use]
    pub fn content(&self) -> Vec<u8> {
        lock(&self.state).now.clone()
    }

    /// All changes so far.
    #[must_use]
    pub fn log(&self) -> Vec<SimOp> {
        lock(&self.state).log.clone()
    }

    /// How many reads there were.
    #[must_use]
    pub fn reads(&self) -> u64 {
        lock(&self.state).reads
    }

    /// The clock.
    #[must_use]
    pub fn clock(&self) -> &SimClock {
        &self.clock
    }

    /// Waits for a release, if requests are held.
    fn co_park(&self, kind: u8, offset: u64, len: u64, applied: bool) {
        let mut s = lock(&self.state);
        if !s.held {
            return;
        }
        s.next_id += 1;
        let id = s.next_id;
        let queue = Arc::new(CoQueue::new());
        let what = SimParked { id, kind, offset, len, applied };
        s.waiting.push(Waiting { what, go: false, queue: Arc::clone(&queue) });
        loop {
            let at =
                s.waiting.iter().position(|w| w.what.id == id).expect("a waiting request removes itself");
            if s.waiting[at].go {
                s.waiting.remove(at);
                return;
            }
            s = queue.co_wait_with((&self.state, s)).1;
        }
    }

    /// A change from issue to completion.
    fn co_change(&self, op: &'static str, kind: u8, change: SimChange, fua: bool) -> Result<()> {
        let (offset, len) = span(&change);
        if offset.checked_add(len).is_none_or(|end| end > MAX_LEN) {
            return Err(Error::from_errno(op, &self.name, offset, libc::EFBIG));
        }
        let index = {
            let mut s = lock(&self.state);
            let issued = self.clock.tick();
            s.log.push(SimOp { change: change.clone(), fua, issued, applied: None, completed: None });
            s.log.len() - 1
        };
        self.co_park(kind, offset, len, false);
        {
            let mut s = lock(&self.state);
            apply(&mut s.now, &change);
            s.log[index].applied = Some(self.clock.tick());
        }
        self.co_park(kind, offset, len, true);
        lock(&self.state).log[index].completed = Some(self.clock.tick());
        Ok(())
    }
}

/// Offset and length of a change, for checks and for the eye.
fn span(change: &SimChange) -> (u64, u64) {
    match change {
        SimChange::Write { offset, data } => (*offset, data.len() as u64),
        SimChange::Zero { offset, len } | SimChange::Discard { offset, len } => (*offset, *len),
        SimChange::Truncate { len, .. } => (*len, 0),
        SimChange::Flush => (0, 0),
    }
}

fn apply(now: &mut Vec<u8>, change: &SimChange) {
    let grow = |now: &mut Vec<u8>, end: u64| {
        if now.len() < end as usize {
            now.resize(end as usize, 0);
        }
    };
    match change {
        SimChange::Write { offset, data } => {
            grow(now, offset + data.len() as u64);
            now[*offset as usize..][..data.len()].copy_from_slice(data);
        }
        SimChange::Zero { offset, len } => {
            grow(now, offset + len);
            now[*offset as usize..][..*len as usize].fill(0);
        }
        SimChange::Discard { offset, len } => {
            let end = (offset + len).min(now.len() as u64);
            if *offset < end {
                now[*offset as usize..end as usize].fill(0);
            }
        }
        SimChange::Truncate { len, shrinks: true } => now.resize(*len as usize, 0),
        SimChange::Truncate { len, shrinks: false } => grow(now, *len),
        SimChange::Flush => {}
    }
}

impl BlockNode for SimFile {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> u64 {
        lock(&self.state).now.len() as u64
    }

    fn read_only(&self) -> bool {
        false
    }

    fn limits(&self) -> Limits {
        Limits { request_alignment: 1, preferred: 4096, fast_zero: true, rotational: false }
    }

    fn co_preadv(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        let len = iov::total_mut(bufs) as u64;
        self.co_park(b'r', offset, len, false);
        {
            let mut s = lock(&self.state);
            s.reads += 1;
            let have = (s.now.len() as u64).saturating_sub(offset).min(len) as usize;
            if have > 0 {
                iov::scatter(bufs, 0, &s.now[offset as usize..][..have]);
            }
            iov::zero_from(bufs, have);
        }
        self.co_park(b'r', offset, len, true);
        Ok(())
    }

    fn co_pwritev(&self, offset: u64, bufs: &[IoSlice<'_>], flags: WriteFlags) -> Result<()> {
        let mut data = vec![0; iov::total(bufs)];
        iov::gather(bufs, 0, &mut data);
        let change = SimChange::Write { offset, data: data.into() };
        self.co_change("pwritev", b'w', change, flags.contains(WriteFlags::FUA))
    }

    fn co_pwrite_zeroes(&self, offset: u64, len: u64, flags: WriteFlags) -> Result<()> {
        let change = SimChange::Zero { offset, len };
        self.co_change("write_zeroes", b'z', change, flags.contains(WriteFlags::FUA))
    }

    fn co_pdiscard(&self, offset: u64, len: u64) -> Result<()> {
        self.co_change("discard", b'd', SimChange::Discard { offset, len }, false)
    }

    fn grows(&self) -> bool {
        true
    }

    fn co_truncate(&self, len: u64) -> Result<()> {
        let shrinks = len < self.len();
        self.co_change("truncate", b't', SimChange::Truncate { len, shrinks }, false)
    }

    fn co_flush(&self) -> Result<()> {
        self.co_change("flush", b'f', SimChange::Flush, false)
    }

    fn co_block_status(&self, offset: u64, len: u64) -> Result<Extent> {
        let have = self.len();
        if offset >= have {
            return Ok(Extent { len, flags: StatusFlags::ZERO });
        }
        Ok(Extent { len: len.min(have - offset), flags: StatusFlags::DATA })
    }
}
