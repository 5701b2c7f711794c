#!/usr/bin/env bash
# Runs test suites that others wrote against conbd, and a torture of raw-socket dialogues. Their sources come from
# Debian (apt, as root), are built under target/foreign and never enter the repository.
#
#   make test-foreign                    everything, about half an hour on two cores
#   SUITES="torture nbd" make test-foreign
#   CONBD=target/debug/conbd ...         another binary
#
# Suites: torture (scripts/foreign/torture.py), nbd (nbd-tester-client and simple_test of the nbd project),
# libnbd (interop, tests, info and copy of libnbd), iotests (the tests of QEMU that use NBD, with conbd as qemu-nbd; each
# that fails is run with the real qemu-nbd, too: only what passes there counts against us).
#
# A line for each test: PASS, FAIL, SKIP (it says so itself, or its server is not conbd), SAME (fails with QEMU's own
# server in the same way), KNOWN (differs for a reason that is in known() below). Ends with 1 if anything is FAIL.
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD
export CONBD=${CONBD:-$root/target/release/conbd}
CONBD=$(realpath "$CONBD")
suites=${SUITES:-torture nbd libnbd iotests}
work=$root/target/foreign
mkdir -p "$work/bin" "$work/logs" "$work/tmp"
export TMPDIR=$work/tmp
passed=0 failed=0 skipped=0

die() { echo "foreign-test: $*" >&2; exit 1; }
[ -x "$CONBD" ] || die "there is no $CONBD; build it first (make build)"
[ "$(id -u)" = 0 ] || die "run as root: it installs packages, and gives each suite a network of its own (unshare -n)"
command -v apt-get >/dev/null || die "there is no apt-get: the sources come from Debian"

# Tests that ask for what conbd does on purpose in another way.
known() {
    case $1 in
    nbd/tree | nbd/rotree) echo "treefiles are not offered" ;;
    tests/errors-server-zerosize) echo "a read of 0 bytes is answered with success, as by qemu-nbd" ;;
    tests/get-subprocess-pid) echo "the pid file is removed at the end" ;;
    info/info-null.sh) echo "an empty image is not served" ;;
    info/info-packets.sh) echo "asks nbdkit to hide extended headers" ;;
    info/info-map-*) echo "the holes of a file are finer than those of nbdkit's data plugin" ;;
    info/test-version.sh | copy/test-version.sh) echo "of the installed tools, not of a server" ;;
    iotests/*-233) echo "TLS errors have OpenSSL's words, and refusals are alerts instead of cut connections" ;;
    *) return 1 ;;
    esac
}

verdict() { # SUITE/TEST RESULT [WHY]
    local result=$2 why=${3:-}
    if [ "$result" = FAIL ] && reason=$(known "$1"); then result=KNOWN why=$reason; fi
    case $result in
    PASS) passed=$((passed + 1)) ;;
    FAIL) failed=$((failed + 1)) ;;
    *) skipped=$((skipped + 1)) ;;
    esac
    echo "$result $1${why:+ ($why)}"
}

install() {
    local missing=()
    for entry in "$@"; do
        dpkg -s "$entry" >/dev/null 2>&1 || missing+=("$entry")
    done
    [ "${#missing[@]}" = 0 ] && return
    # --no-remove: a distribution's older qemu must not replace a newer one.
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends --no-remove "${missing[@]}" ||
        die "cannot install ${missing[*]}"
}

# Fetches Debian's newest source of a package whose version begins with $2: prints its folder.
source_of() {
    local apt=$work/apt package=$1 version
    if [ ! -e "$apt/conf" ]; then
        mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
        for suite in bookworm-backports trixie; do
            echo "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian $suite main"
        done >"$apt/sources.list"
        cat >"$apt/conf" <<CONF
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "/nonexistent";
Dir::State::lists "$apt/lists";
Dir::Cache "$apt/cache";
APT::Sandbox::User "root";
CONF
        APT_CONFIG=$apt/conf apt-get update -qq || { rm "$apt/conf"; die "apt-get update failed"; }
    fi
    version=$(APT_CONFIG=$apt/conf apt-cache showsrc "$package" | sed -n 's/^Version: //p' | grep -E "^([0-9]:)?$2" | sort -V | head -n1)
    [ -n "$version" ] || die "Debian has no source of $package $2 any more"
    if ! compgen -G "$work/$package-*/" >/dev/null; then
        # Signatures and Debian's changes are not needed: the tarball is what its authors released.
        (cd "$work" && APT_CONFIG=$apt/conf apt-get source --download-only "$package=$version" >"$work/logs/$package.apt" 2>&1)
        (cd "$work" && tar -xf "$(compgen -G "${package}_*.orig.tar.[gx]z" | head -n1)") || die "cannot fetch $package $version"
    fi
    (cd "$work" && echo "$work/$(compgen -G "$package-*/" | head -n1)")
}

# Runs a command with a loopback of its own, so that fixed ports are free.
alone() { unshare -n sh -c 'ip link set lo up; exec "$@"' sh "$@"; }

torture() {
    install openssl
    for how in serve qemu-nbd qcow2 required selective; do
        local dir code
        dir=$(mktemp -d)
        truncate -s 8M "$dir/disk"
        case $how in
        serve) exec "$CONBD" serve --format raw --export x --socket "$dir/s" "$dir/disk" ;;
        qemu-nbd) exec "$CONBD" qemu-nbd -t -e 0 -f raw --discard=unmap -x x -k "$dir/s" "$dir/disk" ;;
        required | selective)
            openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$dir/key" -out "$dir/cert" -subj /CN=localhost &&
                exec "$CONBD" serve --format raw --export x --tls "$how" --tls-cert "$dir/cert" --tls-key "$dir/key" --socket "$dir/s" "$dir/disk"
            ;;
        qcow2) "$CONBD" create "$dir/disk.qcow2" 8M && exec "$CONBD" serve --export x --socket "$dir/s" "$dir/disk.qcow2" ;;
        esac >"$dir/out" 2>&1 &
        local pid=$!
        for _ in $(seq 100); do [ -S "$dir/s" ] && break; sleep 0.1; done
        case $how in
        required | selective) timeout 300 python3 -W ignore scripts/foreign/torture.py "$dir/s" x "--tls=$how" ;;
        *) timeout 300 python3 scripts/foreign/torture.py "$dir/s" x ;;
        esac
        code=$?
        kill "$pid"
        wait "$pid" || code=1
        if grep -qi panic "$dir/out"; then code=1; fi
        if [ "$code" = 0 ]; then verdict "torture/$how" PASS; else verdict "torture/$how" FAIL "see $dir"; fi
    done
}

nbd() {
    install gcc make pkg-config libglib2.0-dev libgnutls28-dev bison flex iproute2
    local dir quiet="AUTOMAKE=: ACLOCAL=: AUTOCONF=: AUTOHEADER=: MAKEINFO=:"
    dir=$(source_of nbd 3) || exit 1
    if [ ! -x "$dir/tests/run/nbd-tester-client" ]; then
        # shellcheck disable=SC2086
        (cd "$dir" && DB2M=true ./configure && make $quiet nbd-client && cd tests/run && make $quiet nbd-tester-client &&
            gcc -O1 -DISSERVER -DHAVE_CONFIG_H -I../.. $(pkg-config --cflags glib-2.0 gnutls) -o nbd-tester-inetd \
                nbd-tester-client.c cliserv.c buffer.c crypto-gnutls.c $(pkg-config --libs glib-2.0 gnutls)) \
            >"$work/logs/nbd.build" 2>&1 || die "nbd does not build, see $work/logs/nbd.build"
    fi
    ln -sf "$root/scripts/foreign/nbd-server" "$dir/nbd-server"
    # The client speaks to a server at its stdin only in a build of its own.
    sed 's#./nbd-tester-client -N export1 -I#./nbd-tester-inetd -N export1 -I#' "$dir/tests/run/simple_test" >"$dir/tests/run/run_test"
    chmod +x "$dir/tests/run/run_test"
    for t in cfg1 cfgmulti cfgnew cfgsize write flush integrity dirconfig list inetd rowrite tree rotree unix integrityhuge \
        handshake tls tlswrongcert tlshuge; do
        (cd "$dir/tests/run" && alone timeout 180 ./run_test "./$t") >"$work/logs/nbd.$t" 2>&1
        case $? in 0) verdict "nbd/$t" PASS ;; 77) verdict "nbd/$t" SKIP ;; *) verdict "nbd/$t" FAIL "see $work/logs/nbd.$t" ;; esac
    done
}

libnbd() {
    install gcc g++ make pkg-config libxml2-dev libgnutls28-dev gnutls-bin python3-dev nbdkit qemu-utils iproute2
    local dir bin=$work/bin
    dir=$(source_of libnbd 1.2) || exit 1
    ln -sf "$CONBD" "$bin/qemu-nbd"
    ln -sf "$root/scripts/foreign/nbd-server" "$bin/nbd-server"
    ln -sf "$root/scripts/foreign/nbdkit" "$bin/nbdkit"
    if [ ! -e "$dir/built" ]; then
        (cd "$dir" && QEMU_NBD=$bin/qemu-nbd NBD_SERVER=$bin/nbd-server NBDKIT=$bin/nbdkit ./configure --disable-ocaml \
            --disable-golang --disable-rust --disable-fuse --disable-ublk && make && for d in interop tests info copy; do
            make -k -C "$d" check TESTS= || exit 1
        done && touch built) >"$work/logs/libnbd.build" 2>&1 || die "libnbd does not build, see $work/logs/libnbd.build"
    fi
    sed -i 's#exportname = /dev/null#exportname = '"$work"'/empty#' "$dir/interop/list-exports-nbd-config"
    truncate -s 1M "$work/empty"
    for d in interop tests info copy; do
        printf 'include Makefile\nall-tests:\n\t@echo $(TESTS)\n' >"$dir/$d/list.mk"
        for t in $(make -s -C "$dir/$d" -f list.mk all-tests); do
            # Of the library or its tools alone.
            case $t in code-* | test-* | functions.sh) continue ;; esac
            local log program=$t code
            log=$work/logs/$d.$(basename "$t")
            rm -f "$log.real"
            [ -x "$dir/$d/$t" ] && program=./$t
            (cd "$dir/$d" && export srcdir=. builddir=. top_srcdir=.. top_builddir=.. LIBNBD_DEBUG=1 LC_ALL=C CONBD_LOG=warn \
                CONBD_FOREIGN_LOG=$log.real && alone timeout 120 ../run "$program") >"$log" 2>&1 </dev/null
            code=$?
            # Asking a program for its version is no serving.
            if [ -e "$log.real" ] && grep -qv -e --version -e --dump -e --help "$log.real"; then
                verdict "$d/$t" SKIP "the server is nbdkit itself"
            else
                case $code in 0) verdict "$d/$t" PASS ;; 77) verdict "$d/$t" SKIP ;; *) verdict "$d/$t" FAIL "see $log" ;; esac
            fi
        done
    done
}

# What iotests call: FORMAT PROTOCOL TEST PROGRAM.
iotest() {
    (cd "$iotests" && export QEMU_NBD_PROG=$4 QEMU_PROG=$work/bin/qemu-system-x86_64 QEMU_IMG_PROG=/usr/bin/qemu-img \
        QEMU_IO_PROG=/usr/bin/qemu-io QSD_PROG=/usr/bin/qemu-storage-daemon TEST_DIR=$work/tmp/$1-$2-$(basename "$4") \
        SOCK_DIR=$(mktemp -d) && mkdir -p "$TEST_DIR" && alone timeout 240 ./check "-$1" $([ "$2" = file ] || echo "-$2") "$3")
}

iotests() {
    command -v qemu-system-x86_64 >/dev/null || { verdict iotests SKIP "qemu-system-x86_64 is not installed"; return; }
    local dir version list
    version=$(qemu-img --version | sed -n '1s/.*version \([0-9.]*\).*/\1/p')
    dir=$(source_of qemu "$version") || exit 1
    iotests=$dir/tests/qemu-iotests
    # Debian's QEMU has no qtest accelerator.
    cat >"$work/bin/qemu-system-x86_64" <<'STUB'
#!/bin/bash
args=()
for a in "$@"; do
    [ "$a" = qtest ] && [ "${args[-1]}" = -accel ] && a=tcg
    args+=("$a")
done
exec /usr/bin/qemu-system-x86_64 "${args[@]}"
STUB
    chmod +x "$work/bin/qemu-system-x86_64"
    ln -sf "$CONBD" "$work/bin/qemu-nbd"
    list=$(cd "$iotests" && grep -lE 'qemu-nbd|QEMU_NBD|qemu_nbd|\bnbd\b' [0-9][0-9][0-9] tests/* | grep -v '\.out$' | xargs -n1 basename)
    for how in raw:nbd raw:file qcow2:file; do
        local tests=$list
        # Over nbd every test has a server beneath, whatever it is about.
        [ "$how" = raw:nbd ] && tests=$(cd "$iotests" && ls -d [0-9][0-9][0-9] tests/* | grep -v '\.out$' | xargs -n1 basename)
        for t in $tests; do
            local log=$work/logs/iotests.$how-$t name=iotests/$how-$t
            iotest "${how%:*}" "${how#*:}" "$t" "$work/bin/qemu-nbd" >"$log" 2>&1 </dev/null
            if grep -q '^Passed all 1 ' "$log"; then
                verdict "$name" PASS
            elif grep -qE '^(Not run|Passed all 0 )' "$log"; then
                verdict "$name" SKIP
            else
                iotest "${how%:*}" "${how#*:}" "$t" /usr/bin/qemu-nbd >"$log.real" 2>&1 </dev/null
                if grep -q '^Passed all 1 ' "$log.real"; then
                    verdict "$name" FAIL "see $log"
                else
                    verdict "$name" SAME
                fi
            fi
        done
    done
}

for suite in $suites; do
    case $suite in
    torture | nbd | libnbd | iotests) echo "==> $suite"; "$suite" ;;
    *) die "unknown suite $suite" ;;
    esac
done
echo "foreign: $passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
