#!/usr/bin/env bash
# Makes sure that the programs which the tests drive are installed, or those that are named: test-deps.sh [PROGRAM:PACKAGE ...].
# Installs what is missing with apt when run as root on a Debian-like system; otherwise says what to install, and fails.
set -euo pipefail

# program -> Debian package
programs=(
    cc:gcc
    python3:python3
    qemu-img:qemu-utils
    qemu-io:qemu-utils
    qemu-nbd:qemu-utils
    nbdinfo:libnbd-bin
    nbdcopy:libnbd-bin
    nbdsh:python3-libnbd
    nbdkit:nbdkit
    nbd-client:nbd-client
    nbd-server:nbd-server
    fio:fio
    strace:strace
    openssl:openssl
    psktool:gnutls-bin
    certtool:gnutls-bin
)
[ "$#" -eq 0 ] || programs=("$@")

# nbd-client lives in sbin, which is not on every user's path.
PATH=$PATH:/usr/sbin:/sbin

missing_packages() {
    local entry
    for entry in "${programs[@]}"; do
        command -v "${entry%%:*}" >/dev/null || echo "${entry#*:}"
    done
}

mapfile -t missing < <(missing_packages | sort -u)
if [ "${#missing[@]}" -eq 0 ]; then
    echo "test-deps: all ${#programs[@]} programs are there"
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "test-deps: missing: ${missing[*]} (Debian's package names), and there is no apt-get here; install them and run again" >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "test-deps: missing: ${missing[*]}; run as root: apt-get install ${missing[*]}" >&2
    exit 1
fi
echo "test-deps: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# policy-rc.d keeps packages such as nbd-server from starting a service by themselves.
made_policy=
if [ ! -e /usr/sbin/policy-rc.d ]; then
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod +x /usr/sbin/policy-rc.d
    made_policy=1
fi
trap '[ -z "$made_policy" ] || rm -f /usr/sbin/policy-rc.d' EXIT
apt-get install -y -qq --no-install-recommends "${missing[@]}"

mapfile -t missing < <(missing_packages | sort -u)
if [ "${#missing[@]}" -ne 0 ]; then
    echo "test-deps: still missing after apt-get install: ${missing[*]}" >&2
    exit 1
fi
echo "test-deps: all ${#programs[@]} programs are there"
