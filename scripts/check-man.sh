#!/usr/bin/env bash
# Fails when man/ is not what `make man` would write.
set -euo pipefail
cd "$(dirname "$0")/.."
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
${CARGO:-cargo} run --locked --quiet -- gen-man "$fresh"
if ! diff -ru man "$fresh"; then
    echo "check-man: man/ is out of date; run: make man" >&2
    exit 1
fi
