#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# The part of boot.sh that needs root: boot-guest.sh BINARIES GUEST, the directory with extentd and extentctl
# and the one with the guest's kernel and initramfs.
set -euo pipefail
NAME=boot
here=$(dirname "$0")
# shellcheck source=integration/lib/common.sh
. "$here/common.sh"
# shellcheck source=integration/lib/host.sh
. "$here/host.sh"

# shellcheck disable=SC2034
binaries=$1
guest=$2
IMAGE_MIB=512
QEMU_SECONDS=180
# The share of data segments that must have gone straight to the device, in percent.
DIRECT_SHARE=90

# ext4 with the host's files in it. It is copied with its holes filled in: an image all mapped.
make_image() {
    local seed=$work/seed file
    mkdir "$seed"
    for file in 1 2 3; do
        head -c $((file * 1000003)) /dev/urandom >"$seed/from-host$file"
    done
    (cd "$seed" && sha256sum from-host? >from-host.sha256)
    truncate -s ${IMAGE_MIB}M "$work/sparse.img"
    make_filesystem ext4 "$work/sparse.img" -d "$seed"
    dd if="$work/sparse.img" of="$image" bs=4M conv=fsync status=none || fail "no room for the image"
    rm -r "$seed" "$work/sparse.img"
}

boot_guest() {
    start_qemu "$guest/vmlinuz" "$guest/boot.initramfs" "" 2 512 2 -no-reboot
    await_qemu "$QEMU_SECONDS"
    tr -d '\r' <"$work/console.log" | grep '^guest:' >"$work/guest.log" || fail "the guest never got to its checks"
    if ! grep -q '^guest: ok ' "$work/guest.log"; then
        fail "in the guest: $(sed -n 's/^guest: FAILED: //p' "$work/guest.log" | grep . || echo 'it ended before it was done')"
    fi
    said=$(sed -n 's/^guest: ok //p' "$work/guest.log")
}

# The image as the host's own kernel sees it (or e2fsprogs, where nothing can be mounted).
check_image() {
    if [ "$expected" = direct ]; then
        mount_image ext4
    else
        check_filesystem ext4 "$image" "image's"
        debugfs -R "rdump / $inside" "$image" >/dev/null 2>&1 || fail "the image cannot be read on the host"
    fi
    (cd "$inside" && sha256sum --check --quiet --strict SHA256SUMS from-host.sha256) || fail "the host reads other bytes than the guest wrote"
    [[ $said = "files=$(wc -l <"$inside/SHA256SUMS") "* ]] || fail "the list of files is not the guest's"
    [ "$expected" = filesystem ] || unmount_image
    [ "$expected" = filesystem ] || check_host_filesystem
}

make_work boot
expected=direct
if ! make_host_filesystem ext4 $((IMAGE_MIB + 256)); then
    # A plain directory is as good for filesystem mode.
    expected=filesystem
    say "no loop device to be had here ($refusal): the image lies in $work, in filesystem mode"
fi
make_image
start_daemon --mode "$expected" --serial boot-test
say "booting the guest"
boot_guest
check_segments "$expected" "$DIRECT_SHARE"
stop_daemon
check_image
say "ok (mode=$mode, direct_segments=$share%, ${said/ /, })"
