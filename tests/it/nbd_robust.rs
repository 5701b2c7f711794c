//! The NBD server under clients that leave, hang, hurry or lie, and the order of its replies. Numbers as in
//! `nbd_handshake`.

use super::nbd_common::*;
use conbd::block::{
    self, BlockNode, Extent, FaultAction, FaultOps, FaultRule, Limits, MemoryNode, NullNode, WriteFlags,
};
use conbd::nbd::export::ExportTable;
use conbd::nbd::proto::*;
use conbd::nbd::server::{ListenAddr, ServerConfig};
use conbd::nbd::wire::*;
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const SIZE: u64 = 1 << 20;
const EIO: u32 = 5;
const ENOMEM: u32 = 12;
const ESHUTDOWN: u32 = 108;

fn hold(ops: FaultOps) -> FaultRule {
    FaultRule::new(ops, FaultAction::Hold)
}

#[test]
fn replies_leave_in_the_order_of_completion_100() {
    let (export, fault) = faulty("", SIZE);
    let t = TestServer::unix(vec![export]);
    let mut c = t.go("", true);
    let rule = fault.add_rule(hold(FaultOps::READ));
    for cookie in 0..4 {
        c.send_req(NBD_CMD_READ, 0, cookie, cookie * 4096, 4096);
    }
    assert!(fault.wait_held(4, PATIENCE));
    // Others overtake.
    assert_eq!(c.call(NBD_CMD_FLUSH, 0, 0, 0), 0);
    assert_eq!(c.write(0, 0, &[1; 4096]), 0);
    // Released backwards, answered backwards.
    let mut held = fault.held();
    held.sort_by_key(|h| std::cmp::Reverse(h.offset));
    for op in held {
        assert!(fault.release(op.id));
        let cookie = op.offset / 4096;
        assert_eq!(assemble(&c.recv_chunks(cookie), op.offset, 4096).0.len(), 4096);
    }
    fault.remove_rule(rule);
    c.disc();
}

#[test]
fn every_cookie_gets_one_reply_when_half_of_them_fail() {
    let (export, fault) = faulty("", SIZE);
    let t = TestServer::unix(vec![export]);
    let mut c = t.go("", false);
    fault.add_rule(hold(FaultOps::WRITE));
    let n = 100u64;
    for cookie in 0..n {
        c.send_req(NBD_CMD_WRITE, 0, cookie, cookie * 512, 512);
        c.send(&[1; 512]);
    }
    assert!(fault.wait_held(n as usize, PATIENCE));
    for (i, op) in fault.held().into_iter().enumerate() {
        assert!(if i % 2 == 0 { fault.release(op.id) } else { fault.release_with_errno(op.id, libc::EIO) });
    }
    let mut seen = vec![0; n as usize];
    let mut failed = 0;
    for _ in 0..n {
        let Reply::Simple { error, cookie } = c.recv_reply() else { panic!("simple") };
        seen[cookie as usize] += 1;
        failed += usize::from(error == EIO);
    }
    assert!(seen.iter().all(|s| *s == 1));
    assert_eq!(failed, 50);
    c.disc();
}

#[test]
fn disc_waits_for_what_is_outstanding_130() {
    let (export, fault) = faulty("", SIZE);
    let t = TestServer::unix(vec![export]);
    let mut c = t.go("", false);
    fault.add_rule(hold(FaultOps::WRITE));
    c.send_req(NBD_CMD_WRITE, 0, 1, 0, 512);
    c.send(&[1; 512]);
    c.send_req(NBD_CMD_DISC, 0, 2, 0, 0);
    assert!(fault.wait_held(1, PATIENCE));
    fault.clear_rules();
    fault.release_all();
    assert_eq!(c.recv_reply(), Reply::Simple { error: 0, cookie: 1 });
    c.expect_close();
}

#[test]
fn a_half_closed_client_gets_its_replies_165() {
    let (export, fault) = faulty("", SIZE);
    let t = TestServer::unix(vec![export]);
    let mut c = t.go("", false);
    fault.add_rule(hold(FaultOps::READ));
    c.send_req(NBD_CMD_READ, 0, 1, 0, 512);
    c.send_req(NBD_CMD_FLUSH, 0, 2, 0, 0);
    c.half_close();
    assert_eq!(c.recv_reply(), Reply::Simple { error: 0, cookie: 2 });
    assert!(fault.wait_held(1, PATIENCE));
    fault.clear_rules();
    fault.release_all();
    assert_eq!(c.recv_reply(), Reply::Simple { error: 0, cookie: 1 });
    assert_eq!(c.recv(512), [0; 512]);
    c.expect_close();
}

#[test]
fn client_death_with_requests_in_flight_frees_the_session() {
    let (export, fault) = faulty("", SIZE);
    let t = TestServer::unix(vec![export]);
    fault.add_rule(hold(FaultOps::READ | FaultOps::WRITE));
    for structured in [false, true] {
        let mut c = t.go("", structured);
        for cookie in 0..20 {
            c.send_req(NBD_CMD_READ, 0, cookie, 0, 65_536);
        }
        c.send_req(NBD_CMD_WRITE, 0, 21, 0, 512);
        c.send(&[1; 512]);
        assert!(fault.wait_held(21, PATIENCE));
        drop(c);
        assert_eq!(fault.release_all(), 21);
        t.wait_for("the session ends", |s| s.connections() == 0);
    }
    assert_eq!(t.server.budget_in_use(), (0, 0));
    fault.clear_rules();
    t.go("", false).disc();
}

#[test]
fn a_client_gone_in_mid_payload_writes_nothing_126() {
    let t = TestServer::unix(vec![memory("", 4 << 20)]);
    for len in [512u32, 65_536, 1 << 20] {
        for sent in [0, 1, len / 2, len - 1] {
            let mut c = t.go("", true);
            c.send_req(NBD_CMD_WRITE, 0, 1, 0, len);
            c.send(&vec![1; sent as usize]);
        }
    }
    t.wait_for("all sessions end", |s| s.connections() == 0);
    assert_eq!(t.go("", false).read(0, 1 << 20).unwrap(), vec![0; 1 << 20]);
    // 166: half a header is no request either.
    let mut c = t.go("", false);
    let h =
        RequestHeader { flags: CmdFlags::empty(), cmd: NBD_CMD_WRITE_ZEROES, cookie: 0, offset: 0, len: 9 };
    c.send(&h.encode()[..27]);
    drop(c);
    t.wait_for("all sessions end", |s| s.connections() == 0);
}

#[test]
fn replies_that_nobody_reads_stop_that_client_only_163_167() {
    let t = TestServer::with(vec![export_of("", Arc::new(NullNode::new("n", 1 << 40)))], 2, |c| {
        c.conn_bytes = 8 << 20;
        c.total_bytes = 256 << 20;
    });
    // 256 MiB of answers asked for (64 MiB the last time), and not one of them read.
    for (len, n) in [(1u32 << 20, 256u64), (65_536, 4096), (16_384, 4096)] {
        let mut hungry = t.go("", false);
        let mut batch = Vec::new();
        for cookie in 0..n {
            let h = RequestHeader {
                flags: CmdFlags::empty(),
                cmd: NBD_CMD_READ,
                cookie,
                offset: 0,
                len: len.into(),
            };
            batch.extend_from_slice(&h.encode());
        }
        hungry.send(&batch);
        // Others don't notice, on either thread.
        for _ in 0..4 {
            let mut c = t.go("", true);
            for _ in 0..50 {
                assert!(c.read(0, 4096).is_ok());
                assert_eq!(c.write(0, 0, &[1; 65_536]), 0);
            }
            c.disc();
        }
        let (bytes, _) = t.server.budget_in_use();
        assert!(bytes <= 9 << 20, "one client holds {bytes} bytes");
        // Vanishing with all of that unread frees it.
        drop(hungry);
        t.wait_for("the session ends", |s| s.connections() == 0);
        assert_eq!(t.server.budget_in_use(), (0, 0));
    }
}

#[test]
fn a_client_that_reads_late_gets_everything() {
    let t = TestServer::with(vec![export_of("", Arc::new(NullNode::new("n", 1 << 40)))], 1, |c| {
        c.conn_bytes = 1 << 20;
    });
    let mut c = t.go("", false);
    let n = 64u64;
    for cookie in 0..n {
        // Alternately inline and by way of the queue; larger than the connection's whole budget now and then.
        let len = [4096u32, 300_000, 2 << 20][cookie as usize % 3];
        c.send_req(NBD_CMD_READ, 0, cookie, 0, len);
    }
    for _ in 0..n {
        let Reply::Simple { error: 0, cookie } = c.recv_reply() else { panic!("success") };
        c.recv([4096usize, 300_000, 2 << 20][cookie as usize % 3]);
    }
    c.disc();
}

#[test]
fn the_daemons_budget_is_shared_and_the_stalled_are_dropped() {
    let t = TestServer::with(vec![export_of("", Arc::new(NullNode::new("n", 1 << 40)))], 2, |c| {
        // Room for one of the largest requests.
        c.total_bytes = 64 << 20;
        c.conn_bytes = 64 << 20;
        c.stall_timeout = Duration::from_millis(50);
    });
    // Takes all there is, and reads nothing.
    let mut stalled = t.go("", false);
    for cookie in 0..4 {
        stalled.send_req(NBD_CMD_READ, 0, cookie, 0, 60 << 20);
    }
    t.wait_for("the budget is taken", |s| s.budget_in_use().0 > 59 << 20);
    // Small requests get on: every connection has an allowance of its own.
    let mut c = t.go("", false);
    assert_eq!(c.write(0, 0, &[1; 65_536]), 0);
    // A large one waits; the stalled client is cut for it.
    assert_eq!(c.write(0, 0, &vec![1; 40 << 20]), 0);
    assert_eq!(c.read(0, 20 << 20).unwrap().len(), 20 << 20);
    t.wait_for("the stalled one is gone", |s| s.connections() == 1);
    c.disc();
}

/// A server whose budget one large request takes up, and that does not wait long for who holds it.
fn tight_server() -> TestServer {
    TestServer::with(vec![export_of("", Arc::new(NullNode::new("n", 1 << 40)))], 2, |c| {
        c.total_bytes = 64 << 20;
        c.conn_bytes = 64 << 20;
        c.stall_timeout = Duration::from_millis(50);
    })
}

#[test]
fn a_payload_that_never_comes_holds_nobody_up() {
    let t = tight_server();
    // Memory for it is reserved before it is read, and then it does not come.
    let mut silent = t.go("", false);
    silent.send_req(NBD_CMD_WRITE, 0, 1, 0, 60 << 20);
    silent.send(&[1; 1000]);
    t.wait_for("the budget is taken", |s| s.budget_in_use().0 > 59 << 20);
    let mut c = t.go("", false);
    assert_eq!(c.read(0, 40 << 20).unwrap().len(), 40 << 20);
    silent.expect_close();
    c.disc();
}

#[test]
fn a_trickle_is_no_progress() {
    let t = tight_server();
    let mut slow = t.go("", false);
    slow.send_req(NBD_CMD_READ, 0, 1, 0, 60 << 20);
    assert_eq!(slow.recv_reply(), Reply::Simple { error: 0, cookie: 1 });
    let done = Arc::new(AtomicBool::new(false));
    let seen = done.clone();
    // Something now and then, before the stall timeout, and never enough to be done before everybody gives up.
    let trickle = std::thread::spawn(move || {
        while !seen.load(Ordering::Relaxed) && slow.recv_some(64 << 10) > 0 {
            std::thread::sleep(Duration::from_millis(40));
        }
    });
    let mut c = t.go("", false);
    assert_eq!(c.read(0, 40 << 20).unwrap().len(), 40 << 20);
    c.disc();
    done.store(true, Ordering::Relaxed);
    trickle.join().unwrap();
}

#[test]
fn a_client_that_was_cut_is_not_served_on() {
    let t = tight_server();
    let mut slow = t.go("", false);
    slow.send_req(NBD_CMD_READ, 0, 1, 0, 60 << 20);
    t.wait_for("the budget is taken", |s| s.budget_in_use().0 > 59 << 20);
    let mut c = t.go("", false);
    assert_eq!(c.read(0, 40 << 20).unwrap().len(), 40 << 20);
    // It is cut by now. What it sends, never pausing, is no reason to keep it.
    let h = RequestHeader { flags: CmdFlags::empty(), cmd: NBD_CMD_CACHE, cookie: 0, offset: 0, len: 1 };
    let many: Vec<u8> = h.encode().repeat(4096);
    let begun = std::time::Instant::now();
    while slow.try_send(&many) {
        assert!(begun.elapsed() < PATIENCE, "it is served on and on");
    }
    c.disc();
}

#[test]
fn a_client_that_never_stops_haggling_keeps_neither_its_place_nor_its_thread() {
    let t = TestServer::with(vec![memory("", SIZE)], 1, |c| c.handshake_timeout = Duration::from_millis(500));
    let mut c = t.go("", false);
    let flood = {
        let (mut sending, receiving) =
            UnixStream::connect(t.socket()).map(|s| (s.try_clone().unwrap(), s)).unwrap();
        sending.write_all(&3u32.to_be_bytes()).unwrap();
        let mut many = Vec::new();
        for _ in 0..4096 {
            put_option(&mut many, 0x7777, b"");
        }
        let taking = std::thread::spawn(move || std::io::copy(&mut &receiving, &mut std::io::sink()));
        std::thread::spawn(move || {
            let begun = std::time::Instant::now();
            while sending.write_all(&many).is_ok() {
                assert!(begun.elapsed() < PATIENCE, "it haggles on and on");
            }
            // Ends with the connection, in whatever way.
            let _closed = taking.join().unwrap();
        })
    };
    // The one thread has time for others meanwhile.
    for _ in 0..20 {
        assert_eq!(c.read(0, 512).unwrap(), [0; 512]);
    }
    flood.join().unwrap();
    c.disc();
}

#[test]
fn who_finds_no_coroutine_left_is_told_and_the_others_are_served() {
    const NAME: &str = "nbd_robust::who_finds_no_coroutine_left_is_told_and_the_others_are_served";
    if std::env::var_os("CONBD_TEST_CHILD").is_none() {
        // The bound is the process's: in one of its own.
        let out = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", NAME, "--nocapture", "--test-threads=1"])
            .env("CONBD_TEST_CHILD", "1")
            .output()
            .unwrap();
        assert!(out.status.success(), "{out:?}");
        return;
    }
    let (export, fault) = faulty("", SIZE);
    let t = TestServer::with(vec![export, memory("plain", SIZE)], 1, |_| {});
    let mut other = t.go("plain", false);
    let mut c = t.go("", false);
    // Idle stacks count as room: take them all, then as many as there may be.
    conbd::co::limit_stacks(80);
    let rule = fault.add_rule(hold(FaultOps::FLUSH));
    let n = 100u64;
    for cookie in 0..n {
        c.send_req(NBD_CMD_FLUSH, 0, cookie, 0, 0);
    }
    // The refused ones are answered at once, the others are held.
    let mut refused = 0;
    while refused == 0 || refused + (fault.held().len() as u64) < n {
        assert!(matches!(c.recv_reply(), Reply::Simple { error: ENOMEM, .. }));
        refused += 1;
    }
    assert!(refused > 30, "{refused}");
    // A new connection finds no room either, and is closed.
    t.connect().expect_close();
    // What needs no coroutine is served: with the fast paths off there is no such read.
    let want = if conbd::util::fast::paths().inline_read { Ok(vec![0; 4]) } else { Err(ENOMEM) };
    assert_eq!(other.read(0, 4), want);
    fault.remove_rule(rule);
    fault.release_all();
    for _ in refused..n {
        assert!(matches!(c.recv_reply(), Reply::Simple { error: 0, .. }));
    }
    assert_eq!(c.call(NBD_CMD_FLUSH, 0, 0, 0), 0);
    t.go("", false).disc();
    c.disc();
    other.disc();
}

#[test]
fn requests_in_flight_are_bounded_167() {
    let (export, fault) = faulty("", SIZE);
    let t = TestServer::with(vec![export], 1, |c| c.conn_requests = 10);
    let mut c = t.go("", false);
    fault.add_rule(hold(FaultOps::FLUSH));
    for cookie in 0..30 {
        c.send_req(NBD_CMD_FLUSH, 0, cookie, 0, 0);
    }
    assert!(fault.wait_held(10, PATIENCE));
    // The eleventh is not begun: another connection's request, sent later, is.
    let mut other = t.go("", false);
    other.send_req(NBD_CMD_FLUSH, 0, 99, 0, 0);
    assert!(fault.wait_held(11, PATIENCE));
    assert_eq!(fault.held().len(), 11);
    fault.clear_rules();
    fault.release_all();
    for _ in 0..30 {
        assert!(matches!(c.recv_reply(), Reply::Simple { error: 0, .. }));
    }
    assert_eq!(other.recv_reply(), Reply::Simple { error: 0, cookie: 99 });
    c.disc();
}

#[test]
fn connections_of_one_export_spread_over_the_threads() {
    let t = TestServer::with(vec![memory("a", SIZE), memory("b", SIZE)], 4, |_| {});
    let mut clients: Vec<Raw> = (0..8).map(|i| t.go(if i % 2 == 0 { "a" } else { "b" }, true)).collect();
    for (i, c) in clients.iter_mut().enumerate() {
        for _ in 0..10 {
            assert_eq!(c.write(0, i as u64 * 4096, &[i as u8; 4096]), 0);
        }
    }
    // Four connections of each export, four threads: one of each on every thread.
    let stats = t.server.stats();
    assert!(stats.iter().all(|s| s.connections_open == 2), "{stats:?}");
    assert!(stats.iter().all(|s| s.requests[usize::from(NBD_CMD_WRITE)] == 20), "{stats:?}");
    // 95: what one wrote all see.
    for c in &mut clients {
        assert_eq!(c.call(NBD_CMD_FLUSH, 0, 0, 0), 0);
    }
    for i in (0..8u8).step_by(2) {
        let mut c = t.go("a", false);
        assert_eq!(c.read(u64::from(i) * 4096, 4096).unwrap(), [i; 4096]);
    }
    clients.into_iter().for_each(Raw::disc);
    t.wait_for("all have left", |s| s.connections() == 0);
    assert!(t.server.stats().iter().all(|s| s.connections_open == 0));
}

#[test]
fn a_flush_covers_the_writes_of_all_connections_111() {
    let (export, fault) = faulty("", SIZE);
    let t = TestServer::with(vec![export], 2, |_| {});
    let mut writer = t.go("", false);
    let mut flusher = t.go("", false);
    let rule = fault.add_rule(hold(FaultOps::FLUSH));
    assert_eq!(writer.write(0, 0, &[1; 512]), 0);
    // Both connections' flushes reach the one node that both write to.
    flusher.send_req(NBD_CMD_FLUSH, 0, 1, 0, 0);
    writer.send_req(NBD_CMD_FLUSH, 0, 2, 0, 0);
    assert!(fault.wait_held(2, PATIENCE));
    fault.remove_rule(rule);
    fault.release_all();
    assert_eq!(flusher.recv_reply(), Reply::Simple { error: 0, cookie: 1 });
    assert_eq!(writer.recv_reply(), Reply::Simple { error: 0, cookie: 2 });
}

#[test]
fn random_headers_are_answered_or_closed_166() {
    let seed: u64 = std::env::var("CONBD_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0x5eed);
    println!("CONBD_SEED={seed}");
    let mut x = seed | 1;
    let mut random = move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    let t = TestServer::unix(vec![memory("", SIZE)]);
    for round in 0..40 {
        let mut c = t.go("", round % 2 == 0);
        let n = 50;
        for cookie in 0..n {
            let cmd = match random() % 10 {
                NBD_DISC => 5,
                small if small < 9 => small as u16,
                _ => random() as u16,
            };
            let flags = if random() % 2 == 0 { 0 } else { random() as u16 };
            let offset = [random() % SIZE, random(), SIZE - 1, 0][random() as usize % 4];
            let mut len = [random() as u32 % 8192, random() as u32, 0, 1][random() as usize % 4];
            if cmd == NBD_CMD_WRITE {
                len %= 100_000;
            }
            c.send_req(cmd, flags, cookie, offset, len);
            if cmd == NBD_CMD_WRITE {
                c.send(&vec![7; len as usize]);
            }
            let replies = c.recv_chunks(cookie);
            let error = Raw::error_of(&replies);
            if error == 0 && cmd == NBD_CMD_READ && matches!(replies[0], Reply::Simple { .. }) {
                c.recv(len as usize);
            }
        }
        // Then bytes that are no header at all.
        let junk: Vec<u8> = (0..100).map(|_| random() as u8).collect();
        c.send_lossy(&junk);
        c.expect_close();
    }
    t.wait_for("all sessions end", |s| s.connections() == 0);
}
const NBD_DISC: u64 = NBD_CMD_DISC as u64;

#[test]
fn thousands_of_connections_come_and_go_without_a_leak() {
    fn fds() -> usize {
        std::fs::read_dir("/proc/self/fd").unwrap().count()
    }
    let t = TestServer::unix(vec![memory("", SIZE)]);
    for _ in 0..50 {
        t.go("", true).disc();
    }
    t.wait_for("all sessions end", |s| s.connections() == 0);
    let mut clients = Vec::new();
    for i in 0..400u32 {
        let mut c = t.go("", i % 2 == 0);
        assert_eq!(c.read(0, 1).unwrap(), [0]);
        clients.push(c);
        match i % 3 {
            0 => drop(clients.pop()),
            1 => clients.pop().unwrap().disc(),
            _ => {}
        }
    }
    assert!(t.server.connections() >= 133);
    drop(clients);
    t.wait_for("all sessions end", |s| s.connections() == 0);
    // Other tests of this process open and close files, too: a leak of hundreds would show all the same.
    let before = fds();
    for _ in 0..300 {
        t.go("", false).disc();
    }
    t.wait_for("all sessions end", |s| s.connections() == 0);
    wait_for("descriptors are closed", || fds() < before + 250);
}

// ------------------------------------------------------------------------------------------------------ shutdown

#[test]
fn shutdown_finishes_what_is_in_flight_and_refuses_the_rest_26_132() {
    let (export, fault) = faulty("", SIZE);
    let t = TestServer::with(vec![export], 2, |_| {});
    let mut idle = t.go("", true);
    let mut haggling = t.haggle();
    let mut busy = t.go("", false);
    let rule = fault.add_rule(hold(FaultOps::WRITE));
    busy.send_req(NBD_CMD_WRITE, 0, 1, 0, 512);
    busy.send(&[1; 512]);
    assert!(fault.wait_held(1, PATIENCE));

    let server = t.server.clone();
    let stopping = std::thread::spawn(move || server.shutdown(PATIENCE));
    // The shutdown has begun when new connections are refused.
    let socket = t.socket();
    wait_for("the listener is closed", || UnixStream::connect(&socket).is_err());
    // A request that comes now is refused, an option too; ABORT is still acknowledged.
    busy.send_req(NBD_CMD_READ, 0, 2, 0, 512);
    assert_eq!(busy.recv_reply(), Reply::Simple { error: ESHUTDOWN, cookie: 2 });
    assert_eq!(busy.write(0, 0, &[2; 70_000]), ESHUTDOWN);
    assert_eq!(haggling.verdict(NBD_OPT_LIST, b""), NBD_REP_ERR_SHUTDOWN);
    assert_eq!(haggling.verdict(NBD_OPT_GO, b"\0\0\0\0\0\0"), NBD_REP_ERR_SHUTDOWN);
    assert_eq!(haggling.verdict(NBD_OPT_ABORT, b""), NBD_REP_ACK);
    haggling.expect_close();

    // What was in flight is finished, and flushed before anybody is hung up on.
    let flush = fault.add_rule(hold(FaultOps::FLUSH));
    fault.remove_rule(rule);
    let write = fault.held()[0].id;
    assert!(fault.release(write));
    assert_eq!(busy.recv_reply(), Reply::Simple { error: 0, cookie: 1 });
    assert!(fault.wait_held(1, PATIENCE));
    assert_eq!(idle.call(NBD_CMD_READ, 0, 0, 1), ESHUTDOWN);
    fault.remove_rule(flush);
    fault.release_all();
    busy.expect_close();
    idle.expect_close();
    let report = stopping.join().unwrap();
    assert_eq!((report.aborted, report.flush_failures), (0, 0));
    assert!(!t.socket().exists());
    // Once more changes nothing.
    assert_eq!(t.shutdown(Duration::ZERO), report);
}

#[test]
fn shutdown_cuts_what_does_not_end_in_time() {
    let (export, fault) = faulty("", SIZE);
    let t = TestServer::with(vec![export], 1, |_| {});
    let mut stuck = t.go("", false);
    fault.add_rule(hold(FaultOps::READ));
    stuck.send_req(NBD_CMD_READ, 0, 1, 0, 512);
    assert!(fault.wait_held(1, PATIENCE));
    let server = t.server.clone();
    let patient = std::thread::spawn(move || server.shutdown(PATIENCE));
    wait_for("the shutdown has begun", || UnixStream::connect(t.socket()).is_err());
    // Less patience now shortens the shutdown that runs.
    let report = t.shutdown(Duration::from_millis(1));
    assert_eq!(report.aborted, 1);
    assert_eq!(patient.join().unwrap(), report);
    fault.clear_rules();
    fault.release_all();
    stuck.expect_close();
    t.wait_for("the session ends", |s| s.connections() == 0);
}

#[test]
fn shutdown_reports_a_flush_that_failed() {
    let (export, fault) = faulty("", SIZE);
    let t = TestServer::unix(vec![export, memory("fine", SIZE)]);
    let c = t.go("", false);
    fault.add_rule(FaultRule::new(FaultOps::FLUSH, FaultAction::Errno(libc::EIO)));
    let report = t.shutdown(PATIENCE);
    assert_eq!((report.aborted, report.flush_failures), (0, 1));
    drop(c);
}

#[test]
fn shutdown_does_not_wait_for_idle_clients_nor_for_half_a_request() {
    let t = TestServer::unix(vec![memory("", SIZE)]);
    let mut clients: Vec<Raw> = (0..20).map(|i| t.go("", i % 2 == 0)).collect();
    clients[0].send(&NBD_REQUEST_MAGIC.to_be_bytes());
    // A payload that is under way when the stop begins, and one that is refused and to be skipped.
    for (i, command) in [(1, NBD_CMD_WRITE), (2, NBD_CMD_WRITE)] {
        clients[i].send_req(command, 0, 1, if i == 1 { 0 } else { SIZE }, 4096);
        clients[i].send(&[1; 100]);
    }
    let report = t.shutdown(PATIENCE);
    assert_eq!(report.aborted, 0);
    clients.iter_mut().for_each(Raw::expect_close);
}

// ------------------------------------------------------------------------------------------------------- sockets

fn start_at(path: &std::path::Path) -> Result<TestServer, String> {
    let config = ServerConfig { listen: vec![ListenAddr::Unix(path.to_owned())], ..ServerConfig::default() };
    let table = ExportTable::new(vec![memory("", SIZE)], None).unwrap();
    TestServer::start(config, table, 1, tempfile::tempdir().unwrap()).map_err(|e| e.to_string())
}

#[test]
fn a_stale_unix_socket_is_replaced_and_a_live_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    // Stale: bound once, and nobody listens any more.
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let t = start_at(&path).unwrap();
    t.go("", false).disc();
    // Live: a second server must not take it away, and must not remove it when it gives up.
    let error = start_at(&path).err().expect("in use");
    assert!(error.contains("another server is listening"), "{error}");
    t.go("", false).disc();
    // Not a socket.
    let file = dir.path().join("file");
    std::fs::write(&file, b"precious").unwrap();
    let error = start_at(&file).err().expect("not a socket");
    assert!(error.contains("not a socket"), "{error}");
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    // At the end only our own file goes.
    std::fs::remove_file(&path).unwrap();
    let other = UnixListener::bind(&path).unwrap();
    t.shutdown(PATIENCE);
    assert!(path.exists(), "another's socket stays");
    drop(other);
}

#[test]
fn an_address_in_use_is_an_error_and_leaves_nothing_behind() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let config = ServerConfig {
        listen: vec![ListenAddr::Unix(path.clone()), ListenAddr::Tcp(addr)],
        ..ServerConfig::default()
    };
    let table = ExportTable::new(vec![], None).unwrap();
    let error = TestServer::start(config, table, 1, tempfile::tempdir().unwrap()).err().expect("in use");
    assert!(error.to_string().contains(&addr.to_string()), "{error}");
    assert!(!path.exists(), "the socket bound before is gone");
    let nothing = ServerConfig::default();
    let table = ExportTable::new(vec![], None).unwrap();
    assert!(TestServer::start(nothing, table, 1, tempfile::tempdir().unwrap()).is_err());
}

// ------------------------------------------------------------------------------------------------------- faults

/// A node with a bug: writes panic.
struct Buggy(MemoryNode);

impl BlockNode for Buggy {
    fn name(&self) -> &str {
        "buggy"
    }
    fn len(&self) -> u64 {
        self.0.len()
    }
    fn read_only(&self) -> bool {
        false
    }
    fn limits(&self) -> Limits {
        self.0.limits()
    }
    fn co_preadv(&self, offset: u64, bufs: &mut [IoSliceMut<'_>]) -> block::Result<()> {
        self.0.co_preadv(offset, bufs)
    }
    fn co_pwritev(&self, _offset: u64, _bufs: &[IoSlice<'_>], _flags: WriteFlags) -> block::Result<()> {
        panic!("a bug, on purpose");
    }
    fn co_pwrite_zeroes(&self, offset: u64, len: u64, flags: WriteFlags) -> block::Result<()> {
        self.0.co_pwrite_zeroes(offset, len, flags)
    }
    fn co_pdiscard(&self, offset: u64, len: u64) -> block::Result<()> {
        self.0.co_pdiscard(offset, len)
    }
    fn co_flush(&self) -> block::Result<()> {
        self.0.co_flush()
    }
    fn co_block_status(&self, offset: u64, len: u64) -> block::Result<Extent> {
        self.0.co_block_status(offset, len)
    }
}

#[test]
fn a_panic_in_a_request_ends_that_connection_only() {
    let t = TestServer::with(
        vec![export_of("", Arc::new(Buggy(MemoryNode::new("m", SIZE).unwrap())))],
        1,
        |_| {},
    );
    let mut other = t.go("", true);
    let mut c = t.go("", true);
    c.send_req(NBD_CMD_WRITE, 0, 1, 0, 512);
    c.send(&[1; 512]);
    c.expect_close();
    assert_eq!(other.read(0, 512).unwrap(), [0; 512]);
    t.wait_for("the session ends", |s| s.connections() == 1);
    assert_eq!(t.server.budget_in_use(), (0, 0));
    other.disc();
}

#[test]
fn a_thousand_connections_are_served() {
    // Both ends of each are in this process.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();
    let t = TestServer::with(vec![memory("", SIZE)], 2, |_| {});
    let mut clients: Vec<Raw> = (0..1000).map(|i| t.go("", i % 2 == 0)).collect();
    for round in 0..2u64 {
        for (i, c) in clients.iter_mut().enumerate() {
            let at = i as u64 * 512;
            assert_eq!(c.write(0, at, &[round as u8 + 1; 512]), 0);
        }
        for (i, c) in clients.iter_mut().enumerate() {
            assert_eq!(c.read((999 - i as u64) * 512, 512).unwrap(), [round as u8 + 1; 512]);
        }
    }
    let per_thread: Vec<u64> = t.server.stats().iter().map(|s| s.connections_open).collect();
    assert_eq!(per_thread, [500, 500]);
    drop(clients);
    t.wait_for("all sessions end", |s| s.connections() == 0);
}

#[test]
fn an_endless_stream_of_requests_does_not_keep_its_thread() {
    let t = TestServer::with(vec![memory("", SIZE)], 1, |_| {});
    let stop = Arc::new(AtomicBool::new(false));
    // Flushes without end, on one connection; nothing ever makes the server wait for them.
    let (mut busy, stopping) = (t.go("", false), stop.clone());
    let flood = std::thread::spawn(move || {
        let batch: Vec<u8> = (0..100u64)
            .flat_map(|cookie| {
                RequestHeader { flags: CmdFlags::empty(), cmd: NBD_CMD_FLUSH, cookie, offset: 0, len: 0 }
                    .encode()
            })
            .collect();
        while !stopping.load(Ordering::Relaxed) {
            busy.send(&batch);
            for _ in 0..100 {
                busy.recv_reply();
            }
        }
    });
    for _ in 0..20 {
        let mut c = t.go("", true);
        assert_eq!(c.read(0, 512).unwrap(), [0; 512]);
        c.disc();
    }
    stop.store(true, Ordering::Relaxed);
    flood.join().unwrap();
}

#[test]
fn running_out_of_descriptors_delays_clients_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (dir.path().join("i.raw"), dir.path().join("s"));
    std::fs::File::create(&image).unwrap().set_len(SIZE).unwrap();
    // The program itself, with few descriptors: they are a limit of a process, and this one needs its own.
    let script = "ulimit -n 48; exec \"$0\" serve \"$1\" --format raw --socket \"$2\" --iothreads 1";
    let mut child = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_conbd")])
        .args([&image, &socket])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut uri = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut uri).unwrap();
    assert!(uri.starts_with("nbd+unix://"), "{uri}");

    let connect = || UnixStream::connect(&socket).unwrap();
    let mut clients: VecDeque<Raw> = (0..60).map(|_| Raw::unix(connect())).collect();
    // The first ones are served, the last ones wait in the kernel's queue until others have left.
    let mut served = 0;
    while let Some(mut c) = clients.pop_front() {
        c.greet(3);
        c.go("");
        assert_eq!(c.read(0, 1).unwrap(), [0]);
        served += 1;
        c.disc();
    }
    assert_eq!(served, 60);
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::TERM)
        .unwrap();
    assert!(child.wait().unwrap().success());
}
