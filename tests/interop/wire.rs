//! Bytes on a socket, for clients that no library would be: half requests, garbage, silence.

use crate::harness::PATIENCE;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

/// A connection to a server's URI.
pub(crate) enum Conn {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Conn {
    /// Connects; reads and writes are bounded.
    pub(crate) fn new(uri: &str) -> Conn {
        if let Some((_, query)) = uri.split_once("?socket=") {
            let socket = UnixStream::connect(query).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.set_write_timeout(Some(PATIENCE)).unwrap();
            return Conn::Unix(socket);
        }
        let address = uri.strip_prefix("nbd://").unwrap().split('/').next().unwrap();
        let socket = TcpStream::connect(address).unwrap();
        socket.set_nodelay(true).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        Conn::Tcp(socket)
    }

    /// Connects and negotiates the default export with simple replies.
    pub(crate) fn ready(uri: &str) -> Conn {
        let mut conn = Conn::new(uri);
        conn.greet();
        conn.send(&option(7, &go("")));
        conn.read_until_ack(7);
        conn
    }

    /// Reads the greeting and sends the client's flags (fixed newstyle, no zeroes).
    pub(crate) fn greet(&mut self) {
        let greeting = self.receive(18);
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        self.send(&3u32.to_be_bytes());
    }

    /// Reads option replies until the ACK.
    pub(crate) fn read_until_ack(&mut self, option: u32) {
        loop {
            let header = self.receive(20);
            assert_eq!(header[..8], 0x3_e889_0455_65a9_u64.to_be_bytes());
            assert_eq!(header[8..12], option.to_be_bytes());
            let kind = u32::from_be_bytes(header[12..16].try_into().unwrap());
            let len = u32::from_be_bytes(header[16..].try_into().unwrap());
            self.receive(len as usize);
            match kind {
                1 => return,
                3 => {}
                other => panic!("reply type {other:#x} to option {option}"),
            }
        }
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.write_all(bytes).unwrap();
    }

    pub(crate) fn receive(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Reads a simple reply's header; returns errno and cookie.
    pub(crate) fn receive_simple(&mut self) -> (u32, u64) {
        let header = self.receive(16);
        assert_eq!(header[..4], 0x6744_6698_u32.to_be_bytes());
        (
            u32::from_be_bytes(header[4..8].try_into().unwrap()),
            u64::from_be_bytes(header[8..].try_into().unwrap()),
        )
    }

    /// Reads until the server closes the connection, in whatever way; returns what came before.
    pub(crate) fn receive_to_end(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        match self.read_to_end(&mut bytes) {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => {}
            Err(e) => panic!("the server did not close: {e}"),
        }
        bytes
    }
}

impl Read for Conn {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Conn::Tcp(s) => s.read(buf),
            Conn::Unix(s) => s.read(buf),
        }
    }
}

impl Write for Conn {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Conn::Tcp(s) => s.write(buf),
            Conn::Unix(s) => s.write(buf),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An option: header and data.
pub(crate) fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    [b"IHAVEOPT".as_slice(), &number.to_be_bytes(), &len.to_be_bytes(), data].concat()
}

/// The data of `NBD_OPT_GO`, asking for no particular information.
pub(crate) fn go(name: &str) -> Vec<u8> {
    let len = u32::try_from(name.len()).unwrap();
    [&len.to_be_bytes(), name.as_bytes(), &0u16.to_be_bytes()].concat()
}

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISC: u16 = 2;

/// A request header without flags.
pub(crate) fn request(command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    [
        0x2560_9513_u32.to_be_bytes().as_slice(),
        &0u16.to_be_bytes(),
        &command.to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &len.to_be_bytes(),
    ]
    .concat()
}
