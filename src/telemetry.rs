//! Tracing set-up (owner: CLI helper).
