//! Metadata contexts beyond `base:allocation`: allocation depth and dirty bitmaps, on a node that has both by hand.

use super::nbd_common::*;
use conbd::block::{
    self, BlockBackend, BlockNode, DepthExtent, DirtyBitmap, DirtyExtent, Extent, Limits, MemoryNode,
    RawNode, WriteFlags,
};
use conbd::nbd::export::{Export, ExportError, ExportOptions};
use conbd::nbd::proto::*;
use conbd::nbd::wire::*;
use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;

pub(crate) const SIZE: u64 = 1 << 20;
const K64: u64 = 65_536;

/// Memory that claims to be a chain of layers: each 64 KiB has the depth of a table, repeated. And it has bitmaps: bit
/// `i` of a pattern is the state of the i-th 64 KiB.
pub(crate) struct Layered {
    memory: MemoryNode,
    depths: Vec<u32>,
    bitmaps: Vec<(String, u16)>,
}

struct Pattern(String, u16);

/// Length of the run of blocks that are `same` as the one at `offset`.
fn run(offset: u64, len: u64, same: impl Fn(u64, u64) -> bool) -> u64 {
    let first = offset / K64;
    let mut end = first + 1;
    while end * K64 < offset + len && same(first, end) {
        end += 1;
    }
    (end * K64).min(offset + len) - offset
}

impl DirtyBitmap for Pattern {
    fn name(&self) -> &str {
        &self.0
    }
    fn granularity(&self) -> u64 {
        K64
    }
    fn co_status(&self, offset: u64, len: u64) -> block::Result<DirtyExtent> {
        let bit = |i: u64| self.1 >> (i % 16) & 1;
        Ok(DirtyExtent { len: run(offset, len, |a, b| bit(a) == bit(b)), dirty: bit(offset / K64) == 1 })
    }
}

impl BlockNode for Layered {
    fn name(&self) -> &str {
        "layered"
    }
    fn len(&self) -> u64 {
        self.memory.len()
    }
    fn read_only(&self) -> bool {
        false
    }
    fn limits(&self) -> Limits {
        self.memory.limits()
    }
    fn co_preadv(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> block::Result<()> {
        self.memory.co_preadv(offset, bufs)
    }
    fn co_pwritev(&self, offset: u64, bufs: &[IoSlice<'_>], flags: WriteFlags) -> block::Result<()> {
        self.memory.co_pwritev(offset, bufs, flags)
    }
    fn co_pwrite_zeroes(&self, offset: u64, len: u64, flags: WriteFlags) -> block::Result<()> {
        self.memory.co_pwrite_zeroes(offset, len, flags)
    }
    fn co_pdiscard(&self, offset: u64, len: u64) -> block::Result<()> {
        self.memory.co_pdiscard(offset, len)
    }
    fn co_flush(&self) -> block::Result<()> {
        Ok(())
    }
    fn co_block_status(&self, offset: u64, len: u64) -> block::Result<Extent> {
        self.memory.co_block_status(offset, len)
    }
    fn co_allocation_depth(&self, offset: u64, len: u64) -> block::Result<DepthExtent> {
        let depth = |i: u64| self.depths[i as usize % self.depths.len()];
        Ok(DepthExtent { len: run(offset, len, |a, b| depth(a) == depth(b)), depth: depth(offset / K64) })
    }
    fn dirty_bitmaps(&self) -> Vec<Arc<dyn DirtyBitmap>> {
        self.bitmaps.iter().map(|(n, b)| Arc::new(Pattern(n.clone(), *b)) as Arc<dyn DirtyBitmap>).collect()
    }
}

pub(crate) fn layered(size: u64) -> Layered {
    Layered {
        memory: MemoryNode::new("m", size).unwrap(),
        depths: vec![0, 1, 1, 2],
        bitmaps: vec![("one".into(), 0b0011), ("two:b".into(), 0xff00)],
    }
}

fn options(bitmaps: &[&str]) -> ExportOptions {
    ExportOptions {
        allocation_depth: true,
        bitmaps: bitmaps.iter().map(|b| (*b).to_owned()).collect(),
        ..ExportOptions::default()
    }
}

fn export(bitmaps: &[&str]) -> Arc<Export> {
    Export::new(options(bitmaps), BlockBackend::new(Arc::new(layered(SIZE)))).unwrap()
}

fn names(c: &mut Raw, option: u32, queries: &[&str]) -> Vec<(u32, String)> {
    let mut data = Vec::new();
    MetaContextRequest::put(&mut data, "", queries);
    let replies = c.opt(option, &data);
    assert_eq!(replies.last().unwrap().0, NBD_REP_ACK);
    replies[..replies.len() - 1]
        .iter()
        .map(|(kind, data)| {
            assert_eq!(*kind, NBD_REP_META_CONTEXT);
            let context = RepMetaContext::decode(data).unwrap();
            (context.id, context.name.to_owned())
        })
        .collect()
}

const ALL: [&str; 4] =
    ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:one", "qemu:dirty-bitmap:two:b"];

#[test]
fn listing_knows_the_wildcards_of_the_qemu_namespace_81_82_90() {
    let t = TestServer::unix(vec![export(&["one", "two:b"])]);
    let mut c = t.haggle();
    c.opt(NBD_OPT_STRUCTURED_REPLY, b"");
    let mut list = |queries: &[&str]| {
        let found = names(&mut c, NBD_OPT_LIST_META_CONTEXT, queries);
        assert!(found.iter().all(|(id, _)| *id == 0), "82: ids mean nothing in a list");
        found.into_iter().map(|(_, name)| name).collect::<Vec<_>>()
    };
    assert_eq!(list(&[]), ALL, "81: no query lists all");
    assert_eq!(list(&[""]), ALL);
    assert_eq!(list(&["base:"]), ALL[..1]);
    assert_eq!(list(&["qemu:"]), ALL[1..]);
    assert_eq!(list(&["qemu:dirty-bitmap:"]), ALL[2..]);
    assert_eq!(list(&["qemu:dirty-bitmap:two:b", "qemu:allocation-depth"]), [ALL[1], ALL[3]]);
    assert_eq!(list(&["qemu:dirty-bitmap", "qemu:dirty-bitmap:three", "qemu", "qemu:alloc"]), [""; 0]);
}

#[test]
fn selecting_takes_whole_names_only_79_83_86_90() {
    let t = TestServer::unix(vec![export(&["one", "two:b"])]);
    let mut c = t.haggle();
    c.opt(NBD_OPT_STRUCTURED_REPLY, b"");
    let set = |c: &mut Raw, queries: &[&str]| names(c, NBD_OPT_SET_META_CONTEXT, queries);
    assert_eq!(set(&mut c, &["qemu:", "qemu:dirty-bitmap:", "", "base:", "qemu:dirty-bitmap:none"]), []);
    let all = set(&mut c, &["qemu:dirty-bitmap:two:b", ALL[0], ALL[1], ALL[2], ALL[2]]);
    assert_eq!(all.iter().map(|(_, n)| n.as_str()).collect::<Vec<_>>(), ALL);
    let mut ids: Vec<u32> = all.iter().map(|(id, _)| *id).collect();
    ids.dedup();
    assert_eq!(ids.len(), 4, "86: ids are unique");
}

#[test]
fn what_was_not_configured_is_not_there_90() {
    let t = TestServer::unix(vec![
        Export::new(ExportOptions::default(), BlockBackend::new(Arc::new(layered(SIZE)))).unwrap(),
    ]);
    let mut c = t.haggle();
    c.opt(NBD_OPT_STRUCTURED_REPLY, b"");
    let found = names(&mut c, NBD_OPT_LIST_META_CONTEXT, &[]);
    assert_eq!(found, [(0, ALL[0].to_owned())]);
    assert_eq!(names(&mut c, NBD_OPT_SET_META_CONTEXT, &[ALL[1], ALL[2]]), []);
}

#[test]
fn an_unknown_bitmap_is_named_with_those_that_exist() {
    let make =
        |bitmaps: &[&str], node: Arc<dyn BlockNode>| Export::new(options(bitmaps), BlockBackend::new(node));
    let e = make(&["one", "nine"], Arc::new(layered(SIZE))).unwrap_err();
    assert!(matches!(&e, ExportError::NoSuchBitmap { bitmap, .. } if bitmap == "nine"));
    let text = e.to_string();
    assert!(text.contains("'nine'") && text.contains("'one', 'two:b'"), "{text}");
    let text = make(&["x"], Arc::new(MemoryNode::new("m", 0).unwrap())).unwrap_err().to_string();
    assert!(text.contains("'x'") && text.contains("it has none"), "{text}");
    let twice = make(&["one", "one"], Arc::new(layered(SIZE))).unwrap();
    assert_eq!(twice.contexts().len(), 3);
    let mut long = layered(SIZE);
    long.bitmaps.push(("x".repeat(4090), 1));
    assert!(matches!(
        make(&["x".repeat(4090).as_str()], Arc::new(long)),
        Err(ExportError::BadBitmapName { .. })
    ));
}

/// Status chunks of one reply, by context id.
pub(crate) fn statuses(replies: &[Reply]) -> Vec<(u32, Vec<StatusExtent>)> {
    assert_eq!(Raw::error_of(replies), 0);
    replies
        .iter()
        .map(|reply| {
            let Reply::Chunk { kind, payload, .. } = reply else { panic!("146: a chunk") };
            let Chunk::BlockStatus { context_id, extents } = Chunk::decode(*kind, payload).unwrap() else {
                panic!("146: a status chunk")
            };
            (context_id, extents)
        })
        .collect()
}

fn runs(extents: &[StatusExtent]) -> Vec<(u64, u64)> {
    extents.iter().map(|e| (e.len / K64, e.flags)).collect()
}

#[test]
fn each_context_answers_in_its_own_chunk_90_146_147_148() {
    // The window shifts all by 64 KiB, and ends inside of a run.
    let node: Arc<dyn BlockNode> = Arc::new(layered(SIZE));
    let window = Arc::new(RawNode::new("w", node, K64, Some(10 * K64)).unwrap());
    let e = Export::new(options(&["one", "two:b"]), BlockBackend::new(window)).unwrap();
    let t = TestServer::unix(vec![e]);
    let mut c = t.haggle();
    c.opt(NBD_OPT_STRUCTURED_REPLY, b"");
    let set = names(&mut c, NBD_OPT_SET_META_CONTEXT, &ALL);
    let id = |name: &str| set.iter().find(|(_, n)| n == name).unwrap().0;
    c.go("");
    assert_eq!(c.write(0, 3 * K64, &[1; 100]), 0);
    c.send_req(NBD_CMD_BLOCK_STATUS, 0, 5, 0, (10 * K64) as u32);
    let replies = c.recv_chunks(5);
    let done: Vec<bool> = replies.iter().map(|r| matches!(r, Reply::Chunk { done: true, .. })).collect();
    assert_eq!(done, [false, false, false, true], "105: DONE on the last chunk only");
    let got = statuses(&replies);
    let of = |name: &str| runs(&got.iter().find(|(i, _)| *i == id(name)).unwrap().1);
    assert_eq!(of(ALL[0]), [(3, 3), (1, 0), (6, 3)]);
    assert_eq!(of(ALL[1]), [(2, 1), (1, 2), (1, 0), (2, 1), (1, 2), (1, 0), (2, 1)]);
    assert_eq!(of(ALL[2]), [(1, 1), (9, 0)]);
    assert_eq!(of(ALL[3]), [(7, 0), (3, 1)]);
    c.send_req(NBD_CMD_BLOCK_STATUS, 1 << 3, 6, 7 * K64 + 1, (2 * K64) as u32);
    for (i, extents) in statuses(&c.recv_chunks(6)) {
        assert_eq!(extents.len(), 1, "148: one extent");
        let want = if i == id(ALL[1]) { K64 - 1 } else { 2 * K64 };
        assert_eq!(extents[0].len, want, "148: not longer than the request");
    }
    c.disc();
}
