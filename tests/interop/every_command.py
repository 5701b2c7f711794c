# Every command and flag through libnbd, on an empty export of 8 MiB. argv: URI
import errno, nbd, sys

uri = sys.argv[1]
KIB, MIB = 1024, 1024 * 1024
SIZE = 8 * MIB


def refused(code, call, *args):
    try:
        call(*args)
    except nbd.Error as e:
        assert e.errnum == code, f"{call.__name__}{args[1:]}: {e.errno} instead of {errno.errorcode[code]}"
    else:
        raise AssertionError(f"{call.__name__}{args[1:]} was not refused with {errno.errorcode[code]}")


def connect(structured=True):
    h = nbd.NBD()
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.set_request_structured_replies(structured)
    h.set_full_info(True)
    # Let everything through, so that the server judges.
    h.set_strict_mode(0)
    # The URI may name a file with keys.
    h.set_uri_allow_local_file(True)
    h.connect_uri(uri)
    return h


for structured in (True, False):
    h = connect(structured)
    assert h.get_structured_replies_negotiated() == structured
    assert h.get_protocol() == "newstyle-fixed"
    assert h.get_size() == SIZE
    assert not h.is_read_only()
    assert h.can_flush() and h.can_fua() and h.can_trim() and h.can_zero() and h.can_fast_zero()
    assert h.can_cache() and h.can_multi_conn()
    assert h.can_df() == structured
    assert h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION) == structured
    assert h.get_block_size(nbd.SIZE_MINIMUM) == 1
    assert h.get_block_size(nbd.SIZE_PREFERRED) >= 512
    assert h.get_block_size(nbd.SIZE_MAXIMUM) >= 32 * MIB

    h.pwrite(b"a" * 4096, 0)
    h.pwrite(b"b" * 4096, 4096, nbd.CMD_FLAG_FUA)
    h.flush()
    assert h.pread(8192, 0) == b"a" * 4096 + b"b" * 4096

    # Unaligned, over the borders of blocks, to the last byte.
    h.pwrite(b"xyz", 4095)
    assert h.pread(5, 4094) == b"axyzb"
    h.pwrite(b"!", SIZE - 1)
    assert h.pread(3, SIZE - 3) == b"\0\0!"

    for flags in (0, nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA):
        h.pwrite(b"c" * 12288, 65536)
        h.zero(4096 + 100, 65536 + 4000, flags)
        expected = b"c" * 4000 + b"\0" * 4196 + b"c" * (12288 - 8196)
        assert h.pread(12288, 65536) == expected, flags
    # Fast or not at all, and if it says it did, it did.
    h.pwrite(b"d" * 8192, 131072)
    try:
        h.zero(8192, 131072, nbd.CMD_FLAG_FAST_ZERO)
    except nbd.Error as e:
        assert e.errnum == errno.ENOTSUP, e
        assert h.pread(8192, 131072) == b"d" * 8192
    else:
        assert h.pread(8192, 131072) == b"\0" * 8192
    # The whole disk in one request, more than a payload may have.
    h.zero(SIZE, 0)
    assert h.pread(SIZE, 0) == bytes(SIZE)

    for flags in (0, nbd.CMD_FLAG_FUA):
        h.pwrite(b"e" * 16384, 262144)
        h.trim(8192, 262144 + 4096, flags)
        assert h.pread(16384, 262144) == b"e" * 4096 + b"\0" * 8192 + b"e" * 4096
    h.cache(SIZE, 0)
    h.cache(1, SIZE - 1)
    h.zero(SIZE, 0)

    # What the server must refuse, and how; afterwards the connection is as good as before.
    refused(errno.EINVAL, h.pread, 1, SIZE)
    refused(errno.EINVAL, h.pread, 2, SIZE - 1)
    refused(errno.EINVAL, h.pread, 4096, 2**63)
    refused(errno.EINVAL, h.pread, 4096, 2**64 - 4096)
    refused(errno.ENOSPC, h.pwrite, b"12", SIZE - 1)
    refused(errno.ENOSPC, h.pwrite, b"1", SIZE)
    refused(errno.ENOSPC, h.pwrite, b"1" * 512, 2**64 - 512)
    refused(errno.ENOSPC, h.zero, 2, SIZE - 1)
    refused(errno.EINVAL, h.trim, 2, SIZE - 1)
    refused(errno.EINVAL, h.cache, 2, SIZE - 1)
    # Flags that do not belong to the command, and flags that do not exist.
    refused(errno.EINVAL, h.pread, 1, 0, nbd.CMD_FLAG_NO_HOLE)
    refused(errno.EINVAL, h.pwrite, b"1", 0, nbd.CMD_FLAG_REQ_ONE)
    refused(errno.EINVAL, h.trim, 1, 0, nbd.CMD_FLAG_FAST_ZERO)
    refused(errno.EINVAL, h.flush, 1 << 9)
    refused(errno.EINVAL, h.pwrite, b"1", 0, 1 << 12)
    assert h.pread(SIZE, 0) == bytes(SIZE)

    if structured:
        h.pwrite(b"f" * 65536, MIB)
        chunks = []

        def on_chunk(data, offset, status, error):
            chunks.append((offset, len(data), status))
            assert error.value == 0

        # Data between holes: the chunks cover it without a gap, and holes are sent as holes.
        h.pread_structured(2 * MIB, MIB // 2, on_chunk)
        chunks.sort()
        at = MIB // 2
        for offset, length, status in chunks:
            assert offset == at, chunks
            at += length
        assert any(status == nbd.READ_HOLE for _, _, status in chunks), chunks
        assert any(status == nbd.READ_DATA for _, _, status in chunks), chunks

        # DF: one piece, or EOVERFLOW above 64 KiB.
        for length in (65536, 4096, 1):
            chunks.clear()
            h.pread_structured(length, MIB - length // 2, on_chunk, nbd.CMD_FLAG_DF)
            assert len(chunks) == 1, chunks
        chunks.clear()
        try:
            h.pread_structured(MIB, MIB // 2, on_chunk, nbd.CMD_FLAG_DF)
            assert len(chunks) == 1, chunks
        except nbd.Error as e:
            assert e.errnum == errno.EOVERFLOW, e

        extents = []

        def on_extent(context, offset, entries, error):
            assert context == "base:allocation"
            extents.append((offset, list(zip(entries[::2], entries[1::2]))))

        HOLE = nbd.STATE_HOLE | nbd.STATE_ZERO
        h.block_status(SIZE, 0, on_extent)
        ((offset, entries),) = extents
        assert offset == 0
        assert entries[:3] == [(MIB, HOLE), (65536, 0), (SIZE - MIB - 65536, HOLE)], entries
        extents.clear()
        h.block_status(SIZE - MIB, MIB, on_extent, nbd.CMD_FLAG_REQ_ONE)
        assert extents == [(MIB, [(65536, 0)])], extents
        refused(errno.EINVAL, h.block_status, SIZE + 1, 0, on_extent)
        extents.clear()
        h.block_status(100, MIB + 1, on_extent, nbd.CMD_FLAG_REQ_ONE)
        assert extents == [(MIB + 1, [(100, 0)])], extents
        h.zero(SIZE, 0)
    else:
        refused(errno.EINVAL, h.block_status, 4096, 0, lambda *a: 0)
        refused(errno.EINVAL, h.pread, 4096, 0, nbd.CMD_FLAG_DF)

    h.shutdown()

# Many requests in flight, answered in any order.
h = connect()
pieces = [(i, bytes([i % 255 + 1]) * 4096) for i in range(512)]
cookies = [h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), i * 4096) for i, data in pieces]
while cookies:
    h.poll(-1)
    cookies = [c for c in cookies if not h.aio_command_completed(c)]
buffers = [(i, data, nbd.Buffer(4096)) for i, data in pieces]
cookies = [h.aio_pread(buffer, i * 4096) for i, _, buffer in buffers]
while cookies:
    h.poll(-1)
    cookies = [c for c in cookies if not h.aio_command_completed(c)]
assert all(bytes(buffer.to_bytearray()) == data for _, data, buffer in buffers)

# The first write of a connection is seen by another at once.
other = connect()
h.pwrite(b"seen" * 128, 7777)
assert other.pread(512, 7777) == b"seen" * 128
other.shutdown()
h.shutdown()
print("ok")
