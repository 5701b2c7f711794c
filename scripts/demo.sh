#!/usr/bin/env bash
# `make run`: makes a small demo disk under target/demo and serves it on loopback, until Ctrl-C.
set -euo pipefail
cd "$(dirname "$0")/.."

conbd=target/release/conbd
dir=target/demo
image=$dir/disk.raw
socket=$PWD/$dir/conbd.sock
mkdir -p "$dir"
if [ ! -e "$image" ]; then
    printf 'This is a demo disk of conbd. Write whatever you like on it.\n' >"$image"
    truncate -s 256M "$image"
fi

# The first free port from NBD's own on.
port=
for candidate in $(seq 10809 10839); do
    if ! (exec 3<>"/dev/tcp/127.0.0.1/$candidate") 2>/dev/null; then
        port=$candidate
        break
    fi
done
[ -n "$port" ] || { echo "demo: no free port between 10809 and 10839 on loopback" >&2; exit 1; }

uri=nbd://127.0.0.1:$port/
cat <<TEXT
Serving $image (256 MiB, sparse). In another terminal, try for example:

  $conbd inspect $uri
  $conbd bench $uri --time 5s --connections 4 --depth 16
  qemu-img info $uri
  qemu-img convert -p -O qcow2 $uri $dir/copy.qcow2
  nbdinfo --map $uri
  nbdcopy --progress $uri $dir/copy.raw

Ctrl-C stops the server; what was written stays in $image.

TEXT
# A unix socket path has at most 107 bytes.
listen=(--listen "127.0.0.1:$port")
if [ "${#socket}" -le 107 ]; then listen+=(--socket "$socket"); fi
exec "$conbd" serve "$image" --format raw "${listen[@]}" --description "conbd demo disk"
