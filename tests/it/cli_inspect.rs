//! `conbd inspect`: what it tells about our server and about others', and its exit code as a health check.

use crate::cli_harness::{Serving, conbd, image, peer, text};
use serde_json::Value;

fn inspect(uri: &str) -> Value {
    let ended = conbd(&["inspect", uri, "--json"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    serde_json::from_str(&ended.stdout).unwrap()
}

fn has_flag(export: &Value, flag: &str) -> bool {
    export["flags"].as_array().unwrap().iter().any(|f| f == flag)
}

#[test]
fn our_server_tells_everything() {
    let (_dir, disk) = image(3 << 20);
    let serving = Serving::start(
        &[text(&disk), "--export", "disk", "--description", "a text", "--listen", "127.0.0.1:0"],
        1,
    );
    let report = inspect(serving.uri());
    assert_eq!(report["uri"], serving.uri());
    assert_eq!(report["protocol"], "newstyle-fixed");
    assert_eq!((&report["structured_replies"], &report["tls"]), (&Value::Bool(true), &Value::Bool(false)));
    let export = &report["exports"][0];
    assert_eq!((&export["name"], &export["canonical_name"]), (&"disk".into(), &"disk".into()));
    assert_eq!(export["description"], "a text");
    assert_eq!(export["size"], 3 << 20);
    assert_eq!(export["read_only"], false);
    assert_eq!(export["block_size"]["minimum"], 1);
    assert_eq!(export["contexts"][0], "base:allocation");
    for flag in
        ["has_flags", "send_flush", "send_fua", "send_trim", "send_write_zeroes", "send_df", "can_multi_conn"]
    {
        assert!(has_flag(export, flag), "{flag}: {export}");
    }

    // The only export is also the default one.
    let default = serving.uri().trim_end_matches("disk").to_owned();
    assert_eq!(inspect(&default)["listed"], 1);
    let ended = conbd(&["inspect", &default]);
    for word in
        ["fixed newstyle, structured replies", "export \"disk\":", "3145728 bytes (3 MiB)", "read and write"]
    {
        assert!(ended.stdout.contains(word), "{}\nshould say {word}", ended.stdout);
    }

    let ended = conbd(&["inspect", &format!("{default}nope")]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.error_line().contains("NBD_REP_ERR_UNKNOWN"), "{}", ended.stderr);
    assert_eq!(ended.stdout, "");
    serving.stop();
    let ended = conbd(&["inspect", &default]);
    assert_eq!(ended.code, Some(1), "a health check fails when nobody is there");
    assert!(ended.error_line().contains("Connection refused"), "{}", ended.stderr);
    assert_eq!(conbd(&["inspect", "nbds://x/?tls-type=psk"]).code, Some(2));
    for tool in ["inspect", "bench"] {
        let ended = conbd(&[tool, "nbd+unix:///?socket=/nowhere/s"]);
        assert_eq!(ended.code, Some(1));
        assert!(ended.error_line().contains("is the server running"), "{ended:?}");
    }
}

#[test]
fn qemu_nbd_is_understood() {
    let (dir, disk) = image(1 << 20);
    let socket = dir.path().join("q.sock");
    let args =
        ["-f", "raw", "-t", "-e", "0", "-r", "-x", "vm", "-D", "of qemu", "-k", text(&socket), text(&disk)];
    let _peer = peer("qemu-nbd", &args, &socket);
    let report = inspect(&format!("nbd+unix:///?socket={}", socket.display()));
    let export = &report["exports"][0];
    assert_eq!((&export["name"], &export["description"]), (&"vm".into(), &"of qemu".into()));
    assert_eq!((&export["size"], &export["read_only"]), (&(1 << 20).into(), &true.into()));
    assert_eq!(export["contexts"][0], "base:allocation");
    assert!(has_flag(export, "can_multi_conn"), "{export}");
}

#[test]
fn nbdkit_is_understood_with_and_without_modern_options() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("k.sock");
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    {
        let _peer = peer("nbdkit", &["-f", "-U", text(&socket), "memory", "2M"], &socket);
        let report = inspect(&uri);
        assert_eq!(report["exports"][0]["size"], 2 << 20);
        assert_eq!(report["structured_replies"], true);
    }
    std::fs::remove_file(&socket).unwrap();
    // Handshake flags 0: plain newstyle, which knows no option but the export's name.
    let _peer = peer("nbdkit", &["-f", "--mask-handshake=0", "-U", text(&socket), "memory", "2M"], &socket);
    let report = inspect(&uri);
    assert_eq!((&report["protocol"], &report["structured_replies"]), (&"newstyle".into(), &false.into()));
    assert_eq!(report["exports"][0]["size"], 2 << 20);
    let ended = conbd(&["bench", &uri, "--count", "100", "--rw", "50", "--destroy-data", "--verify"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
}

#[test]
fn an_export_that_is_refused_does_not_hide_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("k.sock");
    let list = "list_exports=printf 'closed\\nopen\\n'";
    let open = r#"open=if [ "$3" = closed ]; then echo 'EPERM not for you' >&2; exit 1; fi"#;
    let more = ["get_size=echo 1048576", "pread=exit 1"];
    let _peer =
        peer("nbdkit", &[&["-f", "-U", text(&socket), "eval", list, open], &more[..]].concat(), &socket);
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let report = inspect(&uri);
    assert_eq!(report["listed"], 2);
    let exports = report["exports"].as_array().unwrap();
    assert_eq!(exports.len(), 2);
    assert_eq!((&exports[0]["name"], &exports[0]["size"]), (&"open".into(), &(1 << 20).into()));
    assert_eq!(exports[1]["name"], "closed");
    assert!(exports[1]["error"].as_str().unwrap().contains("refused INFO"), "{report}");
    let told = conbd(&["inspect", &uri]);
    assert!(told.stdout.contains("export \"closed\": the server refused INFO"), "{}", told.stdout);
    // Asked for by name it is what counts.
    let ended = conbd(&["inspect", &format!("nbd+unix:///closed?socket={}", socket.display())]);
    assert_eq!(ended.code, Some(1));
}
