//! Block devices: size, zeroing, discard, partial sectors, by a loop device where the machine lets us make one.

use crate::support::{Loop, engines, iothread, run_in_coroutine};
use conbd::block::{BlockNode, CacheMode, Extent, FileNode, FileOptions, StatusFlags, WriteFlags};
use std::io::{IoSlice, IoSliceMut};
use std::os::unix::fs::MetadataExt;

const MIB: u64 = 1 << 20;

fn co_read(node: &FileNode, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xee; len];
    node.co_preadv(offset, &mut [IoSliceMut::new(&mut buf)]).expect("read");
    buf
}

#[test]
fn device_is_read_written_zeroed_and_discarded() {
    let dir = tempfile::tempdir().unwrap();
    let backing = dir.path().join("backing");
    std::fs::write(&backing, vec![3u8; 8 * MIB as usize]).unwrap();
    let Some(l) = Loop::new(&backing, "block devices") else { return };
    for engine in engines() {
        for cache in [CacheMode::Writeback, CacheMode::None] {
            let node = FileNode::open(&FileOptions { cache, ..FileOptions::new(&l.device) }).unwrap();
            assert!(node.is_device());
            assert_eq!(node.len(), 8 * MIB);
            let t = iothread("t", engine);
            run_in_coroutine(t.context(), move || {
                let fill = vec![3u8; 8 * MIB as usize];
                node.co_pwritev(0, &[IoSlice::new(&fill)], WriteFlags::FUA).expect("write");
                assert_eq!(
                    node.co_block_status(MIB, MIB).expect("status"),
                    Extent { len: MIB, flags: StatusFlags::DATA }
                );
                // Odd ends on both sides.
                node.co_pwrite_zeroes(1001, MIB, WriteFlags::empty()).expect("zeroes");
                let all = co_read(&node, 0, 2 * MIB as usize);
                let (low, high) = (1001, 1001 + MIB as usize);
                assert!(all[..low].iter().all(|&b| b == 3));
                assert!(all[low..high].iter().all(|&b| b == 0));
                assert!(all[high..].iter().all(|&b| b == 3));
                // Less than a sector, and across the border of two.
                node.co_pwrite_zeroes(3 * MIB + 10, 20, WriteFlags::MAY_UNMAP).expect("zeroes");
                node.co_pwrite_zeroes(3 * MIB + 500, 20, WriteFlags::NO_FALLBACK)
                    .expect("a write is quick here");
                let some = co_read(&node, 3 * MIB, 600);
                for (i, &b) in some.iter().enumerate() {
                    assert_eq!(b == 0, (10..30).contains(&i) || (500..520).contains(&i), "byte {i}");
                }
                let e = node
                    .co_pwrite_zeroes(4 * MIB, MIB, WriteFlags::NO_FALLBACK)
                    .expect_err("BLKZEROOUT may be slow");
                assert_eq!(e.errno(), libc::ENOTSUP);
                assert!(co_read(&node, 4 * MIB, MIB as usize).iter().all(|&b| b == 3), "nothing was changed");
                node.co_pwrite_zeroes(5 * MIB, MIB, WriteFlags::MAY_UNMAP | WriteFlags::FUA).expect("unmap");
                assert!(co_read(&node, 5 * MIB, MIB as usize).iter().all(|&b| b == 0));
                // Rounds inward to sectors.
                node.co_pdiscard(6 * MIB + 100, MIB).expect("discard");
                let all = co_read(&node, 6 * MIB, 2 * MIB as usize);
                assert!(all[..512].iter().all(|&b| b == 3));
                assert!(all[512 + MIB as usize..].iter().all(|&b| b == 3));
                assert!(all[512..MIB as usize].iter().all(|&b| b == 0), "a loop device punches its file");
                node.co_flush().expect("flush");
                node.co_cache(0, 8 * MIB).expect("prefetch");
            });
            assert!(std::fs::metadata(&backing).unwrap().blocks() * 512 <= 7 * MIB, "space was given back");
        }
    }
}
