//! Integration tests: one binary, one module per behaviour of the library and the program.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod aio;
mod block_device;
mod block_direct;
mod block_drain;
mod block_file;
mod block_flush;
mod block_growable;
mod block_lock;
mod block_model;
mod cli_bench;
mod cli_client;
mod cli_harness;
mod cli_inspect;
mod cli_licences;
mod cli_serve;
mod cli_tls;
mod co_coroutine;
mod co_io;
mod co_mutex;
mod co_queue;
mod co_sleep;
mod co_stream;
mod config;
mod engine;
mod nbd_basic;
mod nbd_checklist;
mod nbd_common;
mod nbd_contexts;
mod nbd_extended;
mod nbd_fast;
mod nbd_fuzz;
mod nbd_handshake;
mod nbd_robust;
mod nbd_rules;
mod nbd_tls;
mod nbd_torture;
mod nbd_transmission;
mod nbd_transports;
mod pki;
mod qcow2_node;
mod qcow2_races;
mod qcow2_tools;
mod support;
mod tidy;
