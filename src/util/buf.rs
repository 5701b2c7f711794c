//! Page-aligned, pooled I/O buffers.
//!
//! Every buffer is aligned to [`ALIGN`] so that it can be used with `O_DIRECT`. A freed buffer returns to a
//! free list of the *freeing* thread, by power-of-two size class; what does not fit there is given back at once.
//!
//! ```text
//!   len <= 128 KiB   size class, pooled, from the allocator
//!   len <= 2 MiB     size class, pooled, from mmap   (malloc would raise its mmap threshold and keep the memory)
//!   len >  2 MiB     whole pages, not pooled, mmap and munmap: the memory is back when the buffer is dropped
//! ```
//!
//! Bounds: a thread keeps at most [`THREAD_POOL_BYTES`], of which one class may hold at most half; [`trim`] empties
//! the lists of the calling thread, and its end does too.
//!
//! # Whose bytes are these
//! A recycled buffer still holds what its last user put there, which may be another client's data. So:
//! - [`IoBuf::new`] is for callers that overwrite **every** byte before any of them is shown to anyone: a `recv` of
//!   a payload, a read that is never short ([`crate::block::BlockNode::co_preadv`] is one). A caller that filled only
//!   a part calls [`IoBuf::truncate`] to it.
//! - [`IoBuf::zeroed`] is for everybody else.
//!
//! Debug builds fill a recycled buffer with [`POISON`], so a test that sees it has caught a leak of stale bytes.
//! No buffer ever exposes uninitialised memory: fresh ones are zeroed.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Alignment of every pooled buffer, in bytes (ours: covers any logical block size in use).
pub const ALIGN: usize = 4096;

/// What debug builds put into a recycled buffer.
pub const POISON: u8 = 0xdb;

/// Largest pooled capacity in bytes (ours: qemu-img convert asks for 2 MiB at once; bigger requests are rare).
pub const MAX_POOLED: usize = 2 << 20;

/// Bytes that the free lists of one thread hold at most (ours: 64 requests of 256 KiB, nbdcopy's habit).
pub const THREAD_POOL_BYTES: usize = 16 << 20;

/// From this capacity on, memory comes from mmap and goes back by munmap (ours, below glibc's initial threshold times two).
const MMAP_FROM: usize = 256 << 10;

const CLASS_SHIFT_MIN: u32 = ALIGN.trailing_zeros();
const CLASSES: usize = (MAX_POOLED.trailing_zeros() - CLASS_SHIFT_MIN + 1) as usize;

/// A page-aligned byte buffer; its length is what was asked for, its capacity may be larger.
pub struct IoBuf {
    ptr: NonNull<u8>,
    len: usize,
    cap: usize,
}

#[expect(unsafe_code, reason = "a raw pointer is not Send by itself")]
// SAFETY: an IoBuf owns its memory exclusively, as a Vec<u8> does; neither malloc nor mmap ties it to a thread.
unsafe impl Send for IoBuf {}
#[expect(unsafe_code, reason = "a raw pointer is not Sync by itself")]
// SAFETY: a shared IoBuf only gives out `&[u8]`; there is no interior mutability.
unsafe impl Sync for IoBuf {}

impl IoBuf {
    /// Takes a buffer of `len` bytes **whose contents are arbitrary**: the caller overwrites all of them (see the
    /// module's text). Any thread; never yields; `len` 0 allocates nothing.
    ///
    /// # Panics
    /// Ends the process as `Vec` does when there is no memory; [`IoBuf::try_new`] does not.
    #[must_use]
    pub fn new(len: usize) -> IoBuf {
        match IoBuf::try_new(len) {
            Some(b) => b,
            None => handle_alloc_error(layout(len.min(isize::MAX as usize - ALIGN))),
        }
    }

    /// [`IoBuf::new`], or `None` when there is no memory.
    #[must_use]
    pub fn try_new(len: usize) -> Option<IoBuf> {
        IoBuf::take(len, false)
    }

    /// Takes a buffer of `len` bytes that reads as zeroes.
    #[must_use]
    pub fn zeroed(len: usize) -> IoBuf {
        match IoBuf::take(len, true) {
            Some(b) => b,
            None => handle_alloc_error(layout(len.min(isize::MAX as usize - ALIGN))),
        }
    }

    fn take(len: usize, zero: bool) -> Option<IoBuf> {
        if len == 0 {
            return Some(IoBuf { ptr: dangling(), len: 0, cap: 0 });
        }
        let cap = capacity_for(len)?;
        if let Some(ptr) = class_of(cap).and_then(pool_take) {
            let mut b = IoBuf { ptr, len, cap };
            if zero {
                b.fill(0);
            } else if cfg!(debug_assertions) {
                b.fill(POISON);
            }
            return Some(b);
        }
        fresh(cap).map(|ptr| IoBuf { ptr, len, cap })
    }

    /// Shortens the buffer to `len` bytes; a longer `len` changes nothing.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Bytes that the allocation holds.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.cap
    }
}

impl From<&[u8]> for IoBuf {
    fn from(src: &[u8]) -> IoBuf {
        let mut b = IoBuf::new(src.len());
        b.copy_from_slice(src);
        b
    }
}

impl std::fmt::Debug for IoBuf {
    /// Sizes only: contents are clients' data and do not belong in logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IoBuf").field("len", &self.len).field("cap", &self.cap).finish_non_exhaustive()
    }
}

impl AsRef<[u8]> for IoBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Deref for IoBuf {
    type Target = [u8];
    #[expect(unsafe_code, reason = "the buffer is raw memory")]
    fn deref(&self) -> &[u8] {
        // SAFETY: `ptr` is non-null and aligned, owned by us for `cap >= len` bytes that are initialised (fresh
        // memory is zeroed), `len` is below isize::MAX (`capacity_for`), and `&self` keeps writers out.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for IoBuf {
    #[expect(unsafe_code, reason = "the buffer is raw memory")]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for IoBuf {
    fn drop(&mut self) {
        if self.cap == 0 {
            return;
        }
        match class_of(self.cap) {
            Some(class) => pool_give(class, self.ptr),
            None => release(self.ptr, self.cap),
        }
    }
}

/// Gives the calling thread's free lists back to the system; for threads that go idle. Never yields.
#[inline(never)]
pub fn trim() {
    // A thread that is being torn down has no lists any more: nothing to do.
    let _ = POOL.try_with(|p| p.borrow_mut().clear());
}

/// Bytes that the calling thread's free lists hold.
#[inline(never)]
#[must_use]
pub fn pooled_bytes() -> usize {
    POOL.try_with(|p| p.borrow().bytes).unwrap_or(0)
}

struct Pool {
    lists: [Vec<NonNull<u8>>; CLASSES],
    bytes: usize,
}

thread_local! {
    static POOL: RefCell<Pool> = const { RefCell::new(Pool { lists: [const { Vec::new() }; CLASSES], bytes: 0 }) };
}

impl Pool {
    fn clear(&mut self) {
        for (class, list) in self.lists.iter_mut().enumerate() {
            for ptr in list.drain(..) {
                release(ptr, class_cap(class));
            }
            list.shrink_to_fit();
        }
        self.bytes = 0;
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.clear();
    }
}

// The two accessors are not inlined: a coroutine may have changed threads between two calls, and an inlined
// thread-local address could survive the switch.

#[inline(never)]
fn pool_take(class: usize) -> Option<NonNull<u8>> {
    POOL.try_with(|p| {
        let mut p = p.borrow_mut();
        let ptr = p.lists[class].pop()?;
        p.bytes -= class_cap(class);
        Some(ptr)
    })
    .ok()
    .flatten()
}

#[inline(never)]
fn pool_give(class: usize, ptr: NonNull<u8>) {
    let cap = class_cap(class);
    let kept = POOL.try_with(|p| {
        let mut p = p.borrow_mut();
        let fits =
            p.bytes + cap <= THREAD_POOL_BYTES && (p.lists[class].len() + 1) * cap <= THREAD_POOL_BYTES / 2;
        if fits {
            p.lists[class].push(ptr);
            p.bytes += cap;
        }
        fits
    });
    // An error means that the thread is ending and its lists are gone.
    if !kept.unwrap_or(false) {
        release(ptr, cap);
    }
}

fn class_cap(class: usize) -> usize {
    ALIGN << class
}

/// The size class of a capacity, `None` above [`MAX_POOLED`].
fn class_of(cap: usize) -> Option<usize> {
    (cap <= MAX_POOLED).then(|| (cap.trailing_zeros() - CLASS_SHIFT_MIN) as usize)
}

/// Capacity for `len >= 1` bytes; `None` when it cannot be a Rust allocation.
fn capacity_for(len: usize) -> Option<usize> {
    if len <= MAX_POOLED {
        return Some(len.next_power_of_two().max(ALIGN));
    }
    len.checked_next_multiple_of(ALIGN).filter(|&c| c < isize::MAX as usize)
}

fn layout(cap: usize) -> Layout {
    Layout::from_size_align(cap, ALIGN).expect("capacity_for keeps sizes below isize::MAX")
}

fn dangling() -> NonNull<u8> {
    NonNull::new(std::ptr::without_provenance_mut(ALIGN)).expect("ALIGN is not zero")
}

/// Zeroed memory of `cap` bytes.
#[expect(unsafe_code, reason = "aligned memory comes from mmap and the allocator")]
fn fresh(cap: usize) -> Option<NonNull<u8>> {
    if cap < MMAP_FROM {
        // SAFETY: the layout's size is not zero: capacities are at least ALIGN.
        return NonNull::new(unsafe { alloc_zeroed(layout(cap)) });
    }
    // SAFETY: an anonymous private mapping at an address of the kernel's choice touches no existing memory.
    let p = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            cap,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if p == libc::MAP_FAILED { None } else { NonNull::new(p.cast()) }
}

/// Gives memory of [`fresh`] back.
#[expect(unsafe_code, reason = "the counterpart of fresh")]
fn release(ptr: NonNull<u8>, cap: usize) {
    if cap < MMAP_FROM {
        // SAFETY: `ptr` came from `alloc_zeroed` with this very layout (same `cap`, same side of MMAP_FROM), once.
        unsafe { dealloc(ptr.as_ptr(), layout(cap)) };
        return;
    }
    // SAFETY: `ptr..ptr + cap` is one mapping made by `fresh`, and its only owner is giving it up.
    let r = unsafe { libc::munmap(ptr.as_ptr().cast(), cap) };
    debug_assert_eq!(r, 0, "munmap of our own mapping cannot fail");
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(len: usize) {
        let mut b = IoBuf::new(len);
        assert_eq!(b.len(), len);
        assert!(b.capacity() >= len);
        assert_eq!(b.as_ptr() as usize % ALIGN, 0, "aligned");
        b.fill(0x5a);
        assert!(b.iter().all(|&x| x == 0x5a));
        drop(b);
        assert!(
            IoBuf::zeroed(len).iter().all(|&x| x == 0),
            "zeroed after a dirty buffer of {len} bytes was freed"
        );
    }

    #[test]
    fn edge_sizes_are_aligned_and_zeroed_shows_no_old_bytes() {
        for len in
            [0, 1, 511, 4095, 4096, 4097, 65536, 131_072, 131_073, 262_144, 1 << 20, (1 << 20) + 1, 5_000_001]
        {
            check(len);
        }
    }

    #[test]
    fn freed_buffer_is_reused_on_the_same_thread() {
        trim();
        let a = IoBuf::new(5000);
        let p = a.as_ptr();
        drop(a);
        assert_eq!(pooled_bytes(), 8192);
        let b = IoBuf::new(8000);
        assert_eq!(b.as_ptr(), p);
        assert_eq!(pooled_bytes(), 0);
    }

    #[test]
    fn recycled_buffer_is_poisoned_in_debug_builds() {
        trim();
        let mut a = IoBuf::new(4096);
        a.fill(b'S');
        drop(a);
        let b = IoBuf::new(4096);
        if cfg!(debug_assertions) {
            assert!(b.iter().all(|&x| x == POISON), "old bytes are gone");
        }
    }

    #[test]
    fn free_lists_are_bounded_and_trimmed() {
        trim();
        let many: Vec<IoBuf> = (0..64).map(|_| IoBuf::new(1 << 20)).collect();
        drop(many);
        assert!(pooled_bytes() <= THREAD_POOL_BYTES / 2, "one class holds at most half");
        let many: Vec<IoBuf> =
            (0..200).flat_map(|_| [IoBuf::new(1 << 18), IoBuf::new(4096), IoBuf::new(1 << 19)]).collect();
        drop(many);
        assert!(pooled_bytes() <= THREAD_POOL_BYTES);
        drop(IoBuf::new(8 << 20));
        assert!(pooled_bytes() <= THREAD_POOL_BYTES, "big ones are not pooled");
        trim();
        assert_eq!(pooled_bytes(), 0);
    }

    #[test]
    fn buffer_freed_on_another_thread_goes_to_that_thread() {
        trim();
        let b = IoBuf::new(4096);
        std::thread::spawn(move || {
            drop(b);
            assert_eq!(pooled_bytes(), 4096);
        })
        .join()
        .expect("thread");
        assert_eq!(pooled_bytes(), 0);
    }

    #[test]
    fn truncate_only_shortens() {
        let mut b = IoBuf::zeroed(100);
        b.truncate(200);
        assert_eq!(b.len(), 100);
        b.truncate(10);
        assert_eq!(b.len(), 10);
    }

    #[test]
    fn impossible_size_is_none_not_a_crash() {
        assert!(IoBuf::try_new(usize::MAX).is_none());
        assert!(IoBuf::try_new(isize::MAX as usize - 1).is_none());
    }

    proptest! {
        #[test]
        fn live_buffers_never_overlap(ops in proptest::collection::vec((any::<bool>(), 1usize..300_000), 1..60)) {
            let mut live: Vec<(u8, IoBuf)> = Vec::new();
            for (i, (free, len)) in ops.into_iter().enumerate() {
                let tag = (i % 251) as u8;
                if free && !live.is_empty() {
                    let (t, b) = live.swap_remove(len % live.len());
                    prop_assert!(b.iter().all(|&x| x == t));
                } else {
                    let mut b = IoBuf::new(len);
                    b.fill(tag);
                    live.push((tag, b));
                }
            }
            for (t, b) in &live {
                prop_assert!(b.iter().all(|x| x == t));
            }
        }
    }
}
