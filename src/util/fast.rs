//! Which fast paths are taken: all of them where they pay, unless the environment variable `CONBD_FAST` says otherwise.
//!
//! It is for tests, which run with every path forced on and forced off, and for finding the culprit when data is wrong:
//!
//! | value | meaning |
//! |---|---|
//! | `auto`, or not set | each where it pays |
//! | `off` | none: every request goes the long way, through a coroutine and the engine |
//! | `forced` | each wherever it is right, also where it does not pay |
//! | a list such as `inline-read,lend` | these where they pay, the others never |
//!
//! Busy polling has a setting of its own (`poll_max`).

use std::sync::OnceLock;

/// The environment variable.
pub const VARIABLE: &str = "CONBD_FAST";

/// Smallest read that is lent, in bytes (ours: below, the second system call and the pinned pages cost more than a copy).
const LEND_FROM: usize = 32 << 10;

/// What is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FastPaths {
    /// Reads of what is at hand, in the reader's turn.
    pub inline_read: bool,
    /// Writes that are expected not to wait, in the reader's turn.
    pub inline_write: bool,
    /// Reads of at least this many bytes are sent from the page cache; `usize::MAX`: none.
    pub lend_from: usize,
    /// Neighbouring requests are served by one system call.
    pub coalesce: bool,
}

impl FastPaths {
    const AUTO: FastPaths =
        FastPaths { inline_read: true, inline_write: true, lend_from: LEND_FROM, coalesce: true };
    const OFF: FastPaths =
        FastPaths { inline_read: false, inline_write: false, lend_from: usize::MAX, coalesce: false };
    const FORCED: FastPaths = FastPaths { lend_from: 1, ..FastPaths::AUTO };

    /// Understands a value of [`VARIABLE`].
    ///
    /// # Errors
    /// What is wrong with it, and what there is.
    pub fn parse(value: &str) -> Result<FastPaths, String> {
        match value {
            "" | "auto" => return Ok(FastPaths::AUTO),
            "off" => return Ok(FastPaths::OFF),
            "forced" => return Ok(FastPaths::FORCED),
            _ => {}
        }
        let mut paths = FastPaths::OFF;
        for name in value.split(',') {
            match name.trim() {
                "inline-read" => paths.inline_read = true,
                "inline-write" => paths.inline_write = true,
                "lend" => paths.lend_from = LEND_FROM,
                "coalesce" => paths.coalesce = true,
                other => {
                    return Err(format!(
                        "{VARIABLE}={value}: no fast path is called {other:?}; use auto, off, forced, or a list of \
                         inline-read, inline-write, lend, coalesce"
                    ));
                }
            }
        }
        Ok(paths)
    }

    /// Reads [`VARIABLE`].
    ///
    /// # Errors
    /// As [`FastPaths::parse`].
    pub fn from_env() -> Result<FastPaths, String> {
        match std::env::var_os(VARIABLE) {
            None => Ok(FastPaths::AUTO),
            Some(value) => FastPaths::parse(&value.to_string_lossy()),
        }
    }
}

/// What this process takes; settled at the first call. A value that cannot be understood counts as `auto`: the daemon has
/// refused to start with it.
pub fn paths() -> &'static FastPaths {
    static PATHS: OnceLock<FastPaths> = OnceLock::new();
    PATHS.get_or_init(|| FastPaths::from_env().unwrap_or(FastPaths::AUTO))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_understood_or_refused_by_name() {
        assert_eq!(FastPaths::parse("auto"), Ok(FastPaths::AUTO));
        assert_eq!(FastPaths::parse("off"), Ok(FastPaths::OFF));
        assert_eq!(FastPaths::parse("forced"), Ok(FastPaths { lend_from: 1, ..FastPaths::AUTO }));
        assert_eq!(
            FastPaths::parse("inline-read, lend"),
            Ok(FastPaths { inline_read: true, lend_from: LEND_FROM, ..FastPaths::OFF })
        );
        let e = FastPaths::parse("lend,warp").expect_err("no such path");
        assert!(e.contains("\"warp\"") && e.contains("coalesce"), "{e}");
    }
}
