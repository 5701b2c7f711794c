# The options of the handshake through libnbd. argv: URI of "", names of the exports (comma), a description of the first
import errno, nbd, sys

uri, names, description = sys.argv[1], sys.argv[2].split(","), sys.argv[3]


def haggle():
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.set_full_info(True)
    h.connect_uri(uri)
    return h


h = haggle()
listed = {}
assert h.opt_list(lambda name, text: listed.__setitem__(name, text)) == len(names)
assert sorted(listed) == sorted(names), listed
assert listed[names[0]] == description, listed

# INFO tells what GO would; an unknown export is an error, after which the next option works.
h.set_export_name("no such export")
try:
    h.opt_info()
    raise AssertionError("an unknown export")
except nbd.Error as e:
    assert e.errnum in (errno.ENOENT, errno.EINVAL), e
try:
    h.opt_go()
    raise AssertionError("an unknown export")
except nbd.Error as e:
    pass
h.set_export_name(names[0])
h.opt_info()
size = h.get_size()
assert h.get_canonical_export_name() == names[0]
assert h.get_export_description() == description
h.add_meta_context("base:allocation")
h.add_meta_context("base:nonsense")
h.add_meta_context("x-unknown:thing")
h.opt_go()
assert h.get_size() == size
assert h.can_meta_context("base:allocation")
assert not h.can_meta_context("base:nonsense")
h.pread(512, 0)
h.shutdown()

h = haggle()
contexts = []
h.set_export_name(names[0])
h.opt_list_meta_context(contexts.append)
assert contexts == ["base:allocation"], contexts
contexts.clear()
h.add_meta_context("base:")
h.opt_list_meta_context(contexts.append)
assert contexts == ["base:allocation"], contexts
h.opt_abort()

# Names that are no exports are only names.
for name in ("../disk.raw", "/etc/passwd", "a" * 4096, "\u00e4\u00f6 \U0001f980"):
    h = haggle()
    h.set_export_name(name)
    try:
        h.opt_go()
        raise AssertionError(name)
    except nbd.Error:
        pass
    h.opt_abort()
print("ok")
