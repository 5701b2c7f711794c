//! SIGHUP while clients are connected: exports that come and go, what is told of them, credentials. Sizes are in `grow.rs`.

use crate::cli_harness::{FakeServer, Serving, conbd, must, text};
use crate::nbd_common::{Raw, wait_for};
use crate::pki::{Kind, Pki, Wish, issue};
use conbd::nbd::proto::{NBD_OPT_GO, NBD_REP_ERR_POLICY, NBD_REP_ERR_UNKNOWN};
use rustix::process::Signal;
use serde_json::Value;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

const MIB: u64 = 1 << 20;

/// A daemon with a configuration file in a folder of its own.
struct House {
    dir: tempfile::TempDir,
    serving: Option<Serving>,
    reloads: usize,
}

impl House {
    /// Serves `exports`, after making raw images of these names.
    fn new(images: &[&str], exports: &str) -> House {
        let dir = tempfile::tempdir().unwrap();
        for name in images {
            std::fs::File::create(dir.path().join(name)).unwrap().set_len(MIB).unwrap();
        }
        let mut house = House { dir, serving: None, reloads: 0 };
        house.configure(exports);
        let serving = Serving::start(&["--config", text(&house.path("conbd.toml"))], 1);
        house.serving = Some(serving);
        house
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn configure(&self, exports: &str) {
        let text = format!("[server]\nsocket = ['s']\niothreads = 2\n{exports}");
        std::fs::write(self.path("conbd.toml"), text).unwrap();
    }

    fn serving(&self) -> &Serving {
        self.serving.as_ref().unwrap()
    }

    /// SIGHUP, and until the log has said once more that it is done. What it said then.
    fn reload(&mut self, exports: &str) -> String {
        self.configure(exports);
        self.serving().signal(Signal::HUP);
        self.reloads += 1;
        let done = |log: &str| log.lines().filter(|l| l.contains("SIGHUP: reloaded")).count();
        wait_for("the reload", || done(&self.serving().log()) == self.reloads);
        let log = self.serving().log();
        log.lines().rfind(|l| l.contains("SIGHUP: reloaded")).unwrap().to_owned()
    }

    fn inspect(&self) -> Value {
        let ended = conbd(&["inspect", "--json", &format!("nbd+unix:///?socket={}", text(&self.path("s")))]);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        serde_json::from_str(&ended.stdout).unwrap()
    }

    /// The names that a client is told.
    fn names(&self) -> Vec<String> {
        let report = self.inspect();
        let exports = report["exports"].as_array().unwrap();
        exports.iter().map(|e| e["name"].as_str().unwrap().to_owned()).collect()
    }

    fn haggle(&self) -> Raw {
        let mut c = Raw::unix(UnixStream::connect(self.path("s")).unwrap());
        c.greet(3);
        c
    }

    fn go(&self, name: &str) -> Raw {
        let mut c = self.haggle();
        c.go(name);
        c
    }

    /// What the server answers who asks for an export that it does not give.
    fn refusal(&self, name: &str) -> u32 {
        let mut c = self.haggle();
        c.info(NBD_OPT_GO, name, &[]).last().unwrap().0
    }

    fn stop(mut self) -> (Option<i32>, String, tempfile::TempDir) {
        let (code, log) = self.serving.take().unwrap().stop();
        (code, log, self.dir)
    }
}

/// Whether another program may write the image: nobody holds its locks.
fn is_free(image: &Path) -> bool {
    let out = Command::new("qemu-io").args(["-f", "raw", "-c", "write -P 1 0 512", text(image)]).output();
    out.expect("qemu-io; run: make test-deps").status.success()
}

fn export(name: &str, image: &str, keys: &str) -> String {
    format!("[[export]]\nname = '{name}'\nimage = '{image}'\n{keys}\n")
}

#[test]
fn exports_come_and_go_and_clients_keep_what_they_have() {
    let raw = "format = 'raw'";
    let (a, b) = (export("a", "a.raw", raw), export("b", "b.raw", raw));
    let mut house = House::new(&["a.raw", "b.raw", "c.raw"], &format!("{a}{b}"));
    let (mut on_a, mut on_b) = (house.go("a"), house.go("b"));
    assert_eq!(on_b.write(0, 0, &[7; 4096]), 0);

    let c = export("c", "c.raw", raw);
    let told = house.reload(&format!("{c}{a}"));
    assert!(told.contains("exports=2 added=1 removed=1 changed=0 grown=0 failed=0"), "{told}");
    assert_eq!(house.names(), ["c", "a"], "in the order of the file");
    assert_eq!(house.refusal("b"), NBD_REP_ERR_UNKNOWN);
    let mut on_c = house.go("c");
    assert_eq!(on_c.write(0, 0, &[9; 512]), 0);
    // Its clients go on, with what they had.
    assert_eq!(on_b.read(0, 4096).unwrap(), [7; 4096]);
    assert_eq!(on_b.write(0, 4096, &[8; 4096]), 0);
    assert_eq!(on_a.write(0, 0, &[6; 512]), 0);
    assert!(!is_free(&house.path("b.raw")), "a client writes it");
    // And reloads do not wait for them.
    house.reload(&format!("{c}{a}"));
    assert!(!is_free(&house.path("b.raw")));
    on_b.disc();
    house.serving().wait_for_log("has no client any more");
    assert!(is_free(&house.path("b.raw")));
    let bytes = std::fs::read(house.path("b.raw")).unwrap();
    assert_eq!((&bytes[512..4096], &bytes[4096..8192]), (&[7; 3584][..], &[8; 4096][..]));

    // An image gets another name, and an export another image: without clients, in one reload.
    on_c.disc();
    let ended =
        |log: String| log.lines().any(|l| l.contains("client disconnected") && l.contains("export=\"c\""));
    wait_for("c has no client", || ended(house.serving().log()));
    let told = house.reload(&format!("{}{}", export("z", "c.raw", raw), export("c", "b.raw", raw)));
    assert!(told.contains("exports=2 added=2 removed=2"), "{told}");
    assert!(told.contains("failed=0"), "{told}");
    let mut on_z = house.go("z");
    assert_eq!(on_z.read(0, 512).unwrap(), [9; 512]);
    assert_eq!(house.go("c").read(4096, 4096).unwrap(), [8; 4096]);
    on_z.disc();
    // `a` was removed, too, and its client is still there.
    assert_eq!(on_a.read(0, 512).unwrap(), [6; 512]);
    assert_eq!(on_a.write(0, 0, &[5; 512]), 0);
    let (code, log, dir) = house.stop();
    assert_eq!(code, Some(0), "{log}");
    assert_eq!(std::fs::read(dir.path().join("a.raw")).unwrap()[..512], [5; 512]);
}

#[test]
fn an_export_that_cannot_be_opened_does_not_keep_others_from_coming() {
    let (a, b) = (export("a", "a.raw", ""), export("b", "b.raw", ""));
    let mut house = House::new(&["a.raw", "b.raw"], &a);
    let missing = export("m", "m.raw", "");
    let all = format!("{a}{missing}{b}");
    let told = house.reload(&all);
    assert!(told.contains("exports=2 added=1 removed=0 changed=0 grown=0 failed=1"), "{told}");
    let log = house.serving().log();
    assert!(log.contains("m.raw") && log.contains("does not exist"), "{log}");
    assert_eq!(house.names(), ["a", "b"]);
    // It is tried again when asked.
    std::fs::File::create(house.path("m.raw")).unwrap().set_len(2 * MIB).unwrap();
    let told = house.reload(&all);
    assert!(told.contains("exports=3 added=1 removed=0 changed=0 grown=0 failed=0"), "{told}");
    assert_eq!(house.names(), ["a", "m", "b"]);
    // An image that a client of a removed export still writes cannot have another name yet.
    let mut on_b = house.go("b");
    let told = house.reload(&format!("{a}{}", export("d", "b.raw", "")));
    assert!(told.contains("added=0 removed=2") && told.contains("failed=1"), "{told}");
    assert_eq!(on_b.write(0, 0, &[1; 512]), 0);
    on_b.disc();
    // Not the other one that went: it had no client.
    house.serving().wait_for_log("its image is closed export=\"b\"");
    let told = house.reload(&format!("{a}{}", export("d", "b.raw", "")));
    assert!(told.contains("added=1") && told.contains("failed=0"), "{told}");
    assert_eq!(house.go("d").read(0, 512).unwrap(), [1; 512]);
    assert_eq!(house.stop().0, Some(0));
}

#[test]
fn what_is_told_and_who_may_come_changes_for_those_who_come_later() {
    let mut house = House::new(&["a.raw"], &export("a", "a.raw", "description = 'old'"));
    let mut early = house.go("a");
    let told = house.reload(&export(
        "a",
        "a.raw",
        "description = 'new'\nmax_connections = 1\nallocation_depth = true",
    ));
    assert!(told.contains("removed=0 changed=1"), "{told}");
    let report = house.inspect();
    assert_eq!(report["exports"][0]["description"], "new");
    assert_eq!(report["exports"][0]["contexts"][1], "qemu:allocation-depth");
    assert_eq!(house.refusal("a"), NBD_REP_ERR_POLICY, "the early one counts");
    assert_eq!(early.write(0, 0, &[1; 512]), 0);
    early.disc();
    wait_for("there is room again", || house.haggle().info(NBD_OPT_GO, "a", &[]).len() > 1);
    // The image stayed open all the time.
    assert!(!is_free(&house.path("a.raw")));
    let told = house.reload(&export("a", "a.raw", "allow = ['uid:4294967294']"));
    assert!(told.contains("changed=1"), "{told}");
    assert_eq!(house.refusal("a"), NBD_REP_ERR_POLICY);
    let told = house.reload(&export("a", "a.raw", "cache = 'none'"));
    assert!(told.contains("changed=1"), "{told}");
    assert!(house.serving().log().contains("keys that say how the image is opened"));
    let mut late = house.go("a");
    assert_eq!(late.read(0, 512).unwrap(), [1; 512]);
    late.disc();
    assert_eq!(house.stop().0, Some(0));
}

#[test]
fn a_stop_closes_the_images_of_removed_exports_too() {
    let run = |args: &[&str]| must("qemu-img", args);
    let mut house = House::new(&["a.raw"], &export("a", "a.raw", ""));
    let disk = house.path("q.qcow2");
    run(&["create", "-q", "-f", "qcow2", text(&disk), "4M"]);
    run(&["bitmap", "--add", text(&disk), "b"]);
    let (a, q) = (export("a", "a.raw", ""), export("q", "q.qcow2", "bitmaps = ['b']"));
    house.reload(&format!("{a}{q}"));
    let mut on_q = house.go("q");
    assert_eq!(on_q.write(0, 65536, &[3; 65536]), 0);
    house.reload(&a);
    assert_eq!(on_q.write(0, 1 << 20, &[4; 512]), 0);
    let (code, log, _dir) = house.stop();
    assert_eq!(code, Some(0), "{log}");
    run(&["check", "-q", text(&disk)]);
    // The bitmap was stored, which only a clean close does, and knows both writes.
    let info: Value = serde_json::from_str(&run(&["info", "--output=json", text(&disk)])).unwrap();
    let bitmap = &info["format-specific"]["data"]["bitmaps"][0];
    assert_eq!((&bitmap["name"], &bitmap["flags"]), (&"b".into(), &Value::from(vec!["auto"])), "{info}");
}

#[test]
fn credentials_are_read_again_and_bad_ones_are_not_taken() {
    let pki = Pki::new(Kind::P256);
    let tls = format!(
        "[tls]\nmode = 'required'\ncert = '{0}/server-cert.pem'\nkey = '{0}/server-key.pem'\n",
        pki.dir.path().display()
    );
    let all = format!("{tls}{}", export("a", "a.raw", ""));
    let mut house = House::new(&["a.raw"], &all);
    let uri = format!(
        "nbds+unix:///a?socket={}&tls-certificates={}",
        text(&house.path("s")),
        pki.dir.path().display()
    );
    let server = || {
        let ended = conbd(&["inspect", "--json", &uri]);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        let report: Value = serde_json::from_str(&ended.stdout).unwrap();
        report["tls_server"].as_str().unwrap().to_owned()
    };
    assert_eq!(server(), "CN=localhost,O=Example,C=DE");
    let wish = Wish { subject: &[("CN", "renewed")], dns: &["localhost"], ..Wish::default() };
    issue(Some(&pki.ca), &wish).write(pki.dir.path(), "server");
    assert_eq!(server(), "CN=localhost,O=Example,C=DE", "nobody has looked yet");
    let told = house.reload(&all);
    assert!(told.contains("failed=0"), "{told}");
    assert_eq!(server(), "CN=renewed");
    // A key of another certificate.
    let other = tempfile::tempdir().unwrap();
    let (_, key) = issue(Some(&pki.ca), &wish).write(other.path(), "other");
    std::fs::copy(key, pki.path("server-key.pem")).unwrap();
    let told = house.reload(&all);
    assert!(told.contains("failed=1"), "{told}");
    assert!(house.serving().log().contains("the TLS credentials cannot be used"));
    assert_eq!(server(), "CN=renewed");
    let told = house.reload(&export("a", "a.raw", ""));
    assert!(told.contains("failed=0"), "{told}");
    assert!(house.serving().log().contains("[tls] mode"), "TLS is not switched off under way");
    assert_eq!(server(), "CN=renewed");
    let (code, log, _dir) = house.stop();
    assert_eq!(code, Some(0), "{log}");
}

#[test]
fn a_stop_does_not_wait_for_a_reload_longer_than_it_is_told_to() {
    let (connected, seen) = std::sync::mpsc::channel();
    // Takes connections, and says nothing: opening what lies on it takes as long as patience lasts.
    let silent = FakeServer::start(move |stream| {
        let _ = connected.send(());
        std::io::Read::read(stream, &mut [0]).map(drop)
    });
    let mut house = House::new(&["a.raw"], &export("a", "a.raw", ""));
    let backing = format!("nbd+unix:///?socket={}", text(&silent.path));
    let top = house.path("top.qcow2");
    must("qemu-img", &["create", "-q", "-u", "-f", "qcow2", "-b", &backing, "-F", "raw", text(&top), "1M"]);
    house.configure(&format!(
        "{}{}",
        export("a", "a.raw", ""),
        export("top", "top.qcow2", "backing_nbd = true")
    ));
    let serving = house.serving.take().unwrap();
    serving.signal(Signal::HUP);
    seen.recv_timeout(crate::cli_harness::PATIENCE).expect("the image is being opened");
    serving.signal(Signal::TERM);
    serving.wait_for_log("stopping signal");
    serving.signal(Signal::TERM);
    let (code, log) = serving.wait();
    assert_eq!(code, Some(4), "the second signal ends it at once: {log}");
    assert!(!log.contains("cannot be added"), "it had not come to an end: {log}");
}
