//! Configuration: file and flags merged into one checked value (owner: CLI helper).
