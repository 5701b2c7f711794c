//! Wiring: IOThreads, images, listeners, signals, shutdown order (owner: CLI helper).
