# Writes numbered blocks until the server goes, and prints each number whose block was flushed. argv: URI
import nbd, sys

h = nbd.NBD()
h.connect_uri(sys.argv[1])
n = 0
try:
    while n < 4096:
        first = n
        for _ in range(4):
            h.pwrite(n.to_bytes(8, "big") * 512, n * 4096)
            n += 1
        h.flush()
        print("".join(f"{i}\n" for i in range(first, n)), end="", flush=True)
except nbd.Error as e:
    print("stopped", e.errno or "disconnected", flush=True)
