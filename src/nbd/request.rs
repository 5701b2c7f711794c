//! Validation of requests: the one place that decides whether a request is allowed.
//!
//! Pure: a decoded header and what the connection has negotiated go in, a [`Command`] or the error for the reply
//! comes out. What passes here is inside the export and has only flags that mean something; below this, a violation
//! is a bug and an assert.
//!
//! Order of the checks: command, flags, permission, range. A write's payload is consumed whatever the verdict
//! ([`payload_len`]).

use super::proto::*;
use super::wire::{ProtocolError, RequestHeader};
use crate::block::WriteFlags;

/// What a connection may ask for: fixed at negotiation, but for the size.
#[derive(Debug, Clone, Copy)]
pub struct View {
    /// Size of the export in bytes, now.
    pub size: u64,
    /// Transmission flags as told to this client.
    pub flags: TransmissionFlags,
    /// Whether a metadata context is selected.
    pub has_contexts: bool,
}

/// A request that may be carried out. Ranges lie inside the export; `len` is bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Read; `len` may be 0 and is at most [`MAX_PAYLOAD`].
    Read {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u32,
        /// At most one content chunk.
        df: bool,
    },
    /// Write; the payload has `len` bytes, perhaps 0.
    Write {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u32,
        /// FUA or nothing.
        flags: WriteFlags,
    },
    /// End the session; not answered.
    Disc,
    /// Make what was replied to durable.
    Flush,
    /// Discard.
    Trim {
        /// Byte offset.
        offset: u64,
        /// Bytes, perhaps 0.
        len: u32,
        /// Make the result durable.
        fua: bool,
    },
    /// Prefetch.
    Cache {
        /// Byte offset.
        offset: u64,
        /// Bytes, perhaps 0.
        len: u32,
    },
    /// Zero.
    WriteZeroes {
        /// Byte offset.
        offset: u64,
        /// Bytes, perhaps 0.
        len: u32,
        /// FUA, MAY_UNMAP, NO_FALLBACK.
        flags: WriteFlags,
    },
    /// Extents of every selected context.
    BlockStatus {
        /// Byte offset.
        offset: u64,
        /// Bytes, at least 1.
        len: u32,
        /// One extent per context.
        req_one: bool,
    },
}

/// A request that is answered with an error; the connection goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RequestError {
    /// For the reply.
    pub errno: Errno,
    /// Text for the error chunk and the log.
    pub message: &'static str,
}

const fn refuse(errno: Errno, message: &'static str) -> RequestError {
    RequestError { errno, message }
}

/// Bytes that follow the header on the wire, whatever becomes of the request. `None`: more than will be read; the
/// connection must end, since the stream cannot be followed any further at bounded cost.
#[must_use]
pub fn payload_len(header: &RequestHeader) -> Option<u32> {
    match header.cmd {
        NBD_CMD_WRITE if header.len > MAX_PAYLOAD => None,
        NBD_CMD_WRITE => Some(header.len),
        _ => Some(0),
    }
}

/// Decodes the next request header of a receive buffer, if it is there completely.
///
/// # Errors
/// `BadRequestMagic`: the stream is lost.
pub fn next_header(buffered: &[u8]) -> Result<Option<RequestHeader>, ProtocolError> {
    match buffered.first_chunk::<{ RequestHeader::LEN }>() {
        Some(b) => RequestHeader::decode(b).map(Some),
        None => {
            // Part of a header is enough to see that it is none: don't wait for more of it.
            let magic = NBD_REQUEST_MAGIC.to_be_bytes();
            let n = buffered.len().min(magic.len());
            if buffered[..n] == magic[..n] {
                return Ok(None);
            }
            let mut seen = [0; 4];
            seen[..n].copy_from_slice(&buffered[..n]);
            Err(ProtocolError::BadRequestMagic(u32::from_be_bytes(seen)))
        }
    }
}

/// Flags that a command takes on a connection with these transmission flags.
///
/// Source: proto.md, "Command flags": FUA goes with every command once it is advertised.
fn allowed_flags(cmd: u16, flags: TransmissionFlags) -> CmdFlags {
    let mut allowed = CmdFlags::empty();
    allowed.set(CmdFlags::NBD_CMD_FLAG_FUA, flags.contains(TransmissionFlags::NBD_FLAG_SEND_FUA));
    match cmd {
        NBD_CMD_READ => {
            allowed.set(CmdFlags::NBD_CMD_FLAG_DF, flags.contains(TransmissionFlags::NBD_FLAG_SEND_DF));
        }
        NBD_CMD_WRITE_ZEROES => {
            allowed |= CmdFlags::NBD_CMD_FLAG_NO_HOLE;
            let fast = flags.contains(TransmissionFlags::NBD_FLAG_SEND_FAST_ZERO);
            allowed.set(CmdFlags::NBD_CMD_FLAG_FAST_ZERO, fast);
        }
        NBD_CMD_BLOCK_STATUS => allowed |= CmdFlags::NBD_CMD_FLAG_REQ_ONE,
        _ => {}
    }
    allowed
}

/// Decides whether a request may be carried out.
///
/// # Errors
/// The errno and text of the reply.
pub fn validate(h: &RequestHeader, view: &View) -> Result<Command, RequestError> {
    use TransmissionFlags as F;
    if h.cmd == NBD_CMD_DISC {
        // Whatever its other fields say, it is the end: there is no way to refuse it.
        return Ok(Command::Disc);
    }
    if h.cmd > NBD_CMD_BLOCK_STATUS {
        return Err(refuse(Errno::NBD_EINVAL, "unknown command"));
    }
    if !allowed_flags(h.cmd, view.flags).contains(h.flags) {
        return Err(refuse(Errno::NBD_EINVAL, "command flag is unknown or does not go with this command"));
    }
    let read_only = view.flags.contains(F::NBD_FLAG_READ_ONLY);
    let write_type = matches!(h.cmd, NBD_CMD_WRITE | NBD_CMD_TRIM | NBD_CMD_WRITE_ZEROES);
    if write_type && read_only {
        return Err(refuse(Errno::NBD_EPERM, "export is read-only"));
    }
    let offered = match h.cmd {
        NBD_CMD_FLUSH => view.flags.contains(F::NBD_FLAG_SEND_FLUSH),
        NBD_CMD_TRIM => view.flags.contains(F::NBD_FLAG_SEND_TRIM),
        NBD_CMD_CACHE => view.flags.contains(F::NBD_FLAG_SEND_CACHE),
        NBD_CMD_WRITE_ZEROES => view.flags.contains(F::NBD_FLAG_SEND_WRITE_ZEROES),
        _ => true,
    };
    if !offered {
        return Err(refuse(Errno::NBD_EINVAL, "command was not offered"));
    }
    if h.cmd == NBD_CMD_FLUSH {
        // The offset and length are reserved; a flush too many harms nobody.
        return Ok(Command::Flush);
    }
    if h.cmd == NBD_CMD_BLOCK_STATUS && !view.has_contexts {
        return Err(refuse(Errno::NBD_EINVAL, "no metadata context was negotiated for this export"));
    }

    let (offset, len) = (h.offset, h.len);
    let inside = offset.checked_add(u64::from(len)).is_some_and(|end| end <= view.size);
    if !inside {
        return Err(match h.cmd {
            NBD_CMD_WRITE | NBD_CMD_WRITE_ZEROES => {
                refuse(Errno::NBD_ENOSPC, "request goes past the end of the export")
            }
            _ => refuse(Errno::NBD_EINVAL, "request goes past the end of the export"),
        });
    }
    let fua = h.flags.contains(CmdFlags::NBD_CMD_FLAG_FUA);
    let mut write_flags = WriteFlags::empty();
    write_flags.set(WriteFlags::FUA, fua);
    match h.cmd {
        NBD_CMD_READ if len > MAX_PAYLOAD => Err(refuse(Errno::NBD_EINVAL, "read is larger than 64 MiB")),
        NBD_CMD_READ => Ok(Command::Read { offset, len, df: h.flags.contains(CmdFlags::NBD_CMD_FLAG_DF) }),
        NBD_CMD_WRITE => Ok(Command::Write { offset, len, flags: write_flags }),
        NBD_CMD_TRIM => Ok(Command::Trim { offset, len, fua }),
        NBD_CMD_CACHE => Ok(Command::Cache { offset, len }),
        NBD_CMD_WRITE_ZEROES => {
            let no_hole = h.flags.contains(CmdFlags::NBD_CMD_FLAG_NO_HOLE);
            let fast = h.flags.contains(CmdFlags::NBD_CMD_FLAG_FAST_ZERO);
            write_flags.set(WriteFlags::MAY_UNMAP, !no_hole);
            write_flags.set(WriteFlags::NO_FALLBACK, fast);
            Ok(Command::WriteZeroes { offset, len, flags: write_flags })
        }
        _ if len == 0 => Err(refuse(Errno::NBD_EINVAL, "block status of nothing")),
        _ => {
            let req_one = h.flags.contains(CmdFlags::NBD_CMD_FLAG_REQ_ONE);
            Ok(Command::BlockStatus { offset, len, req_one })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: u64 = 1 << 20;

    fn writable() -> TransmissionFlags {
        TransmissionFlags::all()
            - TransmissionFlags::NBD_FLAG_READ_ONLY
            - TransmissionFlags::NBD_FLAG_SEND_RESIZE
            - TransmissionFlags::NBD_FLAG_BLOCK_STATUS_PAYLOAD
    }

    fn header(cmd: u16, flags: u16, offset: u64, len: u32) -> RequestHeader {
        RequestHeader { flags: CmdFlags::from_bits_retain(flags), cmd, cookie: 0, offset, len }
    }

    #[test]
    fn verdicts_follow_the_checklist() {
        let rw = View { size: SIZE, flags: writable(), has_contexts: true };
        let ro = View {
            flags: TransmissionFlags::NBD_FLAG_HAS_FLAGS
                | TransmissionFlags::NBD_FLAG_READ_ONLY
                | TransmissionFlags::NBD_FLAG_SEND_FUA
                | TransmissionFlags::NBD_FLAG_SEND_FLUSH,
            has_contexts: false,
            size: SIZE,
        };
        let (perm, inval, nospc) = (Errno::NBD_EPERM, Errno::NBD_EINVAL, Errno::NBD_ENOSPC);
        let check = |view: &View, cmd, flags, offset, len, want: Option<Errno>| {
            let got = validate(&header(cmd, flags, offset, len), view).err().map(|e| e.errno);
            assert_eq!(got, want, "{} flags {flags:#x} {offset}+{len}", cmd_name(cmd));
        };
        // 114, 118, 120: reads
        check(&rw, NBD_CMD_READ, 0, 0, 0, None);
        check(&rw, NBD_CMD_READ, 0, SIZE - 1, 1, None);
        check(&rw, NBD_CMD_READ, 0, SIZE, 0, None);
        check(&rw, NBD_CMD_READ, 0, SIZE, 1, Some(inval));
        check(&rw, NBD_CMD_READ, 0, u64::MAX, 1, Some(inval));
        check(&rw, NBD_CMD_READ, 0, u64::MAX, u32::MAX, Some(inval));
        let huge = View { size: u64::MAX, ..rw };
        check(&huge, NBD_CMD_READ, 0, 0, MAX_PAYLOAD, None);
        check(&huge, NBD_CMD_READ, 0, 0, MAX_PAYLOAD + 1, Some(inval));
        // 117, 72: flags
        check(&rw, NBD_CMD_READ, 4, 0, 512, None);
        check(&ro, NBD_CMD_READ, 4, 0, 512, Some(inval));
        check(&rw, NBD_CMD_READ, 2, 0, 512, Some(inval));
        check(&rw, NBD_CMD_READ, 8, 0, 512, Some(inval));
        check(&rw, NBD_CMD_READ, 0x8000, 0, 512, Some(inval));
        // 159: PAYLOAD_LEN is unknown without extended headers
        check(&rw, NBD_CMD_WRITE, 1 << 5, 0, 512, Some(inval));
        // 110: FUA goes with everything
        for cmd in 0..=NBD_CMD_BLOCK_STATUS {
            check(&rw, cmd, 1, 0, 512, None);
        }
        // 122, 123, 127: writes
        check(&rw, NBD_CMD_WRITE, 0, SIZE - 512, 513, Some(nospc));
        check(&rw, NBD_CMD_WRITE, 0, 0, 0, None);
        check(&ro, NBD_CMD_WRITE, 0, 0, 512, Some(perm));
        check(&ro, NBD_CMD_WRITE, 0, SIZE, 512, Some(perm));
        // 134: trim
        check(&rw, NBD_CMD_TRIM, 0, SIZE, 1, Some(inval));
        check(&ro, NBD_CMD_TRIM, 0, 0, 512, Some(perm));
        // 141, 142, 143: zeroes
        check(&rw, NBD_CMD_WRITE_ZEROES, 0x13, 0, SIZE as u32, None);
        check(&rw, NBD_CMD_WRITE_ZEROES, 0, 1, SIZE as u32, Some(nospc));
        check(&ro, NBD_CMD_WRITE_ZEROES, 0, 0, 512, Some(perm));
        check(&huge, NBD_CMD_WRITE_ZEROES, 0, 0, u32::MAX, None);
        let slow = View { flags: rw.flags - TransmissionFlags::NBD_FLAG_SEND_FAST_ZERO, ..rw };
        check(&slow, NBD_CMD_WRITE_ZEROES, 0x10, 0, 512, Some(inval));
        let none = View { flags: rw.flags - TransmissionFlags::NBD_FLAG_SEND_WRITE_ZEROES, ..rw };
        check(&none, NBD_CMD_WRITE_ZEROES, 0, 0, 512, Some(inval));
        // 145, 150: block status
        check(&ro, NBD_CMD_BLOCK_STATUS, 0, 0, 512, Some(inval));
        check(&rw, NBD_CMD_BLOCK_STATUS, 8, 0, 512, None);
        check(&rw, NBD_CMD_BLOCK_STATUS, 4, 0, 512, Some(inval));
        check(&rw, NBD_CMD_BLOCK_STATUS, 0, SIZE, 1, Some(inval));
        check(&rw, NBD_CMD_BLOCK_STATUS, 0, 0, 0, Some(inval));
        // 131, 133: DISC and FLUSH do not mind their reserved fields
        check(&rw, NBD_CMD_DISC, 0xffff, 5, 5, None);
        check(&rw, NBD_CMD_FLUSH, 0, 5, 5, None);
        check(&ro, NBD_CMD_FLUSH, 0, 0, 0, None);
        // 136: unknown flags of CACHE; 137, 161: RESIZE and the unknown
        check(&rw, NBD_CMD_CACHE, 8, 0, 512, Some(inval));
        check(&ro, NBD_CMD_CACHE, 0, 0, 512, Some(inval));
        check(&rw, NBD_CMD_RESIZE, 0, 0, 0, Some(inval));
        check(&rw, 0xffff, 0, 0, 0, Some(inval));
    }

    #[test]
    fn only_writes_have_a_payload_and_only_up_to_the_limit() {
        assert_eq!(payload_len(&header(NBD_CMD_READ, 0, 0, 512)), Some(0));
        assert_eq!(payload_len(&header(NBD_CMD_WRITE, 0x7777, u64::MAX, MAX_PAYLOAD)), Some(MAX_PAYLOAD));
        assert_eq!(payload_len(&header(NBD_CMD_WRITE, 0, 0, MAX_PAYLOAD + 1)), None);
        assert_eq!(payload_len(&header(77, 0, 0, u32::MAX)), Some(0));
    }

    #[test]
    fn a_bad_magic_is_seen_as_soon_as_it_can_be() {
        assert_eq!(next_header(b""), Ok(None));
        assert_eq!(next_header(&[0x25, 0x60]), Ok(None));
        assert!(next_header(b"G").is_err());
        assert!(next_header(&[0x25, 0x60, 0x95, 0x14]).is_err());
    }

    proptest! {
        #[test]
        fn what_passes_is_inside_the_export(
            cmd in 0u16..12, flags: u16, offset: u64, len: u32, size: u64, view_flags: u16, has_contexts: bool
        ) {
            let view = View { size, flags: TransmissionFlags::from_bits_retain(view_flags), has_contexts };
            // Three flavours of offset: anything, near the size, near zero.
            for offset in [offset, size.wrapping_sub(offset % 5000), offset % 5000] {
                match validate(&header(cmd, flags, offset, len), &view) {
                    Ok(Command::Read { offset, len, .. }) => {
                        prop_assert!(len <= MAX_PAYLOAD);
                        prop_assert!(offset.checked_add(len.into()).unwrap() <= size);
                    }
                    Ok(
                        Command::Write { offset, len, .. }
                        | Command::Trim { offset, len, .. }
                        | Command::WriteZeroes { offset, len, .. },
                    ) => {
                        prop_assert!(!view.flags.contains(TransmissionFlags::NBD_FLAG_READ_ONLY));
                        prop_assert!(offset.checked_add(len.into()).unwrap() <= size);
                    }
                    Ok(Command::Cache { offset, len } | Command::BlockStatus { offset, len, .. }) => {
                        prop_assert!(offset.checked_add(len.into()).unwrap() <= size);
                    }
                    Ok(Command::Disc | Command::Flush) => {}
                    Err(e) => prop_assert_ne!(e.errno, Errno::NBD_ENOTSUP),
                }
            }
        }
    }
}
