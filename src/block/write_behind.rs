//! WriteBehind: begins to write a long sequential stream of buffered writes to the disk while it still goes on.
//!
//! The kernel leaves dirty pages alone for seconds. A copy that ends with a flush (`qemu-img convert`, an importer, a restore) then first
//! fills memory, and then waits for the disk: one after the other, what could be done at the same time. So once one stream has written
//! much, what lies a little behind its end is handed to the disk, piece by piece. Nothing is promised by that, and nothing
//! is learned from it: errors are found by the flush.
//!
//! Writes that make the file longer do not count (the caller sees to that): while the file system makes room for what is handed over, those who
//! go on making it longer wait, which was measured to cost a stream into a fresh qcow2 image half of its rate. Other large writes may wait, too: so
//! while a piece is being handed over they go to the engine, not in the caller's turn ([`WriteBehind::is_busy`]).
//!
//! A stream is writes in large pieces, each near the end of what was written before (`qemu-img convert -W` has 16 of 2 MiB under way, in any
//! order). Several at once (nbdcopy with its four connections) are none: they keep all CPUs busy, and such clients seldom flush. Nor is one that begins
//! where the last one was handed over, if nobody has flushed since: a log that goes round is not written to the disk each time.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Smallest write that counts, in bytes (ours: what copies do, and guests at work do not).
pub(super) const WRITE_MIN: u64 = 256 << 10;

/// How far from the stream's end a write may be, in bytes (ours: the 32 MiB that qemu-img has under way).
const NEAR: u64 = 32 << 20;

/// Bytes of a stream before anything is done about it (ours: less is on the disk in a moment anyway; the work of writing it back takes CPU
/// time from the stream where there is little of it).
const BEGIN: u64 = 256 << 20;

/// Bytes that are handed over at once (ours).
const PIECE: u64 = 16 << 20;

#[derive(Debug, Default)]
struct Stream {
    /// Where it began.
    start: u64,
    /// The end of what was written.
    end: u64,
    written: u64,
    /// Handed over up to here.
    behind: u64,
    /// It overwrites what was handed over before: it may do so again, and the disk should not be told each time.
    again: bool,
    /// What was handed over of the last streams that were.
    before: Range<u64>,
    /// Bytes handed over, of all streams.
    handed: u64,
}

impl Stream {
    /// Another stream begins.
    fn begin(&mut self, at: u64, again: bool, before: Range<u64>) {
        *self = Stream { start: at, end: at, behind: at, written: 0, again, before, handed: self.handed };
    }
}

/// The stream of one file. Any thread.
#[derive(Debug, Default)]
pub(super) struct WriteBehind {
    stream: Mutex<Stream>,
    /// A piece is being handed over.
    busy: AtomicBool,
}

impl WriteBehind {
    fn stream(&self) -> MutexGuard<'_, Stream> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Learns from a write of at least [`WRITE_MIN`] bytes that has been done. Returns what is to be handed over now; then
    /// [`WriteBehind::done`] is to be called. Never waits.
    pub(super) fn wrote(&self, range: Range<u64>) -> Option<Range<u64>> {
        let mut s = self.stream();
        if range.start.abs_diff(s.end) > NEAR {
            let before = if s.behind > s.start { s.start..s.behind } else { s.before.clone() };
            s.begin(range.start, before.contains(&range.start), before);
        }
        // Its first write need not be the first that comes.
        s.start = s.start.min(range.start);
        s.end = s.end.max(range.end);
        s.written += range.end - range.start;
        if s.again || s.written < BEGIN || s.end - s.behind < NEAR + PIECE {
            return None;
        }
        if self.busy.swap(true, Ordering::Relaxed) {
            return None;
        }
        let piece = s.behind..s.behind + PIECE;
        s.behind = piece.end;
        Some(piece)
    }

    /// A flush begins: what was written so far is its business, what comes is a new stream.
    pub(super) fn flushed(&self) {
        let mut s = self.stream();
        let end = s.end;
        s.begin(end, false, 0..0);
    }

    /// Whether a piece is being handed over: then the file system may make a writer wait.
    pub(super) fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Relaxed)
    }

    /// Bytes handed over so far.
    pub(super) fn handed_over(&self) -> u64 {
        self.stream().handed
    }

    /// The piece has been handed over, `bytes` of it.
    pub(super) fn done(&self, bytes: u64) {
        self.stream().handed += bytes;
        self.busy.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const M: u64 = 1 << 20;

    /// Writes as told; returns all that was handed over.
    fn run(writes: impl IntoIterator<Item = (u64, u64)>) -> Vec<Range<u64>> {
        let behind = WriteBehind::default();
        let mut all = Vec::new();
        for (at, len) in writes {
            if let Some(piece) = behind.wrote(at..at + len) {
                assert!(behind.is_busy() && behind.wrote(at..at + len).is_none(), "one piece at a time");
                behind.done(PIECE);
                assert!(!behind.is_busy());
                all.push(piece);
            }
        }
        all
    }

    fn joined(pieces: &[Range<u64>]) -> Option<Range<u64>> {
        assert!(pieces.windows(2).all(|w| w[0].end == w[1].start), "side by side: {pieces:?}");
        Some(pieces.first()?.start..pieces.last()?.end)
    }

    #[test]
    fn one_long_stream_is_followed_at_a_distance() {
        let all = run((0..256).map(|i| ((500 + i * 2) * M, 2 * M)));
        assert_eq!(joined(&all), Some(500 * M..980 * M));
    }

    #[test]
    fn what_goes_round_is_handed_over_once_unless_somebody_flushes() {
        let behind = WriteBehind::default();
        let round = || {
            let pieces = (0..300).filter_map(|i| {
                let piece = behind.wrote(i * 2 * M..(i + 1) * 2 * M)?;
                behind.done(PIECE);
                Some(piece.end - piece.start)
            });
            pieces.sum::<u64>()
        };
        assert!(round() > 300 * M);
        assert_eq!((round(), round()), (0, 0));
        assert_eq!(behind.handed_over() % PIECE, 0);
        behind.flushed();
        assert!(round() > 300 * M, "a copy into the same place");
    }

    #[test]
    fn the_order_of_its_writes_does_not_matter() {
        // 16 of them at a time, the last one first.
        let order = (0..16).flat_map(|batch| (0..16).rev().map(move |i| ((batch * 16 + i) * 2 * M, 2 * M)));
        let all = run(order);
        assert_eq!(joined(&all), Some(0..480 * M));
    }

    #[test]
    fn several_streams_and_short_ones_are_left_alone() {
        assert_eq!(run((0..4000).map(|i| ((i % 4) * 256 * M + i / 4 * 256 * 1024, 256 * 1024))), []);
        assert_eq!(run((0..200).map(|i| (i * M, M))), []);
        assert_eq!(run((0..500).map(|i| ((i * 7919 % 1000) * 100 * M, M))), []);
    }
}
