# Keeps a connection busy until it is killed. argv: URI, how ("write": pipelined writes, "read": reads never taken)
import nbd, sys

h = nbd.NBD()
h.connect_uri(sys.argv[1])
buffer = nbd.Buffer.from_bytearray(bytearray(b"k" * 262144))
print("ready", flush=True)
n = 0
while True:
    if sys.argv[2] == "write":
        h.aio_pwrite(buffer, n * 262144 % (16 << 20))
    else:
        h.aio_pread(nbd.Buffer(262144), n * 262144 % (16 << 20))
    n += 1
    if n % 4 == 0:
        h.poll(0)
    if h.aio_in_flight() > 256:
        h.poll(-1)
