//! Every node that stores bytes, against a vector of bytes: random sequences of all requests, at all alignments.

use crate::support::{engines, iothread, run_in_coroutine, tmpfs_dir};
use conbd::aio::engine::EngineChoice;
use conbd::block::{
    BlockBackend, BlockNode, CacheMode, FileNode, FileOptions, MemoryNode, RawNode, StatusFlags, WriteFlags,
};
use proptest::prelude::*;
use std::io::{IoSlice, IoSliceMut};
use std::path::Path;
use std::sync::Arc;

/// Not a multiple of anything.
const SIZE: u64 = 300_001;

#[derive(Debug, Clone)]
enum Step {
    Read { offset: u64, len: u64, cuts: u64, inline: bool },
    Write { offset: u64, len: u64, cuts: u64, value: u8, fua: bool, inline: bool },
    Zero { offset: u64, len: u64, unmap: bool, fast: bool, fua: bool },
    Discard { offset: u64, len: u64 },
    Status { offset: u64, len: u64 },
    Cache { offset: u64, len: u64 },
    Flush,
}

/// Ranges that like edges of blocks and pages.
fn range() -> impl Strategy<Value = (u64, u64)> {
    let edge = prop_oneof![
        0..SIZE,
        (0..SIZE / 512).prop_map(|n| n * 512),
        (0..SIZE / 4096).prop_map(|n| n * 4096),
        (0..SIZE / 65536).prop_map(|n| n * 65536),
        Just(SIZE - SIZE % 512),
    ];
    let len = prop_oneof![1u64..600, 4096u64..4097, 1u64..20_000, 60_000u64..200_000, Just(SIZE)];
    (edge, len).prop_map(|(o, l)| (o, l.min(SIZE - o)))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (range(), 1u64..5000, any::<bool>())
            .prop_map(|((offset, len), cuts, inline)| Step::Read { offset, len, cuts, inline }),
        4 => (range(), 1u64..5000, 1u8..255, any::<(bool, bool)>())
            .prop_map(|((offset, len), cuts, value, (fua, inline))| Step::Write { offset, len, cuts, value, fua, inline }),
        2 => (range(), any::<(bool, bool, bool)>())
            .prop_map(|((offset, len), (unmap, fast, fua))| Step::Zero { offset, len, unmap, fast, fua }),
        1 => range().prop_map(|(offset, len)| Step::Discard { offset, len }),
        2 => range().prop_map(|(offset, len)| Step::Status { offset, len }),
        1 => range().prop_map(|(offset, len)| Step::Cache { offset, len }),
        1 => Just(Step::Flush),
    ]
}

/// Bytes that differ by place and by write.
fn pattern(offset: u64, len: u64, value: u8) -> Vec<u8> {
    (offset..offset + len).map(|i| value ^ (i as u8) ^ ((i >> 8) as u8) | 1).collect()
}

fn co_read(b: &BlockBackend, offset: u64, len: u64, cuts: u64) -> Vec<u8> {
    let mut buf = vec![0xee; len as usize];
    let mut bufs: Vec<IoSliceMut<'_>> = buf.chunks_mut(cuts as usize).map(IoSliceMut::new).collect();
    b.co_preadv(offset, &mut bufs).expect("read");
    drop(bufs);
    buf
}

/// Whether two slices are the same, without printing 300 KB when not.
fn same(what: &str, offset: u64, got: &[u8], want: &[u8]) -> Result<(), String> {
    match got.iter().zip(want).position(|(g, w)| g != w) {
        None if got.len() == want.len() => Ok(()),
        at => Err(format!("{what} at {offset}: differs at {:?}", at.map(|a| offset + a as u64))),
    }
}

fn co_apply(b: &BlockBackend, model: &mut [u8], step: &Step) -> Result<(), String> {
    let span = |offset: u64, len: u64| offset as usize..(offset + len) as usize;
    match *step {
        Step::Read { offset, len, cuts, inline } => {
            let mut buf = vec![0xee; len as usize];
            let n = if inline { b.try_pread_some(offset, &mut buf) } else { 0 };
            let rest = co_read(b, offset + n as u64, len - n as u64, cuts);
            buf[n..].copy_from_slice(&rest);
            same("read", offset, &buf, &model[span(offset, len)])
        }
        Step::Write { offset, len, cuts, value, fua, inline } => {
            let data = pattern(offset, len, value);
            let done = if inline && !fua { b.try_pwrite(offset, &data) } else { None };
            match done {
                Some(r) => r.map_err(|e| e.to_string())?,
                None => {
                    let bufs: Vec<IoSlice<'_>> = data.chunks(cuts as usize).map(IoSlice::new).collect();
                    let flags = if fua { WriteFlags::FUA } else { WriteFlags::empty() };
                    b.co_pwritev(offset, &bufs, flags).map_err(|e| e.to_string())?;
                }
            }
            model[span(offset, len)].copy_from_slice(&data);
            Ok(())
        }
        Step::Zero { offset, len, unmap, fast, fua } => {
            let mut flags = WriteFlags::empty();
            flags.set(WriteFlags::MAY_UNMAP, unmap);
            flags.set(WriteFlags::NO_FALLBACK, fast);
            flags.set(WriteFlags::FUA, fua);
            match b.co_pwrite_zeroes(offset, len, flags) {
                Ok(()) => model[span(offset, len)].fill(0),
                // Nothing has changed then; the final comparison sees to it.
                Err(e) if fast && e.errno() == libc::ENOTSUP => {}
                Err(e) => return Err(e.to_string()),
            }
            Ok(())
        }
        Step::Discard { offset, len } => {
            b.co_pdiscard(offset, len).map_err(|e| e.to_string())?;
            // What is there now is old or zero, and stays.
            let now = co_read(b, offset, len, len);
            for (i, (m, n)) in model[span(offset, len)].iter_mut().zip(now).enumerate() {
                if n != 0 && n != *m {
                    return Err(format!("discard made {n:#x} of {m:#x} at {}", offset + i as u64));
                }
                *m = n;
            }
            Ok(())
        }
        Step::Status { offset, len } => {
            let mut at = offset;
            while at < offset + len {
                let e = b.co_block_status(at, offset + len - at).map_err(|e| e.to_string())?;
                if e.flags.contains(StatusFlags::ZERO) && model[span(at, e.len)].iter().any(|&x| x != 0) {
                    return Err(format!("{e:?} at {at} is said to be zero and is not"));
                }
                at += e.len;
            }
            Ok(())
        }
        Step::Cache { offset, len } => b.co_cache(offset, len).map_err(|e| e.to_string()),
        Step::Flush => b.co_flush().map_err(|e| e.to_string()),
    }
}

/// Runs random sequences against what `make` opens; `check` looks at it afterwards.
fn differential(
    engine: EngineChoice,
    make: impl Fn() -> Arc<dyn BlockNode>,
    check: impl Fn() -> Result<(), String>,
) {
    let thread = iothread("model", engine);
    let config = ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() };
    proptest!(config, |(steps in proptest::collection::vec(step(), 1..40))| {
        let backend = BlockBackend::new(make());
        prop_assert_eq!(backend.len(), SIZE);
        let result = run_in_coroutine(thread.context(), move || {
            let mut model = vec![0u8; SIZE as usize];
            for s in &steps {
                co_apply(&backend, &mut model, s)?;
            }
            co_apply(&backend, &mut model, &Step::Status { offset: 0, len: SIZE })?;
            let all = co_read(&backend, 0, SIZE, 100_000);
            assert_eq!(backend.in_flight(), 0);
            same("at the end", 0, &all, &model)
        });
        prop_assert_eq!(result, Ok(()));
        prop_assert_eq!(check(), Ok(()));
    });
}

fn fresh_file(path: &Path, size: u64) {
    // Truncated to nothing first: the node before has been dropped.
    std::fs::File::create(path).and_then(|f| f.set_len(size)).expect("image file");
}

fn file_node(path: &Path, cache: CacheMode) -> FileNode {
    FileNode::open(&FileOptions { cache, ..FileOptions::new(path) }).expect("open")
}

fn files_match(dir: &Path, cache: CacheMode) {
    for engine in engines() {
        let path = dir.join("image");
        differential(
            engine,
            || {
                fresh_file(&path, SIZE);
                Arc::new(file_node(&path, cache))
            },
            || match std::fs::metadata(&path).expect("stat").len() {
                SIZE => Ok(()),
                n => Err(format!("the file has {n} bytes now")),
            },
        );
    }
}

#[test]
fn file_matches_model_on_disk() {
    files_match(tempfile::tempdir().unwrap().path(), CacheMode::Writeback);
}

#[test]
fn file_matches_model_on_tmpfs() {
    if let Some(dir) = tmpfs_dir() {
        files_match(dir.path(), CacheMode::Writeback);
    }
}

#[test]
fn direct_file_matches_model_and_its_odd_end_does_not_grow() {
    files_match(tempfile::tempdir().unwrap().path(), CacheMode::None);
}

#[test]
fn writethrough_and_unsafe_files_match_model() {
    files_match(tempfile::tempdir().unwrap().path(), CacheMode::Writethrough);
    files_match(tempfile::tempdir().unwrap().path(), CacheMode::Unsafe);
}

#[test]
fn memory_matches_model() {
    let check = || Ok(());
    differential(EngineChoice::Threads, || Arc::new(MemoryNode::new("mem", SIZE).expect("size")), check);
}

#[test]
fn raw_window_matches_model_and_touches_nothing_outside() {
    const OFFSET: u64 = 1234;
    const AFTER: u64 = 777;
    for cache in [CacheMode::Writeback, CacheMode::None] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        differential(
            EngineChoice::Auto,
            || {
                let mut image = vec![0u8; (OFFSET + SIZE + AFTER) as usize];
                image[..OFFSET as usize].fill(0xaa);
                image[(OFFSET + SIZE) as usize..].fill(0xbb);
                std::fs::write(&path, image).expect("image file");
                let file = Arc::new(file_node(&path, cache));
                Arc::new(RawNode::new("window", file, OFFSET, Some(SIZE)).expect("window"))
            },
            || {
                let image = std::fs::read(&path).expect("image file");
                same("before", 0, &image[..OFFSET as usize], &[0xaa; OFFSET as usize])?;
                same("after", OFFSET + SIZE, &image[(OFFSET + SIZE) as usize..], &[0xbb; AFTER as usize])
            },
        );
    }
}
