//! What a request costs end to end: a server in this process on a unix socket, driven by a plain blocking client that sends
//! a batch of requests and takes all their replies.
//!
//! Expected, on a 2-core VM that is otherwise idle, per request: `null` about 0.5 us at depth 64 and 3 us at depth 16 (a wake-up per
//! batch is most of it); `file` (warm page cache) 1 us more for each 4 KiB read, 2 us for a write; a second IOThread changes nothing
//! for one connection; 1 MiB reads of `file` are bound by the client's copy, about 150 us. Twice that is worth a look.
//!
//! `cargo bench --bench serve`. The benchmark group is the node and the IOThreads, the name the workload.

use conbd::aio::{AioConfig, IoThread};
use conbd::block::{BlockBackend, BlockNode, FileNode, FileOptions, NullNode};
use conbd::nbd::export::{Export, ExportOptions, ExportTable};
use conbd::nbd::proto::{CmdFlags, NBD_CMD_READ, NBD_CMD_WRITE, NBD_OPT_GO, NBD_REP_ACK};
use conbd::nbd::server::{ListenAddr, Server, ServerConfig};
use conbd::nbd::wire::{InfoRequest, OptionReplyHeader, RequestHeader, SimpleReply, put_option};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};
use std::time::Duration;

const SIZE: u64 = 64 << 20;

/// A server, and what it runs on.
struct Serving {
    server: Arc<Server>,
    main: IoThread,
    threads: Vec<IoThread>,
    dir: tempfile::TempDir,
}

impl Serving {
    fn start(node: Arc<dyn BlockNode>, iothreads: usize) -> Serving {
        let dir = tempfile::tempdir().expect("a folder");
        let export = Export::new(ExportOptions::default(), BlockBackend::new(node)).expect("an export");
        let table = ExportTable::new(vec![export], None).expect("a table");
        let thread =
            |name: String| IoThread::spawn(AioConfig { name, ..AioConfig::default() }).expect("an IOThread");
        let main = thread("main".to_owned());
        let threads: Vec<IoThread> = (0..iothreads).map(|i| thread(format!("io{i}"))).collect();
        let config = ServerConfig {
            listen: vec![ListenAddr::Unix(dir.path().join("nbd.sock"))],
            ..ServerConfig::default()
        };
        let contexts = threads.iter().map(|t| t.context().clone()).collect();
        let (tell, heard) = mpsc::channel();
        let home = main.context().clone();
        main.context().bh_schedule_oneshot(move || {
            let server = Server::start(config, table, contexts, &home);
            tell.send(server.map_err(|e| e.to_string())).expect("somebody waits");
        });
        let server = heard.recv().expect("the main thread runs").expect("it starts");
        Serving { server, main, threads, dir }
    }

    fn client(&self) -> Client {
        let mut stream = UnixStream::connect(self.dir.path().join("nbd.sock")).expect("it listens");
        stream.read_exact(&mut [0; 18]).expect("a greeting");
        let mut hello = 3u32.to_be_bytes().to_vec();
        let mut data = Vec::new();
        InfoRequest::put(&mut data, "", &[]);
        put_option(&mut hello, NBD_OPT_GO, &data);
        stream.write_all(&hello).expect("it reads");
        loop {
            let mut header = [0; OptionReplyHeader::LEN];
            stream.read_exact(&mut header).expect("a reply");
            let header = OptionReplyHeader::decode(&header).expect("an option reply");
            std::io::copy(&mut (&mut stream).take(header.len.into()), &mut std::io::sink())
                .expect("its data");
            if header.reply_type == NBD_REP_ACK {
                break;
            }
        }
        Client { stream, at: 0, out: Vec::new(), replies: vec![0; 2 << 20] }
    }

    fn stop(self) {
        self.server.shutdown(Duration::from_secs(5));
        for thread in self.threads {
            thread.stop().expect("it ends");
        }
        self.main.stop().expect("it ends");
    }
}

struct Client {
    stream: UnixStream,
    at: u64,
    out: Vec<u8>,
    replies: Vec<u8>,
}

impl Client {
    /// Sends `depth` requests of `len` bytes at once, far apart from one another, and takes their replies.
    fn round(&mut self, cmd: u16, depth: u64, len: u32) {
        self.out.clear();
        for cookie in 0..depth {
            self.at = (self.at + (1 << 20) + u64::from(len)) % (SIZE - u64::from(len));
            let offset = self.at / 4096 * 4096;
            let header = RequestHeader { flags: CmdFlags::empty(), cmd, cookie, offset, len: len.into() };
            self.out.extend(header.encode());
            if cmd == NBD_CMD_WRITE {
                self.out.resize(self.out.len() + len as usize, 0x5a);
            }
        }
        self.stream.write_all(&self.out).expect("the server reads");
        let content = if cmd == NBD_CMD_READ { len as usize } else { 0 };
        let mut left = depth as usize * (SimpleReply::LEN + content);
        while left > 0 {
            let n = left.min(self.replies.len());
            let n = self.stream.read(&mut self.replies[..n]).expect("the server answers");
            assert!(n > 0, "the server closed the connection");
            left -= n;
        }
    }
}

fn serve(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("disk.raw");
    let bytes: Vec<u8> = (0..SIZE).map(|i| (i % 251) as u8 + 1).collect();
    std::fs::write(&path, bytes).expect("an image");
    for iothreads in [1, 2] {
        for node in ["null", "file"] {
            let root: Arc<dyn BlockNode> = match node {
                "null" => Arc::new(NullNode::new("null", SIZE)),
                _ => Arc::new(FileNode::open(&FileOptions::new(&path)).expect("the image opens")),
            };
            let serving = Serving::start(root, iothreads);
            let mut client = serving.client();
            let mut g = c.benchmark_group(format!("{node}, {iothreads} IOThreads"));
            for (name, cmd, depth, len) in [
                ("4k read, depth 1", NBD_CMD_READ, 1, 4096u32),
                ("4k read, depth 16", NBD_CMD_READ, 16, 4096),
                ("4k read, depth 64", NBD_CMD_READ, 64, 4096),
                ("4k write, depth 1", NBD_CMD_WRITE, 1, 4096),
                ("4k write, depth 16", NBD_CMD_WRITE, 16, 4096),
                ("1m read, depth 1", NBD_CMD_READ, 1, 1 << 20),
                ("1m write, depth 1", NBD_CMD_WRITE, 1, 1 << 20),
            ] {
                g.throughput(Throughput::Elements(depth));
                g.bench_function(name, |b| b.iter(|| client.round(cmd, depth, len)));
            }
            g.finish();
            drop(client);
            serving.stop();
        }
    }
}

criterion_group!(benches, serve);
criterion_main!(benches);
