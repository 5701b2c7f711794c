//! What does a step of a server's TLS handshake cost, per kind of key? A step is what the loop cannot interrupt; those that take
//! milliseconds run in the thread pool. And how fast are records encrypted?
//!
//! Expected, from `openssl speed` on a 2-core virtual machine with AES-NI: a signature takes 0.03 ms with ECDSA P-256, 0.05 with
//! Ed25519, 0.8 with RSA-2048, 1.1 with P-384, 2.4 with RSA-3072, 5 with RSA-4096; the key exchange adds 0.1 (X25519). 16 KiB
//! records are encrypted at 3.2 GB/s (AES-128-GCM).

#![allow(missing_docs, reason = "criterion's macros make public functions")]
#![allow(clippy::unwrap_used, reason = "a bench fails by panicking")]
#![allow(dead_code, unreachable_pub, reason = "shared with the tests, which use all of it")]

#[path = "../tests/it/pki.rs"]
mod pki;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use openssl::ssl::{
    ErrorCode, Ssl, SslContext, SslFiletype, SslMethod, SslOptions, SslStream, SslVerifyMode,
};
use pki::{Kind, Pki, TlsClient};
use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

#[derive(Default)]
struct Pipe {
    input: Vec<u8>,
    output: Vec<u8>,
}

impl Read for Pipe {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.input.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let n = buf.len().min(self.input.len());
        buf[..n].copy_from_slice(&self.input[..n]);
        self.input.drain(..n);
        Ok(n)
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.output.extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn server(pki: &Pki, verify: bool) -> SslContext {
    let mut b = SslContext::builder(SslMethod::tls_server()).unwrap();
    b.set_certificate_file(pki.path("server-cert.pem"), SslFiletype::PEM).unwrap();
    b.set_private_key_file(pki.path("server-key.pem"), SslFiletype::PEM).unwrap();
    b.set_options(SslOptions::NO_TICKET);
    b.set_num_tickets(0).unwrap();
    if verify {
        b.set_ca_file(pki.path("ca-cert.pem")).unwrap();
        b.set_verify(SslVerifyMode::PEER | SslVerifyMode::FAIL_IF_NO_PEER_CERT);
    }
    b.build()
}

/// A whole handshake; returns the server's longest step, and both sides.
fn shake(context: &SslContext, client: Ssl) -> (Duration, SslStream<Pipe>, SslStream<Pipe>) {
    let mut ssl = Ssl::new(context).unwrap();
    ssl.set_accept_state();
    let mut server = SslStream::new(ssl, Pipe::default()).unwrap();
    let mut client = SslStream::new(client, Pipe::default()).unwrap();
    let mut longest = Duration::ZERO;
    let (mut done, mut client_done) = (false, false);
    while !done || !client_done {
        if !client_done {
            match client.connect() {
                Ok(()) => client_done = true,
                Err(e) => assert_eq!(e.code(), ErrorCode::WANT_READ, "{e}"),
            }
            let flight = std::mem::take(&mut client.get_mut().output);
            server.get_mut().input.extend(flight);
        }
        if !done {
            let begin = Instant::now();
            let step = server.do_handshake();
            longest = longest.max(begin.elapsed());
            match step {
                Ok(()) => done = true,
                Err(e) => assert_eq!(e.code(), ErrorCode::WANT_READ, "{e}"),
            }
            let flight = std::mem::take(&mut server.get_mut().output);
            client.get_mut().input.extend(flight);
        }
    }
    (longest, server, client)
}

fn handshakes(c: &mut Criterion) {
    let mut group = c.benchmark_group("longest step of a handshake");
    group.sample_size(20);
    let kinds = [Kind::P256, Kind::Ed25519, Kind::Rsa(2048), Kind::Rsa(3072), Kind::Rsa(4096), Kind::P384];
    for (kind, verify) in kinds.into_iter().map(|k| (k, false)).chain([(Kind::P256, true)]) {
        let pki = Pki::new(kind);
        let context = server(&pki, verify);
        let what = if verify { " with a client certificate" } else { "" };
        group.bench_function(format!("{kind:?}{what}"), |b| {
            b.iter_custom(|n| {
                (0..n)
                    .map(|_| {
                        let client = TlsClient::new();
                        let client = if verify { client.identity(&pki.client) } else { client };
                        shake(&context, client.ssl()).0
                    })
                    .sum()
            });
        });
    }
    group.finish();
}

fn records(c: &mut Criterion) {
    let pki = Pki::new(Kind::P256);
    let (_, mut server, _client) = shake(&server(&pki, false), TlsClient::new().ssl());
    let data = vec![7; 15 << 14];
    let mut group = c.benchmark_group("encrypt");
    group.throughput(Throughput::Bytes(data.len() as u64));
    group.bench_function("15 records", |b| {
        b.iter(|| {
            server.get_mut().output.clear();
            assert_eq!(server.ssl_write(&data).unwrap(), data.len());
        });
    });
    group.finish();
}

criterion_group!(benches, handshakes, records);
criterion_main!(benches);
