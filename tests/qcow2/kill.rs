//! A daemon that is killed while it writes: what was answered before the last flush is in the image, which is whole.
//!
//! The kernel survives here, so this says nothing about barriers (`crash.rs` does); it is about the real daemon, with its
//! threads, sockets, files and image locks.

use crate::cli_harness::Serving;
use crate::corpus::{content_by_qemu, qemu_img, qemu_io, text};
use crate::driver::{Threads, difference};
use crate::image::{self, Layout};
use crate::power::{BITMAP_IN_USE, GuestKind, GuestOp, History, Rng, SECTOR, fill, seed};
use crate::support::run;
use conbd::block::SimClock;
use conbd::nbd::client::{Client, Uri};
use conbd::nbd::proto::CmdFlags;
use conbd::util::buf::IoBuf;
use rustix::process::Signal;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const SIZE: usize = 4 << 20;
const CLIENTS: usize = 4;
/// Requests of one client at most: it is bounded even if nobody kills.
const REQUESTS: usize = 4000;

#[derive(Default)]
struct Told {
    history: History,
    connected: usize,
    /// Requests that were refused while the daemon was alive.
    errors: Vec<String>,
}

/// Works until the connection is gone. Coroutine only.
fn co_client(uri: &Uri, told: &Mutex<Told>, clock: &SimClock, mut rng: Rng) {
    let client = Client::co_connect(uri).expect("the daemon is there");
    told.lock().unwrap().connected += 1;
    let sectors = SIZE / SECTOR;
    for _ in 0..REQUESTS {
        let what = rng.below(16);
        if what < 3 {
            let issued = clock.tick();
            match client.co_flush() {
                Ok(()) => told.lock().unwrap().history.flushes.push((issued, clock.tick())),
                Err(_) => return,
            }
            continue;
        }
        let count = 1 + rng.below(40) as usize;
        let first = rng.below((sectors - count) as u64) as usize;
        let kind = match what {
            3 => GuestKind::Zero,
            4 => GuestKind::Discard,
            _ => GuestKind::Write,
        };
        let fua = kind != GuestKind::Discard && rng.one_in(8);
        let op = {
            let mut t = told.lock().unwrap();
            let issued = clock.tick();
            t.history.ops.push(GuestOp { kind, first, count, fua, issued, acked: None });
            t.history.ops.len() - 1
        };
        let (offset, len) = ((first * SECTOR) as u64, count * SECTOR);
        let flags = if fua { CmdFlags::NBD_CMD_FLAG_FUA } else { CmdFlags::empty() };
        let done = match kind {
            GuestKind::Write => {
                let mut buf = IoBuf::zeroed(len);
                for (k, s) in buf.chunks_mut(SECTOR).enumerate() {
                    fill(op, first + k, s);
                }
                client.co_write(offset, buf, flags).map(drop)
            }
            GuestKind::Zero => client.co_write_zeroes(offset, len as u64, flags),
            GuestKind::Discard => client.co_trim(offset, len as u64, flags),
        };
        let mut t = told.lock().unwrap();
        match done {
            Ok(()) => t.history.ops[op].acked = Some(clock.tick()),
            Err(e @ conbd::nbd::client::ClientError::Request { .. }) => {
                t.errors.push(e.to_string());
                return;
            }
            // The daemon is gone.
            Err(_) => return,
        }
    }
}

/// Waits until the killed daemon's locks are gone: io_uring may hold its files for a moment after it has ended.
fn wait_for_locks(path: &Path) {
    let begin = Instant::now();
    while let Err(e) = run("qemu-img", &["info", text(path)]) {
        assert!(e.contains("lock") && begin.elapsed() < Duration::from_secs(60), "{e}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn killed_again_and_again(options: &str, bitmap: bool, backing: bool, rounds: usize, seed: u64) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    let size = SIZE.to_string();
    let mut options = options.to_owned();
    if backing {
        fs::write(dir.path().join("base.img"), crate::corpus::noise(3 << 20, 9)).unwrap();
        options = format!("backing_file=base.img,backing_fmt=raw,{options}");
    }
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, text(&path), &size]);
    qemu_io(&path, &["write -P 7 1M 300k".to_owned()]);
    let threads = Threads::new(CLIENTS);
    let mut rng = Rng(seed);
    let mut flushes = 0;
    for round in 0..rounds {
        let name = format!("round {round} with CONBD_SEED={seed}");
        if bitmap {
            // What the last round left is marked in use, for good.
            qemu_img(&["bitmap", "--add", "-g", "4k", text(&path), &format!("b{round}")]);
        }
        let initial = content_by_qemu(&path, None);
        let serving = Serving::start(&[text(&path), "--iothreads", "2", "--listen", "127.0.0.1:0"], 1);
        let uri: Uri = serving.uri().parse().unwrap();
        let history = History { sectors: SIZE / SECTOR, ..History::default() };
        let told = Arc::new(Mutex::new(Told { history, ..Told::default() }));
        let clock = SimClock::default();
        let tasks: Vec<_> = (0..CLIENTS)
            .map(|i| {
                let (uri, told, clock, rng) =
                    (uri.clone(), Arc::clone(&told), clock.clone(), Rng(rng.next()));
                threads.spawn(i, move || co_client(&uri, &told, &clock, rng))
            })
            .collect();
        // After so many answers, wherever everybody is then.
        let enough = 150 + rng.below(600) as usize;
        let begin = Instant::now();
        loop {
            let (connected, answered) = {
                let told = told.lock().unwrap();
                (told.connected, told.history.ops.iter().filter(|o| o.acked.is_some()).count())
            };
            if connected == CLIENTS && answered >= enough {
                break;
            }
            assert!(
                begin.elapsed() < Duration::from_secs(120),
                "{name}: {answered} answers: {}",
                serving.log()
            );
            std::thread::sleep(Duration::from_micros(500));
        }
        serving.signal(Signal::KILL);
        assert_eq!(serving.wait().0, None, "{name}: it was killed");
        tasks.into_iter().for_each(|t| t.join());
        let told = told.lock().unwrap();
        assert_eq!(told.errors, Vec::<String>::new(), "{name}");
        flushes += told.history.flushes.len();

        wait_for_locks(&path);
        let bytes = fs::read(&path).unwrap();
        let found = image::check(&bytes);
        assert_eq!(found.corruptions, Vec::<String>::new(), "{name}");
        let by_qemu = run("qemu-img", &["check", "-q", "-f", "qcow2", text(&path)]);
        let leaks_only = |e: &String| e.contains("exit status: 3");
        assert!(by_qemu.as_ref().err().is_none_or(leaks_only), "{name}: {by_qemu:?}");
        let data = content_by_qemu(&path, None);
        told.history.judge_after(&data, &initial).unwrap_or_else(|e| panic!("{name}: {e}"));
        threads.open_really(true);
        let node = threads.open(&path, true, None).unwrap_or_else(|e| panic!("{name}: {e}"));
        let reader = Arc::clone(&node);
        let ours = threads.run(move || crate::driver::co_read_all(&*reader)).unwrap();
        threads.close(node).unwrap();
        assert_eq!(difference(&ours, &data), None, "{name}: we read it otherwise than qemu-img");
        if bitmap {
            let l = Layout::parse(&bytes).unwrap();
            let bitmaps = l.bitmaps.unwrap().2;
            let last = bitmaps.iter().find(|b| b.name == format!("b{round}")).expect("it was not lost");
            assert_ne!(last.flags & BITMAP_IN_USE, 0, "{name}: the bitmap claims to know all writes");
        }
    }
    assert!(flushes > 20 * rounds, "{flushes} flushes are few");
    let repaired = crate::cli_harness::conbd(&["check", "--repair", "leaks", text(&path)]);
    assert_eq!(repaired.code, Some(0), "{repaired:?}");
    run("qemu-img", &["check", "-q", "-f", "qcow2", text(&path)]).unwrap();
}

#[test]
fn a_killed_daemon_leaves_whole_images_with_all_that_was_flushed() {
    let seed = seed(77);
    killed_again_and_again("cluster_size=4k", false, false, 4, seed);
    killed_again_and_again("cluster_size=64k", true, false, 3, seed + 1);
    killed_again_and_again("cluster_size=16k,extended_l2=on", false, true, 3, seed + 2);
}
