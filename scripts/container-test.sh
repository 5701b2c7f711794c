#!/usr/bin/env bash
# Builds the Dockerfile as it is, both stages, on a machine without Docker and without its registry: buildah with bases made by
# debootstrap, the build's with the Rust toolchain of this machine. Then serves from the image and lets its health check look.
# As root on Debian. Takes minutes, a GB or three below $DIR, and needs a Debian mirror and crates.io: not part of `make test`.
set -euo pipefail
cd "$(dirname "$0")/.."
DIR=${DIR:-$(mktemp -d /var/tmp/conbd-container.XXXXXX)}
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot
b() { buildah --root "$DIR/storage" --runroot "$DIR/run" "$@"; }
cleanup() {
    [ -z "${server:-}" ] || kill "$server" 2>/dev/null || true
    b rm -a >/dev/null 2>&1 || true
    rm -rf "$DIR"
}
trap cleanup EXIT

for tool in buildah debootstrap; do
    command -v $tool >/dev/null || need="${need:-} $tool"
done
[ -z "${need:-}" ] || DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends --no-remove $need

echo "==> the bases"
mkdir -p "$DIR/slim"
debootstrap --variant=minbase --include=ca-certificates bookworm "$DIR/slim" >"$DIR/debootstrap.log" 2>&1 ||
    { tail -5 "$DIR/debootstrap.log" >&2; exit 1; }
c=$(b from scratch)
b add -q "$c" "$DIR/slim" / >/dev/null
b commit -q "$c" localhost/slim >/dev/null
# Certificates of this machine: its way to the registries may need one of its own.
b run "$c" -- sh -c 'mkdir -p /usr/local/share/ca-certificates'
if ls /usr/local/share/ca-certificates/*.crt >/dev/null 2>&1; then
    b copy -q "$c" /usr/local/share/ca-certificates /usr/local/share/ca-certificates >/dev/null
    b run "$c" -- update-ca-certificates >/dev/null 2>&1
fi
toolchain=$(rustc --print sysroot)
for part in bin lib libexec; do
    [ ! -d "$toolchain/$part" ] || b copy -q "$c" "$toolchain/$part" "/usr/local/$part" >/dev/null
done
b commit -q "$c" localhost/rust >/dev/null
b rm "$c" >/dev/null

echo "==> the Dockerfile"
b build --format docker --build-arg RUST_IMAGE=localhost/rust --build-arg BASE_IMAGE=localhost/slim -t localhost/conbd .

echo "==> what it holds"
b inspect --type image --format '{{.Docker.Config.User}} {{.Docker.Config.Entrypoint}} {{.Docker.Config.Cmd}}' localhost/conbd
c=$(b from localhost/conbd)
root=$(b mount "$c")
truncate -s 16M "$root/disk.raw"
chown 65532:65532 "$root/disk.raw"
port=$((20000 + RANDOM % 20000))
# As its user, with nothing but what is in the image.
in_image() { chroot --userspec=65532:65532 "$root" "$@"; }
in_image conbd --version
# Not through the function: the process to end would be its subshell.
chroot --userspec=65532:65532 "$root" conbd serve /disk.raw --listen "127.0.0.1:$port" &
server=$!
for _ in $(seq 100); do
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && break
    sleep 0.1
done
health=$(sed -n 's/^HEALTHCHECK .*CMD \[\(.*\)\]$/\1/p' Dockerfile | tr -d '",' | sed "s/10809/$port/")
in_image $health
# TLS is there: the libraries came along, and say that this server has none.
said=$(in_image conbd inspect "nbds://127.0.0.1:$port/" 2>&1) && { echo "container-test: TLS where there is none" >&2; exit 1; }
grep -F 'does not offer TLS' <<<"$said"
kill "$server"
wait "$server"
server=
echo "container-test: passed"
