//! FaultNode: errors, delays and held I/O by rule, for tests.
//!
//! A rule says which requests it means (kind, range, how many to let pass, how many to hit) and what happens to
//! them, before or after the child has done its work. All rules that match a request act on it, in the order they
//! were added, until one fails it.
//!
//! A *held* request stays suspended until the test releases it, so that races are made by hand instead of by sleeping:
//!
//! ```text
//!   node.add_rule(FaultRule::new(FaultOps::WRITE, FaultAction::Hold));
//!   … start a write …            node.wait_held(1, timeout)
//!   … do what must overlap it …  node.release_all()
//! ```
//!
//! Any thread. While there is any rule nothing is served inline, so that every request can be caught.

use super::wait::{co_wait_until, lock};
use super::{BlockNode, DepthExtent, DirtyBitmap, Error, Extent, Limits, Result, WriteFlags, iov};
use crate::co::{self, CoQueue};
use bitflags::bitflags;
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

bitflags! {
    /// Kinds of requests.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct FaultOps: u32 {
        /// `co_preadv`.
        const READ = 1;
        /// `co_pwritev`.
        const WRITE = 2;
        /// `co_pwrite_zeroes`.
        const WRITE_ZEROES = 4;
        /// `co_pdiscard`.
        const DISCARD = 8;
        /// `co_flush`; it has no range and matches every one.
        const FLUSH = 16;
        /// `co_block_status` and `co_allocation_depth`.
        const BLOCK_STATUS = 32;
        /// `co_cache`.
        const CACHE = 64;
        /// `co_truncate`; its range begins at the new size.
        const TRUNCATE = 128;
    }
}

/// What happens to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultAction {
    /// It fails with this errno.
    Errno(i32),
    /// It takes this many nanoseconds more, on its context's timers.
    DelayNs(u64),
    /// It is suspended until [`FaultNode::release`].
    Hold,
}

/// When it happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FaultWhen {
    /// Before the child sees the request.
    #[default]
    Before,
    /// After the child has done it: its effect is there, its completion is not.
    After,
}

/// A rule; see the module's text.
#[derive(Debug, Clone)]
pub struct FaultRule {
    /// Kinds of requests.
    pub ops: FaultOps,
    /// Bytes; a request that overlaps them matches.
    pub range: Range<u64>,
    /// How many matching requests pass unharmed first.
    pub skip: u64,
    /// How many are hit after that; `None`: all.
    pub count: Option<u64>,
    /// Before or after the child's work.
    pub when: FaultWhen,
    /// What happens.
    pub action: FaultAction,
}

impl FaultRule {
    /// A rule for all requests of the kinds, at any offset.
    #[must_use]
    pub fn new(ops: FaultOps, action: FaultAction) -> FaultRule {
        FaultRule { ops, range: 0..u64::MAX, skip: 0, count: None, when: FaultWhen::Before, action }
    }

    /// Only requests that overlap these bytes.
    #[must_use]
    pub fn range(self, range: Range<u64>) -> FaultRule {
        FaultRule { range, ..self }
    }

    /// Lets `n` matching requests pass first.
    #[must_use]
    pub fn skip(self, n: u64) -> FaultRule {
        FaultRule { skip: n, ..self }
    }

    /// Hits `n` requests, then never again.
    #[must_use]
    pub fn count(self, n: u64) -> FaultRule {
        FaultRule { count: Some(n), ..self }
    }

    /// Acts after the child has done its work.
    #[must_use]
    pub fn after(self) -> FaultRule {
        FaultRule { when: FaultWhen::After, ..self }
    }

    fn matches(&self, op: FaultOps, offset: u64, len: u64) -> bool {
        self.ops.contains(op)
            && (op == FaultOps::FLUSH
                || offset < self.range.end && self.range.start < offset.saturating_add(len.max(1)))
    }
}

/// Names a rule of one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RuleId(u64);

/// A request that is being held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldOp {
    /// Names it; in order of arrival.
    pub id: u64,
    /// Its kind.
    pub op: FaultOps,
    /// Its offset; 0 for a flush.
    pub offset: u64,
    /// Its length; 0 for a flush.
    pub len: u64,
}

/// A filter that injects faults into the requests for its child. Any thread.
pub struct FaultNode {
    name: String,
    child: Arc<dyn BlockNode>,
    /// How many rules there are; a copy for the inline paths.
    rules: AtomicUsize,
    state: Mutex<State>,
    /// Held requests; guarded by `state`.
    sleepers: CoQueue,
    /// For plain threads that wait for a held request; pairs with `state`.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    rules: Vec<Armed>,
    next_id: u64,
    /// Held requests: `None` until released, then the errno to fail with (0: go on).
    held: Vec<(HeldOp, Option<i32>)>,
}

struct Armed {
    id: u64,
    rule: FaultRule,
    seen: u64,
    hits: u64,
}

impl FaultNode {
    /// Makes a filter without rules.
    #[must_use]
    pub fn new(name: &str, child: Arc<dyn BlockNode>) -> Arc<FaultNode> {
        Arc::new(FaultNode {
            name: name.to_owned(),
            child,
            rules: AtomicUsize::new(0),
            state: Mutex::new(State::default()),
            sleepers: CoQueue::new(),
            changed: Condvar::new(),
        })
    }

    /// Adds a rule, behind those that are there.
    pub fn add_rule(&self, rule: FaultRule) -> RuleId {
        let mut s = lock(&self.state);
        s.next_id += 1;
        let id = s.next_id;
        s.rules.push(Armed { id, rule, seen: 0, hits: 0 });
        self.rules.store(s.rules.len(), Ordering::SeqCst);
        RuleId(id)
    }

    /// Takes a rule away, and returns how many requests it hit; 0 when it is gone already. Held requests stay held.
    pub fn remove_rule(&self, id: RuleId) -> u64 {
        let mut s = lock(&self.state);
        let hits = s.rules.iter().find(|a| a.id == id.0).map_or(0, |a| a.hits);
        s.rules.retain(|a| a.id != id.0);
        self.rules.store(s.rules.len(), Ordering::SeqCst);
        hits
    }

    /// Takes all rules away. Held requests stay held.
    pub fn clear_rules(&self) {
        let mut s = lock(&self.state);
        s.rules.clear();
        self.rules.store(0, Ordering::SeqCst);
    }

    /// How many requests a rule has hit so far.
    #[must_use]
    pub fn hits(&self, id: RuleId) -> u64 {
        lock(&self.state).rules.iter().find(|a| a.id == id.0).map_or(0, |a| a.hits)
    }

    /// The requests that are held now, in order of arrival.
    #[must_use]
    pub fn held(&self) -> Vec<HeldOp> {
        lock(&self.state).held.iter().filter(|h| h.1.is_none()).map(|h| h.0).collect()
    }

    /// Lets a held request go on; `false` when it is not held.
    pub fn release(&self, id: u64) -> bool {
        self.end_hold(|h| h.id == id, 0) == 1
    }

    /// Fails a held request; `false` when it is not held.
    pub fn release_with_errno(&self, id: u64, errno: i32) -> bool {
        self.end_hold(|h| h.id == id, errno) == 1
    }

    /// Lets all held requests go on, and returns how many. Later ones are held again while their rule is there.
    pub fn release_all(&self) -> usize {
        self.end_hold(|_| true, 0)
    }

    fn end_hold(&self, which: impl Fn(&HeldOp) -> bool, errno: i32) -> usize {
        let mut n = 0;
        for (op, release) in &mut lock(&self.state).held {
            if release.is_none() && which(op) {
                *release = Some(errno);
                n += 1;
            }
        }
        self.sleepers.restart_all();
        n
    }

    /// Waits in a plain thread until at least `n` requests are held; `false` when `timeout` came first. Blocks the
    /// thread: for tests, never on an IOThread.
    #[must_use]
    pub fn wait_held(&self, n: usize, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut s = lock(&self.state);
        while s.held.iter().filter(|h| h.1.is_none()).count() < n {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            s = self.changed.wait_timeout(s, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Applies the rules of one phase.
    fn co_apply(&self, when: FaultWhen, op: FaultOps, offset: u64, len: u64) -> std::result::Result<(), i32> {
        if self.rules.load(Ordering::SeqCst) == 0 {
            return Ok(());
        }
        let mut actions = Vec::new();
        for a in &mut lock(&self.state).rules {
            if a.rule.when != when || !a.rule.matches(op, offset, len) {
                continue;
            }
            a.seen += 1;
            if a.seen > a.rule.skip && a.rule.count.is_none_or(|c| a.hits < c) {
                a.hits += 1;
                actions.push(a.rule.action);
            }
        }
        for action in actions {
            match action {
                FaultAction::Errno(errno) => return Err(errno),
                FaultAction::DelayNs(ns) => co::co_sleep_ns(ns),
                FaultAction::Hold => self.co_hold(op, offset, len)?,
            }
        }
        Ok(())
    }

    fn co_hold(&self, op: FaultOps, offset: u64, len: u64) -> std::result::Result<(), i32> {
        let id = {
            let mut s = lock(&self.state);
            s.next_id += 1;
            let id = s.next_id;
            s.held.push((HeldOp { id, op, offset, len }, None));
            id
        };
        self.changed.notify_all();
        let errno = co_wait_until(&self.state, &self.sleepers, |s| {
            let at = s.held.iter().position(|h| h.0.id == id).expect("a held request removes itself");
            let errno = s.held[at].1?;
            s.held.remove(at);
            Some(errno)
        });
        if errno == 0 { Ok(()) } else { Err(errno) }
    }

    fn co_around<T>(
        &self,
        op: FaultOps,
        what: &'static str,
        offset: u64,
        len: u64,
        child: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let fail = |errno| Error::from_errno(what, &self.name, offset, errno);
        self.co_apply(FaultWhen::Before, op, offset, len).map_err(fail)?;
        let v = child()?;
        self.co_apply(FaultWhen::After, op, offset, len).map_err(fail)?;
        Ok(v)
    }
}

impl BlockNode for FaultNode {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> u64 {
        self.child.len()
    }

    fn read_only(&self) -> bool {
        self.child.read_only()
    }

    fn limits(&self) -> Limits {
        self.child.limits()
    }

    fn try_pread_some(&self, offset: u64, buf: &mut [u8]) -> usize {
        if self.rules.load(Ordering::SeqCst) != 0 {
            return 0;
        }
        self.child.try_pread_some(offset, buf)
    }

    fn try_pwrite(&self, offset: u64, buf: &[u8]) -> Option<Result<()>> {
        if self.rules.load(Ordering::SeqCst) != 0 {
            return None;
        }
        self.child.try_pwrite(offset, buf)
    }

    fn co_preadv(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> Result<()> {
        let len = iov::total_mut(bufs) as u64;
        self.co_around(FaultOps::READ, "preadv", offset, len, || self.child.co_preadv(offset, bufs))
    }

    fn co_pwritev(&self, offset: u64, bufs: &[IoSlice<'_>], flags: WriteFlags) -> Result<()> {
        let len = iov::total(bufs) as u64;
        self.co_around(FaultOps::WRITE, "pwritev", offset, len, || self.child.co_pwritev(offset, bufs, flags))
    }

    fn co_pwrite_zeroes(&self, offset: u64, len: u64, flags: WriteFlags) -> Result<()> {
        self.co_around(FaultOps::WRITE_ZEROES, "write_zeroes", offset, len, || {
            self.child.co_pwrite_zeroes(offset, len, flags)
        })
    }

    fn co_pdiscard(&self, offset: u64, len: u64) -> Result<()> {
        self.co_around(FaultOps::DISCARD, "discard", offset, len, || self.child.co_pdiscard(offset, len))
    }

    fn co_close(&self) -> Result<()> {
        self.child.co_close()
    }

    fn is_format(&self) -> bool {
        self.child.is_format()
    }

    fn co_flush(&self) -> Result<()> {
        self.co_around(FaultOps::FLUSH, "flush", 0, 0, || self.child.co_flush())
    }

    fn co_block_status(&self, offset: u64, len: u64) -> Result<Extent> {
        self.co_around(FaultOps::BLOCK_STATUS, "block_status", offset, len, || {
            self.child.co_block_status(offset, len)
        })
    }

    fn grows(&self) -> bool {
        self.child.grows()
    }

    fn co_truncate(&self, len: u64) -> Result<()> {
        self.co_around(FaultOps::TRUNCATE, "truncate", len, 1, || self.child.co_truncate(len))
    }

    fn co_resize(&self, at_least: u64) -> Result<u64> {
        self.co_around(FaultOps::TRUNCATE, "resize", at_least, 1, || self.child.co_resize(at_least))
    }

    fn co_cache(&self, offset: u64, len: u64) -> Result<()> {
        self.co_around(FaultOps::CACHE, "cache", offset, len, || self.child.co_cache(offset, len))
    }

    fn co_allocation_depth(&self, offset: u64, len: u64) -> Result<DepthExtent> {
        self.co_around(FaultOps::BLOCK_STATUS, "allocation_depth", offset, len, || {
            self.child.co_allocation_depth(offset, len)
        })
    }

    fn dirty_bitmaps(&self) -> Vec<Arc<dyn DirtyBitmap>> {
        self.child.dirty_bitmaps()
    }
}
