#!/usr/bin/env bash
# Runs every check, in the order in which a failure is cheapest to see. Stops at the first failure;
# the summary at the end names the steps that ran, the one that failed and the ones not reached.
set -uo pipefail
cd "$(dirname "$0")/.."

CARGO=${CARGO:-cargo}
steps=(
    "what the build needs:scripts/build-deps.sh"
    "tools:scripts/test-deps.sh"
    "format:$CARGO fmt --all -- --check"
    "lockfile and MSRV:scripts/check-msrv.sh"
    "clippy:$CARGO clippy --locked --all-targets -- -D warnings"
    "rustdoc:env RUSTDOCFLAGS=-Dwarnings $CARGO doc --locked --no-deps --document-private-items"
    "unit tests:$CARGO test --locked --lib --bins"
    "integration tests:$CARGO test --locked --test it"
    "qcow2, the proof:$CARGO test --locked --test qcow2"
    "interoperation with other clients and servers:$CARGO test --locked --test interop"
    "every fast path off:env CONBD_FAST=off $CARGO test --locked --test it --test qcow2"
    "every fast path forced:env CONBD_FAST=forced $CARGO test --locked --test it --test qcow2"
    "concurrency models (loom):$CARGO test --locked --test loom"
    "doc tests:$CARGO test --locked --doc"
    "man pages are current:scripts/check-man.sh"
)

if ! command -v "$CARGO" >/dev/null; then
    echo "test: $CARGO is not installed; install Rust $(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml) or newer, see README.md" >&2
    exit 1
fi

ran=()
for i in "${!steps[@]}"; do
    name=${steps[$i]%%:*}
    command=${steps[$i]#*:}
    echo "==> $name: $command"
    begin=$SECONDS
    # Words are split on purpose: the commands above contain no quoting.
    # shellcheck disable=SC2086
    if ! $command; then
        echo
        echo "passed:      ${ran[*]:-nothing}"
        echo "FAILED:      $name   ($command)"
        for later in "${steps[@]:i+1}"; do echo "not reached: ${later%%:*}"; done
        exit 1
    fi
    ran+=("$name ($((SECONDS - begin)) s);")
done
echo
echo "all ${#ran[@]} steps passed: ${ran[*]}"
