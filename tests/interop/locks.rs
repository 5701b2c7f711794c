//! Image locks: QEMU's programs and we keep each other off an image that is written.

use crate::harness::{Builder, Server, TCP_1_THREADS, UNIX_1_IO_URING, UNIX_3_THREADS};
use crate::tools::{run, spawn, tool};
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Stdio};

#[test]
fn qemu_cannot_write_what_we_serve() {
    for args in [&[][..], &["--read-only"]] {
        let server = Builder::new(UNIX_3_THREADS).image_len(1 << 20).args(args).start();
        let image = server.image();
        let image = image.to_str().unwrap();
        let said = run("qemu-io", &["-f", "raw", "-c", "write 0 4k", image]).failed();
        assert!(said.contains("lock"), "{said}");
        let said = run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", "/dev/null", image]);
        assert!(said.failed().contains("lock"));
        // QEMU's raw driver reads along with a writer, if the writer lets it.
        run("qemu-io", &["-f", "raw", "-r", "-c", "read 0 4k", image]).ok();
        let stopped = server.stop();
        run("qemu-io", &["-f", "raw", "-c", "write 0 4k", stopped.image().to_str().unwrap()]).ok();
    }
}

/// A builder whose image is a qcow2 file, to be served by its raw bytes.
fn qcow2_as_raw() -> Builder {
    let builder = Builder::new(UNIX_1_IO_URING).args(&["--format", "raw"]);
    run("qemu-img", &["create", "-q", "-f", "qcow2", builder.image().to_str().unwrap(), "1M"]).ok();
    builder
}

#[test]
fn qemu_cannot_even_read_a_format_whose_file_we_write() {
    let server = qcow2_as_raw().start();
    let image = server.image();
    let image = image.to_str().unwrap();
    for args in [&["info", image][..], &["check", image], &["snapshot", "-l", image]] {
        let said = run("qemu-img", args).failed();
        assert!(said.contains("lock"), "{said}");
    }
    // Who says that he knows better may look.
    run("qemu-img", &["info", "-U", image]).ok();
    server.stop();
}

/// A qemu-io that has opened the image and waits for commands.
fn qemu_io_holding(args: &[&str]) -> Child {
    let mut child = spawn(tool("qemu-io").args(args).stdin(Stdio::piped()).stdout(Stdio::piped()));
    // It answers once it has opened the image.
    child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut said = String::new();
    while !said.contains("MiB") {
        assert_ne!(out.read_line(&mut said).unwrap(), 0, "qemu-io ended: {said}");
    }
    // The pipe stays open, or it would die of it.
    child.stdout = Some(out.into_inner());
    child
}

fn let_go(mut child: Child) {
    child.stdin.take().unwrap().write_all(b"quit\n").unwrap();
    let mut rest = String::new();
    child.stdout.take().unwrap().read_to_string(&mut rest).unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn we_refuse_an_image_that_qemu_has_open() {
    let builder = Builder::new(TCP_1_THREADS).image_len(1 << 20);
    let image = builder.image();
    let image = image.to_str().unwrap();
    let writer = qemu_io_holding(&["-f", "raw", image]);
    for arguments in [&[][..], &["--read-only"][..]] {
        let again = Builder::new(TCP_1_THREADS);
        std::fs::hard_link(image, again.image()).unwrap();
        let (status, said) = again.args(arguments).start_refused();
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(said.contains("lock"), "{said}");
        assert!(said.contains("disk.raw"), "the image is named: {said}");
    }
    let_go(writer);
    builder.start().stop();

    // A reader that cannot bear a writer: QEMU's qcow2 driver.
    let builder = qcow2_as_raw();
    let reader = qemu_io_holding(&["-r", builder.image().to_str().unwrap()]);
    let (status, said) = builder.start_refused();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("lock"), "{said}");
    let_go(reader);
    builder.start().stop();
}

/// Serves the image of another server.
fn serve_image_of(server: &Server, args: &[&str]) -> Builder {
    let builder = Builder::new(UNIX_1_IO_URING).args(args);
    std::fs::hard_link(server.image(), builder.image()).unwrap();
    builder
}

#[test]
fn two_of_us_exclude_each_other_unless_told() {
    let writer = Builder::new(UNIX_3_THREADS).image_len(1 << 20).start();
    for args in [&[][..], &["--read-only"], &["--lock", "shared"]] {
        let (status, said) = serve_image_of(&writer, args).start_refused();
        assert_eq!(status.code(), Some(1), "{args:?}: {said}");
        assert!(said.contains("lock"), "{said}");
    }
    serve_image_of(&writer, &["--lock", "off"]).start().stop();
    writer.stop();

    let reader = Builder::new(UNIX_3_THREADS).image_len(1 << 20).args(&["--read-only"]).start();
    serve_image_of(&reader, &["--read-only"]).start().stop();
    let (status, _) = serve_image_of(&reader, &[]).start_refused();
    assert_eq!(status.code(), Some(1));
    reader.stop();

    let shared = Builder::new(UNIX_3_THREADS).image_len(1 << 20).args(&["--lock", "shared"]).start();
    serve_image_of(&shared, &["--lock", "shared"]).start().stop();
    shared.stop();
}

#[test]
fn the_lock_goes_with_the_process() {
    let server = Builder::new(UNIX_3_THREADS).image_len(1 << 20).start();
    let dir_image = server.image();
    server.signal(rustix::process::Signal::KILL);
    let (_, stopped) = server.wait();
    assert_eq!(stopped.image(), dir_image);
    run("qemu-io", &["-f", "raw", "-c", "write 0 4k", dir_image.to_str().unwrap()]).ok();
}
