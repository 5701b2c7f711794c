#!/usr/bin/env python3
"""`make bench-count`: what the hot parts take in instructions, against what is committed in benches/counts.json.

Runs each part of benches/count.rs in valgrind N and 2N times; the difference divided by N is what one costs, without start and end of
the program. Counts repeat to a fraction of a percent, on a busy machine too, where times do not: so a part that takes more than the
tolerance above its committed count is an error. Then the functions that it is spent in are listed, or with FUNCTIONS=1 for all parts.

valgrind presents a CPU of its own to the program, with AVX and AVX2 if this machine has them and nothing newer, so that the C library picks
the same memcpy on most machines. Without AVX a copy takes twice the instructions. What of compiler, C library, valgrind and AVX is not as
it was for the committed counts is pointed out.

Environment: UPDATE=1 (write benches/counts.json instead of comparing), PARTS="co_switch ..." (only these), FUNCTIONS=1, CARGO.
"""
import json, os, platform, re, subprocess, sys, tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COUNTS = ROOT + "/benches/counts.json"
CARGO = os.environ.get("CARGO", "cargo")
FIRST = 10_000  # times, to see what a part is about
# Instructions that N times shall be about. Start and end differ by some 20 000 from run to run where there are other threads: 0.1 %.
WORK = 30_000_000
TOLERANCE = 5.0  # percent: inlining elsewhere moves a count by one or two
TIMEOUT_S = 120  # for one run; it takes a second or two
FUNCTIONS = 8  # listed per part


def on(name):
    return os.environ.get(name, "") not in ("", "0")


def fail(text):
    sys.exit(f"bench-count: {text}")


def run(what, command, **more):
    """Its standard output; a failure ends this program with the end of what it said."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, **more)
    except OSError as e:
        fail(f"{what}: {command[0]}: {e.strerror}; install it and run again")
    except subprocess.TimeoutExpired:
        fail(f"{what} hangs: it was stopped after {TIMEOUT_S} s; try it: {' '.join(command)}")
    if done.returncode != 0:
        said = "".join(f"\n  {line}" for line in (done.stderr or "").splitlines()[-15:])
        fail(f"{what} failed with status {done.returncode}; it was: {' '.join(command)}{said}")
    return done.stdout


def build():
    """The program that has the parts."""
    command = [CARGO, "bench", "--locked", "--no-run", "--bench", "count", "--message-format=json-render-diagnostics"]
    for line in run("the build", command).splitlines():
        message = json.loads(line)
        if message.get("reason") == "compiler-artifact" and message["target"]["name"] == "count" and message["executable"]:
            return message["executable"]
    fail(f"cargo did not say where the bench `count` is; it was: {' '.join(command)}")


def count(program, part, n, scratch):
    """Instructions of one run, by function."""
    out = f"{scratch}/{part}.{n}"
    # Nothing of the caller's environment: CONBD_FAST, say, chooses which code runs.
    env = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"}
    tool = ["valgrind", "--tool=cachegrind", "--cache-sim=no", f"--cachegrind-out-file={out}"]
    run(f"part {part}", [*tool, program, part, str(n)], env=env, stderr=subprocess.PIPE, timeout=TIMEOUT_S)
    functions, now, total = {}, None, None
    with open(out, errors="replace") as f:
        for line in f:
            if line.startswith("fn="):
                now = line[3:].strip()
            elif line.startswith("events:") and line.split()[1:] != ["Ir"]:
                fail(f"valgrind counts {line.strip()!r} where only Ir was asked for; is this version newer than 3.19 was?")
            elif line.startswith("summary:"):
                total = int(line.split()[1])
            elif line[0].isdigit() or line[0] in "+-*":
                functions[now] = functions.get(now, 0) + int(line.split()[1])
    if total is None or total != sum(functions.values()):
        fail(f"part {part}: valgrind's summary is {total}, its functions sum up to {sum(functions.values())}")
    return functions


def per_operation(program, part, scratch):
    """Instructions of one operation, by function."""
    # More than it takes, by start and end of the program; that only makes N smaller.
    about = sum(count(program, part, FIRST, scratch).values()) / FIRST
    n = max(FIRST, int(WORK / about))
    once, twice = (count(program, part, times, scratch) for times in (n, 2 * n))
    return {name: (twice.get(name, 0) - once.get(name, 0)) / n for name in once.keys() | twice.keys()}


def machine():
    with open("/proc/cpuinfo") as f:
        text = f.read()
    model = re.search(r"^model name\s*: (.*)$", text, re.M)
    return {
        "arch": platform.machine(),
        "cpu": model.group(1) if model else "unknown",
        "avx": "yes" if re.search(r"^flags\s*:.* avx2?\b", text, re.M) else "no",
        "libc": " ".join(platform.libc_ver()),
        "rustc": run("rustc", ["rustc", "--version"]).strip(),
        "valgrind": run("valgrind", ["valgrind", "--version"]).strip(),
    }


def list_functions(functions):
    total = sum(functions.values())
    for name, cost in sorted(functions.items(), key=lambda f: -f[1])[:FUNCTIONS]:
        if cost >= total / 100:
            print(f"    {cost:>10.1f}  {name if len(name) <= 110 else name[:107] + '...'}")


def main():
    program, here = build(), machine()
    what = dict(line.split("\t") for line in run("count --list", [program, "--list"]).splitlines())
    chosen = os.environ.get("PARTS", "").split() or list(what)
    for part in chosen:
        if part not in what:
            fail(f"PARTS names {part!r}, which is no part; there are: {', '.join(what)}")
    committed = {"machine": here, "parts": {}}
    if os.path.exists(COUNTS):
        with open(COUNTS) as f:
            committed = json.load(f)
    there, expected = committed["machine"], committed["parts"]
    if not on("UPDATE") and there["arch"] != here["arch"]:
        fail(f"benches/counts.json is of {there['arch']}, this is {here['arch']}: instructions don't compare; "
             "write your own, to compare with: make bench-count UPDATE=1")

    print(f"{'part':<18} {'instructions':>12} {'committed':>10} {'change':>8}")
    counted, dear, cheap, new = {}, [], [], []
    with tempfile.TemporaryDirectory(prefix="conbd-count") as scratch:
        for part in chosen:
            functions = per_operation(program, part, scratch)
            got, want = round(sum(functions.values()), 1), expected.get(part)
            if got <= 0:
                fail(f"part {part} takes {got} instructions: the compiler removed its loop; give its input through black_box")
            counted[part] = got
            change = None if want is None else (got / want - 1) * 100
            shown = "new" if change is None else f"{change:+.1f} %"
            print(f"{part:<18} {got:>12.1f} {want if want is not None else '-':>10} {shown:>8}  {what[part]}", flush=True)
            if want is None:
                new.append(part)
            elif change > TOLERANCE:
                dear.append(f"{part} takes {got} instructions, {change:.1f} % more than the committed {want}")
            elif change < -TOLERANCE:
                cheap.append(part)
            if on("FUNCTIONS") or change is not None and change > TOLERANCE:
                list_functions(functions)

    if on("UPDATE"):
        # A part that was not chosen keeps its count.
        parts = {part: counted.get(part, expected.get(part)) for part in what if part in counted or part in expected}
        with open(COUNTS, "w") as f:
            json.dump({"machine": here, "parts": parts}, f, indent=2)
            f.write("\n")
        print(f"wrote {len(counted)} of {len(parts)} parts to benches/counts.json")
        return
    differs = [f"{key}: {here[key]}, committed with {there.get(key)}" for key in ("avx", "libc", "rustc", "valgrind")
               if here[key] != there.get(key)]
    if differs:
        print(f"Not what the committed counts are of, which may explain differences: {'; '.join(differs)}")
    if cheap:
        print(f"Cheaper than committed: {', '.join(cheap)}. To hold on to it: make bench-count UPDATE=1")
    unknown = [f"{part} has no committed count" for part in new]
    unknown += [f"{part} is committed and no part any more" for part in expected if part not in what]
    if dear:
        fail("; ".join(dear) + f". More than {TOLERANCE:g} % is an error. Mend it, or if it is worth it (say why in the commit): "
             "make bench-count UPDATE=1")
    if unknown:
        fail("; ".join(unknown) + ". To write what there is: make bench-count UPDATE=1")
    print(f"{len(counted)} of {len(what)} parts counted, none takes {TOLERANCE:g} % more than committed")


main()
