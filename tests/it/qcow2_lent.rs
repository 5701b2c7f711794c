//! Lending pages of qcow2 images to sockets: what is lent, that it is right, and that nobody is shown what a cluster holds once it has
//! been freed and its place could have been used again.

use crate::nbd_common::*;
use crate::qcow2_node::{check, co_open, co_read, file, qemu_img, through_qemu};
use crate::support::{engines, iothread, run_in_coroutine, skip};
use conbd::block::qcow2::{Qcow2Node, Qcow2OpenOptions};
use conbd::block::{BlockNode, DiscardMode, WriteFlags};
use conbd::nbd::proto::*;
use std::io::{IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const C: u64 = 65_536;

fn image(dir: &Path, size: &str, cluster: &str, base: Option<&Path>) -> PathBuf {
    let path = dir.join("image.qcow2");
    let cluster = format!("cluster_size={cluster}");
    let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &cluster];
    if let Some(base) = base {
        args.extend(["-b", base.to_str().unwrap(), "-F", "raw"]);
    }
    qemu_img(&[&args[..], &[path.to_str().unwrap(), size]].concat());
    path
}

/// Whether this kernel tells what is in the page cache, as lending needs; says aloud if not.
fn can_lend(what: &str) -> bool {
    let file = tempfile::tempfile().unwrap();
    match conbd::util::sys::all_cached(&file, 0, 1) {
        Ok(_) => true,
        Err(e) => {
            skip(what, &format!("cachestat: {e}; Linux 6.5 has it"));
            false
        }
    }
}

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Runs in a coroutine.
fn run<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = iothread("io", engines()[0]);
    let value = run_in_coroutine(thread.context(), f);
    thread.stop().unwrap();
    value
}

fn write(n: &Qcow2Node, offset: u64, len: u64, value: u8) {
    n.co_pwritev(offset, &[IoSlice::new(&vec![value; len as usize])], WriteFlags::empty()).expect("write");
}

/// What would be sent of a range, piece by piece, if all of it is lent; and how many pieces that takes.
fn lent(n: &dyn BlockNode, offset: u64, len: usize) -> Option<(Vec<u8>, usize)> {
    if !n.lends(offset, len, false) {
        return None;
    }
    let (mut got, mut pieces) = (Vec::new(), 0);
    while got.len() < len {
        pieces += 1;
        let shown = n.try_lend(offset + got.len() as u64, len - got.len(), &mut |l| {
            let mut part = vec![0; l.len];
            let file = std::fs::File::from(l.file.try_clone_to_owned().unwrap());
            file.read_exact_at(&mut part, l.offset).unwrap();
            got.extend(part);
        });
        assert!(shown, "what lends() has promised");
    }
    assert_eq!(got.len(), len, "never more than asked");
    Some((got, pieces))
}

#[test]
fn data_is_lent_piece_by_piece_from_the_image_and_from_those_below() {
    if !can_lend("what is lent of qcow2 images") {
        return;
    }
    let dir = scratch();
    let base = dir.path().join("base.raw");
    let mut want = (0..1 << 20).map(|i| (i / 4096 % 251) as u8 + 1).collect::<Vec<u8>>();
    std::fs::write(&base, &want).unwrap();
    let path = image(dir.path(), "1M", "64k", Some(&base));
    let p = path.clone();
    let (b, c) = (base.clone(), C as usize);
    want[c..2 * c].fill(0x11);
    want[2 * c..3 * c].fill(0x22);
    want[8 * c..9 * c].fill(0);
    let all = want.clone();
    run(move || {
        let backing = || Some(file(&b, true));
        let n = co_open(&p, Qcow2OpenOptions { backing: backing(), ..Default::default() });
        // In this order: two neighbours in the disk that are none in the file.
        write(&n, 2 * C, C, 0x22);
        write(&n, C, C, 0x11);
        n.co_pwrite_zeroes(8 * C, C, WriteFlags::MAY_UNMAP).expect("zeroes");
        n.co_flush().expect("flush");
        co_read(&*n, 0, 1 << 20);
        for at in [C - 4096, 2 * C - 4096, 3 * C - 4096, 5 * C] {
            let mut got = [[0xee; 4096], [0xee; 4096]];
            let [a, b] = &mut got;
            let k = n.try_preadv_some(at, &mut [IoSliceMut::new(a), IoSliceMut::new(b)]);
            assert_eq!(k, 8192, "all of it is in memory");
            assert_eq!(got.concat(), all[at as usize..at as usize + 8192], "at {at:#x}");
        }
        n.co_close().expect("close");
        for read_only in [true, false] {
            for discard in [DiscardMode::Unmap, DiscardMode::Ignore] {
                let options =
                    Qcow2OpenOptions { backing: backing(), read_only, discard, ..Default::default() };
                let n = co_open(&p, options);
                co_read(&*n, 0, 1 << 20);
                // Places in a file can be given up for good only where their space goes back to the host.
                let own = read_only || discard == DiscardMode::Unmap;
                let ranges = [
                    (C, c, 1, own),
                    (C + 4096, 4096, 1, own),
                    (C, 2 * c, 2, own),
                    (0, 3 * c, 3, own),
                    (0, c, 1, true),
                    (5 * C + 512, 3 * c - 1024, 1, true),
                    // Zeroes are nowhere.
                    (7 * C, 2 * c, 2, false),
                    (8 * C, c, 1, false),
                ];
                for (at, len, pieces, lends) in ranges {
                    let want = lends.then(|| (all[at as usize..at as usize + len].to_vec(), pieces));
                    let got = lent(&*n, at, len);
                    let what = (got.is_some(), got.as_ref().map(|g| g.1));
                    assert!(
                        got == want,
                        "{len} bytes at {at:#x}, read-only {read_only}, {discard:?}: {what:?}"
                    );
                }
                n.co_close().expect("close");
            }
        }
    });
    assert!(through_qemu(&path, dir.path()) == want);
}

/// Where the clusters are in the file.
fn hosts(n: &Qcow2Node, clusters: std::ops::Range<u64>) -> Vec<u64> {
    clusters.map(|c| n.co_host_offset(c * C).expect("mapping").expect("allocated")).collect()
}

/// Writes new clusters until whatever may be reused would have been.
fn fill(n: &Qcow2Node, clusters: std::ops::Range<u64>) -> Vec<u64> {
    for c in clusters.clone() {
        write(n, c * C, C, 0xbb);
        if c % 3 == 0 {
            n.co_flush().expect("flush");
        }
    }
    n.co_flush().expect("flush");
    hosts(n, clusters)
}

#[test]
fn the_place_of_a_lent_cluster_is_given_back_and_not_used_again_before_the_image_is_opened_again() {
    if !can_lend("lent clusters that are freed") {
        return;
    }
    let dir = scratch();
    let path = image(dir.path(), "64M", "64k", None);
    let p = path.clone();
    let lent_at = run(move || {
        let n = co_open(&p, Qcow2OpenOptions::default());
        write(&n, 0, 16 * C, 0x11);
        n.co_flush().expect("flush");
        let before = hosts(&n, 0..16);
        // Parts of clusters are enough; and some are never freed.
        assert_eq!(lent(&*n, 4 * C + 100, 3 * C as usize).expect("in memory").0, vec![0x11; 3 * C as usize]);
        assert!(lent(&*n, 20, 100).is_some());
        n.co_pdiscard(C, 15 * C).expect("discard");
        let after = fill(&n, 64..256);
        let lent_at = before[4..8].to_vec();
        let others = [&before[1..4], &before[8..]].concat();
        assert!(!after.iter().any(|h| lent_at.contains(h)), "a socket may still hold on to its pages");
        assert!(others.iter().all(|h| after.contains(h)), "what was not lent is used again");
        assert_eq!(hosts(&n, 0..1), before[..1], "and what was not freed stays");
        n.co_close().expect("close");
        lent_at
    });
    check(&path);
    // The host has its space back.
    let f = std::fs::File::open(&path).unwrap();
    for at in &lent_at {
        let data = rustix::fs::seek(&f, rustix::fs::SeekFrom::Data(*at)).unwrap();
        assert!(data >= at + C, "there is still data at {data:#x}, in the cluster at {at:#x}");
    }
    let p = path.clone();
    run(move || {
        let n = co_open(&p, Qcow2OpenOptions::default());
        let after = fill(&n, 300..332);
        assert!(lent_at.iter().all(|h| after.contains(h)), "nobody holds on to them any more");
        n.co_close().expect("close");
    });
    check(&path);
}

#[test]
fn a_client_that_reads_late_is_not_shown_what_its_clusters_became() {
    // More than a socket holds.
    const LEN: u32 = 8 << 20;
    let dir = scratch();
    // Smaller than the pages' folios, which outlive the punching of a part while somebody holds on to them.
    const C: u64 = 4096;
    let path = image(dir.path(), "64M", "4k", None);
    let p = path.clone();
    let value = |cluster: u64| (cluster % 97) as u8 + 1;
    let node: Arc<Qcow2Node> = run(move || {
        let n = co_open(&p, Qcow2OpenOptions::default());
        let data: Vec<u8> = (0..u64::from(LEN)).map(|at| value(at / C)).collect();
        n.co_pwritev(0, &[IoSlice::new(&data)], WriteFlags::empty()).expect("write");
        n.co_flush().expect("flush");
        co_read(&*n, 0, LEN as usize);
        n
    });
    let t = TestServer::unix(vec![export_of("", node.clone())]);
    let mut late = t.go("", false);
    late.send_req(NBD_CMD_READ, 0, 7, 0, LEN);
    let Reply::Simple { error, cookie } = late.recv_reply() else { panic!("a simple reply") };
    assert_eq!((error, cookie), (0, 7));
    // As much of the data as fits is in the socket now, or soon.
    let mut other = t.go("", false);
    for at in (0..u64::from(LEN)).step_by(2 * C as usize) {
        assert_eq!(other.call(NBD_CMD_TRIM, 0, at, C as u32), 0);
    }
    for c in 4096..4608u64 {
        assert_eq!(other.write(0, c * C, &vec![0xbb; C as usize]), 0);
        if c < 4104 {
            assert_eq!(other.call(NBD_CMD_FLUSH, 0, 0, 0), 0);
        }
    }
    let got = late.recv(LEN as usize);
    let kept = |at: usize| (at as u64 / C) % 2 == 1;
    let wrong =
        got.iter().enumerate().find(|(at, b)| **b != value(*at as u64 / C) && (**b != 0 || kept(*at)));
    assert_eq!(wrong, None, "it was data, and what was trimmed then zeroes; this is another cluster's");
    if conbd::util::fast::paths().lend_from < usize::MAX && can_lend("a reply that is sent late") {
        assert!(got.contains(&0), "what was sent late was looked up again");
    }
    late.disc();
    other.disc();
    drop(t);
    run(move || node.co_close().expect("close"));
    check(&path);
}

#[test]
fn no_more_places_are_lost_than_the_disk_has_clusters() {
    if !can_lend("the bound of what lending costs") {
        return;
    }
    let dir = scratch();
    let path = image(dir.path(), "1M", "64k", None);
    let p = path.clone();
    let lost = run(move || {
        let n = co_open(&p, Qcow2OpenOptions::default());
        let mut lost = 0;
        // Far more often than there is room for.
        for _ in 0..8 {
            write(&n, 0, 16 * C, 0x11);
            n.co_flush().expect("flush");
            lost += 16 * u32::from(lent(&*n, 0, 16 * C as usize).is_some());
            n.co_pdiscard(0, 16 * C).expect("discard");
            // One commit for the unlinking, and one for each epoch.
            for _ in 0..3 {
                write(&n, 0, 512, 0x22);
                n.co_flush().expect("flush");
            }
        }
        n.co_close().expect("close");
        lost
    });
    assert!((16..=32).contains(&lost), "{lost} clusters of a disk that has 16");
    check(&path);
    let len = std::fs::metadata(&path).unwrap().len();
    assert!(len < 5 << 20, "{len} bytes for a disk of 1 MiB, with what threads have put by");
}
