//! The codec: messages of the NBD protocol to bytes and back, for both sides.
//!
//! Pure functions over byte slices: no I/O, no clock, no yield, no allocation by a number that the peer sent.
//! Fixed-size messages are encoded to arrays and decoded from arrays; those with variable parts are appended to
//! a [`BufMut`] and decoded from a slice that holds exactly the payload. Decoding checks what the document calls
//! syntax; whether a request makes sense is `request.rs`'s business.
//!
//! All integers are big-endian ("network byte order").

use super::proto::*;
use bytes::{Buf, BufMut};

/// Why bytes are not what the protocol says. Fatal to the connection when a magic is wrong: the stream cannot be
/// resynchronised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// The greeting does not begin with `NBDMAGIC`.
    #[error("not an NBD server: bad greeting magic {0:#018x}")]
    BadGreeting(u64),
    /// The server speaks oldstyle.
    #[error("the server speaks oldstyle negotiation, or something else: second magic {0:#018x}")]
    NotNewstyle(u64),
    /// An option does not begin with `IHAVEOPT`.
    #[error("bad option magic {0:#018x}")]
    BadOptionMagic(u64),
    /// An option reply does not begin with its magic.
    #[error("bad option reply magic {0:#018x}")]
    BadOptionReplyMagic(u64),
    /// A request does not begin with its magic.
    #[error("bad request magic {0:#010x}")]
    BadRequestMagic(u32),
    /// A reply begins with neither the simple nor the structured magic.
    #[error("bad reply magic {0:#010x}")]
    BadReplyMagic(u32),
    /// A payload is shorter or longer than its fields say.
    #[error("{0}: lengths inside the payload do not fit its size")]
    BadLength(&'static str),
    /// A string is longer than [`NBD_MAX_STRING`].
    #[error("{0}: string longer than 4096 bytes")]
    StringTooLong(&'static str),
    /// A string is not UTF-8 or contains a NUL.
    #[error("{0}: string is not UTF-8 or contains NUL")]
    BadString(&'static str),
    /// More queries than [`MAX_META_QUERIES`].
    #[error("too many metadata queries: {0}")]
    TooManyQueries(u32),
}

/// Checks a string of the protocol: at most 4096 bytes, UTF-8, no NUL.
///
/// # Errors
/// `StringTooLong`, `BadString`; `what` says whose string it is.
pub fn check_string<'a>(what: &'static str, bytes: &'a [u8]) -> Result<&'a str, ProtocolError> {
    if bytes.len() > NBD_MAX_STRING {
        return Err(ProtocolError::StringTooLong(what));
    }
    match std::str::from_utf8(bytes) {
        Ok(s) if !bytes.contains(&0) => Ok(s),
        _ => Err(ProtocolError::BadString(what)),
    }
}

/// Reads integers from a fixed-size message; the offsets are constants of the caller.
fn be16(b: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([b[at], b[at + 1]])
}
fn be32(b: &[u8], at: usize) -> u32 {
    (u32::from(be16(b, at)) << 16) | u32::from(be16(b, at + 2))
}
fn be64(b: &[u8], at: usize) -> u64 {
    (u64::from(be32(b, at)) << 32) | u64::from(be32(b, at + 4))
}

/// The server's greeting: both magics and the handshake flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// What the server can do.
    pub flags: HandshakeFlags,
}

impl Greeting {
    /// Bytes on the wire.
    pub const LEN: usize = 18;

    /// Encodes the greeting.
    #[must_use]
    pub fn encode(self) -> [u8; Self::LEN] {
        let mut b = [0; Self::LEN];
        b[..8].copy_from_slice(&NBDMAGIC.to_be_bytes());
        b[8..16].copy_from_slice(&IHAVEOPT.to_be_bytes());
        b[16..].copy_from_slice(&self.flags.bits().to_be_bytes());
        b
    }

    /// Decodes a greeting; unknown flags are kept.
    ///
    /// # Errors
    /// `BadGreeting`, `NotNewstyle`.
    pub fn decode(b: &[u8; Self::LEN]) -> Result<Greeting, ProtocolError> {
        if be64(b, 0) != NBDMAGIC {
            return Err(ProtocolError::BadGreeting(be64(b, 0)));
        }
        if be64(b, 8) != IHAVEOPT {
            return Err(ProtocolError::NotNewstyle(be64(b, 8)));
        }
        Ok(Greeting { flags: HandshakeFlags::from_bits_retain(be16(b, 16)) })
    }
}

/// The header of an option, client to server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    /// `NBD_OPT_*`.
    pub option: u32,
    /// Bytes of data that follow.
    pub len: u32,
}

impl OptionHeader {
    /// Bytes on the wire.
    pub const LEN: usize = 16;

    /// Encodes the header.
    #[must_use]
    pub fn encode(self) -> [u8; Self::LEN] {
        let mut b = [0; Self::LEN];
        b[..8].copy_from_slice(&IHAVEOPT.to_be_bytes());
        b[8..12].copy_from_slice(&self.option.to_be_bytes());
        b[12..].copy_from_slice(&self.len.to_be_bytes());
        b
    }

    /// Decodes the header.
    ///
    /// # Errors
    /// `BadOptionMagic`.
    pub fn decode(b: &[u8; Self::LEN]) -> Result<OptionHeader, ProtocolError> {
        if be64(b, 0) != IHAVEOPT {
            return Err(ProtocolError::BadOptionMagic(be64(b, 0)));
        }
        Ok(OptionHeader { option: be32(b, 8), len: be32(b, 12) })
    }
}

/// The header of an option reply, server to client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option that is answered.
    pub option: u32,
    /// `NBD_REP_*`.
    pub reply_type: u32,
    /// Bytes of data that follow.
    pub len: u32,
}

impl OptionReplyHeader {
    /// Bytes on the wire.
    pub const LEN: usize = 20;

    /// Encodes the header.
    #[must_use]
    pub fn encode(self) -> [u8; Self::LEN] {
        let mut b = [0; Self::LEN];
        b[..8].copy_from_slice(&NBD_REP_MAGIC.to_be_bytes());
        b[8..12].copy_from_slice(&self.option.to_be_bytes());
        b[12..16].copy_from_slice(&self.reply_type.to_be_bytes());
        b[16..].copy_from_slice(&self.len.to_be_bytes());
        b
    }

    /// Decodes the header.
    ///
    /// # Errors
    /// `BadOptionReplyMagic`.
    pub fn decode(b: &[u8; Self::LEN]) -> Result<OptionReplyHeader, ProtocolError> {
        if be64(b, 0) != NBD_REP_MAGIC {
            return Err(ProtocolError::BadOptionReplyMagic(be64(b, 0)));
        }
        Ok(OptionReplyHeader { option: be32(b, 8), reply_type: be32(b, 12), len: be32(b, 16) })
    }
}

/// Appends a whole option reply: header and data.
pub fn put_option_reply(out: &mut impl BufMut, option: u32, reply_type: u32, data: &[u8]) {
    let len = u32::try_from(data.len()).expect("option replies are built by us and are small");
    out.put_slice(&OptionReplyHeader { option, reply_type, len }.encode());
    out.put_slice(data);
}

/// Appends a whole option: header and data.
pub fn put_option(out: &mut impl BufMut, option: u32, data: &[u8]) {
    let len = u32::try_from(data.len()).expect("options are built by us and are small");
    out.put_slice(&OptionHeader { option, len }.encode());
    out.put_slice(data);
}

/// The successful answer to `NBD_OPT_EXPORT_NAME`: size and transmission flags, then perhaps padding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportNameReply {
    /// Size of the export in bytes.
    pub size: u64,
    /// Its transmission flags.
    pub flags: TransmissionFlags,
}

impl ExportNameReply {
    /// Bytes on the wire without the padding of [`EXPORT_NAME_PADDING`] zero bytes.
    pub const LEN: usize = 10;

    /// Appends the reply, padded unless the client said `NBD_FLAG_C_NO_ZEROES`.
    pub fn put(self, out: &mut impl BufMut, no_zeroes: bool) {
        out.put_u64(self.size);
        out.put_u16(self.flags.bits());
        if !no_zeroes {
            out.put_bytes(0, EXPORT_NAME_PADDING);
        }
    }

    /// Decodes the part before the padding.
    #[must_use]
    pub fn decode(b: &[u8; Self::LEN]) -> ExportNameReply {
        ExportNameReply { size: be64(b, 0), flags: TransmissionFlags::from_bits_retain(be16(b, 8)) }
    }
}

/// The data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InfoRequest<'a> {
    /// Name of the export as sent; not checked to be UTF-8.
    pub name: &'a [u8],
    /// The `NBD_INFO_*` requests, big-endian pairs as sent.
    infos: &'a [u8],
}

impl<'a> InfoRequest<'a> {
    /// Decodes the option's data.
    ///
    /// # Errors
    /// `BadLength` when name length and count do not add up to the data; `StringTooLong`.
    pub fn decode(data: &'a [u8]) -> Result<InfoRequest<'a>, ProtocolError> {
        let bad = ProtocolError::BadLength("NBD_OPT_INFO/GO");
        let mut b = data;
        let name_len = b.try_get_u32().map_err(|_| bad)? as usize;
        if name_len > b.len().saturating_sub(2) {
            return Err(bad);
        }
        let (name, mut b) = b.split_at(name_len);
        let count = b.try_get_u16().map_err(|_| bad)? as usize;
        if b.len() != count * 2 {
            return Err(bad);
        }
        if name.len() > NBD_MAX_STRING {
            return Err(ProtocolError::StringTooLong("export name"));
        }
        Ok(InfoRequest { name, infos: b })
    }

    /// Tells whether `info` (`NBD_INFO_*`) was asked for.
    #[must_use]
    pub fn wants(&self, info: u16) -> bool {
        self.infos.as_chunks::<2>().0.iter().any(|c| u16::from_be_bytes(*c) == info)
    }

    /// Appends the option's data.
    pub fn put(out: &mut impl BufMut, name: &str, infos: &[u16]) {
        put_string(out, name.as_bytes());
        out.put_u16(u16::try_from(infos.len()).expect("there are fewer than 65536 information types"));
        for info in infos {
            out.put_u16(*info);
        }
    }
}

fn put_string(out: &mut impl BufMut, s: &[u8]) {
    out.put_u32(u32::try_from(s.len()).expect("strings are at most 4096 bytes"));
    out.put_slice(s);
}

/// The data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`, fully checked for syntax.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaContextRequest<'a> {
    /// Name of the export as sent; not checked to be UTF-8.
    pub name: &'a [u8],
    count: u32,
    queries: &'a [u8],
}

impl<'a> MetaContextRequest<'a> {
    /// Decodes the option's data; walks all queries once.
    ///
    /// # Errors
    /// `BadLength`, `StringTooLong`, `TooManyQueries`.
    pub fn decode(data: &'a [u8]) -> Result<MetaContextRequest<'a>, ProtocolError> {
        let bad = ProtocolError::BadLength("NBD_OPT_*_META_CONTEXT");
        let mut b = data;
        let name_len = b.try_get_u32().map_err(|_| bad)? as usize;
        let (name, mut b) = b.split_at_checked(name_len).ok_or(bad)?;
        if name.len() > NBD_MAX_STRING {
            return Err(ProtocolError::StringTooLong("export name"));
        }
        let count = b.try_get_u32().map_err(|_| bad)?;
        let request = MetaContextRequest { name, count, queries: b };
        // A query takes 4 bytes at least: a count that cannot fit is malformed, whatever it is.
        if u64::from(count) * 4 > b.len() as u64 {
            return Err(bad);
        }
        if count > MAX_META_QUERIES {
            return Err(ProtocolError::TooManyQueries(count));
        }
        for _ in 0..count {
            let len = b.try_get_u32().map_err(|_| bad)? as usize;
            let (query, rest) = b.split_at_checked(len).ok_or(bad)?;
            if query.len() > NBD_MAX_STRING {
                return Err(ProtocolError::StringTooLong("metadata query"));
            }
            b = rest;
        }
        if !b.is_empty() {
            return Err(bad);
        }
        Ok(request)
    }

    /// Number of queries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count as usize
    }

    /// Tells whether there is no query: "all" when listing, "none" when setting.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The queries in their order, as sent.
    pub fn queries(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let mut b = self.queries;
        std::iter::from_fn(move || {
            let len = b.try_get_u32().ok()? as usize;
            let (query, rest) = b.split_at_checked(len)?;
            b = rest;
            Some(query)
        })
    }

    /// Appends the option's data.
    pub fn put(out: &mut impl BufMut, name: &str, queries: &[&str]) {
        put_string(out, name.as_bytes());
        out.put_u32(u32::try_from(queries.len()).expect("callers ask for a handful of contexts"));
        for q in queries {
            put_string(out, q.as_bytes());
        }
    }
}

/// The data of `NBD_REP_SERVER`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepServer<'a> {
    /// Name of the export.
    pub name: &'a str,
    /// Text for people; may be empty.
    pub description: &'a str,
}

impl<'a> RepServer<'a> {
    /// Appends the reply's data.
    pub fn put(&self, out: &mut impl BufMut) {
        put_string(out, self.name.as_bytes());
        out.put_slice(self.description.as_bytes());
    }

    /// Decodes the reply's data.
    ///
    /// # Errors
    /// `BadLength`, `StringTooLong`, `BadString`.
    pub fn decode(data: &'a [u8]) -> Result<RepServer<'a>, ProtocolError> {
        let bad = ProtocolError::BadLength("NBD_REP_SERVER");
        let mut b = data;
        let len = b.try_get_u32().map_err(|_| bad)? as usize;
        let (name, rest) = b.split_at_checked(len).ok_or(bad)?;
        Ok(RepServer {
            name: check_string("export name", name)?,
            description: check_string("export description", rest)?,
        })
    }
}

/// Block size constraints of an export, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Requests should be multiples of this: a power of two, at most 65,536.
    pub min: u32,
    /// Requests are best multiples of this: a power of two, at least `max(min, 512)`.
    pub preferred: u32,
    /// Longest read or write payload.
    pub max: u32,
}

impl BlockSizes {
    /// What a client assumes when nothing was negotiated (proto.md, "Block size constraints").
    pub const DEFAULT: BlockSizes = BlockSizes { min: 1, preferred: 4096, max: 32 << 20 };
}

/// The data of `NBD_REP_INFO`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RepInfo<'a> {
    /// `NBD_INFO_EXPORT`.
    Export {
        /// Size in bytes.
        size: u64,
        /// Transmission flags.
        flags: TransmissionFlags,
    },
    /// `NBD_INFO_NAME`: the canonical name.
    Name(&'a str),
    /// `NBD_INFO_DESCRIPTION`.
    Description(&'a str),
    /// `NBD_INFO_BLOCK_SIZE`.
    BlockSize(BlockSizes),
    /// A type unknown to us; a client ignores it.
    Unknown(u16),
}

impl<'a> RepInfo<'a> {
    /// Appends the reply's data.
    pub fn put(&self, out: &mut impl BufMut) {
        match self {
            RepInfo::Export { size, flags } => {
                out.put_u16(NBD_INFO_EXPORT);
                out.put_u64(*size);
                out.put_u16(flags.bits());
            }
            RepInfo::Name(name) => {
                out.put_u16(NBD_INFO_NAME);
                out.put_slice(name.as_bytes());
            }
            RepInfo::Description(text) => {
                out.put_u16(NBD_INFO_DESCRIPTION);
                out.put_slice(text.as_bytes());
            }
            RepInfo::BlockSize(sizes) => {
                out.put_u16(NBD_INFO_BLOCK_SIZE);
                out.put_u32(sizes.min);
                out.put_u32(sizes.preferred);
                out.put_u32(sizes.max);
            }
            RepInfo::Unknown(info) => out.put_u16(*info),
        }
    }

    /// Decodes the reply's data.
    ///
    /// # Errors
    /// `BadLength`, `StringTooLong`, `BadString`.
    pub fn decode(data: &'a [u8]) -> Result<RepInfo<'a>, ProtocolError> {
        let bad = ProtocolError::BadLength("NBD_REP_INFO");
        let mut b = data;
        match b.try_get_u16().map_err(|_| bad)? {
            NBD_INFO_EXPORT if b.len() == 10 => Ok(RepInfo::Export {
                size: be64(b, 0),
                flags: TransmissionFlags::from_bits_retain(be16(b, 8)),
            }),
            NBD_INFO_BLOCK_SIZE if b.len() == 12 => {
                Ok(RepInfo::BlockSize(BlockSizes { min: be32(b, 0), preferred: be32(b, 4), max: be32(b, 8) }))
            }
            NBD_INFO_EXPORT | NBD_INFO_BLOCK_SIZE => Err(bad),
            NBD_INFO_NAME => Ok(RepInfo::Name(check_string("export name", b)?)),
            NBD_INFO_DESCRIPTION => Ok(RepInfo::Description(check_string("export description", b)?)),
            other => Ok(RepInfo::Unknown(other)),
        }
    }
}

/// The data of `NBD_REP_META_CONTEXT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepMetaContext<'a> {
    /// Id used in block status chunks; 0 when listing.
    pub id: u32,
    /// Name of the context.
    pub name: &'a str,
}

impl<'a> RepMetaContext<'a> {
    /// Appends the reply's data.
    pub fn put(&self, out: &mut impl BufMut) {
        out.put_u32(self.id);
        out.put_slice(self.name.as_bytes());
    }

    /// Decodes the reply's data.
    ///
    /// # Errors
    /// `BadLength`, `StringTooLong`, `BadString`.
    pub fn decode(data: &'a [u8]) -> Result<RepMetaContext<'a>, ProtocolError> {
        let mut b = data;
        let id = b.try_get_u32().map_err(|_| ProtocolError::BadLength("NBD_REP_META_CONTEXT"))?;
        Ok(RepMetaContext { id, name: check_string("metadata context", b)? })
    }
}

/// The header of a request of the transmission phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHeader {
    /// Command flags; unknown ones are kept.
    pub flags: CmdFlags,
    /// `NBD_CMD_*`.
    pub cmd: u16,
    /// Names the request in its reply; opaque to the server.
    pub cookie: u64,
    /// Byte offset in the export.
    pub offset: u64,
    /// Length in bytes: of the payload, or of the range that the request is about. 32 bits in a compact header.
    pub len: u64,
}

impl RequestHeader {
    /// Bytes of a compact header on the wire.
    pub const LEN: usize = 28;
    /// Bytes of an extended header on the wire.
    pub const EXTENDED_LEN: usize = 32;

    /// Encodes a compact header.
    ///
    /// # Panics
    /// When the length needs more than 32 bits.
    #[must_use]
    pub fn encode(self) -> [u8; Self::LEN] {
        let len = u32::try_from(self.len).expect("a compact header has 32 bits for the length");
        let mut b = [0; Self::LEN];
        b[..4].copy_from_slice(&NBD_REQUEST_MAGIC.to_be_bytes());
        b[4..6].copy_from_slice(&self.flags.bits().to_be_bytes());
        b[6..8].copy_from_slice(&self.cmd.to_be_bytes());
        b[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        b[16..24].copy_from_slice(&self.offset.to_be_bytes());
        b[24..].copy_from_slice(&len.to_be_bytes());
        b
    }

    /// Encodes an extended header.
    #[must_use]
    pub fn encode_extended(self) -> [u8; Self::EXTENDED_LEN] {
        let mut b = [0; Self::EXTENDED_LEN];
        b[..4].copy_from_slice(&NBD_EXTENDED_REQUEST_MAGIC.to_be_bytes());
        b[4..6].copy_from_slice(&self.flags.bits().to_be_bytes());
        b[6..8].copy_from_slice(&self.cmd.to_be_bytes());
        b[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        b[16..24].copy_from_slice(&self.offset.to_be_bytes());
        b[24..].copy_from_slice(&self.len.to_be_bytes());
        b
    }

    /// Decodes a compact header. `len` may exceed the export: `request.rs` checks that.
    ///
    /// Source: proto.md, "Request message".
    ///
    /// # Errors
    /// `BadRequestMagic`.
    pub fn decode(b: &[u8; Self::LEN]) -> Result<RequestHeader, ProtocolError> {
        if be32(b, 0) != NBD_REQUEST_MAGIC {
            return Err(ProtocolError::BadRequestMagic(be32(b, 0)));
        }
        Ok(RequestHeader {
            flags: CmdFlags::from_bits_retain(be16(b, 4)),
            cmd: be16(b, 6),
            cookie: be64(b, 8),
            offset: be64(b, 16),
            len: be32(b, 24).into(),
        })
    }

    /// Decodes an extended header. `len` may exceed anything: `request.rs` checks that.
    ///
    /// Source: proto.md of the branch extension-ext-header, "Extended request message".
    ///
    /// # Errors
    /// `BadRequestMagic`.
    pub fn decode_extended(b: &[u8; Self::EXTENDED_LEN]) -> Result<RequestHeader, ProtocolError> {
        if be32(b, 0) != NBD_EXTENDED_REQUEST_MAGIC {
            return Err(ProtocolError::BadRequestMagic(be32(b, 0)));
        }
        Ok(RequestHeader {
            flags: CmdFlags::from_bits_retain(be16(b, 4)),
            cmd: be16(b, 6),
            cookie: be64(b, 8),
            offset: be64(b, 16),
            len: be64(b, 24),
        })
    }
}

/// A simple reply; the data of a successful read follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimpleReply {
    /// `None` is success.
    pub error: Option<Errno>,
    /// The request's.
    pub cookie: u64,
}

impl SimpleReply {
    /// Bytes on the wire.
    pub const LEN: usize = 16;

    /// Encodes the reply.
    #[must_use]
    pub fn encode(self) -> [u8; Self::LEN] {
        let mut b = [0; Self::LEN];
        b[..4].copy_from_slice(&NBD_SIMPLE_REPLY_MAGIC.to_be_bytes());
        b[4..8].copy_from_slice(&self.error.map_or(0, Errno::to_wire).to_be_bytes());
        b[8..].copy_from_slice(&self.cookie.to_be_bytes());
        b
    }
}

/// The header of a reply chunk, compact (structured) or extended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkHeader {
    /// DONE or not.
    pub flags: ReplyFlags,
    /// `NBD_REPLY_TYPE_*`.
    pub chunk_type: u16,
    /// The request's.
    pub cookie: u64,
    /// The request's offset; extended headers only, else 0.
    pub offset: u64,
    /// Bytes of payload that follow.
    pub len: u64,
}

impl ChunkHeader {
    /// Bytes of a compact header on the wire.
    pub const LEN: usize = 20;
    /// Bytes of an extended header on the wire.
    pub const EXTENDED_LEN: usize = 32;

    /// Encodes a compact header.
    ///
    /// # Panics
    /// When the payload is longer than 32 bits can say.
    #[must_use]
    pub fn encode(self) -> [u8; Self::LEN] {
        let len = u32::try_from(self.len).expect("a compact chunk has 32 bits for its length");
        let mut b = [0; Self::LEN];
        b[..4].copy_from_slice(&NBD_STRUCTURED_REPLY_MAGIC.to_be_bytes());
        b[4..6].copy_from_slice(&self.flags.bits().to_be_bytes());
        b[6..8].copy_from_slice(&self.chunk_type.to_be_bytes());
        b[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        b[16..].copy_from_slice(&len.to_be_bytes());
        b
    }

    /// Encodes an extended header.
    #[must_use]
    pub fn encode_extended(self) -> [u8; Self::EXTENDED_LEN] {
        let mut b = [0; Self::EXTENDED_LEN];
        b[..4].copy_from_slice(&NBD_EXTENDED_REPLY_MAGIC.to_be_bytes());
        b[4..6].copy_from_slice(&self.flags.bits().to_be_bytes());
        b[6..8].copy_from_slice(&self.chunk_type.to_be_bytes());
        b[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        b[16..24].copy_from_slice(&self.offset.to_be_bytes());
        b[24..].copy_from_slice(&self.len.to_be_bytes());
        b
    }

    /// Takes in the rest of a compact header, which [`ReplyHeader::decode`] leaves out.
    #[must_use]
    pub fn with_tail(self, b: [u8; ReplyHeader::TAIL_LEN]) -> ChunkHeader {
        ChunkHeader { len: be32(&b, 0).into(), ..self }
    }

    /// Takes in the rest of an extended header, which [`ReplyHeader::decode`] leaves out.
    #[must_use]
    pub fn with_extended_tail(self, b: [u8; ReplyHeader::EXTENDED_TAIL_LEN]) -> ChunkHeader {
        ChunkHeader { offset: be64(&b, 0), len: be64(&b, 8), ..self }
    }
}

/// What a client reads at the start of a reply: 16 bytes tell which kind it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyHeader {
    /// A simple reply, complete.
    Simple(SimpleReply),
    /// The front of a compact chunk header; [`ChunkHeader::with_tail`] takes the rest.
    Chunk(ChunkHeader),
    /// The front of an extended chunk header; [`ChunkHeader::with_extended_tail`] takes the rest.
    Extended(ChunkHeader),
}

impl ReplyHeader {
    /// Bytes that all kinds of header have.
    pub const LEN: usize = 16;
    /// Further bytes of a compact chunk header: the payload length.
    pub const TAIL_LEN: usize = 4;
    /// Further bytes of an extended chunk header: offset and payload length.
    pub const EXTENDED_TAIL_LEN: usize = 16;

    /// Decodes the common part; a chunk's `len` is 0 until the caller has read its tail.
    ///
    /// # Errors
    /// `BadReplyMagic`.
    pub fn decode(b: &[u8; Self::LEN]) -> Result<ReplyHeader, ProtocolError> {
        let chunk = || ChunkHeader {
            flags: ReplyFlags::from_bits_retain(be16(b, 4)),
            chunk_type: be16(b, 6),
            cookie: be64(b, 8),
            offset: 0,
            len: 0,
        };
        match be32(b, 0) {
            NBD_SIMPLE_REPLY_MAGIC => Ok(ReplyHeader::Simple(SimpleReply {
                error: Errno::from_wire(be32(b, 4)),
                cookie: be64(b, 8),
            })),
            NBD_STRUCTURED_REPLY_MAGIC => Ok(ReplyHeader::Chunk(chunk())),
            NBD_EXTENDED_REPLY_MAGIC => Ok(ReplyHeader::Extended(chunk())),
            magic => Err(ProtocolError::BadReplyMagic(magic)),
        }
    }
}

/// Some encoded bytes, at most as many as the longest fixed part of a chunk.
#[derive(Debug, Clone, Copy)]
pub struct Encoded {
    bytes: [u8; Self::MAX],
    len: usize,
}

impl Encoded {
    /// Most bytes: an extended hole chunk.
    pub const MAX: usize = ChunkHeader::EXTENDED_LEN + 12;

    fn push(&mut self, bytes: &[u8]) {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }
}

impl std::ops::Deref for Encoded {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// The request that chunks belong to, and how they are headed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplyTo {
    /// The request's.
    pub cookie: u64,
    /// With extended headers the request's offset, which every chunk repeats; `None` with compact ones.
    pub extended: Option<u64>,
}

impl ReplyTo {
    /// A request with a compact header.
    #[must_use]
    pub fn compact(cookie: u64) -> ReplyTo {
        ReplyTo { cookie, extended: None }
    }

    /// A request with an extended header.
    #[must_use]
    pub fn extended(cookie: u64, offset: u64) -> ReplyTo {
        ReplyTo { cookie, extended: Some(offset) }
    }

    /// Encodes a chunk's header; `len` bytes of payload follow.
    #[must_use]
    pub fn header(self, flags: ReplyFlags, chunk_type: u16, len: u32) -> Encoded {
        let header = ChunkHeader {
            flags,
            chunk_type,
            cookie: self.cookie,
            offset: self.extended.unwrap_or(0),
            len: len.into(),
        };
        let mut out = Encoded { bytes: [0; Encoded::MAX], len: 0 };
        match self.extended {
            None => out.push(&header.encode()),
            Some(_) => out.push(&header.encode_extended()),
        }
        out
    }

    /// Bytes of a data chunk before its data: chunk header and offset.
    #[must_use]
    pub fn offset_data_len(self) -> usize {
        8 + if self.extended.is_some() { ChunkHeader::EXTENDED_LEN } else { ChunkHeader::LEN }
    }

    /// Encodes what precedes the data of an `NBD_REPLY_TYPE_OFFSET_DATA` chunk.
    ///
    /// # Panics
    /// When `len` is zero or does not fit a compact chunk's 32-bit length: the document forbids both.
    #[must_use]
    pub fn offset_data(self, flags: ReplyFlags, offset: u64, len: u32) -> Encoded {
        assert!(len > 0, "an empty content chunk");
        let chunk_len = len.checked_add(8).expect("a content chunk holds at most 2^32 - 9 bytes");
        let mut out = self.header(flags, NBD_REPLY_TYPE_OFFSET_DATA, chunk_len);
        out.push(&offset.to_be_bytes());
        out
    }

    /// Encodes an `NBD_REPLY_TYPE_OFFSET_HOLE` chunk.
    ///
    /// # Panics
    /// When `len` is zero.
    #[must_use]
    pub fn offset_hole(self, flags: ReplyFlags, offset: u64, len: u32) -> Encoded {
        assert!(len > 0, "an empty content chunk");
        let mut out = self.header(flags, NBD_REPLY_TYPE_OFFSET_HOLE, 12);
        out.push(&offset.to_be_bytes());
        out.push(&len.to_be_bytes());
        out
    }

    /// Encodes an `NBD_REPLY_TYPE_NONE` chunk: success, nothing to say.
    #[must_use]
    pub fn none(self) -> Encoded {
        self.header(ReplyFlags::NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE, 0)
    }

    /// Appends an error chunk: `NBD_REPLY_TYPE_ERROR`, or `NBD_REPLY_TYPE_ERROR_OFFSET` if there is an offset.
    /// The message is cut (at a character) to [`NBD_MAX_STRING`] bytes.
    pub fn put_error(
        self,
        out: &mut impl BufMut,
        flags: ReplyFlags,
        error: Errno,
        message: &str,
        offset: Option<u64>,
    ) {
        let message = &message[..message.floor_char_boundary(NBD_MAX_STRING)];
        let message_len = message.len() as u16;
        let (chunk_type, tail) = match offset {
            None => (NBD_REPLY_TYPE_ERROR, 0),
            Some(_) => (NBD_REPLY_TYPE_ERROR_OFFSET, 8),
        };
        out.put_slice(&self.header(flags, chunk_type, 6 + u32::from(message_len) + tail));
        out.put_u32(error.to_wire());
        out.put_u16(message_len);
        out.put_slice(message.as_bytes());
        if let Some(offset) = offset {
            out.put_u64(offset);
        }
    }

    /// Appends a block status chunk: `NBD_REPLY_TYPE_BLOCK_STATUS`, or `NBD_REPLY_TYPE_BLOCK_STATUS_EXT` with
    /// extended headers.
    ///
    /// # Panics
    /// When there is no extent, an empty one, or one that does not fit 32 bits in a compact chunk.
    pub fn put_block_status(
        self,
        out: &mut impl BufMut,
        flags: ReplyFlags,
        context_id: u32,
        extents: &[StatusExtent],
    ) {
        assert!(!extents.is_empty(), "a block status chunk without an extent");
        assert!(extents.len() <= MAX_EXTENTS, "a block status chunk with too many extents");
        assert!(extents.iter().all(|e| e.len > 0), "an empty extent");
        let count = extents.len() as u32;
        if self.extended.is_some() {
            out.put_slice(&self.header(flags, NBD_REPLY_TYPE_BLOCK_STATUS_EXT, 8 + 16 * count));
            out.put_u32(context_id);
            out.put_u32(count);
            for extent in extents {
                out.put_u64(extent.len);
                out.put_u64(extent.flags);
            }
            return;
        }
        out.put_slice(&self.header(flags, NBD_REPLY_TYPE_BLOCK_STATUS, 4 + 8 * count));
        out.put_u32(context_id);
        for extent in extents {
            out.put_u32(u32::try_from(extent.len).expect("a compact request asks about 32 bits"));
            out.put_u32(u32::try_from(extent.flags).expect("contexts of compact headers have 32 bits"));
        }
    }
}

/// One extent of a block status chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusExtent {
    /// Bytes, at least 1; more than 32 bits only with extended headers.
    pub len: u64,
    /// Status bits; for `base:allocation` they are [`StateFlags`]. More than 32 bits only with extended headers.
    pub flags: u64,
}

/// The payload of an `NBD_CMD_BLOCK_STATUS` with `NBD_CMD_FLAG_PAYLOAD_LEN`: how far to look, and for which contexts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatusFilter {
    /// Bytes that the request is about.
    pub effect_len: u64,
    /// The contexts to answer for.
    pub ids: Vec<u32>,
}

impl StatusFilter {
    /// Bytes on the wire for so many contexts.
    #[must_use]
    pub fn len_for(ids: usize) -> usize {
        8 + 4 * ids
    }

    /// Decodes a payload.
    ///
    /// # Errors
    /// `BadLength` when it has no effect length, or is no whole number of ids after it.
    pub fn decode(payload: &[u8]) -> Result<StatusFilter, ProtocolError> {
        let bad = ProtocolError::BadLength("NBD_CMD_BLOCK_STATUS");
        let mut b = payload;
        let effect_len = b.try_get_u64().map_err(|_| bad)?;
        let (ids, rest) = b.as_chunks::<4>();
        if !rest.is_empty() {
            return Err(bad);
        }
        Ok(StatusFilter { effect_len, ids: ids.iter().map(|id| u32::from_be_bytes(*id)).collect() })
    }

    /// Encodes the payload.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(StatusFilter::len_for(self.ids.len()));
        out.put_u64(self.effect_len);
        self.ids.iter().for_each(|id| out.put_u32(*id));
        out
    }
}

/// The payload of a structured reply chunk, as a client decodes it. For a data chunk a client usually reads the
/// offset itself and the data straight into its buffer; this is for the others, and for tests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Chunk<'a> {
    /// `NBD_REPLY_TYPE_NONE`.
    None,
    /// `NBD_REPLY_TYPE_OFFSET_DATA`.
    Data {
        /// Byte offset in the export.
        offset: u64,
        /// The data, not empty.
        data: &'a [u8],
    },
    /// `NBD_REPLY_TYPE_OFFSET_HOLE`.
    Hole {
        /// Byte offset in the export.
        offset: u64,
        /// Bytes of zeroes, at least 1.
        len: u32,
    },
    /// `NBD_REPLY_TYPE_BLOCK_STATUS` or `NBD_REPLY_TYPE_BLOCK_STATUS_EXT`.
    BlockStatus {
        /// Which context.
        context_id: u32,
        /// At least one, none empty.
        extents: Vec<StatusExtent>,
    },
    /// Any error chunk, known or not.
    Error {
        /// What went wrong.
        error: Errno,
        /// Text for people; may be empty.
        message: &'a str,
        /// Where, if the chunk says so.
        offset: Option<u64>,
    },
}

impl<'a> Chunk<'a> {
    /// Decodes a payload.
    ///
    /// # Errors
    /// `BadLength` also for an unknown chunk type that is no error chunk: the client must disconnect.
    pub fn decode(chunk_type: u16, payload: &'a [u8]) -> Result<Chunk<'a>, ProtocolError> {
        let bad = ProtocolError::BadLength("structured reply chunk");
        let mut b = payload;
        match chunk_type {
            NBD_REPLY_TYPE_NONE if b.is_empty() => Ok(Chunk::None),
            NBD_REPLY_TYPE_OFFSET_DATA if b.len() > 8 => Ok(Chunk::Data { offset: b.get_u64(), data: b }),
            NBD_REPLY_TYPE_OFFSET_HOLE if b.len() == 12 && be32(b, 8) > 0 => {
                Ok(Chunk::Hole { offset: be64(b, 0), len: be32(b, 8) })
            }
            NBD_REPLY_TYPE_BLOCK_STATUS if b.len() >= 12 && b.len() % 8 == 4 => {
                let context_id = b.get_u32();
                let extents: Vec<StatusExtent> = b
                    .as_chunks::<8>()
                    .0
                    .iter()
                    .map(|e| StatusExtent { len: be32(e, 0).into(), flags: be32(e, 4).into() })
                    .collect();
                if extents.iter().any(|e| e.len == 0) {
                    return Err(bad);
                }
                Ok(Chunk::BlockStatus { context_id, extents })
            }
            NBD_REPLY_TYPE_BLOCK_STATUS_EXT if b.len() >= 24 && b.len() % 16 == 8 => {
                let context_id = b.get_u32();
                let count = b.get_u32();
                let extents: Vec<StatusExtent> = b
                    .as_chunks::<16>()
                    .0
                    .iter()
                    .map(|e| StatusExtent { len: be64(e, 0), flags: be64(e, 8) })
                    .collect();
                if extents.iter().any(|e| e.len == 0) || extents.len() != count as usize {
                    return Err(bad);
                }
                Ok(Chunk::BlockStatus { context_id, extents })
            }
            t if t & NBD_REPLY_TYPE_FLAG_ERROR != 0 => {
                let error = b.try_get_u32().map_err(|_| bad)?;
                let error = Errno::from_wire(error).ok_or(bad)?;
                let message_len = b.try_get_u16().map_err(|_| bad)? as usize;
                let (message, rest) = b.split_at_checked(message_len).ok_or(bad)?;
                let message = check_string("error message", message)?;
                let offset = match (t, rest.len()) {
                    (NBD_REPLY_TYPE_ERROR_OFFSET, 8) => Some(be64(rest, 0)),
                    (NBD_REPLY_TYPE_ERROR_OFFSET, _) => return Err(bad),
                    _ => None,
                };
                Ok(Chunk::Error { error, message, offset })
            }
            _ => Err(bad),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DONE: ReplyFlags = ReplyFlags::NBD_REPLY_FLAG_DONE;
    const TO: ReplyTo = ReplyTo { cookie: 1, extended: None };

    #[test]
    fn greeting_is_the_documents_bytes() {
        let flags = HandshakeFlags::NBD_FLAG_FIXED_NEWSTYLE | HandshakeFlags::NBD_FLAG_NO_ZEROES;
        let b = Greeting { flags }.encode();
        assert_eq!(&b, b"NBDMAGICIHAVEOPT\x00\x03");
        assert_eq!(Greeting::decode(&b), Ok(Greeting { flags }));
        let mut old = b;
        old[8] = 0;
        assert!(matches!(Greeting::decode(&old), Err(ProtocolError::NotNewstyle(_))));
    }

    #[test]
    fn info_request_lengths_must_add_up() {
        let check = |data: &[u8], ok: bool| {
            assert_eq!(InfoRequest::decode(data).is_ok(), ok, "{data:?}");
        };
        check(b"", false);
        check(b"\0\0\0\0", false);
        check(b"\0\0\0\0\0\0", true);
        check(b"\0\0\0\x01a\0\0", true);
        check(b"\0\0\0\x02a\0\0", false);
        check(b"\0\0\0\x01a\0\x01", false);
        check(b"\0\0\0\x01a\0\x01\0\x03", true);
        check(b"\0\0\0\x01a\0\x01\0\x03\0", false);
        check(b"\xff\xff\xff\xff\0\0", false);
        assert!(InfoRequest::decode(b"\0\0\0\0\0\x01\0\x03").unwrap().wants(NBD_INFO_BLOCK_SIZE));
        assert!(!InfoRequest::decode(b"\0\0\0\0\0\x01\0\x03").unwrap().wants(NBD_INFO_NAME));
    }

    #[test]
    fn meta_request_lengths_must_add_up() {
        let check = |data: &[u8], ok: bool| {
            assert_eq!(MetaContextRequest::decode(data).is_ok(), ok, "{data:?}");
        };
        check(b"", false);
        check(b"\0\0\0\0", false);
        check(b"\0\0\0\0\0\0\0\0", true);
        check(b"\0\0\0\0\0\0\0\0\0", false);
        check(b"\0\0\0\0\0\0\0\x01", false);
        check(b"\0\0\0\0\0\0\0\x01\0\0\0\x02b:", true);
        check(b"\0\0\0\0\0\0\0\x01\0\0\0\x03b:", false);
        check(b"\0\0\0\0\xff\xff\xff\xff\0\0\0\0", false);
        check(b"\0\0\0\x09e\0\0\0\0", false);
    }

    #[test]
    fn a_simple_reply_and_a_chunk_are_told_apart() {
        let simple = SimpleReply { error: Some(Errno::NBD_ENOSPC), cookie: 7 };
        assert_eq!(ReplyHeader::decode(&simple.encode()), Ok(ReplyHeader::Simple(simple)));
        let none: [u8; 16] = ReplyTo::compact(9).none()[..16].try_into().unwrap();
        let want = ChunkHeader { flags: DONE, chunk_type: NBD_REPLY_TYPE_NONE, cookie: 9, offset: 0, len: 0 };
        assert_eq!(ReplyHeader::decode(&none), Ok(ReplyHeader::Chunk(want)));
        let hole = ReplyTo::extended(9, 77).offset_hole(DONE, 5, 6);
        assert_eq!(hole.len(), 44);
        let front: [u8; 16] = hole[..16].try_into().unwrap();
        let Ok(ReplyHeader::Extended(front)) = ReplyHeader::decode(&front) else { panic!() };
        let chunk = front.with_extended_tail(hole[16..32].try_into().unwrap());
        assert_eq!((chunk.cookie, chunk.offset, chunk.len), (9, 77, 12));
        assert!(ReplyHeader::decode(&[0; 16]).is_err());
    }

    #[test]
    fn chunks_survive_a_round_trip() {
        let mut b = Vec::new();
        TO.put_error(&mut b, DONE, Errno::NBD_EIO, "broken", Some(4096));
        let want = Chunk::Error { error: Errno::NBD_EIO, message: "broken", offset: Some(4096) };
        assert_eq!(Chunk::decode(NBD_REPLY_TYPE_ERROR_OFFSET, &b[20..]), Ok(want));
        b.clear();
        TO.put_error(&mut b, DONE, Errno::NBD_EIO, "", None);
        assert_eq!(b.len(), 26);
        let hole = TO.offset_hole(DONE, 5, 6);
        assert_eq!(
            Chunk::decode(NBD_REPLY_TYPE_OFFSET_HOLE, &hole[20..]),
            Ok(Chunk::Hole { offset: 5, len: 6 })
        );
        let data = TO.offset_data(DONE, 5, 6);
        assert_eq!(be32(&data, 16), 14);
        b.clear();
        let extents = vec![StatusExtent { len: 512, flags: 3 }, StatusExtent { len: 1, flags: 0 }];
        TO.put_block_status(&mut b, DONE, 42, &extents);
        let want = Chunk::BlockStatus { context_id: 42, extents };
        assert_eq!(Chunk::decode(NBD_REPLY_TYPE_BLOCK_STATUS, &b[20..]), Ok(want));
        b.clear();
        let extents = vec![StatusExtent { len: 1 << 40, flags: 1 << 33 }, StatusExtent { len: 1, flags: 0 }];
        ReplyTo::extended(1, 0).put_block_status(&mut b, DONE, 42, &extents);
        let want = Chunk::BlockStatus { context_id: 42, extents };
        assert_eq!(Chunk::decode(NBD_REPLY_TYPE_BLOCK_STATUS_EXT, &b[32..]), Ok(want));
        b[39] = 3;
        assert!(Chunk::decode(NBD_REPLY_TYPE_BLOCK_STATUS_EXT, &b[32..]).is_err(), "153: the count must fit");
    }

    #[test]
    fn long_error_messages_are_cut_at_a_character() {
        let mut b = Vec::new();
        TO.put_error(&mut b, DONE, Errno::NBD_EIO, &"ü".repeat(3000), None);
        let Ok(Chunk::Error { message, .. }) = Chunk::decode(NBD_REPLY_TYPE_ERROR, &b[20..]) else {
            panic!()
        };
        assert_eq!(message.len(), 4096);
    }

    proptest! {
        #[test]
        fn headers_survive_a_round_trip(
            flags: u16, cmd: u16, cookie: u64, offset: u64, len: u32, option: u32, reply_type: u32
        ) {
            let r = RequestHeader { flags: CmdFlags::from_bits_retain(flags), cmd, cookie, offset, len: len.into() };
            prop_assert_eq!(RequestHeader::decode(&r.encode()), Ok(r));
            let r = RequestHeader { len: u64::from(len) << 20, ..r };
            prop_assert_eq!(RequestHeader::decode_extended(&r.encode_extended()), Ok(r));
            let filter = StatusFilter { effect_len: offset, ids: vec![option; usize::from(cmd % 9)] };
            prop_assert_eq!(StatusFilter::decode(&filter.encode()), Ok(filter));
            let o = OptionHeader { option, len };
            prop_assert_eq!(OptionHeader::decode(&o.encode()), Ok(o));
            let p = OptionReplyHeader { option, reply_type, len };
            prop_assert_eq!(OptionReplyHeader::decode(&p.encode()), Ok(p));
        }

        #[test]
        fn names_and_queries_survive_a_round_trip(
            name in "[^\0]{0,40}", infos: Vec<u16>, queries in proptest::collection::vec("[^\0]{0,20}", 0..9)
        ) {
            let mut b = Vec::new();
            InfoRequest::put(&mut b, &name, &infos);
            let r = InfoRequest::decode(&b).unwrap();
            prop_assert_eq!(r.name, name.as_bytes());
            prop_assert!(infos.iter().all(|i| r.wants(*i)));
            b.clear();
            let q: Vec<&str> = queries.iter().map(String::as_str).collect();
            MetaContextRequest::put(&mut b, &name, &q);
            let r = MetaContextRequest::decode(&b).unwrap();
            prop_assert_eq!(r.len(), q.len());
            let got: Vec<&[u8]> = r.queries().collect();
            let want: Vec<&[u8]> = q.iter().map(|s| s.as_bytes()).collect();
            prop_assert_eq!(got, want);
        }

        #[test]
        fn garbage_never_panics_a_decoder(data: Vec<u8>, chunk_type: u16) {
            let _ = InfoRequest::decode(&data);
            if let Ok(r) = MetaContextRequest::decode(&data) {
                prop_assert_eq!(r.queries().count(), r.len());
            }
            let _ = RepServer::decode(&data);
            let _ = RepInfo::decode(&data);
            let _ = RepMetaContext::decode(&data);
            let _ = Chunk::decode(chunk_type, &data);
            let _ = StatusFilter::decode(&data);
            for t in [0, 1, 2, 5, 6, 0x8001, 0x8002, 0x8003] {
                let _ = Chunk::decode(t, &data);
            }
        }
    }
}
