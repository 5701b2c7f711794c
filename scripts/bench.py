#!/usr/bin/env python3
"""`make bench`: conbd beside qemu-nbd and nbdkit, driven by fio's nbd engine over unix sockets, interleaved.

Prints the median of each server's rounds and the median of the in-round ratios to conbd. Servers that are not
installed are named and left out. BENCH_SECONDS and BENCH_ROUNDS change the length (default 2 and 3).
"""
import json, os, shutil, statistics, subprocess, sys, tempfile, time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SECONDS, ROUNDS = os.environ.get("BENCH_SECONDS", "2"), int(os.environ.get("BENCH_ROUNDS", "3"))
WORK = [("4k random read, depth 1", "randread", "4k", 1), ("4k random read, depth 16", "randread", "4k", 16),
        ("4k random write, depth 16", "randwrite", "4k", 16), ("128k read, depth 4", "read", "128k", 4)]
SERVERS = {
    "conbd": [ROOT + "/target/release/conbd", "serve", "IMAGE", "--socket", "SOCKET", "--lock", "off", "--log-level", "warn"],
    "qemu-nbd": ["qemu-nbd", "-t", "-f", "raw", "-e", "16", "--aio=io_uring", "-k", "SOCKET", "IMAGE"],
    "nbdkit": ["nbdkit", "-f", "-U", "SOCKET", "file", "IMAGE"],
}


def rate(socket, rw, bs, depth):
    """Operations per second of one fio run."""
    out = subprocess.run(["fio", "--name=b", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={socket}", f"--rw={rw}", f"--bs={bs}",
                          f"--iodepth={depth}", "--size=256M", "--time_based", f"--runtime={SECONDS}", "--output-format=json"],
                         check=True, capture_output=True, text=True, cwd=os.path.dirname(socket)).stdout
    job = json.loads(out[out.index("{"):])["jobs"][0]
    return job["read"]["iops"] + job["write"]["iops"]


def main():
    if not shutil.which("fio"):
        sys.exit("bench: fio is not installed; run: make test-deps")
    there = {name: cmd for name, cmd in SERVERS.items() if shutil.which(cmd[0])}
    for name in SERVERS.keys() - there.keys():
        print(f"not measured, not installed: {name}")
    if "conbd" not in there:
        sys.exit("bench: target/release/conbd is not there; run: make build")
    with tempfile.TemporaryDirectory() as d:
        running = []
        try:
            for name, cmd in there.items():
                image, socket = f"{d}/{name}.img", f"{d}/{name}.sock"
                with open(image, "wb") as f:
                    for _ in range(256):
                        f.write(os.urandom(1 << 20))
                argv = [a.replace("IMAGE", image).replace("SOCKET", socket) for a in cmd]
                running.append(subprocess.Popen(argv, stdout=subprocess.DEVNULL))
                for _ in range(100):
                    if os.path.exists(socket):
                        break
                    time.sleep(0.1)
            names = list(there)
            for title, rw, bs, depth in WORK:
                rates = {n: [] for n in names}
                for r in range(ROUNDS):
                    for n in names[r % len(names):] + names[:r % len(names)]:
                        rates[n].append(rate(f"{d}/{n}.sock", rw, bs, depth))
                print(title)
                for n in names:
                    ratio = statistics.median(a / b for a, b in zip(rates[n], rates["conbd"]))
                    print(f"  {n:10} {statistics.median(rates[n]):10.0f} op/s   {ratio:5.2f} of conbd")
        finally:
            for p in running:
                p.terminate()
                p.wait()


main()
