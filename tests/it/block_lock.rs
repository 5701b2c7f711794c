//! Image locks: between our own nodes, and between us and QEMU's programs.

use crate::support::{HANG, run};
use conbd::block::{FileNode, FileOptions, LockMode, OpenError, OpenOptions, open};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

fn image() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    (dir, path)
}

fn try_open(path: &Path, read_only: bool, lock: LockMode) -> Result<FileNode, OpenError> {
    FileNode::open(&FileOptions { read_only, lock, ..FileOptions::new(path) })
}

#[test]
fn our_own_nodes_exclude_each_other_as_the_table_says() {
    use LockMode::{Off, On, Shared};
    const RW: bool = false;
    const RO: bool = true;
    #[rustfmt::skip]
    let table = [
        // first       second        together
        ((RW, On),     (RW, On),     false),
        ((RW, On),     (RO, On),     false),
        ((RO, On),     (RW, On),     false),
        ((RO, On),     (RO, On),     true),
        ((RW, Shared), (RW, Shared), true),
        ((RW, Shared), (RO, Shared), true),
        ((RO, Shared), (RW, Shared), true),
        ((RW, Shared), (RW, On),     false),
        ((RW, On),     (RW, Shared), false),
        ((RW, Shared), (RO, On),     false),
        ((RO, On),     (RW, Shared), false),
        ((RW, On),     (RO, Shared), false),
        ((RO, On),     (RO, Shared), true),
        ((RW, On),     (RW, Off),    true),
        ((RW, Off),    (RW, On),     true),
    ];
    let (_dir, path) = image();
    for (first, second, together) in table {
        let a = try_open(&path, first.0, first.1).expect("the first");
        let b = try_open(&path, second.0, second.1);
        assert_eq!(b.is_ok(), together, "{first:?} and then {second:?}");
        drop((a, b));
    }
    try_open(&path, RW, On).expect("all locks went with their nodes");
}

#[test]
fn lock_error_names_the_image_the_reason_and_the_next_step() {
    let (_dir, path) = image();
    let _held = try_open(&path, false, LockMode::On).unwrap();
    let e = match open(&OpenOptions::new(&path)) {
        Ok(_) => panic!("opened twice"),
        Err(e) => e,
    };
    let text = e.to_string();
    let me = format!("held by process {}", std::process::id());
    for s in
        [path.to_str().unwrap(), "in use", "does not let anybody else write it", "lock byte 201", &me, "off"]
    {
        assert!(text.contains(s), "{text:?} does not say {s:?}");
    }
    assert_eq!(e.errno(), libc::EAGAIN);
}

/// A QEMU program that holds an image open.
struct Holder {
    child: Child,
}

impl Holder {
    fn writer(path: &Path) -> Holder {
        let mut child = Command::new("qemu-io")
            .args(["-f", "raw", path.to_str().unwrap()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io");
        // Its answer to a first command says that it has opened the image.
        child.stdin.as_mut().unwrap().write_all(b"read 0 512\n").unwrap();
        let mut out = BufReader::new(child.stdout.as_mut().unwrap());
        let mut line = String::new();
        while !line.contains("read 512/512") {
            line.clear();
            assert_ne!(out.read_line(&mut line).unwrap(), 0, "qemu-io ended");
        }
        Holder { child }
    }

    fn server(path: &Path, args: &[&str]) -> Holder {
        let socket = path.with_extension("sock");
        let child = Command::new("qemu-nbd")
            .args(args)
            .args(["-t", "-k", socket.to_str().unwrap(), path.to_str().unwrap()])
            .spawn()
            .expect("qemu-nbd");
        let mut holder = Holder { child };
        let deadline = Instant::now() + HANG;
        // It listens early, and greets when it has opened the image.
        let greets = || {
            let mut magic = [0; 8];
            let mut stream = UnixStream::connect(&socket).ok()?;
            stream.set_read_timeout(Some(HANG)).ok()?;
            stream.read_exact(&mut magic).ok()?;
            (magic == *b"NBDMAGIC").then_some(())
        };
        while greets().is_none() {
            assert!(holder.child.try_wait().unwrap().is_none(), "qemu-nbd ended");
            assert!(Instant::now() < deadline, "qemu-nbd does not greet");
            std::thread::yield_now();
        }
        holder
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // Our own child; that it has ended already is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn qemu_keeps_us_out() {
    let (_dir, path) = image();
    {
        let _writer = Holder::writer(&path);
        for read_only in [false, true] {
            match try_open(&path, read_only, LockMode::On) {
                Err(OpenError::Locked { byte, holder, .. }) => {
                    assert!([201, 101].contains(&byte), "{byte}");
                    assert!(holder.is_some_and(|h| h.contains("qemu-io")), "named from /proc");
                }
                r => panic!("read_only {read_only}: {:?}", r.map(drop)),
            }
        }
        try_open(&path, false, LockMode::Off).expect("off looks at no lock");
    }
    {
        // Of a raw image qemu-nbd would share writing, even with -r.
        run("qemu-img", &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "1M"]).unwrap();
        let _reader = Holder::server(&path, &["-r", "-f", "qcow2"]);
        try_open(&path, true, LockMode::On).expect("two readers");
        assert!(matches!(try_open(&path, false, LockMode::On), Err(OpenError::Locked { byte: 201, .. })));
        assert!(matches!(try_open(&path, false, LockMode::Shared), Err(OpenError::Locked { byte: 201, .. })));
    }
    try_open(&path, false, LockMode::On).expect("QEMU has gone");
}

#[test]
fn shared_is_what_qemu_nbd_takes_for_raw_images() {
    let (_dir, path) = image();
    let _theirs = Holder::server(&path, &["-f", "raw"]);
    let ours = try_open(&path, false, LockMode::Shared).expect("beside a qemu-nbd");
    assert!(matches!(try_open(&path, true, LockMode::On), Err(OpenError::Locked { byte: 101, .. })));
    drop(ours);
    drop(try_open(&path, true, LockMode::Shared).expect("reading beside it"));
}

fn qemu_io(path: &Path, args: &[&str], command: &str) -> Result<String, String> {
    let path = path.to_str().unwrap();
    run("qemu-io", &[args, &["-f", "raw", "-c", command, path]].concat())
}

/// Reads the image as a user who needs it to hold still.
fn qemu_convert(path: &Path) -> Result<String, String> {
    let to = path.with_extension("copy");
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", path.to_str().unwrap(), to.to_str().unwrap()])
}

#[test]
fn we_keep_qemu_out() {
    let (_dir, path) = image();
    {
        let _writer = try_open(&path, false, LockMode::On).unwrap();
        let e = qemu_io(&path, &[], "write 0 512").expect_err("we write it");
        assert!(e.contains("lock"), "{e}");
        let e = qemu_convert(&path).expect_err("nor copy it");
        assert!(e.contains("lock"), "{e}");
        qemu_io(&path, &["-r", "-U"], "read 0 512").expect("unless by force");
    }
    {
        let _reader = try_open(&path, true, LockMode::On).unwrap();
        qemu_convert(&path).expect("two readers");
        qemu_io(&path, &[], "write 0 512").expect_err("we read it");
    }
    {
        let _anarchist = try_open(&path, false, LockMode::Off).unwrap();
        qemu_io(&path, &[], "write 0 512").expect("off takes no lock");
    }
    qemu_io(&path, &[], "write 0 512").expect("we have gone");
}
