# Requests of the largest size that libnbd can make (64 MiB), and some around 32 MiB. argv: URI of 160 MiB
import nbd, sys

MIB = 1024 * 1024
h = nbd.NBD()
h.set_strict_mode(0)
# The URI may name a file with keys.
h.set_uri_allow_local_file(True)
h.connect_uri(sys.argv[1])
for length in (32 * MIB - 1, 32 * MIB, 32 * MIB + 1, 50_000_000, 64 * MIB):
    data = bytes([length % 251]) * (length - 7) + b"the end"
    h.pwrite(data, 12345)
    assert h.pread(length, 12345) == data, length
h.shutdown()
print("ok")
