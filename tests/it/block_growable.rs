//! What an image format lies on: nodes that are as long as what was written to them.

use crate::support::{engines, iothread, run_in_coroutine, spawn_in};
use conbd::block::{
    BlockNode, CacheMode, FaultNode, FaultOps, FileNode, FileOptions, MemoryNode, StatusFlags, WriteFlags,
};
use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;

fn co_read(n: &dyn BlockNode, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xee; len];
    n.co_preadv(offset, &mut [IoSliceMut::new(&mut buf)]).expect("read");
    buf
}

fn co_write(n: &dyn BlockNode, offset: u64, data: &[u8]) {
    n.co_pwritev(offset, &[IoSlice::new(data)], WriteFlags::empty()).expect("write");
}

fn growable_files(dir: &std::path::Path) -> Vec<(String, Arc<dyn BlockNode>)> {
    let mut nodes: Vec<(String, Arc<dyn BlockNode>)> = Vec::new();
    for (name, cache) in [("writeback", CacheMode::Writeback), ("none", CacheMode::None)] {
        let path = dir.join(name);
        std::fs::write(&path, b"").unwrap();
        let options = FileOptions { cache, growable: true, ..FileOptions::new(&path) };
        nodes.push((
            name.to_owned(),
            Arc::new(FileNode::open(&options).expect("an empty growable file opens")),
        ));
    }
    nodes.push(("memory".to_owned(), Arc::new(MemoryNode::growable("memory"))));
    let fault = FaultNode::new("fault", Arc::new(MemoryNode::growable("below")));
    nodes.push(("fault".to_owned(), fault));
    nodes
}

#[test]
fn growable_nodes_grow_and_read_zeroes_past_their_end() {
    for engine in engines() {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let nodes = growable_files(dir.path());
        let t = iothread("io0", engine);
        run_in_coroutine(t.context(), move || {
            for (name, n) in &nodes {
                let n = &**n;
                assert!(n.grows(), "{name}");
                assert_eq!(n.len(), 0, "{name}");
                assert_eq!(co_read(n, 1 << 40, 5000), vec![0; 5000], "{name}");
                co_write(n, 1000, &[7; 100]);
                assert!(n.len() >= 1100, "{name}: {}", n.len());
                assert_eq!(co_read(n, 999, 102), [&[0][..], &[7; 100], &[0]].concat(), "{name}");
                n.co_pwrite_zeroes(1050, 1 << 20, WriteFlags::empty()).expect("zero over the end");
                assert!(n.len() >= 1050 + (1 << 20), "{name}: {}", n.len());
                assert_eq!(co_read(n, 1000, 100), [[7; 50], [0; 50]].concat(), "{name}");
                let e = n.co_block_status(1 << 41, 99).expect("status past the end");
                assert_eq!((e.len, e.flags), (99, StatusFlags::ZERO), "{name}");
                let long = n.len() + 4096;
                n.co_truncate(long).expect("grow");
                assert_eq!(n.len(), long, "{name}");
                n.co_truncate(1020).expect("shrink");
                assert_eq!(n.len(), 1020, "{name}");
                n.co_truncate(4096).expect("grow again");
                assert_eq!(co_read(n, 1000, 100), [[7; 20].as_slice(), &[0; 80]].concat(), "{name}");
            }
        });
        t.stop().unwrap();
    }
}

#[test]
fn a_cached_file_grows_in_the_writers_own_turn() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, b"").unwrap();
    let n = FileNode::open(&FileOptions { growable: true, ..FileOptions::new(&path) }).expect("opens");
    // Far past the end: what is between is a hole.
    for (at, fill, len) in [(8192, 1, 12288), (4096, 2, 12288), (12288, 3, 16384), (8192, 4, 16384)] {
        n.try_pwrite(at, &[fill; 4096]).expect("tried").expect("written");
        assert_eq!(n.len(), len);
    }
    let got = std::fs::read(&path).expect("read");
    let want = [[0; 4096], [2; 4096], [4; 4096], [3; 4096]].concat();
    assert!(got == want, "{} bytes", got.len());
}

#[test]
fn growing_by_size_never_cuts_off_a_write_that_grows_too() {
    for engine in engines() {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        for (name, n) in growable_files(dir.path()) {
            let threads = [iothread("io0", engine), iothread("io1", engine)];
            let writes = Arc::clone(&n);
            let writer = spawn_in(threads[0].context(), move || {
                for i in 0..300u64 {
                    co_write(&*writes, i * 8192, &[i as u8 | 1; 4096]);
                }
            });
            let zeroes = Arc::clone(&n);
            let grower = spawn_in(threads[1].context(), move || {
                for i in 0..300u64 {
                    zeroes.co_pwrite_zeroes(i * 8192 + 4096, 4096, WriteFlags::empty()).expect("zeroes");
                }
            });
            writer.join();
            grower.join();
            assert_eq!(n.len(), 600 * 4096, "{name}");
            run_in_coroutine(threads[0].context(), move || {
                for i in 0..300u64 {
                    assert_eq!(co_read(&*n, i * 8192, 4096), [i as u8 | 1; 4096], "{name}, block {i}");
                }
            });
            for t in threads {
                t.stop().unwrap();
            }
        }
    }
}

#[test]
fn nodes_that_do_not_grow_say_so() {
    let t = iothread("io0", engines()[0]);
    run_in_coroutine(t.context(), || {
        let n = MemoryNode::new("m", 4096).expect("memory");
        assert!(!n.grows());
        assert_eq!(n.co_truncate(8192).expect_err("fixed size").errno(), libc::ENOTSUP);
        assert!(FaultOps::all().contains(FaultOps::TRUNCATE));
    });
    t.stop().unwrap();
}
