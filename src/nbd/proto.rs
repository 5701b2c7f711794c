//! Constants of the NBD protocol, in the spelling of its document; the one place where they are written down.
//!
//! Source: proto.md of NetworkBlockDevice/nbd, section "Values". Numbers that the document leaves to the
//! implementation (our limits) are in the last section and say so. No code here does I/O.

use bitflags::bitflags;

/// Default TCP port (IANA); no oldstyle negotiation happens on it.
pub const NBD_DEFAULT_PORT: u16 = 10809;

/// First magic of the greeting, ASCII `NBDMAGIC` (the document's `INIT_PASSWD`).
pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second magic of the newstyle greeting and magic of every option, ASCII `IHAVEOPT`.
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// Magic of every option reply.
pub const NBD_REP_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Magic of a request.
pub const NBD_REQUEST_MAGIC: u32 = 0x2560_9513;
/// Magic of a request with extended headers.
pub const NBD_EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Magic of a simple reply.
pub const NBD_SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Magic of a structured reply chunk.
pub const NBD_STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Magic of a reply chunk with extended headers.
pub const NBD_EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// How requests and replies look in transmission; each includes what the one before it can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum HeaderStyle {
    /// Compact requests, simple replies only.
    #[default]
    Simple,
    /// Compact requests; replies with content come in chunks (`NBD_OPT_STRUCTURED_REPLY`).
    Structured,
    /// 32-byte headers both ways, every reply in chunks (`NBD_OPT_EXTENDED_HEADERS`).
    Extended,
}

bitflags! {
    /// Handshake flags, sent by the server in its greeting.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct HandshakeFlags: u16 {
        /// The server speaks fixed newstyle.
        const NBD_FLAG_FIXED_NEWSTYLE = 1 << 0;
        /// The server can leave out the 124 zero bytes after `NBD_OPT_EXPORT_NAME`.
        const NBD_FLAG_NO_ZEROES = 1 << 1;
    }
}

bitflags! {
    /// Client flags, the client's answer to the greeting. Any other bit ends the connection.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct ClientFlags: u32 {
        /// The client speaks fixed newstyle.
        const NBD_FLAG_C_FIXED_NEWSTYLE = 1 << 0;
        /// The client does not want the 124 zero bytes after `NBD_OPT_EXPORT_NAME`.
        const NBD_FLAG_C_NO_ZEROES = 1 << 1;
    }
}

bitflags! {
    /// Transmission flags: what an export is and which requests it takes.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct TransmissionFlags: u16 {
        /// Always set.
        const NBD_FLAG_HAS_FLAGS = 1 << 0;
        /// Write-type requests fail.
        const NBD_FLAG_READ_ONLY = 1 << 1;
        /// Takes `NBD_CMD_FLUSH`.
        const NBD_FLAG_SEND_FLUSH = 1 << 2;
        /// Takes `NBD_CMD_FLAG_FUA`.
        const NBD_FLAG_SEND_FUA = 1 << 3;
        /// The medium spins.
        const NBD_FLAG_ROTATIONAL = 1 << 4;
        /// Takes `NBD_CMD_TRIM`.
        const NBD_FLAG_SEND_TRIM = 1 << 5;
        /// Takes `NBD_CMD_WRITE_ZEROES` and `NBD_CMD_FLAG_NO_HOLE`.
        const NBD_FLAG_SEND_WRITE_ZEROES = 1 << 6;
        /// Takes `NBD_CMD_FLAG_DF`; only with structured replies.
        const NBD_FLAG_SEND_DF = 1 << 7;
        /// Flush and FUA on one connection cover all connections of the export.
        const NBD_FLAG_CAN_MULTI_CONN = 1 << 8;
        /// Takes `NBD_CMD_RESIZE` (extension; never set by this server).
        const NBD_FLAG_SEND_RESIZE = 1 << 9;
        /// Takes `NBD_CMD_CACHE`.
        const NBD_FLAG_SEND_CACHE = 1 << 10;
        /// Takes `NBD_CMD_FLAG_FAST_ZERO`.
        const NBD_FLAG_SEND_FAST_ZERO = 1 << 11;
        /// Takes `NBD_CMD_FLAG_PAYLOAD_LEN` with block status (extended headers, and a context is selected).
        const NBD_FLAG_BLOCK_STATUS_PAYLOAD = 1 << 12;
    }
}

bitflags! {
    /// Command flags of a request.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct CmdFlags: u16 {
        /// The reply leaves only after this command's data is durable.
        const NBD_CMD_FLAG_FUA = 1 << 0;
        /// `NBD_CMD_WRITE_ZEROES`: leave the range allocated.
        const NBD_CMD_FLAG_NO_HOLE = 1 << 1;
        /// `NBD_CMD_READ`: at most one content chunk.
        const NBD_CMD_FLAG_DF = 1 << 2;
        /// `NBD_CMD_BLOCK_STATUS`: one extent per context.
        const NBD_CMD_FLAG_REQ_ONE = 1 << 3;
        /// `NBD_CMD_WRITE_ZEROES`: quickly, or `NBD_ENOTSUP`.
        const NBD_CMD_FLAG_FAST_ZERO = 1 << 4;
        /// The length is that of a payload (extended headers only).
        const NBD_CMD_FLAG_PAYLOAD_LEN = 1 << 5;
    }
}

bitflags! {
    /// Flags of a structured reply chunk.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct ReplyFlags: u16 {
        /// Last chunk of its reply.
        const NBD_REPLY_FLAG_DONE = 1 << 0;
    }
}

bitflags! {
    /// Status bits of the `base:allocation` context.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct StateFlags: u32 {
        /// Not allocated: a later write may run out of space.
        const NBD_STATE_HOLE = 1 << 0;
        /// Reads as zeroes.
        const NBD_STATE_ZERO = 1 << 1;
    }
}

bitflags! {
    /// Status bits of a `qemu:dirty-bitmap:NAME` context (QEMU's docs/interop/nbd.txt).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct DirtyFlags: u32 {
        /// Written to since the bitmap was begun.
        const NBD_STATE_DIRTY = 1 << 0;
    }
}

/// Choose an export and enter transmission; has no error reply.
pub const NBD_OPT_EXPORT_NAME: u32 = 1;
/// End the session.
pub const NBD_OPT_ABORT: u32 = 2;
/// List the exports.
pub const NBD_OPT_LIST: u32 = 3;
/// Withdrawn; answered like any unknown option.
pub const NBD_OPT_PEEK_EXPORT: u32 = 4;
/// Begin TLS.
pub const NBD_OPT_STARTTLS: u32 = 5;
/// Describe an export.
pub const NBD_OPT_INFO: u32 = 6;
/// Describe an export and enter transmission.
pub const NBD_OPT_GO: u32 = 7;
/// Switch structured replies on.
pub const NBD_OPT_STRUCTURED_REPLY: u32 = 8;
/// List metadata contexts.
pub const NBD_OPT_LIST_META_CONTEXT: u32 = 9;
/// Select metadata contexts.
pub const NBD_OPT_SET_META_CONTEXT: u32 = 10;
/// Switch extended headers on (extension branch).
pub const NBD_OPT_EXTENDED_HEADERS: u32 = 11;

/// Success, end of the replies to one option.
pub const NBD_REP_ACK: u32 = 1;
/// One export of a list.
pub const NBD_REP_SERVER: u32 = 2;
/// One piece of information about an export.
pub const NBD_REP_INFO: u32 = 3;
/// One metadata context.
pub const NBD_REP_META_CONTEXT: u32 = 4;
/// Bit that marks an option reply as an error.
pub const NBD_REP_FLAG_ERROR: u32 = 1 << 31;
/// Unknown option.
pub const NBD_REP_ERR_UNSUP: u32 = NBD_REP_FLAG_ERROR | 1;
/// Known, but forbidden by the server's configuration.
pub const NBD_REP_ERR_POLICY: u32 = NBD_REP_FLAG_ERROR | 2;
/// Malformed.
pub const NBD_REP_ERR_INVALID: u32 = NBD_REP_FLAG_ERROR | 3;
/// Not available in this build or on this system.
pub const NBD_REP_ERR_PLATFORM: u32 = NBD_REP_FLAG_ERROR | 4;
/// TLS first.
pub const NBD_REP_ERR_TLS_REQD: u32 = NBD_REP_FLAG_ERROR | 5;
/// No such export.
pub const NBD_REP_ERR_UNKNOWN: u32 = NBD_REP_FLAG_ERROR | 6;
/// The server is shutting down.
pub const NBD_REP_ERR_SHUTDOWN: u32 = NBD_REP_FLAG_ERROR | 7;
/// Ask for `NBD_INFO_BLOCK_SIZE` first.
pub const NBD_REP_ERR_BLOCK_SIZE_REQD: u32 = NBD_REP_FLAG_ERROR | 8;
/// Request or reply too large.
pub const NBD_REP_ERR_TOO_BIG: u32 = NBD_REP_FLAG_ERROR | 9;
/// Extended headers first (extension branch).
pub const NBD_REP_ERR_EXT_HEADER_REQD: u32 = NBD_REP_FLAG_ERROR | 10;

/// Size and transmission flags.
pub const NBD_INFO_EXPORT: u16 = 0;
/// Canonical name.
pub const NBD_INFO_NAME: u16 = 1;
/// Text for people.
pub const NBD_INFO_DESCRIPTION: u16 = 2;
/// Minimum, preferred and maximum block size.
pub const NBD_INFO_BLOCK_SIZE: u16 = 3;

/// Read.
pub const NBD_CMD_READ: u16 = 0;
/// Write; the payload follows the header.
pub const NBD_CMD_WRITE: u16 = 1;
/// End of the session; has no reply.
pub const NBD_CMD_DISC: u16 = 2;
/// Make all replied-to writes durable.
pub const NBD_CMD_FLUSH: u16 = 3;
/// Give a range up.
pub const NBD_CMD_TRIM: u16 = 4;
/// Prefetch.
pub const NBD_CMD_CACHE: u16 = 5;
/// Make a range read as zeroes.
pub const NBD_CMD_WRITE_ZEROES: u16 = 6;
/// Ask for extents of the selected contexts.
pub const NBD_CMD_BLOCK_STATUS: u16 = 7;
/// Change the size (extension; an unknown command to this server).
pub const NBD_CMD_RESIZE: u16 = 8;

/// End of a reply, no content.
pub const NBD_REPLY_TYPE_NONE: u16 = 0;
/// Offset and data.
pub const NBD_REPLY_TYPE_OFFSET_DATA: u16 = 1;
/// Offset and size of a range of zeroes.
pub const NBD_REPLY_TYPE_OFFSET_HOLE: u16 = 2;
/// Context id and extents.
pub const NBD_REPLY_TYPE_BLOCK_STATUS: u16 = 5;
/// Context id and 64-bit extents (extended headers).
pub const NBD_REPLY_TYPE_BLOCK_STATUS_EXT: u16 = 6;
/// Bit that marks a chunk as an error chunk.
pub const NBD_REPLY_TYPE_FLAG_ERROR: u16 = 1 << 15;
/// Error and message.
pub const NBD_REPLY_TYPE_ERROR: u16 = NBD_REPLY_TYPE_FLAG_ERROR | 1;
/// Error, message and the offset where it happened.
pub const NBD_REPLY_TYPE_ERROR_OFFSET: u16 = NBD_REPLY_TYPE_FLAG_ERROR | 2;

/// An error value on the wire. Only the document's eight can be made.
///
/// Source: proto.md, "Error values".
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(u32);

impl Errno {
    /// Operation not permitted: a write-type request to a read-only export.
    pub const NBD_EPERM: Errno = Errno(1);
    /// Input/output error.
    pub const NBD_EIO: Errno = Errno(5);
    /// Cannot allocate memory.
    pub const NBD_ENOMEM: Errno = Errno(12);
    /// Invalid argument: unknown command or flag, range beyond the end.
    pub const NBD_EINVAL: Errno = Errno(22);
    /// No space left on the device, or a write beyond the end.
    pub const NBD_ENOSPC: Errno = Errno(28);
    /// Value too large.
    pub const NBD_EOVERFLOW: Errno = Errno(75);
    /// Not supported: only for `NBD_CMD_FLAG_FAST_ZERO`.
    pub const NBD_ENOTSUP: Errno = Errno(95);
    /// The server is shutting down.
    pub const NBD_ESHUTDOWN: Errno = Errno(108);

    /// Maps an errno of the system to what may be said on the wire: `EROFS` is `NBD_EPERM`, `EDQUOT` and
    /// `EFBIG` are `NBD_ENOSPC`, what has no value of its own is `NBD_EIO`.
    ///
    /// `ENOTSUP` and `EOVERFLOW` become `NBD_EIO` too: where a request may fail that way, its handler says so
    /// itself, and everywhere else the client would misread it.
    #[must_use]
    pub fn from_os(errno: i32) -> Errno {
        match errno {
            libc::EPERM | libc::EACCES | libc::EROFS => Errno::NBD_EPERM,
            libc::ENOMEM => Errno::NBD_ENOMEM,
            libc::EINVAL => Errno::NBD_EINVAL,
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => Errno::NBD_ENOSPC,
            libc::ESHUTDOWN => Errno::NBD_ESHUTDOWN,
            _ => Errno::NBD_EIO,
        }
    }

    /// Reads a value sent by a server; an unknown one counts as `NBD_EINVAL`. Zero is no error: `None`.
    #[must_use]
    pub fn from_wire(value: u32) -> Option<Errno> {
        match value {
            0 => None,
            1 | 5 | 12 | 22 | 28 | 75 | 95 | 108 => Some(Errno(value)),
            _ => Some(Errno::NBD_EINVAL),
        }
    }

    /// The number as sent; never zero.
    #[must_use]
    pub fn to_wire(self) -> u32 {
        self.0
    }

    /// The document's name of the value.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self.0 {
            1 => "EPERM",
            5 => "EIO",
            12 => "ENOMEM",
            22 => "EINVAL",
            28 => "ENOSPC",
            75 => "EOVERFLOW",
            95 => "ENOTSUP",
            _ => "ESHUTDOWN",
        }
    }
}

impl std::fmt::Debug for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::fmt::Display for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Returns a command's name for logs.
#[must_use]
pub fn cmd_name(cmd: u16) -> &'static str {
    match cmd {
        NBD_CMD_READ => "READ",
        NBD_CMD_WRITE => "WRITE",
        NBD_CMD_DISC => "DISC",
        NBD_CMD_FLUSH => "FLUSH",
        NBD_CMD_TRIM => "TRIM",
        NBD_CMD_CACHE => "CACHE",
        NBD_CMD_WRITE_ZEROES => "WRITE_ZEROES",
        NBD_CMD_BLOCK_STATUS => "BLOCK_STATUS",
        NBD_CMD_RESIZE => "RESIZE",
        _ => "UNKNOWN",
    }
}

/// Returns an option's name for logs.
#[must_use]
pub fn opt_name(option: u32) -> &'static str {
    match option {
        NBD_OPT_EXPORT_NAME => "EXPORT_NAME",
        NBD_OPT_ABORT => "ABORT",
        NBD_OPT_LIST => "LIST",
        NBD_OPT_PEEK_EXPORT => "PEEK_EXPORT",
        NBD_OPT_STARTTLS => "STARTTLS",
        NBD_OPT_INFO => "INFO",
        NBD_OPT_GO => "GO",
        NBD_OPT_STRUCTURED_REPLY => "STRUCTURED_REPLY",
        NBD_OPT_LIST_META_CONTEXT => "LIST_META_CONTEXT",
        NBD_OPT_SET_META_CONTEXT => "SET_META_CONTEXT",
        NBD_OPT_EXTENDED_HEADERS => "EXTENDED_HEADERS",
        _ => "UNKNOWN",
    }
}

/// Returns an option reply type's name, e.g. for a client's error message.
#[must_use]
pub fn rep_name(reply_type: u32) -> &'static str {
    match reply_type {
        NBD_REP_ACK => "NBD_REP_ACK",
        NBD_REP_SERVER => "NBD_REP_SERVER",
        NBD_REP_INFO => "NBD_REP_INFO",
        NBD_REP_META_CONTEXT => "NBD_REP_META_CONTEXT",
        NBD_REP_ERR_UNSUP => "NBD_REP_ERR_UNSUP",
        NBD_REP_ERR_POLICY => "NBD_REP_ERR_POLICY",
        NBD_REP_ERR_INVALID => "NBD_REP_ERR_INVALID",
        NBD_REP_ERR_PLATFORM => "NBD_REP_ERR_PLATFORM",
        NBD_REP_ERR_TLS_REQD => "NBD_REP_ERR_TLS_REQD",
        NBD_REP_ERR_UNKNOWN => "NBD_REP_ERR_UNKNOWN",
        NBD_REP_ERR_SHUTDOWN => "NBD_REP_ERR_SHUTDOWN",
        NBD_REP_ERR_BLOCK_SIZE_REQD => "NBD_REP_ERR_BLOCK_SIZE_REQD",
        NBD_REP_ERR_TOO_BIG => "NBD_REP_ERR_TOO_BIG",
        NBD_REP_ERR_EXT_HEADER_REQD => "NBD_REP_ERR_EXT_HEADER_REQD",
        _ => "unknown reply type",
    }
}

/// Longest string (name, description, message, query) in bytes. The document's limit.
pub const NBD_MAX_STRING: usize = 4096;

/// Zero bytes after the reply to `NBD_OPT_EXPORT_NAME` unless `NBD_FLAG_C_NO_ZEROES`. The document's.
pub const EXPORT_NAME_PADDING: usize = 124;

/// Largest payload of a read or write request in bytes. Ours: the reference suite sends up to 50,000,000.
pub const MAX_PAYLOAD: u32 = 64 << 20;

/// Longest option data that is parsed, in bytes. Ours: `NBD_OPT_GO` with the longest name and 65,535
/// information requests fits, and so do dozens of the longest metadata queries.
pub const MAX_OPTION_LEN: u32 = 6 + NBD_MAX_STRING as u32 + 2 * 0xffff;

/// Longest option data that is skipped to stay in sync after `NBD_REP_ERR_TOO_BIG`, in bytes; anything longer
/// ends the session. Ours.
pub const MAX_OPTION_SKIP: u32 = 16 << 20;

/// Options that one session may send. Ours; nbdkit's 32 is too low for a client that asks about every export.
pub const MAX_OPTIONS: u32 = 4096;

/// Most queries in one metadata context option. Ours.
pub const MAX_META_QUERIES: u32 = 4096;

/// Most extents in one block status chunk. Ours; the document says at most 2^20.
pub const MAX_EXTENTS: usize = 8192;
