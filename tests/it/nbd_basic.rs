//! The NBD server on its good path: data goes in and comes out, on every kind of socket and reply.

use super::nbd_common::*;
use conbd::nbd::proto::*;
use conbd::nbd::server::ListenAddr;

#[test]
fn data_survives_simple_and_structured() {
    let t = TestServer::unix(vec![memory("", 1 << 20)]);
    for structured in [false, true] {
        let mut c = t.go("", structured);
        assert_eq!(c.size, 1 << 20);
        let data: Vec<u8> = (0..100_000u32).map(|i| (i * 7 + 1) as u8 | 1).collect();
        for len in [1, 511, 512, 4096, 30_000, 32_768, 32_769, 65_536, 100_000] {
            assert_eq!(c.write(0, 1000, &data[..len]), 0);
            assert_eq!(c.read(1000, len as u32).unwrap(), &data[..len]);
        }
        assert_eq!(c.call(NBD_CMD_WRITE_ZEROES, 0, 0, 200_000), 0);
        assert_eq!(c.read(0, 200_000).unwrap(), vec![0; 200_000]);
        assert_eq!(c.call(NBD_CMD_FLUSH, 0, 0, 0), 0);
        assert_eq!(c.call(NBD_CMD_TRIM, 0, 0, 4096), 0);
        assert_eq!(c.call(NBD_CMD_CACHE, 0, 0, 4096), 0);
        c.disc();
    }
    let stats = t.server.stats();
    assert_eq!(stats.iter().map(|s| s.connections).sum::<u64>(), 2);
}

#[test]
fn tcp_v4_and_v6_listen_on_one_port() {
    let probe = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = probe.local_addr().unwrap().port();
    drop(probe);
    let t = TestServer::with(vec![memory("d", 4096)], 1, |c| {
        c.listen = vec![
            ListenAddr::Tcp(([127, 0, 0, 1], port).into()),
            ListenAddr::Tcp((std::net::Ipv6Addr::LOCALHOST, port).into()),
        ];
    });
    let addrs = t.server.bound_addrs().to_vec();
    assert_eq!(t.server.uris("d")[1], format!("nbd://[::1]:{port}/d"));
    for addr in addrs {
        let ListenAddr::Tcp(addr) = addr else { panic!("tcp") };
        let mut c = Raw::tcp(std::net::TcpStream::connect(addr).unwrap());
        c.greet(3);
        c.go("d");
        assert_eq!(c.read(0, 4096).unwrap(), vec![0; 4096]);
        c.disc();
    }
}
