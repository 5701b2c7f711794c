#!/usr/bin/env python3
"""`make bench`: conbd beside the other NBD servers that are installed, on this machine, in one interleaved run.

All servers of a group are up at the same time and serve the same bytes; each round visits every row and every server once, the
order rotated, so that what else the machine does hits all alike. A row shows medians over the rounds; a ratio is the median of
the ratios *within* each round, and the best peer of a row is the one with the highest median. CPU is the server's user+system time per
operation (per GiB for copies), of its whole process tree, from /proc and the process's CPU clock.

The load client is `conbd bench`, the copies are nbdcopy and qemu-img. Results go to docs/bench.json, docs/bench.svg and between
the markers of docs/performance.md; a quick or partial run prints its tables and writes target/bench/ only.

Environment: QUICK=1 (two minutes), BENCH_GROUPS=raw,copy,... (only these), BENCH_ROWS=r1m,direct-rr-q1,... (only these rows of them), ROUNDS,
SECONDS_PER_RUN, BENCH_DIR (where the images are made).
"""
import json, os, re, shlex, shutil, signal, socket, statistics, struct, subprocess, sys, tempfile, time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONBD = os.environ.get("CONBD", ROOT + "/target/release/conbd")
QUICK = os.environ.get("QUICK", "") not in ("", "0")
ROUNDS = int(os.environ.get("ROUNDS", "2" if QUICK else "3"))
ROWS = [key for key in os.environ.get("BENCH_ROWS", "").split(",") if key]
SECONDS = float(os.environ.get("SECONDS_PER_RUN", "0.4" if QUICK else "0.8"))
MIB, GIB = 1 << 20, 1 << 30
IMAGE = (256 if QUICK else 1024) * MIB
REGION = 128 * MIB  # what writes use of it
US = "us/op"


# ------------------------------------------------------------------------------------------------------------ servers

def qemu_options(image, fmt, aio, direct):
    cache = "on" if direct else "off"
    return (f"driver={fmt},cache.direct={cache},file.driver=file,file.filename={image},file.locking=off,"
            f"file.aio={aio},file.cache.direct={cache}")


def conbd(*more):
    def command(s):
        where = ["--listen", f"127.0.0.1:{s.port}"] if s.tcp else ["--socket", s.socket]
        direct = ["--cache", "none"] if s.direct else []
        return [CONBD, "serve", s.image, *where, *direct, "--lock", "off", "--log-level", "warn", *more]
    return command


def qemu_nbd(aio):
    def command(s):
        where = ["-b", "127.0.0.1", "-p", str(s.port)] if s.tcp else ["-k", s.socket]
        return ["qemu-nbd", "-t", "-e", "4096", *where, "--image-opts", qemu_options(s.image, s.fmt, aio, s.direct)]
    return command


def qsd(aio):
    def command(s):
        cache = "cache.direct=" + ("on" if s.direct else "off")
        where = (f"addr.type=inet,addr.host=127.0.0.1,addr.port={s.port}" if s.tcp
                 else f"addr.type=unix,addr.path={s.socket}")
        return ["qemu-storage-daemon", "--object", "iothread,id=io",
                "--blockdev", f"driver=file,node-name=file,filename={s.image},locking=off,aio={aio},{cache}",
                "--blockdev", f"driver={s.fmt},node-name=disk,file=file,{cache}",
                "--nbd-server", where + ",max-connections=0",
                "--export", "type=nbd,id=export,node-name=disk,name=,writable=on,iothread=io"]
    return command


def nbdkit(s):
    where = ["-i", "127.0.0.1", "-p", str(s.port)] if s.tcp else ["-U", s.socket]
    return ["nbdkit", "-f", *where, "-t", "16", "file", s.image]


def nbd_server(s):
    where = f"listenaddr = 127.0.0.1\nport = {s.port}\n" if s.tcp else f"unixsock = {s.socket}\nlistenaddr = 127.0.0.1\nport = {s.port}\n"
    with open(s.socket + ".conf", "w") as f:
        f.write(f"[generic]\n{where}max_threads = 16\nallowlist = true\n[disk]\nexportname = {s.image}\nflush = true\nfua = true\n")
    # It can stay in the foreground, but then it serves one client at a time.
    return ["nbd-server", "-C", s.socket + ".conf", "-p", s.socket + ".pid"]


SERVERS = {
    "conbd": conbd(),
    "qemu-nbd io_uring": qemu_nbd("io_uring"), "qemu-nbd threads": qemu_nbd("threads"), "qemu-nbd native": qemu_nbd("native"),
    "qsd io_uring": qsd("io_uring"), "qsd threads": qsd("threads"), "qsd native": qsd("native"),
    "nbdkit": nbdkit, "nbd-server": nbd_server,
}
PROGRAM = {"qemu-nbd": "qemu-nbd", "qsd": "qemu-storage-daemon", "nbdkit": "nbdkit", "nbd-server": "nbd-server"}
CACHED = ["conbd", "qemu-nbd io_uring", "qemu-nbd threads", "qsd io_uring", "qsd threads", "nbdkit", "nbd-server"]
CACHED_QUICK = ["conbd", "qemu-nbd io_uring", "qsd io_uring", "nbdkit"]
DIRECT = ["conbd", "qemu-nbd native", "qemu-nbd io_uring", "qemu-nbd threads", "qsd native", "qsd io_uring"]
QEMU = ["conbd", "qemu-nbd io_uring", "qsd io_uring"]


def installed(names):
    return [n for n in names if n.startswith("conbd") or shutil.which(PROGRAM[n.split()[0]])]


class Server:
    """A running server; `uri` is where."""
    count = 0

    def __init__(self, folder, name, image, fmt="raw", tcp=False, direct=False, command=None, uri=None):
        Server.count += 1
        self.name, self.image, self.fmt, self.tcp, self.direct = name, image, fmt, tcp, direct
        self.socket = f"{folder}/{Server.count}.sock"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        export = "disk" if name.startswith("nbd-server") else ""
        self.uri = f"nbd://127.0.0.1:{self.port}/{export}" if tcp else f"nbd+unix:///{export}?socket={self.socket}"
        if uri:
            self.uri = uri(self)
        argv = (command or SERVERS[name])(self)
        self.log = open(f"{folder}/{Server.count}.log", "w+")
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        self.pid = self.process.pid
        end = time.time() + 10
        if name == "nbd-server":  # it forks away
            while not os.path.exists(self.socket + ".pid") and time.time() < end:
                time.sleep(0.02)
            time.sleep(0.1)
            with open(self.socket + ".pid") as f:
                self.pid = int(f.read())
        while True:
            try:
                probe = socket.socket(socket.AF_INET if tcp else socket.AF_UNIX)
                probe.connect(("127.0.0.1", self.port) if tcp else self.socket)
                probe.close()
                return
            except OSError:
                if not self.alive() or time.time() > end:
                    self.stop()
                    self.log.seek(0)
                    raise RuntimeError(f"{shlex.join(argv)}: did not start: {self.log.read()[-400:]}") from None
                time.sleep(0.02)

    def alive(self):
        if self.pid != self.process.pid:
            return os.path.exists(f"/proc/{self.pid}")
        return self.process.poll() is None

    def stop(self):
        for number in (signal.SIGTERM, signal.SIGKILL):
            for attempt in range(500):
                if not self.alive():
                    self.process.wait()
                    return
                if attempt == 0:
                    os.kill(self.pid, number)
                time.sleep(0.02)

    def tree(self, pid=None):
        pid = pid or self.pid
        yield pid
        for task in os.listdir(f"/proc/{pid}/task"):
            try:
                with open(f"/proc/{pid}/task/{task}/children") as f:
                    for child in f.read().split():
                        yield from self.tree(int(child))
            except OSError:
                pass

    def cpu(self):
        """CPU seconds so far: the precise clock of the process itself, and the ticks of its children, alive or gone."""
        tick = os.sysconf("SC_CLK_TCK")
        total = time.clock_gettime(~self.pid << 3 | 2)
        for pid in self.tree():
            with open(f"/proc/{pid}/stat") as f:
                fields = f.read().rsplit(")", 1)[1].split()
            # utime, stime, cutime, cstime are fields 14 to 17 of proc_pid_stat(5).
            user, system, gone_user, gone_system = (int(x) for x in fields[11:15])
            total += (gone_user + gone_system + (0 if pid == self.pid else user + system)) / tick
        return total

    def resident(self):
        with open(f"/proc/{self.pid}/status") as f:
            return int(re.search(r"VmRSS:\s+(\d+)", f.read())[1]) * 1024


# ------------------------------------------------------------------------------------------------------------ clients

def run(argv, timeout=180):
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(argv)}: {done.stderr.strip()[-300:] or done.stdout.strip()[-300:]}")
    return done.stdout


def load_command(uri, row, seconds):
    argv = [CONBD, "bench", uri, "--json", "--bs", str(row["bs"]), "--depth", str(row["depth"]), "--rw", row["rw"],
            "--connections", str(row.get("conns", 1)), "--pattern", row.get("pattern", "random"),
            "--time", f"{int(seconds * 1000)}ms", "--seed", str(os.getpid() + Server.count)]
    if row.get("threads"):
        argv += ["--threads", str(row["threads"])]
    if row.get("headers"):
        argv += ["--headers", row["headers"]]
    if row["rw"] != "read":
        argv += ["--destroy-data", "--region", str(row.get("region", REGION))]
    elif row.get("region"):
        argv += ["--region", str(row["region"])]
    return argv


def load(server, row, seconds=None):
    """Runs the load client. Returns a measurement: rate, CPU per operation, latencies."""
    before = server.cpu()
    report = json.loads(run(load_command(server.uri, row, seconds or SECONDS)))
    after = server.cpu()
    if report["errors"]:
        raise RuntimeError(f"{server.name}: {report['error_messages']}")
    kinds = [report[k] for k in ("read", "write") if report[k]["requests"]]
    ops = sum(k["requests"] for k in kinds)
    rate = sum(k["requests_per_s"] for k in kinds)
    return {"value": rate if row["bs"] <= 4096 else rate * row["bs"] / MIB, "cpu": (after - before) * 1e6 / ops, "ops": ops,
            "p50": kinds[0]["latency_us"]["p50"], "p99": kinds[0]["latency_us"]["p99"]}


def copy(server, row):
    argv = [a.format(uri=server.uri, source=row["source"], size=IMAGE) for a in row["copy"]]
    before, begin = server.cpu(), time.time()
    run(argv)
    seconds = time.time() - begin
    time.sleep(0.03)
    return {"value": IMAGE / MIB / seconds, "cpu": (server.cpu() - before) / (IMAGE / GIB)}


def latency_under_load(server, row):
    """The 99th percentile of a lone client while another one streams. Smaller is better: the value is its inverse."""
    stream = dict(bs=MIB, depth=4, rw="read", pattern="sequential")
    other = subprocess.Popen(load_command(server.uri, stream, SECONDS + 0.6), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(0.3)
    try:
        m = load(server, row)
    finally:
        other.wait()
    return {**m, "value": 1e6 / m["p99"]}


MEASURE = {"load": load, "copy": copy, "latency": latency_under_load}


# --------------------------------------------------------------------------------------------------------------- rows

def row(key, title, rate=None, cpu=None, kind="load", unit="op/s", **more):
    """`rate` and `cpu` are what is aimed at, as ratios to the best peer (or to `against`)."""
    return dict(key=key, title=title, rate=rate, cpu=cpu, kind=kind, unit=unit, **more)


def small(key, title, depth, rw, rate, cpu, **more):
    return row(key, title, rate, cpu, bs=4096, depth=depth, rw=rw, **more)


def large(key, title, bs, rw, rate, cpu, **more):
    return row(key, title, rate, cpu, unit="MiB/s", bs=bs, depth=4, rw=rw, pattern="sequential", **more)


RAW = [
    small("rr-q1", "4k random read, depth 1", 1, "read", 1.5, 0.7, quick=1),
    small("rr-q16", "4k random read, depth 16", 16, "read", 1.5, 0.5, quick=1),
    small("rr-q64", "4k random read, depth 64", 64, "read", 2.2, 0.4, quick=1),
    small("rr-q16x4", "4k random read, depth 16, 4 connections", 16, "read", 1.5, 0.5, conns=4, threads=1),
    small("rr-q1x64", "4k random read, 64 connections", 1, "read", 1.5, 0.5, conns=64, threads=1, quick=1),
    small("rw-q1", "4k random write, depth 1", 1, "write", 1.5, 0.6),
    small("rw-q16", "4k random write, depth 16", 16, "write", 1.3, 0.6, quick=1),
    small("rw-q64", "4k random write, depth 64", 64, "write", 1.5, 0.6),
    small("mix-q16", "4k 70/30 mix, depth 16", 16, "70", 1.2, 0.7),
    small("sr-q16", "4k sequential read, depth 16", 16, "read", 1.8, 0.5, pattern="sequential"),
    small("sw-q16", "4k sequential write, depth 16", 16, "write", 1.3, 0.5, pattern="sequential"),
    # Clients of today ask for more than simple replies; a server that has less gives what it has.
    small("ext-rr-q16", "4k random read, depth 16, headers as QEMU asks", 16, "read", None, None, headers="extended"),
    small("ext-sr-q16", "4k sequential read, depth 16, headers as QEMU asks", 16, "read", None, None, pattern="sequential", headers="extended"),
    small("ext-sw-q16", "4k sequential write, depth 16, headers as QEMU asks", 16, "write", None, None, pattern="sequential", headers="extended"),
    small("str-sr-q16", "4k sequential read, depth 16, headers as libnbd 1.14 asks", 16, "read", None, None, pattern="sequential", headers="structured"),
    large("r128k", "128k read, depth 4", 128 << 10, "read", 1.1, 0.4),
    large("r1m", "1M read, depth 4", MIB, "read", 1.1, 0.4, quick=1),
    large("w128k", "128k write, depth 4", 128 << 10, "write", 1.05, None),
    large("w1m", "1M write, depth 4", MIB, "write", 1.05, None, quick=1),
    small("p99", "p99 at depth 1 beside a stream of 1M reads (1/s)", 1, "read", None, None, kind="latency", unit="1/s"),
]
TCP = [dict(r, key="tcp-" + r["key"], rate=None, cpu=None) for r in RAW
       if r["key"] in ("rr-q1", "rr-q16", "rr-q64", "rw-q16", "r128k", "r1m", "w1m")]
DIRECT_ROWS = [
    small("direct-rr-q1", "O_DIRECT 4k random read, depth 1", 1, "read", 1.0, 0.4),
    small("direct-rr-q16", "O_DIRECT 4k random read, depth 16", 16, "read", 1.0, 0.4, quick=1),
    small("direct-rr-q64", "O_DIRECT 4k random read, depth 64", 64, "read", 1.0, 0.4),
    small("direct-rw-q16", "O_DIRECT 4k random write, depth 16", 16, "write", 1.0, 0.4),
    large("direct-r1m", "O_DIRECT 1M read, depth 4", MIB, "read", 1.0, 0.4),
    large("direct-w1m", "O_DIRECT 1M write, depth 4", MIB, "write", 1.0, 0.4),
]


def copy_row(key, title, rate, argv, **more):
    return row(key, title, rate, None, kind="copy", unit="MiB/s", copy=argv, program=argv[0], **more)


COPY = [
    copy_row("nbdcopy-out", "nbdcopy out", 1.3, ["nbdcopy", "--requests=64", "--connections=4", "{uri}", "null:"], quick=1),
    copy_row("nbdcopy-in", "nbdcopy in", 1.15, ["nbdcopy", "--requests=64", "--connections=4", "{source}", "{uri}"], writes=1),
    copy_row("convert-out", "qemu-img convert out", 1.2, ["qemu-img", "convert", "-n", "-f", "raw", "-W", "-m", "16", "{uri}",
                                                           "--target-image-opts", "driver=null-co,size={size}"], quick=1),
    copy_row("convert-in", "qemu-img convert in", 1.1, ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "16",
                                                         "{source}", "{uri}"], writes=1),
]
# Against our own raw: what the format costs.
OURS = "conbd raw"
QCOW2_ROWS = [dict(r, key="qcow2-" + r["key"], title=r["title"] + ", qcow2", rate=0.95, cpu=1.1, against=OURS) for r in RAW
              if r["key"] in ("rr-q1", "rr-q16", "rr-q64", "rw-q16", "sr-q16", "r1m", "w1m")]
FRESH_ROWS = [
    small("alloc-rw-q16", "allocating 4k random write, depth 16, qcow2", 16, "write", 2.0, None, fresh=1, region=GIB),
    large("alloc-w1m", "allocating 1M sequential write, qcow2", MIB, "write", 0.95, None, fresh=1, against=OURS, region=GIB),
]
SPARSE_ROWS = [small("sparse-rr", "4k random read of a sparse 512 GiB qcow2", 16, "read", 3.0, None, against="qemu-nbd io_uring")]
CHAIN_ROWS = [small(f"chain-{n}", f"4k random read, depth 16, qcow2 chain of {n}", 16, "read", None, None) for n in (1, 4, 16)]
TLS_ROWS = [
    large("tls-r1m", "1M read in TLS, depth 4", MIB, "read", 1.2, None),
    large("tls-r1m-x4", "1M read in TLS, depth 4, 4 connections", MIB, "read", 1.2, None, conns=4),
]


# -------------------------------------------------------------------------------------------------------------- bench

class Bench:
    def __init__(self, folder):
        self.folder, self.results, self.notes, self.tables = folder, {}, [], {}

    def note(self, text):
        self.notes.append(text)
        print(f"# {text}", file=sys.stderr, flush=True)

    def image(self, name, size=IMAGE):
        """A raw image without zeroes, its pages cached by reading it once."""
        path = f"{self.folder}/{name}"
        piece = os.urandom(MIB)
        with open(path, "wb") as f:
            for at in range(0, size, MIB):
                f.write(struct.pack("<Q", at) + piece[8:])
            f.flush()
            os.fsync(f.fileno())
        return path

    def group(self, title, rows, starters, after=None):
        """Measures rows on servers, which `starters` (name to function) start, in interleaved rounds."""
        rows = [r for r in rows if r["key"] in ROWS or not ROWS and (not QUICK or r.get("quick"))]
        rows = [r for r in rows if "program" not in r or shutil.which(r["program"]) or self.note(f"{r['title']}: {r['program']} is not installed")]
        if not rows:
            return
        servers = {}
        try:
            for name, start in starters.items():
                try:
                    servers[name] = start()
                except Exception as e:
                    self.note(f"{title}: {name} left out: {e}")
            if len(servers) < 2 or not any(n.startswith("conbd") for n in servers):
                self.note(f"{title}: left out, nothing to compare")
                return
            for turn in range(ROUNDS):
                for number, r in enumerate(rows):
                    names = list(servers)
                    shift = (turn + number) % len(names)
                    for name in names[shift:] + names[:shift]:
                        try:
                            if r.get("fresh"):
                                servers[name].stop()
                                servers[name] = starters[name]()
                            m = MEASURE[r["kind"]](servers[name], r)
                        except Exception as e:
                            self.note(f"{r['title']}: {name}: {e}")
                            if not servers[name].alive():
                                servers[name] = starters[name]()
                            continue
                        self.results.setdefault(r["key"], {"row": r, "group": title, "runs": {}})["runs"] \
                            .setdefault(name, {})[turn] = m
                        if after and turn == 0:
                            after(r, name)
        finally:
            for s in servers.values():
                s.stop()
        for r in rows:
            if r["key"] in self.results:
                print_row(summary(self.results[r["key"]]))

    # -------------------------------------------------------------------------------------------------------- groups

    def raw(self, tcp=False):
        image = self.image("raw.img")
        names = installed(CACHED_QUICK if QUICK or tcp else CACHED)
        starters = {n: (lambda n=n: Server(self.folder, n, image, tcp=tcp)) for n in names}
        self.group("TCP, loopback" if tcp else "raw", TCP if tcp else RAW, starters)
        os.unlink(image)

    def direct(self):
        image = self.image("direct.img")
        starters = {n: (lambda n=n: Server(self.folder, n, image, direct=True)) for n in installed(DIRECT)}
        self.group("O_DIRECT", DIRECT_ROWS, starters)
        os.unlink(image)

    def copies(self):
        source, target = self.image("source.img"), self.image("target.img")
        starters = {n: (lambda n=n: Server(self.folder, n, target)) for n in installed(CACHED_QUICK if QUICK else CACHED)}

        def check(r, name):
            if r.get("writes"):
                if subprocess.run(["cmp", "-s", source, target]).returncode != 0:
                    sys.exit(f"bench: {r['title']}: {name} did not store what it was sent")
                with open(target, "r+b") as f:  # so that the next one has something to do
                    f.write(os.urandom(MIB))
        self.group("copies", [dict(r, source=source) for r in COPY], starters, check)
        os.unlink(source)
        os.unlink(target)

    def qcow2(self):
        raw = self.image("base.img")
        made = f"{self.folder}/probe.qcow2"
        if not shutil.which("qemu-img"):
            return self.note("qcow2: qemu-img is not installed")
        run(["qemu-img", "create", "-q", "-f", "qcow2", made, "64M"])
        if subprocess.run([CONBD, "serve", made, "--check"], capture_output=True).returncode != 0:
            return self.note("qcow2: this conbd does not serve it")

        def start(name, image, fmt="qcow2"):
            return Server(self.folder, name, image, fmt, command=conbd() if name.startswith("conbd") else None)

        def allocated(name):
            image = f"{self.folder}/{name.replace(' ', '-')}.qcow2"
            if not os.path.exists(image):
                run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", "preallocation=metadata", raw, image])
                with open(image, "rb") as f:
                    while f.read(MIB):
                        pass
            return start(name, image)
        names = installed(QEMU)
        starters = {n: (lambda n=n: allocated(n)) for n in names}
        starters[OURS] = lambda: start(OURS, raw, "raw")
        self.group("qcow2, allocated", QCOW2_ROWS, starters)

        def fresh(name):
            image = f"{self.folder}/fresh-{name.replace(' ', '-')}.img"
            if os.path.exists(image):
                os.unlink(image)
            if name == OURS:
                with open(image, "wb") as f:
                    f.truncate(IMAGE)
                return start(name, image, "raw")
            run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(IMAGE)])
            return start(name, image)
        starters = {n: (lambda n=n: fresh(n)) for n in [*names, OURS]}
        self.group("qcow2, allocating", FRESH_ROWS, starters)

        sparse = f"{self.folder}/sparse.qcow2"
        run(["qemu-img", "create", "-q", "-f", "qcow2", sparse, "512G"])
        # An L2 table every 512 MiB, so that reading at random has tables to look for.
        writes = [a for at in range(0, 512 * GIB, 512 * MIB) for a in ("-c", f"write -q {at} 64k")]
        run(["qemu-io", "-f", "qcow2", *writes, sparse])
        starters = {n: (lambda n=n: start(n, sparse)) for n in names}
        self.group("qcow2, sparse", SPARSE_ROWS, starters)

        for r in CHAIN_ROWS:
            length = int(r["key"].split("-")[1])
            base, fmt = raw, "raw"
            for i in range(length):
                top = f"{self.folder}/chain-{length}-{i}.qcow2"
                run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", fmt, top])
                base, fmt = top, "qcow2"
            starters = {n: (lambda n=n, top=top: start(n, top)) for n in names}
            self.group("qcow2, chains", [r], starters)
        for name in os.listdir(self.folder):
            if name.endswith((".qcow2", ".img")):
                os.unlink(f"{self.folder}/{name}")

    def tls(self):
        if not shutil.which("openssl"):
            return self.note("TLS: openssl is not installed")
        pki = f"{self.folder}/pki"
        os.makedirs(pki, exist_ok=True)
        run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj",
             "/CN=bench CA", "-keyout", f"{pki}/ca-key.pem", "-out", f"{pki}/ca-cert.pem", "-addext", "basicConstraints=critical,CA:TRUE"])
        run(["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=localhost",
             "-keyout", f"{pki}/server-key.pem", "-out", f"{pki}/server.csr"])
        with open(f"{pki}/ext", "w") as f:
            f.write("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        run(["openssl", "x509", "-req", "-in", f"{pki}/server.csr", "-CA", f"{pki}/ca-cert.pem", "-CAkey", f"{pki}/ca-key.pem",
             "-days", "2", "-out", f"{pki}/server-cert.pem", "-extfile", f"{pki}/ext"])
        help_text = run([CONBD, "serve", "--help"])
        if "--tls" not in help_text:
            return self.note("TLS: this conbd does not have it")
        image = self.image("tls.img")

        def uri(s):
            return f"nbds://localhost:{s.port}/?tls-certificates={pki}&tls-verify-peer=false"
        commands = {
            "conbd": conbd(*TLS_CONBD(pki, help_text)),
            "nbdkit": lambda s: ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(s.port), "-t", "16", "--tls=require",
                                 f"--tls-certificates={pki}", "file", s.image],
            "qemu-nbd io_uring": lambda s: ["qemu-nbd", "-t", "-e", "128", "-b", "127.0.0.1", "-p", str(s.port), "--object",
                                            f"tls-creds-x509,id=t,endpoint=server,dir={pki},verify-peer=no", "--tls-creds", "t",
                                            "--image-opts", qemu_options(s.image, "raw", "io_uring", False)],
        }
        starters = {n: (lambda n=n: Server(self.folder, n, image, tcp=True, command=commands[n], uri=uri))
                    for n in installed(commands)}
        self.group("TLS, loopback", TLS_ROWS, starters)
        os.unlink(image)

    def idle(self):
        """64 connections at work, without and with 2000 idle ones beside them; and what an idle one costs."""
        image = self.image("idle.img", 256 * MIB)
        idle = 200 if QUICK else 2000
        r = small("idle", "", 1, "read", None, None, conns=64, threads=1)
        table = []
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
        for name in installed(["conbd", "nbdkit", "qemu-nbd io_uring"]):
            server = Server(self.folder, name, image)
            try:
                load(server, r)
                before = server.resident()
                pairs, alone = [], []
                for _ in range(ROUNDS):
                    alone = load(server, r)
                    held = [open_idle(server) for _ in range(idle)]
                    time.sleep(0.3)
                    beside = load(server, r)
                    resident = server.resident()
                    pairs.append((alone["value"], beside["value"]))
                    for s in held:
                        s.close()
                    time.sleep(0.3)
                ratio = statistics.median(b / a for a, b in pairs)
                table.append({"server": name, "idle": idle, "alone": statistics.median(a for a, _ in pairs),
                              "beside": statistics.median(b for _, b in pairs), "ratio": ratio,
                              "bytes_per_idle": max(0, resident - before) / idle})
            except Exception as e:
                self.note(f"idle connections: {name}: {e}")
            finally:
                server.stop()
        self.tables["idle"] = table
        os.unlink(image)

    def calls(self):
        """System calls per request, counted by strace."""
        if not shutil.which("strace"):
            return self.note("system calls: strace is not installed")
        image = self.image("calls.img", 256 * MIB)
        cases = [("4k read, depth 1", dict(bs=4096, depth=1, rw="read")), ("4k read, depth 16", dict(bs=4096, depth=16, rw="read")),
                 ("4k read, depth 64", dict(bs=4096, depth=64, rw="read")), ("4k write, depth 1", dict(bs=4096, depth=1, rw="write")),
                 ("4k write, depth 16", dict(bs=4096, depth=16, rw="write")), ("4k write, depth 64", dict(bs=4096, depth=64, rw="write")),
                 ("1M read, depth 4", dict(bs=MIB, depth=4, rw="read", pattern="sequential")),
                 ("1M write, depth 4", dict(bs=MIB, depth=4, rw="write", pattern="sequential"))]
        table = []
        for name in installed(CACHED_QUICK if QUICK else [n for n in CACHED if n != "qsd threads"]):
            server = Server(self.folder, name, image)
            line = {"server": name}
            try:
                for title, r in cases:
                    out = f"{self.folder}/strace.out"
                    tracer = subprocess.Popen(["strace", "-f", "-c", "-o", out, "-p", str(server.pid)],
                                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                    time.sleep(0.3)
                    m = load(server, r, 0.5)
                    tracer.send_signal(signal.SIGINT)
                    tracer.wait()
                    with open(out) as f:
                        calls = sum(int(x.split()[3]) for x in f if re.match(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+\d+\s", x) and not x.rstrip().endswith("total"))
                    line[title] = calls / m["ops"]
            except Exception as e:
                self.note(f"system calls: {name}: {e}")
            finally:
                server.stop()
            table.append(line)
        self.tables["calls"] = table
        os.unlink(image)

    def scaling(self):
        """CPU per request as connections and IOThreads grow."""
        image = self.image("scaling.img", 256 * MIB)
        counts = (1, 4, 16, 64)
        table = []
        commands = {f"conbd, {n} IOThread{'s' if n > 1 else ''}": conbd("--iothreads", str(n)) for n in (1, 2, 4)}
        for name in [*commands, *installed(CACHED_QUICK[1:])]:
            server = Server(self.folder, name, image, command=commands.get(name))
            line = {"server": name}
            try:
                for n in counts:
                    m = load(server, dict(bs=4096, depth=4, rw="read", conns=n, threads=1))
                    line[str(n)] = {"cpu": m["cpu"], "value": m["value"]}
            except Exception as e:
                self.note(f"scaling: {name}: {e}")
            finally:
                server.stop()
            table.append(line)
        self.tables["scaling"] = table
        os.unlink(image)


def TLS_CONBD(pki, help_text):
    """The flags with which conbd takes the certificates, of those that there are."""
    if "--tls-creds" in help_text:
        return ["--tls-creds", pki]
    return ["--tls-cert", f"{pki}/server-cert.pem", "--tls-key", f"{pki}/server-key.pem"]


def open_idle(server):
    """A connection that has entered transmission and says nothing more."""
    s = socket.socket(socket.AF_UNIX)
    s.connect(server.socket)

    def take(n):
        data = b""
        while len(data) < n:
            more = s.recv(n - len(data))
            if not more:
                raise RuntimeError("the server closed an idle connection")
            data += more
        return data
    take(18)
    # Client flags: fixed newstyle, no zeroes. Then NBD_OPT_GO of the export "".
    s.sendall(struct.pack(">I8sIIIH", 3, b"IHAVEOPT", 7, 6, 0, 0))
    while True:
        _, _, kind, length = struct.unpack(">QIII", take(20))
        take(length)
        if kind == 1:
            return s
        if kind >> 31:
            raise RuntimeError(f"the server refused an idle connection: {kind:#x}")


# ------------------------------------------------------------------------------------------------------------ results

def summary(result):
    """Medians, the best peer, and the ratios to it."""
    r, runs = result["row"], result["runs"]

    def median(name, key):
        return statistics.median(m[key] for m in runs[name].values())

    ours = "conbd"
    out = {"key": r["key"], "title": r["title"], "group": result["group"], "unit": r["unit"], "want_rate": r["rate"], "want_cpu": r["cpu"],
           "servers": {n: {"value": median(n, "value"), "cpu": median(n, "cpu"),
                           "values": [m["value"] for m in runs[n].values()]} for n in runs}}
    if ours not in runs:
        return out
    against = r.get("against")
    peers = [against] if against in runs else [n for n in runs if not n.startswith("conbd")]
    if not peers or (against and against not in runs):
        return out
    best = max(peers, key=lambda n: median(n, "value"))
    both = [t for t in runs[ours] if t in runs[best]]
    if not both:
        return out

    def ratio(key):
        return statistics.median(runs[ours][t][key] / runs[best][t][key] for t in both if runs[best][t][key] > 0)
    out.update(best=best, rate=ratio("value"), cpu=ratio("cpu"), spread=[min(runs[ours][t]["value"] / runs[best][t]["value"] for t in both),
                                                                         max(runs[ours][t]["value"] / runs[best][t]["value"] for t in both)])
    return out


def verdict(s):
    if "rate" not in s:
        return "not compared"
    if s["want_rate"] is None:
        return "ahead" if s["rate"] >= 1 else "**loses**"
    words = []
    if s["rate"] < min(1, s["want_rate"]):
        words.append("**loses**")
    elif s["rate"] < s["want_rate"]:
        words.append("below its goal")
    if s["want_cpu"] is not None and s["cpu"] > s["want_cpu"]:
        words.append("CPU above its goal" if s["cpu"] < 1 else "**CPU loses**")
    return ", ".join(words) or "reached"


def number(value):
    return f"{value / 1000:.1f}k" if value >= 10_000 else f"{value:.0f}"


def goal(x, sign):
    return "" if x is None else f"{sign} {x:g}"


def print_row(s):
    if "rate" in s:
        print(f"{s['title']:55} {number(s['servers']['conbd']['value']):>8} {s['unit']:6} {s['rate']:5.2f} of {s['best']} "
              f"(goal {goal(s['want_rate'], '≥') or '-'})  CPU {s['servers']['conbd']['cpu']:.2f}, {s['cpu']:.2f} of it "
              f"(goal {goal(s['want_cpu'], '≤') or '-'})  {verdict(s)}", flush=True)
    else:
        print(f"{s['title']:55} {verdict(s)}", flush=True)


def markdown(summaries, tables, machine, notes):
    out = [f"Machine: {machine['cpu']}, {machine['cpus']} CPUs, Linux {machine['kernel']}; {machine['when']}, load {machine['load']}. "
           f"{machine['rounds']} rounds of {machine['seconds']} s each; {machine['versions']}.", ""]
    groups = {}
    for s in summaries:
        groups.setdefault(s["group"], []).append(s)
    for title, rows in groups.items():
        out += [f"### {title[0].upper()}{title[1:]}", "",
                "| workload | conbd | best peer | ratio (spread) | goal | server CPU, conbd | ratio | goal | verdict |",
                "|---|---:|---|---:|---:|---:|---:|---:|---|"]
        for s in rows:
            ours = s["servers"].get("conbd")
            if not ours or "rate" not in s:
                out.append(f"| {s['title']} | | | | | | | | {verdict(s)} |")
                continue
            peer = s["servers"][s["best"]]
            unit = "s/GiB" if title == "copies" else "us"
            out.append(f"| {s['title']} | {number(ours['value'])} {s['unit']} | {s['best']}: {number(peer['value'])} | "
                       f"{s['rate']:.2f} ({s['spread'][0]:.2f}–{s['spread'][1]:.2f}) | {goal(s['want_rate'], '≥')} | {ours['cpu']:.2f} {unit} | {s['cpu']:.2f} | "
                       f"{goal(s['want_cpu'], '≤')} | {verdict(s)} |")
        out.append("")
        names = list(dict.fromkeys(n for s in rows for n in s["servers"]))
        out += ["All servers: rate, and CPU in brackets.", "", "| workload | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
        for s in rows:
            cells = [f"{number(s['servers'][n]['value'])} ({s['servers'][n]['cpu']:.2f})" if n in s["servers"] else "" for n in names]
            out.append(f"| {s['title']} | " + " | ".join(cells) + " |")
        out.append("")
    if tables.get("idle"):
        out += ["### Idle connections", "", "64 connections read 4k at random; beside them idle ones, which have negotiated and say nothing.", "",
                "| server | idle | rate without | rate with | ratio | resident per idle one |", "|---|---:|---:|---:|---:|---:|"]
        out += [f"| {t['server']} | {t['idle']} | {number(t['alone'])} | {number(t['beside'])} | {t['ratio']:.2f} | {t['bytes_per_idle'] / 1024:.1f} KiB |"
                for t in tables["idle"]]
        out.append("")
    if tables.get("calls"):
        titles = [k for k in tables["calls"][0] if k != "server"]
        out += ["### System calls per request", "", "Counted by `strace -f -c`, which slows everything down and so makes batches larger and sleeps "
                "more frequent than they are.", "", "| server | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(titles)]
        out += [f"| {t['server']} | " + " | ".join(f"{t[k]:.2f}" if k in t else "" for k in titles) + " |" for t in tables["calls"]]
        out.append("")
    if tables.get("scaling"):
        counts = [k for k in tables["scaling"][0] if k != "server"]
        out += ["### Cost per request as connections and IOThreads grow", "", "4k random reads, depth 4 on each connection: server CPU in us per request, "
                "and requests per second.", "", "| server | " + " | ".join(f"{n} connection{'s' if n != '1' else ''}" for n in counts) + " |",
                "|---|" + "---:|" * len(counts)]
        out += [f"| {t['server']} | " + " | ".join(f"{t[k]['cpu']:.2f} ({number(t[k]['value'])})" if k in t else "" for k in counts) + " |"
                for t in tables["scaling"]]
        out.append("")
    if notes:
        out += ["Notes of the run:", ""] + [f"- {n.splitlines()[0][:300]}" for n in notes] + [""]
    return "\n".join(out)


def chart(summaries):
    """Bars: our rate over the best peer's, per row."""
    rows = [s for s in summaries if "rate" in s]
    left, width, step, top = 330, 420, 20, 50
    most = max(3.0, min(6.0, max((s["rate"] for s in rows), default=3)))
    x = lambda v: left + min(v, most) / most * width
    height = top + step * len(rows) + 30
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 90}" height="{height}" font-family="sans-serif" font-size="12">',
           f'<rect width="100%" height="100%" fill="white"/>',
           f'<text x="10" y="22" font-size="15">conbd: rate as a multiple of the best peer\'s, per workload</text>',
           f'<line x1="{x(1):.0f}" y1="{top - 14}" x2="{x(1):.0f}" y2="{height - 20}" stroke="#444"/><text x="{x(1) + 3:.0f}" y="{top - 6}">1.0 = best peer; the tick is the goal</text>']
    for i, s in enumerate(rows):
        y = top + i * step
        colour = "#b33" if s["rate"] < 1 else "#2a7"
        title = s["title"].replace("&", "&amp;").replace("<", "&lt;")
        out.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{title}</text>'
                   f'<rect x="{left}" y="{y + 2}" width="{x(s["rate"]) - left:.1f}" height="{step - 6}" fill="{colour}"/>'
                   f'<text x="{x(s["rate"]) + 5:.0f}" y="{y + 13}">{s["rate"]:.2f}</text>')
        if s["want_rate"]:
            out.append(f'<line x1="{x(s["want_rate"]):.1f}" y1="{y}" x2="{x(s["want_rate"]):.1f}" y2="{y + step - 2}" stroke="#000" stroke-width="2"/>')
    return "\n".join(out + ["</svg>", ""])


def version(argv):
    try:
        text = subprocess.run(argv, capture_output=True, text=True)
        return (text.stdout or text.stderr).strip().splitlines()[0][:60]
    except OSError:
        return None


def machine():
    with open("/proc/cpuinfo") as f:
        model = re.search(r"model name\s*:\s*(.*)", f.read())
    versions = [v for v in (version([CONBD, "--version"]), version(["qemu-nbd", "--version"]), version(["nbdkit", "--version"]),
                            version(["nbd-server", "-V"])) if v]
    return {"cpu": model[1] if model else os.uname().machine, "cpus": os.cpu_count(), "kernel": os.uname().release,
            "when": time.strftime("%Y-%m-%d %H:%M"), "load": f"{os.getloadavg()[0]:.1f} at the start", "rounds": ROUNDS, "seconds": SECONDS,
            "versions": ", ".join(versions)}


MARKS = ("<!-- generated by make bench: begin -->", "<!-- generated by make bench: end -->")
GROUPS = {"raw": Bench.raw, "copy": Bench.copies, "direct": Bench.direct, "tcp": lambda b: b.raw(tcp=True), "qcow2": Bench.qcow2,
          "tls": Bench.tls, "idle": Bench.idle, "calls": Bench.calls, "scaling": Bench.scaling}
IN_QUICK = ["raw", "copy", "direct", "idle", "calls", "scaling"]


def main():
    if not os.access(CONBD, os.X_OK):
        sys.exit(f"bench: {CONBD} is not there; run: make build")
    chosen = os.environ.get("BENCH_GROUPS", "")
    groups = chosen.split(",") if chosen else IN_QUICK if QUICK else list(GROUPS)
    for g in groups:
        if g not in GROUPS:
            sys.exit(f"bench: no group is called {g!r}; there are {', '.join(GROUPS)}")
    for name in ("qemu-nbd", "qemu-storage-daemon", "nbdkit", "nbd-server", "nbdcopy", "qemu-img", "strace"):
        if not shutil.which(name):
            print(f"# not measured, not installed: {name} (see docs/performance.md)", file=sys.stderr)
    about, begin = machine(), time.time()
    scratch = os.environ.get("BENCH_DIR", ROOT + "/target/bench")
    os.makedirs(scratch, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="run-", dir=scratch) as folder:
        # A socket's path is short.
        with tempfile.TemporaryDirectory(prefix="conbd-bench-") as short:
            os.rmdir(short)
            os.symlink(folder, short)
            bench = Bench(short)
            try:
                for g in groups:
                    GROUPS[g](bench)
            finally:
                os.unlink(short)
                os.mkdir(short)
    summaries = [summary(r) for r in bench.results.values()]
    about["took"] = f"{time.time() - begin:.0f} s"
    result = {"machine": about, "rows": summaries, **bench.tables, "notes": bench.notes}
    text = markdown(summaries, bench.tables, about, bench.notes)
    whole = not QUICK and not chosen and not ROWS
    where = ROOT + "/docs" if whole else scratch
    with open(where + "/bench.json", "w") as f:
        json.dump(result, f, indent=1)
        f.write("\n")
    with open(where + "/bench.svg", "w") as f:
        f.write(chart(summaries))
    if whole:
        page = ROOT + "/docs/performance.md"
        with open(page) as f:
            before, rest = f.read().split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        with open(page, "w") as f:
            f.write(before + MARKS[0] + "\n\n![rate as a multiple of the best peer's](bench.svg)\n\n" + text + "\n" + MARKS[1] + after)
    print("\n" + text if not whole else f"\nwrote docs/performance.md, docs/bench.json, docs/bench.svg")
    losing = [s["title"] for s in summaries if "loses" in verdict(s)]
    print(f"{len(summaries)} rows in {about['took']}; behind a peer: {', '.join(losing) or 'none'}")


main()
