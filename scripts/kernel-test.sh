#!/usr/bin/env bash
# `make test-kernel`: a real Linux kernel and QEMU as clients of the release binary.
#
# Boots Debian's cloud kernel in an emulated machine (no KVM needed, a minute or two). Inside, nbd-client attaches
# /dev/nbd0 over four connections; the guest makes an ext4, writes, reads back past its cache, trims, checks the
# file system, and reads the same disk through QEMU's own NBD client (a virtio disk). Not part of `make test`: it
# downloads a kernel and an emulator with apt, and needs root for that.
set -euo pipefail
cd "$(dirname "$0")/.."

conbd=$PWD/target/release/conbd
work=$PWD/target/kernel-test
[ -x "$conbd" ] || { echo "kernel-test: $conbd is not there; run: make build" >&2; exit 1; }
export DEBIAN_FRONTEND=noninteractive

# What the guest and the host need, as program:package.
missing=()
for entry in qemu-system-x86_64:qemu-system-x86 busybox:busybox-static cpio:cpio nbd-client:nbd-client \
    mke2fs:e2fsprogs fstrim:util-linux; do
    PATH=$PATH:/usr/sbin:/sbin command -v "${entry%%:*}" >/dev/null || missing+=("${entry#*:}")
done
if [ "${#missing[@]}" -gt 0 ]; then
    [ "$(id -u)" = 0 ] || { echo "kernel-test: run as root: apt-get install ${missing[*]}" >&2; exit 1; }
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends --no-remove "${missing[@]}"
fi

mkdir -p "$work"
if ! compgen -G "$work/root/boot/vmlinuz-*" >/dev/null; then
    package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9][^ ]*\)$/\1/p' | head -n1)
    [ -n "$package" ] || { echo "kernel-test: apt knows no linux-image-cloud-amd64 here" >&2; exit 1; }
    (cd "$work" && apt-get -o APT::Sandbox::User=root download -qq "$package" && dpkg -x "$package"_*.deb root)
fi
kernel=$(compgen -G "$work/root/boot/vmlinuz-*" | head -n1)

# The guest: busybox, nbd-client, ext4 tools and their libraries, and the modules of a virtual machine.
initrd=$work/initrd
rm -rf "$initrd"
mkdir -p "$initrd"/{bin,sbin,dev,proc,sys,mnt,modules,etc}
cp "$(command -v busybox)" "$initrd/bin/"
for program in nbd-client mke2fs e2fsck fstrim; do
    path=$(PATH=$PATH:/usr/sbin:/sbin command -v "$program")
    cp "$path" "$initrd/sbin/"
    ldd "$path" | grep -o '/[^ ]*' | while read -r library; do
        mkdir -p "$initrd$(dirname "$library")"
        cp -Lu "$library" "$initrd$library"
    done
done
cp /etc/mke2fs.conf "$initrd/etc/"
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci failover net_failover \
    virtio_net virtio_blk nbd; do
    find "$work/root/lib/modules" -name "$module.ko" -exec cp {} "$initrd/modules/" \;
done

cat >"$initrd/init" <<'GUEST'
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/sbin:/bin
fail() { echo "GUEST FAILED: $*"; poweroff -f; }
mount -t proc proc /proc && mount -t sysfs sysfs /sys && mount -t devtmpfs dev /dev || fail mounts
# In any order, until each has found what it depends on.
for round in 1 2 3; do
    for module in /modules/*.ko; do insmod "$module" 2>/dev/null; done
done
ifconfig lo up && ifconfig eth0 10.0.2.15 up || fail network
echo "guest kernel $(uname -r)"
nbd-client 10.0.2.2 PORT /dev/nbd0 -N disk -C 4 || fail nbd-client
[ "$(cat /sys/block/nbd0/size)" = 524288 ] || fail "size $(cat /sys/block/nbd0/size)"
/sbin/mke2fs -q -t ext4 -F /dev/nbd0 || fail mke2fs
mount -t ext4 /dev/nbd0 /mnt || fail mount
dd if=/dev/urandom of=/mnt/first bs=1M count=24 2>/dev/null && cp /mnt/first /mnt/second && sync || fail writing
sum=$(md5sum </mnt/first)
echo 3 >/proc/sys/vm/drop_caches
[ "$(md5sum </mnt/second)" = "$sum" ] || fail "what was read is not what was written"
rm /mnt/first && /sbin/fstrim -v /mnt || fail fstrim
echo 3 >/proc/sys/vm/drop_caches
[ "$(md5sum </mnt/second)" = "$sum" ] || fail "trimming hit a file that is in use"
umount /mnt || fail umount
/sbin/e2fsck -fn /dev/nbd0 || fail e2fsck
kernel_sum=$(md5sum </dev/nbd0)
nbd-client -d /dev/nbd0 || fail disconnect
[ "$(md5sum </dev/vda)" = "$kernel_sum" ] || fail "QEMU's NBD client and the kernel's read different disks"
dmesg | grep -E 'nbd.*(error|timed out)|I/O error' && fail "errors in the kernel's log"
echo "GUEST SUCCEEDED"
poweroff -f
GUEST

image=$work/disk.raw
rm -f "$image"
truncate -s 256M "$image"
"$conbd" serve "$image" --export disk --listen 127.0.0.1:0 --iothreads 3 >"$work/uri" 2>"$work/log" &
server=$!
trap 'kill -TERM "$server" 2>/dev/null || true' EXIT
for _ in $(seq 100); do [ -s "$work/uri" ] && break; sleep 0.1; done
uri=$(head -n1 "$work/uri")
port=$(sed 's|.*:\([0-9]*\)/.*|\1|' <<<"$uri")
[ -n "$port" ] || { echo "kernel-test: the server did not start:" >&2; cat "$work/log" >&2; exit 1; }
sed -i "s/PORT/$port/" "$initrd/init"
chmod +x "$initrd/init"
(cd "$initrd" && find . | cpio -o -H newc 2>/dev/null | gzip -1) >"$work/initrd.gz"

echo "kernel-test: booting $(basename "$kernel") against $uri"
timeout 600 qemu-system-x86_64 -accel tcg -m 512 -smp 2 -nographic -no-reboot -kernel "$kernel" \
    -initrd "$work/initrd.gz" -append "console=ttyS0 quiet panic=1" \
    -netdev user,id=net -device virtio-net-pci,netdev=net \
    -drive "file=$uri,format=raw,if=virtio,cache=none" </dev/null | tr -d '\r' | tee "$work/console" |
    sed -n '/guest kernel/,$p'

kill -TERM "$server"
wait "$server" || { echo "kernel-test: the server failed:" >&2; tail "$work/log" >&2; exit 1; }
trap - EXIT
grep -q "GUEST SUCCEEDED" "$work/console" || { echo "kernel-test: failed; see $work/console and $work/log" >&2; exit 1; }
PATH=$PATH:/usr/sbin:/sbin e2fsck -fn "$image" >/dev/null || { echo "kernel-test: e2fsck finds faults in $image" >&2; exit 1; }
echo "kernel-test: passed"
