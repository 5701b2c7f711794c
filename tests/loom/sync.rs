//! `util::sync` as the kernels see it here: loom's primitives, with one knob for sabotage.
//!
//! A model that cannot fail proves nothing. [`sabotage`] runs a model again with its kernel weakened at one
//! source line (a fence is left out, an ordering becomes `Relaxed`), and the model must then find the bug. That
//! happens in a child process, because what loom finds ends in a panic while the model's threads unwind.

use std::panic::Location;
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::AtomicBool as StdAtomicBool;

#[allow(unused_imports, reason = "each kernel uses a part")]
pub(crate) use loom::hint::spin_loop;
pub(crate) use loom::sync::Arc;
pub(crate) use std::sync::atomic::Ordering;

/// `FILE:LINE` of the operation that this process weakens.
const KNOB: &str = "CONBD_LOOM_SABOTAGE";
/// What such a process prints when it executes that line for the first time.
const HIT: &str = "sabotaged operation executed";

/// Runs the test `model` in a child process, with the operation at `file:line` weakened; tells whether it failed.
///
/// # Panics
/// When the line was never executed: the sabotage would have tested nothing.
pub(crate) fn sabotage(model: &str, file: &str, line: u32) -> bool {
    let exe = std::env::current_exe().expect("the test binary knows its path");
    let out = Command::new(exe)
        .args(["--exact", model, "--nocapture", "--test-threads=1"])
        .env(KNOB, format!("{file}:{line}"))
        .env("RUST_BACKTRACE", "0")
        .output()
        .expect("the test binary runs again");
    let text = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
    assert!(text.contains("running 1 test"), "there is no model {model}:\n{text}");
    assert!(text.contains(HIT), "{model} does not execute {file}:{line}:\n{text}");
    !out.status.success()
}

/// What such a process is told when its whole test is the sabotage.
const CHILD: &str = "CONBD_LOOM_CHILD";

/// Tells whether this process is to run the sabotaged model `name`.
pub(crate) fn is_child(name: &str) -> bool {
    std::env::var(CHILD).is_ok_and(|v| v.ends_with(name))
}

/// Runs the test `model`, which sabotages its kernel by itself, in a child process; tells whether it failed.
pub(crate) fn fails_in_child(model: &str) -> bool {
    let exe = std::env::current_exe().expect("the test binary knows its path");
    let out = Command::new(exe)
        .args(["--exact", model, "--nocapture", "--test-threads=1"])
        .env(CHILD, model)
        .env("RUST_BACKTRACE", "0")
        .output()
        .expect("the test binary runs again");
    let text = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
    assert!(text.contains("running 1 test"), "there is no model {model}:\n{text}");
    !out.status.success()
}

/// Checks a model under every interleaving that needs at most three preemptions.
pub(crate) fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

/// Lines (from 1) of a kernel's source that contain `what`, so that a test can sabotage each of them.
pub(crate) fn lines_with(source: &str, what: &str) -> Vec<u32> {
    (1..).zip(source.lines()).filter(|(_, l)| l.contains(what)).map(|(n, _)| n).collect()
}

fn weakened(at: &Location<'_>) -> bool {
    static WEAK: OnceLock<Option<(String, u32)>> = OnceLock::new();
    static SEEN: StdAtomicBool = StdAtomicBool::new(false);
    let weak = WEAK.get_or_init(|| {
        let knob = std::env::var(KNOB).ok()?;
        let (file, line) = knob.rsplit_once(':')?;
        Some((String::from(file), line.parse().ok()?))
    });
    let weak = weak.as_ref().is_some_and(|(file, line)| at.line() == *line && at.file().ends_with(file));
    if weak && !SEEN.swap(true, Ordering::Relaxed) {
        println!("{HIT}");
    }
    weak
}

/// The ordering for loom. Loom knows sequential consistency of fences only: an access that is so gets a fence before it and
/// acquires and releases, as it is compiled for Power.
#[track_caller]
fn order(wanted: Ordering) -> Ordering {
    if weakened(Location::caller()) {
        return Ordering::Relaxed;
    }
    if wanted == Ordering::SeqCst {
        loom::sync::atomic::fence(Ordering::SeqCst);
    }
    wanted
}

/// A fence, unless sabotaged.
#[track_caller]
pub(crate) fn fence(wanted: Ordering) {
    if !weakened(Location::caller()) {
        loom::sync::atomic::fence(wanted);
    }
}

macro_rules! atomic {
    ($name:ident, $loom:ident, $value:ty $(, $generic:ident)?) => {
        /// Loom's atomic, with orderings that can be sabotaged.
        #[derive(Debug)]
        pub(crate) struct $name$(<$generic>)?(loom::sync::atomic::$loom$(<$generic>)?);

        #[allow(dead_code, reason = "each kernel uses a part")]
        impl$(<$generic>)? $name$(<$generic>)? {
            pub(crate) fn new(value: $value) -> Self {
                $name(loom::sync::atomic::$loom::new(value))
            }
            #[track_caller]
            pub(crate) fn load(&self, o: Ordering) -> $value {
                self.0.load(order(o))
            }
            #[track_caller]
            pub(crate) fn store(&self, value: $value, o: Ordering) {
                self.0.store(value, order(o));
            }
            #[track_caller]
            pub(crate) fn swap(&self, value: $value, o: Ordering) -> $value {
                self.0.swap(value, order(o))
            }
            #[track_caller]
            pub(crate) fn compare_exchange(
                &self, old: $value, new: $value, ok: Ordering, err: Ordering,
            ) -> Result<$value, $value> {
                self.0.compare_exchange(old, new, order(ok), err)
            }
            /// Loom's weak exchange never fails spuriously; a loop around it explores the same states.
            #[track_caller]
            pub(crate) fn compare_exchange_weak(
                &self, old: $value, new: $value, ok: Ordering, err: Ordering,
            ) -> Result<$value, $value> {
                self.0.compare_exchange(old, new, order(ok), err)
            }
        }
    };
}

macro_rules! arithmetic {
    ($name:ident, $value:ty) => {
        #[allow(dead_code, reason = "each kernel uses a part")]
        impl $name {
            #[track_caller]
            pub(crate) fn fetch_add(&self, value: $value, o: Ordering) -> $value {
                self.0.fetch_add(value, order(o))
            }
            #[track_caller]
            pub(crate) fn fetch_sub(&self, value: $value, o: Ordering) -> $value {
                self.0.fetch_sub(value, order(o))
            }
            #[track_caller]
            pub(crate) fn fetch_or(&self, value: $value, o: Ordering) -> $value {
                self.0.fetch_or(value, order(o))
            }
            #[track_caller]
            pub(crate) fn fetch_and(&self, value: $value, o: Ordering) -> $value {
                self.0.fetch_and(value, order(o))
            }
        }
    };
}

atomic!(AtomicBool, AtomicBool, bool);
atomic!(AtomicU32, AtomicU32, u32);
atomic!(AtomicU64, AtomicU64, u64);
atomic!(AtomicUsize, AtomicUsize, usize);
atomic!(AtomicPtr, AtomicPtr, *mut T, T);
arithmetic!(AtomicU32, u32);
arithmetic!(AtomicU64, u64);
arithmetic!(AtomicUsize, usize);
