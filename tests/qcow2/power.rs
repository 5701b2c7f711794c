//! Power failures: the states that one can leave behind, by the log of simulated files, and what a guest may then see.
//!
//! ```text
//!   SimFile logs ──► crash points ──► states (subsets, pieces, sizes) ──► judge: metadata, guest data, snapshots
//!   guest's marks ────────────────────────────────────────────────────────►
//! ```
//! At a crash point t a change is on the disk for sure if it was completed before the issue of a flush that had completed by
//! t (or if it is FUA and completed). All other changes issued by t may be there, each by itself, in pieces of 4 KiB or
//! 512 bytes. Where changes overlap, the one that took effect later wins.

use crate::image::{self, Check, Layout, Reader};
use conbd::block::{SimChange, SimFile, SimOp};
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

pub(crate) const SECTOR: usize = 512;

static ZERO: [u8; SECTOR] = [0; SECTOR];

/// A generator of numbers (SplitMix64): the same seed, the same numbers.
#[derive(Debug, Clone)]
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// The seed of a run: `CONBD_SEED`, or what the test gives.
pub(crate) fn seed(default: u64) -> u64 {
    match std::env::var("CONBD_SEED") {
        Ok(s) => s.parse().expect("CONBD_SEED is a number"),
        Err(_) => default,
    }
}

// --------------------------------------------------------------------------------------------- the guest

/// What a guest request leaves in a sector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GuestKind {
    /// [`fill`] of the request's index.
    Write,
    Zero,
    /// Zeroes, or whatever could be there before.
    Discard,
}

/// A request of the guest, in ticks of the files' clock.
#[derive(Debug, Clone)]
pub(crate) struct GuestOp {
    pub(crate) kind: GuestKind,
    pub(crate) first: usize,
    pub(crate) count: usize,
    pub(crate) fua: bool,
    pub(crate) issued: u64,
    /// When it was answered with success; a failed one stays `None`: it may or may not have happened.
    pub(crate) acked: Option<u64>,
}

/// All that the guest did, in order of issue.
#[derive(Debug, Clone, Default)]
pub(crate) struct History {
    pub(crate) sectors: usize,
    pub(crate) ops: Vec<GuestOp>,
    /// Flushes: issued, and answered with success.
    pub(crate) flushes: Vec<(u64, u64)>,
}

/// The bytes that write `op` puts into a sector: every word differs by both.
pub(crate) fn fill(op: usize, sector: usize, out: &mut [u8]) {
    let mut x = (op as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ (sector as u64).wrapping_mul(0xc2b2_ae3d_27d4_eb4f);
    x |= 1;
    for (i, w) in out.chunks_exact_mut(8).enumerate() {
        let v = match i {
            0 => 0x6f70_0000_0000_0000 | op as u64,
            1 => 0x7365_0000_0000_0000 | sector as u64,
            _ => x,
        };
        w.copy_from_slice(&v.to_be_bytes());
        x = x.wrapping_mul(0x2545_f491_4f6c_dd1d);
    }
}

/// What a sector may hold: bit set over "initial", "zero" and requests.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Allowed {
    pub(crate) initial: bool,
    pub(crate) zero: bool,
    pub(crate) writes: Vec<u32>,
}

impl History {
    /// Requests by sector.
    fn by_sector(&self) -> Vec<Vec<u32>> {
        let mut all = vec![Vec::new(); self.sectors];
        for (i, op) in self.ops.iter().enumerate() {
            for s in &mut all[op.first..op.first + op.count] {
                s.push(i as u32);
            }
        }
        all
    }

    /// What one sector may hold when the requests for which `sure` is true have certainly happened and those for which
    /// `maybe` is true may have.
    fn allowed_one(
        &self,
        ops: &[u32],
        sure: impl Fn(&GuestOp) -> bool,
        maybe: impl Fn(&GuestOp) -> bool,
    ) -> Allowed {
        // A value is out when a request that certainly happened came wholly after it; discards put nothing out.
        let mut newest_start = 0;
        for &i in ops {
            let op = &self.ops[i as usize];
            if op.kind != GuestKind::Discard && sure(op) {
                newest_start = newest_start.max(op.issued);
            }
        }
        let mut a = Allowed { initial: newest_start == 0, ..Allowed::default() };
        for &i in ops {
            let op = &self.ops[i as usize];
            if !maybe(op) || op.acked.is_some_and(|t| t < newest_start) {
                continue;
            }
            match op.kind {
                GuestKind::Write => a.writes.push(i),
                GuestKind::Zero | GuestKind::Discard => a.zero = true,
            }
        }
        a
    }

    /// What each sector may hold after a power failure at `t`.
    fn allowed_at(&self, by_sector: &[Vec<u32>], t: u64) -> Vec<Allowed> {
        let flushed = self.flushes.iter().filter(|f| f.1 <= t).map(|f| f.0).max().unwrap_or(0);
        let sure = |op: &GuestOp| op.acked.is_some_and(|a| a < flushed || (op.fua && a <= t));
        let maybe = |op: &GuestOp| op.issued <= t;
        by_sector.iter().map(|ops| self.allowed_one(ops, sure, maybe)).collect()
    }

    /// Judges what a read returned that was issued and answered at these times, while all of this went on. `torn`: below
    /// is a file of the host, where a read during a write may see a part of it.
    pub(crate) fn judge_read(
        &self,
        first: usize,
        data: &[u8],
        issued: u64,
        answered: u64,
        initial: &[u8],
        torn: bool,
    ) -> Result<(), String> {
        for (k, bytes) in data.chunks(SECTOR).enumerate() {
            let sector = first + k;
            let ops: Vec<u32> = (0..self.ops.len() as u32)
                .filter(|&i| {
                    let op = &self.ops[i as usize];
                    (op.first..op.first + op.count).contains(&sector)
                })
                .collect();
            let allowed =
                self.allowed_one(&ops, |op| op.acked.is_some_and(|a| a < issued), |op| op.issued < answered);
            let before = &initial[sector * SECTOR..][..bytes.len()];
            if let Err(e) = judge_sector(&allowed, sector, bytes, before)
                && !(torn && is_mix(&allowed, sector, bytes, before))
            {
                return Err(format!("read at {issued}..{answered}: {e}"));
            }
        }
        Ok(())
    }
}

impl History {
    /// Judges a disk as it was found after the end: what was flushed is there, and nothing that nobody wrote.
    pub(crate) fn judge_after(&self, disk: &[u8], initial: &[u8]) -> Result<(), String> {
        let allowed = self.allowed_at(&self.by_sector(), u64::MAX);
        for (s, bytes) in disk.chunks(SECTOR).enumerate() {
            judge_sector(&allowed[s], s, bytes, &initial[s * SECTOR..][..bytes.len()])?;
        }
        Ok(())
    }
}

/// Whether each byte is one that the sector may hold.
fn is_mix(allowed: &Allowed, sector: usize, bytes: &[u8], initial: &[u8]) -> bool {
    let mut may: Vec<Vec<u8>> = Vec::new();
    if allowed.initial {
        may.push(initial.to_vec());
    }
    if allowed.zero {
        may.push(ZERO.to_vec());
    }
    for &op in &allowed.writes {
        let mut want = ZERO.to_vec();
        fill(op as usize, sector, &mut want);
        may.push(want);
    }
    bytes.iter().enumerate().all(|(i, b)| may.iter().any(|m| m[i] == *b))
}

fn judge_sector(allowed: &Allowed, sector: usize, bytes: &[u8], initial: &[u8]) -> Result<(), String> {
    let zero = bytes == &ZERO[..bytes.len()];
    if (zero && allowed.zero) || (allowed.initial && bytes == initial) {
        return Ok(());
    }
    let mut want = [0; SECTOR];
    for &op in &allowed.writes {
        if image::be64(bytes, 0) == 0x6f70_0000_0000_0000 | u64::from(op) {
            fill(op as usize, sector, &mut want);
            if bytes == &want[..bytes.len()] {
                return Ok(());
            }
        }
    }
    let (w0, w1) = (image::be64(bytes, 0), image::be64(bytes, 8));
    let found = match (w0 >> 48, w1 >> 48) {
        (0x6f70, 0x7365) => format!("write {} of sector {}", w0 & 0xffff_ffff, w1 & 0xffff_ffff),
        _ if zero => "zeroes".to_owned(),
        _ if bytes == initial => "what was there at first".to_owned(),
        _ => format!("foreign bytes {w0:#x} {w1:#x}"),
    };
    Err(format!("guest sector {sector} holds {found}, allowed are {allowed:?}"))
}

// --------------------------------------------------------------------------------------------- the disk

/// One simulated file's log and base.
pub(crate) struct Recording {
    pub(crate) base: Arc<[u8]>,
    pub(crate) log: Vec<SimOp>,
}

impl Recording {
    pub(crate) fn of(file: &SimFile) -> Recording {
        Recording { base: file.base(), log: file.log() }
    }
}

/// What changes have overwritten: where, what, and the hash before.
type Undo = Vec<(usize, Vec<u8>, u64)>;

/// A file's bytes with a hash that follows them.
#[derive(Clone)]
struct Disk {
    /// As large as the file ever was; bytes past `len` are zero.
    bytes: Vec<u8>,
    len: usize,
    hash: u64,
}

fn sector_hash(at: usize, bytes: &[u8]) -> u64 {
    if bytes == ZERO {
        return 0;
    }
    let mut h = 0u64;
    for w in bytes.as_chunks::<8>().0 {
        h = (h.rotate_left(5) ^ u64::from_ne_bytes(*w)).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
    // Zeroes are nothing, wherever they are.
    if h == 0 {
        0
    } else {
        (h ^ (at as u64).wrapping_mul(0xc2b2_ae3d_27d4_eb4f)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
}

impl Disk {
    fn new(base: &[u8], capacity: usize) -> Disk {
        let mut bytes = base.to_vec();
        bytes.resize(capacity.max(base.len()).next_multiple_of(SECTOR), 0);
        let hash = bytes
            .chunks(SECTOR)
            .enumerate()
            .fold(0u64, |h, (i, s)| h.wrapping_add(sector_hash(i * SECTOR, s)));
        Disk { bytes, len: base.len(), hash }
    }

    fn key(&self) -> u64 {
        self.hash ^ (self.len as u64).wrapping_mul(0xff51_afd7_ed55_8ccd)
    }

    /// Puts bytes (or zeroes), keeping the hash; what was there goes to `undo`.
    fn put(&mut self, at: usize, data: Option<&[u8]>, len: usize, undo: Option<&mut Undo>) {
        if len == 0 {
            return;
        }
        let first = at / SECTOR * SECTOR;
        let last = (at + len).next_multiple_of(SECTOR);
        let hash_of = |bytes: &[u8]| {
            let sectors = bytes.chunks(SECTOR).enumerate();
            sectors.fold(0u64, |h, (i, s)| h.wrapping_add(sector_hash(first + i * SECTOR, s)))
        };
        let before = hash_of(&self.bytes[first..last]);
        if let Some(undo) = undo {
            undo.push((at, self.bytes[at..at + len].to_vec(), self.hash));
        }
        match data {
            Some(d) => self.bytes[at..at + len].copy_from_slice(d),
            None => self.bytes[at..at + len].fill(0),
        }
        let after = hash_of(&self.bytes[first..last]);
        self.hash = self.hash.wrapping_sub(before).wrapping_add(after);
    }

    /// Takes everything back.
    fn undo(&mut self, undo: &mut Undo) {
        while let Some((at, old, hash)) = undo.pop() {
            self.bytes[at..at + old.len()].copy_from_slice(&old);
            self.hash = hash;
        }
    }

    fn view(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// Byte range of a change; `None` for flushes and truncates.
fn range(c: &SimChange) -> Option<(usize, usize)> {
    match c {
        SimChange::Write { offset, data } => Some((*offset as usize, data.len())),
        SimChange::Zero { offset, len } | SimChange::Discard { offset, len } => {
            Some((*offset as usize, *len as usize))
        }
        SimChange::Truncate { .. } | SimChange::Flush => None,
    }
}

/// What a change makes of the file's size.
fn size_after(c: &SimChange, len: usize) -> usize {
    match c {
        SimChange::Write { .. } | SimChange::Zero { .. } => {
            let (at, n) = range(c).expect("both have a range");
            len.max(at + n)
        }
        SimChange::Truncate { len: n, shrinks: true } => *n as usize,
        SimChange::Truncate { len: n, shrinks: false } => len.max(*n as usize),
        SimChange::Discard { .. } | SimChange::Flush => len,
    }
}

/// How much of an optional change is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    All,
    /// Pieces of this size for whose number a hash of this seed is even.
    Torn(usize, u64),
}

/// Which size an appended file has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Size {
    /// As the changes that are there make it.
    Implied,
    /// As only the sure changes make it: what was appended is lost.
    Sure,
    /// As all changes issued make it.
    Full,
}

/// How hard to look.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Effort {
    /// Random subsets, and torn variants, per crash point.
    pub(crate) random: usize,
    /// Most "all but one" and "only one" states each per crash point.
    pub(crate) singles: usize,
    /// Crash points are taken every so often (1: all).
    pub(crate) stride: usize,
}

/// What came of it.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    /// Different states judged.
    pub(crate) states: usize,
    /// States with leaked clusters, which are allowed.
    pub(crate) leaking: usize,
    pub(crate) failures: Vec<String>,
    /// The images of the first failure.
    pub(crate) evidence: Option<Vec<Vec<u8>>>,
    /// States in which a bitmap was marked in use, and in which one that had to show changes was believed.
    pub(crate) bitmaps_in_use: usize,
    pub(crate) bitmaps_believed: usize,
}

/// Says what is wrong with the files' bytes; the second argument is the number of the state.
pub(crate) type Extra<'a> = dyn FnMut(&[&[u8]], usize) -> Result<(), String> + 'a;

/// A run to be judged: `files[0]` is the image, `files[1]` its data file if there is one.
pub(crate) struct Crash<'a> {
    pub(crate) files: &'a [Recording],
    pub(crate) history: &'a History,
    /// The guest's disk at the beginning.
    pub(crate) initial: &'a [u8],
    /// What unallocated clusters read as.
    pub(crate) backing: &'a [u8],
    /// Content of each snapshot, by name: must stay as it is.
    pub(crate) snapshots: &'a BTreeMap<String, Vec<u8>>,
    /// Bits of each persistent bitmap at the beginning, by name.
    pub(crate) bitmaps: &'a BTreeMap<String, Vec<bool>>,
    /// The image was damaged before: what is left of that is not judged here, the content is.
    pub(crate) damaged: bool,
}

/// `in_use` of a bitmap: it is not believed.
pub(crate) const BITMAP_IN_USE: u32 = 1;
/// `auto`: it records all changes.
pub(crate) const BITMAP_AUTO: u32 = 2;

/// Stops telling failures after so many.
const FAILURES: usize = 5;

struct Judge<'a, 'b> {
    crash: &'a Crash<'a>,
    reader: Reader,
    allowed: Vec<Allowed>,
    epoch: u64,
    disk: Vec<u8>,
    /// What was found good last in each sector, and the epoch of that.
    good: Vec<u8>,
    good_in: Vec<u64>,
    seen_states: HashSet<(u64, u64)>,
    verdict: Verdict,
    extra: &'b mut Extra<'a>,
}

impl Judge<'_, '_> {
    /// Whether the state is new; judges it then.
    fn judge(&mut self, disks: &[Disk], what: impl Fn() -> String) {
        let key = disks.iter().fold(0u64, |k, d| k.rotate_left(17) ^ d.key());
        if self.verdict.failures.len() >= FAILURES || !self.seen_states.insert((key, self.epoch)) {
            return;
        }
        let n = self.verdict.states;
        self.verdict.states += 1;
        let views: Vec<&[u8]> = disks.iter().map(Disk::view).collect();
        let result = self.look(&views).and_then(|()| (self.extra)(&views, n));
        if let Err(e) = result {
            self.verdict.failures.push(format!("state {n} ({}): {e}", what()));
            if self.verdict.evidence.is_none() {
                self.verdict.evidence = Some(views.iter().map(|v| v.to_vec()).collect());
            }
        }
    }

    fn look(&mut self, views: &[&[u8]]) -> Result<(), String> {
        let image = views[0];
        let Check { corruptions, leaks, .. } = image::check(image);
        if !corruptions.is_empty() && !self.crash.damaged {
            return Err(format!("metadata: {}", corruptions.join("; ")));
        }
        self.verdict.leaking += usize::from(leaks > 0);
        let l = Layout::parse(image)?;
        self.reader.read(&l, image, views.get(1).copied(), (l.l1_offset, l.l1_size), &mut self.disk)?;
        for (s, bytes) in self.disk.chunks(SECTOR).enumerate() {
            let place = s * SECTOR..s * SECTOR + bytes.len();
            if self.good_in[s] == self.epoch && self.good[place.clone()] == *bytes {
                continue;
            }
            judge_sector(&self.allowed[s], s, bytes, &self.crash.initial[place.clone()])?;
            self.good[place].copy_from_slice(bytes);
            self.good_in[s] = self.epoch;
        }
        for s in &l.snapshots {
            let Some(want) = self.crash.snapshots.get(&s.name) else {
                return Err(format!("snapshot {:?} is not known", s.name));
            };
            let mut got = vec![0; want.len()];
            self.reader.read(&l, image, views.get(1).copied(), (s.l1_offset, s.l1_size), &mut got)?;
            if got != *want {
                return Err(format!("snapshot {:?} has changed", s.name));
            }
        }
        if l.snapshots.len() != self.crash.snapshots.len() {
            return Err(format!("{} snapshots are left", l.snapshots.len()));
        }
        self.look_at_bitmaps(&l, image)
    }

    /// A bitmap that may be believed has a bit for everything that is, or certainly was, written over.
    fn look_at_bitmaps(&mut self, l: &Layout, image: &[u8]) -> Result<(), String> {
        if self.crash.bitmaps.is_empty() {
            return Ok(());
        }
        let there = l.bitmaps.as_ref().map_or(&[][..], |b| &b.2);
        if there.len() != self.crash.bitmaps.len() {
            return Err(format!("{} bitmaps are left", there.len()));
        }
        // Without the feature nobody believes any of them.
        if l.autoclear & 1 == 0 {
            return Ok(());
        }
        for b in there {
            let Some(before) = self.crash.bitmaps.get(&b.name) else {
                return Err(format!("bitmap {:?} is not known", b.name));
            };
            if b.flags & BITMAP_IN_USE != 0 {
                self.verdict.bitmaps_in_use += 1;
                continue;
            }
            let bits = l.bits(image, b)?;
            if b.flags & BITMAP_AUTO == 0 {
                if bits != *before {
                    return Err(format!("the disabled bitmap {:?} has changed", b.name));
                }
                continue;
            }
            if let Some(i) = before.iter().zip(&bits).position(|(old, new)| *old && !new) {
                return Err(format!("bitmap {:?} has lost bit {i}", b.name));
            }
            for (s, bytes) in self.disk.chunks(SECTOR).enumerate() {
                let same =
                    self.allowed[s].initial && self.crash.initial[s * SECTOR..][..bytes.len()] == *bytes;
                if !same && !bits[(s * SECTOR) >> b.granularity_bits] {
                    return Err(format!("bitmap {:?} is believed and misses a write to sector {s}", b.name));
                }
            }
            self.verdict.bitmaps_believed += usize::from(bits != *before);
        }
        Ok(())
    }
}

/// Judges the states that a power failure can leave, of a run that has ended. `extra` looks at each state too.
pub(crate) fn enumerate(crash: &Crash<'_>, effort: Effort, seed: u64, extra: &mut Extra<'_>) -> Verdict {
    let by_sector = crash.history.by_sector();
    // Changes of all files in the order of their effect; what never took effect comes last.
    let mut ops: Vec<(usize, &SimOp)> =
        crash.files.iter().enumerate().flat_map(|(f, r)| r.log.iter().map(move |op| (f, op))).collect();
    ops.sort_by_key(|(_, op)| (op.applied.unwrap_or(u64::MAX), op.issued));
    let capacity = |f: usize| {
        let r = &crash.files[f];
        r.log.iter().fold(r.base.len(), |len, op| size_after(&op.change, len).max(len))
    };
    let base: Vec<Disk> =
        (0..crash.files.len()).map(|f| Disk::new(&crash.files[f].base, capacity(f))).collect();
    // Crash points: whenever something was issued, completed or answered.
    let mut points: Vec<u64> = ops
        .iter()
        .flat_map(|(_, op)| [Some(op.issued), op.completed])
        .flatten()
        .chain(crash.history.ops.iter().filter_map(|op| op.acked))
        .chain(crash.history.flushes.iter().map(|f| f.1))
        .collect();
    points.sort_unstable();
    points.dedup();
    let mut rng = Rng(seed);
    let mut judge = Judge {
        crash,
        reader: Reader::new(crash.backing.to_vec()),
        allowed: Vec::new(),
        epoch: 0,
        disk: vec![0; crash.initial.len()],
        good: vec![0; crash.initial.len()],
        good_in: vec![0; crash.history.sectors],
        seen_states: HashSet::new(),
        verdict: Verdict::default(),
        extra,
    };
    let offset = rng.below(effort.stride as u64) as usize;
    for (n, &t) in points.iter().enumerate() {
        // The end is always looked at.
        if n % effort.stride != offset && n + 1 != points.len() {
            continue;
        }
        let allowed = crash.history.allowed_at(&by_sector, t);
        if allowed != judge.allowed {
            judge.allowed = allowed;
            judge.epoch += 1;
        }
        // What each file has for sure by t.
        let flushed: Vec<u64> = (0..crash.files.len())
            .map(|f| {
                let done = |op: &&(usize, &SimOp)| {
                    op.0 == f && op.1.change == SimChange::Flush && op.1.completed.is_some_and(|c| c <= t)
                };
                ops.iter().filter(done).map(|op| op.1.issued).max().unwrap_or(0)
            })
            .collect();
        let mut disks = base.clone();
        let mut optional: Vec<(usize, &SimOp)> = Vec::new();
        // Per file: sure ranges in order of effect, to keep optional changes that came before them from undoing them.
        let mut sure: Vec<Vec<(u64, usize, usize)>> = vec![Vec::new(); crash.files.len()];
        for &(f, op) in &ops {
            if op.issued > t || op.change == SimChange::Flush {
                continue;
            }
            if op.completed.is_some_and(|c| c < flushed[f] || (op.fua && c <= t)) {
                let d = &mut disks[f];
                apply_part(d, &op.change, Part::All, &[], None);
                d.len = size_after(&op.change, d.len);
                if let Some((at, len)) = range(&op.change) {
                    sure[f].push((op.applied.unwrap_or(u64::MAX), at, len));
                }
            } else {
                optional.push((f, op));
            }
        }
        let mut try_state = |name: &str, which: &dyn Fn(usize) -> Option<Part>, size: Size| {
            let lens: Vec<usize> = disks.iter().map(|d| d.len).collect();
            let mut undo: Vec<Undo> = vec![Vec::new(); disks.len()];
            for (i, &(f, op)) in optional.iter().enumerate() {
                if size == Size::Full {
                    disks[f].len = size_after(&op.change, disks[f].len);
                }
                let Some(part) = which(i) else { continue };
                let when = op.applied.unwrap_or(u64::MAX);
                let over: Vec<(usize, usize)> =
                    sure[f].iter().filter(|s| s.0 > when).map(|s| (s.1, s.2)).collect();
                apply_part(&mut disks[f], &op.change, part, &over, Some(&mut undo[f]));
                if size != Size::Full {
                    disks[f].len = size_after(&op.change, disks[f].len);
                }
            }
            if size == Size::Sure {
                for (d, &len) in disks.iter_mut().zip(&lens) {
                    d.len = len;
                }
            }
            judge.judge(&disks, || {
                format!("crash at {t}: {name}, size {size:?}, {} optional", optional.len())
            });
            for (f, d) in disks.iter_mut().enumerate() {
                d.undo(&mut undo[f]);
                d.len = lens[f];
            }
        };
        let k = optional.len();
        try_state("none", &|_| None, Size::Implied);
        try_state("none", &|_| None, Size::Full);
        try_state("all", &|_| Some(Part::All), Size::Implied);
        try_state("all", &|_| Some(Part::All), Size::Sure);
        let singles: Vec<usize> = if k <= effort.singles {
            (0..k).collect()
        } else {
            (0..effort.singles).map(|_| rng.below(k as u64) as usize).collect()
        };
        for &j in &singles {
            try_state(&format!("all but {j}"), &|i| (i != j).then_some(Part::All), Size::Implied);
            try_state(&format!("only {j}"), &|i| (i == j).then_some(Part::All), Size::Implied);
            try_state(&format!("only {j}"), &|i| (i == j).then_some(Part::All), Size::Full);
            try_state(&format!("first {j}"), &|i| (i < j).then_some(Part::All), Size::Implied);
            let salt = rng.next();
            for piece in [4096, SECTOR] {
                let torn = Part::Torn(piece, salt);
                try_state(
                    &format!("{j} torn by {piece}"),
                    &|i| Some(if i == j { torn } else { Part::All }),
                    Size::Implied,
                );
                try_state(&format!("only {j}, torn by {piece}"), &|i| (i == j).then_some(torn), Size::Full);
            }
        }
        for _ in 0..effort.random {
            let (salt, density) = (rng.next(), rng.below(7) + 1);
            let size = [Size::Implied, Size::Implied, Size::Sure, Size::Full][rng.below(4) as usize];
            let chosen = |i: usize| Rng(salt ^ i as u64).next() % 8 < density;
            try_state("random", &|i| chosen(i).then_some(Part::All), size);
            let torn = |i: usize| {
                let piece = if i.is_multiple_of(2) { 4096 } else { SECTOR };
                Some(Part::Torn(piece, salt ^ (i as u64) << 20))
            };
            try_state("random pieces", &torn, size);
        }
    }
    judge.verdict
}

/// Applies a change, or pieces of it, except where `over` has newer bytes.
fn apply_part(d: &mut Disk, c: &SimChange, part: Part, over: &[(usize, usize)], mut undo: Option<&mut Undo>) {
    if let SimChange::Truncate { len, shrinks: true } = c {
        let len = *len as usize;
        let end = d.bytes.len();
        if len < end {
            d.put(len, None, end - len, undo);
        }
        return;
    }
    let Some((at, len)) = range(c) else { return };
    let data = match c {
        SimChange::Write { data, .. } => Some(data.as_ref()),
        _ => None,
    };
    // A discard past the end of the file does nothing.
    let len = len.min(d.bytes.len().saturating_sub(at));
    let touched = over.iter().any(|&(o, n)| o < at + len && at < o + n);
    let (step, salt) = match part {
        Part::All if !touched => {
            d.put(at, data, len, undo);
            return;
        }
        Part::All => (SECTOR, None),
        Part::Torn(step, salt) => (step, Some(salt)),
    };
    // By pieces of the file, each cut to the change.
    let mut from = at;
    while from < at + len {
        let piece = from / step;
        let to = ((piece + 1) * step).min(at + len);
        let there = salt.is_none_or(|s| Rng(s ^ piece as u64).next() & 1 == 0);
        let newer = over.iter().any(|&(o, n)| o < to && from < o + n);
        if there && !newer {
            d.put(from, data.map(|b| &b[from - at..to - at]), to - from, undo.as_deref_mut());
        }
        from = to;
    }
}
