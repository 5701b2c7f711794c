//! Test root.
