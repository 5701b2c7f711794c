#!/usr/bin/env bash
# Makes sure that what the build needs beside Rust is there: a C compiler, pkg-config and OpenSSL's headers. Installs what is
# missing with apt when run as root on a Debian-like system; otherwise says what to install, and fails.
set -euo pipefail

missing_packages() {
    command -v cc >/dev/null || echo gcc
    command -v pkg-config >/dev/null || echo pkg-config
    # OPENSSL_DIR names an OpenSSL that pkg-config does not know.
    if [ -z "${OPENSSL_DIR:-}" ] && ! pkg-config --exists 'openssl >= 1.1.1' 2>/dev/null; then
        echo libssl-dev
    fi
}

mapfile -t missing < <(missing_packages)
[ "${#missing[@]}" -ne 0 ] || exit 0
if ! command -v apt-get >/dev/null; then
    echo "build-deps: missing: ${missing[*]} (Debian's names; elsewhere: a C compiler, pkg-config or pkgconf, openssl-devel); install them and run again" >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "build-deps: missing: ${missing[*]}; run: sudo apt-get install ${missing[*]}" >&2
    exit 1
fi
echo "build-deps: installing ${missing[*]}"
# gcc alone comes without the C library's headers when recommended packages are left out.
for package in "${missing[@]}"; do
    [ "$package" != gcc ] || missing+=(libc6-dev)
done
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"

mapfile -t missing < <(missing_packages)
if [ "${#missing[@]}" -ne 0 ]; then
    echo "build-deps: still missing after apt-get install: ${missing[*]}" >&2
    exit 1
fi
