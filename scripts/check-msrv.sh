#!/usr/bin/env bash
# Checks that Cargo.lock is complete and that the toolchain in use is at least the declared rust-version.
# (With that very version installed, cargo itself compiles with it; CI's toolchain is that version.)
set -euo pipefail
cd "$(dirname "$0")/.."
declared=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
[ -n "$declared" ] || { echo "check-msrv: Cargo.toml declares no rust-version" >&2; exit 1; }
used=$(rustc --version | cut -d' ' -f2)
oldest=$(printf '%s\n%s\n' "$declared" "${used%%-*}" | sort -V | head -n1)
if [ "$oldest" != "$declared" ] && [ "$declared" != "${used%%-*}" ]; then
    echo "check-msrv: rustc $used is older than the declared rust-version $declared; run: rustup update" >&2
    exit 1
fi
${CARGO:-cargo} check --locked --quiet
echo "rust-version $declared declared; Cargo.lock is complete; checked with rustc $used"
