#!/usr/bin/env python3
"""Malformed NBD dialogues over raw sockets, written from the protocol document alone.

usage: torture.py SOCKET EXPORT [--tls=required|selective] [--only=TEXT] [--no-crowd]

Each case opens a connection, says something, and states what the document allows; afterwards that connection must be in
step or closed, and a well-formed client must still be served. With --tls the server at SOCKET offers TLS, and only the dialogues
about that are had. Works with any server; its findings in others are theirs.
"""

import socket, struct, sys, time, ssl, random

SOCK, NAME = sys.argv[1], (sys.argv[2] if len(sys.argv) > 2 else "").encode()
T = 8.0
IHAVEOPT = 0x49484156454F5054
REP = 0x3E889045565A9
ACK, SERVER, INFO, META = 1, 2, 3, 4
E_UNSUP, E_POLICY, E_INVALID, E_TLSREQ, E_UNKNOWN, E_SHUT, E_BSREQ, E_BIG, E_EXT = [
    (1 << 31) | i for i in (1, 2, 3, 5, 6, 7, 8, 9, 10)
]


class Closed(Exception):
    pass


class C:
    def __init__(s, path=None):
        s.s = socket.socket(socket.AF_UNIX)
        s.s.settimeout(T)
        s.s.connect(path or SOCK)
        s.mode = 0
        s.ck = 0

    def send(s, b):
        s.s.sendall(b)

    def recv(s, n):
        b = b""
        while len(b) < n:
            try:
                d = s.s.recv(n - len(b))
            except ConnectionResetError:
                raise Closed()
            if not d:
                raise Closed()
            b += d
        return b

    def closed(s):
        """True if the server closes without another byte."""
        try:
            d = s.s.recv(1)
            return d == b""
        except ConnectionResetError:
            return True

    def greet(s, flags=3):
        g = s.recv(18)
        assert g[:16] == b"NBDMAGICIHAVEOPT", g
        s.send(struct.pack(">I", flags))
        return s

    def opt(s, o, data=b"", ln=None, magic=IHAVEOPT):
        s.send(struct.pack(">QII", magic, o, len(data) if ln is None else ln) + data)

    def rep(s, o=None):
        m, oo, t, l = struct.unpack(">QIII", s.recv(20))
        assert m == REP, hex(m)
        if o is not None:
            assert oo == o, (oo, o)
        return t, s.recv(l)

    def reps(s, o):
        out = []
        while True:
            t, d = s.rep(o)
            out.append((t, d))
            if t == ACK or t >> 31:
                return out

    def last(s, o, data=b"", **k):
        s.opt(o, data, **k)
        return s.reps(o)[-1][0]

    def go(s, o=7, name=None, infos=()):
        n = NAME if name is None else name
        s.opt(
            o,
            struct.pack(">I", len(n))
            + n
            + struct.pack(">H", len(infos))
            + b"".join(struct.pack(">H", i) for i in infos),
        )
        r = s.reps(o)
        for t, d in r:
            if t == INFO and d[:2] == b"\0\0":
                s.size, s.flags = struct.unpack(">QH", d[2:])
        return r

    def sr(s):
        assert s.last(8) == ACK
        s.mode = 1
        return s

    def eh(s):
        assert s.last(11) == ACK
        s.mode = 2
        return s

    def meta(s, o=10, name=None, q=(b"base:allocation",)):
        n = NAME if name is None else name
        s.opt(
            o,
            struct.pack(">I", len(n))
            + n
            + struct.pack(">I", len(q))
            + b"".join(struct.pack(">I", len(x)) + x for x in q),
        )
        return s.reps(o)

    def enter(s, mode=0, meta=False):
        s.greet()
        if mode == 1:
            s.sr()
        if mode == 2:
            s.eh()
        if meta:
            assert s.meta()[-1][0] == ACK
        assert s.go()[-1][0] == ACK
        return s

    def req(s, cmd, off=0, ln=0, flags=0, data=b"", magic=None, cookie=None):
        if cookie is None:
            s.ck += 1
            cookie = s.ck
        if s.mode == 2:
            h = struct.pack(">IHHQQQ", 0x21E41C71 if magic is None else magic, flags, cmd, cookie, off, ln)
        else:
            h = struct.pack(">IHHQQI", 0x25609513 if magic is None else magic, flags, cmd, cookie, off, ln)
        s.send(h + data)
        return cookie

    def reply(s, rdlen=0, cookie=None):
        """One whole reply: (errno, chunks)."""
        ck = s.ck if cookie is None else cookie
        err = 0
        chunks = []
        while True:
            m = struct.unpack(">I", s.recv(4))[0]
            if m == 0x67446698:
                assert s.mode < 2, "simple reply in extended mode"
                e, c = struct.unpack(">IQ", s.recv(12))
                assert c == ck, (c, ck)
                if rdlen:
                    assert s.mode == 0 or e, "simple reply to structured read"
                d = s.recv(rdlen) if (rdlen and not e) else b""
                return e, [("simple", d)]
            if m == 0x668E33EF:
                assert s.mode == 1
                f, t, c, l = struct.unpack(">HHQI", s.recv(16))
            elif m == 0x6E8A278C:
                assert s.mode == 2
                f, t, c, o, l = struct.unpack(">HHQQQ", s.recv(28))
            else:
                raise AssertionError("bad reply magic %x: out of sync" % m)
            assert c == ck, (c, ck)
            assert f in (0, 1)
            d = s.recv(l)
            if t >> 15:
                e, ml = struct.unpack(">IH", d[:6])
                assert e
                assert ml <= len(d) - 6
                err = err or e
            chunks.append((t, d))
            if t == 0:
                assert l == 0 and f == 1
            if f & 1:
                return err, chunks

    def call(s, *a, rd=False, **k):
        c = s.req(*a, **k)
        return s.reply((a[2] if len(a) > 2 else k.get("ln", 0)) if rd else 0, c)[0]

    def alive(s):
        """In sync: a read works."""
        c = s.req(0, 0, 512)
        e, ch = s.reply(512, c)
        assert e == 0, e

    def hag(s):
        assert s.last(77) == E_UNSUP

    def disc(s):
        s.req(2)
        assert s.closed()


cases = []


def case(f):
    cases.append((f.__name__, f))
    return f


def many(name, params, f):
    for p in params:
        cases.append((f"{name}[{p!r:.40}]", lambda p=p: f(p)))


# ---- greeting
many("bad client flags close", [4, 8, 0x80000000, 0xFFFFFFFF, 7, 0x10003], lambda p: _closed(C().greet(p)))


def _closed(c):
    assert c.closed()


many(
    "garbage instead of flags",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 100,
        b"\xff" * 64,
        b"SSH-2.0-x\r\n",
    ],
    lambda p: (lambda c: (c.recv(18), c.send(p), _eofany(c)))(C()),
)


def _eofany(c):
    try:
        while c.s.recv(4096):
            pass
    except ConnectionResetError:
        pass


many("vanish after", range(0, 20, 3), lambda p: _vanish(p))


def _vanish(p):
    c = C()
    c.recv(18)
    c.send((struct.pack(">I", 3) + struct.pack(">QII", IHAVEOPT, 7, 6) + b"\0" * 6)[:p])
    c.s.close()


@case
def bytewise_handshake():
    c = C()
    c.recv(18)
    b = (
        struct.pack(">I", 3)
        + struct.pack(">QII", IHAVEOPT, 8, 0)
        + struct.pack(">QIII", IHAVEOPT, 7, len(NAME) + 6, len(NAME))
        + NAME
        + b"\0\0"
    )
    for x in b:
        c.send(bytes([x]))
        time.sleep(0.002)
    assert c.rep(8)[0] == ACK
    c.mode = 1
    assert c.reps(7)[-1][0] == ACK
    c.alive()
    c.disc()


# not fixed newstyle
@case
def not_fixed_export_name_has_zeroes():
    c = C().greet(0)
    c.opt(1, NAME)
    d = c.recv(8 + 2 + 124)
    assert d[10:] == b"\0" * 124
    c.alive()
    c.disc()


@case
def no_zeroes_export_name():
    c = C().greet(3)
    c.opt(1, NAME)
    c.recv(10)
    c.alive()
    c.disc()


many(
    "export_name unknown closes",
    [b"nosuch", b"\0", b"\xff\xfe", b"../../etc/passwd", b"/etc/passwd", b"x" * 4096, b"x" * 4097, NAME + b"\0"],
    lambda p: (lambda c: (c.opt(1, p), _closed(c)))(C().greet()),
)
# ---- options
many(
    "bad option magic closes",
    [0, IHAVEOPT + 1, 0x4E42444D41474943, 0xFFFFFFFFFFFFFFFF],
    lambda p: (lambda c: (c.opt(3, magic=p), _closed(c)))(C().greet()),
)
many(
    "unknown options are UNSUP",
    [0, 4, 12, 13, 77, 1000, 0x7FFFFFFF, 0xFFFFFFFF],
    lambda p: (lambda c: (_eq(c.last(p, b"data"), E_UNSUP), c.hag(), _ok(c)))(C().greet()),
)


def _eq(a, b):
    assert a == b, (hex(a), hex(b))


def _in(a, b):
    assert a in b, (hex(a), [hex(x) for x in b])


def _ok(c):
    assert c.go()[-1][0] == ACK
    c.alive()
    c.disc()


def _huge(p):
    c = C().greet()
    o, l = p
    c.opt(o, b"", ln=l)
    c.s.settimeout(1.0)
    try:
        d = c.s.recv(20)
        if d:
            m, oo, t, _ = struct.unpack(">QIII", d)
            assert t >> 31
    except ConnectionResetError:
        pass
    except socket.timeout:
        pass  # waits for the payload: bounded by the handshake limit


many(
    "huge option length",
    [(o, l) for o in (3, 6, 7, 8, 9, 10, 77, 5, 2) for l in (0xFFFFFFFF, 0x80000000, 0x02000001)],
    _huge,
)
many(
    "option with data is INVALID",
    [3, 8, 11, 5],
    lambda p: (lambda c: (_in(c.last(p, b"x" * 5), (E_INVALID, E_POLICY, E_UNSUP)), c.hag(), _ok(c)))(C().greet()),
)


def _bytesopt(p):
    o, data = p
    c = C().greet()
    if o in (9, 10):
        c.sr()
    _eq(c.last(o, data), E_INVALID)
    c.hag()
    _ok(c)


I = lambda *a: struct.pack(">" + "I" * len(a), *a)
bad_info = [
    b"",
    b"\0",
    b"\0\0\0",
    I(0),
    I(0) + b"\0",
    I(1) + b"\0\0",
    I(0xFFFFFFFF) + b"\0\0",
    I(0x80000000) + b"aa\0\0",
    I(5) + b"abc\0\0",
    I(0) + b"\0\1",
    I(0) + b"\0\2\0\1",
    I(0) + b"\xff\xff\0\1",
    I(0) + b"\0\0\0\1",
    I(0) + b"\0\0x",
    I(4) + b"\0\0",
]
many("malformed INFO/GO", [(o, d) for o in (6, 7) for d in bad_info], _bytesopt)
bad_meta = [
    b"",
    b"\0\0",
    I(0),
    I(0) + b"\0\0\0",
    I(0, 1),
    I(0, 1) + b"\0\0",
    I(0, 1, 5) + b"abc",
    I(0, 1, 0xFFFFFFFF),
    I(0xFFFFFFFF, 0),
    I(0, 2, 1) + b"a",
    I(0, 0) + b"x",
    I(3) + b"ab",
    I(0x7FFFFFFF) + b"a" * 20,
    I(0, 1, 3) + b"abcd",
]
many("malformed LIST/SET_META", [(o, d) for o in (9, 10) for d in bad_meta], _bytesopt)


@case
def meta_query_count_ffffffff():
    c = C().greet().sr()
    _in(c.last(10, I(len(NAME)) + NAME + I(0xFFFFFFFF)), (E_INVALID, E_BIG))
    c.hag()
    _ok(c)


@case
def meta_before_structured_is_invalid():
    for o in (9, 10):
        c = C().greet()
        _eq(c.meta(o)[-1][0], E_INVALID)
        c.hag()
        _ok(c)


many(
    "meta odd queries are no error",
    [
        (b"",),
        (b":",),
        (b"base:",),
        (b"base:x",),
        (b"no:such",),
        (b"x" * 4096,),
        (b"qemu:",),
        (b"qemu:dirty-bitmap:",),
        (b"base:allocation\0",),
        (b"BASE:ALLOCATION",),
        (b"base:allocation",) * 20,
        (b"nocolon",),
        (b"\xff\xfe",),
    ],
    lambda q: _metaq(q),
)


def _metaq(q):
    c = C().greet().sr()
    r = c.meta(10, q=q)
    _in(r[-1][0], (ACK, E_INVALID, E_BIG))
    ids = [d[:4] for t, d in r if t == META]
    assert len(set(ids)) == len(ids)
    for t, d in r:
        if t == META:
            assert d[4:] in q, d
    r = c.meta(9, q=q)
    _in(r[-1][0], (ACK, E_INVALID, E_BIG))
    c.hag()
    _ok(c)


@case
def set_meta_too_long_query():
    c = C().greet().sr()
    _in(c.meta(10, q=(b"a" * 4097,))[-1][0], (E_INVALID, E_BIG, ACK))
    c.hag()
    _ok(c)


@case
def meta_selection_replaced_by_failure():
    c = C().greet().sr()
    assert c.meta()[0][0] == META
    _in(c.meta(name=b"nosuch")[-1][0], (E_UNKNOWN, E_INVALID))
    assert c.go()[-1][0] == ACK
    assert c.call(7, 0, 512) == 22
    c.alive()
    c.disc()


@case
def meta_set_empty_deselects():
    c = C().greet().sr()
    c.meta()
    _eq(c.meta(q=())[-1][0], ACK)
    c.go()
    assert c.call(7, 0, 512) == 22
    c.alive()
    c.disc()


many(
    "unknown export in GO/INFO",
    [
        (o, n)
        for o in (6, 7)
        for n in (b"nosuch", b"../x", b"/etc/passwd", b"\xff\xfe", b"a\0b", b"x" * 4096, b"%s%n", b" ")
    ],
    lambda p: (lambda c: (_in(c.go(p[0], p[1])[-1][0], (E_UNKNOWN, E_INVALID)), c.hag(), _ok(c)))(C().greet()),
)


@case
def name_too_long():
    for o in (6, 7):
        c = C().greet()
        _in(c.go(o, b"x" * 4097)[-1][0], (E_UNKNOWN, E_INVALID, E_BIG))
        c.hag()
        _ok(c)


many(
    "odd info requests ignored",
    [(0xFFFF,), (9, 9, 9), (3, 3, 3), (0,), (1, 2, 3, 4, 5), tuple(range(200)), (3,) * 1000],
    lambda p: (lambda c: (_go_infos(c, p)))(C().greet()),
)


def _go_infos(c, p):
    r = c.go(7, infos=p)
    assert r[-1][0] == ACK and r[-1][1] == b""
    ty = [d[:2] for t, d in r if t == INFO]
    assert b"\0\0" in ty and len(set(ty)) == len(ty)
    c.alive()
    c.disc()


@case
def info_then_go_equal():
    c = C().greet().sr()
    a = c.go(6, infos=(1, 2, 3))
    b = c.go(7, infos=(1, 2, 3))
    assert sorted(a) == sorted(b)
    c.alive()
    c.disc()


@case
def repeated_options():
    c = C().greet()
    c.sr()
    _in(c.last(8), (ACK, E_INVALID))
    c.alive if 0 else None
    assert c.go()[-1][0] == ACK
    c.alive()
    c.disc()


@case
def sr_after_eh():
    c = C().greet().eh()
    _in(c.last(8), (E_EXT, E_INVALID))
    assert c.go()[-1][0] == ACK
    c.alive()
    c.disc()


@case
def eh_after_sr():
    c = C().greet().sr().eh()
    assert c.go()[-1][0] == ACK
    c.alive()
    c.disc()


@case
def export_name_after_eh():
    c = C().greet().eh()
    c.opt(1, NAME)
    assert c.closed()


@case
def pipelined_options_in_order():
    c = C().greet()
    b = b""
    for o in (77, 3, 8, 78, 6):
        d = I(len(NAME)) + NAME + b"\0\0" if o == 6 else b""
        b += struct.pack(">QII", IHAVEOPT, o, len(d)) + d
    c.send(b)
    assert c.rep(77)[0] == E_UNSUP
    assert c.reps(3)[-1][0] == ACK
    assert c.rep(8)[0] == ACK
    c.mode = 1
    assert c.rep(78)[0] == E_UNSUP
    assert c.reps(6)[-1][0] == ACK
    _ok(c)


@case
def thousand_options():
    c = C().greet()
    try:
        for i in range(1000):
            _eq(c.last(77), E_UNSUP)
        _ok(c)
    except (Closed, BrokenPipeError):
        pass


@case
def abort_acked():
    for d in (b"", b"junk" * 10):
        c = C().greet()
        _eq(c.last(2, d), ACK)
        assert c.closed()


@case
def abort_and_vanish():
    c = C().greet()
    c.opt(2)
    c.s.close()


@case
def starttls_refused_without_tls():
    c = C().greet()
    t = c.last(5)
    _in(t, (E_UNSUP, E_POLICY, E_INVALID))
    c.hag()
    _ok(c)


@case
def starttls_with_trailing_clienthello():
    c = C().greet()
    c.opt(5)
    c.send(b"\x16\x03\x01\x00\x05hello")
    _eofany(c)


@case
def request_instead_of_option():
    c = C().greet()
    c.req(0, 0, 512)
    assert c.closed()


# ---- transmission
for mode in (0, 1, 2):
    mm = ("compact-simple", "structured", "extended")[mode]

    def bad_magic(m, mode=mode):
        c = C().enter(mode)
        c.req(0, 0, 512, magic=m)
        assert c.closed()

    many(
        f"{mm} bad request magic closes",
        [0, 0x25609514, 0x67446698, 0x25609513 if mode == 2 else 0x21E41C71],
        bad_magic,
    )

    def unknown_cmd(cmd, mode=mode):
        c = C().enter(mode)
        e = c.call(cmd, 0, 0)
        assert e == 22, e
        c.alive()
        c.disc()

    many(f"{mm} unknown command EINVAL", [8, 9, 10, 99, 255, 0x7FFF, 0xFFFF], unknown_cmd)

    def bad_flags(p, mode=mode):
        cmd, fl = p
        c = C().enter(mode)
        data = b"w" * 512 if cmd == 1 else b""
        e = c.call(
            cmd, 0, 0 if cmd == 3 else 512, flags=fl | (32 if mode == 2 and cmd == 1 else 0), data=data, rd=cmd == 0
        )
        assert e == 22, (p, e)
        c.alive()
        c.disc()

    many(f"{mm} unknown flags EINVAL", [(c, f) for c in (0, 1, 3, 4, 5, 6) for f in (64, 0x8000, 0x4000)], bad_flags)

    def foreign_flags(p, mode=mode):
        cmd, fl = p
        c = C().enter(mode)
        data = b"w" * 512 if cmd == 1 else b""
        e = c.call(
            cmd, 0, 0 if cmd == 3 else 512, flags=fl | (32 if mode == 2 and cmd == 1 else 0), data=data, rd=cmd == 0
        )
        assert e == 22, (p, e)
        c.alive()
        c.disc()

    many(
        f"{mm} flags of other commands EINVAL",
        [(0, 2), (0, 8), (0, 16), (1, 2), (1, 4), (1, 8), (1, 16), (4, 2), (4, 4), (4, 16), (6, 4), (6, 8)]
        + ([(0, 4)] if mode == 0 else []),
        foreign_flags,
    )

    def bounds(p, mode=mode):
        cmd, off, ln, want = p
        c = C().enter(mode)
        S = c.size
        off = S + off if off < 0 else off
        data = b"w" * ln if cmd == 1 else b""
        e = c.call(cmd, off, ln, flags=32 if mode == 2 and cmd == 1 else 0, data=data, rd=cmd == 0)
        assert e == want, (p, e)
        c.alive()
        c.disc()

    many(
        f"{mm} out of bounds",
        [
            (0, -1, 2, 22),
            (0, 1 << 63, 512, 22),
            (0, (1 << 64) - 1, 1, 22),
            (0, (1 << 64) - 512, 1024, 22),
            (1, -1, 2, 28),
            (1, (1 << 64) - 512, 1024, 28),
            (1, 1 << 62, 512, 28),
            (4, -1, 2, 22),
            (4, (1 << 64) - 512, 1024, 22),
            (6, -1, 2, 28),
            (6, (1 << 64) - 1, 1, 28),
            (6, 1 << 40, 512, 28),
        ],
        bounds,
    )

    def zero_len(cmd, mode=mode):
        c = C().enter(mode)
        c.call(cmd, 0, 0, flags=32 if mode == 2 and cmd == 1 else 0)
        c.alive()
        c.disc()

    many(f"{mm} zero length keeps the connection", [0, 1, 4, 5, 6, 7], zero_len)

    def status_without_meta(mode=mode):
        c = C().enter(mode)
        assert c.call(7, 0, 512) == 22
        c.alive()
        c.disc()

    cases.append((f"{mm} status without context EINVAL", status_without_meta))

    def flush_args(mode=mode):
        c = C().enter(mode)
        e = c.call(3, 4096, 4096)
        assert e in (0, 22)
        c.alive()
        c.disc()

    cases.append((f"{mm} flush with arguments", flush_args))

    def disc_args(mode=mode):
        c = C().enter(mode)
        c.req(2, 12345, 999)
        assert c.closed()

    cases.append((f"{mm} disc with arguments", disc_args))

    def same_cookie(mode=mode):
        c = C().enter(mode)
        for _ in range(5):
            c.req(0, 0, 512, cookie=42)
        for _ in range(5):
            assert c.reply(512, 42)[0] == 0
        c.alive()
        c.disc()

    cases.append((f"{mm} equal cookies", same_cookie))

    def cookie_extremes(mode=mode):
        c = C().enter(mode)
        for k in (0, (1 << 64) - 1, 1 << 63):
            c.req(0, 0, 512, cookie=k)
            assert c.reply(512, k)[0] == 0
        c.disc()

    cases.append((f"{mm} odd cookies", cookie_extremes))

    def bytewise(mode=mode):
        c = C().enter(mode)
        c.ck = 7
        h = (
            struct.pack(">IHHQQQ", 0x21E41C71, 32, 1, 7, 0, 4)
            if mode == 2
            else struct.pack(">IHHQQI", 0x25609513, 0, 1, 7, 0, 4)
        )
        for x in h + b"abcd":
            c.send(bytes([x]))
            time.sleep(0.002)
        assert c.reply(0, 7)[0] == 0
        c.alive()
        c.disc()

    cases.append((f"{mm} bytewise write", bytewise))

    def huge_write(mode=mode):
        c = C().enter(mode)
        c.req(1, 0, 0xFFFFFFFF, flags=32 if mode == 2 else 0)
        c.s.settimeout(1.5)
        try:
            c.s.recv(100)
        except (socket.timeout, ConnectionResetError):
            pass

    cases.append((f"{mm} write of 4 GiB announced", huge_write))

    def huge_read(mode=mode):
        c = C().enter(mode)
        c.req(0, 0, 0xFFFFFFFF)
        e = c.reply(0)[0]
        assert e in (22, 75, 12), e
        c.alive()
        c.disc()

    cases.append((f"{mm} read of 4 GiB", huge_read))

    def vanish_mid_payload(mode=mode):
        c = C().enter(mode)
        before = None
        c.req(1, 1 << 16, 65536, flags=32 if mode == 2 else 0, data=b"Z" * 1000)
        c.s.close()
        time.sleep(0.05)
        d = C().enter(1)
        k = d.req(0, 1 << 16, 1000)
        e, ch = d.reply(1000, k)
        assert e == 0 and b"Z" * 100 not in b"".join(x for _, x in ch)
        d.disc()

    cases.append((f"{mm} vanish in a payload writes nothing", vanish_mid_payload))

    def half_close(mode=mode):
        c = C().enter(mode)
        ks = [c.req(0, i * 4096, 4096) for i in range(10)]
        c.s.shutdown(socket.SHUT_WR)
        left = set(ks)
        for _ in ks:
            # replies may come in any order; ours are asked one by one
            pass
        got = b""
        try:
            while True:
                x = c.s.recv(65536)
                if not x:
                    break
                got += x
        except ConnectionResetError:
            pass
        assert (
            got.count(
                struct.pack(">I", 0x67446698)
                if mode == 0
                else struct.pack(">I", 0x668E33EF if mode == 1 else 0x6E8A278C)
            )
            >= 10
        ), len(got)

    cases.append((f"{mm} half close gets its replies", half_close))

    def pipelined_errors(mode=mode):
        c = C().enter(mode)
        ks = []
        b = b""
        for i in range(200):
            ks.append(i + 1000)
            cmd, off, ln = [(0, 1 << 60, 512), (99, 0, 0), (4, 1 << 60, 1), (6, 1 << 60, 1)][i % 4]
            b += (
                struct.pack(">IHHQQQ", 0x21E41C71, 0, cmd, i + 1000, off, ln)
                if mode == 2
                else struct.pack(">IHHQQI", 0x25609513, 0, cmd, i + 1000, off, ln)
            )
        c.send(b)
        left = set(ks)
        for _ in ks:
            m = struct.unpack(">I", c.recv(4))[0]
            if m == 0x67446698:
                e, k = struct.unpack(">IQ", c.recv(12))
                assert e
            elif m == 0x668E33EF:
                f, t, k, l = struct.unpack(">HHQI", c.recv(16))
                assert t >> 15 and f == 1
                c.recv(l)
            else:
                f, t, k, o, l = struct.unpack(">HHQQQ", c.recv(28))
                assert t >> 15 and f == 1
                c.recv(l)
            left.remove(k)
        c.alive()
        c.disc()

    cases.append((f"{mm} 200 errors at once", pipelined_errors))

    def write_error_then_sync(mode=mode):
        c = C().enter(mode)
        S = c.size
        e = c.call(1, S - 512, 65536, flags=32 if mode == 2 else 0, data=b"\x25\x60\x95\x13" * 16384)
        assert e == 28, e
        c.alive()
        c.disc()

    cases.append((f"{mm} refused write's payload looks like requests", write_error_then_sync))

    def random_headers(seed, mode=mode):
        r = random.Random(seed)
        c = C().enter(mode)
        try:
            for i in range(40):
                cmd = r.choice([0, 3, 4, 5, 6, 7, 8, 200])
                ln = r.choice([0, 1, 511, 512, 65536, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF])
                off = r.choice([0, 1, 512, c.size - 1, c.size, 1 << 63, (1 << 64) - 1])
                fl = r.choice([0, 0, 0, 1, 2, 4, 8, 16, r.getrandbits(16) & ~32])
                k = c.req(cmd, off, ln, fl)
                # a read that is granted has ln bytes
                c.reply(ln if cmd == 0 else 0, k)
            c.alive()
            c.disc()
        except Closed:
            raise AssertionError("closed on a well-framed request")

    many(f"{mm} random well-framed requests", range(8), random_headers)

    def tail_garbage(mode=mode):
        c = C().enter(mode)
        c.req(2)
        try:
            c.send(b"garbage" * 10)
        except (BrokenPipeError, ConnectionResetError):
            pass
        _eofany(c)

    cases.append((f"{mm} bytes behind DISC", tail_garbage))

    def trunc_header(p, mode=mode):
        c = C().enter(mode)
        c.send(
            (
                struct.pack(">IHHQQQ", 0x21E41C71, 0, 0, 1, 0, 512)
                if mode == 2
                else struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 512)
            )[:p]
        )
        c.s.shutdown(socket.SHUT_WR)
        assert c.closed()

    many(f"{mm} header cut at", [1, 4, 8, 16, 27], trunc_header)


# structured/extended specifics
def df(mode):
    c = C().enter(mode)
    k = c.req(0, 0, 65536, flags=4)
    e, ch = c.reply(65536, k)
    assert e == 0 and len([1 for t, _ in ch if t in (1, 2)]) == 1
    c.alive()
    c.disc()


many("DF one chunk", [1, 2], df)


def read_covers(mode):
    c = C().enter(mode)
    k = c.req(0, 0, 1 << 20)
    e, ch = c.reply(1 << 20, k)
    assert e == 0
    cov = []
    for t, d in ch:
        if t == 1:
            o = struct.unpack(">Q", d[:8])[0]
            assert len(d) > 8
            cov.append((o, len(d) - 8))
        if t == 2:
            o, l = struct.unpack(">QI", d)
            assert l
            cov.append((o, l))
    cov.sort()
    at = 0
    for o, l in cov:
        assert o == at
        at += l
    assert at == 1 << 20
    c.disc()


many("chunks cover the read", [1, 2], read_covers)


def status_forms(p):
    mode, fl, off, ln = p
    c = C().enter(mode, True)
    S = c.size
    if off < 0:
        off += S
    k = c.req(7, off, ln, flags=fl)
    e, ch = c.reply(0, k)
    assert e == 0, e
    st = [d for t, d in ch if t == (5 if mode == 1 else 6)]
    assert len(st) == 1
    if mode == 1:
        ex = [struct.unpack(">II", st[0][4 + i : 12 + i]) for i in range(0, len(st[0]) - 4, 8)]
    else:
        n = struct.unpack(">I", st[0][4:8])[0]
        ex = [struct.unpack(">QQ", st[0][8 + i : 24 + i]) for i in range(0, len(st[0]) - 8, 16)]
        assert n == len(ex)
    assert ex and all(l for l, _ in ex)
    if fl == 8:
        assert len(ex) == 1 and ex[0][0] <= ln
    assert off + sum(l for l, _ in ex) <= S
    assert sum(l for l, _ in ex[:-1]) < ln
    assert all(f < 4 for _, f in ex)
    c.alive()
    c.disc()


many(
    "block status forms",
    [(m, f, o, l) for m in (1, 2) for f in (0, 8) for o, l in ((0, 512), (0, 1 << 20), (-512, 512), (1, 1))],
    status_forms,
)
many(
    "block status beyond",
    [(m, o, l) for m in (1, 2) for o, l in ((1 << 62, 512), (-1, 2), ((1 << 64) - 1, 1))],
    lambda p: (lambda c: (_eqn(c.call(7, p[1] if p[1] >= 0 else c.size + p[1], p[2]), 22), c.alive(), c.disc()))(
        C().enter(p[0], True)
    ),
)


def _eqn(a, b):
    assert a == b, (a, b)


many("block status foreign flags", [(m, f) for m in (1, 2) for f in (1, 2, 4, 16, 64)], lambda p: _statflag(p))


def _statflag(p):
    m, f = p
    c = C().enter(m, True)
    e = c.call(7, 0, 512, flags=f)
    assert e == 22 or (f == 1 and e == 0), e
    c.alive()
    c.disc()


# extended: payload rules
def payload_on_none(cmd):
    c = C().enter(2)
    e = c.call(cmd, 0, 512, flags=32, data=b"\x21\xe4\x1c\x71" * 128)
    assert e == 22, e
    c.alive()
    c.disc()


many("PAYLOAD_LEN on a command without payload", [0, 3, 4, 5, 6, 8, 99], payload_on_none)


def payload_on_status_without_meta():
    c = C().enter(2)
    e = c.call(7, 0, 12, flags=32, data=struct.pack(">QI", 512, 0))
    assert e == 22
    c.alive()
    c.disc()


cases.append(("filter without contexts", payload_on_status_without_meta))


def bad_filter(p):
    c = C().enter(2, True)
    e = c.call(7, 0, len(p), flags=32, data=p)
    assert e == 22, e
    c.alive()
    c.disc()


many(
    "bad filters",
    [
        b"",
        b"\0" * 7,
        struct.pack(">Q", 512) + b"x",
        struct.pack(">QI", 512, 0xFFFFFFFF),
        struct.pack(">QI", 0xFFFFFFFFFFFFFFFF, 0),
        b"\0" * 4096,
        struct.pack(">QII", 512, 1, 1),
        struct.pack(">QII", 512, 0, 0),
    ],
    bad_filter,
)


def payload_too_long():
    c = C().enter(2)
    c.req(4, 0, 1 << 40, flags=32)
    assert c.closed()


cases.append(("payload longer than any maximum closes", payload_too_long))


def compact_payload_flag():
    for m in (0, 1):
        c = C().enter(m)
        e = c.call(1, 0, 512, flags=32, data=b"x" * 512)
        assert e == 22
        c.alive()
        c.disc()


cases.append(("PAYLOAD_LEN in compact mode is unknown", compact_payload_flag))


def wide(p):
    cmd, ln, want = p
    c = C().enter(2, True)
    S = c.size
    e = c.call(cmd, 0, S if ln == "all" else ln)
    assert e in want, (p, e)
    c.alive()
    c.disc()


many(
    "64-bit lengths",
    [
        (4, "all", (0,)),
        (6, "all", (0,)),
        (7, "all", (0,)),
        (5, "all", (0, 22)),
        (4, 1 << 40, (22,)),
        (6, 1 << 40, (28,)),
        (7, 1 << 40, (22,)),
        (5, (1 << 64) - 1, (22,)),
        (6, (1 << 64) - 1, (28,)),
    ],
    wide,
)


def fua_everywhere(p):
    m, cmd = p
    c = C().enter(m)
    e = c.call(
        cmd,
        0,
        0 if cmd == 3 else 512,
        flags=1 | (32 if m == 2 and cmd == 1 else 0),
        data=b"f" * 512 if cmd == 1 else b"",
        rd=cmd == 0,
    )
    assert e == 0, e
    c.alive()
    c.disc()


many("FUA accepted on every command", [(m, c) for m in (0, 1, 2) for c in (0, 1, 3, 4, 5, 6)], fua_everywhere)


def unread():
    c = C().enter(1)
    b = b"".join(struct.pack(">IHHQQI", 0x25609513, 0, 0, i, 0, 1 << 20) for i in range(256))
    c.s.settimeout(1)
    try:
        c.send(b)
    except socket.timeout:
        pass
    d = C().enter(1)
    for _ in range(20):
        d.alive()
    d.disc()
    c.s.close()


cases.append(("256 MiB of replies never read", unread))


def crowd():
    cs = [C() for _ in range(100)]
    for c in cs:
        c.enter(1)
    for c in cs:
        c.alive()
    for c in cs:
        c.disc()


if "--no-crowd" not in sys.argv:
    cases.append(("a hundred clients", crowd))

# ---- TLS
TLS = [a[6:] for a in sys.argv if a.startswith("--tls=")]


def context(lo=None, hi=None):
    c = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    c.check_hostname = False
    c.verify_mode = ssl.CERT_NONE
    c.set_ciphers("DEFAULT:@SECLEVEL=0")
    if lo:
        c.minimum_version = lo
    if hi:
        c.maximum_version = hi
    return c


def up(c, **k):
    """STARTTLS, and the handshake."""
    assert c.last(5) == ACK
    c.s = context(**k).wrap_socket(c.s)
    return c


def tls_cases(kind):
    del cases[:]
    req = kind == "required"

    def before(o):
        c = C().greet()
        d = I(len(NAME)) + NAME + b"\0\0" if o in (6, 7) else b""
        t = c.last(o, d)
        if req:
            _eq(t, E_TLSREQ)
        elif o in (6, 7):
            _in(t, (ACK, E_TLSREQ, E_UNKNOWN))
        else:
            assert t != E_TLSREQ
        if t != ACK or o not in (7,):
            up(c)
            assert c.go()[-1][0] == ACK
            c.alive()
            c.disc()

    many("before TLS", [3, 6, 7, 8, 9, 10, 11, 77, 0xFFFFFFFF], before)

    def abort_before():
        c = C().greet()
        _eq(c.last(2), ACK)
        assert c.closed()

    cases.append(("ABORT before TLS is acked", abort_before))

    def export_name_before():
        c = C().greet()
        c.opt(1, NAME)
        assert c.closed() or not req

    if req:
        cases.append(("EXPORT_NAME before TLS closes", export_name_before))

    def starttls_data():
        c = C().greet()
        _eq(c.last(5, b"x" * 7), E_INVALID)
        up(c)
        assert c.go()[-1][0] == ACK
        c.alive()
        c.disc()

    cases.append(("STARTTLS with data is INVALID, and may come again", starttls_data))

    def twice():
        c = up(C().greet())
        _eq(c.last(5), E_INVALID)
        c.hag()
        assert c.go()[-1][0] == ACK
        c.alive()
        c.disc()

    cases.append(("STARTTLS in TLS is INVALID", twice))

    def never_reqd(o):
        c = up(C().greet())
        assert c.last(o) != E_TLSREQ
        c.hag()
        assert c.last(2) == ACK
        assert c.closed()

    many("in TLS nothing is TLS_REQD", [3, 6, 8, 9, 10, 11, 77], never_reqd)

    def garbage(b):
        c = C().greet()
        assert c.last(5) == ACK
        try:
            c.send(b)
        except OSError:
            pass
        c.s.shutdown(socket.SHUT_WR)
        _eofany(c)

    many(
        "garbage for a ClientHello",
        [
            b"\0" * 100,
            b"\x16\x03\x01\xff\xff" + b"a" * 200,
            b"\x16\x03\x01\0\x05hello",
            b"\x17\x03\x03\0\0",
            b"\x15\x03\x03\0\2\2\x28",
            b"\x16\x03\x03\0\0" * 50,
            b"GET / HTTP/1.0\r\n\r\n",
            struct.pack(">QII", IHAVEOPT, 3, 0),
        ],
        garbage,
    )

    def injected(n):
        c = C().greet()
        b = struct.pack(">QII", IHAVEOPT, 8, 0)
        c.send(struct.pack(">QII", IHAVEOPT, 5, 0) + b[:n])
        try:
            assert c.rep(5)[0] == ACK
        except Closed:
            return
        try:
            c.s = context().wrap_socket(c.s)
        except (ssl.SSLError, OSError):
            return
        # If a handshake came of it, what was sent in the clear must not have been heard.
        c.opt(9, I(len(NAME)) + NAME + I(0))
        _eq(c.reps(9)[-1][0], E_INVALID)

    many("bytes in the clear behind STARTTLS", [1, 8, 16], injected)

    def vanish(n):
        c = C().greet()
        assert c.last(5) == ACK
        out = ssl.MemoryBIO()
        o = context().wrap_bio(ssl.MemoryBIO(), out)
        try:
            o.do_handshake()
        except ssl.SSLWantReadError:
            pass
        c.send(out.read()[:n])
        c.s.close()

    many("vanish in the handshake after", [0, 1, 5, 6, 100, 100000], vanish)

    def forgotten():
        c = C().greet()
        c.last(8)
        c.mode = 0
        up(c)
        _eq(c.meta()[-1][0], E_INVALID)
        assert c.go()[-1][0] == ACK
        c.alive()
        c.disc()

    cases.append(("what was agreed in the clear is forgotten", forgotten))

    def old(v):
        c = C().greet()
        assert c.last(5) == ACK
        try:
            c.s = context(hi=v, lo=ssl.TLSVersion.TLSv1).wrap_socket(c.s)
        except (ssl.SSLError, OSError):
            return
        raise AssertionError("an old TLS was accepted")

    many("TLS 1.0 and 1.1 are refused", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1], old)

    def versions(v):
        for m in (0, 1, 2):
            c = up(C().greet(), lo=v, hi=v)
            if m == 1:
                c.sr()
            if m == 2:
                c.eh()
            assert c.go()[-1][0] == ACK
            c.alive()
            assert c.call(99) == 22
            assert c.call(4, 1 << 60, 512) == 22
            k = c.req(1, c.size, 4096, 32 if m == 2 else 0, b"z" * 4096)
            assert c.reply(0, k)[0] == 28
            c.alive()
            c.req(2)
            # close_notify, not a cut: recv says so by returning instead of raising.
            assert c.s.recv(1) == b""

    many("a session over", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], versions)

    def clear_in_tls():
        c = up(C().greet())
        assert c.go()[-1][0] == ACK
        raw = socket.socket(fileno=c.s.detach())
        raw.settimeout(T)
        raw.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 512) + b"\0" * 64)
        raw.shutdown(socket.SHUT_WR)
        try:
            while raw.recv(4096):
                pass
        except ConnectionResetError:
            pass

    cases.append(("clear bytes in a TLS session end it", clear_in_tls))

    def cut_in_tls():
        c = up(C().greet())
        assert c.go()[-1][0] == ACK
        c.send(struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 0, 65536) + b"q" * 100)
        raw = socket.socket(fileno=c.s.detach())
        raw.close()
        d = up(C().greet())
        assert d.go()[-1][0] == ACK
        d.alive()
        d.disc()

    cases.append(("vanish in a payload over TLS", cut_in_tls))

    def bad_in_tls(b):
        c = up(C().greet())
        c.send(b)
        assert c.closed()

    many("bad magic in TLS closes", [b"\0" * 16, struct.pack(">QII", IHAVEOPT ^ 1, 3, 0)], bad_in_tls)

    def renegotiate():
        # The first record of a new handshake, encrypted as data: it is data, and no option.
        c = up(C().greet())
        c.send(b"\x16\x03\x01\0\x05hello-world")
        assert c.closed()

    cases.append(("a ClientHello as data", renegotiate))


if TLS:
    tls_cases(TLS[0])
only = [a[7:] for a in sys.argv if a.startswith("--only=")]
bad = 0
n = 0
for name, f in cases:
    if only and not any(o in name for o in only):
        continue
    n += 1
    for attempt in (0, 1):
        try:
            f()
            r = "ok"
        except socket.timeout:
            r = "HANG (no answer in %gs)" % T
        except (Closed, ssl.SSLEOFError):
            r = "closed by the server"
        except (AssertionError, ConnectionError, OSError, struct.error) as e:
            r = f"{type(e).__name__} {e}"
        if r == "ok" or not r.startswith("ConnectionRefused"):
            break
        time.sleep(0.5)
    if r != "ok":
        bad += 1
        print("FAIL", name, ":", r, flush=True)
    if name.startswith("huge") or "vanish" in name or n % 50 == 0:
        try:
            x = up(C().greet()) if TLS else C().enter(1)
            if TLS:
                assert x.go()[-1][0] == ACK
            x.alive()
            x.disc()
        except Exception as e:
            print("FATAL: the server serves no more after", name, repr(e))
            sys.exit(1)
print(f"{n} dialogues, {n-bad} as the document says, {bad} not")
