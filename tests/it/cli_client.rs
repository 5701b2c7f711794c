//! Our client: URIs, and servers that lie. Whatever a server sends, the client must say what is wrong with it, and must
//! neither hang, nor panic, nor hand out data that was not there.

use crate::cli_harness::{Claims, FakeServer, greet, handshake, in_coroutine, read_option, read_request};
use conbd::nbd::client::{Address, Client, ClientError, Negotiation, Uri};
use conbd::nbd::proto::*;
use conbd::nbd::tls::TlsClientFiles;
use conbd::nbd::wire::{
    BlockSizes, ChunkHeader, RepInfo, ReplyTo, RequestHeader, SimpleReply, StatusExtent, put_option_reply,
};
use conbd::util::buf::IoBuf;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

#[test]
fn uris_are_read_as_the_document_says() {
    let tcp = |host: &str, port, export: &str| Uri {
        address: Address::Tcp { host: host.to_owned(), port },
        export: export.to_owned(),
        tls: None,
    };
    let unix = |path: &str, export: &str| Uri {
        address: Address::Unix(PathBuf::from(path)),
        export: export.to_owned(),
        tls: None,
    };
    for (text, expected) in [
        ("nbd://example.com/disk", tcp("example.com", 10809, "disk")),
        ("nbd://example.com", tcp("example.com", 10809, "")),
        ("nbd://example.com/", tcp("example.com", 10809, "")),
        ("nbd://example.com//disk", tcp("example.com", 10809, "/disk")),
        ("nbd://example.com/hello%20world", tcp("example.com", 10809, "hello world")),
        ("NBD://h:1/a/b", tcp("h", 1, "a/b")),
        ("nbd://[::1]:7/x", tcp("::1", 7, "x")),
        ("nbd://[fe80::1%25eth0]/", tcp("fe80::1%eth0", 10809, "")),
        ("nbd:///x", tcp("localhost", 10809, "x")),
        ("nbd://user@host/", tcp("host", 10809, "")),
        ("nbd+unix:///disk?socket=/run/a%20b", unix("/run/a b", "disk")),
        ("nbd+unix:///?socket=nbd.sock", unix("nbd.sock", "")),
        ("nbd+vsock://2/disk", Uri::vsock(2, 10809, "disk")),
        ("nbd+vsock://1:7/", Uri::vsock(1, 7, "")),
        ("nbd+unix:///?socket=%00/abstract", unix("\0/abstract", "")),
    ] {
        let uri: Uri = text.parse().unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(uri, expected, "{text}");
        // What we print, we can read.
        assert_eq!(uri.to_string().parse(), Ok(expected), "{uri}");
    }
}

#[test]
fn uris_with_tls_are_read_as_libnbd_reads_them() {
    let files = |dir: Option<&str>, psk: Option<&str>, user: Option<&str>, verify| TlsClientFiles {
        dir: dir.map(PathBuf::from),
        psk: psk.map(PathBuf::from),
        user: user.map(str::to_owned),
        verify,
    };
    for (text, want, hostname) in [
        ("nbds://h/x", files(None, None, None, true), None),
        ("nbds://alice@h:7/x?tls-psk-file=/k%20s", files(None, Some("/k s"), Some("alice"), true), None),
        ("nbds://h/?tls-certificates=/c&tls-hostname=n", files(Some("/c"), None, None, true), Some("n")),
        (
            "nbds+unix://al%40ice@/x?socket=/s&tls-psk-file=k",
            files(None, Some("k"), Some("al@ice"), true),
            None,
        ),
        ("nbds+unix:///x?socket=/s&tls-username=bob", files(None, None, Some("bob"), true), None),
        ("nbds://h/?tls-verify-peer=false", files(None, None, None, false), None),
    ] {
        let uri: Uri = text.parse().unwrap_or_else(|e| panic!("{e}"));
        let tls = uri.tls.as_ref().unwrap_or_else(|| panic!("{text} has TLS"));
        assert_eq!(tls.files, want, "{text}");
        assert_eq!(tls.hostname.as_deref(), hostname, "{text}");
        assert_eq!(uri.to_string().parse(), Ok(uri.clone()), "{uri}");
    }
    assert_eq!("nbds://h:1/x".parse::<Uri>().unwrap().to_string(), "nbds://h:1/x");
}

#[test]
fn uris_that_cannot_be_used_are_refused_with_advice() {
    for (text, word) in [
        ("", "nbd://HOST"),
        ("disk.raw", "nbd://HOST"),
        ("http://x/", "unknown scheme \"http\""),
        ("nbd://x/?tls-psk-file=/f", "needs the scheme nbds:"),
        ("nbds://x/?tls-type=psk", "unknown parameter \"tls-type\""),
        ("nbds://x/?tls-verify-peer=maybe", "true or false"),
        ("nbd+vsock://host/", "\"host\" is no vsock context id"),
        ("nbd:x", "\"//\" is missing"),
        ("nbd://x:port/", "\"port\" is no port"),
        ("nbd://x:99999/", "no port"),
        ("nbd://::1/", "brackets"),
        ("nbd://[::1/", "bracket"),
        ("nbd://[::1]x/", "junk"),
        ("nbd://x/%zz", "hexadecimal"),
        ("nbd://x/%f", "hexadecimal"),
        ("nbd://x/%ff", "not UTF-8"),
        ("nbd://x/%00", "NUL"),
        ("nbd://x/a#b", "%23"),
        ("nbd://x/?socket=/s", "nbd+unix"),
        ("nbd+unix:///x", "the socket is missing"),
        ("nbd+unix:///x?socket=", "the socket is missing"),
        ("nbd+unix://host/x?socket=/s", "three slashes"),
        ("nbd+unix:///x?sock=/s", "unknown parameter \"sock\""),
    ] {
        let message = text.parse::<Uri>().expect_err(text).to_string();
        assert!(message.contains(word), "{message}\nshould say {word}");
    }
    let long = format!("nbd://x/{}", "n".repeat(4097));
    assert!(long.parse::<Uri>().expect_err("too long").to_string().contains("4097 bytes"));
}

/// The error of a client that asks `server` about its default export in every way there is.
fn negotiate(serve: impl Fn(&mut UnixStream) -> io::Result<()> + Send + Sync + 'static) -> String {
    let fake = FakeServer::start(serve);
    let uri: Uri = fake.uri().parse().unwrap();
    let outcome = in_coroutine(move || -> Result<(), ClientError> {
        let mut negotiation = Negotiation::co_open(&uri.address)?;
        if negotiation.co_structured_reply()? {
            negotiation.co_set_meta_context("", &["base:allocation"])?;
        }
        negotiation.co_list()?;
        negotiation.co_info("")?;
        negotiation.co_go("")?.co_close();
        Ok(())
    });
    describe(&outcome.expect_err("a lying server"))
}

fn describe(error: &ClientError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

const FIXED: HandshakeFlags = HandshakeFlags::NBD_FLAG_FIXED_NEWSTYLE;

#[test]
fn a_handshake_that_lies_is_refused() {
    let says = |message: String, word: &str| assert!(message.contains(word), "{message}\nshould say {word}");
    says(negotiate(|s| s.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")), "not an NBD server");
    says(negotiate(|s| s.write_all(b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0")), "oldstyle");
    says(negotiate(|_| Ok(())), "the server closed the connection");
    says(negotiate(|s| greet(s, HandshakeFlags::empty())), "plain newstyle");
    // Answers to each option, in the order in which the client asks.
    let answering = |answers: fn(u32) -> Vec<u8>| {
        negotiate(move |s| {
            greet(s, FIXED)?;
            loop {
                let (option, _) = read_option(s)?;
                s.write_all(&answers(option))?;
            }
        })
    };
    let reply = |option: u32, kind: u32, data: &[u8]| {
        let mut out = Vec::new();
        put_option_reply(&mut out, option, kind, data);
        out
    };
    says(answering(|_| vec![0; 20]), "bad option reply magic");
    says(
        answering(|option| {
            let mut out = Vec::new();
            put_option_reply(&mut out, option + 1, NBD_REP_ACK, &[]);
            out
        }),
        "it answered option 9 instead of 8",
    );
    says(
        answering(|option| {
            let mut out = Vec::new();
            put_option_reply(&mut out, option, NBD_REP_ACK, &[]);
            // The length is the last field of the header.
            let at = out.len() - 4;
            out[at..].copy_from_slice(&u32::MAX.to_be_bytes());
            out
        }),
        "an option reply of 4294967295 bytes",
    );
    says(
        answering(|option| {
            let mut out = Vec::new();
            put_option_reply(&mut out, option, 77, &[]);
            out
        }),
        "reply 77",
    );
    assert_eq!(reply(1, NBD_REP_ACK, &[]).len(), 20);

    // No structured replies; then each lie in turn about the list and the export.
    let about = |option: u32, kind: u32, data: Vec<u8>, ack: bool| {
        negotiate(move |s| {
            greet(s, FIXED)?;
            loop {
                let (asked, _) = read_option(s)?;
                let mut out = Vec::new();
                if asked == option {
                    put_option_reply(&mut out, asked, kind, &data);
                    if ack {
                        put_option_reply(&mut out, asked, NBD_REP_ACK, &[]);
                    }
                } else if asked == NBD_OPT_LIST {
                    put_option_reply(&mut out, asked, NBD_REP_ACK, &[]);
                } else {
                    put_option_reply(&mut out, asked, NBD_REP_ERR_UNSUP, b"no \x1b[31mway");
                }
                s.write_all(&out)?;
            }
        })
    };
    says(about(NBD_OPT_LIST, NBD_REP_SERVER, b"\0\0\0\x09abc".to_vec(), true), "NBD_REP_SERVER");
    says(about(NBD_OPT_LIST, NBD_REP_SERVER, b"\0\0\0\x02\xff\xfe".to_vec(), true), "not UTF-8");
    says(about(NBD_OPT_LIST, NBD_REP_INFO, vec![], true), "NBD_REP_INFO) to LIST");
    says(about(NBD_OPT_INFO, NBD_REP_ACK, vec![], false), "it did not tell size and flags");
    says(about(NBD_OPT_INFO, NBD_REP_INFO, b"\0\0\0\0".to_vec(), true), "NBD_REP_INFO");
    let mut sizes = Vec::new();
    RepInfo::BlockSize(BlockSizes { min: 3, preferred: 4096, max: 65_536 }).put(&mut sizes);
    says(about(NBD_OPT_INFO, NBD_REP_INFO, sizes, true), "impossible block sizes");
    let refusal = about(NBD_OPT_ABORT, 0, vec![], false);
    says(refusal.clone(), "the server refused INFO: NBD_REP_ERR_UNSUP (\"no [31mway\")");
    assert!(!refusal.contains('\x1b'), "no control characters of a server reach the terminal");
}

/// What a client says of a server that answers its first request with `lie`. The request is `cmd` for 4096 bytes at 4096.
fn answered(
    structured: bool,
    cmd: u16,
    lie: impl Fn(RequestHeader) -> Vec<u8> + Send + Sync + 'static,
) -> Result<Vec<u8>, String> {
    let fake = FakeServer::start(move |stream| {
        handshake(stream, Claims { structured, ..Claims::new(1 << 20) })?;
        let request = read_request(stream)?;
        stream.write_all(&lie(request))?;
        stream.shutdown(std::net::Shutdown::Write)?;
        // Wait for the client's verdict: the end of the connection.
        let mut rest = Vec::new();
        stream.take(1 << 20).read_to_end(&mut rest).map(drop)
    });
    let uri: Uri = fake.uri().parse().unwrap();
    in_coroutine(move || {
        let client = Client::co_connect(&uri).map_err(|e| describe(&e))?;
        let outcome = match cmd {
            NBD_CMD_READ => client.co_read(4096, IoBuf::zeroed(4096)).map(|buf| buf.to_vec()),
            _ => client.co_raw(cmd, CmdFlags::empty(), 4096, 4096).map(|()| Vec::new()),
        };
        client.co_close();
        outcome.map_err(|e| describe(&e))
    })
}

const DONE: ReplyFlags = ReplyFlags::NBD_REPLY_FLAG_DONE;
const MORE: ReplyFlags = ReplyFlags::empty();

fn data(flags: ReplyFlags, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut out = ReplyTo::compact(cookie).offset_data(flags, offset, len).to_vec();
    out.resize(out.len() + len as usize, 7);
    out
}

#[test]
fn structured_reads_are_put_together_from_chunks_in_any_order() {
    let bytes = answered(true, NBD_CMD_READ, |r| {
        let mut out = data(MORE, r.cookie, 4096 + 3072, 1024);
        out.extend_from_slice(&ReplyTo::compact(r.cookie).offset_hole(MORE, 4096, 1024));
        out.extend(data(MORE, r.cookie, 4096 + 2048, 1024));
        out.extend_from_slice(&ReplyTo::compact(r.cookie).offset_hole(MORE, 4096 + 1024, 1024));
        out.extend_from_slice(&ReplyTo::compact(r.cookie).none());
        out
    })
    .expect("a right answer");
    assert!(bytes[..2048].iter().all(|b| *b == 0));
    assert!(bytes[2048..].iter().all(|b| *b == 7));
}

#[test]
fn structured_replies_that_lie_end_the_connection() {
    let check = |word: &str, lie: fn(RequestHeader) -> Vec<u8>| {
        let message = answered(true, NBD_CMD_READ, lie).expect_err(word);
        assert!(message.contains(word), "{message}\nshould say {word}");
    };
    check("a simple reply to READ", |r| SimpleReply { error: None, cookie: r.cookie }.encode().to_vec());
    check("no request of ours", |r| data(DONE, r.cookie ^ 1, 4096, 4096));
    check("no request of ours", |r| ReplyTo::compact(r.cookie ^ (1 << 40)).none().to_vec());
    check("bad reply magic", |_| vec![0xff; 64]);
    check("from before the request", |r| data(DONE, r.cookie, 4095, 4096));
    check("from behind the request", |r| data(DONE, r.cookie, 4097, 4096));
    check("from behind the request", |r| data(DONE, r.cookie, u64::MAX, 4096));
    check("from behind the request", |r| {
        ReplyTo::compact(r.cookie).offset_data(DONE, 4096, u32::MAX - 8).to_vec()
    });
    check("answered with less", |r| data(DONE, r.cookie, 4096, 4095));
    check("answered with less", |r| ReplyTo::compact(r.cookie).none().to_vec());
    check("the same data twice", |r| {
        [data(MORE, r.cookie, 4096, 1024), data(DONE, r.cookie, 4608, 1024)].concat()
    });
    check("the same data twice", |r| {
        [data(MORE, r.cookie, 4096, 4096), data(DONE, r.cookie, 4096, 4096)].concat()
    });
    check("the same data twice", |r| {
        let three = [
            data(MORE, r.cookie, 4096, 512),
            data(MORE, r.cookie, 6144, 512),
            data(DONE, r.cookie, 4096 + 256, 3072),
        ];
        three.concat()
    });
    check("from behind the request", |r| ReplyTo::compact(r.cookie).offset_hole(DONE, 4096, 8192).to_vec());
    check("an empty data chunk", |r| {
        ChunkHeader {
            flags: DONE,
            chunk_type: NBD_REPLY_TYPE_OFFSET_DATA,
            cookie: r.cookie,
            offset: 0,
            len: 8,
        }
        .encode()
        .to_vec()
    });
    check("with 4294967295 bytes", |r| {
        ChunkHeader {
            flags: DONE,
            chunk_type: NBD_REPLY_TYPE_ERROR,
            cookie: r.cookie,
            offset: 0,
            len: u32::MAX.into(),
        }
        .encode()
        .to_vec()
    });
    check("structured reply chunk", |r| {
        [
            &ChunkHeader { flags: DONE, chunk_type: 99, cookie: r.cookie, offset: 0, len: 4 }.encode()[..],
            &[0; 4],
        ]
        .concat()
    });
    check("block status in reply to READ", |r| {
        let mut out = Vec::new();
        ReplyTo::compact(r.cookie).put_block_status(
            &mut out,
            DONE,
            1,
            &[StatusExtent { len: 4096, flags: 0 }],
        );
        out
    });
    check("connection", |r| data(DONE, r.cookie, 4096, 4096)[..2000].to_vec());
    // An honest error is an error of the request, with the server's words.
    check("ENOSPC (\"disk full\")", |r| {
        let mut out = Vec::new();
        ReplyTo::compact(r.cookie).put_error(&mut out, DONE, Errno::NBD_ENOSPC, "disk full", Some(4096));
        out
    });
}

#[test]
fn simple_replies_that_lie_end_the_connection() {
    let check = |word: &str, cmd: u16, lie: fn(RequestHeader) -> Vec<u8>| {
        let message = answered(false, cmd, lie).expect_err(word);
        assert!(message.contains(word), "{message}\nshould say {word}");
    };
    check("was not negotiated", NBD_CMD_READ, |r| data(DONE, r.cookie, 4096, 4096));
    check("no request of ours", NBD_CMD_FLUSH, |r| {
        SimpleReply { error: None, cookie: !r.cookie }.encode().to_vec()
    });
    check("EIO", NBD_CMD_READ, |r| {
        SimpleReply { error: Some(Errno::NBD_EIO), cookie: r.cookie }.encode().to_vec()
    });
    check("closed the connection", NBD_CMD_READ, |_| Vec::new());
    let twice =
        answered(false, NBD_CMD_FLUSH, |r| SimpleReply { error: None, cookie: r.cookie }.encode().repeat(2));
    assert!(twice.is_ok(), "the second answer comes too late to spoil the first: {twice:?}");
}

#[test]
fn an_answer_before_the_payload_was_sent_does_no_harm() {
    let done =
        answered(false, NBD_CMD_WRITE, |r| SimpleReply { error: None, cookie: r.cookie }.encode().to_vec());
    assert!(done.is_ok(), "{done:?}");
}

#[test]
fn requests_in_flight_fail_when_the_server_dies() {
    let fake = FakeServer::start(|stream| {
        handshake(stream, Claims::new(1 << 20))?;
        for _ in 0..10 {
            read_request(stream)?;
        }
        Ok(())
    });
    let uri: Uri = fake.uri().parse().unwrap();
    let failed = in_coroutine(move || {
        use conbd::co::Coroutine;
        use std::sync::Arc;
        let client = Arc::new(Client::co_connect(&uri).unwrap());
        let mut others = Vec::new();
        let (tell, heard) = std::sync::mpsc::channel();
        for i in 0..10 {
            let (client, tell) = (Arc::clone(&client), tell.clone());
            let each = Coroutine::new(move || {
                let outcome = client.co_read(i * 4096, IoBuf::zeroed(4096));
                tell.send(outcome.is_err()).unwrap();
            });
            each.enter();
            others.push(each);
        }
        for each in others {
            each.co_join();
        }
        let after = client.co_flush();
        assert!(matches!(after, Err(ClientError::Ended(_))), "{after:?}");
        heard.try_iter().filter(|failed| *failed).count()
    });
    assert_eq!(failed, 10);
}
