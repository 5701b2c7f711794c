//! Replies on their way out: a [`Batch`] collects many and leaves in one `sendmsg`.
//!
//! ```text
//!   bufs    [ arena: hdr data hdr data … ] [ IoBuf of a large read ] [ arena … ]      export  … [ lent range ] …
//!   pieces    ───────────────────────────►   ───────────►              ──►                        ──────────►
//!             ranges, in sending order
//! ```
//!
//! Small replies are built in place in an arena: a cached read goes from the page cache to where `sendmsg` takes it.
//! Large reads keep their own buffer, or are ranges of the export that the sender has lent to it from the page cache, step by step. A
//! batch also holds the reservations of its requests, so that their bytes are given back when the client has taken them.

use super::budget::Reservation;
use super::proto::ReplyFlags;
use super::wire::ReplyTo;
use crate::util::buf::IoBuf;
use std::io::IoSlice;
use std::ops::Range;

/// Bytes of one arena (ours): twice [`FLUSH_AT`], so that the reply which passes the mark still fits.
const ARENA: usize = 64 << 10;

/// Batches leave when they hold this many bytes (ours): the client begins to work while the next is being built.
pub const FLUSH_AT: usize = 32 << 10;

/// Holes are looked for in grains of this many bytes, at multiples of it in the export (ours: a page).
pub const ZERO_GRAIN: usize = 4096;

/// The same in reads that are shorter than a page: the least that the document asks chunks to be cut at.
const SMALL_GRAIN: usize = 512;

/// A range of a buffer, or of the export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    from: Whence,
    start: usize,
    end: usize,
}

/// What a piece is a range of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whence {
    /// The buffer with this index.
    Buf(usize),
    /// The export, from this offset on.
    Export(u64),
}

/// What comes next in a batch.
#[derive(Debug)]
pub enum Next {
    /// That many slices were set.
    Slices(usize),
    /// A range of the export, not empty.
    Export(Range<u64>),
}

/// Replies that are ready to be sent, in order.
#[derive(Default)]
pub struct Batch {
    bufs: Vec<IoBuf>,
    pieces: Vec<Piece>,
    /// Index of the current arena, and how much of it is taken.
    arena: Option<(usize, usize)>,
    bytes: usize,
    held: Vec<Reservation>,
}

impl Batch {
    /// Makes an empty batch; takes no memory yet.
    #[must_use]
    pub fn new() -> Batch {
        Batch::default()
    }

    /// Bytes to send.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Tells whether there is nothing to send.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Finds room for `n` bytes in an arena and returns it; [`Batch::commit`] takes it, the next call of anything else
    /// forgets it. The contents are arbitrary. `n` is at most [`Batch::MAX_ROOM`].
    pub fn room(&mut self, n: usize) -> &mut [u8] {
        assert!(n <= Batch::MAX_ROOM, "larger replies have a buffer of their own");
        let (buf, fill) = match self.arena {
            Some((buf, fill)) if self.bufs[buf].len() - fill >= n => (buf, fill),
            _ => {
                self.bufs.push(IoBuf::new(ARENA));
                (self.bufs.len() - 1, 0)
            }
        };
        self.arena = Some((buf, fill));
        &mut self.bufs[buf][fill..fill + n]
    }

    /// Most bytes that [`Batch::room`] gives.
    pub const MAX_ROOM: usize = ARENA;

    /// Appends the first `n` bytes of the room to what is sent.
    pub fn commit(&mut self, n: usize) {
        let (buf, fill) = self.arena.expect("room() precedes commit()");
        assert!(fill + n <= self.bufs[buf].len(), "committed more than the room");
        self.arena = Some((buf, fill + n));
        self.piece(Whence::Buf(buf), fill..fill + n);
    }

    /// Appends part of the room to what is sent; the room stays where it is until [`Batch::close_room`].
    pub fn commit_part(&mut self, part: Range<usize>) {
        let (buf, fill) = self.arena.expect("room() precedes commit_part()");
        assert!(fill + part.end <= self.bufs[buf].len(), "committed more than the room");
        self.piece(Whence::Buf(buf), fill + part.start..fill + part.end);
    }

    /// Takes the first `n` bytes of the room out of use for later replies: parts of it are sent.
    pub fn close_room(&mut self, n: usize) {
        let (buf, fill) = self.arena.expect("room() precedes close_room()");
        assert!(fill + n <= self.bufs[buf].len(), "closed more than the room");
        self.arena = Some((buf, fill + n));
    }

    /// Takes the room, which holds [`ReplyTo::offset_data_len`] free bytes and then `len` bytes read from `offset`, as the content
    /// chunks of a structured read: runs of zero grains as holes, the rest as data. `flags` go on the last chunk.
    pub fn commit_sparse(&mut self, flags: ReplyFlags, to: ReplyTo, offset: u64, len: usize) {
        assert!(len > 0, "an empty read has no content");
        let (buf, fill) = self.arena.expect("room() precedes commit_sparse()");
        let data = fill + to.offset_data_len();
        let mut runs = ZeroRuns::new(&self.bufs[buf][data..data + len], offset);
        let first = runs.next().expect("there is data");
        if first == (0..len, true) {
            self.put(&to.offset_hole(flags, offset, len as u32));
            return;
        }
        let rest: Vec<(Range<usize>, bool)> = runs.collect();
        // The header of a first data run is built where room was left for it, others behind the data.
        self.arena = Some((buf, data + len));
        let mut header = Some(fill);
        for (range, zero) in std::iter::once(first).chain(rest) {
            let flags = if range.end == len { flags } else { ReplyFlags::empty() };
            let (at, n) = (offset + range.start as u64, range.len() as u32);
            let in_place = header.take();
            if zero {
                self.put(&to.offset_hole(flags, at, n));
                continue;
            }
            let encoded = to.offset_data(flags, at, n);
            match in_place {
                Some(fill) => {
                    self.bufs[buf][fill..data].copy_from_slice(&encoded);
                    self.piece(Whence::Buf(buf), fill..data);
                }
                None => self.put(&encoded),
            }
            self.piece(Whence::Buf(buf), data + range.start..data + range.end);
        }
    }

    /// Appends a copy of `bytes`.
    pub fn put(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let n = bytes.len().min(Batch::MAX_ROOM);
            self.room(n).copy_from_slice(&bytes[..n]);
            self.commit(n);
            bytes = &bytes[n..];
        }
    }

    /// Takes a filled buffer; its ranges are appended by [`Batch::data`].
    pub fn add_buf(&mut self, buf: IoBuf) -> BufId {
        self.bufs.push(buf);
        BufId(self.bufs.len() - 1)
    }

    /// Appends a range of a buffer.
    pub fn data(&mut self, id: BufId, range: Range<usize>) {
        assert!(range.end <= self.bufs[id.0].len(), "range outside of its buffer");
        self.piece(Whence::Buf(id.0), range);
    }

    /// Appends a range of the export, which the sender reads or has lent to it.
    pub fn export(&mut self, offset: u64, len: usize) {
        self.piece(Whence::Export(offset), 0..len);
    }

    fn piece(&mut self, from: Whence, range: Range<usize>) {
        let (start, end) = (range.start, range.end);
        self.bytes += end - start;
        match self.pieces.last_mut() {
            Some(last) if last.from == from && last.end == start => last.end = end,
            _ if start == end => {}
            _ => self.pieces.push(Piece { from, start, end }),
        }
    }

    /// Keeps a request's share of the budget until the batch has been sent.
    pub fn hold(&mut self, reservation: Reservation) {
        self.held.push(reservation);
    }

    /// Forgets all, and gives back what it holds. Keeps the memory of its lists, unless that is much.
    pub fn clear(&mut self) {
        /// Pieces of a batch of small replies are few (ours).
        const KEEP: usize = 64;
        if self.pieces.capacity() > KEEP || self.bufs.capacity() > KEEP {
            *self = Batch::new();
            return;
        }
        self.bufs.clear();
        self.pieces.clear();
        self.arena = None;
        self.bytes = 0;
        self.held.clear();
    }

    /// Appends all of `other`, which is left empty.
    pub fn append(&mut self, other: &mut Batch) {
        if self.is_empty() && self.held.is_empty() {
            std::mem::swap(self, other);
            return;
        }
        let base = self.bufs.len();
        self.bufs.append(&mut other.bufs);
        let moved = other.pieces.drain(..).map(|p| {
            let from = match p.from {
                Whence::Buf(i) => Whence::Buf(i + base),
                export => export,
            };
            Piece { from, ..p }
        });
        self.pieces.extend(moved);
        self.arena = other.arena.take().map(|(buf, fill)| (buf + base, fill));
        self.bytes += std::mem::take(&mut other.bytes);
        self.held.append(&mut other.held);
    }

    /// Says what is to be sent from byte `sent` on: a range of the export, or slices, which `out` is filled with; about `most`
    /// bytes, and not less than all that is left unless it is as much.
    pub fn next<'b>(&'b self, sent: usize, most: usize, out: &mut [IoSlice<'b>]) -> Next {
        let (mut skip, mut n, mut bytes) = (sent, 0, 0);
        for piece in &self.pieces {
            let len = piece.end - piece.start;
            if skip >= len {
                skip -= len;
                continue;
            }
            if n == out.len() || bytes >= most {
                break;
            }
            let start = piece.start + skip;
            let end = piece.end.min(start + (most - bytes));
            skip = 0;
            match piece.from {
                Whence::Buf(buf) => out[n] = IoSlice::new(&self.bufs[buf][start..end]),
                Whence::Export(_) if n > 0 => break,
                Whence::Export(offset) => {
                    return Next::Export(offset + start as u64..offset + end as u64);
                }
            }
            bytes += end - start;
            n += 1;
        }
        Next::Slices(n)
    }

    /// Appends a structured read's content chunks for `buf`, read from `offset`: runs of zero grains as holes, the rest as
    /// data. `flags` go on the last chunk.
    pub fn put_sparse(&mut self, flags: ReplyFlags, to: ReplyTo, offset: u64, buf: IoBuf) {
        let mut runs = Runs::default();
        runs.scan(&buf, 0..buf.len(), offset);
        self.put_runs(flags, to, &runs, buf);
    }

    /// Appends a chunk per run, whose data are in `buf`; `flags` go on the last.
    pub fn put_runs(&mut self, flags: ReplyFlags, to: ReplyTo, runs: &Runs, buf: IoBuf) {
        assert!(!runs.list.is_empty(), "an empty read has no content");
        let id = BufId(self.bufs.len());
        // Nothing but holes: the memory is free at once.
        self.bufs.extend(runs.list.iter().any(|run| run.data.is_some()).then_some(buf));
        for (i, run) in runs.list.iter().enumerate() {
            let flags = if i + 1 == runs.list.len() { flags } else { ReplyFlags::empty() };
            match &run.data {
                None => self.put(&to.offset_hole(flags, run.offset, run.len)),
                Some(range) => {
                    self.put(&to.offset_data(flags, run.offset, run.len));
                    self.data(id, range.clone());
                }
            }
        }
    }

    /// Appends a structured read's one data chunk.
    pub fn put_dense(&mut self, flags: ReplyFlags, to: ReplyTo, offset: u64, buf: IoBuf) {
        let len = buf.len();
        self.put(&to.offset_data(flags, offset, len as u32));
        let id = self.add_buf(buf);
        self.data(id, 0..len);
    }
}

/// The content of one structured read, in order: holes, and data in its buffer.
#[derive(Debug, Default)]
pub struct Runs {
    list: Vec<Run>,
}

#[derive(Debug)]
struct Run {
    offset: u64,
    len: u32,
    /// Where in the buffer; none for a hole.
    data: Option<Range<usize>>,
}

impl Runs {
    /// Adds what is in a range of the buffer, read from byte `offset` of the export: runs of zero grains as holes.
    pub fn scan(&mut self, buf: &[u8], range: Range<usize>, offset: u64) {
        let start = range.start;
        for (run, zero) in ZeroRuns::new(&buf[range], offset) {
            let (at, len) = (offset + run.start as u64, run.len() as u32);
            match zero {
                true => self.hole(at, len),
                false => {
                    let data = Some(start + run.start..start + run.end);
                    self.list.push(Run { offset: at, len, data });
                }
            }
        }
    }

    /// Adds a hole; joins it to one right before it.
    pub fn hole(&mut self, offset: u64, len: u32) {
        match self.list.last_mut() {
            Some(last) if last.data.is_none() && last.offset + u64::from(last.len) == offset => {
                last.len += len
            }
            _ => self.list.push(Run { offset, len, data: None }),
        }
    }
}

/// A buffer of a [`Batch`].
#[derive(Debug, Clone, Copy)]
pub struct BufId(usize);

/// Tells whether all bytes are zero. Stops at the first 64 bytes that are not: on data that costs next to nothing.
#[must_use]
pub fn is_zero(data: &[u8]) -> bool {
    let (blocks, tail) = data.as_chunks::<64>();
    blocks.iter().all(|b| b.iter().fold(0u8, |acc, x| acc | x) == 0) && tail.iter().all(|x| *x == 0)
}

/// What a read's content is, as [`Batch::put_sparse`] would send it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// One data chunk.
    Data,
    /// One hole chunk.
    Hole,
    /// Several chunks.
    Mixed,
}

/// Tells what `data`, read from `offset` of the export, is.
#[must_use]
pub fn content(data: &[u8], offset: u64) -> Content {
    match ZeroRuns::new(data, offset).next() {
        Some((range, zero)) if range.len() == data.len() => {
            if zero {
                Content::Hole
            } else {
                Content::Data
            }
        }
        _ => Content::Mixed,
    }
}

/// Splits data, read from `offset` of the export, into runs of zero grains and of others, in order.
struct ZeroRuns<'a> {
    data: &'a [u8],
    offset: u64,
    grain: usize,
    pos: usize,
    /// What the grain at `pos` is, if known.
    next: Option<(usize, bool)>,
}

impl<'a> ZeroRuns<'a> {
    fn new(data: &'a [u8], offset: u64) -> ZeroRuns<'a> {
        let grain = if data.len() < ZERO_GRAIN { SMALL_GRAIN } else { ZERO_GRAIN };
        ZeroRuns { data, offset, grain, pos: 0, next: None }
    }

    /// End and kind of the grain at `pos`. A piece shorter than a grain counts as data unless it is all there is.
    fn grain(&self, pos: usize) -> Option<(usize, bool)> {
        if pos == self.data.len() {
            return None;
        }
        let into = ((self.offset + pos as u64) % self.grain as u64) as usize;
        let end = (pos + self.grain - into).min(self.data.len());
        let whole = end - pos == self.grain || (pos == 0 && end == self.data.len());
        Some((end, whole && is_zero(&self.data[pos..end])))
    }
}

impl Iterator for ZeroRuns<'_> {
    type Item = (Range<usize>, bool);

    fn next(&mut self) -> Option<Self::Item> {
        let start = self.pos;
        let (mut end, zero) = self.next.take().or_else(|| self.grain(start))?;
        while let Some((e, z)) = self.grain(end) {
            if z != zero {
                self.next = Some((e, z));
                break;
            }
            end = e;
        }
        self.pos = end;
        Some((start..end, zero))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn exported(range: Range<u64>) -> Vec<u8> {
        range.map(|i| (i % 251) as u8).collect()
    }

    fn sent(batch: &Batch, step: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < batch.bytes() {
            let mut slices = [IoSlice::new(&[]); 3];
            let before = all.len();
            match batch.next(all.len(), step, &mut slices) {
                Next::Slices(n) => slices[..n].iter().for_each(|s| all.extend_from_slice(s)),
                Next::Export(range) => all.extend(exported(range)),
            }
            assert!(all.len() > before && all.len() - before <= step);
        }
        all
    }

    fn buf(len: usize, byte: u8) -> IoBuf {
        let mut b = IoBuf::new(len);
        b.fill(byte);
        b
    }

    #[test]
    fn what_was_put_is_what_is_sent() {
        let mut a = Batch::new();
        a.put(b"one");
        a.room(100)[..3].copy_from_slice(b"two");
        a.commit(3);
        assert_eq!(a.pieces.len(), 1);
        let id = a.add_buf(buf(10_000, b'x'));
        a.data(id, 0..5000);
        a.put(b"three");
        a.data(id, 5000..10_000);
        let mut b = Batch::new();
        b.put(b"four");
        a.append(&mut b);
        assert!(b.is_empty());
        a.put(b"five");
        a.put(&vec![7; 200_000]);
        let mut want = b"onetwo".to_vec();
        want.resize(want.len() + 5000, b'x');
        want.extend_from_slice(b"three");
        want.resize(want.len() + 5000, b'x');
        want.extend_from_slice(b"fourfive");
        want.resize(want.len() + 200_000, 7);
        assert_eq!(a.bytes(), want.len());
        for step in [1, 100, 4096, usize::MAX / 2] {
            assert_eq!(sent(&a, step), want);
        }
    }

    #[test]
    fn a_range_of_the_export_is_sent_in_its_place() {
        let mut a = Batch::new();
        a.put(b"one");
        a.export(100, 5000);
        a.put(b"two");
        let mut b = Batch::new();
        b.export(7, 9000);
        b.export(9007, 10);
        b.put(b"three");
        a.append(&mut b);
        a.export(0, 1);
        let want = [
            b"one",
            &exported(100..5100)[..],
            b"two",
            &exported(7..9007),
            &exported(9007..9017),
            b"three",
            &exported(0..1),
        ];
        for step in [1, 100, 4096, usize::MAX / 2] {
            assert_eq!(sent(&a, step), want.concat());
        }
    }

    #[test]
    fn a_read_in_place_is_sent_as_its_holes_and_data() {
        const DONE: ReplyFlags = ReplyFlags::NBD_REPLY_FLAG_DONE;
        let check = |to: ReplyTo, grains: &[u8]| {
            let header = to.offset_data_len();
            let len = grains.len() * ZERO_GRAIN;
            let mut b = Batch::new();
            let room = b.room(header + len);
            for (i, g) in grains.iter().enumerate() {
                room[header + i * ZERO_GRAIN..][..ZERO_GRAIN].fill(*g);
            }
            b.commit_sparse(DONE, to, 8192, len);
            b.put(b"next");
            // The same by way of a buffer of its own.
            let mut c = Batch::new();
            let mut io = IoBuf::new(len);
            for (i, g) in grains.iter().enumerate() {
                io[i * ZERO_GRAIN..][..ZERO_GRAIN].fill(*g);
            }
            c.put_sparse(DONE, to, 8192, io);
            c.put(b"next");
            assert_eq!(sent(&b, 1 << 20), sent(&c, 1 << 20), "{grains:?}");
        };
        let all: [&[u8]; 8] =
            [&[0], &[1], &[0, 0], &[1, 1], &[0, 1], &[1, 0], &[1, 0, 0, 1, 0], &[0, 1, 0, 1, 1]];
        for grains in all {
            check(ReplyTo::compact(7), grains);
            check(ReplyTo::extended(7, 8192), grains);
        }
    }

    #[test]
    fn parts_of_a_room_are_sent_and_nothing_else_of_it() {
        let mut b = Batch::new();
        b.put(b"a");
        b.room(100).fill(b'.');
        b.room(100)[10..13].copy_from_slice(b"one");
        b.commit_part(10..13);
        b.room(100)[20..23].copy_from_slice(b"two");
        b.commit_part(20..23);
        b.close_room(100);
        b.put(b"b");
        assert_eq!(sent(&b, 9), b"aonetwob");
    }

    #[test]
    fn content_is_told_as_it_is_sent() {
        let mut data = vec![0; 3 * ZERO_GRAIN];
        assert_eq!(content(&data, 0), Content::Hole);
        data[ZERO_GRAIN] = 1;
        assert_eq!(content(&data, 0), Content::Mixed);
        assert_eq!(content(&data[ZERO_GRAIN..2 * ZERO_GRAIN], 4096), Content::Data);
        assert_eq!(content(&data[..512], 512), Content::Hole);
        // Less than a page is looked at in sectors.
        let mut small = vec![0; 1024];
        small[512] = 1;
        assert_eq!(content(&small, 2048), Content::Mixed);
        assert_eq!(content(&small[1..], 2049), Content::Data, "no whole sector of zeroes");
    }

    #[test]
    fn a_room_that_is_not_committed_is_not_sent() {
        let mut b = Batch::new();
        b.put(b"a");
        b.room(4096).fill(1);
        b.put(b"b");
        assert_eq!(sent(&b, 9), b"ab");
    }

    #[test]
    fn zero_runs_are_whole_grains() {
        let check = |offset: u64, data: &[u8], want: &[(Range<usize>, bool)]| {
            assert_eq!(ZeroRuns::new(data, offset).collect::<Vec<_>>(), want);
        };
        let mut d = vec![0; 3 * 4096];
        check(0, &d, &[(0..12288, true)]);
        // Not aligned: the ends are short grains, which count as data.
        check(512, &d, &[(0..3584, false), (3584..11776, true), (11776..12288, false)]);
        d[4096] = 1;
        check(0, &d, &[(0..4096, true), (4096..8192, false), (8192..12288, true)]);
        check(7, &[0; 100], &[(0..100, true)]);
        check(7, &[1; 100], &[(0..100, false)]);
        assert!(is_zero(&[]));
        assert!(is_zero(&[0; 65]));
        assert!(!is_zero(&[[0; 64].as_slice(), &[1]].concat()));
    }

    proptest! {
        #[test]
        fn zero_runs_cover_and_tell_the_truth(offset in 0u64..10_000, marks in proptest::collection::vec(0usize..40_000, 0..6), len in 1usize..40_000) {
            let mut data = vec![0u8; len];
            for m in marks {
                if m < len {
                    data[m] = 1;
                }
            }
            let mut at = 0;
            for (range, zero) in ZeroRuns::new(&data, offset) {
                prop_assert_eq!(range.start, at);
                prop_assert!(range.end > range.start);
                prop_assert!(!zero || is_zero(&data[range.clone()]));
                at = range.end;
            }
            prop_assert_eq!(at, len);
        }
    }
}
