//! Validation of requests: the one place that decides whether a request is allowed.
//!
//! Pure: a decoded header and what the connection has negotiated go in, a [`Command`] or the error for the reply
//! comes out. What passes here is inside the export and has only flags that mean something; below this, a violation
//! is a bug and an assert.
//!
//! Order of the checks: command, flags, permission, range. A payload is consumed whatever the verdict
//! ([`payload_len`]).

use super::proto::*;
use super::wire::{ProtocolError, RequestHeader, StatusFilter};
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
    /// Whether headers are extended.
    pub extended: bool,
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
        len: u64,
        /// Make the result durable.
        fua: bool,
    },
    /// Prefetch.
    Cache {
        /// Byte offset.
        offset: u64,
        /// Bytes, perhaps 0.
        len: u64,
    },
    /// Zero.
    WriteZeroes {
        /// Byte offset.
        offset: u64,
        /// Bytes, perhaps 0.
        len: u64,
        /// FUA, MAY_UNMAP, NO_FALLBACK.
        flags: WriteFlags,
    },
    /// Extents of every selected context.
    BlockStatus {
        /// Byte offset.
        offset: u64,
        /// Bytes, at least 1.
        len: u64,
        /// One extent per context.
        req_one: bool,
    },
    /// Extents of some selected contexts: the payload says how far to look and which ([`filtered`] judges it).
    FilteredBlockStatus {
        /// Byte offset; not checked yet.
        offset: u64,
        /// Bytes of payload.
        payload: u32,
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
pub fn payload_len(header: &RequestHeader, extended: bool) -> Option<u32> {
    // Compact headers know by the command, extended ones by the flag; the end of the session has none either way.
    // QEMU's client (measured up to 10.0.2) does not set the flag on a write, and sends the payload: a write has one always.
    let flagged = extended && header.flags.contains(CmdFlags::NBD_CMD_FLAG_PAYLOAD_LEN);
    let has_payload = header.cmd == NBD_CMD_WRITE || flagged && header.cmd != NBD_CMD_DISC;
    if !has_payload {
        return Some(0);
    }
    u32::try_from(header.len).ok().filter(|len| *len <= MAX_PAYLOAD)
}

/// Decodes the next request header of a receive buffer, if it is there completely.
///
/// # Errors
/// `BadRequestMagic`: the stream is lost.
pub fn next_header(buffered: &[u8], extended: bool) -> Result<Option<RequestHeader>, ProtocolError> {
    let header = match extended {
        false => buffered.first_chunk::<{ RequestHeader::LEN }>().map(RequestHeader::decode),
        true => buffered.first_chunk::<{ RequestHeader::EXTENDED_LEN }>().map(RequestHeader::decode_extended),
    };
    if let Some(header) = header {
        return header.map(Some);
    }
    // Part of a header is enough to see that it is none: don't wait for more of it.
    let magic = if extended { NBD_EXTENDED_REQUEST_MAGIC } else { NBD_REQUEST_MAGIC }.to_be_bytes();
    let n = buffered.len().min(magic.len());
    if buffered[..n] == magic[..n] {
        return Ok(None);
    }
    let mut seen = [0; 4];
    seen[..n].copy_from_slice(&buffered[..n]);
    Err(ProtocolError::BadRequestMagic(u32::from_be_bytes(seen)))
}

/// Bytes on the wire of a request's header.
#[must_use]
pub fn header_len(extended: bool) -> usize {
    if extended { RequestHeader::EXTENDED_LEN } else { RequestHeader::LEN }
}

/// Flags that a command takes on a connection with these transmission flags.
///
/// Source: proto.md, "Command flags": FUA goes with every command once it is advertised.
fn allowed_flags(cmd: u16, flags: TransmissionFlags, extended: bool) -> CmdFlags {
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
        NBD_CMD_WRITE => allowed.set(CmdFlags::NBD_CMD_FLAG_PAYLOAD_LEN, extended),
        NBD_CMD_BLOCK_STATUS => {
            allowed |= CmdFlags::NBD_CMD_FLAG_REQ_ONE;
            let filter = extended && flags.contains(TransmissionFlags::NBD_FLAG_BLOCK_STATUS_PAYLOAD);
            allowed.set(CmdFlags::NBD_CMD_FLAG_PAYLOAD_LEN, filter);
        }
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
    if !allowed_flags(h.cmd, view.flags, view.extended).contains(h.flags) {
        return Err(refuse(Errno::NBD_EINVAL, "command flag is unknown or does not go with this command"));
    }
    let has_payload = h.flags.contains(CmdFlags::NBD_CMD_FLAG_PAYLOAD_LEN);
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
    let req_one = h.flags.contains(CmdFlags::NBD_CMD_FLAG_REQ_ONE);
    if h.cmd == NBD_CMD_BLOCK_STATUS && has_payload {
        let payload = payload_len(h, true).expect("the caller ends the connection of a longer one");
        return Ok(Command::FilteredBlockStatus { offset, payload, req_one });
    }
    let inside = offset.checked_add(len).is_some_and(|end| end <= view.size);
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
        NBD_CMD_READ => match u32::try_from(len) {
            Ok(len) if len <= MAX_PAYLOAD => {
                Ok(Command::Read { offset, len, df: h.flags.contains(CmdFlags::NBD_CMD_FLAG_DF) })
            }
            _ => Err(refuse(Errno::NBD_EINVAL, "read is larger than 64 MiB")),
        },
        NBD_CMD_WRITE => {
            let len = payload_len(h, view.extended).expect("the caller ends the connection of a longer one");
            Ok(Command::Write { offset, len, flags: write_flags })
        }
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
        _ => Ok(Command::BlockStatus { offset, len, req_one }),
    }
}

/// Longest payload of a filtered block status request that can be right, for a client with so many contexts. A longer one
/// names a context twice, or an unknown one: it need not be kept.
#[must_use]
pub fn filter_max(contexts: usize) -> usize {
    StatusFilter::len_for(contexts)
}

/// Decides whether a filtered block status request may be carried out; `knows` tells which ids are selected.
///
/// # Errors
/// The errno and text of the reply.
pub fn filtered(
    offset: u64,
    payload: &[u8],
    size: u64,
    knows: impl Fn(u32) -> bool,
) -> Result<StatusFilter, RequestError> {
    let Ok(filter) = StatusFilter::decode(payload) else {
        return Err(refuse(Errno::NBD_EINVAL, "the payload is no effect length and list of contexts"));
    };
    if filter.ids.is_empty() {
        return Err(refuse(Errno::NBD_EINVAL, "the payload names no metadata context"));
    }
    for (i, id) in filter.ids.iter().enumerate() {
        if !knows(*id) || filter.ids[..i].contains(id) {
            return Err(refuse(Errno::NBD_EINVAL, "the payload names an unknown context, or one twice"));
        }
    }
    if filter.effect_len == 0 {
        return Err(refuse(Errno::NBD_EINVAL, "block status of nothing"));
    }
    if offset.checked_add(filter.effect_len).is_none_or(|end| end > size) {
        return Err(refuse(Errno::NBD_EINVAL, "request goes past the end of the export"));
    }
    Ok(filter)
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

    fn header(cmd: u16, flags: u16, offset: u64, len: impl Into<u64>) -> RequestHeader {
        RequestHeader { flags: CmdFlags::from_bits_retain(flags), cmd, cookie: 0, offset, len: len.into() }
    }

    #[test]
    fn verdicts_follow_the_checklist() {
        let rw = View { size: SIZE, flags: writable(), has_contexts: true, extended: false };
        let ro = View {
            flags: TransmissionFlags::NBD_FLAG_HAS_FLAGS
                | TransmissionFlags::NBD_FLAG_READ_ONLY
                | TransmissionFlags::NBD_FLAG_SEND_FUA
                | TransmissionFlags::NBD_FLAG_SEND_FLUSH,
            has_contexts: false,
            size: SIZE,
            extended: false,
        };
        let (perm, inval, nospc) = (Errno::NBD_EPERM, Errno::NBD_EINVAL, Errno::NBD_ENOSPC);
        let check = |view: &View, cmd, flags, offset, len: u32, want: Option<Errno>| {
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
        // 128, 156, 158: extended headers
        let ext = View { extended: true, ..rw };
        check(&ext, NBD_CMD_WRITE, 0, 0, 512, None);
        check(&ext, NBD_CMD_WRITE, 0x20, 0, 512, None);
        check(&ext, NBD_CMD_WRITE, 0x20, SIZE, 512, Some(nospc));
        for cmd in [NBD_CMD_READ, NBD_CMD_FLUSH, NBD_CMD_TRIM, NBD_CMD_CACHE, NBD_CMD_WRITE_ZEROES] {
            check(&ext, cmd, 0x20, 0, 512, Some(inval));
        }
        // 154: the filter only where it was offered
        check(&ext, NBD_CMD_BLOCK_STATUS, 0x20, 0, 12, Some(inval));
        let filter = View { flags: ext.flags | TransmissionFlags::NBD_FLAG_BLOCK_STATUS_PAYLOAD, ..ext };
        check(&filter, NBD_CMD_BLOCK_STATUS, 0x20, 0, 12, None);
        let long = View { size: 1 << 45, ..ext };
        let wide = |cmd, len: u64| validate(&header(cmd, 0, 0, len), &long).err().map(|e| e.errno);
        for cmd in [NBD_CMD_TRIM, NBD_CMD_CACHE, NBD_CMD_WRITE_ZEROES, NBD_CMD_BLOCK_STATUS] {
            assert_eq!(wide(cmd, 1 << 45), None);
            let want = if cmd == NBD_CMD_WRITE_ZEROES { nospc } else { inval };
            assert_eq!(wide(cmd, (1 << 45) + 1), Some(want));
            assert_eq!(wide(cmd, u64::MAX), Some(want));
        }
        assert_eq!(wide(NBD_CMD_READ, 1 << 32), Some(inval), "not the lower 32 bits of it");
    }

    #[test]
    fn filters_name_selected_contexts_once_154() {
        let check = |effect_len: u64, ids: &[u32], ok: bool| {
            let payload = StatusFilter { effect_len, ids: ids.to_vec() }.encode();
            let got = filtered(512, &payload, SIZE, |id| id == 1 || id == 7);
            assert_eq!(got.is_ok(), ok, "{effect_len} {ids:?}");
            assert!(payload.len() <= filter_max(2) || !ok);
        };
        check(512, &[1], true);
        check(SIZE - 512, &[7, 1], true);
        check(SIZE - 511, &[7, 1], false);
        check(u64::MAX, &[1], false);
        check(0, &[1], false);
        check(512, &[], false);
        check(512, &[2], false);
        check(512, &[1, 1], false);
        check(512, &[1, 7, 1], false);
        for len in [0, 1, 7, 9, 11, 13] {
            assert!(filtered(0, &[0; 16][..len], SIZE, |_| true).is_err());
        }
    }

    #[test]
    fn only_writes_have_a_payload_and_only_up_to_the_limit() {
        assert_eq!(payload_len(&header(NBD_CMD_READ, 0, 0, 512u32), false), Some(0));
        assert_eq!(
            payload_len(&header(NBD_CMD_WRITE, 0x7777, u64::MAX, MAX_PAYLOAD), false),
            Some(MAX_PAYLOAD)
        );
        assert_eq!(payload_len(&header(NBD_CMD_WRITE, 0, 0, MAX_PAYLOAD + 1), false), None);
        assert_eq!(payload_len(&header(77, 0, 0, u32::MAX), false), Some(0));
        // Extended: what the flag says, 128, 156, 157.
        for cmd in [NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_FLUSH, 77] {
            let without = if cmd == NBD_CMD_WRITE { None } else { Some(0) };
            assert_eq!(payload_len(&header(cmd, 0, 0, u64::MAX), true), without);
            assert_eq!(payload_len(&header(cmd, 0x20, 0, MAX_PAYLOAD), true), Some(MAX_PAYLOAD));
            assert_eq!(payload_len(&header(cmd, 0x20, 0, MAX_PAYLOAD + 1), true), None);
            assert_eq!(payload_len(&header(cmd, 0x20, 0, 1u64 << 32), true), None);
        }
        assert_eq!(payload_len(&header(NBD_CMD_DISC, 0x20, 0, u64::MAX), true), Some(0));
    }

    #[test]
    fn a_bad_magic_is_seen_as_soon_as_it_can_be() {
        for extended in [false, true] {
            assert_eq!(next_header(b"", extended), Ok(None));
            assert_eq!(next_header(&[0x25, 0x60], extended).is_ok(), !extended);
            assert_eq!(next_header(&[0x21, 0xe4], extended).is_ok(), extended);
            assert!(next_header(b"G", extended).is_err());
            assert!(next_header(&[0x25, 0x60, 0x95, 0x14], extended).is_err());
        }
    }

    proptest! {
        #[test]
        fn what_passes_is_inside_the_export(
            cmd in 0u16..12, flags: u16, offset: u64, len: u64, size: u64, view_flags: u16, has_contexts: bool,
            extended: bool
        ) {
            let view = View { size, flags: TransmissionFlags::from_bits_retain(view_flags), has_contexts, extended };
            let len = if extended { len >> (len % 64) } else { len & 0xffff_ffff };
            // Three flavours of offset: anything, near the size, near zero.
            for offset in [offset, size.wrapping_sub(offset % 5000), offset % 5000] {
                let h = header(cmd, flags, offset, len);
                if payload_len(&h, extended).is_none() {
                    continue;
                }
                match validate(&h, &view) {
                    Ok(Command::Read { offset, len, .. }) => {
                        prop_assert!(len <= MAX_PAYLOAD);
                        prop_assert!(offset.checked_add(len.into()).unwrap() <= size);
                    }
                    Ok(Command::Write { offset, len, .. }) => {
                        prop_assert!(!view.flags.contains(TransmissionFlags::NBD_FLAG_READ_ONLY));
                        prop_assert!(offset.checked_add(len.into()).unwrap() <= size);
                        prop_assert!(len <= MAX_PAYLOAD);
                    }
                    Ok(Command::Trim { offset, len, .. } | Command::WriteZeroes { offset, len, .. }) => {
                        prop_assert!(!view.flags.contains(TransmissionFlags::NBD_FLAG_READ_ONLY));
                        prop_assert!(offset.checked_add(len).unwrap() <= size);
                    }
                    Ok(Command::Cache { offset, len } | Command::BlockStatus { offset, len, .. }) => {
                        prop_assert!(offset.checked_add(len).unwrap() <= size);
                    }
                    Ok(Command::FilteredBlockStatus { .. }) => prop_assert!(extended && has_contexts),
                    Ok(Command::Disc | Command::Flush) => {}
                    Err(e) => prop_assert_ne!(e.errno, Errno::NBD_ENOTSUP),
                }
            }
        }
    }
}
