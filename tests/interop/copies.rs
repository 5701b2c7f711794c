//! nbdcopy, both ways.

use crate::harness::{Builder, Setup, allocated, assert_same, matrix, write_sparse};
use crate::tools::run;

const LEN: u64 = 96 << 20;

matrix!(nbdcopy_both_ways);

/// A sparse disk goes in over four connections and comes out again, with its holes.
fn nbdcopy_both_ways(setup: Setup) {
    let server = Builder::new(setup).image_len(LEN).start();
    let (source, back) = (server.path("source.raw"), server.path("back.raw"));
    write_sparse(&source, LEN, 7);
    let (from, to) = (source.to_str().unwrap(), back.to_str().unwrap());
    // --flush: durable before the program ends.
    run("nbdcopy", &["--connections=4", "--requests=16", "--flush", from, &server.uri]).ok();
    assert_same(&source, &server.image());
    run("nbdcopy", &["--connections=4", &server.uri, to]).ok();
    assert_same(&source, &back);
    // A third holds data; slack for the file system's own rounding.
    for path in [server.image(), back] {
        assert!(allocated(&path) < LEN / 2, "{} is not sparse: {}", path.display(), allocated(&path));
    }
    // From server to server, through a pipe of one connection, synchronously.
    let other = Builder::new(setup).image_len(LEN).start();
    run("nbdcopy", &["--synchronous", "--connections=1", &server.uri, &other.uri]).ok();
    assert_same(&server.image(), &other.image());
    other.stop();
    server.stop();
}

#[test]
fn a_size_that_is_no_multiple_of_anything() {
    let data = crate::harness::noise(1_000_003, 9);
    let server = Builder::new(crate::harness::UNIX_3_THREADS).image_data(&data).start();
    assert_eq!(run("nbdinfo", &["--size", &server.uri]).ok().trim(), "1000003");
    let back = server.path("back.raw");
    run("nbdcopy", &[&server.uri, back.to_str().unwrap()]).ok();
    assert_same(&server.image(), &back);
    server.stop();
}
