//! Metadata contexts: which there are, which a client selected, and what they say about a range.
//!
//! A context is a variant of [`ContextKind`]. Which of them an export has is settled when it is made
//! (`Export::contexts`); `co_extents` says what each tells about a range; negotiation and encoding follow from that.
//!
//! Source: proto.md, "Metadata querying"; QEMU's docs/interop/nbd.txt for the namespace `qemu:`.

use super::export::Export;
use super::proto::{DirtyFlags, MAX_EXTENTS, StateFlags};
use super::wire::StatusExtent;
use crate::aio::AioContext;
use crate::block::{self, DirtyBitmap, StatusFlags};
use crate::co::{Coroutine, co_yield};
use std::fmt;
use std::sync::Arc;

/// Something that can be asked about a range of an export.
#[derive(Clone)]
pub enum ContextKind {
    /// `base:allocation`: holes and zeroes (proto.md, "Metadata contexts").
    BaseAllocation,
    /// `qemu:allocation-depth`: which layer of the backing chain holds the data, 0 for none.
    AllocationDepth,
    /// `qemu:dirty-bitmap:NAME`: what was written since the bitmap was begun.
    DirtyBitmap {
        /// Name on the wire.
        name: Arc<str>,
        /// Who knows.
        bitmap: Arc<dyn DirtyBitmap>,
    },
}

impl fmt::Debug for ContextKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What precedes the name of a bitmap; also the wildcard for all bitmaps when listing.
const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";

impl ContextKind {
    /// The context that shows a bitmap.
    #[must_use]
    pub fn dirty_bitmap(bitmap: Arc<dyn DirtyBitmap>) -> ContextKind {
        ContextKind::DirtyBitmap { name: format!("{DIRTY_BITMAP}{}", bitmap.name()).into(), bitmap }
    }

    /// Name on the wire: namespace, colon, leaf.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            ContextKind::BaseAllocation => "base:allocation",
            ContextKind::AllocationDepth => "qemu:allocation-depth",
            ContextKind::DirtyBitmap { name, .. } => name,
        }
    }

    /// Whether a query selects this context: the whole name. An empty leaf selects nothing.
    fn is_selected_by(&self, query: &[u8]) -> bool {
        query == self.name().as_bytes()
    }

    /// Whether a query lists this context: its name, its namespace with the colon, `qemu:dirty-bitmap:` for a bitmap,
    /// or nothing at all, for everything.
    fn is_listed_by(&self, query: &[u8]) -> bool {
        let name = self.name();
        let namespace = name.find(':').map_or(name, |colon| &name[..=colon]);
        let kind = matches!(self, ContextKind::DirtyBitmap { .. }) && query == DIRTY_BITMAP.as_bytes();
        query.is_empty() || query == namespace.as_bytes() || kind || self.is_selected_by(query)
    }

    /// What a block that two extents share may be called: both must stay true of it.
    fn combine(&self, a: u64, b: u64) -> u64 {
        match self {
            // 0 is always a safe answer.
            ContextKind::BaseAllocation => a & b,
            // What is partly in a layer is called that layer's.
            ContextKind::AllocationDepth if a == 0 || b == 0 => a.max(b),
            ContextKind::AllocationDepth => a.min(b),
            ContextKind::DirtyBitmap { .. } => a | b,
        }
    }

    /// First extent of the range, clipped to it. Yields.
    fn co_extent(&self, export: &Export, offset: u64, len: u64) -> block::Result<StatusExtent> {
        let backend = export.backend();
        Ok(match self {
            ContextKind::BaseAllocation => {
                let e = backend.co_block_status(offset, len)?;
                StatusExtent { len: e.len, flags: allocation_flags(e.flags).bits().into() }
            }
            ContextKind::AllocationDepth => {
                let e = backend.co_allocation_depth(offset, len)?;
                StatusExtent { len: e.len, flags: e.depth.into() }
            }
            ContextKind::DirtyBitmap { bitmap, .. } => {
                let e = backend.co_dirty_status(&**bitmap, offset, len)?;
                let dirty = if e.dirty { DirtyFlags::NBD_STATE_DIRTY } else { DirtyFlags::empty() };
                StatusExtent { len: e.len, flags: dirty.bits().into() }
            }
        })
    }
}

/// A selected context and its id.
#[derive(Debug, Clone)]
pub struct MetaContext {
    /// Unique in its selection.
    pub id: u32,
    /// Which.
    pub kind: ContextKind,
}

/// What a connection has selected by `NBD_OPT_SET_META_CONTEXT`, and for which export.
#[derive(Debug, Clone, Default)]
pub struct MetaSelection {
    export: Option<Arc<Export>>,
    contexts: Vec<MetaContext>,
}

impl MetaSelection {
    /// Selects the contexts of `export` that the queries name exactly. Unknown ones are ignored, wildcards too.
    pub fn select<'a>(export: &Arc<Export>, queries: impl Iterator<Item = &'a [u8]>) -> MetaSelection {
        let available = export.contexts();
        let mut wanted = vec![false; available.len()];
        for query in queries {
            for (kind, wanted) in available.iter().zip(&mut wanted) {
                *wanted |= kind.is_selected_by(query);
            }
        }
        let contexts = available
            .iter()
            .zip(wanted)
            .enumerate()
            .filter(|(_, (_, wanted))| *wanted)
            .map(|(i, (kind, _))| MetaContext { id: i as u32 + 1, kind: kind.clone() })
            .collect();
        MetaSelection { export: Some(export.clone()), contexts }
    }

    /// What was selected, whatever the export.
    #[must_use]
    pub fn contexts(&self) -> &[MetaContext] {
        &self.contexts
    }

    /// What holds for a session on `export`: the selection, if it was made for that very export, else nothing.
    #[must_use]
    pub fn into_contexts_for(self, export: &Arc<Export>) -> Vec<MetaContext> {
        if self.is_for(export) { self.contexts } else { Vec::new() }
    }

    /// Whether something is selected that holds for a session on `export`.
    #[must_use]
    pub fn selects_for(&self, export: &Arc<Export>) -> bool {
        self.is_for(export) && !self.contexts.is_empty()
    }

    fn is_for(&self, export: &Arc<Export>) -> bool {
        self.export.as_ref().is_some_and(|selected| Arc::ptr_eq(selected, export))
    }
}

/// The contexts of `export` that match a list query: all if there is no query; wildcards are `NAMESPACE:`,
/// `qemu:dirty-bitmap:` and the empty query.
pub fn list<'a>(
    export: &Export,
    queries: impl Iterator<Item = &'a [u8]> + Clone,
) -> impl Iterator<Item = &ContextKind> {
    let all = queries.clone().next().is_none();
    export.contexts().iter().filter(move |kind| all || queries.clone().any(|q| kind.is_listed_by(q)))
}

/// Finds the extents of a range for one context: at least one, none empty, neighbours differ, together at most the
/// range. Fewer than the range has if there are more than [`MAX_EXTENTS`]. Yields. Coroutine only.
///
/// # Errors
/// What the node reports.
pub fn co_extents(
    kind: &ContextKind,
    export: &Export,
    offset: u64,
    len: u64,
    req_one: bool,
) -> block::Result<Vec<StatusExtent>> {
    assert!(len > 0, "validated: a status request asks about something");
    let min = export.block_sizes().min;
    let mut extents: Vec<StatusExtent> = Vec::new();
    let mut done: u64 = 0;
    let mut turn = Turn::new();
    // Also the number of questions is bounded: a node may answer with many equal neighbours.
    for _ in 0..MAX_EXTENTS {
        turn.co_step();
        let StatusExtent { len: run, flags } = kind.co_extent(export, offset + done, len - done)?;
        match extents.last_mut() {
            Some(last) if last.flags == flags => last.len += run,
            // One more than asked for, since aligning may need to see what follows.
            Some(_) if req_one && min == 1 => break,
            _ => extents.push(StatusExtent { len: run, flags }),
        }
        done += run;
        if done == len {
            break;
        }
    }
    if min > 1 {
        extents = align_extents(kind, &extents, offset, min);
    }
    if req_one {
        extents.truncate(1);
    }
    Ok(extents)
}

/// Questions that are asked in one turn of the loop (ours): answers from memory must not hold up other connections.
const QUESTIONS_PER_TURN: u32 = 256;

/// Lets the loop turn now and then while a node answers without waiting.
struct Turn(u32);

impl Turn {
    fn new() -> Turn {
        Turn(0)
    }

    fn co_step(&mut self) {
        self.0 += 1;
        if self.0.is_multiple_of(QUESTIONS_PER_TURN) {
            let me = Coroutine::current().expect("block status is asked in coroutines");
            me.schedule(&AioContext::current().expect("coroutines run on contexts"));
            co_yield();
        }
    }
}

fn allocation_flags(flags: StatusFlags) -> StateFlags {
    let mut out = StateFlags::empty();
    out.set(StateFlags::NBD_STATE_HOLE, !flags.contains(StatusFlags::DATA));
    out.set(StateFlags::NBD_STATE_ZERO, flags.contains(StatusFlags::ZERO));
    out
}

/// Moves the boundaries between extents to multiples of `min`: a block that extents share gets what the context says
/// of both (`ContextKind::combine`). The end of the range stays where it is.
fn align_extents(kind: &ContextKind, extents: &[StatusExtent], offset: u64, min: u32) -> Vec<StatusExtent> {
    let min = u64::from(min);
    let mut out: Vec<StatusExtent> = Vec::new();
    let mut push = |len: u64, flags: u64| {
        if len == 0 {
            return;
        }
        match out.last_mut() {
            Some(last) if last.flags == flags => last.len += len,
            _ => out.push(StatusExtent { len, flags }),
        }
    };
    // `pos` is how far `out` reaches; `shared` is what is known of the unfinished block that begins there.
    let mut pos = offset;
    let mut start = offset;
    let mut shared: Option<u64> = None;
    for (i, extent) in extents.iter().enumerate() {
        let end = start + extent.len;
        let last = i + 1 == extents.len();
        if let Some(bits) = shared {
            let block_end = (pos / min + 1) * min;
            let bits = kind.combine(bits, extent.flags);
            if end < block_end && !last {
                shared = Some(bits);
                start = end;
                continue;
            }
            let until = block_end.min(end);
            push(until - pos, bits);
            pos = until;
            shared = None;
        }
        let until = if last { end } else { (end / min * min).max(pos) };
        push(until - pos, extent.flags);
        pos = until;
        if pos < end {
            shared = Some(extent.flags);
        }
        start = end;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn e(len: u64, flags: u64) -> StatusExtent {
        StatusExtent { len, flags }
    }

    #[test]
    fn boundaries_move_to_blocks() {
        let check = |offset, input: &[StatusExtent], want: &[StatusExtent]| {
            let got = align_extents(&ContextKind::BaseAllocation, input, offset, 512);
            assert_eq!(got, want, "{input:?} at {offset}");
        };
        check(0, &[e(1024, 3)], &[e(1024, 3)]);
        check(0, &[e(100, 3)], &[e(100, 3)]);
        check(0, &[e(512, 3), e(512, 0)], &[e(512, 3), e(512, 0)]);
        check(0, &[e(600, 3), e(424, 0)], &[e(512, 3), e(512, 0)]);
        check(0, &[e(500, 0), e(1548, 3)], &[e(512, 0), e(1536, 3)]);
        check(0, &[e(500, 3), e(10, 2), e(2, 3), e(512, 3)], &[e(512, 2), e(512, 3)]);
        check(512, &[e(100, 3), e(1, 0), e(411, 3), e(512, 3)], &[e(512, 0), e(512, 3)]);
        check(0, &[e(600, 3), e(10, 0)], &[e(512, 3), e(98, 0)]);
        let depth = ContextKind::AllocationDepth;
        let got = align_extents(&depth, &[e(500, 0), e(10, 2), e(600, 1)], 0, 512);
        assert_eq!(got, [e(1110, 1)], "what is partly in layer 1 is layer 1's");
    }

    proptest! {
        #[test]
        fn aligning_claims_nothing_new(parts in proptest::collection::vec((1u64..2000, 0u64..4), 1..20)) {
            let input: Vec<StatusExtent> = parts.iter().map(|(l, f)| e(*l, *f)).collect();
            let out = align_extents(&ContextKind::BaseAllocation, &input, 0, 512);
            let flat = |v: &[StatusExtent]| {
                v.iter().flat_map(|x| std::iter::repeat_n(x.flags, x.len as usize)).collect::<Vec<u64>>()
            };
            let (a, b) = (flat(&input), flat(&out));
            prop_assert_eq!(a.len(), b.len());
            for (a, b) in a.iter().zip(&b) {
                prop_assert_eq!(a & b, *b);
            }
            let mut at = 0u64;
            for x in &out[..out.len() - 1] {
                at += x.len;
                prop_assert_eq!(at % 512, 0);
            }
        }
    }
}
