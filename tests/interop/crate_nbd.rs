//! The crate `nbd`: an independent client that uses the old `EXPORT_NAME` and wants the 124 zeroes after it.

use crate::harness::{Builder, Setup, matrix, noise};
use crate::wire::Conn;
use nbd::client::{NbdClient, handshake};
use std::io::{Read, Seek, SeekFrom, Write};

matrix!(reads_and_writes);

fn reads_and_writes(setup: Setup) {
    let data = noise(1 << 20, 11);
    let server = Builder::new(setup).image_data(&data).start();
    let mut conn = Conn::new(&server.uri);
    let export = handshake(&mut conn, b"").unwrap();
    assert_eq!(export.size, 1 << 20);
    assert!(!export.readonly);
    assert!(export.send_flush);
    assert!(export.send_trim);
    let mut client = NbdClient::new(&mut conn, &export);

    let mut back = vec![0; 1 << 20];
    client.read_exact(&mut back).unwrap();
    assert!(back == data);
    client.seek(SeekFrom::Start(4096)).unwrap();
    client.write_all(&[0xab; 8192]).unwrap();
    client.flush().unwrap();
    client.seek(SeekFrom::Start(4095)).unwrap();
    let mut piece = vec![0; 8194];
    client.read_exact(&mut piece).unwrap();
    assert_eq!((piece[0], piece[8193]), (data[4095], data[4096 + 8192]));
    assert!(piece[1..8193].iter().all(|&b| b == 0xab));
    // It leaves without a goodbye.
    drop(conn);

    let stopped = server.stop();
    assert!(std::fs::read(stopped.image()).unwrap()[4096..12288].iter().all(|&b| b == 0xab));
}

#[test]
fn an_unknown_export_name_ends_the_connection_without_a_word() {
    let server =
        Builder::new(crate::harness::TCP_1_THREADS).image_len(4096).args(&["--export", "known"]).start();
    let mut conn = Conn::new(&server.uri);
    let e = handshake(&mut conn, b"unknown").unwrap_err();
    assert!(
        matches!(e.kind(), std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::ConnectionReset),
        "{e}"
    );
    for name in [b"known".as_slice(), b""] {
        assert_eq!(handshake(Conn::new(&server.uri), name).unwrap().size, 4096);
    }
    server.stop();
}

#[test]
fn a_read_only_export_says_so() {
    let server = Builder::new(crate::harness::UNIX_1_IO_URING).image_len(4096).args(&["--read-only"]).start();
    let mut conn = Conn::new(&server.uri);
    let export = handshake(&mut conn, b"").unwrap();
    assert!(export.readonly);
    let mut client = NbdClient::new(&mut conn, &export);
    let e = client.write(&[1; 512]).unwrap_err();
    assert_eq!(e.kind(), std::io::ErrorKind::PermissionDenied, "{e}");
    // The payload of the refused write was taken: the next request works.
    let mut back = [1; 512];
    client.seek(SeekFrom::Start(0)).unwrap();
    client.read_exact(&mut back).unwrap();
    assert_eq!(back, [0; 512]);
    server.stop();
}
