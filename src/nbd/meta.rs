//! Metadata contexts: which there are, which a client selected, and what they say about a range.
//!
//! Today that is `base:allocation`. A new context is a variant of [`ContextKind`]: give it a name, say for which
//! exports it exists (`available`), and say its extents (`co_extents`); negotiation and encoding follow.

use super::export::Export;
use super::proto::{MAX_EXTENTS, StateFlags};
use super::wire::StatusExtent;
use crate::block::{self, BlockNode, StatusFlags};
use std::sync::Arc;

/// Something that can be asked about a range of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ContextKind {
    /// `base:allocation`: holes and zeroes (proto.md, "Metadata contexts").
    BaseAllocation,
}

impl ContextKind {
    /// Name on the wire: namespace, colon, leaf.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            ContextKind::BaseAllocation => "base:allocation",
        }
    }

    /// The contexts that an export has, in a fixed order.
    #[must_use]
    pub fn available(_export: &Export) -> Vec<ContextKind> {
        vec![ContextKind::BaseAllocation]
    }
}

/// A selected context and its id.
#[derive(Debug, Clone, PartialEq, Eq)]
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
        let available = ContextKind::available(export);
        let mut wanted = vec![false; available.len()];
        for query in queries {
            for (kind, wanted) in available.iter().zip(&mut wanted) {
                *wanted |= query == kind.name().as_bytes();
            }
        }
        let contexts = available
            .into_iter()
            .zip(wanted)
            .enumerate()
            .filter(|(_, (_, wanted))| *wanted)
            .map(|(i, (kind, _))| MetaContext { id: i as u32 + 1, kind })
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
        match self.export {
            Some(selected) if Arc::ptr_eq(&selected, export) => self.contexts,
            _ => Vec::new(),
        }
    }
}

/// The contexts of `export` that match a list query: all if there is no query, `NAMESPACE:` is a wildcard.
pub fn list<'a>(export: &Export, queries: impl Iterator<Item = &'a [u8]> + Clone) -> Vec<ContextKind> {
    let mut available = ContextKind::available(export);
    if queries.clone().next().is_some() {
        available.retain(|kind| {
            let name = kind.name();
            let namespace = name.find(':').map_or(name, |colon| &name[..=colon]);
            queries.clone().any(|q| q == name.as_bytes() || q == namespace.as_bytes())
        });
    }
    available
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
    len: u32,
    req_one: bool,
) -> block::Result<Vec<StatusExtent>> {
    match kind {
        ContextKind::BaseAllocation => co_allocation(export, offset, len, req_one),
    }
}

fn co_allocation(export: &Export, offset: u64, len: u32, req_one: bool) -> block::Result<Vec<StatusExtent>> {
    assert!(len > 0, "validated: a status request asks about something");
    let node: &dyn BlockNode = &**export.node();
    let min = export.block_sizes().min;
    let mut extents: Vec<StatusExtent> = Vec::new();
    let mut done: u32 = 0;
    // Also the number of questions is bounded: a node may answer with many equal neighbours.
    for _ in 0..MAX_EXTENTS {
        let found = node.co_block_status(offset + u64::from(done), u64::from(len - done))?;
        assert!(found.len > 0, "a node's extent is never empty");
        let run = u32::try_from(found.len).unwrap_or(u32::MAX).min(len - done);
        let flags = allocation_flags(found.flags).bits();
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
        extents = align_extents(&extents, offset, min);
    }
    if req_one {
        extents.truncate(1);
    }
    Ok(extents)
}

fn allocation_flags(flags: StatusFlags) -> StateFlags {
    let mut out = StateFlags::empty();
    out.set(StateFlags::NBD_STATE_HOLE, !flags.contains(StatusFlags::DATA));
    out.set(StateFlags::NBD_STATE_ZERO, flags.contains(StatusFlags::ZERO));
    out
}

/// Moves the boundaries between extents to multiples of `min`: a block that two extents share gets the bits that both
/// have (0 is always a safe answer). The end of the range stays where it is.
fn align_extents(extents: &[StatusExtent], offset: u64, min: u32) -> Vec<StatusExtent> {
    let min = u64::from(min);
    let mut out: Vec<StatusExtent> = Vec::new();
    let mut push = |len: u64, flags: u32| {
        if len == 0 {
            return;
        }
        match out.last_mut() {
            Some(last) if last.flags == flags => last.len += len as u32,
            _ => out.push(StatusExtent { len: len as u32, flags }),
        }
    };
    // `pos` is how far `out` reaches; `shared` are the bits of the unfinished block that begins there.
    let mut pos = offset;
    let mut start = offset;
    let mut shared: Option<u32> = None;
    for (i, extent) in extents.iter().enumerate() {
        let end = start + u64::from(extent.len);
        let last = i + 1 == extents.len();
        if let Some(bits) = shared {
            let block_end = (pos / min + 1) * min;
            if end < block_end && !last {
                shared = Some(bits & extent.flags);
                start = end;
                continue;
            }
            let until = block_end.min(end);
            push(until - pos, bits & extent.flags);
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

    fn e(len: u32, flags: u32) -> StatusExtent {
        StatusExtent { len, flags }
    }

    #[test]
    fn boundaries_move_to_blocks() {
        let check = |offset, input: &[StatusExtent], want: &[StatusExtent]| {
            assert_eq!(align_extents(input, offset, 512), want, "{input:?} at {offset}");
        };
        check(0, &[e(1024, 3)], &[e(1024, 3)]);
        check(0, &[e(100, 3)], &[e(100, 3)]);
        check(0, &[e(512, 3), e(512, 0)], &[e(512, 3), e(512, 0)]);
        check(0, &[e(600, 3), e(424, 0)], &[e(512, 3), e(512, 0)]);
        check(0, &[e(500, 0), e(1548, 3)], &[e(512, 0), e(1536, 3)]);
        check(0, &[e(500, 3), e(10, 2), e(2, 3), e(512, 3)], &[e(512, 2), e(512, 3)]);
        check(512, &[e(100, 3), e(1, 0), e(411, 3), e(512, 3)], &[e(512, 0), e(512, 3)]);
        check(0, &[e(600, 3), e(10, 0)], &[e(512, 3), e(98, 0)]);
    }

    proptest! {
        #[test]
        fn aligning_claims_nothing_new(parts in proptest::collection::vec((1u32..2000, 0u32..4), 1..20)) {
            let input: Vec<StatusExtent> = parts.iter().map(|(l, f)| e(*l, *f)).collect();
            let out = align_extents(&input, 0, 512);
            let flat = |v: &[StatusExtent]| {
                v.iter().flat_map(|x| std::iter::repeat_n(x.flags, x.len as usize)).collect::<Vec<u32>>()
            };
            let (a, b) = (flat(&input), flat(&out));
            prop_assert_eq!(a.len(), b.len());
            for (a, b) in a.iter().zip(&b) {
                prop_assert_eq!(a & b, *b);
            }
            let mut at = 0u64;
            for x in &out[..out.len() - 1] {
                at += u64::from(x.len);
                prop_assert_eq!(at % 512, 0);
            }
        }
    }
}
