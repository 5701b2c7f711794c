//! Small helpers over vectors of buffers. Pure; no I/O.

use std::io::{IoSlice, IoSliceMut};

/// Entries that one system call takes at most (Linux: UIO_MAXIOV).
pub(crate) const IOV_MAX: usize = 1024;

/// Bytes of all buffers.
pub(crate) fn total(bufs: &[IoSlice<'_>]) -> usize {
    bufs.iter().map(|b| b.len()).sum()
}

/// Bytes of all buffers.
pub(crate) fn total_mut(bufs: &[IoSliceMut<'_>]) -> usize {
    bufs.iter().map(|b| b.len()).sum()
}

/// What is left after `skip` bytes and before `skip + len`, at most [`IOV_MAX`] entries of it.
pub(crate) fn window<'a>(bufs: &'a [IoSlice<'_>], skip: usize, len: usize) -> Vec<IoSlice<'a>> {
    let (mut skip, mut len) = (skip, len);
    let mut out = Vec::new();
    for b in bufs {
        if len == 0 || out.len() == IOV_MAX {
            break;
        }
        let from = skip.min(b.len());
        skip -= from;
        let n = (b.len() - from).min(len);
        if n > 0 {
            out.push(IoSlice::new(&b[from..from + n]));
            len -= n;
        }
    }
    out
}

/// What is left after `skip` bytes and before `skip + len`, at most [`IOV_MAX`] entries of it.
pub(crate) fn window_mut<'a>(bufs: &'a mut [IoSliceMut<'_>], skip: usize, len: usize) -> Vec<IoSliceMut<'a>> {
    let (mut skip, mut len) = (skip, len);
    let mut out = Vec::new();
    for b in bufs.iter_mut() {
        if len == 0 || out.len() == IOV_MAX {
            break;
        }
        let from = skip.min(b.len());
        skip -= from;
        let n = (b.len() - from).min(len);
        if n > 0 {
            out.push(IoSliceMut::new(&mut b[from..from + n]));
            len -= n;
        }
    }
    out
}

/// Copies `dst.len()` bytes from position `skip` of the buffers.
pub(crate) fn gather(bufs: &[IoSlice<'_>], skip: usize, dst: &mut [u8]) {
    let (mut skip, mut done) = (skip, 0);
    for b in bufs {
        let from = skip.min(b.len());
        skip -= from;
        let n = (b.len() - from).min(dst.len() - done);
        dst[done..done + n].copy_from_slice(&b[from..from + n]);
        done += n;
    }
    assert_eq!(done, dst.len(), "the buffers hold what is gathered");
}

/// Copies `src` to position `skip` of the buffers.
pub(crate) fn scatter(bufs: &mut [IoSliceMut<'_>], skip: usize, src: &[u8]) {
    let (mut skip, mut done) = (skip, 0);
    for b in bufs.iter_mut() {
        let from = skip.min(b.len());
        skip -= from;
        let n = (b.len() - from).min(src.len() - done);
        b[from..from + n].copy_from_slice(&src[done..done + n]);
        done += n;
    }
    assert_eq!(done, src.len(), "the buffers have room for what is scattered");
}

/// Zeroes the buffers from position `skip` on.
pub(crate) fn zero_from(bufs: &mut [IoSliceMut<'_>], skip: usize) {
    let mut skip = skip;
    for b in bufs.iter_mut() {
        let from = skip.min(b.len());
        skip -= from;
        b[from..].fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_cut_at_any_byte() {
        let data: Vec<u8> = (0..30).collect();
        let bufs = [
            IoSlice::new(&data[..7]),
            IoSlice::new(&[]),
            IoSlice::new(&data[7..8]),
            IoSlice::new(&data[8..]),
        ];
        for skip in 0..=30 {
            for len in 0..=30 - skip {
                let w: Vec<u8> = window(&bufs, skip, len).iter().flat_map(|b| b.iter().copied()).collect();
                assert_eq!(w, data[skip..skip + len]);
                let mut out = vec![0; len];
                gather(&bufs, skip, &mut out);
                assert_eq!(out, data[skip..skip + len]);
            }
        }
    }

    #[test]
    fn scatter_and_zero_touch_only_their_bytes() {
        for skip in 0..=10 {
            let (mut a, mut b) = ([9u8; 4], [9u8; 6]);
            let mut bufs = [IoSliceMut::new(&mut a), IoSliceMut::new(&mut b)];
            zero_from(&mut bufs, skip);
            let n = (10 - skip).min(3);
            scatter(&mut bufs, skip, &[1, 2, 3][..n]);
            let all: Vec<u8> = a.iter().chain(&b).copied().collect();
            for (i, &v) in all.iter().enumerate() {
                let want = if i < skip {
                    9
                } else if i < skip + n {
                    (i - skip + 1) as u8
                } else {
                    0
                };
                assert_eq!(v, want, "byte {i} with skip {skip}");
            }
        }
    }

    #[test]
    fn window_mut_is_bounded_by_the_kernels_vector_limit() {
        let mut store = vec![[0u8; 1]; IOV_MAX + 5];
        let mut bufs: Vec<IoSliceMut<'_>> = store.iter_mut().map(|b| IoSliceMut::new(b)).collect();
        assert_eq!(window_mut(&mut bufs, 0, usize::MAX).len(), IOV_MAX);
        assert_eq!(window_mut(&mut bufs, 3, 2).len(), 2);
    }
}
